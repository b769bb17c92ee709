//! The output of `inspect`: lines of text, or objects of JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, Write};
use std::path::Path;

use raft::eraftpb::{Entry, EntryType};
use serde::{Serialize, Serializer};

use super::Found;
use crate::channels::{Index, NodeId, RequestId, Term};
use crate::error::{Error, Result};
use crate::kvstore::{Command, KeyValue};
use crate::membership::MemberChange;
use crate::storage::wal::{Head, Record, SnapshotId};

/// Bytes of a key or value that are shown.
const SHOWN_BYTES: usize = 64;

pub(super) fn shown(path: &Path) -> String {
    path.display().to_string()
}

pub(super) fn print(out: &mut dyn Write, json: bool, line: &Line) -> Result<()> {
    let printed = if json {
        serde_json::to_writer(&mut *out, line).map_err(io::Error::from).and_then(|()| writeln!(out))
    } else {
        writeln!(out, "{line}")
    };
    printed.map_err(Error::io("write to", Path::new("standard output")))
}

/// One line of the output.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Line {
    Segment {
        file: String,
        bytes: u64,
    },
    /// A record of the frame at the offset.
    Record {
        file: String,
        offset: u64,
        #[serde(flatten)]
        record: RecordLine,
    },
    Unfinished {
        file: String,
        offset: u64,
        bytes: u64,
        message: &'static str,
    },
    Snapshot {
        file: String,
        checksum: &'static str,
        index: Index,
        term: Term,
        bytes: u64,
        keys: u64,
        #[serde(serialize_with = "hex")]
        cluster_id: u64,
        voters: Vec<NodeId>,
        learners: Vec<NodeId>,
        members: BTreeMap<NodeId, String>,
        removed: BTreeMap<NodeId, Index>,
    },
    Key {
        key: String,
        key_bytes: usize,
        value_bytes: usize,
        index: Index,
        term: Term,
    },
    Note {
        file: String,
        message: &'static str,
    },
    Damage {
        message: String,
    },
    Summary {
        file: String,
        #[serde(flatten)]
        found: Found,
        /// False if a member would refuse to start.
        starts: bool,
    },
}

/// A record of a write-ahead log.
#[derive(Serialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub(super) enum RecordLine {
    Head {
        version: u32,
        segment: u64,
        previous_bytes: u64,
        last_index: Option<Index>,
    },
    Identity {
        #[serde(serialize_with = "hex")]
        cluster_id: u64,
        member_id: NodeId,
        #[serde(serialize_with = "hex")]
        incarnation: u64,
        #[serde(serialize_with = "hex")]
        first_urls_hash: u64,
    },
    Incarnation {
        member_id: NodeId,
        #[serde(serialize_with = "hex")]
        incarnation: u64,
    },
    Mark {
        index: Index,
        term: Term,
    },
    Install {
        index: Index,
        term: Term,
    },
    Entry {
        index: Index,
        term: Term,
        kind: &'static str,
        bytes: usize,
        request_id: Option<String>,
        #[serde(flatten)]
        content: Content,
    },
    HardState {
        term: Term,
        vote: NodeId,
        commit: Index,
    },
    Close,
}

/// The content of an entry.
#[derive(Serialize)]
#[serde(tag = "content", rename_all = "snake_case")]
pub(super) enum Content {
    /// Empty: the first entry of a leader.
    Nothing,
    Put {
        key: String,
        key_bytes: usize,
        value: String,
        value_bytes: usize,
    },
    /// Adds a learner.
    Add {
        id: NodeId,
        url: String,
    },
    AddVoter {
        id: NodeId,
        url: String,
    },
    Promote {
        id: NodeId,
    },
    Move {
        id: NodeId,
        url: String,
    },
    Remove {
        id: NodeId,
    },
    /// Every member skips it.
    Unknown {
        reason: String,
    },
}

impl Line {
    pub(super) fn key(pair: &KeyValue) -> Self {
        Self::Key {
            key: escaped(pair.key()),
            key_bytes: pair.key().len(),
            value_bytes: pair.value().len(),
            index: pair.index(),
            term: pair.term(),
        }
    }
}

impl From<Record> for RecordLine {
    fn from(record: Record) -> Self {
        match record {
            Record::Head(Head { version, segment, previous_bytes, last_index }) => {
                let last_index = (last_index > 0).then_some(last_index);
                Self::Head { version, segment, previous_bytes, last_index }
            }
            Record::Identity(identity) => Self::Identity {
                cluster_id: identity.cluster_id,
                member_id: identity.member_id,
                incarnation: identity.incarnation,
                first_urls_hash: identity.first_urls_hash,
            },
            Record::Incarnation { member_id, incarnation } => {
                Self::Incarnation { member_id, incarnation }
            }
            Record::Mark(SnapshotId { index, term }) => Self::Mark { index, term },
            Record::Install(SnapshotId { index, term }) => Self::Install { index, term },
            Record::Entry(entry) => Self::Entry {
                index: entry.index,
                term: entry.term,
                kind: match entry.entry_type {
                    EntryType::EntryNormal => "normal",
                    EntryType::EntryConfChange => "conf_change",
                    EntryType::EntryConfChangeV2 => "conf_change_v2",
                },
                bytes: entry.data.len(),
                request_id: RequestId::from_bytes(&entry.context)
                    .map(|id| format!("{}-{:016x}-{}", id.member, id.boot, id.counter)),
                content: content(&entry),
            },
            Record::HardState(hard_state) => Self::HardState {
                term: hard_state.term,
                vote: hard_state.vote,
                commit: hard_state.commit,
            },
            Record::Close => Self::Close,
        }
    }
}

