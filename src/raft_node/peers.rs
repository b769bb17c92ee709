//! What arrives from peers: who is let in, and what is done with it.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use raft::eraftpb::{Message, MessageType};
use raft::{ProgressState, SnapshotStatus};
use slog::{debug, error, warn};

use super::bootstrap::first_urls;
use super::validate::{Invalid, View, validate};
use super::{
    ConfChangeRequest, Error, Frame, Members, NodeId, OUTSTANDING_BYTES_MAX, Ordering, PeerReport,
    PeerStatus, Progress, RaftNode, RequestError, Result, SendState, Sent, SnapshotId, Status,
};
use crate::channels::{Greeting, GreetingAnswer, PeerHeader, Refusal};
use crate::codec;
use crate::error::REPLACE_MEMBER;
use crate::membership::{Sender, SnapshotData, SnapshotMembers};
use crate::metrics::PeerLabel;
use crate::transport::{Inbound, InboundBody};

/// Peers that are no members here but may be elsewhere: this member may be the one that is behind.
const STRANGERS_MAX: usize = 8;
/// How long the others are asked for their status after somebody looked.
const WATCHED_FOR: Duration = Duration::from_secs(3);
/// How often they are asked.
const STATUS_INTERVAL: Duration = Duration::from_millis(200);
/// Runs of one peer whose batches are told apart.
const RUNS_MAX: usize = 8;

/// The peers that are connected.
#[derive(Default)]
pub(super) struct Peers {
    peers: BTreeMap<NodeId, Peer>,
    /// True once a heartbeat beyond our log was logged.
    logged_lost_data: bool,
    /// True once a member with another directory than it should have was logged.
    logged_other_directory: bool,
}

struct Peer {
    url: String,
    is_member: bool,
    /// The tick at which it was heard last.
    last_heard: Option<u64>,
    /// True from a proposal that could not leave for it until it is heard again.
    is_out_of_reach: bool,
    /// True once it answered a greeting, and so knows our incarnation.
    greeted: bool,
    /// Batches and snapshots are numbered apart: a snapshot takes minutes.
    batches: BatchFilter,
    snapshots: BatchFilter,
    sent: Sent,
    /// When the heartbeat was sent that it has not answered yet.
    heartbeat_sent: Option<Instant>,
    /// What it said of itself, and at which tick.
    status: Option<(u64, Box<Status>)>,
}

/// Lets each batch through once. A `MsgPropose` delivered twice would be applied twice.
///
/// A batch of an earlier run passes too if it comes late: raft allows for messages that take long.
/// Which of two runs is the earlier cannot be told from their boot ids, and a filter that took a
/// late batch for a restart would drop all that the peer sends from then on.
#[derive(Default)]
struct BatchFilter {
    /// The highest number of each run, by boot id; the run heard last is at the back.
    runs: VecDeque<(u64, u64)>,
}

impl BatchFilter {
    fn is_new(&mut self, boot: u64, number: u64) -> bool {
        let known = self.runs.iter().position(|(known, _)| *known == boot);
        let highest = known.and_then(|place| self.runs.remove(place)).map_or(0, |(_, last)| last);
        if known.is_none() && self.runs.len() == RUNS_MAX {
            self.runs.pop_front();
        }
        self.runs.push_back((boot, highest.max(number)));
        number > highest
    }
}

impl Peer {
    fn new(url: &str, is_member: bool) -> Self {
        let url = url.to_owned();
        Self {
            url,
            is_member,
            last_heard: None,
            is_out_of_reach: false,
            greeted: false,
            batches: BatchFilter::default(),
            snapshots: BatchFilter::default(),
            sent: Sent::default(),
            heartbeat_sent: None,
            status: None,
        }
    }
}

impl Peers {
    pub(super) fn add_member(&mut self, id: NodeId, url: &str) {
        let peer = self.peers.entry(id).or_insert_with(|| Peer::new(url, true));
        peer.is_member = true;
        peer.url = url.to_owned();
    }

    /// Forgets the members that are none any more; returns their ids.
    pub(super) fn remove_members_not_in(&mut self, members: &Members) -> Vec<NodeId> {
        let gone = |id: &NodeId, peer: &mut Peer| peer.is_member && !members.urls.contains_key(id);
        self.peers.extract_if(.., gone).map(|(id, _)| id).collect()
    }

    fn is_new(
        &mut self,
        header: &PeerHeader,
        filter: impl Fn(&mut Peer) -> &mut BatchFilter,
        boot: u64,
        number: u64,
    ) -> bool {
        let peer = self.peers.get_mut(&header.from).expect("it was admitted");
        filter(peer).is_new(boot, number)
    }

