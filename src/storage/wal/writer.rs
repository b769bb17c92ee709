//! [`Wal`]: creates, opens, extends and purges a log.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::format::{self, Record, Salt};
use super::reader::{Replayed, Segment, exists, parse_name, replay_log};
use super::replay::Summary;
use super::{ALLOCATE_BYTES, Frame, Identity, Recovered, SEGMENT_BYTES};
use crate::error::{Error, Result};
use crate::storage::{Vfs, VfsFile, files};

/// The capacity in bytes of the frame buffer that is kept between two frames.
const BUFFER_BYTES: usize = 1 << 20;

/// The log of a running member.
///
/// - Segments are numbered without gaps. The last one is the current segment. All others are closed
///   and never written to.
/// - The length of the current segment is the end of its last frame, which is synced. Zeros follow up
///   to `allocated`, the end of the file.
/// - After an error the contents of the file are unknown, and no method may be called.
pub struct Wal {
    vfs: Arc<dyn Vfs>,
    pub(super) dir: PathBuf,
    pub(super) segment_bytes: u64,
    allocate_bytes: u64,
    pub(super) segments: Vec<Segment>,
    file: Box<dyn VfsFile>,
    pub(super) allocated: u64,
    summary: Summary,
    buffer: Vec<u8>,
}

impl Wal {
    /// Creates an empty log in `dir`, and `dir` itself. It is durable when this returns.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Refused`] if `dir` holds a log.
    ///
    /// # Panics
    /// If the member id is 0.
    pub fn create(vfs: Arc<dyn Vfs>, dir: &Path, identity: &Identity) -> Result<Self> {
        assert_ne!(identity.member_id, 0, "a member id is never 0");
        if exists(&*vfs, dir)? {
            return Err(Error::Refused(format!("{} already holds a log", dir.display())));
        }
        files::make_dir(&*vfs, dir)?;
        let summary = Summary { identity: identity.clone(), ..Summary::default() };
        create_segment(&*vfs, dir, None, &summary)?;
        Ok(Self::open(vfs, dir)?.0)
    }

    /// Opens the log in `dir` for writing, and cuts off a torn last frame. What it returns is durable.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] if the log is damaged; [`Error::OtherVersion`].
    pub fn open(vfs: Arc<dyn Vfs>, dir: &Path) -> Result<(Self, Recovered)> {
        let mut replayed = replay_log(&*vfs, dir)?;
        // A log that is refused is left as it was found, so the first change comes after the replay.
        files::remove_temporary(&*vfs, dir, |name| parse_name(name).is_some())?;
        let Replayed { replay, segments, last_frame } = &mut replayed;
        let (current, others) = segments.split_last_mut().expect("a replay has a segment");
        let path = current.path(dir);
        let file = vfs.open(&path).map_err(Error::io("open", &path))?;
        if current.file_length > current.length {
            file.set_len(current.length).map_err(Error::io("cut", &path))?;
        }
        if !current.torn {
            let start = current.length - last_frame.len() as u64;
            file.write_all_at(last_frame, start).map_err(Error::io("write to", &path))?;
        }
        file.sync().map_err(Error::io("sync", &path))?;
        files::sync_found(&*vfs, &path)?;
        if let Some(previous) = others.last_mut().filter(|_| current.length == current.head_length)
        {
            let path = previous.path(dir);
            let file = vfs.open(&path).map_err(Error::io("open", &path))?;
            if previous.file_length > previous.length {
                // A frame that is written over a torn one could be torn in more ways than the reader
                // recognizes.
                file.set_len(previous.length).map_err(Error::io("cut", &path))?;
                file.sync().map_err(Error::io("sync", &path))?;
            }
            close_segment(&*file, dir, previous, replay.summary.identity.incarnation)?;
        }
        let mut summary = replay.summary.clone();
        summary.trim();
        let wal = Self {
            vfs,
            dir: dir.to_owned(),
            segment_bytes: SEGMENT_BYTES,
            allocate_bytes: ALLOCATE_BYTES,
            file,
            allocated: current.length,
            summary,
            buffer: Vec::new(),
            segments: segments.clone(),
        };
        Ok((wal, replayed.recovered(dir)))
    }

    /// Sets the length of a segment in bytes. The default is [`SEGMENT_BYTES`].
    #[must_use]
    pub fn with_segment_bytes(mut self, segment_bytes: u64) -> Self {
        self.segment_bytes = segment_bytes;
        self
    }

    /// Sets how many zeros are preallocated, in bytes. The default is [`ALLOCATE_BYTES`].
    #[must_use]
    pub fn with_allocate_bytes(mut self, allocate_bytes: u64) -> Self {
        self.allocate_bytes = allocate_bytes;
        self
    }

