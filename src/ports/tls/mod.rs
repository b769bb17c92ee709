//! TLS for the ports, with certificates from files that are read again when they change.
//!
//! Members authenticate each other in both directions with certificates of one CA (`--peer-ca`). A
//! member's certificate contains its host names, as any server's does, and the DNS name
//! `raftexample-<id>`. The receiver of a request compares that name with the sender that the request
//! names; otherwise any member could speak for all the others.
//!
//! # Reloading
//! A task examines the files once a second. It reads and checks them, as at the start, when they have
//! changed and then stayed the same for one interval: certificate and key are two files, so a
//! replacement is never atomic. If the new files are valid, all later handshakes use them, and
//! connections made with the old files are closed. Otherwise the log names the error, and the old
//! certificate stays in use. The task ends with the last [`Tls`].
//!
//! # Limits
//! There are no revocation lists. To revoke a certificate, replace its CA.

mod files;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use slog::{Logger, warn};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

pub use self::files::TlsFiles;
use self::files::{Loaded, Outgoing, check_name, load, read_key, read_roots, reload, wrong};
use crate::channels::NodeId;
use crate::error::Result;
use crate::metrics::Metrics;

/// How long a refusal is not logged again for the same address.
const REFUSAL_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Refusals remembered for that. Further ones are only counted.
const REFUSALS_REMEMBERED: usize = 1024;
/// The only protocol offered by ALPN.
const HTTP_1_1: &[u8] = b"http/1.1";

/// The DNS name that identifies member `id` in its certificate.
pub fn member_name(id: NodeId) -> String {
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
    logged: Arc<Logged>,
    metrics: Metrics,
    logger: Logger,
}

/// When each kind of refusal was last logged for each remote: a client's IP address, because its port
/// changes, or a server's URL.
#[derive(Debug, Default)]
struct Logged(Mutex<HashMap<(String, String), Instant>>);

/// The reason of a refusal in the metrics: the handshake failed.
pub const TLS_HANDSHAKE: &str = "tls_handshake";
/// The reason of a refusal in the metrics: the certificate does not contain the member's name.
pub const CERTIFICATE_NAME: &str = "certificate_name";

/// The authenticated client of a connection: an extension of its requests.
#[derive(Clone, Debug)]
pub struct PeerCertificate {
    /// The certificate, verified with the CAs.
    pub certificate: Arc<CertificateDer<'static>>,
    /// The client's address.
    pub address: SocketAddr,
}

/// Checks that a certificate, in DER, belongs to member `id`.
///
/// # Errors
/// One line that names the member and the reason.
pub fn check_member(certificate: &[u8], id: NodeId) -> std::result::Result<(), String> {
    check_name(&CertificateDer::from(certificate), &member_name(id))
        .map_err(|why| format!("the certificate is not member {id}'s: {why}"))
}

impl Tls {
    /// TLS with certificates from `files`.
    ///
    /// # Errors
    /// [`Config`](crate::error::Error::Config) naming the flag, the file and what is wrong with it.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new(
        files: TlsFiles,
        purpose: Purpose,
        metrics: Metrics,
        logger: Logger,
    ) -> Result<Self> {
        let stamps = files.stamps();
        let (loaded_tx, loaded_rx) = watch::channel(load(&files, &purpose)?);
        tokio::spawn(reload(files, purpose.clone(), stamps, loaded_tx, logger.clone()));
        Ok(Self { purpose, loaded_rx, logged: Arc::default(), metrics, logger })
    }

    /// An acceptor for one connection, with the current certificate.
    pub fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.loaded_rx.borrow().server.clone())
    }

    /// Resolves when files other than the current ones come into use.
    pub fn replaced(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut loaded_rx = self.loaded_rx.clone();
        loaded_rx.mark_unchanged();
        async move {
            if loaded_rx.changed().await.is_err() {
                std::future::pending().await
            }
        }
    }

    /// The configuration for connections to peers. Each handshake uses the files that are current then.
    /// `None` on the client port.
    pub fn client_config(&self) -> Option<ClientConfig> {
        self.loaded_rx.borrow().outgoing.as_ref()?;
        let current = Arc::new(Current(self.loaded_rx.clone()));
        let mut config = client_config_builder()
            .dangerous()
            .with_custom_certificate_verifier(current.clone())
            .with_client_cert_resolver(current);
        // A resumed session would not be checked against the current CAs.
        config.resumption = Resumption::disabled();
        config.alpn_protocols = vec![HTTP_1_1.into()];
        Some(config)
    }

    /// Counts the refusal of a client at `address`, and logs `why`. The same `kind` of refusal is logged
    /// once a minute for each address.
    pub fn refuse(&self, reason: &'static str, address: SocketAddr, kind: String, why: &str) {
        self.metrics.rejected(reason);
        if self.logged.is_due(address.ip().to_string(), kind) {
            warn!(self.logger, "{}: refused {}: {}", self.purpose.name, address, why);
        }
    }

    /// Like [`refuse`](Self::refuse), for the server at `url`.
    pub fn refuse_answer(&self, reason: &'static str, url: &str, kind: String, why: &str) {
        self.metrics.rejected(reason);
        if self.logged.is_due(url.to_owned(), kind) {
            warn!(self.logger, "{}: refused {}: {}", self.purpose.name, url, why);
        }
    }
}

impl Logged {
    fn is_due(&self, remote: String, kind: String) -> bool {
        let now = Instant::now();
        let is_recent = |at: &Instant| now.duration_since(*at) < REFUSAL_LOG_INTERVAL;
        let mut logged = self.0.lock().expect("nothing panics under it");
        if logged.len() >= REFUSALS_REMEMBERED {
            logged.retain(|_, at| is_recent(at));
        }
        let key = (remote, kind);
        if logged.get(&key).is_some_and(is_recent) || logged.len() >= REFUSALS_REMEMBERED {
            return false;
        }
        logged.insert(key, now);
        true
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
pub fn kind(error: &rustls::Error) -> String {
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
/// [`Config`](crate::error::Error::Config) naming the flag, the file and what is wrong with it.
pub fn command_config(ca: &Path, own: Option<(&Path, &Path)>) -> Result<ClientConfig> {
    let roots = read_roots(ca).map_err(|why| wrong("--ca", ca, &why))?;
    let builder = client_config_builder().with_root_certificates(roots);
    let Some((cert, key)) = own else { return Ok(builder.with_no_client_auth()) };
    let key = Arc::new(SingleCertAndKey::from(read_key("--cert", cert, "--key", key)?));
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

/// The current certificate and CAs, for outgoing connections.
#[derive(Debug)]
struct Current(watch::Receiver<Loaded>);

impl Current {
    fn outgoing<T>(&self, with: impl FnOnce(&Outgoing) -> T) -> T {
        with(self.0.borrow().outgoing.as_ref().expect("the purpose of a port does not change"))
    }
}

impl ResolvesClientCert for Current {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.outgoing(|outgoing| outgoing.key.clone()))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Delegates every check to rustls's verifier.
impl ServerCertVerifier for Current {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        self.outgoing(|outgoing| {
            outgoing.verifier.verify_server_cert(
                end_entity,
                intermediates,
                server_name,
                ocsp_response,
                now,
            )
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.outgoing(|outgoing| outgoing.verifier.verify_tls12_signature(message, cert, dss))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.outgoing(|outgoing| outgoing.verifier.verify_tls13_signature(message, cert, dss))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.outgoing(|outgoing| outgoing.verifier.supported_verify_schemes())
    }
}

#[cfg(test)]
pub(crate) mod tests;
