//! The snapshots: one file each, named after the last entry that it contains.
//!
//! ```text
//! raftexample-1-snap/
//!   0000000000000002-0000000000002711.snap           term 2, index 10001
//!   0000000000000002-0000000000004e22.snap           the next; two are kept
//!   0000000000000002-0000000000007533.snap.0.tmp     being written, or received
//! ```
//! A file's bytes, numbers little-endian, checksums masked CRC32C:
//!
//! ```text
//!  | magic     | version | meta bytes | index | term  | meta | checksum of all |
//!  | (8 bytes) | (u32)   | (u32)      | (u64) | (u64) |      | before it (u32) |     the header
//!  +-----------+---------+------------+-------+-------+------+-----------------+
//!  | application bytes                                                         |
//!  +---------------------------------+-----------------------------------------+
//!  | application bytes' length (u64) | checksum of all before it (u32)         |     the trailer
//!  +---------------------------------+-----------------------------------------+
//! ```
//! Masked means turned right by 15 bits, plus 0xa282ead8, as LevelDB does: a plain CRC over bytes
//! that end in their own CRC is the same whatever the bytes, and [`SnapshotFile::checksum`], over
//! the whole file, could not tell one snapshot from another.
//!
//! The application bytes are the state machine's. The meta bytes are the node's: what else a member
//! has to know as of the index. This module looks into neither.
//!
//! # States possible after a crash
//!
//! - While a snapshot is written or received: a `.tmp` file, removed at the next start.
//! - After the rename: the file, whole, for it was synced before. The log does not name it yet, so
//!   it is not used, and the next [`Snapshotter::purge`] removes it.
//! - During a purge: some of the files to go. None of them is needed.
//! - During [`Snapshotter::set_broken`]: one name or the other. The file is checked, found damaged
//!   and set aside again.

