//! The bytes of a log segment: pure functions between records and frames.
//!
//! Every number is little-endian. Every checksum is CRC32C.
//!
//! # Frames
//!
//! A segment is a row of frames, each of which starts at a multiple of 16 in the file:
//!
//! ```text
//!  0               4               8               12              16
//!  | payload bytes | checksum of   | zero portions | checksum of   |
//!  | (u32)         | payload, fill | (u32)         | header, salt  |
//!  +---------------+---------------+---------------+---------------+
//!  | payload: records                    | fill: 1 to 16 times 0xff|
//! ```
//! - The header's checksum covers its first 12 bytes and then the salt: the member's incarnation,
//!   the segment's number and the frame's offset in the file, 8 bytes each. So a header is valid at
//!   its own place only, not in a copy of the frame elsewhere, nor in a value that a client made up
//!   to look like one. The first frame of a segment, which says what incarnation and number are,
//!   has zeros in their place.
//! - A sector is 512 bytes. Being aligned to 16, a header never lies across two.
//! - A portion is what a frame has of one sector. "Zero portions" counts those that are all zero as
//!   written. The first never is, for the header's sake, nor the last, for the fill's.
//!
//! # Records
//!
//! A payload is a row of records, each `kind (u8) | body bytes (u32) | body`:
//!
//! | kind | record      | body                                                                    |
//! |------|-------------|-------------------------------------------------------------------------|
//! | 1    | head        | magic (8 bytes), version (u32), segment, bytes of the one before,       |
//! |      |             | last index (u64)                                                        |
//! | 2    | identity    | cluster id, member id, incarnation, hash of the first URLs (u64)        |
//! | 3    | incarnation | member id, incarnation (u64)                                            |
//! | 4    | mark        | index, term (u64)                                                       |
//! | 5    | install     | index, term (u64)                                                       |
//! | 6    | entry       | index, term (u64), type (u8), context bytes (u32), context, data        |
//! | 7    | hard state  | term, vote, commit (u64)                                                |
//! | 8    | close       | nothing                                                                 |
//!
//! An entry's type is 0 for a normal one, 1 for a ConfChange, 2 for a ConfChangeV2; its data is the
//! rest of the body. A head is the first record of the first frame, and nowhere else. A close is the
//! one record of the last frame of a segment, and says that another follows; the bytes of the
//! segment before do not count that frame. The last index is that of the log when the segment was
//! begun, 0 if it had none.
//!
//! In version 1 a head has no last index, and the segment before it need not be closed. In versions 1
//! and 2 no zeros are written ahead. Up to version 3 no entry has to do with learners. A program that reads those alone does not read a log that this
//! one has made or added a segment to.
//!
//! # What became of a frame
//!
//! The zeros at the end of the last segment do not count: they are written ahead, and no frame ends
//! in a zero. The next frame is written only after the sync of this one returned. So bytes behind a
//! frame prove that it once was whole, and only the last frame can be torn, or the one that closes
//! the segment before while the last segment is still empty. The disk is assumed to write a sector
//! wholly or not at all, and a sector never written reads as zeros. That leaves these shapes of a
//! torn frame, whichever of its sectors arrived, however far the file's length came, and wherever a
//! write that failed had stopped:
//!
//! 1. The file ends within the header, or where a valid header says that more must follow.
//! 2. The header is valid, and the frame has more zero portions than its header counts.
//! 3. The header is not valid, and what the frame has of its first sector is all zero.
//!
//! A flipped bit in a frame makes none of these; among the zeros ahead it looks like a torn frame, or
//! like damage. Zeros in the place of the end of the file look like the end of the file, as if it had
//! been cut off there: that is noticed only by who knows how long it was. The one exception is a flip of the only bit set in a portion,
//! which looks like the second shape: there the checksum itself tells, since each single flip
//! changes it in its own way. Everything that is not torn is damage.