    /// What was not answered by now says nothing of how long a round trip takes.
    pub(super) fn forget_heartbeats(&mut self) {
        self.peers.values_mut().for_each(|peer| peer.heartbeat_sent = None);
    }

    /// Counts a message that is sent.
    pub(super) fn count_sent(&mut self, message: &Message) {
        use MessageType::*;
        let Some(peer) = self.peers.get_mut(&message.to) else { return };
        let sent = &mut peer.sent;
        let count = match message.get_msg_type() {
            MsgAppend | MsgAppendResponse => &mut sent.append,
            MsgHeartbeat | MsgHeartbeatResponse => &mut sent.heartbeat,
            MsgRequestVote
            | MsgRequestVoteResponse
            | MsgRequestPreVote
            | MsgRequestPreVoteResponse
            | MsgTimeoutNow => &mut sent.vote,
            MsgSnapshot => &mut sent.snapshot,
            _ => &mut sent.other,
        };
        *count += 1;
        if message.get_msg_type() == MsgHeartbeat {
            peer.heartbeat_sent.get_or_insert_with(Instant::now);
        }
    }

    /// True for a peer that a proposal could not leave for, or that is not connected at all.
    pub(super) fn is_out_of_reach(&self, id: NodeId) -> bool {
        self.peers.get(&id).is_none_or(|peer| peer.is_out_of_reach)
    }

    pub(super) fn was_heard_since(&self, id: NodeId, tick: u64) -> bool {
        self.peers.get(&id).and_then(|peer| peer.last_heard).is_some_and(|heard| heard >= tick)
    }
}

impl RaftNode {
    /// Takes in one request of a peer, and answers it.
    pub(super) fn receive(&mut self, inbound: Inbound) -> Result<()> {
        let bytes = inbound.bytes() as u64;
        let Inbound { header, body, .. } = inbound;
        match body {
            InboundBody::Messages { boot, number, messages, answer } => {
                let verdict = self.admit(&header)?;
                if verdict.is_ok() {
                    self.count_received(header.from, bytes);
                }
                if verdict.is_ok()
                    && self.peers.is_new(&header, |peer| &mut peer.batches, boot, number)
                {
                    for message in messages {
                        self.step(&header, message, false);
                    }
                }
                if let Some(answer) = answer {
                    let _ = answer.send(verdict);
                }
            }
            InboundBody::Snapshot { boot, number, message, answer } => {
                let mut verdict = self.admit(&header)?;
                if verdict.is_ok()
                    && self.peers.is_new(&header, |peer| &mut peer.snapshots, boot, number)
                {
                    verdict = self.step_snapshot(&header, message)?;
                }
                if verdict.is_err() {
                    // The file came in vain.
                    self.purge_snapshots()?;
                }
                let _ = answer.send(verdict);
            }
            InboundBody::Greeting { greeting, answer } => {
                let verdict = self.answer_greeting(&header, &greeting)?;
                let _ = answer.send(verdict);
            }
            InboundBody::Status { answer } => {
                let verdict = self.admit(&header)?;
                let status = || codec::encode(&*self.status_tx.borrow());
                let _ = answer.send(verdict.map(|()| status()));
            }
            InboundBody::ConfChange { change, responder } => match self.admit(&header)? {
                Ok(()) if !self.members.urls.contains_key(&header.from) => {
                    responder.answer(Err(RequestError::unavailable(format!(
                        "member {} is not a member here, and only members forward changes",
                        header.from
                    ))));
                }
                Ok(()) => {
                    self.changes.push(ConfChangeRequest { change, forwarded: true, responder })
                }
                Err(refusal) => responder.answer(Err(RequestError::unavailable(refusal))),
            },
        }
        Ok(())
    }

