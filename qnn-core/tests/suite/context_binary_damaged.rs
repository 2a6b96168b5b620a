//! What must be refused: damaged, foreign, newer and contradictory context binaries, each with place and reason.

use std::io::Cursor;

use crate::support::{FORMS, Rng, Tiny, chain, mend_checksums, tiny};
use qnn_core::{
    Bytes, Context, ContextBuilder, DataType, Dim, Graph, OpenOptions, Shape, Tensor, TensorId, TensorType,
    backend::{Backend, HtpBackend, PrepareError},
    binary::{Binary, BinaryError, BinaryFault, BinaryWriter, SectionKind, Verify},
};

fn file() -> Vec<u8> {
    let model = Tiny { forms: &FORMS, layers: 1, ..Tiny::default() };
    let token = tiny("token", Tiny { ar: 1, ..model });
    ContextBuilder::new().graph(tiny("prompt", model)).graph(token).to_binary().expect("the tiny model can be stored")
}

fn open(file: &[u8], verify: Verify) -> Result<Context, BinaryFault> {
    Context::from_binary(Bytes::from(file.to_vec()), verify)
}

fn table_at(file: &[u8]) -> usize {
    u64::from_le_bytes(file[24..32].try_into().expect("eight bytes")) as usize
}

// Broken if a file that is not all there is taken for a model.
#[test]
fn every_cut_is_refused() {
    let file = file();
    let binary = Binary::parse(file.clone().into(), Verify::Headers).unwrap();
    let edges = binary.sections().iter().flat_map(|s| [s.at_bytes, s.at_bytes + s.size_bytes]);
    let mut cuts: Vec<usize> = edges.flat_map(|at| [at as usize - 1, at as usize, at as usize + 1]).collect();
    cuts.extend(0..=200);
    cuts.extend(table_at(&file)..file.len());
    let mut rng = Rng(7);
    cuts.extend((0..500).map(|_| rng.next() as usize % file.len()));
    for cut in cuts {
        let fault = open(&file[..cut], Verify::Headers).expect_err("a cut file");
        assert!(!chain(&fault).is_empty(), "cut at {cut}");
    }
    let longer = [file.as_slice(), &[0]].concat();
    let fault = open(&longer, Verify::Headers).unwrap_err();
    assert!(
        matches!(fault, BinaryFault { at_bytes: 16, why: BinaryError::Field { field: "file_bytes", .. } }),
        "{fault:?}"
    );
}

// Broken if a flipped bit in header, table, names, META or a graph goes unseen, even without reading the constants.
#[test]
fn every_flip_outside_constants_is_refused_without_reading_constants() {
    let mut file = file();
    let binary = Binary::parse(file.clone().into(), Verify::Headers).unwrap();
    let mut places: Vec<usize> = (0..128).chain(table_at(&file)..file.len()).collect();
    for section in binary.sections().iter().filter(|s| matches!(s.kind, SectionKind::Meta | SectionKind::Graph)) {
        places.extend((section.at_bytes..section.at_bytes + section.size_bytes).step_by(31).map(|at| at as usize));
    }
    for at in places {
        for bit in if at < 128 { 0..8 } else { at % 8..at % 8 + 1 } {
            file[at] ^= 1 << bit;
            assert!(open(&file, Verify::Headers).is_err(), "byte {at}, bit {bit}");
            file[at] ^= 1 << bit;
        }
    }
    open(&file, Verify::Checksums).expect("the file is whole again");
}

// Broken if a damaged weight or padding passes the checksums, or the error does not say where it lies.
#[test]
fn flips_in_constants_are_found_by_their_checksum() {
    let mut file = file();
    let (end, mut rng) = (table_at(&file), Rng(3));
    let binary = Binary::parse(file.clone().into(), Verify::Headers).unwrap();
    for _ in 0..400 {
        let (at, bit) = (128 + rng.next() as usize % (end - 128), rng.next() % 8);
        file[at] ^= 1 << bit;
        let fault = open(&file, Verify::Checksums).expect_err("a flipped bit");
        file[at] ^= 1 << bit;
        let place = binary.sections().iter().rfind(|s| s.at_bytes <= at as u64).expect("at lies behind the header");
        assert!(chain(&fault).contains(&place.name[..]), "byte {at} in {}: {}", place.name, chain(&fault));
    }
}

const BOUNDARIES: [u64; 12] =
    [0, 1, 63, 64, 0x7fff_ffff, 0x8000_0000, 0xffff_fffe, 0xffff_ffff, 1 << 32, (1 << 63) - 1, 1 << 63, u64::MAX];

