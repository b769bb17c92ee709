//! TLS for the ports, with certificates from files that are read again when they change.
//!
//! Members authenticate each other in both directions with certificates of one CA (`--peer-ca`). A
//! member's certificate contains its host names, as any server's does, and the DNS name
//! `raftexample-<id>`. The receiver of a request compares that name with the sender that the request
//! names; otherwise any member could speak for all the others.
//!
//! # Reloading
//! [`guide::security`](crate::guide::security) says what a change of the files does. A task examines them
//! once a second, and reads them when they have changed and then stayed the same for one interval:
//! certificate and key are two files, so a replacement is never atomic. The task ends with the last
//! [`Tls`].

mod files;

use std::collections::HashMap;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::CertificateDer;
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, RootCertStore};
use slog::{Logger, warn};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

pub use self::files::TlsFiles;
use self::files::{Loaded, check_name, load, read_key, read_roots, reload};
use crate::channels::NodeId;
use crate::error::Error;
use crate::metrics::Metrics;

/// How long a refusal is not logged again for the same address.
const REFUSAL_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Refusals remembered for that. Further ones are only counted.
const REFUSALS_REMEMBERED: usize = 1024;
/// The only protocol offered by ALPN.
const HTTP_1_1: &[u8] = b"http/1.1";

/// The DNS name that identifies member `id` in its certificate.
fn member_name(id: NodeId) -> String {
    format!("raftexample-{id}")
}

/// What a port is for.
#[derive(Clone, Debug)]
pub struct Purpose {
    /// The name in log lines.
    name: &'static str,
    /// The flags for certificate, key and CAs.
    flags: [&'static str; 3],
    /// The peer port, in both directions: the names that this member's own certificate must contain.
    peer_names: Option<Vec<String>>,
}

impl Purpose {
    /// TLS between members, for member `id`, whose peer URL has the host `host`.
    pub fn peers(id: NodeId, host: &str) -> Self {
        Self {
            name: "TLS for peers",
            flags: ["--peer-cert", "--peer-key", "--peer-ca"],
            peer_names: Some(vec![member_name(id), host.trim_matches(['[', ']']).to_owned()]),
        }
    }

    /// TLS for clients.
    pub fn clients() -> Self {
        let flags = ["--cert", "--key", "--client-ca"];
        Self { name: "TLS for clients", flags, peer_names: None }
    }
}

/// TLS of one port. Clones share it.
#[derive(Clone, Debug)]
pub struct Tls {
    purpose: Purpose,
    loaded_rx: watch::Receiver<Loaded>,
    /// When each kind of refusal was last logged for each remote.
    logged: Arc<Mutex<HashMap<(String, String), Instant>>>,
    metrics: Metrics,
    logger: Logger,
}

/// The files that were in use at one moment. What was opened with them ends with them, so it takes the
/// configuration and the word of its replacement from the same value.
#[derive(Clone, Debug)]
pub struct InUse {
    loaded: Loaded,
    loaded_rx: watch::Receiver<Loaded>,
}

/// The other end of a connection: a client by its address, or a server by its URL.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Remote<'a> {
    Client(SocketAddr),
    Server(&'a str),
}

/// The authenticated client of a connection: an extension of its requests.
#[derive(Clone, Debug)]
pub(crate) struct PeerCertificate {
    pub(crate) certificate: Arc<CertificateDer<'static>>,
    pub(crate) address: SocketAddr,
    /// What it was checked with.
    pub(crate) in_use: InUse,
}

/// Checks that a certificate, in DER, belongs to member `id`.
fn check_member(certificate: &[u8], id: NodeId) -> Result<(), String> {
    check_name(&CertificateDer::from(certificate), &member_name(id))
        .map_err(|why| format!("the certificate is not member {id}'s: {why}"))
}

impl Tls {
    /// TLS with certificates from `files`.
    ///
    /// # Errors
    /// [`Error::Config`] naming the flag, the file and what is wrong with it.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new(
        files: TlsFiles,
        purpose: Purpose,
        metrics: Metrics,
        logger: Logger,
    ) -> Result<Self, Error> {
        let stamps = files.stamps();
        let (loaded_tx, loaded_rx) = watch::channel(load(&files, &purpose)?);
        tokio::spawn(reload(files, purpose.clone(), stamps, loaded_tx, logger.clone()));
        Ok(Self { purpose, loaded_rx, logged: Arc::default(), metrics, logger })
    }

