use std::collections::BTreeMap;
use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;
use crate::adapters::LoraError;
use crate::config::{AdapterConfig, ContextConfig, SamplerConfig, Settings};
use crate::engine::scripted::{Scripted, hashed_logits};
use crate::testing::bytes;
use crate::tokenizer::Tokenizer;
use crate::{Code, Flow, QueryOptions, QueryReport, SentenceCode};

const N_VOCAB: usize = 261;
const CONTEXT: usize = 48;
const MAX_TOKENS: u32 = 4;

/// A greedy dialog over a model whose answer depends on every row of the cache, and which fails now and then.
fn dialog() -> Dialog {
    static TOKENIZER: LazyLock<std::sync::Arc<Tokenizer>> = LazyLock::new(bytes);
    let script = |rows: &[u32], logits: &mut [f32]| {
        hashed_logits(rows, logits);
        if logits[7] < -3.7 {
            logits[9] = f32::NAN;
        }
    };
    let context =
        ContextConfig { size: CONTEXT, n_vocab: N_VOCAB, bos_token: None, eos_tokens: vec![500], pad_token: None };
    let sampler = SamplerConfig { greedy: true, ..SamplerConfig::default() };
    let settings = Settings { context, sampler, stop_sequences: Vec::new(), max_num_tokens: MAX_TOKENS };
    let engine = Box::new(Scripted::new(N_VOCAB, CONTEXT, Box::new(script)));
    Dialog::with_engine(settings, engine, std::sync::Arc::clone(&TOKENIZER), None).unwrap()
}

fn peft(path: &str) -> AdapterSource {
    AdapterSource::Peft(path.into())
}

/// What makes a row, as a user sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Maker {
    Base,
    Adapter { name: &'static str, version: u32, first: f32, second: f32 },
}

impl Maker {
    fn new(name: &'static str, version: u32, first: f32, second: f32) -> Self {
        match (first, second) {
            (0.0, 0.0) => Self::Base,
            _ => Self::Adapter { name, version, first, second },
        }
    }

    /// What a fresh dialog is told, that has every version of every adapter under a name of its own.
    fn use_in(self, dialog: &mut Dialog, path_of: &BTreeMap<u32, String>) {
        let Self::Adapter { name, version, first, second } = self else {
            return dialog.apply_base("primary").unwrap();
        };
        dialog.apply_base("primary").unwrap();
        if dialog.adapters().iter().any(|known| known.name == name) {
            dialog.remove_adapter(name).unwrap();
        }
        dialog.add_adapter(name, peft(&path_of[&version])).unwrap();
        dialog.apply_lora("primary", name).unwrap();
        dialog.set_lora_strength("primary", "first", first).unwrap();
        dialog.set_lora_strength("primary", "second", second).unwrap();
    }
}

