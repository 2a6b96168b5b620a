//! Which weights a product of one row will read first, for workers who wait.

use super::Grid;
use crate::Cx;
use crate::packed::PackedWeights;
use crate::workers::{RANGES, SECTIONS, Sections};

/// The product of one row that comes after the one that is run next.
#[derive(Debug, Clone, Copy)]
pub enum Next<'a> {
    /// A [`linear`](super::linear) of these weights.
    Linear(&'a [PackedWeights<'a>]),
    /// A [`gated_linear`](super::gated_linear) of gate and up.
    Gated(&'a [PackedWeights<'a>; 2]),
}

/// Tells each worker which weights it will read first in the product after the next. While it waits in between, it asks for them. A
/// hint: no result depends on it.
///
/// `firsts` are the first halves of adapters' branches of that product. They are read before its weights, by all but the calling
/// thread.
pub fn expect(cx: &Cx<'_>, next: Next<'_>, firsts: &[Option<PackedWeights<'_>>]) {
    let n_helpers = cx.workers.count() - 1;
    if n_helpers == 0 {
        return;
    }
    let workers = cx.workers.count();
    let (weights, grid) = match next {
        Next::Linear(weights) => (weights, Grid::of_linear(1, weights.iter().map(|weights| weights.layout()), workers)),
        // It starts with the gate's half of its tiles.
        Next::Gated(halves) => (&halves[..1], Grid::of_gated(1, halves.map(|weights| weights.layout()), workers)),
    };
    let n_items = weights.iter().map(|weights| grid.groups(*weights)).sum();
    for worker in 0..=n_helpers {
        let mut mine = [&[][..]; RANGES];
        let of_worker = firsts.iter().flatten().enumerate().filter(|(i, _)| worker > 0 && i % n_helpers == worker - 1);
        mine.iter_mut().zip(of_worker).for_each(|(mine, (_, first))| *mine = first.codes_from(0));
        let first = cx.workers.first_item(n_items, worker);
        let place = first.and_then(|item| place(&grid, weights, item));
        let (sections, panels) = place.unwrap_or(([(&[], 0); SECTIONS], 0));
        cx.workers.set_ahead(worker, mine, sections, panels);
    }
}

/// The sections from the first panel of item `group` on, with their bytes per panel, and the number of panels to ask for.
fn place<'a>(grid: &Grid, weights: &[PackedWeights<'a>], mut group: usize) -> Option<(Sections<'a>, usize)> {
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
            return Some((sections, tile.panels.min((AHEAD_BYTES / code_bytes).max(1))));
        }
        group -= groups;
    }
    None
}

/// Bytes of codes to ask for: what one core reads in some microseconds, and a small part of its second cache.
const AHEAD_BYTES: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packed::{PackedLayout, WeightFormat};
    use crate::testing::{portable, weights};
    use crate::workers::Workers;

    /// A worker is told the panel that its share of the next product starts with; branches are not the caller's.
    #[test]
    fn shares_start_where_workers_will() {
        let workers = Workers::new(2).expect("threads can be started");
        let cx = portable(&workers);
        let layout = PackedLayout::new(64, 32, WeightFormat::Int8PerChannel).expect("sizes are fine");
        let blobs = [weights(&layout, 1), weights(&layout, 2)];
        let views = [&blobs[0], &blobs[1]].map(|blob| layout.view(blob).expect("length matches"));
        let [one, other] = views.map(|weights| weights.codes_from(0).as_ptr().addr());
        // The thread may use up what it is told at any time; the caller does so in regions only.
        expect(&cx, Next::Linear(&views), &[Some(views[1])]);
        assert_eq!(cx.workers.next_ahead(0), Some(one));
        expect(&cx, Next::Gated(&[views[1], views[0]]), &[]);
        assert_eq!(cx.workers.next_ahead(0), Some(other));

        let grid = Grid::plan(1, 8, 2 * layout.size_bytes(), 2);
        let (sections, panels) = place(&grid, &views, grid.groups(views[0])).expect("the second weight has a tile");
        assert_eq!((sections[0].0.as_ptr().addr(), panels), (other, 4));
        assert!(place(&grid, &views, 2 * grid.groups(views[0])).is_none(), "there are no more items");
    }
}
