//! Signal to noise of a tensor, added up over rows as they come.

/// Sums over the rows of a tensor.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Noise {
    signal: f64,
    error: f64,
    /// Of each row's decibels, kept within ±[`MOST_DB`].
    decibels: f64,
    rows: u64,
}

impl Noise {
    /// Adds rows of `width` elements.
    pub(super) fn add(&mut self, reference: &[f32], tested: &[f32], width: usize) {
        for (reference, tested) in reference.chunks_exact(width).zip(tested.chunks_exact(width)) {
            let (mut signal, mut error) = (0.0, 0.0);
            for (want, have) in reference.iter().zip(tested) {
                let (want, have) = (f64::from(*want), f64::from(*have));
                signal += want * want;
                error += (want - have) * (want - have);
            }
            self.signal += signal;
            self.error += error;
            self.decibels += decibels(signal, error).clamp(-MOST_DB, MOST_DB);
            self.rows += 1;
        }
    }

    /// True if no row was added.
    pub(super) fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Of all rows together; infinite if they are exact.
    pub(super) fn decibels(&self) -> f64 {
        decibels(self.signal, self.error)
    }

    /// The mean of the rows' own; infinite if they are exact.
    pub(super) fn row_decibels(&self) -> f64 {
        if self.error == 0.0 { f64::INFINITY } else { self.decibels / self.rows as f64 }
    }
}

fn decibels(signal: f64, error: f64) -> f64 {
    if error == 0.0 { f64::INFINITY } else { 10.0 * (signal / error).log10() }
}

/// No row counts as more than this: f32 carries about 150.
const MOST_DB: f64 = 150.0;

#[cfg(test)]
mod tests {
    use super::*;

    // Guards: decibels are those of the formula, and one row with a large signal hides the others in the sum but not in
    // the mean.
    #[test]
    fn decibels_are_those_of_the_formula() {
        let check = |rows: &[([f32; 2], [f32; 2])], all: f64, mean: f64| {
            let mut noise = Noise::default();
            rows.iter().for_each(|(want, have)| noise.add(want, have, 2));
            assert!((noise.decibels() - all).abs() < 1e-4, "{} {all}", noise.decibels());
            assert!((noise.row_decibels() - mean).abs() < 1e-4, "{} {mean}", noise.row_decibels());
        };
        check(&[([3.0, 4.0], [3.0, 4.5])], 20.0, 20.0);
        check(&[([1000.0, 0.0], [1000.0, 0.0]), ([1.0, 0.0], [0.0, 0.0])], 60.000_004, 75.0);
        let mut exact = Noise::default();
        exact.add(&[1.0, 2.0], &[1.0, 2.0], 2);
        assert_eq!((exact.decibels(), exact.row_decibels()), (f64::INFINITY, f64::INFINITY));
    }
}
