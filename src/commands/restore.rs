//! `raftexample snapshot restore`: makes a member of a new cluster from a backup.
//!
//! The backup is a snapshot file as [`storage::snapshotter`](crate::storage::snapshotter) describes it.
//! Each first member of the new cluster is restored from the same file with the same `--cluster` list:
//! it gets the snapshot, with the new members in it, and a log that starts after it. Indexes and terms
//! continue from the backup's, so each value keeps the index and term of the entry that wrote it.
//!
//! # Isolation from other clusters
//!
//! By default the cluster id is a hash of the list and the backup. So the restored members accept each
//! other, and refuse members of the backup's cluster and empty members with the same list, whose id is
//! a hash of the list alone. If `--cluster-id` sets the id, incarnations separate them: half of each is
//! that hash ([`restored_incarnation`]). Otherwise an empty member could bootstrap, and have other
//! entries committed at the indexes of the backup.
//!
//! # States after a crash
//!
//! - The log's directory with a lock, or nothing: restoring can be repeated.
//! - A file `restoring` beside the lock: the member refuses to start, and so does another restore, until
//!   both directories are removed.
//! - A snapshot and a log without that file: restored. The log gets its name when it is complete; the
//!   file is removed after that.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use raft::eraftpb::HardState;

use crate::codec;
use crate::config::{check_members, parse_cluster_id};
use crate::error::{Error, Result};
use crate::kvstore::read_records;
use crate::membership::{Members, SnapshotMembers, is_https, restored_incarnation};
use crate::raft_node::replay::{
    RESTORING, derived_cluster_id, lock, snap_dir, sync_above, wal_dir,
};
use crate::raft_node::validate::HIGHEST;
use crate::storage::snapshotter::{Snapshot, Snapshotter, load_file};
use crate::storage::wal::{Identity, SnapshotId, Wal};
use crate::storage::{DiskVfs, ReadOnlyVfs, Vfs};

/// `snapshot restore`: the backup, and the member to make from it.
#[derive(Clone, Debug, Args)]
pub struct Restore {
    /// Backup made by `snapshot save`, or a copy of any .snap file
    pub file: PathBuf,

    /// Id of the member to make: its position in --cluster, from 1
    #[arg(long, env = "RAFTEXAMPLE_ID")]
    pub id: u64,

    /// Peer URLs of the new cluster's members, comma-separated; the same for each member
    #[arg(
        long,
        value_name = "URLS",
        value_delimiter = ',',
        required = true,
        env = "RAFTEXAMPLE_CLUSTER"
    )]
    pub cluster: Vec<String>,

    /// Directory in which raftexample-ID and raftexample-ID-snap are created
    #[arg(long, value_name = "DIR", default_value = ".", env = "RAFTEXAMPLE_DATA_DIR")]
    pub data_dir: PathBuf,

    /// Id of the new cluster, never used before [default: derived from --cluster and FILE]
    #[arg(long, value_name = "ID", value_parser = parse_cluster_id, env = "RAFTEXAMPLE_CLUSTER_ID")]
    pub cluster_id: Option<u64>,
}

