//! Clocks that jump, run fast and go back. Members measure time with the monotonic clock, which by
//! contract does none of that. If it does, a member may stop serving, but must not answer wrongly.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::runner::{FAST, Run, SMALL, rounds};
use crate::support::processes::{Cluster, Site, owned, serves, skip};

/// Writes acknowledged between two faults.
const WRITES: usize = 30;
/// Changes of a clock, relative to the true time.
const JUMPS: &[&str] = &["+1h", "-1h", "+30d", "-30d", "+0 x2", "+0 x0.5"];
const TRUE_TIME: &str = "+0";

/// The clocks that are wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clocks {
    /// The wall clock.
    Wall,
    /// The wall clock and the monotonic clock.
    All,
}

/// The library that changes a process's time, where distributions install it.
fn library() -> Option<PathBuf> {
    let libraries = fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    let dirs =
        libraries.map(|entry| entry.path().join("faketime")).chain(["/usr/lib/faketime".into()]);
    let found = dirs.map(|dir| dir.join("libfaketimeMT.so.1")).find(|path| path.exists())?;
    // Tried with `date`: the time must be the first day.
    let mut command = Command::new("date");
    command.arg("+%Y").env("LD_PRELOAD", &found).env("FAKETIME", "@1970-01-01 00:00:00");
    let output = command.output().ok()?;
    (output.stdout == b"1970\n").then_some(found)
}

/// A command that starts another with a clock that follows `file`.
fn launcher(library: &Path, file: &Path, clocks: Clocks) -> Vec<String> {
    let monotonic = if clocks == Clocks::All { "0" } else { "1" };
    owned(&[
        "env",
        &format!("LD_PRELOAD={}", library.display()),
        &format!("FAKETIME_TIMESTAMP_FILE={}", file.display()),
        "FAKETIME_NO_CACHE=1",
        &format!("FAKETIME_DONT_FAKE_MONOTONIC={monotonic}"),
    ])
}

/// Makes the clock of the leader jump, then a follower's, several times each, under load.
fn jump(kind: &str, clocks: Clocks, rounds: usize) {
    let Some(library) = library() else {
        return skip("no clock jumps: libfaketime is not installed, or does not work here");
    };
    let site = Site::new();
    let file = |id: u64| site.dir().join(format!("clock-{id}"));
    // Atomically, so that a reader never sees half of it.
    let set = |path: &Path, time: &str| {
        let new = path.with_extension("new");
        fs::write(&new, format!("{time}\n")).unwrap();
        fs::rename(new, path).unwrap();
    };
    let files: Vec<PathBuf> = (1..=3).map(file).collect();
    let places = files.iter().map(|file| {
        set(file, TRUE_TIME);
        let mut place = site.place(site.url());
        place.launcher = launcher(&library, file, clocks);
        place
    });
    let places = places.collect();
    let flags = [&FAST[..], &SMALL, &["--request-timeout", "1s"]].concat();
    let mut run = Run::with(kind, Cluster::start_at(site, places, &flags));
    for round in 0..rounds {
        let clients = run.load();
        clients.wait_for(WRITES);
        run.assert_alive();
        let (leader, follower) = run.leader_and_follower();
        let victim = if round % 2 == 0 { leader } else { follower };
        let file = &files[victim as usize - 1];
        for _ in 0..4 {
            run.inject();
            let jump = *run.random.choose(JUMPS);
            set(file, jump);
            // How long the clock is wrong is part of the fault: two election timeouts.
            thread::sleep(Duration::from_millis(400));
            run.assert_alive();
        }
        clients.wait_for(WRITES);
        set(file, TRUE_TIME);
        if clocks == Clocks::All {
            // Its monotonic clock went back, and its timers may end in a month.
            run.cluster.kill(victim);
            run.cluster.start_again(victim);
        }
        serves(run.cluster.address(victim));
        clients.wait_for(WRITES);
        run.check(clients);
    }
    run.finish();
}

#[test]
fn jumps_of_the_wall_clock_change_nothing() {
    jump("clock jump", Clocks::Wall, 2);
}

#[test]
fn jumps_of_the_monotonic_clock_lose_nothing() {
    jump("clock jump, monotonic clock too", Clocks::All, 2);
}

/// A monotonic clock has no defined origin: it may count from a moment ago or for thirty years.
#[test]
fn members_with_shifted_monotonic_clocks_lose_nothing() {
    let uptime = fs::read_to_string("/proc/uptime").unwrap();
    let uptime: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
    let shifted = |seconds: i64| owned(&["unshare", "-T", "--monotonic", &seconds.to_string()]);
    let words = shifted(1);
    let mut tried = Command::new(&words[0]);
    tried.args(&words[1..]).arg("true").stderr(Stdio::null());
    if !tried.status().is_ok_and(|status| status.success()) {
        return skip("no monotonic clock is shifted: it takes root and time namespaces");
    }
    let site = Site::new();
    let shifts = [-(uptime as i64), 0, 1_000_000_000];
    let places = shifts.map(|shift| {
        let mut place = site.place(site.url());
        place.launcher = shifted(shift);
        place
    });
    let flags = [&FAST[..], &SMALL].concat();
    let kind = "monotonic clock from elsewhere";
    let mut run = Run::with(kind, Cluster::start_at(site, places.into(), &flags));
    run.inject();
    let clients = run.load();
    clients.wait_for(10 * WRITES);
    run.check(clients);
    run.finish();
}

#[test]
#[ignore = "long: 400 jumps"]
fn a_hundred_rounds_of_jumps_of_all_clocks_lose_nothing() {
    jump("clock jump", Clocks::Wall, rounds(50));
    jump("clock jump, monotonic clock too", Clocks::All, rounds(50));
}
