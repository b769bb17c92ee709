//! The replicated state: every key's last write, and the retry tokens. Beside it, the history.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::ops::Bound;

use super::command::{Condition, Operation, Txn};
use super::history::{History, removal};
use super::snapshot::{Head, invalid};
use super::tokens::{Outcome, Recalled, Remembered, Retry, Tokens};
use super::{Applied, KeyValue};
use crate::channels::{Index, Term};
use crate::error::RequestError;

/// Every key's last write by hash, and the keys in their order.
///
/// The hash map serves reads and writes, the ordered index serves pages. Sorting the keys for each page
/// instead would cost a write nothing, but a page among a million keys 0.2 s in place of 0.5 ms.
#[derive(Debug, Default)]
pub(super) struct Records {
    by_key: HashSet<KeyValue>,
    ordered: BTreeSet<InOrder>,
    bytes: usize,
}

/// A key in the ordered index. A short key is here itself, so that replacing its record leaves the index
/// alone. A long one is in its record.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct InOrder {
    /// In big-endian order the first bytes of the key, padded with zeros, and last the key's length or
    /// [`Self::LONG`], which decides among keys that end with zeros. Comparing them follows no pointer.
    head: (u64, u64),
    /// The record of a long key.
    long: Option<KeyValue>,
}

impl InOrder {
    /// The least length of a long key.
    const LONG: usize = 16;

    pub fn new(record: &KeyValue) -> Self {
        let (key, mut head) = (record.key(), [0; Self::LONG]);
        let first = &key[..key.len().min(Self::LONG - 1)];
        head[..first.len()].copy_from_slice(first);
        head[Self::LONG - 1] = key.len().min(Self::LONG) as u8;
        let head = u128::from_be_bytes(head);
        let long = Self::is_long(record).then(|| record.clone());
        Self { head: ((head >> 64) as u64, head as u64), long }
    }

    /// One that stands for `key` in a search.
    fn probe(key: &[u8]) -> Self {
        Self::new(&KeyValue::new(key, b"", 0, 0))
    }

    fn is_long(record: &KeyValue) -> bool {
        record.key().len() >= Self::LONG
    }
}

impl Records {
    pub fn get(&self, key: &[u8]) -> Option<&KeyValue> {
        self.by_key.get(key)
    }

    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// The bytes of all keys and values.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the record that it replaced, for the caller to free without the lock.
    pub fn put(&mut self, record: &KeyValue) -> Option<KeyValue> {
        self.bytes += record.bytes();
        let old = self.by_key.replace(record.clone());
        if old.is_none() || InOrder::is_long(record) {
            self.ordered.replace(InOrder::new(record));
        }
        self.bytes -= old.as_ref().map_or(0, KeyValue::bytes);
        old
    }

    pub fn remove(&mut self, key: &[u8]) -> Option<KeyValue> {
        let old = self.by_key.take(key)?;
        self.ordered.remove(&InOrder::new(&old));
        self.bytes -= old.bytes();
        Some(old)
    }

    /// All records, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &KeyValue> {
        self.by_key.iter()
    }

    /// The records of the keys that start with `prefix` and are greater than `after`, in order.
    pub fn range<'a>(
        &'a self,
        prefix: &'a [u8],
        after: Option<&[u8]>,
    ) -> impl Iterator<Item = &'a KeyValue> {
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(InOrder::probe(after)),
            _ => Bound::Included(InOrder::probe(prefix)),
        };
        let from = self.ordered.range((start, Bound::Unbounded));
        let records = from.map(|in_order| self.record(in_order));
        records.take_while(move |record| record.key().starts_with(prefix))
    }

    fn record<'a>(&'a self, InOrder { head, long }: &'a InOrder) -> &'a KeyValue {
        long.as_ref().unwrap_or_else(|| {
            let head = (u128::from(head.0) << 64 | u128::from(head.1)).to_be_bytes();
            let length = usize::from(head[InOrder::LONG - 1]);
            self.by_key.get(&head[..length]).expect("both have the same keys")
        })
    }
}

impl FromIterator<KeyValue> for Records {
    fn from_iter<I: IntoIterator<Item = KeyValue>>(records: I) -> Self {
        let mut all = Self::default();
        for record in records {
            all.put(&record);
        }
        all
    }
}

#[derive(Debug)]
pub(super) struct State {
    pub records: Records,
    pub tokens: Tokens,
    pub history: History,
    /// The index and term of the last entry. Entries of raft itself are not among them.
    pub applied: (Index, Term),
}

