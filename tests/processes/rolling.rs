//! A rolling restart under load: a stopping leader transfers the leadership first, so no request
//! waits for an election timeout.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::processes::{
    Client, Cluster, PATIENCE, Signal, assert_holds, eventually, serves,
};

/// The default.
const ELECTION_TIMEOUT: Duration = Duration::from_secs(1);
const CLIENTS: usize = 8;
/// Restarts of each of the three members.
const ROUNDS: usize = 3;

/// The clients' observations.
#[derive(Default)]
struct Seen {
    /// The time of each acknowledged write.
    successes: Mutex<Vec<Instant>>,
    acknowledged: Mutex<Vec<String>>,
    stop: AtomicBool,
}

/// Writes one key after another, at the next member if one refuses, is gone, or has no leader.
fn write(seen: &Seen, number: usize, addresses: &[SocketAddr]) {
    let mut clients: Vec<Client> = addresses.iter().map(|address| Client::new(*address)).collect();
    let mut at = number;
    for sequence in 0.. {
        if seen.stop.load(Ordering::Relaxed) {
            return;
        }
        let key = format!("/{number}-{sequence}");
        // After an unknown outcome the next key follows: a write is never repeated.
        match clients[at % addresses.len()].put(&key, key.as_bytes()) {
            Ok(204) => {
                seen.successes.lock().unwrap().push(Instant::now());
                seen.acknowledged.lock().unwrap().push(key);
            }
            Ok(504) => {}
            _ => at += 1,
        }
    }
}

#[test]
fn a_rolling_restart_loses_nothing_and_delays_no_request() {
    let mut cluster = Cluster::start(3, &[]);
    let addresses = cluster.addresses();
    let seen = Seen::default();
    let mut gaps = Vec::new();
    thread::scope(|scope| {
        for number in 0..CLIENTS {
            let (seen, addresses) = (&seen, &addresses);
            scope.spawn(move || write(seen, number, addresses));
        }
        let count = || seen.successes.lock().unwrap().len();
        let goes_on = || {
            let before = count();
            eventually(PATIENCE, "the clients write", || count() > before + 100 * CLIENTS);
        };
        goes_on();
        for _ in 0..ROUNDS {
            for id in 1..=3 {
                let (leader, _) = cluster.leader();
                let began = Instant::now();
                cluster.stop(id, Signal::SIGTERM);
                let stopped = began.elapsed();
                cluster.start_again(id);
                serves(cluster.address(id));
                goes_on();
                let successes = seen.successes.lock().unwrap();
                let since = successes.partition_point(|at| *at < began).saturating_sub(1);
                let mut times = successes[since..].to_vec();
                times.sort_unstable();
                let gap = times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
                let what = if id == leader { "the leader" } else { "a follower" };
                eprintln!("{what} stopped in {stopped:.0?}, longest gap {gap:.0?}");
                gaps.push(gap);
            }
        }
        seen.stop.store(true, Ordering::Relaxed);
    });
    gaps.sort_unstable();
    assert!(gaps[gaps.len() / 2] < Duration::from_millis(300), "{gaps:?}");
    assert!(gaps[gaps.len() - 1] < ELECTION_TIMEOUT, "{gaps:?}");
    let acknowledged = seen.acknowledged.into_inner().unwrap();
    eprintln!("{} writes acknowledged, gaps {gaps:.0?}", acknowledged.len());
    assert_holds(&addresses, &acknowledged);
}
