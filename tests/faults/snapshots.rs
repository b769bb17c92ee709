//! A member so far behind that it needs a snapshot, and its sender or receiver killed during the
//! transfer.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::clients::Clients;
use crate::runner::{FAST, Run, rounds};
use crate::support::processes::{Client, PATIENCE, Signal, files_in, put, serves};

const SMALL: [&str; 4] = ["--snapshot-count", "100", "--snapshot-catch-up-entries", "10"];
/// Entries written while a member is away: every leader drops what it misses.
const BEHIND: usize = 250;
const WRITES: usize = 30;
/// Values that make a snapshot large enough to be met half way.
const LARGE_VALUES: usize = 24;
const LARGE_VALUE_BYTES: usize = 1 << 20;
/// The log line of a member that installed a received snapshot.
const INSTALLED: &str = "finished publishing snapshot at index";
/// Attempts to have a snapshot sent, or to meet it half way.
const TRIES_MAX: usize = 10;

fn start(kind: &str) -> Run {
    let run = Run::start(kind, 3, &[&FAST[..], &SMALL].concat());
    for number in 0..LARGE_VALUES {
        let value = vec![number as u8; LARGE_VALUE_BYTES];
        put(run.cluster.address(1), &format!("/large-{number}"), &value);
    }
    run
}

/// Writes entries that member `away` misses. Returns the first one, which afterwards is only in a
/// snapshot.
fn leave_behind(run: &mut Run, clients: &Clients, away: u64) -> String {
    let (at, value) = (run.other_than(away), run.random.next().to_string());
    run.cluster.put(at, "/while-away", &value);
    clients.wait_for(BEHIND);
    value
}

#[derive(Clone, Copy)]
enum Who {
    Sender,
    Receiver,
}

fn kill_half_way(kind: &str, who: Who, default_rounds: usize) {
    let mut run = start(kind);
    for _ in 0..rounds(default_rounds) {
        let clients = run.load();
        let met = (0..TRIES_MAX).find_map(|_| {
            let (_, receiver) = run.leader_and_follower();
            run.cluster.kill(receiver);
            let missed = leave_behind(&mut run, &clients, receiver);
            run.cluster.start_again(receiver);
            let sender = pause_half_way(&mut run, receiver, &missed)?;
            Some((receiver, missed, sender))
        });
        let (receiver, missed, sender) = met.expect("a snapshot is met half way");
        run.inject();
        match who {
            Who::Sender => {
                run.cluster.kill(sender);
                run.cluster.process(receiver).signal(Signal::SIGCONT);
                // The other two must manage; how long is part of the fault.
                thread::sleep(run.random.time(Duration::from_millis(500)));
                run.cluster.start_again(sender);
            }
            Who::Receiver => {
                run.cluster.kill(receiver);
                run.cluster.start_again(receiver);
            }
        }
        // By another snapshot, or by the log of a leader that restarted and has all of it.
        assert_eq!(run.cluster.get(receiver, "/while-away"), Some(missed));
        clients.wait_for(WRITES);
        run.check(clients);
    }
    run.finish();
}

/// Pauses `receiver` while it has a part of a snapshot's file; returns the sender. Returns `None`,
/// with the receiver running, if the transfer was over first, or if the log alone brought `missed`.
fn pause_half_way(run: &mut Run, receiver: u64, missed: &str) -> Option<u64> {
    let dir = run.cluster.site.dir().join(format!("raftexample-{receiver}-snap"));
    let mut client = Client::new(run.cluster.address(receiver)).reading_locally();
    let begun = Instant::now();
    while half_way(run, receiver, &dir).is_none() {
        let is_over = run.cluster.process(receiver).stderr().contains(INSTALLED);
        if is_over || client.get("/while-away").is_ok_and(|own| own.body == missed.as_bytes()) {
            return None;
        }
        assert!(begun.elapsed() < PATIENCE, "no snapshot reaches member {receiver}");
        // Short, because a transfer does not take long.
        thread::sleep(Duration::from_millis(1));
    }
    run.cluster.process(receiver).pause();
    let sender = half_way(run, receiver, &dir);
    if sender.is_none() {
        run.cluster.process(receiver).signal(Signal::SIGCONT);
    }
    sender
}

