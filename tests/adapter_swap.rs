//! Guards the promise of adapters on a shared model: whatever was applied, set, asked, aborted, forgotten, added or
//! removed before, in this dialog or in another one over the same weights, an answer is that of a model on which nothing
//! but its adapter was ever used.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use genie::config::KvReuse;
use genie::engine::{AdapterSource, Engine, GroupSource, Logits};
use genie::{AdapterChoice, Dialog, Error, Finish, Flow, Model, QueryOptions, SentenceCode, Signal};
use genie_workspace::converted::Converted;
use genie_workspace::tiny_model::{SplitMix64, TinyModel};
use qnn_core::offline::arch::{ActivationBits, Grouping, Precision, WeightType};
use qnn_core::offline::quantize_weights::Bits;
use tempfile::TempDir;

/// Adapters by their weights, whatever they are called in a dialog.
const WEIGHTS: [&str; 4] = ["a", "b", "c", "d"];

/// Names that dialogs give to adapters they add.
const NAMES: [&str; 2] = ["x", "y"];

/// Rank of the first of them; each further one has one more.
const FIRST_RANK: usize = 3;

const STRENGTHS: [f32; 5] = [1.0, 0.5, -1.0, 2.0, 0.0];

const MAX_TOKENS: u32 = 5;

/// A tiny model, its adapters as sections and as PEFT directories, and files that are none.
struct Files {
    model: Converted,
    adapters: TempDir,
    kind: Kind,
}

/// What the adapters bring.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Weights; the activations have no static encodings.
    Weights,
    /// Encodings too, `c` and `d` those of their group.
    Encodings,
}

/// The group of `c` and `d`.
const GROUP: &str = "cd";

impl Files {
    fn new(kind: Kind) -> Files {
        let tiny = TinyModel::llama(5);
        let adapters = TempDir::new().unwrap();
        let folders = WEIGHTS.map(|name| adapters.path().join(name));
        for (i, folder) in folders.iter().enumerate() {
            tiny.write_peft(folder, 100 + i as u64, FIRST_RANK + i).unwrap();
        }
        let named: Vec<(&str, &Path)> = WEIGHTS.into_iter().zip(folders.iter().map(PathBuf::as_path)).collect();
        // Without blocks: on every tier a conversation that goes on has the bits of one that is fed whole.
        let weights = WeightType::Int { bits: Bits::Eight, grouping: Grouping::PerChannel };
        let precision = Precision { weights, activations: ActivationBits::Sixteen, cache: None };
        let convert = |tiny: &TinyModel| match kind {
            Kind::Weights => Converted::tiny_with_adapters(tiny, precision, &named),
            Kind::Encodings => Converted::tiny_static(tiny, &named, &[(GROUP, &["c", "d"])]),
        };
        let (model, other) = (convert(&tiny).unwrap(), convert(&TinyModel::llama(6)).unwrap());

        let good = std::fs::read(model.path().join("model_b.bin")).unwrap();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        let mut newer = good.clone();
        newer[4] += 1;
        let foreign = std::fs::read(other.path().join("model_b.bin")).unwrap();
        for (name, bytes) in
            [("cut", &good[..good.len() - 1]), ("flipped", &flipped), ("newer", &newer), ("foreign", &foreign)]
        {
            std::fs::write(adapters.path().join(name), bytes).unwrap();
        }
        Files { model, adapters, kind }
    }

    fn open(&self) -> Model {
        Model::open(self.model.config().unwrap()).unwrap()
    }

    fn section(&self, weights: &str) -> AdapterSource {
        match self.kind == Kind::Encodings && ["c", "d"].contains(&weights) {
            true => self.in_group(weights),
            false => self.whole(weights),
        }
    }

    fn whole(&self, name: &str) -> AdapterSource {
        AdapterSource::Sections(vec![Some(self.model.path().join(format!("model_{name}.bin")))])
    }

