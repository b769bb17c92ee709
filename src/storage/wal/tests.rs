use std::fs;

use bytes::Bytes;
use proptest::prelude::*;
use raft::eraftpb::EntryType;
use tempfile::TempDir;

use super::*;
use crate::storage::DiskVfs;
use crate::storage::failing::FailingVfs;

fn identity() -> Identity {
    Identity { cluster_id: 0, member_id: 3, incarnation: 0x1234_5678, first_urls_hash: 9 }
}

fn entry(index: u64, term: u64, data: impl Into<Bytes>) -> Entry {
    Entry { index, term, data: data.into(), ..Entry::default() }
}

/// Entries of one term, each with its index and term for data.
fn entries(indexes: std::ops::RangeInclusive<u64>, term: u64) -> Vec<Entry> {
    indexes.map(|index| entry(index, term, format!("entry {index} of term {term}"))).collect()
}

fn hard_state(term: u64, vote: u64, commit: u64) -> HardState {
    HardState { term, vote, commit, ..HardState::default() }
}

fn mark(index: u64, term: u64) -> SnapshotId {
    SnapshotId { index, term }
}

fn create(dir: &Path) -> Wal {
    Wal::create(FailingVfs::sound(), dir, &identity()).expect("a new log")
}

fn open(dir: &Path) -> Result<(Wal, Recovered)> {
    Wal::open(FailingVfs::sound(), dir)
}

fn recover(dir: &Path) -> Recovered {
    let before = Wal::read(&DiskVfs, dir).expect("a sound log");
    let (_, recovered) = open(dir).expect("a sound log");
    assert_eq!(before, recovered, "to read a log and to open it give the same");
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

/// The damage that keeps the log in `dir` from being opened, and from being read.
fn damage_of(dir: &Path) -> (PathBuf, u64, String) {
    assert!(matches!(Wal::read(&DiskVfs, dir), Err(Error::Corrupt { .. })));
    match open(dir).err().expect("damage") {
        Error::Corrupt { path, offset, reason, .. } => (path, offset, reason),
        other => panic!("{other}"),
    }
}

/// A log of one segment: the file, where each of its frames ends, and what it says after each.
struct Sample {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    states: Vec<Recovered>,
}

impl Sample {
    /// Several KB in five frames behind the head, one of them with a value of 1,024 zeros.
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
        let bytes = fs::read(segment_path(dir.path(), 0)).expect("the segment");
        assert_eq!(ends.last(), Some(&bytes.len()));
        Self { bytes, ends, states }
    }

    /// Puts `bytes` into a directory in place of the log.
    fn replaced(bytes: &[u8]) -> TempDir {
        let dir = TempDir::new().expect("a directory");
        fs::write(segment_path(dir.path(), 0), bytes).expect("written");
        dir
    }

    /// Asserts that the log with `bytes` is cut back to its first `frames` frames, which is told
    /// unless zeros are all that goes, and is sound from then on.
    fn assert_cut(&self, bytes: &[u8], frames: usize) {
        let dir = Self::replaced(bytes);
        let path = segment_path(dir.path(), 0);
        let end = self.ends[frames];
        let is_torn = bytes[end..].iter().any(|&byte| byte != 0);
        let cut = is_torn.then(|| (path.clone(), end as u64));
        let expected = Recovered { cut, ..self.states[frames].clone() };
        assert_eq!(Wal::read(&DiskVfs, dir.path()).expect("a torn log"), expected);
        let (mut wal, recovered) = open(dir.path()).expect("a torn log");
        assert_eq!(recovered, expected);
        assert_eq!(fs::read(&path).expect("the segment"), &self.bytes[..end]);
        assert_eq!(recover(dir.path()), self.states[frames]);

        let next = expected.last_index().unwrap_or(0) + 1;
        save_entries(&mut wal, &entries(next..=next, 9));
        let mut longer = self.states[frames].clone();
        longer.entries.extend(entries(next..=next, 9));
        longer.base = longer.base.or(Some(0));
        assert_eq!(recover(dir.path()), longer);
    }
}

