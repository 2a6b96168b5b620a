//! GGUF: a model in one file. Its tensors get Hugging Face names and row order, its block formats keep their grids.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

mod config;
mod ggml;
mod names;
mod parse;
mod tokenizer;

pub use ggml::GgmlType;
pub use parse::{GgufError, GgufFile, TensorEntry, Value, ValueType};
pub use tokenizer::pre_tokenizer_names;

use crate::{
    map::Bytes,
    offline::{
        arch::{self, Architecture},
        config::ModelConfig,
        error::ImportError,
        source::{ElementFormat, SourceTensor},
    },
};

/// A model of a known architecture in one GGUF file, or in the parts of a split one.
#[derive(Debug)]
pub struct GgufModel {
    /// The first part, which has the metadata.
    file: GgufFile,
    more_files: Vec<GgufFile>,
    architecture: &'static Architecture,
    /// The file's own word for the architecture, which begins its metadata keys.
    prefix: String,
    /// Hugging Face name -> name in the files.
    names: BTreeMap<String, String>,
}

impl GgufModel {
    /// Joins the parts of a model, in their order; a file that is not split is the only part.
    ///
    /// # Errors
    /// [`ImportError`]: parts that do not belong together, an unknown architecture, a tensor that this architecture does
    /// not have, tensors that overlap.
    pub fn new(files: Vec<GgufFile>) -> Result<GgufModel, ImportError> {
        check_parts(&files)?;
        let first = files.first().ok_or(ImportError::NoWeights { files: vec!["a .gguf file"] })?;
        let prefix = first.string("general.architecture")?.ok_or_else(|| missing("general.architecture"))?.to_owned();
        let architecture = arch::find_gguf(&prefix)?;
        let mut names = BTreeMap::new();
        for file in &files {
            refuse_overlaps(file)?;
            for name in file.tensors().keys().filter(|name| !names::is_rope_factors(name)) {
                let hf_name = names::hf_name(&prefix, name)
                    .ok_or_else(|| ImportError::UnusedTensor { name: name.clone(), architecture: prefix.clone() })?;
                if names.insert(hf_name, name.clone()).is_some() {
                    let (have, want) = ("in two parts".to_owned(), "one part".to_owned());
                    return Err(GgufError::Tensor { tensor: name.clone(), have, want }.into());
                }
            }
        }
        let mut files = files.into_iter();
        let file = files.next().expect("`first` is there");
        Ok(GgufModel { file, more_files: files.collect(), architecture, prefix, names })
    }

    fn files(&self) -> impl Iterator<Item = &GgufFile> {
        std::iter::once(&self.file).chain(&self.more_files)
    }

    /// `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`, rebuilt from the metadata.
    ///
    /// # Errors
    /// [`ImportError::Unsupported`] for a tokenizer whose ids could not be reproduced, or what is wrong with the metadata.
    pub fn sidecars(&self, config: &ModelConfig) -> Result<Vec<(&'static str, Vec<u8>)>, ImportError> {
        tokenizer::sidecars(&self.file, config)
    }

    /// Hugging Face names of all tensors.
    pub fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    /// The tensor with Hugging Face name `name`, its rows in Hugging Face order; `None` if there is none.
    ///
    /// # Errors
    /// [`ImportError`] if its format is not supported or it does not lie in the file.
    pub fn tensor(&self, name: &str, config: &ModelConfig) -> Result<Option<SourceTensor>, ImportError> {
        let Some(own_name) = self.names.get(name) else { return Ok(None) };
        let Some(mut tensor) = self.stored(own_name)? else { return Ok(None) };
        name.clone_into(&mut tensor.name);
        if self.architecture.gguf_interleaves_qk {
            let heads = match own_name.split('.').nth(2) {
                Some("attn_q") => config.heads,
                Some("attn_k") => config.kv_heads,
                _ => return Ok(Some(tensor)),
            };
            tensor.bytes = half_split(&tensor, heads)?;
        }
        Ok(Some(tensor))
    }

    /// The tensor that the files call `name`, as they store it.
    fn stored(&self, name: &str) -> Result<Option<SourceTensor>, ImportError> {
        let found = self.files().find_map(|file| Some((file, file.tensors().get(name)?)));
        let Some((file, entry)) = found else { return Ok(None) };
        let (format, size_bytes) = size_of(name, entry)?;
        let bytes = file.slice(entry.at_bytes, size_bytes).ok_or_else(|| outside(name, entry, size_bytes))?;
        SourceTensor::new(name, entry.shape.clone(), format, bytes).map(Some)
    }

    fn entry(&self, name: &str) -> Option<&TensorEntry> {
        self.files().find_map(|file| file.tensors().get(name))
    }
}

