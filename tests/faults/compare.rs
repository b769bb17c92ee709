//! Compares the disks and logs of stopped members.

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;

use raft::eraftpb::EntryType;
use raftexample::channels::{
    BacklogPermit, Commit, CommittedEntry, SnapshotRequest, SnapshotRestore,
};
use raftexample::kvstore::KvStore;
use raftexample::raft_node::NodeConfig;
use raftexample::raft_node::replay::{snap_dir, wal_dir};
use raftexample::storage::DiskVfs;
use raftexample::storage::snapshotter::Snapshotter;
use raftexample::storage::wal::{Recovered, Wal};

use crate::support::config::closed;
use crate::support::logs;
use crate::support::processes::{files_in, leaders};

/// Asserts what holds between the stopped members in `dir`: those in `ids`, which were up to date
/// when they stopped, and those removed or given up before.
pub fn compare(dir: &Path, ids: &[u64]) {
    let members: Vec<Stopped> =
        member_ids(dir).into_iter().map(|id| Stopped::read(dir, id)).collect();
    for (position, member) in members.iter().enumerate() {
        members[..position].iter().for_each(|other| assert_same_log(other, member));
    }
    assert_same_states(&members, ids);
    assert_logs(dir);
}

/// The members with a directory.
fn member_ids(dir: &Path) -> Vec<u64> {
    let names = fs::read_dir(dir).unwrap().flatten();
    let mut ids: Vec<u64> = names
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("raftexample-")?.parse().ok())
        .collect();
    ids.sort_unstable();
    ids
}

/// A member, as found in its directories.
struct Stopped {
    id: u64,
    recovered: Recovered,
    /// Its last known commit index.
    commit: u64,
    /// The application bytes of each snapshot, by index and term.
    snapshots: BTreeMap<(u64, u64), Vec<u8>>,
}

impl Stopped {
    fn read(dir: &Path, id: u64) -> Self {
        let recovered = Wal::read(&DiskVfs, &wal_dir(dir, id)).unwrap();
        let snapshotter = Snapshotter::new(Arc::new(DiskVfs), &snap_dir(dir, id)).unwrap();
        let on_disk = snapshotter.list().unwrap();
        let mut snapshots = BTreeMap::new();
        for mark in recovered.marks.iter().filter(|mark| on_disk.contains(mark)) {
            let mut bytes = Vec::new();
            snapshotter.load(*mark).unwrap().reader.read_to_end(&mut bytes).unwrap();
            snapshots.insert((mark.index, mark.term), bytes);
        }
        // raft's hard state is not written again for a snapshot that it covers already.
        let newest = snapshots.keys().last().map_or(0, |(index, _)| *index);
        let commit = recovered.hard_state.commit.max(newest);
        let last = recovered.last_index().max(newest);
        assert!(commit <= last, "member {id}: commit {commit}, last {last}");
        Self { id, recovered, commit, snapshots }
    }

    /// The state after the entry at `index`, from the oldest snapshot and the log after it, or
    /// `None` if this member does not know it.
    fn state_at(&self, index: u64) -> Option<Vec<u8>> {
        let start = self.recovered.base;
        let base = self.snapshots.iter().find(|((at, _), _)| start <= *at && *at <= index);
        if index > self.commit || base.is_none() && start > 0 {
            return None;
        }
        let logger = logs::discard();
        let config = NodeConfig::default();
        let (_store, mut reader) = KvStore::new(&config, closed(), logger);
        let mut applied = 0;
        if let Some(((at, term), bytes)) = base {
            applied = *at;
            let reader_of_bytes = Box::new(Cursor::new(bytes.clone()));
            let restore = SnapshotRestore { index: *at, term: *term, reader: reader_of_bytes };
            reader.handle(Commit::Restore(restore)).unwrap();
        }
        let entries = self.recovered.entries.iter();
        let entries = entries.filter(|entry| applied < entry.index && entry.index <= index);
        // raft's own entries are empty; commands are not.
        let commands = entries.filter(|entry| {
            entry.get_entry_type() == EntryType::EntryNormal && !entry.data.is_empty()
        });
        let entries = commands
            .map(|entry| CommittedEntry {
                index: entry.index,
                term: entry.term,
                data: entry.data.clone(),
                responder: None,
            })
            .collect();
        let applied = BacklogPermit::new(0, &Arc::default());
        reader.handle(Commit::Entries { entries, applied }).unwrap();
        let (bytes_tx, bytes_rx) = std::sync::mpsc::channel();
        let save = Box::new(move |body: raftexample::channels::SnapshotBody<'_>| {
            let mut bytes = Vec::new();
            body(&mut bytes).unwrap();
            bytes_tx.send(bytes).unwrap();
        });
        reader.handle(Commit::Snapshot(SnapshotRequest { index, save })).unwrap();
        Some(bytes_rx.recv().unwrap())
    }
}

/// Committed entries never change: two members agree on every entry that both have and know to be
/// committed.
fn assert_same_log(one: &Stopped, other: &Stopped) {
    let commit = one.commit.min(other.commit);
    let by_index: BTreeMap<u64, _> =
        other.recovered.entries.iter().map(|entry| (entry.index, entry)).collect();
    for entry in one.recovered.entries.iter().filter(|entry| entry.index <= commit) {
        if let Some(same) = by_index.get(&entry.index) {
            assert_eq!(
                &entry, same,
                "entry {} of member {} and of member {}",
                entry.index, one.id, other.id
            );
        }
    }
}

/// The same index gives the same bytes: at the last index that all of `ids` know, and at each
/// snapshot, which must also match the log.
fn assert_same_states(members: &[Stopped], ids: &[u64]) {
    let up_to_date = || members.iter().filter(|member| ids.contains(&member.id));
    let last = up_to_date().map(|member| member.commit).min().expect("there are members");
    for member in up_to_date() {
        assert!(
            member.state_at(last).is_some(),
            "member {} cannot go back from {} to {last}",
            member.id,
            member.commit
        );
    }
    let snapshots = || members.iter().flat_map(|member| &member.snapshots);
    let mut indexes: Vec<u64> = snapshots().map(|((index, _), _)| *index).chain([last]).collect();
    indexes.sort_unstable();
    indexes.dedup();
    for index in indexes {
        let of_log = members.iter().filter_map(|member| Some((member.id, member.state_at(index)?)));
        let of_snapshot = members.iter().flat_map(|member| {
            let here = member.snapshots.iter().filter(|((at, _), _)| *at == index);
            here.map(|(_, bytes)| (member.id, bytes.clone()))
        });
        let states: Vec<(u64, Vec<u8>)> = of_log.chain(of_snapshot).collect();
        for pair in states.windows(2) {
            let [(one, state), (other, other_state)] = pair else { unreachable!("it is a pair") };
            assert!(
                state == other_state,
                "members {one} and {other} differ after entry {index}: {} and {} bytes",
                state.len(),
                other_state.len()
            );
        }
    }
}

/// No log names two leaders of a term, and no member panicked.
fn assert_logs(dir: &Path) {
    let mut leader_of = BTreeMap::new();
    for path in files_in(dir) {
        if path.extension().is_none_or(|extension| extension != "log") {
            continue;
        }
        let log = String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned();
        assert!(!log.contains("panicked at"), "{} has a panic", path.display());
        for (term, leader) in leaders(&log) {
            let first = *leader_of.entry(term).or_insert(leader);
            assert_eq!(first, leader, "leaders of term {term}, {}", path.display());
        }
    }
}