/// As after a restore: the log is as one whose beginning was purged, and goes on behind the snapshot.
#[test]
fn a_log_that_is_made_behind_a_snapshot_goes_on_behind_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let identity = Identity { cluster_id: 7, member_id: 2, incarnation: 9, first_urls_hash: 8 };
    let mark = SnapshotId { index: 5000, term: 4 };
    let hard_state = HardState { term: 4, vote: 0, commit: 5000, ..HardState::default() };
    let vfs = || Arc::new(DiskVfs);
    let made = Wal::create_behind(vfs(), dir.path(), &identity, mark, &hard_state);
    drop(made.expect("an empty directory"));
    let expected = Recovered {
        identity: identity.clone(),
        incarnations: BTreeMap::new(),
        marks: vec![mark],
        entries: Vec::new(),
        hard_state: hard_state.clone(),
        base: Some(5000),
        cut: None,
    };
    assert_eq!(Wal::read(&DiskVfs, dir.path()).expect("a sound log"), expected);
    let (mut wal, recovered) = Wal::open(vfs(), dir.path()).expect("a sound log");
    assert_eq!(recovered, expected);
    let entry = Entry { index: 5001, term: 5, ..Entry::default() };
    wal.save(&Frame { entries: &[entry], ..Frame::default() }).expect("saved");
    drop(wal);
    let (_, recovered) = Wal::open(vfs(), dir.path()).expect("a sound log");
    assert_eq!((recovered.base, recovered.last_index()), (Some(5000), Some(5001)));
    let again = Wal::create_behind(vfs(), dir.path(), &identity, mark, &hard_state);
    assert!(matches!(again, Err(Error::Refused(_))), "there is a log");
}

#[test]
fn what_is_saved_is_recovered() {
    let parent = TempDir::new().expect("a directory");
    let dir = parent.path().join("raftexample-3");
    assert!(!Wal::exists(&DiskVfs, &dir).expect("listed"));
    let mut wal = Wal::create(Arc::new(DiskVfs), &dir, &identity()).expect("a new log");
    assert!(Wal::exists(&DiskVfs, &dir).expect("listed"));
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
    let (wal, recovered) = Wal::open(Arc::new(DiskVfs), &dir).expect("a sound log");
    assert_eq!(recovered.identity, known);
    assert_eq!(recovered.incarnations, BTreeMap::from([(1, 10), (2, 20)]));
    assert_eq!(recovered.marks, [mark(2, 1)]);
    assert_eq!(recovered.entries[1].context, "context");
    assert_eq!(recovered.entries[1].entry_type, EntryType::EntryConfChange);
    assert_eq!(indexes_and_terms(&recovered), [(1, 1), (2, 1)]);
    assert_eq!(recovered.hard_state, hard_state(1, 2, 2));
    assert_eq!((recovered.base, recovered.last_index()), (Some(0), Some(2)));
    assert_eq!(recovered.cut, None);
    let length = length_of(&dir, 0);
    assert_eq!(wal.bytes(), length);
}

#[test]
fn a_new_log_says_whose_it_is_and_nothing_else() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path());
    wal.save(&Frame::default()).expect("nothing to save");
    let recovered = recover(dir.path());
    assert_eq!(recovered.identity, identity());
    assert_eq!((recovered.base, recovered.last_index()), (None, None));
    assert_eq!(recovered.hard_state, HardState::default());
    let length = length_of(dir.path(), 0);
    assert_eq!(wal.bytes(), length, "an empty frame writes nothing");
}

#[test]
fn a_second_log_is_not_made_over_the_first() {
    let dir = TempDir::new().expect("a directory");
    create(dir.path());
    let error = Wal::create(FailingVfs::sound(), dir.path(), &identity()).err().expect("refused");
    assert!(error.to_string().contains("already holds a log"), "{error}");
}

#[test]
fn an_entry_takes_the_place_of_all_from_its_index_on() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path());
    save_entries(&mut wal, &entries(1..=9, 1));
    save_entries(&mut wal, &entries(4..=5, 2));
    assert_eq!(indexes_and_terms(&recover(dir.path())), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]);
    save_entries(&mut wal, &entries(1..=1, 3));
    assert_eq!(indexes_and_terms(&recover(dir.path())), [(1, 3)]);
}

#[test]
fn etcd_22442_an_overwriting_entry_below_the_snapshot_still_truncates() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path());
    save_entries(&mut wal, &entries(1..=10, 1));
    // Entries 9 and 10 go here, by an entry that the snapshot made later contains.
    save_entries(&mut wal, &entries(6..=8, 2));
    wal.save(&Frame { made: Some(mark(8, 2)), ..Frame::default() }).expect("saved");
    let recovered = recover(dir.path());
    assert_eq!(recovered.last_index(), Some(8));
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
        assert_eq!(recovered.last_index(), Some(snapshot.index));
        assert_eq!(recovered.marks, [snapshot]);
        let next = snapshot.index + 1;
        save_entries(&mut wal, &entries(next..=next, 2));
        assert_eq!(indexes_and_terms(&recover(dir.path())), [(next, 2)]);
    }
}

