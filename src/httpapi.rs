//! The client port: the twin of the original's httpapi.go.
//!
//! | request | meaning |
//! |---|---|
//! | `PUT key` | set the key to the body's bytes |
//! | `GET key` | the key's bytes |
//! | `POST /<id>`, body = peer URL | add a member |
//! | `DELETE /<id>` | remove a member |
//!
//! The key is the request target as it was sent, leading slash and query string included, nothing
//! decoded and nothing normalised. Three things the `http` crate keeps from this module: what
//! follows a `#`, which no client that knows URLs sends, is cut off; of a whole URL as the target,
//! scheme and empty path are normalised; and a target with `<`, `>` or a backquote in its path, or
//! with bytes that are not UTF-8, is answered 400 before it gets here, as one above 65,534 bytes is
//! answered 414 or 431.
//!
//! Every request has one deadline, [`HttpKvApi::request_timeout`] after its head arrived, for its
//! body and for its outcome. All answers of the original keep its status, headers and body; the
//! answers beyond them are one line of plain text that says what to do. A browser's request from
//! another site's page is refused: such a page must not be able to add a member.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::handler::Handler;
use axum::http::header::{
    ALLOW, CONNECTION, CONTENT_TYPE, HeaderName, ORIGIN, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper_util::service::TowerToHyperService;
use slog::{Logger, info};
use tokio::time::Instant;

use crate::channels::{Ack, Acknowledged, Index, MemberRequest, NodeId, Term};
use crate::error::RequestError;
use crate::kvstore::{Consistency, KvStore};
use crate::metrics::Metrics;
use crate::ports::guard::{is_cross_origin, is_known_host};
use crate::ports::listener::{BodyBudget, BodyError, BodyPermit, HttpService, read_body};

/// The index of the entry that wrote the value: on PUT 204 and GET 200.
const RAFT_INDEX: HeaderName = HeaderName::from_static("raft-index");
/// That entry's term.
const RAFT_TERM: HeaderName = HeaderName::from_static("raft-term");
/// How current one GET has to be: `linearizable` or `local`.
const RAFT_READ: HeaderName = HeaderName::from_static("raft-read");

/// The largest body of a POST: a peer URL, with room to spare.
const URL_BYTES_MAX: usize = 64 * 1024;

/// The handler of the client port.
pub struct HttpKvApi {
    /// Answers PUT and GET.
    pub store: KvStore,
    /// When a PUT is answered.
    pub ack: Ack,
    /// How current a GET is that does not say so itself.
    pub read: Consistency,
    /// How long a request may take from its head to its answer.
    pub request_timeout: Duration,
    /// The largest body of a PUT.
    pub max_value_bytes: usize,
    /// Bounds the bodies of all requests together.
    pub budget: BodyBudget,
    /// Where requests are counted.
    pub metrics: Metrics,
    /// Where failed requests are reported.
    pub logger: Logger,
}

/// The service to give to [`serve`](crate::ports::listener::serve). Every path and every method has one
/// handler, so that nothing but this module looks at a request's target.
pub fn service(api: impl Into<Arc<HttpKvApi>>) -> impl HttpService + HttpService<Body> {
    TowerToHyperService::new(serve_http.with_state(api.into()))
}

/// The twin of the original's `ServeHTTP`.
pub(crate) async fn serve_http(State(api): State<Arc<HttpKvApi>>, request: Request) -> Response {
    let began = Instant::now();
    let (head, body) = request.into_parts();
    let (method, answered) = match head.method {
        Method::PUT => ("PUT", Some(&api.metrics.puts)),
        Method::GET => ("GET", Some(&api.metrics.gets)),
        Method::POST => ("POST", None),
        Method::DELETE => ("DELETE", None),
        _ => ("other", None),
    };
    let response = answer(&api, head, body, began + api.request_timeout).await;
    api.metrics.answered(method, response.status().as_u16());
    if let Some(answered) = answered.filter(|_| response.status().is_success()) {
        answered.observe(began.elapsed());
    }
    response
}

async fn answer(api: &HttpKvApi, head: Parts, body: Body, deadline: Instant) -> Response {
    // No page is served here. One whose own name was made to resolve to this port names that as its
    // origin and as the host.
    let is_rebound = head.headers.contains_key(ORIGIN) && !is_known_host(&head.headers, &[]);
    if is_cross_origin(&head.headers) || is_rebound {
        api.metrics.rejected("foreign_origin");
        let why = "a page of another origin may not use this port; send no Origin header";
        return ErrorResponse::new(StatusCode::FORBIDDEN, why).into_response();
    }
    let answer = match (head.method, key(&head.uri)) {
        (Method::PUT, Some(key)) => api.put(&key, body, deadline).await,
        (Method::GET, Some(key)) => api.get(&key, &head.headers, deadline).await,
        (Method::POST, Some(key)) => api.post(&key, body, deadline).await,
        (Method::DELETE, Some(key)) => api.delete(&key, deadline).await,
        (Method::PUT | Method::GET | Method::POST | Method::DELETE, None) => {
            Err(ErrorResponse::new(StatusCode::BAD_REQUEST, "a key begins with a slash"))
        }
        _ => return method_not_allowed(),
    };
    answer.unwrap_or_else(ErrorResponse::into_response)
}

impl HttpKvApi {
    async fn put(
        &self,
        key: &str,
        body: Body,
        deadline: Instant,
    ) -> Result<Response, ErrorResponse> {
        // The permit lives as long as the value does: until the answer is known.
        let (value, _permit) = self.read("PUT", body, self.max_value_bytes, deadline).await?;
        let acknowledged = self.store.propose(key.as_bytes(), value, self.ack, deadline).await?;
        let mut response = StatusCode::NO_CONTENT.into_response();
        if let Acknowledged::Applied { index, term } = acknowledged {
            name_entry(response.headers_mut(), index, term);
        }
        Ok(response)
    }

    async fn get(
        &self,
        key: &str,
        headers: &HeaderMap,
        deadline: Instant,
    ) -> Result<Response, ErrorResponse> {
        let consistency = consistency(headers, self.read)?;
        let Some(found) = self.store.lookup(key.as_bytes(), consistency, deadline).await? else {
            return Err(ErrorResponse::new(StatusCode::NOT_FOUND, "Failed to GET"));
        };
        // The original lets Go guess a type from the bytes. They are bytes: a browser must not run
        // what somebody stored.
        let (index, term) = (found.index(), found.term());
        let mut response = Body::from(found.into_value()).into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        name_entry(headers, index, term);
        Ok(response)
    }

    /// Reads the URL before it looks at the id, as the original does: a broken body with a bad id
    /// is reported as a broken body. What makes a URL usable is for the node to say.
    async fn post(
        &self,
        key: &str,
        body: Body,
        deadline: Instant,
    ) -> Result<Response, ErrorResponse> {
        let (url, _permit) = self.read("POST", body, URL_BYTES_MAX, deadline).await?;
        let id = self.id("POST", key)?;
        let url = utf8(url)?;
        self.change_members(MemberRequest::Add { id, url }, deadline).await
    }

    async fn delete(&self, key: &str, deadline: Instant) -> Result<Response, ErrorResponse> {
        let id = self.id("DELETE", key)?;
        self.change_members(MemberRequest::Remove { id }, deadline).await
    }

    /// Reads a body that is a peer URL, as that of a POST is.
    pub(crate) async fn read_url(
        &self,
        method: &str,
        body: Body,
        deadline: Instant,
    ) -> Result<String, ErrorResponse> {
        let (url, _permit) = self.read(method, body, URL_BYTES_MAX, deadline).await?;
        utf8(url)
    }

    /// Has the leader make a change, and answers 204 once it is applied.
    pub(crate) async fn change_members(
        &self,
        change: MemberRequest,
        deadline: Instant,
    ) -> Result<Response, ErrorResponse> {
        self.store.node().change_members(change, deadline).await?;
        Ok(StatusCode::NO_CONTENT.into_response())
    }

    /// Reads the body of a `method` request, at most `max_bytes` of it.
    async fn read(
        &self,
        method: &str,
        body: Body,
        max_bytes: usize,
        deadline: Instant,
    ) -> Result<(Bytes, BodyPermit), ErrorResponse> {
        let error = match read_body(body, max_bytes, &self.budget, deadline).await {
            Ok(read) => return Ok(read),
            Err(error) => error,
        };
        info!(self.logger, "Failed to read on {} ({})", method, error);
        let (status, message) = match error {
            BodyError::Broken(_) => (StatusCode::BAD_REQUEST, format!("Failed on {method}")),
            BodyError::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, error.to_string()),
            BodyError::TimedOut => (
                StatusCode::REQUEST_TIMEOUT,
                format!("{error}: nothing was changed; send it faster, or in smaller parts"),
            ),
            BodyError::Busy => (
                StatusCode::SERVICE_UNAVAILABLE,
                format!("{error}: nothing was changed; try again"),
            ),
        };
        Err(ErrorResponse { closes: true, ..ErrorResponse::new(status, message) })
    }

    /// The member that `key` names in a `method` request.
    fn id(&self, method: &str, key: &str) -> Result<NodeId, ErrorResponse> {
        let digits = key.get(1..).unwrap_or_default();
        parse_uint(digits).map_err(|error| {
            info!(self.logger, "Failed to convert ID for conf change ({})", error;
                "id" => digits);
            ErrorResponse::new(StatusCode::BAD_REQUEST, format!("Failed on {method}"))
        })
    }
}

