mod pinned;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use raft::eraftpb::EntryType;
use tempfile::TempDir;

use super::format::{Salt, VERSION};
use super::reader::{Segment, replay_log};
use super::replay::Summary;
use super::writer::create_segment;
use super::*;
use crate::error::{Error, Result};
use crate::storage::failing::FailingVfs;
use crate::storage::{DiskVfs, Vfs, VfsFile};

fn identity() -> Identity {
    Identity { cluster_id: 0, member_id: 3, incarnation: 0x1234_5678, first_urls_hash: 9 }
}

fn entry(index: u64, term: u64, data: impl Into<Bytes>) -> Entry {
    Entry { index, term, data: data.into(), ..Entry::default() }
}

/// Entries of one term. The data of each is its index and term.
fn entries(indexes: std::ops::RangeInclusive<u64>, term: u64) -> Vec<Entry> {
    indexes.map(|index| entry(index, term, format!("entry {index} of term {term}"))).collect()
}

fn hard_state(term: u64, vote: u64, commit: u64) -> HardState {
    HardState { term, vote, commit, ..HardState::default() }
}

fn mark(index: u64, term: u64) -> SnapshotId {
    SnapshotId { index, term }
}

const STEP_BYTES: u64 = 1024;

fn sizes(segment_bytes: u64) -> Sizes {
    Sizes { segment_bytes, step_bytes: STEP_BYTES }
}

fn create(dir: &Path) -> Wal {
    create_with(dir, SEGMENT_BYTES)
}

fn create_with(dir: &Path, segment_bytes: u64) -> Wal {
    Wal::create(FailingVfs::sound(), dir, &identity(), sizes(segment_bytes)).expect("a new log")
}

fn open(dir: &Path) -> Result<(Wal, Recovered)> {
    Wal::open(FailingVfs::sound(), dir, sizes(SEGMENT_BYTES))
}

fn recover(dir: &Path) -> Recovered {
    let before = Wal::read(&DiskVfs, dir).expect("a sound log");
    let (_, recovered) = open(dir).expect("a sound log");
    assert_eq!(before, recovered, "read and open return the same");
    recovered
}

fn save_entries(wal: &mut Wal, entries: &[Entry]) {
    wal.save(&Frame { entries, ..Frame::default() }).expect("saved");
}

fn indexes_and_terms(recovered: &Recovered) -> Vec<(u64, u64)> {
    recovered.entries.iter().map(|entry| (entry.index, entry.term)).collect()
}

fn segment_path(dir: &Path, number: u64) -> PathBuf {
    Segment { number, ..Segment::default() }.path(dir)
}

fn length_of(dir: &Path, number: u64) -> u64 {
    fs::metadata(segment_path(dir, number)).expect("a segment").len()
}

fn remove(dir: &Path, number: u64) {
    fs::remove_file(segment_path(dir, number)).expect("removed");
}

fn names(dir: &Path) -> Vec<String> {
    DiskVfs.list(dir).expect("a directory")
}

