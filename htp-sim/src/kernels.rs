//! The dispatch seam: one table of functions per instruction set, and the types that cross it.
//!
//! A kernel computes one tile on one thread. It allocates nothing, cannot fail, and trusts the lengths in its tile.

use std::sync::OnceLock;

#[cfg(target_arch = "aarch64")]
use crate::arch::aarch64::{dotprod, i8mm, neon};
use crate::arch::portable;
#[cfg(target_arch = "x86_64")]
use crate::arch::x86_64::{amx, avx_vnni, avx2, avx512_vnni};
use crate::elementwise::{Activation, Unary};
use crate::isa::{self, IsaError};
use crate::matmul::Write;
use crate::packed::BlockOffset;
use crate::scratch::Disjoint;

/// One instruction set's entry points. A value exists only for an instruction set that this CPU was seen to have.
#[derive(Clone, Copy)]
pub struct Kernels {
    /// Name of the tier: `"avx512_vnni"`, for logs, tests and bench ids.
    pub name: &'static str,
    /// Quantized rows by per-channel weights, 8 and 4 bit.
    pub(crate) matmul_q_w8c: IntegerFn,
    pub(crate) matmul_q_w4c: IntegerFn,
    /// Quantized rows by block weights, 8, 6, 5 and 4 bit.
    pub(crate) matmul_q_w8b: IntegerFn,
    pub(crate) matmul_q_w6b: IntegerFn,
    pub(crate) matmul_q_w5b: IntegerFn,
    pub(crate) matmul_q_w4b: IntegerFn,
    /// Quantized rows by 4-bit weights with a whole step per block and a scale per channel.
    pub(crate) matmul_q_w4e: IntegerFn,
    /// Float rows by float weights, and by 8-bit per-channel weights.
    pub(crate) matmul_f32_f32: FloatFn,
    pub(crate) matmul_f32_f16: FloatFn,
    pub(crate) matmul_f32_bf16: FloatFn,
    pub(crate) matmul_f32_w8c: FloatFn,
    /// Probabilities by float value rows.
    pub(crate) values_f32: ValuesFn,
    pub(crate) values_f16: ValuesFn,
    /// Vector functions. These give the same bits on every tier.
    pub(crate) softmax: unsafe fn(&mut [f32]) -> SoftmaxTotals,
    /// The softmax of rows whose probabilities meet values with scales, in steps: those of several rows can then overlap.
    /// Logarithms of the scales; with them each row's peak; of all peaks the scales of the codes; of each row the codes.
    pub(crate) log_scales: unsafe fn(&[[u8; 4]], &mut [f32]),
    pub(crate) peak: unsafe fn(&[f32], &[f32]) -> Peak,
    pub(crate) weight_scales: unsafe fn([&[f32]; 2], [&mut [f32]; 2]),
    pub(crate) weigh: WeighFn,
    pub(crate) soft_cap: unsafe fn(&mut [f32], f32),
    pub(crate) sum_squares: unsafe fn(&[f32]) -> f32,
    pub(crate) normalize: unsafe fn(&[f32], f32, &[f32], &mut [f32]),
    pub(crate) quantize: unsafe fn(RowValues<'_>, QuantizedRowMut<'_>),
    pub(crate) unary: unsafe fn(Unary, &mut [f32]),
    pub(crate) gate: unsafe fn(Activation, &mut [f32], &[f32]),
    pub(crate) rotate: RotateFn,
    /// `values += factor · row` for each row of `values`, `[_, width]`, `width` a multiple of 16; `row` may be shorter.
    pub(crate) add_row: unsafe fn(&mut [f32], usize, &[f32], f32),
    /// Writes or adds the first columns of each row of `values`, `[_, width]`, `width` a multiple of 16, to its place.
    pub(crate) store_rows: unsafe fn(&[f32], usize, RowsMut<'_>),
    /// Merging parts of attention: of each row, the maximum and sum so far, which get those of the part added, and the factors of what
    /// was made with either; then, row by row, `acc = acc · factor + part · factor`.
    pub(crate) merge_totals: MergeFn,
    pub(crate) merge: unsafe fn(&mut [f32], &[f32], [f32; 2]),
    /// `out = x · factor`.
    pub(crate) scale: unsafe fn(&[f32], f32, &mut [f32]),
    /// Products that go straight to the output, on tiers that gain by it.
    pub(crate) straight: Option<Straight>,
    /// To be called on a thread after the last tile of a region: what kernels keep from one tile to the next is given back.
    pub(crate) leave: fn(),
    /// Asks for bytes that will soon be read or written; does nothing where there is no such instruction.
    pub(crate) prefetch: fn(&[u8]),
}

/// [`IntegerTile::ahead`] of codes that are read from one end to the other.
pub(crate) const STREAM_AHEAD: isize = 6144;

/// Rows of an [`IntegerTile`], at most: kernels keep sums for so many.
pub(crate) const MAX_TILE_ROWS: usize = 128;

/// Kernels as [`Kernels::matmul_q_w8c`] and its like, whose results go to their place in the output: a buffer between the two costs
/// a fast multiplier a fifth of its time. For tiles of whole panels that `fits` finds worth it.
#[derive(Clone, Copy)]
pub(crate) struct Straight {
    pub(crate) fits: unsafe fn(&IntegerTile<'_>) -> bool,
    pub(crate) q_w8c: StraightFn,
    pub(crate) q_w4c: StraightFn,
    pub(crate) q_w4e: StraightFn,
    /// `silu(gate) · up` of two products with the same x, rows, panels and `k`.
    pub(crate) silu_w8c: GatedFn,
    pub(crate) silu_w4c: GatedFn,
    pub(crate) silu_w4e: GatedFn,
    /// Products with block weights: whether so many rows of so many inputs are worth it. They and those of [`Kernels::matmul_q_w4b`] and
    /// its like then round weights, see [`IntegerTile`].
    pub(crate) fits_blocks: fn(usize, usize) -> bool,
    /// Whether they can add a branch to rows of so many inputs, of a rank.
    pub(crate) fits_branch: fn(usize, usize) -> bool,
    pub(crate) q_w8b: StraightFn,
    pub(crate) q_w6b: StraightFn,
    pub(crate) q_w5b: StraightFn,
    pub(crate) q_w4b: StraightFn,
    pub(crate) silu_w8b: GatedFn,
    pub(crate) silu_w6b: GatedFn,
    pub(crate) silu_w5b: GatedFn,
    pub(crate) silu_w4b: GatedFn,
}

pub(crate) type StraightFn = unsafe fn(&IntegerTile<'_>, &RowsMut<'_>);
pub(crate) type GatedFn = unsafe fn([&IntegerTile<'_>; 2], &RowsMut<'_>);
pub(crate) type IntegerFn = unsafe fn(&IntegerTile<'_>, &mut [f32]);
pub(crate) type FloatFn = unsafe fn(&FloatTile<'_>, &mut [f32]);
pub(crate) type RotateFn = unsafe fn(&mut [f32], &mut [f32], &[f32], &[f32]);
pub(crate) type WeighFn = unsafe fn(&[f32], &[[u8; 4]], [f32; 2], WeightsMut<'_>) -> f32;
pub(crate) type MergeFn = unsafe fn([&mut [f32]; 2], [&[f32]; 2], [&mut [f32]; 2]);
pub(crate) type ValuesFn = unsafe fn(&ValuesTile<'_>, &mut [f32]);

/// Quantized rows by integer weights: `out[rows, 16 · panels]` is overwritten with the floats.
///
/// All tiers give the same bits: with `dot` the exact integer `Σ x · code`, blocks in ascending order compute
/// `acc += scale · float(dot + offset · Σx)` (and `acc += min · float(Σx)`), each rounded once, and the result is
/// `acc · x_scale`. (Where [`Straight::fits_blocks`], weights are rounded to 16 bits of their output's range instead: see the kernels
/// that do so.) Per channel it is `(256 · float(dot_hi) + float(dot_lo)) · (scale · x_scale)`, of 8-bit x
/// `float(dot_hi) · (scale · x_scale)`; with steps too, and the code is then `(u - 8) · step`.
#[derive(Clone, Copy)]
pub(crate) struct IntegerTile<'a> {
    /// At most [`MAX_TILE_ROWS`].
    pub(crate) rows: usize,
    /// Rows of the product that the tile is a part of.
    pub(crate) all_rows: usize,
    pub(crate) panels: usize,
    /// Inputs to sum over: a multiple of 4, or of 8, 32 and 16 where codes have 4, 5 and 6 bits.
    pub(crate) k: usize,
    /// The planes of x: row `i` starts at `i * x_stride`. `lo` is empty when x has 8 bits.
    pub(crate) hi: &'a [i8],
    pub(crate) lo: &'a [i8],
    pub(crate) x_stride: usize,
    pub(crate) x_scales: &'a [f32],
    /// Σx of each block, `[rows, k / block]` (block formats).
    pub(crate) sums: &'a [i32],
    /// Σhi and Σlo of each row (per-channel formats).
    pub(crate) plane_sums: &'a [[i32; 2]],
    /// The weights' sections, starting at the tile's first panel.
    pub(crate) codes: &'a [u8],
    /// Bytes from one panel's codes to the next.
    pub(crate) panel_bytes: usize,
    /// Bytes from codes that are read to those that will be, or 0: x86 kernels of few rows ask for these.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(dead_code, reason = "there is no such instruction, or nothing gained by it")
    )]
    pub(crate) ahead: isize,
    /// Outputs of a panel as stored: 16, or, of per-channel weights and then with one panel in the tile, 4, 8 or 12. The
    /// other columns of `out` may be left as they are.
    pub(crate) width: usize,
    pub(crate) scales: &'a [u8],
    /// Offsets, minima or steps.
    pub(crate) offsets: &'a [u8],
    /// Inputs per scale (block formats) or step: a divisor of `k`, at most [`MAX_BLOCK`](crate::packed::MAX_BLOCK), and a multiple of
    /// what `k` is. Without either it is `k`.
    pub(crate) block: usize,
    pub(crate) offset: BlockOffset,
    /// What the kernels of [`Straight`] add to each row, one after the other: `factor · row` from the tile's first panel on. A row
    /// without values is left out.
    pub(crate) added: [(&'a [f32], f32); 2],
    /// What they add last, where [`Straight::fits_branch`]: the product of other rows, of 16 bits and as many, with 8-bit weights per
    /// channel, of the same panels. These rows have zeros up to a multiple of 64 inputs; to one that is all zeros nothing is added.
    pub(crate) branch: Option<&'a IntegerTile<'a>>,
}

/// Float rows by weights: `out[rows, 16 · panels] = x · Wᵀ`. Sums run over `k` in ascending order.
#[derive(Clone, Copy)]
pub(crate) struct FloatTile<'a> {
    pub(crate) rows: usize,
    pub(crate) panels: usize,
    pub(crate) k: usize,
    /// Row `i` of x is the `k` values at `i * x_stride`.
    pub(crate) x: &'a [f32],
    pub(crate) x_stride: usize,
    pub(crate) codes: &'a [u8],
    /// Bytes from one panel's codes to the next.
    pub(crate) panel_bytes: usize,
    /// f32 per output (`w8c` only).
    pub(crate) scales: &'a [u8],
    /// What becomes of the values in `out` (`w8c` only; the others overwrite).
    pub(crate) write: Write,
}

/// Probabilities by values: `out[rows, head_dim] += p · V`. Sums run over positions in ascending order.
#[derive(Clone, Copy)]
pub(crate) struct ValuesTile<'a> {
    pub(crate) rows: usize,
    pub(crate) positions: usize,
    pub(crate) head_dim: usize,
    /// Row `i` of the probabilities is the `positions` values at `i * p_stride`.
    pub(crate) p: &'a [f32],
    pub(crate) p_stride: usize,
    /// `[positions, head_dim]` elements.
    pub(crate) values: &'a [u8],
}

/// Where the rows of a tile go: row `i` to the `columns` values of `out` at `first + i * stride`, which are the tile's own.
#[derive(Clone, Copy)]
pub(crate) struct RowsMut<'a> {
    pub(crate) out: &'a Disjoint<'a, f32>,
    pub(crate) first: usize,
    pub(crate) stride: usize,
    pub(crate) columns: usize,
    pub(crate) write: Write,
}

impl RowsMut<'_> {
    /// Where the `width` values from `column` on of row `row` go; those of the `rows` after it lie `stride` apart.
    pub(crate) fn place(&self, row: usize, rows: usize, column: usize, width: usize) -> *mut f32 {
        assert!(column + width <= self.columns);
        self.out.rows(self.first + row * self.stride + column, rows, self.stride, width)
    }
}

/// What [`Kernels::softmax`] found in the scores that it replaced by `exp(score - max)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct SoftmaxTotals {
    pub(crate) max: f32,
    pub(crate) sum: f32,
}

/// What [`Kernels::peak`] found: the largest score, and a bound of the largest `log2(e^score · scale)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Peak {
    pub(crate) max: f32,
    pub(crate) log_top: f32,
}

