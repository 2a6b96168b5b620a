use serde_json::json;

use super::*;

fn integers(bits: u8, signed: bool, layout: Layout, scales: &[f64], offsets: &[i64]) -> Numbers {
    Numbers::Integer(Integers { bits, signed, layout, scales: scales.to_vec(), offsets: offsets.to_vec() })
}

/// What an entry means: floats of code `q` at each scale, whatever its codes are counted from.
fn meaning(numbers: &Numbers) -> Vec<(f64, f64)> {
    let Numbers::Integer(integers) = numbers else { return Vec::new() };
    let (least, most) = integers.codes();
    let ends = |(scale, offset): (&f64, &i64)| ((least + offset) as f64 * scale, (most + offset) as f64 * scale);
    integers.scales.iter().zip(&integers.offsets).map(ends).collect()
}

// Guards: one encoding means the same in all three versions, with the sign and origin of offsets that each has.
#[test]
fn versions_agree() {
    let v0 = json!({"version": "0.6.1",
        "activation_encodings": {"x": [{"bitwidth": 8, "dtype": "int", "is_symmetric": "False",
            "min": -1.0, "max": 1.55, "scale": 0.01, "offset": -100}]},
        "param_encodings": {"w": [
            {"bitwidth": 4, "dtype": "int", "is_symmetric": "True", "min": -0.8, "max": 0.7, "scale": 0.1, "offset": -8},
            {"bitwidth": 4, "dtype": "int", "is_symmetric": "True", "min": -1.6, "max": 1.4, "scale": 0.2, "offset": -8}]},
    });
    let v1 = json!({"version": "1.0.0",
        "activation_encodings": [{"name": "x", "dtype": "INT", "bw": 8, "enc_type": "PER_TENSOR", "is_sym": false,
            "scale": [0.01], "offset": [-100]}],
        "param_encodings": [{"name": "w", "dtype": "INT", "bw": 4, "enc_type": "PER_CHANNEL", "is_sym": true,
            "scale": [0.1, 0.2], "offset": [-8, -8]}],
    });
    let v2 = json!({"version": "2.0.0", "encodings": [
        {"name": "x", "output_dtype": "uint8", "y_scale": 0.01, "y_zero_point": 100},
        {"name": "w", "output_dtype": "int4", "y_scale": [[0.1], [0.2]], "y_zero_point": null, "axis": 0},
    ]});
    let mut read = Vec::new();
    for file in [v0, v1, v2] {
        let file = EncodingsFile::parse(file.to_string().as_bytes()).expect("a good file");
        read.push(["x", "w"].map(|name| meaning(&file.find(name).expect("it is there").numbers)));
    }
    assert_eq!(read[0], [vec![(-1.0, 1.55)], vec![(-0.8, 0.7000000000000001), (-1.6, 1.4000000000000001)]]);
    assert!(read.iter().all(|other| *other == read[0]), "{read:?}");
}

// Guards: what is written reads back as the same, in every version that can say it; LPBQ's scales are multiplied out in the
// first, which cannot.
#[test]
fn written_files_read_back() {
    let block = Layout::PerBlock { block_size: 32 };
    let lpbq = Layout::Lpbq { block_size: 64, decompressed_bits: 8, block_scales: vec![16, 3, 1, 9] };
    let entry =
        |name: &str, is_param, numbers| FileEncoding { name: name.to_owned(), is_param: Some(is_param), numbers };
    let all = vec![
        entry("a", false, integers(16, false, Layout::PerTensor, &[1.5e-5], &[-30000])),
        entry("b", false, integers(8, true, Layout::PerTensor, &[0.25], &[0])),
        entry("c", true, integers(8, true, Layout::PerChannel, &[0.1, f64::from(0.3f32)], &[0, 0])),
        entry("d", true, integers(4, false, block, &[0.1, 0.2, 0.3, 0.4], &[-3, 0, -15, 2])),
        entry("e", true, integers(4, true, lpbq, &[0.01, 0.02], &[0, 0])),
        entry("f", true, Numbers::Float { bits: 16 }),
    ];
    for version in [FileVersion::V0_6_1, FileVersion::V1_0_0, FileVersion::V2_0_0] {
        let file = EncodingsFile { version, tensors: all.clone() };
        let back = EncodingsFile::parse(file.to_json().to_string().as_bytes()).expect("our own file");
        assert_eq!(back.version, version);
        for tensor in &all {
            let found = back.find(&tensor.name).expect("it was written");
            if version == FileVersion::V0_6_1 && tensor.name == "e" {
                assert_eq!(meaning(&found.numbers).len(), 4);
                continue;
            }
            assert_eq!(meaning(&found.numbers), meaning(&tensor.numbers), "{} in {version:?}", tensor.name);
            let layout = |numbers: &Numbers| match numbers {
                Numbers::Integer(integers) => Some(integers.layout.clone()),
                Numbers::Float { .. } => None,
            };
            if version != FileVersion::V0_6_1 {
                assert_eq!(layout(&found.numbers), layout(&tensor.numbers), "{} in {version:?}", tensor.name);
            }
        }
    }
}

