//! The output of `inspect`: a line of text, or an object of JSON, for each thing that it found.

use std::fmt;
use std::io::{self, Write};
use std::path::Path;

use raft::eraftpb::{Entry, EntryType};
use serde::Serialize;
use serde_json::Value;

use super::Found;
use crate::channels::{NodeId, RequestId};
use crate::codec;
use crate::error::{Result, output_failed};
use crate::kvstore::{Command, Condition, KeyValue, Operation, Requirement, Txn};
use crate::membership::{MemberChange, SnapshotMembers};
use crate::storage::snapshotter::Snapshot;
use crate::storage::wal::{Head, Record, SnapshotId, VERSION};

/// Bytes of a key or value that are shown.
const SHOWN_BYTES: usize = 64;

/// A value of a JSON field.
trait Json {
    fn write(&self, out: &mut dyn Write) -> io::Result<()>;
}

impl<T: Serialize> Json for T {
    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        Ok(serde_json::to_writer(out, self)?)
    }
}

/// Fields of a JSON object, in order.
type Fields<'a> = [(&'a str, &'a dyn Json)];

/// Writes the lines in one of the two forms.
pub(super) struct Lines<'a> {
    pub out: &'a mut dyn Write,
    pub json: bool,
}

impl Lines<'_> {
    pub fn segment(&mut self, path: &Path, bytes: u64) -> Result<()> {
        let file = shown(path);
        let fields: &Fields = &[("file", &file), ("bytes", &bytes)];
        self.write("segment", fields, format_args!("{file}: {bytes} bytes"))
    }

    /// A record of the frame at `offset`.
    pub fn record(&mut self, path: &Path, offset: u64, record: &Record) -> Result<()> {
        let file = shown(path);
        let mut write = |kind: &str, fields: &Fields, text: fmt::Arguments<'_>| {
            let place: &Fields = &[("file", &file), ("offset", &offset), ("record", &kind)];
            let fields = [place, fields].concat();
            self.write("record", &fields, format_args!("{offset:>10}  {text}"))
        };
        match record {
            Record::Head(Head { segment, previous_bytes, last_index, step_bytes }) => {
                let last_index = (*last_index > 0).then_some(last_index);
                let after = last_index
                    .map(|index| format!(", after index {index} and {previous_bytes} bytes"))
                    .unwrap_or_default();
                let fields: &Fields = &[
                    ("version", &VERSION),
                    ("segment", segment),
                    ("previous_bytes", previous_bytes),
                    ("last_index", &last_index),
                    ("step_bytes", step_bytes),
                ];
                let version = format_args!("head: format version {VERSION}");
                write("head", fields, format_args!("{version}, segment {segment:016x}{after}"))
            }
            Record::Identity(identity) => {
                let member_id = identity.member_id;
                let cluster_id = hex(identity.cluster_id);
                let incarnation = hex(identity.incarnation);
                let fields: &Fields = &[
                    ("cluster_id", &cluster_id),
                    ("member_id", &member_id),
                    ("incarnation", &incarnation),
                    ("first_urls_hash", &hex(identity.first_urls_hash)),
                ];
                let member = format_args!("identity: member {member_id} of cluster {cluster_id}");
                write("identity", fields, format_args!("{member}, incarnation {incarnation}"))
            }
            Record::Incarnation { member_id, incarnation } => {
                let incarnation = hex(*incarnation);
                let fields: &Fields = &[("member_id", member_id), ("incarnation", &incarnation)];
                let text = format_args!("incarnation: member {member_id} is {incarnation}");
                write("incarnation", fields, text)
            }
            Record::Quarantine(index) => {
                let text = format_args!("quarantine: lost acknowledged entries up to {index}");
                write("quarantine", &[("index", index)], text)
            }
            Record::Mark(SnapshotId { index, term }) => {
                let text = format_args!("snapshot made: index {index}, term {term}");
                write("mark", &[("index", index), ("term", term)], text)
            }
            Record::Install(SnapshotId { index, term }) => {
                let text = format_args!("snapshot received: index {index}, term {term}");
                write("install", &[("index", index), ("term", term)], text)
            }
            Record::Entry(entry) => {
                let (index, term, bytes) = (entry.index, entry.term, entry.data.len());
                let kind = match entry.entry_type {
                    EntryType::EntryNormal => "normal",
                    EntryType::EntryConfChange => "conf_change",
                    EntryType::EntryConfChangeV2 => "conf_change_v2",
                };
                let request_id = RequestId::from_bytes(&entry.context)
                    .map(|id| format!("{}-{:016x}-{}", id.member, id.boot, id.counter));
                let (content, content_text) = content(entry);
                let mut fields: Vec<(&str, &dyn Json)> = vec![
                    ("index", &index),
                    ("term", &term),
                    ("kind", &kind),
                    ("bytes", &bytes),
                    ("request_id", &request_id),
                ];
                fields.extend(content.iter().map(|(name, value)| (*name, value as &dyn Json)));
                let request = request_id.as_ref().map(|id| format!(", request {id}"));
                let request = request.unwrap_or_default();
                let entry = format_args!("entry {index}, term {term}, {bytes} bytes");
                write("entry", &fields, format_args!("{entry}: {content_text}{request}"))
            }
            Record::HardState(state) => {
                let (term, vote, commit) = (state.term, state.vote, state.commit);
                let fields: &Fields = &[("term", &term), ("vote", &vote), ("commit", &commit)];
                let text = format_args!("hard state: term {term}, vote {vote}, commit {commit}");
                write("hard_state", fields, text)
            }
            Record::Close => write("close", &[], format_args!("close: another segment follows")),
            Record::Padding => write("padding", &[], format_args!("padding")),
        }
    }

    pub fn unfinished(&mut self, path: &Path, offset: u64, bytes: u64) -> Result<()> {
        let message =
            "incomplete: left by a crash, and cut off by the next start (or being written now)";
        let file = shown(path);
        let fields: &Fields =
            &[("file", &file), ("offset", &offset), ("bytes", &bytes), ("message", &message)];
        let text = format_args!("{offset:>10}  {bytes} bytes of a frame: {message}");
        self.write("unfinished", fields, text)
    }

    pub fn snapshot(
        &mut self,
        path: &Path,
        snapshot: &Snapshot,
        keys: u64,
        members: &SnapshotMembers,
    ) -> Result<()> {
        let (file, checksum, cluster_id) = (shown(path), "right", hex(members.cluster_id));
        let Snapshot { index, term, .. } = snapshot;
        let (bytes, voters, learners) = (snapshot.file.length, &members.voters, &members.learners);
        let mut text = format!("{file}: {bytes} bytes, checksum {checksum}");
        text += &format!("\n            index {index}, term {term}, {keys} keys");
        text += &format!("\n            cluster {cluster_id}, voters {voters:?}");
        if !learners.is_empty() {
            text += &format!(", learners {learners:?}");
        }
        for (id, url) in &members.members.urls {
            text += &format!("\n            member {id} at {url}");
        }
        for (id, index) in &members.members.removed {
            text += &format!("\n            member {id} was removed at index {index}");
        }
        let fields: &Fields = &[
            ("file", &file),
            ("checksum", &checksum),
            ("index", index),
            ("term", term),
            ("bytes", &bytes),
            ("keys", &keys),
            ("cluster_id", &cluster_id),
            ("voters", voters),
            ("learners", learners),
            ("members", &members.members.urls),
            ("removed", &members.members.removed),
        ];
        self.write("snapshot", fields, format_args!("{text}"))
    }

    pub fn key(&mut self, pair: &KeyValue) -> Result<()> {
        let (key, value_bytes) = (escaped(pair.key()), pair.value().len());
        let (index, term) = (pair.index(), pair.term());
        let fields: &Fields = &[
            ("key", &key),
            ("key_bytes", &pair.key().len()),
            ("value_bytes", &value_bytes),
            ("index", &index),
            ("term", &term),
        ];
        let value = format_args!("{value_bytes} bytes, index {index}, term {term}");
        self.write("key", fields, format_args!("            {key}: {value}"))
    }

    pub fn note(&mut self, path: &Path, message: &str) -> Result<()> {
        let file = shown(path);
        let fields: &Fields = &[("file", &file), ("message", &message)];
        self.write("note", fields, format_args!("{file}: {message}"))
    }

    pub fn damage(&mut self, message: &str) -> Result<()> {
        self.write("damage", &[("message", &message)], format_args!("DAMAGE: {message}"))
    }

    /// `starts` is false if a member would refuse to start.
    pub fn summary(&mut self, path: &Path, found: &Found, starts: bool) -> Result<()> {
        let file = shown(path);
        let Found { segments, frames, snapshots, entries, term, commit, .. } = found;
        let Found { first_index, last_index, unfinished, damage, .. } = found;
        let mut text = format!("{file}: {segments} segments, {frames} frames, {entries} entries");
        if let (Some(first), Some(last)) = (first_index, last_index) {
            text += &format!(" ({first} to {last})");
        }
        text += &format!(", term {term}, commit {commit}, {snapshots} snapshots; ");
        if *unfinished {
            text += "the last frame is incomplete; ";
        }
        text += match damage.len() {
            0 => "no damage",
            _ if starts => "damaged, repaired by the next start",
            _ => "DAMAGED: a member would not start",
        };
        let fields: &Fields = &[
            ("file", &file),
            ("segments", segments),
            ("frames", frames),
            ("snapshots", snapshots),
            ("entries", entries),
            ("first_index", first_index),
            ("last_index", last_index),
            ("term", term),
            ("commit", commit),
            ("unfinished", unfinished),
            ("damage", &damage.len()),
            ("starts", &starts),
        ];
        self.write("summary", fields, format_args!("{text}"))
    }

    fn write(&mut self, kind: &str, fields: &Fields, text: fmt::Arguments<'_>) -> Result<()> {
        let written =
            if self.json { self.object(kind, fields) } else { writeln!(self.out, "{text}") };
        written.map_err(output_failed)
    }

    fn object(&mut self, kind: &str, fields: &Fields) -> io::Result<()> {
        write!(self.out, "{{\"type\":\"{kind}\"")?;
        for (name, value) in fields {
            write!(self.out, ",\"{name}\":")?;
            value.write(self.out)?;
        }
        writeln!(self.out, "}}")
    }
}

