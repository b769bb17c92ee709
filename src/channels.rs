//! What the channels carry: plain types, shared by the two ends.
//!
//! The table of the channels themselves is at the top of the crate.

use std::any::Any;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::error::{Error, RequestError};

/// The longest peer URL in bytes: it stands in a header of every request between members.
pub const PEER_URL_BYTES_MAX: usize = 2048;
/// Requests that may wait in proposeC and in readC; one more is answered 503.
pub const REQUESTS_MAX: usize = 4096;
/// Requests that may wait in confChangeC; one more is answered 503.
pub const CONF_CHANGES_MAX: usize = 16;

/// The id of a member, never 0. An id that was removed is never used again.
pub type NodeId = u64;
/// A place in the replicated log, from 1.
pub type Index = u64;
/// A term of office of one leader.
pub type Term = u64;

/// Names one request of one run of one member.
///
/// A counter alone would let an entry of an earlier run answer a responder of this one, or a read take
/// another read's index: hence the member, and 64 random bits drawn at each start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId {
    /// The member that took the request from its client.
    pub member: NodeId,
    /// Drawn at random when that member started.
    pub boot: u64,
    /// Counts that run's requests.
    pub counter: u64,
}

impl RequestId {
    /// The length of an encoded id in bytes.
    pub const LEN: usize = 24;

    /// Encodes: member, boot and counter, 8 bytes each, little-endian.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[0..8].copy_from_slice(&self.member.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.boot.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.counter.to_le_bytes());
        bytes
    }

    /// Decodes what [`to_bytes`](Self::to_bytes) wrote; `None` if the length is another.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (member, rest) = bytes.split_first_chunk::<8>()?;
        let (boot, rest) = rest.split_first_chunk::<8>()?;
        let counter: &[u8; 8] = rest.try_into().ok()?;
        Some(Self {
            member: u64::from_le_bytes(*member),
            boot: u64::from_le_bytes(*boot),
            counter: u64::from_le_bytes(*counter),
        })
    }
}

/// Makes the two halves of one request's answer.
pub fn responder<T>() -> (Responder<T>, Pending<T>) {
    let (responder, pending, _) = responder_with_output::<T, ()>();
    (responder, pending)
}

/// As [`responder`], for a proposal: the state machine's output, an `O`, comes with the answer. The
/// raft node between the two halves does not know its type.
pub fn responder_with_output<T, O: Send + 'static>() -> (Responder<T>, Pending<T>, Output<O>) {
    let shared = Arc::new(Shared { begun: AtomicBool::new(false), output: Slot::<O>::default() });
    let (answer_tx, answer_rx) = oneshot::channel();
    let responder = Responder { shared: shared.clone(), answer_tx };
    (responder, Pending { shared: shared.clone(), answer_rx }, Output(shared))
}

/// What the two halves share, in one allocation.
#[derive(Debug)]
struct Shared<S: ?Sized> {
    /// True from when the request is proposed.
    begun: AtomicBool,
    /// A [`Slot`], of whatever type.
    output: S,
}

type Slot<O> = Mutex<Option<O>>;
type AnyShared = Arc<Shared<dyn Any + Send + Sync>>;

/// The place of a proposal's output.
pub struct Output<O>(Arc<Shared<Slot<O>>>);

impl<O> Output<O> {
    /// The output; present once the proposal was answered with [`Acknowledged::Applied`].
    pub fn take(self) -> Option<O> {
        self.0.output.lock().expect("nothing panics under this lock").take()
    }
}

/// The half of a request's answer that travels with the request. It is answered once; dropping it
/// unanswered says that this member is stopping.
#[derive(Debug)]
pub struct Responder<T> {
    shared: AnyShared,
    answer_tx: oneshot::Sender<Result<T, RequestError>>,
}

impl<T> Responder<T> {
    /// Marks the request as proposed: from here on its outcome is unknown until it is answered.
    /// Returns false if the client gave up first; then nothing may be proposed.
    pub fn mark_proposed(&self) -> bool {
        // `Pending::wait_until` closes the channel and then looks at `begun`: with a fence on both
        // sides, at least one of the two sees what the other did.
        self.shared.begun.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        !self.answer_tx.is_closed()
    }

    /// Takes [`mark_proposed`](Self::mark_proposed) back: nothing was proposed after all.
    pub fn mark_not_proposed(&self) {
        self.shared.begun.store(false, Ordering::SeqCst);
    }

    /// Answers the request. That nobody waits any more is a normal event.
    pub fn answer(self, answer: Result<T, RequestError>) {
        let _ = self.answer_tx.send(answer);
    }

