//! Events at all members, in order.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use raft::eraftpb::{Message, MessageType};
use raftexample::channels::{Commit, NodeId, PeerReport};
use raftexample::error::Error;
use raftexample::raft_node::Input;
use raftexample::transport::InboundBody;
use slog::{Level, Logger};
use tokio::sync::mpsc;

use crate::support::logs;

/// Events in order; clones share them.
#[derive(Clone, Default)]
pub struct Transcript {
    lines: Arc<Mutex<Vec<String>>>,
    /// The items on commitC, taken before each line is written, so that each is recorded in its
    /// place.
    pub taps: Arc<Mutex<BTreeMap<NodeId, Arc<Mutex<CommitTap>>>>>,
    scenario: Arc<Mutex<Option<Scenario>>>,
}

pub struct CommitTap {
    pub rx: mpsc::UnboundedReceiver<Commit>,
    pub queue: VecDeque<Commit>,
}

/// The requests of a scenario that are not answered yet.
#[derive(Default)]
struct Scenario {
    requests: u64,
    waiting: Vec<(String, Poll)>,
}

/// Returns a request's answer as text once it arrived.
pub type Poll = Box<dyn FnMut() -> Option<String> + Send>;

impl Transcript {
    /// Starts over; from now on inputs and answers are recorded too.
    pub fn start_scenario(&self) {
        *self.scenario.lock().unwrap() = Some(Scenario::default());
        self.clear();
    }

    pub fn has_scenario(&self) -> bool {
        self.scenario.lock().unwrap().is_some()
    }

    pub fn note(&self, id: NodeId, line: &str) {
        self.note_commits(id);
        self.note_answers();
        self.push(format!("{id} {line}"));
    }

    /// Records an input of a scenario. Consecutive ticks make one line.
    pub fn note_input(&self, id: NodeId, input: &Input) {
        if !self.has_scenario() {
            return;
        }
        self.note_commits(id);
        self.note_answers();
        let Some(line) = describe_input(input) else { return };
        let line = format!("{id} {line}");
        let mut lines = self.lines.lock().unwrap();
        if let (Input::Tick, Some(last)) = (input, lines.last_mut())
            && let Some(more) = last.strip_prefix(&line)
        {
            let count: u64 = more.trim_start_matches(" x").parse().unwrap_or(1);
            *last = format!("{line} x{}", count + 1);
            return;
        }
        lines.push(line);
    }

    /// Records a request of a scenario, and its answer once `poll` returns it.
    pub fn note_request(&self, id: NodeId, what: &str, poll: Poll) {
        let mut scenario = self.scenario.lock().unwrap();
        let Some(Scenario { requests, waiting }) = &mut *scenario else { return };
        *requests += 1;
        self.push(format!("{id} request {requests}: {what}"));
        waiting.push((format!("{id} answer {requests}"), poll));
    }

    /// Records that member `id` of a scenario ended.
    pub fn note_end(&self, id: NodeId, error: &Error) {
        if self.has_scenario() {
            let debug = format!("{error:?}");
            let kind = debug.split(['(', ' ']).next().unwrap_or_default();
            self.note(id, &format!("end: {kind}"));
        }
    }

    /// Records the answers of a scenario that arrived.
    pub fn note_answers(&self) {
        let mut scenario = self.scenario.lock().unwrap();
        let Some(Scenario { waiting, .. }) = &mut *scenario else { return };
        waiting.retain_mut(|(request, poll)| match poll() {
            Some(answer) => {
                self.push(format!("{request}: {answer}"));
                false
            }
            None => true,
        });
    }

