//! `raftexample inspect`: its output on real members' files, which it does not change.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use crate::support::processes::{
    BINARY, Cluster, FAST, PATIENCE, Process, Ran, Signal, Site, copy_dir, eventually, files_in,
    put, run, run_with_little_memory, serves,
};

const SMALL: [&str; 4] = ["--snapshot-count", "10", "--snapshot-catch-up-entries", "5"];

fn inspect(dir: &Path, flags: &[&str]) -> Ran {
    run(dir, &[&["inspect"], flags].concat())
}

/// The parsed lines of `inspect --json`.
fn json(ran: &Ran) -> Vec<serde_json::Value> {
    ran.stdout.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

/// Every file and directory below `dir`, with contents and modification time.
fn image(dir: &Path) -> BTreeMap<PathBuf, (Vec<u8>, SystemTime)> {
    let mut paths = files_in(dir);
    let dirs: BTreeSet<PathBuf> =
        paths.iter().map(|path| path.parent().unwrap().to_owned()).chain([dir.into()]).collect();
    paths.extend(dirs);
    let changed = |path: &Path| path.metadata().unwrap().modified().unwrap();
    paths
        .into_iter()
        .map(|path| (path.clone(), (fs::read(&path).unwrap_or_default(), changed(&path))))
        .collect()
}

/// Flips one bit of a file.
fn flip(path: &Path, offset: u64) {
    let mut bytes = fs::read(path).unwrap();
    bytes[offset as usize] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn inspect_shows_every_record_and_snapshot_and_changes_nothing() {
    let mut cluster = Cluster::start(1, &[&FAST[..], &SMALL].concat());
    for number in 0..25 {
        cluster.put(1, &format!("/key-{number}"), &"long ".repeat(30));
    }
    // It lags too far for the log and receives a snapshot.
    cluster.join(1, 2);
    cluster.put(1, "/last", "");
    cluster.stop(2, Signal::SIGTERM);
    cluster.start_again(2);
    serves(cluster.address(2));
    cluster.change(1, "DELETE", 2, "");
    assert_eq!(cluster.process(2).wait(PATIENCE), 0);
    cluster.kill(1);
    let dir = cluster.site.dir();
    let before = image(dir);
    let (lines, people) = (inspect(dir, &[".", "--json"]), inspect(dir, &[".", "--keys"]));
    assert!(image(dir) == before, "it changed something");
    assert_eq!((lines.status, people.status), (0, 0), "{}", lines.stderr);
    assert_eq!((&*lines.stderr, &*people.stderr), ("", ""));

    let lines = json(&lines);
    let seen = |field: &str| -> BTreeSet<&str> {
        lines.iter().filter_map(|line| line[field].as_str()).collect()
    };
    let records = ["entry", "hard_state", "head", "identity", "install", "mark"];
    assert!(records.iter().all(|kind| seen("record").contains(kind)), "{:?}", seen("record"));
    for content in ["nothing", "put", "add_voter", "add", "promote", "remove"] {
        assert!(seen("content").contains(content), "{content}: {:?}", seen("content"));
    }
    let last = lines.iter().find(|line| line["key"] == "/last").unwrap();
    assert!(last["request_id"].as_str().unwrap().starts_with("1-"), "{last}");
    assert_eq!((&last["value_bytes"], &last["record"]), (&0.into(), &"entry".into()));
    assert!(last["offset"].as_u64().unwrap() > 0, "{last}");
    let added = lines.iter().find(|line| line["content"] == "add" && line["id"] == 2).unwrap();
    assert_eq!(added["url"], cluster.member(2).url);
    let summaries: Vec<_> = lines.iter().filter(|line| line["type"] == "summary").collect();
    assert_eq!(summaries.len(), 2, "one for each member");
    assert!(summaries.iter().all(|summary| summary["starts"] == true && summary["damage"] == 0));

    for part in [
        "PUT \"/key-24\" = \"long long",
        "…\" (150 bytes)",
        "snapshot received: index ",
        "checksum right",
        "; no damage",
    ] {
        assert!(people.stdout.contains(part), "{part}: {}", people.stdout);
    }
    // The files one by one.
    for part in fs::read_dir(dir.join("raftexample-1-snap")).unwrap() {
        let part = part.unwrap().path();
        let keys = inspect(dir, &["--keys", part.to_str().unwrap()]);
        assert!(keys.status == 0 && keys.stdout.contains("/key-0: 150 bytes"), "{}", keys.stdout);
    }
    for part in ["raftexample-1", "raftexample-1-snap", "raftexample-1/0000000000000000.wal"] {
        let shown = inspect(dir, &[part]);
        assert_eq!(shown.status, 0, "{part}: {}", shown.stderr);
        let summary = shown.stdout.lines().last().unwrap();
        assert!(summary.starts_with(part) && summary.ends_with("no damage"), "{summary}");
    }
}

#[test]
fn a_running_member_is_looked_into_and_not_disturbed() {
    let site = Site::new();
    let (flags, address) = site.single(&[&FAST[..], &SMALL].concat());
    let mut member = site.spawn("member", &flags);
    serves(address);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for number in 0..500 {
                put(address, &format!("/key-{number}"), &[b'x'; 700]);
            }
        });
        while !writer.is_finished() {
            let shown = inspect(site.dir(), &["."]);
            assert_eq!(shown.status, 0, "{}\n{}", shown.stderr, shown.stdout);
        }
    });
    let (other, _) = site.single(&[]);
    let second = run(site.dir(), &other.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(second.stderr.contains("is in use by another process"), "{}", second.stderr);
    member.signal(Signal::SIGTERM);
    assert_eq!(member.wait(PATIENCE), 0);
}

