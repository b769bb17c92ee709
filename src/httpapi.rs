//! The client port: the twin of the original's httpapi.go.
//!
//! | request | meaning |
//! |---|---|
//! | `PUT key` | set the key to the body's bytes |
//! | `GET key` | the key's bytes |
//! | `POST /<id>`, body = peer URL | add a member |
//! | `DELETE /<id>` | remove a member |
//!
//! The key is the request target as the client sent it: with the leading slash and the query string,
//! neither decoded nor normalised. The `http` crate makes these exceptions: it removes a fragment
//! (`#…`), which no HTTP client sends; it normalises the scheme and an empty path of an absolute URL;
//! it answers 400 to a path with `<`, `>`, a backquote or bytes that are not UTF-8, and 414 or 431 to
//! a target above 65,534 bytes.
//!
//! Each request has one deadline for its body and its outcome: [`HttpKvApi::request_timeout`] after
//! its head arrived. Responses that the original has keep its status, headers and body. Other
//! responses are one line of plain text that says what to do. Requests that a browser sends for a
//! page of another site are refused, because such a page could add a member.

use std::borrow::Cow;
use std::num::IntErrorKind;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::handler::Handler;
use axum::http::header::{
    ALLOW, CONNECTION, CONTENT_TYPE, HeaderName, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use axum::response::{AppendHeaders, IntoResponse, Response};
use bytes::Bytes;
use hyper_util::service::TowerToHyperService;
use slog::{Logger, info};
use tokio::time::Instant;

use crate::channels::{Ack, Acknowledged, Index, MemberRequest, NodeId, Term};
use crate::error::RequestError;
use crate::kvstore::{Consistency, KvStore};
use crate::metrics::Metrics;
use crate::ports::guard::{Refused, refusal};
use crate::ports::listener::{
    BodyBudget, BodyError, BodyPermit, HttpService, ResponseBudget, read_body,
};

/// The index of the entry that wrote the value: on PUT 204 and GET 200.
const RAFT_INDEX: HeaderName = HeaderName::from_static("raft-index");
/// The term of that entry.
const RAFT_TERM: HeaderName = HeaderName::from_static("raft-term");
/// Overrides [`HttpKvApi::read`] for one GET: `linearizable` or `local`.
const RAFT_READ: HeaderName = HeaderName::from_static("raft-read");

/// The largest body of a POST in bytes. It holds a peer URL.
const URL_BYTES_MAX: usize = 64 * 1024;

/// The handler of the client port.
pub struct HttpKvApi {
    /// The name of its port in the metrics.
    pub port: &'static str,
    /// Serves PUT and GET, and forwards POST and DELETE to the raft node.
    pub store: KvStore,
    /// When a PUT is answered.
    pub ack: Ack,
    /// How current a GET is by default.
    pub read: Consistency,
    /// The time between a request's head and its response.
    pub request_timeout: Duration,
    /// The largest body of a PUT in bytes.
    pub max_value_bytes: usize,
    /// Bounds the bytes of all requests' bodies together.
    pub budget: BodyBudget,
    /// Bounds the bytes of large responses together.
    pub responses: ResponseBudget,
    /// Host names that requests may call the port by, see the [guard](crate::ports::guard).
    pub names: Vec<String>,
    /// Counts requests.
    pub metrics: Metrics,
    /// Logs failed requests.
    pub logger: Logger,
}

/// The entry that wrote a value.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WrittenBy {
    pub(crate) index: Index,
    pub(crate) term: Term,
}

/// A response, or one that reports an error.
pub(crate) type Answer<T = Response> = Result<T, ErrorResponse>;

/// The service for [`serve`](crate::ports::listener::serve). One handler takes every path and method,
/// so that no router interprets the target.
pub fn service(api: impl Into<Arc<HttpKvApi>>) -> impl HttpService + HttpService<Body> {
    TowerToHyperService::new(serve_http.with_state(api.into()))
}

