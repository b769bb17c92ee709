//! `examples/queue.rs` as processes: each job gets one result, whatever is killed or paused.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::Value;

use support::processes::{
    Client, Cluster, FAST, PATIENCE, Process, Signal, Site, eventually, eventually_some, owned,
};

#[path = "support/mod.rs"]
mod support;

/// A command that goes on until the file `go` exists in the test's directory.
const WAIT_FOR_GO: [&str; 3] = ["sh", "-c", "until [ -e go ]; do sleep 0.02; done; echo $0"];

/// A cluster and its application ports.
struct Queue {
    cluster: Cluster,
    api: BTreeMap<u64, SocketAddr>,
}

impl Queue {
    fn start(members: u64, more: &[&str]) -> Self {
        let site = Site::new();
        let mut api = BTreeMap::new();
        let mut places = Vec::new();
        for id in 1..=members {
            let mut place = site.place(site.url());
            let address = site.at(site.port());
            place.flags = owned(&["--api", &address.to_string()]);
            places.push(place);
            api.insert(id, address);
        }
        Self { cluster: Cluster::start_at(site, places, &[&FAST, more].concat()), api }
    }

    /// Starts the example, which `cargo test` builds next to the tests, in a process group.
    fn spawn(&self, name: &str, arguments: &[&str]) -> Process {
        let test = std::env::current_exe().unwrap();
        let profile = test.parent().unwrap().parent().unwrap();
        let urls: Vec<_> = self.api.values().map(|address| format!("http://{address}")).collect();
        let mut command = Command::new(profile.join("examples").join("queue"));
        command.arg(urls.join(",")).args(arguments);
        self.cluster.site.spawn_command(name, command, true)
    }

    fn worker(&self, name: &str, lease: &str, command: &[&str]) -> Process {
        self.spawn(name, &[&["work", name, lease], command].concat())
    }

    fn add(&self, name: &str, ids: &[String]) -> Process {
        let ids = ids.iter().map(String::as_str);
        self.spawn(name, &["add"].into_iter().chain(ids).collect::<Vec<_>>())
    }

    /// The lines that a process has printed.
    fn lines(&self, name: &str) -> Vec<String> {
        let path = self.cluster.site.dir().join(format!("{name}.out"));
        let text = fs::read_to_string(path).unwrap();
        // The last one may still grow.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(str::to_owned).collect()
    }

    /// Waits until a process has printed a line that starts with one of `words`.
    fn said(&self, name: &str, words: &[&str]) -> String {
        eventually_some(PATIENCE, &format!("{name} says {words:?}"), || {
            let mut lines = self.lines(name).into_iter();
            lines.find(|line| words.iter().any(|word| line.starts_with(word)))
        })
    }

    /// Waits until there are `count` results.
    fn results(&self, count: usize) -> Vec<Value> {
        let target = "/v1/keys?prefix=/queue/results/&limit=1000&values=true";
        eventually_some(PATIENCE, &format!("there are {count} results"), || {
            let member = self.api.values().find_map(|address| {
                let answer = Client::new(*address).request("GET", target, b"").ok()?;
                (answer.status == 200).then_some(answer)
            })?;
            let page: Value = serde_json::from_slice(&member.body).unwrap();
            let shown = page["keys"].as_array().unwrap();
            let value = |shown: &Value| {
                let value = BASE64_STANDARD.decode(shown["value"].as_str().unwrap()).unwrap();
                serde_json::from_slice(&value).unwrap()
            };
            (shown.len() >= count).then(|| shown.iter().map(value).collect())
        })
    }

