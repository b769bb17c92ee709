//! The raft node: the twin of the original's raft.go.
//!
//! [`RaftNode`] is a state machine first and a task second. Everything between "an input arrived" and
//! "write these bytes, send these messages, publish these entries" is synchronous code over three
//! seams: files ([`Vfs`](crate::storage::Vfs)), outgoing messages ([`Outbox`]) and time
//! ([`Input::Tick`]). [`serve`] is the task that feeds it. The same code runs under the simulation.
//!
//! # A turn
//! ```text
//! inputs ──▶ handle ──▶ (queues, raft) ──▶ handle_ready ──▶ files, messages, commitC
//! ```
//! A turn takes its share of the inputs before it looks at raft's `Ready`. Everything that arrived
//! meanwhile is therefore one frame of the write-ahead log and one fdatasync: group commit.
//!
//! # The order of a Ready (raft-rs `src/lib.rs`, thesis 10.2.1)
//! 1. Send a leader's messages: the followers write while this member does. [`journal`] has the table
//!    of those that have to wait.
//! 2. Publish the committed entries on commitC, and answer the reads that wait for them. raft hands out only
//!    entries that are on disk, so they need not wait for step 3. Changes of members and snapshots wait.
//! 3. Persist, as one frame: the snapshot's mark (its file is durable already), entries, hard state.
//! 4. Send the messages that waited: a follower acknowledges what was just made durable.
//! 5. Publish the snapshot and the entries that had to wait for step 3.
//! 6. Advance. What this member's own write committed comes out here, and so does the commit index,
//!    which goes into the next frame at the latest.
//!
//! On a slow disk steps 3 and 4 are given away ([`journal`], "The frame under way"), and what follows from
//! them is part of a later turn.
//!
//! # Who owns what
//! | state | owner |
//! |---|---|
//! | hard state, frames, what waits for the disk | [`journal`] |
//! | members and applied index | [`applied`] |
//! | bootstrapping, running or leaving | [`lifecycle`], [`bootstrap`] |
//! | snapshot files: kept, in the making, being sent, received | [`snapshots`] |
//! | requests in flight | [`writes`], [`reads`], [`changes`] |
//! | connected peers, who was heard, admission | [`peers`] |
//! | commit indexes that followers are told later | [`notices`] |
//! | commitC and its backlog | [`commits`] |
//! | ticks, the leader | [`clock`] |
//!
//! [`RaftNode`] composes them: the loop is here, `inputs.rs` says what each input does, and `apply.rs`
//! what is done with committed entries. [`validate`] decides which messages may be stepped, [`replay`]
//! starts from the disk.

use std::sync::Arc;

use raft::eraftpb::{Entry, EntryType, Message, MessageType};
use raft::{Raft, RawNode, Ready, StateRole};
use slog::{Logger, debug};
use tokio::sync::{mpsc, watch};

use crate::channels::{
    Commit, Index, MemberRequest, NodeId, PeerReport, RequestId, Responder, SnapshotRestore, Term,
};
use crate::error::{Error, Result};
use crate::storage::log::{Log, entry_bytes};
use crate::storage::snapshotter::Snapshot;
use crate::transport::Outbox;

pub mod applied;
mod apply;
pub mod bootstrap;
pub mod changes;
pub mod clock;
pub mod commits;
mod config;
pub mod inputs;
pub mod journal;
pub mod lifecycle;
pub mod notices;
pub mod peers;
pub mod reads;
pub mod replay;
pub mod serve;
pub mod snapshots;
pub mod state_machine;
pub mod status;
pub mod validate;
pub mod writes;

use applied::Applied;
use changes::{Changes, Context};
use clock::{Clock, Leadership};
use commits::Commits;
use config::start_raft;
pub use config::{ELECTION_TICKS, NodeConfig, SNAPSHOT_COUNT};
pub use inputs::Input;
use journal::{Background, Journal};
use lifecycle::Lifecycle;
use notices::Notices;
use peers::Peers;
use reads::Reads;
pub use replay::Replayed;
pub use serve::{RaftNodeHandle, new_raft_node};
use snapshots::Snapshots;
pub use status::{PeerStatus, Progress, Role, SendState, Sent, Status, TickStatus};
use writes::Writes;

