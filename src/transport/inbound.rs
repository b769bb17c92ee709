//! The six requests of the peer port.
//!
//! Each is handled in the same steps: headers → certificate → admission → room for the body → body →
//! node → answer. A step that fails gives a [`Rejection`], and nothing of the request is delivered.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_LENGTH;
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::{Buf, Bytes, BytesMut};
use http_body_util::BodyExt;
use raft::eraftpb::{Message, MessageType};
use slog::{debug, error};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};

use super::{Answer, Inbound, InboundBody, PEER_BODY_BYTES, Shared, allowance, wire};
use crate::channels::{NodeId, PEER_URL_BYTES_MAX, PeerHeader, PeerReport, Refusal, responder};
use crate::codec;
use crate::membership::{MEMBERS_MAX, REMOVED_MAX, Sender};
use crate::ports::tls::{PeerCertificate, Remote};
use crate::storage::snapshotter::Received;

/// The largest greeting or change of members, in bytes.
const SMALL_BODY_BYTES: u64 = 64 << 10;

/// The largest `MsgSnapshot` without its file, in bytes: members, removed ids, and the rest.
const SNAPSHOT_MESSAGE_BYTES: u64 =
    (MEMBERS_MAX * (PEER_URL_BYTES_MAX + 128) + REMOVED_MAX * 16 + (4 << 10)) as u64;

/// Chunks of a snapshot that wait to be written.
const CHUNKS_AHEAD: usize = 4;

pub(super) fn router(shared: Arc<Shared>) -> Router {
    Router::new().fallback(handle).with_state(shared)
}

async fn handle(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let path = if parts.method == Method::POST { parts.uri.path() } else { "" };
    let taken = match path {
        "/raft" => take_messages(&shared, &parts, body).await,
        "/raft/stream" => super::stream::accept(&shared, &parts, body).map(Response::new),
        "/raft/snapshot" => tokio::select! {
            biased;
            () = shared.closed() => Err(stopping()),
            taken = take_snapshot(&shared, &parts, body) => taken,
        },
        "/raft/greeting" => take_greeting(&shared, &parts, body).await,
        "/raft/members" => take_change(&shared, &parts, body).await,
        "/raft/status" => take_status(&shared, &parts),
        _ => {
            let why = "this is the port for peers; clients use the one given by --port\n";
            return (StatusCode::NOT_FOUND, why).into_response();
        }
    };
    // 0 if the sender did not say who it is.
    let sender = wire::identity(&parts.headers).map_or(0, |header| header.from);
    let mut answer = taken.unwrap_or_else(|rejection| reject(&shared, sender, rejection));
    if let Err(error) =
        wire::put_identity(answer.headers_mut(), &shared.admission.header(sender, 0))
    {
        // The flags allow no such URL; the sender will say that the answer is no member's.
        error!(shared.logger, "cannot answer a peer: {}", error);
    }
    answer
}

/// The answer to a request that is not taken: one line with the reason.
fn reject(shared: &Shared, sender: NodeId, rejection: Rejection) -> Response {
    let why = rejection.to_string();
    let mut headers = HeaderMap::new();
    let (status, reason) = match &rejection {
        Rejection::Malformed(status, _) => (*status, Some("malformed_request")),
        // Counted where it is logged.
        Rejection::Certificate(_) => (StatusCode::FORBIDDEN, None),
        Rejection::Refused(refusal) => {
            let reason = match refusal {
                Refusal::Mismatch(_) => "mismatch",
                Refusal::OtherIncarnation(_) => "other_incarnation",
                Refusal::Removed { .. } => "removed_member",
                Refusal::NotReady(_) => "not_ready",
            };
            (wire::put_refusal(&mut headers, refusal), Some(reason))
        }
    };
    debug!(shared.logger, "answered peer {} {}: {}", sender, status, why);
    if let Some(reason) = reason {
        shared.config.metrics.rejected(reason);
    }
    let line = format!("{}\n", why.replace(['\r', '\n'], " "));
    (status, headers, line).into_response()
}

