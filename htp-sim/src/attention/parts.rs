//! Attention with the ranges of each tile on several workers.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::scratch::WorkerScratch;
use super::tile::{Problem, Tile};
use super::{AttentionScratch, CHUNKS_PER_WORKER, RANGE};
use crate::Cx;
use crate::scratch::Disjoint;
use crate::workers::share;

/// A problem in parts, a tile and a range each: the ranges of the first tile, then those of the next. Whoever computes the last part of a
/// tile merges them all, in the order of the ranges: a region of its own would cost more than that does.
struct Parts<'a> {
    problem: &'a Problem<'a>,
    /// The first range of any tile: what lies before every window is no part.
    first_range: usize,
    /// Where the ranges end.
    ranges: usize,
    /// What became of each part, as [`WorkerScratch::save_part`] writes it.
    partials: Disjoint<'a, f32>,
    /// Of each tile, parts that are not there yet.
    left: &'a [AtomicUsize],
}

/// Computes all of `problem`. The scratch has room for its parts, and the tiles are few, as `attention` checked.
pub(super) fn share_out(cx: &Cx<'_>, problem: &Problem<'_>, scratch: &mut AttentionScratch, out: &Disjoint<'_, f32>) {
    let AttentionScratch { workers, partials, left, .. } = scratch;
    let (first_range, ranges) = (problem.tile(0, 0).ranges().start, (problem.past + problem.m).div_ceil(RANGE));
    let parts = Parts { problem, first_range, ranges, partials: Disjoint::new(partials), left };
    let n_tiles = problem.cache.layout.kv_heads() * problem.tiles();
    for (number, left) in left[..n_tiles].iter().enumerate() {
        left.store(parts.tile(number).ranges().len(), Ordering::Relaxed);
    }
    let workers = Disjoint::new(workers);
    let n_parts = n_tiles * (ranges - first_range);
    let n_chunks = n_parts.min(CHUNKS_PER_WORKER * cx.workers.count());
    let of_chunk = |chunk: usize| chunk * n_parts / n_chunks..(chunk + 1) * n_parts / n_chunks;
    let compute_chunk = |chunk: usize, worker: usize| {
        // SAFETY: a worker runs one item at a time, and its scratch is its own.
        let scratch = unsafe { &mut workers.range(worker, 1)[0] };
        let end = next_of_share(cx, chunk, n_chunks).map_or(of_chunk(chunk), of_chunk).end;
        let mut loaded = None;
        for part in of_chunk(chunk) {
            let (number, range) = parts.place(part);
            let tile = parts.tile(number);
            if !tile.ranges().contains(&range) {
                continue;
            }
            if loaded.replace(number) != Some(number) {
                problem.load_queries(&tile, scratch);
            }
            let next = (part + 1 < end).then(|| parts.place(part + 1));
            problem.compute_range(
                &tile,
                range,
                next.map(|(number, range)| (parts.tile(number).kv_head, range)),
                scratch,
            );
            parts.add(number, &tile, range, scratch, out);
        }
    };
    cx.workers.for_each_then(n_chunks, compute_chunk, cx.kernels.leave);
}

impl Parts<'_> {
    /// The tile and the range of a part.
    fn place(&self, part: usize) -> (usize, usize) {
        let n_ranges = self.ranges - self.first_range;
        (part / n_ranges, self.first_range + part % n_ranges)
    }

    fn tile(&self, number: usize) -> Tile {
        self.problem.tile(number / self.problem.tiles(), number % self.problem.tiles())
    }

    /// Takes over a part that was computed; writes the tile's rows if it was the last one.
    fn add(&self, number: usize, tile: &Tile, range: usize, scratch: &mut WorkerScratch, out: &Disjoint<'_, f32>) {
        let (at, len) = self.slots(tile, range);
        // SAFETY: each pair of tile and range is one part, and its slots are its own.
        scratch.save_part(tile, unsafe { self.partials.range(at, len) });
        if self.left[number].fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        scratch.reset(tile);
        for range in tile.ranges() {
            let (at, len) = self.slots(tile, range);
            // SAFETY: all parts of the tile are there; who wrote them counted them afterwards, before this one was.
            scratch.load_part(tile, unsafe { self.partials.finished(at, len) });
            scratch.merge_part(self.problem.kernels, tile);
        }
        self.problem.store(tile, scratch, out);
    }

    /// Where a part's slots are, and their length.
    fn slots(&self, tile: &Tile, range: usize) -> (usize, usize) {
        let slot = self.problem.cache.layout.value_head_dim() + 2;
        ((tile.slot * self.ranges + range * tile.rows) * slot, tile.rows * slot)
    }
}

/// The item that a worker whose share `item` is in takes next, unless others come to help.
pub(super) fn next_of_share(cx: &Cx<'_>, item: usize, n_items: usize) -> Option<usize> {
    let n_workers = cx.workers.count();
    let ends =
        (0..n_workers).map(|worker| share(n_items, n_workers, worker)).any(|(first, len)| first + len == item + 1);
    (!ends).then_some(item + 1)
}
