//! Streams: many batches in the body of one long request.
//!
//! A request and an answer per batch cost more than the batch itself. So after a peer has accepted a
//! batch and allowed streaming, the next batches are frames of one long `POST /raft/stream`. The answer
//! is as long, and tells at intervals which frames were accepted:
//!
//! ```text
//! the request's body:  ┌───────────────┬───────────────┬───────┬───
//!                      │ number u64 LE │ length u32 LE │ batch │ …
//!                      └───────────────┴───────────────┴───────┴───
//! the answer's body:   17\n42\n…                  the number of the last frame that was taken,
//!                      the peer is stopping\n  or why the stream ends
//! ```
//! A frame is handled like a request to `/raft`: its sender is admitted again, its batch is delivered
//! whole or not at all, and it is never sent again. Frames and requests share one numbering, so that a
//! late batch is dropped either way.
//!
//! Any error ends the stream, and the next batch is a request, whose answer says more. The sender ends
//! a stream if a frame is not accepted within half an election timeout, or if it has nothing to send for
//! as long. The receiver ends it if no frame comes for an election timeout. So a dead or stopped peer
//! is detected as soon as with requests. The counterpart in etcd is rafthttp's stream.go.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::HeaderMap;
use axum::http::request::Parts;
use bytes::{Buf, Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, StreamExt, TryFutureExt, TryStreamExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::call::{Call, Failure, replaced};
use super::inbound::{
    BodyReader, Deadline, Taken, admit, check_length, deliver, malformed, not_ready,
};
use super::{Inbound, InboundBody, PEER_BODY_BYTES, Shared, Target, allowance, wire};
use crate::channels::PeerHeader;
use crate::membership::Sender;
use crate::ports::tls::{InUse, PeerCertificate};

/// The length of a frame's number and length, in bytes.
const FRAME_HEAD_BYTES: usize = 8 + 4;
/// Frames that the connection has not taken yet.
const FRAMES_AHEAD: usize = 2;
/// How often a receiver tells what it took, as a part of an election timeout.
const TELLS_PER_TIMEOUT: u32 = 8;
/// A receiver's buffer is kept after frames up to this length, in bytes.
const BUFFER_BYTES: usize = 64 << 10;
/// The longest line of an answer, in bytes.
const LINE_BYTES: usize = 1 << 10;

/// How long a sender keeps to requests after a stream that failed; it doubles while no stream works.
pub(super) const PAUSE_MIN: Duration = Duration::from_secs(1);
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(60);

/// The sender's end.
pub(super) struct Outgoing {
    shared: Arc<Shared>,
    /// `None` after the last frame.
    frame_tx: Option<mpsc::Sender<Bytes>>,
    /// The answer's body, once the peer has accepted the stream.
    answer: BoxStream<'static, Result<Bytes, Failure>>,
    /// What came of the line that is not whole yet.
    line: Vec<u8>,
    /// The frames that were not taken yet, as far as we know.
    untold: VecDeque<Frame>,
    /// The certificates that it was opened with.
    in_use: Option<InUse>,
    /// Resolves when they are replaced.
    replaced: BoxFuture<'static, ()>,
    /// By when the next of them has to be; without any, by when there has to be one.
    deadline: Instant,
    /// True if a frame was taken.
    pub(super) has_worked: bool,
}

/// A frame that was given to the connection.
struct Frame {
    number: u64,
    /// The length of its batch in bytes.
    length: u64,
    /// The request ids of the proposals in it.
    proposals: Vec<Bytes>,
}

impl Outgoing {
    /// Begins a stream to `target`. Frames may be sent at once.
    pub(super) fn open(shared: &Arc<Shared>, target: &Target) -> Self {
        let (frame_tx, mut frame_rx) = mpsc::channel::<Bytes>(FRAMES_AHEAD);
        let frames = stream::poll_fn(move |context| frame_rx.poll_recv(context));
        let frames = frames.map(Ok::<_, Infallible>);
        let lines = {
            let (shared, target) = (shared.clone(), target.clone());
            async move {
                let mut headers = HeaderMap::new();
                wire::put_sequence(&mut headers, shared.next_sequence());
                let body = reqwest::Body::wrap_stream(frames);
                let call = Call { to: &target, path: "/raft/stream", headers, body };
                let (_, answer) = shared.send(call).await?;
                Ok(answer.bytes_stream().map_err(Failure::unknown))
            }
        };
        // Before the client is taken: it may resolve early, never late.
        let in_use = shared.clients.borrow().in_use.clone();
        Self {
            shared: shared.clone(),
            frame_tx: Some(frame_tx),
            answer: lines.try_flatten_stream().boxed(),
            line: Vec::new(),
            untold: VecDeque::new(),
            replaced: replaced(in_use.as_ref()),
            in_use,
            deadline: Instant::now() + shared.config.half_election_timeout(),
            has_worked: false,
        }
    }

    /// Gives `batch` to the connection. If the stream ends while the batch waits, the batch is lost.
    /// `proposals` are the ids of the requests in it.
    pub(super) async fn send(
        &mut self,
        batch: &[u8],
        proposals: Vec<Bytes>,
    ) -> Result<(), Failure> {
        let number = self.shared.next_sequence().number;
        let length = u32::try_from(batch.len()).expect("a batch is below 4 GiB");
        let mut frame = BytesMut::with_capacity(FRAME_HEAD_BYTES + batch.len());
        frame.extend_from_slice(&number.to_le_bytes());
        frame.extend_from_slice(&length.to_le_bytes());
        frame.extend_from_slice(batch);
        self.untold.push_back(Frame { number, length: batch.len() as u64, proposals });
        if self.untold.len() == 1 {
            self.extend_deadline();
        }
        let frame_tx = self.frame_tx.clone().expect("nothing is sent after the last frame");
        tokio::select! {
            biased;
            Ok(permit) = frame_tx.reserve() => {
                permit.send(frame.freeze());
                Ok(())
            }
            ended = self.ended() => ended.and_then(|()| unknown("it ended")),
        }
    }

    /// The request ids in frames that may have been lost.
    pub(super) fn untold_proposals(self) -> Vec<Bytes> {
        self.untold.into_iter().flat_map(|frame| frame.proposals).collect()
    }

    /// True if the certificates that it was opened with are not in use any more. An idle stream then ends.
    pub(super) fn is_replaced(&self) -> bool {
        self.in_use.as_ref().is_some_and(InUse::is_replaced)
    }

    /// Ends the stream and waits until the peer has taken all of it.
    pub(super) async fn finish(&mut self) -> Result<(), Failure> {
        self.frame_tx = None;
        self.ended().await
    }

    /// Waits for the end; an error says why frames may have been lost. May be dropped and called again.
    pub(super) async fn ended(&mut self) -> Result<(), Failure> {
        loop {
            let read = tokio::select! {
                biased;
                read = self.answer.try_next() => read,
                () = &mut self.replaced, if self.untold.is_empty() => return Ok(()),
                // Sooner than the receiver would find that nothing comes.
                () = sleep_until(self.deadline), if self.untold.is_empty() => return Ok(()),
                () = sleep_until(self.deadline) => {
                    let waiting = self.untold.len();
                    return unknown(format!("{waiting} batches were not taken in time"));
                }
            };
            let chunk = match read? {
                Some(chunk) => chunk,
                None if self.untold.is_empty() => return Ok(()),
                None => return unknown("the stream ended"),
            };
            self.line.extend_from_slice(&chunk);
            while let Some(length) = self.line.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.line.drain(..=length).collect();
                let line = String::from_utf8_lossy(&line[..length]).into_owned();
                let Ok(number) = line.parse::<u64>() else { return unknown(line) };
                // The frames up to this number were taken.
                while self.untold.front().is_some_and(|oldest| oldest.number <= number) {
                    self.untold.pop_front();
                    self.has_worked = true;
                    self.extend_deadline();
                }
            }
            if self.line.len() > LINE_BYTES {
                return unknown("the answer has a line without end");
            }
        }
    }

    fn extend_deadline(&mut self) {
        let bytes = self.untold.iter().map(|frame| frame.length).sum();
        self.deadline =
            Instant::now() + self.shared.config.half_election_timeout() + allowance(bytes);
    }
}

