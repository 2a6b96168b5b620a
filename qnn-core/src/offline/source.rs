//! A model's files, whatever their format: configuration, weights under Hugging Face names, tokenizer files.

use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};

use crate::{
    error::Error,
    map::Bytes,
    offline::{
        config::{self, ModelConfig},
        error::ImportError,
        fused,
        gguf::{self, GgmlType, GgufFile, GgufModel},
        int4::{self, Int4Grids},
        safetensors::{HfWeights, INDEX_FILE, SINGLE_FILE, read_text},
    },
};

/// An opened model. Its weights stay in their mapped files.
#[derive(Debug)]
pub struct Source {
    /// Sizes and choices of the architecture.
    pub config: ModelConfig,
    /// Files that a runtime needs beside the weights, by name: `tokenizer.json`, `tokenizer_config.json`,
    /// `generation_config.json`, as far as the source has them.
    pub sidecars: Vec<(&'static str, Vec<u8>)>,
    /// What the source is, for the graph's metadata: `hf` or `gguf`.
    pub kind: &'static str,
    /// The files that a source like this is read from, whether or not it has them all.
    pub files: Vec<PathBuf>,
    weights: Weights,
}

#[derive(Debug)]
enum Weights {
    Hf(HfWeights),
    Gguf(GgufModel),
}

impl Source {
    /// Opens a Hugging Face directory or a GGUF file; of a split GGUF (`name-00001-of-00003.gguf`) any part opens all.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Import`] naming the file and what is wrong or not supported.
    pub fn open(path: &Path) -> Result<Source, Error> {
        if path.is_dir() {
            return Self::open_hf(path);
        }
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        if extension.eq_ignore_ascii_case("gguf") {
            return Self::open_gguf(path);
        }
        std::fs::metadata(path).map_err(Error::io(path))?;
        let why = ImportError::Unsupported {
            what: format!("input of type {extension:?}"),
            supported: "a Hugging Face directory (config.json, model.safetensors), a .gguf file".to_owned(),
        };
        Err(Error::import(path)(why))
    }

    fn open_hf(folder: &Path) -> Result<Source, Error> {
        let config_path = folder.join("config.json");
        let generation_path = folder.join("generation_config.json");
        let generation =
            if generation_path.is_file() { Some(read_text(&generation_path, MAX_CONFIG_BYTES)?) } else { None };
        let text = read_text(&config_path, MAX_CONFIG_BYTES)?;
        let mut config = config::from_hf(&text, generation.as_deref()).map_err(Error::import(&config_path))?;
        let grids = int4_grids(folder, &text)?;
        let mut sidecars = Vec::new();
        let tokenizer = folder.join(TOKENIZER);
        if tokenizer.is_file() {
            sidecars.push((TOKENIZER, read_text(&tokenizer, MAX_TOKENIZER_BYTES)?));
        } else {
            config.warnings.push("the directory has no tokenizer.json; a dialog needs one beside the model".to_owned());
        }
        if let Some(bytes) = tokenizer_config(folder)? {
            sidecars.push((TOKENIZER_CONFIG, bytes));
        }
        sidecars.extend(generation.map(|bytes| (GENERATION_CONFIG, bytes)));
        let weights = HfWeights::open(folder, grids)?;
        let files = HF_FILES.into_iter().chain(weights.file_names()).map(|name| folder.join(name)).collect();
        Ok(Source { config, sidecars, kind: "hf", files, weights: Weights::Hf(weights) })
    }

    fn open_gguf(path: &Path) -> Result<Source, Error> {
        let part = |path: &PathBuf| {
            let bytes = Bytes::map_file(path).map_err(Error::io(path))?;
            GgufFile::parse(bytes).map_err(|why| Error::import(path)(why.into()))
        };
        let files = gguf::part_paths(path);
        let parts = files.iter().map(part).collect::<Result<Vec<GgufFile>, Error>>()?;
        let model = GgufModel::new(parts).map_err(Error::import(path))?;
        let config = model.config().map_err(Error::import(path))?;
        let sidecars = model.sidecars(&config).map_err(Error::import(path))?;
        Ok(Source { config, sidecars, kind: "gguf", files, weights: Weights::Gguf(model) })
    }