use bytes::Bytes;
use raft::eraftpb::{Entry, EntryType, HardState};

use super::{Identity, SnapshotId};
use crate::error::REPLACE_MEMBER;
use crate::storage::files::OTHER_VERSION;

/// The version of this format. It rises with every change; those before it are read too.
pub(super) const VERSION: u32 = 4;
/// The length of a frame's header in bytes, and the alignment of frames.
pub(super) const HEADER_BYTES: usize = 16;
/// What a disk writes wholly or not at all, in bytes.
const SECTOR_BYTES: usize = 512;
/// Follows the payload.
const FILL: u8 = 0xff;
/// Marks a file as a segment of this log.
const MAGIC: [u8; 8] = *b"raft-wal";
/// The generator polynomial of CRC32C, its bits reversed as the checksum's are.
const CRC32C_POLYNOMIAL: u32 = 0x82f6_3b78;

const HEAD: u8 = 1;
const IDENTITY: u8 = 2;
const INCARNATION: u8 = 3;
const MARK: u8 = 4;
const INSTALL: u8 = 5;
const ENTRY: u8 = 6;
const HARD_STATE: u8 = 7;
const CLOSE: u8 = 8;
/// The length in bytes of the frame that closes a segment.
pub(super) const CLOSE_BYTES: u64 = frame_bytes(RECORD_HEADER_BYTES) as u64;
/// The length in bytes of a record's kind and length.
pub(super) const RECORD_HEADER_BYTES: usize = 5;

/// Ties a frame to its segment; zeros for the first frame of each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Salt {
    /// The member's.
    pub incarnation: u64,
    /// The segment's number.
    pub segment: u64,
}

/// One decoded record.
#[derive(Debug, PartialEq)]
pub(crate) enum Record {
    Head(Head),
    /// Whose log this is.
    Identity(Identity),
    /// The first incarnation heard for a member.
    Incarnation {
        member_id: u64,
        incarnation: u64,
    },
    /// Names a snapshot; leaves the entries as they are.
    Mark(SnapshotId),
    /// Names a snapshot that took the place of all entries.
    Install(SnapshotId),
    /// Takes the place of all entries from its index on.
    Entry(Entry),
    /// Takes the place of the one before.
    HardState(HardState),
    /// Nothing follows in this segment, but another segment does.
    Close,
}

/// Where a segment belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// Of the format.
    pub version: u32,
    /// The segment's number.
    pub segment: u64,
    /// The length in bytes of the segment before it without the frame that closes it, 0 for the
    /// first.
    pub previous_bytes: u64,
    /// Of the log when the segment was begun, if it had any and the version tells.
    pub last_index: Option<u64>,
}

/// Appends a head record of the current version to `payload`.
pub(super) fn put_head(
    payload: &mut Vec<u8>,
    segment: u64,
    previous_bytes: u64,
    last_index: Option<u64>,
) {
    put(payload, HEAD, |body| {
        body.extend_from_slice(&MAGIC);
        body.extend_from_slice(&VERSION.to_le_bytes());
        put_numbers(body, &[segment, previous_bytes, last_index.unwrap_or(0)]);
    });
}

/// Appends an identity record to `payload`.
pub(super) fn put_identity(payload: &mut Vec<u8>, identity: &Identity) {
    let Identity { cluster_id, member_id, incarnation, first_urls_hash } = *identity;
    put(payload, IDENTITY, |body| {
        put_numbers(body, &[cluster_id, member_id, incarnation, first_urls_hash]);
    });
}

/// Appends an incarnation record to `payload`.
pub(super) fn put_incarnation(payload: &mut Vec<u8>, member_id: u64, incarnation: u64) {
    put(payload, INCARNATION, |body| put_numbers(body, &[member_id, incarnation]));
}

/// Appends a mark record to `payload`.
pub(super) fn put_mark(payload: &mut Vec<u8>, mark: SnapshotId) {
    put(payload, MARK, |body| put_numbers(body, &[mark.index, mark.term]));
}

