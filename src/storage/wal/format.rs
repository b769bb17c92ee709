//! The bytes of a log segment: pure functions that encode and decode frames and records.
//!
//! All numbers are little-endian. All checksums are CRC32C.
//!
//! # Frames
//!
//! A segment is a sequence of frames. Each frame starts at a file offset that is a multiple of 16:
//!
//! ```text
//!  0               4               8               12              16
//!  | payload bytes | checksum of   | zero portions | checksum of   |
//!  | (u32)         | payload, fill | (u32)         | header, salt  |
//!  +---------------+---------------+---------------+---------------+
//!  | payload: records                   | fill: 1 to 16 times 0xff |
//! ```
//! - The header checksum covers the first 12 bytes of the header and then the salt: the member's
//!   incarnation, the segment's number and the frame's file offset, 8 bytes each. A header is
//!   therefore valid at its own place only. A copy of the frame at another place is invalid, and so
//!   is a value that a client built to look like a frame. The first frame of a segment contains the
//!   incarnation and the number, so its salt is all zeros.
//! - A sector is 512 bytes. A header is aligned to 16 bytes, so it never spans two sectors.
//! - A portion is the part of a frame that lies in one sector. "Zero portions" counts the portions
//!   that consist of zeros only. The first portion has a nonzero header and the last one has a
//!   nonzero fill, so neither counts.
//!
//! # The bytes of a PUT
//!
//! A follower writes one frame for all entries of a turn. An entry is a record of
//! `5 + 21 + 24 + data` bytes: kind and length; index, term, type and context length; the id of the
//! request as the context; the command as the data. A PUT's command is `20 + key + value` bytes (bincode,
//! fixed integers). So `PUT /my-key` with the value `hello` is 82 bytes of payload, in a frame of 112;
//! with a hard state record (29 bytes), in a frame of 128. `raftexample inspect` shows the frames.
//!
//! # Records
//!
//! A payload is a sequence of records: `kind (u8) | body bytes (u32) | body`.
//!
//! | kind | record      | body                                                                     |
//! |------|-------------|--------------------------------------------------------------------------|
//! | 1    | head        | magic (8 bytes), version (u32), segment, open length of the previous     |
//! |      |             | segment in bytes, last index, step in bytes (u64)                        |
//! | 2    | identity    | cluster id, member id, incarnation, hash of the first URLs (u64)         |
//! | 3    | incarnation | member id, incarnation (u64)                                             |
//! | 4    | mark        | index, term (u64)                                                        |
//! | 5    | install     | index, term (u64)                                                        |
//! | 6    | entry       | index, term (u64), type (u8), context bytes (u32), context, data         |
//! | 7    | hard state  | term, vote, commit (u64)                                                 |
//! | 8    | close       | empty                                                                    |
//! | 9    | quarantine  | last index that was lost, 0 to lift the quarantine (u64)                 |
//! | 10   | padding     | 11 zeros                                                                 |
//!
//! - A head is the first record of a segment's first frame and occurs nowhere else. Its last index is
//!   the last index of the log when the segment was created, 0 for an empty log.
//! - A close is the only record in the last frame of a segment. It states that another segment
//!   follows. The open length of a segment excludes this frame.
//! - A padding is the last record of a frame that would end on a multiple of the step without it.
//! - An entry's type is 0 for a normal entry, 1 for a ConfChange and 2 for a ConfChangeV2. Its data
//!   is the rest of the body.
//!
//! # Torn frames and damage
//!
//! The writer preallocates zeros at the end of the last segment. No frame ends in a zero, so the
//! reader ignores trailing zeros. A frame is written only after the sync of the previous frame has
//! returned. Bytes after a frame therefore prove that the frame was once complete. Only two frames
//! can be torn: the last frame, and the close of the previous segment while the last segment holds
//! nothing but its head. `wal/reader.rs` knows which frame that is, this module whether its shape is that
//! of a torn one.
//!
//! The format assumes that a disk writes a sector completely or not at all, and that a sector that
//! was never written reads as zeros. Whichever sectors of a torn frame arrived, and wherever a failed
//! write stopped, only zeros follow the frame, and it has one of these shapes:
//!
//! 1. The header is invalid and only zeros follow it, or it is valid and the frame's last byte is zero.
//! 2. The header is valid, and the frame has more zero portions than the header counts.
//! 3. The header is invalid, the frame's first portion consists of zeros only, and no complete frame
//!    follows.
//!
//! Everything else is damage. One flipped bit in a frame produces none of these shapes, with one
//! exception: a flip that clears the only set bit of a portion has shape 2. The checksum detects this
//! case, because each single flip changes it in a different way. So a torn frame that lacks just one
//! sector, which had just one bit set, is called damage: the safe one of two readings.
//!
//! # A file that was cut short
//!
//! A crash never shortens the last segment, because of three invariants:
//!
//! - The file grows by zeros, up to a multiple of the step that its head states. A frame is written
//!   only after the growth up to its end is durable. Before it grows, its length is checked.
//! - No frame ends on a multiple of the step.
//! - The file shrinks only after the close is durable. Zeros may follow a close.
//!
//! So a frame header that announces an end beyond the end of the file is damage, and so is any byte
//! but zero after the last whole step. A cut at a multiple of the step divides a frame, or removes
//! zeros only.
//!
//! Two kinds of damage remain undetected or ambiguous. A flipped bit in the preallocated zeros looks
//! like a torn frame or like damage. Zeros in place of the last frames look like a shorter log,
//! because no other file records the length.

