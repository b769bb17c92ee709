//! Damaged disks. A member starts with everything that it acknowledged, or refuses to start and names
//! the file and the remedy. The only exception is the end of the last segment, where damage can look
//! like a torn frame. The log is then shorter, but has no gap.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use raft::eraftpb::Entry;
use raftexample::channels::NodeId;
use raftexample::codec;
use raftexample::error::{Error, Result};
use raftexample::membership::{Members, SnapshotMembers};
use raftexample::raft_node::NodeConfig;
use raftexample::raft_node::replay::{replay_wal, snap_dir, wal_dir};
use raftexample::storage::snapshotter::Snapshotter;
use raftexample::storage::wal::{Frame, Identity, Sizes, Wal};
use raftexample::storage::{DiskVfs, Vfs};

use crate::support::logs;
use crate::support::memory::*;

fn single() -> NodeConfig {
    NodeConfig {
        snapshot_count: 5,
        snapshot_catch_up_entries: 2,
        wal_sizes: Sizes { segment_bytes: 512, step_bytes: 64 },
        ..config(1, 1)
    }
}

fn start(disk: &MemVfs) -> Result<Member> {
    Member::start(&single(), disk, &Transcript::default())
}

/// The directory of a member with several segments and two snapshots, and the member's state.
struct Sample {
    disk: MemVfs,
    state: State,
    entries: Vec<Entry>,
}

impl Sample {
    fn new() -> Self {
        let mut member = start(&MemVfs::default()).unwrap();
        member.tick_until_leader().unwrap();
        for number in 0..27 {
            let (key, value) = (format!("key{}", number % 7), "value ".repeat(27 - number));
            assert!(member.put(&key, &value).unwrap().is_ok());
        }
        member.node.stop().unwrap();
        let (state, entries) = (member.state(), member.wal().entries);
        let disk = member.crash(Survives::Nothing);
        let sample = Self { disk, state, entries };
        assert!(sample.segments().len() >= 4, "{:?}", sample.disk.paths());
        assert_eq!(sample.snapshots().len(), 2, "{:?}", sample.disk.paths());
        sample
    }

    fn last_index(&self) -> u64 {
        self.entries.last().unwrap().index
    }

    fn with_extension(&self, wanted: &str) -> Vec<PathBuf> {
        let mut paths = self.disk.paths();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == wanted));
        paths
    }

    /// Oldest first.
    fn segments(&self) -> Vec<PathBuf> {
        self.with_extension("wal")
    }

    /// Oldest first.
    fn snapshots(&self) -> Vec<PathBuf> {
        self.with_extension("snap")
    }

    /// A copy in which the file at `path` holds `bytes`.
    fn with(&self, path: &Path, bytes: &[u8]) -> MemVfs {
        let disk = self.disk.image();
        disk.put(path, bytes);
        disk
    }

    fn without(&self, paths: &[PathBuf]) -> MemVfs {
        let disk = self.disk.image();
        paths.iter().for_each(|path| disk.take_away(path));
        disk
    }

    fn assert_starts_with_all(&self, disk: &MemVfs, what: &str) {
        let mut member = start(disk).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(member.state(), self.state, "{what}");
    }

    /// Asserts that the member starts with a prefix of the log, or refuses to start. Returns the length
    /// of the prefix.
    fn prefix_of(&self, disk: &MemVfs, what: &str) -> Option<usize> {
        match start(disk) {
            Ok(member) => {
                let found = member.wal().entries;
                assert!(self.entries.starts_with(&found), "{what}: {found:?}");
                Some(found.len())
            }
            Err(error) => {
                assert!(error.to_string().contains(DATA), "{what}: {error}");
                assert!(error.to_string().contains("DELETE it on another"), "{what}: {error}");
                None
            }
        }
    }
}

/// Asserts that the member refuses to start, and names `path` and a remedy.
fn assert_refused(disk: &MemVfs, path: &Path, what: &str) {
    let error = start(disk).err().unwrap_or_else(|| panic!("{what}: it starts")).to_string();
    assert!(error.contains(&path.display().to_string()), "{what}: {error}");
    let remedies = ["DELETE it on another member", "move it elsewhere"];
    assert!(remedies.iter().any(|remedy| error.contains(remedy)), "{what}: {error}");
}

/// The length of a segment without the zeros at its end.
fn used(segment: &[u8]) -> usize {
    segment.iter().rposition(|&byte| byte != 0).unwrap() + 1
}

