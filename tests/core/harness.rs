//! A node's three seams in memory: files ([`MemVfs`]), messages ([`Network`]) and time (ticks).
//!
//! All of them write into one [`Transcript`], in the order in which things happen, so that a test
//! can say what came before what.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::future::Future;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, LazyLock, Mutex, RwLock};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use raft::eraftpb::{Entry, Message, MessageType};
use raftexample::channels::{
    Ack, Acknowledged, Commit, ConfChangeRequest, Greeting, MemberRequest, NodeId, PeerHeader,
    PeerReport, Pending, Proposal, ReadRequest, Refusal, Responder, SnapshotFile, SnapshotRequest,
    responder,
};
use raftexample::codec;
use raftexample::error::{Error, RequestError, Result};
use raftexample::kvstore::{CommitReader, KvStore};
use raftexample::membership::PeerGate;
use raftexample::raft_node::replay::{replay_wal, wal_dir};
use raftexample::raft_node::{Input, NodeConfig, Outbox, RaftNode, Status};
use raftexample::storage::snapshotter::{Received, Snapshotter};
use raftexample::storage::wal::{Recovered, SEGMENT_BYTES, Wal};
use raftexample::storage::{Vfs, VfsFile};
use raftexample::transport::{Inbound, InboundBody};
use serde::{Deserialize, Serialize};
use slog::{Drain, Level, Logger, OwnedKVList, Record, o};
use tokio::sync::{mpsc, oneshot, watch};

/// Where every member's directories are.
pub const DATA: &str = "/data";
/// What a disk writes wholly or not at all.
const SECTOR: usize = 512;
/// A member that needs more rounds than this to come to rest never will.
const ROUNDS_MAX: usize = 10_000;

// ---------------------------------------------------------------------------------------------
// The transcript

/// What happened, in order; clones share it.
#[derive(Clone, Default)]
pub struct Transcript {
    lines: Arc<Mutex<Vec<String>>>,
    /// What the members have put on commitC, taken off before each line is written: so each item is
    /// written down in its place.
    taps: Arc<Mutex<BTreeMap<NodeId, Arc<Mutex<CommitTap>>>>>,
}

struct CommitTap {
    rx: mpsc::UnboundedReceiver<Commit>,
    queue: VecDeque<Commit>,
}

impl Transcript {
    pub fn note(&self, id: NodeId, line: &str) {
        self.note_commits(id);
        self.lines.lock().unwrap().push(format!("{id} {line}"));
    }

    fn note_commits(&self, id: NodeId) {
        let Some(tap) = self.taps.lock().unwrap().get(&id).cloned() else { return };
        let mut tap = tap.lock().unwrap();
        while let Ok(commit) = tap.rx.try_recv() {
            let line = match &commit {
                Commit::Entries { entries, .. } => {
                    let indexes: Vec<_> = entries.iter().map(|entry| entry.index).collect();
                    format!("{id} commit entries {indexes:?}")
                }
                Commit::Reads(responders) => format!("{id} commit {} reads", responders.len()),
                Commit::Restore(restore) => format!("{id} commit restore {}", restore.index),
                Commit::Snapshot(request) => format!("{id} commit snapshot {}", request.index),
                Commit::Replayed => format!("{id} commit replayed"),
            };
            self.lines.lock().unwrap().push(line);
            tap.queue.push_back(commit);
        }
    }

    pub fn clear(&self) {
        self.lines.lock().unwrap().clear();
    }

    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// The lines of member `id`.
    pub fn of(&self, id: NodeId) -> Vec<String> {
        let prefix = format!("{id} ");
        self.lines().into_iter().filter(|line| line.starts_with(&prefix)).collect()
    }
}

/// Writes the node's own lines into the transcript, and keeps the rest apart.
struct TranscriptDrain {
    id: NodeId,
    transcript: Transcript,
    logs: Arc<Mutex<Vec<String>>>,
}

impl Drain for TranscriptDrain {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &Record<'_>, _: &OwnedKVList) -> std::result::Result<(), slog::Never> {
        if !record.module().starts_with("raftexample") || record.level() == Level::Trace {
            return Ok(());
        }
        let line = record.msg().to_string();
        if record.module().starts_with("raftexample::raft_node")
            && (line.contains("snapshot at index") || line.starts_with("compacted log"))
        {
            self.transcript.note(self.id, &format!("log {line}"));
        }
        self.logs.lock().unwrap().push(line);
        Ok(())
    }
}

// ---------------------------------------------------------------------------------------------
// The disk

/// What of the unsynced data is still there after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survives {
    /// Power cut: nothing that was not synced.
    Nothing,
    /// The process died and the machine did not: everything, though it is still not synced.
    Everything,
    /// Power cut: some sectors, some zeroed, some directory operations; by this seed.
    Some(u64),
}

/// What happens at one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The process dies: this operation is the last, and returns no success.
    Crash,
    /// It fails, and so does no later one. A sync that fails takes what it was to write for written:
    /// it stays readable until the power goes, and no later sync writes it.
    Fails(io::ErrorKind),
    /// As `Fails`, but first it takes effect as far as it can: of a write, this many bytes.
    FailsAfter(io::ErrorKind, usize),
}

#[derive(Clone, Default)]
struct Inode {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// The sectors that count as written and are not, by a sync that failed.
    given_up: BTreeSet<usize>,
}

impl Inode {
    fn write(&mut self, bytes: &[u8], offset: usize) {
        let end = offset + bytes.len();
        self.live.resize(self.live.len().max(end), 0);
        self.live[offset..end].copy_from_slice(bytes);
        self.given_up.retain(|sector| (sector + 1) * SECTOR <= offset || end <= sector * SECTOR);
    }

    fn sync(&mut self) {
        let mut synced = self.live.clone();
        for sector in &self.given_up {
            copy_sector(&mut synced, *sector, &self.durable);
        }
        self.durable = synced;
    }

    fn give_up(&mut self) {
        let mut durable = self.durable.clone();
        durable.resize(self.live.len(), 0);
        let sectors = self.live.chunks(SECTOR).zip(durable.chunks(SECTOR)).enumerate();
        let dirty = sectors.filter(|(_, (live, durable))| live != durable);
        self.given_up.extend(dirty.map(|(sector, _)| sector));
    }

