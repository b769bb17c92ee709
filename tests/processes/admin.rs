//! The admin port of real members: each endpoint, and the requests it refuses.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use prometheus_parse::{LineInfo, Scrape, Value as Sample};
use serde_json::Value;

use crate::support::processes::{
    Answer, Client, Cluster, FAST, PATIENCE, Process, Signal, Site, eventually, eventually_some,
    owned, put, request, run, serves, skip,
};

/// Starts members with an admin port each.
pub fn start(size: u64, more: &[&str]) -> Cluster {
    let site = Site::new();
    let place = |_| {
        let mut place = site.place(site.url());
        place.flags = owned(&["--admin", &site.at(site.port()).to_string()]);
        place
    };
    let places = (0..size).map(place).collect();
    Cluster::start_at(site, places, &[&FAST[..], more].concat())
}

/// The admin address of member `id`.
pub fn admin(cluster: &Cluster, id: u64) -> SocketAddr {
    let flags = &cluster.member(id).flags;
    flags[flags.iter().position(|flag| flag == "--admin").unwrap() + 1].parse().unwrap()
}

/// A single serving member with an admin port; returns its client and admin addresses.
fn single(site: &Site, more: &[&str]) -> (Process, SocketAddr, SocketAddr) {
    let admin = site.at(site.port());
    let named = admin.to_string();
    let flags = [&FAST[..], &["--admin", &named], more].concat();
    let (flags, address) = site.single(&flags);
    let member = site.spawn("member", &flags);
    serves(address);
    (member, address, admin)
}

fn ask(address: SocketAddr, method: &str, target: &str, body: &str) -> (u16, String) {
    let Answer { status, body, .. } = request(address, method, target, body.as_bytes()).unwrap();
    (status, String::from_utf8(body).unwrap())
}

pub fn json(address: SocketAddr, target: &str) -> Value {
    let (status, body) = ask(address, "GET", target, "");
    assert_eq!(status, 200, "{target}: {body}");
    serde_json::from_str(&body).unwrap()
}

/// The leader that every member follows.
pub fn leader(cluster: &Cluster) -> u64 {
    eventually_some(PATIENCE, "all follow one leader", || {
        let ids = cluster.ids().into_iter();
        let leaders: BTreeSet<_> =
            ids.map(|id| json(admin(cluster, id), "/status")["leader"].as_u64()).collect();
        leaders.first().copied().flatten().filter(|id| leaders.len() == 1 && *id != 0)
    })
}

/// The line that describes the counter of a sample in the text format.
fn type_line(sample: &str) -> String {
    format!("# TYPE {} counter\n", sample.split(['{', ' ']).next().unwrap())
}

/// Metrics by name and labels; for a histogram, its count.
fn counts(address: SocketAddr) -> BTreeMap<String, f64> {
    let answer = request(address, "GET", "/metrics", b"").unwrap();
    let kind = &answer.headers["content-type"];
    assert_eq!(kind, "text/plain; version=0.0.4; charset=utf-8");
    let text = String::from_utf8(answer.body).unwrap();
    for line in text.lines() {
        assert_ne!(LineInfo::parse(line), LineInfo::Ignored, "{line}");
        let is_counter = line.split('{').next().is_some_and(|name| name.ends_with("_total"));
        assert!(!is_counter || line.starts_with('#') || text.contains(&type_line(line)), "{line}");
    }
    let scrape = Scrape::parse(text.lines().map(|line| Ok(line.to_owned()))).unwrap();
    let count = |sample: prometheus_parse::Sample| {
        let value = match sample.value {
            Sample::Counter(value) | Sample::Gauge(value) | Sample::Untyped(value) => value,
            Sample::Histogram(buckets) => {
                assert!(buckets.windows(2).all(|two| two[0].count <= two[1].count), "cumulative");
                buckets.last().unwrap().count
            }
            Sample::Summary(_) => panic!("there is none"),
        };
        (format!("{}{{{}}}", sample.metric, sample.labels), value)
    };
    scrape.samples.into_iter().map(count).collect()
}

