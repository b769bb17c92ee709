//! `/livez` and `/readyz`.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use tokio::time::Instant;

use super::{Shared, text};
use crate::httpapi::ErrorResponse;
use crate::raft_node::{Role, Status};

/// How long a ready member may take to confirm that it has applied what is committed: less than the
/// second that probes wait.
const CURRENT_WITHIN: Duration = Duration::from_millis(800);
/// Committed entries that a ready member may still have to apply.
const UNAPPLIED_MAX: u64 = 1000;

pub(super) async fn livez(State(shared): State<Arc<Shared>>) -> Response {
    let (since, within) = (shared.admin.metrics.since_last_tick(), shared.admin.alive_within);
    let Some(since) = since.filter(|since| *since > within) else {
        return text(StatusCode::OK, "ok\n");
    };
    let why = format!("the raft node has not ticked for {since:.1?}, the limit is {within:.1?}");
    ErrorResponse::new(StatusCode::SERVICE_UNAVAILABLE, why).into_response()
}

pub(super) async fn readyz(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<Vec<(String, String)>>,
) -> Response {
    let mut checks = readiness(&shared.admin.status.borrow()).to_vec();
    // What this member knows of itself may be old. The leader, and a majority with it, say what is
    // committed, and this member waits until it has applied that.
    if checks.iter().all(|(_, failure)| failure.is_none()) {
        let node = shared.admin.application.keys.store.node();
        let current = node.wait_until_current(Instant::now() + CURRENT_WITHIN).await;
        checks.push(("current", current.err().map(|why| why.to_string())));
    }
    let is_ready = checks.iter().all(|(_, failure)| failure.is_none());
    let code = if is_ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    if query.iter().any(|(name, _)| name == "verbose") {
        let line = |(name, failure): &(_, Option<String>)| match failure {
            None => format!("[+] {name} ok\n"),
            Some(why) => format!("[-] {name}: {why}\n"),
        };
        return text(code, checks.iter().map(line).collect::<String>());
    }
    let failed: Vec<_> = checks.into_iter().filter_map(|(_, failure)| failure).collect();
    if is_ready {
        return text(code, "ok\n");
    }
    ErrorResponse::new(code, format!("not ready: {}", failed.join("; "))).into_response()
}

/// The checks of a ready member, each with the reason if it fails.
fn readiness(status: &Status) -> [(&'static str, Option<String>); 3] {
    let unapplied = status.commit.saturating_sub(status.applied);
    let role = match status.role {
        Role::Bootstrapping => Some("waiting for the other members before the first start"),
        Role::Quarantined => Some("this member lost entries that it had acknowledged: see its log"),
        Role::Learner => Some("this member is a learner, without a vote yet"),
        _ => None,
    };
    [
        ("leader", (status.leader == 0).then(|| "no leader is known".to_owned())),
        (
            "applied",
            (unapplied > UNAPPLIED_MAX)
                .then(|| format!("{unapplied} committed entries are not applied yet")),
        ),
        ("voter", role.map(str::to_owned)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    #[test]
    fn ready_needs_a_leader_its_entries_applied_and_a_vote() {
        let ready = Status {
            id: 1,
            role: Role::Follower,
            leader: 2,
            commit: 5000,
            applied: 5000 - UNAPPLIED_MAX,
            ..Status::default()
        };
        let failed = |status: &Status| {
            let checks = readiness(status).into_iter();
            checks.filter_map(|(name, why)| why.map(|_| name)).collect::<Vec<_>>()
        };
        assert!(failed(&ready).is_empty());
        assert!(failed(&Status { role: Role::Leader, ..ready.clone() }).is_empty());
        assert_eq!(failed(&Status { leader: 0, ..ready.clone() }), ["leader"]);
        assert_eq!(failed(&Status { applied: ready.applied - 1, ..ready.clone() }), ["applied"]);
        assert_eq!(failed(&Status { role: Role::Learner, ..ready.clone() }), ["voter"]);
        assert_eq!(failed(&Status::default()), ["leader", "voter"], "before its first start");
    }

    #[test]
    fn the_age_of_the_last_tick_is_unknown_before_the_first() {
        let metrics = Metrics::default();
        assert_eq!(metrics.since_last_tick(), None, "a start takes as long as it takes");
        metrics.ticked();
        while metrics.since_last_tick() < Some(Duration::from_millis(20)) {
            std::thread::yield_now();
        }
        let before = metrics.since_last_tick();
        metrics.ticked();
        assert!(metrics.since_last_tick() < before, "it has just ticked");
    }
}
