//! One member: a node, its store and its disk, driven turn by turn.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Debug;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, LazyLock, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use raft::eraftpb::{Entry, Message};
use raftexample::channels::{
    Ack, Acknowledged, Commit, ConfChangeRequest, MemberRequest, NodeId, PeerHeader, PeerReport,
    Pending, Proposal, ReadRequest, Requests, SnapshotRequest, responder,
};
use raftexample::error::{RequestError, Result};
use raftexample::kvstore::{Keys, KvStore};
use raftexample::membership::Admission;
use raftexample::raft_node::replay::{replay_wal, wal_dir};
use raftexample::raft_node::state_machine::CommitReader;
use raftexample::raft_node::{Input, NodeConfig, RaftNode, Status};
use raftexample::storage::snapshotter::Snapshotter;
use raftexample::storage::wal::{Recovered, Wal};
use raftexample::transport::{Inbound, InboundBody};
use tokio::sync::{mpsc, watch};

use super::disk::{MemVfs, Survives};
use super::late::LateWrites;
use super::outbox::{ListOutbox, Sent};
use super::state::{State, decode_state, put};
use super::transcript::{CommitTap, Transcript, logger};
use crate::support::config::{DATA, closed};

type RequestResult<T> = std::result::Result<T, RequestError>;

/// A client's side of one request.
pub struct Answer<T> {
    request: Arc<Mutex<Request<T>>>,
    answer: Option<RequestResult<T>>,
}

struct Request<T> {
    pending: Pin<Box<dyn Future<Output = RequestResult<T>> + Send>>,
    answer: Option<RequestResult<T>>,
}

impl<T: Clone> Request<T> {
    fn poll(&mut self) -> Option<RequestResult<T>> {
        if self.answer.is_none() {
            let _clock = CLOCK.enter();
            let mut context = Context::from_waker(Waker::noop());
            if let Poll::Ready(answer) = self.pending.as_mut().poll(&mut context) {
                self.answer = Some(answer);
            }
        }
        self.answer.clone()
    }
}

/// A clock for the deadlines of responders, which are never reached.
static CLOCK: LazyLock<tokio::runtime::Runtime> =
    LazyLock::new(|| tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap());

impl<T: Clone + Debug + Send + 'static> Answer<T> {
    pub fn new(pending: Pending<T>) -> Self {
        let _clock = CLOCK.enter();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(3600);
        let request = Request { pending: Box::pin(pending.wait_until(deadline)), answer: None };
        Self { request: Arc::new(Mutex::new(request)), answer: None }
    }

    /// The answer, if there is one by now.
    pub fn get(&mut self) -> Option<&RequestResult<T>> {
        if self.answer.is_none() {
            self.answer = self.request.lock().unwrap().poll();
        }
        self.answer.as_ref()
    }

    /// Records the request, which asks member `id` for `what`, and its answer in `transcript`.
    fn recorded(self, transcript: &Transcript, id: NodeId, what: &str) -> Self {
        let request = self.request.clone();
        let describe = move || {
            Some(match request.lock().unwrap().poll()? {
                Ok(answer) => format!("{answer:?}"),
                Err(error) => {
                    // The variant without its text.
                    let debug = format!("{error:?}");
                    debug.split('(').next().unwrap_or_default().to_owned()
                }
            })
        };
        transcript.note_request(id, what, Box::new(describe));
        self
    }

    /// True if the request was answered with success.
    pub fn is_ok(&mut self) -> bool {
        matches!(self.get(), Some(Ok(_)))
    }

    /// True if the outcome is not known: 504.
    pub fn is_unknown(&mut self) -> bool {
        matches!(self.get(), Some(Err(RequestError::Unknown(_))))
    }
}

/// One member: a node, its store, its disk.
pub struct Member {
    pub id: NodeId,
    pub config: NodeConfig,
    pub disk: MemVfs,
    pub node: RaftNode,
    pub admission: Arc<Admission>,
    pub snapshotter: Snapshotter,
    pub sent: Arc<Mutex<Sent>>,
    pub logs: Arc<Mutex<Vec<String>>>,
    pub transcript: Transcript,
    /// True while requested snapshots are held back.
    pub holds_snapshots: bool,
    pub held: Vec<SnapshotRequest>,
    /// True while the state machine holds back committed entries.
    pub holds_entries: bool,
    held_entries: Vec<Commit>,
    /// Its frames under way, once [`slow_down`](Self::slow_down) was called.
    pub late: Option<LateWrites>,
    tap: Arc<Mutex<CommitTap>>,
    reader: CommitReader<Keys>,
    _store: KvStore,
    reports: Arc<Mutex<VecDeque<PeerReport>>>,
    status: watch::Receiver<Status>,
    numbers: BTreeMap<NodeId, u64>,
    pub snapshot_numbers: BTreeMap<NodeId, u64>,
}

