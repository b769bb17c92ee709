//! The commands that ask running members, over HTTP: `status`, `member`, `put`, `get` and
//! `snapshot save`.
//!
//! `put` and `get` speak to the client port, all others to the [admin listener](crate::ports::admin).
//! Endpoints are asked in the order given. The next one is asked where the one before did nothing: it
//! could not be reached, or answered 503. What only reads goes on after any failure but a refusal. A
//! write never does: once it was sent it may have happened, and sent again it could undo a later one.
//! So the command ends then, and says that the outcome is unknown.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use clap::{Args, Subcommand};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use reqwest::header::{HeaderMap, HeaderValue};
use reqwest::{Method, Response, StatusCode, Url};
use serde_json::Value;
use tempfile::NamedTempFile;
use tokio::time::{sleep, timeout};

use crate::error::{Error, Result};
use crate::kvstore::read_records;
use crate::ports::tls::{command_config, no_tls, tls_error};
use crate::storage::ReadOnlyVfs;
use crate::storage::snapshotter::load_file;

/// Beyond `--timeout`: a member with the same deadline says at its end what became of the request,
/// and that is worth hearing.
const ANSWER_SLACK: Duration = Duration::from_millis(500);
/// How often, and how far apart, what another member did just now is looked for.
const LOOKS: u32 = 10;
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// The characters of a refusal that are shown.
const REFUSAL_CHARS_MAX: usize = 500;
/// The body of the 404 that says that there is no such key.
const ABSENT: &[u8] = b"Failed to GET\n";

/// How members are reached.
#[derive(Clone, Debug, Args)]
pub struct Reach {
    /// The authorities whose certificates members have for clients, PEM; for https:// endpoints
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,

    /// A certificate of the members' --client-ca, PEM
    #[arg(long, value_name = "FILE", requires = "private_key")]
    pub cert: Option<PathBuf>,

    /// The private key of --cert, PEM
    #[arg(id = "private_key", long = "key", value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,

    /// How long one endpoint may take to answer
    #[arg(long, value_parser = parse_timeout, default_value = "5s")]
    pub timeout: Duration,
}

/// Where the admin listeners are.
#[derive(Clone, Debug, Args)]
pub struct AdminEndpoints {
    /// Admin listeners (--admin), by comma or repeated; asked in this order until one answers
    #[arg(
        long,
        value_name = "URL",
        value_delimiter = ',',
        value_parser = parse_endpoint,
        default_value = "http://127.0.0.1:12381",
        env = "RAFTEXAMPLE_ENDPOINT"
    )]
    pub endpoint: Vec<String>,

    /// How they are reached.
    #[command(flatten)]
    pub reach: Reach,
}

/// Where the key-value servers are.
#[derive(Clone, Debug, Args)]
pub struct ClientEndpoints {
    /// Key-value servers (--port), by comma or repeated; asked in this order until one answers
    #[arg(
        long,
        value_name = "URL",
        value_delimiter = ',',
        value_parser = parse_endpoint,
        default_value = "http://127.0.0.1:12380",
        env = "RAFTEXAMPLE_CLIENT_ENDPOINT"
    )]
    pub endpoint: Vec<String>,

    /// How they are reached.
    #[command(flatten)]
    pub reach: Reach,
}

/// `status`: every member, as one of them sees it.
#[derive(Clone, Debug, Args)]
pub struct StatusCommand {
    /// The answer of GET /cluster as it came
    #[arg(long)]
    pub json: bool,

    /// Whom to ask.
    #[command(flatten)]
    pub at: AdminEndpoints,
}

/// The commands for members.
#[derive(Clone, Debug, Args)]
pub struct MemberArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: MemberCommand,
}

/// What is done with members.
#[derive(Clone, Debug, Subcommand)]
pub enum MemberCommand {
    /// List the members
    List {
        /// The answer of GET /members as it came
        #[arg(long)]
        json: bool,

        /// Whom to ask.
        #[command(flatten)]
        at: AdminEndpoints,
    },
    /// Add a member, then start it: it is a learner until it has caught up
    Add {
        /// Its id, never used before
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        id: u64,

        /// Its peer URL
        url: String,

        /// Whom to ask.
        #[command(flatten)]
        at: AdminEndpoints,
    },
    /// Remove a member for good: its id cannot be used again
    Remove {
        /// Its id
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        id: u64,

        /// Whom to ask.
        #[command(flatten)]
        at: AdminEndpoints,
    },
    /// Change where a member listens for its peers
    Move {
        /// Its id
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        id: u64,

        /// Its new peer URL
        url: String,

        /// Whom to ask.
        #[command(flatten)]
        at: AdminEndpoints,
    },
    /// Hand leadership over
    Transfer {
        /// Who is to lead [default: whoever of the others has most of the log]
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        id: Option<u64>,

        /// Whom to ask.
        #[command(flatten)]
        at: AdminEndpoints,
    },
}

