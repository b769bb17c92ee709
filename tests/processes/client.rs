//! The client commands: their output, refusals and exit statuses.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde_json::Value;

use super::admin::{admin, json, leader, start};
use crate::support::certificates::{Authority, install};
use crate::support::processes::{
    BINARY, Cluster, FAST, PATIENCE, Ran, Site, assert_holds, eventually, eventually_some, owned,
    put, request, run, serves,
};

fn url(address: SocketAddr) -> String {
    format!("http://{address}")
}

/// Runs a command with one endpoint.
fn at(endpoint: &str, command: &[&str]) -> Ran {
    run(Path::new("."), &[command, &["--endpoint", endpoint]].concat())
}

/// Runs a command at the admin port of member `id`.
fn by(cluster: &Cluster, id: u64, command: &[&str]) -> Ran {
    at(&url(admin(cluster, id)), command)
}

/// Asserts success with this output and nothing else.
fn assert_done(ran: &Ran, said: &str) {
    assert_eq!((ran.status, &*ran.stderr), (0, ""), "{}", ran.stdout);
    assert_eq!(ran.stdout, said);
}

/// Asserts failure with one line that contains these parts.
fn assert_failed(ran: &Ran, status: i32, parts: &[&str]) {
    assert_eq!((ran.status, ran.stderr.lines().count()), (status, 1), "{}", ran.stderr);
    assert!(ran.stderr.starts_with("raftexample: "), "{}", ran.stderr);
    for part in parts {
        assert!(ran.stderr.contains(part), "{part}: {}", ran.stderr);
    }
}

/// An endpoint where no process listens.
fn nobody(site: &Site) -> String {
    url(site.at(site.port()))
}

/// The requests that a made-up member got.
type Heard = std::sync::Arc<Mutex<Vec<String>>>;

/// Answers each connection's request with `answer` and keeps the requests.
fn answering(site: &Site, answer: &'static str) -> (String, Heard) {
    answering_by(site, move |_| answer)
}

/// As [`answering`], by the request.
fn answering_by(
    site: &Site,
    answer: impl Fn(&str) -> &'static str + Send + 'static,
) -> (String, Heard) {
    let listener = TcpListener::bind((site.address, 0)).unwrap();
    let endpoint = url(listener.local_addr().unwrap());
    let heard = std::sync::Arc::new(Mutex::new(Vec::new()));
    let hears = heard.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut head = vec![0; 4096];
            let length = stream.read(&mut head).unwrap();
            let request = String::from_utf8_lossy(&head[..length]).into_owned();
            let answer = answer(&request);
            // Before the answer: who has read that may look at once.
            hears.lock().unwrap().push(request);
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    (endpoint, heard)
}

#[test]
fn status_shows_every_member_who_was_asked_and_who_is_dead() {
    let mut cluster = start(3, &[]);
    put(cluster.address(1), "/k", b"v");
    let first = leader(&cluster);
    let rows = |ran: &Ran| -> Vec<Vec<String>> {
        let cells = |line: &str| line.split_whitespace().map(str::to_owned).collect();
        ran.stdout.lines().map(cells).collect()
    };
    let ran = eventually_some(PATIENCE, "all members answered", || {
        let ran = by(&cluster, 2, &["status"]);
        (ran.status == 0 && !ran.stdout.contains("dead")).then_some(ran)
    });
    let table = rows(&ran);
    let head = "ID URL ROLE TERM COMMIT APPLIED SNAPSHOT KEYS WAL UPTIME VERSION";
    assert_eq!(table[0].join(" "), head);
    for id in 1..=3 {
        let row = &table[id as usize];
        let mark = if id == 2 { "2*".to_owned() } else { id.to_string() };
        assert_eq!(row[..2], [mark, cluster.member(id).url.clone()]);
        assert_eq!(row[2], if id == first { "leader" } else { "follower" });
        assert_eq!(row.last().unwrap(), env!("CARGO_PKG_VERSION"));
    }
    assert_eq!(
        ran.stdout.lines().last().unwrap(),
        format!("* this member answered, at {}", url(admin(&cluster, 2)))
    );

    let ran = by(&cluster, 2, &["status", "--json"]);
    let said: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((ran.status, &said["seen_by"]), (0, &Value::from(2)));

    cluster.kill(3);
    eventually(PATIENCE, "its row says that it is dead", || {
        let ran = by(&cluster, 1, &["status"]);
        ran.status == 0 && rows(&ran)[3][2] == "dead"
    });
    // The table needs no leader.
    cluster.kill(2);
    let ran = eventually_some(PATIENCE, "it knows no leader", || {
        Some(by(&cluster, 1, &["status"])).filter(|ran| ran.status == 1)
    });
    assert_eq!(rows(&ran)[2][2], "dead");
    assert_failed(&ran, 1, &["knows a leader", "start the dead members"]);
    let ran = by(&cluster, 1, &["status", "--json"]);
    assert!(serde_json::from_str::<Value>(&ran.stdout).is_ok(), "{}", ran.stdout);
    assert_eq!(ran.status, 1);
}