    /// Asserts with the whole history that each result was written once, and that no job is left.
    fn assert_done_once(&self, jobs: usize) {
        let address = *self.api.values().next().unwrap();
        let end = "/queue/results/end";
        eventually(PATIENCE, "the end of the history is marked", || {
            let answer = Client::new(address).request("PUT", &format!("/v1/kv{end}"), b"");
            answer.is_ok_and(|answer| matches!(answer.status, 201 | 204))
        });
        let mut connection = TcpStream::connect(address).unwrap();
        connection.set_read_timeout(Some(PATIENCE)).unwrap();
        // HTTP/1.0 has no chunks, so the body is the events alone.
        write!(
            connection,
            "GET /v1/watch?prefix=/queue/&from=0 HTTP/1.0\r\nHost: {address}\r\n\r\n"
        )
        .unwrap();
        let mut writes: BTreeMap<String, usize> = BTreeMap::new();
        let mut jobs_left = BTreeSet::new();
        let mut kind = String::new();
        let mut lines = BufReader::new(connection).lines();
        loop {
            let line = lines.next().expect("the watch goes on to the end").unwrap();
            if let Some(event) = line.strip_prefix("event: ") {
                kind = event.to_owned();
            }
            let Some(data) = line.strip_prefix("data: ") else { continue };
            let data: Value = serde_json::from_str(data).unwrap();
            let key = data["key"].as_str().unwrap().to_owned();
            match &kind[..] {
                "put" if key == end => break,
                "put" if key.starts_with("/queue/results/") => *writes.entry(key).or_default() += 1,
                "put" => drop(jobs_left.insert(key)),
                "delete" => assert!(jobs_left.remove(&key), "{line}"),
                _ => panic!("{line}"),
            }
        }
        assert_eq!((writes.len(), jobs_left.len()), (jobs, 0), "jobs done, and jobs left");
        writes.retain(|_, times| *times > 1);
        assert!(writes.is_empty(), "these results were recorded more than once: {writes:?}");
    }
}

fn ids(prefix: &str) -> Vec<String> {
    (0..30).map(|number| format!("{prefix}-{number}")).collect()
}

#[test]
fn each_job_has_one_result_after_a_leader_and_a_worker_die() {
    let mut queue = Queue::start(3, &[]);
    let mut dead = queue.worker("dead", "1s", &WAIT_FOR_GO);
    let first = vec!["first".to_owned()];
    queue.add("adder-1", &first).wait(PATIENCE);
    queue.said("dead", &["claimed "]);
    let workers = ["one", "two", "three"];
    let _workers = workers.map(|name| queue.worker(name, "1s", &["echo"]));
    let mut before = queue.add("adder-2", &ids("before"));
    queue.results(10);

    let (leader, _) = queue.cluster.leader();
    dead.kill();
    queue.cluster.kill(leader);
    let mut during = queue.add("adder-3", &ids("during"));
    queue.api.remove(&leader);

    assert_eq!((before.wait(PATIENCE), during.wait(PATIENCE)), (0, 0));
    let results = queue.results(61);
    let mut done: Vec<_> =
        results.iter().map(|result| result["output"].as_str().unwrap().trim_end()).collect();
    let mut added = [first, ids("before"), ids("during")].concat();
    done.sort_unstable();
    added.sort_unstable();
    assert_eq!(done, added);
    assert!(results.iter().all(|result| result["worker"] != "dead"));
    eventually(PATIENCE, "each result is known to the worker that recorded it", || {
        let lines = workers.map(|name| queue.lines(name)).concat();
        lines.iter().filter(|line| line.starts_with("done ")).count() == 61
    });
    queue.assert_done_once(61);
}

/// Another worker does the job that a late one has claimed. Then the late one ends its command.
fn overtaken(lease: &str, overtake: impl FnOnce(&Queue, &Process, &str)) {
    let queue = Queue::start(1, &[]);
    let late = queue.worker("late", lease, &WAIT_FOR_GO);
    queue.add("adder", &["job".to_owned()]).wait(PATIENCE);
    let claimed = queue.said("late", &["claimed "]);
    let _other = queue.worker("other", "1min", &["echo"]);
    overtake(&queue, &late, claimed.trim_start_matches("claimed "));
    assert_eq!(queue.results(1)[0]["worker"], "other");

    late.signal(Signal::SIGCONT);
    fs::write(queue.cluster.site.dir().join("go"), "").unwrap();
    let said = queue.said("late", &["done ", "lost "]);
    queue.assert_done_once(1);
    assert!(said.starts_with("lost "), "{said}");
}

