//! The write-ahead log: what raft must find again after a crash, in the order it was written.
//!
//! ```text
//! raftexample-1/
//!   0000000000000007.wal    | head | frame | frame | … | frame | close |
//!   0000000000000008.wal    | head | frame |                           the current segment
//! ```
//! The unit is the [`Frame`]: what one sync covers, under one checksum. It is there wholly or not
//! at all, and the next is written only after the sync of this one returned. `wal/format.rs`
//! describes the bytes, and what tells a torn frame from a damaged one.
//!
//! Frames go to the last segment. The first frame of each segment, its head, repeats what was known
//! when the segment was begun: identity, incarnations, the last two snapshot marks and the hard
//! state, the length of the segment before and the log's last index. So the older segments can go.
//! The last frame of each segment but the current one closes it. So the newer ones can not go.
//!
//! # States possible after a crash
//!
//! During [`Wal::create`]:
//! - no directory, or one without a segment, perhaps with a `.tmp` file: there is no log, and it is
//!   created again;
//! - the first segment, whole: the log is there, and empty.
//!
//! During [`Wal::save`]:
//! - the frame not at all, or wholly: the log without it, or with it;
//! - some sectors of the frame, in a file of any length up to its end, and zeros: the frame is torn,
//!   and is cut off. Nobody was told of it.
//!
//! During [`Wal::save`], while it begins a new segment:
//! - the current one with its zeros, or without them: as before. Zeros may also be left when the new
//!   one has its name, where a sync that fails loses the change of a length;
//! - a `.tmp` file: removed, and begun again when it is needed;
//! - the new segment with nothing but its head, and the one before closed, or not, or by a torn
//!   frame: the log without the frame that needed the segment. The one before is closed then.
//!
//! During [`Wal::purge`]:
//! - some of the segments to go, and always the last of them: they are read too, and say nothing
//!   that the later ones do not take back or repeat.
//!
//! During [`Wal::open`]:
//! - the torn frame and the zeros, or not: as above;
//! - the last frame, written again over itself: as it was;
//! - an empty `.tmp` file: removed;
//! - a frame that closes a segment, torn or not: as above.
//!
//! # Zeros ahead
//!
//! A file that grows costs more than its data: each sync has to write its length and where the new
//! blocks are as well. So a frame that reaches the end of the file takes [`ALLOCATE_BYTES`] of zeros
//! along, and those behind it overwrite them: one write for the disk instead of two or three. Only
//! the last segment has zeros behind its frames, and none is left by [`Wal::open`].
//!
//! # Invariants
//!
//! A segment gets its name only when its head is on disk, and a successor only when all its other
//! frames are. It is closed only when the successor's name is on disk, and the successor gets its
//! first frame only then. So whatever else is wrong with a head, or in a segment before the last, is
//! damage, and so is a last segment that is closed. Damage is never repaired: [`Error::Corrupt`]
//! keeps the member from starting.
//!
//! [`Wal::read`] takes the directory for one that nobody writes to.
//!
//! A process that dies leaves what it wrote to the operating system, so [`Wal::open`] may read a
//! frame that is not on disk, or a segment whose name is not. It writes the last frame again, the
//! same bytes in the same place, and changes the directory once more, and syncs both before the log
//! is relied on. To sync is not enough: after a sync that failed, some systems take the pages for
//! written.
//!
//! # What it is not
//!
//! It knows nothing of what is committed or applied, and does not look at the snapshots. Segments
//! missing at the front are for the caller to notice, by a base beyond the snapshot.

mod format;
mod replay;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use raft::eraftpb::{Entry, HardState};

use self::format::{Fault, Salt};
pub(crate) use self::format::{Head, Record};
use self::replay::{Keep, Replay, Summary};
use super::{Vfs, VfsFile, files};
use crate::error::{Error, REPLACE_MEMBER, Result};

/// How long a segment gets, in bytes, unless a single frame is longer. Disk space is given back in
/// pieces of this size, and a start reads one such piece into memory at a time.
pub const SEGMENT_BYTES: u64 = 64 << 20;

/// How far the current segment is filled with zeros ahead of its frames, in bytes. A frame longer than
/// a quarter of that goes without: it costs far more than the file's growth.
pub const ALLOCATE_BYTES: u64 = 256 << 10;