/// The twin of the original's `ServeHTTP`.
async fn serve_http(State(api): State<Arc<HttpKvApi>>, request: Request) -> Response {
    let began = Instant::now();
    let (head, body) = request.into_parts();
    let method = head.method.clone();
    let response = match refusal(head.version, &head.headers, &api.names, false) {
        Some(refused) => {
            api.metrics.rejected(refused.reason);
            ErrorResponse::from(refused).into_response()
        }
        None => answer(&api, head, body, began + api.request_timeout).await,
    };
    let elapsed = response.status().is_success().then(|| began.elapsed());
    api.answered(&method, response.status(), elapsed);
    response
}

async fn answer(api: &HttpKvApi, head: Parts, body: Body, deadline: Instant) -> Response {
    let answer = match (head.method, key(&head.uri)) {
        (Method::PUT, Some(key)) => api.put(&key, body, deadline).await,
        (Method::GET, Some(key)) => api.get(&key, &head.headers, deadline).await,
        (Method::POST, Some(key)) => api.post(&key, body, deadline).await,
        (Method::DELETE, Some(key)) => api.delete(&key, deadline).await,
        (Method::PUT | Method::GET | Method::POST | Method::DELETE, None) => {
            Err(ErrorResponse::new(StatusCode::BAD_REQUEST, "a key must start with a slash"))
        }
        _ => return method_not_allowed(),
    };
    answer.unwrap_or_else(ErrorResponse::into_response)
}

/// What follows the original's words if `DELETE` names a key. A client may expect that it removes the key.
const NO_KEY_IS_DELETED: &str = ": DELETE /ID removes a member; DELETE /v1/kv/KEY on the application or admin port (--api, --admin) removes a key, as does `raftexample delete KEY`";

impl HttpKvApi {
    /// Counts a response, and the time of a successful PUT or GET of a key.
    pub(crate) fn answered(&self, method: &Method, status: StatusCode, elapsed: Option<Duration>) {
        let (name, answered) = match *method {
            Method::PUT => ("PUT", Some(&self.metrics.puts)),
            Method::GET => ("GET", Some(&self.metrics.gets)),
            Method::HEAD => ("HEAD", None),
            Method::POST => ("POST", None),
            Method::DELETE => ("DELETE", None),
            _ => ("other", None),
        };
        self.metrics.answered(self.port, name, status.as_u16());
        if let (Some(answered), Some(elapsed)) = (answered, elapsed) {
            answered.observe(elapsed);
        }
    }

    async fn put(&self, key: &str, body: Body, deadline: Instant) -> Answer {
        // The permit counts the value's bytes until the response is known.
        let (value, _permit) = self.read("PUT", body, self.max_value_bytes, deadline).await?;
        let status = StatusCode::NO_CONTENT;
        Ok(match self.store.propose(key.as_bytes(), value, self.ack, deadline).await? {
            Acknowledged::Proposed => status.into_response(),
            Acknowledged::Applied { index, term } => (status, entry(index, term)).into_response(),
        })
    }

    async fn get(&self, key: &str, headers: &HeaderMap, deadline: Instant) -> Answer {
        let consistency = consistency(headers, self.read)?;
        let Some((written, value)) = self.found(key, consistency, deadline).await? else {
            return Err(ErrorResponse::new(StatusCode::NOT_FOUND, "Failed to GET"));
        };
        Ok((entry(written.index, written.term), value).into_response())
    }

    /// Reads a key: the entry that wrote it, and a response with its value. `None` if it does not exist.
    pub(crate) async fn found(
        &self,
        key: &str,
        mut consistency: Consistency,
        deadline: Instant,
    ) -> Answer<Option<(WrittenBy, Response)>> {
        let mut room = None;
        loop {
            let found = self.store.lookup(key.as_bytes(), consistency, deadline).await?;
            let Some(found) = found else { return Ok(None) };
            let written = WrittenBy { index: found.index(), term: found.term() };
            let body = match self.responses.body(found.into_value(), room.take()) {
                Ok(body) => body,
                Err(length) => {
                    // The value is not kept meanwhile. What this member holds later is as current.
                    room = Some(self.responses.room(length, deadline).await?);
                    consistency = Consistency::Local;
                    continue;
                }
            };
            // The original lets Go guess a type from the value. With a fixed type, a browser cannot run
            // a stored value as a script.
            let fixed =
                [(CONTENT_TYPE, "application/octet-stream"), (X_CONTENT_TYPE_OPTIONS, "nosniff")];
            return Ok(Some((written, (fixed, body).into_response())));
        }
    }