/// The damage that open and read report for the log in `dir`.
fn damage_of(dir: &Path) -> (PathBuf, u64, String) {
    assert!(matches!(Wal::read(&DiskVfs, dir), Err(Error::Corrupt { .. })));
    match open(dir).err().expect("damage") {
        Error::Corrupt { path, offset, reason, .. } => (path, offset, reason),
        other => panic!("{other}"),
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

/// `frames` and the zeros that follow them in the file of a last segment.
fn allocated(frames: &[u8]) -> Vec<u8> {
    let mut bytes = frames.to_vec();
    bytes.resize((bytes.len() + format::CLOSE_BYTES as usize).next_multiple_of(1024), 0);
    bytes
}

/// A log of one segment: its frames, the end of each frame, and the state after each frame.
struct Sample {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    states: Vec<Recovered>,
}

impl Sample {
    /// Several KB in five frames after the head. One frame has a value of 1,024 zeros.
    fn new() -> Self {
        let dir = TempDir::new().expect("a directory");
        let mut wal = create(dir.path());
        let mut conf_change = entry(2, 1, "change");
        conf_change.entry_type = EntryType::EntryConfChangeV2;
        conf_change.context = Bytes::from_static(b"http://127.0.0.1:9021");
        let known = Identity { cluster_id: 77, ..identity() };
        let frames = [
            Frame {
                identity: Some(&known),
                incarnations: &[(1, 11), (2, 22)],
                entries: &[entry(1, 1, ""), conf_change],
                hard_state: Some(&hard_state(1, 3, 2)),
                ..Frame::default()
            },
            Frame { entries: &[entry(3, 1, vec![0; 1024])], ..Frame::default() },
            Frame { entries: &entries(4..=8, 2), made: Some(mark(2, 1)), ..Frame::default() },
            Frame { entries: &entries(6..=9, 3), ..Frame::default() },
            Frame {
                entries: &[entry(10, 3, vec![0; 1500]), entry(11, 3, vec![b'x'; 700])],
                hard_state: Some(&hard_state(4, 0, 8)),
                ..Frame::default()
            },
        ];
        let mut ends = vec![wal.bytes() as usize];
        let mut states = vec![recover(dir.path())];
        for frame in frames {
            wal.save(&frame).expect("saved");
            ends.push(wal.bytes() as usize);
            states.push(recover(dir.path()));
        }
        let mut bytes = fs::read(segment_path(dir.path(), 0)).expect("the segment");
        assert!(is_zero(&bytes.split_off(ends[ends.len() - 1])));
        Self { bytes, ends, states }
    }

    /// A directory in which the segment holds `bytes`.
    fn replaced(bytes: &[u8]) -> TempDir {
        let dir = TempDir::new().expect("a directory");
        fs::write(segment_path(dir.path(), 0), bytes).expect("written");
        dir
    }

    /// Asserts that open cuts the log with `bytes` to its first `frames` frames, reports the cut unless
    /// only zeros follow them, and leaves a sound log in a file that is no shorter.
    fn assert_cut(&self, bytes: &[u8], frames: usize) {
        let dir = Self::replaced(bytes);
        let path = segment_path(dir.path(), 0);
        let end = self.ends[frames];
        let is_torn = !is_zero(&bytes[end..]);
        let cut = is_torn.then(|| (path.clone(), end as u64));
        let expected = Recovered { cut, ..self.states[frames].clone() };
        assert_eq!(Wal::read(&DiskVfs, dir.path()).expect("a torn log"), expected);
        let (mut wal, recovered) = open(dir.path()).expect("a torn log");
        assert_eq!(recovered, expected);
        let file = fs::read(&path).expect("the segment");
        assert!(file[..end] == self.bytes[..end] && is_zero(&file[end..]));
        assert!(file.len() >= bytes.len() && file.len().is_multiple_of(1024), "{}", file.len());
        assert_eq!(recover(dir.path()), self.states[frames]);

        let next = expected.last_index() + 1;
        save_entries(&mut wal, &entries(next..=next, 9));
        let mut longer = self.states[frames].clone();
        longer.entries.extend(entries(next..=next, 9));
        assert_eq!(recover(dir.path()), longer);
    }
}

/// As after a restore.
#[test]
fn a_log_that_begins_with_a_snapshot_continues_after_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let identity = Identity { cluster_id: 7, member_id: 2, incarnation: 9, first_urls_hash: 8 };
    let mark = SnapshotId { index: 5000, term: 4 };
    let hard_state = HardState { term: 4, vote: 0, commit: 5000, ..HardState::default() };
    let vfs = || Arc::new(DiskVfs);
    let restored =
        Frame { installed: Some(mark), hard_state: Some(&hard_state), ..Frame::default() };
    let created = Wal::create(vfs(), dir.path(), &identity, Sizes::default());
    created.expect("an empty directory").save(&restored).expect("saved");
    let expected = Recovered {
        identity: identity.clone(),
        incarnations: BTreeMap::new(),
        quarantine: 0,
        marks: vec![mark],
        entries: Vec::new(),
        hard_state: hard_state.clone(),
        base: 5000,
        cut: None,
    };
    assert_eq!(Wal::read(&DiskVfs, dir.path()).expect("a sound log"), expected);
    let (mut wal, recovered) = Wal::open(vfs(), dir.path(), Sizes::default()).expect("a sound log");
    assert_eq!(recovered, expected);
    let entry = Entry { index: 5001, term: 5, ..Entry::default() };
    wal.save(&Frame { entries: &[entry], ..Frame::default() }).expect("saved");
    drop(wal);
    let (_, recovered) = Wal::open(vfs(), dir.path(), Sizes::default()).expect("a sound log");
    assert_eq!((recovered.base, recovered.last_index()), (5000, 5001));
    assert!(Wal::create(vfs(), dir.path(), &identity, Sizes::default()).is_err(), "there is a log");
}

#[test]
fn a_saved_frame_is_recovered() {
    let parent = TempDir::new().expect("a directory");
    let dir = parent.path().join("raftexample-3");
    assert!(!exists(&DiskVfs, &dir).expect("listed"));
    let mut wal =
        Wal::create(Arc::new(DiskVfs), &dir, &identity(), Sizes::default()).expect("a new log");
    assert!(exists(&DiskVfs, &dir).expect("listed"));
    let mut conf_change = entry(2, 1, "change");
    conf_change.entry_type = EntryType::EntryConfChange;
    conf_change.context = Bytes::from_static(b"context");
    let frame = Frame {
        incarnations: &[(1, 10), (2, 20)],
        entries: &[entry(1, 1, ""), conf_change],
        hard_state: Some(&hard_state(1, 2, 2)),
        ..Frame::default()
    };
    wal.save(&frame).expect("saved");
    let known = Identity { cluster_id: 5, ..identity() };
    let frame = Frame { identity: Some(&known), made: Some(mark(2, 1)), ..Frame::default() };
    wal.save(&frame).expect("saved");
    let (wal, recovered) =
        Wal::open(Arc::new(DiskVfs), &dir, Sizes::default()).expect("a sound log");
    assert_eq!(recovered.identity, known);
    assert_eq!(recovered.incarnations, BTreeMap::from([(1, 10), (2, 20)]));
    assert_eq!(recovered.marks, [mark(2, 1)]);
    assert_eq!(recovered.entries[1].context, "context");
    assert_eq!(recovered.entries[1].entry_type, EntryType::EntryConfChange);
    assert_eq!(indexes_and_terms(&recovered), [(1, 1), (2, 1)]);
    assert_eq!(recovered.hard_state, hard_state(1, 2, 2));
    assert_eq!((recovered.base, recovered.last_index()), (0, 2));
    assert_eq!(recovered.cut, None);
    assert!(wal.bytes() < length_of(&dir, 0), "the zeros do not count");
}

#[test]
fn a_new_log_holds_its_identity_and_nothing_else() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path());
    wal.save(&Frame::default()).expect("nothing to save");
    let recovered = recover(dir.path());
    assert_eq!(recovered.identity, identity());
    assert_eq!((recovered.base, recovered.last_index()), (0, 0));
    assert_eq!(recovered.hard_state, HardState::default());
    assert_eq!(wal.bytes(), wal.current().head_length, "an empty frame writes nothing");
}

#[test]
fn create_refuses_a_directory_with_a_log() {
    let dir = TempDir::new().expect("a directory");
    create(dir.path());
    let error = Wal::create(FailingVfs::sound(), dir.path(), &identity(), Sizes::default())
        .err()
        .expect("refused");
    assert!(error.to_string().contains("already holds a log"), "{error}");
}

#[test]
fn an_entry_replaces_all_entries_from_its_index_on() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path());
    save_entries(&mut wal, &entries(1..=9, 1));
    save_entries(&mut wal, &entries(4..=5, 2));
    assert_eq!(indexes_and_terms(&recover(dir.path())), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]);
    save_entries(&mut wal, &entries(1..=1, 3));
    assert_eq!(indexes_and_terms(&recover(dir.path())), [(1, 3)]);
}

#[test]
fn etcd_22442_an_entry_below_the_snapshot_still_truncates() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path());
    save_entries(&mut wal, &entries(1..=10, 1));
    // Drops entries 9 and 10. The later snapshot contains the entries that replace them.
    save_entries(&mut wal, &entries(6..=8, 2));
    wal.save(&Frame { made: Some(mark(8, 2)), ..Frame::default() }).expect("saved");
    let recovered = recover(dir.path());
    assert_eq!(recovered.last_index(), 8);
    assert_eq!(indexes_and_terms(&recovered)[5..], [(6, 2), (7, 2), (8, 2)]);
}

