//! AIMET's encodings files, as far as they speak of adapters' weights.
//!
//! Written in version 1.0.0. Read in 0.6.1 and its predecessors (`param_encodings` is an object), 1.0.0 (it is a list) and
//! 2.0.0 (`encodings`). Only weights are read; they must be symmetric, per tensor or per row.

use serde_json::{Map, Value, json};

use super::LoraError;
use crate::types::DataType;

/// How one weight is stored.
#[derive(Debug, Clone, PartialEq)]
pub enum WeightEncoding {
    /// Floats of so many bits.
    Float {
        /// 16 or 32.
        bits: u8,
    },
    /// Symmetric integers.
    Integer {
        /// Width of a code.
        bits: u8,
        /// One for each row, or one for all.
        scales: Vec<f32>,
    },
}

/// The encodings of some weights, in the order of the file.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ParamEncodings(pub Vec<(String, WeightEncoding)>);

impl ParamEncodings {
    /// The encoding of the weight called `name`.
    pub fn find(&self, name: &str) -> Option<&WeightEncoding> {
        self.0.iter().find(|(own, _)| own == name).map(|(_, encoding)| encoding)
    }

    /// The file, in version 1.0.0. Floats are written so that they read back as the same.
    pub fn to_json(&self) -> Value {
        let entry = |(name, encoding): &(String, WeightEncoding)| match encoding {
            WeightEncoding::Float { bits } => {
                json!({"name": name, "dtype": "FLOAT", "bw": bits, "enc_type": "PER_TENSOR"})
            }
            WeightEncoding::Integer { bits, scales } => {
                let offset = -(1i64 << (bits - 1));
                json!({
                    "name": name, "dtype": "INT", "bw": bits, "enc_type": "PER_CHANNEL", "is_sym": true,
                    "scale": scales.iter().map(|s| f64::from(*s)).collect::<Vec<f64>>(),
                    "offset": vec![offset; scales.len()],
                })
            }
        };
        let entries: Vec<Value> = self.0.iter().map(entry).collect();
        json!({
            "version": "1.0.0",
            "producer": concat!("genie ", env!("CARGO_PKG_VERSION")),
            "activation_encodings": [],
            "param_encodings": entries,
        })
    }

    /// Reads the encodings of the weights that are `wanted`; others are passed over.
    ///
    /// # Errors
    /// [`LoraError::Json`] or [`LoraError::Config`] naming the entry that is no symmetric encoding.
    pub fn from_json(json: &[u8], wanted: &dyn Fn(&str) -> bool) -> Result<ParamEncodings, LoraError> {
        let file: Map<String, Value> = serde_json::from_slice(json).map_err(LoraError::Json)?;
        let mut found = Vec::new();
        if let Some(Value::Array(list)) = file.get("encodings") {
            for entry in list {
                keep(&mut found, entry, wanted, version_2)?;
            }
            return Ok(ParamEncodings(found));
        }
        match file.get("param_encodings") {
            Some(Value::Array(list)) => {
                for entry in list {
                    keep(&mut found, entry, wanted, version_1)?;
                }
            }
            Some(Value::Object(map)) => {
                for (name, entry) in map.iter().filter(|(name, _)| wanted(name)) {
                    found.push((name.clone(), version_0(name, entry)?));
                }
            }
            _ => {
                let want = "an AIMET encodings file (param_encodings, or encodings)";
                return Err(LoraError::config("encodings", "neither param_encodings nor encodings", want));
            }
        }
        Ok(ParamEncodings(found))
    }
}

impl WeightEncoding {
    /// The element type that stores it.
    pub fn data_type(&self) -> Option<DataType> {
        Some(match self {
            WeightEncoding::Float { bits: 16 } => DataType::Float16,
            WeightEncoding::Float { bits: 32 } => DataType::Float32,
            WeightEncoding::Integer { bits: 8, .. } => DataType::SFixedPoint8,
            WeightEncoding::Integer { bits: 4, .. } => DataType::SFixedPoint4,
            _ => return None,
        })
    }
}

type Read = fn(&str, &Value) -> Result<WeightEncoding, LoraError>;

fn keep(
    found: &mut Vec<(String, WeightEncoding)>,
    entry: &Value,
    wanted: &dyn Fn(&str) -> bool,
    read: Read,
) -> Result<(), LoraError> {
    let Some(name) = entry.get("name").and_then(Value::as_str) else {
        return Err(LoraError::config("encodings", "an entry without name", "a name in each"));
    };
    if wanted(name) {
        found.push((name.to_owned(), read(name, entry)?));
    }
    Ok(())
}

