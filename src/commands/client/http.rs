//! The HTTP client of the commands.
//!
//! It tries the endpoints in the given order:
//!
//! | outcome of one endpoint | a read, or a write with a retry token | another write |
//! |---|---|---|
//! | unreachable, or 503: nothing was done | next endpoint | next endpoint |
//! | no or broken answer, or 504: the outcome is unknown | next endpoint | stop: outcome unknown |
//! | any other refusal | stop | stop |
//!
//! A write without a token whose outcome is unknown is never repeated: the repetition could undo a later
//! write. A write with a token that may have happened goes from endpoint to endpoint until it has an outcome.

use std::collections::HashSet;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, Response, StatusCode};
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};

use super::Reach;
use crate::error::{Error, Result, cause};
use crate::ports::tls::{command_config, no_tls, tls_error};

/// How much longer than `--timeout` the client waits: a member with the same deadline answers 504 at
/// its end, and that answer says more than silence.
pub(super) const ANSWER_SLACK: Duration = Duration::from_millis(500);
/// Characters of an error response that are shown.
const SHOWN_CHARS_MAX: usize = 500;
/// The most bytes of an answer: as many as the largest value has.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// The most bytes of an answer that reports an error.
const ERROR_BYTES_MAX: usize = 64 << 10;
/// How many times the timeout of one endpoint a request that is repeated may take.
const PATIENCE_TIMEOUTS: u32 = 6;
/// The pause before the endpoints are tried again.
const ROUND_PAUSE: Duration = Duration::from_millis(200);
/// The content type of an error of the application port.
const PROBLEM: &str = "application/problem+json";

/// Sends requests to the endpoints in order.
#[derive(Clone)]
pub(super) struct Client {
    http: reqwest::Client,
    endpoints: Vec<String>,
    pub(super) timeout: Duration,
    /// The server's flag for this kind of endpoint: `--admin` or `--api`.
    flag: &'static str,
}

pub(super) struct Request {
    method: Method,
    /// Path and query.
    target: String,
    pub(super) headers: HeaderMap,
    body: Bytes,
    /// True if it may be sent again after its outcome was unknown.
    pub(super) is_repeatable: bool,
}

