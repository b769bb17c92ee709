//! `put` and `get`.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use bytes::Bytes;
use clap::Args;
use reqwest::header::HeaderValue;
use reqwest::{Method, Url};

use super::http::Request;
use super::{ClientEndpoints, write};
use crate::error::{Error, Result};

/// `put`: sets a key.
#[derive(Clone, Debug, Args)]
pub struct Put {
    /// Key: a URL path, sent as it is (percent-encoding included); a missing first / is added
    key: String,

    /// Value; - reads it from standard input, and after -- it may start with a dash
    #[arg(allow_negative_numbers = true)]
    value: OsString,

    #[command(flatten)]
    at: ClientEndpoints,
}

/// `get`: prints a value.
#[derive(Clone, Debug, Args)]
pub struct Get {
    /// Key: a URL path, sent as it is (percent-encoding included); a missing first / is added
    key: String,

    /// Read the member's own state without asking a majority; the value may be stale
    #[arg(long)]
    local: bool,

    #[command(flatten)]
    at: ClientEndpoints,
}

impl Put {
    /// Sets the key, and writes `OK` to `out`.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let client = self.at.client()?;
        let target = target(&self.key)?;
        let mut value = self.value.clone().into_vec();
        if value == b"-" {
            value.clear();
            let failed = Error::io("read", Path::new("standard input"));
            io::stdin().lock().read_to_end(&mut value).map_err(failed)?;
        }
        let request = Request::new(Method::PUT, &target, value.into());
        client.run(async |client| client.ask(&request).await)?;
        write(out, b"OK\n")
    }
}

impl Get {
    /// Writes the value to `out`, and a line feed after it if standard output is a terminal.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let client = self.at.client()?;
        let target = target(&self.key)?;
        let mut request = Request::new(Method::GET, &target, Bytes::new());
        if self.local {
            request.headers.insert("raft-read", HeaderValue::from_static("local"));
        }
        let answer = client.run(async |client| client.ask(&request).await)?;
        if answer.is_absent {
            return Err(Error::Refused(format!("{target} does not exist")));
        }
        write(out, &answer.body)?;
        if io::stdout().is_terminal() { write(out, b"\n") } else { Ok(()) }
    }
}

/// The request target for `key`: the same bytes, with a first slash.
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
        return Ok(wanted);
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
            assert_eq!(target(key).expect(key), sent);
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
