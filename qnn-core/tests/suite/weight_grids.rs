//! Weights become integers without losing more than their grid must lose.

use htp_sim::Workers;
use proptest::prelude::*;
use qnn_core::offline::gguf::GgmlType;
use qnn_core::offline::quantize_weights::{Bits, QuantizeError, Quantized, Scheme, quantize};
use qnn_core::offline::source::{Change, ElementFormat, SourceTensor};
use qnn_core::{BlockOffsets, DataType, Encoding};

/// What `quantized`, `[n, k]`, stands for: the law, written once more.
fn dequantize(quantized: &Quantized, k: usize) -> Vec<f64> {
    let four = quantized.data_type.bits() == 4;
    let code = |i: usize| {
        let byte = quantized.data[if four { i / 2 } else { i }];
        let nibble = byte >> (i % 2 * 4) & 15;
        match quantized.data_type {
            DataType::UFixedPoint4 => f64::from(nibble),
            DataType::UFixedPoint8 => f64::from(byte),
            DataType::SFixedPoint4 => f64::from((nibble << 4).cast_signed() >> 4),
            _ => f64::from(byte.cast_signed()),
        }
    };
    let count = quantized.data.len() * if four { 2 } else { 1 };
    let value = |i: usize| match &quantized.encoding {
        Encoding::AxisScaleOffset { scales, .. } => code(i) * f64::from(scales.get(i / k)),
        Encoding::Block { block_size, scales, offsets, .. } => {
            let scale = f64::from(scales.get(i / block_size));
            match offsets {
                BlockOffsets::Symmetric => code(i) * scale,
                BlockOffsets::Integer(o) => (code(i) + f64::from(o[i / block_size].cast_signed())) * scale,
                BlockOffsets::Min(mins) => code(i) * scale + f64::from(mins.get(i / block_size)),
            }
        }
        Encoding::BlockExpansion { block_size, scales, steps, .. } => {
            code(i) * f64::from(steps[i / block_size]) * f64::from(scales.get(i / k))
        }
        other => panic!("{other:?}"),
    };
    (0..count).map(value).collect()
}

fn tensor(values: &[f32], k: usize) -> SourceTensor {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    SourceTensor::new("w", vec![values.len() / k, k], ElementFormat::F32, bytes.into()).unwrap()
}

fn schemes() -> [Scheme; 7] {
    [
        Scheme::PerChannel { bits: Bits::Eight },
        Scheme::PerChannel { bits: Bits::Four },
        Scheme::Block { bits: Bits::Eight, block_size: 4 },
        Scheme::Block { bits: Bits::Eight, block_size: 24 },
        Scheme::Block { bits: Bits::Four, block_size: 8 },
        Scheme::AsymmetricBlock4 { block_size: 8 },
        Scheme::BlockExpansion4 { block_size: 8 },
    ]
}

