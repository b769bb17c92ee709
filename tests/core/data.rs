//! A data directory of each version of the log's format. `UPDATE_GOLDEN=1 cargo test --test core
//! data` makes the one of the current version anew; never do that for a version that was released.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use raftexample::channels::MemberRequest;
use raftexample::error::Result;
use raftexample::raft_node::NodeConfig;
use raftexample::storage::DiskVfs;

use crate::support::logs;
use crate::support::memory::*;

/// From version 2 on a segment is closed, so there are several.
const SEGMENT_BYTES: u64 = 512;

fn kept(version: u32) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/v{version}"))
}

fn single() -> NodeConfig {
    NodeConfig {
        incarnation: 0x1122_3344_5566_7788,
        snapshot_count: 5,
        snapshot_catch_up_entries: 2,
        ..config(1, 1)
    }
}

/// What it holds.
const KEYS: [(&str, &str, u64); 4] = [
    ("/binary", "a\u{0}b\n", 5),
    ("/hello", "world", 3),
    ("/last", "behind the snapshot", 9),
    ("/path?query", "overwritten", 8),
];

fn make() {
    let mut member = start(&MemVfs::default()).unwrap();
    member.tick_until_leader().unwrap();
    for (key, value) in [
        ("/hello", "world"),
        ("/path?query", "first"),
        ("/binary", "a\u{0}b\n"),
        ("/path?query", "second"),
        ("/path?query", "third"),
        ("/path?query", "overwritten"),
        ("/last", "behind the snapshot"),
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
        let target = kept(4).join(path.strip_prefix(DATA).unwrap());
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::write(target, disk.contents(&path)).unwrap();
    }
}

fn start(disk: &MemVfs) -> Result<Member> {
    Member::start_with_segments(&single(), disk, &Transcript::default(), Some(SEGMENT_BYTES))
}

/// A copy of the kept directory in memory.
fn copy(version: u32) -> MemVfs {
    let disk = MemVfs::default();
    for dir in ["raftexample-1", "raftexample-1-snap"] {
        for file in std::fs::read_dir(kept(version).join(dir)).unwrap() {
            let path = file.unwrap().path();
            let target = Path::new(DATA).join(dir).join(path.file_name().unwrap());
            disk.put(&target, &std::fs::read(&path).unwrap());
        }
    }
    disk
}

fn check_keys(member: &mut Member) {
    let state = member.state();
    let found: Vec<_> =
        state.iter().map(|(key, (value, index, _))| (&key[..], &value[..], *index)).collect();
    assert_eq!(found, KEYS);
}

/// Its log goes on in the current version, and is opened again.
fn check_opened(version: u32) {
    let mut member = start(&copy(version)).unwrap();
    assert!(member.status().snapshot > 0, "it has a snapshot");
    check_keys(&mut member);
    let wal = member.wal();
    assert_eq!(wal.identity.incarnation, 0x1122_3344_5566_7788);
    member.tick_until_leader().unwrap();
    for number in 0..9 {
        assert!(member.put("/new", &format!("value {number}")).unwrap().is_ok());
    }
    member.node.stop().unwrap();
    let state = member.state();
    assert_eq!(start(&member.crash(Survives::Nothing)).unwrap().state(), state);
}

#[test]
fn a_directory_of_version_1_is_opened() {
    check_opened(1);
}

#[test]
fn a_directory_of_version_2_is_opened() {
    let segments = std::fs::read_dir(kept(2).join("raftexample-1")).unwrap().count();
    assert!(segments > 1, "{segments}");
    check_opened(2);
}

#[test]
fn a_directory_of_version_3_is_opened() {
    let segments = std::fs::read_dir(kept(3).join("raftexample-1")).unwrap();
    let last = segments.map(|segment| segment.unwrap().path()).max().unwrap();
    assert_eq!(std::fs::read(last).unwrap().last(), Some(&0), "zeros are written ahead");
    check_opened(3);
}

/// It holds a learner that moved.
#[test]
fn a_directory_of_version_4_is_opened() {
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        make();
    }
    check_opened(4);
    let members = start(&copy(4)).unwrap().status().members;
    assert_eq!(members.urls, BTreeMap::from([(1, url(1)), (2, url(7))]));
    assert_eq!(members.learners, BTreeSet::from([2]));
    assert_eq!(members.moved, BTreeMap::from([(2, 11)]));
}

#[test]
fn the_directories_of_all_versions_are_opened_on_a_real_disk() {
    (1..=4).for_each(check_opened_on_a_real_disk);
}

fn check_opened_on_a_real_disk(version: u32) {
    let temporary = tempfile::tempdir().unwrap();
    for dir in ["raftexample-1", "raftexample-1-snap"] {
        std::fs::create_dir(temporary.path().join(dir)).unwrap();
        for file in std::fs::read_dir(kept(version).join(dir)).unwrap() {
            let path = file.unwrap().path();
            let target = temporary.path().join(dir).join(path.file_name().unwrap());
            std::fs::copy(&path, target).unwrap();
        }
    }
    let config = NodeConfig { data_dir: temporary.path().into(), ..single() };
    let logger = logs::discard();
    let vfs = Arc::new(DiskVfs);
    let first = raftexample::raft_node::replay::replay_wal(&config, vfs.clone(), &logger).unwrap();
    let second = raftexample::raft_node::replay::replay_wal(&config, vfs, &logger);
    let error = second.err().expect("the directory is locked").to_string();
    assert!(error.contains("in use by another process"), "{error}");
    drop(first);
}

/// Offsets as in `wal/format.rs` and `snapshotter.rs`.
#[test]
fn a_directory_of_another_version_is_refused_with_both_versions() {
    let refusal = |disk: &MemVfs| start(disk).err().expect("it is refused").to_string();
    let disk = copy(4);
    let segments: Vec<_> = disk
        .paths()
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "wal"))
        .collect();
    disk.tamper(&segments[0], |bytes| {
        // The header's 16 bytes, the record's kind and length, the magic.
        let version = 16 + 5 + 8;
        assert_eq!(bytes[version..version + 4], 4_u32.to_le_bytes());
        bytes[version] = 5;
        let payload = u32::from_le_bytes(bytes[0..4].try_into().unwrap()) as usize;
        let end = 16 + (payload / 16 + 1) * 16;
        let checksum = crc32c::crc32c(&bytes[16..end]);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
        let mut header = crc32c::crc32c(&bytes[..12]);
        for salt in [0_u64, 0, 0] {
            header = crc32c::crc32c_append(header, &salt.to_le_bytes());
        }
        bytes[12..16].copy_from_slice(&header.to_le_bytes());
    });
    let error = refusal(&disk);
    assert!(error.contains("format version 5, this program reads 1 to 4"), "{error}");

    let disk = copy(4);
    let snapshots: Vec<_> = disk
        .paths()
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "snap"))
        .collect();
    // The log alone must not make up for it.
    disk.tamper(snapshots.last().unwrap(), |bytes| {
        assert_eq!(bytes[8..12], 2_u32.to_le_bytes());
        bytes[8] = 3;
        let header = 32 + u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        let checksum = crc32c::crc32c(&bytes[..header]);
        bytes[header..header + 4].copy_from_slice(&checksum.to_le_bytes());
        let end = bytes.len() - 4;
        let checksum = crc32c::crc32c(&bytes[..end]);
        bytes[end..].copy_from_slice(&checksum.to_le_bytes());
    });
    let error = refusal(&disk);
    assert!(error.contains("format version 3, this program reads 1 to 2"), "{error}");
}