#[test]
fn etcd_22442_a_received_snapshot_drops_a_tail_whose_beginning_was_purged() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path()).with_segment_bytes(600);
    // The first segment ends amid entries that were never committed.
    let mut next = 1;
    while wal.segments.len() < 2 {
        save_entries(&mut wal, &entries(next..=next, 1));
        next += 1;
    }
    save_entries(&mut wal, &entries(next..=next + 2, 1));
    // The index of the snapshot lies at the end of the first segment: what is left of the log
    // after the purge starts beyond it.
    let snapshot = mark(next - 2, 2);
    assert_eq!(wal.segments[0].highest_index, snapshot.index);
    wal.save(&Frame { installed: Some(snapshot), ..Frame::default() }).expect("saved");
    wal.purge(snapshot.index).expect("purged");
    assert_eq!(names(dir.path()), ["0000000000000001.wal"]);
    let recovered = recover(dir.path());
    assert_eq!(indexes_and_terms(&recovered), []);
    assert_eq!(recovered.base, Some(snapshot.index));
}

#[test]
fn a_mark_repeated_in_heads_leaves_the_entries_alone() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path()).with_segment_bytes(1);
    wal.save(&Frame { installed: Some(mark(5, 1)), ..Frame::default() }).expect("saved");
    for index in 6..=12 {
        save_entries(&mut wal, &entries(index..=index, 2));
        if index % 3 == 0 {
            wal.save(&Frame { made: Some(mark(index, 2)), ..Frame::default() }).expect("saved");
        }
    }
    // Made before the snapshot at 12, and named after it.
    wal.save(&Frame { made: Some(mark(8, 2)), ..Frame::default() }).expect("saved");
    save_entries(&mut wal, &entries(13..=13, 2));
    let recovered = recover(dir.path());
    assert_eq!((recovered.base, recovered.last_index()), (Some(5), Some(13)));
    assert_eq!(recovered.entries.len(), 8);
    assert_eq!(recovered.marks, [mark(5, 1), mark(6, 2), mark(8, 2), mark(9, 2), mark(12, 2)]);
}

#[test]
fn a_log_is_cut_into_segments_and_read_across_them() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path()).with_segment_bytes(1000);
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
            wal = open(dir.path()).expect("a sound log").0.with_segment_bytes(1000);
        }
    }
    // Longer than a segment, so it gets one of its own.
    save_entries(&mut wal, &[entry(41, 1, vec![7; 5000])]);
    save_entries(&mut wal, &entries(42..=42, 1));
    // Takes the zeros off the last segment.
    let recovered = recover(dir.path());
    let on_disk: Vec<u64> = names(dir.path())
        .iter()
        .map(|name| fs::metadata(dir.path().join(name)).expect("a segment").len())
        .collect();
    assert!(on_disk.len() > 5, "{on_disk:?}");
    assert_eq!(on_disk.iter().filter(|&&length| length > 1000).count(), 1);
    assert_eq!(wal.bytes(), on_disk.iter().sum::<u64>());
    assert_eq!(recovered.identity, known);
    assert_eq!(recovered.incarnations, BTreeMap::from([(1, 10)]));
    assert_eq!(recovered.hard_state, hard_state(1, 1, 40));
    assert_eq!(recovered.entries[..40], entries(1..=40, 1));
    assert_eq!(recovered.entries[40].data.len(), 5000);
    assert_eq!(recovered.last_index(), Some(42));
}

#[test]
fn only_the_last_segment_has_zeros_behind_its_frames_and_they_cost_a_long_frame_nothing() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path()).with_segment_bytes(4096).with_allocate_bytes(1024);
    let mut grown = 0;
    for index in 1..=80_u64 {
        let before = length_of(dir.path(), wal.current().number);
        let value = vec![b'x'; if index % 20 == 0 { 1500 } else { 60 }];
        save_entries(&mut wal, &[entry(index, 1, value)]);
        let Segment { number, length, .. } = *wal.current();
        let file = length_of(dir.path(), number);
        assert_eq!(file, wal.allocated);
        assert!((length..=4096).contains(&file) && file <= length + 1024, "{file}, {length}");
        let bytes = fs::read(segment_path(dir.path(), number)).expect("the segment");
        assert!(bytes[length as usize..].iter().all(|&byte| byte == 0));
        grown += u32::from(file != before);
        if index % 20 == 0 {
            assert!(file == length || file == before, "{index}: {file}, {length}");
        }
        for closed in &wal.segments[..number as usize] {
            assert_eq!(closed.length, length_of(dir.path(), closed.number));
        }
    }
    assert!(wal.current().number >= 3 && grown < 30, "{} {grown}", wal.current().number);
    let (wal, recovered) = open(dir.path()).expect("a sound log");
    assert_eq!((recovered.last_index(), recovered.cut), (Some(80), None));
    assert_eq!(wal.current().length, length_of(dir.path(), wal.current().number));
}

