//! The peer port and the requests to other members: raft's messages over HTTP, in both directions.
//!
//! # Outgoing
//! Each peer has one bounded queue and one task. The task sends the queued messages in batches of up to
//! a mebibyte. The first is a request of its own; after it was accepted, the following ones go over one
//! long request, as the module `stream` describes. A batch is sent **at most once**. raft repeats what it
//! needs.
//!
//! # When a queue is full
//! The raft node never waits for a peer, and memory is bounded:
//! - If the queue to a peer is full (4,096 messages or 64 MiB), `send` below drops a new message. raft is
//!   told once that the peer is unreachable, until the queue takes messages again.
//! - If the receiver's queue to its node is full (1,024), it answers 503 (`inbound.rs`), or ends the stream
//!   with a line that says so. The sender (`sender.rs`) drops that batch and what is queued behind it, as after any other error,
//!   tells raft that the peer is unreachable, and pauses for up to a tenth of an election timeout, or for
//!   half of one after a refusal.
//!
//! Dropped proposals go back to the node, which may propose them elsewhere. Those of a batch that left do
//! not, whatever the answer: their clients get 504, at once if the batch is lost.
//!
//! # Snapshots
//! A snapshot has its own task and connection, so that heartbeats do not wait for it. Its end is always
//! reported, because raft sends nothing else to that peer until then.
//!
//! # Incoming
//! The peer port serves [`Transport::router`]. [`Admission`] decides on the sender by its headers,
//! before a byte of the body is read. The length and the time of a body are bounded, and so are the bytes
//! of all bodies until the node has taken them. Nothing of a malformed request is delivered. With TLS, a
//! request or an answer in the name of another member is refused.
//!
//! The module `wire` documents requests and answers, header by header. The node validates each message.

mod api;
mod call;
mod inbound;
mod names;
mod outbound;
mod sender;
mod status;
mod stream;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use raft::eraftpb::{Message, MessageType};
use slog::{Logger, debug};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

pub use self::api::{Answer, Inbound, InboundBody, Outbox};
use self::sender::PeerSender;
pub use self::status::{ClusterWatch, SLOW_INTERVAL, Statuses};
use crate::channels::{Greeting, MemberRequest, NodeId, PeerReport, Responder, SnapshotFile};
use crate::error::{RequestError, Result};
use crate::membership::{Admission, MEMBERS_MAX};
use crate::metrics::Metrics;
use crate::ports::tls::Tls;
use crate::raft_node::status::Status;
use crate::storage::snapshotter::Snapshotter;

/// The largest body that a member takes from a peer, in bytes; a snapshot's file is not counted. A
/// flag that differs between members would stall replication, so it is none.
pub const PEER_BODY_BYTES: u64 = 96 << 20;

/// The most bytes of peers' bodies in memory, until the node has taken them: two of the largest.
pub const PEER_BODIES_BYTES: u64 = 2 * PEER_BODY_BYTES;

/// The most messages that wait for one peer.
pub const PEER_QUEUE_MESSAGES: usize = 4_096;

/// The most bytes of payload that wait for one peer, unless it is a single message.
pub const PEER_QUEUE_BYTES: u64 = 64 << 20;

const SNAPSHOTS_RECEIVED_AT_ONCE: u32 = 2;

/// A client can send changes faster than the leader makes them. Further ones wait here, without a
/// connection, until they have expired.
const CHANGES_FORWARDED_AT_ONCE: usize = 8;

/// The most connections to peers at a time, those that close not counted. To each peer: a stream, a
/// batch beside it, a question for its status, a greeting or a snapshot.
pub const OUTGOING_CONNECTIONS_MAX: usize = 4 * (MEMBERS_MAX - 1) + CHANGES_FORWARDED_AT_ONCE;

/// Idle connections to one peer. Requests other than a stream's follow each other.
const IDLE_CONNECTIONS: usize = 2;

/// The slowest network, and the slowest sync, that a deadline allows for.
const MINIMAL_RATE_BYTES_PER_SECOND: u64 = 10 << 20;

