//! `qairt-lora-importer` as a function: adapters in, weights and encodings as the graph takes them out.

use std::collections::{BTreeSet, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{
    AttachPoint, Folded, Group, LoraError, ParamEncodings, PeftAdapter, Slot, WeightEncoding, attach_points, fold,
    load_peft, on_base,
    peft::{CONFIG, WEIGHTS},
    values, yaml,
};
use crate::{
    atomic_file,
    error::Error,
    graph::Graph,
    offline::{
        dlc,
        equalize::{SCALES_KEY, fingerprint},
        generate::is_computed,
        safetensors::read_text,
    },
    types::DataType,
};

/// What to import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportOptions {
    /// The YAML with the use cases. Its paths are relative to its folder.
    pub lora_config: PathBuf,
    /// The converted base, with branches.
    pub input_dlc: PathBuf,
    /// Folder of the output; made if it is not there.
    pub output_dir: PathBuf,
}

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct ImportReport {
    /// The use cases, in the order of the YAML.
    pub use_cases: Vec<UseCaseReport>,
    /// The groups, with the files their encodings are read from.
    pub groups: Vec<Group>,
    /// `lora_output_files.yaml`: what the context binary generator takes as `--adapter_weight_config`.
    pub list: PathBuf,
}

/// One use case.
#[derive(Debug, Clone, PartialEq)]
pub struct UseCaseReport {
    /// Its name.
    pub name: String,
    /// Its adapters.
    pub slots: Vec<Slot>,
    /// Modules with values.
    pub targets: usize,
    /// Modules of the graph that have a branch.
    pub branches: usize,
    /// Columns of all slots.
    pub rank: usize,
    /// Columns that the graph has.
    pub max_rank: usize,
    /// Element type in the graph.
    pub data_type: DataType,
    /// Its weights, float32.
    pub weights: PathBuf,
    /// Its encodings.
    pub encodings: PathBuf,
    /// What is odd about it and has no effect on the result.
    pub warnings: Vec<String>,
}

/// Imports every use case of the YAML. Nothing is written unless all of them fit the model.
///
/// # Errors
/// [`Error::Io`]; [`Error::Dlc`]; [`Error::Lora`] naming the file and the key or tensor that does not fit.
pub fn import(options: &ImportOptions) -> Result<ImportReport, Error> {
    let config_path = &options.lora_config;
    let text = read_text(config_path, MAX_YAML_BYTES)?;
    let config = yaml::read(&String::from_utf8_lossy(&text)).map_err(Error::lora(config_path))?;
    let base = options.base();
    let graph = dlc::read_dlc(&options.input_dlc)?;
    let points = attach_points(&graph);
    if points.iter().all(|point| point.branch.is_none()) {
        let why = LoraError::NoBranches { graph: graph.name().to_owned() };
        return Err(Error::lora(&options.input_dlc)(why));
    }
    let mut prepared = Vec::new();
    for case in &config.use_case {
        prepared.push(prepare(case, base, &graph, &points)?);
    }
    check_outputs(&config, options)?;
    let mut use_cases = Vec::new();
    for (case, prepared) in config.use_case.iter().zip(prepared) {
        use_cases.push(prepared.write(&options.folder_of(case))?);
    }
    std::fs::create_dir_all(&options.output_dir).map_err(Error::io(&options.output_dir))?;
    let list = options.output_dir.join(LIST_FILE);
    let with_file = |group: Group| {
        let folder = if group.encodings.is_some() { base } else { &options.output_dir };
        Group { encodings: Some(group.file(folder)), ..group }
    };
    let groups: Vec<Group> = config.group.into_iter().map(with_file).collect();
    let text = list_of(&use_cases, &groups, &options.output_dir).map_err(Error::io(&list))?;
    atomic_file::write(&list, |file| file.write_all(text.as_bytes())).map_err(Error::io(&list))?;
    Ok(ImportReport { use_cases, groups, list })
}

impl ImportOptions {
    /// Where the paths in the YAML begin.
    fn base(&self) -> &Path {
        self.lora_config.parent().unwrap_or(Path::new("."))
    }

    /// Where the files of a use case go.
    fn folder_of(&self, case: &yaml::UseCase) -> PathBuf {
        case.output_path.as_ref().map_or(self.output_dir.clone(), |path| self.base().join(path))
    }
}