/// A successful response, or the 404 for an absent key.
pub(super) struct Answer {
    /// The endpoint that sent it.
    pub(super) endpoint: String,
    /// True if the key does not exist.
    pub(super) is_absent: bool,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// Why one endpoint did not answer with success.
pub(super) enum AttemptError {
    /// It did nothing; another endpoint may do it.
    NotDone(String),
    /// It did nothing, and no other endpoint would do it.
    Refused(String),
    /// It may have done it.
    Unknown(String),
}

/// Why no endpoint answered with success.
#[derive(Default)]
struct Failures {
    /// What each of them said.
    said: Vec<String>,
    /// True if one of them may have done it.
    is_unknown: bool,
}

type Attempt<T> = std::result::Result<T, AttemptError>;

impl Client {
    pub(super) fn new(endpoints: &[String], reach: &Reach, flag: &'static str) -> Result<Self> {
        let tls = match &reach.ca {
            Some(ca) => command_config(ca, reach.cert.as_deref().zip(reach.key.as_deref()))?,
            None => match endpoints.iter().find(|endpoint| endpoint.starts_with("https://")) {
                Some(endpoint) => {
                    let why = "give --ca FILE, the CA of the members' certificates";
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
            .map_err(|error| {
                Error::Config(format!("cannot make an HTTP client: {}", cause(&error)))
            })?;
        let mut seen = HashSet::new();
        let endpoints = endpoints.iter().filter(|endpoint| seen.insert(*endpoint)).cloned();
        Ok(Self { http, endpoints: endpoints.collect(), timeout: reach.timeout, flag })
    }

    /// Runs `ask` on a runtime of its own.
    pub(super) fn run<T>(&self, ask: impl AsyncFnOnce(&Self) -> Result<T>) -> Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Error::Config(format!("cannot start the runtime: {error}")))?;
        runtime.block_on(ask(self))
    }

    pub(super) async fn get(&self, target: &str) -> Result<Answer> {
        self.ask(&Request::new(Method::GET, target, Bytes::new())).await
    }

    /// Sends the request to one endpoint after the other.
    pub(super) async fn ask(&self, request: &Request) -> Result<Answer> {
        self.each(request, self.one(request)).await
    }

    /// Sends a request that may be repeated to one endpoint after the other. Once an endpoint may have carried
    /// it out, goes on until there is an outcome. `remedy` says what to do if there is none.
    pub(super) async fn ask_until_done(&self, request: &Request, remedy: &str) -> Result<Answer> {
        let patience = self.timeout * PATIENCE_TIMEOUTS;
        let begun = Instant::now();
        let mut may_be_done = false;
        loop {
            let Failures { said, is_unknown } =
                match self.try_each(request, self.one(request)).await? {
                    Ok(answer) => return Ok(answer),
                    Err(failures) => failures,
                };
            let why = said.join("; ");
            may_be_done |= is_unknown;
            if !may_be_done {
                return Err(Error::Refused(why));
            }
            if begun.elapsed() >= patience {
                let (method, target) = (&request.method, &request.target);
                let patience = humantime::format_duration(patience);
                return Err(Error::Refused(format!(
                    "{method} {target}: no outcome within {patience}: {why}; {remedy}"
                )));
            }
            sleep(ROUND_PAUSE).await;
        }
    }

    /// Sends `request` to one endpoint, in time.
    fn one(&self, request: &Request) -> impl AsyncFnMut(&str) -> Attempt<Answer> {
        async |endpoint| {
            let done = timeout(self.timeout + ANSWER_SLACK, self.ask_one(endpoint, request));
            done.await.unwrap_or_else(|_| Err(self.timed_out(endpoint)))
        }
    }

    async fn ask_one(&self, endpoint: &str, request: &Request) -> Attempt<Answer> {
        let response = self.send(endpoint, request).await?;
        let is_absent = response.status() == StatusCode::NOT_FOUND;
        let headers = response.headers().clone();
        let body = self.read(endpoint, response, ANSWER_BYTES_MAX).await?;
        Ok(Answer { endpoint: endpoint.to_owned(), is_absent, headers, body })
    }

    /// Calls `attempt` with the endpoints in order, as the table of this module says.
    pub(super) async fn each<T>(
        &self,
        request: &Request,
        attempt: impl AsyncFnMut(&str) -> Attempt<T>,
    ) -> Result<T> {
        let done = self.try_each(request, attempt).await?;
        done.map_err(|failures| Error::Refused(failures.said.join("; ")))
    }

    /// As [`each`](Self::each), but goes on for a while as long as another try may succeed.
    pub(super) async fn each_again<T>(
        &self,
        request: &Request,
        mut attempt: impl AsyncFnMut(&str) -> Attempt<T>,
    ) -> Result<T> {
        let patience = self.timeout * PATIENCE_TIMEOUTS;
        let begun = Instant::now();
        loop {
            match self.try_each(request, &mut attempt).await? {
                Ok(done) => return Ok(done),
                Err(failures) if begun.elapsed() >= patience => {
                    return Err(Error::Refused(failures.said.join("; ")));
                }
                Err(_) => sleep(ROUND_PAUSE).await,
            }
        }
    }

    /// From now on begins with the endpoint after `endpoint`.
    pub(super) fn begin_after(&mut self, endpoint: &str) {
        if let Some(at) = self.endpoints.iter().position(|other| other == endpoint) {
            self.endpoints.rotate_left(at + 1);
        }
    }

    /// As [`each`](Self::each). If another try may succeed, returns what each endpoint said.
    async fn try_each<T>(
        &self,
        request: &Request,
        mut attempt: impl AsyncFnMut(&str) -> Attempt<T>,
    ) -> Result<std::result::Result<T, Failures>> {
        let mut failures = Failures::default();
        for endpoint in &self.endpoints {
            let Request { method, target, .. } = request;
            match attempt(endpoint).await {
                Ok(done) => return Ok(Ok(done)),
                Err(AttemptError::NotDone(why)) => failures.said.push(why),
                Err(AttemptError::Unknown(why)) if request.is_repeatable => {
                    failures.said.push(why);
                    failures.is_unknown = true;
                }
                Err(AttemptError::Refused(why)) => return Err(Error::Refused(why)),
                Err(AttemptError::Unknown(why)) => {
                    let read = if self.flag == "--api" { "get" } else { "member list" };
                    return Err(Error::Refused(format!(
                        "{method} {target}: outcome unknown: {why}; read before repeating, with `raftexample {read}`"
                    )));
                }
            }
        }
        Ok(Err(failures))
    }

    /// Sends the request to one endpoint, and classifies the response by its head.
    pub(super) async fn send(&self, endpoint: &str, request: &Request) -> Attempt<Response> {
        let Request { method, target, headers, body, .. } = request;
        let url = format!("{endpoint}{target}");
        let sent = self
            .http
            .request(method.clone(), url)
            .headers(headers.clone())
            .body(body.clone())
            .send()
            .await;
        let response = sent.map_err(|error| self.broken(endpoint, &error))?;
        let status = response.status();
        let kind = response.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes);
        let is_problem = kind == Some(PROBLEM.as_bytes());
        // The application port says so of a key that does not exist.
        if status.is_success() || (status == StatusCode::NOT_FOUND && is_problem) {
            return Ok(response);
        }
        let said = self.read(endpoint, response, ERROR_BYTES_MAX).await.unwrap_or_default();
        let said = if is_problem { detail(&said) } else { said };
        let why = format!("{endpoint} answered {}: {}", status.as_u16(), first_line(&said));
        Err(match status {
            StatusCode::SERVICE_UNAVAILABLE => AttemptError::NotDone(why),
            StatusCode::GATEWAY_TIMEOUT => AttemptError::Unknown(why),
            // Every other port may answer so to the paths of this one.
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => {
                self.is_another_port(endpoint, status, &said)
            }
            StatusCode::BAD_REQUEST if self.flag == "--api" && !is_problem => {
                self.is_another_port(endpoint, status, &said)
            }
            _ => AttemptError::Refused(why),
        })
    }

