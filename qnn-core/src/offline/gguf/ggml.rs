//! GGML's block formats: every element is `code · scale + min` with a scale and minimum for each run of a block.

use std::sync::Mutex;

use half::f16;
use htp_sim::{Workers, round_to_f16};

use crate::{
    encoding::{BlockOffsets, Encoding, Floats},
    offline::{
        quantize_weights::{QuantizeError, Quantized, pack_nibbles},
        source::{Change, SourceTensor},
    },
    types::DataType,
};

/// Element formats of a GGUF that can be imported. The numbers are those of `ggml_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names are GGML's own")]
pub enum GgmlType {
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2K = 10,
    Q3K = 11,
    Q4K = 12,
    Q5K = 13,
    Q6K = 14,
    Iq4Nl = 20,
    Iq4Xs = 23,
}

/// One block, taken apart: codes, and a scale and minimum for each run of [`GgmlType::run`] of them.
struct Unpacked {
    codes: [i8; MAX_BLOCK],
    scales: [f32; MAX_RUNS],
    mins: [f32; MAX_RUNS],
}

/// The encoding of ours that holds a format's grid.
#[derive(Clone, Copy)]
enum Grid {
    /// Four bits, symmetric.
    Four,
    /// Four bits and a float minimum.
    FourMin,
    /// Five bits, symmetric.
    Five,
    /// Five bits and a float minimum.
    FiveMin,
    /// Six bits, symmetric.
    Six,
    /// Eight bits, symmetric.
    Eight,
}

impl GgmlType {
    /// Every format, in the order of its number.
    pub const ALL: &[GgmlType] = &[
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Q8_0,
        GgmlType::Q2K,
        GgmlType::Q3K,
        GgmlType::Q4K,
        GgmlType::Q5K,
        GgmlType::Q6K,
        GgmlType::Iq4Nl,
        GgmlType::Iq4Xs,
    ];

    /// The format with GGML's number `number`.
    pub fn from_number(number: u32) -> Option<GgmlType> {
        Self::ALL.iter().copied().find(|t| *t as u32 == number)
    }

