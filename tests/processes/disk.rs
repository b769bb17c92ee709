//! Failing and full disks stop the process, and no acknowledged write is missing.

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::support::mounts::Mount;
use crate::support::processes::{
    BINARY, Client, FAST, PATIENCE, Process, Site, assert_holds, serves, skip,
};

/// Writes until the process ends; returns the acknowledged keys.
fn write_until_it_ends(
    process: &mut Process,
    address: SocketAddr,
    value_bytes: usize,
) -> Vec<String> {
    let mut acknowledged = Vec::new();
    let begun = Instant::now();
    let mut client = Client::new(address);
    for sequence in 0.. {
        if process.exited().is_some() {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "it did not stop: {}", process.stderr());
        let key = format!("/{sequence:0value_bytes$}");
        match client.put(&key, key.as_bytes()) {
            Ok(204) => acknowledged.push(key),
            // The interval between two looks; the deadline above ends the wait.
            _ => std::thread::sleep(std::time::Duration::from_millis(5)),
        }
    }
    acknowledged
}

/// Asserts an end with status 1 and one line that names a member's file and the reason.
fn stopped_because(process: &mut Process, why: &str) {
    assert_eq!(process.wait(PATIENCE), 1, "{}", process.stderr());
    let words = process.last_words();
    assert_eq!(words.len(), 1, "one line: {}", process.stderr());
    assert!(words[0].contains("raftexample-1"), "it names the file: {words:?}");
    assert!(words[0].contains(why), "{words:?}");
}

#[test]
fn a_failed_sync_stops_the_process_and_loses_no_write() {
    let works = Command::new("strace")
        .args(["-f", "--seccomp-bpf", "-o", "/dev/null", "-e", "trace=fdatasync", "true"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !works {
        return skip("fdatasync is not made to fail: strace is not installed, or may not trace");
    }
    // The first failure is in making the directory, the last ones are between writes.
    for (round, when) in [1, 2, 4, 5, 9, 30].into_iter().enumerate() {
        let site = Site::new();
        let (flags, address) = site.single(&[&FAST[..], &["--snapshot-count", "10"]].concat());
        let mut strace = Command::new("strace");
        strace.args(["-f", "--seccomp-bpf", "-o", "strace.txt", "-e", "trace=fdatasync"]);
        strace.arg("-e").arg(format!("inject=fdatasync:error=EIO:when={when}"));
        strace.arg(BINARY).args(&flags);
        let mut member = site.spawn_command("member", strace, true);
        let acknowledged = write_until_it_ends(&mut member, address, 8);
        println!(
            "{when}-th sync failed: {} acknowledged, {:?}",
            acknowledged.len(),
            member.last_words()
        );
        stopped_because(&mut member, "Input/output error");
        assert!(round == 0 || member.stderr().contains("replaying WAL"), "it got that far");
        assert!(when < 10 || !acknowledged.is_empty(), "some were written before");
        let _member = site.spawn("member", &flags);
        serves(address);
        assert_holds(&[address], &acknowledged);
    }
}

#[test]
fn a_full_disk_stops_the_process_and_loses_no_write() {
    let site = Site::new();
    let Some(disk) = Mount::in_memory("2m") else {
        return skip("no disk is filled up: mounting one takes root");
    };
    // Once with a full log, once with constant snapshots.
    for (name, value_bytes, count) in [("log", 4000, "10000"), ("snapshots", 500, "20")] {
        disk.resize("2m");
        let data_dir = disk.path().join(name);
        let data_dir = data_dir.to_str().unwrap();
        let small = ["--data-dir", data_dir, "--snapshot-count", count];
        let (flags, address) = site.single(&[&FAST[..], &small].concat());
        let mut member = site.spawn(name, &flags);
        let acknowledged = write_until_it_ends(&mut member, address, value_bytes);
        println!("{name}: {} acknowledged, {:?}", acknowledged.len(), member.last_words());
        stopped_because(&mut member, "No space left on device");
        assert!(!acknowledged.is_empty());
        // Still no room: it ends again and damages nothing.
        let mut again = site.spawn(name, &flags);
        if write_until_it_ends_or_serves(&mut again, address) {
            again.kill();
        }
        disk.resize("64m");
        let mut member = site.spawn(name, &flags);
        serves(address);
        assert_holds(&[address], &acknowledged);
        member.kill();
        std::fs::remove_dir_all(data_dir).unwrap();
    }
}

/// Like above; returns true if the member finds room and serves.
fn write_until_it_ends_or_serves(process: &mut Process, address: SocketAddr) -> bool {
    let begun = Instant::now();
    loop {
        if process.exited().is_some() {
            stopped_because(process, "No space left on device");
            return false;
        }
        if Client::new(address).get("/k").is_ok_and(|answer| answer.status == 404) {
            return true;
        }
        assert!(begun.elapsed() < PATIENCE, "{}", process.stderr());
    }
}
