//! What a node is started with, and what of it goes to raft-rs.
//!
//! raft-rs draws the election timeout anew at each change of term or role: from [`ELECTION_TICKS`] to twice
//! as many less one, 1.0 to 1.9 s by default. The flags are `--election-ticks` and `--tick`, in
//! `config/mod.rs`.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use raft::RawNode;
use slog::Logger;

use super::commits::OUTSTANDING_BYTES_MAX;
use super::{Index, NodeId};
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::storage::log::Log;
use crate::storage::wal;

/// raft refuses proposals while more log than this is uncommitted, in bytes.
const UNCOMMITTED_BYTES_MAX: u64 = 64 << 20;
/// The largest append message with more than one entry, in bytes; the original's figure.
pub(super) const APPEND_BYTES_MAX: u64 = 1 << 20;
/// Appends on their way to one member; the original's figure.
const INFLIGHT_APPENDS_MAX: usize = 256;

/// The default number of entries between two snapshots, as in the original.
pub const SNAPSHOT_COUNT: u64 = 10_000;

/// The default of the shortest election timeout, in ticks; each is drawn from N to 2N - 1.
pub const ELECTION_TICKS: usize = 10;

/// The configuration of a node. The default is that of the program without flags: member 1, alone
/// in its cluster, with its data below the working directory.
///
/// ```
/// use raftexample::raft_node::NodeConfig;
///
/// let config = NodeConfig { data_dir: "data".into(), snapshot_count: 100, ..NodeConfig::default() };
/// assert_eq!(config.cluster, [config.url]);
/// ```
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// This member, never 0.
    pub id: NodeId,
    /// The peer URL: where the other members reach this one.
    pub url: String,
    /// The `--cluster` list: the peer URLs of the first members, member 1 first.
    pub cluster: Vec<String>,
    /// True if the member joins a running cluster.
    pub join: bool,
    /// True to take part again although this member lost entries that it had acknowledged.
    pub lift_quarantine: bool,
    /// The directory that holds the member's two directories.
    pub data_dir: PathBuf,
    /// Entries between two snapshots. From [`SNAPSHOT_COUNT`] on, a large snapshot waits for more.
    pub snapshot_count: u64,
    /// Entries that stay in the log after a snapshot, for members that lag.
    pub snapshot_catch_up_entries: u64,
    /// The length of a tick.
    pub tick: Duration,
    /// The shortest election timeout, in ticks. A member alone in its cluster does not wait.
    pub election_ticks: usize,
    /// The range that raft draws a member's election timeout from, in ticks (paper, section 5.2). It
    /// starts at `election_ticks` or above. This is the node's only source of chance: a range of one
    /// tick makes it deterministic.
    pub randomized_election_ticks: Range<usize>,
    /// Ticks between two heartbeats of a leader.
    pub heartbeat_ticks: usize,
    /// The deadline of a request that names none, and of a forwarded membership request.
    pub request_timeout: Duration,
    /// The lengths that the write-ahead log is written with.
    pub wal_sizes: wal::Sizes,
    /// 64 random bits that identify this run of the member.
    pub boot: u64,
    /// 64 random bits that identify the data directory if the node creates it.
    pub incarnation: u64,
    /// Where operators reach this member, for the others to tell; empty if nowhere.
    pub admin_url: String,
    /// The counts that the node adds to.
    pub metrics: Metrics,
}

impl Default for NodeConfig {
    fn default() -> Self {
        let random = || getrandom::u64().expect("the operating system has random bits");
        let url = String::from("http://127.0.0.1:9021");
        Self {
            id: 1,
            cluster: vec![url.clone()],
            url,
            join: false,
            lift_quarantine: false,
            data_dir: ".".into(),
            snapshot_count: SNAPSHOT_COUNT,
            snapshot_catch_up_entries: 10_000,
            tick: Duration::from_millis(100),
            election_ticks: ELECTION_TICKS,
            randomized_election_ticks: ELECTION_TICKS..2 * ELECTION_TICKS,
            heartbeat_ticks: 1,
            request_timeout: Duration::from_secs(5),
            wal_sizes: wal::Sizes::default(),
            boot: random(),
            incarnation: random(),
            admin_url: String::new(),
            metrics: Metrics::default(),
        }
    }
}

/// Makes raft from a log; `applied` is the index that the state machine holds.
pub(super) fn start_raft(
    config: &NodeConfig,
    applied: Index,
    log: Log,
    logger: &Logger,
) -> Result<RawNode<Log>> {
    // Every field is set, so no default of raft-rs is in use.
    let raft_config = raft::Config {
        id: config.id,
        election_tick: config.election_ticks,
        heartbeat_tick: config.heartbeat_ticks,
        applied,
        max_size_per_msg: APPEND_BYTES_MAX,
        max_inflight_msgs: INFLIGHT_APPENDS_MAX,
        // A leader without a majority steps down, and a member that returns from a partition does
        // not depose the leader.
        check_quorum: true,
        pre_vote: true,
        min_election_tick: config.randomized_election_ticks.start,
        max_election_tick: config.randomized_election_ticks.end,
        read_only_option: raft::ReadOnlyOption::Safe,
        skip_bcast_commit: false,
        // 64 proposals to two followers take 4 messages, not 256.
        batch_append: true,
        priority: 0,
        max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
        max_committed_size_per_ready: OUTSTANDING_BYTES_MAX,
    };
    RawNode::new(&raft_config, log, logger)
        .map_err(|error| Error::Refused(format!("raft cannot start: {error}")))
}