use bytes::{Buf, Bytes, TryGetError};
use raft::eraftpb::{Entry, EntryType, HardState};

use super::{Identity, SnapshotId};

/// The version of the log. A program reads and writes this one only. [`wal`](super) states what
/// raises it.
pub const VERSION: u32 = 4;
/// The length of a frame's header in bytes, and the alignment of frames.
pub(super) const HEADER_BYTES: usize = 16;
/// The unit in bytes that a disk writes completely or not at all.
const SECTOR_BYTES: usize = 512;
/// The byte that fills a frame after its payload. It is not zero.
const FILL: u8 = 0xff;
/// The first bytes of a head's body.
const MAGIC: [u8; 8] = *b"raft-wal";
/// The generator polynomial of CRC32C, bits reversed.
const CRC32C_POLYNOMIAL: u32 = 0x82f6_3b78;

const HEAD: u8 = 1;
const IDENTITY: u8 = 2;
const INCARNATION: u8 = 3;
const MARK: u8 = 4;
const INSTALL: u8 = 5;
const ENTRY: u8 = 6;
const HARD_STATE: u8 = 7;
const CLOSE: u8 = 8;
const QUARANTINE: u8 = 9;
const PADDING: u8 = 10;
/// The length in bytes of the frame that closes a segment.
pub(super) const CLOSE_BYTES: u64 = frame_bytes(RECORD_HEADER_BYTES) as u64;
/// The length in bytes of the fields before a record's body: kind and body length.
pub(super) const RECORD_HEADER_BYTES: usize = 5;

/// Binds a frame to its segment. All zeros for a segment's first frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Salt {
    /// The incarnation of the member.
    pub incarnation: u64,
    /// The segment's number.
    pub segment: u64,
}

/// One decoded record.
#[derive(Debug, PartialEq)]
pub(crate) enum Record {
    Head(Head),
    /// The identity of the member that owns the log.
    Identity(Identity),
    /// The incarnation of first member `member_id`. Replaces an earlier one of the same member.
    Incarnation {
        member_id: u64,
        incarnation: u64,
    },
    /// Names a snapshot that this member made. The log keeps its entries.
    Mark(SnapshotId),
    /// Names a snapshot that replaced all entries.
    Install(SnapshotId),
    /// Replaces all entries from its index on.
    Entry(Entry),
    /// Replaces the previous hard state.
    HardState(HardState),
    /// Ends the segment. Another segment follows.
    Close,
    /// The member lost entries up to this index that it had acknowledged; 0 lifts the quarantine.
    Quarantine(u64),
    /// Moves the end of its frame. Means nothing.
    Padding,
}

