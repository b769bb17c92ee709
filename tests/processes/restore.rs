//! `raftexample snapshot restore`: a new cluster from a snapshot file, and the members kept out of
//! it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use crate::support::processes::{
    Client, Cluster, FAST, PATIENCE, Place, Process, Ran, Site, assert_holds, eventually, get,
    owned, put, request, run, serves,
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
    // The second snapshot made from now on started after the last of these writes.
    let made = || member.stderr().matches("compacted log at index").count();
    let before = made();
    eventually(PATIENCE, "a snapshot holds all of them", || {
        put(address, "/more", b"/more");
        made() >= before + 2
    });
    member.kill();
    let mut files: Vec<PathBuf> = fs::read_dir(site.dir().join("raftexample-1-snap"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "snap"))
        .collect();
    files.sort();
    (files.pop().unwrap(), keys)
}

fn restore(dir: &Path, file: &Path, id: u64, cluster: &str, more: &[&str]) -> Ran {
    let (file, id) = (file.to_str().unwrap(), id.to_string());
    let flags = ["snapshot", "restore", file, "--id", &id, "--cluster", cluster];
    run(dir, &[&flags[..], more].concat())
}

fn list(places: &[Place]) -> String {
    places.iter().map(|place| place.url.clone()).collect::<Vec<_>>().join(",")
}

fn places(site: &Site, count: usize) -> Vec<Place> {
    (0..count).map(|_| site.place(site.url())).collect()
}

/// Starts member `id` with the flags of a first member.
fn start(site: &Site, places: &[Place], id: u64, more: &[&str]) -> Process {
    let client = places[id as usize - 1].client;
    let mut flags = owned(&["--id", &id.to_string(), "--cluster", &list(places)]);
    flags.extend(owned(&["--port", &client.port().to_string()]));
    flags.extend(owned(&["--host", &client.ip().to_string()]));
    flags.extend(owned(&FAST));
    flags.extend(owned(more));
    site.spawn(&format!("member-{id}"), &flags)
}

fn local(address: SocketAddr, key: &str) -> Option<Vec<u8>> {
    let answer = Client::new(address).reading_locally().get(key).ok()?;
    (answer.status == 200).then_some(answer.body)
}

#[test]
fn three_members_restored_from_one_file_serve_every_key() {
    let old = Site::new();
    let (file, keys) = backup(&old);
    let site = Site::new();
    let places = places(&site, 3);
    // The file's names do not matter, nor do the old members.
    let copy = site.dir().join("backup");
    fs::copy(&file, &copy).unwrap();
    for id in 1..=3 {
        let ran = restore(site.dir(), &copy, id, &list(&places), &[]);
        assert_eq!((ran.status, &*ran.stderr), (0, ""));
        assert!(
            ran.stdout.starts_with(&format!("restored member {id} of cluster ")),
            "{}",
            ran.stdout
        );
    }
    let sound = run(site.dir(), &["inspect", "."]);
    assert_eq!(sound.status, 0, "{}{}", sound.stdout, sound.stderr);
    let mut cluster = Cluster::start_at(site, places, &FAST);
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
    cluster.join(1, 4);
    assert_holds(&cluster.addresses(), &keys);
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
        let ran = restore(site.dir(), &file, 1, &url, &[]);
        assert_eq!((ran.status, ran.stderr.lines().count()), (1, 1), "{}", ran.stderr);
        for named in [file.to_str().unwrap(), &format!("{dir} is not empty"), "something"] {
            assert!(ran.stderr.contains(named), "{named}: {}", ran.stderr);
        }
        let other = if dir.ends_with("snap") { "raftexample-1" } else { "raftexample-1-snap" };
        assert!(!site.dir().join(other).exists(), "nothing was made");
        fs::remove_dir_all(site.dir().join(dir)).unwrap();
    }
    assert_eq!(restore(site.dir(), &file, 1, &url, &[]).status, 0);
    assert_eq!(restore(site.dir(), &file, 1, &url, &[]).status, 1, "a second time");
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
        let ran = restore(site.dir(), &broken, 1, &url, &[]);
        assert_eq!((ran.status, ran.stderr.lines().count()), (1, 1), "{at}: {}", ran.stderr);
        assert!(ran.stderr.contains("broken.snap is damaged at offset "), "{}", ran.stderr);
    }
    fs::write(&broken, &bytes[..bytes.len() - 20]).unwrap();
    assert_eq!(restore(site.dir(), &broken, 1, &url, &[]).status, 1, "cut short");
    let shown = run(old.dir(), &["inspect", "--json", file.to_str().unwrap()]);
    let shown: serde_json::Value =
        serde_json::from_str(shown.stdout.lines().next().unwrap()).unwrap();
    let old_id = format!("0x{}", shown["cluster_id"].as_str().unwrap());
    for (id, cluster, more, named) in [
        (2, &*url, &[][..], "beyond the 1 members"),
        (0, &url, &[], "--id must be at least 1"),
        (1, "nonsense", &[], "no peer URL"),
        (1, &url, &["--cluster-id", &*old_id], "choose another"),
    ] {
        let ran = restore(site.dir(), &file, id, cluster, more);
        assert_eq!((ran.status, ran.stderr.lines().count()), (2, 1), "{}", ran.stderr);
        assert!(ran.stderr.contains(named), "{named}: {}", ran.stderr);
    }
    assert!(!site.dir().join("raftexample-1").exists(), "nothing was made");
}

