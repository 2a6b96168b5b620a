//! Writing the three versions.

use serde_json::{Map, Value, json};

use super::{EncodingsFile, FileEncoding, FileVersion, Integers, Layout, Numbers};

pub(super) fn write(file: &EncodingsFile) -> Value {
    let producer = concat!("genie ", env!("CARGO_PKG_VERSION"));
    let version = file.version.name();
    if file.version == FileVersion::V2_0_0 {
        let encodings: Vec<Value> = file.tensors.iter().map(version_2).collect();
        return json!({"version": version, "producer": producer, "encodings": encodings});
    }
    let of = |is_param: bool| file.tensors.iter().filter(move |tensor| tensor.is_param.unwrap_or(false) == is_param);
    let side = |is_param: bool| match file.version {
        FileVersion::V1_0_0 => Value::Array(of(is_param).map(version_1).collect()),
        _ => Value::Object(of(is_param).map(|tensor| (tensor.name.clone(), version_0(tensor))).collect::<Map<_, _>>()),
    };
    json!({
        "version": version,
        "producer": producer,
        "activation_encodings": side(false),
        "param_encodings": side(true),
    })
}

fn version_0(tensor: &FileEncoding) -> Value {
    let integers = match &tensor.numbers {
        Numbers::Float { bits } => return json!([{"bitwidth": bits, "dtype": "float"}]),
        Numbers::Integer(integers) => per_block(integers).with_signed(false),
    };
    // AIMET writes this flag as text.
    let is_symmetric = if integers.is_symmetric() { "True" } else { "False" };
    let (least, most) = integers.codes();
    let entry = |(scale, offset): (&f64, &i64)| {
        json!({
            "bitwidth": integers.bits, "dtype": "int", "is_symmetric": is_symmetric, "scale": scale, "offset": offset,
            "min": (least + offset) as f64 * scale, "max": (most + offset) as f64 * scale,
        })
    };
    integers.scales.iter().zip(&integers.offsets).map(entry).collect()
}

fn version_1(tensor: &FileEncoding) -> Value {
    let integers = match &tensor.numbers {
        Numbers::Float { bits } => {
            return json!({"name": tensor.name, "dtype": "FLOAT", "bw": bits, "enc_type": "PER_TENSOR"});
        }
        Numbers::Integer(integers) => integers.clone().with_signed(false),
    };
    let mut entry = json!({
        "name": tensor.name, "dtype": "INT", "bw": integers.bits, "is_sym": integers.is_symmetric(),
        "scale": integers.scales, "offset": integers.offsets,
    });
    match &integers.layout {
        Layout::PerTensor => entry["enc_type"] = json!("PER_TENSOR"),
        Layout::PerChannel => entry["enc_type"] = json!("PER_CHANNEL"),
        Layout::PerBlock { block_size } => {
            entry["enc_type"] = json!("PER_BLOCK");
            entry["block_size"] = json!(block_size);
        }
        Layout::Lpbq { block_size, decompressed_bits, block_scales } => {
            entry["enc_type"] = json!("LPBQ");
            entry["block_size"] = json!(block_size);
            entry["bw"] = json!(decompressed_bits);
            entry["compressed_bw"] = json!(integers.bits);
            entry["per_block_int_scale"] = json!(block_scales);
            entry["offset"] = json!(vec![-(1i64 << (decompressed_bits - 1)); integers.scales.len()]);
        }
    }
    entry
}

fn version_2(tensor: &FileEncoding) -> Value {
    let integers = match &tensor.numbers {
        Numbers::Float { bits } => return json!({"name": tensor.name, "output_dtype": format!("float{bits}")}),
        Numbers::Integer(integers) => integers,
    };
    let integers = if integers.is_symmetric() { integers.clone().with_signed(true) } else { integers.clone() };
    let kind = format!("{}{}", if integers.signed { "int" } else { "uint" }, integers.bits);
    let zero_points: Vec<i64> = integers.offsets.iter().map(|offset| -offset).collect();
    let mut entry = json!({"name": tensor.name, "output_dtype": kind});
    match &integers.layout {
        Layout::PerTensor => {
            entry["y_scale"] = json!(integers.scales[0]);
            entry["y_zero_point"] = json!(zero_points[0]);
        }
        Layout::PerChannel => {
            entry["axis"] = json!(0);
            entry["y_scale"] = json!(integers.scales);
            entry["y_zero_point"] = json!(zero_points);
        }
        Layout::PerBlock { block_size } => {
            entry["axis"] = json!(1);
            entry["block_size"] = json!(block_size);
            entry["y_scale"] = json!(integers.scales);
            entry["y_zero_point"] = json!(zero_points);
        }
        Layout::Lpbq { block_size, block_scales, .. } => {
            entry["axis"] = json!(1);
            entry["block_size"] = json!(block_size);
            entry["per_channel_float_scale"] = json!(integers.scales);
            entry["per_block_int_scale"] = json!(block_scales);
        }
    }
    entry
}

/// With LPBQ's scales multiplied out: 0.6.1 has no other place for them.
fn per_block(integers: &Integers) -> Integers {
    let Layout::Lpbq { block_size, block_scales, .. } = &integers.layout else { return integers.clone() };
    let blocks = (block_scales.len() / integers.scales.len().max(1)).max(1);
    let of = |i: usize| integers.scales[(i / blocks).min(integers.scales.len() - 1)];
    let scales: Vec<f64> = block_scales.iter().enumerate().map(|(i, k)| of(i) * f64::from(*k)).collect();
    let offsets = vec![integers.offsets.first().copied().unwrap_or(0); scales.len()];
    Integers { layout: Layout::PerBlock { block_size: *block_size }, scales, offsets, ..integers.clone() }
}