    /// Writes and syncs one frame. It is durable when this returns. An empty frame writes nothing.
    ///
    /// # Errors
    /// [`Error::Io`]. The frame may or may not be on disk then, so nothing that depends on it may be
    /// sent.
    ///
    /// # Panics
    /// If the frame cannot follow the log. A replay would call it damage.
    pub fn save(&mut self, frame: &Frame<'_>) -> Result<()> {
        if frame.records().next().is_none() {
            return Ok(());
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        format::begin_frame(&mut buffer);
        for record in frame.records() {
            format::put(&mut buffer, &record);
        }
        let length = format::frame_bytes(buffer.len() - format::HEADER_BYTES) as u64;
        let current = self.current();
        let is_full = current.length + length + format::CLOSE_BYTES > self.segment_bytes;
        if is_full && current.length > current.head_length {
            self.begin_segment()?;
        }
        // After the head of a new segment, which states what was before the frame.
        for record in frame.records() {
            if let Err(reason) = self.summary.apply(&record) {
                panic!("the frame cannot follow the log: {reason}");
            }
        }
        self.summary.trim();
        let mut pairs = frame.entries.windows(2);
        assert!(pairs.all(|pair| pair[0].index + 1 == pair[1].index), "the entries have a gap");
        let Segment { number, length: start, .. } = *self.current();
        let salt = Salt { incarnation: self.summary.identity.incarnation, segment: number };
        format::seal_frame(&mut buffer, start, salt);
        let end = start + length;
        if end > self.allocated {
            let is_short = length <= self.allocate_bytes / 4;
            let zeros = if is_short { self.allocate_bytes } else { 0 };
            self.allocated = (end + zeros).min(self.segment_bytes).max(end);
            buffer.resize((self.allocated - start) as usize, 0);
        }
        let path = self.current().path(&self.dir);
        self.file.write_all_at(&buffer, start).map_err(Error::io("write to", &path))?;
        self.file.sync().map_err(Error::io("sync", &path))?;
        let current = self.segments.last_mut().expect("a log has a current segment");
        current.length = end;
        let last_entry = frame.entries.last().map_or(0, |entry| entry.index);
        current.highest_index = current.highest_index.max(last_entry);
        buffer.clear();
        buffer.shrink_to(BUFFER_BYTES);
        self.buffer = buffer;
        Ok(())
    }

    /// Removes the leading segments whose entries are all at or below `index`. The current segment
    /// stays.
    ///
    /// The newest two marks stay in the log. A mark stays in its own segment, or that segment is
    /// removed. In the second case the mark was already among the newest two when the first remaining
    /// head was written, so that head repeats it.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// If the log names no snapshot at or above `index`.
    pub fn purge(&mut self, index: u64) -> Result<()> {
        let newest_mark = self.summary.newest_mark();
        assert!(index <= newest_mark, "purge up to {index}, the newest snapshot is {newest_mark}");
        while self.segments.len() > 1 && self.segments[0].highest_index <= index {
            let path = self.segments[0].path(&self.dir);
            self.vfs.remove(&path).map_err(Error::io("remove", &path))?;
            // One sync per removal: a crash must not undo a removal and keep a later one.
            files::sync_dir(&*self.vfs, &self.dir)?;
            self.segments.remove(0);
        }
        Ok(())
    }

    /// The total length of all segments in bytes, without preallocated zeros.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.length).sum()
    }

    /// Creates the next segment and closes the current one. The order matters: a segment that is
    /// closed and has no successor means that the successor is missing. The zeros go first, because
    /// nothing may follow a close.
    fn begin_segment(&mut self) -> Result<()> {
        let (dir, incarnation) = (&self.dir, self.summary.identity.incarnation);
        let previous = self.segments.last_mut().expect("a log has a current segment");
        if self.allocated > previous.length {
            let path = previous.path(dir);
            self.file.set_len(previous.length).map_err(Error::io("cut", &path))?;
            self.file.sync().map_err(Error::io("sync", &path))?;
        }
        let (segment, file) = create_segment(&*self.vfs, dir, Some(previous), &self.summary)?;
        close_segment(&*self.file, dir, previous, incarnation)?;
        self.allocated = segment.length;
        self.segments.push(segment);
        self.file = file;
        Ok(())
    }

    pub(super) fn current(&self) -> &Segment {
        self.segments.last().expect("a log has a current segment")
    }
}

/// Creates the segment after `previous`, or segment 0, with its head only. The segment gets its name
/// after the head is durable, and frames follow after the name is durable. So a head is never torn.
pub(super) fn create_segment(
    vfs: &dyn Vfs,
    dir: &Path,
    previous: Option<&Segment>,
    summary: &Summary,
) -> Result<(Segment, Box<dyn VfsFile>)> {
    let (number, previous_bytes) =
        previous.map_or((0, 0), |previous| (previous.number + 1, previous.length));
    let mut frame = Vec::new();
    format::begin_frame(&mut frame);
    summary.put_head(&mut frame, number, previous_bytes);
    format::seal_frame(&mut frame, 0, Salt::default());
    let length = frame.len() as u64;
    let segment = Segment { number, length, head_length: length, ..Segment::default() };
    let path = segment.path(dir);
    let temporary = files::with_suffix(&path, files::TEMPORARY);
    let file = vfs.create(&temporary).map_err(Error::io("create", &temporary))?;
    file.write_all_at(&frame, 0).map_err(Error::io("write to", &temporary))?;
    files::publish(vfs, &*file, &temporary, &path)?;
    Ok((segment, file))
}

/// Writes and syncs the close of `segment`. A close that is already there is overwritten.
fn close_segment(
    file: &dyn VfsFile,
    dir: &Path,
    segment: &mut Segment,
    incarnation: u64,
) -> Result<()> {
    let path = segment.path(dir);
    let start = segment.open_length();
    let mut frame = Vec::new();
    format::begin_frame(&mut frame);
    format::put(&mut frame, &Record::Close);
    format::seal_frame(&mut frame, start, Salt { incarnation, segment: segment.number });
    file.write_all_at(&frame, start).map_err(Error::io("write to", &path))?;
    file.sync().map_err(Error::io("sync", &path))?;
    segment.length = start + format::CLOSE_BYTES;
    segment.closed = true;
    Ok(())
}
