//! Full, failing and slow disks: the member stops or waits, and the others continue. Everything
//! that it acknowledged, or helped to acknowledge, is there when it starts again.

use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::runner::{FAST, Run, SMALL, rounds};
use crate::support::mounts::Mount;
use crate::support::processes::{
    Client, Cluster, PATIENCE, Place, Process, Signal, Site, eventually, owned, serves, skip,
};

/// Writes acknowledged between two faults.
const WRITES: usize = 30;

/// Places for members with their data on these disks.
pub fn places_on(site: &Site, disks: &[Mount]) -> Vec<Place> {
    let place_on = |(id, disk): (u64, &Mount)| {
        let data_dir = disk.path();
        // The final comparison reads one directory.
        for name in [format!("raftexample-{id}"), format!("raftexample-{id}-snap")] {
            symlink(data_dir.join(&name), site.dir().join(&name)).unwrap();
        }
        let flags = owned(&["--data-dir", data_dir.to_str().expect("a plain name")]);
        Place { flags, ..site.place(site.url()) }
    };
    (1..).zip(disks).map(place_on).collect()
}

/// Asserts an end with status 1 and one line that names the member's file and the reason.
fn stopped_because(member: &mut Process, why: &str) {
    assert_eq!(member.wait(PATIENCE), 1, "{}", member.stderr());
    let words = member.last_words();
    assert!(words.len() == 1 && words[0].contains("raftexample-"), "{}", member.stderr());
    assert!(words[0].contains(why), "{words:?}");
}

/// Fills the disk of the leader or of a follower under load, frees it, and restarts the member.
///
/// If snapshots are larger than the remaining room, a snapshot finds the disk full; otherwise the
/// log does.
fn fill(kind: &str, rounds: usize, at_snapshots: bool) {
    let disks: Option<Vec<Mount>> = (0..3).map(|_| Mount::in_memory("8m")).collect();
    let Some(disks) = disks else {
        return skip("no disk is filled up: mounting one takes root");
    };
    let site = Site::new();
    let places = places_on(&site, &disks);
    // More entries than the rounds write, so that there is only the log.
    let never = ["--snapshot-count", "10000000"];
    let flags = [&FAST[..], if at_snapshots { &SMALL } else { &never }].concat();
    let mut run = Run::with(kind, Cluster::start_at(site, places, &flags));
    if at_snapshots {
        // The size of a snapshot's contents.
        (0..16).for_each(|key| run.cluster.put(1, &format!("/large-{key}"), &"x".repeat(64 << 10)));
    }
    let room = if at_snapshots { 512 << 10 } else { 4096 };
    for round in 0..rounds {
        let clients = run.load();
        clients.wait_for(WRITES);
        run.assert_alive();
        let (leader, follower) = run.leader_and_follower();
        let victim = if round % 2 == 0 { leader } else { follower };
        let disk = &disks[victim as usize - 1];
        run.inject();
        disk.fill_up(room);
        let member = run.cluster.process(victim);
        stopped_because(member, "No space left on device");
        let words = member.last_words();
        println!("FULL {kind}, member {victim}, leader {leader}: {}", words[0]);
        assert_eq!(words[0].contains(".snap"), at_snapshots, "{words:?}");
        clients.wait_for(WRITES);
        disk.free();
        run.cluster.start_again(victim);
        serves(run.cluster.address(victim));
        clients.wait_for(WRITES);
        run.check(clients);
    }
    run.finish();
}

/// Tampering with the system calls of one member by strace.
struct Tampering {
    // When dropped, it detaches from the member, which continues.
    strace: Process,
}

impl Tampering {
    /// Attaches to a running member, which can so be chosen by its current role.
    fn start(run: &mut Run, id: u64, call: &str, injection: &str) -> Self {
        let pid = run.cluster.process(id).pid().to_string();
        let mut strace = Command::new("strace");
        strace.args(["-f", "-o", "/dev/null", "-p", &pid, "-e"]).arg(format!("trace={call}"));
        strace.arg("-e").arg(format!("inject={call}:{injection}"));
        let strace = run.cluster.site.spawn_command("strace", strace, false);
        eventually(PATIENCE, "strace takes hold of a member", || {
            strace.stderr().contains("attached")
        });
        Self { strace }
    }

    fn stop(mut self) {
        self.strace.signal(Signal::SIGTERM);
        eventually(PATIENCE, "strace lets go", || self.strace.exited().is_some());
    }
}

/// Returns false, with a report, if this machine does not allow tracing.
fn can_tamper() -> bool {
    let mut sleep = Command::new("sleep").arg("60").spawn().unwrap();
    let (pid, begun) = (sleep.id().to_string(), Instant::now());
    // It traces until the process ends, which is killed once it is traced.
    let strace =
        Command::new("strace").args(["-o", "/dev/null", "-p", &pid]).stderr(Stdio::null()).spawn();
    let works = strace.is_ok_and(|mut strace| {
        let is_traced = || {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
        };
        let mut works = false;
        while !works && begun.elapsed() < PATIENCE && strace.try_wait().unwrap().is_none() {
            works = is_traced();
        }
        let _ = sleep.kill();
        let _ = strace.wait();
        works
    });
    let _ = sleep.kill();
    let _ = sleep.wait();
    if !works {
        skip("no system call of a member fails: strace is not installed, or may not trace");
    }
    works
}

