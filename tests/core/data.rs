//! The data directory in `tests/data`, which a program of this format version wrote.
//! `UPDATE_GOLDEN=1 cargo test --test core data` creates it again. The module documentation of
//! `storage::wal` states when.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use raftexample::channels::MemberRequest;
use raftexample::error::{Error, Result};
use raftexample::raft_node::NodeConfig;
use raftexample::raft_node::replay::replay_wal;
use raftexample::storage::{DiskVfs, snapshotter, wal};

use crate::support::logs;
use crate::support::memory::*;

/// Short segments, so that the directory has several.
const SEGMENT_BYTES: u64 = 512;

/// The keys in the directory, each with its value and the index of its last write.
const KEYS: [(&str, &str, u64); 4] = [
    ("/binary", "a\u{0}b\n", 5),
    ("/hello", "world", 3),
    ("/last", "after the snapshot", 9),
    ("/path?query", "overwritten", 8),
];

const INCARNATION: u64 = 0x1122_3344_5566_7788;

fn single() -> NodeConfig {
    NodeConfig {
        incarnation: INCARNATION,
        snapshot_count: 5,
        snapshot_catch_up_entries: 2,
        wal_sizes: sizes(SEGMENT_BYTES),
        ..config(1, 1)
    }
}

fn start(disk: &MemVfs) -> Result<Member> {
    Member::start(&single(), disk, &Transcript::default())
}

/// The directory of this version. `UPDATE_GOLDEN` creates it first.
fn kept() -> &'static Path {
    static KEPT: OnceLock<PathBuf> = OnceLock::new();
    KEPT.get_or_init(|| {
        let path = format!("{}/tests/data/v{}", env!("CARGO_MANIFEST_DIR"), wal::VERSION);
        let kept = PathBuf::from(path);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            let _ = std::fs::remove_dir_all(&kept);
            create(&kept);
        }
        assert!(
            kept.is_dir(),
            "{} is missing: run UPDATE_GOLDEN=1 cargo test --test core data",
            kept.display()
        );
        kept
    })
}

/// Writes the directory of a member that has a snapshot, entries after it, and a learner that moved.
fn create(kept: &Path) {
    let mut member = start(&MemVfs::default()).unwrap();
    member.tick_until_leader().unwrap();
    for (key, value) in [
        ("/hello", "world"),
        ("/path?query", "first"),
        ("/binary", "a\u{0}b\n"),
        ("/path?query", "second"),
        ("/path?query", "third"),
        ("/path?query", "overwritten"),
        ("/last", "after the snapshot"),
    ] {
        assert!(member.put(key, value).unwrap().is_ok());
    }
    for change in
        [MemberRequest::Add { id: 2, url: url(2) }, MemberRequest::Move { id: 2, url: url(7) }]
    {
        assert!(member.change(change).unwrap().is_ok());
    }
    member.node.stop().unwrap();
    let disk = member.crash(Survives::Nothing);
    for path in disk.paths() {
        let target = kept.join(path.strip_prefix(DATA).unwrap());
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::write(target, disk.contents(&path)).unwrap();
    }
}

/// The files of the directory, as paths in it.
fn files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    for dir in ["raftexample-1", "raftexample-1-snap"] {
        for file in std::fs::read_dir(kept().join(dir)).unwrap() {
            files.push(Path::new(dir).join(file.unwrap().file_name()));
        }
    }
    files.sort();
    files
}

/// A copy of the directory in memory.
fn copy() -> MemVfs {
    let disk = MemVfs::default();
    for file in files() {
        disk.put(&Path::new(DATA).join(&file), &std::fs::read(kept().join(&file)).unwrap());
    }
    disk
}

#[test]
fn tests_data_holds_one_directory() {
    let names: Vec<_> = std::fs::read_dir(kept().parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, [kept().file_name().unwrap()], "remove the directories of other versions");
}

