//! `qnn-context-binary-generator`: a DLC in, context binaries for the kernels out.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use qnn_core::binary::SectionType;
use qnn_core::offline::generate::{ConfigFile, GenerateOptions, Progress, Report, generate};

#[path = "../shared/exit.rs"]
mod exit;

/// Makes context binaries of a DLC: graphs bound to fixed sizes, weights in the layout of the kernels, ready to be mapped.
///
/// For each number of --ar and --cl there is one graph, prompt_ar128_cl4096_1_of_1 or (for --ar 1) token_ar1_cl4096_1_of_1;
/// all graphs of a file share its weights. The tokenizer's files that lie beside the DLC are copied to the output folder.
#[derive(Parser)]
#[command(name = "qnn-context-binary-generator", version, rename_all = "snake_case", after_help = EXAMPLES)]
struct Cli {
    /// The DLC, as qairt-converter writes it.
    #[arg(long, value_name = "FILE")]
    dlc_path: PathBuf,

    /// Name of the context binary, without folder and suffix. Default: the name of the DLC.
    #[arg(long, value_name = "NAME")]
    binary_file: Option<String>,

    /// Folder for the results; made if it is not there.
    #[arg(long, value_name = "DIR", default_value = "output")]
    output_dir: PathBuf,

    /// Tokens that a graph takes at once, one graph for each number. Fewer tokens cost only themselves.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "128,1")]
    ar: Vec<usize>,

    /// Tokens that the context (KV cache) of a graph holds, one graph for each number. Default: as the DLC has it.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    cl: Vec<usize>,

    /// Files to spread the layers over: NAME.bin for one, NAME_1_of_2.bin, NAME_2_of_2.bin for two.
    #[arg(long, value_name = "N", default_value = "1")]
    num_splits: usize,

    /// Adapters of the model: the lora_output_files.yaml of qairt-lora-importer. Each becomes one section file beside each
    /// context binary, NAME_ADAPTER.bin, or with share_adapters_between_graphs: No one for each graph, GRAPH_ADAPTER.bin.
    /// A default_adapter without values is written too. Adapters of a group have weights only; the encodings that they share
    /// are in NAME_GROUP.bin.
    #[arg(long, value_name = "FILE")]
    adapter_weight_config: Option<PathBuf>,

    /// Settings of the context, as the original's backend extensions have them (JSON). Of these, context/lora_weight_sharing
    /// says that the context only runs once a section has been applied. Keys that steer hardware have no effect and are
    /// named; all others are refused.
    #[arg(long, value_name = "FILE")]
    config_file: Option<PathBuf>,

    /// What will run the binary. There is one backend.
    #[arg(long, value_name = "NAME", default_value = "htp")]
    backend: Backend,

    #[command(flatten)]
    later: Later,
}

#[derive(Clone, Copy, ValueEnum)]
enum Backend {
    Htp,
}

/// Options of the original tool that have no meaning here yet. They are refused, never ignored.
#[derive(clap::Args)]
#[command(rename_all = "snake_case")]
struct Later {
    #[arg(long, hide = true)]
    model: Option<String>,
    #[arg(long, hide = true)]
    htp_socs: Option<String>,
    #[arg(long, hide = true)]
    set_output_tensors: Option<String>,
    #[arg(long, hide = true)]
    enable_intermediate_outputs: bool,
    #[arg(long, hide = true)]
    profiling_level: Option<String>,
    #[arg(long, hide = true)]
    log_level: Option<String>,
}

fn main() -> ExitCode {
    exit::code("qnn-context-binary-generator", run(&Cli::parse()))
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    cli.later.refuse()?;
    let Backend::Htp = cli.backend;
    let config = cli.config_file.as_deref().map(ConfigFile::read).transpose()?.unwrap_or_default();
    for key in &config.without_effect {
        eprintln!("note: {key} of --config_file has no effect on a CPU");
    }
    let stem = cli.dlc_path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("model");
    let options = GenerateOptions {
        dlc_path: cli.dlc_path.clone(),
        output_dir: cli.output_dir.clone(),
        binary_file: cli.binary_file.clone().unwrap_or_else(|| stem.to_owned()),
        ar: cli.ar.clone(),
        cl: cli.cl.clone(),
        num_splits: cli.num_splits,
        adapter_weight_config: cli.adapter_weight_config.clone(),
        lora_weight_sharing: config.lora_weight_sharing,
    };
    let mut display = Display::new();
    let report = generate(&options, &mut |progress| display.show(progress));
    display.end();
    print_summary(&report?, &mut io::stdout().lock()).context(exit::STDOUT)
}

