//! The snapshots of a member: one file each, named after the last entry that it contains.
//!
//! ```text
//! raftexample-1-snap/
//!   0000000000000002-0000000000002711.snap           term 2, index 10001
//!   0000000000000002-0000000000004e22.snap           the next one; two are kept
//!   0000000000000002-0000000000007533.snap.0.tmp     being made or received
//! ```
//! The bytes of a file, with little-endian numbers and masked CRC32C checksums:
//!
//! ```text
//!  | magic     | version | meta bytes | index | term  | meta | checksum of all |
//!  | (8 bytes) | (u32)   | (u32)      | (u64) | (u64) |      | before it (u32) |     the header
//!  +-----------+---------+------------+-------+-------+------+-----------------+
//!  | application bytes                                                         |
//!  +---------------------------------+-----------------------------------------+
//!  | length of the application bytes | checksum of all bytes before it         |     the trailer
//!  | (u64)                           | (u32)                                   |
//!  +---------------------------------+-----------------------------------------+
//! ```
//! The mask is LevelDB's: rotate right by 15 bits, then add 0xa282ead8. It is needed because the CRC of
//! bytes that end in their own plain CRC is a constant. Then [`SnapshotFile::checksum`], which covers
//! the whole file, would be the same for all snapshots.
//!
//! The application bytes are the state of the state machine. The meta bytes are the node's: what else
//! a member has to know as of that index. This module interprets neither.
//!
//! [`wal`](super::wal#adding-a-format-version) states what raises the [`VERSION`].
//!
//! # States after a crash
//! - While a snapshot is made or received: a `.tmp` file, which the next start removes.
//! - After the rename: the complete file, because it is synced before the rename. The log does not name
//!   it yet. So nothing uses it, and the next [`Snapshotter::purge`] removes it.
//! - During a purge: some of the files to remove. None of them is needed.
//! - During [`Snapshotter::set_broken`]: the old name or the new one. With the old name, the next start
//!   detects the damage again.

mod format;
#[cfg(test)]
mod tests;
mod writer;

use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use self::format::{BUFFER_BYTES, Checked};
pub use self::format::{MAGIC, VERSION};
pub use self::writer::{Received, SnapshotReceiver, write_snapshot};
use self::writer::{Summed, TemporaryFile};
use super::files::{self, FileReader};
use super::wal::SnapshotId;
use super::{Vfs, VfsFile};
use crate::channels::SnapshotFile;
use crate::error::{Error, Result};

/// The pause after each sync of a snapshot that is made, as a multiple of the time that the sync took.
/// Nothing waits for such a snapshot, so it leaves the disk to the log.
const REST_PER_SYNC: u32 = 2;
/// The suffix of a snapshot's file name.
const SUFFIX: &str = ".snap";
/// The additional suffix of a damaged snapshot's file name.
const BROKEN: &str = ".broken";

/// The snapshots of one member.
///
/// A file with its final name is complete and never changes. A reader keeps its file open and can
/// finish reading after a purge. The errors are [`Error::Io`].
#[derive(Clone)]
pub struct Snapshotter {
    vfs: Arc<dyn Vfs>,
    dir: PathBuf,
    /// Counts the temporary files, for unique names.
    temporaries: Arc<AtomicU64>,
}

/// A snapshot whose file was checked.
pub struct Snapshot {
    /// The index of the last entry that it contains.
    pub index: u64,
    /// The term of that entry.
    pub term: u64,
    /// The meta bytes.
    pub meta: Vec<u8>,
    /// Length and checksum of the whole file.
    pub file: SnapshotFile,
    /// Reads the application bytes.
    pub reader: Box<dyn Read + Send>,
}

impl Snapshotter {
    /// Creates `dir`, and removes temporary files that a crash left. Only one `Snapshotter` and its
    /// clones may exist for a directory.
    pub fn new(vfs: Arc<dyn Vfs>, dir: &Path) -> Result<Self> {
        files::make_dir(&*vfs, dir)?;
        files::remove_temporary(&*vfs, dir, |name| {
            name.rsplit_once('.').is_some_and(|(snapshot, _counter)| parse_name(snapshot).is_some())
        })?;
        Ok(Self { vfs, dir: dir.to_owned(), temporaries: Arc::default() })
    }

