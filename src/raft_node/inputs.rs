//! What each input does before the next Ready.

use raft::SnapshotStatus;
use raft::eraftpb::{Message, MessageType};
use slog::{debug, info, warn};

use super::bootstrap::{Start, first_entries, first_urls};
use super::lifecycle::Lifecycle;
use super::validate::{Invalid, View, validate};
use super::{NodeId, PeerReport, RaftNode, start_raft};
use crate::channels::{ConfChangeRequest, Greeting, GreetingAnswer, PeerHeader, Proposal};
use crate::channels::{ReadRequest, Refusal};
use crate::error::{Error, RequestError, Result};
use crate::membership::Sender;
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
}

impl RaftNode {
    /// Takes one input in. Nothing is written or answered with success until
    /// [`handle_ready`](Self::handle_ready), except what a report or a tick makes durable.
    ///
    /// # Errors
    /// What stops the process.
    pub fn handle(&mut self, input: Input) -> Result<()> {
        match input {
            Input::Propose(proposal) => self.writes.push(proposal),
            Input::Read(request) => self.reads.push(request.responder),
            Input::ConfChange(request) => self.changes.push(request),
            Input::Inbound(inbound) => self.receive(inbound)?,
            Input::Report(report) => self.take_report(report)?,
            Input::Tick => self.tick()?,
        }
        Ok(())
    }

    fn tick(&mut self) -> Result<()> {
        self.clock.tick();
        self.config.metrics.ticked();
        self.reads.forget_confirmers();
        if !matches!(self.lifecycle, Lifecycle::Bootstrapping(_)) {
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
        self.journal.flush()
    }

    /// Elects a member that is alone in its cluster: there is no other election to wait for. While it
    /// follows a leader it does nothing. It may be alone only according to an old copy of its
    /// directory, and must not stop the others then.
    fn campaign_alone(&mut self) {
        let raft = &self.raw_node.raft;
        let is_alone = self.applied.conf_state().voters == [self.config.id]
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
            Lifecycle::Running | Lifecycle::Leaving(_) => {
                let leader = self.raw_node.raft.leader_id;
                self.peers.urls_to_greet(&self.applied, leader, &self.clock, &self.config)
            }
        };
        for url in urls {
            self.outbox.greet(&url, Greeting { first_urls: first_urls(&self.config) });
        }
    }

