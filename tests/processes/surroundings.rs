//! What surrounds a member, and fails: its log, its environment, its signals, its directory.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Child, Command, Stdio};

use crate::support::processes::{
    BINARY, Client, FAST, PATIENCE, Signal, Site, eventually, eventually_some, files_in,
    kill_child, put, serves,
};

/// Starts the binary with this standard error, and without variables of its own.
fn start(site: &Site, flags: &[String], stderr: Stdio) -> Child {
    let mut command = Command::new(BINARY);
    command.args(flags).current_dir(site.dir()).stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(stderr).spawn().unwrap()
}

fn status(child: &mut Child) -> Option<i32> {
    eventually_some(PATIENCE, "the process ends", || child.try_wait().unwrap()).code()
}

/// Sends a request whose id is not one, which the client port logs.
fn log_line(address: SocketAddr, id: &[u8]) {
    let mut connection = TcpStream::connect(address).unwrap();
    let request = [b"DELETE /", id, b" HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"].concat();
    connection.write_all(&request).unwrap();
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 400"), "{}", String::from_utf8_lossy(&answer));
}

#[test]
fn a_closed_log_costs_a_member_its_lines_only() {
    let site = Site::new();
    let (flags, address) = site.single(&FAST);
    let mut member = start(&site, &flags, Stdio::piped());
    serves(address);
    drop(member.stderr.take());
    (0..5).for_each(|_| log_line(address, b"no-id"));
    put(address, "/k", b"value");
    kill_child(&member, Signal::SIGTERM);
    assert_eq!(status(&mut member), Some(0));
}

#[test]
fn a_full_log_device_changes_no_exit_status() {
    let site = Site::new();
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    let mut wrong = start(&site, &["--id".into(), "0".into()], full());
    assert_eq!(status(&mut wrong), Some(2));
    let (flags, address) = site.single(&FAST);
    let mut member = start(&site, &flags, full());
    serves(address);
    put(address, "/k", b"value");
    kill_child(&member, Signal::SIGTERM);
    assert_eq!(status(&mut member), Some(0));
}

#[test]
fn a_log_that_nobody_reads_holds_up_neither_work_nor_end() {
    let site = Site::new();
    let (flags, address) = site.single(&[&FAST[..], &["--log-level", "debug"]].concat());
    let mut member = start(&site, &flags, Stdio::piped());
    serves(address);
    // More than a pipe holds.
    (0..500).for_each(|n| put(address, &format!("/k{n}"), b"value"));
    (0..500).for_each(|_| log_line(address, &[b'x'; 900]));
    put(address, "/k", b"value");
    kill_child(&member, Signal::SIGTERM);
    assert_eq!(status(&mut member), Some(0));
}

#[test]
fn what_clients_send_is_logged_printable_short_and_seldom() {
    let site = Site::new();
    let (flags, address) = site.single(&FAST);
    let member = site.spawn("member", &flags);
    serves(address);
    log_line(address, &[b'x'; 30_000]);
    log_line(address, "a\u{202e}b\u{9b}c".as_bytes());
    eventually(PATIENCE, "both are logged", || member.stderr().contains("a\\u{202e}b\\u{9b}c"));
    (0..1_000).for_each(|_| log_line(address, b"again"));
    let log = member.stderr();
    assert!(log.lines().all(|line| line.len() <= 1024), "{log:.3000}");
    let lines = log.lines().filter(|line| line.contains("again")).count();
    assert!((50..500).contains(&lines), "{lines} lines");
}

#[test]
fn variables_of_others_do_not_stop_a_member() {
    let site = Site::new();
    let api = site.at(site.port()).to_string();
    let (flags, address) = site.single(&[&FAST[..], &["--api", &api]].concat());
    let mut command = Command::new(BINARY);
    command.args(&flags);
    command.env("RAFTEXAMPLE_PORT", "tcp://10.0.0.1:12380");
    command.env("RAFTEXAMPLE_SERVICE_HOST", "10.0.0.1").env("RAFTEXAMPLE_JOIN", "");
    command.env("RAFTEXAMPLE_DATADIR", "elsewhere");
    let member = site.spawn_command("member", command, false);
    serves(address);
    for warning in ["ignoring RAFTEXAMPLE_PORT, ", "ignoring RAFTEXAMPLE_DATADIR: there is no flag"]
    {
        assert!(member.stderr().contains(warning), "{}", member.stderr());
    }

    let mut get = Command::new(BINARY);
    get.args(["get", "k", "--endpoint", &format!("http://{api}")]);
    get.env("RAFTEXAMPLE_TICK", "fast").env("RAFTEXAMPLE_ENDPOINT", "");
    let shown = get.output().unwrap();
    let stderr = String::from_utf8_lossy(&shown.stderr).into_owned();
    assert!(stderr.contains("does not exist"), "{stderr}");
}

