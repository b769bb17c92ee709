//! The commands that ask running members over HTTP: `status`, `member`, `put`, `get`, `delete`, `list`,
//! `watch`, `txn` and `snapshot save`.
//!
//! [`keys`] and [`watch`] use the [application port](crate::ports::application); [`members`] and [`save`] use the [admin port](crate::ports::admin).
//! [`http`] tries the endpoints in order and decides after which failures it may try the next.

mod http;
pub mod keys;
pub mod log_level;
pub mod members;
pub mod save;
pub mod watch;

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use reqwest::Url;
use serde_json::Value;

use self::http::Client;
use crate::error::{Result, output_failed};
use crate::logging::printable;

/// The longest text in a table, in bytes: as long as the longest peer URL.
const TEXT_BYTES_MAX: usize = 256;

/// The largest `--timeout`.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// How to connect to members.
#[derive(Clone, Debug, Args)]
pub struct Reach {
    /// CA certificates that members' certificates are verified with, PEM; required for https://
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,

    /// Client certificate, PEM; required if the members run with --client-ca
    #[arg(long, value_name = "FILE", requires = "private_key")]
    cert: Option<PathBuf>,

    /// Private key of --cert, PEM
    #[arg(id = "private_key", long = "key", value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,

    /// How long to wait for each endpoint
    #[arg(long, value_name = "TIME", value_parser = parse_timeout, default_value = "5s")]
    timeout: Duration,
}

/// The variables that set the default endpoints.
const ADMIN_VARIABLE: &str = "RAFTEXAMPLE_ENDPOINT";
const APPLICATION_VARIABLE: &str = "RAFTEXAMPLE_API_ENDPOINT";

/// The value of `variable`, if it is set and not empty.
fn default_endpoint(variable: &str, otherwise: &str) -> String {
    std::env::var(variable).ok().filter(|value| !value.is_empty()).unwrap_or(otherwise.to_owned())
}

/// Parses endpoints, with the name of `variable` in an error if that is where the text comes from.
fn endpoint_parser(
    variable: &'static str,
) -> impl Fn(&str) -> std::result::Result<String, String> + Clone {
    move |text| {
        parse_endpoint(text).map_err(|why| match default_endpoint(variable, "") {
            value if value.split(',').any(|endpoint| endpoint == text) => {
                format!("{variable}: {why}")
            }
            _ => why,
        })
    }
}

/// The admin ports to ask.
#[derive(Clone, Debug, Args)]
pub struct AdminEndpoints {
    /// Admin ports (--admin) of members, comma-separated; tried in order until one answers; RAFTEXAMPLE_ENDPOINT sets the default
    #[arg(
        long,
        value_name = "URL",
        value_delimiter = ',',
        value_parser = endpoint_parser(ADMIN_VARIABLE),
        default_value = default_endpoint(ADMIN_VARIABLE, "http://127.0.0.1:12381")
    )]
    endpoint: Vec<String>,

    #[command(flatten)]
    reach: Reach,
}

/// The application ports to ask.
#[derive(Clone, Debug, Args)]
pub struct ApplicationEndpoints {
    /// Application ports (--api) of members, comma-separated; tried in order until one answers; RAFTEXAMPLE_API_ENDPOINT sets the default
    #[arg(
        long,
        value_name = "URL",
        value_delimiter = ',',
        value_parser = endpoint_parser(APPLICATION_VARIABLE),
        default_value = default_endpoint(APPLICATION_VARIABLE, "http://127.0.0.1:12382")
    )]
    endpoint: Vec<String>,

    #[command(flatten)]
    reach: Reach,
}

impl AdminEndpoints {
    fn client(&self) -> Result<Client> {
        Client::new(&self.endpoint, &self.reach, "--admin")
    }
}

impl ApplicationEndpoints {
    fn client(&self) -> Result<Client> {
        Client::new(&self.endpoint, &self.reach, "--api")
    }
}

fn write(out: &mut dyn Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).map_err(output_failed)
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A string without its quotes, `null` as a dash, and any other value as JSON. A member may have taken it
/// from another one, so it controls no terminal.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => printable(text, TEXT_BYTES_MAX),
        other => printable(&other.to_string(), TEXT_BYTES_MAX),
    }
}

/// The JSON of an answer, equal as JSON. It controls no terminal either.
fn json_text(answer: &str) -> String {
    let mut text = String::with_capacity(answer.len());
    for c in answer.chars() {
        match c {
            '\n' => text.push(c),
            // Between two parts: inside a string it would be escaped.
            '\r' | '\t' => text.push(' '),
            c if c.is_control() => text.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => text.push(c),
        }
    }
    text
}

fn parse_timeout(text: &str) -> std::result::Result<Duration, String> {
    let timeout = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let is_usable = !timeout.is_zero() && timeout <= TIMEOUT_MAX;
    if is_usable { Ok(timeout) } else { Err("it must be more than 0s and at most 1day".into()) }
}

/// An endpoint, without a slash at the end.
fn parse_endpoint(text: &str) -> std::result::Result<String, String> {
    let wanted = || "it must be http://HOST:PORT or https://HOST:PORT".to_owned();
    let url: Url = text.parse().map_err(|_| wanted())?;
    let endpoint = text.trim_end_matches('/');
    let is_bare = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
    let is_anonymous = url.username().is_empty() && url.password().is_none();
    let is_http = endpoint.starts_with("http://") || endpoint.starts_with("https://");
    if is_http && is_bare && is_anonymous { Ok(endpoint.to_owned()) } else { Err(wanted()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_member_answers_controls_no_terminal() {
        assert_eq!(text(&Value::from("http://a:1 \x1b[2J\u{9b}J")), r"http://a:1 \u{1b}[2J\u{9b}J");
        assert!(text(&Value::from("x".repeat(9000))).len() <= TEXT_BYTES_MAX);
        let answer = "{\r\t\"version\": \"\\u001b \u{9b}\u{7f}\"}\n";
        let json = json_text(answer);
        assert_eq!(json, "{  \"version\": \"\\u001b \\u009b\\u007f\"}\n");
        let parsed = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
        assert_eq!(parsed(&json), parsed(answer));
    }

    #[test]
    fn an_endpoint_is_a_scheme_a_host_and_a_port() {
        for (text, endpoint) in [
            ("http://127.0.0.1:1", "http://127.0.0.1:1"),
            ("https://[::1]:1/", "https://[::1]:1"),
            ("http://localhost:1", "http://localhost:1"),
        ] {
            assert_eq!(parse_endpoint(text).expect(text), endpoint);
        }
        for text in [
            "127.0.0.1:1",
            "localhost:1",
            "",
            "ftp://h:1",
            "http://h:1/x",
            "http://h:1/?x",
            "http://h:1/#x",
            "http://me@h:1",
            "http://",
        ] {
            assert!(parse_endpoint(text).is_err(), "{text}");
        }
    }
}