impl Later {
    fn refuse(&self) -> anyhow::Result<()> {
        let given = [
            ("model", self.model.is_some()),
            ("htp_socs", self.htp_socs.is_some()),
            ("set_output_tensors", self.set_output_tensors.is_some()),
            ("enable_intermediate_outputs", self.enable_intermediate_outputs),
            ("profiling_level", self.profiling_level.is_some()),
            ("log_level", self.log_level.is_some()),
        ];
        match given.iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((name, _)) => bail!("--{name} is not supported yet; leave it out"),
        }
    }
}

/// A bar on a terminal, a line for each tenth elsewhere; both on standard error.
struct Display {
    bar: Option<ProgressBar>,
    tenths: u64,
}

impl Display {
    fn new() -> Display {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {msg}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Display { bar, tenths: 0 }
    }

    fn show(&mut self, progress: Progress<'_>) {
        let Progress { file, done_bytes, total_bytes } = progress;
        if let Some(bar) = &self.bar {
            bar.set_length(total_bytes);
            bar.set_position(done_bytes);
            bar.set_message(file.display().to_string());
            return;
        }
        let tenths = (done_bytes as f64 / total_bytes as f64 * 10.0) as u64;
        if tenths > self.tenths {
            self.tenths = tenths;
            eprintln!("packing {}: {}0 %", file.display(), tenths);
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn print_summary(report: &Report, out: &mut impl Write) -> io::Result<()> {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    for file in &report.files {
        writeln!(out, "wrote {} ({:.1} MiB)", file.path.display(), mib(file.size_bytes))?;
        for graph in &file.graphs {
            writeln!(out, "  graph    {graph}")?;
        }
        for (format, (n, bytes)) in &file.weights {
            writeln!(out, "  weights  {n:>4} × {format:<36} {:>9.1} MiB", mib(*bytes))?;
        }
        writeln!(out, "  identity {}", file.identity)?;
    }
    if !report.sections.is_empty() {
        print_sections(report, out)?;
    }
    for path in &report.sidecars {
        writeln!(out, "wrote {}", path.display())?;
    }
    Ok(())
}

/// One line per section: its size beside what its weights and scales take by themselves.
fn print_sections(report: &Report, out: &mut impl Write) -> io::Result<()> {
    let kib = |bytes: u64| bytes as f64 / 1024.0;
    writeln!(out, "sections          rank targets   file KiB  weights KiB  padding KiB  rest KiB")?;
    let (mut files, mut weights) = (0, 0);
    for section in &report.sections {
        files += section.size_bytes;
        weights += section.weights_bytes;
        writeln!(
            out,
            "  {:<16} {:>4} {:>7} {:>10.1} {:>12.1} {:>12.1} {:>9.1}  {}{}",
            section.adapter,
            section.rank,
            section.n_targets,
            kib(section.size_bytes),
            kib(section.weights_bytes),
            kib(section.panels_bytes - section.weights_bytes),
            kib(section.size_bytes - section.panels_bytes),
            section.path.display(),
            match section.section_type {
                SectionType::UpdatableQuantParam => " (encodings of the group)",
                SectionType::UpdatableWeights => " (weights only)",
                SectionType::Updatable if section.n_targets == 0 && section.rank > 0 =>
                    " (changes nothing in this part)",
                SectionType::Updatable => "",
            },
        )?;
    }
    writeln!(
        out,
        "  {} files, {:.1} KiB; their weights and scales alone: {:.1} KiB",
        report.sections.len(),
        kib(files),
        kib(weights)
    )
}

const EXAMPLES: &str = "Examples:
  qnn-context-binary-generator --dlc_path out/model.dlc --binary_file model --output_dir out
  qnn-context-binary-generator --dlc_path out/model.dlc --output_dir out --ar 128,1 --cl 2048,4096 --num_splits 2
  qnn-context-binary-generator --dlc_path out/model.dlc --output_dir out --adapter_weight_config out/lora_output_files.yaml";
