//! Decides whether what clients saw of the store is linearizable: writes with conditions, transactions, retry
//! tokens, reads of keys, lists and watches.
//!
//! The log is the witness of the order of the writes, so nothing has to be searched:
//!
//! 1. [`Model`] carries out the log's writes in order. It is written from the promises, not from the code
//!    under test. [`Replay`] keeps each entry's answer, and every key at every index.
//! 2. Every answer to a write must be the model's answer for its entry. A write that was answered 503 has no
//!    entry. ([`Replay::check_sent`])
//! 3. If a write was answered before another one was sent, its entry must come first.
//! 4. A read has no entry. It needs an index at which the model holds exactly what it found. The index must
//!    not be below that of any operation that was answered before the read was sent, and must be below that
//!    of every write that was sent after the read was answered. ([`Replay::check_looked`])
//!
//! # The index of a read
//! Reads take their indexes in the order in which they were sent, each the smallest that rule 4 allows. If any
//! assignment fulfils the rule, this one does. A read's choice matters to other operations in two ways only.
//! It is a lower bound for the reads that were sent after its answer, which all choose later. And it must be
//! below the writes that were sent after its answer. A smaller index is better for both. So, by induction over
//! the reads in this order, each has an index that is at most that of any valid assignment.
//!
//! # What never counts against a history
//! - A write of unknown outcome may have an entry or not.
//! - Operations whose times touch are concurrent.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::fmt::Debug;
use std::rc::Rc;

pub type Violation = String;

macro_rules! ensure {
    ($holds:expr, $($why:tt)+) => {
        if !$holds {
            return Err(format!($($why)+));
        }
    };
}

/// Identifies one write of one client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token {
    pub index: u64,
    pub random: u64,
}

/// What a condition requires of its key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Requirement {
    Absent,
    Exists,
    WrittenAt(Vec<u64>),
    NotWrittenAt(Vec<u64>),
}

/// One operation of a write.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    Put(String, u64),
    Delete(String),
    Get(String),
}

/// What one write is to do. The log may contain it several times only if it has a token.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Write {
    pub conditions: Vec<(String, Requirement)>,
    pub then: Vec<Step>,
    pub otherwise: Vec<Step>,
    pub token: Option<Token>,
}

/// A key's value, and the entry that wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    pub value: u64,
    pub index: u64,
    pub term: u64,
}

/// What became of a write.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Done {
    pub index: u64,
    pub term: u64,
    pub succeeded: bool,
    /// Bit n: the key of the n-th operation existed before.
    pub existed: u128,
}

/// The answer to a write whose entry was applied.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    Done { done: Done, read: Vec<Option<Record>>, is_replay: bool },
    Refused(Refusal),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The token may have been forgotten.
    TooOld,
    /// The token was used for another write.
    OtherWrite,
    /// The token's index did not exist yet.
    NotIssued,
}

/// A place between two changes: the entry of the change before it, and that change's position.
pub type Place = (u64, u32);

/// The place after all changes of an entry.
pub fn after(index: u64) -> Place {
    (index, u32::MAX)
}

/// A change of a key, as a watcher sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub place: Place,
    pub term: u64,
    pub key: String,
    /// `None`: it was removed.
    pub value: Option<u64>,
}

/// The store as it is promised. `used` holds every write with a token that was ever carried out, of which
/// only the last `tokens_max` are remembered.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Model {
    pub records: BTreeMap<String, Record>,
    used: Vec<(Rc<Write>, Done)>,
    tokens_max: usize,
    /// The index and the term of the last entry.
    pub applied: (u64, u64),
}

impl Model {
    pub fn new(tokens_max: usize) -> Self {
        Self { records: BTreeMap::new(), used: Vec::new(), tokens_max, applied: (0, 0) }
    }

    fn forgotten(&self) -> usize {
        self.used.len().saturating_sub(self.tokens_max)
    }

    /// The index of the last write whose token is forgotten.
    pub fn floor(&self) -> u64 {
        self.used[..self.forgotten()].last().map_or(0, |(_, done)| done.index)
    }

    /// The writes whose tokens are remembered, in their order.
    pub fn remembered(&self) -> impl Iterator<Item = (Token, &Done)> {
        let remembered = self.used[self.forgotten()..].iter();
        remembered.map(|(write, done)| (write.token.expect("only these are kept"), done))
    }

