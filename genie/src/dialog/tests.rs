use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::adapters::AdapterChoice;
use crate::config::{ContextConfig, SamplerConfig, TokenPenalty};
use crate::engine::AdapterSource;
use crate::engine::scripted::Scripted;
use crate::testing::{END, bytes, bytes_after_bos, sentencepiece_json, tokenizer};
use crate::{Code, sampler::SamplerError};

const N_VOCAB: usize = 261;
const CONTEXT: usize = 64;

fn settings(sampler: SamplerConfig) -> Settings {
    let context = ContextConfig {
        size: CONTEXT,
        n_vocab: N_VOCAB,
        bos_token: None,
        eos_tokens: vec![END, END + 2],
        pad_token: None,
    };
    Settings { context, sampler, stop_sequences: Vec::new(), max_num_tokens: u32::MAX }
}

fn greedy() -> SamplerConfig {
    SamplerConfig { greedy: true, ..SamplerConfig::default() }
}

fn dialog_over(engine: Scripted, settings: Settings) -> Dialog {
    let template = "{% for m in messages %}<user>{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}\
                    {% endfor %}<bot>";
    let template = ChatTemplate::new(template.to_owned(), Vec::new()).unwrap();
    Dialog::with_engine(settings, Box::new(engine), bytes(), Some(template.into())).unwrap()
}

/// A model whose every answer is `reply` and then the end token.
fn replying(reply: &[u8]) -> Dialog {
    let reply: Vec<u32> = reply.iter().map(|&byte| byte.into()).collect();
    dialog_over(Scripted::replying(N_VOCAB, CONTEXT, &reply, END), settings(greedy()))
}

/// A model whose answer depends on every token before it, and the count of tokens it consumed.
fn hashed(max_num_tokens: u32) -> (Dialog, Arc<AtomicUsize>) {
    let engine = Scripted::hashed(N_VOCAB, CONTEXT);
    let consumed = engine.consumed();
    let sampler = SamplerConfig { seed: Some(7), temp: 1.5, top_k: 0, ..SamplerConfig::default() };
    (dialog_over(engine, Settings { max_num_tokens, ..settings(sampler) }), consumed)
}

type Pieces = Vec<(String, SentenceCode)>;

fn ask(dialog: &mut Dialog, prompt: &str, code: SentenceCode) -> Result<(Pieces, QueryReport), Error> {
    let mut pieces = Vec::new();
    let report = dialog.query(prompt, code, |piece, code| {
        pieces.push((piece.to_owned(), code));
        Flow::Continue
    })?;
    Ok((pieces, report))
}

fn ids(text: &str) -> Vec<u32> {
    bytes().encode(text, Specials::Recognise).unwrap()
}

fn text_of(pieces: &Pieces) -> String {
    pieces.iter().map(|(piece, _)| piece.as_str()).collect()
}

// Guards: a dialog may move to another thread.
#[test]
fn dialog_is_send() {
    fn check<T: Send>() {}
    check::<Dialog>();
    fn check_shared<T: Send + Sync>() {}
    check_shared::<Signal>();
    check_shared::<Tokenizer>();
}

// Guards: a callback sees Begin once, first, and End once, last, whatever the answer.
#[test]
fn sentence_codes_out() {
    use SentenceCode::{Begin, Continue, End};
    let check = |reply: &str, max: u32, want: &[(&str, SentenceCode)], finish: Finish| {
        let mut dialog = replying(reply.as_bytes());
        dialog.set_max_num_tokens(max);
        let (pieces, report) = ask(&mut dialog, "?", SentenceCode::Complete).unwrap();
        let want: Pieces = want.iter().map(|&(piece, code)| (piece.to_owned(), code)).collect();
        assert_eq!((pieces, report.finish), (want, finish), "{reply:?}");
    };
    check("abc", 9, &[("a", Begin), ("b", Continue), ("c", Continue), ("", End)], Finish::Eos);
    check("abc", 3, &[("a", Begin), ("b", Continue), ("c", End)], Finish::Length);
    check("abc", 1, &[("a", Begin), ("", End)], Finish::Length);
    check("abc", 0, &[("a", Begin), ("", End)], Finish::Length);
    check("", 9, &[("", Begin), ("", End)], Finish::Eos);
    check("é!", 9, &[("é", Begin), ("!", Continue), ("", End)], Finish::Eos);
    check("aé", 2, &[("a", Begin), ("\u{FFFD}", End)], Finish::Length);
}

