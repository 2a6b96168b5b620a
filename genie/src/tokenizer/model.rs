//! The model inside a tokenizer: our byte-pair encoding, or any of the library's.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use tokenizers::models::TrainerWrapper;
use tokenizers::{Model, ModelWrapper, Result, Token, TokenizerBuilder};

use super::Inner;
use super::bpe::Bpe;

pub(super) enum TokenModel {
    Bpe(Bpe),
    Library(ModelWrapper),
}

/// What the library has read, with its model.
pub(super) fn of_library(tokenizer: tokenizers::Tokenizer) -> Result<Inner> {
    TokenizerBuilder::new()
        .with_model(TokenModel::Library(tokenizer.get_model().clone()))
        .with_normalizer(tokenizer.get_normalizer().cloned())
        .with_pre_tokenizer(tokenizer.get_pre_tokenizer().cloned())
        .with_post_processor(tokenizer.get_post_processor().cloned())
        .with_decoder(tokenizer.get_decoder().cloned())
        .with_added_vocabulary(tokenizer.get_added_vocabulary().clone())
        .build()
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
