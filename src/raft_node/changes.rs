//! Membership changes in flight: the leader proposes them, one at a time, and answers when they are
//! applied.
//!
//! raft-rs silently turns a change that it refuses into an empty entry. So the leader checks everything
//! that raft could refuse before it proposes, and reads the appended entry back. When the entry is
//! applied (`apply.rs`), every member checks again, on replicated state alone: a change that fails then
//! is a no-op on all of them.
//!
//! # Two changes at once
//! A request that arrives while another change or a transfer of leadership is pending is answered 409, or
//! 204 if it changes nothing.
//! These wait instead, until their deadline, and so do all requests queued after them:
//! * any request, while there is no leader, or the leader has not applied an entry of its own term;
//! * any request, while the leader promotes a learner;
//! * a transfer of leadership, while a change is pending or its target lacks one;
//! * a request that depends on who is alive, while the leader is new and has not heard the others yet: a
//!   removal or a move that needs a live majority, and an addition beside too many silent learners.
//!
//! # The leader's own removal
//! raft 0.7.0 panics when a leader that is not a member appends. So a leader first transfers leadership,
//! and the new leader removes it.

use std::collections::VecDeque;

use raft::eraftpb::{Entry, EntryType};
use raft::{ProgressState, RawNode, StateRole};
use slog::{Logger, info, warn};

use super::applied::Applied;
use super::clock::{Clock, Leadership};
use super::peers::Peers;
use super::{MemberRequest, NodeConfig, NodeId, Outbox, Responder};
use crate::channels::{self, ConfChangeRequest, Pending, RequestId};
use crate::error::RequestError;
use crate::membership::{MemberChange, Members, SILENT_LEARNERS_MAX, Verdict};
use crate::storage::log::Log;

/// A learner that lacks at most this many entries has caught up.
const PROMOTION_DISTANCE: u64 = 100;
/// Changes that wait for a leader; the next one is answered 503.
const WAITING_CHANGES_MAX: usize = 64;

/// What deciding about a change takes of the node.
pub(super) struct Context<'a> {
    pub config: &'a NodeConfig,
    pub logger: &'a Logger,
    pub applied: &'a Applied,
    pub peers: &'a Peers,
    pub clock: &'a Clock,
    /// True if this member takes part in raft, and was not removed.
    pub is_running: bool,
    pub raw_node: &'a mut RawNode<Log>,
    pub last_id: &'a mut RequestId,
    pub outbox: &'a mut dyn Outbox,
}

impl Context<'_> {
    fn is_leader(&self) -> bool {
        self.raw_node.raft.state == StateRole::Leader
    }

    /// True if member `id` was heard within an election timeout.
    fn lives(&self, id: NodeId) -> bool {
        let since = self.clock.ago(self.config.election_ticks);
        id == self.config.id || self.peers.was_heard_since(id, since)
    }

    /// Checks what only this member knows: that enough members live to carry a removal or a move out,
    /// or to undo it, and that the learners so far were started.
    fn check_local(&self, request: &MemberRequest) -> Result<(), RequestError> {
        let members = self.applied.members();
        match request {
            MemberRequest::Add { .. } => {
                let is_silent = |id: &&NodeId| !self.peers.was_heard_since(**id, 0);
                if members.learners.iter().filter(is_silent).count() < SILENT_LEARNERS_MAX {
                    return Ok(());
                }
                Err(RequestError::Conflict(format!(
                    "{SILENT_LEARNERS_MAX} learners were never heard from: start them, or remove them, before you add another"
                )))
            }
            MemberRequest::Remove { id } => members.check_majority_lives(*id, |id| self.lives(id)),
            MemberRequest::Move { id, .. } => members.check_move(*id, |id| self.lives(id)),
            MemberRequest::Lead { .. } => Ok(()),
        }
    }
}