fn content(entry: &Entry) -> Content {
    match entry.entry_type {
        EntryType::EntryNormal if entry.data.is_empty() => Content::Nothing,
        EntryType::EntryNormal => match Command::decode(&entry.data) {
            Ok(Command::Put { key, value }) => Content::Put {
                key: escaped(key),
                key_bytes: key.len(),
                value: escaped(value),
                value_bytes: value.len(),
            },
            Err(error) => Content::Unknown { reason: error.to_string() },
        },
        EntryType::EntryConfChange => match MemberChange::decode(&entry.data) {
            Ok((_, MemberChange::AddLearner { id, url })) => Content::Add { id, url },
            Ok((_, MemberChange::AddVoter { id, url })) => Content::AddVoter { id, url },
            Ok((_, MemberChange::Promote { id })) => Content::Promote { id },
            Ok((_, MemberChange::Move { id, url })) => Content::Move { id, url },
            Ok((_, MemberChange::Remove { id })) => Content::Remove { id },
            Err(reason) => Content::Unknown { reason },
        },
        EntryType::EntryConfChangeV2 => Content::Unknown {
            reason: "a joint membership change, which no member proposes".into(),
        },
    }
}

/// The first [`SHOWN_BYTES`] bytes, escaped as in a Rust string.
fn escaped(bytes: &[u8]) -> String {
    let more = if bytes.len() > SHOWN_BYTES { "…" } else { "" };
    format!("{}{more}", bytes[..bytes.len().min(SHOWN_BYTES)].escape_ascii())
}

pub(super) fn count<S: Serializer>(
    set: &BTreeSet<String>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_u64(set.len() as u64)
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn hex<S: Serializer>(number: &u64, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(&format!("{number:016x}"))
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment { file, bytes } => write!(f, "{file}: {bytes} bytes"),
            Self::Record { offset, record, .. } => write!(f, "{offset:>10}  {record}"),
            Self::Unfinished { offset, bytes, message, .. } => {
                write!(f, "{offset:>10}  {bytes} bytes of a frame: {message}")
            }
            Self::Snapshot {
                file,
                checksum,
                index,
                term,
                bytes,
                keys,
                cluster_id,
                voters,
                learners,
                members,
                removed,
            } => {
                writeln!(f, "{file}: {bytes} bytes, checksum {checksum}")?;
                writeln!(f, "            index {index}, term {term}, {keys} keys")?;
                write!(f, "            cluster {cluster_id:016x}, voters {voters:?}")?;
                if !learners.is_empty() {
                    write!(f, ", learners {learners:?}")?;
                }
                for (id, url) in members {
                    write!(f, "\n            member {id} at {url}")?;
                }
                for (id, index) in removed {
                    write!(f, "\n            member {id} was removed at index {index}")?;
                }
                Ok(())
            }
            Self::Key { key, value_bytes, index, term, .. } => {
                write!(f, "            {key}: {value_bytes} bytes, index {index}, term {term}")
            }
            Self::Note { file, message } => write!(f, "{file}: {message}"),
            Self::Damage { message } => write!(f, "DAMAGE: {message}"),
            Self::Summary { file, found, starts } => {
                let Found { segments, frames, entries, snapshots, term, commit, .. } = found;
                write!(f, "{file}: {segments} segments, {frames} frames, {entries} entries")?;
                if let (Some(first), Some(last)) = (found.first_index, found.last_index) {
                    write!(f, " ({first} to {last})")?;
                }
                write!(f, ", term {term}, commit {commit}, {snapshots} snapshots; ")?;
                if found.unfinished {
                    write!(f, "the last frame is incomplete; ")?;
                }
                match found.damage.len() {
                    0 => write!(f, "no damage"),
                    _ if *starts => write!(f, "damaged, repaired by the next start"),
                    _ => write!(f, "DAMAGED: a member would not start"),
                }
            }
        }
    }
}

impl fmt::Display for RecordLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Head { version, segment, previous_bytes, last_index } => {
                write!(f, "head: format version {version}, segment {segment:016x}")?;
                if let Some(last_index) = last_index {
                    write!(f, ", after index {last_index} and {previous_bytes} bytes")?;
                }
                Ok(())
            }
            Self::Identity { cluster_id, member_id, incarnation, .. } => write!(
                f,
                "identity: member {member_id} of cluster {cluster_id:016x}, incarnation {incarnation:016x}"
            ),
            Self::Incarnation { member_id, incarnation } => {
                write!(f, "incarnation: member {member_id} is {incarnation:016x}")
            }
            Self::Mark { index, term } => write!(f, "snapshot made: index {index}, term {term}"),
            Self::Install { index, term } => {
                write!(f, "snapshot received: index {index}, term {term}")
            }
            Self::Entry { index, term, bytes, request_id, content, .. } => {
                write!(f, "entry {index}, term {term}, {bytes} bytes: {content}")?;
                match request_id {
                    Some(id) => write!(f, ", request {id}"),
                    None => Ok(()),
                }
            }
            Self::HardState { term, vote, commit } => {
                write!(f, "hard state: term {term}, vote {vote}, commit {commit}")
            }
            Self::Close => write!(f, "close: another segment follows"),
        }
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => write!(f, "empty, the first of a leader"),
            Self::Put { key, value, value_bytes, .. } => {
                write!(f, "PUT \"{key}\" = \"{value}\" ({value_bytes} bytes)")
            }
            Self::Add { id, url } => write!(f, "add member {id} at {url} as a learner"),
            Self::AddVoter { id, url } => write!(f, "add member {id} at {url} as a voter"),
            Self::Promote { id } => write!(f, "promote member {id} to a voter"),
            Self::Move { id, url } => write!(f, "move member {id} to {url}"),
            Self::Remove { id } => write!(f, "remove member {id}"),
            Self::Unknown { reason } => write!(f, "unknown, skipped by every member: {reason}"),
        }
    }
}
