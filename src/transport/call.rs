//! One request to a peer and its answer.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderMap;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use reqwest::tls::TlsInfo;
use tokio::time::timeout;

use super::names::Names;
use super::wire::NoMember;
use super::{IDLE_CONNECTION_TIMEOUT, IDLE_CONNECTIONS, Shared, Target, TransportConfig, wire};
use crate::channels::{PeerHeader, PeerReport, Refusal};
use crate::error::{Error, cause};
use crate::ports::tls::{InUse, Remote, Tls, no_tls, tls_error};

/// The most bytes of a peer's answer that are read.
const ANSWER_BYTES: usize = 64 << 10;

/// The HTTP clients. They send every request at most once:
/// - `retry::never` turns off reqwest's retries, and `Policy::none` its redirects.
/// - hyper-util (0.1.21, `client/legacy/client.rs`, `send_request`) retries only a request that hyper
///   hands back whole. hyper (1.12, `client/dispatch.rs`) hands back only what its connection has not
///   taken yet, so nothing of it was written.
/// - A receiver drops a number that is not above the last one it saw.
///
/// HTTP/1 closes the connection of a request that timed out, so it is never used again. But hyper first
/// flushes what it took (1.12, `proto/h1/io.rs`, `poll_shutdown`), which never ends if the peer reads
/// nothing. So Linux is told to close a connection whose bytes are not accepted for a while.
pub(super) struct Clients {
    requests: reqwest::Client,
    /// A receiver of a snapshot that writes to its disk may take no bytes for longer.
    snapshots: reqwest::Client,
    /// The certificates that they use.
    pub(super) in_use: Option<InUse>,
}

impl Clients {
    /// Clients with the current certificates.
    pub(super) fn new(config: &TransportConfig, names: &Names) -> Result<Self, Error> {
        let in_use = config.tls.as_ref().map(Tls::in_use);
        let tls = in_use.as_ref().and_then(InUse::client_config).unwrap_or_else(no_tls);
        let client = |patience| {
            let builder = reqwest::Client::builder()
                .retry(reqwest::retry::never())
                .redirect(reqwest::redirect::Policy::none())
                .no_proxy()
                .http1_only()
                .dns_resolver(Arc::new(names.clone()))
                .tcp_nodelay(true)
                .connect_timeout(config.election_timeout / 4)
                // The answer brings the peer's certificate.
                .tls_info(true)
                .tls_backend_preconfigured(tls.clone())
                .pool_idle_timeout(IDLE_CONNECTION_TIMEOUT)
                .pool_max_idle_per_host(IDLE_CONNECTIONS);
            #[cfg(target_os = "linux")]
            let builder = builder.tcp_user_timeout(patience);
            #[cfg(not(target_os = "linux"))]
            let _: Duration = patience;
            builder
                .build()
                .map_err(|error| Error::Config(format!("cannot make the HTTP client: {error}")))
        };
        Ok(Self {
            requests: client(config.half_election_timeout())?,
            snapshots: client(config.snapshot_progress_timeout)?,
            in_use,
        })
    }
}

/// Makes the clients again whenever other certificates come into use: no idle connection outlives them.
pub(super) async fn renew_clients(shared: Arc<Shared>) {
    loop {
        let replaced = replaced(shared.clients.borrow().in_use.as_ref());
        replaced.await;
        let clients =
            Clients::new(&shared.config, &shared.names).expect("such clients were made before");
        shared.clients.send_replace(clients);
    }
}

/// Resolves when these certificates are replaced; without TLS, never.
pub(super) fn replaced(in_use: Option<&InUse>) -> BoxFuture<'static, ()> {
    in_use.map_or_else(|| pending().boxed(), |in_use| in_use.replaced().boxed())
}

/// Why a request has no valid answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// No connection: the request cannot have been sent.
    #[error("{0}")]
    NotSent(String),
    /// The peer may have taken it.
    #[error("{0}")]
    Unknown(String),
    /// An answer of another release. The outcome is unknown, because nothing checks who sent that answer.
    #[error("{0}")]
    OtherRelease(String),
    /// The peer, named by `header`, did not take it.
    #[error("member {} answered: {refusal}", header.from)]
    Refused { header: PeerHeader, refusal: Refusal },
}

impl Failure {
    pub(super) fn unknown(error: reqwest::Error) -> Self {
        Failure::Unknown(cause(&error))
    }

