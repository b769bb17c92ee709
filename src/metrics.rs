//! The metrics of a member, which the admin port shows.
//!
//! [`Metrics`] is a handle that every module may hold; clones share the values. Updates never block or
//! fail. Gauges of the raft state (term, commit index, …) are not here: the admin port makes them from
//! the node's [`Status`](crate::raft_node::Status) at each request.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry, Unit};

use crate::channels::NodeId;

/// A handle on the metrics of one member. Clones share them.
pub type Metrics = Arc<Counts>;

/// The label of metrics per peer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PeerLabel {
    /// The peer's id.
    pub peer: NodeId,
}

/// One label with a value from a fixed set of words.
type WordLabel = [(&'static str, &'static str); 1];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    port: &'static str,
    method: &'static str,
    status: u16,
}

/// Makes a metric and registers it.
fn add<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

/// As [`add`], for a histogram of durations.
fn add_durations(registry: &mut Registry, name: &str, help: &str) -> Histogram {
    let metric = durations();
    registry.register_with_unit(name, help, Unit::Seconds, metric.clone());
    metric
}

/// A histogram of durations in seconds, from 10 microseconds to 5 seconds.
fn durations() -> Histogram {
    Histogram::new(exponential_buckets(1e-5, 2.0, 20))
}

/// Successful requests of one kind.
#[derive(Debug)]
pub struct Answered {
    count: AtomicU64,
    micros: AtomicU64,
    seconds: Histogram,
}

impl Answered {
    fn new(registry: &mut Registry, name: &str, help: &str) -> Self {
        let seconds = add_durations(registry, name, help);
        Self { count: AtomicU64::new(0), micros: AtomicU64::new(0), seconds }
    }

    /// Counts a request that took `duration`.
    pub fn observe(&self, duration: Duration) {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.micros.fetch_add(duration.as_micros() as u64, Ordering::Relaxed);
        self.seconds.observe(duration.as_secs_f64());
    }

    /// The number of requests, and their total time in microseconds.
    pub fn totals(&self) -> (u64, u64) {
        (self.count.load(Ordering::Relaxed), self.micros.load(Ordering::Relaxed))
    }
}

/// The metrics of one member.
#[derive(Debug)]
pub struct Counts {
    started: Instant,
    /// Milliseconds from the start to the last tick, plus one; 0 before it.
    last_tick: AtomicU64,

    // `default` says what each of these counts.
    pub(crate) leader_changes: Counter,
    pub(crate) proposals_pending: Gauge,
    pub(crate) proposals_committed: Counter,
    pub(crate) proposals_applied: Counter,
    pub(crate) proposals_failed: Counter,
    pub(crate) wal_fsync: Histogram,
    pub(crate) apply: Histogram,
    pub(crate) peer_sent_bytes: Family<PeerLabel, Counter>,
    pub(crate) peer_received_bytes: Family<PeerLabel, Counter>,
    pub(crate) peer_failures: Family<PeerLabel, Counter>,
    pub(crate) peer_round_trip: Family<PeerLabel, Histogram, fn() -> Histogram>,
    pub(crate) snapshots_made: Counter,
    /// By outcome: `ok` or `failed`.
    snapshots_sent: Family<WordLabel, Counter>,
    pub(crate) snapshots_installed: Counter,
    /// By reason.
    rejected: Family<WordLabel, Counter>,
    http_requests: Family<RequestLabels, Counter>,
    pub(crate) puts: Answered,
    pub(crate) gets: Answered,
    pub(crate) keys: Gauge,
    pub(crate) store_bytes: Gauge,
    pub(crate) retry_tokens: Gauge,
    pub(crate) watchers: Gauge,
    pub(crate) conditions_failed: Counter,
    /// All metrics, to be encoded.
    pub(crate) registry: Registry,
}

