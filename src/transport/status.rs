//! The statuses of the other members, asked over the peer port while a client of the admin port
//! watches the cluster. Raft takes no part in it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::{Shared, Target};
use crate::channels::NodeId;
use crate::codec;
use crate::raft_node::status::Status;

/// How long the others are asked after a client looked.
const WATCHED_FOR: Duration = Duration::from_secs(3);
/// How often they are asked.
const INTERVAL: Duration = Duration::from_millis(200);

/// The last status of each other member that answered, and when it did.
pub type Statuses = BTreeMap<NodeId, (Instant, Arc<Status>)>;

/// Connects the admin port, which watches the cluster, with the transport, which asks the others.
#[derive(Debug, Default)]
pub struct ClusterWatch {
    watched_until: watch::Sender<Option<Instant>>,
    statuses: watch::Sender<Statuses>,
}

impl ClusterWatch {
    /// Has the other members asked for the next seconds. Returns their statuses; empty at first.
    pub fn watch(&self) -> watch::Receiver<Statuses> {
        self.watched_until.send_replace(Some(Instant::now() + WATCHED_FOR));
        self.statuses.subscribe()
    }

    /// Takes the answer of a member. One that is no status of that member is as good as none.
    pub fn take_answer(&self, id: NodeId, body: &[u8]) {
        let Ok(status) = codec::decode::<Status>(body) else { return };
        if status.id != id {
            return;
        }
        let status = (Instant::now(), Arc::new(status));
        self.statuses.send_modify(|statuses| {
            statuses.insert(id, status);
        });
    }
}

/// Asks the other members, again and again, while the cluster is watched.
pub(super) async fn ask_others(shared: Arc<Shared>) {
    let cluster = shared.config.cluster.clone();
    let mut until_rx = cluster.watched_until.subscribe();
    let mut requests = JoinSet::new();
    loop {
        // The sender is in `cluster`.
        let _ = until_rx.wait_for(|until| *until > Some(Instant::now())).await;
        while *until_rx.borrow() > Some(Instant::now()) {
            if shared.config.status.borrow().begun {
                for (id, url) in shared.admission.other_members() {
                    let incarnation = shared.admission.bound_incarnation(id);
                    let target = Target { id, incarnation, url: url.into() };
                    requests.spawn(ask(shared.clone(), target));
                }
            }
            sleep(INTERVAL).await;
            while requests.try_join_next().is_some() {}
        }
        requests.shutdown().await;
        cluster.statuses.send_replace(Statuses::new());
    }
}

/// Asks a member once. No answer is not an error.
async fn ask(shared: Arc<Shared>, target: Target) {
    let patience = shared.config.half_election_timeout();
    if let Ok(answer) = shared.ask(&target, "/raft/status", Vec::new(), patience).await
        && shared.admission.admit(&answer.header).is_ok()
    {
        shared.config.cluster.take_answer(target.id, &answer.body);
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
        cluster.take_answer(2, &status(3));
        cluster.take_answer(2, &status(2)[1..]);
        assert!(statuses.borrow().is_empty());
        cluster.take_answer(2, &status(2));
        assert!(statuses.borrow().keys().eq(&[2]));
    }
}
