//! Running a float graph over calibration text and looking at its intermediate tensors.
//!
//! ```text
//! graph ─► float_graph ─► cut to what the taps need, taps become outputs ─► htp, a few rows at a time ─► observer
//! ```
//!
//! Only the rows of one run are in memory, whatever the length of the text: an observer keeps what it needs of them
//! (a histogram, a sum of squares), not the tensors.

use std::collections::HashSet;
use std::sync::{Arc, atomic::AtomicBool};

use crate::{
    adapter::Adapter,
    backend::{Backend, Bindings, Executable, ExecuteError, HtpBackend, PrepareError, State},
    graph::{Graph, GraphError},
    offline::{
        generate::{GenerateError, between},
        lora::ALPHA_KEY,
        specialize,
    },
    tensor::TensorId,
};

mod float;
mod windows;

pub use float::float_graph;
pub use windows::{opened_windows, spread_windows};

/// Why a graph cannot be run over calibration text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum CalibrateError {
    #[error("the calibration set has {have} ids, need at least one window of {window}")]
    Empty { have: usize, window: usize },
    #[error("at most {max} windows of {window} ids, need at least one of each")]
    NoWindows { max: usize, window: usize },
    #[error("no tensor to look at")]
    NoTaps,
    #[error("tensor {tensor}: {count} of {of} values are not finite; it cannot be calibrated")]
    NotFinite { tensor: String, count: u64, of: u64 },
    #[error("tensor {tensor} cannot be looked at: {why}")]
    Tap { tensor: String, why: &'static str },
    #[error("graph input {input} has no meaning here; known are {known}")]
    Input { input: String, known: String },
    #[error("a window of {have} rows, this calibrator was made for 1 to {max}")]
    Window { have: usize, max: usize },
    #[error("{have}, this calibrator takes {want}")]
    Feed { have: &'static str, want: String },
    #[error("{have} strengths, the graph takes {want}")]
    Strengths { have: usize, want: usize },
    #[error("id {id} in the calibration set, the model knows 0 to 2147483647")]
    Id { id: u32 },
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error(transparent)]
    Cut(Box<GenerateError>),
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    #[error(transparent)]
    Execute(#[from] ExecuteError),
}

/// What to run and what to look at.
#[derive(Debug, Clone, Default)]
pub struct Probe {
    /// The tensors to look at, all of them computed.
    pub taps: Vec<TensorId>,
    /// Run from this tensor on, which then is fed instead of token ids; `None` runs from the ids.
    pub from: Option<TensorId>,
    /// Longest window, in rows. Every window starts from an empty cache at position 0.
    pub max_window: usize,
    /// Rows of one run: memory grows with it. 0 means [`DEFAULT_ROWS`].
    pub rows_per_run: usize,
}

/// What a window consists of.
#[derive(Debug, Clone, Copy)]
pub enum Feed<'a> {
    /// Token ids.
    Ids(&'a [u32]),
    /// Rows of [`Probe::from`], row-major.
    Rows(&'a [f32]),
}

/// Some rows of one tap.
#[derive(Debug, Clone, Copy)]
pub struct TapRows<'a> {
    /// Which of [`Probe::taps`].
    pub tap: usize,
    /// Position of the first row in its window.
    pub position: usize,
    /// Elements of a row.
    pub width: usize,
    /// Whole rows, row-major.
    pub values: &'a [f32],
}

/// A float graph with taps, made ready. One window after the other goes through [`Calibrator::run`].
pub struct Calibrator {
    executable: Box<dyn Executable>,
    bindings: Bindings,
    state: State,
    inputs: Vec<Input>,
    /// Output number and width of each tap.
    taps: Vec<(usize, usize)>,
    rows_per_run: usize,
    max_window: usize,
    /// Elements of a row of [`Probe::from`].
    fed_width: Option<usize>,
}

/// What an input of the graph is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Input {
    Ids,
    Positions,
    CacheIndex,
    LogitIndices,
    Strengths,
    Rows,
}