/// Sends a request with these header lines and reads until the connection closes.
fn raw(address: SocketAddr, line: &str, headers: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!("{line} HTTP/1.1\r\n{headers}Connection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The status and body of a GET, chunked or not.
fn download(address: SocketAddr, target: &str) -> (u16, Vec<u8>) {
    let mut stream = BufReader::new(TcpStream::connect(address).unwrap());
    stream.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!("GET {target} HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.get_mut().write_all(head.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    let status = String::from_utf8_lossy(&answer[9..12]).parse().unwrap();
    (status, answer.split_off(end + 4))
}

#[test]
fn a_member_without_a_majority_is_live_and_not_ready() {
    let mut cluster = start(3, &[]);
    let at = admin(&cluster, 1);
    assert_eq!(ask(at, "GET", "/livez", ""), (200, "ok\n".into()));
    eventually(PATIENCE, "it is ready", || ask(at, "GET", "/readyz", "") == (200, "ok\n".into()));
    let all = "[+] leader ok\n[+] applied ok\n[+] voter ok\n[+] current ok\n";
    assert_eq!(ask(at, "GET", "/readyz?verbose", ""), (200, all.into()));
    cluster.kill(2);
    cluster.kill(3);
    eventually(PATIENCE, "it is not ready", || ask(at, "GET", "/readyz", "").0 == 503);
    eventually(PATIENCE, "it knows no leader", || {
        ask(at, "GET", "/readyz", "").1 == "not ready: no leader is known\n"
    });
    let (status, checks) = ask(at, "GET", "/readyz?verbose", "");
    assert_eq!(status, 503);
    assert_eq!(checks, "[-] leader: no leader is known\n[+] applied ok\n[+] voter ok\n");
    assert_eq!(ask(at, "GET", "/livez", "").0, 200);
}

/// Waits until the admin port at `at` says that its member is ready. Returns what that member, at
/// `address`, has under `key` then.
fn held_when_ready(at: SocketAddr, address: SocketAddr, key: &str) -> Option<Vec<u8>> {
    eventually(PATIENCE, "it is ready", || {
        request(at, "GET", "/readyz", b"").is_ok_and(|answer| answer.status == 200)
    });
    let answer = Client::new(address).reading_locally().get(key).unwrap();
    (answer.status == 200).then_some(answer.body)
}

/// A member that was away, or has nothing, has applied all that it knows of.
#[test]
fn a_ready_member_has_applied_what_the_others_committed() {
    let mut cluster = start(3, &[]);
    cluster.stop(3, Signal::SIGTERM);
    let address = cluster.address(1);
    thread::scope(|scope| {
        for client in 0..8 {
            scope.spawn(move || {
                let mut connection = Client::new(address);
                for number in 0..300 {
                    let key = format!("/{client}-{number}");
                    assert_eq!(connection.put(&key, &[b'x'; 8192]).unwrap(), 204);
                }
            });
        }
    });
    cluster.put(1, "/last", "value");
    let (at, address) = (admin(&cluster, 3), cluster.address(3));
    let held = thread::scope(|scope| {
        let held = scope.spawn(|| held_when_ready(at, address, "/last"));
        cluster.start_again(3);
        held.join().unwrap()
    });
    assert_eq!(held.as_deref(), Some(&b"value"[..]), "member 3 was away");

    let mut place = cluster.site.place(cluster.site.url());
    let at = cluster.site.at(cluster.site.port());
    place.flags = owned(&["--admin", &at.to_string()]);
    let address = place.client;
    let held = thread::scope(|scope| {
        let held = scope.spawn(|| held_when_ready(at, address, "/last"));
        cluster.join_at(1, 4, place);
        held.join().unwrap()
    });
    assert_eq!(held.as_deref(), Some(&b"value"[..]), "member 4 is new");
}

/// Otherwise a client that adds and removes members makes the metrics longer for ever.
#[test]
fn metrics_name_no_member_that_was_removed() {
    let cluster = start(1, &[]);
    let at = admin(&cluster, 1);
    let named = |id: u64, what: &str| {
        let label = format!("peer=\"{id}\"");
        counts(at).keys().any(|series| series.contains(&label) && series.contains(what))
    };
    // Nobody listens there: sending to it fails all the time, also while it is being removed.
    let nobody = cluster.site.url();
    for id in 2..12 {
        cluster.change(1, "POST", id, &nobody);
        eventually(PATIENCE, "its failures are counted", || named(id, "peer_failures"));
        cluster.change(1, "DELETE", id, "");
    }
    cluster.put(1, "/k", "value");
    eventually(PATIENCE, "no series of a removed member is left", || {
        !(2..12).any(|id| named(id, ""))
    });
}

#[test]
fn a_member_before_its_first_start_is_not_ready() {
    let site = Site::new();
    let at = site.at(site.port());
    let cluster = format!("{},{}", site.url(), site.url());
    let (host, port) = (site.address.to_string(), site.port().to_string());
    let flags = ["--cluster", &cluster, "--host", &host, "--port", &port, "--admin"];
    let flags = owned(&[&flags[..], &[&at.to_string()]].concat());
    let _member = site.spawn("member", &flags);
    let checks = eventually_some(PATIENCE, "it answers", || {
        let answer = request(at, "GET", "/readyz?verbose", b"").ok()?;
        assert_eq!(answer.status, 503);
        String::from_utf8(answer.body).ok()
    });
    assert!(
        checks.contains("[-] voter: waiting for the other members before the first start"),
        "{checks}"
    );
}

/// A process whose fdatasync takes six seconds from now on, or why there is none.
fn hang_disk(site: &Site, pid: u32) -> Result<Process, &'static str> {
    if Command::new("strace").arg("-V").output().is_err() {
        return Err("no disk hangs: there is no strace");
    }
    let mut strace = Command::new("strace");
    strace.args(["-f", "-o", "/dev/null", "-p", &pid.to_string()]);
    strace.args(["-e", "trace=fdatasync", "-e", "inject=fdatasync:delay_enter=6000000"]);
    let mut strace = site.spawn_command("strace", strace, false);
    eventually(PATIENCE, "strace takes hold or is not allowed to", || {
        strace.stderr().contains("attached") || strace.exited().is_some()
    });
    if strace.exited().is_some() { Err("no disk hangs: strace may not attach") } else { Ok(strace) }
}

/// Waits until a member's `/livez` fails.
fn is_not_live(at: SocketAddr) {
    let dead = || {
        let (status, why) = ask(at, "GET", "/livez", "");
        (status == 503).then_some(why)
    };
    let why = eventually_some(PATIENCE, "it is not live", dead);
    assert!(why.starts_with("the raft node has not ticked for "), "{why}");
}

#[test]
fn a_member_whose_disk_hangs_is_not_live_until_it_goes_on() {
    let site = Site::new();
    let (member, address, at) = single(&site, &[]);
    let strace = match hang_disk(&site, member.pid()) {
        Ok(strace) => strace,
        Err(why) => return skip(why),
    };
    let mut client = Client::new(address);
    client.send("PUT", "/k", b"v").unwrap();
    is_not_live(at);
    strace.signal(Signal::SIGTERM);
    eventually(PATIENCE, "it is live again", || ask(at, "GET", "/livez", "").0 == 200);
}

/// It writes in the background, and would go on with its heartbeats.
#[test]
fn a_leader_whose_disk_hangs_is_replaced_and_not_live() {
    let mut cluster = start(3, &[]);
    let (site, former) = (Site::new(), leader(&cluster));
    let at = admin(&cluster, former);
    let uptime = || json(at, "/status")["uptime_seconds"].as_f64().unwrap();
    // The commit index is on disk after a tick. Only the frame of the next write hangs then.
    let before = uptime();
    eventually(PATIENCE, "a few ticks", || uptime() > before + 0.5);
    let _strace = match hang_disk(&site, cluster.process(former).pid()) {
        Ok(strace) => strace,
        Err(why) => return skip(why),
    };
    let mut client = Client::new(cluster.address(former));
    client.send("PUT", "/k", b"v").unwrap();
    let other = former % 3 + 1;
    eventually(PATIENCE, "another member leads", || {
        let leader = json(admin(&cluster, other), "/status")["leader"].as_u64();
        leader.is_some_and(|leader| leader != 0 && leader != former)
    });
    is_not_live(at);
    cluster.put(other, "/k", "served");
}

#[test]
fn status_tells_of_a_member_and_members_of_all() {
    let cluster = start(3, &[]);
    for number in 0..10 {
        cluster.put(1, &format!("/key-{number}"), "value");
    }
    let leader = leader(&cluster);
    for id in cluster.ids() {
        let at = admin(&cluster, id);
        let status = eventually_some(PATIENCE, "a tick after the writes", || {
            let status = json(at, "/status");
            (status["keys"] == 10).then_some(status)
        });
        let role = if id == leader { "leader" } else { "follower" };
        assert_eq!((&status["id"], &status["role"]), (&Value::from(id), &Value::from(role)));
        assert_eq!(status["leader"], leader);
        assert_eq!(status["commit"], status["applied"]);
        assert_eq!(status["cluster_id"].as_str().unwrap().len(), 16);
        assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
        // Three members and ten keys make 13 entries, and a leader starts with one of its own.
        let at_least = |name: &str, least: f64| {
            assert!(status[name].as_f64().unwrap() >= least, "{name}: {status}");
        };
        at_least("term", 2.0);
        at_least("vote", 0.0);
        at_least("commit", 14.0);
        at_least("last", 14.0);
        at_least("first", 1.0);
        at_least("wal_bytes", 500.0);
        at_least("store_bytes", 100.0);
        at_least("uptime_seconds", 0.01);
        assert_eq!(status["puts"]["count"], if id == 1 { 10 } else { 0 }, "{status}");
        assert_eq!(status["snapshot"], 0);

        let members = json(at, "/members");
        assert_eq!(members.as_array().unwrap().len(), 3);
        for (member, (id, known)) in members
            .as_array()
            .unwrap()
            .iter()
            .zip(cluster.ids().into_iter().map(|id| (id, cluster.member(id))))
        {
            assert_eq!(
                (&member["id"], &member["url"]),
                (&Value::from(id), &Value::from(&*known.url))
            );
            assert_eq!(member["role"], "voter");
        }
        let followed = members.as_array().unwrap().iter().any(|member| member["match"].is_u64());
        assert_eq!(followed, id == leader, "progress is the leader's to tell: {members}");
    }
}

#[test]
fn cluster_shows_a_killed_member_as_dead_and_the_others_alive() {
    let mut cluster = start(3, &[]);
    let alive = |cluster: &Cluster| {
        let answer = json(admin(cluster, 1), "/cluster");
        assert_eq!(answer["seen_by"], 1);
        let members = answer["members"].as_array().unwrap().clone();
        members.iter().map(|member| member["alive"].as_bool().unwrap()).collect::<Vec<_>>()
    };
    eventually(PATIENCE, "all are alive", || alive(&cluster) == [true; 3]);
    let answer = json(admin(&cluster, 1), "/cluster");
    for member in answer["members"].as_array().unwrap() {
        assert_eq!(member["status"]["id"], member["id"], "in its own words");
        assert_eq!(member["status"]["members"].as_array().unwrap().len(), 3);
    }
    cluster.kill(2);
    let killed = Instant::now();
    eventually(PATIENCE, "the killed one is dead", || alive(&cluster) == [true, false, true]);
    let took = killed.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?}");
    cluster.start_again(2);
    eventually(PATIENCE, "it is alive again", || alive(&cluster) == [true; 3]);
}

#[test]
fn events_describe_the_cluster_until_the_member_stops() {
    let mut cluster = start(2, &[]);
    let at = admin(&cluster, 1);
    let mut stream = BufReader::new(TcpStream::connect(at).unwrap());
    stream.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream.get_mut(), "GET /events HTTP/1.0\r\nHost: {at}\r\n\r\n").unwrap();
    let mut lines = stream.lines().map(Result::unwrap);
    assert_eq!(lines.next().unwrap(), "HTTP/1.0 200 OK");
    let head: Vec<_> = lines.by_ref().take_while(|line| !line.is_empty()).collect();
    assert!(head.iter().any(|line| line == "Content-Type: text/event-stream"), "{head:?}");
    // The cluster, or, in an event of that name, points of the charts.
    let mut next = || {
        let mut is_points = false;
        loop {
            let line = lines.next()?;
            match line.strip_prefix("data: ") {
                Some(data) => {
                    let data: Value = serde_json::from_str(data).unwrap();
                    assert_eq!(data["members"].is_array(), !is_points, "{data}");
                    return Some(data);
                }
                None if line == "event: points" => is_points = true,
                None => assert_eq!(line, "", "nothing else"),
            }
        }
    };
    let mut comes = |what: &str, is_it: &dyn Fn(&Value) -> bool| {
        assert!(std::iter::from_fn(&mut next).take(200).any(|event| is_it(&event)), "{what}");
    };
    comes("all are alive", &|event| {
        let members = event["members"].as_array();
        members.is_some_and(|members| members.iter().all(|member| member["alive"] == true))
    });
    comes("a point, which was kept", &|event| event["points"].is_array());
    put(cluster.address(1), "/k", b"v");
    comes("the key is seen", &|event| event["members"][1]["status"]["keys"] == 1);
    comes("the PUT is in a point", &|event| {
        let mut points = event["points"].as_array().into_iter().flatten();
        points.any(|point| point["puts"]["per_second"].as_f64().unwrap() > 0.0)
    });
    cluster.stop(1, Signal::SIGTERM);
    assert!(std::iter::from_fn(&mut next).take(1000).count() < 1000, "they end");
}

