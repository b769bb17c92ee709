//! What happened at all members, in order.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use raftexample::channels::{Commit, NodeId};
use slog::{Level, Logger};
use tokio::sync::mpsc;

use crate::support::logs;

/// What happened, in order; clones share it.
#[derive(Clone, Default)]
pub struct Transcript {
    lines: Arc<Mutex<Vec<String>>>,
    /// What the members have put on commitC, taken off before each line is written: so each item is
    /// written down in its place.
    pub taps: Arc<Mutex<BTreeMap<NodeId, Arc<Mutex<CommitTap>>>>>,
}

pub struct CommitTap {
    pub rx: mpsc::UnboundedReceiver<Commit>,
    pub queue: VecDeque<Commit>,
}

impl Transcript {
    pub fn note(&self, id: NodeId, line: &str) {
        self.note_commits(id);
        self.lines.lock().unwrap().push(format!("{id} {line}"));
    }

    pub fn note_commits(&self, id: NodeId) {
        let Some(tap) = self.taps.lock().unwrap().get(&id).cloned() else { return };
        let mut tap = tap.lock().unwrap();
        while let Ok(commit) = tap.rx.try_recv() {
            let line = match &commit {
                Commit::Entries { entries, .. } => {
                    let indexes: Vec<_> = entries.iter().map(|entry| entry.index).collect();
                    format!("{id} commit entries {indexes:?}")
                }
                Commit::Reads(responders) => format!("{id} commit {} reads", responders.len()),
                Commit::Restore(restore) => format!("{id} commit restore {}", restore.index),
                Commit::Snapshot(request) => format!("{id} commit snapshot {}", request.index),
                Commit::Replayed => format!("{id} commit replayed"),
            };
            self.lines.lock().unwrap().push(line);
            tap.queue.push_back(commit);
        }
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

/// The logger of member `id`: its own lines go to `logs`, those about snapshots to the transcript too.
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
