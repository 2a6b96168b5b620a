//! Rotary frequencies, with every static scaling worked in at import.

use serde_json::Value;

use super::config_error;
use crate::offline::error::ImportError;

/// One rotary embedding: element `i` of a head turns by `position · inv_freq[i]` with element `i + inv_freq.len()`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Angle per position of each pair. Twice as many elements of a head are rotated; the rest pass through.
    pub inv_freq: Vec<f32>,
    /// Factor on sine and cosine: YaRN's attention factor, 1 otherwise.
    pub scale: f32,
    /// What contexts beyond the original length use instead, with LongRoPE.
    pub long: Option<LongRope>,
    /// Positions that YaRN stretches the original length to.
    pub reach: Option<usize>,
}

/// Frequencies for long contexts.
#[derive(Debug, Clone, PartialEq)]
pub struct LongRope {
    /// As [`Rope::inv_freq`].
    pub inv_freq: Vec<f32>,
    /// Contexts of more positions than this one are long.
    pub above: usize,
}

/// What a scaling works on.
#[derive(Debug, Clone, Copy)]
pub struct RopeBase {
    /// Base of the frequencies.
    pub theta: f64,
    /// Elements of a head that are rotated; even.
    pub rotary_dim: usize,
    /// `max_position_embeddings`.
    pub max_positions: usize,
    /// `original_max_position_embeddings` of the configuration itself (not of its scaling).
    pub original_max_positions: Option<usize>,
}

impl RopeBase {
    /// Plain rotary embedding: `theta^(-2i / rotary_dim)`.
    pub fn plain(&self) -> Rope {
        self.with_factors(|_| 1.0)
    }

    /// The embedding that `scaling` describes, an object like `rope_scaling` in `config.json`; `key` names it in errors.
    ///
    /// # Errors
    /// [`ImportError`] naming the type that is not supported, or the key that is missing or wrong.
    ///
    /// Sources: Chen et al. 2023 (linear), Peng et al. 2023 (YaRN), Ding et al. 2024 (LongRoPE), Llama 3.1's model card;
    /// the keys and their defaults are those of transformers.
    pub fn scaled(&self, key: &str, scaling: &Value) -> Result<Rope, ImportError> {
        let scaling = Scaling { key, value: scaling };
        match scaling.rope_type()? {
            "default" => Ok(self.plain()),
            "linear" => {
                let factor = scaling.positive("factor")?;
                Ok(self.with_factors(|_| factor))
            }
            "llama3" => self.llama3(&scaling),
            "yarn" => self.yarn(&scaling),
            "longrope" | "su" => self.longrope(&scaling),
            other => Err(ImportError::Unsupported {
                what: format!("{key} of type {other:?}"),
                supported: SUPPORTED_SCALINGS.to_owned(),
            }),
        }
    }

    /// Plain frequencies, each divided by the factor that `factor` gives for it.
    pub fn with_factors(&self, factor: impl Fn(usize) -> f64) -> Rope {
        let inv_freq = (0..self.rotary_dim / 2).map(|i| (self.frequency(i) / factor(i)) as f32).collect();
        Rope { inv_freq, scale: 1.0, long: None, reach: None }
    }

    fn frequency(&self, i: usize) -> f64 {
        self.theta.powf(-((2 * i) as f64) / self.rotary_dim as f64)
    }

