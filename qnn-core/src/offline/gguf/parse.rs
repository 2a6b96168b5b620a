//! The GGUF container: header, metadata, tensor table. Every number is checked before it is used.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::map::Bytes;

/// A GGUF file whose header, metadata and tensor table have been checked.
#[derive(Debug)]
pub struct GgufFile {
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorEntry>,
    bytes: Bytes,
}

/// One tensor of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorEntry {
    /// Extents, outermost first (the file has them innermost first).
    pub shape: Vec<usize>,
    /// Number of the element format.
    pub format: u32,
    /// Start in the file.
    pub at_bytes: usize,
}

/// A metadata value. Arrays stay in the file until they are asked for.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array { element: ValueType, len: usize, at: Range<usize> },
}

/// Type of a metadata value. The numbers are those of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

/// Why bytes are no GGUF file that can be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum GgufError {
    #[error("not a GGUF file: begins with {have:02x?}")]
    Magic { have: Vec<u8> },
    #[error("GGUF version {have}, supported: 2, 3 (little endian)")]
    Version { have: u32 },
    #[error("at byte {at_bytes}: file ends inside {what}")]
    Cut { at_bytes: usize, what: &'static str },
    #[error("at byte {at_bytes}: {what} {have}, need {want}")]
    Field { at_bytes: usize, what: &'static str, have: String, want: String },
    #[error("metadata {key}: {have}, need {want}")]
    Metadata { key: String, have: String, want: String },
    #[error("tensor {tensor}: {have}, need {want}")]
    Tensor { tensor: String, have: String, want: String },
}

impl GgufFile {
    /// Checks header, metadata and tensor table of `bytes`.
    ///
    /// # Errors
    /// [`GgufError`] with the place in the file, or the tensor or key.
    pub fn parse(bytes: Bytes) -> Result<GgufFile, GgufError> {
        let mut reader = Reader { bytes: &bytes, at: 0 };
        let magic = reader.take(4, "magic")?;
        if magic != b"GGUF" {
            return Err(GgufError::Magic { have: magic.to_vec() });
        }
        let version = reader.u32("version")?;
        if !matches!(version, 2 | 3) {
            return Err(GgufError::Version { have: version });
        }
        let n_tensors = reader.count("number of tensors", MIN_TENSOR_BYTES)?;
        let n_keys = reader.count("number of metadata keys", MIN_KEY_BYTES)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..n_keys {
            let at_bytes = reader.at;
            let key = reader.string("metadata key")?;
            let value = reader.value()?;
            if metadata.insert(key.clone(), value).is_some() {
                let (have, want) = (format!("{key:?} again"), "every key once".to_owned());
                return Err(GgufError::Field { at_bytes, what: "metadata key", have, want });
            }
        }
        let mut tensors = BTreeMap::new();
        for _ in 0..n_tensors {
            let at_bytes = reader.at;
            let (name, entry) = reader.tensor()?;
            if tensors.insert(name.clone(), entry).is_some() {
                let (have, want) = (format!("{name:?} again"), "every name once".to_owned());
                return Err(GgufError::Field { at_bytes, what: "tensor", have, want });
            }
        }
        let table_end = reader.at;
        let mut file = GgufFile { metadata, tensors, bytes };
        file.place_tensors(table_end)?;
        Ok(file)
    }

    /// Turns the table's offsets into places in the file.
    fn place_tensors(&mut self, table_end: usize) -> Result<(), GgufError> {
        let alignment = self.unsigned("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
        let want = || format!("a power of two from 8 to {MAX_ALIGNMENT}");
        if !alignment.is_power_of_two() || !(8..=MAX_ALIGNMENT).contains(&alignment) {
            let key = "general.alignment".to_owned();
            return Err(GgufError::Metadata { key, have: alignment.to_string(), want: want() });
        }
        let alignment = alignment as usize; // at most 2^20
        let file_bytes = self.bytes.len();
        // Below the file's length plus 2^20, so it cannot overflow.
        let data_at = table_end.next_multiple_of(alignment);
        for (name, entry) in &mut self.tensors {
            let at_bytes = data_at.checked_add(entry.at_bytes).filter(|at| *at <= file_bytes);
            let Some(at_bytes) = at_bytes.filter(|_| entry.at_bytes.is_multiple_of(alignment)) else {
                return Err(GgufError::Tensor {
                    tensor: name.clone(),
                    have: format!("offset {}", entry.at_bytes),
                    want: format!("a multiple of {alignment} inside the {file_bytes} bytes of the file"),
                });
            };
            entry.at_bytes = at_bytes;
        }
        Ok(())
    }

    /// The value of `key`.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// The whole number under `key`, if it is there.
    ///
    /// # Errors
    /// [`GgufError::Metadata`] if it is something else, or negative.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Unsigned(value)) => Ok(Some(*value)),
            Some(Value::Signed(value)) if *value >= 0 => Ok(Some(value.cast_unsigned())),
            Some(other) => Err(wrong_type(key, other, "a whole number")),
        }
    }

    /// The number under `key`, if it is there.
    ///
    /// # Errors
    /// [`GgufError::Metadata`] if it is no number.
    pub fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(*value)),
            Some(Value::Unsigned(value)) => Ok(Some(*value as f64)),
            Some(Value::Signed(value)) => Ok(Some(*value as f64)),
            Some(other) => Err(wrong_type(key, other, "a number")),
        }
    }

    /// The truth value under `key`, if it is there.
    ///
    /// # Errors
    /// [`GgufError::Metadata`] if it is something else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(wrong_type(key, other, "true or false")),
        }
    }

    /// The text under `key`, if it is there.
    ///
    /// # Errors
    /// [`GgufError::Metadata`] if it is no text.
    pub fn string(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(wrong_type(key, other, "a string")),
        }
    }

    /// The texts under `key`, if it is there.
    ///
    /// # Errors
    /// [`GgufError::Metadata`] if it is no array of strings, or one is no UTF-8.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&str>>, GgufError> {
        let Some((element, len, at)) = self.array(key)? else { return Ok(None) };
        if element != ValueType::String {
            return Err(wrong_type(key, &self.metadata[key], "an array of strings"));
        }
        let mut reader = Reader { bytes: &self.bytes[..at.end], at: at.start };
        (0..len).map(|_| reader.str("string")).collect::<Result<Vec<&str>, GgufError>>().map(Some)
    }

    /// The whole numbers under `key`, if it is there.
    ///
    /// # Errors
    /// [`GgufError::Metadata`] if it is no array of u32 or i32.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i64>>, GgufError> {
        let Some((element, _, at)) = self.array(key)? else { return Ok(None) };
        let chunks = self.bytes[at].as_chunks::<4>().0;
        match element {
            ValueType::I32 => Ok(Some(chunks.iter().map(|c| i64::from(i32::from_le_bytes(*c))).collect())),
            ValueType::U32 => Ok(Some(chunks.iter().map(|c| i64::from(u32::from_le_bytes(*c))).collect())),
            _ => Err(wrong_type(key, &self.metadata[key], "an array of 32-bit integers")),
        }
    }

    /// The f32s under `key`, if it is there.
    ///
    /// # Errors
    /// [`GgufError::Metadata`] if it is no array of f32.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>, GgufError> {
        let Some((element, _, at)) = self.array(key)? else { return Ok(None) };
        if element != ValueType::F32 {
            return Err(wrong_type(key, &self.metadata[key], "an array of f32"));
        }
        let chunks = self.bytes[at].as_chunks::<4>().0;
        Ok(Some(chunks.iter().map(|c| f32::from_le_bytes(*c)).collect()))
    }

    /// The length of the array under `key`, if it is there.
    ///
    /// # Errors
    /// [`GgufError::Metadata`] if it is no array.
    pub fn array_len(&self, key: &str) -> Result<Option<usize>, GgufError> {
        Ok(self.array(key)?.map(|(_, len, _)| len))
    }

    fn array(&self, key: &str) -> Result<Option<(ValueType, usize, Range<usize>)>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Array { element, len, at }) => Ok(Some((*element, *len, at.clone()))),
            Some(other) => Err(wrong_type(key, other, "an array")),
        }
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorEntry> {
        &self.tensors
    }

    /// The `size_bytes` bytes from `at_bytes`, or `None` if they do not lie in the file.
    pub fn slice(&self, at_bytes: usize, size_bytes: usize) -> Option<Bytes> {
        self.bytes.slice(at_bytes..at_bytes.checked_add(size_bytes)?)
    }
}

