//! What the channels carry: plain types that both ends share. The crate's front page lists the channels.

use std::any::Any;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use bytes::Bytes;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::error::{Error, RequestError};

/// The longest peer URL in bytes. It is part of a header of every request between members.
pub const PEER_URL_BYTES_MAX: usize = 256;
/// Requests that may wait in proposeC and in readC; one more is answered 503.
pub const REQUESTS_MAX: usize = 4096;
/// Requests that may wait in confChangeC; one more is answered 503.
pub const CONF_CHANGES_MAX: usize = 16;
/// The id of a member, never 0. An id that was removed is never used again.
pub type NodeId = u64;
/// The position of an entry in the replicated log; the first is 1.
pub type Index = u64;
/// A raft term: at most one member leads in it.
pub type Term = u64;

/// Identifies one request of one run of one member.
///
/// With a counter alone, an entry of an earlier run could answer a request of this run, and a read could
/// take another read's index. So the id names the member, and 64 random bits drawn at each start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId {
    /// The member that received the request from the client.
    pub member: NodeId,
    /// Drawn at random at that member's start.
    pub boot: u64,
    /// Counts the requests of that run.
    pub counter: u64,
}

impl RequestId {
    /// The length of an encoded id in bytes.
    pub const LEN: usize = 24;

    /// Moves to the next id of the same run, and returns it.
    pub fn advance(&mut self) -> Self {
        self.counter += 1;
        *self
    }

    /// Encodes: member, boot and counter, 8 bytes each, little-endian.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let words = [self.member, self.boot, self.counter].map(u64::to_le_bytes);
        words.as_flattened().try_into().expect("three times 8 bytes")
    }

    /// Decodes what [`to_bytes`](Self::to_bytes) wrote; `None` if the length differs.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (&[member, boot, counter], []) = bytes.as_chunks() else { return None };
        let [member, boot, counter] = [member, boot, counter].map(u64::from_le_bytes);
        Some(Self { member, boot, counter })
    }
}

/// An answer. Beside that to a proposal stands the state machine's output, whose type the raft node
/// between the two halves does not know.
type Answer<T> = Result<(T, Option<Box<dyn Any + Send>>), RequestError>;

/// Makes the two halves of one request's answer.
pub fn responder<T>() -> (Responder<T>, Pending<T>) {
    let proposed = Arc::new(AtomicBool::new(false));
    let (answer_tx, answer_rx) = oneshot::channel();
    (Responder { proposed: proposed.clone(), answer_tx }, Pending { proposed, answer_rx })
}

/// The half of a request's answer that travels with the request. It is answered once; dropping it
/// unanswered says that this member is stopping.
#[derive(Debug)]
pub struct Responder<T> {
    /// True from when the request is proposed.
    proposed: Arc<AtomicBool>,
    answer_tx: oneshot::Sender<Answer<T>>,
}

impl<T> Responder<T> {
    /// Marks the request as proposed: its outcome is unknown until it is answered. Returns false if the
    /// client has given up; then the caller must not propose it.
    pub fn mark_proposed(&self) -> bool {
        // `Pending::answer_until` closes the channel and then reads `proposed`. With a fence on both
        // sides, at least one of the two sees what the other did.
        self.proposed.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        !self.answer_tx.is_closed()
    }

    /// Takes [`mark_proposed`](Self::mark_proposed) back: nothing was proposed after all.
    pub fn mark_not_proposed(&self) {
        self.proposed.store(false, Ordering::SeqCst);
    }

    /// Answers the request. A client that no longer waits is a normal event.
    pub fn answer(self, answer: Result<T, RequestError>) {
        let _ = self.answer_tx.send(answer.map(|answer| (answer, None)));
    }

    /// Answers a proposal that was applied.
    pub fn answer_with(self, answer: T, output: impl Any + Send) {
        let _ = self.answer_tx.send(Ok((answer, Some(Box::new(output)))));
    }

    /// True once the client gave up.
    pub fn is_closed(&self) -> bool {
        self.answer_tx.is_closed()
    }
}