use std::io::{self, BufReader, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::files::{self, FileReader, OTHER_VERSION};
use super::wal::SnapshotId;
use super::{Vfs, VfsFile};
use crate::channels::SnapshotFile;

use crate::error::{Error, REPLACE_MEMBER, Result};

/// Marks a file as a snapshot.
const MAGIC: [u8; 8] = *b"raftsnap";
/// The version of the format. It rises with every change; those before it are read too. In version 1
/// the meta bytes say less.
const VERSION: u32 = 2;
/// The length of the header before the meta bytes.
const FIXED_BYTES: usize = 32;
/// The length of a checksum.
const CHECKSUM_BYTES: usize = 4;
/// The length of the trailer.
const TRAILER_BYTES: usize = 12;
/// How much is read, or collected before it is written, at a time.
const BUFFER_BYTES: usize = 1 << 20;
/// How much is written between two syncs. Each is short then, the last one too, and the log, which
/// is on the same disk, does not wait long behind it.
const SYNC_BYTES: u64 = 1 << 20;
/// A snapshot that is made, for which hardly anybody waits, leaves the disk to others for this many times as
/// long as each sync took.
const REST_PER_SYNC: u32 = 2;
/// What the names of snapshots end in.
const SUFFIX: &str = ".snap";
/// What is appended to the name of a snapshot that is damaged.
const BROKEN: &str = ".broken";

/// The snapshots of one member.
///
/// A file that has its name is whole, and is never written to again. Whoever reads one holds it
/// open, and may go on when it is purged.
#[derive(Clone)]
pub struct Snapshotter {
    vfs: Arc<dyn Vfs>,
    dir: PathBuf,
    /// Tells temporary files apart.
    temporaries: Arc<AtomicU64>,
}

/// A snapshot that was found to be as it was written.
pub struct Snapshot {
    /// The last entry that it contains.
    pub index: u64,
    /// That entry's term.
    pub term: u64,
    /// What the node stored with it.
    pub meta: Vec<u8>,
    /// Length and checksum of the whole file.
    pub file: SnapshotFile,
    /// Reads the application bytes.
    pub reader: Box<dyn Read + Send>,
}

impl Snapshotter {
    /// Makes `dir`, and removes what a crash left half written. There is one for a directory at a
    /// time, and its clones.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new(vfs: Arc<dyn Vfs>, dir: &Path) -> Result<Self> {
        files::make_dir(&*vfs, dir)?;
        files::remove_temporary(&*vfs, dir, |name| {
            name.rsplit_once('.').is_some_and(|(snapshot, _counter)| parse_name(snapshot).is_some())
        })?;
        Ok(Self { vfs, dir: dir.to_owned(), temporaries: Arc::default() })
    }

    /// Begins a snapshot of the state after the entry at `index` of `term`. The application bytes
    /// are to be written to what is returned.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(&self, index: u64, term: u64, meta: &[u8]) -> Result<SnapshotWriter> {
        let mut file = self.temporary(SnapshotId { index, term })?;
        file.rest_per_sync = REST_PER_SYNC;
        let header = encode_header(SnapshotId { index, term }, meta);
        file.write(&header).map_err(Error::io("write to", &file.path))?;
        Ok(SnapshotWriter { application_start: file.length(), file })
    }

    /// Begins a copy of another member's file, of which `expected` is known.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn receive(
        &self,
        index: u64,
        term: u64,
        expected: SnapshotFile,
    ) -> Result<SnapshotReceiver> {
        let mark = SnapshotId { index, term };
        Ok(SnapshotReceiver { file: self.temporary(mark)?, mark, expected, excess: false })
    }

    /// Checks all of a snapshot's file, and opens its application bytes.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] if it is not as it was written.
    pub fn load(&self, mark: SnapshotId) -> Result<Snapshot> {
        load_file(&*self.vfs, &self.path(mark))
    }

    /// Opens a snapshot that was checked when it was received, without reading all of it once more:
    /// its meta bytes, and its application bytes to be read.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open_received(&self, mark: SnapshotId) -> Result<(Vec<u8>, Box<dyn Read + Send>)> {
        let path = self.path(mark);
        let file = self.vfs.open(&path).map_err(Error::io("open", &path))?;
        let opened = file.len().and_then(|length| {
            let fixed: [u8; FIXED_BYTES] = read_array(&*file, 0)?;
            let mut meta = vec![0; number::<4>(&fixed, 12) as usize];
            read_exact(&*file, &mut meta, FIXED_BYTES as u64)?;
            let start = (FIXED_BYTES + meta.len() + CHECKSUM_BYTES) as u64;
            Ok((meta, start, length - TRAILER_BYTES as u64))
        });
        let (meta, offset, end) = opened.map_err(Error::io("read", &path))?;
        let reader = FileReader { file, offset, end };
        Ok((meta, Box::new(BufReader::with_capacity(BUFFER_BYTES, reader))))
    }

    /// Opens all of a snapshot's file, to send it; returns its length in bytes too. The receiver
    /// checks it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open_raw(&self, index: u64, term: u64) -> Result<(u64, Box<dyn Read + Send>)> {
        let path = self.path(SnapshotId { index, term });
        let file = self.vfs.open(&path).map_err(Error::io("open", &path))?;
        let length = file.len().map_err(Error::io("read the length of", &path))?;
        let reader = FileReader { file, offset: 0, end: length };
        Ok((length, Box::new(BufReader::with_capacity(BUFFER_BYTES, reader))))
    }

    /// Sets a damaged snapshot aside, for someone to look at; returns its new path.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn set_broken(&self, mark: SnapshotId) -> Result<PathBuf> {
        let path = self.path(mark);
        let broken = files::with_suffix(&path, BROKEN);
        self.vfs.rename(&path, &broken).map_err(Error::io("rename", &path))?;
        files::sync_dir(&*self.vfs, &self.dir)?;
        Ok(broken)
    }

    /// Removes every snapshot but those in `keep`, which must have those that the log is about to
    /// name. What is set aside or not finished stays.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn purge(&self, keep: &[SnapshotId]) -> Result<()> {
        let mut removed = false;
        for mark in self.list()? {
            if !keep.contains(&mark) {
                let path = self.path(mark);
                self.vfs.remove(&path).map_err(Error::io("remove", &path))?;
                removed = true;
            }
        }
        if removed {
            files::sync_dir(&*self.vfs, &self.dir)?;
        }
        Ok(())
    }

    /// The snapshots there are, whether or not the log names them, by term and then by index.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn list(&self) -> Result<Vec<SnapshotId>> {
        list(&*self.vfs, &self.dir)
    }

    /// The path of a snapshot's file, whether or not there is one.
    pub fn path(&self, mark: SnapshotId) -> PathBuf {
        path(&self.dir, mark)
    }

    fn temporary(&self, mark: SnapshotId) -> Result<TemporaryFile> {
        let final_path = self.path(mark);
        let counter = self.temporaries.fetch_add(1, Ordering::Relaxed);
        let path = files::with_suffix(&final_path, &format!(".{counter}{}", files::TEMPORARY));
        let file = self.vfs.create(&path).map_err(Error::io("create", &path))?;
        Ok(TemporaryFile {
            vfs: self.vfs.clone(),
            path,
            final_path,
            file,
            buffer: Vec::with_capacity(BUFFER_BYTES),
            written: 0,
            synced: 0,
            checksum: 0,
            rest_per_sync: 0,
            failed: false,
            published: false,
        })
    }
}