#[test]
fn etcd_22442_a_received_snapshot_drops_the_log() {
    for snapshot in [mark(4, 2), mark(10, 2), mark(50, 2)] {
        let dir = TempDir::new().expect("a directory");
        let mut wal = create(dir.path());
        save_entries(&mut wal, &entries(1..=10, 1));
        wal.save(&Frame { installed: Some(snapshot), ..Frame::default() }).expect("saved");
        let recovered = recover(dir.path());
        assert_eq!(indexes_and_terms(&recovered), []);
        assert_eq!(recovered.last_index(), snapshot.index);
        assert_eq!(recovered.marks, [snapshot]);
        let next = snapshot.index + 1;
        save_entries(&mut wal, &entries(next..=next, 2));
        assert_eq!(indexes_and_terms(&recover(dir.path())), [(next, 2)]);
    }
}

#[test]
fn etcd_22442_a_received_snapshot_drops_a_purged_logs_tail() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create_with(dir.path(), 600);
    // The first segment ends within entries that were never committed.
    let mut next = 1;
    while wal.segments.len() < 2 {
        save_entries(&mut wal, &entries(next..=next, 1));
        next += 1;
    }
    save_entries(&mut wal, &entries(next..=next + 2, 1));
    // The snapshot's index is the last index of the first segment. So after the purge, the
    // remaining entries are above the snapshot.
    let snapshot = mark(next - 2, 2);
    assert_eq!(wal.segments[0].highest_index, snapshot.index);
    wal.save(&Frame { installed: Some(snapshot), ..Frame::default() }).expect("saved");
    wal.purge(snapshot.index).expect("purged");
    assert_eq!(names(dir.path()), ["0000000000000001.wal"]);
    let recovered = recover(dir.path());
    assert_eq!(indexes_and_terms(&recovered), []);
    assert_eq!(recovered.base, snapshot.index);
}

#[test]
fn a_mark_repeated_in_heads_leaves_the_entries_alone() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create_with(dir.path(), 1);
    wal.save(&Frame { installed: Some(mark(5, 1)), ..Frame::default() }).expect("saved");
    for index in 6..=12 {
        save_entries(&mut wal, &entries(index..=index, 2));
        if index % 3 == 0 {
            wal.save(&Frame { made: Some(mark(index, 2)), ..Frame::default() }).expect("saved");
        }
    }
    // The log may name an older snapshot after a newer one.
    wal.save(&Frame { made: Some(mark(8, 2)), ..Frame::default() }).expect("saved");
    save_entries(&mut wal, &entries(13..=13, 2));
    let recovered = recover(dir.path());
    assert_eq!((recovered.base, recovered.last_index()), (5, 13));
    assert_eq!(recovered.entries.len(), 8);
    assert_eq!(recovered.marks, [mark(5, 1), mark(6, 2), mark(8, 2), mark(9, 2), mark(12, 2)]);
}

#[test]
fn a_log_is_cut_into_segments_and_read_across_them() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create_with(dir.path(), 1000);
    let known = Identity { cluster_id: 5, ..identity() };
    let frame = Frame { identity: Some(&known), incarnations: &[(1, 10)], ..Frame::default() };
    wal.save(&frame).expect("saved");
    for index in 1..=40 {
        let frame = Frame {
            entries: &entries(index..=index, 1),
            hard_state: Some(&hard_state(1, 1, index)),
            ..Frame::default()
        };
        wal.save(&frame).expect("saved");
        if index == 20 {
            wal = Wal::open(FailingVfs::sound(), dir.path(), sizes(1000)).expect("a sound log").0;
        }
    }
    // Longer than a segment, so it has a segment of its own.
    save_entries(&mut wal, &[entry(41, 1, vec![7; 5000])]);
    save_entries(&mut wal, &entries(42..=42, 1));
    let recovered = recover(dir.path());
    let on_disk: Vec<u64> = names(dir.path())
        .iter()
        .map(|name| fs::metadata(dir.path().join(name)).expect("a segment").len())
        .collect();
    assert!(on_disk.len() > 5, "{on_disk:?}");
    let (last, closed) = on_disk.split_last().expect("a segment");
    assert_eq!(closed.iter().filter(|&&length| length > 1000).count(), 1);
    assert_eq!(wal.bytes(), closed.iter().sum::<u64>() + wal.current().length);
    assert!(wal.current().length < *last);
    assert_eq!(recovered.identity, known);
    assert_eq!(recovered.incarnations, BTreeMap::from([(1, 10)]));
    assert_eq!(recovered.hard_state, hard_state(1, 1, 40));
    assert_eq!(recovered.entries[..40], entries(1..=40, 1));
    assert_eq!(recovered.entries[40].data.len(), 5000);
    assert_eq!(recovered.last_index(), 42);
}

#[test]
fn the_last_segment_grows_in_whole_steps_before_frames_use_them() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create_with(dir.path(), 4096);
    let mut grown = 0;
    for index in 1..=80_u64 {
        let Segment { number, .. } = *wal.current();
        let before = wal.allocated;
        let value = vec![b'x'; if index % 20 == 0 { 1500 } else { 60 }];
        save_entries(&mut wal, &[entry(index, 1, value)]);
        let current = *wal.current();
        let file = length_of(dir.path(), current.number);
        assert_eq!(file, wal.allocated);
        assert!(file.is_multiple_of(STEP_BYTES) && !current.length.is_multiple_of(STEP_BYTES));
        assert!(current.length + format::CLOSE_BYTES <= file, "{current:?}, {file}");
        let bytes = fs::read(segment_path(dir.path(), current.number)).expect("the segment");
        assert!(is_zero(&bytes[current.length as usize..]));
        grown += u32::from(file != before || current.number != number);
        for closed in &wal.segments[..current.number as usize] {
            assert_eq!(closed.length, length_of(dir.path(), closed.number));
        }
    }
    assert!(wal.current().number >= 3 && grown < 30, "{} {grown}", wal.current().number);
    let (_, recovered) = open(dir.path()).expect("a sound log");
    assert_eq!((recovered.last_index(), recovered.cut), (80, None));
}

#[test]
fn a_head_excludes_the_frame_that_needed_the_segment() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create_with(dir.path(), 1);
    save_entries(&mut wal, &entries(1..=1, 1));
    let frame = Frame {
        entries: &entries(2..=2, 5),
        hard_state: Some(&hard_state(5, 3, 1)),
        ..Frame::default()
    };
    wal.save(&frame).expect("saved");
    // A crash after the new segment was created and before its frame was written.
    leave_head(dir.path(), 1);
    let recovered = recover(dir.path());
    assert_eq!(recovered.hard_state, HardState::default());
    assert_eq!(recovered.last_index(), 1);
    assert_eq!(recovered.cut, None);
}

