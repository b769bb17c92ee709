//! The task that owns the node and feeds it: the twin of the original's serveChannels and serveRaft.
//!
//! It waits on all channels at once, takes its share of what has arrived, then lets the node act on it.
//! This module decides only where the node runs, because fdatasync blocks:
//!
//! | | the node runs on | the frame is written by |
//! |---|---|---|
//! | reads, and the heartbeats that confirm them | an async worker | |
//! | one entry at a time | an async worker | the [`WriteThread`] |
//! | more | the [`DiskThread`] | the node |
//! | a sync takes a millisecond or longer | the [`DiskThread`] | the [`WriteThread`] |
//!
//! Each change of the thread costs two wake-ups, and so does each frame of the write thread. That is why the
//! node stays where it is as long as it can. On a worker, a turn says whether it [needs the
//! disk](Turn::NeedsDisk). On its thread, the node stays until the next read or the next small frame. While a
//! frame is under way, the node takes in acknowledgements, and answers heartbeats and reads.

#[cfg(test)]
mod tests;
mod threads;

use std::sync::Arc;
use std::time::Duration;

use hyper_util::service::TowerToHyperService;
use raft::eraftpb::{Message, MessageType};
use slog::{Logger, error, info};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use self::threads::{DiskThread, WriteThread};
use super::replay::replay_wal;
use super::{Input, NodeConfig, RaftNode, Status, Turn};
use crate::channels::{Commit, ConfChangeRequest, PeerReport, Proposal, ReadRequest};
use crate::error::{Error, Result};
use crate::membership::is_https;
use crate::ports::listener::{self, Limits, OUTGOING_CONNECTIONS, PEER_CONNECTIONS_MAX, Port};
use crate::storage::Vfs;
use crate::transport::{
    ClusterWatch, Inbound, InboundBody, OUTGOING_CONNECTIONS_MAX, Transport, TransportConfig,
};

// The ports leave the transport its descriptors.
const _: () = assert!(OUTGOING_CONNECTIONS_MAX <= OUTGOING_CONNECTIONS);

/// The most inputs of a turn: ticks and heartbeats must not wait for long.
const TURN_INPUTS_MAX: usize = 1024;
/// A turn stops taking inputs after this many bytes, for the same reason: they are one write.
const TURN_BYTES_MAX: usize = 4 << 20;
/// Requests of peers that wait for the node. One more is refused, and raft repeats what it needs.
const INBOUND_MAX: usize = 1024;
/// The shortest time that a peer has for its first request's head; else it is an election timeout.
const FIRST_HEAD_TIMEOUT_MIN: Duration = Duration::from_secs(1);
/// How long a commit notice waits for an append that replaces it.
const NOTICE_DELAY: Duration = Duration::from_millis(2);
/// How long messages to peers may take to leave when the node stops.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the state machine may apply what the node left in commitC when it stopped.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a snapshot that is being made may take when the node stops.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(3);

/// A running node.
pub struct RaftNodeHandle {
    /// The node's status at any moment.
    pub status: watch::Receiver<Status>,
    /// Asks the other members for their statuses while a client watches.
    pub cluster: Arc<ClusterWatch>,
    /// errorC: the node's end.
    done_rx: oneshot::Receiver<Result<()>>,
    /// The task that follows commitC, if the node was started with its state machine.
    pub(super) machine: Option<JoinHandle<Result<()>>>,
}

impl RaftNodeHandle {
    /// Waits for the node's end: because proposeC was closed, or by the error that is returned. A state
    /// machine that failed is not waited for, nor is one that has not applied the rest of commitC a
    /// second later.
    pub async fn join(self) -> Result<()> {
        // An error of `.await` is a panic; its message is on standard error.
        let panicked = |what: &str| Err(Error::Refused(format!("the {what} panicked")));
        let node = async { self.done_rx.await.unwrap_or_else(|_| panicked("raft node")) };
        let Some(machine) = self.machine else { return node.await };
        let machine = async { machine.await.unwrap_or_else(|_| panicked("state machine")) };
        tokio::pin!(node, machine);
        tokio::select! {
            biased;
            // It ends without an error only after the node has closed commitC.
            machine = &mut machine => match machine {
                Ok(()) => node.await,
                failed => failed,
            },
            node = &mut node => match tokio::time::timeout(DRAIN_TIMEOUT, machine).await {
                // If the state machine failed, the node stopped because of that.
                Ok(machine) => machine.and(node),
                Err(_) => node,
            },
        }
    }
}

