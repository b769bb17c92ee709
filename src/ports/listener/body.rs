//! Request bodies: read with a limit on each, on all of them together, and on time. Large response
//! bodies: with a limit on all of them together.

use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::error::RequestError;

/// The first bytes of each body come out of a reserve, so that large bodies keep no small one out.
const SMALL_BYTES: usize = 64 * 1024;
/// A body may be this much behind [`BYTES_PER_SECOND_MIN`].
const SLOWNESS: Duration = Duration::from_secs(5);
/// The slowest that a body may arrive, on average.
const BYTES_PER_SECOND_MIN: usize = 64 * 1024;

/// Limits the bytes of all request bodies in memory. Clones share one limit.
///
/// A body takes permits as its bytes arrive, and returns them when its [`BodyPermit`] is dropped. It
/// never waits for permits, because two half-read bodies could wait for each other.
#[derive(Clone, Debug)]
pub struct BodyBudget {
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
}

impl BodyBudget {
    /// The default limit for what exceeds the first 64 KiB of each body: 64 MiB.
    pub const DEFAULT_BYTES: usize = 64 * 1024 * 1024;
    /// The limit for the first 64 KiB of all bodies: 16 MiB.
    pub const SMALL_BYTES: usize = 16 * 1024 * 1024;

    /// Makes a budget of `bytes`, and of [`SMALL_BYTES`](Self::SMALL_BYTES) beside it, or as much if that
    /// is less.
    pub fn new(bytes: usize) -> Self {
        let small = bytes.min(Self::SMALL_BYTES);
        Self { small: Arc::new(Semaphore::new(small)), large: Arc::new(Semaphore::new(bytes)) }
    }

    /// The bytes that are still free, without those for small bodies.
    pub fn available_bytes(&self) -> usize {
        self.large.available_permits()
    }
}

impl Default for BodyBudget {
    fn default() -> Self {
        Self::new(Self::DEFAULT_BYTES)
    }
}

/// The part of a [`BodyBudget`] that one body uses. Keep it until the request is answered.
#[derive(Debug, Default)]
pub struct BodyPermit {
    small: Option<OwnedSemaphorePermit>,
    large: Option<OwnedSemaphorePermit>,
}

impl BodyPermit {
    /// Takes `bytes` more.
    fn extend(&mut self, budget: &BodyBudget, bytes: usize) -> Result<(), BodyError> {
        let taken = self.small.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let small = bytes.min(SMALL_BYTES - taken);
        let parts = [
            (&mut self.small, &budget.small, small),
            (&mut self.large, &budget.large, bytes - small),
        ];
        for (held, permits, bytes) in parts.into_iter().filter(|(_, _, bytes)| *bytes > 0) {
            let more = take(permits, bytes)?;
            match held {
                Some(held) => held.merge(more),
                None => *held = Some(more),
            }
        }
        Ok(())
    }
}

fn take(permits: &Arc<Semaphore>, bytes: usize) -> Result<OwnedSemaphorePermit, BodyError> {
    let bytes = u32::try_from(bytes).map_err(|_| BodyError::Busy)?;
    permits.clone().try_acquire_many_owned(bytes).map_err(|_| BodyError::Busy)
}

/// Why a body could not be read.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// It is longer than the limit, or announces that it will be: 413.
    #[error("the body is larger than {0} bytes")]
    TooLarge(usize),
    /// The bodies of other requests use up the [`BodyBudget`]: 503.
    #[error("too many bytes of other requests are in flight")]
    Busy,
    /// The connection broke, or the chunked encoding is malformed: 400.
    #[error("{0}")]
    Broken(#[source] axum::Error),
    /// It did not arrive by the deadline, or too slowly: 408.
    #[error("the body did not arrive in time")]
    TimedOut,
}

