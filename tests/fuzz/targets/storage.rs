//! Reading from the disk, and applying what was read.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use raft::eraftpb::{Entry, EntryType, HardState};
use raftexample::channels::{
    BacklogPermit, Commit, CommittedEntry, SnapshotBody, SnapshotFile, SnapshotRequest,
    SnapshotRestore,
};
use raftexample::codec;
use raftexample::error::{Error, Result};
use raftexample::kvstore::{Keys, KvStore};
use raftexample::raft_node::NodeConfig;
use raftexample::raft_node::state_machine::CommitReader;
use raftexample::storage::snapshotter::{Received, Snapshotter};
use raftexample::storage::wal::{Frame, Identity, Recovered, Sizes, SnapshotId, Wal};

use super::Choices;
use crate::support::config::closed;
use crate::support::logs;
use crate::support::memory::{
    DATA, EMPTY_STATE, Fault, MemVfs, Member, StateRecord, Survives, Transcript, config, entry, put,
};

fn dir() -> PathBuf {
    raftexample::raft_node::replay::wal_dir(Path::new(DATA), 1)
}

fn identity() -> Identity {
    Identity { cluster_id: 7, member_id: 1, incarnation: 101, first_urls_hash: 0 }
}

// ---------------------------------------------------------------------------------------------
// The write-ahead log

/// A small step, so that most of a file is frames.
fn sizes(segment_bytes: u64) -> Sizes {
    Sizes { segment_bytes, step_bytes: 64 }
}

/// Two segments with a record of each kind and a truncation.
fn sample() -> MemVfs {
    let disk = MemVfs::default();
    let vfs = Arc::new(disk.clone());
    Wal::create(vfs.clone(), &dir(), &identity(), sizes(u64::MAX)).unwrap();
    let conf_change = Entry {
        entry_type: EntryType::EntryConfChange,
        context: Bytes::from_static(b"http://127.0.0.1:9021"),
        ..entry(1, 1, vec![1; 20])
    };
    let hard_state = |term, commit| HardState { term, vote: 1, commit, ..HardState::default() };
    let first = [conf_change, entry(2, 1, vec![2; 600]), entry(3, 1, vec![0; 1100])];
    let frames = [
        Frame { incarnations: &[(2, 102), (3, 103)], ..Frame::default() },
        Frame { entries: &first, hard_state: Some(&hard_state(1, 2)), ..Frame::default() },
        Frame { made: Some(SnapshotId { index: 2, term: 1 }), ..Frame::default() },
        Frame {
            entries: &[entry(3, 2, put("key", "value")), entry(4, 2, vec![])],
            hard_state: Some(&hard_state(2, 3)),
            ..Frame::default()
        },
        Frame { installed: Some(SnapshotId { index: 9, term: 3 }), ..Frame::default() },
        Frame {
            entries: &[entry(10, 3, put("key", "later"))],
            hard_state: Some(&hard_state(3, 10)),
            ..Frame::default()
        },
    ];
    for (number, frame) in frames.iter().enumerate() {
        // The second segment starts with the fourth frame.
        let segment_bytes = if number == 3 { 1 } else { u64::MAX };
        let (mut wal, _) = Wal::open(vfs.clone(), &dir(), sizes(segment_bytes)).unwrap();
        wal.save(frame).unwrap();
    }
    disk
}

/// Recomputes the checksums of a damaged segment frame by frame, as far as the frames' lengths
/// lead. See `storage/wal/format.rs` for the format.
fn reseal(segment: &mut [u8], number: u64) {
    const HEADER: usize = 16;
    let mut start = 0;
    while start + 2 * HEADER <= segment.len() {
        let field: [u8; 4] = segment[start..start + 4].try_into().expect("four bytes");
        let payload = u32::from_le_bytes(field) as usize;
        let end = start + HEADER + (payload / HEADER + 1) * HEADER;
        if end > segment.len() {
            return;
        }
        let checksum = crc32c::crc32c(&segment[start + HEADER..end]);
        segment[start + 4..start + 8].copy_from_slice(&checksum.to_le_bytes());
        let sectors = (start..end).filter(|at| *at == start || at % 512 == 0);
        let is_zero =
            |at: &usize| segment[*at..end.min(at / 512 * 512 + 512)].iter().all(|byte| *byte == 0);
        let zero_portions = sectors.filter(is_zero).count() as u32;
        segment[start + 8..start + 12].copy_from_slice(&zero_portions.to_le_bytes());
        let salt = if start == 0 { [0, 0] } else { [identity().incarnation, number] };
        let header = crc32c::crc32c(&segment[start..start + 12]);
        let header = [salt[0], salt[1], start as u64]
            .iter()
            .fold(header, |crc, number| crc32c::crc32c_append(crc, &number.to_le_bytes()));
        segment[start + 12..start + HEADER].copy_from_slice(&header.to_le_bytes());
        start = end;
    }
}

