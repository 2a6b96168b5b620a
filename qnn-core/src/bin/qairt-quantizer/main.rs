//! `qairt-quantizer`: a DLC and some text in, a DLC with integer weights and static encodings out.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use htp_sim::Workers;
use indicatif::{ProgressBar, ProgressStyle};
use qnn_core::{
    Graph,
    backend::HtpBackend,
    encoding::Encoding,
    offline::{
        arch::{CacheType, Grouping, WeightType},
        calibrate::spread_windows,
        dlc::{read_dlc, write_dlc},
        encodings::{EncodingsFile, FileVersion, dump},
        quantize::{
            Activations, Calibration, Progress, QuantizeOptions, QuantizeReport, Schema, TensorReport, Tools,
            adapters::calibrate_adapters, quantize, text,
        },
        quantize_weights::Bits,
    },
};

mod weights;

use weights::{Situation, WeightArgs};

/// Quantizes a DLC: weights to integers, inputs of matrices to static encodings found by running the model over text.
///
/// With --lora_output_files it calibrates once more with each adapter applied, and adds the encodings to the adapters'
/// files. Next step: qnn-context-binary-generator.
#[derive(Parser)]
#[command(name = "qairt-quantizer", version, rename_all = "snake_case", after_help = EXAMPLES)]
struct Cli {
    /// The model, as qairt-converter wrote it. Float weights calibrate best.
    #[arg(short, long, value_name = "FILE")]
    input_dlc: PathBuf,

    /// The DLC to write. Default: model_quantized.dlc in the current directory.
    #[arg(short, long, value_name = "FILE", default_value = "model_quantized.dlc")]
    output_dlc: PathBuf,

    /// Text to calibrate with; repeatable.
    #[arg(long, value_name = "FILE")]
    calibration_text: Vec<PathBuf>,

    /// A list of files to calibrate with, one a line: token ids (.json list, .raw or .bin 32-bit integers) or text.
    #[arg(long, value_name = "FILE")]
    input_list: Option<PathBuf>,

    /// tokenizer.json for texts. Default: the one beside the input DLC.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,

    /// Token ids of one run, each from an empty cache.
    #[arg(long, value_name = "N", default_value_t = 512)]
    calibration_window: usize,

    /// Runs, spread evenly over the text.
    #[arg(long, value_name = "N", default_value_t = 16)]
    calibration_windows: usize,

    /// Bits of a float weight of the DLC: 4 and 8 become integers, 16 leaves it as it is. With 4, embedding and head get 8.
    #[arg(long, value_name = "BITS", default_value = "8")]
    weights_bitwidth: WeightBits,

    /// Inputs of a matrix that share a scale; must divide its rows. Default: 32, or the largest smaller size that does.
    #[arg(long, value_name = "N", conflicts_with = "use_per_channel_quantization")]
    block_size: Option<usize>,

    /// One scale for each output of a matrix instead of one for each block.
    #[arg(long)]
    use_per_channel_quantization: bool,

    #[command(flatten)]
    weights: WeightArgs,

    /// Bits of the inputs of matrices.
    #[arg(long, value_name = "BITS", default_value = "16")]
    act_bitwidth: ActBits,

    /// How the range of an 8-bit input is found. 16-bit ones always cover all that was seen: they have steps to spare.
    #[arg(long, value_name = "METHOD", default_value = "sqnr")]
    act_quantizer_calibration: Method,

    /// What percentile keeps at each end, in percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 99.99)]
    percentile_calibration_value: f64,

    /// Where codes lie.
    #[arg(long, value_name = "SCHEMA", default_value = "asymmetric")]
    act_quantizer_schema: SchemaName,

    /// With 8 bits: an input whose signal to noise is below so many decibels over the text gets 16 bits. The signal is that
    /// of all but the largest thousandth of its values. 0 allows none.
    #[arg(long, value_name = "DB", default_value_t = 0.0)]
    act_min_sqnr: f64,

    /// Bits of the KV cache; 8 has a scale for each head and position, found when the row is written.
    #[arg(long, value_name = "BITS", default_value = "8")]
    kv_bitwidth: KvBits,

    /// An AIMET encodings file (0.6.1, 1.0.0 or 2.0.0): its encodings replace those found here.
    #[arg(long, value_name = "FILE")]
    quantization_overrides: Option<PathBuf>,

    /// Does as if there were no --quantization_overrides.
    #[arg(long)]
    ignore_quantization_overrides: bool,

    /// Without text: inputs without encodings are quantized row by row when the graph runs, instead of being refused.
    #[arg(long)]
    float_fallback: bool,

    /// Writes the encodings beside the DLC as NAME_encodings.json.
    #[arg(long)]
    dump_encoding_json: bool,

    /// Version of that file.
    #[arg(long, value_name = "VERSION", default_value = "1.0.0")]
    encoding_version: String,

