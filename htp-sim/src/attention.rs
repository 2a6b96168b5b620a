//! Grouped-query causal attention over a KV cache.
//!
//! ```text
//! for each KV head, for each tile of up to 96 query rows (all query heads of the KV head, then the next position):
//!     for each range of 256 positions that the tile sees:
//!         scores = q · Kᵀ            (the matmul kernels: keys lie in panels of 16 positions, like weights)
//!         p = exp(scores - max), 0 where a row does not see the position
//!         part = p · V               (int8: the matmul kernels again, p times the values' scales quantized to 16 bits)
//!         merge max, sum and part into the running ones, in the order of the ranges
//!     out = sum of parts / sum of p
//! ```
//! Ranges are fixed in the cache, so the arithmetic of a row does not depend on who computes a range, or on which rows are
//! computed together. When there are few tiles the ranges are shared out as well, and merged by whoever has the last of a tile.

use std::sync::atomic::AtomicUsize;

use crate::Cx;
use crate::elementwise::expect_cap;
use crate::error::{Needed, ShapeError, expect_at_most, expect_len, size};
use crate::scratch::Disjoint;

mod cache;
mod parts;
mod scratch;
mod tile;

pub use cache::{Cache, CacheFormat, CacheLayout, CacheMut, MAX_HEAD_DIM, append, prefetch};
use parts::next_of_share;
use scratch::WorkerScratch;
use tile::Problem;

/// What attention computes, besides the shapes in the [`CacheLayout`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionParams {
    /// Query heads: a multiple of the KV heads.
    pub heads: usize,
    /// Factor on `q · k`, usually `1/√head_dim`.
    pub scale: f32,
    /// Positions that a row sees, its own included; all if `None`.
    pub window: Option<usize>,
    /// `cap · tanh(score / cap)` on the scaled scores.
    pub softcap: Option<f32>,
}

/// Buffers of [`attention`], allocated once.
#[derive(Debug)]
pub struct AttentionScratch {
    layout: CacheLayout,
    heads: usize,
    workers: Vec<WorkerScratch>,
    partials: Vec<f32>,
    /// For as many tiles as are shared out.
    left: Vec<AtomicUsize>,
}

impl AttentionScratch {
    /// Buffers for a team of `workers`, caches of `layout` and `heads` query heads.
    ///
    /// # Errors
    /// [`ShapeError`] if `heads` is no multiple of the KV heads, or the buffers would not fit in memory.
    pub fn new(workers: usize, layout: CacheLayout, heads: usize) -> Result<Self, ShapeError> {
        check_heads(layout, heads)?;
        let ranges = layout.capacity().div_ceil(RANGE);
        let partials = size("attention scratch", &[heads, ranges, layout.value_head_dim() + 2, 4])? / 4;
        if Vec::<f32>::new().try_reserve_exact(partials).is_err() {
            // An allocation that fails ends the process.
            return Err(ShapeError::new(
                "positions of a cache",
                layout.capacity(),
                Needed::Rule("as many as memory has room for"),
            ));
        }
        let workers: Vec<_> = (0..workers.max(1)).map(|_| WorkerScratch::new(layout)).collect();
        let left = (0..TILES_PER_WORKER * workers.len()).map(|_| AtomicUsize::new(0)).collect();
        Ok(Self { layout, heads, workers, partials: vec![0.0; partials], left })
    }
}