    /// Hugging Face names of all tensors, those of the parts in place of a fused projection's.
    ///
    /// # Errors
    /// [`ImportError::UnusedTensor`] for a GGUF tensor that has no such name.
    pub fn names(&self) -> Result<Vec<String>, ImportError> {
        let names: Vec<String> = match &self.weights {
            Weights::Hf(weights) => weights.names().collect(),
            Weights::Gguf(model) => model.names(),
        };
        let parts = |name: String| {
            let split = name.rsplit_once('.').and_then(|(module, kind)| Some((fused::parts(module)?, kind)));
            match split {
                Some((parts, kind)) => parts.iter().map(|part| format!("{part}.{kind}")).collect(),
                None => vec![name],
            }
        };
        Ok(names.into_iter().flat_map(parts).collect())
    }

    /// The tensor with Hugging Face name `name`, or `None` if there is none. A part of a fused projection is cut out of it.
    ///
    /// # Errors
    /// [`ImportError`] if its element format is not supported, or a fused projection has another number of rows than its
    /// parts together.
    pub fn tensor(&self, name: &str) -> Result<Option<SourceTensor>, ImportError> {
        if let Some(tensor) = self.stored(name)? {
            return Ok(Some(tensor));
        }
        let Some((module, kind)) = name.rsplit_once('.') else { return Ok(None) };
        let Some((whole, part)) = fused::whole(module) else { return Ok(None) };
        let Some(tensor) = self.stored(&format!("{whole}.{kind}"))? else { return Ok(None) };
        let (config, mut rows) = (&self.config, Vec::new());
        for part in fused::parts(&whole).unwrap_or_default() {
            rows.push(match part.rsplit('.').next() {
                Some("q_proj") => config.heads * config.head_dim,
                Some("k_proj" | "v_proj") => config.kv_heads * config.head_dim,
                _ => config.intermediate_size,
            });
        }
        let (begin, total) = (rows[..part].iter().sum(), rows.iter().sum::<usize>());
        if tensor.shape[0] != total {
            let (have, want) = (format!("{} rows", tensor.shape[0]), format!("{total}, its parts' {rows:?} together"));
            return Err(ImportError::Tensor { name: tensor.name, have, want });
        }
        tensor.slice(name, begin..begin + rows[part]).map(Some)
    }

    fn stored(&self, name: &str) -> Result<Option<SourceTensor>, ImportError> {
        match &self.weights {
            Weights::Hf(weights) => weights.tensor(name),
            Weights::Gguf(model) => model.tensor(name, &self.config),
        }
    }
}

/// How the weights in `folder` are packed, as its `config.json` says, of which `config` is the text, or a file beside it.
fn int4_grids(folder: &Path, config: &[u8]) -> Result<Option<Int4Grids>, Error> {
    let read = |path: &Path, text: &[u8], key: Option<&str>| {
        let refuse = |why| Error::import(path)(why);
        let value: serde_json::Value = serde_json::from_slice(text).map_err(|why| refuse(ImportError::Json(why)))?;
        let found = key.map_or(Some(&value), |key| value.get(key)).filter(|value| !value.is_null());
        // A method is left out in GPTQ's and AWQ's own files only; MLX leaves it out, too.
        if let (Some(key), Some(config)) = (key, found)
            && config.get("quant_method").is_none()
        {
            let (what, supported) = (format!("{key} without quant_method"), "\"gptq\", \"awq\"".to_owned());
            return Err(refuse(ImportError::Unsupported { what, supported }));
        }
        found.map(Int4Grids::from_config).transpose().map_err(refuse)
    };
    if let Some(grids) = read(&folder.join("config.json"), config, Some("quantization_config"))? {
        return Ok(Some(grids));
    }
    for name in ["quantize_config.json", "quant_config.json"] {
        let path = folder.join(name);
        if path.is_file() {
            return read(&path, &read_text(&path, MAX_CONFIG_BYTES)?, None);
        }
    }
    Ok(None)
}

/// `tokenizer_config.json`, with the chat template that newer models keep in a file of its own.
pub(super) fn tokenizer_config(folder: &Path) -> Result<Option<Vec<u8>>, Error> {
    let (path, template_path) = (folder.join(TOKENIZER_CONFIG), folder.join(CHAT_TEMPLATE));
    let bytes = if path.is_file() { Some(read_text(&path, MAX_TOKENIZER_BYTES)?) } else { None };
    if !template_path.is_file() {
        return Ok(bytes);
    }
    let refuse = |why| Error::import(&path)(ImportError::Json(why));
    let mut config: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(bytes.as_deref().unwrap_or(b"{}")).map_err(refuse)?;
    let template = read_text(&template_path, MAX_CONFIG_BYTES)?;
    config.insert("chat_template".to_owned(), String::from_utf8_lossy(&template).into_owned().into());
    Ok(Some(serde_json::to_vec_pretty(&config).map_err(refuse)?))
}

/// How a source stores a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum ElementFormat {
    F32,
    F16,
    Bf16,
    Ggml(GgmlType),
    /// GPTQ's and AWQ's grids: see [`int4`].
    Int4 {
        block_size: usize,
        scales: ScaleType,
    },
    /// The values of a GPTQ matrix, as f32, whose groups are not inputs in a row.
    Int4ActOrder,
}

