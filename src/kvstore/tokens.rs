//! Retry tokens: which writes were carried out, with their outcomes.
//!
//! A client that got no answer does not know whether its write happened. With a token it may send the same
//! write again, to any member, until it gets an outcome. The write is carried out at most once:
//!
//! - A token holds an index that was applied when it was issued. Each write that carries it is applied at a
//!   higher index; a token that claims otherwise is refused.
//! - The table remembers the last [`REMEMBERED_MAX`] tokens. When it forgets one, `floor` becomes the index
//!   of that token's write.
//! - So if a write was carried out and forgotten, its token's index is below its own index, which is at most
//!   `floor`. Unknown tokens below `floor` are refused. All others are new.
//!
//! The table is part of the replicated state and of its snapshots. Whether a token is new is decided when
//! the entry is applied, so of two copies of a write in the log the second gets the first one's outcome.

use std::collections::{HashMap, VecDeque};
use std::iter;

use serde::{Deserialize, Serialize};

use crate::channels::{Index, Term};
use crate::error::RequestError;

/// The number of tokens that a member remembers. All members must have the same number.
pub const REMEMBERED_MAX: usize = 16_384;

/// Identifies one write of one client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Token {
    /// An index that was applied when the token was issued.
    pub index: Index,
    /// Drawn when it was issued.
    pub random: u64,
}

/// A token, and what it may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Retry {
    pub token: Token,
    /// Of the write, so that a token that was used for another one is noticed.
    pub fingerprint: [u8; 16],
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// The entry that carried it out.
    pub index: Index,
    /// The term of that entry.
    pub term: Term,
    /// True if all conditions held.
    pub succeeded: bool,
    /// Bit n: the key of the n-th operation that was carried out existed before.
    pub existed: u128,
}

impl Outcome {
    /// True if the key of the n-th operation existed before.
    pub fn existed(&self, operation: usize) -> bool {
        self.existed >> operation & 1 == 1
    }
}

/// One remembered write, as in a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Remembered {
    pub retry: Retry,
    pub outcome: Outcome,
}

/// What the table says of a token.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Recalled {
    /// It was never used: carry the write out, and remember it.
    New,
    /// The write was carried out.
    Known(Outcome),
    /// The write cannot be carried out.
    Refused(RequestError),
}

/// The table.
#[derive(Debug)]
pub(super) struct Tokens {
    max: usize,
    by_token: HashMap<Token, Remembered>,
    /// In the order of their writes.
    order: VecDeque<Token>,
    floor: Index,
}

impl Tokens {
    pub fn new(max: usize) -> Self {
        Self { max, by_token: HashMap::new(), order: VecDeque::new(), floor: 0 }
    }

    /// Looks up the token of a write that the entry at `index` holds.
    pub fn recall(&self, retry: &Retry, index: Index) -> Recalled {
        let token = retry.token;
        if let Some(known) = self.by_token.get(&token) {
            if known.retry.fingerprint == retry.fingerprint {
                return Recalled::Known(known.outcome);
            }
            let why = "this retry token was used for another write: ask for a token for each write";
            return Recalled::Refused(RequestError::Unprocessable(why.into()));
        }
        if token.index >= index {
            let why =
                "this retry token was not issued by a member: POST /v1/retry-token issues one";
            return Recalled::Refused(RequestError::Invalid(why.into()));
        }
        if token.index < self.floor {
            let why = "this retry token is too old: the write may have been carried out and forgotten; read before deciding";
            return Recalled::Refused(RequestError::Conflict(why.into()));
        }
        Recalled::New
    }

