//! What the machine can do at most: bytes read from memory per second, on small pages and on large ones, and 8-bit
//! multiply-adds per second of each instruction set, for figures that are given as shares of these limits.
//!
//! Printed as a line of JSON for each, `{"metric": …, "median": …, …}`, which is what `benches/peers/compare.py` reads.
//!
//! ```sh
//! cargo bench --bench limits -- --mib 72 --threads 2
//! ```
//!
//! `--mib` is the size of what a decode step reads (72 if not given): a smaller buffer may stay in the caches. `--threads`
//! is the number of workers (the number of cores if not given).

use std::time::Instant;

use anyhow::{Context, bail};
use htp_sim::{Kernels, Workers};
use memmap2::MmapMut;
use serde_json::json;

fn main() -> anyhow::Result<()> {
    let (mut mib, mut threads) = (72, std::thread::available_parallelism().map_or(1, usize::from));
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let target = match argument.as_str() {
            "--mib" => &mut mib,
            "--threads" => &mut threads,
            // What `cargo bench` adds.
            "--bench" => continue,
            other => bail!("unknown argument {other:?}, need --mib N or --threads N"),
        };
        let value = arguments.next().with_context(|| format!("{argument} without a number"))?;
        *target =
            value.parse().ok().filter(|n| *n > 0).with_context(|| format!("{argument} {value:?}: need 1 or more"))?;
    }
    let workers = Workers::new(threads)?;
    let mut memory = MmapMut::map_anon(mib << 20)?;
    print("read_bytes_per_s", &workers, read_rates(&workers, &mut memory));
    #[cfg(target_os = "linux")]
    {
        let mut memory = MmapMut::map_anon(mib << 20)?;
        memory.advise(memmap2::Advice::HugePage)?;
        print("read_bytes_per_s_large_pages", &workers, read_rates(&workers, &mut memory));
    }
    for set in instruction_sets() {
        print(&format!("int8_multiply_adds_per_s_{}", set.name), &workers, set.rates(&workers));
    }
    Ok(())
}

/// One line: the median of `rates`, and the best.
fn print(metric: &str, workers: &Workers, mut rates: [f64; ROUNDS]) {
    rates.sort_by(f64::total_cmp);
    let (median, best) = (rates[ROUNDS / 2], rates[ROUNDS - 1]);
    println!("{}", json!({"metric": metric, "median": median, "best": best, "threads": workers.count()}));
}

/// Bytes per second at which the team reads `memory`.
fn read_rates(workers: &Workers, memory: &mut [u8]) -> [f64; ROUNDS] {
    const PARTS: usize = 64;
    memory.fill(1);
    let part_len = memory.len() / PARTS;
    let memory: &[u8] = memory;
    each_round(part_len * PARTS, || {
        workers.for_each(PARTS, |part, _| {
            read(&memory[part * part_len..][..part_len]);
        });
    })
}

/// Reads all of `memory`.
fn read(memory: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every CPU of this architecture has the instruction set.
    unsafe {
        x86_64::read(memory)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        // Enough sums that the loads never wait for one.
        let mut sums = [0_u64; 32];
        for chunk in memory.as_chunks::<256>().0 {
            let values = chunk.as_chunks().0.iter().map(|value| u64::from_le_bytes(*value));
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum ^= value);
        }
        std::hint::black_box(sums);
    }
}

/// An instruction set's products of bytes, as many at once as it has room for, all operands in registers.
struct InstructionSet {
    name: &'static str,
    /// Runs `n` iterations of [`InstructionSet::per_iteration`] multiply-adds.
    run: fn(usize),
    per_iteration: usize,
}

impl InstructionSet {
    /// Multiply-adds per second of all workers together.
    fn rates(&self, workers: &Workers) -> [f64; ROUNDS] {
        const ITERATIONS: usize = 1 << 20;
        let run = || workers.for_each(workers.count(), |_, _| (self.run)(ITERATIONS));
        each_round(ITERATIONS * self.per_iteration * workers.count(), run)
    }
}

