//! Quantization of activations: one scale per row, found in the row, or one fixed grid for all rows.

use crate::Cx;
use crate::elementwise::in_parts;
use crate::error::{Needed, ShapeError, expect_at_most, expect_len, size};
use crate::kernels::{QuantizedRowMut, RowValues, Steps};
use crate::packed::MAX_INTEGER_K;
use crate::scratch::{Aligned, Disjoint, LINE_BYTES};

/// Bits of a quantized activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ActBits {
    /// `-127..=127`; `scale = absmax / 127`.
    Eight,
    /// `-32512..=32512`; `scale = absmax / 32512`.
    Sixteen,
}

impl ActBits {
    /// The largest magnitude of a code.
    pub const fn limit(self) -> i32 {
        match self {
            Self::Eight => 127,
            Self::Sixteen => 127 * 256,
        }
    }
}

/// A fixed grid: the floats `i · scale` for whole `i` from `low` to `high`.
///
/// A value goes to the nearest of them, ties to the even `i`, and to the end of the grid if it is outside.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grid {
    scale: f32,
    low: i32,
    high: i32,
}

impl Grid {
    /// The grid from `low` to `high`, or `None` unless `scale` is a positive normal float and
    /// `low <= 0 <= high <= low + 65535`.
    pub fn new(scale: f32, low: i32, high: i32) -> Option<Grid> {
        let steps = i64::from(high) - i64::from(low);
        let fits = scale.is_normal() && scale > 0.0 && low <= 0 && high >= 0 && steps <= 0xffff;
        fits.then_some(Grid { scale, low, high })
    }

    /// Distance of two neighbours.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The nearest float of the grid; NaN stays.
    #[inline(always)]
    pub fn nearest(&self, x: f32) -> f32 {
        (x / self.scale).clamp(self.low as f32, self.high as f32).round_ties_even() * self.scale
    }

    /// The same in f64, for oracles.
    pub fn nearest_f64(&self, x: f64) -> f64 {
        let scale = f64::from(self.scale);
        (x / scale).round_ties_even().clamp(f64::from(self.low), f64::from(self.high)) * scale
    }

    /// Whether codes of at most `bits` hold the grid with code 0 for 0: then products need no sums of weights.
    pub fn is_centered(&self, bits: ActBits) -> bool {
        self.center(self.bits_in(bits)) == Some(0)
    }

    /// The bits that codes of the grid take where there is room for `most`: eight if it has so few steps.
    fn bits_in(&self, most: ActBits) -> ActBits {
        if self.high - self.low <= 0xff { ActBits::Eight } else { most }
    }

    /// Where code 0 lies, so that all codes fit `bits`, or `None` if there are too many. It is 0 if that fits.
    fn center(&self, bits: ActBits) -> Option<i32> {
        // Two signed bytes `256 · hi + lo` reach from -128 · 256 - 128 to 127 · 256 + 127.
        let (least, most) = match bits {
            ActBits::Eight => (-128, 127),
            ActBits::Sixteen => (-32896, 32639),
        };
        let center = if self.low < least || self.high > most { self.low - least } else { 0 };
        (self.high - center <= most).then_some(center)
    }
}

/// Rows of activations as integers: `float = (code + center) · scale`, with one scale per row.
///
/// Without a grid each row gets a scale from its largest magnitude, and `center` is 0. With one, all rows have its scale,
/// and `center` is what moves its codes into range, 0 for most grids.
///
/// A 16-bit code is kept as two signed bytes, `256 · hi + lo`, in two planes: 8-bit multipliers take one at a time. Where
/// there is room for 16 bits, rows on a grid of at most 256 steps have 8, and cost no more than that.
///
/// A row with a NaN has scale NaN and codes 0, so that all it makes is NaN. Without a grid so has one with an infinity, and a
/// row of zeros has scale 0. On a grid both have its scale: zeros are on it, and infinities go to its ends.
#[derive(Debug, Clone)]
pub struct QuantizedRows {
    rows: usize,
    max_rows: usize,
    k: usize,
    /// Bytes from one row of a plane to the next.
    stride: usize,
    /// Bits that there is room for.
    most_bits: ActBits,
    bits: ActBits,
    sum_block: usize,
    hi: Aligned<i8>,
    lo: Aligned<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
    /// Sums over multiples of `sum_block`, for weights of larger blocks.
    coarser: Vec<(usize, Vec<i32>)>,
    plane_sums: Vec<[i32; 2]>,
    grid: Option<Grid>,
    center: i32,
}