    /// Decides whether a sender may speak, and notes that it was heard. Its incarnation is durable
    /// before anything is answered.
    fn admit(&mut self, header: &PeerHeader) -> Result<std::result::Result<(), Refusal>> {
        let verdict = self.admission.admit(header);
        if let Some(beginning) = &mut self.beginning {
            if verdict.is_ok() {
                beginning.was_called_from(&header.url);
            }
            return Ok(Err(Refusal::NotReady(format!(
                "member {} has not begun yet",
                self.config.id
            ))));
        }
        match verdict {
            Err(refusal) => return Ok(Err(refusal)),
            Ok(Sender::New) => self.record_incarnation(header)?,
            Ok(Sender::Member | Sender::Known) => {}
        }
        let id = header.from;
        if !self.peers.peers.contains_key(&id) {
            let strangers = self.peers.peers.values().filter(|peer| !peer.is_member).count();
            if strangers >= STRANGERS_MAX {
                return Ok(Err(Refusal::NotReady(format!(
                    "member {} hears of member {id} for the first time, and of too many others",
                    self.config.id
                ))));
            }
            self.peers.peers.insert(id, Peer::new(&header.url, false));
            self.outbox.add_peer(id, &header.url);
        }
        let peer = self.peers.peers.get_mut(&id).expect("it was inserted if it was missing");
        if peer.url != header.url {
            // It moved, and that is not applied here yet: it is answered where it is now.
            peer.url.clone_from(&header.url);
            self.outbox.add_peer(id, &header.url);
            self.admission.note_move(header);
        }
        peer.last_heard = Some(self.ticks);
        peer.is_out_of_reach = false;
        Ok(Ok(()))
    }

    fn record_incarnation(&mut self, header: &PeerHeader) -> Result<()> {
        let known = (header.from, header.incarnation);
        self.wal.save(&Frame { incarnations: &[known], ..Frame::default() })?;
        self.admission.record(known.0, known.1);
        Ok(())
    }