/// Checks all of the file at `path`, and opens its application bytes. If it is called as a snapshot
/// of a member is, it must be that one; a copy of one may have any other name.
///
/// # Errors
/// As [`Snapshotter::load`].
pub fn load_file(vfs: &dyn Vfs, path: &Path) -> Result<Snapshot> {
    let file = vfs.open(path).map_err(Error::io("open", path))?;
    let named = path.file_name().and_then(|name| parse_name(name.to_str()?));
    let checked = check(&*file, named).map_err(Error::io("read", path))?;
    let Checked { mark, meta, file: length_and_checksum, application } =
        checked.map_err(|Fault { offset, reason, remedy }| Error::Corrupt {
            path: path.to_owned(),
            offset,
            reason,
            remedy,
        })?;
    let reader = FileReader { file, offset: application.start, end: application.end };
    Ok(Snapshot {
        index: mark.index,
        term: mark.term,
        meta,
        file: length_and_checksum,
        reader: Box::new(BufReader::with_capacity(BUFFER_BYTES, reader)),
    })
}

/// The snapshots in `dir`, as [`Snapshotter::list`] has them.
///
/// # Errors
/// [`Error::Io`].
pub fn list(vfs: &dyn Vfs, dir: &Path) -> Result<Vec<SnapshotId>> {
    let names = vfs.list(dir).map_err(Error::io("list", dir))?;
    let mut marks: Vec<_> = names.iter().filter_map(|name| parse_name(name)).collect();
    marks.sort_unstable_by_key(|mark| (mark.term, mark.index));
    Ok(marks)
}

/// The path of a snapshot's file in `dir`.
pub fn path(dir: &Path, mark: SnapshotId) -> PathBuf {
    dir.join(format!("{:016x}-{:016x}{SUFFIX}", mark.term, mark.index))
}

/// What a snapshot's file is called must be what [`Snapshotter::path`] makes of the mark.
fn parse_name(name: &str) -> Option<SnapshotId> {
    let (term_digits, index_digits) = name.strip_suffix(SUFFIX)?.split_once('-')?;
    let term = u64::from_str_radix(term_digits, 16).ok()?;
    let index = u64::from_str_radix(index_digits, 16).ok()?;
    (format!("{term:016x}-{index:016x}{SUFFIX}") == name).then_some(SnapshotId { index, term })
}

/// Writes a snapshot; dropped before [`finish`](Self::finish), it leaves nothing behind.
pub struct SnapshotWriter {
    file: TemporaryFile,
    application_start: u64,
}

