//! Snapshots: asked of the state machine, named in the write-ahead log, received from the leader.
//!
//! ```text
//! made here:  commitC ─▶ state machine ─▶ file ─▶ report ─▶ mark in the log ─▶ compaction, purge
//! received:   file ─▶ MsgSnapshot ─▶ Ready ─▶ mark in the log ─▶ commitC ─▶ state machine
//! ```
//! Either way the file is durable before the log names it, and the log names it before anything that
//! it makes superfluous is removed. A crash in between leaves an orphan file, which the next start
//! removes.

use raft::eraftpb::Snapshot;
use slog::info;

use super::{
    CATCH_UP_BYTES, Commit, Frame, Index, NodeId, PeerReport, RaftNode, SMALL_SNAPSHOT_BYTES,
    SNAPSHOT_COUNT, SNAPSHOT_LOG_BYTES, SnapshotId,
};
use crate::channels::{SnapshotBody, SnapshotFile, SnapshotRequest, SnapshotRestore};
use crate::codec;
use crate::error::{Error, Result};
use crate::membership::{SnapshotData, SnapshotMembers};
use crate::storage::snapshotter::Snapshotter;

impl RaftNode {
    pub(super) fn snapshot_index(&self) -> Index {
        self.marks.last().map_or(0, |mark| mark.index)
    }

