//! Roles to prompt: the model's own chat template.
//!
//! A template is a program that came with the model. It runs in an interpreter that bounds its instructions, its output and how
//! deep it nests, and that gives it no files, network or environment. Not bounded is the memory of what it builds on the way: a
//! text that is joined to itself doubles with each instruction, before any of it is output, and minijinja has no place to stop
//! that. A template that means harm can use up memory; take models from where you trust.
//!
//! What it renders is cut into control tokens, which only the template can have written, and text, in which nothing becomes a
//! control token, but for the markup that the role `assistant` may use ([`ChatTemplate::render`]).

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind};
use thiserror::Error;

use crate::tokenizer::{Mask, Tokenizer, TokenizerError};

mod date;
mod json;
mod methods;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said. It is text, whatever it looks like; only with the role `assistant` markup like `<think>` keeps its meaning.
    pub content: String,
}

/// A prompt as the template renders it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The text, for people to read.
    pub text: String,
    /// The token ids, which the model gets.
    pub ids: Vec<u32>,
}

/// A model's chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    variables: Vec<(String, String)>,
}

/// Why a template cannot be loaded or rendered.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PromptError {
    /// A file cannot be read.
    #[error("{}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        why: io::Error,
    },
    /// A file is not the JSON that it should be.
    #[error("{}: {problem}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The template itself is wrong, or refuses these messages.
    #[error(transparent)]
    Template(#[from] minijinja::Error),
    /// What the template rendered cannot become tokens.
    #[error("rendered prompt")]
    Tokenizer(#[from] TokenizerError),
}

impl Message {
    /// A turn of this role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

impl ChatTemplate {
    /// Looks for the template beside a `tokenizer.json`: `chat_template.jinja`, else `chat_template` in
    /// `tokenizer_config.json` (a text, or the one named `default` of several). A model may have none.
    ///
    /// # Errors
    /// [`PromptError`] if a file is there and cannot be used.
    pub fn beside(tokenizer_path: &Path) -> Result<Option<Self>, PromptError> {
        let config_path = Self::config_path(tokenizer_path);
        let config = match read_if_there(&config_path)? {
            Some(text) => serde_json::from_str(&text)
                .map_err(|why| PromptError::Format { path: config_path.clone(), problem: why.to_string() })?,
            None => serde_json::Value::Null,
        };
        let own_file = tokenizer_path.with_file_name("chat_template.jinja");
        let source = match read_if_there(&own_file)? {
            Some(source) => Some(source),
            None => source_in(&config)
                .map_err(|problem| PromptError::Format { path: config_path, problem: problem.to_owned() })?,
        };
        source.map(|source| Self::new(source, special_tokens(&config))).transpose()
    }

    /// Where a model without a file of its own for the template has it.
    pub(crate) fn config_path(tokenizer_path: &Path) -> PathBuf {
        tokenizer_path.with_file_name("tokenizer_config.json")
    }

    /// A template from its text. `variables` are the texts it may use besides the messages, such as `bos_token`.
    ///
    /// # Errors
    /// [`PromptError::Template`] with the line.
    pub fn new(source: String, variables: Vec<(String, String)>) -> Result<Self, PromptError> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_fuel(Some(MAX_INSTRUCTIONS));
        environment.set_recursion_limit(MAX_RECURSION);
        environment.set_unknown_method_callback(methods::call);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: &str| date::format_now(format));
        environment.add_filter("tojson", json::to_json);
        environment.add_template_owned(NAME, without_generation_blocks(&source))?;
        Ok(Self { environment, source, variables })
    }

    /// Renders `messages`, and the beginning of the answer behind them.
    ///
    /// Token ids are those that the rendered text has, except that nothing inside a role or a content becomes a control
    /// token. In contents of the role `assistant` markup that is not marked special (`<think>`, `<tool_call>`) keeps its meaning,
    /// its token too: a template may look for it there, to drop an old chain of thought. A history that comes from elsewhere is
    /// to be trusted as much as that. In the others a character that could begin a control token is
    /// hidden from the template: it finds no `<think>` there, and to its filter `title` no `<` begins a word.
    ///
    /// # Errors
    /// [`PromptError`] if the template refuses the messages or exceeds a limit.
    pub fn render(&self, messages: &[Message], tokenizer: &Tokenizer) -> Result<Prompt, PromptError> {
        let texts = messages.iter().flat_map(|message| [message.role.as_str(), message.content.as_str()]);
        let own = self.variables.iter().map(|(_, text)| text.as_str()).chain([self.source.as_str()]);
        let mask = Mask::new(tokenizer, texts.chain(own))?;
        let messages: Vec<Value> = messages.iter().map(|message| masked(message, &mask)).collect();
        let none = |name: &str| (name.to_owned(), Value::from(()));
        let context = [
            ("messages".to_owned(), Value::from(messages)),
            ("add_generation_prompt".to_owned(), Value::from(true)),
            none("tools"),
            none("documents"),
        ];
        let variables = self.variables.iter().map(|(name, text)| (name.clone(), Value::from(text.as_str())));
        let mut out = BoundedText(Vec::new());
        let template = self.environment.get_template(NAME)?;
        template.render_captured_to(Value::from_pairs(context.into_iter().chain(variables)), &mut out)?;
        let text = String::from_utf8_lossy(&out.0);
        Ok(Prompt { ids: tokenizer.encode_masked(&text, &mask)?, text: mask.unmask(&text) })
    }
}

