//! Lists, reads and checks segments. Nothing here changes a file.

use std::io;
use std::path::{Path, PathBuf};

use super::format::{self, Fault, Head, Record, Salt};
use super::replay::{Replay, Summary};
use super::{Recovered, SEGMENT_BYTES_MAX, SnapshotId, Wal};
use crate::error::{Error, REPLACE_MEMBER, Result};
use crate::storage::Vfs;

/// The suffix of a segment's file name.
pub(super) const SUFFIX: &str = ".wal";

/// One file of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Segment {
    pub number: u64,
    /// The end of its last complete frame in bytes.
    pub length: u64,
    /// The length of its first frame in bytes.
    pub head_length: u64,
    /// The highest index among its entries, 0 if it has none.
    pub highest_index: u64,
    /// True if its last frame is a close.
    pub closed: bool,
    /// The file's length is a multiple of this until it is closed, in bytes.
    pub step_bytes: u64,
    /// The length of the file in bytes when it was read or created.
    pub file_length: u64,
    /// True if a torn frame follows its last complete frame.
    pub torn: bool,
}

impl Segment {
    /// Its length without the frame that closes it.
    pub fn open_length(&self) -> u64 {
        self.length - if self.closed { format::CLOSE_BYTES } else { 0 }
    }

    /// True if a frame was written after its head, even in part.
    pub fn has_frames(&self) -> bool {
        self.length > self.head_length || self.torn
    }

    pub fn path(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{:016x}{SUFFIX}", self.number))
    }
}

/// A log as it was read.
pub(super) struct Replayed {
    pub replay: Replay,
    /// At least one.
    pub segments: Vec<Segment>,
    /// The bytes of the last segment's last complete frame.
    pub last_frame: Vec<u8>,
}

impl Replayed {
    /// What the log holds, and where its torn last frame starts.
    pub fn recovered(self, dir: &Path) -> Recovered {
        let Replay { summary, entries, base, .. } = self.replay;
        let Summary { identity, incarnations, quarantine, marks, hard_state, .. } = summary;
        let last = self.segments.last().expect("a replay has a segment");
        let cut = last.torn.then(|| (last.path(dir), last.length));
        let marks = marks.into_iter().map(|(index, term)| SnapshotId { index, term }).collect();
        Recovered { identity, incarnations, quarantine, marks, entries, hard_state, base, cut }
    }
}

/// True if `dir` holds a log, in whatever state.
///
/// # Errors
/// [`Error::Io`] if the directory exists and cannot be listed.
pub fn exists(vfs: &dyn Vfs, dir: &Path) -> Result<bool> {
    match vfs.list(dir) {
        Ok(names) => Ok(names.iter().any(|name| name.ends_with(SUFFIX))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("list", dir)(error)),
    }
}

impl Wal {
    /// Reads the log in `dir` and changes nothing. A torn last frame is ignored. No other process
    /// may write to the log at the same time.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn read(vfs: &dyn Vfs, dir: &Path) -> Result<Recovered> {
        Ok(replay_log(vfs, dir)?.recovered(dir))
    }
}

/// One thing that [`survey`] finds in a log.
pub(crate) enum Seen<'a> {
    /// A segment.
    Segment {
        /// The length of the file in bytes.
        bytes: u64,
    },
    /// A frame whose checksums are right.
    Frame {
        /// Its offset in the file.
        offset: u64,
        /// Its records, up to the first faulty one.
        records: &'a mut dyn Iterator<Item = Record>,
    },
    /// A torn frame, or a frame that a running member is writing.
    Unfinished {
        /// Its offset in the file.
        offset: u64,
        /// Its length up to the preallocated zeros.
        bytes: u64,
    },
}