    /// lora_output_files.yaml of qairt-lora-importer: calibrates with each of its adapters too, and gives those of a group one
    /// set of encodings. Needs a DLC converted with --quant_updatable_mode all.
    #[arg(long, value_name = "FILE")]
    lora_output_files: Option<PathBuf>,

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
enum Method {
    MinMax,
    Percentile,
    Mse,
    Sqnr,
    Entropy,
}

#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "lower")]
enum SchemaName {
    Asymmetric,
    Symmetric,
    UnsignedSymmetric,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("qairt-quantizer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    let options = cli.options()?;
    let Some(version) = FileVersion::from_name(&cli.encoding_version) else {
        bail!("--encoding_version {}, need 0.6.1, 1.0.0 or 2.0.0", cli.encoding_version);
    };
    let graph = read_dlc(&cli.input_dlc)?;
    let overrides = match &cli.quantization_overrides {
        Some(path) if !cli.ignore_quantization_overrides => Some(EncodingsFile::open(path)?),
        _ => None,
    };
    let ids = cli.ids()?;
    let windows = match ids.is_empty() {
        true if !cli.float_fallback => {
            bail!("nothing to calibrate with: --calibration_text, --input_list, or --float_fallback")
        }
        true => Vec::new(),
        false => spread_windows(&ids, cli.calibration_window, cli.calibration_windows)?,
    };
    let threads = cli.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let (backend, workers) = (HtpBackend::new(threads)?, Workers::new(threads.max(1))?);
    let situation = Situation {
        weights: options.weights,
        has_overrides: overrides.is_some(),
        has_adapters: cli.lora_output_files.is_some(),
    };
    let rounding = cli.weights.options(&situation, !windows.is_empty())?;
    let mut display = Display::new();
    let rounded = rounding
        .map(|options| weights::round(&graph, &options, &windows, &backend, &mut |step| display.say(&step)))
        .transpose()
        .with_context(|| format!("cannot round the weights of {}", cli.input_dlc.display()))?;
    let (graph, rounding) = match rounded {
        Some((rounded, report)) => (rounded, Some(report)),
        None => (graph, None),
    };
    let mut show = |progress: Progress<'_>| display.show(progress);
    let mut tools = Tools { backend: &backend, workers: &workers, progress: &mut show };
    let done = quantize(&graph, &windows, &options, overrides.as_ref(), &mut tools)
        .with_context(|| format!("cannot quantize {}", cli.input_dlc.display()));
    let adapters = match (&done, &cli.lora_output_files) {
        (Ok((quantized, _)), Some(list)) => {
            calibrate_adapters(&graph, quantized, list, &windows, options.activations, &mut tools)?
        }
        _ => Vec::new(),
    };
    display.end();
    let (quantized, report) = done?;
    write(cli, &quantized, version)?;
    if let Some(rounding) = &rounding {
        weights::print(rounding);
    }
    print_report(&report, windows.len());
    for adapter in adapters {
        let what = match adapter.members.is_empty() {
            true => format!("adapter {}", adapter.name),
            false => format!("group {} ({})", adapter.name, adapter.members.join(", ")),
        };
        println!("{what}: encodings of {} tensors in {}", adapter.tensors, adapter.path.display());
    }
    Ok(())
}

impl Cli {
    fn options(&self) -> anyhow::Result<QuantizeOptions> {
        let grouping = match (self.block_size, self.use_per_channel_quantization) {
            (Some(block_size), _) => Grouping::Block(block_size),
            (None, true) => Grouping::PerChannel,
            (None, false) => Grouping::Default,
        };
        if !(50.0..=100.0).contains(&self.percentile_calibration_value) {
            bail!("--percentile_calibration_value {}, need 50 to 100", self.percentile_calibration_value);
        }
        Ok(QuantizeOptions {
            weights: match self.weights_bitwidth {
                WeightBits::Four => WeightType::Int { bits: Bits::Four, grouping },
                WeightBits::Eight => WeightType::Int { bits: Bits::Eight, grouping },
                WeightBits::Sixteen => WeightType::Keep,
            },
            activations: Activations {
                bits: match self.act_bitwidth {
                    ActBits::Eight => 8,
                    ActBits::Sixteen => 16,
                },
                calibration: match self.act_quantizer_calibration {
                    Method::MinMax => Calibration::MinMax,
                    Method::Percentile => Calibration::Percentile { keep: self.percentile_calibration_value },
                    Method::Mse => Calibration::Mse,
                    Method::Sqnr => Calibration::Sqnr,
                    Method::Entropy => Calibration::Entropy,
                },
                schema: match self.act_quantizer_schema {
                    SchemaName::Asymmetric => Schema::Asymmetric,
                    SchemaName::Symmetric => Schema::Symmetric,
                    SchemaName::UnsignedSymmetric => Schema::UnsignedSymmetric,
                },
                least_sqnr_db: (self.act_min_sqnr > 0.0).then_some(self.act_min_sqnr),
            },
            cache: Some(match self.kv_bitwidth {
                KvBits::Eight => CacheType::Int8,
                KvBits::Sixteen => CacheType::F16,
                KvBits::ThirtyTwo => CacheType::F32,
            }),
        })
    }

