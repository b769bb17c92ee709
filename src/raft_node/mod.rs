//! The raft node: the twin of the original's raft.go.
//!
//! [`RaftNode`] is a state machine first and a task second. Everything between "an input arrived"
//! and "these bytes must be written, these messages sent, these entries published" is plain
//! synchronous code over three seams: files ([`Vfs`](crate::storage::Vfs)), outgoing messages
//! ([`Outbox`]) and time ([`Input::Tick`]). [`serve`] is the task that feeds it.
//!
//! # A turn
//! ```text
//! inputs ──▶ handle ──▶ (queues, raft) ──▶ handle_ready ──▶ files, messages, commitC
//! ```
//! A turn drains its share of the inputs before it looks at raft's `Ready`, so everything that
//! arrived meanwhile is one frame of the write-ahead log and one fdatasync: group commit.
//!
//! # The order of a Ready (raft-rs `src/lib.rs`, thesis 10.2.1)
//! 1. A leader's messages: the followers may write while we do. Not if the Ready holds a new term or
//!    vote: a leader that forgot its vote would use the term a second time. Nor if it commits a change
//!    of members: a member that hears of its removal leaves, and a leader of two that forgot that it
//!    was committed would need the one that left to find out.
//! 2. Persist, as one frame: the snapshot's mark (its file is durable already), entries, hard state.
//! 3. A follower's messages: each acknowledges what was just made durable.
//! 4. Publish the snapshot, then the committed entries, on commitC.
//! 5. Advance. What becomes committed by our own write comes out here, and so does the commit index,
//!    which goes into the next frame at the latest.
//!
//! # Where the rest is
//! [`replay`] starts from the disk; [`bootstrap`] gets a new member going; [`peers`] is what arrives from
//! the others, and [`validate`] what of it may be stepped; [`requests`] holds the writes and reads
//! that wait; [`changes`] proposes and applies changes of members; [`snapshots`] makes and takes over
//! snapshots; [`serve`] is the task.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use raft::eraftpb::{ConfState, Entry, EntryType, HardState, Message, MessageType};
use raft::{RawNode, StateRole};
use slog::{Logger, debug, error, info};
use tokio::sync::{mpsc, watch};

use crate::channels::{
    Acknowledged, Applied, Commit, CommittedEntry, ConfChangeRequest, Greeting, Index,
    MemberRequest, NodeId, PeerReport, Proposal, ReadRequest, RequestId, Responder, SnapshotFile,
    SnapshotRestore, Term,
};
use crate::codec;
use crate::error::{Error, RequestError, Result};
use crate::membership::{Admission, Members, SnapshotData, SnapshotMembers};
use crate::storage::log::{Log, entry_bytes};
use crate::storage::snapshotter::Snapshotter;
use crate::storage::wal::{Frame, Identity, SnapshotId, Wal};
use crate::transport::{Inbound, Outbox};

pub mod bootstrap;
pub mod changes;
mod config;
pub mod peers;
pub mod replay;
pub mod requests;
pub mod serve;
pub mod snapshots;
pub mod state_machine;
pub mod status;
pub mod validate;

use bootstrap::Bootstrapping;
use changes::Changes;
use config::raft_config;
pub use config::{NodeConfig, SNAPSHOT_COUNT};
use peers::Peers;
pub use replay::Replayed;
use requests::{Confirmers, Proposals, Reads};
pub use serve::{RaftNodeHandle, new_raft_node};
pub use status::{PeerStatus, Progress, Role, SendState, Sent, Status, TickStatus};

/// A snapshot is due after this much log, however few entries that is.
const SNAPSHOT_LOG_BYTES: u64 = 32 << 20;
/// A snapshot larger than this is not followed by another before as much log has gathered.
const SMALL_SNAPSHOT_BYTES: u64 = 1 << 20;
/// No more log than this is kept behind a snapshot for members that are a little behind.
const CATCH_UP_BYTES: u64 = 64 << 20;
/// Past this much committed but not yet applied, neither proposals nor appends are taken.
const OUTSTANDING_BYTES_MAX: u64 = 64 << 20;
/// raft refuses proposals past this much log that is not committed yet.
const UNCOMMITTED_BYTES_MAX: u64 = 64 << 20;
/// The largest append message, if it holds more than one entry; the original's figure.
const APPEND_BYTES_MAX: u64 = 1 << 20;
/// Appends on their way to one member; the original's figure.
const INFLIGHT_APPENDS_MAX: usize = 256;

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
    /// From our own senders and snapshot makers.
    Report(PeerReport),
    /// Time.
    Tick,
}

