//! Members that are paused and continue without noticing: SIGSTOP, SIGCONT.
//!
//! etcd #20418: a leader is paused while another is elected, wakes up, believes that it still
//! leads, and answers. Clients whose requests wait in its sockets would see old values, and the
//! history would not be linearizable.

use std::thread;

use crate::runner::{FAST, FAST_ELECTION_TIMEOUT, Run, rounds};
use crate::support::processes::Signal;

/// Writes acknowledged before, during and after the pause.
const WRITES: usize = 50;
/// Lengths of a pause in election timeouts: too short for an election, long enough for one, and
/// long enough for all others to give the member up.
const ELECTION_TIMEOUTS: [u32; 3] = [1, 3, 20];

#[derive(Clone, Copy)]
enum Who {
    Leader,
    Follower,
}

fn pause(kind: &str, who: Who, default_rounds: usize) {
    let mut run = Run::start(kind, 3, &FAST);
    for _ in 0..rounds(default_rounds) {
        for timeouts in ELECTION_TIMEOUTS {
            let clients = run.load();
            clients.wait_for(WRITES);
            let (leader, follower) = run.leader_and_follower();
            let paused = match who {
                Who::Leader => leader,
                Who::Follower => follower,
            };
            run.inject();
            run.cluster.process(paused).pause();
            // The length of the pause is the fault.
            thread::sleep(timeouts * FAST_ELECTION_TIMEOUT);
            run.cluster.process(paused).signal(Signal::SIGCONT);
            clients.wait_for(WRITES);
            run.check(clients);
        }
    }
    run.finish();
}

#[test]
fn a_paused_leader_answers_nothing_from_stale_knowledge() {
    pause("SIGSTOP of the leader", Who::Leader, 1);
}

#[test]
fn a_paused_follower_answers_nothing_from_stale_knowledge() {
    pause("SIGSTOP of a follower", Who::Follower, 1);
}

#[test]
#[ignore = "long: 60 pauses"]
fn a_leader_paused_60_times_serves_nothing_stale() {
    pause("SIGSTOP of the leader", Who::Leader, 20);
}

#[test]
#[ignore = "long: 60 pauses"]
fn a_follower_paused_60_times_serves_nothing_stale() {
    pause("SIGSTOP of a follower", Who::Follower, 20);
}