    /// Asks the state machine for a snapshot when enough log has gathered, or raft needs a fresh one.
    pub(super) fn maybe_trigger_snapshot(&mut self) {
        let entries = self.applied_index - self.snapshot_index();
        if self.making.is_some() || entries == 0 || self.leaving.is_some() {
            return;
        }
        // A large state is not written again for a little more log, which would take all of the disk,
        // unless more snapshots are asked for than by default.
        let is_worth_it = self.config.snapshot_count < SNAPSHOT_COUNT
            || self.last_snapshot_bytes < SMALL_SNAPSHOT_BYTES
            || self.bytes_since_snapshot > self.last_snapshot_bytes;
        // Less for some members than for others, as large snapshots should not be made by all at once.
        let log_bytes_max = SNAPSHOT_LOG_BYTES - self.config.id % 4 * (SNAPSHOT_LOG_BYTES / 8);
        let is_due = entries > self.config.snapshot_count && is_worth_it
            || self.bytes_since_snapshot > log_bytes_max
            || self.raw_node.store().take_snapshot_wanted();
        if !is_due {
            return;
        }
        info!(
            self.logger,
            "start snapshot [applied index: {} | last snapshot index: {}]",
            self.applied_index,
            self.snapshot_index()
        );
        let members = SnapshotMembers {
            cluster_id: self.identity.cluster_id,
            // Sorted, as raft's own order differs from member to member.
            voters: sorted(&self.conf_state.voters),
            learners: sorted(&self.conf_state.learners),
            members: self.members.clone(),
        };
        let meta = codec::encode(&members);
        let mark = SnapshotId { index: self.applied_index, term: self.applied_term };
        self.making = Some((mark, members));
        self.bytes_since_snapshot = 0;
        let (snapshotter, report) = (self.snapshotter.clone(), self.report.clone());
        let save = Box::new(move |body: SnapshotBody<'_>| {
            report(PeerReport::SnapshotMade(save_snap(&snapshotter, mark, &meta, body)));
        });
        self.publish(Commit::Snapshot(SnapshotRequest { index: mark.index, save }));
    }

    /// Names a snapshot that was made in the write-ahead log, offers it to raft, and drops what it
    /// makes superfluous. In this order: the log never names a file that is not there.
    pub(super) fn finish_snapshot(&mut self, file: SnapshotFile) -> Result<()> {
        let (mark, members) = self.making.take().expect("one snapshot is made at a time");
        if mark.index <= self.snapshot_index() {
            // A snapshot that was received meanwhile is newer: the file is an orphan.
            return self.purge_snapshots();
        }
        self.wal.save(&Frame {
            made: Some(mark),
            hard_state: self.hard_state_is_unsaved.then_some(&self.hard_state),
            ..Frame::default()
        })?;
        self.hard_state_is_unsaved = false;

        let mut snapshot = Snapshot::default();
        snapshot.mut_metadata().index = mark.index;
        snapshot.mut_metadata().term = mark.term;
        snapshot.mut_metadata().set_conf_state(members.conf_state());
        let SnapshotFile { length, checksum } = file;
        self.last_snapshot_bytes = length;
        snapshot.data = codec::encode(&SnapshotData { members, length, checksum }).into();
        self.config.metrics.snapshots_made.inc();
        let log = self.raw_node.mut_store();
        log.set_snapshot(snapshot);
        let keep = self.config.snapshot_catch_up_entries;
        if let Some(index) = log.compact(mark.index, keep, CATCH_UP_BYTES) {
            info!(self.logger, "compacted log at index {}", index);
        }
        self.keep_snapshot(mark)
    }

    /// Keeps `mark` and the snapshot before it, and the write-ahead log from the older one on.
    fn keep_snapshot(&mut self, mark: SnapshotId) -> Result<()> {
        self.marks.push(mark);
        if self.marks.len() > 2 {
            self.marks.remove(0);
        }
        self.purge_snapshots()?;
        if self.marks.len() == 2 {
            self.wal.purge(self.marks[0].index)?;
        }
        Ok(())
    }

    /// Removes every snapshot that is neither kept, nor on its way to a peer, nor new.
    pub(super) fn purge_snapshots(&self) -> Result<()> {
        let mut keep = self.marks.clone();
        keep.extend(self.sending.values());
        keep.extend(&self.received);
        keep.extend(self.making.iter().map(|(mark, _)| *mark));
        self.snapshotter.purge(&keep)
    }

    /// Hands a received snapshot to the state machine, and takes the members from it.
    pub(super) fn publish_snapshot(&mut self, snapshot: &Snapshot) -> Result<()> {
        if snapshot.is_empty() {
            return Ok(());
        }
        let metadata = snapshot.get_metadata();
        let mark = SnapshotId { index: metadata.index, term: metadata.term };
        info!(self.logger, "publishing snapshot at index {}", mark.index);
        assert!(
            mark.index > self.applied_index,
            "snapshot index [{}] should > progress.appliedIndex [{}]",
            mark.index,
            self.applied_index
        );
        let data: SnapshotData =
            codec::decode(&snapshot.data).expect("a snapshot is validated before it is stepped");
        let (_, reader) = self.snapshotter.open_received(mark)?;
        self.publish(Commit::Restore(SnapshotRestore {
            index: mark.index,
            term: mark.term,
            reader,
        }));
        self.conf_state = metadata.get_conf_state().clone();
        self.members = data.members.members;
        self.bytes_since_snapshot = 0;
        self.last_snapshot_bytes = data.length;
        (self.applied_index, self.applied_term) = (mark.index, mark.term);
        // What was proposed here may be in the snapshot, or lost: nobody can tell.
        let failed = self.proposals.fail_all("a snapshot replaced the log");
        self.config.metrics.proposals_failed.inc_by(failed);
        self.changes.fail_all("a snapshot replaced the log");
        self.connect_members();
        self.keep_snapshot(mark)?;
        info!(self.logger, "finished publishing snapshot at index {}", mark.index);
        Ok(())
    }
}

fn sorted(ids: &[NodeId]) -> Vec<NodeId> {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids
}

/// Writes a snapshot's file. The write-ahead log names it only afterwards: so a file that the log
/// does not name is possible, but not the other way round.
fn save_snap(
    snapshotter: &Snapshotter,
    mark: SnapshotId,
    meta: &[u8],
    body: SnapshotBody<'_>,
) -> Result<SnapshotFile> {
    let mut writer = snapshotter.create(mark.index, mark.term, meta)?;
    let written = body(&mut writer);
    written.map_err(Error::io("write to", writer.path()))?;
    writer.finish()
}
