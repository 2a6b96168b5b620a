//! Weights in the one layout that every instruction set reads: panels of 16 outputs.
//!
//! One matrix `[n, k]` is one blob of three sections, each starting at a multiple of 64 bytes: codes, scales, offsets.
//! `n` is padded to 16. Elements are little endian.
//!
//! | format | codes | scales | offsets |
//! | --- | --- | --- | --- |
//! | F32, F16, Bf16 | `[n/16][k][16]` elements | none | none |
//! | Int8PerChannel | `[n/16][k/4][16][4]` i8 | `[n]` f32 | none |
//! | Int4PerChannel | `[n/16][k/8][16][4]` bytes | `[n]` f32 | none |
//! | Int8Block | as Int8PerChannel | `[n/16][k/block][16]` f16 | none |
//! | Int4Block | as Int4PerChannel | as Int8Block | none, i8 or f16, shaped as the scales |
//! | Int5Block | `[n/16][k/32][4 + 1][16][4]` bytes | as Int8Block | as Int4Block |
//! | Int6Block | `[n/16][k/16][2 + 1][16][4]` bytes | as Int8Block | none |
//! | Int4Expansion | as Int4PerChannel | `[n]` f32 | steps, `[n/16][k/block][16]` u8 |
//!
//! A 4-bit byte holds two codes `u = 0..=15`: with `k` cut in groups of four, row `j` of 64 bytes has group `2j` in its
//! low nibbles and group `2j + 1` in its high nibbles. In the integer formats `k` is padded to a multiple of 8 with codes
//! that mean 0.
//!
//! Codes of five and six bits, `u = 0..=31` and `0..=63`, are cut in two. Their lower four bits lie as 4-bit codes do, in
//! rows of which four, or two, are followed by one with the upper bits of all their groups: those of group `g` are bit
//! `(4 + g) % 8`, or bits `(4 + 2g) % 8` and the next, of the byte that is the code's place in its group. (A shift or two
//! bring them to bit 4.)
//!
//! A *tight* matrix ([`PackedLayout::tight`]) has less padding, for the few rows of an adapter's first half and the few
//! columns of its second: its last panel is `width` outputs wide, what is left of `n` padded to 4, so that 16 in the codes'
//! extents above becomes `width` there, and `k` of Int8PerChannel is padded to 4. Scales stay padded to 16.

use half::{bf16, f16};

use crate::error::{Needed, ShapeError, expect_at_most, expect_len, size};

mod pack;

pub use pack::{Offsets, Packer, pack_float, pack_quantized, round_to_f16};

/// How one weight matrix is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// 32-bit floats.
    F32,
    /// IEEE half floats.
    F16,
    /// bfloat16.
    Bf16,
    /// Symmetric i8 codes, one f32 scale per output.
    Int8PerChannel,
    /// Symmetric 4-bit codes (`float = (u - 8) * scale`), one f32 scale per output.
    Int4PerChannel,
    /// Symmetric i8 codes, one f16 scale for each `block` inputs of an output.
    Int8Block {
        /// Inputs per scale: a multiple of 4, at most [`MAX_BLOCK`], a divisor of `k`.
        block: usize,
    },
    /// 4-bit codes, one f16 scale for each `block` inputs of an output.
    Int4Block {
        /// Inputs per scale: a multiple of 8, at most [`MAX_BLOCK`], a divisor of `k`.
        block: usize,
        /// Where zero lies.
        offset: BlockOffset,
    },
    /// 5-bit codes, otherwise as [`Int4Block`](Self::Int4Block).
    Int5Block {
        /// Inputs per scale: a multiple of 32, at most [`MAX_BLOCK`], a divisor of `k`.
        block: usize,
        /// Where zero lies.
        offset: BlockOffset,
    },
    /// Symmetric 6-bit codes (`float = (u - 32) * scale`), one f16 scale for each `block` inputs of an output.
    Int6Block {
        /// Inputs per scale: a multiple of 16, at most [`MAX_BLOCK`], a divisor of `k`.
        block: usize,
    },
    /// Symmetric 4-bit codes, a whole step of 1 to [`MAX_STEP`] for each `block` inputs of an output, one f32 scale per
    /// output: `float = (u - 8) * step * scale` (QNN `BLOCKWISE_EXPANSION`, LPBQ).
    ///
    /// A code times its step fits a byte, so that products are summed over all of `k` before they become floats.
    Int4Expansion {
        /// Inputs per step: a multiple of 8, at most [`MAX_BLOCK`], a divisor of `k`.
        block: usize,
    },
}

