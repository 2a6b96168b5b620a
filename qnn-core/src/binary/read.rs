//! Reading the container: everything that `FORMAT.md` promises about the outer layer is checked here, once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use zerocopy::FromBytes;

use super::{
    BinaryError, BinaryFault, FileKind, Identity, MAX_NAME_BYTES, MAX_SECTIONS, SdkVersion, SectionKind,
    layout::{ALIGN_BYTES, ENTRY_BYTES, Entry, FORMAT_VERSION, HEADER_BYTES, Header, MAGIC},
};
use crate::map::Bytes;

/// How much of a file is checked against its checksums when it is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verify {
    /// Everything. Reads the whole file.
    #[default]
    Checksums,
    /// Header, section table and graphs. Constants are not touched, so that they are read from disk when first used.
    Headers,
}

/// A checked container file.
#[derive(Debug, Clone)]
pub struct Binary {
    bytes: Bytes,
    kind: FileKind,
    format_version: u16,
    sdk_version: SdkVersion,
    identity: Identity,
    base_identity: Identity,
    sections: Vec<Section>,
    /// Indices of `sections`, sorted by kind and name.
    by_name: Vec<u32>,
}

/// One section of a [`Binary`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// What it holds.
    pub kind: SectionKind,
    /// Unique among the sections of its kind.
    pub name: Box<str>,
    /// Place in the file.
    pub at_bytes: u64,
    /// Size, at least 1.
    pub size_bytes: u64,
    /// Checksum of its bytes.
    pub crc32: u32,
}

impl Section {
    /// Kind and name, for messages.
    pub(crate) fn label(&self) -> String {
        format!("{} {:?}", self.kind, self.name)
    }

    fn end_bytes(&self) -> u64 {
        self.at_bytes + self.size_bytes
    }
}

impl Binary {
    /// Checks `bytes` as a context binary. Sections are slices of `bytes`: nothing is copied.
    ///
    /// # Errors
    /// [`BinaryFault`]: what is wrong and where.
    pub fn parse(bytes: Bytes, verify: Verify) -> Result<Binary, BinaryFault> {
        let binary = Binary::parse_any(bytes, verify)?;
        binary.expect_kind(FileKind::Context)?;
        Ok(binary)
    }

    /// Checks `bytes` as a file of either kind.
    ///
    /// # Errors
    /// [`BinaryFault`]: what is wrong and where.
    pub fn parse_any(bytes: Bytes, verify: Verify) -> Result<Binary, BinaryFault> {
        let (header, kind) = read_header(&bytes)?;
        let (entries, names) = read_table(&bytes, &header)?;
        let sections = read_sections(&header, entries, names)?;
        let by_name = sort_by_name(&header, &sections)?;
        let (format_version, sdk_version) = (header.format_version.get(), sdk_version(&header));
        let (identity, base_identity) = (Identity(header.identity), Identity(header.base_identity));
        let binary = Binary { bytes, kind, format_version, sdk_version, identity, base_identity, sections, by_name };
        binary.verify_checksums(binary.sections.iter().filter(|section| section.kind.is_json()).collect(), || ())?;
        match verify {
            Verify::Headers => Ok(binary),
            Verify::Checksums => binary.verify_beside(|| ()).map(|()| binary),
        }
    }

    /// Refuses a file of another kind.
    pub(crate) fn expect_kind(&self, want: FileKind) -> Result<(), BinaryFault> {
        if self.kind == want { Ok(()) } else { Err(BinaryError::Kind { have: self.kind, want }.at(6)) }
    }

    /// What the file is.
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// All sections, in the order of the file.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Number of the section of this kind and name.
    pub fn find(&self, kind: SectionKind, name: &str) -> Option<usize> {
        let key = |i: &u32| {
            let section = &self.sections[*i as usize];
            (section.kind, &*section.name)
        };
        self.by_name.binary_search_by_key(&(kind, name), key).ok().map(|at| self.by_name[at] as usize)
    }

