//! Decides whether a key's history is linearizable: whether each operation can take effect at one
//! instant between its invocation and its completion, so that every read returns the last written
//! value.
//!
//! [`check`] decides it in O(n log n), because no value is written twice. A *cluster* is a value's
//! write together with the reads that returned it. A register holds a value once, so a cluster
//! stays together. Two times of a cluster matter: the `first_end` and the `last_start` among its
//! operations. Cluster A must precede cluster B if an operation of A ended before one of B started:
//! `A.first_end < B.last_start`.
//!
//! The history is linearizable if and only if each read ends no earlier than its write starts and
//! no two clusters must each precede the other:
//!
//! - Clusters in an order that keeps every "must precede", each with its write first and its reads
//!   in order of their start, form a legal order. So only a cycle of clusters can rule one out.
//! - Every cycle contains two clusters that rule each other out. Let M be its cluster with the
//!   greatest `last_start`, and N the next one after M. N's `first_end` is less than the
//!   `last_start` of its own successor, so less than M's: N must precede M too.
//!
//! To find two such clusters fast, treat each as a zone between its two times. A *forward* zone has
//! `first_end < last_start`: the register held the value all that time. A *backward* zone needs
//! only one instant. Two clusters rule each other out if two forward zones overlap, or if a
//! backward zone lies inside a forward one. (Gibbons and Korach, "Testing shared memories", 1997.)
//!
//! [`search`] tries the orders instead and shares no line with [`check`]: a second opinion. (Wing
//! and Gong, "Testing and verifying concurrent objects", 1993, with Lowe's memory of what was
//! tried.)
//!
//! Unknown outcomes never count against a history:
//!
//! - A write of unknown outcome has no end: it may take effect at any time after its invocation. If
//!   nobody read it, it may as well have failed.
//! - Operations whose times touch are concurrent.
//! - The caller leaves out reads without an answer and writes that certainly failed.

use std::collections::{BTreeMap, HashSet};
use std::fmt::{self, Debug, Display, Formatter};
use std::hash::Hash;

/// One client's operation on the key, with its result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation<V> {
    /// The client that asked. Shown in messages only; no rule depends on it.
    pub client: u64,
    pub action: Action<V>,
    /// When it was sent, on a clock that all clients share.
    pub invoked: u64,
    /// When the answer came. `None`: outcome unknown; it may have taken effect at any time after
    /// `invoked`, or never.
    pub completed: Option<u64>,
}

/// What an operation did to the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action<V> {
    /// Wrote a value that no other operation on this key writes.
    Write(V),
    /// Was answered this value; `None` if the key had never been written.
    Read(Option<V>),
}

impl<V> Operation<V> {
    /// The value whose cluster this belongs to; `None`: the key's initial state.
    fn value(&self) -> Option<&V> {
        match &self.action {
            Action::Write(value) => Some(value),
            Action::Read(value) => value.as_ref(),
        }
    }

    fn is_write(&self) -> bool {
        matches!(self.action, Action::Write(_))
    }

    fn end(&self) -> i128 {
        self.completed.map_or(NEVER, i128::from)
    }
}

/// Before the first invocation: when the initial state was written.
const BEFORE_ALL: i128 = -1;

/// The end of a write of unknown outcome.
const NEVER: i128 = i128::MAX;

/// The times of one cluster that count.
struct Zone<'a, V> {
    /// `None`: the initial state.
    value: Option<&'a V>,
    /// When the write started.
    written: i128,
    first_end: i128,
    last_start: i128,
}

impl<V> Zone<'_, V> {
    fn is_forward(&self) -> bool {
        self.first_end < self.last_start
    }

    fn must_precede(&self, other: &Self) -> bool {
        self.first_end < other.last_start
    }
}

