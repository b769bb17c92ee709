//! Power cuts: each member has a disk of its own, and what was not synced to it when the power
//! goes is lost, files, names and lengths alike.

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::disks::places_on;
use crate::harness::{
    Client, Cluster, Load, PATIENCE, Site, eventually_some, get, owned, serves, skip,
};
use crate::mounts::{Journal, Mount, cut_power};
use crate::runner::{FAST, Run, SMALL, rounds};

/// Acknowledged between two faults.
const WRITES: usize = 50;

fn disks() -> Option<Vec<Mount>> {
    let disks: Option<Vec<Mount>> = (0..3).map(|_| Mount::disk()).collect();
    if disks.is_none() {
        skip("no power is cut: it takes root, ext4 on a loop device, and perl or python3");
    }
    disks
}

/// Starts three members on disks of their own, by `launcher`.
fn start(disks: &[Mount], launcher: &[&str]) -> Cluster {
    let site = Site::new();
    let mut places = places_on(&site, disks);
    places.iter_mut().for_each(|place| place.launcher = owned(launcher));
    Cluster::start_at(site, places, &[&FAST[..], &SMALL].concat())
}

/// Cuts the power of some members and their disks at once; then it is back.
fn cut(cluster: &mut Cluster, disks: &[Mount], victims: &[u64], journal: Journal) {
    let theirs: Vec<&Mount> = victims.iter().map(|id| &disks[*id as usize - 1]).collect();
    let pids: Vec<u32> = victims.iter().map(|id| cluster.process(*id).pid()).collect();
    assert!(cut_power(&pids, &theirs, journal));
    // They are killed; this waits until they are gone.
    victims.iter().for_each(|id| cluster.kill(*id));
    theirs.iter().for_each(|disk| disk.restore_power());
}

/// Cuts the power of one member, of the leader and of all in turn, under load.
fn cut_in_turn(kind: &str, rounds: usize) {
    let Some(disks) = disks() else { return };
    let mut run = Run::with(kind, start(&disks, &[]));
    for round in 0..rounds {
        let clients = run.load();
        clients.wait_for(WRITES);
        run.assert_alive();
        let (leader, follower) = run.leader_and_follower();
        let (victims, journal) = match round % 6 {
            0 => (vec![1, 2, 3], Journal::Lost),
            1 => (vec![leader], Journal::Written),
            2 => (vec![follower], Journal::Lost),
            3 => (vec![1, 2, 3], Journal::Written),
            4 => (vec![leader], Journal::Lost),
            _ => (vec![follower], Journal::Written),
        };
        run.inject();
        cut(&mut run.cluster, &disks, &victims, journal);
        if victims.len() == 1 {
            clients.wait_for(WRITES);
        }
        victims.iter().for_each(|id| run.cluster.start_again(*id));
        victims.iter().for_each(|id| serves(run.cluster.address(*id)));
        clients.wait_for(WRITES);
        run.check(clients);
    }
    run.finish();
}

/// The proof that the others prove something. Where the file system's journal was written, files are
/// there and empty, and the members refuse them: that is noticed, but the writes are lost as well.
#[test]
fn without_fdatasync_a_power_cut_loses_acknowledged_writes() {
    // The call is not made, and the member is told that it was.
    let strace = ["strace", "-D", "-f", "--seccomp-bpf", "-o", "/dev/null"];
    let calls = ["-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:retval=0"];
    let launcher = [&strace[..], &calls].concat();
    let mut tried = Command::new(launcher[0]);
    tried.args(&launcher[1..]).arg("true").stderr(Stdio::null());
    if !tried.status().is_ok_and(|status| status.success()) {
        return skip("no sync is left out: strace is not installed, or may not trace");
    }
    for journal in [Journal::Lost, Journal::Written] {
        let Some(disks) = disks() else { return };
        let mut cluster = start(&disks, &launcher);
        let load = Load::start("unsynced", &cluster.addresses(), 8, Duration::ZERO);
        load.wait_for(WRITES);
        cut(&mut cluster, &disks, &[1, 2, 3], journal);
        let acknowledged = load.stop();
        (1..=3).for_each(|id| cluster.start_again(id));
        let address = cluster.address(1);
        let refused = eventually_some(PATIENCE, "member 1 serves or refuses its disk", || {
            if let Some(status) = cluster.process(1).exited() {
                assert_eq!(status.code(), Some(1), "{}", cluster.process(1).stderr());
                return Some(true);
            }
            let answer = Client::new(address).get("/is-it-there").ok()?;
            (answer.status < 500).then_some(false)
        });
        let is_lost = |key: &&String| get(address, key).is_none();
        let lost = if refused { None } else { Some(acknowledged.iter().filter(is_lost).count()) };
        println!("UNSYNCED {journal:?}: lost, of {}: {lost:?}", acknowledged.len());
        assert!(lost != Some(0), "a power cut loses nothing that was not synced: it is none");
    }
}

#[test]
fn power_cuts_under_load_lose_nothing() {
    cut_in_turn("power cut", 4);
}

#[test]
#[ignore = "long: 100 power cuts"]
fn a_hundred_power_cuts_under_load_lose_nothing() {
    cut_in_turn("power cut", rounds(100));
}
