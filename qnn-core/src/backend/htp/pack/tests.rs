use super::*;
use crate::{map::Bytes, tensor::Shape, types::TensorType};

const N: usize = 35; // two panels and a part of one
const K: usize = 32;

fn tensor(data_type: DataType, encoding: Option<Encoding>) -> Tensor {
    let mut bytes = match data_type.is_float() {
        true => (0..N * K).flat_map(|i| float_bytes((i as f32 - 500.0) * 0.37, data_type)).collect(),
        false => (0..(N * K * data_type.bits()).div_ceil(8)).map(|i| (i * 89 + i / 7) as u8).collect::<Vec<u8>>(),
    };
    if let (Some(Encoding::Block { bitwidth, .. }), 8) = (&encoding, data_type.bits()) {
        let beyond = 8_u8.saturating_sub(*bitwidth);
        for byte in &mut bytes {
            let (signed, unsigned) = ((*byte << beyond).cast_signed() >> beyond, *byte << beyond >> beyond);
            *byte = if data_type == DataType::SFixedPoint8 { signed.cast_unsigned() } else { unsigned };
        }
    }
    Tensor {
        name: "w".to_owned(),
        tensor_type: TensorType::Static,
        data_type,
        shape: Shape::fixed(&[N, K]),
        encoding,
        data: Some(TensorData::Flat(Bytes::from(bytes))),
    }
}

fn float_bytes(value: f32, data_type: DataType) -> Vec<u8> {
    match data_type {
        DataType::Float16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
        DataType::BFloat16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    }
}

fn scales(len: usize) -> Floats {
    Floats::from_f16(&(0..len).map(|i| 0.01 + i as f32 * 0.001).collect::<Vec<f32>>())
}

fn axis(bitwidth: u8, offsets: Vec<i32>) -> Option<Encoding> {
    Some(Encoding::AxisScaleOffset { bitwidth, axis: 0, scales: scales(N), offsets })
}

fn block(bitwidth: u8, offsets: BlockOffsets) -> Option<Encoding> {
    Some(Encoding::Block { bitwidth, block_size: 16, scales: scales(N * 2), offsets })
}

/// One block in each row.
fn row_block(bitwidth: u8, offsets: BlockOffsets) -> Option<Encoding> {
    Some(Encoding::Block { bitwidth, block_size: K, scales: scales(N), offsets })
}

fn expansion() -> Option<Encoding> {
    let steps = (0..N * 2).map(|i| (i % 16 + 1) as u8).collect::<Vec<u8>>().into();
    Some(Encoding::BlockExpansion { bitwidth: 4, block_size: 16, scales: scales(N), steps })
}

fn whole(offset: impl Fn(usize) -> i8) -> BlockOffsets {
    BlockOffsets::Integer((0..N * 2).map(|i| offset(i).cast_unsigned()).collect::<Vec<u8>>().into())
}

/// The law, element by element: `float = (q + offset) * scale`, or `q * scale + min`.
fn float_of(tensor: &Tensor, i: usize) -> f32 {
    let Some(TensorData::Flat(bytes)) = &tensor.data else { panic!("a constant") };
    let element = |n: usize| &bytes[i * n..i * n + n];
    let nibble = i32::from(bytes[i / 2] >> (4 * (i % 2)) & 15);
    let q = match tensor.data_type {
        DataType::Float32 => return f32::from_le_bytes(element(4).try_into().unwrap()),
        DataType::Float16 => return half::f16::from_le_bytes(element(2).try_into().unwrap()).to_f32(),
        DataType::BFloat16 => return half::bf16::from_le_bytes(element(2).try_into().unwrap()).to_f32(),
        DataType::SFixedPoint8 => i32::from(bytes[i] as i8),
        DataType::UFixedPoint8 => i32::from(bytes[i]),
        DataType::SFixedPoint4 => nibble - if nibble > 7 { 16 } else { 0 },
        _ => nibble,
    };
    match tensor.encoding.as_ref().unwrap() {
        Encoding::ScaleOffset { scale, offset, .. } => (q + offset) as f32 * scale,
        Encoding::AxisScaleOffset { scales, offsets, .. } => {
            (q + offsets.get(i / K).copied().unwrap_or(0)) as f32 * scales.get(i / K)
        }
        Encoding::Block { block_size, scales, offsets, .. } => {
            let (block, q) = (i / block_size, q as f32);
            match offsets {
                BlockOffsets::Symmetric => q * scales.get(block),
                BlockOffsets::Integer(all) => (q + f32::from(all[block] as i8)) * scales.get(block),
                BlockOffsets::Min(minima) => q * scales.get(block) + minima.get(block),
            }
        }
        Encoding::BlockExpansion { block_size, scales, steps, .. } => {
            (q * i32::from(steps[i / block_size])) as f32 * scales.get(i / K)
        }
    }
}

