//! Error feedback: which part of the rounding error of the columns before it each column makes good.
//!
//! ```text
//! H = Σ x xᵀ + damping           second moments of the inputs, in calibration
//! H = U D Uᵀ                     U upper triangular with ones on its diagonal, D diagonal
//! for column j, from the first:  ŵ[j] = round(w[j] + Σ_{i<j} (w[i] − ŵ[i]) · U[i][j])
//! ```
//!
//! This is what GPTQ computes, without the inverse of H. Sources: Frantar et al. 2023 (GPTQ), Chee et al. 2023 (LDLQ, and
//! the proof that both are the same).

use super::rows::dot;

/// Second moments of a linear layer's inputs: `Σ x xᵀ` over calibration rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    k: usize,
    /// `[k, k]`, symmetric.
    sums: Vec<f32>,
}

impl Moments {
    /// Sums of no rows, for inputs of `k` elements.
    pub fn new(k: usize) -> Moments {
        Moments { k, sums: vec![0.0; k * k] }
    }

    /// Elements of an input.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The sums, `[k, k]`.
    pub fn sums(&self) -> &[f32] {
        &self.sums
    }

    /// The sums, `[k, k]`, for a kernel to add to. They have to stay symmetric.
    pub fn sums_mut(&mut self) -> &mut [f32] {
        &mut self.sums
    }

    /// Sums of the squares of each element.
    pub fn diagonal(&self) -> Vec<f32> {
        (0..self.k).map(|i| self.sums[i * (self.k + 1)]).collect()
    }

    /// `Σ (row · x)²` over the calibration rows: the energy of an output whose weights are `row`.
    pub fn energy(&self, row: &[f32]) -> f64 {
        let products =
            self.sums.chunks_exact(self.k).zip(row).map(|(sums, w)| f64::from(*w) * f64::from(dot(sums, row)));
        products.sum()
    }
}

/// The strictly upper triangle of U, by columns.
#[derive(Debug, Clone, PartialEq)]
pub struct Feedback {
    k: usize,
    /// Row `j` holds column `j` of U.
    columns: Vec<f32>,
}

impl Feedback {
    /// Factors `moments` with `damping` times their mean square on the diagonal; more if they are still not positive. Inputs
    /// that were always 0 get no feedback. `None` if nothing was ever seen, or not only finite numbers.
    pub fn new(moments: &Moments, damping: f32) -> Option<Feedback> {
        let diagonal = moments.diagonal();
        let mean = diagonal.iter().map(|v| f64::from(*v)).sum::<f64>() / diagonal.len().max(1) as f64;
        if mean <= 0.0 || !mean.is_finite() {
            return None;
        }
        let mut damping = damping.max(MIN_DAMPING);
        while damping <= MAX_DAMPING {
            if let Some(feedback) = factor(moments, (f64::from(damping) * mean) as f32) {
                return Some(feedback);
            }
            damping *= 10.0;
        }
        None
    }

    /// Elements of a row that it is for.
    pub fn k(&self) -> usize {
        self.k
    }

    /// What column `j` takes of the error of each column before it.
    pub(super) fn column(&self, j: usize) -> &[f32] {
        &self.columns[j * self.k..(j + 1) * self.k]
    }
}

/// Cholesky's method from the last row and column to the first gives `H = V Vᵀ` with V upper triangular.
fn factor(moments: &Moments, added: f32) -> Option<Feedback> {
    let k = moments.k;
    let sums = moments.sums();
    // Row `i` of `lower` is row `k - 1 - i` of V, from its end to its beginning: the usual method on mirrored indices.
    let mut lower = vec![0.0f32; k * k];
    for i in 0..k {
        let (above, row) = lower.split_at_mut(i * k);
        let row = &mut row[..k];
        for j in 0..=i {
            let mut value = sums[(k - 1 - i) * k + (k - 1 - j)];
            if i == j {
                value += added;
                let pivot = value - dot(&row[..j], &row[..j]);
                if pivot.is_nan() || pivot <= added * MIN_PIVOT {
                    return None;
                }
                row[j] = pivot.sqrt();
            } else {
                let other = &above[j * k..j * k + k];
                row[j] = (value - dot(&row[..j], &other[..j])) / other[j];
            }
        }
    }
    let mut columns = vec![0.0f32; k * k];
    for j in 0..k {
        let pivot = lower[(k - 1 - j) * (k + 1)];
        for i in 0..j {
            columns[j * k + i] = lower[(k - 1 - i) * k + (k - 1 - j)] / pivot;
        }
    }
    Some(Feedback { k, columns })
}

/// Least and most of the mean square that is added to the diagonal.
const MIN_DAMPING: f32 = 1e-6;
const MAX_DAMPING: f32 = 10.0;
/// A pivot below this part of the damping comes from rounding in f32.
const MIN_PIVOT: f32 = 0.1;