impl Calibrator {
    /// Makes `graph` ready. Only what the taps need is computed; integers in it become floats ([`float_graph`]), so its
    /// weights are then the values that the integers mean.
    ///
    /// # Errors
    /// [`CalibrateError`] naming the tap that is no computed tensor, or the node that the backend cannot run. A tap inside
    /// an adapter branch is such a node: look at the branch's sum.
    pub fn new(graph: &Graph, probe: &Probe, backend: &HtpBackend) -> Result<Calibrator, CalibrateError> {
        check_taps(graph, probe)?;
        let max_window = probe.max_window.max(1);
        let rows_per_run = if probe.rows_per_run == 0 { DEFAULT_ROWS } else { probe.rows_per_run }.min(max_window);
        let cut = between(graph, probe.from, &probe.taps).map_err(|why| CalibrateError::Cut(Box::new(why)))?;
        let cut = specialize(&float_graph(&cut)?, graph.name(), rows_per_run, max_window)?;
        let bindings = Bindings::new(&cut);
        let from = probe.from.map(|id| graph.tensor(id).name.as_str());
        let alpha = graph.metadata().get(ALPHA_KEY).map(String::as_str);
        let inputs = bindings.inputs().iter().map(|b| input(&b.name, from, alpha)).collect::<Result<_, _>>()?;
        let tap = |id: &TensorId| {
            let output = bindings.find_output(&graph.tensor(*id).name).expect("`between` made every tap an output");
            (output, bindings.outputs()[output].row_elements)
        };
        Ok(Calibrator {
            taps: probe.taps.iter().map(tap).collect(),
            executable: backend.prepare(&cut)?,
            state: backend.new_state(&[&cut], max_window)?,
            bindings,
            inputs,
            rows_per_run,
            max_window,
            fed_width: probe.from.map(|id| graph.tensor(id).shape.last()),
        })
    }

    /// Runs the next windows with `adapter` (made by [`crate::offline::lora::adapter_for_graph`]) at one strength for each
    /// rank column; `None` is the base.
    ///
    /// # Errors
    /// [`CalibrateError::Strengths`] if the graph has another number of columns.
    pub fn set_adapter(&mut self, adapter: Option<Arc<Adapter>>, strengths: &[f32]) -> Result<(), CalibrateError> {
        self.bindings.set_adapter(adapter);
        let Some(at) = self.inputs.iter().position(|input| *input == Input::Strengths) else { return Ok(()) };
        let want = self.bindings.inputs()[at].max_rows;
        if strengths.len() != want {
            return Err(CalibrateError::Strengths { have: strengths.len(), want });
        }
        Ok(self.bindings.set_f32(at, strengths)?)
    }

    /// Number of strengths that the graph takes; 0 if it has no adapter branches in the part that is run.
    pub fn n_strengths(&self) -> usize {
        let at = self.inputs.iter().position(|input| *input == Input::Strengths);
        at.map_or(0, |at| self.bindings.inputs()[at].max_rows)
    }

    /// Runs one window from an empty cache, and shows `observe` the rows of every tap as they come.
    ///
    /// # Errors
    /// [`CalibrateError`] if the window is empty or too long, an id is outside the vocabulary, or a kernel fails.
    pub fn run(&mut self, window: Feed<'_>, observe: &mut dyn FnMut(TapRows<'_>)) -> Result<(), CalibrateError> {
        let rows = self.check_feed(window)?;
        self.clear_strengths()?;
        for position in (0..rows).step_by(self.rows_per_run) {
            let end = rows.min(position + self.rows_per_run);
            self.bind(window, position, end)?;
            self.executable.execute(&mut self.bindings, &mut self.state, &AtomicBool::new(false))?;
            for (tap, (output, width)) in self.taps.iter().enumerate() {
                observe(TapRows { tap, position, width: *width, values: self.bindings.output_f32(*output) });
            }
        }
        Ok(())
    }

    /// Number of rows of `window`.
    fn check_feed(&self, window: Feed<'_>) -> Result<usize, CalibrateError> {
        let rows = match (window, self.fed_width) {
            (Feed::Ids(ids), None) => ids.len(),
            (Feed::Rows(values), Some(width)) if values.len().is_multiple_of(width) => values.len() / width,
            (Feed::Ids(_), Some(width)) => {
                return Err(CalibrateError::Feed { have: "token ids", want: format!("rows of {width}") });
            }
            (Feed::Rows(_), Some(width)) => {
                return Err(CalibrateError::Feed { have: "a part of a row", want: format!("whole rows of {width}") });
            }
            (Feed::Rows(_), None) => {
                return Err(CalibrateError::Feed { have: "rows of floats", want: "token ids".to_owned() });
            }
        };
        let max = self.max_window;
        if (1..=max).contains(&rows) { Ok(rows) } else { Err(CalibrateError::Window { have: rows, max }) }
    }

    /// Without [`Calibrator::set_adapter`] the strengths are 0.
    fn clear_strengths(&mut self) -> Result<(), CalibrateError> {
        let Some(at) = self.inputs.iter().position(|input| *input == Input::Strengths) else { return Ok(()) };
        if self.bindings.inputs()[at].is_empty() {
            self.bindings.set_f32(at, &vec![0.0; self.n_strengths()])?;
        }
        Ok(())
    }

    /// Binds rows `start..end` of `window`.
    fn bind(&mut self, window: Feed<'_>, start: usize, end: usize) -> Result<(), CalibrateError> {
        let integers = |range: std::ops::Range<usize>| range.map(|i| i as i32).collect::<Vec<i32>>();
        for (at, input) in self.inputs.iter().enumerate() {
            match (input, window) {
                (Input::Ids, Feed::Ids(ids)) => {
                    let id = |id: &u32| i32::try_from(*id).map_err(|_| CalibrateError::Id { id: *id });
                    let ids = ids[start..end].iter().map(id).collect::<Result<Vec<i32>, _>>()?;
                    self.bindings.set_i32(at, &ids)?;
                }
                (Input::Rows, Feed::Rows(values)) => {
                    let width = self.fed_width.unwrap_or(1);
                    self.bindings.set_f32(at, &values[start * width..end * width])?;
                }
                (Input::Positions, _) => self.bindings.set_i32(at, &integers(start..end))?,
                (Input::CacheIndex, _) => self.bindings.set_i32(at, &integers(start..start + 1))?,
                (Input::LogitIndices, _) => self.bindings.set_i32(at, &integers(0..end - start))?,
                (Input::Strengths | Input::Ids | Input::Rows, _) => {}
            }
        }
        Ok(())
    }
}

