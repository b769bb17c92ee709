//! TLS for the ports: certificates from files, read again when the files change.
//!
//! Members prove to each other who they are, both ways, with certificates of one authority
//! (`--peer-ca`). A member's certificate holds its hosts, as any server's does, and the DNS name
//! `raftexample-<id>`: the authority says by it which member this is, and the receiver of a request
//! compares that with the sender that the request names. Without this every member could speak in
//! the name of all others.
//!
//! # Reading the files again
//! A task looks at the files once a second. When they have changed, and then stayed the same until
//! the next look, they are read and checked as at the start: a certificate and its key are two
//! files, and are never replaced at the same moment. What passes is used by each handshake from then
//! on, in both directions; what does not is one line in the log, and the old one stays in use.
//! Connections that are open go on. The task ends with the last [`Tls`].
//!
//! # What it is not
//! There are no revocation lists: a certificate that is no longer to be trusted is got rid of with
//! its authority.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption, WebPkiServerVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig,
    SignatureScheme,
};
use slog::{Logger, info, warn};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tokio_rustls::TlsAcceptor;

use crate::channels::NodeId;
use crate::error::{Error, Result};
use crate::metrics::Metrics;

/// How often the files are looked at.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How long the same refusal of the same address is not logged again.
const REFUSAL_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// How many refusals are remembered for that; more are counted only.
const REFUSALS_REMEMBERED: usize = 1024;
/// The only protocol that is spoken over TLS here.
const HTTP_1_1: &[u8] = b"http/1.1";

/// The DNS name by which a certificate is member `id`'s.
pub fn member_name(id: NodeId) -> String {
    format!("raftexample-{id}")
}

/// The files of one port, all PEM.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The certificate, and behind it those between it and the authority, if there are any.
    pub cert: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// The authorities whose certificates the other side has to have; without them it needs none.
    pub ca: Option<PathBuf>,
}

/// What a port is for.
#[derive(Clone, Debug)]
enum Purpose {
    /// Members, in both directions; the names that the own certificate has to hold.
    Peers { names: Vec<String> },
    /// Clients, and who looks after the member.
    Clients,
}

impl Purpose {
    /// The flags that name certificate, key and authorities.
    fn flags(&self) -> [&'static str; 3] {
        match self {
            Purpose::Peers { .. } => ["--peer-cert", "--peer-key", "--peer-ca"],
            Purpose::Clients => ["--cert", "--key", "--client-ca"],
        }
    }

    /// What the log calls it.
    fn name(&self) -> &'static str {
        match self {
            Purpose::Peers { .. } => "TLS for peers",
            Purpose::Clients => "TLS for clients",
        }
    }
}

/// What was made of the files.
#[derive(Debug)]
struct Loaded {
    server: Arc<ServerConfig>,
    /// For peers alone.
    outgoing: Option<Outgoing>,
}

#[derive(Debug)]
struct Outgoing {
    key: Arc<CertifiedKey>,
    verifier: Arc<WebPkiServerVerifier>,
}

/// TLS on one port; clones share it.
#[derive(Clone, Debug)]
pub struct Tls {
    purpose: Purpose,
    loaded_rx: watch::Receiver<Loaded>,
    logged: Arc<Logged>,
    metrics: Metrics,
    logger: Logger,
}

/// When a kind of refusal was last logged for somebody.
#[derive(Debug, Default)]
struct Logged(Mutex<HashMap<(Remote, String), Instant>>);

/// The other end of a connection, without what differs each time.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Remote {
    Address(IpAddr),
    Url(String),
}

/// Why the other end of a connection is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The handshake failed.
    Handshake,
    /// The certificate is not the one of the member that is spoken for.
    Name,
}

impl Reason {
    /// The word that it is counted by.
    fn word(self) -> &'static str {
        match self {
            Reason::Handshake => "tls_handshake",
            Reason::Name => "certificate_name",
        }
    }
}

/// Who is at the other end of a connection: an extension of its requests.
#[derive(Clone, Debug)]
pub struct PeerCertificate {
    /// The certificate, checked against the authorities.
    pub certificate: Arc<CertificateDer<'static>>,
    /// Where the connection comes from.
    pub address: SocketAddr,
}

impl PeerCertificate {
    /// Checks that the certificate is member `id`'s.
    ///
    /// # Errors
    /// One line that says whose it is.
    pub fn check_member(&self, id: NodeId) -> std::result::Result<(), String> {
        check_member(&self.certificate, id)
    }
}

