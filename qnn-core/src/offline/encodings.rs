//! AIMET's encodings files: scales and offsets of weights and of computed tensors, by name.
//!
//! ```text
//! 0.6.1   {"activation_encodings": {name: [{…}]}, "param_encodings": {name: [{…}, one per channel]}}
//! 1.0.0   {"activation_encodings": [{"name": …}],  "param_encodings": [{"name": …}]}
//! 2.0.0   {"encodings": [{"name": …, "output_dtype": "uint8", "y_scale": …, "y_zero_point": …}]}
//! ```
//!
//! All become [`FileEncoding`]s under one law, `float = (q + offset) * scale` (see [`crate::encoding`]): 0.6.1 and 1.0.0
//! count codes from 0 and have negative offsets, 2.0.0 has the codes of its `output_dtype` and zero points.

use std::path::Path;

use serde_json::Value;

use crate::{error::Error, graph::GraphError, offline::safetensors::read_text};

mod apply;
mod read;
mod write;

pub use apply::{OverrideReport, dump, override_encodings};
pub(in crate::offline) use apply::{computed_encoding, replaced};

/// The three forms that AIMET has written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileVersion {
    /// `0.6.1` and its predecessors.
    V0_6_1,
    /// `1.0.0`.
    V1_0_0,
    /// `2.0.0`.
    V2_0_0,
}

impl FileVersion {
    /// What stands in the file.
    pub fn name(self) -> &'static str {
        match self {
            FileVersion::V0_6_1 => "0.6.1",
            FileVersion::V1_0_0 => "1.0.0",
            FileVersion::V2_0_0 => "2.0.0",
        }
    }

    /// The version called `name`.
    pub fn from_name(name: &str) -> Option<FileVersion> {
        [FileVersion::V0_6_1, FileVersion::V1_0_0, FileVersion::V2_0_0].into_iter().find(|v| v.name() == name)
    }
}

/// A file's contents.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodingsFile {
    /// Which form it had, or is to have.
    pub version: FileVersion,
    /// What it says, in its order.
    pub tensors: Vec<FileEncoding>,
}

/// What a file says of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct FileEncoding {
    /// The tensor's name.
    pub name: String,
    /// Whether it stands among the weights; `None` in 2.0.0, which does not tell.
    pub is_param: Option<bool>,
    /// Its numbers.
    pub numbers: Numbers,
}

/// The numbers of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Numbers {
    /// Floats of so many bits.
    Float {
        /// 16 or 32.
        bits: u8,
    },
    /// Integers.
    Integer(Integers),
}

/// Integers with a scale and an offset, or several.
#[derive(Debug, Clone, PartialEq)]
pub struct Integers {
    /// Width of a code.
    pub bits: u8,
    /// Whether codes are `-2^(bits - 1)..` or `0..`.
    pub signed: bool,
    /// What shares a scale.
    pub layout: Layout,
    /// Scales: one; one for each channel; or row by row one for each block.
    pub scales: Vec<f64>,
    /// As many offsets: `float = (q + offset) * scale`.
    pub offsets: Vec<i64>,
}

/// What shares a scale.
#[derive(Debug, Clone, PartialEq)]
pub enum Layout {
    /// All elements.
    PerTensor,
    /// Those of one output channel.
    PerChannel,
    /// Runs of inputs of one output channel.
    PerBlock {
        /// Length of a run.
        block_size: usize,
    },
    /// As per block, where a block's scale is a whole number times the channel's, which `scales` has.
    Lpbq {
        /// Length of a run.
        block_size: usize,
        /// Width of what the products of a code and a block's number fit in.
        decompressed_bits: u8,
        /// The whole numbers, row by row.
        block_scales: Vec<u32>,
    },
}

impl Integers {
    /// Smallest and largest code.
    pub fn codes(&self) -> (i64, i64) {
        let least = if self.signed { -(1i64 << (self.bits - 1)) } else { 0 };
        (least, least + (1i64 << self.bits) - 1)
    }

    /// The same numbers with signed (or unsigned) codes.
    #[must_use]
    pub fn with_signed(mut self, signed: bool) -> Integers {
        if self.signed != signed {
            let half = 1i64 << (self.bits - 1);
            self.offsets.iter_mut().for_each(|offset| *offset += if signed { half } else { -half });
            self.signed = signed;
        }
        self
    }

    /// Whether zero is the middle code of all.
    pub fn is_symmetric(&self) -> bool {
        let middle = if self.signed { 0 } else { -(1i64 << (self.bits - 1)) };
        self.offsets.iter().all(|offset| *offset == middle)
    }
}

/// Why an encodings file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum EncodingsError {
    #[error("not the JSON expected here")]
    Json(#[source] serde_json::Error),
    #[error("version {have}, need 0.6.1, 1.0.0 or 2.0.0")]
    Version { have: String },
    #[error("{have}, need {want}")]
    Form { have: String, want: &'static str },
    #[error("encoding of {tensor}: {key} is {have}, need {want}")]
    Entry { tensor: String, key: &'static str, have: String, want: String },
    #[error("encoding of {tensor} is there twice")]
    Twice { tensor: String },
    #[error(
        "none of its {have} tensors ({first} the first) is one of the graph's {want}, which has {like}: made for another model?"
    )]
    OtherModel { have: usize, first: String, want: usize, like: String },
    #[error("{} tensors do not fit the graph: {}", list.len(), list.join("; "))]
    Misfits { list: Vec<String> },
    #[error(transparent)]
    Graph(#[from] GraphError),
}

impl EncodingsFile {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Encodings`] with the path and what is wrong.
    pub fn open(path: &Path) -> Result<EncodingsFile, Error> {
        EncodingsFile::parse(&read_text(path, MAX_FILE_BYTES)?).map_err(Error::encodings(path))
    }

    /// Reads a file in any of the versions.
    ///
    /// # Errors
    /// [`EncodingsError`] naming the tensor and the key.
    pub fn parse(json: &[u8]) -> Result<EncodingsFile, EncodingsError> {
        let file = serde_json::from_slice(json).or_else(|error| {
            // Where an encoding is made of these, the tensor can be named; elsewhere they do no harm.
            serde_json::from_slice(&read::quote_non_numbers(json)).map_err(|_| error)
        });
        read::read(file.map_err(EncodingsError::Json)?)
    }

    /// The file in its version. Scales are written so that they read back as the same.
    pub fn to_json(&self) -> Value {
        write::write(self)
    }

    /// What the file says of the tensor called `name`.
    pub fn find(&self, name: &str) -> Option<&FileEncoding> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

/// Longest file that is read.
const MAX_FILE_BYTES: u64 = 1 << 30;

#[cfg(test)]
mod tests;
