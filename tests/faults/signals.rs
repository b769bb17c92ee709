//! Members stopped under load: once, twice, one of them, all of them.

use std::thread;
use std::time::Duration;

use crate::runner::{FAST, Run, SMALL, rounds};
use crate::support::processes::{Client, PATIENCE, Signal, eventually};

/// Writes acknowledged before and after.
const WRITES: usize = 50;
/// Requests that a member has started to read when it is told to stop.
const IN_FLIGHT: usize = 8;
/// The default --request-timeout, plus the time to close connections.
const STOP_TIMEOUT: Duration = Duration::from_secs(6);
/// A second signal ends a member at once.
const AT_ONCE: Duration = Duration::from_secs(2);

/// Stops the members that `victims` returns under load, then restarts them.
fn stop(kind: &str, default_rounds: usize, victims: impl Fn(&mut Run) -> Vec<u64>) {
    let mut run = Run::start(kind, 3, &[&FAST[..], &SMALL].concat());
    for round in 0..rounds(default_rounds) {
        let clients = run.load();
        clients.wait_for(WRITES);
        run.assert_alive();
        let signal = *run.random.choose(&[Signal::SIGTERM, Signal::SIGINT]);
        let victims = victims(&mut run);
        let mut in_flight = Vec::new();
        for number in 0..IN_FLIGHT {
            let mut client = Client::new(run.cluster.address(victims[number % victims.len()]));
            client.send_and_be_heard(&format!("/in-flight-{round}-{number}"), b"value").unwrap();
            in_flight.push(client);
        }
        run.inject();
        for id in &victims {
            run.cluster.process(*id).signal(signal);
        }
        for mut client in in_flight {
            let status = client.receive().expect("a request that was heard is answered").status;
            assert!([204, 503, 504].contains(&status), "{status}");
        }
        for id in victims {
            let member = run.cluster.process(id);
            assert_eq!(member.wait(STOP_TIMEOUT), 0, "{}", member.stderr());
            run.cluster.start_again(id);
        }
        clients.wait_for(WRITES);
        run.check(clients);
    }
    run.finish();
}

fn stop_one(default_rounds: usize) {
    stop("SIGTERM or SIGINT of a random member", default_rounds, |run| {
        let ids = run.cluster.ids();
        vec![*run.random.choose(&ids)]
    });
}

fn stop_all(default_rounds: usize) {
    stop("SIGTERM or SIGINT of all members at once", default_rounds, |run| run.cluster.ids());
}

/// The second signal arrives while the member waits for a request to end.
fn stop_twice(default_rounds: usize) {
    let mut run = Run::start("SIGTERM twice", 3, &[&FAST[..], &SMALL].concat());
    for _ in 0..rounds(default_rounds) {
        let clients = run.load();
        clients.wait_for(WRITES);
        run.assert_alive();
        let ids = run.cluster.ids();
        let id = *run.random.choose(&ids);
        let mut slow = Client::new(run.cluster.address(id));
        slow.begin_and_be_heard("/slow", 1).unwrap();
        run.inject();
        let member = run.cluster.process(id);
        member.signal(Signal::SIGTERM);
        eventually(PATIENCE, "it is stopping", || {
            member.stderr().contains("received SIGTERM, stopping")
        });
        // In between it answers, saves and closes: any moment will do.
        thread::sleep(run.random.time(Duration::from_millis(50)));
        let member = run.cluster.process(id);
        assert!(member.exited().is_none(), "a request still waits");
        member.signal(Signal::SIGTERM);
        assert_eq!(member.wait(AT_ONCE), 1, "{}", member.stderr());
        run.cluster.start_again(id);
        clients.wait_for(WRITES);
        run.check(clients);
    }
    run.finish();
}

#[test]
fn a_member_stopped_under_load_answers_and_loses_nothing() {
    stop_one(4);
}

#[test]
fn all_members_stopped_under_load_answer_and_lose_nothing() {
    stop_all(3);
}

#[test]
fn a_member_told_twice_to_stop_ends_at_once_and_nothing_is_lost() {
    stop_twice(3);
}

#[test]
#[ignore = "long: 100 stops"]
fn a_member_stopped_100_times_under_load_loses_nothing() {
    stop_one(100);
}

#[test]
#[ignore = "long: 50 times all members"]
fn all_members_stopped_50_times_under_load_lose_nothing() {
    stop_all(50);
}

#[test]
#[ignore = "long: 50 stops"]
fn a_second_signal_50_times_ends_at_once_and_loses_nothing() {
    stop_twice(50);
}
