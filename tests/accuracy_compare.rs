//! Guards comparisons: two forms of one model are as far apart as they are, and the error is found where it is made.

use std::path::Path;

use genie::accuracy::{
    AccuracyError, Comparer, Comparison, Windows, compare::Side, perplexity, shared_ids, summary::Summary,
};
use genie::engine::{Engine, EngineError};
use genie::{AdapterChoice, Model};
use genie_workspace::{converted::Converted, tiny_model::TinyModel};
use qnn_core::backend::Seen;
use qnn_core::offline::{
    arch::{ActivationBits, Grouping, Precision, WeightType},
    quantize_weights::Bits,
};
use qnn_core::outline::Place;

const CUT: Windows = Windows { window: 70, windows: 2 };

fn int8() -> Precision {
    let weights = WeightType::Int { bits: Bits::Eight, grouping: Grouping::Default };
    Precision { weights, activations: ActivationBits::Sixteen, cache: None }
}

fn float() -> Precision {
    Precision { weights: WeightType::Keep, activations: ActivationBits::Sixteen, cache: None }
}

fn tiny() -> TinyModel {
    TinyModel { layers: 3, ..TinyModel::llama(21) }
}

fn text() -> String {
    "The quick brown fox jumps over the lazy dog 17 times. ".repeat(3)
}

fn open(model: &Converted) -> Model {
    Model::open(model.config().expect("a config of the tests")).expect("it was converted just now")
}

fn compare(reference: &Model, tested: &Model, choice: &AdapterChoice) -> Result<Comparison, AccuracyError> {
    let ids = shared_ids(reference.tokenizer(), tested.tokenizer(), &text())?;
    Comparer::new(reference, tested)?.run(choice, &ids, CUT, |_, _| {})
}

fn assert_exact(found: &Comparison) {
    assert_eq!((found.log_ratio, found.log_ratio_error, found.ratio()), (0.0, 0.0, 1.0));
    assert_eq!(found.top1_agreement, 1.0);
    assert_eq!((found.divergence.mean, found.divergence.max), (0.0, 0.0));
    for tensor in &found.tensors {
        let all = [tensor.made.all, tensor.made.row, tensor.accumulated.all, tensor.accumulated.row];
        assert_eq!(all, [f64::INFINITY; 4], "{}", tensor.name);
    }
}

// Guards: a model compared with itself is exact in every figure, and its perplexity is the one measured alone.
#[test]
fn a_model_is_exactly_itself() {
    let model = open(&Converted::tiny(&tiny(), int8()).expect("it converts"));
    let found = compare(&model, &model, &AdapterChoice::Base).expect("they can be compared");
    assert_exact(&found);
    let ids = shared_ids(model.tokenizer(), model.tokenizer(), &text()).expect("the same tokenizer");
    let mut engine = model.engine().expect("it is open");
    assert_eq!(found.tested, perplexity(&mut engine, &ids, CUT, |_, _| {}).expect("enough text"));
    engine.rewind(0);
    let max = engine.model().max_rows();
    let refused = engine.forward_watched(&vec![3; max + 1], &mut |_| Seen::Kept).expect_err("more than one run takes");
    assert!(
        matches!(refused, EngineError::RunTooLong { have, max: most } if (have, most) == (max + 1, max)),
        "{refused}"
    );
    assert!(engine.forward_watched(&vec![3; max], &mut |_| Seen::Kept).is_ok());
    let places: Vec<Place> = found.layers().map(|tensor| tensor.place).collect();
    assert_eq!(places, [Place::Embedding, Place::Layer(0), Place::Layer(1), Place::Layer(2), Place::Head]);
    assert!(found.tensors.iter().any(|tensor| !tensor.ends), "tensors inside the layers are looked at too");
}

// Guards: integers are near their floats and not equal to them; where the models are cut does not matter.
#[test]
fn integers_are_near_their_floats() {
    let reference = open(&Converted::tiny(&tiny(), float()).expect("it converts"));
    let tested = open(&Converted::tiny(&tiny(), int8()).expect("it converts"));
    let found = compare(&reference, &tested, &AdapterChoice::Base).expect("they can be compared");
    assert!((0.9..1.1).contains(&found.ratio()) && found.log_ratio != 0.0 && found.log_ratio_error > 0.0);
    let divergence = found.divergence;
    assert!(0.0 < divergence.median && divergence.median <= divergence.p99 && divergence.p99 <= divergence.max);
    assert!(found.top1_agreement > 0.5);
    for layer in found.layers() {
        assert!((20.0..120.0).contains(&layer.made.row), "{}: {:?}", layer.name, layer.made);
    }
    let last = found.layers().last().expect("the logits");
    assert!(last.accumulated.row < last.made.row, "errors add up");

    let cut = open(&Converted::tiny_in_splits(&tiny(), int8(), &[], 2).expect("it converts"));
    assert_eq!(compare(&reference, &cut, &AdapterChoice::Base).expect("they can be compared"), found);
    let summary = Summary::of(&cut);
    assert_eq!(summary.files.len(), 2);
    let whole = Summary::of(&tested);
    assert_eq!((&summary.inputs, &summary.cache), (&whole.inputs, &whole.cache));
    assert!(whole.weights.keys().any(|format| format.starts_with("int8 block")), "{:?}", whole.weights);
}