#[test]
fn a_head_does_not_run_ahead_of_the_frame_that_needed_the_segment() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path()).with_segment_bytes(1);
    save_entries(&mut wal, &entries(1..=1, 1));
    let frame = Frame {
        entries: &entries(2..=2, 5),
        hard_state: Some(&hard_state(5, 3, 1)),
        ..Frame::default()
    };
    wal.save(&frame).expect("saved");
    // A crash after the new segment was made, and before the frame arrived.
    let path = segment_path(dir.path(), 1);
    let head = wal.current().head_length;
    fs::File::options().write(true).open(&path).expect("opened").set_len(head).expect("cut");
    let recovered = recover(dir.path());
    assert_eq!(recovered.hard_state, HardState::default());
    assert_eq!(recovered.last_index(), Some(1));
    assert_eq!(recovered.cut, None);
}

#[test]
fn purging_keeps_what_is_still_needed() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path()).with_segment_bytes(700);
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
    let length_of = |name: &String| fs::metadata(dir.path().join(name)).expect("there").len();
    assert_eq!(wal.bytes(), names(dir.path()).iter().map(length_of).sum::<u64>());
    let base = recovered.base.expect("entries are left");
    assert!(base > 30 && base <= 45, "all above 45 are there, and few below: {base}");
    assert_eq!(recovered.entries, entries(base + 1..=60, 1));
    assert_eq!(recovered.identity, known);
    assert_eq!(recovered.incarnations, BTreeMap::from([(1, 10)]));
    assert_eq!(recovered.hard_state, hard_state(1, 2, 2));
    assert_eq!(recovered.marks[recovered.marks.len() - 2..], [mark(45, 1), mark(55, 1)]);
    let mut wal = open(dir.path()).expect("a sound log").0;
    wal.purge(55).expect("purged");
    save_entries(&mut wal, &entries(61..=61, 1));
    assert_eq!(recover(dir.path()).last_index(), Some(61));
}

#[test]
fn an_entry_may_go_below_what_a_purge_left() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path()).with_segment_bytes(1);
    save_entries(&mut wal, &entries(1..=9, 1));
    save_entries(&mut wal, &entries(10..=12, 1));
    save_entries(&mut wal, &entries(8..=20, 2));
    wal.save(&Frame { made: Some(mark(9, 2)), ..Frame::default() }).expect("saved");
    wal.purge(9).expect("purged");
    assert_eq!(names(dir.path())[0], "0000000000000001.wal");
    let recovered = recover(dir.path());
    assert_eq!(recovered.base, Some(7));
    assert_eq!(recovered.entries, entries(8..=20, 2));
}

#[test]
fn a_log_cut_short_at_any_length_holds_its_whole_frames() {
    let sample = Sample::new();
    let dir = Sample::replaced(&sample.bytes);
    let path = segment_path(dir.path(), 0);
    let file = fs::File::options().write(true).open(&path).expect("the segment");
    for length in (0..=sample.bytes.len()).rev() {
        file.set_len(length as u64).expect("cut");
        if length < sample.ends[0] {
            let (named, offset, _) = damage_of(dir.path());
            assert_eq!((&named, offset), (&path, 0), "{length} bytes");
            continue;
        }
        let frames = sample.ends.iter().rposition(|&end| end <= length).expect("the head");
        let end = sample.ends[frames];
        let cut = (end < length).then(|| (path.clone(), end as u64));
        let expected = Recovered { cut, ..sample.states[frames].clone() };
        assert_eq!(Wal::read(&DiskVfs, dir.path()).expect("a torn log"), expected);
        // A write that stopped there, over zeros.
        file.set_len(length as u64 + 700).expect("extended");
        assert_eq!(Wal::read(&DiskVfs, dir.path()).expect("a torn log"), expected);
        // Each length is read; to open and to go on takes a few syncs.
        if end < length && length % 211 == 0 {
            for zeros in [0, 700] {
                let bytes = [&sample.bytes[..length], &vec![0; zeros]].concat();
                sample.assert_cut(&bytes, frames);
            }
        }
    }
}