/// What holds the scales of [`ElementFormat::Int4`] exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleType {
    /// f16, as in most files; and it is what the kernels read.
    Half,
    /// bf16 or f32.
    Wider,
}

impl ElementFormat {
    /// Elements in one indivisible block, and its bytes.
    pub fn block(self) -> (usize, usize) {
        match self {
            ElementFormat::F32 | ElementFormat::Int4ActOrder => (1, 4),
            ElementFormat::F16 | ElementFormat::Bf16 => (1, 2),
            ElementFormat::Ggml(ggml) => (ggml.block_elements(), ggml.block_bytes()),
            ElementFormat::Int4 { block_size, .. } => (block_size, int4::block_bytes(block_size)),
        }
    }

    /// Name in messages and reports.
    pub fn name(self) -> &'static str {
        match self {
            ElementFormat::F32 => "F32",
            ElementFormat::F16 => "F16",
            ElementFormat::Bf16 => "BF16",
            ElementFormat::Ggml(ggml) => ggml.name(),
            ElementFormat::Int4 { .. } => "INT4",
            ElementFormat::Int4ActOrder => "INT4, act-order",
        }
    }
}

/// What the way of a tensor into the graph did to its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// Nothing.
    None,
    /// The codes are kept, the scales (and minima) of blocks are rounded to f16.
    ScalesToF16,
    /// Every element is rounded.
    Rounded,
}

impl Change {
    /// In words, for a report.
    pub fn name(self) -> &'static str {
        match self {
            Change::None => "exact",
            Change::ScalesToF16 => "scales rounded to f16",
            Change::Rounded => "rounded",
        }
    }
}

/// One tensor of a source: `[n, k]`, or `[k]`.
#[derive(Debug, Clone)]
pub struct SourceTensor {
    /// Hugging Face name.
    pub name: String,
    /// Extents, outermost first; one or two.
    pub shape: Vec<usize>,
    /// How the elements are stored.
    pub format: ElementFormat,
    /// The elements, row by row.
    pub bytes: Bytes,
}

impl SourceTensor {
    /// Joins a tensor with its bytes.
    ///
    /// # Errors
    /// [`ImportError::Tensor`] if it has not one or two extents, an extent is 0, rows are no whole blocks, or the number
    /// of bytes is another than the shape asks for.
    pub fn new(
        name: &str,
        shape: Vec<usize>,
        format: ElementFormat,
        bytes: Bytes,
    ) -> Result<SourceTensor, ImportError> {
        let refuse =
            |have: String, want: &str| Err(ImportError::Tensor { name: name.to_owned(), have, want: want.to_owned() });
        if !matches!(shape.len(), 1 | 2) || shape.contains(&0) {
            return refuse(format!("shape {shape:?}"), "one or two extents above 0");
        }
        let (elements, block_bytes) = format.block();
        let k = shape[shape.len() - 1];
        if !k.is_multiple_of(elements) {
            return refuse(format!("rows of {k}"), &format!("a multiple of {elements} for {}", format.name()));
        }
        let rows = if shape.len() == 2 { shape[0] } else { 1 };
        let want = (k / elements).checked_mul(block_bytes).and_then(|row| row.checked_mul(rows));
        if want != Some(bytes.len()) {
            return refuse(format!("{} bytes", bytes.len()), &format!("{want:?} for {} {shape:?}", format.name()));
        }
        Ok(SourceTensor { name: name.to_owned(), shape, format, bytes })
    }