/// The content of an entry, as fields and as text.
fn content(entry: &Entry) -> (Vec<(&'static str, Value)>, String) {
    let unknown = |reason: String| {
        let text = format!("unknown, skipped by every member: {reason}");
        (vec![("content", "unknown".into()), ("reason", reason.into())], text)
    };
    let change = |kind: &str, id: NodeId, url: Option<String>, text: String| {
        let mut fields = vec![("content", kind.into()), ("id", id.into())];
        fields.extend(url.map(|url| ("url", url.into())));
        (fields, text)
    };
    match entry.entry_type {
        EntryType::EntryNormal if entry.data.is_empty() => {
            (vec![("content", "nothing".into())], "empty, the first of a leader".to_owned())
        }
        EntryType::EntryNormal => match codec::decode(&entry.data) {
            Ok(Command::Put { key, value }) => {
                let (key_bytes, value_bytes) = (key.len(), value.len());
                let (key, value) = (escaped(key), escaped(value));
                let text = format!("PUT \"{key}\" = \"{value}\" ({value_bytes} bytes)");
                let fields = vec![
                    ("content", "put".into()),
                    ("key", key.into()),
                    ("key_bytes", key_bytes.into()),
                    ("value", value.into()),
                    ("value_bytes", value_bytes.into()),
                ];
                (fields, text)
            }
            Ok(Command::Txn { retry, txn }) => {
                let token = retry.map(|retry| {
                    let token = retry.token;
                    format!("{:x}-{}", token.index, hex(token.random))
                });
                transaction(&txn, token)
            }
            Err(error) => unknown(error.to_string()),
        },
        EntryType::EntryConfChange => match MemberChange::decode(&entry.data) {
            Ok((_, MemberChange::AddLearner { id, url })) => {
                let text = format!("add member {id} at {url} as a learner");
                change("add", id, Some(url), text)
            }
            Ok((_, MemberChange::AddVoter { id, url, incarnation })) => {
                let text = format!("add member {id} at {url} as a voter, {}", hex(incarnation));
                change("add_voter", id, Some(url), text)
            }
            Ok((_, MemberChange::Promote { id, incarnation })) => {
                let text = format!("promote member {id} to a voter, {}", hex(incarnation));
                change("promote", id, None, text)
            }
            Ok((_, MemberChange::Move { id, url })) => {
                let text = format!("move member {id} to {url}");
                change("move", id, Some(url), text)
            }
            Ok((_, MemberChange::Remove { id })) => {
                change("remove", id, None, format!("remove member {id}"))
            }
            Err(reason) => unknown(reason),
        },
        EntryType::EntryConfChangeV2 => {
            unknown("a joint membership change, which no member proposes".to_owned())
        }
    }
}

/// A transaction, as fields and as text.
fn transaction(txn: &Txn<'_>, token: Option<String>) -> (Vec<(&'static str, Value)>, String) {
    let condition = |Condition { key, is }: &Condition<'_>| {
        let requirement = match is {
            Requirement::Absent => "is absent".to_owned(),
            Requirement::Exists => "exists".to_owned(),
            Requirement::WrittenAt(indexes) => format!("was written at {indexes:?}"),
            Requirement::NotWrittenAt(indexes) => format!("was not written at {indexes:?}"),
        };
        format!("\"{}\" {requirement}", escaped(key))
    };
    let operation = |operation: &Operation<'_>| {
        let key = escaped(operation.key());
        match operation {
            Operation::Put { value, .. } => {
                format!("PUT \"{key}\" = \"{}\" ({} bytes)", escaped(value), value.len())
            }
            Operation::Delete { .. } => format!("DELETE \"{key}\""),
            Operation::Get { .. } => format!("GET \"{key}\""),
        }
    };
    let conditions: Vec<_> = txn.conditions.iter().map(condition).collect();
    let then: Vec<_> = txn.then.iter().map(operation).collect();
    let otherwise: Vec<_> = txn.otherwise.iter().map(operation).collect();
    let mut text = String::new();
    if !conditions.is_empty() {
        text += &format!("IF {} THEN ", conditions.join(" AND "));
    }
    text += &then.join(", ");
    if !otherwise.is_empty() {
        text += &format!(" ELSE {}", otherwise.join(", "));
    }
    if let Some(token) = &token {
        text += &format!("; retry token {token}");
    }
    let fields = vec![
        ("content", "txn".into()),
        ("if", conditions.into()),
        ("then", then.into()),
        ("else", otherwise.into()),
        ("retry_token", token.into()),
    ];
    (fields, text)
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// The first [`SHOWN_BYTES`] bytes, escaped as in a Rust string.
fn escaped(bytes: &[u8]) -> String {
    let more = if bytes.len() > SHOWN_BYTES { "…" } else { "" };
    format!("{}{more}", bytes[..bytes.len().min(SHOWN_BYTES)].escape_ascii())
}

fn hex(number: u64) -> String {
    format!("{number:016x}")
}
