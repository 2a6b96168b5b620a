//! Text to token ids, and token ids to bytes.
//!
//! Reading follows the `tokenizer.json` through the `tokenizers` crate. Writing is done here, byte by byte, because an
//! answer arrives one token at a time and a character may be spread over several of them.

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

use qnn_core::offline::opening;
use thiserror::Error;
use tokenizers::{
    AddedVocabulary, DecoderWrapper, Model, NormalizerWrapper, OffsetType, PostProcessorWrapper, PreTokenizedString,
    PreTokenizer, PreTokenizerWrapper, TokenizerImpl,
};

mod bpe;
mod decoder;
mod growth;
mod mask;
mod model;

use decoder::Decoder;
pub(crate) use mask::Mask;
use model::TokenModel;

/// The library's tokenizer, around a model that may be ours.
type Inner = TokenizerImpl<TokenModel, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// A tokenizer. Immutable, so that dialogs may share it.
pub struct Tokenizer {
    inner: Inner,
    decoder: Decoder,
    control: Vec<Control>,
    opening: Vec<u32>,
}

/// A token that steers the model, such as `<|im_end|>`.
#[derive(Debug)]
struct Control {
    literal: String,
    id: u32,
    special: bool,
    /// What it begins with where it is looked for behind the normalizer, if that is not just its first letter.
    soft_first: Option<char>,
}

/// Where a text stands that grows token by token.
#[derive(Debug, Default)]
pub(crate) struct Growth {
    /// Whether a token has been part of the text: some tokenizers drop a space from the first.
    has_begun: bool,
    /// All ids, for a decoder that looks at several, and how much of their text has been given out.
    ids: Vec<u32>,
    given_bytes: usize,
    /// Text that the next token may still change.
    waiting: String,
}

impl Growth {
    /// The text goes on behind another: nothing is dropped from its first token.
    pub(crate) fn go_on(&mut self) {
        self.has_begun = true;
    }

    /// Takes the text that waited: the text ends here.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.waiting)
    }

    /// Adds `id` for a decoder that has to see the tokens before: what is new is what `decode` adds to the text so far. That
    /// takes time in proportion to the text; no decoder of today's language models comes here.
    fn push(&mut self, id: u32, decode: impl Fn(&[u32]) -> String, out: &mut Vec<u8>) {
        self.ids.push(id);
        let text = decode(&self.ids);
        let new = text.get(self.given_bytes..).unwrap_or_default();
        self.waiting.clear();
        if new.ends_with(char::REPLACEMENT_CHARACTER) {
            self.waiting.push_str(new);
            return;
        }
        out.extend_from_slice(new.as_bytes());
        self.given_bytes += new.len();
    }
}

/// What the text of a control token means inside a text that is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Specials {
    /// It is the control token.
    Recognise,
    /// It is text like any other.
    AsText,
}

/// Why a tokenizer cannot be loaded or cannot encode.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The file cannot be read.
    #[error("{}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        why: std::io::Error,
    },
    /// The file is longer than any tokenizer.
    #[error("{}: {have_bytes} bytes, a tokenizer has at most {limit_bytes}", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Length found.
        have_bytes: u64,
        /// Length allowed.
        limit_bytes: u64,
    },
    /// The text is not a tokenizer of the kind that `tokenizers` writes, or not a configuration of one.
    #[error("{}: not a tokenizer: {why}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        why: String,
    },
    /// A text cannot be encoded.
    #[error("text of {len_bytes} bytes cannot be encoded: {why}")]
    Encode {
        /// Length of the text.
        len_bytes: usize,
        /// What the encoder says.
        why: String,
    },
    /// A text is longer than any context could hold.
    #[error("text has {have_bytes} bytes, need at most {limit_bytes}")]
    TextTooLong {
        /// Length found.
        have_bytes: usize,
        /// Length allowed.
        limit_bytes: usize,
    },
    /// No private-use characters are left to mark text with.
    #[error("text uses too many private-use characters to tell it from control tokens")]
    NoFreeCharacters,
}

