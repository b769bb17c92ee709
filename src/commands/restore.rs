//! `raftexample snapshot restore`: makes a new cluster of one member from a backup.
//!
//! The backup is a file of [`storage::snapshotter`](crate::storage::snapshotter). Member 1 gets it, with
//! itself as the only member, and a log that starts after it. Indexes and terms continue from the
//! backup's, so each value keeps those of the entry that wrote it. The other members are added
//! and join, as in any cluster.
//!
//! The member's incarnation is new, and so is the cluster's id, which is made from it. A backup that is
//! restored twice makes two clusters, whose members refuse each other, and those of the backup's.
//!
//! # States after a crash
//! - The log's directory with a lock, or nothing: restoring can be repeated.
//! - A file `restoring` beside the lock: the member refuses to start, and so does another restore, until
//!   both directories are removed.
//! - A snapshot and a log without that file: restored.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use raft::eraftpb::HardState;

use crate::channels::SnapshotFile;
use crate::codec;
use crate::config::check_members;
use crate::error::{Error, Result, output_failed};
use crate::kvstore::count_records;
use crate::membership::{Members, SnapshotMembers};
use crate::raft_node::bootstrap::{cluster_id, list_hash};
use crate::raft_node::replay::{RESTORING, lock, snap_dir, sync_above, wal_dir};
use crate::raft_node::validate::HIGHEST;
use crate::storage::snapshotter::{Snapshot, Snapshotter, load_file};
use crate::storage::wal::{Frame, Identity, Sizes, SnapshotId, Wal};
use crate::storage::{DiskVfs, ReadOnlyVfs, Vfs};

/// `snapshot restore`: the backup, and the member to make from it.
#[derive(Clone, Debug, Args)]
pub struct Restore {
    /// Backup made by `snapshot save`, or a copy of any .snap file
    pub file: PathBuf,

    /// Peer URL of the new cluster's first member
    #[arg(long, value_name = "URL")]
    pub peer_url: String,

    /// Directory in which raftexample-1 and raftexample-1-snap are created
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub data_dir: PathBuf,
}

/// The restored member.
const ID: u64 = 1;

