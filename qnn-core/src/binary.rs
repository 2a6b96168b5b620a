//! The container of context binaries and adapter sections: named, checksummed parts in one file that is made to be mapped.
//!
//! `FORMAT.md` is the specification. [`Binary`] reads it, [`BinaryWriter`] writes it; [`SectionFile`] is an adapter
//! section on its own. What the parts mean to a context is the business of [`crate::context`].

mod info;
pub(crate) mod layout;
mod meta;
mod read;
pub(crate) mod section;
mod write;

pub use info::{BinaryInfo, ConstantInfo, FileInfo, GraphInfo, SectionInfo, SectionTensorInfo};
pub use meta::Meta;
pub(crate) use meta::TOOL;
pub use read::{Binary, Section, Verify};
pub use section::{GraphIo, SectionFile, SectionMeta, SectionType, SlotRecord, TensorEncodingRecord};
pub use write::{BinaryWriter, FileWriter, Written, write_file, write_section_file};

/// What a section holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum SectionKind {
    /// JSON about the file: the tool that wrote it, the model's metadata.
    Meta = 1,
    /// JSON of one graph.
    Graph = 2,
    /// Value of a constant.
    Tensor = 3,
    /// Scales of a constant's encoding.
    Scales = 4,
    /// Whole offsets of a constant's encoding.
    Offsets = 5,
    /// Float minima of a constant's encoding.
    Mins = 6,
    /// Extents and formats of the tensors of an adapter section.
    Layouts = 7,
}

impl SectionKind {
    /// Every kind, with the name used in messages.
    pub const ALL: &[(SectionKind, &str)] = &[
        (SectionKind::Meta, "META"),
        (SectionKind::Graph, "GRAPH"),
        (SectionKind::Tensor, "TENSOR"),
        (SectionKind::Scales, "SCALES"),
        (SectionKind::Offsets, "OFFSETS"),
        (SectionKind::Mins, "MINS"),
        (SectionKind::Layouts, "LAYOUTS"),
    ];

    /// Name in messages: `TENSOR`.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or("?", |(_, name)| name)
    }

    fn from_number(number: u32) -> Option<SectionKind> {
        Self::ALL.iter().find(|(kind, _)| *kind as u32 == number).map(|(kind, _)| *kind)
    }

    /// True for JSON, which is small, always read and therefore always checked.
    fn is_json(self) -> bool {
        matches!(self, SectionKind::Meta | SectionKind::Graph)
    }
}

impl std::fmt::Display for SectionKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What a file is as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum FileKind {
    /// Graphs and their constants.
    Context = 1,
    /// The values of one adapter.
    AdapterSection = 2,
}

impl std::fmt::Display for FileKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            FileKind::Context => "a context binary",
            FileKind::AdapterSection => "an adapter section",
        })
    }
}

/// Version of the crate that wrote a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names say it all")]
pub struct SdkVersion {
    pub major: u16,
    pub minor: u16,
    pub patch: u16,
}

impl SdkVersion {
    /// The version of this crate.
    pub const CURRENT: SdkVersion = SdkVersion {
        major: number(env!("CARGO_PKG_VERSION_MAJOR")),
        minor: number(env!("CARGO_PKG_VERSION_MINOR")),
        patch: number(env!("CARGO_PKG_VERSION_PATCH")),
    };
}

/// Reads a decimal number while compiling; a digit that is none, or too many, stops the compiler.
const fn number(text: &str) -> u16 {
    let (bytes, mut value, mut i) = (text.as_bytes(), 0, 0);
    while i < bytes.len() {
        assert!(bytes[i].is_ascii_digit());
        value = value * 10 + (bytes[i] - b'0') as u16;
        i += 1;
    }
    value
}

impl std::fmt::Display for SdkVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// Hash of all graphs and constants of a file: equal for equal models, whatever the metadata.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity(pub [u8; 32]);

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({self})")
    }
}

/// What is wrong with a file, and where.
#[derive(Debug, thiserror::Error)]
#[error("at byte {at_bytes}")]
pub struct BinaryFault {
    /// Place in the file.
    pub at_bytes: u64,
    /// What is wrong there.
    #[source]
    pub why: BinaryError,
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum BinaryError {
    #[error("not a genie context binary: it starts with {have:02x?}, need {:02x?} (\"GNCB\")", layout::MAGIC)]
    Foreign { have: Vec<u8> },
    #[error("header is cut: the file has {have_bytes} bytes, need {}", layout::HEADER_BYTES)]
    Short { have_bytes: u64 },
    #[error("{what} is damaged: checksum {have:08x}, need {want:08x}")]
    Checksum { what: String, have: u32, want: u32 },
    #[error(
        "format version {have}, written by SDK {sdk}; this is SDK {}, which reads versions 1 to {}",
        SdkVersion::CURRENT,
        layout::FORMAT_VERSION
    )]
    Version { have: u16, sdk: SdkVersion },
    #[error("is {have}, need {want}")]
    Kind { have: FileKind, want: FileKind },
    #[error("{field}: found {have}, need {want}")]
    Field { field: &'static str, have: u64, want: String },
    #[error("section {section}: {field} is {have}, need {want}")]
    Entry { section: String, field: &'static str, have: u64, want: String },
    #[error("section {section}: name is not UTF-8")]
    Name { section: u32 },
    #[error("two sections are called {section}")]
    Duplicate { section: String },
    #[error("section {section} is missing")]
    Missing { section: String },
    #[error("section {section} is used by no graph")]
    Unused { section: String },
    #[error("section {section}")]
    Json {
        section: String,
        #[source]
        why: serde_json::Error,
    },
    #[error("section {section}")]
    Graph {
        section: String,
        #[source]
        why: Box<crate::record::RecordError>,
    },
    #[error("{have} graphs, need 1 to {MAX_GRAPHS}")]
    GraphCount { have: usize },
    #[error("graphs {first} and {second} have different constants called {tensor}")]
    Conflict { first: String, second: String, tensor: String },
    #[error("section {section} comes after {before}, need the order of their names")]
    Order { section: String, before: String },
    #[error("section {section}: panels")]
    Panels {
        section: String,
        #[source]
        why: htp_sim::ShapeError,
    },
    #[error("{what}")]
    Io {
        what: &'static str,
        #[source]
        why: std::io::Error,
    },
}

impl BinaryError {
    /// Adds the place.
    pub(crate) fn at(self, at_bytes: u64) -> BinaryFault {
        BinaryFault { at_bytes, why: self }
    }
}

/// Most sections of a file.
pub const MAX_SECTIONS: u32 = 1 << 20;
/// Most bytes of a section's name.
pub const MAX_NAME_BYTES: usize = 1024;
/// Most bytes of the META section.
pub const MAX_META_BYTES: usize = 1 << 20;
/// Most graphs of a context.
pub const MAX_GRAPHS: usize = 64;
