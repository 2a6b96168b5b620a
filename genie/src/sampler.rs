//! Logits to token id.
//!
//! The stages, in the order that transformers has them: penalties, temperature, top-k, top-p, min-p, draw. Greedy
//! (asked for, or temperature 0, or top-k 1) takes the largest logit after the penalties; of equal ones, the smallest
//! id. The same seed gives the same tokens for the same logits on every machine: the generator and the exponential
//! are written out here and use exactly rounded operations only.

use thiserror::Error;

use crate::config::{ConfigError, SamplerConfig, TokenPenalty};

mod random;

pub(crate) use random::Random;

/// Why no token can be chosen.
#[derive(Debug, Error, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum SamplerError {
    /// A logit is NaN or plus infinity.
    #[error("logit {index} is {value}, need a number or minus infinity")]
    NonFinite {
        /// Index in the vocabulary.
        index: usize,
        /// The value found.
        value: f32,
    },
    /// Every token is ruled out.
    #[error("all {len} logits are minus infinity, need at least one number")]
    AllRuledOut {
        /// Number of logits.
        len: usize,
    },
}

/// Chooses tokens. Allocates at its first call only.
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplerConfig,
    random: Random,
    penalized: Vec<f32>,
    window: Vec<u32>,
    /// Of the whole vocabulary, where no top-k cuts it.
    weights: Vec<f64>,
    candidates: Vec<Candidate>,
}

/// A token that may still be drawn. `weight` is its scaled logit at first and becomes its probability.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    weight: f64,
    id: u32,
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for a value that no config may have.
    pub fn new(config: SamplerConfig) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self {
            random: Random::new(config.seed),
            config,
            penalized: Vec::new(),
            window: Vec::new(),
            weights: Vec::new(),
            candidates: Vec::new(),
        })
    }

    /// What the sampler does.
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }

    /// Takes another config. The random numbers go on unless the seed changed. (`GenieSampler_applyConfig`)
    ///
    /// # Errors
    /// As [`Sampler::new`]; nothing has changed then.
    pub fn apply(&mut self, config: SamplerConfig) -> Result<(), ConfigError> {
        config.check()?;
        if config.seed != self.config.seed {
            self.random = Random::new(config.seed);
        }
        self.config = config;
        Ok(())
    }

    /// Starts the random numbers again; without a fixed seed, with fresh ones.
    pub fn reset(&mut self) {
        self.random = Random::new(self.config.seed);
    }

    /// Chooses the token that follows `history`.
    ///
    /// # Errors
    /// [`SamplerError`]; nothing has changed then.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, SamplerError> {
        let mut best = find_largest(logits)?;
        let window = &history[history.len().saturating_sub(self.config.penalty.last_n)..];
        let logits = if is_off(&self.config.penalty) || window.is_empty() {
            logits
        } else {
            self.penalized.clear();
            self.penalized.extend_from_slice(logits);
            self.window.clear();
            self.window.extend_from_slice(window);
            penalize(&self.config.penalty, &mut self.window, &mut self.penalized);
            best = find_largest(&self.penalized)?;
            &self.penalized
        };
        let Some((max, id)) = best else { return Err(SamplerError::AllRuledOut { len: logits.len() }) };
        if self.config.greedy || self.config.temp == 0.0 || self.config.top_k == 1 {
            return Ok(id);
        }
        let (temp, max) = (f64::from(self.config.temp), f64::from(max));
        let (top_p, min_p) = (f64::from(self.config.top_p), f64::from(self.config.min_p));
        let candidates = &mut self.candidates;
        let total = if 0 < self.config.top_k && self.config.top_k < logits.len() {
            take_top_k(self.config.top_k, logits, candidates);
            candidates.iter_mut().for_each(|candidate| candidate.weight = exp((candidate.weight - max) / temp));
            candidates.iter().map(|candidate| candidate.weight).sum()
        } else {
            self.weights.clear();
            self.weights.extend(logits.iter().map(|&logit| exp((f64::from(logit) - max) / temp)));
            let total = sum(&self.weights);
            // Those below this weigh less than `1 - top_p` of all together: top-p stops before it comes to one of them.
            let least = min_p.max((1.0 - top_p) * total / logits.len() as f64);
            take_from(least, &self.weights, candidates);
            total
        };
        if top_p < 1.0 {
            take_top_p(top_p * total, candidates);
        }
        // The likeliest token is always here and weighs 1.
        candidates.retain(|candidate| min_p <= candidate.weight);
        Ok(draw(candidates, self.random.unit()))
    }

    /// The state of the random numbers, to go back to with [`Sampler::restore`].
    pub(crate) fn random(&self) -> Random {
        self.random
    }

    pub(crate) fn restore(&mut self, random: Random) {
        self.random = random;
    }
}

