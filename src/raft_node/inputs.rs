//! What each input does before the next Ready.

use raft::SnapshotStatus;
use raft::eraftpb::{Message, MessageType};
use slog::{debug, error, info, warn};

use super::bootstrap::{Start, first_urls};
use super::changes::pending_changes;
use super::lifecycle::Lifecycle;
use super::validate::{Invalid, View, validate};
use super::{Index, NodeId, PeerReport, RaftNode, start_raft};
use crate::channels::{
    ConfChangeRequest, Greeting, GreetingAnswer, Matched, PeerHeader, Proposal, ReadRequest,
    Refusal,
};
use crate::error::{Error, REPLACE_MEMBER, RequestError, Result};
use crate::membership::MemberChange;
use crate::metrics::PeerLabel;
use crate::storage::log::Log;
use crate::transport::{Inbound, InboundBody};

/// What a node is fed.
pub enum Input {
    /// From proposeC.
    Propose(Proposal),
    /// From readC.
    Read(ReadRequest),
    /// From confChangeC.
    ConfChange(ConfChangeRequest),
    /// From a peer.
    Inbound(Inbound),
    /// From this member's own senders and snapshot makers.
    Report(PeerReport),
    /// Time.
    Tick,
    /// The frame that a [`Background`](super::journal::Background) wrote is on disk, or the write failed.
    Written,
    /// Time to send the commit notices that were held back.
    NoticesDue,
}

impl Input {
    /// The bytes that it may add to a frame.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Propose(proposal) => proposal.data.len(),
            Self::Inbound(inbound) => inbound.bytes(),
            _ => 0,
        }
    }
}

impl RaftNode {
    /// Takes one input in. Nothing is written or answered with success until
    /// [`handle_ready`](Self::handle_ready), except what a report or a tick makes durable, and what waited for
    /// the end of a frame under way.
    pub fn handle(&mut self, input: Input) -> Result<()> {
        match input {
            Input::Propose(proposal) => self.writes.push(proposal),
            Input::Read(ReadRequest { responder }) => {
                let now = self.clock.now();
                self.reads.push(responder, &self.raw_node.raft, self.last_id, now);
            }
            Input::ConfChange(request) => self.changes.push(request),
            Input::Inbound(inbound) => self.receive(inbound)?,
            Input::Report(report) => self.take_report(report)?,
            Input::Tick => self.tick()?,
            Input::Written => self.journal.collect()?,
            Input::NoticesDue => self.send_notices(),
        }
        Ok(())
    }

    fn tick(&mut self) -> Result<()> {
        self.journal.tick(self.config.election_ticks / 2)?;
        self.clock.tick();
        self.config.metrics.ticked();
        self.reads.forget_confirmers();
        if self.lifecycle.takes_part() {
            self.raw_node.tick();
            self.campaign_alone();
        }
        self.writes.forget_closed();
        self.reads.forget_closed();
        self.changes.relay_own_removal();
        let since = self.clock.ago(self.config.election_ticks);
        self.peers.forget_strangers(since, &mut *self.outbox);
        self.greet_others();
        self.refresh_status();
        // A commit index that no frame took along since the last tick is written alone. So a restart
        // of an idle member replays everything that it knew to be committed.
        self.journal.flush_soon()
    }

    /// Elects a member that is alone in its cluster: there is no other election to wait for. While it
    /// follows a leader it does nothing. It may be alone only according to an old copy of its
    /// directory, and must not stop the others then.
    fn campaign_alone(&mut self) {
        let raft = &self.raw_node.raft;
        let is_alone = self.applied.members().voters().eq([self.config.id])
            && raft.prs().is_singleton()
            && raft.promotable();
        // It wins at once, and raft asserts that a new leader's log is on disk.
        let is_persisted = raft.raft_log.persisted == raft.raft_log.last_index();
        if is_alone && is_persisted && raft.leader_id == raft::INVALID_ID {
            // raft refuses while it has a committed change of members to apply.
            let _ = self.raw_node.campaign();
        }
    }