    /// Long wavelengths are divided by the factor, short ones kept, those between blended.
    fn llama3(&self, scaling: &Scaling<'_>) -> Result<Rope, ImportError> {
        let factor = scaling.positive("factor")?;
        let (low, high) = (scaling.positive("low_freq_factor")?, scaling.positive("high_freq_factor")?);
        let original = scaling.positive("original_max_position_embeddings")?;
        if low >= high {
            let want = format!("a number above low_freq_factor ({low})");
            return Err(config_error(&format!("{}/high_freq_factor", scaling.key), high, want));
        }
        Ok(self.with_factors(|i| {
            let wavelength = 2.0 * std::f64::consts::PI / self.frequency(i);
            if wavelength < original / high {
                1.0
            } else if wavelength > original / low {
                factor
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        }))
    }

    /// Pairs that turn often keep their frequency, pairs that hardly turn are divided by the factor, with a ramp between.
    fn yarn(&self, scaling: &Scaling<'_>) -> Result<Rope, ImportError> {
        let factor = scaling.positive("factor")?;
        let original = match scaling.number("original_max_position_embeddings")? {
            Some(_) => scaling.positive("original_max_position_embeddings")?,
            None => self.max_positions as f64,
        };
        let (fast, slow) = (scaling.positive_or("beta_fast", 32.0)?, scaling.positive_or("beta_slow", 1.0)?);
        let dim = self.rotary_dim as f64;
        // The pair that turns `rotations` times over the original context.
        let pair =
            |rotations: f64| dim * (original / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * self.theta.ln());
        let (mut low, mut high) = (pair(fast), pair(slow));
        if scaling.flag("truncate")?.unwrap_or(true) {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        let mscale = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
        let scale =
            match (scaling.number("attention_factor")?, scaling.number("mscale")?, scaling.number("mscale_all_dim")?) {
                (Some(_), ..) => scaling.positive("attention_factor")?,
                (None, Some(all), Some(dims)) if all != 0.0 && dims != 0.0 => mscale(all) / mscale(dims),
                _ => mscale(1.0),
            };
        let rope = self.with_factors(|i| {
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            1.0 / (ramp / factor + 1.0 - ramp)
        });
        Ok(Rope { scale: scale as f32, reach: Some((original * factor) as usize), ..rope })
    }

    /// One list of factors for contexts up to the original length, another for longer ones.
    fn longrope(&self, scaling: &Scaling<'_>) -> Result<Rope, ImportError> {
        let pairs = self.rotary_dim / 2;
        let (short, long) = (scaling.factors("short_factor", pairs)?, scaling.factors("long_factor", pairs)?);
        let inside = scaling.number("original_max_position_embeddings")?.map(|original| original as usize);
        let stated = self.original_max_positions.or(inside);
        let original = stated.unwrap_or(self.max_positions);
        let factor = match stated {
            Some(_) => self.max_positions as f64 / original as f64,
            None => scaling.positive_or("factor", 1.0)?,
        };
        let scale = match scaling.number("attention_factor")? {
            Some(_) => scaling.positive("attention_factor")?,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
        };
        Ok(self.with_both(&short, &long, original, scale as f32))
    }

    /// Plain frequencies divided by `short`, and for contexts of more than `original` positions by `long`.
    pub fn with_both(&self, short: &[f64], long: &[f64], original: usize, scale: f32) -> Rope {
        let long = (original < self.max_positions)
            .then(|| LongRope { inv_freq: self.with_factors(|i| long[i]).inv_freq, above: original });
        Rope { scale, long, ..self.with_factors(|i| short[i]) }
    }
}

/// An object like `rope_scaling`, and its key in messages.
struct Scaling<'a> {
    key: &'a str,
    value: &'a Value,
}

impl<'a> Scaling<'a> {
    /// `rope_type`, or `type` as it was called before.
    fn rope_type(&self) -> Result<&'a str, ImportError> {
        let named = ["rope_type", "type"].iter().find_map(|key| self.value.get(key));
        match named.map(Value::as_str) {
            Some(Some(name)) => Ok(name),
            None if self.value.get("factor").is_none() => Ok("default"),
            _ => Err(config_error(&format!("{}/rope_type", self.key), self.value, SUPPORTED_SCALINGS.to_owned())),
        }
    }

    /// The list called `key`: a factor above 0 for each of `pairs`.
    fn factors(&self, key: &str, pairs: usize) -> Result<Vec<f64>, ImportError> {
        let list = self.value.get(key).and_then(Value::as_array);
        let factors: Vec<f64> = list.into_iter().flatten().filter_map(Value::as_f64).filter(|f| *f > 0.0).collect();
        if factors.len() != pairs {
            let have = format!("{} numbers above 0", factors.len());
            let want = format!("{pairs}, one for each rotated pair");
            return Err(config_error(&format!("{}/{key}", self.key), have, want));
        }
        Ok(factors)
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ImportError> {
        match self.value.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number)),
                None => Err(config_error(&format!("{}/{key}", self.key), value, "a number".to_owned())),
            },
        }
    }

    fn positive(&self, key: &str) -> Result<f64, ImportError> {
        match self.number(key)? {
            Some(number) if number > 0.0 => Ok(number),
            other => {
                let have = other.map_or_else(|| "missing".to_owned(), |number| number.to_string());
                Err(config_error(&format!("{}/{key}", self.key), have, "a number above 0".to_owned()))
            }
        }
    }

    fn positive_or(&self, key: &str, default: f64) -> Result<f64, ImportError> {
        match self.number(key)? {
            None => Ok(default),
            Some(_) => self.positive(key),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ImportError> {
        match self.value.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(config_error(&format!("{}/{key}", self.key), other, "true or false".to_owned())),
        }
    }
}

/// What a refused scaling is told.
const SUPPORTED_SCALINGS: &str = "\"default\", \"linear\", \"llama3\", \"yarn\", \"longrope\"";
