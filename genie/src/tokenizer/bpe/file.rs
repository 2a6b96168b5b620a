//! A `tokenizer.json` with a BPE model, read straight into its tables.

use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerBuilder,
};

use super::vocabulary::{Texts, Vocabulary};
use super::{Bpe, Merge, Merges};
use crate::tokenizer::{Inner, TokenModel, growth};

/// The tokenizer in `bytes`, or `None` if it is not one with a BPE model as today's are written: the library knows more
/// forms, and what to say of a damaged file.
pub(in crate::tokenizer) fn read(bytes: &[u8]) -> Option<Inner> {
    // All at once: the reader of bytes checks each of a hundred thousand texts.
    serde_json::from_str::<File>(std::str::from_utf8(bytes).ok()?).ok()?.build()
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
    vocab: Tokens,
    merges: Pairs,
}

#[derive(serde::Deserialize)]
enum Kind {
    #[serde(rename = "BPE")]
    Bpe,
}

impl File {
    /// As the library does it: the tokens are added last, when model and normalizer are there.
    fn build(self) -> Option<Inner> {
        let Version::One = self.version;
        growth::check(self.normalizer.as_ref(), self.pre_tokenizer.as_ref(), self.decoder.as_ref()).ok()?;
        let mut tokenizer = TokenizerBuilder::new()
            .with_model(TokenModel::Bpe(self.model.build()?))
            .with_normalizer(self.normalizer)
            .with_pre_tokenizer(self.pre_tokenizer)
            .with_post_processor(self.post_processor)
            .with_decoder(self.decoder)
            .build()
            .ok()?;
        tokenizer.add_tokens(self.added_tokens).ok()?;
        Some(tokenizer)
    }
}

impl BpeModel {
    fn build(self) -> Option<Bpe> {
        let Kind::Bpe = self.kind;
        let is_absent = |mark: Option<String>| mark.is_none_or(|mark| mark.is_empty());
        if self.dropout.is_some_and(|share| share != 0.0)
            || !is_absent(self.continuing_subword_prefix)
            || !is_absent(self.end_of_word_suffix)
        {
            return None;
        }
        let vocabulary = Vocabulary::new(self.vocab.texts, self.vocab.ids)?;
        let merges = self.merges.resolve(&vocabulary)?;
        let unknown = match self.unk_token {
            Some(token) => Some((vocabulary.id(&token)?, self.fuse_unk.unwrap_or_default())),
            None => None,
        };
        let byte_tokens = || Box::new(std::array::from_fn(|byte| vocabulary.id(&format!("<0x{byte:02X}>"))));
        let bytes = self.byte_fallback.unwrap_or_default().then(byte_tokens);
        Some(Bpe { vocabulary, merges, unknown, bytes, whole_words: self.ignore_merges.unwrap_or_default() })
    }
}

/// `{"token": id, …}`.
#[derive(Default)]
struct Tokens {
    texts: Texts,
    ids: Vec<u32>,
}

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Tokens;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("tokens with ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tokens, A::Error> {
                let mut tokens = Tokens::default();
                while map.next_key_seed(Push(&mut tokens.texts))?.is_some() {
                    tokens.ids.push(map.next_value()?);
                }
                Ok(tokens)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Pairs of tokens that become one: two texts each, `["a", "b"]`, or in older files `"a b"`.
#[derive(Default)]
struct Pairs(Texts);

impl Pairs {
    /// By ids. `None` if a pair, or what it becomes, is no token.
    fn resolve(&self, vocabulary: &Vocabulary) -> Option<Merges> {
        let n = self.0.len() / 2;
        let mut merges = Merges::with_capacity_and_hasher(n, Default::default());
        let mut merged = String::new();
        // Files have tokens mostly in the order of the merges that make them.
        let mut guess = 0;
        for (i, rank) in (0..n).zip(0..) {
            let (a, b) = (self.0.get(2 * i), self.0.get(2 * i + 1));
            merged.clear();
            merged.extend([a, b]);
            let number = vocabulary.number_near(guess, &merged)?;
            guess = number + 1;
            merges.insert((vocabulary.id(a)?, vocabulary.id(b)?), Merge { rank, id: vocabulary.id_of(number) });
        }
        Some(merges)
    }
}

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("pairs of tokens")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Pairs, A::Error> {
                let mut pairs = Pairs::default();
                while entries.next_element_seed(PushPair(&mut pairs.0))?.is_some() {}
                Ok(pairs)
            }
        }
        deserializer.deserialize_seq(Entries)
    }
}

/// Reads one text to the end of some others.
struct Push<'a>(&'a mut Texts);

impl<'de> DeserializeSeed<'de> for Push<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Push<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a token")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.0.push(text).ok_or_else(|| E::custom("more than 4 GB of tokens"))
    }
}

/// The same for two.
struct PushPair<'a>(&'a mut Texts);

impl<'de> DeserializeSeed<'de> for PushPair<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for PushPair<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("two tokens")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        match text.split_once(' ') {
            // The library takes lines that begin so for comments.
            Some((a, b)) if !b.contains(' ') && !text.starts_with("#version") => {
                [a, b].into_iter().try_for_each(|text| Push(self.0).visit_str(text))
            }
            _ => Err(E::custom(format_args!("{text:?}, need two tokens with one space between"))),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut tokens: A) -> Result<(), A::Error> {
        for _ in 0..2 {
            tokens.next_element_seed(Push(self.0))?.ok_or_else(|| A::Error::custom("need two tokens"))?;
        }
        // A third one is an error of the JSON reader, which wants the list to end here.
        Ok(())
    }
}
