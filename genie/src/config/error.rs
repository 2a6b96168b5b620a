//! What can be wrong with a config.

use std::path::PathBuf;

use thiserror::Error;

/// What is wrong with a config, and where: every place is a JSON pointer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot be read")]
    Read {
        /// What the system says.
        #[source]
        why: std::io::Error,
    },
    /// The text is longer than any config.
    #[error("{have_bytes} bytes long, a config has at most {limit_bytes}")]
    TooLong {
        /// Length found.
        have_bytes: usize,
        /// Length allowed.
        limit_bytes: usize,
    },
    /// The text is not JSON.
    #[error("not JSON")]
    Syntax {
        /// What the JSON parser says, with line and column.
        #[source]
        why: serde_json::Error,
    },
    /// A key that the schema does not have.
    #[error("{pointer}: unknown key{}", did_you_mean(hint.as_deref()))]
    UnknownKey {
        /// Where.
        pointer: String,
        /// The known key that was probably meant.
        hint: Option<String>,
    },
    /// A key that must be there.
    #[error("{pointer}: missing, the schema needs this key")]
    MissingKey {
        /// Where.
        pointer: String,
    },
    /// A key that is there twice.
    #[error("{pointer}: the key is there more than once")]
    DuplicateKey {
        /// Where.
        pointer: String,
    },
    /// A value of the wrong JSON type.
    #[error("{pointer}: found {found}, need {wanted}")]
    WrongType {
        /// Where.
        pointer: String,
        /// The value found.
        found: String,
        /// The type needed.
        wanted: &'static str,
    },
    /// A value of the right type that cannot be used.
    #[error("{pointer}: found {found}, need {wanted}")]
    Value {
        /// Where.
        pointer: String,
        /// The value found.
        found: String,
        /// What would do.
        wanted: String,
    },
    /// Something that Genie's schema has and this version does not.
    #[error("{pointer}: {what} is not supported yet")]
    Unsupported {
        /// Where.
        pointer: String,
        /// What is not supported.
        what: String,
    },
    /// A file that the config names is not there.
    #[error("{pointer}: file {}", path.display())]
    File {
        /// Where.
        pointer: String,
        /// The path, resolved against the config's directory.
        path: PathBuf,
        /// What the system says.
        #[source]
        why: std::io::Error,
    },
}

fn did_you_mean(hint: Option<&str>) -> String {
    hint.map(|hint| format!(", did you mean {hint:?}?")).unwrap_or_default()
}
