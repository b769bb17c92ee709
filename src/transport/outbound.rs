//! Snapshots, greetings and forwarded changes: requests of their own.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use axum::http::HeaderMap;
use axum::http::header::CONTENT_LENGTH;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use raft::eraftpb::Message;
use slog::{crit, info, warn};
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use super::call::{Answered, Call, Failure};
use super::{Shared, Target, allowance, wire};
use crate::channels::{
    Greeting, GreetingAnswer, Index, MemberRequest, NodeId, PeerReport, Refusal, Responder,
    SnapshotFile, Term,
};
use crate::codec;
use crate::error::RequestError;
use crate::metrics::PeerLabel;

/// Bytes of a snapshot's file that are read at once.
const CHUNK_BYTES: usize = 128 << 10;

/// Chunks that are read ahead of the network.
const CHUNKS_AHEAD: usize = 4;

/// The pause after a transfer that failed; it doubles while they fail.
const FAILURE_PAUSE: Duration = Duration::from_millis(100);
const FAILURE_PAUSE_MAX: Duration = Duration::from_secs(10);

/// Reports the end of one snapshot: sent, failed, aborted or panicked. Without a report, raft sends this
/// peer nothing else.
pub(super) struct SnapshotGuard {
    pub(super) shared: Arc<Shared>,
    pub(super) to: NodeId,
    pub(super) index: Index,
    /// It was set, and is cleared at the end.
    pub(super) on_its_way: Arc<AtomicBool>,
    pub(super) arrived: bool,
    /// True once the file turned out damaged or missing.
    pub(super) damaged: Arc<AtomicBool>,
    /// Transfers to this peer that failed one after the other, for reasons that another one may meet.
    pub(super) failures: Arc<AtomicU32>,
}

impl Drop for SnapshotGuard {
    fn drop(&mut self) {
        // First the flag: on the report raft may send the next one at once.
        self.on_its_way.store(false, Ordering::Release);
        let (to, index, arrived) = (self.to, self.index, self.arrived);
        let damaged = self.damaged.load(Ordering::Acquire);
        self.shared.report(PeerReport::SnapshotStatus { to, index, arrived, damaged });
    }
}

/// Reads the snapshot at `index` and `term`, which is `file`, into `chunk_tx`; blocks. Sets `damaged` if
/// it is not what `file` says. A closed channel is a normal event.
fn read_file(
    shared: &Shared,
    index: Index,
    term: Term,
    file: SnapshotFile,
    chunk_tx: &mpsc::Sender<io::Result<Bytes>>,
    damaged: &AtomicBool,
) {
    let fail = |why: String| {
        crit!(shared.logger, "cannot read the snapshot at index {}: {}", index, why);
        damaged.store(true, Ordering::Release);
        let _ = chunk_tx.blocking_send(Err(io::Error::other(why)));
    };
    let (found, mut reader) = match shared.snapshotter.open_raw(index, term) {
        Ok(opened) => opened,
        Err(error) => return fail(error.to_string()),
    };
    if found != file.length {
        return fail(format!("the file has {found} bytes, not {}", file.length));
    }
    let (mut remaining, mut checksum) = (file.length, 0);
    while remaining > 0 {
        let mut chunk = vec![0; remaining.min(CHUNK_BYTES as u64) as usize];
        if let Err(error) = reader.read_exact(&mut chunk) {
            return fail(error.to_string());
        }
        remaining -= chunk.len() as u64;
        checksum = crc32c::crc32c_append(checksum, &chunk);
        if remaining == 0 && checksum != file.checksum {
            return fail(format!("its checksum is {checksum:#010x}, not {:#010x}", file.checksum));
        }
        if chunk_tx.blocking_send(Ok(chunk.into())).is_err() {
            return;
        }
    }
}

