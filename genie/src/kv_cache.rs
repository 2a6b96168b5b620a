//! The engine with an account of its cache: which adapter, at which strengths, made each row.
//!
//! ```text
//! row     0 ........ 9 | 10 ....... 17 | 18 ... position
//! maker   base         | pirate at 0.5 | what is bound now
//! ```
//!
//! A row depends on all rows before it. So only the leading rows of what is bound now are as if it had run alone; a row
//! behind another maker's is not, whoever made it.

use std::sync::atomic::AtomicBool;

use crate::adapters::Selection;
use crate::engine::{Engine, EngineError, Logits};

/// An engine, what it runs with, and who made its rows.
pub(crate) struct KvCache {
    engine: Box<dyn Engine>,
    bound: Option<Selection>,
    /// What `bound` makes.
    maker: Maker,
    /// Rows before those that `maker` made last, in order. Neighbours differ, and the last one differs from `maker`.
    spans: Vec<Span>,
}

/// What determines a row besides the tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Maker {
    /// The base alone. Strengths that are all 0 skip the branches, so that they are the base, unless the adapter has other
    /// encodings than the base.
    Base,
    /// An adapter.
    Adapter {
        /// Which load of an adapter.
        generation: u64,
        /// Bits of the strength of each rank column.
        strengths: Box<[u32]>,
    },
}

struct Span {
    end: usize,
    maker: Maker,
}

impl KvCache {
    /// Takes an engine that is empty or whose rows the base made.
    pub(crate) fn new(engine: Box<dyn Engine>) -> Self {
        Self { engine, bound: None, maker: Maker::Base, spans: Vec::new() }
    }

    pub(crate) fn engine(&self) -> &dyn Engine {
        &*self.engine
    }

    /// For loading adapters; rows and selection are not to be changed through this.
    pub(crate) fn engine_mut(&mut self) -> &mut dyn Engine {
        &mut *self.engine
    }

    pub(crate) fn position(&self) -> usize {
        self.engine.position()
    }

    pub(crate) fn forward(&mut self, ids: &[u32], logits: Logits, cancel: &AtomicBool) -> Result<&[f32], EngineError> {
        self.engine.forward(ids, logits, cancel)
    }

    /// Forgets every row from `position` on, if there are so many.
    pub(crate) fn rewind(&mut self, position: usize) {
        let position = position.min(self.position());
        self.engine.rewind(position);
        let n_kept = self.spans.partition_point(|span| span.end < position);
        self.spans.truncate(n_kept + 1);
        if let Some(last) = self.spans.last_mut() {
            last.end = last.end.min(position);
        }
        self.merge();
    }

    /// Runs with `selection` from now on.
    ///
    /// # Errors
    /// What the engine says; then nothing has changed.
    pub(crate) fn bind(&mut self, selection: Option<Selection>) -> Result<(), EngineError> {
        if self.bound == selection {
            return Ok(());
        }
        self.engine.select_adapter(selection.as_ref().map(Selection::for_engine))?;
        let end = self.position();
        if self.spans.last().map_or(0, |span| span.end) < end {
            self.spans.push(Span { end, maker: self.maker.clone() });
        }
        self.maker = selection.as_ref().map_or(Maker::Base, Selection::maker);
        self.bound = selection;
        self.merge();
        Ok(())
    }

    /// Number of leading rows that are as if what is bound now had run alone.
    pub(crate) fn own_rows(&self) -> usize {
        match self.spans.first() {
            None => self.position(),
            Some(first) if first.maker == self.maker => first.end,
            Some(_) => 0,
        }
    }

    /// Number of rows that something else made than what is bound now.
    pub(crate) fn foreign_rows(&self) -> usize {
        let mut start = 0;
        let mut n_foreign = 0;
        for span in &self.spans {
            n_foreign += if span.maker == self.maker { 0 } else { span.end - start };
            start = span.end;
        }
        n_foreign
    }

    /// Restores that the last span differs from what is bound, and is not empty.
    fn merge(&mut self) {
        let start = |spans: &[Span]| spans.len().checked_sub(2).map_or(0, |i| spans[i].end);
        while let Some(last) = self.spans.last()
            && (last.maker == self.maker || last.end == start(&self.spans))
        {
            self.spans.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::AdapterSource;
    use crate::engine::scripted::Scripted;

    proptest! {
        // Guards: the account of who made which row is right after whatever order of binding, feeding and rewinding;
        // checked against one maker noted per row.
        #[test]
        fn account_equals_one_maker_per_row(
            ops in prop::collection::vec((0_u8..3, 0_usize..8), 0..60),
            has_encodings: bool,
        ) {
            let mut engine = Scripted::hashed(10, 400);
            let generation = engine.load_adapter("a", &AdapterSource::Peft("a".into())).unwrap().generation;
            let mut cache = KvCache::new(Box::new(engine));
            let mut rows: Vec<usize> = Vec::new();
            let mut bound = 0;
            // 0 is the base and 1 an adapter at strength 0, which is the same unless it brings encodings.
            let maker = |bound: usize| if has_encodings { bound } else { bound.max(1) };
            for (op, n) in ops {
                match op {
                    0 => {
                        bound = n % 4;
                        let columns = vec![bound.saturating_sub(1) as f32, 0.0];
                        let named = Selection { name: "a".to_owned(), columns, generation, has_encodings };
                        cache.bind((bound != 0).then_some(named)).unwrap();
                    }
                    1 => {
                        cache.forward(&vec![1; n], Logits::None, &AtomicBool::new(false)).unwrap();
                        rows.extend(vec![maker(bound); n]);
                    }
                    _ => {
                        cache.rewind(n * 3);
                        rows.truncate(n * 3);
                    }
                }
                let own = maker(bound);
                prop_assert_eq!(cache.position(), rows.len());
                prop_assert_eq!(cache.own_rows(), rows.iter().take_while(|&&maker| maker == own).count());
                prop_assert_eq!(cache.foreign_rows(), rows.iter().filter(|&&maker| maker != own).count());
            }
        }
    }
}
