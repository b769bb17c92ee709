//! Snapshots: when they are made, what they contain, and members that need one.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use raftexample::channels::{
    Ack, BacklogPermit, Commit, CommittedEntry, NodeId, Requests, SnapshotRequest, SnapshotRestore,
};
use raftexample::kvstore::{Keys, KvStore};
use raftexample::raft_node::NodeConfig;
use raftexample::raft_node::state_machine::CommitReader;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::harness::{
    Cluster, Options, PATIENCE, Raw, eventually, logger, lookup_local, propose, within,
};
use crate::support::config::closed;

/// The snapshot at an index is requested after the entries up to it and before all others. It is
/// made when the state machine reaches that index.
#[tokio::test(flavor = "multi_thread")]
async fn test_snapshot() {
    let mut cluster = Cluster::with(1, Options::snapshots(4));
    let mut raw = cluster.open(1);
    // A request whose pending half is dropped is not proposed, so the pending halves are kept.
    let mut pending = Vec::new();
    for i in 0..40 {
        pending.push(raw.propose(format!("foo {i}")).await);
    }
    let (mut applied, mut snapshots) = (0, 0);
    while snapshots < 3 {
        match raw.next().await {
            Commit::Entries { entries, .. } => {
                for entry in entries {
                    assert!(entry.index > applied, "{} comes behind {applied}", entry.index);
                    applied = entry.index;
                }
            }
            Commit::Snapshot(SnapshotRequest { index, save }) => {
                assert!(applied <= index, "entry {applied} comes before the snapshot at {index}");
                assert!(raw.node.status.borrow().snapshot < index, "it was made before it was due");
                save(&mut |file| file.write_all(b"state"));
                eventually(PATIENCE, "the snapshot is kept", async || {
                    raw.node.status.borrow().snapshot == index
                })
                .await;
                snapshots += 1;
                for _ in 0..5 {
                    pending.push(raw.propose("more").await);
                }
            }
            _ => {}
        }
    }
    let status = raw.node.status.borrow().clone();
    assert!(status.first > 1, "nothing was compacted");
    raw.close().await.expect("the node ends in order");
}

/// A requested snapshot does not exist until the state machine has made it.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_compacted_before_the_snapshot_is_made() {
    let mut cluster = Cluster::with(1, Options::snapshots(4));
    let mut raw = cluster.open(1);
    let mut pending = Vec::new();
    for i in 0..10 {
        pending.push(raw.propose(format!("foo {i}")).await);
    }
    let request = next_snapshot(&mut raw).await;
    for i in 0..10 {
        pending.push(raw.propose(format!("bar {i}")).await);
    }
    while raw.next_entries().await.last().unwrap().data != "bar 9" {}
    let status = raw.node.status.borrow().clone();
    assert_eq!((status.snapshot, status.first), (0, 1));
    (request.save)(&mut |file| file.write_all(b"state"));
    eventually(PATIENCE, "the snapshot is kept", async || {
        raw.node.status.borrow().snapshot == request.index
    })
    .await;
    raw.close().await.expect("the node ends in order");
}

async fn next_snapshot(raw: &mut Raw) -> SnapshotRequest {
    loop {
        if let Commit::Snapshot(request) = raw.next().await {
            return request;
        }
    }
}

/// A store whose commitC the test feeds.
struct Store {
    store: KvStore,
    reader: CommitReader<Keys>,
    propose_rx: mpsc::Receiver<raftexample::channels::Proposal>,
}

impl Store {
    fn new() -> Self {
        let (propose_tx, propose_rx) = mpsc::channel(1);
        let requests = Requests { propose_tx, ..closed() };
        let logger = logger(0, Arc::default());
        let (store, mut reader) = KvStore::new(&NodeConfig::default(), requests, logger);
        reader.handle(Commit::Replayed).unwrap();
        Self { store, reader, propose_rx }
    }

    /// Proposes a write and commits it at `index`.
    async fn put(&mut self, index: u64, key: &[u8], value: &[u8]) {
        let commit = async {
            let proposal = self.propose_rx.recv().await.unwrap();
            let responder = Some(proposal.responder);
            let entries = vec![CommittedEntry { index, term: 1, data: proposal.data, responder }];
            let applied = BacklogPermit::new(0, &Arc::default());
            self.reader.handle(Commit::Entries { entries, applied }).unwrap();
        };
        let deadline = Instant::now() + PATIENCE;
        let (answer, ()) = tokio::join!(
            self.store.propose(key, Bytes::copy_from_slice(value), Ack::Committed, deadline),
            commit
        );
        answer.unwrap();
    }