/// The most entries of a frame that is given away to spare the node the way to a thread that may block.
const SMALL_FRAME: usize = 1;

/// Where a snapshot maker reports to; in a running member, the node's own queue of reports.
pub type ReportFn = Arc<dyn Fn(PeerReport) + Send + Sync>;

/// One member's raft node: the composition of the owners.
///
/// * `applied <= committed <= last`, and everything that was applied is in the write-ahead log.
/// * Every answer, vote and acknowledgement depends only on what was synced before. A leader's appends
///   may leave earlier; [`journal`] says which.
pub struct RaftNode {
    config: NodeConfig,
    logger: Logger,
    outbox: Box<dyn Outbox>,
    raw_node: RawNode<Log>,
    journal: Journal,
    applied: Applied,
    lifecycle: Lifecycle,
    snapshots: Snapshots,
    peers: Peers,
    notices: Notices,
    writes: Writes,
    reads: Reads,
    changes: Changes,
    commits: Commits,
    status_tx: watch::Sender<Status>,
    clock: Clock,
    /// The id that was given out last.
    last_id: RequestId,
}

/// What a turn needs to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Turn {
    /// Everything that the inputs made necessary is done.
    Done,
    /// The rest has to write: call [`RaftNode::handle_ready`] where blocking is allowed.
    NeedsDisk,
}

impl RaftNode {
    /// Makes the node from what was replayed. It does nothing until it is fed.
    ///
    /// # Errors
    /// If raft-rs refuses its configuration or what was replayed, or the first write fails.
    pub fn new(
        config: NodeConfig,
        replayed: Replayed,
        outbox: Box<dyn Outbox>,
        commit_tx: mpsc::UnboundedSender<Commit>,
        report: ReportFn,
        status_tx: watch::Sender<Status>,
        logger: Logger,
    ) -> Result<Self> {
        let Replayed { wal, snapshotter, identity, lock, applied, log, hard_state, .. } = replayed;
        let (index, term) = (applied.index(), applied.term());
        let snapshot_bytes = replayed.snapshot.as_ref().map_or(0, |it| it.file.length);
        let sizes = (log.bytes_after(index), snapshot_bytes);
        let snapshots = Snapshots::new(snapshotter, report, replayed.marks, sizes);
        let commits = Commits::new(commit_tx, hard_state.commit);
        let metrics = config.metrics.clone();
        let mut node = Self {
            outbox,
            raw_node: start_raft(&config, index, log, &logger)?,
            journal: Journal::new(wal, identity, hard_state, metrics, lock),
            applied,
            lifecycle: replayed.lifecycle,
            snapshots,
            peers: Peers::new(replayed.admission),
            notices: Notices::default(),
            writes: Writes::default(),
            reads: Reads::default(),
            changes: Changes::default(),
            commits,
            status_tx,
            clock: Clock::default(),
            last_id: RequestId { member: config.id, boot: config.boot, counter: 0 },
            config,
            logger,
        };
        if let Some(Snapshot { reader, .. }) = replayed.snapshot {
            node.commits.send(Commit::Restore(SnapshotRestore { index, term, reader }));
        }
        if matches!(node.lifecycle, Lifecycle::Quarantined(_)) && node.config.lift_quarantine {
            node.journal.quarantine(0)?;
            node.lifecycle = Lifecycle::Running;
        }
        node.log_quarantine();
        node.connect_members();
        node.start_if_bootstrapped()?;
        Ok(node)
    }

    /// Does everything that the inputs so far have made necessary. Writes, and so blocks.
    ///
    /// # Errors
    /// What stops the process: a failed write, or this member's removal.
    pub fn handle_ready(&mut self) -> Result<()> {
        let turn = self.turn(true)?;
        assert_eq!(turn, Turn::Done, "a turn that may write needs nothing");
        Ok(())
    }

    /// As [`handle_ready`](Self::handle_ready), but does not block. It begins to write in the background what
    /// is small, and stops before any other write.
    pub fn handle_ready_without_disk(&mut self) -> Result<Turn> {
        self.turn(false)
    }

