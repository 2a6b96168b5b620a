//! What a callback gets, and with which sentence code.

use crate::text_stream::TextStream;
use crate::tokenizer::Tokenizer;

use super::{Flow, SentenceCode};

/// One answer on its way to a callback.
pub(super) struct Output<'a> {
    callback: Callback<'a>,
    /// Also for ids: a stop sequence is found in the text.
    stream: TextStream,
    /// Text that is certain and was not given out yet.
    ready: String,
    has_begun: bool,
}

type TextCallback<'a> = &'a mut dyn FnMut(&str, SentenceCode) -> Flow;
type IdCallback<'a> = &'a mut dyn FnMut(&[u32], SentenceCode) -> Flow;

enum Callback<'a> {
    Text(TextCallback<'a>),
    Ids(IdCallback<'a>),
}

impl<'a> Output<'a> {
    pub(super) fn text(callback: TextCallback<'a>, stops: &[String]) -> Self {
        Self::new(Callback::Text(callback), stops)
    }

    pub(super) fn ids(callback: IdCallback<'a>, stops: &[String]) -> Self {
        Self::new(Callback::Ids(callback), stops)
    }

    fn new(callback: Callback<'a>, stops: &[String]) -> Self {
        Self { callback, stream: TextStream::new(stops), ready: String::new(), has_begun: false }
    }

    /// The answer goes on in the middle of a text.
    pub(super) fn go_on(&mut self) {
        self.stream.go_on();
    }

    /// Adds a token's text. Nothing is given out yet.
    pub(super) fn add(&mut self, id: u32, tokenizer: &Tokenizer) {
        self.ready.push_str(&self.stream.push(id, tokenizer));
    }

    /// Whether a stop sequence is complete.
    pub(super) fn is_stopped(&self) -> bool {
        self.stream.is_stopped()
    }

    /// Gives out what is certain, if anything: more will follow. `id` is the last token.
    pub(super) fn flush(&mut self, id: u32) -> Flow {
        let is_empty = matches!(self.callback, Callback::Text(_)) && self.ready.is_empty();
        if is_empty {
            return Flow::Continue;
        }
        let code = if self.has_begun { SentenceCode::Continue } else { SentenceCode::Begin };
        self.has_begun = true;
        self.give(&[id], code)
    }

    /// Gives out the rest. `id` is the last token.
    pub(super) fn finish(&mut self, id: u32) {
        self.ready.push_str(&self.stream.finish());
        let mut rest: &[u32] = &[id];
        if !self.has_begun {
            if self.give(rest, SentenceCode::Begin) == Flow::Stop {
                return;
            }
            rest = &[];
        }
        self.give(rest, SentenceCode::End);
    }

    /// Gives out the rest after an abort.
    pub(super) fn abort(&mut self) {
        self.ready.push_str(&self.stream.finish());
        self.give(&[], SentenceCode::Abort);
    }

    fn give(&mut self, ids: &[u32], code: SentenceCode) -> Flow {
        match &mut self.callback {
            Callback::Text(callback) => callback(&std::mem::take(&mut self.ready), code),
            Callback::Ids(callback) => {
                self.ready.clear();
                callback(ids, code)
            }
        }
    }
}
