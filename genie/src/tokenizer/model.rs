//! The model inside a tokenizer: our byte-pair encoding, or any of the library's.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer};
use tokenizers::models::TrainerWrapper;
use tokenizers::{Model, ModelWrapper, Result, Token};

use super::bpe::Bpe;

/// What makes tokens of words.
pub(super) enum TokenModel {
    Bpe(Bpe),
    Library(ModelWrapper),
}

/// Reads any model that the library knows; ours has a way of its own, [`super::bpe::read`].
impl<'de> Deserialize<'de> for TokenModel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        ModelWrapper::deserialize(deserializer).map(TokenModel::Library)
    }
}

/// Calls the same of whichever it is.
macro_rules! of {
    ($model:expr, $call:ident $arguments:tt) => {
        match $model {
            TokenModel::Bpe(model) => model.$call $arguments,
            TokenModel::Library(model) => model.$call $arguments,
        }
    };
}

impl Model for TokenModel {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, text: &str) -> Result<Vec<Token>> {
        of!(self, tokenize(text))
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        of!(self, token_to_id(token))
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        of!(self, id_to_token(id))
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        of!(self, get_vocab())
    }

    fn get_vocab_size(&self) -> usize {
        of!(self, get_vocab_size())
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> Result<Vec<PathBuf>> {
        of!(self, save(folder, prefix))
    }

    fn get_trainer(&self) -> TrainerWrapper {
        of!(self, get_trainer())
    }
}
