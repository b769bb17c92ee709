//! The write-ahead log: everything that raft needs after a crash, in the order it was written.
//!
//! ```text
//! raftexample-1/
//!   0000000000000007.wal    | head | frame | frame | … | frame | close |
//!   0000000000000008.wal    | head | frame | zeros |                   the current segment
//! ```
//! The unit of the log is the [`Frame`]: the records that one sync covers, under one checksum. After
//! a crash a frame is there completely or not at all. The next frame is written after the sync of the
//! previous one has returned.
//!
//! | file | owns |
//! |---|---|
//! | `wal/writer.rs` | [`Wal`]: create, open, save, purge |
//! | `wal/reader.rs` | listing, reading and checking segments |
//! | `wal/replay.rs` | the state that the records add up to |
//! | `wal/format.rs` | the bytes, and how a torn frame differs from damage |
//!
//! [`Wal::save`] appends to the last segment. When that is full, `save` creates the next one. The
//! head of each segment repeats the state at that time: identity, incarnations, the last two marks,
//! hard state and last index. So older segments can be removed. The close of each earlier segment
//! states that a successor exists. So newer segments cannot disappear unnoticed.
//!
//! # States after a crash
//!
//! During [`Wal::create`]:
//! - no directory, or a directory without a segment, possibly with a `.tmp` file: there is no log, and
//!   the next start creates it;
//! - the first segment, complete: an empty log.
//!
//! During [`Wal::save`]:
//! - the log with the complete frame, or without it;
//! - some sectors of the frame and zeros: the frame is torn, and [`Wal::open`] replaces it with zeros.
//!   The member has not acknowledged it;
//! - the file with some more zeros.
//!
//! During [`Wal::save`] that creates a segment:
//! - a `.tmp` file: the next open removes it;
//! - the new segment with its head only, and the previous one closed, not closed, or with a torn close,
//!   with or without its preallocated zeros: the log without the frame that needed the new segment.
//!   [`Wal::open`] closes the previous segment.
//!
//! During [`Wal::purge`]:
//! - some of the segments to remove, without gaps and including the last of them. They are read too.
//!   Later segments repeat or replace everything they state.
//!
//! During [`Wal::open`]:
//! - the torn frame, with more zeros or none: it stays a torn frame until its header is gone;
//! - the last frame, rewritten with the same bytes: unchanged;
//! - an empty `.tmp` file: the next open removes it;
//! - the close of the previous segment, complete or torn.
//!
//! # Preallocated zeros
//!
//! The file of the last segment grows in whole steps of [`STEP_BYTES`], before a frame uses them. That
//! tells a file that was cut short from a crash (see `wal/format.rs`), and it is fast: a sync of a file
//! that grew writes the file's length and its new blocks in addition to the data. A frame that comes
//! near the end of the file writes the next step of zeros after itself, with the same sync. Only a frame
//! that is longer than what is left needs a sync of its own for the growth.
//!
//! # Invariants
//!
//! - A segment gets its name after its head and the rest of its first step are durable.
//! - A successor gets its name after all frames of the segment are durable, except the close.
//! - The close is written after the successor's name is durable, and the zeros after it are removed
//!   then. The successor's first frame is written after the close is durable.
//!
//! So every other fault of a head or of an earlier segment is damage, and so is a last segment that is
//! closed. Damage is never repaired: [`Error::Corrupt`](crate::error::Error::Corrupt) keeps the member
//! from starting.
//!
//! A process that dies leaves its writes in the operating system's cache. [`Wal::open`] may therefore
//! read a frame, or a segment's name, that is not durable. It rewrites the last frame with the same
//! bytes, changes the directory once, and syncs both. A sync alone is not enough: after a failed sync,
//! some systems consider the pages clean (the "fsyncgate" of PostgreSQL, 2018).
//!
//! The log does not know which entries are committed or applied, and does not read snapshots. If
//! leading segments are missing, [`Recovered::base`] is above the newest snapshot, and the caller
//! refuses to start.
//!
//! # Adding a format version
//!
//! A program reads one version of each format. It refuses every other version with
//! [`Error::OtherVersion`](crate::error::Error::OtherVersion), and peers of another protocol version
//! are refused too. Raise the version when one of these changes:
//!
//! | change | raise |
//! |---|---|
//! | frames or records (`wal/format.rs`) | [`VERSION`] |
//! | data or context of an entry: a command of the state machine, a change of members | [`VERSION`], [`snapshotter::VERSION`], the peer protocol |
//! | the meaning of apply, or a constant that apply uses | the same three |
//! | snapshot file: its layout, its meta bytes, the state machine's records | [`snapshotter::VERSION`], the peer protocol |
//! | body or header of a request between members | the peer protocol |
//!
//! The peer protocol is `PROTOCOL` in `transport/wire.rs`. The
//! [contributor's guide](crate::guide::contributing#adding-a-format-version) has the steps.
//!
//! [`snapshotter::VERSION`]: super::snapshotter::VERSION