fn unknown(why: impl Into<String>) -> Result<(), Failure> {
    Err(Failure::Unknown(why.into()))
}

/// The receiver's end: reads frames, and makes the lines of the answer.
struct Incoming {
    shared: Arc<Shared>,
    header: PeerHeader,
    boot: u64,
    reader: BodyReader,
    /// True once the head of the frame that is being read was taken in.
    is_length_known: bool,
    /// The last frame that was taken, if that was not told yet.
    untold: Option<u64>,
    /// When to tell it.
    tell_at: Instant,
}

/// Admits the sender of a stream, who must be a member here. Returns the body of the answer, which names
/// the accepted frames.
pub(super) fn accept(shared: &Arc<Shared>, parts: &Parts, body: Body) -> Taken<Body> {
    let (header, sender) = admit(shared, parts)?;
    let wire::Sequence { boot, .. } = wire::sequence(&parts.headers).map_err(malformed)?;
    check_member(sender)?;
    let election_timeout = shared.config.election_timeout;
    let incoming = Incoming {
        shared: shared.clone(),
        header,
        boot,
        reader: BodyReader::new(shared, body, Deadline::At(Instant::now() + election_timeout)),
        is_length_known: false,
        untold: None,
        tell_at: Instant::now(),
    };
    // `None` after the last line.
    let state = Some((incoming, closing(shared, parts).boxed()));
    let lines = stream::unfold(state, async |state| {
        let (mut incoming, mut closing) = state?;
        let (line, is_last) = incoming.next_line(&mut closing).await;
        Some((Ok::<_, Infallible>(line), (!is_last).then_some((incoming, closing))))
    });
    Ok(Body::from_stream(lines))
}