/// `put`: sets a key, and prints OK once that is on a majority's disks.
#[derive(Clone, Debug, Args)]
pub struct Put {
    /// The key: the path of a URL, escapes included and not decoded; a missing leading slash is added
    pub key: String,

    /// The value; - reads it from standard input, and behind -- it may begin with a dash
    pub value: OsString,

    /// Whom to ask.
    #[command(flatten)]
    pub at: ClientEndpoints,
}

/// `get`: prints the value's bytes and nothing else; a terminal gets a newline behind them.
#[derive(Clone, Debug, Args)]
pub struct Get {
    /// The key: the path of a URL, escapes included and not decoded; a missing leading slash is added
    pub key: String,

    /// What the member has in its own map, which may be old, without asking a majority
    #[arg(long)]
    pub local: bool,

    /// Whom to ask.
    #[command(flatten)]
    pub at: ClientEndpoints,
}

/// `snapshot save`: a backup of the state as it is now.
#[derive(Clone, Debug, Args)]
pub struct Save {
    /// The file to make
    pub file: PathBuf,

    /// Replace the file if it is there
    #[arg(long)]
    pub force: bool,

    /// The state of the member asked, which may be old, without asking a majority
    #[arg(long)]
    pub local: bool,

    /// Whom to ask.
    #[command(flatten)]
    pub at: AdminEndpoints,
}

impl StatusCommand {
    /// Writes the table, or the JSON, to `out`.
    ///
    /// # Errors
    /// [`Error::Refused`] if no endpoint answers, or, after the table, if no member knows a leader.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let answer = self.at.client()?.run(async |client| client.get("/cluster").await)?;
        let cluster = answer.json()?;
        if self.json {
            write(out, &answer.body)?;
        } else {
            write(out, status_table(&cluster, &answer.endpoint).as_bytes())?;
        }
        let is_led = |member: &Value| {
            member["alive"] == true && member["status"]["leader"].as_u64().is_some_and(|id| id != 0)
        };
        if array(&cluster["members"]).iter().any(is_led) {
            return Ok(());
        }
        Err(Error::Refused(format!(
            "no member that {} reaches knows a leader: start those that are dead, a majority has to live",
            answer.endpoint
        )))
    }
}

impl MemberArgs {
    /// Does it, and says on `out` what was done.
    ///
    /// # Errors
    /// [`Error::Refused`] with what the cluster has against it, or why nobody answered.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let done = match &self.command {
            MemberCommand::List { json, at } => {
                let answer = at.client()?.run(async |client| client.get("/members").await)?;
                let members = answer.json()?;
                if *json { answer.text() } else { member_table(&members) }
            }
            MemberCommand::Add { id, url, at } => {
                let members = at.client()?.run(async |client| {
                    // What to start it with; and this is no client port, where PUT sets a key.
                    let members = client.get("/members").await?.json()?;
                    client.change(Method::POST, *id, url).await?;
                    Ok(members)
                })?;
                format!("member {id} was added\n{}", what_to_start(*id, url, &members))
            }
            MemberCommand::Remove { id, at } => {
                at.client()?.run(async |client| {
                    client.require_member(*id).await?;
                    client.change(Method::DELETE, *id, "").await
                })?;
                format!("member {id} was removed: it stops by itself, and its id stays unused\n")
            }
            MemberCommand::Move { id, url, at } => {
                let old = at.client()?.run(async |client| {
                    let old = client.require_member(*id).await?;
                    client.change(Method::PUT, *id, url).await?;
                    Ok(old)
                })?;
                format!(
                    "member {id} was moved from {old} to {url}: start it there, with --peer-url {url}\n"
                )
            }
            MemberCommand::Transfer { id, at } => {
                let leader = at.client()?.run(async |client| client.transfer(*id).await)?;
                match leader {
                    Some(id) => format!("member {id} leads\n"),
                    None => "another member leads\n".to_owned(),
                }
            }
        };
        write(out, done.as_bytes())
    }
}

