//! The admin listener (`--admin HOST:PORT`): what a member tells of itself and of the cluster, and the
//! few things that are done to a cluster and not to a key.
//!
//! | request | answer |
//! |---|---|
//! | `GET /` | a page that shows the cluster live, with `/page.css` and `/page.js` |
//! | `GET /livez` | 200 while the loop of the raft node ticks, else 503 |
//! | `GET /readyz` | 200 if a leader is known, what is committed is applied, and this is no learner; else 503; `?verbose` names each check |
//! | `GET /status` | this member, as JSON |
//! | `GET /members` | the members as this one knows them, as JSON |
//! | `GET /cluster` | every member's status, as JSON: this one asks the others |
//! | `GET /events` | the same, again and again, as server-sent events |
//! | `GET /metrics` | what is counted, as OpenMetrics text, which Prometheus reads |
//! | `GET /state-hash` | a checksum of the state and the index that it is of |
//! | `GET /snapshot` | a backup: the state as it is now, as the file that `snapshot restore` takes; with `?local`, without asking a majority whether it is |
//! | `POST /transfer-leadership?to=ID` | 204 once ID leads; without `to`, once another than the leader does |
//! | `POST`, `PUT`, `DELETE /members/ID` | adds a member that listens at the URL in the body, changes its URL, removes it |
//! | `/kv/KEY` | what the client port answers for `/KEY` |
//!
//! # Who may ask
//! Whoever reaches the port may press all of these buttons; so it listens nowhere unless it is told
//! to. A web page elsewhere may not: a request is refused whose `Host` is neither a loopback name,
//! an IP address nor a name given by `--admin-name` (so that no foreign name can be made to resolve
//! to this port), and one whose `Origin` is another than that.
//!
//! Everything is read from one [`Status`], from the counts, or asked over the channels that the client
//! port uses as well.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::http::StatusCode;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName,
    HeaderValue, ORIGIN, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::uri::{PathAndQuery, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use bytes::Bytes;
use futures_util::stream;
use hyper_util::service::TowerToHyperService;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, timeout_at};

use crate::channels::{MemberRequest, NodeId};
use crate::codec;
use crate::httpapi::{ErrorResponse, HttpKvApi, serve_http};
use crate::membership::SnapshotMembers;
use crate::metrics::Metrics;
use crate::ports::guard::{is_cross_origin, is_known_host};
use crate::ports::listener::{ADMIN_CONNECTIONS_MAX, HttpService, Limits};
use crate::raft_node::{PeerStatus, Role, Status};
use crate::storage::snapshotter::write_backup;
use crate::storage::wal::SnapshotId;

/// Streams of events at a time: the connections that are left are for probes.
const EVENT_STREAMS_MAX: usize = 16;
/// A member that did not answer for so long counts as dead.
const DEAD_AFTER: Duration = Duration::from_secs(1);
/// How often what is to be seen is looked at for `/events`.
const EVENT_INTERVAL: Duration = Duration::from_millis(200);
/// Committed entries that may still wait to be applied at a member that is ready.
const BEHIND_MAX: u64 = 1000;
/// Bytes of a backup that are sent at once.
const CHUNK_BYTES: usize = 128 << 10;
/// Chunks of a backup that are made ahead of the client.
const CHUNKS_AHEAD: usize = 4;

/// What the admin listener tells and does.
pub struct Admin {
    /// What the node knows.
    pub status: watch::Receiver<Status>,
    /// What is counted.
    pub metrics: Metrics,
    /// What the client port does.
    pub keys: Arc<HttpKvApi>,
    /// The loop is dead if it did not tick for so long.
    pub alive_within: Duration,
    /// Names by which this listener may be called, beside loopback names and addresses.
    pub names: Vec<String>,
    /// Closed when this member stops: `/events` ends then.
    pub stopping: watch::Receiver<()>,
}

struct Shared {
    admin: Admin,
    /// One backup at a time, and one hash: each holds a state.
    backups: Arc<Semaphore>,
    hashes: Semaphore,
    event_streams: Arc<Semaphore>,
}

/// What the admin listener's connections may hold.
pub fn limits(shutdown_grace: Duration) -> Limits {
    Limits { connections: ADMIN_CONNECTIONS_MAX, shutdown_grace, ..Limits::default() }.affordable()
}