#[test]
fn a_flip_of_any_bit_is_damage() {
    let sample = Sample::new();
    let dir = Sample::replaced(&[&sample.bytes[..], &[0; 700]].concat());
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
fn a_last_frame_that_lost_any_of_its_sectors_is_cut() {
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
        // Sectors of zeros may be lost without loss.
        if bytes != sample.bytes {
            for zeros in [0, 16, 5000] {
                sample.assert_cut(&[&bytes[..], &vec![0; zeros]].concat(), frames);
            }
            cuts += 1;
        }
    }
    assert!(cuts >= 7, "{cuts}");
}

#[test]
fn zeros_behind_the_last_frame_are_taken_off_and_are_no_torn_frame() {
    let sample = Sample::new();
    for extra in [1, 15, 16, 17, 512, 5000] {
        let bytes = [sample.bytes.as_slice(), &vec![0; extra]].concat();
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
                let dir = Sample::replaced(&[&bytes[..], &vec![0; zeros]].concat());
                let (path, offset, reason) = damage_of(dir.path());
                assert_eq!((path, offset), (segment_path(dir.path(), 0), start as u64), "{reason}");
            }
        }
    }
}

#[test]
fn a_value_that_looks_like_a_frame_does_not_pass_for_one() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path());
    let start = wal.bytes();
    // A client that knows the segment and the offset, and cannot know the incarnation.
    let forged = |at: u64| {
        let mut frame = Vec::new();
        format::begin_frame(&mut frame);
        format::put_hard_state(&mut frame, &hard_state(99, 1, 1));
        format::seal_frame(&mut frame, at, Salt { incarnation: 0, segment: 0 });
        frame
    };
    // Behind the header and the fields of the entry, on the next multiple of 16.
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
    let mut wal = create(dir.path()).with_segment_bytes(1);
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
    assert!(reason.contains("0000000000000002 is there"), "{reason}");
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
fn what_is_refused_is_left_as_it_was_found() {
    let dir = segmented();
    let (from, to) = (segment_path(dir.path(), 3), dir.path().join("0000000000000003.wal.tmp"));
    fs::rename(&from, &to).expect("renamed");
    damage_of(dir.path());
    fs::rename(&to, &from).expect("it is still there");
    assert_eq!(recover(dir.path()).last_index(), Some(4));
}

/// Cuts off a segment what follows its head, as a crash leaves it after the name and before a frame.
fn leave_head(dir: &Path, number: u64) {
    let head = {
        let read = replay_segments(&DiskVfs, dir).expect("a sound log");
        read.segments[number as usize].head_length
    };
    let path = segment_path(dir, number);
    fs::File::options().write(true).open(path).expect("opened").set_len(head).expect("cut");
}

#[test]
fn a_segment_before_an_empty_last_one_is_closed_however_far_that_came() {
    let dir = segmented();
    leave_head(dir.path(), 3);
    let path = segment_path(dir.path(), 2);
    let closed = fs::read(&path).expect("a segment");
    let open_length = closed.len() - format::CLOSE_BYTES as usize;
    for length in open_length..=closed.len() {
        // With zeros that a size change which did not arrive has left, too.
        for (zeroed, zeros) in [(false, 0), (true, 0), (false, 300), (true, 300)] {
            let mut bytes = closed[..length].to_vec();
            if zeroed {
                bytes[open_length..].fill(0);
            }
            bytes.extend(vec![0; zeros]);
            fs::write(&path, &bytes).expect("written");
            assert_eq!(Wal::read(&DiskVfs, dir.path()).expect("a sound log").last_index(), Some(3));
            assert!(fs::read(&path).expect("a segment") == bytes, "to read changes nothing");
            let (wal, recovered) = open(dir.path()).expect("a sound log");
            assert_eq!((recovered.last_index(), recovered.cut), (Some(3), None));
            assert!(fs::read(&path).expect("a segment") == closed, "{length} bytes");
            let lengths: u64 = (0..=3).map(|n| length_of(dir.path(), n)).sum();
            assert_eq!(wal.bytes(), lengths);
        }
    }
}

#[test]
fn a_segment_that_is_not_closed_before_one_with_frames_is_damage() {
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
        for behind in [&[0; 16][..], &closed[open_length..], b"x", &empty] {
            fs::write(&path, [&closed, behind].concat()).expect("written");
            let (named, offset, _) = damage_of(dir.path());
            assert_eq!((named, offset), (path.clone(), closed.len() as u64), "{behind:?}");
        }
    }
}