fn version_1(name: &str, entry: &Value) -> Result<WeightEncoding, LoraError> {
    let bits = integer(name, entry, "bw")?;
    if text(entry, "dtype").eq_ignore_ascii_case("float") {
        return Ok(WeightEncoding::Float { bits });
    }
    let kind = text(entry, "enc_type");
    if !matches!(kind, "PER_TENSOR" | "PER_CHANNEL") {
        return refuse(name, "enc_type", kind, "PER_TENSOR or PER_CHANNEL");
    }
    let scales = floats(name, entry.get("scale"), "scale")?;
    symmetric(name, bits, entry.get("offset"))?;
    Ok(WeightEncoding::Integer { bits, scales })
}

fn version_0(name: &str, entry: &Value) -> Result<WeightEncoding, LoraError> {
    let Some([first, rest @ ..]) = entry.as_array().map(Vec::as_slice) else {
        return refuse(name, "encoding", "no list", "a list of encodings");
    };
    let bits = integer(name, first, "bitwidth")?;
    if text(first, "dtype").eq_ignore_ascii_case("float") {
        return Ok(WeightEncoding::Float { bits });
    }
    let mut scales = Vec::new();
    for one in std::iter::once(first).chain(rest) {
        scales.extend(floats(name, one.get("scale"), "scale")?);
        symmetric(name, bits, one.get("offset"))?;
    }
    Ok(WeightEncoding::Integer { bits, scales })
}

fn version_2(name: &str, entry: &Value) -> Result<WeightEncoding, LoraError> {
    let bits = match text(entry, "output_dtype") {
        "float16" => return Ok(WeightEncoding::Float { bits: 16 }),
        "float32" => return Ok(WeightEncoding::Float { bits: 32 }),
        "int8" => 8,
        "int4" => 4,
        other => return refuse(name, "output_dtype", other, "int4, int8, float16 or float32"),
    };
    if !entry.get("block_size").is_none_or(Value::is_null) {
        return refuse(name, "block_size", "set", "an encoding per tensor or per row");
    }
    if entry.get("axis").and_then(Value::as_i64).is_some_and(|axis| axis != 0 && axis != -2) {
        return refuse(name, "axis", "another", "0: a scale for each row");
    }
    symmetric(name, bits, entry.get("y_zero_point"))?;
    Ok(WeightEncoding::Integer { bits, scales: floats(name, entry.get("y_scale"), "y_scale")? })
}

/// Offsets must be absent, 0, or `-2^(bits-1)` (0 in AIMET's unsigned convention).
fn symmetric(name: &str, bits: u8, offsets: Option<&Value>) -> Result<(), LoraError> {
    let zero = -((1u64 << (bits - 1)) as f64);
    let fits = |value: &Value| value.as_f64().is_some_and(|offset| offset == 0.0 || offset == zero);
    let all = match offsets {
        None | Some(Value::Null) => true,
        Some(Value::Array(list)) => list.iter().all(fits),
        Some(one) => fits(one),
    };
    if all { Ok(()) } else { refuse(name, "offset", "not symmetric", "symmetric encodings") }
}

fn integer(name: &str, entry: &Value, key: &str) -> Result<u8, LoraError> {
    match entry.get(key).and_then(Value::as_u64) {
        Some(bits @ 2..=32) => Ok(bits as u8),
        _ => refuse(name, key, "no number from 2 to 32", "a number of bits"),
    }
}

fn floats(name: &str, value: Option<&Value>, key: &str) -> Result<Vec<f32>, LoraError> {
    let one = |value: &Value| value.as_f64().map(|v| v as f32).filter(|v| v.is_finite() && *v > 0.0);
    let all = match value {
        Some(Value::Array(list)) => list.iter().map(one).collect(),
        Some(value) => one(value).map(|v| vec![v]),
        None => None,
    };
    match all {
        Some(all) if !all.is_empty() => Ok(all),
        _ => refuse(name, key, "missing, or not above 0", "positive numbers"),
    }
}

fn text<'a>(entry: &'a Value, key: &str) -> &'a str {
    entry.get(key).and_then(Value::as_str).unwrap_or("")
}

fn refuse<T>(name: &str, key: &str, have: &str, want: &str) -> Result<T, LoraError> {
    Err(LoraError::Config { key: format!("encoding of {name}, {key}"), have: have.to_owned(), want: want.to_owned() })
}
