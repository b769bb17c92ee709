//! Deferred commit notices.
//!
//! As soon as an entry is committed, raft tells every follower in an append without entries. While writes are
//! under way, the next append carries the commit index anyway, so the notice costs a message and an answer that
//! nobody needs. A leader therefore holds the notice back until an append to the same member replaces it, or the
//! node is fed [`Input::NoticesDue`](super::Input::NoticesDue) about two milliseconds later.
//!
//! A notice is not held back
//! * if its receiver forwarded a write and waits for the commit. A forwarded read does not need the notice: its
//!   answer carries the commit index;
//! * while a change of members is not applied, because its receiver may be no member afterwards.
//!
//! A late or lost notice is harmless, because heartbeats carry the commit index, too. raft uses the same empty
//! appends to find out what a member lacks. These are held back as well.

use std::collections::BTreeMap;
use std::mem;

use raft::eraftpb::{Message, MessageType};
use raft::{Raft, StateRole};

use super::{Index, NodeId, Term};
use crate::storage::log::Log;

/// What a leader has told a member about the commit index.
#[derive(Default)]
struct Receiver {
    held: Option<Message>,
    /// The commit index that was sent last.
    told: Index,
    /// The index of the last write that the member forwarded.
    awaited: Index,
}

/// The notices that a leader holds back.
#[derive(Default)]
pub(super) struct Notices {
    is_holding: bool,
    receivers: BTreeMap<NodeId, Receiver>,
    /// The term in which they were held back.
    term: Term,
    /// How many times one was held back while no other was.
    batch: u64,
}

impl Notices {
    /// Holds notices back from now on. Without that all are sent at once.
    pub fn hold(&mut self) {
        self.is_holding = true;
    }

    /// Notes that this leader appended a write of member `from` at `index`.
    pub fn note_forwarded(&mut self, from: NodeId, index: Index, term: Term) {
        self.begin_term(term);
        self.receivers.entry(from).or_default().awaited = index;
    }

    /// Takes a message that is about to be sent, and returns it unless it is held back.
    pub fn pass(
        &mut self,
        message: Message,
        raft: &Raft<Log>,
        has_unapplied_change: impl FnOnce() -> bool,
    ) -> Option<Message> {
        let is_append = message.get_msg_type() == MessageType::MsgAppend;
        if !self.is_holding || !is_append || message.term != raft.term {
            return Some(message);
        }
        self.begin_term(raft.term);
        let was_holding = self.batch().is_some();
        let receiver = self.receivers.entry(message.to).or_default();
        receiver.held = None;
        let can_wait = message.entries.is_empty()
            && receiver.awaited <= receiver.told
            && !has_unapplied_change();
        if can_wait {
            receiver.held = Some(message);
            self.batch += u64::from(!was_holding);
            return None;
        }
        receiver.told = message.commit;
        Some(message)
    }

    /// The number of the notices that are held back together. It changes once none of them is left.
    pub fn batch(&self) -> Option<u64> {
        self.receivers.values().any(|it| it.held.is_some()).then_some(self.batch)
    }

    /// Takes the notices.
    pub fn take(&mut self, raft: &Raft<Log>) -> Vec<Message> {
        let leads = raft.state == StateRole::Leader && raft.term == self.term;
        let mut messages = Vec::new();
        for receiver in self.receivers.values_mut() {
            let Some(message) = receiver.held.take() else { continue };
            if leads {
                receiver.told = message.commit;
                messages.push(message);
            }
        }
        messages
    }

    /// Forgets what was noted in another term.
    fn begin_term(&mut self, term: Term) {
        if mem::replace(&mut self.term, term) != term {
            self.receivers.clear();
        }
    }
}
