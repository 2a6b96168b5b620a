use proptest::prelude::*;
use serde_json::{json, to_value};

use super::*;
use crate::testing::{CONTROL, END, bytes, bytes_json, golden, golden_json, sentencepiece_json, smollm2, tokenizer};
use crate::text_stream::TextStream;

fn ids(json: &serde_json::Value) -> Vec<u32> {
    serde_json::from_value(json.clone()).unwrap()
}

/// The pieces of `ids`, joined.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = TextStream::new(&[]);
    let pieces: String = ids.iter().map(|&id| stream.push(id, tokenizer)).collect();
    pieces + &stream.finish()
}

// Guards: a real tokenizer gives the ids that transformers gave, and their text back.
#[test]
fn golden_ids() {
    let tokenizer = smollm2();
    for prompt in golden_json("generate.json")["prompts"].as_array().unwrap() {
        let text = prompt["rendered"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, Specials::Recognise).unwrap(), ids(&prompt["prompt_ids"]), "{text}");
        for run in prompt["runs"].as_object().unwrap().values() {
            let want = run["text"].as_str().unwrap().replace("<|im_end|>", "");
            assert_eq!(streamed(&tokenizer, &ids(&run["ids"])), want);
            assert_eq!(tokenizer.decode(&ids(&run["ids"])), want);
        }
    }
}

// Guards: a long real text comes out of our own encoding path with the ids that `tokenizers` gave in Python.
#[test]
fn golden_long_text() {
    let tokenizer = smollm2();
    let want = ids(&golden_json("ppl.json")["ids"]);
    let text = tokenizer.decode(&want);
    assert_eq!(tokenizer.encode(&text, Specials::AsText).unwrap(), want);
}

/// The tokenizer in `json` as we read it, and as the library does.
fn both_readings(json: &serde_json::Value) -> (Inner, tokenizers::Tokenizer) {
    let bytes = json.to_string().into_bytes();
    (bpe::read(&bytes).unwrap_or_else(|| panic!("{json}")), tokenizers::Tokenizer::from_bytes(&bytes).unwrap())
}

// Guards: the fast way to read a file finds what the library reads, from merges in either form; and what it cannot read is left
// to the library.
#[test]
fn fast_reading() {
    let check = |json: &serde_json::Value| {
        let (ours, theirs) = both_readings(json);
        assert_eq!(ours.get_vocab(true), theirs.get_vocab(true));
        for (token, id) in theirs.get_vocab(true) {
            assert_eq!(ours.id_to_token(id), Some(token));
        }
        let parts = |part: serde_json::Result<serde_json::Value>| part.unwrap();
        assert_eq!(parts(to_value(ours.get_normalizer())), parts(to_value(theirs.get_normalizer())));
        assert_eq!(parts(to_value(ours.get_pre_tokenizer())), parts(to_value(theirs.get_pre_tokenizer())));
        assert_eq!(parts(to_value(ours.get_post_processor())), parts(to_value(theirs.get_post_processor())));
        assert_eq!(parts(to_value(ours.get_decoder())), parts(to_value(theirs.get_decoder())));
        assert_eq!(parts(to_value(ours.get_added_vocabulary())), parts(to_value(theirs.get_added_vocabulary())));
        for text in ["", "a", "Once upon a time, 1234 <|im_end|> ab ba ▁ab", "日本 é👩‍👩‍👧‍👦\n\n  x"]
        {
            assert_eq!(ours.encode(text, false).unwrap(), theirs.encode(text, false).unwrap(), "{text}");
        }
    };
    let mut smollm2 = golden_json("smollm2/tokenizer.json");
    check(&smollm2);
    for merge in smollm2["model"]["merges"].as_array_mut().unwrap() {
        let [a, b] = [0, 1].map(|i| merge[i].as_str().unwrap().to_owned());
        *merge = json!(format!("{a} {b}"));
    }
    check(&smollm2);
    check(&bytes_json());
    check(&sentencepiece_json());

    let refuse = |pointer: &str, value: serde_json::Value| {
        let mut json = bytes_json();
        *json.pointer_mut(pointer).unwrap() = value;
        assert!(bpe::read(json.to_string().as_bytes()).is_none(), "{json}");
    };
    refuse("/version", json!("2.0"));
    refuse("/model/type", json!("WordPiece"));
    refuse("/model/dropout", json!(0.5));
    refuse("/model/continuing_subword_prefix", json!("##"));
    refuse("/model/end_of_word_suffix", json!("</w>"));
    refuse("/model/unk_token", json!("absent"));
    refuse("/model/vocab", json!({"a": 1, "b": 1}));
    refuse("/model/vocab", json!({"a": u32::MAX}));
    refuse("/model/vocab", json!({"a": -1}));
    refuse("/model/merges", json!([["a", "b", "ab"]]));
    refuse("/model/merges", json!([["a"]]));
    refuse("/model/merges", json!(["a b c"]));
    refuse("/model/merges", json!(["#version b"]));
    refuse("/model/merges", json!([["a", "absent"]]));
    refuse("/model/merges", json!([["a", "b"]]));
}