#[test]
fn an_empty_member_beside_restored_ones_waits_and_says_why() {
    let old = Site::new();
    let (file, keys) = backup(&old);
    let site = Site::new();
    let places = places(&site, 3);
    for id in [1, 2] {
        assert_eq!(restore(site.dir(), &file, id, &list(&places), &[]).status, 0);
    }
    let impatient = ["--request-timeout", "300ms"];
    let empty = start(&site, &places, 3, &impatient);
    let _members = [1, 2].map(|id| start(&site, &places, id, &[]));
    let told = "member 3 was not: stop it, remove its directories, and make them with `raftexample snapshot restore`";
    eventually(PATIENCE, "it says what it waits for", || empty.stderr().contains(told));
    assert_holds(&[places[0].client, places[1].client], &keys);
    put(places[1].client, "/new", b"/new");
    assert_eq!(request(places[2].client, "GET", "/new", b"").unwrap().status, 503);
    drop(empty);

    for dir in ["raftexample-3", "raftexample-3-snap"] {
        fs::remove_dir_all(site.dir().join(dir)).unwrap();
    }
    assert_eq!(restore(site.dir(), &file, 3, &list(&places), &[]).status, 0);
    let _third = start(&site, &places, 3, &[]);
    serves(places[2].client);
    assert_eq!(get(places[2].client, "/new").as_deref(), Some(&b"/new"[..]));
    assert_holds(&[places[2].client], &keys);
}

/// A cluster id chosen by the operator does not prove the same origin. Two empty members that rely
/// on it and find no other member bootstrap, and commit entries where the backup has others.
#[test]
fn empty_members_with_a_restored_cluster_id_take_nothing() {
    let old = Site::new();
    let (file, keys) = backup(&old);
    let site = Site::new();
    let places = places(&site, 3);
    let id = ["--cluster-id", "0x77"];
    assert_eq!(restore(site.dir(), &file, 1, &list(&places), &id).status, 0);
    let more = [&id[..], &["--snapshot-count", "1", "--snapshot-catch-up-entries", "1"]].concat();
    let empty = [2, 3].map(|id| start(&site, &places, id, &more));
    for number in 0..100 {
        put(places[1].client, &format!("/other-{number}"), b"");
    }
    let restored = start(&site, &places, 1, &id);
    let told = "was not restored from the snapshot that this cluster was restored from";
    eventually(PATIENCE, "they are refused", || restored.stderr().contains(told));
    eventually(PATIENCE, "the restored one holds its keys", || {
        keys.iter().all(|key| local(places[0].client, key).as_deref() == Some(key.as_bytes()))
    });
    assert_eq!(local(places[0].client, "/other-99"), None);
    drop(empty);

    // An empty member that asks a restored one before it bootstraps ends at once.
    for id in [2, 3] {
        for suffix in ["", "-snap"] {
            fs::remove_dir_all(site.dir().join(format!("raftexample-{id}{suffix}"))).unwrap();
        }
    }
    let mut empty = start(&site, &places, 2, &id);
    assert_eq!(empty.wait(PATIENCE), 1);
    assert!(empty.last_words()[0].contains(told), "{}", empty.stderr());
    for suffix in ["", "-snap"] {
        fs::remove_dir_all(site.dir().join(format!("raftexample-2{suffix}"))).unwrap();
    }
    assert_eq!(restore(site.dir(), &file, 2, &list(&places), &id).status, 0);
    let _second = start(&site, &places, 2, &id);
    assert_holds(&[places[0].client, places[1].client], &keys);
}

#[test]
fn a_restored_member_starts_only_with_the_list_it_was_made_for() {
    let old = Site::new();
    let (file, _) = backup(&old);
    let site = Site::new();
    let places = places(&site, 2);
    assert_eq!(restore(site.dir(), &file, 1, &list(&places), &[]).status, 0);
    let alone = &places[..1];
    for (places, more) in
        [(alone, &[][..]), (alone, &["--cluster-id", "5"]), (&places, &["--join"])]
    {
        let mut member = start(&site, places, 1, more);
        assert_eq!(member.wait(PATIENCE), 1);
        assert!(member.last_words()[0].contains("start with the list that it was restored for"));
    }
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
