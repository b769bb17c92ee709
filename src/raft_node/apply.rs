//! What is committed goes on commitC; changes of the members and of the leader take effect here.

use raft::eraftpb::{Entry, EntryType, Snapshot};
use slog::{Logger, error, info, warn};

use super::changes::pending_changes;
use super::clock::{self, Leadership};
use super::lifecycle::{Leaving, Lifecycle};
use super::snapshots::snapshot_id;
use super::{NodeId, RaftNode, holds_change};
use crate::channels::{Commit, CommittedEntry, RequestId};
use crate::error::{Error, REPLACE_MEMBER, RequestError, Result};
use crate::membership::{MemberChange, Members};
use crate::storage::log::entry_bytes;

impl RaftNode {
    /// Hands a received snapshot to the state machine, and takes the members from it.
    pub(super) fn publish_snapshot(&mut self, snapshot: &Snapshot) -> Result<()> {
        if snapshot.is_empty() {
            return Ok(());
        }
        let id = snapshot_id(snapshot);
        info!(self.logger, "publishing snapshot at index {}", id.index);
        let (restore, members) = self.snapshots.install(snapshot)?;
        self.commits.send(Commit::Restore(restore));
        self.applied.advance(id.index, id.term, Some(members.members));
        // A write that was proposed here may be in the snapshot, or not: nothing tells.
        self.fail_pending("a snapshot replaced the log", |_| true);
        self.connect_members();
        self.config.metrics.snapshots_installed.inc();
        self.snapshots.keep(id, &mut self.journal)?;
        info!(self.logger, "finished publishing snapshot at index {}", id.index);
        Ok(())
    }

    /// Publishes committed entries on commitC, and applies changes of members.
    pub(super) fn publish_entries(&mut self, entries: Vec<Entry>) {
        let entries = self.applied.entries_to_apply(entries);
        let mut committed = Vec::with_capacity(entries.len());
        let (mut bytes, mut own, has_changes) = (0, 0, holds_change(&entries));
        let mut last_own = None;
        for entry in entries {
            if entry.get_entry_type() == EntryType::EntryConfChange {
                self.apply_change(&entry);
                continue;
            }
            self.applied.advance(entry.index, entry.term, None);
            if entry.get_entry_type() == EntryType::EntryConfChangeV2 {
                // Never proposed here, and validation refuses it from peers.
                error!(self.logger, "skipping a joint change of members"; "index" => entry.index);
                continue;
            }
            let request_id = RequestId::from_bytes(&entry.context);
            // raft's own: a new leader's first entry, or a change that raft put aside.
            if request_id.is_none() && entry.data.is_empty() {
                continue;
            }
            bytes += entry_bytes(&entry);
            let is_own =
                |id: &RequestId| (id.member, id.boot) == (self.config.id, self.config.boot);
            last_own = request_id.filter(is_own).or(last_own);
            let responder = request_id.and_then(|id| self.writes.take(id));
            own += u64::from(responder.is_some());
            let (index, term) = (entry.index, entry.term);
            committed.push(CommittedEntry { index, term, responder, data: entry.data });
        }
        if let Some(own) = last_own {
            self.reads.take_applied_write(own, self.applied.index());
        }
        self.commits.send_entries(committed, bytes);
        self.config.metrics.proposals_committed.inc_by(own);
        if has_changes {
            self.update_admission();
        }
    }

    /// Applies a committed change, which every member decides alike: the state it decides on is the same.
    fn apply_change(&mut self, entry: &Entry) {
        let own = self.config.id;
        let mut members = self.applied.members().clone();
        let change = self.carry_out(entry, &mut members);
        self.applied.advance(entry.index, entry.term, Some(members));
        match &change {
            Err(why) => warn!(self.logger, "a committed change of members does nothing: {}", why;
                "index" => entry.index),
            Ok(None) => {}
            Ok(Some(MemberChange::Move { id, url })) => {
                info!(self.logger, "member {} moved to {}", id, url);
                self.connect_members();
            }
            Ok(Some(change)) => {
                log_configuration(self.applied.members(), own, &self.logger);
                if *change == (MemberChange::Remove { id: own }) {
                    self.changes.answer_own_removal();
                    let until_tick = self.clock.now() + self.config.election_ticks as u64;
                    let leaving = Leaving { removal: entry.index, until_tick };
                    self.lifecycle = Lifecycle::Leaving(leaving);
                } else {
                    self.connect_members();
                }
            }
        }
        // Last: a client that is told of a change may rely on all of it.
        self.changes.answer(entry, change.map(|_| ()));
    }

