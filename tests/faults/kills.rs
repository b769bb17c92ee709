//! kill -9: of one member, of the leader, of all at once. Only the data on disk remains.

use std::thread;
use std::time::Duration;

use crate::runner::{FAST, Run, SMALL, rounds};
use crate::support::processes::Cluster;

/// Writes acknowledged between two faults.
const WRITES: usize = 50;

/// The number of kills, and the longest absence of a member.
struct Plan {
    rounds: usize,
    away_max: Duration,
}

const fn short(rounds: usize) -> Plan {
    Plan { rounds, away_max: Duration::from_millis(300) }
}

const fn long(rounds: usize) -> Plan {
    Plan { rounds, away_max: Duration::from_secs(3) }
}

/// Kills the members that `victims` returns under load and restarts them, round after round.
fn kill(kind: &str, plan: &Plan, mut victims: impl FnMut(&mut Run) -> Vec<u64>) {
    let mut run = Run::start(kind, 3, &[&FAST[..], &SMALL].concat());
    for _ in 0..rounds(plan.rounds) {
        let clients = run.load();
        clients.wait_for(WRITES);
        run.assert_alive();
        run.inject();
        for id in victims(&mut run) {
            run.cluster.kill(id);
        }
        // The length of the absence is part of the fault.
        thread::sleep(run.random.time(plan.away_max));
        start_killed(&mut run.cluster);
        clients.wait_for(WRITES);
        run.check(clients);
    }
    run.finish();
}

fn start_killed(cluster: &mut Cluster) {
    for id in cluster.ids() {
        if cluster.process(id).exited().is_some() {
            cluster.start_again(id);
        }
    }
}

fn kill_one(plan: &Plan) {
    kill("kill -9 of a random member", plan, |run| {
        let ids = run.cluster.ids();
        vec![*run.random.choose(&ids)]
    });
}

fn kill_the_leader(plan: &Plan) {
    kill("kill -9 of the leader", plan, |run| vec![run.cluster.leader().0]);
}

fn kill_all(plan: &Plan) {
    kill("kill -9 of all members at once", plan, |run| run.cluster.ids());
}

#[test]
fn killing_a_member_under_load_loses_nothing() {
    kill_one(&short(4));
}

#[test]
fn killing_the_leader_under_load_loses_nothing() {
    kill_the_leader(&short(4));
}

#[test]
fn killing_all_members_at_once_under_load_loses_nothing() {
    kill_all(&short(4));
}

#[test]
#[ignore = "long: 100 kills"]
fn killing_a_member_100_times_under_load_loses_nothing() {
    kill_one(&long(100));
}

#[test]
#[ignore = "long: 100 kills"]
fn killing_the_leader_100_times_under_load_loses_nothing() {
    kill_the_leader(&long(100));
}

#[test]
#[ignore = "long: 50 times all members"]
fn killing_all_members_50_times_under_load_loses_nothing() {
    kill_all(&long(50));
}
