//! Writes in flight: each is answered once, before its deadline, whatever happens.
//!
//! A write waits in the queue while there is no leader: nothing was proposed, so waiting is safe. The
//! same holds for one that could not be sent to a leader that just died. Once proposed, it is pending
//! under the leader and term it was proposed to, and ends in one of these ways:
//!
//! * its entry is committed and applied on this member: 204. The state machine's task,
//!   [`CommitReader`](super::state_machine::CommitReader), answers after `apply` returns. An entry that
//!   the state machine cannot decode changes nothing on any member, and is answered 400;
//! * the leader or the term changes, or a snapshot replaces the log: 504 at once;
//! * the connection that carried it to the leader breaks off before the leader has taken it: 504 at once;
//! * the client's deadline passes: 504, from the client's side of the responder;
//! * this member stops: 504.
//!
//! With `--ack proposed`, as in the original, 204 comes when raft has taken the write.
//!
//! An index where another entry is committed instead needs no rule: that entry has another term.
//! A pending write is never proposed a second time, because the first one may still be committed.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use raft::RawNode;
use raft::eraftpb::{Entry, Message, MessageType};

use super::Responder;
use super::clock::Leadership;
use super::config::APPEND_BYTES_MAX;
use crate::channels::{Ack, Acknowledged, Proposal, RequestId};
use crate::error::RequestError;
use crate::storage::log::Log;

/// Writes that wait for a leader; the next one is answered 503.
const WAITING_WRITES_MAX: usize = 4096;

/// The writes that are not answered yet.
#[derive(Default)]
pub(super) struct Writes {
    /// Not proposed.
    queue: VecDeque<Proposal>,
    /// Proposed, and not applied.
    pending: HashMap<RequestId, (Leadership, Responder<Acknowledged>)>,
}

impl Writes {
    pub fn push(&mut self, proposal: Proposal) {
        if self.queue.len() >= WAITING_WRITES_MAX {
            let error = RequestError::unavailable("too many writes wait for a leader");
            return proposal.responder.answer(Err(error));
        }
        self.queue.push_back(proposal);
    }

    pub fn count(&self) -> usize {
        self.queue.len() + self.pending.len()
    }

    /// Proposes the waiting writes to raft, many in one message.
    pub fn propose(&mut self, raw_node: &mut RawNode<Log>, last_id: &mut RequestId) {
        loop {
            let batch = self.next_batch();
            if batch.is_empty() {
                return;
            }
            let batch_ids: Vec<RequestId> = batch.iter().map(|_| last_id.advance()).collect();
            let mut message = Message::default();
            message.set_msg_type(MessageType::MsgPropose);
            message.from = last_id.member;
            let entries = batch.iter().zip(&batch_ids).map(|(proposal, id)| Entry {
                data: proposal.data.clone(),
                context: Bytes::copy_from_slice(&id.to_bytes()),
                ..Entry::default()
            });
            message.entries = entries.collect::<Vec<_>>().into();
            if raw_node.step(message).is_err() {
                // Too much is uncommitted, or the leader is gone: nothing was proposed.
                for proposal in batch.into_iter().rev() {
                    proposal.responder.mark_not_proposed();
                    self.queue.push_front(proposal);
                }
                return;
            }
            let leadership = Leadership::of(raw_node);
            for (Proposal { ack, responder, .. }, id) in batch.into_iter().zip(batch_ids) {
                match ack {
                    Ack::Proposed => responder.answer(Ok(Acknowledged::Proposed)),
                    Ack::Committed => {
                        self.pending.insert(id, (leadership, responder));
                    }
                }
            }
        }
    }

    /// Takes writes off the queue that still have a client: one, or up to one append's bytes.
    fn next_batch(&mut self) -> Vec<Proposal> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while let Some(proposal) = self.queue.pop_front() {
            bytes += proposal.data.len() as u64;
            if bytes > APPEND_BYTES_MAX && !batch.is_empty() {
                self.queue.push_front(proposal);
                break;
            }
            if proposal.responder.mark_proposed() {
                batch.push(proposal);
            }
        }
        batch
    }

    /// Queues writes again that were never sent to the leader: nothing was proposed.
    pub fn take_back(&mut self, requests: Vec<(Bytes, Bytes)>) {
        for (id, data) in requests.into_iter().rev() {
            // One that is not pending any more was answered meanwhile.
            let id = RequestId::from_bytes(&id);
            if let Some((_, responder)) = id.and_then(|id| self.pending.remove(&id)) {
                responder.mark_not_proposed();
                self.queue.push_front(Proposal { data, ack: Ack::Committed, responder });
            }
        }
    }

    /// Answers with 504 the pending writes that may have been lost on their way to the leader; returns how
    /// many there were.
    pub fn fail_lost(&mut self, ids: &[Bytes], why: &str) -> u64 {
        let lost = ids.iter().filter_map(|id| RequestId::from_bytes(id));
        let pending: Vec<_> = lost.filter_map(|id| self.take(id)).collect();
        let failed = pending.len() as u64;
        for responder in pending {
            responder.answer(Err(RequestError::unknown(why)));
        }
        failed
    }

    /// True if the request is a write that may still be committed under this leadership.
    pub fn may_commit(&self, id: RequestId, under: Leadership) -> bool {
        self.pending.get(&id).is_some_and(|pending| pending.0 == under)
    }

    /// Takes the responder of an entry that was committed.
    pub fn take(&mut self, id: RequestId) -> Option<Responder<Acknowledged>> {
        Some(self.pending.remove(&id)?.1)
    }

    /// Answers the pending writes with 504 that were proposed under a leader that `is_lost`; returns how
    /// many there were.
    pub fn fail(&mut self, why: &str, is_lost: impl Fn(Leadership) -> bool) -> u64 {
        let failed = self.pending.extract_if(|_, (under, _)| is_lost(*under));
        failed.map(|(_, (_, responder))| responder.answer(Err(RequestError::unknown(why)))).count()
            as u64
    }

    pub fn forget_closed(&mut self) {
        self.queue.retain(|proposal| !proposal.responder.is_closed());
        self.pending.retain(|_, (_, responder)| !responder.is_closed());
    }
}