// Broken if a count, size or place from the file is used before it is compared with the file.
#[test]
fn hostile_numbers_with_true_checksums_are_refused() {
    let file = file();
    let (table, n) = (table_at(&file), u32::from_le_bytes(file[32..36].try_into().unwrap()) as usize);
    // (place, bytes) of each integer field; checksums, versions and identity are other tests' business.
    let mut fields = vec![(6, 2), (14, 2), (16, 8), (24, 8), (32, 4), (36, 4), (44, 4), (80, 8), (112, 8)];
    for entry in [0, 1, 2, n / 2, n - 1] {
        let at = table + entry * 32;
        fields.extend([(at, 4), (at + 4, 4), (at + 12, 4), (at + 16, 8), (at + 24, 8)]);
    }
    for (at, bytes) in fields {
        let own = u64::from_le_bytes(std::array::from_fn(|i| if i < bytes { file[at + i] } else { 0 }));
        for value in BOUNDARIES.into_iter().chain([own + 1, own.wrapping_sub(1), own + 64]) {
            let value = value.to_le_bytes();
            let mut file = file.clone();
            if file[at..at + bytes] == value[..bytes] {
                continue;
            }
            file[at..at + bytes].copy_from_slice(&value[..bytes]);
            mend_checksums(&mut file);
            let fault = open(&file, Verify::Headers).expect_err("a wrong number");
            assert!(!chain(&fault).contains("header is damaged"), "field at {at}: {}", chain(&fault));
        }
    }
}

// Broken if somebody's other file gives a riddle instead of a plain answer, or an older reader misreads a newer file.
#[test]
fn foreign_newer_and_adapter_files_say_what_they_are() {
    let file = file();
    let header = |at: usize, bytes: &[u8]| {
        let mut file = file.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        mend_checksums(&mut file);
        file
    };
    let cases: [(Vec<u8>, &str); 7] = [
        (Vec::new(), "header is cut: the file has 0 bytes, need 128"),
        (file[..100].to_vec(), "header is cut: the file has 100 bytes, need 128"),
        (b"\x7fELF and so on".to_vec(), "not a genie context binary: it starts with [7f, 45, 4c, 46]"),
        (vec![0; 4096], "not a genie context binary: it starts with [00, 00, 00, 00]"),
        (header(4, &[9, 0]), "format version 9, written by SDK 0.1.0; this is SDK 0.1.0, which reads versions 1 to 2"),
        (header(6, &[2, 0]), "at byte 6: is an adapter section, need a context binary"),
        (header(48, &[0]), "header is damaged"),
    ];
    for (i, (mut file, want)) in cases.into_iter().enumerate() {
        if i == 6 {
            file[48] ^= 1;
        }
        let fault = chain(&open(&file, Verify::Headers).unwrap_err());
        assert!(fault.contains(want), "{fault}");
    }
}

// Broken if the user is not told which file, where and why.
#[test]
fn errors_name_the_file_the_place_and_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights.bin");
    let mut file = file();
    file[4] ^= 1;
    std::fs::write(&path, &file).unwrap();
    let error = chain(&Context::open(&path, &OpenOptions::default()).unwrap_err());
    let want = format!("{}: at byte 0: header is damaged: checksum ", path.display());
    assert!(error.starts_with(&want), "{error}");
    for missing in [dir.path().join("no.bin"), dir.path().to_path_buf()] {
        let error = chain(&Context::open(&missing, &OpenOptions::default()).unwrap_err());
        assert!(error.starts_with(&missing.display().to_string()), "{error}");
    }
}

/// A well-formed container with the sections of `file`, changed by `change`.
fn splice(file: &[u8], change: impl FnOnce(&mut Vec<(SectionKind, String, Vec<u8>)>)) -> Vec<u8> {
    let binary = Binary::parse(file.to_vec().into(), Verify::Headers).expect("the file is whole");
    let own = binary.sections().iter().enumerate();
    let mut sections = own.map(|(i, s)| (s.kind, s.name.to_string(), binary.bytes(i).to_vec())).collect();
    change(&mut sections);
    let mut writer = BinaryWriter::new(Cursor::new(Vec::new())).unwrap();
    for (kind, name, bytes) in sections {
        writer.add(kind, &name, &bytes).unwrap();
    }
    writer.finish().unwrap().0.into_inner()
}