// Guards: BOS stands once, at the beginning of a conversation, whether the prompt has it or not; never in the middle, and
// never before ids that the caller gives.
#[test]
fn raw_prompts_open_with_bos() {
    use SentenceCode::{Begin, Complete, Continue, End, Rewind};
    let dialog = || {
        let engine = Box::new(Scripted::replying(N_VOCAB, CONTEXT, &[], END));
        Dialog::with_engine(settings(greedy()), engine, bytes_after_bos(), None).unwrap()
    };
    let check = |parts: &[(&str, SentenceCode)], want: &[u32]| {
        let mut dialog = dialog();
        for (part, code) in parts {
            ask(&mut dialog, part, *code).unwrap();
        }
        assert_eq!(dialog.history(), want, "{parts:?}");
    };
    let (a, b, bos, end) = (97, 98, END + 1, END);
    check(&[("a", Complete)], &[bos, a, end]);
    check(&[("<user>a", Complete)], &[bos, a, end]);
    check(&[("a", Complete), ("b", Complete)], &[bos, a, end, b, end]);
    check(&[("a", Begin), ("b", Continue), ("", End)], &[bos, a, b, end]);
    check(&[("a", Complete), ("b", Rewind)], &[bos, b, end]);
    let mut by_ids = dialog();
    by_ids.token_query(&[a], Complete, |_, _| Flow::Continue).unwrap();
    assert_eq!(by_ids.history(), [a, end]);
}

// Guards: parts of a prompt give the answer that the whole gives, and nothing is said before End.
#[test]
fn parts_equal_the_whole() {
    let (mut whole, _) = hashed(12);
    let (want, _) = ask(&mut whole, "one two three", SentenceCode::Complete).unwrap();
    let check = |parts: &[(&str, SentenceCode)], last: &str| {
        let (mut dialog, consumed) = hashed(12);
        for &(part, code) in parts {
            let (pieces, report) = ask(&mut dialog, part, code).unwrap();
            assert_eq!((pieces.len(), report.finish, report.code()), (0, Finish::PrefillOnly, Code::Success));
        }
        assert_eq!(consumed.load(Ordering::Relaxed), dialog.context_occupancy());
        assert_eq!(ask(&mut dialog, last, SentenceCode::End).unwrap().0, want);
        assert_eq!(dialog.history(), whole.history());
    };
    use SentenceCode::{Begin, Continue};
    check(&[("one ", Begin)], "two three");
    check(&[("one ", Begin), ("two", Continue), (" ", Continue)], "three");
    check(&[("one two three", Begin)], "");
    check(&[("", Begin)], "one two three");
}

// Guards: sentence codes out of order are refused and change nothing.
#[test]
fn sentence_order() {
    use SentenceCode::{Abort, Begin, Complete, Continue, End, Resume, Rewind};
    let (mut dialog, _) = hashed(3);
    let refuse = |dialog: &mut Dialog, codes: &[SentenceCode]| {
        let before = dialog.history().to_vec();
        for &code in codes {
            let error = ask(dialog, "x", code).unwrap_err();
            assert!(matches!(error, Error::SentenceOrder { code: found, .. } if found == code), "{error}");
            assert_eq!(error.code(), Code::InvalidArgument);
        }
        assert_eq!(dialog.history(), before);
    };
    refuse(&mut dialog, &[Continue, End, Abort, Resume]);
    ask(&mut dialog, "a", Complete).unwrap();
    let before = dialog.history().to_vec();
    ask(&mut dialog, "b", Begin).unwrap();
    refuse(&mut dialog, &[Complete, Begin, Rewind, Resume]);
    ask(&mut dialog, "c", Continue).unwrap();
    let (pieces, report) = ask(&mut dialog, "", Abort).unwrap();
    assert_eq!((pieces, report.code()), (vec![(String::new(), Abort)], Code::WarningAborted));
    assert_eq!(dialog.history(), before);
    refuse(&mut dialog, &[End]);
    ask(&mut dialog, "b", Begin).unwrap();
    dialog.reset();
    refuse(&mut dialog, &[End]);
    assert!(matches!(ask(&mut dialog, "", Complete), Err(Error::EmptyPrompt)));
}

