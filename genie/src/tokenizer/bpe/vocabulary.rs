//! Tokens by id and by text.

use std::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashTable};

/// Texts one behind the other in one allocation.
#[derive(Default)]
pub(super) struct Texts {
    joined: String,
    ends: Vec<u32>,
}

impl Texts {
    /// Adds `text`, unless there are more than 4 GB then.
    pub(super) fn push(&mut self, text: &str) -> Option<()> {
        self.ends.push(u32::try_from(self.joined.len() + text.len()).ok()?);
        self.joined.push_str(text);
        Some(())
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn get(&self, i: usize) -> &str {
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.joined[start as usize..self.ends[i] as usize]
    }
}

/// A vocabulary: each token has one id, and each id at most one token.
pub(super) struct Vocabulary {
    texts: Texts,
    /// The id of each text.
    ids: Vec<u32>,
    /// For each id, the number of its text, or [`ABSENT`].
    numbers: Vec<u32>,
    /// Numbers of texts, by what these are.
    by_text: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl Vocabulary {
    /// `None` if a text or an id is there twice, or if ids are far from dense.
    pub(super) fn new(mut texts: Texts, ids: Vec<u32>) -> Option<Self> {
        texts.joined.shrink_to_fit();
        let n_ids = ids.iter().max().map_or(Some(0), |&id| (id as usize).checked_add(1))?;
        if 2 * ids.len() + FEW < n_ids {
            return None;
        }
        let (hasher, mut numbers) = (DefaultHashBuilder::default(), vec![ABSENT; n_ids]);
        let mut by_text = HashTable::with_capacity(ids.len());
        for (number, &id) in (0..).zip(&ids) {
            let text = texts.get(number as usize);
            let hash_of = |&number: &u32| hasher.hash_one(texts.get(number as usize));
            let same = |&other: &u32| texts.get(other as usize) == text;
            let hashbrown::hash_table::Entry::Vacant(place) = by_text.entry(hasher.hash_one(text), same, hash_of)
            else {
                return None;
            };
            place.insert(number);
            if std::mem::replace(&mut numbers[id as usize], number) != ABSENT {
                return None;
            }
        }
        Some(Self { texts, ids, numbers, by_text, hasher })
    }

    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.number(token).map(|number| self.id_of(number))
    }

    /// The number of the text `token`, quick to find if it is `guess`.
    pub(super) fn number_near(&self, guess: u32, token: &str) -> Option<u32> {
        let is_guess = (guess as usize) < self.len() && self.texts.get(guess as usize) == token;
        if is_guess { Some(guess) } else { self.number(token) }
    }

    /// The id of the text of a number that was found.
    pub(super) fn id_of(&self, number: u32) -> u32 {
        self.ids[number as usize]
    }

    fn number(&self, token: &str) -> Option<u32> {
        let same = |&number: &u32| self.texts.get(number as usize) == token;
        self.by_text.find(self.hasher.hash_one(token), same).copied()
    }

    pub(super) fn token(&self, id: u32) -> Option<&str> {
        let number = *self.numbers.get(id as usize)?;
        (number != ABSENT).then(|| self.texts.get(number as usize))
    }

    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        self.ids.iter().enumerate().map(|(number, &id)| (self.texts.get(number), id))
    }
}

/// An id without a token.
const ABSENT: u32 = u32::MAX;

/// Ids without a token that even the smallest vocabulary may have.
const FEW: usize = 1024;
