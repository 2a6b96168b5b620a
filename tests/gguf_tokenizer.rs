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
    architecture: &'static str,
    model: &'a str,
    pre: &'a str,
    tokens: Vec<&'a str>,
    kinds: Vec<i32>,
    merges: Vec<&'a str>,
    scores: Vec<f32>,
    space_prefix: bool,
    bos: u32,
    vocab: usize,
}

impl<'a> Metadata<'a> {
    /// Byte-level BPE.
    fn of(golden: &'a Value) -> Metadata<'a> {
        let pre = golden["pre"].as_str().unwrap();
        let (tokens, kinds, merges) = (strings(golden, "tokens"), kinds(golden), strings(golden, "merges"));
        Metadata {
            architecture: "llama",
            model: "gpt2",
            pre,
            tokens,
            kinds,
            merges,
            scores: Vec::new(),
            space_prefix: true,
            bos: 1,
            vocab: 440,
        }
    }

    /// SentencePiece.
    fn of_sentencepiece(golden: &'a Value) -> Metadata<'a> {
        let scores = golden["scores"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        let (tokens, kinds, merges) = (strings(golden, "tokens"), kinds(golden), Vec::new());
        let space_prefix = golden["add_space_prefix"].as_bool().unwrap();
        Metadata {
            architecture: "llama",
            model: "llama",
            pre: "default",
            tokens,
            kinds,
            merges,
            scores,
            space_prefix,
            bos: 1,
            vocab: 440,
        }
    }

    fn write(&self, path: &Path) {
        let model = TinyModel { model_type: self.architecture, vocab: self.vocab, ..TinyModel::llama(1) };
        let mut file: GgufWriter = model.gguf_without_tokenizer(true);
        file.string("tokenizer.ggml.model", self.model);
        file.string("tokenizer.ggml.pre", self.pre);
        file.strings("tokenizer.ggml.tokens", self.tokens.iter().copied());
        file.integers("tokenizer.ggml.token_type", &self.kinds);
        if self.model == "gpt2" {
            file.strings("tokenizer.ggml.merges", self.merges.iter().copied());
        }
        if !self.scores.is_empty() {
            file.floats("tokenizer.ggml.scores", &self.scores);
            file.bool("tokenizer.ggml.add_space_prefix", self.space_prefix);
        }
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

fn strings<'a>(golden: &'a Value, key: &str) -> Vec<&'a str> {
    golden[key].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect()
}

fn kinds(golden: &Value) -> Vec<i32> {
    golden["kinds"].as_array().unwrap().iter().map(|v| v.as_i64().unwrap() as i32).collect()
}

fn ids(golden: &Value) -> Vec<u32> {
    golden.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn sidecar<'a>(source: &'a Source, name: &str) -> &'a [u8] {
    &source.sidecars.iter().find(|(n, _)| *n == name).unwrap().1
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
        let file = |name: &str| sidecar(&source, name);
        let tokenizer = Tokenizer::from_bytes(file("tokenizer.json"), "tokenizer.json").unwrap();
        for (text, want) in texts.iter().zip(of["ids"].as_array().unwrap()) {
            let have = tokenizer.encode(text, Specials::Recognise).unwrap();
            assert_eq!(have, ids(want), "{} on {text:?}", of["pre"]);
        }
        let config: Value = serde_json::from_slice(file("tokenizer_config.json")).unwrap();
        assert_eq!((&config["add_bos_token"], &config["chat_template"]), (&true.into(), &"{{ messages }}".into()));
        let processor: Value = serde_json::from_slice(file("tokenizer.json")).unwrap();
        assert_eq!(processor["post_processor"]["single"][0]["SpecialToken"]["id"], of["tokens"][1]);
        let generation: Value = serde_json::from_slice(file("generation_config.json")).unwrap();
        // The named one, and the one whose text ends a turn.
        let end = of["tokens"].as_array().unwrap().iter().position(|token| token == "<|im_end|>").unwrap();
        assert_eq!((&generation["bos_token_id"], &generation["eos_token_id"]), (&1.into(), &vec![2, end].into()));
    }
}

/// Guards: ids of a SentencePiece model equal those of its own library, with and without a space before the text, with bytes,
/// long runs and tokens of the user; and they decode to the text.
#[test]
fn sentencepiece_ids_equal_the_original() {
    let golden: Value = serde_json::from_str(include_str!("golden/gguf_sentencepiece.json")).unwrap();
    for of in golden.as_array().unwrap() {
        let source = Metadata::of_sentencepiece(of).open().unwrap();
        let tokenizer = Tokenizer::from_bytes(sidecar(&source, "tokenizer.json"), "tokenizer.json").unwrap();
        for (text, want) in strings(of, "texts").into_iter().zip(of["ids"].as_array().unwrap()) {
            let have = tokenizer.encode(text, Specials::Recognise).unwrap();
            assert_eq!(have, ids(want), "{} on {text:?}", of["name"]);
            assert_eq!(tokenizer.decode(&have), text.replace('▁', " "), "{}", of["name"]);
        }
        let config: Value = serde_json::from_slice(sidecar(&source, "tokenizer_config.json")).unwrap();
        assert_eq!((&config["bos_token"], &config["add_bos_token"]), (&"<s>".into(), &true.into()));
    }
}

/// Guards: white space behind Phi-3's control tokens is part of them, as in the tokenizer.json that comes with the model; a GGUF does
/// not say so.
#[test]
fn control_tokens_of_phi3_take_the_white_space_behind_them() {
    let golden: Value = serde_json::from_str(include_str!("golden/gguf_sentencepiece.json")).unwrap();
    let of = Metadata::of_sentencepiece(&golden[0]);
    for (architecture, end_strips) in [("phi3", true), ("llama", false)] {
        let source = Metadata { architecture, ..of.clone() }.open().unwrap();
        let tokenizer = Tokenizer::from_bytes(sidecar(&source, "tokenizer.json"), "tokenizer.json").unwrap();
        let ids = |text: &str| tokenizer.encode(text, Specials::Recognise).unwrap();
        assert_eq!(ids("</s>\n a") == ids("</s>a"), end_strips, "{architecture}");
        assert_ne!(ids("<s>\n a"), ids("<s>a"), "{architecture}");
    }
}

/// Guards: a token whose text ends a turn is a control token and ends answers, also where the file has it as plain text.
#[test]
fn ends_of_turns_are_known_by_their_text() {
    let golden = golden();
    let of = &golden["tokenizers"][0];
    let mut plain = Metadata::of(of);
    let end = plain.tokens.iter().position(|token| *token == "<|im_end|>").unwrap();
    plain.kinds[end] = 1;
    let source = plain.open().unwrap();
    let tokenizer = Tokenizer::from_bytes(sidecar(&source, "tokenizer.json"), "tokenizer.json").unwrap();
    assert_eq!(tokenizer.encode("<|im_end|>", Specials::Recognise).unwrap(), [end as u32]);
    assert_eq!(tokenizer.decode(&[end as u32]), "");
    let generation: Value = serde_json::from_slice(sidecar(&source, "generation_config.json")).unwrap();
    assert!(generation["eos_token_id"].as_array().unwrap().contains(&end.into()), "{generation}");
}

/// Guards: a SentencePiece model that lacks scores or bytes is refused by name.
#[test]
fn incomplete_sentencepiece_models_are_refused() {
    let golden: Value = serde_json::from_str(include_str!("golden/gguf_sentencepiece.json")).unwrap();
    let good = Metadata::of_sentencepiece(&golden[0]);
    let check = |changed: Metadata<'_>, words: &[&str]| {
        let error = changed.open().expect_err(words[0]);
        assert!(words.iter().all(|word| error.contains(word)), "{error} does not say {words:?}");
    };
    check(Metadata { scores: Vec::new(), ..good.clone() }, &["scores", "missing"]);
    check(Metadata { scores: vec![0.5; 7], ..good.clone() }, &["scores", "7 entries", "420"]);
    let mut no_byte = good.clone();
    *no_byte.tokens.iter_mut().find(|token| **token == "<0x41>").unwrap() = "<other>";
    check(no_byte, &["tokens", "255 tokens for bytes", "256"]);
}

