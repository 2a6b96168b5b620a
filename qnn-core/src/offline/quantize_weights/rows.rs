//! Coding the rows of a matrix: rows are shared among workers, and each row is coded on its own.

use std::ops::Range;
use std::sync::Mutex;

use htp_sim::Workers;

use super::{
    Bits, Feedback, QuantizeError, Rounding,
    form::{Form, Grid},
    pack_nibbles,
};
use crate::offline::source::SourceTensor;

/// All codes of a tensor, before they are given their encoding.
pub(super) struct Coded {
    pub(super) codes: Vec<u8>,
    /// One for each block.
    pub(super) scales: Vec<f32>,
    /// What is stored beside each scale.
    pub(super) stored: Vec<f32>,
    /// One for each row, in form [`Form::Expansion`].
    pub(super) row_scales: Vec<f32>,
    /// Sum of the squared differences, each times the importance of its input.
    pub(super) squared_error: f64,
}

/// Codes every row of `tensor` in blocks of `block_size`.
pub(super) fn code_rows(
    tensor: &SourceTensor,
    form: Form,
    block_size: usize,
    rounding: &Rounding<'_>,
    workers: &Workers,
) -> Result<Coded, QuantizeError> {
    let (n, k) = (tensor.n(), tensor.k());
    let four = form.bits() == Bits::Four;
    if four && !k.is_multiple_of(2) {
        return Err(QuantizeError::OddRow { tensor: tensor.name.clone(), k });
    }
    let (row_codes, row_blocks) = (if four { k / 2 } else { k }, k / block_size);
    let mut coded = Coded {
        codes: vec![0; n * row_codes],
        scales: vec![0.0; n * row_blocks],
        stored: vec![0.0; n * row_blocks],
        row_scales: vec![0.0; n],
        squared_error: 0.0,
    };
    let chunks: Vec<Mutex<Chunk<'_>>> = coded
        .codes
        .chunks_mut(ROWS_PER_ITEM * row_codes)
        .zip(coded.scales.chunks_mut(ROWS_PER_ITEM * row_blocks))
        .zip(coded.stored.chunks_mut(ROWS_PER_ITEM * row_blocks))
        .zip(coded.row_scales.chunks_mut(ROWS_PER_ITEM))
        .enumerate()
        .map(|(i, (((codes, scales), stored), row_scales))| {
            let start = i * ROWS_PER_ITEM;
            let rows = start..n.min(start + ROWS_PER_ITEM);
            Mutex::new(Chunk { rows, codes, scales, stored, row_scales, outcome: Ok(0.0) })
        })
        .collect();
    workers.for_each(chunks.len(), |item, _| {
        // Each item is taken by one worker, so the lock is never waited for; it only proves that to the compiler.
        let mut chunk = chunks[item].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        chunk.outcome = chunk.code(tensor, form, block_size, rounding);
    });
    let mut squared_error = 0.0;
    for chunk in chunks {
        squared_error += chunk.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()).outcome?;
    }
    coded.squared_error = squared_error;
    Ok(coded)
}

/// Rows that one worker codes at a time.
struct Chunk<'a> {
    rows: Range<usize>,
    codes: &'a mut [u8],
    scales: &'a mut [f32],
    stored: &'a mut [f32],
    row_scales: &'a mut [f32],
    outcome: Result<f64, QuantizeError>,
}

impl Chunk<'_> {
    /// Codes the rows and returns the sum of squared differences.
    fn code(
        &mut self,
        tensor: &SourceTensor,
        form: Form,
        block_size: usize,
        rounding: &Rounding<'_>,
    ) -> Result<f64, QuantizeError> {
        let k = tensor.k();
        let mut values = vec![0.0; self.rows.len() * k];
        tensor.read_rows(self.rows.clone(), &mut values);
        for (i, row) in values.chunks_exact(k).enumerate() {
            if row.iter().any(|v| !v.is_finite()) {
                return Err(QuantizeError::NotFinite { tensor: tensor.name.clone(), row: self.rows.start + i });
            }
            self.row_scales[i] = form.row_scale(row, rounding.importance, block_size, rounding.search);
        }
        let mut codes = vec![0i8; values.len()];
        let rows = RowCoder { form, block_size, k, rounding, row_scales: self.row_scales };
        let mut squared_error = 0.0;
        let mut done = Vec::with_capacity(values.len() / block_size);
        match rounding.feedback {
            None => {
                for (block, codes) in values.chunks(block_size).zip(codes.chunks_mut(block_size)) {
                    let at = done.len();
                    let grid = rows.fit(at, block).ok_or_else(|| self.too_large(tensor, at * block_size / k))?;
                    squared_error += rows.nearest(at, grid, block, codes);
                    done.push(grid);
                }
            }
            Some(feedback) => {
                done = rows
                    .with_feedback(feedback, &values, &mut codes)
                    .map_err(|block| self.too_large(tensor, block * block_size / k))?;
                squared_error = rows.squared_error(&done, &values, &codes);
            }
        }
        for (i, grid) in done.iter().enumerate() {
            (self.scales[i], self.stored[i]) = (grid.scale, grid.stored);
        }
        match form.bits() {
            Bits::Eight => self.codes.iter_mut().zip(&codes).for_each(|(out, code)| *out = code.cast_unsigned()),
            Bits::Four => pack_nibbles(&codes, self.codes),
        }
        Ok(squared_error)
    }

    fn too_large(&self, tensor: &SourceTensor, row: usize) -> QuantizeError {
        QuantizeError::TooLarge { tensor: tensor.name.clone(), row: self.rows.start + row }
    }
}