    fn turn(&mut self, may_write: bool) -> Result<Turn> {
        loop {
            self.take_written();
            self.start_requests();
            if !self.raw_node.has_ready() {
                break;
            }
            if self.is_for_background(may_write) {
                self.gather_ready();
                continue;
            }
            if !may_write && self.needs_disk() {
                return Ok(Turn::NeedsDisk);
            }
            self.journal.finish()?;
            self.take_written();
            let mut ready = self.raw_node.ready();

            // 1. A leader's messages, unless they depend on what is not on disk yet.
            let commits_change = self.may_commit_change(ready.committed_entries());
            let messages = self.journal.release_early(&mut ready, commits_change);
            self.send(messages);

            // 2. The state machine, with entries that earlier frames hold.
            if !commits_change && ready.snapshot().is_empty() {
                self.publish_entries(ready.take_committed_entries());
                self.answer_reads();
            }

            // 3. The disk.
            let messages = self.persist(&mut ready, commits_change)?;

            // 4. What waited for it.
            self.send(messages);

            // 5. The state machine, with what had to wait for this frame.
            self.publish_snapshot(ready.snapshot())?;
            self.publish_entries(ready.take_committed_entries());
            let read_states = ready.take_read_states();

            // 6. What this member's own write committed.
            let mut light_ready = self.raw_node.advance_append(ready);
            if let Some(commit) = light_ready.commit_index() {
                self.journal.note_commit(commit);
            }
            if self.may_commit_change(light_ready.committed_entries()) {
                self.journal.flush()?;
            }
            self.send(light_ready.take_messages());
            self.publish_entries(light_ready.take_committed_entries());
            self.raw_node.advance_apply_to(self.applied.index());
            self.reads.take_states(read_states, &self.config);
        }
        self.snapshots.end_turn()?;
        self.check_own_binding()?;
        if !matches!(self.lifecycle, Lifecycle::Bootstrapping(_)) {
            self.commits.note_applied(self.applied.index());
        }
        self.answer_reads();
        self.note_leadership();
        self.request_snapshot();
        self.publish_status();
        let (raft, members) = (&self.raw_node.raft, self.applied.members());
        match self.lifecycle.may_end(raft, members, self.clock.now()) {
            true if may_write => {
                self.stop()?;
                Err(Error::Removed)
            }
            true => Ok(Turn::NeedsDisk),
            false => Ok(Turn::Done),
        }
    }

    /// Tells raft what the background has written, and sends what waited for that.
    fn take_written(&mut self) {
        if let Some((ready, messages)) = self.journal.take_written() {
            self.raw_node.on_persist_ready(ready);
            self.send(messages);
        }
    }

    /// True if the next Ready goes to the background, or behind what it writes. A turn that may write itself
    /// does so where the disk is fast.
    ///
    /// While a change of members is not applied, the order stays that of `turn`, where `commits_change` holds
    /// back what may commit it. Entries of a single voter stay, too: nothing else commits them, and raft
    /// asserts that they are on disk when that voter campaigns.
    fn is_for_background(&self, may_write: bool) -> bool {
        let raft = &self.raw_node.raft;
        let unstable = &raft.raft_log.unstable;
        let is_worth_it = self.journal.is_slow()
            || (!may_write
                && unstable.entries.len() <= SMALL_FRAME
                && self.journal.has_background());
        (self.journal.is_writing() || (is_worth_it && self.journal.has_work(raft)))
            && unstable.snapshot.is_none()
            && !holds_change(&unstable.entries)
            && self.allows_background()
    }

    fn allows_background(&self) -> bool {
        matches!(self.lifecycle, Lifecycle::Running)
            && !self.raw_node.raft.prs().is_singleton()
            && !self.has_unapplied_change()
    }

    /// True if the frames are so small that this node needs no thread for them.
    pub fn writes_little(&self) -> bool {
        self.journal.has_background()
            && self.journal.last_entries() <= SMALL_FRAME
            && self.allows_background()
    }

    fn has_unapplied_change(&self) -> bool {
        has_unapplied_change(&self.raw_node, &self.applied)
    }

