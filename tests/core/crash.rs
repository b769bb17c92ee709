//! A crash at every file operation (etcd #8082, #12691, #13929): acknowledged writes survive, and a
//! second start finds the same state.

use std::io;

use raftexample::channels::MemberRequest;
use raftexample::raft_node::NodeConfig;

use crate::support::memory::*;

const SEGMENT_BYTES: u64 = 512;
const SURVIVALS: [Survives; 5] = [
    Survives::Nothing,
    Survives::Everything,
    Survives::Some(1),
    Survives::Some(2),
    Survives::Some(3),
];

fn single() -> NodeConfig {
    NodeConfig {
        snapshot_count: 5,
        snapshot_catch_up_entries: 2,
        wal_sizes: sizes(SEGMENT_BYTES),
        ..config(1, 1)
    }
}

pub fn start(disk: &MemVfs, transcript: &Transcript) -> raftexample::error::Result<Member> {
    Member::start(&single(), disk, transcript)
}

/// Makes thirty PUTs; returns how many were acknowledged before an error.
pub fn thirty_puts(
    disk: &MemVfs,
    transcript: &Transcript,
) -> (u64, raftexample::error::Result<()>) {
    let mut acknowledged = 0;
    let mut run = || {
        let mut member = start(disk, transcript)?;
        member.tick_until_leader()?;
        for number in 0..30 {
            let mut answer = member.put(&format!("key{}", number % 7), &number.to_string())?;
            assert!(answer.is_ok(), "a single member answers in the same turn");
            acknowledged = number + 1;
        }
        member.tick()?;
        member.node.stop()
    };
    let result = run();
    (acknowledged, result)
}

/// The values of the keys after the first `count` PUTs.
fn expected(count: u64) -> Vec<(String, String)> {
    let mut state = std::collections::BTreeMap::new();
    for number in 0..count {
        state.insert(format!("key{}", number % 7), number.to_string());
    }
    state.into_iter().collect()
}

fn values(state: &State) -> Vec<(String, String)> {
    state.iter().map(|(key, (value, ..))| (key.clone(), value.clone())).collect()
}

