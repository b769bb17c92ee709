//! `put`, `get`, `delete`, `list` and `txn`.
//!
//! `put` and `delete` take a retry token, and `txn` does unless it reads. With it they go from endpoint to
//! endpoint until they have an outcome.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use clap::Args;
use reqwest::header::{ETAG, HeaderMap, HeaderName, HeaderValue, IF_MATCH, IF_NONE_MATCH};
use reqwest::{Method, Url};
use serde_json::Value;

use super::http::{Answer, Client, Request};
use super::{ApplicationEndpoints, array, json_text, text, write};
use crate::error::{Error, Result};

/// The most keys of one page.
const PAGE_KEYS: usize = 1000;

/// `put`: sets a key.
#[derive(Clone, Debug, Args)]
pub struct Put {
    /// Key: a URL path, sent as it is (percent-encoding included); a missing first / is added
    key: String,

    /// Value; - reads it from standard input, and after -- it may start with a dash
    #[arg(allow_negative_numbers = true)]
    value: OsString,

    #[command(flatten)]
    only: Only,

    /// Only if the key does not exist
    #[arg(long, conflicts_with = "if_match")]
    if_absent: bool,

    #[command(flatten)]
    at: ApplicationEndpoints,
}

/// `delete`: removes a key.
#[derive(Clone, Debug, Args)]
pub struct Delete {
    /// Key: a URL path, sent as it is (percent-encoding included); a missing first / is added
    key: String,

    #[command(flatten)]
    only: Only,

    #[command(flatten)]
    at: ApplicationEndpoints,
}

/// When a write happens.
#[derive(Clone, Debug, Args)]
struct Only {
    /// Only if the key has this ETag, with or without its quotes; get --etag prints it
    #[arg(long, value_name = "ETAG")]
    if_match: Option<String>,

    /// Retry token of an earlier attempt, which is then not carried out twice [default: a new one]
    #[arg(long, value_name = "TOKEN")]
    token: Option<String>,
}

/// `get`: prints a value.
#[derive(Clone, Debug, Args)]
pub struct Get {
    /// Key: a URL path, sent as it is (percent-encoding included); a missing first / is added
    key: String,

    /// Read the member's own state without asking a majority; the value may be stale
    #[arg(long)]
    local: bool,

    /// Print the ETag in place of the value
    #[arg(long)]
    etag: bool,

    #[command(flatten)]
    at: ApplicationEndpoints,
}

/// `list`: prints keys.
#[derive(Clone, Debug, Args)]
pub struct List {
    /// Only keys that start with this
    #[arg(long, value_name = "PREFIX", default_value = "")]
    prefix: String,

    /// Read the member's own state without asking a majority; it may be stale
    #[arg(long)]
    local: bool,

    /// Print JSON, one object a line, with values of up to 64 KiB in base64
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    at: ApplicationEndpoints,
}

/// `txn`: carries a transaction out.
#[derive(Clone, Debug, Args)]
pub struct Transact {
    /// File with the transaction as JSON: {"if": [...], "then": [...], "else": [...]}; - reads it from standard input
    file: PathBuf,

    /// Retry token of an earlier attempt, which is then not carried out twice [default: a new one]
    #[arg(long, value_name = "TOKEN")]
    token: Option<String>,

    #[command(flatten)]
    at: ApplicationEndpoints,
}

impl Put {
    /// Sets the key, and writes `OK` to `out`.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let client = self.at.client()?;
        let target = target(&self.key)?;
        let mut value = self.value.clone().into_vec();
        if value == b"-" {
            value = read_all(Path::new("-"))?;
        }
        let mut request = Request::new(Method::PUT, &target, value.into());
        self.only.add_to(&mut request)?;
        if self.if_absent {
            request.headers.insert(IF_NONE_MATCH, HeaderValue::from_static("*"));
        }
        client.run(async |client| write_once(client, request, self.only.token.as_deref()).await)?;
        write(out, b"OK\n")
    }
}

impl Delete {
    /// Removes the key, and writes `OK` to `out`.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let client = self.at.client()?;
        let target = target(&self.key)?;
        let mut request = Request::new(Method::DELETE, &target, Bytes::new());
        self.only.add_to(&mut request)?;
        let token = self.only.token.as_deref();
        let answer = client.run(async |client| write_once(client, request, token).await)?;
        if answer.is_absent {
            return Err(absent(&self.key));
        }
        write(out, b"OK\n")
    }
}

impl Only {
    fn add_to(&self, request: &mut Request) -> Result<()> {
        if let Some(etag) = &self.if_match {
            let etag = if etag == "*" { etag.clone() } else { quoted(etag) };
            let invalid = |_| Error::Config(format!("--if-match {etag}: it is no ETag"));
            request.headers.insert(IF_MATCH, etag.parse().map_err(invalid)?);
        }
        Ok(())
    }
}

impl Get {
    /// Writes the value to `out`, and a line feed after it if standard output is a terminal.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let client = self.at.client()?;
        let target = target(&self.key)?;
        let method = if self.etag { Method::HEAD } else { Method::GET };
        let mut request = Request::new(method, &target, Bytes::new());
        request.is_repeatable = true;
        request.headers = consistency(self.local);
        let answer = client.run(async |client| client.ask(&request).await)?;
        if answer.is_absent {
            return Err(absent(&self.key));
        }
        if self.etag {
            let etag = answer.headers.get(ETAG).and_then(|etag| etag.to_str().ok());
            return write(out, format!("{}\n", etag.unwrap_or_default()).as_bytes());
        }
        write(out, &answer.body)?;
        if io::stdout().is_terminal() { write(out, b"\n") } else { Ok(()) }
    }
}

