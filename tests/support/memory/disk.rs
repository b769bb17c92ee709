//! A file system in memory that knows what a power cut would leave.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use raftexample::channels::NodeId;
use raftexample::storage::{Vfs, VfsFile};

use super::transcript::Transcript;
use crate::support::config::DATA;
use crate::support::random::Random;

/// The unit that a disk writes atomically.
const SECTOR: usize = 512;

/// How much unsynced data survives a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survives {
    /// Power cut: only synced data.
    Nothing,
    /// The process died and the machine did not: all data, still not synced.
    Everything,
    /// Power cut: some sectors, some zeroed, and some directory operations, chosen by this seed.
    Some(u64),
}

/// What goes wrong at one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The process dies at this operation, which returns an error.
    Crash,
    /// The operation fails and later ones succeed. A sync that fails marks its data as clean: the
    /// data stays readable until the power is cut, and no later sync writes it.
    Fails(io::ErrorKind),
    /// Like `Fails`, but the operation takes effect first: a write with this many bytes.
    FailsAfter(io::ErrorKind, usize),
}

#[derive(Clone, Default)]
struct Inode {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// Sectors that a failed sync marked as clean without writing them.
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

    /// Sets the contents, on disk too.
    fn settle(&mut self, bytes: Vec<u8>) {
        *self = Self { live: bytes.clone(), durable: bytes, given_up: BTreeSet::new() };
    }
}

/// Copies a sector from `source`, with zeros beyond its end.
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
    /// Not synced yet, in order.
    pending: Vec<DirOperation>,
    /// Marked as clean by a failed sync, until another change in their directory makes them dirty
    /// again: a directory is written as a whole.
    given_up: Vec<DirOperation>,
    /// The disk before each operation, if recorded.
    states: Option<Vec<Disk>>,
    locks: BTreeSet<PathBuf>,
    generation: u64,
    operations: u64,
    fault: Option<(u64, Fault)>,
    /// The bytes of the current write that arrive, if not all.
    part: Option<usize>,
    /// True after the process died.
    dead: bool,
    transcript: Option<(NodeId, Transcript)>,
}

/// A file system in memory that knows what was synced.
///
/// Each run of a process has its own handle, so files that an earlier run left open have no effect.
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
    /// Counts an operation; returns whether it takes effect, and its result.
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
        // What was not a write left it.
        self.part = None;
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

    /// Copies the contents, synced or not.
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
        // The empty path is the working directory: the parent of a relative path.
        for dir in ["/", DATA, ""] {
            disk.live.dirs.insert(dir.into());
            disk.durable.dirs.insert(dir.into());
        }
        Self { disk: Arc::new(Mutex::new(disk)), generation: 0 }
    }
}

impl MemVfs {
    pub fn record(&self, id: NodeId, transcript: &Transcript) {
        self.disk.lock().unwrap().transcript = Some((id, transcript.clone()));
    }

    /// Makes the `n`-th operation from now fail; the first is 1.
    pub fn inject(&self, n: u64, fault: Fault) {
        let mut disk = self.disk.lock().unwrap();
        disk.fault = Some((disk.operations + n, fault));
    }

    /// True once the injected fault has happened.
    pub fn fault_happened(&self) -> bool {
        let disk = self.disk.lock().unwrap();
        disk.fault.is_some_and(|(at, _)| disk.operations >= at)
    }

    /// Records the disk before each operation from now on.
    pub fn record_states(&self) {
        self.disk.lock().unwrap().states = Some(Vec::new());
    }

    /// The disk before each operation since the recording started, and as it is now.
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

    /// The number of operations so far.
    pub fn operations(&self) -> u64 {
        self.disk.lock().unwrap().operations
    }

    /// Ends the run of the process; returns the disk that the next run finds.
    pub fn crash(&self, survives: Survives) -> Self {
        let mut disk = self.disk.lock().unwrap();
        disk.generation += 1;
        disk.dead = false;
        (disk.fault, disk.part) = (None, None);
        disk.locks.clear();
        let mut random = Random::new(match survives {
            Survives::Some(seed) => seed,
            _ => 0,
        });
        if survives != Survives::Everything {
            disk.given_up.clear();
            let pending = std::mem::take(&mut disk.pending);
            let kept = match survives {
                // A journal keeps the order of its operations.
                Survives::Some(_) => random.below(pending.len() as u64 + 1) as usize,
                _ => 0,
            };
            let mut tree = disk.durable.clone();
            for operation in &pending[..kept] {
                tree.apply(operation);
            }
            // A directory that is gone takes its contents along.
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

    /// A copy of the disk as it is now, with everything synced.
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

    /// Changes a file, bypassing the member.
    pub fn tamper(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut disk = self.disk.lock().unwrap();
        let number = disk.live.names[path];
        let inode = &mut disk.inodes[number];
        let mut bytes = inode.live.clone();
        change(&mut bytes);
        inode.settle(bytes);
    }

    /// Adds a synced file.
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

    /// Removes a file, synced.
    pub fn take_away(&self, path: &Path) {
        let mut disk = self.disk.lock().unwrap();
        disk.live.names.remove(path);
        disk.durable.names.remove(path);
    }
}

/// A file after a power cut. Each unsynced sector has its old contents, its new contents, or zeros
/// if it is new; the length is one that the file had or grew through.
fn torn(inode: &Inode, random: &mut Random) -> Vec<u8> {
    let Inode { live, durable, .. } = inode;
    if live == durable {
        return live.clone();
    }
    let (short, long) = (live.len().min(durable.len()), live.len().max(durable.len()));
    let length = match random.below(4) {
        0 => durable.len(),
        1 => short + random.below((long - short) as u64 + 1) as usize,
        // The length is written separately, mostly together with the data or before it.
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
        // A process that died before this operation, or at it, changes nothing.
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
    /// Its path when it was opened.
    path: PathBuf,
}

impl MemFile {
    /// Its current path.
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
        let verb = if len < self.len()? { "cut" } else { "extend" };
        let line = format!("{verb} {}", short(&self.path()));
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

/// Names the records of a WAL frame; see the table in `wal/format.rs`.
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
            9 => "quarantine",
            10 => "padding",
            kind => panic!("no record has kind {kind}"),
        });
        at += 5 + number(at + 1);
    }
    if names.is_empty() {
        return ": zeros".to_owned();
    }
    names.dedup();
    format!(": one frame with {}", names.join(", "))
}
