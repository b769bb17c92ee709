//! The way out: batches, snapshots, greetings and changes of members.

use std::io::{self, Read};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode};
use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use prometheus_client::metrics::counter::Counter;
use raft::eraftpb::{Message, MessageType};
use slog::{crit, info, warn};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

use super::{
    IDLE_CONNECTION_TIMEOUT, Shared, TransportConfig, allowance, payload_bytes, stream, wire,
};
use crate::channels::{
    Greeting, GreetingAnswer, Index, MemberRequest, NodeId, PeerHeader, PeerReport, Refusal,
    Responder, SnapshotFile, Term,
};
use crate::codec;
use crate::error::RequestError;
use crate::metrics::PeerLabel;
use crate::ports::tls::{Reason, Tls, check_member, kind, no_tls, tls_error};

/// The most bytes in a batch of several messages; one message may be larger. Small enough that a
/// lost batch costs little, large enough that a request per batch costs little, too.
const BATCH_BYTES: usize = 1 << 20;

/// The first pause after a failure; it doubles up to half an election timeout.
const BACKOFF_MIN: Duration = Duration::from_millis(10);

/// How long a removed peer's queue may take to drain.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The most bytes of a peer's answer that are read.
const ANSWER_BYTES: usize = 64 << 10;

/// Bytes of a snapshot's file that are read at once.
const CHUNK_BYTES: usize = 128 << 10;

/// Chunks that are read ahead of the network.
const CHUNKS_AHEAD: usize = 4;

/// The client that makes every request, each at most once.
///
/// Why no request is sent twice:
/// - `retry::never` turns off reqwest's own retries, and `Policy::none` its redirects.
/// - Below it, hyper-util (0.1.21, `client/legacy/client.rs`, `send_request`) tries a request again
///   on another connection if a reused one was closed, and reqwest leaves that on. It does so only
///   if hyper hands the whole request back, and hyper (1.12, `client/dispatch.rs`) does so only
///   with one still in the connection's mailbox. Once the connection's task took it, which is
///   before its first byte is written, an error comes without the request, and is final.
/// - The receiver drops a number that is not above the last one it saw: the second line.
///
/// HTTP/1 it has to be: a request whose future is dropped closes its connection (hyper's dispatcher
/// sees that nobody waits for the answer), so one that timed out is never used again. But before it
/// closes, hyper flushes what it took (1.12, `proto/h1/io.rs`, `poll_shutdown`), and to a peer that
/// reads nothing that takes for ever, with the batch in memory. So Linux is told to give up a
/// connection whose bytes are not taken for `patience`; elsewhere it does so in its own time.
pub(super) fn client(
    config: &TransportConfig,
    patience: Duration,
) -> reqwest::Result<reqwest::Client> {
    let tls = config.tls.as_ref().and_then(Tls::client_config).unwrap_or_else(no_tls);
    let builder = reqwest::Client::builder()
        .retry(reqwest::retry::never())
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .http1_only()
        .tcp_nodelay(true)
        .connect_timeout(config.half_election_timeout())
        // The answer brings the certificate, see `check_certificate`.
        .tls_info(true)
        .tls_backend_preconfigured(tls)
        .pool_idle_timeout(IDLE_CONNECTION_TIMEOUT);
    #[cfg(target_os = "linux")]
    let builder = builder.tcp_user_timeout(patience);
    #[cfg(not(target_os = "linux"))]
    let _ = patience;
    builder.build()
}

/// Why a request brought no answer to go by.
pub(super) enum Failure {
    /// No connection: the request cannot have been sent.
    NotSent(String),
    /// Anything may have happened to it.
    Lost(String),
    /// The peer answered and did not take it.
    Refused {
        /// Who answered.
        header: PeerHeader,
        /// What it answered.
        refusal: Refusal,
    },
}

impl Failure {
    pub(super) fn lost(error: reqwest::Error) -> Self {
        Failure::Lost(cause(&error))
    }

