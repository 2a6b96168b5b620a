//! GPTQ and AWQ checkpoints become graphs with the very values that their codes stand for: `tests/golden/int4`.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use qnn_core::backend::ReferenceBackend;
use qnn_core::backend::reference::dequantize_constant;
use qnn_core::offline::arch::{ActivationBits, CacheType, Precision, WeightClass, WeightType};
use qnn_core::offline::convert::{ConvertOptions, convert};
use qnn_core::offline::dry_run::dry_run;
use qnn_core::offline::{dlc, specialize};
use qnn_core::{Backend, Bindings, BlockOffsets, Encoding, Graph};
use serde_json::Value;

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/int4").join(name)
}

/// The graph, or everything that the error says.
fn import(input: &Path, weights: WeightType) -> Result<Graph, String> {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("model.dlc");
    let precision = Precision { weights, activations: ActivationBits::Sixteen, cache: Some(CacheType::F32) };
    let options = ConvertOptions { input: input.to_owned(), output: output.clone(), precision, threads: 1 };
    convert(&options, &mut |_| {}).map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
    Ok(dlc::read_dlc(&output).unwrap())
}

/// True if a dry run succeeds: everything is read and unpacked, nothing is written.
fn looks_well(input: &Path) -> bool {
    let precision = Precision { weights: WeightType::Keep, activations: ActivationBits::Sixteen, cache: None };
    let options = ConvertOptions { input: input.to_owned(), output: "model.dlc".into(), precision, threads: 1 };
    dry_run(&options, None).is_ok()
}

/// Guards: the float graph of a packed checkpoint computes what transformers computes with the unpacked values.
#[test]
fn packed_checkpoints_match_transformers() {
    let golden: Value = serde_json::from_str(include_str!("../../../tests/golden/int4/logits.json")).unwrap();
    let list =
        |key: &str| golden[key].as_array().unwrap().iter().map(|v| v.as_i64().unwrap() as i32).collect::<Vec<_>>();
    let (ids, rows) = (list("ids"), list("rows"));
    for (name, logits) in golden["logits"].as_object().unwrap() {
        let graph = specialize(&import(&source(name), WeightType::F32).unwrap(), "test", 8, 16).unwrap();
        let mut executable = ReferenceBackend.prepare(&graph).unwrap();
        let mut state = ReferenceBackend.new_state(&[&graph], 16).unwrap();
        let mut bindings = Bindings::new(&graph);
        let positions: Vec<i32> = (0..ids.len() as i32).collect();
        for (input, values) in
            [("input_ids", &ids), ("position_ids", &positions), ("cache_index", &vec![0]), ("logit_indices", &rows)]
        {
            bindings.set_i32(bindings.find_input(input).unwrap(), values).unwrap();
        }
        executable.execute(&mut bindings, &mut state, &AtomicBool::new(false)).unwrap();
        let have = bindings.output_f32(bindings.find_output("logits").unwrap());
        let want: Vec<f64> = logits
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|row| row.as_array().unwrap())
            .filter_map(Value::as_f64)
            .collect();
        assert_eq!(have.len(), want.len());
        for (have, want) in have.iter().zip(&want) {
            assert!((f64::from(*have) - want).abs() < 1e-4, "{name}: {have}, transformers {want}");
        }
    }
}

