//! Snapshots: made by the state machine, named in the write-ahead log, sent, received, purged.
//!
//! ```text
//! made here:  commitC ─▶ state machine ─▶ file ─▶ report ─▶ mark in the log ─▶ compaction, purge
//! received:   file ─▶ MsgSnapshot ─▶ Ready ─▶ mark in the log ─▶ commitC ─▶ state machine
//! ```
//! Either way the file is durable before the log names it, and the log names it before anything that
//! it replaces is removed. A crash in between leaves an orphan file, which the next start removes.
//!
//! # When one is made, by whom, and what is deleted
//! Every member makes its own, when one of these holds:
//! - more than `--snapshot-count` entries were applied since the last one. A last one of 1 MiB or more also
//!   needs as much log as it is long, unless the count is below the default;
//! - 20 to 32 MiB of log have gathered, whatever the snapshot's length. The amount differs by member id;
//! - a leader has to send one, and has none that lists the receiver and reaches far enough;
//! - the last one was damaged and set aside.
//!
//! The state machine takes a view of its state, and a thread of its own writes the file. After the log has
//! named it, these go:
//! - snapshots older than the newest two, except those that are being sent;
//! - whole segments of the write-ahead log that end at or below the older of the two;
//! - entries in memory, except the newest 10,000 below the snapshot, or 64 MiB of them.

use std::collections::BTreeMap;

use raft::eraftpb::{Message, Snapshot};
use slog::{Logger, info, warn};

use super::applied::Applied;
use super::journal::Journal;
use super::{Index, NodeConfig, NodeId, PeerReport, ReportFn, SNAPSHOT_COUNT};
use crate::channels::{Refusal, SnapshotBody, SnapshotFile, SnapshotRequest, SnapshotRestore};
use crate::codec;
use crate::error::Result;
use crate::membership::{SnapshotData, SnapshotMembers};
use crate::storage::log::Log;
use crate::storage::snapshotter::Snapshotter;
use crate::storage::wal::SnapshotId;

/// This much log makes a snapshot due, however few entries it holds.
const LOG_BYTES: u64 = 32 << 20;
/// A count of entries alone makes no larger snapshot due: as much log must have gathered, too.
const SMALL_SNAPSHOT_BYTES: u64 = 1 << 20;
/// At most this much log is kept below a snapshot, for members that are a little behind.
const CATCH_UP_BYTES: u64 = 64 << 20;

/// The snapshots of a node, and which files have to stay.
pub(super) struct Snapshots {
    files: Snapshotter,
    report: ReportFn,
    /// Named by the write-ahead log, oldest first, two at most.
    kept: Vec<SnapshotId>,
    /// Requested from the state machine, with the members as of its index. Its file may exist already.
    making: Option<(SnapshotId, SnapshotMembers)>,
    /// The snapshot on its way to each member.
    sending: BTreeMap<NodeId, SnapshotId>,
    /// Received in this turn. raft has not decided about them yet.
    received: Vec<SnapshotId>,
    /// True from the loss of a snapshot until another one is being made.
    is_missing: bool,
    /// The log since the last snapshot, in bytes.
    log_bytes: u64,
    /// The length of the last snapshot, in bytes.
    last_bytes: u64,
}

impl Snapshots {
    /// The last argument: the log above the newest snapshot, and that snapshot, in bytes.
    pub fn new(
        files: Snapshotter,
        report: ReportFn,
        kept: Vec<SnapshotId>,
        (log_bytes, last_bytes): (u64, u64),
    ) -> Self {
        Self {
            files,
            report,
            kept,
            making: None,
            sending: BTreeMap::new(),
            received: Vec::new(),
            is_missing: false,
            log_bytes,
            last_bytes,
        }
    }

    /// The newest snapshot's index, or 0.
    pub fn newest(&self) -> Index {
        self.kept.last().map_or(0, |id| id.index)
    }

    /// True from the request to the state machine until its file is reported.
    pub fn is_making(&self) -> bool {
        self.making.is_some()
    }

