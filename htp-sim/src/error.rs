//! The one error of this crate's operations: a length, a limit or a value that does not fit.

use std::fmt;

/// What an operation was given and what it needed. Nothing was written when an operation returns it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShapeError {
    what: &'static str,
    found: usize,
    needed: Needed,
}

/// The right-hand side of a [`ShapeError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needed {
    Exactly(usize),
    AtMost(usize),
    AtLeast(usize),
    MultipleOf(usize),
    DivisorOf(usize),
    Rule(&'static str),
}

impl ShapeError {
    pub(crate) const fn new(what: &'static str, found: usize, needed: Needed) -> Self {
        Self { what, found, needed }
    }

    /// What was wrong, in words: `"length of x"`.
    pub fn what(&self) -> &'static str {
        self.what
    }

    /// The number that was found.
    pub fn found(&self) -> usize {
        self.found
    }
}

impl fmt::Display for ShapeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: found {}, need ", self.what, self.found)?;
        match self.needed {
            Needed::Exactly(n) => write!(f, "{n}"),
            Needed::AtMost(n) => write!(f, "at most {n}"),
            Needed::AtLeast(n) => write!(f, "at least {n}"),
            Needed::MultipleOf(n) => write!(f, "a multiple of {n}"),
            Needed::DivisorOf(n) => write!(f, "a divisor of {n}"),
            Needed::Rule(rule) => f.write_str(rule),
        }
    }
}

impl std::error::Error for ShapeError {}

/// `Ok` if `found == needed`.
pub(crate) fn expect_len(what: &'static str, found: usize, needed: usize) -> Result<(), ShapeError> {
    if found == needed { Ok(()) } else { Err(ShapeError::new(what, found, Needed::Exactly(needed))) }
}

/// `Ok` if `found <= limit`.
pub(crate) fn expect_at_most(what: &'static str, found: usize, limit: usize) -> Result<(), ShapeError> {
    if found <= limit { Ok(()) } else { Err(ShapeError::new(what, found, Needed::AtMost(limit))) }
}

/// The product of `factors`, or an error that names the size which does not fit in memory.
pub(crate) fn size(what: &'static str, factors: &[usize]) -> Result<usize, ShapeError> {
    let limit = isize::MAX as usize;
    let product = factors.iter().try_fold(1_usize, |product, &factor| product.checked_mul(factor));
    match product {
        Some(product) if product <= limit => Ok(product),
        _ => Err(ShapeError::new(
            what,
            factors.iter().copied().max().unwrap_or(0),
            Needed::Rule("a product that fits in memory"),
        )),
    }
}
