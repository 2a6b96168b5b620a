//! Which weights a product of one row will read first, for workers who wait.

use super::Grid;
use crate::Cx;
use crate::packed::PackedWeights;
use crate::workers::{RANGES, SECTIONS};

/// The product of one row that comes after the one that is run next.
#[derive(Debug, Clone, Copy)]
pub enum Next<'a> {
    /// A [`linear`](super::linear) of these weights.
    Linear(&'a [PackedWeights<'a>]),
    /// A [`gated_linear`](super::gated_linear) of gate and up.
    Gated([PackedWeights<'a>; 2]),
}

/// Tells each worker which weights it will read first in the product after the next. While it waits in between, it asks for them. A
/// hint: no result depends on it.
///
/// `firsts` are the first halves of adapters' branches of that product. They are read before its weights, by all but the calling
/// thread.
pub fn expect(cx: &Cx<'_>, next: Next<'_>, firsts: &[Option<PackedWeights<'_>>]) {
    // A gated product starts with the gate's half of its tiles.
    let (weights, all) = match &next {
        Next::Linear(weights) => (*weights, *weights),
        Next::Gated(halves) => (&halves[..1], &halves[..]),
    };
    let panels = weights.iter().map(|weights| weights.layout().panels()).sum();
    let bytes = all.iter().map(|weights| weights.layout().size_bytes()).sum();
    let grid = Grid::plan(1, panels, bytes, cx.workers.count());
    let n_items = weights.iter().map(|weights| grid.groups(*weights)).sum();
    let n_helpers = cx.workers.count() - 1;
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
fn place<'a>(
    grid: &Grid,
    weights: &[PackedWeights<'a>],
    mut group: usize,
) -> Option<([(&'a [u8], usize); SECTIONS], usize)> {
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
