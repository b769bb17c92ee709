//! The port for programs (`--api HOST:PORT`): what the client port cannot offer, because it stays the
//! original's.
//!
//! | request | response |
//! |---|---|
//! | `GET`, `HEAD /v1/kv/KEY` | 200, the value's bytes, `ETag`; 404; `If-None-Match` → 304 |
//! | `PUT /v1/kv/KEY` | 201 created, 204 replaced, with `ETag`; `If-Match`, `If-None-Match` → 412 |
//! | `DELETE /v1/kv/KEY` | 204, 404; conditions as for PUT |
//! | `POST /v1/txn` | 200: conditions, and one of two lists of operations, in one step |
//! | `GET /v1/keys?prefix=&after=&limit=&values=` | 200: keys in order, of one moment |
//! | `GET /v1/watch?prefix=&from=&values=` | 200: server-sent events, one for each change |
//! | `POST /v1/retry-token` | 201: a token for `Idempotency-Key`, with which a write is done at most once |
//! | `GET /v1/openapi.json` | 200: this table as an OpenAPI 3.1 description |
//!
//! `KEY` is the rest of the request target: `/v1/kv/a?b` is the client port's `/a?b`, and `/v1/kv/3` is a key
//! and never a member. Reads take `Raft-Read` as on the client port. Writes are answered after they are
//! applied, whatever `--ack` says. Every error is a problem document (RFC 9457).
//!
//! A separate port fails closed: a member that does not have it refuses the connection, whereas the client
//! port would ignore a header that it does not know. It changes no members, so it is the port to give to
//! programs. The [admin port](crate::ports::admin) has the same paths, for its page.

mod ids;
mod kv;
mod list;
mod problem;
mod query;
mod txn;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::handler::Handler;
use axum::http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::http::request::Parts;
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use hyper_util::service::TowerToHyperService;
use serde::Serialize;
use tokio::sync::{Semaphore, watch as channel};
use tokio::time::{Instant, timeout_at};

use self::ids::ClusterId;
use self::problem::problem;
pub use self::watch::{WATCHERS_MAX, Wakeups};
use crate::error::RequestError;
use crate::httpapi::{Answer, ErrorResponse, HttpKvApi};
use crate::kvstore::Token;
use crate::ports::guard::{Refused, refusal};
use crate::ports::listener::{APPLICATION_CONNECTIONS_MAX, HttpService, Limits};
use crate::raft_node::Status;

/// What the handlers use. Each port that offers them has its own.
pub struct Application {
    /// The client port's handler: the store, its limits and its metrics. A budget of its own for bodies.
    pub keys: HttpKvApi,
    /// The node's status, for the cluster's id.
    pub status: channel::Receiver<Status>,
    /// Wakes the watchers.
    pub wakeups: Wakeups,
    /// Bounds the watchers.
    pub watchers: Arc<Semaphore>,
    /// Closed when this member stops, which ends the watches.
    pub stopping: channel::Receiver<()>,
}

/// The limits of the port's connections.
pub fn limits(shutdown_grace: Duration) -> Limits {
    Limits { connections: APPLICATION_CONNECTIONS_MAX, shutdown_grace, ..Limits::default() }
        .affordable()
}

/// The watchers that a port with these limits may have. A watcher keeps its connection, so with few descriptors
/// the watchers would leave none for requests.
pub fn watchers(limits: &Limits) -> usize {
    WATCHERS_MAX.min(limits.connections / 2)
}

/// The service for [`serve`](crate::ports::listener::serve). One handler takes every path and method, so
/// that no router interprets a key.
pub fn service(application: Arc<Application>) -> impl HttpService + HttpService<Body> {
    TowerToHyperService::new(serve_application.with_state(application))
}

async fn serve_application(
    State(application): State<Arc<Application>>,
    request: Request,
) -> Response {
    match refusal(request.version(), request.headers(), &application.keys.names, false) {
        Some(refused) => refuse(&application, request.method(), refused),
        None => respond(application, request).await,
    }
}

/// Responds to a request that the guard refuses.
pub(crate) fn refuse(application: &Application, method: &Method, refused: Refused) -> Response {
    let keys = &application.keys;
    keys.metrics.rejected(refused.reason);
    let response = problem(ErrorResponse::from(refused));
    keys.answered(method, response.status(), None);
    response
}