/// A callback for everything in a log, in order, with the path of the segment. An error ends the
/// survey.
pub(crate) type Watch<'a> = &'a mut dyn FnMut(&Path, Seen<'_>) -> Result<()>;

/// Reads the log in `dir`, or only its segment `number`, and changes nothing. It holds one segment
/// in memory at a time, and the entries that it returns have no contents.
///
/// # Errors
/// As [`Wal::open`], and the errors of `watch`.
pub(crate) fn survey(
    vfs: &dyn Vfs,
    dir: &Path,
    number: Option<u64>,
    watch: Watch<'_>,
) -> Result<Recovered> {
    let replay = Replay { drops_contents: true, ..Replay::default() };
    Ok(replay_segments(vfs, dir, number, replay, watch)?.recovered(dir))
}

/// The number of a segment with the file name `name`, `None` if it is no such name.
pub(crate) fn parse_name(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(SUFFIX)?;
    let number = u64::from_str_radix(digits, 16).ok()?;
    // Many spellings parse to the same number, but a segment has one name. The last number has no
    // successor.
    (format!("{number:016x}") == digits && number < u64::MAX).then_some(number)
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
            reason: format!("the name ends in {SUFFIX} but is not the name of a segment"),
            remedy: "restore the original name, or move it elsewhere",
        })?;
        numbers.push(number);
    }
    numbers.sort_unstable();
    for pair in numbers.windows(2) {
        if pair[0] + 1 != pair[1] {
            let reason = format!("it is missing, but segment {:016x} exists", pair[1]);
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

/// Reads and checks the log in `dir`.
pub(super) fn replay_log(vfs: &dyn Vfs, dir: &Path) -> Result<Replayed> {
    replay_segments(vfs, dir, None, Replay::default(), &mut |_, _| Ok(()))
}

/// Reads and checks all segments in `dir`, or only the one with number `only`.
fn replay_segments(
    vfs: &dyn Vfs,
    dir: &Path,
    only: Option<u64>,
    replay: Replay,
    watch: Watch<'_>,
) -> Result<Replayed> {
    let numbers = only.map_or_else(|| list_segments(vfs, dir), |number| Ok(vec![number]))?;
    let mut replayed = Replayed { replay, segments: Vec::new(), last_frame: Vec::new() };
    for (position, &number) in numbers.iter().enumerate() {
        // The close of the last segment but one may be torn. `check_closed` then requires that the
        // last segment holds nothing but its head.
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
    match replayed.segments.last() {
        Some(last) if last.closed && only.is_none() => {
            let reason =
                format!("it is missing, but segment {:016x} was closed for it", last.number);
            Err(missing(dir, last.number.saturating_add(1), reason))
        }
        _ => Ok(replayed),
    }
}

/// Reads a segment, which zeros may follow. A torn frame of at most `torn_bytes` may end it. If it is the
/// last one, no byte may follow the last whole step of the file but zeros.
fn replay_segment(
    vfs: &dyn Vfs,
    dir: &Path,
    number: u64,
    torn_bytes: usize,
    replayed: &mut Replayed,
    watch: Watch<'_>,
) -> Result<()> {
    let mut segment = Segment { number, ..Segment::default() };
    let path = segment.path(dir);
    let file = read_file(vfs, &path)?;
    segment.file_length = file.len() as u64;
    watch(&path, Seen::Segment { bytes: segment.file_length })?;
    // The last byte of a frame is never zero.
    let used = file.len() - file.iter().rev().take_while(|&&byte| byte == 0).count();
    let (mut start, mut last_start) = (0, 0);
    // At offset 0 even an empty file is read, because a missing head is damage.
    while start < used || start == 0 {
        let is_head = start == 0;
        let incarnation = replayed.replay.summary.identity.incarnation;
        let salt = if is_head { Salt::default() } else { Salt { incarnation, segment: number } };
        let may_be_torn = !is_head && !segment.closed && used - start <= torn_bytes;
        let frame = match format::read_frame(&file, start, salt) {
            Ok(frame) => frame,
            Err(bad) if bad.torn && may_be_torn => {
                segment.torn = true;
                let left = (used - start) as u64;
                watch(&path, Seen::Unfinished { offset: start as u64, bytes: left })?;
                break;
            }
            Err(bad) => return Err(damage(&path, start as u64, bad.reason)),
        };
        let mut records = format::records(frame.payload).map_while(std::result::Result::ok);
        watch(&path, Seen::Frame { offset: start as u64, records: &mut records })?;
        let previous = replayed.segments.last();
        replay_frame(frame.payload, is_head, previous, &mut replayed.replay, &mut segment)
            .map_err(|fault| match fault {
                Fault::Damage(reason) => damage(&path, start as u64, reason),
                Fault::OtherVersion(found) => {
                    Error::OtherVersion { path: path.clone(), found, supported: format::VERSION }
                }
            })?;
        last_start = start;
        start = frame.end;
        if is_head {
            segment.head_length = start as u64;
        }
    }
    let whole_steps = segment.file_length / segment.step_bytes * segment.step_bytes;
    if torn_bytes == usize::MAX && !segment.closed && used as u64 > whole_steps {
        let reason = format!(
            "the file has {} bytes, but frames end below a multiple of {}: something cut the file short",
            segment.file_length, segment.step_bytes
        );
        return Err(damage(&path, whole_steps, reason));
    }
    replayed.last_frame = file[last_start..start].to_vec();
    segment.length = start as u64;
    replayed.segments.push(segment);
    Ok(())
}

fn replay_frame(
    payload: &[u8],
    is_head: bool,
    previous: Option<&Segment>,
    replay: &mut Replay,
    segment: &mut Segment,
) -> std::result::Result<(), Fault> {
    if segment.closed {
        return Err("a frame follows the close of the segment".to_owned().into());
    }
    let mut records = format::records(payload);
    if is_head {
        let head = check_head(records.next().transpose()?, previous, segment.number)?;
        segment.step_bytes = head.step_bytes;
        match previous {
            None => (replay.base, replay.summary.last_index) = (head.last_index, head.last_index),
            Some(_) if replay.summary.last_index != head.last_index => {
                let reason = format!(
                    "the log ended at index {} when this segment was created, now it ends at {}",
                    head.last_index, replay.summary.last_index
                );
                return Err(reason.into());
            }
            Some(_) => {}
        }
    }
    for record in records {
        let record = record?;
        match &record {
            Record::Entry(entry) => segment.highest_index = segment.highest_index.max(entry.index),
            Record::Close if is_head || payload.len() != format::RECORD_HEADER_BYTES => {
                return Err("a close shares its frame with other records".to_owned().into());
            }
            Record::Close => segment.closed = true,
            _ => {}
        }
        replay.apply(record)?;
    }
    if replay.summary.identity.member_id == 0 {
        return Err("the first frame holds no identity".to_owned().into());
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
    let Head { segment, previous_bytes, last_index, step_bytes } = head;
    if segment != number {
        return Err(format!("it is segment {segment:016x}, its name says {number:016x}"));
    }
    if !format::is_step(step_bytes) {
        return Err(format!("its step is {step_bytes} bytes, expected 32, 48, …"));
    }
    if number == 0 && (previous_bytes, last_index) != (0, 0) {
        return Err(format!(
            "the first segment follows {previous_bytes} bytes and entry {last_index}, expected 0 \
             and 0"
        ));
    }
    // Every frame of the previous segment is complete. Only this length shows that none is missing
    // at its end.
    match previous {
        Some(previous) if previous.open_length() != previous_bytes => Err(format!(
            "segment {:016x} had {previous_bytes} bytes when this one was created, now it has {}",
            previous.number,
            previous.open_length()
        )),
        _ => Ok(head),
    }
}

/// Checks that `segment` ends with its close if its successor `next` holds more than a head.
fn check_closed(dir: &Path, segment: &Segment, next: &Segment) -> Result<()> {
    if !next.has_frames() || segment.closed {
        return Ok(());
    }
    let reason = format!("it is not closed, but segment {:016x} has frames", next.number);
    Err(damage(&segment.path(dir), segment.length, reason))
}

fn read_file(vfs: &dyn Vfs, path: &Path) -> Result<Vec<u8>> {
    let file = vfs.open(path).map_err(Error::io("open", path))?;
    let length = || file.len().map_err(Error::io("read the length of", path));
    let mut bytes = Vec::new();
    // A running member may extend the file. A frame that was read may lie in the new part.
    while length()? != bytes.len() as u64 {
        let wanted = length()?;
        if wanted > SEGMENT_BYTES_MAX {
            let reason =
                format!("the file has {wanted} bytes, a segment at most {SEGMENT_BYTES_MAX}");
            return Err(damage(path, SEGMENT_BYTES_MAX, reason));
        }
        let wanted = wanted as usize;
        bytes.try_reserve_exact(wanted.saturating_sub(bytes.len())).map_err(|_| {
            let why = format!("its {wanted} bytes do not fit into memory");
            Error::io("read", path)(io::Error::new(io::ErrorKind::OutOfMemory, why))
        })?;
        bytes.resize(wanted, 0);
        let read = file.read_at(&mut bytes, 0).map_err(Error::io("read", path))?;
        bytes.truncate(read);
    }
    Ok(bytes)
}
