//! `qairt-converter`: a model's files in, a DLC and the tokenizer's files out.

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use qnn_core::offline::{
    arch::{ActivationBits, CacheType, Grouping, Precision, WeightType},
    convert::{ConvertOptions, Progress, convert_with_overrides},
    dry_run::dry_run,
    lora::{LoraBits, LoraOptions, UpdatableMode},
    quantize_weights::Bits,
};

#[path = "../shared/exit.rs"]
mod exit;
mod print;

/// Converts a model to a DLC: one file with the graph and its weights.
///
/// The tokenizer's files (tokenizer.json, tokenizer_config.json, generation_config.json) are written beside it, from the
/// model's own files or from the metadata of a GGUF, unless it goes to the model's own folder. Next step:
/// qnn-context-binary-generator.
#[derive(Parser)]
#[command(name = "qairt-converter", version, rename_all = "snake_case", after_help = EXAMPLES)]
struct Cli {
    /// The model: a Hugging Face directory (config.json, model.safetensors or its shards; GPTQ and AWQ of 4 bits too) or a
    /// .gguf file (any part of a split one).
    #[arg(short, long, value_name = "PATH", required_unless_present = "list_architectures")]
    input_network: Option<PathBuf>,

    /// The DLC to write. Default: model.dlc in the current directory.
    #[arg(short, long, value_name = "FILE", default_value = "model.dlc")]
    output_path: PathBuf,

    /// Bits of a weight: 4 and 8 are integers, 16 and 32 floats. Default: as the source has them, the grids of GGUF, GPTQ
    /// and AWQ included. With 4, embedding and head get 8.
    #[arg(long, value_name = "BITS")]
    weights_bitwidth: Option<WeightBits>,

    /// Inputs of a matrix that share a scale; must divide its rows. Default: 32, or the largest smaller size that does.
    #[arg(long, value_name = "N", conflicts_with = "use_per_channel_quantization")]
    block_size: Option<usize>,

    /// One scale for each output of a matrix instead of one for each block.
    #[arg(long)]
    use_per_channel_quantization: bool,

    /// Bits of the activations that meet integer weights; each row gets its scale when the graph runs.
    #[arg(long, value_name = "BITS", default_value = "16")]
    act_bitwidth: ActBits,

    /// An AIMET encodings file (0.6.1, 1.0.0 or 2.0.0): the weights that it names get its scales, computed tensors its static
    /// encodings. Best with --weights_bitwidth 32, so that no weight is rounded twice.
    #[arg(long, value_name = "FILE")]
    quantization_overrides: Option<PathBuf>,

    /// Bits of the KV cache: 8 is integers, 16 and 32 floats. Default: 8, or 32 if no weight is an integer.
    #[arg(long, value_name = "BITS")]
    kv_bitwidth: Option<KvBits>,

    /// File with the names of LoRA weights, one a line, as PEFT has them
    /// (base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight): these layers get an adapter branch.
    #[arg(long, value_name = "FILE")]
    lora_weight_list: Option<PathBuf>,

    /// A PEFT directory whose layers get an adapter branch; repeatable. With --lora_weight_list, only checked against it.
    #[arg(long, value_name = "DIR")]
    lora_adapter: Vec<PathBuf>,

    /// Rank that the branches have room for. Default: the largest of the --lora_adapter directories. Two adapters at once
    /// need the sum of their ranks.
    #[arg(long, value_name = "N")]
    lora_max_rank: Option<usize>,

    /// Bits of the adapters' weights: 4 and 8 are integers, 16 and 32 floats. Default: 8, or 32 in a graph without integer
    /// weights.
    #[arg(long, value_name = "BITS")]
    lora_weights_bitwidth: Option<LoraWeightBits>,

    /// Which encodings an adapter may bring: none (its weights are then floats), those of its own weights, or those of all
    /// tensors that have one. Default: adapter_only.
    #[arg(long, value_name = "MODE")]
    quant_updatable_mode: Option<Mode>,

    /// Print what the conversion would give (formats, sizes, memory, where adapters attach, warnings) and write nothing.
    /// Not with --quantization_overrides, which needs the values of the weights.
    #[arg(long, conflicts_with = "quantization_overrides")]
    dry_run: bool,

    /// Print the families of models that can be converted.
    #[arg(long, exclusive = true)]
    list_architectures: bool,

    /// Threads that share the work. Default: all the machine has.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum WeightBits {
    #[value(name = "4")]
    Four,
    #[value(name = "8")]
    Eight,
    #[value(name = "16")]
    Sixteen,
    #[value(name = "32")]
    ThirtyTwo,
}

#[derive(Clone, Copy, ValueEnum)]
enum ActBits {
    #[value(name = "8")]
    Eight,
    #[value(name = "16")]
    Sixteen,
}

#[derive(Clone, Copy, ValueEnum)]
enum KvBits {
    #[value(name = "8")]
    Eight,
    #[value(name = "16")]
    Sixteen,
    #[value(name = "32")]
    ThirtyTwo,
}

#[derive(Clone, Copy, ValueEnum)]
enum LoraWeightBits {
    #[value(name = "4")]
    Four,
    #[value(name = "8")]
    Eight,
    #[value(name = "16")]
    Sixteen,
    #[value(name = "32")]
    ThirtyTwo,
}

#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Mode {
    None,
    AdapterOnly,
    All,
}

