//! The order of what a node does, word for word. `UPDATE_GOLDEN=1 cargo test --test core golden`
//! writes the files anew; look at the difference before keeping it.

use std::path::PathBuf;

use crate::crash::lagging_follower;
use crate::support::memory::*;

fn check(name: &str, lines: &[String]) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/core/golden").join(name);
    let found = lines.join("\n") + "\n";
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &found).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap();
    assert!(found == golden, "{} has another order:\n{found}", path.display());
}

/// File, log, memory, messages, state machine: in this order.
#[test]
fn a_received_snapshot() {
    let mut network = lagging_follower();
    network.turn(1, [raftexample::raft_node::Input::Tick]);
    while network.members[&1].sent.lock().unwrap().snapshots.is_empty() {
        assert!(network.deliver_round(), "a snapshot is sent");
    }
    network.transcript.clear();
    network.deliver_round();
    check("received_snapshot.txt", &network.transcript.of(3));
}

/// The followers may write while the leader does; the client is answered when two have it.
#[test]
fn a_committed_put_at_the_leader_of_three() {
    let mut network = Network::new(3, |_| {});
    network.transcript.clear();
    assert!(network.put(1, "key", "value").is_ok());
    let lines = network.transcript.lines();
    check("committed_put.txt", &lines);
    let place = |part: &str| lines.iter().position(|line| line.starts_with(part)).unwrap();
    assert!(place("1 send MsgAppend to 2") < place("1 write"));
    assert!(place("1 sync") < place("1 answer"));
    assert!(place("2 sync") < place("2 send MsgAppendResponse"));
}
