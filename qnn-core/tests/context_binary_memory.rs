//! Opening a context, whole or damaged, asks for no more memory than the file has bytes.
#![allow(unsafe_code, reason = "an allocator that counts")]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use qnn_core::{Bytes, Context, ContextBuilder, binary::Verify};
use support::{Rng, Tiny, mend_checksums, tiny};

struct Counting;

static LARGEST: AtomicUsize = AtomicUsize::new(0);
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on unchanged to `System`, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        PEAK.fetch_max(LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is the one that `System` needs.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is the one that `System` needs.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Largest single request and highest total while `file` is opened, beyond what was held before.
fn measure(file: &[u8]) -> (usize, usize, bool) {
    let bytes = Bytes::from(file.to_vec());
    let before = LIVE.load(Ordering::Relaxed);
    LARGEST.store(0, Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let opened = Context::from_binary(bytes, Verify::Checksums);
    (LARGEST.load(Ordering::Relaxed), PEAK.load(Ordering::Relaxed) - before, opened.is_ok())
}

// Broken if a number in a file decides how much memory is asked for, or constants are copied. One test, because the
// counters are the process's.
#[test]
fn opening_takes_less_memory_than_the_file() {
    let graph = tiny("g", Tiny { layers: 4, ..Tiny::default() });
    let file = ContextBuilder::new().graph(graph).to_binary().unwrap();
    let (largest, peak, opened) = measure(&file);
    assert!(opened && peak < file.len(), "{peak} bytes at once for a file of {}", file.len());
    assert!(largest < file.len() / 4, "one request of {largest} bytes for a file of {}", file.len());

    let table = u64::from_le_bytes(file[24..32].try_into().unwrap()) as usize;
    let mut rng = Rng(5);
    for _ in 0..3000 {
        let mut file = file.clone();
        // A huge or random number in one field of the header or the table, four or eight bytes wide.
        let at = if rng.next().is_multiple_of(2) {
            4 * (rng.next() as usize % 28)
        } else {
            table + 4 * (rng.next() as usize % 64)
        };
        let value = if rng.next().is_multiple_of(2) { u64::MAX >> (rng.next() % 64) } else { rng.next() };
        let bytes = if rng.next().is_multiple_of(2) { 4 } else { 8 };
        file[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        mend_checksums(&mut file);
        let (largest, peak, _) = measure(&file);
        assert!(peak < file.len(), "{peak} bytes at once, {largest} in one request, after byte {at} became {value:x}");
    }
}
