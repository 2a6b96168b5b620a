//! An adapter section as a file: META, LAYOUTS and tensors in panels. Whether it fits a context is checked there.

use std::collections::BTreeMap;
use std::io::{Seek, Write};

use htp_sim::{PackedLayout, WeightFormat};
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, IntoBytes};

use super::{
    Binary, BinaryError, BinaryFault, BinaryWriter, FileKind, Section, SectionKind, Verify, layout::TensorLayout, meta,
};
use crate::{
    map::Bytes,
    record::{EncodingRecord, TensorRecord},
    tensor::Panels,
};

/// What a section updates. (`QnnContext_SectionType_t`)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum SectionType {
    /// An adapter's values, and encodings if it has its own.
    #[default]
    Updatable,
    /// An adapter's values alone: it runs with the encodings of its group.
    UpdatableWeights,
    /// The encodings of a group alone.
    UpdatableQuantParam,
}

impl SectionType {
    fn is_whole(&self) -> bool {
        *self == SectionType::Updatable
    }
}

impl std::fmt::Display for SectionType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            SectionType::Updatable => "UPDATABLE",
            SectionType::UpdatableWeights => "UPDATABLE_WEIGHTS",
            SectionType::UpdatableQuantParam => "UPDATABLE_QUANT_PARAM",
        })
    }
}

/// META of an adapter section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SectionMeta {
    /// What wrote the file.
    pub tool: String,
    /// The adapter's name; of UPDATABLE_QUANT_PARAM the group's.
    pub name: String,
    /// What the section updates.
    #[serde(default, skip_serializing_if = "SectionType::is_whole")]
    pub section_type: SectionType,
    /// The group that the adapter belongs to, of UPDATABLE_WEIGHTS only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The one graph that the section is for; `None` is the whole context.
    pub graph: Option<String>,
    /// Columns of the strength tensor that the adapter uses.
    pub rank: usize,
    /// What the columns belong to.
    pub slots: Vec<SlotRecord>,
    /// Low-rank pairs that have values.
    pub targets: usize,
    /// Where the values come from.
    pub metadata: BTreeMap<String, String>,
    /// Inputs and outputs of each graph that the section is for, with the encodings that they have after an apply. None of
    /// UPDATABLE_WEIGHTS, which changes no encoding.
    pub io: Vec<GraphIo>,
    /// Static encodings of computed tensors that replace those of the graphs, in the order of the names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub encodings: Vec<TensorEncodingRecord>,
}

/// A static encoding of a computed tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEncodingRecord {
    /// The tensor's name, in every graph that has it.
    pub tensor: String,
    /// One scale and offset.
    pub encoding: EncodingRecord,
}

/// Columns of the strength tensor that one of several composed adapters has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotRecord {
    /// The adapter's name.
    pub name: String,
    /// First column, and the one after the last.
    pub columns: [usize; 2],
    /// What was multiplied into the values, if it was the same for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<f32>,
}

/// The tensors that the client of one graph sees.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GraphIo {
    /// The graph's name.
    pub graph: String,
    /// Inputs, outputs, and states whose encodings can be updated.
    pub tensors: Vec<TensorRecord>,
}

/// A checked adapter section.
#[derive(Debug, Clone)]
pub struct SectionFile {
    binary: Binary,
    meta: SectionMeta,
    tensors: Vec<(String, Panels)>,
}

impl SectionFile {
    /// Checks `bytes` as an adapter section, all checksums included. Values are slices of `bytes`: nothing is copied.
    ///
    /// # Errors
    /// [`BinaryFault`]: what is wrong and where.
    pub fn parse(bytes: Bytes) -> Result<SectionFile, BinaryFault> {
        SectionFile::of(Binary::parse_any(bytes, Verify::Checksums)?)
    }

    pub(crate) fn of(binary: Binary) -> Result<SectionFile, BinaryFault> {
        binary.expect_kind(FileKind::AdapterSection)?;
        let first = &binary.sections()[0];
        if first.kind != SectionKind::Meta || !first.name.is_empty() {
            return Err(BinaryError::Missing { section: "META \"\"".to_owned() }.at(first.at_bytes));
        }
        let meta: SectionMeta = meta::from_json(&binary.bytes(0)).map_err(|why| why.at(first.at_bytes))?;
        let tensors = read_tensors(&binary)?;
        check_meta(&meta, &tensors).map_err(|why| why.at(first.at_bytes))?;
        Ok(SectionFile { binary, meta, tensors })
    }