/// `out = softmax(scale · q · Kᵀ) · V`, where query row `i` sees the positions `0..=past + i` (and the window).
///
/// `q` is `[m, heads · head_dim]`, rotated; `out` has its shape. The `m` new rows must be in the cache already, at
/// positions `past..past + m`. Query head `h` reads KV head `h / (heads / kv_heads)`. The cost grows with `past + m`, not
/// with the capacity.
///
/// With an int8 cache `q` is quantized to 16 bits per row, and so are the probabilities, times the scales of the values, per
/// row and range of 256 positions; both products are exact integers, and all tiers give the same bits. With a float cache
/// tiers differ by rounding. Results do not depend on the number of workers or on `m`, as long as the values of a float cache are
/// finite: one that is not makes NaN, there, in every row that is computed together with one that sees it, and `m` decides
/// which are. In an int8 cache it reaches the rows that see it, and no other.
///
/// # Errors
/// [`ShapeError`] if a length does not match, `past + m` is beyond the capacity, the window is 0, the cap is not a
/// finite number above 0, or `scratch` was made for another shape or a smaller team. `out` is then unchanged.
///
/// Source: Dao et al. 2022, algorithm 1 (online softmax); Ainslie et al. 2023 (grouped queries).
pub fn attention(
    cx: &Cx<'_>,
    cache: &Cache<'_>,
    past: usize,
    q: &[f32],
    params: &AttentionParams,
    scratch: &mut AttentionScratch,
    out: &mut [f32],
) -> Result<(), ShapeError> {
    let m = check(cx, cache, past, q, params, scratch)?;
    expect_len("length of out", out.len(), q.len())?;
    if m == 0 {
        return Ok(());
    }
    let kv_heads = cache.layout.kv_heads();
    // Tiles of more rows compute more that a prompt's later rows alone see, which matters where there is little before them.
    let rows = m * (params.heads / kv_heads);
    let is_deep = past >= RANGE && kv_heads * rows.div_ceil(TILE_ROWS) >= TILES_PER_WORKER * cx.workers.count();
    let tile_rows = if is_deep { TILE_ROWS } else { TILE_ROWS / 2 };
    let problem = Problem { kernels: cx.kernels, cache: *cache, past, m, q, params: *params, tile_rows };
    let n_items = kv_heads * problem.tiles();
    let (ranges, slot) = ((past + m).div_ceil(RANGE), cache.layout.value_head_dim() + 2);
    let few = n_items < TILES_PER_WORKER * cx.workers.count();
    let out = Disjoint::new(out);
    if few && ranges > 1 && m * params.heads * ranges * slot <= scratch.partials.len() {
        parts::share_out(cx, &problem, scratch, &out);
        return Ok(());
    }
    let workers = Disjoint::new(&mut scratch.workers);
    let tiles = |item: usize, worker: usize| {
        // SAFETY: a worker runs one item at a time, and its scratch is its own.
        let scratch = unsafe { &mut workers.range(worker, 1)[0] };
        // Tile by tile, as linear layers share out their rows.
        let tile = problem.tile(item % kv_heads, item / kv_heads);
        let ranges = tile.ranges();
        let next_item = next_of_share(cx, item, n_items).map(|next| (next % kv_heads, ranges.start));
        problem.load_queries(&tile, scratch);
        scratch.reset(&tile);
        for range in ranges.clone() {
            let next = if range + 1 < ranges.end { Some((tile.kv_head, range + 1)) } else { next_item };
            problem.compute_range(&tile, range, next, scratch);
            scratch.merge_part(cx.kernels, &tile);
        }
        problem.store(&tile, scratch, &out);
    };
    cx.workers.for_each_then(n_items, tiles, cx.kernels.leave);
    Ok(())
}

/// Checks everything but the output; returns the number of query rows.
fn check(
    cx: &Cx<'_>,
    cache: &Cache<'_>,
    past: usize,
    q: &[f32],
    params: &AttentionParams,
    scratch: &AttentionScratch,
) -> Result<usize, ShapeError> {
    let layout = cache.layout;
    check_heads(layout, params.heads)?;
    expect_len("bytes of the cache", cache.bytes.len(), layout.size_bytes())?;
    let width = size("width of q", &[params.heads, layout.head_dim()])?;
    if !q.len().is_multiple_of(width) {
        return Err(ShapeError::new("length of q", q.len(), Needed::MultipleOf(width)));
    }
    let m = q.len() / width;
    expect_at_most("positions after this step", past.saturating_add(m), layout.capacity())?;
    if params.window == Some(0) {
        return Err(ShapeError::new("attention window", 0, Needed::AtLeast(1)));
    }
    params.softcap.map_or(Ok(()), expect_cap)?;
    if scratch.layout != layout {
        return Err(ShapeError::new(
            "capacity of scratch",
            scratch.layout.capacity(),
            Needed::Rule("the cache's layout"),
        ));
    }
    expect_len("heads of scratch", scratch.heads, params.heads)?;
    if scratch.workers.len() < cx.workers.count() {
        return Err(ShapeError::new("workers of scratch", scratch.workers.len(), Needed::AtLeast(cx.workers.count())));
    }
    Ok(m)
}

fn check_heads(layout: CacheLayout, heads: usize) -> Result<(), ShapeError> {
    if heads == 0 || !heads.is_multiple_of(layout.kv_heads()) {
        return Err(ShapeError::new("query heads", heads, Needed::MultipleOf(layout.kv_heads())));
    }
    Ok(())
}

/// Positions that are computed in one go, and the unit in which a long cache is shared out.
const RANGE: usize = 256;

/// Query rows of a tile, at most: six times what the AMX unit takes at once, so that it sleeps and wakes less often between scores and
/// values (each time it wakes costs as much as fifty of its products).
const TILE_ROWS: usize = 96;

/// Pieces of neighbouring ranges for each worker, when ranges are shared out.
const CHUNKS_PER_WORKER: usize = 4;

/// With fewer tiles than this per worker, ranges are shared out too.
const TILES_PER_WORKER: usize = 4;

#[cfg(test)]
mod tests;
