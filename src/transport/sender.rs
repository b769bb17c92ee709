//! The task that sends one peer its messages, in batches.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::http::HeaderMap;
use bytes::Bytes;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use raft::eraftpb::{Message, MessageType};
use slog::{info, warn};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep};

use super::call::{Call, Failure};
use super::{Shared, Target, allowance, payload_bytes, stream, wire};
use crate::channels::PeerReport;
use crate::metrics::PeerLabel;

/// The most bytes in a batch of several messages; one message may be larger. Small enough that a
/// lost batch costs little, large enough that the cost of a request is shared.
const BATCH_BYTES: usize = 1 << 20;

/// The first pause after a failure; it doubles up to a tenth of an election timeout, and is half of one
/// after a refusal. Together with the time for a connection it bounds how soon members that are no longer
/// cut off serve again.
const BACKOFF_MIN: Duration = Duration::from_millis(10);

/// How long a removed peer's queue may take to drain.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// What waits for one peer, in batches.
struct Batches {
    queue_rx: mpsc::Receiver<Message>,
    /// The payload of what is in the queue.
    queued_bytes: Arc<AtomicU64>,
    /// Taken from the queue, but not yet into a batch.
    held: Option<Message>,
    /// The proposals in the batch that is being sent.
    proposals: Vec<Message>,
}

impl Batches {
    /// The next message that waits.
    fn try_next(&mut self) -> Option<Message> {
        self.held.take().or_else(|| self.queue_rx.try_recv().ok().inspect(|it| self.count_off(it)))
    }

    fn count_off(&self, message: &Message) {
        self.queued_bytes.fetch_sub(payload_bytes(message), Ordering::Relaxed);
    }

    /// Waits for a message and takes what is queued behind it, while it fits. `None` once the peer
    /// is removed and nothing is left. May be dropped and called again.
    async fn next(&mut self) -> Option<Vec<u8>> {
        if self.held.is_none() {
            let message = self.queue_rx.recv().await?;
            self.count_off(&message);
            self.held = Some(message);
        }
        let mut batch = Vec::new();
        let mut messages = 0;
        self.proposals.clear();
        while let Some(message) = self.try_next() {
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
        }
        Some(batch)
    }
}

/// The encoded ids of the requests in these proposals.
fn request_ids(proposals: Vec<Message>) -> Vec<Bytes> {
    let entries = proposals.into_iter().flat_map(|message| message.entries.into_iter());
    entries.map(|entry| entry.context).collect()
}

/// Sends one peer its batches, one after the other.
pub(super) struct PeerSender {
    shared: Arc<Shared>,
    target: Target,
    batches: Batches,
    /// While there is one, batches go by it.
    stream: Option<stream::Outgoing>,
    /// When there may be one.
    stream_from: Instant,
    /// The pause after the next that fails.
    stream_pause: Duration,
    /// For the log, one line per change; `None` until a batch was sent.
    is_active: Option<bool>,
    /// True if it was logged, since the peer became inactive, that it runs another release.
    has_named_release: bool,
    /// The pause after the next failure.
    backoff: Duration,
    sent_bytes: Counter,
    failures: Counter,
}

impl PeerSender {
    /// Sends to `target` what is queued, until the peer is removed and its queue is empty, or the time to
    /// drain it is over.
    pub(super) async fn run(
        shared: Arc<Shared>,
        target: Target,
        queue_rx: mpsc::Receiver<Message>,
        queued_bytes: Arc<AtomicU64>,
        removed_rx: oneshot::Receiver<()>,
    ) {
        let (metrics, label) = (&shared.config.metrics, PeerLabel { peer: target.id });
        // There are none if the peer was removed before this task ran.
        let owned = |counter: &Family<PeerLabel, Counter>| {
            counter.get(&label).map(|counter| counter.clone()).unwrap_or_default()
        };
        let (sent_bytes, failures) =
            (owned(&metrics.peer_sent_bytes), owned(&metrics.peer_failures));
        let mut sender = Self {
            shared,
            target,
            batches: Batches { queue_rx, queued_bytes, held: None, proposals: Vec::new() },
            stream: None,
            stream_from: Instant::now(),
            stream_pause: stream::PAUSE_MIN,
            is_active: None,
            has_named_release: false,
            backoff: BACKOFF_MIN,
            sent_bytes,
            failures,
        };
        let drain_timeout = async {
            // Nothing is ever sent on it: this is its other end being dropped.
            let _ = removed_rx.await;
            sleep(DRAIN_TIMEOUT).await;
        };
        tokio::select! {
            () = sender.send_batches() => {}
            () = drain_timeout => {}
        }
    }

