//! Transcripts that are compared with files in `tests/core/golden`, line by line.
//!
//! `UPDATE_GOLDEN=1 cargo test --test core` writes the files; review the difference before keeping it.

use std::path::PathBuf;

use crate::crash::lagging_follower;
use crate::support::memory::*;

/// Compares `lines` with the file `name`.
pub fn check(name: &str, lines: &[String]) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/core/golden").join(name);
    let path = path.with_extension("txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, lines.join("\n") + "\n").unwrap();
    }
    let golden = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}; run with UPDATE_GOLDEN=1", path.display()));
    let golden: Vec<&str> = golden.lines().collect();
    let found: Vec<&str> = lines.iter().map(String::as_str).collect();
    assert!(golden == found, "{} differs:\n{}", path.display(), difference(&golden, &found));
}

/// The lines that differ, after `-` and `+`, between a few that do not.
fn difference(golden: &[&str], found: &[&str]) -> String {
    const CONTEXT: usize = 3;
    let same = |pairs: &mut dyn Iterator<Item = (&&str, &&str)>| {
        pairs.take_while(|(golden, found)| golden == found).count()
    };
    let before = same(&mut golden.iter().zip(found));
    let after = same(&mut golden[before..].iter().rev().zip(found[before..].iter().rev()));
    let (golden_end, found_end) = (golden.len() - after, found.len() - after);
    let mark = |mark: char, lines: &[&str]| -> String {
        lines.iter().map(|line| format!("{mark} {line}\n")).collect()
    };
    [
        mark(' ', &golden[before.saturating_sub(CONTEXT)..before]),
        mark('-', &golden[before..golden_end]),
        mark('+', &found[before..found_end]),
        mark(' ', &golden[golden_end..(golden_end + CONTEXT).min(golden.len())]),
    ]
    .concat()
}

#[test]
fn a_difference_shows_the_lines_that_differ() {
    let shown = difference(&["a", "b", "c", "d", "e", "f"], &["a", "b", "c", "d", "x", "f"]);
    assert_eq!(shown, "  b\n  c\n  d\n- e\n+ x\n  f\n");
}

/// The order is: file, log, memory, messages, state machine.
#[test]
fn a_received_snapshot() {
    let mut network = lagging_follower();
    network.turn(1, [raftexample::raft_node::Input::Tick]);
    while network.members[&1].sent.lock().unwrap().snapshots.is_empty() {
        assert!(network.deliver_round(), "a snapshot is sent");
    }
    network.transcript.clear();
    network.deliver_round();
    check("received_snapshot", &network.transcript.of(3));
}

/// The followers write in parallel with the leader; the client is answered when two members have
/// the entry.
#[test]
fn a_committed_put_at_the_leader_of_three() {
    let mut network = Network::new(3, |_| {});
    network.transcript.start_scenario();
    assert!(network.put(1, "key", "value").is_ok());
    let lines = network.transcript.lines();
    check("committed_put", &lines);
    let place = |part: &str| lines.iter().position(|line| line.starts_with(part)).unwrap();
    assert!(place("1 send MsgAppend to 2") < place("1 write"));
    assert!(place("1 sync") < place("1 answer"));
    assert!(place("2 sync") < place("2 send MsgAppendResponse"));
}
