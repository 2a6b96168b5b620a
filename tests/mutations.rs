//! Every door for files from outside, with files that were changed at random: they are refused or read, and nothing panics.
//!
//! `MUTATIONS=100000` makes it as many per door; a file that breaks something is left in the system's temporary folder.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use genie::tokenizer::{Specials, Tokenizer};
use genie::{DialogConfig, Message};
use genie_workspace::gguf_writer::GgufWriter;
use genie_workspace::tiny_model::{SplitMix64, TinyModel};
use qnn_core::backend::HtpBackend;
use qnn_core::binary::Verify;
use qnn_core::offline::arch::{ActivationBits, Precision, WeightType};
use qnn_core::offline::convert::{ConvertOptions, convert, convert_with_lora};
use qnn_core::offline::dry_run::dry_run;
use qnn_core::offline::encodings::EncodingsFile;
use qnn_core::offline::generate::{GenerateOptions, generate};
use qnn_core::offline::lora::import::{ImportOptions, LIST_FILE as LORA_LIST, import};
use qnn_core::offline::lora::{LoraOptions, UpdatableMode};
use qnn_core::offline::source::Source;
use qnn_core::offline::{dlc, specialize};
use qnn_core::{Backend, Bytes, Context};

/// Something that reads the files of a folder.
struct Door {
    name: &'static str,
    files: Vec<(String, Vec<u8>)>,
    open: fn(&Path),
}

// Broken if some damage to a file could make the program panic instead of saying what is wrong.
#[test]
fn mutated_files_do_not_panic() {
    let rounds = std::env::var("MUTATIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(150);
    let only = std::env::var("DOOR").ok();
    let doors = doors();
    std::panic::set_hook(Box::new(|_| {}));
    for door in doors.iter().filter(|door| only.as_ref().is_none_or(|only| only == door.name)) {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in &door.files {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        (door.open)(folder.path());
        for seed in 0..rounds {
            let mut random = SplitMix64(seed);
            let (name, whole) = &door.files[random.below(door.files.len() as u64) as usize];
            let damaged = mutated(whole, &mut random);
            let path = folder.path().join(name);
            std::fs::write(&path, &damaged).unwrap();
            if catch_unwind(AssertUnwindSafe(|| (door.open)(folder.path()))).is_err() {
                let kept = std::env::temp_dir().join(format!("{}_{seed}_{name}", door.name));
                std::fs::write(&kept, &damaged).unwrap();
                let _ = std::panic::take_hook();
                panic!("{}: {name} changed with seed {seed}, kept as {}", door.name, kept.display());
            }
            std::fs::write(&path, whole).unwrap();
        }
    }
    let _ = std::panic::take_hook();
}

fn doors() -> Vec<Door> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let read = |path: PathBuf| std::fs::read(&path).unwrap_or_else(|why| panic!("{}: {why}", path.display()));
    let file = |folder: &Path, name: &str| (name.to_owned(), read(folder.join(name)));
    let model =
        || TinyModel { hidden: 8, heads: 2, kv_heads: 1, head_dim: 4, ffn: 16, layers: 1, ..TinyModel::llama(1) };
    let mut gguf: GgufWriter = model().gguf(true);
    gguf.string("tokenizer.chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}");
    let (phi3, gptq) = (golden.join("families/phi3"), golden.join("int4/gptq"));
    let tokenizer = golden.join("smollm2");
    let aimet = Path::new(env!("CARGO_MANIFEST_DIR")).join("qnn-core/tests/aimet");
    vec![
        Door { name: "gguf", files: vec![("model.gguf".to_owned(), gguf.finish())], open: open_model },
        Door {
            name: "hf",
            files: vec![file(&phi3, "config.json"), file(&phi3, "model.safetensors")],
            open: open_model,
        },
        Door {
            name: "int4",
            files: vec![file(&gptq, "config.json"), file(&gptq, "model.safetensors")],
            open: open_model,
        },
        Door {
            name: "peft",
            files: vec![
                file(&phi3.join("adapter"), "adapter_config.json"),
                file(&phi3.join("adapter"), "adapter_model.safetensors"),
            ],
            open: open_adapter,
        },
        Door {
            name: "tokenizer",
            files: vec![
                ("tokenizer.json".to_owned(), genie_workspace::tiny_model::tokenizer(300).to_string().into_bytes()),
                file(&tokenizer, "tokenizer_config.json"),
            ],
            open: open_tokenizer,
        },
        Door { name: "dlc", files: vec![("model.dlc".to_owned(), tiny_dlc(&model()))], open: open_dlc },
        Door { name: "context", files: vec![file(&aimet.join("../corpus"), "context_v1.bin")], open: open_context },
        Door {
            name: "encodings",
            files: ["0.6.1", "1.0.0", "2.0.0"].map(|v| file(&aimet, &format!("aimet_{v}.encodings"))).into(),
            open: open_encodings,
        },
        Door { name: "use_cases", files: vec![file(&WITH_LORA, "use_cases.yaml")], open: open_use_cases },
        Door {
            name: "sections",
            files: [LORA_LIST, "a.safetensors", "a.encodings"].map(|name| file(&WITH_LORA.join("made"), name)).into(),
            open: open_lora_list,
        },
        Door {
            name: "dialog",
            files: vec![file(&golden.join("../../configs"), "smollm2-135m-instruct-lora.json")],
            open: open_config,
        },
    ]
}

fn options(input: PathBuf) -> ConvertOptions {
    let precision = Precision { weights: WeightType::Keep, activations: ActivationBits::Sixteen, cache: None };
    ConvertOptions { input, output: "model.dlc".into(), precision, threads: 1 }
}

fn tiny_dlc(model: &TinyModel) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    model.write_hf(&folder.path().join("model")).unwrap();
    let output = folder.path().join("model.dlc");
    convert(&ConvertOptions { output: output.clone(), ..options(folder.path().join("model")) }, &mut |_| {}).unwrap();
    std::fs::read(output).unwrap()
}

