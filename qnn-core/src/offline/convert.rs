//! `qairt-converter` as a function: a model's files in, a DLC and the tokenizer's files out.

use std::io::Write;
use std::path::{Path, PathBuf};

use htp_sim::Workers;

use crate::{
    error::Error,
    offline::{
        arch::{self, Precision, WeightUse},
        dlc,
        source::Source,
    },
};

/// What to convert, where to, and in which numbers.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// A Hugging Face directory or a GGUF file.
    pub input: PathBuf,
    /// The DLC to write; tokenizer files go beside it.
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
/// [`Error::Io`]; [`Error::Import`] naming the source and what is wrong or not supported; [`Error::Dlc`].
pub fn convert(options: &ConvertOptions, progress: &mut dyn FnMut(Progress<'_>)) -> Result<ConvertReport, Error> {
    let import_error = |why| Error::import(&options.input)(why);
    let source = Source::open(&options.input)?;
    let workers = Workers::new(options.threads.max(1)).map_err(Error::io("worker threads"))?;
    progress(Progress::Weights(source.names().map_err(import_error)?.len()));
    let (graph, weights) =
        arch::build(&source, options.precision, &workers, &mut |name| progress(Progress::Weight(name)))
            .map_err(import_error)?;
    progress(Progress::Writing);
    if let Some(folder) = options.output.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    dlc::write_dlc(&options.output, &graph)?;
    let sidecars = write_sidecars(&source, &options.output)?;
    Ok(ConvertReport {
        architecture: source.config.model_type.clone(),
        parameters: weights.iter().map(|w| w.elements).sum(),
        size_bytes: std::fs::metadata(&options.output).map_err(Error::io(&options.output))?.len(),
        weights,
        sidecars,
    })
}

fn write_sidecars(source: &Source, dlc: &Path) -> Result<Vec<PathBuf>, Error> {
    let write = |(name, bytes): &(&str, Vec<u8>)| {
        let path = dlc.with_file_name(name);
        dlc::write_atomically(&path, |file| file.write_all(bytes)).map_err(Error::io(&path))?;
        Ok(path)
    };
    source.sidecars.iter().map(write).collect()
}