    /// What the token of a write says about it, if that is not that it is new.
    fn recall(&self, write: &Write, token: Token, index: u64) -> Option<Answer> {
        let mut remembered = self.used[self.forgotten()..].iter();
        if let Some((first, done)) = remembered.find(|(first, _)| first.token == Some(token)) {
            let (done, read, is_replay) = (done.clone(), Vec::new(), true);
            let is_same = **first == *write;
            return Some(if is_same {
                Answer::Done { done, read, is_replay }
            } else {
                Answer::Refused(Refusal::OtherWrite)
            });
        }
        if token.index >= index {
            return Some(Answer::Refused(Refusal::NotIssued));
        }
        (token.index < self.floor()).then_some(Answer::Refused(Refusal::TooOld))
    }

    fn holds(&self, key: &str, requirement: &Requirement) -> bool {
        let written = self.records.get(key).map(|record| record.index);
        match (requirement, written) {
            (Requirement::Absent, written) => written.is_none(),
            (Requirement::Exists, written) => written.is_some(),
            (Requirement::WrittenAt(_), None) => false,
            (Requirement::WrittenAt(indexes), Some(index)) => indexes.contains(&index),
            (Requirement::NotWrittenAt(_), None) => true,
            (Requirement::NotWrittenAt(indexes), Some(index)) => !indexes.contains(&index),
        }
    }

    /// Applies the entry at `index`.
    ///
    /// # Panics
    /// If the rule for tokens lets a write be carried out twice.
    pub fn apply(&mut self, index: u64, term: u64, write: &Rc<Write>) -> (Answer, Vec<Change>) {
        assert!(self.applied.0 < index, "{index} comes after {}", self.applied.0);
        self.applied = (index, term);
        if let Some(token) = write.token {
            if let Some(answer) = self.recall(write, token, index) {
                return (answer, Vec::new());
            }
            let is_new = self.used.iter().all(|(used, _)| used.token != Some(token));
            assert!(is_new, "the rule carries {write:?} out twice");
        }
        let succeeded = write.conditions.iter().all(|(key, is)| self.holds(key, is));
        let before = self.records.clone();
        let (mut existed, mut read, mut changes) = (0, Vec::new(), Vec::new());
        for (bit, step) in
            (if succeeded { &write.then } else { &write.otherwise }).iter().enumerate()
        {
            let (Step::Put(key, _) | Step::Delete(key) | Step::Get(key)) = step;
            let found = before.get(key);
            if found.is_some() {
                existed |= 1 << bit;
            }
            let value = match step {
                Step::Put(_, value) => Some(*value),
                Step::Delete(_) if found.is_some() => None,
                Step::Delete(_) => continue,
                Step::Get(_) => {
                    read.push(found.cloned());
                    continue;
                }
            };
            match value {
                Some(value) => self.records.insert(key.clone(), Record { value, index, term }),
                None => self.records.remove(key),
            };
            let place = (index, changes.len() as u32);
            changes.push(Change { place, term, key: key.clone(), value });
        }
        let done = Done { index, term, succeeded, existed };
        if write.token.is_some() {
            self.used.push((write.clone(), done.clone()));
        }
        (Answer::Done { done, read, is_replay: false }, changes)
    }
}

/// A request with a write, as its client saw it.
#[derive(Clone, Debug)]
pub struct Sent {
    /// Identifies the bytes of the entry.
    pub write: u64,
    pub invoked: u64,
    pub completed: u64,
    pub fate: Fate,
}

#[derive(Clone, Debug)]
pub enum Fate {
    /// The entry of this request was applied, with this answer.
    Answered(u64, Answer),
    /// It was acknowledged before it was applied.
    Accepted,
    /// 503: nothing was proposed.
    Failed,
    /// 504, or no answer.
    Unknown,
}

/// A read, as its client saw it.
#[derive(Clone, Debug)]
pub struct Looked {
    pub invoked: u64,
    pub completed: u64,
    pub found: Found,
}

#[derive(Clone, Debug)]
pub enum Found {
    Key(String, Option<Record>),
    Page(Page),
    /// The index that the member had applied.
    Applied(u64),
}

/// A list of keys, with what was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    pub prefix: String,
    pub after: Option<String>,
    pub limit: usize,
    pub index: u64,
    pub records: Vec<(String, Record)>,
    pub has_more: bool,
}

/// What a watcher saw between two resets: after `from`, until it had looked at everything up to `reached`.
#[derive(Clone, Debug)]
pub struct Watched {
    pub prefix: String,
    pub from: Place,
    pub seen: Vec<Change>,
    pub reached: Place,
}

/// An entry of the log: its index, its term, and which write it holds.
pub type Entry = (u64, u64, u64);