/// A killed member with two snapshots and the log from the older one on, and its flags.
fn killed_member() -> (Site, Vec<String>) {
    let site = Site::new();
    let (flags, address) = site.single(&[&FAST[..], &SMALL].concat());
    let mut member = site.spawn("member", &flags);
    for number in 0..40 {
        put(address, &format!("/key-{number}"), b"value");
    }
    eventually(PATIENCE, "there are two snapshots", || {
        fs::read_dir(site.dir().join("raftexample-1-snap")).unwrap().count() == 2
            && member.stderr().matches("compacted log at index").count() >= 2
    });
    member.kill();
    (site, flags)
}

/// Starts the member on a copy of its directory. It may end or serve.
fn start_on(site: &Site, copy: &Path, flags: &[String]) -> Process {
    let more = ["--data-dir".to_owned(), copy.display().to_string()];
    site.spawn("again", &[flags, &more].concat())
}

#[test]
fn a_flipped_bit_gives_status_1_and_the_members_own_last_line() {
    let (site, flags) = killed_member();
    let wal = "raftexample-1/0000000000000000.wal";
    let lines = json(&inspect(site.dir(), &[wal, "--json"]));
    let frames: BTreeSet<u64> = lines.iter().filter_map(|line| line["offset"].as_u64()).collect();
    let middle = *frames.iter().nth(frames.len() / 2).unwrap();
    let copy = site.dir().join("copy");
    for part in ["raftexample-1", "raftexample-1-snap"] {
        copy_dir(&site.dir().join(part), &copy.join(part));
    }
    flip(&copy.join(wal), middle + 21);
    let before = image(&copy);
    let shown = inspect(&copy, &[copy.to_str().unwrap()]);
    assert!(image(&copy) == before, "it changed something");
    assert_eq!(shown.status, 1, "{}", shown.stdout);
    let named = format!("{} is damaged at offset {middle}: ", copy.join(wal).display());
    assert!(shown.stderr.starts_with(&format!("raftexample: {named}")), "{}", shown.stderr);
    assert_eq!(shown.stderr.lines().count(), 1, "{}", shown.stderr);
    assert!(shown.stdout.contains(&format!("DAMAGE: {named}")), "{}", shown.stdout);
    assert!(shown.stdout.lines().last().unwrap().contains("would not start"));
    let file = inspect(&copy, &[copy.join(wal).to_str().unwrap(), "--json"]);
    assert_eq!(file.status, 1);
    assert_eq!(json(&file).last().unwrap()["starts"], false);

    let mut member = start_on(&site, &copy, &flags);
    assert_eq!(member.wait(PATIENCE), 1);
    assert_eq!(member.last_words(), [shown.stderr.trim_end()]);
}

#[test]
fn a_torn_tail_is_what_a_crash_leaves_and_gives_status_0() {
    let (site, flags) = killed_member();
    let wal = "raftexample-1/0000000000000000.wal";
    let lines = json(&inspect(site.dir(), &[wal, "--json"]));
    let last = lines.iter().filter_map(|line| line["offset"].as_u64()).max().unwrap();
    let path = site.dir().join(wal);
    let mut bytes = fs::read(&path).unwrap();
    bytes[last as usize + 21..].fill(0);
    fs::write(&path, bytes).unwrap();
    let before = image(site.dir());
    let shown = inspect(site.dir(), &["."]);
    assert!(image(site.dir()) == before, "it changed something");
    assert_eq!((shown.status, &*shown.stderr), (0, ""));
    let torn = |line: &&str| {
        line.starts_with(&format!("{last:>10}  ")) && line.contains("incomplete: left by a crash")
    };
    assert!(shown.stdout.lines().any(|line| torn(&line)), "{}", shown.stdout);
    let shown = inspect(site.dir(), &[".", "--json"]);
    assert_eq!(json(&shown).last().unwrap()["unfinished"], true);

    let member = start_on(&site, site.dir(), &flags);
    let cut = format!("{wal} at offset {last}");
    eventually(PATIENCE, "the start cuts it", || member.stderr().contains(&cut));
}

