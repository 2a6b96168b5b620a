//! The crate's error: what went wrong, where, and the stable QNN status code.

use std::path::PathBuf;

use crate::{backend::ExecuteError, graph::GraphError};

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
    /// The graph is not well formed.
    #[error("graph")]
    Graph(#[from] GraphError),
    /// A step could not be run.
    #[error("execute")]
    Execute(#[from] ExecuteError),
}

impl Error {
    /// Adds the path to an I/O error.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |why| Error::Io { path, why }
    }
}
