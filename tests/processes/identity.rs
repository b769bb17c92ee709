//! A member that lost its directory, and a member that runs twice.

use std::fs;

use crate::support::processes::{
    Cluster, FAST, PATIENCE, Signal, assert_holds, copy_dir, eventually, get, owned, put, serves,
};

#[test]
fn a_wiped_member_is_refused_and_told_the_remedy() {
    let mut cluster = Cluster::start(3, &FAST);
    cluster.put(1, "/k", "value");
    // Each member must know the incarnations of the others: all have exchanged messages.
    cluster.all_serve();
    cluster.stop(3, Signal::SIGTERM);
    for name in ["raftexample-3", "raftexample-3-snap"] {
        fs::remove_dir_all(cluster.site.dir().join(name)).unwrap();
    }
    cluster.start_again(3);
    let wiped = cluster.process(3);
    assert_eq!(wiped.wait(PATIENCE), 1, "{}", wiped.stderr());
    told_the_remedy(&wiped.last_words());
    // `--join` does not help: the id is not new.
    let mut flags = cluster.member(3).flags.clone();
    flags.push("--join".to_owned());
    let mut joining = cluster.site.spawn("joining", &flags);
    assert_eq!(joining.wait(PATIENCE), 1, "{}", joining.stderr());
    told_the_remedy(&joining.last_words());
    cluster.put(2, "/k", "value");
    // The remedy works.
    cluster.change(1, "DELETE", 3, "");
    cluster.join(1, 4);
    assert_eq!(cluster.get(4, "/k").as_deref(), Some("value"));
}

fn told_the_remedy(words: &[String]) {
    assert_eq!(words.len(), 1, "one line: {words:?}");
    assert!(words[0].contains("DELETE /3") && words[0].contains("under a new id"), "{words:?}");
}

/// A copy of a directory, started elsewhere while the original runs, has the same identity.
/// Whatever happens to the copy, the original stays a member.
#[test]
fn a_copy_of_a_running_member_does_not_take_its_place() {
    let mut cluster = Cluster::start(3, &FAST);
    let keys: Vec<String> = (0..20).map(|n| format!("/key-{n}")).collect();
    keys.iter().for_each(|key| put(cluster.address(2), key, key.as_bytes()));
    let copied = cluster.site.dir().join("copy");
    for name in ["raftexample-2", "raftexample-2-snap"] {
        copy_dir(&cluster.site.dir().join(name), &copied.join(name));
    }
    let urls: Vec<String> =
        cluster.ids().iter().map(|id| cluster.member(*id).url.clone()).collect();
    let own_url = cluster.site.url();
    let elsewhere = [&urls[0], &own_url, &urls[2]].map(String::as_str).join(",");
    let port = cluster.site.port().to_string();
    let host = cluster.site.address.to_string();
    let start = |flags: &[&str]| {
        let common = ["--id", "2", "--data-dir", "copy", "--port", &port, "--host", &host];
        cluster.site.spawn("copy", &owned(&[&common[..], &FAST, flags].concat()))
    };

    let mut copy = start(&["--cluster", &elsewhere]);
    assert_eq!(copy.wait(PATIENCE), 1, "another list is refused: {}", copy.stderr());

    // With --join the list need not be the first one.
    let copy = start(&["--cluster", &urls.join(","), "--join", "--peer-url", &own_url]);
    eventually(PATIENCE, "the copy runs", || copy.stderr().contains("became follower at term"));
    eventually(PATIENCE, "the copy is told what it is", || copy.stderr().contains("no copy of it"));
    for at in cluster.ids() {
        cluster.put(at, "/while-the-copy-runs", "written");
    }
    // With member 3 stopped, a majority needs the original member 2.
    cluster.kill(3);
    cluster.put(1, "/with-1-and-2", "written");
    assert_eq!(cluster.get(2, "/with-1-and-2").as_deref(), Some("written"));
    drop(copy);
    cluster.start_again(3);
    serves(cluster.address(3));
    assert_holds(&cluster.addresses(), &keys);
    assert_eq!(get(cluster.address(3), "/with-1-and-2").as_deref(), Some(&b"written"[..]));
}

#[test]
fn a_joiner_with_another_url_than_it_was_added_with_is_told() {
    let mut cluster = Cluster::start(1, &FAST);
    let (added, other) = (cluster.site.url(), cluster.site.url());
    cluster.change(1, "POST", 2, &added);
    let (first, port) = (cluster.member(1).url.clone(), cluster.site.port().to_string());
    let flags = ["--id", "2", "--join", "--cluster", &first, "--port", &port, "--peer-url"];
    let joiner =
        |url: &str| cluster.site.spawn("joiner", &owned(&[&flags[..], &[url], &FAST].concat()));
    let wrong = joiner(&other);
    let told = format!("member 2 listens at {added}, not at {other}");
    eventually(PATIENCE, "it logs what it waits for", || wrong.stderr().contains(&told));
    drop(wrong);
    // It changed nothing: with the right URL it joins, and only then there is a majority.
    let _joiner = joiner(&added);
    cluster.put(1, "/k", "written");
    assert_eq!(cluster.process(1).exited(), None);
}