#[test]
fn a_purge_keeps_all_that_is_needed() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create_with(dir.path(), 700);
    let known = Identity { cluster_id: 5, ..identity() };
    let frame = Frame { identity: Some(&known), incarnations: &[(1, 10)], ..Frame::default() };
    wal.save(&frame).expect("saved");
    for index in 1..=60 {
        let made = (index % 10 == 0).then(|| mark(index - 5, 1));
        let state = hard_state(1, 2, index - 1);
        let hard_state = (index == 3).then_some(&state);
        let entries = entries(index..=index, 1);
        wal.save(&Frame { entries: &entries, made, hard_state, ..Frame::default() })
            .expect("saved");
    }
    let bytes = wal.bytes();
    wal.purge(45).expect("purged");
    assert!(wal.bytes() < bytes / 2);
    let recovered = recover(dir.path());
    assert_eq!(wal.segments.len(), names(dir.path()).len());
    let base = recovered.base;
    assert!(base > 30 && base <= 45, "all entries above 45 remain, and few below: {base}");
    assert_eq!(recovered.entries, entries(base + 1..=60, 1));
    assert_eq!(recovered.identity, known);
    assert_eq!(recovered.incarnations, BTreeMap::from([(1, 10)]));
    assert_eq!(recovered.hard_state, hard_state(1, 2, 2));
    assert_eq!(recovered.marks[recovered.marks.len() - 2..], [mark(45, 1), mark(55, 1)]);
    let mut wal = open(dir.path()).expect("a sound log").0;
    wal.purge(55).expect("purged");
    save_entries(&mut wal, &entries(61..=61, 1));
    assert_eq!(recover(dir.path()).last_index(), 61);
}

#[test]
fn an_entry_may_be_below_the_base_after_a_purge() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create_with(dir.path(), 1);
    save_entries(&mut wal, &entries(1..=9, 1));
    save_entries(&mut wal, &entries(10..=12, 1));
    save_entries(&mut wal, &entries(8..=20, 2));
    wal.save(&Frame { made: Some(mark(9, 2)), ..Frame::default() }).expect("saved");
    wal.purge(9).expect("purged");
    assert_eq!(names(dir.path())[0], "0000000000000001.wal");
    let recovered = recover(dir.path());
    assert_eq!(recovered.base, 7);
    assert_eq!(recovered.entries, entries(8..=20, 2));
}

#[test]
fn a_write_that_stops_anywhere_leaves_the_complete_frames() {
    let sample = Sample::new();
    let path = Path::new("0000000000000000.wal");
    for length in (sample.ends[0]..sample.bytes.len()).rev() {
        let mut bytes = allocated(&sample.bytes);
        bytes[length..].fill(0);
        let frames = sample.ends.iter().rposition(|&end| end <= length).expect("the head");
        let end = sample.ends[frames];
        let dir = Sample::replaced(&bytes);
        let cut = (!is_zero(&bytes[end..])).then(|| (dir.path().join(path), end as u64));
        let expected = Recovered { cut, ..sample.states[frames].clone() };
        assert_eq!(Wal::read(&DiskVfs, dir.path()).expect("a torn log"), expected, "{length}");
        // Opening needs syncs, so only some lengths are opened. Some growth may have arrived, too.
        if length % 211 == 0 {
            for zeros in [0, 700] {
                sample.assert_cut(&[&bytes[..], &vec![0; zeros]].concat(), frames);
            }
        }
    }
}

#[test]
fn a_torn_frame_stays_one_while_zeros_replace_it() {
    let sample = Sample::new();
    let frames = sample.ends.len() - 2;
    let start = sample.ends[frames];
    // Where the write of the frame stopped, and where the first zeros over it did.
    let torn = start + 900;
    let from = start + format::HEADER_BYTES;
    for stop in from..=torn {
        let mut bytes = allocated(&sample.bytes);
        bytes[torn..].fill(0);
        bytes[from..stop].fill(0);
        let dir = Sample::replaced(&bytes);
        let found = Wal::read(&DiskVfs, dir.path()).expect("a torn log");
        assert_eq!(found.entries, sample.states[frames].entries, "{stop}");
    }
}

#[test]
fn a_file_that_was_cut_while_the_member_runs_is_not_extended() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path());
    save_entries(&mut wal, &entries(1..=1, 1));
    let end = wal.bytes();
    save_entries(&mut wal, &entries(2..=4, 1));
    let path = segment_path(dir.path(), 0);
    fs::File::options().write(true).open(&path).expect("opened").set_len(end).expect("cut");
    let entries = [entry(5, 1, vec![b'x'; 3000])];
    let error = wal.save(&Frame { entries: &entries, ..Frame::default() }).expect_err("refused");
    assert!(error.to_string().contains("while the member ran"), "{error}");
    assert_eq!(length_of(dir.path(), 0), end);
    damage_of(dir.path());
}

#[test]
fn a_step_that_no_file_can_grow_by_is_damage() {
    for step_bytes in [0, 1, 8, 16, 40, u64::MAX] {
        let reason = fault_of_head(Head { step_bytes, ..Head::default() });
        assert!(reason.contains("its step is"), "{step_bytes}: {reason}");
    }
}

/// Why a first segment with this head is refused.
fn fault_of_head(head: Head) -> String {
    let mut frame = Vec::new();
    format::begin_frame(&mut frame);
    format::put(&mut frame, &Record::Head(head));
    format::put(&mut frame, &Record::Identity(identity()));
    format::seal_frame(&mut frame, 0, Salt::default());
    let dir = Sample::replaced(&frame);
    damage_of(dir.path()).2
}

#[test]
fn a_last_segment_that_was_cut_short_never_loses_a_frame() {
    let sample = Sample::new();
    let whole = allocated(&sample.bytes);
    let dir = Sample::replaced(&whole);
    let path = segment_path(dir.path(), 0);
    let file = fs::File::options().write(true).open(&path).expect("the segment");
    for length in (0..=whole.len()).rev() {
        file.set_len(length as u64).expect("cut");
        if length < sample.bytes.len().next_multiple_of(1024) {
            let (named, _, reason) = damage_of(dir.path());
            assert_eq!(named, path, "{length} bytes");
            assert!(length < 300 || reason.contains("cut the file short"), "{length}: {reason}");
        } else {
            let all = sample.states.last().expect("a state");
            assert_eq!(&Wal::read(&DiskVfs, dir.path()).expect("a sound log"), all);
        }
    }
}