// Broken if packing changes a single weight of any format that a DLC can hold.
#[test]
fn panels_stand_for_the_same_numbers() {
    use DataType::*;
    let minima = BlockOffsets::Min(Floats::from_f16(&(0..N * 2).map(|i| -0.02 * i as f32).collect::<Vec<f32>>()));
    let one = |bitwidth, offset| Some(Encoding::ScaleOffset { bitwidth, scale: 0.3, offset });
    let whole_block = |offset| WeightFormat::Int4Block { block: 16, offset };
    let five_bits = |offset| WeightFormat::Int5Block { block: K, offset };
    let row_offsets = |offset: fn(usize) -> i8| {
        BlockOffsets::Integer((0..N).map(|i| offset(i).cast_unsigned()).collect::<Vec<u8>>().into())
    };
    let row_minima = BlockOffsets::Min(Floats::from_f16(&(0..N).map(|i| -0.02 * i as f32).collect::<Vec<f32>>()));
    let cases = [
        (Float32, None, WeightFormat::F32),
        (Float16, None, WeightFormat::F16),
        (BFloat16, None, WeightFormat::Bf16),
        (SFixedPoint8, one(8, 0), WeightFormat::Int8PerChannel),
        (UFixedPoint8, one(8, -128), WeightFormat::Int8PerChannel),
        (SFixedPoint4, one(4, 0), WeightFormat::Int4PerChannel),
        (SFixedPoint8, axis(8, Vec::new()), WeightFormat::Int8PerChannel),
        (SFixedPoint8, axis(8, vec![0; N]), WeightFormat::Int8PerChannel),
        (UFixedPoint8, axis(8, vec![-128; N]), WeightFormat::Int8PerChannel),
        (SFixedPoint4, axis(4, Vec::new()), WeightFormat::Int4PerChannel),
        (UFixedPoint4, axis(4, vec![-8; N]), WeightFormat::Int4PerChannel),
        (SFixedPoint8, block(8, BlockOffsets::Symmetric), WeightFormat::Int8Block { block: 16 }),
        (UFixedPoint8, block(8, whole(|_| -128)), WeightFormat::Int8Block { block: 16 }),
        (SFixedPoint8, row_block(5, BlockOffsets::Symmetric), five_bits(BlockOffset::Symmetric)),
        (UFixedPoint8, row_block(5, row_offsets(|_| -16)), five_bits(BlockOffset::Symmetric)),
        (SFixedPoint8, row_block(5, row_offsets(|i| i as i8 - 30)), five_bits(BlockOffset::Integer)),
        (UFixedPoint8, row_block(3, row_offsets(|_| -4)), five_bits(BlockOffset::Integer)),
        (UFixedPoint8, row_block(5, row_minima), five_bits(BlockOffset::Min)),
        (SFixedPoint8, block(5, BlockOffsets::Symmetric), WeightFormat::Int6Block { block: 16 }),
        (SFixedPoint8, block(6, BlockOffsets::Symmetric), WeightFormat::Int6Block { block: 16 }),
        (SFixedPoint8, block(7, BlockOffsets::Symmetric), WeightFormat::Int8Block { block: 16 }),
        (SFixedPoint4, block(4, BlockOffsets::Symmetric), whole_block(BlockOffset::Symmetric)),
        (UFixedPoint4, block(4, whole(|_| -8)), whole_block(BlockOffset::Symmetric)),
        (UFixedPoint4, block(4, BlockOffsets::Symmetric), whole_block(BlockOffset::Integer)),
        (UFixedPoint4, block(4, whole(|i| i as i8 - 30)), whole_block(BlockOffset::Integer)),
        (SFixedPoint4, block(4, whole(|i| i as i8 - 30)), whole_block(BlockOffset::Integer)),
        (UFixedPoint4, block(4, minima), whole_block(BlockOffset::Min)),
        (SFixedPoint4, expansion(), WeightFormat::Int4Expansion { block: 16 }),
    ];
    for (data_type, encoding, format) in cases {
        let tensor = tensor(data_type, encoding);
        let packing = Packing::of(&tensor).unwrap();
        assert_eq!(packing.layout().format(), format, "{data_type} {:?}", tensor.encoding);
        let blob = packing.pack().unwrap();
        let panels = packing.layout().view(&blob).unwrap();
        let mut row = vec![0.0; K];
        for n in 0..N {
            panels.dequantize_row(n, &mut row);
            let want: Vec<f32> = (n * K..(n + 1) * K).map(|i| float_of(&tensor, i)).collect();
            assert_eq!(row, want, "row {n} of {format:?} from {data_type}");
        }
    }
}

