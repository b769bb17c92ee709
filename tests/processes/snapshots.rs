//! Restarts from a snapshot and the log after it, where the original has had most of its faults.

use crate::support::processes::{
    Cluster, FAST, PATIENCE, Site, assert_holds, eventually, put, request, serves,
};

const SMALL: [&str; 4] = ["--snapshot-count", "10", "--snapshot-catch-up-entries", "5"];
/// The line that follows after the log names a snapshot.
const SNAPSHOT_MADE: &str = "compacted log at index";

/// etcd #9262 and related: the HTTP server never started, or the snapshot overwrote newer entries.
#[test]
fn what_was_written_before_and_after_a_snapshot_survives_a_kill() {
    let site = Site::new();
    let (flags, address) = site.single(&[&FAST[..], &SMALL].concat());
    let mut keys: Vec<String> = Vec::new();
    for round in 0..3 {
        let mut member = site.spawn("member", &flags);
        serves(address);
        assert_holds(&[address], &keys);
        if round > 0 {
            let stderr = member.stderr();
            assert!(stderr.contains("loading snapshot at term"), "{stderr}");
        }
        write(address, &mut keys, 15);
        eventually(PATIENCE, "a snapshot is made", || member.stderr().contains(SNAPSHOT_MADE));
        write(address, &mut keys, 5);
        member.kill();
    }
    let _member = site.spawn("member", &flags);
    serves(address);
    assert_holds(&[address], &keys);
}

/// raft#174 and etcd #9685: a snapshot after each entry, and one entry kept.
#[test]
fn a_snapshot_after_every_entry_survives_kills_and_a_join() {
    let smallest = ["--snapshot-count", "1", "--snapshot-catch-up-entries", "1"];
    let mut cluster = Cluster::start(3, &[&FAST[..], &smallest].concat());
    let mut keys: Vec<String> = Vec::new();
    write(cluster.address(1), &mut keys, 12);
    cluster.kill(3);
    // Member 3 falls behind the log's first entry.
    write(cluster.address(2), &mut keys, 15);
    cluster.start_again(3);
    serves(cluster.address(3));
    assert_holds(&[cluster.address(3)], &keys);
    write(cluster.address(3), &mut keys, 3);
    cluster.ids().into_iter().for_each(|id| cluster.kill(id));
    cluster.ids().into_iter().for_each(|id| cluster.start_again(id));
    cluster.all_serve();
    assert_holds(&cluster.addresses(), &keys);
    cluster.join(3, 4);
    write(cluster.address(4), &mut keys, 3);
    assert_holds(&cluster.addresses(), &keys);
    // The joiner's own directory is as good as the others'.
    cluster.kill(4);
    cluster.start_again(4);
    serves(cluster.address(4));
    assert_holds(&cluster.addresses(), &keys);
}

/// Fault C.5 of the original: JSON snapshots change bytes that are not UTF-8.
#[test]
fn bytes_come_out_of_a_snapshot_as_they_went_in() {
    let site = Site::new();
    let smallest = ["--snapshot-count", "1", "--snapshot-catch-up-entries", "1"];
    let (flags, address) = site.single(&[&FAST[..], &smallest].concat());
    let values: [&[u8]; 4] = [b"", b"\xff\xfe\x00\x41", b"\r\n\r\n", &[0x80; 300]];
    let keys = ["/k", "/k/", "/k?x=1", "/%6b"];
    let mut member = site.spawn("member", &flags);
    for (key, value) in keys.iter().zip(values) {
        put(address, key, value);
    }
    // The second snapshot made from now on started after the last of these writes.
    let made = || member.stderr().matches(SNAPSHOT_MADE).count();
    let before = made();
    eventually(PATIENCE, "a snapshot holds all of them", || {
        put(address, "/more", b"");
        made() >= before + 2
    });
    member.kill();
    let member = site.spawn("member", &flags);
    serves(address);
    assert!(member.stderr().contains("loading snapshot at term"), "{}", member.stderr());
    for (key, value) in keys.iter().zip(values) {
        let answer = request(address, "GET", key, b"").unwrap();
        assert_eq!((answer.status, &answer.body[..]), (200, value), "{key}");
    }
}

fn write(address: std::net::SocketAddr, keys: &mut Vec<String>, count: usize) {
    for _ in 0..count {
        let key = format!("/key-{}", keys.len());
        put(address, &key, key.as_bytes());
        keys.push(key);
    }
}