/// Starts a node. It replays its directory, listens for its peers on `port` (a listener, with or without
/// TLS), and stops when all senders of `propose_rx` are gone.
///
/// Returns commitC and a handle. Must be called within a tokio runtime.
pub fn new_raft_node(
    config: NodeConfig,
    vfs: Arc<dyn Vfs>,
    port: impl Into<Port>,
    propose_rx: mpsc::Receiver<Proposal>,
    read_rx: mpsc::Receiver<ReadRequest>,
    conf_change_rx: mpsc::Receiver<ConfChangeRequest>,
    logger: Logger,
) -> (mpsc::UnboundedReceiver<Commit>, RaftNodeHandle) {
    let (commit_tx, commit_rx) = mpsc::unbounded_channel();
    let (done_tx, done_rx) = oneshot::channel();
    let (status_tx, status) = watch::channel(Status::default());
    let cluster = Arc::<ClusterWatch>::default();
    let port = port.into();
    let election_timeout = config.tick * config.election_ticks as u32;
    let transport_config = TransportConfig {
        request_timeout: config.request_timeout,
        metrics: config.metrics.clone(),
        tls: port.tls.clone(),
        status: status.clone(),
        cluster: cluster.clone(),
        ..TransportConfig::new(election_timeout, config.boot)
    };
    let node_logger = logger.clone();
    let start = move || {
        let (tick, logger) = (config.tick, node_logger);
        if is_https(&config.url) != transport_config.tls.is_some() {
            let url = &config.url;
            let why = format!("the peer URL {url} and the certificates do not go together");
            return Err(Error::Config(why));
        }
        let replayed = replay_wal(&config, vfs, &logger)?;
        let (inbound_tx, inbound_rx) = mpsc::channel(INBOUND_MAX);
        let (report_tx, report_rx) = mpsc::unbounded_channel();
        let transport = Transport::new(
            transport_config,
            replayed.admission.clone(),
            replayed.snapshotter.clone(),
            inbound_tx,
            report_tx.clone(),
            Handle::current(),
            logger.clone(),
        )?;
        let report = Arc::new(move |report| {
            // A closed queue means that the node has stopped.
            let _ = report_tx.send(report);
        });
        let (router, ended) = (transport.router(), transport.ended());
        let (outbox, commits) = (Box::new(transport), commit_tx.clone());
        let mut node = RaftNode::new(config, replayed, outbox, commits, report, status_tx, logger)?;
        // What beginning or replaying made necessary.
        node.handle_ready()?;
        let (wake_tx, written_rx) = mpsc::unbounded_channel();
        node.set_background(Box::new(WriteThread::new(wake_tx)));
        node.hold_notices();
        let inputs = Inputs {
            propose_rx,
            read_rx,
            conf_change_rx,
            inbound_rx,
            report_rx,
            written_rx,
            last: 0,
        };
        let next_tick = Instant::now() + tick;
        let notices = None;
        let serving = Serving { node, inputs, commit_tx, tick, next_tick, notices };
        Ok((Box::new(serving), router, ended))
    };
    tokio::spawn(async move {
        let result = run(start, port, election_timeout, logger.clone()).await;
        match &result {
            Ok(()) => info!(logger, "the raft node stopped"),
            Err(Error::Removed) => info!(logger, "{}", Error::Removed),
            Err(error) => error!(logger, "the raft node stops: {}", error),
        }
        let _ = done_tx.send(result);
    });
    (commit_rx, RaftNodeHandle { status, cluster, done_rx, machine: None })
}

/// Runs a node from its `start`, which blocks, to its end. With the node come what the peer port serves
/// and a future that resolves after the node, which owns the transport, was dropped.
async fn run<E: Future<Output = ()> + Send + 'static>(
    start: impl FnOnce() -> Result<(Box<Serving>, axum::Router, E)> + Send + 'static,
    port: Port,
    first_head_timeout: Duration,
    logger: Logger,
) -> Result<()> {
    let first_head_timeout = first_head_timeout.max(FIRST_HEAD_TIMEOUT_MIN);
    let thread = DiskThread::new();
    let (serving, router, transport_ended) = thread.run(start).await?;
    let (stop_tx, stop_rx) = oneshot::channel::<()>();
    let server = tokio::spawn(listener::serve(
        port,
        TowerToHyperService::new(router),
        Limits { connections: PEER_CONNECTIONS_MAX, first_head_timeout, ..Limits::default() }
            .affordable(),
        async {
            let _ = stop_rx.await;
        },
        logger,
    ));
    let (mut serving, result) = serve_channels(serving, &thread).await;
    let end = move || {
        result?;
        Handle::current().block_on(serving.finish_snapshot())?;
        // Dropping the node answers the remaining responders, and closes commitC and the transport.
        serving.node.stop()
    };
    let result = thread.run(end).await;
    drop(stop_tx);
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, transport_ended).await;
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, server).await;
    result
}

