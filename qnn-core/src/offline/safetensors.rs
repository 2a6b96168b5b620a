//! Safetensors files: a header in JSON, then the bytes of all tensors. And the weights of a Hugging Face directory.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::{Dtype, tensor::Metadata};
use serde::Deserialize;

use crate::{
    error::Error,
    map::Bytes,
    offline::{
        error::ImportError,
        int4::Int4Grids,
        source::{ElementFormat, SourceTensor},
    },
};

/// A safetensors file whose layout has been checked: the tensors cover its data without gap or overlap.
#[derive(Debug)]
pub struct SafetensorsFile {
    header: Metadata,
    names: Vec<String>,
    data: Bytes,
}

/// A tensor of a safetensors file.
#[derive(Debug, Clone)]
pub struct StoredTensor {
    /// Name of the element type in the format's own words: `F16`.
    pub dtype: &'static str,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Its elements, row-major.
    pub bytes: Bytes,
}

/// Why bytes are no safetensors file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum LayoutError {
    #[error("{have_bytes} bytes, too short for a safetensors file")]
    TooShort { have_bytes: usize },
    #[error("header of {have_bytes} bytes, at most {MAX_HEADER_BYTES} are read")]
    HeaderTooLong { have_bytes: u64 },
    #[error("header of {header_bytes} bytes in a file of {file_bytes}")]
    HeaderCut { header_bytes: u64, file_bytes: usize },
    #[error("safetensors header")]
    Header(#[source] serde_json::Error),
    #[error("{have_bytes} bytes of tensors, the header describes {want_bytes}")]
    DataSize { have_bytes: usize, want_bytes: usize },
}

impl SafetensorsFile {
    /// Checks the header and the layout of `bytes`.
    ///
    /// # Errors
    /// [`LayoutError`] if the header is cut, too long or no safetensors header, or the data is cut or too long.
    pub fn parse(bytes: Bytes) -> Result<SafetensorsFile, LayoutError> {
        let file_bytes = bytes.len();
        let length = bytes.first_chunk::<8>().ok_or(LayoutError::TooShort { have_bytes: file_bytes })?;
        let header_bytes = u64::from_le_bytes(*length);
        if header_bytes > MAX_HEADER_BYTES {
            return Err(LayoutError::HeaderTooLong { have_bytes: header_bytes });
        }
        // At most 100 MB, so it fits `usize` and the sum does not overflow.
        let data_at_bytes = header_bytes as usize + 8;
        let header = bytes.get(8..data_at_bytes).ok_or(LayoutError::HeaderCut { header_bytes, file_bytes })?;
        // The official type checks types, shapes, sizes, gaps and overlaps while it is read.
        let header: Metadata = serde_json::from_slice(header).map_err(LayoutError::Header)?;
        let data = bytes.slice(data_at_bytes..file_bytes).unwrap_or_else(|| Vec::new().into());
        if header.data_len() != data.len() {
            return Err(LayoutError::DataSize { have_bytes: data.len(), want_bytes: header.data_len() });
        }
        let names = header.offset_keys();
        Ok(SafetensorsFile { header, names, data })
    }

    /// The value of `key` in the metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.header.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// Names of all tensors, in the order of their bytes.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<StoredTensor> {
        let found = self.header.info(name)?;
        let (start, end) = found.data_offsets;
        let bytes = self.data.slice(start..end)?;
        Some(StoredTensor { dtype: dtype_name(found.dtype), shape: found.shape.clone(), bytes })
    }
}

/// The weights of a Hugging Face directory: `model.safetensors`, else the shards of `model.safetensors.index.json`.
#[derive(Debug)]
pub struct HfWeights {
    files: Vec<(String, SafetensorsFile)>,
    /// Tensor name -> index in `files`.
    index: BTreeMap<String, usize>,
    /// How matrices are packed, if they are.
    grids: Option<Int4Grids>,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl HfWeights {
    /// Opens the weights in `folder`, which stay mapped. `grids` is how its matrices are packed, if they are.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Import`] naming the file that is missing or damaged, or the tensor that its shard lacks.
    pub fn open(folder: &Path, grids: Option<Int4Grids>) -> Result<HfWeights, Error> {
        let index_path = folder.join(INDEX_FILE);
        // As in transformers: an index that is left over from before does not count.
        let sharded = index_path.is_file() && !folder.join(SINGLE_FILE).is_file();
        let weights = if sharded { Self::open_shards(folder, &index_path) } else { Self::open_single(folder) };
        Ok(HfWeights { grids, ..weights? })
    }

    fn open_single(folder: &Path) -> Result<HfWeights, Error> {
        let path = folder.join(SINGLE_FILE);
        if !path.is_file() {
            let pickle = PICKLES.iter().find(|name| folder.join(name).is_file());
            let why = match pickle {
                Some(name) => ImportError::Unsupported {
                    what: format!("{name} (a pickle)"),
                    supported: format!("{SINGLE_FILE}; transformers' save_pretrained converts to it"),
                },
                None => ImportError::NoWeights { files: vec![SINGLE_FILE, INDEX_FILE] },
            };
            return Err(Error::import(folder)(why));
        }
        let file = open_file(&path)?;
        let index = file.names().map(|name| (name.to_owned(), 0)).collect();
        Ok(HfWeights { files: vec![(SINGLE_FILE.to_owned(), file)], index, grids: None })
    }

    fn open_shards(folder: &Path, index_path: &Path) -> Result<HfWeights, Error> {
        let refuse = |why| Error::import(index_path)(why);
        let text = read_text(index_path, MAX_INDEX_BYTES)?;
        let shards: ShardIndex = serde_json::from_slice(&text).map_err(|why| refuse(ImportError::Json(why)))?;
        let mut files: Vec<(String, SafetensorsFile)> = Vec::new();
        let mut index = BTreeMap::new();
        for (tensor, shard) in shards.weight_map {
            let at = match files.iter().position(|(name, _)| *name == shard) {
                Some(at) => at,
                None => {
                    // A shard lies beside its index; anything else would let a model read files elsewhere.
                    if Path::new(&shard).file_name().is_none_or(|name| name != shard.as_str()) {
                        return Err(refuse(ImportError::ShardPath { shard }));
                    }
                    files.push((shard.clone(), open_file(&folder.join(&shard))?));
                    files.len() - 1
                }
            };
            if files[at].1.header.info(&tensor).is_none() {
                return Err(refuse(ImportError::NotInShard { tensor, shard }));
            }
            index.insert(tensor, at);
        }
        Ok(HfWeights { files, index, grids: None })
    }

    /// Names of the files with tensors, in the folder that was opened.
    pub fn file_names(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|(name, _)| name.as_str())
    }