#[test]
fn metrics_parse_and_count_what_happens() {
    let mut cluster = start(3, &["--snapshot-count", "10", "--snapshot-catch-up-entries", "5"]);
    let first = leader(&cluster);
    let at = admin(&cluster, first);
    let before = counts(at);
    for number in 0..20 {
        cluster.put(first, &format!("/{number}"), "value");
    }
    assert_eq!(request(cluster.address(first), "GET", "/none", b"").unwrap().status, 404);
    assert_eq!(request(cluster.address(first), "GET", "/1", b"").unwrap().status, 200);
    let other = *cluster.ids().iter().find(|id| **id != first).unwrap();
    let moved = |name: &str, least: f64| {
        let name = format!("raftexample_{name}");
        let name = if name.contains('{') { name } else { format!("{name}{{}}") };
        eventually(PATIENCE, &format!("{name} moves by {least}"), || {
            let value = |counts: &BTreeMap<String, f64>| counts.get(&name).copied();
            let now = value(&counts(at)).unwrap_or(0.0);
            now >= value(&before).unwrap_or(0.0) + least
        });
    };
    let is = |name: &str, wanted: f64| {
        let name = format!("raftexample_{name}{{}}");
        eventually(PATIENCE, &format!("{name} is {wanted}"), || counts(at)[&name] == wanted);
    };
    is("has_leader", 1.0);
    is("is_leader", 1.0);
    is("is_learner", 0.0);
    is("members", 3.0);
    is("keys", 20.0);
    is("proposals_pending", 0.0);
    moved("proposals_committed_total", 20.0);
    moved("proposals_applied_total", 20.0);
    moved("wal_fsync_seconds", 1.0);
    moved("apply_seconds", 1.0);
    moved("put_seconds", 20.0);
    moved("get_seconds", 1.0);
    moved("commit_index", 20.0);
    moved("applied_index", 20.0);
    moved("last_index", 20.0);
    moved("store_bytes", 20.0);
    moved("snapshots_made_total", 1.0);
    moved("snapshot_index", 1.0);
    moved(&format!("peer_sent_bytes_total{{peer=\"{other}\"}}"), 100.0);
    moved(&format!("peer_received_bytes_total{{peer=\"{other}\"}}"), 100.0);
    moved(&format!("peer_round_trip_seconds{{peer=\"{other}\"}}"), 1.0);
    moved("http_requests_total{method=\"PUT\",port=\"client\",status=\"204\"}", 20.0);
    moved("http_requests_total{method=\"GET\",port=\"client\",status=\"404\"}", 1.0);
    moved("http_requests_total{method=\"GET\",port=\"client\",status=\"200\"}", 1.0);
    for name in ["term", "wal_bytes", "leader_changes_total"] {
        assert!(counts(at)[&format!("raftexample_{name}{{}}")] > 0.0, "{name}");
    }

    // A member that lags receives a snapshot; no message reaches it meanwhile.
    cluster.kill(other);
    for number in 0..40 {
        cluster.put(first, &format!("/more-{number}"), "value");
    }
    moved(&format!("peer_failures_total{{peer=\"{other}\"}}"), 1.0);
    cluster.start_again(other);
    moved("snapshots_sent_total{outcome=\"ok\"}", 1.0);
    let installed = "raftexample_snapshots_installed_total{}";
    let there = admin(&cluster, other);
    eventually(PATIENCE, "it is installed", || counts(there)[installed] >= 1.0);

    // Without a majority the outcome is unknown.
    cluster.ids().into_iter().filter(|id| *id != first).for_each(|id| cluster.kill(id));
    let answer = request(cluster.address(first), "PUT", "/lost", b"value").unwrap();
    assert_eq!(answer.status, 504, "{answer:?}");
    moved("proposals_failed_total", 1.0);
    is("has_leader", 0.0);

    let garbage = "POST /raft";
    let peer = cluster.member(first).url.strip_prefix("http://").unwrap().parse().unwrap();
    raw(peer, garbage, "Host: h\r\nContent-Length: 0\r\n");
    moved("rejected_total{reason=\"malformed_request\"}", 1.0);
}

