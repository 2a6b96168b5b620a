//! What a worker reads next, which it asks for while it waits.
//!
//! Between two products of a decode step memory would rest: one thread norms and quantizes a row, the others wait. In that time a
//! worker fetches the start of its share of the next product's weights to its cache.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::arch;
use crate::scratch::LINE_BYTES;

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

/// Where a worker's share of a product starts: addresses of sections of a weight, each with its bytes per panel, and how many panels
/// to ask for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Start {
    pub(crate) sections: [(usize, usize); SECTIONS],
    pub(crate) panels: usize,
}

impl Ahead {
    /// Sets what to ask for: the ranges, then the start of a share.
    pub(super) fn set(&self, ranges: [&[u8]; RANGES], start: &Start) {
        for (lines, range) in self.ranges.iter().zip(ranges) {
            lines.set(range.as_ptr().addr(), range.len());
        }
        self.range.store(0, Relaxed);
        self.panels.store(start.panels, Relaxed);
        for ((lines, own_bytes), (at, panel_bytes)) in self.sections.iter().zip(&self.panel_bytes).zip(start.sections) {
            lines.set(at, panel_bytes);
            own_bytes.store(panel_bytes, Relaxed);
        }
        self.section.store(0, Relaxed);
    }

    /// Asks for the next lines; says whether there were any.
    pub(super) fn ask(&self) -> bool {
        let Some((at, len)) = self.next() else { return false };
        (0..len).step_by(LINE_BYTES).for_each(|line| arch::ask_for(at.wrapping_add(line)));
        true
    }

    /// Where the next lines are, and their bytes, which are not said again.
    pub(super) fn next(&self) -> Option<(usize, usize)> {
        let mut range = self.range.load(Relaxed);
        while let Some(lines) = self.ranges.get(range) {
            let next = lines.next();
            if next.is_some() {
                return next;
            }
            range += 1;
            self.range.store(range, Relaxed);
        }
        let mut panels = self.panels.load(Relaxed);
        while panels > 0 {
            let section = self.section.load(Relaxed) % SECTIONS;
            let next = self.sections[section].next();
            if next.is_some() {
                return next;
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
    fn set(&self, at: usize, len: usize) {
        self.at.store(at, Relaxed);
        self.left.store(len, Relaxed);
    }

    fn next(&self) -> Option<(usize, usize)> {
        let (at, left) = (self.at.load(Relaxed), self.left.load(Relaxed));
        let len = left.min(BATCH_BYTES);
        self.at.store(at.wrapping_add(len), Relaxed);
        self.left.store(left - len, Relaxed);
        (len > 0).then_some((at, len))
    }
}

/// Bytes that are asked for before a waiting worker looks whether it still waits: few enough that memory has them in 40 ns, so many
/// that memory is what the worker waits for. (A line at a time was a third as fast.)
const BATCH_BYTES: usize = 16 * LINE_BYTES;

/// Codes, scales and offsets of a weight.
pub(crate) const SECTIONS: usize = 3;

/// First halves of a product's branches.
pub(crate) const RANGES: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything is named once, in pieces of a batch at most: the ranges, then all sections panel by panel; after that nothing.
    #[test]
    fn every_byte_once() {
        let memory = [0; 4096];
        let at = memory.as_ptr().addr();
        let ahead = Ahead::default();
        assert_eq!(ahead.next(), None);
        let start = Start { sections: [(at + 1024, 1088), (at + 3584, 32), (at + 4000, 0)], panels: 2 };
        ahead.set([&memory[..100], &[], &memory[512..512 + 64], &[]], &start);
        let pieces: Vec<_> =
            std::iter::from_fn(|| ahead.next()).map(|(piece, len)| (piece - at, len)).take(100).collect();
        let panels = [(1024, 1024), (2048, 64), (3584, 32), (2112, 1024), (3136, 64), (3616, 32)];
        assert_eq!(pieces[..2], [(0, 100), (512, 64)]);
        assert_eq!(pieces[2..], panels);
        // What is set anew takes the place of what was left.
        ahead.set([&memory[..], &[], &[], &[]], &Start::default());
        ahead.next();
        ahead.set([&[]; RANGES], &Start { sections: [(at, 64); SECTIONS], panels: 1 });
        assert_eq!(ahead.next(), Some((at, 64)));
    }
}
