//! x86-64 tiers.

pub(crate) mod amx;
pub(crate) mod avx2;
pub(crate) mod avx512_vnni;
pub(crate) mod avx_vnni;

/// [`BlockOffset`](crate::packed::BlockOffset) as a constant of kernels.
const SYMMETRIC: u8 = 0;
const INTEGER: u8 = 1;
const MIN: u8 = 2;

/// Asks for what a stream of weights reads after `at`: far ahead from memory to the second cache, near ahead from there to the
/// first. A request for the first cache holds one of its few miss buffers until memory has answered: with 4 KiB ahead and that
/// cache alone, Zen 4 decoded a quarter slower.
#[inline(always)]
fn ask_ahead<T>(at: *const T) {
    use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
    let at = at.cast::<i8>();
    // SAFETY: every CPU of this architecture has the instruction, and it never faults.
    unsafe {
        _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(6144));
        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(512));
    }
}

/// Asks for the lines of `bytes`, to the second cache: see [`ask_ahead`].
fn prefetch(bytes: &[u8]) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    for line in bytes.chunks(64) {
        // SAFETY: every CPU of this architecture has the instruction, and it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) }
    }
}