    /// GGML's name.
    pub fn name(self) -> &'static str {
        match self {
            GgmlType::Q4_0 => "Q4_0",
            GgmlType::Q4_1 => "Q4_1",
            GgmlType::Q5_0 => "Q5_0",
            GgmlType::Q5_1 => "Q5_1",
            GgmlType::Q8_0 => "Q8_0",
            GgmlType::Q2K => "Q2_K",
            GgmlType::Q3K => "Q3_K",
            GgmlType::Q4K => "Q4_K",
            GgmlType::Q5K => "Q5_K",
            GgmlType::Q6K => "Q6_K",
            GgmlType::Iq4Nl => "IQ4_NL",
            GgmlType::Iq4Xs => "IQ4_XS",
        }
    }

    /// Elements of one block.
    pub fn block_elements(self) -> usize {
        match self {
            GgmlType::Q2K | GgmlType::Q3K | GgmlType::Q4K | GgmlType::Q5K | GgmlType::Q6K | GgmlType::Iq4Xs => 256,
            _ => 32,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            GgmlType::Q4_0 | GgmlType::Iq4Nl => 18,
            GgmlType::Q4_1 => 20,
            GgmlType::Q5_0 => 22,
            GgmlType::Q5_1 => 24,
            GgmlType::Q8_0 => 34,
            GgmlType::Q2K => 84,
            GgmlType::Q3K => 110,
            GgmlType::Q4K => 144,
            GgmlType::Q5K => 176,
            GgmlType::Q6K => 210,
            GgmlType::Iq4Xs => 136,
        }
    }

    /// Elements that share a scale and minimum.
    pub fn run(self) -> usize {
        match self {
            GgmlType::Q2K | GgmlType::Q3K | GgmlType::Q6K => 16,
            _ => 32,
        }
    }

    /// What [`GgmlType::keep_grid`] does to the numbers.
    pub fn change(self) -> Change {
        match self {
            GgmlType::Q4_0 | GgmlType::Q4_1 | GgmlType::Q5_0 | GgmlType::Q5_1 | GgmlType::Q8_0 | GgmlType::Iq4Nl => {
                Change::None
            }
            GgmlType::Q2K | GgmlType::Q3K | GgmlType::Q4K | GgmlType::Q5K | GgmlType::Q6K | GgmlType::Iq4Xs => {
                Change::ScalesToF16
            }
        }
    }

    fn grid(self) -> Grid {
        match self {
            GgmlType::Q4_0 | GgmlType::Q3K => Grid::Four,
            GgmlType::Q4_1 | GgmlType::Q2K | GgmlType::Q4K => Grid::FourMin,
            GgmlType::Q5_0 => Grid::Five,
            GgmlType::Q5_1 | GgmlType::Q5K => Grid::FiveMin,
            GgmlType::Q6K => Grid::Six,
            GgmlType::Q8_0 | GgmlType::Iq4Nl | GgmlType::Iq4Xs => Grid::Eight,
        }
    }

    /// Writes the elements of whole blocks to `out`.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        let mut block = Unpacked::new();
        for (bytes, out) in bytes.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(self.block_elements())) {
            self.unpack(bytes, &mut block);
            for (i, out) in out.iter_mut().enumerate() {
                let run = i / self.run();
                *out = f32::from(block.codes[i]) * block.scales[run] + block.mins[run];
            }
        }
    }

    /// Brings `tensor`, which is in this format, to an encoding of ours that has the same grid.
    ///
    /// Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL come out exactly. The K formats and IQ4_XS keep their codes; their scales (and
    /// minima), products of two numbers, are rounded to f16: a relative error of at most 2^-11 in the normal range.
    ///
    /// # Errors
    /// [`QuantizeError`] if a scale is not finite or too large for f16.
    pub fn keep_grid(self, tensor: &SourceTensor, workers: &Workers) -> Result<Quantized, QuantizeError> {
        let grid = self.grid();
        let four = matches!(grid, Grid::Four | Grid::FourMin);
        let (n, k, runs) = (tensor.n(), tensor.k(), tensor.k() / self.run());
        let row_codes = if four { k / 2 } else { k };
        let (mut codes, mut scales, mut mins) = (vec![0; n * row_codes], vec![0.0; n * runs], vec![0.0; n * runs]);
        let rows: Vec<_> = codes
            .chunks_mut(row_codes)
            .zip(scales.chunks_mut(runs))
            .zip(mins.chunks_mut(runs))
            .map(|((codes, scales), mins)| Mutex::new((codes, scales, mins, true)))
            .collect();
        workers.for_each(n, |row, _| {
            // One worker takes one row; the lock is never waited for.
            let mut out = rows[row].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let (codes, scales, mins, fits) = &mut *out;
            *fits = self.copy_row(tensor.row_bytes(row..row + 1), codes, scales, mins);
        });
        for (row, out) in rows.into_iter().enumerate() {
            if !out.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()).3 {
                return Err(QuantizeError::TooLarge { tensor: tensor.name.clone(), row });
            }
        }
        let minima = || BlockOffsets::Min(Floats::from_f16(&mins));
        let (bitwidth, data_type, offsets) = match grid {
            Grid::Four => (4, DataType::SFixedPoint4, BlockOffsets::Symmetric),
            Grid::FourMin => (4, DataType::UFixedPoint4, minima()),
            Grid::Five => (5, DataType::SFixedPoint8, BlockOffsets::Symmetric),
            Grid::FiveMin => (5, DataType::UFixedPoint8, minima()),
            Grid::Six => (6, DataType::SFixedPoint8, BlockOffsets::Symmetric),
            Grid::Eight => (8, DataType::SFixedPoint8, BlockOffsets::Symmetric),
        };
        let (block_size, scales) = (self.run(), Floats::from_f16(&scales));
        let encoding = Encoding::Block { bitwidth, block_size, scales, offsets };
        Ok(Quantized { data_type, data: codes.into(), encoding, squared_error: 0.0 })
    }

    /// Copies the codes, scales and minima of one row; false if f16 cannot hold one.
    fn copy_row(self, bytes: &[u8], codes: &mut [u8], scales: &mut [f32], mins: &mut [f32]) -> bool {
        let (elements, runs) = (self.block_elements(), self.block_elements() / self.run());
        let mut block = Unpacked::new();
        let mut fits = true;
        for (i, bytes) in bytes.chunks_exact(self.block_bytes()).enumerate() {
            self.unpack(bytes, &mut block);
            let bytes_per_block = codes.len() / (scales.len() / runs);
            let out = &mut codes[i * bytes_per_block..][..bytes_per_block];
            if bytes_per_block == elements {
                for (out, code) in out.iter_mut().zip(&block.codes) {
                    *out = code.cast_unsigned();
                }
            } else {
                pack_nibbles(&block.codes[..elements], out);
            }
            for run in 0..runs {
                let (scale, min) = (round_to_f16(block.scales[run]), round_to_f16(block.mins[run]));
                fits &= scale.is_some() && min.is_some();
                scales[i * runs + run] = scale.unwrap_or(0.0);
                mins[i * runs + run] = min.unwrap_or(0.0);
            }
        }
        fits
    }

    fn unpack(self, bytes: &[u8], out: &mut Unpacked) {
        match self {
            GgmlType::Q4_0 => out.simple(bytes, Simple { min_at: None, high_at: None, codes_at: 2, zero: 8 }),
            GgmlType::Q4_1 => out.simple(bytes, Simple { min_at: Some(2), high_at: None, codes_at: 4, zero: 0 }),
            GgmlType::Q5_0 => out.simple(bytes, Simple { min_at: None, high_at: Some(2), codes_at: 6, zero: 16 }),
            GgmlType::Q5_1 => out.simple(bytes, Simple { min_at: Some(2), high_at: Some(4), codes_at: 8, zero: 0 }),
            GgmlType::Q8_0 => {
                (out.scales[0], out.mins[0]) = (half_at(bytes, 0), 0.0);
                for (code, byte) in out.codes.iter_mut().zip(&bytes[2..34]) {
                    *code = byte.cast_signed();
                }
            }
            GgmlType::Q2K => out.q2k(bytes),
            GgmlType::Q3K => out.q3k(bytes),
            GgmlType::Q4K => out.k45(bytes, None, 16),
            GgmlType::Q5K => out.k45(bytes, Some(16), 48),
            GgmlType::Q6K => out.q6k(bytes),
            GgmlType::Iq4Nl => {
                (out.scales[0], out.mins[0]) = (half_at(bytes, 0), 0.0);
                nonlinear(&bytes[2..18], &mut out.codes[..32]);
            }
            GgmlType::Iq4Xs => out.iq4xs(bytes),
        }
    }
}

