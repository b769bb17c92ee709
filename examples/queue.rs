//! A work queue for several processes, over the application ports of a cluster's members.
//!
//! A job is a key `/queue/jobs/ID`. A worker claims it: a transaction stores its name and lease if
//! the ETag is still the listed one, as a PUT with `If-Match` does. It renews the claim while its
//! command runs. A last transaction deletes the job and stores the output as `/queue/results/ID`,
//! if the ETag is still the claim's. So each job has one result. Its command may run twice, even at
//! the same time, if a worker dies, or pauses for longer than its lease: a lease is no lock, it
//! bounds how long a dead worker keeps a job. The ETag refuses a late result, but cannot undo what
//! the command did elsewhere. There, be idempotent by `QUEUE_KEY`, or refuse a `QUEUE_FENCE` (the
//! claim's log index) below one seen. No clocks are compared: see `jobs`.

use anyhow::{Context, Error, Result, bail, ensure};
use base64::{Engine, prelude::BASE64_STANDARD as BASE64};
use reqwest::{Client, RequestBuilder};
use serde_json::{Value, json};
use std::{cell::Cell, collections::HashMap, pin::pin, process::Stdio, time::Duration};
use tokio::{process::Command, time::Instant, time::sleep, time::timeout};

const USAGE: &str = "usage: queue URL,URL add ID... | queue URL,URL work NAME LEASE COMMAND...";

struct Store {
    http: Client,
    urls: Vec<String>,
    member: Cell<usize>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [urls, action, args @ ..] = &args[..] else { bail!(USAGE) };
    // This package builds reqwest without a TLS provider.
    let tls = raftexample::ports::tls::no_tls();
    let http = Client::builder().no_proxy().tls_backend_preconfigured(tls).build()?;
    let store =
        Store { http, urls: urls.split(',').map(Into::into).collect(), member: Cell::new(0) };
    match (&action[..], args) {
        ("add", ids) => add(&store, ids).await,
        ("work", [name, lease, run, args @ ..]) => work(&store, name, lease, run, args).await,
        _ => bail!(USAGE),
    }
}

/// A job that is known stays as it is, even if it is done.
async fn add(store: &Store, ids: &[String]) -> Result<()> {
    for id in ids {
        let (job, result) = (format!("/queue/jobs/{id}"), format!("/queue/results/{id}"));
        let is_new = json!([{"key": job, "absent": true}, {"key": result, "absent": true}]);
        store.transact(is_new, &json!([{"put": job, "value": BASE64.encode("{}")}])).await?;
    }
    Ok(())
}