#[test]
fn a_cut_before_a_frame_is_damage_wherever_the_frames_end() {
    // Each length of the first frame, so that ends and multiples of the step meet in every way.
    for extra in 0..1100 {
        let dir = TempDir::new().expect("a directory");
        let memory = FailingVfs::sound();
        let small = Sizes { step_bytes: 64, ..sizes(SEGMENT_BYTES) };
        let mut wal = Wal::create(memory, dir.path(), &identity(), small).expect("a new log");
        let mut ends = vec![wal.bytes()];
        for (index, length) in (1..).zip([extra, 16, 32, 48]) {
            save_entries(&mut wal, &[entry(index, 1, vec![1; length])]);
            ends.push(wal.bytes());
        }
        let path = segment_path(dir.path(), 0);
        let file = fs::File::options().write(true).open(&path).expect("the segment");
        for &end in ends[..4].iter().rev() {
            file.set_len(end).expect("cut");
            let (_, offset, reason) = damage_of(dir.path());
            assert!(offset <= end && reason.contains("cut the file short"), "{extra}: {reason}");
        }
    }
}

#[test]
fn a_flip_of_any_bit_is_damage() {
    let sample = Sample::new();
    let dir = Sample::replaced(&allocated(&sample.bytes));
    let path = segment_path(dir.path(), 0);
    let file = fs::File::options().write(true).open(&path).expect("the segment");
    for (at, &byte) in sample.bytes.iter().enumerate() {
        let start = sample.ends.iter().rev().find(|&&end| end <= at).map_or(0, |&end| end as u64);
        for bit in 0..8 {
            VfsFile::write_all_at(&file, &[byte ^ (1 << bit)], at as u64).expect("written");
            match Wal::read(&DiskVfs, dir.path()) {
                Err(Error::Corrupt { path: named, offset, .. }) => {
                    assert_eq!((&named, offset), (&path, start), "bit {bit} of byte {at}");
                }
                other => panic!("bit {bit} of byte {at}: {other:?}"),
            }
        }
        VfsFile::write_all_at(&file, &[byte], at as u64).expect("written");
    }
}

#[test]
fn a_flip_of_the_only_bit_in_a_sector_is_damage_too() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path());
    let start = wal.bytes() as usize;
    let mut value = vec![0; 4096];
    value[2048] = 0x10;
    save_entries(&mut wal, &[entry(1, 1, value)]);
    let path = segment_path(dir.path(), 0);
    let mut bytes = fs::read(&path).expect("the segment");
    let at = start + bytes[start..].iter().rposition(|&byte| byte == 0x10).expect("the bit");
    bytes[at] = 0;
    fs::write(&path, &bytes).expect("written");
    let (_, offset, reason) = damage_of(dir.path());
    assert_eq!(offset, start as u64, "{reason}");
}

#[test]
fn a_last_frame_without_any_of_its_sectors_is_cut() {
    let sample = Sample::new();
    let frames = sample.ends.len() - 2;
    let (start, end) = (sample.ends[frames], sample.ends[frames + 1]);
    let sectors: Vec<_> = (start / 512..=(end - 1) / 512)
        .map(|sector| (sector * 512).max(start)..((sector + 1) * 512).min(end))
        .collect();
    assert!(sectors.len() >= 4);
    let mut cuts = 0;
    for lost in 1..1_u32 << sectors.len() {
        let mut bytes = sample.bytes.clone();
        for (position, sector) in sectors.iter().enumerate() {
            if lost & (1 << position) != 0 {
                bytes[sector.clone()].fill(0);
            }
        }
        // Losing only sectors of zeros changes nothing.
        if bytes != sample.bytes {
            for zeros in [0, 16, 5000] {
                sample.assert_cut(&[allocated(&bytes), vec![0; zeros]].concat(), frames);
            }
            cuts += 1;
        }
    }
    assert!(cuts >= 7, "{cuts}");
}

#[test]
fn zeros_after_the_last_frame_are_no_torn_frame() {
    let sample = Sample::new();
    for extra in [1, 15, 16, 17, 512, 5000] {
        let bytes = [allocated(&sample.bytes), vec![0; extra]].concat();
        sample.assert_cut(&bytes, sample.ends.len() - 1);
    }
}

#[test]
fn a_lost_sector_before_the_last_frame_is_damage() {
    let sample = Sample::new();
    for frame in 0..sample.ends.len() - 2 {
        let (start, end) = (sample.ends[frame], sample.ends[frame + 1]);
        let boundary = ((start / 512 + 1) * 512).min(end);
        for lost in [start..boundary, start..end] {
            let mut bytes = sample.bytes.clone();
            bytes[lost].fill(0);
            for zeros in [0, 5000] {
                let dir = Sample::replaced(&[allocated(&bytes), vec![0; zeros]].concat());
                let (path, offset, reason) = damage_of(dir.path());
                assert_eq!((path, offset), (segment_path(dir.path(), 0), start as u64), "{reason}");
            }
        }
    }
}

#[test]
fn a_value_that_looks_like_a_frame_is_not_taken_for_one() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path());
    let start = wal.bytes();
    // A client may know the segment and the offset, but not the incarnation.
    let forged = |at: u64| {
        let mut frame = Vec::new();
        format::begin_frame(&mut frame);
        format::put(&mut frame, &Record::HardState(hard_state(99, 1, 1)));
        format::seal_frame(&mut frame, at, Salt { incarnation: 0, segment: 0 });
        frame
    };
    // The first multiple of 16 after the frame header and the fields of the entry.
    let in_record = format::HEADER_BYTES + 5 + 8 + 8 + 1 + 4;
    let skipped = in_record.next_multiple_of(16) - in_record;
    let mut value = vec![1; skipped];
    while value.len() < 1000 {
        value.extend(forged(start + (in_record + value.len()) as u64));
    }
    save_entries(&mut wal, &[entry(1, 1, value)]);
    let path = segment_path(dir.path(), 0);
    let mut bytes = fs::read(&path).expect("the segment");
    bytes[start as usize..512].fill(0);
    fs::write(&path, &bytes).expect("written");
    let (_, recovered) = open(dir.path()).expect("a torn log");
    assert_eq!(recovered.cut, Some((path, start)));
    assert_eq!(recovered.hard_state, HardState::default());
}

/// A log of four segments.
fn segmented() -> TempDir {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create_with(dir.path(), 1);
    for index in 1..=4 {
        save_entries(&mut wal, &entries(index..=index, 1));
    }
    assert_eq!(names(dir.path()).len(), 4);
    dir
}

