//! Request bodies: read with a limit on each, on all of them together, and on time.

use std::sync::Arc;

use axum::body::{Body, HttpBody};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

/// Limits the bytes of all request bodies in memory. Clones share one limit.
///
/// A body takes permits as its bytes arrive, and returns them when its [`BodyPermit`] is dropped. It
/// never waits for permits, because two half-read bodies could wait for each other.
#[derive(Clone, Debug)]
pub struct BodyBudget(Arc<Semaphore>);

impl BodyBudget {
    /// The default limit: 64 MiB.
    pub const DEFAULT_BYTES: usize = 64 * 1024 * 1024;

    /// Makes a budget of `bytes`.
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes)))
    }

    /// The bytes that are still free.
    pub fn available_bytes(&self) -> usize {
        self.0.available_permits()
    }

    fn take(&self, bytes: usize) -> Result<BodyPermit, BodyError> {
        let bytes = u32::try_from(bytes).map_err(|_| BodyError::Busy)?;
        self.0.clone().try_acquire_many_owned(bytes).map_err(|_| BodyError::Busy)
    }
}

impl Default for BodyBudget {
    fn default() -> Self {
        Self::new(Self::DEFAULT_BYTES)
    }
}

/// The part of a [`BodyBudget`] that one body uses. Keep it until the request is answered.
pub type BodyPermit = OwnedSemaphorePermit;

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
    /// It did not arrive by the deadline: 408.
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
    let mut permit = budget.take(0)?;
    let mut first = Bytes::new();
    let mut all = BytesMut::new();
    loop {
        let frame = timeout_at(deadline, body.frame()).await.map_err(|_| BodyError::TimedOut)?;
        let Some(frame) = frame else { break };
        let Ok(data) = frame.map_err(BodyError::Broken)?.into_data() else {
            continue; // Trailers are ignored.
        };
        if data.len() > max_bytes - first.len().max(all.len()) {
            return Err(BodyError::TooLarge(max_bytes));
        }
        permit.merge(budget.take(data.len())?);
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