impl QuantizedRows {
    /// Room for `max_rows` rows of `k` values of at most `bits`, with sums over each `sum_block` of them.
    ///
    /// `sum_block` is the block of the weights that the rows will meet, or `k` where these have none.
    ///
    /// # Errors
    /// [`ShapeError`] if `k` is 0 or above 65536, `sum_block` does not divide it, or the buffers would not fit in memory.
    pub fn new(max_rows: usize, k: usize, bits: ActBits, sum_block: usize) -> Result<Self, ShapeError> {
        if k == 0 {
            return Err(ShapeError::new("values in a row", k, Needed::AtLeast(1)));
        }
        expect_at_most("values in a quantized row", k, MAX_INTEGER_K)?;
        if sum_block == 0 || !k.is_multiple_of(sum_block) {
            return Err(ShapeError::new("block of sums", sum_block, Needed::DivisorOf(k)));
        }
        // Rows start at cache lines. At a distance of many lines that divides the sets of a cache, few rows would fit in it.
        let lines = k.div_ceil(LINE_BYTES);
        let stride = (if lines.is_multiple_of(8) { lines + 1 } else { lines }) * LINE_BYTES;
        let bytes = size("bytes of quantized rows", &[max_rows, stride])?;
        let low_bytes = if bits == ActBits::Sixteen { bytes } else { 0 };
        Ok(Self {
            rows: 0,
            max_rows,
            k,
            stride,
            most_bits: bits,
            bits,
            sum_block,
            hi: Aligned::zeroed(bytes),
            lo: Aligned::zeroed(low_bytes),
            scales: vec![0.0; max_rows],
            sums: vec![0; max_rows * (k / sum_block)],
            coarser: Vec::new(),
            plane_sums: vec![[0; 2]; max_rows],
            grid: None,
            center: 0,
        })
    }

    /// Also keeps sums over each `block` values, for weights of that block beside those of `sum_block`.
    ///
    /// # Errors
    /// [`ShapeError`] if `block` is no multiple of the finest sums' block, or does not divide `k`.
    pub fn with_sums_over(mut self, block: usize) -> Result<Self, ShapeError> {
        if block == 0 || !block.is_multiple_of(self.sum_block) || !self.k.is_multiple_of(block) {
            return Err(ShapeError::new("block of coarser sums", block, Needed::DivisorOf(self.k)));
        }
        if !self.has_sums_over(block) {
            self.coarser.push((block, vec![0; self.max_rows * (self.k / block)]));
        }
        Ok(self)
    }

    /// True if sums over each `block` values are kept.
    pub fn has_sums_over(&self, block: usize) -> bool {
        self.sum_block == block || self.coarser.iter().any(|(coarser, _)| *coarser == block)
    }

    /// Quantizes later rows on `grid`, or (`None`) each with a scale of its own and all the bits that there is room for.
    ///
    /// # Errors
    /// [`ShapeError`] if the grid has more steps than codes of these bits.
    pub fn set_grid(&mut self, grid: Option<Grid>) -> Result<(), ShapeError> {
        let (bits, center) = match grid {
            None => (self.most_bits, 0),
            Some(grid) => {
                let (bits, steps) = (grid.bits_in(self.most_bits), (grid.high - grid.low) as usize);
                let refused = || ShapeError::new("steps of a grid for 8-bit codes", steps, Needed::AtMost(0xff));
                (bits, grid.center(bits).ok_or_else(refused)?)
            }
        };
        (self.bits, self.center, self.grid) = (bits, center, grid);
        Ok(())
    }

    /// Rows that hold values now.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows that fit.
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// Values in a row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bits of a code now.
    pub fn bits(&self) -> ActBits {
        self.bits
    }

    /// Values under one of the finest sums.
    pub fn sum_block(&self) -> usize {
        self.sum_block
    }

    /// The code at (`row`, `k`).
    pub fn code(&self, row: usize, k: usize) -> i32 {
        let at = row * self.stride + k;
        match self.bits {
            ActBits::Eight => i32::from(self.hi[at]),
            ActBits::Sixteen => 256 * i32::from(self.hi[at]) + i32::from(self.lo[at]),
        }
    }

    /// The scale of row `row`.
    pub fn scale(&self, row: usize) -> f32 {
        self.scales[row]
    }

    /// The float at (`row`, `k`).
    pub fn value(&self, row: usize, k: usize) -> f32 {
        (self.code(row, k) + self.center) as f32 * self.scales[row]
    }

    /// What code 0 means; 0 without a grid. A product with weights lacks this times the sum of each output's weights.
    pub fn shift(&self) -> f32 {
        self.grid.map_or(0.0, |grid| self.center as f32 * grid.scale)
    }

