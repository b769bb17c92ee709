//! `GET /v1/watch`: the changes of keys, as server-sent events.
//!
//! A watcher has a [`Cursor`] into the store's [history](Changes) and no queue. So the memory of all watchers
//! is one batch of events for each. A watcher that is slow, or whose connection stalls, falls out of the
//! history, and is told so with a `reset` when it comes back.
//!
//! One task wakes the watchers, at most every few milliseconds, so that the rate of writes does not multiply
//! with their number. Together they write at most [`BYTES_PER_SECOND`], in turns.

use std::borrow::Cow;
use std::fmt::Write;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderName};
use axum::response::IntoResponse;
use bytes::Bytes;
use futures_util::stream::unfold;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, watch as channel};
use tokio::time::{Instant, sleep, sleep_until};

use super::ids::{ClusterId, bad_request, parse_cursor, quoted};
use super::list::Shown;
use super::query::Query;
use super::{Answer, Application, json};
use crate::error::RequestError;
use crate::httpapi::consistency;
use crate::kvstore::{Change, Changes, Consistency, Cursor, KvStore};
use crate::metrics::Metrics;
use crate::raft_node::Status;

/// Watchers of one port at a time.
pub const WATCHERS_MAX: usize = 1024;

/// A connection without events carries a comment this often, so that both sides notice when it is gone.
const COMMENT_INTERVAL: Duration = Duration::from_secs(15);
/// The first comment comes earlier: a client that has gone is noticed by writing to it, and until then it takes
/// the place of another watcher.
const FIRST_COMMENT: Duration = Duration::from_secs(1);
/// If other keys change, a watcher is told its new place this often, because it could not resume from one that
/// is no longer kept.
const PLACE_INTERVAL: Duration = Duration::from_secs(1);
/// Events that are written at a time.
const BATCH: usize = 256;
/// A batch ends after this many bytes.
const BATCH_BYTES: usize = 64 * 1024;
/// The most bytes that all watchers of a member write in a second. Without a bound, many watchers of a busy
/// prefix would take the time that the writes need.
const BYTES_PER_SECOND: f64 = (32 << 20) as f64;
/// The longest wait for a turn: as long as one batch of each watcher takes. Clients that come for one batch and
/// go make nobody wait longer.
const TURN_MAX: Duration = Duration::from_secs(3);
/// The shortest time between two wake-ups, and what it grows by for each watcher.
const WAKE_INTERVAL: Duration = Duration::from_millis(2);
const WAKE_INTERVAL_PER_WATCHER: Duration = Duration::from_micros(50);
/// The time between two wake-ups without watchers.
const IDLE_INTERVAL: Duration = Duration::from_millis(20);

static LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Wakes the watchers of all ports of a member, and shares out what they may write.
#[derive(Clone)]
pub struct Wakeups {
    woken: channel::Receiver<()>,
    turns: Arc<Turns>,
}

/// When the watchers may write. Those that have nothing to write take nothing from the others.
#[derive(Debug)]
struct Turns(Mutex<Instant>);

impl Turns {
    /// The end of the turn in which `bytes` are written, after those of the others.
    fn take(&self, bytes: usize) -> Instant {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = Duration::from_secs_f64(bytes as f64 / BYTES_PER_SECOND);
        let now = Instant::now();
        *taken = (now.max(*taken) + turn).min(now + TURN_MAX);
        *taken
    }
}

impl Wakeups {
    /// Starts the task that wakes the watchers of `store`. It ends with `stopping`.
    pub fn start(store: KvStore, metrics: Metrics, mut stopping: channel::Receiver<()>) -> Self {
        let (wake_tx, wake_rx) = channel::channel(());
        let wake = async move {
            loop {
                store.changed().await;
                wake_tx.send_replace(());
                let watchers = u32::try_from(metrics.watchers.get()).unwrap_or(0);
                let pause = WAKE_INTERVAL + WAKE_INTERVAL_PER_WATCHER * watchers;
                sleep(if watchers > 0 { pause } else { IDLE_INTERVAL }).await;
            }
        };
        tokio::spawn(async move {
            tokio::select! {
                () = wake => {}
                _ = stopping.changed() => {}
            }
        });
        Self { woken: wake_rx, turns: Arc::new(Turns(Mutex::new(Instant::now()))) }
    }
}