/// Closed segments, preallocated zeros and a snapshot: what a member leaves on a disk.
#[test]
fn a_member_starts_on_a_kept_directory_with_all_it_holds() {
    let segments: Vec<_> = files().into_iter().filter(|path| has_extension(path, "wal")).collect();
    assert!(segments.len() > 1, "{segments:?}");
    let last = std::fs::read(kept().join(segments.last().unwrap())).unwrap();
    assert_eq!(last.last(), Some(&0), "zeros follow the last frame");

    let mut member = start(&copy()).unwrap();
    assert!(member.status().snapshot > 0, "it has a snapshot");
    let state = member.state();
    let found: Vec<_> =
        state.iter().map(|(key, (value, index, _))| (&key[..], &value[..], *index)).collect();
    assert_eq!(found, KEYS);
    assert_eq!(member.wal().identity.incarnation, INCARNATION);
    let members = member.status().members;
    assert_eq!(members.urls, BTreeMap::from([(1, url(1)), (2, url(7))]));
    assert_eq!(members.learners, BTreeSet::from([2]));
    assert_eq!(members.moved, BTreeMap::from([(2, 11)]));

    member.tick_until_leader().unwrap();
    for number in 0..9 {
        assert!(member.put("/new", &format!("value {number}")).unwrap().is_ok());
    }
    member.node.stop().unwrap();
    let state = member.state();
    assert_eq!(start(&member.crash(Survives::Nothing)).unwrap().state(), state);
}

#[test]
fn a_kept_directory_on_a_real_disk_is_opened_and_locked() {
    let temporary = tempfile::tempdir().unwrap();
    for file in files() {
        let target = temporary.path().join(&file);
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::copy(kept().join(&file), target).unwrap();
    }
    let config = NodeConfig { data_dir: temporary.path().into(), ..single() };
    let logger = logs::discard();
    let first = replay_wal(&config, Arc::new(DiskVfs), &logger).unwrap();
    let second = replay_wal(&config, Arc::new(DiskVfs), &logger);
    let error = second.err().expect("the directory is locked").to_string();
    assert!(error.contains("in use by another process"), "{error}");
    drop(first);
}

fn has_extension(path: &Path, wanted: &str) -> bool {
    path.extension().is_some_and(|extension| extension == wanted)
}

/// The kept directory, where `change` gave one file another version.
fn assert_refused(extension: &str, supported: u32, change: impl Fn(&mut Vec<u8>)) {
    let disk = copy();
    let path = disk.paths().into_iter().rfind(|path| has_extension(path, extension)).unwrap();
    disk.tamper(&path, change);
    let tampered = disk.contents(&path);
    let error = start(&disk).err().expect("the member refuses to start");
    assert!(matches!(error, Error::OtherVersion { .. }), "{error}");
    let expected = format!(
        "{} has format version {}, this program reads version {supported}: run the release that \
         wrote it",
        path.display(),
        supported + 1
    );
    assert_eq!(error.to_string(), expected);
    assert!(disk.contents(&path) == tampered, "the file is left as it was");
}

/// The offsets are those in `wal/format.rs`.
#[test]
fn a_segment_of_another_version_is_refused_by_name() {
    assert_refused("wal", wal::VERSION, |bytes| {
        // The frame header, the record's kind and length, and the magic come first.
        let version = 16 + 5 + 8;
        assert_eq!(bytes[version..version + 4], wal::VERSION.to_le_bytes());
        bytes[version] += 1;
        let payload = u32::from_le_bytes(bytes[0..4].try_into().unwrap()) as usize;
        let end = 16 + (payload / 16 + 1) * 16;
        let checksum = crc32c::crc32c(&bytes[16..end]);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
        let header = crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &[0; 24]);
        bytes[12..16].copy_from_slice(&header.to_le_bytes());
    });
}

/// The log holds all entries of the snapshot, but a member must not start with the log alone: the
/// snapshot is not damaged. The checksums are those of any other layout: wrong.
#[test]
fn a_snapshot_of_another_version_is_refused_by_name() {
    assert_refused("snap", snapshotter::VERSION, |bytes| {
        assert_eq!(bytes[8..12], snapshotter::VERSION.to_le_bytes());
        bytes[8] += 1;
        let header = 32 + u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        let checksum = crc32c::crc32c(&bytes[..header]);
        bytes[header..header + 4].copy_from_slice(&checksum.to_le_bytes());
        let end = bytes.len() - 4;
        let checksum = crc32c::crc32c(&bytes[..end]);
        bytes[end..].copy_from_slice(&checksum.to_le_bytes());
    });
}