impl Put {
    /// Sets the key, and says OK on `out`.
    ///
    /// # Errors
    /// [`Error::Config`] for a key that cannot be one, [`Error::Refused`] if it was not set, or if
    /// nobody knows whether it was.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let client = self.at.client()?;
        let target = target(&self.key)?;
        let mut value = Vec::new();
        if self.value == "-" {
            let failed = Error::io("read", Path::new("standard input"));
            io::stdin().lock().read_to_end(&mut value).map_err(failed)?;
        } else {
            value = self.value.clone().into_vec();
        }
        let request = Request::new(Method::PUT, &target, value.into());
        client.run(async |client| client.ask(&request).await)?;
        write(out, b"OK\n")
    }
}

impl Get {
    /// Writes the value to `out`.
    ///
    /// # Errors
    /// [`Error::Config`] for a key that cannot be one, [`Error::Refused`] if it was never written, or
    /// could not be read.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let client = self.at.client()?;
        let target = target(&self.key)?;
        let mut request = Request::new(Method::GET, &target, Bytes::new());
        if self.local {
            request.headers.insert("raft-read", HeaderValue::from_static("local"));
        }
        let answer = client.run(async |client| client.ask(&request).await)?;
        if answer.is_absent {
            return Err(Error::Refused(format!("{target} was never written")));
        }
        write(out, &answer.body)?;
        if io::stdout().is_terminal() { write(out, b"\n") } else { Ok(()) }
    }
}

impl Save {
    /// Makes the file, and says on `out` what is in it.
    ///
    /// # Errors
    /// [`Error::Refused`] if the file is there or nobody gave a backup; [`Error::Corrupt`] if what came
    /// is none; [`Error::Io`]. There is no new file then.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let file = &self.file;
        if !self.force && file.symlink_metadata().is_ok() {
            return Err(self.is_there());
        }
        if file.file_name().is_none() || file.is_dir() {
            let why = format!("{} is a directory: name a file in it", file.display());
            return Err(Error::Config(why));
        }
        let client = self.at.client()?;
        let dir = file.parent().filter(|dir| *dir != Path::new("")).unwrap_or(Path::new("."));
        let (endpoint, received) = client.run(async |client| {
            tokio::select! {
                received = client.receive(self.local, dir) => received,
                // What was received is removed on the way out.
                _ = tokio::signal::ctrl_c() => Err(Error::Refused("interrupted".into())),
            }
        })?;
        let path = received.path();
        let snapshot = load_file(&ReadOnlyVfs::new(|_| {}), path).map_err(|error| match error {
            // The remedies are for a member whose own it is.
            Error::Corrupt { path, offset, reason, .. } => Error::Corrupt {
                path,
                offset,
                reason,
                remedy: "it was damaged on its way: save it once more",
            },
            other => other,
        })?;
        let mut keys = 0_u64;
        let count = |_| {
            keys += 1;
            Ok(())
        };
        read_records(snapshot.reader, count).map_err(Error::io("read", path))?;
        received.as_file().sync_all().map_err(Error::io("sync", path))?;
        if self.force {
            received.persist(file).map_err(|error| Error::io("rename to", file)(error.error))?;
        } else {
            received.persist_noclobber(file).map_err(|error| match error.error.kind() {
                io::ErrorKind::AlreadyExists => self.is_there(),
                _ => Error::io("rename to", file)(error.error),
            })?;
        }
        let synced = File::open(dir).and_then(|dir| dir.sync_all());
        synced.map_err(Error::io("sync", dir))?;
        let (index, term, length) = (snapshot.index, snapshot.term, snapshot.file.length);
        let done = format!(
            "saved {} from {endpoint}: index {index}, term {term}, {keys} keys, {length} bytes\n",
            file.display()
        );
        write(out, done.as_bytes())
    }

    fn is_there(&self) -> Error {
        Error::Refused(format!(
            "{} is there already: choose another name, or give --force to replace it",
            self.file.display()
        ))
    }
}

/// Asks members, one after the other.
struct Client {
    http: reqwest::Client,
    endpoints: Vec<String>,
    timeout: Duration,
    /// The flag by which a member listens at such an endpoint.
    flag: &'static str,
}

