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

/// Broken if keeping an account allocates in a step, or if the account is not that of what ran: how often, how many
/// products, how many bytes of weights, and no more time than there was.
#[test]
fn an_account_adds_up_and_allocates_nothing() {
    let tiny = TinyModel::llama(3);
    let precision = Precision { weights: WeightType::F32, activations: ActivationBits::Sixteen, cache: None };
    let model = Converted::tiny(&tiny, precision).unwrap();
    let mut engine = model.engine().unwrap();
    let never = AtomicBool::new(false);
    for id in 0..3 {
        engine.forward(&[id], Logits::Last, &never).unwrap();
    }
    engine.start_account();
    COUNT.with(|count| count.set(Some(0)));
    for id in 0..10 {
        engine.forward(&[id], Logits::Last, &never).unwrap();
    }
    assert_eq!(COUNT.with(|count| count.take()).unwrap(), 0, "allocations while an account is kept");

    let graphs = engine.take_account();
    let [token] = &graphs[..] else { panic!("one graph ran: {graphs:?}") };
    let account = &token.account;
    assert_eq!((token.graph.as_str(), account.n_executes), ("token_ar1_cl256_1_of_1", 10));
    let is_linear = |name: &str| name.starts_with("linear") || name.starts_with("gated");
    let linear: Vec<_> = account.operations.iter().filter(|operation| is_linear(&operation.name)).collect();
    let (hidden, heads) = (tiny.hidden as u64, (tiny.heads * tiny.head_dim) as u64);
    let kv = (tiny.kv_heads * tiny.head_dim) as u64;
    let layer = hidden * (2 * heads + 2 * kv + 3 * tiny.ffn as u64);
    let products = tiny.layers as u64 * layer + hidden * tiny.vocab as u64;
    assert_eq!(linear.iter().map(|operation| operation.multiply_adds).sum::<u64>(), 10 * products);
    let n_bytes: u64 = linear.iter().map(|operation| operation.bytes).sum();
    assert!((4 * products..5 * products).contains(&(n_bytes / 10)), "{n_bytes} bytes of {products} floats, padded");
    // These are positions 3 to 12: each step meets its own and those before it.
    let attention = account.operations.iter().find(|operation| operation.name.starts_with("attention")).unwrap();
    assert_eq!((attention.n_calls, attention.multiply_adds), (20, 2 * 2 * heads * (4..=13).sum::<u64>()));
    let sum: std::time::Duration = account.operations.iter().map(|operation| operation.time).sum();
    assert!(sum <= account.time && account.scheduling <= account.time);
    assert!(engine.take_account().is_empty(), "it was ended");
}
