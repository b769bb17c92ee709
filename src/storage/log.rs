//! The replicated log in memory, which raft-rs reads through its `Storage` trait.
//!
//! It mirrors the write-ahead log from the last compaction on. A frame under way is the only thing that it
//! has and the disk may lack; raft's own mark `persisted` is before these entries.
//!
//! ```text
//!        compacted                      snapshot                         last
//!            │ entries kept for members   │                               │
//! ───────────┼────────────────────────────┼───────────────────────────────┤
//!            │ that lag behind a little   │
//! ```

use std::cell::Cell;
use std::collections::VecDeque;

use bytes::Bytes;
use raft::eraftpb::{ConfState, Entry, EntryType, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

use crate::channels::{Index, Term};

/// The log from the last compaction on.
///
/// * Indexes are contiguous: entry `i` is at position `i - compacted_index - 1`.
/// * `compacted_index <= snapshot index`: a member that needs a dropped entry gets the snapshot.
/// * The term at `compacted_index` is known, so raft can match an append that follows it directly.
#[derive(Default)]
pub struct Log {
    entries: VecDeque<Kept>,
    /// The indexes of the membership entries among them, ascending.
    conf_changes: VecDeque<Index>,
    compacted_index: Index,
    compacted_term: Term,
    /// The state that raft starts with. It is not updated later.
    initial_state: RaftState,
    /// The newest snapshot. Its file is durable, and the write-ahead log names it.
    snapshot: Option<Snapshot>,
    /// True if raft requested a snapshot and there was none to return.
    snapshot_wanted: Cell<bool>,
}

/// An entry in one allocation. raft's own type takes twice as much memory for small values, and most
/// entries are never read again.
struct Kept {
    term: Term,
    entry_type: EntryType,
    context_length: u32,
    /// The context, followed by the data.
    bytes: Box<[u8]>,
}

impl Kept {
    fn new(entry: &Entry) -> Self {
        Self {
            term: entry.term,
            entry_type: entry.entry_type,
            context_length: u32::try_from(entry.context.len())
                .expect("the write-ahead log accepted the entry"),
            bytes: [&entry.context[..], &entry.data].concat().into(),
        }
    }

    /// The [`entry_bytes`] of the entry.
    fn entry_bytes(&self) -> u64 {
        (self.bytes.len() + std::mem::size_of::<Entry>()) as u64
    }

    fn entry(&self, index: Index) -> Entry {
        let (context, data) = self.bytes.split_at(self.context_length as usize);
        Entry {
            index,
            term: self.term,
            entry_type: self.entry_type,
            context: Bytes::copy_from_slice(context),
            data: Bytes::copy_from_slice(data),
            ..Entry::default()
        }
    }
}

impl Log {
    /// A log with the `entries` after the compacted index and term, which are 0 and 0 in a new log. The
    /// recovery has checked that there is no gap.
    pub fn new(
        (compacted_index, compacted_term): (Index, Term),
        entries: Vec<Entry>,
        hard_state: HardState,
        conf_state: ConfState,
        snapshot: Option<Snapshot>,
    ) -> Self {
        if let Some(first) = entries.first() {
            assert_eq!(first.index, compacted_index + 1, "the log has a gap after its snapshot");
        }
        let mut log = Self {
            compacted_index,
            compacted_term,
            initial_state: RaftState { hard_state, conf_state },
            snapshot,
            ..Self::default()
        };
        log.append(&entries);
        log
    }

    /// The index of the last entry, or the compacted index if there is none.
    pub fn last(&self) -> Index {
        self.compacted_index + self.entries.len() as u64
    }

    /// The position of an entry above the compacted index.
    fn position(&self, index: Index) -> usize {
        (index - self.compacted_index - 1) as usize
    }

    /// The size of the entries after `index` in bytes.
    pub fn bytes_after(&self, index: Index) -> u64 {
        let count = self.last().saturating_sub(index) as usize;
        self.entries.iter().rev().take(count).map(Kept::entry_bytes).sum()
    }

    /// True if there is a membership entry after `index`.
    pub fn has_conf_change_after(&self, index: Index) -> bool {
        self.conf_changes.back().is_some_and(|last| *last > index)
    }

    /// The membership entries after `index`.
    pub fn conf_changes_after(&self, index: Index) -> Vec<Entry> {
        let after = self.conf_changes.iter().filter(|change| **change > index);
        after.map(|change| self.entries[self.position(*change)].entry(*change)).collect()
    }

    /// Appends `entries` and drops all old entries from the first new index on.
    pub fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        assert!(
            self.compacted_index < first.index && first.index <= self.last() + 1,
            "entry {} does not follow the log ({}, {}]",
            first.index,
            self.compacted_index,
            self.last()
        );
        self.entries.truncate(self.position(first.index));
        self.entries.extend(entries.iter().map(Kept::new));
        self.conf_changes.retain(|change| *change < first.index);
        let changes = entries.iter().filter(|it| it.get_entry_type() != EntryType::EntryNormal);
        self.conf_changes.extend(changes.map(|change| change.index));
    }

    /// Replaces the whole log with a received snapshot.
    pub fn apply_snapshot(&mut self, snapshot: Snapshot) {
        self.entries.clear();
        self.conf_changes.clear();
        self.compacted_index = snapshot.get_metadata().index;
        self.compacted_term = snapshot.get_metadata().term;
        self.snapshot = Some(snapshot);
    }

    /// Sets the newest snapshot, which this member made.
    pub fn set_snapshot(&mut self, snapshot: Snapshot) {
        self.snapshot = Some(snapshot);
        self.snapshot_wanted.set(false);
    }

    /// Offers the snapshot at `index` no more.
    pub fn drop_snapshot(&mut self, index: Index) {
        self.snapshot.take_if(|snapshot| snapshot.get_metadata().index == index);
    }

    /// True if raft requested a snapshot that did not exist. Resets the request.
    pub fn take_snapshot_wanted(&self) -> bool {
        self.snapshot_wanted.take()
    }

    /// Drops the entries up to `snapshot_index`, except the last `keep_entries` of them and at most
    /// `keep_bytes` of these. Returns the new compacted index, `None` if nothing was dropped.
    pub fn compact(
        &mut self,
        snapshot_index: Index,
        keep_entries: u64,
        keep_bytes: u64,
    ) -> Option<Index> {
        let mut compact_index = snapshot_index;
        let mut bytes = 0;
        while compact_index > self.compacted_index && snapshot_index - compact_index < keep_entries
        {
            bytes += self.entries[self.position(compact_index)].entry_bytes();
            if bytes > keep_bytes {
                break;
            }
            compact_index -= 1;
        }
        if compact_index <= self.compacted_index {
            return None;
        }
        let position = self.position(compact_index);
        self.compacted_term = self.entries[position].term;
        self.entries.drain(..=position);
        self.conf_changes.retain(|change| *change > compact_index);
        self.compacted_index = compact_index;
        Some(compact_index)
    }
}