    fn in_group(&self, weights: &str) -> AdapterSource {
        let path = |name: &str| vec![Some(self.model.path().join(format!("model_{name}.bin")))];
        let group = GroupSource { name: GROUP.to_owned(), sections: path(GROUP) };
        AdapterSource::Grouped { sections: path(weights), group }
    }

    fn peft(&self, weights: &str) -> AdapterSource {
        AdapterSource::Peft(self.adapters.path().join(weights))
    }

    /// Files that are no adapter of the model: damaged, of another one, or parts that do not belong together.
    fn bad(&self) -> Vec<AdapterSource> {
        let damaged = |kind| AdapterSource::Sections(vec![Some(self.adapters.path().join(kind))]);
        let mut bad: Vec<AdapterSource> = ["cut", "flipped", "newer", "foreign"].map(damaged).into();
        if self.kind == Kind::Encodings {
            bad.extend([self.whole("c"), self.whole(GROUP), self.in_group("a"), self.in_group(GROUP)]);
        }
        bad
    }
}

/// What an answer depends on: weights (none: the base), the bits of the strength, the ids before it.
type Question = (Option<&'static str>, u32, Vec<u32>);

/// Answers of fresh dialogs, each over a model on which only its adapter was ever loaded.
struct Alone<'a> {
    files: &'a Files,
    models: BTreeMap<Option<&'static str>, Model>,
    known: Mutex<BTreeMap<Question, Vec<u32>>>,
}

impl<'a> Alone<'a> {
    fn new(files: &'a Files) -> Alone<'a> {
        let keys = WEIGHTS.map(Some).into_iter().chain([None]);
        let models = keys.map(|weights| (weights, files.open())).collect();
        Alone { files, models, known: Mutex::default() }
    }

    fn answer(&self, weights: Option<&'static str>, strength: f32, ids: &[u32]) -> Vec<u32> {
        let question = (weights, strength.to_bits(), ids.to_vec());
        if let Some(answer) = self.known.lock().unwrap().get(&question) {
            return answer.clone();
        }
        let mut dialog = self.models[&weights].dialog().unwrap();
        dialog.set_max_num_tokens(MAX_TOKENS);
        if let Some(weights) = weights {
            dialog.add_adapter("alone", self.files.section(weights)).unwrap();
            dialog.apply_lora("primary", "alone").unwrap();
            dialog.set_lora_strength("primary", "lora_alpha", strength).unwrap();
        }
        let mut answer = Vec::new();
        let collect = |ids: &[u32], _| {
            answer.extend_from_slice(ids);
            Flow::Continue
        };
        dialog.token_query(ids, SentenceCode::Complete, collect).unwrap();
        self.known.lock().unwrap().insert(question, answer.clone());
        answer
    }
}

/// A dialog and what a user would write down about it.
struct Watched<'a> {
    dialog: Dialog,
    random: SplitMix64,
    alone: &'a Alone<'a>,
    /// Weights and strength of every adapter by its name in this dialog.
    known: BTreeMap<&'static str, (&'static str, f32)>,
    applied: Option<&'static str>,
    n_answers: usize,
    n_aborted: usize,
}