    /// A refusal that says something about who we are, and so is for the node to judge. "Not now"
    /// is none of these.
    fn report(&self) -> Option<PeerReport> {
        match self {
            Failure::Refused { refusal: Refusal::NotReady(_), .. } => None,
            Failure::Refused { header, refusal } => {
                Some(PeerReport::Refused { header: header.clone(), refusal: refusal.clone() })
            }
            Failure::NotSent(_) | Failure::Lost(_) => None,
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::NotSent(why) | Failure::Lost(why) => formatter.write_str(why),
            Failure::Refused { header, refusal } => {
                write!(formatter, "member {} answered: {refusal}", header.from)
            }
        }
    }
}

/// An answer of 2xx from the member that was meant.
pub(super) struct Answered {
    pub(super) header: PeerHeader,
    /// True if what follows may be streamed.
    may_stream: bool,
    pub(super) body: Vec<u8>,
}

/// One request: where it goes and what it says of itself.
pub(super) struct Call<'a> {
    pub(super) client: &'a reqwest::Client,
    /// The receiver; 0 if whoever answers is meant.
    pub(super) to: NodeId,
    pub(super) url: &'a str,
    pub(super) path: &'static str,
    /// Beside those that name the two ends.
    pub(super) headers: HeaderMap,
    pub(super) body: reqwest::Body,
}

impl Shared {
    /// Sends one request and waits for its answer, for `patience` altogether.
    pub(super) async fn call(
        &self,
        call: Call<'_>,
        patience: Duration,
    ) -> Result<Answered, Failure> {
        match timeout(patience, self.call_without_deadline(call)).await {
            Ok(answered) => answered,
            Err(_) => Err(Failure::Lost(format!("no answer within {patience:?}"))),
        }
    }

    async fn call_without_deadline(&self, call: Call<'_>) -> Result<Answered, Failure> {
        let (ours, response) = self.send(call).await?;
        self.read_answer(&ours, response).await
    }

    /// Sends one request; our header in it, and the answer's head.
    pub(super) async fn send(
        &self,
        call: Call<'_>,
    ) -> Result<(PeerHeader, reqwest::Response), Failure> {
        let ours = self.admission.header(call.to);
        let mut headers = call.headers;
        wire::put_identity(&mut headers, &ours)
            .map_err(|error| Failure::NotSent(error.to_string()))?;
        let url = format!("{}{}", call.url.trim_end_matches('/'), call.path);
        let request = call.client.post(url).headers(headers).body(call.body);
        let response = request.send().await.map_err(|error| {
            if let Some(tls) = &self.config.tls
                && let Some(error) = tls_error(&error)
            {
                let why = format!("the TLS handshake failed: {error}");
                tls.refuse_answer(Reason::Handshake, call.url, kind(error), &why);
            }
            // A builder's error is a URL that cannot be used.
            let not_sent = error.is_connect() || error.is_builder();
            let why = cause(&error);
            if not_sent { Failure::NotSent(why) } else { Failure::Lost(why) }
        })?;
        self.check_certificate(call.url, &response)?;
        Ok((ours, response))
    }

    /// With TLS, an answer counts only with the certificate of the member that it names. That the
    /// certificate holds the host that was asked, and is of the authority, was checked before.
    fn check_certificate(&self, url: &str, response: &reqwest::Response) -> Result<(), Failure> {
        let Some(tls) = &self.config.tls else { return Ok(()) };
        // An answer that names nobody is refused as such by whoever reads it.
        let Ok(header) = wire::identity(response.headers()) else { return Ok(()) };
        let info = response.extensions().get::<reqwest::tls::TlsInfo>();
        let certificate = info.and_then(reqwest::tls::TlsInfo::peer_certificate);
        check_member(certificate.unwrap_or_default(), header.from).map_err(|why| {
            let why = format!("answered in the name of member {}: {why}", header.from);
            tls.refuse_answer(Reason::Name, url, header.from.to_string(), &why);
            Failure::Lost(why)
        })
    }

