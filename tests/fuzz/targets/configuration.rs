//! A member's configuration: its flags, its file and its environment.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{Seek as _, Write as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;

use raftexample::config::{Config, one_line};
use raftexample::error::Error;
use raftexample::logging::printable;
use tempfile::NamedTempFile;

use super::Choices;

/// The flags, with valid and some invalid values.
#[rustfmt::skip]
const FLAGS: &[(&str, &[&str])] = &[
    ("--id", &["1", "2", "3", "0", "18446744073709551615"]),
    ("--cluster", &["http://127.0.0.1:1", "http://a:1,http://a:2,http://a:3", "http://[::1]:1", "a:1", "", "https://a:1", "http://--tick:1"]),
    ("--port", &["1", "65535", "65536"]),
    ("--join", &["true", "false", "maybe"]),
    ("--data-dir", &[".", "", "/nowhere"]),
    ("--host", &["0.0.0.0", "::", "localhost"]),
    ("--admin", &["127.0.0.1:1", "a", ""]),
    ("--api", &["127.0.0.1:1", "[::1]:0", "a", ""]),
    ("--allow-host", &["a.example,.b.example", "*", ","]),
    ("--peer-url", &["http://a:2", "http://a:4", "a", "https://a:2"]),
    ("--peer-cert", &["peer.pem", ""]),
    ("--peer-key", &["peer.key", ""]),
    ("--peer-ca", &["ca.pem", ""]),
    ("--cert", &["cert.pem", ""]),
    ("--key", &["cert.key", ""]),
    ("--client-ca", &["ca.pem", ""]),
    ("--lift-quarantine", &["true", "maybe"]),
    ("--snapshot-count", &["1", "0", "18446744073709551615"]),
    ("--snapshot-catch-up-entries", &["0", "18446744073709551615", "-1"]),
    ("--ack", &["committed", "proposed", "never"]),
    ("--read", &["linearizable", "local", "Local"]),
    ("--request-timeout", &["5s", "0s", "1day", "2days", "99999999999y"]),
    ("--max-value-bytes", &["1", "0", "67108864", "67108865"]),
    ("--tick", &["100ms", "1ns", "1min", "61s", "a\n\nb"]),
    ("--election-ticks", &["10", "2", "1", "10001"]),
    ("--heartbeat-ticks", &["1", "0", "10", "9999"]),
    ("--log-level", &["debug", "all"]),
    ("--log-format", &["json", "xml"]),
    ("--config", &["/nowhere", "."]),
];

/// The last line on standard error in bytes, as the program prints it.
const LINE_BYTES_MAX: usize = 4096;

/// What the program does with a configuration: the configuration, or the line that it ends with.
fn outcome(
    arguments: Vec<OsString>,
    variables: &[(OsString, OsString)],
) -> Result<Config, (bool, String)> {
    let config = Config::read(arguments, variables.iter().cloned())
        .map_err(|error| (false, one_line(&error)))?;
    match config.check() {
        Ok(()) => Ok(config),
        Err(Error::Config(why)) => Err((true, why)),
        Err(error) => panic!("{error}"),
    }
}

/// A configuration that was accepted can be used.
fn assert_usable(config: &Config) {
    let node = config.node_config();
    assert_ne!(node.id, 0);
    assert!(node.election_ticks > node.heartbeat_ticks && node.heartbeat_ticks > 0);
    assert_eq!(node.url, config.own_url());
    config.client_address();
    assert!(!config.names().is_empty());
}

/// An error is one line that a terminal can show.
fn assert_is_line(why: &str) {
    assert!(!why.is_empty() && !why.contains('\n'), "{why:?}");
    let line = printable(why, LINE_BYTES_MAX);
    assert!(line.len() <= LINE_BYTES_MAX && !line.contains(char::is_control), "{line:?}");
}

fn program() -> Vec<OsString> {
    vec![OsString::from("raftexample")]
}

/// Every command line is accepted, or refused in one line.
pub fn flags(data: &[u8]) {
    let mut choices = Choices(data);
    let mut arguments = program();
    for _ in 0..choices.below(8) {
        let (flag, values) = choices.pick(FLAGS);
        let dashes = if choices.one_in(4) { &flag[1..] } else { flag };
        let mut argument = format!("{dashes}={}", choices.pick(values)).into_bytes();
        if choices.one_in(8) {
            choices.damage(&mut argument);
        }
        arguments.push(OsString::from_vec(argument));
    }
    match outcome(arguments, &[]) {
        Ok(config) => assert_usable(&config),
        Err((_, why)) => assert_is_line(&why),
    }
}

// ---------------------------------------------------------------------------------------------
// The environment

/// The part of a variable's name that sets `flag`.
fn variable_of(flag: &str) -> String {
    flag[2..].to_uppercase().replace('-', "_")
}