    /// Number of rows.
    pub fn n(&self) -> usize {
        if self.shape.len() == 2 { self.shape[0] } else { 1 }
    }

    /// Elements of a row.
    pub fn k(&self) -> usize {
        self.shape[self.shape.len() - 1]
    }

    /// The part `range` of the first extent, called `name`.
    ///
    /// # Errors
    /// [`ImportError::Tensor`] if `range` reaches beyond it, or cuts a block of elements.
    pub fn slice(&self, name: &str, range: Range<usize>) -> Result<SourceTensor, ImportError> {
        let mut shape = self.shape.clone();
        shape[0] = range.len();
        let stored = self.bytes.len() / self.shape[0];
        let bytes = self.bytes.slice(range.start * stored..range.end * stored).ok_or_else(|| ImportError::Tensor {
            name: name.to_owned(),
            have: format!("{range:?} of {}", self.shape[0]),
            want: "a part of it".to_owned(),
        })?;
        SourceTensor::new(name, shape, self.format, bytes)
    }

    /// Bytes of the rows in `rows`.
    ///
    /// # Panics
    /// If `rows` reaches beyond [`SourceTensor::n`].
    pub fn row_bytes(&self, rows: Range<usize>) -> &[u8] {
        let row = self.bytes.len() / self.n();
        &self.bytes[rows.start * row..rows.end * row]
    }

    /// Writes the rows in `rows` as floats to `out`, which has room for exactly these.
    ///
    /// # Panics
    /// If `rows` reaches beyond [`SourceTensor::n`] or `out` has another length.
    pub fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        assert_eq!(out.len(), rows.len() * self.k(), "room for {} rows of {}", rows.len(), self.k());
        let bytes = self.row_bytes(rows);
        match self.format {
            ElementFormat::F32 | ElementFormat::Int4ActOrder => {
                for (out, v) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *out = f32::from_le_bytes(*v);
                }
            }
            ElementFormat::F16 => {
                for (out, v) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *out = f16::from_le_bytes(*v).to_f32();
                }
            }
            ElementFormat::Bf16 => {
                for (out, v) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *out = bf16::from_le_bytes(*v).to_f32();
                }
            }
            ElementFormat::Ggml(ggml) => ggml.dequantize(bytes, out),
            ElementFormat::Int4 { block_size, .. } => int4::dequantize(bytes, block_size, out),
        }
    }

    /// True if this tensor has the shape and the values of `other`.
    pub fn has_values_of(&self, other: &SourceTensor) -> bool {
        if self.shape != other.shape {
            return false;
        }
        if self.format == other.format {
            return *self.bytes == *other.bytes;
        }
        let (mut own, mut others) = (vec![0.0; self.k()], vec![0.0; self.k()]);
        (0..self.n()).all(|row| {
            self.read_rows(row..row + 1, &mut own);
            other.read_rows(row..row + 1, &mut others);
            own == others
        })
    }

    /// This tensor in f32, `f` of each element.
    pub fn map(&self, f: impl Fn(f32) -> f32) -> SourceTensor {
        let bytes: Vec<u8> = self.to_f32().into_iter().flat_map(|value| f(value).to_le_bytes()).collect();
        let (name, shape) = (self.name.clone(), self.shape.clone());
        SourceTensor { name, shape, format: ElementFormat::F32, bytes: bytes.into() }
    }

    /// All elements as floats.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.n() * self.k()];
        self.read_rows(0..self.n(), &mut out);
        out
    }
}

const TOKENIZER: &str = "tokenizer.json";
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
pub(super) const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// Files of a Hugging Face directory that are read, but for shards.
const HF_FILES: [&str; 9] = [
    "config.json",
    GENERATION_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
    CHAT_TEMPLATE,
    "quantize_config.json",
    "quant_config.json",
    SINGLE_FILE,
    INDEX_FILE,
];
/// Longest configuration file that is read.
const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Longest tokenizer file that is read.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