/// Responds to a request that the guard let pass.
pub(crate) async fn respond(application: Arc<Application>, request: Request) -> Response {
    let began = Instant::now();
    let (head, body) = request.into_parts();
    let keys = &application.keys;
    let deadline = began + keys.request_timeout;
    let target = head.uri.path_and_query().map_or("", PathAndQuery::as_str);
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let method = &head.method;
    let (timed, answer) = match path {
        _ if path.starts_with("/v1/kv/") => {
            let key = &target["/v1/kv".len()..];
            (true, application.key(&head, key, body, deadline).await)
        }
        "/v1/txn" if method == Method::POST => {
            (false, txn::post(&application, &head.headers, body, deadline).await)
        }
        "/v1/keys" if method == Method::GET => {
            (false, list::get(&application, query, &head.headers, deadline).await)
        }
        "/v1/watch" if method == Method::GET => {
            (false, watch::get(&application, query, &head.headers, deadline).await)
        }
        "/v1/retry-token" if method == Method::POST => {
            (false, application.retry_token(deadline).await)
        }
        "/v1/openapi.json" if method == Method::GET => (false, Ok(description())),
        "/v1/txn" | "/v1/retry-token" => (false, Ok(method_not_allowed("POST"))),
        "/v1/keys" | "/v1/watch" | "/v1/openapi.json" => (false, Ok(method_not_allowed("GET"))),
        _ => {
            let why = "the paths are /v1/kv/KEY, /v1/txn, /v1/keys, /v1/watch, /v1/retry-token and /v1/openapi.json";
            (false, Err(ErrorResponse::new(StatusCode::NOT_FOUND, why)))
        }
    };
    let mut response = answer.unwrap_or_else(problem);
    // A browser must not run a stored value as a script.
    let nosniff = HeaderValue::from_static("nosniff");
    response.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, nosniff);
    let elapsed = (timed && response.status().is_success()).then(|| began.elapsed());
    keys.answered(&head.method, response.status(), elapsed);
    response
}

impl Application {
    async fn key(&self, head: &Parts, key: &str, body: Body, deadline: Instant) -> Answer {
        match head.method {
            Method::GET | Method::HEAD => kv::get(self, key, &head.headers, deadline).await,
            Method::PUT => kv::put(self, key, &head.headers, body, deadline).await,
            Method::DELETE => kv::delete(self, key, &head.headers, deadline).await,
            _ => Ok(method_not_allowed("GET, HEAD, PUT, DELETE")),
        }
    }

    /// The cluster's id. A member that bootstraps or joins learns it when it has done so.
    async fn cluster_id(&self, deadline: Instant) -> Answer<ClusterId> {
        let mut status = self.status.clone();
        let known = status.wait_for(|status| status.begun && status.cluster_id != 0);
        match timeout_at(deadline, known).await {
            Ok(Ok(status)) => Ok(ClusterId(status.cluster_id)),
            _ => Err(RequestError::unavailable("this member belongs to no cluster yet").into()),
        }
    }

    /// Checks that a token was issued by this cluster.
    fn own_token(&self, token: Option<(ClusterId, Token)>, id: ClusterId) -> Answer<Option<Token>> {
        match token {
            Some((cluster, _)) if cluster != id => Err(ErrorResponse::new(
                StatusCode::CONFLICT,
                "this retry token is of another cluster, or of one that was restored since: the write may have been carried out there; read before deciding",
            )),
            token => Ok(token.map(|(_, token)| token)),
        }
    }

    /// Issues a token. On a member that lags it would be too old, so a majority is asked.
    async fn retry_token(&self, deadline: Instant) -> Answer {
        let id = self.cluster_id(deadline).await?;
        self.keys.store.node().wait_until_current(deadline).await?;
        let random = getrandom::u64().map_err(|error| {
            RequestError::unavailable(format!("there are no random numbers ({error})"))
        })?;
        let token = id.token(Token { index: self.keys.store.applied(), random });
        Ok((StatusCode::CREATED, JSON, json(&Issued { token })).into_response())
    }
}

fn method_not_allowed(allowed: &'static str) -> Response {
    let why = format!("this path takes {allowed}");
    let refused = problem(ErrorResponse::new(StatusCode::METHOD_NOT_ALLOWED, why));
    ([(ALLOW, allowed)], refused).into_response()
}

/// The description of the port.
fn description() -> Response {
    let kind = [(CONTENT_TYPE, "application/json"), (CACHE_CONTROL, "no-cache")];
    (kind, include_str!("openapi.json")).into_response()
}

/// The response to `POST /v1/retry-token`.
#[derive(Serialize)]
struct Issued {
    token: String,
}

/// The headers of a response that is JSON, and of this moment.
const JSON: [(HeaderName, &str); 2] =
    [(CONTENT_TYPE, "application/json"), (CACHE_CONTROL, "no-store")];

/// A line of JSON.
fn json(value: &impl Serialize) -> String {
    let mut text = serde_json::to_string(value).expect("the keys of its maps are strings");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watchers_leave_connections_for_requests() {
        for connections in [1, 2, 384, APPLICATION_CONNECTIONS_MAX] {
            let limits = Limits { connections, ..Limits::default() };
            assert!(watchers(&limits) < connections, "{connections}");
        }
        assert_eq!(watchers(&Limits { connections: 2048, ..Limits::default() }), WATCHERS_MAX);
    }
}
