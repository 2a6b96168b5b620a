//! Hiding control tokens that are only text.
//!
//! A control token is recognised by its letters. A text whose letters could be taken for one is therefore written with
//! private-use characters in their place until the control tokens have been found, and then written back.
//!
//! Some tokenizers look for a control token in what their normalizer makes of a text. A letter that becomes the first of one (`＜`
//! by NFKC, a capital) is hidden as well then. What is written back is what the normalizer makes of a hidden letter.

use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;

use tokenizers::{NormalizedString, Normalizer, NormalizerWrapper};

use super::{Control, Tokenizer, TokenizerError};

/// A way to hide characters and to bring them back.
pub(crate) struct Mask {
    /// First characters of control tokens, and what a normalizer makes into one: `hidden[i]` is written as `base + i`.
    hidden: Vec<char>,
    /// What the normalizer makes of each.
    normal: Vec<char>,
    /// Those that may begin a control token behind the normalizer, and before it look like any letter.
    soft: BTreeSet<char>,
    /// Those of `soft` that may begin a token marked special.
    soft_specials: BTreeSet<char>,
    base: u32,
    /// Text of the control tokens, and whether they are marked special.
    literals: Vec<(String, bool)>,
}

impl Mask {
    /// A mask whose private-use characters occur in none of `texts`, for these texts.
    pub(crate) fn new<'a>(
        tokenizer: &Tokenizer,
        texts: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, TokenizerError> {
        let control = || tokenizer.control.iter();
        // Only with such a tokenizer all letters matter, and there are many.
        let is_soft = control().any(|control| control.soft_first.is_some());
        let matters = |c: &char| is_soft || is_private(*c);
        let mut letters: BTreeSet<char> = texts.into_iter().flat_map(str::chars).filter(matters).collect();
        letters.extend(control().flat_map(|control| control.literal.chars()).filter(matters));
        let normalizer = tokenizer.inner.get_normalizer();
        let becoming = |of: fn(&&Control) -> bool| -> BTreeSet<char> {
            let firsts: BTreeSet<char> = control().filter(of).filter_map(|control| control.soft_first).collect();
            let becomes =
                |c: &char| !firsts.is_empty() && normal(normalizer, &c.to_string()).contains(|c| firsts.contains(&c));
            letters.iter().copied().filter(becomes).collect()
        };
        let soft = becoming(|_| true);
        let firsts = control().filter_map(|control| control.literal.chars().next());
        let hidden: BTreeSet<char> = firsts.chain(soft.iter().copied()).collect();
        let taken: Vec<u32> = letters.iter().filter(|c| is_private(**c)).map(|c| u32::from(*c)).collect();
        let base = free_run(&taken, hidden.len() as u32).ok_or(TokenizerError::NoFreeCharacters)?;
        Ok(Self {
            normal: hidden.iter().map(|c| normal_char(normalizer, *c)).collect(),
            hidden: hidden.into_iter().collect(),
            soft,
            soft_specials: becoming(|control| control.special),
            base,
            literals: control().map(|control| (control.literal.clone(), control.special)).collect(),
        })
    }

    /// Hides every character that could begin a control token.
    pub(crate) fn all(&self, text: &str) -> String {
        text.chars().map(|c| self.mask_char(c)).collect()
    }

    /// Hides the first character of each token marked special, and leaves other markup as it is.
    pub(crate) fn specials(&self, text: &str) -> String {
        let is_special = |rest: &str| self.literals.iter().any(|(text, special)| *special && rest.starts_with(text));
        self.where_begun(text, &self.soft_specials, is_special)
    }

    /// Hides each character at which a control token begins, or might with what follows the text. Others stay, for the template
    /// to read: a token may begin with the letter of a word.
    pub(crate) fn role(&self, text: &str) -> String {
        let is_begun =
            |rest: &str| self.literals.iter().any(|(text, _)| rest.starts_with(text) || text.starts_with(rest));
        self.where_begun(text, &self.soft, is_begun)
    }

