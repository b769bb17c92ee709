//! `raftexample snapshot restore`: a new cluster from a snapshot file, and the members kept out of
//! it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::processes::{
    Cluster, FAST, PATIENCE, Ran, Signal, Site, assert_holds, eventually, put, request, run,
    run_with_little_memory, serves,
};

const KEYS: usize = 12;

/// A member that wrote some keys and then a snapshot of them; returns the file and the keys. Each
/// value equals its key.
fn backup(site: &Site) -> (PathBuf, Vec<String>) {
    let smallest = ["--snapshot-count", "1", "--snapshot-catch-up-entries", "1"];
    let (flags, address) = site.single(&[&FAST[..], &smallest].concat());
    let mut member = site.spawn("old", &flags);
    let keys: Vec<String> = (0..KEYS).map(|number| format!("/key-{number}")).collect();
    for key in &keys {
        put(address, key, key.as_bytes());
    }
    let last = request(address, "GET", keys.last().unwrap(), b"").unwrap();
    let last: u64 = last.headers["raft-index"].parse().unwrap();
    let newest = || {
        let files = fs::read_dir(site.dir().join("raftexample-1-snap")).unwrap();
        let paths = files.map(|entry| entry.unwrap().path());
        paths.filter(|path| path.extension().is_some_and(|it| it == "snap")).max()
    };
    eventually(PATIENCE, "a snapshot holds all of them", || {
        put(address, "/more", b"/more");
        newest().is_some_and(|file| {
            let (_, index) = file.file_stem().unwrap().to_str().unwrap().split_once('-').unwrap();
            u64::from_str_radix(index, 16).unwrap() >= last
        })
    });
    member.kill();
    (newest().unwrap(), keys)
}

fn restore(dir: &Path, file: &Path, url: &str, more: &[&str]) -> Ran {
    let flags = ["snapshot", "restore", file.to_str().unwrap(), "--peer-url", url];
    run(dir, &[&flags[..], more].concat())
}

#[test]
fn a_restored_member_and_those_that_join_serve_every_key() {
    let old = Site::new();
    let (file, keys) = backup(&old);
    let site = Site::new();
    let place = site.place(site.url());
    // The file's name does not matter, nor does the old member.
    let copy = site.dir().join("backup");
    fs::copy(&file, &copy).unwrap();
    let ran = restore(site.dir(), &copy, &place.url, &[]);
    assert_eq!((ran.status, &*ran.stderr), (0, ""));
    assert!(ran.stdout.starts_with("restored member 1 of cluster "), "{}", ran.stdout);
    assert!(ran.stdout.contains(&format!("--id 1 --cluster {}", place.url)), "{}", ran.stdout);
    let sound = run(site.dir(), &["inspect", "."]);
    assert_eq!(sound.status, 0, "{}{}", sound.stdout, sound.stderr);
    let mut cluster = Cluster::start_at(site, vec![place], &FAST);
    cluster.join(1, 2);
    cluster.join(1, 3);
    assert_holds(&cluster.addresses(), &keys);
    // The values keep the entries that wrote them.
    let shown = run(old.dir(), &["inspect", "--keys", "--json", file.to_str().unwrap()]);
    let index = shown.stdout.lines().find_map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        (line["key"] == "/key-3").then(|| line["index"].to_string())
    });
    let answer = request(cluster.address(2), "GET", "/key-3", b"").unwrap();
    assert_eq!(answer.headers.get("raft-index").cloned(), index);

    cluster.put(2, "/new", "/new");
    let keys = [keys, vec!["/new".to_owned()]].concat();
    cluster.ids().into_iter().for_each(|id| cluster.kill(id));
    cluster.ids().into_iter().for_each(|id| cluster.start_again(id));
    cluster.all_serve();
    assert_holds(&cluster.addresses(), &keys);
}

/// A member of the first restored cluster is left over, and started beside the second one.
#[test]
fn a_backup_restored_twice_makes_two_clusters() {
    let old = Site::new();
    let (file, keys) = backup(&old);
    let site = Site::new();
    let place = site.place(site.url());
    assert_eq!(restore(site.dir(), &file, &place.url, &[]).status, 0);
    let mut cluster = Cluster::start_at(site, vec![place], &FAST);
    cluster.join(1, 2);
    for id in [1, 2] {
        cluster.stop(id, Signal::SIGTERM);
    }
    for suffix in ["", "-snap"] {
        fs::remove_dir_all(cluster.site.dir().join(format!("raftexample-1{suffix}"))).unwrap();
    }
    let url = cluster.member(1).url.clone();
    assert_eq!(restore(cluster.site.dir(), &file, &url, &[]).status, 0);
    cluster.start_again(1);
    cluster.start_again(2);
    serves(cluster.address(1));
    cluster.put(1, "/second", "life");
    let told = "the sender belongs to cluster";
    eventually(PATIENCE, "the leftover is refused", || cluster.process(2).stderr().contains(told));
    assert_eq!(request(cluster.address(2), "GET", "/second", b"").unwrap().status, 503);
    assert_holds(&[cluster.address(1)], &keys);
}

