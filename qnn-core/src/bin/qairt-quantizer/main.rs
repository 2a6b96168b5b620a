//! `qairt-quantizer`: a DLC and some text in, a DLC with integer weights and static encodings out.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use htp_sim::Workers;
use qnn_core::{
    Graph,
    backend::HtpBackend,
    check_outputs, check_place,
    offline::{
        arch::{CacheType, Grouping, WeightType},
        calibrate::opened_windows,
        dlc::{check_output, read_dlc, write_dlc},
        encodings::{EncodingsFile, FileVersion, dump},
        equalize::{SmoothOptions, SmoothReport, smooth},
        generate::copy_sidecars,
        lora::{PlacedAdapters, place_adapters},
        quantize::{
            Activations, Calibration, Progress, QuantizeOptions, QuantizeReport, Schema, Tools,
            adapters::{AdapterReport, calibrate_adapters},
            quantize, text,
        },
        quantize_weights::Bits,
        rounding::{RoundingReport, can_scale_channels},
    },
    write_atomic,
};

mod display;
#[path = "../shared/exit.rs"]
mod exit;
mod report;
mod weights;

use display::Display;
use weights::{Situation, WeightArgs};

/// Quantizes a DLC: weights to integers, inputs of matrices to static encodings found by running the model over text.
///
/// With --lora_output_files it calibrates once more with each adapter applied, and adds the encodings to the adapters'
/// files. Where channels of the model are scaled, the adapters are scaled with them, into files of their own. Next step:
/// qnn-context-binary-generator, with the list of adapters that is printed.
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

    /// Token ids of one run, each from an empty cache. Every run begins with what a text begins with in a dialog: the
    /// tokenizer's BOS, if it adds one.
    #[arg(long, value_name = "N", default_value_t = 512)]
    calibration_window: usize,

    /// Runs, spread evenly over the text.
    #[arg(long, value_name = "N", default_value_t = 16)]
    calibration_windows: usize,

    /// Bits of a float weight of the DLC: 4 and 8 become integers, 16 leaves it as it is. With 4, embedding
    /// and head get 8, the head unless --head_bitwidth says 4.
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
    /// Default: min-max for smoothed inputs, else sqnr.
    #[arg(long, value_name = "METHOD")]
    act_quantizer_calibration: Option<Method>,

    /// What percentile keeps at each end, in percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 99.99)]
    percentile_calibration_value: f64,

    /// Where codes lie.
    #[arg(long, value_name = "SCHEMA", default_value = "asymmetric")]
    act_quantizer_schema: SchemaName,

    /// With 8 bits: an input whose signal to noise is below so many decibels over the text gets 16 bits. The signal is that
    /// of all but the largest thousandth of its values. 0 allows none.
    #[arg(long, value_name = "DB", default_value_t = 26.0)]
    act_min_sqnr: f64,

    /// The same with an adapter applied: an input that is below gets 16 bits in the adapter's section, and takes the time of
    /// them while that adapter is applied. 0 leaves the base's bits.
    #[arg(long, value_name = "DB", default_value_t = 26.0)]
    adapter_act_min_sqnr: f64,

    /// Scales channels between norms and matrices, and between matrices, and sorts those of gated MLPs, so that one 8-bit
    /// grid holds the inputs of a matrix; what the model computes stays the same. Needs text. Default: on with
    /// --act_bitwidth 8 where there is text and no encodings file.
    #[arg(long, value_name = "BOOL")]
    smooth_inputs: Option<bool>,

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

    /// Where adapters go that have to be scaled because their base's channels are. Default: the folder lora beside the
    /// output DLC. Adapters that need no scaling stay where they are.
    #[arg(long, value_name = "FOLDER", requires = "lora_output_files")]
    lora_output_dir: Option<PathBuf>,

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
    exit::code("qairt-quantizer", run(&Cli::parse()))
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    let options = cli.options()?;
    let Some(version) = FileVersion::from_name(&cli.encoding_version) else {
        bail!("--encoding_version {}, need 0.6.1, 1.0.0 or 2.0.0", cli.encoding_version);
    };
    cli.check_outputs()?;
    let graph = read_dlc(&cli.input_dlc)?;
    let overrides = match &cli.quantization_overrides {
        Some(path) if !cli.ignore_quantization_overrides => Some(EncodingsFile::open(path)?),
        _ => None,
    };
    let windows = cli.windows(&graph)?;
    let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
    let threads = cli.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let (backend, workers) = (HtpBackend::new(threads)?, Workers::new(threads.max(1))?);
    let mut display = Display::new();
    let work =
        Work { cli, options, overrides: overrides.as_ref(), windows: &windows, backend: &backend, workers: &workers };
    let done = work.quantize(graph, &mut display);
    display.end();
    let done = done?;
    let written = write(cli, &done, version)?;
    report::print(cli, &done, &written, windows.len(), &mut io::stdout().lock()).context(exit::STDOUT)
}