    /// Greets the members that have not answered yet, twice in an election timeout.
    fn greet_others(&mut self) {
        if !self.clock.is_every(self.config.election_ticks / 2) {
            return;
        }
        let urls = match &self.lifecycle {
            Lifecycle::Bootstrapping(bootstrap) => bootstrap.urls(),
            Lifecycle::Quarantined(_) => {
                let others = self.peers.admission().other_members();
                others.into_iter().map(|(_, url)| url).collect()
            }
            Lifecycle::Running | Lifecycle::Leaving(_) => {
                let leader = self.raw_node.raft.leader_id;
                self.peers.urls_to_greet(&self.applied, leader, &self.clock, &self.config)
            }
        };
        self.greet(urls);
    }

    fn greet(&mut self, urls: impl IntoIterator<Item = String>) {
        let begun = !matches!(self.lifecycle, Lifecycle::Bootstrapping(_));
        for url in urls {
            self.outbox.greet(&url, Greeting { first_urls: first_urls(&self.config), begun });
        }
    }

    fn receive(&mut self, inbound: Inbound) -> Result<()> {
        let bytes = inbound.bytes() as u64;
        let Inbound { header, body, .. } = inbound;
        match body {
            InboundBody::Messages { boot, number, messages, answer } => {
                let verdict = self.admit(&header);
                if verdict.is_ok() {
                    self.count_received(header.from, bytes);
                    if self.peers.admitted(header.from).batches.is_new(boot, number) {
                        for message in messages {
                            self.step(&header, message, false);
                        }
                    }
                }
                if let Some(answer) = answer {
                    let _ = answer.send(verdict);
                }
            }
            InboundBody::Snapshot { boot, number, message, answer } => {
                let mut verdict = self.admit(&header);
                if verdict.is_ok()
                    && self.peers.admitted(header.from).snapshots.is_new(boot, number)
                {
                    let id = self.journal.identity().cluster_id;
                    let raft_log = &self.raw_node.raft.raft_log;
                    verdict = self.snapshots.receive(&message, id, raft_log)?.map(|length| {
                        self.count_received(header.from, length);
                        self.step(&header, message, true);
                    });
                }
                if verdict.is_err() {
                    // The file came in vain.
                    self.snapshots.purge()?;
                }
                let _ = answer.send(verdict);
            }
            InboundBody::Announced(answer) => {
                let _ = answer.send(self.admit(&header));
            }
            InboundBody::Greeting(greeting, answer) => {
                let _ = answer.send(self.answer_greeting(&header, &greeting));
            }
            InboundBody::ConfChange(change, responder) => match self.admit(&header) {
                Ok(()) if !self.applied.is_member(header.from) => {
                    responder.answer(Err(RequestError::unavailable(format!(
                        "member {} is not a member here, and only members forward changes",
                        header.from
                    ))));
                }
                Ok(()) => {
                    self.changes.push(ConfChangeRequest { change, forwarded: true, responder });
                }
                Err(refusal) => responder.answer(Err(RequestError::unavailable(refusal))),
            },
        }
        Ok(())
    }

    /// Decides whether a sender may speak, and notes that it was heard.
    fn admit(&mut self, header: &PeerHeader) -> std::result::Result<(), Refusal> {
        let id = self.config.id;
        match &mut self.lifecycle {
            Lifecycle::Bootstrapping(bootstrap) => {
                if self.peers.admission().admit(header).is_ok() {
                    bootstrap.note_speaker();
                }
                return Err(Refusal::NotReady(format!("member {id} has not begun yet")));
            }
            Lifecycle::Quarantined(_) => {
                return Err(Refusal::NotReady(format!("member {id} lost entries: see its log")));
            }
            Lifecycle::Running | Lifecycle::Leaving(_) => {}
        }
        let (from, incarnation) = (header.from, header.incarnation);
        self.peers.admission().admit(header)?;
        let former = self.peers.incarnation_of(from);
        let is_other = former != incarnation && self.peers.is_connected(from);
        // From its proposal on, a promotion counts the progress of the directory that it names.
        if is_other && self.is_leader() && self.is_promoting_another(header) {
            return Err(Refusal::NotReady(format!(
                "member {from} is promoted with another data directory"
            )));
        }
        self.peers.note_heard(header, &self.clock, &mut *self.outbox)?;
        if is_other {
            self.set_incarnation(from, incarnation);
        }
        Ok(())
    }