fn broken(path: &Path) -> PathBuf {
    PathBuf::from(format!("{}.broken", path.display()))
}

#[test]
fn a_flipped_bit_in_any_segment_is_refused_by_name() {
    let sample = Sample::new();
    let dir = wal_dir(Path::new(DATA), 1);
    let mut flips = 0;
    for path in sample.segments() {
        let disk = sample.disk.image();
        // Most flips in the preallocated zeros are harmless.
        for bit in 0..used(&sample.disk.contents(&path)) * 8 {
            let flip = |bytes: &mut Vec<u8>| bytes[bit / 8] ^= 1 << (bit % 8);
            disk.tamper(&path, flip);
            match Wal::read(&disk, &dir) {
                Err(Error::Corrupt { path: named, .. }) => assert_eq!(named, path, "bit {bit}"),
                other => panic!("bit {bit} of {}: {other:?}", path.display()),
            }
            if bit % 97 == 0 {
                assert_refused(&disk.image(), &path, &format!("bit {bit} of {}", path.display()));
            }
            disk.tamper(&path, flip);
            flips += 1;
        }
    }
    assert!(flips > 20_000, "{flips}");
}

#[test]
fn a_flipped_bit_in_the_newest_snapshot_sets_it_aside() {
    let sample = Sample::new();
    let [older, newest] = &sample.snapshots()[..] else { unreachable!() };
    for (path, step) in [(older, 97), (newest, 5)] {
        let bytes = sample.disk.contents(path);
        // Every bit of the header, and some bits of the rest.
        let header = 0..if path == newest { 50 * 8 } else { 0 };
        for bit in header.clone().chain((header.end..bytes.len() * 8).step_by(step)) {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let disk = sample.with(path, &flipped);
            sample.assert_starts_with_all(&disk, &format!("bit {bit} of {}", path.display()));
            let is_set_aside = disk.paths().contains(&broken(path));
            assert_eq!(is_set_aside, path == newest, "bit {bit} of {}", path.display());
            if is_set_aside {
                assert!(
                    disk.contents(&broken(path)) == flipped,
                    "bit {bit}: the file is kept as it was"
                );
            }
        }
    }
}

#[test]
fn a_snapshot_of_wrong_length_or_zeroed_is_set_aside() {
    let sample = Sample::new();
    let newest = sample.snapshots().pop().unwrap();
    let bytes = sample.disk.contents(&newest);
    let mut damaged: Vec<Vec<u8>> =
        (0..bytes.len()).map(|length| bytes[..length].to_vec()).collect();
    damaged.push([&bytes[..], b"\0"].concat());
    for start in (0..bytes.len()).step_by(512) {
        let mut zeroed = bytes.clone();
        zeroed[start..(start + 512).min(bytes.len())].fill(0);
        damaged.push(zeroed);
    }
    // Another snapshot of this member, under the name of the newest.
    damaged.push(sample.disk.contents(&sample.snapshots()[0]));
    for (case, bytes) in damaged.iter().enumerate() {
        let disk = sample.with(&newest, bytes);
        sample.assert_starts_with_all(&disk, &format!("case {case}"));
        assert!(disk.contents(&broken(&newest)) == *bytes, "case {case}");
    }
}

/// The snapshot that was set aside does not count as the older snapshot.
#[test]
fn a_second_damaged_snapshot_is_set_aside_too() {
    let sample = Sample::new();
    let [oldest, first] = &sample.snapshots()[..] else { unreachable!() };
    sample.disk.tamper(first, |bytes| bytes[50] ^= 1);
    let mut member = start(&sample.disk).unwrap();
    member.tick_until_leader().unwrap();
    while sample.snapshots().len() < 2 {
        assert!(member.put("key", "value").unwrap().is_ok());
    }
    let state = member.state();
    let disk = member.crash(Survives::Nothing);
    // A start without damage keeps both snapshots.
    let member = start(&disk).unwrap();
    let disk = member.crash(Survives::Nothing);
    let sample = Sample { disk, state, entries: Vec::new() };
    assert_eq!(&sample.snapshots()[0], oldest);
    let second = sample.snapshots().pop().unwrap();
    sample.disk.tamper(&second, |bytes| bytes[50] ^= 1);
    let mut member = start(&sample.disk).unwrap();
    member.tick_until_leader().unwrap();
    assert_eq!(member.state(), sample.state);
    assert!(sample.disk.paths().contains(&broken(&second)));
}