/// What is to be done, and with what.
struct Work<'a> {
    cli: &'a Cli,
    options: QuantizeOptions,
    overrides: Option<&'a EncodingsFile>,
    windows: &'a [&'a [u32]],
    backend: &'a HtpBackend,
    workers: &'a Workers,
}

/// What was done.
struct Done {
    quantized: Graph,
    smoothing: Option<Vec<SmoothReport>>,
    rounding: Option<RoundingReport>,
    report: QuantizeReport,
    adapters: Vec<AdapterReport>,
    /// What is to be written of the adapters.
    placed: Option<PlacedAdapters>,
}

/// The files beside the DLC.
struct Written {
    sidecars: Vec<PathBuf>,
    dump: Option<Dump>,
}

/// An encodings file.
struct Dump {
    path: PathBuf,
    version: FileVersion,
    tensors: usize,
    /// Weights that it has no place for.
    left_out: Vec<String>,
}

impl Work<'_> {
    fn quantize(&self, mut graph: Graph, display: &mut Display) -> anyhow::Result<Done> {
        let (cli, input) = (self.cli, self.cli.input_dlc.display());
        let can_scale = can_scale_channels(&graph);
        let smoothes = self.smoothes(can_scale)?;
        let mut options = self.options.clone();
        if smoothes && cli.act_quantizer_calibration.is_none() {
            options.activations.calibration = Calibration::MinMax;
        }
        let situation = Situation {
            weights: self.options.weights,
            has_overrides: self.overrides.is_some(),
            can_scale,
            is_smoothed: smoothes,
        };
        let rounding = cli.weights.options(&situation, !self.windows.is_empty())?;
        let smoothing = smoothes.then(|| self.smooth(&mut graph, display)).transpose();
        let smoothing = smoothing.with_context(|| format!("cannot smooth the inputs of {input}"))?;
        let rounding = rounding
            .map(|options| weights::round(&graph, &options, self.windows, self.backend, &mut |step| display.say(&step)))
            .transpose()
            .with_context(|| format!("cannot round the weights of {input}"))?;
        let rounding = rounding.map(|(rounded, report)| {
            graph = rounded;
            report
        });
        let placed = cli.lora_output_files.as_ref().map(|list| place_adapters(&graph, list, &cli.lora_folder()));
        let mut placed = placed.transpose()?;
        let mut show = |progress: Progress<'_>| display.show(progress);
        let mut tools = Tools { backend: self.backend, workers: self.workers, progress: &mut show };
        let (quantized, report) =
            quantize(&graph, self.windows, &options, self.overrides, &mut tools).with_context(|| {
                match cli.quantization_overrides.as_ref().filter(|_| self.overrides.is_some()) {
                    Some(file) => format!("cannot quantize {input} with {}", file.display()),
                    None => format!("cannot quantize {input}"),
                }
            })?;
        let mut reports = Vec::new();
        if let Some(placed) = &mut placed {
            let least = cli.adapter_act_min_sqnr;
            let wanted = Activations { least_sqnr_db: (least > 0.0).then_some(least), ..options.activations };
            reports = calibrate_adapters(&graph, &quantized, placed, self.windows, wanted, &mut tools)?;
        }
        Ok(Done { quantized, smoothing, rounding, report, adapters: reports, placed })
    }

    /// Whether channels are scaled for the inputs of matrices.
    fn smoothes(&self, can_scale: bool) -> anyhow::Result<bool> {
        let usable = !self.windows.is_empty() && self.overrides.is_none();
        match self.cli.smooth_inputs {
            Some(true) if !usable => {
                bail!("--smooth_inputs needs text to calibrate with, and no --quantization_overrides")
            }
            Some(wanted) => Ok(wanted),
            None => Ok(usable && can_scale && self.options.activations.bits == 8 && self.cli.weights.leaves_channels()),
        }
    }

    fn smooth(&self, graph: &mut Graph, display: &Display) -> anyhow::Result<Vec<SmoothReport>> {
        display.say("smoothing inputs");
        let least_sqnr_db = self.options.activations.least_sqnr_db;
        let options = SmoothOptions { weights: self.cli.weights.schemes(self.options.weights), least_sqnr_db };
        Ok(smooth(graph, self.windows, options, self.backend, &mut |done, all| {
            if done % 10 == 0 {
                display.say(&format!("smoothing inputs: {done} of {all}"));
            }
        })?)
    }
}

