//! Looking into a member's files: `raftexample inspect`.
//!
//! Every record of the write-ahead log and every snapshot, read and checked by the same code that a
//! member starts with, in the order of the files. It changes nothing and takes no lock, so that a
//! member may use the directory meanwhile. Then the last frame may be half written, a segment may be
//! begun, and others may be removed while they are read: what looks like damage is read a second time,
//! and believed if it is still there.
//!
//! One segment of the log is in memory at a time, with the term of each entry. With `--json` each line
//! is one object: `"type"` says what of, and ids of clusters and directories, which are random bits,
//! are hexadecimal strings.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::ProgressBar;
use raft::eraftpb::{Entry, EntryType};
use serde::{Serialize, Serializer};

use crate::channels::{Index, NodeId, RequestId, Term};
use crate::codec;
use crate::error::{Error, OTHER_VERSION, REPLACE_MEMBER, Result};
use crate::kvstore::{KeyValue, decode_put, read_records};
use crate::membership::{MemberChange, SnapshotMembers};
use crate::raft_node::replay::{check_log, decode_members, is_replaceable, snap_dir, wal_dir};
use crate::storage::snapshotter::{self, Snapshot, load_file};
use crate::storage::wal::{self, Head, Record, Seen, SnapshotId, Survey};
use crate::storage::{ReadOnlyVfs, Vfs};

/// How many bytes of a key or value are shown.
const SHOWN_BYTES: usize = 64;
/// Less than this is read before a progress bar is seen.
const PROGRESS_BYTES: u64 = 16 << 20;
/// What changes under our eyes is read again so many times.
const ATTEMPTS_MAX: usize = 20;
/// A member that writes a frame has done so by then.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(20);

/// What to look at, and how to show it.
#[derive(Clone, Debug, Args)]
pub struct Inspect {
    /// A data directory, a directory raftexample-ID or raftexample-ID-snap, or a .wal or .snap file
    pub path: PathBuf,

    /// One JSON object a line
    #[arg(long)]
    pub json: bool,

    /// The keys of each snapshot as well
    #[arg(long)]
    pub keys: bool,
}

impl Inspect {
    /// Shows it on `out`.
    ///
    /// # Errors
    /// [`Error::Refused`] if a member would not start on it, or it is not a member's; [`Error::Io`].
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let bar = self.progress_bar();
        let watched = bar.clone();
        let vfs = ReadOnlyVfs::new(move |bytes| watched.inc(bytes));
        let mut inspector = Inspector { flags: self, vfs, out, found: Found::default() };
        let result = inspector.inspect(&self.path);
        bar.finish_and_clear();
        result
    }

    /// For much to read, if standard error is a terminal and the lines do not go to one.
    fn progress_bar(&self) -> ProgressBar {
        let bytes = if self.path.is_dir() { bytes_in(&self.path) } else { file_bytes(&self.path) };
        if bytes <= PROGRESS_BYTES || io::stdout().is_terminal() || !io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        ProgressBar::new(bytes)
    }
}

fn file_bytes(path: &Path) -> u64 {
    let length = path.metadata().map_or(0, |metadata| metadata.len());
    // A snapshot is read once for its checksum and once for its keys.
    if path.extension().is_some_and(|extension| extension == "snap") { 2 * length } else { length }
}

/// Of a data directory, those below it are counted too.
fn bytes_in(dir: &Path) -> u64 {
    let entries = || std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let files: u64 = entries().filter(|path| path.is_file()).map(|path| file_bytes(&path)).sum();
    let below = entries().filter(|path| path.is_dir() && member_of(path).is_some());
    files + below.map(|path| bytes_in(&path)).sum::<u64>()
}

/// The member whose directory this is by its name, and whether it is the one of its snapshots.
fn member_of(dir: &Path) -> Option<(NodeId, bool)> {
    let name = dir.file_name()?.to_str()?.strip_prefix("raftexample-")?;
    let (id, is_snap) = match name.strip_suffix("-snap") {
        Some(id) => (id, true),
        None => (name, false),
    };
    Some((id.parse().ok()?, is_snap))
}

