//! From a constant as a DLC stores it (rows of elements, an encoding) to the kernels' panels: done once, when a context binary
//! or an adapter's section is generated, or when a graph is prepared that was not packed before.

use half::{bf16, f16};
use htp_sim::{BlockOffset, Offsets, PackedLayout, Packer, ShapeError, WeightFormat, packed::PANEL};

use crate::{
    backend::PrepareError,
    encoding::{BlockOffsets, Encoding, Floats},
    map::Bytes,
    tensor::{Panels, Tensor, TensorData},
    types::DataType,
};

/// The weight `tensor` (a constant `[n, k]`) in panels; one that is packed already is shared.
///
/// Encodings keep their values: 4 and 8 bits per tensor and channel, 4, 5, 6 and 8 bits per block, 4 bits per block with steps.
/// f32, f16 and bf16 keep their type.
///
/// # Errors
/// [`PrepareError::Tensor`] if it is no matrix, or its type and encoding have no kernel.
pub fn pack_constant(tensor: &Tensor) -> Result<Panels, PrepareError> {
    pack_as(tensor, PackedLayout::new)
}

/// As [`pack_constant`], for the value of an updatable tensor: with the least padding, so that an adapter of a small rank is
/// a small file.
///
/// # Errors
/// As [`pack_constant`].
pub fn pack_update(tensor: &Tensor) -> Result<Panels, PrepareError> {
    pack_as(tensor, PackedLayout::tight)
}

fn pack_as(tensor: &Tensor, layout: LayoutFn) -> Result<Panels, PrepareError> {
    if let Some(TensorData::Panels(panels)) = &tensor.data {
        return Ok(panels.clone());
    }
    let packing = Packing::with_layout(tensor, layout)?;
    Panels::new(packing.layout(), Bytes::from(packing.pack()?)).map_err(at(&tensor.name))
}

/// [`PackedLayout::new`] or [`PackedLayout::tight`].
type LayoutFn = fn(usize, usize, WeightFormat) -> Result<PackedLayout, ShapeError>;

/// A float constant's values.
///
/// # Errors
/// [`PrepareError::Tensor`] if `tensor` is no flat float constant.
pub(super) fn floats_of(tensor: &Tensor) -> Result<Vec<f32>, PrepareError> {
    match &tensor.data {
        Some(TensorData::Flat(bytes)) if tensor.data_type.is_float() => {
            Ok((0..tensor.shape.max_elements().unwrap_or(0)).map(|i| float(bytes, tensor.data_type, i)).collect())
        }
        _ => {
            let why = format!("{} {}, need a flat float constant", tensor.tensor_type, tensor.data_type);
            Err(PrepareError::Tensor { tensor: tensor.name.clone(), why })
        }
    }
}

/// A constant `[n, k]` and how its panels are filled. Codes, scales and offsets keep their values: the panels stand for
/// the same numbers, except that block scales and minima given as f32 are rounded to f16.
#[derive(Debug)]
pub(crate) struct Packing<'a> {
    layout: PackedLayout,
    name: &'a str,
    data_type: DataType,
    data: &'a [u8],
    codes: Option<Codes<'a>>,
}

/// What an integer format needs besides the elements.
#[derive(Debug)]
struct Codes<'a> {
    /// Added to an element to give the code that is stored.
    shift: i32,
    scales: Scales<'a>,
    offsets: PackOffsets<'a>,
}

#[derive(Debug)]
enum Scales<'a> {
    /// One for the whole tensor.
    One(f32),
    /// One per row or block.
    Each(&'a Floats),
}

