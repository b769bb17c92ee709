//! What the member and its cluster look like now: JSON, events and metrics.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, VARY};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, StreamExt};
use prometheus_client::encoding::text::{encode, encode_registry};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::{Admin, Shared, json_response};
use crate::channels::NodeId;
use crate::httpapi::ErrorResponse;
use crate::raft_node::{PeerStatus, Role, Status};
use crate::transport::{SLOW_INTERVAL, Statuses};

/// A member that has not answered for this long is shown as dead.
const DEAD_AFTER: Duration = Duration::from_secs(1);
/// The time between two events of `/events`.
const EVENT_INTERVAL: Duration = Duration::from_millis(200);

pub(super) async fn status(State(shared): State<Arc<Shared>>) -> Response {
    json_response(&member_status(&shared.admin.status.borrow()))
}

pub(super) async fn members(State(shared): State<Arc<Shared>>) -> Response {
    json_response(&member_status(&shared.admin.status.borrow())["members"])
}

/// One member's status as JSON.
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
        "admin_url": tick.admin_url,
        "wal_bytes": tick.wal_bytes,
        "keys": tick.keys,
        "store_bytes": tick.store_bytes,
        "puts": requests(tick.puts),
        "gets": requests(tick.gets),
        "uptime_seconds": tick.uptime_ms as f64 / 1000.0,
        "version": tick.version,
    })
}