    /// True if the log holds a promotion of the sender that names another incarnation.
    fn is_promoting_another(&self, header: &PeerHeader) -> bool {
        pending_changes(self.raw_node.store(), &self.applied).into_iter().any(|change| {
            matches!(change, MemberChange::Promote { id, incarnation }
                if id == header.from && incarnation != header.incarnation)
        })
    }

    /// Counts on nothing that member `id` acknowledged: its directory is now `incarnation`, or unknown.
    fn set_incarnation(&mut self, id: NodeId, incarnation: u64) {
        if self.peers.incarnation_of(id) != 0 {
            self.forget_progress(id);
        }
        self.peers.set_incarnation(id, incarnation, &mut *self.outbox);
    }

    fn answer_greeting(
        &mut self,
        header: &PeerHeader,
        greeting: &Greeting,
    ) -> std::result::Result<GreetingAnswer, Refusal> {
        self.peers.admission().admit_greeting(header)?;
        if greeting.begun {
            self.peers.admission().check_cluster(header)?;
        }
        let ours = first_urls(&self.config);
        let theirs = &greeting.first_urls;
        if !ours.is_empty() && !theirs.is_empty() && *theirs != ours {
            // The cluster has grown since.
            let remedy = if self.applied.is_member(header.from) {
                format!(": member {} was added later, so start it with --join", header.from)
            } else {
                String::new()
            };
            return Err(Refusal::Mismatch(format!(
                "the sender's --cluster is {}, this member's is {}{remedy}",
                theirs.join(","),
                ours.join(",")
            )));
        }
        let progress = self.raw_node.raft.prs().get(header.from).filter(|_| {
            self.is_leader() && self.peers.incarnation_of(header.from) == header.incarnation
        });
        let (term, leader) = (self.raw_node.raft.term, self.raw_node.raft.leader_id);
        Ok(GreetingAnswer {
            leader: self.applied.vouch_for(leader).filter(|_| self.lifecycle.takes_part()),
            begun: !matches!(self.lifecycle, Lifecycle::Bootstrapping(_)),
            counts_as_member: self.applied.is_member(header.from),
            acknowledged: progress.map(|progress| Matched { term, index: progress.matched }),
        })
    }

    /// Steps one message if it is valid. raft-rs trusts its peers, so what would make it panic has to
    /// be kept from it.
    fn step(&mut self, header: &PeerHeader, mut message: Message, has_file: bool) {
        let (message_type, from) = (message.get_msg_type(), header.from);
        let view = View {
            raft: &self.raw_node.raft,
            is_leaving: matches!(self.lifecycle, Lifecycle::Leaving(_)),
            sender_is_member: self.applied.is_member(from),
            has_file,
        };
        match validate(&message, from, &view) {
            Ok(()) => {}
            Err(Invalid::CommitBeyondLog) => {
                self.config.metrics.rejected("commit_beyond_log");
                let last_index = self.raw_node.raft.raft_log.last_index();
                self.peers.log_lost_data(from, message.commit, last_index, &self.logger);
                // Anyone may have sent that. What the leader says at its own URL counts, and where the
                // leader is the other members say.
                return self.greet(self.peers.urls_to_ask(&self.config));
            }
            Err(Invalid::Untimely(why)) => {
                self.config.metrics.rejected("untimely_message");
                debug!(self.logger, "dropping a message: {}", why;
                    "from" => from, "type" => ?message_type);
                return;
            }
            Err(Invalid::Other(why)) => {
                self.config.metrics.rejected("invalid_message");
                warn!(self.logger, "dropping a message: {}", why;
                    "from" => from, "type" => ?message_type);
                return;
            }
        }
        let answers = matches!(
            message_type,
            MessageType::MsgAppendResponse
                | MessageType::MsgHeartbeatResponse
                | MessageType::MsgRequestVoteResponse
                | MessageType::MsgRequestPreVoteResponse
        );
        if answers && self.peers.admission().is_moved_away(header) {
            debug!(
                self.logger,
                "not counting an answer from where the log moves member {from} away"
            );
            return;
        }
        if message_type == MessageType::MsgHeartbeatResponse {
            self.peers.note_heartbeat_response(from, &self.config.metrics);
        }
        let brings_entries =
            matches!(message_type, MessageType::MsgAppend | MessageType::MsgPropose);
        let is_full = self.commits.is_full() || self.journal.is_full();
        if is_full && brings_entries && !message.entries.is_empty() {
            debug!(self.logger, "dropping entries: too much waits to be written or applied");
            return;
        }
        let vouches = !self.peers.admission().is_moved_away(header);
        if self.reads.take_forwarded(&mut message, vouches, &mut self.raw_node.raft) {
            return;
        }
        self.reads.note_confirmation(&message, &self.raw_node.raft);
        if let Err(error) = self.raw_node.step(message) {
            debug!(self.logger, "raft did not take a message"; "from" => from,
                "type" => ?message_type, "error" => %error);
        } else if message_type == MessageType::MsgPropose {
            let raft = &self.raw_node.raft;
            self.notices.note_forwarded(from, raft.raft_log.last_index(), raft.term);
        }
    }

