//! Adapters' branches in the region of their layer.
//!
//! The first halves are small products. Whoever has a tile of the layer helps with them first, and waits for the last of them
//! only before it adds the second half (kernels that add it themselves: before the tile): by then they are done, or nearly, and a
//! barrier of their own would cost more than they do. In a decode step the calling thread, which has just made x, leaves them to those
//! who waited for it and meanwhile asked for their weights (see `ahead`); it helps with what is not taken when it needs them.
//!
//! Where x and the second half's weights have integers, `t` gets them, too: each worker quantizes the rows that its tiles need.
//!
//! Nobody waits for ever: a first half is taken by a worker that computes it at once, and it waits for nothing. If that panics,
//! those who wait leave their tiles as they are: the region is lost.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::{hint, mem, thread};

use super::tile::{Tile, compute};
use super::{Branch, Grid, Half, Limits, MAX_PARTS, PANEL, PRODUCTS, Rows, Target, Write, with_buffer};
use crate::Cx;
use crate::packed::{PackedWeights, WeightFormat};
use crate::scratch::Disjoint;

mod rows;

pub(super) use rows::IntegerRows;
use rows::{Key, MAX_INTEGER_RANK};

/// The first halves of all branches of a layer.
pub(super) struct FirstHalves<'a> {
    /// No other call with a branch has the same number in this process.
    layer: u64,
    halves: [Option<FirstHalf<'a>>; MAX_PARTS],
    few_rows: bool,
    n_items: usize,
    /// The next one to take.
    next: AtomicUsize,
    n_done: AtomicUsize,
}

/// `t = alpha · (x · downᵀ)`.
struct FirstHalf<'a> {
    x: Rows<'a>,
    down: PackedWeights<'a>,
    alpha: &'a [f32],
    t: Target<'a>,
    grid: Grid,
    n_items: usize,
}

/// What a tile of the layer gets from a branch.
#[derive(Clone, Copy)]
pub(super) struct SecondHalf<'a> {
    pub(super) up: PackedWeights<'a>,
    /// Number of the first half.
    first: usize,
    /// Whether the first half is quantized.
    pub(super) in_integers: bool,
}