/// The largest logit and the first token that has it; `None` if all are minus infinity.
///
/// Goes through the logits once, a chunk at a time: half of them come from other cores.
fn find_largest(logits: &[f32]) -> Result<Option<(f32, u32)>, SamplerError> {
    let is_good = |value: f32| value < f32::INFINITY;
    let (mut max, mut chunk_of_max) = (f32::NEG_INFINITY, 0);
    for (number, chunk) in logits.chunks(SCANNED).enumerate() {
        if !chunk.iter().fold(true, |good, &value| good & is_good(value)) {
            let at = chunk.iter().position(|&value| !is_good(value)).expect("one was just seen");
            return Err(SamplerError::NonFinite { index: number * SCANNED + at, value: chunk[at] });
        }
        let largest = largest(chunk);
        if max < largest {
            (max, chunk_of_max) = (largest, number * SCANNED);
        }
    }
    let first = logits[chunk_of_max..].iter().position(|&value| value == max && max != f32::NEG_INFINITY);
    Ok(first.map(|at| (max, (chunk_of_max + at) as u32)))
}

/// The largest of some logits. In lanes, because the compiler may not reorder a single maximum of floats into them by itself.
fn largest(logits: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if a < b { b } else { a };
    let (chunks, rest) = logits.as_chunks::<16>();
    let lanes =
        chunks.iter().fold([f32::NEG_INFINITY; 16], |lanes, chunk| std::array::from_fn(|i| larger(lanes[i], chunk[i])));
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &value| larger(max, value))
}

fn is_off(penalty: &TokenPenalty) -> bool {
    is_neutral(penalty.repetition) && penalty.presence == 0.0 && penalty.frequency == 0.0
}

fn is_neutral(repetition: f32) -> bool {
    repetition == 0.0 || repetition == 1.0
}

/// Lowers the logits of the tokens in `window`. Sorts `window`.
fn penalize(penalty: &TokenPenalty, window: &mut [u32], logits: &mut [f32]) {
    window.sort_unstable();
    for same in window.chunk_by(|a, b| a == b) {
        let Some(logit) = logits.get_mut(same[0] as usize).filter(|logit| logit.is_finite()) else { continue };
        let mut value = *logit;
        if !is_neutral(penalty.repetition) {
            value = if 0.0 < value { value / penalty.repetition } else { value * penalty.repetition };
        }
        value -= penalty.presence + penalty.frequency * same.len() as f32;
        *logit = value.clamp(f32::MIN, f32::MAX);
    }
}

/// The sum of `values`. In lanes, as in [`largest`].
fn sum(values: &[f64]) -> f64 {
    let (chunks, rest) = values.as_chunks::<8>();
    let lanes = chunks.iter().fold([0.0; 8], |lanes, chunk| std::array::from_fn(|i| lanes[i] + chunk[i]));
    lanes.iter().chain(rest).sum()
}

