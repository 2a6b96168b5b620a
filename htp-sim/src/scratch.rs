//! Buffers that start at a cache line, and a slice that several workers write at once, each its own part.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// Zeroed memory of a fixed length that starts at a cache line. A vector register, or a row of a tile, is then loaded from one
/// line and not from two: tiles of rows across lines load six times slower (AMX).
#[derive(Debug)]
pub struct Aligned<T> {
    storage: Vec<T>,
    /// Where the line starts in the storage, which never moves.
    at: usize,
    len: usize,
}

impl<T: Copy + Default> Aligned<T> {
    /// `len` zeros. They take memory when they are first written to.
    pub fn zeroed(len: usize) -> Self {
        let storage = vec![T::default(); Self::with_room(len)];
        let at = storage.as_ptr().align_offset(LINE_BYTES).min(storage.len() - len);
        Self { storage, at, len }
    }

    /// As [`zeroed`](Self::zeroed); `None` where the system does not have so much, which would end the process there.
    pub fn try_zeroed(len: usize) -> Option<Self> {
        let given = Vec::<T>::new().try_reserve_exact(Self::with_room(len)).is_ok();
        given.then(|| Self::zeroed(len))
    }

    /// `len`, and what it may take to get to the start of a line.
    fn with_room(len: usize) -> usize {
        len.saturating_add(LINE_BYTES / size_of::<T>().max(1))
    }
}

impl<T> Default for Aligned<T> {
    /// No elements, no memory.
    fn default() -> Self {
        Self { storage: Vec::new(), at: 0, len: 0 }
    }
}

impl<T: Copy + Default> Clone for Aligned<T> {
    fn clone(&self) -> Self {
        let mut copy = Self::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.storage[self.at..][..self.len]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.storage[self.at..][..self.len]
    }
}

/// Bytes of a cache line.
pub(crate) const LINE_BYTES: usize = 64;

/// A mutable slice cut up at run time: each worker takes the ranges that belong to its items.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// The `len` elements from `at`.
    ///
    /// # Safety
    /// No element may be in two ranges that are alive at the same time.
    #[allow(clippy::mut_from_ref, reason = "the caller promises that ranges do not overlap")]
    pub(crate) unsafe fn range(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at <= self.len && len <= self.len - at, "range {at}+{len} of {}", self.len);
        // SAFETY: the range is inside the slice (asserted), which is borrowed for 'a; no one else holds these elements
        // (the caller's promise).
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }

    /// The address of `rows` times `len` elements from `at` on, `stride` apart. Whoever writes there promises what the caller of
    /// [`range`](Self::range) does.
    pub(crate) fn rows(&self, at: usize, rows: usize, stride: usize, len: usize) -> *mut T {
        let end = rows.saturating_sub(1).saturating_mul(stride).saturating_add(at).saturating_add(len);
        assert!(end <= self.len, "{rows} rows of {len} from {at}, {stride} apart, of {}", self.len);
        self.start.wrapping_add(at)
    }

    /// The `len` elements from `at`, for reading.
    ///
    /// # Safety
    /// Nobody writes these elements any more; who did, did before in the order of memory.
    pub(crate) unsafe fn finished(&self, at: usize, len: usize) -> &[T] {
        assert!(at <= self.len && len <= self.len - at, "range {at}+{len} of {}", self.len);
        // SAFETY: the range is inside the slice (asserted), which is borrowed for 'a; nobody writes it (the caller's promise).
        unsafe { std::slice::from_raw_parts(self.start.add(at), len) }
    }
}

// SAFETY: a `Disjoint` is a `&mut [T]` that is shared out; whoever gets a part may be on another thread if `T` may.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
// SAFETY: sharing it only allows `range` and `finished`, whose callers promise that nobody reads what another writes.
unsafe impl<T: Send + Sync> Sync for Disjoint<'_, T> {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Buffers of every length and element start at a cache line, hold zeros, and so do their copies.
    #[test]
    fn buffers_start_at_a_line() {
        fn check<T: Copy + Default + PartialEq + std::fmt::Debug>(value: T) {
            for len in [0, 1, 15, 64, 1000] {
                let mut buffer = Aligned::<T>::zeroed(len);
                assert!(buffer.len() == len && buffer.iter().all(|element| *element == T::default()));
                buffer.fill(value);
                let copy = buffer.clone();
                assert_eq!(&copy[..], &buffer[..]);
                for start in [buffer.as_ptr(), copy.as_ptr()] {
                    assert!(start.addr().is_multiple_of(LINE_BYTES), "{len} elements at {start:?}");
                }
            }
        }
        check(7_u8);
        check(-7_i8);
        check(0.5_f32);
        check(9_u64);
    }
}