#[test]
fn a_missing_segment_is_damage() {
    let dir = segmented();
    remove(dir.path(), 1);
    let (path, _, reason) = damage_of(dir.path());
    assert_eq!(path, segment_path(dir.path(), 1));
    assert!(reason.contains("0000000000000002 exists"), "{reason}");
}

#[test]
fn a_missing_last_segment_is_damage() {
    for count in 1..=3 {
        let dir = segmented();
        (count..=3).for_each(|number| remove(dir.path(), number));
        let (path, _, reason) = damage_of(dir.path());
        assert_eq!(path, segment_path(dir.path(), count));
        let expected = format!("segment {:016x} was closed for it", count - 1);
        assert!(reason.contains(&expected), "{reason}");
    }
}

#[test]
fn a_refused_log_is_left_unchanged() {
    let dir = segmented();
    let (from, to) = (segment_path(dir.path(), 3), dir.path().join("0000000000000003.wal.tmp"));
    fs::rename(&from, &to).expect("renamed");
    damage_of(dir.path());
    fs::rename(&to, &from).expect("the file still exists");
    assert_eq!(recover(dir.path()).last_index(), 4);
}

/// Clears a segment after its head, as a crash before its first frame leaves it.
fn leave_head(dir: &Path, number: u64) {
    let head = {
        let read = replay_log(&DiskVfs, dir).expect("a sound log");
        read.segments[number as usize].head_length
    };
    let path = segment_path(dir, number);
    let mut bytes = fs::read(&path).expect("the segment");
    bytes[head as usize..].fill(0);
    fs::write(path, bytes).expect("written");
}

#[test]
fn open_completes_the_close_before_an_empty_segment() {
    let dir = segmented();
    leave_head(dir.path(), 3);
    let path = segment_path(dir.path(), 2);
    let closed = fs::read(&path).expect("a segment");
    let open_length = closed.len() - format::CLOSE_BYTES as usize;
    for length in open_length..=closed.len() {
        // The zeros after a complete close may be gone already.
        for (zeroed, trimmed) in [(false, false), (true, false), (false, length == closed.len())] {
            let mut bytes = closed[..length].to_vec();
            if zeroed {
                bytes[open_length..].fill(0);
            }
            if !trimmed {
                bytes = allocated(&bytes);
            }
            fs::write(&path, &bytes).expect("written");
            assert_eq!(Wal::read(&DiskVfs, dir.path()).expect("a sound log").last_index(), 3);
            assert!(fs::read(&path).expect("a segment") == bytes, "read changes nothing");
            let (wal, recovered) = open(dir.path()).expect("a sound log");
            assert_eq!((recovered.last_index(), recovered.cut), (3, None));
            assert!(fs::read(&path).expect("a segment") == closed, "{length} bytes");
            let closed: u64 = (0..=2).map(|n| length_of(dir.path(), n)).sum();
            assert_eq!(wal.bytes(), closed + wal.current().head_length);
        }
    }
}

#[test]
fn a_segment_that_is_not_closed_before_frames_is_damage() {
    for number in 0..3 {
        let dir = segmented();
        let path = segment_path(dir.path(), number);
        let closed = fs::read(&path).expect("a segment");
        let open_length = closed.len() - format::CLOSE_BYTES as usize;
        for length in open_length..closed.len() {
            fs::write(&path, &closed[..length]).expect("written");
            let (named, offset, _) = damage_of(dir.path());
            assert_eq!((named, offset), (path.clone(), open_length as u64), "{length} bytes");
        }
        let (end, salt) = (closed.len() as u64, Salt { incarnation: 0x1234_5678, segment: number });
        let mut empty = Vec::new();
        format::begin_frame(&mut empty);
        format::seal_frame(&mut empty, end, salt);
        for tail in [&closed[open_length..], b"x", &empty] {
            fs::write(&path, [&closed, tail].concat()).expect("written");
            let (named, offset, _) = damage_of(dir.path());
            assert_eq!((named, offset), (path.clone(), closed.len() as u64), "{tail:?}");
        }
    }
}

#[test]
fn a_close_is_the_only_record_of_its_frame() {
    for other in [Record::Close, Record::HardState(hard_state(9, 9, 9))] {
        let reason = fault_of(|frame| {
            format::put(frame, &Record::Close);
            format::put(frame, &other);
        });
        assert!(reason.contains("a close shares its frame"), "{reason}");
    }
}

/// The head states the last index, even if the remaining segments hold no entry.
#[test]
fn a_log_without_entries_knows_its_last_index() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create_with(dir.path(), 1);
    save_entries(&mut wal, &entries(1..=4, 1));
    let voted = hard_state(2, 3, 1);
    wal.save(&Frame { hard_state: Some(&voted), ..Frame::default() }).expect("saved");
    remove(dir.path(), 0);
    let recovered = recover(dir.path());
    assert_eq!((recovered.base, recovered.last_index()), (4, 4));
    assert_eq!(recovered.hard_state, voted);
}

#[test]
fn a_head_with_a_wrong_last_index_is_damage() {
    let dir = segmented();
    leave_head(dir.path(), 3);
    let read = replay_log(&DiskVfs, dir.path()).expect("a sound log");
    let closed = read.segments[2];
    let previous = Segment { length: closed.open_length(), closed: false, ..closed };
    let summary = Summary { last_index: 9, ..read.replay.summary };
    create_segment(&DiskVfs, dir.path(), Some(&previous), &summary, 1024).expect("made");
    let (path, offset, reason) = damage_of(dir.path());
    assert_eq!((path, offset), (segment_path(dir.path(), 3), 0));
    assert!(
        reason.contains("the log ended at index 9 when this segment was created, now it ends at 3"),
        "{reason}"
    );
}

#[test]
fn a_directory_without_segments_is_damage() {
    let dir = TempDir::new().expect("a directory");
    damage_of(dir.path());
}

#[test]
fn a_segment_under_another_name_is_damage() {
    let dir = segmented();
    let copy = fs::read(segment_path(dir.path(), 1)).expect("a segment");
    fs::write(segment_path(dir.path(), 2), copy).expect("written");
    let (path, offset, reason) = damage_of(dir.path());
    assert_eq!((path, offset), (segment_path(dir.path(), 2), 0));
    assert!(
        reason.contains("it is segment 0000000000000001, its name says 0000000000000002"),
        "{reason}"
    );
}