    /// Reads the body of a short answer, and judges the whole.
    pub(super) async fn read_answer(
        &self,
        ours: &PeerHeader,
        mut response: reqwest::Response,
    ) -> Result<Answered, Failure> {
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(Failure::lost)? {
            body.extend_from_slice(&chunk);
            if body.len() > ANSWER_BYTES {
                return Err(Failure::Lost(format!("an answer of more than {ANSWER_BYTES} bytes")));
            }
        }
        answered(ours, response.status(), response.headers(), body)
    }
}

/// Judges an answer to a request with the header `ours`.
pub(super) fn answered(
    ours: &PeerHeader,
    status: StatusCode,
    headers: &HeaderMap,
    body: Vec<u8>,
) -> Result<Answered, Failure> {
    let line = || String::from_utf8_lossy(&body).lines().next().unwrap_or_default().to_owned();
    let header = wire::identity(headers)
        .map_err(|error| Failure::Lost(format!("answered {status} by no member: {error}")))?;
    if let Some(refusal) = wire::refusal(status, headers, ours.from, &line()) {
        // Whose word this is, and what it is worth, the node decides.
        return Err(Failure::Refused { header, refusal });
    }
    if !status.is_success() {
        return Err(Failure::Lost(format!("member {} answered {status}: {}", header.from, line())));
    }
    // A greeting goes to whoever listens there, and asks for the cluster's id.
    let cluster_matches = ours.cluster_id == 0 || header.cluster_id == ours.cluster_id;
    let member_matches = ours.to == 0 || header.from == ours.to;
    if (ours.to != 0 && !cluster_matches) || !member_matches || header.to != ours.from {
        return Err(Failure::Lost(format!(
            "member {} of cluster {:016x} asked member {} of it, but member {} of cluster {:016x} \
             answered member {}: check the peer URLs",
            ours.from, ours.cluster_id, ours.to, header.from, header.cluster_id, header.to
        )));
    }
    Ok(Answered { header, may_stream: wire::may_stream(headers), body })
}

/// What an error comes from, on one line: what reqwest and hyper put around it names the URL and the
/// layers, which the reader of a log line knows.
fn cause(error: &reqwest::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

/// What is known of a peer, for the log: one line per change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Activity {
    /// Nothing was sent yet.
    Unknown,
    Active,
    Inactive,
}

/// What waits for one peer.
pub(super) struct Queue {
    pub(super) queue_rx: mpsc::Receiver<Message>,
    /// The payload of what is in it.
    pub(super) queued_bytes: Arc<AtomicU64>,
}

impl Queue {
    async fn recv(&mut self) -> Option<Message> {
        let message = self.queue_rx.recv().await?;
        Some(self.taken(message))
    }

    fn try_recv(&mut self) -> Option<Message> {
        let message = self.queue_rx.try_recv().ok()?;
        Some(self.taken(message))
    }

    fn taken(&self, message: Message) -> Message {
        self.queued_bytes.fetch_sub(payload_bytes(&message), Ordering::Relaxed);
        message
    }
}

/// What waits for one peer, in batches.
struct Batches {
    queue: Queue,
    /// Taken from the queue, but too large for the batch before it.
    held: Option<Message>,
    /// The proposals in the batch that is being sent.
    proposals: Vec<Message>,
}