struct Request {
    method: Method,
    /// The path, and the query.
    target: String,
    headers: HeaderMap,
    body: Bytes,
}

/// An answer that was hoped for.
struct Answer {
    /// Who gave it.
    endpoint: String,
    /// There is no such key.
    is_absent: bool,
    body: Bytes,
}

/// Why an endpoint did not do what it was asked for.
enum Failure {
    /// It did nothing, and another may.
    NotDone(String),
    /// It did nothing, and another would not either.
    Refused(String),
    /// Nobody knows whether it did.
    Unknown(String),
}

impl AdminEndpoints {
    fn client(&self) -> Result<Client> {
        Client::new(&self.endpoint, &self.reach, "--admin")
    }
}

impl ClientEndpoints {
    fn client(&self) -> Result<Client> {
        Client::new(&self.endpoint, &self.reach, "--port")
    }
}

impl Client {
    fn new(endpoints: &[String], reach: &Reach, flag: &'static str) -> Result<Self> {
        let tls = match &reach.ca {
            Some(ca) => command_config(ca, reach.cert.as_deref().zip(reach.key.as_deref()))?,
            None => match endpoints.iter().find(|endpoint| endpoint.starts_with("https://")) {
                Some(endpoint) => {
                    let why = "give --ca FILE, the authority of the members' certificates";
                    return Err(Error::Config(format!("--endpoint {endpoint}: {why}")));
                }
                None => no_tls(),
            },
        };
        let http = reqwest::Client::builder()
            .retry(reqwest::retry::never())
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .http1_only()
            .connect_timeout(reach.timeout)
            .tls_backend_preconfigured(tls)
            .build()
            .map_err(|error| Error::Config(format!("cannot speak HTTP: {}", cause(&error))))?;
        let mut distinct: Vec<String> = Vec::new();
        for endpoint in endpoints {
            if !distinct.contains(endpoint) {
                distinct.push(endpoint.clone());
            }
        }
        Ok(Self { http, endpoints: distinct, timeout: reach.timeout, flag })
    }

    /// Does on a runtime of its own what `ask` wants of this client.
    fn run<T>(&self, ask: impl AsyncFnOnce(&Self) -> Result<T>) -> Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Error::Config(format!("cannot start: {error}")))?;
        runtime.block_on(ask(self))
    }

    async fn get(&self, target: &str) -> Result<Answer> {
        self.ask(&Request::new(Method::GET, target, Bytes::new())).await
    }

    /// Changes the members, by the admin listener.
    async fn change(&self, method: Method, id: u64, url: &str) -> Result<()> {
        let body = Bytes::from(url.to_owned());
        self.ask(&Request::new(method, &format!("/members/{id}"), body)).await.map(|_| ())
    }

    /// Hands leadership over, to anybody if `to` is none; says who leads then, as far as it is known.
    async fn transfer(&self, to: Option<u64>) -> Result<Option<u64>> {
        let leader = async || Ok(self.get("/status").await?.json()?["leader"].as_u64());
        let before: Option<u64> = leader().await?;
        let query = to.map(|id| format!("?to={id}")).unwrap_or_default();
        let target = format!("/transfer-leadership{query}");
        self.ask(&Request::new(Method::POST, &target, Bytes::new())).await?;
        if to.is_some() {
            return Ok(to);
        }
        // It is done; the member that is asked now may not have heard of it.
        for _ in 0..LOOKS {
            if let Ok(Some(id)) = leader().await
                && id != 0
                && Some(id) != before
            {
                return Ok(Some(id));
            }
            sleep(LOOK_INTERVAL).await;
        }
        Ok(None)
    }

    /// The URL of member `id`, which has to be one.
    async fn require_member(&self, id: u64) -> Result<String> {
        let mut looks = 1;
        loop {
            let answer = self.get("/members").await?;
            let members = answer.json()?;
            if let Some(member) = array(&members).iter().find(|member| member["id"] == id) {
                return Ok(text(&member["url"]));
            }
            if looks == LOOKS {
                let ids: Vec<_> =
                    array(&members).iter().map(|member| text(&member["id"])).collect();
                return Err(Error::Refused(format!(
                    "{id} is none of the members {}, as {} knows them: see `raftexample member list`",
                    ids.join(", "),
                    answer.endpoint
                )));
            }
            // It may have been added just now, which a member that does not lead hears a little later.
            looks += 1;
            sleep(LOOK_INTERVAL).await;
        }
    }

    /// Has one endpoint after the other do it, as the module says.
    async fn ask(&self, request: &Request) -> Result<Answer> {
        self.each(request, async |endpoint| {
            let done = timeout(self.timeout + ANSWER_SLACK, self.ask_one(endpoint, request));
            done.await.unwrap_or_else(|_| Err(self.silent(endpoint)))
        })
        .await
    }

    async fn ask_one(
        &self,
        endpoint: &str,
        request: &Request,
    ) -> std::result::Result<Answer, Failure> {
        let response = self.send(endpoint, request).await?;
        let is_absent = response.status() == StatusCode::NOT_FOUND;
        let body = response.bytes().await.map_err(|error| self.lost(endpoint, &error))?;
        if is_absent && body != ABSENT {
            return Err(self.is_another_port(endpoint, &body));
        }
        Ok(Answer { endpoint: endpoint.to_owned(), is_absent, body })
    }

    /// Tries the endpoints in turn.
    async fn each<T>(
        &self,
        request: &Request,
        mut attempt: impl AsyncFnMut(&str) -> std::result::Result<T, Failure>,
    ) -> Result<T> {
        let mut failures = Vec::new();
        for endpoint in &self.endpoints {
            let Request { method, target, .. } = request;
            match attempt(endpoint).await {
                Ok(done) => return Ok(done),
                Err(Failure::NotDone(why)) => failures.push(why),
                Err(Failure::Unknown(why)) if *method == Method::GET => failures.push(why),
                Err(Failure::Refused(why)) => return Err(Error::Refused(why)),
                Err(Failure::Unknown(why)) => {
                    let read = if self.flag == "--port" { "get" } else { "member list" };
                    return Err(Error::Refused(format!(
                        "{method} {target}: outcome unknown: {why}; read before repeating, with `raftexample {read}`"
                    )));
                }
            }
        }
        Err(Error::Refused(failures.join("; ")))
    }
}

