//! Writes and reads that wait: each is answered once, before its deadline, whatever happens.
//!
//! # Writes
//! A write that finds no leader waits in the queue: nothing was proposed, so waiting is safe; so does
//! one that could not leave for a leader that just died. Once proposed it is pending under the leader
//! and term it was proposed to, and ends in one of these: its entry is applied (204), leader or term
//! change or a snapshot replaces the log (504 at once), the client's deadline passes (504, by the
//! client's side of the responder). An entry at its index that is another's needs no rule of its own: it
//! was written under another term.
//!
//! # Reads (thesis 6.4)
//! All waiting reads share one ReadIndex round. raft-rs drops rounds silently, so a round without an
//! answer is followed by another, and an answer to round *n* serves every read that waited when
//! round *n* began, however late it comes. Each round has a fresh context: a context used twice can
//! bring another read's index.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use raft::ReadState;
use raft::eraftpb::{Entry, Message, MessageType};

use super::{
    APPEND_BYTES_MAX, Acknowledged, Commit, Index, Leadership, Log, NodeId, OUTSTANDING_BYTES_MAX,
    Ordering, Proposal, RaftNode, RequestError, RequestId, Responder,
};
use crate::channels::Ack;

/// Writes that wait for a leader; the next is answered 503.
const WAITING_PROPOSALS_MAX: usize = 4096;
/// Reads that wait for a round; the next is answered 503.
const WAITING_READS_MAX: usize = 16384;
/// A round that is not answered after this many heartbeats is followed by another.
const READ_RETRY_HEARTBEATS: u64 = 2;

/// The writes that were not answered yet.
#[derive(Default)]
pub(super) struct Proposals {
    /// Not proposed.
    queue: VecDeque<Proposal>,
    /// Proposed, and not applied.
    pending: HashMap<RequestId, (Leadership, Responder<Acknowledged>)>,
}

impl Proposals {
    pub(super) fn push(&mut self, proposal: Proposal) {
        if self.queue.len() >= WAITING_PROPOSALS_MAX {
            return proposal
                .responder
                .answer(Err(RequestError::unavailable("too many writes wait for a leader")));
        }
        self.queue.push_back(proposal);
    }

    /// True if some are not proposed yet.
    pub(super) fn are_waiting(&self) -> bool {
        !self.queue.is_empty()
    }

    /// How many were not answered yet.
    pub(super) fn count(&self) -> usize {
        self.queue.len() + self.pending.len()
    }

    /// Queues what never left for the leader once more: nothing was proposed, so waiting is safe.
    pub(super) fn take_back(&mut self, requests: Vec<(Bytes, Bytes)>) {
        for (id, data) in requests.into_iter().rev() {
            // Whoever is not pending any more was answered meanwhile.
            let id = RequestId::from_bytes(&id);
            if let Some((_, responder)) = id.and_then(|id| self.pending.remove(&id)) {
                responder.mark_not_proposed();
                self.queue.push_front(Proposal { data, ack: Ack::Committed, responder });
            }
        }
    }

    /// The responder of an entry that was committed.
    pub(super) fn take(&mut self, id: RequestId) -> Option<Responder<Acknowledged>> {
        Some(self.pending.remove(&id)?.1)
    }

    /// Returns how many there were.
    pub(super) fn fail_all(&mut self, why: &str) -> u64 {
        let lost_ones = self.pending.drain();
        lost_ones
            .map(|(_, (_, responder))| responder.answer(Err(RequestError::unknown(why))))
            .count() as u64
    }

    /// Returns how many there were.
    pub(super) fn fail_other_than(&mut self, leadership: Leadership) -> u64 {
        let lost_ones = self.pending.extract_if(|_, (under, _)| *under != leadership);
        let why = "the leader changed";
        lost_ones
            .map(|(_, (_, responder))| responder.answer(Err(RequestError::unknown(why))))
            .count() as u64
    }

    pub(super) fn forget_closed(&mut self) {
        self.queue.retain(|proposal| !proposal.responder.is_closed());
        self.pending.retain(|_, (_, responder)| !responder.is_closed());
    }
}

/// The reads that were not answered yet.
#[derive(Default)]
pub(super) struct Reads {
    /// Each with the first round that may serve it.
    waiting: VecDeque<(u64, Responder<()>)>,
    /// The last round that was begun.
    round: u64,
    in_flight: Option<(Leadership, u64)>,
    /// Those that may be answered once the index is applied.
    confirmed: Vec<(Index, Vec<Responder<()>>)>,
}

impl Reads {
    pub(super) fn push(&mut self, responder: Responder<()>) {
        if self.waiting.len() >= WAITING_READS_MAX {
            return responder
                .answer(Err(RequestError::unavailable("too many reads wait for the leader")));
        }
        self.waiting.push_back((self.round + 1, responder));
    }

    pub(super) fn forget_closed(&mut self) {
        self.waiting.retain(|(_, responder)| !responder.is_closed());
        for (_, responders) in &mut self.confirmed {
            responders.retain(|responder| !responder.is_closed());
        }
        self.confirmed.retain(|(_, responders)| !responders.is_empty());
    }
}

/// Whom a leader asks whether it still leads. In each tick all are asked at first; when as many have
/// answered as make a majority with us, only these are, until the tick ends. If one of them is gone,
/// raft's next heartbeat carries the round to all.
#[derive(Default)]
pub(super) struct Confirmers(Vec<NodeId>);

impl Confirmers {
    /// Has all be asked again.
    pub(super) fn forget(&mut self) {
        self.0.clear();
    }

