//! Text to token ids.

use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

use super::QuantizeError;
use crate::{
    graph::{Graph, Node},
    offline::opening,
    op::OpKind,
};

/// The ids of the texts in `files`, one after the other, without special tokens; `tokenizer` is a `tokenizer.json`.
///
/// # Errors
/// [`QuantizeError::Text`] naming the file.
pub fn read_texts(files: &[PathBuf], tokenizer: &Path) -> Result<Vec<u32>, QuantizeError> {
    let loaded = Tokenizer::from_file(tokenizer).map_err(|why| refused(tokenizer)(why.to_string()))?;
    let mut ids = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file).map_err(|why| refused(file)(why.to_string()))?;
        let encoded = loaded.encode_fast(text, false).map_err(|why| refused(file)(why.to_string()))?;
        if encoded.is_empty() {
            return Err(refused(file)(NO_IDS.to_owned()));
        }
        ids.extend_from_slice(encoded.get_ids());
    }
    Ok(ids)
}

/// The ids that a text of its own opens with, as in a dialog: what the post-processor of `tokenizer` (a `tokenizer.json`) puts
/// there, unless `add_bos_token` in the `tokenizer_config.json` beside it says otherwise.
///
/// # Errors
/// [`QuantizeError::Text`] naming the file, and the BOS that is to be added and that there is not.
pub fn opening(tokenizer: &Path) -> Result<Vec<u32>, QuantizeError> {
    let loaded = Tokenizer::from_file(tokenizer).map_err(|why| refused(tokenizer)(why.to_string()))?;
    let path = tokenizer.with_file_name("tokenizer_config.json");
    let opening = opening::of_post_processor(&loaded).map_err(|why| refused(tokenizer)(why.to_string()))?;
    match std::fs::read(&path) {
        Ok(config) => opening::configured(&config, opening, |text| loaded.token_to_id(text)).map_err(refused(&path)),
        Err(why) if why.kind() == std::io::ErrorKind::NotFound => Ok(opening),
        Err(why) => Err(refused(&path)(why.to_string())),
    }
}

/// The files of an input list, one a line and relative to its folder: `name`, or `input_ids:=name`. Empty lines and lines
/// that begin with `#` or `%` are passed over.
///
/// # Errors
/// [`QuantizeError::Text`] naming the list and what is wrong in it.
pub fn read_list(list: &Path) -> Result<Vec<PathBuf>, QuantizeError> {
    let text = std::fs::read_to_string(list).map_err(|why| refused(list)(why.to_string()))?;
    let folder = list.parent().unwrap_or(Path::new(""));
    let mut files = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', '%'])) {
        let name = match line.split_once(":=") {
            None => line,
            Some(("input_ids", name)) => name,
            Some((input, _)) => return Err(refused(list)(format!("input {input:?}, need input_ids"))),
        };
        files.push(folder.join(name));
    }
    if files.is_empty() {
        return Err(refused(list)("no files in the list, need at least one".to_owned()));
    }
    Ok(files)
}

/// The token ids in `file`: a JSON list (`.json`), or 32-bit little-endian integers (`.raw`, `.bin`). `None` for a text.
///
/// # Errors
/// [`QuantizeError::Text`] naming the file and what is wrong in it.
pub fn read_ids(file: &Path) -> Result<Option<Vec<u32>>, QuantizeError> {
    let read = || std::fs::read(file).map_err(|why| refused(file)(why.to_string()));
    let ids: Vec<u32> = match file.extension().and_then(|extension| extension.to_str()) {
        Some("json") => serde_json::from_slice(&read()?).map_err(|why| refused(file)(why.to_string()))?,
        Some("raw" | "bin") => {
            let bytes = read()?;
            let (words, rest) = bytes.as_chunks::<4>();
            if !rest.is_empty() {
                return Err(refused(file)(format!("{} bytes, need a multiple of 4", bytes.len())));
            }
            words.iter().map(|word| u32::from_le_bytes(*word)).collect()
        }
        _ => return Ok(None),
    };
    match ids.is_empty() {
        true => Err(refused(file)(NO_IDS.to_owned())),
        false => Ok(Some(ids)),
    }
}

/// Refuses ids of `file` that `graph` has no embedding for, before work that such an id would end.
///
/// # Errors
/// [`QuantizeError::Text`] naming the file, the id and how many the model has.
pub fn check_ids(file: &Path, ids: &[u32], graph: &Graph) -> Result<(), QuantizeError> {
    let takes_ids = |node: &&Node| graph.find("input_ids").is_some_and(|ids| node.inputs.get(1) == Some(&ids));
    let mut lookups = graph.nodes().iter().filter(|node| node.op == OpKind::Gather);
    let Some(embedding) = lookups.find(takes_ids) else { return Ok(()) };
    let n_vocab = graph.tensor(embedding.inputs[0]).shape.max_dims()[0];
    match ids.iter().find(|id| **id as usize >= n_vocab) {
        Some(id) => Err(refused(file)(format!("token id {id}, the model has {n_vocab}: need 0 to {}", n_vocab - 1))),
        None => Ok(()),
    }
}

fn refused(path: &Path) -> impl Fn(String) -> QuantizeError {
    move |why| QuantizeError::Text { path: path.display().to_string(), why }
}

const NO_IDS: &str = "no token ids in it, nothing to calibrate with";

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    // Guards: calibration opens a text with what a dialog opens it with, and a BOS that there is not is refused by its file.
    #[test]
    fn a_text_opens_as_in_a_dialog() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tokenizer.json");
        let opening = |post_processor: &Value, config: &str| {
            let model = json!({"type": "WordLevel", "vocab": {"<s>": 0, "a": 1}, "unk_token": "a"});
            let file = json!({"version": "1.0", "model": model, "added_tokens": [], "post_processor": post_processor});
            std::fs::write(&path, file.to_string()).expect("it can be written");
            std::fs::write(path.with_file_name("tokenizer_config.json"), config).expect("it can be written");
            opening(&path).map_err(|error| error.to_string())
        };
        let (bos, text) =
            (json!({"SpecialToken": {"id": "<s>", "type_id": 0}}), json!({"Sequence": {"id": "A", "type_id": 0}}));
        let template = json!({"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}});
        let (none, yes, no) =
            (Value::Null, r#"{"add_bos_token": true, "bos_token": "<s>"}"#, r#"{"add_bos_token": false}"#);
        assert_eq!(opening(&template, "{}"), Ok(vec![0]));
        assert_eq!(opening(&template, yes), Ok(vec![0]));
        assert_eq!(opening(&template, no), Ok(vec![]));
        assert_eq!(opening(&none, "{}"), Ok(vec![]));
        assert_eq!(opening(&none, yes), Ok(vec![0]));
        let error = opening(&none, r#"{"add_bos_token": true, "bos_token": "<x>"}"#).expect_err("no such token");
        assert!(error.contains("tokenizer_config.json") && error.contains("<x>"), "{error}");
    }
}
