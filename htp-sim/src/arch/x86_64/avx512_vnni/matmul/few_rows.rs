//! A few rows of x by 8-bit weights with a scale per output: the query heads that share keys and values, an adapter's second half.
//!
//! Each four inputs of a row come from memory sixteen times over, and what a core can load in a cycle bounds such a product. Panels
//! side by side share these loads. (Query heads in threes, 2000 positions in the second cache: 0.82 of the time of attention.)

use std::arch::x86_64::*;

use super::{CHANNELS, Place, Planes, channel_finish, channel_start, load_bytes, panel_rows, store};
use crate::arch::x86_64::ask_for;
use crate::kernels::IntegerTile;
use crate::packed::PANEL;

/// Whether [`product`] can compute the tile.
pub(super) fn fits(tile: &IntegerTile<'_>) -> bool {
    let rows = if tile.lo.is_empty() { 2..=MAX_ROWS } else { 1..=MAX_ROWS };
    rows.contains(&tile.rows) && tile.k <= FEW_INPUTS && tile.width == PANEL
}

/// The product of a tile that [`fits`].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn product(tile: &IntegerTile<'_>, out: &mut [f32]) {
    match tile.lo.is_empty() {
        true => all_rows::<1>(tile, out),
        false => all_rows::<2>(tile, out),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn all_rows<const PLANES: usize>(tile: &IntegerTile<'_>, out: &mut [f32]) {
    let mut row = 0;
    while row < tile.rows {
        row += match tile.rows - row {
            4.. => all_panels::<2, 4, PLANES>(tile, row, out),
            3 => all_panels::<4, 3, PLANES>(tile, row, out),
            2 => all_panels::<4, 2, PLANES>(tile, row, out),
            _ => all_panels::<4, 1, PLANES>(tile, row, out),
        };
    }
}

/// `ROWS` rows by `W` panels at a time; returns `ROWS`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn all_panels<const W: usize, const ROWS: usize, const PLANES: usize>(
    tile: &IntegerTile<'_>,
    row: usize,
    out: &mut [f32],
) -> usize {
    let mut panel = 0;
    while panel < tile.panels {
        panel += match tile.panels - panel {
            left if W <= left => panels::<W, ROWS, PLANES>(tile, Place { panel, row }, out),
            2.. => panels::<2, ROWS, PLANES>(tile, Place { panel, row }, out),
            _ => {
                panel_rows::<8, CHANNELS, PLANES, ROWS>(tile, Place { panel, row }, out);
                1
            }
        };
    }
    ROWS
}

/// `ROWS` rows by `W` panels; returns `W`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn panels<const W: usize, const ROWS: usize, const PLANES: usize>(
    tile: &IntegerTile<'_>,
    at: Place,
    out: &mut [f32],
) -> usize {
    let planes = Planes::<PLANES>::new(tile, at.row);
    let n_fours = tile.k / 4;
    let mut codes = [&[][..]; W];
    for (panel, codes) in (at.panel..).zip(&mut codes) {
        *codes = &tile.codes[panel * tile.panel_bytes..].as_chunks::<64>().0[..n_fours];
    }
    // Codes are 128 too large.
    let mut acc = [channel_start::<PLANES, ROWS>(tile, at, 128); W];
    let flip = _mm512_set1_epi8(-128);
    for four in 0..n_fours {
        let mut fours = [flip; W];
        for (codes, row) in fours.iter_mut().zip(codes) {
            ask_for(row[four].as_ptr().wrapping_offset(tile.ahead));
            *codes = _mm512_xor_si512(load_bytes(&row[four]), flip);
        }
        for r in 0..ROWS {
            for plane in 0..PLANES {
                // SAFETY: x has `tile.k` bytes in each plane of each row (the tile's promise); these are four of them.
                let x = unsafe { planes.broadcast(plane, r, four * 4) };
                for (acc, codes) in acc.iter_mut().zip(fours) {
                    acc[r][plane] = _mm512_dpbusd_epi32(acc[r][plane], codes, x);
                }
            }
        }
    }
    for (panel, acc) in (at.panel..).zip(acc) {
        for (i, values) in channel_finish(tile, Place { panel, ..at }, acc).into_iter().enumerate() {
            store(&mut out[((at.row + i) * tile.panels + panel) * PANEL..], values);
        }
    }
    W
}

/// With more inputs a panel is a stream of its own. As many as the positions of a range, which the values of a cache have. (Adapters of
/// ranks 16 and 64: a sixth of their time on a core of Zen 4.)
const FEW_INPUTS: usize = 256;

/// With more rows each load of weights is for enough of them.
const MAX_ROWS: usize = 7;