#[test]
fn state_hashes_agree_after_equal_writes_and_after_a_snapshot() {
    let mut cluster = start(3, &["--snapshot-count", "10", "--snapshot-catch-up-entries", "5"]);
    let equal = |cluster: &Cluster, keys: usize| {
        eventually(PATIENCE, "all have the same state", || {
            let hashes: Vec<_> = cluster
                .ids()
                .into_iter()
                .map(|id| json(admin(cluster, id), "/state-hash"))
                .collect();
            let is_equal = hashes.iter().all(|hash| {
                (&hash["index"], &hash["hash"]) == (&hashes[0]["index"], &hashes[0]["hash"])
            });
            let is_named = hashes.iter().zip(1..).all(|(hash, id)| hash["id"] == id);
            is_equal && is_named && hashes[0]["keys"] == keys
        });
        json(admin(cluster, 1), "/state-hash")["hash"].clone()
    };
    cluster.put(1, "/k", "one");
    let one = equal(&cluster, 1);
    cluster.put(2, "/k", "two");
    assert_ne!(equal(&cluster, 1), one, "another value, another hash");
    cluster.kill(3);
    for number in 0..50 {
        cluster.put(1, &format!("/{number}"), "value");
    }
    cluster.start_again(3);
    let there = admin(&cluster, 3);
    serves(cluster.address(3));
    assert!(counts(there)["raftexample_snapshots_installed_total{}"] >= 1.0);
    equal(&cluster, 51);
}

