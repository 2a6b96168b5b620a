//! Options for rounding weights better than to nearest.

use std::io::{self, Write};

use anyhow::bail;
use clap::{Args, ValueEnum};
use qnn_core::{
    Graph,
    backend::HtpBackend,
    offline::{
        arch::{Grouping, WeightType},
        equalize::Schemes,
        quantize_weights::{Bits, Scheme},
        rounding::{Method, RoundingOptions, RoundingReport, RoundingStep, WeightReport, round_weights},
    },
};

/// How float weights become integers.
#[derive(Args)]
#[command(rename_all = "snake_case")]
pub(crate) struct WeightArgs {
    /// How codes are chosen. gptq: later inputs of a matrix make good the error of earlier ones, layer by layer; needs text.
    /// mse: block scales with the least squared error. Default: gptq where there is text and weights have 4 bits or their
    /// inputs are smoothed, else nearest.
    /// Nearest that is asked for leaves channels as they are, unless --equalize_channels says otherwise.
    #[arg(long, value_name = "METHOD")]
    weight_rounding: Option<RoundingName>,

    /// Scales channels between norms and matrices, and between matrices, so that weights fit their grid better; what the
    /// model computes stays the same. Adapters of --lora_output_files follow; others have to be imported with the DLC that
    /// comes out. Default: on for float weights where there is text or they are rounded by gptq or mse, unless they are asked
    /// to be rounded to nearest, inputs are smoothed, an encodings file is given or channels were scaled before.
    #[arg(long, value_name = "BOOL")]
    equalize_channels: Option<bool>,

    /// Four-bit blocks with a whole step from 1 to 16 each and one scale for each output (LPBQ). Default block size: 64.
    #[arg(long)]
    use_block_steps: bool,

    /// Bits of the head with --weights_bitwidth 4: 4 rounds it as the layers are, with a weight of its own where it shares the
    /// embedding's, which stays at 8. A decode step then reads half as much of the head.
    #[arg(long, value_name = "BITS", default_value = "8")]
    head_bitwidth: HeadBits,