impl Default for Counts {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("raftexample");
        let to = &mut registry;
        // The admin port shows them in this order.
        Self {
            started: Instant::now(),
            last_tick: AtomicU64::new(0),
            leader_changes: add(
                to,
                "leader_changes",
                "Changes of the leader that this member follows",
            ),
            proposals_committed: add(to, "proposals_committed", "Committed writes of own clients"),
            proposals_applied: add(to, "proposals_applied", "Applied entries"),
            proposals_failed: add(to, "proposals_failed", "Writes of own clients, outcome unknown"),
            snapshots_made: add(to, "snapshots_made", "Snapshots made of the own state"),
            snapshots_installed: add(to, "snapshots_installed", "Snapshots received and installed"),
            proposals_pending: add(to, "proposals_pending", "Writes of own clients in progress"),
            keys: add(to, "keys", "Keys in the store"),
            store_bytes: add(to, "store_bytes", "Bytes of keys and values in the store"),
            retry_tokens: add(to, "retry_tokens", "Retry tokens that are remembered"),
            watchers: add(to, "watchers", "Connections that watch keys"),
            conditions_failed: add(
                to,
                "conditions_failed",
                "Writes of own clients whose conditions did not hold",
            ),
            wal_fsync: add_durations(to, "wal_fsync", "Time to write and sync a frame of the log"),
            apply: add_durations(to, "apply", "Time to apply a batch of entries"),
            puts: Answered::new(to, "put", "Time to acknowledge a PUT"),
            gets: Answered::new(to, "get", "Time to answer a GET with a value"),
            peer_sent_bytes: add(to, "peer_sent_bytes", "Bytes sent to a peer"),
            peer_received_bytes: add(to, "peer_received_bytes", "Bytes received from a peer"),
            peer_failures: add(to, "peer_failures", "Requests that did not reach a peer"),
            peer_round_trip: {
                let metric = Family::new_with_constructor(durations as fn() -> Histogram);
                let help = "Time from a heartbeat to its response";
                to.register_with_unit("peer_round_trip", help, Unit::Seconds, metric.clone());
                metric
            },
            snapshots_sent: add(to, "snapshots_sent", "Snapshots sent to peers"),
            rejected: add(to, "rejected", "Requests and connections refused on any port"),
            http_requests: add(to, "http_requests", "Answered requests for keys, by port"),
            registry,
        }
    }
}

impl Counts {
    /// The time since the process started.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Records a tick of the raft node's loop.
    pub fn ticked(&self) {
        self.last_tick.store(self.uptime().as_millis() as u64 + 1, Ordering::Relaxed);
    }

    /// The time since the raft node's loop last ticked. `None` before the first tick: a start takes as
    /// long as the replay needs.
    pub fn since_last_tick(&self) -> Option<Duration> {
        let at = self.last_tick.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.uptime().saturating_sub(Duration::from_millis(at)))
    }

    /// Begins the series of a peer. Nothing else does: what is counted after
    /// [`forget_peer`](Self::forget_peer) would begin them again.
    pub(crate) fn meet_peer(&self, peer: NodeId) {
        let label = PeerLabel { peer };
        drop(self.peer_sent_bytes.get_or_create(&label));
        drop(self.peer_received_bytes.get_or_create(&label));
        drop(self.peer_failures.get_or_create(&label));
        drop(self.peer_round_trip.get_or_create(&label));
    }

    /// Drops the series of a peer that is no member any more: ids are never used again.
    pub(crate) fn forget_peer(&self, peer: NodeId) {
        let label = PeerLabel { peer };
        self.peer_sent_bytes.remove(&label);
        self.peer_received_bytes.remove(&label);
        self.peer_failures.remove(&label);
        self.peer_round_trip.remove(&label);
    }

    /// Counts a refusal. `reason` is one of a fixed set of words.
    pub fn rejected(&self, reason: &'static str) {
        self.rejected.get_or_create(&[("reason", reason)]).inc();
    }

    /// Counts an answered request for keys: `port` is `client`, `application` or `admin`.
    pub fn answered(&self, port: &'static str, method: &'static str, status: u16) {
        self.http_requests.get_or_create(&RequestLabels { port, method, status }).inc();
    }

    /// Counts a snapshot sent to a peer, successfully or not.
    pub fn snapshot_sent(&self, arrived: bool) {
        let outcome = if arrived { "ok" } else { "failed" };
        self.snapshots_sent.get_or_create(&[("outcome", outcome)]).inc();
    }
}