    fn where_begun(&self, text: &str, soft: &BTreeSet<char>, is_begun: impl Fn(&str) -> bool) -> String {
        let hide = |(at, c)| if soft.contains(&c) || is_begun(&text[at..]) { self.mask_char(c) } else { c };
        text.char_indices().map(hide).collect()
    }

    /// The text as it was before.
    pub(crate) fn unmask(&self, text: &str) -> String {
        text.chars().map(|c| self.unmask_char(c)).collect()
    }

    fn unmask_char(&self, c: char) -> char {
        self.index(c).map_or(c, |index| self.hidden[index])
    }

    /// What a normalizer makes of the character that `c` hides.
    pub(super) fn normal_char(&self, c: char) -> char {
        self.index(c).map_or(c, |index| self.normal[index])
    }

    fn index(&self, c: char) -> Option<usize> {
        let index = u32::from(c).wrapping_sub(self.base) as usize;
        (index < self.hidden.len()).then_some(index)
    }

    fn mask_char(&self, c: char) -> char {
        match self.hidden.binary_search(&c) {
            Ok(index) => char::from_u32(self.base + index as u32).expect("free_run gives private-use characters"),
            Err(_) => c,
        }
    }
}

/// The letter that begins a control token of text `literal` behind `normalizer`, where the tokenizer looks for it, if other letters
/// than those of `literal` might have become it.
pub(super) fn soft_first(normalizer: Option<&NormalizerWrapper>, literal: &str) -> Option<char> {
    let behind = normal(normalizer, literal);
    let is_plain = behind == literal && normalizer.is_none_or(|normalizer| leaves_plain(normalizer, literal));
    (!is_plain).then(|| behind.chars().next()).flatten()
}

/// Whether no other text becomes `literal` by `normalizer`.
fn leaves_plain(normalizer: &NormalizerWrapper, literal: &str) -> bool {
    match normalizer {
        NormalizerWrapper::Sequence(steps) => steps.as_ref().iter().all(|step| leaves_plain(step, literal)),
        NormalizerWrapper::Prepend(_) => true,
        // Spaces to marks.
        NormalizerWrapper::Replace(replace) => {
            !replace.content.is_empty() && !replace.content.chars().any(|c| literal.contains(c))
        }
        // ASCII letters that others are the same as, by their canonical decomposition.
        NormalizerWrapper::NFC(_) => literal.is_ascii() && !literal.contains(['K', ';', '`']),
        _ => false,
    }
}

/// What `normalizer` makes of `c`, if that is one character.
fn normal_char(normalizer: Option<&NormalizerWrapper>, c: char) -> char {
    let normal = normal(normalizer, &c.to_string());
    let mut chars = normal.chars();
    match (chars.next(), chars.next()) {
        (Some(only), None) => only,
        _ => c,
    }
}

/// `text` behind `normalizer`, but for what it puts before any text.
fn normal(normalizer: Option<&NormalizerWrapper>, text: &str) -> String {
    fn apply(step: &NormalizerWrapper, text: &mut NormalizedString) -> tokenizers::Result<()> {
        match step {
            NormalizerWrapper::Sequence(steps) => steps.as_ref().iter().try_for_each(|step| apply(step, text)),
            NormalizerWrapper::Prepend(_) => Ok(()),
            step => step.normalize(text),
        }
    }
    let Some(normalizer) = normalizer else { return text.to_owned() };
    // A damaged one can make the library panic; encoding says so.
    let made = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let mut made = NormalizedString::from(text);
        apply(normalizer, &mut made).map(|()| made.get().to_owned())
    }));
    made.ok().and_then(Result::ok).unwrap_or_else(|| text.to_owned())
}

fn is_private(c: char) -> bool {
    PRIVATE_USE.iter().any(|(first, last)| (*first..=*last).contains(&u32::from(c)))
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