#[test]
fn restore_refuses_nonempty_directories_and_changes_nothing() {
    let old = Site::new();
    let (file, _) = backup(&old);
    let site = Site::new();
    let url = site.url();
    for dir in ["raftexample-1", "raftexample-1-snap"] {
        fs::create_dir(site.dir().join(dir)).unwrap();
        fs::write(site.dir().join(dir).join("something"), "").unwrap();
        let ran = restore(site.dir(), &file, &url, &[]);
        assert_eq!((ran.status, ran.stderr.lines().count()), (1, 1), "{}", ran.stderr);
        for named in [file.to_str().unwrap(), &format!("{dir} is not empty"), "something"] {
            assert!(ran.stderr.contains(named), "{named}: {}", ran.stderr);
        }
        let other = if dir.ends_with("snap") { "raftexample-1" } else { "raftexample-1-snap" };
        assert!(!site.dir().join(other).exists(), "nothing was made");
        fs::remove_dir_all(site.dir().join(dir)).unwrap();
    }
    assert_eq!(restore(site.dir(), &file, &url, &[]).status, 0);
    assert_eq!(restore(site.dir(), &file, &url, &[]).status, 1, "a second time");
}

#[test]
fn restore_refuses_a_damaged_file_and_flags_that_do_not_fit() {
    let old = Site::new();
    let (file, _) = backup(&old);
    let site = Site::new();
    let (url, broken) = (site.url(), site.dir().join("broken.snap"));
    let bytes = fs::read(&file).unwrap();
    for at in [0, 9, 17, 40, bytes.len() / 2, bytes.len() - 13, bytes.len() - 1] {
        let mut flipped = bytes.clone();
        flipped[at] ^= 4;
        fs::write(&broken, flipped).unwrap();
        let ran = restore(site.dir(), &broken, &url, &[]);
        assert_eq!((ran.status, ran.stderr.lines().count()), (1, 1), "{at}: {}", ran.stderr);
        assert!(ran.stderr.contains("broken.snap is damaged at offset "), "{}", ran.stderr);
    }
    fs::write(&broken, &bytes[..bytes.len() - 20]).unwrap();
    assert_eq!(restore(site.dir(), &broken, &url, &[]).status, 1, "cut short");
    let ran = restore(site.dir(), &file, "nonsense", &[]);
    assert_eq!((ran.status, ran.stderr.lines().count()), (2, 1), "{}", ran.stderr);
    assert!(ran.stderr.contains("no peer URL"), "{}", ran.stderr);
    assert!(!site.dir().join("raftexample-1").exists(), "nothing was made");
}

/// The length of the meta bytes is in the header, before the checksum that covers it.
#[test]
fn a_backup_that_claims_gibibytes_is_refused_with_little_memory() {
    let old = Site::new();
    let (file, _) = backup(&old);
    let site = Site::new();
    let (url, broken) = (site.url(), site.dir().join("broken.snap"));
    let mut bytes = fs::read(&file).unwrap();
    bytes[12..16].copy_from_slice(&(2_u32 << 30).to_le_bytes());
    fs::write(&broken, &bytes).unwrap();
    fs::OpenOptions::new().write(true).open(&broken).unwrap().set_len(3 << 30).unwrap();
    let broken = broken.to_str().unwrap();
    let restore = ["snapshot", "restore", broken, "--peer-url", &url];
    for flags in [&restore[..], &["inspect", broken]] {
        let ran = run_with_little_memory(site.dir(), flags);
        assert_eq!((ran.status, ran.stderr.lines().count()), (1, 1), "{}", ran.stderr);
        assert!(ran.stderr.contains("2147483648 meta bytes are more than "), "{}", ran.stderr);
    }
}

#[test]
fn a_restored_member_starts_only_with_the_list_it_was_made_for() {
    let old = Site::new();
    let (file, _) = backup(&old);
    let site = Site::new();
    let (flags, _) = site.single(&FAST);
    assert_eq!(restore(site.dir(), &file, &site.url(), &[]).status, 0);
    let mut member = site.spawn("member", &flags);
    assert_eq!(member.wait(PATIENCE), 1);
    assert!(member.last_words()[0].contains("another --cluster list"), "{}", member.stderr());
}

/// As if it had been killed before it finished.
#[test]
fn a_half_restored_member_does_not_start_empty() {
    let site = Site::new();
    let (flags, _) = site.single(&[]);
    let dir = site.dir().join("raftexample-1");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("restoring"), "").unwrap();
    let mut member = site.spawn("member", &flags);
    assert_eq!(member.wait(PATIENCE), 1, "{}", member.stderr());
    assert!(member.stderr().contains("is half restored"), "{}", member.stderr());
}
