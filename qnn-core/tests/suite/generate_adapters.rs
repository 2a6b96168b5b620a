//! The promises of `--adapter_weight_config`: the base does not depend on adapters, every value lands once, files are no
//! larger than their parts, and what cannot be right is refused before anything is written.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::support::{Form, Rng, Runner, Tiny, chain, tiny};
use qnn_core::{
    Adapter, Bytes, Context, DataType, OpenOptions,
    backend::HtpBackend,
    binary::{FileInfo, Verify},
    offline::{
        dlc::write_dlc,
        generate::{GenerateOptions, Report, generate},
        lora::values::{Matrix, constant, panels, row_scales},
    },
};

const RANK: usize = 8;
const IDS: [i32; 3] = [7, 2, 11];

/// Float values of one adapter: name, extents, numbers.
type Values = Vec<(String, [usize; 2], Vec<f32>)>;

struct Project {
    dir: tempfile::TempDir,
    options: GenerateOptions,
}

impl Project {
    fn new(branch: Option<(usize, DataType)>, num_splits: usize) -> Project {
        let dir = tempfile::tempdir().unwrap();
        let dlc_path = dir.path().join("model.dlc");
        let forms = &[Form::Int8Block];
        write_dlc(&dlc_path, &tiny("model", Tiny { forms, branch, ..Tiny::default() })).unwrap();
        let options = GenerateOptions {
            dlc_path,
            output_dir: dir.path().join("out"),
            binary_file: "tiny".to_owned(),
            ar: vec![8, 1],
            cl: vec![32],
            num_splits,
            adapter_weight_config: Some(dir.path().join("lora_output_files.yaml")),
            lora_weight_sharing: false,
        };
        Project { dir, options }
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        std::fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn weights(&self, name: &str, values: &Values, metadata: &[(&str, &str)]) {
        let bytes: Vec<Vec<u8>> =
            values.iter().map(|(_, _, v)| v.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
        let views = values.iter().zip(&bytes).map(|((name, dims, _), bytes)| {
            (
                name.as_str(),
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, dims.to_vec(), bytes).unwrap(),
            )
        });
        let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        self.write(name, safetensors::serialize(views, Some(metadata.collect::<HashMap<_, _>>())).unwrap());
    }

    fn run(&self) -> Result<Report, String> {
        generate(&self.options, &mut |_| {}).map_err(|error| chain(&error))
    }

    fn out(&self, name: &str) -> PathBuf {
        self.options.output_dir.join(name)
    }
}

fn open(path: &Path) -> Context {
    Context::open(path, &OpenOptions::default()).unwrap()
}

/// Random values of rank `rank` for the modules of both layers.
fn values(seed: u64, rank: usize, modules: &[(&str, usize, usize)]) -> Values {
    let mut rng = Rng(seed);
    let mut values = Vec::new();
    for (module, n, k) in modules {
        for layer in 0..2 {
            for (half, dims) in [("lora_A", [rank, *k]), ("lora_B", [*n, rank])] {
                let name = format!("base_model.model.model.layers.{layer}.{module}.{half}.weight");
                values.push((name, dims, (0..dims[0] * dims[1]).map(|_| rng.float() * 0.3).collect()));
            }
        }
    }
    values
}

const QV: [(&str, usize, usize); 2] = [("self_attn.q_proj", 32, 32), ("self_attn.v_proj", 16, 32)];
const MLP: [(&str, usize, usize); 1] = [("mlp.down_proj", 32, 64)];

fn matrix<'a>(name: &str, [n, k]: [usize; 2], values: &'a [f32]) -> Matrix<'a> {
    Matrix { name: name.to_owned(), n, k, values }
}

/// AIMET encodings with scales a little wider than needed.
fn encodings(values: &Values) -> (String, HashMap<String, Vec<f32>>) {
    let scales: HashMap<String, Vec<f32>> = values
        .iter()
        .map(|(name, dims, v)| {
            let scales = row_scales(&matrix(name, *dims, v), DataType::SFixedPoint8);
            (name.clone(), scales.iter().map(|scale| scale * 1.25).collect())
        })
        .collect();
    let entries: Vec<serde_json::Value> = scales
        .iter()
        .map(|(name, scale)| {
            let offset = vec![-128; scale.len()];
            serde_json::json!({"name": name, "dtype": "INT", "enc_type": "PER_CHANNEL", "bw": 8, "is_sym": true,
                "scale": scale, "offset": offset})
        })
        .collect();
    let file = serde_json::json!({"version": "1.0.0", "activation_encodings": [], "param_encodings": entries});
    (file.to_string(), scales)
}

