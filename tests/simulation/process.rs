//! One run of one member: the node and the store of the binary, over the simulation's seams.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, mpsc as std_mpsc};

use crate::clients::{Output, far_future, poll_once};
use crate::support::config::closed;
use crate::support::memory::LateWrites;
use crate::support::store::Answer;
use crate::translation::answer;
use bytes::Bytes;
use raft::eraftpb::Message;
use raftexample::channels::{
    Acknowledged, Commit, CommittedEntry, Greeting, Index, MemberRequest, NodeId, PeerHeader,
    PeerReport, Pending, Proposal, Requests, Responder, SnapshotBody, SnapshotFile,
    SnapshotRequest, responder,
};
use raftexample::error::Result;
use raftexample::kvstore::{Keys, KvStore};
use raftexample::membership::Admission;
use raftexample::raft_node::replay::replay_wal;
use raftexample::raft_node::state_machine::CommitReader;
use raftexample::raft_node::{Input, NodeConfig, RaftNode, Status, Turn};
use raftexample::storage::Vfs;
use raftexample::storage::snapshotter::Snapshotter;
use raftexample::transport::Outbox;
use slog::Logger;
use tokio::sync::{mpsc, watch};

/// An output of a node to its transport.
pub enum Outgoing {
    Message(Message),
    Snapshot(Message, SnapshotFile),
    Greeting(String, Greeting),
    Change(NodeId, MemberRequest, Responder<()>),
}

/// The node's side of the transport.
#[derive(Default)]
pub struct Sent {
    pub queue: Vec<Outgoing>,
    /// The URL and the incarnation of each.
    pub peers: BTreeMap<NodeId, (String, u64)>,
}

struct ListOutbox(Arc<Mutex<Sent>>);

impl ListOutbox {
    fn push(&self, outgoing: Outgoing) {
        self.0.lock().unwrap().queue.push(outgoing);
    }
}

impl Outbox for ListOutbox {
    fn send(&mut self, message: Message) {
        self.push(Outgoing::Message(message));
    }

    fn send_snapshot(&mut self, message: Message, file: SnapshotFile) {
        self.push(Outgoing::Snapshot(message, file));
    }

    fn add_peer(&mut self, id: NodeId, url: &str, incarnation: u64) {
        self.0.lock().unwrap().peers.insert(id, (url.to_owned(), incarnation));
    }

    fn remove_peer(&mut self, id: NodeId) {
        self.0.lock().unwrap().peers.remove(&id);
    }

    fn greet(&mut self, url: &str, greeting: Greeting) {
        self.push(Outgoing::Greeting(url.to_owned(), greeting));
    }

    fn forward_change(&mut self, to: NodeId, change: MemberRequest, responder: Responder<()>) {
        self.push(Outgoing::Change(to, change, responder));
    }
}

/// A committed entry as given to the state machine.
pub struct Published {
    pub index: u64,
    pub term: u64,
    pub data: Bytes,
    /// What the state machine answered.
    pub answer: Answer,
}

/// The outputs of the entries that were proposed at this member, until their clients take them.
pub type Outputs = Rc<RefCell<BTreeMap<Index, Output>>>;

/// What a turn put on commitC, for the invariants.
#[derive(Default)]
pub struct Followed {
    pub published: Vec<Published>,
    pub restored: bool,
}

/// A snapshot whose state is taken and whose file is not written yet, as on the store's snapshot
/// thread.
pub struct UnwrittenSnapshot {
    bytes: Vec<u8>,
    save: Box<dyn FnOnce(SnapshotBody<'_>) + Send>,
}

impl UnwrittenSnapshot {
    pub fn write(self) {
        let Self { bytes, save } = self;
        save(&mut |file| file.write_all(&bytes));
    }
}

/// An entry on its way to the state machine, whose answer is looked at before the client gets it. Entries
/// that were proposed elsewhere, or in an earlier run, are answered too.
struct Asked {
    index: Index,
    term: u64,
    data: Bytes,
    client: Option<Responder<Acknowledged>>,
    pending: Pending<Acknowledged>,
}

impl Asked {
    fn of(mut entry: CommittedEntry) -> (CommittedEntry, Self) {
        let (responder, pending) = responder();
        let client = entry.responder.replace(responder);
        let CommittedEntry { index, term, ref data, .. } = entry;
        let asked = Self { index, term, data: data.clone(), client, pending };
        (entry, asked)
    }

