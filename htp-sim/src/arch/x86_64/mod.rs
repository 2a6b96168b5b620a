//! x86-64 tiers.

pub(crate) mod amx;
pub(crate) mod avx2;
pub(crate) mod avx512_vnni;
pub(crate) mod avx_vnni;
mod quantize;

use crate::kernels::STREAM_AHEAD;

/// [`BlockOffset`](crate::packed::BlockOffset) as a constant of kernels.
const SYMMETRIC: u8 = 0;
const INTEGER: u8 = 1;
const MIN: u8 = 2;

/// Asks for what a stream of weights reads after `at`, from memory to the second cache. A request for the first cache holds one of
/// its few miss buffers until memory has answered: with 4 KiB ahead and that cache Zen 4 decoded a quarter slower. From the second
/// to the first it finds lines by itself (asked for that too, it took 2 % longer).
#[inline(always)]
fn ask_ahead<T>(at: *const T) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: every CPU of this architecture has the instruction, and it never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast::<i8>().wrapping_offset(STREAM_AHEAD)) }
}

/// The same for one row's product with weights of a byte each, which go by faster. On AMD's CPUs to the first cache and past the
/// second: asked for as above, a head of 28 MB took Zen 4 7 to 25 % longer than without any request; so it takes 2 % longer. Intel's
/// servers keep such lines out of the last cache, too, and Granite Rapids took the head five times longer so than as above.
#[inline(always)]
fn ask_ahead_of_bytes<T>(at: *const T) {
    use std::arch::x86_64::{_MM_HINT_NTA, _mm_prefetch};
    if crate::isa::is_amd() {
        // SAFETY: every CPU of this architecture has the instruction, and it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_NTA>(at.cast::<i8>().wrapping_add(4096)) }
    } else {
        ask_ahead(at);
    }
}

/// Asks for the lines of `bytes`, to the second cache: see [`ask_ahead`].
fn prefetch(bytes: &[u8]) {
    bytes.chunks(64).for_each(|line| ask_for(line.as_ptr()));
}

/// Asks for a line, to the second cache.
#[inline(always)]
pub(super) fn ask_for(at: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: every CPU of this architecture has the instruction, and it never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
}