impl<'a> Watched<'a> {
    fn new(model: &Model, alone: &'a Alone<'a>, seed: u64) -> Watched<'a> {
        let mut dialog = model.dialog().unwrap();
        dialog.set_max_num_tokens(MAX_TOKENS);
        dialog.set_kv_reuse(KvReuse::Prefill);
        let known = WEIGHTS.map(|weights| (weights, (weights, 1.0))).into();
        Watched { dialog, random: SplitMix64(seed), alone, known, applied: None, n_answers: 0, n_aborted: 0 }
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.random.below(from.len() as u64) as usize]
    }

    fn pick_known(&mut self) -> &'static str {
        let names: Vec<&'static str> = self.known.keys().copied().collect();
        self.pick(&names)
    }

    fn run(&mut self, n_ops: usize) {
        for _ in 0..n_ops {
            match self.random.below(20) {
                0 | 1 => self.apply(),
                2 => {
                    self.dialog.apply_base("primary").unwrap();
                    self.applied = None;
                }
                3 | 4 => self.set_strength(),
                5 => self.dialog.reset(),
                6 | 7 => self.add(),
                8 => self.remove(),
                9 => {
                    let name = self.pick_known();
                    let released = self.dialog.release_lora_memory("primary", name);
                    assert_eq!(released.is_ok(), self.applied != Some(name));
                }
                10 => self.apply_damaged(),
                _ => self.query(),
            }
        }
    }

    fn apply(&mut self) {
        let name = self.pick_known();
        let applied = self.dialog.apply_lora("primary", name).unwrap();
        let (weights, strength) = self.known[name];
        let rank = WEIGHTS.iter().position(|other| *other == weights).unwrap() + FIRST_RANK;
        assert_eq!((applied.info.rank, applied.info.targets, applied.strengths[0].1), (rank, 14, strength));
        self.applied = Some(name);
    }

    fn set_strength(&mut self) {
        let Some(name) = self.applied else { return };
        let strength = self.pick(&STRENGTHS);
        self.dialog.set_lora_strength("primary", "lora_alpha", strength).unwrap();
        self.known.get_mut(name).unwrap().1 = strength;
    }

    /// The same name gets other weights each time: what a model remembers of adapters must not go by names.
    fn add(&mut self) {
        let (name, weights) = (self.pick(&NAMES), self.pick(&WEIGHTS));
        let files = self.alone.files;
        // A PEFT directory has no encodings: it is the same adapter only where the sections have none.
        let as_section = files.kind == Kind::Encodings || self.random.below(2) == 0;
        let source = if as_section { files.section(weights) } else { files.peft(weights) };
        match self.dialog.add_adapter(name, source) {
            Ok(()) => assert!(self.known.insert(name, (weights, 1.0)).is_none()),
            Err(_) => assert!(self.known.contains_key(name)),
        }
    }

    fn remove(&mut self) {
        let name = self.pick(&NAMES);
        let removed = self.dialog.remove_adapter(name);
        assert_eq!(removed.is_ok(), self.known.contains_key(name) && self.applied != Some(name));
        if removed.is_ok() {
            self.known.remove(name);
        }
    }

    fn apply_damaged(&mut self) {
        let bad = self.alone.files.bad();
        let source = bad[self.random.below(bad.len() as u64) as usize].clone();
        self.dialog.add_adapter("damaged", source).unwrap();
        self.dialog.apply_lora("primary", "damaged").unwrap_err();
        assert_eq!(self.dialog.applied_lora(), self.applied);
        self.dialog.remove_adapter("damaged").unwrap();
    }

    fn query(&mut self) {
        let mut ids: Vec<u32> = (0..1 + self.random.below(4)).map(|i| 3 + i as u32).collect();
        ids.push(3 + self.random.below(6) as u32);
        let code = self.pick(&[SentenceCode::Rewind, SentenceCode::Complete]);
        let (mut options, mut runs_with) = (QueryOptions::default(), self.applied.map(|name| self.known[name]));
        match self.random.below(6) {
            0 => (options, runs_with) = (options.with_adapter(AdapterChoice::Base), None),
            1 => {
                let (name, strength) = (self.pick_known(), self.pick(&STRENGTHS));
                options = options.with_adapter(AdapterChoice::named(name).at("lora_alpha", strength));
                runs_with = Some((self.known[name].0, strength));
            }
            _ => {}
        }
        let abort_at = (self.random.below(5) == 0).then(|| 1 + self.random.below(3) as usize);

        let before = self.dialog.history().to_vec();
        let (signal, mut answer) = (self.dialog.signal(), Vec::new());
        let result = self.dialog.token_query_with(&ids, code, &options, |ids, _| {
            answer.extend_from_slice(ids);
            if abort_at.is_some_and(|n| n == answer.len()) {
                signal.abort();
            }
            Flow::Continue
        });
        let report = match result {
            Err(Error::ContextExceeded { .. }) => return self.dialog.reset(),
            other => other.unwrap(),
        };
        let whole = if code == SentenceCode::Rewind { ids } else { [before.clone(), ids].concat() };
        let want = match runs_with {
            Some((weights, strength)) => self.alone.answer(Some(weights), strength, &whole),
            None => self.alone.answer(None, 1.0, &whole),
        };
        let asked = format!("{runs_with:?} asked {whole:?}");
        if report.finish == Finish::Aborted {
            self.n_aborted += 1;
            assert_eq!(answer, want[..answer.len()], "{asked}");
        } else {
            self.n_answers += 1;
            assert_eq!(answer, want, "{asked}");
        }
        let after = if answer.is_empty() { before } else { [whole, answer].concat() };
        assert_eq!(self.dialog.history(), after, "{asked}");
    }
}