/// The place of a segment in its log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Head {
    /// The number of the segment, from 0.
    pub segment: u64,
    /// The open length of the previous segment in bytes, 0 for the first segment.
    pub previous_bytes: u64,
    /// The last index of the log when the segment was created, 0 for an empty log.
    pub last_index: u64,
    /// The segment grows to multiples of this, in bytes.
    pub step_bytes: u64,
}

/// Appends `record` to `payload`.
pub(super) fn put(payload: &mut Vec<u8>, record: &Record) {
    let start = payload.len();
    payload.extend_from_slice(&[0; RECORD_HEADER_BYTES]);
    let kind = match record {
        Record::Head(head) => {
            payload.extend_from_slice(&MAGIC);
            payload.extend_from_slice(&VERSION.to_le_bytes());
            let Head { segment, previous_bytes, last_index, step_bytes } = *head;
            put_numbers(payload, &[segment, previous_bytes, last_index, step_bytes]);
            HEAD
        }
        Record::Identity(identity) => {
            let Identity { cluster_id, member_id, incarnation, first_urls_hash } = *identity;
            put_numbers(payload, &[cluster_id, member_id, incarnation, first_urls_hash]);
            IDENTITY
        }
        Record::Incarnation { member_id, incarnation } => {
            put_numbers(payload, &[*member_id, *incarnation]);
            INCARNATION
        }
        Record::Mark(mark) => {
            put_numbers(payload, &[mark.index, mark.term]);
            MARK
        }
        Record::Install(mark) => {
            put_numbers(payload, &[mark.index, mark.term]);
            INSTALL
        }
        Record::Entry(entry) => {
            put_numbers(payload, &[entry.index, entry.term]);
            payload.push(match entry.entry_type {
                EntryType::EntryNormal => 0,
                EntryType::EntryConfChange => 1,
                EntryType::EntryConfChangeV2 => 2,
            });
            payload.extend_from_slice(&length(&entry.context).to_le_bytes());
            payload.extend_from_slice(&entry.context);
            payload.extend_from_slice(&entry.data);
            ENTRY
        }
        Record::HardState(hard_state) => {
            put_numbers(payload, &[hard_state.term, hard_state.vote, hard_state.commit]);
            HARD_STATE
        }
        Record::Close => CLOSE,
        Record::Quarantine(index) => {
            put_numbers(payload, &[*index]);
            QUARANTINE
        }
        Record::Padding => {
            payload.resize(start + HEADER_BYTES, 0);
            PADDING
        }
    };
    let body = start + RECORD_HEADER_BYTES;
    let body_length = length(&payload[body..]);
    payload[start] = kind;
    payload[start + 1..body].copy_from_slice(&body_length.to_le_bytes());
}

fn put_numbers(body: &mut Vec<u8>, numbers: &[u64]) {
    for number in numbers {
        body.extend_from_slice(&number.to_le_bytes());
    }
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("a frame is far below 4 GiB")
}

/// Why a program cannot use a frame whose checksum is right.
#[derive(Debug)]
pub(super) enum Fault {
    /// The frame cannot stand where it stands. States what was found and what was expected.
    Damage(String),
    /// The segment has this other format version.
    OtherVersion(u32),
}

impl From<String> for Fault {
    fn from(reason: String) -> Self {
        Self::Damage(reason)
    }
}

impl From<TryGetError> for Fault {
    fn from(TryGetError { requested, available }: TryGetError) -> Self {
        Self::Damage(format!("a record needs {requested} more bytes, the frame has {available}"))
    }
}