// Guards: a layer whose weights are damaged is the one that makes the error; those before and behind it make none, and
// those behind it carry it on.
#[test]
fn a_damaged_layer_is_the_one_that_makes_the_error() {
    let reference = open(&Converted::tiny(&tiny(), float()).expect("it converts"));
    let damaged = TinyModel { coarse_layer: Some(1), ..tiny() };
    for splits in [1, 3] {
        let tested = open(&Converted::tiny_in_splits(&damaged, float(), &[], splits).expect("it converts"));
        let found = compare(&reference, &tested, &AdapterChoice::Base).expect("they can be compared");
        for tensor in &found.tensors {
            let (is_damaged, is_before) = (tensor.place == Place::Layer(1), tensor.place < Place::Layer(1));
            if tensor.ends {
                assert_eq!(tensor.made.all.is_finite(), is_damaged, "{splits} {}: {:?}", tensor.name, tensor.made);
            }
            assert!(is_damaged || tensor.made.all.is_infinite(), "{}", tensor.name);
            assert!(!is_before || tensor.accumulated.all.is_infinite(), "{}", tensor.name);
        }
        let last = found.layers().last().expect("the logits");
        assert!(last.accumulated.row < 40.0 && found.divergence.mean > 0.0, "{:?}", last.accumulated);
    }
}

// Guards: both models run with the adapter that is named, at its strength; one that the reference lacks is refused, and
// says so.
#[test]
fn adapters_are_compared_with_themselves() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let peft = folder.path().join("a");
    tiny().write_peft(&peft, 5, 4).expect("it can be written");
    let adapters: &[(&str, &Path)] = &[("a", &peft)];
    // Sections are read when they are first used: the folders have to stay.
    let reference = Converted::tiny_with_adapters(&tiny(), float(), adapters).expect("it converts");
    let tested = Converted::tiny_in_splits(&tiny(), int8(), adapters, 2).expect("it converts");
    let (reference, tested) = (&open(&reference), &open(&tested));
    let choice =
        |strength: f32| AdapterChoice::Named { name: "a".to_owned(), strengths: vec![("a".to_owned(), strength)] };
    let base = compare(reference, tested, &AdapterChoice::Base).expect("they can be compared");
    let full = compare(reference, tested, &choice(1.0)).expect("they can be compared");
    let none = compare(reference, tested, &choice(0.0)).expect("they can be compared");
    assert_eq!(none, base, "strength 0 is the base");
    assert!((full.reference.perplexity / base.reference.perplexity).ln().abs() > 0.05, "the adapter has an effect");
    assert!((0.8..1.25).contains(&full.ratio()), "{}", full.ratio());
    assert_exact(&compare(tested, tested, &choice(0.5)).expect("they can be compared"));

    let plain = open(&Converted::tiny(&tiny(), float()).expect("it converts"));
    match compare(&plain, tested, &choice(1.0)) {
        Err(AccuracyError::Side { side: Side::Reference, why }) => {
            let text =
                format!("{why}: {}", std::error::Error::source(&*why).map(ToString::to_string).unwrap_or_default());
            assert!(text.contains("\"a\""), "{text}");
        }
        other => panic!("{other:?}"),
    }
    // Without an adapter the branches change nothing: sums of branches are not in both models, all else is.
    assert!(compare(&plain, tested, &AdapterChoice::Base).is_ok());
}

// Guards: models that are no forms of one model are refused with both values.
#[test]
fn other_models_are_refused_with_both_values() {
    let model = |tiny: TinyModel| open(&Converted::tiny(&tiny, float()).expect("it converts"));
    let reference = model(tiny());
    let why = |other: TinyModel| {
        let other = model(other);
        compare(&reference, &other, &AdapterChoice::Base).expect_err("they are other models").to_string()
    };
    let differ = |what: &str, a: &str, b: &str| format!("{what}: the reference has {a}, the model to compare {b}");
    assert_eq!(why(TinyModel { layers: 2, ..tiny() }), differ("number of layers", "3", "2"));
    let wide = why(TinyModel { ffn: 96, ..tiny() });
    assert!(wide.starts_with("width of tensor model.layers.0.mlp.") && wide.contains("has 80"), "{wide}");
    let shorter = Comparer::new(&reference, &model(TinyModel { vocab: 66, ..tiny() })).err().map(|why| why.to_string());
    assert_eq!(shorter, Some(differ("size of the vocabulary", "67", "66")));
    // A vocabulary that ends before the letters of the text has other ids for it.
    let short = why(TinyModel { vocab: 20, ..tiny() });
    assert!(short.starts_with("id 0 of the text: the reference has 48"), "{short}");
    let ids = [1; 69];
    let mut comparer = Comparer::new(&reference, &reference).expect("they can be compared");
    let refused = comparer.run(&AdapterChoice::Base, &ids, CUT, |_, _| {});
    assert!(matches!(refused, Err(AccuracyError::TooShort { have: 69, window: 70 })));
}