/// Refuses to write over what is read: an adapter would be lost, and the next import would fold its scaling in once more.
fn check_outputs(config: &yaml::LoraConfig, options: &ImportOptions) -> Result<(), Error> {
    let mut inputs = vec![options.lora_config.clone(), options.input_dlc.clone()];
    let mut outputs = vec![options.output_dir.join(LIST_FILE)];
    for case in &config.use_case {
        for path in case.lora_weights.0.iter().map(|path| options.base().join(path)) {
            inputs.extend([path.join(WEIGHTS), path.join(CONFIG), path]);
        }
        inputs.extend(case.quant_overrides.iter().map(|path| options.base().join(path)));
        outputs.extend(output_files(&options.folder_of(case), &case.name));
    }
    inputs.extend(config.group.iter().filter_map(|group| Some(options.base().join(group.encodings.as_ref()?))));
    let inputs: BTreeSet<PathBuf> = inputs.iter().map(|path| atomic_file::place(path)).collect();
    match outputs.into_iter().find(|path| inputs.contains(&atomic_file::place(path))) {
        Some(output) => Err(Error::lora(&output)(LoraError::OutputIsInput)),
        None => Ok(()),
    }
}

/// Weights and encodings of a use case.
fn output_files(folder: &Path, name: &str) -> [PathBuf; 2] {
    ["safetensors", "encodings"].map(|extension| folder.join(format!("{name}.{extension}")))
}

/// A use case that fits.
struct Prepared {
    folded: Folded,
    origin: Origin,
    encodings: ParamEncodings,
    branches: usize,
    max_rank: usize,
    data_type: DataType,
    warnings: Vec<String>,
}

/// What the values and encodings of an adapter were made for and with.
#[derive(Default)]
pub(super) struct Origin {
    /// Fingerprint of the channel scales of the base.
    pub(super) base_scales: Option<String>,
    /// The file that has scales of the weights, as the YAML names it.
    pub(super) quant_overrides: Option<String>,
}

fn prepare(case: &yaml::UseCase, base: &Path, graph: &Graph, points: &[AttachPoint]) -> Result<Prepared, Error> {
    let paths: Vec<PathBuf> = case.lora_weights.0.iter().map(|path| base.join(path)).collect();
    let mut adapters = paths.iter().map(|path| load_peft(path)).collect::<Result<Vec<PeftAdapter>, _>>()?;
    for adapter in &mut adapters {
        adapter.split_fused(points).map_err(Error::lora(&adapter.path))?;
    }
    let first = &paths[0];
    let name_of = |adapter: &PeftAdapter| match &adapters[..] {
        [_] => case.name.clone(),
        _ => adapter.path.file_name().map_or_else(|| case.name.clone(), |name| name.to_string_lossy().into_owned()),
    };
    let parts: Vec<(String, &PeftAdapter)> = adapters.iter().map(|adapter| (name_of(adapter), adapter)).collect();
    for adapter in &adapters {
        adapter.fits(points).map_err(Error::lora(&adapter.path))?;
    }
    let folded = fold(&case.name, &parts).map_err(Error::lora(first))?;
    folded.land(graph.name(), points).map_err(Error::lora(first))?;
    let folded = on_base(&folded, Some(graph.metadata())).map_err(Error::lora(first))?.into_owned();
    let branches: Vec<_> = points.iter().filter_map(|point| point.branch).collect();
    let (max_rank, data_type) = branches.first().map_or((0, DataType::Float32), |b| (b.max_rank, b.data_type));
    let mut warnings = warnings(&adapters, points).map_err(Error::lora(first))?;
    let encodings = match &case.quant_overrides {
        None => encodings(&folded, data_type),
        Some(path) => {
            let path = base.join(path);
            if graph.metadata().contains_key(SCALES_KEY) {
                return Err(Error::lora(&path)(LoraError::NotSupported {
                    what: "quant_overrides on a base with equalized channels, which have other ranges".to_owned(),
                    instead: "leave it out; the encodings then follow from the values",
                }));
            }
            let text = read_text(&path, MAX_ENCODINGS_BYTES)?;
            let activations = n_activations(&text, graph);
            if activations > 0 {
                warnings.push(format!(
                    "quant_overrides has encodings of {activations} activations, which are left out: the adapter runs with \
                     the base's unless qairt-quantizer --lora_output_files finds its own"
                ));
            }
            overridden(&text, &folded, data_type, &mut warnings).map_err(Error::lora(&path))?
        }
    };
    let origin = Origin {
        base_scales: fingerprint(graph.metadata()),
        quant_overrides: case.quant_overrides.as_ref().map(|path| path.to_string_lossy().into_owned()),
    };
    Ok(Prepared { folded, origin, encodings, branches: branches.len(), max_rank, data_type, warnings })
}

