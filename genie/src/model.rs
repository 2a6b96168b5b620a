//! A model that is open: what dialogs over it share.

use std::sync::{Arc, Mutex, PoisonError};

use crate::config::{DialogConfig, EngineConfig, Settings};
use crate::engine::EngineError;
use crate::engine::qnn::{QnnEngine, QnnModel};
use crate::prompt::ChatTemplate;
use crate::tokenizer::Tokenizer;
use crate::{Dialog, Error};

/// The model, tokenizer and chat template that a config names, opened once, for any number of dialogs.
///
/// Weights are in memory once, and so is an adapter that several dialogs have under one name from the same files. Each
/// dialog has its own conversation, its own cache, and its own adapter and strengths. Dialogs may run in threads of their
/// own; those that run at the same time take turns at the worker team. Clones are handles to the same model.
///
/// ```no_run
/// # fn main() -> Result<(), genie::Error> {
/// use genie::{DialogConfig, Model};
///
/// let model = Model::open(DialogConfig::from_file("genie_config.json")?)?;
/// let (mut formal, mut pirate) = (model.dialog()?, model.dialog()?);
/// pirate.apply_lora("primary", "pirate")?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Model(Arc<Parts>);

struct Parts {
    config: DialogConfig,
    contexts: Arc<QnnModel>,
    /// For who asks first. It is prepared with the model, since the tokenizer takes longer than the rest.
    first_engine: Mutex<Option<QnnEngine>>,
    tokenizer: Arc<Tokenizer>,
    template: Option<Arc<ChatTemplate>>,
}

impl Model {
    /// Opens what `config` names, and prepares a first engine: the tokenizer in a thread of its own beside the rest.
    ///
    /// # Errors
    /// [`Error`] with what cannot be opened and why.
    pub fn open(config: DialogConfig) -> Result<Self, Error> {
        let load_tokenizer = || Tokenizer::load(&config.tokenizer_path);
        let (tokenizer, engine, template) = std::thread::scope(|scope| {
            let tokenizer =
                std::thread::Builder::new().name("tokenizer".to_owned()).spawn_scoped(scope, load_tokenizer);
            let engine = first_engine(&config.engine);
            let template = ChatTemplate::beside(&config.tokenizer_path);
            let tokenizer = match tokenizer {
                Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                // The system gives no thread: then one after the other.
                Err(_) => load_tokenizer(),
            };
            (tokenizer, engine, template)
        });
        let (contexts, engine) = engine.map_err(|why| Error::engine(&config.engine.role, why))?;
        Ok(Self(Arc::new(Parts {
            contexts,
            first_engine: Mutex::new(Some(engine)),
            template: template?.map(Arc::new),
            tokenizer: Arc::new(tokenizer?),
            config,
        })))
    }

    /// A new dialog, with the settings and the adapters of the config.
    ///
    /// # Errors
    /// [`Error::Engine`] if the model is not what the config says it is.
    pub fn dialog(&self) -> Result<Dialog, Error> {
        self.dialog_with(self.0.config.settings.clone())
    }

    /// A new dialog with settings of its own. Its context is never larger than the config's.
    ///
    /// # Errors
    /// As [`Model::dialog`].
    pub fn dialog_with(&self, settings: Settings) -> Result<Dialog, Error> {
        Dialog::over(self, settings)
    }

    /// A new engine: a cache over the shared weights, without a dialog.
    ///
    /// # Errors
    /// As [`Model::dialog`].
    pub fn engine(&self) -> Result<QnnEngine, Error> {
        if let Some(engine) = self.0.first_engine.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Ok(engine);
        }
        QnnEngine::over(Arc::clone(&self.0.contexts)).map_err(|why| Error::engine(&self.0.config.engine.role, why))
    }

    /// Number of adapters in memory for all dialogs together: one that several use counts once.
    pub fn n_loaded_adapters(&self) -> usize {
        self.0.contexts.n_loaded_adapters()
    }

    /// What the model was opened with.
    pub fn config(&self) -> &DialogConfig {
        &self.0.config
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.0.tokenizer
    }

    pub(crate) fn contexts(&self) -> &QnnModel {
        &self.0.contexts
    }

    pub(crate) fn template(&self) -> Option<&Arc<ChatTemplate>> {
        self.0.template.as_ref()
    }
}

fn first_engine(config: &EngineConfig) -> Result<(Arc<QnnModel>, QnnEngine), EngineError> {
    let contexts = Arc::new(QnnModel::open(config)?);
    let engine = QnnEngine::over(Arc::clone(&contexts))?;
    Ok((contexts, engine))
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("config", &self.0.config).finish_non_exhaustive()
    }
}
