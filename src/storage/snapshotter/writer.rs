//! Writes snapshot files: made here, received from a peer, or sent out as a backup.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::format::{self, BUFFER_BYTES};
use super::{BROKEN, Snapshotter};
use crate::channels::SnapshotFile;
use crate::error::{Error, Result};
use crate::storage::wal::SnapshotId;
use crate::storage::{Vfs, VfsFile, files};

/// How many bytes are written between two syncs. Short syncs keep the log, which is on the same disk,
/// from waiting long.
const SYNC_BYTES: u64 = 1 << 20;

/// Passes bytes on to `out`, and counts and checksums them.
pub(super) struct Summed<W> {
    out: W,
    sum: SnapshotFile,
}

impl<W: Write> Summed<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, sum: SnapshotFile { length: 0, checksum: 0 } }
    }
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write_all(bytes)?;
        self.sum.length += bytes.len() as u64;
        self.sum.checksum = crc32c::crc32c_append(self.sum.checksum, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Writes the bytes of a snapshot file to `out`: a member's own file, or a backup. `body` writes the
/// application bytes. After an error, the bytes written so far are not a valid snapshot.
pub fn write_snapshot(
    out: impl Write,
    id: SnapshotId,
    meta: &[u8],
    body: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<SnapshotFile> {
    let mut out = Summed::new(out);
    out.write_all(&format::encode_header(id, meta))?;
    let start = out.sum.length;
    body(&mut out)?;
    let trailer = format::encode_trailer(out.sum.length - start, out.sum.checksum);
    out.write_all(&trailer)?;
    out.flush()?;
    Ok(out.sum)
}

/// The outcome of receiving a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    /// The file is durable under its name. It may have been there before.
    Kept,
    /// The bytes are not the announced snapshot, for this reason. They are removed, and this member is
    /// unharmed.
    Refused(String),
}

/// Writes a file that a peer sends. If it is dropped before [`finish`](Self::finish), it removes its
/// file. An error says that this member's disk failed.
pub struct SnapshotReceiver {
    pub(super) file: Summed<TemporaryFile>,
    pub(super) id: SnapshotId,
    pub(super) expected: SnapshotFile,
    /// True if more bytes came than were announced. They are not written.
    pub(super) excess: bool,
}

impl SnapshotReceiver {
    /// Writes the next bytes of the file.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.excess |= bytes.len() as u64 > self.expected.length - self.file.sum.length;
        if self.excess {
            return Ok(());
        }
        self.file.write_all(bytes).map_err(Error::io("write to", &self.file.out.path))
    }

    /// Checks the announced length and checksum, then the file itself, and gives it its name. A kept
    /// file is durable when this returns.
    pub fn finish(self) -> Result<Received> {
        let Self { file: Summed { out: mut file, sum }, id, expected, excess } = self;
        let refused = |reason| Ok(Received::Refused(reason));
        if excess {
            return refused(format!("more than the announced {} bytes came", expected.length));
        }
        if sum.length != expected.length {
            let (length, announced) = (sum.length, expected.length);
            return refused(format!("{length} bytes came, {announced} were announced"));
        }
        if sum.checksum != expected.checksum {
            return refused(format!(
                "the bytes have checksum {:#010x}, {:#010x} was announced",
                sum.checksum, expected.checksum
            ));
        }
        file.flush().map_err(Error::io("write to", &file.path))?;
        match format::check(&*file.file, &file.path, Some(id)) {
            Ok(_) => file.keep(expected),
            Err(Error::Corrupt { offset, reason, .. }) => {
                refused(format!("damaged at offset {offset}: {reason}"))
            }
            Err(Error::OtherVersion { found, supported, .. }) => refused(format!(
                "it has format version {found}, this member reads version {supported}"
            )),
            Err(error) => Err(error),
        }
    }
}

/// A file that does not have its name yet. If it is dropped before it gets it, it is removed.
pub(super) struct TemporaryFile {
    vfs: Arc<dyn Vfs>,
    pub(super) path: PathBuf,
    final_path: PathBuf,
    file: Box<dyn VfsFile>,
    /// The last bytes, not written yet.
    buffer: Vec<u8>,
    /// How many bytes are written.
    written: u64,
    /// How many of these are synced.
    synced: u64,
    /// How long to pause after a sync, as a multiple of the time that the sync took.
    rest_per_sync: u32,
    /// True after a failed write or sync, which is never repeated.
    failed: bool,
    published: bool,
}

impl TemporaryFile {
    pub(super) fn create(of: &Snapshotter, id: SnapshotId, rest_per_sync: u32) -> Result<Self> {
        let final_path = of.path(id);
        let counter = of.temporaries.fetch_add(1, Ordering::Relaxed);
        let path = files::with_suffix(&final_path, &format!(".{counter}{}", files::TEMPORARY));
        let file = of.vfs.create(&path).map_err(Error::io("create", &path))?;
        Ok(Self {
            vfs: of.vfs.clone(),
            path,
            final_path,
            file,
            buffer: Vec::with_capacity(BUFFER_BYTES),
            written: 0,
            synced: 0,
            rest_per_sync,
            failed: false,
            published: false,
        })
    }

    /// Gives the flushed file its name. It is durable when this returns.
    pub(super) fn publish(mut self) -> Result<()> {
        files::publish(&*self.vfs, &*self.file, &self.path, &self.final_path)?;
        self.published = true;
        Ok(())
    }

    /// Publishes the file of a peer, which was checked. If a file has that name already, the log may
    /// name it, so it is never replaced by other bytes, unless it is damaged.
    fn keep(self, received: SnapshotFile) -> Result<Received> {
        let path = &self.final_path;
        let existing = match self.vfs.open(path) {
            Ok(existing) => existing,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return self.publish().map(|()| Received::Kept);
            }
            Err(error) => return Err(Error::io("open", path)(error)),
        };
        let length = existing.len().map_err(Error::io("read the length of", path))?;
        let is_same = length == received.length
            && format::checksums(&*existing, path, length)?.1 == received.checksum;
        if is_same {
            // Another receiver may have renamed it and not yet synced the directory.
            files::sync_dir(&*self.vfs, path.parent().expect("it lies in a directory"))?;
            return Ok(Received::Kept);
        }
        if matches!(format::check(&*existing, path, None), Err(Error::Corrupt { .. })) {
            let broken = files::with_suffix(path, BROKEN);
            self.vfs.rename(path, &broken).map_err(Error::io("rename", path))?;
            return self.publish().map(|()| Received::Kept);
        }
        Ok(Received::Refused("another snapshot with this index and term exists here".to_owned()))
    }
}

impl Write for TemporaryFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(BUFFER_BYTES)];
        if self.buffer.len() + piece.len() > BUFFER_BYTES {
            self.flush()?;
        }
        self.buffer.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.failed {
            return Err(io::Error::other("an earlier write to it failed"));
        }
        self.failed = true;
        self.file.write_all_at(&self.buffer, self.written)?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        if self.written - self.synced >= SYNC_BYTES {
            let began = Instant::now();
            self.file.sync()?;
            self.synced = self.written;
            std::thread::sleep(began.elapsed() * self.rest_per_sync);
        }
        self.failed = false;
        Ok(())
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if !self.published {
            // If this fails, the next start removes the file.
            let _ = self.vfs.remove(&self.path);
        }
    }
}