/// The half of a request's answer that the request's handler keeps.
#[derive(Debug)]
pub struct Pending<T> {
    proposed: Arc<AtomicBool>,
    answer_rx: oneshot::Receiver<Answer<T>>,
}

impl<T> Pending<T> {
    /// The answer if it has arrived, or an error if it never will.
    pub fn try_take(&mut self) -> Option<Result<T, RequestError>> {
        match self.answer_rx.try_recv() {
            Ok(answer) => Some(answer.map(|(answer, _)| answer)),
            Err(oneshot::error::TryRecvError::Empty) => None,
            Err(oneshot::error::TryRecvError::Closed) => {
                Some(Err(RequestError::unknown("this member stopped")))
            }
        }
    }

    /// Waits for the answer until `deadline`.
    ///
    /// # Errors
    /// The request's own error; past the deadline, or when this member stops,
    /// [`RequestError::Unavailable`] if nothing was proposed, else [`RequestError::Unknown`].
    pub async fn wait_until(self, deadline: Instant) -> Result<T, RequestError> {
        self.answer_until(deadline).await.map(|(answer, _)| answer)
    }

    /// As [`wait_until`](Self::wait_until), for a proposal: returns the state machine's output.
    pub async fn output_until<O: 'static>(self, deadline: Instant) -> Result<O, RequestError> {
        let (_, output) = self.answer_until(deadline).await?;
        let output = output.and_then(|output| output.downcast().ok());
        Ok(*output.expect("an applied proposal is answered with its output"))
    }

    async fn answer_until(mut self, deadline: Instant) -> Answer<T> {
        let why = match tokio::time::timeout_at(deadline, &mut self.answer_rx).await {
            Ok(Ok(answer)) => return answer,
            Ok(Err(_)) => "this member is stopping",
            Err(_) => {
                self.answer_rx.close();
                fence(Ordering::SeqCst);
                // The answer may have arrived between the deadline and the close.
                if let Ok(answer) = self.answer_rx.try_recv() {
                    return answer;
                }
                "the deadline passed"
            }
        };
        if self.proposed.load(Ordering::SeqCst) {
            Err(RequestError::unknown(why))
        } else {
            Err(RequestError::unavailable(format!(
                "{why} before a leader took the request (does a majority of the members run?)"
            )))
        }
    }
}

/// A request that its channel did not take.
impl<T> From<TrySendError<T>> for RequestError {
    fn from(error: TrySendError<T>) -> Self {
        Self::unavailable(match error {
            TrySendError::Full(_) => "too many requests are waiting",
            TrySendError::Closed(_) => "this member is stopping",
        })
    }
}

/// When a write is acknowledged: the values of `--ack`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Ack {
    /// After it is committed and applied
    #[default]
    Committed,
    /// After it is handed to raft, as the original does; the write may be lost
    Proposed,
}

/// How a write was acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acknowledged {
    /// raft took it, nothing more.
    Proposed,
    /// It is on a majority's disks, and this member's state machine applied it as this entry.
    Applied {
        /// The entry's index.
        index: Index,
        /// The entry's term.
        term: Term,
    },
}

/// proposeC: bytes for the log. Only the state machine knows what they mean.
#[derive(Debug)]
pub struct Proposal {
    /// The payload of the entry.
    pub data: Bytes,
    /// When to answer.
    pub ack: Ack,
    /// Takes the answer.
    pub responder: Responder<Acknowledged>,
}

/// readC: a linearizable read. It is answered, in order with the entries on commitC, when the state machine
/// holds every write that any member acknowledged before the request.
#[derive(Debug)]
pub struct ReadRequest {
    /// Takes the answer.
    pub responder: Responder<()>,
}

/// What a client asks of the members. The leader turns it into a
/// [`MemberChange`](crate::membership::MemberChange), an entry of the log, or into a transfer.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum MemberRequest {
    /// POST: add a member that listens for its peers at `url`. It starts as a learner; the leader
    /// promotes it once it runs and has caught up.
    Add {
        /// The new member, an id never used before.
        id: NodeId,
        /// Its peer URL.
        url: String,
    },
    /// DELETE: remove a member for good.
    Remove {
        /// The member to remove.
        id: NodeId,
    },
    /// Change where a member listens for its peers.
    Move {
        /// The member.
        id: NodeId,
        /// Its new peer URL.
        url: String,
    },
    /// Transfer leadership. This is never an entry of the log.
    Lead {
        /// The voter that is to lead; `None` for any voter except the current leader.
        to: Option<NodeId>,
    },
}