impl Client {
    /// Sends it, and judges the head of the answer.
    async fn send(
        &self,
        endpoint: &str,
        request: &Request,
    ) -> std::result::Result<Response, Failure> {
        let Request { method, target, headers, body } = request;
        let url = format!("{endpoint}{target}");
        let sent = self
            .http
            .request(method.clone(), url)
            .headers(headers.clone())
            .body(body.clone())
            .send()
            .await;
        let response = sent.map_err(|error| self.lost(endpoint, &error))?;
        let status = response.status();
        // What is absent there may be the key.
        if status.is_success() || (status == StatusCode::NOT_FOUND && self.flag == "--port") {
            return Ok(response);
        }
        let said = response.bytes().await.unwrap_or_default();
        let why = format!("{endpoint} answered {}: {}", status.as_u16(), first_line(&said));
        Err(match status {
            StatusCode::SERVICE_UNAVAILABLE => Failure::NotDone(why),
            StatusCode::GATEWAY_TIMEOUT => Failure::Unknown(why),
            StatusCode::NOT_FOUND => self.is_another_port(endpoint, &said),
            _ => Failure::Refused(why),
        })
    }

    fn is_another_port(&self, endpoint: &str, said: &[u8]) -> Failure {
        let said = first_line(said);
        let flag = self.flag;
        Failure::Refused(format!(
            "{endpoint} answered 404: {said}; is it another port of the member? this command needs the one of {flag}"
        ))
    }

    /// What it means that there was no answer, or half of one.
    fn lost(&self, endpoint: &str, error: &reqwest::Error) -> Failure {
        let cause = cause(error);
        let authority = endpoint.split("://").last().unwrap_or_default();
        if let Some(tls) = tls_error(error).filter(|tls| error.is_connect() || is_of_handshake(tls))
        {
            let why = match tls {
                rustls::Error::AlertReceived(_) => {
                    "does it want a certificate of its --client-ca? give --cert and --key"
                }
                _ => "is its certificate for this name, and of the authority in --ca?",
            };
            return Failure::NotDone(format!("no TLS with {endpoint}: {tls}; {why}"));
        }
        if error.is_connect() || error.is_builder() {
            let flag = match self.flag {
                "--port" => format!("--port {}", authority.rsplit(':').next().unwrap_or_default()),
                flag => format!("{flag} {authority}"),
            };
            let why =
                format!("cannot reach {endpoint}: {cause}; is the member running, with {flag}?");
            return Failure::NotDone(why);
        }
        let tls = if endpoint.starts_with("http://") && error.is_request() {
            "; if it speaks TLS, write https:// and give --ca"
        } else {
            ""
        };
        Failure::Unknown(format!("{endpoint} broke off: {cause}{tls}"))
    }