/// Starts the member and reads from it; returns its state.
pub fn recover(disk: &MemVfs, what: &str) -> (Member, State) {
    let mut member = start(disk, &Transcript::default())
        .unwrap_or_else(|error| panic!("{what}: it does not start: {error}"));
    let wal = member.wal();
    let indexes: Vec<u64> = wal.entries.iter().map(|entry| entry.index).collect();
    assert!(indexes.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{what}: {indexes:?}");
    assert!(wal.hard_state.commit <= wal.last_index(), "{what}: {:?}", wal.hard_state);
    member.tick_until_leader().unwrap();
    let mut read = member.read().unwrap();
    assert!(read.is_ok(), "{what}: a fresh read is answered");
    let state = member.state();
    (member, state)
}

/// Checks that the acknowledged PUTs are there, perhaps with the pending one, and again after the
/// next start.
pub fn check_recovery(disk: &MemVfs, acknowledged: u64, what: &str) {
    let (member, state) = recover(disk, what);
    let found = values(&state);
    assert!(
        found == expected(acknowledged) || found == expected(acknowledged + 1),
        "{what}: {acknowledged} were acknowledged, found {found:?}"
    );
    let disk = member.crash(Survives::Nothing);
    let (_, again) = recover(&disk, what);
    assert_eq!(again, state, "{what}: started a second time");
}

/// The scenario covers snapshots, marks, new segments and purges.
#[test]
fn the_scenario_has_every_kind_of_operation() {
    let transcript = Transcript::default();
    let disk = MemVfs::default();
    assert_eq!(thirty_puts(&disk, &transcript).0, 30);
    let all = transcript.lines().join("\n");
    for part in [
        "with mark",
        "with entry",
        ".snap.0.tmp to",
        ".wal.tmp to",
        "remove raftexample-1/",
        "remove raftexample-1-snap/",
    ] {
        assert!(all.contains(part), "no {part} in:\n{all}");
    }
}

#[test]
fn a_crash_at_any_operation_keeps_acknowledged_writes() {
    for survives in SURVIVALS {
        for operation in 1.. {
            let disk = MemVfs::default();
            disk.inject(operation, Fault::Crash);
            let (acknowledged, result) = thirty_puts(&disk, &Transcript::default());
            if !disk.fault_happened() {
                result.unwrap();
                break;
            }
            let what = format!("crash at operation {operation}, {survives:?}");
            assert!(result.is_err(), "{what}");
            check_recovery(&disk.crash(survives), acknowledged, &what);
        }
    }
}

/// Crashes during the recovery from a crash.
#[test]
fn a_crash_during_a_restart_keeps_acknowledged_writes() {
    for first in (5..120).step_by(7) {
        let torn = MemVfs::default();
        torn.inject(first, Fault::Crash);
        let (acknowledged, _) = thirty_puts(&torn, &Transcript::default());
        let torn = torn.crash(Survives::Some(first));
        for operation in 1.. {
            let disk = torn.image();
            disk.inject(operation, Fault::Crash);
            let started = start(&disk, &Transcript::default());
            if !disk.fault_happened() {
                started.unwrap();
                break;
            }
            drop(started);
            let what = format!("crash at {first}, then at operation {operation} of the start");
            check_recovery(&disk.crash(Survives::Some(operation)), acknowledged, &what);
        }
    }
}

/// Three members begin; one of them crashes at some operation of its first start.
#[test]
fn a_first_start_that_crashes_at_any_operation_can_be_repeated() {
    for survives in SURVIVALS {
        for operation in 1.. {
            let mut network = Network::default();
            for id in [1, 2] {
                network.start(&config(id, 3), &MemVfs::default()).unwrap();
            }
            let disk = MemVfs::default();
            disk.inject(operation, Fault::Crash);
            let _ = network.start(&config(3, 3), &disk);
            network.tick(8);
            if !disk.fault_happened() {
                assert!(network.ended.is_empty(), "{:?}", network.ended);
                break;
            }
            network.members.remove(&3);
            let what = format!("crash at operation {operation}, {survives:?}");
            // If its directory survived, so did its incarnation.
            let again = NodeConfig { boot: 2003, incarnation: 203, ..config(3, 3) };
            network
                .start(&again, &disk.crash(survives))
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            network.tick_until(&what, |network| {
                network.members.len() == 3
                    && network.members.values().all(|member| member.status().begun)
            });
            network.elect(1);
            assert!(network.put(1, "key", "value").is_ok());
            network.settle();
            let state = network.member(1).state();
            assert_eq!(network.member(3).state(), state, "{what}");
        }
    }
}

/// Member 4 is added to three members and crashes at some operation of its first start.
#[test]
fn a_joiners_first_start_can_crash_anywhere_and_be_repeated() {
    for survives in SURVIVALS {
        for operation in 1.. {
            let mut network = Network::new(3, |_| {});
            assert!(network.put(1, "key", "value").is_ok());
            let change = MemberRequest::Add { id: 4, url: url(4) };
            let mut addition = network.member(1).change(change).unwrap();
            network.deliver();
            assert!(addition.is_ok(), "{:?}", addition.get());

            let joiner = NodeConfig { join: true, ..config(4, 4) };
            let disk = MemVfs::default();
            disk.inject(operation, Fault::Crash);
            let _ = network.start(&joiner, &disk);
            network.tick(8);
            let caught_up = |network: &Network| {
                network.members.get(&4).is_some_and(|member| {
                    member.status().leader == 1
                        && member.status().applied == network.members[&1].status().applied
                })
            };
            if !disk.fault_happened() {
                assert!(network.ended.is_empty(), "{:?}", network.ended);
                assert!(caught_up(&network), "without a crash");
                assert!(operation > 5, "a start needs more operations");
                break;
            }
            network.members.remove(&4);
            let what = format!("crash at operation {operation}, {survives:?}");
            // A restarted process draws new random numbers.
            let again = NodeConfig { boot: 2004, incarnation: 204, ..joiner };
            network
                .start(&again, &disk.crash(survives))
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            network.tick(12);
            assert!(caught_up(&network), "{what}: {:?}", network.ended.get(&4));
            let state = network.member(1).state();
            assert_eq!(network.member(4).state(), state, "{what}");
            assert!(network.put(4, "key", "later").is_ok(), "{what}");
        }
    }
}

/// Three members; member 3 was cut off and will receive a snapshot.
pub fn lagging_follower() -> Network {
    let mut network = Network::new(3, |config| {
        config.snapshot_count = 5;
        config.snapshot_catch_up_entries = 1;
    });
    network.cut.insert(3);
    for number in 0..12 {
        assert!(network.put(1, &format!("key{}", number % 5), &number.to_string()).is_ok());
    }
    network.cut.clear();
    network
}

#[test]
fn a_follower_that_crashes_in_a_snapshot_install_catches_up() {
    for survives in SURVIVALS {
        for operation in 1.. {
            let mut network = lagging_follower();
            let disk = network.member(3).disk.clone();
            disk.inject(operation, Fault::Crash);
            network.settle();
            if !disk.fault_happened() {
                assert!(network.ended.is_empty(), "{:?}", network.ended);
                let lines = network.transcript.of(3);
                assert!(lines.iter().any(|line| line.contains("commit restore")));
                break;
            }
            let what = format!("crash at operation {operation}, {survives:?}");
            assert!(network.ended.contains_key(&3), "{what}");
            let again = NodeConfig {
                boot: 2003,
                snapshot_count: 5,
                snapshot_catch_up_entries: 1,
                ..config(3, 3)
            };
            network
                .start(&again, &disk.crash(survives))
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            network.settle();
            let (bytes, applied) =
                (network.member(1).state_bytes(), network.member(1).status().applied);
            assert_eq!(network.member(3).status().applied, applied, "{what}");
            assert_eq!(network.member(3).state_bytes(), bytes, "{what}");
            // Once more, from its own disk alone.
            let disk = network.crash(3, Survives::Nothing);
            let mut member = Member::start(&again, &disk, &Transcript::default()).unwrap();
            assert!(member.status().applied >= applied - 1, "{what}: {:?}", member.status());
            assert!(!member.state().is_empty(), "{what}");
        }
    }
}

/// A process that died, then a power cut right after its next start.
#[test]
fn what_was_read_at_a_start_is_on_disk() {
    for operation in (1..200).step_by(3) {
        let disk = MemVfs::default();
        disk.inject(operation, Fault::Fails(io::ErrorKind::Other));
        let (acknowledged, _) = thirty_puts(&disk, &Transcript::default());
        let disk = disk.crash(Survives::Everything);
        let (mut member, state) = recover(&disk, "after the process died");
        let (term, leader) = (member.status().term, member.status().leader);
        member.tick().unwrap();
        let disk = member.crash(Survives::Nothing);
        let (member, again) = recover(&disk, "after the power cut");
        assert_eq!(state, again);
        assert_eq!(leader, member.id);
        assert!(member.status().term > term, "a term is led once");
        assert!(acknowledged <= 30);
    }
}
