//! [`Wal`]: creates, opens, extends and purges a log.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::format::{self, Head, Record, Salt};
use super::reader::{Replayed, Segment, exists, parse_name, replay_log};
use super::replay::Summary;
use super::{Frame, Identity, Recovered, SEGMENT_BYTES_MAX, Sizes};
use crate::error::{Error, REPLACE_MEMBER, Result};
use crate::storage::{Vfs, VfsFile, files};

/// The capacity in bytes of the frame buffer that is kept between two frames.
const BUFFER_BYTES: usize = 1 << 20;

/// The log of a running member.
///
/// - Segments are numbered without gaps. The last one is the current segment. All others are closed
///   and never written to.
/// - The length of the current segment is the end of its last frame, which is synced. Zeros follow up
///   to `allocated`, the end of the file. The close always fits below it.
/// - After an error the contents of the file are unknown, and no method may be called.
pub struct Wal {
    vfs: Arc<dyn Vfs>,
    pub(super) dir: PathBuf,
    pub(super) sizes: Sizes,
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
    /// If the member id is 0, or the step is shorter than two units of a frame's length.
    pub fn create(
        vfs: Arc<dyn Vfs>,
        dir: &Path,
        identity: &Identity,
        sizes: Sizes,
    ) -> Result<Self> {
        assert_ne!(identity.member_id, 0, "a member id is never 0");
        assert!(format::is_step(sizes.step_bytes), "a step has {} bytes", sizes.step_bytes);
        if exists(&*vfs, dir)? {
            return Err(Error::Refused(format!("{} already holds a log", dir.display())));
        }
        files::make_dir(&*vfs, dir)?;
        let summary = Summary { identity: identity.clone(), ..Summary::default() };
        create_segment(&*vfs, dir, None, &summary, sizes.step_bytes)?;
        Ok(Self::open(vfs, dir, sizes)?.0)
    }

    /// Opens the log in `dir` for writing, and clears a torn last frame. What it returns is durable.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] if the log is damaged; [`Error::OtherVersion`].
    pub fn open(vfs: Arc<dyn Vfs>, dir: &Path, sizes: Sizes) -> Result<(Self, Recovered)> {
        let mut replayed = replay_log(&*vfs, dir)?;
        // A log that is refused is left as it was found, so the first change comes after the replay.
        files::remove_temporary(&*vfs, dir, |name| parse_name(name).is_some())?;
        let Replayed { replay, segments, last_frame } = &mut replayed;
        let (current, others) = segments.split_last_mut().expect("a replay has a segment");
        let path = current.path(dir);
        let file = vfs.open(&path).map_err(Error::io("open", &path))?;
        let allocated = current.file_length.max(current.length + format::CLOSE_BYTES);
        let allocated = allocated.next_multiple_of(current.step_bytes);
        // A frame that is written over a torn one could be torn in more ways than the reader
        // recognizes, so zeros replace it first. Its header goes last: until then it stays a torn frame,
        // wherever these writes stop.
        if current.torn {
            let start = current.length + format::HEADER_BYTES as u64;
            let zeros = vec![0; (allocated - start) as usize];
            file.write_all_at(&zeros, start).map_err(Error::io("write to", &path))?;
            file.sync().map_err(Error::io("sync", &path))?;
        }
        let start = current.length - last_frame.len() as u64;
        last_frame.resize((allocated - start) as usize, 0);
        file.write_all_at(last_frame, start).map_err(Error::io("write to", &path))?;
        file.sync().map_err(Error::io("sync", &path))?;
        files::sync_found(&*vfs, &path)?;
        if let Some(previous) = others.last_mut().filter(|_| !current.has_frames()) {
            let path = previous.path(dir);
            let file = vfs.open(&path).map_err(Error::io("open", &path))?;
            // A torn close is overwritten with the same bytes.
            close_segment(&*file, dir, previous, replay.summary.identity.incarnation)?;
        }
        let mut summary = replay.summary.clone();
        summary.trim();
        let wal = Self {
            vfs,
            dir: dir.to_owned(),
            sizes,
            file,
            allocated,
            summary,
            buffer: Vec::new(),
            segments: segments.clone(),
        };
        Ok((wal, replayed.recovered(dir)))
    }

