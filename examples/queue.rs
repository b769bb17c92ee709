//! A work queue for several processes, over the application ports of a cluster's members.
//!
//! A job is a key `/queue/jobs/ID`. A worker claims it by a PUT with `If-Match`, of its name and
//! lease, and renews the claim while its command runs. A transaction then deletes the job and
//! stores the output as `/queue/results/ID`, if the ETag is still the claim's. So each job has one
//! result. If a worker dies, or pauses for longer than its lease, its command may run twice, even
//! at the same time: a lease is no lock. The ETag refuses a late result, and cannot undo what the
//! command did. So be idempotent by `QUEUE_KEY`, or refuse a `QUEUE_FENCE` below one seen.

use anyhow::{Context, Error, Result, bail, ensure};
use base64::{Engine, prelude::BASE64_STANDARD as BASE64};
use raftexample::ports::tls::no_tls;
use reqwest::{Client, RequestBuilder};
use serde_json::{Value, json};
use std::{cell::RefCell, collections::HashMap, pin::pin, process::Stdio, time::Duration};
use tokio::{process::Command, time::Instant, time::sleep, time::timeout};

type Written = Result<Option<Value>>;

struct Store {
    http: Client,
    urls: RefCell<Vec<String>>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let urls = args.get(1).unwrap_or(&"").split(',').map(Into::into).collect();
    let http = Client::builder().no_proxy().tls_backend_preconfigured(no_tls()).build()?;
    let store = &Store { http, urls: RefCell::new(urls) };
    match &args[..] {
        [_, _, "add", ids @ ..] => add(store, ids).await,
        [_, _, "work", name, lease, run, args @ ..] => work(store, name, lease, run, args).await,
        _ => bail!("usage: queue URL,URL add ID... | queue URL,URL work NAME LEASE COMMAND..."),
    }
}

/// A job that is known stays as it is, even if it is done.
async fn add(store: &Store, ids: &[&str]) -> Result<()> {
    for id in ids {
        let is_plain = id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
        ensure!(is_plain, "{id:?} may change in a URL: use letters, digits, - and _");
        let (job, result) = (format!("/queue/jobs/{id}"), format!("/queue/results/{id}"));
        let is_new = json!([{"key": job, "absent": true}, {"key": result, "absent": true}]);
        let add = json!({"if": is_new, "then": [{"put": job, "value": BASE64.encode("{}")}]});
        store.write("/v1/txn", |url| store.http.post(url).body(add.to_string())).await?;
    }
    Ok(())
}

async fn work(store: &Store, name: &str, lease: &str, run: &str, args: &[&str]) -> Result<()> {
    let lease = humantime::parse_duration(lease)?;
    let claim = &json!({"worker": name, "lease_ms": lease.as_millis() as u64}).to_string();
    // By ETag: when the job is free, counted from when this process saw the ETag, and the key.
    let mut jobs: HashMap<String, (Instant, String)> = HashMap::new();
    loop {
        // Up to 1000 jobs. A longer queue would be read on with `after` and the page's `next`.
        let path = "/v1/keys?prefix=/queue/jobs/&limit=1000&values=true";
        let (page, now) = (store.ask(path, |url| store.http.get(url)).await, Instant::now());
        let listed = page["keys"].as_array().context("no keys")?.iter().filter_map(|shown| {
            let (key, etag) = (shown["key"].as_str()?, shown["etag"].as_str()?);
            let value = BASE64.decode(shown["value"].as_str()?).ok()?;
            let claim = serde_json::from_slice::<Value>(&value).ok()?;
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
        let (id, path) = (key.trim_start_matches("/queue/jobs/"), &format!("/v1/kv{key}"));
        let claim_if = async |etag: &Value| {
            let put = |url| store.http.put(url).header("If-Match", etag.to_string());
            store.write(path, |url| put(url).body(claim.clone())).await
        };
        let Some(mut etag) = claim_if(&json!(etag)).await? else { continue };
        println!("claimed {key}");
        let mut command = Command::new(run);
        command.args(args).arg(id).stdin(Stdio::null()).stderr(Stdio::inherit()).kill_on_drop(true);
        let (_, index) = etag.as_str().and_then(|etag| etag.rsplit_once('-')).context("no ETag")?;
        command.env("QUEUE_KEY", key).env("QUEUE_FENCE", index);
        let mut running = pin!(command.output());
        let output = loop {
            if let Ok(output) = timeout(lease / 3, &mut running).await {
                break output.context("cannot run the command")?;
            }
            etag = claim_if(&etag).await?.unwrap_or(etag);
        };
        let output = String::from_utf8_lossy(&output.stdout);
        let value = BASE64.encode(json!({"worker": name, "output": output}).to_string());
        let ops = json!([{"delete": key}, {"put": format!("/queue/results/{id}"), "value": value}]);
        let end = json!({"if": [{"key": key, "etag": etag}], "then": ops});
        let end = store.write("/v1/txn", |url| store.http.post(url).body(end.to_string())).await?;
        println!("{} {key}", if end.is_some() { "done" } else { "lost" });
    }
}

impl Store {
    /// Carries out a write once. None if a condition does not hold; one must not hold after it.
    async fn write(&self, path: &str, request: impl Fn(String) -> RequestBuilder) -> Written {
        loop {
            let issued = self.ask("/v1/retry-token", |url| self.http.post(url)).await;
            let token = issued["token"].as_str().context("no token: are these other ports?")?;
            let answer = self.ask(path, |url| request(url).header("Idempotency-Key", token)).await;
            let is_done = answer.is_string() || answer["succeeded"] == true;
            if is_done || answer["succeeded"] == false || answer["status"] == 412 {
                return Ok(is_done.then_some(answer));
            }
            // The token is forgotten. If the write was carried out, a condition now refuses it.
            ensure!(answer["status"] == 409, "{answer}");
        }
    }

    /// Asks one member after the other until one answers. After a 503 nothing was done; after a 504
    /// or a lost connection that is unknown, so a write needs a retry token.
    async fn ask(&self, path: &str, request: impl Fn(String) -> RequestBuilder) -> Value {
        loop {
            let answer = async {
                let url = format!("{}{path}", self.urls.borrow()[0]);
                let mut answer = request(url).send().await?;
                ensure!(!answer.status().is_server_error(), "{}", answer.status());
                // The answer to a PUT has no body. Its ETag, in quotes, is a line of JSON as well.
                let etag = answer.headers().get("etag").map_or(Ok(""), |etag| etag.to_str())?;
                let mut body = etag.to_owned();
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
            self.urls.borrow_mut().rotate_left(1);
            sleep(Duration::from_millis(200)).await;
        }
    }
}
