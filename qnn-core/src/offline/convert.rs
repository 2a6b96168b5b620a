//! `qairt-converter` as a function: a model's files in, a DLC and the tokenizer's files out.

use std::io::Write;
use std::path::{Path, PathBuf};

use htp_sim::Workers;

use crate::{
    atomic_file,
    error::Error,
    graph::Graph,
    offline::{
        arch::{self, ActivationBits, Precision, WeightUse},
        dlc,
        encodings::{EncodingsFile, OverrideReport},
        error::ImportError,
        lora::{self, LoraOptions, LoraPlan, PeftAdapter},
        quantize,
        source::Source,
    },
    types::DataType,
};

/// What to convert, where to, and in which numbers.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// A Hugging Face directory or a GGUF file.
    pub input: PathBuf,
    /// The DLC to write, no file of the input; tokenizer files go beside it, unless that is the input's own folder.
    pub output: PathBuf,
    /// Numbers of the graph.
    pub precision: Precision,
    /// Threads that share the work; 1 or more.
    pub threads: usize,
}

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct ConvertReport {
    /// Family of the model.
    pub architecture: String,
    /// Elements of all weights.
    pub parameters: u64,
    /// Size of the DLC.
    pub size_bytes: u64,
    /// What became of the weights, by use and format.
    pub weights: Vec<WeightUse>,
    /// Files written beside the DLC.
    pub sidecars: Vec<PathBuf>,
    /// The adapter branches of the graph.
    pub lora: Option<LoraReport>,
    /// What an encodings file did.
    pub overrides: Option<OverrideReport>,
    /// What a user should know before relying on the model.
    pub warnings: Vec<String>,
}

/// Adapter branches of a converted graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoraReport {
    /// Linear layers that have one.
    pub targets: usize,
    /// Columns of each.
    pub max_rank: usize,
    /// Element type of the adapters' weights.
    pub data_type: DataType,
}

/// A step of the conversion, for a progress display.
#[derive(Debug, Clone, Copy)]
pub enum Progress<'a> {
    /// The source is open; so many weights follow.
    Weights(usize),
    /// Work on this weight begins.
    Weight(&'a str),
    /// The DLC is being written.
    Writing,
}

/// Converts a model. The folder of the DLC is made if it is not there. Nothing is written unless the whole graph could be built.
///
/// # Errors
/// [`Error::Io`]; [`Error::Import`] naming the source and what is wrong or not supported, or an output that is one of its
/// files; [`Error::Dlc`], an output that would be no DLC included.
pub fn convert(options: &ConvertOptions, progress: &mut dyn FnMut(Progress<'_>)) -> Result<ConvertReport, Error> {
    convert_with_lora(options, None, progress)
}

/// Converts a model and adds the adapter branches that `lora` asks for. Adapters are read first, and checked against the
/// model's layers before anything is written.
///
/// # Errors
/// As [`convert`]; [`Error::Lora`] naming the file and what is wrong or does not fit.
pub fn convert_with_lora(
    options: &ConvertOptions,
    lora: Option<&LoraOptions>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<ConvertReport, Error> {
    convert_with_overrides(options, lora, None, progress)
}

/// As [`convert_with_lora`], with the encodings of the AIMET file `overrides` for the weights and computed tensors that it
/// names.
///
/// # Errors
/// As [`convert_with_lora`]; [`Error::Encodings`] or [`Error::Quantize`] with the file and what does not fit.
pub fn convert_with_overrides(
    options: &ConvertOptions,
    lora: Option<&LoraOptions>,
    overrides: Option<&Path>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<ConvertReport, Error> {
    let overrides = overrides.map(|path| EncodingsFile::open(path).map(|file| (path, file))).transpose()?;
    let import_error = |why| Error::import(&options.input)(why);
    let plan = lora.map(lora::plan).transpose()?;
    let source = Source::open(&options.input)?;
    check_output(&options.output, &source, overrides.as_ref().map(|(path, _)| *path))?;
    let workers = Workers::new(options.threads.max(1)).map_err(Error::io("worker threads"))?;
    progress(Progress::Weights(source.names().map_err(import_error)?.len()));
    let (graph, weights) =
        arch::build(&source, options.precision, &workers, &mut |name| progress(Progress::Weight(name)))
            .map_err(import_error)?;
    let (mut graph, lora) = with_branches(options, graph, plan)?;
    let mut overridden = None;
    if let Some((path, file)) = overrides {
        let bits = if options.precision.activations == ActivationBits::Eight { 8 } else { 16 };
        let (changed, report) =
            quantize::with_overrides(&graph, &file, bits, options.precision.cache).map_err(Error::quantize(path))?;
        (graph, overridden) = (changed, Some(report));
    }
    progress(Progress::Writing);
    if let Some(folder) = options.output.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    dlc::write_dlc(&options.output, &graph)?;
    let sidecars = write_sidecars(&source, options)?;
    Ok(ConvertReport {
        architecture: source.config.model_type.clone(),
        parameters: weights.iter().map(|w| w.elements).sum(),
        size_bytes: std::fs::metadata(&options.output).map_err(Error::io(&options.output))?.len(),
        weights,
        sidecars,
        lora,
        overrides: overridden,
        warnings: source.config.warnings,
    })
}

/// `graph` with the branches of `plan`, if there is one, and what they are. The plan's adapters have to fit.
pub(super) fn with_branches(
    options: &ConvertOptions,
    graph: Graph,
    plan: Option<(LoraPlan, Vec<PeftAdapter>)>,
) -> Result<(Graph, Option<LoraReport>), Error> {
    let Some((mut plan, adapters)) = plan else { return Ok((graph, None)) };
    let points = lora::attach_points(&graph);
    plan.split_fused(&points);
    for mut adapter in adapters {
        adapter.split_fused(&points).map_err(Error::lora(&adapter.path))?;
        adapter.fits(&points).map_err(Error::lora(&adapter.path))?;
    }
    let graph = lora::add_branches(&graph, &plan).map_err(Error::lora(&options.input))?;
    let branch = lora::attach_points(&graph).into_iter().find_map(|point| point.branch);
    let report = branch.map(|branch| LoraReport {
        targets: plan.targets.len(),
        max_rank: branch.max_rank,
        data_type: branch.data_type,
    });
    Ok((graph, report))
}

/// A DLC in place of a file of its own source would leave the user without the model.
pub(super) fn check_output(output: &Path, source: &Source, overrides: Option<&Path>) -> Result<(), Error> {
    let mut inputs = source.files.iter().map(PathBuf::as_path).chain(overrides);
    let own = atomic_file::place(output);
    if inputs.any(|input| atomic_file::place(input) == own) {
        return Err(Error::import(output)(ImportError::OutputIsInput));
    }
    dlc::check_output(output)
}

fn write_sidecars(source: &Source, options: &ConvertOptions) -> Result<Vec<PathBuf>, Error> {
    let dlc = &options.output;
    // The model's own folder has all that the sidecars are made of, and a dialog finds the template in its own file there.
    let folder = atomic_file::folder_of(dlc).canonicalize().ok();
    if folder.is_some() && folder == options.input.canonicalize().ok() {
        return Ok(Vec::new());
    }
    let write = |(name, bytes): &(&str, Vec<u8>)| {
        let path = dlc.with_file_name(name);
        atomic_file::write(&path, |file| file.write_all(bytes)).map_err(Error::io(&path))?;
        Ok(path)
    };
    source.sidecars.iter().map(write).collect()
}
