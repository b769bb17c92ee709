//! Changes of members: only the leader proposes them, one at a time, and answers when it is applied.
//!
//! raft-rs turns a change that it does not like into an empty entry and says nothing, so everything
//! that it could dislike is checked before, and the appended entry is read back. When it is applied,
//! every member decides once more, on replicated state alone: what fails then is a no-op everywhere.

use std::collections::{BTreeSet, VecDeque};

use raft::ProgressState;
use raft::eraftpb::{Entry, EntryType};
use slog::{info, warn};

use super::{
    ConfChangeRequest, Leadership, Leaving, MemberRequest, NodeId, RaftNode, RequestError,
    RequestId, Responder,
};
use crate::channels::{self, Pending};
use crate::error::Error;
use crate::membership::{MemberChange, Members, Verdict, majority};

/// A learner that is so few entries behind follows.
const PROMOTION_DISTANCE: u64 = 100;
/// Changes that wait for a leader; the next is answered 503.
const WAITING_CHANGES_MAX: usize = 64;

/// The changes that were not answered yet.
#[derive(Default)]
pub(super) struct Changes {
    queue: VecDeque<ConfChangeRequest>,
    /// Proposed by us, and not applied. Nobody waits for what the leader does by itself.
    pending: Option<(RequestId, Leadership, Option<Responder<()>>)>,
    /// What waits until another leads: our own removal, or that somebody wanted just this; and the
    /// tick until which it waits.
    handover: Option<(ConfChangeRequest, u64)>,
    /// The tick at which a promotion was tried last.
    promotion_tried: u64,
    /// Our own removal, passed on. Its answer may come too late: applying it ends this member.
    own_removal: Option<(Responder<()>, Pending<()>)>,
}

impl Changes {
    pub(super) fn push(&mut self, request: ConfChangeRequest) {
        if self.queue.len() >= WAITING_CHANGES_MAX {
            return request
                .responder
                .answer(Err(RequestError::unavailable("too many changes wait for a leader")));
        }
        self.queue.push_back(request);
    }

    /// True if some are not proposed yet.
    pub(super) fn are_waiting(&self) -> bool {
        !self.queue.is_empty() || self.handover.is_some()
    }

    /// A change was applied, or does nothing.
    pub(super) fn applied(&mut self, id: RequestId, answer: Result<(), RequestError>) {
        if let Some((_, _, responder)) = self.pending.take_if(|(pending, _, _)| *pending == id)
            && let Some(responder) = responder
        {
            responder.answer(answer);
        }
    }

    pub(super) fn fail_all(&mut self, why: &str) {
        if let Some((_, _, Some(responder))) = self.pending.take() {
            responder.answer(Err(RequestError::unknown(why)));
        }
    }

    pub(super) fn fail_other_than(&mut self, leadership: Leadership) {
        let lost_one = self.pending.take_if(|(_, under, _)| *under != leadership);
        if let Some((_, _, Some(responder))) = lost_one {
            responder.answer(Err(RequestError::unknown("the leader changed")));
        }
    }

    /// True while a learner's promotion is on its way: what a user wants waits for its end.
    fn are_promoting(&self) -> bool {
        self.pending.as_ref().is_some_and(|(_, _, responder)| responder.is_none())
    }
}

impl RaftNode {
    /// Deals with the changes that wait, as far as the state of raft allows.
    pub(super) fn propose_changes(&mut self) {
        self.finish_handover();
        while let Some(request) = self.changes.queue.pop_front() {
            if request.responder.is_closed() {
                continue;
            }
            if let Some(request) = self.deal_with_change(request) {
                return self.changes.queue.push_front(request);
            }
        }
        self.promote_learner();
    }

    /// Has a learner that follows become a voter. A leader does so by itself, and the next one where it
    /// did not come to it; what a user wants goes before. So a member that is slow, or was not started
    /// yet, never counts towards the majority that everything waits for.
    fn promote_learner(&mut self) {
        let raft = &self.raw_node.raft;
        if self.members.learners.is_empty()
            || !self.is_leader()
            || self.leaving.is_some()
            || raft.lead_transferee.is_some()
            || !raft.apply_to_current_term()
            || self.is_pending()
            || self.changes.promotion_tried == self.ticks
        {
            return;
        }
        let last_index = raft.raft_log.last_index();
        let follows = |id: &&NodeId| {
            let progress = raft.prs().get(**id);
            // It has acknowledged something to us: that we hear it does not say that it hears us.
            self.lives(**id)
                && progress.is_some_and(|peer| {
                    peer.state == ProgressState::Replicate
                        && peer.matched > 0
                        && peer.matched + PROMOTION_DISTANCE >= last_index
                })
        };
        if let Some(&id) = self.members.learners.iter().find(follows) {
            // What raft does not take now is tried again at the next tick.
            self.changes.promotion_tried = self.ticks;
            if self.append_change(&MemberChange::Promote { id }, None).is_ok() {
                info!(self.logger, "promoting learner {}", id);
            }
        }
    }

