//! `GET /v1/keys`: keys in order.

use std::borrow::Cow;

use axum::body::Body;
use axum::http::HeaderMap;
use axum::response::IntoResponse;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Serialize;
use tokio::time::Instant;

use super::ids::{ClusterId, bad_request, parse_decimal};
use super::query::Query;
use super::{Answer, Application, JSON, json};
use crate::channels::Index;
use crate::httpapi::consistency;
use crate::kvstore::{Consistency, KeyValue, Page};

/// Keys of a page, if the request names no limit.
const LIMIT: usize = 100;
/// The most keys of a page.
const LIMIT_MAX: usize = 1000;
/// A page ends after this many bytes of keys, and of values if it shows them.
const PAGE_BYTES: usize = 1 << 20;
/// Longer values are left out of pages and events: GET them.
const VALUE_BYTES_MAX: usize = 64 * 1024;

pub(super) async fn get(
    application: &Application,
    query: &str,
    headers: &HeaderMap,
    deadline: Instant,
) -> Answer {
    let query = Query::parse(query, &["prefix", "after", "limit", "values"])?;
    let (prefix, after) = (query.get("prefix").unwrap_or_default(), query.get("after"));
    let limit = match query.get("limit") {
        None => LIMIT,
        Some(limit) => parse_decimal(limit)
            .filter(|limit| (1..=LIMIT_MAX).contains(limit))
            .ok_or_else(|| bad_request(format!("limit must be 1 to {LIMIT_MAX}")))?,
    };
    let values = query.flag("values")?;
    let keys = &application.keys;
    let mut consistency = consistency(headers, keys.read)?;
    let mut room = None;
    loop {
        keys.store.wait_for(consistency, deadline).await?;
        let id = application.cluster_id(deadline).await?;
        let size = |record: &KeyValue| {
            let shown = if is_shown(record.value(), values) { record.value().len() } else { 0 };
            record.key().len() + shown
        };
        let after = after.map(str::as_bytes);
        let page = keys.store.page(prefix.as_bytes(), after, limit, PAGE_BYTES, size);
        let body: Body = match keys.responses.body(text(id, &page, values).into(), room.take()) {
            Ok(body) => body,
            Err(length) => {
                // The page is not kept meanwhile. What this member holds later is as current.
                room = Some(keys.responses.room(length, deadline).await?);
                consistency = Consistency::Local;
                continue;
            }
        };
        return Ok((JSON, body).into_response());
    }
}

fn text(id: ClusterId, page: &Page, values: bool) -> String {
    let last = page.records.last().filter(|_| page.has_more);
    json(&Listed {
        index: page.index,
        from: id.tag(page.index),
        keys: page
            .records
            .iter()
            .map(|it| Shown::new(id, it.key(), it.value(), it.index(), values))
            .collect(),
        next: last.map(|last| String::from_utf8_lossy(last.key())),
    })
}

/// The body of a response.
#[derive(Serialize)]
struct Listed<'a> {
    /// The last entry in the state that the page shows.
    index: Index,
    /// The same as a place to watch from.
    from: String,
    keys: Vec<Shown<'a>>,
    /// The key to give as `after` for the next page.
    next: Option<Cow<'a, str>>,
}

/// True if a page or an event contains `value`.
fn is_shown(value: &[u8], values: bool) -> bool {
    values && value.len() <= VALUE_BYTES_MAX
}

/// A key as pages and events show it.
#[derive(Serialize)]
pub(super) struct Shown<'a> {
    key: Cow<'a, str>,
    etag: String,
    bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<String>,
}

impl<'a> Shown<'a> {
    /// Shows a key whose value the entry at `index` wrote.
    pub fn new(id: ClusterId, key: &'a [u8], value: &[u8], index: Index, values: bool) -> Self {
        Self {
            key: String::from_utf8_lossy(key),
            etag: id.tag(index),
            bytes: value.len(),
            value: is_shown(value, values).then(|| BASE64_STANDARD.encode(value)),
        }
    }
}