/// Why no order of the operations is legal.
enum Conflict<'a, V> {
    /// A read of a value that nobody wrote.
    NeverWritten(&'a Operation<V>),
    /// A read that ended before its write started.
    FromTheFuture(&'a Operation<V>),
    /// Two clusters that must each come before the other.
    Cycle(Option<&'a V>, Option<&'a V>),
}

/// Checks one key's history.
///
/// # Panics
/// If this is not a history: a value is written twice, a read has no answer, an end is before its
/// start.
pub fn check<V: Clone + Eq + Hash + Ord + Debug>(
    history: &[Operation<V>],
) -> Result<(), Violation<V>> {
    match find_conflict(history) {
        None => Ok(()),
        Some(conflict) => Err(Violation::explain(history, &conflict)),
    }
}

fn find_conflict<V: Ord + Debug>(history: &[Operation<V>]) -> Option<Conflict<'_, V>> {
    let zones = match zones(history) {
        Ok(zones) => zones,
        Err(conflict) => return Some(conflict),
    };
    let (mut forward, backward): (Vec<_>, Vec<_>) = zones.into_iter().partition(Zone::is_forward);
    forward.sort_by_key(|zone| zone.first_end);
    // In this order the first overlap is between neighbours: before it, each zone ends later than
    // all earlier ones.
    for pair in forward.windows(2) {
        if pair[1].must_precede(&pair[0]) {
            return Some(Conflict::Cycle(pair[0].value, pair[1].value));
        }
    }
    // The forward zones are now disjoint. Only the last one that starts before a backward zone can
    // reach beyond its end.
    for zone in backward {
        let behind = forward.partition_point(|other| other.must_precede(&zone));
        if let Some(around) = forward[..behind].last()
            && zone.must_precede(around)
        {
            return Some(Conflict::Cycle(around.value, zone.value));
        }
    }
    None
}

/// The zone of each value, in the order of values, so that a history always gives the same
/// conflict.
///
/// A write of unknown outcome that nobody read never ends, so its zone is backward and inside no
/// other: it needs no special case.
fn zones<V: Ord + Debug>(history: &[Operation<V>]) -> Result<Vec<Zone<'_, V>>, Conflict<'_, V>> {
    let initial =
        Zone { value: None, written: BEFORE_ALL, first_end: BEFORE_ALL, last_start: BEFORE_ALL };
    let mut zones = BTreeMap::from([(None, initial)]);
    for write in history.iter().filter(|operation| operation.is_write()) {
        let start = i128::from(write.invoked);
        assert!(start <= write.end(), "ended before it started: {write:?}");
        let value = write.value();
        let zone = Zone { value, written: start, first_end: write.end(), last_start: start };
        assert!(zones.insert(value, zone).is_none(), "a value is written twice: {write:?}");
    }
    for read in history.iter().filter(|operation| !operation.is_write()) {
        let start = i128::from(read.invoked);
        assert!(read.completed.is_some(), "a read without an answer says nothing: {read:?}");
        assert!(start <= read.end(), "ended before it started: {read:?}");
        let Some(zone) = zones.get_mut(&read.value()) else {
            return Err(Conflict::NeverWritten(read));
        };
        if read.end() < zone.written {
            return Err(Conflict::FromTheFuture(read));
        }
        zone.first_end = zone.first_end.min(read.end());
        zone.last_start = zone.last_start.max(start);
    }
    Ok(zones.into_values().collect())
}

/// A history that is not linearizable. Displays the few operations that prove it.
#[derive(Clone, Debug)]
pub struct Violation<V> {
    reason: String,
    /// By time. Not linearizable by themselves; without any one of their reads they are.
    pub operations: Vec<Operation<V>>,
}