impl Restore {
    /// Creates the member's directories, and writes one line about them to `out`.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let incarnation = getrandom::u64()
            .map_err(|error| Error::Config(format!("cannot get random numbers: {error}")))?;
        let (cluster_id, keys) = self.restore(&ReadOnlyVfs, Arc::new(DiskVfs), incarnation)?;
        writeln!(
            out,
            "restored member {ID} of cluster {cluster_id:016x} from {}, {keys} keys; start it with --id {ID} --cluster {}, then add the others with `raftexample member add`",
            self.file.display(),
            self.peer_url
        )
        .map_err(output_failed)
    }

    /// Creates the member's directories on `vfs` from the file in `backups`. Returns the cluster id, and
    /// the number of keys.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Refused`] if the directories are not empty, or the file is no sound backup.
    pub fn restore(
        &self,
        backups: &dyn Vfs,
        vfs: Arc<dyn Vfs>,
        incarnation: u64,
    ) -> Result<(u64, u64)> {
        check_members(ID, std::slice::from_ref(&self.peer_url))?;
        let (mark, file, keys) = check_backup(backups, &self.file)?;
        let identity = Identity {
            cluster_id: cluster_id([(self.peer_url.as_str(), incarnation)].into_iter()),
            member_id: ID,
            incarnation,
            first_urls_hash: list_hash(std::slice::from_ref(&self.peer_url)),
        };
        self.write(backups, vfs, mark, file, &identity)?;
        Ok((identity.cluster_id, keys))
    }

    /// Writes the snapshot `mark` from the backup, which was `file` when it was checked, then the log
    /// that names it.
    fn write(
        &self,
        backups: &dyn Vfs,
        vfs: Arc<dyn Vfs>,
        mark: SnapshotId,
        file: SnapshotFile,
        identity: &Identity,
    ) -> Result<()> {
        let wal_dir = wal_dir(&self.data_dir, ID);
        let snap_dir = snap_dir(&self.data_dir, ID);
        self.check_empty(&*vfs, &wal_dir, &snap_dir)?;
        vfs.create_dir_all(&wal_dir).map_err(Error::io("create directory", &wal_dir))?;
        sync_above(&*vfs, &self.data_dir)?;
        let _lock = lock(&*vfs, &wal_dir)?;
        // Under the lock: a member may have started here meanwhile.
        self.check_empty(&*vfs, &wal_dir, &snap_dir)?;

        // A member with half of a restore must not start as an empty one.
        let marker = wal_dir.join(RESTORING);
        let marked = vfs.create(&marker).and_then(|file| file.sync());
        marked.and_then(|()| vfs.sync_dir(&wal_dir)).map_err(Error::io("create", &marker))?;

        let members = Members {
            urls: [(ID, self.peer_url.clone())].into(),
            incarnations: [(ID, identity.incarnation)].into(),
            ..Members::default()
        };
        let again = load_file(backups, &self.file)?;
        if again.file != file {
            return Err(Error::Refused(format!(
                "{} was replaced while it was read: remove {} and {}, and restore again",
                self.file.display(),
                wal_dir.display(),
                snap_dir.display()
            )));
        }
        let mut reader = again.reader;
        let meta = codec::encode(&SnapshotMembers::new(identity.cluster_id, members));
        Snapshotter::new(vfs.clone(), &snap_dir)?
            .create(mark, &meta, |out| io::copy(&mut reader, out).map(|_| ()))?;

        // No vote: elections of this cluster start in a later term.
        let SnapshotId { index: commit, term } = mark;
        let hard_state = HardState { term, vote: 0, commit, ..HardState::default() };
        Wal::create(vfs.clone(), &wal_dir, identity, Sizes::default())?.save(&Frame {
            installed: Some(mark),
            hard_state: Some(&hard_state),
            ..Frame::default()
        })?;
        vfs.remove(&marker).map_err(Error::io("remove", &marker))?;
        vfs.sync_dir(&wal_dir).map_err(Error::io("sync directory", &wal_dir))
    }

    fn check_empty(&self, vfs: &dyn Vfs, wal_dir: &Path, snap_dir: &Path) -> Result<()> {
        for dir in [wal_dir, snap_dir] {
            let names = match vfs.list(dir) {
                Ok(names) => names,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io("list", dir)(error)),
            };
            // A lock file alone is no data. Whether a member holds the lock is checked later.
            if let Some(name) = names.iter().find(|name| *name != "lock") {
                return Err(Error::Refused(format!(
                    "cannot restore member {ID} from {}: {} is not empty, it contains {name}; move {} and {} away, or choose another --data-dir",
                    self.file.display(),
                    dir.display(),
                    wal_dir.display(),
                    snap_dir.display()
                )));
            }
        }
        Ok(())
    }
}

/// Reads all of a backup. Returns what it is a snapshot of, its file, and its number of keys.
fn check_backup(vfs: &dyn Vfs, path: &Path) -> Result<(SnapshotId, SnapshotFile, u64)> {
    let Snapshot { index, term, meta, file, reader } = load_file(vfs, path)
        .map_err(|error| error.with_remedy("it cannot be restored: use another backup"))?;
    let refuse = |why: String| {
        Error::Refused(format!("cannot restore from {}: {why}; use another backup", path.display()))
    };
    codec::decode::<SnapshotMembers>(&meta).map_err(|error| refuse(error.to_string()))?;
    if !(1..HIGHEST).contains(&index) || !(1..HIGHEST).contains(&term) {
        return Err(refuse(format!("index {index} or term {term} is out of range")));
    }
    let keys = count_records(reader)
        .map_err(|error| refuse(format!("it does not contain keys and values: {error}")))?;
    Ok((SnapshotId { index, term }, file, keys))
}
