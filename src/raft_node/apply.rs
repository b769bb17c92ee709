//! What is committed goes on commitC; changes of the members and of the leader take effect here.

use raft::eraftpb::{Entry, EntryType, Snapshot};
use slog::{error, info};

use super::changes;
use super::clock::{self, Leadership};
use super::lifecycle::{Leaving, Lifecycle};
use super::snapshots::snapshot_id;
use super::{RaftNode, holds_change};
use crate::channels::{Commit, CommittedEntry, RequestId};
use crate::error::{Error, REPLACE_MEMBER, Result};
use crate::membership::MemberChange;
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
        let failed = self.writes.fail_all("a snapshot replaced the log");
        self.config.metrics.proposals_failed.inc_by(failed);
        self.changes.fail_all("a snapshot replaced the log");
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
            let responder = request_id.and_then(|id| self.writes.take(id));
            own += u64::from(responder.is_some());
            let (index, term) = (entry.index, entry.term);
            committed.push(CommittedEntry { index, term, responder, data: entry.data });
        }
        self.commits.send_entries(committed, bytes);
        self.config.metrics.proposals_committed.inc_by(own);
        if has_changes {
            self.update_admission();
        }
    }

    fn apply_change(&mut self, entry: &Entry) {
        let own = self.config.id;
        let (applied, raw_node) = (&mut self.applied, &mut self.raw_node);
        let change = changes::apply(entry, applied, raw_node, &self.peers, own, &self.logger);
        match &change {
            Err(_) | Ok(None) => {}
            Ok(Some(MemberChange::Remove { id })) if *id == own => {
                self.changes.answer_own_removal();
                let until_tick = self.clock.now() + self.config.election_ticks as u64;
                self.lifecycle = Lifecycle::Leaving(Leaving { removal: entry.index, until_tick });
            }
            Ok(Some(_)) => self.connect_members(),
        }
        // Last: a client that is told of a change may rely on all of it.
        self.changes.answer(entry, change.map(|_| ()));
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
        let moves = changes::pending_moves(self.raw_node.store(), &self.applied);
        self.peers.admission().update(cluster_id, self.applied.members(), moves);
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
        let failed = self.writes.fail_other_than(new);
        self.config.metrics.proposals_failed.inc_by(failed);
        self.changes.fail_other_than(new);
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