/// How much of the buffer for frames is kept between two of them, in bytes.
const BUFFER_BYTES: usize = 1 << 20;

/// What the names of segments end in.
const SUFFIX: &str = ".wal";

/// Whose log this is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The cluster, 0 while a member that joins does not know it.
    pub cluster_id: u64,
    /// The member, never 0.
    pub member_id: u64,
    /// Drawn at random when the log was made.
    pub incarnation: u64,
    /// A hash of the first `--cluster` list, 0 unless the cluster's id was derived from it or the
    /// member was restored for it. Then the id is another.
    pub first_urls_hash: u64,
}

impl Identity {
    /// True for a first member of a cluster that was restored from a snapshot.
    pub fn is_restored(&self) -> bool {
        self.first_urls_hash != 0 && self.first_urls_hash != self.cluster_id
    }
}

/// Names a snapshot whose file is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotId {
    /// The last entry that the snapshot contains.
    pub index: u64,
    /// That entry's term.
    pub term: u64,
}

/// What one sync covers; written in the order of the fields, and all of it or none is found again.
#[derive(Clone, Copy, Debug, Default)]
pub struct Frame<'a> {
    /// The member's identity, as it is from now on.
    pub identity: Option<&'a Identity>,
    /// The first incarnations heard, as (member id, incarnation).
    pub incarnations: &'a [(u64, u64)],
    /// A snapshot that was made here. The log keeps its entries.
    pub made: Option<SnapshotId>,
    /// A snapshot that was received, for which raft drops its log. The next entry follows it.
    pub installed: Option<SnapshotId>,
    /// Entries without gaps. They take the place of all that were there from the first of them on.
    pub entries: &'a [Entry],
    /// Raft's own state, as it is from now on.
    pub hard_state: Option<&'a HardState>,
}

impl Frame<'_> {
    /// True if there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.identity.is_none()
            && self.incarnations.is_empty()
            && self.made.is_none()
            && self.installed.is_none()
            && self.entries.is_empty()
            && self.hard_state.is_none()
    }

    fn put(&self, payload: &mut Vec<u8>) {
        if let Some(identity) = self.identity {
            format::put_identity(payload, identity);
        }
        for &(member_id, incarnation) in self.incarnations {
            format::put_incarnation(payload, member_id, incarnation);
        }
        if let Some(mark) = self.made {
            format::put_mark(payload, mark);
        }
        if let Some(mark) = self.installed {
            format::put_install(payload, mark);
        }
        for entry in self.entries {
            format::put_entry(payload, entry);
        }
        if let Some(hard_state) = self.hard_state {
            format::put_hard_state(payload, hard_state);
        }
    }
}

/// What a log says, from its first record to its last.
#[derive(Clone, Debug, PartialEq)]
pub struct Recovered {
    /// Whose log it is.
    pub identity: Identity,
    /// The first incarnation heard for each member.
    pub incarnations: BTreeMap<u64, u64>,
    /// The snapshots named, in ascending order: the newest two at least, where there were as many.
    pub marks: Vec<SnapshotId>,
    /// The entries held, without gaps, after every truncation.
    pub entries: Vec<Entry>,
    /// Raft's own state.
    pub hard_state: HardState,
    /// The index before the first entry held, or where the log ends if it holds none. `None` if it
    /// never had any, or if that is not known, of a log that version 1 purged.
    pub base: Option<u64>,
    /// Where a torn frame was cut off: the file, and its length since.
    pub cut: Option<(PathBuf, u64)>,
}

impl Recovered {
    /// The index of the last entry held, or `base` if there is none.
    pub fn last_index(&self) -> Option<u64> {
        self.entries.last().map(|entry| entry.index).or(self.base)
    }
}

/// The log of a running member.
///
/// - Segments are numbered without gaps; the last is the current one. The others are closed, except
///   those that version 1 left, and not written to.
/// - The current segment's length is the end of its last frame, which is synced. From there to
///   `allocated`, the end of its file, are zeros.
/// - After an error nothing is known about the file, and nothing may be called any more.
pub struct Wal {
    vfs: Arc<dyn Vfs>,
    dir: PathBuf,
    segment_bytes: u64,
    allocate_bytes: u64,
    segments: Vec<Segment>,
    file: Box<dyn VfsFile>,
    allocated: u64,
    summary: Summary,
    last_index: Option<u64>,
    buffer: Vec<u8>,
}