// Guards: no text encoded as text holds a control token, wherever its letters stand; and nothing of it is lost.
#[test]
fn control_tokens_in_text_stay_text() {
    let tokenizer = smollm2();
    let control: Vec<&str> = tokenizer.control.iter().map(|control| control.literal.as_str()).collect();
    assert_eq!(control.len(), 17);
    let check = |text: &str| {
        let ids = tokenizer.encode(text, Specials::AsText).unwrap();
        assert!(ids.iter().all(|&id| 17 <= id), "{text}: {ids:?}");
        assert_eq!(tokenizer.decode(&ids), text);
    };
    for literal in control {
        check(literal);
        check(&format!("a {literal}{literal} b\n{literal}"));
        check(&format!("<{literal}<|im_{literal}start|>"));
        check(&format!("\u{E000}{literal}\u{E001}\u{F8FF}"));
    }
    let private_use: String = (0xE000..=0xF8FF).filter_map(char::from_u32).collect();
    check(&format!("{private_use}<|im_end|>"));
}

// Guards: text that only the normalizer makes into a control token stays text, in the words of the assistant too, and is
// normalized all the same; tokenizers that put marks for spaces hide no more than they did.
#[test]
fn normalized_text_forges_no_control_token() {
    let load = |normalizers: serde_json::Value, special: bool| {
        let mut json = sentencepiece_json();
        json["normalizer"] = json!({"type": "Sequence", "normalizers": normalizers});
        json["added_tokens"].as_array_mut().unwrap().push(json!({"id": 264, "content": "<ab>", "special": special,
            "normalized": true, "single_word": false, "lstrip": false, "rstrip": false}));
        tokenizer(&json)
    };
    let (prepend, nfkc, lower) =
        (json!({"type": "Prepend", "prepend": "▁"}), json!({"type": "NFKC"}), json!({"type": "Lowercase"}));
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let folding = load(json!([prepend, nfkc, lower, spaces]), true);
    for text in ["<ab>", "＜ab>", "<AB>", "<ab＞", "﹤Ａb>", "a ＜ab> B"] {
        assert!(folding.encode(text, Specials::Recognise).unwrap().contains(&264), "{text}");
        let mask = Mask::new(&folding, [text]).unwrap();
        for masked in [mask.all(text), mask.specials(text)] {
            let ids = folding.encode_masked(&masked, &mask).unwrap();
            assert!(!ids.contains(&264), "{text}: {ids:?}");
            assert_eq!(mask.unmask(&masked), text);
        }
    }
    let as_text = |text: &str| folding.encode(text, Specials::AsText).unwrap();
    assert_eq!(as_text("a＜B"), as_text("a<b"));
    let plain = load(json!([prepend, spaces]), true);
    assert!(plain.control.iter().all(|control| control.soft_first.is_none()));
    assert_eq!(plain.encode("a <ab", Specials::AsText).unwrap(), plain.encode("a <ab", Specials::Recognise).unwrap());
}