#[test]
fn nothing_follows_in_a_segment_that_is_closed() {
    let with_close = |put: fn(&mut Vec<u8>)| {
        fault_of(|frame| {
            format::put_close(frame);
            put(frame);
        })
    };
    let puts: [fn(&mut Vec<u8>); 2] =
        [format::put_close, |frame| format::put_hard_state(frame, &hard_state(9, 9, 9))];
    for put in puts {
        let reason = with_close(put);
        assert!(reason.contains("a close amid other records"), "{reason}");
    }
}

/// What is left tells how far the log came, though it holds no entry.
#[test]
fn a_segment_without_entries_has_no_room_for_another_log() {
    let dir = TempDir::new().expect("a directory");
    let mut wal = create(dir.path()).with_segment_bytes(1);
    save_entries(&mut wal, &entries(1..=4, 1));
    let voted = hard_state(2, 3, 1);
    wal.save(&Frame { hard_state: Some(&voted), ..Frame::default() }).expect("saved");
    remove(dir.path(), 0);
    let recovered = recover(dir.path());
    assert_eq!((recovered.base, recovered.last_index()), (Some(4), Some(4)));
    assert_eq!(recovered.hard_state, voted);
}

#[test]
fn a_head_that_knows_another_end_of_the_log_is_damage() {
    let dir = segmented();
    leave_head(dir.path(), 3);
    let Replayed { replay, segments, .. } =
        replay_segments(&DiskVfs, dir.path()).expect("a sound log");
    let previous = Segment { length: segments[2].open_length(), closed: false, ..segments[2] };
    create_segment(&DiskVfs, dir.path(), Some(&previous), Some(9), &replay.summary).expect("made");
    let (path, offset, reason) = damage_of(dir.path());
    assert_eq!((path, offset), (segment_path(dir.path(), 3), 0));
    assert!(
        reason.contains("the log ended at Some(9) when this segment was begun, now at Some(3)"),
        "{reason}"
    );
}

/// The segments of `segmented`, as a program that wrote version 1 would have left them.
fn segmented_of_version_1() -> TempDir {
    let dir = TempDir::new().expect("a directory");
    let mut previous_bytes = 0_u64;
    for segment in 0..4_u64 {
        let mut head = Vec::new();
        format::begin_frame(&mut head);
        head.extend_from_slice(&[1, 28, 0, 0, 0]);
        head.extend_from_slice(b"raft-wal\x01\0\0\0");
        head.extend_from_slice(&segment.to_le_bytes());
        head.extend_from_slice(&previous_bytes.to_le_bytes());
        format::put_identity(&mut head, &identity());
        format::seal_frame(&mut head, 0, Salt::default());
        let mut frame = Vec::new();
        format::begin_frame(&mut frame);
        format::put_entry(&mut frame, &entries(segment + 1..=segment + 1, 1)[0]);
        let salt = Salt { incarnation: identity().incarnation, segment };
        format::seal_frame(&mut frame, head.len() as u64, salt);
        let bytes = [head, frame].concat();
        previous_bytes = bytes.len() as u64;
        fs::write(segment_path(dir.path(), segment), bytes).expect("written");
    }
    dir
}

#[test]
fn a_log_of_version_1_goes_on_in_the_current_version() {
    let dir = segmented_of_version_1();
    assert_eq!(recover(dir.path()).entries, entries(1..=4, 1));
    let mut wal = open(dir.path()).expect("a sound log").0.with_segment_bytes(1);
    (5..=6).for_each(|index| save_entries(&mut wal, &entries(index..=index, 1)));
    assert_eq!(recover(dir.path()).entries, entries(1..=6, 1));
    // Only segments that this version began are missed.
    remove(dir.path(), 5);
    assert_eq!(damage_of(dir.path()).0, segment_path(dir.path(), 5));
    remove(dir.path(), 4);
    assert_eq!(damage_of(dir.path()).0, segment_path(dir.path(), 4));
    remove(dir.path(), 3);
    assert_eq!(recover(dir.path()).entries, entries(1..=3, 1));
    // A tail behind a segment is none that a crash leaves where the next has frames.
    let dir = segmented_of_version_1();
    let path = segment_path(dir.path(), 2);
    fs::write(&path, [&fs::read(&path).expect("a segment")[..], &[0; 16]].concat())
        .expect("written");
    assert_eq!(damage_of(dir.path()).0, path);
}

