//! Which weights a product of one row will read first, for workers who wait.

use super::{Grid, Limits};
use crate::Cx;
use crate::packed::PackedWeights;
use crate::workers::{RANGES, Start, Workers, share};

/// A product of one row, as one that is to come.
#[derive(Debug, Clone, Copy)]
pub enum Next<'a> {
    /// A [`linear`](super::linear) of these weights.
    Linear(&'a [PackedWeights<'a>]),
    /// A [`gated_linear`](super::gated_linear) of gate and up.
    Gated(&'a [PackedWeights<'a>; 2]),
}

/// Where each worker of a team starts to read in each of several products: worked out once, and in one piece, so that those of a
/// product can be asked for. In a step that goes through all weights nothing stays in a cache.
///
/// Addresses alone: it may outlive the weights, and is of no use then.
#[derive(Debug)]
pub struct Starts {
    workers: usize,
    /// `[number][worker]`.
    starts: Vec<Start>,
}

impl Starts {
    /// Of no product yet, for a team like `workers`.
    pub fn new(workers: &Workers) -> Self {
        Self { workers: workers.count(), starts: Vec::new() }
    }

    /// Takes over the product `next`, or nothing, under the next number from 0 on.
    pub fn push(&mut self, next: Option<Next<'_>>) {
        // They bound tiles of many rows.
        let (workers, limits) = (self.workers, Limits::BUFFERED);
        let (weights, grid) = match next {
            None => (&[][..], Grid::of_linear(1, [].into_iter(), workers, limits)),
            Some(Next::Linear(weights)) => {
                (weights, Grid::of_linear(1, weights.iter().map(|weights| weights.layout()), workers, limits))
            }
            // It starts with the gate's half of its tiles.
            Some(Next::Gated(halves)) => {
                (&halves[..1], Grid::of_gated(1, halves.map(|weights| weights.layout()), workers, limits))
            }
        };
        let n_items = weights.iter().map(|weights| grid.groups(*weights)).sum();
        self.starts.extend((0..self.workers).map(|worker| {
            let (first, len) = share(n_items, self.workers, worker);
            let place = if len > 0 { place(&grid, weights, first) } else { None };
            place.unwrap_or_default()
        }));
    }

    /// Asks for what [`expect`] reads of product `number`.
    pub fn prefetch(&self, number: usize) {
        crate::prefetch(self.of(number));
    }

    fn of(&self, number: usize) -> &[Start] {
        self.starts.chunks_exact(self.workers).nth(number).unwrap_or_default()
    }
}

/// Tells each worker what it will read first in product `number` of `starts`, which comes after the one that is run next. While it
/// waits in between, it asks for that. A hint: no result depends on it. Nothing is told where there is no such product, or
/// `starts` are those of another size of team.
///
/// `firsts` are the first halves of adapters' branches of that product. They are read before its weights, by all but the calling
/// thread.
pub fn expect(cx: &Cx<'_>, starts: &Starts, number: usize, firsts: &[Option<PackedWeights<'_>>]) {
    let n_helpers = cx.workers.count() - 1;
    if n_helpers == 0 || starts.workers != cx.workers.count() {
        return;
    }
    for (worker, start) in starts.of(number).iter().enumerate() {
        let mut mine = [&[][..]; RANGES];
        let of_worker = firsts.iter().flatten().enumerate().filter(|(i, _)| worker > 0 && i % n_helpers == worker - 1);
        mine.iter_mut().zip(of_worker).for_each(|(mine, (_, first))| *mine = first.codes_from(0));
        cx.workers.set_ahead(worker, mine, start);
    }
}

/// Where the sections are from the first panel of item `group` on, and the number of panels to ask for.
fn place(grid: &Grid, weights: &[PackedWeights<'_>], mut group: usize) -> Option<Start> {
    for weights in weights {
        let groups = grid.groups(*weights);
        if group < groups {
            let (layout, tile) = (weights.layout(), grid.tile(0, group, *weights));
            let code_bytes = layout.panel_code_bytes();
            let sections = [
                (weights.codes_from(tile.panel), code_bytes),
                (weights.scales_from(tile.panel), layout.panel_scale_bytes()),
                (weights.offsets_from(tile.panel), layout.panel_offset_bytes()),
            ];
            let sections = sections.map(|(bytes, panel_bytes)| (bytes.as_ptr().addr(), panel_bytes));
            return Some(Start { sections, panels: tile.panels.min((AHEAD_BYTES / code_bytes).max(1)) });
        }
        group -= groups;
    }
    None
}

/// Bytes of codes to ask for: what one core reads in some microseconds, and a part of its second cache.
const AHEAD_BYTES: usize = 128 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed::{PackedLayout, WeightFormat};
    use crate::testing::{portable, weights};

    /// A worker is told the panel that its share of the next product starts with; branches are not the caller's.
    #[test]
    fn shares_start_where_workers_will() {
        let workers = Workers::new(2).expect("threads can be started");
        let cx = portable(&workers);
        let layout = PackedLayout::new(64, 32, WeightFormat::Int8PerChannel).expect("sizes are fine");
        let blobs = [weights(&layout, 1), weights(&layout, 2)];
        let views = [&blobs[0], &blobs[1]].map(|blob| layout.view(blob).expect("length matches"));
        let [one, other] = views.map(|weights| weights.codes_from(0).as_ptr().addr());
        let mut starts = Starts::new(&workers);
        starts.push(Some(Next::Linear(&views)));
        starts.push(None);
        starts.push(Some(Next::Gated(&[views[1], views[0]])));
        // The thread may use up what it is told at any time; the caller does so in regions only.
        expect(&cx, &starts, 0, &[Some(views[1])]);
        assert_eq!(cx.workers.next_ahead(0), Some(one));
        expect(&cx, &starts, 2, &[]);
        assert_eq!(cx.workers.next_ahead(0), Some(other));
        expect(&cx, &starts, 1, &[]);
        assert_eq!(cx.workers.next_ahead(0), None);

        // No such product, and another team's: what was told before stays.
        expect(&cx, &starts, 0, &[]);
        expect(&cx, &starts, 3, &[]);
        expect(&cx, &Starts::new(&Workers::new(1).expect("threads can be started")), 0, &[]);
        assert_eq!(cx.workers.next_ahead(0), Some(one));

        let grid = Grid::plan(1, 8, 2 * layout.size_bytes(), 2, Limits::BUFFERED);
        let start = place(&grid, &views, grid.groups(views[0])).expect("the second weight has a tile");
        assert_eq!((start.sections[0].0, start.panels), (other, 4));
        assert!(place(&grid, &views, 2 * grid.groups(views[0])).is_none(), "there are no more items");
    }
}
