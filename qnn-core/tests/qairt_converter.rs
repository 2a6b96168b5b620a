//! The command line of `qairt-converter`: what it says when something is wrong.

use std::process::{Command, Output};

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
