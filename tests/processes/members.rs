//! Members join and leave: the original's walk, and what the original loses after a restart.

use crate::support::processes::{
    Cluster, FAST, PATIENCE, Signal, assert_holds, eventually, put, request, serves,
};

const REMOVED: &str = "I've been removed from the cluster! Shutting down.";

#[test]
fn a_new_member_serves_and_a_removed_one_ends_by_itself() {
    let mut cluster = Cluster::start(3, &[]);
    cluster.put(1, "/my-key", "hello");
    cluster.join(1, 4);
    assert_eq!(cluster.get(4, "/my-key").as_deref(), Some("hello"));
    cluster.change(1, "DELETE", 3, "");
    let removed = cluster.process(3);
    assert_eq!(removed.wait(PATIENCE), 0, "a removed member ends in order");
    assert_eq!(removed.stderr().matches(REMOVED).count(), 1, "{}", removed.stderr());
    assert!(removed.last_words().is_empty(), "{:?}", removed.last_words());
    cluster.put(4, "/my-key", "again");
    for at in [1, 2] {
        assert_eq!(cluster.get(at, "/my-key").as_deref(), Some("again"), "at {at}");
    }
    let again = request(cluster.address(1), "POST", "/3", b"http://127.0.0.1:1").unwrap();
    assert_eq!(again.status, 410, "an id is used once");
    // A restart ends again, whether or not it had applied its removal.
    cluster.start_again(3);
    assert_eq!(cluster.process(3).wait(PATIENCE), 0, "{}", cluster.process(3).stderr());
    assert!(cluster.process(3).stderr().contains(REMOVED));
}

#[test]
fn an_added_member_that_lacks_the_flag_to_join_is_told_so() {
    let mut cluster = Cluster::start(3, &FAST);
    let url = cluster.new_url(4);
    cluster.change(1, "POST", 4, &url);
    cluster.start_added(4, &[]);
    let told = "member 4 was added later, so start it with --join";
    eventually(PATIENCE, "it is told", || cluster.process(4).stderr().contains(told));
    cluster.process(4).kill();
    cluster.start_joiner(4);
    serves(cluster.address(4));
}

/// Fault C.13 of the original: it campaigns for ever, and its terms disturb the others.
#[test]
fn a_member_removed_while_down_ends_when_it_comes_back() {
    let mut cluster = Cluster::start(3, &FAST);
    cluster.kill(3);
    cluster.change(1, "DELETE", 3, "");
    cluster.put(2, "/k", "value");
    let (leader, term) = cluster.leader();
    cluster.start_again(3);
    let removed = cluster.process(3);
    assert_eq!(removed.wait(PATIENCE), 0, "{}", removed.stderr());
    assert!(removed.stderr().contains(REMOVED), "{}", removed.stderr());
    assert_eq!(cluster.leader(), (leader, term), "it changed nothing");
}

/// Fault C.1 of the original: the URL of an added member is only in the log, and is lost when that
/// part of the log is compacted.
#[test]
fn compacted_additions_survive_a_restart_with_the_first_flags() {
    let small = ["--snapshot-count", "20", "--snapshot-catch-up-entries", "5"];
    let mut cluster = Cluster::start(3, &[&FAST[..], &small].concat());
    cluster.join(2, 4);
    cluster.change(1, "DELETE", 3, "");
    assert_eq!(cluster.process(3).wait(PATIENCE), 0);
    cluster.forget(3);
    let keys: Vec<String> = (0..150).map(|n| format!("/many-{n}")).collect();
    for (key, address) in keys.iter().zip(cluster.addresses().iter().cycle()) {
        put(*address, key, key.as_bytes());
    }
    for id in cluster.ids() {
        assert!(cluster.process(id).stderr().contains("compacted log at index"), "member {id}");
        cluster.stop(id, Signal::SIGTERM);
    }
    cluster.ids().into_iter().for_each(|id| cluster.start_again(id));
    cluster.all_serve();
    assert_holds(&cluster.addresses(), &keys);
    // Each pair is a majority only if its two members reach each other.
    for away in cluster.ids() {
        cluster.kill(away);
        let pair: Vec<u64> = cluster.ids().into_iter().filter(|id| *id != away).collect();
        let key = format!("/without-{away}");
        cluster.put(pair[0], &key, "written");
        assert_eq!(cluster.get(pair[1], &key).as_deref(), Some("written"), "without {away}");
        cluster.start_again(away);
        serves(cluster.address(away));
    }
}