/// A damaged log is refused or read. Reading and opening agree, and an opened log stays unchanged
/// and can be written to.
pub fn wal_segment(data: &[u8]) {
    thread_local! {
        static SAMPLE: MemVfs = sample();
    }
    let mut choices = Choices(data);
    let disk = SAMPLE.with(MemVfs::image);
    let is_resealed = choices.one_in(2);
    for (number, path) in disk.paths().into_iter().enumerate() {
        disk.tamper(&path, |bytes| {
            choices.damage(bytes);
            if is_resealed {
                reseal(bytes, number as u64);
            }
        });
    }
    let read = Wal::read(&disk, &dir());
    let opened = Wal::open(Arc::new(disk.clone()), &dir(), sizes(u64::MAX));
    let (mut wal, recovered) = match (read, opened) {
        (Ok(read), Ok((wal, recovered))) => {
            assert_eq!(read, recovered, "to read a log and to open it give the same");
            (wal, recovered)
        }
        (Err(Error::Corrupt { offset: one, .. }), Err(Error::Corrupt { offset: other, .. })) => {
            assert_eq!(one, other);
            return;
        }
        (Err(Error::OtherVersion { .. }), Err(Error::OtherVersion { .. })) if is_resealed => return,
        (read, opened) => panic!("{read:?} read, but {:?} opened", opened.map(|(_, it)| it)),
    };
    assert!(recovered.entries.windows(2).all(|pair| pair[1].index == pair[0].index + 1));
    let (_, again) = Wal::open(Arc::new(disk.clone()), &dir(), sizes(u64::MAX)).unwrap();
    assert_eq!(again, Recovered { cut: None, ..recovered.clone() }, "opened a second time");
    // A bit flipped by the disk is damage. Nonsense under a correct checksum is not something a
    // disk does.
    if !is_resealed {
        let started = Member::start(&config(1, 1), &disk, &Transcript::default());
        if let Ok(mut member) = started {
            (0..25).for_each(|_| member.tick().unwrap());
        }
        return;
    }
    let newest = recovered.marks.iter().map(|mark| mark.index).max().unwrap_or(0);
    let next = recovered.last_index().saturating_add(1);
    if next > newest && next < u64::MAX {
        wal.save(&Frame { entries: &[entry(next, 9, vec![9])], ..Frame::default() }).unwrap();
        let longer = Wal::read(&disk, &dir()).unwrap();
        assert_eq!(longer.entries.last(), Some(&entry(next, 9, vec![9])));
        assert!(longer.entries.starts_with(&recovered.entries));
    }
}

/// A simple model of a log's contents.
#[derive(Clone, Debug, Default)]
struct Model {
    entries: BTreeMap<u64, Entry>,
    /// The last index before the first entry.
    base: u64,
    marks: Vec<SnapshotId>,
    incarnations: BTreeMap<u64, u64>,
    hard_state: HardState,
    term: u64,
}

impl Model {
    fn last(&self) -> u64 {
        self.entries.last_key_value().map_or(self.base, |(index, _)| *index)
    }

    fn newest_mark(&self) -> u64 {
        self.marks.last().map_or(0, |mark| mark.index)
    }

    /// True if a log has these contents. A purge may have removed entries up to the newest mark,
    /// and older marks.
    fn agrees_with(&self, recovered: &Recovered) -> bool {
        let newest_two = &self.marks[self.marks.len().saturating_sub(2)..];
        let first = recovered.entries.first().map_or(self.last() + 1, |entry| entry.index);
        let held = self.entries.range(first..).map(|(_, entry)| entry);
        recovered.hard_state == self.hard_state
            && recovered.incarnations == self.incarnations
            && recovered.marks.ends_with(newest_two)
            && recovered.entries.iter().eq(held)
            && (first <= self.base + 1 || first <= self.newest_mark() + 1)
    }

