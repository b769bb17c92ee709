//! `raftexample inspect`: shows and checks the files of a member.
//!
//! It reads every record of the log and every snapshot with the code that a member starts with. It
//! changes nothing and takes no lock. A running member may be writing the last frame, creating a
//! segment, or removing files; so `inspect` reads a second time before it reports damage.
//!
//! One segment of the log is in memory at a time, with the index and term of each entry. With `--json`
//! each line is one object: `"type"` names its kind, and random ids are hexadecimal strings.

mod lines;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use self::lines::Lines;
use crate::channels::{Index, NodeId, Term};
use crate::error::{Error, REPLACE_MEMBER, Result};
use crate::kvstore::read_state;
use crate::membership::SnapshotMembers;
use crate::raft_node::replay::{
    check_cluster, check_log, is_replaceable, read_members, snap_dir, wal_dir,
};
use crate::storage::snapshotter::{self, load_file};
use crate::storage::wal::{self, Record, Recovered, Seen, SnapshotId};
use crate::storage::{ReadOnlyVfs, Vfs};

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
    /// Writes what it finds to `out`. It fails if a member would not start with these files.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let lines = Lines { out, json: self.json };
        let mut inspector = Inspector { lists_keys: self.keys, lines, found: Found::default() };
        inspector.inspect(&self.path)
    }
}

/// The member that a directory's name stands for, and whether the directory is for snapshots.
fn member_of(dir: &Path) -> Option<(NodeId, bool)> {
    let name = dir.file_name()?.to_str()?.strip_prefix("raftexample-")?;
    let of_snapshots = name.strip_suffix("-snap");
    Some((of_snapshots.unwrap_or(name).parse().ok()?, of_snapshots.is_some()))
}

/// True if a file begins as snapshots do.
fn begins_as_snapshot(path: &Path) -> Result<bool> {
    let read = File::open(path).and_then(|mut file| {
        let mut head = [0; snapshotter::MAGIC.len()];
        file.read_exact(&mut head).map(|()| head == snapshotter::MAGIC)
    });
    match read {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        read => read.map_err(Error::io("read", path)),
    }
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
    found: Found,
}

/// The snapshots of a directory, each with its members or its error, by term and then by index.
type Snapshots = Vec<(SnapshotId, Result<SnapshotMembers>)>;