/// Checks that a certificate, in DER, is member `id`'s.
///
/// # Errors
/// One line that says whose it is.
pub fn check_member(certificate: &[u8], id: NodeId) -> std::result::Result<(), String> {
    check_name(&CertificateDer::from(certificate), &member_name(id))
        .map_err(|why| format!("the certificate is not member {id}'s: {why}"))
}

impl Tls {
    /// TLS between members: the files of member `id`, whose URL names `host`.
    ///
    /// # Errors
    /// [`Error::Config`] naming the flag, the file and what is wrong with it.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn peers(
        files: TlsFiles,
        id: NodeId,
        host: &str,
        metrics: Metrics,
        logger: Logger,
    ) -> Result<Self> {
        let names = vec![member_name(id), host.trim_matches(['[', ']']).to_owned()];
        Self::new(files, Purpose::Peers { names }, metrics, logger)
    }

    /// TLS for clients.
    ///
    /// # Errors
    /// [`Error::Config`] naming the flag, the file and what is wrong with it.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn clients(files: TlsFiles, metrics: Metrics, logger: Logger) -> Result<Self> {
        Self::new(files, Purpose::Clients, metrics, logger)
    }

    fn new(files: TlsFiles, purpose: Purpose, metrics: Metrics, logger: Logger) -> Result<Self> {
        let stamps = files.stamps();
        let (loaded_tx, loaded_rx) = watch::channel(load(&files, &purpose)?);
        tokio::spawn(reload(files, purpose.clone(), stamps, loaded_tx, logger.clone()));
        Ok(Self { purpose, loaded_rx, logged: Arc::default(), metrics, logger })
    }

    /// What accepts one connection, with the certificate of now.
    pub fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.loaded_rx.borrow().server.clone())
    }

    /// Tells when other files come into use than those that are now.
    pub fn changes(&self) -> Changes {
        let mut loaded_rx = self.loaded_rx.clone();
        loaded_rx.mark_unchanged();
        Changes(loaded_rx)
    }

    /// What makes connections to other members, each with the certificate and the authorities of
    /// its moment. `None` if this is a port for clients.
    pub fn client_config(&self) -> Option<ClientConfig> {
        self.loaded_rx.borrow().outgoing.as_ref()?;
        let current = Arc::new(Current(self.loaded_rx.clone()));
        let mut config = client_config_builder()
            .dangerous()
            .with_custom_certificate_verifier(current.clone())
            .with_client_cert_resolver(current);
        // A session that is taken up again is not checked again, and authorities change.
        config.resumption = Resumption::disabled();
        config.alpn_protocols = vec![HTTP_1_1.into()];
        Some(config)
    }

    /// Counts that `address`, which connected to this port, is refused, and logs `why`; the same
    /// `kind` of refusal of the same address once a minute.
    pub fn refuse(&self, reason: Reason, address: SocketAddr, kind: String, why: &str) {
        self.metrics.rejected(reason.word());
        if self.logged.is_due(Remote::Address(address.ip()), kind) {
            warn!(self.logger, "{}: refused {}: {}", self.purpose.name(), address, why);
        }
    }

    /// As [`refuse`](Self::refuse), for whoever answers at `url`.
    pub fn refuse_answer(&self, reason: Reason, url: &str, kind: String, why: &str) {
        self.metrics.rejected(reason.word());
        if self.logged.is_due(Remote::Url(url.to_owned()), kind) {
            warn!(self.logger, "{}: refused {}: {}", self.purpose.name(), url, why);
        }
    }
}

