//! How one block is coded: which scale and offset it gets, and which code is nearest to a value.

use htp_sim::round_to_f16;

use super::Bits;
use crate::encoding::MAX_BLOCK_STEP;

/// How the scale of a block is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Search {
    /// From its smallest and largest value.
    MinMax,
    /// So that the squared error, weighted by the importance of the inputs, is least.
    Mse,
}

/// How one block is coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// `q · scale`, f32 scale.
    Symmetric(Bits),
    /// `q · scale`, f16 scale.
    SymmetricF16(Bits),
    /// `(q + offset) · scale`, f16 scale, i8 offset, `q` in `0..=15`.
    Offset,
    /// `q · scale + min`, f16 scale and minimum, `q` in `0..=15`.
    Min,
    /// `q · step · scale`, f32 scale of the row, `step` a whole number from 1 to 16.
    Expansion,
}

/// The grid of one block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Grid {
    /// Distance of two values.
    pub(super) scale: f32,
    /// What is stored beside the scale: the offset, the minimum or the step.
    pub(super) stored: f32,
    /// What code 0 means.
    zero: f32,
    lowest: f32,
    highest: f32,
}

impl Grid {
    /// The code nearest to `value`.
    pub(super) fn code(&self, value: f32) -> f32 {
        if self.scale == 0.0 {
            return 0.0;
        }
        ((value - self.zero) / self.scale).round_ties_even().clamp(self.lowest, self.highest)
    }

    /// What code `q` means.
    pub(super) fn value(&self, q: f32) -> f32 {
        q * self.scale + self.zero
    }

    /// Sum of the squared differences between values and their nearest codes, each times its importance.
    fn error(&self, block: &[f32], importance: Option<&[f32]>) -> f64 {
        let difference = |v: &f32| self.value(self.code(*v)) - v;
        match importance {
            None => block.iter().map(|v| f64::from(difference(v)).powi(2)).sum(),
            Some(all) => block.iter().zip(all).map(|(v, i)| f64::from(difference(v)).powi(2) * f64::from(*i)).sum(),
        }
    }
}

impl Form {
    pub(super) fn bits(self) -> Bits {
        match self {
            Form::Symmetric(bits) | Form::SymmetricF16(bits) => bits,
            Form::Offset | Form::Min | Form::Expansion => Bits::Four,
        }
    }

    /// Smallest and largest code.
    fn codes(self) -> (f32, f32) {
        match (self, self.bits()) {
            (Form::Offset | Form::Min, _) => (0.0, 15.0),
            (_, Bits::Eight) => (-127.0, 127.0),
            (_, Bits::Four) => (-8.0, 7.0),
        }
    }

    /// The grid of a block, or `None` if f16 cannot hold its scale. `row_scale` is that of its row in form
    /// [`Form::Expansion`] and means nothing in others.
    pub(super) fn fit(self, block: &[f32], importance: Option<&[f32]>, row_scale: f32, search: Search) -> Option<Grid> {
        let range = block.iter().fold((f32::MAX, f32::MIN), |(min, max), v| (v.min(min), v.max(max)));
        let plain = self.grid(range, row_scale)?;
        if search == Search::MinMax {
            return Some(plain);
        }
        let mut best = (plain.error(block, importance), plain);
        for shrink in SHRINKS {
            let Some(mut grid) = self.grid((range.0 * shrink, range.1 * shrink), row_scale) else { continue };
            if self == Form::Min {
                grid = self.refine(grid, block, importance).unwrap_or(grid);
            }
            let error = grid.error(block, importance);
            if error < best.0 {
                best = (error, grid);
            }
        }
        Some(best.1)
    }

    /// The grid that reaches from `min` to `max`.
    fn grid(self, (min, max): (f32, f32), row_scale: f32) -> Option<Grid> {
        let (lowest, highest) = self.codes();
        let largest = max.max(-min);
        let symmetric = |scale, stored| Grid { scale, stored, zero: 0.0, lowest, highest };
        Some(match self {
            Form::Symmetric(_) => symmetric(largest / highest, 0.0),
            Form::SymmetricF16(_) => symmetric(round_to_f16(largest / highest)?, 0.0),
            Form::Expansion => {
                let step = if row_scale == 0.0 { 1.0 } else { (largest / highest / row_scale).round() };
                let step = step.clamp(1.0, MAX_STEP);
                symmetric(step * row_scale, step)
            }
            Form::Min => {
                let (scale, zero) = (round_to_f16((max - min) / 15.0)?, round_to_f16(min)?);
                Grid { scale, stored: zero, zero, lowest, highest }
            }
            Form::Offset => {
                // The offset is an i8: a block far from 0 gets a wider range that reaches nearer to it.
                let scale = round_to_f16(((max - min) / 15.0).max(largest / 127.0))?;
                let offset = if scale == 0.0 { 0.0 } else { (min / scale).round_ties_even() };
                let offset = offset.clamp(-128.0, 127.0);
                Grid { scale, stored: offset, zero: offset * scale, lowest, highest }
            }
        })
    }

    /// The scale and minimum that fit the codes of `grid` best: weighted least squares.
    fn refine(self, grid: Grid, block: &[f32], importance: Option<&[f32]>) -> Option<Grid> {
        let (mut n, mut q1, mut q2, mut v1, mut qv) = (0.0f64, 0.0f64, 0.0f64, 0.0f64, 0.0f64);
        for (i, value) in block.iter().enumerate() {
            let weight = importance.map_or(1.0, |all| f64::from(all[i]));
            let (q, v) = (f64::from(grid.code(*value)), f64::from(*value));
            n += weight;
            q1 += weight * q;
            q2 += weight * q * q;
            v1 += weight * v;
            qv += weight * q * v;
        }
        let determinant = n * q2 - q1 * q1;
        if determinant <= 0.0 {
            return None;
        }
        let scale = round_to_f16(((n * qv - q1 * v1) / determinant) as f32).filter(|scale| *scale > 0.0)?;
        let zero = round_to_f16(((v1 - f64::from(scale) * q1) / n) as f32)?;
        Some(Grid { scale, stored: zero, zero, ..grid })
    }

    /// The scale of a row in form [`Form::Expansion`], so that its widest block takes the largest step; 0 in other forms.
    /// It has so few significant bits that its product with every step is exact in f16, too.
    pub(super) fn row_scale(self, row: &[f32], importance: Option<&[f32]>, block_size: usize, search: Search) -> f32 {
        if self != Form::Expansion {
            return 0.0;
        }
        let blocks = row.chunks_exact(block_size).enumerate();
        let scales = blocks.filter_map(|(i, block)| {
            let importance = importance.map(|all| &all[i * block_size..(i + 1) * block_size]);
            Form::Symmetric(Bits::Four).fit(block, importance, 0.0, search)
        });
        let scale = scales.map(|grid| grid.scale).fold(0.0, f32::max) / MAX_STEP;
        // Bits of the fraction that are cut off: of 24 significant bits seven stay. Upwards, so that the step still fits.
        let cut = (1u32 << 17) - 1;
        f32::from_bits((scale.to_bits() + cut) & !cut)
    }
}

/// Parts of a block's range that a search tries.
const SHRINKS: [f32; 12] = [1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.78, 0.74, 0.7, 0.65, 0.6];
/// Largest step of [`Form::Expansion`]: with four-bit codes the product stays inside eight bits.
const MAX_STEP: f32 = MAX_BLOCK_STEP as f32;