impl Inspector<'_> {
    fn inspect(&mut self, path: &Path) -> Result<()> {
        let metadata = path.metadata().map_err(Error::io("look into", path))?;
        if !metadata.is_dir() {
            let damage = self.file(path)?;
            return self.finish(path, damage.into_iter().collect());
        }
        let names = ReadOnlyVfs.list(path).map_err(Error::io("list", path))?;
        let below = names.iter().map(|name| path.join(name)).filter(|below| below.is_dir());
        let ids: BTreeSet<_> = below.filter_map(|below| Some(member_of(&below)?.0)).collect();
        let ends = |suffix: &str| names.iter().any(|name| name.ends_with(suffix));
        let is_named = |snap: bool| member_of(path).is_some_and(|(_, is_snap)| is_snap == snap);
        if !ids.is_empty() {
            return self.members(path, ids);
        }
        let damage = if ends(".wal") || is_named(false) {
            self.log(path, None)?.err().into_iter().collect()
        } else if ends(".snap") || is_named(true) {
            self.snapshots(path)?.into_iter().filter_map(|(_, found)| found.err()).collect()
        } else {
            return Err(Error::Refused(format!(
                "{} contains no files of a member: give a data directory, a directory raftexample-ID or raftexample-ID-snap, or a .wal or .snap file",
                path.display()
            )));
        };
        self.finish(path, damage)
    }

    /// Prints one summary for each member. Returns the first damage.
    fn members(&mut self, data_dir: &Path, ids: BTreeSet<NodeId>) -> Result<()> {
        let mut result = Ok(());
        for id in ids {
            self.found = Found::default();
            let damage = self.member(data_dir, id)?;
            match self.finish(&wal_dir(data_dir, id), damage) {
                Err(error @ Error::Io { .. }) => return Err(error),
                finished => result = result.and(finished),
            }
        }
        result
    }

    /// Shows log and snapshots of one member. Returns what would keep it from starting.
    fn member(&mut self, data_dir: &Path, id: NodeId) -> Result<Vec<Error>> {
        let (wal_dir, snap_dir) = (wal_dir(data_dir, id), snap_dir(data_dir, id));
        let has_log = wal::exists(&ReadOnlyVfs, &wal_dir).unwrap_or(false);
        let log = if has_log { Some(self.log(&wal_dir, None)?) } else { None };
        let snapshots =
            if snap_dir.is_dir() { self.snapshots(&snap_dir)? } else { Snapshots::new() };
        match log {
            None if snapshots.is_empty() => Ok(Vec::new()),
            None => Ok(vec![Error::Refused(format!(
                "{} contains no log, but there are snapshots: put the log back; {REPLACE_MEMBER}",
                wal_dir.display()
            ))]),
            Some(Err(error)) => Ok(vec![error]),
            Some(Ok(survey)) => {
                let mut damage = Vec::new();
                if survey.identity.member_id != id {
                    damage.push(Error::Refused(format!(
                        "{} belongs to member {}, not to {id}: rename it to its former name",
                        wal_dir.display(),
                        survey.identity.member_id
                    )));
                }
                let wrong = self.together(&survey, &wal_dir, &snap_dir, &snapshots)?;
                if wrong.is_some() && self.went_on(&survey, &wal_dir) {
                    let why = "the member changed it meanwhile: inspect again to check log and snapshots together";
                    self.lines.note(&wal_dir, why)?;
                } else {
                    damage.extend(wrong.map(Error::Refused));
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
        let mut used = marks.pop();
        if let Some(newest) = used
            && !matches!(found(newest), Some(Ok(_)))
        {
            let path = snapshotter::path(snap_dir, newest);
            let older = marks.into_iter().rfind(|mark| found(*mark).is_some());
            let is_other_version = matches!(found(newest), Some(Err(Error::OtherVersion { .. })));
            if is_other_version || !is_replaceable(newest, older, survey) {
                return Ok(Some(match found(newest) {
                    Some(Err(error)) => error.to_string(),
                    _ => format!("{} is missing; {REPLACE_MEMBER}", path.display()),
                }));
            }
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

    /// Shows one file: a segment by its name, otherwise a snapshot. Returns its damage.
    fn file(&mut self, path: &Path) -> Result<Option<Error>> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        Ok(match wal::parse_name(name) {
            Some(number) => self.log(path.parent().unwrap_or(Path::new("")), Some(number))?.err(),
            None if name.ends_with(".snap") || begins_as_snapshot(path)? => {
                self.snapshot(path)?.and_then(Result::err)
            }
            None => {
                return Err(Error::Refused(format!(
                    "{} is neither a log segment (its name would be 16 digits and .wal) nor a snapshot, or its first bytes are damaged: give a file or a directory of a member, or a backup",
                    path.display()
                )));
            }
        })
    }

    /// Shows a log, or one segment of it. Returns the damage inside, if a second attempt finds the same.
    fn log(&mut self, dir: &Path, number: Option<u64>) -> Result<Result<Recovered>> {
        let mut shown: Option<(PathBuf, u64)> = None;
        let mut damage = String::new();
        let mut attempts = 0;
        loop {
            attempts += 1;
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
                    return Ok(Ok(survey));
                }
                Err(error) if output_failed => return Err(error),
                Err(error) if error.to_string() == damage || attempts == ATTEMPTS_MAX => {
                    return Ok(Err(error));
                }
                Err(error) => damage = error.to_string(),
            }
            std::thread::sleep(ATTEMPT_PAUSE);
        }
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

    /// Shows a snapshot, and returns its members; `None` if it was removed before it was opened.
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
        let read = read_state(&mut snapshot.reader)
            .and_then(|(_, mut records)| records.try_for_each(|record| record.map(|_| keys += 1)));
        self.lines.snapshot(path, &snapshot, keys, &members)?;
        if let Err(error) = read {
            let path = path.display();
            let error = Error::Refused(format!(
                "cannot read the state in {path}: {error}; {REPLACE_MEMBER}"
            ));
            self.damage(&error.to_string())?;
            return Ok(Some(Err(error)));
        }
        if self.lists_keys {
            self.keys(path)?;
        }
        Ok(Some(Ok(members)))
    }

    fn keys(&mut self, path: &Path) -> Result<()> {
        let (_, records) =
            read_state(load_file(&ReadOnlyVfs, path)?.reader).map_err(Error::io("read", path))?;
        for record in records {
            self.lines.key(&record.map_err(Error::io("read", path))?)?;
        }
        Ok(())
    }

    /// Prints the summary. Returns the first damage as the error.
    fn finish(&mut self, path: &Path, damage: Vec<Error>) -> Result<()> {
        for error in &damage {
            self.damage(&error.to_string())?;
        }
        self.lines.summary(path, &self.found, damage.is_empty())?;
        // The caller takes an `Error::Io` for a failed output.
        damage.first().map_or(Ok(()), |first| Err(Error::Refused(first.to_string())))
    }

    /// Prints each message once.
    fn damage(&mut self, message: &str) -> Result<()> {
        let is_new = self.found.damage.insert(message.to_owned());
        if is_new { self.lines.damage(message) } else { Ok(()) }
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
