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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channels::{
        Ack, Greeting, MemberRequest, NodeId, PeerHeader, Responder, SnapshotFile,
    };
    use crate::storage::DiskVfs;
    use crate::transport::Outbox;

    /// Takes everything, sends nothing.
    struct Nowhere;

    impl Outbox for Nowhere {
        fn send(&mut self, _: Message) {}
        fn send_snapshot(&mut self, _: Message, _: SnapshotFile) {}
        fn add_peer(&mut self, _: NodeId, _: &str, _: u64) {}
        fn remove_peer(&mut self, _: NodeId) {}
        fn greet(&mut self, _: &str, _: Greeting) {}
        fn forward_change(&mut self, _: NodeId, _: MemberRequest, _: Responder<()>) {}
    }

    /// A greeting of member 9, and whether it was looked at.
    fn greeting(to: &PeerHeader) -> (Inbound, oneshot::Receiver<impl Sized + use<>>) {
        let header = PeerHeader {
            from: 9,
            incarnation: 9,
            url: "http://127.0.0.1:9029".into(),
            to: to.from,
            ..to.clone()
        };
        let greeting = Greeting { first_urls: Vec::new(), begun: false };
        let (answer, answer_rx) = oneshot::channel();
        (Inbound::new(header, InboundBody::Greeting(greeting, answer)), answer_rx)
    }

    /// A node alone in its cluster, with room for `room` reads and requests of peers, and the other
    /// ends of what it is fed from.
    fn serving(room: usize) -> (Box<Serving>, Ends) {
        let dir = tempfile::tempdir().expect("a directory");
        let config = NodeConfig { data_dir: dir.path().into(), ..NodeConfig::default() };
        let logger = Logger::root(slog::Discard, slog::o!());
        let replayed = replay_wal(&config, Arc::new(DiskVfs), &logger).expect("an empty directory");
        let header = replayed.admission.header(1, 0);
        let (commit_tx, commit_rx) = mpsc::unbounded_channel();
        let (report_tx, report_rx) = mpsc::unbounded_channel();
        let report = Arc::new(move |report| {
            let _ = report_tx.send(report);
        });
        let tick = config.tick;
        let status_tx = watch::channel(Status::default()).0;
        let outbox = Box::new(Nowhere);
        let mut node =
            RaftNode::new(config, replayed, outbox, commit_tx.clone(), report, status_tx, logger)
                .expect("a node");
        let next_tick = Instant::now() + tick;
        let (propose_tx, propose_rx) = mpsc::channel(1);
        let (read_tx, read_rx) = mpsc::channel(room);
        let (conf_change_tx, conf_change_rx) = mpsc::channel(1);
        let (inbound_tx, inbound_rx) = mpsc::channel(room);
        let (wake_tx, written_rx) = mpsc::unbounded_channel();
        node.set_background(Box::new(WriteThread::new(wake_tx)));
        let inputs = Inputs {
            propose_rx,
            read_rx,
            conf_change_rx,
            inbound_rx,
            report_rx,
            written_rx,
            last: 0,
        };
        let ends = Ends {
            propose_tx,
            read_tx,
            _conf_change_tx: conf_change_tx,
            inbound_tx,
            commit_rx,
            header,
        };
        (Box::new(Serving { node, inputs, commit_tx, tick, next_tick, notices: None }), ends)
    }

    struct Ends {
        propose_tx: mpsc::Sender<Proposal>,
        read_tx: mpsc::Sender<ReadRequest>,
        _conf_change_tx: mpsc::Sender<ConfChangeRequest>,
        inbound_tx: mpsc::Sender<Inbound>,
        commit_rx: mpsc::UnboundedReceiver<Commit>,
        header: PeerHeader,
    }

    /// Runs a node whose peers have `waiting` greetings for it; returns how many it looked at.
    async fn looked_at(
        waiting: usize,
        close: impl FnOnce(Ends) -> Box<dyn std::any::Any>,
    ) -> usize {
        let (serving, ends) = serving(waiting);
        let mut answers = Vec::new();
        for _ in 0..waiting {
            let (inbound, answer_rx) = greeting(&ends.header);
            assert!(ends.inbound_tx.try_send(inbound).is_ok(), "there is room");
            answers.push(answer_rx);
        }
        let _open = close(ends);
        serve_channels(serving, &DiskThread::new()).await.1.expect("it was told to stop");
        answers.iter_mut().filter_map(|answer_rx| answer_rx.try_recv().ok()).count()
    }

    fn handle_of(
        node: impl Future<Output = Result<()>> + Send + 'static,
        machine: impl Future<Output = Result<()>> + Send + 'static,
    ) -> RaftNodeHandle {
        let (done_tx, done_rx) = oneshot::channel();
        tokio::spawn(async move {
            let _ = done_tx.send(node.await);
        });
        let status = watch::channel(Status::default()).1;
        let machine = Some(tokio::spawn(machine));
        RaftNodeHandle { status, cluster: Arc::default(), done_rx, machine }
    }

    /// A disk that hangs must not hide why the process has to end.
    #[tokio::test]
    async fn a_failed_state_machine_does_not_wait_for_the_node() {
        let failed = async { Err(Error::Refused("it failed".into())) };
        let joined = handle_of(std::future::pending(), failed).join().await;
        assert!(joined.is_err_and(|error| error.to_string().contains("it failed")));
    }

    #[tokio::test]
    async fn a_state_machine_that_hangs_does_not_hold_up_the_end() {
        let begun = Instant::now();
        let joined = handle_of(async { Err(Error::Removed) }, std::future::pending()).join().await;
        assert!(matches!(joined, Err(Error::Removed)));
        assert!(begun.elapsed() >= DRAIN_TIMEOUT, "it may have had something to apply");
    }

    /// Peers that always have something to say must not keep a node from stopping: so it stops with
    /// most of that unread.
    #[tokio::test]
    async fn a_node_stops_with_its_channels_however_busy_its_peers_are() {
        const WAITING: usize = 5 * TURN_INPUTS_MAX;
        let count = looked_at(WAITING, |ends| Box::new((ends.commit_rx, ends.inbound_tx))).await;
        assert!(count <= 2 * TURN_INPUTS_MAX, "proposeC is closed: it looked at {count}");
        let count = looked_at(WAITING, |ends| Box::new((ends.propose_tx, ends.inbound_tx))).await;
        assert!(count <= 2 * TURN_INPUTS_MAX, "commitC is closed: it looked at {count}");
    }

    /// However many there are in a turn, and whoever comes behind them.
    #[tokio::test]
    async fn a_turn_takes_no_input_that_it_does_not_handle() {
        const BEHIND: usize = 5;
        let (mut serving, ends) = serving(TURN_INPUTS_MAX + BEHIND);
        let mut reads = Vec::new();
        for _ in 0..TURN_INPUTS_MAX + BEHIND {
            let (responder, pending) = crate::channels::responder();
            assert!(ends.read_tx.try_send(ReadRequest { responder }).is_ok(), "there is room");
            reads.push(pending);
        }
        let first = serving.inputs.try_next(true).expect("a read");
        let _ = serving.turn_on_worker(first).expect("handled");
        assert_eq!(serving.inputs.read_rx.len(), BEHIND);
        assert!(reads.iter_mut().all(|pending| pending.try_take().is_none()));
        let first = serving.inputs.try_next(true).expect("a read");
        serving.turn(Some(first)).expect("handled");
        assert!(reads.iter_mut().all(|pending| pending.try_take().is_none()));
    }

    /// raft-rs may add entries to an append that follows on another one.
    #[tokio::test]
    async fn an_append_names_the_entry_before_its_first() {
        let (mut serving, _ends) = serving(1);
        while !serving.node.raft().promotable() {
            serving.node.handle_ready().expect("a node alone starts");
        }
        serving.node.handle(Input::Tick).expect("it leads");
        serving.node.handle_ready().expect("its first entry is written");
        let raft = serving.node.raft();
        let last = raft.raft_log.last_index();
        let entry = raft::eraftpb::Entry { index: last, term: raft.term, ..Default::default() };
        let mut append =
            Message { term: raft.term, entries: vec![entry].into(), ..Default::default() };
        let mut late = Message { term: raft.term - 1, ..append.clone() };
        crate::raft_node::mend_append(&mut append, raft);
        let before = raft.raft_log.term(last - 1).expect("it is in the log");
        assert_eq!((append.index, append.log_term, append.entries.len()), (last - 1, before, 1));
        crate::raft_node::mend_append(&mut late, raft);
        assert!(late.entries.is_empty(), "it leads no more in that term");
    }

    /// fdatasync would hold up all requests that the worker serves.
    #[tokio::test]
    async fn a_turn_of_reads_leaves_writes_to_a_thread() {
        let (mut serving, ends) = serving(1);
        let (responder, _answer) = crate::channels::responder();
        let proposal = Proposal { data: b"data"[..].into(), ack: Ack::Committed, responder };
        while !serving.node.raft().promotable() {
            serving.node.handle_ready().expect("a node alone starts");
        }
        serving.node.handle(Input::Tick).expect("it leads");
        serving.node.handle_ready().expect("its first entry is written");
        serving.node.handle(Input::Propose(proposal)).expect("taken");
        let (responder, _pending) = crate::channels::responder();
        assert!(ends.read_tx.try_send(ReadRequest { responder }).is_ok(), "there is room");
        let first = serving.inputs.try_next(true).expect("a read");
        let last = serving.node.raft().raft_log.persisted;
        let left = serving.turn_on_worker(first).expect("handled");
        assert!(matches!(left, (Turn::NeedsDisk, None)), "the write waits for a turn on a thread");
        assert!(serving.node.needs_disk());
        assert_eq!(serving.node.raft().raft_log.persisted, last, "nothing was written");
        serving.turn(None).expect("handled");
        assert!(serving.node.raft().raft_log.persisted > last);
    }

    /// A name server that does not answer takes the runtime's threads.
    #[test]
    fn the_disk_waits_for_no_blocking_thread_of_the_runtime() {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_time().max_blocking_threads(1).build().expect("a runtime");
        let (free_tx, free_rx) = std::sync::mpsc::channel::<()>();
        let done = runtime.block_on(async {
            tokio::task::spawn_blocking(move || free_rx.recv());
            let thread = DiskThread::new();
            tokio::time::timeout(Duration::from_secs(20), thread.run(|| 7)).await
        });
        // Before it can fail: the runtime waits for its threads.
        drop(free_tx);
        assert_eq!(done, Ok(7));
    }
}