/// Appends an install record to `payload`.
pub(super) fn put_install(payload: &mut Vec<u8>, mark: SnapshotId) {
    put(payload, INSTALL, |body| put_numbers(body, &[mark.index, mark.term]));
}

/// Appends an entry record to `payload`.
pub(super) fn put_entry(payload: &mut Vec<u8>, entry: &Entry) {
    put(payload, ENTRY, |body| {
        put_numbers(body, &[entry.index, entry.term]);
        body.push(match entry.entry_type {
            EntryType::EntryNormal => 0,
            EntryType::EntryConfChange => 1,
            EntryType::EntryConfChangeV2 => 2,
        });
        body.extend_from_slice(&length(&entry.context).to_le_bytes());
        body.extend_from_slice(&entry.context);
        body.extend_from_slice(&entry.data);
    });
}

/// Appends a hard state record to `payload`.
pub(super) fn put_hard_state(payload: &mut Vec<u8>, hard_state: &HardState) {
    put(payload, HARD_STATE, |body| {
        put_numbers(body, &[hard_state.term, hard_state.vote, hard_state.commit]);
    });
}

/// Appends a close record to `payload`.
pub(super) fn put_close(payload: &mut Vec<u8>) {
    put(payload, CLOSE, |_| {});
}

fn put(payload: &mut Vec<u8>, kind: u8, put_body: impl FnOnce(&mut Vec<u8>)) {
    payload.push(kind);
    payload.extend_from_slice(&[0; 4]);
    let start = payload.len();
    put_body(payload);
    let body_length = length(&payload[start..]);
    payload[start - 4..start].copy_from_slice(&body_length.to_le_bytes());
}

fn put_numbers(body: &mut Vec<u8>, numbers: &[u64]) {
    for number in numbers {
        body.extend_from_slice(&number.to_le_bytes());
    }
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("what one sync covers is bounded far below 4 GiB")
}

/// What is wrong with the contents of a frame that is whole.
#[derive(Debug)]
pub(super) struct Fault {
    /// What was found, beside what was expected.
    pub reason: String,
    /// What the operator can do.
    pub remedy: &'static str,
}

impl From<String> for Fault {
    fn from(reason: String) -> Self {
        Self { reason, remedy: REPLACE_MEMBER }
    }
}

/// The records of a payload, in order, up to the first that is faulty.
pub(super) fn records(payload: &[u8]) -> impl Iterator<Item = Result<Record, Fault>> {
    let mut rest = Fields(payload);
    std::iter::from_fn(move || {
        if rest.0.is_empty() {
            return None;
        }
        let record = take_record(&mut rest);
        if record.is_err() {
            // Where the next record would start is not known.
            rest = Fields(&[]);
        }
        Some(record)
    })
}

fn take_record(payload: &mut Fields<'_>) -> Result<Record, Fault> {
    let kind = payload.u8()?;
    let body_length = payload.u32()?;
    let mut body = Fields(payload.take(body_length as usize)?);
    let record = match kind {
        HEAD => Record::Head(take_head(&mut body)?),
        IDENTITY => Record::Identity(Identity {
            cluster_id: body.u64()?,
            member_id: body.u64()?,
            incarnation: body.u64()?,
            first_urls_hash: body.u64()?,
        }),
        INCARNATION => Record::Incarnation { member_id: body.u64()?, incarnation: body.u64()? },
        MARK => Record::Mark(SnapshotId { index: body.u64()?, term: body.u64()? }),
        INSTALL => Record::Install(SnapshotId { index: body.u64()?, term: body.u64()? }),
        ENTRY => Record::Entry(take_entry(&mut body)?),
        HARD_STATE => Record::HardState(HardState {
            term: body.u64()?,
            vote: body.u64()?,
            commit: body.u64()?,
            ..HardState::default()
        }),
        CLOSE => Record::Close,
        _ => return Err(format!("record kind {kind}, known are {HEAD} to {CLOSE}").into()),
    };
    match body.0.len() {
        0 => Ok(record),
        extra => Err(format!("{extra} bytes too many in a record of kind {kind}").into()),
    }
}