    /// The bytes of section number `index`, sharing the file's memory.
    ///
    /// # Panics
    /// If there is no such section.
    pub fn bytes(&self, index: usize) -> Bytes {
        let section = &self.sections[index];
        let range = section.at_bytes as usize..section.end_bytes() as usize;
        self.bytes.slice(range).expect("`read_sections` checked that every section lies in the file")
    }

    /// Size of the whole file.
    pub fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Version of the file's format.
    pub fn format_version(&self) -> u16 {
        self.format_version
    }

    /// Version of the crate that wrote the file.
    pub fn sdk_version(&self) -> SdkVersion {
        self.sdk_version
    }

    /// Hash of graphs and constants, as the header states it.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Identity of the context that an adapter section belongs to; zeros in a context.
    pub fn base_identity(&self) -> Identity {
        self.base_identity
    }

    /// Calls `meanwhile` while other threads check what [`Verify::Headers`] leaves out: constants and padding.
    pub(crate) fn verify_beside<R>(&self, meanwhile: impl FnOnce() -> R) -> Result<R, BinaryFault> {
        let constants = self.sections.iter().filter(|section| !section.kind.is_json());
        let result = self.verify_checksums(constants.collect(), meanwhile)?;
        let ends = self.sections.iter().map(Section::end_bytes);
        for (i, end) in ends.enumerate() {
            let gap = &self.bytes[end as usize..align(end) as usize];
            if let Some(at) = gap.iter().position(|byte| *byte != 0) {
                let (have, want) = (u64::from(gap[at]), "0".to_owned());
                let section = self.sections[i].label();
                return Err(BinaryError::Entry { section, field: "padding", have, want }.at(end + at as u64));
            }
        }
        Ok(result)
    }

    /// Checks sections in parallel, pieces of large ones too, and reports the first damaged one of them. Calls `meanwhile`.
    fn verify_checksums<R>(&self, sections: Vec<&Section>, meanwhile: impl FnOnce() -> R) -> Result<R, BinaryFault> {
        let pieces: Vec<(usize, u64, u64)> = sections
            .iter()
            .enumerate()
            .flat_map(|(i, section)| {
                let starts = (section.at_bytes..section.end_bytes()).step_by(PIECE_BYTES as usize);
                starts.map(move |at| (i, at, section.end_bytes().min(at + PIECE_BYTES)))
            })
            .collect();
        let hashes = Mutex::new(vec![None; pieces.len()]);
        let hash_piece = |piece: usize| {
            let (_, at, end) = pieces[piece];
            let mut hasher = crc32fast::Hasher::new();
            hasher.update(&self.bytes[at as usize..end as usize]);
            hashes.lock().unwrap_or_else(PoisonError::into_inner)[piece] = Some(hasher);
        };
        let bytes = pieces.iter().map(|(_, at, end)| end - at).sum();
        let result = on_all_cores(pieces.len(), bytes, hash_piece, meanwhile);
        let mut whole = vec![crc32fast::Hasher::new(); sections.len()];
        let hashes = hashes.into_inner().unwrap_or_else(PoisonError::into_inner);
        for ((i, ..), hash) in pieces.iter().zip(&hashes) {
            whole[*i].combine(hash.as_ref().expect("`on_all_cores` ran every piece"));
        }
        for (section, hasher) in sections.iter().zip(whole) {
            check_crc(|| format!("section {}", section.label()), hasher.finalize(), section.crc32, section.at_bytes)?;
        }
        Ok(result)
    }
}