    /// Applies one operation to the model, and to `wal` through `save`.
    fn operate(&mut self, choices: &mut Choices<'_>, wal: &mut Wal) -> Result<()> {
        match choices.below(8) {
            // Entries of a later term that replace some of the last ones.
            0..3 => {
                let floor = self.newest_mark().max(self.base);
                let back = choices.below(6) as u64;
                let first = (self.last() + 1).saturating_sub(back).max(floor + 1);
                self.term += u64::from(first <= self.last());
                let bytes = choices.below(256) * choices.below(8);
                let new: Vec<_> = (first..first + 1 + choices.below(4) as u64)
                    .map(|index| entry(index, self.term, vec![index as u8; bytes]))
                    .collect();
                self.entries.split_off(&first);
                self.entries.extend(new.iter().map(|entry| (entry.index, entry.clone())));
                wal.save(&Frame { entries: &new, ..Frame::default() })
            }
            3 => {
                self.term += 1;
                self.hard_state.term = self.term;
                self.hard_state.commit = self.newest_mark();
                let hard_state = self.hard_state.clone();
                wal.save(&Frame { hard_state: Some(&hard_state), ..Frame::default() })
            }
            4 => {
                let heard = (1 + choices.below(9) as u64, u64::from(choices.byte()));
                self.incarnations.insert(heard.0, heard.1);
                wal.save(&Frame { incarnations: &[heard], ..Frame::default() })
            }
            5 => {
                self.term += 1;
                let index = self.newest_mark() + 1 + choices.below(9) as u64;
                let mark = SnapshotId { index, term: self.term };
                self.marks.push(mark);
                self.entries.clear();
                self.base = index;
                wal.save(&Frame { installed: Some(mark), ..Frame::default() })
            }
            6 => {
                let index = (self.newest_mark() + 1 + choices.below(9) as u64).min(self.last());
                let Some(held) = self.entries.get(&index) else { return Ok(()) };
                if index <= self.newest_mark() {
                    return Ok(());
                }
                let mark = SnapshotId { index, term: held.term };
                self.marks.push(mark);
                wal.save(&Frame { made: Some(mark), ..Frame::default() })
            }
            _ => wal.purge(self.newest_mark().saturating_sub(choices.below(4) as u64)),
        }
    }
}

/// Whatever the operations, and wherever the process dies, the log equals the model: after the last
/// operation, or before it if that one was not confirmed.
pub fn wal_operations(data: &[u8]) {
    let mut choices = Choices(data);
    let mut disk = MemVfs::default();
    let sizes = sizes(1 + 100 * choices.below(32) as u64);
    let mut wal = Wal::create(Arc::new(disk.clone()), &dir(), &identity(), sizes).unwrap();
    let mut model = Model { term: 1, ..Model::default() };
    while !choices.is_empty() {
        let dies = choices.one_in(4);
        if dies {
            disk.inject(1 + choices.below(6) as u64, Fault::Crash);
        }
        let before = model.clone();
        let done = model.operate(&mut choices, &mut wal);
        assert!(dies || done.is_ok(), "{done:?}");
        let read = || Wal::read(&disk, &dir());
        if done.is_ok() && !disk.fault_happened() {
            assert!(model.agrees_with(&read().unwrap()), "{model:?} is not {:?}", read());
        }
        if !dies && !choices.one_in(6) {
            continue;
        }
        drop(wal);
        disk = disk.crash(match choices.below(3) {
            0 => Survives::Nothing,
            1 => Survives::Everything,
            _ => Survives::Some(choices.short() as u64),
        });
        let (opened, recovered) = Wal::open(Arc::new(disk.clone()), &dir(), sizes).unwrap();
        if done.is_err() && !model.agrees_with(&recovered) {
            model = before;
        }
        assert!(model.agrees_with(&recovered), "{model:?} is not {recovered:?}");
        wal = opened;
    }
}

// ---------------------------------------------------------------------------------------------
// Snapshots and the state machine

fn new_store() -> CommitReader<Keys> {
    KvStore::new(&NodeConfig::default(), closed(), logs::discard()).1
}

/// The application bytes of a snapshot of the store.
fn state_bytes(store: &mut CommitReader<Keys>) -> Vec<u8> {
    let (bytes_tx, bytes_rx) = std::sync::mpsc::channel();
    let save = Box::new(move |body: SnapshotBody<'_>| {
        let mut bytes = Vec::new();
        body(&mut bytes).unwrap();
        bytes_tx.send(bytes).unwrap();
    });
    store.handle(Commit::Snapshot(SnapshotRequest { index: 0, save })).unwrap();
    bytes_rx.recv().unwrap()
}

fn restored(bytes: Vec<u8>) -> Result<CommitReader<Keys>> {
    let mut store = new_store();
    let reader = Box::new(std::io::Cursor::new(bytes));
    store.handle(Commit::Restore(SnapshotRestore { index: 1, term: 1, reader }))?;
    Ok(store)
}