/// What an entry does to the state, prepared without changing it.
pub(super) struct Plan {
    /// The new record of each changed key; `true` if the key is removed.
    changes: Vec<(KeyValue, bool)>,
    remembered: Option<Remembered>,
    answer: Applied,
}

/// What [`State::carry_out`] did: the answer, the records that are no longer needed, and whether keys have
/// changed.
type Done = (Result<Applied, RequestError>, Vec<KeyValue>, bool);

impl State {
    pub fn new(tokens_max: usize) -> Self {
        Self {
            records: Records::default(),
            tokens: Tokens::new(tokens_max),
            history: History::default(),
            applied: (0, 0),
        }
    }

    /// Writes one key, with the entry that the record names. Returns the record that it replaced.
    pub fn put(&mut self, record: KeyValue) -> Option<KeyValue> {
        self.applied = (record.index(), record.term());
        let old = self.records.put(&record);
        self.history.push(&record, 0, false);
        old
    }

    /// Plans a transaction.
    ///
    /// # Errors
    /// If its token was used for another write, was never issued, or may have been forgotten.
    pub fn plan_txn(
        &self,
        txn: &Txn<'_>,
        retry: Option<Retry>,
        index: Index,
        term: Term,
    ) -> Result<Plan, RequestError> {
        match retry.map(|retry| self.tokens.recall(&retry, index)) {
            Some(Recalled::Refused(why)) => return Err(why),
            Some(Recalled::Known(outcome)) => {
                let answer = Applied { is_replay: true, ..Applied::new(outcome) };
                let (changes, remembered) = (Vec::new(), None);
                return Ok(Plan { changes, remembered, answer });
            }
            Some(Recalled::New) | None => {}
        }
        let found = |key| self.records.get(key);
        let succeeded = txn.conditions.iter().all(|condition| {
            let Condition { key, is } = condition;
            is.holds(found(key).map(KeyValue::index))
        });
        let operations = if succeeded { &txn.then } else { &txn.otherwise };
        let mut answer = Applied::new(Outcome { index, term, succeeded, existed: 0 });
        let mut changes = Vec::new();
        for (position, operation) in operations.iter().enumerate() {
            let before = found(operation.key());
            answer.outcome.existed |= u128::from(before.is_some()) << position;
            match operation {
                Operation::Put { key, value } => {
                    changes.push((KeyValue::new(key, value, index, term), false));
                }
                Operation::Delete { key } if before.is_some() => {
                    changes.push((removal(key, index, term), true));
                }
                Operation::Delete { .. } => {}
                Operation::Get { .. } => answer.read.push(before.cloned()),
            }
        }
        let remembered = retry.map(|retry| Remembered { retry, outcome: answer.outcome });
        Ok(Plan { changes, remembered, answer })
    }

    /// Carries out what was planned for the entry at `index`. The caller frees the replaced records without
    /// the lock.
    pub fn carry_out(
        &mut self,
        index: Index,
        term: Term,
        planned: Result<Plan, RequestError>,
    ) -> Done {
        self.applied = (index, term);
        let Plan { changes, remembered, answer } = match planned {
            Ok(plan) => plan,
            Err(why) => return (Err(why), Vec::new(), false),
        };
        let has_changed = !changes.is_empty();
        let mut replaced = Vec::new();
        for (position, (record, is_removal)) in (0..).zip(changes) {
            replaced.extend(if is_removal {
                self.records.remove(record.key())
            } else {
                self.records.put(&record)
            });
            self.history.push(&record, position, is_removal);
        }
        if let Some(remembered) = remembered {
            self.tokens.remember(remembered);
        }
        (Ok(answer), replaced, has_changed)
    }

    /// What a snapshot holds besides the records.
    pub fn head(&self) -> Head {
        let ((index, term), (floor, remembered)) = (self.applied, self.tokens.contents());
        Head { index, term, floor, remembered }
    }

    /// The state that a snapshot holds. The history begins after it.
    ///
    /// # Errors
    /// If its retry tokens are none that a member can have remembered.
    pub fn restored(head: Head, records: Records, tokens_max: usize) -> io::Result<Self> {
        let Head { index, term, floor, remembered } = head;
        let mut history = History::default();
        history.restart(index);
        let tokens = Tokens::restored(tokens_max, floor, remembered);
        let tokens = tokens.ok_or_else(|| invalid("its retry tokens contradict each other"))?;
        Ok(Self { records, tokens, history, applied: (index, term) })
    }
}