/// Where the products of probabilities and scales go, as codes of 16 bits in two planes (see [`crate::QuantizedRows`]).
pub(crate) struct WeightsMut<'a> {
    pub(crate) hi: &'a mut [i8],
    pub(crate) lo: &'a mut [i8],
    pub(crate) scale: &'a mut f32,
    pub(crate) plane_sums: &'a mut [i32; 2],
}

/// A row to quantize: `x`, or `x · inv · weight` when it is to be normalized on the way.
#[derive(Clone, Copy)]
pub(crate) struct RowValues<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) norm: Option<(f32, &'a [f32])>,
}

/// Where a quantized row goes. `hi` is as long as x; `lo` too, or empty for 8 bits; `sums` has one sum for each `sum_block`
/// values of x, all of them.
pub(crate) struct QuantizedRowMut<'a> {
    pub(crate) hi: &'a mut [i8],
    pub(crate) lo: &'a mut [i8],
    pub(crate) scale: &'a mut f32,
    pub(crate) sums: &'a mut [i32],
    pub(crate) sum_block: usize,
    pub(crate) plane_sums: &'a mut [i32; 2],
    /// The fixed steps, or `None` for a scale from the row's largest magnitude.
    pub(crate) steps: Option<Steps>,
}

/// Fixed steps of a row: `code = clamp(x / scale, low, high), rounded, - center`.
#[derive(Clone, Copy)]
pub(crate) struct Steps {
    pub(crate) scale: f32,
    pub(crate) low: i32,
    pub(crate) high: i32,
    pub(crate) center: i32,
}

