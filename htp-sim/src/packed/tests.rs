use super::*;
use crate::matmul::sum_rows;
use crate::testing::{FLOAT_FORMATS, Noise, integer_formats, portable, team, weights};

/// Every code, scale and offset comes back from where the packer put it, and `dequantize_row` and `sum_rows` are their formula.
#[test]
fn packed_values_come_back() {
    let workers = team(1);
    for (n, k) in [(1, 8), (16, 24), (17, 32), (35, 256), (5, 13), (24, 4)] {
        for (format, tight) in integer_formats(k).into_iter().flat_map(|f| [(f, false), (f, true)]) {
            let layout = if tight { PackedLayout::tight(n, k, format) } else { PackedLayout::new(n, k, format) };
            let layout = layout.expect("sizes are fine");
            let mut noise = Noise(9);
            let codes: Vec<i8> = (0..n * k).map(|_| noise.code_of(format)).collect();
            let blocks = layout.blocks();
            let scales: Vec<f32> = (0..n * blocks).map(|_| round_to_f16(noise.float()).expect("small")).collect();
            let integers: Vec<i8> = scales.iter().map(|_| noise.code(-128, 127)).collect();
            let minima: Vec<f32> = scales.iter().map(|_| round_to_f16(noise.float()).expect("small")).collect();
            let (offset, zero) = (format.block_offset(), if format.bits() < 8 { 1 << (format.bits() - 1) } else { 0 });
            let steps: Vec<u8> = (0..n * layout.steps()).map(|_| noise.code(1, 16).cast_unsigned()).collect();
            let step_of = |row: usize, k: usize| {
                let step = |block| i32::from(steps[row * layout.steps() + k / block]);
                format.step_block().map_or(1, step)
            };
            let offsets = match offset {
                BlockOffset::Symmetric if layout.steps() > 0 => Offsets::Steps(&steps),
                BlockOffset::Symmetric => Offsets::None,
                BlockOffset::Integer => Offsets::Integer(&integers),
                BlockOffset::Min => Offsets::Min(&minima),
            };
            let blob = pack_quantized(&layout, &codes, &scales, offsets).expect("lengths match");
            let w = layout.view(&blob).expect("length matches");
            let (mut floats, sums) = (vec![0.0; k], sum_rows(&portable(&workers), w).expect("integer weights"));
            for row in 0..n {
                w.dequantize_row(row, &mut floats);
                for (i, &float) in floats.iter().enumerate() {
                    let block = row * blocks + i / format.block().unwrap_or(k);
                    let (code, scale) = (i32::from(codes[row * k + i]), scales[block]);
                    let step = step_of(row, i);
                    assert_eq!((w.code(row, i), w.scale(row, i)), (code, scale * step as f32), "{format:?}");
                    let expected = match offset {
                        BlockOffset::Integer => (code + i32::from(integers[block])) as f32 * scale,
                        BlockOffset::Min => code as f32 * scale + minima[block],
                        BlockOffset::Symmetric => ((code - zero) * step) as f32 * scale,
                    };
                    assert_eq!(float, expected, "{format:?} row {row} k {i}");
                    assert!(
                        (f64::from((code * step) as f32 * scale) + f64::from(w.min(row, i)) - f64::from(float)).abs()
                            < 1e-4
                    );
                }
                let (sum, size) =
                    floats.iter().fold((0.0, 0.0), |(sum, size), w| (sum + f64::from(*w), size + f64::from(w.abs())));
                assert!((f64::from(sums[row]) - sum).abs() <= 1e-5 * size, "{format:?} row {row}: {} {sum}", sums[row]);
            }
        }
    }
}

/// Float formats hold the nearest number of their kind, padded outputs aside.
#[test]
fn packed_floats_come_back() {
    let values = Noise(3).floats(19 * 7);
    for (format, tight) in FLOAT_FORMATS.into_iter().flat_map(|f| [(f, false), (f, true)]) {
        let layout = if tight { PackedLayout::tight(19, 7, format) } else { PackedLayout::new(19, 7, format) };
        let layout = layout.expect("sizes are fine");
        let blob = pack_float(&layout, &values).expect("lengths match");
        let w = layout.view(&blob).expect("length matches");
        let mut floats = [0.0; 7];
        for (row, values) in values.chunks(7).enumerate() {
            w.dequantize_row(row, &mut floats);
            for (float, &value) in floats.iter().zip(values) {
                let expected = match format {
                    WeightFormat::F16 => half::f16::from_f32(value).to_f32(),
                    WeightFormat::Bf16 => half::bf16::from_f32(value).to_f32(),
                    _ => value,
                };
                assert_eq!(*float, expected, "{format:?}");
            }
        }
    }
}

