//! From what was seen of a tensor to its encoding: which range the codes cover.

use super::observe::{Cell, Observer};
use crate::{encoding::Encoding, types::DataType};

/// How the range of a tensor's codes is found (`--act_quantizer_calibration`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Calibration {
    /// From the smallest value to the largest.
    MinMax,
    /// What is left when at each end this share of the values, in percent, is cut off.
    Percentile {
        /// 50 to 100; what is kept of each end.
        keep: f64,
    },
    /// The range with the smallest mean squared error.
    Mse,
    /// The same, where what is cut off weighs three times: rounding errors average out in a sum, a cut-off value does not.
    Sqnr,
    /// The range whose codes tell most about the distribution: smallest Kullback-Leibler divergence.
    Entropy,
}

/// Where the codes of a tensor lie (`--act_quantizer_schema`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schema {
    /// From the smallest to the largest value: unsigned codes with an offset.
    Asymmetric,
    /// As far below zero as above: signed codes, offset 0.
    Symmetric,
    /// Unsigned codes with offset 0 for a tensor without negative values, symmetric ones otherwise.
    UnsignedSymmetric,
}

/// An encoding of `bits` (8 or 16) for what `observer` saw, and its element type. A tensor that was always zero gets the
/// range of -1 to 1.
pub fn encoding(observer: &Observer, bits: u8, calibration: Calibration, schema: Schema) -> (DataType, Encoding) {
    let (min, max) = observer.range();
    if min == 0.0 && max == 0.0 {
        return fit((-1.0, 1.0), bits, schema);
    }
    let full = (f64::from(min), f64::from(max));
    if calibration == Calibration::MinMax {
        return fit(full, bits, schema);
    }
    let cells = observer.cells();
    let range = match calibration {
        Calibration::Percentile { keep } => percentile(&cells, keep, full),
        Calibration::Mse => search(full, schema, |range| error(&cells, fit(range, bits, schema), 1.0)),
        Calibration::Sqnr => search(full, schema, |range| error(&cells, fit(range, bits, schema), 3.0)),
        Calibration::Entropy => search(full, schema, |range| divergence(&cells, fit(range, bits, schema))),
        Calibration::MinMax => full,
    };
    fit(range, bits, schema)
}

/// Signal to noise of the encoding for what was seen, in decibels. The signal is that of all but the largest thousandth of
/// the values: a few massive ones, as language models have them, would hide that the others are lost.
pub fn sqnr_db(observer: &Observer, encoding: &(DataType, Encoding)) -> f64 {
    let cells = observer.cells();
    let noise = error(&cells, encoding.clone(), 1.0);
    let values = cells.iter().map(|cell| (cell.middle, cell.count as f64)).collect();
    10.0 * (signal(values).max(f64::MIN_POSITIVE) / noise.max(f64::MIN_POSITIVE)).log10()
}

/// Energy of all but the largest thousandth of `values`, each with how often it was there: what noise is compared with.
pub(in crate::offline) fn signal(mut values: Vec<(f64, f64)>) -> f64 {
    values.sort_by(|a, b| a.0.abs().total_cmp(&b.0.abs()));
    let most = values.iter().map(|(_, count)| count).sum::<f64>() * 0.999;
    let (mut seen, mut signal) = (0.0, 0.0);
    for (value, count) in values {
        let count = count.min(most - seen);
        signal += count * value * value;
        seen += count;
        if seen >= most {
            break;
        }
    }
    signal
}

/// The encoding that covers `range`, which contains zero.
fn fit((min, max): (f64, f64), bits: u8, schema: Schema) -> (DataType, Encoding) {
    let (min, max) = (min.min(0.0), max.max(0.0));
    let signed = match schema {
        Schema::Asymmetric => false,
        Schema::Symmetric => true,
        Schema::UnsignedSymmetric => min < 0.0,
    };
    let steps = f64::from((1u32 << bits) - 1);
    let (scale, least) = if signed { (max.max(-min) / ((steps - 1.0) / 2.0), 0.0) } else { ((max - min) / steps, min) };
    let scale = (scale as f32).max(f32::MIN_POSITIVE);
    // `+ 0.0` makes a minus zero plain.
    let offset = (least / f64::from(scale)).round_ties_even().clamp(-steps, 0.0) + 0.0;
    let data_type = match (signed, bits) {
        (true, 8) => DataType::SFixedPoint8,
        (true, _) => DataType::SFixedPoint16,
        (false, 8) => DataType::UFixedPoint8,
        (false, _) => DataType::UFixedPoint16,
    };
    (data_type, Encoding::ScaleOffset { bitwidth: bits, scale, offset: offset as i32 })
}

