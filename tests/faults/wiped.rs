//! A member that lost its directory and returns under its old id could vote twice.

use std::fs;

use crate::runner::{FAST, Run, SMALL, rounds};
use crate::support::processes::{PATIENCE, eventually};

/// Writes acknowledged between two steps.
const WRITES: usize = 30;

/// Three members: one loses its directory, is refused with the leader up or down, and is replaced
/// under a new id, under load.
fn wipe(default_rounds: usize, more: &[&str]) {
    let flags = [&FAST[..], &SMALL, more].concat();
    let mut run = Run::start("directory wiped, same id", 3, &flags);
    for round in 0..rounds(default_rounds) {
        let with_leader_down = round % 2 == 1;
        let clients = run.load();
        clients.wait_for(WRITES);
        run.assert_alive();
        let (leader, follower) = run.leader_and_follower();
        // Sometimes the leader loses its directory: it voted for itself.
        let wiped = if run.random.below(3) == 0 { leader } else { follower };
        run.inject();
        run.cluster.kill(wiped);
        for suffix in ["", "-snap"] {
            let dir = run.cluster.site.dir().join(format!("raftexample-{wiped}{suffix}"));
            fs::remove_dir_all(dir).unwrap();
        }
        // Writes continue, so another member leads.
        clients.wait_for(WRITES);
        let down = with_leader_down.then(|| run.cluster.leader().0);
        if let Some(leader) = down {
            run.cluster.kill(leader);
        }
        run.cluster.start_again(wiped);
        // It greets the members of its list, of which after a few rounds none may be left.
        let others = run.cluster.ids().into_iter().filter(|id| *id != wiped && Some(*id) != down);
        let urls: Vec<String> = others.map(|id| run.cluster.member(id).url.clone()).collect();
        let list = run.cluster.member(wiped).flags[3].clone();
        let is_known = list.split(',').any(|url| urls.iter().any(|alive| alive == url));
        let refused = run.cluster.process(wiped);
        if is_known {
            assert_eq!(refused.wait(PATIENCE), 1, "{}", refused.stderr());
            let words = refused.last_words().join("\n");
            assert!(words.contains(&format!("DELETE /{wiped}")), "{words}");
            assert!(words.contains("under a new id"), "{words}");
        } else {
            eventually(PATIENCE, "it waits", || refused.stderr().contains("waiting for"));
            clients.wait_for(if down.is_some() { 0 } else { WRITES });
            refused.kill();
        }
        assert!(!refused.stderr().contains("raft.node:"), "it took part:\n{}", refused.stderr());
        if let Some(leader) = down {
            run.cluster.start_again(leader);
        }
        // The remedy.
        let at = run.other_than(wiped);
        run.cluster.change(at, "DELETE", wiped, "");
        run.cluster.forget(wiped);
        clients.set_members(&run.cluster.addresses());
        run.cluster.join(at, 4 + round as u64);
        clients.set_members(&run.cluster.addresses());
        clients.wait_for(WRITES);
        run.check(clients);
    }
    run.finish();
}

#[test]
fn a_wiped_member_is_refused_and_replaced_without_loss() {
    wipe(2, &[]);
}

#[test]
#[ignore = "long: 40 wiped directories"]
fn a_member_wiped_40_times_is_replaced_without_loss() {
    wipe(40, &[]);
}