/// The service to give to [`serve`](crate::ports::listener::serve).
pub fn service(admin: Admin) -> impl HttpService {
    let shared = Arc::new(Shared {
        admin,
        backups: Arc::new(Semaphore::new(1)),
        hashes: Semaphore::new(1),
        event_streams: Arc::new(Semaphore::new(EVENT_STREAMS_MAX)),
    });
    let router = Router::new()
        .route("/", get(async || page("text/html", include_str!("page.html"))))
        .route("/page.css", get(async || page("text/css", include_str!("page.css"))))
        .route("/page.js", get(async || page("text/javascript", include_str!("page.js"))))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
        .route("/members", get(members))
        .route("/members/{id}", post(add_member).put(move_member).delete(remove_member))
        .route("/cluster", get(cluster))
        .route("/events", get(events))
        .route("/metrics", get(metrics))
        .route("/state-hash", get(state_hash))
        .route("/snapshot", get(snapshot))
        .route("/transfer-leadership", post(transfer_leadership))
        .route("/kv/", any(key))
        .route("/kv/{*key}", any(key))
        .fallback(not_found)
        .layer(from_fn_with_state(shared.clone(), refuse_foreign))
        .with_state(shared);
    TowerToHyperService::new(router)
}

async fn not_found() -> ErrorResponse {
    let there = "/, /livez, /readyz, /status, /members, /cluster, /events, /metrics, /state-hash, /snapshot, /transfer-leadership";
    ErrorResponse::new(StatusCode::NOT_FOUND, format!("there is {there}; keys are below /kv"))
}

/// Refuses what a web page elsewhere had its reader's browser send.
async fn refuse_foreign(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Response {
    let refuse = |reason, why: String| {
        shared.admin.metrics.rejected(reason);
        ErrorResponse::new(StatusCode::FORBIDDEN, why).into_response()
    };
    let headers = request.headers();
    if !is_known_host(headers, &shared.admin.names) {
        let why =
            "the Host is no loopback name, no address and no --admin-name: call this port by one";
        return refuse("foreign_host", why.to_owned());
    }
    if is_cross_origin(headers) {
        let why = "a page of another origin may not use this port; send no Origin header";
        return refuse("foreign_origin", why.to_owned());
    }
    // A browser says so of what a page elsewhere has it fetch, where it sends no Origin. A link to the
    // page itself may stand anywhere.
    let is_elsewhere = headers.get("sec-fetch-site").is_some_and(|site| {
        let is_link = headers.get("sec-fetch-mode").is_some_and(|mode| mode == "navigate");
        site != "same-origin" && site != "none" && !(is_link && request.uri().path() == "/")
    });
    if is_elsewhere {
        let why = "a page of another origin may not use this port";
        return refuse("foreign_origin", why.to_owned());
    }
    let mut response = next.run(request).await;
    // No value of a key is taken for a script of the page.
    let nosniff = HeaderValue::from_static("nosniff");
    response.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, nosniff);
    response
}

/// A file of the page. It loads nothing from elsewhere and is shown inside no other page.
fn page(kind: &str, file: &'static str) -> Response {
    let policy = "default-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";
    let headers = [
        (CONTENT_TYPE, format!("{kind}; charset=utf-8")),
        (CONTENT_SECURITY_POLICY, policy.to_owned()),
        // Another version of the program may serve it next.
        (CACHE_CONTROL, "no-cache".to_owned()),
    ];
    (headers, file).into_response()
}

fn text(status: StatusCode, text: impl Into<String>) -> Response {
    (status, [(CONTENT_TYPE, "text/plain; charset=utf-8")], text.into()).into_response()
}

fn json_response(value: &Value) -> Response {
    let headers = [(CONTENT_TYPE, "application/json"), (CACHE_CONTROL, "no-store")];
    (headers, format!("{value}\n")).into_response()
}

async fn livez(State(shared): State<Arc<Shared>>) -> Response {
    let (since, within) = (shared.admin.metrics.since_last_tick(), shared.admin.alive_within);
    let Some(since) = since.filter(|since| *since > within) else {
        return text(StatusCode::OK, "ok\n");
    };
    let why = format!("the raft node did not tick for {since:.1?}; at most {within:.1?} is usual");
    ErrorResponse::new(StatusCode::SERVICE_UNAVAILABLE, why).into_response()
}

async fn readyz(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<Vec<(String, String)>>,
) -> Response {
    let checks = readiness(&shared.admin.status.borrow());
    let is_ready = checks.iter().all(|(_, failure)| failure.is_none());
    let code = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    if query.iter().any(|(name, _)| name == "verbose") {
        let line = |(name, failure): &(_, Option<String>)| match failure {
            None => format!("[+] {name} ok\n"),
            Some(why) => format!("[-] {name}: {why}\n"),
        };
        return text(code, checks.iter().map(line).collect::<String>());
    }
    let failed: Vec<_> = checks.into_iter().filter_map(|(_, failure)| failure).collect();
    if is_ready {
        return text(code, "ok\n");
    }
    ErrorResponse::new(code, format!("not ready: {}", failed.join("; "))).into_response()
}