/// Modules that a config targets, the graph has, and the file has no tensors for: PEFT leaves these at zero.
fn warnings(adapters: &[PeftAdapter], points: &[AttachPoint]) -> Result<Vec<String>, LoraError> {
    let mut warnings = Vec::new();
    for adapter in adapters {
        warnings.extend(adapter.config.warnings.iter().cloned());
        let own: BTreeSet<&String> = adapter.modules.iter().map(|module| &module.name).collect();
        let mut missing = Vec::new();
        for point in points.iter().filter(|point| !own.contains(&point.module)) {
            if adapter.config.selects(&point.module)? {
                missing.push(point.module.as_str());
            }
        }
        if let Some(first) = missing.first() {
            let path = adapter.path.display();
            let n = missing.len();
            warnings.push(format!(
                "{path}: targets {n} modules without weights for them, {first} the first; left as they are"
            ));
        }
    }
    Ok(warnings)
}

/// Encodings by the values themselves.
pub(super) fn encodings(folded: &Folded, data_type: DataType) -> ParamEncodings {
    let halves = folded.modules.iter().flat_map(|module| [module.a(), module.b()]);
    let bits = data_type.bits() as u8;
    let encoding = |half: &values::Matrix<'_>| {
        if data_type.is_float() {
            return WeightEncoding::Float { bits };
        }
        WeightEncoding::Integer { bits, scales: values::row_scales(half, data_type) }
    };
    ParamEncodings(halves.map(|half| (half.name.clone(), encoding(&half))).collect())
}

/// Encodings by an AIMET file for the adapter as it was trained: scales of B get the factor that is folded into B.
/// Weights that the file does not name get encodings by their values.
fn overridden(
    text: &[u8],
    folded: &Folded,
    data_type: DataType,
    warnings: &mut Vec<String>,
) -> Result<ParamEncodings, LoraError> {
    let [slot] = &folded.slots[..] else {
        return Err(LoraError::NotSupported {
            what: format!("quant_overrides on {}, which has {} adapters", folded.name, folded.slots.len()),
            instead: "leave it out; the encodings then follow from the values",
        });
    };
    let mut encodings = encodings(folded, data_type);
    let names: HashMap<String, usize> =
        encodings.0.iter().enumerate().map(|(i, (name, _))| (name.clone(), i)).collect();
    let read = ParamEncodings::from_json(text, &|name| names.contains_key(name))?;
    if read.0.len() < names.len() {
        let (have, all) = (read.0.len(), names.len());
        warnings.push(format!("quant_overrides has {have} of {all} weights; the others follow from their values"));
    }
    for (name, encoding) in read.0 {
        let (module, is_b) = (&folded.modules[names[&name] / 2], names[&name] % 2 == 1);
        if encoding.data_type() != Some(data_type) {
            let have = encoding.data_type().map_or_else(|| "another width".to_owned(), |own| own.to_string());
            return Err(LoraError::Tensor { tensor: name, have, want: format!("{data_type}, as the graph has it") });
        }
        let WeightEncoding::Integer { bits, scales } = encoding else { continue };
        let rows = if is_b { module.n } else { module.rank };
        let factor =
            if is_b { slot.scaling.modules.get(&module.module).unwrap_or(&slot.scaling.default).abs() } else { 1.0 };
        let scales = match scales.len() {
            1 => vec![scales[0]; rows],
            len if len == rows => scales,
            len => {
                return Err(LoraError::Tensor { tensor: name, have: format!("{len} scales"), want: rows.to_string() });
            }
        };
        let scales = scales.iter().map(|scale| (f64::from(*scale) * factor) as f32).collect();
        encodings.0[names[&name]].1 = WeightEncoding::Integer { bits, scales };
    }
    Ok(encodings)
}

/// Computed tensors of the graph that an AIMET file has encodings for.
fn n_activations(text: &[u8], graph: &Graph) -> usize {
    let file: Value = serde_json::from_slice(text).unwrap_or_default();
    let lists = ["activation_encodings", "encodings"].map(|key| &file[key]);
    let names = lists.into_iter().flat_map(|list| -> Vec<&str> {
        match list {
            Value::Array(entries) => entries.iter().filter_map(|entry| entry["name"].as_str()).collect(),
            Value::Object(entries) => entries.keys().map(String::as_str).collect(),
            _ => Vec::new(),
        }
    });
    names.filter(|name| is_computed(graph, name)).count()
}

