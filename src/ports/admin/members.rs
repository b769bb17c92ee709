//! Membership changes and leadership transfer. They are requests to the leader, which any member
//! forwards.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::Response;
use tokio::time::Instant;

use super::Shared;
use crate::channels::{MemberRequest, NodeId};
use crate::httpapi::ErrorResponse;

pub(super) async fn transfer_leadership(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<Vec<(String, String)>>,
) -> Result<Response, ErrorResponse> {
    let wanted = query.iter().find(|(name, _)| name == "to").map(|(_, id)| id.as_str());
    let to = wanted.map(parse_id).transpose()?;
    change(&shared, MemberRequest::Lead { to }).await
}

pub(super) async fn add(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, ErrorResponse> {
    let id = parse_id(&id)?;
    change_to_url(&shared, "POST", body, |url| MemberRequest::Add { id, url }).await
}

pub(super) async fn relocate(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, ErrorResponse> {
    let id = parse_id(&id)?;
    change_to_url(&shared, "PUT", body, |url| MemberRequest::Move { id, url }).await
}

pub(super) async fn remove(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
) -> Result<Response, ErrorResponse> {
    change(&shared, MemberRequest::Remove { id: parse_id(&id)? }).await
}

/// Makes a change that needs the URL in the body. One deadline covers the body and the change.
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

async fn change(shared: &Shared, change: MemberRequest) -> Result<Response, ErrorResponse> {
    let keys = &shared.admin.keys;
    keys.change_members(change, Instant::now() + keys.request_timeout).await
}

fn parse_id(text: &str) -> Result<NodeId, ErrorResponse> {
    text.parse().ok().filter(|id| *id != 0).ok_or_else(|| {
        let why = format!("{text:?} is no member id: give a number from 1 on");
        ErrorResponse::new(StatusCode::BAD_REQUEST, why)
    })
}