    /// Reads a body of at most `max` bytes.
    async fn read(&self, endpoint: &str, mut response: Response, max: usize) -> Attempt<Bytes> {
        let mut body = BytesMut::new();
        while let Some(chunk) =
            response.chunk().await.map_err(|error| self.broken(endpoint, &error))?
        {
            if body.len() + chunk.len() > max {
                return Err(AttemptError::Refused(format!(
                    "{endpoint} answers with more than {max} bytes: is it a member?"
                )));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body.freeze())
    }

    fn is_another_port(&self, endpoint: &str, status: StatusCode, said: &[u8]) -> AttemptError {
        let (status, said) = (status.as_u16(), first_line(said));
        let flag = self.flag;
        AttemptError::Refused(format!(
            "{endpoint} answered {status}: {said}; this command needs the port of {flag}: is this another port of the member?"
        ))
    }

    /// Classifies a response that did not arrive, or not to its end.
    pub(super) fn broken(&self, endpoint: &str, error: &reqwest::Error) -> AttemptError {
        let cause = cause(error);
        let authority = endpoint.split("://").last().unwrap_or_default();
        let of_handshake = |tls: &&rustls::Error| error.is_connect() || is_of_handshake(tls);
        if let Some(tls) = tls_error(error).filter(of_handshake) {
            let why = match tls {
                rustls::Error::AlertReceived(_) => {
                    "if the member runs with --client-ca, give --cert and --key"
                }
                _ => "check that its certificate is for this host, and issued by a CA in --ca",
            };
            return AttemptError::NotDone(format!("no TLS with {endpoint}: {tls}; {why}"));
        }
        if error.is_connect() || error.is_builder() {
            let flag = self.flag;
            let why = format!(
                "cannot reach {endpoint}: {cause}; is the member running, with {flag} {authority}?"
            );
            return AttemptError::NotDone(why);
        }
        let tls = if endpoint.starts_with("http://") && error.is_request() {
            "; if it speaks TLS, write https:// and give --ca"
        } else {
            ""
        };
        AttemptError::Unknown(format!("{endpoint} broke off: {cause}{tls}"))
    }

    pub(super) fn timed_out(&self, endpoint: &str) -> AttemptError {
        AttemptError::Unknown(format!(
            "{endpoint} did not answer within {}: raise --timeout, or ask another --endpoint",
            humantime::format_duration(self.timeout)
        ))
    }
}

impl Request {
    pub(super) fn new(method: Method, target: &str, body: Bytes) -> Self {
        let is_repeatable = method == Method::GET;
        Self { method, target: target.to_owned(), headers: HeaderMap::new(), body, is_repeatable }
    }
}

impl Answer {
    pub(super) fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).map_err(|error| {
            Error::Refused(format!(
                "{} did not answer with JSON ({error}): is it an admin port (--admin)?",
                self.endpoint
            ))
        })
    }

    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// True if the member refused the client certificate. In TLS 1.3 the client learns that after its own
/// handshake is complete, but the member has read no request.
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

/// The detail of a problem document, or all of it.
fn detail(problem: &Bytes) -> Bytes {
    let document = serde_json::from_slice::<Value>(problem).ok();
    let detail = document.as_ref().and_then(|document| document["detail"].as_str());
    detail.map_or_else(|| problem.clone(), |detail| Bytes::copy_from_slice(detail.as_bytes()))
}

fn first_line(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    text.lines().next().unwrap_or_default().chars().take(SHOWN_CHARS_MAX).collect()
}
