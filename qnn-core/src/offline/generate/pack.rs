//! From a constant as a DLC stores it (rows of elements, an encoding) to the kernels' panels.

use htp_sim::{BlockOffset, Offsets, PackedLayout, Packer, ShapeError, WeightFormat, packed::PANEL};

use super::GenerateError;
use crate::{
    encoding::{BlockOffsets, Encoding, Floats},
    tensor::{Tensor, TensorData},
    types::DataType,
};

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
    /// [`GenerateError`] naming the tensor, if no format of the kernels can hold it exactly.
    pub(crate) fn of(tensor: &'a Tensor) -> Result<Packing<'a>, GenerateError> {
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
        let layout = PackedLayout::new(n, k, format).map_err(at(name))?;
        Ok(Packing { layout, name, data_type: tensor.data_type, data, codes })
    }

    /// Shape and format of the panels.
    pub(crate) fn layout(&self) -> PackedLayout {
        self.layout
    }

    /// Makes the panels. Beside the result, only one panel is held.
    pub(crate) fn pack(&self) -> Result<Vec<u8>, GenerateError> {
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
        let k = self.layout.k();
        let element = self.data_type.bits() / 8;
        let bytes = &self.data[rows.start * k * element..rows.end * k * element];
        let values: Vec<f32> = match self.data_type {
            DataType::Float16 => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
            DataType::BFloat16 => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
            _ => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        };
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

    /// The codes of these elements as the panels keep them: `-128..=127`, or `0..=15`.
    fn stored_codes(&self, elements: std::ops::Range<usize>, shift: i32) -> Vec<i8> {
        // Every sum fits i8: `integer_format` chose `shift` for the element type.
        let shifted = |code: i32| (code + shift) as i8;
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

fn float_format(tensor: &Tensor) -> Result<WeightFormat, GenerateError> {
    match tensor.data_type {
        DataType::Float32 => Ok(WeightFormat::F32),
        DataType::Float16 => Ok(WeightFormat::F16),
        DataType::BFloat16 => Ok(WeightFormat::Bf16),
        other => Err(unpackable(&tensor.name, &format!("{other} without encoding"), "a float type or an encoding")),
    }
}

fn integer_format<'a>(tensor: &'a Tensor, encoding: &'a Encoding) -> Result<(WeightFormat, Codes<'a>), GenerateError> {
    use DataType::{SFixedPoint4, SFixedPoint8, UFixedPoint4, UFixedPoint8};
    let refuse = |have: String, want: &str| Err(unpackable(&tensor.name, &have, want));
    let data_type = tensor.data_type;
    // What turns an element into a symmetric code, and the offset that an unsigned element has if it is symmetric.
    let (four_bits, shift, symmetric) = match data_type {
        SFixedPoint8 => (false, 0, 0),
        UFixedPoint8 => (false, -128, -128),
        SFixedPoint4 => (true, 8, 0),
        UFixedPoint4 => (true, 0, -8),
        other => return refuse(format!("{other}"), "a fixed-point type of 4 or 8 bits"),
    };
    let (Encoding::ScaleOffset { bitwidth, .. }
    | Encoding::AxisScaleOffset { bitwidth, .. }
    | Encoding::Block { bitwidth, .. }
    | Encoding::BlockExpansion { bitwidth, .. }) = encoding;
    if usize::from(*bitwidth) != data_type.bits() {
        return refuse(format!("{bitwidth} bits in {data_type}"), "a bit width that fills the type");
    }
    let per_channel = if four_bits { WeightFormat::Int4PerChannel } else { WeightFormat::Int8PerChannel };
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
            let (offset, offsets) = block_offsets(tensor, shift, symmetric, offsets)?;
            let format = match four_bits {
                true => WeightFormat::Int4Block { block: *block_size, offset },
                false => WeightFormat::Int8Block { block: *block_size },
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

/// Offsets of a block encoding as the panels keep them. With `u = q + shift`, `(q + o) * scale` is
/// `(u + o - shift) * scale`.
fn block_offsets<'a>(
    tensor: &Tensor,
    shift: i32,
    symmetric: i32,
    offsets: &'a BlockOffsets,
) -> Result<(BlockOffset, PackOffsets<'a>), GenerateError> {
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
    match (offsets, tensor.data_type.bits()) {
        (_, 8) => refuse("offsets", "symmetric blocks"),
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

fn unpackable(tensor: &str, have: &str, want: &str) -> GenerateError {
    GenerateError::Unpackable { tensor: tensor.to_owned(), have: have.to_owned(), want: want.to_owned() }
}

fn at(tensor: &str) -> impl Fn(ShapeError) -> GenerateError {
    move |why| GenerateError::Pack { tensor: tensor.to_owned(), why }
}

#[cfg(test)]
mod tests;