fn wrong_type(key: &str, have: &Value, want: &str) -> GgufError {
    let have = match have {
        Value::Array { element, len, .. } => format!("an array of {len} {element:?}"),
        other => format!("{other:?}"),
    };
    GgufError::Metadata { key: key.to_owned(), have, want: want.to_owned() }
}

/// A place in the file.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], GgufError> {
        let cut = GgufError::Cut { at_bytes: self.at, what };
        let end = self.at.checked_add(len).ok_or(cut.clone())?;
        let taken = self.bytes.get(self.at..end).ok_or(cut)?;
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufError> {
        let at_bytes = self.at;
        self.take(N, what)?.first_chunk().copied().ok_or(GgufError::Cut { at_bytes, what })
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A number of things that take at least `least_bytes` each of what is left of the file.
    fn count(&mut self, what: &'static str, least_bytes: usize) -> Result<usize, GgufError> {
        let at_bytes = self.at;
        let have = self.u64(what)?;
        let most = (self.bytes.len() - self.at) / least_bytes;
        match usize::try_from(have) {
            Ok(count) if count <= most => Ok(count),
            _ => Err(GgufError::Field {
                at_bytes,
                what,
                have: have.to_string(),
                want: format!("at most {most}, what the rest of the file can hold"),
            }),
        }
    }

    fn str(&mut self, what: &'static str) -> Result<&'a str, GgufError> {
        let len = self.count(what, 1)?;
        let at_bytes = self.at;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|e| GgufError::Field {
            at_bytes,
            what,
            have: format!("a byte that is no UTF-8 at {}", e.valid_up_to()),
            want: "UTF-8".to_owned(),
        })
    }

    fn string(&mut self, what: &'static str) -> Result<String, GgufError> {
        self.str(what).map(str::to_owned)
    }

    fn value_type(&mut self) -> Result<ValueType, GgufError> {
        let at_bytes = self.at;
        let number = self.u32("value type")?;
        ValueType::ALL.iter().copied().find(|t| *t as u32 == number).ok_or_else(|| GgufError::Field {
            at_bytes,
            what: "value type",
            have: number.to_string(),
            want: "0 to 12".to_owned(),
        })
    }

    fn value(&mut self) -> Result<Value, GgufError> {
        let what = "metadata value";
        Ok(match self.value_type()? {
            ValueType::U8 => Value::Unsigned(u64::from(self.array::<1>(what)?[0])),
            ValueType::I8 => Value::Signed(i64::from(self.array::<1>(what)?[0].cast_signed())),
            ValueType::U16 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array(what)?))),
            ValueType::I16 => Value::Signed(i64::from(i16::from_le_bytes(self.array(what)?))),
            ValueType::U32 => Value::Unsigned(u64::from(self.u32(what)?)),
            ValueType::I32 => Value::Signed(i64::from(i32::from_le_bytes(self.array(what)?))),
            ValueType::F32 => Value::Float(f64::from(f32::from_le_bytes(self.array(what)?))),
            ValueType::Bool => Value::Bool(self.array::<1>(what)?[0] != 0),
            ValueType::String => Value::String(self.string(what)?),
            ValueType::U64 => Value::Unsigned(self.u64(what)?),
            ValueType::I64 => Value::Signed(i64::from_le_bytes(self.array(what)?)),
            ValueType::F64 => Value::Float(f64::from_le_bytes(self.array(what)?)),
            ValueType::Array => self.array_value(MAX_ARRAY_DEPTH)?,
        })
    }

    /// Walks over an array, so that its end is known and its strings are known to be UTF-8.
    fn array_value(&mut self, depth: usize) -> Result<Value, GgufError> {
        let at_bytes = self.at;
        let element = self.value_type()?;
        let least_bytes = element.size_bytes().unwrap_or(if element == ValueType::String { 8 } else { 12 });
        let len = self.count("length of an array", least_bytes)?;
        let start = self.at;
        match element {
            ValueType::String => (0..len).try_for_each(|_| self.str("string").map(|_| ()))?,
            ValueType::Array if depth == 0 => {
                let (have, want) = ("arrays in arrays".to_owned(), format!("at most {MAX_ARRAY_DEPTH} deep"));
                return Err(GgufError::Field { at_bytes, what: "array", have, want });
            }
            ValueType::Array => (0..len).try_for_each(|_| self.array_value(depth - 1).map(|_| ()))?,
            // `count` has proved that the product fits the file.
            _ => self.take(len * least_bytes, "array").map(|_| ())?,
        }
        Ok(Value::Array { element, len, at: start..self.at })
    }

    fn tensor(&mut self) -> Result<(String, TensorEntry), GgufError> {
        let name = self.string("tensor name")?;
        let at_bytes = self.at;
        let n_dims = self.u32("number of dimensions")?;
        if n_dims == 0 || n_dims > MAX_DIMS {
            let (have, want) = (n_dims.to_string(), format!("1 to {MAX_DIMS}"));
            return Err(GgufError::Field { at_bytes, what: "number of dimensions", have, want });
        }
        let mut shape = Vec::new();
        for _ in 0..n_dims {
            let at_bytes = self.at;
            let have = self.u64("extent")?;
            shape.push(usize::try_from(have).map_err(|_| GgufError::Field {
                at_bytes,
                what: "extent",
                have: have.to_string(),
                want: "a size that fits the address space".to_owned(),
            })?);
        }
        shape.reverse();
        let format = self.u32("element format")?;
        let at = self.at;
        let offset = self.u64("tensor offset")?;
        let at_bytes = usize::try_from(offset).map_err(|_| GgufError::Field {
            at_bytes: at,
            what: "tensor offset",
            have: offset.to_string(),
            want: "a place inside the file".to_owned(),
        })?;
        Ok((name, TensorEntry { shape, format, at_bytes }))
    }
}

impl ValueType {
    const ALL: &[ValueType] = &[
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::String,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    /// Bytes of a value, or `None` if that varies.
    fn size_bytes(self) -> Option<usize> {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => Some(1),
            ValueType::U16 | ValueType::I16 => Some(2),
            ValueType::U32 | ValueType::I32 | ValueType::F32 => Some(4),
            ValueType::U64 | ValueType::I64 | ValueType::F64 => Some(8),
            ValueType::String | ValueType::Array => None,
        }
    }
}

/// Name length, number of dimensions, one extent, format, offset.
const MIN_TENSOR_BYTES: usize = 8 + 4 + 8 + 4 + 8;
/// Key length, type, a value of one byte.
const MIN_KEY_BYTES: usize = 8 + 4 + 1;
const MAX_DIMS: u32 = 4;
const MAX_ARRAY_DEPTH: usize = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;