    async fn snapshot(&mut self, index: u64) -> Vec<u8> {
        let (bytes_tx, bytes_rx) = tokio::sync::oneshot::channel();
        let request = SnapshotRequest {
            index,
            save: Box::new(move |body| {
                let mut bytes = Vec::new();
                body(&mut bytes).unwrap();
                bytes_tx.send(bytes).unwrap();
            }),
        };
        self.reader.handle(Commit::Snapshot(request)).unwrap();
        within("the snapshot is made", bytes_rx).await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn test_kvstore_snapshot() {
    let pairs: [(&[u8], &[u8]); 5] = [
        (b"/foo", b"bar"),
        (b"/empty", b""),
        (b"\xff\xfe\x00\x41", b"\x00\xff\xfe"),
        (b"\xff\xfd\x00\x41", b"not the same key"),
        (b"", "schl\u{fc}ssellos".as_bytes()),
    ];
    let (mut forwards, mut backwards) = (Store::new(), Store::new());
    let indexed = || (1..).zip(pairs);
    // The keys are created in opposite orders, and then have the same last writes.
    for (index, (key, _)) in indexed() {
        forwards.put(index, key, b"first").await;
        backwards.put(index, pairs[5 - index as usize].0, b"first").await;
    }
    for (index, (key, value)) in indexed() {
        forwards.put(5 + index, key, value).await;
        backwards.put(5 + index, key, value).await;
    }
    let bytes = forwards.snapshot(10).await;
    assert_eq!(bytes, backwards.snapshot(10).await, "the order of creation is visible");

    let mut restored = Store::new();
    restored.put(1, b"/before", b"the snapshot").await;
    let reader = Box::new(std::io::Cursor::new(bytes.clone()));
    restored
        .reader
        .handle(Commit::Restore(SnapshotRestore { index: 10, term: 1, reader }))
        .unwrap();
    for (key, value) in pairs {
        assert_eq!(lookup_local(&restored.store, key).await.as_deref(), Some(value), "{key:?}");
    }
    assert_eq!(lookup_local(&restored.store, b"/before").await, None, "the state was replaced");
    assert_eq!(restored.snapshot(5).await, bytes);
}

/// A member ignores a snapshot that does not count it as a member. So the new member receives a
/// fresh snapshot, whose ConfState contains it.
#[tokio::test(flavor = "multi_thread")]
async fn test_process_messages() {
    let mut cluster = Cluster::started(3, Options::snapshots(5)).await;
    cluster.fill(1, "a", 0..20).await;
    let leader = cluster.leader().await;
    eventually(PATIENCE, "the log is compacted", async || cluster.status(leader).first > 5).await;
    let last_snapshot = cluster.status(leader).snapshot;
    cluster.joiner(4);
    let url = cluster.url(4);
    cluster.client(leader).add(4, &url).await.expect(204);
    let mut raw = cluster.open(4);
    loop {
        match raw.next().await {
            Commit::Restore(snapshot) => {
                assert!(snapshot.index > last_snapshot, "it is older than the new member");
                break;
            }
            Commit::Entries { .. } => panic!("entries come in front of the snapshot"),
            _ => {}
        }
    }
    eventually(PATIENCE, "the snapshot counts member 4 as one", async || {
        raw.node.status.borrow().members.urls.contains_key(&4)
    })
    .await;
    raw.close().await.expect("the node ends in order");
    cluster.stop_all().await;
}

/// etcd #12473, twice, and under a second leader.
#[tokio::test(flavor = "multi_thread")]
async fn members_join_after_compaction_under_two_leaders() {
    let mut cluster = Cluster::started(3, Options::snapshots(5)).await;
    cluster.fill(1, "a", 0..20).await;
    let leader = cluster.leader().await;
    cluster.join(4, leader).await;
    cluster.is_filled(4, "a", 0..20).await;
    cluster.until_logged(4, "finished publishing snapshot").await;

    cluster.stop(leader).await;
    let next = cluster.leader().await;
    cluster.start(leader).await;
    cluster.fill(next, "b", 0..20).await;
    cluster.join(5, leader).await;
    cluster.is_filled(5, "a", 0..20).await;
    cluster.is_filled(5, "b", 0..20).await;
    cluster.until_logged(5, "finished publishing snapshot").await;
    for id in 1..=5 {
        cluster.has_members(id, &[1, 2, 3, 4, 5]).await;
    }
    cluster.stop_all().await;
}

/// It knows member 4 from the snapshot alone, which must be enough to lead it.
#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_learned_of_a_member_by_snapshot_can_lead_it() {
    let mut cluster = Cluster::started(3, Options::snapshots(5)).await;
    let late = cluster.follower().await;
    cluster.caught_up(&[1, 2, 3]).await;
    cluster.stop(late).await;
    let leader = cluster.leader().await;
    cluster.join(4, leader).await;
    cluster.fill(leader, "a", 0..20).await;
    cluster.is_filled(4, "a", 0..20).await;
    // It asks for votes long before the others do.
    cluster.config(late).election_ticks = 4;
    cluster.config(late).randomized_election_ticks = 4..8;
    cluster.start(late).await;
    cluster.is_filled(late, "a", 0..20).await;
    cluster.until_logged(late, "finished publishing snapshot").await;
    cluster.has_members(late, &[1, 2, 3, 4]).await;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let leader = cluster.leader().await;
        if leader == late {
            break;
        }
        assert!(Instant::now() < deadline, "member {late} does not come to lead");
        cluster.restart(leader).await;
    }
    cluster.until_logged(late, "peer 4 became active").await;
    // With one old member stopped, member 4 is needed for a majority.
    let other: NodeId = (1..=3).find(|id| *id != late).unwrap();
    cluster.stop(other).await;
    cluster.leader().await;
    cluster.write(late, "/with", "member 4").await;
    cluster.holds(4, "/with", "member 4").await;
    cluster.stop_all().await;
}