    /// Writes and syncs one frame. It is durable when this returns. An empty frame writes nothing.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] if something cut the file short. The frame may or may not be on
    /// disk then, so nothing that depends on it may be sent.
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
        let is_full = current.length + length + format::CLOSE_BYTES > self.sizes.segment_bytes;
        if is_full && current.has_frames() {
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
        let Segment { number, length: start, step_bytes, .. } = *self.current();
        let salt = Salt { incarnation: self.summary.identity.incarnation, segment: number };
        format::pad_frame(&mut buffer, start, step_bytes);
        format::seal_frame(&mut buffer, start, salt);
        let length = buffer.len() as u64;
        let end = start + length;
        let path = self.current().path(&self.dir);
        let reserve = end + length.max(step_bytes / 4) + format::CLOSE_BYTES;
        assert!(reserve + step_bytes <= SEGMENT_BYTES_MAX, "a frame of {length} bytes");
        if reserve > self.allocated {
            self.check_length(&path)?;
        }
        if end + format::CLOSE_BYTES > self.allocated {
            self.allocated = (end + format::CLOSE_BYTES).next_multiple_of(step_bytes);
            self.file.set_len(self.allocated).map_err(Error::io("extend", &path))?;
            self.file.sync().map_err(Error::io("sync", &path))?;
        }
        // This frame does not need the next step, so one sync covers both.
        if reserve > self.allocated {
            self.allocated = reserve.next_multiple_of(step_bytes);
            if length <= step_bytes / 4 {
                buffer.resize((self.allocated - start) as usize, 0);
            } else {
                self.file.set_len(self.allocated).map_err(Error::io("extend", &path))?;
            }
        }
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

    /// Checks the length of the file before it grows, which would fill what was cut off with zeros.
    fn check_length(&self, path: &Path) -> Result<()> {
        let length = self.file.len().map_err(Error::io("read the length of", path))?;
        if length == self.allocated {
            return Ok(());
        }
        let reason = format!(
            "the file has {length} bytes instead of {}: something cut the file short while the member ran",
            self.allocated
        );
        Err(Error::Corrupt {
            path: path.to_owned(),
            offset: length,
            reason,
            remedy: REPLACE_MEMBER,
        })
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
    /// closed and has no successor means that the successor is missing.
    fn begin_segment(&mut self) -> Result<()> {
        let (dir, incarnation) = (&self.dir, self.summary.identity.incarnation);
        let previous = self.segments.last_mut().expect("a log has a current segment");
        let step_bytes = self.sizes.step_bytes;
        let (segment, file) =
            create_segment(&*self.vfs, dir, Some(previous), &self.summary, step_bytes)?;
        close_segment(&*self.file, dir, previous, incarnation)?;
        self.allocated = segment.file_length;
        self.segments.push(segment);
        self.file = file;
        Ok(())
    }

    pub(super) fn current(&self) -> &Segment {
        self.segments.last().expect("a log has a current segment")
    }
}

/// Creates the segment after `previous`, or segment 0, with its head and zeros only. The segment gets
/// its name after these are durable, and frames follow after the name is durable. So a head is never
/// torn, and no segment is shorter than a step.
pub(super) fn create_segment(
    vfs: &dyn Vfs,
    dir: &Path,
    previous: Option<&Segment>,
    summary: &Summary,
    step_bytes: u64,
) -> Result<(Segment, Box<dyn VfsFile>)> {
    let (segment, previous_bytes) =
        previous.map_or((0, 0), |previous| (previous.number + 1, previous.length));
    let mut frame = Vec::new();
    format::begin_frame(&mut frame);
    summary.put_head(&mut frame, Head { segment, previous_bytes, step_bytes, ..Head::default() });
    format::pad_frame(&mut frame, 0, step_bytes);
    format::seal_frame(&mut frame, 0, Salt::default());
    let length = frame.len() as u64;
    let file_length = (length + format::CLOSE_BYTES).next_multiple_of(step_bytes);
    frame.resize(file_length as usize, 0);
    let segment = Segment {
        number: segment,
        length,
        head_length: length,
        step_bytes,
        file_length,
        ..Segment::default()
    };
    let path = segment.path(dir);
    let temporary = files::with_suffix(&path, files::TEMPORARY);
    let file = vfs.create(&temporary).map_err(Error::io("create", &temporary))?;
    file.write_all_at(&frame, 0).map_err(Error::io("write to", &temporary))?;
    files::publish(vfs, &*file, &temporary, &path)?;
    Ok((segment, file))
}

/// Writes and syncs the close of `segment`, then removes the zeros after it, which may come back after a
/// crash. A close that is already there is overwritten.
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
    file.set_len(segment.length).map_err(Error::io("cut", &path))
}