// Broken if a context whose parts contradict each other is taken: a constant missing, left over, twice, of another size.
#[test]
fn contradictory_sections_are_refused() {
    type Change = fn(&mut Vec<(SectionKind, String, Vec<u8>)>);
    let cases: [(Change, &str); 10] = [
        (|s| _ = s.remove(0), "section META \"\" is missing"),
        (|s| s.swap(0, 1), "section META \"\" is missing"),
        (|s| s.push((SectionKind::Meta, "two".to_owned(), b"{}".to_vec())), "two sections are called META \"two\""),
        (|s| s[0].2 = b"{\"tool\": 1}".to_vec(), "section META: invalid type"),
        (|s| s.retain(|s| s.0 != SectionKind::Graph), "0 graphs, need 1 to 64"),
        (|s| s[1].1 = "other".to_owned(), "GRAPH \"other\" (in its JSON \"prompt\")"),
        (|s| s.push(s[5].clone()), "two sections are called"),
        (|s| s.push((SectionKind::Tensor, "spare".to_owned(), vec![0; 4])), "TENSOR \"spare\" is used by no graph"),
        (|s| s.retain(|s| s.1 != "inv_freq"), "section TENSOR \"inv_freq\" is missing"),
        (|s| s.iter_mut().for_each(|s| s.2.truncate(if s.1 == "inv_freq" { 28 } else { s.2.len() })), "inv_freq"),
    ];
    for (i, (change, want)) in cases.into_iter().enumerate() {
        let fault = chain(&open(&splice(&file(), change), Verify::Checksums).expect_err("a contradiction"));
        assert!(fault.contains(want), "case {i}: {fault}");
    }
}

// Broken if a graph's JSON can make the reader panic or believe sizes that are not there.
#[test]
fn damaged_graphs_with_true_checksums_never_panic() {
    let file = file();
    let mut rng = Rng(11);
    let hostile: [&[u8]; 8] =
        [b"18446744073709551615", b"-1", b"1e999", b"[[[[[[[[", b"null", b"\"\"", b"}", b"9223372036854775808"];
    let mut n_refused = 0;
    for _ in 0..600 {
        let damaged = splice(&file, |sections| {
            let json = &mut sections[1 + rng.next() as usize % 2].2;
            let at = rng.next() as usize % json.len();
            match rng.next() % 3 {
                0 => json[at] ^= 1 << (rng.next() % 8),
                1 => _ = json.splice(at..(at + 3).min(json.len()), hostile[rng.next() as usize % 8].iter().copied()),
                _ => {
                    // Replace a whole number, so that the JSON stays well formed.
                    let start = (at..json.len()).find(|i| json[*i].is_ascii_digit()).unwrap_or(at);
                    let end = (start..json.len()).find(|i| !json[*i].is_ascii_digit()).unwrap_or(json.len());
                    let number: &[u8] = if rng.next().is_multiple_of(2) { hostile[0] } else { b"0" };
                    _ = json.splice(start..end, number.iter().copied());
                }
            }
        });
        n_refused += usize::from(open(&damaged, Verify::Checksums).is_err());
    }
    // Some changes make another well-formed graph (a name, a bound, a fact); most cannot.
    assert!(n_refused > 400, "{n_refused} of 600 refused");
}

// Broken if extents that no data stands behind end the process instead of being refused: huge ones, and none at all.
#[test]
fn strange_extents_are_refused() {
    let refused = |dims| {
        let tensor = Tensor {
            name: "x".to_owned(),
            tensor_type: TensorType::AppWrite,
            data_type: DataType::Float32,
            shape: Shape(dims),
            encoding: None,
            data: None,
        };
        Graph::new("g").add_tensor(tensor).unwrap_err().to_string()
    };
    for dim in [Dim::Fixed(1 << 40), Dim::UpTo { max: 1 << 40, by: TensorId(0) }] {
        let refused = refused(vec![dim]);
        assert!(refused.starts_with("tensor x: ") && refused.contains("at most"), "{refused}");
    }
    for dims in [vec![], vec![Dim::Fixed(3), Dim::Fixed(0)]] {
        let refused = refused(dims);
        assert!(refused.starts_with("tensor x: shape ") && refused.contains("one dimension or more"), "{refused}");
    }
    // Each extent is possible, but not rows of so many adapter columns.
    let graph = tiny("g", Tiny { ar: 1 << 20, branch: Some((1 << 27, DataType::Float32)), ..Tiny::default() });
    let refused = HtpBackend::new(1).unwrap().prepare(&graph).err().unwrap();
    assert!(matches!(&refused, PrepareError::Memory { graph, .. } if graph == "g"), "{refused}");
    // Nor caches, or what attention over them takes.
    for capacity in [1 << 33, 1 << 36, 1 << 44] {
        let graph = tiny("g", Tiny::default());
        let refused = HtpBackend::new(1).unwrap().new_state(&[&graph], capacity).err().unwrap().to_string();
        assert!(
            ["more than the system has", "memory has room for"].iter().any(|words| refused.contains(words)),
            "{refused}"
        );
    }
}