#[test]
fn endpoints_are_asked_in_turn_from_flags_or_the_environment() {
    let cluster = start(1, &[]);
    let (there, nobody) = (url(admin(&cluster, 1)), nobody(&cluster.site));
    for endpoints in [
        vec!["--endpoint", &*nobody, "--endpoint", &there],
        vec!["--endpoint", &*format!("{nobody},{there}/")],
    ] {
        let ran = run(Path::new("."), &[&["member", "list"], &endpoints[..]].concat());
        assert_eq!(ran.status, 0, "{}", ran.stderr);
        assert!(ran.stdout.contains(&cluster.member(1).url), "{}", ran.stdout);
    }
    let of_client = url(cluster.address(1));
    for (name, endpoint, command) in [
        ("RAFTEXAMPLE_ENDPOINT", &there, &["status"][..]),
        ("RAFTEXAMPLE_API_ENDPOINT", &there, &["put", "k", "v"]),
    ] {
        let ran = Command::new(BINARY).args(command).env(name, endpoint).output().unwrap();
        assert!(ran.status.success(), "{name}");
    }
    for command in [&["status"][..], &["member", "list"], &["snapshot", "save", "never"]] {
        let ran = at(&nobody, command);
        assert_failed(
            &ran,
            1,
            &[&nobody, "Connection refused", "is the member running, with --admin"],
        );
    }
    let ran = at(&nobody, &["put", "k", "v"]);
    assert_failed(&ran, 1, &[&nobody, "is the member running, with --api"]);
    let ran = at(&format!("{nobody},{nobody}/x"), &["status"]);
    assert_failed(&ran, 2, &["http://HOST:PORT"]);
    // The member's other port.
    assert_failed(&at(&of_client, &["status"]), 1, &["404", "another port", "--admin"]);
    assert_failed(&at(&of_client, &["get", "k"]), 1, &["404", "another port", "--api"]);
    assert_failed(&at(&of_client, &["put", "k", "v"]), 1, &["400", "another port", "--api"]);
    assert_failed(&at(&of_client, &["member", "move", "1", &nobody]), 1, &["404", "--admin"]);
    assert_eq!(request(cluster.address(1), "GET", "/members/1", b"").unwrap().status, 404);
}

#[test]
fn an_endpoint_that_is_silent_is_given_up_at_the_deadline() {
    let mut cluster = start(2, &[]);
    cluster.process(1).pause();
    let (silent, there) = (url(admin(&cluster, 1)), url(admin(&cluster, 2)));
    let short = ["--timeout", "200ms"];
    let ran = at(&silent, &[&["member", "list"], &short[..]].concat());
    assert_failed(&ran, 1, &[&silent, "did not answer within 200ms", "--timeout"]);
    // A read may be repeated at another endpoint.
    let ran = at(&format!("{silent},{there}"), &[&["member", "list"], &short[..]].concat());
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    let put = [&["put", "k", "v"], &short[..]].concat();
    assert_failed(&at(&silent, &put), 1, &["did not answer within 200ms"]);
    let with_token = [&put[..], &["--token", "t"]].concat();
    assert_failed(
        &at(&silent, &with_token),
        1,
        &["PUT /v1/kv/k: no outcome within 1s 200ms", "repeat it with --token t"],
    );
}