    /// Remembers a new write. The oldest one is forgotten if the table is full.
    pub fn remember(&mut self, remembered: Remembered) {
        if self.order.len() == self.max
            && let Some(oldest) = self.order.pop_front()
        {
            let forgotten = self.by_token.remove(&oldest).expect("both hold the same tokens");
            self.floor = forgotten.outcome.index;
        }
        self.order.push_back(remembered.retry.token);
        self.by_token.insert(remembered.retry.token, remembered);
    }

    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// `floor`, and what is remembered, in the order of the writes.
    pub fn contents(&self) -> (Index, Vec<Remembered>) {
        (self.floor, self.order.iter().map(|token| self.by_token[token]).collect())
    }

    /// A table with these [`contents`](Self::contents); `None` if no table has them.
    pub fn restored(max: usize, floor: Index, contents: Vec<Remembered>) -> Option<Self> {
        let mut tokens = Self { floor, ..Self::new(max) };
        let indexes = contents.iter().map(|remembered| remembered.outcome.index);
        let is_ordered = iter::once(floor).chain(indexes).is_sorted_by(|a, b| a < b);
        if !is_ordered || contents.len() > max {
            return None;
        }
        for remembered in contents {
            tokens.remember(remembered);
        }
        // Otherwise a token occurs twice.
        (tokens.by_token.len() == tokens.order.len()).then_some(tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retry(index: Index, random: u64, write: u8) -> Retry {
        Retry { token: Token { index, random }, fingerprint: [write; 16] }
    }

    fn write(tokens: &mut Tokens, retry: Retry, index: Index) -> Recalled {
        let recalled = tokens.recall(&retry, index);
        if recalled == Recalled::New {
            let outcome = Outcome { index, term: 1, succeeded: true, existed: 0 };
            tokens.remember(Remembered { retry, outcome });
        }
        recalled
    }

    fn refusal(recalled: Recalled) -> &'static str {
        match recalled {
            Recalled::Refused(RequestError::Invalid(_)) => "from the future",
            Recalled::Refused(RequestError::Conflict(_)) => "too old",
            Recalled::Refused(RequestError::Unprocessable(_)) => "another write",
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_token_is_good_for_one_write_and_its_repetitions() {
        let mut tokens = Tokens::new(3);
        assert_eq!(write(&mut tokens, retry(4, 1, 1), 5), Recalled::New);
        let Recalled::Known(outcome) = write(&mut tokens, retry(4, 1, 1), 9) else {
            panic!("it is known")
        };
        assert_eq!((outcome.index, tokens.len()), (5, 1));
        assert_eq!(refusal(write(&mut tokens, retry(4, 1, 2), 9)), "another write");
        assert_eq!(refusal(write(&mut tokens, retry(9, 2, 2), 9)), "from the future");
        assert_eq!(write(&mut tokens, retry(8, 2, 2), 9), Recalled::New);
    }

    #[test]
    fn a_forgotten_token_is_never_new_again() {
        let mut tokens = Tokens::new(2);
        // Issued late, used early; issued early, used late: the floor follows the writes.
        for (issued, used) in [(4, 5), (1, 6), (4, 7), (6, 8)] {
            assert_eq!(write(&mut tokens, retry(issued, used, 1), used), Recalled::New);
        }
        assert_eq!((tokens.floor, tokens.len()), (6, 2));
        for (issued, used) in [(4, 5), (1, 6)] {
            assert_eq!(refusal(tokens.recall(&retry(issued, used, 1), 20)), "too old");
        }
        // Unused tokens that are too old, and one that is not.
        assert_eq!(refusal(tokens.recall(&retry(5, 99, 1), 20)), "too old");
        assert_eq!(tokens.recall(&retry(6, 99, 1), 20), Recalled::New);
        let (floor, contents) = tokens.contents();
        let restored = Tokens::restored(2, floor, contents.clone()).expect("a table");
        assert_eq!(restored.contents(), (6, contents.clone()));
        for (floor, contents) in [
            (7, contents.clone()),
            (6, contents.iter().rev().copied().collect()),
            (6, vec![contents[0], Remembered { retry: contents[0].retry, ..contents[1] }]),
        ] {
            assert!(Tokens::restored(2, floor, contents).is_none());
        }
    }
}