/// What is left of `full` when at each end all but `keep` percent of the values are cut off.
fn percentile(cells: &[Cell], keep: f64, full: (f64, f64)) -> (f64, f64) {
    let total: u64 = cells.iter().map(|cell| cell.count).sum();
    let cut = (total as f64 * (1.0 - keep / 100.0)).max(0.0);
    let end = |cells: &mut dyn Iterator<Item = &Cell>| {
        let mut left_out = 0.0;
        for cell in cells {
            left_out += cell.count as f64;
            if left_out > cut {
                return cell.middle;
            }
        }
        0.0
    };
    let (low, high) = (end(&mut cells.iter()), end(&mut cells.iter().rev()));
    // The middle of the last bin may lie inside or outside of what was seen.
    (low.max(full.0).min(0.0), high.min(full.1).max(0.0))
}

/// The range with the lowest cost: each end is tried at ever smaller shares of what was seen, symmetric ranges at one share
/// for both.
fn search(full: (f64, f64), schema: Schema, cost: impl Fn((f64, f64)) -> f64) -> (f64, f64) {
    let shares = || (0..SHARES).map(|i| SHRINK.powi(i));
    let mut best = (full, cost(full));
    let mut attempt = |range| {
        let cost = cost(range);
        if cost < best.1 {
            best = (range, cost);
        }
    };
    match schema {
        Schema::Asymmetric => {
            for low in shares() {
                shares().for_each(|high| attempt((full.0 * low, full.1 * high)));
            }
        }
        Schema::Symmetric | Schema::UnsignedSymmetric => shares().for_each(|s| attempt((full.0 * s, full.1 * s))),
    }
    best.0
}

/// Sum of the squared errors of what is in `cells`; errors of values beyond the ends count `beyond` times.
fn error(cells: &[Cell], (data_type, encoding): (DataType, Encoding), beyond: f64) -> f64 {
    let (scale, low, high) = ends(data_type, &encoding);
    let one = |cell: &Cell| {
        let steps = cell.middle / scale;
        let squared = if steps < low - 0.5 || steps > high + 0.5 {
            beyond * ((steps - steps.clamp(low, high)) * scale).powi(2)
        } else if cell.width > scale {
            scale * scale / 12.0
        } else {
            // Values lie anywhere in their bin: some of its points stand for them.
            let at = |share: f64| (cell.middle + share * cell.width) / scale;
            let off = |steps: f64| (steps - steps.round_ties_even().clamp(low, high)) * scale;
            [-0.375, -0.125, 0.125, 0.375].map(|share| off(at(share)).powi(2)).iter().sum::<f64>() / 4.0
        };
        squared * cell.count as f64
    };
    cells.iter().map(one).sum()
}

/// Divergence of the distribution from what its codes say of it. What is cut off counts to the ends; the values of one code
/// are taken to be spread evenly over the bins that it covers.
fn divergence(cells: &[Cell], (data_type, encoding): (DataType, Encoding)) -> f64 {
    let (scale, low, high) = ends(data_type, &encoding);
    let total: f64 = cells.iter().map(|cell| cell.count as f64).sum();
    let inside: f64 = cells
        .iter()
        .filter(|cell| (low - 0.5..=high + 0.5).contains(&(cell.middle / scale)))
        .map(|cell| cell.count as f64)
        .sum();
    if inside == 0.0 {
        return f64::INFINITY;
    }
    let code = |cell: &Cell| (cell.middle / scale).round_ties_even().clamp(low, high);
    let mut sum = 0.0;
    for group in cells.chunk_by(|a, b| code(a) == code(b)) {
        let is_inside = |cell: &&Cell| (low - 0.5..=high + 0.5).contains(&(cell.middle / scale));
        // What a code says: only what is inside is quantized; what is there: the cut-off values at the end's bin.
        let known: f64 = group.iter().filter(is_inside).map(|cell| cell.count as f64).sum::<f64>() / inside;
        let width: f64 = group.iter().map(|cell| cell.width.max(f64::MIN_POSITIVE)).sum();
        for cell in group {
            let p = cell.count as f64 / total;
            let q = (known * cell.width.max(f64::MIN_POSITIVE) / width).max(LEAST_SHARE);
            sum += p * (p / q).ln();
        }
    }
    sum
}