/// Why a request is not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum Rejection {
    /// The request violates the protocol: 400, 408, 411 or 413.
    #[error("{1}")]
    Malformed(StatusCode, String),
    /// This sender is refused, or this member is not ready.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The certificate belongs to another member: 403.
    #[error("{0}")]
    Certificate(String),
}

/// The answer to a request that is taken, or a step towards it.
pub(super) type Taken<T = Response> = Result<T, Rejection>;

/// 400: the request violates the protocol.
pub(super) fn malformed(why: impl Into<String>) -> Rejection {
    Rejection::Malformed(StatusCode::BAD_REQUEST, why.into())
}

/// 503: the sender may try again.
pub(super) fn not_ready(why: &str) -> Rejection {
    Rejection::Refused(Refusal::NotReady(why.to_owned()))
}

/// 503: this member takes nothing more.
fn stopping() -> Rejection {
    not_ready("the peer is stopping")
}

/// Admits the sender by its headers and the certificate of its connection.
pub(super) fn admit(shared: &Shared, parts: &Parts) -> Taken<(PeerHeader, Sender)> {
    let header = identify(shared, parts)?;
    if header.to == 0 || header.cluster_id == 0 {
        return Err(malformed("only a greeting may leave its receiver or its cluster open"));
    }
    let sender = shared.admission.admit(&header)?;
    Ok((header, sender))
}

/// Reads the sender's identity. With TLS, a sender needs the certificate of the member that it names.
fn identify(shared: &Shared, parts: &Parts) -> Taken<PeerHeader> {
    let header = wire::identity(&parts.headers).map_err(|why| malformed(why.to_string()))?;
    let Some(tls) = &shared.config.tls else { return Ok(header) };
    let Some(PeerCertificate { certificate, address, .. }) = parts.extensions.get() else {
        return Err(Rejection::Certificate("a member has a certificate".to_owned()));
    };
    tls.check_member(Remote::Client(*address), certificate, header.from)
        .map_err(Rejection::Certificate)?;
    Ok(header)
}

/// The length that a request announces.
fn content_length(headers: &HeaderMap) -> Taken<u64> {
    // hyper answers a `Content-Length` that is no number, or is given twice, by itself.
    let value = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    value.and_then(|value| value.parse().ok()).ok_or_else(|| {
        let why = "a peer's request has a Content-Length".to_owned();
        Rejection::Malformed(StatusCode::LENGTH_REQUIRED, why)
    })
}

/// Checks that a body of `length` bytes has at most `limit`.
pub(super) fn check_length(length: u64, limit: u64) -> Taken<()> {
    if length > limit {
        let why = format!("a body of {length} bytes; at most {limit} are taken here");
        return Err(Rejection::Malformed(StatusCode::PAYLOAD_TOO_LARGE, why));
    }
    Ok(())
}

/// Reads a body of at most `limit` bytes. Returns the room that it takes, too.
async fn read_body(
    shared: &Shared,
    parts: &Parts,
    body: Body,
    limit: u64,
) -> Taken<(BytesMut, OwnedSemaphorePermit)> {
    let length = content_length(&parts.headers)?;
    check_length(length, limit)?;
    let deadline = Instant::now() + shared.config.body_timeout + allowance(length);
    let mut reader = BodyReader::new(shared, body, Deadline::At(deadline));
    // hyper ends the body there.
    reader.fill(length as usize, "the body").await?;
    Ok(reader.split(length as usize))
}

/// When a body is too slow.
pub(super) enum Deadline {
    /// All of it must arrive by then.
    At(Instant),
    /// The next byte must arrive within this time.
    Progress(Duration),
}

pub(super) struct BodyReader {
    body: Body,
    pub(super) deadline: Deadline,
    /// What [`fill`](Self::fill) has read.
    pub(super) buffer: BytesMut,
    /// The room for those bytes. It grows as they arrive: nothing is reserved for what is announced.
    room: OwnedSemaphorePermit,
    all_room: Arc<Semaphore>,
}