    /// A refusal of this member, which the node decides on. `NotReady` is none.
    pub(super) fn report(&self) -> Option<PeerReport> {
        match self {
            Failure::Refused { refusal: Refusal::NotReady(_), .. } => None,
            Failure::Refused { header, refusal } => {
                Some(PeerReport::Refused { header: header.clone(), refusal: refusal.clone() })
            }
            Failure::NotSent(_) | Failure::Unknown(_) | Failure::OtherRelease(_) => None,
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
    pub(super) to: &'a Target,
    pub(super) path: &'static str,
    /// In addition to those that name the two ends.
    pub(super) headers: HeaderMap,
    pub(super) body: reqwest::Body,
}

impl Shared {
    /// Sends a request without further headers, as [`call`](Self::call).
    pub(super) async fn ask(
        &self,
        to: &Target,
        path: &'static str,
        body: Vec<u8>,
        patience: Duration,
    ) -> Result<Answered, Failure> {
        let (headers, body) = (HeaderMap::new(), body.into());
        self.call(Call { to, path, headers, body }, patience).await
    }

    /// Sends one request and waits for its answer, for `patience` altogether.
    pub(super) async fn call(
        &self,
        call: Call<'_>,
        patience: Duration,
    ) -> Result<Answered, Failure> {
        timeout(patience, self.call_without_deadline(call))
            .await
            .unwrap_or_else(|_| Err(Failure::Unknown(format!("no answer within {patience:?}"))))
    }

    pub(super) async fn call_without_deadline(&self, call: Call<'_>) -> Result<Answered, Failure> {
        let (header, response) = self.send(call).await?;
        let may_stream = wire::may_stream(response.headers());
        Ok(Answered { header, may_stream, body: read_body(response).await? })
    }

    /// Sends one request. Returns an answer of 2xx from the member that was meant: its header, and the
    /// response, whose body is not read yet.
    pub(super) async fn send(
        &self,
        call: Call<'_>,
    ) -> Result<(PeerHeader, reqwest::Response), Failure> {
        let Target { id, incarnation, url: peer_url } = call.to;
        let ours = self.admission.header(*id, *incarnation);
        let mut headers = call.headers;
        wire::put_identity(&mut headers, &ours).map_err(Failure::NotSent)?;
        let url = format!("{}{}", peer_url.trim_end_matches('/'), call.path);
        let client = match (call.path, &*self.clients.borrow()) {
            ("/raft/snapshot", Clients { snapshots, .. }) => snapshots.clone(),
            (_, Clients { requests, .. }) => requests.clone(),
        };
        let request = client.post(url).headers(headers).body(call.body);
        let response = request.send().await.map_err(|error| {
            if let Some(tls) = &self.config.tls
                && let Some(error) = tls_error(&error)
            {
                tls.refuse_handshake(Remote::Server(peer_url), error);
            }
            // A builder's error is a URL that cannot be used.
            let not_sent = error.is_connect() || error.is_builder();
            let why = cause(&error);
            if not_sent { Failure::NotSent(why) } else { Failure::Unknown(why) }
        })?;
        let status = response.status();
        let header = wire::identity(response.headers()).map_err(|error| match error {
            NoMember::OtherRelease(_) => Failure::OtherRelease(error.to_string()),
            NoMember::Malformed(why) => {
                Failure::Unknown(format!("answered {status} by no member: {why}"))
            }
        })?;
        if let Some(tls) = &self.config.tls {
            // The handshake has checked the certificate's host and CA, but not whose it is.
            let info = response.extensions().get::<TlsInfo>();
            let certificate = info.and_then(TlsInfo::peer_certificate).unwrap_or_default();
            tls.check_member(Remote::Server(peer_url), certificate, header.from)
                .map_err(Failure::Unknown)?;
        }
        if status.is_success() {
            check_ends(&ours, &header)?;
            return Ok((header, response));
        }
        let headers = response.headers().clone();
        let body = read_body(response).await?;
        let line = String::from_utf8_lossy(&body).lines().next().unwrap_or_default().to_owned();
        Err(match wire::refusal(status, &headers, ours.from, &line) {
            Some(refusal) => Failure::Refused { header, refusal },
            None => Failure::Unknown(format!("member {} answered {status}: {line}", header.from)),
        })
    }
}

/// Reads the body of a short answer.
async fn read_body(mut response: reqwest::Response) -> Result<Vec<u8>, Failure> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(Failure::unknown)? {
        body.extend_from_slice(&chunk);
        if body.len() > ANSWER_BYTES {
            return Err(Failure::Unknown(format!("an answer of more than {ANSWER_BYTES} bytes")));
        }
    }
    Ok(body)
}

/// Checks that the header of an answer names both ends as that of the request, `ours`, does. A greeting
/// may leave open who listens there, and the cluster's id.
fn check_ends(ours: &PeerHeader, header: &PeerHeader) -> Result<(), Failure> {
    let cluster_matches = ours.cluster_id == 0 || header.cluster_id == ours.cluster_id;
    let member_matches = header.from == ours.to && cluster_matches;
    if header.to == ours.from && (ours.to == 0 || member_matches) {
        return Ok(());
    }
    Err(Failure::Unknown(format!(
        "member {} of cluster {:016x} asked member {} of it, but member {} of cluster {:016x} \
         answered member {}: check the peer URLs",
        ours.from, ours.cluster_id, ours.to, header.from, header.cluster_id, header.to
    )))
}