/// The records of a payload in order. The first faulty record ends the iteration.
pub(super) fn records(payload: &[u8]) -> impl Iterator<Item = Result<Record, Fault>> {
    let mut rest = payload;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let record = take_record(&mut rest);
        if record.is_err() {
            // The start of the next record is unknown.
            rest = &[];
        }
        Some(record)
    })
}

fn take_record(payload: &mut &[u8]) -> Result<Record, Fault> {
    let kind = payload.try_get_u8()?;
    let body_length = payload.try_get_u32_le()?;
    let mut body = take(payload, body_length as usize)?;
    let record = match kind {
        HEAD => Record::Head(take_head(&mut body)?),
        IDENTITY => Record::Identity(Identity {
            cluster_id: body.try_get_u64_le()?,
            member_id: body.try_get_u64_le()?,
            incarnation: body.try_get_u64_le()?,
            first_urls_hash: body.try_get_u64_le()?,
        }),
        INCARNATION => Record::Incarnation {
            member_id: body.try_get_u64_le()?,
            incarnation: body.try_get_u64_le()?,
        },
        MARK => {
            Record::Mark(SnapshotId { index: body.try_get_u64_le()?, term: body.try_get_u64_le()? })
        }
        INSTALL => Record::Install(SnapshotId {
            index: body.try_get_u64_le()?,
            term: body.try_get_u64_le()?,
        }),
        ENTRY => Record::Entry(take_entry(&mut body)?),
        HARD_STATE => Record::HardState(HardState {
            term: body.try_get_u64_le()?,
            vote: body.try_get_u64_le()?,
            commit: body.try_get_u64_le()?,
            ..HardState::default()
        }),
        CLOSE => Record::Close,
        QUARANTINE => Record::Quarantine(body.try_get_u64_le()?),
        PADDING => {
            body = &[];
            Record::Padding
        }
        _ => {
            let why = format!("unknown record kind {kind}, expected {HEAD} to {PADDING}");
            return Err(why.into());
        }
    };
    match body.len() {
        0 => Ok(record),
        extra => Err(format!("a record of kind {kind} has {extra} extra bytes").into()),
    }
}

fn take_head(body: &mut &[u8]) -> Result<Head, Fault> {
    // Another version may have another layout after these two fields, so they are checked first.
    let magic = take(body, MAGIC.len())?;
    if magic != MAGIC {
        return Err(format!("the head begins with {magic:02x?}, expected {MAGIC:02x?}").into());
    }
    let version = body.try_get_u32_le()?;
    if version != VERSION {
        return Err(Fault::OtherVersion(version));
    }
    Ok(Head {
        segment: body.try_get_u64_le()?,
        previous_bytes: body.try_get_u64_le()?,
        last_index: body.try_get_u64_le()?,
        step_bytes: body.try_get_u64_le()?,
    })
}

fn take_entry(body: &mut &[u8]) -> Result<Entry, Fault> {
    let (index, term) = (body.try_get_u64_le()?, body.try_get_u64_le()?);
    let entry_type = match body.try_get_u8()? {
        0 => EntryType::EntryNormal,
        1 => EntryType::EntryConfChange,
        2 => EntryType::EntryConfChangeV2,
        unknown => return Err(format!("unknown entry type {unknown}, expected 0 to 2").into()),
    };
    let context_length = body.try_get_u32_le()?;
    let context = Bytes::copy_from_slice(take(body, context_length as usize)?);
    let data = Bytes::copy_from_slice(std::mem::take(body));
    Ok(Entry { index, term, entry_type, context, data, ..Entry::default() })
}

fn take<'a>(body: &mut &'a [u8], count: usize) -> Result<&'a [u8], TryGetError> {
    let missing = TryGetError { requested: count, available: body.len() };
    body.split_off(..count).ok_or(missing)
}

