//! First starts, and members that must not start.

use raftexample::error::Error;
use tokio::time::sleep;

use crate::harness::{Cluster, ELECTION_TIMEOUT, Options};

/// Checks that a member was refused for a reason that contains all of `texts`.
#[track_caller]
fn assert_refused(end: &Error, texts: &[&str]) {
    let Error::Refused(why) = end else { panic!("not refused, but: {end}") };
    for text in texts {
        assert!(why.contains(text), "{text:?} is not in: {why}");
    }
}

/// Starts three first members. The first waits for a while if `is_alone`, the first two if `is_late`.
async fn start_in_order(order: [u64; 3], is_alone: bool, is_late: bool) {
    let mut cluster = Cluster::new(3);
    let [first, second, third] = order;
    for (id, waits) in [(first, is_alone), (second, is_late)] {
        cluster.start(id).await;
        if waits {
            // Nothing may happen, which only time can show: longer than an election takes.
            sleep(2 * ELECTION_TIMEOUT).await;
            assert!(!cluster.status(id).begun, "{order:?}: {id} begins without the others");
        }
    }
    cluster.start(third).await;
    cluster.leader().await;
    cluster.write(third, "/three", "of three").await;
    for id in 1..=3 {
        cluster.holds(id, "/three", "of three").await;
        cluster.has_members(id, &[1, 2, 3]).await;
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_members_start_in_any_order_and_at_any_time() {
    tokio::join!(
        start_in_order([1, 2, 3], false, false),
        start_in_order([1, 3, 2], true, true),
        start_in_order([2, 1, 3], false, true),
        start_in_order([2, 3, 1], true, false),
        start_in_order([3, 1, 2], false, true),
        start_in_order([3, 2, 1], true, true),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn first_members_say_for_whom_they_wait() {
    let mut cluster = Cluster::new(3);
    cluster.start(1).await;
    cluster.start(2).await;
    let url = cluster.url(3);
    for id in [1, 2] {
        cluster.until_logged(id, &format!("waiting for {url}")).await;
    }
    cluster.start(3).await;
    let leader = cluster.leader().await;
    cluster.write(leader, "/k", "v").await;
    cluster.stop_all().await;
}

async fn wiped_member_is_refused(is_leader_up: bool) {
    let mut cluster = Cluster::started(3, Options::default()).await;
    cluster.write(1, "/k", "v").await;
    let leader = cluster.leader().await;
    let wiped = cluster.follower().await;
    cluster.caught_up(&[1, 2, 3]).await;
    cluster.stop(wiped).await;
    cluster.wipe(wiped);
    if !is_leader_up {
        cluster.stop(leader).await;
    }
    cluster.start(wiped).await;
    assert_refused(&cluster.end(wiped).await, &[&format!("DELETE /{wiped}"), "new id"]);
    if !is_leader_up {
        cluster.start(leader).await;
    }
    let leader = cluster.leader().await;
    cluster.write(leader, "/k", "v2").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wiped_member_is_refused_while_the_leader_is_up() {
    wiped_member_is_refused(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wiped_member_is_refused_while_the_leader_is_down() {
    wiped_member_is_refused(false).await;
}

/// Two of three members with different lists.
#[tokio::test(flavor = "multi_thread")]
async fn lists_that_differ_never_begin_together_and_are_named() {
    let mut cluster = Cluster::new(2);
    let mut lists = Vec::new();
    for id in 1..=2 {
        let list = &mut cluster.config(id).cluster;
        list.push(format!("http://127.0.0.1:{id}"));
        lists.push(list.join(","));
    }
    cluster.start_all().await;
    for id in 1..=2 {
        for list in &lists {
            cluster.until_logged(id, list).await;
        }
    }
    // Nothing may happen, which only time can show: both had time to bootstrap.
    sleep(3 * ELECTION_TIMEOUT).await;
    for id in 1..=2 {
        assert!(!cluster.status(id).begun, "member {id} has begun");
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_another_member_or_list_is_refused() {
    let mut cluster = Cluster::started(1, Options::default()).await;
    cluster.write(1, "/k", "v").await;
    cluster.stop(1).await;
    let right = cluster.config(1).clone();

    cluster.config(1).cluster.push("http://127.0.0.1:9".to_owned());
    cluster.start(1).await;
    assert_refused(&cluster.end(1).await, &["another --cluster list"]);
    *cluster.config(1) = right;

    let dir = cluster.wal_dir(1);
    let others = cluster.wal_dir(2);
    std::fs::rename(&dir, &others).unwrap();
    cluster.impostor(2, 1);
    cluster.config(2).id = 2;
    cluster.start(2).await;
    assert_refused(&cluster.end(2).await, &["member 1", "--id 2"]);
    std::fs::rename(&others, &dir).unwrap();

    cluster.start(1).await;
    cluster.leader().await;
    assert_eq!(cluster.client(1).get("/k").await.expect(200).text(), "v");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_node_on_a_directory_in_use_is_refused() {
    let mut cluster = Cluster::started(1, Options::default()).await;
    cluster.impostor(2, 1);
    cluster.start(2).await;
    assert_refused(&cluster.end(2).await, &["in use", "raftexample-1"]);
    cluster.write(1, "/k", "v").await;
    cluster.stop_all().await;
}