    fn take(self, outputs: &Outputs) -> Published {
        let Self { index, term, data, client, pending } = self;
        let output = poll_once(pin!(pending.output_until::<Output>(far_future())));
        let output = output.expect("it was applied").expect("it was applied");
        let answer = answer(&output);
        if let Some(client) = client {
            outputs.borrow_mut().insert(index, output);
            client.answer(Ok(Acknowledged::Applied { index, term }));
        }
        Published { index, term, data, answer }
    }
}

/// One run of one member.
pub struct Process {
    pub node: RaftNode,
    pub admission: Arc<Admission>,
    pub snapshotter: Snapshotter,
    pub store: KvStore,
    pub sent: Arc<Mutex<Sent>>,
    pub unwritten: Vec<UnwrittenSnapshot>,
    pub late: LateWrites,
    /// The held commit notices for which an event was scheduled.
    pub notices: Option<u64>,
    pub boot: u64,
    pub outputs: Outputs,
    /// The last entry in the snapshot that the state machine began with, or installed last.
    pub restored: Index,
    reader: CommitReader<Keys>,
    propose_rx: mpsc::Receiver<Proposal>,
    read_rx: mpsc::Receiver<raftexample::channels::ReadRequest>,
    commit_rx: mpsc::UnboundedReceiver<Commit>,
    reports: Arc<Mutex<Vec<PeerReport>>>,
    status: watch::Receiver<Status>,
    /// The last number of a batch or a snapshot.
    number: u64,
}

impl Process {
    pub fn start(
        config: &NodeConfig,
        tokens_max: usize,
        late: LateWrites,
        vfs: Arc<dyn Vfs>,
        logger: &Logger,
    ) -> Result<Self> {
        let replayed = replay_wal(config, vfs, logger)?;
        let (admission, snapshotter) = (replayed.admission.clone(), replayed.snapshotter.clone());
        let (commit_tx, commit_rx) = mpsc::unbounded_channel();
        let (status_tx, status) = watch::channel(Status::default());
        let reports = Arc::new(Mutex::new(Vec::new()));
        let report = {
            let reports = reports.clone();
            Arc::new(move |report| reports.lock().unwrap().push(report))
        };
        let sent = Arc::new(Mutex::new(Sent::default()));
        let outbox = Box::new(ListOutbox(sent.clone()));
        let mut node = RaftNode::new(
            config.clone(),
            replayed,
            outbox,
            commit_tx,
            report,
            status_tx,
            logger.clone(),
        )?;
        node.set_background(Box::new(late.clone()));
        let (read_tx, read_rx) = mpsc::channel(64);
        let (propose_tx, propose_rx) = mpsc::channel(1);
        let requests = Requests { propose_tx, read_tx, ..closed() };
        let (store, reader) = KvStore::remembering(tokens_max, config, requests, logger.clone());
        Ok(Self {
            node,
            admission,
            snapshotter,
            store,
            sent,
            unwritten: Vec::new(),
            late,
            notices: None,
            boot: config.boot,
            outputs: Outputs::default(),
            restored: 0,
            reader,
            propose_rx,
            read_rx,
            commit_rx,
            reports,
            status,
            number: 0,
        })
    }

    /// One turn: all inputs that arrived, then one Ready of raft.
    pub fn turn(&mut self, inputs: impl IntoIterator<Item = Input>) -> Result<Followed> {
        for input in inputs {
            self.node.handle(input)?;
        }
        while let Ok(request) = self.read_rx.try_recv() {
            self.node.handle(Input::Read(request))?;
        }
        // As on an async worker, then on a thread that may block.
        if self.late.is_on_worker() && self.node.handle_ready_without_disk()? == Turn::Done {
            return self.follow_commits();
        }
        self.node.handle_ready()?;
        self.follow_commits()
    }

    fn follow_commits(&mut self) -> Result<Followed> {
        let mut followed = Followed::default();
        while let Ok(commit) = self.commit_rx.try_recv() {
            let commit = match commit {
                Commit::Snapshot(SnapshotRequest { index, save }) => {
                    let bytes = self.state_bytes(index)?;
                    self.unwritten.push(UnwrittenSnapshot { bytes, save });
                    continue;
                }
                commit => commit,
            };
            match commit {
                Commit::Entries { entries, applied } => {
                    let (entries, asked) = entries.into_iter().map(Asked::of).unzip();
                    self.reader.handle(Commit::Entries { entries, applied })?;
                    let asked: Vec<Asked> = asked;
                    followed.published.extend(asked.into_iter().map(|it| it.take(&self.outputs)));
                }
                commit @ Commit::Restore(_) => {
                    self.reader.handle(commit)?;
                    followed.restored = true;
                    self.restored = self.store.applied();
                }
                commit => self.reader.handle(commit)?,
            }
        }
        Ok(followed)
    }

    /// Takes what the store just put on proposeC.
    pub fn take_proposal(&mut self) -> Proposal {
        self.propose_rx.try_recv().expect("the store proposes when it is first polled")
    }

    /// The store's bytes, as in a snapshot.
    pub fn state_bytes(&mut self, index: u64) -> Result<Vec<u8>> {
        let (bytes_tx, bytes_rx) = std_mpsc::channel();
        let save = Box::new(move |body: SnapshotBody<'_>| {
            let mut bytes = Vec::new();
            body(&mut bytes).expect("memory takes everything");
            let _ = bytes_tx.send(bytes);
        });
        self.reader.handle(Commit::Snapshot(SnapshotRequest { index, save }))?;
        Ok(bytes_rx.recv().expect("the thread that the store started sends them"))
    }

    /// Reports of the node's own threads.
    pub fn take_reports(&self) -> Vec<PeerReport> {
        std::mem::take(&mut self.reports.lock().unwrap())
    }

    pub fn take_sent(&self) -> Vec<Outgoing> {
        std::mem::take(&mut self.sent.lock().unwrap().queue)
    }

    pub fn status(&self) -> watch::Ref<'_, Status> {
        self.status.borrow()
    }

    pub fn header(&self, to: NodeId) -> PeerHeader {
        let sent = self.sent.lock().unwrap();
        self.admission.header(to, sent.peers.get(&to).map_or(0, |(_, incarnation)| *incarnation))
    }

    pub fn next_number(&mut self) -> u64 {
        self.number += 1;
        self.number
    }
}