/// Aborts whatever runs, now and then, until it is told to end.
fn disturb(signals: &[Signal], done: &AtomicUsize) {
    let mut random = SplitMix64(9);
    while done.load(Ordering::Relaxed) < signals.len() {
        std::thread::sleep(std::time::Duration::from_micros(random.below(20_000)));
        signals[random.below(signals.len() as u64) as usize].abort();
    }
}

/// Two dialogs over one model, in two threads, disturbed by a third.
fn interleave(kind: Kind, n_ops: usize) {
    let (files, done) = (Files::new(kind), AtomicUsize::new(0));
    let (model, alone) = (files.open(), Alone::new(&files));
    let signature = |weights| (3..9).flat_map(|id| alone.answer(weights, 1.0, &[id])).collect();
    let signatures: BTreeSet<Vec<u32>> = WEIGHTS.map(Some).into_iter().chain([None]).map(signature).collect();
    assert_eq!(signatures.len(), 5, "every adapter has a signature of its own");
    let mut dialogs = [1, 2].map(|seed| Watched::new(&model, &alone, seed));
    let signals: Vec<Signal> = dialogs.iter().map(|watched| watched.dialog.signal()).collect();
    std::thread::scope(|scope| {
        for watched in &mut dialogs {
            let done = &done;
            scope.spawn(move || {
                let guard = Done(done);
                watched.run(n_ops);
                drop(guard);
            });
        }
        disturb(&signals, &done);
    });
    let [n_answers, n_aborted] =
        dialogs.iter().fold([0, 0], |sum, watched| [sum[0] + watched.n_answers, sum[1] + watched.n_aborted]);
    assert!(n_answers > n_ops / 2 && n_aborted > n_ops / 40, "{n_answers} answers, {n_aborted} aborted");
}

/// Broken if adapters, strengths, conversations or cache rows are ever mixed up.
#[test]
fn interleavings_over_one_model_give_each_adapter_alone() {
    interleave(Kind::Weights, 2000);
}

/// Broken if encodings are mixed up: an adapter's own, its group's, the base's. With encodings of its own an adapter is not
/// the base at strength 0 either.
#[test]
fn interleavings_of_encodings_and_groups_give_each_adapter_alone() {
    interleave(Kind::Encodings, 1000);
}

/// Broken if the encodings of a group do not reach an adapter that runs in it, or the base's cache rows are taken for its own.
#[test]
fn members_run_with_the_encodings_of_their_group() {
    let files = Files::new(Kind::Encodings);
    let model = files.open();
    let logits = |source: Option<AdapterSource>| {
        let mut engine = model.engine().unwrap();
        if let Some(source) = source {
            engine.load_adapter("x", &source).unwrap();
            engine.select_adapter(Some(("x", &[0.0; 3]))).unwrap();
        }
        engine.forward(&[3, 4, 5], Logits::Last, &AtomicBool::new(false)).unwrap().to_vec()
    };
    let (base, a) = (logits(None), logits(Some(files.section("a"))));
    let (c, d) = (logits(Some(files.section("c"))), logits(Some(files.section("d"))));
    assert_eq!(c, d, "at strength 0 only encodings count, and they share them");
    assert!(base != a && base != c && a != c);
}

