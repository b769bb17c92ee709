//! `watch`: prints changes as they happen.

use std::io::Write;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use reqwest::header::{HeaderName, HeaderValue};
use reqwest::{Method, Response};
use serde_json::Value;
use tokio::time::{sleep, timeout};

use super::http::{AttemptError, Client, Request};
use super::keys::{consistency, percent_encoded};
use super::{ApplicationEndpoints, json_text, text, write};
use crate::error::{Error, Result, output_failed};
use crate::logging::printable;

/// A member sends a comment every 15 seconds. After this much silence the connection counts as broken.
const SILENCE_MAX: Duration = Duration::from_secs(45);
/// The pause before a broken watch is resumed.
const RESUME_PAUSE: Duration = Duration::from_millis(200);
/// The longest event that is read.
const EVENT_BYTES_MAX: usize = 1 << 20;
/// The longest reason of a reset that is shown.
const REASON_BYTES_MAX: usize = 256;

/// `watch`: prints changes.
#[derive(Clone, Debug, Args)]
pub struct Watch {
    /// Only keys that start with this
    #[arg(long, value_name = "PREFIX", default_value = "")]
    prefix: String,

    /// Begin after this place: an index, an ETag without quotes, or the id of an event [default: now]
    #[arg(long, value_name = "PLACE")]
    from: Option<String>,

    /// Follow the member's own state, also where it is stale
    #[arg(long)]
    local: bool,

    /// Print JSON, one object a line, with values of up to 64 KiB in base64
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    at: ApplicationEndpoints,
}

/// Begins the watch at `endpoint`, which is returned, too.
async fn open(
    client: &Client,
    endpoint: &str,
    request: &Request,
) -> std::result::Result<(String, Response), AttemptError> {
    let sent = timeout(client.timeout, client.send(endpoint, request)).await;
    let response = sent.unwrap_or_else(|_| Err(client.timed_out(endpoint)))?;
    Ok((endpoint.to_owned(), response))
}

impl Watch {
    /// Writes a line for each change to `out`, until it is interrupted. A broken connection is resumed at the
    /// next endpoint, without a gap or a repetition.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let client = self.at.client()?;
        let (prefix, values) = (percent_encoded(&self.prefix), self.json);
        let from = self.from.as_deref().map(percent_encoded);
        let from = from.map(|from| format!("&from={from}")).unwrap_or_default();
        let target = format!("/v1/watch?prefix={prefix}&values={values}{from}");
        let mut request = Request::new(Method::GET, &target, Bytes::new());
        request.headers = consistency(self.local);
        client.run(async |client| {
            let (mut client, mut out) = (client.clone(), out);
            let (mut endpoint, mut response) = client
                .each(&request, async |endpoint| open(&client, endpoint, &request).await)
                .await?;
            loop {
                self.follow(response, &mut request, &mut out).await?;
                sleep(RESUME_PAUSE).await;
                // The connection ended. A member that has no leader ends it, and would accept it again, so it
                // is resumed at another one, after the last event.
                client.begin_after(&endpoint);
                let opened = client
                    .each_again(&request, async |endpoint| open(&client, endpoint, &request).await);
                (endpoint, response) = opened.await?;
            }
        })
    }

    /// Prints the events of one connection, and notes in `request` where to resume.
    async fn follow(
        &self,
        mut response: Response,
        request: &mut Request,
        out: &mut dyn Write,
    ) -> Result<()> {
        let mut text = Vec::new();
        loop {
            let chunk = match timeout(SILENCE_MAX, response.chunk()).await {
                Ok(Ok(Some(chunk))) => chunk,
                _ => return Ok(()),
            };
            text.extend_from_slice(&chunk);
            while let Some(end) = text.windows(2).position(|pair| pair == b"\n\n") {
                let rest = text.split_off(end + 2);
                let event = std::mem::replace(&mut text, rest);
                self.show(&String::from_utf8_lossy(&event), request, out)?;
            }
            if text.len() > EVENT_BYTES_MAX {
                let why = format!("an event of more than {EVENT_BYTES_MAX} bytes: is it a member?");
                return Err(Error::Refused(why));
            }
        }
    }

    fn show(&self, event: &str, request: &mut Request, out: &mut dyn Write) -> Result<()> {
        let field = |name: &str| {
            let mut lines = event.lines().filter_map(|line| line.split_once(": "));
            lines.find(|(found, _)| *found == name).map(|(_, value)| value)
        };
        if let Some(Ok(id)) = field("id").map(str::parse::<HeaderValue>) {
            request.headers.insert(HeaderName::from_static("last-event-id"), id);
        }
        let (Some(kind), Some(data)) = (field("event"), field("data")) else { return Ok(()) };
        let data: Value = serde_json::from_str(data)
            .map_err(|error| Error::Refused(format!("an event is no JSON: {error}")))?;
        let line = if self.json {
            let id = field("id").unwrap_or_default();
            json_text(&serde_json::json!({ "event": kind, "id": id, "data": data }).to_string())
        } else {
            match kind {
                "put" => {
                    let (key, bytes) = (text(&data["key"]), text(&data["bytes"]));
                    format!("put {key} {bytes} bytes {}", text(&data["etag"]))
                }
                "delete" => format!("delete {}", text(&data["key"])),
                _ => {
                    let reason = data["reason"].as_str().unwrap_or_default();
                    format!("reset: {}", printable(reason, REASON_BYTES_MAX))
                }
            }
        };
        write(out, format!("{line}\n").as_bytes())?;
        out.flush().map_err(output_failed)
    }
}