impl Kernels {
    /// The tier that `HTP_SIM_ISA` names, or the best one if it is not set. The variable is read once per process.
    ///
    /// # Errors
    /// [`IsaError`] if the variable names a tier that does not exist or that this CPU does not have.
    pub fn selected() -> Result<&'static Self, IsaError> {
        static SELECTED: OnceLock<Result<&'static Kernels, IsaError>> = OnceLock::new();
        SELECTED
            .get_or_init(|| match std::env::var(isa::ISA_VARIABLE) {
                Ok(name) if !name.is_empty() => Self::named(&name),
                _ => Ok(Self::available()[0]),
            })
            .clone()
    }

    /// The tier called `name`.
    ///
    /// # Errors
    /// [`IsaError`] if there is no such tier on this CPU.
    pub fn named(name: &str) -> Result<&'static Self, IsaError> {
        let available = Self::available();
        available.iter().find(|kernels| kernels.name == name).copied().ok_or_else(|| IsaError {
            found: name.to_owned(),
            available: available.iter().map(|kernels| kernels.name).collect(),
        })
    }

    /// Every tier that this CPU can run, best first, `portable` last.
    pub fn available() -> Vec<&'static Self> {
        static AVAILABLE: OnceLock<Vec<&'static Kernels>> = OnceLock::new();
        AVAILABLE.get_or_init(Self::find_available).clone()
    }

    fn find_available() -> Vec<&'static Self> {
        let mut tiers: Vec<&'static Self> = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            tiers.extend(amx::kernels());
            if isa::has_avx512_vnni() {
                tiers.push(&avx512_vnni::KERNELS);
                #[cfg(test)]
                tiers.push(&amx::EMULATED);
                #[cfg(test)]
                tiers.push(&avx_vnni::EVEX_KERNELS);
            }
            if isa::has_avx_vnni() {
                tiers.push(&avx_vnni::KERNELS);
            }
            if isa::has_avx2() {
                tiers.push(&avx2::KERNELS);
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            if isa::has_i8mm() {
                tiers.push(&i8mm::KERNELS);
            }
            if isa::has_dotprod() {
                tiers.push(&dotprod::KERNELS);
            }
            tiers.push(&neon::KERNELS);
        }
        tiers.push(&portable::KERNELS);
        tiers
    }
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernels").field("name", &self.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tiers are found by name, `portable` is always there and last, and what is not there is refused with the choices. A
    /// run under `HTP_SIM_ISA` is one of that tier, never of a fallback.
    #[test]
    fn tiers_are_found_by_name() {
        assert!(Kernels::selected().is_ok(), "{:?}", Kernels::selected());
        let available = Kernels::available();
        assert_eq!(available.last().map(|kernels| kernels.name), Some("portable"));
        for kernels in &available {
            assert_eq!(Kernels::named(kernels.name).map(|found| found.name), Ok(kernels.name));
        }
        let error = Kernels::named("abacus").expect_err("no such tier").to_string();
        assert!(error.starts_with("kernel tier \"abacus\": this CPU has ") && error.ends_with("portable"), "{error}");
    }
}
