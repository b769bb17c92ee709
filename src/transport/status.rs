//! The statuses of the other members, asked over the peer port of a member with an admin port. They are asked
//! often while a client watches the cluster, and else once a second, for the history that a page begins with.
//! Raft takes no part in it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::{Shared, Target};
use crate::channels::NodeId;
use crate::codec;
use crate::raft_node::status::Status;

/// How long the others are asked after each call of [`ClusterWatch::watch`].
const WATCHED_FOR: Duration = Duration::from_secs(3);
/// How often they are asked while a client watches.
const INTERVAL: Duration = Duration::from_millis(200);
/// How often they are asked without one.
pub const SLOW_INTERVAL: Duration = Duration::from_secs(1);

/// The last status of each other member that answered, and when it was asked for it.
pub type Statuses = BTreeMap<NodeId, (Instant, Arc<Status>)>;

/// Connects the admin port, which watches the cluster, with the transport, which asks the others.
#[derive(Debug, Default)]
pub struct ClusterWatch {
    watched: watch::Sender<Watched>,
    statuses: watch::Sender<Statuses>,
}

/// Until when the other members are asked, at each of the two intervals.
#[derive(Debug, Default)]
struct Watched {
    until: Option<Instant>,
    slowly_until: Option<Instant>,
}

impl Watched {
    /// The time between two questions; `None` if they are not asked.
    fn interval(&self) -> Option<Duration> {
        let now = Some(Instant::now());
        match self {
            Self { until, .. } if *until > now => Some(INTERVAL),
            Self { slowly_until, .. } if *slowly_until > now => Some(SLOW_INTERVAL),
            _ => None,
        }
    }
}

impl ClusterWatch {
    /// Has the other members asked five times a second for the next seconds, the first time at once. Returns
    /// their statuses; empty at first.
    pub fn watch(&self) -> watch::Receiver<Statuses> {
        self.watched.send_modify(|watched| watched.until = Some(Instant::now() + WATCHED_FOR));
        self.statuses.subscribe()
    }

    /// Has the other members asked once a second for the next seconds. Returns their statuses; empty at first.
    pub fn watch_slowly(&self) -> watch::Receiver<Statuses> {
        let until = Some(Instant::now() + WATCHED_FOR);
        self.watched.send_modify(|watched| watched.slowly_until = until);
        self.statuses.subscribe()
    }

    /// Takes the answer of a member that was asked at `asked`, unless there is an answer to a later question. One
    /// that is no status of that member is as good as none.
    pub fn take_answer(&self, id: NodeId, asked: Instant, body: &[u8]) {
        let Ok(status) = codec::decode::<Status>(body) else { return };
        if status.id != id {
            return;
        }
        self.statuses.send_if_modified(|statuses| {
            let is_newer = statuses.get(&id).is_none_or(|(known, _)| *known < asked);
            if is_newer {
                statuses.insert(id, (asked, Arc::new(status)));
            }
            is_newer
        });
    }
}

/// Asks the other members, again and again, while the cluster is watched.
pub(super) async fn ask_others(shared: Arc<Shared>) {
    let cluster = shared.config.cluster.clone();
    let mut watched_rx = cluster.watched.subscribe();
    let mut requests = JoinSet::new();
    loop {
        // The sender is in `cluster`.
        let _ = watched_rx.wait_for(|watched| watched.interval().is_some()).await;
        while let Some(interval) = watched_interval(&watched_rx) {
            if shared.config.status.borrow().begun {
                for (id, url) in shared.admission.other_members() {
                    let incarnation = shared.admission.bound_incarnation(id);
                    let target = Target { id, incarnation, url: url.into() };
                    requests.spawn(ask(shared.clone(), target));
                }
            }
            // A client that begins to watch is not kept waiting.
            let is_faster = |watched: &Watched| watched.interval().is_some_and(|it| it < interval);
            let _ = timeout(interval, watched_rx.wait_for(is_faster)).await;
            while requests.try_join_next().is_some() {}
        }
        requests.shutdown().await;
        cluster.statuses.send_replace(Statuses::new());
    }
}

/// The borrow must end before the next await.
fn watched_interval(watched_rx: &watch::Receiver<Watched>) -> Option<Duration> {
    watched_rx.borrow().interval()
}

/// Asks a member once. No answer is not an error.
async fn ask(shared: Arc<Shared>, target: Target) {
    let patience = shared.config.half_election_timeout();
    let asked = Instant::now();
    if let Ok(answer) = shared.ask(&target, "/raft/status", Vec::new(), patience).await
        && shared.admission.admit(&answer.header).is_ok()
    {
        shared.config.cluster.take_answer(target.id, asked, &answer.body);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_taken_only_from_the_member_it_is_of() {
        let cluster = ClusterWatch::default();
        let statuses = cluster.watch();
        let status = |id| codec::encode(&Status { id, ..Status::default() });
        let now = Instant::now();
        cluster.take_answer(2, now, &status(3));
        cluster.take_answer(2, now, &status(2)[1..]);
        assert!(statuses.borrow().is_empty());
        cluster.take_answer(2, now, &status(2));
        assert!(statuses.borrow().keys().eq(&[2]));
    }

    #[test]
    fn a_late_answer_replaces_no_newer_one() {
        let cluster = ClusterWatch::default();
        let statuses = cluster.watch();
        let status = |commit| codec::encode(&Status { id: 2, commit, ..Status::default() });
        let (first, second) = (Instant::now(), Instant::now() + INTERVAL);
        cluster.take_answer(2, second, &status(8));
        cluster.take_answer(2, first, &status(7));
        let (asked, status) = statuses.borrow()[&2].clone();
        assert_eq!((asked, status.commit), (second, 8));
    }
}
