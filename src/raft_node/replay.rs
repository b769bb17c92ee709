//! The start from disk: directories, lock, snapshot, write-ahead log.
//!
//! The newest snapshot *that the write-ahead log names* is loaded first, then the log above it. A
//! snapshot file that the log does not name is an orphan of a crash and is removed. (The original starts
//! its store from it, ahead of its log.) A damaged snapshot is set aside if an older one and the log
//! together hold the same state.

use std::io::ErrorKind::{InvalidInput, PermissionDenied, Unsupported};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use raft::eraftpb::HardState;
use slog::{Logger, info, warn};

use super::NodeConfig;
use super::applied::Applied;
use super::bootstrap::{Bootstrap, first_urls, list_hash};
use super::lifecycle::Lifecycle;
use super::snapshots::raft_snapshot;
use crate::channels::{NodeId, SnapshotFile};
use crate::codec;
use crate::error::{Error, REPLACE_MEMBER, Result};
use crate::membership::{Admission, Own, SnapshotMembers};
use crate::storage::Vfs;
use crate::storage::log::Log;
use crate::storage::snapshotter::{Snapshot, Snapshotter};
use crate::storage::wal::{self, Identity, Recovered, SnapshotId, Wal};

/// What a node starts from, as it was on disk.
pub struct Replayed {
    /// The write-ahead log.
    pub wal: Wal,
    /// The snapshot files, shared with the transport.
    pub snapshotter: Snapshotter,
    pub(super) identity: Identity,
    pub(super) lock: Box<dyn std::any::Any + Send>,
    /// Which senders may speak, shared with the transport.
    pub admission: Arc<Admission>,
    pub(super) log: Log,
    pub(super) hard_state: HardState,
    pub(super) marks: Vec<SnapshotId>,
    pub(super) snapshot: Option<Snapshot>,
    /// As of the snapshot.
    pub(super) applied: Applied,
    pub(super) lifecycle: Lifecycle,
}

/// The file that marks a log directory while a backup is being restored into it.
pub(crate) const RESTORING: &str = "restoring";

/// The directory of member `id`'s write-ahead log.
pub fn wal_dir(data_dir: &Path, id: NodeId) -> PathBuf {
    data_dir.join(format!("raftexample-{id}"))
}

/// The directory of member `id`'s snapshots.
pub fn snap_dir(data_dir: &Path, id: NodeId) -> PathBuf {
    data_dir.join(format!("raftexample-{id}-snap"))
}

/// Opens the member's directories, creating them if needed, and replays them.
///
/// # Errors
/// [`Error::Refused`] if the directory is in use, or belongs to another member or cluster;
/// [`Error::Corrupt`] if it is damaged in a way that no crash explains; [`Error::Io`].
pub fn replay_wal(config: &NodeConfig, vfs: Arc<dyn Vfs>, logger: &Logger) -> Result<Replayed> {
    let id = config.id;
    let wal_dir = wal_dir(&config.data_dir, id);
    vfs.create_dir_all(&wal_dir).map_err(Error::io("make the directory", &wal_dir))?;
    sync_above(vfs.as_ref(), &config.data_dir)?;
    let lock = lock(vfs.as_ref(), &wal_dir)?;
    let names = vfs.list(&wal_dir).map_err(Error::io("list", &wal_dir))?;
    if names.iter().any(|name| name == RESTORING) {
        return Err(Error::Refused(format!(
            "{} is half restored: remove it and {}, and run `raftexample snapshot restore` again",
            wal_dir.display(),
            snap_dir(&config.data_dir, id).display()
        )));
    }
    info!(logger, "replaying WAL of member {}", id);
    let snapshotter = Snapshotter::new(vfs.clone(), &snap_dir(&config.data_dir, id))?;
    let (wal, recovered) = open_wal(config, vfs, &wal_dir, &snapshotter, logger)?;
    check_identity(config, &recovered.identity, &wal_dir)?;

    // What a member begins with names its cluster.
    let beginning = recovered.identity.cluster_id == 0;
    let listed = || config.cluster.get(id as usize - 1).filter(|listed| **listed != config.url);
    if let Some(listed) = (beginning && !config.join).then(listed).flatten() {
        return Err(Error::Config(format!(
            "--peer-url {} is not the URL of member {id} in --cluster ({listed}): only a member that joins, or that was moved, may differ",
            config.url
        )));
    }
    let (snapshot, marks) = load_snapshot(&snapshotter, &recovered, &wal_dir, logger)?;
    let mark = marks.last().copied().unwrap_or(SnapshotId { index: 0, term: 0 });
    info!(logger, "loading WAL at term {} and index {}", mark.term, mark.index);

    let identity = recovered.identity.clone();
    let members = match &snapshot {
        Some(snapshot) => {
            let path = snapshotter.path(mark);
            let members = read_members(&path, &snapshot.meta)?;
            check_cluster(&path, &members, &identity)?;
            members
        }
        None => SnapshotMembers::default(),
    };
    let (incarnation, url) = (identity.incarnation, config.url.clone());
    let own = Own { id, incarnation, url, first_urls: first_urls(config) };
    let lifecycle = if beginning {
        let recorded = recovered.incarnations.clone();
        Lifecycle::Bootstrapping(Bootstrap::new(config, incarnation, recorded))
    } else if recovered.quarantine != 0 {
        Lifecycle::Quarantined(recovered.quarantine)
    } else {
        Lifecycle::Running
    };
    let admission = Admission::new(own, identity.cluster_id, members.members.clone());
    let applied = Applied::new(mark.index, mark.term, members.members.clone());
    let file = snapshot.as_ref().map(|snapshot| snapshot.file);
    let log = build_log(recovered, mark, members, file, &wal_dir)?;
    // Only now: a log that is refused may lack the segment that names these files.
    snapshotter.purge(&marks)?;
    Ok(Replayed {
        wal,
        snapshotter,
        identity,
        lock,
        admission: Arc::new(admission),
        hard_state: raft::Storage::initial_state(&log).expect("it was just set").hard_state,
        log,
        marks,
        snapshot,
        applied,
        lifecycle,
    })
}

