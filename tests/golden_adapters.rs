//! Guards the promise that real adapters give the reference's numbers: goldens of transformers and PEFT in float32.

use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, ensure};
use genie::accuracy::{Windows, perplexity};
use genie::adapters::{AdapterChoice, Adapters, Selection};
use genie::engine::{AdapterSource, Engine, Logits, qnn::QnnEngine};
use genie::{Dialog, Flow, Message, QueryOptions};
use genie_workspace::converted::{Converted, adapter_folder};
use genie_workspace::effects::{effects, shows};
use genie_workspace::golden::{Golden, generations, integers, perplexities};
use qnn_core::offline::arch::{ActivationBits, Grouping, Precision, WeightType};
use qnn_core::offline::quantize_weights::Bits;
use serde_json::Value;

const HF: &str = "smollm2-135m-instruct";

const EIGHT_BITS: WeightType = WeightType::Int { bits: Bits::Eight, grouping: Grouping::Default };

/// Broken if an adapter on the float graph is not the adapter: ids token for token, top ten logits within 1e-2, at
/// strength 1, at 0.5, and two at once.
#[test]
#[ignore = "slow: needs the real model in GENIE_MODELS"]
fn float_graph_gives_the_golden_continuations() -> Result<()> {
    let mut model = Open::new(Converted::real_with_adapters(HF, precision(WeightType::F32))?)?;
    let golden = generations();
    for (config, choice) in configs() {
        model.select(&choice)?;
        let mut worst = 0.0f64;
        for prompt in golden["prompts"].as_array().context("prompts")? {
            let run = Golden::new(prompt, config)?;
            let found = run.continue_greedily(&mut model.engine)?;
            ensure!(found.ids == run.ids, "{config}, {}: {:?}, golden {:?}", run.name, found.ids, run.ids);
            worst = worst.max(found.top_error);
        }
        println!("{config}: top-10 logits within {worst:.5}");
        ensure!(worst < 1e-2, "{config}: a top-10 logit is off by {worst}");
    }
    Ok(())
}

/// Broken if there is a second truth: strength 0 and the default adapter are the base bit for bit, in floats and in
/// integers, and an adapter straight from its PEFT directory is the one from its section.
#[test]
#[ignore = "slow: needs the real model in GENIE_MODELS"]
fn ways_that_mean_the_same_give_the_same_bits() -> Result<()> {
    for weights in [WeightType::F32, EIGHT_BITS] {
        let mut model = Open::new(Converted::real_with_adapters(HF, precision(weights))?)?;
        let base = model.logits(&AdapterChoice::Base)?;
        let pirate = model.logits(&AdapterChoice::named("pirate"))?;
        ensure!(base != pirate, "the adapter has no effect");
        ensure!(model.logits(&AdapterChoice::named("pirate").at("lora_alpha", 0.0))? == base, "strength 0");
        ensure!(model.logits(&AdapterChoice::named("default_adapter"))? == base, "default adapter");
        ensure!(model.logits(&AdapterChoice::Base)? == base, "back at the base");
        let composed = AdapterChoice::named("json+pirate").at("json", 0.0);
        let error = max_difference(&model.logits(&composed)?, &pirate);
        println!("{weights:?}: pirate alone and beside json at 0 differ by {error}");
        // In integers a composed adapter shares its scales, so that it is rounded otherwise than its parts.
        ensure!(error < 1e-3 || weights != WeightType::F32, "pirate alone and beside json at 0 differ by {error}");
        let info = model.engine.load_adapter("peft", &AdapterSource::Peft(adapter_folder("pirate")))?;
        model.engine.select_adapter(Some(("peft", &vec![1.0; info.rank])))?;
        ensure!(model.run()? == pirate, "section and PEFT directory");
        ensure!((info.targets, info.rank) == (210, 16), "{} targets, rank {}", info.targets, info.rank);
    }
    Ok(())
}

/// Broken if quantized adapters on a quantized base cost more than they must: perplexities within 1 % of float's.
#[test]
#[ignore = "slow: needs the real model in GENIE_MODELS"]
fn quantized_adapters_keep_the_perplexity() -> Result<()> {
    let mut model = Open::new(Converted::real_with_adapters(HF, precision(EIGHT_BITS))?)?;
    let golden = perplexities();
    let ids = integers(&golden["ids"]);
    for (config, choice) in configs() {
        model.select(&choice)?;
        let measured = perplexity(&mut model.engine, &ids, Windows { window: 512, windows: 8 }, |_, _| {})?;
        let float = golden["runs"][config]["ppl"].as_f64().context("ppl")?;
        let ratio = measured.perplexity / float;
        println!("{config}: perplexity {:.3}, {ratio:.5} of float", measured.perplexity);
        ensure!((ratio - 1.0).abs() <= 0.01, "{config}: perplexity is {ratio:.5} of float, need 0.99 to 1.01");
    }
    Ok(())
}