    /// Reads the URL before the id, as the original does: a broken body is reported even if the id is
    /// invalid. The node validates the URL.
    async fn post(&self, key: &str, body: Body, deadline: Instant) -> Answer {
        let (url, _permit) = self.read("POST", body, URL_BYTES_MAX, deadline).await?;
        let id = self.id("POST", key)?;
        let url = utf8(url)?;
        self.change_members(MemberRequest::Add { id, url }, deadline).await
    }

    async fn delete(&self, key: &str, deadline: Instant) -> Answer {
        let id = self.id("DELETE", key).map_err(|mut refused| {
            refused.message += NO_KEY_IS_DELETED;
            refused
        })?;
        self.change_members(MemberRequest::Remove { id }, deadline).await
    }

    pub(crate) async fn read_url(
        &self,
        method: &str,
        body: Body,
        deadline: Instant,
    ) -> Answer<String> {
        let (url, _permit) = self.read(method, body, URL_BYTES_MAX, deadline).await?;
        utf8(url)
    }

    /// Asks the leader for a membership change, and responds 204 once this change is applied.
    pub(crate) async fn change_members(&self, change: MemberRequest, deadline: Instant) -> Answer {
        self.store.node().change_members(change, deadline).await?;
        Ok(StatusCode::NO_CONTENT.into_response())
    }

    /// Reads the body of a `method` request, of at most `max_bytes`.
    pub(crate) async fn read(
        &self,
        method: &str,
        body: Body,
        max_bytes: usize,
        deadline: Instant,
    ) -> Answer<(Bytes, BodyPermit)> {
        let error = match read_body(body, max_bytes, &self.budget, deadline).await {
            Ok(read) => return Ok(read),
            Err(error) => error,
        };
        info!(self.logger, "Failed to read on {} ({})", method, error);
        let response = match error {
            BodyError::Broken(_) => {
                ErrorResponse::new(StatusCode::BAD_REQUEST, format!("Failed on {method}"))
            }
            BodyError::TooLarge(_) => {
                ErrorResponse::new(StatusCode::PAYLOAD_TOO_LARGE, error.to_string())
            }
            BodyError::TimedOut => ErrorResponse::new(
                StatusCode::REQUEST_TIMEOUT,
                format!("{error}: nothing was changed; send it faster, or in smaller parts"),
            ),
            BodyError::Busy => RequestError::unavailable(error).into(),
        };
        Err(ErrorResponse { closes: true, ..response })
    }

    /// Parses the member's id from `key`, the target of a `method` request.
    fn id(&self, method: &str, key: &str) -> Answer<NodeId> {
        let digits = key.get(1..).unwrap_or_default();
        parse_uint(digits).map_err(|error| {
            info!(self.logger, "Failed to convert ID for conf change ({})", error;
                "id" => digits);
            ErrorResponse::new(StatusCode::BAD_REQUEST, format!("Failed on {method}"))
        })
    }
}

fn utf8(url: Bytes) -> Answer<String> {
    String::from_utf8(url.into()).map_err(|_| {
        let why = "the body must be the member's peer URL in UTF-8";
        ErrorResponse::new(StatusCode::BAD_REQUEST, why)
    })
}

/// A response that reports an error.
#[derive(Debug)]
pub(crate) struct ErrorResponse {
    pub(crate) status: StatusCode,
    /// The body, one line.
    pub(crate) message: String,
    /// True if the body was not read to its end, so the connection cannot carry another request.
    closes: bool,
}

impl ErrorResponse {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), closes: false }
    }
}