fn main() -> ExitCode {
    exit::code("qairt-converter", run(&Cli::parse()))
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    let out = &mut io::stdout().lock();
    if cli.list_architectures {
        return print::architectures(out).context(exit::STDOUT);
    }
    let options = ConvertOptions {
        input: cli.input_network.clone().unwrap_or_default(),
        output: cli.output_path.clone(),
        precision: cli.precision()?,
        threads: cli.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)),
    };
    let lora = cli.lora()?;
    if cli.dry_run {
        let found = dry_run(&options, lora.as_ref());
        let found = found.with_context(|| format!("cannot convert {}", options.input.display()))?;
        return print::dry_run(&found, out).context(exit::STDOUT);
    }
    let mut display = Display::new();
    let overrides = cli.quantization_overrides.as_deref();
    let report = convert_with_overrides(&options, lora.as_ref(), overrides, &mut |progress| display.show(progress))
        .with_context(|| format!("cannot convert {}", options.input.display()));
    display.end();
    print::summary(&report?, &options.output, out).context(exit::STDOUT)
}

impl Cli {
    fn lora(&self) -> anyhow::Result<Option<LoraOptions>> {
        if self.lora_weight_list.is_none() && self.lora_adapter.is_empty() {
            let given = [
                ("--lora_max_rank", self.lora_max_rank.is_some()),
                ("--lora_weights_bitwidth", self.lora_weights_bitwidth.is_some()),
                ("--quant_updatable_mode", self.quant_updatable_mode.is_some()),
            ];
            if let Some((flag, _)) = given.iter().find(|(_, is_given)| *is_given) {
                bail!("{flag} needs --lora_weight_list or --lora_adapter");
            }
            return Ok(None);
        }
        Ok(Some(LoraOptions {
            weight_list: self.lora_weight_list.clone(),
            adapters: self.lora_adapter.clone(),
            max_rank: self.lora_max_rank,
            bits: self.lora_weights_bitwidth.map(|bits| match bits {
                LoraWeightBits::Four => LoraBits::Four,
                LoraWeightBits::Eight => LoraBits::Eight,
                LoraWeightBits::Sixteen => LoraBits::Sixteen,
                LoraWeightBits::ThirtyTwo => LoraBits::ThirtyTwo,
            }),
            mode: match self.quant_updatable_mode.unwrap_or(Mode::AdapterOnly) {
                Mode::None => UpdatableMode::None,
                Mode::AdapterOnly => UpdatableMode::AdapterOnly,
                Mode::All => UpdatableMode::All,
            },
        }))
    }

    fn precision(&self) -> anyhow::Result<Precision> {
        let grouping = match (self.block_size, self.use_per_channel_quantization) {
            (Some(block_size), _) => Grouping::Block(block_size),
            (None, true) => Grouping::PerChannel,
            (None, false) => Grouping::Default,
        };
        let integers = matches!(self.weights_bitwidth, Some(WeightBits::Four | WeightBits::Eight));
        if grouping != Grouping::Default && !integers {
            bail!("--block_size and --use_per_channel_quantization need --weights_bitwidth 4 or 8");
        }
        Ok(Precision {
            weights: match self.weights_bitwidth {
                None => WeightType::Keep,
                Some(WeightBits::Four) => WeightType::Int { bits: Bits::Four, grouping },
                Some(WeightBits::Eight) => WeightType::Int { bits: Bits::Eight, grouping },
                Some(WeightBits::Sixteen) => WeightType::F16,
                Some(WeightBits::ThirtyTwo) => WeightType::F32,
            },
            activations: match self.act_bitwidth {
                ActBits::Eight => ActivationBits::Eight,
                ActBits::Sixteen => ActivationBits::Sixteen,
            },
            cache: self.kv_bitwidth.map(|bits| match bits {
                KvBits::Eight => CacheType::Int8,
                KvBits::Sixteen => CacheType::F16,
                KvBits::ThirtyTwo => CacheType::F32,
            }),
        })
    }
}

/// A bar on a terminal, plain lines elsewhere; both on standard error.
struct Display {
    bar: Option<ProgressBar>,
    done: usize,
    total: usize,
}

impl Display {
    fn new() -> Display {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Display { bar, done: 0, total: 0 }
    }

    fn show(&mut self, progress: Progress<'_>) {
        match (progress, &self.bar) {
            (Progress::Weights(total), Some(bar)) => bar.set_length(total as u64),
            (Progress::Weights(total), None) => {
                self.total = total;
                eprintln!("converting {total} weights");
            }
            (Progress::Weight(name), Some(bar)) => {
                bar.set_message(name.to_owned());
                bar.inc(1);
            }
            (Progress::Weight(_), None) => {
                self.done += 1;
                // A line for each tenth.
                if self.done * 10 / self.total.max(1) > (self.done - 1) * 10 / self.total.max(1) {
                    eprintln!("converting: {}/{}", self.done, self.total);
                }
            }
            (Progress::Writing, Some(bar)) => bar.set_message("writing"),
            (Progress::Writing, None) => eprintln!("writing"),
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

const EXAMPLES: &str = "Examples:
  qairt-converter --list_architectures
  qairt-converter -i SmolLM2-135M-Instruct/ --weights_bitwidth 4 --lora_adapter adapters/json --dry_run
  qairt-converter -i SmolLM2-135M-Instruct.Q4_1.gguf -o out/model.dlc
  qairt-converter -i SmolLM2-135M-Instruct/ -o out/model.dlc --weights_bitwidth 4
  qairt-converter -i SmolLM2-135M-Instruct/ -o out/model.dlc --weights_bitwidth 8 --use_per_channel_quantization
  qairt-converter -i SmolLM2-135M-Instruct.Q4_1.gguf -o out/model.dlc --lora_adapter adapters/json --lora_adapter adapters/sql";
