//! The ticks, and who has led since when.

use raft::RawNode;
use slog::{Logger, info};

use super::{NodeId, Term};
use crate::storage::log::Log;

/// The leader under whom a request was proposed. If it changes, the request may have been dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Leadership {
    pub term: Term,
    pub leader: NodeId,
}

impl Leadership {
    pub fn of(raw_node: &RawNode<Log>) -> Self {
        Self { term: raw_node.raft.term, leader: raw_node.raft.leader_id }
    }
}

/// The node's time.
#[derive(Debug, Default)]
pub(super) struct Clock {
    now: u64,
    leadership: Leadership,
    since: u64,
}

impl Clock {
    /// The ticks since the start.
    pub fn now(&self) -> u64 {
        self.now
    }

    pub fn tick(&mut self) {
        self.now += 1;
    }

    /// The tick `ticks` ago, or 0.
    pub fn ago(&self, ticks: usize) -> u64 {
        self.now.saturating_sub(ticks as u64)
    }

    /// True every `interval` ticks, from the first on.
    pub fn is_every(&self, interval: usize) -> bool {
        let interval = interval.max(1) as u64;
        self.now % interval == 1 % interval
    }

    /// For how many ticks the current leader has led in the current term.
    pub fn leads_for(&self) -> u64 {
        self.now - self.since
    }

    /// Notes who leads; returns the leadership before if it changed.
    pub fn note(&mut self, new: Leadership) -> Option<Leadership> {
        let old = std::mem::replace(&mut self.leadership, new);
        if old == new {
            return None;
        }
        self.since = self.now;
        Some(old)
    }
}

/// Logs a change of leader in the original's words.
pub(super) fn log_leader(old: Leadership, new: Leadership, own: NodeId, logger: &Logger) {
    let term = new.term;
    match (old.leader, new.leader) {
        (from, to) if from == to => {}
        (0, to) => info!(logger, "raft.node: {own} elected leader {to} at term {term}"),
        (from, 0) => info!(logger, "raft.node: {own} lost leader {from} at term {term}"),
        (from, to) => {
            info!(logger, "raft.node: {own} changed leader from {from} to {to} at term {term}");
        }
    }
}