#[test]
fn a_segment_of_another_member_is_damage() {
    let dir = segmented();
    let other = TempDir::new().expect("a directory");
    let other_identity = Identity { incarnation: 1, ..identity() };
    let mut wal = Wal::create(FailingVfs::sound(), other.path(), &other_identity, sizes(1))
        .expect("a new log");
    for index in 1..=4 {
        save_entries(&mut wal, &entries(index..=index, 1));
    }
    fs::copy(segment_path(other.path(), 2), segment_path(dir.path(), 2)).expect("copied");
    let (path, _, reason) = damage_of(dir.path());
    assert_eq!(path, segment_path(dir.path(), 2));
    assert!(reason.contains("the log belongs to"), "{reason}");
}

#[test]
fn an_earlier_segment_cut_between_frames_is_damage() {
    let dir = segmented();
    let whole = fs::read(segment_path(dir.path(), 1)).expect("a segment");
    let head = {
        let (wal, _) = open(dir.path()).expect("a sound log");
        wal.segments[1].head_length as usize
    };
    for length in (0..whole.len()).step_by(7).chain([head]) {
        fs::write(segment_path(dir.path(), 1), &whole[..length]).expect("written");
        let (path, ..) = damage_of(dir.path());
        // If complete frames are missing, only the next segment's head shows it.
        let expected = if length == head { 2 } else { 1 };
        assert_eq!(path, segment_path(dir.path(), expected), "{length} bytes");
    }
}

#[test]
fn an_empty_segment_is_damage_even_in_last_place() {
    for number in 0..4 {
        let dir = segmented();
        fs::write(segment_path(dir.path(), number), b"").expect("written");
        let (path, offset, _) = damage_of(dir.path());
        assert_eq!((path, offset), (segment_path(dir.path(), number), 0));
    }
}

#[test]
fn foreign_files_are_ignored_unless_named_like_segments() {
    let dir = segmented();
    fs::write(dir.path().join("LOCK"), b"").expect("written");
    fs::write(dir.path().join("0000000000000004.wal.tmp"), b"half").expect("written");
    fs::write(dir.path().join("notes.tmp"), b"not ours").expect("written");
    assert_eq!(recover(dir.path()).last_index(), 4);
    let left = names(dir.path());
    assert!(!left.contains(&"0000000000000004.wal.tmp".to_owned()));
    assert!(left.contains(&"notes.tmp".to_owned()));
    for name in ["4.wal", "000000000000000A.wal", "0000000000000001 (copy).wal"] {
        let path = dir.path().join(name);
        fs::write(&path, b"").expect("written");
        assert_eq!(damage_of(dir.path()).0, path);
        fs::remove_file(&path).expect("removed");
    }
}

#[test]
fn another_format_version_is_refused_by_name() {
    let dir = TempDir::new().expect("a directory");
    let mut frame = Vec::new();
    format::begin_frame(&mut frame);
    format::put(&mut frame, &Record::Head(Head::default()));
    let at = format::HEADER_BYTES + 5 + 8;
    frame[at] = 5;
    format::seal_frame(&mut frame, 0, Salt::default());
    let path = segment_path(dir.path(), 0);
    fs::write(&path, frame).expect("written");
    let error = open(dir.path()).err().expect("refused").to_string();
    let expected = format!(
        "{} has format version 5, this program reads version {VERSION}: run the release that wrote \
         it",
        path.display()
    );
    assert_eq!(error, expected);
}

/// Writes a frame that no `Wal` writes, and returns the reason for which it is refused.
fn fault_of(put: impl FnOnce(&mut Vec<u8>)) -> String {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path());
    save_entries(&mut wal, &entries(1..=3, 1));
    let frame =
        Frame { installed: Some(mark(5, 1)), entries: &entries(6..=8, 1), ..Frame::default() };
    wal.save(&frame).expect("saved");
    recover(dir.path());
    let mut frame = Vec::new();
    format::begin_frame(&mut frame);
    put(&mut frame);
    let salt = Salt { incarnation: identity().incarnation, segment: 0 };
    format::seal_frame(&mut frame, wal.bytes(), salt);
    let path = segment_path(dir.path(), 0);
    let mut bytes = fs::read(&path).expect("the segment");
    bytes.truncate(wal.bytes() as usize);
    fs::write(&path, allocated(&[bytes, frame].concat())).expect("written");
    let (named, offset, reason) = damage_of(dir.path());
    assert_eq!((named, offset), (path, wal.bytes()));
    reason
}

fn fault_of_record(record: &Record) -> String {
    fault_of(|frame| format::put(frame, record))
}

#[test]
fn a_whole_frame_with_impossible_contents_is_damage() {
    let foreign = Identity { member_id: 4, ..identity() };
    let cases: [(&str, String); 10] = [
        ("entry 10 follows entry 8", fault_of_record(&Record::Entry(entry(10, 1, "")))),
        ("entry 5 would change", fault_of_record(&Record::Entry(entry(5, 1, "")))),
        ("the first entry is 1", fault_of_record(&Record::Entry(entry(0, 1, "")))),
        ("the log ends at 8", fault_of_record(&Record::Mark(mark(9, 1)))),
        ("the entry there has term 1", fault_of_record(&Record::Mark(mark(7, 2)))),
        ("term 2, an earlier mark has term 1", fault_of_record(&Record::Install(mark(5, 2)))),
        ("the log belongs to", fault_of_record(&Record::Identity(foreign))),
        ("not the first record of its segment", fault_of_record(&Record::Head(Head::default()))),
        ("unknown record kind 11", fault_of(|frame| frame.extend_from_slice(&[11, 0, 0, 0, 0]))),
        ("needs 9 more bytes", fault_of(|frame| frame.extend_from_slice(&[7, 9, 0, 0, 0, 1]))),
    ];
    for (expected, reason) in cases {
        assert!(reason.contains(expected), "{expected}: {reason}");
    }
}

/// Runs a log up to the first error. Returns the number of acknowledged entries.
fn live(vfs: Arc<dyn Vfs>, dir: &Path) -> (u64, Result<()>) {
    let mut acknowledged = 0;
    let result = (|| {
        let mut wal = Wal::create(vfs.clone(), dir, &identity(), sizes(1))?;
        for index in 1..=6 {
            wal.save(&Frame { entries: &entries(index..=index, 1), ..Frame::default() })?;
            acknowledged = index;
        }
        wal.save(&Frame { made: Some(mark(4, 1)), ..Frame::default() })?;
        wal.purge(4)?;
        drop(wal);
        Wal::open(vfs, dir, sizes(1))?;
        Ok(())
    })();
    (acknowledged, result)
}