/// Where zero lies in a block of 4-bit or 5-bit codes `u`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockOffset {
    /// `float = (u - 8) * scale`, or `u - 16` where codes have 5 bits.
    Symmetric,
    /// `float = (u + offset) * scale`, one i8 offset per block.
    Integer,
    /// `float = u * scale + min`, one f16 minimum per block.
    Min,
}

impl WeightFormat {
    /// Inputs per scale of a block format.
    pub fn block(self) -> Option<usize> {
        match self {
            Self::Int8Block { block }
            | Self::Int4Block { block, .. }
            | Self::Int5Block { block, .. }
            | Self::Int6Block { block } => Some(block),
            _ => None,
        }
    }

    /// Inputs per step of an expansion format.
    pub fn step_block(self) -> Option<usize> {
        match self {
            Self::Int4Expansion { block } => Some(block),
            _ => None,
        }
    }

    /// Where zero lies in each block.
    pub fn block_offset(self) -> BlockOffset {
        match self {
            Self::Int4Block { offset, .. } | Self::Int5Block { offset, .. } => offset,
            _ => BlockOffset::Symmetric,
        }
    }

    /// Whether the elements are floats (no codes, no scales).
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// Bits of an element or code.
    pub fn bits(self) -> usize {
        match self {
            Self::F32 => 32,
            Self::F16 | Self::Bf16 => 16,
            Self::Int8PerChannel | Self::Int8Block { .. } => 8,
            Self::Int6Block { .. } => 6,
            Self::Int5Block { .. } => 5,
            Self::Int4PerChannel | Self::Int4Block { .. } | Self::Int4Expansion { .. } => 4,
        }
    }

    /// The codes of an integer format: of 8 bits with a sign, of fewer without.
    pub fn codes(self) -> std::ops::RangeInclusive<i8> {
        if self.bits() < 8 { 0..=((1 << self.bits()) - 1) } else { i8::MIN..=i8::MAX }
    }

    /// The code that means 0 in a symmetric encoding; 0 of float formats.
    pub fn zero_code(self) -> i8 {
        if self.bits() < 8 { 1 << (self.bits() - 1) } else { 0 }
    }

    /// What the number of inputs in a block is a multiple of: what a row of codes holds, or rows that share upper bits.
    fn block_step(self) -> usize {
        match self.bits() {
            4 => 8,
            5 | 6 => shared_inputs(self.bits() - 4),
            _ => 4,
        }
    }
}

/// Inputs whose codes share a row of upper bits, `high` (1 or 2) of each.
fn shared_inputs(high: usize) -> usize {
    32 / high
}

/// Where the lower four bits of group `group` of four inputs lie, and where its upper `high` bits do, if it has any: rows of 64
/// bytes, and how far the bits are shifted up. This is where the head of this module says that they are.
pub(crate) fn code_places(group: usize, high: usize) -> [Place; 2] {
    let low = Place { row: group / 2, shift: group % 2 * 4 };
    if high == 0 {
        return [low; 2];
    }
    let groups = shared_inputs(high) / 4;
    let rows = groups / 2 + 1;
    let first = group / groups * rows;
    let low = Place { row: first + group % groups / 2, ..low };
    [low, Place { row: first + rows - 1, shift: (4 + group % groups * high) % 8 }]
}

/// See [`code_places`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) row: usize,
    pub(crate) shift: usize,
}

/// The shape and format of a packed matrix, with every size checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PackedLayout {
    n: usize,
    k: usize,
    format: WeightFormat,
    tight: bool,
    sections: Sections,
}

/// Where the sections of a blob lie, in bytes: codes first, offsets last. Worked out once, for there is a view of each weight in
/// each step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Sections {
    code_bytes: usize,
    scales_at: usize,
    scale_bytes: usize,
    offsets_at: usize,
    size: usize,
}

impl PackedLayout {
    /// A layout for `n` outputs and `k` inputs.
    ///
    /// # Errors
    /// [`ShapeError`] if `n` or `k` is 0, a block breaks the rules in [`WeightFormat`], an integer format has more than
    /// [`MAX_INTEGER_K`] inputs, or the bytes would not fit in memory.
    pub fn new(n: usize, k: usize, format: WeightFormat) -> Result<Self, ShapeError> {
        if n == 0 || k == 0 {
            return Err(ShapeError::new("smaller side of a weight matrix", 0, Needed::AtLeast(1)));
        }
        if !format.is_float() {
            expect_at_most("inputs of an integer weight", k, MAX_INTEGER_K)?;
        }
        if let Some(block) = format.block().or(format.step_block()) {
            let step = format.block_step();
            expect_at_most("weight block", block, MAX_BLOCK)?;
            if block == 0 || block % step != 0 {
                return Err(ShapeError::new("weight block", block, Needed::MultipleOf(step)));
            }
            if !k.is_multiple_of(block) {
                return Err(ShapeError::new("weight block", block, Needed::DivisorOf(k)));
            }
        }
        // The largest matrix we can index: 4 times the f32 size leaves room for all sections and their padding.
        size("bytes of a weight matrix", &[n.saturating_add(15), k.saturating_add(7), 16])?;
        Ok(Self { n, k, format, tight: false, sections: Sections::default() }.with_sections())
    }

