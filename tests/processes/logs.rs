//! The lines on standard error.

use std::fs;

use crate::support::processes::{FAST, PATIENCE, Process, Signal, Site, eventually, put, serves};

/// The lines that readers of the original know, and raft-rs's own where they differ.
#[test]
fn the_log_has_the_originals_words() {
    let site = Site::new();
    let flags =
        [&FAST[..], &["--snapshot-count", "5", "--snapshot-catch-up-entries", "2"]].concat();
    let (flags, address) = site.single(&flags);
    let member = walk(&site, &flags, address);
    for words in [
        "replaying WAL of member 1",
        "loading WAL at term 0 and index 0",
        "1 switched to configuration voters=(1)",
        "became follower at term",
        "starting a new election",
        "became candidate at term 2",
        "became leader at term 2",
        "raft.node: 1 elected leader 1 at term 2",
        "start snapshot [applied index: ",
        " | last snapshot index: 0]",
        "compacted log at index ",
        "received SIGTERM, stopping",
    ] {
        assert!(member.stderr().contains(words), "{words:?} is not in\n{}", member.stderr());
    }
    let again = walk(&site, &flags, address);
    for words in [
        "replaying WAL of member 1",
        "loading snapshot at term ",
        "loading WAL at term 2 and index ",
    ] {
        assert!(again.stderr().contains(words), "{words:?} is not in\n{}", again.stderr());
    }
    let stdout = fs::read(site.dir().join("member.out")).unwrap();
    assert!(stdout.is_empty(), "log lines go to standard error");
}

#[test]
fn as_json_each_line_is_one_object_with_a_message() {
    let site = Site::new();
    let (flags, address) = site.single(&[&FAST[..], &["--log-format", "json"]].concat());
    let member = walk(&site, &flags, address);
    let stderr = member.stderr();
    assert!(stderr.lines().count() > 5, "{stderr}");
    for line in stderr.lines() {
        let fields = json_object(line).unwrap_or_else(|| panic!("no JSON object: {line}"));
        assert!(fields.contains(&"msg".to_owned()), "{line}");
        assert!(fields.contains(&"level".to_owned()), "{line}");
    }
    assert!(stderr.contains("\"replaying WAL of member 1\""), "{stderr}");
}

#[test]
fn at_level_error_a_member_that_is_well_says_nothing() {
    let site = Site::new();
    let (flags, address) = site.single(&[&FAST[..], &["--log-level", "error"]].concat());
    assert_eq!(walk(&site, &flags, address).stderr(), "");
}

/// Starts, writes, makes a snapshot, stops.
fn walk(site: &Site, flags: &[String], address: std::net::SocketAddr) -> Process {
    let mut member = site.spawn("member", flags);
    serves(address);
    (0..20).for_each(|n| put(address, &format!("/k{n}"), b"value"));
    if flags.contains(&"--snapshot-count".to_owned()) {
        eventually(PATIENCE, "a snapshot is made", || member.stderr().contains("compacted log"));
    }
    member.signal(Signal::SIGTERM);
    assert_eq!(member.wait(PATIENCE), 0);
    member
}

/// The names in a flat JSON object, or `None` for any other line.
fn json_object(line: &str) -> Option<Vec<String>> {
    let mut rest = line.strip_prefix('{')?.strip_suffix('}')?;
    let mut names = Vec::new();
    loop {
        let (name, after) = json_string(rest)?;
        names.push(name);
        let value = after.strip_prefix(':')?;
        let after = match json_string(value) {
            Some((_, after)) => after,
            None => {
                let end = value.find(',').unwrap_or(value.len());
                let number = &value[..end];
                let is_literal = ["true", "false", "null"].contains(&number);
                if !is_literal && number.parse::<f64>().is_err() {
                    return None;
                }
                &value[end..]
            }
        };
        if after.is_empty() {
            return Some(names);
        }
        rest = after.strip_prefix(',')?;
    }
}

/// A JSON string at the start of `text`, and the rest.
fn json_string(text: &str) -> Option<(String, &str)> {
    let inner = text.strip_prefix('"')?;
    let mut escaped = false;
    for (position, c) in inner.char_indices() {
        match c {
            _ if c.is_control() => return None,
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return Some((inner[..position].to_owned(), &inner[position + 1..])),
            _ => {}
        }
    }
    None
}
