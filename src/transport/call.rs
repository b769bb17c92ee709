//! One request to a peer and its answer.

use std::time::Duration;

use axum::http::{HeaderMap, StatusCode};
use tokio::time::timeout;

use super::{IDLE_CONNECTION_TIMEOUT, Shared, TransportConfig, wire};
use crate::channels::{NodeId, PeerHeader, PeerReport, Refusal};
use crate::ports::tls::{Reason, Tls, check_member, kind, no_tls, tls_error};

/// The most bytes of a peer's answer that are read.
const ANSWER_BYTES: usize = 64 << 10;

/// The client that makes every request, each at most once.
///
/// Why no request is sent twice:
/// - `retry::never` turns off reqwest's own retries, and `Policy::none` its redirects.
/// - Below it, hyper-util (0.1.21, `client/legacy/client.rs`, `send_request`) tries a request again
///   on another connection if a reused one was closed, and reqwest leaves that on. It does so only
///   if hyper hands the whole request back, and hyper (1.12, `client/dispatch.rs`) does so only
///   with one still in the connection's mailbox. Once the connection's task took it, which is
///   before its first byte is written, an error comes without the request, and is final.
/// - The receiver drops a number that is not above the last one it saw: the second line.
///
/// HTTP/1 it has to be: a request whose future is dropped closes its connection (hyper's dispatcher
/// sees that nobody waits for the answer), so one that timed out is never used again. But before it
/// closes, hyper flushes what it took (1.12, `proto/h1/io.rs`, `poll_shutdown`), and to a peer that
/// reads nothing that takes for ever, with the batch in memory. So Linux is told to give up a
/// connection whose bytes are not taken for `patience`; elsewhere it does so in its own time.
pub(super) fn client(
    config: &TransportConfig,
    patience: Duration,
) -> reqwest::Result<reqwest::Client> {
    let tls = config.tls.as_ref().and_then(Tls::client_config).unwrap_or_else(no_tls);
    let builder = reqwest::Client::builder()
        .retry(reqwest::retry::never())
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .http1_only()
        .tcp_nodelay(true)
        .connect_timeout(config.half_election_timeout())
        // The answer brings the certificate, see `check_certificate`.
        .tls_info(true)
        .tls_backend_preconfigured(tls)
        .pool_idle_timeout(IDLE_CONNECTION_TIMEOUT);
    #[cfg(target_os = "linux")]
    let builder = builder.tcp_user_timeout(patience);
    #[cfg(not(target_os = "linux"))]
    let _ = patience;
    builder.build()
}

/// Why a request brought no answer to go by.
pub(super) enum Failure {
    /// No connection: the request cannot have been sent.
    NotSent(String),
    /// Anything may have happened to it.
    Lost(String),
    /// The peer answered and did not take it.
    Refused {
        /// Who answered.
        header: PeerHeader,
        /// What it answered.
        refusal: Refusal,
    },
}

impl Failure {
    pub(super) fn lost(error: reqwest::Error) -> Self {
        Failure::Lost(cause(&error))
    }

    /// A refusal that says something about who we are, and so is for the node to judge. "Not now"
    /// is none of these.
    pub(super) fn report(&self) -> Option<PeerReport> {
        match self {
            Failure::Refused { refusal: Refusal::NotReady(_), .. } => None,
            Failure::Refused { header, refusal } => {
                Some(PeerReport::Refused { header: header.clone(), refusal: refusal.clone() })
            }
            Failure::NotSent(_) | Failure::Lost(_) => None,
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::NotSent(why) | Failure::Lost(why) => formatter.write_str(why),
            Failure::Refused { header, refusal } => {
                write!(formatter, "member {} answered: {refusal}", header.from)
            }
        }
    }
}

/// An answer of 2xx from the member that was meant.
pub(super) struct Answered {
    pub(super) header: PeerHeader,
    /// True if what follows may be streamed.
    pub(super) may_stream: bool,
    pub(super) body: Vec<u8>,
}

/// One request: where it goes and what it says of itself.
pub(super) struct Call<'a> {
    pub(super) client: &'a reqwest::Client,
    /// The receiver; 0 if whoever answers is meant.
    pub(super) to: NodeId,
    pub(super) url: &'a str,
    pub(super) path: &'static str,
    /// Beside those that name the two ends.
    pub(super) headers: HeaderMap,
    pub(super) body: reqwest::Body,
}

impl Shared {
    /// Sends one request and waits for its answer, for `patience` altogether.
    pub(super) async fn call(
        &self,
        call: Call<'_>,
        patience: Duration,
    ) -> Result<Answered, Failure> {
        match timeout(patience, self.call_without_deadline(call)).await {
            Ok(answered) => answered,
            Err(_) => Err(Failure::Lost(format!("no answer within {patience:?}"))),
        }
    }