/// Where a snapshot maker reports to; in a running member, the node's own queue of reports.
pub type ReportFn = Arc<dyn Fn(PeerReport) + Send + Sync>;

/// One member's raft node.
///
/// * `applied <= committed <= last`, and everything that was applied is in the write-ahead log.
/// * `members`, `conf_state` and what was published on commitC are all as of `applied_index`.
/// * Whatever is sent or answered depends only on what was synced before.
pub struct RaftNode {
    config: NodeConfig,
    logger: Logger,

    // The seams.
    outbox: Box<dyn Outbox>,
    commit_tx: mpsc::UnboundedSender<Commit>,
    report: ReportFn,
    status_tx: watch::Sender<Status>,

    // On disk. The lock is held as long as the files are open.
    wal: Wal,
    snapshotter: Snapshotter,
    identity: Identity,
    _lock: Box<dyn std::any::Any + Send>,

    // Raft, and what the next frame has to hold of it.
    raw_node: RawNode<Log>,
    hard_state: HardState,
    hard_state_is_unsaved: bool,

    // The replicated state that is raft's own, as of the applied index.
    members: Members,
    conf_state: ConfState,
    applied_index: Index,
    applied_term: Term,
    /// What was known to be committed at the last stop; `None` once it is applied again.
    replay_until: Option<Index>,

    // Snapshots.
    /// The ones kept, oldest first, two at most.
    marks: Vec<SnapshotId>,
    /// Asked of the state machine, with the members as of its index. Its file may be there already.
    making: Option<(SnapshotId, SnapshotMembers)>,
    sending: BTreeMap<NodeId, SnapshotId>,
    /// Received in this turn: not to be purged before raft has seen them.
    received: Vec<SnapshotId>,
    bytes_since_snapshot: u64,
    last_snapshot_bytes: u64,
    outstanding_bytes: Arc<AtomicU64>,

    // Others.
    admission: Arc<Admission>,
    peers: Peers,
    beginning: Option<Bootstrapping>,

    // Requests.
    proposals: Proposals,
    reads: Reads,
    confirmers: Confirmers,
    changes: Changes,
    request_counter: u64,

    ticks: u64,
    /// The last call to watch that was heard, and until which tick it counts.
    watched: (u64, u64),
    /// Made at a tick, to be published.
    tick_status: Option<TickStatus>,
    last_leadership: Leadership,
    /// The tick at which we were elected, if we lead.
    leads_since: u64,
    leaving: Option<Leaving>,
}

/// Under whom a request was proposed. A change of it means that the request may be lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Leadership {
    term: Term,
    leader: NodeId,
}

/// We were removed. A leader stays until a majority of the others knows, so that they need no
/// election timeout to find that out, and no longer than such a timeout.
///
/// If a single member remains there is no such limit, and who does not lead stays as well: until that
/// one knows, it counts two members, and cannot be elected without us.
struct Leaving {
    removal: Index,
    until_tick: u64,
}

fn holds_change(entries: &[Entry]) -> bool {
    entries.iter().any(|entry| entry.get_entry_type() != EntryType::EntryNormal)
}