/// How many of a tap's values are numbers that something can be made of.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::offline) struct Finite {
    not_finite: u64,
    of: u64,
}

impl Finite {
    /// Takes note of `values`; true if all so far are finite.
    pub(in crate::offline) fn see(&mut self, values: &[f32]) -> bool {
        self.not_finite += values.iter().filter(|value| !value.is_finite()).count() as u64;
        self.of += values.len() as u64;
        self.not_finite == 0
    }

    /// Refuses values of the tensor called `name` among which some are not finite.
    pub(in crate::offline) fn check(self, name: &str) -> Result<(), CalibrateError> {
        let refused = || CalibrateError::NotFinite { tensor: name.to_owned(), count: self.not_finite, of: self.of };
        if self.not_finite == 0 { Ok(()) } else { Err(refused()) }
    }
}

fn check_taps(graph: &Graph, probe: &Probe) -> Result<(), CalibrateError> {
    if probe.taps.is_empty() {
        return Err(CalibrateError::NoTaps);
    }
    let computed: HashSet<TensorId> = graph.nodes().iter().flat_map(|node| node.outputs.iter().copied()).collect();
    let refuse = |id: TensorId, why| Err(CalibrateError::Tap { tensor: graph.tensor(id).name.clone(), why });
    let mut seen = HashSet::new();
    for id in &probe.taps {
        if !computed.contains(id) {
            return refuse(*id, "no node computes it");
        }
        if !seen.insert(id) {
            return refuse(*id, "it is asked for twice");
        }
        if Some(*id) == probe.from {
            return refuse(*id, "the run starts with it");
        }
    }
    match probe.from.filter(|id| !computed.contains(id)) {
        Some(id) => refuse(id, "no node computes it, so nothing can start with it"),
        None => Ok(()),
    }
}

/// What the input called `name` is given, where the run starts from tensor `from`.
fn input(name: &str, from: Option<&str>, alpha: Option<&str>) -> Result<Input, CalibrateError> {
    Ok(match name {
        "input_ids" => Input::Ids,
        "position_ids" => Input::Positions,
        "cache_index" => Input::CacheIndex,
        "logit_indices" => Input::LogitIndices,
        name if Some(name) == from => Input::Rows,
        name if Some(name) == alpha => Input::Strengths,
        _ => {
            let known = "input_ids, position_ids, cache_index, logit_indices and the strengths of adapters".to_owned();
            return Err(CalibrateError::Input { input: name.to_owned(), known });
        }
    })
}

/// Rows of one run where none are asked for.
pub const DEFAULT_ROWS: usize = 64;