/// Clears `buffer` and reserves the header. The caller then appends records.
pub(super) fn begin_frame(buffer: &mut Vec<u8>) {
    buffer.clear();
    buffer.resize(HEADER_BYTES, 0);
}

/// The length in bytes of the frame with a payload of `payload_length` bytes.
pub(super) const fn frame_bytes(payload_length: usize) -> usize {
    HEADER_BYTES + (payload_length / HEADER_BYTES + 1) * HEADER_BYTES
}

/// True if a file may grow in steps of `bytes`: they are longer than a padding, and frames fit into them.
pub(super) fn is_step(bytes: u64) -> bool {
    bytes > HEADER_BYTES as u64 && bytes.is_multiple_of(HEADER_BYTES as u64)
}

/// Makes `frame` longer if it would end on a multiple of `step_bytes` when it starts at `start`.
pub(super) fn pad_frame(frame: &mut Vec<u8>, start: u64, step_bytes: u64) {
    let end = start + frame_bytes(frame.len() - HEADER_BYTES) as u64;
    if end.is_multiple_of(step_bytes) {
        put(frame, &Record::Padding);
    }
}

/// Adds the fill and the header to `frame`, which [`begin_frame`] began, for the file offset `start`.
pub(super) fn seal_frame(frame: &mut Vec<u8>, start: u64, salt: Salt) {
    let payload_length = length(&frame[HEADER_BYTES..]);
    frame.resize(frame_bytes(payload_length as usize), FILL);
    let checksum = crc32c::crc32c(&frame[HEADER_BYTES..]);
    frame[0..4].copy_from_slice(&payload_length.to_le_bytes());
    frame[4..8].copy_from_slice(&checksum.to_le_bytes());
    // The first portion already holds a nonzero length, so the header fields that are still missing
    // do not change the count.
    let zero_portions = portions(frame, start).filter(|portion| is_zero(portion)).count() as u32;
    frame[8..12].copy_from_slice(&zero_portions.to_le_bytes());
    let checksum = header_checksum(&frame[..12], start, salt);
    frame[12..16].copy_from_slice(&checksum.to_le_bytes());
}

/// A decoded frame header.
struct Header {
    payload_length: usize,
    checksum: u32,
    zero_portions: usize,
}

/// Decodes the header at the start of `frame`. `None` if it is invalid at the file offset `start`.
fn decode_header(frame: &[u8], start: u64, salt: Salt) -> Option<Header> {
    let mut fields = frame.get(..HEADER_BYTES)?;
    let mut next = || fields.get_u32_le();
    let (payload_length, checksum, zero_portions, own_checksum) = (next(), next(), next(), next());
    (own_checksum == header_checksum(&frame[..12], start, salt)).then_some(Header {
        payload_length: payload_length as usize,
        checksum,
        zero_portions: zero_portions as usize,
    })
}

fn header_checksum(fields: &[u8], start: u64, salt: Salt) -> u32 {
    [salt.incarnation, salt.segment, start].iter().fold(crc32c::crc32c(fields), |crc, number| {
        crc32c::crc32c_append(crc, &number.to_le_bytes())
    })
}

/// A complete frame.
#[derive(Debug)]
pub(super) struct WholeFrame<'a> {
    pub payload: &'a [u8],
    /// The offset of the next frame.
    pub end: usize,
}

/// Why there is no complete frame.
#[derive(Debug)]
pub(super) struct BadFrame {
    /// True if a crash during its write explains its shape. The caller decides whether the frame was
    /// the last one written.
    pub torn: bool,
    /// What was found and what was expected.
    pub reason: String,
}

