//! A failed sync marks its data as clean: the data stays readable until a power cut, and reaches
//! the disk only if it is written again. So reading it after a restart proves nothing, and neither
//! does another sync.

use std::io::ErrorKind;
use std::path::Path;

use raftexample::raft_node::NodeConfig;
use raftexample::storage::{Vfs, VfsFile};

use crate::crash::{check_recovery, lagging_follower, recover, start, thirty_puts};
use crate::support::memory::*;

/// The behaviour of the simulated disk that these tests rely on.
#[test]
fn data_of_a_failed_sync_is_readable_and_lost_unless_rewritten() {
    let path = Path::new(DATA).join("file");
    let fill = |file: &dyn VfsFile, byte: u8| file.write_all_at(&[byte; 2000], 0).unwrap();
    for written_again in [false, true] {
        let disk = MemVfs::default();
        let file = disk.create(&path).unwrap();
        disk.sync_dir(Path::new(DATA)).unwrap();
        fill(&*file, 1);
        file.sync().unwrap();
        fill(&*file, 2);
        disk.inject(1, Fault::Fails(ErrorKind::Other));
        file.sync().unwrap_err();
        let disk = disk.crash(Survives::Everything);
        let file = disk.open(&path).unwrap();
        assert_eq!(disk.contents(&path), [2; 2000]);
        if written_again {
            fill(&*file, 2);
        }
        file.sync().unwrap();
        let disk = disk.crash(Survives::Nothing);
        assert_eq!(disk.contents(&path), [1 + u8::from(written_again); 2000]);
    }
    for changed_again in [false, true] {
        let disk = MemVfs::default();
        disk.create(&path).unwrap();
        disk.inject(1, Fault::Fails(ErrorKind::Other));
        disk.sync_dir(Path::new(DATA)).unwrap_err();
        let disk = disk.crash(Survives::Everything);
        if changed_again {
            disk.create(&path.with_extension("other")).unwrap();
        }
        disk.sync_dir(Path::new(DATA)).unwrap();
        assert_eq!(disk.crash(Survives::Nothing).paths().contains(&path), changed_again);
    }
}

/// Starts the member, has it acknowledge a PUT, and cuts the power.
fn check_power_cut_after_a_restart(disk: &MemVfs, what: &str) {
    let (mut member, _) = recover(disk, what);
    let term = member.status().term;
    assert!(member.put("key0", "acknowledged after the restart").unwrap().is_ok(), "{what}");
    let state = member.state();
    let disk = member.crash(Survives::Nothing);
    let (member, again) = recover(&disk, &format!("{what}, after the power cut"));
    assert_eq!(again, state, "{what}: the state after the power cut");
    assert!(member.status().term > term, "{what}: term {term} is led twice");
}

#[test]
fn writes_after_a_failed_sync_and_restart_survive_a_power_cut() {
    for operation in 1.. {
        let (disk, transcript) = (MemVfs::default(), Transcript::default());
        disk.inject(operation, Fault::Fails(ErrorKind::Other));
        let (acknowledged, _) = thirty_puts(&disk, &transcript);
        if !disk.fault_happened() {
            assert!(operation > 200, "{operation}");
            break;
        }
        let lines = transcript.lines();
        let fault = lines.iter().find(|line| line.contains("FAULT")).unwrap();
        let what = format!("operation {operation}, {fault}");
        let disk = disk.crash(Survives::Everything);
        check_recovery(&disk.copy(), acknowledged, &what);
        check_power_cut_after_a_restart(&disk, &what);
    }
}

/// The disk fails again at some operation of the next start, and works at the one after that.
#[test]
fn writes_after_two_failed_syncs_survive_a_power_cut() {
    for first in 1.. {
        let (disk, transcript) = (MemVfs::default(), Transcript::default());
        disk.inject(first, Fault::Fails(ErrorKind::Other));
        let (acknowledged, _) = thirty_puts(&disk, &transcript);
        if !disk.fault_happened() {
            break;
        }
        // All operations of a kind are alike, except those on names.
        let is_directory = transcript.lines().join("\n").contains("FAULT sync directory");
        if !is_directory && first % 9 != 0 {
            continue;
        }
        for second in 1.. {
            let disk = disk.copy();
            disk.inject(second, Fault::Fails(ErrorKind::Other));
            if start(&disk, &Transcript::default()).is_ok() {
                assert!(second > 5 && !disk.fault_happened(), "{second}");
                break;
            }
            let what = format!("operation {first}, and {second} of the next start");
            let disk = disk.crash(Survives::Everything);
            check_recovery(&disk.copy(), acknowledged, &what);
            check_power_cut_after_a_restart(&disk, &what);
        }
    }
}

/// A follower's disk fails while it installs a snapshot and appends the following entries.
#[test]
fn a_followers_entries_after_a_failed_sync_survive_a_power_cut() {
    for operation in 1.. {
        let mut network = lagging_follower();
        let disk = network.member(3).disk.clone();
        disk.inject(operation, Fault::Fails(ErrorKind::Other));
        network.settle();
        assert!(network.put(1, "key", "while the disk fails").is_ok());
        if !disk.fault_happened() {
            assert!(operation > 5, "{operation}");
            break;
        }
        let what = format!("operation {operation}");
        assert!(network.ended.contains_key(&3), "{what}: it goes on");
        let again = NodeConfig {
            boot: 2003,
            snapshot_count: 5,
            snapshot_catch_up_entries: 1,
            ..config(3, 3)
        };
        network.transcript.clear();
        network.start(&again, &disk.crash(Survives::Everything)).unwrap();
        network.settle();
        let lines = network.transcript.of(3);
        let acknowledged: u64 = lines
            .iter()
            .filter_map(|line| line.rsplit_once(", has "))
            .map(|(_, index)| index.parse().unwrap())
            .max()
            .expect("it caught up");
        assert_eq!(acknowledged, network.member(1).status().commit, "{what}");
        let disk = network.crash(3, Survives::Nothing);
        let member = Member::start(&again, &disk, &Transcript::default())
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(member.wal().last_index() >= acknowledged, "{what}: {:?}", member.wal());
    }
}

/// With `--data-dir node/data` the last directory to sync is the working directory.
#[test]
fn a_relative_data_directory_survives_a_power_cut() {
    let config = NodeConfig { data_dir: "node/data".into(), ..config(1, 1) };
    let mut member = Member::start(&config, &MemVfs::default(), &Transcript::default()).unwrap();
    member.tick_until_leader().unwrap();
    assert!(member.put("key", "value").unwrap().is_ok());
    let state = member.state();
    let disk = member.crash(Survives::Nothing);
    let mut member = Member::start(&config, &disk, &Transcript::default()).unwrap();
    member.tick_until_leader().unwrap();
    assert_eq!(member.state(), state);
}
