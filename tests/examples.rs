//! Each example runs to its end and prints what it promises.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

// With `test = true` cargo would build the example's tests instead of the program that this test
// runs.
#[path = "../examples/bench/http.rs"]
mod http;

/// A deadline for everything that a test waits for. Long, because the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// `cargo test` builds the examples next to the tests: `target/<profile>/examples`.
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

/// The load generator's own server and its address.
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

/// The Procfile runner, in its own directory.
struct Runner {
    child: Child,
    lines: mpsc::Receiver<String>,
    unread: Vec<String>,
    directory: TempDir,
}

impl Runner {
    fn start(procfile: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("Procfile"), procfile).unwrap();
        let mut child = Command::new(example("procfile"))
            .current_dir(&directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (line_tx, lines) = mpsc::channel();
        std::thread::spawn(move || stdout.lines().try_for_each(|line| line_tx.send(line.unwrap())));
        Self { child, lines, unread: Vec::new(), directory }
    }

    fn type_line(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Waits for a line that starts with `start` and takes it; returns the rest of the line.
    fn expect(&mut self, start: &str) -> String {
        loop {
            if let Some(place) = self.unread.iter().position(|line| line.starts_with(start)) {
                return self.unread.remove(place)[start.len()..].to_owned();
            }
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => self.unread.push(line),
                Err(error) => panic!("no line {start:?}: {error}, only {:#?}", self.unread),
            }
        }
    }

    /// Waits until the runner ends by itself; returns the lines not taken.
    fn wait(mut self) -> Vec<String> {
        // The pipe closes with the last process that holds it.
        let deadline = Instant::now() + PATIENCE;
        let left = || deadline.saturating_duration_since(Instant::now());
        let mut lines = std::mem::take(&mut self.unread);
        lines.extend(std::iter::from_fn(|| self.lines.recv_timeout(left()).ok()));
        assert!(Instant::now() < deadline, "it does not end: {lines:#?}");
        let status = self.child.wait().unwrap();
        assert_eq!(status.code(), Some(0), "{lines:#?}");
        lines
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // An orderly end leaves no process behind.
            let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        }
    }
}

/// True if a process runs. A zombie does not: in a container nobody may reap orphans.
fn is_alive(pid: &str) -> bool {
    let state = Command::new("ps").args(["-o", "stat=", "-p", pid]).output().unwrap().stdout;
    state.first().is_some_and(|state| *state != b'Z')
}

fn assert_gone(pid: &str) {
    let deadline = Instant::now() + PATIENCE;
    while is_alive(pid) {
        assert!(Instant::now() < deadline, "{pid} is still there");
    }
}

#[test]
fn procfile_puts_the_name_before_what_a_process_writes() {
    let mut runner = Runner::start(
        "# A comment.\n\none: echo out; echo err >&2; printf 'no newline'\ntwo: i=0; while [ $i -lt 500 ]; do printf half; echo -half; i=$((i+1)); done\n",
    );
    let mut of_one =
        vec![runner.expect("one | "), runner.expect("one | "), runner.expect("one | ")];
    of_one.sort();
    assert_eq!(of_one, ["err", "no newline", "out"]);
    // If it were stopped earlier, it could leave half a line.
    runner.expect("procfile | two ended");
    runner.type_line("quit");
    for line in runner.wait() {
        assert!(line.starts_with("procfile | ") || line == "two | half-half", "{line}");
    }
}

#[test]
fn procfile_starts_a_stopped_process_again_under_its_name() {
    let mut runner = Runner::start("one: trap - TERM; echo $$ is here; exec sleep 1000\n");
    let first = runner.expect("one | ");
    runner.type_line("stop one");
    runner.expect("procfile | one ended: signal: 15");
    assert_gone(first.trim_end_matches(" is here"));
    runner.type_line("list");
    assert_eq!(runner.expect("procfile | one: "), "stopped, signal: 15 (SIGTERM)");
    runner.type_line("start one");
    let second = runner.expect("one | ");
    assert_ne!(first, second);
    runner.type_line("list");
    let pid = second.trim_end_matches(" is here");
    assert_eq!(runner.expect("procfile | one: "), format!("pid {pid}"));

    runner.type_line("restart one");
    runner.expect("procfile | one ended: signal: 15");
    assert_ne!(runner.expect("one | "), second);
    runner.type_line("kill one");
    runner.expect("procfile | one ended: signal: 9");
    runner.type_line("quit");
    runner.wait();
}

#[test]
fn procfile_leaves_the_others_when_one_process_ends() {
    let mut runner = Runner::start("one: exit 7\ntwo: echo $$; exec sleep 1000\n");
    let second = runner.expect("two | ");
    runner.expect("procfile | one ended: exit status: 7");
    runner.type_line("restart one");
    runner.expect("procfile | one ended: exit status: 7");
    assert!(is_alive(&second));
    runner.type_line("list");
    assert_eq!(runner.expect("procfile | two: "), format!("pid {second}"));
    runner.type_line("quit");
    runner.wait();
    assert_gone(&second);
}

