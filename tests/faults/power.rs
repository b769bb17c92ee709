//! Power cuts: each member has its own disk, which loses unsynced data, names and lengths.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::disks::places_on;
use crate::runner::{FAST, Run, SMALL, rounds};
use crate::support::mounts::{Journal, Mount, cut_power};
use crate::support::processes::{
    Client, Cluster, PATIENCE, Site, eventually, eventually_some, get, owned, serves, skip,
};

/// Writes acknowledged between two faults.
const WRITES: usize = 50;

fn disks() -> Option<Vec<Mount>> {
    let disks: Option<Vec<Mount>> = (0..3).map(|_| Mount::disk()).collect();
    if disks.is_none() {
        skip("no power is cut: it takes root, ext4 on a loop device, and perl or python3");
    }
    disks
}

/// Starts three members on their own disks with `launcher`.
fn start(disks: &[Mount], launcher: &[&str]) -> Cluster {
    let site = Site::new();
    let mut places = places_on(&site, disks);
    places.iter_mut().for_each(|place| place.launcher = owned(launcher));
    Cluster::start_at(site, places, &[&FAST[..], &SMALL].concat())
}

/// Cuts the power of some members and their disks at once, then restores it.
fn cut(cluster: &mut Cluster, disks: &[Mount], victims: &[u64], journal: Journal) {
    let theirs: Vec<&Mount> = victims.iter().map(|id| &disks[*id as usize - 1]).collect();
    let pids: Vec<u32> = victims.iter().map(|id| cluster.process(*id).pid()).collect();
    assert!(cut_power(&pids, &theirs, journal));
    // They are killed; wait until they are gone.
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

/// The proof that the other tests prove something. If the journal was written, files exist and are
/// empty, and members refuse them: detected, but the writes are lost as well.
#[test]
fn without_fdatasync_a_power_cut_loses_acknowledged_writes() {
    // The system call is not made, and the member is told that it succeeded.
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

/// Clients that write new keys until they are stopped.
struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicUsize>,
    clients: Vec<JoinHandle<Vec<String>>>,
}

impl Load {
    /// Each client writes to one member until that fails, then to the next, always a new key.
    fn start(name: &str, members: &[SocketAddr], clients: usize, pause: Duration) -> Self {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let client = |number: usize| {
            let (name, members) = (name.to_owned(), members.to_vec());
            let (stop, count) = (stop.clone(), count.clone());
            thread::spawn(move || {
                let mut acknowledged = Vec::new();
                let mut member = number;
                let mut client = Client::new(members[member % members.len()]);
                for sequence in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let key = format!("/{name}-{number}-{sequence}");
                    match client.put(&key, key.as_bytes()) {
                        Ok(204) => {
                            acknowledged.push(key);
                            count.fetch_add(1, Ordering::Relaxed);
                        }
                        // The outcome is unknown, so it does not count.
                        _ => {
                            member += 1;
                            client = Client::new(members[member % members.len()]);
                        }
                    }
                    // The rate of the load, not a wait.
                    thread::sleep(pause);
                }
                acknowledged
            })
        };
        let clients = (0..clients).map(client).collect();
        Self { stop, acknowledged: count, clients }
    }

    /// Waits for this many more acknowledged writes.
    fn wait_for(&self, more: usize) {
        let count = || self.acknowledged.load(Ordering::Relaxed);
        let before = count();
        eventually(PATIENCE, "clients write", || count() >= before + more);
    }

    /// Stops the clients; returns the acknowledged keys.
    fn stop(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    }
}