/// The changes that are not answered yet.
#[derive(Default)]
pub(super) struct Changes {
    queue: VecDeque<ConfChangeRequest>,
    /// Proposed here, and not applied. A promotion has no responder.
    pending: Option<(RequestId, Leadership, Option<Responder<()>>)>,
    /// A request that waits until another member leads (this member's own removal, or a transfer),
    /// and the tick of its deadline.
    transfer: Option<(ConfChangeRequest, u64)>,
    /// The tick of the last attempt to promote.
    promotion_tried: u64,
    /// This member's own removal, forwarded. The leader's answer may come too late, because applying
    /// the removal ends this member.
    own_removal: Option<(Responder<()>, Pending<()>)>,
}

impl Changes {
    pub fn push(&mut self, request: ConfChangeRequest) {
        if self.queue.len() >= WAITING_CHANGES_MAX {
            let error = RequestError::unavailable("too many changes wait for a leader");
            return request.responder.answer(Err(error));
        }
        self.queue.push_back(request);
    }

    /// Answers, forwards or proposes the waiting requests, as far as raft's state allows.
    pub fn propose(&mut self, node: &mut Context<'_>) {
        self.finish_transfer(node);
        while let Some(request) = self.queue.pop_front() {
            if request.responder.is_closed() {
                continue;
            }
            if let Some(request) = self.start(request, node) {
                return self.queue.push_front(request);
            }
        }
        self.promote_learner(node);
    }

    fn is_pending(&self, node: &Context<'_>) -> bool {
        self.pending.is_some() || self.transfer.is_some() || node.raw_node.raft.has_pending_conf()
    }

    /// Starts one request; returns it if it has to wait.
    fn start(
        &mut self,
        request: ConfChangeRequest,
        node: &mut Context<'_>,
    ) -> Option<ConfChangeRequest> {
        // A request that is invalid in every state is refused without a leader.
        if let Err(error @ RequestError::Invalid(_)) = Members::default().decide(&request.change) {
            request.responder.answer(Err(error));
            return None;
        }
        let leader = node.raw_node.raft.leader_id;
        if !node.is_running || leader == raft::INVALID_ID {
            return Some(request);
        }
        if !node.is_leader() {
            self.forward(leader, request, node);
            return None;
        }
        // A new leader's log may hold changes that it has not applied, and raft drops a change until an
        // entry of its own term is applied. A promotion is the leader's own doing: requests wait for it.
        let is_promoting = self.pending.as_ref().is_some_and(|(_, _, it)| it.is_none());
        if !node.raw_node.raft.apply_to_current_term() || is_promoting {
            return Some(request);
        }
        // A transfer waits for the pending change; otherwise a stopping leader would be refused and the
        // others would sit out an election timeout.
        let is_transfer = matches!(request.change, MemberRequest::Lead { .. });
        if is_transfer && self.is_pending(node) {
            return Some(request);
        }
        // Members send to their leader alone. A new leader has to wait for an election timeout before
        // silence means that a member is dead.
        let is_new = node.clock.leads_for() < node.config.election_ticks as u64;
        if is_new && node.check_local(&request.change).is_err() {
            return Some(request);
        }
        let own = node.config.id;
        match self.check(&request.change, node) {
            Err(error) => request.responder.answer(Err(error)),
            Ok(Verdict::Nothing) => request.responder.answer(Ok(())),
            Ok(Verdict::Transfer(Some(id))) if id == own => request.responder.answer(Ok(())),
            Ok(Verdict::Transfer(to)) => return self.start_transfer(request, to, node),
            Ok(Verdict::Change(MemberChange::Remove { id })) if id == own => {
                return self.start_transfer(request, None, node);
            }
            Ok(Verdict::Change(change)) => {
                if request.responder.mark_proposed() {
                    if let MemberChange::Move { id, url } = &change
                        && node.lives(*id)
                    {
                        warn!(
                            node.logger,
                            "member {id} moves to {url}, but was heard at its old URL less than an election timeout ago: if it still runs, stop it, and start it again with --peer-url {url}"
                        );
                    }
                    match append(&change, node) {
                        Ok((id, under)) => {
                            self.pending = Some((id, under, Some(request.responder)))
                        }
                        Err(error) => request.responder.answer(Err(error)),
                    }
                }
            }
        }
        None
    }