    /// The layout with the least padding, see the head of this module. Formats with blocks have no other than
    /// [`new`](Self::new)'s.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn tight(n: usize, k: usize, format: WeightFormat) -> Result<Self, ShapeError> {
        let blocks = format.block().or(format.step_block());
        Ok(Self { tight: blocks.is_none(), ..Self::new(n, k, format)? }.with_sections())
    }

    fn with_sections(mut self) -> Self {
        let last = self.panels() - 1;
        let code_bytes = last * self.panel_code_bytes() + self.panel_code_bytes() / PANEL * self.width(last);
        let scales_at = code_bytes.next_multiple_of(SECTION_ALIGN_BYTES);
        let scale_bytes = self.panels() * self.panel_scale_bytes();
        let offsets_at = (scales_at + scale_bytes).next_multiple_of(SECTION_ALIGN_BYTES);
        let size = offsets_at + self.panels() * self.panel_offset_bytes();
        self.sections = Sections { code_bytes, scales_at, scale_bytes, offsets_at, size };
        self
    }

    /// Whether this is a [`tight`](Self::tight) layout.
    pub fn is_tight(&self) -> bool {
        self.tight
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// How the elements are stored.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// Panels of [`PANEL`] outputs.
    pub fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// Outputs of panel `panel` as stored: 16, or 4, 8 or 12 in the last one of a tight layout.
    pub fn width(&self, panel: usize) -> usize {
        if self.tight { (self.n - panel * PANEL).next_multiple_of(TIGHT_STEP).min(PANEL) } else { PANEL }
    }

    /// Inputs as stored: `k` padded to 8 in the integer formats, to 4 in tight 8-bit ones.
    pub fn k_padded(&self) -> usize {
        match (self.format.is_float(), self.tight && self.format.bits() == 8) {
            (true, _) => self.k,
            (false, true) => self.k.next_multiple_of(4),
            (false, false) => self.k.next_multiple_of(8),
        }
    }

    /// Blocks in one row: `k / block`, or 1 without blocks.
    pub fn blocks(&self) -> usize {
        self.format.block().map_or(1, |block| self.k / block)
    }

    /// Steps in one row: `k / block` of an expansion format, 0 of others.
    pub fn steps(&self) -> usize {
        self.format.step_block().map_or(0, |block| self.k / block)
    }

    /// Bytes of the whole blob.
    pub fn size_bytes(&self) -> usize {
        self.sections.size
    }

    /// A view of `blob`, which must have exactly [`size_bytes`](Self::size_bytes) bytes.
    ///
    /// # Errors
    /// [`ShapeError`] if the length differs. Any bytes of the right length are accepted: they are numbers, right or wrong. But
    /// only with steps of 1 to [`MAX_STEP`] do all tiers agree on products with an expansion format.
    pub fn view<'a>(&self, blob: &'a [u8]) -> Result<PackedWeights<'a>, ShapeError> {
        // Steps are not looked at: that would read pages of a mapped file that nobody needs yet.
        let Sections { code_bytes, scales_at, scale_bytes, offsets_at, size } = self.sections;
        expect_len("bytes of packed weights", blob.len(), size)?;
        Ok(PackedWeights {
            layout: *self,
            codes: &blob[..code_bytes],
            scales: &blob[scales_at..][..scale_bytes],
            offsets: &blob[offsets_at..],
            row_sums: &[],
        })
    }

    /// Bytes of a full panel's codes: where the next panel starts.
    pub(crate) fn panel_code_bytes(&self) -> usize {
        self.k_padded() * PANEL * self.format.bits() / 8
    }

    pub(crate) fn panel_scale_bytes(&self) -> usize {
        match self.format {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => 0,
            WeightFormat::Int8PerChannel | WeightFormat::Int4PerChannel | WeightFormat::Int4Expansion { .. } => {
                PANEL * 4
            }
            WeightFormat::Int8Block { .. }
            | WeightFormat::Int4Block { .. }
            | WeightFormat::Int5Block { .. }
            | WeightFormat::Int6Block { .. } => self.blocks() * PANEL * 2,
        }
    }

    pub(crate) fn panel_offset_bytes(&self) -> usize {
        match self.format.block_offset() {
            BlockOffset::Symmetric => self.steps() * PANEL,
            BlockOffset::Integer => self.blocks() * PANEL,
            BlockOffset::Min => self.blocks() * PANEL * 2,
        }
    }
}