// Guards: the end token is part of the conversation, so that the next turn continues as the template has it.
#[test]
fn turns_continue_behind_the_end_token() {
    let mut dialog = replying(b"hi");
    ask(&mut dialog, "<user>a<bot>", SentenceCode::Complete).unwrap();
    assert_eq!(dialog.history(), ids("<user>a<bot>hi<end>"));
    ask(&mut dialog, "<user>b<bot>", SentenceCode::Complete).unwrap();
    assert_eq!(dialog.history(), ids("<user>a<bot>hi<end><user>b<bot>hi<end>"));
    assert_eq!(dialog.context_occupancy(), 12);
}

// Guards: a further turn of a chat costs only what is new, and gives what a fresh dialog gives.
#[test]
fn chat_keeps_the_common_prefix() {
    let mut dialog = replying(b"hi");
    let mut messages = vec![Message::new("user", "one")];
    dialog.chat(&messages, |_, _| Flow::Continue).unwrap();
    messages.extend([Message::new("assistant", "hi"), Message::new("user", "two")]);
    let report = dialog.chat(&messages, |_, _| Flow::Continue).unwrap();
    // "<user>one<bot>" is in the template's text for both, "hi" follows "<user>" only in the second.
    assert_eq!((report.n_prompt_tokens, report.n_cached_tokens), (13, 4));
    assert_eq!(dialog.history(), ids("<user>one<user>hi<end><user>two<bot>hi<end>"));
    dialog.chat(&[], |_, _| Flow::Continue).unwrap();

    let mut bare = dialog_over(Scripted::hashed(N_VOCAB, CONTEXT), settings(greedy()));
    bare.template = None;
    let error = bare.chat(&messages, |_, _| Flow::Continue).unwrap_err();
    assert!(matches!(error, Error::NoTemplate { .. }), "{error}");
}

// Guards: rewinding computes only what differs and answers as a fresh dialog does.
#[test]
fn rewind_equals_fresh() {
    let check = |first: &str, second: &str, cost: usize| {
        let (mut dialog, consumed) = hashed(5);
        ask(&mut dialog, first, SentenceCode::Complete).unwrap();
        dialog.sampler.reset();
        let before = consumed.load(Ordering::Relaxed);
        let (pieces, report) = ask(&mut dialog, second, SentenceCode::Rewind).unwrap();
        // Four more steps for an answer of five tokens.
        assert_eq!(consumed.load(Ordering::Relaxed) - before, cost + 4, "{first:?} {second:?}");
        assert_eq!(report.n_prompt_tokens - report.n_cached_tokens, cost);
        let (mut fresh, _) = hashed(5);
        assert_eq!(pieces, ask(&mut fresh, second, SentenceCode::Complete).unwrap().0);
        assert_eq!(dialog.history(), fresh.history());
    };
    check("same start, old", "same start, new one", 7);
    check("same", "same", 1);
    check("longer than that", "longer", 1);
    check("other", "entirely", 8);
}

// Guards: a prompt that does not fit is refused before work, one that just fits is answered, and the dialog lives on.
#[test]
fn context_full() {
    for prompt in 1..CONTEXT + 3 {
        let (mut dialog, consumed) = hashed(u32::MAX);
        dialog.settings.context.eos_tokens.clear();
        match ask(&mut dialog, &"x".repeat(prompt), SentenceCode::Complete) {
            Ok((_, report)) => {
                assert!(prompt <= CONTEXT);
                assert_eq!((report.finish, report.code()), (Finish::ContextExceeded, Code::WarningContextExceeded));
                assert_eq!(report.n_generated, CONTEXT - prompt + 1);
                assert_eq!(consumed.load(Ordering::Relaxed), CONTEXT);
                let error = ask(&mut dialog, "y", SentenceCode::Complete).unwrap_err();
                assert!(matches!(error, Error::ContextExceeded { have: CONTEXT, need, .. } if need == CONTEXT + 2));
                assert_eq!(consumed.load(Ordering::Relaxed), CONTEXT);
            }
            Err(error) => {
                assert!(CONTEXT < prompt);
                assert!(matches!(error, Error::ContextExceeded { have: CONTEXT, need, .. } if need == prompt));
                assert_eq!(error.code(), Code::WarningContextExceeded);
                assert_eq!((consumed.load(Ordering::Relaxed), dialog.context_occupancy()), (0, 0));
            }
        }
        dialog.set_max_num_tokens(2);
        assert_eq!(ask(&mut dialog, "z", SentenceCode::Rewind).unwrap().1.n_generated, 2);
    }
}