const NO_CONTENT: &str = "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n";
const TOKEN: &str =
    "HTTP/1.1 201 Created\r\nContent-Length: 13\r\nConnection: close\r\n\r\n{\"token\":\"t\"}";

fn is_for_a_token(request: &str) -> bool {
    request.starts_with("POST /v1/retry-token ")
}

/// What each answer of the first endpoint means for the second.
#[test]
fn a_write_is_sent_with_its_token_until_it_has_an_outcome() {
    let site = Site::new();
    let issuing = |answer: &'static str| {
        answering_by(&site, move |request| if is_for_a_token(request) { TOKEN } else { answer })
    };
    let busy = "HTTP/1.1 503 x\r\nContent-Length: 5\r\nConnection: close\r\n\r\nbusy\n";
    let late = "HTTP/1.1 504 x\r\nContent-Length: 5\r\nConnection: close\r\n\r\nlate\n";
    for first in [busy, late, "", "HTTP/1.1 2"] {
        let (first, asked) = issuing(first);
        let (second, heard) = issuing(NO_CONTENT);
        assert_done(&at(&format!("{first},{second}"), &["put", "k", "v"]), "OK\n");
        for heard in [&asked.lock().unwrap()[1], &heard.lock().unwrap()[0]] {
            assert!(heard.starts_with("PUT /v1/kv/k "), "{heard}");
            assert!(heard.contains("\r\nidempotency-key: t\r\n"), "{heard}");
        }
    }
    // Nothing was done anywhere, and all endpoints are named.
    let (first, _) = issuing(busy);
    let ran = at(&format!("{first},{}", nobody(&site)), &["delete", "k"]);
    assert_failed(&ran, 1, &["503: busy", "Connection refused"]);
    // A refusal is an outcome.
    let refuse = "HTTP/1.1 412 x\r\nContent-Length: 10\r\nConnection: close\r\n\r\ncondition\n";
    let (first, _) = issuing(refuse);
    let (second, heard) = issuing(NO_CONTENT);
    let ran = at(&format!("{first},{second}"), &["put", "k", "v", "--if-absent"]);
    assert_failed(&ran, 1, &["412: condition"]);
    assert_eq!(heard.lock().unwrap().len(), 0);
    // A token of an earlier attempt is used again.
    let ran = at(&second, &["put", "k", "v", "--token", "earlier"]);
    assert_done(&ran, "OK\n");
    assert!(heard.lock().unwrap()[0].contains("\r\nidempotency-key: earlier\r\n"));
}