/// Packed weights, borrowed: a layout and its three sections.
#[derive(Debug, Clone, Copy)]
pub struct PackedWeights<'a> {
    layout: PackedLayout,
    codes: &'a [u8],
    scales: &'a [u8],
    offsets: &'a [u8],
    /// `[n]`, or empty.
    row_sums: &'a [f32],
}

impl<'a> PackedWeights<'a> {
    /// The same weights with the sum of each row, which products with rows on a shifted grid need (see
    /// [`crate::QuantizedRows::shift`]).
    ///
    /// # Errors
    /// [`ShapeError`] unless there are `n` sums.
    pub fn with_row_sums(self, row_sums: &'a [f32]) -> Result<PackedWeights<'a>, ShapeError> {
        expect_len("sums of rows of weights", row_sums.len(), self.layout.n)?;
        Ok(PackedWeights { row_sums, ..self })
    }

    /// The sum of each row; empty unless they were given.
    pub(crate) fn row_sums(&self) -> &'a [f32] {
        self.row_sums
    }

    /// The shape and format.
    pub fn layout(&self) -> PackedLayout {
        self.layout
    }

    /// Writes row `row` as floats to `out`, `[k]`: exactly the numbers that the encoding stands for, rounded once to f32.
    ///
    /// # Panics
    /// If `row >= n` or `out` is not `k` long.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.layout.n && out.len() == self.layout.k, "row {row}, {} values", out.len());
        let block = self.layout.format.block().unwrap_or(self.layout.k);
        let is_8bit = matches!(self.layout.format, WeightFormat::Int8PerChannel | WeightFormat::Int8Block { .. });
        for (b, out) in out.chunks_mut(block).enumerate() {
            let (scale, min) = (self.stored_scale(row, b * block), self.min_of_code_zero(row, b * block));
            if is_8bit && block.is_multiple_of(4) {
                self.dequantize_fours(row, b * block, scale, out);
                continue;
            }
            for (i, out) in out.iter_mut().enumerate() {
                *out = self.value(row, b * block + i, scale, min);
            }
        }
    }

    /// The same for 8-bit codes of one scale from `k`, a multiple of 4, on: four lie together. Tables of embeddings are of these.
    fn dequantize_fours(&self, row: usize, k: usize, scale: f32, out: &mut [f32]) {
        let (panel, lane) = (row / PANEL, row % PANEL);
        let row_bytes = self.layout.width(panel) * 4;
        let codes = &self.codes[panel * self.layout.panel_code_bytes() + k / 4 * row_bytes..];
        for (out, codes) in out.chunks_mut(4).zip(codes.chunks_exact(row_bytes)) {
            let codes = &codes[lane * 4..][..4];
            out.iter_mut().zip(codes).for_each(|(out, code)| *out = f32::from(code.cast_signed()) * scale);
        }
    }

    /// The integer code at (`row`, `k`), one of the format's [`codes`](WeightFormat::codes); 0 for float formats.
    pub fn code(&self, row: usize, k: usize) -> i32 {
        let (panel, lane) = (row / PANEL, row % PANEL);
        let codes = &self.codes[panel * self.layout.panel_code_bytes()..];
        let row_bytes = self.layout.width(panel) * 4;
        let byte = |row: usize| codes[row * row_bytes + lane * 4 + k % 4];
        let bits = self.layout.format.bits();
        match bits {
            8 => i32::from(byte(k / 4).cast_signed()),
            4..8 => {
                let [low, high] = code_places(k / 4, bits - 4);
                let mask = (1 << (bits - 4)) - 1;
                i32::from(byte(low.row) >> low.shift & 15 | (byte(high.row) >> high.shift & mask) << 4)
            }
            _ => 0,
        }
    }

    /// The scale that applies at (`row`, `k`), the step included and rounded; 1 for float formats.
    pub fn scale(&self, row: usize, k: usize) -> f32 {
        self.stored_scale(row, k) * self.step(row, k) as f32
    }

    /// The step at (`row`, `k`); 1 for all but the expansion formats.
    fn step(&self, row: usize, k: usize) -> i32 {
        self.layout.format.step_block().map_or(1, |block| {
            let at = (row / PANEL * self.layout.steps() + k / block) * PANEL + row % PANEL;
            i32::from(self.offsets[at])
        })
    }

    fn stored_scale(&self, row: usize, k: usize) -> f32 {
        match self.layout.format {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => 1.0,
            WeightFormat::Int8PerChannel | WeightFormat::Int4PerChannel | WeightFormat::Int4Expansion { .. } => {
                f32_at(self.scales, row)
            }
            WeightFormat::Int8Block { .. }
            | WeightFormat::Int4Block { .. }
            | WeightFormat::Int5Block { .. }
            | WeightFormat::Int6Block { .. } => f16_at(self.scales, self.block_index(row, k)),
        }
    }

    /// The additive term at (`row`, `k`): `float = code * scale + min`, with `min = offset * scale` where the offset is an
    /// integer. 0 for 8-bit and float formats.
    pub fn min(&self, row: usize, k: usize) -> f32 {
        match self.min_of_code_zero(row, k) {
            Zero::Offset(offset) => offset as f32 * self.scale(row, k),
            Zero::Min(min) => min,
        }
    }

    /// The float at (`row`, `k`).
    pub(crate) fn dequantize(&self, row: usize, k: usize) -> f32 {
        self.value(row, k, self.stored_scale(row, k), self.min_of_code_zero(row, k))
    }

    pub(crate) fn codes_from(&self, panel: usize) -> &'a [u8] {
        &self.codes[panel * self.layout.panel_code_bytes()..]
    }

    pub(crate) fn scales_from(&self, panel: usize) -> &'a [u8] {
        &self.scales[panel * self.layout.panel_scale_bytes()..]
    }

    pub(crate) fn offsets_from(&self, panel: usize) -> &'a [u8] {
        &self.offsets[panel * self.layout.panel_offset_bytes()..]
    }

    /// The value at (`row`, `k`), given the scale and zero of its block.
    fn value(&self, row: usize, k: usize, scale: f32, zero: Zero) -> f32 {
        let panel = row / PANEL;
        let at = panel * PANEL * self.layout.k + k * self.layout.width(panel) + row % PANEL;
        match (self.layout.format, zero) {
            (WeightFormat::F32, _) => f32_at(self.codes, at),
            (WeightFormat::F16, _) => f16_at(self.codes, at),
            (WeightFormat::Bf16, _) => bf16::from_le_bytes([self.codes[at * 2], self.codes[at * 2 + 1]]).to_f32(),
            (WeightFormat::Int4Expansion { .. }, Zero::Offset(offset)) => {
                ((self.code(row, k) + offset) * self.step(row, k)) as f32 * scale
            }
            (_, Zero::Offset(offset)) => (self.code(row, k) + offset) as f32 * scale,
            (_, Zero::Min(min)) => self.code(row, k) as f32 * scale + min,
        }
    }

    fn min_of_code_zero(&self, row: usize, k: usize) -> Zero {
        let format = self.layout.format;
        match format.block_offset() {
            BlockOffset::Symmetric => Zero::Offset(-i32::from(format.zero_code())),
            BlockOffset::Integer => Zero::Offset(i32::from(self.offsets[self.block_index(row, k)].cast_signed())),
            BlockOffset::Min => Zero::Min(f16_at(self.offsets, self.block_index(row, k))),
        }
    }

    fn block_index(&self, row: usize, k: usize) -> usize {
        let block = self.layout.format.block().unwrap_or(self.layout.k);
        (row / PANEL * self.layout.blocks() + k / block) * PANEL + row % PANEL
    }
}

/// What is added to a code (before the scale) or to its product (after it).
#[derive(Clone, Copy)]
enum Zero {
    Offset(i32),
    Min(f32),
}

fn f32_at(bytes: &[u8], i: usize) -> f32 {
    let bytes = &bytes[i * 4..i * 4 + 4];
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn f16_at(bytes: &[u8], i: usize) -> f32 {
    f16::from_le_bytes([bytes[i * 2], bytes[i * 2 + 1]]).to_f32()
}

/// Outputs in a panel.
pub const PANEL: usize = 16;

/// The last panel of a tight layout has a multiple of this many outputs: what the narrowest vector registers hold.
const TIGHT_STEP: usize = 4;

/// Largest number of inputs that share a scale: keeps a block's integer dot product inside i32.
pub const MAX_BLOCK: usize = 256;

/// Largest step of an expansion format: `-8 · 16` is the least that a byte holds.
pub const MAX_STEP: u8 = 16;

/// Largest `k` of an integer format: keeps a whole row's integer dot product inside i32 (128 · 127 · 65536 < 2^31).
pub const MAX_INTEGER_K: usize = 65536;

/// Each section of a blob starts at a multiple of this.
const SECTION_ALIGN_BYTES: usize = 64;

#[cfg(test)]
mod tests;