/// One file of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Segment {
    number: u64,
    /// Of the format, in which its head is written.
    version: u32,
    /// The end of its last frame in bytes, and so its length without what may follow.
    length: u64,
    /// The length of its first frame.
    head_length: u64,
    /// The highest index among its entries, 0 if it has none.
    highest_index: u64,
    /// True if its last frame closes it.
    closed: bool,
    /// The length of the file, as it was read.
    file_length: u64,
    /// True if more than zeros followed its last frame: a torn one.
    torn: bool,
}

impl Segment {
    /// Its length without the frame that closes it.
    fn open_length(&self) -> u64 {
        self.length - if self.closed { format::CLOSE_BYTES } else { 0 }
    }

    fn path(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{:016x}{SUFFIX}", self.number))
    }
}

impl Wal {
    /// True if `dir` holds a log, whatever its state.
    ///
    /// # Errors
    /// The directory exists and cannot be listed.
    pub fn exists(vfs: &dyn Vfs, dir: &Path) -> Result<bool> {
        match vfs.list(dir) {
            Ok(names) => Ok(names.iter().any(|name| name.ends_with(SUFFIX))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::io("list", dir)(error)),
        }
    }

    /// Makes an empty log in `dir`, which is made too. It is on disk when this returns.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Refused`] if there is a log.
    ///
    /// # Panics
    /// The identity's member id is 0.
    pub fn create(vfs: Arc<dyn Vfs>, dir: &Path, identity: &Identity) -> Result<Self> {
        let summary = Summary { identity: identity.clone(), ..Summary::default() };
        Self::create_with(vfs, dir, None, None, summary)
    }

    /// As [`create`](Self::create), with a log that ends at the snapshot `mark`, all of it gone, and
    /// with raft's own state as of there. There is all of it after a crash, or none.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    ///
    /// # Panics
    /// As [`create`](Self::create).
    pub fn create_behind(
        vfs: Arc<dyn Vfs>,
        dir: &Path,
        identity: &Identity,
        mark: SnapshotId,
        hard_state: &HardState,
    ) -> Result<Self> {
        let summary = Summary {
            identity: identity.clone(),
            marks: [(mark.index, mark.term)].into(),
            hard_state: hard_state.clone(),
            ..Summary::default()
        };
        // The first segment holds where a log begins: this is the second of one that was purged.
        let purged = Segment::default();
        Self::create_with(vfs, dir, Some(&purged), Some(mark.index), summary)
    }

    fn create_with(
        vfs: Arc<dyn Vfs>,
        dir: &Path,
        previous: Option<&Segment>,
        last_index: Option<u64>,
        summary: Summary,
    ) -> Result<Self> {
        assert_ne!(summary.identity.member_id, 0, "a member's id is never 0");
        if Self::exists(&*vfs, dir)? {
            return Err(Error::Refused(format!("{} already holds a log", dir.display())));
        }
        files::make_dir(&*vfs, dir)?;
        let (segment, file) = create_segment(&*vfs, dir, previous, last_index, &summary)?;
        Ok(Self {
            vfs,
            dir: dir.to_owned(),
            segment_bytes: SEGMENT_BYTES,
            allocate_bytes: ALLOCATE_BYTES,
            allocated: segment.length,
            segments: vec![segment],
            file,
            summary,
            last_index,
            buffer: Vec::new(),
        })
    }