    /// Takes `bytes` for what the file holds, on disk too.
    fn settle(&mut self, bytes: Vec<u8>) {
        *self = Self { live: bytes.clone(), durable: bytes, given_up: BTreeSet::new() };
    }
}

/// Makes a sector of `bytes` what it is in `source`: zeros behind its end.
fn copy_sector(bytes: &mut [u8], sector: usize, source: &[u8]) {
    for at in sector * SECTOR..((sector + 1) * SECTOR).min(bytes.len()) {
        bytes[at] = source.get(at).copied().unwrap_or(0);
    }
}

#[derive(Clone)]
enum DirOperation {
    Link { path: PathBuf, inode: usize },
    Rename { from: PathBuf, to: PathBuf },
    Unlink { path: PathBuf },
    MakeDir { path: PathBuf },
}

impl DirOperation {
    fn path(&self) -> &Path {
        match self {
            Self::Link { path, .. } | Self::Unlink { path } | Self::MakeDir { path } => path,
            Self::Rename { to, .. } => to,
        }
    }
}

#[derive(Clone, Default)]
struct Tree {
    names: BTreeMap<PathBuf, usize>,
    dirs: BTreeSet<PathBuf>,
}

impl Tree {
    fn apply(&mut self, operation: &DirOperation) {
        match operation {
            DirOperation::Link { path, inode } => {
                self.names.insert(path.clone(), *inode);
            }
            DirOperation::Rename { from, to } => {
                if let Some(inode) = self.names.remove(from) {
                    self.names.insert(to.clone(), inode);
                }
            }
            DirOperation::Unlink { path } => {
                self.names.remove(path);
            }
            DirOperation::MakeDir { path } => {
                self.dirs.insert(path.clone());
            }
        }
    }
}

#[derive(Default)]
struct Disk {
    inodes: Vec<Inode>,
    live: Tree,
    durable: Tree,
    /// Not synced, in the order they were made.
    pending: Vec<DirOperation>,
    /// Counted as synced by a sync that failed, until something else changes in their directory,
    /// which is written as a whole.
    given_up: Vec<DirOperation>,
    /// The disk before each operation, if that is recorded.
    states: Option<Vec<Disk>>,
    locks: BTreeSet<PathBuf>,
    generation: u64,
    operations: u64,
    fault: Option<(u64, Fault)>,
    /// How many bytes of the write under way arrive, if not all.
    part: Option<usize>,
    /// True once the process died.
    dead: bool,
    transcript: Option<(NodeId, Transcript)>,
}

/// A file system in memory that knows what was synced.
///
/// Each run of a process has its own handle, so that what an earlier run left open has no effect.
#[derive(Clone)]
pub struct MemVfs {
    disk: Arc<Mutex<Disk>>,
    generation: u64,
}

fn short(path: &Path) -> String {
    path.strip_prefix(DATA).unwrap_or(path).display().to_string()
}

fn not_found(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, short(path))
}

impl Disk {
    /// Counts one operation and decides what becomes of it: whether it takes effect, and what it
    /// returns.
    fn operate(&mut self, generation: u64, line: &str) -> (bool, io::Result<()>) {
        let dead = || Err(io::Error::other("the process is dead"));
        if self.dead || generation != self.generation {
            return (false, dead());
        }
        if let Some(mut states) = self.states.take() {
            states.push(self.copy());
            self.states = Some(states);
        }
        self.operations += 1;
        let fault = self.fault.filter(|(at, _)| *at == self.operations).map(|(_, fault)| fault);
        if let Some((id, transcript)) = &self.transcript {
            let mark = if fault.is_some() { "FAULT " } else { "" };
            transcript.note(*id, &format!("{mark}{line}"));
        }
        match fault {
            None => (true, Ok(())),
            Some(Fault::Crash) => {
                self.dead = true;
                (true, dead())
            }
            Some(Fault::Fails(kind)) => (false, Err(kind.into())),
            Some(Fault::FailsAfter(kind, bytes)) => {
                self.part = Some(bytes);
                (true, Err(kind.into()))
            }
        }
    }

    /// What is on the disk, synced or not.
    fn copy(&self) -> Self {
        Self {
            inodes: self.inodes.clone(),
            live: self.live.clone(),
            durable: self.durable.clone(),
            pending: self.pending.clone(),
            given_up: self.given_up.clone(),
            ..Self::default()
        }
    }

    fn change(&mut self, generation: u64, line: &str, operation: DirOperation) -> io::Result<()> {
        let (takes_effect, result) = self.operate(generation, line);
        if takes_effect {
            self.live.apply(&operation);
            let dir = operation.path().parent();
            let (dirty, given_up) = std::mem::take(&mut self.given_up)
                .into_iter()
                .partition(|earlier| earlier.path().parent() == dir);
            (self.pending, self.given_up) = ([self.pending.clone(), dirty].concat(), given_up);
            self.pending.push(operation);
        }
        result
    }

    fn check_alive(&self, generation: u64) -> io::Result<()> {
        if self.dead || generation != self.generation {
            return Err(io::Error::other("the process is dead"));
        }
        Ok(())
    }
}

impl Default for MemVfs {
    fn default() -> Self {
        let mut disk = Disk::default();
        // The last is the working directory, as the parent of a relative path has it.
        for dir in ["/", DATA, ""] {
            disk.live.dirs.insert(dir.into());
            disk.durable.dirs.insert(dir.into());
        }
        Self { disk: Arc::new(Mutex::new(disk)), generation: 0 }
    }
}

impl MemVfs {
    fn record(&self, id: NodeId, transcript: &Transcript) {
        self.disk.lock().unwrap().transcript = Some((id, transcript.clone()));
    }

    /// Makes the `n`-th operation from now (the first is 1) go wrong.
    pub fn inject(&self, n: u64, fault: Fault) {
        let mut disk = self.disk.lock().unwrap();
        disk.fault = Some((disk.operations + n, fault));
    }

    /// True once the injected fault has happened.
    pub fn fault_happened(&self) -> bool {
        let disk = self.disk.lock().unwrap();
        disk.fault.is_some_and(|(at, _)| disk.operations >= at)
    }

    /// Keeps the disk as it is before each operation from now on.
    pub fn record_states(&self) {
        self.disk.lock().unwrap().states = Some(Vec::new());
    }