proptest! {
    /// Guards: every value comes back within the step of its block (half of it, and what f16 scales and whole offsets
    /// take), whatever the sizes and signs, and the number of workers changes nothing.
    #[test]
    fn values_come_back_within_a_step(
        rows in prop::collection::vec(prop::collection::vec(-1.0f32..1.0, 24), 1..40),
        shift in -3.0f32..3.0,
        magnitude in prop::sample::select(vec![1e-3f32, 1.0, 100.0]),
    ) {
        let values: Vec<f32> = rows.iter().flatten().map(|v| (v + shift) * magnitude).collect();
        let tensor = tensor(&values, 24);
        for scheme in schemes() {
            let one = quantize(&tensor, scheme, &Workers::new(1).unwrap()).unwrap();
            let three = quantize(&tensor, scheme, &Workers::new(3).unwrap()).unwrap();
            prop_assert_eq!(&*one.data, &*three.data);
            let (block, levels) = match scheme {
                Scheme::PerChannel { bits } => (24, if bits == Bits::Four { 7.0 } else { 127.0 }),
                Scheme::Block { bits, block_size } => (block_size, if bits == Bits::Four { 7.0 } else { 127.0 }),
                Scheme::AsymmetricBlock4 { block_size } => (block_size, 15.0),
                Scheme::BlockExpansion4 { block_size } => (block_size, 7.0),
            };
            let back = dequantize(&one, 24);
            prop_assert_eq!(back.len(), values.len());
            for (at, (values, back)) in values.chunks(block).zip(back.chunks(block)).enumerate() {
                let row = &rows[at * block / 24];
                let largest = values.iter().fold(0.0f64, |m, v| m.max(f64::from(v.abs())));
                let (min, max) = values.iter().fold((f64::MAX, f64::MIN), |(a, b), v| (a.min(f64::from(*v)), b.max(f64::from(*v))));
                // Half a step; an offset rounded to a whole step may push one end out by half a step more.
                let step = match scheme {
                    Scheme::AsymmetricBlock4 { .. } => ((max - min) / levels).max(largest / 127.0),
                    // A block's whole number is off by at most one, so its ends are off by `levels` of the row's unit.
                    Scheme::BlockExpansion4 { .. } => {
                        let most = row.iter().fold(0.0f64, |m, v| m.max(f64::from(((v + shift) * magnitude).abs())));
                        largest / levels / 2.0 + most / 16.0
                    }
                    _ => largest / levels / 2.0,
                };
                // f16: 2^-11 of the scale at each of `levels` codes and of the minimum; 2^-24 where it is subnormal.
                let bound = step * 1.01 + largest * 2f64.powi(-10) + levels * 2f64.powi(-24);
                for (v, b) in values.iter().zip(back) {
                    prop_assert!((f64::from(*v) - b).abs() <= bound, "{:?}: {} became {}, bound {}", scheme, v, b, bound);
                }
            }
        }
    }

    /// Guards: values that lie on a four-bit grid with a float minimum come back almost exactly.
    #[test]
    fn a_grid_is_found_again(
        codes in prop::collection::vec(0u8..16, 30 * 20),
        scale in 0.001f32..0.1,
        min in -0.9f32..-0.1,
    ) {
        let (scale, min) = (half::f16::from_f32(scale).to_f32(), half::f16::from_f32(min).to_f32());
        let mut values = Vec::new();
        for codes in codes.chunks(30) {
            // Every block uses both ends of its grid, as a block of a quantized file does.
            values.extend([0u8, 15].iter().chain(codes).map(|q| f32::from(*q) * scale + min));
        }
        let coded = quantize(&tensor(&values, 32), Scheme::AsymmetricBlock4 { block_size: 32 }, &Workers::new(1).unwrap()).unwrap();
        for (v, b) in values.iter().zip(dequantize(&coded, 32)) {
            // One unit of an f16 scale (2^-11 of it) at the largest code.
            prop_assert!((f64::from(*v) - b).abs() <= f64::from(scale) * 15.0 / 2048.0 + 1e-7, "{} became {}", v, b);
        }
    }
}

proptest! {
    /// Guards: any bytes are a tensor or an error in every GGML format: nothing panics, no code leaves its type's range, and what
    /// is not finite never becomes a scale.
    #[test]
    fn any_blocks_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 2 * 210), finite in any::<bool>()) {
        let workers = Workers::new(1).unwrap();
        for ggml in GgmlType::ALL {
            let size = 2 * ggml.block_bytes();
            let mut bytes: Vec<u8> = bytes.iter().cycle().take(size).copied().collect();
            if finite {
                // The exponent's highest bit of anything that could be a half: never infinite, never not a number.
                bytes.iter_mut().for_each(|byte| *byte &= 0xbf);
            }
            let shape = vec![2, ggml.block_elements()];
            let format = ElementFormat::Ggml(*ggml);
            prop_assert!(SourceTensor::new("w", shape.clone(), format, bytes[1..].to_vec().into()).is_err());
            let tensor = SourceTensor::new("w", shape, format, bytes.into()).unwrap();
            match ggml.keep_grid(&tensor, &workers) {
                Ok(kept) => prop_assert!(dequantize(&kept, tensor.k()).iter().all(|v| v.is_finite())),
                Err(error) => prop_assert!(!finite && error.to_string().contains("tensor w, row"), "{}: {}", ggml.name(), error),
            }
        }
    }
}

