//! The members as replicated state, and the rules for changing them.

use std::collections::{BTreeMap, BTreeSet};

use raft::eraftpb::ConfState;
use raft::majority;
use serde::{Deserialize, Serialize};

use super::changes::MemberChange;
use super::urls::{check_url, is_https};
use crate::channels::{Index, MemberRequest, NodeId};
use crate::error::RequestError;

/// The most members. Wire limits follow from it.
pub const MEMBERS_MAX: usize = 64;
/// The most learners that were never heard from: each may be a mistake, or never be started.
pub const SILENT_LEARNERS_MAX: usize = 8;
/// The most removed ids that are remembered one by one.
pub const REMOVED_MAX: usize = 10_000;

/// The current and the removed members.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    /// The peer URL of each member.
    pub urls: BTreeMap<NodeId, String>,
    /// The removed ids, each with the index of its removal, [`REMOVED_MAX`] at most.
    pub removed: BTreeMap<NodeId, Index>,
    /// The highest id that made room for others among the removed ones, and the index of its removal.
    /// An id up to it that is no member counts as removed.
    pub removed_floor: (NodeId, Index),
    /// The members without a vote: the learners of raft's ConfState.
    pub learners: BTreeSet<NodeId>,
    /// For each member that moved, the index of the entry that set its current URL.
    pub moved: BTreeMap<NodeId, Index>,
    /// The data directory of each voter. A learner is bound to one by its promotion.
    pub incarnations: BTreeMap<NodeId, u64>,
}

/// What a client's request means in the current state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The leader proposes this change.
    Change(MemberChange),
    /// The leader transfers leadership to this voter, or to any other voter.
    Transfer(Option<NodeId>),
    /// The request is valid and changes nothing, such as DELETE of an unknown id.
    Nothing,
}

impl Members {
    /// Decides what the leader does for a client's `request`. Errors are those of
    /// [`check`](Self::check), and 409 for a transfer to a member without a vote.
    pub fn decide(&self, request: &MemberRequest) -> Result<Verdict, RequestError> {
        let change = match request.clone() {
            MemberRequest::Add { id, url } => MemberChange::AddLearner { id, url },
            MemberRequest::Remove { id } => MemberChange::Remove { id },
            MemberRequest::Move { id, url } => MemberChange::Move { id, url },
            MemberRequest::Lead { to: Some(id) } if !self.is_voter(id) => {
                return Err(RequestError::Conflict(format!(
                    "{id} is no member with a vote: it cannot lead"
                )));
            }
            MemberRequest::Lead { to } => return Ok(Verdict::Transfer(to)),
        };
        Ok(if self.check(&change)? { Verdict::Change(change) } else { Verdict::Nothing })
    }

    /// Checks whether `change` is allowed. Returns false if it would change nothing.
    ///
    /// The leader checks before it proposes. Every member checks again when it applies the entry, and
    /// all skip a change that is no longer allowed.
    ///
    /// # Errors
    /// 400 if no state allows the change, 410 for a removed id, 409 if this state does not allow it.
    pub fn check(&self, change: &MemberChange) -> Result<bool, RequestError> {
        match change {
            MemberChange::AddLearner { id, url } | MemberChange::AddVoter { id, url, .. } => {
                self.check_listener(*id, url)?;
                if let Some(known) = self.urls.get(id) {
                    return Err(RequestError::Conflict(format!(
                        "{id} is a member already, at {known}"
                    )));
                }
                self.check_url(url)?;
                if self.urls.len() >= MEMBERS_MAX {
                    return Err(RequestError::Conflict(format!(
                        "there are {MEMBERS_MAX} members already, the most there can be: remove one first"
                    )));
                }
                Ok(true)
            }
            MemberChange::Promote { id, .. } if !self.learners.contains(id) => {
                Err(RequestError::Conflict(format!("{id} is no learner")))
            }
            MemberChange::Promote { .. } => Ok(true),
            MemberChange::Move { id, url } => {
                self.check_listener(*id, url)?;
                match self.urls.get(id) {
                    None => Err(RequestError::Conflict(format!("{id} is no member"))),
                    Some(known) if known == url => Ok(false),
                    Some(_) => self.check_url(url).map(|()| true),
                }
            }
            MemberChange::Remove { id } => {
                if !self.urls.contains_key(id) {
                    return Ok(false);
                }
                if self.voters().eq([*id]) {
                    let others = if self.learners.is_empty() { "" } else { " with a vote" };
                    return Err(RequestError::Conflict(format!(
                        "{id} is the last member{others}; stop it instead"
                    )));
                }
                Ok(true)
            }
        }
    }

