//! Settings from elsewhere than the command line: they replace the defaults of the flags, so that the
//! command line takes precedence, and clap's parsers check the values.
//!
//! # The environment
//! `RAFTEXAMPLE_` and the name of a flag sets that flag. An empty variable is unset. Orchestrators set
//! variables with this prefix, too, for a service of this name; they are ignored, with a warning.
//!
//! # The configuration file
//! One JSON object with the members and the id of this member, such as
//!
//! ```json
//! {"ID": "1", "Nodes": [{"ID": "1", "Endpoint": "127.0.0.1:12379"}], "port": 12380}
//! ```
//!
//! and any flag by its long name.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt::{self, Formatter};
use std::path::Path;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, Id, ValueHint};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use super::first_paragraph;
use crate::membership::check_url;

/// The prefix of the environment variables.
const PREFIX: &str = "RAFTEXAMPLE_";

/// The variables of the commands.
const OF_COMMANDS: [&str; 2] = ["ENDPOINT", "API_ENDPOINT"];

/// Values of flags, by the long name of the flag.
#[derive(Clone, Debug, Default)]
pub(super) struct Settings(BTreeMap<String, Setting>);

#[derive(Clone, Debug)]
struct Setting {
    /// clap's id of the flag.
    id: Id,
    /// The value as the command line would give it.
    text: OsString,
    /// Where it is set: a variable, or a line of a file.
    place: String,
}

/// A line, and what is wrong there.
type Wrong = (usize, String);

impl Settings {
    /// Takes the settings from the environment, and checks each value on its own. `command` defines the
    /// flags. An error names the variable. Returns warnings about variables that are ignored, too.
    pub fn from_environment(
        variables: impl Iterator<Item = (OsString, OsString)>,
        command: &Command,
    ) -> Result<(Self, Vec<String>), clap::Error> {
        let (mut settings, mut warnings) = (Self::default(), Vec::new());
        for (name, value) in variables {
            let name = name.to_string_lossy();
            let Some(flag) = name.strip_prefix(PREFIX) else { continue };
            if value.is_empty() || OF_COMMANDS.contains(&flag) {
                continue;
            }
            // Kubernetes describes a service named raftexample to all containers of its namespace.
            let is_link = flag == "PORT" && value.to_string_lossy().contains("://");
            if is_link || flag.starts_with("PORT_") || flag.starts_with("SERVICE_") {
                warnings.push(format!(
                    "ignoring {name}, which describes a service: in Kubernetes, set enableServiceLinks to false"
                ));
                continue;
            }
            let flag = flag.to_ascii_lowercase().replace('_', "-");
            let mut arguments = command.get_arguments();
            let Some(arg) = arguments.find(|arg| arg.get_long() == Some(&flag)) else {
                warnings.push(format!("ignoring {name}: there is no flag --{flag}"));
                continue;
            };
            check_alone(arg, &value).map_err(|why| refused(format!("{name}: {why}")))?;
            let id = arg.get_id().clone();
            let setting = Setting { id, text: value, place: name.clone().into_owned() };
            if let Some(Setting { place, .. }) = settings.0.insert(flag, setting) {
                return Err(refused(format!("{name}: {place} sets it, too; remove one of them")));
            }
        }
        Ok((settings, warnings))
    }

    /// Reads a file, and checks each value on its own. An error names the file, the line, the field, and
    /// the reason. If there is no such file, it names the variable in `environment` that did.
    pub fn read(path: &Path, command: &Command, environment: &Self) -> Result<Self, clap::Error> {
        let name = path.display().to_string();
        let text = std::fs::read(path).map_err(|error| {
            let why = format!("cannot read --config {name}: {error}");
            refused(environment.locate(&why))
        })?;
        let settings = settings(&text, &name, command)
            .map_err(|(line, why)| refused(format!("{name}, line {line}: {why}")))?;
        Ok(Self(settings))
    }

    /// Adds settings that take precedence.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Replaces the defaults of the flags in `command` by these settings.
    pub fn set_defaults(&self, command: Command) -> Command {
        self.0.values().fold(command, |command, Setting { id, text, .. }| {
            command.mut_arg(id, |arg| arg.default_value(text.clone()))
        })
    }

    /// The settings that the command line did not replace.
    pub fn used(&self, matches: &ArgMatches) -> Self {
        let mut used = self.clone();
        used.0.retain(|_, setting| {
            matches.value_source(setting.id.as_str()) == Some(ValueSource::DefaultValue)
        });
        used
    }