    fn silent(&self, endpoint: &str) -> Failure {
        Failure::Unknown(format!(
            "{endpoint} did not answer within {}: give it more with --timeout, or ask another --endpoint",
            humantime::format_duration(self.timeout)
        ))
    }

    /// Receives a backup into a temporary file in `dir`; says from whom.
    async fn receive(&self, is_local: bool, dir: &Path) -> Result<(String, NamedTempFile)> {
        let target = if is_local { "/snapshot?local" } else { "/snapshot" };
        let request = Request::new(Method::GET, target, Bytes::new());
        self.each(&request, async |endpoint| {
            // The state may be large: what has a deadline is each part.
            let patience = self.timeout + ANSWER_SLACK;
            let head = timeout(patience, self.send(endpoint, &request)).await;
            let mut response = head.unwrap_or_else(|_| Err(self.silent(endpoint)))?;
            let own =
                |error| Failure::Refused(Error::io("write to a file in", dir)(error).to_string());
            let mut file = NamedTempFile::new_in(dir).map_err(own)?;
            let progress = progress_bar();
            loop {
                let chunk = timeout(patience, response.chunk()).await;
                let chunk = chunk.map_err(|_| self.silent(endpoint))?;
                let Some(chunk) = chunk.map_err(|error| self.lost(endpoint, &error))? else {
                    break;
                };
                file.write_all(&chunk).map_err(own)?;
                progress.inc(chunk.len() as u64);
            }
            progress.finish_and_clear();
            Ok((endpoint.to_owned(), file))
        })
        .await
    }
}

impl Request {
    fn new(method: Method, target: &str, body: Bytes) -> Self {
        Self { method, target: target.to_owned(), headers: HeaderMap::new(), body }
    }
}

impl Answer {
    fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).map_err(|error| {
            Error::Refused(format!(
                "{} answered with something else than expected ({error}): is that the admin listener (--admin)?",
                self.endpoint
            ))
        })
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// How long it is beforehand is not known. On standard error, and only if that is a terminal.
fn progress_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {bytes} received, {bytes_per_sec}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_spinner());
    ProgressBar::new_spinner().with_style(style)
}

fn write(out: &mut dyn Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).map_err(Error::io("write to", Path::new("standard output")))
}

/// The innermost of what led to an error: what the system, or TLS, has to say.
fn cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// True if it is an answer to our certificate. In TLS 1.3 that comes late, when the handshake seems
/// to be over here; but the other side never read a request.
fn is_of_handshake(error: &rustls::Error) -> bool {
    use rustls::AlertDescription as Alert;
    matches!(
        error,
        rustls::Error::AlertReceived(
            Alert::CertificateRequired
                | Alert::BadCertificate
                | Alert::UnsupportedCertificate
                | Alert::CertificateExpired
                | Alert::CertificateUnknown
                | Alert::UnknownCA
                | Alert::AccessDenied
                | Alert::DecryptError
        )
    )
}

fn first_line(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    text.lines().next().unwrap_or_default().chars().take(REFUSAL_CHARS_MAX).collect()
}

fn parse_timeout(text: &str) -> std::result::Result<Duration, String> {
    let timeout = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let day = Duration::from_secs(24 * 60 * 60);
    let is_usable = !timeout.is_zero() && timeout <= day;
    if is_usable { Ok(timeout) } else { Err("it is more than 0s and at most 1day".into()) }
}

/// An endpoint without the slash at its end.
fn parse_endpoint(text: &str) -> std::result::Result<String, String> {
    let wanted = || "it has to be http://HOST:PORT or https://HOST:PORT".to_owned();
    let url: Url = text.parse().map_err(|_| wanted())?;
    let endpoint = text.trim_end_matches('/');
    let is_bare = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
    let is_anonymous = url.username().is_empty() && url.password().is_none();
    let is_http = endpoint.starts_with("http://") || endpoint.starts_with("https://");
    if is_http && is_bare && is_anonymous { Ok(endpoint.to_owned()) } else { Err(wanted()) }
}

