//! The replicated state that is raft's own, as of the applied index.

use raft::eraftpb::Entry;

use super::{Index, NodeId, Term};
use crate::channels::Vouched;
use crate::membership::Members;

/// The applied index and the members as of it: [`advance`](Self::advance) is the only way to change
/// either. The ConfState follows from the members.
#[derive(Debug, Default)]
pub(super) struct Applied {
    index: Index,
    term: Term,
    members: Members,
}

impl Applied {
    /// The state after the entry at `index`.
    pub fn new(index: Index, term: Term, members: Members) -> Self {
        Self { index, term, members }
    }

    /// Moves to the entry at `index`, which replaced the members if it was a change of them or a
    /// snapshot.
    pub fn advance(&mut self, index: Index, term: Term, replaced: Option<Members>) {
        assert!(index > self.index, "applied index {} would move to {index}", self.index);
        (self.index, self.term) = (index, term);
        if let Some(members) = replaced {
            self.members = members;
        }
    }

    /// The committed entries above the applied index. raft-rs hands each out once; the check is the
    /// original's (entriesToApply).
    pub fn entries_to_apply(&self, mut entries: Vec<Entry>) -> Vec<Entry> {
        let Some(first) = entries.first() else { return entries };
        assert!(
            first.index <= self.index + 1,
            "first index of committed entry[{}] should <= progress.appliedIndex[{}]+1",
            first.index,
            self.index
        );
        let applied = (self.index + 1 - first.index) as usize;
        entries.drain(..applied.min(entries.len()));
        entries
    }

    pub fn index(&self) -> Index {
        self.index
    }

    pub fn term(&self) -> Term {
        self.term
    }

    pub fn members(&self) -> &Members {
        &self.members
    }

    pub fn is_member(&self, id: NodeId) -> bool {
        self.members.urls.contains_key(&id)
    }

    /// Where member `id` listens and the directory that its vote is bound to; `None` if it has no vote.
    pub fn vouch_for(&self, id: NodeId) -> Option<Vouched> {
        let (url, incarnation) =
            self.members.urls.get(&id).zip(self.members.incarnations.get(&id))?;
        Some(Vouched { id, url: url.clone(), incarnation: *incarnation })
    }
}
