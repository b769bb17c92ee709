//! Each example runs to its end by itself and says what it promises to.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

// The examples' own tests are not run: with `test = true` there would be no program to run here.
#[path = "../examples/bench/http.rs"]
mod http;

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

/// The load generator's own server, and where it listens.
struct Bare(Child, String);

impl Bare {
    fn start() -> Self {
        let mut bare = Command::new(example("bench"))
            .args(["--bare", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(bare.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("a bare handler serves on ").unwrap().to_owned();
        Self(bare, address)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn bench(flags: &[&str]) -> Output {
    let short = ["--rounds", "2", "--duration", "300ms", "--warmup", "50ms"];
    Command::new(example("bench")).args(flags).args(short).output().unwrap()
}

#[test]
fn bench_measures_targets_in_turns_and_draws_them() {
    let (one, other) = (Bare::start(), Bare::start());
    let directory = tempfile::tempdir().unwrap();
    let plot = directory.path().join("plot.svg");
    let targets = [format!("one={}", one.1), format!("other={}", other.1)];
    let plot_flag = format!("--plot={}", plot.display());
    let mixed = ["--reads=50", "--fill", "--check", "--rate=500", &plot_flag];
    let output = bench(&[&[&*targets[0], &*targets[1]], &mixed[..]].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for name in ["one ", "other "] {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        let figures: Vec<f64> =
            line.split_whitespace().skip(1).map(|figure| figure.parse().unwrap()).collect();
        assert!((300.0..700.0).contains(&figures[0]), "an open loop keeps to its rate: {text}");
        assert_eq!(figures.last(), Some(&0.0), "no errors: {text}");
    }
    assert!(text.contains("acknowledged keys are there"), "{text}");
    assert!(std::fs::read_to_string(plot).unwrap().contains("requests per second"));
}

#[test]
fn bench_counts_what_fails() {
    let nobody = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("nobody={}", listener.local_addr().unwrap())
    };
    let text = String::from_utf8(bench(&[&nobody, "--connections=2"]).stdout).unwrap();
    assert!(text.contains("Connection refused"), "{text}");
    assert!(!bench(&[&nobody, "--fill"]).status.success());
}