    fn answer_greeting(
        &mut self,
        header: &PeerHeader,
        greeting: &Greeting,
    ) -> Result<std::result::Result<GreetingAnswer, Refusal>> {
        let sender = match self.admission.admit_greeting(header) {
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
        let is_member = self.members.urls.contains_key(&header.from);
        // Whoever is no member yet may still begin with another directory: its id is not bound to
        // this one. First members are members to be.
        let is_first = self.beginning.is_some() && header.from <= ours.len() as u64;
        if sender == Sender::New && (is_member || is_first) {
            self.record_incarnation(header)?;
        }
        Ok(Ok(GreetingAnswer {
            beginning: self.counts_as_beginning(),
            counts_as_member: is_member,
        }))
    }

    /// Steps one message if it is valid. raft-rs trusts its peers: what it would panic on must
    /// not reach it.
    fn step(&mut self, header: &PeerHeader, message: Message, has_file: bool) {
        let raft = &self.raw_node.raft;
        let view = View {
            id: self.config.id,
            term: raft.term,
            leader: raft.leader_id,
            is_leader: self.is_leader(),
            last_index: raft.raft_log.last_index(),
            is_persisted: raft.raft_log.persisted == raft.raft_log.last_index(),
            is_leaving: self.leaving.is_some(),
            sender_is_member: self.members.urls.contains_key(&header.from),
            has_file,
        };
        let message_type = message.get_msg_type();
        match validate(&message, header.from, &view) {
            Ok(()) => {}
            Err(Invalid::CommitBeyondLog { commit, last_index }) => {
                self.config.metrics.rejected("commit_beyond_log");
                if !std::mem::replace(&mut self.peers.logged_lost_data, true) {
                    error!(
                        self.logger,
                        "member {} says that index {} is committed here, but our log ends at {}: {}",
                        header.from,
                        commit,
                        last_index,
                        REPLACE_MEMBER
                    );
                }
                return;
            }
            Err(Invalid::Other(why)) => {
                self.config.metrics.rejected("invalid_message");
                warn!(self.logger, "dropping a message: {}", why;
                    "from" => header.from, "type" => ?message_type);
                return;
            }
        }
        if message_type == MessageType::MsgHeartbeatResponse
            && let Some(peer) = self.peers.peers.get_mut(&header.from)
            && let Some(sent) = peer.heartbeat_sent.take()
        {
            let round_trip = &self.config.metrics.peer_round_trip;
            let label = PeerLabel { peer: header.from };
            round_trip.get_or_create(&label).observe(sent.elapsed().as_secs_f64());
        }
        let is_behind = self.outstanding_bytes.load(Ordering::Relaxed) > OUTSTANDING_BYTES_MAX;
        let brings_entries =
            matches!(message_type, MessageType::MsgAppend | MessageType::MsgPropose);
        if is_behind && brings_entries && !message.entries.is_empty() {
            debug!(self.logger, "dropping entries: too much waits to be applied");
            return;
        }
        self.confirmers.note(&message, &self.raw_node.raft);
        if let Err(error) = self.raw_node.step(message) {
            debug!(self.logger, "raft did not take a message"; "from" => header.from,
                "type" => ?message_type, "error" => %error);
        }
    }

    /// Steps a snapshot whose file was received. The file is kept until the end of this turn, by
    /// which raft has taken or ignored it.
    fn step_snapshot(
        &mut self,
        header: &PeerHeader,
        message: Message,
    ) -> Result<std::result::Result<(), Refusal>> {
        let metadata = message.get_snapshot().get_metadata();
        let mark = SnapshotId { index: metadata.index, term: metadata.term };
        let refuse = |why: &str| {
            Ok(Err(Refusal::NotReady(format!("the snapshot at index {}: {why}", mark.index))))
        };
        if !self.snapshotter.list()?.contains(&mark) {
            return refuse("its file was purged before it was looked at");
        }
        let raft_log = &self.raw_node.raft.raft_log;
        if mark.index == raft_log.committed && !raft_log.match_term(mark.index, mark.term) {
            return refuse("another entry is committed there");
        }
        let (meta, _) = self.snapshotter.open_received(mark)?;
        let data = codec::decode::<SnapshotData>(&message.get_snapshot().data);
        let is_consistent = data.is_ok_and(|data| {
            data.members.cluster_id == self.identity.cluster_id
                && SnapshotMembers::decode(&meta).is_ok_and(|held| held == data.members)
        });
        if !is_consistent {
            return refuse("its file names other members than its message");
        }
        self.received.push(mark);
        let length = codec::decode::<SnapshotData>(&message.get_snapshot().data);
        self.count_received(header.from, length.map_or(0, |data| data.length));
        self.step(header, message, true);
        Ok(Ok(()))
    }

    /// Takes in what happened to something that we sent or made.
    pub(super) fn take_report(&mut self, report: PeerReport) -> Result<()> {
        match report {
            PeerReport::Unreachable(id) => {
                self.confirmers.forget();
                if let Some(peer) = self.peers.peers.get_mut(&id) {
                    peer.heartbeat_sent = None;
                }
                self.raw_node.report_unreachable(id);
            }
            PeerReport::NotProposed { to, requests } => {
                if let Some(peer) = self.peers.peers.get_mut(&to) {
                    peer.is_out_of_reach = true;
                }
                self.proposals.take_back(requests);
            }
            PeerReport::SnapshotStatus { to, index, arrived } => {
                debug!(self.logger, "snapshot at index {} sent to {}", index, to; "arrived" => arrived);
                self.config.metrics.snapshot_sent(arrived);
                self.sending.remove(&to);
                let status = if arrived { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
                self.raw_node.report_snapshot(to, status);
            }
            PeerReport::SnapshotMade(made) => self.finish_snapshot(made?)?,
            PeerReport::DiskFailed(error) => return Err(error),
            report if self.beginning.is_some() => self.take_greeting_report(report)?,
            PeerReport::Greeted { header, .. } => {
                match self.admit(&header)? {
                    Ok(()) => {
                        if let Some(peer) = self.peers.peers.get_mut(&header.from) {
                            peer.greeted = true;
                        }
                    }
                    // Its own log need not say so: it may take us for one of its own.
                    Err(refusal @ Refusal::OtherIncarnation(_))
                        if !std::mem::replace(&mut self.peers.logged_other_directory, true) =>
                    {
                        warn!(self.logger, "not listening to {}: {}", header.url, refusal);
                    }
                    Err(_) => {}
                }
            }
            PeerReport::NotGreeted { .. } => {}
            PeerReport::Status { header, status } => {
                if self.admit(&header)?.is_ok()
                    && let Ok(status) = codec::decode::<Status>(&status)
                    && let Some(peer) = self.peers.peers.get_mut(&header.from)
                {
                    peer.status = Some((self.ticks, Box::new(status)));
                }
            }
            PeerReport::Refused { header, refusal } => self.take_refusal(&header, refusal)?,
        }
        Ok(())
    }

    /// A peer refused us. That we were removed is believed only from the member that we know, and
    /// only if we cannot know it ourselves.
    fn take_refusal(&mut self, header: &PeerHeader, refusal: Refusal) -> Result<()> {
        if !self.admission.is_known(header) {
            return Ok(());
        }
        // A single member that remains: we waited for it to know.
        let was_waited_for = self.leaving.is_some() && self.members.voters().eq([header.from]);
        match refusal {
            Refusal::Removed { id, index }
                if id == self.config.id && (index > self.applied_index || was_waited_for) =>
            {
                self.answer_own_removal();
                self.stop()?;
                Err(Error::Removed)
            }
            _ => Ok(()),
        }
    }

    /// Greets whoever has not answered yet, twice in an election timeout.
    pub(super) fn greet_others(&mut self) {
        let interval = (self.config.election_ticks as u64 / 2).max(1);
        if self.ticks % interval != 1 % interval {
            return;
        }
        // Who has no vote never asks for others, and would not be told that it was removed while it was
        // away, or before it heard of anything.
        let since = self.ticks.saturating_sub(self.config.election_ticks as u64);
        let is_forgotten = !self.conf_state.voters.contains(&self.config.id)
            && !self.peers.was_heard_since(self.raw_node.raft.leader_id, since);
        let greeting = self.greeting();
        let urls: Vec<String> = match &self.beginning {
            Some(beginning) => beginning.urls(),
            None if is_forgotten && self.members.urls.is_empty() => {
                self.config.cluster.iter().filter(|url| **url != self.config.url).cloned().collect()
            }
            None => {
                let members = self.peers.peers.values().filter(|peer| peer.is_member);
                let ungreeted = members.filter(|peer| !peer.greeted || is_forgotten);
                ungreeted.map(|peer| peer.url.clone()).collect()
            }
        };
        for url in urls {
            self.outbox.greet(&url, greeting.clone());
        }
    }

    fn count_received(&self, from: NodeId, bytes: u64) {
        let received = &self.config.metrics.peer_received_bytes;
        received.get_or_create(&PeerLabel { peer: from }).inc_by(bytes);
    }

    /// Asks the other members for their status, while somebody looks at the whole cluster.
    pub(super) fn ask_others(&mut self) {
        let calls = self.config.metrics.watched();
        let ticks_of = |time: Duration| time.div_duration_f64(self.config.tick).ceil() as u64;
        if calls != self.watched.0 {
            self.watched = (calls, self.ticks + ticks_of(WATCHED_FOR));
        }
        let is_watched = self.ticks < self.watched.1;
        if !is_watched {
            self.peers.peers.values_mut().for_each(|peer| peer.status = None);
        } else if self.ticks.is_multiple_of(ticks_of(STATUS_INTERVAL)) && self.beginning.is_none() {
            let members = self.peers.peers.iter().filter(|(_, peer)| peer.is_member);
            members.for_each(|(id, _)| self.outbox.ask_status(*id));
        }
    }

    /// What is known of the others.
    pub(super) fn peer_statuses(&self) -> BTreeMap<NodeId, PeerStatus> {
        let status = |(id, peer): (&NodeId, &Peer)| {
            let progress = self.raw_node.raft.prs().get(*id).filter(|_| self.is_leader());
            let progress = progress.map(|progress| Progress {
                matched: progress.matched,
                next: progress.next_idx,
                state: match progress.state {
                    ProgressState::Probe => SendState::Probe,
                    ProgressState::Replicate => SendState::Replicate,
                    ProgressState::Snapshot => SendState::Snapshot,
                },
            });
            let age = |tick| self.milliseconds(self.ticks - tick);
            let status = PeerStatus {
                heard_ms: peer.last_heard.map(age),
                sent: peer.sent,
                progress,
                status: peer.status.clone().map(|(tick, status)| (age(tick), status)),
            };
            (*id, status)
        };
        self.peers.peers.iter().map(status).collect()
    }

    /// Forgets peers that are no members and were not heard for an election timeout.
    pub(super) fn forget_strangers(&mut self) {
        let since = self.ticks.saturating_sub(self.config.election_ticks as u64);
        let silent = |_: &NodeId, peer: &mut Peer| {
            !peer.is_member && peer.last_heard.is_none_or(|heard| heard < since)
        };
        for (id, _) in self.peers.peers.extract_if(.., silent) {
            self.outbox.remove_peer(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_passes_once_whatever_runs_of_its_sender_come_between() {
        let mut filter = BatchFilter::default();
        assert!(filter.is_new(7, 1));
        assert!(!filter.is_new(7, 1), "twice");
        assert!(filter.is_new(7, 3));
        assert!(!filter.is_new(7, 2), "overtaken");
        assert!(filter.is_new(8, 1), "restarted");
        assert!(!filter.is_new(7, 3), "of the earlier run, twice");
        assert!(filter.is_new(7, 4), "of the earlier run, late");
        assert!(!filter.is_new(8, 1), "twice");
        assert!(filter.is_new(8, 2), "the later run is not shut out");
    }

    #[test]
    fn a_filter_remembers_a_bounded_number_of_runs() {
        let mut filter = BatchFilter::default();
        for boot in 1..=100 {
            assert!(filter.is_new(boot, 1));
        }
        assert_eq!(filter.runs.len(), RUNS_MAX);
        assert!(!filter.is_new(100, 1));
    }
}
