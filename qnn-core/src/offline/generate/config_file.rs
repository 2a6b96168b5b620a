//! The generator's `--config_file`: the JSON of the original's backend extensions, as far as it means something here.
//!
//! Two files of the original are understood: the outer one, which names the backend's file, and the backend's own. What
//! only steers hardware is checked for its type and reported as without effect; every other key is refused by name.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::GenerateError;

/// What a config file asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ConfigFile {
    /// The context's graphs cannot run before a section was applied. (`context/lora_weight_sharing`)
    pub lora_weight_sharing: bool,
    /// JSON pointers of keys that have no effect on a CPU.
    pub without_effect: Vec<String>,
}

impl ConfigFile {
    /// Reads a config file, and the one it names, relative to its folder.
    ///
    /// # Errors
    /// [`GenerateError::ConfigFile`] with the file, the JSON pointer, what is there and what is needed.
    pub fn read(path: &Path) -> Result<ConfigFile, GenerateError> {
        let mut config = ConfigFile::default();
        let root = Entry::read(path)?;
        let Some(extensions) = root.object(OUTER.iter().chain(BACKEND).copied())?.get("backend_extensions") else {
            config.backend(&root)?;
            return Ok(config);
        };
        if let Some(key) = BACKEND.iter().find(|key| root.value.get(key).is_some()) {
            return Err(root
                .at(key)
                .refuse("no such key beside backend_extensions: it belongs into the file named there"));
        }
        let extensions = root.child("backend_extensions", extensions);
        let fields = extensions.object(["shared_library_path", "config_file_path"])?;
        if let Some(library) = fields.get("shared_library_path") {
            extensions.child("shared_library_path", library).text()?;
            config.without_effect.push("/backend_extensions/shared_library_path".to_owned());
        }
        if let Some(inner) = fields.get("config_file_path") {
            let inner = extensions.child("config_file_path", inner);
            let path = path.parent().unwrap_or(Path::new("")).join(inner.text()?);
            config.backend(&Entry::read(&path)?)?;
        }
        Ok(config)
    }

    /// Takes what the backend's own file says.
    fn backend(&mut self, root: &Entry<'_>) -> Result<(), GenerateError> {
        let fields = root.object(BACKEND.iter().copied())?;
        if let Some(context) = fields.get("context") {
            // Python's documentation has a list of one, bundles have the object itself.
            let context = root.child("context", context);
            match context.value.as_array().map(Vec::as_slice) {
                Some([one]) => self.context(&context.child("0", one))?,
                Some(_) => return Err(context.refuse("one object, or a list of one")),
                None => self.context(&context)?,
            }
        }
        for key in ["graphs", "devices", "memory", "groupContext"] {
            if fields.contains_key(key) {
                self.without_effect.push(format!("/{key}"));
            }
        }
        Ok(())
    }