    /// Header and table.
    pub fn binary(&self) -> &Binary {
        &self.binary
    }

    /// What the section says about itself.
    pub fn meta(&self) -> &SectionMeta {
        &self.meta
    }

    /// Names and values, in the order of the names.
    pub fn tensors(&self) -> &[(String, Panels)] {
        &self.tensors
    }

    /// Table entry of tensor number `index`.
    pub(crate) fn section(&self, index: usize) -> &Section {
        &self.binary.sections()[FIRST_TENSOR + index]
    }

    pub(crate) fn into_tensors(self) -> Vec<(String, Panels)> {
        self.tensors
    }
}

/// Writes the parts of an adapter section; `tensors` in the order of their names.
///
/// # Errors
/// [`BinaryError`] if the META is too large or a value has a format that sections do not have; or what the system says.
pub(crate) fn write_section<W: Write + Seek>(
    writer: &mut BinaryWriter<W>,
    meta: &SectionMeta,
    tensors: &[(String, Panels)],
) -> Result<(), BinaryError> {
    writer.add(SectionKind::Meta, "", &meta::to_json(meta)?)?;
    let mut layouts = Vec::with_capacity(tensors.len());
    for (name, panels) in tensors {
        let layout = panels.layout();
        let refuse = |field, have, want: &str| {
            let section = format!("TENSOR {name:?}");
            BinaryError::Entry { section, field, have, want: want.to_owned() }
        };
        let extent = |field, n: usize| u32::try_from(n).map_err(|_| refuse(field, n as u64, "less than 2^32"));
        let number = FORMATS.iter().find(|(_, format)| *format == layout.format()).map(|(number, _)| *number);
        layouts.push(TensorLayout {
            n: extent("n", layout.n())?.into(),
            k: extent("k", layout.k())?.into(),
            format: number.ok_or_else(|| refuse("format", 0, "a float format or one scale per row"))?.into(),
            tight: u32::from(layout.is_tight()).into(),
        });
    }
    if !layouts.is_empty() {
        writer.add(SectionKind::Layouts, "", layouts.as_bytes())?;
    }
    tensors.iter().try_for_each(|(name, panels)| writer.add(SectionKind::Tensor, name, panels.bytes()))
}

fn read_tensors(binary: &Binary) -> Result<Vec<(String, Panels)>, BinaryFault> {
    let sections = binary.sections();
    let Some(second) = sections.get(1) else { return Ok(Vec::new()) };
    if second.kind != SectionKind::Layouts || !second.name.is_empty() {
        return Err(BinaryError::Missing { section: "LAYOUTS \"\"".to_owned() }.at(second.at_bytes));
    }
    let (bytes, n_tensors) = (binary.bytes(1), sections.len() - FIRST_TENSOR);
    let layouts = <[TensorLayout]>::ref_from_bytes(&bytes).ok().filter(|layouts| layouts.len() == n_tensors);
    let layouts = layouts.ok_or_else(|| {
        let want = format!("{}, 16 for each of {n_tensors} tensors", n_tensors * size_of::<TensorLayout>());
        let section = second.label();
        BinaryError::Entry { section, field: "size_bytes", have: second.size_bytes, want }.at(second.at_bytes)
    })?;
    let mut tensors: Vec<(String, Panels)> = Vec::with_capacity(n_tensors);
    for (i, layout) in layouts.iter().enumerate() {
        let section = &sections[FIRST_TENSOR + i];
        if section.kind != SectionKind::Tensor {
            return Err(BinaryError::Unused { section: section.label() }.at(section.at_bytes));
        }
        if let Some((before, _)) = tensors.last().filter(|(before, _)| **before >= *section.name) {
            let (section_name, before) = (section.label(), before.clone());
            return Err(BinaryError::Order { section: section_name, before }.at(second.at_bytes));
        }
        let place = second.at_bytes + (i * size_of::<TensorLayout>()) as u64;
        let panels = panels(section, layout, binary.bytes(FIRST_TENSOR + i)).map_err(|why| why.at(place))?;
        tensors.push((section.name.to_string(), panels));
    }
    Ok(tensors)
}

