//! The peers: who is connected, who was heard, and what was said already.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use raft::eraftpb::{Message, MessageType};
use raft::{ProgressState, RawNode, StateRole};
use slog::{Logger, warn};

use super::applied::Applied;
use super::clock::Clock;
use super::{NodeConfig, NodeId, Outbox, PeerStatus, Progress, SendState, Sent};
use crate::channels::{Index, PeerHeader, Refusal, Vouched};
use crate::membership::Admission;
use crate::metrics::{Metrics, PeerLabel};
use crate::storage::log::Log;

/// Peers that are not members here but may be elsewhere: this member may be the one that lags.
const STRANGERS_MAX: usize = 8;
/// Runs of one peer whose batches are told apart.
const RUNS_MAX: usize = 8;

/// The peers that are connected, and the admission that the transport shares.
pub(super) struct Peers {
    admission: Arc<Admission>,
    connected: BTreeMap<NodeId, Peer>,
    /// True once a heartbeat beyond this member's log was logged.
    logged_lost_data: bool,
    /// True once a peer with an unexpected data directory was logged.
    logged_other_directory: bool,
    /// A leader that another member vouched for: the state applied here does not know it, or not there.
    vouched: Option<Vouched>,
}

#[derive(Default)]
pub(super) struct Peer {
    url: String,
    /// The incarnation that messages are for: the one that its vote is bound to, or of a learner the
    /// one that was heard last; 0 if none was. A leader's progress of the peer is all of this one.
    incarnation: u64,
    is_member: bool,
    /// The tick at which it was last heard.
    last_heard: Option<u64>,
    /// True from a proposal that could not be sent to it until it is heard again.
    is_out_of_reach: bool,
    /// True once it answered a greeting, and so knows this member's incarnation.
    is_greeted: bool,
    /// Batches and snapshots are numbered apart, because a snapshot takes minutes.
    pub batches: BatchFilter,
    pub snapshots: BatchFilter,
    sent: Sent,
    /// When the heartbeat was sent that it has not answered yet.
    heartbeat_sent: Option<Instant>,
}

/// Lets each batch through once: a `MsgPropose` that is delivered twice would be applied twice.
///
/// A late batch of an earlier run passes too, since raft allows for late messages. Two boot ids do not
/// tell which run is the earlier one. A filter that took a late batch for a restart would drop
/// everything that the peer sends afterwards.
#[derive(Default)]
pub(super) struct BatchFilter {
    /// The highest number of each run, by boot id; the run that was heard last is at the back.
    runs: VecDeque<(u64, u64)>,
}

impl BatchFilter {
    pub fn is_new(&mut self, boot: u64, number: u64) -> bool {
        let known = self.runs.iter().position(|(known, _)| *known == boot);
        let highest = known.and_then(|place| self.runs.remove(place)).map_or(0, |(_, last)| last);
        if known.is_none() && self.runs.len() == RUNS_MAX {
            self.runs.pop_front();
        }
        self.runs.push_back((boot, highest.max(number)));
        number > highest
    }
}

impl Peers {
    pub fn new(admission: Arc<Admission>) -> Self {
        Self {
            admission,
            connected: BTreeMap::new(),
            logged_lost_data: false,
            logged_other_directory: false,
            vouched: None,
        }
    }

    pub fn admission(&self) -> &Admission {
        &self.admission
    }

    /// Connects the members that admission knows, and disconnects those that it no longer knows.
    pub fn connect(&mut self, applied: &Applied, outbox: &mut dyn Outbox) {
        for (id, url) in self.admission.other_members() {
            let peer = self.connected.entry(id).or_default();
            let bound = applied.members().incarnations.get(&id);
            let incarnation = bound.copied().unwrap_or(peer.incarnation);
            outbox.add_peer(id, &url, incarnation);
            (peer.is_member, peer.url, peer.incarnation) = (true, url, incarnation);
        }
        let is_gone = |id: &NodeId, peer: &mut Peer| peer.is_member && !applied.is_member(*id);
        for (id, _) in self.connected.extract_if(.., is_gone) {
            outbox.remove_peer(id);
        }
    }

    pub fn is_connected(&self, id: NodeId) -> bool {
        self.connected.contains_key(&id)
    }