impl From<Refused> for ErrorResponse {
    fn from(refused: Refused) -> Self {
        Self::new(refused.status, refused.why)
    }
}

impl From<RequestError> for ErrorResponse {
    fn from(error: RequestError) -> Self {
        let status = match error {
            RequestError::Invalid(_) => StatusCode::BAD_REQUEST,
            RequestError::Conflict(_) => StatusCode::CONFLICT,
            RequestError::Gone(_) => StatusCode::GONE,
            RequestError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            RequestError::Unknown(_) => StatusCode::GATEWAY_TIMEOUT,
            RequestError::Unprocessable(_) => StatusCode::UNPROCESSABLE_ENTITY,
        };
        Self::new(status, error.to_string())
    }
}

impl IntoResponse for ErrorResponse {
    /// As Go's `http.Error`: the same headers, and a line feed after the message.
    fn into_response(self) -> Response {
        // A message may quote the client. It stays one line.
        let mut body = self.message.replace(['\r', '\n'], " ");
        body.push('\n');
        let fixed =
            [(CONTENT_TYPE, "text/plain; charset=utf-8"), (X_CONTENT_TYPE_OPTIONS, "nosniff")];
        let mut response = (self.status, fixed, body).into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.closes {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// The response to any other method. It has one `Allow` header per method, as in the original.
fn method_not_allowed() -> Response {
    let refused = ErrorResponse::new(StatusCode::METHOD_NOT_ALLOWED, "Method not allowed");
    let allowed = ["PUT", "GET", "POST", "DELETE"].map(|method| (ALLOW, method));
    (AppendHeaders(allowed), refused).into_response()
}

/// The headers that name the entry that wrote a value.
pub(crate) fn entry(index: Index, term: Term) -> [(HeaderName, u64); 2] {
    [(RAFT_INDEX, index), (RAFT_TERM, term)]
}

/// The key in a request's target; `None` if the target is neither a path nor a URL.
fn key(target: &Uri) -> Option<Cow<'_, str>> {
    if target.scheme().is_some() {
        return Some(Cow::Owned(target.to_string()));
    }
    target.path_and_query().map(|path| Cow::Borrowed(path.as_str()))
}

pub(crate) fn consistency(headers: &HeaderMap, default: Consistency) -> Answer<Consistency> {
    let mut values = headers.get_all(RAFT_READ).iter().map(HeaderValue::as_bytes);
    match (values.next(), values.next()) {
        (None, _) => Ok(default),
        (Some(b"linearizable"), None) => Ok(Consistency::Linearizable),
        (Some(b"local"), None) => Ok(Consistency::Local),
        _ => Err(ErrorResponse::new(
            StatusCode::BAD_REQUEST,
            "Raft-Read must be linearizable or local",
        )),
    }
}

/// Parses `text` as Go's `strconv.ParseUint(text, 0, 64)` does.
///
/// A prefix selects the base: `0x` 16, `0o` or a bare `0` 8, `0b` 2, in either case. An underscore may
/// separate two digits, or the prefix and a digit. There is no sign. The errors are in Go's words.
fn parse_uint(text: &str) -> Result<u64, &'static str> {
    const SYNTAX: &str = "invalid syntax";
    let (base, digits) = match text.as_bytes() {
        [b'0', b'x' | b'X', _, ..] => (16, &text[2..]),
        [b'0', b'o' | b'O', _, ..] => (8, &text[2..]),
        [b'0', b'b' | b'B', _, ..] => (2, &text[2..]),
        [b'0', ..] => (8, text),
        _ => (10, text),
    };
    let is_misplaced = text.starts_with('_') || text.ends_with('_') || text.contains("__");
    let digits = digits.replace('_', "");
    match u64::from_str_radix(&digits, base) {
        // Rust allows a sign.
        _ if digits.starts_with('+') => Err(SYNTAX),
        Err(error) if *error.kind() == IntErrorKind::PosOverflow => Err("value out of range"),
        Ok(value) if !is_misplaced => Ok(value),
        _ => Err(SYNTAX),
    }
}

#[cfg(test)]
mod tests;