/// Sections start at multiples of 64 bytes, as the table in the module's doc says: files depend on it.
#[test]
fn layout_is_as_documented() {
    let block = WeightFormat::Int4Block { block: 8, offset: BlockOffset::Integer };
    for (n, k, format, bytes) in [
        (16, 8, WeightFormat::F32, 512),
        (17, 3, WeightFormat::Bf16, 192),
        (16, 4, WeightFormat::Int8PerChannel, 128 + 64),
        (40, 8, WeightFormat::Int4PerChannel, 192 + 192),
        // 64 bytes of codes and 32 of scales, padded to 64, then 16 of offsets.
        (1, 8, block, 64 + 64 + 16),
        // 128 bytes of codes, 64 of scales, 32 of steps.
        (16, 16, WeightFormat::Int4Expansion { block: 8 }, 128 + 64 + 32),
        // 5 rows of codes, then scales and minima, each padded to 64; 3 rows of codes for each 16 inputs, then scales.
        (16, 32, WeightFormat::Int5Block { block: 32, offset: BlockOffset::Min }, 320 + 64 + 32),
        (16, 32, WeightFormat::Int6Block { block: 16 }, 384 + 64),
    ] {
        assert_eq!(PackedLayout::new(n, k, format).expect("sizes are fine").size_bytes(), bytes, "{format:?}");
    }
    for (n, k, format, bytes) in [
        (17, 3, WeightFormat::Bf16, (16 + 4) * 3 * 2),
        (8, 4, WeightFormat::Int8PerChannel, 64 + 64),
        (24, 12, WeightFormat::Int8PerChannel, 24 * 12 + 32 + 128),
        (40, 12, WeightFormat::Int4PerChannel, 40 * 8 + 192),
        (13, 4, WeightFormat::F32, 256),
        (1, 8, block, 64 + 64 + 16),
    ] {
        let layout = PackedLayout::tight(n, k, format).expect("sizes are fine");
        assert_eq!(
            layout.size_bytes(),
            usize::next_multiple_of(bytes, if format.is_float() { 64 } else { 16 }),
            "{layout:?}"
        );
    }
    let layout = PackedLayout::new(16, 16, WeightFormat::Int4PerChannel).expect("sizes are fine");
    let mut codes = vec![8; 16 * 16];
    (codes[3 * 16 + 2], codes[3 * 16 + 6], codes[3 * 16 + 13]) = (1, 2, 3);
    let blob = pack_quantized(&layout, &codes, &[1.0; 16], Offsets::None).expect("lengths match");
    assert_eq!((blob[3 * 4 + 2], blob[64 + 3 * 4 + 1]), (0x21, 0x38));
    // Inputs 2, 6, 13 and 22 of output 3, groups 0, 1, 3 and 5: upper bits in the row after those of their nibbles.
    let at = |row: usize, input: usize| row * 64 + 3 * 4 + input % 4;
    let upper = |format, code: i8, last: usize| {
        let layout = PackedLayout::new(16, 32, format).expect("sizes are fine");
        let mut codes = vec![0; 16 * 32];
        [2, 6, 13, 22].into_iter().for_each(|input| codes[3 * 32 + input] = code);
        let scales = vec![1.0; 16 * layout.blocks()];
        let blob = pack_quantized(&layout, &codes, &scales, Offsets::None).expect("lengths match");
        [(0, 2), (1, 13), (last, 2), (last, 13)].map(|(row, input)| blob[at(row, input)])
    };
    let int5 = WeightFormat::Int5Block { block: 32, offset: BlockOffset::Symmetric };
    assert_eq!(upper(int5, 0x1a, 4), [0xaa, 0xa0, 0b0011_0010, 0b1000_0000]);
    assert_eq!(upper(WeightFormat::Int6Block { block: 16 }, 0x2a, 2), [0xaa, 0xa0, 0b1010_0000, 0b0000_1000]);
}

