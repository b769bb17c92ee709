//! A failed write or sync stops the member, and nothing that depended on it leaves it.

use std::io::ErrorKind;

use crate::crash::{check_recovery, lagging_follower, thirty_puts};
use crate::support::memory::*;

const KINDS: [ErrorKind; 2] = [ErrorKind::Other, ErrorKind::StorageFull];

/// Asserts that member `id` sent and answered nothing after its fault. It may remove temporary
/// files.
fn assert_silent_after_fault(transcript: &Transcript, id: u64, what: &str) {
    let lines = transcript.of(id);
    let fault = lines.iter().position(|line| line.contains("FAULT")).unwrap();
    for line in &lines[fault + 1..] {
        let silent = line.starts_with(&format!("{id} remove ")) && line.ends_with(".tmp");
        assert!(silent, "{what}: after {:?} came {line:?}", lines[fault]);
    }
}

#[test]
fn a_disk_failure_at_any_operation_stops_acknowledgements() {
    for kind in KINDS {
        for operation in 1.. {
            let (disk, transcript) = (MemVfs::default(), Transcript::default());
            disk.inject(operation, Fault::Fails(kind));
            let (acknowledged, result) = thirty_puts(&disk, &transcript);
            if !disk.fault_happened() {
                break;
            }
            let what = format!("{kind:?} at operation {operation}");
            assert!(result.is_err(), "{what}: it goes on");
            assert_silent_after_fault(&transcript, 1, &what);
            check_recovery(&disk.crash(Survives::Nothing), acknowledged, &what);
        }
    }
}

/// Some bytes of a failed write arrive; a failed rename may have happened.
#[test]
fn a_disk_failure_within_an_operation_loses_no_write() {
    for bytes in [1, 16, 60, usize::MAX] {
        for operation in 1.. {
            let (disk, transcript) = (MemVfs::default(), Transcript::default());
            disk.inject(operation, Fault::FailsAfter(ErrorKind::StorageFull, bytes));
            let (acknowledged, result) = thirty_puts(&disk, &transcript);
            if !disk.fault_happened() {
                break;
            }
            let what = format!("{bytes} bytes of operation {operation}");
            assert!(result.is_err(), "{what}: it goes on");
            assert_silent_after_fault(&transcript, 1, &what);
            let survives = match operation % 3 {
                0 => Survives::Everything,
                1 => Survives::Nothing,
                _ => Survives::Some(operation),
            };
            check_recovery(&disk.crash(survives), acknowledged, &what);
        }
    }
}

/// Fails the disk of one member during PUTs at the leader, member 1.
fn put_while_the_disk_fails_of(failing: u64) {
    for kind in KINDS {
        for operation in 1.. {
            let mut network = Network::new(3, |_| {});
            network.transcript.clear();
            let disk = network.member(failing).disk.clone();
            disk.inject(operation, Fault::Fails(kind));
            let mut answers = Vec::new();
            for number in 0..4 {
                if !network.members.contains_key(&1) {
                    break;
                }
                match network.member(1).put("key", &number.to_string()) {
                    Ok(answer) => answers.push(answer),
                    Err(error) => {
                        network.members.remove(&1);
                        network.ended.insert(1, error);
                    }
                }
                network.deliver();
            }
            network.settle();
            if !disk.fault_happened() {
                assert!(operation > 4, "the fault is within the scenario");
                assert!(answers.iter_mut().all(Answer::is_ok));
                break;
            }
            let what = format!("{kind:?} at operation {operation} of member {failing}");
            assert!(network.ended.contains_key(&failing), "{what}: it goes on");
            assert_silent_after_fault(&network.transcript, failing, &what);
            if failing != 1 {
                assert!(answers.iter_mut().all(Answer::is_ok), "{what}: two are a majority");
                assert_eq!(answers.len(), 4, "{what}");
            }
        }
    }
}

#[test]
fn a_leader_whose_disk_fails_sends_and_answers_nothing_more() {
    put_while_the_disk_fails_of(1);
}

#[test]
fn a_follower_whose_disk_fails_acknowledges_nothing_more() {
    put_while_the_disk_fails_of(2);
}

#[test]
fn a_disk_failure_in_a_snapshot_install_stops_the_follower() {
    for operation in 1.. {
        let mut network = lagging_follower();
        network.transcript.clear();
        let disk = network.member(3).disk.clone();
        disk.inject(operation, Fault::Fails(ErrorKind::StorageFull));
        network.settle();
        if !disk.fault_happened() {
            assert!(operation > 5);
            break;
        }
        let what = format!("operation {operation}");
        assert!(network.ended.contains_key(&3), "{what}: it goes on");
        assert_silent_after_fault(&network.transcript, 3, &what);
    }
}

/// Its directories were made for it, in one that it does not own.
#[test]
fn a_read_only_parent_directory_does_not_prevent_a_start() {
    let (disk, transcript) = (MemVfs::default(), Transcript::default());
    drop(Member::start(&config(1, 1), &disk, &transcript).unwrap());
    let disk = disk.crash(Survives::Nothing);
    transcript.clear();
    let first = disk.image();
    drop(Member::start(&config(1, 1), &first, &transcript).unwrap());
    let operations: Vec<String> = transcript.lines();
    let is_file = |line: &&String| {
        !line.contains(" commit ") && !line.contains(" log ") && !line.contains(" send ")
    };
    let files: Vec<&String> = operations.iter().filter(is_file).collect();
    let place = files.iter().position(|line| line.contains("create raftexample-1-snap.tmp"));
    let place = place.unwrap_or_else(|| panic!("{operations:#?}")) as u64 + 1;
    let denied = disk.image();
    denied.inject(place, Fault::Fails(std::io::ErrorKind::PermissionDenied));
    let again = Transcript::default();
    Member::start(&config(1, 1), &denied, &again).unwrap();
    let failed = again.lines().into_iter().find(|line| line.contains("FAULT"));
    assert_eq!(failed.as_deref(), Some("1 FAULT create raftexample-1-snap.tmp"));
}
