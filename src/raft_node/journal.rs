//! The journal: the only caller of the write-ahead log.
//!
//! It owns what has to be durable, and what has to wait until it is: raft's hard state, the messages
//! of a `Ready`, and the answer to "is anything unsaved?". The log in memory, which raft reads, changes
//! only after the write-ahead log did.
//!
//! # What waits for the disk
//! | message | leaves |
//! |---|---|
//! | a leader's append, heartbeat | before the leader's own write: followers write at the same time (thesis 10.2.1) |
//! | the same, in a Ready with a new term or vote | after it: a leader that forgot its vote would use the term again |
//! | the same, in a Ready that may commit a change of members | after it: see [`Journal::release_early`] |
//! | a follower's acknowledgement, a vote | after it |
//!
//! # When a write or a sync fails
//! Nothing is known about the file any more, so nothing that depends on the frame is sent, answered or
//! applied, and the process ends within about four seconds:
//! 1. [`Wal::save`] returns `Error::Io`, which names the operation and the file. Every caller up to `run`
//!    in `serve.rs` returns it; none retries.
//! 2. `run` drops the node, which drops the responders. Requests that were proposed are answered 504, all
//!    others 503. The transport has a second to send what is queued, then the peer port one to answer.
//! 3. The task logs "the raft node stops" and passes the error on errorC. `RaftNodeHandle::join` gives
//!    the state machine a second to apply what commitC still holds.
//! 4. `main` gives the client port a second to send the answers, prints the error and exits with status 1.
//!    The next start reads the file again.

use std::time::Instant;

use raft::Ready;
use raft::eraftpb::{Entry, HardState, Message};

use super::snapshots::snapshot_id;
use super::{Index, NodeId, Term};
use crate::error::Result;
use crate::metrics::Metrics;
use crate::storage::log::Log;
use crate::storage::wal::{Frame, Identity, SnapshotId, Wal};

/// The write-ahead log of a running node.
///
/// Every method that returns `Ok` leaves its argument durable, except a commit index: see
/// [`write_ready`](Self::write_ready).
pub(super) struct Journal {
    wal: Wal,
    identity: Identity,
    /// Raft's own state, as the next frame will hold it.
    hard_state: HardState,
    /// True if the frames so far hold an older hard state.
    is_unsaved: bool,
    metrics: Metrics,
    /// Held as long as the files are open.
    _lock: Box<dyn std::any::Any + Send>,
}

impl Journal {
    pub fn new(
        wal: Wal,
        identity: Identity,
        hard_state: HardState,
        metrics: Metrics,
        lock: Box<dyn std::any::Any + Send>,
    ) -> Self {
        Self { wal, identity, hard_state, is_unsaved: false, metrics, _lock: lock }
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Term and vote as raft last reported them.
    fn term_and_vote(&self) -> (Term, NodeId) {
        (self.hard_state.term, self.hard_state.vote)
    }

    pub fn bytes(&self) -> u64 {
        self.wal.bytes()
    }

    /// True if the next Ready holds something that has to be synced.
    pub fn has_work(&self, raft: &raft::Raft<Log>) -> bool {
        let unstable = &raft.raft_log.unstable;
        !unstable.entries.is_empty()
            || unstable.snapshot.is_some()
            || (raft.term, raft.vote) != self.term_and_vote()
    }

    /// Takes the messages that may leave before `ready` is written. raft-rs puts only a leader's messages
    /// there; those of other members are among the persisted messages.
    ///
    /// `commits_change` holds back those that may commit a change of members. A member that learns of
    /// its removal leaves the cluster. A leader of two that crashed without having saved that commit
    /// would need the departed member to commit it again.
    pub fn release_early(&self, ready: &mut Ready, commits_change: bool) -> Vec<Message> {
        let is_new_term_or_vote =
            ready.hs().is_some_and(|hs| (hs.term, hs.vote) != self.term_and_vote());
        if is_new_term_or_vote || commits_change { Vec::new() } else { ready.take_messages() }
    }

    /// Makes `ready` durable as one frame with one sync, then mirrors it in `log`. Returns the
    /// messages that had to wait for it.
    ///
    /// A commit index alone waits for the next frame. Losing it loses nothing, unless it commits a
    /// change of members.
    pub fn write_ready(
        &mut self,
        ready: &mut Ready,
        commits_change: bool,
        log: &mut Log,
    ) -> Result<Vec<Message>> {
        if let Some(hard_state) = ready.hs() {
            self.hard_state = hard_state.clone();
            self.is_unsaved = true;
        }
        if ready.must_sync() {
            self.write_frame(ready, log)?;
        } else if commits_change {
            self.flush()?;
        }
        let mut released = ready.take_messages();
        released.append(&mut ready.take_persisted_messages());
        Ok(released)
    }

    fn write_frame(&mut self, ready: &Ready, log: &mut Log) -> Result<()> {
        let installed = (!ready.snapshot().is_empty()).then(|| {
            let id = snapshot_id(ready.snapshot());
            let (index, commit) = (id.index, self.hard_state.commit);
            assert!(commit >= index, "commit {commit} is below the snapshot at {index}");
            id
        });
        let began = Instant::now();
        self.save(Frame { installed, entries: ready.entries(), ..Frame::default() })?;
        self.metrics.wal_fsync.observe(began.elapsed().as_secs_f64());
        if installed.is_some() {
            log.apply_snapshot(ready.snapshot().clone());
        }
        log.append(ready.entries());
        Ok(())
    }

    /// Notes a commit index for the next frame.
    pub fn note_commit(&mut self, commit: Index) {
        self.hard_state.commit = commit;
        self.is_unsaved = true;
    }

    /// Writes the hard state if no frame holds it yet.
    pub fn flush(&mut self) -> Result<()> {
        if self.is_unsaved { self.save(Frame::default()) } else { Ok(()) }
    }

    /// Names a snapshot that was made here. Its file is durable.
    pub fn mark_snapshot(&mut self, made: SnapshotId) -> Result<()> {
        self.save(Frame { made: Some(made), ..Frame::default() })
    }

    /// Records the incarnation of another first member.
    pub fn record_incarnation(&mut self, id: NodeId, incarnation: u64) -> Result<()> {
        self.save(Frame { incarnations: &[(id, incarnation)], ..Frame::default() })
    }

    /// Records that this member lost entries up to `index` that it had acknowledged; 0 takes it back.
    pub fn quarantine(&mut self, index: Index) -> Result<()> {
        self.save(Frame { quarantine: Some(index), ..Frame::default() })
    }

    /// Records the cluster that this member joins, or begins with `entries`, all committed, in one
    /// frame: a crash leaves all of it or nothing. Returns raft's state with them.
    pub fn begin(&mut self, cluster_id: u64, entries: &[Entry]) -> Result<HardState> {
        if let Some(last) = entries.last() {
            self.hard_state.term = last.term;
            self.note_commit(last.index);
        }
        let identity = Identity { cluster_id, ..self.identity.clone() };
        self.save(Frame { identity: Some(&identity), entries, ..Frame::default() })?;
        self.identity = identity;
        Ok(self.hard_state.clone())
    }

    /// Removes the segments that hold nothing above the entry at `index`.
    pub fn purge(&mut self, index: Index) -> Result<()> {
        self.wal.purge(index)
    }

    /// Writes one frame, with the hard state if it is unsaved.
    fn save(&mut self, frame: Frame<'_>) -> Result<()> {
        let hard_state = self.is_unsaved.then_some(&self.hard_state);
        self.wal.save(&Frame { hard_state, ..frame })?;
        self.is_unsaved = false;
        Ok(())
    }
}