    pub(super) async fn call_without_deadline(&self, call: Call<'_>) -> Result<Answered, Failure> {
        let (ours, response) = self.send(call).await?;
        self.read_answer(&ours, response).await
    }

    /// Sends one request; our header in it, and the answer's head.
    pub(super) async fn send(
        &self,
        call: Call<'_>,
    ) -> Result<(PeerHeader, reqwest::Response), Failure> {
        let ours = self.admission.header(call.to);
        let mut headers = call.headers;
        wire::put_identity(&mut headers, &ours)
            .map_err(|error| Failure::NotSent(error.to_string()))?;
        let url = format!("{}{}", call.url.trim_end_matches('/'), call.path);
        let request = call.client.post(url).headers(headers).body(call.body);
        let response = request.send().await.map_err(|error| {
            if let Some(tls) = &self.config.tls
                && let Some(error) = tls_error(&error)
            {
                let why = format!("the TLS handshake failed: {error}");
                tls.refuse_answer(Reason::Handshake, call.url, kind(error), &why);
            }
            // A builder's error is a URL that cannot be used.
            let not_sent = error.is_connect() || error.is_builder();
            let why = cause(&error);
            if not_sent { Failure::NotSent(why) } else { Failure::Lost(why) }
        })?;
        self.check_certificate(call.url, &response)?;
        Ok((ours, response))
    }

    /// With TLS, an answer counts only with the certificate of the member that it names. That the
    /// certificate holds the host that was asked, and is of the authority, was checked before.
    fn check_certificate(&self, url: &str, response: &reqwest::Response) -> Result<(), Failure> {
        let Some(tls) = &self.config.tls else { return Ok(()) };
        // An answer that names nobody is refused as such by whoever reads it.
        let Ok(header) = wire::identity(response.headers()) else { return Ok(()) };
        let info = response.extensions().get::<reqwest::tls::TlsInfo>();
        let certificate = info.and_then(reqwest::tls::TlsInfo::peer_certificate);
        check_member(certificate.unwrap_or_default(), header.from).map_err(|why| {
            let why = format!("answered in the name of member {}: {why}", header.from);
            tls.refuse_answer(Reason::Name, url, header.from.to_string(), &why);
            Failure::Lost(why)
        })
    }

    /// Reads the body of a short answer, and judges the whole.
    pub(super) async fn read_answer(
        &self,
        ours: &PeerHeader,
        mut response: reqwest::Response,
    ) -> Result<Answered, Failure> {
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(Failure::lost)? {
            body.extend_from_slice(&chunk);
            if body.len() > ANSWER_BYTES {
                return Err(Failure::Lost(format!("an answer of more than {ANSWER_BYTES} bytes")));
            }
        }
        answered(ours, response.status(), response.headers(), body)
    }
}

/// Judges an answer to a request with the header `ours`.
pub(super) fn answered(
    ours: &PeerHeader,
    status: StatusCode,
    headers: &HeaderMap,
    body: Vec<u8>,
) -> Result<Answered, Failure> {
    let line = || String::from_utf8_lossy(&body).lines().next().unwrap_or_default().to_owned();
    let header = wire::identity(headers)
        .map_err(|error| Failure::Lost(format!("answered {status} by no member: {error}")))?;
    if let Some(refusal) = wire::refusal(status, headers, ours.from, &line()) {
        // Whose word this is, and what it is worth, the node decides.
        return Err(Failure::Refused { header, refusal });
    }
    if !status.is_success() {
        return Err(Failure::Lost(format!("member {} answered {status}: {}", header.from, line())));
    }
    // A greeting goes to whoever listens there, and asks for the cluster's id.
    let cluster_matches = ours.cluster_id == 0 || header.cluster_id == ours.cluster_id;
    let member_matches = ours.to == 0 || header.from == ours.to;
    if (ours.to != 0 && !cluster_matches) || !member_matches || header.to != ours.from {
        return Err(Failure::Lost(format!(
            "member {} of cluster {:016x} asked member {} of it, but member {} of cluster {:016x} \
             answered member {}: check the peer URLs",
            ours.from, ours.cluster_id, ours.to, header.from, header.cluster_id, header.to
        )));
    }
    Ok(Answered { header, may_stream: wire::may_stream(headers), body })
}

/// What an error comes from, on one line: what reqwest and hyper put around it names the URL and the
/// layers, which the reader of a log line knows.
fn cause(error: &reqwest::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
