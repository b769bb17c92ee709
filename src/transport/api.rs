//! What the transport and the raft node exchange.

use raft::eraftpb::Message;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::channels::{
    Greeting, GreetingAnswer, MemberRequest, NodeId, PeerHeader, Refusal, Responder, SnapshotFile,
};

/// What a node sends: the seam to the network. No method blocks.
pub trait Outbox: Send {
    /// Queues a raft message, except a `MsgSnapshot`, for the member it names. It is sent at most once.
    /// If it is dropped, the peer is reported as unreachable.
    fn send(&mut self, message: Message);

    /// Sends a `MsgSnapshot` and its file, one at a time per peer; `file` is what the receiver checks.
    /// The end is always reported, as
    /// [`PeerReport::SnapshotStatus`](crate::channels::PeerReport::SnapshotStatus).
    fn send_snapshot(&mut self, message: Message, file: SnapshotFile);

    /// Sets where member `id` listens, and which incarnation its messages are for; 0 if that is
    /// unknown. The same again changes nothing. After a change, the old queue drains to the old one.
    fn add_peer(&mut self, id: NodeId, url: &str, incarnation: u64);

    /// Accepts no more messages for member `id`. The queue drains for at most a second.
    fn remove_peer(&mut self, id: NodeId);

    /// Sends a greeting to the member at `url`. One report follows: `Greeted`, `Refused` or
    /// `NotGreeted`.
    fn greet(&mut self, url: &str, greeting: Greeting);

    /// Forwards a client's change of members to the leader `to`, once, and its answer to `responder`.
    /// If the change cannot have reached `to`, the answer is
    /// [`RequestError::Unavailable`](crate::error::RequestError::Unavailable); if it may have,
    /// [`RequestError::Unknown`](crate::error::RequestError::Unknown).
    fn forward_change(&mut self, to: NodeId, change: MemberRequest, responder: Responder<()>);
}

/// A request of a peer. The node answers it where an answer is expected. Dropping the answer unsent
/// means that this member is stopping.
#[derive(Debug)]
pub struct Inbound {
    /// The sender, as the request names it; admission has accepted it.
    pub header: PeerHeader,
    /// The request.
    pub body: InboundBody,
    /// Released when the node has taken the request.
    pub(super) bytes: Option<OwnedSemaphorePermit>,
}

impl Inbound {
    /// A request whose bytes are not counted.
    pub fn new(header: PeerHeader, body: InboundBody) -> Self {
        Self { header, body, bytes: None }
    }

    /// Its bytes, out of [`PEER_BODIES_BYTES`](super::PEER_BODIES_BYTES).
    pub fn bytes(&self) -> usize {
        self.bytes.as_ref().map_or(0, OwnedSemaphorePermit::num_permits)
    }
}

/// The kinds of requests.
#[derive(Debug)]
pub enum InboundBody {
    /// Raft messages, in the order in which they were sent.
    Messages {
        /// The sender's boot id.
        boot: u64,
        /// Rises with each batch of one boot; the node drops a batch whose number is not above the
        /// last. Batches and snapshots are numbered apart, because a snapshot takes minutes.
        number: u64,
        /// At least one.
        messages: Vec<Message>,
        /// `None` if the sender is a member: it was answered when its batch arrived.
        answer: Option<Answer<()>>,
    },
    /// A `MsgSnapshot` whose file is checked and durable here.
    Snapshot {
        /// The sender's boot id.
        boot: u64,
        /// Rises with each snapshot of one boot.
        number: u64,
        /// The message.
        message: Message,
        /// Says whether it was accepted.
        answer: Answer<()>,
    },
    /// A sender that is no member here announces a large body. Says whether it may send it.
    Announced(Answer<()>),
    /// The sender introduces itself.
    Greeting(Greeting, Answer<GreetingAnswer>),
    /// A change of members, forwarded from a client of the sender, and what takes the answer for it.
    ConfChange(MemberRequest, Responder<()>),
}

/// Answers a peer, with `T` or with a refusal.
pub type Answer<T> = oneshot::Sender<std::result::Result<T, Refusal>>;