#[test]
fn a_wrong_variable_is_named() {
    let site = Site::new();
    let mut command = Command::new(BINARY);
    command.env("RAFTEXAMPLE_TICK", "fast");
    let mut member = site.spawn_command("bad", command, false);
    assert_eq!(member.wait(PATIENCE), 2);
    let words = member.last_words().join("\n");
    assert!(words.contains("RAFTEXAMPLE_TICK: invalid value 'fast'"), "{words}");
}

#[test]
fn sighup_stops_a_member_in_order_unless_it_is_ignored() {
    let site = Site::new();
    let (flags, address) = site.single(&FAST);
    // The tests themselves may run under nohup.
    let mut plain = Command::new("env");
    plain.args(["--default-signal=HUP", BINARY]).args(&flags);
    let mut member = site.spawn_command("member", plain, false);
    serves(address);
    member.signal(Signal::SIGHUP);
    assert_eq!(member.wait(PATIENCE), 0);
    assert!(member.stderr().contains("received SIGHUP, stopping"), "{}", member.stderr());

    let mut nohup = Command::new("nohup");
    nohup.arg(BINARY).args(&flags);
    let mut member = site.spawn_command("nohup", nohup, false);
    serves(address);
    member.signal(Signal::SIGHUP);
    put(address, "/k", b"value");
    assert_eq!(member.exited(), None);
    member.signal(Signal::SIGTERM);
    assert_eq!(member.wait(PATIENCE), 0);
}

#[test]
fn a_file_that_exceeds_the_limit_is_a_write_error() {
    let site = Site::new();
    let (flags, _) = site.single(&FAST);
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -f 64; exec \"$0\" \"$@\"", BINARY]).args(&flags);
    let mut member = site.spawn_command("member", limited, false);
    assert_eq!(member.wait(PATIENCE), 1);
    let words = member.last_words().join("\n");
    assert!(words.contains("cannot write to") && words.contains("File too large"), "{words}");
}

#[test]
fn files_belong_to_their_owner_and_no_link_is_followed() {
    let site = Site::new();
    let victim = site.dir().join("victim");
    fs::write(&victim, "precious").unwrap();
    for name in ["raftexample-1.tmp", "raftexample-1-snap.tmp"] {
        symlink(&victim, site.dir().join(name)).unwrap();
    }
    let (flags, address) = site.single(
        &[&FAST[..], &["--snapshot-count", "5", "--snapshot-catch-up-entries", "2"]].concat(),
    );
    let member = site.spawn("member", &flags);
    serves(address);
    (0..20).for_each(|n| put(address, &format!("/k{n}"), b"value"));
    eventually(PATIENCE, "a snapshot is made", || member.stderr().contains("compacted log"));
    assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for dir in ["raftexample-1", "raftexample-1-snap"].map(|name| site.dir().join(name)) {
        assert_eq!(mode(&dir), 0o700, "{}", dir.display());
        for file in files_in(&dir) {
            assert_eq!(mode(&file), 0o600, "{}", file.display());
        }
    }
}

#[test]
fn the_ports_that_were_bound_are_logged() {
    let site = Site::new();
    let (mut flags, address) = site.single(&[&FAST[..], &["--admin", "127.0.0.1:0"]].concat());
    let port = flags.iter().position(|flag| *flag == address.port().to_string()).unwrap();
    flags[port] = "0".into();
    let member = site.spawn("member", &flags);
    let bound = eventually_some(PATIENCE, "the port is logged", || {
        let log = member.stderr();
        let (_, line) = log.split_once("serving keys on ")?;
        line.split(',').next()?.parse::<SocketAddr>().ok()
    });
    assert_ne!(bound.port(), 0);
    serves(bound);
    let mut client = Client::new(bound);
    assert_eq!(client.put("/k", b"value").unwrap(), 204);
    for what in [", peers on 127.", ", operators on 127.0.0.1:"] {
        assert!(member.stderr().contains(what), "{}", member.stderr());
    }
}

#[test]
fn a_first_start_logs_fewer_than_fifteen_lines() {
    let site = Site::new();
    let (flags, address) = site.single(&FAST);
    let member = site.spawn("member", &flags);
    serves(address);
    for words in [
        "1 became follower at term 0",
        "newRaft 1 [peers: [], term: 0, commit: 0, applied: 0, lastindex: 0, lastterm: 0]",
        "1 switched to configuration voters=(1)",
        "1 is starting a new election at term 1",
        "1 became candidate at term 2",
        "1 received MsgVoteResp from 1 at term 2",
        "1 became leader at term 2",
    ] {
        // The log is written by a thread of its own.
        eventually(PATIENCE, words, || member.stderr().contains(words));
    }
    let log = member.stderr();
    assert!(log.lines().count() < 15, "{log}");
}
