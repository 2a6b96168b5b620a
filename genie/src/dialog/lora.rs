//! Adapters of a dialog: which is applied, and at which strengths.

use std::time::Instant;

use crate::Error;
use crate::adapters::{AdapterChoice, AdapterStatus, Adapters};
use crate::config::{KvReuse, LoraConfig};
use crate::engine::AdapterSource;

use super::{AppliedLora, Dialog};

impl Dialog {
    /// Makes later queries run with an adapter, which is loaded if it is not yet. (`GenieDialog_applyLora`)
    ///
    /// The conversation stays; [`KvReuse`] says what becomes of its cache rows. `engine_role` is `primary` unless the
    /// config says otherwise.
    ///
    /// # Errors
    /// [`Error::Lora`] for a name that is not known, [`Error::Engine`] for files that do not fit the model. Nothing has
    /// changed then: what was applied before still is.
    pub fn apply_lora(&mut self, engine_role: &str, adapter: &str) -> Result<AppliedLora, Error> {
        let started = Instant::now();
        self.adapters.check_role(engine_role)?;
        let was_loaded = self.adapters.load(self.cache.engine_mut(), adapter)?;
        self.switch(Some(adapter))?;
        let time = started.elapsed();
        let (info, strengths) = self.adapters.account(adapter).expect("it was loaded above");
        Ok(AppliedLora { info, strengths, was_loaded, started, time })
    }

    /// Makes later queries run with the base alone.
    ///
    /// # Errors
    /// [`Error::Lora`] for a role that is not known; [`Error::Engine`] if the engine cannot go back to its base.
    pub fn apply_base(&mut self, engine_role: &str) -> Result<(), Error> {
        self.adapters.check_role(engine_role)?;
        self.switch(None)
    }

    /// Sets a strength of the applied adapter, or, if none is applied, of every adapter that has it.
    /// (`GenieDialog_setLoraStrength`)
    ///
    /// An adapter without `alphas` in the config shows its slots' names when it is loaded: until then a strength that some other
    /// adapter has is kept for it, too, and takes effect if it has a slot of that name.
    ///
    /// `alpha` names one slot of an adapter; the alpha tensor's name (`lora_alpha` unless the config says otherwise)
    /// means all of them. Strengths belong to their adapter and stay with it until it is removed. The next query runs
    /// with them. 0 is the base (with the encodings of the adapter, if it brings any), 1 what the adapter was trained for.
    ///
    /// # Errors
    /// [`Error::Lora`] for a role or an alpha that is not known, and for a value that is not finite. Nothing has
    /// changed then.
    pub fn set_lora_strength(&mut self, engine_role: &str, alpha: &str, value: f32) -> Result<(), Error> {
        self.adapters.check_role(engine_role)?;
        Ok(self.adapters.set_strength(alpha, value)?)
    }

    /// Gives the memory of an adapter back. It stays known; the next use loads it again from its files.
    /// (`GenieDialog_releaseLoraMemory`)
    ///
    /// Returns whether it was loaded.
    ///
    /// # Errors
    /// [`Error::Lora`] for a role or a name that is not known, and for the adapter that is applied.
    pub fn release_lora_memory(&mut self, engine_role: &str, adapter: &str) -> Result<bool, Error> {
        self.adapters.check_role(engine_role)?;
        let was_loaded = self.adapters.release(self.cache.engine_mut(), adapter)?;
        // The engine keeps what is bound to it, and the last query may have bound this one.
        self.bind(None)?;
        Ok(was_loaded)
    }

    /// Makes an adapter known under a name that is not taken. Its files are opened at its first use.
    ///
    /// # Errors
    /// [`Error::Lora`] for a name that is empty or taken.
    pub fn add_adapter(&mut self, name: &str, source: AdapterSource) -> Result<(), Error> {
        Ok(self.adapters.add(name, source)?)
    }

    /// Forgets an adapter and gives its memory back.
    ///
    /// # Errors
    /// [`Error::Lora`] for a name that is not known, and for the adapter that is applied.
    pub fn remove_adapter(&mut self, name: &str) -> Result<(), Error> {
        self.adapters.remove(self.cache.engine_mut(), name)?;
        self.bind(None)
    }

    /// Every adapter that is known.
    pub fn adapters(&self) -> Vec<AdapterStatus> {
        self.adapters.list()
    }

    /// Name of the adapter that is applied. (`GENIE_DIALOG_PARAM_APPLIED_LORA_ADAPTER`)
    pub fn applied_lora(&self) -> Option<&str> {
        self.adapters.applied()
    }

    /// Strengths of an adapter by alpha, one for each slot; `None` if it is not loaded.
    pub fn lora_strengths(&self, adapter: &str) -> Option<Vec<(String, f32)>> {
        self.adapters.account(adapter).map(|(_, strengths)| strengths)
    }

    /// Sets what later queries do about cache rows of another adapter or strength. (`lora/kv-reuse`)
    pub fn set_kv_reuse(&mut self, kv_reuse: KvReuse) {
        self.kv_reuse = kv_reuse;
    }

    pub(super) fn set_lora(&mut self, config: &LoraConfig, role: String) {
        self.adapters = Adapters::new(config, &role);
        self.kv_reuse = config.kv_reuse;
        self.role = role;
    }

    /// Gives the engine what the next query runs with: `choice`, or what is applied.
    pub(super) fn bind(&mut self, choice: Option<&AdapterChoice>) -> Result<(), Error> {
        let selection = match choice {
            Some(choice) => self.adapters.resolve(self.cache.engine_mut(), choice)?,
            None => self.adapters.current(),
        };
        self.cache.bind(selection).map_err(|why| Error::engine(&self.role, why))
    }

    fn switch(&mut self, adapter: Option<&str>) -> Result<(), Error> {
        let before = self.adapters.set_applied(adapter);
        self.bind(None).inspect_err(|_| {
            self.adapters.set_applied(before.as_deref());
        })
    }
}

#[cfg(test)]
mod tests;
