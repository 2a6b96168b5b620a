//! The command line of `qairt-converter`: what it says when something is wrong.

use std::path::Path;
use std::process::{Command, Output};

use qnn_core::offline::generate::copy_sidecars;

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } =
        Command::new(env!("CARGO_BIN_EXE_qairt-converter")).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

/// Guards: the flags are spelled as QAIRT spells them, and help shows each.
#[test]
fn help_shows_the_flags() {
    let (code, out, _) = run(&["--help"]);
    assert_eq!(code, Some(0));
    for flag in [
        "--input_network",
        "--output_path",
        "--weights_bitwidth",
        "--act_bitwidth",
        "--kv_bitwidth",
        "--block_size",
        "--use_per_channel_quantization",
        "--lora_weight_list",
        "--lora_adapter",
        "--lora_max_rank",
        "--lora_weights_bitwidth",
        "--quant_updatable_mode",
        "--dry_run",
        "--list_architectures",
    ] {
        assert!(out.contains(flag), "{flag} is not in {out}");
    }
}

/// Guards: wrong input ends in a failing exit code and one message that names the file or flag; nothing is written.
#[test]
fn wrong_input_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (broken, onnx, output) = (place("broken.gguf"), place("model.onnx"), place("out/model.dlc"));
    std::fs::write(&broken, b"GGUF\x03\0\0\0").unwrap();
    std::fs::write(&onnx, b"").unwrap();
    let check = |arguments: &[&str], code: i32, words: &[&str]| {
        let (have, _, err) = run(&[arguments, &["-o", &output]].concat());
        assert_eq!(have, Some(code), "{err}");
        for word in words {
            assert!(err.contains(word), "{err} does not say {word}");
        }
        assert!(!folder.path().join("out").exists());
    };
    check(&["-i", &broken], 1, &["broken.gguf", "at byte 8", "number of tensors"]);
    check(&["-i", &onnx], 1, &["model.onnx", "not supported", ".gguf"]);
    check(&["-i", &place("nowhere")], 1, &["nowhere"]);
    check(&["-i", &broken, "--block_size", "32"], 1, &["--block_size", "--weights_bitwidth"]);
    check(&["-i", &broken, "--lora_max_rank", "8"], 1, &["--lora_max_rank", "--lora_adapter"]);
    check(&["-i", &broken, "--quant_updatable_mode", "all"], 1, &["--quant_updatable_mode", "--lora_adapter"]);
    check(&["-i", &broken, "--lora_adapter", &place("adapter")], 1, &["adapter"]);
    check(
        &["-i", &broken, "--lora_weight_list", &broken, "--lora_max_rank", "8"],
        1,
        &["does not begin with base_model"],
    );
    check(&["-i", &broken, "--quant_updatable_mode", "some"], 2, &["none, adapter_only, all"]);
    check(&["-i", &broken, "--weights_bitwidth", "5"], 2, &["--weights_bitwidth", "4, 8, 16, 32"]);
    let missing = place("no.encodings");
    check(&["-i", &broken, "--quantization_overrides", &missing], 1, &["no.encodings"]);
    check(&["-i", &broken, "--dry_run"], 1, &["broken.gguf", "at byte 8", "number of tensors"]);
    check(&["--dry_run"], 2, &["--input_network"]);
    let both = ["-i", &broken, "--dry_run", "--quantization_overrides", &missing];
    check(&both, 2, &["--dry_run", "cannot be used with", "--quantization_overrides"]);
}

/// Guards: a DLC in the folder of its model leaves the model's files as they are and replaces none of them, and what is made of
/// the DLC elsewhere still has the chat template.
#[test]
fn a_model_survives_a_dlc_in_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/families/phi3");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(name), model.join(name)).unwrap();
    }
    std::fs::write(model.join("tokenizer.json"), "{ }").unwrap();
    std::fs::write(model.join("tokenizer_config.json"), r#"{"z": 1, "a": 2}"#).unwrap();
    std::fs::write(model.join("chat_template.jinja"), "{{ messages }}").unwrap();
    let names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
    let read = |name: &str| std::fs::read(model.join(name)).unwrap();
    let before = names.map(read);

    let convert = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qairt-converter"));
        let Output { status, stderr, .. } = command.current_dir(&model).args(arguments).output().unwrap();
        assert!(names.map(read) == before, "{arguments:?} changed the model");
        (status.code(), String::from_utf8(stderr).unwrap())
    };
    for arguments in [&["-i", "."][..], &["-i", "../model", "-o", "./model.dlc"]] {
        let (code, error) = convert(arguments);
        assert_eq!(code, Some(0), "{error}");
        assert!(model.join("model.dlc").is_file());
    }
    for name in names {
        let (code, error) = convert(&["-i", ".", "-o", &format!("../model/{name}")]);
        assert_eq!(code, Some(1), "{error}");
        assert!(error.contains(name) && error.contains("the output is a file that the model is read from"), "{error}");
    }

    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    copy_sidecars(&model.join("model.dlc"), &out).unwrap();
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("tokenizer_config.json")).unwrap()).unwrap();
    assert_eq!(config, serde_json::json!({ "z": 1, "a": 2, "chat_template": "{{ messages }}" }));
    copy_sidecars(&model.join("model.dlc"), &model).unwrap();
    assert!(names.map(read) == before);
}

/// Guards: an output that cannot be is refused before the weights are converted, a name that the tokenizer's files would take
/// from the DLC at once included; nothing is written.
#[test]
fn impossible_outputs_are_refused_first() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(place("file"), "x").unwrap();
    let input = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/families/phi3");
    for (output, want) in [
        ("tokenizer.json", "the name of a file that is written beside a DLC"),
        ("none/generation_config.json", "the name of a file that is written beside a DLC"),
        ("file/none/model.dlc", "no new file in "),
        (".", "is a folder; name the file"),
    ] {
        let (code, _, error) = run(&["-i", input, "-o", &place(output)]);
        assert_eq!(code, Some(1), "{error}");
        assert!(error.contains(output) && error.contains(want), "{error}");
        assert!(!error.contains("converting"), "{error}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

/// Guards: a closed or full standard output ends in no panic, and costs no file.
#[test]
fn standard_output_may_fail() {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (
        concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/families/phi3"),
        folder.path().join("model.dlc").to_str().unwrap().to_owned(),
    );
    for arguments in [&["--list_architectures"][..], &["-i", input, "--dry_run"], &["-i", input, "-o", &output]] {
        crate::support::check_stdout(|| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_qairt-converter"));
            command.args(arguments);
            command
        });
    }
    assert!(Path::new(&output).is_file());
}

/// Guards: a dry run says on standard output what there is to know, and writes nothing; families are listed by name.
#[test]
fn dry_run_and_list() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out/model.dlc");
    let input = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/families/phi3");
    let adapter = format!("{input}/adapter");
    let arguments = ["-i", input, "-o", output.to_str().unwrap(), "--dry_run", "--lora_adapter", &adapter];
    let (code, out, err) = run(&arguments);
    assert_eq!(code, Some(0), "{err}");
    for words in
        ["phi3 (2 layers)", "x F16 ", "expected size", "KV cache at 64 positions", "self_attn.q_proj", "14 layers"]
    {
        assert!(out.contains(words), "{words} is not in {out}");
    }
    assert!(!folder.path().join("out").exists());
    let (code, out, err) = run(&["--list_architectures"]);
    assert_eq!(code, Some(0), "{err}");
    for name in ["llama", "qwen3", "gemma3_text", "phi3", "smollm3"] {
        assert!(out.contains(name), "{name} is not in {out}");
    }
}