#[test]
fn a_worker_that_pauses_for_longer_than_its_lease_is_refused() {
    overtaken("500ms", |_, late, _| late.pause());
}

/// The lease does not protect the result: a claim may be taken over at any time.
#[test]
fn a_result_is_refused_if_its_claim_was_taken_over() {
    overtaken("1min", |queue, _, key| {
        let claim = br#"{"worker": "test", "lease_ms": 0}"#;
        let target = format!("/v1/kv{key}");
        let answer = Client::new(queue.api[&1]).request("PUT", &target, claim).unwrap();
        assert_eq!(answer.status, 204);
    });
}

/// The place is in a part of the log that a snapshot has replaced.
#[test]
fn a_worker_lists_again_after_its_place_is_forgotten() {
    let mut queue = Queue::start(1, &["--snapshot-count", "10"]);
    let worker = queue.worker("worker", "1min", &["echo"]);
    queue.add("adder-1", &["before".to_owned()]).wait(PATIENCE);
    queue.said("worker", &["done "]);

    worker.pause();
    queue.cluster.kill(1);
    queue.cluster.start_again(1);
    queue.add("adder-2", &["meanwhile".to_owned()]).wait(PATIENCE);
    for number in 0..20 {
        queue.cluster.put(1, &format!("/other-{number}"), "");
    }
    queue.cluster.kill(1);
    queue.cluster.start_again(1);
    worker.signal(Signal::SIGCONT);
    assert_eq!(queue.results(2).len(), 2);
}

/// A proxy before a member that closes the connection in place of the first answer to a claim, and to the end
/// of a job.
fn losing_answers(member: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let unlucky = Mutex::new(vec!["PUT /v1/kv/queue/jobs/", r#""then":[{"delete""#]);
        std::thread::scope(|scope| {
            for client in listener.incoming() {
                let unlucky = &unlucky;
                scope.spawn(move || forward(client?, TcpStream::connect(member)?, unlucky));
            }
        });
    });
    address
}

fn forward(client: TcpStream, member: TcpStream, unlucky: &Mutex<Vec<&str>>) -> io::Result<()> {
    let is_lost = AtomicBool::new(false);
    let copy = |mut from: &TcpStream, mut to: &TcpStream, is_request: bool| {
        let mut bytes = [0; 64 << 10];
        loop {
            let length = from.read(&mut bytes)?;
            let bytes = &bytes[..length];
            let mut unlucky = unlucky.lock().unwrap();
            let text = String::from_utf8_lossy(bytes);
            let kind = unlucky.iter().position(|kind| text.contains(kind));
            if let Some(kind) = kind.filter(|_| is_request) {
                unlucky.remove(kind);
                is_lost.store(true, Ordering::Relaxed);
            }
            drop(unlucky);
            if length == 0 || !is_request && is_lost.load(Ordering::Relaxed) {
                client.shutdown(Shutdown::Both)?;
                return member.shutdown(Shutdown::Both);
            }
            to.write_all(bytes)?;
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| copy(&client, &member, true));
        copy(&member, &client, false)
    })
}

#[test]
fn a_write_whose_answer_is_lost_is_known_to_be_done() {
    let mut queue = Queue::start(1, &[]);
    let member = queue.api[&1];
    queue.api.insert(1, losing_answers(member));
    let _worker = queue.worker("worker", "1min", &["echo"]);
    queue.api.insert(1, member);
    queue.add("adder", &["job".to_owned()]).wait(PATIENCE);
    let said = queue.said("worker", &["done ", "lost "]);
    assert!(said.starts_with("done "), "{said}");
    queue.assert_done_once(1);
    let log = fs::read_to_string(queue.cluster.site.dir().join("worker.log")).unwrap();
    let lost = log.lines().filter(|line| line.starts_with("asking the next member")).count();
    assert!(lost >= 2, "two answers are lost: {log}");
}