/// The target of a request for `key`, byte for byte the same but for a leading slash.
fn target(key: &str) -> Result<String> {
    let slash = if key.starts_with('/') { "" } else { "/" };
    let wanted = format!("{slash}{key}");
    // What follows a # is no part of a target.
    let escaped = wanted.replace('#', "%23");
    let refuse = |why: &str| Err(Error::Config(format!("the key {wanted:?} {why}")));
    let Ok(url) = format!("http://h{escaped}").parse::<Url>() else {
        return refuse("cannot be the path of a URL: percent-encode what it may not hold");
    };
    let query = url.query().map(|query| format!("?{query}")).unwrap_or_default();
    let sent = format!("{}{query}", url.path());
    if sent == wanted {
        return Ok(wanted);
    }
    refuse(&format!(
        "cannot be sent as it is: a URL writes it {sent:?}; give that, which is the key then"
    ))
}

/// What starts the member that was added.
fn what_to_start(id: u64, url: &str, members: &Value) -> String {
    let others: Vec<_> = array(members).iter().map(|member| text(&member["url"])).collect();
    let tls = if url.starts_with("https://") {
        " --peer-cert FILE --peer-key FILE --peer-ca FILE"
    } else {
        ""
    };
    format!(
        "start it; until it has caught up it is a learner, without a vote:\n  raftexample --id {id} --cluster {} --peer-url {url}{tls} --port PORT --join\n",
        others.join(",")
    )
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A string as it is, anything else as JSON, nothing as a dash.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn member_table(members: &Value) -> String {
    let rows = array(members)
        .iter()
        .map(|member| ["id", "url", "role"].map(|name| text(&member[name])).to_vec());
    table(&["ID", "URL", "ROLE"], rows)
}

fn status_table(cluster: &Value, endpoint: &str) -> String {
    let rows = array(&cluster["members"]).iter().map(|member| {
        let status = &member["status"];
        let mark = if member["id"] == cluster["seen_by"] { "*" } else { "" };
        let mut row = vec![format!("{}{mark}", text(&member["id"])), text(&member["url"])];
        if member["alive"] != true {
            row.push("dead".to_owned());
            row.extend(vec!["-".to_owned(); 8]);
            return row;
        }
        row.extend(
            ["role", "term", "commit", "applied", "snapshot", "keys"]
                .map(|name| text(&status[name])),
        );
        row.push(
            status["wal_bytes"]
                .as_u64()
                .map_or("-".to_owned(), |bytes| HumanBytes(bytes).to_string()),
        );
        let uptime =
            Duration::from_secs(status["uptime_seconds"].as_f64().unwrap_or_default() as u64);
        row.push(humantime::format_duration(uptime).to_string().replace(' ', ""));
        row.push(text(&status["version"]));
        row
    });
    let head = [
        "ID", "URL", "ROLE", "TERM", "COMMIT", "APPLIED", "SNAPSHOT", "KEYS", "WAL", "UPTIME",
        "VERSION",
    ];
    format!("{}* was asked, at {endpoint}\n", table(&head, rows))
}

/// Lines with columns two spaces apart.
fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let head = head.iter().map(|name| (*name).to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
    };
    let line = |row: &Vec<String>| {
        let cells = row.iter().enumerate();
        let cells = cells.map(|(column, cell)| format!("{cell:0$}", width(column).unwrap_or(0)));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
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

    #[test]
    fn a_table_shows_who_is_dead_and_who_was_asked() {
        let status = serde_json::json!({
            "role": "leader", "term": 2, "commit": 10, "applied": 10, "snapshot": 0, "keys": 3,
            "wal_bytes": 1536, "uptime_seconds": 61.5, "version": "0.1.0",
        });
        let cluster = serde_json::json!({ "seen_by": 2, "members": [
            { "id": 1, "url": "http://a:1", "alive": false, "status": null },
            { "id": 2, "url": "http://bcd:2", "alive": true, "status": status },
        ]});
        assert_eq!(
            status_table(&cluster, "http://e:1"),
            "\
ID  URL           ROLE    TERM  COMMIT  APPLIED  SNAPSHOT  KEYS  WAL       UPTIME  VERSION
1   http://a:1    dead    -     -       -        -         -     -         -       -
2*  http://bcd:2  leader  2     10      10       0         3     1.50 KiB  1m1s    0.1.0
* was asked, at http://e:1
"
        );
    }
}
