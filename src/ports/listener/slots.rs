//! Who keeps a connection when there are too many: a port always accepts, and closes the connection that
//! has shown least. So silent sockets, however many, keep nobody else out.
//!
//! First go connections without a request so far, the oldest first; then those that wait for another
//! request, the longest idle first. A connection whose request is being answered keeps its place: requests
//! have deadlines of their own. If all have one, the new connection is closed. However fast new ones come,
//! each has [`GRACE`] to send its first request; the next ones wait in the socket's backlog meanwhile.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::response::Response;
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

/// A response's body up to this length fits into a connection's buffer.
const SMALL_BYTES: u64 = super::HEADER_BYTES as u64;

/// How long a new connection cannot be evicted, counted from the first run of its task: the runtime may
/// accept hundreds before it runs any of their tasks. A client sends its first request a round trip after it
/// has connected, and on a busy machine some milliseconds pass before either side is scheduled. A longer time
/// would let the backlog overflow sooner: the client port still accepts 50,000 connections per second when it
/// is full, the admin port 3,000.
const GRACE: Duration = Duration::from_millis(20);

/// The connections of one port.
pub(super) struct Slots {
    max: usize,
    taken: Arc<Mutex<Vec<Weak<Slot>>>>,
}

/// One connection.
pub(super) struct Slot {
    shown: Mutex<Shown>,
    is_evicted: AtomicBool,
    evicted: Notify,
}

/// What a connection has shown. The order is that of eviction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Shown {
    /// No request since its task first ran, then.
    Nothing(Instant),
    /// It was accepted, and its task has not run yet.
    Accepted,
    /// A request, which was answered then.
    Request(Instant),
    /// A request that is being answered.
    InRequest,
}

impl Slots {
    /// Places for `max` connections.
    pub fn new(max: usize) -> Self {
        Self { max, taken: Arc::default() }
    }

    /// A place for a new connection, which another one may have to leave. `None` if all are in requests.
    pub async fn take(&self) -> Option<Arc<Slot>> {
        loop {
            match self.try_take() {
                Ok(slot) => return slot,
                Err(too_young) => sleep(too_young).await,
            }
        }
    }

    /// An error says how long the one that would have to leave still has.
    fn try_take(&self) -> Result<Option<Arc<Slot>>, Duration> {
        let mut taken = self.taken.lock().expect("nothing panics under it");
        if taken.len() >= self.max {
            taken.retain(|slot| slot.strong_count() > 0);
        }
        if taken.len() >= self.max {
            let alive =
                taken.iter().enumerate().filter_map(|(at, slot)| Some((at, slot.upgrade()?)));
            let Some((least, slot)) = alive.min_by_key(|(_, slot)| slot.shown()) else {
                return Ok(None);
            };
            match slot.shown() {
                Shown::Nothing(since) if since.elapsed() < GRACE => {
                    return Err(GRACE.saturating_sub(since.elapsed()));
                }
                Shown::Accepted => return Err(GRACE),
                Shown::Nothing(_) | Shown::Request(_) => {}
                Shown::InRequest => return Ok(None),
            }
            slot.is_evicted.store(true, Ordering::Release);
            slot.evicted.notify_one();
            taken.swap_remove(least);
        }
        let slot = Arc::new(Slot {
            shown: Mutex::new(Shown::Accepted),
            is_evicted: AtomicBool::new(false),
            evicted: Notify::new(),
        });
        taken.push(Arc::downgrade(&slot));
        Ok(Some(slot))
    }
}

impl Slot {
    fn shown(&self) -> Shown {
        *self.shown.lock().expect("nothing panics under it")
    }

    fn show(&self, shown: Shown) {
        *self.shown.lock().expect("nothing panics under it") = shown;
    }

    /// The connection's task runs: from now on it can show something.
    pub fn begin(&self) {
        self.show(Shown::Nothing(Instant::now()));
    }

    /// Resolves when another connection gets this place.
    pub async fn evicted(&self) {
        while !self.is_evicted.load(Ordering::Acquire) {
            self.evicted.notified().await;
        }
    }