/// How long idle connections are kept: less than the listener of the other side keeps them, for a
/// request on a connection that is just being closed is lost.
const IDLE_CONNECTION_TIMEOUT: Duration = Duration::from_secs(4);

/// How a [`Transport`] behaves.
#[derive(Clone, Debug)]
pub struct TransportConfig {
    /// A connection is made within a quarter of it, a batch answered within half, and backoff is at most a
    /// tenth, or half after a refusal: a healed partition must not wait for TCP.
    pub election_timeout: Duration,
    /// How long a forwarded change of members may take.
    pub request_timeout: Duration,
    /// How long no byte of a snapshot may move before it counts as failed.
    pub snapshot_progress_timeout: Duration,
    /// How long any other body may take to arrive, beside what its length allows.
    pub body_timeout: Duration,
    /// This member's boot id.
    pub boot: u64,
    /// Where bytes and failures are counted.
    pub metrics: Metrics,
    /// The certificates; the same as on the peer port.
    pub tls: Option<Tls>,
    /// This member's status, for the others.
    pub status: watch::Receiver<Status>,
    /// The others' statuses, for the admin port.
    pub cluster: Arc<ClusterWatch>,
}

impl TransportConfig {
    /// The defaults: 5 seconds for each of the timeouts that are not raft's.
    pub fn new(election_timeout: Duration, boot: u64) -> Self {
        Self {
            election_timeout,
            request_timeout: Duration::from_secs(5),
            snapshot_progress_timeout: Duration::from_secs(5),
            body_timeout: Duration::from_secs(5),
            boot,
            metrics: Metrics::default(),
            tls: None,
            status: watch::channel(Status::default()).1,
            cluster: Arc::default(),
        }
    }

    /// The patience with a peer.
    fn half_election_timeout(&self) -> Duration {
        self.election_timeout / 2
    }

    /// How long a sender's request waits for the node: half of the sender's own patience, so that
    /// the verdict still reaches it.
    fn verdict_timeout(&self) -> Duration {
        self.election_timeout / 4
    }
}

/// The time that `bytes` may take at the minimal rate.
fn allowance(bytes: u64) -> Duration {
    Duration::from_secs_f64(bytes as f64 / MINIMAL_RATE_BYTES_PER_SECOND as f64)
}

/// What the tasks and the handlers of one transport share.
struct Shared {
    config: TransportConfig,
    names: names::Names,
    /// Replaced when the certificates are.
    clients: watch::Sender<call::Clients>,
    admission: Arc<Admission>,
    snapshotter: Snapshotter,
    inbound_tx: mpsc::Sender<Inbound>,
    /// Unbounded, but bounded in effect: a peer's task reports a few times per backoff, and what it
    /// gives back is what its queue held.
    report_tx: mpsc::UnboundedSender<PeerReport>,
    logger: Logger,
    /// Numbers this boot's batches and snapshots; shared by all peers, so it rises for each.
    numbers: AtomicU64,
    /// One permit per byte of a peer's body in memory.
    body_bytes: Arc<Semaphore>,
    /// One permit per snapshot that is being written here.
    receiving: Arc<Semaphore>,
    receiving_from: Mutex<BTreeSet<NodeId>>,
    /// One permit for each change on its way to the leader.
    forwarding: Semaphore,
    closing: watch::Sender<bool>,
    /// Each task holds a receiver until it ends.
    running: watch::Sender<()>,
}

impl Shared {
    /// Resolves once the transport closes.
    fn closed(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut closing_rx = self.closing.subscribe();
        async move {
            // Its sender is never dropped before it says so.
            let _ = closing_rx.wait_for(|closing| *closing).await;
        }
    }

    /// Tells the node. That it has stopped is a normal event.
    fn report(&self, report: PeerReport) {
        let _ = self.report_tx.send(report);
    }

    /// Tells the node of a message that was not sent, where it has to know: raft repeats the others.
    fn report_unsent(&self, message: Message) {
        if message.msg_type == MessageType::MsgPropose {
            let to = message.to;
            let entries = message.entries.into_iter();
            let requests = entries.map(|entry| (entry.context, entry.data)).collect();
            self.report(PeerReport::NotProposed { to, requests });
        }
    }

