//! `/v1/kv/KEY`: one key.

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, ETAG, HeaderName, HeaderValue};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use tokio::time::Instant;

use super::ids::{ClusterId, Precondition, retry_token};
use super::problem::problem;
use super::{Answer, Application};
use crate::channels::Index;
use crate::httpapi::{ErrorResponse, WrittenBy, consistency, entry};
use crate::kvstore::{Applied, Condition, Operation, Requirement, Txn};

/// `true` if the response is that of an earlier request with the same retry token.
static IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// `GET` and `HEAD`. The server sends no body with the latter.
pub(super) async fn get(
    application: &Application,
    key: &str,
    headers: &HeaderMap,
    deadline: Instant,
) -> Answer {
    let keys = &application.keys;
    let consistency = consistency(headers, keys.read)?;
    let precondition = Precondition::of(headers)?;
    let is_cached = matches!(precondition, Precondition::NoneMatch(_));
    let found = keys.found(key, consistency, deadline).await?;
    let id = application.cluster_id(deadline).await?;
    let index = found.as_ref().map(|(written, _)| written.index);
    let holds = precondition.requirement(id).is_none_or(|requirement| requirement.holds(index));
    let Some((WrittenBy { index, term }, value)) = found else {
        return Ok(if holds { absent() } else { condition_failed() });
    };
    let (tag, named) = (etag(id, index), entry(index, term));
    Ok(if holds {
        (CACHED, tag, named, value).into_response()
    } else if is_cached {
        (StatusCode::NOT_MODIFIED, CACHED, tag, named).into_response()
    } else {
        condition_failed()
    })
}

pub(super) async fn put(
    application: &Application,
    key: &str,
    headers: &HeaderMap,
    body: Body,
    deadline: Instant,
) -> Answer {
    let keys = &application.keys;
    let (precondition, token) = (Precondition::of(headers)?, retry_token(headers)?);
    // The permit counts the value's bytes until the response is known.
    let (value, _permit) = keys.read("PUT", body, keys.max_value_bytes, deadline).await?;
    let id = application.cluster_id(deadline).await?;
    let token = application.own_token(token, id)?;
    let requirement = precondition.requirement(id);
    let applied = if requirement.is_none() && token.is_none() {
        keys.store.put(key.as_bytes(), value, deadline).await?
    } else {
        let put = Operation::Put { key: key.as_bytes(), value: &value };
        let written = keys.store.transact(single(requirement, put), token, deadline);
        // The request's wait must not hold a second copy of the value.
        drop(value);
        written.await?
    };
    let (outcome, replayed) = (applied.outcome, replayed(&applied));
    let named = entry(outcome.index, outcome.term);
    Ok(if !outcome.succeeded {
        keys.metrics.conditions_failed.inc();
        (named, replayed, condition_failed()).into_response()
    } else {
        let status = if outcome.existed(0) { StatusCode::NO_CONTENT } else { StatusCode::CREATED };
        (status, etag(id, outcome.index), named, replayed, ()).into_response()
    })
}

pub(super) async fn delete(
    application: &Application,
    key: &str,
    headers: &HeaderMap,
    deadline: Instant,
) -> Answer {
    let keys = &application.keys;
    let (precondition, token) = (Precondition::of(headers)?, retry_token(headers)?);
    let id = application.cluster_id(deadline).await?;
    let token = application.own_token(token, id)?;
    let delete = Operation::Delete { key: key.as_bytes() };
    let txn = single(precondition.requirement(id), delete);
    let applied = keys.store.transact(txn, token, deadline).await?;
    let (outcome, replayed) = (applied.outcome, replayed(&applied));
    let named = entry(outcome.index, outcome.term);
    Ok(if !outcome.succeeded {
        keys.metrics.conditions_failed.inc();
        (named, replayed, condition_failed()).into_response()
    } else if outcome.existed(0) {
        (StatusCode::NO_CONTENT, named, replayed, ()).into_response()
    } else {
        (named, replayed, absent()).into_response()
    })
}

/// A transaction of one operation, with a condition on its key or without.
fn single(requirement: Option<Requirement>, operation: Operation<'_>) -> Txn<'_> {
    let key = operation.key();
    let conditions = requirement.map(|is| Condition { key, is }).into_iter().collect();
    Txn { conditions, ..Txn::of(operation) }
}

/// A cache has to ask before it uses what it kept: another client may have written meanwhile.
const CACHED: [(HeaderName, &str); 1] = [(CACHE_CONTROL, "no-cache")];

fn etag(id: ClusterId, index: Index) -> [(HeaderName, String); 1] {
    [(ETAG, format!("\"{}\"", id.tag(index)))]
}

pub(super) fn replayed(applied: &Applied) -> Option<[(HeaderName, HeaderValue); 1]> {
    let replayed = || [(IDEMPOTENCY_REPLAYED.clone(), HeaderValue::from_static("true"))];
    applied.is_replay.then(replayed)
}

fn condition_failed() -> Response {
    let why = "If-Match or If-None-Match does not hold for this key: GET it, and decide again";
    problem(ErrorResponse::new(StatusCode::PRECONDITION_FAILED, why))
}

fn absent() -> Response {
    problem(ErrorResponse::new(StatusCode::NOT_FOUND, "the key does not exist"))
}