impl Logged {
    fn is_due(&self, remote: Remote, kind: String) -> bool {
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

/// What TLS itself has to say about a handshake that failed, if that is why.
pub fn tls_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // An error that is kept in an io::Error is not its source.
        next = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// The kind of an error: without what differs each time, a date above all.
pub fn kind(error: &rustls::Error) -> String {
    let text = format!("{error:?}");
    text.split(" {").next().unwrap_or_default().to_owned()
}

/// What an HTTP client is given that uses no TLS: it trusts nobody.
pub fn no_tls() -> ClientConfig {
    client_config_builder().with_root_certificates(RootCertStore::empty()).with_no_client_auth()
}

/// What the commands connect to members with: `--ca`, and `--cert` with `--key` where members want to
/// know who asks.
///
/// # Errors
/// [`Error::Config`] naming the flag, the file and what is wrong with it.
pub fn command_config(ca: &Path, own: Option<(&Path, &Path)>) -> Result<ClientConfig> {
    let roots = read_roots(ca).map_err(|why| wrong("--ca", ca, &why))?;
    let builder = client_config_builder().with_root_certificates(roots);
    let Some((cert, key)) = own else { return Ok(builder.with_no_client_auth()) };
    let chain = read_certificates(cert).map_err(|why| wrong("--cert", cert, &why))?;
    let private = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| wrong("--key", key, &describe(error, "private key")))?;
    builder.with_client_auth_cert(chain, private).map_err(|error| {
        let why = format!("it does not go with --cert {}: {error}", cert.display());
        wrong("--key", key, &why)
    })
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// TLS 1.2 and 1.3.
fn client_config_builder() -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
    ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("the provider has what both versions need")
}

/// Certificate and authorities of the moment, for outgoing connections.
#[derive(Debug)]
struct Current(watch::Receiver<Loaded>);

/// See [`Tls::changes`].
#[derive(Clone, Debug)]
pub struct Changes(watch::Receiver<Loaded>);

impl Changes {
    /// Waits until other files are in use. May be dropped and called again.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

impl Current {
    fn outgoing<T>(&self, with: impl FnOnce(&Outgoing) -> T) -> T {
        with(self.0.borrow().outgoing.as_ref().expect("a port for peers stays one"))
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

/// Every check is rustls's own.
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

/// What tells that a file was written, replaced, or became readable: when its inode last changed,
/// the inode, and the length. `None` if it cannot be looked at.
type Stamp = Option<(i64, i64, u64, u64)>;

impl TlsFiles {
    /// The files by the position of their flags.
    fn paths(&self) -> [Option<&Path>; 3] {
        [Some(&self.cert), Some(&self.key), self.ca.as_deref()]
    }

    fn stamps(&self) -> [Stamp; 3] {
        self.paths().map(|path| {
            let metadata = fs::metadata(path?).ok()?;
            Some((metadata.ctime(), metadata.ctime_nsec(), metadata.ino(), metadata.len()))
        })
    }
}

/// Reads the files again when they have changed, until nobody uses them any more.
async fn reload(
    files: TlsFiles,
    purpose: Purpose,
    mut used: [Stamp; 3],
    loaded_tx: watch::Sender<Loaded>,
    logger: Logger,
) {
    let mut checks = interval(CHECK_INTERVAL);
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = used;
    // True while what is there cannot be used.
    let mut failed = false;
    loop {
        tokio::select! {
            () = loaded_tx.closed() => return,
            _ = checks.tick() => {}
        }
        let (checked, of) = (files.clone(), purpose.clone());
        // Disks may take their time.
        let looked = tokio::task::spawn_blocking(move || {
            let stamps = checked.stamps();
            // What could not be used may be tomorrow: a certificate that is not valid yet.
            let is_due = stamps == last && (stamps != used || failed);
            (stamps, is_due.then(|| load(&checked, &of)))
        });
        let Ok((stamps, loaded)) = looked.await else { return };
        last = stamps;
        match loaded {
            None => continue,
            Some(Ok(loaded)) => {
                failed = false;
                loaded_tx.send_replace(loaded);
                let [cert, ..] = purpose.flags();
                let (name, path) = (purpose.name(), files.cert.display());
                info!(logger, "{}: the changed {} {} is used from now on", name, cert, path);
            }
            Some(Err(error)) => {
                if stamps != used {
                    warn!(logger, "{}: the old certificate is kept: {}", purpose.name(), error);
                }
                failed = true;
            }
        }
        used = stamps;
    }
}

/// Reads and checks the files; blocks.
fn load(files: &TlsFiles, purpose: &Purpose) -> Result<Loaded> {
    let [cert_flag, key_flag, ca_flag] = purpose.flags();
    let chain =
        read_certificates(&files.cert).map_err(|why| wrong(cert_flag, &files.cert, &why))?;
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|error| wrong(key_flag, &files.key, &describe(error, "private key")))?;
    let key = CertifiedKey::from_der(chain, key, &provider()).map_err(|error| {
        let why = format!("it does not go with {cert_flag} {}: {error}", files.cert.display());
        wrong(key_flag, &files.key, &why)
    })?;
    let roots = match &files.ca {
        None => None,
        Some(ca) => Some(read_roots(ca).map_err(|why| wrong(ca_flag, ca, &why))?),
    };
    let wrong_cert = |why: String| wrong(cert_flag, &files.cert, &why);
    let outgoing = match (purpose, &roots) {
        (Purpose::Peers { names }, Some(roots)) => {
            let verifier = check_own(&key, names, roots).map_err(wrong_cert)?;
            Some(Outgoing { key: Arc::new(key.clone()), verifier })
        }
        (Purpose::Peers { .. }, None) => {
            return Err(Error::Config("https:// between members needs --peer-ca".into()));
        }
        (Purpose::Clients, _) => {
            check_dates(&key).map_err(wrong_cert)?;
            None
        }
    };
    let server = server_config(key, roots.as_ref(), outgoing.is_some())
        .map_err(|error| wrong_cert(error.to_string()))?;
    Ok(Loaded { server: Arc::new(server), outgoing })
}

fn wrong(flag: &str, path: &Path, why: &str) -> Error {
    Error::Config(format!("cannot use {flag} {}: {why}", path.display()))
}

fn describe(error: pem::Error, wanted: &str) -> String {
    match error {
        pem::Error::Io(error) => error.to_string(),
        pem::Error::NoItemsFound => format!("it holds no {wanted} in PEM"),
        error => format!("it is no PEM file: {error}"),
    }
}

fn read_certificates(path: &Path) -> std::result::Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(path);
    match read.and_then(|found| found.collect::<std::result::Result<Vec<_>, _>>()) {
        Ok(certificates) if certificates.is_empty() => {
            Err(describe(pem::Error::NoItemsFound, "certificate"))
        }
        read => read.map_err(|error| describe(error, "certificate")),
    }
}

fn read_roots(path: &Path) -> std::result::Result<Arc<RootCertStore>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(path)? {
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    Ok(Arc::new(roots))
}

/// Checks a member's own certificate as the others will; returns what checks theirs.
fn check_own(
    key: &CertifiedKey,
    names: &[String],
    roots: &Arc<RootCertStore>,
) -> std::result::Result<Arc<WebPkiServerVerifier>, String> {
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    let (own, between) = key.cert.split_first().ok_or("it holds no certificate")?;
    for name in names {
        check_name(own, name)?;
    }
    let server = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider())
        .build()
        .map_err(|error| failed(&error))?;
    let client = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
        .build()
        .map_err(|error| failed(&error))?;
    let now = UnixTime::now();
    let name = server_name(&names[0])?;
    server.verify_server_cert(own, between, &name, &[], now).map_err(|error| failed(&error))?;
    client.verify_client_cert(own, between, now).map_err(|error| failed(&error))?;
    Ok(server)
}

fn server_name(name: &str) -> std::result::Result<ServerName<'_>, String> {
    ServerName::try_from(name).map_err(|_| format!("{name:?} cannot stand in a certificate"))
}

