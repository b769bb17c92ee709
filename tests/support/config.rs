//! The configuration that members get unless a test needs another.

use std::time::Duration;

use raftexample::channels::{NodeId, Requests};
use raftexample::raft_node::NodeConfig;
use raftexample::storage::wal::{SEGMENT_BYTES, Sizes};
use tokio::sync::mpsc;

/// The data directory of every member in memory.
pub const DATA: &str = "/data";

pub fn url(id: NodeId) -> String {
    format!("http://127.0.0.1:{}", 9020 + id)
}

/// The channels to a node that has stopped.
pub fn closed() -> Requests {
    let (propose_tx, read_tx) = (mpsc::channel(1).0, mpsc::channel(1).0);
    Requests { propose_tx, read_tx, conf_change_tx: mpsc::channel(1).0 }
}

/// Segments of `segment_bytes`, and small steps, because every state of a disk is copied.
pub fn sizes(segment_bytes: u64) -> Sizes {
    Sizes { segment_bytes, step_bytes: 1024 }
}

/// The configuration of the first start of member `id` of `n`.
pub fn config(id: NodeId, n: u64) -> NodeConfig {
    NodeConfig {
        id,
        url: url(id),
        cluster: (1..=n).map(url).collect(),
        join: false,
        lift_quarantine: false,
        data_dir: DATA.into(),
        snapshot_count: 10_000,
        snapshot_catch_up_entries: 10_000,
        tick: Duration::from_millis(100),
        election_ticks: 10,
        // No randomness, so that a test repeats. Lower ids time out first, so that no vote is
        // split.
        randomized_election_ticks: 9 + id as usize..10 + id as usize,
        heartbeat_ticks: 1,
        request_timeout: Duration::from_secs(5),
        wal_sizes: sizes(SEGMENT_BYTES),
        boot: 1000 + id,
        incarnation: 100 + id,
        admin_url: String::new(),
        metrics: Default::default(),
    }
}
