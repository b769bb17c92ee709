//! What a node tells about itself: to the admin port, and to the other members.

use std::collections::BTreeMap;
use std::fmt;
use std::mem::take;

use raft::StateRole;
use serde::{Deserialize, Serialize};

use super::RaftNode;
use super::lifecycle::Lifecycle;
use crate::channels::{Index, NodeId, Term};
use crate::membership::Members;

/// What the outside may know of a node at any moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// This member.
    pub id: NodeId,
    /// Its cluster; 0 while it joins one.
    pub cluster_id: u64,
    /// What it is to the others.
    pub role: Role,
    /// This member's term.
    pub term: Term,
    /// Whom it voted for in this term; 0 if nobody.
    pub vote: NodeId,
    /// The leader it follows, itself included; 0 if none is known.
    pub leader: NodeId,
    /// The last entry known to be committed.
    pub commit: Index,
    /// The last entry handed to the state machine.
    pub applied: Index,
    /// The index of the newest snapshot.
    pub snapshot: Index,
    /// The first entry in the log.
    pub first: Index,
    /// The last entry in the log.
    pub last: Index,
    /// True once raft runs: see [`bootstrap`](super::bootstrap).
    pub begun: bool,
    /// The members.
    pub members: Members,
    /// Those of them that have no vote.
    pub learners: Vec<NodeId>,
    /// What changes without anything to see in raft; as of the last tick.
    pub tick: TickStatus,
}

/// The part of a [`Status`] that is made once in a tick.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TickStatus {
    /// Milliseconds since the process started.
    pub uptime_ms: u64,
    /// The program's version.
    pub version: String,
    /// The URL of its admin port; empty if it has none.
    pub admin_url: String,
    /// Bytes of the log's segments.
    pub wal_bytes: u64,
    /// Keys in the store, as the store counts them.
    pub keys: u64,
    /// Bytes of the store's keys and values.
    pub store_bytes: u64,
    /// PUTs that were acknowledged, and the microseconds that they took together.
    pub puts: (u64, u64),
    /// GETs that were answered with a value, and the microseconds that they took together.
    pub gets: (u64, u64),
    /// The other members, and who else was heard from lately.
    pub peers: BTreeMap<NodeId, PeerStatus>,
}

/// What a member is to the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// It waits for the others before its first start: see [`bootstrap`](super::bootstrap).
    #[default]
    #[serde(rename = "beginning")]
    Bootstrapping,
    /// It lost entries that it had acknowledged, and takes no part.
    Quarantined,
    /// It receives the log and has no vote.
    Learner,
    /// It follows a leader, or waits for one.
    Follower,
    /// It asks whether it would be elected.
    PreCandidate,
    /// It asks to be elected.
    Candidate,
    /// It leads.
    Leader,
}

impl fmt::Display for Role {
    /// The word that JSON has for it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// What a member knows of another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Milliseconds since it was heard from; `None` if it never was. Members speak to their leader
    /// alone, so followers do not hear of each other.
    pub heard_ms: Option<u64>,
    /// Raft messages sent to it.
    pub sent: Sent,
    /// How far it has come, at a leader.
    pub progress: Option<Progress>,
}

/// Raft messages sent to one peer, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    /// Entries, and answers to them.
    pub append: u64,
    /// Heartbeats, and answers to them.
    pub heartbeat: u64,
    /// All that belongs to an election.
    pub vote: u64,
    /// Snapshots.
    pub snapshot: u64,
    /// Writes and reads passed on to the leader, and the rest.
    pub other: u64,
}

/// How far a peer has come, as its leader sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The last entry that it is known to have.
    pub matched: Index,
    /// The next entry to send to it.
    pub next: Index,
    /// How it is sent entries.
    pub state: SendState,
}

/// How a leader sends entries to a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SendState {
    /// One message at a time, to find out where its log ends.
    #[default]
    Probe,
    /// As they come.
    Replicate,
    /// Not before the snapshot has arrived that is on its way.
    Snapshot,
}

impl RaftNode {
    pub(super) fn refresh_status(&mut self) {
        let metrics = &self.config.metrics;
        let tick_ms = self.config.tick.as_millis() as u64;
        let now = self.clock.now();
        let age_ms = |tick: u64| (now - tick).saturating_mul(tick_ms);
        let tick = TickStatus {
            uptime_ms: metrics.uptime().as_millis() as u64,
            version: env!("CARGO_PKG_VERSION").into(),
            admin_url: self.config.admin_url.clone(),
            wal_bytes: self.journal.bytes(),
            keys: metrics.keys.get() as u64,
            store_bytes: metrics.store_bytes.get() as u64,
            puts: metrics.puts.totals(),
            gets: metrics.gets.totals(),
            peers: self.peers.statuses(&self.raw_node, age_ms),
        };
        self.status_tx.send_modify(|status| status.tick = tick);
    }

    /// Publishes the status. Receivers are woken only if something changed.
    pub(super) fn publish_status(&mut self) {
        let raft = &self.raw_node.raft;
        self.config.metrics.proposals_pending.set(self.writes.count() as i64);
        let role = self.role();
        let status = Status {
            id: self.config.id,
            cluster_id: self.journal.identity().cluster_id,
            role,
            term: raft.term,
            vote: raft.vote,
            leader: if self.lifecycle.takes_part() { raft.leader_id } else { 0 },
            commit: raft.raft_log.committed,
            applied: self.applied.index(),
            snapshot: self.snapshots.newest(),
            first: raft.raft_log.first_index(),
            last: raft.raft_log.last_index(),
            begun: role != Role::Bootstrapping,
            members: Members::default(),
            learners: self.applied.members().learners.iter().copied().collect(),
            tick: TickStatus::default(),
        };
        let members = self.applied.members();
        self.status_tx.send_if_modified(|old| {
            // These two are large and rarely change. They are moved, so that the rest can be compared.
            let (old_members, tick) = (take(&mut old.members), take(&mut old.tick));
            let is_new = *old != status || old_members != *members;
            let members = if old_members == *members { old_members } else { members.clone() };
            *old = Status { members, tick, ..status };
            is_new
        });
    }

    fn role(&self) -> Role {
        let is_learner = self.applied.members().learners.contains(&self.config.id);
        match (&self.lifecycle, self.raw_node.raft.state) {
            (Lifecycle::Bootstrapping(_), _) => Role::Bootstrapping,
            (Lifecycle::Quarantined(_), _) => Role::Quarantined,
            (_, StateRole::Follower) if is_learner => Role::Learner,
            (_, StateRole::Follower) => Role::Follower,
            (_, StateRole::PreCandidate) => Role::PreCandidate,
            (_, StateRole::Candidate) => Role::Candidate,
            (_, StateRole::Leader) => Role::Leader,
        }
    }
}
