//! A GGUF that is cut or altered anywhere is refused or read; nothing panics, and no number in it decides how much memory is
//! asked for.
#![allow(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use genie_workspace::gguf_writer::GgufWriter;
use genie_workspace::tiny_model::{SplitMix64, TinyModel};
use qnn_core::offline::error::ImportError;
use qnn_core::offline::gguf::{GgufFile, GgufModel};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on unchanged to `System`, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
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

/// Everything that opening a model reads: metadata, tensor table, configuration, tokenizer, and every tensor.
fn read(file: &[u8]) -> Result<usize, ImportError> {
    let model = GgufModel::new(vec![GgufFile::parse(file.to_vec().into())?])?;
    let config = model.config()?;
    let sidecars = model.sidecars(&config)?;
    for name in model.names() {
        model.tensor(&name, &config)?;
    }
    Ok(sidecars.len())
}

fn model() -> TinyModel {
    TinyModel { hidden: 8, heads: 2, kv_heads: 1, head_dim: 4, ffn: 16, layers: 1, ..TinyModel::llama(1) }
}

/// A model with a byte-level tokenizer, and one with a SentencePiece tokenizer.
fn files() -> [Vec<u8>; 2] {
    let mut file: GgufWriter = TinyModel { vocab: 300, ..model() }.gguf_without_tokenizer(true);
    let bytes: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    let pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab"];
    let tokens: Vec<&str> = pieces.into_iter().chain(bytes.iter().map(String::as_str)).collect();
    let kinds: Vec<i32> = [2, 3, 3, 1, 1, 1, 1, 1, 1].into_iter().chain([6; 256]).collect();
    let scores: Vec<f32> = (0..tokens.len()).map(|id| -(id as f32)).collect();
    file.string("tokenizer.ggml.model", "llama");
    file.floats("tokenizer.ggml.scores", &scores);
    file.integers("tokenizer.ggml.token_type", &kinds);
    file.strings("tokenizer.ggml.tokens", tokens);
    file.bool("tokenizer.ggml.add_space_prefix", true);
    file.string("tokenizer.chat_template", "{{ messages }}");
    [model().gguf(true).finish(), file.finish()]
}

// Broken if a damaged file could panic, pass as whole, or ask for memory that it does not account for. One test, because the
// counters are the process's.
#[test]
fn damaged_files_are_refused_or_read() {
    for file in files() {
        assert_eq!(read(&file).unwrap(), 3);
        for len in 0..file.len() {
            assert!(read(&file[..len]).is_err(), "cut at {len} of {}", file.len());
        }
        let mut random = SplitMix64(file.len() as u64);
        for at in 0..file.len() {
            let mut damaged = file.clone();
            let width = [1, 4, 8][random.below(3) as usize].min(file.len() - at);
            let value = if random.below(2) == 0 { u64::MAX >> random.below(64) } else { random.next_u64() };
            damaged[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
            let before = LIVE.load(Ordering::Relaxed);
            PEAK.store(before, Ordering::Relaxed);
            let _ = read(&damaged);
            let peak = PEAK.load(Ordering::Relaxed) - before;
            assert!(peak < MOST * file.len(), "{peak} bytes for a file of {}, with {value:x} at byte {at}", file.len());
        }
    }
}

/// Bytes of memory for each byte of a file: copies of its strings, indices of them, and the tokenizer's JSON.
const MOST: usize = 40;