/// Steps 1 and the first half of 2 of `FORMAT.md`: the header on its own.
fn read_header(bytes: &[u8]) -> Result<(Header, FileKind), BinaryFault> {
    let start = &bytes[..bytes.len().min(MAGIC.len())];
    if start != &MAGIC[..start.len()] {
        return Err(BinaryError::Foreign { have: start.to_vec() }.at(0));
    }
    let Ok((header, _)) = Header::read_from_prefix(bytes) else {
        return Err(BinaryError::Short { have_bytes: bytes.len() as u64 }.at(0));
    };
    check_crc(|| "header".to_owned(), header.crc32(), header.header_crc32.get(), 0)?;
    let version = header.format_version.get();
    if version == 0 || version > FORMAT_VERSION {
        return Err(BinaryError::Version { have: version, sdk: sdk_version(&header) }.at(4));
    }
    let kind = match header.kind.get() {
        1 => FileKind::Context,
        2 => FileKind::AdapterSection,
        other => return Err(field("kind", u64::from(other), "1 (context) or 2 (adapter section)").at(6)),
    };
    let base = if kind == FileKind::Context { first_nonzero(&header.base_identity) } else { 0 };
    let zeroes = [
        ("reserved", u64::from(header.reserved_14.get()), 14),
        ("reserved", u64::from(header.reserved_44.get()), 44),
        ("base_identity", base, 80),
        ("reserved", first_nonzero(&header.reserved_112), 112),
    ];
    for (name, value, at_bytes) in zeroes {
        if value != 0 {
            return Err(field(name, value, "0").at(at_bytes));
        }
    }
    let have = header.file_bytes.get();
    if have != bytes.len() as u64 {
        return Err(field("file_bytes", have, &format!("{}, the size of the file", bytes.len())).at(16));
    }
    Ok((header, kind))
}

/// The rest of step 2: the table and the names, checked as bytes.
fn read_table<'a>(bytes: &'a [u8], header: &Header) -> Result<(&'a [Entry], &'a [u8]), BinaryFault> {
    let (at, file) = (header.table_at_bytes.get(), bytes.len() as u64);
    if at < HEADER_BYTES as u64 || at > file || !at.is_multiple_of(ALIGN_BYTES) {
        let want = format!("a multiple of {ALIGN_BYTES} from {HEADER_BYTES} to {file}");
        return Err(field("table_at_bytes", at, &want).at(24));
    }
    let n = header.n_sections.get();
    if n == 0 || n > MAX_SECTIONS {
        return Err(field("n_sections", u64::from(n), &format!("1 to {MAX_SECTIONS}")).at(32));
    }
    let table_bytes = u64::from(n) * ENTRY_BYTES as u64;
    let names_bytes = u64::from(header.names_bytes.get());
    if table_bytes + names_bytes != file - at {
        let want = format!("{} bytes of table and names, from the table to the end of the file", file - at);
        return Err(field("n_sections and names_bytes", table_bytes + names_bytes, &want).at(32));
    }
    let rest = &bytes[at as usize..];
    check_crc(|| "section table".to_owned(), crc32fast::hash(rest), header.table_crc32.get(), at)?;
    let (entries, names) = <[Entry]>::ref_from_prefix_with_elems(rest, n as usize)
        .expect("the table's size was compared with the file's, and entries have no alignment");
    Ok((entries, names))
}

/// Step 3: every section is known, named, and lies exactly where it must.
fn read_sections(header: &Header, entries: &[Entry], mut names: &[u8]) -> Result<Vec<Section>, BinaryFault> {
    let table_at = header.table_at_bytes.get();
    let mut sections: Vec<Section> = Vec::with_capacity(entries.len());
    let mut next_at = HEADER_BYTES as u64;
    for (i, entry) in entries.iter().enumerate() {
        let place = table_at + (i * ENTRY_BYTES) as u64;
        let name_bytes = entry.name_bytes.get() as usize;
        if name_bytes > names.len().min(MAX_NAME_BYTES) {
            let want = format!("at most {}", names.len().min(MAX_NAME_BYTES));
            return Err(entry_error(i, "name_bytes", name_bytes as u64, want).at(place + 4));
        }
        let (name, rest) = names.split_at(name_bytes);
        names = rest;
        let name = std::str::from_utf8(name).map_err(|_| BinaryError::Name { section: i as u32 }.at(place + 4))?;
        let number = entry.kind.get();
        let Some(kind) = SectionKind::from_number(number) else {
            return Err(entry_error(i, "kind", u64::from(number), "1 to 7".to_owned()).at(place));
        };
        if entry.reserved_12.get() != 0 {
            return Err(entry_error(i, "reserved", u64::from(entry.reserved_12.get()), "0".to_owned()).at(place + 12));
        }
        let (at_bytes, size_bytes) = (entry.at_bytes.get(), entry.size_bytes.get());
        if at_bytes != next_at {
            return Err(entry_error(i, "at_bytes", at_bytes, next_at.to_string()).at(place + 16));
        }
        // `next_at` never passes `table_at`: each section was found to end before it, and it is a multiple of 64.
        let room = table_at - next_at;
        if size_bytes == 0 || size_bytes > room {
            return Err(entry_error(i, "size_bytes", size_bytes, format!("1 to {room}")).at(place + 24));
        }
        next_at = align(at_bytes + size_bytes);
        sections.push(Section { kind, name: name.into(), at_bytes, size_bytes, crc32: entry.crc32.get() });
    }
    if next_at != table_at {
        return Err(field("table_at_bytes", table_at, &format!("{next_at}, after the last section")).at(24));
    }
    if !names.is_empty() {
        return Err(field("names_bytes", u64::from(header.names_bytes.get()), "the sum of all names").at(36));
    }
    Ok(sections)
}