/// A folder with a DLC that has room for adapters, two of them, the importer's config about them and what it made of it. Both
/// tools take these files as they are.
static WITH_LORA: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mutations");
    let path = |name: &str| folder.join(name);
    let model = TinyModel::llama(1);
    model.write_hf(&path("model")).unwrap();
    let adapters = ["a", "b"].map(path);
    for (adapter, rank) in adapters.iter().zip([1, 3]) {
        model.write_peft(adapter, rank as u64, rank).unwrap();
    }
    let lora = LoraOptions {
        weight_list: None,
        adapters: adapters.to_vec(),
        max_rank: Some(4),
        bits: None,
        mode: UpdatableMode::AdapterOnly,
    };
    let convert_options = ConvertOptions { output: path("model.dlc"), ..options(path("model")) };
    convert_with_lora(&convert_options, Some(&lora), &mut |_| {}).unwrap();
    let [a, b] = adapters.map(|adapter| adapter.display().to_string());
    let config = format!(
        "use_case:\n- name: a\n  lora_weights: {a}\n- name: both\n  lora_weights: [{a}, {b}]\n  output_path: 1\n"
    );
    std::fs::write(path("use_cases.yaml"), &config).unwrap();
    import(&use_cases_of(&folder, &folder)).unwrap();
    generate(&sections_of(&path("made"), &folder), &mut |_| {}).unwrap();
    // Only now: the generator would refuse the group, whose adapters have no activation encodings.
    std::fs::write(path("use_cases.yaml"), config + "group:\n- name: g\n  members: [a, both]\n").unwrap();
    import(&ImportOptions { output_dir: path("grouped"), ..use_cases_of(&folder, &folder) }).unwrap();
    folder
});

/// To import what `use_cases.yaml` in `folder` says, for the DLC in `with_dlc`.
fn use_cases_of(folder: &Path, with_dlc: &Path) -> ImportOptions {
    ImportOptions {
        lora_config: folder.join("use_cases.yaml"),
        input_dlc: with_dlc.join("model.dlc"),
        output_dir: folder.join("made"),
    }
}

/// To make sections of the list in `folder`, for the DLC in `with_dlc`.
fn sections_of(folder: &Path, with_dlc: &Path) -> GenerateOptions {
    GenerateOptions {
        dlc_path: with_dlc.join("model.dlc"),
        output_dir: folder.join("sections"),
        binary_file: "model".to_owned(),
        ar: vec![1],
        cl: vec![8],
        num_splits: 1,
        adapter_weight_config: Some(folder.join(LORA_LIST)),
        lora_weight_sharing: false,
    }
}

fn open_use_cases(folder: &Path) {
    let _ = import(&use_cases_of(folder, &WITH_LORA));
}

fn open_lora_list(folder: &Path) {
    let _ = generate(&sections_of(folder, &WITH_LORA), &mut |_| {});
}

