//! Linearizable and local reads.

use std::time::Duration;

use crate::harness::{Cluster, Options, PATIENCE, eventually};

/// A read sees a write that another member acknowledged before.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_on_another_member_sees_the_latest_write() {
    let mut cluster = Cluster::started(3, Options::default()).await;
    for i in 0..90 {
        let (writer, reader) = (cluster.client(i % 3 + 1), cluster.client((i / 3 + 1) % 3 + 1));
        let value = format!("value {i}");
        let written = writer.put("/k", value.clone()).await.expect(204);
        let read = reader.get("/k").await.expect(200);
        assert_eq!(read.text(), value);
        for name in ["raft-index", "raft-term"] {
            assert_eq!(read.headers[name], written.headers[name], "{name}");
        }
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_local_read_answers_without_a_majority() {
    let options = Options { request_timeout: Duration::from_millis(700), ..Options::default() };
    let mut cluster = Cluster::started(3, options).await;
    cluster.write(1, "/k", "v").await;
    cluster.holds(3, "/k", "v").await;
    cluster.stop(1).await;
    cluster.stop(2).await;
    let client = cluster.client(3);
    assert_eq!(client.get_local("/k").await.expect(200).text(), "v");
    client.get_local("/absent").await.expect(404);
    let refused = client.get("/k").await.expect(503);
    assert_eq!(refused.headers["retry-after"], "1");
    cluster.stop_all().await;
}

/// A leader that is cut off must not answer from its map: the others may have a newer value.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_cut_off_answers_no_linearizable_read() {
    let options =
        Options { request_timeout: Duration::from_secs(1), proxied: true, ..Options::default() };
    let mut cluster = Cluster::started(3, options).await;
    cluster.write(1, "/k", "old").await;
    let old = cluster.leader().await;
    let others: Vec<_> = cluster.ids().into_iter().filter(|id| *id != old).collect();
    cluster.isolate(old);
    let client = cluster.client(old);
    let read = tokio::spawn(async move { client.get("/k").await });
    let new = cluster.leader_of(&others).await;
    cluster.write(new, "/k", "new").await;
    read.await.unwrap().expect(503);
    cluster.client(old).get("/k").await.expect(503);
    cluster.heal();
    cluster.leader().await;
    assert_eq!(cluster.client(old).get("/k").await.expect(200).text(), "new");
    cluster.stop_all().await;
}

/// It does not disturb the others when it returns: PreVote asks before it raises the term.
#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_was_cut_off_comes_back_without_an_election() {
    let options = Options {
        request_timeout: Duration::from_millis(600),
        proxied: true,
        ..Options::default()
    };
    let mut cluster = Cluster::started(3, options).await;
    let leader = cluster.leader().await;
    let lonely = cluster.follower().await;
    let term = cluster.status(leader).term;
    cluster.isolate(lonely);
    // For all this member knows, the write was on its way to the leader.
    cluster.client(lonely).put("/lost", "v").await.expect(504);
    eventually(PATIENCE, "it finds out that it is alone", async || {
        cluster.status(lonely).leader == 0
    })
    .await;
    cluster.client(lonely).put("/lost", "v").await.expect(503);
    cluster.client(lonely).get("/k").await.expect(503);
    cluster.client(leader).put("/k", "v").await.expect(204);
    cluster.heal();
    assert_eq!(cluster.leader().await, leader);
    assert_eq!(cluster.status(leader).term, term);
    cluster.holds(lonely, "/k", "v").await;
    cluster.client(lonely).get("/lost").await.expect(404);
    cluster.stop_all().await;
}