    /// Opens the log in `dir`, cuts off a torn last frame, and leaves the log ready for more. What
    /// it says is on disk when this returns.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] if the log does not hold what was written to it.
    pub fn open(vfs: Arc<dyn Vfs>, dir: &Path) -> Result<(Self, Recovered)> {
        let Replayed { replay, mut segments, last_frame } = replay_segments(&*vfs, dir)?;
        // Only now: what is refused is left as it was found.
        files::remove_temporary(&*vfs, dir, |name| parse_name(name).is_some())?;
        let (current, others) = segments.split_last_mut().expect("a replay ends with a segment");
        let path = current.path(dir);
        let file = vfs.open(&path).map_err(Error::io("open", &path))?;
        let cut = std::mem::take(&mut current.torn);
        if current.file_length > current.length {
            file.set_len(current.length).map_err(Error::io("cut", &path))?;
        }
        if !cut {
            let start = current.length - last_frame.len() as u64;
            file.write_all_at(&last_frame, start).map_err(Error::io("write to", &path))?;
        }
        file.sync().map_err(Error::io("sync", &path))?;
        files::sync_found(&*vfs, &path)?;
        if let Some(previous) = others.last_mut().filter(|_| current.length == current.head_length)
        {
            let path = previous.path(dir);
            let file = vfs.open(&path).map_err(Error::io("open", &path))?;
            if previous.file_length > previous.length {
                // What is written over the torn frame could be torn in more ways than it could.
                file.set_len(previous.length).map_err(Error::io("cut", &path))?;
                file.sync().map_err(Error::io("sync", &path))?;
            }
            close_segment(&*file, dir, previous, replay.summary.identity.incarnation)?;
        }
        let current_length = current.length;
        let mut summary = replay.summary.clone();
        summary.trim();
        let wal = Self {
            vfs,
            dir: dir.to_owned(),
            segment_bytes: SEGMENT_BYTES,
            allocate_bytes: ALLOCATE_BYTES,
            file,
            allocated: current_length,
            summary,
            last_index: replay.last_index(),
            buffer: Vec::new(),
            segments,
        };
        let cut = cut.then(|| (path, wal.current().length));
        Ok((wal, recovered(replay, cut)))
    }