/// Guards: the grid is kept: codes of 4 bits with the checkpoint's groups, no value changed. Symmetric ones have no offsets.
#[test]
fn the_grid_is_kept() {
    for (name, blocks, symmetric) in [
        ("gptq", [32, 32], false),
        ("gptq_zero", [32, 32], false),
        ("gptq_v2", [64, 96], true),
        ("awq", [32, 32], false),
    ] {
        let kept = import(&source(name), WeightType::Keep).unwrap();
        let floats = import(&source(name), WeightType::F32).unwrap();
        for (module, block) in [("self_attn.k_proj", blocks[0]), ("mlp.down_proj", blocks[1])] {
            let id = kept.find(&format!("model.layers.0.{module}.weight")).unwrap();
            let tensor = kept.tensor(id);
            let Some(Encoding::Block { bitwidth: 4, block_size, offsets, .. }) = &tensor.encoding else {
                panic!("{name} {module}: {:?}", tensor.encoding);
            };
            assert_eq!(*block_size, block, "{name} {module}");
            assert_eq!(matches!(offsets, BlockOffsets::Symmetric), symmetric, "{name} {module}");
            let float = floats.tensor(floats.find(&tensor.name).unwrap());
            let (have, want) = (dequantize_constant(tensor), dequantize_constant(float));
            let changed = have.iter().zip(&want).position(|(have, want)| have != want);
            assert_eq!(changed.map(|at| (at, have[at], want[at])), None, "{name} {module}");
        }
    }
}

/// Guards: what has no grid of ours becomes the nearest that there is, and the report says so: groups in the order of
/// activations are rounded to 8 bits, scales that only bf16 holds to f16.
#[test]
fn what_is_rounded_is_said() {
    let check = |name: &str, bits: u32, bound: f64, words: &str| {
        let precision = Precision { weights: WeightType::Keep, activations: ActivationBits::Sixteen, cache: None };
        let options = ConvertOptions { input: source(name), output: "model.dlc".into(), precision, threads: 1 };
        let found = dry_run(&options, None).unwrap();
        let linear = found.weights.iter().find(|w| w.class == WeightClass::Linear).unwrap();
        assert_eq!(format!("{} -> {}: {}", linear.source, linear.format, linear.change.name()), words);
        let (kept, floats) = (import(&source(name), WeightType::Keep), import(&source(name), WeightType::F32));
        let (kept, floats) = (kept.unwrap(), floats.unwrap());
        let id = |graph: &Graph| graph.find("model.layers.0.mlp.down_proj.weight").unwrap();
        assert_eq!(kept.tensor(id(&kept)).data_type.bits(), bits as usize, "{name}");
        let (have, want) =
            (dequantize_constant(kept.tensor(id(&kept))), dequantize_constant(floats.tensor(id(&floats))));
        let largest = want.iter().fold(0.0f64, |largest, v| largest.max(v.abs()));
        let worst = have.iter().zip(&want).fold(0.0f64, |worst, (have, want)| worst.max((have - want).abs()));
        assert!(worst > 0.0 && worst < bound * largest, "{name}: off by {worst} of {largest}");
    };
    check("gptq_act_order", 8, 1.0 / 254.0, "INT4, act-order -> SFIXED_POINT_8 block 32: rounded");
    check("gptq_bf16", 4, 1e-5, "INT4 -> UFIXED_POINT_4 block 16, whole offsets: scales rounded to f16");
}

