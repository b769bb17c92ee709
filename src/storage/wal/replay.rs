//! The state that the records of a log add up to, and the rules that a record has to obey.

use std::collections::BTreeMap;

use raft::eraftpb::{Entry, HardState};

use super::format::{self, Head, Record};
use super::{Identity, SnapshotId};

/// How many marks a segment's head repeats. A member keeps as many snapshots.
const MARKS_IN_HEAD: usize = 2;

/// The state that every segment's head repeats, so that older segments can be removed.
#[derive(Clone, Debug, Default)]
pub(super) struct Summary {
    /// The identity of the member that owns the log. The member id is 0 before the first record.
    pub identity: Identity,
    /// The incarnations of other first members, by member id.
    pub incarnations: BTreeMap<u64, u64>,
    /// The last entry that the member lost, although it had acknowledged it; 0 if it lost none.
    pub quarantine: u64,
    /// The terms of the snapshots that the log names, by index.
    pub marks: BTreeMap<u64, u64>,
    /// The hard state of raft.
    pub hard_state: HardState,
    /// The index of the last entry, 0 for an empty log.
    pub last_index: u64,
}

impl Summary {
    /// Appends the records of a segment's head to `payload`. The last index of `head` is set here.
    pub fn put_head(&self, payload: &mut Vec<u8>, head: Head) {
        format::put(payload, &Record::Head(Head { last_index: self.last_index, ..head }));
        format::put(payload, &Record::Identity(self.identity.clone()));
        for (&member_id, &incarnation) in &self.incarnations {
            format::put(payload, &Record::Incarnation { member_id, incarnation });
        }
        if self.quarantine != 0 {
            format::put(payload, &Record::Quarantine(self.quarantine));
        }
        let older = self.marks.len().saturating_sub(MARKS_IN_HEAD);
        for (&index, &term) in self.marks.iter().skip(older) {
            format::put(payload, &Record::Mark(SnapshotId { index, term }));
        }
        format::put(payload, &Record::HardState(self.hard_state.clone()));
    }

    /// Drops the marks that no head repeats any more.
    pub fn trim(&mut self) {
        while self.marks.len() > MARKS_IN_HEAD {
            self.marks.pop_first();
        }
    }

    /// The index of the newest snapshot that the log names, 0 if there is none. All entries up to it
    /// are committed.
    pub fn newest_mark(&self) -> u64 {
        self.marks.last_key_value().map_or(0, |(&index, _)| index)
    }

    /// Applies one record. Heads, closes and paddings belong to segments and change nothing here.
    ///
    /// # Errors
    /// A message if it cannot follow the records before it.
    pub fn apply(&mut self, record: &Record) -> Result<(), String> {
        let (known, last) = (&self.identity, self.last_index);
        match record {
            Record::Head(_) | Record::Close | Record::Padding => {}
            // A new identity changes the cluster id only, and only if that was unknown.
            Record::Identity(new) => {
                let same_member =
                    (known.member_id, known.incarnation) == (new.member_id, new.incarnation);
                let follows = same_member && (known.cluster_id == 0 || known == new);
                if known.member_id != 0 && !follows {
                    return Err(format!("it names {new:?}, but the log belongs to {known:?}"));
                }
                self.identity = new.clone();
            }
            Record::Incarnation { member_id, incarnation } => {
                self.incarnations.insert(*member_id, *incarnation);
            }
            Record::Quarantine(index) => self.quarantine = *index,
            Record::Mark(SnapshotId { index, .. }) if last < *index => {
                return Err(format!(
                    "it names a snapshot at index {index}, the log ends at {last}"
                ));
            }
            Record::Mark(mark) => self.add_mark(*mark)?,
            Record::Install(mark) => {
                self.add_mark(*mark)?;
                self.last_index = mark.index;
            }
            Record::Entry(Entry { index: 0, .. }) => {
                return Err("it is entry 0, the first entry is 1".to_owned());
            }
            Record::Entry(Entry { index, .. }) => {
                let newest = self.newest_mark();
                if *index <= newest {
                    return Err(format!(
                        "entry {index} would change the snapshot at index {newest}"
                    ));
                }
                if last < index - 1 {
                    return Err(format!("entry {index} follows entry {last}"));
                }
                self.last_index = *index;
            }
            Record::HardState(hard_state) => self.hard_state = hard_state.clone(),
        }
        Ok(())
    }

    fn add_mark(&mut self, SnapshotId { index, term }: SnapshotId) -> Result<(), String> {
        match self.marks.insert(index, term) {
            Some(known) if known != term => Err(format!(
                "it names a snapshot at index {index} and term {term}, an earlier mark has term \
                 {known}"
            )),
            _ => Ok(()),
        }
    }
}

/// The state after a prefix of a log's records.
///
/// `entries` is the end of the log that raft had when it wrote the last of these records. The earlier
/// segments may be gone, so the log need not begin at index 1. An entry may even have an index at or
/// below `base`: it replaced entries of segments that are gone.
#[derive(Default)]
pub(super) struct Replay {
    pub summary: Summary,
    /// In the order of their indexes, without gaps, the first at `base + 1`.
    pub entries: Vec<Entry>,
    /// The index before the first entry, 0 in a new log.
    pub base: u64,
    /// True if `entries` are kept without their contexts and data.
    pub drops_contents: bool,
}

impl Replay {
    /// Applies one record. The caller checks heads and closes, which belong to segments.
    ///
    /// # Errors
    /// A message if it cannot follow the records before it.
    pub fn apply(&mut self, record: Record) -> Result<(), String> {
        match record {
            Record::Head(_) => {
                return Err("a head that is not the first record of its segment".to_owned());
            }
            Record::Mark(mark) => self.check_term(mark)?,
            _ => {}
        }
        self.summary.apply(&record)?;
        match record {
            // Raft dropped its log because it did not match the snapshot. The entries are invalid even
            // where their indexes are above the snapshot.
            Record::Install(mark) => {
                self.entries.clear();
                self.base = mark.index;
            }
            Record::Entry(entry) => self.push(entry),
            // A mark leaves the entries alone, also when a head repeats it.
            _ => {}
        }
        Ok(())
    }

    /// Checks that the entry at the index of a mark has the term of the mark.
    fn check_term(&self, SnapshotId { index, term }: SnapshotId) -> Result<(), String> {
        let position = index.checked_sub(self.base).and_then(|count| count.checked_sub(1));
        match position.and_then(|position| self.entries.get(position as usize)) {
            Some(Entry { term: held, .. }) if *held != term => Err(format!(
                "it names a snapshot at index {index} and term {term}, the entry there has term {held}"
            )),
            _ => Ok(()),
        }
    }

    /// Appends an entry and drops the entries that it replaces.
    fn push(&mut self, mut entry: Entry) {
        // Truncate unconditionally, even if the dropped entries are above a snapshot and this one is
        // not. Skipping it would bring back entries that raft had truncated (etcd #22442).
        if self.base < entry.index {
            self.entries.truncate((entry.index - self.base - 1) as usize);
        } else {
            self.entries.clear();
            self.base = entry.index - 1;
        }
        if self.drops_contents {
            entry.context.clear();
            entry.data.clear();
        }
        self.entries.push(entry);
    }
}