    fn is_pending(&self) -> bool {
        self.changes.pending.is_some()
            || self.changes.handover.is_some()
            || self.raw_node.raft.has_pending_conf()
    }

    /// Answers, passes on or proposes a change; gives it back if it has to wait for a leader.
    fn deal_with_change(&mut self, request: ConfChangeRequest) -> Option<ConfChangeRequest> {
        // What no state allows needs no leader to say so.
        if let Err(error @ RequestError::Invalid(_)) = Members::default().decide(&request.change) {
            request.responder.answer(Err(error));
            return None;
        }
        let leader = self.raw_node.raft.leader_id;
        if self.beginning.is_some() || self.leaving.is_some() || leader == raft::INVALID_ID {
            return Some(request);
        }
        if !self.is_leader() {
            self.forward(leader, request);
            return None;
        }
        // A fresh leader's log may hold changes that it has not applied, and raft drops a change
        // until it has applied an entry of its own term.
        if !self.raw_node.raft.apply_to_current_term() || self.changes.are_promoting() {
            return Some(request);
        }
        // Who wants another leader wants it after what is under way: a member that stops must not leave
        // the others to an election timeout for that.
        if matches!(request.change, MemberRequest::Lead { .. }) && self.is_pending() {
            return Some(request);
        }
        // Members speak to their leader alone: until we have led for an election timeout, that one
        // was not heard says nothing.
        let leads_newly = self.ticks - self.leads_since < self.config.election_ticks as u64;
        if leads_newly && self.check_majority_lives(&request.change).is_err() {
            return Some(request);
        }
        match self.check_change(&request.change) {
            Err(error) => request.responder.answer(Err(error)),
            Ok(Verdict::Nothing) => request.responder.answer(Ok(())),
            Ok(Verdict::Transfer(Some(id))) if id == self.config.id => {
                request.responder.answer(Ok(()));
            }
            Ok(Verdict::Transfer(to)) => return self.hand_over(request, to),
            Ok(Verdict::Change(MemberChange::Remove { id })) if id == self.config.id => {
                return self.hand_over(request, None);
            }
            Ok(Verdict::Change(change)) => self.propose_change(&change, request.responder),
        }
        None
    }

    fn check_change(&self, change: &MemberRequest) -> Result<Verdict, RequestError> {
        let verdict = self.members.decide(change)?;
        if verdict == Verdict::Nothing {
            return Ok(verdict);
        }
        if self.is_pending() {
            return Err(RequestError::Conflict(
                "another change of members is pending: wait for it, then try again".into(),
            ));
        }
        self.check_majority_lives(change)?;
        Ok(verdict)
    }

    fn check_majority_lives(&self, change: &MemberRequest) -> Result<(), RequestError> {
        match change {
            MemberRequest::Remove { id } => {
                self.members.check_majority_lives(*id, |id| self.lives(id))
            }
            MemberRequest::Move { id, .. } => self.members.check_move(*id, |id| self.lives(id)),
            _ => Ok(()),
        }
    }

    fn lives(&self, id: NodeId) -> bool {
        let patience = self.config.election_ticks as u64;
        id == self.config.id || self.peers.was_heard_since(id, self.ticks.saturating_sub(patience))
    }

    fn propose_change(&mut self, change: &MemberChange, responder: Responder<()>) {
        if responder.mark_proposed()
            && let Err((error, Some(responder))) = self.append_change(change, Some(responder))
        {
            responder.answer(Err(error));
        }
    }

    /// The moves in this member's log above the applied index.
    pub(super) fn pending_moves(&self) -> Vec<(NodeId, String)> {
        let changes = self.raw_node.store().conf_changes_after(self.applied_index);
        let moves = changes.iter().filter_map(|entry| match MemberChange::decode(&entry.data) {
            Ok((_, MemberChange::Move { id, url })) => Some((id, url)),
            _ => None,
        });
        moves.collect()
    }