    async fn send_batches(&mut self) {
        loop {
            let batch = match &mut self.stream {
                None => self.batches.next().await,
                Some(stream) => tokio::select! {
                    biased;
                    ended = stream.ended() => {
                        self.end_stream(ended).await;
                        continue;
                    }
                    batch = self.batches.next() => batch,
                },
            };
            let Some(batch) = batch else { break };
            self.sent_bytes.inc_by(batch.len() as u64);
            // A busy stream is never idle, so it does not end by itself.
            if let Some(stream) = &mut self.stream
                && stream.is_replaced()
            {
                let finished = stream.finish().await;
                let is_lost = finished.is_err();
                self.end_stream(finished).await;
                if is_lost {
                    // With what it followed on.
                    continue;
                }
            }
            let Some(stream) = &mut self.stream else {
                self.post(batch).await;
                continue;
            };
            let proposals = request_ids(std::mem::take(&mut self.batches.proposals));
            if let Err(failure) = stream.send(&batch, proposals).await {
                self.end_stream(Err(failure)).await;
            }
        }
        if let Some(stream) = &mut self.stream {
            let _ = stream.finish().await;
        }
    }

    /// Sends a batch as a request of its own. If it is taken, those that follow may be streamed.
    async fn post(&mut self, batch: Vec<u8>) {
        let length = batch.len() as u64;
        let mut headers = HeaderMap::new();
        wire::put_sequence(&mut headers, self.shared.next_sequence());
        let call = Call { to: &self.target, path: "/raft", headers, body: batch.into() };
        // Connecting is part of it: a peer that is not there is as bad as one that is silent.
        let patience = self.shared.config.half_election_timeout() + allowance(length);
        match self.shared.call(call, patience).await {
            Ok(answered) => {
                // These proposals arrived. A later failure does not concern them.
                self.batches.proposals.clear();
                self.succeeded();
                if answered.may_stream && Instant::now() >= self.stream_from {
                    self.stream = Some(stream::Outgoing::open(&self.shared, &self.target));
                }
            }
            Err(failure) => self.failed(&failure).await,
        }
    }

    async fn end_stream(&mut self, ended: Result<(), Failure>) {
        let Some(stream) = self.stream.take() else { return };
        if stream.has_worked {
            self.stream_pause = stream::PAUSE_MIN;
        }
        if let Err(failure) = ended {
            self.report_lost(stream.untold_proposals());
            self.stream_from = Instant::now() + self.stream_pause;
            self.stream_pause = (self.stream_pause * 2).min(stream::PAUSE_MAX);
            self.failed(&failure).await;
        }
    }

    /// Tells the node of proposals that nobody knows the fate of: their clients need not wait any longer.
    fn report_lost(&self, ids: Vec<Bytes>) {
        if !ids.is_empty() {
            self.shared.report(PeerReport::ProposalsLost { ids });
        }
    }

    fn succeeded(&mut self) {
        self.backoff = BACKOFF_MIN;
        if self.is_active.replace(true) != Some(true) {
            info!(self.shared.logger, "peer {} became active", self.target.id);
        }
    }

    /// Reports a lost batch, drops what waited behind it, and pauses.
    async fn failed(&mut self, failure: &Failure) {
        let backoff_max = self.shared.config.election_timeout / 10;
        let is_other_release = matches!(failure, Failure::OtherRelease(_));
        self.failures.inc();
        if self.is_active.replace(false) != Some(false) {
            let id = self.target.id;
            warn!(
                self.shared.logger,
                "peer {} became inactive (message send to peer failed): {}", id, failure
            );
            self.has_named_release = is_other_release;
        } else if is_other_release && !self.has_named_release {
            // It was inactive already, because it was stopped to get that release.
            warn!(self.shared.logger, "peer {} stays inactive: {}", self.target.id, failure);
            self.has_named_release = true;
        }
        // What waited follows on what was lost, and is out of date once the peer is back. It is
        // dropped before the report, so that what raft sends in answer to the report is not.
        let batches = &mut self.batches;
        let proposals = std::mem::take(&mut batches.proposals);
        let (mut unsent, lost) = match failure {
            Failure::NotSent(_) => (proposals, Vec::new()),
            Failure::Refused { .. } | Failure::Unknown(_) | Failure::OtherRelease(_) => {
                (Vec::new(), proposals)
            }
        };
        unsent.extend(batches.held.take());
        for _ in 0..batches.queue_rx.len() {
            unsent.extend(batches.try_next());
        }
        self.report_lost(request_ids(lost));
        for message in unsent {
            self.shared.report_unsent(message);
        }
        let mut pause = self.backoff.min(backoff_max);
        if let Some(refused) = failure.report() {
            self.shared.report(refused);
            pause = self.shared.config.half_election_timeout();
        }
        self.shared.report(PeerReport::Unreachable(self.target.id));
        sleep(pause).await;
        self.backoff = (self.backoff * 2).min(backoff_max);
    }
}
