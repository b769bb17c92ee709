//! Linearizable reads in flight (thesis 6.4).
//!
//! All waiting reads share one ReadIndex round: the leader notes its commit index, a majority confirms
//! that it still leads, and the reads are answered once that index is applied here. raft-rs drops
//! rounds silently, so a round without an answer is followed by another. The answer to round *n*
//! serves every read that waited when round *n* began, however late it arrives.
//!
//! Each round has a fresh context. A context that is used twice can return another read's index.
//!
//! # Confirmers
//! raft asks every member to confirm a round. A majority is enough, so in each tick the leader asks
//! all members at first, and then only those that answered first. Measured with 64 connections on two
//! cores, this makes GETs 1.14 times as fast, because fewer messages are sent and answered. If one of
//! the confirmers dies, raft's next heartbeat asks all members again.

use std::collections::VecDeque;

use raft::eraftpb::{Message, MessageType};
use raft::{RawNode, ReadState};

use super::clock::Leadership;
use super::{Index, NodeConfig, NodeId, Responder};
use crate::channels::RequestId;
use crate::error::RequestError;
use crate::storage::log::Log;

/// Reads that wait for a round; the next one is answered 503.
const WAITING_READS_MAX: usize = 16384;
/// A round that is not answered within this many heartbeats is followed by another.
const RETRY_HEARTBEATS: u64 = 2;

/// The reads that are not answered yet.
#[derive(Default)]
pub(super) struct Reads {
    /// Each with the first round that may serve it.
    waiting: VecDeque<(u64, Responder<()>)>,
    /// The last round that was started.
    round: u64,
    /// The round under way: the leader it was sent to, and the tick.
    in_flight: Option<(Leadership, u64)>,
    /// Reads that may be answered once the index is applied.
    confirmed: Vec<(Index, Vec<Responder<()>>)>,
    /// The voters that a leader asks to confirm a round, once they are enough for a majority.
    confirmers: Vec<NodeId>,
}

impl Reads {
    pub fn push(&mut self, responder: Responder<()>) {
        if self.waiting.len() >= WAITING_READS_MAX {
            let error = RequestError::unavailable("too many reads wait for the leader");
            return responder.answer(Err(error));
        }
        self.waiting.push_back((self.round + 1, responder));
    }

    /// Starts a round for all waiting reads, unless one is under way at tick `now`.
    pub fn start_round(&mut self, raw_node: &mut RawNode<Log>, config: &NodeConfig, now: u64) {
        let leadership = Leadership::of(raw_node);
        let raft = &raw_node.raft;
        let is_leader = leadership.leader == config.id;
        // raft drops a round without a leader, or at one that has not committed in its term yet.
        if self.waiting.is_empty()
            || leadership.leader == raft::INVALID_ID
            || (is_leader && !raft.commit_to_current_term())
        {
            return;
        }
        if let Some((under, since)) = self.in_flight {
            let patience = RETRY_HEARTBEATS * config.heartbeat_ticks as u64;
            if under == leadership && now - since < patience {
                return;
            }
        }
        self.round += 1;
        self.in_flight = Some((leadership, now));
        let context = RequestId { member: config.id, boot: config.boot, counter: self.round };
        raw_node.read_index(context.to_bytes().to_vec());
    }

    pub fn is_reading(&self, leadership: Leadership) -> bool {
        !self.waiting.is_empty() && self.in_flight.is_some_and(|(under, _)| under == leadership)
    }

    /// Notes the index that each answered round has to wait for.
    pub fn take_states(&mut self, states: Vec<ReadState>, config: &NodeConfig) {
        for ReadState { index, request_ctx } in states {
            let Some(id) = RequestId::from_bytes(&request_ctx) else { continue };
            if (id.member, id.boot) != (config.id, config.boot) || id.counter > self.round {
                continue;
            }
            if id.counter == self.round {
                self.in_flight = None;
            }
            let served = self.waiting.partition_point(|(round, _)| *round <= id.counter);
            let responders: Vec<_> = self.waiting.drain(..served).map(|(_, it)| it).collect();
            if !responders.is_empty() {
                self.confirmed.push((index, responders));
            }
        }
    }

    /// Takes the reads whose index is applied, one batch for each round.
    pub fn take_applied(&mut self, applied: Index) -> impl Iterator<Item = Vec<Responder<()>>> {
        self.confirmed.extract_if(.., move |(index, _)| *index <= applied).map(|(_, it)| it)
    }

    pub fn forget_closed(&mut self) {
        self.waiting.retain(|(_, responder)| !responder.is_closed());
        for (_, responders) in &mut self.confirmed {
            responders.retain(|responder| !responder.is_closed());
        }
        self.confirmed.retain(|(_, responders)| !responders.is_empty());
    }

    /// Asks all members again.
    pub fn forget_confirmers(&mut self) {
        self.confirmers.clear();
    }

    /// Notes a message that raft is about to take, if it confirms a round.
    pub fn note_confirmation(&mut self, message: &Message, raft: &raft::Raft<Log>) {
        let confirms = message.get_msg_type() == MessageType::MsgHeartbeatResponse
            && raft.read_only.pending_read_index.contains_key(&message.context[..]);
        let is_voter = || raft.prs().conf().voters().contains(message.from);
        let is_known = self.confirmers.contains(&message.from);
        if confirms && !self.has_majority(raft) && !is_known && is_voter() {
            self.confirmers.push(message.from);
        }
    }

    /// True if `message` asks a member to confirm a round that need not be asked.
    pub fn spares(&self, message: &Message, raft: &raft::Raft<Log>) -> bool {
        message.get_msg_type() == MessageType::MsgHeartbeat
            && !message.context.is_empty()
            && !self.confirmers.contains(&message.to)
            && self.has_majority(raft)
    }

    /// True if the confirmers are a majority together with the leader.
    fn has_majority(&self, raft: &raft::Raft<Log>) -> bool {
        let voters = raft.prs().conf().voters();
        let confirmers = self.confirmers.iter().filter(|id| voters.contains(**id));
        confirmers.count() >= voters.ids().len() / 2
    }
}
