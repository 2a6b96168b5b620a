//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::bail;
use clap::{ArgGroup, Parser, ValueEnum};
use genie::AdapterChoice;

/// Give a model a prompt and print its answer.
///
/// The prompt is raw: no chat template is applied unless --chat is given. Only a BOS token is put before it, with models
/// whose tokenizer asks for one and if the prompt does not begin with it.
#[derive(Debug, Parser)]
#[command(name = "genie-t2t-run", version, after_help = EXAMPLES)]
#[command(group(ArgGroup::new("input").required(true).args(["prompt", "prompt_file", "tokens_file"])))]
pub(crate) struct Args {
    /// Dialog config (JSON). Relative paths in it are resolved against its folder
    #[arg(short, long, value_name = "FILE")]
    pub(crate) config: PathBuf,

    /// Prompt
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: Option<String>,

    /// File with the prompt, taken as it is
    #[arg(long = "prompt_file", value_name = "FILE")]
    pub(crate) prompt_file: Option<PathBuf>,

    /// File with the prompt as token ids, separated by white space; the answer is printed as ids. Short form: -tok
    #[arg(long = "tokens_file", value_name = "FILE")]
    pub(crate) tokens_file: Option<PathBuf>,

    /// Second prompt, for the same conversation anew: only what differs from the first is computed
    #[arg(short = 'w', long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) rewind: Option<String>,

    /// Apply an adapter of the config, and set strengths of it. Given twice, the second is for --rewind's prompt
    #[arg(short, long, value_name = "ADAPTER[,ALPHA,VALUE]...")]
    pub(crate) lora: Vec<AdapterChoice>,

    /// Role of the engine that adapters are applied to, which must be the config's [default: primary]
    #[arg(long = "engine_role", value_name = "ROLE")]
    pub(crate) engine_role: Option<String>,

    /// Take prompts as what a user says, and apply the model's chat template
    #[arg(long, conflicts_with = "tokens_file")]
    pub(crate) chat: bool,

    /// What the system says, before the user
    #[arg(long, value_name = "TEXT", requires = "chat", allow_hyphen_values = true)]
    pub(crate) system: Option<String>,

    /// Most tokens of an answer, instead of the config's max-num-tokens; 0 counts as 1
    #[arg(long = "max_tokens", value_name = "N")]
    pub(crate) max_tokens: Option<u32>,

    /// Print log messages up to this level on standard error
    #[arg(long, value_name = "LEVEL")]
    pub(crate) log: Option<LogLevel>,

    /// Write a profile (JSON) to this file, which must not exist: events as Genie's, and the share of each operation
    #[arg(long, value_name = "FILE")]
    pub(crate) profile: Option<PathBuf>,

    #[command(flatten)]
    unsupported: Unsupported,
}

/// Flags of Genie's tool that this version refuses.
#[derive(Debug, clap::Args)]
struct Unsupported {
    #[arg(short, long = "embedding_file", hide = true, num_args = 0..=1)]
    embedding_file: Option<Option<OsString>>,
    #[arg(short = 't', long = "embedding_table", hide = true, num_args = 0..=1)]
    embedding_table: Option<Option<OsString>>,
    #[arg(long = "embedding_query_output_type", hide = true, num_args = 0..=1)]
    embedding_query_output_type: Option<Option<OsString>>,
    #[arg(short, long, hide = true, num_args = 0..=1)]
    save: Option<Option<OsString>>,
    #[arg(short, long, hide = true, num_args = 0..=1)]
    restore: Option<Option<OsString>>,
    #[arg(long, hide = true, num_args = 0..=1)]
    action: Option<Option<OsString>>,
    #[arg(long, hide = true, num_args = 0..=1)]
    sleep: Option<Option<OsString>>,
    #[arg(long, hide = true, num_args = 0..=1)]
    priority: Option<Option<OsString>>,
    #[arg(long, hide = true, num_args = 0..=1)]
    key: Option<Option<OsString>>,
    #[arg(long = "allow_engine_switch", hide = true, num_args = 0..=1)]
    allow_engine_switch: Option<Option<OsString>>,
    #[arg(long = "add_example_sampler", hide = true)]
    add_example_sampler: bool,
    #[arg(long, hide = true)]
    pid: bool,
}

/// Genie's log levels.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum LogLevel {
    Error,
    Warn,
    Info,
    Verbose,
}

impl Args {
    /// Reads the command line. `Ok(None)` means that help or the version was asked for and printed.
    pub(crate) fn read() -> anyhow::Result<Option<Self>> {
        let mut given: Vec<OsString> = std::env::args_os().collect();
        if given.len() <= 1 {
            given.push("--help".into());
        }
        for i in 1..given.len() {
            let is_value = TAKES_TEXT.iter().any(|flag| given[i - 1] == *flag);
            if given[i] == "-tok" && !is_value {
                given[i] = "--tokens_file".into();
            }
        }
        match Self::try_parse_from(given) {
            Ok(args) => {
                args.unsupported.refuse()?;
                match (args.lora.len(), &args.rewind) {
                    (0 | 1, _) | (2, Some(_)) => {}
                    (n, None) => {
                        bail!("-l/--lora is given {n} times, need one for each prompt, and there is one prompt")
                    }
                    (n, Some(_)) => bail!("-l/--lora is given {n} times, need at most one for each of the two prompts"),
                }
                Ok(Some(args))
            }
            Err(shown) if !shown.use_stderr() => {
                // A reader that went away has seen enough of the help.
                let _ = shown.print();
                Ok(None)
            }
            Err(wrong) => bail!("{}", wrong.to_string().trim_start_matches("error: ").trim_end()),
        }
    }
}

impl Unsupported {
    fn refuse(&self) -> anyhow::Result<()> {
        let flags = [
            ("-e/--embedding_file", self.embedding_file.is_some()),
            ("-t/--embedding_table", self.embedding_table.is_some()),
            ("--embedding_query_output_type", self.embedding_query_output_type.is_some()),
            ("-s/--save", self.save.is_some()),
            ("-r/--restore", self.restore.is_some()),
            ("--action", self.action.is_some()),
            ("--sleep", self.sleep.is_some()),
            ("--priority", self.priority.is_some()),
            ("--key", self.key.is_some()),
            ("--allow_engine_switch", self.allow_engine_switch.is_some()),
            ("--add_example_sampler", self.add_example_sampler),
            ("--pid", self.pid),
        ];
        match flags.iter().find(|(_, is_given)| *is_given) {
            Some((flag, _)) => bail!("{flag} is not supported yet"),
            None => Ok(()),
        }
    }
}

const TAKES_TEXT: [&str; 5] = ["-p", "--prompt", "-w", "--rewind", "--system"];

const EXAMPLES: &str = "\
Output: the prompt behind [PROMPT]:, the answer between [BEGIN]: and [END] as it is generated, then figures.

Examples:
  genie-t2t-run -c genie_config.json --chat -p 'What is the capital of France?'
  genie-t2t-run -c genie_config.json -p 'Once upon a time' --max_tokens 64
  genie-t2t-run -c genie_config.json --chat -p 'Who are you?' -l pirate,lora_alpha,0.5
  genie-t2t-run -c genie_config.json -tok ids.txt --profile profile.json

Exit code: 0, or 1 with the reason on standard error.";