    /// Answers a proposal that was applied. The output is dropped if the proposer does not want it.
    pub fn answer_with<O: Send + 'static>(self, answer: T, output: O) {
        if let Some(slot) = self.shared.output.downcast_ref::<Slot<O>>() {
            *slot.lock().expect("nothing panics under this lock") = Some(output);
        }
        self.answer(Ok(answer));
    }

    /// True once the client gave up.
    pub fn is_closed(&self) -> bool {
        self.answer_tx.is_closed()
    }
}

/// The half of a request's answer that the request's handler keeps.
#[derive(Debug)]
pub struct Pending<T> {
    shared: AnyShared,
    answer_rx: oneshot::Receiver<Result<T, RequestError>>,
}

impl<T> Pending<T> {
    /// The answer, if it has come; that it never will counts as one.
    pub fn try_take(&mut self) -> Option<Result<T, RequestError>> {
        match self.answer_rx.try_recv() {
            Ok(answer) => Some(answer),
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
    pub async fn wait_until(mut self, deadline: Instant) -> Result<T, RequestError> {
        let why = match tokio::time::timeout_at(deadline, &mut self.answer_rx).await {
            Ok(Ok(answer)) => return answer,
            Ok(Err(_)) => "this member is stopping",
            Err(_) => {
                self.answer_rx.close();
                fence(Ordering::SeqCst);
                // The answer may have come between the deadline and the close.
                if let Ok(answer) = self.answer_rx.try_recv() {
                    return answer;
                }
                "the deadline passed"
            }
        };
        if self.shared.begun.load(Ordering::SeqCst) {
            Err(RequestError::unknown(why))
        } else {
            Err(RequestError::unavailable(format!(
                "{why} before a leader took the request (does a majority of the members run?)"
            )))
        }
    }
}

/// What a request is answered that did not even fit into its channel.
pub fn not_taken<T>(error: &mpsc::error::TrySendError<T>) -> RequestError {
    let why = match error {
        mpsc::error::TrySendError::Full(_) => "too many requests are waiting",
        mpsc::error::TrySendError::Closed(_) => "this member is stopping",
    };
    RequestError::unavailable(why)
}

/// When a write is acknowledged (flag `--ack`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ack {
    /// Once it is on a majority's disks and applied here.
    #[default]
    Committed,
    /// Once it was handed to raft, as the original does: it may still be lost.
    Proposed,
}

/// What an acknowledged write is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acknowledged {
    /// Handed to raft, nothing more.
    Proposed,
    /// On a majority's disks and applied by this member's state machine, as this entry.
    Applied {
        /// The entry's index.
        index: Index,
        /// The entry's term.
        term: Term,
    },
}

/// proposeC: bytes for the log. What they mean is the state machine's affair.
#[derive(Debug)]
pub struct Proposal {
    /// The payload of the entry.
    pub data: Bytes,
    /// When to answer.
    pub ack: Ack,
    /// Whom to answer.
    pub responder: Responder<Acknowledged>,
}

