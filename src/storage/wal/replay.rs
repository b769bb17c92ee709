//! The state that the records of a log add up to, and the rules that a record has to obey.

use std::collections::BTreeMap;

use raft::eraftpb::{Entry, HardState};

use super::format::{self, Fault, Record};
use super::{Identity, SnapshotId};

/// How many marks a segment's head repeats. A member keeps as many snapshots.
const MARKS_IN_HEAD: usize = 2;

/// The state that every segment's head repeats, so that older segments can be removed.
#[derive(Clone, Debug, Default)]
pub(super) struct Summary {
    /// The identity of the member that owns the log. The member id is 0 before the first record.
    pub identity: Identity,
    /// The first incarnation that this member learned, by member id.
    pub incarnations: BTreeMap<u64, u64>,
    /// The terms of the snapshots that the log names, by index.
    pub marks: BTreeMap<u64, u64>,
    /// The hard state of raft.
    pub hard_state: HardState,
    /// The index of the last entry, 0 for an empty log.
    pub last_index: u64,
}

impl Summary {
    /// Appends the records of the head of segment `number` to `payload`.
    pub fn put_head(&self, payload: &mut Vec<u8>, number: u64, previous_bytes: u64) {
        format::put_head(payload, number, previous_bytes, self.last_index);
        format::put_identity(payload, &self.identity);
        for (&member_id, &incarnation) in &self.incarnations {
            format::put_incarnation(payload, member_id, incarnation);
        }
        let older = self.marks.len().saturating_sub(MARKS_IN_HEAD);
        for (&index, &term) in self.marks.iter().skip(older) {
            format::put_mark(payload, SnapshotId { index, term });
        }
        format::put_hard_state(payload, &self.hard_state);
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

    /// Sets the identity. A new one changes the cluster id only, and only if that was unknown.
    ///
    /// # Errors
    /// A message with both identities.
    pub fn set_identity(&mut self, identity: &Identity) -> Result<(), String> {
        let known = &self.identity;
        let same_member =
            (known.member_id, known.incarnation) == (identity.member_id, identity.incarnation);
        if known.member_id == 0 || same_member && (known.cluster_id == 0 || known == identity) {
            self.identity = identity.clone();
            return Ok(());
        }
        Err(format!("it names {identity:?}, but the log belongs to {known:?}"))
    }

    /// Adds a mark of a snapshot that this member made.
    ///
    /// # Errors
    /// A message if it is above the last index, or if an earlier mark has another term.
    pub fn add_mark(&mut self, mark: SnapshotId) -> Result<(), String> {
        let SnapshotId { index, term } = mark;
        let last = self.last_index;
        if last < index {
            return Err(format!("it names a snapshot at index {index}, the log ends at {last}"));
        }
        match self.marks.insert(index, term) {
            Some(known) if known != term => Err(format!(
                "it names a snapshot at index {index} and term {term}, an earlier mark has term \
                 {known}"
            )),
            _ => Ok(()),
        }
    }

    /// Adds a mark of a snapshot that replaced all entries.
    ///
    /// # Errors
    /// A message if an earlier mark has another term.
    pub fn install(&mut self, mark: SnapshotId) -> Result<(), String> {
        self.last_index = mark.index;
        self.add_mark(mark)
    }

    /// Makes `index` the last index.
    ///
    /// # Errors
    /// A message if no entry can have this index here.
    pub fn set_last_index(&mut self, index: u64) -> Result<(), String> {
        if index == 0 {
            return Err("it is entry 0, the first entry is 1".to_owned());
        }
        let newest_mark = self.newest_mark();
        if index <= newest_mark {
            return Err(format!("entry {index} would change the snapshot at index {newest_mark}"));
        }
        let last = self.last_index;
        if last < index - 1 {
            return Err(format!("entry {index} follows entry {last}"));
        }
        self.last_index = index;
        Ok(())
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
    /// [`Fault::Damage`] if it cannot follow the records before it.
    pub fn apply(&mut self, record: Record) -> Result<(), Fault> {
        match record {
            Record::Head(_) => {
                return Err("a head that is not the first record of its segment".to_owned().into());
            }
            Record::Close => {}
            Record::Identity(identity) => self.summary.set_identity(&identity)?,
            Record::Incarnation { member_id, incarnation } => {
                self.summary.incarnations.insert(member_id, incarnation);
            }
            Record::Mark(mark) => self.mark(mark)?,
            Record::Install(mark) => {
                // Raft dropped its log because it did not match the snapshot. The entries are invalid
                // even where their indexes are above the snapshot.
                self.summary.install(mark)?;
                self.entries.clear();
                self.base = mark.index;
            }
            Record::Entry(entry) => self.push(entry)?,
            Record::HardState(hard_state) => self.summary.hard_state = hard_state,
        }
        Ok(())
    }

    /// Applies a mark. It leaves the entries alone, also when a head repeats it.
    fn mark(&mut self, mark: SnapshotId) -> Result<(), String> {
        let SnapshotId { index, term } = mark;
        let position = index.checked_sub(self.base).and_then(|count| count.checked_sub(1));
        let entry = position.and_then(|position| self.entries.get(position as usize));
        if let Some(held) = entry.map(|entry| entry.term).filter(|&held| held != term) {
            return Err(format!(
                "it names a snapshot at index {index} and term {term}, the entry there has term {held}"
            ));
        }
        self.summary.add_mark(mark)
    }

    /// Appends an entry and drops the entries that it replaces.
    fn push(&mut self, mut entry: Entry) -> Result<(), String> {
        let index = entry.index;
        self.summary.set_last_index(index)?;
        // Truncate unconditionally, even if the dropped entries are above a snapshot and this one is
        // not. Skipping it would bring back entries that raft had truncated (etcd #22442).
        if self.base < index {
            self.entries.truncate((index - self.base - 1) as usize);
        } else {
            self.entries.clear();
            self.base = index - 1;
        }
        if self.drops_contents {
            entry.context.clear();
            entry.data.clear();
        }
        self.entries.push(entry);
        Ok(())
    }
}
