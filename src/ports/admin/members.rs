//! Membership changes and leadership transfer: requests to the leader, which any member forwards.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{Method, StatusCode};
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
    let keys = &shared.admin.application.keys;
    keys.change_members(MemberRequest::Lead { to }, Instant::now() + keys.request_timeout).await
}

/// Adds (POST), moves (PUT) or removes (DELETE) a member. One deadline covers the body and the change.
pub(super) async fn change(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
    method: Method,
    body: Body,
) -> Result<Response, ErrorResponse> {
    let id = parse_id(&id)?;
    let keys = &shared.admin.application.keys;
    let deadline = Instant::now() + keys.request_timeout;
    let change = if method == Method::DELETE {
        MemberRequest::Remove { id }
    } else {
        let url = keys.read_url(method.as_str(), body, deadline).await?.trim().to_owned();
        match method {
            Method::POST => MemberRequest::Add { id, url },
            _ => MemberRequest::Move { id, url },
        }
    };
    keys.change_members(change, deadline).await
}

fn parse_id(text: &str) -> Result<NodeId, ErrorResponse> {
    text.parse().ok().filter(|id| *id != 0).ok_or_else(|| {
        let why = format!("{text:?} is no member id: give a number from 1 on");
        ErrorResponse::new(StatusCode::BAD_REQUEST, why)
    })
}
