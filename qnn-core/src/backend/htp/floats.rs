//! Float buffers that start at a cache line: vector registers are then loaded from one line and stored to one.

use std::ops::{Deref, DerefMut};

use htp_sim::Aligned;

/// A buffer of fixed room, some of it in use.
#[derive(Default)]
pub(super) struct Floats {
    room: Aligned<f32>,
    len: usize,
}

impl Floats {
    /// No elements, and room for `capacity`.
    pub(super) fn with_capacity(capacity: usize) -> Floats {
        Floats { room: Aligned::zeroed(capacity), len: 0 }
    }

    /// Makes it `len` elements long. What they are is what was left in them.
    pub(super) fn set_len(&mut self, len: usize) {
        if len > self.room.len() {
            self.room = Aligned::zeroed(len);
        }
        self.len = len;
    }
}

impl Deref for Floats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.room[..self.len]
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.room[..self.len]
    }
}
