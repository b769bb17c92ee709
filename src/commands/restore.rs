//! A new cluster from a backup: `raftexample snapshot restore`.
//!
//! The backup is a snapshot file, as [`storage::snapshotter`](crate::storage::snapshotter) describes
//! it. Each first member of the new cluster is made from the same file for the same `--cluster` list:
//! its snapshot, with the new members in it, and a log that ends there. Indexes and terms go on from
//! the backup's, so that the values keep those of the entries that wrote them.
//!
//! # Who is kept apart
//!
//! By default the cluster's id is a hash of the list and the backup. So the new members agree among
//! each other, and neither members of the backup's cluster nor empty members with the same list, which
//! go by a hash of the list alone, are taken for one of them. Where `--cluster-id` names the id, the
//! incarnations keep them apart: half of one is that hash
//! ([`restored_incarnation`]). An empty member could otherwise begin, and have other entries committed
//! where the backup stands.
//!
//! # States possible after a crash
//!
//! - The directory of the log, a lock: nothing was begun. It can be restored.
//! - A file `restoring` beside the lock, and whatever else: the member refuses to start, and so does
//!   restoring, until both directories are removed.
//! - No such file, a snapshot and a log: it is restored. The log gets its name when it is whole, and the
//!   file goes after that.

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

/// What to restore, and for whom.
#[derive(Clone, Debug, Args)]
pub struct Restore {
    /// The backup: a snapshot file
    pub file: PathBuf,

    /// The member to make, one of the new --cluster
    #[arg(long, env = "RAFTEXAMPLE_ID")]
    pub id: u64,

    /// Peer URLs of the new cluster's first members, the same for each of them
    #[arg(long, value_delimiter = ',', required = true, env = "RAFTEXAMPLE_CLUSTER")]
    pub cluster: Vec<String>,

    /// Where the directories raftexample-ID and raftexample-ID-snap are made
    #[arg(long, default_value = ".", env = "RAFTEXAMPLE_DATA_DIR")]
    pub data_dir: PathBuf,

    /// The new cluster's id, never used before [default: derived from --cluster and the file]
    #[arg(long, value_parser = parse_cluster_id, env = "RAFTEXAMPLE_CLUSTER_ID")]
    pub cluster_id: Option<u64>,
}