impl Batches {
    /// Waits for a message and takes what is queued behind it, while it fits. `None` once the peer
    /// is removed and nothing is left. May be dropped and called again.
    async fn next(&mut self) -> Option<Vec<u8>> {
        let mut next = match self.held.take() {
            Some(message) => Some(message),
            None => Some(self.queue.recv().await?),
        };
        let mut batch = Vec::new();
        let mut messages = 0;
        self.proposals.clear();
        while let Some(message) = next.take() {
            let full = batch.len() + wire::framed_length(&message) > BATCH_BYTES;
            if messages > 0 && (full || messages == wire::BATCH_MESSAGES) {
                self.held = Some(message);
                break;
            }
            wire::put_message(&mut batch, &message);
            messages += 1;
            if message.msg_type == MessageType::MsgPropose {
                self.proposals.push(message);
            }
            next = self.queue.try_recv();
        }
        Some(batch)
    }
}

/// Sends one peer its batches, one after the other.
pub(super) struct PeerSender {
    shared: Arc<Shared>,
    id: NodeId,
    url: Arc<str>,
    batches: Batches,
    /// While there is one, batches go by it.
    stream: Option<stream::Outgoing>,
    /// When there may be one.
    stream_from: Instant,
    /// The pause after the next that fails.
    stream_pause: Duration,
    activity: Activity,
    /// The pause after the next failure.
    backoff: Duration,
    sent_bytes: Counter,
}

impl PeerSender {
    /// A sender of what is queued for peer `id` to `url`.
    pub(super) fn new(shared: Arc<Shared>, id: NodeId, url: Arc<str>, queue: Queue) -> Self {
        let sent_bytes = &shared.config.metrics.peer_sent_bytes;
        let sent_bytes = sent_bytes.get_or_create_owned(&PeerLabel { peer: id });
        Self {
            shared,
            id,
            url,
            batches: Batches { queue, held: None, proposals: Vec::new() },
            stream: None,
            stream_from: Instant::now(),
            stream_pause: stream::PAUSE_MIN,
            activity: Activity::Unknown,
            backoff: BACKOFF_MIN,
            sent_bytes,
        }
    }

    /// Sends until the peer is removed and its queue is empty, or the time to drain it is over.
    pub(super) async fn run(mut self, removed_rx: oneshot::Receiver<()>) {
        let drain_timeout = async {
            // Nothing is ever sent on it: this is its other end being dropped.
            let _ = removed_rx.await;
            sleep(DRAIN_TIMEOUT).await;
        };
        tokio::select! {
            () = self.send_batches() => {}
            () = drain_timeout => {}
        }
    }

    async fn send_batches(&mut self) {
        loop {
            let batch = match &mut self.stream {
                None => self.batches.next().await,
                Some(stream) => tokio::select! {
                    biased;
                    end = stream.ended() => {
                        self.end_stream(end).await;
                        continue;
                    }
                    batch = self.batches.next() => batch,
                },
            };
            let Some(batch) = batch else { break };
            self.sent_bytes.inc_by(batch.len() as u64);
            let Some(stream) = &mut self.stream else {
                self.post(batch).await;
                continue;
            };
            match stream.send(&batch).await {
                Ok(()) => {}
                // It ended while the batch waited, which is lost then: raft repeats it.
                Err(stream::End::Quiet) => {
                    self.end_stream(stream::End::Failed(Failure::Lost("it ended".into()))).await;
                }
                Err(end) => self.end_stream(end).await,
            }
        }
        if let Some(stream) = self.stream.take() {
            stream.finish().await;
        }
    }

    /// Sends a batch as a request of its own. If it is taken, those that follow may be streamed.
    async fn post(&mut self, batch: Vec<u8>) {
        let length = batch.len() as u64;
        let mut headers = HeaderMap::new();
        wire::put_sequence(&mut headers, self.shared.next_sequence());
        let body = batch.into();
        let call = Call {
            client: &self.shared.client,
            to: self.id,
            url: &self.url,
            path: "/raft",
            headers,
            body,
        };
        // Connecting is part of it: a peer that is not there is as bad as one that is silent.
        let patience = self.shared.config.half_election_timeout() + allowance(length);
        match self.shared.call(call, patience).await {
            Ok(answered) => {
                // They arrived: what fails from here on is not theirs.
                self.batches.proposals.clear();
                self.succeeded();
                if answered.may_stream && Instant::now() >= self.stream_from {
                    self.stream = Some(stream::Outgoing::open(&self.shared, self.id, &self.url));
                }
            }
            Err(failure) => self.failed(&failure).await,
        }
    }