impl Prepared {
    fn write(self, folder: &Path) -> Result<UseCaseReport, Error> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let folded = &self.folded;
        let [weights, encodings] = output_files(folder, &folded.name);
        let bytes = safetensors_of(folded, &self.origin).map_err(Error::lora(&weights))?;
        atomic_file::write(&weights, |file| file.write_all(&bytes)).map_err(Error::io(&weights))?;
        let json = format!("{}\n", self.encodings.to_json());
        atomic_file::write(&encodings, |file| file.write_all(json.as_bytes())).map_err(Error::io(&encodings))?;
        Ok(UseCaseReport {
            name: folded.name.clone(),
            targets: folded.modules.len(),
            rank: folded.rank,
            slots: self.folded.slots,
            branches: self.branches,
            max_rank: self.max_rank,
            data_type: self.data_type,
            weights,
            encodings,
            warnings: self.warnings,
        })
    }
}

/// The values as a safetensors file: float32, named as in the graph, with what they are in the metadata. The same values
/// always give the same bytes.
pub(super) fn safetensors_of(folded: &Folded, origin: &Origin) -> Result<Vec<u8>, LoraError> {
    let mut header = serde_json::Map::new();
    let slots = serde_json::to_string(&folded.slots).map_err(LoraError::Json)?;
    let mut metadata = json!({
        "format": FORMAT, "version": VERSION, "use_case": folded.name, "rank": folded.rank.to_string(), "slots": slots,
    });
    for (key, value) in [(SCALES_KEY, &origin.base_scales), (OVERRIDES_KEY, &origin.quant_overrides)] {
        if let Some(value) = value {
            metadata[key] = value.as_str().into();
        }
    }
    header.insert("__metadata__".to_owned(), metadata);
    let mut data: Vec<u8> = Vec::new();
    for half in folded.modules.iter().flat_map(|module| [module.a(), module.b()]) {
        let begin = data.len();
        data.extend(half.values.iter().flat_map(|value| value.to_le_bytes()));
        let entry = json!({"dtype": "F32", "shape": [half.n, half.k], "data_offsets": [begin, data.len()]});
        header.insert(half.name, entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok([&(header.len() as u64).to_le_bytes()[..], &header, &data].concat())
}

/// `lora_output_files.yaml`. JSON strings are YAML strings.
fn list_of(use_cases: &[UseCaseReport], groups: &[Group], folder: &Path) -> std::io::Result<String> {
    let root = folder.canonicalize()?;
    let path = |path: &Path| -> std::io::Result<Value> {
        // A group's file need not be there yet.
        let full = match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) if !path.exists() => parent.canonicalize()?.join(name),
            _ => path.canonicalize()?,
        };
        Ok(Value::from(full.strip_prefix(&root).unwrap_or(&full).to_string_lossy()))
    };
    let mut text = String::from("use_case:\n");
    for case in use_cases {
        text += &format!("  - name: {}\n", Value::from(case.name.as_str()));
        text += &format!("    weights: {}\n", path(&case.weights)?);
        text += &format!("    encodings: {}\n", path(&case.encodings)?);
    }
    for (i, group) in groups.iter().enumerate() {
        text += if i == 0 { "group:\n" } else { "" };
        text += &format!("  - name: {}\n", Value::from(group.name.as_str()));
        text += &format!("    members: {}\n", Value::from(group.members.clone()));
        if let Some(encodings) = &group.encodings {
            text += &format!("    encodings: {}\n", path(encodings)?);
        }
    }
    text += "share_adapters_between_graphs: Yes\n";
    Ok(text)
}

/// Name of the list of outputs.
pub const LIST_FILE: &str = "lora_output_files.yaml";
/// Value of "format" in the metadata of a weights file.
pub const FORMAT: &str = "genie-lora";
/// Value of "version" in the metadata of a weights file.
pub const VERSION: &str = "1";
/// Key of the encodings file in the metadata of a weights file, if there was one.
pub(super) const OVERRIDES_KEY: &str = "quant_overrides";
/// Longest YAML that is read.
const MAX_YAML_BYTES: u64 = 4 << 20;
/// Longest encodings file that is read.
const MAX_ENCODINGS_BYTES: u64 = 256 << 20;