    fn check(&self, request: &MemberRequest, node: &Context<'_>) -> Result<Verdict, RequestError> {
        let verdict = node.applied.members().decide(request)?;
        if verdict == Verdict::Nothing {
            return Ok(verdict);
        }
        if self.is_pending(node) {
            return Err(RequestError::Conflict(
                "another change of members is pending: wait for it, then try again".into(),
            ));
        }
        node.check_local(request)?;
        Ok(verdict)
    }

    /// Promotes a learner that has caught up. Leaders do so without a request, after those that wait.
    /// A member that is slow, or was never started, therefore never counts towards the majority.
    fn promote_learner(&mut self, node: &mut Context<'_>) {
        let raft = &node.raw_node.raft;
        let learners = &node.applied.members().learners;
        if !node.is_running
            || !node.is_leader()
            || raft.lead_transferee.is_some()
            || !raft.apply_to_current_term()
            || self.is_pending(node)
            || self.promotion_tried == node.clock.now()
        {
            return;
        }
        let last_index = raft.raft_log.last_index();
        let has_caught_up = |id: &&NodeId| {
            // `matched` counts only what was acknowledged to this leader: hearing the learner does not
            // prove that it hears us.
            node.lives(**id)
                && raft.prs().get(**id).is_some_and(|peer| {
                    peer.state == ProgressState::Replicate
                        && peer.matched > 0
                        && peer.matched + PROMOTION_DISTANCE >= last_index
                })
        };
        if let Some(&id) = learners.iter().find(has_caught_up) {
            // If raft refuses, the next tick tries again.
            self.promotion_tried = node.clock.now();
            let incarnation = node.peers.incarnation_of(id);
            if let Ok((request, under)) = append(&MemberChange::Promote { id, incarnation }, node) {
                info!(node.logger, "promoting learner {}", id);
                self.pending = Some((request, under, None));
            }
        }
    }

    /// Forwards a client's request to the leader. If a member forwarded it here, the leader has changed
    /// since, and the client has to ask again.
    fn forward(&mut self, leader: NodeId, request: ConfChangeRequest, node: &mut Context<'_>) {
        let ConfChangeRequest { change, forwarded, responder } = request;
        if forwarded {
            let error = RequestError::unavailable("this member does not lead any more");
            return responder.answer(Err(error));
        }
        if !responder.mark_proposed() {
            return;
        }
        if change != (MemberRequest::Remove { id: node.config.id }) {
            return node.outbox.forward_change(leader, change, responder);
        }
        if self.own_removal.is_some() {
            return responder.answer(Err(RequestError::Conflict(
                "this member is being removed already: wait for it".into(),
            )));
        }
        let (forwarded, pending) = channels::responder();
        self.own_removal = Some((responder, pending));
        node.outbox.forward_change(leader, change, forwarded);
    }

    /// Passes the leader's answer to this member's own removal on to the client.
    pub fn relay_own_removal(&mut self) {
        if let Some((responder, mut pending)) = self.own_removal.take() {
            match pending.try_take() {
                Some(answer) => responder.answer(answer),
                None => self.own_removal = Some((responder, pending)),
            }
        }
    }

    /// Confirms this member's own removal to the client that asked for it here, before this member ends.
    pub fn answer_own_removal(&mut self) {
        if let Some((responder, _)) = self.own_removal.take() {
            responder.answer(Ok(()));
        }
    }

    /// Transfers leadership to `wanted`, or to the live voter with the longest log. Returns the request
    /// if it has to wait.
    fn start_transfer(
        &mut self,
        request: ConfChangeRequest,
        wanted: Option<NodeId>,
        node: &mut Context<'_>,
    ) -> Option<ConfChangeRequest> {
        let progress = node.raw_node.raft.prs();
        let candidates = node.applied.members().voters().filter(|id| {
            *id != node.config.id && wanted.is_none_or(|it| it == *id) && node.lives(*id)
        });
        let to = candidates.max_by_key(|id| progress.get(*id).map_or(0, |peer| peer.matched));
        let Some(to) = to else {
            let why = match wanted {
                None => "no other voter lives to take over".into(),
                Some(id) => format!("member {id} cannot take over: it has no vote, or is dead"),
            };
            request.responder.answer(Err(RequestError::Conflict(why)));
            return None;
        };
        // A member does not campaign while it has a committed change to apply, and says nothing. It
        // applied what we know to be committed there before it told us.
        let pending = node.raw_node.raft.pending_conf_index;
        if progress.get(to).is_some_and(|peer| peer.committed_index < pending) {
            return Some(request);
        }
        if !request.responder.mark_proposed() {
            return None;
        }
        info!(node.logger, "transferring leadership to {}", to);
        node.raw_node.transfer_leader(to);
        let until = node.clock.now() + node.config.election_ticks as u64;
        self.transfer = Some((request, until));
        None
    }