    /// Takes a Ready whose frame is written in the background, in the order of `turn`. What comes after the
    /// disk there is done by [`take_written`](Self::take_written), or is in a later Ready.
    fn gather_ready(&mut self) {
        let mut ready = self.raw_node.ready();
        let messages = self.journal.release_early(&mut ready, false);
        self.send(messages);
        self.publish_entries(ready.take_committed_entries());
        self.answer_reads();
        self.snapshots.note_log(ready.entries().iter().map(entry_bytes).sum());
        let messages = self.journal.gather(&mut ready, self.raw_node.mut_store());
        self.send(messages);
        let read_states = ready.take_read_states();
        self.raw_node.advance_append_async(ready);
        self.raw_node.advance_apply_to(self.applied.index());
        self.reads.take_states(read_states, &self.config);
    }

    /// Has frames written by `background` where the disk is slow. Without one, the node writes them.
    pub fn set_background(&mut self, background: Box<dyn Background>) {
        self.journal.set_background(background);
    }

    /// Holds back commit notices. The caller feeds [`Input::NoticesDue`] about two milliseconds after
    /// [`held_notices`](Self::held_notices) has changed. Without this call all are sent at once.
    pub fn hold_notices(&mut self) {
        self.notices.hold();
    }

    /// The number of the notices that are held back together. It changes once none of them is left.
    pub fn held_notices(&self) -> Option<u64> {
        self.notices.batch()
    }

    /// Term and vote on disk.
    pub fn saved_term_and_vote(&self) -> (Term, NodeId) {
        self.journal.saved_term_and_vote()
    }

    /// True while a frame is under way.
    pub fn is_writing(&self) -> bool {
        self.journal.is_writing()
    }

    /// False if proposals are better left in proposeC. Those that arrive during a leader's frame go to the
    /// followers as one message, because the followers are busy with the same frame. Where the next frame has
    /// begun to gather, because others forwarded writes, they join it: such frames may follow each other
    /// without end.
    pub fn takes_writes(&self) -> bool {
        !(self.journal.is_writing() && self.is_leader()) || self.journal.has_gathered()
    }

    /// Answers the confirmed reads whose entries are published.
    fn answer_reads(&mut self) {
        for responders in self.reads.take_applied(self.applied.index()) {
            self.commits.send(Commit::Reads(responders));
        }
    }

    /// Writes what only the next frame would have held. Dropping the node then closes commitC.
    pub fn stop(&mut self) -> Result<()> {
        self.journal.finish()?;
        self.journal.flush()
    }

    /// True while a ReadIndex round, or a write that reads ride along with, is on its way: reads that arrive now
    /// wait for its end.
    pub fn is_reading(&self) -> bool {
        self.reads.is_reading(&self.raw_node, self.own_write())
    }

    /// raft's own state, to be looked at.
    pub fn raft(&self) -> &raft::Raft<Log> {
        &self.raw_node.raft
    }

    fn is_leader(&self) -> bool {
        self.raw_node.raft.state == StateRole::Leader
    }

    /// The last request that was proposed here, if it is a write that may still be committed.
    fn own_write(&self) -> Option<RequestId> {
        let under = Leadership::of(&self.raw_node);
        self.writes.may_commit(self.last_id, under).then_some(self.last_id)
    }

    /// True if the next Ready writes. It may also be true if the Ready only might commit a change.
    fn needs_disk(&self) -> bool {
        let committed = self.raw_node.raft.raft_log.committed;
        let may_commit_change = committed > self.applied.index() && self.has_unapplied_change();
        self.journal.is_writing() || self.journal.has_work(&self.raw_node.raft) || may_commit_change
    }

    /// True if these committed entries hold a change of members, or if the leader may have committed one that
    /// raft has not handed out yet.
    fn may_commit_change(&self, entries: &[Entry]) -> bool {
        let committed = self.raw_node.raft.raft_log.committed;
        let is_part = entries.last().is_some_and(|last| last.index < committed);
        holds_change(entries) || (is_part && self.is_leader() && self.has_unapplied_change())
    }