    /// Reads the log in `dir` and changes nothing: a torn last frame is passed over.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn read(vfs: &dyn Vfs, dir: &Path) -> Result<Recovered> {
        let Replayed { replay, segments, .. } = replay_segments(vfs, dir)?;
        let current = segments.last().expect("a replay ends with a segment");
        Ok(recovered(replay, current.torn.then(|| (current.path(dir), current.length))))
    }

    /// Sets how long a segment gets, in bytes; [`SEGMENT_BYTES`] unless set.
    #[must_use]
    pub fn with_segment_bytes(mut self, segment_bytes: u64) -> Self {
        self.segment_bytes = segment_bytes;
        self
    }

    /// Sets how many zeros are written ahead, in bytes; [`ALLOCATE_BYTES`] unless set.
    #[must_use]
    pub fn with_allocate_bytes(mut self, allocate_bytes: u64) -> Self {
        self.allocate_bytes = allocate_bytes;
        self
    }

    /// Writes and syncs one frame; it is on disk when this returns. An empty one writes nothing.
    ///
    /// # Errors
    /// [`Error::Io`]; it is not known then whether the frame is on disk, and nothing may be sent
    /// that depends on it.
    ///
    /// # Panics
    /// The frame cannot follow what the log holds: then it could not be read again either.
    pub fn save(&mut self, frame: &Frame<'_>) -> Result<()> {
        if frame.is_empty() {
            return Ok(());
        }
        self.check(frame);
        let mut buffer = std::mem::take(&mut self.buffer);
        format::begin_frame(&mut buffer);
        frame.put(&mut buffer);
        let length = format::frame_bytes(buffer.len() - format::HEADER_BYTES) as u64;
        let current = self.current();
        let is_full = current.length + length + format::CLOSE_BYTES > self.segment_bytes;
        if is_full && current.length > current.head_length {
            self.cut()?;
        }
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
        self.advance(frame, length);
        buffer.clear();
        buffer.shrink_to(BUFFER_BYTES);
        self.buffer = buffer;
        Ok(())
    }

    /// Removes the leading segments whose entries all lie at or below `index`, never the current
    /// one.
    ///
    /// The newest two marks stay named. Either a segment that stays names one, or it is older than
    /// the head of the first that stays; then it was among the newest two when that head was
    /// written, since it still is.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// No snapshot was named that holds everything up to `index`.
    pub fn purge(&mut self, index: u64) -> Result<()> {
        let newest_mark = self.summary.newest_mark();
        assert!(index <= newest_mark, "purge up to {index}, the newest snapshot is {newest_mark}");
        while self.segments.len() > 1 && self.segments[0].highest_index <= index {
            let path = self.segments[0].path(&self.dir);
            self.vfs.remove(&path).map_err(Error::io("remove", &path))?;
            // One by one, because a crash must not leave an earlier one and take a later one.
            files::sync_dir(&*self.vfs, &self.dir)?;
            self.segments.remove(0);
        }
        Ok(())
    }

    /// The length of all segments in bytes.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.length).sum()
    }

    /// Begins a new segment, and then closes the one before: the other way round, a crash between
    /// the two would look like a segment that is missing. The zeros go before either.
    fn cut(&mut self) -> Result<()> {
        let (dir, incarnation) = (&self.dir, self.summary.identity.incarnation);
        let previous = self.segments.last_mut().expect("a log has a current segment");
        if self.allocated > previous.length {
            let path = previous.path(dir);
            self.file.set_len(previous.length).map_err(Error::io("cut", &path))?;
            self.file.sync().map_err(Error::io("sync", &path))?;
        }
        let (segment, file) =
            create_segment(&*self.vfs, dir, Some(previous), self.last_index, &self.summary)?;
        close_segment(&*self.file, dir, previous, incarnation)?;
        self.allocated = segment.length;
        self.segments.push(segment);
        self.file = file;
        Ok(())
    }

    fn current(&self) -> &Segment {
        self.segments.last().expect("a log has a current segment")
    }

    /// Asserts what a replay demands of a frame that follows what the log holds.
    fn check(&self, frame: &Frame<'_>) {
        let mut last = self.last_index;
        let mut newest_mark = self.summary.newest_mark();
        if let Some(Err(reason)) = frame.identity.map(|new| self.summary.check_identity(new)) {
            panic!("{reason}");
        }
        for mark in frame.made.into_iter().chain(frame.installed) {
            if let Err(reason) = self.summary.check_mark(mark) {
                panic!("{reason}");
            }
            newest_mark = newest_mark.max(mark.index);
        }
        if let (Some(mark), Some(last)) = (frame.made, last) {
            assert!(mark.index <= last, "snapshot {} was made, the log ends at {last}", mark.index);
        }
        if let Some(mark) = frame.installed {
            last = Some(mark.index);
        }
        for (position, entry) in frame.entries.iter().enumerate() {
            let index = entry.index;
            assert!(index > newest_mark, "entry {index} is within the snapshot {newest_mark}");
            let previous = index - 1;
            let follows =
                last.is_none_or(|last| previous == last || position == 0 && index <= last);
            assert!(follows, "entry {index} follows entry {last:?}");
            last = Some(index);
        }
    }

    /// Takes a frame of `length` bytes that is on disk.
    fn advance(&mut self, frame: &Frame<'_>, length: u64) {
        if let Some(identity) = frame.identity {
            self.summary.identity = identity.clone();
        }
        self.summary.incarnations.extend(frame.incarnations.iter().copied());
        for mark in frame.made.into_iter().chain(frame.installed) {
            self.summary.marks.insert(mark.index, mark.term);
        }
        self.summary.trim();
        if let Some(hard_state) = frame.hard_state {
            self.summary.hard_state = hard_state.clone();
        }
        let last_entry = frame.entries.last().map(|entry| entry.index);
        let last_installed = frame.installed.map(|mark| mark.index);
        self.last_index = last_entry.or(last_installed).or(self.last_index);
        let current = self.segments.last_mut().expect("a log has a current segment");
        current.length += length;
        current.highest_index = current.highest_index.max(last_entry.unwrap_or(0));
    }
}

/// Makes the segment after `previous`, or the first, with nothing but its head. Only when it is on
/// disk does it get its name, and only then may frames follow: a head is never torn.
fn create_segment(
    vfs: &dyn Vfs,
    dir: &Path,
    previous: Option<&Segment>,
    last_index: Option<u64>,
    summary: &Summary,
) -> Result<(Segment, Box<dyn VfsFile>)> {
    let mut segment = Segment { version: format::VERSION, ..Segment::default() };
    let mut previous_bytes = 0;
    if let Some(previous) = previous {
        segment.number = previous.number + 1;
        previous_bytes = previous.length;
    }
    let mut frame = Vec::new();
    format::begin_frame(&mut frame);
    format::put_head(&mut frame, segment.number, previous_bytes, last_index);
    summary.put(&mut frame);
    format::seal_frame(&mut frame, 0, Salt::default());
    segment.length = frame.len() as u64;
    segment.head_length = segment.length;
    let path = segment.path(dir);
    let temporary = files::with_suffix(&path, files::TEMPORARY);
    let file = vfs.create(&temporary).map_err(Error::io("create", &temporary))?;
    file.write_all_at(&frame, 0).map_err(Error::io("write to", &temporary))?;
    files::publish(vfs, &*file, &temporary, &path)?;
    Ok((segment, file))
}