#[derive(Debug, Clone)]
enum Op {
    Add(&'static str),
    Remove(&'static str),
    Release(&'static str),
    Apply(&'static str),
    Base,
    Strength(&'static str, f32),
    Reuse(KvReuse),
    Reset,
    Query { text: String, code: SentenceCode, with: Option<(Option<&'static str>, f32)>, end: End },
}

#[derive(Debug, Clone, Copy)]
enum End {
    Itself,
    AbortAt(usize),
    StopAt(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let name = || prop::sample::select(vec!["a", "b", "c"]);
    let value = || prop::sample::select(vec![0.0_f32, -0.0, 0.5, 1.0, -1.0, 2.0]);
    let alpha = prop::sample::select(vec!["lora_alpha", "first", "second", "third"]);
    let code = prop_oneof![
        4 => Just(SentenceCode::Complete),
        4 => Just(SentenceCode::Rewind),
        1 => Just(SentenceCode::Begin),
        1 => Just(SentenceCode::Continue),
        2 => Just(SentenceCode::End),
        1 => Just(SentenceCode::Abort),
    ];
    let end = prop_oneof![
        4 => Just(End::Itself),
        1 => (1_usize..4).prop_map(End::AbortAt),
        1 => (1_usize..4).prop_map(End::StopAt),
    ];
    let with = prop::option::weighted(0.3, (prop::option::of(name()), value()));
    let query = ("[ab]{0,9}", code, with, end);
    prop_oneof![
        2 => name().prop_map(Op::Add),
        1 => name().prop_map(Op::Remove),
        1 => name().prop_map(Op::Release),
        3 => name().prop_map(Op::Apply),
        1 => Just(Op::Base),
        3 => (alpha, value()).prop_map(|(alpha, value)| Op::Strength(alpha, value)),
        1 => prop::sample::select(vec![KvReuse::Keep, KvReuse::Prefill, KvReuse::Refuse]).prop_map(Op::Reuse),
        1 => Just(Op::Reset),
        9 => query.prop_map(|(text, code, with, end)| Op::Query { text, code, with, end }),
    ]
}

/// A dialog, and what a user would write down about it.
struct Watched {
    dialog: Dialog,
    rows: Vec<Maker>,
    /// Version and strengths of each adapter. A version is a load: it ends when the adapter is released or removed.
    known: BTreeMap<&'static str, (u32, f32, f32)>,
    path_of: BTreeMap<u32, String>,
    applied: Option<&'static str>,
    reuse: KvReuse,
    n_versions: u32,
}

impl Watched {
    fn new() -> Self {
        let (known, path_of) = (BTreeMap::new(), BTreeMap::new());
        let (rows, applied, reuse) = (Vec::new(), None, KvReuse::Keep);
        Self { dialog: dialog(), rows, known, path_of, applied, reuse, n_versions: 0 }
    }

    fn new_version(&mut self, path: String) -> u32 {
        self.n_versions += 1;
        self.path_of.insert(self.n_versions, path);
        self.n_versions
    }

    fn current(&self) -> Maker {
        let Some(name) = self.applied else { return Maker::Base };
        let (version, first, second) = self.known[name];
        Maker::new(name, version, first, second)
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::Add(name) => {
                let path = format!("{name} {}", self.n_versions);
                let added = self.dialog.add_adapter(name, peft(&path));
                assert_eq!(added.is_ok(), !self.known.contains_key(name));
                if added.is_ok() {
                    let version = self.new_version(path);
                    self.known.insert(name, (version, 1.0, 1.0));
                }
            }
            Op::Remove(name) => {
                let removed = self.dialog.remove_adapter(name);
                assert_eq!(removed.is_ok(), self.known.contains_key(name) && self.applied != Some(name));
                if removed.is_ok() {
                    self.known.remove(name);
                }
            }
            Op::Release(name) => {
                let released = self.dialog.release_lora_memory("primary", name);
                assert_eq!(released.is_ok(), self.known.contains_key(name) && self.applied != Some(name));
                if released.is_ok() {
                    let (version, first, second) = self.known[name];
                    let version = self.new_version(self.path_of[&version].clone());
                    self.known.insert(name, (version, first, second));
                }
            }
            Op::Apply(name) => {
                let applied = self.dialog.apply_lora("primary", name);
                assert_eq!(applied.is_ok(), self.known.contains_key(name));
                if let Ok(applied) = applied {
                    self.applied = Some(name);
                    let (_, first, second) = self.known[name];
                    let strengths = [("first".to_owned(), first), ("second".to_owned(), second)];
                    assert_eq!(applied.strengths, strengths);
                }
            }
            Op::Base => {
                self.dialog.apply_base("primary").unwrap();
                self.applied = None;
            }
            Op::Strength(alpha, value) => self.set_strength(alpha, value),
            Op::Reuse(reuse) => {
                self.dialog.set_kv_reuse(reuse);
                self.reuse = reuse;
            }
            Op::Reset => {
                self.dialog.reset();
                self.rows.clear();
            }
            Op::Query { text, code, with, end } => self.query(&text, code, with, end),
        }
    }

    fn set_strength(&mut self, alpha: &'static str, value: f32) {
        // With none applied, slots are known of loaded adapters only; a test of its own looks at that.
        let Some(name) = self.applied else { return };
        let set = self.dialog.set_lora_strength("primary", alpha, value);
        assert_eq!(set.is_ok(), alpha != "third");
        let (_, first, second) = self.known.get_mut(name).unwrap();
        if alpha == "lora_alpha" || alpha == "first" {
            *first = value;
        }
        if alpha == "lora_alpha" || alpha == "second" {
            *second = value;
        }
    }

    /// The query's answer must be that of a fresh dialog whose rows were made as the policy says.
    fn query(&mut self, text: &str, code: SentenceCode, with: Option<(Option<&'static str>, f32)>, end: End) {
        let mut options = QueryOptions::default();
        let mut maker = self.current();
        if let Some((name, value)) = with {
            options.adapter =
                Some(name.map_or(AdapterChoice::Base, |name| AdapterChoice::named(name).at("first", value)));
            maker = match name.map(|name| (name, self.known.get(name))) {
                None => Maker::Base,
                Some((name, Some(&(version, ..)))) => Maker::new(name, version, value, 1.0),
                Some((_, None)) => Maker::Base,
            };
        }
        let before = self.dialog.history().to_vec();
        let (answer, result) = ask(&mut self.dialog, text, code, &options, end);
        let unknown = matches!(with, Some((Some(name), _)) if !self.known.contains_key(name));
        if unknown && !matches!(result, Err(Error::SentenceOrder { .. })) && code != SentenceCode::Abort {
            assert!(matches!(result, Err(Error::Lora(LoraError::UnknownAdapter { .. }))), "{result:?}");
        }
        let position = self.dialog.cache.position();
        let refused = match &result {
            Err(Error::Sampler(_)) => false,
            Err(Error::Lora(LoraError::ForeignRows { .. })) => {
                assert_eq!(self.reuse, KvReuse::Refuse);
                assert!(self.rows.iter().any(|row| *row != maker));
                true
            }
            Err(_) => true,
            Ok(_) if code == SentenceCode::Abort => {
                self.rows.truncate(position);
                return;
            }
            Ok(_) => false,
        };
        if refused {
            assert_eq!((self.dialog.history(), position), (&before[..], self.rows.len()), "{result:?}");
            return;
        }

        let prompt = bytes_of(text);
        let common = before.iter().zip(&prompt).take_while(|(old, new)| old == new).count();
        let mut whole = before.clone();
        match code {
            SentenceCode::Rewind => whole.clone_from(&prompt),
            _ => whole.extend(&prompt),
        }
        let answers = !matches!(code, SentenceCode::Begin | SentenceCode::Continue);
        let reusable = if code == SentenceCode::Rewind { common } else { before.len() };
        let reusable = reusable.min(self.rows.len()).min(whole.len() - usize::from(answers));
        let own = self.rows[..reusable].iter().take_while(|row| **row == maker).count();
        let keeps = self.reuse == KvReuse::Keep && code != SentenceCode::Rewind;
        assert!(keeps || self.reuse != KvReuse::Refuse || own == reusable, "rows of another maker were used");
        let used = if keeps { reusable } else { own };
        self.rows.truncate(used);
        let foreign = self.rows.iter().filter(|row| **row != maker).count();
        if let Ok(report) = &result {
            assert_eq!(report.n_foreign_rows, foreign);
            assert_eq!(report.n_cached_tokens, if code == SentenceCode::Rewind { used } else { 0 });
            assert_eq!(report.n_recomputed_tokens, if code == SentenceCode::Rewind { 0 } else { reusable - used });
        }

        let mut fresh = dialog();
        let mut at = 0;
        for run in self.rows.chunk_by(|a, b| a == b) {
            run[0].use_in(&mut fresh, &self.path_of);
            let part = if at == 0 { SentenceCode::Begin } else { SentenceCode::Continue };
            fresh.token_query(&whole[at..at + run.len()], part, |_, _| Flow::Continue).unwrap();
            at += run.len();
        }
        maker.use_in(&mut fresh, &self.path_of);
        let last = if at == 0 { SentenceCode::Complete } else { SentenceCode::End };
        if answers {
            let mut want = Vec::new();
            let wanted = fresh.token_query(&whole[at..], last, |ids, _| {
                want.extend_from_slice(ids);
                Flow::Continue
            });
            match (&result, end) {
                (Ok(_), End::AbortAt(_) | End::StopAt(_)) => assert_eq!(answer[..], want[..answer.len()]),
                (Ok(_), End::Itself) => assert_eq!((&answer, wanted.is_ok()), (&want, true)),
                (Err(_), _) => assert!(wanted.is_err()),
            }
        }
        self.rows.resize(position, maker);
        match result {
            Err(_) => assert_eq!(self.dialog.history(), before),
            Ok(_) => assert_eq!(self.dialog.history(), [whole, answer].concat()),
        }
    }
}

fn ask(
    dialog: &mut Dialog,
    text: &str,
    code: SentenceCode,
    options: &QueryOptions,
    end: End,
) -> (Vec<u32>, Result<QueryReport, Error>) {
    let signal = dialog.signal();
    let mut answer = Vec::new();
    let result = dialog.token_query_with(&bytes_of(text), code, options, |ids, _| {
        answer.extend_from_slice(ids);
        match end {
            End::AbortAt(n) if answer.len() == n => _ = signal.abort(),
            End::StopAt(n) if answer.len() == n => return Flow::Stop,
            _ => {}
        }
        Flow::Continue
    });
    (answer, result)
}

fn bytes_of(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    // Guards: no mix-up. Whatever was applied, set, asked, aborted, forgotten, added or removed before, over two
    // dialogs in turn: an answer is that of a fresh dialog whose rows were made by whom the policy says.
    #[test]
    fn answers_equal_those_of_fresh_dialogs(ops in prop::collection::vec((any::<bool>(), op()), 0..50)) {
        let mut dialogs = [Watched::new(), Watched::new()];
        for (i, op) in ops {
            dialogs[usize::from(i)].run(op);
        }
    }
}

fn with_two() -> Dialog {
    let mut dialog = dialog();
    dialog.add_adapter("a", peft("a")).unwrap();
    dialog.add_adapter("b", peft("b")).unwrap();
    dialog
}

// Guards: what is wrong is refused with what is known, with its code, and nothing changes by it.
#[test]
fn refusals() {
    let mut dialog = with_two();
    dialog.add_adapter("broken", AdapterSource::Sections(Vec::new())).unwrap();
    dialog.apply_lora("primary", "a").unwrap();
    dialog.set_lora_strength("primary", "second", 0.5).unwrap();
    let state = |dialog: &Dialog| (dialog.applied_lora().map(str::to_owned), dialog.lora_strengths("a"));
    let before = state(&dialog);
    let mut check = |call: &mut dyn FnMut(&mut Dialog) -> Result<(), Error>, code: Code, says: &[&str]| {
        let error = call(&mut dialog).unwrap_err();
        assert_eq!((error.code(), state(&dialog)), (code, before.clone()), "{}", error.chain());
        assert!(says.iter().all(|word| error.chain().contains(word)), "{}", error.chain());
    };
    let general = Code::General;
    let argument = Code::InvalidArgument;
    check(&mut |d| d.apply_lora("draft", "a").map(drop), argument, &["draft", "primary"]);
    check(&mut |d| d.apply_lora("primary", "z").map(drop), general, &["\"z\"", "\"a\", \"b\""]);
    check(&mut |d| d.apply_lora("primary", "broken").map(drop), general, &["broken", "0 sections for 1"]);
    check(&mut |d| d.set_lora_strength("primary", "x", 1.0), general, &["\"x\"", "lora_alpha", "first", "second"]);
    check(&mut |d| d.set_lora_strength("primary", "first", f32::NAN), argument, &["first", "NaN", "finite"]);
    check(&mut |d| d.set_lora_strength("primary", "lora_alpha", f32::INFINITY), argument, &["inf"]);
    check(&mut |d| d.set_lora_strength("target", "first", 1.0), argument, &["target"]);
    check(&mut |d| d.release_lora_memory("primary", "a").map(drop), argument, &["is applied"]);
    check(&mut |d| d.remove_adapter("a"), argument, &["is applied"]);
    check(&mut |d| d.remove_adapter("z"), general, &["\"z\""]);
    check(&mut |d| d.add_adapter("a", peft("x")), argument, &["taken"]);
    check(&mut |d| d.add_adapter("", peft("x")), argument, &["empty"]);
    let mut query = |choice: AdapterChoice, says: &[&str]| {
        let options = QueryOptions::default().with_adapter(choice);
        let ask =
            &mut |d: &mut Dialog| d.query_with("x", SentenceCode::Complete, &options, |_, _| Flow::Continue).map(drop);
        check(ask, general, says);
    };
    query(AdapterChoice::named("z"), &["\"z\""]);
    query(AdapterChoice::named("b").at("third", 1.0), &["third", "first"]);
    query(AdapterChoice::named("broken"), &["broken"]);
    assert_eq!(dialog.context_occupancy(), 0);
}

// Guards: before anything is applied a strength goes to every adapter that has it, loaded or not; it stays with the adapter over
// swaps, and a query's own choice leaves it alone.
#[test]
fn strengths_belong_to_adapters() {
    let config = |name: &str, alphas: &[&str]| AdapterConfig {
        name: name.to_owned(),
        alphas: alphas.iter().map(|alpha| (*alpha).to_owned()).collect(),
        source: peft(name),
    };
    let adapters =
        vec![config("a", &["x", "y"]), config("b", &["y", "z"]), config("c", &["second", "first"]), config("d", &[])];
    let lora = LoraConfig { alpha_tensor_name: "all".to_owned(), adapters, kv_reuse: KvReuse::Keep };
    let mut dialog = dialog();
    dialog.set_lora(&lora, "target".to_owned());
    let at = |dialog: &mut Dialog, name: &str| {
        let applied = dialog.apply_lora("target", name).unwrap();
        let named: Vec<String> = applied.strengths.iter().map(|(alpha, value)| format!("{alpha} {value}")).collect();
        named.join(", ")
    };
    dialog.set_lora_strength("target", "all", 0.5).unwrap();
    dialog.set_lora_strength("target", "y", 2.0).unwrap();
    dialog.set_lora_strength("target", "second", 0.25).unwrap();
    let error = dialog.set_lora_strength("target", "lora_alpha", 1.0).unwrap_err();
    assert!(error.chain().contains(r#"["all", "first", "second", "x", "y", "z"]"#), "{}", error.chain());
    assert_eq!(at(&mut dialog, "a"), "x 0.5, y 2");
    assert_eq!(at(&mut dialog, "b"), "y 2, z 0.5");
    dialog.set_lora_strength("target", "y", 3.0).unwrap();
    assert_eq!(at(&mut dialog, "c"), "first 0.5, second 0.25");
    assert_eq!(at(&mut dialog, "d"), "first 0.5, second 0.25");
    assert_eq!(at(&mut dialog, "b"), "y 3, z 0.5");
    let options = QueryOptions::default().with_adapter(AdapterChoice::named("b").at("all", 7.0));
    dialog.query_with("x", SentenceCode::Begin, &options, |_, _| Flow::Continue).unwrap();
    assert_eq!(at(&mut dialog, "a"), "x 0.5, y 2");
    dialog.set_lora_strength("target", "all", 1.0).unwrap();
    assert_eq!(at(&mut dialog, "a"), "x 1, y 1");
    dialog.set_lora_strength("target", "x", -0.0).unwrap();
    assert_eq!(at(&mut dialog, "a"), "x 0, y 1", "minus zero would be another maker of rows");

    for alphas in [&["x"][..], &["first", "x"], &["x", "y", "z"]] {
        let lora = LoraConfig { adapters: vec![config("a", alphas)], ..lora.clone() };
        dialog.set_lora(&lora, "target".to_owned());
        let error = dialog.apply_lora("target", "a").unwrap_err();
        assert!(matches!(error, Error::Lora(LoraError::Alphas { .. })), "{}", error.chain());
        assert_eq!(dialog.applied_lora(), None);
    }
}

// Guards: the command line's form of an adapter with strengths; an odd count or an empty word is refused.
#[test]
fn choices_from_text() {
    let check = |text: &str, want: Option<AdapterChoice>| assert_eq!(text.parse().ok(), want, "{text:?}");
    check("a", Some(AdapterChoice::named("a")));
    check("a,x,0.5", Some(AdapterChoice::named("a").at("x", 0.5)));
    check("a, x, -1 ,y,2e-1", Some(AdapterChoice::named("a").at("x", -1.0).at("y", 0.2)));
    for wrong in ["", ",", "a,", "a,x", "a,x,y", "a,,1", ",x,1", "a,x,0.5,y"] {
        check(wrong, None);
    }
}

// Guards: an adapter is loaded at its first use and not before, kept, and loaded again after its release.
#[test]
fn loaded_when_first_used() {
    let mut dialog = with_two();
    let loaded = |dialog: &Dialog| -> Vec<bool> { dialog.adapters().iter().map(|a| a.loaded.is_some()).collect() };
    assert_eq!(loaded(&dialog), [false, false]);
    assert!(dialog.apply_lora("primary", "b").unwrap().was_loaded);
    let options = QueryOptions::default().with_adapter(AdapterChoice::named("a"));
    dialog.query_with("x", SentenceCode::Begin, &options, |_, _| Flow::Continue).unwrap();
    assert_eq!((loaded(&dialog), dialog.applied_lora()), (vec![true, true], Some("b")));
    assert!(!dialog.apply_lora("primary", "a").unwrap().was_loaded);
    assert!(dialog.release_lora_memory("primary", "b").unwrap());
    assert!(!dialog.release_lora_memory("primary", "b").unwrap());
    assert_eq!(loaded(&dialog), [true, false]);
    assert!(dialog.apply_lora("primary", "b").unwrap().was_loaded);
}