/// Guards: what a packed checkpoint may be damaged by is refused by name.
#[test]
fn strange_checkpoints_are_refused() {
    let check = |name: &str, change: &dyn Fn(&mut Stored), words: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(source(name).join("config.json"), folder.path().join("config.json")).unwrap();
        let mut stored = Stored::read(&source(name).join("model.safetensors"));
        change(&mut stored);
        std::fs::write(folder.path().join("model.safetensors"), stored.to_bytes()).unwrap();
        let text = import(folder.path(), WeightType::Keep).expect_err(words[0]);
        for word in words {
            assert!(text.contains(word), "{text} does not say {word}");
        }
    };
    const Q: &str = "model.layers.0.self_attn.q_proj";
    let part = |part: &str| format!("{Q}.{part}");
    check("gptq", &|s| s.data(&part("g_idx"))[0] = 2, &["q_proj.g_idx", "64 numbers below 2"]);
    check("gptq", &|s| s.data(&part("g_idx"))[3] = 128, &["q_proj.g_idx", "64 numbers below 2"]);
    check("gptq", &|s| s.data("model.layers.0.mlp.up_proj.bias")[0] = 1, &["up_proj.bias"]);
    check("gptq", &|s| s.remove(&part("scales")), &["q_proj.scales is missing"]);
    check("gptq", &|s| s.remove(&part("qzeros")), &["q_proj.qzeros is missing"]);
    check("gptq", &|s| s.header[part("scales")]["dtype"] = "I16".into(), &["q_proj.scales", "I16", "F16"]);
    check("gptq", &|s| s.header[part("qweight")]["shape"] = serde_json::json!([4, 128]), &["q_proj", "groups of 32"]);
    check("gptq", &|s| s.header[part("qzeros")]["shape"] = serde_json::json!([4, 4]), &["q_proj.qzeros", "[2, 8]"]);
    let twelve_outputs = |s: &mut Stored| {
        for (name, shape) in [("qweight", [8, 12]), ("scales", [2, 12]), ("qzeros", [2, 1])] {
            s.cut(&part(name), shape);
        }
    };
    check("gptq", &twelve_outputs, &["q_proj.qweight", "I32 [8, 12]", "a multiple of 8, not 12"]);
    check("awq", &|s| s.header[part("qweight")]["dtype"] = "F32".into(), &["q_proj.qweight", "F32", "I32"]);
    check("awq", &|s| s.header[part("scales")]["shape"] = serde_json::json!([128]), &["q_proj.scales", "two extents"]);
}

/// Guards: no byte of a packed checkpoint's header or configuration can make the importer panic, and a file that is cut is
/// refused.
#[test]
fn damaged_checkpoints_do_not_panic() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(source("gptq").join(file), folder.path().join(file)).unwrap();
    }
    for file in ["config.json", "model.safetensors"] {
        let path = folder.path().join(file);
        let whole = std::fs::read(&path).unwrap();
        let header = if file == "config.json" { whole.len() } else { 8 + whole[0] as usize + whole[1] as usize * 256 };
        for at in (0..header).step_by(5) {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << (at % 7);
            std::fs::write(&path, &damaged).unwrap();
            looks_well(folder.path());
        }
        for length in (0..whole.len()).step_by(whole.len() / 50) {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(!looks_well(folder.path()), "{file} cut to {length} bytes");
        }
        std::fs::write(&path, &whole).unwrap();
    }
}

/// A safetensors file taken apart.
struct Stored {
    header: Value,
    data: Vec<u8>,
}

impl Stored {
    fn read(path: &Path) -> Stored {
        let bytes = std::fs::read(path).unwrap();
        let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        Stored { header: serde_json::from_slice(header).unwrap(), data: data.to_vec() }
    }

    /// Bytes of a tensor.
    fn data(&mut self, name: &str) -> &mut [u8] {
        let at = |i: usize| self.header[name]["data_offsets"][i].as_u64().unwrap() as usize;
        let range = at(0)..at(1);
        &mut self.data[range]
    }

    /// Gives a tensor a name that means nothing.
    fn remove(&mut self, name: &str) {
        let entry = self.header.as_object_mut().unwrap().remove(name).unwrap();
        self.header["removed"] = entry;
    }

    /// Leaves a tensor as many values as `shape` has; the bytes of the others get a name that means nothing.
    fn cut(&mut self, name: &str, shape: [usize; 2]) {
        let at = |i: usize| self.header[name]["data_offsets"][i].as_u64().unwrap() as usize;
        let value_bytes = if self.header[name]["dtype"] == "I32" { 4 } else { 2 };
        let (start, end, all) = (at(0), at(0) + shape[0] * shape[1] * value_bytes, at(1));
        self.header[name]["shape"] = serde_json::json!(shape);
        self.header[name]["data_offsets"] = serde_json::json!([start, end]);
        self.header[format!("{name}.rest")] =
            serde_json::json!({ "dtype": "U8", "shape": [all - end], "data_offsets": [end, all] });
    }

    fn to_bytes(&self) -> Vec<u8> {
        let header = self.header.to_string();
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &self.data].concat()
    }
}
