//! The replicated state that is raft's own, as of the applied index.

use raft::eraftpb::{ConfState, Entry};

use super::{Index, NodeId, Term};
use crate::membership::{Members, SnapshotMembers};

/// Members, ConfState and applied index. All of them belong to the same index, because
/// [`advance`](Self::advance) is the only way to change any of them.
#[derive(Debug, Default)]
pub(super) struct Applied {
    index: Index,
    term: Term,
    members: Members,
    conf_state: ConfState,
}

impl Applied {
    /// The state after the entry at `index`.
    pub fn new(index: Index, term: Term, members: Members, conf_state: ConfState) -> Self {
        Self { index, term, members, conf_state }
    }

    /// Moves to the entry at `index`, which replaced the members if it was a change of them or a
    /// snapshot.
    pub fn advance(&mut self, index: Index, term: Term, replaced: Option<(Members, ConfState)>) {
        assert!(index > self.index, "applied index {} would move to {index}", self.index);
        (self.index, self.term) = (index, term);
        if let Some((members, conf_state)) = replaced {
            (self.members, self.conf_state) = (members, conf_state);
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

    pub fn conf_state(&self) -> &ConfState {
        &self.conf_state
    }

    pub fn is_member(&self, id: NodeId) -> bool {
        self.members.urls.contains_key(&id)
    }

    /// What a snapshot at the applied index says of the members.
    pub fn snapshot_members(&self, cluster_id: u64) -> SnapshotMembers {
        // Sorted, because raft's own order differs from member to member.
        let sorted = |ids: &[NodeId]| {
            let mut ids = ids.to_vec();
            ids.sort_unstable();
            ids
        };
        SnapshotMembers {
            cluster_id,
            voters: sorted(&self.conf_state.voters),
            learners: sorted(&self.conf_state.learners),
            members: self.members.clone(),
        }
    }
}