impl Member {
    /// Starts a member on `disk`.
    pub fn start(config: &NodeConfig, disk: &MemVfs, transcript: &Transcript) -> Result<Self> {
        let id = config.id;
        disk.record(id, transcript);
        let logs = Arc::new(Mutex::new(Vec::new()));
        let logger = logger(id, transcript.clone(), logs.clone());
        let replayed = replay_wal(config, Arc::new(disk.clone()), &logger)?;
        let (admission, snapshotter) = (replayed.admission.clone(), replayed.snapshotter.clone());
        let (commit_tx, rx) = mpsc::unbounded_channel();
        let tap = Arc::new(Mutex::new(CommitTap { rx, queue: VecDeque::new() }));
        transcript.taps.lock().unwrap().insert(id, tap.clone());
        let (status_tx, status) = watch::channel(Status::default());
        let reports = Arc::new(Mutex::new(VecDeque::new()));
        let report = {
            let reports = reports.clone();
            Arc::new(move |report| reports.lock().unwrap().push_back(report))
        };
        let sent = Arc::new(Mutex::new(Sent::default()));
        let outbox =
            Box::new(ListOutbox { id, sent: sent.clone(), transcript: transcript.clone() });
        let node = RaftNode::new(
            config.clone(),
            replayed,
            outbox,
            commit_tx,
            report,
            status_tx,
            logger.clone(),
        )?;
        let (store, reader) = KvStore::new(config, closed(), logger);
        let mut member = Self {
            id,
            config: config.clone(),
            disk: disk.clone(),
            node,
            admission,
            snapshotter,
            sent,
            logs,
            transcript: transcript.clone(),
            holds_snapshots: false,
            held: Vec::new(),
            holds_entries: false,
            held_entries: Vec::new(),
            late: None,
            tap,
            reader,
            _store: store,
            reports,
            status,
            numbers: BTreeMap::new(),
            snapshot_numbers: BTreeMap::new(),
        };
        member.act()?;
        Ok(member)
    }

    /// One turn with these inputs.
    pub fn turn(&mut self, inputs: impl IntoIterator<Item = Input>) -> Result<()> {
        for input in inputs {
            self.transcript.note_input(self.id, &input);
            self.node.handle(input)?;
        }
        self.act()
    }

    /// Runs the node, then the state machine, then the node with the resulting reports.
    pub fn act(&mut self) -> Result<()> {
        loop {
            let turned = self.node.handle_ready();
            // What was published before an error is applied and answered, too.
            let followed = self.follow_commits();
            self.transcript.note_answers();
            turned.and(followed)?;
            let reports: Vec<_> = self.reports.lock().unwrap().drain(..).collect();
            if reports.is_empty() {
                return Ok(());
            }
            for report in reports {
                let input = Input::Report(report);
                self.transcript.note_input(self.id, &input);
                self.node.handle(input)?;
            }
        }
    }

    fn follow_commits(&mut self) -> Result<()> {
        self.transcript.note_commits(self.id);
        loop {
            let Some(commit) = self.tap.lock().unwrap().queue.pop_front() else { return Ok(()) };
            match commit {
                Commit::Snapshot(request) if self.holds_snapshots => self.held.push(request),
                Commit::Snapshot(request) => self.make_snapshot(request)?,
                commit @ Commit::Entries { .. } if self.holds_entries => {
                    self.held_entries.push(commit);
                }
                Commit::Entries { entries, applied } => {
                    let answered: Vec<_> = entries
                        .iter()
                        .filter(|entry| entry.responder.is_some())
                        .map(|entry| entry.index)
                        .collect();
                    self.reader.handle(Commit::Entries { entries, applied })?;
                    if !answered.is_empty() && !self.transcript.has_scenario() {
                        self.transcript.note(self.id, &format!("answer {answered:?}"));
                    }
                }
                commit => self.reader.handle(commit)?,
            }
        }
    }

    /// Makes a snapshot and waits for its thread, so that the order is fixed.
    fn make_snapshot(&mut self, request: SnapshotRequest) -> Result<()> {
        let SnapshotRequest { index, save } = request;
        let (done_tx, done_rx) = std::sync::mpsc::channel();
        self.reader.handle(Commit::Snapshot(SnapshotRequest {
            index,
            save: Box::new(move |body| {
                save(body);
                done_tx.send(()).unwrap();
            }),
        }))?;
        done_rx.recv().expect("the snapshot is made");
        Ok(())
    }

    /// Makes the snapshots held back; returns their reports.
    pub fn make_held_snapshots(&mut self) -> Vec<Input> {
        for request in std::mem::take(&mut self.held) {
            self.make_snapshot(request).unwrap();
        }
        self.reports.lock().unwrap().drain(..).map(Input::Report).collect()
    }

    /// Applies the entries held back, and holds back no more.
    pub fn apply_held_entries(&mut self) -> Result<()> {
        self.holds_entries = false;
        for commit in std::mem::take(&mut self.held_entries) {
            self.reader.handle(commit)?;
        }
        Ok(())
    }

