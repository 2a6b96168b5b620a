//! Writing the container in one pass: sections as they come, then the table, then the header.

use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

use zerocopy::IntoBytes;

use crate::atomic_file::{AtomicFile, PieceWriter};

use super::{
    BinaryError, FileKind, Identity, MAX_NAME_BYTES, MAX_SECTIONS, SdkVersion, SectionKind,
    layout::{ALIGN_BYTES, CONTEXT_FORMAT_VERSION, Entry, FORMAT_VERSION, HEADER_BYTES, Header, MAGIC},
};

/// Writes a context binary or an adapter section to `out`, which must be empty. Holds one section at a time.
#[derive(Debug)]
pub struct BinaryWriter<W> {
    out: W,
    kind: FileKind,
    base_identity: Identity,
    at_bytes: u64,
    entries: Vec<Entry>,
    names: Vec<u8>,
    identity: blake3::Hasher,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Size of the file.
    pub size_bytes: u64,
    /// Hash of graphs and constants.
    pub identity: Identity,
}

impl<W: Write + Seek> BinaryWriter<W> {
    /// Starts a context binary at the current position of `out`, which must be 0.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(out: W) -> io::Result<BinaryWriter<W>> {
        BinaryWriter::start(out, FileKind::Context, Identity([0; 32]))
    }

    /// Starts an adapter section for the context `base` at the current position of `out`, which must be 0.
    ///
    /// # Errors
    /// What the system says.
    pub fn section(out: W, base: Identity) -> io::Result<BinaryWriter<W>> {
        BinaryWriter::start(out, FileKind::AdapterSection, base)
    }

    fn start(mut out: W, kind: FileKind, base_identity: Identity) -> io::Result<BinaryWriter<W>> {
        out.write_all(&[0; HEADER_BYTES])?;
        let (at_bytes, entries, names) = (HEADER_BYTES as u64, Vec::new(), Vec::new());
        Ok(BinaryWriter { out, kind, base_identity, at_bytes, entries, names, identity: blake3::Hasher::new() })
    }

    /// Appends a section. The caller keeps kind and name unique, and META first.
    ///
    /// # Errors
    /// [`BinaryError`] if the section is empty, its name too long, or there are too many; or what the system says.
    pub fn add(&mut self, kind: SectionKind, name: &str, bytes: &[u8]) -> Result<(), BinaryError> {
        let refuse = |field, have: usize, want: String| {
            Err(BinaryError::Entry { section: format!("{kind} {name:?}"), field, have: have as u64, want })
        };
        if bytes.is_empty() {
            return refuse("size_bytes", 0, "at least 1".to_owned());
        }
        if name.len() > MAX_NAME_BYTES {
            return refuse("name_bytes", name.len(), format!("at most {MAX_NAME_BYTES}"));
        }
        if self.entries.len() == MAX_SECTIONS as usize {
            return refuse("number", self.entries.len(), format!("below {MAX_SECTIONS}"));
        }
        let entry = Entry {
            kind: (kind as u32).into(),
            name_bytes: (name.len() as u32).into(),
            crc32: crc32fast::hash(bytes).into(),
            reserved_12: 0.into(),
            at_bytes: self.at_bytes.into(),
            size_bytes: (bytes.len() as u64).into(),
        };
        if kind != SectionKind::Meta {
            self.identity.update(entry.kind.as_bytes());
            self.identity.update(entry.name_bytes.as_bytes());
            self.identity.update(name.as_bytes());
            self.identity.update(entry.size_bytes.as_bytes());
            self.identity.update(blake3::hash(bytes).as_bytes());
        }
        self.entries.push(entry);
        self.names.extend_from_slice(name.as_bytes());
        self.write_padded(bytes).map_err(|why| BinaryError::Io { what: "write a section", why })
    }

    /// Size of what was written so far: where the next section goes.
    pub fn at_bytes(&self) -> u64 {
        self.at_bytes
    }

    /// Writes table, names and header, and hands back `out`, flushed.
    ///
    /// # Errors
    /// What the system says.
    pub fn finish(mut self) -> io::Result<(W, Written)> {
        let table_at_bytes = self.at_bytes;
        let table = self.entries.as_bytes();
        let mut table_crc = crc32fast::Hasher::new();
        table_crc.update(table);
        table_crc.update(&self.names);
        self.out.write_all(table)?;
        self.out.write_all(&self.names)?;

        let size_bytes = table_at_bytes + (table.len() + self.names.len()) as u64;
        let identity = Identity(*self.identity.finalize().as_bytes());
        let sdk = SdkVersion::CURRENT;
        let mut header = Header {
            magic: MAGIC,
            format_version: match self.kind {
                FileKind::Context => CONTEXT_FORMAT_VERSION,
                FileKind::AdapterSection => FORMAT_VERSION,
            }
            .into(),
            kind: (self.kind as u16).into(),
            sdk_version: [sdk.major.into(), sdk.minor.into(), sdk.patch.into()],
            reserved_14: 0.into(),
            file_bytes: size_bytes.into(),
            table_at_bytes: table_at_bytes.into(),
            // At most `MAX_SECTIONS`, and names of at most 2^10 bytes each: both fit, as `add` saw to.
            n_sections: (self.entries.len() as u32).into(),
            names_bytes: (self.names.len() as u32).into(),
            table_crc32: table_crc.finalize().into(),
            reserved_44: 0.into(),
            identity: identity.0,
            base_identity: self.base_identity.0,
            reserved_112: [0; 12],
            header_crc32: 0.into(),
        };
        header.header_crc32 = header.crc32().into();
        self.out.seek(SeekFrom::Start(0))?;
        self.out.write_all(header.as_bytes())?;
        self.out.flush()?;
        Ok((self.out, Written { size_bytes, identity }))
    }

    fn write_padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        let end = self.at_bytes + bytes.len() as u64;
        self.at_bytes = end.next_multiple_of(ALIGN_BYTES);
        let padding = [0; ALIGN_BYTES as usize];
        self.out.write_all(&padding[..(self.at_bytes - end) as usize])
    }
}

/// A file being written.
pub type FileWriter<'a> = BinaryWriter<PieceWriter<'a>>;

/// Writes a context binary to `path` as a whole or not at all: a temporary file beside it is filled by `fill`, brought to
/// the disk and renamed.
///
/// # Errors
/// What `fill` returns, or what the system says.
pub fn write_file(
    path: &Path,
    fill: impl FnOnce(&mut FileWriter<'_>) -> Result<(), crate::Error>,
) -> Result<Written, crate::Error> {
    write_kind(path, FileKind::Context, Identity([0; 32]), fill)
}

/// As [`write_file`], an adapter section for the context `base`.
///
/// # Errors
/// What `fill` returns, or what the system says.
pub fn write_section_file(
    path: &Path,
    base: Identity,
    fill: impl FnOnce(&mut FileWriter<'_>) -> Result<(), crate::Error>,
) -> Result<Written, crate::Error> {
    write_kind(path, FileKind::AdapterSection, base, fill)
}

fn write_kind(
    path: &Path,
    kind: FileKind,
    base: Identity,
    fill: impl FnOnce(&mut FileWriter<'_>) -> Result<(), crate::Error>,
) -> Result<Written, crate::Error> {
    let new = AtomicFile::create(path).map_err(crate::Error::io(path))?;
    let written = {
        let mut writer =
            BinaryWriter::start(PieceWriter::new(new.file()), kind, base).map_err(crate::Error::io(path))?;
        fill(&mut writer)?;
        writer.finish().map_err(crate::Error::io(path))?.1
    };
    new.commit().map_err(crate::Error::io(path))?;
    Ok(written)
}
