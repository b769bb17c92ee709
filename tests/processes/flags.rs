//! Unusable flags give one line and an exit status; usable ones need no further setup.

use std::fs;
use std::net::TcpListener;
use std::process::Command;
use std::time::Duration;

use crate::support::processes::{
    BINARY, FAST, PATIENCE, Process, Signal, Site, eventually, get, owned, put, serves,
};

/// A bad flag is reported without waiting for anything.
const AT_ONCE: Duration = Duration::from_secs(10);

/// Waits for a process that must not start; its one line contains `named`.
pub fn refused(mut process: Process, status: i32, named: &str) {
    let exited = process.wait(AT_ONCE);
    let stderr = process.stderr();
    assert_eq!(exited, status, "{stderr}");
    let words = process.last_words();
    assert_eq!(words.len(), 1, "one line: {stderr}");
    assert!(words[0].contains(named), "{named:?} is not in {:?}", words[0]);
    assert_eq!(stderr.lines().last(), Some(&*words[0]), "it is the last line");
    if status == 2 {
        assert_eq!(stderr.lines().count(), 1, "nothing but the line: {stderr}");
    }
}

#[test]
fn a_bad_flag_gives_one_line_and_exit_status_2() {
    let site = Site::new();
    let (url, other) = (site.url(), site.url());
    for (flags, named) in [
        ("--id 2".to_owned(), "--id 2 has no peer URL"),
        (format!("--id 3 --cluster {url},{other}"), "--id 3 has no peer URL"),
        ("--id 0".into(), "--id must be at least 1"),
        ("--id one".into(), "--id"),
        ("--id=-1".into(), "--id"),
        ("--id -1".into(), "unexpected argument"),
        ("--cluster nonsense".into(), "no peer URL"),
        ("--cluster ftp://127.0.0.1:1".into(), "http://"),
        ("--cluster https://127.0.0.1:1".into(), "--peer-cert, --peer-key and --peer-ca"),
        ("--cert cert.pem".into(), "--cert and --key"),
        ("--client-ca ca.pem".into(), "--client-ca requires"),
        ("--cluster http://".into(), "no peer URL"),
        ("--cluster http://127.0.0.1".into(), "names no port"),
        ("--cluster http://127.0.0.1:99999".into(), "no peer URL"),
        ("--cluster http://127.0.0.1:1/raft".into(), "after the port"),
        ("--cluster http://127.0.0.1:1,,".into(), "item 2 is empty"),
        ("--cluster http://256.0.0.1:1".into(), "no IP address"),
        ("--clsuter http://127.0.0.1:1".into(), "'--cluster'"),
        ("stauts".into(), "'status'"),
        ("--endpoints http://127.0.0.1:1".into(), "get --endpoint"),
        ("get --endpoints http://127.0.0.1:1 key".into(), "'--endpoint'"),
        ("--cluster http://127.0.0.1:1 http://127.0.0.1:2".into(), "by commas"),
        (format!("--cluster {url},{url}"), "twice"),
        (format!("--cluster {url},"), "item 2 is empty"),
        ("--cluster http://no-such-host.invalid:1".into(), "cannot listen at"),
        ("--cluster http://192.0.2.1:1 --host 127.0.0.1".into(), "(--cluster)"),
        (format!("--cluster {url} --host 192.0.2.1"), "(--port)"),
        ("--host nonsense".into(), "--host"),
        ("--port 99999".into(), "--port"),
        ("--join".into(), "--join requires"),
        (format!("--join --cluster {url}"), "--join requires"),
        ("--nonsense".into(), "--nonsense"),
        ("stray".into(), "stray"),
        ("--tick fast".into(), "--tick"),
        ("--tick 0s".into(), "--tick"),
        ("--request-timeout 5".into(), "--request-timeout"),
        ("--request-timeout 0s".into(), "--request-timeout"),
        ("--election-ticks 1".into(), "--election-ticks"),
        ("--snapshot-count 0".into(), "--snapshot-count"),
        ("--max-value-bytes 0".into(), "--max-value-bytes"),
        ("--cluster-id 1".into(), "--cluster-id"),
        ("--ack maybe".into(), "[possible values: committed, proposed]"),
        ("--read dirty".into(), "--read"),
        ("--log-level loud".into(), "--log-level"),
        ("--log-format xml".into(), "--log-format"),
        ("--id".into(), "--id"),
        ("--id 1 --id 2".into(), "--id"),
    ] {
        let flags: Vec<&str> = flags.split_whitespace().collect();
        println!("{flags:?}");
        refused(site.spawn("refused", &owned(&flags)), 2, named);
    }
}