/// The senders of proposeC, readC and confChangeC. The node stops when all of proposeC's are dropped.
#[derive(Clone, Debug)]
pub struct Requests {
    /// proposeC.
    pub propose_tx: mpsc::Sender<Proposal>,
    /// readC.
    pub read_tx: mpsc::Sender<ReadRequest>,
    /// confChangeC.
    pub conf_change_tx: mpsc::Sender<ConfChangeRequest>,
}

/// confChangeC: a request about the members, answered after its entry is applied.
#[derive(Debug)]
pub struct ConfChangeRequest {
    /// What to change.
    pub change: MemberRequest,
    /// True if another member forwarded it; it is not forwarded again.
    pub forwarded: bool,
    /// Takes the answer.
    pub responder: Responder<()>,
}

/// One committed entry, for the state machine.
#[derive(Debug)]
pub struct CommittedEntry {
    /// Its index.
    pub index: Index,
    /// Its term.
    pub term: Term,
    /// The payload, as it was proposed.
    pub data: Bytes,
    /// The responder, to be answered after applying, if the entry was proposed on this member.
    pub responder: Option<Responder<Acknowledged>>,
}

/// commitC: what the state machine has to do next, in the order of the log.
pub enum Commit {
    /// Apply these entries.
    Entries {
        /// In the order of the log. Missing indexes belong to entries of raft itself.
        entries: Vec<CommittedEntry>,
        /// Dropped when they are applied.
        applied: BacklogPermit,
    },
    /// Answer these reads: every entry that they have to see came before.
    Reads(Vec<Responder<()>>),
    /// Replace the state by a snapshot's.
    Restore(SnapshotRestore),
    /// Make a snapshot of the state as it is now.
    Snapshot(SnapshotRequest),
    /// The state holds everything that this member knew to be committed at its last stop.
    Replayed,
}

/// The share of a batch of entries in the backlog of commitC, to be dropped after the batch is applied.
#[derive(Debug)]
pub struct BacklogPermit {
    bytes: u64,
    outstanding_bytes: Arc<AtomicU64>,
}

impl BacklogPermit {
    /// Adds `bytes` to `outstanding_bytes` until the permit is dropped.
    pub fn new(bytes: u64, outstanding_bytes: &Arc<AtomicU64>) -> Self {
        outstanding_bytes.fetch_add(bytes, Ordering::Relaxed);
        Self { bytes, outstanding_bytes: outstanding_bytes.clone() }
    }
}