#[test]
fn a_log_that_a_copy_cut_short_is_refused_by_both() {
    let (site, flags) = killed_member();
    let wal = "raftexample-1/0000000000000000.wal";
    let lines = json(&inspect(site.dir(), &[wal, "--json"]));
    let last = lines.iter().filter_map(|line| line["offset"].as_u64()).max().unwrap();
    fs::OpenOptions::new().write(true).open(site.dir().join(wal)).unwrap().set_len(last).unwrap();
    let shown = inspect(site.dir(), &["."]);
    assert_eq!(shown.status, 1, "{}", shown.stdout);
    assert!(shown.stderr.contains("something cut the file short"), "{}", shown.stderr);
    let mut member = start_on(&site, Path::new("."), &flags);
    assert_eq!(member.wait(PATIENCE), 1);
    assert_eq!(member.last_words(), [shown.stderr.trim_end()]);
}

#[test]
fn a_damaged_snapshot_without_a_replacement_fails_inspection() {
    let (site, flags) = killed_member();
    let mut snapshots: Vec<PathBuf> = fs::read_dir(site.dir().join("raftexample-1-snap"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    snapshots.sort();
    let [older, newest] = &snapshots[..] else { panic!("{snapshots:?}") };
    flip(newest, 70);
    let shown = inspect(site.dir(), &["."]);
    assert_eq!((shown.status, &*shown.stderr), (0, ""), "{}", shown.stdout);
    assert!(shown.stdout.contains("the next start sets it aside"), "{}", shown.stdout);
    assert!(shown.stdout.contains("repaired by the next start"), "{}", shown.stdout);
    // By itself it counts as damaged.
    let alone = inspect(site.dir(), &[newest.to_str().unwrap()]);
    assert_eq!(alone.status, 1);
    assert!(alone.stderr.contains(newest.to_str().unwrap()), "{}", alone.stderr);

    flip(older, 70);
    let shown = inspect(site.dir(), &["."]);
    assert_eq!(shown.status, 1, "{}", shown.stdout);
    let mut member = start_on(&site, Path::new("."), &flags);
    assert_eq!(member.wait(PATIENCE), 1);
    assert_eq!(member.last_words(), [shown.stderr.trim_end()]);
}

/// The length that a file claims, in its own bytes or by a hole, is not allocated before it is checked.
#[test]
fn a_log_that_claims_gibibytes_is_refused_with_little_memory() {
    let (site, _) = killed_member();
    let wal = site.dir().join("raftexample-1/0000000000000000.wal");
    fs::OpenOptions::new().write(true).open(&wal).unwrap().set_len(8 << 30).unwrap();
    for path in [".", wal.to_str().unwrap()] {
        let shown = run_with_little_memory(site.dir(), &["inspect", path]);
        assert_eq!((shown.status, shown.stderr.lines().count()), (1, 1), "{}", shown.stderr);
        assert!(shown.stderr.contains("the file has 8589934592 bytes"), "{}", shown.stderr);
    }
}

#[test]
fn what_is_not_a_members_is_refused_in_one_line() {
    let site = Site::new();
    fs::write(site.dir().join("file"), "text").unwrap();
    for (path, named) in [
        (".", "contains no files of a member"),
        ("nothing", "No such file"),
        ("file", "neither a log segment"),
        ("/etc/passwd", "neither a log segment"),
    ] {
        let shown = inspect(site.dir(), &[path]);
        assert_eq!(shown.status, 1, "{path}");
        assert_eq!(shown.stderr.lines().count(), 1, "{path}: {}", shown.stderr);
        assert!(shown.stderr.contains(named), "{path}: {}", shown.stderr);
        assert!(!(shown.stdout + &shown.stderr).contains("DELETE"), "{path}: no data is lost");
    }
}

#[test]
fn a_reader_that_stops_early_is_no_error() {
    let version = raftexample::storage::wal::VERSION;
    let data = format!("{}/tests/data/v{version}", env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new(BINARY);
    command.arg("inspect").arg(data).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", output.status);
    assert!(output.stderr.is_empty());
}