#[test]
fn leadership_goes_where_it_is_sent_and_nowhere_else() {
    let mut cluster = start(3, &[]);
    let first = leader(&cluster);
    let others: Vec<u64> = cluster.ids().into_iter().filter(|id| *id != first).collect();
    let at = admin(&cluster, others[0]);
    let transfer = |query: &str| ask(at, "POST", &format!("/transfer-leadership{query}"), "");
    assert_eq!(transfer(&format!("?to={}", others[0])), (204, String::new()));
    assert_eq!(leader(&cluster), others[0]);
    assert_eq!(transfer(""), (204, String::new()), "to any");
    let now = leader(&cluster);
    assert_ne!(now, others[0]);
    for bad in ["?to=0", "?to=x", "?to=-1", "?to="] {
        let (status, why) = transfer(bad);
        assert_eq!(status, 400, "{bad}: {why}");
        assert!(why.contains("is no member id"), "{why}");
    }
    let (status, why) = transfer("?to=9");
    assert_eq!((status, why.contains("9 is no member with a vote")), (409, true), "{why}");
    let dead = *others.iter().chain([&first]).find(|id| **id != now && **id != others[0]).unwrap();
    cluster.kill(dead);
    let refused = || {
        let (status, why) = transfer(&format!("?to={dead}"));
        (status == 409).then_some(why)
    };
    let why = eventually_some(PATIENCE, "the leader misses the dead one", refused);
    assert!(why.contains("cannot take over"), "{why}");
    assert_eq!(json(at, "/status")["leader"], now, "it stays");
}

