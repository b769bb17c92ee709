//! kill -9 under load: what was acknowledged is there.

use std::time::Duration;

use super::harness::{Cluster, FAST, Load, assert_holds};

const ROUNDS: usize = 3;
const CLIENTS: usize = 16;
/// Between two writes of a client: all of them are read again at each member.
const PAUSE: Duration = Duration::from_millis(10);

#[test]
fn killing_the_leader_under_load_loses_nothing_that_was_acknowledged() {
    let mut cluster = Cluster::start(3, &FAST);
    let mut acknowledged = Vec::new();
    for round in 0..ROUNDS {
        let load = Load::start(&format!("leader-{round}"), &cluster.addresses(), CLIENTS, PAUSE);
        load.wait_for(10 * CLIENTS);
        let (leader, term) = cluster.leader();
        cluster.kill(leader);
        let (_, new_term) = cluster.leader();
        assert!(new_term > term, "a term has one leader");
        load.wait_for(10 * CLIENTS);
        cluster.start_again(leader);
        load.wait_for(10 * CLIENTS);
        acknowledged.extend(load.stop());
    }
    assert_holds(&cluster.addresses(), &acknowledged);
}

#[test]
fn killing_all_members_at_once_under_load_loses_nothing_that_was_acknowledged() {
    // Snapshots and compactions are under way all the time.
    let small = ["--snapshot-count", "100", "--snapshot-catch-up-entries", "20"];
    let mut cluster = Cluster::start(3, &[&FAST[..], &small].concat());
    let mut acknowledged = Vec::new();
    for round in 0..ROUNDS {
        let load = Load::start(&format!("all-{round}"), &cluster.addresses(), CLIENTS, PAUSE);
        load.wait_for(30 * CLIENTS);
        cluster.ids().into_iter().for_each(|id| cluster.kill(id));
        acknowledged.extend(load.stop());
        cluster.ids().into_iter().for_each(|id| cluster.start_again(id));
        cluster.all_serve();
    }
    assert_holds(&cluster.addresses(), &acknowledged);
}