/// A log, carried out by the model.
pub struct Replay {
    log: BTreeMap<u64, u64>,
    answers: BTreeMap<u64, Answer>,
    /// What each key became at which index. It begins with nothing at index 0.
    keys: BTreeMap<String, Vec<(u64, Option<Record>)>>,
    changes: Vec<Change>,
    pub model: Model,
    /// The log up to here was there before the first client.
    since: u64,
}

impl Replay {
    pub fn new(
        log: impl IntoIterator<Item = Entry>,
        writes: &BTreeMap<u64, Rc<Write>>,
        tokens_max: usize,
        since: u64,
    ) -> Self {
        let mut replay = Self {
            log: BTreeMap::new(),
            answers: BTreeMap::new(),
            keys: BTreeMap::new(),
            changes: Vec::new(),
            model: Model::new(tokens_max),
            since,
        };
        for (index, term, write) in log {
            let (answer, changes) = replay.model.apply(index, term, &writes[&write]);
            for change in &changes {
                let record = change.value.map(|value| Record { value, index, term });
                let versions = replay.keys.entry(change.key.clone());
                versions.or_insert_with(|| vec![(0, None)]).push((index, record));
            }
            replay.changes.extend(changes);
            replay.log.insert(index, write);
            replay.answers.insert(index, answer);
        }
        // A list shows the index of the last write, and a backup may end with entries of raft itself.
        replay.since = replay.log.range(..=since).next_back().map_or(0, |(index, _)| *index);
        replay
    }

    /// Checks what a member's state machine answered to an entry.
    pub fn check_answer(&self, index: u64, answer: &Answer) -> Result<(), Violation> {
        let expected = self.answers.get(&index);
        ensure!(
            expected == Some(answer),
            "entry {index} was answered {answer:?}, the model says {expected:?}"
        );
        Ok(())
    }

    /// Checks the writes, which must be all that were sent.
    pub fn check_sent(&self, sent: &[Sent]) -> Result<(), Violation> {
        let mut answered = HashSet::new();
        // How often each write may be in the log.
        let mut most: HashMap<u64, usize> = HashMap::new();
        for request in sent {
            let Sent { write, fate, .. } = request;
            let most = most.entry(*write).or_default();
            *most += usize::from(!matches!(fate, Fate::Failed));
            let Fate::Answered(index, answer) = fate else { continue };
            ensure!(
                self.log.get(index) == Some(write),
                "a write that was answered is lost: {request:?}"
            );
            ensure!(answered.insert(index), "two requests were answered by one entry: {request:?}");
            self.check_answer(*index, answer)?;
        }
        let mut places: HashMap<u64, usize> = HashMap::new();
        for (_, write) in self.log.range(self.since + 1..) {
            let made = places.entry(*write).or_default();
            *made += 1;
            let most = most.get(write).copied().unwrap_or_default();
            ensure!(
                *made <= most,
                "a write that was answered 503 was made, or one was made twice: {write}, {made} times, with {most} requests"
            );
        }
        for request in sent.iter().filter(|request| matches!(request.fate, Fate::Accepted)) {
            let is_made = places.contains_key(&request.write);
            ensure!(is_made, "a write that was acknowledged is lost: {request:?}");
        }
        self.check_order(sent)
    }

    /// Each entry's index with the times at which its request was sent and, perhaps, answered.
    fn times(&self, sent: &[Sent]) -> BTreeMap<u64, (u64, Option<u64>)> {
        let mut first_sent: HashMap<u64, u64> = HashMap::new();
        for Sent { write, invoked, .. } in sent {
            let first = first_sent.entry(*write).or_insert(*invoked);
            *first = (*first).min(*invoked);
        }
        let own = self.log.range(self.since + 1..);
        let mut times: BTreeMap<u64, (u64, Option<u64>)> = own
            .map(|(index, write)| (*index, (first_sent.get(write).copied().unwrap_or(0), None)))
            .collect();
        for Sent { invoked, completed, fate, .. } in sent {
            if let Fate::Answered(index, _) = fate {
                times.insert(*index, (*invoked, Some(*completed)));
            }
        }
        times
    }

    /// A write that was answered before another one was sent comes first in the log.
    fn check_order(&self, sent: &[Sent]) -> Result<(), Violation> {
        let mut last_sent = (0, 0);
        for (index, (invoked, completed)) in self.times(sent) {
            let (latest, before) = last_sent;
            ensure!(
                completed.is_none_or(|completed| completed >= latest),
                "the write at {index} was answered before the one at {before} was sent"
            );
            last_sent = last_sent.max((invoked, index));
        }
        Ok(())
    }