    /// Makes a snapshot of the state after entry `id`. `body` writes the application bytes. The
    /// snapshot is durable when this returns. After an error, it may or may not exist.
    pub fn create(
        &self,
        id: SnapshotId,
        meta: &[u8],
        body: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<SnapshotFile> {
        let mut file = TemporaryFile::create(self, id, REST_PER_SYNC)?;
        let written = write_snapshot(&mut file, id, meta, body);
        let written = written.map_err(Error::io("write to", &file.path))?;
        file.publish()?;
        Ok(written)
    }

    /// Begins a copy of a peer's file with the announced length and checksum.
    pub fn receive(
        &self,
        index: u64,
        term: u64,
        expected: SnapshotFile,
    ) -> Result<SnapshotReceiver> {
        let id = SnapshotId { index, term };
        let file = Summed::new(TemporaryFile::create(self, id, 0)?);
        Ok(SnapshotReceiver { file, id, expected, excess: false })
    }

    /// Checks a snapshot's whole file, and opens its application bytes.
    ///
    /// # Errors
    /// Also [`Error::Corrupt`] if the file is damaged, and [`Error::OtherVersion`].
    pub fn load(&self, id: SnapshotId) -> Result<Snapshot> {
        load_file(&*self.vfs, &self.path(id))
    }

    /// Opens a snapshot that was checked when it was received, and does not check it again. Returns its
    /// meta bytes and a reader of its application bytes.
    pub fn open_received(&self, id: SnapshotId) -> Result<(Vec<u8>, Box<dyn Read + Send>)> {
        let (file, path, length) = self.open(id)?;
        let (meta, application) = format::read_unchecked(&*file, &path, length)?;
        Ok((meta, reader(file, application)))
    }

    /// Opens a snapshot's whole file to send it. Returns its length in bytes and a reader. The receiver
    /// checks the bytes.
    pub fn open_raw(&self, index: u64, term: u64) -> Result<(u64, Box<dyn Read + Send>)> {
        let (file, _, length) = self.open(SnapshotId { index, term })?;
        Ok((length, reader(file, 0..length)))
    }

    fn open(&self, id: SnapshotId) -> Result<(Box<dyn VfsFile>, PathBuf, u64)> {
        let path = self.path(id);
        let file = self.vfs.open(&path).map_err(Error::io("open", &path))?;
        let length = file.len().map_err(Error::io("read the length of", &path))?;
        Ok((file, path, length))
    }

    /// Renames a damaged snapshot, so that an operator can examine it. Returns its new path.
    pub fn set_broken(&self, id: SnapshotId) -> Result<PathBuf> {
        let path = self.path(id);
        let broken = files::with_suffix(&path, BROKEN);
        self.vfs.rename(&path, &broken).map_err(Error::io("rename", &path))?;
        files::sync_dir(&*self.vfs, &self.dir)?;
        Ok(broken)
    }

    /// Removes all snapshots except those in `keep`. Snapshots that the log is about to name must be
    /// in `keep`. Broken and temporary files stay.
    pub fn purge(&self, keep: &[SnapshotId]) -> Result<()> {
        let mut removed = false;
        for id in self.list()? {
            if !keep.contains(&id) {
                let path = self.path(id);
                self.vfs.remove(&path).map_err(Error::io("remove", &path))?;
                removed = true;
            }
        }
        if removed {
            files::sync_dir(&*self.vfs, &self.dir)?;
        }
        Ok(())
    }

    /// The snapshots in the directory by term and then by index, whether or not the log names them.
    pub fn list(&self) -> Result<Vec<SnapshotId>> {
        list(&*self.vfs, &self.dir)
    }

    /// The path of a snapshot's file, whether or not it exists.
    pub fn path(&self, id: SnapshotId) -> PathBuf {
        path(&self.dir, id)
    }
}

fn reader(file: Box<dyn VfsFile>, range: std::ops::Range<u64>) -> Box<dyn Read + Send> {
    let reader = FileReader { file, offset: range.start, end: range.end };
    Box::new(BufReader::with_capacity(BUFFER_BYTES, reader))
}

/// Checks the whole file at `path`, and opens its application bytes. If the file has the name of a
/// snapshot, it must hold that snapshot. A copy may have any other name.
pub fn load_file(vfs: &dyn Vfs, path: &Path) -> Result<Snapshot> {
    let file = vfs.open(path).map_err(Error::io("open", path))?;
    let named = path.file_name().and_then(|name| parse_name(name.to_str()?));
    let Checked { id: SnapshotId { index, term }, meta, file: length_and_checksum, application } =
        format::check(&*file, path, named)?;
    let reader = reader(file, application);
    Ok(Snapshot { index, term, meta, file: length_and_checksum, reader })
}

/// The snapshots in `dir`, as [`Snapshotter::list`].
pub fn list(vfs: &dyn Vfs, dir: &Path) -> Result<Vec<SnapshotId>> {
    let names = vfs.list(dir).map_err(Error::io("list", dir))?;
    let mut ids: Vec<_> = names.iter().filter_map(|name| parse_name(name)).collect();
    ids.sort_unstable_by_key(|id| (id.term, id.index));
    Ok(ids)
}

/// The path of a snapshot's file in `dir`, whether or not it exists.
pub fn path(dir: &Path, id: SnapshotId) -> PathBuf {
    dir.join(format!("{:016x}-{:016x}{SUFFIX}", id.term, id.index))
}

/// The snapshot with the file name `name`, `None` if [`path`] makes no such name.
fn parse_name(name: &str) -> Option<SnapshotId> {
    let (term_digits, index_digits) = name.strip_suffix(SUFFIX)?.split_once('-')?;
    let term = u64::from_str_radix(term_digits, 16).ok()?;
    let index = u64::from_str_radix(index_digits, 16).ok()?;
    (format!("{term:016x}-{index:016x}{SUFFIX}") == name).then_some(SnapshotId { index, term })
}
