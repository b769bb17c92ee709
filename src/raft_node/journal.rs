//! The journal: the only caller of the write-ahead log.
//!
//! It owns what has to be durable, and what has to wait until it is: raft's hard state, the messages
//! of a `Ready`, and the answer to "is anything unsaved?".
//!
//! # What waits for the disk
//! | message | leaves |
//! |---|---|
//! | a leader's append, heartbeat | before the leader's own write: followers write at the same time (thesis 10.2.1) |
//! | the same, in a Ready with a new term or vote | after it: a leader that forgot its vote would use the term again |
//! | the same, in a Ready that may commit a change of members | after it: see [`Journal::release_early`] |
//! | a follower's acknowledgement, a vote | after it |
//! | a follower's heartbeat response, forwarded read or write | after it, but see below |
//!
//! # The frame under way
//! Where a sync is slow, or there is little to write, a [`Background`] writes the frame while the node goes
//! on, with raft-rs's asynchronous `Ready`. The files travel with the frame, so there is one at a time. What later Readies add
//! is gathered for the next frame. The log in memory has these entries already. Until
//! [`Journal::take_written`] says that they are on disk, raft hands out none of them to be applied, and a leader
//! does not count its own copy: only the others can commit them. A member whose term and vote are on disk
//! answers heartbeats and forwards requests meanwhile: these messages depend on nothing else.
//!
//! The node waits for a frame that takes half an election timeout ([`Journal::tick`]). A leader whose disk hangs
//! therefore stops its heartbeats and is replaced, and `/livez` reports the hang.
//!
//! Everything but entries and hard states waits for the frame under way, and is written by the caller:
//! snapshots, identities, and Readies around a change of members ([`RaftNode`](super::RaftNode) decides).
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

use std::any::Any;
use std::mem;
use std::time::{Duration, Instant};

use raft::Ready;
use raft::eraftpb::{Entry, HardState, Message, MessageType};

use super::snapshots::snapshot_id;
use super::{Index, NodeId, Term};
use crate::error::Result;
use crate::metrics::Metrics;
use crate::storage::log::{Log, entry_bytes};
use crate::storage::wal::{Frame, Identity, SnapshotId, Wal};

/// Above this many bytes for the next frame, no more entries are accepted. A leader repeats its appends; the
/// clients of forwarded writes are answered that the outcome is unknown.
const GATHERED_BYTES_MAX: u64 = 64 << 20;

/// Writes frames while the node goes on.
pub trait Background: Send {
    /// True if a frame is to be written here, although it could be written by the node itself.
    /// `last` is the time that the last frame took.
    fn wants(&mut self, last: Duration) -> bool;
    /// Begins a write and returns. The one before has ended. The node has to be fed
    /// [`Input::Written`](super::Input::Written) at its end.
    fn begin(&mut self, write: Write);
    /// Waits for the end of the write; blocks.
    fn finish(&mut self) -> Written;
    /// The write, if it has ended. It is asked only if one has begun.
    fn try_finish(&mut self) -> Option<Written>;
}

/// The open files.
struct Files {
    wal: Wal,
    /// Held as long as the files are open.
    _lock: Box<dyn Any + Send>,
}

/// A frame that is to be written, with the files.
pub struct Write {
    files: Files,
    entries: Vec<Entry>,
    hard_state: Option<HardState>,
}

/// A frame that was written, if the result says so.
pub struct Written {
    files: Files,
    result: Result<()>,
    took: Duration,
}

impl Write {
    /// Writes and syncs; blocks.
    pub fn run(self) -> Written {
        let Self { mut files, entries, hard_state } = self;
        let began = Instant::now();
        let hard_state = hard_state.as_ref();
        let frame = Frame { entries: &entries, hard_state, ..Frame::default() };
        let result = files.wal.save(&frame);
        Written { files, result, took: began.elapsed() }
    }
}

/// What waits for a frame.
#[derive(Default)]
struct Waiting {
    /// The last of raft's Readies in the frame.
    ready: u64,
    messages: Vec<Message>,
    term_and_vote: (Term, NodeId),
}

/// What the next frame will hold.
#[derive(Default)]
struct Gathered {
    entries: Vec<Entry>,
    /// Of all entries that were added.
    bytes: u64,
    waiting: Waiting,
}

impl Gathered {
    /// Entries replace those from the first of their indexes on.
    fn append(&mut self, entries: Vec<Entry>) {
        self.bytes += entries.iter().map(entry_bytes).sum::<u64>();
        let (Some(first), Some(gathered)) = (entries.first(), self.entries.first()) else {
            self.entries.extend(entries);
            return;
        };
        let kept = first.index.saturating_sub(gathered.index);
        self.entries.truncate(kept as usize);
        self.entries.extend(entries);
    }
}