    /// Adds the place to a message that names a flag, if one of these settings has set that flag.
    pub fn locate(&self, message: &str) -> String {
        let words = message.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
        let flags = words.filter_map(|word| word.strip_prefix("--"));
        match flags.filter_map(|flag| self.0.get(flag)).next() {
            Some(Setting { place, .. }) => format!("{place}: {message}"),
            None => message.to_owned(),
        }
    }
}

/// An error of one line, whatever it quotes.
fn refused(why: String) -> clap::Error {
    clap::Error::raw(ErrorKind::InvalidValue, why.replace('\n', "\\n"))
}

/// Parses one value without the others, so that none hides its error.
fn check_alone(arg: &Arg, value: &OsStr) -> Result<(), String> {
    let mut argument = OsString::from(format!("--{}=", arg.get_long().unwrap_or_default()));
    argument.push(value);
    let alone = Command::new(env!("CARGO_PKG_NAME")).arg(arg.clone());
    match alone.try_get_matches_from([OsString::new(), argument]) {
        Ok(_) => Ok(()),
        Err(error) => Err(first_paragraph(&error)),
    }
}

/// Parses the text, and checks each value on its own.
fn settings(
    text: &[u8],
    name: &str,
    command: &Command,
) -> Result<BTreeMap<String, Setting>, Wrong> {
    let fields: Fields<'_> = serde_json::from_slice(text).map_err(|error| {
        let why = without_place(&error);
        (error.line().max(1), format!("{why}; write one JSON object"))
    })?;
    let mut settings: BTreeMap<String, Setting> = BTreeMap::new();
    for (key, value) in fields.0 {
        let line = line_of(text, key);
        let field = key_text(key).map_err(|why| (line, why))?;
        let wrong = |why: String| (line, format!("{field:?}: {why}"));
        let flag = match &*field {
            "ID" => "id",
            "Nodes" => "cluster",
            flag => flag,
        };
        let mut flags = command.get_arguments().filter(|_| flag != "config");
        let Some(arg) = flags.find(|arg| arg.get_long() == Some(flag)) else {
            let known = "use ID, Nodes, or the long name of a flag other than --config";
            return Err((line, format!("unknown field {field:?}: {known}")));
        };
        let as_flag = match &*field {
            "Nodes" => nodes(text, key, value)?,
            _ => flag_value(value, arg).map_err(wrong)?,
        };
        check_alone(arg, as_flag.as_ref()).map_err(wrong)?;
        let place = format!("{name}, line {line}: {field:?}");
        let setting = Setting { id: arg.get_id().clone(), text: as_flag.into(), place };
        if let Some(Setting { place, .. }) = settings.insert(flag.to_owned(), setting) {
            return Err(wrong(format!("{place} sets it, too; remove one of them")));
        }
    }
    Ok(settings)
}

/// The value as the command line would give it.
fn flag_value(value: &RawValue, arg: &Arg) -> Result<String, String> {
    let is_path = arg.get_value_hint() == ValueHint::AnyPath;
    let is_list = arg.get_value_delimiter().is_some();
    match serde_json::from_str(value.get()).map_err(|error| without_place(&error))? {
        Value::String(text) => Ok(text),
        // As written, because JSON's parser could round a number.
        Value::Number(_) | Value::Bool(_) if !is_path && !is_list => Ok(value.get().to_owned()),
        Value::Array(items) if is_list => {
            let items: Option<Vec<&str>> = items.iter().map(Value::as_str).collect();
            items.map(|items| items.join(",")).ok_or_else(|| "write an array of strings".into())
        }
        _ if is_list => Err("write an array of strings".into()),
        _ if is_path => Err("write a string".into()),
        _ => Err("write a string, a number, true or false".into()),
    }
}