impl RaftNode {
    /// Makes the node from what was replayed. It does nothing until it is fed.
    ///
    /// # Errors
    /// If raft-rs refuses its configuration or what was replayed.
    pub fn new(
        config: NodeConfig,
        replayed: Replayed,
        outbox: Box<dyn Outbox>,
        commit_tx: mpsc::UnboundedSender<Commit>,
        report: ReportFn,
        status_tx: watch::Sender<Status>,
        logger: Logger,
    ) -> Result<Self> {
        let Replayed {
            wal, snapshotter, identity, lock, admission, log, hard_state, marks, ..
        } = replayed;
        let SnapshotMembers { members, .. } = &replayed.snapshot_members;
        let (members, conf_state) = (members.clone(), replayed.snapshot_members.conf_state());
        let snapshot = replayed.snapshot;
        let (applied_index, applied_term) =
            snapshot.as_ref().map_or((0, 0), |snapshot| (snapshot.index, snapshot.term));
        let bytes_since_snapshot = log.bytes_behind(applied_index);
        let raw_node = RawNode::new(&raft_config(&config, applied_index), log, &logger)
            .map_err(|error| Error::Refused(format!("raft cannot start: {error}")))?;
        let beginning = replayed.beginning.then(|| Bootstrapping::new(&config));
        let mut node = Self {
            outbox,
            commit_tx,
            report,
            status_tx,
            wal,
            snapshotter,
            identity,
            _lock: lock,
            raw_node,
            replay_until: Some(hard_state.commit),
            hard_state,
            hard_state_is_unsaved: false,
            members,
            conf_state,
            applied_index,
            applied_term,
            marks,
            making: None,
            sending: BTreeMap::new(),
            received: Vec::new(),
            bytes_since_snapshot,
            last_snapshot_bytes: snapshot.as_ref().map_or(0, |snapshot| snapshot.file.length),
            outstanding_bytes: Arc::default(),
            admission,
            peers: Peers::default(),
            beginning,
            proposals: Proposals::default(),
            reads: Reads::default(),
            confirmers: Confirmers::default(),
            changes: Changes::default(),
            request_counter: 0,
            ticks: 0,
            watched: (0, 0),
            tick_status: None,
            last_leadership: Leadership::default(),
            leads_since: 0,
            leaving: None,
            config,
            logger,
        };
        if let Some(snapshot) = snapshot {
            node.publish(Commit::Restore(SnapshotRestore {
                index: snapshot.index,
                term: snapshot.term,
                reader: snapshot.reader,
            }));
        }
        node.connect_members();
        node.try_to_begin()?;
        Ok(node)
    }

    /// Takes one input in. Nothing is written or answered with success before
    /// [`handle_ready`](Self::handle_ready).
    ///
    /// # Errors
    /// What stops the process.
    pub fn handle(&mut self, input: Input) -> Result<()> {
        match input {
            Input::Propose(proposal) => self.proposals.push(proposal),
            Input::Read(request) => self.reads.push(request.responder),
            Input::ConfChange(request) => self.changes.push(request),
            Input::Inbound(inbound) => self.receive(inbound)?,
            Input::Report(report) => self.take_report(report)?,
            Input::Tick => self.tick()?,
        }
        Ok(())
    }

    /// Does everything that the inputs so far have made necessary.
    ///
    /// # Errors
    /// What stops the process: a failed write, or our own removal.
    pub fn handle_ready(&mut self) -> Result<()> {
        loop {
            self.propose_changes();
            self.propose_waiting();
            self.start_read_round();
            if !self.raw_node.has_ready() {
                break;
            }
            let mut ready = self.raw_node.ready();

            // 1. A leader's messages, unless they speak for what has to be on disk first.
            let is_new_term_or_vote = ready.hs().is_some_and(|hs| {
                hs.term != self.hard_state.term || hs.vote != self.hard_state.vote
            });
            let commits_change = self.may_commit_change(ready.committed_entries());
            let mut after_sync = ready.take_messages();
            if !is_new_term_or_vote && !commits_change {
                self.process_messages(std::mem::take(&mut after_sync));
            }

            // 2. The disk.
            self.persist(&ready, commits_change)?;

            // 3. What waited for it.
            self.process_messages(after_sync);
            self.process_messages(ready.take_persisted_messages());

            // 4. The state machine.
            self.publish_snapshot(ready.snapshot())?;
            self.publish_entries(ready.take_committed_entries());
            let read_states = ready.take_read_states();

            // 5. What our own write committed.
            let mut light_ready = self.raw_node.advance_append(ready);
            if let Some(commit) = light_ready.commit_index() {
                self.hard_state.commit = commit;
                self.hard_state_is_unsaved = true;
            }
            if self.may_commit_change(light_ready.committed_entries()) {
                self.save_hard_state()?;
            }
            self.process_messages(light_ready.take_messages());
            self.publish_entries(light_ready.take_committed_entries());
            self.raw_node.advance_apply_to(self.applied_index);
            self.take_read_states(read_states);
        }
        if !std::mem::take(&mut self.received).is_empty() {
            // What raft ignored is purged.
            self.purge_snapshots()?;
        }
        self.publish_replayed();
        self.publish_reads();
        self.note_leadership();
        self.maybe_trigger_snapshot();
        self.publish_status();
        self.check_leaving()
    }

    /// Writes what only the next frame would have held. Dropping the node then closes commitC.
    ///
    /// # Errors
    /// If the write fails.
    pub fn stop(&mut self) -> Result<()> {
        self.save_hard_state()
    }

    /// True from when a snapshot is asked of the state machine until its file is reported.
    pub fn is_making_snapshot(&self) -> bool {
        self.making.is_some()
    }