    /// The incarnation that messages to member `id` are for; 0 if it is unknown.
    pub fn incarnation_of(&self, id: NodeId) -> u64 {
        self.connected.get(&id).map_or(0, |peer| peer.incarnation)
    }

    /// Sends to another incarnation of `id`; 0 if it is unknown. What raft knows of the former one has
    /// to be forgotten first.
    pub fn set_incarnation(&mut self, id: NodeId, incarnation: u64, outbox: &mut dyn Outbox) {
        if let Some(peer) = self.connected.get_mut(&id) {
            peer.incarnation = incarnation;
            outbox.add_peer(id, &peer.url, incarnation);
        }
    }

    /// Notes that an admitted sender was heard, unless there are too many strangers.
    pub fn note_heard(
        &mut self,
        header: &PeerHeader,
        clock: &Clock,
        outbox: &mut dyn Outbox,
    ) -> std::result::Result<(), Refusal> {
        let PeerHeader { from: id, incarnation, .. } = *header;
        let strangers = || self.connected.values().filter(|peer| !peer.is_member).count();
        if !self.is_connected(id) && strangers() >= STRANGERS_MAX {
            return Err(Refusal::NotReady(format!(
                "member {} hears of member {id} for the first time, and of too many others",
                header.to
            )));
        }
        let new = || Peer { incarnation, ..Peer::default() };
        let peer = self.connected.entry(id).or_insert_with(new);
        if peer.url != header.url {
            // It is new, or moved by an entry that is not applied here yet: answers go to this URL.
            peer.url.clone_from(&header.url);
            outbox.add_peer(id, &header.url, peer.incarnation);
            self.admission.note_move(header);
        }
        peer.last_heard = Some(clock.now());
        peer.is_out_of_reach = false;
        Ok(())
    }

    pub fn admitted(&mut self, id: NodeId) -> &mut Peer {
        self.connected.get_mut(&id).expect("it was admitted")
    }