/// Layouts that the kernels could not take, and values that the formats cannot hold, are refused.
#[test]
fn wrong_layouts_and_values_are_refused() {
    let int8 = |block| WeightFormat::Int8Block { block };
    let int4 = |block| WeightFormat::Int4Block { block, offset: BlockOffset::Symmetric };
    let cases = [
        (0, 8, WeightFormat::F32),
        (8, 0, WeightFormat::F32),
        (1, 65537, WeightFormat::Int8PerChannel),
        (1, 64, int8(0)),
        (1, 64, int8(6)),
        (1, 64, int8(24)),
        (1, 512, int8(512)),
        (1, 36, int4(12)),
        (1, 48, WeightFormat::Int5Block { block: 16, offset: BlockOffset::Symmetric }),
        (1, 48, WeightFormat::Int6Block { block: 24 }),
        (usize::MAX, 64, int4(32)),
        (1 << 40, 1 << 40, WeightFormat::F16),
        (1, 64, WeightFormat::Int4Expansion { block: 12 }),
        (1, 65, WeightFormat::Int4Expansion { block: 8 }),
    ];
    for (n, k, format) in cases {
        assert!(PackedLayout::new(n, k, format).is_err(), "{n}x{k} {format:?}");
    }
    let layout = PackedLayout::new(2, 32, int4(32)).expect("sizes are fine");
    let good = vec![3; 64];
    let refused = |codes: &[i8], scales: &[f32], offsets: Offsets<'_>| {
        pack_quantized(&layout, codes, scales, offsets).expect_err("must be refused").to_string()
    };
    let mut bad = good.clone();
    bad[40] = 16;
    assert_eq!(refused(&bad, &[1.0; 2], Offsets::None), "4-bit code in row: found 1, need codes from 0 to 15");
    for (format, code, want) in [
        (WeightFormat::Int5Block { block: 32, offset: BlockOffset::Min }, 32, "codes from 0 to 31"),
        (WeightFormat::Int6Block { block: 32 }, 64, "codes from 0 to 63"),
        (WeightFormat::Int6Block { block: 32 }, -1, "codes from 0 to 63"),
    ] {
        bad[40] = code;
        let layout = PackedLayout::new(2, 32, format).expect("sizes are fine");
        let error = pack_quantized(&layout, &bad, &[1.0; 2], Offsets::Min(&[0.0; 2])).expect_err("must be refused");
        assert!(error.to_string().contains(want), "{error}");
    }
    assert_eq!(refused(&good, &[1.0; 3], Offsets::None), "scales: found 3, need 2");
    assert_eq!(refused(&good[1..], &[1.0; 2], Offsets::None), "codes: found 63, need 64");
    for scale in [f32::NAN, f32::INFINITY, 70_000.0] {
        assert!(refused(&good, &[1.0, scale], Offsets::None).contains("need values that f16 can hold"));
        assert_eq!(round_to_f16(scale), None);
    }
    assert!(refused(&good, &[1.0; 2], Offsets::Integer(&[1, 2])).contains("offsets of the layout's own kind"));
    let expansion = PackedLayout::new(2, 32, WeightFormat::Int4Expansion { block: 16 }).expect("sizes are fine");
    let steps_refused =
        |offsets| pack_quantized(&expansion, &good, &[1.0; 2], offsets).expect_err("must be refused").to_string();
    let message = "step in row: found 1, need steps from 1 to 16";
    assert_eq!(steps_refused(Offsets::Steps(&[1, 16, 17, 1])), message);
    assert_eq!(steps_refused(Offsets::Steps(&[1, 16, 1, 0])), message);
    assert_eq!(steps_refused(Offsets::Steps(&[1, 2, 3])), "steps: found 3, need 4");
    assert!(steps_refused(Offsets::None).contains("offsets of the layout's own kind"));
    assert!(refused(&good, &[1.0; 2], Offsets::Steps(&[1, 2])).contains("steps"));
    let blob = weights(&layout, 1);
    assert!(layout.view(&blob[1..]).is_err());
    let float = PackedLayout::new(1, 2, WeightFormat::F16).expect("sizes are fine");
    assert!(pack_float(&float, &[1.0, 1e6]).is_err());
    assert!(pack_float(&layout, &[1.0; 64]).is_err());
    assert!(pack_quantized(&float, &[1, 2], &[1.0], Offsets::None).is_err());
}