    fn context(&mut self, context: &Entry<'_>) -> Result<(), GenerateError> {
        for (key, value) in context.object(CONTEXT.iter().copied())? {
            let value = context.child(key, value);
            let flag = value.value.as_bool().ok_or_else(|| value.refuse("true or false"))?;
            match key.as_str() {
                "lora_weight_sharing" | "lora_weight_sharing_enabled" => self.lora_weight_sharing |= flag,
                _ if !flag => return Err(value.refuse("true: graphs of a context always share their weights")),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A JSON value with the place it was found at.
struct Entry<'a> {
    path: PathBuf,
    pointer: String,
    value: std::borrow::Cow<'a, Value>,
}

impl Entry<'_> {
    fn read(path: &Path) -> Result<Entry<'static>, GenerateError> {
        let refuse = |have: String| GenerateError::ConfigFile {
            path: path.to_owned(),
            pointer: String::new(),
            have,
            want: "a JSON file".to_owned(),
        };
        let text = std::fs::read(path).map_err(|why| refuse(why.to_string()))?;
        let value = serde_json::from_slice(&text).map_err(|why| refuse(why.to_string()))?;
        Ok(Entry { path: path.to_owned(), pointer: String::new(), value: std::borrow::Cow::Owned(value) })
    }

    fn child<'b>(&self, key: &str, value: &'b Value) -> Entry<'b> {
        let pointer = format!("{}/{key}", self.pointer);
        Entry { path: self.path.clone(), pointer, value: std::borrow::Cow::Borrowed(value) }
    }

    fn at(&self, key: &str) -> Entry<'_> {
        self.child(key, self.value.get(key).unwrap_or(&Value::Null))
    }

    fn object<'k>(&self, known: impl IntoIterator<Item = &'k str>) -> Result<&Map<String, Value>, GenerateError> {
        let known: Vec<&str> = known.into_iter().collect();
        let fields = self.value.as_object().ok_or_else(|| self.refuse("an object"))?;
        match fields.keys().find(|key| !known.contains(&key.as_str())) {
            None => Ok(fields),
            Some(key) => Err(self.at(key).refuse(&format!("no such key: known here are {}", known.join(", ")))),
        }
    }

    fn text(&self) -> Result<&str, GenerateError> {
        self.value.as_str().ok_or_else(|| self.refuse("a text"))
    }

    fn refuse(&self, want: &str) -> GenerateError {
        let (path, pointer) = (self.path.clone(), self.pointer.clone());
        GenerateError::ConfigFile { path, pointer, have: self.value.to_string(), want: want.to_owned() }
    }
}

/// Keys of the outer file.
const OUTER: &[&str] = &["backend_extensions"];

/// Keys of the backend's file.
const BACKEND: &[&str] = &["context", "graphs", "devices", "memory", "groupContext"];

const CONTEXT: &[&str] = &["weight_sharing_enabled", "lora_weight_sharing", "lora_weight_sharing_enabled"];

#[cfg(test)]
mod tests {
    use super::*;

    // Guards: the original's files are read in each of their forms, keys that only steer hardware are named, and whatever
    // would change the result and cannot is refused with its place.
    #[test]
    fn files_of_the_original() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            ConfigFile::read(&path)
        };
        let check = |text: &str, lora_weight_sharing: bool, without_effect: &[&str]| {
            let without_effect = without_effect.iter().map(|key| (*key).to_owned()).collect();
            assert_eq!(read(text).unwrap(), ConfigFile { lora_weight_sharing, without_effect }, "{text}");
        };
        check("{}", false, &[]);
        check(r#"{"context": {"lora_weight_sharing": true}}"#, true, &[]);
        check(r#"{"context": [{"weight_sharing_enabled": true, "lora_weight_sharing_enabled": true}]}"#, true, &[]);
        check(r#"{"graphs": [{"O": 3}], "devices": []}"#, false, &["/graphs", "/devices"]);
        std::fs::write(folder.path().join("htp.json"), r#"{"context": {"lora_weight_sharing": true}}"#).unwrap();
        let outer = r#"{"backend_extensions": {"shared_library_path": "x.so", "config_file_path": "htp.json"}}"#;
        check(outer, true, &["/backend_extensions/shared_library_path"]);

        let refused = |text: &str, says: &[&str]| {
            let message = read(text).unwrap_err().to_string();
            assert!(says.iter().all(|word| message.contains(word)), "{message}");
        };
        refused(
            r#"{"context_configs": {"is_persistent_binary": true}}"#,
            &["config.json", "/context_configs", "no such"],
        );
        refused(r#"{"context": {"init_acceleration": true}}"#, &["/context/init_acceleration"]);
        refused(r#"{"context": {"lora_weight_sharing": 1}}"#, &["/context/lora_weight_sharing", "1", "true or false"]);
        refused(
            r#"{"context": [{"weight_sharing_enabled": false}]}"#,
            &["/context/0/weight_sharing_enabled", "always"],
        );
        refused(r#"{"context": [{}, {}]}"#, &["/context", "list of one"]);
        refused(r#"{"backend_extensions": {"config_file_path": "none.json"}}"#, &["none.json"]);
        refused(r#"{"backend_extensions": {}, "context": {}}"#, &["/context", "beside"]);
        refused("{", &["config.json", "JSON"]);
    }
}