    pub fn note_sent(&mut self, message: &Message) {
        use MessageType::*;
        let Some(peer) = self.connected.get_mut(&message.to) else { return };
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

    pub fn note_heartbeat_response(&mut self, from: NodeId, metrics: &Metrics) {
        let peer = self.connected.get_mut(&from);
        if let Some(sent) = peer.and_then(|peer| peer.heartbeat_sent.take()) {
            let round_trip = metrics.peer_round_trip.get(&PeerLabel { peer: from });
            if let Some(round_trip) = round_trip {
                round_trip.observe(sent.elapsed().as_secs_f64());
            }
        }
    }

    /// Forgets the heartbeats that were not answered: a later answer does not tell the round trip.
    pub fn forget_heartbeats(&mut self) {
        self.connected.values_mut().for_each(|peer| peer.heartbeat_sent = None);
    }

    pub fn note_unreachable(&mut self, id: NodeId) {
        self.connected.entry(id).and_modify(|peer| peer.heartbeat_sent = None);
    }

    pub fn note_out_of_reach(&mut self, id: NodeId) {
        self.connected.entry(id).and_modify(|peer| peer.is_out_of_reach = true);
    }

    /// True for a peer that a proposal could not be sent to, or that is not connected at all.
    pub fn is_out_of_reach(&self, id: NodeId) -> bool {
        self.connected.get(&id).is_none_or(|peer| peer.is_out_of_reach)
    }

    pub fn was_heard_since(&self, id: NodeId, tick: u64) -> bool {
        self.connected.get(&id).and_then(|peer| peer.last_heard).is_some_and(|heard| heard >= tick)
    }

    pub fn note_greeted(&mut self, id: NodeId) {
        self.connected.entry(id).and_modify(|peer| peer.is_greeted = true);
    }

    /// True if what `header` answered at `url`, which was asked, is the word of the member with that
    /// vote: at its applied URL, or where another one says that it leads.
    pub fn is_its_word(&self, url: &str, header: &PeerHeader, applied: &Applied) -> bool {
        let urls = &applied.members().urls;
        let is_at_home = urls.is_empty() || urls.get(&header.from).is_some_and(|it| it == url);
        let is_vouched = self.vouched.as_ref().is_some_and(|vouched| {
            (vouched.id, &vouched.url[..], vouched.incarnation)
                == (header.from, url, header.incarnation)
        });
        is_vouched && header.cluster_id == self.admission.cluster_id()
            || is_at_home && self.admission.is_bound(header)
    }

    /// Where to ask whether this member lost entries. If it knows no member any more, its list does.
    pub fn urls_to_ask(&self, config: &NodeConfig) -> Vec<String> {
        let members = self.admission.other_members();
        let listed = config.cluster.iter().filter(|url| members.is_empty() && **url != config.url);
        let vouched = self.vouched.iter().map(|vouched| &vouched.url);
        let asked = members.iter().map(|(_, url)| url).chain(listed).chain(vouched);
        asked.cloned().collect()
    }

    /// Takes a member's word for who leads, if that one has no vote in the state applied here, or has
    /// moved since. Returns where to ask it.
    pub fn take_word(
        &mut self,
        url: &str,
        header: &PeerHeader,
        leader: Option<&Vouched>,
        applied: &Applied,
    ) -> Option<String> {
        let leader = leader?;
        let is_known = applied.vouch_for(leader.id).as_ref() == Some(leader)
            || self.vouched.as_ref() == Some(leader);
        if is_known || !self.is_its_word(url, header, applied) {
            return None;
        }
        self.vouched = Some(leader.clone());
        Some(leader.url.clone())
    }

    /// Logs once that a peer has another data directory than this member recorded. The peer's own log
    /// need not say so, because it may take this member for one of its own.
    pub fn log_other_directory(&mut self, url: &str, refusal: &Refusal, logger: &Logger) {
        if !std::mem::replace(&mut self.logged_other_directory, true) {
            warn!(logger, "not listening to {}: {}", url, refusal);
        }
    }

    /// Logs once that a leader seems to count on entries that this member does not have.
    pub fn log_lost_data(&mut self, from: NodeId, commit: Index, last: Index, logger: &Logger) {
        if !std::mem::replace(&mut self.logged_lost_data, true) {
            warn!(
                logger,
                "member {from} says that index {commit} is committed here, but our log ends at {last}: asking it"
            );
        }
    }

    /// The URLs that a running member greets: of members that have not answered yet, and of all while
    /// this member may have been removed without having heard of it.
    ///
    /// A learner never campaigns, so no other member would tell it of its removal.
    pub fn urls_to_greet(
        &self,
        applied: &Applied,
        leader: NodeId,
        clock: &Clock,
        config: &NodeConfig,
    ) -> Vec<String> {
        let since = clock.ago(config.election_ticks);
        let is_forgotten =
            !applied.members().is_voter(config.id) && !self.was_heard_since(leader, since);
        if is_forgotten && applied.members().urls.is_empty() {
            return config.cluster.iter().filter(|url| **url != config.url).cloned().collect();
        }
        let members = self.connected.values().filter(|peer| peer.is_member);
        let ungreeted = members.filter(|peer| !peer.is_greeted || is_forgotten);
        ungreeted.map(|peer| peer.url.clone()).collect()
    }

    /// Disconnects peers that are not members and were not heard since `tick`.
    pub fn forget_strangers(&mut self, tick: u64, outbox: &mut dyn Outbox) {
        let is_silent = |_: &NodeId, peer: &mut Peer| {
            !peer.is_member && peer.last_heard.is_none_or(|heard| heard < tick)
        };
        for (id, _) in self.connected.extract_if(.., is_silent) {
            outbox.remove_peer(id);
        }
    }

    /// What is known of each peer; `age_ms` turns a tick into milliseconds ago.
    pub fn statuses(
        &self,
        raw_node: &RawNode<Log>,
        age_ms: impl Fn(u64) -> u64,
    ) -> BTreeMap<NodeId, PeerStatus> {
        let raft = &raw_node.raft;
        let progress_of = |id| {
            let progress = raft.prs().get(id).filter(|_| raft.state == StateRole::Leader)?;
            Some(Progress {
                matched: progress.matched,
                next: progress.next_idx,
                state: match progress.state {
                    ProgressState::Probe => SendState::Probe,
                    ProgressState::Replicate => SendState::Replicate,
                    ProgressState::Snapshot => SendState::Snapshot,
                },
            })
        };
        let status = |(id, peer): (&NodeId, &Peer)| {
            let heard_ms = peer.last_heard.map(&age_ms);
            (*id, PeerStatus { heard_ms, sent: peer.sent, progress: progress_of(*id) })
        };
        self.connected.iter().map(status).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_passes_once_whatever_runs_come_between() {
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