impl BodyReader {
    pub(super) fn new(shared: &Shared, body: Body, deadline: Deadline) -> Self {
        let all_room = shared.body_bytes.clone();
        let room = all_room.clone().try_acquire_many_owned(0).expect("there is room for nothing");
        Self { body, deadline, buffer: BytesMut::new(), room, all_room }
    }

    /// Reads until the buffer holds `length` bytes of `what`, or more. May be dropped and called again.
    pub(super) async fn fill(&mut self, length: usize, what: &str) -> Taken<()> {
        while self.buffer.len() < length {
            let chunk = self.chunk().await?;
            let chunk = chunk.ok_or_else(|| malformed(format!("{what} is cut short")))?;
            self.keep(&chunk, length)?;
        }
        Ok(())
    }

    /// Keeps a chunk in the buffer, which is to hold `length` bytes.
    pub(super) fn keep(&mut self, chunk: &[u8], length: usize) -> Taken<()> {
        let room = self.all_room.clone().try_acquire_many_owned(chunk.len() as u32);
        self.room
            .merge(room.map_err(|_| not_ready("too many bytes of peers wait to be taken here"))?);
        if self.buffer.capacity() - self.buffer.len() < chunk.len() {
            // Twice as much each time, as far as that is needed.
            let wanted = length.saturating_sub(self.buffer.len());
            let doubled = self.buffer.len().max(SMALL_BODY_BYTES as usize);
            self.buffer.reserve(wanted.min(doubled).max(chunk.len()));
        }
        self.buffer.extend_from_slice(chunk);
        Ok(())
    }

    /// Takes `length` bytes of the buffer, and their room.
    pub(super) fn split(&mut self, length: usize) -> (BytesMut, OwnedSemaphorePermit) {
        let room = self.room.split(length).expect("each byte in the buffer has room");
        (self.buffer.split_to(length), room)
    }

    /// The next bytes, `None` at the end of the body.
    pub(super) async fn chunk(&mut self) -> Taken<Option<Bytes>> {
        let until = match self.deadline {
            Deadline::At(instant) => instant,
            Deadline::Progress(patience) => Instant::now() + patience,
        };
        loop {
            let frame = timeout_at(until, self.body.frame()).await.map_err(|_| {
                let why = "the body came too slowly".to_owned();
                Rejection::Malformed(StatusCode::REQUEST_TIMEOUT, why)
            })?;
            let Some(frame) = frame else { return Ok(None) };
            let frame = frame.map_err(|error| malformed(format!("the body broke off: {error}")))?;
            // Trailers and empty frames are no progress: they do not move the deadline.
            if let Some(data) = frame.into_data().ok().filter(|data| !data.is_empty()) {
                return Ok(Some(data));
            }
        }
    }
}

/// Gives the node a request and waits for its verdict, for `patience` in all.
async fn ask_the_node<T>(
    shared: &Shared,
    patience: Duration,
    inbound: impl FnOnce(Answer<T>) -> Inbound,
) -> Taken<T> {
    let (answer, answer_rx) = oneshot::channel();
    let inbound = inbound(answer);
    let verdict = async {
        shared.inbound_tx.send(inbound).await.map_err(|_| stopping())?;
        Ok(answer_rx.await.map_err(|_| stopping())??)
    };
    timeout(patience, verdict).await.unwrap_or_else(|_| Err(not_ready("this member is busy")))
}

/// Has the node admit a sender that is no member here, before anything is kept for its body.
async fn announce(shared: &Shared, header: &PeerHeader, sender: Sender) -> Taken<()> {
    match sender {
        Sender::Member => Ok(()),
        Sender::Stranger => {
            let inbound = |answer| Inbound::new(header.clone(), InboundBody::Announced(answer));
            ask_the_node(shared, shared.config.verdict_timeout(), inbound).await
        }
    }
}

