//! A word whose tokens become fewer.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use super::Merges;

/// Tokens, first one for each character, in a list that merged ones drop out of.
pub(super) struct Word {
    symbols: Vec<Symbol>,
}

#[derive(Clone, Copy)]
struct Symbol {
    id: u32,
    /// 0 once it has become part of the one before.
    n_bytes: usize,
    /// Neighbours by their place in the list; [`NONE`] at the ends.
    before: usize,
    after: usize,
}

/// A pair that may become one: the lowest rank goes first, of equal ones the first in the word.
type Candidate = Reverse<(u32, usize, u32)>;

impl Word {
    pub(super) fn with_capacity(n: usize) -> Self {
        Self { symbols: Vec::with_capacity(n) }
    }

    pub(super) fn push(&mut self, id: u32, n_bytes: usize) {
        let at = self.symbols.len();
        if let Some(last) = self.symbols.last_mut() {
            last.after = at;
        }
        self.symbols.push(Symbol { id, n_bytes, before: at.checked_sub(1).unwrap_or(NONE), after: NONE });
    }

    /// Merges pairs until there is none left that `merges` has.
    pub(super) fn merge(&mut self, merges: &Merges) {
        let mut queue: BinaryHeap<Candidate> =
            (0..self.symbols.len()).filter_map(|at| self.candidate(at, merges)).collect();
        while let Some(Reverse((_, at, id))) = queue.pop() {
            let left = self.symbols[at];
            let Some(&right) = self.symbols.get(left.after).filter(|_| left.n_bytes != 0) else { continue };
            // One of the two may have become another since.
            if merges.get(&(left.id, right.id)).is_none_or(|merge| merge.id != id) {
                continue;
            }
            self.symbols[left.after].n_bytes = 0;
            self.symbols[at] = Symbol { id, n_bytes: left.n_bytes + right.n_bytes, after: right.after, ..left };
            if let Some(next) = self.symbols.get_mut(right.after) {
                next.before = at;
            }
            queue.extend([left.before, at].into_iter().filter_map(|at| self.candidate(at, merges)));
        }
    }

    /// What the token at `at` and the one behind it may become.
    fn candidate(&self, at: usize, merges: &Merges) -> Option<Candidate> {
        let left = self.symbols.get(at)?;
        let right = self.symbols.get(left.after)?;
        merges.get(&(left.id, right.id)).map(|merge| Reverse((merge.rank, at, merge.id)))
    }

    /// Ids, and the bytes of the word that they stand for.
    pub(super) fn tokens(&self) -> impl Iterator<Item = (u32, Range<usize>)> {
        let mut end = 0;
        self.symbols.iter().filter(|symbol| symbol.n_bytes != 0).map(move |symbol| {
            let start = end;
            end += symbol.n_bytes;
            (symbol.id, start..end)
        })
    }
}

/// A place that no list has.
const NONE: usize = usize::MAX;