impl Tokenizer {
    /// Loads a `tokenizer.json`, and what the `tokenizer_config.json` beside it says of the tokens that open a text.
    ///
    /// # Errors
    /// [`TokenizerError`] with the file and the reason.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let path = path.as_ref();
        let mut tokenizer = Self::from_bytes(&read(path)?, path)?;
        let config_path = path.with_file_name("tokenizer_config.json");
        if config_path.is_file() {
            let fail = |why| TokenizerError::Format { path: config_path.clone(), why };
            let (opening, id_of) =
                (std::mem::take(&mut tokenizer.opening), |text: &str| tokenizer.inner.token_to_id(text));
            tokenizer.opening = opening::configured(&read(&config_path)?, opening, id_of).map_err(fail)?;
        }
        Ok(tokenizer)
    }

    /// Reads the bytes of a `tokenizer.json`; `path` is what errors name.
    ///
    /// # Errors
    /// [`TokenizerError`] with the reason.
    pub fn from_bytes(bytes: &[u8], path: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let path = path.as_ref();
        let fail = |why: String| TokenizerError::Format { path: path.to_owned(), why };
        // `tokenizers` 0.23 unwraps in places where a damaged file can lead it; the tokenizer is dropped then.
        let mut inner = match std::panic::catch_unwind(|| parse(bytes)) {
            Ok(parsed) => parsed.map_err(fail)?,
            Err(_) => return Err(fail("a part of it is not what its type says".to_owned())),
        };
        inner.with_padding(None).with_truncation(None).map_err(|why| fail(why.to_string()))?;
        let decoder = Decoder::new(inner.get_decoder());
        let control = control_tokens(inner.get_added_vocabulary(), inner.get_normalizer());
        // As elsewhere: a damaged file can make the library panic; such a tokenizer opens texts with nothing.
        let opening = std::panic::catch_unwind(|| opening::of_post_processor(&inner));
        let opening = opening.ok().and_then(Result::ok).unwrap_or_default();
        Ok(Self { inner, decoder, control, opening })
    }

    /// The ids that a text of its own opens with: BOS, for models that were trained with one before each text.
    ///
    /// They are what the file's post-processor puts there, unless `add_bos_token` in `tokenizer_config.json` says otherwise.
    /// [`Tokenizer::encode`] never adds them.
    pub fn opening(&self) -> &[u32] {
        &self.opening
    }

    /// Encodes `text`. Nothing is added to it: no token that begins or ends a text.
    ///
    /// # Errors
    /// [`TokenizerError`] if the text is too long.
    pub fn encode(&self, text: &str, specials: Specials) -> Result<Vec<u32>, TokenizerError> {
        check_length(text)?;
        match specials {
            Specials::Recognise => encoded(text, || Ok(self.inner.encode_fast(text, false)?.get_ids().to_vec())),
            Specials::AsText => {
                let mask = Mask::new(self, [text])?;
                self.encode_masked(&mask.all(text), &mask)
            }
        }
    }

    /// Encodes a text in which `mask` has hidden what must not become a control token.
    ///
    /// The steps are those of `tokenizers`' own encoder; between finding control tokens and splitting into words the
    /// hidden characters come back.
    pub(crate) fn encode_masked(&self, text: &str, mask: &Mask) -> Result<Vec<u32>, TokenizerError> {
        check_length(text)?;
        encoded(text, || {
            let inner = &self.inner;
            let mut pieces: PreTokenizedString =
                inner.get_added_vocabulary().extract_and_normalize(inner.get_normalizer(), text);
            pieces.normalize(|piece| {
                piece.map(|c| mask.normal_char(c));
                Ok(())
            })?;
            if let Some(splitter) = inner.get_pre_tokenizer() {
                splitter.pre_tokenize(&mut pieces)?;
            }
            inner.get_model().tokenize_in_pretokenized(&mut pieces, None)?;
            Ok(pieces.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
        })
    }

    /// Appends the bytes that the token `id` adds to the text of `growth`. They may be part of a character only.
    ///
    /// Control tokens marked special have no bytes, nor has an id that the tokenizer does not know.
    pub(crate) fn append_bytes(&self, id: u32, growth: &mut Growth, out: &mut Vec<u8>) {
        let added = self.inner.get_added_vocabulary();
        let Some(token) = self.inner.id_to_token(id).filter(|token| !added.is_special_token(token)) else { return };
        match &self.decoder {
            Decoder::Steps(steps) => steps.append(&token, !growth.has_begun, out),
            Decoder::Library => growth.push(id, |ids| self.decode_with_library(ids), out),
        }
        growth.has_begun = true;
    }

    fn decode_with_library(&self, ids: &[u32]) -> String {
        // `tokenizers` 0.23 counts below zero where a decoder strips more than there is; such a text is empty then.
        let decoded = std::panic::catch_unwind(|| self.inner.decode(ids, true));
        decoded.ok().and_then(Result::ok).unwrap_or_default()
    }

    /// The text of `ids`, without control tokens marked special. Bytes that form no character become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let (mut growth, mut bytes) = (Growth::default(), Vec::new());
        for &id in ids {
            self.append_bytes(id, &mut growth, &mut bytes);
        }
        bytes.extend_from_slice(growth.waiting.as_bytes());
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The id of the control token with this text.
    pub fn control_token(&self, literal: &str) -> Option<u32> {
        self.control.iter().find(|control| control.literal == literal).map(|control| control.id)
    }

    /// Whether `id` is a control token: what follows it begins a text.
    pub(crate) fn is_control(&self, id: u32) -> bool {
        self.control.binary_search_by_key(&id, |control| control.id).is_ok()
    }

    /// Number of ids, added tokens included.
    pub fn n_vocab(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

/// Reads a `tokenizer.json`, in the fast way if that can read it.
fn parse(bytes: &[u8]) -> Result<Inner, String> {
    if let Some(tokenizer) = bpe::read(bytes) {
        return Ok(tokenizer);
    }
    // First what is wrong with it as JSON: the library says only that no kind of model fits.
    serde_json::from_slice::<serde::de::IgnoredAny>(bytes).map_err(|why| why.to_string())?;
    serde_json::from_slice::<growth::Parts>(bytes).map_err(|why| why.to_string())?.check()?;
    serde_json::from_slice(bytes).map_err(|why| why.to_string())
}

/// Added tokens that steer the model: those marked special, and those that look like markup. The rest are words and
/// runs of spaces which some tokenizers add to save tokens.
fn control_tokens(added: &AddedVocabulary, normalizer: Option<&NormalizerWrapper>) -> Vec<Control> {
    let is_markup = |literal: &str| literal.chars().any(|c| !c.is_alphanumeric() && !c.is_whitespace());
    let mut control: Vec<Control> = added
        .get_added_tokens_decoder()
        .iter()
        .filter(|(_, token)| !token.content.is_empty() && (token.special || is_markup(&token.content)))
        .map(|(&id, token)| {
            let soft_first = token.normalized.then(|| mask::soft_first(normalizer, &token.content)).flatten();
            Control { literal: token.content.clone(), id, special: token.special, soft_first }
        })
        .collect();
    control.sort_by_key(|control| control.id);
    control
}

fn read(path: &Path) -> Result<Vec<u8>, TokenizerError> {
    let fail = |why| TokenizerError::Read { path: path.to_owned(), why };
    let have_bytes = std::fs::metadata(path).map_err(fail)?.len();
    if MAX_FILE_BYTES < have_bytes {
        return Err(TokenizerError::TooLong { path: path.to_owned(), have_bytes, limit_bytes: MAX_FILE_BYTES });
    }
    std::fs::read(path).map_err(fail)
}

fn check_length(text: &str) -> Result<(), TokenizerError> {
    match text.len() {
        0..=MAX_TEXT_BYTES => Ok(()),
        have_bytes => Err(TokenizerError::TextTooLong { have_bytes, limit_bytes: MAX_TEXT_BYTES }),
    }
}

/// The ids that `encode` finds for `text`.
fn encoded(text: &str, encode: impl FnOnce() -> tokenizers::Result<Vec<u32>>) -> Result<Vec<u32>, TokenizerError> {
    let fail = |why: String| TokenizerError::Encode { len_bytes: text.len(), why };
    // `tokenizers` 0.23 trusts some parts of a damaged file until a text meets them. Nothing is left half done: encoding reads
    // the tokenizer only.
    match std::panic::catch_unwind(AssertUnwindSafe(encode)) {
        Ok(ids) => ids.map_err(|why| fail(why.to_string())),
        Err(_) => Err(fail("a part of the tokenizer is not what its type says".to_owned())),
    }
}

/// Longest tokenizer file that is read.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Longest text that is encoded: far above any context, far below any overflow of 32-bit offsets.
const MAX_TEXT_BYTES: usize = 64 << 20;

#[cfg(test)]
mod tests;