    fn check_listener(&self, id: NodeId, url: &str) -> Result<(), RequestError> {
        if id == 0 {
            return Err(RequestError::Invalid("0 is no member id: ids start at 1".into()));
        }
        check_url(url).map_err(RequestError::Invalid)?;
        match self.removed_at(id) {
            None => Ok(()),
            Some(index) => Err(RequestError::Gone(format!(
                "member {id} was removed at index {index} and its id cannot be used again: add the member under a new id"
            ))),
        }
    }

    /// Checks that no member has `url`, and that all members can connect to it: one with TLS and one
    /// without could not.
    fn check_url(&self, url: &str) -> Result<(), RequestError> {
        if let Some((other, _)) = self.urls.iter().find(|(_, known)| *known == url) {
            return Err(RequestError::Conflict(format!(
                "{url} is the peer URL of member {other} already"
            )));
        }
        match self.urls.values().find(|known| is_https(known) != is_https(url)) {
            None => Ok(()),
            Some(known) => Err(RequestError::Conflict(format!(
                "{url} and the members' URLs, such as {known}, have to begin alike: use https:// for all or for none"
            ))),
        }
    }

    /// The index of the entry that removed member `id`; `None` if it was not removed.
    pub fn removed_at(&self, id: NodeId) -> Option<Index> {
        let (floor, index) = self.removed_floor;
        let is_below = id <= floor && !self.urls.contains_key(&id);
        self.removed.get(&id).copied().or(is_below.then_some(index))
    }

    /// The index of the entry that moved member `id` to its current URL; 0 if it never moved.
    pub fn moved_at(&self, id: NodeId) -> Index {
        self.moved.get(&id).copied().unwrap_or(0)
    }

    /// The members with a vote.
    pub fn voters(&self) -> impl Iterator<Item = NodeId> {
        self.urls.keys().copied().filter(|id| !self.learners.contains(id))
    }

    pub(crate) fn is_voter(&self, id: NodeId) -> bool {
        self.urls.contains_key(&id) && !self.learners.contains(&id)
    }

    /// Applies `change`; `index` is the index of its entry.
    pub fn apply(&mut self, change: &MemberChange, index: Index) {
        match change {
            MemberChange::AddLearner { id, url } => {
                self.urls.insert(*id, url.clone());
                self.learners.insert(*id);
            }
            MemberChange::AddVoter { id, url, incarnation } => {
                self.urls.insert(*id, url.clone());
                self.incarnations.insert(*id, *incarnation);
            }
            MemberChange::Promote { id, incarnation } => {
                self.learners.remove(id);
                self.incarnations.insert(*id, *incarnation);
            }
            MemberChange::Move { id, url } => {
                self.urls.insert(*id, url.clone());
                self.moved.insert(*id, index);
            }
            MemberChange::Remove { id } => {
                self.urls.remove(id);
                self.learners.remove(id);
                self.moved.remove(id);
                self.incarnations.remove(id);
                self.removed.insert(*id, index);
                if self.removed.len() > REMOVED_MAX {
                    self.removed_floor = self.removed.pop_first().expect("there are many");
                }
            }
        }
    }

    /// Checks that the remaining voters still have a live majority after the removal of `removed`.
    /// `lives` says which members were heard from recently. A dead member can always be removed,
    /// because today's live majority is a majority of fewer members too. The 409 names the dead member
    /// to remove first.
    pub fn check_majority_lives(
        &self,
        removed: NodeId,
        lives: impl Fn(NodeId) -> bool,
    ) -> Result<(), RequestError> {
        let others = self.voters().filter(|id| *id != removed);
        let (living, dead): (Vec<_>, Vec<_>) = others.partition(|id| lives(*id));
        let (living, remaining) = (living.len(), living.len() + dead.len());
        match dead.first() {
            Some(dead) if !self.learners.contains(&removed) && living < majority(remaining) => {
                Err(RequestError::Conflict(format!(
                    "without member {removed} only {living} of {remaining} members would live: remove member {dead} first"
                )))
            }
            _ => Ok(()),
        }
    }

    /// Checks that the other voters are a live majority without member `id`. They must be able to
    /// correct a mistyped URL, because no member finds `id` there.
    pub fn check_move(
        &self,
        id: NodeId,
        lives: impl Fn(NodeId) -> bool,
    ) -> Result<(), RequestError> {
        let voters = self.voters().count();
        let others = self.voters().filter(|other| *other != id && lives(*other)).count();
        if self.learners.contains(&id) || voters == 1 || others >= majority(voters) {
            return Ok(());
        }
        Err(RequestError::Conflict(format!(
            "without member {id} only {others} of {voters} voters live, and they could not correct a wrong URL: start the other voters, or remove member {id} and add it under a new id"
        )))
    }
}