impl Drop for BacklogPermit {
    fn drop(&mut self) {
        self.outstanding_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A snapshot whose bytes were checked, to replace the state with.
pub struct SnapshotRestore {
    /// The last entry that the state contains.
    pub index: Index,
    /// That entry's term.
    pub term: Term,
    /// What the state machine wrote when the snapshot was made.
    pub reader: Box<dyn Read + Send>,
}

/// Writes the state machine's bytes of one snapshot; given to [`SnapshotRequest::save`].
pub type SnapshotBody<'a> = &'a mut dyn FnMut(&mut dyn Write) -> std::io::Result<()>;

/// A request for a snapshot of the state at one applied index. Any thread may carry it out.
pub struct SnapshotRequest {
    /// The applied index, which is the snapshot's.
    pub index: Index,
    /// Writes the file, and reports to the node.
    pub save: Box<dyn FnOnce(SnapshotBody<'_>) + Send>,
}

/// The two ends of a request between members, or of its response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerHeader {
    /// The sender's cluster; 0 while it does not know it.
    pub cluster_id: u64,
    /// The sender.
    pub from: NodeId,
    /// The incarnation of the sender's data directory.
    pub incarnation: u64,
    /// Where the sender listens for its peers.
    pub url: String,
    /// The index of the entry that moved the sender to this URL; 0 if none did, or if the sender has not
    /// applied it yet.
    pub moved: Index,
    /// The receiver; 0 in a greeting to a URL whose member is unknown.
    pub to: NodeId,
    /// The incarnation that the message is for; 0 while the sender knows none, and counts on nothing
    /// that the receiver has.
    pub to_incarnation: u64,
}

/// What a member tells a peer before the first raft message.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Greeting {
    /// The peer URLs of the first `--cluster` list; empty for a member that joined.
    pub first_urls: Vec<String>,
    /// True once the sender takes part in raft.
    pub begun: bool,
}

/// What a peer answers to a greeting.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct GreetingAnswer {
    /// True once the peer takes part in raft, in the cluster that its header names. Before, that id
    /// says which first members it has agreed on; 0 while it waits for some.
    pub begun: bool,
    /// True if the sender's id is a member in the peer's applied state.
    pub counts_as_member: bool,
    /// What the sender's incarnation has acknowledged, if the peer leads.
    pub acknowledged: Option<Matched>,
    /// The leader that the peer follows: a member whose log was rolled back may not know it.
    pub leader: Option<Vouched>,
}

/// A member with a vote, in the applied state of the member that vouches for it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Vouched {
    /// The member.
    pub id: NodeId,
    /// Its peer URL.
    pub url: String,
    /// Its incarnation.
    pub incarnation: u64,
}

/// How much of the log a member has acknowledged to a leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Matched {
    /// The leader's term, in which it was acknowledged.
    pub term: Term,
    /// The last entry.
    pub index: Index,
}

/// Why a member does not take a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another cluster, or another receiver: 412.
    #[error("{0}")]
    Mismatch(String),
    /// The id is bound to another incarnation: 412, and final for a member that bootstraps.
    #[error("{0}")]
    OtherIncarnation(String),
    /// The sender was removed by the entry at this index: 410.
    #[error("member {id} was removed from the cluster at index {index}")]
    Removed {
        /// The sender.
        id: NodeId,
        /// The removal.
        index: Index,
    },
    /// This member bootstraps, or has too much to do: 503.
    #[error("{0}")]
    NotReady(String),
}

/// What became of something that this member sent or made.
#[derive(Debug)]
pub enum PeerReport {
    /// A message to this peer was dropped.
    Unreachable(NodeId),
    /// These proposals were never sent to the leader, so they were not proposed.
    NotProposed {
        /// The leader.
        to: NodeId,
        /// The encoded request id and the payload of each.
        requests: Vec<(Bytes, Bytes)>,
    },
    /// Nobody knows whether these proposals reached the leader.
    ProposalsLost {
        /// The encoded request id of each.
        ids: Vec<Bytes>,
    },
    /// The transfer of a snapshot to this peer has ended.
    SnapshotStatus {
        /// The receiver.
        to: NodeId,
        /// The snapshot's index.
        index: Index,
        /// True if the receiver has it on disk.
        arrived: bool,
        /// True if this member's own file is damaged or missing.
        damaged: bool,
    },
    /// This peer refused a request.
    Refused {
        /// The peer's header; checked before it is believed.
        header: PeerHeader,
        /// The answer.
        refusal: Refusal,
    },
    /// This peer answered a greeting.
    Greeted {
        /// Where the greeting was sent.
        url: String,
        /// The peer's header.
        header: PeerHeader,
        /// The answer.
        answer: GreetingAnswer,
    },
    /// A greeting got no answer.
    NotGreeted {
        /// Where the greeting was sent.
        url: String,
        /// The reason, for the log.
        why: String,
    },
    /// The requested snapshot is on disk, or the error that stops this member.
    SnapshotMade(Result<SnapshotFile, Error>),
    /// A received snapshot could not be written: this member has to stop.
    DiskFailed(Error),
}

/// A snapshot's file, as a receiver checks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotFile {
    /// Bytes in the file.
    pub length: u64,
    /// CRC32C of the file.
    pub checksum: u32,
}
