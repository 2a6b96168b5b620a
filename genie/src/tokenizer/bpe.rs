//! A `tokenizer.json` with a BPE model, read straight into its types.
//!
//! Left to itself, `tokenizers` finds out what kind of model a file has by way of two trees of JSON values. For a vocabulary of
//! 49,152 that takes longer than a prompt of a hundred tokens, and memory that the process keeps.

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer,
    TokenizerBuilder,
};

/// The tokenizer in `bytes`, or `None` if it is not one with a BPE model as all of today's are written: the library knows more
/// forms, and what to say of a damaged file.
pub(super) fn read(bytes: &[u8]) -> Option<Tokenizer> {
    serde_json::from_slice::<File>(bytes).ok()?.build().ok()
}

/// The whole file, but for padding and truncation, which are not used.
#[derive(serde::Deserialize)]
struct File {
    version: Version,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    post_processor: Option<PostProcessorWrapper>,
    decoder: Option<DecoderWrapper>,
    model: BpeModel,
}

#[derive(serde::Deserialize)]
enum Version {
    #[serde(rename = "1.0")]
    One,
}

#[derive(serde::Deserialize)]
struct BpeModel {
    #[serde(rename = "type")]
    kind: Kind,
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
    vocab: Vocab,
    merges: Vec<Merge>,
}

#[derive(serde::Deserialize)]
enum Kind {
    #[serde(rename = "BPE")]
    Bpe,
}

/// Two tokens that become one: `["a", "b"]`, or in older files `"a b"`.
struct Merge((String, String));

impl File {
    /// As the library does it: the tokens are added last, when model and normalizer are there.
    fn build(self) -> tokenizers::Result<Tokenizer> {
        let Version::One = self.version;
        let mut tokenizer = TokenizerBuilder::new()
            .with_model(ModelWrapper::BPE(self.model.build()?))
            .with_normalizer(self.normalizer)
            .with_pre_tokenizer(self.pre_tokenizer)
            .with_post_processor(self.post_processor)
            .with_decoder(self.decoder)
            .build()?;
        tokenizer.add_tokens(self.added_tokens)?;
        Ok(tokenizer.into())
    }
}

impl BpeModel {
    fn build(self) -> tokenizers::Result<BPE> {
        let Kind::Bpe = self.kind;
        let merges = self.merges.into_iter().map(|Merge(pair)| pair).collect();
        let mut builder = BpeBuilder::new()
            .vocab_and_merges(self.vocab, merges)
            .fuse_unk(self.fuse_unk.unwrap_or_default())
            .byte_fallback(self.byte_fallback.unwrap_or_default())
            .ignore_merges(self.ignore_merges.unwrap_or_default());
        if let Some(dropout) = self.dropout {
            builder = builder.dropout(dropout);
        }
        if let Some(token) = self.unk_token {
            builder = builder.unk_token(token);
        }
        if let Some(prefix) = self.continuing_subword_prefix {
            builder = builder.continuing_subword_prefix(prefix);
        }
        if let Some(suffix) = self.end_of_word_suffix {
            builder = builder.end_of_word_suffix(suffix);
        }
        builder.build()
    }
}

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MergeVisitor)
    }
}

struct MergeVisitor;

impl<'de> Visitor<'de> for MergeVisitor {
    type Value = Merge;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("two tokens")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Merge, E> {
        match text.split_once(' ') {
            Some((a, b)) if !b.contains(' ') => Ok(Merge((a.to_owned(), b.to_owned()))),
            _ => Err(E::custom(format_args!("{text:?}, need two tokens with one space between"))),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut tokens: A) -> Result<Merge, A::Error> {
        let mut next = || tokens.next_element()?.ok_or_else(|| A::Error::custom("need two tokens"));
        // A third one is an error of the JSON reader, which wants the list to end here.
        Ok(Merge((next()?, next()?)))
    }
}
