//! Programs that are wrong on purpose: the simulation has to notice each of them.
//!
//! Most are made at a seam, so that the code under test stays as it is: a disk that forgets a sync, a
//! network that shows admission another header. Those that no seam reaches are in [`super::patches`].

use std::any::Any;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use raftexample::storage::{Vfs, VfsFile};

use crate::support::memory::MemVfs;

/// A mutant made at a seam.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seam {
    /// fdatasync does nothing.
    NoSync,
    /// Created, renamed or removed names are never synced.
    NoDirectorySync,
    /// Messages leave and clients are answered before the data they depend on is on disk.
    SentBeforeSaved,
    /// The WAL names a snapshot whose file is not on disk yet.
    SnapshotNamedBeforeItsFile,
    /// A write is acknowledged when it is given to raft.
    AcknowledgedBeforePersisted,
    /// Each start draws the same "random" bits: request ids and read contexts repeat.
    ContextsReused,
    /// A batch that arrives twice is taken twice.
    BatchFilterOff,
    /// Every cluster, receiver and incarnation is admitted.
    AdmissionOff,
    /// Every incarnation is admitted.
    IncarnationsIgnored,
}

impl Seam {
    /// Each mutant with the number of seeds within which it must be caught.
    pub const ALL: [(Self, u64); 9] = [
        (Self::NoSync, 10),
        (Self::NoDirectorySync, 10),
        (Self::SentBeforeSaved, 10),
        (Self::SnapshotNamedBeforeItsFile, 4_000),
        (Self::AcknowledgedBeforePersisted, 10),
        (Self::ContextsReused, 100),
        (Self::BatchFilterOff, 100),
        (Self::AdmissionOff, 100),
        (Self::IncarnationsIgnored, 1_000),
    ];

    pub fn is_on_disk(self) -> bool {
        matches!(
            self,
            Self::NoSync
                | Self::NoDirectorySync
                | Self::SentBeforeSaved
                | Self::SnapshotNamedBeforeItsFile
        )
    }

    /// What happens to a sync of this file or directory.
    fn forgets(self, path: &Path, is_directory: bool) -> Forgets {
        let is_snapshot = path.to_string_lossy().contains("-snap");
        match self {
            Self::NoSync if !is_directory => Forgets::ForEver,
            Self::NoDirectorySync if is_directory => Forgets::ForEver,
            Self::SentBeforeSaved => Forgets::ForATurn,
            Self::SnapshotNamedBeforeItsFile if is_snapshot => Forgets::ForATurn,
            _ => Forgets::Nothing,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Forgets {
    Nothing,
    ForATurn,
    ForEver,
}

/// A disk that skips syncs.
#[derive(Clone)]
pub struct Forgetful {
    disk: MemVfs,
    seam: Seam,
    /// Postponed syncs: path, whether it is a directory, and the turn.
    postponed: Arc<Mutex<Vec<(PathBuf, bool, u64)>>>,
    turn: Arc<Mutex<u64>>,
}

impl Forgetful {
    pub fn new(disk: MemVfs, seam: Seam) -> Self {
        Self { disk, seam, postponed: Arc::default(), turn: Arc::default() }
    }

    /// Makes the syncs that were postponed before the last turn.
    pub fn begin_turn(&self) -> io::Result<()> {
        let mut turn = self.turn.lock().unwrap();
        *turn += 1;
        let due: Vec<_> = {
            let mut postponed = self.postponed.lock().unwrap();
            postponed.extract_if(.., |(_, _, since)| *since + 1 < *turn).collect()
        };
        for (path, is_directory, _) in due {
            if is_directory {
                self.disk.sync_dir(&path)?;
            } else if let Ok(file) = self.disk.open(&path) {
                file.sync()?;
            }
        }
        Ok(())
    }

    /// True if the sync is skipped for now.
    fn forgets(&self, path: &Path, is_directory: bool) -> bool {
        match self.seam.forgets(path, is_directory) {
            Forgets::Nothing => false,
            Forgets::ForEver => true,
            Forgets::ForATurn => {
                let turn = *self.turn.lock().unwrap();
                self.postponed.lock().unwrap().push((path.to_owned(), is_directory, turn));
                true
            }
        }
    }

    fn wrap(&self, path: &Path, file: Box<dyn VfsFile>) -> Box<dyn VfsFile> {
        Box::new(ForgetfulFile { vfs: self.clone(), path: path.to_owned(), file })
    }
}

impl Vfs for Forgetful {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.disk.create_dir_all(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn VfsFile>> {
        Ok(self.wrap(path, self.disk.create(path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn VfsFile>> {
        Ok(self.wrap(path, self.disk.open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        for (path, _, _) in self.postponed.lock().unwrap().iter_mut() {
            if path == from {
                *path = to.to_owned();
            }
        }
        self.disk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.disk.list(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        if self.forgets(path, true) { Ok(()) } else { self.disk.sync_dir(path) }
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Any + Send>>> {
        self.disk.lock(path)
    }
}

struct ForgetfulFile {
    vfs: Forgetful,
    path: PathBuf,
    file: Box<dyn VfsFile>,
}

impl VfsFile for ForgetfulFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn sync(&self) -> io::Result<()> {
        if self.vfs.forgets(&self.path, false) { Ok(()) } else { self.file.sync() }
    }
}
