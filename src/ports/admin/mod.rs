//! The admin port (`--admin HOST:PORT`): for operators, probes and metrics. It shows one member and
//! its cluster, and changes the cluster rather than its keys.
//!
//! | request | response |
//! |---|---|
//! | `GET /` | a page that shows the cluster live, with `/page.css` and `/page.js` |
//! | `GET /livez` | 200 while the loop of the raft node ticks, else 503 |
//! | `GET /readyz` | 200 if this member has a vote, and has applied what a majority says is committed; else 503; `?verbose` lists each check |
//! | `GET /status` | this member, as JSON |
//! | `GET /members` | the members that this member knows, as JSON |
//! | `GET /cluster` | the status of every member, as JSON |
//! | `GET /events` | the same as server-sent events, five a second; events named `points` have what the page's charts show |
//! | `GET /metrics` | metrics for Prometheus: OpenMetrics if `Accept` names it, else the text format 0.0.4 |
//! | `GET /state-hash` | a checksum of the state, and the index it belongs to |
//! | `GET /snapshot` | a backup of the current state, for `snapshot restore`; `?local` skips asking a majority |
//! | `POST /transfer-leadership?to=ID` | 204 once member ID leads; without `to`, once any other member leads |
//! | `POST`, `PUT`, `DELETE /members/ID` | add the member whose peer URL is the body, change its URL, remove it |
//! | `GET`, `PUT /log-level` | the minimum level that this member logs; PUT sets it until the member stops |
//! | `/v1/…` | what the [application port](crate::ports::application) answers |
//!
//! Every client that reaches the port may use all of it, so it is off unless `--admin` is given. Web
//! pages of other origins may not, see the [guard](crate::ports::guard).

mod backup;
mod checks;
mod history;
mod members;
mod status;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS,
};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use hyper_util::service::TowerToHyperService;
use serde_json::Value;
use slog::warn;
use tokio::sync::{Mutex, Semaphore, watch};
use tokio::time::Instant;

use self::history::History;
use crate::httpapi::ErrorResponse;
use crate::logging::LogLevel;
use crate::metrics::Metrics;
use crate::ports::application::{self, Application};
use crate::ports::guard::refusal;
use crate::ports::listener::{ADMIN_CONNECTIONS_MAX, HttpService, Limits};
use crate::raft_node::Status;
use crate::transport::ClusterWatch;

/// Streams of `/events` at a time. The other connections stay free for probes.
const EVENT_STREAMS_MAX: usize = 16;
/// The longest body of `PUT /log-level`.
const LEVEL_BYTES_MAX: usize = 64;

/// What the handlers of the admin port use.
pub struct Admin {
    /// The node's status.
    pub status: watch::Receiver<Status>,
    /// The member's metrics.
    pub metrics: Metrics,
    /// Asks the other members for their statuses.
    pub cluster: Arc<ClusterWatch>,
    /// The handlers of `/v1`: keys. Membership changes go through the same store.
    pub application: Arc<Application>,
    /// `/livez` fails if the loop has not ticked for this long.
    pub alive_within: Duration,
    /// Host names of this port, besides loopback names and addresses.
    pub names: Vec<String>,
    /// What `/log-level` changes.
    pub log_level: LogLevel,
    /// Closed when this member stops, which ends the streams of `/events`.
    pub stopping: watch::Receiver<()>,
}

struct Shared {
    admin: Admin,
    /// One backup at a time, because each holds a copy of the state.
    backups: Arc<Semaphore>,
    /// One hash at a time, for the same reason.
    hashes: Mutex<()>,
    event_streams: Arc<Semaphore>,
    /// What the page's charts begin with.
    history: Arc<History>,
}

/// The limits of the port's connections.
pub fn limits(shutdown_grace: Duration) -> Limits {
    Limits { connections: ADMIN_CONNECTIONS_MAX, shutdown_grace, ..Limits::default() }.affordable()
}

/// The watchers of keys that a port with these limits may have: one for each page.
pub fn watchers(limits: &Limits) -> usize {
    EVENT_STREAMS_MAX.min(limits.connections / 4)
}