/// Broken if a quantized adapter does less than it was trained for: at most 1 of its 30 prompts fewer than in float. All
/// in one dialog, adapter by query, so that a mix-up of cache rows would show too.
#[test]
#[ignore = "slow: needs the real model in GENIE_MODELS"]
fn quantized_adapters_show_their_effect() -> Result<()> {
    let model = Converted::real_with_adapters(HF, precision(EIGHT_BITS))?;
    let mut dialog = Dialog::new(model.config()?)?;
    dialog.set_max_num_tokens(48);
    let effects = effects();
    for adapter in ["json", "pirate", "sql"] {
        let options = QueryOptions::default().with_adapter(AdapterChoice::named(adapter));
        let (mut n_shown, mut n_all) = (0_u32, 0);
        for kind in ["trained_kinds", "other_kinds"] {
            for prompt in effects["prompts"][adapter][kind].as_array().context("prompts")? {
                let message = Message::new("user", prompt.as_str().context("a prompt")?);
                let mut answer = String::new();
                dialog.chat_with(&[message], &options, |piece, _| {
                    answer.push_str(piece);
                    Flow::Continue
                })?;
                n_all += 1;
                n_shown += u32::from(shows(adapter, &answer));
            }
        }
        let rates = integers(&effects["float_match_rates"][adapter]["1.0"]);
        let in_float = rates[0] + rates[2];
        println!("{adapter}: {n_shown} of {n_all}, in float {in_float}");
        ensure!(in_float <= n_shown + 1, "{adapter}: {n_shown} of {n_all} show the effect, in float {in_float}");
    }
    Ok(())
}

/// A model and its adapters, open.
struct Open {
    /// Adapters are read at their first use.
    _files: Converted,
    engine: QnnEngine,
    adapters: Adapters,
}

impl Open {
    fn new(model: Converted) -> Result<Open> {
        let config = model.config()?.engine;
        let adapters = Adapters::new(&config.lora, "primary");
        Ok(Open { engine: QnnEngine::open(&config)?, adapters, _files: model })
    }

    fn select(&mut self, choice: &AdapterChoice) -> Result<()> {
        let selection = self.adapters.resolve(&mut self.engine, choice)?;
        Ok(self.engine.select_adapter(selection.as_ref().map(Selection::for_engine))?)
    }

    fn logits(&mut self, choice: &AdapterChoice) -> Result<Vec<u32>> {
        self.select(choice)?;
        self.run()
    }

    /// Bits of the logits of some prompt, of a step through the prompt graph and one through the token graph.
    fn run(&mut self) -> Result<Vec<u32>> {
        let golden: Value = generations();
        let prompt = integers(&golden["prompts"][0]["prompt_ids"]);
        let (never, mut bits) = (AtomicBool::new(false), Vec::new());
        self.engine.rewind(0);
        for part in [&prompt[..], &prompt[..1]] {
            bits.extend(self.engine.forward(part, Logits::Last, &never)?.iter().map(|logit| logit.to_bits()));
        }
        Ok(bits)
    }
}

fn max_difference(a: &[u32], b: &[u32]) -> f32 {
    let difference = |(a, b): (&u32, &u32)| (f32::from_bits(*a) - f32::from_bits(*b)).abs();
    a.iter().zip(b).map(difference).fold(0.0, f32::max)
}

fn precision(weights: WeightType) -> Precision {
    Precision { weights, activations: ActivationBits::Sixteen, cache: None }
}

/// Golden configs and how a user asks for them.
fn configs() -> [(&'static str, AdapterChoice); 5] {
    let named = AdapterChoice::named;
    [
        ("json@1.0", named("json")),
        ("pirate@1.0", named("pirate")),
        ("sql@1.0", named("sql")),
        ("pirate@0.5", named("pirate").at("lora_alpha", 0.5)),
        ("json@0.5+pirate@0.5", named("json+pirate").at("json", 0.5).at("pirate", 0.5)),
    ]
}