/// How the rows of a chunk are coded.
struct RowCoder<'a> {
    form: Form,
    block_size: usize,
    k: usize,
    rounding: &'a Rounding<'a>,
    row_scales: &'a [f32],
}

impl RowCoder<'_> {
    /// Importance of the inputs of block number `at`, counted through all rows.
    fn importance(&self, at: usize) -> Option<&[f32]> {
        let start = at * self.block_size % self.k;
        self.rounding.importance.map(|all| &all[start..start + self.block_size])
    }

    fn fit(&self, at: usize, block: &[f32]) -> Option<Grid> {
        let row_scale = self.row_scales[at * self.block_size / self.k];
        self.form.fit(block, self.importance(at), row_scale, self.rounding.search)
    }

    /// Chooses the nearest code for each value of a block and returns the weighted sum of squared differences.
    fn nearest(&self, at: usize, grid: Grid, block: &[f32], codes: &mut [i8]) -> f64 {
        for (code, value) in codes.iter_mut().zip(block) {
            *code = grid.code(*value) as i8;
        }
        self.block_error(at, grid, block, codes)
    }

    fn block_error(&self, at: usize, grid: Grid, block: &[f32], codes: &[i8]) -> f64 {
        let importance = self.importance(at);
        let square = |(i, (value, code)): (usize, (&f32, &i8))| {
            let weight = importance.map_or(1.0, |all| f64::from(all[i]));
            weight * f64::from(grid.value(f32::from(*code)) - value).powi(2)
        };
        block.iter().zip(codes).enumerate().map(square).sum()
    }

    fn squared_error(&self, grids: &[Grid], values: &[f32], codes: &[i8]) -> f64 {
        let blocks = values.chunks(self.block_size).zip(codes.chunks(self.block_size));
        blocks
            .zip(grids)
            .enumerate()
            .map(|(at, ((block, codes), grid))| self.block_error(at, *grid, block, codes))
            .sum()
    }

    /// Codes the rows column by column: what rounding a column changed in the output is made good by the columns after it.
    ///
    /// # Errors
    /// Number of the block whose scale f16 cannot hold.
    fn with_feedback(&self, feedback: &Feedback, values: &[f32], codes: &mut [i8]) -> Result<Vec<Grid>, usize> {
        let (k, block_size) = (self.k, self.block_size);
        let mut grids = Vec::with_capacity(values.len() / block_size);
        let mut errors = vec![0.0f32; k];
        let mut wanted = vec![0.0f32; block_size];
        for (row, codes) in values.chunks_exact(k).zip(codes.chunks_exact_mut(k)) {
            for start in (0..k).step_by(block_size) {
                for (i, wanted) in wanted.iter_mut().enumerate() {
                    *wanted = row[start + i] + dot(&errors[..start], &feedback.column(start + i)[..start]);
                }
                let at = grids.len();
                let grid = self.fit(at, &wanted).ok_or(at)?;
                for (i, wanted) in wanted.iter().enumerate() {
                    let column = start + i;
                    let value = wanted + dot(&errors[start..column], &feedback.column(column)[start..column]);
                    let code = grid.code(value);
                    codes[column] = code as i8;
                    errors[column] = row[column] - grid.value(code);
                }
                grids.push(grid);
            }
        }
        Ok(grids)
    }
}

/// Sum of products, in sixteen running sums so that it becomes vector code. The order is fixed: the result is the same
/// on every machine.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_chunks, a_rest) = a.as_chunks::<16>();
    let (b_chunks, b_rest) = b.as_chunks::<16>();
    let mut sums = [0.0f32; 16];
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..16 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

const ROWS_PER_ITEM: usize = 16;
