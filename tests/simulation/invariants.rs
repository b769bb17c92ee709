//! Invariants that hold after every step (Raft paper, figure 3, and this program's own promises).
//!
//! Each turn changes one member, so each check compares that member's changes with everything ever
//! observed at any member.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use raft::eraftpb::{Entry, EntryType};
use raft::{GetEntriesContext, Raft, StateRole};
use raftexample::channels::NodeId;
use raftexample::raft_node::{RaftNode, Status};
use raftexample::storage::log::Log;

use super::process::{Followed, Process};
use crate::support::store::Answer;

/// The violated invariant, in one line.
pub type Violation = String;
type Check = Result<(), Violation>;

macro_rules! ensure {
    ($holds:expr, $($why:tt)+) => {
        if !$holds {
            return Err(format!($($why)+));
        }
    };
}

pub fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

fn entry_hash(entry: &Entry) -> u64 {
    let mut hasher = DefaultHasher::new();
    (entry.get_entry_type() == EntryType::EntryNormal, &entry.data[..], &entry.context[..])
        .hash(&mut hasher);
    hasher.finish()
}

/// A committed entry.
#[derive(Clone, Copy, Debug)]
struct Committed {
    term: u64,
    data_hash: u64,
    /// The term of the first member that was seen to commit it.
    seen_in: u64,
}

/// How a run of a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Within a turn: what that turn wrote may be there or not.
    Interrupted,
    /// Between two turns.
    Killed,
    /// In order.
    Stopped,
}

/// A member after its last complete turn.
#[derive(Default)]
struct View {
    begun: bool,
    term: u64,
    commit: u64,
    /// Term and vote on disk.
    saved: (u64, NodeId),
    /// The end of the log on disk.
    persisted: u64,
    /// True while a frame was under way: a restart may find it.
    is_writing: bool,
    /// In any run.
    highest_commit: u64,
    applied: u64,
    snapshot: u64,
    /// The term of each entry; 0 for those that a snapshot replaced.
    log: Vec<u64>,
}

impl View {
    fn term_at(&self, index: u64) -> Option<u64> {
        self.log.get(index as usize - 1).copied().filter(|term| *term != 0)
    }
}

#[derive(Default)]
pub struct Invariants {
    /// By term.
    leaders: HashMap<u64, NodeId>,
    /// By member and term.
    votes: HashMap<(NodeId, u64), NodeId>,
    /// By index and term: the entry, and the term of the previous one.
    entries: HashMap<(u64, u64), (u64, Option<u64>)>,
    committed: BTreeMap<u64, Committed>,
    /// The index at which each payload was committed first.
    places: HashMap<u64, u64>,
    /// Payloads with a retry token, which may be committed several times.
    may_repeat: HashSet<u64>,
    /// What the state machines answered to each entry.
    answers: BTreeMap<u64, Answer>,
    views: HashMap<NodeId, View>,
    /// Members with a snapshot that was damaged at rest.
    pub damaged: BTreeSet<NodeId>,
    /// The number of elections.
    pub elections: u64,
}

impl Invariants {
    /// Checks member `id` after a turn.
    pub fn check_turn(&mut self, id: NodeId, process: &Process, followed: &Followed) -> Check {
        let status = process.status();
        if !status.begun {
            return Ok(());
        }
        let mut view = self.views.remove(&id).unwrap_or_default();
        let checked = self.check_member(id, &process.node, &status, &mut view, followed);
        self.views.insert(id, view);
        checked.map_err(|why| format!("member {id}: {why}"))
    }