/// Makes the directory entries of the data directory and of its parents durable, in case they were just
/// created.
pub(crate) fn sync_above(vfs: &dyn Vfs, data_dir: &Path) -> Result<()> {
    for above in data_dir.ancestors().skip(1) {
        // The last ancestor of a relative path is empty: the working directory.
        let above = if above.as_os_str().is_empty() { Path::new(".") } else { above };
        let Err(error) = vfs.sync_dir(above) else { continue };
        // A directory that this process may not sync, or that is on no disk, was not changed by it.
        if !matches!(error.kind(), PermissionDenied | InvalidInput | Unsupported) {
            return Err(Error::io("sync directory", above)(error));
        }
    }
    Ok(())
}

/// Opens the write-ahead log; creates it at the first start.
fn open_wal(
    config: &NodeConfig,
    vfs: Arc<dyn Vfs>,
    wal_dir: &Path,
    snapshotter: &Snapshotter,
    logger: &Logger,
) -> Result<(Wal, Recovered)> {
    if !wal::exists(vfs.as_ref(), wal_dir)? {
        // The log is created before the first snapshot, so it was removed.
        if let Some(mark) = snapshotter.list()?.last() {
            return Err(Error::Refused(format!(
                "{} holds no log, but there is a snapshot at index {}: move both directories away, or bring the log back; {REPLACE_MEMBER}",
                wal_dir.display(),
                mark.index
            )));
        }
        let identity = Identity {
            cluster_id: 0,
            member_id: config.id,
            incarnation: config.incarnation,
            first_urls_hash: if config.join { 0 } else { list_hash(&config.cluster) },
        };
        Wal::create(vfs.clone(), wal_dir, &identity, config.wal_sizes)?;
    }
    let (wal, recovered) = Wal::open(vfs, wal_dir, config.wal_sizes)?;
    if let Some((path, offset)) = &recovered.cut {
        let path = path.display();
        warn!(logger, "cut an unfinished frame, left by a crash, off {path} at offset {offset}");
    }
    Ok((wal, recovered))
}

pub(crate) fn lock(vfs: &dyn Vfs, wal_dir: &Path) -> Result<Box<dyn std::any::Any + Send>> {
    let path = wal_dir.join("lock");
    match vfs.lock(&path).map_err(Error::io("lock", &path))? {
        Some(lock) => Ok(lock),
        None => Err(Error::Refused(format!(
            "{} is in use by another process: stop it, or choose another --data-dir",
            wal_dir.display()
        ))),
    }
}

/// Checks that the directory belongs to this member of this cluster.
fn check_identity(config: &NodeConfig, identity: &Identity, wal_dir: &Path) -> Result<()> {
    let dir = wal_dir.display();
    if identity.member_id != config.id {
        return Err(Error::Refused(format!(
            "{dir} belongs to member {}, not to --id {}",
            identity.member_id, config.id
        )));
    }
    if ![0, list_hash(&config.cluster)].contains(&identity.first_urls_hash) && !config.join {
        return Err(Error::Refused(format!(
            "{dir} was made with another --cluster list: start with the first list, whatever members there are by now"
        )));
    }
    Ok(())
}

