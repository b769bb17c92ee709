//! The application port of real members: kills, resumption, slow watchers, metrics.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::admin::{admin, json, leader};
use crate::support::processes::{
    Cluster, FAST, PATIENCE, Site, eventually, eventually_some, owned,
};

/// Members with an admin and an application port each.
fn start(size: u64, more: &[&str]) -> Cluster {
    let site = Site::new();
    let place = |_| {
        let mut place = site.place(site.url());
        let (admin, api) = (site.at(site.port()).to_string(), site.at(site.port()).to_string());
        place.flags = owned(&["--admin", &admin, "--api", &api]);
        place
    };
    let places = (0..size).map(place).collect();
    Cluster::start_at(site, places, &[&FAST[..], more].concat())
}

fn api(cluster: &Cluster, id: u64) -> SocketAddr {
    let flags = &cluster.member(id).flags;
    flags[flags.iter().position(|flag| flag == "--api").unwrap() + 1].parse().unwrap()
}

/// A response: its status, its headers in lower case, and its body.
struct Response {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

/// Opens a connection and sends a request of HTTP/1.0, whose response ends with the connection.
fn send(
    address: SocketAddr,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> io::Result<BufReader<TcpStream>> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut head = format!("{method} {target} HTTP/1.0\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{head}\r\n{body}").as_bytes())?;
    Ok(BufReader::new(stream))
}

