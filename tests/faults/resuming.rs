//! How long writes are interrupted when the leader dies (P4).

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::runner::{rounds, seed};
use crate::support::processes::{Client, Cluster, PATIENCE, serves};
use crate::support::random::Random;

const KILLS: usize = 100;
/// Default flags: ten ticks of 100 ms.
const ELECTION_TIMEOUT: Duration = Duration::from_secs(1);
/// The longest pause between two kills, so that kills meet any moment between two heartbeats.
const CALM: Duration = Duration::from_millis(500);

/// Default flags, an otherwise idle machine, and a connected majority.
#[test]
#[ignore = "long: 100 kills of the leader; needs a machine that does nothing else"]
fn writes_resume_within_two_election_timeouts_of_a_leader_kill() {
    let mut random = Random::new(seed());
    let mut cluster = Cluster::start(3, &[]);
    let mut took = Vec::new();
    for kill in 0..rounds(KILLS) {
        cluster.all_serve();
        let (leader, _) = cluster.leader();
        cluster.put(leader, "/before", "written");
        thread::sleep(random.time(CALM));
        cluster.kill(leader);
        let killed = Instant::now();
        let survivors: Vec<SocketAddr> = cluster
            .ids()
            .iter()
            .filter(|id| **id != leader)
            .map(|id| cluster.address(*id))
            .collect();
        took.push(first_acknowledged(&survivors, kill) - killed);
        cluster.start_again(leader);
        serves(cluster.address(leader));
    }
    took.sort_unstable();
    let within =
        |timeouts: u32| took.iter().filter(|took| **took <= timeouts * ELECTION_TIMEOUT).count();
    let at = |percent: usize| took[(took.len() * percent).div_ceil(100) - 1].as_millis();
    println!(
        "RESUMED after {} leader kills | least {} ms | half {} ms | 90 % {} ms | 95 % {} ms | most {} ms | within two election timeouts {} | within five {}",
        took.len(),
        took[0].as_millis(),
        at(50),
        at(90),
        at(95),
        at(100),
        within(2),
        within(5)
    );
    assert_eq!(within(5), took.len(), "{took:?}");
    assert!(100 * within(2) >= 95 * took.len(), "{took:?}");
}

/// Writes at each of `members` until one acknowledges; returns the time.
fn first_acknowledged(members: &[SocketAddr], kill: usize) -> Instant {
    let is_done = AtomicBool::new(false);
    let begun = Instant::now();
    let write = |address: SocketAddr| {
        let mut client = Client::new(address);
        for attempt in 0.. {
            let answered =
                client.put(&format!("/after-{kill}"), format!("{address}-{attempt}").as_bytes());
            if matches!(answered, Ok(204)) {
                is_done.store(true, Ordering::Relaxed);
                return Some(Instant::now());
            }
            if is_done.load(Ordering::Relaxed) {
                return None;
            }
            assert!(begun.elapsed() < PATIENCE, "no write is acknowledged: {answered:?}");
        }
        unreachable!("attempts do not run out")
    };
    thread::scope(|scope| {
        let writers: Vec<_> =
            members.iter().map(|address| scope.spawn(|| write(*address))).collect();
        let acknowledged = writers.into_iter().filter_map(|writer| writer.join().unwrap());
        acknowledged.min().expect("the writers go on until one is acknowledged")
    })
}