/// The URLs of `Nodes` in the order of their ids, in the form of `--cluster`.
fn nodes(text: &[u8], key: &RawValue, value: &RawValue) -> Result<String, Wrong> {
    let wrong = |part: &RawValue, why: &str| (line_of(text, part), format!("\"Nodes\": {why}"));
    const SHAPE: &str = r#"write [{"ID": "1", "Endpoint": "HOST:PORT"}, …]"#;
    let entries: Vec<&RawValue> =
        serde_json::from_str(value.get()).map_err(|_| wrong(key, SHAPE))?;
    let mut members = BTreeMap::new();
    for entry in entries {
        let (mut id, mut endpoint) = (None, None);
        let fields: Fields<'_> =
            serde_json::from_str(entry.get()).map_err(|_| wrong(entry, SHAPE))?;
        for (key, value) in fields.0 {
            let field = key_text(key).map_err(|why| wrong(key, &why))?;
            let place = match &*field {
                "ID" => &mut id,
                "Endpoint" => &mut endpoint,
                _ => return Err(wrong(key, &format!("unknown field {field:?}: {SHAPE}"))),
            };
            if place.replace((key, value)).is_some() {
                return Err(wrong(key, &format!("{field:?} twice: remove one of them")));
            }
        }
        let (Some((id_key, id)), Some((endpoint_key, endpoint))) = (id, endpoint) else {
            return Err(wrong(entry, &format!("ID or Endpoint is missing: {SHAPE}")));
        };
        let id: u64 = id.get().trim_matches('"').parse().map_err(|_| {
            wrong(id_key, &format!("ID {} is no member id: give a number from 1 on", id.get()))
        })?;
        let endpoint: String =
            serde_json::from_str(endpoint.get()).map_err(|_| wrong(endpoint_key, SHAPE))?;
        let scheme = if endpoint.contains("://") { "" } else { "http://" };
        let url = format!("{scheme}{endpoint}");
        check_url(&url).map_err(|why| wrong(endpoint_key, &why))?;
        if members.insert(id, (id_key, url)).is_some() {
            return Err(wrong(id_key, &format!("ID {id} twice: give each member its own")));
        }
    }
    let length = members.len();
    for (place, (id, (id_key, _))) in (1..).zip(&members) {
        if *id != place {
            let why = format!("ID {id}, but no ID {place}: number the members from 1 to {length}");
            return Err(wrong(id_key, &why));
        }
    }
    if members.is_empty() {
        return Err(wrong(key, &format!("it lists no member: {SHAPE}")));
    }
    Ok(members.into_values().map(|(_, url)| url).collect::<Vec<_>>().join(","))
}

/// A JSON object as written: with duplicate fields, and with the place of each part in the text.
struct Fields<'a>(Vec<(&'a RawValue, &'a RawValue)>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldsVisitor;

        impl<'de> Visitor<'de> for FieldsVisitor {
            type Value = Fields<'de>;

            fn expecting(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }

        deserializer.deserialize_map(FieldsVisitor)
    }
}

fn key_text(key: &RawValue) -> Result<String, String> {
    serde_json::from_str(key.get()).map_err(|error| without_place(&error))
}

/// The line, from 1, on which a part of the text starts.
fn line_of(text: &[u8], part: &RawValue) -> usize {
    // The part is borrowed from the text, so its address gives the offset.
    let offset = part.get().as_ptr() as usize - text.as_ptr() as usize;
    text[..offset].iter().filter(|byte| **byte == b'\n').count() + 1
}