fn panels(section: &Section, layout: &TensorLayout, bytes: Bytes) -> Result<Panels, BinaryError> {
    let entry = |field, have: u32, want: &str| {
        let section = section.label();
        BinaryError::Entry { section, field, have: u64::from(have), want: want.to_owned() }
    };
    let number = layout.format.get();
    let format = FORMATS.iter().find(|(known, _)| *known == number).map(|(_, format)| *format);
    let format = format.ok_or_else(|| entry("format", number, "1 to 5"))?;
    let new = match layout.tight.get() {
        0 => PackedLayout::new,
        1 => PackedLayout::tight,
        other => return Err(entry("tight", other, "0 or 1")),
    };
    new(layout.n.get() as usize, layout.k.get() as usize, format)
        .and_then(|layout| Panels::new(layout, bytes))
        .map_err(|why| BinaryError::Panels { section: section.label(), why })
}

/// What META says about the tensors has to be true of them; pairs are told apart by the context only.
pub(crate) fn check_meta(meta: &SectionMeta, tensors: &[(String, Panels)]) -> Result<(), BinaryError> {
    let field = |field, have: usize, want: String| Err(BinaryError::Field { field, have: have as u64, want });
    check_type(meta, tensors)?;
    if meta.targets != tensors.len().div_ceil(2) {
        return field("targets", meta.targets, format!("{}, half of the tensors", tensors.len().div_ceil(2)));
    }
    if meta.rank > u32::MAX as usize {
        return field("rank", meta.rank, "less than 2^32".to_owned());
    }
    check_slots(meta)
}

/// Slots, if there are any, share the rank columns out among them: no column is left over or has two strengths.
fn check_slots(meta: &SectionMeta) -> Result<(), BinaryError> {
    let field = |have: usize, want| Err(BinaryError::Field { field: "slots: columns", have: have as u64, want });
    let mut next = 0;
    for slot in &meta.slots {
        let [first, end] = slot.columns;
        if first != next {
            return field(first, format!("{next}, right behind the slot before"));
        }
        if first >= end || end > meta.rank {
            return field(end, format!("more than {first}, at most {} (rank)", meta.rank));
        }
        next = end;
    }
    match meta.slots.is_empty() || next == meta.rank {
        true => Ok(()),
        false => field(next, format!("{} (rank), where the last slot ends", meta.rank)),
    }
}

/// A part of a section has nothing of the other part.
fn check_type(meta: &SectionMeta, tensors: &[(String, Panels)]) -> Result<(), BinaryError> {
    let none = |field, have: usize| match have {
        0 => Ok(()),
        _ => Err(BinaryError::Field { field, have: have as u64, want: format!("0 with {}", meta.section_type) }),
    };
    let n_groups = usize::from(meta.group.is_some());
    match meta.section_type {
        SectionType::Updatable => none("group", n_groups),
        SectionType::UpdatableWeights if n_groups == 0 => {
            let want = format!("1 with {}", meta.section_type);
            Err(BinaryError::Field { field: "group", have: 0, want })
        }
        SectionType::UpdatableWeights => {
            none("encodings", meta.encodings.len())?;
            none("io", meta.io.len())
        }
        SectionType::UpdatableQuantParam => {
            none("group", n_groups)?;
            none("tensors", tensors.len())?;
            none("rank", meta.rank)?;
            none("slots", meta.slots.len())
        }
    }
}

/// Number in LAYOUTS of each format.
const FORMATS: [(u32, WeightFormat); 5] = [
    (1, WeightFormat::F32),
    (2, WeightFormat::F16),
    (3, WeightFormat::Bf16),
    (4, WeightFormat::Int8PerChannel),
    (5, WeightFormat::Int4PerChannel),
];

/// Tensors come after META and LAYOUTS.
const FIRST_TENSOR: usize = 2;