fn take_head(body: &mut Fields<'_>) -> Result<Head, Fault> {
    // Magic and version come before the rest is looked at, which another version may lay out in
    // another way.
    let magic = body.take(MAGIC.len())?;
    if magic != MAGIC {
        return Err(format!("begins with {magic:02x?}, a segment with {MAGIC:02x?}").into());
    }
    let version = body.u32()?;
    if !(1..=VERSION).contains(&version) {
        let reason = format!("format version {version}, this program reads 1 to {VERSION}");
        return Err(Fault { reason, remedy: OTHER_VERSION });
    }
    let (segment, previous_bytes) = (body.u64()?, body.u64()?);
    let last_index = if version == 1 { 0 } else { body.u64()? };
    let last_index = (last_index > 0).then_some(last_index);
    Ok(Head { version, segment, previous_bytes, last_index })
}

fn take_entry(body: &mut Fields<'_>) -> Result<Entry, String> {
    let (index, term) = (body.u64()?, body.u64()?);
    let entry_type = match body.u8()? {
        0 => EntryType::EntryNormal,
        1 => EntryType::EntryConfChange,
        2 => EntryType::EntryConfChangeV2,
        unknown => return Err(format!("entry type {unknown}, known are 0 to 2")),
    };
    let context_length = body.u32()?;
    let context = Bytes::copy_from_slice(body.take(context_length as usize)?);
    let data = Bytes::copy_from_slice(body.take(body.0.len())?);
    Ok(Entry { index, term, entry_type, context, data, ..Entry::default() })
}

/// The bytes not decoded yet.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or_else(|| {
            format!("a record wants {count} bytes more, the frame has {}", self.0.len())
        })?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        Ok(self.take(N)?.try_into().expect("as many bytes were taken"))
    }

    fn u8(&mut self) -> Result<u8, String> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }
}

/// Empties `buffer` and leaves room for a header; records may then be put behind it.
pub(super) fn begin_frame(buffer: &mut Vec<u8>) {
    buffer.clear();
    buffer.resize(HEADER_BYTES, 0);
}

/// The length in bytes of the frame with a payload of `payload_length` bytes.
pub(super) const fn frame_bytes(payload_length: usize) -> usize {
    HEADER_BYTES + (payload_length / HEADER_BYTES + 1) * HEADER_BYTES
}

/// Makes what was begun and put into `frame` a frame for the place `start` in its segment.
pub(super) fn seal_frame(frame: &mut Vec<u8>, start: u64, salt: Salt) {
    let payload_length = length(&frame[HEADER_BYTES..]);
    frame.resize(frame_bytes(payload_length as usize), FILL);
    let checksum = crc32c::crc32c(&frame[HEADER_BYTES..]);
    frame[0..4].copy_from_slice(&payload_length.to_le_bytes());
    frame[4..8].copy_from_slice(&checksum.to_le_bytes());
    // The first portion holds the length just written, which is not 0, so the header's other two
    // fields do not bear on the count.
    let zero_portions = portions(frame, start).filter(|portion| is_zero(portion)).count() as u32;
    frame[8..12].copy_from_slice(&zero_portions.to_le_bytes());
    let checksum = header_checksum(&frame[..12], start, salt);
    frame[12..16].copy_from_slice(&checksum.to_le_bytes());
}

/// What a frame's header says.
struct Header {
    payload_length: usize,
    checksum: u32,
    zero_portions: usize,
}