pub(super) async fn get(
    application: &Application,
    query: &str,
    headers: &HeaderMap,
    deadline: Instant,
) -> Answer {
    let query = Query::parse(query, &["prefix", "from", "values"])?;
    let prefix = query.get("prefix").unwrap_or_default().to_owned();
    let values = query.flag("values")?;
    let keys = &application.keys;
    let consistency = consistency(headers, keys.read)?;
    // A browser repeats the URL when it resumes, so the header is the newer one.
    let last = headers.get(&LAST_EVENT_ID).map(|id| id.to_str().unwrap_or("?"));
    let from = last.filter(|id| !id.is_empty()).or(query.get("from"));
    let from = from.map(|text| {
        parse_cursor(text).ok_or_else(|| {
            bad_request(format!(
                "{} is no place in a watch: give the id of an event, or \"from\" or \"index\" of a page of /v1/keys",
                quoted(text)
            ))
        })
    });
    let from = from.transpose()?;
    let permit =
        application.watchers.clone().try_acquire_owned().map_err(|_| {
            RequestError::unavailable("this member has as many watchers as it serves")
        })?;
    let id = application.cluster_id(deadline).await?;
    let cursor = start(&keys.store, id, from, consistency, deadline).await?;
    let watcher = Watcher {
        store: keys.store.clone(),
        id,
        prefix: prefix.into_bytes(),
        values,
        place: cursor.unwrap_or_default(),
        told: None,
        state: if cursor.is_some() { State::Watching } else { State::Elsewhere },
        may_write_at: Instant::now(),
        patience: FIRST_COMMENT,
        needs_leader: consistency == Consistency::Linearizable,
        status: application.status.clone(),
        wakeups: application.wakeups.woken.clone(),
        turns: application.wakeups.turns.clone(),
        stopping: application.stopping.clone(),
        _counted: Counted::new(keys.metrics.clone()),
        _permit: permit,
    };
    let events = unfold(watcher, async |mut watcher| {
        let events = watcher.next().await?;
        Some((Ok::<_, io::Error>(Bytes::from(events)), watcher))
    });
    let headers = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-store")];
    Ok((headers, Body::from_stream(events)).into_response())
}

/// The place at which a watch begins; `None` if it is one of another cluster.
async fn start(
    store: &KvStore,
    id: ClusterId,
    from: Option<(Option<ClusterId>, Cursor)>,
    consistency: Consistency,
    deadline: Instant,
) -> Answer<Option<Cursor>> {
    // Without a leader the client should ask another member. And a place that another member gave may be ahead
    // of this one.
    store.wait_for(consistency, deadline).await?;
    let applied = store.applied();
    let Some((cluster, cursor)) = from else { return Ok(Some(Cursor::after(applied))) };
    if cluster.is_some_and(|cluster| cluster != id) {
        return Ok(None);
    }
    if cursor.index > applied && consistency == Consistency::Linearizable {
        return Err(bad_request(format!(
            "index {} does not exist yet, the last one is {applied}: watch from an index that a response named",
            cursor.index
        )));
    }
    Ok(Some(cursor))
}

/// The data of a `delete`.
#[derive(Serialize)]
struct Removed<'a> {
    key: Cow<'a, str>,
}

/// The data of a `reset`.
#[derive(Serialize)]
struct Reset {
    reason: String,
}

enum State {
    Watching,
    /// The place to resume from is one of another cluster.
    Elsewhere,
    /// After a `reset`.
    Ended,
}

struct Watcher {
    store: KvStore,
    id: ClusterId,
    prefix: Vec<u8>,
    values: bool,
    /// Everything up to here was looked at.
    place: Cursor,
    /// The place that the client was told last.
    told: Option<Cursor>,
    state: State,
    may_write_at: Instant,
    /// The time until the next comment.
    patience: Duration,
    /// False if the client accepts what is stale.
    needs_leader: bool,
    status: channel::Receiver<Status>,
    wakeups: channel::Receiver<()>,
    turns: Arc<Turns>,
    stopping: channel::Receiver<()>,
    _counted: Counted,
    _permit: OwnedSemaphorePermit,
}