#[test]
fn members_are_added_moved_and_removed_or_refused() {
    let cluster = start(3, &[]);
    let at = admin(&cluster, 1);
    let (url, moved) = (cluster.site.url(), cluster.site.url());
    let member =
        |method: &str, id: &str, body: &str| ask(at, method, &format!("/members/{id}"), body);
    for (method, id, body, status, named) in [
        ("POST", "x", &*url, 400, "is no member id"),
        ("POST", "0", &url, 400, "is no member id"),
        ("PUT", "0x4", &url, 400, "is no member id"),
        ("DELETE", "-1", "", 400, "is no member id"),
        ("POST", "4", "nonsense", 400, "nonsense"),
        ("POST", "4", "", 400, "peer URL"),
        ("POST", "3", &url, 409, "is a member already"),
        ("POST", "4", &cluster.member(2).url, 409, "peer URL of member 2 already"),
        ("PUT", "4", &url, 409, "4"),
        ("PUT", "3", &cluster.member(2).url, 409, "2"),
    ] {
        let (answered, why) = member(method, id, body);
        assert_eq!(answered, status, "{method} {id} {body}: {why}");
        assert!(why.contains(named) && why.lines().count() == 1, "{named}: {why}");
    }
    assert_eq!(json(at, "/members").as_array().unwrap().len(), 3, "nothing changed");

    // The leader has applied it; this member learns of it a little later.
    let becomes = |wanted: Option<(&str, &str)>| {
        eventually(PATIENCE, &format!("member 4 is {wanted:?}"), || {
            let members = json(at, "/members");
            let four = members.as_array().unwrap().iter().find(|member| member["id"] == 4);
            let text = |member: &Value, name: &str| member[name].as_str().unwrap().to_owned();
            four.map(|four| (text(four, "url"), text(four, "role")))
                == wanted.map(|(url, role)| (url.to_owned(), role.to_owned()))
        });
    };
    assert_eq!(member("POST", "4", &format!("{url}\n")), (204, String::new()));
    becomes(Some((&url, "learner")));
    assert_eq!(member("PUT", "4", &moved), (204, String::new()));
    becomes(Some((&moved, "learner")));
    assert_eq!(member("DELETE", "4", ""), (204, String::new()));
    becomes(None);
    let (status, why) = member("POST", "4", &url);
    assert_eq!((status, why.contains("4 was removed")), (410, true), "{why}");
}

/// Bodies have the deadline of every request.
#[test]
fn a_body_that_does_not_come_is_not_waited_for() {
    let site = Site::new();
    let (_member, _, at) = single(&site, &["--request-timeout", "300ms"]);
    for line in ["POST /members/4", "PUT /members/1"] {
        let answer = raw(at, line, &format!("Host: {at}\r\nContent-Length: 20\r\n"));
        assert!(answer.starts_with("HTTP/1.1 408 "), "{line}: {answer}");
    }
}

#[test]
fn a_snapshot_is_sound_and_only_one_is_read_at_a_time() {
    const LARGE: usize = 12 << 20;
    let site = Site::new();
    let (_member, address, at) = single(&site, &[]);
    put(address, "/k", b"v");
    let file = site.dir().join("backup.snap");
    for target in ["/snapshot", "/snapshot?local"] {
        let (status, bytes) = download(at, target);
        assert_eq!(status, 200);
        fs::write(&file, bytes).unwrap();
        let shown = run(site.dir(), &["inspect", "--keys", "backup.snap"]);
        assert_eq!(shown.status, 0, "{}{}", shown.stdout, shown.stderr);
        assert!(shown.stdout.contains(" /k: 1 bytes, "), "{}", shown.stdout);
    }
    // More than the socket buffers hold.
    for number in 0..4 {
        put(address, &format!("/large-{number}"), &vec![b'x'; LARGE]);
    }
    let mut slow = TcpStream::connect(at).unwrap();
    write!(slow, "GET /snapshot HTTP/1.1\r\nHost: {at}\r\n\r\n").unwrap();
    slow.set_read_timeout(Some(PATIENCE)).unwrap();
    slow.read_exact(&mut [0; 12]).unwrap();
    let (status, why) = ask(at, "GET", "/snapshot", "");
    assert_eq!(status, 503, "{why}");
    assert!(why.contains("another backup is being read"), "{why}");
    put(address, "/k", b"meanwhile");
    drop(slow);
    let (_, bytes) = eventually_some(PATIENCE, "the next one may", || {
        Some(download(at, "/snapshot")).filter(|(status, _)| *status == 200)
    });
    assert!(bytes.len() > 4 * LARGE, "{}", bytes.len());
}