/// It takes no token, because a member does not remember values.
#[test]
fn a_transaction_that_reads_and_may_have_happened_goes_nowhere_else() {
    let site = Site::new();
    let file = site.dir().join("txn.json");
    fs::write(&file, r#"{"then": [{"get": "/a"}, {"put": "/b", "value": ""}]}"#).unwrap();
    let txn = ["txn", file.to_str().unwrap()];
    let (second, heard) = answering(&site, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}");
    let unknown = ["POST /v1/txn", "outcome unknown", "read before repeating", "raftexample get"];
    for first in ["", "HTTP/1.1 2"] {
        let (first, _) = answering(&site, first);
        assert_failed(&at(&format!("{first},{second}"), &txn), 1, &unknown);
    }
    assert_eq!(heard.lock().unwrap().len(), 0);
    // A read continues where such a write does not.
    let (lost, _) = answering(&site, "");
    let (other, _) =
        answering(&site, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nvalue");
    assert_done(&at(&format!("{lost},{other}"), &["get", "k"]), "value");
}

#[test]
fn keys_are_listed_deleted_compared_and_watched() {
    let mut cluster = start(1, &[]);
    let endpoint = url(admin(&cluster, 1));
    let mut watch = Command::new(BINARY)
        .args(["watch", "--prefix", "/app/", "--endpoint", &endpoint])
        .args(["--from", "0"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut watched = std::io::BufReader::new(watch.stdout.take().unwrap());
    let mut next = || {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut watched, &mut line).unwrap();
        line.split(' ').take(2).collect::<Vec<_>>().join(" ").trim().to_owned()
    };
    let run = |command: &[&str]| at(&endpoint, command);
    for key in ["/app/a", "/app/b", "/other"] {
        assert_done(&run(&["put", key, "hello", "--if-absent"]), "OK\n");
    }
    assert_eq!([next(), next()], ["put /app/a", "put /app/b"]);
    assert_failed(&run(&["put", "/app/a", "x", "--if-absent"]), 1, &["412", "does not hold"]);
    let etag = run(&["get", "--etag", "/app/a"]).stdout.trim().to_owned();
    let listed = run(&["list", "--prefix", "/app/"]);
    let lines: Vec<&str> = listed.stdout.lines().collect();
    assert_eq!(lines.len(), 2, "{}", listed.stdout);
    assert_eq!(lines[0], format!("/app/a 5 bytes {}", etag.trim_matches('"')));
    let json = run(&["list", "--json"]).stdout;
    let first: Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    assert_eq!((&first["key"], &first["value"]), (&"/app/a".into(), &"aGVsbG8=".into()));
    assert_done(&run(&["put", "/app/a", "hello", "--if-match", &etag]), "OK\n");
    assert_eq!(next(), "put /app/a");
    assert_failed(&run(&["delete", "/app/a", "--if-match", &etag]), 1, &["412"]);
    // A member that starts again has its history from its log, and the watch goes on.
    cluster.kill(1);
    cluster.start_again(1);
    serves(cluster.address(1));
    assert_done(&run(&["delete", "/app/a"]), "OK\n");
    assert_eq!(next(), "delete /app/a");
    assert_failed(&run(&["delete", "/app/a"]), 1, &["/app/a does not exist"]);
    watch.kill().unwrap();
    watch.wait().unwrap();
    let file = cluster.site.dir().join("txn.json");
    fs::write(&file, r#"{"then": [{"put": "/app/c", "value": "aGk="}]}"#).unwrap();
    let ran = run(&["txn", file.to_str().unwrap()]);
    assert!(ran.stdout.contains("\"created\":true"), "{}", ran.stderr);
    assert_done(&run(&["get", "/app/c"]), "hi");
}

/// The first line that `raftexample` prints with `arguments`, which runs until it is stopped.
fn first_line_of(arguments: &[&str]) -> String {
    let mut running = Command::new(BINARY)
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (line_tx, line_rx) = std::sync::mpsc::channel();
    let mut out = std::io::BufReader::new(running.stdout.take().unwrap());
    thread::spawn(move || {
        let mut line = String::new();
        let _ = std::io::BufRead::read_line(&mut out, &mut line);
        let _ = line_tx.send(line);
    });
    let line = line_rx.recv_timeout(PATIENCE);
    let _ = running.kill();
    let _ = running.wait();
    line.unwrap_or_default()
}

/// A member without a leader accepts a watch, shows nothing, and ends it.
#[test]
fn a_watch_that_ended_goes_on_at_the_next_endpoint() {
    let site = Site::new();
    let (first, _) =
        answering(&site, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nid: 00000000000000ab-7\n\n");
    // Its member elects a leader meanwhile.
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let (second, heard) = answering_by(&site, move |_| {
        match asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
            0 => "HTTP/1.1 503 x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            _ => {
                "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nid: 00000000000000ab-8.0\nevent: put\n\
                 data: {\"key\":\"/k\",\"etag\":\"e\",\"bytes\":1}\n\n"
            }
        }
    });
    let line = first_line_of(&["watch", "--endpoint", &format!("{first},{second}")]);
    assert_eq!(line, "put /k 1 bytes e\n");
    assert!(heard.lock().unwrap()[0].contains("\r\nlast-event-id: 00000000000000ab-7\r\n"));
    // Alone, it is asked again.
    let line = first_line_of(&["watch", "--from", "7", "--endpoint", &second]);
    assert_eq!(line, "put /k 1 bytes e\n");
}

#[test]
fn a_size_that_is_no_number_controls_no_terminal() {
    let site = Site::new();
    let (member, _) = answering(
        &site,
        "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n\
         {\"keys\":[{\"key\":\"/k\",\"etag\":\"e\",\"bytes\":\"\u{9b}2J\u{7f}\"}],\"next\":null}",
    );
    assert_done(&at(&member, &["list"]), "/k \\u{9b}2J\\u{7f} bytes e\n");
    let (member, _) = answering(
        &site,
        "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nid: 1\nevent: put\n\
         data: {\"key\":\"/k\",\"etag\":\"e\",\"bytes\":\"\u{9b}2J\u{7f}\"}\n\n",
    );
    let line = first_line_of(&["watch", "--endpoint", &member]);
    assert_eq!(line, "put /k \\u{9b}2J\\u{7f} bytes e\n");
}

#[test]
fn put_and_get_take_keys_and_values_byte_for_byte() {
    let cluster = start(1, &[]);
    let endpoint = url(admin(&cluster, 1));
    for (key, sent, value) in [
        ("k", "/k", "value"),
        ("/k", "/k", ""),
        ("/a%20b?c=d", "/a%20b?c=d", "with\na newline\n"),
        ("//x", "//x", "ä"),
    ] {
        assert_done(&at(&endpoint, &["put", key, value]), "OK\n");
        let answer = request(cluster.address(1), "GET", sent, b"").unwrap();
        assert_eq!((answer.status, &*answer.body), (200, value.as_bytes()), "{key}");
        assert_done(&at(&endpoint, &["get", key]), value);
        assert_done(&at(&endpoint, &["get", "--local", key]), value);
    }
    let bytes: Vec<u8> = (0..=255).collect();
    let mut put = Command::new(BINARY)
        .args(["put", "bytes", "-", "--endpoint", &endpoint])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    put.stdin.take().unwrap().write_all(&bytes).unwrap();
    assert!(put.wait().unwrap().success());
    let got =
        Command::new(BINARY).args(["get", "bytes", "--endpoint", &endpoint]).output().unwrap();
    assert_eq!(got.stdout, bytes);
    let ran = run(Path::new("."), &["put", "--endpoint", &endpoint, "--", "dash", "-v"]);
    assert_done(&ran, "OK\n");
    assert_done(&at(&endpoint, &["get", "dash"]), "-v");

    assert_failed(&at(&endpoint, &["get", "none"]), 1, &["/none does not exist"]);
    for (key, advice) in [("a b", "/a%20b"), ("a#b", "/a%23b"), ("/a/../b", "/b")] {
        assert_failed(&at(&endpoint, &["put", key, "v"]), 2, &["cannot be sent as it is", advice]);
        assert_failed(&at(&endpoint, &["get", key]), 2, &["cannot be sent as it is", advice]);
    }
}

#[test]
fn local_reads_need_no_majority_and_others_report_none() {
    let mut cluster = start(3, &["--request-timeout", "300ms"]);
    let endpoint = url(admin(&cluster, 1));
    put(cluster.address(1), "/k", b"v");
    cluster.kill(2);
    cluster.kill(3);
    eventually(PATIENCE, "it knows no leader", || by(&cluster, 1, &["status"]).status == 1);
    assert_done(&at(&endpoint, &["get", "--local", "k"]), "v");
    assert_failed(&at(&endpoint, &["get", "k"]), 1, &["503", "nothing was changed"]);
    assert_failed(&at(&endpoint, &["put", "k", "w"]), 1, &["503", "nothing was changed"]);
    let ran = by(&cluster, 1, &["member", "add", "4", &cluster.site.url()]);
    assert_failed(&ran, 1, &["503"]);
}

#[test]
fn a_member_is_added_started_as_it_says_moved_and_removed() {
    let mut cluster = start(3, &[]);
    put(cluster.address(1), "/k", b"v");
    let (new, moved) = (cluster.new_url(4), cluster.site.url());
    let ran = by(&cluster, 1, &["member", "add", "4", &new]);
    assert_eq!((ran.status, &*ran.stderr), (0, ""), "{}", ran.stdout);
    let lines: Vec<&str> = ran.stdout.lines().collect();
    assert_eq!(lines[0], "added member 4 as a learner");
    assert!(lines[1].contains("it gets a vote when it has caught up"), "{}", lines[1]);
    // Another member learns of it a little later.
    let becomes = |id: u64, wanted: Option<String>| {
        eventually(PATIENCE, &format!("member {id} is {wanted:?}"), || {
            let ran = by(&cluster, 2, &["member", "list"]);
            let line = ran.stdout.lines().find(|line| line.starts_with(&id.to_string()));
            let words = line.map(|line| line.split_whitespace().skip(1).collect::<Vec<_>>());
            words.map(|words| words.join(" ")) == wanted
        });
    };
    becomes(4, Some(format!("{new} learner")));
    becomes(1, Some(format!("{} voter", cluster.member(1).url)));

    let address = cluster.site.at(cluster.site.port());
    let line = lines[2].trim().replace("PORT", &address.port().to_string());
    let mut words: Vec<String> = line.split(' ').skip(1).map(str::to_owned).collect();
    words.extend(owned(&["--host", &address.ip().to_string()]));
    words.extend(owned(&FAST));
    let mut member = cluster.site.spawn("member-4", &words);
    serves(address);
    becomes(4, Some(format!("{new} voter")));
    let list = by(&cluster, 2, &["member", "list", "--json"]);
    let list: Value = serde_json::from_str(&list.stdout).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 4);

    let ran = by(&cluster, 1, &["member", "move", "4", &moved]);
    let said = format!(
        "moved member 4 from {new} to {moved}: stop it if it still runs, and start it there with --peer-url {moved}\n"
    );
    assert_done(&ran, &said);
    becomes(4, Some(format!("{moved} voter")));
    member.kill();
    let at_url = words.iter().position(|word| word == "--peer-url").unwrap() + 1;
    words[at_url] = moved;
    member = cluster.site.spawn("member-4", &words);
    serves(address);

    let said = "removed member 4: it stops by itself, and its id cannot be used again\n";
    assert_done(&by(&cluster, 1, &["member", "remove", "4"]), said);
    assert_eq!(member.wait(PATIENCE), 0);
    becomes(4, None);

    for (command, parts) in [
        (&["remove", "4"][..], &["4 is not a member", "members 1, 2, 3", "member list"][..]),
        (&["move", "4", &new], &["4 is not a member"]),
        (&["add", "4", &new], &["410", "4 was removed", "under a new id"]),
        (&["add", "3", &new], &["409", "is a member already"]),
        (&["add", "5", "nonsense"], &["400", "nonsense"]),
    ] {
        assert_failed(&by(&cluster, 1, &[&["member"], command].concat()), 1, parts);
    }
    let only = start(1, &[]);
    assert_failed(&by(&only, 1, &["member", "remove", "1"]), 1, &["409", "is the last member"]);
}

#[test]
fn leadership_is_transferred_to_one_or_to_any() {
    let mut cluster = start(3, &[]);
    let first = leader(&cluster);
    let next = first % 3 + 1;
    let ran = by(&cluster, first, &["member", "transfer", &next.to_string()]);
    assert_done(&ran, &format!("member {next} leads\n"));
    assert_eq!(leader(&cluster), next);
    let ran = by(&cluster, first, &["member", "transfer"]);
    let now = leader(&cluster);
    assert_ne!(now, next);
    assert_done(&ran, &format!("member {now} leads\n"));
    assert_failed(
        &by(&cluster, first, &["member", "transfer", "9"]),
        1,
        &["409", "9 is no member"],
    );
    assert_failed(&by(&cluster, first, &["member", "transfer", "0"]), 2, &["0"]);
    let dead = cluster.ids().into_iter().find(|id| ![now, first].contains(id)).unwrap_or(next);
    let at = if dead == first { now } else { first };
    cluster.kill(dead);
    let ran = eventually_some(PATIENCE, "the leader misses it", || {
        Some(by(&cluster, at, &["member", "transfer", &dead.to_string()]))
            .filter(|ran| ran.stderr.contains("409"))
    });
    assert_failed(&ran, 1, &["409", "cannot take over"]);
    assert_eq!(json(admin(&cluster, at), "/status")["leader"], now);
}

#[test]
fn a_backup_under_writes_has_every_earlier_acknowledged_one() {
    const KEYS: usize = 200;
    let old = start(3, &[]);
    let stop = AtomicBool::new(false);
    let acknowledged = Mutex::new(Vec::new());
    let mut saved = Vec::new();
    thread::scope(|scope| {
        for writer in 0..4 {
            let (old, stop, acknowledged) = (&old, &stop, &acknowledged);
            scope.spawn(move || {
                for number in 0.. {
                    let key = format!("/{writer}-{number}");
                    put(old.address(writer % 3 + 1), &key, key.as_bytes());
                    acknowledged.lock().unwrap().push(key);
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
        }
        eventually(PATIENCE, "they write", || acknowledged.lock().unwrap().len() >= KEYS);
        saved.clone_from(&acknowledged.lock().unwrap());
        let ran = run(
            old.site.dir(),
            &["snapshot", "save", "backup.snap", "--endpoint", &url(admin(&old, 2))],
        );
        stop.store(true, Ordering::Relaxed);
        assert_eq!((ran.status, &*ran.stderr), (0, ""), "{}", ran.stdout);
        let said = format!("saved backup.snap from {}: index ", url(admin(&old, 2)));
        assert!(ran.stdout.starts_with(&said), "{}", ran.stdout);
    });
    let file = old.site.dir().join("backup.snap");
    let shown = run(old.site.dir(), &["inspect", "--json", "backup.snap"]);
    assert_eq!(shown.status, 0, "{}{}", shown.stdout, shown.stderr);

    let site = Site::new();
    let place = site.place(site.url());
    let restore = ["snapshot", "restore", file.to_str().unwrap(), "--peer-url", &place.url];
    let ran = run(site.dir(), &restore);
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    let mut restored = Cluster::start_at(site, vec![place], &FAST);
    restored.join(1, 2);
    assert!(saved.len() >= KEYS);
    assert_holds(&restored.addresses(), &saved);
}

#[test]
fn a_backup_replaces_no_file_and_a_broken_one_leaves_none() {
    let cluster = start(1, &[]);
    put(cluster.address(1), "/k", b"v");
    let site = Site::new();
    let save = |endpoint: &str, more: &[&str]| {
        let flags = ["snapshot", "save", "backup", "--endpoint", endpoint];
        run(site.dir(), &[&flags[..], more].concat())
    };
    let names = || -> BTreeSet<String> {
        let entries = fs::read_dir(site.dir()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    let there = url(admin(&cluster, 1));
    let truth = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\nno backup";
    let (liar, _) = answering(&site, truth);
    assert_failed(&save(&liar, &[]), 1, &["is damaged at offset", "save it again"]);
    let (short, _) = answering(&site, "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nraftsnap");
    assert_failed(&save(&short, &[]), 1, &[&short, "broke off"]);
    assert_eq!(names(), BTreeSet::new(), "nothing is left");

    // The next endpoint supplies what one cannot.
    let ran = save(&format!("{short},{there}"), &[]);
    assert_eq!(ran.status, 0, "{}", ran.stderr);
    assert!(ran.stdout.contains(" 1 keys, "), "{}", ran.stdout);
    let before = fs::read(site.dir().join("backup")).unwrap();
    assert!(ran.stdout.ends_with(&format!(" {} bytes\n", before.len())), "{}", ran.stdout);
    put(cluster.address(1), "/another", b"v");
    assert_failed(&save(&there, &[]), 1, &["backup exists", "--force"]);
    assert_eq!(fs::read(site.dir().join("backup")).unwrap(), before);
    assert_failed(&save(&liar, &["--force"]), 1, &["is damaged"]);
    assert_eq!(fs::read(site.dir().join("backup")).unwrap(), before);
    let ran = save(&there, &["--force", "--local"]);
    assert!(ran.stdout.contains(" 2 keys, "), "{}{}", ran.stdout, ran.stderr);
    assert_eq!(names(), BTreeSet::from(["backup".to_owned()]));
    let ran = at(&there, &["snapshot", "save", site.dir().to_str().unwrap(), "--force"]);
    assert_failed(&ran, 2, &["is a directory"]);
    let ran = at(&there, &["snapshot", "save", "/nowhere/backup"]);
    assert_failed(&ran, 1, &["/nowhere", "No such file"]);
}

#[test]
fn commands_speak_tls_with_the_certificates_that_they_are_given() {
    let (members, clients) = (Authority::new("the members'"), Authority::new("the clients'"));
    let site = Site::new();
    let dir = site.dir();
    install(dir, "server", &members.issue(&[&site.address.to_string()]), &clients.pem());
    install(dir, "alice", &clients.issue(&["alice"]), &members.pem());
    install(dir, "mallory", &members.issue(&["mallory"]), &clients.pem());
    let (admin, api) = (site.at(site.port()).to_string(), site.at(site.port()).to_string());
    let flags = ["--cert", "server.pem", "--key", "server.key", "--client-ca", "server.ca"];
    let flags = [&flags[..], &FAST, &["--admin", &admin, "--api", &api]].concat();
    let _member = site.spawn("member", &site.single(&flags).0);
    let (admin, keys) = (format!("https://{admin}"), format!("https://{api}"));
    let alice = ["--ca", "alice.ca", "--cert", "alice.pem", "--key", "alice.key"];
    let go = |command: &[&str], endpoint: &str, more: &[&str]| {
        run(dir, &[command, &["--endpoint", endpoint], more].concat())
    };
    eventually(PATIENCE, "it serves", || go(&["put", "k", "v"], &keys, &alice).status == 0);
    assert_done(&go(&["get", "k"], &keys, &alice), "v");
    assert_eq!(go(&["status"], &admin, &alice).status, 0);
    assert_eq!(go(&["snapshot", "save", "backup"], &admin, &alice).status, 0);

    for (command, endpoint) in [(&["status"][..], &admin), (&["put", "k", "w"], &keys)] {
        assert_failed(&go(command, endpoint, &[]), 2, &[endpoint, "give --ca"]);
        let no_certificate = &alice[..2];
        assert_failed(
            &go(command, endpoint, no_certificate),
            1,
            &[endpoint, "give --cert and --key"],
        );
        let foreign = ["--ca", "alice.ca", "--cert", "mallory.pem", "--key", "mallory.key"];
        assert_failed(&go(command, endpoint, &foreign), 1, &[endpoint, "--client-ca"]);
        let other_ca = ["--ca", "mallory.ca", "--cert", "alice.pem", "--key", "alice.key"];
        assert_failed(&go(command, endpoint, &other_ca), 1, &[endpoint, "UnknownIssuer", "--ca"]);
        let plain = endpoint.replace("https://", "http://");
        assert_failed(&go(command, &plain, &[]), 1, &[&plain, "write https:// and give --ca"]);
    }
    assert_done(&go(&["get", "k"], &keys, &alice), "v");
    for (more, named) in [
        (
            ["--ca", "none.pem", "--cert", "alice.pem", "--key", "alice.key"],
            "cannot use --ca none.pem",
        ),
        (["--ca", "alice.ca", "--cert", "alice.key", "--key", "alice.key"], "cannot use --cert"),
        (["--ca", "alice.ca", "--cert", "alice.pem", "--key", "server.key"], "cannot use --key"),
        (["--ca", "alice.ca", "--cert", "alice.pem", "--timeout", "1s"], "--key"),
    ] {
        assert_failed(&go(&["status"], &admin, &more), 2, &[named]);
    }
}