    /// Names of all tensors; of a packed matrix `<module>.weight`, in place of its parts, and its bias unless that is zero.
    pub fn names(&self) -> impl Iterator<Item = String> {
        let name = |name: &String| match self.packed_module(name) {
            None => Some(name.clone()),
            Some((module, "qweight")) => Some(format!("{module}.weight")),
            // Some packers give every matrix a bias: of zeros, where the model has none.
            Some((_, "bias")) => {
                self.stored(name).is_some_and(|bias| bias.bytes.iter().any(|b| *b != 0)).then(|| name.clone())
            }
            Some(_) => None,
        };
        self.index.keys().filter_map(name)
    }

    /// The module and the part of its packed matrix that the stored tensor `name` is.
    fn packed_module<'n>(&self, name: &'n str) -> Option<(&'n str, &'n str)> {
        let (module, part) = name.rsplit_once('.')?;
        let packed = self.grids.is_some() && self.index.contains_key(&format!("{module}.qweight"));
        (packed && matches!(part, "qweight" | "qzeros" | "scales" | "g_idx" | "bias")).then_some((module, part))
    }

    fn stored(&self, name: &str) -> Option<StoredTensor> {
        self.files[*self.index.get(name)?].1.tensor(name)
    }

    /// The tensor called `name`, or `None` if there is none.
    ///
    /// # Errors
    /// [`ImportError`] if its elements are neither f32, f16 nor bf16, or the parts of a packed matrix do not fit together.
    pub fn tensor(&self, name: &str) -> Result<Option<SourceTensor>, ImportError> {
        let packed = name.strip_suffix(".weight").filter(|m| self.index.contains_key(&format!("{m}.qweight")));
        if let (Some(grids), Some(module)) = (&self.grids, packed) {
            return grids.weight(module, &|part| self.stored(part)).map(Some);
        }
        let Some(stored) = self.stored(name) else { return Ok(None) };
        let format = match stored.dtype {
            "F32" => ElementFormat::F32,
            "F16" => ElementFormat::F16,
            "BF16" => ElementFormat::Bf16,
            other => {
                return Err(ImportError::Unsupported {
                    what: format!("tensor {name} of type {other}"),
                    supported: "F32, F16, BF16; GPTQ and AWQ of 4 bits; GGUF".to_owned(),
                });
            }
        };
        SourceTensor::new(name, stored.shape, format, stored.bytes).map(Some)
    }
}

fn open_file(path: &Path) -> Result<SafetensorsFile, Error> {
    let bytes = Bytes::map_file(path).map_err(Error::io(path))?;
    SafetensorsFile::parse(bytes).map_err(|why| Error::import(path)(ImportError::Safetensors(why)))
}

/// Reads a text file of at most `limit_bytes`.
pub(super) fn read_text(path: &Path, limit_bytes: u64) -> Result<Vec<u8>, Error> {
    let have_bytes = std::fs::metadata(path).map_err(Error::io(path))?.len();
    if have_bytes > limit_bytes {
        let why = ImportError::FileTooLarge { have_bytes, limit_bytes };
        return Err(Error::import(path)(why));
    }
    Bytes::read_file(path).map(|bytes| bytes.to_vec()).map_err(Error::io(path))
}

fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F64 => "F64",
        Dtype::F32 => "F32",
        Dtype::F16 => "F16",
        Dtype::BF16 => "BF16",
        Dtype::I64 => "I64",
        Dtype::I32 => "I32",
        Dtype::I16 => "I16",
        Dtype::I8 => "I8",
        Dtype::U64 => "U64",
        Dtype::U32 => "U32",
        Dtype::U16 => "U16",
        Dtype::U8 => "U8",
        Dtype::BOOL => "BOOL",
        Dtype::F8_E4M3 => "F8_E4M3",
        Dtype::F8_E5M2 => "F8_E5M2",
        Dtype::F8_E8M0 => "F8_E8M0",
        _ => "of another kind",
    }
}

/// Longest header that is read: the bound of the official reader.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Longest `model.safetensors.index.json` that is read.
const MAX_INDEX_BYTES: u64 = 64 << 20;
pub(super) const SINGLE_FILE: &str = "model.safetensors";
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";
/// Weights as code that is run to read them.
const PICKLES: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