/// What one member's files, or one of them, came to so far.
#[derive(Default)]
struct Found {
    segments: u64,
    frames: u64,
    snapshots: u64,
    /// Entries as they were read, those that others took the place of too.
    entries: u64,
    first_index: Option<Index>,
    last_index: Option<Index>,
    term: Term,
    commit: Index,
    unfinished: bool,
    /// What is damaged, a snapshot too that a member would do without.
    damage: BTreeSet<String>,
}

struct Inspector<'a> {
    flags: &'a Inspect,
    vfs: ReadOnlyVfs,
    out: &'a mut dyn Write,
    found: Found,
}

/// The snapshots of a directory, each with what it holds, or what is wrong with it.
type Snapshots = BTreeMap<(Term, Index), std::result::Result<SnapshotMembers, Error>>;

impl Inspector<'_> {
    fn inspect(&mut self, path: &Path) -> Result<()> {
        let metadata = path.metadata().map_err(Error::io("look into", path))?;
        if !metadata.is_dir() {
            let damage = self.file(path)?;
            return self.finish(path, damage);
        }
        let names = self.vfs.list(path).map_err(Error::io("list", path))?;
        let mut ids: Vec<NodeId> = names
            .iter()
            .map(|name| path.join(name))
            .filter(|below| below.is_dir())
            .filter_map(|below| Some(member_of(&below)?.0))
            .collect();
        ids.sort_unstable();
        ids.dedup();
        let ends = |suffix: &str| names.iter().any(|name| name.ends_with(suffix));
        let is_named = |snap: bool| member_of(path).is_some_and(|(_, is_snap)| is_snap == snap);
        if !ids.is_empty() {
            return self.members(path, &ids);
        }
        let damage = if ends(".wal") || is_named(false) {
            self.log(path, None).map(|(_, damage)| damage)?
        } else if ends(".snap") || is_named(true) {
            let snapshots = self.snapshots(path)?;
            snapshots.into_values().filter_map(|found| Some(found.err()?.to_string())).collect()
        } else {
            return Err(Error::Refused(format!(
                "{} holds no member's files: give a data directory, a directory raftexample-ID or raftexample-ID-snap, or a .wal or .snap file",
                path.display()
            )));
        };
        self.finish(path, damage)
    }

    /// One summary for each member; the first damage of all ends the program.
    fn members(&mut self, data_dir: &Path, ids: &[NodeId]) -> Result<()> {
        let mut result = Ok(());
        for &id in ids {
            self.found = Found::default();
            let damage = self.member(data_dir, id)?;
            let finished = self.finish(&wal_dir(data_dir, id), damage);
            match finished {
                Err(error @ Error::Io { .. }) => return Err(error),
                finished => result = result.and(finished),
            }
        }
        result
    }

    /// Log and snapshots of one member, and whether it would start on both together.
    fn member(&mut self, data_dir: &Path, id: NodeId) -> Result<Vec<String>> {
        let (wal_dir, snap_dir) = (wal_dir(data_dir, id), snap_dir(data_dir, id));
        let has_log = self
            .vfs
            .list(&wal_dir)
            .is_ok_and(|names| names.iter().any(|name| name.ends_with(".wal")));
        let log = if has_log { Some(self.log(&wal_dir, None)?) } else { None };
        let snapshots =
            if snap_dir.is_dir() { self.snapshots(&snap_dir)? } else { Snapshots::new() };
        match log {
            None if snapshots.is_empty() => Ok(Vec::new()),
            None => Ok(vec![format!(
                "{} holds no log, but there are snapshots: bring the log back; {REPLACE_MEMBER}",
                wal_dir.display()
            )]),
            Some((None, damage)) => Ok(damage),
            Some((Some(survey), mut damage)) => {
                if survey.identity.member_id != id {
                    damage.push(format!(
                        "{} belongs to member {}, not to {id}: give it back the name it had",
                        wal_dir.display(),
                        survey.identity.member_id
                    ));
                }
                let wrong = self.together(&survey, &wal_dir, &snap_dir, &snapshots)?;
                if wrong.is_some() && self.went_on(&survey, &wal_dir) {
                    self.note(&wal_dir, "it went on while it was read: look again to see log and snapshots as they are together")?;
                } else {
                    damage.extend(wrong);
                }
                Ok(damage)
            }
        }
    }

    /// True if a running member has named a snapshot since, and so may have removed others.
    fn went_on(&self, survey: &Survey, wal_dir: &Path) -> bool {
        let again = wal::survey(&self.vfs, wal_dir, None, &mut |_, _| Ok(()));
        again.is_ok_and(|again| again.marks != survey.marks)
    }

    /// What keeps a member from starting on this log with these snapshots, as it decides that itself.
    fn together(
        &mut self,
        survey: &Survey,
        wal_dir: &Path,
        snap_dir: &Path,
        snapshots: &Snapshots,
    ) -> Result<Option<String>> {
        let last_entry = (!survey.terms.is_empty())
            .then(|| survey.base.unwrap_or(0) + survey.terms.len() as u64);
        let found = |mark: SnapshotId| snapshots.get(&(mark.term, mark.index));
        for &(term, index) in snapshots.keys() {
            if !survey.marks.contains(&SnapshotId { index, term }) {
                let path = snapshotter::path(snap_dir, SnapshotId { index, term });
                self.note(&path, "the log does not name it: the next start removes it")?;
            }
        }
        let mut marks = survey.marks.clone();
        let newest = marks.pop();
        let mut used = newest;
        let damaged = match newest.map(|mark| (mark, found(mark))) {
            None | Some((_, Some(Ok(_)))) => None,
            Some((mark, Some(Err(error)))) => Some((mark, error.to_string())),
            Some((mark, None)) => {
                let path = snapshotter::path(snap_dir, mark);
                Some((mark, format!("{} is missing; {REPLACE_MEMBER}", path.display())))
            }
        };
        if let Some((newest, why)) = damaged {
            let older = marks.into_iter().rfind(|mark| found(*mark).is_some());
            let is_other_version =
                matches!(found(newest), Some(Err(Error::Corrupt { remedy: OTHER_VERSION, .. })));
            if is_other_version || !is_replaceable(newest, older, survey.base, last_entry) {
                return Ok(Some(why));
            }
            let path = snapshotter::path(snap_dir, newest);
            self.note(&path, "the next start sets it aside, and replays the log instead")?;
            if let Some(Err(error)) = older.and_then(found) {
                return Ok(Some(error.to_string()));
            }
            used = older;
        }
        if let Some(Ok(members)) = used.and_then(found)
            && members.cluster_id != survey.identity.cluster_id
        {
            let mark = used.expect("it was just found");
            let (path, meta) = (snapshotter::path(snap_dir, mark), codec::encode(members));
            let refused = decode_members(&path, &meta, &survey.identity);
            return Ok(refused.err().map(|error| error.to_string()));
        }
        let mark = used.unwrap_or(SnapshotId { index: 0, term: 0 });
        let base = survey.base.unwrap_or(mark.index);
        let term_at = |index: Index| survey.terms[(index - base - 1) as usize];
        let commit = survey.hard_state.commit;
        Ok(check_log(mark, base, last_entry, commit, term_at)
            .err()
            .map(|why| format!("{}: {why}; {REPLACE_MEMBER}", wal_dir.display())))
    }

    /// A single file, by its name a segment, else a snapshot or a copy of one.
    fn file(&mut self, path: &Path) -> Result<Vec<String>> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        match wal::parse_name(name) {
            Some(number) => {
                let dir = path.parent().unwrap_or(Path::new(""));
                Ok(self.log(dir, Some(number))?.1)
            }
            None => {
                let found = self.snapshot(path)?;
                Ok(found.and_then(Result::err).map(|error| error.to_string()).into_iter().collect())
            }
        }
    }

    /// Shows a log, or one segment of it. What is damaged twice in the same way is damaged.
    fn log(&mut self, dir: &Path, number: Option<u64>) -> Result<(Option<Survey>, Vec<String>)> {
        let mut shown: Option<(PathBuf, u64)> = None;
        let mut damage = None;
        for attempt in 0..ATTEMPTS_MAX {
            let Self { flags, out, found, vfs } = self;
            let mut output_failed = false;
            let mut watch = |path: &Path, seen: Seen<'_>| {
                let watched = show_seen(path, seen, &mut shown, found, &mut |line| {
                    print(*out, flags.json, line)
                });
                output_failed = watched.is_err();
                watched
            };
            match wal::survey(vfs, dir, number, &mut watch) {
                Ok(survey) => {
                    self.note_survey(&survey);
                    return Ok((Some(survey), Vec::new()));
                }
                Err(error) if output_failed => return Err(error),
                Err(error) => {
                    let again = Some(error.to_string());
                    if again == damage || attempt + 1 == ATTEMPTS_MAX {
                        break;
                    }
                    damage = again;
                }
            }
            std::thread::sleep(ATTEMPT_PAUSE);
        }
        Ok((None, damage.into_iter().collect()))
    }

    /// Counts as it ended, not as it was written.
    fn note_survey(&mut self, survey: &Survey) {
        let found = &mut self.found;
        let (base, entries) = (survey.base.unwrap_or(0), survey.terms.len() as u64);
        found.entries = entries;
        found.first_index = (entries > 0).then_some(base + 1);
        found.last_index = (base + entries > 0).then_some(base + entries);
    }

    /// Shows all snapshots of a directory, and names what else is there.
    fn snapshots(&mut self, dir: &Path) -> Result<Snapshots> {
        let mut snapshots = Snapshots::new();
        for SnapshotId { index, term } in snapshotter::list(&self.vfs, dir)? {
            let path = snapshotter::path(dir, SnapshotId { index, term });
            if let Some(found) = self.snapshot(&path)? {
                snapshots.insert((term, index), found);
            }
        }
        for name in self.vfs.list(dir).map_err(Error::io("list", dir))? {
            let why = match Path::new(&name).extension().and_then(|extension| extension.to_str()) {
                Some("broken") => "a start found it damaged, and set it aside",
                Some("tmp") => "being written, or left by a crash: the next start removes it",
                _ => continue,
            };
            self.note(&dir.join(name), why)?;
        }
        Ok(snapshots)
    }

    /// Shows a snapshot; `None` if it was removed before it was opened.
    fn snapshot(
        &mut self,
        path: &Path,
    ) -> Result<Option<std::result::Result<SnapshotMembers, Error>>> {
        let loaded = load_file(&self.vfs, path).and_then(|snapshot| {
            let members = SnapshotMembers::decode(&snapshot.meta).map_err(|error| {
                let path = path.display();
                Error::Refused(format!(
                    "cannot read the members in {path}: {error}; {REPLACE_MEMBER}"
                ))
            })?;
            Ok((snapshot, members))
        });
        let (snapshot, members): (Snapshot, SnapshotMembers) = match loaded {
            Ok(loaded) => loaded,
            Err(Error::Io { ref source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            Err(error) => {
                self.damage(&error.to_string())?;
                return Ok(Some(Err(error)));
            }
        };
        self.found.snapshots += 1;
        let mut keys = 0;
        let read = read_records(snapshot.reader, |_| {
            keys += 1;
            Ok(())
        });
        self.print(&Line::Snapshot {
            file: shown(path),
            checksum: "right",
            index: snapshot.index,
            term: snapshot.term,
            bytes: snapshot.file.length,
            keys,
            cluster_id: members.cluster_id,
            voters: members.voters.clone(),
            learners: members.learners.clone(),
            members: members.members.urls.clone(),
            removed: members.members.removed.clone(),
        })?;
        if let Err(error) = read {
            let why =
                format!("cannot read the state in {}: {error}; {REPLACE_MEMBER}", path.display());
            self.damage(&why)?;
            return Ok(Some(Err(Error::Refused(why))));
        }
        if self.flags.keys {
            self.keys(path)?;
        }
        Ok(Some(Ok(members)))
    }

    fn keys(&mut self, path: &Path) -> Result<()> {
        let reader = load_file(&self.vfs, path)?.reader;
        let mut printed = Ok(());
        let read = read_records(reader, |pair| {
            printed = self.print(&Line::key(&pair));
            // The error itself is kept beside.
            if printed.is_ok() { Ok(()) } else { Err(io::ErrorKind::Other.into()) }
        });
        printed.and(read.map_err(Error::io("read", path)))
    }

    /// Ends with the summary, and with an error if there is damage.
    fn finish(&mut self, path: &Path, damage: Vec<String>) -> Result<()> {
        for message in &damage {
            self.damage(message)?;
        }
        let found = std::mem::take(&mut self.found);
        self.print(&Line::Summary {
            file: shown(path),
            segments: found.segments,
            frames: found.frames,
            snapshots: found.snapshots,
            entries: found.entries,
            first_index: found.first_index,
            last_index: found.last_index,
            term: found.term,
            commit: found.commit,
            unfinished: found.unfinished,
            damage: found.damage.len(),
            starts: damage.is_empty(),
        })?;
        match damage.into_iter().next() {
            Some(first) => Err(Error::Refused(first)),
            None => Ok(()),
        }
    }

    /// Once, however often it is come across.
    fn damage(&mut self, message: &str) -> Result<()> {
        if !self.found.damage.insert(message.to_owned()) {
            return Ok(());
        }
        self.print(&Line::Damage { message: message.to_owned() })
    }

    fn note(&mut self, path: &Path, message: &'static str) -> Result<()> {
        self.print(&Line::Note { file: shown(path), message })
    }

    fn print(&mut self, line: &Line) -> Result<()> {
        print(self.out, self.flags.json, line)
    }
}

/// Shows what was found in a log, unless it was in an earlier attempt.
fn show_seen(
    path: &Path,
    seen: Seen<'_>,
    shown_to: &mut Option<(PathBuf, u64)>,
    found: &mut Found,
    print: &mut dyn FnMut(&Line) -> Result<()>,
) -> Result<()> {
    let offset = match &seen {
        Seen::Segment { .. } => 0,
        // Behind the segment itself, which is at 0 as well.
        Seen::Frame { offset, .. } | Seen::Unfinished { offset, .. } => offset + 1,
    };
    let place = (path.to_owned(), offset);
    if shown_to.as_ref().is_some_and(|shown_to| *shown_to >= place) {
        return Ok(());
    }
    *shown_to = Some(place);
    let file = shown(path);
    match seen {
        Seen::Segment { bytes } => {
            found.segments += 1;
            print(&Line::Segment { file, bytes })
        }
        Seen::Frame { offset, records } => {
            found.frames += 1;
            for record in records {
                found.note(&record);
                let record = RecordLine::from(record);
                print(&Line::Record { file: file.clone(), offset, record })?;
            }
            Ok(())
        }
        Seen::Unfinished { offset, bytes } => {
            found.unfinished = true;
            let message = "a crash left this unfinished: the next start cuts it (or a member is writing it now)";
            print(&Line::Unfinished { file, offset, bytes, message })
        }
    }
}

impl Found {
    fn note(&mut self, record: &Record) {
        match record {
            Record::Entry(entry) => {
                self.entries += 1;
                self.first_index = self.first_index.or(Some(entry.index));
                self.last_index = Some(entry.index);
            }
            Record::Install(mark) => self.last_index = Some(mark.index),
            Record::HardState(hard_state) => {
                (self.term, self.commit) = (hard_state.term, hard_state.commit);
            }
            _ => {}
        }
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn print(out: &mut dyn Write, json: bool, line: &Line) -> Result<()> {
    let printed = if json {
        serde_json::to_writer(&mut *out, line).map_err(io::Error::from).and_then(|()| writeln!(out))
    } else {
        writeln!(out, "{line}")
    };
    printed.map_err(Error::io("write to", Path::new("standard output")))
}

/// What is shown: a line of text, or an object of JSON.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Line {
    Segment {
        file: String,
        bytes: u64,
    },
    /// One of those in the frame at the offset.
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
        segments: u64,
        frames: u64,
        snapshots: u64,
        entries: u64,
        first_index: Option<Index>,
        last_index: Option<Index>,
        term: Term,
        commit: Index,
        unfinished: bool,
        damage: usize,
        /// False if the damage keeps a member from starting.
        starts: bool,
    },
}

/// A record of a log.
#[derive(Serialize)]
#[serde(tag = "record", rename_all = "snake_case")]
enum RecordLine {
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

/// What an entry asks for.
#[derive(Serialize)]
#[serde(tag = "content", rename_all = "snake_case")]
enum Content {
    /// raft's own: the first of a leader.
    Nothing,
    Put {
        key: String,
        key_bytes: usize,
        value: String,
        value_bytes: usize,
    },
    /// A learner, at first.
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
    fn key(pair: &KeyValue) -> Self {
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
        EntryType::EntryNormal => match decode_put(&entry.data) {
            Ok((key, value)) => Content::Put {
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
        EntryType::EntryConfChangeV2 => {
            Content::Unknown { reason: "a joint change of members, which nobody proposes".into() }
        }
    }
}

/// The bytes as in a string of Rust, and no more than are shown of them.
fn escaped(bytes: &[u8]) -> String {
    let more = if bytes.len() > SHOWN_BYTES { "…" } else { "" };
    format!("{}{more}", bytes[..bytes.len().min(SHOWN_BYTES)].escape_ascii())
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's form.
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
            Self::Summary {
                file,
                segments,
                frames,
                snapshots,
                entries,
                first_index,
                last_index,
                term,
                commit,
                unfinished,
                damage,
                starts,
            } => {
                write!(f, "{file}: {segments} segments, {frames} frames, {entries} entries")?;
                if let (Some(first), Some(last)) = (first_index, last_index) {
                    write!(f, " ({first} to {last})")?;
                }
                write!(f, ", term {term}, commit {commit}, {snapshots} snapshots; ")?;
                if *unfinished {
                    write!(f, "the last frame is unfinished; ")?;
                }
                match damage {
                    0 => write!(f, "no damage"),
                    _ if *starts => write!(f, "damaged, and mended by the next start"),
                    _ => write!(f, "DAMAGED: a member would not start on it"),
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
                    write!(f, ", behind index {last_index} and {previous_bytes} bytes")?;
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
            Self::Nothing => write!(f, "nothing, a leader's first"),
            Self::Put { key, value, value_bytes, .. } => {
                write!(f, "PUT \"{key}\" = \"{value}\" ({value_bytes} bytes)")
            }
            Self::Add { id, url } => write!(f, "add member {id} at {url}, a learner"),
            Self::AddVoter { id, url } => write!(f, "add member {id} at {url}, a voter"),
            Self::Promote { id } => write!(f, "give member {id} a vote"),
            Self::Move { id, url } => write!(f, "move member {id} to {url}"),
            Self::Remove { id } => write!(f, "remove member {id}"),
            Self::Unknown { reason } => write!(f, "unknown, every member skips it: {reason}"),
        }
    }
}
