//! `/snapshot` and `/state-hash`: the whole state, as a backup or as a checksum.

use std::io::{self, Write};
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE, HeaderName};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use super::{Shared, json_response};
use crate::codec;
use crate::httpapi::ErrorResponse;
use crate::membership::SnapshotMembers;
use crate::storage::snapshotter::write_snapshot;
use crate::storage::wal::SnapshotId;

/// Bytes of a backup that are sent in one chunk.
const CHUNK_BYTES: usize = 128 << 10;
/// Chunks that may be written before the client has read them.
const CHUNKS_AHEAD: usize = 4;

pub(super) async fn state_hash(
    State(shared): State<Arc<Shared>>,
) -> Result<Response, ErrorResponse> {
    let id = shared.admin.status.borrow().id;
    let _one = shared.hashes.lock().await;
    let store = shared.admin.application.keys.store.clone();
    // The time grows with the state.
    let (index, keys, hash) = spawn_blocking(move || {
        let view = store.view();
        (view.applied().0, view.keys(), view.checksum())
    })
    .await
    .map_err(|_| stopping())?;
    Ok(json_response(&json!({
        "id": id,
        "index": index,
        "keys": keys,
        "hash": format!("crc32c:{hash:08x}"),
    })))
}

pub(super) async fn snapshot(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<Vec<(String, String)>>,
) -> Result<Response, ErrorResponse> {
    let permit = shared.backups.clone().try_acquire_owned().map_err(|_| {
        let why = "another backup is being read from this member: try again when it has ended";
        ErrorResponse::new(StatusCode::SERVICE_UNAVAILABLE, why)
    })?;
    let keys = &shared.admin.application.keys;
    if !query.iter().any(|(name, _)| name == "local") {
        keys.store.node().wait_until_current(Instant::now() + keys.request_timeout).await?;
    }
    let members = {
        let status = shared.admin.status.borrow();
        SnapshotMembers::new(status.cluster_id, status.members.clone())
    };
    let store = keys.store.clone();
    let ((index, term), view) = spawn_blocking(move || {
        let view = store.view();
        (view.applied(), view)
    })
    .await
    .map_err(|_| stopping())?;
    // Raft has no entry at index 0. An empty state can have any other index.
    let at = SnapshotId { index: index.max(1), term: term.max(1) };
    let (chunk_tx, mut chunk_rx) = mpsc::channel(CHUNKS_AHEAD);
    spawn_blocking(move || {
        let _permit = permit;
        let mut chunks = Chunks { buffer: Vec::new(), chunk_tx };
        let meta = codec::encode(&members);
        if let Err(error) = write_snapshot(&mut chunks, at, &meta, |out| view.write(out)) {
            // The body ends with an error, unless the client has gone.
            let _ = chunks.chunk_tx.blocking_send(Err(error));
        }
    });
    let headers = [
        (CONTENT_TYPE, "application/octet-stream".to_owned()),
        (CONTENT_DISPOSITION, format!("attachment; filename=\"raftexample-{index}.snap\"")),
        (HeaderName::from_static("raft-index"), index.to_string()),
        (HeaderName::from_static("raft-term"), term.to_string()),
    ];
    let body = Body::from_stream(stream::poll_fn(move |context| chunk_rx.poll_recv(context)));
    Ok((headers, body).into_response())
}

fn stopping() -> ErrorResponse {
    ErrorResponse::new(StatusCode::SERVICE_UNAVAILABLE, "this member is stopping")
}

/// Turns what is written into the chunks of a body. A write blocks while the client is slow.
struct Chunks {
    buffer: Vec<u8>,
    chunk_tx: mpsc::Sender<io::Result<Bytes>>,
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= CHUNK_BYTES {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let chunk = std::mem::take(&mut self.buffer).into();
        self.chunk_tx.blocking_send(Ok(chunk)).map_err(|_| {
            io::Error::new(io::ErrorKind::BrokenPipe, "the client closed the connection")
        })
    }
}