    /// The disk before each operation since the recording began, and as it is now.
    pub fn states(&self) -> Vec<Self> {
        let disk = self.disk.lock().unwrap();
        let recorded = disk.states.iter().flatten().chain([&*disk]);
        recorded.map(Disk::copy).map(Self::of).collect()
    }

    /// A copy of the disk as it is now, synced or not.
    pub fn copy(&self) -> Self {
        Self::of(self.disk.lock().unwrap().copy())
    }

    fn of(disk: Disk) -> Self {
        Self { disk: Arc::new(Mutex::new(disk)), generation: 0 }
    }

    /// How many operations were carried out so far.
    pub fn operations(&self) -> u64 {
        self.disk.lock().unwrap().operations
    }

    /// Ends the run of the process; returns the disk as the next run finds it.
    pub fn crash(&self, survives: Survives) -> Self {
        let mut disk = self.disk.lock().unwrap();
        disk.generation += 1;
        disk.dead = false;
        (disk.fault, disk.part) = (None, None);
        disk.locks.clear();
        let mut random = Random(match survives {
            Survives::Some(seed) => seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            _ => 1,
        });
        if survives != Survives::Everything {
            disk.given_up.clear();
            let pending = std::mem::take(&mut disk.pending);
            let kept = match survives {
                // A journal keeps the order of what it writes.
                Survives::Some(_) => random.below(pending.len() as u64 + 1) as usize,
                _ => 0,
            };
            let mut tree = disk.durable.clone();
            for operation in &pending[..kept] {
                tree.apply(operation);
            }
            // What lies in a directory that is gone is gone.
            let kept = tree.dirs.clone();
            tree.dirs.retain(|dir| dir.ancestors().all(|above| kept.contains(above)));
            let dirs = tree.dirs.clone();
            tree.names.retain(|path, _| dirs.contains(path.parent().unwrap()));
            for inode in &mut disk.inodes {
                inode.settle(match survives {
                    Survives::Some(_) => torn(inode, &mut random),
                    _ => inode.durable.clone(),
                });
            }
            disk.live = tree.clone();
            disk.durable = tree;
        }
        Self { disk: self.disk.clone(), generation: disk.generation }
    }

    /// A copy of the disk as it is now, everything on it synced.
    pub fn image(&self) -> Self {
        let disk = self.disk.lock().unwrap();
        let mut copy = Disk { durable: disk.live.clone(), ..disk.copy() };
        (copy.pending, copy.given_up) = Default::default();
        for inode in &mut copy.inodes {
            inode.settle(inode.live.clone());
        }
        Self::of(copy)
    }

    /// The paths of all files.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.disk.lock().unwrap().live.names.keys().cloned().collect()
    }

    /// The contents of a file.
    pub fn contents(&self, path: &Path) -> Vec<u8> {
        let disk = self.disk.lock().unwrap();
        disk.inodes[disk.live.names[path]].live.clone()
    }

    /// Changes a file behind everybody's back.
    pub fn tamper(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut disk = self.disk.lock().unwrap();
        let number = disk.live.names[path];
        let inode = &mut disk.inodes[number];
        let mut bytes = inode.live.clone();
        change(&mut bytes);
        inode.settle(bytes);
    }

    /// Puts a file there, synced.
    pub fn put(&self, path: &Path, bytes: &[u8]) {
        let mut disk = self.disk.lock().unwrap();
        let mut inode = Inode::default();
        inode.settle(bytes.to_vec());
        disk.inodes.push(inode);
        let number = disk.inodes.len() - 1;
        for dir in path.parent().unwrap().ancestors() {
            disk.live.dirs.insert(dir.into());
            disk.durable.dirs.insert(dir.into());
        }
        disk.live.names.insert(path.into(), number);
        disk.durable.names.insert(path.into(), number);
    }

    /// Takes a file away, synced.
    pub fn take_away(&self, path: &Path) {
        let mut disk = self.disk.lock().unwrap();
        disk.live.names.remove(path);
        disk.durable.names.remove(path);
    }
}

/// A file after a power cut: each sector that was not synced is the old one, the new one, or zeros
/// where there was none; the length is one that the file had or grew through.
fn torn(inode: &Inode, random: &mut Random) -> Vec<u8> {
    let Inode { live, durable, .. } = inode;
    if live == durable {
        return live.clone();
    }
    let (short, long) = (live.len().min(durable.len()), live.len().max(durable.len()));
    let length = match random.below(4) {
        0 => durable.len(),
        1 => short + random.below((long - short) as u64 + 1) as usize,
        // The length is written apart from the data, and mostly with or before it.
        _ => live.len(),
    };
    let mut bytes = vec![0; length];
    for start in (0..length).step_by(SECTOR) {
        let source = if random.below(2) == 0 { live } else { durable };
        let end = length.min(start + SECTOR).min(source.len());
        if start < end {
            bytes[start..end].copy_from_slice(&source[start..end]);
        }
    }
    bytes
}

/// xorshift64*: small, and the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }
}