/// Every member's status as JSON, with this member's as of `at`. `watching` is how long the other members have
/// been asked often: until [`DEAD_AFTER`], a member that has not answered lately is unknown rather than dead.
fn cluster_status(
    (at, status): (Instant, &Status),
    statuses: &Statuses,
    watching: Duration,
) -> Value {
    let member = |(id, url): (&NodeId, &String)| {
        let age_ms = |at: &Instant| at.elapsed().as_millis() as u64;
        let said = if *id == status.id {
            Some((age_ms(&at), status))
        } else {
            statuses.get(id).map(|(at, status)| (age_ms(at), &**status))
        };
        let is_alive = match said {
            Some((age, _)) if *id == status.id || u128::from(age) <= DEAD_AFTER.as_millis() => {
                Some(true)
            }
            _ => (watching > DEAD_AFTER).then_some(false),
        };
        // A learner that no member has heard from waits for its first start.
        let has_heard =
            |status: &Status| status.tick.peers.get(id).is_some_and(|peer| peer.heard_ms.is_some());
        let is_started = said.is_some()
            || !status.learners.contains(id)
            || has_heard(status)
            || statuses.values().any(|(_, status)| has_heard(status));
        json!({
            "id": id,
            "url": url,
            "alive": is_alive,
            "started": is_started,
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

pub(super) async fn cluster(State(shared): State<Arc<Shared>>) -> Response {
    let Admin { cluster, status, .. } = &shared.admin;
    let began = Instant::now();
    let own = status.borrow().clone();
    let mut statuses = cluster.watch();
    // A member that has been silent for so long is dead, and does not delay the response.
    let is_known = |at: Instant| at >= began || began - at > DEAD_AFTER + 2 * SLOW_INTERVAL;
    let all_answered = |statuses: &Statuses| {
        let mut others = own.members.urls.keys().filter(|other| **other != own.id);
        others.all(|other| statuses.get(other).is_some_and(|(at, _)| is_known(*at)))
    };
    // After the timeout, the members that did not answer are shown as dead.
    let _ = timeout(DEAD_AFTER, statuses.wait_for(all_answered)).await;
    let watching = DEAD_AFTER + EVENT_INTERVAL;
    // A follower's own status is the oldest one and a leader's the newest, so it is not ahead of its leader's.
    let now = (Instant::now(), status.borrow().clone());
    let own = if now.1.role == Role::Leader { now } else { (began, own) };
    json_response(&cluster_status((own.0, &own.1), &statuses.borrow(), watching))
}

/// Sends the cluster's status in each event, and events named `points` with what is new in the charts: at first
/// all of it.
pub(super) async fn events(
    State(shared): State<Arc<Shared>>,
) -> Result<impl IntoResponse, ErrorResponse> {
    let permit = shared.event_streams.clone().try_acquire_owned().map_err(|_| {
        let why = "too many pages show this member: close one";
        ErrorResponse::new(StatusCode::SERVICE_UNAVAILABLE, why)
    })?;
    let mut stopping = shared.admin.stopping.clone();
    let began = Instant::now();
    let mut ticks = interval(EVENT_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = None;
    let ticks = stream::poll_fn(move |context| ticks.poll_tick(context).map(Some));
    let events = ticks.flat_map(move |_| {
        let _permit = &permit;
        let statuses = shared.admin.cluster.watch();
        let status = shared.admin.status.borrow().clone();
        let now = (Instant::now(), &status);
        let cluster = cluster_status(now, &statuses.borrow(), began.elapsed());
        let points = shared.history.after(last);
        last = points.last().map(|point| point.at).or(last);
        let points = (!points.is_empty()).then(|| {
            Event::default().event("points").data(shared.history.json(&points).to_string())
        });
        let events = [Some(Event::default().data(cluster.to_string())), points];
        stream::iter(events.into_iter().flatten().map(Ok::<_, Infallible>))
    });
    let events = events.take_until(async move { stopping.changed().await });
    Ok(([(CACHE_CONTROL, "no-store")], Sse::new(events)))
}

/// OpenMetrics if the client asks for it, as Prometheus does; else Prometheus' older text format, which more
/// tools read.
pub(super) async fn metrics(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    let mut registry = Registry::with_prefix("raftexample");
    register_status(&mut registry, &shared.admin.status.borrow());
    let mut lines = String::new();
    encode_registry(&mut lines, &shared.admin.metrics.registry)
        .and_then(|()| encode(&mut lines, &registry))
        .expect("writing to a string cannot fail");
    let kind = if accepts_openmetrics(&headers) {
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    } else {
        lines = as_plain_text(&lines);
        "text/plain; version=0.0.4; charset=utf-8"
    };
    ([(CONTENT_TYPE, kind), (VARY, "Accept")], lines).into_response()
}

fn accepts_openmetrics(headers: &HeaderMap) -> bool {
    let kinds = headers.get_all(ACCEPT).iter().filter_map(|kinds| kinds.to_str().ok());
    kinds.flat_map(|kinds| kinds.split(',')).any(|kind| {
        let mut parts = kind.split(';').map(str::trim);
        let is_named = parts
            .next()
            .is_some_and(|name| name.eq_ignore_ascii_case("application/openmetrics-text"));
        let is_refused = |part: &str| part.strip_prefix("q=").is_some_and(|q| q.parse() == Ok(0.0));
        is_named && !parts.any(is_refused)
    })
}

/// Rewrites OpenMetrics in the text format 0.0.4. There a counter is described by its name with `_total`, and
/// there are neither units nor an end mark.
fn as_plain_text(lines: &str) -> String {
    let (mut text, mut help) = (String::new(), None);
    for line in lines.lines() {
        let described = |prefix| line.strip_prefix(prefix).and_then(|it: &str| it.split_once(' '));
        if let Some((_, described)) = described("# HELP ") {
            help = Some(described);
        } else if let Some((name, kind)) = described("# TYPE ") {
            let suffix = if kind == "counter" { "_total" } else { "" };
            let help = help.take().unwrap_or_default();
            text += &format!("# HELP {name}{suffix} {help}\n# TYPE {name}{suffix} {kind}\n");
        } else if line != "# EOF" && !line.starts_with("# UNIT ") {
            text += &format!("{line}\n");
        }
    }
    text
}

fn register_status(registry: &mut Registry, status: &Status) {
    let mut gauge = |name, help, value: u64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(value as i64);
        registry.register(name, help, gauge);
    };
    gauge("has_leader", "1 if this member knows a leader", u64::from(status.leader != 0));
    gauge("is_leader", "1 if this member is the leader", u64::from(status.role == Role::Leader));
    gauge("is_learner", "1 if this member is a learner", u64::from(status.role == Role::Learner));
    let is_quarantined = u64::from(status.role == Role::Quarantined);
    gauge("is_quarantined", "1 if this member lost entries and takes no part", is_quarantined);
    gauge("members", "Members that this member knows", status.members.urls.len() as u64);
    gauge("term", "Current term", status.term);
    gauge("commit_index", "Index of the last entry known to be committed", status.commit);
    gauge("applied_index", "Index of the last applied entry", status.applied);
    gauge("last_index", "Index of the last entry in the log", status.last);
    gauge("snapshot_index", "Index of the newest snapshot", status.snapshot);
    gauge("wal_bytes", "Size of the write-ahead log in bytes", status.tick.wal_bytes);
}
