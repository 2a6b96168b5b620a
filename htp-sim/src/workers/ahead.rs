//! What a worker reads next, which it asks for while it waits.
//!
//! Between two products of a decode step memory would rest: one thread norms and quantizes a row, the others wait. In that time a
//! worker fetches the start of its share of the next product's weights to its cache.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::arch;

/// Some ranges of memory, then some panels of a weight, each section as one panel's bytes after the other. The waiting worker alone
/// moves through them; it may see half of a change, and asks for memory that nobody needs then, which harms nothing: no address is
/// read.
#[derive(Default)]
pub(super) struct Ahead {
    ranges: [Lines; RANGES],
    /// The first range that is not used up.
    range: AtomicUsize,
    sections: [Lines; SECTIONS],
    panel_bytes: [AtomicUsize; SECTIONS],
    panels: AtomicUsize,
    /// The section that is being asked for.
    section: AtomicUsize,
}

/// The next address, and the bytes from there on.
#[derive(Default)]
struct Lines {
    at: AtomicUsize,
    left: AtomicUsize,
}

impl Ahead {
    /// Sets what to ask for: the ranges, then the first `panels` panels of the sections, each with its bytes per panel.
    pub(super) fn set(&self, ranges: [&[u8]; RANGES], sections: Sections<'_>, panels: usize) {
        for (lines, range) in self.ranges.iter().zip(ranges) {
            lines.set(range, range.len());
        }
        self.range.store(0, Relaxed);
        self.panels.store(panels, Relaxed);
        for ((lines, own_bytes), (bytes, panel_bytes)) in self.sections.iter().zip(&self.panel_bytes).zip(sections) {
            lines.set(bytes, panel_bytes);
            own_bytes.store(panel_bytes, Relaxed);
        }
        self.section.store(0, Relaxed);
    }

    /// Asks for the next line; says whether there was one.
    pub(super) fn ask(&self) -> bool {
        self.next().map(arch::ask_for).is_some()
    }

    /// The next line, which is not said again.
    pub(super) fn next(&self) -> Option<usize> {
        let mut range = self.range.load(Relaxed);
        while let Some(lines) = self.ranges.get(range) {
            let line = lines.next();
            if line.is_some() {
                return line;
            }
            range += 1;
            self.range.store(range, Relaxed);
        }
        let mut panels = self.panels.load(Relaxed);
        while panels > 0 {
            let section = self.section.load(Relaxed) % SECTIONS;
            let line = self.sections[section].next();
            if line.is_some() {
                return line;
            }
            self.sections[section].left.store(self.panel_bytes[section].load(Relaxed), Relaxed);
            self.section.store(section + 1, Relaxed);
            panels -= usize::from(section + 1 == SECTIONS);
            self.panels.store(panels, Relaxed);
        }
        None
    }
}

impl Lines {
    fn set(&self, bytes: &[u8], len: usize) {
        self.at.store(bytes.as_ptr().addr(), Relaxed);
        self.left.store(len, Relaxed);
    }

    fn next(&self) -> Option<usize> {
        let (at, left) = (self.at.load(Relaxed), self.left.load(Relaxed));
        let len = left.min(LINE_BYTES);
        self.at.store(at.wrapping_add(len), Relaxed);
        self.left.store(left - len, Relaxed);
        (len > 0).then_some(at)
    }
}

/// Codes, scales and offsets of a weight from some panel on, each with its bytes per panel.
pub(crate) type Sections<'a> = [(&'a [u8], usize); SECTIONS];

/// See [`Sections`].
pub(crate) const SECTIONS: usize = 3;

/// First halves of a product's branches.
pub(crate) const RANGES: usize = 4;

const LINE_BYTES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    /// Every line of the ranges is named once, then those of all sections panel by panel; after that none.
    #[test]
    fn every_line_once() {
        let memory = [0; 4096];
        let start = memory.as_ptr().addr();
        let ahead = Ahead::default();
        assert_eq!(ahead.next(), None);
        let sections = [(&memory[1024..], 128), (&memory[2048..], 32), (&memory[3072..], 0)];
        ahead.set([&memory[..100], &[], &memory[512..512 + 64], &[]], sections, 2);
        let lines: Vec<_> = std::iter::from_fn(|| ahead.next()).map(|at| at - start).take(100).collect();
        assert_eq!(lines, [0, 64, 512, 1024, 1088, 2048, 1152, 1216, 2080]);
        // What is set anew takes the place of what was left.
        ahead.set([&memory[..], &[], &[], &[]], sections, 0);
        ahead.next();
        ahead.set([&[]; RANGES], [(&memory, 64); SECTIONS], 1);
        assert_eq!(ahead.next(), Some(start));
    }
}