    /// The place of the next batch or snapshot among those of this boot.
    fn next_sequence(&self) -> wire::Sequence {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        wire::Sequence { boot: self.config.boot, number }
    }
}

/// Whom a request is for. An id or an incarnation that is not known is 0.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    id: NodeId,
    incarnation: u64,
    url: Arc<str>,
}

/// One peer, as the raft node sees it. Dropping it lets the peer's task drain the queue and end.
struct Peer {
    target: Target,
    queue_tx: mpsc::Sender<Message>,
    queued_bytes: Arc<AtomicU64>,
    /// Never sent on: dropping it starts the time that the queue has to drain.
    _removed_tx: oneshot::Sender<()>,
    /// True while the full queue was reported and nothing was queued since.
    overflowing: bool,
    snapshot_on_its_way: Arc<AtomicBool>,
    snapshot_failures: Arc<AtomicU32>,
}

/// The raft node's end of the transport. Dropping it closes it: queues drain for at most a second,
/// and snapshots, greetings and changes on their way are aborted.
pub struct Transport {
    shared: Arc<Shared>,
    runtime: Handle,
    peers: BTreeMap<NodeId, Peer>,
}

impl Transport {
    /// A transport without peers. `inbound_tx` takes what arrives, `report_tx` what became of what
    /// was sent; its tasks run on `runtime`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::error::Error::Config) if there can be no HTTP client.
    pub fn new(
        config: TransportConfig,
        admission: Arc<Admission>,
        snapshotter: Snapshotter,
        inbound_tx: mpsc::Sender<Inbound>,
        report_tx: mpsc::UnboundedSender<PeerReport>,
        runtime: Handle,
        logger: Logger,
    ) -> Result<Self> {
        let names = names::Names::default();
        let shared = Shared {
            clients: watch::Sender::new(call::Clients::new(&config, &names)?),
            names,
            config,
            admission,
            snapshotter,
            inbound_tx,
            report_tx,
            logger,
            numbers: AtomicU64::new(1),
            body_bytes: Arc::new(Semaphore::new(PEER_BODIES_BYTES as usize)),
            receiving: Arc::new(Semaphore::new(SNAPSHOTS_RECEIVED_AT_ONCE as usize)),
            receiving_from: Mutex::new(BTreeSet::new()),
            forwarding: Semaphore::new(CHANGES_FORWARDED_AT_ONCE),
            closing: watch::Sender::new(false),
            running: watch::Sender::new(()),
        };
        let transport = Self { shared: Arc::new(shared), runtime, peers: BTreeMap::new() };
        transport.spawn(status::ask_others(transport.shared.clone()));
        transport.spawn(call::renew_clients(transport.shared.clone()));
        Ok(transport)
    }

    /// What the peer port serves. Its handlers live as long as the connections that call them.
    pub fn router(&self) -> Router {
        inbound::router(self.shared.clone())
    }

    /// Resolves once this transport was dropped and all of its tasks have ended. Then no snapshot is
    /// being written here, and none will be. Handlers of the router answer their requests as they can.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let shared = self.shared.clone();
        async move {
            shared.closed().await;
            shared.running.closed().await;
            // A thread that writes a snapshot holds a permit.
            let all = shared.receiving.acquire_many(SNAPSHOTS_RECEIVED_AT_ONCE).await;
            all.expect("the semaphore is never closed").forget();
        }
    }

    /// Runs `errand` until it ends or the transport closes.
    fn spawn(&self, errand: impl Future<Output = ()> + Send + 'static) {
        let running = self.shared.running.subscribe();
        let closed = self.shared.closed();
        self.runtime.spawn(async move {
            let _running = running;
            tokio::select! {
                biased;
                () = closed => {}
                () = errand => {}
            }
        });
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.shared.closing.send_replace(true);
    }
}