/// Reads the frame at offset `start` of a segment's bytes.
///
/// # Errors
/// [`BadFrame`] if the frame is incomplete or its checksums are wrong.
pub(super) fn read_frame(
    segment: &[u8],
    start: usize,
    salt: Salt,
) -> Result<WholeFrame<'_>, BadFrame> {
    let rest = &segment[start..];
    if rest.len() < HEADER_BYTES {
        return Err(cut_short(rest, HEADER_BYTES));
    }
    let Some(header) = decode_header(rest, start as u64, salt) else {
        let first_portion = portions(rest, start as u64).next().unwrap_or_default();
        return Err(BadFrame {
            torn: is_zero(&rest[HEADER_BYTES..])
                || is_zero(first_portion) && !holds_frame(segment, start + HEADER_BYTES, salt),
            reason: "expected a frame header, found none that is valid".to_owned(),
        });
    };
    let bytes = frame_bytes(header.payload_length);
    let Some(frame) = rest.get(..bytes) else {
        return Err(cut_short(rest, bytes));
    };
    let checksum = crc32c::crc32c(&frame[HEADER_BYTES..]);
    if checksum == header.checksum {
        let (payload, fill) = frame[HEADER_BYTES..].split_at(header.payload_length);
        if fill.iter().any(|&byte| byte != FILL) {
            let reason = format!("the frame ends with {fill:02x?}, expected fill {FILL:#04x}");
            return Err(BadFrame { torn: false, reason });
        }
        return Ok(WholeFrame { payload, end: start + bytes });
    }
    let zero_portions = portions(frame, start as u64).filter(|portion| is_zero(portion)).count();
    let lacks_sectors = zero_portions > header.zero_portions
        && !is_one_flip(frame, start as u64, checksum ^ header.checksum);
    Err(BadFrame {
        torn: is_zero(&rest[bytes..]) && (frame.last() == Some(&0) || lacks_sectors),
        reason: format!(
            "the frame has checksum {checksum:#010x} and {zero_portions} zero sectors, its header \
             states {:#010x} and {}",
            header.checksum, header.zero_portions
        ),
    })
}

fn cut_short(rest: &[u8], bytes: usize) -> BadFrame {
    let reason =
        format!("{} bytes remain, expected {bytes}: something cut the file short", rest.len());
    BadFrame { torn: false, reason }
}

/// True if a complete frame starts at `start` or after it.
fn holds_frame(segment: &[u8], start: usize, salt: Salt) -> bool {
    (start..segment.len()).step_by(HEADER_BYTES).any(|start| {
        decode_header(&segment[start..], start as u64, salt).is_some_and(|header| {
            segment
                .get(start + HEADER_BYTES..start + frame_bytes(header.payload_length))
                .is_some_and(|covered| crc32c::crc32c(covered) == header.checksum)
        })
    })
}

/// The portions of the frame at file offset `start`, in order.
fn portions(frame: &[u8], start: u64) -> impl Iterator<Item = &[u8]> {
    let in_sector = (start % SECTOR_BYTES as u64) as usize;
    let (first, rest) = frame.split_at(frame.len().min(SECTOR_BYTES - in_sector));
    std::iter::once(first).chain(rest.chunks(SECTOR_BYTES))
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

/// True if flipping one bit of a zero portion changes the checksum of the frame by `difference`.
///
/// CRC32C is linear, so the change depends only on the bit's distance from the end of the frame. For
/// the last bit the change is the polynomial. For each earlier bit it is one register step further.
/// Within a frame all these changes are different, so the first match is the only one.
fn is_one_flip(frame: &[u8], start: u64, difference: u32) -> bool {
    let mut change = CRC32C_POLYNOMIAL;
    for at in (HEADER_BYTES..frame.len()).rev() {
        for _ in 0..8 {
            if change == difference {
                let sectors_before =
                    (start as usize + at) / SECTOR_BYTES - start as usize / SECTOR_BYTES;
                return portions(frame, start).nth(sectors_before).is_some_and(is_zero);
            }
            change = (change >> 1) ^ (CRC32C_POLYNOMIAL & (change & 1).wrapping_neg());
        }
    }
    false
}