#[test]
fn a_port_in_use_gives_one_line_and_exit_status_2() {
    let site = Site::new();
    let taken = TcpListener::bind((site.address, 0)).unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let host = site.address.to_string();
    let taken_url = format!("http://{host}:{port}");
    let flags = owned(&["--cluster", &taken_url, "--host", &host]);
    refused(site.spawn("peer", &flags), 2, &port);
    let flags = owned(&["--cluster", &site.url(), "--host", &host, "--port", &port]);
    refused(site.spawn("client", &flags), 2, &port);
    assert!(!site.dir().join("raftexample-1").exists(), "nothing was made yet");
}

#[test]
fn a_directory_that_cannot_be_used_is_named_with_the_reason() {
    let site = Site::new();
    fs::write(site.dir().join("file"), "").unwrap();
    for data_dir in ["file", "file/below", "/proc", "/proc/1/nothing"] {
        let (flags, _) = site.single(&["--data-dir", data_dir]);
        refused(site.spawn("refused", &flags), 1, &format!("{data_dir}/raftexample-1"));
    }
    // A file has the name of the snapshot directory.
    fs::write(site.dir().join("raftexample-1-snap"), "").unwrap();
    let (flags, _) = site.single(&[]);
    refused(site.spawn("refused", &flags), 1, "raftexample-1-snap");
}

#[test]
fn a_directory_in_use_or_of_another_member_is_refused() {
    let site = Site::new();
    let (flags, address) = site.single(&FAST);
    let url = flags[3].clone();
    let mut member = site.spawn("member", &flags);
    put(address, "/k", b"value");

    let (second, _) = site.single(&[]);
    refused(site.spawn("locked", &second), 1, "is in use by another process");
    assert_eq!(get(address, "/k").as_deref(), Some(&b"value"[..]), "the first is not disturbed");
    member.signal(Signal::SIGTERM);
    assert_eq!(member.wait(PATIENCE), 0);

    let (other_list, _) = site.single(&[]);
    refused(site.spawn("list", &other_list), 1, "another --cluster list");

    let rename = |from: u64, to: u64| {
        for suffix in ["", "-snap"] {
            let path = |id| site.dir().join(format!("raftexample-{id}{suffix}"));
            fs::rename(path(from), path(to)).unwrap();
        }
    };
    rename(1, 2);
    let both = format!("{url},{}", site.url());
    let second = owned(&["--id", "2", "--cluster", &both, "--port", &site.port().to_string()]);
    refused(site.spawn("id", &second), 1, "belongs to member 1, not to --id 2");

    // The refusal changed nothing.
    rename(2, 1);
    let _member = site.spawn("member", &flags);
    assert_eq!(get(address, "/k").as_deref(), Some(&b"value"[..]));
}