async fn take_messages(shared: &Shared, parts: &Parts, body: Body) -> Taken {
    let (header, sender) = admit(shared, parts)?;
    let wire::Sequence { boot, number } = wire::sequence(&parts.headers).map_err(malformed)?;
    if content_length(&parts.headers)? > SMALL_BODY_BYTES {
        announce(shared, &header, sender).await?;
    }
    let (batch, permit) = read_body(shared, parts, body, PEER_BODY_BYTES).await?;
    let messages = wire::messages(&batch).map_err(malformed)?;
    drop(batch);
    let inbound = |answer| {
        let body = InboundBody::Messages { boot, number, messages, answer };
        Inbound { header, body, bytes: Some(permit) }
    };
    let mut response = StatusCode::NO_CONTENT.into_response();
    match sender {
        Sender::Member => {
            deliver(shared, inbound(None))?;
            wire::put_may_stream(response.headers_mut());
        }
        Sender::Stranger => {
            let patience = shared.config.verdict_timeout();
            ask_the_node(shared, patience, |answer| inbound(Some(answer))).await?;
        }
    }
    Ok(response)
}

/// Gives the node a request that it does not answer here. If it is busy or gone, the request is dropped.
pub(super) fn deliver(shared: &Shared, inbound: Inbound) -> Taken<()> {
    let delivered = shared.inbound_tx.try_send(inbound);
    delivered.map_err(|_| not_ready("this member has too much to do, or is stopping"))
}

async fn take_greeting(shared: &Shared, parts: &Parts, body: Body) -> Taken {
    // The node answers every greeting itself.
    let header = identify(shared, parts)?;
    shared.admission.admit_greeting(&header)?;
    let (bytes, _permit) = read_body(shared, parts, body, SMALL_BODY_BYTES).await?;
    let greeting = codec::decode(&bytes).map_err(|error| malformed(error.to_string()))?;
    let inbound = |answer| Inbound::new(header, InboundBody::Greeting(greeting, answer));
    let verdict = ask_the_node(shared, shared.config.verdict_timeout(), inbound).await?;
    Ok(Response::new(codec::encode(&verdict).into()))
}

fn take_status(shared: &Shared, parts: &Parts) -> Taken {
    admit(shared, parts)?;
    if *shared.closing.borrow() {
        return Err(stopping());
    }
    // The status of a node that hangs would call it alive.
    let hangs_after = 2 * shared.config.election_timeout;
    if shared.config.metrics.since_last_tick().is_some_and(|since| since > hangs_after) {
        return Err(not_ready("this member's raft node hangs"));
    }
    let mut status = shared.config.status.borrow().clone();
    if !status.begun {
        return Err(not_ready("this member waits for its first start"));
    }
    // There may be thousands, and every member knows them.
    status.members.removed.clear();
    Ok(Response::new(codec::encode(&status).into()))
}

async fn take_change(shared: &Shared, parts: &Parts, body: Body) -> Taken {
    // The node decides on the sender and the change in one step.
    let (header, _) = admit(shared, parts)?;
    let (bytes, _permit) = read_body(shared, parts, body, SMALL_BODY_BYTES).await?;
    let change = codec::decode(&bytes).map_err(|error| malformed(error.to_string()))?;
    let deadline = Instant::now() + shared.config.request_timeout;
    let (responder, pending) = responder();
    deliver(shared, Inbound::new(header, InboundBody::ConfChange(change, responder)))?;
    Ok(Response::new(codec::encode(&pending.wait_until(deadline).await).into()))
}

/// The right to write one snapshot: at most one per sender, and few overall.
struct ReceivingSlot {
    shared: Arc<Shared>,
    sender: NodeId,
    _permit: OwnedSemaphorePermit,
}

impl ReceivingSlot {
    fn new(shared: &Arc<Shared>, sender: NodeId) -> Taken<Self> {
        let permit = shared.receiving.clone().try_acquire_owned();
        let permit = permit.map_err(|_| not_ready("other snapshots are being received here"))?;
        if !shared.receiving_from.lock().expect("nothing panics under it").insert(sender) {
            return Err(not_ready("a snapshot from the same member is being received here"));
        }
        Ok(Self { shared: shared.clone(), sender, _permit: permit })
    }
}