fn variable(choices: &mut Choices<'_>) -> (OsString, OsString) {
    let (flag, values) = choices.pick(FLAGS);
    let (mut name, mut value) = (variable_of(flag), choices.pick(values).as_bytes().to_vec());
    match choices.below(8) {
        0..5 => {}
        5 => {
            // What orchestrators set for a service of this name.
            let named = choices.pick(&["PORT", "PORT_9121_TCP", "SERVICE_HOST", "SERVICE_PORT"]);
            name = named.to_owned();
            value = choices.pick(&["tcp://10.0.0.1:9121", "10.0.0.1", "9121", ""]).into();
        }
        6 => {
            name = choices
                .pick(&["ENDPOINT", "API_ENDPOINT", "", "PROT", "HELP", "VERSION", "CONFIG_"])
                .to_owned();
        }
        _ => name = if choices.one_in(2) { name.to_lowercase() } else { name.replace('_', "-") },
    }
    let prefix =
        choices.pick(&["RAFTEXAMPLE_", "RAFTEXAMPLE_", "RAFTEXAMPLE_", "raftexample_", ""]);
    let mut name = format!("{prefix}{name}").into_bytes();
    if choices.one_in(12) {
        choices.damage(&mut name);
    }
    if choices.one_in(8) {
        choices.damage(&mut value);
    }
    // A process gets neither from its parent.
    name.retain(|byte| !matches!(byte, 0 | b'='));
    value.retain(|byte| *byte != 0);
    (OsString::from_vec(name), OsString::from_vec(value))
}

/// What a variable does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Effect {
    /// It sets this flag.
    Sets(&'static str),
    /// It is ignored with a warning.
    Warned,
    Nothing,
}

fn effect((name, value): &(OsString, OsString)) -> Effect {
    let Some(name) = name.as_bytes().strip_prefix(b"RAFTEXAMPLE_") else { return Effect::Nothing };
    if value.is_empty() || name == b"ENDPOINT" || name == b"API_ENDPOINT" {
        return Effect::Nothing;
    }
    let is_link = name == b"PORT" && value.as_bytes().windows(3).any(|part| part == b"://");
    let is_service = name.starts_with(b"PORT_") || name.starts_with(b"SERVICE_");
    let name = String::from_utf8_lossy(name).to_ascii_uppercase().replace('-', "_");
    match FLAGS.iter().find(|(flag, _)| variable_of(flag) == name) {
        Some((flag, _)) if !is_link && !is_service => Effect::Sets(flag),
        _ => Effect::Warned,
    }
}

/// The configuration without what it says of where it comes from.
fn essence(config: &Config) -> String {
    let text = format!("{config:?}");
    text.split(", settings: ").next().unwrap().to_owned()
}

/// Every environment is accepted, or refused in one line that names the variable. What sets a flag does
/// what the flag would do, and anything else changes nothing.
pub fn environment(data: &[u8]) {
    let mut choices = Choices(data);
    // Reading is slow, so not every input is read in every way.
    let compares_flags = choices.one_in(3);
    let variables: Vec<_> = (0..choices.below(6)).map(|_| variable(&mut choices)).collect();
    let read = outcome(program(), &variables);
    let effects: Vec<Effect> = variables.iter().map(effect).collect();
    let setting =
        || variables.iter().zip(&effects).filter(|(_, effect)| matches!(effect, Effect::Sets(_)));

    // What sets nothing changes nothing, and is warned of.
    let alone: Vec<_> = setting().map(|(variable, _)| variable.clone()).collect();
    let reads_alone = alone.len() < variables.len();
    let read_alone = if reads_alone { outcome(program(), &alone) } else { read.clone() };
    match (&read, read_alone) {
        (Ok(read), Ok(alone)) => {
            assert_usable(read);
            assert_eq!(essence(read), essence(&alone));
            let warned = effects.iter().filter(|effect| **effect == Effect::Warned).count();
            assert_eq!(read.warnings.len(), warned, "{:?}", read.warnings);
            assert!(alone.warnings.is_empty());
        }
        (Err(read), Err(alone)) => assert_eq!(*read, alone),
        (read, alone) => panic!("{variables:?}: {read:?}, but {alone:?}"),
    }
    let flags: Vec<&str> = effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Sets(flag) => Some(*flag),
            _ => None,
        })
        .collect();
    let is_twice = flags.iter().collect::<BTreeSet<_>>().len() < flags.len();
    assert!(!is_twice || read.is_err(), "{variables:?} set a flag twice");
    if let Err((_, why)) = &read {
        assert_is_line(why);
        let names = setting().map(|((name, _), _)| name.to_str().unwrap());
        let is_start = |name| why.strip_prefix(name).is_some_and(|rest| rest.starts_with(": "));
        assert!(names.into_iter().any(is_start), "{variables:?}: {why}");
    }
    if !compares_flags || is_twice {
        return;
    }
    // The same as flags.
    let mut arguments = program();
    arguments.extend(setting().map(|((_, value), effect)| {
        let Effect::Sets(flag) = effect else { unreachable!("it sets a flag") };
        let mut argument = OsString::from(format!("{flag}="));
        argument.push(value);
        argument
    }));
    match (&read, outcome(arguments, &[])) {
        (Ok(read), flags) => assert_eq!(essence(read), essence(&flags.unwrap())),
        (Err((_, why)), flags) => assert!(flags.is_err(), "{why}"),
    }
}

