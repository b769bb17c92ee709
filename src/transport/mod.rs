//! The way to the other members: HTTP requests with raft's messages in them, both directions.
//!
//! # Outgoing
//! Each peer has one bounded queue and one task. The task takes what is queued, up to a mebibyte,
//! sends it as one request, and takes the next; to a peer that took one it sends those that follow
//! over one long request, as the module `stream` describes. A batch leaves **at most once**: whatever the
//! error, it is dropped, raft hears that the peer is unreachable, and raft repeats what it needs. A
//! queue that is full drops, too. So nothing here blocks the raft node, and nothing grows.
//!
//! A snapshot goes to a task of its own, over a connection of its own, so that heartbeats do not
//! wait behind it. Its end is always reported: raft sends nothing else to that peer until it is.
//!
//! # Incoming
//! [`Transport::router`] is what the peer port serves. The sender is judged by its headers, through
//! the [`Gate`], before a byte of the body is read. A body is bounded, and so is the time it may
//! take; the bytes of all bodies together are bounded until the node has taken them. What is not
//! wholly well-formed is answered 400 and nothing of it is delivered.
//!
//! With TLS, whoever connects has a certificate of the cluster's authority, and so has whoever
//! answers. That says that it is a member, and its name says which: a request or an answer in the
//! name of another is refused before anything of it is looked at.
//!
//! What a request and an answer look like is documented in the module `wire`, header by header.
//!
//! # What it is not
//! It knows nothing of files, members or raft's rules: files are a [`SnapshotFiles`], who may speak
//! is the [`Gate`]'s to say, and each message passes the node's own gate before it is stepped.

mod inbound;
mod outbound;
mod stream;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use raft::eraftpb::{Message, MessageType};
use slog::{Logger, debug};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::task::{JoinError, JoinSet};

use crate::channels::{
    Greeting, GreetingAnswer, Index, MemberRequest, NodeId, PeerHeader, PeerReport, Refusal,
    Responder, SnapshotFile, Term,
};
use crate::error::{Error, RequestError, Result};
use crate::metrics::Metrics;
use crate::ports::tls::Tls;

/// The largest body that a member takes from a peer, in bytes; a snapshot's file is not counted. A
/// flag that differs between members would stall replication, so it is none.
pub const PEER_BODY_BYTES: u64 = 96 << 20;

/// The most bytes of peers' bodies in memory at once, from the first byte until the node has taken
/// the messages: two of the largest.
pub const PEER_BODIES_BYTES: u64 = 2 * PEER_BODY_BYTES;

/// The most messages that wait for one peer; more are dropped.
pub const PEER_QUEUE_MESSAGES: usize = 4_096;

/// The most bytes of payload that wait for one peer, unless it is a single message.
pub const PEER_QUEUE_BYTES: u64 = 64 << 20;

/// How many snapshots a member receives at once, from different senders.
const SNAPSHOTS_RECEIVED_AT_ONCE: u32 = 2;

/// How long no byte of a snapshot may move before it counts as failed.
const SNAPSHOT_PROGRESS_TIMEOUT: Duration = Duration::from_secs(5);

/// How long any other body may take to arrive, beside what its length allows.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);

/// The slowest network, and the slowest sync, that a deadline allows for.
const MINIMAL_RATE_BYTES_PER_SECOND: u64 = 10 << 20;

/// How long idle connections are kept: less than the listener of the other side keeps them, for a
/// request on a connection that is just being closed is lost.
const IDLE_CONNECTION_TIMEOUT: Duration = Duration::from_secs(4);

/// What arrived from a peer. The node answers where an answer is asked for; dropping the answer
/// unsent says that this member is stopping.
#[derive(Debug)]
pub struct Inbound {
    /// Who sent it, as it says itself; the gate has seen it.
    pub header: PeerHeader,
    /// What it sent.
    pub body: InboundBody,
    /// The bytes it occupies, out of [`PEER_BODIES_BYTES`], given back when the node has taken it.
    bytes: Option<OwnedSemaphorePermit>,
}

impl Inbound {
    /// What a peer sent, without counting its bytes.
    pub fn new(header: PeerHeader, body: InboundBody) -> Self {
        Self { header, body, bytes: None }
    }

    /// The bytes it occupies out of [`PEER_BODIES_BYTES`].
    pub fn bytes(&self) -> usize {
        self.bytes.as_ref().map_or(0, OwnedSemaphorePermit::num_permits)
    }
}