// Guards: a model with a smaller cache than the config states is never overrun.
#[test]
fn smaller_of_two_contexts() {
    let mut dialog = dialog_over(Scripted::hashed(N_VOCAB, 10), settings(greedy()));
    dialog.settings.context.eos_tokens.clear();
    assert_eq!(dialog.context_size(), 10);
    assert_eq!(ask(&mut dialog, "x", SentenceCode::Complete).unwrap().1.n_generated, 10);
}

// Guards: several end tokens, stop sequences over token edges, a control token as a stop sequence, and the callback end
// an answer, and the text says so.
#[test]
fn ends() {
    let check = |reply: &[u8], stops: &str, want: &str, finish: Finish| {
        let mut dialog = replying(reply);
        dialog.set_stop_sequence(stops).unwrap();
        let (pieces, report) = ask(&mut dialog, "?", SentenceCode::Complete).unwrap();
        assert_eq!((text_of(&pieces).as_str(), report.finish), (want, finish), "{stops}");
        assert_eq!(pieces.last().unwrap().1, SentenceCode::End);
    };
    check(b"one STOP two", r#"{"stop-sequence": ["STOP"]}"#, "one ", Finish::StopSequence);
    check(b"one STO", r#"{"stop-sequence": ["STOP"]}"#, "one STO", Finish::Eos);
    check(b"one STOP", "{}", "one STOP", Finish::Eos);
    check(b"one STOP", "", "one STOP", Finish::Eos);

    let reply = [u32::from(b'a'), END + 1, u32::from(b'b')];
    let engine = Scripted::replying(N_VOCAB, CONTEXT, &reply, END + 2);
    let mut dialog = dialog_over(engine, settings(greedy()));
    let (pieces, report) = ask(&mut dialog, "?", SentenceCode::Complete).unwrap();
    assert_eq!((text_of(&pieces).as_str(), report.finish), ("ab", Finish::Eos));
    dialog.set_stop_sequence(r#"{"stop-sequence": ["<user>"]}"#).unwrap();
    let (pieces, report) = ask(&mut dialog, "?", SentenceCode::Rewind).unwrap();
    assert_eq!((text_of(&pieces).as_str(), report.finish), ("a", Finish::StopSequence));

    // An end token with a text of its own, which is not part of the answer.
    let engine = Scripted::replying(N_VOCAB, CONTEXT, &[97, 98], u32::from(b'!'));
    let mut dialog = dialog_over(engine, settings(greedy()));
    dialog.settings.context.eos_tokens = vec![u32::from(b'!')];
    let (pieces, report) = ask(&mut dialog, "?", SentenceCode::Complete).unwrap();
    assert_eq!((text_of(&pieces).as_str(), report.finish), ("ab", Finish::Eos));
    assert_eq!(dialog.history(), ids("?ab!"));

    let mut dialog = replying(b"abcdef");
    let mut pieces = Vec::new();
    let report = dialog.query("?", SentenceCode::Complete, |piece, _| {
        pieces.push(piece.to_owned());
        if pieces.len() == 3 { Flow::Stop } else { Flow::Continue }
    });
    assert_eq!((pieces.concat().as_str(), report.unwrap().finish), ("abc", Finish::Stopped));
    assert_eq!(dialog.history(), ids("?abc"));
    assert_eq!(text_of(&ask(&mut dialog, "", SentenceCode::Complete).unwrap().0), "def");
}

// Guards: a bad stop sequence or sampler is refused with its place, and the old one stays.
#[test]
fn settings_change_wholly_or_not_at_all() {
    let mut dialog = replying(b"a");
    let before = dialog.settings().clone();
    let code = |result: Result<(), Error>| result.unwrap_err().code();
    assert_eq!(code(dialog.set_stop_sequence(r#"["a"]"#)), Code::JsonSchema);
    assert_eq!(code(dialog.set_stop_sequence("a")), Code::JsonFormat);
    assert_eq!(code(dialog.set_stop_sequence(r#"{"stop-sequence": [""]}"#)), Code::JsonValue);
    assert_eq!(code(dialog.apply_sampler(r#"{"temp": 1.0}"#)), Code::JsonSchema);
    assert_eq!(code(dialog.apply_sampler(r#"{"sampler": {"top-k": 5, "temp": -1}}"#)), Code::JsonValue);
    assert_eq!(dialog.settings(), &before);
    dialog
        .apply_sampler(
            r#"{"sampler": {"version": 1, "top-k": 5, "token-penalty": {"version": 1, "penalize-last-n": 3}}}"#,
        )
        .unwrap();
    let want =
        SamplerConfig { top_k: 5, penalty: TokenPenalty { last_n: 3, ..before.sampler.penalty }, ..before.sampler };
    assert_eq!((&dialog.settings().sampler, dialog.sampler.config()), (&want, &want));
}

// Guards: settings that no config may have open no dialog.
#[test]
fn refused_settings() {
    let open = |settings| Dialog::with_engine(settings, Box::new(Scripted::hashed(N_VOCAB, CONTEXT)), bytes(), None);
    let bad = [
        settings(SamplerConfig { temp: f32::NAN, ..SamplerConfig::default() }),
        Settings { stop_sequences: vec!["a".to_owned(), String::new()], ..settings(greedy()) },
    ];
    for bad in bad {
        assert_eq!(open(bad).err().unwrap().code(), Code::JsonValue);
    }
    assert!(open(settings(greedy())).is_ok());
}

// Guards: an id query streams ids, the end token too, and refuses ids that the model does not have.
#[test]
fn token_query() {
    use SentenceCode::{Begin, Complete, Continue, End};
    let mut dialog = replying(b"ab");
    let mut got = Vec::new();
    let report = dialog.token_query(&[1, 2, 3], Complete, |ids, code| {
        got.push((ids.to_vec(), code));
        Flow::Continue
    });
    assert_eq!(got, [(vec![97], Begin), (vec![98], Continue), (vec![END], End)]);
    assert_eq!((report.unwrap().n_generated, dialog.history()), (3, &[1, 2, 3, 97, 98, END][..]));
    let error = dialog.token_query(&[1, N_VOCAB as u32], Complete, |_, _| Flow::Continue).unwrap_err();
    assert!(matches!(error, Error::TokenOutOfRange { index: 1, id: 261, n_vocab: N_VOCAB }), "{error}");
}

// Guards: an abort at every token keeps what was said up to it; the next answer is that of a fresh dialog with the same
// history.
#[test]
fn abort_at_every_token() {
    for n in 1..20 {
        let (mut dialog, _) = hashed(30);
        dialog.settings.context.eos_tokens.clear();
        let signal = dialog.signal();
        let mut seen = 0;
        let mut last = None;
        let report = dialog.token_query(&[5, 6, 7], SentenceCode::Complete, |ids, code| {
            seen += ids.len();
            last = Some(code);
            if seen == n {
                assert!(signal.abort());
            }
            Flow::Continue
        });
        let report = report.unwrap();
        assert_eq!((report.finish, report.n_generated, last), (Finish::Aborted, n, Some(SentenceCode::Abort)));
        assert_eq!(dialog.context_occupancy(), 3 + n);
        assert!(!signal.abort(), "no query runs");

        let history = dialog.history().to_vec();
        let (mut fresh, _) = hashed(4);
        dialog.set_max_num_tokens(4);
        dialog.sampler.reset();
        let next = ask(&mut dialog, "and?", SentenceCode::Complete).unwrap().0;
        fresh.token_query(&history, SentenceCode::Begin, |_, _| Flow::Continue).unwrap();
        assert_eq!(next, ask(&mut fresh, "and?", SentenceCode::End).unwrap().0);
    }
}

// Guards: an abort from another thread ends a long prompt in the middle, and the conversation is as before the call.
#[test]
fn abort_inside_prefill() {
    for code in [SentenceCode::Complete, SentenceCode::Begin, SentenceCode::Rewind] {
        let engine = Scripted::hashed(N_VOCAB, CONTEXT).with_delay(Duration::from_millis(2));
        let consumed = engine.consumed();
        let mut dialog = dialog_over(engine, Settings { max_num_tokens: 2, ..settings(greedy()) });
        ask(&mut dialog, "abc", SentenceCode::Complete).unwrap();
        let before = (dialog.history().to_vec(), consumed.load(Ordering::Relaxed));
        let signal = dialog.signal();
        let (pieces, report) = std::thread::scope(|scope| {
            scope.spawn(|| {
                while consumed.load(Ordering::Relaxed) < before.1 + 3 {
                    std::thread::yield_now();
                }
                assert!(signal.abort());
            });
            ask(&mut dialog, &format!("ab{}", "x".repeat(50)), code).unwrap()
        });
        assert_eq!((report.finish, report.n_generated), (Finish::Aborted, 0));
        assert_eq!(pieces, [(String::new(), SentenceCode::Abort)]);
        assert!(consumed.load(Ordering::Relaxed) < before.1 + 40, "the prompt was not cut short");
        assert_eq!(dialog.history(), before.0);
        let next = ask(&mut dialog, "!", SentenceCode::Complete).unwrap().0;
        let (mut fresh, _) = hashed(2);
        fresh.sampler.apply(greedy()).unwrap();
        fresh.token_query(&before.0, SentenceCode::Begin, |_, _| Flow::Continue).unwrap();
        assert_eq!(next, ask(&mut fresh, "!", SentenceCode::End).unwrap().0);
    }
}

// Guards: with sentencepiece's tokenizers a space is dropped only where an answer begins, not where it goes on in a text.
#[test]
fn space_in_the_middle_of_a_text() {
    use SentenceCode::{Begin, Complete, End};
    type Given<'a> = &'a mut dyn FnMut(&str, SentenceCode) -> Flow;
    let check = |ask: fn(&mut Dialog, Given<'_>) -> Result<QueryReport, Error>, want: &str| {
        let (b, eos) = (260, 263);
        let engine = Box::new(Scripted::replying(264, CONTEXT, &[b, b], eos));
        let context = ContextConfig { n_vocab: 264, eos_tokens: vec![eos], ..settings(greedy()).context };
        let tokenizer = Arc::new(tokenizer(&sentencepiece_json()));
        let template = ChatTemplate::new("{{ messages[0].content }}".to_owned(), Vec::new()).unwrap();
        let settings = Settings { context, ..settings(greedy()) };
        let mut dialog = Dialog::with_engine(settings, engine, tokenizer, Some(template.into())).unwrap();
        let mut text = String::new();
        let report = ask(&mut dialog, &mut |piece, _| {
            text.push_str(piece);
            Flow::Continue
        });
        assert_eq!((report.unwrap().finish, text.as_str()), (Finish::Eos, want));
    };
    check(|dialog, given| dialog.query("a", Complete, given), " b b");
    check(|dialog, given| dialog.query("a</s>", Complete, given), "b b");
    check(|dialog, given| dialog.chat(&[Message::new("user", "a")], given), "b b");
    check(
        |dialog, given| {
            dialog.token_query(&[257], Begin, |_, _| Flow::Continue)?;
            dialog.query("", End, given)
        },
        " b b",
    );
}

// Guards: an abort that comes before the first token is fed, while an adapter is loaded, ends the call; it is not lost.
#[test]
fn abort_before_the_prompt() {
    let signal = Arc::new(std::sync::OnceLock::<Signal>::new());
    let theirs = Arc::clone(&signal);
    let engine = Scripted::replying(N_VOCAB, CONTEXT, &[97], END)
        .with_load_hook(move || assert!(theirs.get().unwrap().abort(), "a query runs"));
    let consumed = engine.consumed();
    let mut dialog = dialog_over(engine, settings(greedy()));
    signal.set(dialog.signal()).unwrap();
    let mut check = |call: fn(&mut Dialog, &QueryOptions) -> Result<QueryReport, Error>| {
        dialog.add_adapter("law", AdapterSource::Peft("law".into())).unwrap();
        let adapter = Some(AdapterChoice::Named { name: "law".to_owned(), strengths: Vec::new() });
        let report = call(&mut dialog, &QueryOptions { adapter, ..QueryOptions::default() }).unwrap();
        assert_eq!((report.finish, report.n_generated, dialog.context_occupancy()), (Finish::Aborted, 0, 0));
        dialog.remove_adapter("law").unwrap();
    };
    check(|dialog, options| dialog.query_with("?", SentenceCode::Complete, options, |_, _| Flow::Continue));
    check(|dialog, options| dialog.token_query_with(&[5], SentenceCode::Begin, options, |_, _| Flow::Continue));
    check(|dialog, options| dialog.chat_with(&[Message::new("user", "?")], options, |_, _| Flow::Continue));
    assert_eq!(consumed.load(Ordering::Relaxed), 0);
}

// Guards: text that was held back as a possible stop sequence is not lost by an abort.
#[test]
fn abort_gives_out_what_was_held_back() {
    let signal = Arc::new(std::sync::OnceLock::<Signal>::new());
    let theirs = Arc::clone(&signal);
    let script = move |history: &[u32], logits: &mut [f32]| {
        let next = b"one STO??"[history.len() - 1];
        logits[usize::from(next)] = 1.0;
        if next == b'O' {
            assert!(theirs.get().unwrap().abort());
        }
    };
    let mut dialog = dialog_over(Scripted::new(N_VOCAB, CONTEXT, Box::new(script)), settings(greedy()));
    signal.set(dialog.signal()).unwrap();
    dialog.set_stop_sequence(r#"{"stop-sequence": ["STOP"]}"#).unwrap();
    let (pieces, report) = ask(&mut dialog, "?", SentenceCode::Complete).unwrap();
    assert_eq!((report.finish, report.n_generated), (Finish::Aborted, 7));
    assert_eq!((text_of(&pieces).as_str(), pieces.len()), ("one STO", 5));
    assert_eq!(pieces.last().unwrap(), &("STO".to_owned(), SentenceCode::Abort));
    assert_eq!(dialog.history(), ids("?one STO"));
}

// Guards: a failed call, and one whose callback panicked, leaves the conversation and the random numbers as they were.
#[test]
fn failure_changes_nothing() {
    let script = |history: &[u32], logits: &mut [f32]| {
        logits.fill(0.0);
        let bad = history.len() == 12;
        logits[3] = if bad { f32::NAN } else { 1.0 };
    };
    let sampler = SamplerConfig { seed: Some(3), ..SamplerConfig::default() };
    let mut dialog = dialog_over(Scripted::new(N_VOCAB, CONTEXT, Box::new(script)), settings(sampler));
    dialog.settings.context.eos_tokens.clear();
    dialog.set_max_num_tokens(4);
    ask(&mut dialog, "abc", SentenceCode::Complete).unwrap();
    let before = (dialog.history().to_vec(), dialog.sampler.random());
    let error = ask(&mut dialog, "xyz", SentenceCode::Complete).unwrap_err();
    assert!(matches!(error, Error::Sampler(SamplerError::NonFinite { index: 3, .. })), "{error}");
    assert_eq!((dialog.history().to_vec(), dialog.sampler.random()), before);

    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = dialog.query("a", SentenceCode::Rewind, |_, _| std::panic::resume_unwind(Box::new("callback")));
    }));
    assert!(panicked.is_err());
    assert!(!dialog.signal().abort(), "no query runs");
    assert_eq!((dialog.history().to_vec(), dialog.sampler.random()), before);
    assert_eq!(dialog.context_occupancy(), 7);
    let error = ask(&mut dialog, &"x".repeat(CONTEXT), SentenceCode::Complete).unwrap_err();
    assert!(matches!(error, Error::ContextExceeded { occupied: 7, .. }), "{error}");
    assert_eq!((dialog.history().to_vec(), dialog.sampler.random()), before);
}

// Guards: the same seed gives the same answer, in another dialog and after a reset; another seed another one.
#[test]
fn seeds() {
    let answer = |dialog: &mut Dialog| ask(dialog, "go", SentenceCode::Complete).unwrap().0;
    let (mut dialog, _) = hashed(10);
    let (first, second) = (answer(&mut dialog), answer(&mut dialog));
    assert_ne!(first, second);
    dialog.reset();
    assert_eq!(answer(&mut dialog), first);
    dialog.reset();
    dialog.apply_sampler(r#"{"sampler": {"seed": 8}}"#).unwrap();
    assert_ne!(answer(&mut dialog), first);
    dialog.reset();
    dialog.apply_sampler(r#"{"sampler": {"seed": 7}}"#).unwrap();
    assert_eq!(answer(&mut dialog), first);
}

// Guards: the vocabulary that the settings state is the engine's.
#[test]
fn vocabulary_must_match() {
    let engine = Box::new(Scripted::hashed(N_VOCAB - 1, CONTEXT));
    let error = Dialog::with_engine(settings(greedy()), engine, bytes(), None).unwrap_err();
    let Error::Engine { why, .. } = error else { panic!("{error}") };
    let EngineError::Mismatch { config, model, .. } = *why else { panic!("{why}") };
    assert_eq!((config.as_str(), model.as_str()), ("261", "260"));
}

#[derive(Debug, Clone)]
enum Op {
    Query(String, SentenceCode, u32),
    AbortAt(usize),
    StopAt(usize),
    Reset,
}

fn op() -> impl Strategy<Value = Op> {
    let code = prop_oneof![
        3 => Just(SentenceCode::Complete),
        1 => Just(SentenceCode::Begin),
        1 => Just(SentenceCode::Continue),
        1 => Just(SentenceCode::End),
        3 => Just(SentenceCode::Rewind),
        1 => Just(SentenceCode::Abort),
    ];
    prop_oneof![
        8 => ("[ab]{0,20}", code, 0_u32..20).prop_map(|(text, code, max)| Op::Query(text, code, max)),
        1 => (0_usize..8).prop_map(Op::AbortAt),
        1 => (0_usize..8).prop_map(Op::StopAt),
        1 => Just(Op::Reset),
    ]
}

proptest! {
    // Guards: whatever was done to a dialog, its cache holds its history; and a reset makes it a fresh one.
    #[test]
    fn reset_equals_fresh(ops in prop::collection::vec(op(), 0..12)) {
        let (mut dialog, _) = hashed(6);
        for op in ops {
            match op {
                Op::Query(text, code, max) => {
                    dialog.set_max_num_tokens(max);
                    let _ = ask(&mut dialog, &text, code);
                }
                Op::AbortAt(n) | Op::StopAt(n) => {
                    let signal = dialog.signal();
                    let is_abort = matches!(op, Op::AbortAt(_));
                    let mut seen = 0;
                    let _ = dialog.token_query(&[9, 9], SentenceCode::Complete, |_, _| {
                        seen += 1;
                        match (seen == n, is_abort) {
                            (false, _) => Flow::Continue,
                            (true, true) => { signal.abort(); Flow::Continue }
                            (true, false) => Flow::Stop,
                        }
                    });
                }
                Op::Reset => dialog.reset(),
            }
            prop_assert!(dialog.cache.position() <= dialog.history().len());
        }
        dialog.set_max_num_tokens(6);

        // The cache is right: what follows is what a fresh dialog says to the same history.
        if dialog.open_from.is_none() && dialog.context_occupancy() < CONTEXT {
            let (mut fresh, _) = hashed(6);
            fresh.token_query(dialog.history(), SentenceCode::Begin, |_, _| Flow::Continue).unwrap();
            dialog.sampler.reset();
            let next = ask(&mut dialog, "b", SentenceCode::Complete).unwrap().0;
            prop_assert_eq!(next, ask(&mut fresh, "b", SentenceCode::End).unwrap().0);
        }

        dialog.reset();
        let (mut fresh, _) = hashed(6);
        prop_assert_eq!((dialog.context_occupancy(), dialog.cache.position()), (0, 0));
        for code in [SentenceCode::Begin, SentenceCode::End, SentenceCode::Complete, SentenceCode::Rewind] {
            let (ours, theirs) = (ask(&mut dialog, "ab", code).unwrap(), ask(&mut fresh, "ab", code).unwrap());
            prop_assert_eq!((ours.0, ours.1.finish, ours.1.n_cached_tokens), (theirs.0, theirs.1.finish, theirs.1.n_cached_tokens));
        }
    }
}