    /// True if the next [`handle_ready`](Self::handle_ready) may write. If not, it hardly ever does.
    pub fn may_write(&self) -> bool {
        let raft = &self.raw_node.raft;
        let hard_state = raft.hard_state();
        (hard_state.term, hard_state.vote) != (self.hard_state.term, self.hard_state.vote)
            || self.has_unsaved_entries()
            || raft.raft_log.committed > self.applied_index
            || self.proposals.are_waiting()
            || self.changes.are_waiting()
            || self.leaving.is_some()
    }

    /// True if the next [`handle_ready`](Self::handle_ready) has entries to write.
    pub fn has_unsaved_entries(&self) -> bool {
        !self.raw_node.raft.raft_log.unstable.entries.is_empty()
    }

    /// True if we lead, and not all of our log is committed.
    pub fn awaits_acknowledgements(&self) -> bool {
        let log = &self.raw_node.raft.raft_log;
        self.is_leader() && log.committed < log.last_index()
    }

    /// raft's own state, to be looked at.
    pub fn raft(&self) -> &raft::Raft<Log> {
        &self.raw_node.raft
    }

    /// True if a change of members is among these committed entries, or may be among those that the
    /// leader has committed and raft has not handed out yet.
    fn may_commit_change(&self, entries: &[Entry]) -> bool {
        let committed = self.raw_node.raft.raft_log.committed;
        let is_part = entries.last().is_some_and(|last| last.index < committed);
        holds_change(entries) || (is_part && self.is_leader())
    }

    fn leadership(&self) -> Leadership {
        Leadership { term: self.raw_node.raft.term, leader: self.raw_node.raft.leader_id }
    }

    fn is_leader(&self) -> bool {
        self.raw_node.raft.state == StateRole::Leader
    }

    fn next_request_id(&mut self) -> RequestId {
        self.request_counter += 1;
        RequestId { member: self.config.id, boot: self.config.boot, counter: self.request_counter }
    }

    fn tick(&mut self) -> Result<()> {
        self.ticks += 1;
        self.config.metrics.ticked();
        self.confirmers.forget();
        if self.beginning.is_none() {
            self.raw_node.tick();
            self.campaign_alone();
        }
        self.proposals.forget_closed();
        self.reads.forget_closed();
        self.relay_own_removal();
        self.forget_strangers();
        self.greet_others();
        self.ask_others();
        self.tick_status = Some(self.make_tick_status());
        // A commit index that no frame took along since the last tick is written by itself, so that
        // a restart of an idle member replays all that it knew.
        self.save_hard_state()
    }

    /// Has a member elected that is alone in its cluster: there is nobody whose election it would have
    /// to wait for. With a leader it waits all the same: one that is alone only by what an old copy of
    /// its directory says must not stop the others.
    fn campaign_alone(&mut self) {
        let raft = &self.raw_node.raft;
        let is_alone = self.conf_state.voters == [self.config.id]
            && raft.prs().is_singleton()
            && raft.promotable();
        // It is elected on the spot, and raft asserts that a new leader's log is on disk.
        let is_persisted = raft.raft_log.persisted == raft.raft_log.last_index();
        if is_alone && is_persisted && raft.leader_id == raft::INVALID_ID {
            // raft refuses while it has not applied a change of members that it knows to be committed.
            let _ = self.raw_node.campaign();
        }
    }

    fn save_hard_state(&mut self) -> Result<()> {
        if !self.hard_state_is_unsaved {
            return Ok(());
        }
        self.wal.save(&Frame { hard_state: Some(&self.hard_state), ..Frame::default() })?;
        self.hard_state_is_unsaved = false;
        Ok(())
    }

    /// Sends what raft wants sent. The outcome of a snapshot is reported to raft later, always.
    fn process_messages(&mut self, messages: Vec<Message>) {
        for mut message in messages {
            if self.confirmers.spare(&message, &self.raw_node.raft) {
                continue;
            }
            self.peers.count_sent(&message);
            if message.get_msg_type() == MessageType::MsgPropose {
                // raft sends it without a term. This is whose leader it is meant for: in another
                // term the same member leads in another run, perhaps, which does not know any more
                // that it took this one already.
                message.log_term = self.raw_node.raft.term;
            }
            if message.get_msg_type() != MessageType::MsgSnapshot {
                self.outbox.send(message);
                continue;
            }
            let metadata = message.get_snapshot().get_metadata();
            let mark = SnapshotId { index: metadata.index, term: metadata.term };
            // Not the log's: a newer one may have been made since raft asked for it.
            let data: SnapshotData =
                codec::decode(&message.get_snapshot().data).expect("we encoded it");
            let file = SnapshotFile { length: data.length, checksum: data.checksum };
            self.sending.insert(message.to, mark);
            self.outbox.send_snapshot(message, file);
        }
    }