struct Inputs {
    propose_rx: mpsc::Receiver<Proposal>,
    read_rx: mpsc::Receiver<ReadRequest>,
    conf_change_rx: mpsc::Receiver<ConfChangeRequest>,
    inbound_rx: mpsc::Receiver<Inbound>,
    report_rx: mpsc::UnboundedReceiver<PeerReport>,
    /// A frame was written in the background.
    written_rx: mpsc::UnboundedReceiver<()>,
    /// Which of them the last input came from.
    last: usize,
}

impl Inputs {
    /// The next input that has arrived, taking turns among the queues.
    fn try_next(&mut self, takes_writes: bool) -> Option<Input> {
        const QUEUES: usize = 6;
        (0..QUEUES).find_map(|_| {
            self.last = (self.last + 1) % QUEUES;
            match self.last {
                0 => self.report_rx.try_recv().ok().map(Input::Report),
                1 => self.inbound_rx.try_recv().ok().map(Input::Inbound),
                2 => self.conf_change_rx.try_recv().ok().map(Input::ConfChange),
                3 => self.read_rx.try_recv().ok().map(Input::Read),
                4 => self.written_rx.try_recv().ok().map(|()| Input::Written),
                _ if takes_writes => self.propose_rx.try_recv().ok().map(Input::Propose),
                _ => None,
            }
        })
    }
}

/// True for an input whose handling writes nothing. What follows from it may have to.
fn needs_no_disk(input: &Input) -> bool {
    match input {
        Input::Read(_) | Input::Propose(_) | Input::Written | Input::NoticesDue => true,
        Input::Inbound(inbound) => {
            matches!(inbound.body, InboundBody::Messages { answer: None, .. })
        }
        _ => false,
    }
}

/// True for a read, and for the messages of a known member that carry reads and confirm them.
fn is_read(input: &Input) -> bool {
    use MessageType::*;
    let is_of_read = |message: &Message| {
        matches!(
            message.get_msg_type(),
            MsgReadIndex | MsgReadIndexResp | MsgHeartbeat | MsgHeartbeatResponse
        )
    };
    match input {
        Input::Read(_) => true,
        Input::Inbound(inbound) => match &inbound.body {
            InboundBody::Messages { messages, answer: None, .. } => messages.iter().all(is_of_read),
            _ => false,
        },
        _ => false,
    }
}

/// The node and its inputs: what moves between the task and the threads that may block.
struct Serving {
    node: RaftNode,
    inputs: Inputs,
    commit_tx: mpsc::UnboundedSender<Commit>,
    tick: Duration,
    next_tick: Instant,
    /// The number of the commit notices that are held back, and when to send them.
    notices: Option<(u64, Instant)>,
}

/// Feeds the node until proposeC is closed or the state machine is gone.
async fn serve_channels(
    mut serving: Box<Serving>,
    thread: &DiskThread,
) -> (Box<Serving>, Result<()>) {
    let mut result = Ok(serving.next_input().await);
    while let Ok(Some(first)) = result {
        if Instant::now() < serving.next_tick {
            // Tasks that are ready to send get to do so, and what they send is part of this turn. The
            // second yield is for those that the first one woke.
            tokio::task::yield_now().await;
            tokio::task::yield_now().await;
        }
        result = match serving.turn_on_worker(first) {
            Ok((Turn::Done, _)) => Ok(serving.next_input().await),
            Ok((Turn::NeedsDisk, input)) => {
                let turns = thread.run(move || {
                    let result = serving.turns_on_thread(input);
                    (serving, result)
                });
                (serving, result) = turns.await;
                result
            }
            Err(error) => Err(error),
        };
    }
    (serving, result.map(|_| ()))
}

impl Serving {
    /// Waits for an input; `None` once there will be no more.
    async fn next_input(&mut self) -> Option<Input> {
        if self.is_over() {
            return None;
        }
        let takes_writes = self.node.takes_writes();
        let Self { node, inputs, commit_tx, next_tick, notices, .. } = self;
        let (until, then) = match notices {
            Some((_, due)) if due < next_tick => (*due, Input::NoticesDue),
            _ => (*next_tick, Input::Tick),
        };
        tokio::select! {
            biased;
            Some(()) = inputs.written_rx.recv() => Some(Input::Written),
            Some(report) = inputs.report_rx.recv() => Some(Input::Report(report)),
            Some(inbound) = inputs.inbound_rx.recv() => Some(Input::Inbound(inbound)),
            Some(request) = inputs.conf_change_rx.recv() => Some(Input::ConfChange(request)),
            // A read that has to wait for the round under way does not wake the node: the answer to
            // that round does.
            Some(request) = inputs.read_rx.recv(), if !node.is_reading() => {
                Some(Input::Read(request))
            }
            proposal = inputs.propose_rx.recv(), if takes_writes => proposal.map(Input::Propose),
            () = tokio::time::sleep_until(until) => Some(then),
            () = commit_tx.closed() => None,
        }
    }