// ---------------------------------------------------------------------------------------------
// The file

/// A file whose text is replaced for each input.
fn with_text<T>(text: &[u8], read: impl FnOnce(&Path) -> T) -> T {
    thread_local! {
        static FILE: RefCell<NamedTempFile> = {
            // In memory, where there is such a directory: there are very many inputs.
            let dir = ["/dev/shm"].map(Path::new).into_iter().find(|dir| dir.is_dir());
            let dir = dir.map_or_else(std::env::temp_dir, Path::to_owned);
            RefCell::new(NamedTempFile::new_in(dir).unwrap())
        };
    }
    FILE.with_borrow_mut(|file| {
        file.rewind().unwrap();
        file.write_all(text).unwrap();
        file.as_file().set_len(text.len() as u64).unwrap();
        read(file.path())
    })
}

/// A string in JSON, in one of the ways to write it.
fn string(choices: &mut Choices<'_>, text: &str) -> String {
    let mut written = String::from("\"");
    let escaped = choices.one_in(8);
    for c in text.chars() {
        match c {
            '"' | '\\' => written.extend(['\\', c]),
            c if c.is_control() || escaped => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    written.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => written.push(c),
        }
    }
    written + "\""
}

/// Any JSON, or nearly.
fn any_value(choices: &mut Choices<'_>) -> String {
    let text = String::from_utf8_lossy(choices.bytes()).into_owned();
    match choices.below(10) {
        0 => choices.pick(&["null", "true", "false", "{}", "[]", "nul"]).to_owned(),
        1 => choices
            .pick(&["0", "-0", "-1", "1.5", "1e2", "1e999", "18446744073709551616", "01", "NaN"])
            .to_owned(),
        2 => choices
            .pick(&[r#""\ud800""#, r#""\u0000""#, r#""\n\n""#, r#""\u001b[31m""#, "\"\n\"", r#"""#])
            .to_owned(),
        3 => {
            let depth = choices.pick(&[1, 10, 127, 128, 1000, 20_000]);
            let (open, close) =
                choices.pick(&[("[", "]"), ("{\"a\":", "}"), ("[", ""), ("[\n\n", "]")]);
            open.repeat(depth) + "1" + &close.repeat(depth)
        }
        4 => "9".repeat(choices.short()),
        5 => format!("[{}, {}]", string(choices, &text), string(choices, "http://a:1")),
        6 => format!("{{{}: 1}}", string(choices, &text)),
        _ => string(choices, &text),
    }
}

fn nodes(choices: &mut Choices<'_>) -> String {
    let mut nodes = Vec::new();
    for id in 1..=choices.below(5) {
        let id = if choices.one_in(12) { any_value(choices) } else { id.to_string() };
        let id = if choices.one_in(2) { string(choices, &id) } else { id };
        let endpoint = choices.pick(&["a:1", "http://a:2", "a:3", "https://a:4", "a", "a:1,b:2"]);
        let endpoint = match choices.one_in(12) {
            true => any_value(choices),
            false => string(choices, endpoint),
        };
        let mut fields = vec![format!("\"ID\": {id}"), format!("\"Endpoint\": {endpoint}")];
        if choices.one_in(12) {
            match choices.below(3) {
                0 => fields.truncate(1),
                1 => fields.push(fields[choices.below(2)].clone()),
                _ => fields.push(format!("\"Port\": {}", any_value(choices))),
            }
        }
        let node = format!("{{{}}}", fields.join(choices.pick(&[", ", ",\n", ",\r\n\t"])));
        nodes.push(if choices.one_in(12) { any_value(choices) } else { node });
    }
    format!("[{}]", nodes.join(choices.pick(&[", ", ",\n", ""])))
}

/// A field, and the flag that it sets if that is known.
fn field(choices: &mut Choices<'_>) -> (Option<&'static str>, String) {
    let (flag, values) = choices.pick(FLAGS);
    let (flag, key, value) = match choices.below(8) {
        0 => (Some("--cluster"), "Nodes", nodes(choices)),
        1 => (Some("--id"), "ID", choices.pick(&["1", "\"1\"", "2", "0", "1.0"]).to_owned()),
        2 => {
            let key =
                choices.pick(&["id ", "nodes", "", "help", "port\n", "Id", "peer_url", "-id"]);
            (None, key, any_value(choices))
        }
        3 => (Some(flag), &flag[2..], any_value(choices)),
        _ => {
            let value = choices.pick(values);
            let bare = value.parse::<f64>().is_ok() || value == "true" || value == "false";
            let value = match choices.below(4) {
                0 => format!("[{}]", string(choices, value)),
                1 if bare => value.to_owned(),
                _ => string(choices, value),
            };
            (Some(flag), &flag[2..], value)
        }
    };
    let between = choices.pick(&[": ", ":", " :\n", "\n:\r\n"]);
    // A file cannot name another one.
    (flag.filter(|flag| *flag != "--config"), format!("{}{between}{value}", string(choices, key)))
}

/// Every file is accepted, or refused in one line that names it and the line in it.
pub fn configuration_file(data: &[u8]) {
    let mut choices = Choices(data);
    let fields: Vec<_> = (0..choices.below(6)).map(|_| field(&mut choices)).collect();
    let (open, between, close) =
        choices.pick(&[("{", ", ", "}"), ("{\n", ",\n", "\n}\n"), (" {", ",\r\n\r\n", "} ")]);
    let written: Vec<&str> = fields.iter().map(|(_, text)| text.as_str()).collect();
    let mut text = format!("{open}{}{close}", written.join(between)).into_bytes();
    let is_whole = !choices.one_in(2);
    if !is_whole {
        match choices.below(4) {
            0 => drop(text.splice(0..0, *b"\xef\xbb\xbf")),
            1 => text.extend_from_slice(b"{}"),
            _ => choices.damage(&mut text),
        }
    }
    with_text(&text, |path| {
        let mut arguments = program();
        arguments.extend(["--config".into(), path.into()]);
        let path = path.to_str().unwrap();
        match outcome(arguments, &[]) {
            Ok(config) => {
                assert_usable(&config);
                let flags: BTreeSet<_> = fields.iter().map(|(flag, _)| flag).collect();
                let is_unclear = flags.len() < fields.len() || flags.contains(&None);
                assert!(!is_whole || !is_unclear, "accepted: {}", String::from_utf8_lossy(&text));
            }
            Err((_, why)) => {
                assert_is_line(&why);
                let line = why.strip_prefix(path).and_then(|rest| rest.strip_prefix(", line "));
                let line = line.and_then(|rest| rest.split_once(": "));
                let (line, reason) = line.unwrap_or_else(|| panic!("no line is named: {why}"));
                let lines = text.iter().filter(|byte| **byte == b'\n').count() + 1;
                assert!((1..=lines).contains(&line.parse().unwrap()), "{lines} lines: {why}");
                assert!(!reason.is_empty(), "{why}");
            }
        }
    });
}

/// What an admin port could answer to the commands that show members: JSON, or nearly.
pub fn admin_answer(choices: &mut Choices<'_>) -> Vec<u8> {
    const FIELDS: &[&str] = &[
        "id",
        "url",
        "role",
        "term",
        "commit",
        "keys",
        "wal_bytes",
        "uptime_seconds",
        "version",
        "leader",
    ];
    let mut members = Vec::new();
    for _ in 0..choices.below(4) {
        let object = |choices: &mut Choices<'_>| {
            let fields = (0..choices.below(6)).map(|_| {
                let name = choices.pick(FIELDS);
                let escapes = [
                    "\"\\u001b[2J\"",
                    "\"\u{9b}2J\"",
                    "\"\\n\\r\"",
                    "\"\u{7f}\"",
                    "1e300",
                    "18446744073709551615",
                ];
                let value = if choices.one_in(3) {
                    choices.pick(&escapes).to_owned()
                } else {
                    any_value(choices)
                };
                format!("\"{name}\":{value}")
            });
            fields.collect::<Vec<_>>().join(choices.pick(&[",", ",", ",\r", ",\t"]))
        };
        let (member, status) = (object(choices), object(choices));
        let comma = if member.is_empty() { "" } else { "," };
        let is_alive = choices.pick(&["true", "false"]);
        members.push(format!("{{{member}{comma}\"alive\":{is_alive},\"status\":{{{status}}}}}"));
    }
    let members = format!("[{}]", members.join(","));
    let mut answer = match choices.one_in(3) {
        true => members,
        false => format!("{{\"seen_by\":1,\"members\":{members}}}"),
    }
    .into_bytes();
    if choices.one_in(4) {
        choices.damage(&mut answer);
    }
    answer
}