impl Restore {
    /// Creates the member's directories, and writes one line about them to `out`.
    ///
    /// # Errors
    /// [`Error::Config`] for invalid flags, [`Error::Corrupt`] and [`Error::Refused`] for an unusable
    /// backup, [`Error::Refused`] if the directories are not empty; [`Error::Io`].
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        check_members(self.id, &self.cluster)?;
        if self.id > self.cluster.len() as u64 {
            return Err(Error::Config(format!(
                "--id {} is beyond the {} members in --cluster: restore those, and add others later with `member add`",
                self.id,
                self.cluster.len()
            )));
        }
        if let Some(other) =
            self.cluster.iter().find(|url| is_https(url) != is_https(&self.cluster[0]))
        {
            return Err(Error::Config(format!(
                "--cluster mixes {other} and {}: use https:// in all URLs or in none",
                self.cluster[0]
            )));
        }
        let files = ReadOnlyVfs::new(|_| {});
        let (backup, keys) = check_backup(&files, &self.file)?;
        let identity = self.identity(&backup)?;
        self.write(Arc::new(DiskVfs), backup, &identity, &files)?;
        writeln!(
            out,
            "restored member {} of cluster {:016x} from {}, {keys} keys; restore all members, then start them with --cluster {}",
            self.id,
            identity.cluster_id,
            self.file.display(),
            self.cluster.join(",")
        )
        .map_err(Error::io("write to", Path::new("standard output")))
    }

    /// The identity of the new member.
    fn identity(&self, backup: &Backup) -> Result<Identity> {
        let list = derived_cluster_id(&self.cluster);
        let restoration = derived_cluster_id(&[&self.cluster[..], &[backup.name()]].concat());
        let cluster_id = self.cluster_id.unwrap_or(restoration);
        if cluster_id == backup.cluster_id || cluster_id == list {
            let whose = if cluster_id == list { "empty members" } else { "the backup's cluster" };
            return Err(Error::Config(format!(
                "--cluster-id 0x{cluster_id:016x} is already the id of {whose}: choose another, or leave it out"
            )));
        }
        let random = getrandom::u64()
            .map_err(|error| Error::Config(format!("cannot get random numbers: {error}")))?;
        Ok(Identity {
            cluster_id,
            member_id: self.id,
            incarnation: restored_incarnation(restoration, random),
            first_urls_hash: list,
        })
    }

    /// Writes the snapshot, then the log that names it.
    fn write(
        &self,
        vfs: Arc<dyn Vfs>,
        backup: Backup,
        identity: &Identity,
        files: &ReadOnlyVfs,
    ) -> Result<()> {
        let wal_dir = wal_dir(&self.data_dir, self.id);
        let snap_dir = snap_dir(&self.data_dir, self.id);
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

        let urls = (1..).zip(self.cluster.iter().cloned()).collect();
        let members = SnapshotMembers {
            cluster_id: identity.cluster_id,
            voters: (1..=self.cluster.len() as u64).collect(),
            learners: Vec::new(),
            members: Members { urls, ..Members::default() },
        };
        let SnapshotId { index, term } = backup.mark;
        let snapshotter = Snapshotter::new(vfs.clone(), &snap_dir)?;
        let mut snapshot = snapshotter.create(index, term, &codec::encode(&members))?;
        let again = load_file(files, &self.file)?;
        if (again.file.length, again.file.checksum) != (backup.length, backup.checksum) {
            return Err(Error::Refused(format!(
                "{} was replaced while it was read: remove {} and {}, and restore all members from the same file",
                self.file.display(),
                wal_dir.display(),
                snap_dir.display()
            )));
        }
        let mut reader = again.reader;
        io::copy(&mut reader, &mut snapshot).map_err(Error::io("copy to", snapshot.path()))?;
        snapshot.finish()?;

        // No vote: elections of this cluster start in a later term.
        let hard_state = HardState { term, vote: 0, commit: index, ..HardState::default() };
        Wal::create_behind(vfs.clone(), &wal_dir, identity, backup.mark, &hard_state)?;
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
                    "cannot restore member {} from {}: {} is not empty, it contains {name}; move {} and {} away, or choose another --data-dir",
                    self.id,
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

/// A backup that was checked.
struct Backup {
    mark: SnapshotId,
    cluster_id: u64,
    length: u64,
    checksum: u32,
}

impl Backup {
    /// Distinguishes it from other backups, and from URLs, which contain no space.
    fn name(&self) -> String {
        let Self { mark: SnapshotId { index, term }, cluster_id, length, checksum } = self;
        format!("snapshot {term} {index} {cluster_id} {length} {checksum}")
    }
}

/// Reads all of a backup. Returns its number of keys, too.
fn check_backup(files: &ReadOnlyVfs, path: &Path) -> Result<(Backup, u64)> {
    let Snapshot { index, term, meta, file, reader } = load_file(files, path)
        .map_err(|error| error.with_remedy("it cannot be restored: use another backup"))?;
    let refuse = |why: String| {
        Error::Refused(format!("cannot restore from {}: {why}; use another backup", path.display()))
    };
    let members = SnapshotMembers::decode(&meta).map_err(|error| refuse(error.to_string()))?;
    if !(1..HIGHEST).contains(&index) || !(1..HIGHEST).contains(&term) {
        return Err(refuse(format!("index {index} or term {term} is out of range")));
    }
    let mut keys = 0;
    read_records(reader, |_| {
        keys += 1;
        Ok(())
    })
    .map_err(|error| refuse(format!("it does not contain keys and values: {error}")))?;
    let backup = Backup {
        mark: SnapshotId { index, term },
        cluster_id: members.cluster_id,
        length: file.length,
        checksum: file.checksum,
    };
    Ok((backup, keys))
}