/// The sender of a snapshot that `receiver` has a part of in `dir`. The receiver's own snapshots
/// and complete ones do not count.
fn half_way(run: &mut Run, receiver: u64, dir: &Path) -> Option<u64> {
    let (name, bytes) = part_of_snapshot(dir)?;
    run.cluster.ids().into_iter().filter(|id| *id != receiver).find(|id| {
        let stderr = run.cluster.process(*id).stderr();
        sent_last(&stderr, receiver).is_some_and(|(index, length)| {
            name.contains(&format!("-{index:016x}.snap.")) && bytes < length
        })
    })
}

/// The index and length of the last snapshot sent to `receiver`, according to a member's log.
fn sent_last(stderr: &str, receiver: u64) -> Option<(u64, u64)> {
    let (before, after) = stderr.rsplit_once(&format!(" to peer {receiver}: "))?;
    let index = before.rsplit("sending snapshot at index ").next()?.parse().ok()?;
    let length = after.split(' ').next()?.parse().ok()?;
    Some((index, length))
}

/// The name and current length of the newest snapshot file that is being written.
fn part_of_snapshot(dir: &Path) -> Option<(String, u64)> {
    let parts = files_in(dir).into_iter().filter_map(|path| {
        let name = path.file_name()?.to_str()?.to_owned();
        let bytes = fs::metadata(&path).ok()?.len();
        (name.ends_with(".tmp") && bytes > 0).then_some((name, bytes))
    });
    parts.max()
}

/// Pauses member `id` for so long that it needs a snapshot. Returns false if the log brought what it
/// missed: a leader that is slow to make its snapshots still had it.
fn catches_up_by_snapshot(run: &mut Run, clients: &Clients, id: u64) -> bool {
    let installed = |run: &mut Run| run.cluster.process(id).stderr().matches(INSTALLED).count();
    let before = installed(run);
    run.cluster.process(id).pause();
    let missed = leave_behind(run, clients, id);
    run.inject();
    run.cluster.process(id).signal(Signal::SIGCONT);
    assert_eq!(run.cluster.get(id, "/while-away"), Some(missed), "at member {id}");
    installed(run) > before
}

/// etcd #18055: a second snapshot right after the first, to a member that was not restarted.
fn two_in_a_row(default_rounds: usize) {
    let mut run = start("two snapshots in a row");
    for _ in 0..rounds(default_rounds) {
        let clients = run.load();
        let (_, receiver) = run.leader_and_follower();
        run.cluster.kill(receiver);
        run.cluster.start_again(receiver);
        serves(run.cluster.address(receiver));
        // Clients that wait for the paused member write nothing.
        let ids = run.cluster.ids().into_iter().filter(|id| *id != receiver);
        clients.set_members(&ids.map(|id| run.cluster.address(id)).collect::<Vec<_>>());
        for _ in 1..=2 {
            let by_snapshot =
                (0..TRIES_MAX).any(|_| catches_up_by_snapshot(&mut run, &clients, receiver));
            assert!(by_snapshot, "no snapshot reaches member {receiver}");
        }
        clients.set_members(&run.cluster.addresses());
        // Its disk must equal its memory.
        run.cluster.kill(receiver);
        run.cluster.start_again(receiver);
        clients.wait_for(WRITES);
        run.check(clients);
    }
    run.finish();
}

#[test]
fn a_sender_killed_half_way_through_a_snapshot_loses_nothing() {
    kill_half_way("sender of a snapshot killed half way", Who::Sender, 2);
}

#[test]
fn a_receiver_killed_half_way_through_a_snapshot_loses_nothing() {
    kill_half_way("receiver of a snapshot killed half way", Who::Receiver, 2);
}

#[test]
fn two_snapshots_in_a_row_lose_nothing() {
    two_in_a_row(1);
}

#[test]
#[ignore = "long: 30 kills"]
fn senders_killed_30_times_within_a_snapshot_lose_nothing() {
    kill_half_way("sender of a snapshot killed half way", Who::Sender, 30);
}

#[test]
#[ignore = "long: 30 kills"]
fn receivers_killed_30_times_within_a_snapshot_lose_nothing() {
    kill_half_way("receiver of a snapshot killed half way", Who::Receiver, 30);
}

#[test]
#[ignore = "long: 30 times two snapshots"]
fn two_snapshots_in_a_row_30_times_lose_nothing() {
    two_in_a_row(30);
}