/// Guards: what cannot be coded is refused with the tensor, the row and what would work.
#[test]
fn what_cannot_be_coded_is_refused() {
    let workers = Workers::new(1).unwrap();
    let mut values = vec![0.5f32; 3 * 24];
    let block = |block_size| Scheme::AsymmetricBlock4 { block_size };
    for block_size in [0, 5, 12, 16, 32, 48, usize::MAX] {
        let error = quantize(&tensor(&values, 24), block(block_size), &workers).unwrap_err();
        let (tensor, works) = ("w".to_owned(), vec![8, 24]);
        assert_eq!(error, QuantizeError::Block { tensor, block_size, k: 24, works });
    }
    let odd = quantize(&tensor(&values[..66], 33), Scheme::PerChannel { bits: Bits::Four }, &workers);
    assert_eq!(odd.unwrap_err(), QuantizeError::OddRow { tensor: "w".to_owned(), k: 33 });
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        values[30] = bad;
        for scheme in schemes() {
            let error = quantize(&tensor(&values, 24), scheme, &workers).unwrap_err();
            assert_eq!(error, QuantizeError::NotFinite { tensor: "w".to_owned(), row: 1 }, "{scheme:?}");
        }
    }
    values[30] = 3e7;
    let error = quantize(&tensor(&values, 24), block(8), &workers).unwrap_err();
    assert_eq!(error, QuantizeError::TooLarge { tensor: "w".to_owned(), row: 1 });
    values.fill(0.0);
    for scheme in schemes() {
        let zeroes = quantize(&tensor(&values, 24), scheme, &workers).unwrap();
        assert!(dequantize(&zeroes, 24).iter().all(|v| *v == 0.0), "{scheme:?}");
    }
}

/// Guards: blocks of every GGML format mean what the `gguf` package says (fixture and script in `tests/data`), and keep
/// their grid: exactly, or within the rounding that `keep_grid` states.
#[test]
fn ggml_blocks_mean_what_gguf_says() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("../data/ggml_blocks.json")).unwrap();
    let workers = Workers::new(1).unwrap();
    assert_eq!(golden.as_object().unwrap().len(), GgmlType::ALL.len(), "formats with a fixture");
    for (name, blocks) in golden.as_object().unwrap() {
        let hex = blocks["bytes"].as_str().unwrap();
        let byte = |i: usize| u8::from_str_radix(&hex[i * 2..i * 2 + 2], 16).unwrap();
        let bytes: Vec<u8> = (0..hex.len() / 2).map(byte).collect();
        let want: Vec<f32> = blocks["values"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        let ggml = GgmlType::from_number(blocks["number"].as_u64().unwrap() as u32).unwrap();
        assert_eq!(ggml.name(), name);
        let format = ElementFormat::Ggml(ggml);
        let tensor = SourceTensor::new(name, vec![2, want.len() / 2], format, bytes.into()).unwrap();
        assert_eq!(tensor.to_f32(), want, "{name}");
        let largest = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let kept = ggml.keep_grid(&tensor, &workers).unwrap();
        let bound = match ggml.change() {
            Change::None => 0.0,
            Change::ScalesToF16 => 1e-3,
            Change::Rounded => 1.0 / 254.0 * 1.001,
        };
        for (have, want) in dequantize(&kept, tensor.k()).iter().zip(&want) {
            let error = (have - f64::from(*want)).abs();
            assert!(error <= f64::from(largest) * bound + 1e-8, "{name} kept: {have} and {want}");
        }
    }
}