/// Resolves with the reason when this end has to close a stream.
fn closing(shared: &Shared, parts: &Parts) -> impl Future<Output = &'static str> + Send + use<> {
    let closed = shared.closed();
    let certificate = parts.extensions.get::<PeerCertificate>();
    let replaced = replaced(certificate.map(|certificate| &certificate.in_use));
    async move {
        tokio::select! {
            biased;
            () = closed => "the peer is stopping",
            () = replaced => "the peer's certificates were replaced",
        }
    }
}

fn check_member(sender: Sender) -> Taken<()> {
    match sender {
        Sender::Member => Ok(()),
        Sender::Stranger => Err(not_ready("only members may stream")),
    }
}

impl Incoming {
    /// The next line of the answer, and true if it is the last.
    async fn next_line(&mut self, closing: &mut BoxFuture<'_, &'static str>) -> (String, bool) {
        loop {
            let taken = tokio::select! {
                biased;
                why = &mut *closing => Err(not_ready(why)),
                () = sleep_until(self.tell_at), if self.untold.is_some() => {
                    return (self.tell(), false);
                }
                taken = self.take_frame() => taken,
            };
            let why = match taken {
                Ok(Some(number)) => {
                    if self.untold.replace(number).is_none() {
                        let interval = self.shared.config.election_timeout / TELLS_PER_TIMEOUT;
                        self.tell_at = Instant::now() + interval;
                    }
                    continue;
                }
                Ok(None) => String::new(),
                Err(rejection) => rejection.to_string().replace(['\r', '\n'], " ") + "\n",
            };
            return (self.tell() + &why, true);
        }
    }

    /// The line that tells what was taken; empty if nothing is left to tell.
    fn tell(&mut self) -> String {
        self.untold.take().map(|number| format!("{number}\n")).unwrap_or_default()
    }

    /// Reads and delivers one frame; its number, or `None` at the end of the body. May be dropped
    /// and called again.
    async fn take_frame(&mut self) -> Taken<Option<u64>> {
        let reader = &mut self.reader;
        if reader.buffer.is_empty() {
            let Some(chunk) = reader.chunk().await? else { return Ok(None) };
            reader.keep(&chunk, FRAME_HEAD_BYTES)?;
        }
        reader.fill(FRAME_HEAD_BYTES, "a frame").await?;
        let mut head = &reader.buffer[..FRAME_HEAD_BYTES];
        let (number, length) = (head.get_u64_le(), head.get_u32_le());
        let frame_length = FRAME_HEAD_BYTES + length as usize;
        if !std::mem::replace(&mut self.is_length_known, true) {
            check_length(length.into(), PEER_BODY_BYTES)?;
            let patience = self.shared.config.body_timeout + allowance(length.into());
            reader.deadline = Deadline::At(Instant::now() + patience);
        }
        reader.fill(frame_length, "a batch").await?;
        let (batch, room) = reader.split(frame_length);
        self.is_length_known = false;
        let messages = wire::messages(&batch[FRAME_HEAD_BYTES..]).map_err(malformed)?;
        drop(batch);
        if length as usize > BUFFER_BYTES {
            // The rest of a large buffer would keep all of its memory, which the permit of the batch
            // no longer covers.
            reader.buffer = BytesMut::from(&reader.buffer[..]);
        }
        reader.deadline = Deadline::At(Instant::now() + self.shared.config.election_timeout);
        // Admission may have changed since the last frame.
        check_member(self.shared.admission.admit(&self.header)?)?;
        let body = InboundBody::Messages { boot: self.boot, number, messages, answer: None };
        let inbound = Inbound { header: self.header.clone(), body, bytes: Some(room) };
        deliver(&self.shared, inbound)?;
        Ok(Some(number))
    }
}
