//! The messages that members send.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};

use raft::eraftpb::{Message, MessageType};
use raftexample::channels::{Greeting, MemberRequest, NodeId, Responder, SnapshotFile};
use raftexample::transport::Outbox;

use super::transcript::{Transcript, is_routine};

/// Messages that wait for delivery.
#[derive(Default)]
pub struct Sent {
    pub messages: Vec<Message>,
    pub snapshots: Vec<(Message, SnapshotFile)>,
    pub greetings: Vec<(String, Greeting)>,
    pub passed_on: Vec<(NodeId, MemberRequest, Responder<()>)>,
    /// The URL and the incarnation of each.
    pub peers: BTreeMap<NodeId, (String, u64)>,
}

pub struct ListOutbox {
    pub id: NodeId,
    pub sent: Arc<Mutex<Sent>>,
    pub transcript: Transcript,
}

fn describe(message: &Message) -> String {
    let mut line = format!("send {:?} to {}", message.get_msg_type(), message.to);
    match message.get_msg_type() {
        MessageType::MsgAppend => {
            let indexes: Vec<_> = message.entries.iter().map(|entry| entry.index).collect();
            write!(line, ", entries {indexes:?}, commit {}", message.commit).unwrap();
        }
        MessageType::MsgAppendResponse => {
            let verdict = if message.reject { "rejects" } else { "has" };
            write!(line, ", {verdict} {}", message.index).unwrap();
        }
        MessageType::MsgHeartbeat if !message.context.is_empty() => line += ", asks for a read",
        _ => {}
    }
    line
}

impl Outbox for ListOutbox {
    fn send(&mut self, message: Message) {
        if !self.transcript.has_scenario() || !is_routine(&message) {
            self.transcript.note(self.id, &describe(&message));
        }
        self.sent.lock().unwrap().messages.push(message);
    }

    fn send_snapshot(&mut self, message: Message, file: SnapshotFile) {
        self.transcript.note(self.id, &describe(&message));
        self.sent.lock().unwrap().snapshots.push((message, file));
    }

    fn add_peer(&mut self, id: NodeId, url: &str, incarnation: u64) {
        self.sent.lock().unwrap().peers.insert(id, (url.to_owned(), incarnation));
    }

    fn remove_peer(&mut self, id: NodeId) {
        self.sent.lock().unwrap().peers.remove(&id);
    }

    fn greet(&mut self, url: &str, greeting: Greeting) {
        self.sent.lock().unwrap().greetings.push((url.to_owned(), greeting));
    }

    fn forward_change(&mut self, to: NodeId, change: MemberRequest, responder: Responder<()>) {
        self.sent.lock().unwrap().passed_on.push((to, change, responder));
    }
}