/// The end of its input stops nothing. Each way to end it stops all processes, including those a
/// shell left running.
#[test]
fn procfile_leaves_no_process_behind() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut runner = Runner::start(
            "one: echo $$; sleep 1000; echo not reached\ntwo: sleep 1000 & echo $!; trap '' TERM; wait; wait\nthree: sleep 1000 >/dev/null 2>&1 & echo $!\n",
        );
        let mut pids: Vec<String> = ["one | ", "two | "].map(|name| runner.expect(name)).into();
        drop(runner.child.stdin.take());
        pids.push(runner.expect("three | "));
        runner.expect("procfile | three ended");
        assert!(is_alive(&pids[0]) && is_alive(&pids[1]));
        kill(Pid::from_raw(runner.child.id() as i32), signal).unwrap();
        let lines = runner.wait();
        assert!(!lines.iter().any(|line| line.contains("not reached")), "{lines:#?}");
        for pid in pids {
            assert_gone(&pid);
        }
    }
}

#[test]
fn procfile_told_twice_to_quit_kills_what_does_not_stop() {
    let mut runner =
        Runner::start("one: trap 'echo no' TERM; echo $$; while :; do sleep 0.1; done\n");
    let pid = runner.expect("one | ");
    runner.type_line("quit");
    runner.expect("one | no");
    runner.type_line("quit");
    let start = Instant::now();
    assert!(runner.wait().iter().any(|line| line.contains("one ended: signal: 9")));
    assert!(start.elapsed() < Duration::from_secs(9), "the deadline did not kill it");
    assert_gone(&pid);
}

#[test]
fn procfile_says_in_one_line_which_commands_there_are() {
    let mut runner = Runner::start("one: exec sleep 1000\n");
    runner.expect("procfile | one started");
    for (line, why) in [
        ("stop", "\"stop\" is no command; these are"),
        ("stop one two", "\"stop one two\" is no command; these are"),
        ("halt one", "\"halt one\" is no command; these are"),
        ("stop two", "no process is named \"two\", see `list`; the commands are"),
    ] {
        runner.type_line(line);
        let commands = "stop NAME, start NAME, restart NAME, kill NAME, list, quit";
        assert_eq!(runner.expect(&format!("procfile | {why}: {commands}")), "");
    }
    runner.type_line("start one");
    runner.expect("procfile | one runs already, pid ");
    runner.type_line("quit");
    runner.wait();
    for (procfile, why) in [
        ("", "it names no process"),
        ("one: a\ntwo", "line 2 is not `name: command line`"),
        ("one:\n", "line 1 is not"),
        ("one: a\n\none: b", "line 3 repeats the name one: give each process its own"),
    ] {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&path, procfile).unwrap();
        let output = Command::new(example("procfile")).arg(path.path()).output().unwrap();
        assert!(!output.status.success());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains(why), "{procfile:?}: {stderr}");
    }
}

/// README's walk: losing a member.
#[test]
fn procfile_runs_a_cluster_that_survives_losing_a_member() {
    // All six are reserved before the first is released.
    let reserved: Vec<_> = (0..6).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<_> =
        reserved.iter().map(|listener| listener.local_addr().unwrap()).collect();
    let (peers, clients) = addresses.split_at(3);
    let urls: Vec<String> = peers.iter().map(|peer| format!("http://{peer}")).collect();
    let members = (1..).zip(clients).map(|(id, client)| {
        format!(
            "raftexample{id}: {} --id {id} --cluster {} --port {}\n",
            env!("CARGO_BIN_EXE_raftexample"),
            urls.join(","),
            client.port()
        )
    });
    let procfile: String = members.collect();
    drop(reserved);
    let mut runner = Runner::start(&procfile);
    for (value, stopped) in [("foo", false), ("bar", true)] {
        if stopped {
            runner.type_line("stop raftexample2");
            runner.expect("procfile | raftexample2 ended: exit status: 0");
        }
        request(clients[0], "PUT", value);
        assert_eq!(request(clients[2], "GET", ""), value);
    }
    runner.type_line("start raftexample2");
    assert_eq!(request(clients[1], "GET", ""), "bar");
    assert!(runner.directory.path().join("raftexample-2").is_dir());
    runner.type_line("quit");
    let lines = runner.wait();
    let ended = lines.iter().filter(|line| line.ends_with("ended: exit status: 0")).count();
    assert_eq!(ended, 3, "{lines:#?}");
}

/// One request for a key, repeated while the member does not listen or has no leader.
fn request(address: SocketAddr, method: &str, body: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    let length = body.len();
    let request = format!(
        "{method} /my-key HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    loop {
        let mut answer = String::new();
        let asked = TcpStream::connect(address).and_then(|mut stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(request.as_bytes())?;
            stream.read_to_string(&mut answer)
        });
        match answer.split_once("\r\n\r\n") {
            Some((head, body)) if head.starts_with("HTTP/1.1 20") => return body.to_owned(),
            _ => assert!(Instant::now() < deadline, "{method} {address}: {asked:?} {answer}"),
        }
        // The interval between two attempts; the deadline above ends them.
        std::thread::sleep(Duration::from_millis(20));
    }
}