// Guards: only markup is taken for control; words and spaces that a tokenizer adds to save tokens are kept.
#[test]
fn added_words_are_not_control() {
    let tokenizer = bytes();
    assert_eq!(tokenizer.control.len(), 4);
    let spaces = 256 + CONTROL.iter().position(|literal| *literal == "  ").unwrap() as u32;
    assert_eq!(tokenizer.encode("a  b", Specials::AsText).unwrap(), [97, spaces, 98]);
    assert_eq!(tokenizer.encode("<end>", Specials::AsText).unwrap(), b"<end>".map(u32::from));
    assert_eq!(tokenizer.encode("<end>", Specials::Recognise).unwrap(), [END]);
    assert_eq!(tokenizer.control_token("<end>"), Some(END));
}

// Guards: sentencepiece-like models: spaces at the beginning and bytes of one character over several tokens.
#[test]
fn sentencepiece() {
    let tokenizer = tokenizer(&sentencepiece_json());
    assert_eq!(tokenizer.encode("a b", Specials::AsText).unwrap(), [259, 260]);
    assert_eq!(tokenizer.encode("a</s> b", Specials::Recognise).unwrap(), [259, 263, 256, 260]);
    let check = |ids: &[u32], want: &str| {
        assert_eq!(streamed(&tokenizer, ids), want, "{ids:?}");
        assert_eq!(tokenizer.decode(ids), want, "{ids:?}");
    };
    check(&[259, 260], "a b");
    check(&[263, 259, 260], "a b");
    check(&[257, 0xE4, 0xBD, 0xA0, 258], "a你b");
    check(&[257, 0xE4, 0xBD, 258], "a\u{FFFD}b");
    check(&[257, 0xF0, 0x9F, 0x98], "a\u{FFFD}");
    check(&[9999, 257], "a");
}

// Guards: a damaged or foreign tokenizer is an error that names the file; nothing panics.
#[test]
fn refused_files() {
    let mut foreign = sentencepiece_json();
    foreign["decoder"] = json!({"type": "Telepathy"});
    let error = Tokenizer::from_bytes(foreign.to_string().as_bytes(), "t.json").err().unwrap();
    assert!(matches!(&error, TokenizerError::Format { path, .. } if path.ends_with("t.json")), "{error}");
    let whole = sentencepiece_json().to_string();
    for len in (0..whole.len()).filter(|&len| whole.is_char_boundary(len)).step_by(7) {
        assert!(Tokenizer::from_bytes(&whole.as_bytes()[..len], "t.json").is_err(), "{len}");
    }
    let absent = Tokenizer::load(golden("absent.json")).err().unwrap();
    assert!(matches!(&absent, TokenizerError::Read { path, .. } if path.ends_with("absent.json")), "{absent}");
}