    /// Part of the layers' weights, from 0 to 1, that gets 8 bits: the matrices that lose most at 4.
    #[arg(long, value_name = "PART", default_value_t = 0.0)]
    wide_share: f64,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum HeadBits {
    #[value(name = "4")]
    Four,
    #[value(name = "8")]
    Eight,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum RoundingName {
    Nearest,
    Mse,
    Gptq,
}

/// What else decides about the weights.
pub(crate) struct Situation {
    pub(crate) weights: WeightType,
    pub(crate) has_overrides: bool,
    /// There are matrices of floats whose channels nobody has scaled.
    pub(crate) can_scale: bool,
    /// Channels are scaled for the inputs of matrices, so they cannot be scaled for the weights.
    pub(crate) is_smoothed: bool,
}

impl WeightArgs {
    /// What to do before the graph is quantized; `None`: nothing, the quantizer rounds to nearest.
    pub(crate) fn options(&self, situation: &Situation, has_text: bool) -> anyhow::Result<Option<RoundingOptions>> {
        let WeightType::Int { bits, grouping } = situation.weights else {
            if self.is_used() {
                bail!(
                    "--weight_rounding, --equalize_channels, --use_block_steps, --head_bitwidth 4, --wide_share need \
                     --weights_bitwidth 4 or 8"
                );
            }
            return Ok(None);
        };
        if situation.has_overrides {
            if self.is_used() {
                bail!("--quantization_overrides has scales of its own; leave out the options for rounding weights");
            }
            return Ok(None);
        }
        let four = bits == Bits::Four;
        // Smoothing makes channels unequal, and rounding them harder.
        let is_worth_it = has_text && (four || situation.is_smoothed);
        let default = if is_worth_it { RoundingName::Gptq } else { RoundingName::Nearest };
        let method = self.weight_rounding.unwrap_or(default);
        let better = method != RoundingName::Nearest || (has_text && self.weight_rounding.is_none());
        let equalize = self.equalize_channels.unwrap_or(better && situation.can_scale && !situation.is_smoothed);
        if equalize && situation.is_smoothed {
            bail!("channels are scaled once: --equalize_channels is for the weights, --smooth_inputs for their inputs");
        }
        let head_is_narrow = self.head_bitwidth == HeadBits::Four;
        if !four && (self.use_block_steps || self.wide_share > 0.0 || head_is_narrow) {
            bail!("--use_block_steps, --head_bitwidth 4 and --wide_share need --weights_bitwidth 4");
        }
        if self.use_block_steps && grouping == Grouping::PerChannel {
            bail!("--use_block_steps has blocks; leave out --use_per_channel_quantization");
        }
        if method == RoundingName::Nearest
            && !equalize
            && !self.use_block_steps
            && !head_is_narrow
            && self.wide_share == 0.0
        {
            return Ok(None);
        }
        let scheme = self.scheme(bits, grouping);
        Ok(Some(RoundingOptions {
            scheme,
            head: head_is_narrow.then_some(scheme),
            embedding: embedding(grouping),
            fit_blocks: grouping == Grouping::Default,
            method: match method {
                RoundingName::Nearest => Method::Nearest,
                RoundingName::Mse => Method::Mse,
                RoundingName::Gptq => Method::Feedback { damping: DAMPING },
            },
            equalize,
            wide_share: self.wide_share,
        }))
    }

    /// How matrices will be rounded; `None`: they stay floats.
    pub(crate) fn schemes(&self, weights: WeightType) -> Option<Schemes> {
        let WeightType::Int { bits, grouping } = weights else { return None };
        let layers = self.scheme(bits, grouping);
        let head = if self.head_bitwidth == HeadBits::Four { layers } else { embedding(grouping) };
        Some(Schemes { layers, head })
    }

    fn scheme(&self, bits: Bits, grouping: Grouping) -> Scheme {
        let default = if self.use_block_steps { DEFAULT_STEP_BLOCK } else { DEFAULT_BLOCK };
        let block_size = match grouping {
            Grouping::Block(block_size) => block_size,
            Grouping::Default => default,
            Grouping::PerChannel => return Scheme::PerChannel { bits },
        };
        match bits {
            Bits::Eight => Scheme::Block { bits, block_size },
            Bits::Four if self.use_block_steps => Scheme::BlockExpansion4 { block_size },
            Bits::Four => Scheme::AsymmetricBlock4 { block_size },
        }
    }

    /// True if nobody asked to scale channels for the weights.
    pub(crate) fn leaves_channels(&self) -> bool {
        self.equalize_channels != Some(true)
    }

    fn is_used(&self) -> bool {
        self.weight_rounding.is_some_and(|method| method != RoundingName::Nearest)
            || self.equalize_channels == Some(true)
            || self.use_block_steps
            || self.head_bitwidth == HeadBits::Four
            || self.wide_share > 0.0
    }
}

/// How an embedding is rounded, and a head with a weight of its own.
fn embedding(grouping: Grouping) -> Scheme {
    match grouping {
        Grouping::PerChannel => Scheme::PerChannel { bits: Bits::Eight },
        Grouping::Block(block_size) => Scheme::Block { bits: Bits::Eight, block_size },
        Grouping::Default => Scheme::Block { bits: Bits::Eight, block_size: DEFAULT_BLOCK },
    }
}

/// Rounds the weights of `graph`, telling `say` about each step.
pub(crate) fn round(
    graph: &Graph,
    options: &RoundingOptions,
    windows: &[&[u32]],
    backend: &HtpBackend,
    say: &mut dyn FnMut(String),
) -> anyhow::Result<(Graph, RoundingReport)> {
    Ok(round_weights(graph, options, windows, backend, &mut |step| {
        say(match step {
            RoundingStep::Equalize => "scaling channels".to_owned(),
            RoundingStep::Measure { layer, of } => format!("measuring layer {} of {of}", layer + 1),
            RoundingStep::Layer { layer, of } => format!("rounding layer {} of {of}", layer + 1),
            RoundingStep::Embedding => "rounding embedding and head".to_owned(),
        });
    })?)
}

/// Prints what became of the weights.
pub(crate) fn print(report: &RoundingReport, out: &mut impl Write) -> io::Result<()> {
    let scaled: Vec<_> = report.groups.iter().filter(|group| group.error_after < group.error_before).collect();
    if !report.groups.is_empty() {
        let mean = |error: fn(&qnn_core::offline::equalize::GroupReport) -> f64| {
            scaled.iter().map(|group| error(group)).sum::<f64>() / scaled.len().max(1) as f64
        };
        let (before, after) = (mean(|group| group.error_before), mean(|group| group.error_after));
        writeln!(out, "channels scaled: {} of {} groups", scaled.len(), report.groups.len())?;
        if !scaled.is_empty() {
            writeln!(out, "  mean relative error of nearest codes {before:.2e} before, {after:.2e} after")?;
        }
    }
    let wide: Vec<&WeightReport> = report.weights.iter().filter(|weight| weight.bits == 8).collect();
    writeln!(
        out,
        "rounded: {} weights, {} of them to 8 bits; worst signal to noise first:",
        report.weights.len(),
        wide.len()
    )?;
    let mut weights: Vec<&WeightReport> = report.weights.iter().collect();
    weights.sort_by(|a, b| a.sqnr_db.total_cmp(&b.sqnr_db));
    for weight in weights.iter().take(super::report::WORST) {
        writeln!(out, "  {:>6.1} dB  {}: {} bits", weight.sqnr_db, weight.name, weight.bits)?;
    }
    Ok(())
}

const DEFAULT_BLOCK: usize = 32;
const DEFAULT_STEP_BLOCK: usize = 64;
/// Part of the inputs' mean square on the diagonal of their moments: the value of the GPTQ paper.
const DAMPING: f32 = 0.01;