#[test]
fn help_and_version_are_printed_and_exit_0() {
    // A release has its commit behind that, if it is known.
    let version = concat!("raftexample ", env!("CARGO_PKG_VERSION"));
    for (flag, named) in [("--help", "--cluster"), ("-h", "--port"), ("--version", version)] {
        let output = Command::new(BINARY).arg(flag).output().unwrap();
        assert!(output.status.success(), "{flag}");
        assert!(output.stderr.is_empty(), "{flag}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(named), "{flag}: {text}");
    }
}

#[test]
fn the_short_help_shows_what_a_first_cluster_needs() {
    let shown = |flag| {
        let output = Command::new(BINARY).arg(flag).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let (short, long) = (shown("-h"), shown("--help"));
    for flag in "id cluster join peer-url port host admin api data-dir log-level config".split(' ')
    {
        assert!(short.contains(&format!("--{flag}")), "{flag}: {short}");
    }
    for flag in ["--tick", "--peer-cert", "--snapshot-count"] {
        assert!(!short.contains(flag) && long.contains(flag), "{flag}");
    }
}

#[test]
fn the_environment_sets_what_no_flag_sets() {
    let site = Site::new();
    let (from_environment, from_flag) = (site.port(), site.port());
    let command = || {
        let mut command = Command::new(BINARY);
        command
            .env("RAFTEXAMPLE_CLUSTER", site.url())
            .env("RAFTEXAMPLE_PORT", from_environment.to_string())
            .env("RAFTEXAMPLE_HOST", site.address.to_string())
            .env("RAFTEXAMPLE_DATA_DIR", "elsewhere")
            .env("RAFTEXAMPLE_TICK", "20ms")
            .env("RAFTEXAMPLE_LOG_LEVEL", "error");
        command
    };
    let mut member = site.spawn_command("member", command(), false);
    serves(site.at(from_environment));
    assert!(site.dir().join("elsewhere/raftexample-1").is_dir());
    assert_eq!(member.stderr(), "");
    member.kill();

    let mut with_flags = command();
    with_flags.args(["--port", &from_flag.to_string(), "--data-dir", "here"]);
    let mut member = site.spawn_command("member", with_flags, false);
    serves(site.at(from_flag));
    assert!(site.dir().join("here/raftexample-1").is_dir());
    assert!(TcpListener::bind((site.address, from_environment)).is_ok(), "the flag wins");
    member.kill();

    for (join, status) in [
        ("true", Some("--join requires")),
        ("1", Some("--join requires")),
        ("false", None),
        ("0", None),
    ] {
        let mut with_join = command();
        with_join.env("RAFTEXAMPLE_JOIN", join).env("RAFTEXAMPLE_DATA_DIR", format!("join-{join}"));
        let process = site.spawn_command("join", with_join, false);
        match status {
            Some(named) => refused(process, 2, named),
            None => serves(site.at(from_environment)),
        }
    }
    let mut bad = command();
    bad.env("RAFTEXAMPLE_TICK", "fast");
    refused(site.spawn_command("bad", bad, false), 2, "--tick");
}

/// The port is set three times. The file counts only for settings without a flag and a variable.
#[test]
fn a_flag_beats_the_environment_and_both_beat_the_file() {
    let site = Site::new();
    let ports = [site.port(), site.port(), site.port()];
    let endpoint = site.url().replace("http://", "");
    let text = format!(
        r#"{{"ID": "1", "Nodes": [{{"ID": "1", "Endpoint": "{endpoint}"}}],
            "port": {}, "host": "{}", "tick": "20ms", "data-dir": "relative"}}"#,
        ports[0], site.address
    );
    // Its paths are relative to the working directory, not to the file.
    fs::create_dir(site.dir().join("etc")).unwrap();
    fs::write(site.dir().join("etc/raft.json"), text).unwrap();
    let serves_alone_at = |mut member: Process, port: u16| {
        serves(site.at(port));
        for other in ports.iter().filter(|other| **other != port) {
            assert!(TcpListener::bind((site.address, *other)).is_ok(), "{other} is free");
        }
        member.kill();
    };
    let mut command = Command::new(BINARY);
    command.args(["--config", "etc/raft.json"]);
    serves_alone_at(site.spawn_command("file", command, false), ports[0]);
    assert!(site.dir().join("relative/raftexample-1").is_dir());

    let with_environment = || {
        let mut command = Command::new(BINARY);
        command.env("RAFTEXAMPLE_CONFIG", "etc/raft.json");
        command.env("RAFTEXAMPLE_PORT", ports[1].to_string());
        command
    };
    serves_alone_at(site.spawn_command("environment", with_environment(), false), ports[1]);
    let mut command = with_environment();
    command.args(["--port", &ports[2].to_string()]);
    serves_alone_at(site.spawn_command("flag", command, false), ports[2]);
}

#[test]
fn a_bad_configuration_file_gives_its_place_and_status_2() {
    let site = Site::new();
    for (text, named) in [
        ("{\n\"tick\": \"fast\"}", "raft.json, line 2: \"tick\": invalid value 'fast'"),
        ("{\n\"tick\": \"0s\"}", "raft.json, line 2: \"tick\": --tick must be"),
        ("{\n\"ack\": \"maybe\"}", "[possible values: committed, proposed]"),
        ("{\n\"prot\": 1}", "raft.json, line 2: unknown field \"prot\""),
        ("{\n\"port\": 1,\n}", "raft.json, line 3: trailing comma"),
    ] {
        fs::write(site.dir().join("raft.json"), text).unwrap();
        refused(site.spawn("refused", &owned(&["--config", "raft.json"])), 2, named);
    }
    let named = "cannot read --config gone.json: No such file";
    refused(site.spawn("refused", &owned(&["--config", "gone.json"])), 2, named);
}

/// The README's first command, in an empty directory. The client port is on the loopback interface
/// because the peer URL is.
#[test]
fn three_flags_suffice_and_data_is_where_the_original_puts_it() {
    let site = Site::new();
    // Without --host the port is on 127.0.0.1, and another process may take it first.
    let (mut member, address) = (0..5)
        .find_map(|_| {
            let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            let port = free.port().to_string();
            let flags = owned(&["--id", "1", "--cluster", &site.url(), "--port", &port]);
            let mut member = site.spawn("member", &flags);
            eventually(PATIENCE, "it listens or gives up", || {
                member.exited().is_some() || std::net::TcpStream::connect(free).is_ok()
            });
            member.exited().is_none().then_some((member, free))
        })
        .expect("a port that nobody takes");
    put(address, "/my-key", b"hello");
    assert_eq!(get(address, "/my-key").as_deref(), Some(&b"hello"[..]));
    let mut made: Vec<_> = fs::read_dir(site.dir())
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    made.sort();
    assert_eq!(made, ["raftexample-1", "raftexample-1-snap"]);
    member.signal(Signal::SIGINT);
    assert_eq!(member.wait(PATIENCE), 0);
}