impl SnapshotWriter {
    /// The temporary file, for messages.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Ends the snapshot and gives it its name. It is on disk when this returns.
    ///
    /// # Errors
    /// [`Error::Io`]; the snapshot is not to be relied on then.
    pub fn finish(mut self) -> Result<SnapshotFile> {
        let mut trailer = (self.file.length() - self.application_start).to_le_bytes().to_vec();
        let checksum = masked(crc32c::crc32c_append(self.file.checksum, &trailer));
        trailer.extend_from_slice(&checksum.to_le_bytes());
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

/// Writes the bytes of a snapshot's file to anything: a backup. What `body` writes are the application
/// bytes.
///
/// # Errors
/// What `out` or `body` says; what was written till then is no snapshot.
pub fn write_backup(
    out: &mut dyn Write,
    mark: SnapshotId,
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
    counted.write_all(&encode_header(mark, meta))?;
    let start = counted.length;
    body(&mut counted)?;
    let application_length = counted.length - start;
    counted.write_all(&application_length.to_le_bytes())?;
    let checksum = masked(counted.checksum);
    counted.write_all(&checksum.to_le_bytes())?;
    counted.flush()
}

/// What became of a file that was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    /// It is on disk, under its name; it may have been before.
    Kept,
    /// The bytes are not those of the snapshot that was announced, for this reason. Nothing is left
    /// of them, and nothing is wrong with this member.
    Refused(String),
}

/// Takes another member's file as it comes; dropped before [`finish`](Self::finish), it leaves
/// nothing behind.
pub struct SnapshotReceiver {
    file: TemporaryFile,
    mark: SnapshotId,
    expected: SnapshotFile,
    /// More bytes came than were announced; they were not written.
    excess: bool,
}

impl SnapshotReceiver {
    /// Takes the next bytes of the file.
    ///
    /// # Errors
    /// [`Error::Io`]: this member's own disk failed.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.excess |= bytes.len() as u64 > self.expected.length - self.file.length();
        if self.excess {
            return Ok(());
        }
        self.file.write(bytes).map_err(Error::io("write to", &self.file.path))
    }

    /// Checks the file, its length and checksum as well as its own, and gives it its name if it is
    /// right. It is on disk then.
    ///
    /// # Errors
    /// [`Error::Io`]: this member's own disk failed. That the bytes are wrong is no error.
    pub fn finish(mut self) -> Result<Received> {
        let (length, checksum) = (self.file.length(), self.file.checksum);
        let SnapshotFile { length: expected_length, checksum: expected_checksum } = self.expected;
        if self.excess {
            let reason = format!("more bytes came than the {expected_length} announced");
            return Ok(Received::Refused(reason));
        }
        if length != expected_length {
            let reason = format!("{length} bytes came, {expected_length} were announced");
            return Ok(Received::Refused(reason));
        }
        if checksum != expected_checksum {
            let reason =
                format!("their checksum is {checksum:#010x}, not {expected_checksum:#010x}");
            return Ok(Received::Refused(reason));
        }
        self.file.flush().map_err(Error::io("write to", &self.file.path))?;
        let checked = check(&*self.file.file, Some(self.mark));
        match checked.map_err(Error::io("read", &self.file.path))? {
            Ok(_) => self.keep(),
            Err(Fault { offset, reason, .. }) => {
                Ok(Received::Refused(format!("at offset {offset}: {reason}")))
            }
        }
    }

    /// Gives the file its name, unless one has it already: the log may name that one, so it is not
    /// replaced by other bytes, whoever sends them.
    fn keep(mut self) -> Result<Received> {
        let path = &self.file.final_path;
        let there = match self.file.vfs.open(path) {
            Ok(there) => there,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.file.publish()?;
                return Ok(Received::Kept);
            }
            Err(error) => return Err(Error::io("open", path)(error)),
        };
        let length = there.len().map_err(Error::io("read the length of", path))?;
        let is_same = length == self.expected.length
            && checksums(&*there, length).map_err(Error::io("read", path))?.1
                == self.expected.checksum;
        if is_same {
            // Whoever renamed it may not have come that far yet.
            files::sync_dir(&*self.file.vfs, path.parent().expect("it lies in a directory"))?;
            return Ok(Received::Kept);
        }
        Ok(Received::Refused("another snapshot has its name here already".to_owned()))
    }
}

