//! A slice that several workers write at once, each its own part.

use std::marker::PhantomData;

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
}

// SAFETY: a `Disjoint` is a `&mut [T]` that is shared out; whoever gets a part may be on another thread if `T` may.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
// SAFETY: sharing it only allows `range`, whose caller promises that the parts do not overlap.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