/// What a peer sent, by kind.
#[derive(Debug)]
pub enum InboundBody {
    /// Raft messages, in the order they were sent.
    Messages {
        /// The sender's boot id.
        boot: u64,
        /// Rises with each batch of one boot: the receiver drops what is not above the last. A
        /// sender's batches and its snapshots are two sequences: a snapshot takes minutes.
        number: u64,
        /// At least one.
        messages: Vec<Message>,
        /// Whom to answer whether they were taken; `None` if the gate admitted them and the sender
        /// was told so already.
        answer: Option<Answer<()>>,
    },
    /// A `MsgSnapshot` whose file is already checked and durable here.
    Snapshot {
        /// The sender's boot id.
        boot: u64,
        /// Rises with each snapshot of one boot.
        number: u64,
        /// The message, to be stepped.
        message: Message,
        /// Whom to answer whether it was taken.
        answer: Answer<()>,
    },
    /// The sender introduces itself.
    Greeting {
        /// What it tells.
        greeting: Greeting,
        /// Whom to answer.
        answer: Answer<GreetingAnswer>,
    },
    /// The sender asks for this member's status.
    Status {
        /// Whom to answer, with the status, encoded.
        answer: Answer<Vec<u8>>,
    },
    /// A change of the members that a client asked of the sender, passed on.
    ConfChange {
        /// What to change.
        change: MemberRequest,
        /// Whom to answer.
        responder: Responder<()>,
    },
}

/// Answers a peer: with `T`, or that it is refused.
pub type Answer<T> = oneshot::Sender<std::result::Result<T, Refusal>>;

/// The verdict on a sender that is not refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Known and in order: its messages are taken and answered at once.
    Admitted,
    /// Not known here, or not yet: the node itself says whether it takes the messages.
    AskTheNode,
}

/// The node's verdict on a sender before its body is read, from a shared copy of what it knows.
pub trait Gate: Send + Sync {
    /// This member's own header to `to`, for requests and answers; 0 in a greeting.
    fn header(&self, to: NodeId) -> PeerHeader;

    /// Judges who sent a request, whatever its kind. Cluster 0 and receiver 0 stand in greetings
    /// only: elsewhere they were answered 400 before.
    ///
    /// # Errors
    /// The refusal that the sender is answered.
    fn admit(&self, header: &PeerHeader) -> std::result::Result<Admission, Refusal>;
}

/// Where the files of snapshots come from and go to. All of it blocks.
pub trait SnapshotFiles: Send + Sync {
    /// Opens the snapshot at `index` and `term` for sending: its length in bytes, and the bytes.
    ///
    /// # Errors
    /// If it cannot be opened; it is reported as not arrived.
    fn open(&self, index: Index, term: Term) -> Result<(u64, Box<dyn Read + Send>)>;

    /// Begins the file of a snapshot that arrives, to be checked against `file`.
    ///
    /// # Errors
    /// If this member's own disk failed: it has to stop.
    fn receive(
        &self,
        index: Index,
        term: Term,
        file: SnapshotFile,
    ) -> Result<Box<dyn SnapshotSink>>;
}

/// The file of a snapshot that arrives. Dropping it unfinished removes it.
pub trait SnapshotSink: Send {
    /// Appends `bytes`.
    ///
    /// # Errors
    /// If this member's own disk failed: it has to stop.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;

    /// Checks the file and makes it durable; `Ok(Err(…))` says what is wrong with the bytes.
    ///
    /// # Errors
    /// If this member's own disk failed: it has to stop.
    fn finish(self: Box<Self>) -> Result<std::result::Result<(), String>>;
}

/// How a [`Transport`] behaves.
#[derive(Clone, Debug)]
pub struct TransportConfig {
    /// A batch is connected for and answered within half of it, and backoff is at most half of it:
    /// a healed partition must not wait for TCP.
    pub election_timeout: Duration,
    /// How long a change of members that was passed on may take.
    pub request_timeout: Duration,
    /// How long no byte of a snapshot may move before it counts as failed.
    pub snapshot_progress_timeout: Duration,
    /// How long any other body may take to arrive, beside what its length allows.
    pub body_timeout: Duration,
    /// This member's boot id.
    pub boot: u64,
    /// Where bytes and failures are counted.
    pub metrics: Metrics,
    /// What proves to each other who the members are; the same as on the peer port.
    pub tls: Option<Tls>,
}