    /// The files that are in use now.
    pub fn in_use(&self) -> InUse {
        let mut loaded_rx = self.loaded_rx.clone();
        let loaded = loaded_rx.borrow_and_update().clone();
        InUse { loaded, loaded_rx }
    }

    /// Counts and logs a handshake with `remote` that failed.
    pub(crate) fn refuse_handshake(&self, remote: Remote<'_>, error: &rustls::Error) {
        let why = format!("the TLS handshake failed: {error}");
        self.refuse("tls_handshake", remote, kind(error), &why);
    }

    /// Checks that the certificate of `remote`, in DER, belongs to member `id`. Otherwise it counts, logs
    /// and returns the reason.
    pub(crate) fn check_member(
        &self,
        remote: Remote<'_>,
        certificate: &[u8],
        id: NodeId,
    ) -> Result<(), String> {
        check_member(certificate, id).map_err(|why| {
            let why = match remote {
                Remote::Client(_) => why,
                Remote::Server(_) => format!("answered in the name of member {id}: {why}"),
            };
            self.refuse("certificate_name", remote, id.to_string(), &why);
            why
        })
    }

    /// Counts the refusal of `remote` by its `reason`, and logs `why`. The same `kind` of refusal is
    /// logged once a minute for each remote.
    fn refuse(&self, reason: &'static str, remote: Remote<'_>, kind: String, why: &str) {
        self.metrics.rejected(reason);
        let (shown, key) = match remote {
            // A client's port changes.
            Remote::Client(address) => (address.to_string(), (address.ip().to_string(), kind)),
            Remote::Server(url) => (url.to_owned(), (url.to_owned(), kind)),
        };
        let now = Instant::now();
        let is_recent = |at: &Instant| now.duration_since(*at) < REFUSAL_LOG_INTERVAL;
        let mut logged = self.logged.lock().expect("nothing panics under it");
        if logged.len() >= REFUSALS_REMEMBERED {
            logged.retain(|_, at| is_recent(at));
        }
        if logged.len() < REFUSALS_REMEMBERED && !logged.get(&key).is_some_and(is_recent) {
            logged.insert(key, now);
            drop(logged);
            warn!(self.logger, "{}: refused {}: {}", self.purpose.name, shown, why);
        }
    }
}

impl InUse {
    /// An acceptor for connections to this member.
    pub fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.loaded.server.clone())
    }

    /// The configuration for connections to peers; `None` on the client port.
    pub fn client_config(&self) -> Option<ClientConfig> {
        self.loaded.outgoing.clone()
    }

    /// True once other files came into use.
    pub fn is_replaced(&self) -> bool {
        self.loaded_rx.has_changed().unwrap_or(false)
    }

    /// Resolves once other files came into use.
    pub fn replaced(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut loaded_rx = self.loaded_rx.clone();
        async move {
            if loaded_rx.changed().await.is_err() {
                pending().await
            }
        }
    }
}

/// The TLS error among the sources of `error`, if there is one.
pub fn tls_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // The error inside an io::Error is not its source.
        next = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// The kind of an error, without details such as dates that differ each time.
fn kind(error: &rustls::Error) -> String {
    let text = format!("{error:?}");
    text.split(" {").next().unwrap_or_default().to_owned()
}

/// The configuration for HTTP clients without TLS. It trusts no CA.
pub fn no_tls() -> ClientConfig {
    client_config_builder().with_root_certificates(RootCertStore::empty()).with_no_client_auth()
}

/// The configuration of the commands: the CAs of `--ca`, and the client certificate of `--cert` and
/// `--key` if there is one.
///
/// # Errors
/// [`Error::Config`] naming the flag, the file and what is wrong with it.
pub fn command_config(ca: &Path, own: Option<(&Path, &Path)>) -> Result<ClientConfig, Error> {
    let roots = read_roots(("--ca", ca))?;
    let builder = client_config_builder().with_root_certificates(roots);
    let Some((cert, key)) = own else { return Ok(builder.with_no_client_auth()) };
    let key = Arc::new(SingleCertAndKey::from(read_key(("--cert", cert), ("--key", key))?));
    Ok(builder.with_client_cert_resolver(key))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// TLS 1.2 and 1.3.
fn client_config_builder() -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
    ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("the provider supports both versions")
}

#[cfg(test)]
pub(crate) mod tests;