/// `source` with its `generation` blocks made plain scopes. Transformers marks the model's own words with them, for
/// training; what they hold is rendered as it is.
fn without_generation_blocks(source: &str) -> String {
    let mut pieces = source.split("{%");
    let mut result = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        result.push_str("{%");
        let tag = piece.split("%}").next().unwrap_or_default();
        let word = tag.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        let scope = match word {
            "generation" => Some("with"),
            "endgeneration" => Some("endwith"),
            _ => None,
        };
        match scope {
            Some(scope) => result.push_str(&piece.replacen(word, &format!(" {scope} "), 1)),
            None => result.push_str(piece),
        }
    }
    result
}

fn masked(message: &Message, mask: &Mask) -> Value {
    let content = match message.role.as_str() {
        "assistant" => mask.specials(&message.content),
        _ => mask.all(&message.content),
    };
    Value::from_pairs([("role", Value::from(mask.role(&message.role))), ("content", Value::from(content))])
}

fn read_if_there(path: &Path) -> Result<Option<String>, PromptError> {
    let fail = |why| PromptError::Read { path: path.to_owned(), why };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(why) => return Err(fail(why)),
    };
    let text = io::read_to_string(io::Read::take(file, MAX_FILE_BYTES + 1)).map_err(fail)?;
    if MAX_FILE_BYTES < text.len() as u64 {
        let problem = format!("more than {MAX_FILE_BYTES} bytes");
        return Err(PromptError::Format { path: path.to_owned(), problem });
    }
    Ok(Some(text))
}

fn source_in(config: &serde_json::Value) -> Result<Option<String>, &'static str> {
    match config.get("chat_template") {
        None | Some(serde_json::Value::Null) => Ok(None),
        Some(serde_json::Value::String(source)) => Ok(Some(source.clone())),
        Some(serde_json::Value::Array(named)) => {
            let default = named.iter().find(|entry| entry["name"] == "default");
            let source = default.and_then(|entry| entry["template"].as_str());
            source.map(|source| Some(source.to_owned())).ok_or("chat_template has no text named \"default\"")
        }
        Some(_) => Err("chat_template is neither a text nor an array of named texts"),
    }
}

/// `bos_token` and its like: each a text, or an object with a `content`.
fn special_tokens(config: &serde_json::Value) -> Vec<(String, String)> {
    let names = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
    let text = |name: &&str| {
        let value = config.get(*name)?;
        value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
    };
    names.iter().filter_map(|name| Some(((*name).to_owned(), text(name)?))).collect()
}

fn raise_exception(message: &str) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("the template refuses: {message}")))
}

/// A text that may not grow without end.
struct BoundedText(Vec<u8>);

impl Write for BoundedText {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if MAX_OUTPUT_BYTES < self.0.len() + bytes.len() {
            return Err(io::Error::other(format!("the template renders more than {MAX_OUTPUT_BYTES} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Name of the template in error messages.
const NAME: &str = "chat_template";

/// Instructions that a template may run: some hundred times what the longest conversation needs.
const MAX_INSTRUCTIONS: u64 = 500_000;

/// How deep macros and loops may nest.
const MAX_RECURSION: usize = 100;

/// Longest prompt that a template may render.
const MAX_OUTPUT_BYTES: usize = 16 << 20;

/// Longest template or tokenizer config that is read.
const MAX_FILE_BYTES: u64 = 16 << 20;

#[cfg(test)]
mod tests;
