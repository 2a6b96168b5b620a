//! What is remembered of a tensor during calibration: a histogram, whatever the length of the text.

/// Range and histogram of the values of one tensor.
///
/// A bin is a sign, an exponent and the first six bits of a mantissa: the same relative resolution from the smallest to the
/// largest value, with no range to be chosen beforehand and nothing to be rescaled. 256 KiB, always.
#[derive(Debug, Clone)]
pub struct Observer {
    min: f32,
    max: f32,
    count: u64,
    not_finite: u64,
    bins: Vec<u64>,
}

/// Values that are nearly the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cell {
    /// Their middle.
    pub middle: f64,
    /// From the smallest to the largest that it can hold.
    pub width: f64,
    /// How many there were.
    pub count: u64,
}

impl Default for Observer {
    fn default() -> Observer {
        Observer { min: 0.0, max: 0.0, count: 0, not_finite: 0, bins: vec![0; 1 << (32 - SHIFT)] }
    }
}

impl Observer {
    /// Takes note of `values`.
    pub fn see(&mut self, values: &[f32]) {
        for value in values {
            if !value.is_finite() {
                self.not_finite += 1;
                continue;
            }
            self.min = self.min.min(*value);
            self.max = self.max.max(*value);
            self.bins[(value.to_bits() >> SHIFT) as usize] += 1;
        }
        self.count += values.len() as u64;
    }

    /// Takes note of everything that `other` saw.
    pub fn merge(&mut self, other: &Observer) {
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        self.count += other.count;
        self.not_finite += other.not_finite;
        self.bins.iter_mut().zip(&other.bins).for_each(|(own, other)| *own += other);
    }

    /// Smallest and largest value, zero included.
    pub fn range(&self) -> (f32, f32) {
        (self.min, self.max)
    }

    /// Number of values seen.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Number of NaNs and infinities among them.
    pub fn not_finite(&self) -> u64 {
        self.not_finite
    }

    /// The bins that are not empty, by their values.
    pub fn cells(&self) -> Vec<Cell> {
        let half = self.bins.len() / 2;
        // Negative floats have their sign bit set and grow with their bits.
        let ascending = (half..self.bins.len()).rev().chain(0..half);
        let cell = |bin: usize| {
            let count = self.bins[bin];
            // The outermost bins end where what was seen ends.
            let edge = |bits: u32| f64::from(f32::from_bits(bits).clamp(self.min, self.max));
            let bits = (bin as u32) << SHIFT;
            let (a, b) = (edge(bits), edge(bits | ((1 << SHIFT) - 1)));
            (count > 0).then(|| Cell { middle: (a + b) / 2.0, width: (a - b).abs(), count })
        };
        ascending.filter_map(cell).collect()
    }
}

/// Bits of a float that a bin does not tell apart: 23 of the mantissa less six.
const SHIFT: u32 = 17;

#[cfg(test)]
mod tests {
    use super::*;

    // Guards: cells are in order, hold every finite value within their width, and count what is not finite; two observers
    // merged are one that saw everything.
    #[test]
    fn cells_hold_what_was_seen() {
        let mut observer = Observer::default();
        let values = [-3.0, 1e-6, 0.0, 2.5, -0.125, 1000.0, 2.5, f32::NAN, f32::INFINITY];
        observer.see(&values[..4]);
        let mut rest = Observer::default();
        rest.see(&values[4..]);
        observer.merge(&rest);
        assert_eq!((observer.range(), observer.count(), observer.not_finite()), ((-3.0, 1000.0), 9, 2));
        let cells = observer.cells();
        assert!(cells.windows(2).all(|pair| pair[0].middle < pair[1].middle));
        assert_eq!(cells.iter().map(|cell| cell.count).sum::<u64>(), 7);
        for value in &values[..7] {
            let value = f64::from(*value);
            let near = |cell: &Cell| (cell.middle - value).abs() <= cell.width / 2.0 + 1e-12;
            assert!(cells.iter().any(|cell| near(cell) && cell.width <= value.abs() / 60.0 + 1e-12), "{value}");
        }
    }
}
