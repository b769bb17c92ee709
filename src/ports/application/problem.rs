//! Errors as problem documents (RFC 9457).

use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::json;
use crate::httpapi::ErrorResponse;

#[derive(Serialize)]
struct Problem {
    #[serde(rename = "type")]
    kind: String,
    title: &'static str,
    status: u16,
    detail: String,
}

/// The name of a status's problem, the end of its `type`, and what all problems of that name share.
fn kind(status: StatusCode) -> (&'static str, &'static str) {
    match status.as_u16() {
        400 => ("bad-request", "The request is invalid"),
        403 => ("forbidden", "A page of another origin may not use this port"),
        404 => ("not-found", "It does not exist"),
        405 => ("method-not-allowed", "The path does not take this method"),
        408 => ("too-slow", "The request did not arrive in time"),
        409 => ("token-expired", "The retry token is too old, or of another cluster"),
        412 => ("condition-failed", "A condition does not hold"),
        413 => ("too-large", "The body is too large"),
        422 => ("token-reused", "The retry token was used for another write"),
        501 => ("not-implemented", "It is not implemented"),
        503 => ("unavailable", "Nothing was changed: try again"),
        504 => ("outcome-unknown", "The request may or may not have been carried out"),
        _ => ("error", "The request failed"),
    }
}

/// The response that reports an error: the client port's status and headers, with another body.
pub(super) fn problem(error: ErrorResponse) -> Response {
    let (status, detail) = (error.status, error.message.clone());
    let (name, title) = kind(status);
    let kind = format!("urn:raftexample:{name}");
    let body = json(&Problem { kind, title, status: status.as_u16(), detail });
    let mut response = error.into_response();
    let kind = HeaderValue::from_static("application/problem+json");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    *response.body_mut() = body.into();
    response
}