/// Loads the newest snapshot that the log names, or the older one if the newest is damaged and the log
/// reaches back far enough. Returns the ids of those that are kept, oldest first.
fn load_snapshot(
    snapshotter: &Snapshotter,
    recovered: &Recovered,
    wal_dir: &Path,
    logger: &Logger,
) -> Result<(Option<Snapshot>, Vec<SnapshotId>)> {
    let on_disk = snapshotter.list()?;
    let mut marks = recovered.marks.clone();
    let Some(newest) = marks.pop() else { return Ok((None, Vec::new())) };
    // The one before may have been set aside.
    let older = marks.into_iter().rfind(|mark| on_disk.contains(mark));
    let damage = match snapshotter.load(newest) {
        Ok(snapshot) => {
            info!(logger, "found snapshot at term {} and index {}", newest.term, newest.index);
            return Ok((Some(snapshot), older.into_iter().chain([newest]).collect()));
        }
        Err(error @ Error::Corrupt { .. }) => error,
        Err(error @ Error::Io { .. }) => Error::Refused(format!("{error}; {REPLACE_MEMBER}")),
        Err(error) => return Err(error),
    };
    if !is_replaceable(newest, older, recovered) {
        return Err(damage);
    }
    let snapshot = older.map(|mark| snapshotter.load(mark)).transpose()?;
    if on_disk.contains(&newest) {
        let path = snapshotter.set_broken(newest)?;
        warn!(logger, "{}; it is set aside as {}", damage, path.display());
    }
    let (dir, from, instead) =
        (wal_dir.display(), older.map_or(0, |mark| mark.index), newest.index);
    warn!(logger, "replaying {dir} from index {from} instead of the snapshot at index {instead}");
    Ok((snapshot, older.into_iter().collect()))
}

/// True if the log holds all entries between the `older` snapshot (or index 0) and the damaged `newest`
/// one.
pub(crate) fn is_replaceable(
    newest: SnapshotId,
    older: Option<SnapshotId>,
    recovered: &Recovered,
) -> bool {
    let older_index = older.map_or(0, |mark| mark.index);
    recovered.base <= older_index && recovered.last_index() >= newest.index
}

/// Reads the members from the `meta` bytes of the snapshot at `path`.
pub(crate) fn read_members(path: &Path, meta: &[u8]) -> Result<SnapshotMembers> {
    codec::decode(meta).map_err(|error| {
        let path = path.display();
        Error::Refused(format!("cannot read the members in {path}: {error}; {REPLACE_MEMBER}"))
    })
}

/// Checks that the snapshot at `path` belongs to the cluster of its log.
pub(crate) fn check_cluster(path: &Path, members: &SnapshotMembers, log: &Identity) -> Result<()> {
    let (theirs, ours) = (members.cluster_id, log.cluster_id);
    if theirs != ours {
        return Err(Error::Refused(format!(
            "{} belongs to cluster {theirs:016x}, its log to {ours:016x}; {REPLACE_MEMBER}",
            path.display()
        )));
    }
    Ok(())
}

/// Combines snapshot and log, and checks what raft-rs would panic on.
fn build_log(
    recovered: Recovered,
    mark: SnapshotId,
    members: SnapshotMembers,
    file: Option<SnapshotFile>,
    wal_dir: &Path,
) -> Result<Log> {
    check_log(&recovered, mark)
        .map_err(|why| Error::Refused(format!("{}: {why}; {REPLACE_MEMBER}", wal_dir.display())))?;
    let last_index = recovered.last_index();
    let Recovered { mut entries, mut hard_state, base, .. } = recovered;
    let compacted = if last_index < mark.index || base == mark.index {
        // What the log holds up to here is in the snapshot.
        entries.retain(|entry| entry.index > mark.index);
        (mark.index, mark.term)
    } else if base == 0 {
        (0, 0)
    } else {
        // The entries below the snapshot still serve members that lag a little. The first of them is
        // given up: its term is needed as the one before the log.
        let first = entries.remove(0);
        (first.index, first.term)
    };
    hard_state.commit = hard_state.commit.max(mark.index);
    let conf_state = members.conf_state();
    let snapshot = file.map(|file| raft_snapshot(mark, members, file));
    Ok(Log::new(compacted, entries, hard_state, conf_state, snapshot))
}

/// Checks that the log fits the snapshot at `mark`, and holds all that was committed. Without a
/// snapshot, its index and term are 0. Returns what does not fit.
pub(crate) fn check_log(
    recovered: &Recovered,
    mark: SnapshotId,
) -> std::result::Result<(), String> {
    let SnapshotId { index, term } = mark;
    let base = recovered.base;
    if base > index {
        return Err(format!(
            "the log begins after index {base}, but its snapshot ends at index {index}"
        ));
    }
    if let Some(entry) = recovered.entries.iter().find(|entry| entry.index == index)
        && entry.term != term
    {
        return Err(format!("entry {index} has term {}, its snapshot term {term}", entry.term));
    }
    let (commit, last_index) = (recovered.hard_state.commit, recovered.last_index().max(index));
    if commit > last_index {
        return Err(format!("index {commit} was committed, but the log ends at {last_index}"));
    }
    Ok(())
}
