//! `raftexample inspect`: shows and checks the files of a member.
//!
//! It reads every record of the write-ahead log and every snapshot, in the order of the files, with the
//! code that a member starts with. It changes nothing and takes no lock, so a running member may use
//! the directory. That member may be writing the last frame or creating a segment, and may remove
//! files; so `inspect` reads a second time before it reports damage.
//!
//! One segment of the log is in memory at a time, with the index and term of each entry. With `--json` each line
//! is one object: `"type"` names its kind, and random ids (clusters, incarnations) are hexadecimal
//! strings.

mod lines;

use std::collections::BTreeSet;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::ProgressBar;

use self::lines::Lines;
use crate::channels::{Index, NodeId, Term};
use crate::error::{Error, REPLACE_MEMBER, Result};
use crate::kvstore::read_records;
use crate::membership::SnapshotMembers;
use crate::raft_node::replay::{
    check_cluster, check_log, is_replaceable, read_members, snap_dir, wal_dir,
};
use crate::storage::snapshotter::{self, load_file};
use crate::storage::wal::{self, Record, Recovered, Seen, SnapshotId};
use crate::storage::{ReadOnlyVfs, Vfs};

/// No progress bar for less than this.
const PROGRESS_BYTES: u64 = 16 << 20;
/// Attempts to read files that change meanwhile.
const ATTEMPTS_MAX: usize = 20;
/// The pause between two attempts: enough for a member to complete a frame.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(20);

/// `inspect`: what to read, and how to show it.
#[derive(Clone, Debug, Args)]
pub struct Inspect {
    /// Data directory, raftexample-ID or raftexample-ID-snap directory, or .wal or .snap file
    pub path: PathBuf,

    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,

    /// List the keys of each snapshot, too
    #[arg(long)]
    pub keys: bool,
}

impl Inspect {
    /// Writes what it finds to `out`.
    ///
    /// # Errors
    /// [`Error::Refused`] if a member would not start with these files, or if the path holds no files of a
    /// member; [`Error::Io`].
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let bar = self.progress_bar();
        let lines = Lines { out, json: self.json };
        let mut inspector =
            Inspector { lists_keys: self.keys, lines, bar, found: Found::default() };
        let result = inspector.inspect(&self.path);
        inspector.bar.finish_and_clear();
        result
    }

    /// Visible for large inputs, if standard error is a terminal and standard output is not.
    fn progress_bar(&self) -> ProgressBar {
        let bytes = if self.path.is_dir() { bytes_in(&self.path) } else { file_bytes(&self.path) };
        if bytes <= PROGRESS_BYTES || io::stdout().is_terminal() || !io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        ProgressBar::new(bytes)
    }
}

fn file_bytes(path: &Path) -> u64 {
    path.metadata().map_or(0, |metadata| metadata.len())
}

/// The bytes to read in a directory, with the member directories below it.
fn bytes_in(dir: &Path) -> u64 {
    let entries = || std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let files: u64 = entries().filter(|path| path.is_file()).map(|path| file_bytes(&path)).sum();
    let below = entries().filter(|path| path.is_dir() && member_of(path).is_some());
    files + below.map(|path| bytes_in(&path)).sum::<u64>()
}

/// The member that a directory's name stands for, and whether the directory is for snapshots.
fn member_of(dir: &Path) -> Option<(NodeId, bool)> {
    let name = dir.file_name()?.to_str()?.strip_prefix("raftexample-")?;
    let (id, is_snap) = match name.strip_suffix("-snap") {
        Some(id) => (id, true),
        None => (name, false),
    };
    Some((id.parse().ok()?, is_snap))
}

/// What was found so far in the files of one member.
#[derive(Default)]
struct Found {
    segments: u64,
    frames: u64,
    snapshots: u64,
    /// Entries read, with those that later entries replaced.
    entries: u64,
    first_index: Option<Index>,
    last_index: Option<Index>,
    term: Term,
    commit: Index,
    unfinished: bool,
    /// Damage, with that in snapshots that a member can do without.
    damage: BTreeSet<String>,
}

struct Inspector<'a> {
    lists_keys: bool,
    lines: Lines<'a>,
    /// How many bytes of the files are read.
    bar: ProgressBar,
    found: Found,
}

/// The snapshots of a directory, each with its members or its error, by term and then by index.
type Snapshots = Vec<(SnapshotId, Result<SnapshotMembers>)>;