    /// Resolves if there was no request within `patience`.
    pub async fn is_silent_for(&self, patience: Duration) {
        sleep(patience).await;
        if !matches!(self.shown(), Shown::Nothing(_) | Shown::Accepted) {
            std::future::pending().await
        }
    }

    /// Answers a request, which keeps the place until its response was given to the connection.
    pub fn during<A: Future<Output = Result<Response, Infallible>>>(
        self: &Arc<Self>,
        answering: A,
    ) -> impl Future<Output = A::Output> + use<A> {
        let in_request = InRequest::new(self.clone());
        async move {
            let response = answering.await?;
            // The connection takes a short body at once.
            if response.body().size_hint().exact().is_some_and(|bytes| bytes <= SMALL_BYTES) {
                return Ok(response);
            }
            Ok(response.map(|body| Body::new(Held { body, _in_request: in_request })))
        }
    }
}

/// Until it is dropped, the connection is in a request.
struct InRequest(Arc<Slot>);

impl InRequest {
    fn new(slot: Arc<Slot>) -> Self {
        slot.show(Shown::InRequest);
        Self(slot)
    }
}

impl Drop for InRequest {
    fn drop(&mut self) {
        self.0.show(Shown::Request(Instant::now()));
    }
}

/// The body of a response that the connection has not taken yet.
struct Held {
    body: Body,
    _in_request: InRequest,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_evicted(slot: &Slot) -> bool {
        slot.is_evicted.load(Ordering::Acquire)
    }

    /// A connection whose task runs.
    async fn begun(slots: &Slots) -> Arc<Slot> {
        let slot = slots.take().await.expect("not all are in requests");
        slot.begin();
        slot
    }

    #[tokio::test]
    async fn the_connection_that_has_shown_least_gives_its_place() {
        let slots = Slots::new(3);
        let mut taken = Vec::new();
        for _ in 0..3 {
            taken.push(begun(&slots).await);
            sleep(GRACE).await;
        }
        drop(InRequest::new(taken[0].clone()));
        let asking = InRequest::new(taken[2].clone());
        let new = begun(&slots).await;
        assert_eq!(
            taken.iter().map(|slot| is_evicted(slot)).collect::<Vec<_>>(),
            [false, true, false],
            "the silent one goes"
        );
        taken[1].evicted().await;
        let in_new = InRequest::new(new.clone());
        let newer = begun(&slots).await;
        assert!(is_evicted(&taken[0]) && !is_evicted(&new), "then the idle one");
        let in_newer = InRequest::new(newer.clone());
        assert!(slots.take().await.is_none(), "all are in requests");
        drop(asking);
        drop(taken);
        slots.take().await.expect("one has gone by itself");
        drop((in_new, in_newer));
    }

    #[tokio::test]
    async fn a_new_connection_has_a_moment_for_its_first_request() {
        let slots = Slots::new(2);
        let start = Instant::now();
        let (first, second) = (begun(&slots).await, begun(&slots).await);
        let third = begun(&slots).await;
        assert!(start.elapsed() >= GRACE);
        assert!(is_evicted(&first) && !is_evicted(&second));
        // Who has sent a request is not silent, however young.
        drop(InRequest::new(second.clone()));
        drop(InRequest::new(third.clone()));
        slots.try_take().expect("without a wait").expect("the second goes");
        assert!(is_evicted(&second) && !is_evicted(&third));
    }

    #[tokio::test]
    async fn the_grace_begins_with_the_connections_first_run() {
        let slots = Slots::new(2);
        let (starved, begun) = (slots.take().await.expect("there is room"), begun(&slots).await);
        sleep(GRACE).await;
        let _new = slots.try_take().expect("without a wait").expect("the one that has begun goes");
        assert!(is_evicted(&begun) && !is_evicted(&starved));
        assert_eq!(slots.try_take().err(), Some(GRACE), "none has begun");
        starved.begin();
        assert!(slots.try_take().is_err(), "it begins to count");
        sleep(GRACE).await;
        slots.try_take().expect("without a wait").expect("it goes");
        assert!(is_evicted(&starved));
    }
}