    fn finish_transfer(&mut self, node: &mut Context<'_>) {
        let Some((request, until)) = self.transfer.take() else { return };
        if request.responder.is_closed() {
            return;
        }
        let raft = &node.raw_node.raft;
        let leader = raft.leader_id;
        let is_over = leader != raft::INVALID_ID && !node.is_leader();
        let has_failed =
            node.is_leader() && raft.lead_transferee.is_none() || node.clock.now() > until;
        let why = "leadership could not be handed over in time";
        let answer = match request.change {
            MemberRequest::Lead { to } if is_over && to.is_none_or(|to| to == leader) => Ok(()),
            MemberRequest::Lead { .. } if is_over => Err(RequestError::Conflict(format!(
                "member {leader} was elected instead: ask again"
            ))),
            // Forwarded although a member may have forwarded it here: it did find the leader.
            _ if is_over => {
                let request = ConfChangeRequest { forwarded: false, ..request };
                return self.forward(leader, request, node);
            }
            // The transfer may still happen.
            MemberRequest::Lead { .. } if has_failed => Err(RequestError::unknown(why)),
            _ if has_failed => Err(RequestError::unavailable(why)),
            _ => return self.transfer = Some((request, until)),
        };
        request.responder.answer(answer);
    }

    /// Answers the request that `entry` carries out, if it was proposed here.
    pub fn answer(&mut self, entry: &Entry, answer: Result<(), RequestError>) {
        let id = RequestId::from_bytes(&entry.context);
        if let Some((_, _, Some(responder))) =
            self.pending.take_if(|(pending, _, _)| Some(*pending) == id)
        {
            responder.answer(answer);
        }
    }

    /// Answers the pending change with 504 if it was proposed under a leader that `is_lost`.
    pub fn fail(&mut self, why: &str, is_lost: impl Fn(Leadership) -> bool) {
        if let Some((_, _, Some(responder))) = self.pending.take_if(|(_, under, _)| is_lost(*under))
        {
            responder.answer(Err(RequestError::unknown(why)));
        }
    }
}

/// Has raft append a change; returns under which id and leader it is pending.
fn append(
    change: &MemberChange,
    node: &mut Context<'_>,
) -> Result<(RequestId, Leadership), RequestError> {
    let id = node.last_id.advance();
    let context = id.to_bytes().to_vec();
    node.raw_node
        .propose_conf_change(context.clone(), change.to_conf_change())
        .map_err(|error| RequestError::unavailable(format!("raft did not take it ({error})")))?;
    let appended = node.raw_node.raft.raft_log.unstable_entries().last();
    let is_appended = appended.is_some_and(|entry| {
        entry.get_entry_type() == EntryType::EntryConfChange && entry.context == context
    });
    if !is_appended {
        let why = "raft put the change aside because another is pending: try again";
        return Err(RequestError::Conflict(why.into()));
    }
    Ok((id, Leadership::of(node.raw_node)))
}

/// The changes in the log above the applied index.
pub(super) fn pending_changes(log: &Log, applied: &Applied) -> Vec<MemberChange> {
    let entries = log.conf_changes_after(applied.index()).into_iter();
    let single = entries.filter(|it| it.get_entry_type() == EntryType::EntryConfChange);
    single.filter_map(|entry| Some(MemberChange::decode(&entry.data).ok()?.1)).collect()
}