    fn take_report(&mut self, report: PeerReport) -> Result<()> {
        match report {
            PeerReport::Unreachable(id) => {
                self.reads.forget_confirmers();
                self.peers.note_unreachable(id);
                self.raw_node.report_unreachable(id);
            }
            PeerReport::NotProposed { to, requests } => {
                self.peers.note_out_of_reach(to);
                self.writes.take_back(requests);
            }
            PeerReport::ProposalsLost { ids } => {
                let failed = self.writes.fail_lost(&ids, "the connection to the leader broke off");
                self.config.metrics.proposals_failed.inc_by(failed);
            }
            PeerReport::SnapshotStatus { to, index, arrived, damaged } => {
                debug!(self.logger, "snapshot at index {} sent to {}", index, to; "arrived" => arrived);
                self.config.metrics.snapshot_sent(arrived);
                let sent = self.snapshots.sent(to);
                // Another one may be on its way by now.
                if let Some(id) = sent.filter(|id| damaged && id.index == index) {
                    self.snapshots.set_aside(id, self.raw_node.mut_store(), &self.logger)?;
                }
                let status = if arrived { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
                self.raw_node.report_snapshot(to, status);
            }
            PeerReport::SnapshotMade(made) => {
                let log: &mut Log = self.raw_node.mut_store();
                let (journal, config) = (&mut self.journal, &self.config);
                self.snapshots.made(made?, journal, log, config, &self.logger)?;
            }
            PeerReport::DiskFailed(error) => return Err(error),
            PeerReport::Greeted { .. }
            | PeerReport::NotGreeted { .. }
            | PeerReport::Refused { .. } => match &mut self.lifecycle {
                Lifecycle::Bootstrapping(bootstrap) => {
                    bootstrap.take_report(report, &self.config, &mut self.journal)?;
                    self.start_if_bootstrapped()?;
                }
                _ => self.take_answer(report)?,
            },
        }
        Ok(())
    }

    /// Takes in how a peer answered a member that has begun.
    fn take_answer(&mut self, report: PeerReport) -> Result<()> {
        match report {
            PeerReport::Greeted { url, header, answer } => {
                let word = answer.leader.as_ref();
                let told = self.peers.take_word(&url, &header, word, &self.applied);
                self.greet(told);
                if let Some(lost) = self.loss(&url, &header, &answer) {
                    return self.quarantine(lost, header.from);
                }
                match self.admit(&header) {
                    Ok(()) => self.peers.note_greeted(header.from),
                    Err(refusal @ Refusal::OtherIncarnation(_)) => {
                        self.peers.log_other_directory(&header.url, &refusal, &self.logger);
                    }
                    Err(_) => {}
                }
            }
            PeerReport::Refused { header, refusal: Refusal::OtherIncarnation(why) }
                if !self.applied.members().is_voter(self.config.id)
                    && self.peers.admission().is_bound(&header) =>
            {
                // A member that did not know of its former vote yet has let it join, and a leader may
                // have sent it the log as far as the promotion.
                let from = header.from;
                return Err(Error::Refused(format!("member {from} refuses this one: {why}")));
            }
            PeerReport::Refused { header, refusal: Refusal::Removed { id, index } } => {
                // Believed only from the member that its vote is bound to, and only if this member
                // cannot know it itself, or waits for the single survivor to know it.
                let survivor = [header.from];
                let waits_for_it = matches!(self.lifecycle, Lifecycle::Leaving(_))
                    && self.applied.members().voters().eq(survivor);
                if self.peers.admission().is_bound(&header)
                    && id == self.config.id
                    && (index > self.applied.index() || waits_for_it)
                {
                    self.changes.answer_own_removal();
                    self.stop()?;
                    return Err(Error::Removed);
                }
            }
            PeerReport::Refused { header, .. } => {
                // A learner that lost its directory is another one now, and has none of what the former
                // one acknowledged.
                let is_ours = header.cluster_id == self.journal.identity().cluster_id;
                let is_learner = self.applied.members().learners.contains(&header.from);
                let known = self.peers.incarnation_of(header.from);
                if is_ours && is_learner && ![0, header.incarnation].contains(&known) {
                    self.set_incarnation(header.from, 0);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The index up to which the leader, at its own URL, says that this directory acknowledged entries,
    /// if it holds fewer. A later leader may have had them dropped, but then this member knows of the
    /// later term.
    fn loss(&self, url: &str, header: &PeerHeader, answer: &GreetingAnswer) -> Option<Index> {
        let raft = &self.raw_node.raft;
        let Matched { term, index } = answer.acknowledged?;
        let is_loss = self.peers.is_its_word(url, header, &self.applied)
            && term >= raft.term
            && index > raft.raft_log.last_index();
        is_loss.then_some(index)
    }

    /// Takes no further part: a vote of this member could elect a leader without what it lost.
    fn quarantine(&mut self, lost: Index, leader: NodeId) -> Result<()> {
        if !matches!(self.lifecycle, Lifecycle::Quarantined(_)) {
            self.journal.quarantine(lost)?;
            self.lifecycle = Lifecycle::Quarantined(lost);
            let last = self.raw_node.raft.raft_log.last_index();
            error!(
                self.logger,
                "this member acknowledged entries up to {lost} to leader {leader}, but its log ends at {last}"
            );
            self.log_quarantine();
        }
        Ok(())
    }

    /// Says what a quarantine means, and what to do.
    pub(super) fn log_quarantine(&self) {
        if let Lifecycle::Quarantined(lost) = &self.lifecycle {
            error!(
                self.logger,
                "this member lost entries up to {lost} that it had acknowledged, and takes no part in the cluster: {REPLACE_MEMBER}; if the other voters are no majority without it, start it once with --lift-quarantine, then restart the leader: writes may be lost"
            );
        }
    }

    /// Starts this member if nothing is in the way any more, and logs what is otherwise.
    pub(super) fn start_if_bootstrapped(&mut self) -> Result<()> {
        let Lifecycle::Bootstrapping(bootstrap) = &mut self.lifecycle else { return Ok(()) };
        let Start { cluster_id, entries } = match bootstrap.outcome(&self.config) {
            Ok(start) => start,
            Err(why) => {
                if self.clock.now() >= self.config.election_ticks as u64 {
                    bootstrap.log_wait(why, &self.logger);
                }
                self.update_admission();
                return Ok(());
            }
        };
        let hard_state = self.journal.begin(cluster_id, &entries)?;
        if entries.is_empty() {
            info!(self.logger, "joining cluster {:016x}", cluster_id);
        } else {
            info!(self.logger, "starting as one of {} first members", entries.len();
                "cluster" => format!("{cluster_id:016x}"));
            self.commits.replay_until(hard_state.commit);
            let log = Log::new((0, 0), entries, hard_state, Default::default(), None);
            self.raw_node = start_raft(&self.config, 0, log, &self.logger)?;
        }
        self.lifecycle = Lifecycle::Running;
        self.connect_members();
        Ok(())
    }

    fn count_received(&self, from: NodeId, bytes: u64) {
        let received = &self.config.metrics.peer_received_bytes;
        if let Some(received) = received.get(&PeerLabel { peer: from }) {
            received.inc_by(bytes);
        }
    }
}