    /// Token ids of everything to calibrate with.
    fn ids(&self) -> anyhow::Result<Vec<u32>> {
        let mut files = self.calibration_text.clone();
        if let Some(list) = &self.input_list {
            files.extend(text::read_list(list)?);
        }
        let tokenizer = self.tokenizer.clone().unwrap_or_else(|| self.input_dlc.with_file_name("tokenizer.json"));
        let mut ids = Vec::new();
        for file in files {
            match text::read_ids(&file)? {
                Some(own) => ids.extend(own),
                None => ids.extend(text::read_texts(&[file], &tokenizer)?),
            }
        }
        Ok(ids)
    }
}

fn write(cli: &Cli, graph: &Graph, version: FileVersion) -> anyhow::Result<()> {
    let output = &cli.output_dlc;
    if output.is_dir() {
        bail!("{} is a folder; name the file, as in {0}/model.dlc", output.display());
    }
    if let Some(folder) = output.parent() {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    write_dlc(output, graph)?;
    println!("wrote {}", output.display());
    for name in SIDECARS {
        let (from, to) = (cli.input_dlc.with_file_name(name), output.with_file_name(name));
        if from.is_file() && from != to {
            std::fs::copy(&from, &to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
            println!("wrote {}", to.display());
        }
    }
    if cli.dump_encoding_json {
        let stem = output.file_stem().and_then(|stem| stem.to_str()).unwrap_or("model");
        let path = output.with_file_name(format!("{stem}_encodings.json"));
        let (file, left_out) = dump(graph, version);
        std::fs::write(&path, format!("{}\n", file.to_json())).with_context(|| path.display().to_string())?;
        println!("wrote {} ({} tensors)", path.display(), file.tensors.len());
        if let Some(first) = left_out.first() {
            println!("  without {} weights whose blocks have float minima, {first} the first", left_out.len());
        }
    }
    Ok(())
}

fn print_report(report: &QuantizeReport, windows: usize) {
    println!("weights made integers: {}", report.weights);
    if let Some(done) = &report.overrides {
        println!("overridden: {} weights, {} computed tensors", done.weights.len(), done.activations.len());
        for (why, names) in [("in the file but not in the graph", &done.unknown)] {
            if let Some(first) = names.first() {
                println!("  {why}: {} tensors, {first} the first", names.len());
            }
        }
        for (name, why) in &done.passed_over {
            println!("  left as it is: {name} ({why})");
        }
    }
    if report.tensors.is_empty() {
        return;
    }
    println!("calibrated: {} tensors over {windows} windows; worst signal to noise first:", report.tensors.len());
    let mut tensors: Vec<&TensorReport> = report.tensors.iter().collect();
    tensors.sort_by(|a, b| a.sqnr_db.total_cmp(&b.sqnr_db));
    for tensor in tensors.iter().take(WORST) {
        let Encoding::ScaleOffset { bitwidth, scale, offset } = tensor.encoding.1 else { continue };
        let ((min, max), name, db) = (tensor.range, &tensor.name, tensor.sqnr_db);
        println!("  {db:>6.1} dB  {name}: {min:.3} to {max:.3}, {bitwidth} bits, scale {scale:.3e}, offset {offset}");
    }
    let wide =
        report.tensors.iter().filter(|t| matches!(t.encoding.1, Encoding::ScaleOffset { bitwidth: 16, .. })).count();
    println!("  16 bits: {wide}, 8 bits: {}", report.tensors.len() - wide);
}

/// A bar on a terminal, plain lines elsewhere; both on standard error.
struct Display {
    bar: Option<ProgressBar>,
}

impl Display {
    fn new() -> Display {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Display { bar }
    }

    fn say(&self, step: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_message(step.to_owned());
                bar.tick();
            }
            None => eprintln!("{step}"),
        }
    }

    fn show(&mut self, progress: Progress<'_>) {
        match (progress, &self.bar) {
            (Progress::Weight(name), Some(bar)) => {
                bar.set_message(name.to_owned());
                bar.tick();
            }
            (Progress::Weight(_), None) => {}
            (Progress::Adapter(name), Some(bar)) => bar.set_message(format!("calibrating with {name}")),
            (Progress::Adapter(name), None) => eprintln!("calibrating with {name}"),
            (Progress::Window(done, all), Some(bar)) => {
                bar.set_length(all as u64);
                bar.set_position(done as u64);
            }
            (Progress::Window(done, all), None) => eprintln!("calibrating: {done}/{all}"),
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Files that belong beside a DLC.
const SIDECARS: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"];
/// Tensors that the summary lists.
const WORST: usize = 8;

const EXAMPLES: &str = "Examples:
  qairt-quantizer -i float/model.dlc -o w8a16/model.dlc --calibration_text some.txt
  qairt-quantizer -i float/model.dlc -o w4a16/model.dlc --calibration_text some.txt --weights_bitwidth 4
  qairt-quantizer -i float/model.dlc -o lpbq/model.dlc --calibration_text some.txt --weights_bitwidth 4 --use_block_steps
  qairt-quantizer -i float/model.dlc -o w4a8/model.dlc --calibration_text some.txt --weights_bitwidth 4 --act_bitwidth 8
  qairt-quantizer -i float/model.dlc -o aimet/model.dlc --quantization_overrides model.encodings --float_fallback";