    async fn end_stream(&mut self, end: stream::End) {
        if self.stream.take().is_some_and(|stream| stream.has_worked) {
            self.stream_pause = stream::PAUSE_MIN;
        }
        if let stream::End::Failed(failure) = end {
            self.stream_from = Instant::now() + self.stream_pause;
            self.stream_pause = (self.stream_pause * 2).min(stream::PAUSE_MAX);
            self.failed(&failure).await;
        }
    }

    fn succeeded(&mut self) {
        self.backoff = BACKOFF_MIN;
        if self.activity != Activity::Active {
            self.activity = Activity::Active;
            info!(self.shared.logger, "peer {} became active", self.id);
        }
    }

    /// Reports a lost batch, drops what waited behind it, and pauses.
    async fn failed(&mut self, failure: &Failure) {
        let backoff_max = self.shared.config.half_election_timeout();
        let failures = &self.shared.config.metrics.peer_failures;
        failures.get_or_create(&PeerLabel { peer: self.id }).inc();
        if self.activity != Activity::Inactive {
            self.activity = Activity::Inactive;
            let id = self.id;
            warn!(
                self.shared.logger,
                "peer {} became inactive (message send to peer failed): {}", id, failure
            );
        }
        // What waited follows on what was lost, and is out of date once the peer is back. It is
        // dropped before the report, so that what raft sends in answer to the report is not.
        let batches = &mut self.batches;
        let mut unsent = match failure {
            Failure::NotSent(_) => std::mem::take(&mut batches.proposals),
            Failure::Refused { .. } | Failure::Lost(_) => Vec::new(),
        };
        unsent.extend(batches.held.take());
        for _ in 0..batches.queue.queue_rx.len() {
            unsent.extend(batches.queue.try_recv());
        }
        for message in unsent {
            self.shared.report_unsent(message);
        }
        if let Some(refused) = failure.report() {
            self.shared.report(refused);
            self.backoff = backoff_max;
        }
        self.shared.report(PeerReport::Unreachable(self.id));
        sleep(self.backoff.min(backoff_max)).await;
        self.backoff = (self.backoff * 2).min(backoff_max);
    }
}

/// Reports the end of one snapshot, however it comes: sent, failed, aborted or panicked. Without it
/// raft would wait for ever, and send this peer nothing else.
pub(super) struct SnapshotGuard {
    shared: Arc<Shared>,
    to: NodeId,
    index: Index,
    on_its_way: Arc<AtomicBool>,
    arrived: bool,
}

impl SnapshotGuard {
    /// For the snapshot at `index` to `to`. `on_its_way` was set, and is cleared at the end.
    pub(super) fn new(
        shared: Arc<Shared>,
        to: NodeId,
        index: Index,
        on_its_way: Arc<AtomicBool>,
    ) -> Self {
        Self { shared, to, index, on_its_way, arrived: false }
    }
}

impl Drop for SnapshotGuard {
    fn drop(&mut self) {
        // First the flag: on the report raft may send the next one at once.
        self.on_its_way.store(false, Ordering::Release);
        let (to, index, arrived) = (self.to, self.index, self.arrived);
        self.shared.report(PeerReport::SnapshotStatus { to, index, arrived });
    }
}

/// The body of a snapshot: the framed message, then the file, as it is read.
pub(super) struct SnapshotBody {
    head: Option<Bytes>,
    chunk_rx: mpsc::Receiver<io::Result<Bytes>>,
    /// Bytes that are still to come.
    remaining: u64,
    /// Counts the bytes that the connection took; dropped with the body after the last one.
    progress_tx: watch::Sender<u64>,
}