    pub fn note_log(&mut self, bytes: u64) {
        self.log_bytes += bytes;
    }

    /// Requests a snapshot if enough log has gathered, or raft needs one for another member.
    pub fn request_if_due(
        &mut self,
        applied: &Applied,
        cluster_id: u64,
        log: &Log,
        config: &NodeConfig,
        logger: &Logger,
    ) -> Option<SnapshotRequest> {
        let entries = applied.index() - self.newest();
        if self.making.is_some() || (entries == 0 && !self.is_missing) {
            return None;
        }
        // Writing a large state after a few small entries would take all of the disk's time. A count
        // below the default is taken as a request to do so.
        let is_worth_it = config.snapshot_count < SNAPSHOT_COUNT
            || self.last_bytes < SMALL_SNAPSHOT_BYTES
            || self.log_bytes > self.last_bytes;
        // The limit differs from member to member, so that they do not all write at the same time.
        let log_bytes_max = LOG_BYTES - config.id % 4 * (LOG_BYTES / 8);
        let is_due = self.is_missing
            || entries > config.snapshot_count && is_worth_it
            || self.log_bytes > log_bytes_max
            || log.take_snapshot_wanted();
        if !is_due {
            return None;
        }
        let (index, last) = (applied.index(), self.newest());
        info!(logger, "start snapshot [applied index: {index} | last snapshot index: {last}]");
        let id = SnapshotId { index, term: applied.term() };
        let members = SnapshotMembers::new(cluster_id, applied.members().clone());
        let meta = codec::encode(&members);
        self.making = Some((id, members));
        (self.log_bytes, self.is_missing) = (0, false);
        let (files, report) = (self.files.clone(), self.report.clone());
        let save = Box::new(move |body: SnapshotBody<'_>| {
            report(PeerReport::SnapshotMade(files.create(id, &meta, body)));
        });
        Some(SnapshotRequest { index, save })
    }

    /// Takes over a snapshot whose file is complete: names it in the journal, offers it to raft, and
    /// drops what it replaces. In this order, the journal never names a file that does not exist.
    pub fn made(
        &mut self,
        file: SnapshotFile,
        journal: &mut Journal,
        log: &mut Log,
        config: &NodeConfig,
        logger: &Logger,
    ) -> Result<()> {
        let (id, members) = self.making.take().expect("one snapshot is made at a time");
        if id.index <= self.newest() {
            // A snapshot received meanwhile is newer, so this file is an orphan.
            return self.purge();
        }
        journal.mark_snapshot(id)?;

        self.last_bytes = file.length;
        let snapshot = raft_snapshot(id, members, file);
        config.metrics.snapshots_made.inc();
        log.set_snapshot(snapshot);
        if let Some(index) = log.compact(id.index, config.snapshot_catch_up_entries, CATCH_UP_BYTES)
        {
            info!(logger, "compacted log at index {}", index);
        }
        self.keep(id, journal)
    }

    /// Decides whether the snapshot of `message`, whose file has arrived, may be stepped. Returns the
    /// file's length. The file stays until the end of this turn, when raft has decided about it.
    pub fn receive(
        &mut self,
        message: &Message,
        cluster_id: u64,
        raft_log: &raft::RaftLog<Log>,
    ) -> Result<std::result::Result<u64, Refusal>> {
        let id = snapshot_id(message.get_snapshot());
        let refuse = |why: &str| {
            Ok(Err(Refusal::NotReady(format!("the snapshot at index {}: {why}", id.index))))
        };
        if !self.files.list()?.contains(&id) {
            return refuse("its file was purged before it was read");
        }
        if id.index == raft_log.committed && !raft_log.match_term(id.index, id.term) {
            return refuse("another entry is committed at this index");
        }
        let (meta, _) = self.files.open_received(id)?;
        let data = codec::decode::<SnapshotData>(&message.get_snapshot().data);
        let data = data.ok().filter(|data| {
            data.members.cluster_id == cluster_id
                && codec::decode(&meta).is_ok_and(|held: SnapshotMembers| held == data.members)
        });
        let Some(data) = data else {
            return refuse("its file names other members than its message");
        };
        self.received.push(id);
        Ok(Ok(data.length))
    }

    /// Opens a received snapshot, which raft accepted and the journal names, for the state machine.
    pub fn install(&mut self, snapshot: &Snapshot) -> Result<(SnapshotRestore, SnapshotMembers)> {
        let id = snapshot_id(snapshot);
        let data: SnapshotData =
            codec::decode(&snapshot.data).expect("a snapshot is validated before it is stepped");
        let (_, reader) = self.files.open_received(id)?;
        self.log_bytes = 0;
        self.last_bytes = data.length;
        Ok((SnapshotRestore { index: id.index, term: id.term, reader }, data.members))
    }

    /// Notes that `message` takes a snapshot along; returns the file to send.
    pub fn start_sending(&mut self, message: &Message) -> SnapshotFile {
        // From the message, not from the log: a newer one may have been made since raft asked for it.
        let data: SnapshotData =
            codec::decode(&message.get_snapshot().data).expect("this member encoded it");
        self.sending.insert(message.to, snapshot_id(message.get_snapshot()));
        SnapshotFile { length: data.length, checksum: data.checksum }
    }

    /// Notes the end of a transfer; returns what was sent.
    pub fn sent(&mut self, to: NodeId) -> Option<SnapshotId> {
        self.sending.remove(&to)
    }

    /// Sets a snapshot aside whose file turned out damaged, and has another one made of the same state,
    /// even if no entry came since. Until then raft has none to send.
    pub fn set_aside(&mut self, id: SnapshotId, log: &mut Log, logger: &Logger) -> Result<()> {
        if !self.kept.contains(&id) {
            return Ok(());
        }
        self.kept.retain(|kept| *kept != id);
        log.drop_snapshot(id.index);
        self.is_missing = true;
        if self.files.list()?.contains(&id) {
            let (index, path) = (id.index, self.files.set_broken(id)?);
            warn!(
                logger,
                "the snapshot at index {index} is damaged: set aside as {}",
                path.display()
            );
        }
        Ok(())
    }

    /// Ends a turn: files that raft did not accept are removed.
    pub fn end_turn(&mut self) -> Result<()> {
        if std::mem::take(&mut self.received).is_empty() { Ok(()) } else { self.purge() }
    }

    /// Removes the snapshots that are neither kept, nor being made or sent, nor just received.
    pub fn purge(&self) -> Result<()> {
        let mut keep = self.kept.clone();
        keep.extend(self.sending.values());
        keep.extend(&self.received);
        keep.extend(self.making.iter().map(|(id, _)| *id));
        self.files.purge(&keep)
    }

    /// Keeps `id`, which the journal names, and the snapshot before it, with the log from the older
    /// one on.
    pub fn keep(&mut self, id: SnapshotId, journal: &mut Journal) -> Result<()> {
        self.kept.push(id);
        if self.kept.len() > 2 {
            self.kept.remove(0);
        }
        self.purge()?;
        if self.kept.len() == 2 {
            journal.purge(self.kept[0].index)?;
        }
        Ok(())
    }
}

pub(super) fn snapshot_id(snapshot: &Snapshot) -> SnapshotId {
    let metadata = snapshot.get_metadata();
    SnapshotId { index: metadata.index, term: metadata.term }
}

/// A snapshot in raft's form. Its data is everything but the state, which is a file.
pub(super) fn raft_snapshot(
    id: SnapshotId,
    members: SnapshotMembers,
    file: SnapshotFile,
) -> Snapshot {
    let mut snapshot = Snapshot::default();
    snapshot.mut_metadata().index = id.index;
    snapshot.mut_metadata().term = id.term;
    snapshot.mut_metadata().set_conf_state(members.conf_state());
    let SnapshotFile { length, checksum } = file;
    snapshot.data = codec::encode(&SnapshotData { members, length, checksum }).into();
    snapshot
}
