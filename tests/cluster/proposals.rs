//! Proposals through the bare channels, as in the original's tests, and under load.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::harness::{Cluster, Options, SLACK, eventually, within};

const FEEDBACKS: usize = 100;

/// Proposes every commit again: a blocked proposal does not block raft.
#[tokio::test(flavor = "multi_thread")]
async fn test_propose_on_commit() {
    let mut cluster = Cluster::new(3);
    let mut members = JoinSet::new();
    let done = Arc::new(tokio::sync::Barrier::new(3));
    for id in 1..=3 {
        let mut raw = cluster.open(id);
        let done = done.clone();
        members.spawn(async move {
            let mut pending = vec![raw.propose("foo").await];
            let mut fed_back = 0;
            while fed_back < FEEDBACKS {
                for entry in raw.next_entries().await {
                    assert_eq!(entry.data, "foo");
                    if fed_back < FEEDBACKS {
                        pending.push(raw.propose(entry.data).await);
                        fed_back += 1;
                    }
                }
            }
            // The others still need this member's vote.
            within("all members fed back enough", done.wait()).await;
            raw.close().await
        });
    }
    while let Some(closed) = members.join_next().await {
        closed.unwrap().expect("every node ends in order");
    }
}

/// The node stops before it replayed anything.
#[tokio::test(flavor = "multi_thread")]
async fn test_close_proposer_before_replay() {
    let mut cluster = Cluster::new(1);
    cluster.open(1).close().await.expect("the node ends in order");
}

/// The node stops while entries are queued on commitC.
#[tokio::test(flavor = "multi_thread")]
async fn test_close_proposer_inflight() {
    let mut cluster = Cluster::new(1);
    let mut raw = cluster.open(1);
    let _foo = raw.propose("foo").await;
    let _bar = raw.propose("bar").await;
    assert_eq!(raw.next_entries().await[0].data, "foo");
    raw.close().await.expect("the node ends in order");
}

/// Writers that run until they are stopped. Each checks that it is answered in time and returns the
/// acknowledged keys.
struct Load {
    writers: JoinSet<Vec<String>>,
    stopped: Arc<AtomicBool>,
}

impl Load {
    fn start(cluster: &Cluster, request_timeout: Duration) -> Self {
        let stopped = Arc::new(AtomicBool::new(false));
        let mut writers = JoinSet::new();
        for writer in 0..12 {
            let ids = cluster.ids();
            let id = ids[writer % ids.len()];
            let client = cluster.client(id);
            let stopped = stopped.clone();
            writers.spawn(async move {
                let mut acknowledged = Vec::new();
                for i in 0.. {
                    if stopped.load(Ordering::Relaxed) {
                        break;
                    }
                    let key = format!("/load-{writer}-{i}");
                    let begun = Instant::now();
                    let answer = client.put(&key, key.clone()).await;
                    let took = begun.elapsed();
                    assert!(took < request_timeout + SLACK, "PUT on {id} took {took:?}");
                    match answer.status {
                        204 => acknowledged.push(key),
                        503 | 504 => {}
                        // The member was stopped.
                        0 => break,
                        status => panic!("{status}: {}", answer.text()),
                    }
                }
                acknowledged
            });
        }
        Self { writers, stopped }
    }

    async fn stop(mut self) -> Vec<String> {
        self.stopped.store(true, Ordering::Relaxed);
        let mut acknowledged = Vec::new();
        while let Some(keys) = self.writers.join_next().await {
            acknowledged.extend(keys.unwrap());
        }
        acknowledged
    }
}

fn impatient() -> Options {
    Options { request_timeout: Duration::from_secs(2), ..Options::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_writer_is_answered_in_time_when_the_leader_stops() {
    let options = impatient();
    let mut cluster = Cluster::started(3, options.clone()).await;
    let load = Load::start(&cluster, options.request_timeout);
    let leader = cluster.leader().await;
    cluster.write(leader, "/before", "the stop").await;
    cluster.stop(leader).await;
    let next = cluster.leader().await;
    cluster.write(next, "/after", "the stop").await;
    let acknowledged = load.stop().await;
    assert!(!acknowledged.is_empty());
    for key in &acknowledged {
        assert_eq!(cluster.client(next).get(key).await.expect(200).text(), *key);
    }
    cluster.stop_all().await;
}

/// Ports, directories and locks are free at once, and no acknowledged write is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_stopped_under_load_starts_again_in_place() {
    let options = impatient();
    let mut cluster = Cluster::started(3, options.clone()).await;
    let load = Load::start(&cluster, options.request_timeout);
    cluster.write(1, "/before", "the stop").await;
    cluster.stop_all().await;
    let acknowledged = load.stop().await;
    let metrics = tokio::runtime::Handle::current().metrics();
    eventually(SLACK, "all tasks have ended", async || metrics.num_alive_tasks() == 0).await;
    cluster.start_all().await;
    let leader = cluster.leader().await;
    for key in &acknowledged {
        assert_eq!(cluster.client(leader).get(key).await.expect(200).text(), *key);
    }
    cluster.stop_all().await;
}

/// Like above, with the disks stopped first: they hold the acknowledged writes.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_a_crash_of_all_members() {
    let options = impatient();
    let mut cluster = Cluster::started(3, options.clone()).await;
    let load = Load::start(&cluster, options.request_timeout);
    cluster.write(1, "/before", "the crash").await;
    for id in 1..=3 {
        cluster.crash(id).await;
    }
    let acknowledged = load.stop().await;
    assert!(!acknowledged.is_empty());
    cluster.start_all().await;
    let leader = cluster.leader().await;
    for key in &acknowledged {
        assert_eq!(cluster.client(leader).get(key).await.expect(200).text(), *key);
    }
    cluster.stop_all().await;
}
