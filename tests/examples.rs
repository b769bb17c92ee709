//! Each example runs to its end by itself and says what it promises to.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::process::Command;

/// `cargo test` builds the examples beside the tests: `target/<profile>/examples`.
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().unwrap().parent().unwrap();
    profile.join("examples").join(name)
}

fn run(name: &str) -> String {
    let path = example(name);
    let output = Command::new(&path)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {}: {error}", path.display()));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{name}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn single_node_reads_after_a_restart_what_it_wrote_before() {
    assert!(run("single_node").contains("after a restart: get /greeting = hello"));
}

#[test]
fn three_nodes_go_on_without_one_which_then_catches_up() {
    let text = run("three_nodes");
    assert!(text.contains("wrote foo on 1; 3 reads foo"), "{text}");
    assert!(text.contains("restarted 2; it reads bar"), "{text}");
}

#[test]
fn counter_is_another_state_machine_that_counts_each_entry_once() {
    let text = run("counter");
    assert!(text.contains("restored "), "it begins with a snapshot: {text}");
    assert!(text.contains("after a restart: 5050"), "{text}");
}