/// Makes one of a member's next system calls fail, or kills it there.
fn fail(kind: &str, rounds: usize, faults: &[(&str, &str, Option<&str>)]) {
    if !can_tamper() {
        return;
    }
    let mut run = Run::start(kind, 3, &[&FAST[..], &SMALL].concat());
    for round in 0..rounds {
        let clients = run.load();
        clients.wait_for(WRITES);
        run.assert_alive();
        let (leader, follower) = run.leader_and_follower();
        let victim = if round % 2 == 0 { leader } else { follower };
        let (call, what, why) = faults[round / 2 % faults.len()];
        let when = run.random.within(1..40);
        run.inject();
        let tampering = Tampering::start(&mut run, victim, call, &format!("{what}:when={when}"));
        let member = run.cluster.process(victim);
        match why {
            Some(why) => stopped_because(member, why),
            None => eventually(PATIENCE, "it is killed", || member.exited().is_some()),
        }
        tampering.stop();
        clients.wait_for(WRITES);
        run.cluster.start_again(victim);
        serves(run.cluster.address(victim));
        clients.wait_for(WRITES);
        run.check(clients);
    }
    run.finish();
}

const FAILURES: &[(&str, &str, Option<&str>)] = &[
    ("fdatasync", "error=EIO", Some("Input/output error")),
    ("pwrite64", "error=ENOSPC", Some("No space left on device")),
    ("pwrite64", "error=EIO", Some("Input/output error")),
];
const KILLS: &[(&str, &str, Option<&str>)] = &[("fdatasync", "signal=KILL", None)];

#[test]
fn a_full_disk_stops_its_member_and_loses_nothing() {
    fill("disk full", 2, false);
}

#[test]
fn a_disk_too_full_for_a_snapshot_stops_it_and_loses_nothing() {
    fill("disk full at a snapshot", 2, true);
}

#[test]
fn a_failed_write_or_sync_stops_one_member_and_loses_nothing() {
    fail("EIO or ENOSPC at the n-th write or sync", 4, FAILURES);
}

#[test]
#[ignore = "long: 100 failures and 100 kills"]
fn a_hundred_disk_failures_and_kills_at_syncs_lose_nothing() {
    fail("EIO or ENOSPC at the n-th write or sync", rounds(100), FAILURES);
    fail("kill -9 at the n-th sync", rounds(100), KILLS);
}

#[test]
#[ignore = "long: 40 full disks"]
fn forty_full_disks_lose_nothing() {
    fill("disk full", rounds(20), false);
    fill("disk full at a snapshot", rounds(20), true);
}

#[test]
fn a_kill_exactly_at_a_sync_loses_nothing() {
    fail("kill -9 at the n-th sync", 2, KILLS);
}

/// The median latency of a write at a member.
fn median_latency(run: &Run, at: u64) -> Duration {
    let mut client = Client::new(run.cluster.address(at));
    let mut took: Vec<Duration> = (0..7)
        .map(|_| {
            let sent = Instant::now();
            assert_eq!(client.put("/latency", b"value").unwrap(), 204);
            sent.elapsed()
        })
        .collect();
    took.sort_unstable();
    took[took.len() / 2]
}

const DELAY: Duration = Duration::from_millis(200);

/// With default ticks: the delay is a fifth of the shortest election timeout.
#[test]
fn a_slow_disk_slows_no_majority_and_causes_no_elections() {
    if !can_tamper() {
        return;
    }
    let mut run = Run::start("slow disk", 3, &SMALL);
    for slow_leader in [false, true] {
        let clients = run.load();
        clients.wait_for(WRITES);
        let (leader, follower) = run.leader_and_follower();
        let (_, term) = run.cluster.leader();
        let usual = median_latency(&run, leader);
        run.inject();
        let victim = if slow_leader { leader } else { follower };
        let delay = format!("delay_enter={}", DELAY.as_micros());
        let tampering = Tampering::start(&mut run, victim, "fdatasync", &delay);
        let slow = median_latency(&run, leader);
        clients.wait_for(WRITES);
        tampering.stop();
        run.check(clients);
        let terms = run.cluster.leader().1 - term;
        println!(
            "SLOW disk of the leader: {slow_leader} | a write usually {usual:.1?} | then {slow:.1?} | terms {terms}"
        );
        assert!(terms <= 1, "{terms} elections");
        if !slow_leader {
            assert!(slow < DELAY / 2, "a write takes {slow:?}: it waits for the slow follower");
        }
    }
    run.finish();
}
