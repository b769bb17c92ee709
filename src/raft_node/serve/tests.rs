//! The task that owns the node, with a node alone in its cluster.

use super::*;
use crate::channels::{Ack, Greeting, MemberRequest, NodeId, PeerHeader, Responder, SnapshotFile};
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
    let inputs =
        Inputs { propose_rx, read_rx, conf_change_rx, inbound_rx, report_rx, written_rx, last: 0 };
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
async fn looked_at(waiting: usize, close: impl FnOnce(Ends) -> Box<dyn std::any::Any>) -> usize {
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
    let mut append = Message { term: raft.term, entries: vec![entry].into(), ..Default::default() };
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
