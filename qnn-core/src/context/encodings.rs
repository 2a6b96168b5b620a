//! Encodings of computed tensors that a section replaces.

use super::SectionError;
use crate::{
    adapter::TensorEncoding, binary::TensorEncodingRecord, encoding::Encoding, graph::Graph, record::EncodingRecord,
    tensor::Tensor,
};

/// What META says of encodings.
pub(super) fn records<'a>(encodings: impl Iterator<Item = (&'a str, &'a TensorEncoding)>) -> Vec<TensorEncodingRecord> {
    let record = |(name, own): (&str, &TensorEncoding)| TensorEncodingRecord {
        tensor: name.to_owned(),
        encoding: EncodingRecord::from(&own.encoding),
    };
    encodings.map(record).collect()
}

/// The encodings of META, checked against `graphs`: the tensors are declared as updatable, and have no more bits
/// than their type holds.
pub(super) fn read(
    graphs: &[Graph],
    records: &[TensorEncodingRecord],
) -> Result<Vec<(String, TensorEncoding)>, SectionError> {
    let one = |record: &TensorEncodingRecord| {
        let refuse = |have: String, want: String| SectionError::Encoding { tensor: record.tensor.clone(), have, want };
        let EncodingRecord::ScaleOffset { bitwidth, scale, offset } = record.encoding else {
            return Err(refuse("several scales".to_owned(), "one for the whole tensor".to_owned()));
        };
        let encoding = Encoding::ScaleOffset { bitwidth, scale, offset };
        let mut found = graphs.iter().filter_map(|graph| Some(graph.tensor(graph.find(&record.tensor)?))).peekable();
        if found.peek().is_none() {
            return Err(SectionError::UnknownTensor { tensor: record.tensor.clone() });
        }
        let mut data_type = None;
        for tensor in found {
            fits(tensor, bitwidth).map_err(|(have, want)| refuse(have, want))?;
            encoding.grid(tensor.data_type).map_err(|have| refuse(have, "one that the tensor can have".to_owned()))?;
            data_type = Some(tensor.data_type);
        }
        let data_type = data_type.expect("at least one graph has it");
        Ok((record.tensor.clone(), TensorEncoding { data_type, encoding }))
    };
    records.iter().map(one).collect()
}

/// Whether a section may replace the encoding of `tensor` by one of `bits`; if not, what is and what has to be.
pub(crate) fn fits(tensor: &Tensor, bits: u8) -> Result<(), (String, String)> {
    let most = tensor.data_type.bits();
    let computed = !tensor.tensor_type.is_static() && tensor.tensor_type.is_updateable();
    match tensor.encoding {
        Some(Encoding::ScaleOffset { .. }) if computed && (2..=most).contains(&usize::from(bits)) => Ok(()),
        Some(Encoding::ScaleOffset { .. }) if computed => {
            Err((format!("{bits} bits"), format!("2 to {most}, which is what {} holds", tensor.data_type)))
        }
        _ => {
            let want = "a computed tensor with an encoding that may be updated (quant_updatable_mode all)";
            Err((tensor.tensor_type.to_string(), want.to_owned()))
        }
    }
}

/// An encoding that an adapter cannot have.
pub(super) fn refused((tensor, have): (String, String)) -> SectionError {
    SectionError::Encoding { tensor, have, want: "one that a computed tensor can have".to_owned() }
}
