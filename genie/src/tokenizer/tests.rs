use proptest::prelude::*;
use serde_json::json;

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
    let load = |json: &serde_json::Value| Tokenizer::from_bytes(json.to_string().as_bytes(), "t.json").err().unwrap();
    let mut foreign = bytes_json();
    foreign["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    assert!(matches!(load(&foreign), TokenizerError::Decoder { decoder, .. } if decoder.contains("WordPiece")));
    foreign["decoder"] = json!(null);
    assert!(matches!(load(&foreign), TokenizerError::Decoder { .. }));
    foreign["decoder"] = json!({"type": "Strip", "content": " ", "start": 1, "stop": 1});
    assert!(matches!(load(&foreign), TokenizerError::Decoder { .. }));
    let whole = sentencepiece_json().to_string();
    for len in (0..whole.len()).filter(|&len| whole.is_char_boundary(len)).step_by(7) {
        assert!(Tokenizer::from_bytes(&whole.as_bytes()[..len], "t.json").is_err(), "{len}");
    }
    let absent = Tokenizer::load(golden("absent.json")).err().unwrap();
    assert!(matches!(&absent, TokenizerError::Read { path, .. } if path.ends_with("absent.json")), "{absent}");
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

    // Guards: any ids, also ones that cut characters, stream to the text that `tokenizers` decodes.
    #[test]
    fn stream_equals_decode(ids in prop::collection::vec(0_u32..49_200, 0..40)) {
        thread_local!(static SMOLLM2: Tokenizer = smollm2());
        SMOLLM2.with(|tokenizer| {
            prop_assert_eq!(streamed(tokenizer, &ids), tokenizer.inner.decode(&ids, true).unwrap());
            Ok(())
        })?;
    }
}