/// Guards: a token so long that the search for its merges could take hours is refused by its index; the longest allowed is read.
#[test]
fn overlong_tokens_are_refused() {
    let golden: Value = serde_json::from_str(include_str!("golden/gguf_sentencepiece.json")).unwrap();
    let text = "x".repeat(4097);
    let mut long = Metadata::of_sentencepiece(&golden[0]);
    long.tokens[419] = &text[..4096];
    assert!(long.open().is_ok());
    long.tokens[419] = &text;
    let error = long.open().expect_err("a token of 4097 bytes");
    for words in ["model.gguf", "tokenizer.ggml.tokens", "token 419 of 4097 bytes", "at most 4096"] {
        assert!(error.contains(words), "{error} does not say {words}");
    }
}

/// Guards: pieces whose merges would take memory by the cube of their length, or time by its square, are refused; runs of spaces as
/// long as any real model's are read.
#[test]
fn merges_stay_within_bounds() {
    let golden: Value = serde_json::from_str(include_str!("golden/gguf_sentencepiece.json")).unwrap();
    let open = |pieces: &[String]| {
        let mut good = Metadata { vocab: 420 + pieces.len(), ..Metadata::of_sentencepiece(&golden[0]) };
        good.tokens.extend(pieces.iter().map(String::as_str));
        good.kinds.extend(pieces.iter().map(|_| 1));
        good.scores.extend((0..pieces.len()).map(|i| -1000.0 - i as f32));
        good.open()
    };
    let runs = |text: &str, lengths: std::ops::Range<usize>| lengths.map(|n| text.repeat(n)).collect::<Vec<String>>();
    open(&[runs("▁", 20..65), runs("\t", 3..65), runs("=", 2..65)].concat()).expect("runs as in real models");
    let error = open(&runs("\u{1}", 2..400)).expect_err("all runs up to 400");
    assert!(error.contains("tokenizer.ggml.tokens") && error.contains("bytes in merges"), "{error}");
    let long: Vec<String> = (0..40).map(|i| format!("{i}").repeat(2000)).collect();
    let error = open(&long).expect_err("many long pieces");
    assert!(error.contains("model.gguf") && error.contains("bytes to look for merges in"), "{error}");
}

