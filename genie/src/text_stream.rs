//! Token ids to whole pieces of text.
//!
//! A piece is always valid UTF-8: bytes wait until their character is complete. Text that may still become a stop
//! sequence waits as well, and a stop sequence itself is never given out. What comes out does not depend on how the
//! bytes were cut into tokens.

use crate::tokenizer::{Growth, Tokenizer};

/// The text of one answer, as it grows.
#[derive(Debug)]
pub(crate) struct TextStream {
    stops: Vec<String>,
    bytes: Vec<u8>,
    /// Whole characters that may be the beginning of a stop sequence.
    held: String,
    growth: Growth,
    is_stopped: bool,
}

impl TextStream {
    /// A stream that ends before any of `stops`.
    pub(crate) fn new(stops: &[String]) -> Self {
        Self {
            stops: stops.to_vec(),
            bytes: Vec::new(),
            held: String::new(),
            growth: Growth::default(),
            is_stopped: false,
        }
    }

    /// The text goes on behind another, as nothing that begins: some tokenizers drop a space from a beginning.
    pub(crate) fn go_on(&mut self) {
        self.growth.go_on();
    }

    /// Adds a token and returns the text that is now certain.
    pub(crate) fn push(&mut self, id: u32, tokenizer: &Tokenizer) -> String {
        tokenizer.append_bytes(id, &mut self.growth, &mut self.bytes);
        let text = take_whole(&mut self.bytes);
        self.push_text(&text)
    }

    /// Whether a stop sequence has been seen. Nothing comes out after it.
    pub(crate) fn is_stopped(&self) -> bool {
        self.is_stopped
    }

    /// The text that waited: the answer ends here. An incomplete character becomes U+FFFD.
    pub(crate) fn finish(&mut self) -> String {
        let tail = String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned() + &self.growth.finish();
        let mut text = self.push_text(&tail);
        text.push_str(&std::mem::take(&mut self.held));
        text
    }

    fn push_text(&mut self, text: &str) -> String {
        if self.is_stopped {
            return String::new();
        }
        let old_len = self.held.len();
        self.held.push_str(text);
        if let Some(start) = first_stop(&self.held, old_len, &self.stops) {
            self.is_stopped = true;
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let waiting = self.held.len() - longest_beginning(&self.held, &self.stops);
        let rest = self.held.split_off(waiting);
        std::mem::replace(&mut self.held, rest)
    }
}

/// Where the stop sequence begins that is complete first, looking at ends after `old_len` only. Of several that end at
/// the same place the longest counts.
fn first_stop(text: &str, old_len: usize, stops: &[String]) -> Option<usize> {
    let ends = |stop: &String| {
        let from = floor_char_boundary(text, (old_len + 1).saturating_sub(stop.len()));
        text[from..].find(stop.as_str()).map(|at| (from + at + stop.len(), from + at))
    };
    stops.iter().filter_map(ends).min().map(|(_, start)| start)
}

/// Length of the longest end of `text` that is the beginning of a stop sequence.
fn longest_beginning(text: &str, stops: &[String]) -> usize {
    let longest = stops.iter().map(|stop| stop.len().saturating_sub(1)).max().unwrap_or(0);
    let from = floor_char_boundary(text, text.len().saturating_sub(longest));
    let is_beginning = |at: &usize| stops.iter().any(|stop| stop.starts_with(&text[*at..]));
    let starts = text[from..].char_indices().map(|(at, _)| from + at);
    starts.into_iter().find(is_beginning).map_or(0, |at| text.len() - at)
}

fn floor_char_boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

/// Takes what is complete from the front of `bytes`; only an incomplete character stays.
fn take_whole(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = bytes.as_slice();
    loop {
        match std::str::from_utf8(rest) {
            Ok(whole) => {
                text.push_str(whole);
                rest = &[];
                break;
            }
            Err(error) => {
                let (whole, tail) = rest.split_at(error.valid_up_to());
                text.push_str(std::str::from_utf8(whole).expect("valid_up_to ends at valid text"));
                match error.error_len() {
                    Some(len) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        rest = &tail[len..];
                    }
                    None => {
                        rest = tail;
                        break;
                    }
                }
            }
        }
    }
    let keep = rest.len();
    bytes.drain(..bytes.len() - keep);
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream(stops: &[&str], parts: &[&[u8]]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut stream = TextStream::new(&stops);
        let mut out = String::new();
        for part in parts {
            stream.bytes.extend_from_slice(part);
            let text = take_whole(&mut stream.bytes);
            out.push_str(&stream.push_text(&text));
        }
        out.push_str(&stream.finish());
        (out, stream.is_stopped())
    }

    // Guards: a stop sequence ends the text wherever the tokens cut it, and is not shown itself.
    #[test]
    fn stop_sequences() {
        let check = |stops: &[&str], parts: &[&str], want: &str, stopped: bool| {
            let parts: Vec<&[u8]> = parts.iter().map(|part| part.as_bytes()).collect();
            assert_eq!(stream(stops, &parts), (want.to_owned(), stopped), "{stops:?} {parts:?}");
        };
        check(&["END"], &["one E", "N", "D two"], "one ", true);
        check(&["END"], &["one E", "N", "E two"], "one ENE two", false);
        check(&["END"], &["one EN"], "one EN", false);
        check(&["aab"], &["a", "a", "a", "b"], "a", true);
        check(&["abcd", "bc"], &["a", "b", "c", "d"], "a", true);
        check(&["abc", "bc"], &["xab", "c"], "x", true);
        check(&["é!"], &["caf", "é", "!"], "caf", true);
        check(&[], &["plain"], "plain", false);
    }

    // Guards: what waits is only what may become a stop sequence, so that streaming is not delayed.
    #[test]
    fn holds_back_no_more_than_needed() {
        let mut stream = TextStream::new(&["STOP".to_owned()]);
        assert_eq!(stream.push_text("go ST"), "go ");
        assert_eq!(stream.push_text("ART"), "START");
        assert_eq!(stream.finish(), "");
    }

    proptest! {
        // Guards: pieces are whole UTF-8 and add up to the lossy text, wherever the bytes are cut.
        #[test]
        fn any_bytes_any_cuts(bytes in prop::collection::vec(prop_oneof![
            any::<u8>(), Just(0xF0), Just(0x9F), Just(0x98), Just(0x80), Just(b'a')], 0..64), step in 1_usize..5) {
            let parts: Vec<&[u8]> = bytes.chunks(step).collect();
            prop_assert_eq!(stream(&[], &parts).0, String::from_utf8_lossy(&bytes));
        }

        // Guards: the same text stops at the same place whatever the tokens are.
        #[test]
        fn stops_do_not_depend_on_cuts(text in "[abé]{0,24}", step in 1_usize..6,
                                       stops in prop::collection::vec("[abé]{1,4}", 0..4)) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let bytewise: Vec<&[u8]> = text.as_bytes().chunks(1).collect();
            let coarse: Vec<&[u8]> = text.as_bytes().chunks(step).collect();
            prop_assert_eq!(stream(&stops, &coarse), stream(&stops, &bytewise));
            prop_assert_eq!(stream(&stops, &[text.as_bytes()]), stream(&stops, &bytewise));
        }
    }
}
