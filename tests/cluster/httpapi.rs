//! Responses to clients, with a majority and without.

use std::time::Duration;

use tokio::time::Instant;

use crate::harness::{Answer, Cluster, Options, PATIENCE, SLACK, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn test_put_and_get_key_value() {
    let mut cluster = Cluster::started(1, Options::default()).await;
    let client = cluster.client(1);
    let written = client.put("/test-key", "test-value").await.expect(204);
    assert!(written.body.is_empty());
    assert_eq!(client.get("/test-key").await.expect(200).text(), "test-value");
    assert_eq!(client.get("/absent").await.expect(404).text(), "Failed to GET\n");
    cluster.stop_all().await;
}

/// The key is the raw request target.
#[tokio::test(flavor = "multi_thread")]
async fn keys_that_differ_in_slash_query_or_escape_are_different_keys() {
    let mut cluster = Cluster::started(1, Options::default()).await;
    let client = cluster.client(1);
    let keys = ["/k", "/k/", "/k?x=1", "/%6b", "//k", "/", "/k%20k", "/k?x=2"];
    for key in keys {
        client.put(key, key).await.expect(204);
    }
    for key in keys {
        assert_eq!(client.get(key).await.expect(200).text(), key);
    }
    cluster.stop_all().await;
}

const REQUEST_TIMEOUT: Duration = Duration::from_millis(800);

/// Sends each kind of request to `id` at once and checks that all end within their deadline.
async fn each_kind(cluster: &Cluster, id: u64, key: &str) -> Vec<(&'static str, Answer)> {
    let client = cluster.client(id);
    let begun = Instant::now();
    let answers = tokio::join!(
        client.put(key, "v"),
        client.get(key),
        client.add(9, "http://127.0.0.1:9"),
        client.remove(1),
    );
    let took = begun.elapsed();
    assert!(took < REQUEST_TIMEOUT + SLACK, "{took:?}");
    vec![("PUT", answers.0), ("GET", answers.1), ("POST", answers.2), ("DELETE", answers.3)]
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_leader_a_member_answers_503_in_time() {
    let options = Options { request_timeout: REQUEST_TIMEOUT, ..Options::default() };
    let mut cluster = Cluster::started(3, options).await;
    cluster.stop(1).await;
    cluster.stop(2).await;
    eventually(PATIENCE, "member 3 knows no leader", async || cluster.status(3).leader == 0).await;
    for (method, answer) in each_kind(&cluster, 3, "/k").await {
        assert_eq!(answer.status, 503, "{method}: {}", answer.text());
        assert_eq!(answer.headers["retry-after"], "1", "{method}");
    }
    cluster.start_all().await;
    cluster.leader().await;
    cluster.client(3).get("/k").await.expect(404);
    cluster.has_members(3, &[1, 2, 3]).await;
    cluster.stop_all().await;
}

/// The leader proposed and cannot know the outcome: a 503 would claim that nothing happened.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_without_a_majority_answers_504_in_time() {
    let options = Options { request_timeout: REQUEST_TIMEOUT, ..Options::default() };
    let mut cluster = Cluster::started(3, options).await;
    let leader = cluster.leader().await;
    for id in 1..=3 {
        if id != leader {
            cluster.stop(id).await;
        }
    }
    let begun = Instant::now();
    let answer = cluster.client(leader).put("/k", "v").await;
    assert!(begun.elapsed() < REQUEST_TIMEOUT + SLACK);
    // On a busy machine it may have stepped down already.
    if cluster.status(leader).leader == leader {
        assert_eq!(answer.status, 504, "{}", answer.text());
    }
    assert!([503, 504].contains(&answer.status), "{}", answer.text());
    cluster.start_all().await;
    let new = cluster.leader().await;
    let read = cluster.client(new).get("/k").await;
    match answer.status {
        503 => assert_eq!(read.status, 404, "503 says that nothing was changed"),
        _ => assert!([200, 404].contains(&read.status)),
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_finds_no_leader_waits_for_one() {
    let mut cluster = Cluster::new(3);
    cluster.start(1).await;
    let client = cluster.client(1);
    let write = tokio::spawn(async move { client.put("/k", "v").await });
    let client = cluster.client(1);
    let read = tokio::spawn(async move { client.get("/absent").await });
    cluster.start(2).await;
    cluster.start(3).await;
    write.await.unwrap().expect(204);
    read.await.unwrap().expect(404);
    cluster.stop_all().await;
}
