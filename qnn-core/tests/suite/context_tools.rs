//! The two context binary tools as a user meets them: results, refusals, exit codes.

use std::path::Path;
use std::process::{Command, Output};

use crate::support::{FORMS, Tiny, check_stdout, tiny};
use qnn_core::{Context, OpenOptions, offline::dlc::write_dlc};

fn generator(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qnn-context-binary-generator")).args(args).output().expect("the tool starts")
}

fn utility(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qnn-context-binary-utility")).args(args).output().expect("the tool starts")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("tools print UTF-8")
}

fn path<'a>(dir: &'a Path, name: &str) -> &'a str {
    Box::leak(dir.join(name).into_boxed_path()).to_str().expect("temporary paths are UTF-8")
}

fn dlc(dir: &Path) -> &str {
    let path = path(dir, "tiny.dlc");
    write_dlc(Path::new(path), &tiny("model", Tiny { forms: &FORMS, ..Tiny::default() })).expect("it can be stored");
    path
}

// Broken if the documented command line does not make the documented files, or says nothing about them.
#[test]
fn generator_then_utility() {
    let dir = tempfile::tempdir().unwrap();
    let (dlc, out, json) = (dlc(dir.path()), path(dir.path(), "out"), path(dir.path(), "info.json"));
    let made =
        generator(&["--dlc_path", dlc, "--output_dir", out, "--ar", "8,1", "--cl", "32,16", "--num_splits", "2"]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    assert!(text(&made.stdout).contains("token_ar1_cl16_2_of_2"), "{}", text(&made.stdout));
    assert!(text(&made.stderr).contains("100 %"), "no progress: {}", text(&made.stderr));

    let binary = path(dir.path(), "out/tiny_2_of_2.bin");
    let context = Context::open(Path::new(binary), &OpenOptions::default()).unwrap();
    let want = serde_json::to_value(context.info()).unwrap();
    let shown = utility(&["--context_binary", binary, "--verify"]);
    assert!(shown.status.success(), "{}", text(&shown.stderr));
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&shown.stdout).unwrap(), want);
    let stored = utility(&["--context_binary", binary, "--json_file", json]);
    assert!(stored.status.success() && stored.stdout.is_empty());
    assert_eq!(std::fs::read(json).unwrap(), shown.stdout);
}

// Broken if a tool ignores what it was told, or fails without a readable reason on standard error.
#[test]
fn tools_refuse_in_one_readable_line() {
    let dir = tempfile::tempdir().unwrap();
    let (dlc, out) = (dlc(dir.path()), path(dir.path(), "out"));
    let base = ["--dlc_path", dlc, "--output_dir", out];
    let cases: [(&[&str], &str); 8] = [
        (&["--ar", "8", "--adapter_weight_config", "no.yaml"], "no.yaml: cannot be read"),
        (&["--config_file", "x.json"], "x.json"),
        (&["--enable_intermediate_outputs"], "--enable_intermediate_outputs is not supported yet"),
        (&["--backend", "gpu"], "possible values: htp"),
        (&["--ar", "64"], "ar: 64, need 1 to 32 rows"),
        (&["--cl", "0"], "cl: 0, need at least 1 position"),
        (&["--num_splits", "0"], "0 splits of a model with 2 layers that can be told apart, need 1 to 2"),
        (&["--num_splits", "9"], "9 splits of a model with 2 layers that can be told apart, need 1 to 2"),
    ];
    for (args, want) in cases {
        let refused = generator(&[&base, args].concat());
        assert!(!refused.status.success() && refused.stdout.is_empty(), "{args:?}");
        assert!(text(&refused.stderr).contains(want), "{}", text(&refused.stderr));
        assert!(!Path::new(out).exists(), "{args:?} left files");
    }
    let foreign = utility(&["--context_binary", dlc]);
    assert!(!foreign.status.success());
    let message = text(&foreign.stderr);
    assert!(message.contains(dlc) && message.contains("not a genie context binary"), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
}

// Broken if a tool writes over the file that it reads: the model is then gone.
#[test]
fn inputs_are_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let (from, model) = (dlc(dir.path()), path(dir.path(), "model.bin"));
    std::fs::rename(from, model).unwrap();
    let before = std::fs::read(model).unwrap();
    let (out, spelled) = (path(dir.path(), ""), path(dir.path(), "none/../model.bin"));
    let refused = generator(&["--dlc_path", model, "--output_dir", out, "--ar", "8"]);
    assert!(!refused.status.success() && std::fs::read(model).unwrap() == before);
    let message = text(&refused.stderr);
    assert!(message.contains("model.bin: it is the file of the DLC too, need another one"), "{message}");
    for json in [model, spelled] {
        let refused = utility(&["--context_binary", model, "--json_file", json]);
        assert!(!refused.status.success() && std::fs::read(model).unwrap() == before);
        let message = text(&refused.stderr);
        assert!(message.contains("--json_file") && message.contains("of --context_binary too"), "{message}");
    }
}

// Broken if a closed or full standard output ends a tool in a panic, or costs a file.
#[test]
fn standard_output_may_fail() {
    let dir = tempfile::tempdir().unwrap();
    let (dlc, out, binary) = (dlc(dir.path()), path(dir.path(), "out"), path(dir.path(), "out/tiny.bin"));
    check_stdout(|| {
        let _ = std::fs::remove_file(binary);
        let mut command = Command::new(env!("CARGO_BIN_EXE_qnn-context-binary-generator"));
        command.args(["--dlc_path", dlc, "--output_dir", out, "--ar", "8,1"]);
        command
    });
    check_stdout(|| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qnn-context-binary-utility"));
        command.args(["--context_binary", binary]);
        command
    });
}

// Broken if a user has to guess: every option that works is in the help, those that do not are not.
#[test]
fn help_lists_what_works() {
    let help = generator(&["--help"]);
    let options = "dlc_path binary_file output_dir ar cl num_splits adapter_weight_config backend config_file";
    for option in options.split(' ') {
        assert!(text(&help.stdout).contains(&format!("--{option} ")), "{option}");
    }
    assert!(!text(&help.stdout).contains("enable_intermediate_outputs"));
    let help = utility(&["--help"]);
    assert!(["--context_binary", "--json_file", "--verify"].iter().all(|option| text(&help.stdout).contains(option)));
}
