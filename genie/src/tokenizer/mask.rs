//! Hiding control tokens that are only text.
//!
//! A control token is recognised by its letters. A text whose letters could be taken for one is therefore written with
//! private-use characters in their place until the control tokens have been found, and then written back.

use super::{Tokenizer, TokenizerError};

/// A way to hide characters and to bring them back.
pub(crate) struct Mask {
    /// First characters of control tokens: `firsts[i]` is written as `base + i`.
    firsts: Vec<char>,
    base: u32,
    /// Text of the tokens marked special.
    specials: Vec<String>,
}

impl Mask {
    /// A mask whose private-use characters occur in none of `texts`.
    pub(crate) fn new<'a>(
        tokenizer: &Tokenizer,
        texts: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, TokenizerError> {
        let mut firsts: Vec<char> =
            tokenizer.control.iter().filter_map(|control| control.literal.chars().next()).collect();
        firsts.sort_unstable();
        firsts.dedup();
        let literals = tokenizer.control.iter().flat_map(|control| control.literal.chars());
        let mut taken: Vec<u32> = texts
            .into_iter()
            .flat_map(str::chars)
            .chain(literals)
            .map(u32::from)
            .filter(|c| PRIVATE_USE.iter().any(|(first, last)| (*first..=*last).contains(c)))
            .collect();
        taken.sort_unstable();
        taken.dedup();
        let base = free_run(&taken, firsts.len() as u32).ok_or(TokenizerError::NoFreeCharacters)?;
        let specials = tokenizer.control.iter().filter(|control| control.special);
        Ok(Self { firsts, base, specials: specials.map(|control| control.literal.clone()).collect() })
    }

    /// Hides every character that could begin a control token.
    pub(crate) fn all(&self, text: &str) -> String {
        text.chars().map(|c| self.mask_char(c)).collect()
    }

    /// Hides the first character of each token marked special, and leaves other markup as it is.
    pub(crate) fn specials(&self, text: &str) -> String {
        let mut masked = String::with_capacity(text.len());
        for (at, c) in text.char_indices() {
            let is_special = self.specials.iter().any(|literal| text[at..].starts_with(literal.as_str()));
            masked.push(if is_special { self.mask_char(c) } else { c });
        }
        masked
    }

    /// The text as it was before.
    pub(crate) fn unmask(&self, text: &str) -> String {
        text.chars().map(|c| self.unmask_char(c)).collect()
    }

    pub(super) fn unmask_char(&self, c: char) -> char {
        let index = u32::from(c).wrapping_sub(self.base) as usize;
        self.firsts.get(index).copied().unwrap_or(c)
    }

    fn mask_char(&self, c: char) -> char {
        match self.firsts.binary_search(&c) {
            Ok(index) => char::from_u32(self.base + index as u32).expect("free_run gives private-use characters"),
            Err(_) => c,
        }
    }
}

/// The first of `len` private-use characters in a row that are not in `taken`, which is sorted.
fn free_run(taken: &[u32], len: u32) -> Option<u32> {
    PRIVATE_USE.iter().find_map(|&(first, last)| {
        let inside = taken.iter().copied().filter(|c| (first..=last).contains(c));
        let mut start = first;
        for c in inside {
            if start + len <= c {
                break;
            }
            start = c + 1;
        }
        (start + len <= last + 1).then_some(start)
    })
}

/// The three private-use areas of Unicode.
const PRIVATE_USE: [(u32, u32); 3] = [(0xE000, 0xF8FF), (0xF_0000, 0xF_FFFD), (0x10_0000, 0x10_FFFD)];
