//! Whether a member takes part in raft: not yet, fully, or only until its removal has spread.

use raft::{StateRole, majority};

use super::Index;
use super::bootstrap::Bootstrap;
use crate::membership::Members;
use crate::storage::log::Log;

/// A member's way through a cluster: always forward, and a match is the only way to ask where it is.
pub(super) enum Lifecycle {
    /// It waits for the other members before its first start. It sends and takes no raft messages.
    Bootstrapping(Bootstrap),
    /// It lost entries up to this index that it had acknowledged. It sends and takes no raft messages:
    /// its vote could elect a leader without these entries.
    Quarantined(Index),
    /// It takes part in raft.
    Running,
    /// It was removed, and ends as soon as the others can do without it.
    Leaving(Leaving),
}

/// A member that has applied its own removal.
///
/// A leader stays until a majority of the remaining members knows that the removal is committed, but
/// no longer than an election timeout: otherwise the others would need such a timeout to find out.
///
/// If a single member remains there is no deadline, and a follower stays as well. Until the survivor
/// learns of the removal, it counts two voters and cannot win an election alone.
pub(super) struct Leaving {
    /// The entry that removed this member.
    pub removal: Index,
    pub until_tick: u64,
}

impl Lifecycle {
    /// True if this member sends and takes raft messages.
    pub fn takes_part(&self) -> bool {
        matches!(self, Self::Running | Self::Leaving(_))
    }

    /// True if this member was removed and may end. `members` are those that remain.
    pub fn may_end(&self, raft: &raft::Raft<Log>, members: &Members, now: u64) -> bool {
        let Self::Leaving(Leaving { removal, until_tick }) = self else { return false };
        let others = members.voters().count();
        if raft.state == StateRole::Leader {
            let progress = raft.prs();
            let knows = |id| progress.get(id).is_some_and(|it| it.committed_index >= *removal);
            let knowing = members.voters().filter(|id| knows(*id)).count();
            return knowing >= majority(others) || (others > 1 && now >= *until_tick);
        }
        // A leader that has committed an entry of its own term has committed all entries before it.
        let is_told = raft.leader_id != raft::INVALID_ID && raft.commit_to_current_term();
        others > 1 || is_told
    }
}
