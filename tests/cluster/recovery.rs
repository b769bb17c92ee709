//! Restarts keep acknowledged writes.

use std::time::Duration;

use tokio::time::Instant;

use crate::harness::{Cluster, Options, PATIENCE, eventually};

/// etcd #9262 and related: restore the snapshot first, then apply the log after it.
#[tokio::test(flavor = "multi_thread")]
async fn writes_before_and_behind_a_snapshot_survive_a_crash() {
    let mut cluster = Cluster::started(1, Options::snapshots(10)).await;
    cluster.fill(1, "a", 0..15).await;
    eventually(PATIENCE, "a snapshot is kept", async || cluster.status(1).snapshot > 0).await;
    cluster.fill(1, "b", 0..5).await;
    cluster.crash(1).await;
    cluster.start(1).await;
    cluster.is_filled(1, "a", 0..15).await;
    cluster.is_filled(1, "b", 0..5).await;
    cluster.stop_all().await;
}

/// Members added later are known from the snapshots, because the flags never named them.
#[tokio::test(flavor = "multi_thread")]
async fn first_flags_suffice_to_reach_members_added_and_compacted() {
    let mut cluster = Cluster::started(3, Options::snapshots(5)).await;
    cluster.join(4, 1).await;
    cluster.fill(2, "a", 0..20).await;
    eventually(PATIENCE, "the addition is compacted away everywhere", async || {
        (1..=4).all(|id| cluster.status(id).first > 10)
    })
    .await;
    cluster.stop_all().await;
    cluster.start_all().await;
    cluster.leader().await;
    for id in 1..=4 {
        cluster.has_members(id, &[1, 2, 3, 4]).await;
    }
    // Three of four are a majority only together, so each of them must be reachable.
    for down in 1..=3 {
        cluster.stop(down).await;
        cluster.leader().await;
        let key = format!("/without{down}");
        cluster.write(4, &key, "v").await;
        for id in cluster.ids() {
            cluster.holds(id, &key, "v").await;
        }
        cluster.start(down).await;
        cluster.leader().await;
        cluster.holds(down, &key, "v").await;
    }
    cluster.stop_all().await;
}

/// raft#174: a minimal log, so that every start and every join needs a snapshot.
#[tokio::test(flavor = "multi_thread")]
async fn members_restart_and_join_with_a_snapshot_after_every_entry() {
    let mut cluster = Cluster::started(3, Options::snapshots(1)).await;
    cluster.fill(1, "a", 0..12).await;
    cluster.join(4, 2).await;
    cluster.is_filled(4, "a", 0..12).await;
    for round in 0..3 {
        let prefix = format!("round{round}-");
        if round % 2 == 0 {
            cluster.crash(4).await;
        } else {
            cluster.stop(4).await;
        }
        let leader = cluster.leader().await;
        cluster.fill(leader, &prefix, 0..5).await;
        cluster.start(4).await;
        cluster.is_filled(4, &prefix, 0..5).await;
    }
    cluster.stop_all().await;
    cluster.start_all().await;
    cluster.leader().await;
    cluster.join(5, 4).await;
    for id in 1..=5 {
        cluster.is_filled(id, "a", 0..12).await;
        cluster.is_filled(id, "round2-", 0..5).await;
    }
    cluster.stop_all().await;
}

/// etcd #22442: entries overwritten by a new leader stay overwritten, also after a snapshot and a
/// restart.
#[tokio::test(flavor = "multi_thread")]
async fn an_overwritten_tail_does_not_come_back() {
    let options =
        Options { request_timeout: Duration::from_secs(1), proxied: true, ..Options::snapshots(5) };
    let mut cluster = Cluster::started(3, options).await;
    cluster.write(1, "/k", "before").await;
    let old = cluster.leader().await;
    let others: Vec<_> = (1..=3).filter(|id| *id != old).collect();
    cluster.isolate(old);
    let client = cluster.client(old);
    // Each write reaches the old leader's own log and no other.
    let lost = tokio::join!(
        client.put("/k", "lost"),
        client.put("/lost1", "lost"),
        client.put("/lost2", "lost"),
    );
    for answer in [lost.0, lost.1, lost.2] {
        assert_eq!(answer.status, 504, "{}", answer.text());
    }
    let new = cluster.leader_of(&others).await;
    cluster.fill(new, "a", 0..20).await;
    cluster.write(new, "/k", "after").await;
    cluster.heal();
    cluster.is_filled(old, "a", 0..20).await;
    for round in 0..3 {
        for id in 1..=3 {
            cluster.holds(id, "/k", "after").await;
            for key in ["/lost1", "/lost2"] {
                cluster.client(id).get_local(key).await.expect(404);
            }
            cluster.is_filled(id, "a", 0..20).await;
        }
        if round % 2 == 0 {
            cluster.crash(old).await;
            cluster.start(old).await;
        } else {
            cluster.stop_all().await;
            cluster.start_all().await;
        }
        cluster.leader().await;
    }
    cluster.stop_all().await;
}

/// A local read waits until the log is replayed to its last known commit index.
#[tokio::test(flavor = "multi_thread")]
async fn no_local_read_is_older_after_a_restart() {
    let mut cluster = Cluster::started(3, Options::default()).await;
    for i in 0..5 {
        let value = i.to_string();
        cluster.write(2, "/k", &value).await;
        cluster.restart(2).await;
        let begun = Instant::now();
        let read = cluster.client(2).get_local("/k").await.expect(200);
        assert_eq!(read.text(), value);
        assert!(begun.elapsed() < PATIENCE);
        cluster.leader().await;
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_that_crash_one_after_the_other_lose_nothing() {
    let mut cluster = Cluster::started(3, Options::snapshots(20)).await;
    for round in 0..6 {
        let prefix = format!("round{round}-");
        let leader = cluster.leader().await;
        cluster.fill(leader, &prefix, 0..10).await;
        // Sometimes it is the leader.
        let down = round % 3 + 1;
        cluster.crash(down).await;
        let next = cluster.leader().await;
        cluster.fill(next, &prefix, 10..15).await;
        cluster.start(down).await;
    }
    for id in 1..=3 {
        for round in 0..6 {
            cluster.is_filled(id, &format!("round{round}-"), 0..15).await;
        }
    }
    cluster.stop_all().await;
}