/// The error without its line and column, which may count from the start of a value.
fn without_place(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ").map_or(text.clone(), |(why, _)| why.to_owned())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;
    use std::time::Duration;

    use crate::config::{Config, one_line};

    /// Reads flags with a file that contains `text`. Errors name the file as `FILE`.
    fn read(text: impl AsRef<[u8]>, flags: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("raft.json");
        std::fs::write(&path, text).expect("a file in it");
        let path = path.to_str().expect("a plain name");
        let arguments = ["raftexample", "--config", path].into_iter().chain(flags.split(' '));
        let arguments = arguments.filter(|word| !word.is_empty()).map(OsString::from);
        let first_paragraph = |text: String| {
            let lines: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).collect();
            lines.join(" ").replace("error: ", "").replace(path, "FILE")
        };
        let config = Config::read(arguments, std::iter::empty())
            .map_err(|error| first_paragraph(error.to_string()))?;
        config.check().map_err(|error| first_paragraph(error.to_string()))?;
        Ok(config)
    }

    const THREE: &str = r#""Nodes": [
  {"ID": "2", "Endpoint": "127.0.0.1:22379"},
  {"Endpoint": "http://127.0.0.1:12379", "ID": 1},
  {"ID": "3", "Endpoint": "localhost:32379"}
]"#;

    #[test]
    fn the_nodes_are_the_cluster_in_the_order_of_their_ids() {
        for id in ["2", r#""2""#] {
            let config = read(format!("{{\"ID\": {id}, {THREE}}}"), "").expect("a good file");
            assert_eq!(config.id, 2);
            let urls =
                ["http://127.0.0.1:12379", "http://127.0.0.1:22379", "http://localhost:32379"];
            assert_eq!(config.cluster, urls);
        }
    }

    #[test]
    fn any_flag_can_be_set_by_its_long_name() {
        let text = r#"{
            "id": 2, "cluster": ["http://a:1", "http://b:2"], "port": 12380, "join": true,
            "data-dir": "x", "host": "0.0.0.0", "peer-url": "http://b:2", "lift-quarantine": true,
            "snapshot-count": 18446744073709551615, "ack": "proposed", "tick": "50ms"
        }"#;
        let config = read(text, "").expect("a good file");
        assert_eq!((config.id, config.port, config.join), (2, 12380, true));
        assert_eq!(config.cluster, ["http://a:1", "http://b:2"]);
        assert_eq!(config.data_dir.to_str(), Some("x"));
        assert_eq!(config.host.map(|host| host.to_string()).as_deref(), Some("0.0.0.0"));
        assert_eq!(config.own_url(), "http://b:2");
        assert_eq!((config.lift_quarantine, config.snapshot_count), (true, u64::MAX));
        assert_eq!(config.tick, Duration::from_millis(50));
        assert_eq!(config.election_ticks, 10, "what is not set has its default");
        let config =
            read(r#"{"cluster": "http://a:1,http://b:2"}"#, "").expect("a list in a string");
        assert_eq!(config.cluster.len(), 2);
        assert_eq!(read("{}", "").expect("nothing is set").port, 9121);
    }

    #[test]
    fn a_flag_takes_precedence_over_the_file() {
        let text = r#"{"port": 1, "join": true, "cluster": ["http://a:1"], "tick": "0s"}"#;
        let flags = "-port 2 --join=false --cluster http://b:2,http://c:3 --tick 20ms";
        let config = read(text, flags).expect("nothing of the file is used");
        assert_eq!((config.port, config.join, config.cluster.len()), (2, false, 2));
        // An error in a flag is not attributed to the file that it replaces.
        let error = read(r#"{"tick": "20ms"}"#, "--tick 0s").expect_err("0 s");
        assert!(error.starts_with("--tick must be"), "{error}");
        let error = read(r#"{"port": 1}"#, "--port 99999").expect_err("no port");
        assert!(!error.contains("FILE"), "{error}");
    }

    /// Each refusal names the file, the line, the field and what is wrong.
    #[test]
    fn an_invalid_setting_is_named_with_its_line() {
        let nodes = |nodes: &str| format!("{{\n\"Nodes\":\n[{nodes}]}}");
        let node = |id: &str| format!("\n{{\"ID\": {id}, \"Endpoint\": \"a:{}\"}}", id.len());
        for (text, line, named) in [
            // No JSON, or no object.
            ("".into(), 1, "EOF while parsing"),
            ("{\n\"port\": 1,\n}".into(), 3, "trailing comma"),
            ("{\n\"port\": 1\n".into(), 3, "EOF while parsing an object"),
            ("{\n// port\n}".into(), 2, "key must be a string"),
            ("{}\n{}".into(), 2, "trailing characters"),
            ("[1]".into(), 1, "expected an object"),
            ("\n\n\"port\"".into(), 3, "expected an object"),
            ("{\n\"data-dir\": \"\\ud800\"}".into(), 2, "\"data-dir\""),
            ("{\n\"\\ud800\": 1}".into(), 2, "hex escape"),
            // Fields.
            ("{\n\"prot\": 1}".into(), 2, "unknown field \"prot\""),
            ("{\n\"nodes\": []}".into(), 2, "unknown field \"nodes\""),
            ("{\n\"config\": \"x\"}".into(), 2, "unknown field \"config\""),
            ("{\n\"help\": true}".into(), 2, "unknown field \"help\""),
            ("{\n\"port\": 1,\n\"port\": 2}".into(), 3, "FILE, line 2: \"port\" sets it, too"),
            ("{\n\"ID\": 1,\n\"id\": 1}".into(), 3, "FILE, line 2: \"ID\" sets it, too"),
            (
                format!("{{\n{THREE},\n\"cluster\": \"http://a:1\"}}"),
                7,
                "line 2: \"Nodes\" sets it, too",
            ),
            // Values: the parser's, and those that do not fit together.
            ("{\n\n\"tick\": \"fast\"}".into(), 3, "\"tick\": invalid value 'fast'"),
            ("{\n\"tick\": 50}".into(), 2, "\"tick\": invalid value '50'"),
            ("{\n\"port\": 99999}".into(), 2, "\"port\": invalid value '99999'"),
            ("{\n\"port\":\n1.5}".into(), 2, "\"port\": invalid value '1.5'"),
            ("{\n\"ID\": \"one\"}".into(), 2, "\"ID\": invalid value 'one'"),
            ("{\n\"ack\": \"maybe\"}".into(), 2, "[possible values: committed, proposed]"),
            ("{\n\"join\": \"perhaps\"}".into(), 2, "\"join\""),
            ("{\n\"data-dir\": \"\"}".into(), 2, "\"data-dir\""),
            ("{\n\"data-dir\": 5}".into(), 2, "\"data-dir\": write a string"),
            ("{\n\"port\": null}".into(), 2, "\"port\": write a string, a number"),
            ("{\n\"port\": [1]}".into(), 2, "\"port\": write a string, a number"),
            ("{\n\"cluster\": [1]}".into(), 2, "\"cluster\": write an array of strings"),
            ("{\n\"cluster\": {\"port\": 1}}".into(), 2, "\"cluster\": write an array"),
            ("{\n\"cluster\": []}".into(), 2, "item 1 is empty"),
            ("{\n\"tick\": \"0s\"}".into(), 2, "\"tick\": --tick must be 1ms to 1min, not 0ns"),
            ("{\n\"port\": 1,\n\"id\": 2}".into(), 3, "\"id\": --id 2 has no peer URL"),
            (format!("{{{THREE},\n\"ID\": 4}}"), 6, "\"ID\": --id 4 has no peer URL"),
            (
                "{\n\"cluster\": [\"http://a:1\",\n\"a:2\"]}".into(),
                2,
                "does not start with http://",
            ),
            // Nodes.
            (nodes(""), 2, "\"Nodes\": it lists no member"),
            ("{\n\"Nodes\": {}}".into(), 2, "\"Nodes\": write [{"),
            (nodes("\n1"), 4, "\"Nodes\": write [{"),
            (nodes("\n{\"ID\": 1}"), 4, "is missing"),
            (nodes("\n{\"ID\": 1,\n\"Port\": 1}"), 5, "unknown field \"Port\""),
            (nodes("\n{\"ID\": 1,\n\"ID\": 1}"), 5, "\"ID\" twice"),
            (nodes("\n{\"ID\": \"one\", \"Endpoint\": \"a:1\"}"), 4, "ID \"one\" is no member id"),
            (nodes("\n{\"ID\": [1], \"Endpoint\": \"a:1\"}"), 4, "is no member id"),
            (nodes("\n{\"ID\": 1, \"Endpoint\": 1}"), 4, "\"Nodes\": write [{"),
            (nodes("\n{\"ID\": 1,\n\"Endpoint\": \"a\"}"), 5, "names no port"),
            (nodes("\n{\"ID\": 1, \"Endpoint\": \"ftp://a:1\"}"), 4, "does not start with http://"),
            (nodes("\n{\"ID\": 1, \"Endpoint\": \"a:1,b:2\"}"), 4, "no peer URL"),
            (nodes(&[node("1"), node("1")].join(",")), 5, "ID 1 twice"),
            (nodes(&[node("1"), node("3")].join(",")), 5, "ID 3, but no ID 2"),
            (nodes(&[node("0"), node("1")].join(",")), 4, "ID 0, but no ID 1"),
            (nodes(&[node("1"), node("2")].join(",")), 2, "twice: give each member its own URL"),
        ] {
            let error = read(&text, "").expect_err(&text);
            let place = format!("FILE, line {line}: ");
            assert!(error.starts_with(&place), "{text}\n{place}: {error}");
            assert!(error.contains(named), "{text}\n{named}: {error}");
        }
        let latin_1 = read(b"{\n\"data-dir\": \"\xe9\"}", "").expect_err("no UTF-8");
        assert!(latin_1.starts_with("FILE, line 2: "), "{latin_1}");
        // The line of the field, not of the same word in a string or deeper down.
        let twins = "{\"data-dir\": \"\\\"tick\\\": 1\",\n\"Nodes\": [{\"ID\": 1,\n\"Endpoint\": \"a:1\"}],\n\"ID\": 0}";
        let error = read(twins, "").expect_err("id 0");
        assert!(error.starts_with("FILE, line 4: \"ID\": --id must"), "{error}");
    }

    #[test]
    fn a_value_that_a_flag_replaces_must_be_valid_too() {
        let error = read("{\n\"tick\": \"fast\"}", "--tick 20ms").expect_err("a bad file");
        assert!(error.starts_with("FILE, line 2: \"tick\""), "{error}");
    }

    #[test]
    fn damage_anywhere_is_refused_in_one_line_or_harmless() {
        let text = format!("{{\"tick\": \"50ms\", \"ID\": 1, {THREE}, \"port\": 2}}").into_bytes();
        for place in 0..text.len() {
            let mut damaged = vec![text[..place].to_vec()];
            for byte in *b"\"\\{[,0\xff\0" {
                let mut other = text.clone();
                other[place] = byte;
                damaged.push(other);
            }
            for text in damaged {
                if let Err(error) = read(&text, "") {
                    assert!(error.starts_with("FILE, line "), "{error}");
                }
            }
        }
    }

    #[test]
    fn an_error_that_quotes_line_feeds_is_one_line() {
        for (text, end) in [
            (r#"{"tick": "a\n\nb"}"#, r"\n\nb' for '--tick <TIME>': expected number at 0"),
            (
                "{\"Nodes\": [{\"ID\": [\n\n1],\n\"Endpoint\": \"a:1\"}]}",
                r"ID [\n\n1] is no member id: give a number from 1 on",
            ),
        ] {
            let error = read(text, "").expect_err(text);
            assert!(error.ends_with(end), "{error}");
        }
    }

    /// Reads these variables. A configuration is shown by its tick and its warnings.
    fn environment(variables: &[(&[u8], &str)]) -> Result<(Duration, Vec<String>), String> {
        let variables = variables
            .iter()
            .map(|(name, value)| (OsString::from_vec(name.to_vec()), OsString::from(*value)));
        let config = Config::read([OsString::from("raftexample")], variables);
        let config = config.map_err(|error| one_line(&error))?;
        config.check().map_err(|error| error.to_string())?;
        Ok((config.tick, config.warnings))
    }

    #[test]
    fn an_error_in_the_environment_names_the_variable() {
        for (name, value, why) in [
            ("RAFTEXAMPLE_TICK", "a\n\nb", r"invalid value 'a\n\nb'"),
            ("RAFTEXAMPLE_TICK", "0s", "--tick must be"),
            ("RAFTEXAMPLE_CONFIG", "/nowhere", "cannot read --config /nowhere: No such file"),
            ("RAFTEXAMPLE_PEER_URL", "https://a:1", "--cluster has http://127.0.0.1:9021"),
            ("RAFTEXAMPLE_CLUSTER", "https://a:1", "--peer-cert, --peer-key and --peer-ca"),
        ] {
            let error = environment(&[(name.as_bytes(), value)]).expect_err(name);
            assert!(error.starts_with(&format!("{name}: {why}")), "{error}");
        }
    }

    #[test]
    fn two_variables_for_one_flag_are_refused() {
        let twice = environment(&[(b"RAFTEXAMPLE_TICK", "1s"), (b"RAFTEXAMPLE_tick", "2s")]);
        let why = "RAFTEXAMPLE_tick: RAFTEXAMPLE_TICK sets it, too; remove one of them";
        assert_eq!(twice, Err(why.to_owned()));
        let one = environment(&[(b"RAFTEXAMPLE_TICK", ""), (b"RAFTEXAMPLE_tick", "2s")]);
        assert_eq!(one, Ok((Duration::from_secs(2), Vec::new())), "an empty one is unset");
    }

    #[test]
    fn a_variable_with_an_odd_name_is_ignored_with_a_warning() {
        // The second ends with the sign for Kelvin, a capital K of its own.
        for name in [&b"RAFTEXAMPLE_TICK\xff"[..], "RAFTEXAMPLE_TIC\u{212a}".as_bytes()] {
            let (tick, warnings) = environment(&[(name, "2s")]).expect("it is ignored");
            assert_eq!((tick, warnings.len()), (Duration::from_millis(100), 1), "{warnings:?}");
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let arguments = ["raftexample", "--config", "/nowhere/raft.json"].map(OsString::from);
        let error = Config::read(arguments, std::iter::empty()).expect_err("no file").to_string();
        assert!(error.contains("cannot read --config /nowhere/raft.json: No such file"), "{error}");
    }
}