#[test]
fn a_failure_at_any_step_loses_nothing_acknowledged() {
    for operations in 0.. {
        let dir = TempDir::new().expect("a directory");
        let (acknowledged, result) = live(Arc::new(FailingVfs::after(operations)), dir.path());
        if result.is_ok() {
            assert!(operations > 40, "{operations}");
            break;
        }
        assert!(matches!(result, Err(Error::Io { .. })), "{result:?}");
        if exists(&DiskVfs, dir.path()).expect("listed") {
            let last = recover(dir.path()).last_index();
            assert!(last == acknowledged || last == acknowledged + 1, "{last}, {acknowledged}");
        } else {
            assert_eq!(acknowledged, 0);
            create(dir.path());
        }
    }
}

#[test]
fn open_rewrites_and_syncs_the_last_frame_and_the_name() {
    let open_after = |operations: usize| {
        let dir = TempDir::new().expect("a directory");
        save_entries(&mut create(dir.path()), &entries(1..=3, 1));
        Wal::open(Arc::new(FailingVfs::after(operations as u64)), dir.path(), sizes(1))
    };
    let steps = ["write to", "sync", "create", "remove", "sync directory"];
    for (operations, step) in steps.iter().enumerate() {
        let error = open_after(operations).err().expect("an injected failure").to_string();
        assert!(error.starts_with(&format!("cannot {step} /")), "{error}");
    }
    let (_, recovered) = open_after(steps.len()).expect("opened");
    assert_eq!(recovered.entries, entries(1..=3, 1));
}

/// The expected state of a log.
#[derive(Clone, Debug, Default)]
struct Model {
    /// Entry `base + 1` and those after it.
    entries: Vec<Entry>,
    base: u64,
    marks: Vec<SnapshotId>,
    hard_state: HardState,
    term: u64,
}

impl Model {
    fn last(&self) -> u64 {
        self.base + self.entries.len() as u64
    }

    fn newest_mark(&self) -> u64 {
        self.marks.last().map_or(0, |mark| mark.index)
    }

    fn term_at(&self, index: u64) -> u64 {
        self.entries[(index - self.base - 1) as usize].term
    }

    fn assert_recovered(&self, recovered: &Recovered) {
        assert_eq!(recovered.hard_state, self.hard_state);
        assert_eq!(recovered.cut, None);
        let newest_two = &self.marks[self.marks.len().saturating_sub(2)..];
        assert!(recovered.marks.ends_with(newest_two), "{newest_two:?} in {:?}", recovered.marks);
        // A purge may take entries from the front, up to the newest mark.
        assert!(recovered.base >= self.base);
        let dropped = (recovered.base - self.base) as usize;
        assert_eq!(recovered.entries, self.entries[dropped..]);
        assert!(dropped == 0 || self.base + dropped as u64 <= self.newest_mark());
    }
}

#[derive(Clone, Debug)]
enum Operation {
    /// Entries that replace the last `back` entries, with a higher term if there are any.
    Append {
        back: u64,
        count: u64,
        bytes: usize,
    },
    Vote,
    /// A snapshot received, `ahead` of the newest one.
    Install {
        ahead: u64,
    },
    /// A snapshot made, `ahead` of the newest one.
    Make {
        ahead: u64,
    },
    Purge {
        back: u64,
    },
    Reopen,
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        6 => (0..6_u64, 1..5_u64, 0..600_usize)
            .prop_map(|(back, count, bytes)| Operation::Append { back, count, bytes }),
        2 => Just(Operation::Vote),
        1 => (1..9_u64).prop_map(|ahead| Operation::Install { ahead }),
        3 => (1..9_u64).prop_map(|ahead| Operation::Make { ahead }),
        2 => (0..4_u64).prop_map(|back| Operation::Purge { back }),
        2 => Just(Operation::Reopen),
    ]
}

fn carry_out(operation: &Operation, wal: &mut Wal, model: &mut Model) {
    match *operation {
        Operation::Append { back, count, bytes } => {
            let floor = model.newest_mark().max(model.base);
            let first = (model.last() + 1).saturating_sub(back).max(floor + 1);
            model.term += u64::from(first <= model.last());
            let new: Vec<_> = (first..first + count)
                .map(|index| entry(index, model.term, vec![index as u8; bytes]))
                .collect();
            save_entries(wal, &new);
            model.entries.truncate((first - model.base - 1) as usize);
            model.entries.extend(new);
        }
        Operation::Vote => {
            model.term += 1;
            model.hard_state = hard_state(model.term, 1, model.newest_mark());
            let hard_state = Some(&model.hard_state);
            wal.save(&Frame { hard_state, ..Frame::default() }).expect("saved");
        }
        Operation::Install { ahead } => {
            model.term += 1;
            let installed = mark(model.newest_mark() + ahead, model.term);
            let frame = Frame { installed: Some(installed), ..Frame::default() };
            wal.save(&frame).expect("saved");
            model.marks.push(installed);
            model.entries.clear();
            model.base = installed.index;
        }
        Operation::Make { ahead } => {
            let index = (model.newest_mark() + ahead).min(model.last());
            if index > model.newest_mark() {
                let made = mark(index, model.term_at(index));
                wal.save(&Frame { made: Some(made), ..Frame::default() }).expect("saved");
                model.marks.push(made);
            }
        }
        Operation::Purge { back } => {
            wal.purge(model.newest_mark().saturating_sub(back)).expect("purged");
        }
        Operation::Reopen => {
            let dir = wal.dir.clone();
            let (reopened, recovered) =
                Wal::open(FailingVfs::sound(), &dir, wal.sizes).expect("a sound log");
            model.assert_recovered(&recovered);
            *wal = reopened;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_log_agrees_with_a_model_after_any_operations(
        operations in prop::collection::vec(operation(), 1..40),
        segment_bytes in prop_oneof![Just(1), 300..3000_u64],
    ) {
        let dir = TempDir::new().expect("a directory");
        let mut wal = create_with(dir.path(), segment_bytes);
        let mut model = Model { term: 1, ..Model::default() };
        for operation in &operations {
            carry_out(operation, &mut wal, &mut model);
            model.assert_recovered(&Wal::read(&DiskVfs, dir.path()).expect("a sound log"));
        }
    }
}