/// Reads `body` to its end.
///
/// A body that announces more than `max_bytes` is refused before it is read. Memory is allocated for
/// the bytes that arrive, never for the announced length. A body that arrives in one piece is not
/// copied. After an error, the bytes read so far are dropped and returned to `budget`.
pub async fn read_body(
    mut body: Body,
    max_bytes: usize,
    budget: &BodyBudget,
    deadline: Instant,
) -> Result<(Bytes, BodyPermit), BodyError> {
    if body.size_hint().lower() > max_bytes as u64 {
        return Err(BodyError::TooLarge(max_bytes));
    }
    let mut permit = BodyPermit::default();
    let (began, mut length) = (Instant::now(), 0);
    let mut first = Bytes::new();
    let mut all = BytesMut::new();
    loop {
        let in_time =
            began + SLOWNESS + Duration::from_secs((length / BYTES_PER_SECOND_MIN) as u64);
        let frame = timeout_at(deadline.min(in_time), body.frame()).await;
        let frame = frame.map_err(|_| BodyError::TimedOut)?;
        let Some(frame) = frame else { break };
        let Ok(data) = frame.map_err(BodyError::Broken)?.into_data() else {
            continue; // Trailers are ignored.
        };
        if data.len() > max_bytes - first.len().max(all.len()) {
            return Err(BodyError::TooLarge(max_bytes));
        }
        permit.extend(budget, data.len())?;
        length += data.len();
        if first.is_empty() && all.is_empty() {
            first = data;
            continue;
        }
        // Pieces are copied together, because each may hold a whole read buffer in memory: a body
        // of one-byte chunks would hold very many.
        all.extend_from_slice(&std::mem::take(&mut first));
        all.extend_from_slice(&data);
    }
    let bytes = if all.is_empty() { first } else { all.freeze() };
    Ok((bytes, permit))
}

/// Bytes of a response that the connection takes at once.
const PIECE_BYTES: usize = 64 * 1024;
/// A response may be this much behind [`BYTES_PER_SECOND_MIN`].
const RESPONSE_SLOWNESS: Duration = Duration::from_secs(30);

/// Limits the bytes of large responses that clients have not taken yet. Each may be of a value that was
/// overwritten since, so that only the response keeps it in memory. Clones share one limit.
#[derive(Clone, Debug)]
pub struct ResponseBudget(Arc<Semaphore>);

impl ResponseBudget {
    /// The default limit: 128 MiB, two of the largest values.
    pub const DEFAULT_BYTES: usize = 128 * 1024 * 1024;

    /// Makes a budget of `bytes`.
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes)))
    }

    /// The body of a response that is `value`, in the `room` that was waited for, if there is any.
    ///
    /// # Errors
    /// The length to wait for room for.
    pub fn body(&self, value: Bytes, room: Option<ResponseRoom>) -> Result<Body, usize> {
        let length = value.len();
        if length <= PIECE_BYTES {
            return Ok(Body::from(value));
        }
        let room = room
            .filter(|room| room.num_permits() >= length)
            .or_else(|| self.0.clone().try_acquire_many_owned(u32::try_from(length).ok()?).ok());
        let room = room.ok_or(length)?;
        Ok(Body::new(LargeResponse { length, value, since: Instant::now(), _room: room }))
    }

    /// Waits for room for a response of `length` bytes.
    ///
    /// # Errors
    /// [`RequestError::Unavailable`] if there is none by `deadline`.
    pub async fn room(
        &self,
        length: usize,
        deadline: Instant,
    ) -> Result<ResponseRoom, RequestError> {
        let busy = || RequestError::unavailable("too many clients are slow to take large values");
        let bytes = u32::try_from(length).map_err(|_| busy())?;
        match timeout_at(deadline, self.0.clone().acquire_many_owned(bytes)).await {
            Ok(Ok(room)) => Ok(room),
            _ => Err(busy()),
        }
    }
}

/// The part of a [`ResponseBudget`] that one response uses.
pub type ResponseRoom = OwnedSemaphorePermit;

impl Default for ResponseBudget {
    fn default() -> Self {
        Self::new(Self::DEFAULT_BYTES)
    }
}

/// A value that goes to the connection piece by piece, as fast as the client takes it.
struct LargeResponse {
    length: usize,
    value: Bytes,
    since: Instant,
    _room: OwnedSemaphorePermit,
}

impl HttpBody for LargeResponse {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.value.is_empty() {
            return Poll::Ready(None);
        }
        let taken = self.length - self.value.len();
        let due = RESPONSE_SLOWNESS + Duration::from_secs((taken / BYTES_PER_SECOND_MIN) as u64);
        if self.since.elapsed() > due {
            let why = "the client takes its response too slowly";
            return Poll::Ready(Some(Err(io::Error::new(ErrorKind::TimedOut, why))));
        }
        let length = self.value.len().min(PIECE_BYTES);
        Poll::Ready(Some(Ok(Frame::data(self.value.split_to(length)))))
    }

    fn is_end_stream(&self) -> bool {
        self.value.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.value.len() as u64)
    }
}