impl List {
    /// Writes a line for each key to `out`. Each page is of one moment.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let client = self.at.client()?;
        let mut after = String::new();
        loop {
            let (prefix, values) = (percent_encoded(&self.prefix), self.json);
            let target =
                format!("/v1/keys?prefix={prefix}&limit={PAGE_KEYS}&values={values}{after}");
            let mut request = Request::new(Method::GET, &target, Bytes::new());
            request.headers = consistency(self.local);
            let page = client.run(async |client| client.ask(&request).await)?.json()?;
            for key in array(&page["keys"]) {
                let line = if self.json {
                    json_text(&key.to_string())
                } else {
                    let (name, bytes) = (text(&key["key"]), text(&key["bytes"]));
                    format!("{name} {bytes} bytes {}", text(&key["etag"]))
                };
                write(out, format!("{line}\n").as_bytes())?;
            }
            match page["next"].as_str() {
                Some(next) => after = format!("&after={}", percent_encoded(next)),
                None => return Ok(()),
            }
        }
    }
}

impl Transact {
    /// Carries the transaction out, and writes the response to `out`.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let client = self.at.client()?;
        let body = read_all(&self.file)?;
        let reads = serde_json::from_slice::<Value>(&body).is_ok_and(|txn| {
            let branches = [&txn["then"], &txn["else"]];
            branches.into_iter().flat_map(array).any(|operation| operation.get("get").is_some())
        });
        let request = Request::new(Method::POST, "/v1/txn", body.into());
        let answer = client.run(async |client| match (reads, &self.token) {
            (true, None) => client.ask(&request).await,
            (_, token) => write_once(client, request, token.as_deref()).await,
        })?;
        write(out, json_text(&answer.text()).as_bytes())
    }
}

/// Sends a write with `token` or a new one until it has an outcome.
async fn write_once(client: &Client, mut request: Request, token: Option<&str>) -> Result<Answer> {
    let token = match token {
        Some(token) => token.to_owned(),
        None => {
            let mut issue = Request::new(Method::POST, "/v1/retry-token", Bytes::new());
            issue.is_repeatable = true;
            let issued = client.ask(&issue).await?.json()?;
            issued["token"].as_str().unwrap_or_default().to_owned()
        }
    };
    let value = token.parse::<HeaderValue>();
    let value = value.map_err(|_| Error::Config(format!("--token {token:?}: it is no token")))?;
    request.headers.insert(HeaderName::from_static("idempotency-key"), value);
    request.is_repeatable = true;
    client.ask_until_done(&request, &format!("repeat it with --token {token}")).await
}

fn absent(key: &str) -> Error {
    let slash = if key.starts_with('/') { "" } else { "/" };
    Error::Refused(format!("{slash}{key} does not exist"))
}

/// Reads a file, or standard input if it is `-`.
fn read_all(file: &Path) -> Result<Vec<u8>> {
    if file != Path::new("-") {
        return std::fs::read(file).map_err(Error::io("read", file));
    }
    let (mut all, failed) = (Vec::new(), Error::io("read", Path::new("standard input")));
    io::stdin().lock().read_to_end(&mut all).map_err(failed)?;
    Ok(all)
}

pub(super) fn consistency(local: bool) -> HeaderMap {
    let header = (HeaderName::from_static("raft-read"), HeaderValue::from_static("local"));
    local.then_some(header).into_iter().collect()
}

/// An ETag with its quotes.
fn quoted(etag: &str) -> String {
    if etag.contains('"') { etag.to_owned() } else { format!("\"{etag}\"") }
}

/// Text as the value of a query's parameter.
pub(super) fn percent_encoded(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    let encode = |byte: u8| match is_plain(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}

/// The request target of `key`: the same bytes, with a first slash, below `/v1/kv`.
fn target(key: &str) -> Result<String> {
    let slash = if key.starts_with('/') { "" } else { "/" };
    let wanted = format!("{slash}{key}");
    // A target has no fragment.
    let escaped = wanted.replace('#', "%23");
    let refuse = |why: &str| Err(Error::Config(format!("the key {wanted:?} {why}")));
    let Ok(url) = format!("http://h{escaped}").parse::<Url>() else {
        return refuse("is not the path of a URL: percent-encode the invalid characters");
    };
    let query = url.query().map(|query| format!("?{query}")).unwrap_or_default();
    let sent = format!("{}{query}", url.path());
    if sent == wanted {
        return Ok(format!("/v1/kv{wanted}"));
    }
    refuse(&format!("cannot be sent as it is: give it as {sent:?}, which is then the key"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_sent_as_it_is_or_refused_with_what_to_write() {
        for (key, sent) in [
            ("key", "/key"),
            ("/key", "/key"),
            ("", "/"),
            ("/a%20b", "/a%20b"),
            ("/a%2fb", "/a%2fb"),
            ("//a//b", "//a//b"),
            ("/a?b=c&d", "/a?b=c&d"),
            ("/a?", "/a?"),
            ("http://h/x", "/http://h/x"),
        ] {
            assert_eq!(target(key).expect(key), format!("/v1/kv{sent}"));
        }
        for (key, advice) in [
            ("/a b", "\"/a%20b\""),
            ("/a#b", "\"/a%23b\""),
            ("/ä", "\"/%C3%A4\""),
            ("/a/../b", "\"/b\""),
            ("/a\nb", "cannot be sent as it is"),
            ("/a<b", "\"/a%3Cb\""),
            ("/a\\b", "\"/a/b\""),
        ] {
            let error = target(key).expect_err(key).to_string();
            assert!(error.contains(advice), "{key}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}