/// Step, and first and last multiple of it.
fn ends(data_type: DataType, encoding: &Encoding) -> (f64, f64, f64) {
    let Encoding::ScaleOffset { bitwidth, scale, offset } = *encoding else { return (1.0, 0.0, 0.0) };
    let signed = matches!(data_type, DataType::SFixedPoint8 | DataType::SFixedPoint16);
    let least = if signed { -(1i32 << (bitwidth - 1)) } else { 0 };
    let most = least + ((1 << bitwidth) - 1);
    (f64::from(scale), f64::from(least + offset), f64::from(most + offset))
}

/// Shares of an end that are tried: down to 1.6 % of what was seen.
const SHARES: i32 = 40;
const SHRINK: f64 = 0.9;
/// Stands for a probability of zero, so that a divergence stays finite.
const LEAST_SHARE: f64 = 1e-12;

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(values: impl Iterator<Item = f32>) -> Observer {
        let mut observer = Observer::default();
        observer.see(&values.collect::<Vec<f32>>());
        observer
    }

    fn ends_of(observer: &Observer, bits: u8, calibration: Calibration, schema: Schema) -> (f64, f64) {
        let (data_type, encoding) = encoding(observer, bits, calibration, schema);
        assert!(encoding.grid(data_type).is_ok(), "{encoding:?}");
        let (scale, low, high) = ends(data_type, &encoding);
        (low * scale, high * scale)
    }

    // Guards: every method and schema covers what it promises: all values, the share asked for, or a range that an outlier
    // does not stretch; and its error is no larger than that of min-max, which it could have chosen.
    #[test]
    fn ranges_cover_what_they_promise() {
        // A triangle from -2 to 4 and one value of 40 in a million.
        let wave = |i: u32| (f64::from(i % 1000) / 1000.0 + f64::from(i * 7 % 997) / 997.0) as f32 * 3.0 - 2.0;
        let observer = seen((0..1_000_000).map(wave).chain([40.0]));
        for (schema, low) in
            [(Schema::Asymmetric, -2.0), (Schema::Symmetric, -40.0), (Schema::UnsignedSymmetric, -40.0)]
        {
            let (min, max) = ends_of(&observer, 16, Calibration::MinMax, schema);
            assert!((min / low - 1.0).abs() < 0.01 && (max - 40.0).abs() < 0.1, "{schema:?} {min} {max}");
        }
        let (min, max) = ends_of(&observer, 8, Calibration::Percentile { keep: 99.9 }, Schema::Asymmetric);
        assert!((-2.1..-1.7).contains(&min) && (3.7..4.2).contains(&max), "{min} {max}");
        for calibration in [Calibration::Mse, Calibration::Entropy] {
            let (min, max) = ends_of(&observer, 8, calibration, Schema::Asymmetric);
            assert!((-2.2..-1.2).contains(&min) && max < 25.0, "{calibration:?} {min} {max}");
        }
        let cells = observer.cells();
        for schema in [Schema::Asymmetric, Schema::Symmetric] {
            let cost = |calibration| error(&cells, encoding(&observer, 8, calibration, schema), 1.0);
            assert!(cost(Calibration::Mse) <= cost(Calibration::MinMax));
            assert!(cost(Calibration::Mse) <= cost(Calibration::Sqnr));
        }
        let positive = seen((0..1000).map(|i| i as f32));
        let (min, max) = ends_of(&positive, 8, Calibration::MinMax, Schema::UnsignedSymmetric);
        assert!(min == 0.0 && (max - 999.0).abs() < 0.01, "{min} {max}");
        let nothing = seen((0..10).map(|_| 0.0));
        assert!((ends_of(&nothing, 8, Calibration::Mse, Schema::Symmetric).1 - 1.0).abs() < 1e-6);
    }

    // Guards: the reported signal to noise is that of a full-scale uniform distribution, some 6 dB for each bit.
    #[test]
    fn signal_to_noise_grows_with_the_bits() {
        let observer = seen((0..200_000).map(|i| (i % 20_011) as f32 / 10_005.5 - 1.0));
        for (bits, want) in [(8u8, 48.2), (16, 96.3)] {
            let found = sqnr_db(&observer, &encoding(&observer, bits, Calibration::MinMax, Schema::Asymmetric));
            assert!((found - want).abs() < 1.5, "{bits} bits: {found} dB");
        }
    }
}