/// The detail of a problem document, whose other fields agree with the status.
fn problem(address: SocketAddr, method: &str, target: &str, status: u16) -> String {
    let answer = request(address, method, target, b"").unwrap();
    let what = format!("{method} {target}");
    assert_eq!(answer.status, status, "{what}");
    assert_eq!(answer.headers["content-type"], "application/problem+json", "{what}");
    let document: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(document["status"], status, "{what}");
    assert!(document["type"].as_str().unwrap().starts_with("urn:raftexample:"), "{document}");
    assert!(!document["title"].as_str().unwrap().is_empty(), "{document}");
    document["detail"].as_str().unwrap().to_owned()
}

#[test]
fn keys_are_below_v1_as_they_are_at_the_client_port() {
    let site = Site::new();
    let (_member, address, at) = single(&site, &[]);
    let keys = ["/k", "/", "//a//b/", "/a%20b?c=d", "/v1/kv/k", "/members/4", "/../4"];
    for (number, key) in keys.into_iter().enumerate() {
        let (target, value) = (format!("/v1/kv{key}"), number.to_string());
        for status in [201, 204] {
            let answer = request(at, "PUT", &target, value.as_bytes()).unwrap();
            assert_eq!(answer.status, status, "{key}");
            let index = &answer.headers["raft-index"];
            assert!(answer.headers["etag"].ends_with(&format!("-{index}\"")), "{answer:?}");
        }
        assert_eq!(ask(address, "GET", key, ""), (200, value.clone()), "{key}");
        assert_eq!(ask(at, "GET", &target, ""), (200, value), "{key}");
    }
    let listed = json(at, "/v1/keys");
    let listed: BTreeSet<_> =
        listed["keys"].as_array().unwrap().iter().map(|key| key["key"].as_str().unwrap()).collect();
    assert_eq!(listed, BTreeSet::from(keys));
    for key in keys {
        assert_eq!(ask(at, "DELETE", &format!("/v1/kv{key}"), ""), (204, String::new()), "{key}");
        assert_eq!(ask(address, "GET", key, "").0, 404, "{key}");
    }
    assert_eq!(json(at, "/members").as_array().unwrap().len(), 1, "a key is never a member");

    assert_eq!(problem(at, "GET", "/v1/kv/none", 404), "the key does not exist");
    assert_eq!(problem(at, "DELETE", "/v1/kv/none", 404), "the key does not exist");
    assert_eq!(problem(at, "POST", "/v1/kv/4", 405), "this path takes GET, HEAD, PUT, DELETE");
    assert_eq!(problem(at, "GET", "/v1/keys?limit=0", 400), "limit must be 1 to 1000");
    assert!(problem(at, "GET", "/v1/nothing", 404).contains("/v1/kv/KEY"));
}

#[test]
fn other_paths_are_absent_and_the_old_kv_is_too() {
    let site = Site::new();
    let (_member, address, at) = single(&site, &[]);
    put(address, "/k", b"value");
    put(address, "/kv/k", b"value");
    for target in ["/nothing", "/kv", "/kv/k", "/kv/4", "/k", "/v1", "/status/", "/members/1/2"] {
        for method in ["GET", "PUT", "POST", "DELETE"] {
            let (status, why) = ask(at, method, target, "http://127.0.0.1:1");
            assert_eq!(status, 404, "{method} {target}: {why}");
            assert!(why.contains("keys are below /v1"), "{method} {target}: {why}");
        }
    }
    for key in ["/k", "/kv/k"] {
        assert_eq!(ask(address, "GET", key, ""), (200, "value".into()), "{key}");
    }
    assert_eq!(ask(at, "POST", "/status", "").0, 405);
    assert_eq!(ask(at, "GET", "/transfer-leadership", "").0, 405);
}