/// The write-ahead log of a running node.
///
/// Every method that returns `Ok` leaves its argument durable, except a commit index (see
/// [`write_ready`](Self::write_ready)) and what is gathered (see [`gather`](Self::gather)).
pub(super) struct Journal {
    /// `None` while a frame is under way.
    files: Option<Files>,
    identity: Identity,
    /// Raft's own state, as the next frame will hold it.
    hard_state: HardState,
    /// True if the frames so far hold an older hard state.
    is_unsaved: bool,
    /// Term and vote on disk.
    saved: (Term, NodeId),
    background: Option<Box<dyn Background>>,
    under_way: Option<Waiting>,
    gathered: Option<Gathered>,
    /// The ticks since the frame under way began.
    ticks: usize,
    /// Frames that were written, and that raft was not told of.
    written: Vec<Waiting>,
    /// True if the next frame is for the background.
    is_slow: bool,
    /// The number of entries in the last frame that held some.
    last_entries: usize,
    /// The length of the log without the frame under way.
    bytes: u64,
    metrics: Metrics,
}

impl Journal {
    pub fn new(
        wal: Wal,
        identity: Identity,
        hard_state: HardState,
        metrics: Metrics,
        lock: Box<dyn Any + Send>,
    ) -> Self {
        Self {
            bytes: wal.bytes(),
            files: Some(Files { wal, _lock: lock }),
            identity,
            saved: (hard_state.term, hard_state.vote),
            hard_state,
            is_unsaved: false,
            background: None,
            under_way: None,
            gathered: None,
            ticks: 0,
            written: Vec::new(),
            is_slow: false,
            last_entries: 0,
            metrics,
        }
    }