    /// Checks the reads. The module's documentation has the argument.
    pub fn check_looked(&self, looked: &[Looked], sent: &[Sent]) -> Result<(), Violation> {
        let times = self.times(sent);
        // The answers that were given, by their time, with the index of the operation.
        let mut given: BinaryHeap<Reverse<(u64, u64)>> = times
            .iter()
            .filter_map(|(index, (_, completed))| Some(Reverse(((*completed)?, *index))))
            .collect();
        // The writes by the time at which they were sent, each with the smallest index of those from it on.
        let mut bounds: Vec<(u64, u64)> =
            times.iter().map(|(index, (invoked, _))| (*invoked, *index)).collect();
        bounds.sort_unstable();
        let mut smallest = u64::MAX;
        for (_, index) in bounds.iter_mut().rev() {
            smallest = smallest.min(*index);
            *index = smallest;
        }
        let mut in_order: Vec<&Looked> = looked.iter().collect();
        in_order.sort_by_key(|read| read.invoked);
        let mut least = self.since;
        for read in in_order {
            while let Some(Reverse((completed, index))) = given.peek()
                && *completed < read.invoked
            {
                least = least.max(*index);
                given.pop();
            }
            let index = self.first_index(&read.found, least).map_err(|why| {
                format!("{why}, but index {least} was reached before it was sent: {read:?}")
            })?;
            let later = bounds.partition_point(|(invoked, _)| *invoked <= read.completed);
            let below = bounds.get(later).map_or(u64::MAX, |(_, index)| *index);
            ensure!(
                index < below,
                "a read shows index {index}, and the write at {below} was sent after its answer: {read:?}"
            );
            given.push(Reverse((read.completed, index)));
        }
        Ok(())
    }

    /// The first index from `least` on at which the model holds what was found.
    fn first_index(&self, found: &Found, least: u64) -> Result<u64, Violation> {
        match found {
            Found::Key(key, record) => {
                let never = [(0, None)];
                let versions = self.keys.get(key).map_or(&never[..], |versions| &versions[..]);
                let current = versions.partition_point(|(index, _)| *index <= least) - 1;
                let mut rest = versions[current..].iter();
                let version = rest.find(|(_, version)| version == record);
                version.map(|(index, _)| least.max(*index)).ok_or("a read is stale".to_owned())
            }
            Found::Page(page) => {
                ensure!(page.index >= least, "a list is stale");
                self.check_page(page).map(|()| page.index)
            }
            Found::Applied(index) => {
                ensure!(*index >= least, "an index is stale");
                Ok(*index)
            }
        }
    }

    fn record_at(versions: &[(u64, Option<Record>)], index: u64) -> Option<&Record> {
        let after = versions.partition_point(|(from, _)| *from <= index);
        versions[after - 1].1.as_ref()
    }

    /// Checks that a list shows the state at its index.
    pub fn check_page(&self, page: &Page) -> Result<(), Violation> {
        let Page { prefix, after, limit, index, records, has_more } = page;
        let expected: Vec<(String, Record)> = self
            .keys
            .iter()
            .filter(|(key, _)| key.starts_with(prefix) && after.as_ref().is_none_or(|it| *key > it))
            .filter_map(|(key, versions)| {
                Some((key.clone(), Self::record_at(versions, *index)?.clone()))
            })
            .collect();
        let shown = &expected[..expected.len().min(*limit)];
        ensure!(
            (shown, expected.len() > *limit) == (&records[..], *has_more),
            "a list does not show the state at its index: {page:?}, the model has {expected:?}"
        );
        Ok(())
    }

    /// Checks that a watcher saw each change of its prefix once, in order.
    pub fn check_watched(&self, watched: &Watched) -> Result<(), Violation> {
        let Watched { prefix, from, seen, reached } = watched;
        let expected = self.changes_after(*from, prefix).filter(|change| change.place <= *reached);
        let expected: Vec<&Change> = expected.collect();
        ensure!(
            expected.iter().copied().eq(seen),
            "a watcher of {prefix:?} saw from {from:?} to {reached:?} {seen:?}, and the changes are {expected:?}"
        );
        Ok(())
    }

    /// The changes of keys that start with `prefix`, after `from`.
    pub fn changes_after<'a>(
        &'a self,
        from: Place,
        prefix: &'a str,
    ) -> impl Iterator<Item = &'a Change> {
        let first = self.changes.partition_point(|change| change.place <= from);
        self.changes[first..].iter().filter(move |change| change.key.starts_with(prefix))
    }
}