/// The approximate size of an entry in memory and on disk, in bytes, for bounds.
pub fn entry_bytes(entry: &Entry) -> u64 {
    (entry.data.len() + entry.context.len() + std::mem::size_of::<Entry>()) as u64
}

impl Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(self.initial_state.clone())
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.compacted_index {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        assert!(
            high <= self.last() + 1,
            "entries up to {high} requested, the log ends at {}",
            self.last()
        );
        let max_size = max_size.into().unwrap_or(u64::MAX);
        let mut size = 0;
        let mut entries = Vec::new();
        let kept = self.entries.range(self.position(low)..self.position(high));
        for (index, kept) in (low..).zip(kept) {
            size += kept.entry_bytes();
            // raft needs at least one entry, whatever its size.
            if size > max_size && !entries.is_empty() {
                break;
            }
            entries.push(kept.entry(index));
        }
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.compacted_index {
            return Ok(self.compacted_term);
        }
        if index < self.compacted_index {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        let kept = self.entries.get(self.position(index));
        kept.map(|kept| kept.term).ok_or(raft::Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.compacted_index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    /// The newest snapshot, if it contains `request_index` and the addition of `to`. A member that is
    /// not in a snapshot's ConfState ignores the snapshot (etcd #12473), so the node then makes a new
    /// one.
    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        if let Some(snapshot) = &self.snapshot {
            let metadata = snapshot.get_metadata();
            let ConfState { voters, learners, .. } = metadata.get_conf_state();
            if metadata.index >= request_index && (voters.contains(&to) || learners.contains(&to)) {
                return Ok(snapshot.clone());
            }
        }
        self.snapshot_wanted.set(true);
        Err(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: Index, term: Term) -> Entry {
        Entry { index, term, data: vec![b'x'; 10].into(), ..Default::default() }
    }

    fn log(compacted: (Index, Term), range: std::ops::RangeInclusive<Index>) -> Log {
        let entries = range.map(|index| entry(index, 2)).collect();
        Log::new(compacted, entries, HardState::default(), ConfState::default(), None)
    }

    fn read(log: &Log, low: Index, high: Index, max_size: u64) -> Vec<Index> {
        let context = GetEntriesContext::empty(false);
        let entries = log.entries(low, high, max_size, context).expect("entries");
        entries.iter().map(|entry| entry.index).collect()
    }

    #[test]
    fn append_drops_the_conflicting_suffix() {
        let mut log = log((3, 1), 4..=8);
        log.append(&[entry(6, 3)]);
        assert_eq!(log.last(), 6);
        assert_eq!(log.term(6).expect("term"), 3);
        assert_eq!(read(&log, 4, 7, u64::MAX), [4, 5, 6]);
    }

    #[test]
    fn the_membership_entries_are_those_that_are_kept() {
        let change = |index, term| {
            let entry_type = EntryType::EntryConfChange;
            Entry { entry_type, ..entry(index, term) }
        };
        let indexes = |log: &Log, after| {
            let changes = log.conf_changes_after(after);
            assert_eq!(log.has_conf_change_after(after), !changes.is_empty());
            assert!(changes.iter().all(|it| it.get_entry_type() == EntryType::EntryConfChange));
            changes.iter().map(|it| it.index).collect::<Vec<_>>()
        };
        let mut log = log((0, 0), 1..=3);
        log.append(&[change(4, 2), entry(5, 2), change(6, 2)]);
        assert_eq!(
            [indexes(&log, 0), indexes(&log, 4), indexes(&log, 6)],
            [vec![4, 6], vec![6], vec![]]
        );
        log.append(&[entry(6, 3), change(7, 3)]);
        assert_eq!(indexes(&log, 0), [4, 7]);
        assert_eq!(log.compact(4, 0, 0), Some(4));
        assert_eq!(indexes(&log, 0), [7]);
        log.apply_snapshot(Snapshot::default());
        assert_eq!(indexes(&log, 0), [0; 0]);
    }

    #[test]
    fn entries_are_limited_by_size_but_never_none() {
        let log = log((3, 1), 4..=8);
        assert_eq!(read(&log, 4, 9, 1), [4]);
        assert_eq!(read(&log, 4, 9, 2 * entry_bytes(&entry(4, 2))), [4, 5]);
    }

    #[test]
    fn compaction_keeps_the_term_before_the_first_entry() {
        let mut log = log((0, 0), 1..=8);
        assert_eq!(log.compact(6, 2, u64::MAX), Some(4));
        assert_eq!(log.first_index().expect("first"), 5);
        assert_eq!(log.term(4).expect("term"), 2);
        assert_eq!(log.term(3), Err(raft::Error::Store(StorageError::Compacted)));
        assert_eq!(log.compact(6, 2, u64::MAX), None, "nothing is left to drop");
        assert_eq!(log.compact(6, 2, 0), Some(6), "bytes are a limit too");
    }

    #[test]
    fn a_snapshot_without_the_receiver_requests_a_new_one() {
        let mut log = log((0, 0), 1..=8);
        let mut snapshot = Snapshot::default();
        snapshot.mut_metadata().index = 6;
        snapshot.mut_metadata().mut_conf_state().voters = vec![1, 2];
        log.set_snapshot(snapshot);
        assert_eq!(log.snapshot(0, 2).expect("snapshot").get_metadata().index, 6);
        assert!(!log.take_snapshot_wanted());
        assert!(log.snapshot(0, 3).is_err());
        assert!(log.take_snapshot_wanted());
        assert!(!log.take_snapshot_wanted(), "requested once");
        assert!(log.snapshot(7, 2).is_err(), "older than requested");
    }
}