fn sort_by_name(header: &Header, sections: &[Section]) -> Result<Vec<u32>, BinaryFault> {
    let key = |i: &u32| (sections[*i as usize].kind, &*sections[*i as usize].name);
    let mut order: Vec<u32> = (0..sections.len() as u32).collect();
    order.sort_by(|a, b| key(a).cmp(&key(b)));
    match order.windows(2).find(|pair| key(&pair[0]) == key(&pair[1])) {
        None => Ok(order),
        Some(pair) => {
            let place = header.table_at_bytes.get() + u64::from(pair[1]) * ENTRY_BYTES as u64;
            Err(BinaryError::Duplicate { section: sections[pair[1] as usize].label() }.at(place))
        }
    }
}

/// Calls `f` for each item, on threads of their own and, after `meanwhile`, on this one. Fewer threads than there could be only
/// take longer.
fn on_all_cores<R>(n_items: usize, bytes: u64, f: impl Fn(usize) + Sync, meanwhile: impl FnOnce() -> R) -> R {
    // A thread costs some 50 µs to start: not worth it for a few megabytes.
    let n_threads = match bytes {
        0..MIN_BYTES_FOR_THREADS => 0,
        _ => thread::available_parallelism()
            .map_or(0, |cores| (cores.get() - 1).min((bytes / MIN_BYTES_FOR_THREADS) as usize)),
    };
    let next = AtomicUsize::new(0);
    let take = || loop {
        match next.fetch_add(1, Ordering::Relaxed) {
            item if item < n_items => f(item),
            _ => break,
        }
    };
    thread::scope(|scope| {
        for _ in 0..n_threads {
            if thread::Builder::new().name("checksums".to_owned()).spawn_scoped(scope, take).is_err() {
                break;
            }
        }
        let result = meanwhile();
        take();
        result
    })
}

fn check_crc(what: impl FnOnce() -> String, have: u32, want: u32, at_bytes: u64) -> Result<(), BinaryFault> {
    if have == want {
        return Ok(());
    }
    Err(BinaryError::Checksum { what: what(), have, want }.at(at_bytes))
}

fn sdk_version(header: &Header) -> SdkVersion {
    let [major, minor, patch] = header.sdk_version.map(|number| number.get());
    SdkVersion { major, minor, patch }
}

fn first_nonzero(bytes: &[u8]) -> u64 {
    bytes.iter().find(|byte| **byte != 0).map_or(0, |byte| u64::from(*byte))
}

fn field(field: &'static str, have: u64, want: &str) -> BinaryError {
    BinaryError::Field { field, have, want: want.to_owned() }
}

fn entry_error(index: usize, field: &'static str, have: u64, want: String) -> BinaryError {
    BinaryError::Entry { section: format!("number {index}"), field, have, want }
}

/// The next multiple of [`ALIGN_BYTES`]. `at` lies in a file, far from the end of `u64`.
fn align(at: u64) -> u64 {
    at.next_multiple_of(ALIGN_BYTES)
}

/// Sections are checked in pieces of this size, so that all cores share a large one.
const PIECE_BYTES: u64 = 1 << 20;
const MIN_BYTES_FOR_THREADS: u64 = 8 << 20;
