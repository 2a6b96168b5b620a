//! Many rows of x by weights with a scale per output: two panels by some rows at a time.
//!
//! Each load of x meets both panels, so that loads keep up with two products a cycle. Weights are unpacked once for all rows, a
//! piece of k at a time, so that both panels' codes stay in the first cache.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::{Place, Planes, channel_finish, load_bytes, load_i8, store};
use crate::arch::x86_64::prefetch;
use crate::kernels::{IntegerTile, MAX_TILE_ROWS};
use crate::packed::PANEL;

/// Whether [`product`] can compute the tile.
pub(super) fn fits(tile: &IntegerTile<'_>) -> bool {
    tile.rows >= FEWEST_ROWS && tile.width == PANEL
}

/// The product of a tile that [`fits`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn product<const CODES: u8>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    match tile.lo.is_empty() {
        true => pieces::<CODES, 1>(tile, out),
        false => pieces::<CODES, 2>(tile, out),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn pieces<const CODES: u8, const PLANES: usize>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    let (mut unpacked, mut sums) = (Unpacked::uninit(), Sums::uninit());
    for panel in (0..tile.panels).step_by(PANELS) {
        let panels = panel..tile.panels.min(panel + PANELS);
        for from in (0..tile.k).step_by(PIECE) {
            let inputs = from..tile.k.min(from + PIECE);
            for (to, panel) in unpacked.0.iter_mut().zip(panels.clone()) {
                unpack::<CODES>(tile, panel, inputs.start, &mut to[..inputs.len() / 4]);
            }
            let (zero, bits) = (zero::<CODES>(), bits::<CODES>());
            let mut piece = Piece { tile, panel, inputs, codes: &unpacked, zero, bits, sums: &mut sums };
            match panels.len() {
                1 => piece.rows::<PLANES, 1>(out),
                _ => piece.rows::<PLANES, 2>(out),
            }
        }
    }
}

/// Some inputs of one or two panels.
struct Piece<'a, 't> {
    tile: &'a IntegerTile<'t>,
    /// The first panel.
    panel: usize,
    inputs: Range<usize>,
    /// Both panels' codes of these inputs.
    codes: &'a Unpacked,
    /// What they have too much.
    zero: i32,
    /// How they are stored.
    bits: usize,
    /// What the pieces before left, if there are any.
    sums: &'a mut Sums,
}

impl Piece<'_, '_> {
    /// All rows by `W` panels.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn rows<const PLANES: usize, const W: usize>(&mut self, out: &mut [f32]) {
        let (n, mut row) = (self.tile.rows, 0);
        while row < n {
            let first = row;
            // As many sums as registers hold beside what they are made of.
            row += match n - row {
                12.. if PLANES == 1 => self.group::<PLANES, W, 12>(row, out),
                6.. => self.group::<PLANES, W, 6>(row, out),
                2.. => self.group::<PLANES, W, 2>(row, out),
                _ => self.group::<PLANES, W, 1>(row, out),
            };
            self.ask_for_next(first..row);
        }
    }

    /// Asks for what of the next piece falls to some rows of this one.
    #[inline]
    fn ask_for_next(&self, rows: Range<usize>) {
        let tile = self.tile;
        let bytes_of = |inputs: usize| inputs * self.bits / 8 * PANEL;
        let (first, from) = match self.inputs.end < tile.k {
            true => (self.panel, self.inputs.end),
            false => (self.panel + PANELS, 0),
        };
        for panel in first..first + PANELS {
            let bytes = tile.codes.get(panel * tile.panel_bytes + bytes_of(from)..).unwrap_or_default();
            let bytes = &bytes[..bytes_of(PIECE.min(tile.k - from)).min(bytes.len())];
            let at = |row: usize| bytes.len() * row / tile.rows;
            prefetch(&bytes[at(rows.start)..at(rows.end)]);
        }
    }

    /// `ROWS` rows by `W` panels; returns `ROWS`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn group<const PLANES: usize, const W: usize, const ROWS: usize>(&mut self, row: usize, out: &mut [f32]) -> usize {
        let planes = Planes::<PLANES>::new(self.tile, row);
        let mut acc = [[[_mm512_setzero_si512(); W]; PLANES]; ROWS];
        if self.inputs.start > 0 {
            for (r, acc) in acc.iter_mut().enumerate() {
                for (plane, acc) in acc.iter_mut().enumerate() {
                    for (w, acc) in acc.iter_mut().enumerate() {
                        // SAFETY: the piece before wrote the sums of all rows, planes and panels.
                        *acc = unsafe { self.sums.0[row + r][plane][w].assume_init() };
                    }
                }
            }
        }
        for (four, k) in self.inputs.clone().step_by(4).enumerate() {
            let mut codes = [_mm512_setzero_si512(); W];
            for (w, codes) in codes.iter_mut().enumerate() {
                // SAFETY: `pieces` wrote as many groups of four inputs, for each of the panels.
                *codes = unsafe { self.codes.0[w][four].assume_init() };
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                for (plane, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: x has `tile.k` bytes in each plane of each row (the tile's promise).
                    let x = unsafe { planes.broadcast(plane, r, k) };
                    for (acc, codes) in acc.iter_mut().zip(codes) {
                        *acc = _mm512_dpbusd_epi32(*acc, codes, x);
                    }
                }
            }
        }
        if self.inputs.end == self.tile.k {
            self.finish(row, acc, out);
            return ROWS;
        }
        for (r, acc) in acc.into_iter().enumerate() {
            for (plane, acc) in acc.into_iter().enumerate() {
                for (w, acc) in acc.into_iter().enumerate() {
                    self.sums.0[row + r][plane][w].write(acc);
                }
            }
        }
        ROWS
    }

    /// Makes floats of the sums.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn finish<const PLANES: usize, const W: usize, const ROWS: usize>(
        &self,
        row: usize,
        sums: [[[__m512i; W]; PLANES]; ROWS],
        out: &mut [f32],
    ) {
        let tile = self.tile;
        for (w, panel) in (self.panel..).enumerate().take(W) {
            let mut dots = [[_mm512_setzero_si512(); PLANES]; ROWS];
            for (r, dots) in dots.iter_mut().enumerate() {
                for (plane, dot) in dots.iter_mut().enumerate() {
                    let excess = tile.plane_sums[row + r][plane].wrapping_mul(self.zero);
                    *dot = _mm512_sub_epi32(sums[r][plane][w], _mm512_set1_epi32(excess));
                }
            }
            let values = channel_finish::<PLANES, ROWS>(tile, Place { panel, row }, dots);
            for (r, values) in values.into_iter().enumerate() {
                store(&mut out[((row + r) * tile.panels + panel) * PANEL..], values);
            }
        }
    }
}