impl TransportConfig {
    /// The defaults: 5 seconds for each of the timeouts that are not raft's.
    pub fn new(election_timeout: Duration, boot: u64) -> Self {
        Self {
            election_timeout,
            request_timeout: Duration::from_secs(5),
            snapshot_progress_timeout: SNAPSHOT_PROGRESS_TIMEOUT,
            body_timeout: BODY_TIMEOUT,
            boot,
            metrics: Metrics::default(),
            tls: None,
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
    /// Makes the outgoing requests; see [`outbound::client`] for why none is sent twice.
    client: reqwest::Client,
    /// Sends snapshots: a receiver that writes to its disk may take no bytes for longer.
    snapshot_client: reqwest::Client,
    gate: Arc<dyn Gate>,
    files: Arc<dyn SnapshotFiles>,
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
    /// The senders of these snapshots.
    receiving_from: Mutex<BTreeSet<NodeId>>,
    /// True once the transport closes: then no snapshot is received any more.
    closing: watch::Sender<bool>,
}

impl Shared {
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

/// One peer, as the raft node sees it. Dropping it lets the peer's task drain the queue and end.
struct Peer {
    url: Arc<str>,
    queue_tx: mpsc::Sender<Message>,
    /// The payload of what is queued.
    queued_bytes: Arc<AtomicU64>,
    /// Never sent on: dropping it starts the time that the queue has to drain.
    _removed_tx: oneshot::Sender<()>,
    /// True while the full queue was reported and nothing was queued since.
    overflowing: bool,
    /// True while a snapshot is on its way to this peer.
    snapshot_on_its_way: Arc<AtomicBool>,
}

/// The handle of the raft node. No method but [`close`](Self::close) waits.
///
/// It owns every task that it starts; dropping it without closing it aborts them.
pub struct Transport {
    shared: Arc<Shared>,
    runtime: Handle,
    peers: BTreeMap<NodeId, Peer>,
    /// The peers' tasks: they end by themselves.
    peer_tasks: JoinSet<()>,
    /// Snapshots, greetings and changes on their way: closing aborts them.
    errands: JoinSet<()>,
}

impl Transport {
    /// A transport without peers. `inbound_tx` takes what arrives, `report_tx` what became of what
    /// was sent; its tasks run on `runtime`.
    ///
    /// # Errors
    /// [`Error::Config`] if there can be no HTTP client.
    pub fn new(
        config: TransportConfig,
        gate: Arc<dyn Gate>,
        files: Arc<dyn SnapshotFiles>,
        inbound_tx: mpsc::Sender<Inbound>,
        report_tx: mpsc::UnboundedSender<PeerReport>,
        runtime: Handle,
        logger: Logger,
    ) -> Result<Self> {
        let client = |patience| {
            outbound::client(&config, patience)
                .map_err(|error| Error::Config(format!("cannot make the HTTP client: {error}")))
        };
        let shared = Shared {
            client: client(config.half_election_timeout())?,
            snapshot_client: client(config.snapshot_progress_timeout)?,
            config,
            gate,
            files,
            inbound_tx,
            report_tx,
            logger,
            numbers: AtomicU64::new(1),
            body_bytes: Arc::new(Semaphore::new(PEER_BODIES_BYTES as usize)),
            receiving: Arc::new(Semaphore::new(SNAPSHOTS_RECEIVED_AT_ONCE as usize)),
            receiving_from: Mutex::new(BTreeSet::new()),
            closing: watch::Sender::new(false),
        };
        Ok(Self {
            shared: Arc::new(shared),
            runtime,
            peers: BTreeMap::new(),
            peer_tasks: JoinSet::new(),
            errands: JoinSet::new(),
        })
    }

    /// What the peer port serves. Its handlers live as long as the connections that call them.
    pub fn router(&self) -> Router {
        inbound::router(self.shared.clone())
    }

    /// Sends to peer `id` at `url` from now on. The same URL again changes nothing; with another
    /// one the old queue drains to where it was meant for.
    pub fn add_peer(&mut self, id: NodeId, url: &str) {
        if self.peers.get(&id).is_some_and(|peer| *peer.url == *url) {
            return;
        }
        reap(&mut self.peer_tasks);
        let url: Arc<str> = url.into();
        let (queue_tx, queue_rx) = mpsc::channel(PEER_QUEUE_MESSAGES);
        let (removed_tx, removed_rx) = oneshot::channel();
        let queued_bytes = Arc::<AtomicU64>::default();
        let queue = outbound::Queue { queue_rx, queued_bytes: queued_bytes.clone() };
        let sender = outbound::PeerSender::new(self.shared.clone(), id, url.clone(), queue);
        self.peer_tasks.spawn_on(sender.run(removed_rx), &self.runtime);
        let peer = Peer {
            url,
            queue_tx,
            queued_bytes,
            _removed_tx: removed_tx,
            overflowing: false,
            snapshot_on_its_way: Arc::default(),
        };
        self.peers.insert(id, peer);
    }

    /// Takes no more messages for peer `id`. What is queued is sent within a second, or dropped.
    pub fn remove_peer(&mut self, id: NodeId) {
        self.peers.remove(&id);
    }

    /// Queues `message` for the peer it names. To an unknown peer it is dropped, as it is if the
    /// queue is full; then the peer is reported as unreachable.
    ///
    /// # Panics
    /// If it is a `MsgSnapshot`: [`send_snapshot`](Self::send_snapshot) takes these.
    pub fn send(&mut self, message: Message) {
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
        if !peer.overflowing {
            // Once is enough: raft stops streaming to this peer until it answers.
            peer.overflowing = true;
            self.shared.report(PeerReport::Unreachable(to));
        }
    }

    /// Sends a `MsgSnapshot` and the file it stands for; `file` is what the receiver checks. One at
    /// a time per peer. Its end is always reported as a [`PeerReport::SnapshotStatus`].
    pub fn send_snapshot(&mut self, message: Message, file: SnapshotFile) {
        reap(&mut self.errands);
        let metadata = message.get_snapshot().get_metadata();
        let (to, index, term) = (message.to, metadata.index, metadata.term);
        let peer = self.peers.get(&to);
        let Some(peer) = peer.filter(|peer| !peer.snapshot_on_its_way.swap(true, Ordering::AcqRel))
        else {
            debug!(self.shared.logger, "snapshot at index {} to peer {} was not begun", index, to);
            self.shared.report(PeerReport::SnapshotStatus { to, index, arrived: false });
            return;
        };
        let on_its_way = peer.snapshot_on_its_way.clone();
        let guard = outbound::SnapshotGuard::new(self.shared.clone(), to, index, on_its_way);
        let (chunk_tx, body) = outbound::snapshot_body(&message, file.length);
        let shared = self.shared.clone();
        let read = move || outbound::read_file(&shared, index, term, file.length, &chunk_tx);
        self.errands.spawn_blocking_on(read, &self.runtime);
        let send =
            outbound::send_snapshot(self.shared.clone(), peer.url.clone(), file, body, guard);
        self.errands.spawn_on(send, &self.runtime);
    }

    /// Sends a greeting to whoever listens at `url`. It is answered by one [`PeerReport`]:
    /// `Greeted`, `Refused` or `NotGreeted`.
    pub fn greet(&mut self, url: &str, greeting: Greeting) {
        reap(&mut self.errands);
        let greet = outbound::greet(self.shared.clone(), url.to_owned(), greeting);
        self.errands.spawn_on(greet, &self.runtime);
    }

    /// Passes a client's change of members on to the leader `to`, once, and hands its answer to
    /// `responder`. What cannot have reached `to` is [`RequestError::Unavailable`]; what may have is
    /// [`RequestError::Unknown`].
    pub fn pass_on(&mut self, to: NodeId, change: MemberRequest, responder: Responder<()>) {
        reap(&mut self.errands);
        let Some(peer) = self.peers.get(&to) else {
            let why = format!("member {to} leads, but its URL is not known here yet");
            responder.answer(Err(RequestError::unavailable(why)));
            return;
        };
        let pass_on =
            outbound::pass_on(self.shared.clone(), to, peer.url.clone(), change, responder);
        self.errands.spawn_on(pass_on, &self.runtime);
    }

    /// Asks member `to` for its status; an answer is one [`PeerReport::Status`], none is none.
    pub fn ask_status(&mut self, to: NodeId) {
        reap(&mut self.errands);
        let Some(peer) = self.peers.get(&to) else { return };
        let ask = outbound::ask_status(self.shared.clone(), to, peer.url.clone());
        self.errands.spawn_on(ask, &self.runtime);
    }

    /// Ends every task and waits for it. Queues drain for a second at most; snapshots, both ways,
    /// are broken off. Handlers of the router that still run are answered as they can be.
    pub async fn close(mut self) {
        self.shared.closing.send_replace(true);
        self.peers.clear();
        self.errands.abort_all();
        while let Some(end) = self.errands.join_next().await {
            resume_panic(end);
        }
        while let Some(end) = self.peer_tasks.join_next().await {
            resume_panic(end);
        }
        // A thread that writes a snapshot holds a permit. With all of them taken for good, there is
        // no such thread and there will be none.
        if let Ok(permits) = self.shared.receiving.acquire_many(SNAPSHOTS_RECEIVED_AT_ONCE).await {
            permits.forget();
        }
    }
}

/// What a message holds of the log, or for it, in bytes.
fn payload_bytes(message: &Message) -> u64 {
    let entries = message.entries.iter();
    entries.map(|entry| (entry.data.len() + entry.context.len()) as u64).sum()
}

/// Takes the tasks that ended out of `tasks`.
fn reap(tasks: &mut JoinSet<()>) {
    while let Some(end) = tasks.try_join_next() {
        resume_panic(end);
    }
}

/// A panic anywhere ends the process. That a task was aborted is a normal event.
fn resume_panic(end: std::result::Result<(), JoinError>) {
    if let Err(error) = end
        && error.is_panic()
    {
        std::panic::resume_unwind(error.into_panic());
    }
}
