//! Writes snapshot files: made here, received from a peer, or sent out as a backup.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::format::{self, BUFFER_BYTES, Fault};
use crate::channels::SnapshotFile;
use crate::error::{Error, Result};
use crate::storage::wal::SnapshotId;
use crate::storage::{Vfs, VfsFile, files};

/// How many bytes are written between two syncs. Short syncs keep the log, which is on the same disk,
/// from waiting long.
const SYNC_BYTES: u64 = 1 << 20;

/// Writes a snapshot. If it is dropped before [`finish`](Self::finish), it removes its file.
pub struct SnapshotWriter {
    file: TemporaryFile,
    application_start: u64,
}

impl SnapshotWriter {
    /// Writes the header to `file`.
    pub(super) fn new(mut file: TemporaryFile, id: SnapshotId, meta: &[u8]) -> Result<Self> {
        let header = format::encode_header(id, meta);
        file.write(&header).map_err(Error::io("write to", &file.path))?;
        Ok(Self { application_start: file.length(), file })
    }

    /// The path of the temporary file, for messages.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Completes the snapshot and gives it its name. It is durable when this returns.
    ///
    /// # Errors
    /// [`Error::Io`]. The snapshot may or may not exist then.
    pub fn finish(mut self) -> Result<SnapshotFile> {
        let application_length = self.file.length() - self.application_start;
        let trailer = format::encode_trailer(application_length, self.file.checksum);
        self.file.write(&trailer).map_err(Error::io("write to", &self.file.path))?;
        self.file.publish()
    }
}

impl Write for SnapshotWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Writes a backup, which has the bytes of a snapshot file, to `out`. `body` writes the application
/// bytes.
///
/// # Errors
/// The error of `out` or `body`. The bytes written so far are not a valid snapshot.
pub fn write_backup(
    out: &mut dyn Write,
    id: SnapshotId,
    meta: &[u8],
    body: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    struct Counted<'a> {
        out: &'a mut dyn Write,
        length: u64,
        checksum: u32,
    }
    impl Write for Counted<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.out.write_all(bytes)?;
            self.length += bytes.len() as u64;
            self.checksum = crc32c::crc32c_append(self.checksum, bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            self.out.flush()
        }
    }
    let mut counted = Counted { out, length: 0, checksum: 0 };
    counted.write_all(&format::encode_header(id, meta))?;
    let start = counted.length;
    body(&mut counted)?;
    let trailer = format::encode_trailer(counted.length - start, counted.checksum);
    counted.write_all(&trailer)?;
    counted.flush()
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
/// file.
pub struct SnapshotReceiver {
    pub(super) file: TemporaryFile,
    pub(super) id: SnapshotId,
    pub(super) expected: SnapshotFile,
    /// True if more bytes came than were announced. They are not written.
    pub(super) excess: bool,
}

impl SnapshotReceiver {
    /// Writes the next bytes of the file.
    ///
    /// # Errors
    /// [`Error::Io`] if this member's disk fails.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.excess |= bytes.len() as u64 > self.expected.length - self.file.length();
        if self.excess {
            return Ok(());
        }
        self.file.write(bytes).map_err(Error::io("write to", &self.file.path))
    }

    /// Checks the announced length and checksum, then the file itself, and gives it its name. A kept
    /// file is durable when this returns.
    ///
    /// # Errors
    /// [`Error::Io`] if this member's disk fails. Wrong bytes are [`Received::Refused`].
    pub fn finish(mut self) -> Result<Received> {
        let (length, checksum) = (self.file.length(), self.file.checksum);
        let expected = self.expected;
        let refused = |reason| Ok(Received::Refused(reason));
        if self.excess {
            return refused(format!("more than the announced {} bytes came", expected.length));
        }
        if length != expected.length {
            return refused(format!("{length} bytes came, {} were announced", expected.length));
        }
        if checksum != expected.checksum {
            return refused(format!(
                "the bytes have checksum {checksum:#010x}, {:#010x} was announced",
                expected.checksum
            ));
        }
        self.file.flush().map_err(Error::io("write to", &self.file.path))?;
        let checked = format::check(&*self.file.file, Some(self.id));
        match checked.map_err(Error::io("read", &self.file.path))? {
            Ok(_) => self.keep(),
            Err(Fault::Damage { offset, reason }) => {
                refused(format!("damaged at offset {offset}: {reason}"))
            }
            Err(Fault::OtherVersion(found)) => refused(format!(
                "it has format version {found}, this member reads version {}",
                format::VERSION
            )),
        }
    }

    /// Gives the file its name. If a file has that name already, the log may name it, so it is never
    /// replaced by other bytes.
    fn keep(mut self) -> Result<Received> {
        let path = &self.file.final_path;
        let existing = match self.file.vfs.open(path) {
            Ok(existing) => existing,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.file.publish()?;
                return Ok(Received::Kept);
            }
            Err(error) => return Err(Error::io("open", path)(error)),
        };
        let length = existing.len().map_err(Error::io("read the length of", path))?;
        let is_same = length == self.expected.length
            && format::checksums(&*existing, length).map_err(Error::io("read", path))?.1
                == self.expected.checksum;
        if is_same {
            // Another receiver may have renamed it and not yet synced the directory.
            files::sync_dir(&*self.file.vfs, path.parent().expect("it lies in a directory"))?;
            return Ok(Received::Kept);
        }
        Ok(Received::Refused("another snapshot with this index and term exists here".to_owned()))
    }
}

/// A file that does not have its name yet. If it is dropped before it gets it, it is removed.
pub(super) struct TemporaryFile {
    vfs: Arc<dyn Vfs>,
    path: PathBuf,
    final_path: PathBuf,
    file: Box<dyn VfsFile>,
    /// The last bytes, not written yet.
    buffer: Vec<u8>,
    /// How many bytes are written.
    written: u64,
    /// How many of these are synced.
    synced: u64,
    /// The CRC32C of all bytes, including the buffer.
    checksum: u32,
    /// How long to pause after a sync, as a multiple of the time that the sync took.
    rest_per_sync: u32,
    /// True after a failed write or sync, which is never repeated.
    failed: bool,
    published: bool,
}

impl TemporaryFile {
    pub(super) fn create(
        vfs: Arc<dyn Vfs>,
        path: PathBuf,
        final_path: PathBuf,
        rest_per_sync: u32,
    ) -> Result<Self> {
        let file = vfs.create(&path).map_err(Error::io("create", &path))?;
        Ok(Self {
            vfs,
            path,
            final_path,
            file,
            buffer: Vec::with_capacity(BUFFER_BYTES),
            written: 0,
            synced: 0,
            checksum: 0,
            rest_per_sync,
            failed: false,
            published: false,
        })
    }

    fn length(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.chunks(BUFFER_BYTES) {
            if self.buffer.len() + piece.len() > BUFFER_BYTES {
                self.flush()?;
            }
            self.buffer.extend_from_slice(piece);
            self.checksum = crc32c::crc32c_append(self.checksum, piece);
        }
        Ok(())
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

    fn publish(&mut self) -> Result<SnapshotFile> {
        self.flush().map_err(Error::io("write to", &self.path))?;
        files::publish(&*self.vfs, &*self.file, &self.path, &self.final_path)?;
        self.published = true;
        Ok(SnapshotFile { length: self.written, checksum: self.checksum })
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