impl Inspector<'_> {
    fn inspect(&mut self, path: &Path) -> Result<()> {
        let metadata = path.metadata().map_err(Error::io("look into", path))?;
        if !metadata.is_dir() {
            let damage = self.file(path)?;
            return self.finish(path, damage);
        }
        let names = ReadOnlyVfs.list(path).map_err(Error::io("list", path))?;
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
            snapshots.into_iter().filter_map(|(_, found)| Some(found.err()?.to_string())).collect()
        } else {
            return Err(Error::Refused(format!(
                "{} contains no files of a member: give a data directory, a directory raftexample-ID or raftexample-ID-snap, or a .wal or .snap file",
                path.display()
            )));
        };
        self.finish(path, damage)
    }

    /// Prints one summary for each member. Returns the first damage.
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

    /// Shows log and snapshots of one member. Returns what would keep it from starting.
    fn member(&mut self, data_dir: &Path, id: NodeId) -> Result<Vec<String>> {
        let (wal_dir, snap_dir) = (wal_dir(data_dir, id), snap_dir(data_dir, id));
        let has_log = wal::exists(&ReadOnlyVfs, &wal_dir).unwrap_or(false);
        let log = if has_log { Some(self.log(&wal_dir, None)?) } else { None };
        let snapshots =
            if snap_dir.is_dir() { self.snapshots(&snap_dir)? } else { Snapshots::new() };
        match log {
            None if snapshots.is_empty() => Ok(Vec::new()),
            None => Ok(vec![format!(
                "{} contains no log, but there are snapshots: put the log back; {REPLACE_MEMBER}",
                wal_dir.display()
            )]),
            Some((None, damage)) => Ok(damage),
            Some((Some(survey), mut damage)) => {
                if survey.identity.member_id != id {
                    damage.push(format!(
                        "{} belongs to member {}, not to {id}: rename it to its former name",
                        wal_dir.display(),
                        survey.identity.member_id
                    ));
                }
                let wrong = self.together(&survey, &wal_dir, &snap_dir, &snapshots)?;
                if wrong.is_some() && self.went_on(&survey, &wal_dir) {
                    let why = "the member changed it meanwhile: inspect again to check log and snapshots together";
                    self.lines.note(&wal_dir, why)?;
                } else {
                    damage.extend(wrong);
                }
                Ok(damage)
            }
        }
    }

    /// True if a running member has made a snapshot since, and so may have removed older ones.
    fn went_on(&self, survey: &Recovered, wal_dir: &Path) -> bool {
        let again = wal::survey(&ReadOnlyVfs, wal_dir, None, &mut |_, _| Ok(()));
        again.is_ok_and(|again| again.marks != survey.marks)
    }

    /// What keeps a member from starting with this log and these snapshots, by the rules of
    /// [`replay`](crate::raft_node::replay).
    fn together(
        &mut self,
        survey: &Recovered,
        wal_dir: &Path,
        snap_dir: &Path,
        snapshots: &Snapshots,
    ) -> Result<Option<String>> {
        let found = |mark| snapshots.iter().find(|(id, _)| *id == mark).map(|(_, found)| found);
        for (id, _) in snapshots.iter().filter(|(id, _)| !survey.marks.contains(id)) {
            let path = snapshotter::path(snap_dir, *id);
            self.lines.note(&path, "not named in the log: the next start removes it")?;
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
            let is_other_version = matches!(found(newest), Some(Err(Error::OtherVersion { .. })));
            if is_other_version || !is_replaceable(newest, older, survey) {
                return Ok(Some(why));
            }
            let path = snapshotter::path(snap_dir, newest);
            self.lines.note(&path, "the next start sets it aside and replays the log instead")?;
            if let Some(Err(error)) = older.and_then(found) {
                return Ok(Some(error.to_string()));
            }
            used = older;
        }
        let mark = used.unwrap_or(SnapshotId { index: 0, term: 0 });
        if let Some(Ok(members)) = used.and_then(found) {
            let path = snapshotter::path(snap_dir, mark);
            if let Err(refused) = check_cluster(&path, members, &survey.identity) {
                return Ok(Some(refused.to_string()));
            }
        }
        let fits = check_log(survey, mark);
        Ok(fits.err().map(|why| format!("{}: {why}; {REPLACE_MEMBER}", wal_dir.display())))
    }

    /// Shows one file: a segment by its name, otherwise a snapshot.
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

    /// Shows a log, or one segment of it. Damage counts if a second attempt finds the same.
    fn log(&mut self, dir: &Path, number: Option<u64>) -> Result<(Option<Recovered>, Vec<String>)> {
        let mut shown: Option<(PathBuf, u64)> = None;
        let mut damage = None;
        for attempt in 0..ATTEMPTS_MAX {
            let mut output_failed = false;
            let mut watch = |path: &Path, seen: Seen<'_>| {
                let watched = self.show_seen(path, seen, &mut shown);
                output_failed = watched.is_err();
                watched
            };
            match wal::survey(&ReadOnlyVfs, dir, number, &mut watch) {
                Ok(survey) => {
                    // Instead of the counts of the records.
                    let found = &mut self.found;
                    found.entries = survey.entries.len() as u64;
                    found.first_index = survey.entries.first().map(|entry| entry.index);
                    found.last_index = Some(survey.last_index()).filter(|&last| last > 0);
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

    /// Shows what was found in a log, unless an earlier attempt has shown it.
    fn show_seen(
        &mut self,
        path: &Path,
        seen: Seen<'_>,
        shown_to: &mut Option<(PathBuf, u64)>,
    ) -> Result<()> {
        let offset = match &seen {
            Seen::Segment { .. } => 0,
            // After the segment itself, which is at 0, too.
            Seen::Frame { offset, .. } | Seen::Unfinished { offset, .. } => offset + 1,
        };
        let place = (path.to_owned(), offset);
        if shown_to.as_ref().is_some_and(|shown_to| *shown_to >= place) {
            return Ok(());
        }
        *shown_to = Some(place);
        match seen {
            Seen::Segment { bytes } => {
                self.found.segments += 1;
                self.bar.inc(bytes);
                self.lines.segment(path, bytes)
            }
            Seen::Frame { offset, records } => {
                self.found.frames += 1;
                for record in records {
                    self.found.note(&record);
                    self.lines.record(path, offset, &record)?;
                }
                Ok(())
            }
            Seen::Unfinished { offset, bytes } => {
                self.found.unfinished = true;
                self.lines.unfinished(path, offset, bytes)
            }
        }
    }

    /// Shows all snapshots of a directory, and lists its other files.
    fn snapshots(&mut self, dir: &Path) -> Result<Snapshots> {
        let mut snapshots = Snapshots::new();
        for id in snapshotter::list(&ReadOnlyVfs, dir)? {
            if let Some(found) = self.snapshot(&snapshotter::path(dir, id))? {
                snapshots.push((id, found));
            }
        }
        for name in ReadOnlyVfs.list(dir).map_err(Error::io("list", dir))? {
            let why = match Path::new(&name).extension().and_then(|extension| extension.to_str()) {
                Some("broken") => "damaged, set aside by a start",
                Some("tmp") => "being written, or left by a crash; the next start removes it",
                _ => continue,
            };
            self.lines.note(&dir.join(name), why)?;
        }
        Ok(snapshots)
    }

    /// Shows a snapshot; `None` if it was removed before it was opened.
    fn snapshot(&mut self, path: &Path) -> Result<Option<Result<SnapshotMembers>>> {
        let loaded = load_file(&ReadOnlyVfs, path).and_then(|snapshot| {
            let members = read_members(path, &snapshot.meta)?;
            Ok((snapshot, members))
        });
        let (mut snapshot, members) = match loaded {
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
        let read = read_records(&mut snapshot.reader).try_for_each(|record| {
            keys += u64::from(record.is_ok());
            record.map(|_| ())
        });
        self.bar.inc(snapshot.file.length);
        self.lines.snapshot(path, &snapshot, keys, &members)?;
        if let Err(error) = read {
            let why =
                format!("cannot read the state in {}: {error}; {REPLACE_MEMBER}", path.display());
            self.damage(&why)?;
            return Ok(Some(Err(Error::Refused(why))));
        }
        if self.lists_keys {
            self.keys(path)?;
        }
        Ok(Some(Ok(members)))
    }

    fn keys(&mut self, path: &Path) -> Result<()> {
        for record in read_records(load_file(&ReadOnlyVfs, path)?.reader) {
            self.lines.key(&record.map_err(Error::io("read", path))?)?;
        }
        Ok(())
    }

    /// Prints the summary. Returns the first damage as the error.
    fn finish(&mut self, path: &Path, damage: Vec<String>) -> Result<()> {
        for message in &damage {
            self.damage(message)?;
        }
        self.lines.summary(path, &self.found, damage.is_empty())?;
        match damage.into_iter().next() {
            Some(first) => Err(Error::Refused(first)),
            None => Ok(()),
        }
    }

    /// Prints each message once.
    fn damage(&mut self, message: &str) -> Result<()> {
        if !self.found.damage.insert(message.to_owned()) {
            return Ok(());
        }
        self.lines.damage(message)
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
