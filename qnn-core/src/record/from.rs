//! Conversions between the types that are stored and the types we compute with.

use htp_sim::{BlockOffset, WeightFormat};

use super::{BlockOffsetsRecord, EncodingRecord, OpRecord, PanelOffset, PanelsRecord};
use crate::{
    encoding::{BlockOffsets, Encoding},
    op::{AttentionAttrs, OpKind},
};

impl From<&Encoding> for EncodingRecord {
    fn from(encoding: &Encoding) -> EncodingRecord {
        match encoding {
            Encoding::ScaleOffset { bitwidth, scale, offset } => {
                EncodingRecord::ScaleOffset { bitwidth: *bitwidth, scale: *scale, offset: *offset }
            }
            Encoding::AxisScaleOffset { bitwidth, axis, scales, offsets } => EncodingRecord::AxisScaleOffset {
                bitwidth: *bitwidth,
                axis: *axis,
                scale_type: scales.data_type(),
                has_offsets: !offsets.is_empty(),
            },
            Encoding::Block { bitwidth, block_size, scales, offsets } => EncodingRecord::Block {
                bitwidth: *bitwidth,
                block_size: *block_size,
                scale_type: scales.data_type(),
                offsets: match offsets {
                    BlockOffsets::Symmetric => BlockOffsetsRecord::Symmetric,
                    BlockOffsets::Integer(_) => BlockOffsetsRecord::Integer,
                    BlockOffsets::Min(mins) => BlockOffsetsRecord::Min(mins.data_type()),
                },
            },
            Encoding::BlockExpansion { bitwidth, block_size, scales, .. } => EncodingRecord::BlockExpansion {
                bitwidth: *bitwidth,
                block_size: *block_size,
                scale_type: scales.data_type(),
            },
        }
    }
}

impl From<WeightFormat> for PanelsRecord {
    fn from(format: WeightFormat) -> PanelsRecord {
        match format {
            WeightFormat::F32 => PanelsRecord::F32,
            WeightFormat::F16 => PanelsRecord::F16,
            WeightFormat::Bf16 => PanelsRecord::Bf16,
            WeightFormat::Int8PerChannel => PanelsRecord::Int8PerChannel,
            WeightFormat::Int4PerChannel => PanelsRecord::Int4PerChannel,
            WeightFormat::Int8Block { block } => PanelsRecord::Int8Block { block },
            WeightFormat::Int4Expansion { block } => PanelsRecord::Int4Expansion { block },
            WeightFormat::Int6Block { block } => PanelsRecord::Int6Block { block },
            WeightFormat::Int5Block { block, offset } => PanelsRecord::Int5Block { block, offset: offset.into() },
            WeightFormat::Int4Block { block, offset } => PanelsRecord::Int4Block { block, offset: offset.into() },
        }
    }
}

impl From<BlockOffset> for PanelOffset {
    fn from(offset: BlockOffset) -> PanelOffset {
        match offset {
            BlockOffset::Symmetric => PanelOffset::Symmetric,
            BlockOffset::Integer => PanelOffset::Integer,
            BlockOffset::Min => PanelOffset::Min,
        }
    }
}

impl From<PanelsRecord> for WeightFormat {
    fn from(record: PanelsRecord) -> WeightFormat {
        match record {
            PanelsRecord::F32 => WeightFormat::F32,
            PanelsRecord::F16 => WeightFormat::F16,
            PanelsRecord::Bf16 => WeightFormat::Bf16,
            PanelsRecord::Int8PerChannel => WeightFormat::Int8PerChannel,
            PanelsRecord::Int4PerChannel => WeightFormat::Int4PerChannel,
            PanelsRecord::Int8Block { block } => WeightFormat::Int8Block { block },
            PanelsRecord::Int4Expansion { block } => WeightFormat::Int4Expansion { block },
            PanelsRecord::Int6Block { block } => WeightFormat::Int6Block { block },
            PanelsRecord::Int5Block { block, offset } => WeightFormat::Int5Block { block, offset: offset.into() },
            PanelsRecord::Int4Block { block, offset } => WeightFormat::Int4Block { block, offset: offset.into() },
        }
    }
}

impl From<PanelOffset> for BlockOffset {
    fn from(offset: PanelOffset) -> BlockOffset {
        match offset {
            PanelOffset::Symmetric => BlockOffset::Symmetric,
            PanelOffset::Integer => BlockOffset::Integer,
            PanelOffset::Min => BlockOffset::Min,
        }
    }
}

impl From<OpKind> for OpRecord {
    fn from(op: OpKind) -> OpRecord {
        match op {
            OpKind::FullyConnected => OpRecord::FullyConnected,
            OpKind::Gather => OpRecord::Gather,
            OpKind::RmsNorm { epsilon } => OpRecord::RmsNorm { epsilon },
            OpKind::ElementWiseAdd => OpRecord::ElementWiseAdd,
            OpKind::ElementWiseMultiply => OpRecord::ElementWiseMultiply,
            OpKind::Sigmoid => OpRecord::Sigmoid,
            OpKind::Gelu => OpRecord::Gelu,
            OpKind::SoftCap { cap } => OpRecord::SoftCap { cap },
            OpKind::RotaryTable { scale } => OpRecord::RotaryTable { scale },
            OpKind::RotaryEmbedding { head_dim } => OpRecord::RotaryEmbedding { head_dim },
            OpKind::Attention(AttentionAttrs { heads, kv_heads, head_dim, scale, window, softcap }) => {
                OpRecord::Attention { heads, kv_heads, head_dim, scale, window, softcap }
            }
        }
    }
}

impl From<OpRecord> for OpKind {
    fn from(record: OpRecord) -> OpKind {
        match record {
            OpRecord::FullyConnected => OpKind::FullyConnected,
            OpRecord::Gather => OpKind::Gather,
            OpRecord::RmsNorm { epsilon } => OpKind::RmsNorm { epsilon },
            OpRecord::ElementWiseAdd => OpKind::ElementWiseAdd,
            OpRecord::ElementWiseMultiply => OpKind::ElementWiseMultiply,
            OpRecord::Sigmoid => OpKind::Sigmoid,
            OpRecord::Gelu => OpKind::Gelu,
            OpRecord::SoftCap { cap } => OpKind::SoftCap { cap },
            OpRecord::RotaryTable { scale } => OpKind::RotaryTable { scale },
            OpRecord::RotaryEmbedding { head_dim } => OpKind::RotaryEmbedding { head_dim },
            OpRecord::Attention { heads, kv_heads, head_dim, scale, window, softcap } => {
                OpKind::Attention(AttentionAttrs { heads, kv_heads, head_dim, scale, window, softcap })
            }
        }
    }
}