impl Vfs for MemVfs {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.disk.lock().unwrap();
        disk.check_alive(self.generation)?;
        let mut missing: Vec<PathBuf> = path.ancestors().map(Path::to_owned).collect();
        missing.retain(|dir| !disk.live.dirs.contains(dir));
        for dir in missing.into_iter().rev() {
            let line = format!("mkdir {}", short(&dir));
            disk.change(self.generation, &line, DirOperation::MakeDir { path: dir })?;
        }
        Ok(())
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn VfsFile>> {
        let mut disk = self.disk.lock().unwrap();
        if !disk.live.dirs.contains(path.parent().unwrap()) {
            return Err(not_found(path));
        }
        let inode = disk.inodes.len();
        disk.inodes.push(Inode::default());
        let line = format!("create {}", short(path));
        disk.change(self.generation, &line, DirOperation::Link { path: path.to_owned(), inode })?;
        Ok(Box::new(MemFile { vfs: self.clone(), inode, path: path.to_owned() }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn VfsFile>> {
        let disk = self.disk.lock().unwrap();
        disk.check_alive(self.generation)?;
        let inode = *disk.live.names.get(path).ok_or_else(|| not_found(path))?;
        Ok(Box::new(MemFile { vfs: self.clone(), inode, path: path.to_owned() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut disk = self.disk.lock().unwrap();
        if !disk.live.names.contains_key(from) {
            return Err(not_found(from));
        }
        let line = format!("rename {} to {}", short(from), short(to));
        let operation = DirOperation::Rename { from: from.to_owned(), to: to.to_owned() };
        disk.change(self.generation, &line, operation)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.disk.lock().unwrap();
        if !disk.live.names.contains_key(path) {
            return Err(not_found(path));
        }
        let line = format!("remove {}", short(path));
        disk.change(self.generation, &line, DirOperation::Unlink { path: path.to_owned() })
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let disk = self.disk.lock().unwrap();
        disk.check_alive(self.generation)?;
        if !disk.live.dirs.contains(path) {
            return Err(not_found(path));
        }
        let inside = disk.live.names.keys().filter(|name| name.parent() == Some(path));
        Ok(inside.map(|name| name.file_name().unwrap().to_string_lossy().into_owned()).collect())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let path = match path.to_str() {
            Some("") => return Err(not_found(path)),
            Some(".") => Path::new(""),
            _ => path,
        };
        let mut disk = self.disk.lock().unwrap();
        if !disk.live.dirs.contains(path) {
            return Err(not_found(path));
        }
        let synced = disk.operate(self.generation, &format!("sync directory {}", short(path))).1;
        // The process died before, or of this: nothing happens to what is not synced.
        disk.check_alive(self.generation)?;
        let pending = std::mem::take(&mut disk.pending);
        for operation in pending {
            if operation.path().parent() != Some(path) {
                disk.pending.push(operation);
            } else if synced.is_ok() {
                disk.durable.apply(&operation);
            } else {
                disk.given_up.push(operation);
            }
        }
        synced
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Any + Send>>> {
        let mut disk = self.disk.lock().unwrap();
        disk.check_alive(self.generation)?;
        if !disk.locks.insert(path.to_owned()) {
            return Ok(None);
        }
        Ok(Some(Box::new(LockGuard { vfs: self.clone(), path: path.to_owned() })))
    }
}

struct LockGuard {
    vfs: MemVfs,
    path: PathBuf,
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        let mut disk = self.vfs.disk.lock().unwrap();
        if disk.generation == self.vfs.generation {
            disk.locks.remove(&self.path);
        }
    }
}

struct MemFile {
    vfs: MemVfs,
    inode: usize,
    /// Where it was opened.
    path: PathBuf,
}

impl MemFile {
    /// What it is called now.
    fn path(&self) -> PathBuf {
        let disk = self.vfs.disk.lock().unwrap();
        let named = disk.live.names.iter().find(|(_, inode)| **inode == self.inode);
        named.map_or(self.path.clone(), |(path, _)| path.clone())
    }

    fn operate(
        &self,
        line: &str,
        effect: impl FnOnce(&mut Inode, Option<usize>),
    ) -> io::Result<()> {
        let mut disk = self.vfs.disk.lock().unwrap();
        let (takes_effect, result) = disk.operate(self.vfs.generation, line);
        if takes_effect {
            let part = disk.part.take();
            effect(&mut disk.inodes[self.inode], part);
        }
        result
    }
}

impl VfsFile for MemFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let disk = self.vfs.disk.lock().unwrap();
        disk.check_alive(self.vfs.generation)?;
        let bytes = &disk.inodes[self.inode].live;
        let from = bytes.len().min(offset as usize);
        let count = buf.len().min(bytes.len() - from);
        buf[..count].copy_from_slice(&bytes[from..from + count]);
        Ok(count)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let path = self.path();
        let line = format!("write {}{}", short(&path), frame_records(&path, buf, offset));
        self.operate(&line, |inode, part| {
            inode.write(&buf[..part.unwrap_or(buf.len()).min(buf.len())], offset as usize);
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let line = format!("cut {}", short(&self.path()));
        self.operate(&line, |inode, _| inode.live.resize(len as usize, 0))
    }

    fn len(&self) -> io::Result<u64> {
        let disk = self.vfs.disk.lock().unwrap();
        disk.check_alive(self.vfs.generation)?;
        Ok(disk.inodes[self.inode].live.len() as u64)
    }

    fn sync(&self) -> io::Result<()> {
        let path = self.path();
        let mut disk = self.vfs.disk.lock().unwrap();
        let synced = disk.operate(self.vfs.generation, &format!("sync {}", short(&path))).1;
        disk.check_alive(self.vfs.generation)?;
        let inode = &mut disk.inodes[self.inode];
        if synced.is_ok() {
            inode.sync()
        } else {
            inode.give_up()
        }
        synced
    }
}

/// Names the records of a frame of the write-ahead log; see the table in `wal/format.rs`.
fn frame_records(path: &Path, frame: &[u8], offset: u64) -> String {
    let is_segment = path.extension().is_some_and(|extension| extension == "wal");
    if !is_segment || offset == 0 || frame.len() < 16 {
        return String::new();
    }
    let number = |at: usize| u32::from_le_bytes(frame[at..at + 4].try_into().unwrap()) as usize;
    let (mut at, end) = (16, 16 + number(0));
    let mut names: Vec<&str> = Vec::new();
    while at + 5 <= end {
        names.push(match frame[at] {
            1 => "head",
            2 => "identity",
            3 => "incarnation",
            4 => "mark",
            5 => "install",
            6 => "entry",
            7 => "hard state",
            8 => "close",
            kind => panic!("no record has kind {kind}"),
        });
        at += 5 + number(at + 1);
    }
    names.dedup();
    format!(": one frame with {}", names.join(", "))
}

// ---------------------------------------------------------------------------------------------
// The messages

/// What a node has sent and nobody has taken yet.
#[derive(Default)]
pub struct Sent {
    pub messages: Vec<Message>,
    pub snapshots: Vec<(Message, SnapshotFile)>,
    pub greetings: Vec<(String, Greeting)>,
    pub passed_on: Vec<(NodeId, MemberRequest, Responder<()>)>,
    pub peers: BTreeMap<NodeId, String>,
}

struct ListOutbox {
    id: NodeId,
    sent: Arc<Mutex<Sent>>,
    transcript: Transcript,
}

fn describe(message: &Message) -> String {
    let mut line = format!("send {:?} to {}", message.get_msg_type(), message.to);
    match message.get_msg_type() {
        MessageType::MsgAppend => {
            let indexes: Vec<_> = message.entries.iter().map(|entry| entry.index).collect();
            write!(line, ", entries {indexes:?}, commit {}", message.commit).unwrap();
        }
        MessageType::MsgAppendResponse => {
            let verdict = if message.reject { "rejects" } else { "has" };
            write!(line, ", {verdict} {}", message.index).unwrap();
        }
        _ => {}
    }
    line
}

impl Outbox for ListOutbox {
    fn send(&mut self, message: Message) {
        self.transcript.note(self.id, &describe(&message));
        self.sent.lock().unwrap().messages.push(message);
    }

    fn send_snapshot(&mut self, message: Message, file: SnapshotFile) {
        self.transcript.note(self.id, &describe(&message));
        self.sent.lock().unwrap().snapshots.push((message, file));
    }

    fn add_peer(&mut self, id: NodeId, url: &str) {
        self.sent.lock().unwrap().peers.insert(id, url.to_owned());
    }

    fn remove_peer(&mut self, id: NodeId) {
        self.sent.lock().unwrap().peers.remove(&id);
    }

    fn greet(&mut self, url: &str, greeting: Greeting) {
        self.sent.lock().unwrap().greetings.push((url.to_owned(), greeting));
    }

    fn pass_on(&mut self, to: NodeId, change: MemberRequest, responder: Responder<()>) {
        self.sent.lock().unwrap().passed_on.push((to, change, responder));
    }
}

// ---------------------------------------------------------------------------------------------
// One member

/// A client's side of one request.
pub struct Answer<T> {
    pending: Pin<Box<dyn Future<Output = std::result::Result<T, RequestError>>>>,
    answer: Option<std::result::Result<T, RequestError>>,
}

/// Gives the deadlines of responders a clock. It is never reached.
static CLOCK: LazyLock<tokio::runtime::Runtime> =
    LazyLock::new(|| tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap());

impl<T: 'static> Answer<T> {
    pub fn new(pending: Pending<T>) -> Self {
        let _clock = CLOCK.enter();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(3600);
        Self { pending: Box::pin(pending.wait_until(deadline)), answer: None }
    }

    /// The answer, if there is one by now.
    pub fn get(&mut self) -> Option<&std::result::Result<T, RequestError>> {
        if self.answer.is_none() {
            let _clock = CLOCK.enter();
            let mut context = Context::from_waker(Waker::noop());
            if let Poll::Ready(answer) = self.pending.as_mut().poll(&mut context) {
                self.answer = Some(answer);
            }
        }
        self.answer.as_ref()
    }

    /// True if the request was answered with success.
    pub fn is_ok(&mut self) -> bool {
        matches!(self.get(), Some(Ok(_)))
    }

    /// True if the outcome is not known: 504.
    pub fn is_unknown(&mut self) -> bool {
        matches!(self.get(), Some(Err(RequestError::Unknown(_))))
    }
}

/// The store's own command, which is private to it.
#[derive(Serialize)]
pub enum Command<'a> {
    Put {
        #[serde(with = "serde_bytes")]
        key: &'a [u8],
        #[serde(with = "serde_bytes")]
        value: &'a [u8],
    },
}

/// The store's own record in a snapshot, which is private to it.
#[derive(Serialize, Deserialize)]
pub struct StateRecord<'a> {
    #[serde(borrow, with = "serde_bytes")]
    pub key: &'a [u8],
    #[serde(borrow, with = "serde_bytes")]
    pub value: &'a [u8],
    pub index: u64,
    pub term: u64,
}

pub fn put(key: &str, value: &str) -> Vec<u8> {
    codec::encode(&Command::Put { key: key.as_bytes(), value: value.as_bytes() })
}

/// Keys to values; and the place of each last write.
pub type State = BTreeMap<String, (String, u64, u64)>;

/// What a snapshot's application bytes say.
pub fn decode_state(bytes: &[u8]) -> State {
    let mut rest = bytes;
    let mut state = State::new();
    while let Some((length, more)) = rest.split_first_chunk::<4>() {
        let (record, more) = more.split_at(u32::from_le_bytes(*length) as usize);
        let record: StateRecord<'_> = codec::decode(record).unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        state.insert(text(record.key), (text(record.value), record.index, record.term));
        rest = more;
    }
    state
}

/// One member: a node, its store, its disk.
pub struct Member {
    pub id: NodeId,
    pub config: NodeConfig,
    pub disk: MemVfs,
    pub node: RaftNode,
    pub gate: Arc<RwLock<PeerGate>>,
    pub snapshotter: Snapshotter,
    pub sent: Arc<Mutex<Sent>>,
    pub logs: Arc<Mutex<Vec<String>>>,
    pub transcript: Transcript,
    /// True while the snapshots that are asked for are left lying.
    pub holds_snapshots: bool,
    pub held: Vec<SnapshotRequest>,
    /// True while the state machine leaves the entries lying that it gets.
    pub holds_entries: bool,
    held_entries: Vec<Commit>,
    tap: Arc<Mutex<CommitTap>>,
    reader: CommitReader,
    _store: KvStore,
    reports: Arc<Mutex<VecDeque<PeerReport>>>,
    status: watch::Receiver<Status>,
    numbers: BTreeMap<NodeId, u64>,
    snapshot_numbers: BTreeMap<NodeId, u64>,
}

pub fn url(id: NodeId) -> String {
    format!("http://127.0.0.1:{}", 9020 + id)
}

/// The configuration of the first start of member `id` of `n`.
pub fn config(id: NodeId, n: u64) -> NodeConfig {
    NodeConfig {
        id,
        url: url(id),
        cluster: (1..=n).map(url).collect(),
        join: false,
        cluster_id: None,
        data_dir: DATA.into(),
        snapshot_count: 10_000,
        snapshot_catch_up_entries: 10_000,
        tick: Duration::from_millis(100),
        election_ticks: 10,
        randomized_election_ticks: 10..20,
        heartbeat_ticks: 1,
        request_timeout: Duration::from_secs(5),
        boot: 1000 + id,
        incarnation: 100 + id,
        metrics: Default::default(),
    }
}

impl Member {
    /// Starts a member on `disk`.
    pub fn start(config: &NodeConfig, disk: &MemVfs, transcript: &Transcript) -> Result<Self> {
        Self::start_with_segments(config, disk, transcript, None)
    }

    /// Starts a member whose segments get `segment_bytes` long.
    pub fn start_with_segments(
        config: &NodeConfig,
        disk: &MemVfs,
        transcript: &Transcript,
        segment_bytes: Option<u64>,
    ) -> Result<Self> {
        let id = config.id;
        disk.record(id, transcript);
        let logs = Arc::new(Mutex::new(Vec::new()));
        let drain = TranscriptDrain { id, transcript: transcript.clone(), logs: logs.clone() };
        let logger = Logger::root(drain.fuse(), o!());
        let replayed = replay_wal(config, Arc::new(disk.clone()), &logger)?;
        let replayed = replayed.with_segments(segment_bytes.unwrap_or(SEGMENT_BYTES), 1024);
        let (gate, snapshotter) = (replayed.gate(), replayed.snapshotter());
        let (commit_tx, rx) = mpsc::unbounded_channel();
        let tap = Arc::new(Mutex::new(CommitTap { rx, queue: VecDeque::new() }));
        transcript.taps.lock().unwrap().insert(id, tap.clone());
        let (status_tx, status) = watch::channel(Status::default());
        let reports = Arc::new(Mutex::new(VecDeque::new()));
        let report = {
            let reports = reports.clone();
            Arc::new(move |report| reports.lock().unwrap().push_back(report))
        };
        let sent = Arc::new(Mutex::new(Sent::default()));
        let outbox =
            Box::new(ListOutbox { id, sent: sent.clone(), transcript: transcript.clone() });
        let node = RaftNode::new(
            config.clone(),
            replayed,
            outbox,
            commit_tx,
            report,
            status_tx,
            logger.clone(),
        )?;
        let (store, reader) = KvStore::new(mpsc::channel(1).0, mpsc::channel(1).0, logger);
        let mut member = Self {
            id,
            config: config.clone(),
            disk: disk.clone(),
            node,
            gate,
            snapshotter,
            sent,
            logs,
            transcript: transcript.clone(),
            holds_snapshots: false,
            held: Vec::new(),
            holds_entries: false,
            held_entries: Vec::new(),
            tap,
            reader,
            _store: store,
            reports,
            status,
            numbers: BTreeMap::new(),
            snapshot_numbers: BTreeMap::new(),
        };
        member.act()?;
        Ok(member)
    }

    /// One turn with these inputs.
    pub fn turn(&mut self, inputs: impl IntoIterator<Item = Input>) -> Result<()> {
        for input in inputs {
            self.node.handle(input)?;
        }
        self.act()
    }

    /// Lets the node act, then the state machine, then the node on what that reports.
    pub fn act(&mut self) -> Result<()> {
        loop {
            self.node.handle_ready()?;
            self.follow_commits()?;
            let reports: Vec<_> = self.reports.lock().unwrap().drain(..).collect();
            if reports.is_empty() {
                return Ok(());
            }
            for report in reports {
                self.node.handle(Input::Report(report))?;
            }
        }
    }

    fn follow_commits(&mut self) -> Result<()> {
        self.transcript.note_commits(self.id);
        loop {
            let Some(commit) = self.tap.lock().unwrap().queue.pop_front() else { return Ok(()) };
            match commit {
                Commit::Snapshot(request) if self.holds_snapshots => self.held.push(request),
                Commit::Snapshot(request) => self.make_snapshot(request)?,
                commit @ Commit::Entries { .. } if self.holds_entries => {
                    self.held_entries.push(commit);
                }
                Commit::Entries { entries, applied } => {
                    let answered: Vec<_> = entries
                        .iter()
                        .filter(|entry| entry.responder.is_some())
                        .map(|entry| entry.index)
                        .collect();
                    self.reader.handle(Commit::Entries { entries, applied })?;
                    if !answered.is_empty() {
                        self.transcript.note(self.id, &format!("answer {answered:?}"));
                    }
                }
                commit => self.reader.handle(commit)?,
            }
        }
    }

    /// Has the store make a snapshot; waits for its thread, so that everything has its order.
    fn make_snapshot(&mut self, request: SnapshotRequest) -> Result<()> {
        let SnapshotRequest { index, save } = request;
        let (done_tx, done_rx) = std::sync::mpsc::channel();
        self.reader.handle(Commit::Snapshot(SnapshotRequest {
            index,
            save: Box::new(move |body| {
                save(body);
                done_tx.send(()).unwrap();
            }),
        }))?;
        done_rx.recv().expect("the snapshot is made");
        Ok(())
    }

    /// Makes the snapshots that were left lying, and leaves their reports to be handled.
    pub fn make_held_snapshots(&mut self) -> Vec<Input> {
        for request in std::mem::take(&mut self.held) {
            self.make_snapshot(request).unwrap();
        }
        self.reports.lock().unwrap().drain(..).map(Input::Report).collect()
    }

    /// Has the state machine apply what was left lying; it leaves nothing lying from now on.
    pub fn apply_held_entries(&mut self) -> Result<()> {
        self.holds_entries = false;
        for commit in std::mem::take(&mut self.held_entries) {
            self.reader.handle(commit)?;
        }
        Ok(())
    }

    /// Without what changes with time alone.
    pub fn status(&self) -> Status {
        Status { tick: Default::default(), ..self.status.borrow().clone() }
    }

    pub fn tick(&mut self) -> Result<()> {
        self.turn([Input::Tick])
    }

    pub fn propose(&mut self, data: Vec<u8>, ack: Ack) -> (Input, Answer<Acknowledged>) {
        let (responder, pending) = responder();
        (Input::Propose(Proposal { data: data.into(), ack, responder }), Answer::new(pending))
    }

    /// Proposes a PUT and takes one turn.
    pub fn put(&mut self, key: &str, value: &str) -> Result<Answer<Acknowledged>> {
        let (input, answer) = self.propose(put(key, value), Ack::Committed);
        self.turn([input]).map(|()| answer)
    }

    /// Begins a linearizable read and takes one turn.
    pub fn read(&mut self) -> Result<Answer<()>> {
        let (responder, pending) = responder();
        self.turn([Input::Read(ReadRequest { responder })]).map(|()| Answer::new(pending))
    }

    /// Asks for a change of members and takes one turn.
    pub fn change(&mut self, change: MemberRequest) -> Result<Answer<()>> {
        let (responder, pending) = responder();
        let request = ConfChangeRequest { change, forwarded: false, responder };
        self.turn([Input::ConfChange(request)]).map(|()| Answer::new(pending))
    }

    /// The store's bytes, as a snapshot would hold them.
    pub fn state_bytes(&mut self) -> Vec<u8> {
        let (bytes_tx, bytes_rx) = std::sync::mpsc::channel();
        let save = Box::new(move |body: raftexample::channels::SnapshotBody<'_>| {
            let mut bytes = Vec::new();
            body(&mut bytes).unwrap();
            bytes_tx.send(bytes).unwrap();
        });
        self.reader.handle(Commit::Snapshot(SnapshotRequest { index: 0, save })).unwrap();
        bytes_rx.recv().unwrap()
    }

    /// What the store holds.
    pub fn state(&mut self) -> State {
        decode_state(&self.state_bytes())
    }

    /// What the log on disk says.
    pub fn wal(&self) -> Recovered {
        Wal::read(&self.disk, &wal_dir(Path::new(DATA), self.id)).unwrap()
    }

    pub fn logged(&self, text: &str) -> bool {
        self.logs.lock().unwrap().iter().any(|line| line.contains(text))
    }

    /// Ends the run; returns the disk as the next run finds it.
    pub fn crash(self, survives: Survives) -> MemVfs {
        let disk = self.disk.clone();
        drop(self);
        disk.crash(survives)
    }

    /// Ticks until it leads; for a member that is a majority by itself.
    pub fn tick_until_leader(&mut self) -> Result<()> {
        for _ in 0..200 {
            if self.status().leader == self.id {
                return Ok(());
            }
            self.tick()?;
        }
        panic!("member {} does not lead: {:?}", self.id, self.status());
    }

    /// The messages that wait to be delivered, taken.
    pub fn take_messages(&mut self) -> Vec<Message> {
        std::mem::take(&mut self.sent.lock().unwrap().messages)
    }

    /// A batch for member `to`, as our transport would deliver it there.
    pub fn batch(&mut self, to: NodeId, messages: Vec<Message>) -> Inbound {
        let header = self.header(to);
        let number = self.numbers.entry(to).or_default();
        *number += 1;
        batch(header, self.config.boot, *number, messages)
    }

    pub fn header(&self, to: NodeId) -> PeerHeader {
        self.gate.read().unwrap().header(to)
    }
}

/// A batch of messages from the sender that `header` names.
pub fn batch(header: PeerHeader, boot: u64, number: u64, messages: Vec<Message>) -> Inbound {
    Inbound::new(header, InboundBody::Messages { boot, number, messages, answer: None })
}

/// An encoded entry without a request's id.
pub fn entry(index: u64, term: u64, data: Vec<u8>) -> Entry {
    Entry { index, term, data: data.into(), ..Entry::default() }
}

// ---------------------------------------------------------------------------------------------
// Several members

/// Several members and what lies between them.
#[derive(Default)]
pub struct Network {
    pub members: BTreeMap<NodeId, Member>,
    /// Members that nothing reaches and nothing leaves.
    pub cut: BTreeSet<NodeId>,
    pub transcript: Transcript,
    /// What ended a member.
    pub ended: BTreeMap<NodeId, Error>,
}

impl Network {
    /// `n` members at their first start, all begun, member 1 leading.
    pub fn new(n: u64, change: impl Fn(&mut NodeConfig)) -> Self {
        let mut network = Self::default();
        for id in 1..=n {
            let mut config = config(id, n);
            change(&mut config);
            network.start(&config, &MemVfs::default()).unwrap();
        }
        network.tick(1);
        network.tick_until("all have begun", |network| {
            network.members.values().all(|member| member.status().begun)
        });
        network.elect(1);
        network
    }

    pub fn start(&mut self, config: &NodeConfig, disk: &MemVfs) -> Result<()> {
        let member = Member::start(config, disk, &self.transcript)?;
        self.members.insert(config.id, member);
        self.deliver();
        Ok(())
    }

    pub fn member(&mut self, id: NodeId) -> &mut Member {
        self.members.get_mut(&id).unwrap_or_else(|| panic!("member {id} runs"))
    }

    pub fn crash(&mut self, id: NodeId, survives: Survives) -> MemVfs {
        self.members.remove(&id).unwrap().crash(survives)
    }

    /// Lets these members give up the leader that they followed; nothing comes of it yet.
    pub fn give_up_leader(&mut self, ids: &[NodeId]) {
        for id in ids {
            for _ in 0..12 {
                self.turn(*id, [Input::Tick]);
            }
            self.member(*id).take_messages();
        }
    }

    /// Lets only member `id` grow impatient until it leads.
    pub fn elect(&mut self, id: NodeId) {
        for _ in 0..300 {
            let leads = self.members[&id].status().leader == id;
            if leads && self.members[&id].status().commit == self.members[&id].status().applied {
                self.settle();
                return;
            }
            self.turn(id, [Input::Tick]);
            self.deliver();
        }
        panic!("member {id} does not lead: {:?}", self.members[&id].status());
    }

    /// A few heartbeats of the leader: everybody knows the commit index.
    pub fn settle(&mut self) {
        let leaders: Vec<NodeId> = self
            .members
            .values()
            .filter(|member| member.status().leader == member.id)
            .map(|member| member.id)
            .collect();
        for _ in 0..4 {
            for id in &leaders {
                self.turn(*id, [Input::Tick]);
            }
            self.deliver();
        }
    }

    /// Ticks every member `n` times, delivering until quiet after each.
    pub fn tick(&mut self, n: usize) {
        for _ in 0..n {
            for id in self.members.keys().copied().collect::<Vec<_>>() {
                self.turn(id, [Input::Tick]);
            }
            self.deliver();
        }
    }

    pub fn tick_until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        for _ in 0..500 {
            if holds(self) {
                return;
            }
            self.tick(1);
        }
        let states: Vec<_> = self.members.values().map(Member::status).collect();
        panic!("waited in vain until {what}: {states:#?}");
    }

    /// A PUT at member `id` and everything that follows from it.
    pub fn put(&mut self, id: NodeId, key: &str, value: &str) -> Answer<Acknowledged> {
        let answer = self.member(id).put(key, value).unwrap();
        self.deliver();
        answer
    }

    /// One turn of member `id`; if it ends, so be it.
    pub fn turn(&mut self, id: NodeId, inputs: impl IntoIterator<Item = Input>) {
        let Some(member) = self.members.get_mut(&id) else { return };
        if let Err(error) = member.turn(inputs) {
            self.members.remove(&id);
            self.ended.insert(id, error);
        }
    }

    /// Delivers until nothing is on its way.
    pub fn deliver(&mut self) {
        for _ in 0..ROUNDS_MAX {
            if !self.deliver_round() {
                return;
            }
        }
        panic!("the members never come to rest");
    }

    /// Delivers what has been sent so far, each batch in a turn of its own; false if there was
    /// nothing.
    pub fn deliver_round(&mut self) -> bool {
        let mut was_any = false;
        for from in self.members.keys().copied().collect::<Vec<_>>() {
            let Some(sender) = self.members.get(&from) else { continue };
            let mut sent = sender.sent.lock().unwrap();
            let messages = std::mem::take(&mut sent.messages);
            let snapshots = std::mem::take(&mut sent.snapshots);
            let greetings = std::mem::take(&mut sent.greetings);
            let passed_on = std::mem::take(&mut sent.passed_on);
            drop(sent);
            was_any |= !messages.is_empty()
                || !snapshots.is_empty()
                || !greetings.is_empty()
                || !passed_on.is_empty();
            let mut batches: BTreeMap<NodeId, Vec<Message>> = BTreeMap::new();
            for message in messages {
                batches.entry(message.to).or_default().push(message);
            }
            for (to, messages) in batches {
                self.deliver_batch(from, to, messages);
            }
            for (message, file) in snapshots {
                self.deliver_snapshot(from, message, file);
            }
            for (url, greeting) in greetings {
                self.deliver_greeting(from, url, greeting);
            }
            for (to, change, responder) in passed_on {
                self.deliver_change(from, to, change, responder);
            }
        }
        was_any
    }

    fn connected(&self, from: NodeId, to: NodeId) -> bool {
        self.members.contains_key(&from)
            && self.members.contains_key(&to)
            && !self.cut.contains(&from)
            && !self.cut.contains(&to)
    }

    fn report(&mut self, to: NodeId, report: PeerReport) {
        self.turn(to, [Input::Report(report)]);
    }

    fn refuse(&mut self, sender: NodeId, receiver: NodeId, refusal: Refusal) {
        let Some(receiver) = self.members.get(&receiver) else { return };
        let header = receiver.header(sender);
        self.report(sender, PeerReport::Refused { header, refusal });
    }

    fn deliver_batch(&mut self, from: NodeId, to: NodeId, messages: Vec<Message>) {
        if !self.connected(from, to) {
            return self.report(from, PeerReport::Unreachable(to));
        }
        let mut inbound = self.member(from).batch(to, messages);
        let (answer_tx, mut answer_rx) = oneshot::channel();
        let InboundBody::Messages { answer, .. } = &mut inbound.body else { unreachable!() };
        *answer = Some(answer_tx);
        self.turn(to, [Input::Inbound(inbound)]);
        if let Ok(Err(refusal)) = answer_rx.try_recv() {
            self.refuse(from, to, refusal);
        }
    }

    fn deliver_snapshot(&mut self, from: NodeId, message: Message, file: SnapshotFile) {
        let (to, index) = (message.to, message.get_snapshot().get_metadata().index);
        let arrived = self.connected(from, to) && self.copy_snapshot(from, message, file);
        self.report(from, PeerReport::SnapshotStatus { to, index, arrived });
    }

    fn copy_snapshot(&mut self, from: NodeId, message: Message, file: SnapshotFile) -> bool {
        let to = message.to;
        let metadata = message.get_snapshot().get_metadata();
        let (index, term) = (metadata.index, metadata.term);
        let mut bytes = Vec::new();
        let sender = self.member(from);
        sender.snapshotter.open_raw(index, term).unwrap().1.read_to_end(&mut bytes).unwrap();
        let number = sender.snapshot_numbers.entry(to).or_default();
        *number += 1;
        let (boot, number, header) = (sender.config.boot, *number, sender.header(to));
        let snapshotter = self.member(to).snapshotter.clone();
        let receive = || {
            let mut receiver = snapshotter.receive(index, term, file)?;
            receiver.write(&bytes)?;
            receiver.finish()
        };
        match receive() {
            Ok(Received::Kept) => {}
            Ok(Received::Refused(why)) => panic!("the file arrived damaged: {why}"),
            Err(error) => {
                self.report(to, PeerReport::DiskFailed(error));
                return false;
            }
        }
        let (answer, mut answer_rx) = oneshot::channel();
        let body = InboundBody::Snapshot { boot, number, message, answer };
        self.turn(to, [Input::Inbound(Inbound::new(header, body))]);
        matches!(answer_rx.try_recv(), Ok(Ok(())))
    }

    fn deliver_greeting(&mut self, from: NodeId, url: String, greeting: Greeting) {
        let receiver = self.members.values().find(|member| member.config.url == url);
        let Some(to) = receiver.map(|member| member.id).filter(|to| self.connected(from, *to))
        else {
            return self.report(from, PeerReport::NotGreeted { url, why: "unreachable".into() });
        };
        let (answer, mut answer_rx) = oneshot::channel();
        let inbound =
            Inbound::new(self.members[&from].header(0), InboundBody::Greeting { greeting, answer });
        self.turn(to, [Input::Inbound(inbound)]);
        let Some(receiver) = self.members.get(&to) else { return };
        let header = receiver.header(from);
        match answer_rx.try_recv() {
            Ok(Ok(answer)) => self.report(from, PeerReport::Greeted { url, header, answer }),
            Ok(Err(refusal)) => self.refuse(from, to, refusal),
            Err(_) => {}
        }
    }

    fn deliver_change(
        &mut self,
        from: NodeId,
        to: NodeId,
        change: MemberRequest,
        responder: Responder<()>,
    ) {
        if !self.connected(from, to) {
            return responder.answer(Err(RequestError::Unknown("lost".into())));
        }
        let header = self.members[&from].header(to);
        let body = InboundBody::ConfChange { change, responder };
        self.turn(to, [Input::Inbound(Inbound::new(header, body))]);
    }
}
