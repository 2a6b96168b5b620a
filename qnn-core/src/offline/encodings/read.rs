//! Reading the three versions.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::{EncodingsError, EncodingsFile, FileEncoding, FileVersion, Integers, Layout, Numbers};

pub(super) fn read(file: Map<String, Value>) -> Result<EncodingsFile, EncodingsError> {
    let version = version(&file)?;
    let mut tensors = Vec::new();
    match version {
        FileVersion::V2_0_0 => {
            for (name, entry) in list(&file, "encodings")? {
                tensors.push(FileEncoding { is_param: None, numbers: Entry { name: &name, entry }.version_2()?, name });
            }
        }
        FileVersion::V1_0_0 | FileVersion::V0_6_1 => {
            for (key, is_param) in [("activation_encodings", false), ("param_encodings", true)] {
                for (name, entry) in list(&file, key)? {
                    let entry = Entry { name: &name, entry };
                    let numbers =
                        if version == FileVersion::V1_0_0 { entry.version_1()? } else { entry.version_0()? };
                    tensors.push(FileEncoding { is_param: Some(is_param), numbers, name });
                }
            }
        }
    }
    let mut seen = HashSet::new();
    match tensors.iter().find(|tensor| !seen.insert(&tensor.name)) {
        Some(tensor) => Err(EncodingsError::Twice { tensor: tensor.name.clone() }),
        None => Ok(EncodingsFile { version, tensors }),
    }
}

/// `json` with quotes around the NaN, Infinity and -Infinity that Python writes and JSON does not have.
pub(super) fn quote_non_numbers(json: &[u8]) -> Vec<u8> {
    let mut quoted = Vec::with_capacity(json.len());
    let (mut at, mut in_string) = (0, false);
    while let Some(byte) = json.get(at) {
        let word = ["NaN", "Infinity", "-Infinity"].into_iter().find(|word| json[at..].starts_with(word.as_bytes()));
        match (in_string, word) {
            (false, Some(word)) => {
                quoted.extend([b"\"", word.as_bytes(), b"\""].concat());
                at += word.len();
                continue;
            }
            (true, _) if *byte == b'\\' => {
                // Whatever is escaped ends no string.
                quoted.push(*byte);
                at += 1;
                quoted.extend(json.get(at));
            }
            _ => {
                in_string ^= *byte == b'"';
                quoted.push(*byte);
            }
        }
        at += 1;
    }
    quoted
}

/// By the field, or by the form where it is missing (files before 0.6).
fn version(file: &Map<String, Value>) -> Result<FileVersion, EncodingsError> {
    match file.get("version") {
        Some(Value::String(name)) => match name.split('.').next() {
            Some("0") => Ok(FileVersion::V0_6_1),
            _ => FileVersion::from_name(name).ok_or_else(|| EncodingsError::Version { have: format!("{name:?}") }),
        },
        Some(other) => Err(EncodingsError::Version { have: other.to_string() }),
        None if file.contains_key("encodings") => Ok(FileVersion::V2_0_0),
        None if matches!(file.get("param_encodings"), Some(Value::Array(_))) => Ok(FileVersion::V1_0_0),
        None if file.contains_key("param_encodings") || file.contains_key("activation_encodings") => {
            Ok(FileVersion::V0_6_1)
        }
        None => Err(EncodingsError::Form {
            have: "an object without encodings, param_encodings and activation_encodings".to_owned(),
            want: "an AIMET encodings file",
        }),
    }
}

/// Names and entries under `key`: a list of objects with names, or an object by names.
fn list<'a>(file: &'a Map<String, Value>, key: &'static str) -> Result<Vec<(String, &'a Value)>, EncodingsError> {
    match file.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Object(map)) => Ok(map.iter().map(|(name, entry)| (name.clone(), entry)).collect()),
        Some(Value::Array(entries)) => entries
            .iter()
            .map(|entry| match entry.get("name") {
                Some(Value::String(name)) => Ok((name.clone(), entry)),
                _ => Err(EncodingsError::Form {
                    have: format!("an entry of {key} without name"),
                    want: "a name in each",
                }),
            })
            .collect(),
        Some(_) => Err(EncodingsError::Form { have: format!("{key} of another kind"), want: "a list or an object" }),
    }
}

/// One tensor's entry.
struct Entry<'a> {
    name: &'a str,
    entry: &'a Value,
}