    /// Carries a committed change out, in raft and in `members`. Returns it if it had an effect.
    fn carry_out(
        &mut self,
        entry: &Entry,
        members: &mut Members,
    ) -> std::result::Result<Option<MemberChange>, RequestError> {
        let invalid = |why: String| RequestError::Invalid(format!("no change of members: {why}"));
        let (conf_change, change) = MemberChange::decode(&entry.data).map_err(invalid)?;
        if !members.check(&change)? {
            return Ok(None);
        }
        if let MemberChange::Promote { id, incarnation } = change
            && self.peers.incarnation_of(id) != incarnation
        {
            // A vote may not begin with what another directory acknowledged.
            self.forget_progress(id);
        }
        match change {
            // raft does not know URLs.
            MemberChange::Move { .. } => {}
            // raft 0.7.0 panics when a leader that is not a member appends or commits, and lets one that
            // leaves a single voter read without asking it. So raft keeps the members as they were: any
            // majority of these includes one of those that remain.
            MemberChange::Remove { id } if id == self.config.id && self.is_leader() => {}
            _ => {
                let applied = self.raw_node.apply_conf_change(&conf_change);
                applied.map_err(|error| RequestError::Conflict(error.to_string()))?;
            }
        }
        members.apply(&change, entry.index);
        Ok(Some(change))
    }

    /// Has a leader count on nothing that member `id` acknowledged, and probe it.
    pub(super) fn forget_progress(&mut self, id: NodeId) {
        if self.is_leader()
            && let Some(progress) = self.raw_node.raft.mut_prs().get_mut(id)
        {
            (progress.matched, progress.pending_snapshot, progress.committed_index) = (0, 0, 0);
            progress.become_probe();
        }
    }

    /// Stops this member if its vote is bound to another directory.
    pub(super) fn check_own_binding(&self) -> Result<()> {
        let (id, own) = (self.config.id, self.journal.identity().incarnation);
        match self.applied.members().incarnations.get(&id) {
            Some(bound) if *bound != own => Err(Error::Refused(format!(
                "member {id} got its vote with the data directory {bound:016x}, and this is {own:016x}; {REPLACE_MEMBER}"
            ))),
            _ => Ok(()),
        }
    }

    /// Connects the members, after telling admission who they are.
    pub(super) fn connect_members(&mut self) {
        self.update_admission();
        self.peers.connect(&self.applied, &mut *self.outbox);
    }

    /// Tells admission what is applied and what the log will move.
    pub(super) fn update_admission(&self) {
        let cluster_id = match &self.lifecycle {
            Lifecycle::Bootstrapping(bootstrap) => bootstrap.cluster_id(),
            _ => self.journal.identity().cluster_id,
        };
        let pending = pending_changes(self.raw_node.store(), &self.applied).into_iter();
        let moves = pending.filter_map(|change| match change {
            MemberChange::Move { id, url } => Some((id, url)),
            _ => None,
        });
        self.peers.admission().update(cluster_id, self.applied.members(), moves.collect());
    }

    /// Answers the requests whose outcome a change of leader or term makes unknown.
    pub(super) fn note_leadership(&mut self) {
        let new = Leadership::of(&self.raw_node);
        let Some(old) = self.clock.note(new) else { return };
        self.peers.forget_heartbeats();
        if new.leader != old.leader && new.leader != raft::INVALID_ID {
            self.config.metrics.leader_changes.inc();
        }
        clock::log_leader(old, new, self.config.id, &self.logger);
        self.fail_pending("the leader changed", |under| under != new);
    }

    /// Answers with 504 what was proposed under a leader that `is_lost`.
    fn fail_pending(&mut self, why: &str, is_lost: impl Fn(Leadership) -> bool) {
        let failed = self.writes.fail(why, &is_lost);
        self.config.metrics.proposals_failed.inc_by(failed);
        self.changes.fail(why, is_lost);
    }

    pub(super) fn request_snapshot(&mut self) {
        if matches!(self.lifecycle, Lifecycle::Leaving(_)) {
            return;
        }
        let (cluster_id, log) = (self.journal.identity().cluster_id, self.raw_node.store());
        let (applied, config) = (&self.applied, &self.config);
        let request = self.snapshots.request_if_due(applied, cluster_id, log, config, &self.logger);
        if let Some(request) = request {
            self.commits.send(Commit::Snapshot(request));
        }
    }
}

/// Logs the configuration in the original's words.
fn log_configuration(members: &Members, own: NodeId, logger: &Logger) {
    let list = |ids: Vec<NodeId>| ids.iter().map(u64::to_string).collect::<Vec<_>>().join(" ");
    let learners = match members.learners.is_empty() {
        true => String::new(),
        false => format!(" learners=({})", list(members.learners.iter().copied().collect())),
    };
    let voters = list(members.voters().collect());
    info!(logger, "{} switched to configuration voters=({}){}", own, voters, learners);
}