fn check_name(certificate: &CertificateDer<'_>, name: &str) -> std::result::Result<(), String> {
    let parsed = ParsedCertificate::try_from(certificate).map_err(|error| error.to_string())?;
    verify_server_name(&parsed, &server_name(name)?).map_err(|error| error.to_string())
}

/// Checks that a certificate is valid now. Whom its clients trust is not known here.
fn check_dates(key: &CertifiedKey) -> std::result::Result<(), String> {
    use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    let own = key.cert.first().ok_or("it holds no certificate")?;
    let parsed = ParsedCertificate::try_from(own).map_err(|error| error.to_string())?;
    let (nobody, algorithms) =
        (RootCertStore::empty(), provider().signature_verification_algorithms.all);
    let now = UnixTime::now();
    match verify_server_cert_signed_by_trust_anchor(&parsed, &nobody, &[], now, algorithms) {
        Err(rustls::Error::InvalidCertificate(
            error @ (Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. }),
        )) => Err(error.to_string()),
        // The dates are checked first.
        _ => Ok(()),
    }
}

fn server_config(
    key: CertifiedKey,
    roots: Option<&Arc<RootCertStore>>,
    is_for_peers: bool,
) -> std::result::Result<ServerConfig, rustls::Error> {
    let builder =
        ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = match roots {
        None => builder.with_no_client_auth(),
        Some(roots) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider());
            let verifier =
                verifier.build().map_err(|error| rustls::Error::General(error.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config =
        builder.with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![HTTP_1_1.into()];
    if is_for_peers {
        // As for outgoing connections: each is checked.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
    Ok(config)
}

#[cfg(test)]
pub(crate) mod tests;
