//! A step must not allocate: one full set of operations runs under an allocator that counts.
//!
//! Built without the test harness, whose own thread allocates while a test runs.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use htp_sim::*;

/// The system's allocator with a counter.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One layer's operations, on decode and prefill shapes, allocate nothing after construction.
fn main() {
    let workers = Workers::new(3).expect("threads can be started");
    let (heads, head_dim, k) = (4, 16, 64);
    let int4 = WeightFormat::Int4Block { block: 32, offset: BlockOffset::Symmetric };
    let layout = PackedLayout::new(k, k, int4).expect("sizes are fine");
    let blob = pack_quantized(&layout, &vec![5; k * k], &vec![0.1; 2 * k], Offsets::None).expect("lengths match");
    let down = PackedLayout::new(8, k, WeightFormat::F16).expect("sizes are fine");
    let down_blob = pack_float(&down, &vec![0.5; k * 8]).expect("lengths match");
    let up = PackedLayout::new(k, 8, WeightFormat::F16).expect("sizes are fine");
    let up_blob = pack_float(&up, &vec![0.5; k * 8]).expect("lengths match");
    // And in integers.
    let [down8, up8] =
        [(8, k), (k, 8)].map(|(n, k)| PackedLayout::new(n, k, WeightFormat::Int8PerChannel).expect("sizes are fine"));
    let [down8_blob, up8_blob] = [(down8, 8), (up8, k)].map(|(layout, n)| {
        pack_quantized(&layout, &vec![5; k * 8], &vec![0.1; n], Offsets::None).expect("lengths match")
    });
    for kernels in Kernels::available() {
        let cx = Cx { kernels, workers: &workers };
        for m in [1, 150] {
            let cache_layout = CacheLayout::new(2, head_dim, 600, CacheFormat::Int8).expect("sizes are fine");
            let mut bytes = vec![0; cache_layout.size_bytes()];
            let mut scratch = AttentionScratch::new(workers.count(), cache_layout, heads).expect("fits");
            let mut rows = QuantizedRows::new(m, k, ActBits::Sixteen, 32).expect("sizes are fine");
            let (x, weight, mut t, mut t8) = (vec![0.5; m * k], vec![1.0; k], vec![0.0; m * 8], vec![0.0; m * 8]);
            let (mut q, mut out) = (vec![0.0; m * k], vec![0.0; m * k]);
            let half = head_dim / 2;
            let (positions, inv_freq) = (vec![3; m], vec![0.1; half]);
            let (mut cos, mut sin) = (vec![0.0; m * half], vec![0.0; m * half]);
            let params = AttentionParams { heads, scale: 0.25, window: None, softcap: None };
            let mut step = || -> Result<(), ShapeError> {
                let weights = layout.view(&blob)?;
                let (down, up) = (down.view(&down_blob)?, up.view(&up_blob)?);
                let rows_of_x = Rows::F32 { x: &x, m };
                rms_norm_quantize(&cx, &x, &weight, 1e-5, &mut rows)?;
                let branch = Some(Branch { x: rows_of_x, down, alpha: &[0.5], up, t: &mut t });
                let part = Part { weights, bias: None, branch, write: Write::Store, out: &mut q };
                linear(&cx, Rows::Quantized(&rows), &mut [part])?;
                rotary_table(&positions, &inv_freq, 1.0, &mut cos, &mut sin)?;
                rotate(&cx, &mut q, heads, head_dim, &cos, &sin)?;
                let mut cache = CacheMut { layout: cache_layout, bytes: &mut bytes };
                append(&cx, &mut cache, 400, &x[..m * 32], &x[..m * 32])?;
                attention(&cx, &cache.as_ref(), 400, &q, &params, &mut scratch, &mut out)?;
                let branch = Some(Branch { x: rows_of_x, down, alpha: &[0.5], up, t: &mut t });
                let gate = Gate { weights, bias: None, branch };
                let (down, up) = (down8.view(&down8_blob)?, up8.view(&up8_blob)?);
                let branch = Some(Branch { x: Rows::Quantized(&rows), down, alpha: &[0.5], up, t: &mut t8 });
                let up = Gate { weights, bias: None, branch };
                gated_linear(&cx, Rows::Quantized(&rows), GateUp { gate, up }, Activation::Silu, &mut q)?;
                elementwise::gelu_erf(&cx, &q, &mut out)?;
                elementwise::softmax_rows(&cx, &mut out, k)?;
                rms_norm(&cx, &x, &weight, 1e-5, &mut out)?;
                quantize_rows(&cx, &out, &mut rows)
            };
            // The first step may set up what a thread keeps for itself.
            step().expect("lengths match");
            let before = ALLOCATIONS.load(Ordering::SeqCst);
            step().expect("lengths match");
            step().expect("lengths match");
            assert_eq!(ALLOCATIONS.load(Ordering::SeqCst), before, "{} m {m}", kernels.name);
        }
    }
}