    /// Has raft append a change; gives the responder back with the reason if it did not.
    fn append_change(
        &mut self,
        change: &MemberChange,
        responder: Option<Responder<()>>,
    ) -> Result<(), (RequestError, Option<Responder<()>>)> {
        let id = self.next_request_id();
        let context = id.to_bytes().to_vec();
        let proposed = self.raw_node.propose_conf_change(context.clone(), change.to_conf_change());
        let appended = self.raw_node.raft.raft_log.unstable_entries().last();
        let is_appended = appended.is_some_and(|entry| {
            entry.get_entry_type() == EntryType::EntryConfChange && entry.context == context
        });
        if let Err(error) = proposed {
            return Err((
                RequestError::unavailable(format!("raft did not take it ({error})")),
                responder,
            ));
        }
        if !is_appended {
            let why = "raft put the change aside as another is pending: try again";
            return Err((RequestError::Conflict(why.into()), responder));
        }
        self.changes.pending = Some((id, self.leadership(), responder));
        Ok(())
    }

    /// Hands a client's change to the leader. It was passed on before if it comes from a member: then
    /// the leader changed under way, and the client has to ask again.
    fn forward(&mut self, leader: NodeId, request: ConfChangeRequest) {
        let ConfChangeRequest { change, forwarded, responder } = request;
        if forwarded {
            return responder
                .answer(Err(RequestError::unavailable("this member does not lead any more")));
        }
        if !responder.mark_proposed() {
            return;
        }
        if change != (MemberRequest::Remove { id: self.config.id }) {
            return self.outbox.forward_change(leader, change, responder);
        }
        if self.changes.own_removal.is_some() {
            return responder.answer(Err(RequestError::Conflict(
                "this member is being removed already: wait for it".into(),
            )));
        }
        let (relayed, pending) = channels::responder();
        self.changes.own_removal = Some((responder, pending));
        self.outbox.forward_change(leader, change, relayed);
    }

    /// Hands the leader's answer to our own removal on.
    pub(super) fn relay_own_removal(&mut self) {
        if let Some((responder, mut pending)) = self.changes.own_removal.take() {
            match pending.try_take() {
                Some(answer) => responder.answer(answer),
                None => self.changes.own_removal = Some((responder, pending)),
            }
        }
    }

    /// Our own removal is applied: whoever asked for it here is told before this member ends.
    pub(super) fn answer_own_removal(&mut self) {
        if let Some((responder, _)) = self.changes.own_removal.take() {
            responder.answer(Ok(()));
        }
    }

    /// Hands leadership over to `wanted`; if that is `None`, to the voter that lives and has most of the
    /// log. A leader does not propose its own removal, as it would lead on without being a member: it
    /// hands over first, and the new leader removes it. Gives the request back if it has to wait.
    fn hand_over(
        &mut self,
        request: ConfChangeRequest,
        wanted: Option<NodeId>,
    ) -> Option<ConfChangeRequest> {
        let conflict = |why: String| Err(RequestError::Conflict(why));
        let progress = self.raw_node.raft.prs();
        let others = self.conf_state.voters.iter().filter(|id| **id != self.config.id);
        let to = others
            .filter(|id| wanted.is_none_or(|wanted| wanted == **id) && self.lives(**id))
            .max_by_key(|id| progress.get(**id).map_or(0, |peer| peer.matched));
        let Some(&to) = to else {
            request.responder.answer(match wanted {
                None => conflict("no other voter lives to take over".into()),
                Some(id) => {
                    conflict(format!("member {id} cannot take over: it has no vote, or is dead"))
                }
            });
            return None;
        };
        // raft does not ask for votes while it has a change of members to apply, and says nothing. What
        // it has told us is committed there it had applied when we heard of it.
        let pending = self.raw_node.raft.pending_conf_index;
        if progress.get(to).is_some_and(|peer| peer.committed_index < pending) {
            return Some(request);
        }
        if !request.responder.mark_proposed() {
            return None;
        }
        info!(self.logger, "handing leadership over to {}", to);
        self.raw_node.transfer_leader(to);
        let until = self.ticks + self.config.election_ticks as u64;
        self.changes.handover = Some((request, until));
        None
    }