/// The adapter that `values` should become, made without any file.
fn want(context: &Context, declared: DataType, values: &Values, scales: &HashMap<String, Vec<f32>>) -> Arc<Adapter> {
    let packed = values.iter().map(|(name, dims, v)| {
        let tensor = constant(&matrix(name, *dims, v), declared, scales.get(name).map(Vec::as_slice)).unwrap();
        (name.clone(), panels(&tensor).unwrap())
    });
    Arc::new(Adapter::new("want", context.updatable().clone(), packed.collect::<Vec<_>>()).unwrap())
}

fn assert_same_values(a: &Adapter, b: &Adapter) {
    let parts = |adapter: &Adapter| -> Vec<_> {
        adapter.values().map(|(name, p)| (name.to_owned(), *p.layout(), p.bytes().to_vec())).collect()
    };
    assert!(parts(a) == parts(b), "{} and {} differ", a.name(), b.name());
}

const SHARED: &str = "
use_case:
  - name: one
    weights: one.safetensors
    encodings: one.encodings
  - {name: two, graph: model, weights: two.safetensors}
share_adapters_between_graphs: Yes
";

fn project(share: &str, declared: DataType, num_splits: usize) -> (Project, Values, HashMap<String, Vec<f32>>, Values) {
    let project = Project::new(Some((RANK, declared)), num_splits);
    let (one, two) = (values(1, 5, &QV), values(2, 2, &MLP));
    let (text, scales) = encodings(&one);
    let slots = r#"[{"name": "x", "columns": [0, 2], "scaling": {"default": 4.0}, "source_hash": "aa"},
        {"name": "y", "columns": [2, 5], "scaling": {"default": 2.0, "modules": {"m": 1.0}}, "source_hash": "bb"}]"#;
    project.weights("one.safetensors", &one, &[("slots", slots)]);
    project.weights("two.safetensors", &two, &[]);
    project.write("one.encodings", text);
    project.write("lora_output_files.yaml", SHARED.replace("Yes", share));
    (project, one, scales, two)
}