impl Entry<'_> {
    fn version_0(&self) -> Result<Numbers, EncodingsError> {
        let Some([first, rest @ ..]) = self.entry.as_array().map(Vec::as_slice) else {
            return self.refuse("encoding", short(self.entry), "a list of encodings (not nested by input and output)");
        };
        let bits = self.bits(first, "bitwidth")?;
        if is_float(first, "dtype") {
            return Ok(Numbers::Float { bits });
        }
        let (mut scales, mut offsets) = (Vec::new(), Vec::new());
        for one in std::iter::once(first).chain(rest) {
            if self.bits(one, "bitwidth")? != bits {
                return self.refuse("bitwidth", "different from channel to channel", "one for all");
            }
            for end in ["min", "max"] {
                if one.get(end).is_some_and(|v| !v.as_f64().is_some_and(f64::is_finite)) {
                    return self.refuse("range", short(&one[end]), "finite numbers");
                }
            }
            scales.push(self.scale(one.get("scale"), "scale")?);
            offsets.push(self.whole(one.get("offset"), "offset")?);
        }
        let layout = if rest.is_empty() { Layout::PerTensor } else { Layout::PerChannel };
        self.integers(Integers { bits, signed: false, layout, scales, offsets })
    }

    fn version_1(&self) -> Result<Numbers, EncodingsError> {
        let bits = self.bits(self.entry, "bw")?;
        if is_float(self.entry, "dtype") {
            return Ok(Numbers::Float { bits });
        }
        let scales = self.scales("scale")?;
        let offsets = self.wholes("offset", scales.len())?;
        let block_size = || self.count("block_size");
        let (layout, bits) = match self.text("enc_type") {
            "PER_TENSOR" => (Layout::PerTensor, bits),
            "PER_CHANNEL" => (Layout::PerChannel, bits),
            "PER_BLOCK" => (Layout::PerBlock { block_size: block_size()? }, bits),
            "LPBQ" => {
                let (block_size, decompressed_bits) = (block_size()?, bits);
                let block_scales = self.block_scales()?;
                (Layout::Lpbq { block_size, decompressed_bits, block_scales }, self.bits(self.entry, "compressed_bw")?)
            }
            other => return self.refuse("enc_type", other, "PER_TENSOR, PER_CHANNEL, PER_BLOCK or LPBQ"),
        };
        let offsets = match layout {
            // The offset is that of the wider codes: 0 in the middle of theirs is 0 in the middle of the narrow ones.
            Layout::Lpbq { decompressed_bits, .. } => {
                if offsets.iter().any(|offset| *offset != -(1i64 << (decompressed_bits - 1)) && *offset != 0) {
                    return self.refuse("offset", "not symmetric", "a symmetric encoding, as LPBQ is");
                }
                vec![-(1i64 << (bits - 1)); scales.len()]
            }
            _ => offsets,
        };
        self.integers(Integers { bits, signed: false, layout, scales, offsets })
    }

    fn version_2(&self) -> Result<Numbers, EncodingsError> {
        let kind = self.text("output_dtype");
        let (signed, width) = match (kind.strip_prefix("float"), kind.strip_prefix("uint"), kind.strip_prefix("int")) {
            (Some(bits), ..) => {
                return match bits {
                    "16" => Ok(Numbers::Float { bits: 16 }),
                    "32" => Ok(Numbers::Float { bits: 32 }),
                    _ => self.refuse("output_dtype", kind, "float16 or float32"),
                };
            }
            (None, Some(bits), _) => (false, bits),
            (None, None, Some(bits)) => (true, bits),
            _ => return self.refuse("output_dtype", kind, "intN, uintN or floatN"),
        };
        let Some(bits) = width.parse().ok().filter(|bits| (2..=32).contains(bits)) else {
            return self.refuse("output_dtype", kind, "2 to 32 bits");
        };
        let block_size = match self.entry.get("block_size") {
            None | Some(Value::Null) => None,
            Some(_) => Some(self.count("block_size")?),
        };
        let is_lpbq = self.entry.get("per_block_int_scale").is_some();
        let scales = self.scales(if is_lpbq { "per_channel_float_scale" } else { "y_scale" })?;
        let zero_points = self.wholes("y_zero_point", scales.len())?;
        let one = self.entry.get("y_scale").is_some_and(Value::is_number);
        let layout = match block_size {
            Some(block_size) if is_lpbq => {
                let decompressed_bits = 8;
                Layout::Lpbq { block_size, decompressed_bits, block_scales: self.block_scales()? }
            }
            None if is_lpbq => return self.refuse("block_size", "missing", "a number"),
            Some(block_size) => Layout::PerBlock { block_size },
            None if one || scales.len() == 1 => Layout::PerTensor,
            None => Layout::PerChannel,
        };
        self.expect_axis(&layout)?;
        let offsets = zero_points.iter().map(|zero| -zero).collect();
        self.integers(Integers { bits, signed, layout, scales, offsets })
    }

    /// Checks that scales come row by row of a weight `[n, k]`, as [`Integers`] has them: those of channels lie along the first
    /// axis, those of blocks along the second.
    fn expect_axis(&self, layout: &Layout) -> Result<(), EncodingsError> {
        let (axes, want) = match layout {
            Layout::PerTensor => return Ok(()),
            Layout::PerChannel => ([0, -2], "0, a scale for each row"),
            Layout::PerBlock { .. } | Layout::Lpbq { .. } => ([1, -1], "1, blocks along each row"),
        };
        match self.entry.get("axis") {
            None | Some(Value::Null) => Ok(()),
            Some(axis) if axis.as_i64().is_some_and(|axis| axes.contains(&axis)) => Ok(()),
            Some(axis) => self.refuse("axis", short(axis), want),
        }
    }

    fn integers(&self, integers: Integers) -> Result<Numbers, EncodingsError> {
        if integers.layout == Layout::PerTensor && integers.scales.len() != 1 {
            return self.refuse("scale", format!("{} numbers", integers.scales.len()), "one for the whole tensor");
        }
        Ok(Numbers::Integer(integers))
    }

    fn bits(&self, entry: &Value, key: &'static str) -> Result<u8, EncodingsError> {
        match entry.get(key).and_then(Value::as_u64).filter(|bits| (2..=32).contains(bits)) {
            Some(bits) => Ok(bits as u8),
            None => self.refuse(key, entry.get(key).map_or("missing".to_owned(), short), "2 to 32"),
        }
    }

    fn count(&self, key: &'static str) -> Result<usize, EncodingsError> {
        match self.entry.get(key).and_then(Value::as_u64).filter(|n| *n > 0) {
            Some(n) => Ok(n as usize),
            None => self.refuse(key, self.entry.get(key).map_or("missing".to_owned(), short), "a positive number"),
        }
    }

    fn text(&self, key: &str) -> &str {
        self.entry.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    fn scale(&self, value: Option<&Value>, key: &'static str) -> Result<f64, EncodingsError> {
        let number = value.and_then(Value::as_f64);
        match number.filter(|scale| (*scale as f32).is_finite() && *scale > 0.0) {
            Some(scale) => Ok(scale),
            None => self.refuse(key, value.map_or("missing".to_owned(), short), "a positive number"),
        }
    }

    /// Numbers of a scalar, a list or nested lists, in order.
    fn scales(&self, key: &'static str) -> Result<Vec<f64>, EncodingsError> {
        let mut flat = Vec::new();
        flatten(self.entry.get(key).unwrap_or(&Value::Null), &mut flat);
        if flat.is_empty() {
            return self.refuse(key, "empty", "at least one number");
        }
        flat.into_iter().map(|value| self.scale(Some(value), key)).collect()
    }

    fn whole(&self, value: Option<&Value>, key: &'static str) -> Result<i64, EncodingsError> {
        let number = value.and_then(Value::as_f64).filter(|n| n.fract() == 0.0 && n.abs() <= f64::from(u32::MAX));
        match number {
            Some(number) => Ok(number as i64),
            None => self.refuse(key, value.map_or("missing".to_owned(), short), "a whole number"),
        }
    }

    /// `n` whole numbers: a list of as many, one for all, or zeros where there are none.
    fn wholes(&self, key: &'static str, n: usize) -> Result<Vec<i64>, EncodingsError> {
        let mut flat = Vec::new();
        flatten(self.entry.get(key).unwrap_or(&Value::Null), &mut flat);
        let numbers = flat.into_iter().map(|value| self.whole(Some(value), key)).collect::<Result<Vec<i64>, _>>()?;
        match numbers[..] {
            [] => Ok(vec![0; n]),
            [one] => Ok(vec![one; n]),
            _ if numbers.len() == n => Ok(numbers),
            _ => self.refuse(key, format!("{} numbers", numbers.len()), &format!("{n}, as many as scales")),
        }
    }

    fn block_scales(&self) -> Result<Vec<u32>, EncodingsError> {
        const KEY: &str = "per_block_int_scale";
        let mut flat = Vec::new();
        flatten(self.entry.get(KEY).unwrap_or(&Value::Null), &mut flat);
        let whole = |value: &Value| {
            let number = self.whole(Some(value), KEY)?;
            match u32::try_from(number).ok().filter(|n| *n > 0) {
                Some(number) => Ok(number),
                None => self.refuse(KEY, number.to_string(), "positive whole numbers"),
            }
        };
        flat.into_iter().map(whole).collect()
    }

    fn refuse<T>(&self, key: &'static str, have: impl Into<String>, want: &str) -> Result<T, EncodingsError> {
        let (tensor, have, want) = (self.name.to_owned(), have.into(), want.to_owned());
        Err(EncodingsError::Entry { tensor, key, have, want })
    }
}

fn is_float(entry: &Value, key: &str) -> bool {
    entry.get(key).and_then(Value::as_str).is_some_and(|kind| kind.to_ascii_lowercase().starts_with('f'))
}

fn flatten<'a>(value: &'a Value, to: &mut Vec<&'a Value>) {
    match value {
        Value::Null => {}
        Value::Array(values) => values.iter().for_each(|value| flatten(value, to)),
        other => to.push(other),
    }
}

/// The beginning of a value, for a message.
fn short(value: &Value) -> String {
    value.to_string().chars().take(40).collect()
}