/// Counts a thread as done even if it panics, so that the test ends.
struct Done<'a>(&'a AtomicUsize);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Broken if dialogs over one model pay for one adapter twice, or if one keeps it alive for nobody.
#[test]
fn an_adapter_is_in_memory_once() {
    let files = Files::new(Kind::Weights);
    let model = files.open();
    let mut dialogs: Vec<Dialog> = (0..3).map(|_| model.dialog().unwrap()).collect();
    for dialog in &mut dialogs {
        dialog.apply_lora("primary", "a").unwrap();
        dialog.add_adapter("x", files.peft("b")).unwrap();
        dialog.apply_lora("primary", "x").unwrap();
        assert_eq!(model.n_loaded_adapters(), 2);
    }
    for dialog in &mut dialogs {
        assert!(dialog.release_lora_memory("primary", "a").unwrap());
    }
    assert_eq!(model.n_loaded_adapters(), 1);
    drop(dialogs);
    assert_eq!(model.n_loaded_adapters(), 0);
}

/// Broken if an adapter or a group that was run with is still in memory when it was released or removed, though nothing has run since.
#[test]
fn what_is_released_is_gone() {
    let files = Files::new(Kind::Encodings);
    let model = files.open();
    let mut dialog = model.dialog().unwrap();
    dialog.set_max_num_tokens(MAX_TOKENS);
    for (weights, remove) in [("a", false), ("c", false), ("b", true), ("d", true)] {
        let options = QueryOptions::default().with_adapter(AdapterChoice::named(weights));
        dialog.token_query_with(&[3, 4, 5], SentenceCode::Rewind, &options, |_, _| Flow::Continue).unwrap();
        assert_eq!(model.n_loaded_adapters(), 1);
        match remove {
            true => dialog.remove_adapter(weights).unwrap(),
            false => assert!(dialog.release_lora_memory("primary", weights).unwrap()),
        }
        assert_eq!(model.n_loaded_adapters(), 0, "{weights}");
    }
}

/// Broken if a file that was replaced is taken for the one that another dialog has loaded, or if replacing it changes
/// what that dialog says.
#[test]
fn a_replaced_file_is_another_adapter() {
    let files = Files::new(Kind::Weights);
    let (model, alone) = (files.open(), Alone::new(&files));
    let path = files.adapters.path().join("changing.bin");
    let put = |weights: &str| {
        let new = files.adapters.path().join("new.bin");
        std::fs::copy(files.model.path().join(format!("model_{weights}.bin")), &new).unwrap();
        std::fs::rename(new, &path).unwrap();
    };
    let ask = |dialog: &mut Dialog| {
        let mut answer = Vec::new();
        let collect = |ids: &[u32], _| {
            answer.extend_from_slice(ids);
            Flow::Continue
        };
        dialog.token_query(&[3, 4, 5], SentenceCode::Rewind, collect).unwrap();
        answer
    };
    let open = || {
        let mut dialog = model.dialog().unwrap();
        dialog.set_max_num_tokens(MAX_TOKENS);
        dialog.add_adapter("changing", AdapterSource::Sections(vec![Some(path.clone())])).unwrap();
        dialog.apply_lora("primary", "changing").unwrap();
        dialog
    };
    put("a");
    let mut first = open();
    put("c");
    let mut second = open();
    assert_eq!(ask(&mut second), alone.answer(Some("c"), 1.0, &[3, 4, 5]));
    assert_eq!(ask(&mut first), alone.answer(Some("a"), 1.0, &[3, 4, 5]));
}