/// The `top_k` largest logits, best first.
///
/// The list never holds more than twice `top_k`: when it is full, the worse half goes, and what is no better than the
/// rest does not get in again. That reads the logits once and sorts next to nothing. Most chunks of logits have none that
/// gets in, which their largest says in a few instructions.
fn take_top_k(top_k: usize, logits: &[f32], candidates: &mut Vec<Candidate>) {
    candidates.clear();
    let mut floor = f32::NEG_INFINITY;
    for (number, chunk) in logits.chunks(CHUNK).enumerate() {
        if largest(chunk) <= floor {
            continue;
        }
        for (id, &logit) in (number * CHUNK..).zip(chunk) {
            if floor < logit {
                candidates.push(Candidate { weight: f64::from(logit), id: id as u32 });
                if candidates.len() == 2 * top_k {
                    candidates.select_nth_unstable_by(top_k - 1, Candidate::order);
                    candidates.truncate(top_k);
                    floor = candidates[top_k - 1].weight as f32;
                }
            }
        }
    }
    candidates.sort_unstable_by(Candidate::order);
    candidates.truncate(top_k);
}

/// The tokens that weigh `least` or more, and anything at all, in order of ids.
fn take_from(least: f64, weights: &[f64], candidates: &mut Vec<Candidate>) {
    candidates.clear();
    // All at once: how many are kept differs from call to call.
    candidates.reserve(weights.len());
    let kept = (0..).zip(weights).filter(|(_, weight)| 0.0 < **weight && least <= **weight);
    candidates.extend(kept.map(|(id, &weight)| Candidate { weight, id }));
}

/// The fewest candidates, best first, whose weights sum to `target`. At least one; all if they weigh less.
///
/// Only as many are sorted as are needed, in growing portions.
fn take_top_p(target: f64, candidates: &mut Vec<Candidate>) {
    let (mut sorted, mut sum) = (0, 0.0);
    while sorted < candidates.len() {
        let end = candidates.len().min((8 * sorted).max(FIRST_PORTION));
        if end < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(end - sorted - 1, Candidate::order);
        }
        candidates[sorted..end].sort_unstable_by(Candidate::order);
        for i in sorted..end {
            sum += candidates[i].weight;
            if target <= sum {
                return candidates.truncate(i + 1);
            }
        }
        sorted = end;
    }
}

/// The candidate at `unit`, in 0..1, of the summed weights.
fn draw(candidates: &[Candidate], unit: f64) -> u32 {
    let mut left = unit * candidates.iter().map(|candidate| candidate.weight).sum::<f64>();
    for candidate in candidates {
        left -= candidate.weight;
        if left < 0.0 {
            return candidate.id;
        }
    }
    candidates.last().expect("the likeliest token is never cut").id
}

impl Candidate {
    /// Better first; of equal ones the smaller id.
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        other.weight.total_cmp(&self.weight).then(self.id.cmp(&other.id))
    }
}

/// `e` to the power of `x`, which is at most 0. Below -700 it is 0.
///
/// The result has a relative error below 1e-15, and the same bits everywhere: `x = n ln 2 + r`, a Taylor sum for `r`,
/// and `n` added to the exponent. Without a branch or a conversion, so that the compiler computes several at once.
fn exp(x: f64) -> f64 {
    // Adding this rounds to a whole number, which is then in the lowest bits.
    const ROUND: f64 = 1.5 * (1_u64 << 52) as f64;
    let shifted = x * std::f64::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let sum = TAYLOR.iter().fold(0.0, |sum, term| sum * r + term);
    let scaled = f64::from_bits(sum.to_bits().wrapping_add(shifted.to_bits() << 52));
    if x < -700.0 { 0.0 } else { scaled }
}

/// `1 / i!` for `i` from 13 down to 0.
const TAYLOR: [f64; 14] = {
    let mut terms = [1.0; 14];
    let (mut i, mut factorial) = (1, 1.0);
    while i < 14 {
        factorial *= i as f64;
        terms[13 - i] = 1.0 / factorial;
        i += 1;
    }
    terms
};

/// ln 2 cut to 32 bits, so that `n * LN_2_HIGH` is exact, and the rest of it.
const LN_2_HIGH: f64 = 0.693_147_180_369_123_8;
const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;

/// Logits that [`find_largest`] looks at together: what the first cache has room for, and few enough to look for one of them.
const SCANNED: usize = 512;

/// Logits that top-k looks at together.
const CHUNK: usize = 64;

/// How many candidates top-p sorts first: enough in most cases.
const FIRST_PORTION: usize = 64;

#[cfg(test)]
mod tests;