fn utf8(url: Bytes) -> Result<String, ErrorResponse> {
    String::from_utf8(url.into()).map_err(|_| {
        let why = "the body has to be the member's peer URL in UTF-8";
        ErrorResponse::new(StatusCode::BAD_REQUEST, why)
    })
}

/// A response that reports an error.
#[derive(Debug)]
pub(crate) struct ErrorResponse {
    status: StatusCode,
    /// The line that is the body.
    message: String,
    /// True if the request was not read to its end, so that no other can follow it.
    closes: bool,
}

impl ErrorResponse {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), closes: false }
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
        };
        Self::new(status, error.to_string())
    }
}

impl IntoResponse for ErrorResponse {
    /// The headers and the line feed are those of Go's `http.Error`.
    fn into_response(self) -> Response {
        // A message may quote what a client sent, and it is one line all the same.
        let mut body = self.message.replace(['\r', '\n'], " ");
        body.push('\n');
        let mut response = (self.status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if self.closes {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// The answer to any other method: one `Allow` header for each that there is, as the original has.
fn method_not_allowed() -> Response {
    let refused = ErrorResponse::new(StatusCode::METHOD_NOT_ALLOWED, "Method not allowed");
    let mut response = refused.into_response();
    for method in ["PUT", "GET", "POST", "DELETE"] {
        response.headers_mut().append(ALLOW, HeaderValue::from_static(method));
    }
    response
}

/// Names the entry that wrote a value.
fn name_entry(headers: &mut HeaderMap, index: Index, term: Term) {
    headers.insert(RAFT_INDEX, HeaderValue::from(index));
    headers.insert(RAFT_TERM, HeaderValue::from(term));
}

/// The request's target; `None` if it is a bare word, which is neither a path nor a URL.
fn key(target: &Uri) -> Option<Cow<'_, str>> {
    if target.scheme().is_some() {
        return Some(Cow::Owned(target.to_string()));
    }
    target.path_and_query().map(|path| Cow::Borrowed(path.as_str()))
}

/// How current a GET with these headers has to be.
fn consistency(headers: &HeaderMap, default: Consistency) -> Result<Consistency, ErrorResponse> {
    let mut values = headers.get_all(RAFT_READ).iter().map(HeaderValue::as_bytes);
    match (values.next(), values.next()) {
        (None, _) => Ok(default),
        (Some(b"linearizable"), None) => Ok(Consistency::Linearizable),
        (Some(b"local"), None) => Ok(Consistency::Local),
        _ => Err(ErrorResponse::new(
            StatusCode::BAD_REQUEST,
            "Raft-Read has to be one of: linearizable, local",
        )),
    }
}

/// Why an id does not parse, in Go's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum ParseUintError {
    /// It is not a number in any of the notations.
    #[error("invalid syntax")]
    Syntax,
    /// It does not fit in 64 bits.
    #[error("value out of range")]
    Range,
}

/// Parses `text` as Go's `strconv.ParseUint(text, 0, 64)` does.
///
/// A prefix gives the base: `0x` 16, `0o` or a bare `0` 8, `0b` 2, in either case. As in Go's
/// literals, an underscore may stand between two digits, or between the prefix and a digit. There
/// is no sign.
///
/// # Errors
/// See [`ParseUintError`].
fn parse_uint(text: &str) -> Result<u64, ParseUintError> {
    let (base, digits) = match text.as_bytes() {
        [] => return Err(ParseUintError::Syntax),
        [b'0', b'x' | b'X', digits @ ..] if !digits.is_empty() => (16, digits),
        [b'0', b'o' | b'O', digits @ ..] if !digits.is_empty() => (8, digits),
        [b'0', b'b' | b'B', digits @ ..] if !digits.is_empty() => (2, digits),
        [b'0', digits @ ..] => (8, digits),
        digits => (10, digits),
    };
    let mut value: u64 = 0;
    for &byte in digits.iter().filter(|&&byte| byte != b'_') {
        let digit = char::from(byte).to_digit(base).ok_or(ParseUintError::Syntax)?;
        value = value
            .checked_mul(u64::from(base))
            .and_then(|value| value.checked_add(u64::from(digit)))
            .ok_or(ParseUintError::Range)?;
    }
    // All that is left are digits, the prefix and underscores.
    if text.starts_with('_') || text.ends_with('_') || text.contains("__") {
        return Err(ParseUintError::Syntax);
    }
    Ok(value)
}

#[cfg(test)]
mod tests;
