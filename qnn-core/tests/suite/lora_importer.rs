//! The promises of `qairt-lora-importer`: files with the adapter that PEFT means, and errors with their place.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::peft::{config, pair, write};
use crate::support::{Form, Rng, Tiny, chain, tiny};
use qnn_core::{
    Bytes, DataType, Graph,
    offline::{
        dlc::{read_dlc, write_dlc},
        lora::{
            self, LoraPlan, ParamEncodings, UpdatableMode, WeightEncoding, add_branches, attach_points, fold,
            import::{ImportOptions, ImportReport, import},
            load_peft, place_adapters, values,
        },
        safetensors::SafetensorsFile,
    },
};
use safetensors::Dtype;
use serde_json::{Value, json};

const Q: &str = "model.layers.0.self_attn.q_proj";

/// A folder with a converted model (rank 7, q and v of both layers) and adapters `one` (rank 3, q) and `two` (rank 4, q, v).
struct Workplace {
    dir: tempfile::TempDir,
}

impl Workplace {
    fn new(forms: &'static [Form]) -> Workplace {
        let dir = tempfile::tempdir().unwrap();
        let base = tiny("model", Tiny { forms, ..Tiny::default() });
        for (name, rank, targets) in [("one", 3, &["q_proj"][..]), ("two", 4, &["q_proj", "v_proj"])] {
            adapter(dir.path(), name, rank, targets, &base);
        }
        let points = attach_points(&base);
        let modules = points.into_iter().map(|p| p.module).filter(|m| m.contains("q_proj") || m.contains("v_proj"));
        let plan = LoraPlan { targets: modules.collect(), max_rank: 7, bits: None, mode: UpdatableMode::AdapterOnly };
        write_dlc(&dir.path().join("model.dlc"), &add_branches(&base, &plan).unwrap()).unwrap();
        write_dlc(&dir.path().join("base.dlc"), &base).unwrap();
        Workplace { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn import(&self, yaml: &str, dlc: &str) -> Result<ImportReport, String> {
        self.import_to(yaml, dlc, "out")
    }

    fn import_to(&self, yaml: &str, dlc: &str, folder: &str) -> Result<ImportReport, String> {
        std::fs::write(self.path("lora.yaml"), yaml).unwrap();
        let options = ImportOptions {
            lora_config: self.path("lora.yaml"),
            input_dlc: self.path(dlc),
            output_dir: self.path(folder),
        };
        import(&options).map_err(|error| chain(&error))
    }

    /// Checks that the import fails with all of `words`, and writes nothing.
    fn refused(&self, yaml: &str, words: &[&str]) {
        let error = self.import(yaml, "model.dlc").unwrap_err();
        assert!(words.iter().all(|word| error.contains(word)), "{error:?} does not say {words:?}");
        assert!(!self.path("out").exists(), "{yaml}: something was written");
    }
}

fn adapter(parent: &Path, name: &str, rank: usize, targets: &[&str], graph: &Graph) -> PathBuf {
    let mut rng = Rng(rank as u64);
    let points = attach_points(graph);
    let wanted = points.iter().filter(|point| targets.iter().any(|target| point.module.ends_with(target)));
    let tensors: Vec<_> =
        wanted.flat_map(|p| pair(&p.module, [p.n, p.k, rank], Dtype::F32, &mut |_, _| rng.float())).collect();
    write(parent, name, &config(json!({"r": rank, "target_modules": targets})), &tensors)
}

const YAML: &str = "use_case:
  - name: first
    model_name: anything.onnx
    lora_weights: one
  - name: both
    lora_weights: [one, two/adapter_model.safetensors]
    output_path: elsewhere
";

// Broken if the written weights are not the folded ones, or the written encodings not those of the values: what a
// generator makes of both must be, byte for byte, what the library makes of the PEFT directory at run time.
#[test]
fn written_weights_and_encodings_are_the_adapter() {
    let workplace = Workplace::new(&[Form::Int8Channel]);
    let report = workplace.import(YAML, "model.dlc").unwrap();
    let (first, both) = (&report.use_cases[0], &report.use_cases[1]);
    assert_eq!((first.targets, first.branches, first.rank, first.max_rank), (2, 4, 3, 7));
    assert_eq!((both.targets, both.rank, both.data_type), (4, 7, DataType::SFixedPoint8));
    let slots: Vec<_> = both.slots.iter().map(|s| (s.name.as_str(), s.columns, s.scaling.default)).collect();
    assert_eq!(slots, [("one", [0, 3], 2.0), ("two", [3, 7], 1.5)]);
    assert_eq!(both.weights, workplace.path("elsewhere/both.safetensors"));
    let list = std::fs::read_to_string(&report.list).unwrap();
    let elsewhere = both.weights.canonicalize().unwrap();
    for line in [r#"name: "first""#, r#"weights: "first.safetensors""#, "share_adapters_between_graphs: Yes"] {
        assert!(list.contains(line), "{list} has no {line}");
    }
    assert!(list.contains(elsewhere.to_str().unwrap()), "{list}");

    let (one, two) = (load_peft(&workplace.path("one")).unwrap(), load_peft(&workplace.path("two")).unwrap());
    let folded = fold("both", &[("one".to_owned(), &one), ("two".to_owned(), &two)]).unwrap();
    let file = SafetensorsFile::parse(Bytes::read_file(&both.weights).unwrap()).unwrap();
    assert_eq!(file.names().count(), 8);
    let bytes = std::fs::read(&both.weights).unwrap();
    safetensors::SafeTensors::deserialize(&bytes).expect("any reader takes the file");
    workplace.import(YAML, "model.dlc").unwrap();
    assert!(std::fs::read(&both.weights).unwrap() == bytes, "the same adapters give the same file");
    assert_eq!((file.metadata("use_case"), file.metadata("rank")), (Some("both"), Some("7")));
    let slots: Vec<lora::Slot> = serde_json::from_str(file.metadata("slots").unwrap()).unwrap();
    assert_eq!(slots, folded.slots);
    let encodings = ParamEncodings::from_json(&std::fs::read(&both.encodings).unwrap(), &|_| true).unwrap();
    assert_eq!(encodings.0.len(), 8);
    for module in &folded.modules {
        for half in [module.a(), module.b()] {
            let stored = file.tensor(&half.name).unwrap();
            let read: Vec<f32> = stored.bytes.as_chunks::<4>().0.iter().map(|v| f32::from_le_bytes(*v)).collect();
            assert_eq!((stored.dtype, &stored.shape, &read[..]), ("F32", &vec![half.n, half.k], half.values));
            let Some(WeightEncoding::Integer { bits: 8, scales }) = encodings.find(&half.name) else {
                panic!("{} has no 8-bit encoding", half.name)
            };
            let by_file = values::constant(&half, DataType::SFixedPoint8, Some(scales)).unwrap();
            let own = values::pack(&half, DataType::SFixedPoint8).unwrap();
            assert_eq!(**values::panels(&by_file).unwrap().bytes(), **own.bytes());
        }
    }
}

// Broken if a float graph gets integer encodings.
#[test]
fn float_graphs_get_float_encodings() {
    let report = Workplace::new(&[]).import("use_case: [{name: a, lora_weights: one}]", "model.dlc").unwrap();
    // The workplace is gone, the report is not.
    assert_eq!(report.use_cases[0].data_type, DataType::Float32);
    let encodings = ParamEncodings(vec![("w".to_owned(), WeightEncoding::Float { bits: 32 })]);
    let text = encodings.to_json().to_string();
    assert_eq!(ParamEncodings::from_json(text.as_bytes(), &|_| true).unwrap(), encodings);
}

// Broken if adapters that were imported before their base's channels were scaled differ, once scaled, from what an import
// with the scaled base gives; if those that fit already are touched; or if adapters of another base pass.
#[test]
fn imported_adapters_follow_a_base_that_is_scaled_later() {
    let workplace = Workplace::new(&[Form::Int8Channel]);
    let yaml = "use_case: [{name: first, lora_weights: one}]";
    let plain = workplace.import(yaml, "model.dlc").unwrap();
    let mut graph = read_dlc(&workplace.path("model.dlc")).unwrap();
    let factors: String = (0..32).map(|i| if i % 2 == 0 { "3800" } else { "4000" }).collect();
    let order: String = (0..32).rev().map(|i| format!("{i:04x}")).collect();
    let record = json!({
        "lists": [factors], "orders": [order],
        "modules": {Q: {"inputs": 0, "outputs": 0, "input_order": 0, "output_order": 0}},
    });
    graph.set_metadata("channel_scales", record.to_string());
    write_dlc(&workplace.path("scaled.dlc"), &graph).unwrap();
    let want = workplace.import_to(yaml, "scaled.dlc", "want").unwrap();

    let placed = place_adapters(&graph, &plain.list, &workplace.path("placed")).unwrap();
    assert!(placed.are_scaled && placed.list == workplace.path("placed/lora_output_files.yaml"));
    assert!(!workplace.path("placed").exists());
    placed.write().unwrap();
    for name in ["first.safetensors", "first.encodings", "lora_output_files.yaml"] {
        let read = |folder: &str| std::fs::read(workplace.path(folder).join(name)).unwrap();
        assert!(read("placed") == read("want"), "{name} differs from what the importer writes");
        assert!(name.ends_with("yaml") || read("placed") != read("out"), "{name} is as it was");
    }
    let again = place_adapters(&graph, &want.list, &workplace.path("unused")).unwrap();
    assert!(!again.are_scaled && again.list == want.list && !workplace.path("unused").exists());

    let refused = |graph: &Graph, list: &Path, folder: &str, words: &[&str]| {
        let error = chain(&place_adapters(graph, list, &workplace.path(folder)).unwrap_err());
        assert!(words.iter().all(|word| error.contains(word)), "{error:?} does not say {words:?}");
    };
    let unscaled = read_dlc(&workplace.path("model.dlc")).unwrap();
    refused(&unscaled, &want.list, "no", &["first.safetensors", "other channel scales"]);
    refused(&graph, &plain.list, "out", &["over the imported ones", "name another folder"]);
    let scales =
        json!({"version": "2.0.0", "encodings": [{"name": lora::b_name(Q), "output_dtype": "int8", "y_scale": 0.5}]});
    std::fs::write(workplace.path("aimet.encodings"), scales.to_string()).unwrap();
    let own = "use_case: [{name: own, lora_weights: one, quant_overrides: aimet.encodings}]";
    let own = workplace.import_to(own, "model.dlc", "own").unwrap();
    assert!(!place_adapters(&unscaled, &own.list, &workplace.path("no")).unwrap().are_scaled);
    refused(&graph, &own.list, "no", &["own.safetensors", "aimet.encodings", "--equalize_channels false"]);
    refused(&read_dlc(&workplace.path("base.dlc")).unwrap(), &plain.list, "no", &["no adapter branches"]);
    let small = tiny("small", Tiny { layers: 1, ..Tiny::default() });
    let plan = LoraPlan { targets: [Q.to_owned()].into(), max_rank: 7, bits: None, mode: UpdatableMode::AdapterOnly };
    refused(&add_branches(&small, &plan).unwrap(), &plain.list, "no", &["no linear layer model.layers.1"]);
    assert!(!workplace.path("no").exists());
}

// Broken if an AIMET file's scales are ignored, or not scaled as B is. All three versions of the format.
#[test]
fn encodings_of_aimet_are_taken() {
    let workplace = Workplace::new(&[Form::Int8Channel]);
    let (a, b) = (lora::a_name(Q), lora::b_name(Q));
    let import = |encodings: Value| {
        std::fs::write(workplace.path("aimet.encodings"), encodings.to_string()).unwrap();
        let yaml = "use_case: [{name: x, lora_weights: one, quant_overrides: aimet.encodings}]";
        let report = workplace.import(yaml, "model.dlc")?;
        let case = &report.use_cases[0];
        let read = ParamEncodings::from_json(&std::fs::read(&case.encodings).unwrap(), &|_| true).unwrap();
        Ok::<_, String>((read, case.warnings.clone()))
    };
    let own = import(json!({"param_encodings": []})).unwrap().0;
    let files = [
        json!({"version": "1.0.0", "activation_encodings": [], "param_encodings": [
            {"name": a, "dtype": "INT", "enc_type": "PER_CHANNEL", "bw": 8, "is_sym": true, "scale": [0.5, 0.25, 0.125],
             "offset": [-128, -128, -128]},
            {"name": b, "dtype": "INT", "enc_type": "PER_TENSOR", "bw": 8, "is_sym": true, "scale": [0.5], "offset": [-128]},
            {"name": "onnx::MatMul_1", "dtype": "INT", "enc_type": "LPBQ", "bw": 8},
        ]}),
        json!({"version": "0.6.1", "activation_encodings": {}, "param_encodings": {
            a.clone(): [
                {"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "min": -64, "max": 63.5, "scale": 0.5, "offset": -128},
                {"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "min": -32, "max": 31.75, "scale": 0.25, "offset": -128},
                {"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "min": -16, "max": 15.9, "scale": 0.125, "offset": -128},
            ],
            b.clone(): [{"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "scale": 0.5, "offset": -128}],
        }}),
        json!({"version": "2.0.0", "encodings": [
            {"name": a, "output_dtype": "int8", "y_scale": [0.5, 0.25, 0.125], "axis": 0},
            {"name": b, "output_dtype": "int8", "y_scale": 0.5},
        ]}),
    ];
    for file in files {
        let (read, warnings) = import(file.clone()).unwrap();
        let scales = |name: &str| match read.find(name) {
            Some(WeightEncoding::Integer { bits: 8, scales }) => scales.clone(),
            other => panic!("{file}: {name} is {other:?}"),
        };
        assert_eq!(scales(&a), [0.5, 0.25, 0.125], "{file}");
        // B is stored times 6 / 3.
        assert_eq!(scales(&b), [1.0; 32], "{file}");
        let other = lora::a_name("model.layers.1.self_attn.q_proj");
        assert_eq!(read.find(&other), own.find(&other), "{file}: the others follow from their values");
        assert!(warnings[0].contains("2 of 4 weights"), "{warnings:?}");
    }
    // What cannot be taken is said.
    let norm = json!({"name": "model.norm", "dtype": "INT", "enc_type": "PER_TENSOR", "bw": 16, "scale": [0.5], "offset": [0]});
    for key in ["activation_encodings", "encodings"] {
        let version = if key == "encodings" { "2.0.0" } else { "1.0.0" };
        let (_, warnings) = import(json!({"version": version, key: [norm], "param_encodings": []})).unwrap();
        assert!(warnings.iter().any(|warning| warning.contains("of 1 activations")), "{warnings:?}");
    }
    let entry = |key: &str, value: Value| {
        let mut entry =
            json!({"name": a, "dtype": "INT", "enc_type": "PER_TENSOR", "bw": 8, "scale": [0.5], "offset": [0]});
        entry[key] = value;
        import(json!({"param_encodings": [entry]})).unwrap_err()
    };
    for (key, value, words) in [
        ("enc_type", json!("LPBQ"), &["enc_type", "LPBQ"][..]),
        ("offset", json!([-3]), &["not symmetric"]),
        ("scale", json!([0.5, 0.5]), &["2 scales"]),
        ("scale", json!([-1.0]), &["scale"]),
        ("bw", json!(4), &["SFIXED_POINT_8"]),
    ] {
        let error = entry(key, value);
        assert!(words.iter().all(|word| error.contains(word)), "{error:?} does not say {words:?}");
    }
}

// Broken if a typing error in the YAML is taken for something else, or has no place.
#[test]
fn errors_in_the_yaml_have_line_and_column() {
    let workplace = Workplace::new(&[]);
    workplace.refused("use_case:\n  - name: a\n    lora_weight: one\n", &["lora.yaml", "lora_weight", "line 3"]);
    workplace.refused("use_case:\n  - name: a\n    name: b\n    lora_weights: one\n", &["name", "3"]);
    workplace.refused("use_cases: []\n", &["use_cases", "line 1"]);
    workplace.refused("use_case:\n  - name: a\n    lora_weights: {a: 1}\n", &["a path or a list of paths", "line 3"]);
    workplace.refused("use_case:\n  - name: a\n", &["lora_weights"]);
    workplace.refused("use_case: []", &["use_case: an empty list"]);
    workplace.refused("use_case: [{name: a, lora_weights: []}]", &["lora_weights", "a"]);
    workplace.refused("use_case: [{name: ../a, lora_weights: one}]", &["../a", "file name"]);
    workplace.refused("use_case: [{name: default_adapter, lora_weights: one}]", &["default_adapter"]);
    let two = |group: &str| {
        format!("use_case: [{{name: a, lora_weights: one}}, {{name: b, lora_weights: two}}]\ngroup: [{group}]\n")
    };
    workplace.refused(&two("{name: g, members: [a, c]}"), &["lora.yaml", "group \"g\"", "\"c\"", "a, b"]);
    workplace.refused(&two("{name: g, member: [a]}"), &["lora.yaml", "member", "line 2"]);
    let twice = "use_case: [{name: a, lora_weights: one}, {name: a, lora_weights: two}]";
    workplace.refused(twice, &["a twice"]);
}

// Broken if a use case that does not fit is written, or written beside others that do.
#[test]
fn one_use_case_that_does_not_fit_stops_all() {
    let workplace = Workplace::new(&[]);
    let base = tiny("model", Tiny::default());
    adapter(workplace.dir.path(), "large", 8, &["q_proj"], &base);
    adapter(workplace.dir.path(), "else", 2, &["up_proj"], &base);
    let second =
        |weights: &str| format!("use_case: [{{name: a, lora_weights: one}}, {{name: b, lora_weights: {weights}}}]");
    workplace.refused(&second("large"), &["large", "rank 8, the graph takes at most 7"]);
    workplace.refused(&second("[two, two]"), &["two twice"]);
    workplace.refused(&second("[one, large]"), &["rank 11"]);
    workplace.refused(&second("else"), &["else", "none of its 4 tensors"]);
    workplace.refused(&second("nowhere"), &["nowhere"]);
    let error = workplace.import(&second("two"), "base.dlc").unwrap_err();
    assert!(error.contains("base.dlc") && error.contains("--lora_adapter"), "{error}");
}

// Broken if an adapter, its overrides or the YAML can be lost to what is made of them, or what the importer wrote is taken for an
// adapter, whose scaling would count twice.
#[test]
fn inputs_are_not_written_over() {
    let workplace = Workplace::new(&[]);
    let weights = workplace.path("one/adapter_model.safetensors");
    std::fs::copy(&weights, workplace.path("one/mine.safetensors")).unwrap();
    let yaml =
        |name: &str, file: &str| format!("use_case: [{{name: {name}, lora_weights: one/{file}, output_path: one}}]");
    for (name, file) in [("mine", "mine.safetensors"), ("adapter_model", "")] {
        let error = workplace.import_to(&yaml(name, file), "model.dlc", "out").unwrap_err();
        assert!(error.contains(name) && error.contains("need another folder"), "{error}");
    }
    assert!(!workplace.path("out").exists());
    workplace.import_to(&yaml("made", "mine.safetensors"), "model.dlc", "out").unwrap();
    let error = workplace.import(&yaml("again", "made.safetensors"), "model.dlc").unwrap_err();
    assert!(error.contains("made.safetensors") && error.contains("scaling is folded in"), "{error}");
}

// Broken if the tool does not say what it did, or ends well when it did nothing.
#[test]
fn the_tool_reports_each_adapter() {
    let workplace = Workplace::new(&[Form::Int8Channel]);
    std::fs::write(workplace.path("lora.yaml"), YAML).unwrap();
    let run = |yaml: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qairt-lora-importer"));
        command.arg("--lora_config").arg(workplace.path(yaml)).arg("--input_dlc").arg(workplace.path("model.dlc"));
        let output = command.arg("--output_dir").arg(workplace.path("out")).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, out, err) = run("lora.yaml");
    assert_eq!(code, Some(0), "{err}");
    for line in [
        "first:",
        "targets:  2 of 4 layers",
        "rank:     7 of 7, SFIXED_POINT_8",
        "scaling:  2, folded into B",
        "scaling:  1.5 (two, columns 3 to 6), folded into B",
        "lora_output_files.yaml",
    ] {
        assert!(out.contains(line), "{out} has no {line:?}");
    }
    let (code, _, err) = run("nowhere.yaml");
    assert!(code == Some(1) && err.contains("nowhere.yaml"), "{err}");
}