// Guards: no file's steps, however many, make memory full of a short text; those of published tokenizers are far from that.
#[test]
fn steps_that_grow_are_refused() {
    let replace =
        |pattern: serde_json::Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
    let text = |pattern: &str, content: &str| replace(json!({"String": pattern}), content);
    let normalizers = |steps: &[serde_json::Value]| json!({"normalizer": {"type": "Sequence", "normalizers": steps}});
    let decoders = |steps: &[serde_json::Value]| json!({"decoder": {"type": "Sequence", "decoders": steps}});
    let load = |parts: &serde_json::Value, more: &serde_json::Value| {
        let mut json = sentencepiece_json();
        for (part, value) in [parts, more].into_iter().flat_map(|parts| parts.as_object().unwrap()) {
            json[part] = value.clone();
        }
        Tokenizer::from_bytes(json.to_string().as_bytes(), "t.json").map(drop).map_err(|why| why.to_string())
    };
    // One that our own reader takes, and one that it leaves to the library.
    let (pairs, words) = (json!({}), json!({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}));
    let refuse = |parts: serde_json::Value, want: &str| {
        for model in [&pairs, &words] {
            let error = load(&parts, model).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
    };
    let doubling = vec![text("a", "aa"); 50];
    refuse(normalizers(&doubling), "pre_tokenizer could make a text 1125899906842624 times as long, need at most 1024");
    refuse(decoders(&doubling), "decoder could make a text 1125899906842624 times");
    refuse(normalizers(&[replace(json!({"Regex": "x?"}), &"y".repeat(1024))]), " 2049 times");
    refuse(normalizers(&[json!({"type": "Prepend", "prepend": "y".repeat(1024)})]), " 1025 times");
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    refuse(
        json!({"pre_tokenizer": {"type": "Sequence", "pretokenizers": vec![byte_level; 64]}}),
        "pre_tokenizer could",
    );
    // No trie, "x", and a text of 1026 bytes.
    let charsmap = format!("AAAAAHgA{}", "eXl5".repeat(342));
    refuse(json!({"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap}}), "text 1026 times");

    let spaces = [json!({"type": "NFKC"}), json!({"type": "Prepend", "prepend": "▁"}), text(" ", "▁")];
    assert_eq!(load(&normalizers(&spaces), &pairs), Ok(()));
    assert_eq!(load(&decoders(&vec![text("aa", "a"); 50]), &pairs), Ok(()));
}

// Guards: a raw prompt opens as transformers and llama.cpp open it: what the post-processor puts before a text, nothing of
// what it puts behind one, unless the configuration says otherwise.
#[test]
fn openings() {
    let token = |text: &str| json!({"SpecialToken": {"id": text, "type_id": 0}});
    let (text, special) = (
        json!({"Sequence": {"id": "A", "type_id": 0}}),
        json!({"</s>": {"id": "</s>", "ids": [263], "tokens": ["</s>"]}}),
    );
    let template = |single: &[&serde_json::Value]| {
        let kind = "TemplateProcessing";
        json!({"type": kind, "single": single, "pair": single, "special_tokens": special})
    };
    let bos = token("</s>");
    let check = |post_processor: serde_json::Value, config: Option<&str>, want: &[u32]| {
        let folder = tempfile::tempdir().unwrap();
        let mut json = sentencepiece_json();
        json["post_processor"] = post_processor.clone();
        std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
        if let Some(config) = config {
            std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        }
        let tokenizer = Tokenizer::load(folder.path().join("tokenizer.json")).unwrap();
        assert_eq!(tokenizer.opening(), want, "{post_processor} {config:?}");
        assert_eq!(tokenizer.encode("a", Specials::Recognise).unwrap(), [259]);
    };
    let (before, both, behind) = (template(&[&bos, &text]), template(&[&bos, &text, &bos]), template(&[&text, &bos]));
    check(json!(null), None, &[]);
    check(before.clone(), None, &[263]);
    check(both, Some("{}"), &[263]);
    check(behind, None, &[]);
    check(before.clone(), Some(r#"{"add_bos_token": true, "bos_token": "</s>"}"#), &[263]);
    check(before, Some(r#"{"add_bos_token": false, "bos_token": "</s>"}"#), &[]);
    check(json!(null), Some(r#"{"add_bos_token": true, "bos_token": {"content": "</s>"}}"#), &[263]);
    check(json!(null), Some(r#"{"bos_token": "</s>"}"#), &[]);

    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), sentencepiece_json().to_string()).unwrap();
    for (config, want) in [(r#"{"add_bos_token": true, "bos_token": "<x>"}"#, "<x>"), ("{", "EOF")] {
        std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        let error = Tokenizer::load(folder.path().join("tokenizer.json")).err().unwrap().to_string();
        assert!(error.contains("tokenizer_config.json") && error.contains(want), "{error}");
    }
}

// Guards: what is wrong with a tokenizer and shows only when a text meets it is an error then; nothing panics.
#[test]
fn refused_when_encoding() {
    let mut json = bytes_json();
    // An empty trie in the precompiled form of sentencepiece.
    json["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="});
    let damaged = tokenizer(&json);
    for specials in [Specials::Recognise, Specials::AsText] {
        let error = damaged.encode("hi", specials).err().unwrap();
        assert!(matches!(error, TokenizerError::Encode { len_bytes: 2, .. }), "{error}");
    }
}

/// The sentencepiece-like tokenizer with other parts.
fn with_parts(parts: &serde_json::Value) -> Tokenizer {
    let mut json = sentencepiece_json();
    for (part, value) in parts.as_object().unwrap() {
        json[part] = value.clone();
    }
    tokenizer(&json)
}

/// One tokenizer for each decoder of the library, and for orders of parts that the quick path must not take.
fn every_decoder() -> Vec<Tokenizer> {
    let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let strip = |start, stop| json!({"type": "Strip", "content": " ", "start": start, "stop": stop});
    let (bytes, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
    let metaspace = |scheme| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
    let sequence = |decoders: &[&serde_json::Value]| json!({"type": "Sequence", "decoders": decoders});
    let decoders = [
        json!(null),
        json!({"type": "WordPiece", "prefix": "▁", "cleanup": true}),
        json!({"type": "BPEDecoder", "suffix": "b"}),
        json!({"type": "CTC", "pad_token": "ab", "word_delimiter_token": "▁", "cleanup": true}),
        json!({"type": "Replace", "pattern": {"Regex": "[▁a]"}, "content": "-"}),
        metaspace("always"),
        metaspace("first"),
        metaspace("never"),
        fuse.clone(),
        sequence(&[&replace, &fuse, &strip(2, 0)]),
        sequence(&[&replace, &strip(1, 0), &fuse]),
        sequence(&[&replace, &fuse, &strip(0, 1)]),
        sequence(&[&fuse, &replace]),
        sequence(&[&sequence(&[&replace]), &sequence(&[&fuse])]),
    ];
    // Without bytes: what becomes of a broken character is ours to say, and tested above.
    let made = decoders.iter().map(|decoder| with_parts(&json!({"decoder": decoder})));
    made.chain([with_parts(&json!({"decoder": sequence(&[&bytes, &replace])}))]).collect()
}

// Guards: what a tokenizer does to text before it cuts it reaches text that is encoded as text, too: unicode forms, case,
// accents, spaces before words, other ways of cutting.
#[test]
fn normalizers_and_pre_tokenizers() {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let sequence = |first: serde_json::Value| json!({"type": "Sequence", "normalizers": [first, replace.clone()]});
    let check = |parts: serde_json::Value, text: &str, want: &str| {
        let tokenizer = with_parts(&parts);
        let theirs = tokenizer.encode(text, Specials::Recognise).unwrap();
        assert_eq!(tokenizer.encode(text, Specials::AsText).unwrap(), theirs, "{parts}");
        assert_eq!(tokenizer.decode(&theirs), want, "{parts}");
    };
    check(json!({"normalizer": sequence(json!({"type": "NFKC"}))}), "ﬁ e\u{301}²", "fi é2");
    check(json!({"normalizer": sequence(json!({"type": "NFD"}))}), "é", "e\u{301}");
    check(json!({"normalizer": sequence(json!({"type": "Lowercase"}))}), "A BÉ", "a bé");
    check(json!({"normalizer": sequence(json!({"type": "StripAccents"}))}), "e\u{301}", "e");
    check(
        json!({"normalizer": sequence(json!({"type": "Strip", "strip_left": true, "strip_right": true}))}),
        "  a ",
        "a",
    );
    let regex = json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "});
    check(json!({"normalizer": sequence(regex)}), "a    b", "a b");
    for scheme in ["always", "first", "never"] {
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
        check(json!({"normalizer": null, "pre_tokenizer": metaspace, "decoder": metaspace}), "ab a", "ab a");
    }
    let digits = json!({"type": "Digits", "individual_digits": true});
    check(json!({"pre_tokenizer": digits}), "a12b ab", "a12b ab");
}

fn mixed_text() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        "[a-zA-Z0-9 .,'\n\t-]{0,12}",
        "[àéîöüßñçœ]{1,4}",
        "[\u{4E00}-\u{4FFF}\u{3040}-\u{30FF}]{1,4}",
        "[\u{0600}-\u{06FF}\u{0900}-\u{097F}]{1,4}",
        "[\u{1F300}-\u{1F6FF}]{1,3}",
        Just("👩‍👩‍👧‍👦🏽e\u{301}\u{FE0F}\u{200D}".to_owned()),
        "[<>|_\\[\\]{}#*`]{1,5}",
        "\\PC{0,6}",
    ];
    prop::collection::vec(part, 0..10).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    // Guards: for text without control tokens our own encoding path gives the ids of `tokenizers`, and back again.
    #[test]
    fn equals_tokenizers(text in mixed_text()) {
        thread_local!(static TOKENIZERS: [Tokenizer; 2] = [smollm2(), tokenizer(&sentencepiece_json())]);
        TOKENIZERS.with(|[smollm2, sentencepiece]| {
            for tokenizer in [smollm2, sentencepiece] {
                let theirs = tokenizer.encode(&text, Specials::Recognise).unwrap();
                prop_assert_eq!(tokenizer.encode(&text, Specials::AsText).unwrap(), theirs);
            }
            let ids = smollm2.encode(&text, Specials::AsText).unwrap();
            prop_assert_eq!(streamed(smollm2, &ids), text);
            Ok(())
        })?;
    }

    // Guards: our byte-pair encoding cuts any word as the library's does, whatever the merges, their order and the ways to stand in
    // for a character without a token: the same ids, texts and places.
    #[test]
    fn byte_pairs_equal_tokenizers(
        merges in prop::collection::vec("[abé]{2,5}", 0..24),
        (fuse, fallback, whole, unknown) in any::<(bool, bool, bool, bool)>(),
        words in prop::collection::vec("[abéxyß<]{0,24}", 8),
    ) {
        let mut vocab: Vec<String> = ["?", "a", "b", "é", "<0x78>", "<0xC3>", ""].map(str::to_owned).to_vec();
        let mut pairs: Vec<[String; 2]> = Vec::new();
        for merged in merges {
            // Cut at each place in turn, where both parts are tokens by then.
            for (at, _) in merged.char_indices().skip(1) {
                let (left, right) = merged.split_at(at);
                let pair = [left.to_owned(), right.to_owned()];
                if pair.iter().all(|part| vocab.contains(part)) {
                    pairs.push(pair);
                    if !vocab.contains(&merged) {
                        vocab.push(merged.clone());
                    }
                }
            }
        }
        let mut json = bytes_json();
        json["pre_tokenizer"] = json!(null);
        json["added_tokens"] = json!([]);
        json["model"] = json!({"type": "BPE", "unk_token": unknown.then_some("?"), "fuse_unk": fuse,
            "byte_fallback": fallback, "ignore_merges": whole, "merges": pairs,
            "vocab": vocab.into_iter().zip(0..).collect::<std::collections::HashMap<String, u32>>()});
        let (ours, theirs) = both_readings(&json);
        for word in words {
            let [ours, theirs] = [ours.get_model().tokenize(&word), theirs.get_model().tokenize(&word)];
            prop_assert_eq!(ours.unwrap(), theirs.unwrap(), "{} {}", word, json);
        }
    }

    // Guards: any ids, also ones that cut characters, stream to the text that `tokenizers` decodes.
    #[test]
    fn stream_equals_decode(ids in prop::collection::vec(0_u32..49_200, 0..40)) {
        thread_local!(static SMOLLM2: Tokenizer = smollm2());
        SMOLLM2.with(|tokenizer| {
            prop_assert_eq!(streamed(tokenizer, &ids), tokenizer.inner.decode(&ids, true).unwrap());
            Ok(())
        })?;
    }

    // Guards: every decoder of the library streams: the pieces add up to what it gives for all ids at once.
    #[test]
    fn every_decoder_streams(ids in prop::collection::vec(prop_oneof![Just(0x41_u32), 0x61..0x63_u32, 256..265_u32], 0..14)) {
        thread_local!(static ALL: Vec<Tokenizer> = every_decoder());
        ALL.with(|all| {
            for tokenizer in all {
                // Without a token that is part of the text the library has nothing to decode, and panics.
                let is_text = ids.iter().any(|id| *id < 263);
                let want = if is_text { tokenizer.inner.decode(&ids, true).unwrap() } else { String::new() };
                prop_assert_eq!(streamed(tokenizer, &ids), &*want, "{:?}", tokenizer.decoder);
                prop_assert_eq!(tokenizer.decode(&ids), want);
            }
            Ok(())
        })?;
    }
}
