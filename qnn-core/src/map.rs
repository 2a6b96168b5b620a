//! Bytes that are either mapped from a file or owned, shared by reference count; and memory that comes page by page.
#![allow(unsafe_code, reason = "mapping a file is unsafe: another process may change it")]

use std::fs::File;
use std::io::Read;
use std::ops::{Deref, DerefMut, Range};
use std::path::Path;
use std::sync::Arc;

use htp_sim::Aligned;
use memmap2::{Mmap, MmapMut};

/// A shared, immutable range of bytes. Clones and slices are cheap and keep the whole mapping alive.
#[derive(Clone)]
pub struct Bytes {
    source: Arc<Source>,
    range: Range<usize>,
}

enum Source {
    Mapped(Mmap),
    Read(MmapMut),
    Owned(Vec<u8>),
}

impl Bytes {
    /// Maps the file at `path` for reading. An empty file gives empty bytes.
    ///
    /// # Errors
    /// Whatever the system says when the file cannot be opened or mapped; a folder or device is refused.
    pub fn map_file(path: &Path) -> std::io::Result<Bytes> {
        let file = open_regular(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(Bytes::from(Vec::new()));
        }
        // SAFETY: the map is private and read-only. A process that truncates the file meanwhile can stop us with
        // SIGBUS; the documentation of `use-mmap` says so, and `read_file` is the way without that risk.
        let map = unsafe { Mmap::map(&file)? };
        // Large pages, where the system is yet to read the file: decode then waits less for page tables (a step took a quarter
        // less on Zen 4 in a virtual machine). A system that does not know the hint goes on as without it.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let range = 0..map.len();
        Ok(Bytes { source: Arc::new(Source::Mapped(map)), range })
    }

    /// Reads the file at `path` into memory, out of reach of later changes to the file, and on large pages where the system
    /// has them.
    ///
    /// # Errors
    /// Whatever the system says when the file cannot be opened or read; a folder or device is refused.
    pub fn read_file(path: &Path) -> std::io::Result<Bytes> {
        let mut file = open_regular(path)?;
        let len = usize::try_from(file.metadata()?.len()).map_err(std::io::Error::other)?;
        if len == 0 {
            return Ok(Bytes::from(Vec::new()));
        }
        let mut memory = MmapMut::map_anon(len)?;
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        file.read_exact(&mut memory)?;
        Ok(Bytes { source: Arc::new(Source::Read(memory)), range: 0..len })
    }

    /// The part `range` of these bytes, or `None` if it does not lie inside them.
    pub fn slice(&self, range: Range<usize>) -> Option<Bytes> {
        if range.start > range.end || range.end > self.len() {
            return None;
        }
        let start = self.range.start + range.start;
        Some(Bytes { source: Arc::clone(&self.source), range: start..start + range.len() })
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Bytes {
        let range = 0..bytes.len();
        Bytes { source: Arc::new(Source::Owned(bytes)), range }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &*self.source {
            Source::Mapped(map) => map,
            Source::Read(memory) => memory,
            Source::Owned(bytes) => bytes,
        };
        &all[self.range.clone()]
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({} bytes)", self.len())
    }
}

/// Zeros that start at a cache line and take memory only where they are written to.
///
/// An allocator may give what was in use before, and clears all of it then: with SmolLM2-135M and a context of 2048 tokens that was
/// 7 of 129 MB behind the first prompt, and 22 of 177 MB after a model was opened a few times.
#[derive(Debug)]
pub(crate) struct Zeroed(Pages);

#[derive(Debug)]
enum Pages {
    Mapped(MmapMut),
    /// Where the system has no such maps.
    Allocated(Aligned<u8>),
}

impl Zeroed {
    /// `None` where the system does not have so much.
    pub(crate) fn new(len: usize) -> Option<Zeroed> {
        let Ok(map) = MmapMut::map_anon(len) else {
            return Some(Zeroed(Pages::Allocated(Aligned::try_zeroed(len)?)));
        };
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Some(Zeroed(Pages::Mapped(map)))
    }
}

impl Deref for Zeroed {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Pages::Mapped(map) => map,
            Pages::Allocated(memory) => memory,
        }
    }
}

impl DerefMut for Zeroed {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Pages::Mapped(map) => map,
            Pages::Allocated(memory) => memory,
        }
    }
}

fn open_regular(path: &Path) -> std::io::Result<File> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "is not a regular file"));
    }
    Ok(file)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// Zeros take no memory before they are written, whatever the allocator had in use before, and then what was written.
    #[test]
    fn zeros_take_memory_where_they_are_written() {
        // Given back: what glibc serves from the heap from now on is larger than the zeros.
        drop(std::hint::black_box(vec![1_u8; 24 << 20]));
        drop(std::hint::black_box(vec![1_u8; 20 << 20]));
        let mut zeros = Zeroed::new(16 << 20).expect("the system has so much");
        assert!(zeros.iter().all(|byte| *byte == 0));
        assert_eq!(resident_bytes(&zeros), 0, "untouched zeros take memory");
        zeros.fill(1);
        assert!(resident_bytes(&zeros) >= 16 << 20, "nothing was measured");
    }

    /// Of the map that `memory` is in.
    fn resident_bytes(memory: &[u8]) -> usize {
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("Linux has it");
        let mut lines = maps.lines();
        let holds = |line: &str| {
            let ends = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
            let ends = ends.map(|(start, end)| [start, end].map(|end| usize::from_str_radix(end, 16)));
            matches!(ends, Some([Ok(start), Ok(end)]) if (start..end).contains(&memory.as_ptr().addr()))
        };
        lines.by_ref().find(|line| holds(line)).expect("the memory is mapped");
        let line = lines.find_map(|line| line.strip_prefix("Rss:")).expect("each map has a line for resident memory");
        line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") << 10
    }
}