/// The files of the model of which `path` is one: all parts of a split one (`name-00001-of-00003.gguf`), else `path` alone.
pub fn part_paths(path: &Path) -> Vec<PathBuf> {
    let numbered = || {
        let number =
            |text: &str| (text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?;
        let (rest, count) = path.file_stem()?.to_str()?.rsplit_once("-of-")?;
        let (name, part) = rest.rsplit_once('-')?;
        let (part, count): (u32, u32) = (number(part)?, number(count)?);
        let extension = path.extension()?.to_str()?;
        let path_of = |part| path.with_file_name(format!("{name}-{part:05}-of-{count:05}.{extension}"));
        (1..=count).contains(&part).then(|| (1..=count).map(path_of).collect())
    };
    numbered().unwrap_or_else(|| vec![path.to_owned()])
}

/// Checks that `files` are all parts of one model, in their order.
fn check_parts(files: &[GgufFile]) -> Result<(), ImportError> {
    for (part, file) in files.iter().enumerate() {
        let by_name = "; parts are found by their names, as in model-00001-of-00003.gguf";
        check_split(file, "split.count", (1, files.len()), by_name)?;
        check_split(file, "split.no", (0, part), ", as its name says")?;
    }
    let tensors: usize = files.iter().map(|file| file.tensors().len()).sum();
    let of_all = |file| check_split(file, "split.tensors.count", (tensors, tensors), ", the tensors of all parts");
    Ok(files.iter().try_for_each(of_all)?)
}

/// Checks that `key`, or what it means when it is absent, is `want`.
fn check_split(file: &GgufFile, key: &str, (absent, want): (usize, usize), hint: &str) -> Result<(), GgufError> {
    let have = file.unsigned(key)?.unwrap_or(absent as u64);
    if have == want as u64 {
        return Ok(());
    }
    Err(GgufError::Metadata { key: key.to_owned(), have: have.to_string(), want: format!("{want}{hint}") })
}

/// Checks that each tensor lies in the file and no two share bytes.
fn refuse_overlaps(file: &GgufFile) -> Result<(), ImportError> {
    let mut places = Vec::new();
    for (name, entry) in file.tensors() {
        let (_, size_bytes) = size_of(name, entry)?;
        let end = entry.at_bytes.checked_add(size_bytes).filter(|_| file.slice(entry.at_bytes, size_bytes).is_some());
        let end = end.ok_or_else(|| outside(name, entry, size_bytes))?;
        places.push((entry.at_bytes, end, name));
    }
    places.sort_unstable();
    for pair in places.windows(2) {
        let ((_, end, first), (start, _, second)) = (pair[0], pair[1]);
        if start < end {
            let (have, want) = (format!("starts at {start}"), format!("{end} or later, where {first} ends"));
            return Err(GgufError::Tensor { tensor: second.clone(), have, want }.into());
        }
    }
    Ok(())
}

fn outside(name: &str, entry: &TensorEntry, size_bytes: usize) -> GgufError {
    let have = format!("{size_bytes} bytes from {}", entry.at_bytes);
    GgufError::Tensor { tensor: name.to_owned(), have, want: "bytes inside the file".to_owned() }
}

fn missing(key: &str) -> ImportError {
    ImportError::Config { key: key.to_owned(), have: "missing".to_owned(), want: "a value".to_owned() }
}

/// Element format of a tensor, and its size.
fn size_of(name: &str, entry: &TensorEntry) -> Result<(ElementFormat, usize), ImportError> {
    let format = match entry.format {
        0 => ElementFormat::F32,
        1 => ElementFormat::F16,
        30 => ElementFormat::Bf16,
        number => ElementFormat::Ggml(GgmlType::from_number(number).ok_or_else(|| ImportError::Unsupported {
            what: format!("tensor {name} of GGML type {}", ggml_name(number)),
            supported: format!(
                "F32, F16, BF16, {}",
                GgmlType::ALL.iter().map(|t| t.name()).collect::<Vec<_>>().join(", ")
            ),
        })?),
    };
    let (block, block_bytes) = format.block();
    let elements = entry.shape.iter().try_fold(1usize, |product, n| product.checked_mul(*n));
    let size = elements.filter(|n| n.is_multiple_of(block)).and_then(|n| (n / block).checked_mul(block_bytes));
    match size {
        Some(size_bytes) => Ok((format, size_bytes)),
        None => {
            let (have, want) = (format!("shape {:?}", entry.shape), format!("whole blocks of {block}"));
            Err(GgufError::Tensor { tensor: name.to_owned(), have, want }.into())
        }
    }
}

/// GGML's name of an element format, as far as it is known here.
fn ggml_name(number: u32) -> String {
    let names = [
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (24, "I8"),
        (25, "I16"),
        (26, "I32"),
        (27, "I64"),
        (28, "F64"),
        (29, "IQ1_M"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (39, "MXFP4"),
    ];
    let name = names.iter().find(|(n, _)| *n == number).map(|(_, name)| *name);
    name.map_or_else(|| format!("number {number}"), str::to_owned)
}

/// The rows (or, for a bias, elements) of `tensor` with each head's interleaved pairs taken apart: row `2i + p` of a head
/// goes to `p · head_dim / 2 + i`.
fn half_split(tensor: &SourceTensor, heads: usize) -> Result<Bytes, ImportError> {
    let refuse = |have: String, want: String| Err(ImportError::Tensor { name: tensor.name.clone(), have, want });
    let rows = tensor.shape[0];
    if !rows.is_multiple_of(heads * 2) {
        return refuse(format!("{rows} rows"), format!("{heads} heads of an even number of rows"));
    }
    if tensor.shape.len() == 1 && tensor.format.block().0 != 1 {
        return refuse(format!("format {}", tensor.format.name()), "a float format".to_owned());
    }
    let (head_dim, row_bytes) = (rows / heads, tensor.bytes.len() / rows);
    let mut out = Vec::with_capacity(tensor.bytes.len());
    for row in 0..rows {
        let (head, place) = (row / head_dim, row % head_dim);
        let (pair, member) = (place % (head_dim / 2), place / (head_dim / 2));
        let from = head * head_dim + pair * 2 + member;
        out.extend_from_slice(&tensor.bytes[from * row_bytes..][..row_bytes]);
    }
    Ok(out.into())
}
