//! The crate's error: what went wrong, where, and the stable QNN status code.

use std::path::PathBuf;

use crate::{
    backend::{ExecuteError, PrepareError},
    binary::{BinaryError, BinaryFault},
    context::SectionError,
    graph::GraphError,
    offline::{
        ImportError, calibrate::CalibrateError, dlc::DlcError, encodings::EncodingsError, generate::GenerateError,
        lora::LoraError, quantize::QuantizeError, rounding::RoundingError,
    },
};

/// Anything this crate can fail with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read, mapped or written.
    #[error("{path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        why: std::io::Error,
    },
    /// A context binary is damaged, foreign, or does not fit.
    #[error("{path}: at byte {at_bytes}")]
    Binary {
        /// The file.
        path: PathBuf,
        /// Place in the file.
        at_bytes: u64,
        /// What is wrong there.
        #[source]
        why: BinaryError,
    },
    /// The graph is not well formed.
    #[error("graph")]
    Graph(#[from] GraphError),
    /// A graph of a file cannot be run by the backend.
    #[error("{path}")]
    Prepare {
        /// The context binary.
        path: PathBuf,
        /// Which node or tensor, and why.
        #[source]
        why: PrepareError,
    },
    /// A DLC is damaged, foreign, or cannot hold a graph.
    #[error("{path}: DLC")]
    Dlc {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        why: Box<DlcError>,
    },
    /// A model cannot be imported.
    #[error("{path}: import")]
    Import {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong or not supported.
        #[source]
        why: Box<ImportError>,
    },
    /// A DLC cannot be made a context binary.
    #[error("{path}: generate")]
    Generate {
        /// The DLC.
        path: PathBuf,
        /// Which option or tensor, and why.
        #[source]
        why: Box<GenerateError>,
    },
    /// An adapter section does not fit its context.
    #[error("{path}")]
    Section {
        /// The section.
        path: PathBuf,
        /// What does not fit.
        #[source]
        why: Box<SectionError>,
    },
    /// A PEFT adapter cannot be read, or does not fit the model.
    #[error("{path}: adapter")]
    Lora {
        /// The file or folder.
        path: PathBuf,
        /// Which key or tensor, and why.
        #[source]
        why: Box<LoraError>,
    },
    /// A graph cannot be run over calibration text.
    #[error("calibrate")]
    Calibrate(#[source] Box<CalibrateError>),
    /// An encodings file cannot be read, or does not fit the model.
    #[error("{path}: encodings")]
    Encodings {
        /// The file.
        path: PathBuf,
        /// Which tensor, and why.
        #[source]
        why: Box<EncodingsError>,
    },
    /// A graph cannot be quantized.
    #[error("{path}: quantize")]
    Quantize {
        /// The DLC.
        path: PathBuf,
        /// Which tensor or file, and why.
        #[source]
        why: Box<QuantizeError>,
    },
    /// Weights cannot be rounded.
    #[error("round weights")]
    Rounding(#[source] Box<RoundingError>),
    /// A step could not be run.
    #[error("execute")]
    Execute(#[from] ExecuteError),
}

impl From<CalibrateError> for Error {
    fn from(why: CalibrateError) -> Error {
        Error::Calibrate(Box::new(why))
    }
}

impl From<RoundingError> for Error {
    fn from(why: RoundingError) -> Error {
        Error::Rounding(Box::new(why))
    }
}

impl Error {
    /// Adds the path to an I/O error.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |why| Error::Io { path, why }
    }

    /// Adds the path to a DLC error.
    pub fn dlc(path: impl Into<PathBuf>) -> impl FnOnce(DlcError) -> Error {
        let path = path.into();
        move |why| Error::Dlc { path, why: Box::new(why) }
    }

    /// Adds the path to an import error.
    pub fn import(path: impl Into<PathBuf>) -> impl FnOnce(ImportError) -> Error {
        let path = path.into();
        move |why| Error::Import { path, why: Box::new(why) }
    }

    /// Adds the path to what is wrong with an adapter.
    pub fn lora(path: impl Into<PathBuf>) -> impl FnOnce(LoraError) -> Error {
        let path = path.into();
        move |why| Error::Lora { path, why: Box::new(why) }
    }

    /// Adds the path to what is wrong with an encodings file.
    pub fn encodings(path: impl Into<PathBuf>) -> impl FnOnce(EncodingsError) -> Error {
        let path = path.into();
        move |why| Error::Encodings { path, why: Box::new(why) }
    }

    /// Adds the path to why a graph cannot be quantized.
    pub fn quantize(path: impl Into<PathBuf>) -> impl FnOnce(QuantizeError) -> Error {
        let path = path.into();
        move |why| Error::Quantize { path, why: Box::new(why) }
    }

    /// Adds the path to what is wrong with a context binary.
    pub fn binary(path: impl Into<PathBuf>) -> impl FnOnce(BinaryFault) -> Error {
        let path = path.into();
        move |BinaryFault { at_bytes, why }| Error::Binary { path, at_bytes, why }
    }
}

/// A status of QNN: its number and its name. Names without a published number are not here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Code {
    /// The number.
    pub number: u32,
    /// The name in QNN's headers.
    pub name: &'static str,
}

#[allow(missing_docs, reason = "the names say it all")]
impl Code {
    pub const CONTEXT_INVALID_ARGUMENT: Code = Code::new(5000, "QNN_CONTEXT_ERROR_INVALID_ARGUMENT");
    pub const CONTEXT_NOT_FINALIZED: Code = Code::new(5003, "QNN_CONTEXT_ERROR_NOT_FINALIZED");
    pub const CONTEXT_BINARY_VERSION: Code = Code::new(5004, "QNN_CONTEXT_ERROR_BINARY_VERSION");
    pub const CONTEXT_CREATE_FROM_BINARY: Code = Code::new(5005, "QNN_CONTEXT_ERROR_CREATE_FROM_BINARY");
    pub const TENSOR_DOES_NOT_EXIST: Code = Code::new(7002, "QNN_TENSOR_ERROR_DOES_NOT_EXIST");
    pub const TENSOR_INVALID_TENSOR_PARAM: Code = Code::new(7004, "QNN_TENSOR_ERROR_INVALID_TENSOR_PARAM");
    pub const TENSOR_INCOMPATIBLE_TENSOR_UPDATE: Code = Code::new(7007, "QNN_TENSOR_ERROR_INCOMPATIBLE_TENSOR_UPDATE");

    const fn new(number: u32, name: &'static str) -> Code {
        Code { number, name }
    }
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.name, self.number)
    }
}