impl Cli {
    fn options(&self) -> anyhow::Result<QuantizeOptions> {
        let grouping = match (self.block_size, self.use_per_channel_quantization) {
            (Some(block_size), _) => Grouping::Block(block_size),
            (None, true) => Grouping::PerChannel,
            (None, false) => Grouping::Default,
        };
        if grouping != Grouping::Default && self.weights_bitwidth == WeightBits::Sixteen {
            bail!("--block_size and --use_per_channel_quantization need --weights_bitwidth 4 or 8");
        }
        for (flag, n) in
            [("--calibration_window", self.calibration_window), ("--calibration_windows", self.calibration_windows)]
        {
            if n == 0 {
                bail!("{flag} 0, need at least 1");
            }
        }
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
                calibration: match self.act_quantizer_calibration.unwrap_or(Method::Sqnr) {
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

    /// Where scaled adapters go.
    fn lora_folder(&self) -> PathBuf {
        self.lora_output_dir.clone().unwrap_or_else(|| self.output_dlc.with_file_name("lora"))
    }

    /// Refuses files that cannot be written, and those that would replace what is read.
    fn check_outputs(&self) -> anyhow::Result<()> {
        check_output(&self.output_dlc)?;
        let (texts, dump) = (self.texts()?, self.dump_path());
        let mut inputs = vec![("--input_dlc", self.input_dlc.as_path())];
        inputs.extend(texts.iter().map(|path| ("the calibration set", path.as_path())));
        let others = [
            ("--input_list", &self.input_list),
            ("--tokenizer", &self.tokenizer),
            ("--quantization_overrides", &self.quantization_overrides),
            ("--lora_output_files", &self.lora_output_files),
        ];
        inputs.extend(others.iter().filter_map(|(name, path)| Some((*name, path.as_deref()?))));
        let mut outputs = vec![("--output_dlc", self.output_dlc.as_path())];
        if let Some(path) = &dump {
            check_place(path).with_context(|| path.display().to_string())?;
            outputs.push(("--dump_encoding_json", path));
        }
        Ok(check_outputs(&outputs, &inputs)?)
    }

    /// Where the encodings go, if they are asked for.
    fn dump_path(&self) -> Option<PathBuf> {
        let stem = self.output_dlc.file_stem().and_then(|stem| stem.to_str()).unwrap_or("model");
        self.dump_encoding_json.then(|| self.output_dlc.with_file_name(format!("{stem}_encodings.json")))
    }

    /// What to calibrate `graph` with, window by window.
    fn windows(&self, graph: &Graph) -> anyhow::Result<Vec<Vec<u32>>> {
        let ids = self.ids(graph)?;
        if ids.is_empty() && !self.float_fallback {
            bail!("nothing to calibrate with: --calibration_text, --input_list, or --float_fallback");
        }
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        // Files of ids need no tokenizer, and without one nobody knows what a text opens with.
        let tokenizer = self.tokenizer();
        let is_known = self.tokenizer.is_some() || tokenizer.is_file();
        let opening = if is_known { text::opening(&tokenizer)? } else { Vec::new() };
        text::check_ids(&tokenizer, &opening, graph)?;
        Ok(opened_windows(&ids, &opening, self.calibration_window, self.calibration_windows)?)
    }

    fn tokenizer(&self) -> PathBuf {
        self.tokenizer.clone().unwrap_or_else(|| self.input_dlc.with_file_name("tokenizer.json"))
    }

    /// The files to calibrate with.
    fn texts(&self) -> anyhow::Result<Vec<PathBuf>> {
        let listed = self.input_list.as_deref().map(text::read_list).transpose()?;
        Ok(self.calibration_text.iter().cloned().chain(listed.unwrap_or_default()).collect())
    }

    /// Token ids of everything to calibrate with, all of which `graph` knows.
    fn ids(&self, graph: &Graph) -> anyhow::Result<Vec<u32>> {
        let tokenizer = self.tokenizer();
        let mut ids = Vec::new();
        for file in self.texts()? {
            let own = match text::read_ids(&file)? {
                Some(own) => own,
                None => text::read_texts(std::slice::from_ref(&file), &tokenizer)?,
            };
            text::check_ids(&file, &own, graph)?;
            ids.extend(own);
        }
        Ok(ids)
    }
}

/// Writes all files. Only then does anything go to standard output, which may fail.
fn write(cli: &Cli, done: &Done, version: FileVersion) -> anyhow::Result<Written> {
    let output = &cli.output_dlc;
    if let Some(folder) = output.parent() {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    write_dlc(output, &done.quantized)?;
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let sidecars = copy_sidecars(&cli.input_dlc, folder)?;
    let dump = cli.dump_path().map(|path| write_dump(path, &done.quantized, version)).transpose()?;
    if let Some(placed) = &done.placed {
        placed.write()?;
    }
    Ok(Written { sidecars, dump })
}

fn write_dump(path: PathBuf, graph: &Graph, version: FileVersion) -> anyhow::Result<Dump> {
    let (file, left_out) = dump(graph, version);
    write_atomic(&path, |out| writeln!(out, "{}", file.to_json())).with_context(|| path.display().to_string())?;
    Ok(Dump { path, version, tensors: file.tensors.len(), left_out })
}

const EXAMPLES: &str = "Examples:
  qairt-quantizer -i float/model.dlc -o w8a16/model.dlc --calibration_text some.txt
  qairt-quantizer -i float/model.dlc -o w4a16/model.dlc --calibration_text some.txt --weights_bitwidth 4
  qairt-quantizer -i float/model.dlc -o lpbq/model.dlc --calibration_text some.txt --weights_bitwidth 4 --use_block_steps
  qairt-quantizer -i float/model.dlc -o w4a8/model.dlc --calibration_text some.txt --weights_bitwidth 4 --act_bitwidth 8
  qairt-quantizer -i float/model.dlc -o aimet/model.dlc --quantization_overrides model.encodings --float_fallback";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Cli;

    /// Guards: all flags, those of flattened groups too, are spelled as QAIRT spells its own: with underscores.
    #[test]
    fn flags_have_underscores() {
        let command = Cli::command();
        let flags: Vec<&str> = command.get_arguments().filter_map(|argument| argument.get_long()).collect();
        assert!(flags.contains(&"weight_rounding"), "{flags:?}");
        assert!(flags.iter().all(|flag| !flag.contains('-')), "{flags:?}");
    }
}