    /// Makes a Ready durable: one frame, one sync. A commit index alone waits for the next frame:
    /// losing it loses nothing, unless it commits a change of members.
    fn persist(&mut self, ready: &raft::Ready, commits_change: bool) -> Result<()> {
        if let Some(hard_state) = ready.hs() {
            self.hard_state = hard_state.clone();
            self.hard_state_is_unsaved = true;
        }
        if !ready.must_sync() {
            return if commits_change { self.save_hard_state() } else { Ok(()) };
        }
        let metadata = ready.snapshot().get_metadata();
        let mark = (!ready.snapshot().is_empty())
            .then_some(SnapshotId { index: metadata.index, term: metadata.term });
        if let Some(mark) = mark {
            assert!(
                self.hard_state.commit >= mark.index,
                "commit {} is behind the snapshot at {}",
                self.hard_state.commit,
                mark.index
            );
        }
        let began = Instant::now();
        self.wal.save(&Frame {
            installed: mark,
            entries: ready.entries(),
            hard_state: self.hard_state_is_unsaved.then_some(&self.hard_state),
            ..Frame::default()
        })?;
        self.config.metrics.wal_fsync.observe(began.elapsed().as_secs_f64());
        self.hard_state_is_unsaved = false;

        let log = self.raw_node.mut_store();
        if let Some(mark) = mark {
            self.config.metrics.snapshots_installed.inc();
            log.apply_snapshot(ready.snapshot().clone());
            debug!(self.logger, "replaced the log by the snapshot at index {}", mark.index);
        }
        log.append(ready.entries());
        // An append that replaces others may take back a change of members.
        if self.admission.has_pending_moves() || holds_change(ready.entries()) {
            self.update_admission();
        }
        self.bytes_since_snapshot += ready.entries().iter().map(entry_bytes).sum::<u64>();
        Ok(())
    }

    /// The committed entries that were not published yet. raft-rs hands each out once; the check is
    /// the original's.
    fn entries_to_apply(&self, mut entries: Vec<Entry>) -> Vec<Entry> {
        let Some(first) = entries.first() else { return entries };
        assert!(
            first.index <= self.applied_index + 1,
            "first index of committed entry[{}] should <= progress.appliedIndex[{}]+1",
            first.index,
            self.applied_index
        );
        let applied = (self.applied_index + 1 - first.index) as usize;
        entries.drain(..applied.min(entries.len()));
        entries
    }

    /// Publishes committed entries on commitC, and applies those that change the members here.
    fn publish_entries(&mut self, entries: Vec<Entry>) {
        let entries = self.entries_to_apply(entries);
        let Some(last) = entries.last() else { return };
        let last = (last.index, last.term);
        let mut committed = Vec::with_capacity(entries.len());
        let (mut bytes, mut own) = (0, 0);
        let has_changes = holds_change(&entries);
        for entry in entries {
            match entry.get_entry_type() {
                EntryType::EntryNormal => {
                    let request_id = RequestId::from_bytes(&entry.context);
                    // raft's own: a new leader's first entry, or a change that raft put aside.
                    if request_id.is_none() && entry.data.is_empty() {
                        continue;
                    }
                    bytes += entry_bytes(&entry);
                    let responder = request_id.and_then(|id| self.proposals.take(id));
                    own += u64::from(responder.is_some());
                    committed.push(CommittedEntry {
                        index: entry.index,
                        term: entry.term,
                        responder,
                        data: entry.data,
                    });
                }
                EntryType::EntryConfChange => self.apply_conf_change(&entry),
                // Never proposed here, and validation refuses it from peers.
                EntryType::EntryConfChangeV2 => {
                    error!(self.logger, "skipping a joint change of members"; "index" => entry.index);
                }
            }
        }
        if !committed.is_empty() {
            let applied = Applied::new(bytes, &self.outstanding_bytes);
            self.publish(Commit::Entries { entries: committed, applied });
        }
        self.config.metrics.proposals_committed.inc_by(own);
        (self.applied_index, self.applied_term) = last;
        if has_changes {
            self.update_admission();
        }
    }