/// Each thing that a ready member has, and why this one does not have it.
fn readiness(status: &Status) -> [(&'static str, Option<String>); 3] {
    let behind = status.commit.saturating_sub(status.applied);
    let role = match status.role {
        Role::Bootstrapping => Some("it waits for the others before its first start".to_owned()),
        Role::Learner => Some("it is a learner, and has no vote yet".to_owned()),
        _ => None,
    };
    [
        ("leader", (status.leader == 0).then(|| "no leader is known".to_owned())),
        (
            "applied",
            (behind > BEHIND_MAX).then(|| format!("{behind} committed entries are not applied")),
        ),
        ("voter", role),
    ]
}

async fn status(State(shared): State<Arc<Shared>>) -> Response {
    json_response(&member_status(&shared.admin.status.borrow()))
}

async fn members(State(shared): State<Arc<Shared>>) -> Response {
    json_response(&member_status(&shared.admin.status.borrow())["members"])
}

/// One member's status, as JSON.
fn member_status(status: &Status) -> Value {
    let tick = &status.tick;
    let members = status.members.urls.iter().map(|(id, url)| {
        let peer = tick.peers.get(id).cloned().unwrap_or_default();
        let PeerStatus { heard_ms, sent, progress, .. } = peer;
        json!({
            "id": id,
            "url": url,
            "role": if status.learners.contains(id) { "learner" } else { "voter" },
            "match": progress.map(|progress| progress.matched),
            "next": progress.map(|progress| progress.next),
            "state": progress.map(|progress| progress.state),
            "last_contact_ms": if *id == status.id { Some(0) } else { heard_ms },
            "sent": sent,
        })
    });
    let requests = |(count, micros): (u64, u64)| json!({ "count": count, "micros": micros });
    json!({
        "id": status.id,
        "cluster_id": format!("{:016x}", status.cluster_id),
        "role": status.role,
        "term": status.term,
        "vote": status.vote,
        "leader": status.leader,
        "commit": status.commit,
        "applied": status.applied,
        "first": status.first,
        "last": status.last,
        "snapshot": status.snapshot,
        "members": members.collect::<Vec<_>>(),
        "removed": status.members.removed.keys().collect::<Vec<_>>(),
        "wal_bytes": tick.wal_bytes,
        "keys": tick.keys,
        "store_bytes": tick.store_bytes,
        "puts": requests(tick.puts),
        "gets": requests(tick.gets),
        "uptime_seconds": tick.uptime_ms as f64 / 1000.0,
        "version": tick.version,
    })
}

/// Every member's status, as JSON. `watching` is for how long the others have been asked: one that did
/// not answer yet is not dead before that.
fn cluster_status(status: &Status, watching: Duration) -> Value {
    let member = |(id, url): (&NodeId, &String)| {
        let said = if *id == status.id {
            Some((0, status))
        } else {
            let peer = status.tick.peers.get(id);
            peer.and_then(|peer| peer.status.as_ref()).map(|(age, status)| (*age, &**status))
        };
        let is_alive = match said {
            Some((age, _)) => Some(u128::from(age) <= DEAD_AFTER.as_millis()),
            None => (watching > DEAD_AFTER).then_some(false),
        };
        json!({
            "id": id,
            "url": url,
            "alive": is_alive,
            "age_ms": said.map(|(age, _)| age),
            "status": said.map(|(_, status)| member_status(status)),
        })
    };
    json!({
        "seen_by": status.id,
        "cluster_id": format!("{:016x}", status.cluster_id),
        "members": status.members.urls.iter().map(member).collect::<Vec<_>>(),
    })
}

async fn cluster(State(shared): State<Arc<Shared>>) -> Response {
    let Admin { metrics, status, .. } = &shared.admin;
    metrics.watch();
    // One that answered since somebody looks and then fell silent is dead, and not waited for.
    let all_answered = |status: &Status| {
        let mut others = status.members.urls.keys().filter(|id| **id != status.id);
        others.all(|id| status.tick.peers.get(id).is_some_and(|peer| peer.status.is_some()))
    };
    let patience = Instant::now() + DEAD_AFTER;
    let mut status = status.clone();
    // That some do not answer is an answer, too.
    let _ = timeout_at(patience, status.wait_for(all_answered)).await;
    let watching = DEAD_AFTER + EVENT_INTERVAL;
    json_response(&cluster_status(&status.borrow(), watching))
}

/// Server-sent events: each is the cluster's status, whenever something of it has changed.
async fn events(State(shared): State<Arc<Shared>>) -> Result<Response, ErrorResponse> {
    let permit = shared.event_streams.clone().try_acquire_owned().map_err(|_| {
        let why = "too many pages show this member already: close one";
        ErrorResponse::new(StatusCode::SERVICE_UNAVAILABLE, why)
    })?;
    struct Events {
        _permit: OwnedSemaphorePermit,
        shared: Arc<Shared>,
        stopping: watch::Receiver<()>,
        began: Instant,
        next: Instant,
    }
    let stopping = shared.admin.stopping.clone();
    let began = Instant::now();
    let events = stream::unfold(
        Events { _permit: permit, shared, stopping, began, next: began },
        async |mut at| {
            tokio::select! {
                _ = at.stopping.changed() => return None,
                () = tokio::time::sleep_until(at.next) => {}
            }
            at.next = Instant::now() + EVENT_INTERVAL;
            at.shared.admin.metrics.watch();
            let cluster = cluster_status(&at.shared.admin.status.borrow(), at.began.elapsed());
            Some((Ok::<_, Infallible>(Bytes::from(format!("data: {cluster}\n\n"))), at))
        },
    );
    let headers = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-store")];
    Ok((headers, Body::from_stream(events)).into_response())
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    let mut registry = Registry::with_prefix("raftexample");
    shared.admin.metrics.register(&mut registry);
    register_status(&mut registry, &shared.admin.status.borrow());
    let mut lines = String::new();
    encode(&mut lines, &registry).expect("a string takes all");
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, kind)], lines).into_response()
}