fn open_model(folder: &Path) {
    let gguf = folder.join("model.gguf");
    let input = if gguf.is_file() { gguf } else { folder.to_owned() };
    let Ok(source) = Source::open(&input) else { return };
    for (name, bytes) in &source.sidecars {
        if *name == "tokenizer.json" {
            let _ = Tokenizer::from_bytes(bytes, name).map(|tokenizer| tokenizer.encode("a b\n12é", AS_TEXT));
        }
    }
    let _ = dry_run(&options(input), None);
}

fn open_adapter(folder: &Path) {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/families/phi3");
    let lora = LoraOptions {
        weight_list: None,
        adapters: vec![folder.to_owned()],
        max_rank: None,
        bits: None,
        mode: UpdatableMode::AdapterOnly,
    };
    let _ = dry_run(&options(base), Some(&lora));
}

fn open_tokenizer(folder: &Path) {
    let Ok(tokenizer) = Tokenizer::load(folder.join("tokenizer.json")) else { return };
    if let Ok(ids) = tokenizer.encode("a <|im_end|> b\n12é", AS_TEXT) {
        tokenizer.decode(&ids);
    }
    if let Ok(Some(template)) = genie::prompt::ChatTemplate::beside(&folder.join("tokenizer.json")) {
        let _ = template.render(&[Message::new("user", "<|im_end|> hello"), Message::new("x", "")], &tokenizer);
    }
}

fn open_dlc(folder: &Path) {
    let Ok(graph) = dlc::read_dlc(&folder.join("model.dlc")) else { return };
    if let Ok(graph) = specialize(&graph, "test", 4, 8) {
        let _ = HtpBackend::new(1).unwrap().prepare(&graph);
    }
}

fn open_context(folder: &Path) {
    let Ok(bytes) = Bytes::read_file(&folder.join("context_v1.bin")) else { return };
    let Ok(context) = Context::from_binary(bytes, Verify::Headers) else { return };
    for name in context.graphs() {
        let _ = context.graph(name).map(|graph| HtpBackend::new(1).unwrap().prepare(graph));
    }
}

fn open_encodings(folder: &Path) {
    for version in ["0.6.1", "1.0.0", "2.0.0"] {
        let _ = EncodingsFile::open(&folder.join(format!("aimet_{version}.encodings"))).map(|file| file.to_json());
    }
}

fn open_config(folder: &Path) {
    let _ = DialogConfig::from_file(folder.join("smollm2-135m-instruct-lora.json"));
}

/// `whole` with one to four changes.
fn mutated(whole: &[u8], random: &mut SplitMix64) -> Vec<u8> {
    let mut bytes = whole.to_vec();
    for _ in 0..=random.below(4) {
        // Headers and tables stand at the beginning of most files.
        let reach = if random.below(2) == 0 { bytes.len() } else { bytes.len().min(4096) };
        let at = random.below(reach.max(1) as u64) as usize;
        let until = (at + 1 + random.below(64) as usize).min(bytes.len());
        match random.below(7) {
            _ if bytes.is_empty() => {}
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = *pick(b"\0\xff\x7f\"{[-9 ,:}]", random),
            2 => drop(bytes.drain(at..until)),
            3 => {
                let piece = bytes[at..until].to_vec();
                bytes.splice(at..at, piece).for_each(drop);
            }
            4 => {
                let value = (u64::MAX >> random.below(64)).wrapping_add(random.below(3)).to_le_bytes();
                let width = (*pick(&[1, 2, 4, 8], random)).min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&value[..width]);
            }
            _ => {
                // A number in a text becomes another value.
                let Some(begin) = bytes[at..].iter().position(u8::is_ascii_digit).map(|by| at + by) else { continue };
                let end = bytes[begin..].iter().position(|b| !b.is_ascii_digit()).map_or(bytes.len(), |by| begin + by);
                bytes.splice(begin..end, pick(&VALUES, random).bytes()).for_each(drop);
            }
        }
    }
    bytes
}

fn pick<'a, T>(list: &'a [T], random: &mut SplitMix64) -> &'a T {
    &list[random.below(list.len() as u64) as usize]
}

const VALUES: [&str; 14] = [
    "0",
    "1",
    "-1",
    "2",
    "255",
    "65536",
    "4294967295",
    "2147483648",
    "18446744073709551615",
    "1e999",
    "1e-300",
    "null",
    "\"x\"",
    "[]",
];
const AS_TEXT: Specials = Specials::AsText;