#[test]
fn a_last_segment_cut_short_is_refused_or_loses_nothing() {
    let sample = Sample::new();
    let path = sample.segments().pop().unwrap();
    let bytes = sample.disk.contents(&path);
    let all = sample.prefix_of(&sample.disk, "the whole file");
    let (mut whole, mut refused) = (0, 0);
    for length in 0..bytes.len() {
        let disk = sample.with(&path, &bytes[..length]);
        match sample.prefix_of(&disk, &format!("{length} bytes")) {
            Some(found) => {
                assert_eq!(Some(found), all, "{length} bytes");
                whole += 1;
            }
            None => {
                refused += 1;
                assert_eq!(whole, 0, "{length} bytes are refused, a shorter file was not");
            }
        }
    }
    assert!(refused > 300, "{refused}");
}

#[test]
fn an_earlier_segment_cut_short_at_any_length_is_refused() {
    let sample = Sample::new();
    let segments = sample.segments();
    let dir = wal_dir(Path::new(DATA), 1);
    for pair in segments.windows(2) {
        let bytes = sample.disk.contents(&pair[0]);
        for length in 0..used(&bytes) {
            let disk = sample.with(&pair[0], &bytes[..length]);
            match Wal::read(&disk, &dir) {
                // After a cut between two frames, only the next segment's head shows the damage.
                Err(Error::Corrupt { path, .. }) => assert!(pair.contains(&path), "{length}"),
                other => panic!("{length} bytes of {}: {other:?}", pair[0].display()),
            }
        }
        let disk = sample.with(&pair[0], &[&bytes[..], b"x"].concat());
        assert_refused(&disk, &pair[0], "a byte after its end");
    }
}

#[test]
fn a_zeroed_sector_is_refused_except_at_the_logs_end() {
    let sample = Sample::new();
    let segments = sample.segments();
    for path in &segments {
        let bytes = sample.disk.contents(path);
        for start in (0..used(&bytes)).step_by(512) {
            let mut zeroed = bytes.clone();
            zeroed[start..(start + 512).min(bytes.len())].fill(0);
            let what = format!("zeros from offset {start} in {}", path.display());
            let disk = sample.with(path, &zeroed);
            if Some(path) != segments.last() || start == 0 {
                assert_refused(&disk, path, &what);
                continue;
            }
            // At least as long as a log with zeros from this offset on.
            zeroed[start..].fill(0);
            let least = sample.prefix_of(&sample.with(path, &zeroed), &what);
            let found = sample.prefix_of(&disk, &what);
            assert!(found.is_none() || found >= least, "{what}: {found:?}, {least:?}");
        }
    }
}