/// A new member receives 50 MiB while writes continue: heartbeats do not queue after them.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_snapshot_under_load_changes_no_leader() {
    const VALUES: usize = 50;
    let mut cluster = Cluster::started(3, Options::snapshots(VALUES as u64)).await;
    let leader = cluster.leader().await;
    let value = |i: usize| Bytes::from(vec![i as u8; 1 << 20]);
    for i in 0..VALUES {
        cluster.client(leader).put(&format!("/large{i}"), value(i)).await.expect(204);
    }
    cluster.fill(leader, "a", 0..5).await;
    eventually(PATIENCE, "the log is compacted", async || cluster.status(leader).first > 1).await;
    let before = cluster.status(leader);
    cluster.join(4, leader).await;
    let mut i = 5;
    eventually(PATIENCE, "member 4 has the snapshot", async || {
        cluster.client(leader).put(&format!("/a{i}"), i.to_string()).await.expect(204);
        i += 1;
        cluster.has_logged(4, "finished publishing snapshot")
    })
    .await;
    cluster.is_filled(4, "a", 0..i).await;
    let store = cluster.store(4);
    for i in 0..VALUES {
        let key = format!("/large{i}");
        assert_eq!(lookup_local(&store, key.as_bytes()).await, Some(value(i)), "{key}");
    }
    let after = cluster.status(leader);
    assert_eq!((before.leader, before.term), (after.leader, after.term));
    drop(store);
    cluster.stop_all().await;
}

/// Every byte survives in the log, in snapshots and after a restart.
#[tokio::test(flavor = "multi_thread")]
async fn any_bytes_are_the_same_on_all_members_however_they_got_there() {
    let mut cluster = Cluster::started(3, Options::snapshots(10)).await;
    let store = cluster.store(1);
    let mut pairs: Vec<(Vec<u8>, Vec<u8>)> = (0..=255u8)
        .step_by(9)
        .map(|byte| (vec![0xff, byte, 0x00], vec![byte, 0xfe, 0x80, 0x0a]))
        .collect();
    pairs.push((Vec::new(), Vec::new()));
    for (key, value) in &pairs {
        propose(&store, key, value).await.expect("it is acknowledged");
    }
    drop(store);
    cluster.join(4, 2).await;
    cluster.until_logged(4, "finished publishing snapshot").await;
    cluster.restart(3).await;
    cluster.leader().await;
    cluster.caught_up(&[1, 2, 3, 4]).await;
    for id in 1..=4 {
        let store = cluster.store(id);
        for (key, value) in &pairs {
            let read = Mutex::new(None);
            eventually(PATIENCE, &format!("member {id} has {key:?}"), async || {
                *read.lock().unwrap() = lookup_local(&store, key).await;
                read.lock().unwrap().is_some()
            })
            .await;
            assert_eq!(read.into_inner().unwrap().as_deref(), Some(value.as_slice()), "{id}");
        }
    }
    cluster.stop_all().await;
}
