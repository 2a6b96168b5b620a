//! The tokenizer that is rebuilt from a GGUF gives the ids of the original.

use std::path::Path;

use genie::tokenizer::{Specials, Tokenizer};
use genie_workspace::gguf_writer::GgufWriter;
use genie_workspace::tiny_model::TinyModel;
use qnn_core::offline::source::Source;
use serde_json::Value;

/// What a GGUF says of its tokenizer.
#[derive(Clone)]
struct Metadata<'a> {
    model: &'a str,
    pre: &'a str,
    tokens: Vec<&'a str>,
    kinds: Vec<i32>,
    merges: Vec<&'a str>,
    bos: u32,
}

impl<'a> Metadata<'a> {
    fn of(golden: &'a Value) -> Metadata<'a> {
        let strings = |key: &str| golden[key].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
        let kinds = golden["kinds"].as_array().unwrap().iter().map(|v| v.as_i64().unwrap() as i32).collect();
        let pre = golden["pre"].as_str().unwrap();
        Metadata { model: "gpt2", pre, tokens: strings("tokens"), kinds, merges: strings("merges"), bos: 1 }
    }

    fn write(&self, path: &Path) {
        let model = TinyModel { vocab: 400, ..TinyModel::llama(1) };
        let mut file: GgufWriter = model.gguf_without_tokenizer(true);
        file.string("tokenizer.ggml.model", self.model);
        file.string("tokenizer.ggml.pre", self.pre);
        file.strings("tokenizer.ggml.tokens", self.tokens.iter().copied());
        file.integers("tokenizer.ggml.token_type", &self.kinds);
        file.strings("tokenizer.ggml.merges", self.merges.iter().copied());
        file.u32("tokenizer.ggml.padding_token_id", self.bos);
        file.bool("tokenizer.ggml.add_bos_token", true);
        file.string("tokenizer.chat_template", "{{ messages }}");
        std::fs::write(path, file.finish()).unwrap();
    }

    fn open(&self) -> Result<Source, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        self.write(&path);
        Source::open(&path).map_err(|e| format!("{:#}", anyhow::Error::from(e)))
    }
}

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/gguf_tokenizers.json")).unwrap()
}

/// Guards: ids equal those of the `tokenizers` library for every way of cutting text, with control tokens, tokens of the
/// user and padding of the vocabulary; the chat template and the wish for BOS arrive.
#[test]
fn ids_equal_the_original() {
    let golden = golden();
    let texts: Vec<&str> = golden["texts"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
    for of in golden["tokenizers"].as_array().unwrap() {
        let source = Metadata::of(of).open().unwrap();
        let file = |name: &str| &source.sidecars.iter().find(|(n, _)| *n == name).unwrap().1;
        let tokenizer = Tokenizer::from_bytes(file("tokenizer.json"), "tokenizer.json").unwrap();
        for (text, ids) in texts.iter().zip(of["ids"].as_array().unwrap()) {
            let want: Vec<u32> = ids.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect();
            let have = tokenizer.encode(text, Specials::Recognise).unwrap();
            assert_eq!(have, want, "{} on {text:?}", of["pre"]);
        }
        let config: Value = serde_json::from_slice(file("tokenizer_config.json")).unwrap();
        assert_eq!((&config["add_bos_token"], &config["chat_template"]), (&true.into(), &"{{ messages }}".into()));
        let processor: Value = serde_json::from_slice(file("tokenizer.json")).unwrap();
        assert_eq!(processor["post_processor"]["single"][0]["SpecialToken"]["id"], of["tokens"][1]);
        let generation: Value = serde_json::from_slice(file("generation_config.json")).unwrap();
        assert_eq!((&generation["bos_token_id"], &generation["eos_token_id"]), (&1.into(), &vec![2].into()));
    }
}

/// Guards: a tokenizer that could come out wrong is refused by name.
#[test]
fn unknown_or_contradictory_tokenizers_are_refused() {
    let golden = golden();
    let good = Metadata::of(&golden["tokenizers"][0]);
    assert!(good.open().is_ok());
    let check = |changed: Metadata<'_>, words: &[&str]| {
        let error = changed.open().expect_err(words[0]);
        for word in words.iter().chain(&["model.gguf"]) {
            assert!(error.contains(word), "{error} does not say {word}");
        }
    };
    check(Metadata { model: "llama", ..good.clone() }, &["tokenizer model \"llama\"", "byte-level BPE"]);
    check(Metadata { pre: "tekken", ..good.clone() }, &["pre-tokenizer \"tekken\"", "smollm", "qwen2"]);
    check(Metadata { merges: vec!["a zzz"], ..good.clone() }, &["merges", "\"a zzz\""]);
    check(Metadata { merges: vec!["a"], ..good.clone() }, &["merges"]);
    check(Metadata { bos: 4_000_000_000, ..good.clone() }, &["padding_token_id", "4000000000"]);
    check(Metadata { kinds: vec![1], ..good.clone() }, &["token_type", "1 entries"]);
    let mut twice = good.clone();
    twice.tokens[5] = twice.tokens[6];
    check(twice, &["tokens", "every token once"]);
    let mut many = good.clone();
    let names: Vec<String> = (0..400).map(|i| format!("more {i}")).collect();
    many.tokens.extend(names.iter().map(String::as_str));
    many.kinds.extend([1; 400]);
    check(many, &["tokens", "at most 400"]);
}