    /// The planes from row `row` on, with the sums over blocks of `block`; the finest if there are none of that block.
    pub(crate) fn from(&self, row: usize, block: usize) -> QuantizedRowsFrom<'_> {
        let at = row * self.stride;
        let coarser = self.coarser.iter().find(|(coarser, _)| *coarser == block);
        let (block, sums) = coarser.map_or((self.sum_block, &self.sums), |(block, sums)| (*block, sums));
        QuantizedRowsFrom {
            hi: &self.hi[at..],
            lo: if self.bits == ActBits::Sixteen { &self.lo[at..] } else { &[] },
            stride: self.stride,
            scales: &self.scales[row..],
            sums: &sums[row * (self.k / block)..],
            plane_sums: &self.plane_sums[row..],
        }
    }
}

/// Borrowed parts of [`QuantizedRows`].
pub(crate) struct QuantizedRowsFrom<'a> {
    pub(crate) hi: &'a [i8],
    pub(crate) lo: &'a [i8],
    pub(crate) stride: usize,
    pub(crate) scales: &'a [f32],
    pub(crate) sums: &'a [i32],
    pub(crate) plane_sums: &'a [[i32; 2]],
}

/// Quantizes the rows of `x`, `[m, k]`, into `out`: `code = round_half_even(x / scale) - center`.
///
/// # Errors
/// [`ShapeError`] if `x` is not a whole number of `out`'s rows, or more rows than fit.
pub fn quantize_rows(cx: &Cx<'_>, x: &[f32], out: &mut QuantizedRows) -> Result<(), ShapeError> {
    let (k, rows) = (out.k, out.rows_in(x)?);
    quantize_each(cx, rows, out, |row| RowValues { x: &x[row * k..][..k], norm: None });
    Ok(())
}

/// Moves each value of `x` to the nearest one of `grid`.
pub fn snap(cx: &Cx<'_>, x: &mut [f32], grid: Grid) {
    in_parts(cx, x, |_, part| part.iter_mut().for_each(|value| *value = grid.nearest(*value)));
}

impl QuantizedRows {
    /// The number of rows in `x`, if it is whole and they fit.
    pub(crate) fn rows_in(&self, x: &[f32]) -> Result<usize, ShapeError> {
        let rows = x.len() / self.k;
        expect_at_most("rows of x", rows, self.max_rows)?;
        expect_len("length of x", x.len(), rows * self.k)?;
        Ok(rows)
    }
}

/// Quantizes `rows` rows, each as `values` describes it.
pub(crate) fn quantize_each<'a>(
    cx: &Cx<'_>,
    rows: usize,
    out: &mut QuantizedRows,
    values: impl Fn(usize) -> RowValues<'a> + Sync,
) {
    let (k, stride, sum_block) = (out.k, out.stride, out.sum_block);
    let low_stride = if out.bits == ActBits::Sixteen { stride } else { 0 };
    let low_k = if out.bits == ActBits::Sixteen { k } else { 0 };
    let blocks = k / sum_block;
    let steps = out.grid.map(|grid| Steps { scale: grid.scale, low: grid.low, high: grid.high, center: out.center });
    out.rows = rows;
    let hi = Disjoint::new(&mut out.hi);
    let lo = Disjoint::new(&mut out.lo);
    let scales = Disjoint::new(&mut out.scales);
    let sums = Disjoint::new(&mut out.sums);
    let plane_sums = Disjoint::new(&mut out.plane_sums);
    let quantize_row = |row: usize| {
        // SAFETY: each row is one item, and its ranges are its own.
        let target = unsafe {
            QuantizedRowMut {
                hi: hi.range(row * stride, k),
                lo: lo.range(row * low_stride, low_k),
                scale: &mut scales.range(row, 1)[0],
                sums: sums.range(row * blocks, blocks),
                sum_block,
                plane_sums: &mut plane_sums.range(row, 1)[0],
                steps,
            }
        };
        // SAFETY: the table exists only on a CPU that has its instruction set; the ranges above have the row's lengths.
        unsafe { (cx.kernels.quantize)(values(row), target) }
    };
    if rows * k < PARALLEL_VALUES {
        (0..rows).for_each(quantize_row);
    } else {
        cx.workers.for_each(rows, |row, _| quantize_row(row));
    }
    for (block, coarser) in &mut out.coarser {
        let fine = out.sums.chunks_exact(*block / sum_block).take(rows * (k / *block));
        // As in the kernels: sums over blocks of weights, up to `MAX_BLOCK`, fit; longer ones may wrap, and nobody reads them.
        let add = |fine: &[i32]| fine.iter().fold(0_i32, |sum, fine| sum.wrapping_add(*fine));
        coarser.iter_mut().zip(fine).for_each(|(sum, fine)| *sum = add(fine));
    }
}

/// Below this many values a region costs more than it saves.
const PARALLEL_VALUES: usize = 8192;

#[cfg(test)]
mod tests;