/// A snapshot's body and the end that its file, `length` bytes, is put into.
pub(super) fn snapshot_body(
    message: &Message,
    length: u64,
) -> (mpsc::Sender<io::Result<Bytes>>, SnapshotBody) {
    let (chunk_tx, chunk_rx) = mpsc::channel(CHUNKS_AHEAD);
    let mut head = Vec::new();
    wire::put_message(&mut head, message);
    let remaining = head.len() as u64 + length;
    let progress_tx = watch::Sender::new(0);
    (chunk_tx, SnapshotBody { head: Some(head.into()), chunk_rx, remaining, progress_tx })
}

impl Body for SnapshotBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let chunk = match self.head.take() {
            Some(head) => head,
            None if self.remaining == 0 => return Poll::Ready(None),
            None => match self.chunk_rx.poll_recv(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(chunk))) => chunk,
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Some(Err(error))),
                Poll::Ready(None) => {
                    let why = format!("the file ended {} bytes early", self.remaining);
                    let error = io::Error::new(io::ErrorKind::UnexpectedEof, why);
                    return Poll::Ready(Some(Err(error)));
                }
            },
        };
        let length = chunk.len() as u64;
        assert!(length <= self.remaining, "{length} bytes read, {} announced", self.remaining);
        self.remaining -= length;
        self.progress_tx.send_modify(|sent| *sent += length);
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn is_end_stream(&self) -> bool {
        self.remaining == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.remaining)
    }
}

/// Reads the snapshot at `index` and `term`, `length` bytes, into `chunk_tx`; blocks. That nobody
/// wants it any more is a normal event.
pub(super) fn read_file(
    shared: &Shared,
    index: Index,
    term: Term,
    length: u64,
    chunk_tx: &mpsc::Sender<io::Result<Bytes>>,
) {
    let (found, mut reader) = match shared.snapshotter.open_raw(index, term) {
        Ok(opened) => opened,
        Err(error) => {
            crit!(shared.logger, "cannot read the snapshot at index {}: {}", index, error);
            let _ = chunk_tx.blocking_send(Err(io::Error::other(error.to_string())));
            return;
        }
    };
    if found != length {
        let why = format!("the file has {found} bytes, raft announced {length}");
        let _ = chunk_tx.blocking_send(Err(io::Error::other(why)));
        return;
    }
    let mut remaining = length;
    while remaining > 0 {
        let mut chunk = vec![0; remaining.min(CHUNK_BYTES as u64) as usize];
        let read = reader.read_exact(&mut chunk).map(|()| Bytes::from(chunk));
        remaining -= read.as_ref().map_or(remaining, |chunk| chunk.len() as u64);
        if chunk_tx.blocking_send(read).is_err() {
            return;
        }
    }
}

/// Sends one snapshot; `guard` reports how it ended.
pub(super) async fn send_snapshot(
    shared: Arc<Shared>,
    url: Arc<str>,
    file: SnapshotFile,
    body: SnapshotBody,
    mut guard: SnapshotGuard,
) {
    let (to, index) = (guard.to, guard.index);
    info!(
        shared.logger,
        "sending snapshot at index {} to peer {}: {} bytes", index, to, file.length
    );
    let mut headers = HeaderMap::new();
    wire::put_sequence(&mut headers, shared.next_sequence());
    wire::put_snapshot_file(&mut headers, file);
    let progress_rx = body.progress_tx.subscribe();
    let body = reqwest::Body::wrap(body);
    let call = Call {
        client: &shared.snapshot_client,
        to,
        url: &url,
        path: "/raft/snapshot",
        headers,
        body,
    };
    let patience = shared.config.snapshot_progress_timeout;
    let result = tokio::select! {
        answered = shared.call_without_deadline(call) => answered,
        why = stalled(progress_rx, patience, patience + allowance(file.length)) => {
            Err(Failure::Lost(why))
        }
    };
    match result {
        Ok(_) => {
            guard.arrived = true;
            let sent_bytes = &shared.config.metrics.peer_sent_bytes;
            sent_bytes.get_or_create(&PeerLabel { peer: to }).inc_by(file.length);
            info!(shared.logger, "sent snapshot at index {} to peer {}", index, to);
        }
        Err(failure) => {
            warn!(shared.logger, "snapshot at index {} to peer {} failed: {}", index, to, failure);
            if let Some(refused) = failure.report() {
                shared.report(refused);
            }
        }
    }
}