/// Writes and syncs the frame that closes `segment`, in the place of one that may be there.
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
    format::put_close(&mut frame);
    format::seal_frame(&mut frame, start, Salt { incarnation, segment: segment.number });
    file.write_all_at(&frame, start).map_err(Error::io("write to", &path))?;
    file.sync().map_err(Error::io("sync", &path))?;
    segment.length = start + format::CLOSE_BYTES;
    segment.closed = true;
    segment.torn = false;
    Ok(())
}

/// A segment's number, if `name` is a segment's.
pub(crate) fn parse_name(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(SUFFIX)?;
    let number = u64::from_str_radix(digits, 16).ok()?;
    // Written back, because a number can be spelt in many ways and a segment's name in one.
    (format!("{number:016x}") == digits).then_some(number)
}

/// The numbers of the segments in `dir`, ascending and without gaps.
fn list_segments(vfs: &dyn Vfs, dir: &Path) -> Result<Vec<u64>> {
    let mut numbers: Vec<u64> = Vec::new();
    for name in vfs.list(dir).map_err(Error::io("list", dir))? {
        if !name.ends_with(SUFFIX) {
            continue;
        }
        let number = parse_name(&name).ok_or_else(|| Error::Corrupt {
            path: dir.join(&name),
            offset: 0,
            reason: "it is named like a segment of the log, but no segment has this name".into(),
            remedy: "move it elsewhere, or give it back the name it had",
        })?;
        numbers.push(number);
    }
    numbers.sort_unstable();
    for pair in numbers.windows(2) {
        if pair[0] + 1 != pair[1] {
            let reason = format!("it is missing, segment {:016x} is there", pair[1]);
            return Err(missing(dir, pair[0] + 1, reason));
        }
    }
    if numbers.is_empty() {
        return Err(damage(dir, 0, "it holds no segment of the log".into()));
    }
    Ok(numbers)
}

fn missing(dir: &Path, number: u64, reason: String) -> Error {
    damage(&Segment { number, ..Segment::default() }.path(dir), 0, reason)
}

fn damage(path: &Path, offset: u64, reason: String) -> Error {
    Error::Corrupt { path: path.to_owned(), offset, reason, remedy: REPLACE_MEMBER }
}

/// A log as it was read.
struct Replayed<K> {
    replay: Replay<K>,
    /// At least one.
    segments: Vec<Segment>,
    /// The last segment's last whole frame, as read.
    last_frame: Vec<u8>,
}

fn recovered(replay: Replay<Entry>, cut: Option<(PathBuf, u64)>) -> Recovered {
    let Replay { summary, entries, base } = replay;
    let Summary { identity, incarnations, marks, hard_state } = summary;
    let marks = marks.into_iter().map(|(index, term)| SnapshotId { index, term }).collect();
    Recovered { identity, incarnations, marks, entries, hard_state, base, cut }
}

fn replay_segments(vfs: &dyn Vfs, dir: &Path) -> Result<Replayed<Entry>> {
    let replayed = replay_listed(vfs, dir, &list_segments(vfs, dir)?, &mut |_, _| Ok(()))?;
    check_last(dir, &replayed.segments)?;
    Ok(replayed)
}

/// What is found in a log, for whoever looks on while it is read.
pub(crate) enum Seen<'a> {
    /// A segment whose file has so many bytes.
    Segment {
        /// The length of the file.
        bytes: u64,
    },
    /// A frame whose checksum is right.
    Frame {
        /// Where it starts in the file.
        offset: u64,
        /// What is in it, up to the first record that is faulty.
        records: &'a mut dyn Iterator<Item = Record>,
    },
    /// What a crash leaves of a frame; or one that is being written just now.
    Unfinished {
        /// Where it starts in the file.
        offset: u64,
        /// How much of it is there.
        bytes: u64,
    },
}