    fn check_member(
        &mut self,
        id: NodeId,
        node: &RaftNode,
        status: &Status,
        view: &mut View,
        followed: &Followed,
    ) -> Check {
        let raft = node.raft();
        let log = &raft.raft_log;
        let (last, compacted) = (log.last_index(), log.first_index() - 1);
        // A snapshot that was set aside is made again, and the older one is the newest meanwhile.
        let snapshot = if self.damaged.contains(&id) {
            status.snapshot.max(compacted)
        } else {
            status.snapshot
        };
        let order = [compacted, snapshot, status.applied, log.committed, last];
        ensure!(
            order.is_sorted(),
            "compacted <= snapshot <= applied <= committed <= last does not hold: {order:?}"
        );
        let is_saved = log.persisted == last || node.is_writing();
        ensure!(is_saved, "the turn left entries behind {} unsaved", log.persisted);
        ensure!(status.applied <= log.persisted, "applied entries behind {}", log.persisted);
        for (what, was, is) in [
            ("term", view.term, raft.term),
            ("commit", view.commit, log.committed),
            ("applied", view.applied, status.applied),
            ("snapshot", view.snapshot, status.snapshot),
        ] {
            let is_set_aside = what == "snapshot" && self.damaged.contains(&id);
            ensure!(was <= is || is_set_aside, "{what} went down from {was} to {is}");
        }
        let (term, vote) = node.saved_term_and_vote();
        if vote != 0 {
            let first = *self.votes.entry((id, term)).or_insert(vote);
            ensure!(first == vote, "voted for {first} and {vote} in term {term}");
        }
        if followed.restored {
            view.log = vec![0; compacted as usize];
        }
        self.check_log(raft, view)?;
        self.check_commits(raft, view)?;
        if raft.state == StateRole::Leader {
            self.check_leader(id, raft)?;
        }
        for entry in &followed.published {
            let index = entry.index;
            let committed = self.committed.get(&index);
            ensure!(
                index <= log.committed && committed.is_some(),
                "applied entry {index}, which is not committed"
            );
            ensure!(
                committed.is_some_and(|committed| committed.term == entry.term
                    && committed.data_hash == hash(&entry.data)),
                "applied another entry at {index} than was committed there"
            );
        }
        self.check_answers(followed)?;
        view.begun = true;
        (view.term, view.saved) = (raft.term, (term, vote));
        (view.persisted, view.is_writing) = (log.persisted, node.is_writing());
        (view.commit, view.applied) = (log.committed, status.applied);
        view.highest_commit = view.highest_commit.max(view.commit);
        view.snapshot = status.snapshot;
        Ok(())
    }

    /// The state machines of all members, in all their runs, answer alike to an entry.
    pub fn check_answers(&mut self, followed: &Followed) -> Check {
        for entry in &followed.published {
            let known = self.answers.entry(entry.index).or_insert_with(|| entry.answer.clone());
            ensure!(
                *known == entry.answer,
                "entry {} was answered {:?}, and {known:?} before",
                entry.index,
                entry.answer
            );
        }
        Ok(())
    }

    /// Log matching: an index and a term identify one entry and everything before it.
    fn check_log(&mut self, raft: &Raft<Log>, view: &mut View) -> Check {
        let log = &raft.raft_log;
        let (last, compacted) = (log.last_index(), log.first_index() - 1);
        let term = |index: u64| log.term(index).map_err(|error| format!("entry {index}: {error}"));
        view.log.resize(last as usize, 0);
        let mut first_new = last + 1;
        while first_new > compacted + 1 && view.term_at(first_new - 1) != Some(term(first_new - 1)?)
        {
            first_new -= 1;
        }
        if first_new > last {
            return Ok(());
        }
        let context = GetEntriesContext::empty(false);
        let entries = log
            .slice(first_new, last + 1, None, context)
            .map_err(|error| format!("entries {first_new} to {last}: {error}"))?;
        for entry in entries {
            let index = entry.index;
            let before = log.term(index - 1).ok().filter(|term| *term != 0 || index == 1);
            let found = (entry_hash(&entry), before);
            let known = self.entries.entry((index, entry.term)).or_insert(found);
            ensure!(
                known.0 == found.0
                    && (known.1.is_none() || found.1.is_none() || known.1 == found.1),
                "log matching: two different entries {index} of term {}",
                entry.term
            );
            known.1 = known.1.or(found.1);
            view.log[index as usize - 1] = entry.term;
        }
        Ok(())
    }

    /// State machine safety: committed entries are the same on every member, and never change.
    fn check_commits(&mut self, raft: &Raft<Log>, view: &View) -> Check {
        let log = &raft.raft_log;
        for index in view.commit + 1..=log.committed {
            // In a snapshot: only its commitment is known here.
            if index < log.first_index() {
                continue;
            }
            let term = log.term(index).map_err(|error| format!("entry {index}: {error}"))?;
            if let Some(known) = self.committed.get(&index) {
                ensure!(
                    known.term == term,
                    "committed entry {index} of term {term}, committed before with term {}",
                    known.term
                );
                continue;
            }
            let context = GetEntriesContext::empty(false);
            let Ok(entries) = log.slice(index, index + 1, None, context) else { continue };
            let entry = &entries[0];
            let data_hash = hash(&entry.data);
            if entry.get_entry_type() == EntryType::EntryNormal && !entry.data.is_empty() {
                let place = *self.places.entry(data_hash).or_insert(index);
                ensure!(
                    place == index || self.may_repeat.contains(&data_hash),
                    "a write was committed twice, at {place} and at {index}"
                );
            }
            let committed = Committed { term, data_hash, seen_in: raft.term };
            self.committed.insert(index, committed);
        }
        Ok(())
    }