#[test]
fn foreign_hosts_and_origins_are_refused_and_counted() {
    let site = Site::new();
    let (_member, _, at) = single(&site, &["--allow-host", "raft.example"]);
    let port = at.port();
    let answered = |headers: &str| {
        let answer = raw(at, "GET /status", headers);
        answer.split(' ').nth(1).unwrap().parse::<u16>().unwrap()
    };
    for host in ["localhost", "x.localhost", "[::1]", "192.0.2.1", "raft-1", "RAFT.example"] {
        assert_eq!(answered(&format!("Host: {host}:{port}\r\n")), 200, "{host}");
    }
    let foreign =
        ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "x.raft.example"];
    for host in foreign {
        assert_eq!(answered(&format!("Host: {host}:{port}\r\n")), 403, "{host}");
    }
    let own = format!("Host: {at}\r\n");
    assert_eq!(answered(&format!("{own}Origin: http://{at}\r\n")), 200);
    let origins = ["http://evil.example", "null", "http://localhost:1"];
    for origin in origins {
        assert_eq!(answered(&format!("{own}Origin: {origin}\r\n")), 403, "{origin}");
    }
    // The headers of a cross-site fetch by a browser, which has no Origin.
    for (site, mode, expected) in [
        ("cross-site", "no-cors", 403),
        ("same-site", "no-cors", 403),
        ("cross-site", "navigate", 403),
        ("same-origin", "cors", 200),
        ("none", "navigate", 200),
    ] {
        let fetch = format!("{own}Sec-Fetch-Site: {site}\r\nSec-Fetch-Mode: {mode}\r\n");
        assert_eq!(answered(&fetch), expected, "{site} {mode}");
    }
    let counts = counts(at);
    let count =
        |reason: &str| counts[&format!("raftexample_rejected_total{{reason=\"{reason}\"}}")];
    assert_eq!(count("foreign_host"), foreign.len() as f64);
    assert_eq!(count("foreign_origin"), (origins.len() + 3) as f64);
}

/// The ports that a process listens on.
fn listening(process: &Process) -> BTreeSet<u16> {
    let dir = format!("/proc/{}", process.pid());
    let sockets: BTreeSet<String> = fs::read_dir(format!("{dir}/fd"))
        .unwrap()
        .filter_map(|fd| fs::read_link(fd.unwrap().path()).ok())
        .filter_map(|to| Some(to.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let table = fs::read_to_string(format!("{dir}/net/tcp")).unwrap();
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row[3] == "0A" && sockets.contains(row[9]))
        .map(|row| u16::from_str_radix(row[1].split(':').nth(1).unwrap(), 16).unwrap())
        .collect()
}

#[test]
fn without_the_flag_there_is_no_admin_listener() {
    let site = Site::new();
    let (flags, address) = site.single(&FAST);
    let member = site.spawn("member", &flags);
    serves(address);
    let url = flags.iter().find(|flag| flag.starts_with("http://")).unwrap();
    let peer: u16 = url.rsplit(':').next().unwrap().parse().unwrap();
    assert_eq!(listening(&member), BTreeSet::from([peer, address.port()]));
    assert_eq!(ask(address, "GET", "/status", "").0, 404, "it is a key there");

    let (with, _, at) = single(&site, &["--data-dir", "other"]);
    assert!(listening(&with).contains(&at.port()), "the test sees one");
}

#[test]
fn metrics_are_openmetrics_where_the_client_asks_for_them() {
    let site = Site::new();
    let (_member, _, at) = single(&site, &[]);
    let ask = |accept: &str| {
        raw(at, "GET /metrics", &format!("Host: {at}\r\nAccept: text/plain;q=0.2,{accept}\r\n"))
    };
    for other in ["application/openmetrics-text;q=0", "*/*", "application/openmetrics-texts"] {
        let answer = ask(other);
        assert!(
            answer.contains("text/plain; version=0.0.4") && !answer.contains("# EOF"),
            "{other}"
        );
    }
    let answer = ask("Application/OpenMetrics-text; version=1.0.0; q=0.5");
    assert!(answer.contains("application/openmetrics-text; version=1.0.0"), "{answer}");
    assert!(answer.contains("# TYPE raftexample_proposals_committed counter\n"), "{answer}");
    assert!(answer.contains("# EOF\n"), "{answer}");
}

#[test]
fn the_log_level_is_changed_while_a_member_runs() {
    let site = Site::new();
    let (member, address, at) = single(&site, &[]);
    let endpoint = format!("http://{at}");
    let level = |words: &[&str]| {
        let ran = run(site.dir(), &[&["log-level", "--endpoint", &endpoint], words].concat());
        assert_eq!(ran.status, 0, "{}", ran.stderr);
        ran.stdout
    };
    let delete = |key: &str| request(address, "DELETE", key, b"").unwrap();
    assert_eq!(level(&[]), format!("{endpoint} logs info and above\n"));
    assert_eq!(level(&["error"]), format!("{endpoint} logs error and above\n"));
    assert_eq!(level(&[]), format!("{endpoint} logs error and above\n"));
    delete("/unseen");
    level(&["info"]);
    for told in ["log level changed from info to error", "log level changed from error to info"] {
        eventually(PATIENCE, told, || member.stderr().contains(told));
    }
    let both = format!("{endpoint},{endpoint}");
    let ran = run(site.dir(), &["log-level", "--endpoint", &both]);
    assert!(ran.status == 2 && ran.stderr.contains("give one"), "{}", ran.stderr);
    delete("/seen");
    eventually(PATIENCE, "it logs again", || member.stderr().contains("id: seen"));
    assert!(!member.stderr().contains("unseen"), "{}", member.stderr());
    let (status, why) = ask(at, "PUT", "/log-level", "loud");
    assert_eq!((status, &*why), (400, "the body must be one of error, warn, info, debug\n"));
}