fn read_head(from: &mut impl BufRead) -> io::Result<(u16, BTreeMap<String, String>)> {
    let (mut status, mut headers) = (0, BTreeMap::new());
    for line in from.by_ref().lines() {
        let line = line?;
        if line.is_empty() {
            return Ok((status, headers));
        }
        match line.split_once(": ") {
            Some((name, value)) => drop(headers.insert(name.to_lowercase(), value.to_owned())),
            None => status = line.split(' ').nth(1).unwrap_or_default().parse().unwrap_or(0),
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

fn ask(
    address: SocketAddr,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> io::Result<Response> {
    let mut connection = send(address, method, target, headers, body)?;
    let (status, headers) = read_head(&mut connection)?;
    let mut body = String::new();
    connection.read_to_string(&mut body)?;
    Ok(Response { status, headers, body })
}

fn token(address: SocketAddr) -> String {
    let issued = ask(address, "POST", "/v1/retry-token", &[], "").unwrap();
    assert_eq!(issued.status, 201, "{}", issued.body);
    issued.body.split('"').nth(3).unwrap().to_owned()
}

/// A watch: lines of its stream.
struct Watch {
    lines: io::Lines<BufReader<TcpStream>>,
    last_id: String,
}

impl Watch {
    fn open(address: SocketAddr, target: &str, last_id: &str) -> io::Result<Self> {
        let mut connection = send(address, "GET", target, &[("Last-Event-ID", last_id)], "")?;
        assert_eq!(read_head(&mut connection)?.0, 200);
        Ok(Self { lines: connection.lines(), last_id: last_id.to_owned() })
    }

    /// The kind and data of the next event; `None` at the end of the connection.
    fn event(&mut self) -> Option<(String, String)> {
        let (mut id, mut kind, mut data) = (None, String::new(), String::new());
        loop {
            let line = self.lines.next()?.ok()?;
            match line.split_once(": ") {
                Some(("id", value)) => id = Some(value.to_owned()),
                Some(("event", value)) => kind = value.to_owned(),
                Some(("data", value)) => data = value.to_owned(),
                _ => {
                    if let Some(id) = id.take() {
                        self.last_id = id;
                    }
                    if !kind.is_empty() {
                        return Some((kind, data));
                    }
                }
            }
        }
    }
}

/// The followers are stopped while the leader takes the write, so it cannot answer before it is killed.
#[test]
fn one_put_outlives_five_kills_of_the_leader_and_happens_once() {
    let mut cluster = start(3, &[]);
    let token = token(api(&cluster, 1));
    let put = |at: SocketAddr| ask(at, "PUT", "/v1/kv/paid", &[("Idempotency-Key", &token)], "100");
    for _ in 0..5 {
        let leading = leader(&cluster);
        let followers: Vec<u64> = cluster.ids().into_iter().filter(|id| *id != leading).collect();
        for id in &followers {
            cluster.process(*id).pause();
        }
        let last = json(admin(&cluster, leading), "/status")["last"].as_u64().unwrap();
        let connection = send(
            api(&cluster, leading),
            "PUT",
            "/v1/kv/paid",
            &[("Idempotency-Key", &token)],
            "100",
        );
        eventually(PATIENCE, "the leader has it in its log", || {
            json(admin(&cluster, leading), "/status")["last"].as_u64().unwrap() > last
        });
        cluster.kill(leading);
        let head = read_head(&mut connection.unwrap());
        assert!(head.is_err(), "nobody answered: {head:?}");
        for id in &followers {
            cluster.process(*id).signal(Signal::SIGCONT);
        }
        cluster.start_again(leading);
        cluster.all_serve();
    }
    let answers = [1, 2, 3].map(|id| put(api(&cluster, id)).unwrap());
    let first = &answers[0].headers["raft-index"];
    for answer in &answers {
        assert_eq!((answer.status, &answer.headers["raft-index"]), (201, first));
        assert_eq!(answer.headers["idempotency-replayed"], "true");
    }
    for id in cluster.ids() {
        let end = ask(api(&cluster, id), "PUT", "/v1/kv/paid/end", &[], "").unwrap();
        assert!(end.status < 300);
        let mut watch =
            Watch::open(api(&cluster, id), "/v1/watch?prefix=/paid&from=0", "").unwrap();
        let mut puts = 0;
        while let Some((kind, data)) = watch.event() {
            assert_eq!(kind, "put");
            puts += usize::from(data.contains("\"/paid\""));
            if data.contains("/paid/end") {
                break;
            }
        }
        assert_eq!(puts, 1, "the history of the key at member {id}");
    }
}

#[test]
fn a_watch_goes_on_at_another_member_without_gap_or_repetition() {
    let mut cluster = start(3, &["--snapshot-count", "20"]);
    let mut at = api(&cluster, 1);
    let mut watch = Watch::open(at, "/v1/watch?prefix=/w/&from=0", "").unwrap();
    let writer = api(&cluster, 3);
    let writes = thread::spawn(move || {
        for number in 0..300 {
            eventually(PATIENCE, "it is written", || {
                let target = format!("/v1/kv/w/{number:03}");
                ask(writer, "PUT", &target, &[], "v").is_ok_and(|put| put.status < 300)
            });
        }
    });
    let mut keys = Vec::new();
    let mut is_killed = false;
    while keys.last().is_none_or(|key| key != "/w/299") {
        if keys.len() > 50 && !is_killed {
            cluster.kill(1);
            is_killed = true;
        }
        match watch.event() {
            Some((kind, data)) => {
                assert_eq!(kind, "put", "{data}");
                let key = data.split('"').nth(3).unwrap().to_owned();
                // A write that was repeated after an unknown outcome may appear twice.
                if keys.last() != Some(&key) {
                    keys.push(key);
                }
            }
            None => {
                at = api(&cluster, 2);
                watch = eventually_some(PATIENCE, "the other member watches", || {
                    Watch::open(at, "/v1/watch?prefix=/w/&from=0", &watch.last_id).ok()
                });
            }
        }
    }
    writes.join().unwrap();
    let expected: Vec<_> = (0..300).map(|number| format!("/w/{number:03}")).collect();
    assert_eq!(keys, expected);
    assert!(is_killed && at == api(&cluster, 2));
}

/// Its place falls out of the history, and its connection holds a batch of events at most.
#[test]
fn watchers_that_do_not_read_hold_little_and_are_reset() {
    let mut cluster = start(1, &[]);
    let at = api(&cluster, 1);
    let target = "/v1/watch?prefix=/big&values=true";
    let watches: Vec<_> = (0..30).map(|_| Watch::open(at, target, "").unwrap()).collect();
    let before = cluster.process(1).resident_bytes();
    let value = "x".repeat(60_000);
    for number in 0..400 {
        let put = ask(at, "PUT", &format!("/v1/kv/big/{}", number % 10), &[], &value).unwrap();
        assert!(put.status < 300, "{}", put.body);
    }
    let grown = cluster.process(1).resident_bytes().saturating_sub(before);
    // 16 MiB of history, and a batch and the buffers of each connection. Without bounds it would be 700 MB.
    assert!(grown < 100 << 20, "it grew by {grown} bytes");
    let begun = Instant::now();
    for mut watch in watches.into_iter().take(3) {
        while watch.event().expect("it ends with a reset").0 != "reset" {
            assert!(begun.elapsed() < PATIENCE);
        }
        assert_eq!(watch.event(), None);
        // From there it goes on, unless that is too old again.
        assert!(ask(at, "PUT", "/v1/kv/big/last", &[], "v").unwrap().status < 300);
        loop {
            assert!(begun.elapsed() < PATIENCE);
            match watch.event() {
                Some((_, data)) if data.contains("/big/last") => break,
                Some(_) => {}
                None => watch = Watch::open(at, target, &watch.last_id).unwrap(),
            }
        }
    }
}

#[test]
fn metrics_tell_ports_watchers_tokens_and_failed_conditions() {
    let mut cluster = start(1, &[]);
    let (at, operators, clients) = (api(&cluster, 1), admin(&cluster, 1), cluster.address(1));
    let token = token(at);
    let _watch = Watch::open(at, "/v1/watch", "").unwrap();
    for (address, target, headers, status) in [
        (at, "/v1/kv/a", vec![("Idempotency-Key", &token[..])], 201),
        (at, "/v1/kv/a", vec![("If-None-Match", "*")], 412),
        (operators, "/v1/kv/a", vec![], 204),
        (clients, "/a", vec![], 204),
    ] {
        assert_eq!(ask(address, "PUT", target, &headers, "v").unwrap().status, status);
    }
    let metrics = ask(operators, "GET", "/metrics", &[], "").unwrap().body;
    for line in [
        "raftexample_http_requests_total{port=\"application\",method=\"PUT\",status=\"201\"} 1",
        "raftexample_http_requests_total{port=\"application\",method=\"PUT\",status=\"412\"} 1",
        "raftexample_http_requests_total{port=\"application\",method=\"GET\",status=\"200\"} 1",
        "raftexample_http_requests_total{port=\"admin\",method=\"PUT\",status=\"204\"} 1",
        "raftexample_http_requests_total{port=\"client\",method=\"PUT\",status=\"204\"} 1",
        "raftexample_watchers 1",
        "raftexample_retry_tokens 1",
        "raftexample_conditions_failed_total 1",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
    // A watch ends with its member.
    let mut watch = Watch::open(at, "/v1/watch", "").unwrap();
    cluster.process(1).signal(Signal::SIGTERM);
    let begun = Instant::now();
    assert_eq!(watch.event(), None);
    assert_eq!(cluster.process(1).wait(PATIENCE), 0);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

/// Without a majority a write waits and nothing is changed, a watch ends, and local reads go on.
#[test]
fn without_a_majority_requests_say_so() {
    let mut cluster = start(3, &["--request-timeout", "300ms"]);
    let at = api(&cluster, 1);
    assert_eq!(ask(at, "PUT", "/v1/kv/a", &[], "v").unwrap().status, 201);
    cluster.kill(2);
    cluster.kill(3);
    for (method, target, body) in [
        ("PUT", "/v1/kv/a", "w"),
        ("GET", "/v1/kv/a", ""),
        ("DELETE", "/v1/kv/a", ""),
        ("POST", "/v1/txn", "{}"),
        ("GET", "/v1/keys", ""),
        ("GET", "/v1/watch", ""),
        ("POST", "/v1/retry-token", ""),
    ] {
        let refused = eventually_some(PATIENCE, "it knows no leader", || {
            Some(ask(at, method, target, &[], body).unwrap()).filter(|it| it.status == 503)
        });
        assert_eq!(refused.headers["content-type"], "application/problem+json");
        assert_eq!(refused.headers["retry-after"], "1");
        assert!(refused.body.contains("nothing was changed"), "{}", refused.body);
    }
    for target in ["/v1/kv/a", "/v1/keys"] {
        let read = ask(at, "GET", target, &[("Raft-Read", "local")], "").unwrap();
        assert_eq!(read.status, 200, "{}", read.body);
    }
}
