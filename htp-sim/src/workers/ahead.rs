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
    pub(super) fn set(&self, ranges: [&[u8]; RANGES], sections: [(&[u8], usize); SECTIONS], panels: usize) {
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

    /// Asks for a line; says whether there may be more.
    pub(super) fn ask(&self) -> bool {
        let range = self.range.load(Relaxed);
        if let Some(lines) = self.ranges.get(range) {
            if !lines.ask() {
                self.range.store(range + 1, Relaxed);
            }
            return true;
        }
        let panels = self.panels.load(Relaxed);
        if panels == 0 {
            return false;
        }
        let section = self.section.load(Relaxed) % SECTIONS;
        if self.sections[section].ask() {
            return true;
        }
        self.sections[section].left.store(self.panel_bytes[section].load(Relaxed), Relaxed);
        self.section.store(section + 1, Relaxed);
        if section + 1 == SECTIONS {
            self.panels.store(panels - 1, Relaxed);
        }
        true
    }
}

impl Lines {
    fn set(&self, bytes: &[u8], len: usize) {
        self.at.store(bytes.as_ptr().addr(), Relaxed);
        self.left.store(len, Relaxed);
    }

    /// Asks for the next line, if there is one.
    fn ask(&self) -> bool {
        let (at, left) = (self.at.load(Relaxed), self.left.load(Relaxed));
        let len = left.min(LINE_BYTES);
        if len > 0 {
            arch::ask_for(at);
            self.at.store(at.wrapping_add(len), Relaxed);
            self.left.store(left - len, Relaxed);
        }
        len > 0
    }
}

/// Codes, scales, offsets.
pub(crate) const SECTIONS: usize = 3;

/// First halves of a product's branches.
pub(crate) const RANGES: usize = 4;

const LINE_BYTES: usize = 64;