    /// Has frames written when [`write_frame`](Self::write_frame) is called, from the one after the next on.
    pub fn slow_down(&mut self) {
        let late = LateWrites::new(|| true);
        self.node.set_background(Box::new(late.clone()));
        self.late = Some(late);
    }

    /// Writes the frame under way, and takes one turn.
    pub fn write_frame(&mut self) -> Result<()> {
        let late = self.late.as_ref().expect("the member was slowed down");
        assert!(late.has_begun(), "a frame is under way");
        late.write();
        self.turn([Input::Written])
    }

    /// The status without the fields that change with time alone.
    pub fn status(&self) -> Status {
        Status { tick: Default::default(), ..self.status.borrow().clone() }
    }

    pub fn tick(&mut self) -> Result<()> {
        self.turn([Input::Tick])
    }

    pub fn propose(&mut self, data: Vec<u8>, ack: Ack) -> (Input, Answer<Acknowledged>) {
        let (responder, pending) = responder();
        let answer = Answer::new(pending).recorded(&self.transcript, self.id, "write");
        (Input::Propose(Proposal { data: data.into(), ack, responder }), answer)
    }

    /// Proposes a PUT and takes one turn.
    pub fn put(&mut self, key: &str, value: &str) -> Result<Answer<Acknowledged>> {
        let (input, answer) = self.propose(put(key, value), Ack::Committed);
        self.turn([input]).map(|()| answer)
    }

    /// Starts a linearizable read and takes one turn.
    pub fn read(&mut self) -> Result<Answer<()>> {
        let (responder, pending) = responder();
        let answer = Answer::new(pending).recorded(&self.transcript, self.id, "read");
        self.turn([Input::Read(ReadRequest { responder })]).map(|()| answer)
    }

    /// Requests a change of members and takes one turn.
    pub fn change(&mut self, change: MemberRequest) -> Result<Answer<()>> {
        let (responder, pending) = responder();
        let what = format!("{change:?}");
        let answer = Answer::new(pending).recorded(&self.transcript, self.id, &what);
        let request = ConfChangeRequest { change, forwarded: false, responder };
        self.turn([Input::ConfChange(request)]).map(|()| answer)
    }

    /// The store's bytes, as a snapshot would hold them.
    pub fn state_bytes(&mut self) -> Vec<u8> {
        let (bytes_tx, bytes_rx) = std::sync::mpsc::channel();
        let save = Box::new(move |body: raftexample::channels::SnapshotBody<'_>| {
            let mut bytes = Vec::new();
            body(&mut bytes).unwrap();
            bytes_tx.send(bytes).unwrap();
        });
        self.reader.handle(Commit::Snapshot(SnapshotRequest { index: 0, save })).unwrap();
        bytes_rx.recv().unwrap()
    }

    /// The contents of the store.
    pub fn state(&mut self) -> State {
        decode_state(&self.state_bytes())
    }

    /// The log on disk.
    pub fn wal(&self) -> Recovered {
        Wal::read(&self.disk, &wal_dir(Path::new(DATA), self.id)).unwrap()
    }

    pub fn logged(&self, text: &str) -> bool {
        self.logs.lock().unwrap().iter().any(|line| line.contains(text))
    }

    /// Ends the run; returns the disk that the next run finds.
    pub fn crash(self, survives: Survives) -> MemVfs {
        let disk = self.disk.clone();
        drop(self);
        disk.crash(survives)
    }

    /// Ticks until the member leads. It must be a majority by itself.
    pub fn tick_until_leader(&mut self) -> Result<()> {
        for _ in 0..200 {
            if self.status().leader == self.id {
                return Ok(());
            }
            self.tick()?;
        }
        panic!("member {} does not lead: {:?}", self.id, self.status());
    }

    /// Takes the messages that wait for delivery.
    pub fn take_messages(&mut self) -> Vec<Message> {
        std::mem::take(&mut self.sent.lock().unwrap().messages)
    }

    /// A batch for member `to`, as the transport would deliver it.
    pub fn batch(&mut self, to: NodeId, messages: Vec<Message>) -> Inbound {
        let header = self.header(to);
        let number = self.numbers.entry(to).or_default();
        *number += 1;
        batch(header, self.config.boot, *number, messages)
    }

    /// The header of a message to the member `to` that its transport was told of.
    pub fn header(&self, to: NodeId) -> PeerHeader {
        let sent = self.sent.lock().unwrap();
        self.admission.header(to, sent.peers.get(&to).map_or(0, |(_, incarnation)| *incarnation))
    }
}

/// A batch of messages from the sender that `header` names.
pub fn batch(header: PeerHeader, boot: u64, number: u64, messages: Vec<Message>) -> Inbound {
    Inbound::new(header, InboundBody::Messages { boot, number, messages, answer: None })
}

/// An entry without a request id.
pub fn entry(index: u64, term: u64, data: Vec<u8>) -> Entry {
    Entry { index, term, data: data.into(), ..Entry::default() }
}
