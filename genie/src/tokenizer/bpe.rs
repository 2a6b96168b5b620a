//! Byte-pair encoding over tables that are quick to build and small.
//!
//! The rest of a tokenizer is the library's. Its BPE gives the same tokens (tested), but keeps every token as a string in each of
//! two maps, and builds these from more strings: for a vocabulary of 49,152 that was the longest part of opening a model of a
//! hundred megabytes, and a tenth of the process's memory.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use hashbrown::DefaultHashBuilder;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{Model, Result, Token};

mod file;
mod vocabulary;
mod word;

pub(super) use file::read;
use vocabulary::Vocabulary;
use word::Word;

/// A model of type `BPE`, without dropout, and without marks at the beginning or end of words.
pub(super) struct Bpe {
    vocabulary: Vocabulary,
    merges: Merges,
    /// What stands for a character that has no token, and whether one stands for several in a row.
    unknown: Option<(u32, bool)>,
    /// With `byte_fallback`: the tokens of bytes, which stand for such a character where there are all it needs.
    bytes: Option<Box<[Option<u32>; 256]>>,
    /// `ignore_merges`: a word that is a token is that token, whatever its parts would become.
    whole_words: bool,
}

/// Two neighbours that become one token.
type Merges = HashMap<(u32, u32), Merge, DefaultHashBuilder>;

#[derive(Debug, Clone, Copy)]
struct Merge {
    /// The lowest goes first.
    rank: u32,
    id: u32,
}

impl Bpe {
    /// The tokens of the characters of `text`.
    fn characters(&self, text: &str) -> Word {
        let mut word = Word::with_capacity(text.len());
        // Bytes of characters without a token, which wait for more of them.
        let mut unknown_bytes = 0;
        for (at, c) in text.char_indices() {
            let c = &text[at..at + c.len_utf8()];
            if let Some(id) = self.vocabulary.id(c) {
                self.push_unknown(&mut word, std::mem::take(&mut unknown_bytes));
                word.push(id, c.len());
            } else if let Some(ids) = self.bytes_of(c) {
                // What waits goes on waiting, as it does in the library.
                ids.for_each(|id| word.push(id, 1));
            } else if let Some((_, fuse)) = self.unknown {
                if !fuse {
                    self.push_unknown(&mut word, std::mem::take(&mut unknown_bytes));
                }
                unknown_bytes += c.len();
            }
        }
        self.push_unknown(&mut word, unknown_bytes);
        word
    }

    fn push_unknown(&self, word: &mut Word, n_bytes: usize) {
        if let (Some((id, _)), 1..) = (self.unknown, n_bytes) {
            word.push(id, n_bytes);
        }
    }

    /// The tokens of the bytes of `text`, if there are all of them.
    fn bytes_of(&self, text: &str) -> Option<impl Iterator<Item = u32>> {
        let ids = self.bytes.as_ref()?;
        let of = |byte: u8| ids[usize::from(byte)];
        text.bytes().all(|byte| of(byte).is_some()).then(|| text.bytes().filter_map(of))
    }
}

/// Only what a tokenizer that is used asks for. There is no training, and nothing is written.
impl Model for Bpe {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, text: &str) -> Result<Vec<Token>> {
        if self.whole_words
            && !text.is_empty()
            && let Some(id) = self.vocabulary.id(text)
        {
            return Ok(vec![Token::new(id, text.to_owned(), (0, text.len()))]);
        }
        let mut word = self.characters(text);
        word.merge(&self.merges);
        let text_of = |id| self.vocabulary.token(id).unwrap_or_default().to_owned();
        Ok(word.tokens().map(|(id, bytes)| Token::new(id, text_of(id), (bytes.start, bytes.end))).collect())
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.vocabulary.id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.vocabulary.token(id).map(str::to_owned)
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.vocabulary.iter().map(|(token, id)| (token.to_owned(), id)).collect()
    }

    fn get_vocab_size(&self) -> usize {
        self.vocabulary.len()
    }

    fn save(&self, _: &Path, _: Option<&str>) -> Result<Vec<PathBuf>> {
        Err("this model is not written".into())
    }

    fn get_trainer(&self) -> TrainerWrapper {
        BpeTrainer::default().into()
    }
}
