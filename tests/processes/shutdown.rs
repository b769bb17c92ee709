//! A member that is told to stop answers its pending requests, releases its locks, and ends.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::processes::{
    ANSWER_TIMEOUT, Client, Cluster, FAST, PATIENCE, Signal, Site, assert_holds, eventually,
    has_no_leader, owned, put, serves,
};

/// The default --request-timeout, plus the time to close connections.
const STOP_TIMEOUT: Duration = Duration::from_secs(6);
/// Each client's writes before the load counts as running.
const WRITES_BEFORE: usize = 10;
const CLIENTS: usize = 8;

#[test]
fn sigterm_under_load_answers_or_refuses_every_request() {
    let site = Site::new();
    let (flags, address) = site.single(&FAST);
    let mut keys = Vec::new();
    for round in 0..3 {
        let mut member = site.spawn("member", &flags);
        serves(address);
        let (stop, writing) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let client = |number: usize| {
            let (stop, writing) = (stop.clone(), writing.clone());
            thread::spawn(move || {
                let mut acknowledged = Vec::new();
                let mut client = Client::new(address);
                for sequence in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let key = format!("/{round}-{number}-{sequence}");
                    let begun = Instant::now();
                    match client.put(&key, key.as_bytes()) {
                        Ok(204) => {
                            acknowledged.push(key);
                            if acknowledged.len() == WRITES_BEFORE {
                                writing.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                        Ok(status) => assert!([503, 504].contains(&status), "{status}"),
                        // Closed between two requests, or no longer accepted.
                        Err(error) => assert!(
                            [
                                ErrorKind::UnexpectedEof,
                                ErrorKind::ConnectionRefused,
                                ErrorKind::ConnectionReset,
                                ErrorKind::BrokenPipe
                            ]
                            .contains(&error.kind()),
                            "{error}"
                        ),
                    }
                    assert!(begun.elapsed() < ANSWER_TIMEOUT);
                }
                acknowledged
            })
        };
        let clients: Vec<_> = (0..CLIENTS).map(client).collect();
        eventually(PATIENCE, "all clients write", || writing.load(Ordering::Relaxed) == CLIENTS);
        member.signal(Signal::SIGTERM);
        assert_eq!(member.wait(STOP_TIMEOUT), 0, "{}", member.stderr());
        stop.store(true, Ordering::Relaxed);
        for client in clients {
            keys.extend(client.join().unwrap());
        }
        assert!(member.last_words().is_empty(), "{:?}", member.last_words());
    }
    let _member = site.spawn("member", &flags);
    serves(address);
    assert_holds(&[address], &keys);
}

#[test]
fn sigterm_answers_who_waits_within_the_deadline() {
    let (mut cluster, mut waiting) = without_majority("2s");
    cluster.process(1).signal(Signal::SIGTERM);
    let answer = waiting.receive().unwrap();
    assert!([503, 504].contains(&answer.status), "{}", answer.status);
    assert_eq!(cluster.process(1).wait(STOP_TIMEOUT), 0, "{}", cluster.process(1).stderr());
}

#[test]
fn sigterm_ends_a_member_that_still_waits_for_the_others() {
    let site = Site::new();
    let cluster = [site.url(), site.url(), site.url()].join(",");
    for (name, more) in [("first", None), ("joining", Some("--join"))] {
        let mut flags = owned(&["--cluster", &cluster, "--port", &site.port().to_string()]);
        flags.extend(owned(&["--host", &site.address.to_string(), "--data-dir", name]));
        flags.extend(owned(&FAST));
        flags.extend(more.map(str::to_owned));
        let mut member = site.spawn(name, &flags);
        eventually(PATIENCE, "it says whom it waits for", || {
            member.stderr().contains("waiting for")
        });
        member.signal(Signal::SIGTERM);
        assert_eq!(member.wait(STOP_TIMEOUT), 0, "{}", member.stderr());
    }
}

#[test]
fn a_second_sigterm_ends_the_process_at_once() {
    let (mut cluster, _waiting) = without_majority("60s");
    let member = cluster.process(1);
    member.signal(Signal::SIGTERM);
    eventually(PATIENCE, "it is stopping", || member.stderr().contains("received SIGTERM"));
    assert!(member.exited().is_none(), "a request still waits");
    member.signal(Signal::SIGTERM);
    assert_ne!(member.wait(Duration::from_secs(2)), 0, "{}", member.stderr());
    assert_eq!(member.last_words().len(), 1, "{:?}", member.last_words());
}

/// Member 1 with all others dead, and a write that waits for a majority.
fn without_majority(request_timeout: &str) -> (Cluster, Client) {
    let flags = [&FAST[..], &["--request-timeout", request_timeout]].concat();
    let mut cluster = Cluster::start(3, &flags);
    put(cluster.address(1), "/k", b"value");
    cluster.kill(2);
    cluster.kill(3);
    // Otherwise the write would be answered when the member finds out.
    eventually(PATIENCE, "it has no leader", || has_no_leader(&cluster.process(1).stderr()));
    let mut waiting = Client::new(cluster.address(1));
    waiting.send_and_be_heard("/k", b"waits").unwrap();
    (cluster, waiting)
}
