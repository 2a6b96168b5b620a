//! GGUF files for tests: just enough of the format to write what the importer reads.

/// A GGUF file under construction.
#[derive(Debug, Clone, Default)]
pub struct GgufWriter {
    n_keys: u64,
    metadata: Vec<u8>,
    tensors: Vec<Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    name: String,
    shape: Vec<usize>,
    format: u32,
    bytes: Vec<u8>,
}

impl GgufWriter {
    /// Adds a u32.
    pub fn u32(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.metadata.extend(value.to_le_bytes());
    }

    /// Adds an f32.
    pub fn f32(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.metadata.extend(value.to_le_bytes());
    }

    /// Adds a truth value.
    pub fn bool(&mut self, key: &str, value: bool) {
        self.key(key, 7);
        self.metadata.push(u8::from(value));
    }

    /// Adds a string.
    pub fn string(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        put_string(&mut self.metadata, value);
    }

    /// Adds an array of strings.
    pub fn strings<'a>(&mut self, key: &str, values: impl IntoIterator<Item = &'a str>) {
        self.key(key, 9);
        let values: Vec<&str> = values.into_iter().collect();
        self.metadata.extend(8u32.to_le_bytes());
        self.metadata.extend((values.len() as u64).to_le_bytes());
        for value in values {
            put_string(&mut self.metadata, value);
        }
    }

    /// Adds an array of i32.
    pub fn integers(&mut self, key: &str, values: &[i32]) {
        self.key(key, 9);
        self.metadata.extend(5u32.to_le_bytes());
        self.metadata.extend((values.len() as u64).to_le_bytes());
        self.metadata.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    }

    /// Adds an array of f32.
    pub fn floats(&mut self, key: &str, values: &[f32]) {
        self.key(key, 9);
        self.metadata.extend(6u32.to_le_bytes());
        self.metadata.extend((values.len() as u64).to_le_bytes());
        self.metadata.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    }

    /// Adds a tensor of f32, `shape` outermost first.
    pub fn tensor_f32(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        self.tensor(name, shape, 0, values.iter().flat_map(|v| v.to_le_bytes()).collect());
    }

    /// Adds a tensor of the element format with GGML's number `format`.
    pub fn tensor(&mut self, name: &str, shape: &[usize], format: u32, bytes: Vec<u8>) {
        self.tensors.push(Entry { name: name.to_owned(), shape: shape.to_vec(), format, bytes });
    }

    /// The same model in `parts` files: the first has the metadata, and the tensors are dealt out in turn.
    pub fn split(&self, parts: usize) -> Vec<GgufWriter> {
        let part = |no: usize| {
            let mut part = if no == 0 { self.clone() } else { GgufWriter::default() };
            part.tensors = self.tensors.iter().skip(no).step_by(parts).cloned().collect();
            part.u32("split.no", no as u32);
            part.u32("split.count", parts as u32);
            part.u32("split.tensors.count", self.tensors.len() as u32);
            part
        };
        (0..parts).map(part).collect()
    }

    /// The file.
    pub fn finish(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend(self.n_keys.to_le_bytes());
        file.extend(&self.metadata);
        let mut offset = 0u64;
        for entry in &self.tensors {
            put_string(&mut file, &entry.name);
            file.extend((entry.shape.len() as u32).to_le_bytes());
            for extent in entry.shape.iter().rev() {
                file.extend((*extent as u64).to_le_bytes());
            }
            file.extend(entry.format.to_le_bytes());
            file.extend(offset.to_le_bytes());
            offset += (entry.bytes.len() as u64).next_multiple_of(ALIGNMENT);
        }
        for entry in &self.tensors {
            file.resize(file.len().next_multiple_of(ALIGNMENT as usize), 0);
            file.extend(&entry.bytes);
        }
        file
    }

    fn key(&mut self, key: &str, value_type: u32) {
        self.n_keys += 1;
        put_string(&mut self.metadata, key);
        self.metadata.extend(value_type.to_le_bytes());
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

const ALIGNMENT: u64 = 32;