    fn publish(&self, commit: Commit) {
        // A closed commitC means that the state machine stopped: the task that feeds us sees that
        // by itself and stops us.
        let _ = self.commit_tx.send(commit);
    }

    fn publish_replayed(&mut self) {
        let is_replayed = self.replay_until.is_some_and(|until| self.applied_index >= until);
        if is_replayed && self.beginning.is_none() {
            self.replay_until = None;
            self.publish(Commit::Replayed);
        }
    }

    fn role(&self) -> Role {
        let raft = &self.raw_node.raft;
        match raft.state {
            _ if self.beginning.is_some() => Role::Bootstrapping,
            StateRole::Follower if self.conf_state.learners.contains(&self.config.id) => {
                Role::Learner
            }
            StateRole::Follower => Role::Follower,
            StateRole::PreCandidate => Role::PreCandidate,
            StateRole::Candidate => Role::Candidate,
            StateRole::Leader => Role::Leader,
        }
    }

    /// The milliseconds that so many ticks take.
    fn milliseconds(&self, ticks: u64) -> u64 {
        ticks.saturating_mul(self.config.tick.as_millis() as u64)
    }

    fn make_tick_status(&self) -> TickStatus {
        let metrics = &self.config.metrics;
        TickStatus {
            uptime_ms: metrics.uptime().as_millis() as u64,
            version: env!("CARGO_PKG_VERSION").into(),
            wal_bytes: self.wal.bytes(),
            keys: metrics.keys.get() as u64,
            store_bytes: metrics.store_bytes.get() as u64,
            puts: metrics.puts.totals(),
            gets: metrics.gets.totals(),
            peers: self.peer_statuses(),
        }
    }

    fn publish_status(&mut self) {
        let raft = &self.raw_node.raft;
        self.config.metrics.proposals_pending.set(self.proposals.count() as i64);
        let status = Status {
            id: self.config.id,
            cluster_id: self.identity.cluster_id,
            role: self.role(),
            term: raft.term,
            vote: raft.vote,
            leader: raft.leader_id,
            commit: raft.raft_log.committed,
            applied: self.applied_index,
            snapshot: self.snapshot_index(),
            first: raft.raft_log.first_index(),
            last: raft.raft_log.last_index(),
            begun: self.beginning.is_none(),
            members: Members::default(),
            learners: self.conf_state.learners.clone(),
            tick: TickStatus::default(),
        };
        self.status_tx.send_if_modified(|old| {
            // These two are large, and seldom new.
            let members = std::mem::take(&mut old.members);
            let tick = std::mem::take(&mut old.tick);
            let is_new = *old != status || members != self.members || self.tick_status.is_some();
            *old = status;
            old.members = if members == self.members { members } else { self.members.clone() };
            old.tick = self.tick_status.take().unwrap_or(tick);
            is_new
        });
    }

    /// Brings the peers that are connected in line with the members, and lets the transport know who
    /// may speak.
    fn connect_members(&mut self) {
        self.update_admission();
        for (id, url) in self.admission.other_members() {
            self.peers.add_member(id, &url);
            self.outbox.add_peer(id, &url);
        }
        for id in self.peers.remove_members_not_in(&self.members) {
            self.outbox.remove_peer(id);
        }
    }

    fn update_admission(&self) {
        self.admission.update(self.identity.cluster_id, &self.members, self.pending_moves());
    }

    /// Answers the requests that a change of leader or term leaves in doubt, and logs it in the words
    /// of the original.
    fn note_leadership(&mut self) {
        let (old, new) = (self.last_leadership, self.leadership());
        if old == new {
            return;
        }
        self.last_leadership = new;
        self.peers.forget_heartbeats();
        if new.leader == self.config.id {
            self.leads_since = self.ticks;
        }
        if new.leader != old.leader && new.leader != raft::INVALID_ID {
            self.config.metrics.leader_changes.inc();
        }
        let id = self.config.id;
        match (old.leader, new.leader) {
            (a, b) if a == b => {}
            (0, to) => {
                info!(self.logger, "raft.node: {} elected leader {} at term {}", id, to, new.term)
            }
            (from, 0) => {
                info!(self.logger, "raft.node: {} lost leader {} at term {}", id, from, new.term)
            }
            (from, to) => info!(
                self.logger,
                "raft.node: {} changed leader from {} to {} at term {}", id, from, to, new.term
            ),
        }
        let failed = self.proposals.fail_other_than(new);
        self.config.metrics.proposals_failed.inc_by(failed);
        self.changes.fail_other_than(new);
    }
}