    pub fn note_commits(&self, id: NodeId) {
        let Some(tap) = self.taps.lock().unwrap().get(&id).cloned() else { return };
        let mut tap = tap.lock().unwrap();
        while let Ok(commit) = tap.rx.try_recv() {
            self.push(match &commit {
                Commit::Entries { entries, .. } => {
                    let indexes: Vec<_> = entries.iter().map(|entry| entry.index).collect();
                    format!("{id} commit entries {indexes:?}")
                }
                Commit::Reads(responders) => format!("{id} commit {} reads", responders.len()),
                Commit::Restore(restore) => format!("{id} commit restore {}", restore.index),
                Commit::Snapshot(request) => format!("{id} commit snapshot {}", request.index),
                Commit::Replayed => format!("{id} commit replayed"),
            });
            tap.queue.push_back(commit);
        }
    }

    fn push(&self, line: String) {
        self.lines.lock().unwrap().push(line);
    }

    pub fn clear(&self) {
        self.lines.lock().unwrap().clear();
    }

    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// The lines of member `id`.
    pub fn of(&self, id: NodeId) -> Vec<String> {
        let prefix = format!("{id} ");
        self.lines().into_iter().filter(|line| line.starts_with(&prefix)).collect()
    }
}

/// True for a heartbeat or its response without a question. A scenario leaves them out.
pub fn is_routine(message: &Message) -> bool {
    let kinds = [MessageType::MsgHeartbeat, MessageType::MsgHeartbeatResponse];
    kinds.contains(&message.get_msg_type()) && message.context.is_empty()
}

/// The line for an input of a scenario. `None` for a client's request, which
/// [`Transcript::note_request`] records, and for the routine of every tick.
fn describe_input(input: &Input) -> Option<String> {
    let line = match input {
        Input::Propose(_) | Input::Read(_) | Input::ConfChange(_) => return None,
        Input::Tick => "tick".to_owned(),
        Input::Written => "written".to_owned(),
        Input::NoticesDue => "notices due".to_owned(),
        Input::Inbound(inbound) => match &inbound.body {
            InboundBody::Messages { messages, .. } if messages.iter().all(is_routine) => {
                return None;
            }
            InboundBody::Messages { messages, .. } => {
                let kinds: Vec<_> = messages.iter().map(Message::get_msg_type).collect();
                format!("receive {kinds:?} from {}", inbound.header.from)
            }
            InboundBody::Snapshot { .. } => {
                format!("receive snapshot from {}", inbound.header.from)
            }
            InboundBody::Announced(_) => {
                format!("receive an announcement from {}", inbound.header.from)
            }
            InboundBody::Greeting(..) => {
                format!("receive greeting from {}", inbound.header.from)
            }
            InboundBody::ConfChange(change, _) => {
                format!("receive {change:?} from {}", inbound.header.from)
            }
        },
        Input::Report(report) => match report {
            PeerReport::Unreachable(_) | PeerReport::NotGreeted { .. } => return None,
            PeerReport::ProposalsLost { ids } => {
                format!("report: {} proposals may be lost", ids.len())
            }
            PeerReport::NotProposed { to, requests } => {
                format!("report: {} proposals never left for {to}", requests.len())
            }
            PeerReport::SnapshotStatus { to, index, arrived, .. } => {
                format!("report: snapshot {index} at {to}, arrived: {arrived}")
            }
            PeerReport::Refused { header, .. } => format!("report: refused by {}", header.from),
            PeerReport::Greeted { header, .. } => format!("report: greeted by {}", header.from),
            PeerReport::SnapshotMade(_) => "report: snapshot is made".to_owned(),
            PeerReport::DiskFailed(_) => "report: disk failed".to_owned(),
        },
    };
    Some(line)
}

/// The logger of member `id`: its own lines go to `logs`, and those about snapshots to the
/// transcript too.
pub fn logger(id: NodeId, transcript: Transcript, logs: Arc<Mutex<Vec<String>>>) -> Logger {
    logs::logger(move |record| {
        if !record.module().starts_with("raftexample") || record.level() == Level::Trace {
            return;
        }
        let line = record.msg().to_string();
        if record.module().starts_with("raftexample::raft_node")
            && (line.contains("snapshot at index") || line.starts_with("compacted log"))
        {
            transcript.note(id, &format!("log {line}"));
        }
        logs.lock().unwrap().push(line);
    })
}