fn register_status(registry: &mut Registry, status: &Status) {
    let mut gauge = |name, help, value: u64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(value as i64);
        registry.register(name, help, gauge);
    };
    gauge("has_leader", "1 if a leader is known", u64::from(status.leader != 0));
    gauge("is_leader", "1 if this member leads", u64::from(status.role == Role::Leader));
    gauge("is_learner", "1 if this member has no vote", u64::from(status.role == Role::Learner));
    gauge("members", "Members as known here", status.members.urls.len() as u64);
    gauge("term", "The term", status.term);
    gauge("commit_index", "The last entry known to be committed", status.commit);
    gauge("applied_index", "The last entry applied", status.applied);
    gauge("last_index", "The last entry in the log", status.last);
    gauge("snapshot_index", "The last entry in the newest snapshot", status.snapshot);
    gauge("wal_bytes", "Bytes of the write-ahead log", status.tick.wal_bytes);
}

async fn state_hash(State(shared): State<Arc<Shared>>) -> Result<Response, ErrorResponse> {
    let id = shared.admin.status.borrow().id;
    let stopping =
        || ErrorResponse::new(StatusCode::SERVICE_UNAVAILABLE, "this member is stopping");
    let _permit = shared.hashes.acquire().await.map_err(|_| stopping())?;
    let store = shared.admin.keys.store.clone();
    // All of it takes as long as the state is large.
    let (index, keys, hash) = tokio::task::spawn_blocking(move || {
        let view = store.view();
        (view.newest().0, view.keys(), view.checksum())
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

async fn snapshot(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<Vec<(String, String)>>,
) -> Result<Response, ErrorResponse> {
    let permit = shared.backups.clone().try_acquire_owned().map_err(|_| {
        let why = "another backup is being read from this member: wait for its end, then try again";
        ErrorResponse::new(StatusCode::SERVICE_UNAVAILABLE, why)
    })?;
    let keys = &shared.admin.keys;
    if !query.iter().any(|(name, _)| name == "local") {
        keys.store.wait_until_current(Instant::now() + keys.request_timeout).await?;
    }
    let members = {
        let status = shared.admin.status.borrow();
        let (learners, voters) =
            status.members.urls.keys().partition(|id| status.learners.contains(id));
        let members = status.members.clone();
        SnapshotMembers { cluster_id: status.cluster_id, voters, learners, members }
    };
    let store = keys.store.clone();
    let looked_at = tokio::task::spawn_blocking(move || {
        let view = store.view();
        (view.newest(), view)
    });
    let ((index, term), view) = looked_at.await.map_err(|_| {
        ErrorResponse::new(StatusCode::SERVICE_UNAVAILABLE, "this member is stopping")
    })?;
    // Raft knows no entry at 0; where nothing was written, nothing is lost by a higher one.
    let mark = SnapshotId { index: index.max(1), term: term.max(1) };
    let (chunk_tx, mut chunk_rx) = mpsc::channel(CHUNKS_AHEAD);
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        let mut chunks = Chunks { buffer: Vec::new(), chunk_tx };
        let meta = codec::encode(&members);
        if let Err(error) = write_backup(&mut chunks, mark, &meta, |out| view.write(out)) {
            // If the client has gone that reaches nobody.
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

/// What is written to it becomes the chunks of a body. It blocks while the client is slow.
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
        self.chunk_tx
            .blocking_send(Ok(chunk))
            .map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the client has gone"))
    }
}

async fn transfer_leadership(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<Vec<(String, String)>>,
) -> Result<Response, ErrorResponse> {
    let wanted = query.iter().find(|(name, _)| name == "to").map(|(_, id)| id.as_str());
    let to = wanted.map(parse_id).transpose()?;
    change(&shared, MemberRequest::Lead { to }).await
}

async fn add_member(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, ErrorResponse> {
    let id = parse_id(&id)?;
    change_to_url(&shared, "POST", body, |url| MemberRequest::Add { id, url }).await
}

async fn move_member(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, ErrorResponse> {
    let id = parse_id(&id)?;
    change_to_url(&shared, "PUT", body, |url| MemberRequest::Move { id, url }).await
}

/// Changes a member to the URL in the body; one deadline is for the body and for the change.
async fn change_to_url(
    shared: &Shared,
    method: &str,
    body: Body,
    change: impl FnOnce(String) -> MemberRequest,
) -> Result<Response, ErrorResponse> {
    let keys = &shared.admin.keys;
    let deadline = Instant::now() + keys.request_timeout;
    let url = keys.read_url(method, body, deadline).await?;
    keys.change_members(change(url.trim().to_owned()), deadline).await
}

async fn remove_member(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
) -> Result<Response, ErrorResponse> {
    change(&shared, MemberRequest::Remove { id: parse_id(&id)? }).await
}

async fn change(shared: &Shared, change: MemberRequest) -> Result<Response, ErrorResponse> {
    let keys = &shared.admin.keys;
    keys.change_members(change, Instant::now() + keys.request_timeout).await
}

fn parse_id(text: &str) -> Result<NodeId, ErrorResponse> {
    text.parse().ok().filter(|id| *id != 0).ok_or_else(|| {
        ErrorResponse::new(
            StatusCode::BAD_REQUEST,
            format!("{text:?} is no member id: a number from 1 on"),
        )
    })
}

/// Answers for a key what the client port answers. The key is what follows `/kv`, as it was sent.
async fn key(State(shared): State<Arc<Shared>>, mut request: Request) -> Response {
    let target = request.uri().path_and_query().map_or("", PathAndQuery::as_str);
    let Some(Ok(key)) = target.strip_prefix("/kv").map(str::parse::<Uri>) else {
        return ErrorResponse::new(StatusCode::BAD_REQUEST, "a key begins with a slash")
            .into_response();
    };
    if !matches!(request.method().as_str(), "GET" | "PUT") {
        let why = "a key is PUT or GET; members are below /members";
        return ErrorResponse::new(StatusCode::METHOD_NOT_ALLOWED, why).into_response();
    }
    *request.uri_mut() = key;
    // Judged above, where the names of this listener are known.
    request.headers_mut().remove(ORIGIN);
    serve_http(State(shared.admin.keys.clone()), request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_ready_with_a_leader_its_entries_applied_and_a_vote() {
        let ready = Status {
            id: 1,
            role: Role::Follower,
            leader: 2,
            commit: 5000,
            applied: 5000 - BEHIND_MAX,
            ..Status::default()
        };
        let failed = |status: &Status| {
            let checks = readiness(status).into_iter();
            checks.filter_map(|(name, why)| why.map(|_| name)).collect::<Vec<_>>()
        };
        assert!(failed(&ready).is_empty());
        assert!(failed(&Status { role: Role::Leader, ..ready.clone() }).is_empty());
        assert_eq!(failed(&Status { leader: 0, ..ready.clone() }), ["leader"]);
        assert_eq!(failed(&Status { applied: ready.applied - 1, ..ready.clone() }), ["applied"]);
        assert_eq!(failed(&Status { role: Role::Learner, ..ready.clone() }), ["voter"]);
        assert_eq!(failed(&Status::default()), ["leader", "voter"], "before its first start");
    }

    #[test]
    fn a_loop_is_as_old_as_its_last_tick_and_before_that_it_starts() {
        let metrics = Metrics::default();
        assert_eq!(metrics.since_last_tick(), None, "a start takes what it takes");
        metrics.ticked();
        while metrics.since_last_tick() < Some(Duration::from_millis(20)) {
            std::thread::yield_now();
        }
        let before = metrics.since_last_tick();
        metrics.ticked();
        assert!(metrics.since_last_tick() < before, "it ticked just now");
    }
}