impl Watcher {
    /// The next events, as text; `None` at the end.
    async fn next(&mut self) -> Option<String> {
        match self.state {
            State::Watching => {}
            State::Elsewhere => {
                return Some(self.reset("the place to resume from is of another cluster"));
            }
            State::Ended => return None,
        }
        if self.told.is_none() {
            // So that a client that loses its connection before the first event resumes here.
            return Some(self.tell_place());
        }
        let written_at = Instant::now();
        let mut pause = self.may_write_at;
        loop {
            tokio::select! {
                biased;
                _ = self.stopping.changed() => return None,
                () = sleep_until(pause) => {}
            }
            self.wakeups.borrow_and_update();
            match self.store.changes(self.place, &self.prefix, BATCH) {
                Changes::Lost => return Some(self.reset("changes since then are no longer kept")),
                Changes::Kept(changes, reached) => {
                    let has_moved = reached != self.place;
                    self.place = reached;
                    let mut events = String::new();
                    for change in &changes {
                        self.write_event(&mut events, change);
                        self.told = Some(change.cursor());
                        if events.len() >= BATCH_BYTES {
                            self.place = change.cursor();
                            break;
                        }
                    }
                    if !events.is_empty() {
                        self.may_write_at = self.turns.take(events.len());
                        return Some(events);
                    }
                    if has_moved {
                        // There may be more to look at.
                        continue;
                    }
                }
            }
            let is_told = self.told == Some(self.place);
            let silence = if is_told { self.patience } else { PLACE_INTERVAL };
            tokio::select! {
                biased;
                _ = self.stopping.changed() => return None,
                // Its sender ends with `stopping`.
                woken = self.wakeups.changed() => {
                    woken.ok()?;
                    pause = Instant::now();
                }
                () = sleep_until(written_at + silence) => {
                    // A member without a leader may miss changes. The client resumes at another one.
                    if is_told && self.needs_leader && self.status.borrow().leader == 0 {
                        return None;
                    }
                    if !is_told {
                        return Some(self.tell_place());
                    }
                    self.patience = (2 * self.patience).min(COMMENT_INTERVAL);
                    return Some(":\n\n".to_owned());
                }
            }
        }
    }

    fn write_event(&self, events: &mut String, change: &Change) {
        let place = self.id.cursor(change.cursor());
        let (key, value, index) = (change.key(), change.value(), change.index());
        let (kind, data) = if change.is_removal {
            ("delete", json(&Removed { key: String::from_utf8_lossy(key) }))
        } else {
            ("put", json(&Shown::new(self.id, key, value, index, self.values)))
        };
        let written = write!(events, "id: {place}\nevent: {kind}\ndata: {data}\n");
        written.expect("writing to a string cannot fail");
    }

    /// An event with an id alone, which a client does not see but resumes from.
    fn tell_place(&mut self) -> String {
        self.told = Some(self.place);
        format!("id: {}\n\n", self.id.cursor(self.place))
    }

    /// The last event. The client lists the keys again and resumes from here: its list is of a later moment.
    fn reset(&mut self, why: &str) -> String {
        self.state = State::Ended;
        let place = self.id.cursor(Cursor::after(self.store.applied()));
        let reason = format!("{why}: list the keys again, then watch from there");
        format!("id: {place}\nevent: reset\ndata: {}\n", json(&Reset { reason }))
    }
}

/// Counts a watcher until it is dropped.
struct Counted(Metrics);

impl Counted {
    fn new(metrics: Metrics) -> Self {
        metrics.watchers.inc();
        Self(metrics)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.watchers.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watcher_waits_for_those_who_write_alone() {
        let turns = Turns(Mutex::new(Instant::now()));
        let begun = Instant::now();
        let alone = turns.take(BATCH_BYTES);
        assert!(alone < begun + Duration::from_millis(500), "it has the whole rate");
        for _ in 1..1024 {
            turns.take(BATCH_BYTES);
        }
        let last = turns.take(BATCH_BYTES);
        assert!(last >= begun + Duration::from_secs(1), "all together have it, too");
        for _ in 0..10_000 {
            assert!(turns.take(BATCH_BYTES) <= Instant::now() + TURN_MAX, "it ends");
        }
    }
}