    fn finish_handover(&mut self) {
        let Some((request, until)) = self.changes.handover.take() else { return };
        let leader = self.raw_node.raft.leader_id;
        if request.responder.is_closed() {
            return;
        }
        if leader != raft::INVALID_ID && !self.is_leader() {
            match request.change {
                MemberRequest::Lead { to } if to.is_none_or(|to| to == leader) => {
                    request.responder.answer(Ok(()));
                }
                MemberRequest::Lead { .. } => {
                    let why = format!("member {leader} was elected instead: ask again");
                    request.responder.answer(Err(RequestError::Conflict(why)));
                }
                // Passed on once more than other requests: it found the leader the first time.
                _ => self.forward(leader, ConfChangeRequest { forwarded: false, ..request }),
            }
        } else if self.is_leader() && self.raw_node.raft.lead_transferee.is_none()
            || self.ticks > until
        {
            let why = "leadership could not be handed over in time";
            request.responder.answer(Err(match request.change {
                // It may still be.
                MemberRequest::Lead { .. } => RequestError::unknown(why),
                _ => RequestError::unavailable(why),
            }));
        } else {
            self.changes.handover = Some((request, until));
        }
    }

    /// Applies one committed change of members, deciding again what the leader decided when it
    /// proposed: the same everywhere, as the state decided on is.
    pub(super) fn apply_conf_change(&mut self, entry: &Entry) {
        let answer = self.try_apply_conf_change(entry);
        if let Err(why) = &answer {
            warn!(self.logger, "a committed change of members does nothing: {}", why;
                "index" => entry.index);
        }
        if let Some(id) = RequestId::from_bytes(&entry.context) {
            self.changes.applied(id, answer);
        }
    }

    fn try_apply_conf_change(&mut self, entry: &Entry) -> Result<(), RequestError> {
        let invalid = |why: String| RequestError::Invalid(format!("no change of members: {why}"));
        let (conf_change, change) = MemberChange::decode(&entry.data).map_err(invalid)?;
        if !self.members.check(&change)? {
            return Ok(());
        }
        if let MemberChange::Move { id, url } = &change {
            // That is nothing to raft.
            info!(self.logger, "member {} moved to {}", id, url);
            self.members.apply(&change, entry.index);
            self.connect_members();
            return Ok(());
        }
        let is_own_removal = change == MemberChange::Remove { id: self.config.id };
        if is_own_removal && self.is_leader() {
            // raft 0.7.0 panics when a leader that is no member appends or commits, and lets one
            // that leaves a single voter read without asking it. So raft goes on with the members
            // as they were; any majority of these holds one of those that remain.
            self.conf_state.voters.retain(|id| *id != self.config.id);
        } else {
            self.conf_state = self
                .raw_node
                .apply_conf_change(&conf_change)
                .map_err(|error| RequestError::Conflict(error.to_string()))?;
        }
        self.members.apply(&change, entry.index);
        let list = |ids: &[NodeId]| {
            let ids: BTreeSet<NodeId> = ids.iter().copied().collect();
            ids.iter().map(u64::to_string).collect::<Vec<_>>().join(" ")
        };
        let learners = match &self.conf_state.learners[..] {
            [] => String::new(),
            learners => format!(" learners=({})", list(learners)),
        };
        let voters = list(&self.conf_state.voters);
        info!(
            self.logger,
            "{} switched to configuration voters=({}){}", self.config.id, voters, learners
        );
        match change {
            MemberChange::Remove { id } if id == self.config.id => {
                self.answer_own_removal();
                let until_tick = self.ticks + self.config.election_ticks as u64;
                self.leaving = Some(Leaving { removal: entry.index, until_tick });
            }
            _ => self.connect_members(),
        }
        Ok(())
    }

    /// Ends the process once we were removed and may go. Everything was sent and published before.
    pub(super) fn check_leaving(&mut self) -> crate::error::Result<()> {
        let Some(leaving) = &self.leaving else { return Ok(()) };
        if !self.may_leave(leaving) {
            return Ok(());
        }
        self.stop()?;
        Err(Error::Removed)
    }

    fn may_leave(&self, leaving: &Leaving) -> bool {
        let raft = &self.raw_node.raft;
        let others = self.members.voters().count();
        if self.is_leader() {
            let progress = raft.prs();
            let knows = |id: &NodeId| {
                progress.get(*id).is_some_and(|peer| peer.committed_index >= leaving.removal)
            };
            let knowing = self.members.voters().filter(knows).count();
            return knowing >= majority(others) || (others > 1 && self.ticks >= leaving.until_tick);
        }
        // Whoever leads and has committed an entry of its own term has committed all before it.
        let committed_term = raft.raft_log.term(raft.raft_log.committed);
        let is_told = raft.leader_id != raft::INVALID_ID && committed_term == Ok(raft.term);
        others > 1 || is_told
    }
}