/// What a snapshot holds about the members: in the meta bytes of its file, and in raft's `Snapshot.data`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMembers {
    /// The cluster that the snapshot belongs to.
    pub cluster_id: u64,
    /// The voters of the ConfState, which are those of `members`.
    pub voters: Vec<NodeId>,
    /// The learners of the ConfState, likewise.
    pub learners: Vec<NodeId>,
    /// The members and the removed ids.
    pub members: Members,
}

impl SnapshotMembers {
    /// The members of this cluster. Their ids are sorted, while raft's order differs from member to
    /// member.
    pub fn new(cluster_id: u64, members: Members) -> Self {
        let voters = members.voters().collect();
        Self { cluster_id, voters, learners: members.learners.iter().copied().collect(), members }
    }

    /// The ConfState as raft has it.
    pub fn conf_state(&self) -> ConfState {
        ConfState::from((self.voters.clone(), self.learners.clone()))
    }
}

/// raft's `Snapshot.data`: everything but the state itself, which is streamed as a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotData {
    /// The members as of the snapshot's index.
    pub members: SnapshotMembers,
    /// The file's length in bytes.
    pub length: u64,
    /// The file's CRC32C.
    pub checksum: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(id: NodeId) -> String {
        format!("http://127.0.0.1:{}", 9020 + id)
    }

    fn members(ids: impl IntoIterator<Item = NodeId>) -> Members {
        Members { urls: ids.into_iter().map(|id| (id, url(id))).collect(), ..Members::default() }
    }

    fn add(id: NodeId) -> MemberChange {
        MemberChange::AddLearner { id, url: url(id) }
    }

    fn remove(id: NodeId) -> MemberChange {
        MemberChange::Remove { id }
    }

    #[test]
    fn a_change_is_decided_on_the_state_alone() {
        use RequestError::{Conflict, Gone, Invalid};
        let mut state = members([1, 2, 3]);
        state.apply(&add(4), 10);
        state.apply(&remove(3), 11);
        assert_eq!(state.urls, members([1, 2, 4]).urls);
        assert_eq!(state.removed, BTreeMap::from([(3, 11)]));

        assert_eq!(state.check(&add(5)), Ok(true));
        assert_eq!(state.check(&remove(4)), Ok(true));
        assert_eq!(state.check(&remove(3)), Ok(false), "removed already");
        assert_eq!(state.check(&remove(0)), Ok(false));
        assert_eq!(state.check(&remove(77)), Ok(false));
        assert!(matches!(state.check(&add(0)), Err(Invalid(_))));
        let no_url = MemberChange::AddLearner { id: 3, url: "no url".into() };
        assert!(matches!(state.check(&no_url), Err(Invalid(_))), "before anything else");
        assert!(matches!(state.check(&add(3)), Err(Gone(why)) if why.contains("index 11")));
        let conflict = state.check(&add(2));
        assert!(matches!(&conflict, Err(Conflict(why)) if why.contains(&url(2))), "{conflict:?}");
        let same_url = MemberChange::AddLearner { id: 5, url: url(4) };
        let conflict = state.check(&same_url);
        assert!(
            matches!(&conflict, Err(Conflict(why)) if why.contains("member 4")),
            "{conflict:?}"
        );
        // Where a removed member listened another may listen.
        let reused = MemberChange::AddLearner { id: 5, url: url(3) };
        assert_eq!(state.check(&reused), Ok(true));

        let other_scheme = |state: &Members, url: &str| {
            state.check(&MemberChange::AddLearner { id: 5, url: url.into() })
        };
        let conflict = other_scheme(&state, "https://127.0.0.1:9");
        assert!(
            matches!(&conflict, Err(Conflict(why)) if why.contains("begin alike")),
            "{conflict:?}"
        );
        let secured =
            Members { urls: [(1, "https://127.0.0.1:8".into())].into(), ..Members::default() };
        assert_eq!(other_scheme(&secured, "https://127.0.0.1:9"), Ok(true));
        assert!(matches!(other_scheme(&secured, "http://127.0.0.1:9"), Err(Conflict(_))));
        let moved = MemberChange::Move { id: 2, url: "https://127.0.0.1:9".into() };
        assert!(matches!(state.check(&moved), Err(Conflict(why)) if why.contains("begin alike")));

        // A learner has no say, so it is nobody's to wait for.
        let learner = MemberChange::Promote { id: 4, incarnation: 104 };
        assert_eq!(state.learners, BTreeSet::from([4]));
        assert!(matches!(state.decide(&MemberRequest::Lead { to: Some(4) }), Err(Conflict(_))));
        assert_eq!(state.check(&learner), Ok(true));
        state.apply(&learner, 12);
        assert_eq!(state.voters().collect::<Vec<_>>(), [1, 2, 4]);
        assert!(matches!(state.check(&learner), Err(Conflict(_))), "twice");

        let to = |id, url: String| MemberChange::Move { id, url };
        assert_eq!(state.check(&to(2, url(2))), Ok(false));
        assert_eq!(state.check(&to(2, url(9))), Ok(true));
        assert!(matches!(state.check(&to(2, url(4))), Err(Conflict(_))), "member 4 is there");
        assert!(matches!(state.check(&to(3, url(9))), Err(Gone(_))));
        assert!(matches!(state.check(&to(7, url(9))), Err(Conflict(_))));
        assert!(matches!(state.check(&to(2, "no url".into())), Err(Invalid(_))));
        state.apply(&to(2, url(9)), 13);
        assert_eq!((&state.urls[&2], state.moved[&2]), (&url(9), 13));

        let mut last = members([1]);
        assert!(matches!(last.check(&remove(1)), Err(Conflict(why)) if why.contains("last")));
        last.apply(&add(2), 14);
        let only_voter = last.check(&remove(1));
        assert!(matches!(only_voter, Err(Conflict(why)) if why.contains("with a vote")));
        assert_eq!(last.check(&remove(2)), Ok(true));
        let last = members([1]);
        assert!(matches!(last.check(&remove(1)), Err(Conflict(why)) if why.contains("last")));
        assert_eq!(last.check(&remove(2)), Ok(false));
    }

    #[test]
    fn there_is_a_most_of_members_and_of_removed_ids() {
        let mut state = members(1..=MEMBERS_MAX as u64 - 1);
        assert_eq!(state.check(&add(100)), Ok(true));
        state.apply(&add(100), 5);
        let conflict = state.check(&add(101));
        assert!(matches!(&conflict, Err(RequestError::Conflict(why)) if why.contains("64")));
        state.apply(&remove(3), 6);
        // Ids are taken in any order; member 100 stays.
        for (count, id) in (200..200 + REMOVED_MAX as u64).rev().enumerate() {
            state.apply(&add(id), 10);
            state.apply(&remove(id), 1000 + count as Index);
        }
        assert_eq!((state.removed.len(), state.removed_floor), (REMOVED_MAX, (3, 6)));
        assert_eq!(state.removed_at(3), Some(6));
        assert!(matches!(state.check(&add(3)), Err(RequestError::Gone(_))));
        assert_eq!(state.removed_at(4), None, "it is a member");
        state.apply(&add(10_500), 20_000);
        state.apply(&remove(10_500), 20_001);
        assert_eq!(state.removed_floor.0, 200, "the lowest makes room");
        assert_eq!(
            (state.removed_at(100), state.removed_at(150)),
            (None, Some(state.removed_floor.1))
        );
        assert!(matches!(state.check(&add(150)), Err(RequestError::Gone(_))), "below the floor");
        assert_eq!(state.removed_at(20_000), None);
    }

    #[test]
    fn a_member_is_removed_only_if_a_majority_of_the_rest_lives() {
        // The members, those that live, the one to remove, and the one to remove first.
        type Case = (u64, &'static [NodeId], NodeId, Option<NodeId>);
        let cases: &[Case] = &[
            (1, &[1], 1, None),
            (1, &[], 1, None),
            (2, &[1, 2], 2, None),
            (2, &[1], 2, None),
            (2, &[1], 1, Some(2)),
            (3, &[1, 2, 3], 3, None),
            (3, &[1, 2], 3, None),
            (3, &[1, 2], 2, Some(3)),
            (4, &[1, 2, 3], 4, None),
            (4, &[1, 2, 3], 1, None),
            (5, &[1, 2, 3], 1, Some(4)),
            (5, &[1, 2, 3], 5, None),
            (5, &[1, 2, 3, 4], 4, None),
        ];
        for (n, living, removed, first) in cases {
            let what = format!("{removed} of {n}, living {living:?}");
            let verdict = members(1..=*n).check_majority_lives(*removed, |id| living.contains(&id));
            match first {
                None => assert_eq!(verdict, Ok(()), "{what}"),
                Some(first) => {
                    let RequestError::Conflict(why) = verdict.expect_err(&what) else {
                        panic!("{what}: not a conflict")
                    };
                    assert!(why.contains(&format!("remove member {first} first")), "{what}: {why}");
                }
            }
        }
    }
}