/// A file without its name; dropped before it gets that, it is removed.
struct TemporaryFile {
    vfs: Arc<dyn Vfs>,
    path: PathBuf,
    final_path: PathBuf,
    file: Box<dyn VfsFile>,
    /// The last bytes, not written yet.
    buffer: Vec<u8>,
    /// How many bytes are written.
    written: u64,
    /// How many of those were synced on the way.
    synced: u64,
    /// The checksum of all bytes, those in the buffer too.
    checksum: u32,
    /// How long to rest after each sync on the way, in times that it took.
    rest_per_sync: u32,
    /// A write or sync failed. It is never tried again.
    failed: bool,
    published: bool,
}

impl TemporaryFile {
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

    /// Gives the file its name.
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
            // What cannot be removed now is removed at the next start.
            let _ = self.vfs.remove(&self.path);
        }
    }
}

/// A CRC32C as it is stored behind the bytes that it covers.
fn masked(checksum: u32) -> u32 {
    checksum.rotate_right(15).wrapping_add(0xa282_ead8)
}

fn encode_header(mark: SnapshotId, meta: &[u8]) -> Vec<u8> {
    let meta_length = u32::try_from(meta.len()).expect("the members fit far below 4 GiB");
    let mut header = Vec::with_capacity(FIXED_BYTES + meta.len() + CHECKSUM_BYTES);
    header.extend_from_slice(&MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&meta_length.to_le_bytes());
    header.extend_from_slice(&mark.index.to_le_bytes());
    header.extend_from_slice(&mark.term.to_le_bytes());
    header.extend_from_slice(meta);
    header.extend_from_slice(&masked(crc32c::crc32c(&header)).to_le_bytes());
    header
}

/// What a file that is as it was written holds.
struct Checked {
    mark: SnapshotId,
    meta: Vec<u8>,
    file: SnapshotFile,
    /// Where the application bytes lie.
    application: Range<u64>,
}

/// What is wrong with a file.
struct Fault {
    offset: u64,
    /// What was found, beside what was expected.
    reason: String,
    /// What the operator can do.
    remedy: &'static str,
}

impl Fault {
    fn new(offset: u64, reason: String) -> Self {
        Self { offset, reason, remedy: REPLACE_MEMBER }
    }
}

/// Checks all of a file, which must hold the snapshot `named` if there is one. The outer error is the disk's, the inner one the file's.
fn check(
    file: &dyn VfsFile,
    named: Option<SnapshotId>,
) -> io::Result<std::result::Result<Checked, Fault>> {
    let length = file.len()?;
    let least = (FIXED_BYTES + CHECKSUM_BYTES + TRAILER_BYTES) as u64;
    if length < least {
        let reason = format!("it has {length} bytes, a snapshot has at least {least}");
        return Ok(Err(Fault::new(length, reason)));
    }
    let fixed: [u8; FIXED_BYTES] = read_array(file, 0)?;
    let meta_length = number::<4>(&fixed, 12);
    let header_length = FIXED_BYTES as u64 + meta_length + CHECKSUM_BYTES as u64;
    let Some(application_length) = (length - TRAILER_BYTES as u64).checked_sub(header_length)
    else {
        let reason = format!("{meta_length} bytes of meta do not fit into a file of {length}");
        return Ok(Err(Fault::new(12, reason)));
    };
    let application = header_length..header_length + application_length;
    let mut header = vec![0; header_length as usize];
    read_exact(file, &mut header, 0)?;
    let mark = match check_header(&header, named) {
        Ok(mark) => mark,
        Err(fault) => return Ok(Err(fault)),
    };
    let (checksum, file_checksum) = checksums(file, length)?;
    let trailer: [u8; TRAILER_BYTES] = read_array(file, application.end)?;
    let (recorded_length, recorded) = (number::<8>(&trailer, 0), number::<4>(&trailer, 8));
    if recorded_length != application_length {
        let reason = format!("{recorded_length} application bytes, there are {application_length}");
        return Ok(Err(Fault::new(application.end, reason)));
    }
    if recorded != u64::from(checksum) {
        let reason = format!("the file's checksum is {checksum:#010x}, it says {recorded:#010x}");
        return Ok(Err(Fault::new(length - CHECKSUM_BYTES as u64, reason)));
    }
    header.truncate(FIXED_BYTES + meta_length as usize);
    let meta = header.split_off(FIXED_BYTES);
    Ok(Ok(Checked {
        mark,
        meta,
        file: SnapshotFile { length, checksum: file_checksum },
        application,
    }))
}