/// Recomputes the checksums of a damaged snapshot. See `storage/snapshotter.rs` for the format.
fn reseal_snapshot(file: &mut [u8]) {
    const FIXED: usize = 32;
    const TRAILER: usize = 12;
    let masked = |bytes: &[u8]| {
        crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
    };
    if file.len() < FIXED + 4 + TRAILER {
        return;
    }
    let field: [u8; 4] = file[12..16].try_into().expect("four bytes");
    let header = FIXED + u32::from_le_bytes(field) as usize;
    let length = file.len();
    if header + 4 + TRAILER > length {
        return;
    }
    let checksum = masked(&file[..header]);
    file[header..header + 4].copy_from_slice(&checksum);
    let application = (length - TRAILER - header - 4) as u64;
    file[length - TRAILER..length - 4].copy_from_slice(&application.to_le_bytes());
    let checksum = masked(&file[..length - 4]);
    file[length - 4..].copy_from_slice(&checksum);
}

/// A damaged snapshot is refused by the member that made it and by a receiver. An accepted one has
/// whole records or none, which read back unchanged.
pub fn snapshot_file(data: &[u8]) {
    let mut choices = Choices(data);
    let mark = SnapshotId { index: 20, term: 3 };
    let disk = MemVfs::default();
    let path = Path::new(DATA).join("snap");
    let snapshotter = Snapshotter::new(Arc::new(disk.clone()), &path).unwrap();
    let mut written = EMPTY_STATE.to_vec();
    for number in 0..choices.below(5) as u64 {
        let (key, value) = (choices.bytes(), choices.bytes());
        let record = codec::encode(&StateRecord { key, value, index: number, term: 1 });
        written.extend((record.len() as u32).to_le_bytes());
        written.extend(record);
    }
    if choices.one_in(4) {
        choices.damage(&mut written);
    }
    snapshotter.create(mark, choices.bytes(), |out| out.write_all(&written)).unwrap();
    let file = disk.paths().pop().unwrap();
    let whole = disk.contents(&file);
    let is_resealed = choices.one_in(2);
    disk.tamper(&file, |bytes| {
        choices.damage(bytes);
        if is_resealed {
            reseal_snapshot(bytes);
        }
    });
    let bytes = disk.contents(&file);

    let loaded = snapshotter.load(mark);
    assert!(loaded.is_ok() || bytes != whole, "it is as it was written");
    assert!(loaded.is_err() || bytes == whole || is_resealed, "its damage was not seen");
    let elsewhere = Snapshotter::new(Arc::new(MemVfs::default()), &path).unwrap();
    let announced = SnapshotFile { length: bytes.len() as u64, checksum: crc32c::crc32c(&bytes) };
    let mut receiver = elsewhere.receive(mark.index, mark.term, announced).unwrap();
    for piece in bytes.chunks(1 + choices.short()) {
        receiver.write(piece).unwrap();
    }
    let received = receiver.finish().unwrap();
    let snapshot = match loaded {
        Ok(snapshot) => snapshot,
        Err(Error::Corrupt { .. } | Error::OtherVersion { .. }) => {
            assert!(matches!(received, Received::Refused(_)), "{received:?}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    assert_eq!(received, Received::Kept);
    assert_eq!(snapshot.file, announced);
    let (meta, _) = elsewhere.open_received(mark).unwrap();
    assert_eq!(meta, snapshot.meta);
    let mut application = Vec::new();
    snapshot.reader.take(1 << 20).read_to_end(&mut application).unwrap();
    let Ok(mut store) = restored(application) else { return };
    let state = state_bytes(&mut store);
    assert!(state_bytes(&mut restored(state.clone()).unwrap()) == state);
}

/// Every payload is applied or skipped alike by every store, and a store restored from a snapshot
/// continues like the one that made it.
pub fn commands(data: &[u8]) {
    let mut choices = Choices(data);
    let mut stores = vec![new_store(), new_store()];
    let mut index = 0;
    while !choices.is_empty() && index < 50 {
        let mut payload = match choices.below(4) {
            0 => choices.bytes().to_vec(),
            _ => {
                let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
                put(&text(choices.bytes()), &text(choices.bytes()))
            }
        };
        if choices.one_in(3) {
            choices.damage(&mut payload);
        }
        index += 1;
        for store in &mut stores {
            let data = Bytes::from(payload.clone());
            let entries = vec![CommittedEntry { index, term: 1, data, responder: None }];
            store
                .handle(Commit::Entries {
                    entries,
                    applied: BacklogPermit::new(0, &Arc::default()),
                })
                .unwrap();
        }
        if choices.one_in(8) {
            let state = state_bytes(&mut stores[0]);
            stores.push(restored(state).unwrap());
        }
    }
    let state = state_bytes(&mut stores[0]);
    assert!(stores.iter_mut().all(|store| state_bytes(store) == state));
}
