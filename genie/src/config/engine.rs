//! The `engine` block: what runs the model, and from which files.

use std::path::PathBuf;

/// What an engine is opened with.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct EngineConfig {
    /// Worker threads; 0 means one per core that may be used. (`engine/n-threads`)
    pub n_threads: usize,
    /// Context binaries in split order, resolved against the config's directory. (`engine/model/binary/ctx-bins`)
    pub ctx_bins: Vec<PathBuf>,
    /// Whether context binaries are mapped instead of read. (`engine/backend/QnnHtp/use-mmap`)
    pub use_mmap: bool,
    /// Cores the workers may use, bit `i` for core `i`. (`engine/backend/QnnHtp/cpu-mask`)
    pub cpu_mask: Option<u64>,
    /// Whether idle workers may spin. (`engine/backend/QnnHtp/poll`)
    pub poll: bool,
    /// Name of the engine inside its dialog, `primary` unless given. (`engine/role`)
    pub role: String,
    /// Positions the dialog may fill. (`context/size`)
    pub context_size: usize,
    /// Size of the vocabulary. (`context/n-vocab`)
    pub n_vocab: usize,
    /// Position encoding, where the config states one. (`engine/model/positional-encoding`)
    pub positional_encoding: Option<PositionalEncoding>,
}

/// Rotary positions, as the config states them. The model's own values count; a stated value must agree with them.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct PositionalEncoding {
    /// Half the number of rotated components of a head. (`rope-dim`)
    pub rope_dim: Option<usize>,
    /// Base of the rotation frequencies. (`rope-theta`)
    pub rope_theta: Option<f64>,
    /// How frequencies are scaled for longer contexts. (`rope-scaling`)
    pub rope_scaling: Option<RopeScaling>,
}

/// How rotation frequencies are scaled for longer contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all. (`default`)
    Default,
    /// All frequencies are divided by `factor`. (`linear`)
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Low frequencies are divided by `factor`, high ones kept, with a ramp between. (`llama3`)
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Below this many turns over the original context a frequency is low.
        low_freq_factor: f64,
        /// Above this many turns over the original context a frequency is high.
        high_freq_factor: f64,
        /// Context length of the first training.
        original_max_position_embeddings: usize,
    },
}