/// Guards: a padding token that there is not and tokens without a text, which llama.cpp reads, do not keep a file from being read.
#[test]
fn small_faults_are_passed_over() {
    let golden = golden();
    let mut odd = Metadata { bos: 4_000_000_000, vocab: 442, ..Metadata::of(&golden["tokenizers"][0]) };
    odd.tokens.extend(["", ""]);
    odd.kinds.extend([1, 1]);
    let source = odd.open().unwrap();
    let warnings = &source.config.warnings;
    assert!(warnings.iter().any(|text| text.contains("padding_token_id 4000000000 is ignored")), "{warnings:?}");
    let tokenizer = Tokenizer::from_bytes(sidecar(&source, "tokenizer.json"), "tokenizer.json").unwrap();
    let same = Metadata::of(&golden["tokenizers"][0]).open().unwrap();
    let original = Tokenizer::from_bytes(sidecar(&same, "tokenizer.json"), "tokenizer.json").unwrap();
    let ids = |of: &Tokenizer| of.encode("two words", Specials::Recognise).unwrap();
    assert_eq!(ids(&tokenizer), ids(&original));
}

/// Guards: a SentencePiece file that names neither BOS nor EOS has those of llama.cpp, 1 and 2.
#[test]
fn sentencepiece_has_usual_ends() {
    let golden: Value = serde_json::from_str(include_str!("golden/gguf_sentencepiece.json")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    Metadata::of_sentencepiece(&golden[0]).write(&path);
    let mut file = std::fs::read(&path).unwrap();
    for key in [b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"] {
        let at = file.windows(key.len()).position(|bytes| bytes == key).expect("the key");
        file[at + key.len() - 1] = b'x';
    }
    std::fs::write(&path, file).unwrap();
    let source = Source::open(&path).unwrap();
    assert_eq!((source.config.bos_token_id, &source.config.eos_token_ids[..]), (Some(1), &[2][..]));
    let processor: Value = serde_json::from_slice(sidecar(&source, "tokenizer.json")).unwrap();
    assert_eq!(processor["post_processor"]["single"][0]["SpecialToken"]["id"], "<s>");
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
    check(Metadata { model: "t5", ..good.clone() }, &["tokenizer model \"t5\"", "byte-level BPE", "SentencePiece"]);
    check(Metadata { pre: "falcon", ..good.clone() }, &["pre-tokenizer \"falcon\"", "smollm", "qwen2"]);
    check(Metadata { merges: vec!["a zzz"], ..good.clone() }, &["merges", "\"a zzz\""]);
    check(Metadata { merges: vec!["a"], ..good.clone() }, &["merges"]);
    check(Metadata { kinds: vec![1], ..good.clone() }, &["token_type", "1 entries"]);
    let mut twice = good.clone();
    twice.tokens[5] = twice.tokens[6];
    check(twice, &["tokens", "every token once"]);
    let mut many = good.clone();
    let names: Vec<String> = (0..440).map(|i| format!("more {i}")).collect();
    many.tokens.extend(names.iter().map(String::as_str));
    many.kinds.extend([1; 440]);
    check(many, &["tokens", "at most 440"]);
}