/// Sends one snapshot: the framed message, then its file. `guard` reports how it ended.
pub(super) async fn send_snapshot(
    mut guard: SnapshotGuard,
    target: Target,
    message: Message,
    file: SnapshotFile,
) {
    let (shared, to, index) = (guard.shared.clone(), guard.to, guard.index);
    info!(
        shared.logger,
        "sending snapshot at index {} to peer {}: {} bytes", index, to, file.length
    );
    let mut head = Vec::new();
    wire::put_message(&mut head, &message);
    let mut headers = HeaderMap::new();
    wire::put_sequence(&mut headers, shared.next_sequence());
    wire::put_snapshot_file(&mut headers, file);
    // hyper fails a body that is shorter.
    headers.insert(CONTENT_LENGTH, (head.len() as u64 + file.length).into());
    let (chunk_tx, mut chunk_rx) = mpsc::channel(CHUNKS_AHEAD);
    let term = message.get_snapshot().get_metadata().term;
    let reading = (shared.clone(), shared.running.subscribe(), guard.damaged.clone());
    spawn_blocking(move || {
        let (shared, _running, damaged) = reading;
        read_file(&shared, index, term, file, &chunk_tx, &damaged);
    });
    // Counts the bytes that the connection took; dropped with the body after the last one.
    let progress_tx = watch::Sender::new(0);
    let progress_rx = progress_tx.subscribe();
    let chunks = stream::poll_fn(move |context| chunk_rx.poll_recv(context));
    let body = stream::iter([Ok(Bytes::from(head))]).chain(chunks).inspect_ok(move |chunk| {
        progress_tx.send_modify(|sent| *sent += chunk.len());
    });
    let call = Call {
        to: &target,
        path: "/raft/snapshot",
        headers,
        body: reqwest::Body::wrap_stream(body),
    };
    let patience = shared.config.snapshot_progress_timeout;
    let result = tokio::select! {
        answered = shared.call_without_deadline(call) => answered,
        why = stalled(progress_rx, patience, patience + allowance(file.length)) => {
            Err(Failure::Unknown(why))
        }
    };
    match result {
        Ok(_) => {
            guard.arrived = true;
            guard.failures.store(0, Ordering::Relaxed);
            let sent_bytes = &shared.config.metrics.peer_sent_bytes;
            if let Some(sent_bytes) = sent_bytes.get(&PeerLabel { peer: to }) {
                sent_bytes.inc_by(file.length);
            }
            info!(shared.logger, "sent snapshot at index {} to peer {}", index, to);
        }
        Err(failure) => {
            warn!(shared.logger, "snapshot at index {} to peer {} failed: {}", index, to, failure);
            if let Some(refused) = failure.report() {
                shared.report(refused);
            }
            // raft sends the next one as soon as it hears of this end. A peer that could not be reached
            // may be back at any time.
            if !matches!(failure, Failure::NotSent(_)) {
                let failures = guard.failures.fetch_add(1, Ordering::Relaxed);
                sleep((FAILURE_PAUSE * 2u32.saturating_pow(failures)).min(FAILURE_PAUSE_MAX)).await;
            }
        }
    }
}

/// Returns once a snapshot makes no progress: no chunk was taken for `patience`, or no answer came for
/// `answer_patience`, which covers the receiver's sync, after the last.
async fn stalled(
    mut progress_rx: watch::Receiver<usize>,
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

/// Greets the member at `url`.
pub(super) async fn greet(shared: Arc<Shared>, url: String, greeting: Greeting) {
    let patience = shared.config.half_election_timeout();
    let body = codec::encode(&greeting);
    let target = Target { id: 0, incarnation: 0, url: url.as_str().into() };
    let report = match shared.ask(&target, "/raft/greeting", body, patience).await {
        Ok(Answered { header, body, .. }) => match codec::decode::<GreetingAnswer>(&body) {
            Ok(answer) => PeerReport::Greeted { url, header, answer },
            Err(error) => PeerReport::NotGreeted { url, why: error.to_string() },
        },
        Err(failure) => match failure.report() {
            // A member that waits to begin logs why it has no answer from there.
            None | Some(PeerReport::Refused { refusal: Refusal::Mismatch(_), .. }) => {
                PeerReport::NotGreeted { url, why: failure.to_string() }
            }
            Some(refused) => refused,
        },
    };
    shared.report(report);
}

/// Forwards `change` to `target`, and its answer to `responder`.
pub(super) async fn forward_change(
    shared: Arc<Shared>,
    target: Target,
    change: MemberRequest,
    responder: Responder<()>,
) {
    let turn = shared.forwarding.acquire().await;
    let _turn = turn.expect("the semaphore is never closed");
    // From here on the change may be made, whatever the client hears.
    if !responder.mark_proposed() {
        return;
    }
    // The leader answers within the request timeout; the answer has to come back, too.
    let patience = shared.config.request_timeout + shared.config.half_election_timeout();
    let body = codec::encode(&change);
    let to = target.id;
    let answer = match shared.ask(&target, "/raft/members", body, patience).await {
        Ok(answered) => codec::decode::<Result<(), RequestError>>(&answered.body)
            .unwrap_or_else(|error| Err(unknown(to, &error))),
        Err(failure) => {
            if let Some(refused) = failure.report() {
                shared.report(refused);
            }
            Err(match failure {
                Failure::NotSent(_) | Failure::Refused { .. } => RequestError::unavailable(
                    format!("member {to} leads and did not take the change ({failure})"),
                ),
                Failure::Unknown(why) | Failure::OtherRelease(why) => unknown(to, &why),
            })
        }
    };
    responder.answer(answer);
}

/// The answer to a change that may have been made.
fn unknown(to: NodeId, why: &dyn std::fmt::Display) -> RequestError {
    RequestError::unknown(format!("the leader, member {to}, stopped answering ({why})"))
}
