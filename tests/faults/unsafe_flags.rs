//! The checks detect broken promises: with the flags for the original's weaker promises they find
//! violations.

use std::time::Duration;

use crate::clients::Load;
use crate::runner::{FAST, Run};

/// Each round may break the promise; mostly the first one does.
const ROUNDS: usize = 20;
const WRITES: usize = 100;

/// Kills the leader under load until there is a violation.
fn breaks(kind: &str, flags: &[&str]) {
    let mut run = Run::start(kind, 3, &[&FAST[..], flags].concat());
    for _ in 0..ROUNDS {
        // Few keys and no pauses: more operations on the same key.
        let clients = run.load_with(Load { keys: 2, pause: Duration::ZERO, ..Load::default() });
        clients.wait_for(WRITES);
        let (leader, _) = run.cluster.leader();
        run.inject();
        run.cluster.kill(leader);
        clients.wait_for(WRITES);
        run.cluster.start_again(leader);
        if !run.judge(clients).not_linearizable.is_empty() {
            return;
        }
    }
    panic!("nothing was found in {ROUNDS} rounds");
}

#[test]
fn writes_acknowledged_too_early_are_found_missing() {
    breaks("must be found: --ack proposed", &["--ack", "proposed"]);
}

#[test]
fn reads_of_a_members_own_map_are_found_stale() {
    breaks("must be found: --read local", &["--read", "local"]);
}