#[test]
fn a_directory_without_segments_is_damage() {
    let dir = TempDir::new().expect("a directory");
    damage_of(dir.path());
}

#[test]
fn a_segment_under_anothers_name_is_damage() {
    let dir = segmented();
    let copy = fs::read(segment_path(dir.path(), 1)).expect("a segment");
    fs::write(segment_path(dir.path(), 2), copy).expect("written");
    let (path, offset, reason) = damage_of(dir.path());
    assert_eq!((path, offset), (segment_path(dir.path(), 2), 0));
    assert!(reason.contains("it is segment 0000000000000001, named 0000000000000002"), "{reason}");
}

#[test]
fn a_segment_of_another_member_is_damage() {
    let dir = segmented();
    let other = TempDir::new().expect("a directory");
    let other_identity = Identity { incarnation: 1, ..identity() };
    let mut wal = Wal::create(FailingVfs::sound(), other.path(), &other_identity)
        .expect("a new log")
        .with_segment_bytes(1);
    for index in 1..=4 {
        save_entries(&mut wal, &entries(index..=index, 1));
    }
    fs::copy(segment_path(other.path(), 2), segment_path(dir.path(), 2)).expect("copied");
    let (path, _, reason) = damage_of(dir.path());
    assert_eq!(path, segment_path(dir.path(), 2));
    assert!(reason.contains("the log belongs to"), "{reason}");
}

#[test]
fn an_earlier_segment_that_ends_early_is_damage_even_between_frames() {
    let dir = segmented();
    let whole = fs::read(segment_path(dir.path(), 1)).expect("a segment");
    let head = {
        let (wal, _) = open(dir.path()).expect("a sound log");
        wal.segments[1].head_length as usize
    };
    for length in (0..whole.len()).step_by(7).chain([head]) {
        fs::write(segment_path(dir.path(), 1), &whole[..length]).expect("written");
        let (path, ..) = damage_of(dir.path());
        // Only the next segment's head knows about a frame that is gone as a whole.
        let expected = if length == head { 2 } else { 1 };
        assert_eq!(path, segment_path(dir.path(), expected), "{length} bytes");
    }
}

#[test]
fn an_empty_segment_is_damage_also_in_the_last_place() {
    for number in 0..4 {
        let dir = segmented();
        fs::write(segment_path(dir.path(), number), b"").expect("written");
        let (path, offset, _) = damage_of(dir.path());
        assert_eq!((path, offset), (segment_path(dir.path(), number), 0));
    }
}

#[test]
fn foreign_files_are_passed_over_unless_they_are_named_like_segments() {
    let dir = segmented();
    fs::write(dir.path().join("LOCK"), b"").expect("written");
    fs::write(dir.path().join("0000000000000004.wal.tmp"), b"half").expect("written");
    fs::write(dir.path().join("notes.tmp"), b"not ours").expect("written");
    assert_eq!(recover(dir.path()).last_index(), Some(4));
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
fn another_format_version_is_refused_by_number() {
    let dir = TempDir::new().expect("a directory");
    let mut frame = Vec::new();
    format::begin_frame(&mut frame);
    format::put_head(&mut frame, 0, 0, None);
    let at = format::HEADER_BYTES + 5 + 8;
    frame[at] = 5;
    format::seal_frame(&mut frame, 0, Salt::default());
    fs::write(segment_path(dir.path(), 0), frame).expect("written");
    let (_, offset, reason) = damage_of(dir.path());
    assert_eq!((offset, reason.as_str()), (0, "format version 5, this program reads 1 to 4"));
}

/// Writes a frame as no `Wal` would, and returns what is wrong with it.
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
    fs::write(&path, [fs::read(&path).expect("the segment"), frame].concat()).expect("written");
    let (named, offset, reason) = damage_of(dir.path());
    assert_eq!((named, offset), (path, wal.bytes()));
    reason
}