// Guards: files that are none, and numbers that are no encodings (NaN, infinity, zero, widths, counts), are refused with
// the tensor's name.
#[test]
fn bad_files_are_refused() {
    let one = |key: &str, value: serde_json::Value| {
        let mut entry =
            json!({"name": "x", "dtype": "INT", "bw": 8, "enc_type": "PER_TENSOR", "scale": [0.1], "offset": [0]});
        entry[key] = value;
        json!({"version": "1.0.0", "activation_encodings": [entry]}).to_string()
    };
    let range =
        r#"{"version": "0.6.1", "param_encodings": {"x": [{"bitwidth": 8, "min": NUMBER, "scale": 1, "offset": 0}]}}"#;
    let cases = [
        ("[]".to_owned(), "not the JSON"),
        ("{}".to_owned(), "an AIMET encodings file"),
        (r#"{"version": "3.0.0"}"#.to_owned(), "0.6.1, 1.0.0 or 2.0.0"),
        (r#"{"version": "1.0.0", "param_encodings": [{}]}"#.to_owned(), "without name"),
        (one("scale", json!([0.0])), "encoding of x: scale is 0.0"),
        (one("scale", json!(["NaN"])), "encoding of x: scale is \"NaN\""),
        (one("scale", json!([1e39])), "encoding of x: scale is 1e+39"),
        (one("scale", json!([])), "encoding of x: scale is empty"),
        (one("scale", json!([1, 2])), "one for the whole tensor"),
        (one("offset", json!([0.5])), "encoding of x: offset is 0.5"),
        (one("bw", json!(64)), "encoding of x: bw is 64"),
        (one("enc_type", json!("VECTOR")), "PER_TENSOR, PER_CHANNEL, PER_BLOCK or LPBQ"),
        (range.replace("NUMBER", "\"inf\""), "encoding of x: range is \"inf\""),
        (range.replace("NUMBER", "null"), "encoding of x: range is null"),
        (range.replace("NUMBER", "NaN"), "encoding of x: range is \"NaN\""),
        (range.replace("NUMBER", "-Infinity").replace("x", r#"x\"NaN"#), r#"encoding of x"NaN: range is "-Infinity""#),
        (range.replace("NUMBER", "nan"), "not the JSON"),
    ];
    for (json, want) in cases {
        let error = EncodingsFile::parse(json.as_bytes()).expect_err(&json);
        assert!(error.to_string().contains(want), "{json}: {error}");
    }
    let twice = json!({"encodings": [{"name": "x", "output_dtype": "int8", "y_scale": 1.0}, {"name": "x", "output_dtype": "int8", "y_scale": 1.0}]});
    let error = EncodingsFile::parse(twice.to_string().as_bytes()).expect_err("two of a name");
    assert!(matches!(error, EncodingsError::Twice { .. }));
}

// Guards: scales along another axis than rows' are refused with the tensor's name and the axis, not taken for those of rows.
#[test]
fn scales_along_another_axis_are_refused() {
    let parse = |entry: &serde_json::Value, axis: &serde_json::Value| {
        let mut entry = entry.clone();
        entry["axis"] = axis.clone();
        EncodingsFile::parse(json!({"version": "2.0.0", "encodings": [entry]}).to_string().as_bytes())
    };
    let tensor = json!({"name": "w", "output_dtype": "int4", "y_scale": 0.1});
    let channels = json!({"name": "w", "output_dtype": "int4", "y_scale": [0.1, 0.2]});
    let blocks = json!({"name": "w", "output_dtype": "int4", "block_size": 32, "y_scale": [[0.1, 0.2]]});
    let lpbq = json!({"name": "w", "output_dtype": "int4", "block_size": 32,
        "per_channel_float_scale": [0.1], "per_block_int_scale": [[1, 2]]});
    let cases = [
        (tensor, json!([null, 0, 1]), json!([])),
        (channels, json!([null, 0, -2]), json!([1, -1, 2, "0"])),
        (blocks, json!([null, 1, -1]), json!([0, -2, 2, "1"])),
        (lpbq, json!([null, 1, -1]), json!([0, -2, 2, "1"])),
    ];
    for (entry, good, bad) in cases {
        for axis in good.as_array().expect("a list") {
            parse(&entry, axis).expect("the axis that is read");
        }
        for axis in bad.as_array().expect("a list") {
            let error = parse(&entry, axis).expect_err("another axis").to_string();
            assert!(error.contains(&format!("encoding of w: axis is {axis}, need ")), "{error}");
        }
    }
}