    /// Notes a message that raft is about to take.
    pub(super) fn note(&mut self, message: &Message, raft: &raft::Raft<Log>) {
        let confirms = message.get_msg_type() == MessageType::MsgHeartbeatResponse
            && raft.read_only.pending_read_index.contains_key(&message.context[..]);
        let is_voter = || raft.prs().conf().voters().contains(message.from);
        if confirms && !self.are_enough(raft) && !self.0.contains(&message.from) && is_voter() {
            self.0.push(message.from);
        }
    }

    /// True if a message that raft wants sent is a question to one who need not be asked.
    pub(super) fn spare(&self, message: &Message, raft: &raft::Raft<Log>) -> bool {
        message.get_msg_type() == MessageType::MsgHeartbeat
            && !message.context.is_empty()
            && !self.0.contains(&message.to)
            && self.are_enough(raft)
    }

    fn are_enough(&self, raft: &raft::Raft<Log>) -> bool {
        let voters = raft.prs().conf().voters();
        self.0.iter().filter(|id| voters.contains(**id)).count() >= voters.ids().len() / 2
    }
}

impl RaftNode {
    fn takes_proposals(&self) -> bool {
        let raft = &self.raw_node.raft;
        self.beginning.is_none()
            && self.leaving.is_none()
            && raft.leader_id != raft::INVALID_ID
            // raft would drop them while leadership is handed over.
            && raft.lead_transferee.is_none()
            && (self.is_leader() || !self.peers.is_out_of_reach(raft.leader_id))
            && self.outstanding_bytes.load(Ordering::Relaxed) <= OUTSTANDING_BYTES_MAX
    }

    /// Hands the waiting writes to raft, many in one message.
    pub(super) fn propose_waiting(&mut self) {
        while self.takes_proposals() {
            let batch = self.next_batch();
            if batch.is_empty() {
                return;
            }
            let ids: Vec<RequestId> = batch.iter().map(|_| self.next_request_id()).collect();
            let mut message = Message::default();
            message.set_msg_type(MessageType::MsgPropose);
            message.from = self.config.id;
            let entries = batch.iter().zip(&ids).map(|(proposal, id)| Entry {
                data: proposal.data.clone(),
                context: Bytes::copy_from_slice(&id.to_bytes()),
                ..Entry::default()
            });
            message.entries = entries.collect::<Vec<_>>().into();
            if self.raw_node.step(message).is_err() {
                // Too much is uncommitted, or the leader was lost: nothing was proposed.
                for proposal in batch.into_iter().rev() {
                    proposal.responder.mark_not_proposed();
                    self.proposals.queue.push_front(proposal);
                }
                return;
            }
            let leadership = self.leadership();
            for (Proposal { ack, responder, .. }, id) in batch.into_iter().zip(ids) {
                match ack {
                    Ack::Proposed => responder.answer(Ok(Acknowledged::Proposed)),
                    Ack::Committed => {
                        self.proposals.pending.insert(id, (leadership, responder));
                    }
                }
            }
        }
    }

    /// Takes writes that somebody still waits for off the queue: one, or up to one append's bytes.
    fn next_batch(&mut self) -> Vec<Proposal> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while let Some(proposal) = self.proposals.queue.front() {
            bytes += proposal.data.len() as u64;
            if bytes > APPEND_BYTES_MAX && !batch.is_empty() {
                break;
            }
            let proposal = self.proposals.queue.pop_front().expect("it was just looked at");
            if proposal.responder.mark_proposed() {
                batch.push(proposal);
            }
        }
        batch
    }

    /// Begins a ReadIndex round for all reads that wait, unless one is on its way.
    pub(super) fn start_read_round(&mut self) {
        let raft = &self.raw_node.raft;
        let leadership = self.leadership();
        // raft drops a round in these cases; the reads wait for better times.
        if self.beginning.is_some()
            || self.leaving.is_some()
            || self.reads.waiting.is_empty()
            || leadership.leader == raft::INVALID_ID
            || (self.is_leader() && !raft.commit_to_current_term())
        {
            return;
        }
        if let Some((under, since)) = self.reads.in_flight {
            let patience = READ_RETRY_HEARTBEATS * self.config.heartbeat_ticks as u64;
            if under == leadership && self.ticks - since < patience {
                return;
            }
        }
        self.reads.round += 1;
        self.reads.in_flight = Some((leadership, self.ticks));
        let context =
            RequestId { member: self.config.id, boot: self.config.boot, counter: self.reads.round };
        self.raw_node.read_index(context.to_bytes().to_vec());
    }

    /// True while a ReadIndex round is on its way: whoever comes now waits for the next.
    pub(super) fn is_reading(&self) -> bool {
        let is_current = |(under, _)| under == self.leadership();
        !self.reads.waiting.is_empty() && self.reads.in_flight.is_some_and(is_current)
    }

    /// Notes the index that each answered round has to wait for.
    pub(super) fn take_read_states(&mut self, read_states: Vec<ReadState>) {
        for ReadState { index, request_ctx } in read_states {
            let Some(id) = RequestId::from_bytes(&request_ctx) else { continue };
            let reads = &mut self.reads;
            if id.member != self.config.id
                || id.boot != self.config.boot
                || id.counter > reads.round
            {
                continue;
            }
            if id.counter == reads.round {
                reads.in_flight = None;
            }
            let served = reads.waiting.partition_point(|(round, _)| *round <= id.counter);
            let responders: Vec<_> =
                reads.waiting.drain(..served).map(|(_, responder)| responder).collect();
            if !responders.is_empty() {
                reads.confirmed.push((index, responders));
            }
        }
    }

    /// Lets the reads through whose index is applied: on commitC, behind those entries.
    pub(super) fn publish_reads(&mut self) {
        let applied = self.applied_index;
        for (_, responders) in self.reads.confirmed.extract_if(.., |(index, _)| *index <= applied) {
            let _ = self.commit_tx.send(Commit::Reads(responders));
        }
    }
}