    /// True once the node has to stop. Checked in each turn, because peers may send without a pause.
    fn is_over(&self) -> bool {
        let proposals = &self.inputs.propose_rx;
        proposals.is_closed() && proposals.is_empty() || self.commit_tx.is_closed()
    }

    /// The next input that has arrived. Whether writes are taken may change within a turn, at the end of a frame.
    fn next_queued(&mut self) -> Option<Input> {
        self.inputs.try_next(self.node.takes_writes())
    }

    /// A turn on an async worker. What is left for a thread that may block is the first input that needs it,
    /// or what the inputs led to.
    fn turn_on_worker(&mut self, first: Input) -> Result<(Turn, Option<Input>)> {
        let (mut bytes, mut first) = (0, Some(first));
        for _ in 0..TURN_INPUTS_MAX {
            let Some(input) = first.take().or_else(|| self.next_queued()) else { break };
            if !needs_no_disk(&input) {
                return Ok((Turn::NeedsDisk, Some(input)));
            }
            bytes += input.bytes();
            self.node.handle(input)?;
            if bytes >= TURN_BYTES_MAX {
                break;
            }
        }
        let is_tick_due = Instant::now() >= self.next_tick;
        let turn =
            if is_tick_due { Turn::NeedsDisk } else { self.node.handle_ready_without_disk()? };
        self.time_notices()?;
        Ok((turn, None))
    }

    /// Turns on a thread that may block, until the next input is for a worker: that one is returned.
    fn turns_on_thread(&mut self, mut input: Option<Input>) -> Result<Option<Input>> {
        let runtime = Handle::current();
        loop {
            // As in `serve_channels`.
            std::thread::yield_now();
            self.turn(input)?;
            input = match runtime.block_on(self.next_input()) {
                Some(input) if self.node.is_writing() => Some(input),
                Some(input) if !is_read(&input) && !self.node.writes_little() => Some(input),
                next => return Ok(next),
            };
        }
    }

    /// Takes a turn's share of what is queued, after `first`.
    fn turn(&mut self, mut first: Option<Input>) -> Result<()> {
        let mut bytes = 0;
        for _ in 0..TURN_INPUTS_MAX {
            let Some(input) = first.take().or_else(|| self.next_queued()) else { break };
            bytes += input.bytes();
            // A tick that is due is handled below.
            if !matches!(input, Input::Tick) {
                self.node.handle(input)?;
            }
            if bytes >= TURN_BYTES_MAX {
                break;
            }
        }
        // Inputs come before ticks, and missed ticks are skipped. A member that was paused takes in what
        // its leader sent meanwhile, instead of starting an election.
        let now = Instant::now();
        if now >= self.next_tick {
            self.node.handle(Input::Tick)?;
            self.next_tick += self.tick;
            if self.next_tick <= now {
                self.next_tick = now + self.tick;
            }
        }
        self.node.handle_ready()?;
        self.time_notices()
    }

    /// Sends the commit notices that were held back long enough. Checked in each turn, because the next input
    /// may be there before the timer.
    fn time_notices(&mut self) -> Result<()> {
        let now = Instant::now();
        let held = self.node.held_notices();
        match self.notices {
            Some((noted, due)) if held == Some(noted) && now >= due => {
                self.notices = None;
                self.node.handle(Input::NoticesDue)
            }
            Some((noted, _)) if held == Some(noted) => Ok(()),
            _ => {
                self.notices = held.map(|held| (held, now + NOTICE_DELAY));
                Ok(())
            }
        }
    }

    /// Waits for the snapshot that is being made: its maker is the last user of the directory, and the
    /// next process may need it.
    async fn finish_snapshot(&mut self) -> Result<()> {
        let finished = async {
            while self.node.snapshots.is_making() && !self.commit_tx.is_closed() {
                let Some(report) = self.inputs.report_rx.recv().await else { break };
                self.node.handle(Input::Report(report))?;
            }
            Ok(())
        };
        // A disk that is slower than that does not hold up the end of the process.
        tokio::time::timeout(SNAPSHOT_TIMEOUT, finished).await.unwrap_or(Ok(()))
    }
}