// Broken if a weight that the kernels cannot hold exactly is packed as something else.
#[test]
fn what_panels_cannot_hold_is_refused_by_name() {
    use DataType::*;
    let minima = || BlockOffsets::Min(scales(N * 2));
    let one = |bitwidth, offset| Some(Encoding::ScaleOffset { bitwidth, scale: 0.3, offset });
    let other_axis = Encoding::AxisScaleOffset { bitwidth: 8, axis: 1, scales: scales(K), offsets: Vec::new() };
    let large =
        Encoding::Block { bitwidth: 8, block_size: 2, scales: scales(N * K / 2), offsets: BlockOffsets::Symmetric };
    let cases = [
        (Int32, None, "INT_32 without encoding, the kernels need a float type or an encoding"),
        (SFixedPoint16, one(16, 0), "SFIXED_POINT_16, the kernels need a fixed-point type of 4 or 8 bits"),
        (SFixedPoint8, one(4, 0), "4 bits in SFIXED_POINT_8"),
        (SFixedPoint8, one(8, 3), "with another offset, the kernels need offset 0"),
        (UFixedPoint8, axis(8, Vec::new()), "with another offset, the kernels need offset -128"),
        (UFixedPoint8, axis(8, (0..N as i32).collect()), "with another offset"),
        (SFixedPoint8, Some(other_axis), "scales along axis 1"),
        (SFixedPoint8, block(8, whole(|i| i as i8)), "SFIXED_POINT_8 blocks with offsets"),
        (SFixedPoint8, block(8, minima()), "SFIXED_POINT_8 blocks with offsets"),
        (UFixedPoint8, block(5, minima()), "UFIXED_POINT_8 blocks with offsets, the kernels need symmetric blocks, or"),
        (SFixedPoint8, row_block(9, BlockOffsets::Symmetric), "9 bits in SFIXED_POINT_8"),
        (SFixedPoint4, block(4, minima()), "SFIXED_POINT_4 blocks with float minima, the kernels need unsigned"),
        (SFixedPoint4, block(4, whole(|_| -125)), "large offsets, the kernels need offsets from -120 to 127"),
        (SFixedPoint8, Some(large), "weight block"),
    ];
    for (data_type, encoding, want) in cases {
        let tensor = tensor(data_type, encoding);
        let error = Packing::of(&tensor).expect_err(want);
        let text = error.to_string();
        assert!(text.starts_with("tensor w") && text.contains(want), "{text}");
    }
    // Elements beyond the width that the encoding states.
    let mut wide = tensor(SFixedPoint8, row_block(8, BlockOffsets::Symmetric));
    wide.encoding = row_block(5, BlockOffsets::Symmetric);
    let error = Packing::of(&wide).unwrap().pack().expect_err("codes of 8 bits").to_string();
    assert!(error.starts_with("tensor w: 5-bit code in row"), "{error}");
    let mut bias = tensor(Float32, None);
    bias.shape = Shape::fixed(&[N * K]);
    assert!(matches!(Packing::of(&bias), Err(PrepareError::Tensor { .. })));
}
