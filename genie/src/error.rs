//! The error of the crate and the one table from it to Genie's status codes.

use std::path::PathBuf;

use thiserror::Error;

use crate::adapters::LoraError;
use crate::config::ConfigError;
use crate::engine::EngineError;
use crate::prompt::PromptError;
use crate::sampler::SamplerError;
use crate::tokenizer::TokenizerError;
use crate::{Finish, SentenceCode};

/// Everything that can go wrong in this crate.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The config cannot be used.
    #[error("config {origin}")]
    Config {
        /// The file, or `text` for a config given as text.
        origin: String,
        /// What is wrong with it.
        #[source]
        why: ConfigError,
    },
    /// The tokenizer cannot be loaded or cannot read a text.
    #[error("tokenizer")]
    Tokenizer(#[from] TokenizerError),
    /// The chat template cannot be loaded or rendered.
    #[error("chat template")]
    Prompt(#[from] PromptError),
    /// The model cannot be opened or run.
    #[error("engine {role:?}")]
    Engine {
        /// Role of the engine.
        role: String,
        /// What happened.
        #[source]
        why: Box<EngineError>,
    },
    /// An adapter or a strength cannot be used.
    #[error("lora")]
    Lora(#[from] LoraError),
    /// No token can be chosen from the logits.
    #[error("sampler")]
    Sampler(#[from] SamplerError),
    /// The prompt does not fit into the context. Nothing was done.
    #[error("context holds {have} tokens, need {need}: {occupied} of the conversation and {prompt} of the prompt")]
    ContextExceeded {
        /// Tokens the context holds.
        have: usize,
        /// Tokens that it would have to hold.
        need: usize,
        /// Tokens of the conversation that are kept.
        occupied: usize,
        /// Tokens of the prompt that are new.
        prompt: usize,
    },
    /// There is nothing to predict from: the prompt and the conversation are both empty.
    #[error("prompt is empty and so is the conversation, need at least one token")]
    EmptyPrompt,
    /// A sentence code came out of order.
    #[error("sentence code {code:?} {problem}")]
    SentenceOrder {
        /// The code given.
        code: SentenceCode,
        /// Why it is out of order.
        problem: &'static str,
    },
    /// A token id of a token query is not in the vocabulary.
    #[error("token {index} of the query is {id}, need an id below the vocabulary size {n_vocab}")]
    TokenOutOfRange {
        /// Place in the query.
        index: usize,
        /// The id found.
        id: u32,
        /// Size of the vocabulary.
        n_vocab: usize,
    },
    /// A chat was asked for but the model has no template.
    #[error("model has no chat template, need \"chat_template\" in {wanted} or a chat_template.jinja beside it")]
    NoTemplate {
        /// The file that would hold it.
        wanted: PathBuf,
    },
}

/// Genie's status codes. Negative values are errors, positive ones warnings. (`Genie_Status_t`)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(i32)]
#[expect(missing_docs, reason = "the names are Genie's and say it all")]
pub enum Code {
    Success = 0,
    WarningAborted = 1,
    WarningBoundHandle = 2,
    WarningPaused = 3,
    WarningContextExceeded = 4,
    General = -1,
    InvalidArgument = -2,
    MemAlloc = -3,
    InvalidConfig = -4,
    InvalidHandle = -5,
    QueryFailed = -6,
    JsonFormat = -7,
    JsonSchema = -8,
    JsonValue = -9,
    GenerateFailed = -10,
    GetHandleFailed = -11,
    ApplyConfigFailed = -12,
    SetParamsFailed = -13,
    BoundHandle = -14,
}

impl Code {
    /// The number that Genie's C functions return.
    pub fn value(self) -> i32 {
        self as i32
    }
}

impl Error {
    /// The status code of this error: the one table.
    pub fn code(&self) -> Code {
        match self {
            Self::Config { why, .. } => match why {
                ConfigError::Read { .. } => Code::InvalidConfig,
                ConfigError::TooLong { .. } | ConfigError::Syntax { .. } => Code::JsonFormat,
                ConfigError::UnknownKey { .. }
                | ConfigError::MissingKey { .. }
                | ConfigError::DuplicateKey { .. }
                | ConfigError::WrongType { .. } => Code::JsonSchema,
                ConfigError::Value { .. } | ConfigError::Unsupported { .. } | ConfigError::File { .. } => {
                    Code::JsonValue
                }
            },
            Self::Tokenizer(_) | Self::Prompt(_) => Code::General,
            Self::Engine { why, .. } => match **why {
                EngineError::Cancelled => Code::WarningAborted,
                EngineError::ContextExceeded { .. } => Code::WarningContextExceeded,
                _ => Code::General,
            },
            Self::ContextExceeded { .. } => Code::WarningContextExceeded,
            Self::Lora(why) => match why {
                LoraError::UnknownAdapter { .. } | LoraError::UnknownAlpha { .. } | LoraError::Alphas { .. } => {
                    Code::General
                }
                LoraError::ForeignRows { .. } => Code::QueryFailed,
                LoraError::UnknownRole { .. }
                | LoraError::Strength { .. }
                | LoraError::Name { .. }
                | LoraError::InUse { .. }
                | LoraError::Choice { .. } => Code::InvalidArgument,
            },
            Self::Sampler(_) => Code::QueryFailed,
            Self::EmptyPrompt | Self::SentenceOrder { .. } | Self::TokenOutOfRange { .. } | Self::NoTemplate { .. } => {
                Code::InvalidArgument
            }
        }
    }

    pub(crate) fn engine(role: &str, why: EngineError) -> Self {
        Self::Engine { role: role.to_owned(), why: Box::new(why) }
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        matches!(self, Self::Engine { why, .. } if matches!(**why, EngineError::Cancelled))
    }

    /// This error and everything below it, in one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(error) = next {
            text.push_str(": ");
            text.push_str(&error.to_string());
            next = error.source();
        }
        text
    }
}

impl Finish {
    /// The status code of a query that ended like this.
    pub fn code(self) -> Code {
        match self {
            Self::Aborted => Code::WarningAborted,
            Self::ContextExceeded => Code::WarningContextExceeded,
            Self::Eos | Self::Length | Self::StopSequence | Self::Stopped | Self::PrefillOnly => Code::Success,
        }
    }
}