impl Drop for ReceivingSlot {
    fn drop(&mut self) {
        self.shared.receiving_from.lock().expect("nothing panics under it").remove(&self.sender);
    }
}

/// Receives a snapshot. The file is complete, checked and durable before the node sees the message. If
/// the node refuses the message, it purges the file.
async fn take_snapshot(shared: &Arc<Shared>, parts: &Parts, body: Body) -> Taken {
    let (header, sender) = admit(shared, parts)?;
    announce(shared, &header, sender).await?;
    let wire::Sequence { boot, number } = wire::sequence(&parts.headers).map_err(malformed)?;
    let file = wire::snapshot_file(&parts.headers).map_err(malformed)?;
    let length = content_length(&parts.headers)?;
    let slot = ReceivingSlot::new(shared, header.from)?;
    let patience = shared.config.snapshot_progress_timeout;
    let mut reader = BodyReader::new(shared, body, Deadline::Progress(patience));

    let (message, head_length) = read_snapshot_message(&mut reader).await?;
    if head_length.checked_add(file.length) != Some(length) {
        return Err(malformed(format!(
            "a body of {length} bytes for a message of {head_length} and a file of {}",
            file.length
        )));
    }

    let (chunk_tx, mut chunk_rx) = mpsc::channel::<Bytes>(CHUNKS_AHEAD);
    let metadata = message.get_snapshot().get_metadata();
    let (index, term) = (metadata.index, metadata.term);
    let writer = tokio::task::spawn_blocking(move || {
        let mut write = || {
            let mut receiver = slot.shared.snapshotter.receive(index, term, file)?;
            while let Some(chunk) = chunk_rx.blocking_recv() {
                receiver.write(&chunk)?;
            }
            receiver.finish()
        };
        // Reported from this thread, because the handler is gone if the sender hung up.
        write().map_err(|error| slot.shared.report(PeerReport::DiskFailed(error)))
    });
    let fed = feed(&mut reader, chunk_tx).await;
    let written = writer.await.map_err(|error| match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(_) => stopping(),
    })?;
    // The order names the cause: a failed disk stops the feeding, and a body that broke off makes the
    // file wrong.
    let received = written.map_err(|()| not_ready("this member's disk failed"))?;
    fed?;
    if let Received::Refused(why) = received {
        return Err(malformed(why));
    }

    let inbound =
        |answer| Inbound::new(header, InboundBody::Snapshot { boot, number, message, answer });
    ask_the_node(shared, patience / 2, inbound).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Reads the framed `MsgSnapshot`: the message, and the length of the frame.
async fn read_snapshot_message(reader: &mut BodyReader) -> Taken<(Message, u64)> {
    reader.fill(wire::LENGTH_BYTES, "the message").await?;
    let length = reader.buffer.get_u32_le();
    if u64::from(length) > SNAPSHOT_MESSAGE_BYTES {
        return Err(malformed(format!("a MsgSnapshot of {length} bytes without its file")));
    }
    reader.fill(length as usize, "the message").await?;
    let message = reader.buffer.split_to(length as usize);
    let message = wire::message(&message).map_err(malformed)?;
    if message.msg_type != MessageType::MsgSnapshot {
        return Err(malformed(format!("a {:?} where a MsgSnapshot belongs", message.msg_type)));
    }
    Ok((message, wire::LENGTH_BYTES as u64 + u64::from(length)))
}

/// Gives the rest of the body to the writer. Returning closes the channel.
async fn feed(reader: &mut BodyReader, chunk_tx: mpsc::Sender<Bytes>) -> Taken<()> {
    let mut next = Some(reader.buffer.split().freeze());
    while let Some(chunk) = next {
        if chunk_tx.send(chunk).await.is_err() {
            // The writer gave up and says why.
            break;
        }
        next = reader.chunk().await?;
    }
    Ok(())
}