    /// Has frames written by `background` from now on, where that is allowed and wanted.
    pub fn set_background(&mut self, background: Box<dyn Background>) {
        self.background = Some(background);
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Term and vote as raft last reported them.
    fn term_and_vote(&self) -> (Term, NodeId) {
        (self.hard_state.term, self.hard_state.vote)
    }

    pub fn saved_term_and_vote(&self) -> (Term, NodeId) {
        self.saved
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// True if the next Ready holds something that has to be synced.
    pub fn has_work(&self, raft: &raft::Raft<Log>) -> bool {
        let unstable = &raft.raft_log.unstable;
        !unstable.entries.is_empty()
            || unstable.snapshot.is_some()
            || (raft.term, raft.vote) != self.term_and_vote()
    }

    /// True while a frame is under way.
    pub fn is_writing(&self) -> bool {
        self.under_way.is_some()
    }

    /// True if another frame follows the one under way.
    pub fn has_gathered(&self) -> bool {
        self.gathered.is_some()
    }

    /// True if a hanging disk has let so much gather that no more entries are taken in.
    pub fn is_full(&self) -> bool {
        self.gathered.as_ref().is_some_and(|it| it.bytes > GATHERED_BYTES_MAX)
    }

    pub fn has_background(&self) -> bool {
        self.background.is_some()
    }

    pub fn last_entries(&self) -> usize {
        self.last_entries
    }

    /// True if the disk is so slow that the background writes the next frame.
    pub fn is_slow(&self) -> bool {
        self.is_slow
    }

    /// Takes the messages that may leave before `ready` is written. raft-rs puts only a leader's messages
    /// there; those of other members are among the persisted messages.
    ///
    /// `commits_change` holds back those that may commit a change of members. A member that learns of
    /// its removal leaves the cluster. A leader of two that crashed without having saved that commit
    /// would need the departed member to commit it again.
    pub fn release_early(&self, ready: &mut Ready, commits_change: bool) -> Vec<Message> {
        let now = ready.hs().map_or(self.term_and_vote(), |hs| (hs.term, hs.vote));
        if now != self.saved || commits_change { Vec::new() } else { ready.take_messages() }
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
        self.note_hard_state(ready);
        if ready.must_sync() {
            self.write_frame(ready, log)?;
        } else if commits_change {
            self.flush()?;
        }
        let mut released = ready.take_messages();
        released.append(&mut ready.take_persisted_messages());
        Ok(released)
    }

    fn note_hard_state(&mut self, ready: &Ready) {
        if let Some(hard_state) = ready.hs() {
            self.hard_state = hard_state.clone();
            self.is_unsaved = true;
        }
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
        self.note_write(began.elapsed());
        if installed.is_some() {
            log.apply_snapshot(ready.snapshot().clone());
        }
        log.append(ready.entries());
        self.note_entries(ready.entries());
        Ok(())
    }

    fn note_entries(&mut self, entries: &[Entry]) {
        if !entries.is_empty() {
            self.last_entries = entries.len();
        }
    }

    fn note_write(&mut self, took: Duration) {
        self.metrics.wal_fsync.observe(took.as_secs_f64());
        self.is_slow = self.background.as_mut().is_some_and(|it| it.wants(took));
    }

    /// Hands `ready`, which holds no snapshot, to the background, or gathers it if a frame is under way.
    /// Mirrors it in `log`. Returns the messages that do not have to wait.
    pub fn gather(&mut self, ready: &mut Ready, log: &mut Log) -> Vec<Message> {
        self.note_hard_state(ready);
        let is_saved = self.term_and_vote() == self.saved;
        let messages = ready.take_messages().into_iter().chain(ready.take_persisted_messages());
        let (free, waiting) = messages.partition(|message| is_saved && is_free(message));
        if ready.must_sync() {
            log.append(ready.entries());
            self.gathered.get_or_insert_default().append(ready.take_entries());
        }
        let gathered = self.gathered.as_mut().map(|it| &mut it.waiting);
        let last = gathered.or(self.under_way.as_mut());
        let last = last.expect("a Ready that needs no frame is gathered only behind one");
        last.ready = ready.number();
        last.messages.extend::<Vec<_>>(waiting);
        self.begin_next();
        free
    }

    /// Begins to write what was gathered, unless a frame is under way.
    fn begin_next(&mut self) {
        let Some(gathered) = self.gathered.take_if(|_| self.under_way.is_none()) else { return };
        let Gathered { entries, mut waiting, .. } = gathered;
        self.note_entries(&entries);
        waiting.term_and_vote = self.term_and_vote();
        self.under_way = Some(waiting);
        self.ticks = 0;
        let files = self.files.take().expect("no frame is under way");
        let hard_state = mem::take(&mut self.is_unsaved).then(|| self.hard_state.clone());
        let background = self.background.as_mut().expect("it wants this frame");
        background.begin(Write { files, entries, hard_state });
    }

    /// Takes the files back.
    fn end(&mut self, written: Written) -> Result<()> {
        let Written { files, result, took } = written;
        self.files = Some(files);
        let waiting = self.under_way.take().expect("one frame is under way");
        result?;
        self.note_write(took);
        self.note_files();
        self.saved = waiting.term_and_vote;
        self.written.push(waiting);
        Ok(())
    }

    fn note_files(&mut self) {
        self.bytes = self.files.as_ref().map_or(self.bytes, |files| files.wal.bytes());
    }

    /// Takes in that the frame under way may have ended, and begins the next one.
    pub fn collect(&mut self) -> Result<()> {
        let written = self.background.as_mut().filter(|_| self.under_way.is_some());
        if let Some(written) = written.and_then(|it| it.try_finish()) {
            self.end(written)?;
            self.begin_next();
        }
        Ok(())
    }

    /// Waits for the frame under way and for one of all that was gathered; blocks.
    pub fn finish(&mut self) -> Result<()> {
        while self.under_way.is_some() {
            self.finish_one()?;
        }
        Ok(())
    }

    /// Waits for the frame under way, and begins the next one; blocks.
    fn finish_one(&mut self) -> Result<()> {
        let background = self.background.as_mut().expect("it has a frame");
        let written = background.finish();
        self.end(written)?;
        self.begin_next();
        Ok(())
    }

    /// Takes in a tick. Waits for a frame that has been under way for `ticks_max` of them; blocks.
    pub fn tick(&mut self, ticks_max: usize) -> Result<()> {
        self.ticks += 1;
        if self.is_writing() && self.ticks >= ticks_max { self.finish_one() } else { Ok(()) }
    }

    /// The Readies that became durable since the last call, up to a number, and what waited for them.
    pub fn take_written(&mut self) -> Option<(u64, Vec<Message>)> {
        // A frame of a commit index alone stands for no Ready.
        let last = self.written.iter().map(|it| it.ready).max()?;
        let messages = self.written.drain(..).flat_map(|it| it.messages).collect();
        Some((last, messages))
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

    /// As [`flush`](Self::flush), but need not be done when it returns. Does nothing while a frame is
    /// under way: the caller repeats it.
    pub fn flush_soon(&mut self) -> Result<()> {
        if !self.is_unsaved || self.is_writing() {
            return Ok(());
        }
        if !self.is_slow {
            return self.flush();
        }
        self.gathered = Some(Gathered::default());
        self.begin_next();
        Ok(())
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
        self.wal()?.purge(index)?;
        self.note_files();
        Ok(())
    }

    /// The log, once no frame is under way.
    fn wal(&mut self) -> Result<&mut Wal> {
        self.finish()?;
        Ok(&mut self.files.as_mut().expect("no frame is under way").wal)
    }

    /// Writes one frame, with the hard state if it is unsaved.
    fn save(&mut self, frame: Frame<'_>) -> Result<()> {
        self.finish()?;
        let hard_state = self.is_unsaved.then(|| self.hard_state.clone());
        self.wal()?.save(&Frame { hard_state: hard_state.as_ref(), ..frame })?;
        self.is_unsaved = false;
        self.saved = self.term_and_vote();
        self.note_files();
        Ok(())
    }
}

/// True for messages that depend on nothing but term and vote.
fn is_free(message: &Message) -> bool {
    use MessageType::*;
    matches!(message.get_msg_type(), MsgHeartbeatResponse | MsgReadIndex | MsgPropose)
}
