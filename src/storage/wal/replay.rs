//! What the records of a log add up to.

use std::collections::BTreeMap;

use raft::eraftpb::{Entry, HardState};

use super::format::{self, Fault, Head, Record};
use super::{Identity, SnapshotId};

/// How many marks a segment's head names: as many as snapshots are kept.
const MARKS_IN_HEAD: usize = 2;

/// What every segment's head repeats, so that older segments can go.
#[derive(Clone, Debug, Default)]
pub(super) struct Summary {
    /// Whose log it is; member id 0 before the first record.
    pub identity: Identity,
    /// The first incarnation heard for each member.
    pub incarnations: BTreeMap<u64, u64>,
    /// The snapshots named, index to term.
    pub marks: BTreeMap<u64, u64>,
    /// Raft's own state.
    pub hard_state: HardState,
}

impl Summary {
    /// Puts what every segment repeats into `payload`, behind the first record of its head.
    pub fn put(&self, payload: &mut Vec<u8>) {
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

    /// Forgets the marks that no head needs to name any more.
    pub fn trim(&mut self) {
        while self.marks.len() > MARKS_IN_HEAD {
            self.marks.pop_first();
        }
    }

    /// The index of the newest snapshot named, 0 if there is none. All up to it is committed.
    pub fn newest_mark(&self) -> u64 {
        self.marks.last_key_value().map_or(0, |(&index, _)| index)
    }

    /// Checks a new identity: the cluster may become known, once; the member never changes.
    ///
    /// # Errors
    /// Both identities.
    pub fn check_identity(&self, identity: &Identity) -> Result<(), String> {
        let known = &self.identity;
        let same_member =
            (known.member_id, known.incarnation) == (identity.member_id, identity.incarnation);
        if known.member_id == 0 || same_member && (known.cluster_id == 0 || known == identity) {
            return Ok(());
        }
        Err(format!("names {identity:?}, the log belongs to {known:?}"))
    }

    /// Checks another mark: an index has one term.
    ///
    /// # Errors
    /// Both terms.
    pub fn check_mark(&self, mark: SnapshotId) -> Result<(), String> {
        let SnapshotId { index, term } = mark;
        match self.marks.get(&index) {
            Some(&known) if known != term => {
                Err(format!("names a snapshot at index {index} of term {term}, before of {known}"))
            }
            _ => Ok(()),
        }
    }
}

/// What a replay keeps of each entry: all of it, or its term alone.
pub(super) trait Keep {
    fn keep(entry: Entry) -> Self;
    fn term(&self) -> u64;
}

impl Keep for Entry {
    fn keep(entry: Entry) -> Self {
        entry
    }

    fn term(&self) -> u64 {
        self.term
    }
}

impl Keep for u64 {
    fn keep(entry: Entry) -> Self {
        entry.term
    }

    fn term(&self) -> u64 {
        *self
    }
}

/// The state after some of a log's records.
///
/// The entries are at each point the end of the log that raft had when it wrote the record. Only
/// the end, because the segments before the first that is left are gone. Hence the first entry
/// found may have any index, and a later one may still be lower: it took the place of entries that
/// went with those segments.
#[derive(Default)]
pub(super) struct Replay<K> {
    pub summary: Summary,
    /// In the order of their indexes, without gaps, the first at `base + 1`.
    pub entries: Vec<K>,
    /// The index before the first entry; `None` before any entry or installed snapshot, and before a
    /// head that tells where the log ended.
    pub base: Option<u64>,
}

impl<K: Keep> Replay<K> {
    /// The index of the last entry, or of the snapshot installed after it.
    pub fn last_index(&self) -> Option<u64> {
        Some(self.base? + self.entries.len() as u64)
    }

    /// Takes the first record of a segment's head, of which the caller has checked the rest.
    ///
    /// Where the segments before are gone, it is all that tells how far the log came. Without it a
    /// segment that holds no entry would leave room for another log.
    ///
    /// # Errors
    /// Both last indexes.
    pub fn begin_segment(&mut self, head: &Head) -> Result<(), String> {
        let (known, found) = (head.last_index, self.last_index());
        if found.is_some() && known != found && head.version > 1 {
            return Err(format!(
                "the log ended at {known:?} when this segment was begun, now at {found:?}"
            ));
        }
        self.base = self.base.or(known);
        Ok(())
    }

    /// Takes one record, except those that say where a segment begins and ends.
    ///
    /// # Errors
    /// What makes it impossible after the records before it.
    pub fn apply(&mut self, record: Record) -> Result<(), Fault> {
        match record {
            Record::Head(_) => {
                return Err("a segment's head in the midst of a segment".to_owned().into());
            }
            // What it closes is the segment, which the caller keeps.
            Record::Close => {}
            Record::Identity(identity) => {
                self.summary.check_identity(&identity)?;
                self.summary.identity = identity;
            }
            Record::Incarnation { member_id, incarnation } => {
                self.summary.incarnations.insert(member_id, incarnation);
            }
            Record::Mark(mark) => self.mark(mark)?,
            Record::Install(mark) => {
                // Raft dropped its log for this snapshot: what was there did not match it, whatever
                // its indexes.
                self.summary.check_mark(mark)?;
                self.summary.marks.insert(mark.index, mark.term);
                self.entries.clear();
                self.base = Some(mark.index);
            }
            Record::Entry(entry) => self.push(entry)?,
            Record::HardState(hard_state) => self.summary.hard_state = hard_state,
        }
        Ok(())
    }

    /// Takes the name of a snapshot of what the log held. The entries stay as they are, in a head's
    /// repetition too.
    fn mark(&mut self, mark: SnapshotId) -> Result<(), String> {
        let SnapshotId { index, term } = mark;
        if let Some(last) = self.last_index().filter(|&last| last < index) {
            return Err(format!("names a snapshot at index {index}, the log ends at {last}"));
        }
        if let Some(held) = self.entry_at(index).map(Keep::term).filter(|&held| held != term) {
            return Err(format!(
                "names a snapshot at index {index} of term {term}, the entry there has term {held}"
            ));
        }
        self.summary.check_mark(mark)?;
        self.summary.marks.insert(index, term);
        Ok(())
    }

    /// Takes an entry, and drops those that it took the place of.
    fn push(&mut self, entry: Entry) -> Result<(), String> {
        let index = entry.index;
        if index == 0 {
            return Err("entry 0, the first is 1".to_owned());
        }
        let newest_mark = self.summary.newest_mark();
        if index <= newest_mark {
            return Err(format!("entry {index} would change what snapshot {newest_mark} contains"));
        }
        if let Some(last) = self.last_index().filter(|&last| last < index - 1) {
            return Err(format!("entry {index} follows entry {last}"));
        }
        match self.base {
            // Unconditionally, also where the entries dropped lie above some snapshot and this one
            // does not: to skip it is to bring back what raft had truncated (etcd #22442).
            Some(base) if base < index => self.entries.truncate((index - base - 1) as usize),
            _ => {
                self.entries.clear();
                self.base = Some(index - 1);
            }
        }
        self.entries.push(K::keep(entry));
        Ok(())
    }

    fn entry_at(&self, index: u64) -> Option<&K> {
        let position = index.checked_sub(self.base?)?.checked_sub(1)?;
        self.entries.get(usize::try_from(position).ok()?)
    }
}