impl<'a> FirstHalves<'a> {
    pub(super) fn new() -> Self {
        let (next, n_done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self { layer: 0, halves: [const { None }; MAX_PARTS], few_rows: true, n_items: 0, next, n_done }
    }

    /// Takes over a branch; a layer has at most [`MAX_PARTS`].
    pub(super) fn add(&mut self, cx: &Cx<'_>, branch: &'a mut Branch<'_>) -> SecondHalf<'a> {
        let Branch { x, down, alpha, up, ref mut t } = *branch;
        let first = self.halves.iter().position(Option::is_none).expect("as many branches as weights, at most");
        let (layout, workers) = (down.layout(), cx.workers.count());
        let grid = Grid::plan(x.count(), layout.panels(), layout.size_bytes(), workers, Limits::BUFFERED);
        let n_items = grid.row_blocks() * grid.groups(down);
        let t = Target { write: Write::Store, n: down.layout().n(), out: Disjoint::new(t) };
        self.halves[first] = Some(FirstHalf { x, down, alpha, t, grid, n_items });
        self.few_rows &= x.count() < PANEL;
        self.n_items += n_items;
        if first == 0 {
            static LAYERS: AtomicU64 = AtomicU64::new(1);
            self.layer = LAYERS.fetch_add(1, Ordering::Relaxed);
        }
        let has_integers = matches!(x, Rows::Quantized(_));
        let fits = up.layout().format() == WeightFormat::Int8PerChannel && up.layout().k() <= MAX_INTEGER_RANK;
        SecondHalf { up, first, in_integers: has_integers && fits }
    }

    /// Computes all first halves, and calls `tile` for each of `n_tiles`.
    pub(super) fn then_each(&self, cx: &Cx<'_>, n_tiles: usize, tile: impl Fn(usize) + Sync) {
        let tiles = |item: usize, worker: usize| {
            if worker > 0 || !self.few_rows {
                self.help(cx);
            }
            tile(item);
        };
        cx.workers.for_each_then(n_tiles, tiles, cx.kernels.leave);
    }

    /// Computes first halves until all have been taken.
    fn help(&self, cx: &Cx<'_>) {
        while self.next.load(Ordering::Relaxed) < self.n_items {
            let item = self.next.fetch_add(1, Ordering::Relaxed);
            if item < self.n_items {
                let unless_done = Abandon(&self.n_done);
                self.compute(cx, item);
                mem::forget(unless_done);
                self.n_done.fetch_add(1, Ordering::Release);
            }
        }
    }

    fn compute(&self, cx: &Cx<'_>, mut item: usize) {
        for half in self.halves.iter().flatten() {
            if item < half.n_items {
                return half.compute(cx, item);
            }
            item -= half.n_items;
        }
    }

    /// Names the rows of a first half that `tile` needs.
    pub(super) fn key(&self, second: &SecondHalf<'_>, tile: &Tile) -> Key {
        Key { layer: self.layer, first: second.first, row: tile.row, rows: tile.rows }
    }

    /// Rows `rows` from `row` on of a first half, `[rows, r]`; waits until all first halves are done. `None` if one panicked.
    pub(super) fn rows(&self, cx: &Cx<'_>, second: &SecondHalf<'_>, row: usize, rows: usize) -> Option<&[f32]> {
        self.help(cx);
        let mut spins = 0;
        loop {
            let n_done = self.n_done.load(Ordering::Acquire);
            if n_done == self.n_items {
                break;
            }
            if n_done >= ABANDONED {
                return None;
            }
            if spins < SPINS {
                spins += 1;
                hint::spin_loop();
            } else {
                thread::yield_now();
            }
        }
        let t = &self.halves[second.first].as_ref().expect("`add` gave this number").t;
        // SAFETY: all first halves are done, so nobody writes t any more in this region.
        Some(unsafe { t.out.finished(row * t.n, rows * t.n) })
    }
}

impl FirstHalf<'_> {
    fn compute(&self, cx: &Cx<'_>, item: usize) {
        let n_groups = self.grid.groups(self.down);
        let tile = self.grid.tile(item / n_groups, item % n_groups, self.down);
        let half = Half { weights: self.down, bias: None, branch: None };
        if tile.rows < PANEL {
            let codes = self.down.codes_from(tile.panel);
            (cx.kernels.prefetch)(&codes[..codes.len().min(PREFETCHED_BYTES)]);
        }
        // Whoever needs the first half now has begun a tile in the other buffer.
        with_buffer(&PRODUCTS, tile.values(), |values| {
            compute(cx, self.x, &half, &tile, values);
            self.scale(&tile, values);
            self.t.store(cx, &tile, Write::Store, values);
        });
    }

    fn scale(&self, tile: &Tile, values: &mut [f32]) {
        let first = tile.panel * PANEL % self.alpha.len();
        for row in values.chunks_exact_mut(tile.panels * PANEL) {
            row.iter_mut().zip(self.alpha.iter().cycle().skip(first)).for_each(|(t, alpha)| *t *= alpha);
        }
    }
}

/// Lets nobody wait any longer: dropped when a first half panics.
struct Abandon<'a>(&'a AtomicUsize);

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        self.0.store(ABANDONED, Ordering::Relaxed);
    }
}

/// More first halves than there can be.
const ABANDONED: usize = usize::MAX / 2;

/// Bytes of a first half's codes to ask for at once: a stream as short as this is over before hardware knows it.
const PREFETCHED_BYTES: usize = 8 << 10;

/// Pauses before a waiting worker gives its core away.
const SPINS: u32 = 2000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed::{PackedLayout, WeightFormat};
    use crate::testing::{portable, weights};
    use crate::workers::Workers;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    /// Nobody waits for a first half that panicked, and whoever needs it is told.
    #[test]
    fn a_panic_ends_the_wait() {
        let workers = Workers::new(3).expect("threads can be started");
        let cx = portable(&workers);
        let layout = PackedLayout::new(16, 16, WeightFormat::F32).expect("sizes are fine");
        let blob = weights(&layout, 3);
        let w = layout.view(&blob).expect("length matches");
        // Too little room for three rows: the first half panics as it is written.
        let (x, mut t) = ([1.0; 48], [0.0; 32]);
        let mut branch = Branch { x: Rows::F32 { x: &x, m: 3 }, down: w, alpha: &[1.0], up: w, t: &mut t };
        let mut firsts = FirstHalves::new();
        let second = firsts.add(&cx, &mut branch);
        let run = || firsts.then_each(&cx, 64, |_| assert!(firsts.rows(&cx, &second, 0, 1).is_none(), "it never was"));
        let panic = catch_unwind(AssertUnwindSafe(run)).expect_err("the first half panics");
        let message = panic.downcast_ref::<String>().expect("a message");
        assert!(message.starts_with("range "), "{message}");
    }
}