/// What unsigned codes have too much.
const fn zero<const CODES: u8>() -> i32 {
    if CODES == FOUR_BIT { 8 } else { 128 }
}

/// Bits of a stored code.
const fn bits<const CODES: u8>() -> usize {
    if CODES == EIGHT_BIT { 8 } else { 4 }
}

/// Writes the codes of inputs `from..` of a panel as unsigned bytes, steps included: as many groups of four inputs as `to` has
/// room for, an even number of them if codes have 4 bits.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn unpack<const CODES: u8>(tile: &IntegerTile<'_>, panel: usize, from: usize, to: &mut [MaybeUninit<__m512i>]) {
    let codes = tile.codes[panel * tile.panel_bytes..].as_chunks::<64>().0;
    if CODES == EIGHT_BIT {
        let codes = &codes[from / 4..][..to.len()];
        for (to, codes) in to.iter_mut().zip(codes) {
            to.write(_mm512_xor_si512(load_bytes(codes), _mm512_set1_epi8(-128)));
        }
        return;
    }
    let codes = &codes[from / 8..][..to.len() / 2];
    let blocks = tile.k / tile.block;
    let (low_mask, mut step, mut bias) = (_mm512_set1_epi8(15), _mm512_set1_epi16(1), _mm512_setzero_si512());
    let (mut k, mut next_block) = (from, from);
    for (to, codes) in to.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
        if CODES == FOUR_BIT_STEPS && k == next_block {
            let block = k / tile.block;
            next_block = (block + 1) * tile.block;
            // As in `step_floats`.
            step = load_i8(&tile.offsets[(panel * blocks + block) * PANEL..]);
            step = _mm512_or_si512(step, _mm512_slli_epi32::<16>(step));
            bias = _mm512_sub_epi16(_mm512_set1_epi16(128), _mm512_slli_epi16::<3>(step));
            bias = _mm512_or_si512(bias, _mm512_slli_epi16::<8>(bias));
        }
        let codes = load_bytes(codes);
        let nibbles = [_mm512_and_si512(codes, low_mask), _mm512_and_si512(_mm512_srli_epi16::<4>(codes), low_mask)];
        for (to, mut nibbles) in to.iter_mut().zip(nibbles) {
            if CODES == FOUR_BIT_STEPS {
                nibbles = _mm512_add_epi8(_mm512_mullo_epi16(nibbles, step), bias);
            }
            to.write(nibbles);
        }
        k += 8;
    }
}

/// Unsigned codes of the panels of a piece, four inputs of sixteen outputs each.
struct Unpacked([[MaybeUninit<__m512i>; PIECE / 4]; PANELS]);

impl Unpacked {
    #[inline]
    fn uninit() -> Self {
        Self([const { [const { MaybeUninit::uninit() }; PIECE / 4] }; PANELS])
    }
}

/// Sums of each row, plane and panel that wait for the next piece.
struct Sums([[[MaybeUninit<__m512i>; PANELS]; 2]; MAX_TILE_ROWS]);

impl Sums {
    #[inline]
    fn uninit() -> Self {
        Self([const { [const { [const { MaybeUninit::uninit() }; PANELS] }; 2] }; MAX_TILE_ROWS])
    }
}

/// How weights are stored: 8 bits, 4 bits, or 4 bits with a step for each block.
pub(super) const EIGHT_BIT: u8 = 0;
pub(super) const FOUR_BIT: u8 = 1;
pub(super) const FOUR_BIT_STEPS: u8 = 2;

/// Panels that are computed together.
const PANELS: usize = 2;

/// Inputs of a piece: 24 KiB of codes.
const PIECE: usize = 768;

/// With fewer rows unpacking to memory takes longer than it saves.
const FEWEST_ROWS: usize = 12;