    fn receive(&mut self, inbound: Inbound) -> Result<()> {
        let bytes = inbound.bytes() as u64;
        let Inbound { header, body, .. } = inbound;
        match body {
            InboundBody::Messages { boot, number, messages, answer } => {
                let verdict = self.admit(&header)?;
                if verdict.is_ok() {
                    self.count_received(header.from, bytes);
                    if self.peers.is_new_batch(header.from, boot, number) {
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
                let mut verdict = self.admit(&header)?;
                if verdict.is_ok() && self.peers.is_new_snapshot(header.from, boot, number) {
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
            InboundBody::Greeting { greeting, answer } => {
                let verdict = self.answer_greeting(&header, &greeting)?;
                let _ = answer.send(verdict);
            }
            InboundBody::ConfChange { change, responder } => match self.admit(&header)? {
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
    fn admit(&mut self, header: &PeerHeader) -> Result<std::result::Result<(), Refusal>> {
        if let Lifecycle::Bootstrapping(bootstrap) = &mut self.lifecycle {
            if self.peers.admission().admit(header).is_ok() {
                bootstrap.note_caller(&header.url);
            }
            let why = format!("member {} has not begun yet", self.config.id);
            return Ok(Err(Refusal::NotReady(why)));
        }
        self.peers.admit(header, &self.clock, &mut self.journal, &mut *self.outbox)
    }

    fn answer_greeting(
        &mut self,
        header: &PeerHeader,
        greeting: &Greeting,
    ) -> Result<std::result::Result<GreetingAnswer, Refusal>> {
        let sender = match self.peers.admission().admit_greeting(header) {
            Err(refusal) => return Ok(Err(refusal)),
            Ok(sender) => sender,
        };
        let ours = first_urls(&self.config);
        let theirs = &greeting.first_urls;
        if !ours.is_empty() && !theirs.is_empty() && *theirs != ours {
            return Ok(Err(Refusal::Mismatch(format!(
                "the sender's --cluster is {}, this member's is {}",
                theirs.join(","),
                ours.join(",")
            ))));
        }
        let is_member = self.applied.is_member(header.from);
        // First members are members to be. The id of any other sender is not bound to a directory yet:
        // it may still come back with another one.
        let is_first = matches!(self.lifecycle, Lifecycle::Bootstrapping(_))
            && header.from <= ours.len() as u64;
        if sender == Sender::New && (is_member || is_first) {
            self.peers.record_incarnation(header, &mut self.journal)?;
        }
        Ok(Ok(GreetingAnswer {
            beginning: self.counts_as_bootstrapping(),
            counts_as_member: is_member,
        }))
    }

    /// True while this member's state depends on no vote and no entry of another member.
    fn counts_as_bootstrapping(&self) -> bool {
        let first_members = self.config.cluster.len() as u64;
        let is_untouched = !self.config.join
            && !self.journal.identity().is_restored()
            && self.journal.term_and_vote() == (1, 0)
            && self.raw_node.raft.raft_log.last_index() == first_members;
        is_untouched || matches!(self.lifecycle, Lifecycle::Bootstrapping(_))
    }

    /// Steps one message if it is valid. raft-rs trusts its peers, so what would make it panic has to
    /// be kept from it.
    fn step(&mut self, header: &PeerHeader, message: Message, has_file: bool) {
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
                return self.peers.log_lost_data(from, message.commit, last_index, &self.logger);
            }
            Err(Invalid::Other(why)) => {
                self.config.metrics.rejected("invalid_message");
                warn!(self.logger, "dropping a message: {}", why;
                    "from" => from, "type" => ?message_type);
                return;
            }
        }
        if message_type == MessageType::MsgHeartbeatResponse {
            self.peers.note_heartbeat_response(from, &self.config.metrics);
        }
        let brings_entries =
            matches!(message_type, MessageType::MsgAppend | MessageType::MsgPropose);
        if self.commits.is_full() && brings_entries && !message.entries.is_empty() {
            debug!(self.logger, "dropping entries: too much waits to be applied");
            return;
        }
        self.reads.note_confirmation(&message, &self.raw_node.raft);
        if let Err(error) = self.raw_node.step(message) {
            debug!(self.logger, "raft did not take a message"; "from" => from,
                "type" => ?message_type, "error" => %error);
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
            PeerReport::SnapshotStatus { to, index, arrived } => {
                debug!(self.logger, "snapshot at index {} sent to {}", index, to; "arrived" => arrived);
                self.config.metrics.snapshot_sent(arrived);
                self.snapshots.sent(to);
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
                    let known = self.journal.identity().cluster_id;
                    bootstrap.take_report(report, self.config.id, known)?;
                    self.start_if_bootstrapped()?;
                }
                Lifecycle::Running | Lifecycle::Leaving(_) => self.take_answer(report)?,
            },
        }
        Ok(())
    }

    /// Takes in how a peer answered a member that runs.
    fn take_answer(&mut self, report: PeerReport) -> Result<()> {
        match report {
            PeerReport::Greeted { header, .. } => match self.admit(&header)? {
                Ok(()) => self.peers.note_greeted(header.from),
                Err(refusal @ Refusal::OtherIncarnation(_)) => {
                    self.peers.log_other_directory(&header.url, &refusal, &self.logger);
                }
                Err(_) => {}
            },
            PeerReport::Refused { header, refusal: Refusal::Removed { id, index } } => {
                // Believed only from a member with the recorded incarnation, and only if this member
                // cannot know it itself, or waits for the single survivor to know it.
                let survivor = [header.from];
                let waits_for_it = matches!(self.lifecycle, Lifecycle::Leaving(_))
                    && self.applied.members().voters().eq(survivor);
                if self.peers.admission().is_known(&header)
                    && id == self.config.id
                    && (index > self.applied.index() || waits_for_it)
                {
                    self.changes.answer_own_removal();
                    self.stop()?;
                    return Err(Error::Removed);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Starts this member if nothing is in the way any more, and logs what is otherwise.
    pub(super) fn start_if_bootstrapped(&mut self) -> Result<()> {
        let Lifecycle::Bootstrapping(bootstrap) = &mut self.lifecycle else { return Ok(()) };
        match bootstrap.outcome(&self.config) {
            Err(why) => {
                if self.clock.now() >= self.config.election_ticks as u64 {
                    bootstrap.log_wait(why, &self.logger);
                }
                return Ok(());
            }
            Ok(Start::Join { cluster_id }) => {
                self.journal.join(cluster_id)?;
                info!(self.logger, "joining cluster {:016x}", cluster_id);
            }
            Ok(Start::First) => {
                let (entries, hard_state) = first_entries(&self.config);
                self.journal.bootstrap(&entries, &hard_state)?;
                info!(self.logger, "starting as one of {} first members", entries.len());
                self.commits.replay_until(hard_state.commit);
                let log = Log::new((0, 0), entries, hard_state, Default::default(), None);
                self.raw_node = start_raft(&self.config, 0, log, &self.logger)?;
            }
        }
        self.lifecycle = Lifecycle::Running;
        self.connect_members();
        Ok(())
    }

    fn count_received(&self, from: NodeId, bytes: u64) {
        let received = &self.config.metrics.peer_received_bytes;
        received.get_or_create(&PeerLabel { peer: from }).inc_by(bytes);
    }
}
