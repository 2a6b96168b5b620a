//! What a worker reads next, which it asks for while it waits.
//!
//! Between two products of a decode step memory would rest: one thread norms and quantizes a row, the others wait. In that time a
//! worker fetches the start of its share of the next product's weights to its cache.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::arch;

/// Some panels of a weight, each section as one panel's bytes after the other. The waiting worker alone moves the cursor; it may see
/// half of a change, and asks for memory that nobody needs then, which harms nothing: no address is read.
#[derive(Default)]
pub(super) struct Ahead {
    sections: [Section; SECTIONS],
    panels: AtomicUsize,
    section: AtomicUsize,
}

#[derive(Default)]
struct Section {
    /// The next address, and what remains of this panel's bytes.
    at: AtomicUsize,
    left: AtomicUsize,
    panel_bytes: AtomicUsize,
}

impl Ahead {
    /// Sets what to ask for: the first `panels` panels of the sections, each with its bytes per panel.
    pub(super) fn set(&self, sections: [(&[u8], usize); SECTIONS], panels: usize) {
        self.panels.store(0, Relaxed);
        for (section, (bytes, panel_bytes)) in self.sections.iter().zip(sections) {
            section.at.store(bytes.as_ptr().addr(), Relaxed);
            section.left.store(panel_bytes, Relaxed);
            section.panel_bytes.store(panel_bytes, Relaxed);
        }
        self.section.store(0, Relaxed);
        self.panels.store(panels, Relaxed);
    }

    /// Asks for the next line; says whether there was one.
    pub(super) fn ask(&self) -> bool {
        let panels = self.panels.load(Relaxed);
        if panels == 0 {
            return false;
        }
        let number = self.section.load(Relaxed) % SECTIONS;
        let section = &self.sections[number];
        let (at, left) = (section.at.load(Relaxed), section.left.load(Relaxed));
        let len = left.min(LINE_BYTES);
        if len > 0 {
            arch::ask_for(at);
        }
        section.at.store(at.wrapping_add(len), Relaxed);
        if left > len {
            section.left.store(left - len, Relaxed);
            return true;
        }
        section.left.store(section.panel_bytes.load(Relaxed), Relaxed);
        self.section.store((number + 1) % SECTIONS, Relaxed);
        if number + 1 == SECTIONS {
            self.panels.store(panels - 1, Relaxed);
        }
        true
    }
}

/// Codes, scales, offsets.
pub(crate) const SECTIONS: usize = 3;

const LINE_BYTES: usize = 64;