impl Restore {
    /// Makes the member's directories, and says in one line on `out` what it did.
    ///
    /// # Errors
    /// [`Error::Config`] for flags that cannot be used, [`Error::Corrupt`] and [`Error::Refused`] for a
    /// file that cannot be, [`Error::Refused`] for directories that are not empty; [`Error::Io`].
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        check_members(self.id, &self.cluster)?;
        if self.id > self.cluster.len() as u64 {
            return Err(Error::Config(format!(
                "--id {} is none of the {} members in --cluster: restore those, and add others with POST later",
                self.id,
                self.cluster.len()
            )));
        }
        if let Some(other) =
            self.cluster.iter().find(|url| is_https(url) != is_https(&self.cluster[0]))
        {
            return Err(Error::Config(format!(
                "--cluster: {other} and {} have to begin alike: all with https:// or none",
                self.cluster[0]
            )));
        }
        let files = ReadOnlyVfs::new(|_| {});
        let (backup, keys) = check_backup(&files, &self.file)?;
        let identity = self.identity(&backup)?;
        self.write(Arc::new(DiskVfs), backup, &identity, &files)?;
        writeln!(
            out,
            "restored member {} of cluster {:016x} from {}, {keys} keys; when each member of --cluster is, start them with --cluster {}",
            self.id,
            identity.cluster_id,
            self.file.display(),
            self.cluster.join(",")
        )
        .map_err(Error::io("write to", Path::new("standard output")))
    }

    /// Who the new member is.
    fn identity(&self, backup: &Backup) -> Result<Identity> {
        let list = derived_cluster_id(&self.cluster);
        let restoration = derived_cluster_id(&[&self.cluster[..], &[backup.name()]].concat());
        let cluster_id = self.cluster_id.unwrap_or(restoration);
        if cluster_id == backup.cluster_id || cluster_id == list {
            let whose = if cluster_id == list { "empty members" } else { "the backup's cluster" };
            return Err(Error::Config(format!(
                "--cluster-id 0x{cluster_id:016x} is the id of {whose}, whose members must not be mixed with these: choose another, or leave it out"
            )));
        }
        let random = getrandom::u64()
            .map_err(|error| Error::Config(format!("no random numbers: {error}")))?;
        Ok(Identity {
            cluster_id,
            member_id: self.id,
            incarnation: restored_incarnation(restoration, random),
            first_urls_hash: list,
        })
    }

    /// Writes the snapshot, and then the log that names it.
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
        vfs.create_dir_all(&wal_dir).map_err(Error::io("make the directory", &wal_dir))?;
        sync_above(&*vfs, &self.data_dir)?;
        let _lock = lock(&*vfs, &wal_dir)?;
        // A member may have been started here just now.
        self.check_empty(&*vfs, &wal_dir, &snap_dir)?;

        // Until it is whole, it must not be started as a member that begins empty.
        let mark = wal_dir.join(RESTORING);
        let marked = vfs.create(&mark).and_then(|file| file.sync());
        marked.and_then(|()| vfs.sync_dir(&wal_dir)).map_err(Error::io("make", &mark))?;

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
                "{} was replaced while it was read: remove {} and {}, and restore all members from one file",
                self.file.display(),
                wal_dir.display(),
                snap_dir.display()
            )));
        }
        let mut reader = again.reader;
        io::copy(&mut reader, &mut snapshot).map_err(Error::io("copy to", snapshot.path()))?;
        snapshot.finish()?;

        // Nobody has voted in this term of this cluster, and nobody will: elections begin behind it.
        let hard_state = HardState { term, vote: 0, commit: index, ..HardState::default() };
        Wal::create_behind(vfs.clone(), &wal_dir, identity, backup.mark, &hard_state)?;
        vfs.remove(&mark).map_err(Error::io("remove", &mark))?;
        vfs.sync_dir(&wal_dir).map_err(Error::io("sync directory", &wal_dir))
    }

    fn check_empty(&self, vfs: &dyn Vfs, wal_dir: &Path, snap_dir: &Path) -> Result<()> {
        for dir in [wal_dir, snap_dir] {
            let names = match vfs.list(dir) {
                Ok(names) => names,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io("list", dir)(error)),
            };
            // A lock alone holds nothing; who holds it is seen when it is taken.
            if let Some(name) = names.iter().find(|name| *name != "lock") {
                return Err(Error::Refused(format!(
                    "cannot restore member {} from {}: {} is not empty, it holds {name}; move {} and {} away, or choose another --data-dir",
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

/// What is known of a backup that was checked.
struct Backup {
    mark: SnapshotId,
    cluster_id: u64,
    length: u64,
    checksum: u32,
}

impl Backup {
    /// What tells it from other backups. A URL, and so a list of them, holds no space.
    fn name(&self) -> String {
        let Self { mark: SnapshotId { index, term }, cluster_id, length, checksum } = self;
        format!("snapshot {term} {index} {cluster_id} {length} {checksum}")
    }
}

/// Reads all of a backup; returns the number of keys too.
fn check_backup(files: &ReadOnlyVfs, path: &Path) -> Result<(Backup, u64)> {
    let Snapshot { index, term, meta, file, reader } = load_file(files, path).map_err(|error| {
        match error {
            // The remedies are for a member whose own it is.
            Error::Corrupt { path, offset, reason, .. } => Error::Corrupt {
                path,
                offset,
                reason,
                remedy: "it cannot be restored from: take another backup",
            },
            other => other,
        }
    })?;
    let refuse = |why: String| {
        Error::Refused(format!(
            "cannot restore from {}: {why}; take another backup",
            path.display()
        ))
    };
    let members = SnapshotMembers::decode(&meta).map_err(|error| refuse(error.to_string()))?;
    if !(1..HIGHEST).contains(&index) || !(1..HIGHEST).contains(&term) {
        return Err(refuse(format!("there is no index {index} or no term {term}")));
    }
    let mut keys = 0;
    read_records(reader, |_| {
        keys += 1;
        Ok(())
    })
    .map_err(|error| refuse(format!("it holds no keys and values: {error}")))?;
    let backup = Backup {
        mark: SnapshotId { index, term },
        cluster_id: members.cluster_id,
        length: file.length,
        checksum: file.checksum,
    };
    Ok((backup, keys))
}