/// The service to give to [`serve`](crate::ports::listener::serve). Must be called within a tokio runtime: it
/// starts a task that counts requests until the member stops.
pub fn service(admin: Admin) -> impl HttpService + HttpService<Body> {
    let history = Arc::<History>::default();
    let Admin { status, cluster, stopping, .. } = &admin;
    let (status, cluster, stopping) = (status.clone(), cluster.clone(), stopping.clone());
    tokio::spawn(history::record(history.clone(), status, cluster, stopping));
    let shared = Arc::new(Shared {
        admin,
        backups: Arc::new(Semaphore::new(1)),
        hashes: Mutex::new(()),
        event_streams: Arc::new(Semaphore::new(EVENT_STREAMS_MAX)),
        history,
    });
    let member = post(members::change).put(members::change).delete(members::change);
    let router = Router::new()
        .route("/", get(async || page("text/html", include_str!("page.html"))))
        .route("/page.css", get(async || page("text/css", include_str!("page.css"))))
        .route("/page.js", get(async || page("text/javascript", include_str!("page.js"))))
        .route("/livez", get(checks::livez))
        .route("/readyz", get(checks::readyz))
        .route("/status", get(status::status))
        .route("/members", get(status::members))
        .route("/members/{id}", member)
        .route("/cluster", get(status::cluster))
        .route("/events", get(status::events))
        .route("/metrics", get(status::metrics))
        .route("/state-hash", get(backup::state_hash))
        .route("/snapshot", get(backup::snapshot))
        .route("/transfer-leadership", post(members::transfer_leadership))
        .route("/log-level", get(log_level).put(set_log_level))
        .route("/v1/{*rest}", any(keys))
        .fallback(not_found)
        .layer(from_fn_with_state(shared.clone(), refuse_cross_site))
        .with_state(shared);
    TowerToHyperService::new(router)
}

async fn not_found() -> ErrorResponse {
    let paths = "/, /livez, /readyz, /status, /members, /cluster, /events, /metrics, /state-hash, /snapshot, /transfer-leadership, /log-level";
    ErrorResponse::new(StatusCode::NOT_FOUND, format!("the paths are {paths}; keys are below /v1"))
}

/// Refuses the requests that a web page of another origin made its visitor's browser send.
async fn refuse_cross_site(
    State(shared): State<Arc<Shared>>,
    request: Request,
    next: Next,
) -> Response {
    let is_page = request.uri().path() == "/";
    let refused = refusal(request.version(), request.headers(), &shared.admin.names, is_page);
    if let Some(refused) = refused {
        if request.uri().path().starts_with("/v1/") {
            return application::refuse(&shared.admin.application, request.method(), refused);
        }
        shared.admin.metrics.rejected(refused.reason);
        return ErrorResponse::from(refused).into_response();
    }
    let mut response = next.run(request).await;
    // A browser must not run a stored value as a script.
    let nosniff = HeaderValue::from_static("nosniff");
    response.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, nosniff);
    response
}

/// A file of the page. It loads nothing from other hosts, and no other page may frame it.
fn page(kind: &str, file: &'static str) -> Response {
    let policy = "default-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";
    let headers = [
        (CONTENT_TYPE, format!("{kind}; charset=utf-8")),
        (CONTENT_SECURITY_POLICY, policy.to_owned()),
        // After an upgrade the same URL serves another file.
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

async fn log_level(State(shared): State<Arc<Shared>>) -> Response {
    text(StatusCode::OK, format!("{}\n", LogLevel::name(shared.admin.log_level.get())))
}

/// Changes this member's log level until it stops.
async fn set_log_level(
    State(shared): State<Arc<Shared>>,
    body: Body,
) -> Result<StatusCode, ErrorResponse> {
    let keys = &shared.admin.application.keys;
    let deadline = Instant::now() + keys.request_timeout;
    let (name, _permit) = keys.read("PUT", body, LEVEL_BYTES_MAX, deadline).await?;
    let name = String::from_utf8_lossy(&name);
    let level = LogLevel::parse(name.trim()).ok_or_else(|| {
        let why = format!("the body must be one of {}", LogLevel::NAMES.join(", "));
        ErrorResponse::new(StatusCode::BAD_REQUEST, why)
    })?;
    let former = shared.admin.log_level.get();
    // The line is written at the more verbose one of both levels.
    if former.is_at_least(level) {
        shared.admin.log_level.set(level);
    }
    let (from, to) = (LogLevel::name(former), LogLevel::name(level));
    warn!(keys.logger, "log level changed from {from} to {to}");
    shared.admin.log_level.set(level);
    Ok(StatusCode::NO_CONTENT)
}

/// Responds as the application port does.
async fn keys(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    application::respond(shared.admin.application.clone(), request).await
}