#[test]
fn a_missing_segment_is_refused_or_not_needed() {
    let sample = Sample::new();
    let segments = sample.segments();
    for count in 1..segments.len() {
        let gone = &segments[count..];
        assert_refused(&sample.without(gone), &gone[0], "the last are missing");
        assert_refused(&sample.without(&gone[..1]), &gone[0], "one is missing");
    }
    let mut refused = 0;
    for count in 1..segments.len() {
        let disk = sample.without(&segments[..count]);
        match start(&disk) {
            // The snapshot holds the missing entries.
            Ok(mut member) => {
                assert_eq!(member.state(), sample.state, "without {count}");
                assert_eq!(member.wal().last_index(), sample.last_index());
            }
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains("the log begins after index"), "without {count}: {error}");
                assert!(error.contains("DELETE it on another member"), "{error}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0);
    assert_refused(&sample.without(&segments), &wal_dir(Path::new(DATA), 1), "without any");
}

/// An operator who restores the missing segments then has the snapshots too.
#[test]
fn a_refused_log_keeps_the_snapshots_it_does_not_name() {
    let config = NodeConfig { snapshot_count: 15, ..single() };
    let mut member = Member::start(&config, &MemVfs::default(), &Transcript::default()).unwrap();
    member.tick_until_leader().unwrap();
    for number in 0..24 {
        assert!(member.put("key", &"value ".repeat(number)).unwrap().is_ok());
    }
    member.node.stop().unwrap();
    let state = member.state();
    let sample = Sample { disk: member.crash(Survives::Nothing), state, entries: Vec::new() };
    assert_eq!(sample.snapshots().len(), 1);
    let segments = sample.segments();
    let gone = [&segments[..1], &segments[2..]].concat();
    let disk = sample.without(&gone);
    assert_refused(&disk, &wal_dir(Path::new(DATA), 1), "the first segment is missing");
    assert!(disk.paths().contains(&sample.snapshots()[0]), "{:?}", disk.paths());
    for path in &gone {
        disk.put(path, &sample.disk.contents(path));
    }
    sample.assert_starts_with_all(&disk, "with the segments back");
}

#[test]
fn a_copy_of_a_segment_under_another_name_is_refused() {
    let sample = Sample::new();
    let segments = sample.segments();
    let number =
        |path: &Path| u64::from_str_radix(path.file_stem().unwrap().to_str().unwrap(), 16).unwrap();
    let (first, last) = (number(&segments[0]), number(segments.last().unwrap()));
    for original in &segments {
        let bytes = sample.disk.contents(original);
        for other in (first..last + 2).chain([last + 2, last + 1000, u64::MAX - 1]) {
            let path = original.with_file_name(format!("{other:016x}.wal"));
            if path == *original {
                continue;
            }
            let what = format!("{} as {}", original.display(), path.display());
            // With a higher number, the error names the first missing segment.
            let named = original.with_file_name(format!("{:016x}.wal", other.min(last + 1)));
            assert_refused(&sample.with(&path, &bytes), &named, &what);
        }
    }
}

/// The log of a member with `identity`, with at least the segment numbers of the sample.
fn log_of(identity: &Identity, sample: &Sample) -> MemVfs {
    let disk = MemVfs::default();
    let dir = wal_dir(Path::new(DATA), 1);
    let mut wal = Wal::create(Arc::new(disk.clone()), &dir, identity, sizes(1)).unwrap();
    for index in 1.. {
        let entries = [entry(index, 1, Vec::new())];
        wal.save(&Frame { entries: &entries, ..Frame::default() }).unwrap();
        if disk.paths().contains(sample.segments().last().unwrap()) {
            break;
        }
    }
    disk
}

#[test]
fn a_segment_of_another_member_or_incarnation_is_refused() {
    let sample = Sample::new();
    let dir = wal_dir(Path::new(DATA), 1);
    let own = Wal::read(&sample.disk, &dir).unwrap().identity;
    let others = [
        Identity { member_id: 2, ..own.clone() },
        Identity { cluster_id: 5, ..own.clone() },
        Identity { incarnation: 5, ..own.clone() },
    ];
    for other in others {
        let foreign = log_of(&other, &sample);
        for path in sample.segments() {
            let disk = sample.with(&path, &foreign.contents(&path));
            let error = start(&disk).err().unwrap_or_else(|| panic!("{path:?} of {other:?}"));
            assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        }
    }
    // The flags show that a whole directory is foreign.
    for (other, expected) in [
        (Identity { member_id: 2, ..own.clone() }, "belongs to member 2"),
        (Identity { first_urls_hash: 5, ..own }, "was made with another --cluster list"),
    ] {
        let error = start(&log_of(&other, &sample)).err().expect("refused").to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_snapshot_of_another_cluster_is_refused_naming_it() {
    let sample = Sample::new();
    let newest = sample.snapshots().pop().unwrap();
    let vfs = Arc::new(sample.disk.image());
    let marks = Wal::read(&*vfs, &wal_dir(Path::new(DATA), 1)).unwrap().marks;
    let snapshotter = Snapshotter::new(vfs.clone(), &snap_dir(Path::new(DATA), 1)).unwrap();
    let members = SnapshotMembers {
        cluster_id: 5,
        voters: vec![1],
        learners: Vec::new(),
        members: Members::default(),
    };
    let meta = codec::encode(&members);
    snapshotter.create(*marks.last().unwrap(), &meta, |out| out.write_all(&EMPTY_STATE)).unwrap();
    assert_refused(&vfs, &newest, "of cluster 5");
    assert!(vfs.paths().contains(&newest), "the file keeps its name");
}

#[test]
fn foreign_files_are_left_alone_unless_named_like_our_own() {
    let sample = Sample::new();
    let segment = sample.segments().pop().unwrap();
    let snapshot = sample.snapshots().pop().unwrap();
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let (segment_name, snapshot_name) = (name(&segment), name(&snapshot));
    let ignored = [
        "LOCK",
        "core",
        ".DS_Store",
        "notes.tmp",
        "wal",
        "snap",
        &format!("{segment_name}~"),
        &format!("{segment_name}.bak"),
        &format!("{segment_name}.broken"),
        &format!("{snapshot_name}.bak"),
        &format!("{snapshot_name}.broken"),
        &format!("{snapshot_name}.tmp"),
        &segment_name.replace(".wal", ".WAL"),
    ];
    let only_ignored_beside_segments = [&snapshot_name[..], "a-b.snap", ".snap"];
    let only_ignored_beside_snapshots = [&segment_name[..], "a.snap", ".snap", "1-2.snap", "9.wal"];
    let removed = [
        (segment.with_file_name("00000000000000ff.wal.tmp"), true),
        (snapshot.with_file_name(format!("{snapshot_name}.7.tmp")), true),
        (snapshot.with_file_name("0000000000000009-0000000000000009.snap"), true),
    ];
    let beside_segments = ignored.into_iter().chain(only_ignored_beside_segments);
    let beside_snapshots = ignored.into_iter().chain(only_ignored_beside_snapshots);
    let left = beside_segments
        .map(|name| segment.with_file_name(name))
        .chain(beside_snapshots.map(|name| snapshot.with_file_name(name)))
        .map(|path| (path, false));
    for (path, is_removed) in left.chain(removed) {
        for bytes in [&b""[..], b"not ours"] {
            let disk = sample.with(&path, bytes);
            sample.assert_starts_with_all(&disk, &path.display().to_string());
            assert_eq!(disk.paths().contains(&path), !is_removed, "{}", path.display());
        }
    }
    for name in ["9.wal", ".wal", "notes.wal", "000000000000000A.wal", "0000000000000001 copy.wal"]
    {
        let path = segment.with_file_name(name);
        assert_refused(&sample.with(&path, b""), &path, name);
    }
    // The error names the segments that are missing before it.
    let far = segment.with_file_name("00000000000000ff.wal");
    assert_refused(&sample.with(&far, b""), &wal_dir(Path::new(DATA), 1), "a far number");
}

/// A copy of the sample on a real disk, where a name can belong to a directory.
fn on_disk(sample: &Sample) -> tempfile::TempDir {
    let temporary = tempfile::tempdir().unwrap();
    for path in sample.disk.paths() {
        let target = temporary.path().join(path.strip_prefix(DATA).unwrap());
        DiskVfs.create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::write(target, sample.disk.contents(&path)).unwrap();
    }
    temporary
}

fn open_on_disk(dir: &Path, id: NodeId) -> Result<()> {
    let config = NodeConfig { data_dir: dir.into(), id, ..single() };
    let logger = logs::discard();
    replay_wal(&config, Arc::new(DiskVfs), &logger).map(|_| ())
}

#[test]
fn a_directory_for_a_file_and_a_file_for_a_directory_are_named() {
    let sample = Sample::new();
    let relative = |path: &Path| path.strip_prefix(DATA).unwrap().to_owned();
    let segments: Vec<_> = sample.segments().iter().map(|path| relative(path)).collect();
    let snapshots: Vec<_> = sample.snapshots().iter().map(|path| relative(path)).collect();
    let wal = PathBuf::from("raftexample-1");
    let directories = [
        segments[0].clone(),
        segments.last().unwrap().clone(),
        wal.join("lock"),
        segments[0].with_extension("wal.tmp"),
    ];
    for path in &directories {
        let temporary = on_disk(&sample);
        let target = temporary.path().join(path);
        let _ = std::fs::remove_file(&target);
        std::fs::create_dir(&target).unwrap();
        let error = open_on_disk(temporary.path(), 1).expect_err("refused").to_string();
        assert!(error.contains(&target.display().to_string()), "{error}");
    }
    for path in [wal, PathBuf::from("raftexample-1-snap")] {
        let temporary = on_disk(&sample);
        let target = temporary.path().join(&path);
        std::fs::remove_dir_all(&target).unwrap();
        std::fs::write(&target, b"").unwrap();
        let error = open_on_disk(temporary.path(), 1).expect_err("refused").to_string();
        assert!(error.contains(&target.display().to_string()), "{error}");
    }
    // A directory in place of the newest snapshot counts as damage, and the log replaces it.
    let temporary = on_disk(&sample);
    let target = temporary.path().join(&snapshots[1]);
    std::fs::remove_file(&target).unwrap();
    std::fs::create_dir(&target).unwrap();
    open_on_disk(temporary.path(), 1).unwrap();
    assert!(broken(&target).is_dir());
}
