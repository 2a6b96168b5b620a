//! Guards the promise that a step of a loaded model asks for no memory: no latency spikes, no growth, no lock.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::AtomicBool;

use genie::engine::{Engine, Logits};
use genie_workspace::converted::Converted;
use genie_workspace::tiny_model::TinyModel;
use qnn_core::offline::arch::{ActivationBits, Grouping, Precision, WeightType};
use qnn_core::offline::quantize_weights::Bits;

/// The system's allocator, counting the requests of this thread while it is told to.
struct Counting;

thread_local! {
    static COUNT: Cell<Option<usize>> = const { Cell::new(None) };
}

#[allow(unsafe_code, reason = "an allocator is unsafe by nature")]
// SAFETY: every call is passed on unchanged to the system's allocator; counting touches a plain thread-local only.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|count| count.set(count.get().map(|n| n + 1)));
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System.alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Broken if a decode step or a prompt chunk of a warm engine allocates, in float and in integers.
#[test]
fn a_warm_step_allocates_nothing() {
    let int8 = WeightType::Int { bits: Bits::Eight, grouping: Grouping::Default };
    for weights in [WeightType::F32, int8] {
        let precision = Precision { weights, activations: ActivationBits::Sixteen, cache: None };
        let model = Converted::tiny(&TinyModel::llama(3), precision).unwrap();
        let mut engine = model.engine().unwrap();
        let never = AtomicBool::new(false);
        let mut round = |from: u32| {
            engine.rewind(0);
            let prompt: Vec<u32> = (from..from + 20).map(|id| id % 60).collect();
            COUNT.with(|count| count.set(Some(0)));
            engine.forward(&prompt, Logits::Last, &never).unwrap();
            for id in 0..12 {
                engine.forward(&[id], Logits::Last, &never).unwrap();
            }
            COUNT.with(|count| count.take()).unwrap()
        };
        // Two rounds to warm up: a result's buffer is swapped with the client's, so that both have to grow once.
        round(1);
        round(2);
        assert_eq!(round(3), 0, "allocations of a warm prompt and 12 steps, {weights:?}");
    }
}