/// A linearizable read: answered, in order with the entries on commitC, once the state machine
/// holds everything that was acknowledged anywhere before the request was made.
#[derive(Debug)]
pub struct ReadRequest {
    /// Whom to answer.
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

impl Requests {
    /// Requests to a node that has stopped: each is answered [`RequestError::Unavailable`].
    pub fn closed() -> Self {
        Self {
            propose_tx: mpsc::channel(1).0,
            read_tx: mpsc::channel(1).0,
            conf_change_tx: mpsc::channel(1).0,
        }
    }
}

/// confChangeC: a request about the members, answered after its entry is applied.
#[derive(Debug)]
pub struct ConfChangeRequest {
    /// What to change.
    pub change: MemberRequest,
    /// True if another member forwarded it; it is not forwarded again.
    pub forwarded: bool,
    /// Whom to answer.
    pub responder: Responder<()>,
}

/// One committed entry, for the state machine.
#[derive(Debug)]
pub struct CommittedEntry {
    /// Its place in the log.
    pub index: Index,
    /// Its term.
    pub term: Term,
    /// The payload, as it was proposed.
    pub data: Bytes,
    /// Whom to answer after applying, where the entry was proposed here.
    pub responder: Option<Responder<Acknowledged>>,
}

/// commitC: what the state machine has to do next, in the order of the log.
pub enum Commit {
    /// Apply these entries.
    Entries {
        /// In the order of the log; gaps belong to raft itself.
        entries: Vec<CommittedEntry>,
        /// Dropped when they are applied.
        applied: Applied,
    },
    /// Every entry that these reads have to see came before: answer them.
    Reads(Vec<Responder<()>>),
    /// Replace the state by a snapshot's.
    Restore(SnapshotRestore),
    /// Make a snapshot of the state as it is now.
    Snapshot(SnapshotRequest),
    /// The state holds everything that this member knew to be committed when it stopped.
    Replayed,
}

/// The "applied" signal of a batch of entries: dropping it gives the batch's bytes back to the node,
/// which takes no more entries while too many wait to be applied.
#[derive(Debug)]
pub struct Applied {
    bytes: u64,
    outstanding_bytes: Arc<AtomicU64>,
}

impl Applied {
    /// Adds `bytes` to `outstanding_bytes` until the signal is dropped.
    pub fn new(bytes: u64, outstanding_bytes: &Arc<AtomicU64>) -> Self {
        outstanding_bytes.fetch_add(bytes, Ordering::Relaxed);
        Self { bytes, outstanding_bytes: outstanding_bytes.clone() }
    }
}

impl Drop for Applied {
    fn drop(&mut self) {
        self.outstanding_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A snapshot's application bytes, checked, to replace the state with.
pub struct SnapshotRestore {
    /// The last entry that the state contains.
    pub index: Index,
    /// That entry's term.
    pub term: Term,
    /// What the state machine wrote when the snapshot was made.
    pub reader: Box<dyn Read + Send>,
}

/// Writes one snapshot's application bytes; given to [`SnapshotRequest::save`].
pub type SnapshotBody<'a> = &'a mut dyn FnMut(&mut dyn Write) -> std::io::Result<()>;

/// A request for a snapshot of the state at one applied index. It may be carried out on any thread.
pub struct SnapshotRequest {
    /// The applied index, and so the snapshot's.
    pub index: Index,
    /// Writes the file and reports to the node.
    pub save: Box<dyn FnOnce(SnapshotBody<'_>) + Send>,
}

/// Names the two ends of a message between members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerHeader {
    /// The cluster that the sender belongs to; 0 while a joiner does not know it yet.
    pub cluster_id: u64,
    /// The sender.
    pub from: NodeId,
    /// Drawn at random when the sender's data directory was made.
    pub incarnation: u64,
    /// Where the sender listens for its peers.
    pub url: String,
    /// The index of the entry that moved the sender there; 0 if none did, or it did not apply it yet.
    pub moved: Index,
    /// The receiver; 0 in a greeting to a URL whose member is not known.
    pub to: NodeId,
}

/// What a member tells another before the first raft message, and asks of it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Greeting {
    /// The peer URLs of the first `--cluster` list; empty for a member that joined.
    pub first_urls: Vec<String>,
}

/// What the receiver of a greeting knows.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct GreetingAnswer {
    /// True while the receiver has no raft state of its own, or none but its first entries.
    pub beginning: bool,
    /// True if the sender's id is a member in the receiver's applied state.
    pub counts_as_member: bool,
}

/// Why a member does not take a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another cluster, another receiver, another incarnation: 412.
    #[error("{0}")]
    Mismatch(String),
    /// The id is known under another incarnation: 412, and final for who asks to begin.
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
    /// Not now: this member has no raft state yet, or too much to do: 503.
    #[error("{0}")]
    NotReady(String),
}

/// What went wrong, or ended, on the way to a peer.
#[derive(Debug)]
pub enum PeerReport {
    /// A message to this peer was lost.
    Unreachable(NodeId),
    /// These proposals to a leader were not lost under way: they never left.
    NotProposed {
        /// The leader they were meant for.
        to: NodeId,
        /// Each one's request id, encoded, and its payload.
        requests: Vec<(Bytes, Bytes)>,
    },
    /// The snapshot on its way to this peer arrived and was kept, or not.
    SnapshotStatus {
        /// The receiver.
        to: NodeId,
        /// The snapshot's index.
        index: Index,
        /// True if the receiver has it on disk.
        arrived: bool,
    },
    /// This peer refused us.
    Refused {
        /// Who answered; checked before it is believed.
        header: PeerHeader,
        /// What it answered.
        refusal: Refusal,
    },
    /// This peer answered a greeting.
    Greeted {
        /// Where the greeting was sent.
        url: String,
        /// Who answered.
        header: PeerHeader,
        /// What it answered.
        answer: GreetingAnswer,
    },
    /// This peer told its status.
    Status {
        /// Who answered.
        header: PeerHeader,
        /// The [`Status`](crate::raft_node::Status), encoded.
        status: Vec<u8>,
    },
    /// A greeting got no answer; `why` is for the log.
    NotGreeted {
        /// Where the greeting was sent.
        url: String,
        /// What happened.
        why: String,
    },
    /// The snapshot that was asked for is on disk; or the error that stops this member.
    SnapshotMade(Result<SnapshotFile, Error>),
    /// A snapshot that arrived could not be written here: this member has to stop.
    DiskFailed(Error),
}

/// A snapshot's file: what a receiver checks it against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotFile {
    /// Bytes in the file.
    pub length: u64,
    /// CRC32C of the file.
    pub checksum: u32,
}