// Broken if a shared section has other values than its use case, other facts, a weight twice, or needs another base.
#[test]
fn shared_sections_hold_each_use_case_once() {
    let (project, one, scales, two) = project("Yes", DataType::SFixedPoint8, 1);
    let report = project.run().unwrap();
    let names: Vec<_> = report.sections.iter().map(|s| s.path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["tiny_default_adapter.bin", "tiny_one.bin", "tiny_two.bin"]);
    let context = open(&project.out("tiny.bin"));
    let load = |name: &str| context.load_section(std::fs::read(project.out(name)).unwrap().into()).unwrap();
    let (first, second, empty) = (load("tiny_one.bin"), load("tiny_two.bin"), load("tiny_default_adapter.bin"));
    assert_same_values(&first, &want(&context, DataType::SFixedPoint8, &one, &scales));
    assert_same_values(&second, &want(&context, DataType::SFixedPoint8, &two, &HashMap::new()));
    assert_eq!((first.name(), first.rank(), first.n_targets(), first.graph()), ("one", 5, 4, None));
    let slots: Vec<_> = first.slots().iter().map(|s| (s.name.as_str(), s.columns.clone(), s.scaling)).collect();
    assert_eq!(slots, [("x", 0..2, Some(4.0)), ("y", 2..5, None)]);
    assert_eq!(first.description().metadata["source_hash.y"], "bb");
    assert_eq!(first.description().metadata["scaling.y"], r#"{"default":2.0,"modules":{"m":1.0}}"#);
    assert_eq!((second.slots()[0].name.as_str(), second.slots()[0].columns.clone()), ("two", 0..2));
    assert_eq!((empty.n_tensors(), empty.rank()), (0, 0));
    for section in &report.sections {
        assert_eq!(section.size_bytes, std::fs::metadata(&section.path).unwrap().len());
        assert!(section.size_bytes >= section.panels_bytes && section.panels_bytes >= section.weights_bytes);
    }
    // Rank 2 of 8-bit numbers: A [2, 64] and B [32, 2] with a scale per row, in two layers.
    assert_eq!(report.sections[2].weights_bytes, 2 * (2 * 64 + 2 * 4 + 32 * 2 + 32 * 4));

    // The base is the same with and without adapters.
    let mut plain = Project::new(Some((RANK, DataType::SFixedPoint8)), 1);
    plain.options.adapter_weight_config = None;
    assert_eq!(plain.run().unwrap().files[0].identity, report.files[0].identity);

    let graph = context.graph("prompt_ar8_cl32_1_of_1").unwrap();
    let mut runner = Runner::new(&HtpBackend::new(1).unwrap(), graph);
    let base = runner.run(&IDS, None, 1.0);
    assert_eq!(runner.run(&IDS, Some(empty), 1.0), base);
    assert_ne!(runner.run(&IDS, Some(first), 1.0), base);
}

// Broken if per-graph sections differ from the shared one, or sharing does not save what it is there to save.
#[test]
fn one_section_per_graph_or_one_for_all() {
    for declared in [DataType::SFixedPoint8, DataType::SFixedPoint4, DataType::Float16] {
        let sizes = ["Yes", "No"].map(|share| {
            let (project, ..) = project(share, declared, 1);
            if declared != DataType::SFixedPoint8 {
                project.write("one.encodings", r#"{"version": "1.0.0", "param_encodings": []}"#);
            }
            let report = project.run().unwrap();
            let context = open(&report.files[0].path);
            let load = |name: &str| context.load_section(std::fs::read(project.out(name)).unwrap().into()).unwrap();
            if share == "No" {
                let (prompt, token) = (load("prompt_ar8_cl32_1_of_1_one.bin"), load("token_ar1_cl32_1_of_1_one.bin"));
                assert_same_values(&prompt, &token);
                assert_eq!(prompt.graph(), Some("prompt_ar8_cl32_1_of_1"));
                assert_eq!(report.sections.len(), 6);
            }
            let of_one = report.sections.iter().filter(|section| section.adapter == "one");
            of_one.map(|section| section.size_bytes).sum::<u64>()
        });
        // A little more than half: the shared file describes the inputs and outputs of both graphs.
        assert!(sizes[0] as f64 <= 0.6 * sizes[1] as f64, "{declared}: {sizes:?}");
    }
}

// Broken if a split's section has tensors of another split, or a split without targets has no file.
#[test]
fn each_split_has_its_part_of_every_adapter() {
    let (project, mut one, scales, two) = project("Yes", DataType::SFixedPoint8, 2);
    one.retain(|(name, ..)| name.contains("layers.1"));
    project.weights("one.safetensors", &one, &[]);
    let report = project.run().unwrap();
    assert_eq!(report.sections.len(), 6);
    let mut n_loaded = 0;
    for (i, file) in report.files.iter().enumerate() {
        let context = open(&file.path);
        for (name, all) in [("one", &one), ("two", &two)] {
            let path = project.out(&format!("tiny_{}_of_2_{name}.bin", i + 1));
            let loaded = context.load_section(std::fs::read(&path).unwrap().into()).unwrap();
            let mine: Values = all.iter().filter(|v| v.0.contains(&format!("layers.{i}"))).cloned().collect();
            assert_same_values(&loaded, &want(&context, DataType::SFixedPoint8, &mine, &scales_of(name, &scales)));
            n_loaded += loaded.n_tensors();
            assert_eq!(loaded.rank(), if name == "one" { 5 } else { 2 }, "the rank is that of the whole adapter");
        }
    }
    assert_eq!(n_loaded, one.len() + two.len());
    let empty = report.sections.iter().find(|s| s.path.ends_with("tiny_1_of_2_one.bin")).unwrap();
    assert_eq!((empty.n_targets, empty.rank), (0, 5));
}

fn scales_of(name: &str, scales: &HashMap<String, Vec<f32>>) -> HashMap<String, Vec<f32>> {
    if name == "one" { scales.clone() } else { HashMap::new() }
}

/// One weight in 16 bits.
const WIDE: &str = r#"{"param_encodings": [{"name": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "dtype": "INT", "enc_type": "PER_TENSOR", "bw": 16, "scale": [1.0]}]}"#;

// Broken if a context that shares its adapter weights can run without any, or is made where it could never run.
#[test]
fn weight_sharing_is_recorded_in_the_context() {
    let (mut project, ..) = project("Yes", DataType::SFixedPoint8, 1);
    project.options.lora_weight_sharing = true;
    let report = project.run().unwrap();
    let context = open(&report.files[0].path);
    let graph = report.files[0].graphs[0].clone();
    assert!(context.ready(&graph).unwrap_err().to_string().contains("no section has been applied"));
    context.apply_section(None, Bytes::map_file(&project.out("tiny_default_adapter.bin")).unwrap()).unwrap();
    context.ready(&graph).unwrap();
    project.options.adapter_weight_config = None;
    let error = project.run().unwrap_err();
    assert!(error.contains("lora_weight_sharing") && error.contains("no adapters"), "{error}");
}

// Broken if an adapter that cannot be right becomes a file, or the message does not say which file and what is wrong.
#[test]
fn what_cannot_be_right_is_refused_before_anything_is_written() {
    type Change = fn(&Project);
    let yaml = |project: &Project, from: &str, to: &str| {
        project.write("lora_output_files.yaml", SHARED.replacen(from, to, 1));
    };
    fn two(project: &Project, change: fn(&mut Values)) {
        let mut values = values(2, 2, &MLP);
        change(&mut values);
        project.weights("two.safetensors", &values, &[]);
    }
    fn one(project: &Project, from: &str, to: &str) {
        let text = std::fs::read_to_string(project.dir.path().join("one.encodings")).unwrap();
        assert!(text.contains(from), "{text}");
        project.write("one.encodings", text.replacen(from, to, 1));
    }
    let in_yaml: [(&str, &str, &str); 8] = [
        (
            "name: one",
            "name: default_adapter",
            "lora_output_files.yaml: use case \"default_adapter\": the name is that",
        ),
        ("name: two", "name: one", "use case \"one\": the name is there twice"),
        ("name: one", "name: a/b", "use case \"a/b\": the name becomes part of a file name"),
        ("graph: model", "graph: other", "is for graph \"other\", the DLC has \"model\""),
        ("    weights: one", "    wights: one", "wights"),
        ("Yes", "perhaps", "share_adapters_between_graphs: perhaps"),
        ("one.safetensors", "no.safetensors", "no.safetensors: cannot be read"),
        ("two.safetensors}", "two.safetensors, weights_only: true}", "weights_only is not supported"),
    ];
    let in_files: [(Change, &str); 12] = [
        (
            |p| two(p, |v| v[0].0.push('x')),
            "two.safetensors: tensor base_model.model.model.layers.0.mlp.down_proj.lora_A.weightx is not",
        ),
        (|p| two(p, |v| _ = v.pop()), "has a value, its partner"),
        (|p| two(p, |v| *v = values(2, 9, &MLP)), "rank 9, the graph has room for 8"),
        (|p| two(p, |v| *v = values(2, 2, &[("mlp.down_proj", 32, 48)])), "extents [2, 48], need [8, 64]"),
        (|p| two(p, |v| v[1].2[5] = f32::INFINITY), "lora_B.weight: inf in row 2, need finite values"),
        (|p| p.write("two.safetensors", b"\x02\0\0\0\0\0\0\0{}"), "two.safetensors: no tensors"),
        (|p| p.write("two.safetensors", "rubbish"), "two.safetensors: 7 bytes, too short"),
        (
            |p| p.write("one.encodings", r#"{"version": "0.6.1"}"#),
            "one.encodings: encodings: neither param_encodings nor encodings",
        ),
        (|p| p.write("one.encodings", WIDE), "integers of 16 bits, need SFIXED_POINT_8"),
        (|p| one(p, "-128", "-100"), "need symmetric encodings"),
        (|p| one(p, "layers.0", "layers.9"), "is not an updatable tensor"),
        (|p| p.weights("two.safetensors", &values(2, 2, &MLP), &[("slots", "3")]), "metadata slots is \"3\""),
    ];
    let check = |project: Project, want: &str| {
        let error = project.run().expect_err(want);
        assert!(error.contains(want), "{error}\nneed {want}");
        assert!(!project.options.output_dir.exists(), "{want}: something was written");
    };
    for (from, to, want) in in_yaml {
        let (project, ..) = project("Yes", DataType::SFixedPoint8, 1);
        yaml(&project, from, to);
        check(project, want);
    }
    for (change, want) in in_files {
        let (project, ..) = project("Yes", DataType::SFixedPoint8, 1);
        change(&project);
        check(project, want);
    }
    let plain = Project::new(None, 1);
    plain.write("lora_output_files.yaml", "use_case: []");
    check(plain, "the DLC has no updatable tensors: convert it with --lora_weight_list");
}

// Broken if the command line cannot do what the library can, or its tools do not know a section.
#[test]
fn tools_make_and_show_sections() {
    let (project, ..) = project("Yes", DataType::SFixedPoint8, 2);
    let path = |name: &str| project.dir.path().join(name);
    let made = Command::new(env!("CARGO_BIN_EXE_qnn-context-binary-generator"))
        .args(["--ar", "8,1", "--cl", "32", "--num_splits", "2", "--binary_file", "tiny", "--output_dir"])
        .arg(project.out(""))
        .arg("--dlc_path")
        .arg(path("model.dlc"))
        .arg("--adapter_weight_config")
        .arg(path("lora_output_files.yaml"))
        .output()
        .unwrap();
    let text = String::from_utf8(made.stdout).unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    assert!(text.contains("tiny_1_of_2_one.bin") && text.contains("weights and scales alone"), "{text}");
    let section = project.out("tiny_2_of_2_two.bin");
    let shown = Command::new(env!("CARGO_BIN_EXE_qnn-context-binary-utility"))
        .arg("--context_binary")
        .arg(&section)
        .output()
        .unwrap();
    let json: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    let want = FileInfo::read(std::fs::read(&section).unwrap().into(), Verify::Checksums).unwrap();
    assert_eq!(json, serde_json::to_value(want).unwrap());
    assert_eq!((&json["name"], &json["rank"], &json["targets"]), (&"two".into(), &2.into(), &1.into()));
}