async fn work(store: &Store, name: &str, lease: &str, run: &str, args: &[String]) -> Result<()> {
    let lease = humantime::parse_duration(lease)?;
    let claim = json!({"worker": name, "lease_ms": lease.as_millis() as u64});
    let claim = BASE64.encode(claim.to_string());
    // By ETag: when the job is free, counted from when this process saw the ETag, and the key.
    let mut jobs: HashMap<String, (Instant, String)> = HashMap::new();
    loop {
        // Up to 1000 jobs. A longer queue would be read on with `after` and the page's `next`.
        let path = "/v1/keys?prefix=/queue/jobs/&limit=1000&values=true";
        let (page, now) = (store.ask(path, |url| store.http.get(url)).await, Instant::now());
        let listed = page["keys"].as_array().context("no keys")?.iter().filter_map(|shown| {
            let (key, etag) = (shown["key"].as_str()?, shown["etag"].as_str()?);
            let value = BASE64.decode(shown["value"].as_str()?).ok()?;
            let claim: Value = serde_json::from_slice(&value).ok()?;
            let lease = Duration::from_millis(claim["lease_ms"].as_u64().unwrap_or(0));
            let free_at = jobs.get(etag).map_or(now + lease, |known| known.0);
            Some((etag.to_owned(), (free_at, key.to_owned())))
        });
        jobs = listed.collect();
        let first = jobs.iter().min_by_key(|(_, (free_at, _))| *free_at);
        let wait = first.map_or(lease, |(_, (free_at, _))| *free_at - now);
        let Some((etag, (_, key))) = first.filter(|_| wait.is_zero()) else {
            let from = page["from"].as_str().context("no place to watch from")?;
            let path = format!("/v1/watch?prefix=/queue/jobs/&from={from}");
            // The member may hang, so list again after a while.
            let _ = timeout(wait.min(lease / 3), store.ask(&path, |url| store.http.get(url))).await;
            continue;
        };
        let id = key.trim_start_matches("/queue/jobs/");
        let claim = json!([{"put": key, "value": claim}]);
        let is = |etag: &Value| json!([{"key": key, "etag": etag}]);
        let Some(mut claimed) = store.transact(is(&json!(etag)), &claim).await? else { continue };
        println!("claimed {key}");
        let mut command = Command::new(run);
        command.args(args).arg(id).stdin(Stdio::null()).stderr(Stdio::inherit()).kill_on_drop(true);
        command.env("QUEUE_KEY", key).env("QUEUE_FENCE", claimed["index"].to_string());
        let mut running = pin!(command.output());
        let output = loop {
            if let Ok(output) = timeout(lease / 3, &mut running).await {
                break output.context("cannot run the command")?;
            }
            let renewed = store.transact(is(&claimed["results"][0]["etag"]), &claim).await?;
            claimed = renewed.unwrap_or(claimed);
        };
        let output = String::from_utf8_lossy(&output.stdout);
        let value = BASE64.encode(json!({"worker": name, "output": output}).to_string());
        let end = json!([{"delete": key}, {"put": format!("/queue/results/{id}"), "value": value}]);
        let ended = store.transact(is(&claimed["results"][0]["etag"]), &end).await?;
        println!("{} {key}", if ended.is_some() { "done" } else { "lost" });
    }
}

impl Store {
    /// Carries out a transaction once, if its conditions hold. One of them must not hold after it.
    async fn transact(&self, conditions: Value, then: &Value) -> Result<Option<Value>> {
        let txn = json!({"if": conditions, "then": then}).to_string();
        loop {
            let issued = self.ask("/v1/retry-token", |url| self.http.post(url)).await;
            let token = issued["token"].as_str().context("no token: are these other ports?")?;
            let post = |url| self.http.post(url).header("Idempotency-Key", token).body(txn.clone());
            let answer = self.ask("/v1/txn", post).await;
            match answer["succeeded"].as_bool() {
                Some(succeeded) => return Ok(succeeded.then_some(answer)),
                // The members have forgotten the token, and may have carried out the transaction.
                // If they have, a condition no longer holds, so another token is safe.
                None if answer["status"] == 409 => {}
                None => bail!("{answer}"),
            }
        }
    }

    /// Asks one member after the other until one answers. After a 503 nothing was done; after a 504
    /// or a lost connection that is unknown, so a write needs a retry token.
    async fn ask(&self, path: &str, request: impl Fn(String) -> RequestBuilder) -> Value {
        loop {
            let url = &self.urls[self.member.get() % self.urls.len()];
            let answer = async {
                let mut answer = request(format!("{url}{path}")).send().await?;
                ensure!(!answer.status().is_server_error(), "{}", answer.status());
                let mut body = String::new();
                // A watch does not end, but one event is enough. Other bodies are a line of JSON.
                while !body.contains("\nevent:")
                    && let Some(chunk) = answer.chunk().await?
                {
                    body += str::from_utf8(&chunk)?;
                }
                Ok(serde_json::from_str(&body).unwrap_or_default())
            };
            match timeout(Duration::from_secs(20), answer).await.map_err(Error::from).flatten() {
                Ok(answer) => return answer,
                Err(error) => eprintln!("asking the next member: {error:#}"),
            }
            self.member.set(self.member.get() + 1);
            sleep(Duration::from_millis(200)).await;
        }
    }
}