/// Those that this CPU has and that are written below.
fn instruction_sets() -> Vec<InstructionSet> {
    #[cfg(target_arch = "x86_64")]
    {
        let mut sets = Vec::new();
        // Looking for the kernels asks the system for the use of the tile unit.
        if Kernels::available().iter().any(|kernels| kernels.name == "amx") {
            // SAFETY: the CPU has the unit, and the system permits its use.
            let run: fn(usize) = |n| unsafe { x86_64::amx(n) };
            sets.push(InstructionSet { name: "amx", run, per_iteration: 4 * 16 * 16 * 64 });
        }
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
            // SAFETY: the CPU has the instruction set.
            let run: fn(usize) = |n| unsafe { x86_64::vnni(n) };
            sets.push(InstructionSet { name: "avx512_vnni", run, per_iteration: 16 * 64 });
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has the instruction set.
            let run: fn(usize) = |n| unsafe { x86_64::avx2(n) };
            sets.push(InstructionSet { name: "avx2", run, per_iteration: 12 * 32 });
        }
        sets
    }
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Reads all of `memory`, asking ahead for it as the kernels do.
    #[target_feature(enable = "sse2")]
    pub(super) fn read(memory: &[u8]) {
        let mut sums = [_mm_setzero_si128(); 4];
        for line in memory.as_chunks::<64>().0 {
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(4096).cast());
            for (sum, bytes) in sums.iter_mut().zip(line.as_chunks::<16>().0) {
                // SAFETY: sixteen bytes, unaligned.
                *sum = _mm_xor_si128(*sum, unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
            }
        }
        black_box(sums);
    }

    /// Four `tdpbssd` of 16 rows, 16 columns and 64 products each. The bytes are not zero: the unit is a fifth faster on zeros.
    ///
    /// # Safety
    /// The CPU has the unit, and the system permits its use.
    pub(super) unsafe fn amx(n: usize) {
        #[repr(C, align(64))]
        struct Shapes([u8; 64]);
        let mut shapes = Shapes([0; 64]);
        shapes.0[0] = 1;
        for register in 0..8 {
            shapes.0[16 + 2 * register] = 64;
            shapes.0[48 + register] = 16;
        }
        let bytes: [u8; 1024] = std::array::from_fn(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8);
        // SAFETY: the caller's promise. The shapes are full tiles, and `bytes` holds one.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack));
            asm!("tileloadd tmm4, [{0} + {1}*1]", "tileloadd tmm5, [{0} + {1}*1]", "tileloadd tmm6, [{0} + {1}*1]",
                "tileloadd tmm7, [{0} + {1}*1]", in(reg) bytes.as_ptr(), in(reg) 64_usize, options(nostack));
            for _ in 0..n {
                asm!(
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tdpbssd tmm1, tmm4, tmm7",
                    "tdpbssd tmm2, tmm5, tmm6",
                    "tdpbssd tmm3, tmm5, tmm7",
                    options(nostack, nomem)
                );
            }
            asm!("tilerelease", options(nostack, nomem));
        }
    }

    /// Sixteen `vpdpbusd` of 64 products each.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn vnni(n: usize) {
        let (a, b) = (black_box(_mm512_set1_epi8(3)), black_box(_mm512_set1_epi8(5)));
        // The compiler must not know that two sums are the same.
        let mut sums = [_mm512_setzero_si512(); 16];
        sums.iter_mut().for_each(|sum| *sum = black_box(*sum));
        for _ in 0..n {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        black_box(sums);
    }

    /// Twelve `vpmaddubsw` of 32 products each, with the addition that each needs.
    #[target_feature(enable = "avx2")]
    pub(super) fn avx2(n: usize) {
        let (a, b) = (_mm256_set1_epi8(3), _mm256_set1_epi8(5));
        let mut sums = [_mm256_setzero_si256(); 12];
        for _ in 0..n {
            for sum in &mut sums {
                // The compiler would take a product of constants out of the loop.
                // SAFETY: reads and writes registers only.
                unsafe {
                    asm!(
                        "vpmaddubsw {products}, {a}, {b}",
                        "vpaddw {sum}, {sum}, {products}",
                        products = out(ymm_reg) _,
                        sum = inout(ymm_reg) *sum,
                        a = in(ymm_reg) a,
                        b = in(ymm_reg) b,
                        options(nomem, nostack, preserves_flags),
                    );
                }
            }
        }
        black_box(sums);
    }
}

/// How many of `amount` per second `run` does, in each round.
fn each_round(amount: usize, mut run: impl FnMut()) -> [f64; ROUNDS] {
    std::array::from_fn(|_| {
        let start = Instant::now();
        run();
        amount as f64 / start.elapsed().as_secs_f64()
    })
}

const ROUNDS: usize = 15;