/// The header at the front of `frame`, if it is valid for this place.
fn decode_header(frame: &[u8], start: u64, salt: Salt) -> Option<Header> {
    let mut fields = Fields(frame.get(..HEADER_BYTES)?);
    let mut next = || fields.u32().expect("a header has four numbers");
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

/// A whole frame, as read.
#[derive(Debug)]
pub(super) struct WholeFrame<'a> {
    pub payload: &'a [u8],
    /// Where the next frame starts.
    pub end: usize,
}

/// Why no whole frame was read.
#[derive(Debug)]
pub(super) struct BadFrame {
    /// True if a crash while it was written explains it, provided that it was the last written.
    pub torn: bool,
    /// What was found, beside what was expected.
    pub reason: String,
}

/// Reads the frame at `start` of a segment's bytes.
pub(super) fn read_frame(
    segment: &[u8],
    start: usize,
    salt: Salt,
) -> Result<WholeFrame<'_>, BadFrame> {
    let rest = &segment[start..];
    if rest.len() < HEADER_BYTES {
        let reason = format!("{} bytes remain, a frame's header has {HEADER_BYTES}", rest.len());
        return Err(BadFrame { torn: true, reason });
    }
    let Some(header) = decode_header(rest, start as u64, salt) else {
        let first_portion = portions(rest, start as u64).next().unwrap_or_default();
        return Err(BadFrame {
            torn: is_zero(first_portion) && !holds_frame(segment, start + HEADER_BYTES, salt),
            reason: "no valid frame header where one must be".to_owned(),
        });
    };
    let bytes = frame_bytes(header.payload_length);
    let Some(frame) = rest.get(..bytes) else {
        let reason = format!("{} bytes remain, the frame has {bytes}", rest.len());
        return Err(BadFrame { torn: true, reason });
    };
    let checksum = crc32c::crc32c(&frame[HEADER_BYTES..]);
    if checksum == header.checksum {
        let (payload, fill) = frame[HEADER_BYTES..].split_at(header.payload_length);
        if fill.iter().any(|&byte| byte != FILL) {
            let reason = format!("the frame is filled with {fill:02x?}, not with {FILL:#04x}");
            return Err(BadFrame { torn: false, reason });
        }
        return Ok(WholeFrame { payload, end: start + bytes });
    }
    let zero_portions = portions(frame, start as u64).filter(|portion| is_zero(portion)).count();
    Err(BadFrame {
        torn: bytes == rest.len()
            && zero_portions > header.zero_portions
            && !is_one_flip(frame, start as u64, checksum ^ header.checksum),
        reason: format!(
            "the frame's checksum is {checksum:#010x}, its header says {:#010x}; {zero_portions} \
             of its sectors are zero, its header says {}",
            header.checksum, header.zero_portions
        ),
    })
}

/// True if a whole frame starts anywhere from `start` on.
fn holds_frame(segment: &[u8], start: usize, salt: Salt) -> bool {
    (start..segment.len()).step_by(HEADER_BYTES).any(|start| {
        decode_header(&segment[start..], start as u64, salt).is_some_and(|header| {
            segment
                .get(start + HEADER_BYTES..start + frame_bytes(header.payload_length))
                .is_some_and(|covered| crc32c::crc32c(covered) == header.checksum)
        })
    })
}

/// What the frame at `start` has of each sector, in order.
fn portions(frame: &[u8], start: u64) -> impl Iterator<Item = &[u8]> {
    let in_sector = (start % SECTOR_BYTES as u64) as usize;
    let (first, rest) = frame.split_at(frame.len().min(SECTOR_BYTES - in_sector));
    std::iter::once(first).chain(rest.chunks(SECTOR_BYTES))
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

/// True if turning over one bit, in a portion that is now zero, changes the checksum of what the
/// header covers by `difference`.
///
/// CRC32C is linear: what a flip changes depends on the bit's distance from the end alone. It is
/// the polynomial for the last bit, and one step of the checksum's register further for each bit
/// before. Within any frame those values all differ, so the first that fits is the only one.
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