    /// Election safety, and leader completeness for entries committed in earlier terms.
    fn check_leader(&mut self, id: NodeId, raft: &Raft<Log>) -> Check {
        let term = raft.term;
        if let Some(leader) = self.leaders.get(&term) {
            ensure!(*leader == id, "leads term {term}, and so did member {leader}");
            return Ok(());
        }
        self.leaders.insert(term, id);
        self.elections += 1;
        let earlier = self.committed.iter().rev().find(|(_, entry)| entry.seen_in < term);
        let Some((index, committed)) = earlier else { return Ok(()) };
        let log = &raft.raft_log;
        ensure!(
            *index < log.first_index() || log.term(*index).ok() == Some(committed.term),
            "leads term {term} without the committed entry {index} of term {}",
            committed.term
        );
        Ok(())
    }

    /// Checks member `id` after a start: it has everything that it had.
    pub fn check_start(&mut self, id: NodeId, process: &Process, end: End) -> Check {
        let Some(view) = self.views.get_mut(&id).filter(|view| view.begun) else { return Ok(()) };
        let raft = process.node.raft();
        let log = &raft.raft_log;
        let checked = || {
            let last = log.last_index();
            let (term, vote) = view.saved;
            ensure!(raft.term >= term, "term {term} became {}", raft.term);
            let has_voted = raft.term == term && vote != 0;
            ensure!(!has_voted || raft.vote == vote, "forgot its vote for {vote}");
            let kept = match end {
                End::Interrupted => view.persisted.min(view.highest_commit),
                _ => view.persisted,
            };
            ensure!(last >= kept, "its log ended at {kept}, and ends at {last} now");
            for index in log.first_index()..=kept {
                let (was, is) = (view.term_at(index), log.term(index).ok());
                ensure!(was.is_none() || was == is, "entry {index} of term {was:?} became {is:?}");
            }
            if end != End::Interrupted && !view.is_writing {
                let state = (raft.term, last);
                let was = (view.term, view.log.len() as u64);
                ensure!(state == was, "(term, last) {was:?} became {state:?}");
            }
            let is_lost = end == End::Stopped && log.committed < view.commit;
            ensure!(!is_lost, "stopped with commit {}, now {}", view.commit, log.committed);
            Ok(())
        };
        checked().map_err(|why| format!("member {id} after it started again: {why}"))?;
        // A commit index may be forgotten, and everything is applied again.
        (view.commit, view.applied, view.snapshot) = (0, 0, 0);
        (view.term, view.saved) = (raft.term, (raft.term, raft.vote));
        view.persisted = log.last_index();
        view.log.resize(log.last_index() as usize, 0);
        for index in log.first_index()..=log.last_index() {
            view.log[index as usize - 1] = log.term(index).unwrap_or(0);
        }
        Ok(())
    }

    /// True if member `id` was seen to have begun.
    pub fn has_begun(&self, id: NodeId) -> bool {
        self.views.get(&id).is_some_and(|view| view.begun)
    }

    /// What holds for a cluster that is restored from a backup of this one at `index`.
    pub fn restored(&self, index: u64) -> Self {
        let committed = self.committed.range(..=index);
        Self {
            committed: committed
                .map(|(at, entry)| (*at, Committed { seen_in: 0, ..*entry }))
                .collect(),
            places: self
                .places
                .iter()
                .filter(|(_, at)| **at <= index)
                .map(|(k, v)| (*k, *v))
                .collect(),
            may_repeat: self.may_repeat.clone(),
            ..Self::default()
        }
    }

    /// Forgets a member that lost its directory.
    pub fn forget(&mut self, id: NodeId) {
        self.views.remove(&id);
    }

    /// Checks an acknowledged write: its entry is committed at that index.
    pub fn check_acknowledged(&self, data_hash: u64, index: u64, term: u64) -> Check {
        let committed = self.committed.get(&index);
        ensure!(
            committed.is_some_and(|entry| entry.term == term && entry.data_hash == data_hash),
            "a write was acknowledged as entry {index} of term {term}, where {committed:?} is"
        );
        Ok(())
    }

    /// Expects a payload to be committed several times.
    pub fn may_repeat(&mut self, data_hash: u64) {
        self.may_repeat.insert(data_hash);
    }

    /// What the state machines answered to each entry.
    pub fn answers(&self) -> impl Iterator<Item = (&u64, &Answer)> {
        self.answers.iter()
    }

    /// The last index known to be committed at any member.
    pub fn last_committed(&self) -> u64 {
        self.committed.last_key_value().map_or(0, |(index, _)| *index)
    }

    /// Hashes of the payloads committed up to `index`, in order.
    pub fn committed_up_to(&self, index: u64) -> impl Iterator<Item = (u64, u64, u64)> {
        let entries = self.committed.range(..=index);
        entries.map(|(index, entry)| (*index, entry.term, entry.data_hash))
    }
}