impl<V: Clone + Ord + Debug> Violation<V> {
    fn explain(history: &[Operation<V>], conflict: &Conflict<'_, V>) -> Self {
        let (reason, mut operations) = match conflict {
            Conflict::NeverWritten(read) => {
                (format!("nobody wrote {}", name(read.value())), vec![(*read).clone()])
            }
            Conflict::FromTheFuture(read) => {
                let write = history
                    .iter()
                    .find(|operation| operation.is_write() && operation.value() == read.value());
                let reason =
                    format!("the read of {} ended before its write started", name(read.value()));
                (reason, write.into_iter().chain([*read]).cloned().collect())
            }
            Conflict::Cycle(one, other) => {
                let reason = format!(
                    "{} must come before {}, and {} before {}",
                    name(*one),
                    name(*other),
                    name(*other),
                    name(*one)
                );
                let decisive = [one, other].map(|value| decisive(history, *value));
                (reason, decisive.concat())
            }
        };
        // Removing a read never makes a history worse. A write may be missing if no read returned
        // it.
        let mut next = 0;
        while next < operations.len() {
            let mut fewer = operations.clone();
            let removed = fewer.remove(next);
            if !removed.is_write() && find_conflict(&fewer).is_some() {
                operations = fewer;
            } else {
                next += 1;
            }
        }
        operations.sort_by_key(|operation| (operation.invoked, operation.completed));
        Self { reason, operations }
    }
}

/// The operations that make the zone of a value: its write, its first read to end, its last to start.
fn decisive<V: Clone + Eq>(history: &[Operation<V>], value: Option<&V>) -> Vec<Operation<V>> {
    let cluster = || history.iter().filter(|operation| operation.value() == value);
    let write = cluster().find(|operation| operation.is_write());
    let reads = || cluster().filter(|operation| !operation.is_write());
    let first_to_end = reads().min_by_key(|operation| operation.end());
    let last_to_start = reads().max_by_key(|operation| operation.invoked);
    [write, first_to_end, last_to_start].into_iter().flatten().cloned().collect()
}

fn name<V: Debug>(value: Option<&V>) -> String {
    value.map_or("the initial state".to_owned(), |value| format!("{value:?}"))
}

impl<V: Debug> Display for Violation<V> {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "not linearizable: {}", self.reason)?;
        for Operation { client, action, invoked, completed } in &self.operations {
            let action = match action {
                Action::Write(value) => format!("wrote {value:?}"),
                Action::Read(Some(value)) => format!("read {value:?}"),
                Action::Read(None) => "read nothing".to_owned(),
            };
            let completed = completed.map_or("?".to_owned(), |end| end.to_string());
            write!(formatter, "\n  {invoked}..{completed} client {client} {action}")?;
        }
        Ok(())
    }
}

/// Decides linearizability by trying orders. For small histories only: the time can grow
/// exponentially with the operations that overlap.
pub fn search<V: Clone + Eq + Hash>(history: &[Operation<V>]) -> bool {
    let intervals: Vec<_> =
        history.iter().map(|operation| (operation.invoked, operation.completed)).collect();
    search_orders(&intervals, None, |state: &Option<V>, operation| {
        match &history[operation].action {
            Action::Write(value) => Some(Some(value.clone())),
            Action::Read(value) => (value == state).then(|| state.clone()),
        }
    })
}

/// The search, for any object. `apply` returns the state after the operation with this index, or
/// `None` if the operation cannot have had its answer there. An operation without an end may also
/// never be applied.
pub fn search_orders<S: Clone + Eq + Hash>(
    intervals: &[(u64, Option<u64>)],
    initial: S,
    apply: impl Fn(&S, usize) -> Option<S>,
) -> bool {
    let mut by_start: Vec<usize> = (0..intervals.len()).collect();
    by_start.sort_by_key(|operation| intervals[*operation].0);
    // The applied operations and the state after them. What can follow does not depend on their
    // order, so each such pair is tried once.
    let mut tried = HashSet::new();
    let mut to_try = vec![(vec![false; intervals.len()], initial)];
    while let Some((applied, state)) = to_try.pop() {
        let waiting = || by_start.iter().copied().filter(|operation| !applied[*operation]);
        let Some(first_end) = waiting().filter_map(|operation| intervals[operation].1).min() else {
            return true;
        };
        // An operation that started after another one ended cannot precede it.
        for operation in waiting().take_while(|operation| intervals[*operation].0 <= first_end) {
            if let Some(state) = apply(&state, operation) {
                let mut applied = applied.clone();
                applied[operation] = true;
                if tried.insert((applied.clone(), state.clone())) {
                    to_try.push((applied, state));
                }
            }
        }
    }
    false
}