/// Where the fields of a 32-element block lie.
struct Simple {
    min_at: Option<usize>,
    high_at: Option<usize>,
    codes_at: usize,
    zero: i8,
}

impl Unpacked {
    fn new() -> Unpacked {
        Unpacked { codes: [0; MAX_BLOCK], scales: [0.0; MAX_RUNS], mins: [0.0; MAX_RUNS] }
    }

    /// 32 codes: the low halves of 16 bytes, then the high halves; a fifth bit, if any, in a 32-bit field.
    fn simple(&mut self, bytes: &[u8], at: Simple) {
        self.scales[0] = half_at(bytes, 0);
        self.mins[0] = at.min_at.map_or(0.0, |at| half_at(bytes, at));
        let high =
            at.high_at.map_or(0, |at| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]));
        for (i, pair) in bytes[at.codes_at..at.codes_at + 16].iter().enumerate() {
            let fifth = |i: usize| ((high >> i & 1) as u8) << 4;
            self.codes[i] = (pair & 15 | fifth(i)).cast_signed() - at.zero;
            self.codes[i + 16] = (pair >> 4 | fifth(i + 16)).cast_signed() - at.zero;
        }
    }

    /// Q2_K: sixteen runs of 16, a nibble of scale and one of minimum each, times two halves; codes as [`two_bits`] has them.
    fn q2k(&mut self, bytes: &[u8]) {
        let (scale, min) = (half_at(bytes, 80), half_at(bytes, 82));
        for (run, pair) in bytes[..16].iter().enumerate() {
            (self.scales[run], self.mins[run]) = (scale * f32::from(pair & 15), -(min * f32::from(pair >> 4)));
        }
        for (i, code) in self.codes.iter_mut().enumerate() {
            *code = two_bits(&bytes[16..80], i).cast_signed();
        }
    }

    /// Q3_K: sixteen runs of 16 with six-bit signed scales times one half; a third bit of each code lies apart, in bit
    /// `i / 32` of byte `i % 32`, and without it 4 is taken off.
    fn q3k(&mut self, bytes: &[u8]) {
        let (high, codes, packed, scale) = (&bytes[..32], &bytes[32..96], &bytes[96..108], half_at(bytes, 108));
        for run in 0..16 {
            let low = if run < 8 { packed[run] & 15 } else { packed[run - 8] >> 4 };
            let six = low | (packed[8 + run % 4] >> (run / 4 * 2) & 3) << 4;
            (self.scales[run], self.mins[run]) = (scale * f32::from(six.cast_signed() - 32), 0.0);
        }
        for (i, code) in self.codes.iter_mut().enumerate() {
            let third = high[i % 32] >> (i / 32) & 1;
            *code = (two_bits(codes, i) | third << 2).cast_signed() - 4;
        }
    }

    /// IQ4_XS: eight runs of 32 codes of the uneven grid, with six-bit signed scales times one half.
    fn iq4xs(&mut self, bytes: &[u8]) {
        let (scale, high) = (half_at(bytes, 0), u16::from_le_bytes([bytes[2], bytes[3]]));
        for run in 0..8 {
            let low = bytes[4 + run / 2] >> (run % 2 * 4) & 15;
            let six = low | ((high >> (run * 2) & 3) as u8) << 4;
            (self.scales[run], self.mins[run]) = (scale * f32::from(six.cast_signed() - 32), 0.0);
            nonlinear(&bytes[8 + run * 16..][..16], &mut self.codes[run * 32..][..32]);
        }
    }

    /// Q4_K and Q5_K: eight runs of 32, six-bit scales and minima times two halves; the fifth bits of run `r` are bit `r`
    /// of 32 bytes.
    fn k45(&mut self, bytes: &[u8], high_at: Option<usize>, codes_at: usize) {
        let (scale, min) = (half_at(bytes, 0), half_at(bytes, 2));
        let packed = &bytes[4..16];
        for run in 0..8 {
            let (s, m) = if run < 4 {
                (packed[run] & 63, packed[run + 4] & 63)
            } else {
                let (low, s_high, m_high) = (packed[run + 4], packed[run - 4] >> 6, packed[run] >> 6);
                (low & 15 | s_high << 4, low >> 4 | m_high << 4)
            };
            (self.scales[run], self.mins[run]) = (scale * f32::from(s), -(min * f32::from(m)));
            let codes = &bytes[codes_at + run / 2 * 32..][..32];
            for (i, pair) in codes.iter().enumerate() {
                let low = if run % 2 == 0 { pair & 15 } else { pair >> 4 };
                let fifth = high_at.map_or(0, |at| (bytes[at + i] >> run & 1) << 4);
                self.codes[run * 32 + i] = (low | fifth).cast_signed();
            }
        }
    }

    /// Q6_K: two halves of 128, each four rows of 32 whose low four and high two bits lie apart; runs of 16.
    fn q6k(&mut self, bytes: &[u8]) {
        let (low, high, scales, scale) = (&bytes[..128], &bytes[128..192], &bytes[192..208], half_at(bytes, 208));
        for (run, s) in scales.iter().enumerate() {
            (self.scales[run], self.mins[run]) = (scale * f32::from(s.cast_signed()), 0.0);
        }
        for (i, code) in self.codes.iter_mut().enumerate() {
            let (part, row, column) = (i / 128, i % 128 / 32, i % 32);
            let pair = low[part * 64 + row % 2 * 32 + column];
            let four = if row < 2 { pair & 15 } else { pair >> 4 };
            let two = high[part * 32 + column] >> (row * 2) & 3;
            *code = (four | two << 4).cast_signed() - 32;
        }
    }
}

/// Code `i` of a block of two-bit codes: two halves of 128, each four rows of 32 in the same 32 bytes.
fn two_bits(codes: &[u8], i: usize) -> u8 {
    codes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3
}

/// 32 codes of the uneven grid: the low halves of 16 bytes, then the high halves.
fn nonlinear(pairs: &[u8], out: &mut [i8]) {
    let (low, high) = out.split_at_mut(16);
    for ((pair, low), high) in pairs.iter().zip(low).zip(high) {
        (*low, *high) = (UNEVEN[usize::from(pair & 15)], UNEVEN[usize::from(pair >> 4)]);
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

const MAX_BLOCK: usize = 256;
const MAX_RUNS: usize = 16;
/// What the sixteen codes of IQ4_NL and IQ4_XS stand for, before the scale.
const UNEVEN: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