#[derive(Debug)]
enum PackOffsets<'a> {
    None,
    /// The same whole number for every block.
    Same(i8),
    /// One i8 per block, and what is added to each to make up for `shift`.
    Whole(&'a [u8], i32),
    Min(&'a Floats),
    /// A step per block, beside a scale per row.
    Steps(&'a [u8]),
}

impl<'a> Packing<'a> {
    /// Chooses the panels for `tensor`.
    ///
    /// # Errors
    /// [`PrepareError::Tensor`] if no format of the kernels can hold it exactly.
    pub(crate) fn of(tensor: &'a Tensor) -> Result<Packing<'a>, PrepareError> {
        Packing::with_layout(tensor, PackedLayout::new)
    }

    fn with_layout(tensor: &'a Tensor, layout: LayoutFn) -> Result<Packing<'a>, PrepareError> {
        let name = tensor.name.as_str();
        let Some(TensorData::Flat(data)) = &tensor.data else {
            return Err(unpackable(name, "is in panels already, or no constant", "row-major elements"));
        };
        let dims = tensor.shape.max_dims();
        let [n, k] = dims[..] else {
            return Err(unpackable(name, &format!("shape {}", tensor.shape), "two dimensions"));
        };
        let (format, codes) = match &tensor.encoding {
            None => (float_format(tensor)?, None),
            Some(encoding) => {
                let (format, codes) = integer_format(tensor, encoding)?;
                (format, Some(codes))
            }
        };
        let layout = layout(n, k, format).map_err(at(name))?;
        Ok(Packing { layout, name, data_type: tensor.data_type, data, codes })
    }

    /// Shape and format of the panels.
    pub(crate) fn layout(&self) -> PackedLayout {
        self.layout
    }

    /// Makes the panels. Beside the result, only one panel is held.
    pub(crate) fn pack(&self) -> Result<Vec<u8>, PrepareError> {
        let mut blob = vec![0; self.layout.size_bytes()];
        let mut packer = Packer::new(self.layout, &mut blob).map_err(at(self.name))?;
        for panel in 0..self.layout.panels() {
            let rows = panel * PANEL..self.layout.n().min((panel + 1) * PANEL);
            match &self.codes {
                None => self.float_panel(&mut packer, panel, rows),
                Some(codes) => self.integer_panel(&mut packer, panel, rows, codes),
            }
            .map_err(at(self.name))?;
        }
        Ok(blob)
    }

    fn float_panel(
        &self,
        packer: &mut Packer<'_>,
        panel: usize,
        rows: std::ops::Range<usize>,
    ) -> Result<(), ShapeError> {
        let elements = rows.start * self.layout.k()..rows.end * self.layout.k();
        let values: Vec<f32> = elements.map(|i| float(self.data, self.data_type, i)).collect();
        packer.float_panel(panel, &values)
    }

    fn integer_panel(
        &self,
        packer: &mut Packer<'_>,
        panel: usize,
        rows: std::ops::Range<usize>,
        codes: &Codes<'_>,
    ) -> Result<(), ShapeError> {
        let k = self.layout.k();
        let stored = self.stored_codes(rows.start * k..rows.end * k, codes.shift);
        let blocks = rows.start * self.layout.blocks()..rows.end * self.layout.blocks();
        let scales: Vec<f32> = blocks.clone().map(|i| codes.scales.at(i)).collect();
        match &codes.offsets {
            PackOffsets::None => packer.quantized_panel(panel, &stored, &scales, Offsets::None),
            PackOffsets::Same(offset) => {
                let offsets = vec![*offset; blocks.len()];
                packer.quantized_panel(panel, &stored, &scales, Offsets::Integer(&offsets))
            }
            PackOffsets::Whole(all, add) => {
                let offset = |byte: &u8| (i32::from(byte.cast_signed()) + add) as i8;
                let offsets: Vec<i8> = all[blocks].iter().map(offset).collect();
                packer.quantized_panel(panel, &stored, &scales, Offsets::Integer(&offsets))
            }
            PackOffsets::Steps(all) => {
                let steps = &all[rows.start * self.layout.steps()..rows.end * self.layout.steps()];
                packer.quantized_panel(panel, &stored, &scales, Offsets::Steps(steps))
            }
            PackOffsets::Min(all) => {
                let minima: Vec<f32> = blocks.map(|i| all.get(i)).collect();
                packer.quantized_panel(panel, &stored, &scales, Offsets::Min(&minima))
            }
        }
    }

    /// The codes of these elements as the panels keep them, some of those of the format if the elements are as narrow as the
    /// encoding says.
    fn stored_codes(&self, elements: std::ops::Range<usize>, shift: i32) -> Vec<i8> {
        // A sum that does not fit is none of the format's codes, of 5 or 6 bits then, and the packer refuses it.
        let shifted = |code: i32| (code + shift).clamp(-128, 127) as i8;
        let nibble = |i: usize| (self.data[i / 2] >> (i % 2 * 4)) & 15;
        match self.data_type {
            DataType::UFixedPoint4 => elements.map(|i| shifted(i32::from(nibble(i)))).collect(),
            DataType::SFixedPoint4 => elements.map(|i| shifted(i32::from((nibble(i) ^ 8).cast_signed()) - 8)).collect(),
            DataType::UFixedPoint8 => self.data[elements].iter().map(|b| shifted(i32::from(*b))).collect(),
            _ => self.data[elements].iter().map(|b| shifted(i32::from(b.cast_signed()))).collect(),
        }
    }
}

impl Scales<'_> {
    fn at(&self, index: usize) -> f32 {
        match self {
            Scales::One(scale) => *scale,
            Scales::Each(scales) => scales.get(index),
        }
    }
}

fn float_format(tensor: &Tensor) -> Result<WeightFormat, PrepareError> {
    match tensor.data_type {
        DataType::Float32 => Ok(WeightFormat::F32),
        DataType::Float16 => Ok(WeightFormat::F16),
        DataType::BFloat16 => Ok(WeightFormat::Bf16),
        other => Err(unpackable(&tensor.name, &format!("{other} without encoding"), "a float type or an encoding")),
    }
}

fn integer_format<'a>(tensor: &'a Tensor, encoding: &'a Encoding) -> Result<(WeightFormat, Codes<'a>), PrepareError> {
    use DataType::{SFixedPoint4, SFixedPoint8, UFixedPoint4, UFixedPoint8};
    let refuse = |have: String, want: &str| Err(unpackable(&tensor.name, &have, want));
    let data_type = tensor.data_type;
    let signed = match data_type {
        SFixedPoint8 | SFixedPoint4 => true,
        UFixedPoint8 | UFixedPoint4 => false,
        other => return refuse(format!("{other}"), "a fixed-point type of 4 or 8 bits"),
    };
    let bits = stored_bits(data_type, encoding).map_err(|(have, want)| unpackable(&tensor.name, &have, want))?;
    // What turns an element into the code that is stored, signed if it has 8 bits, and the offset that an unsigned element has
    // if it is symmetric.
    let half = 1 << (bits - 1);
    let shift = match (signed, bits) {
        (true, 8) => 0,
        (false, 8) => -half,
        (true, _) => half,
        (false, _) => 0,
    };
    let symmetric = if signed { 0 } else { -half };
    let per_channel = if bits == 4 { WeightFormat::Int4PerChannel } else { WeightFormat::Int8PerChannel };
    let none = PackOffsets::None;
    match encoding {
        Encoding::ScaleOffset { scale, offset, .. } if *offset == symmetric => {
            Ok((per_channel, Codes { shift, scales: Scales::One(*scale), offsets: none }))
        }
        Encoding::AxisScaleOffset { axis: 0, scales, offsets, .. }
            if offsets.iter().all(|o| *o == symmetric) && (symmetric == 0 || !offsets.is_empty()) =>
        {
            Ok((per_channel, Codes { shift, scales: Scales::Each(scales), offsets: none }))
        }
        Encoding::AxisScaleOffset { axis, .. } if *axis != 0 => {
            refuse(format!("scales along axis {axis}"), "scales along axis 0")
        }
        Encoding::ScaleOffset { .. } | Encoding::AxisScaleOffset { .. } => {
            refuse(format!("{data_type} with another offset"), &format!("offset {symmetric} (symmetric)"))
        }
        Encoding::Block { block_size, scales, offsets, .. } => {
            let block = *block_size;
            let (offset, offsets) = block_offsets(tensor, shift, symmetric, bits, offsets)?;
            let format = match bits {
                4 => WeightFormat::Int4Block { block, offset },
                5 => WeightFormat::Int5Block { block, offset },
                6 => WeightFormat::Int6Block { block },
                _ => WeightFormat::Int8Block { block },
            };
            Ok((format, Codes { shift, scales: Scales::Each(scales), offsets }))
        }
        Encoding::BlockExpansion { block_size, scales, steps, .. } if data_type == SFixedPoint4 => {
            let format = WeightFormat::Int4Expansion { block: *block_size };
            Ok((format, Codes { shift, scales: Scales::Each(scales), offsets: PackOffsets::Steps(steps) }))
        }
        Encoding::BlockExpansion { .. } => refuse(format!("{data_type} with block steps"), "SFIXED_POINT_4"),
    }
}

/// Bits of the codes that are stored: those of the elements, or fewer where the true width allows it and there is a format.
fn stored_bits(data_type: DataType, encoding: &Encoding) -> Result<usize, (String, &'static str)> {
    let (Encoding::ScaleOffset { bitwidth, .. }
    | Encoding::AxisScaleOffset { bitwidth, .. }
    | Encoding::Block { bitwidth, .. }
    | Encoding::BlockExpansion { bitwidth, .. }) = encoding;
    match (usize::from(*bitwidth), encoding) {
        (bits, _) if bits == data_type.bits() => Ok(bits),
        (2..=5, Encoding::Block { block_size, .. }) if data_type.bits() == 8 && block_size % 32 == 0 => Ok(5),
        (2..=6, Encoding::Block { block_size, .. }) if data_type.bits() == 8 && block_size % 16 == 0 => Ok(6),
        (2..8, Encoding::Block { .. }) if data_type.bits() == 8 => Ok(8),
        (bits, _) => Err((format!("{bits} bits in {data_type}"), "a bit width that fills the type, or blocks")),
    }
}

/// Offsets of a block encoding as the panels keep them. With `u = q + shift`, `(q + o) * scale` is
/// `(u + o - shift) * scale`.
fn block_offsets<'a>(
    tensor: &Tensor,
    shift: i32,
    symmetric: i32,
    bits: usize,
    offsets: &'a BlockOffsets,
) -> Result<(BlockOffset, PackOffsets<'a>), PrepareError> {
    let refuse = |have: &str, want: &str| {
        Err(unpackable(&tensor.name, &format!("{} blocks with {have}", tensor.data_type), want))
    };
    let is_symmetric = match offsets {
        BlockOffsets::Symmetric => symmetric == 0,
        BlockOffsets::Integer(all) => all.iter().all(|o| i32::from(o.cast_signed()) == symmetric),
        BlockOffsets::Min(_) => false,
    };
    if is_symmetric {
        return Ok((BlockOffset::Symmetric, PackOffsets::None));
    }
    match (offsets, bits) {
        (_, 6..) => refuse("offsets", "symmetric blocks, or at most 5 bits in blocks of a multiple of 32"),
        (BlockOffsets::Symmetric, _) => Ok((BlockOffset::Integer, PackOffsets::Same(0))),
        (BlockOffsets::Integer(all), _) => {
            let fits = |o: &u8| i8::try_from(i32::from(o.cast_signed()) - shift).is_ok();
            if !all.iter().all(fits) {
                return refuse("large offsets", &format!("offsets from {} to 127", -128 + shift));
            }
            Ok((BlockOffset::Integer, PackOffsets::Whole(all, -shift)))
        }
        (BlockOffsets::Min(all), _) if shift == 0 => Ok((BlockOffset::Min, PackOffsets::Min(all))),
        (BlockOffsets::Min(_), _) => refuse("float minima", "unsigned elements"),
    }
}

fn unpackable(tensor: &str, have: &str, want: &str) -> PrepareError {
    PrepareError::Tensor { tensor: tensor.to_owned(), why: format!("{have}, the kernels need {want}") }
}

fn at(tensor: &str) -> impl Fn(ShapeError) -> PrepareError {
    move |why| PrepareError::Tensor { tensor: tensor.to_owned(), why: why.to_string() }
}

/// Element number `at` of a flat float constant.
fn float(bytes: &[u8], data_type: DataType, at: usize) -> f32 {
    match data_type {
        DataType::Float16 => f16::from_le_bytes([bytes[at * 2], bytes[at * 2 + 1]]).to_f32(),
        DataType::BFloat16 => bf16::from_le_bytes([bytes[at * 2], bytes[at * 2 + 1]]).to_f32(),
        _ => f32::from_le_bytes([bytes[at * 4], bytes[at * 4 + 1], bytes[at * 4 + 2], bytes[at * 4 + 3]]),
    }
}

#[cfg(test)]
mod tests;