impl Outbox for Transport {
    fn send(&mut self, message: Message) {
        assert_ne!(message.msg_type, MessageType::MsgSnapshot, "a snapshot has a file");
        let to = message.to;
        let Some(peer) = self.peers.get_mut(&to) else {
            debug!(self.shared.logger, "dropped a {:?} to unknown peer {}", message.msg_type, to);
            return self.shared.report_unsent(message);
        };
        let bytes = payload_bytes(&message);
        let queued_bytes = peer.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        let unsent = if queued_bytes > 0 && queued_bytes + bytes > PEER_QUEUE_BYTES {
            Some(message)
        } else {
            peer.queue_tx.try_send(message).err().map(|error| error.into_inner())
        };
        let Some(unsent) = unsent else {
            peer.overflowing = false;
            return;
        };
        peer.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.shared.report_unsent(unsent);
        if !std::mem::replace(&mut peer.overflowing, true) {
            // One report is enough: raft stops streaming to this peer until it answers.
            self.shared.report(PeerReport::Unreachable(to));
        }
    }

    fn send_snapshot(&mut self, message: Message, file: SnapshotFile) {
        let metadata = message.get_snapshot().get_metadata();
        let (to, index) = (message.to, metadata.index);
        let peer = self.peers.get(&to);
        let Some(peer) = peer.filter(|peer| !peer.snapshot_on_its_way.swap(true, Ordering::AcqRel))
        else {
            debug!(
                self.shared.logger,
                "snapshot at index {} to peer {} was not started", index, to
            );
            let (arrived, damaged) = (false, false);
            self.shared.report(PeerReport::SnapshotStatus { to, index, arrived, damaged });
            return;
        };
        let guard = outbound::SnapshotGuard {
            shared: self.shared.clone(),
            to,
            index,
            on_its_way: peer.snapshot_on_its_way.clone(),
            arrived: false,
            damaged: Arc::default(),
            failures: peer.snapshot_failures.clone(),
        };
        self.spawn(outbound::send_snapshot(guard, peer.target.clone(), message, file));
    }

    fn add_peer(&mut self, id: NodeId, url: &str, incarnation: u64) {
        let target = Target { id, incarnation, url: url.into() };
        if self.peers.get(&id).is_some_and(|peer| peer.target == target) {
            return;
        }
        self.shared.config.metrics.meet_peer(id);
        let (queue_tx, queue_rx) = mpsc::channel(PEER_QUEUE_MESSAGES);
        let (removed_tx, removed_rx) = oneshot::channel();
        let queued_bytes = Arc::<AtomicU64>::default();
        let (shared, bytes) = (self.shared.clone(), queued_bytes.clone());
        let sending = PeerSender::run(shared, target.clone(), queue_rx, bytes, removed_rx);
        let running = self.shared.running.subscribe();
        // Closing drops the queue: the task drains it and ends.
        self.runtime.spawn(async move {
            let _running = running;
            sending.await;
        });
        let peer = Peer {
            target,
            queue_tx,
            queued_bytes,
            _removed_tx: removed_tx,
            overflowing: false,
            snapshot_on_its_way: Arc::default(),
            snapshot_failures: Arc::default(),
        };
        self.peers.insert(id, peer);
    }

    fn remove_peer(&mut self, id: NodeId) {
        self.peers.remove(&id);
        self.shared.config.metrics.forget_peer(id);
    }

    fn greet(&mut self, url: &str, greeting: Greeting) {
        self.spawn(outbound::greet(self.shared.clone(), url.to_owned(), greeting));
    }

    fn forward_change(&mut self, to: NodeId, change: MemberRequest, responder: Responder<()>) {
        let Some(peer) = self.peers.get(&to) else {
            let why = format!("member {to} leads, but its URL is not known here yet");
            responder.answer(Err(RequestError::unavailable(why)));
            return;
        };
        let (shared, target) = (self.shared.clone(), peer.target.clone());
        self.spawn(outbound::forward_change(shared, target, change, responder));
    }
}

/// What a message holds of the log, or for it, in bytes.
fn payload_bytes(message: &Message) -> u64 {
    let entries = message.entries.iter();
    entries.map(|entry| (entry.data.len() + entry.context.len()) as u64).sum()
}