/// Returns once a snapshot makes no progress: no chunk was taken for `patience`, or there was no
/// answer for `answer_patience` after the last. The receiver syncs the file before it answers,
/// hence the second one is longer.
async fn stalled(
    mut progress_rx: watch::Receiver<u64>,
    patience: Duration,
    answer_patience: Duration,
) -> String {
    loop {
        match timeout(patience, progress_rx.changed()).await {
            Ok(Ok(())) => {}
            // The body is gone: its last byte was taken.
            Ok(Err(_)) => {
                sleep(answer_patience).await;
                return format!("no answer within {answer_patience:?} after the last byte");
            }
            Err(_) => {
                let sent = *progress_rx.borrow();
                return format!("no progress for {patience:?} after {sent} bytes");
            }
        }
    }
}

/// Greets whoever listens at `url`.
pub(super) async fn greet(shared: Arc<Shared>, url: String, greeting: Greeting) {
    let body = codec::encode(&greeting).into();
    let headers = HeaderMap::new();
    let call =
        Call { client: &shared.client, to: 0, url: &url, path: "/raft/greeting", headers, body };
    let report = match shared.call(call, shared.config.half_election_timeout()).await {
        Ok(Answered { header, body, .. }) => match codec::decode::<GreetingAnswer>(&body) {
            Ok(answer) => PeerReport::Greeted { url, header, answer },
            Err(error) => PeerReport::NotGreeted { url, why: error.to_string() },
        },
        Err(failure) => {
            // A member that waits to begin logs why it has no answer from there.
            let is_mismatch =
                matches!(failure, Failure::Refused { refusal: Refusal::Mismatch(_), .. });
            let refused = failure.report().filter(|_| !is_mismatch);
            refused.unwrap_or_else(|| PeerReport::NotGreeted { url, why: failure.to_string() })
        }
    };
    shared.report(report);
}

/// Forwards `change` to member `to`, and its answer to `responder`.
pub(super) async fn forward_change(
    shared: Arc<Shared>,
    to: NodeId,
    url: Arc<str>,
    change: MemberRequest,
    responder: Responder<()>,
) {
    // From here on the change may be made, whatever the client hears.
    if !responder.mark_proposed() {
        return;
    }
    let body = codec::encode(&change).into();
    let headers = HeaderMap::new();
    let call = Call { client: &shared.client, to, url: &url, path: "/raft/members", headers, body };
    // The leader answers within the request timeout; the answer has to come back, too.
    let patience = shared.config.request_timeout + shared.config.half_election_timeout();
    let answer = match shared.call(call, patience).await {
        Ok(answered) => codec::decode::<Result<(), RequestError>>(&answered.body)
            .unwrap_or_else(|error| Err(lost(to, &error))),
        Err(failure) => {
            if let Some(refused) = failure.report() {
                shared.report(refused);
            }
            Err(match failure {
                Failure::NotSent(_) | Failure::Refused { .. } => RequestError::unavailable(
                    format!("member {to} leads and did not take the change ({failure})"),
                ),
                Failure::Lost(why) => lost(to, &why),
            })
        }
    };
    responder.answer(answer);
}

/// The answer to a change that may have been made.
fn lost(to: NodeId, why: &dyn std::fmt::Display) -> RequestError {
    RequestError::unknown(format!("the leader, member {to}, stopped answering ({why})"))
}