/// Is told of everything in a log, in order, with the segment's path. An error ends the reading.
pub(crate) type Watch<'a> = &'a mut dyn FnMut(&Path, Seen<'_>) -> Result<()>;

/// What a log adds up to, without its entries.
pub(crate) struct Survey {
    /// Whose log it is.
    pub identity: Identity,
    /// The snapshots named, in ascending order.
    pub marks: Vec<SnapshotId>,
    /// Raft's own state.
    pub hard_state: HardState,
    /// As [`Recovered::base`].
    pub base: Option<u64>,
    /// The term of each entry held, from the one behind `base` on.
    pub terms: Vec<u64>,
}

/// Reads the log in `dir`, or of it the segment `number` alone, and changes nothing. One segment is
/// in memory at a time.
///
/// # Errors
/// As [`Wal::open`], and what `watch` returns.
pub(crate) fn survey(
    vfs: &dyn Vfs,
    dir: &Path,
    number: Option<u64>,
    watch: Watch<'_>,
) -> Result<Survey> {
    let replayed: Replayed<u64> = match number {
        Some(number) => replay_listed(vfs, dir, &[number], watch)?,
        None => {
            let replayed = replay_listed(vfs, dir, &list_segments(vfs, dir)?, watch)?;
            check_last(dir, &replayed.segments)?;
            replayed
        }
    };
    let Replay { summary, entries, base } = replayed.replay;
    let Summary { identity, marks, hard_state, .. } = summary;
    let marks = marks.into_iter().map(|(index, term)| SnapshotId { index, term }).collect();
    Ok(Survey { identity, marks, hard_state, base, terms: entries })
}

fn replay_listed<K: Keep + Default>(
    vfs: &dyn Vfs,
    dir: &Path,
    numbers: &[u64],
    watch: Watch<'_>,
) -> Result<Replayed<K>> {
    let mut replayed =
        Replayed { replay: Replay::default(), segments: Vec::new(), last_frame: Vec::new() };
    for (position, &number) in numbers.iter().enumerate() {
        // The frame that closes the one before the last may be torn, as long as nothing is in the
        // last, which that one finds out.
        let torn_bytes = match numbers.len() - position {
            1 => usize::MAX,
            2 => format::CLOSE_BYTES as usize,
            _ => 0,
        };
        replay_segment(vfs, dir, number, torn_bytes, &mut replayed, watch)?;
    }
    for pair in replayed.segments.windows(2) {
        check_closed(dir, &pair[0], &pair[1])?;
    }
    Ok(replayed)
}

/// Checks that no segment was begun behind the last that is there.
fn check_last(dir: &Path, segments: &[Segment]) -> Result<()> {
    let last = segments.last().expect("a listing names a segment");
    if last.closed {
        let reason = format!("it is missing, segment {:016x} was closed for it", last.number);
        return Err(missing(dir, last.number.saturating_add(1), reason));
    }
    Ok(())
}

/// Reads a segment, at the end of which a torn frame may have `torn_bytes`, and zeros may follow.
fn replay_segment<K: Keep>(
    vfs: &dyn Vfs,
    dir: &Path,
    number: u64,
    torn_bytes: usize,
    replayed: &mut Replayed<K>,
    watch: Watch<'_>,
) -> Result<()> {
    let mut segment = Segment { number, ..Segment::default() };
    let path = segment.path(dir);
    let file = read_file(vfs, &path)?;
    segment.file_length = file.len() as u64;
    watch(&path, Seen::Segment { bytes: segment.file_length })?;
    let mut bytes = &file[..];
    if torn_bytes > 0 {
        // A frame's last byte is not zero.
        let zeros = bytes.iter().rev().take_while(|&&byte| byte == 0).count();
        bytes = &bytes[..bytes.len() - zeros];
    }
    let (mut start, mut last_start) = (0, 0);
    // A file that is empty, or zeros, has no head, which is as bad as a bad one.
    while start < bytes.len() || start == 0 {
        let is_head = start == 0;
        let incarnation = replayed.replay.summary.identity.incarnation;
        let salt = if is_head { Salt::default() } else { Salt { incarnation, segment: number } };
        let may_be_torn = !is_head && !segment.closed && bytes.len() - start <= torn_bytes;
        let frame = match format::read_frame(bytes, start, salt) {
            Ok(frame) => frame,
            Err(bad) if bad.torn && may_be_torn => {
                segment.torn = true;
                let left = (bytes.len() - start) as u64;
                watch(&path, Seen::Unfinished { offset: start as u64, bytes: left })?;
                break;
            }
            Err(bad) => return Err(damage(&path, start as u64, bad.reason)),
        };
        let mut records = format::records(frame.payload).map_while(std::result::Result::ok);
        watch(&path, Seen::Frame { offset: start as u64, records: &mut records })?;
        let previous = replayed.segments.last();
        replay_frame(frame.payload, is_head, previous, &mut replayed.replay, &mut segment)
            .map_err(|fault| Error::Corrupt {
                path: path.clone(),
                offset: start as u64,
                reason: fault.reason,
                remedy: fault.remedy,
            })?;
        last_start = start;
        start = frame.end;
        if is_head {
            segment.head_length = start as u64;
        }
    }
    replayed.last_frame = bytes[last_start..start].to_vec();
    segment.length = start as u64;
    replayed.segments.push(segment);
    Ok(())
}

fn replay_frame<K: Keep>(
    payload: &[u8],
    is_head: bool,
    previous: Option<&Segment>,
    replay: &mut Replay<K>,
    segment: &mut Segment,
) -> std::result::Result<(), Fault> {
    if segment.closed {
        return Err("a frame behind the one that closes the segment".to_owned().into());
    }
    let mut records = format::records(payload);
    if is_head {
        let head = check_head(records.next().transpose()?, previous, segment.number)?;
        segment.version = head.version;
        replay.begin_segment(&head)?;
    }
    for record in records {
        let record = record?;
        match &record {
            Record::Entry(entry) => segment.highest_index = segment.highest_index.max(entry.index),
            Record::Close if is_head || payload.len() != format::RECORD_HEADER_BYTES => {
                return Err("a close amid other records".to_owned().into());
            }
            Record::Close => segment.closed = true,
            _ => {}
        }
        replay.apply(record)?;
    }
    if replay.summary.identity.member_id == 0 {
        return Err("no member's identity in the first frame".to_owned().into());
    }
    Ok(())
}

/// Checks the first record of a segment's first frame.
fn check_head(
    record: Option<Record>,
    previous: Option<&Segment>,
    number: u64,
) -> std::result::Result<Head, String> {
    let Some(Record::Head(head)) = record else {
        return Err("the first frame does not begin with a head".to_owned());
    };
    let Head { segment, previous_bytes, last_index, .. } = head;
    if segment != number {
        return Err(format!("it is segment {segment:016x}, named {number:016x}"));
    }
    if number == 0 && (previous_bytes, last_index) != (0, None) {
        return Err(format!("the first segment follows {previous_bytes} bytes, to {last_index:?}"));
    }
    // The segment before is complete frame by frame; only this tells that none is gone at its end.
    match previous {
        Some(previous) if previous.open_length() != previous_bytes => Err(format!(
            "segment {:016x} had {previous_bytes} bytes when this one was begun, it has {}",
            previous.number,
            previous.open_length()
        )),
        _ => Ok(head),
    }
}

/// Checks that a segment is closed if the one after it holds more than its head.
fn check_closed(dir: &Path, segment: &Segment, next: &Segment) -> Result<()> {
    let is_needed = next.file_length > next.head_length;
    let has_tail = segment.file_length > segment.length;
    if !is_needed || !has_tail && (segment.closed || next.version == 1) {
        return Ok(());
    }
    let what = if segment.closed { "bytes follow its last frame" } else { "no frame closes it" };
    let reason = format!("{what}, but segment {:016x} has frames", next.number);
    Err(damage(&segment.path(dir), segment.length, reason))
}

fn read_file(vfs: &dyn Vfs, path: &Path) -> Result<Vec<u8>> {
    let file = vfs.open(path).map_err(Error::io("open", path))?;
    let length = file.len().map_err(Error::io("read the length of", path))?;
    let mut bytes = vec![0; length as usize];
    let read = file.read_at(&mut bytes, 0).map_err(Error::io("read", path))?;
    bytes.truncate(read);
    Ok(bytes)
}