#[test]
fn a_whole_frame_with_impossible_contents_is_damage() {
    let foreign = Identity { member_id: 4, ..identity() };
    let cases: [(&str, String); 10] = [
        ("entry 10 follows entry 8", fault_of(|frame| format::put_entry(frame, &entry(10, 1, "")))),
        ("entry 5 would change", fault_of(|frame| format::put_entry(frame, &entry(5, 1, "")))),
        ("entry 0, the first is 1", fault_of(|frame| format::put_entry(frame, &entry(0, 1, "")))),
        ("the log ends at 8", fault_of(|frame| format::put_mark(frame, mark(9, 1)))),
        ("the entry there has term 1", fault_of(|frame| format::put_mark(frame, mark(7, 2)))),
        ("term 2, before of 1", fault_of(|frame| format::put_install(frame, mark(5, 2)))),
        ("the log belongs to", fault_of(|frame| format::put_identity(frame, &foreign))),
        ("in the midst of a segment", fault_of(|frame| format::put_head(frame, 0, 0, None))),
        ("record kind 9", fault_of(|frame| frame.extend_from_slice(&[9, 0, 0, 0, 0]))),
        ("wants 9 bytes more", fault_of(|frame| frame.extend_from_slice(&[7, 9, 0, 0, 0, 1]))),
    ];
    for (expected, reason) in cases {
        assert!(reason.contains(expected), "{expected}: {reason}");
    }
}

/// The life of a log, up to the first error; returns how many entries were acknowledged.
fn live(vfs: Arc<dyn Vfs>, dir: &Path) -> (u64, Result<()>) {
    let mut acknowledged = 0;
    let result = (|| {
        let mut wal = Wal::create(vfs.clone(), dir, &identity())?.with_segment_bytes(1);
        for index in 1..=6 {
            wal.save(&Frame { entries: &entries(index..=index, 1), ..Frame::default() })?;
            acknowledged = index;
        }
        wal.save(&Frame { made: Some(mark(4, 1)), ..Frame::default() })?;
        wal.purge(4)?;
        drop(wal);
        Wal::open(vfs, dir)?;
        Ok(())
    })();
    (acknowledged, result)
}

#[test]
fn a_failing_disk_at_any_step_is_an_error_and_loses_nothing_acknowledged() {
    for operations in 0.. {
        let dir = TempDir::new().expect("a directory");
        let (acknowledged, result) = live(Arc::new(FailingVfs::after(operations)), dir.path());
        if result.is_ok() {
            assert!(operations > 40, "{operations}");
            break;
        }
        assert!(matches!(result, Err(Error::Io { .. })), "{result:?}");
        if Wal::exists(&DiskVfs, dir.path()).expect("listed") {
            let last = recover(dir.path()).last_index().unwrap_or(0);
            assert!(last == acknowledged || last == acknowledged + 1, "{last}, {acknowledged}");
        } else {
            assert_eq!(acknowledged, 0);
            create(dir.path());
        }
    }
}

#[test]
fn a_log_is_relied_on_only_after_its_last_frame_and_its_name_were_written_again_and_synced() {
    let open_after = |operations: usize| {
        let dir = TempDir::new().expect("a directory");
        save_entries(&mut create(dir.path()), &entries(1..=3, 1));
        Wal::open(Arc::new(FailingVfs::after(operations as u64)), dir.path())
    };
    let steps = ["cut", "write to", "sync", "create", "remove", "sync directory"];
    for (operations, step) in steps.iter().enumerate() {
        let error = open_after(operations).err().expect("an injected failure").to_string();
        assert!(error.starts_with(&format!("cannot {step} /")), "{error}");
    }
    let (_, recovered) = open_after(steps.len()).expect("opened");
    assert_eq!(recovered.entries, entries(1..=3, 1));
}

/// What a log must say, kept in the plainest way.
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
        let dropped = recovered.base.map_or(self.entries.len(), |base| {
            assert!(base >= self.base);
            (base - self.base) as usize
        });
        assert_eq!(recovered.entries, self.entries[dropped..]);
        assert!(dropped == 0 || self.base + dropped as u64 <= self.newest_mark());
    }
}

#[derive(Clone, Debug)]
enum Operation {
    /// Entries that take the place of the last `back` ones, of a higher term if there are any.
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
            let (reopened, recovered) = open(&dir).expect("a sound log");
            model.assert_recovered(&recovered);
            *wal = reopened.with_segment_bytes(wal.segment_bytes);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_done_the_log_says_what_a_model_says(
        operations in prop::collection::vec(operation(), 1..40),
        segment_bytes in prop_oneof![Just(1), 300..3000_u64],
    ) {
        let dir = TempDir::new().expect("a directory");
        let mut wal = create(dir.path()).with_segment_bytes(segment_bytes);
        let mut model = Model { term: 1, ..Model::default() };
        for operation in &operations {
            carry_out(operation, &mut wal, &mut model);
            model.assert_recovered(&Wal::read(&DiskVfs, dir.path()).expect("a sound log"));
        }
    }
}