fn check_header(
    header: &[u8],
    named: Option<SnapshotId>,
) -> std::result::Result<SnapshotId, Fault> {
    let (magic, end) = (&header[..MAGIC.len()], header.len() - CHECKSUM_BYTES);
    if magic != MAGIC {
        let reason = format!("it begins with {magic:02x?}, a snapshot with {MAGIC:02x?}");
        return Err(Fault::new(0, reason));
    }
    let (checksum, recorded) = (masked(crc32c::crc32c(&header[..end])), number::<4>(header, end));
    let version = number::<4>(header, 8);
    // A header that is right but for its version is one of ours, and damaged.
    let is_ours = (1..=VERSION).any(|version| {
        let mut as_written = header[..end].to_vec();
        as_written[8..12].copy_from_slice(&version.to_le_bytes());
        recorded == u64::from(masked(crc32c::crc32c(&as_written)))
    });
    if !(1..=u64::from(VERSION)).contains(&version) && !is_ours {
        let reason = format!("format version {version}, this program reads 1 to {VERSION}");
        return Err(Fault { offset: 8, reason, remedy: OTHER_VERSION });
    }
    if recorded != u64::from(checksum) {
        let reason = format!("the header's checksum is {checksum:#010x}, it says {recorded:#010x}");
        return Err(Fault::new(end as u64, reason));
    }
    let held = SnapshotId { index: number::<8>(header, 16), term: number::<8>(header, 24) };
    match named {
        Some(mark) if mark != held => {
            Err(Fault::new(16, format!("it holds {held:?}, its name says {mark:?}")))
        }
        _ => Ok(held),
    }
}

/// The checksums of a file of `length` bytes: masked without its last field, plain of the whole.
fn checksums(file: &dyn VfsFile, length: u64) -> io::Result<(u32, u32)> {
    let covered = length - CHECKSUM_BYTES as u64;
    let mut buffer = vec![0; BUFFER_BYTES];
    let (mut checksum, mut offset) = (0, 0);
    while offset < covered {
        let piece = &mut buffer[..(covered - offset).min(BUFFER_BYTES as u64) as usize];
        read_exact(file, piece, offset)?;
        checksum = crc32c::crc32c_append(checksum, piece);
        offset += piece.len() as u64;
    }
    let last: [u8; CHECKSUM_BYTES] = read_array(file, covered)?;
    Ok((masked(checksum), crc32c::crc32c_append(checksum, &last)))
}

fn read_exact(file: &dyn VfsFile, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    match file.read_at(buffer, offset)? {
        read if read == buffer.len() => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn read_array<const N: usize>(file: &dyn VfsFile, offset: u64) -> io::Result<[u8; N]> {
    let mut array = [0; N];
    read_exact(file, &mut array, offset)?;
    Ok(array)
}

/// The number in `N` bytes from `at` on, 8 at most.
fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number[..N].copy_from_slice(&bytes[at..at + N]);
    u64::from_le_bytes(number)
}

#[cfg(test)]
mod tests;