    /// Hands the waiting requests to raft, as far as its state allows.
    fn start_requests(&mut self) {
        let is_running = matches!(self.lifecycle, Lifecycle::Running);
        self.changes.propose(&mut Context {
            config: &self.config,
            logger: &self.logger,
            applied: &self.applied,
            peers: &self.peers,
            clock: &self.clock,
            is_running,
            raw_node: &mut self.raw_node,
            last_id: &mut self.last_id,
            outbox: &mut *self.outbox,
        });
        if !is_running {
            return;
        }
        self.reads.allow_rides(!self.journal.is_slow());
        self.reads.take_riders(&mut self.raw_node);
        let raft = &self.raw_node.raft;
        let takes_writes = raft.leader_id != raft::INVALID_ID
            // raft would drop them during a transfer of leadership.
            && raft.lead_transferee.is_none()
            && (self.is_leader() || !self.peers.is_out_of_reach(raft.leader_id))
            && !self.commits.is_full();
        if takes_writes {
            self.writes.propose(&mut self.raw_node, &mut self.last_id);
        }
        let (own_write, now) = (self.own_write(), self.clock.now());
        self.reads.start_round(&mut self.raw_node, own_write, &self.config, now);
    }

    /// Sends raft's messages, unless this member no longer takes part. The outcome of a snapshot is
    /// always reported back later.
    fn send(&mut self, messages: Vec<Message>) {
        if !self.lifecycle.takes_part() {
            // What this turn answered before it found the loss would still count elsewhere.
            return;
        }
        for message in messages {
            if self.reads.spares(&message, &self.raw_node.raft) {
                continue;
            }
            let has_unapplied_change = || has_unapplied_change(&self.raw_node, &self.applied);
            let message = self.notices.pass(message, &self.raw_node.raft, has_unapplied_change);
            self.dispatch(message);
        }
    }

    /// Sends the notices that were held back.
    fn send_notices(&mut self) {
        let messages = self.notices.take(&self.raw_node.raft);
        if self.lifecycle.takes_part() {
            self.dispatch(messages);
        }
    }

    fn dispatch(&mut self, messages: impl IntoIterator<Item = Message>) {
        for mut message in messages {
            self.peers.note_sent(&message);
            match message.get_msg_type() {
                MessageType::MsgSnapshot => {
                    let file = self.snapshots.start_sending(&message);
                    self.outbox.send_snapshot(message, file);
                    continue;
                }
                // raft sends it without a term. The receiver needs the term of the leader that it is
                // meant for: in another term the same member may lead in another run, which does not
                // know that it took this proposal already.
                MessageType::MsgPropose => message.log_term = self.raw_node.raft.term,
                MessageType::MsgAppend => mend_append(&mut message, &self.raw_node.raft),
                _ => {}
            }
            self.outbox.send(message);
        }
    }

    /// Writes a Ready; returns the messages that waited for that.
    fn persist(&mut self, ready: &mut Ready, commits_change: bool) -> Result<Vec<Message>> {
        let log = self.raw_node.mut_store();
        let messages = self.journal.write_ready(ready, commits_change, log)?;
        if !ready.snapshot().is_empty() {
            let index = ready.snapshot().get_metadata().index;
            debug!(self.logger, "replaced the log by the snapshot at index {}", index);
        }
        self.snapshots.note_log(ready.entries().iter().map(entry_bytes).sum());
        // An append that replaces entries may take back a move.
        if self.peers.admission().has_pending_moves() || holds_change(ready.entries()) {
            self.update_admission();
        }
        Ok(messages)
    }
}

/// Names the entry before the first one of an append. raft-rs 0.7 (`try_batching`) adds entries to an append
/// that waits to be sent without any, whatever entry that one follows on.
fn mend_append(message: &mut Message, raft: &Raft<Log>) {
    let Some(first) = message.entries.first() else { return };
    if first.index != message.index + 1 {
        let before = first.index - 1;
        // A member that leads no more in that term may have another entry there by now.
        let leads = raft.state == StateRole::Leader && raft.term == message.term;
        match raft.raft_log.term(before) {
            Ok(term) if leads => (message.index, message.log_term) = (before, term),
            // raft sends what is needed when the receiver answers.
            _ => message.entries.clear(),
        }
    }
}

fn has_unapplied_change(raw_node: &RawNode<Log>, applied: &Applied) -> bool {
    raw_node.store().has_conf_change_after(applied.index())
}

fn holds_change(entries: &[Entry]) -> bool {
    entries.iter().any(|entry| entry.get_entry_type() != EntryType::EntryNormal)
}
