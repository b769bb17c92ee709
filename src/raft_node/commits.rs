//! commitC's sending end: what the state machine has to do, in the order of the log.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;

use super::Index;
use crate::channels::{BacklogPermit, Commit, CommittedEntry};

/// Above this many bytes of committed entries that are not applied yet, the node takes neither
/// proposals nor appends.
pub(super) const OUTSTANDING_BYTES_MAX: u64 = 64 << 20;

/// commitC, with the bytes that the state machine still has to apply.
pub(super) struct Commits {
    tx: mpsc::UnboundedSender<Commit>,
    outstanding_bytes: Arc<AtomicU64>,
    /// The commit index at the last stop; `None` once it is applied again.
    replay_until: Option<Index>,
}

impl Commits {
    pub fn new(tx: mpsc::UnboundedSender<Commit>, replay_until: Index) -> Self {
        Self { tx, outstanding_bytes: Arc::default(), replay_until: Some(replay_until) }
    }

    pub fn is_full(&self) -> bool {
        self.outstanding_bytes.load(Ordering::Relaxed) > OUTSTANDING_BYTES_MAX
    }

    pub fn send(&self, commit: Commit) {
        // A closed commitC means that the state machine ended. The task that feeds the node sees that
        // too, and stops it.
        let _ = self.tx.send(commit);
    }

    pub fn send_entries(&self, entries: Vec<CommittedEntry>, bytes: u64) {
        if !entries.is_empty() {
            let applied = BacklogPermit::new(bytes, &self.outstanding_bytes);
            self.send(Commit::Entries { entries, applied });
        }
    }

    pub fn replay_until(&mut self, index: Index) {
        self.replay_until = Some(index);
    }

    /// Announces once that everything up to the end of the replay is on commitC.
    pub fn note_applied(&mut self, index: Index) {
        if self.replay_until.take_if(|until| index >= *until).is_some() {
            self.send(Commit::Replayed);
        }
    }
}