mod format;
mod reader;
mod replay;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::BTreeMap;
use std::path::PathBuf;

use raft::eraftpb::{Entry, HardState};

pub use self::format::VERSION;
pub(crate) use self::format::{Head, Record};
pub use self::reader::exists;
pub(crate) use self::reader::{Seen, parse_name, survey};
pub use self::writer::Wal;

/// The length of a segment in bytes. A frame that is longer has a segment of its own. A purge removes
/// whole segments, and a start reads one segment into memory at a time.
pub const SEGMENT_BYTES: u64 = 64 << 20;
/// The most bytes that a segment can have. A frame that is longer than [`SEGMENT_BYTES`] has a segment of
/// its own; it holds a message of a peer, and the entries of the turn before. A longer file is not read into
/// memory: a sparse one may claim any length.
const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// The file of the last segment grows to multiples of this, in bytes. For a frame longer than a
/// quarter of it the file is extended without writing the zeros.
pub const STEP_BYTES: u64 = 256 << 10;

/// The lengths that a log is written with. Reading needs none of them.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// The length of a segment, in place of [`SEGMENT_BYTES`].
    pub segment_bytes: u64,
    /// The growth of a new segment, in place of [`STEP_BYTES`]. A multiple of 16, at least 32.
    pub step_bytes: u64,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { segment_bytes: SEGMENT_BYTES, step_bytes: STEP_BYTES }
    }
}

/// The identity of the member that owns a log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The cluster id, 0 while the member does not know it.
    pub cluster_id: u64,
    /// The member id, never 0.
    pub member_id: u64,
    /// 64 random bits, drawn when the log was created.
    pub incarnation: u64,
    /// A hash of the first `--cluster` list; 0 if the member joined, or was restored.
    pub first_urls_hash: u64,
}

/// Identifies a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotId {
    /// The index of the last entry that the snapshot contains.
    pub index: u64,
    /// The term of that entry.
    pub term: u64,
}

/// The records that one sync covers, written in the order of the fields. After a crash all of them
/// are there, or none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Frame<'a> {
    /// The new identity of the member.
    pub identity: Option<&'a Identity>,
    /// Incarnations of other first members, as (member id, incarnation).
    pub incarnations: &'a [(u64, u64)],
    /// The last entry that the member lost, although it had acknowledged it; 0 lifts the quarantine.
    pub quarantine: Option<u64>,
    /// A snapshot that this member made. Its file is durable. The log keeps its entries.
    pub made: Option<SnapshotId>,
    /// A snapshot that this member received. Its file is durable. Raft dropped its log, and the next
    /// entry follows the snapshot.
    pub installed: Option<SnapshotId>,
    /// Entries without gaps. They replace all entries from the first of their indexes on.
    pub entries: &'a [Entry],
    /// The new hard state of raft.
    pub hard_state: Option<&'a HardState>,
}

impl Frame<'_> {
    fn records(&self) -> impl Iterator<Item = Record> {
        let incarnations = self.incarnations.iter();
        let incarnations = incarnations
            .map(|&(member_id, incarnation)| Record::Incarnation { member_id, incarnation });
        let identity = self.identity.cloned().map(Record::Identity).into_iter();
        identity
            .chain(incarnations)
            .chain(self.quarantine.map(Record::Quarantine))
            .chain(self.made.map(Record::Mark))
            .chain(self.installed.map(Record::Install))
            .chain(self.entries.iter().cloned().map(Record::Entry))
            .chain(self.hard_state.cloned().map(Record::HardState))
    }
}

/// The state that a log holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Recovered {
    /// The identity of the member that owns the log.
    pub identity: Identity,
    /// The incarnations of other first members, by member id.
    pub incarnations: BTreeMap<u64, u64>,
    /// The last entry that the member lost, although it had acknowledged it; 0 if it lost none.
    pub quarantine: u64,
    /// The snapshots that the log names, in ascending order. The newest two are always among them.
    pub marks: Vec<SnapshotId>,
    /// The entries without gaps, after all truncations. The first has index `base + 1`.
    pub entries: Vec<Entry>,
    /// The hard state of raft.
    pub hard_state: HardState,
    /// The index before the first entry. It is 0 in a new log, and rises with purges and received
    /// snapshots.
    pub base: u64,
    /// The file and the offset of a torn frame.
    pub cut: Option<(PathBuf, u64)>,
}

impl Recovered {
    /// The index of the last entry, or `base` if there is none.
    pub fn last_index(&self) -> u64 {
        self.base + self.entries.len() as u64
    }
}
