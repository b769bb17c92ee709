//! The certificate files: reading, checking, and reading again after a change.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::ServerCertVerifier;
use rustls::client::{
    Resumption, WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor, verify_server_name,
};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{CertificateError, ClientConfig, RootCertStore, ServerConfig};
use slog::{Logger, info, warn};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use super::{HTTP_1_1, Purpose, client_config_builder, provider};
use crate::error::Error;

/// How often the files are checked for changes.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The certificate files of one port, in PEM.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The certificate, followed by intermediate certificates if there are any.
    pub cert: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// The CAs that the other side's certificate must come from; `None` requires no certificate.
    pub ca: Option<PathBuf>,
}

/// What the files contained, checked.
#[derive(Clone, Debug)]
pub(super) struct Loaded {
    pub(super) server: Arc<ServerConfig>,
    /// For outgoing connections; only on the peer port.
    pub(super) outgoing: Option<ClientConfig>,
}

/// Changes when a file is written, replaced or made readable: ctime in seconds and nanoseconds, inode
/// and length. `None` if the file cannot be examined.
type Stamp = Option<(i64, i64, u64, u64)>;

impl TlsFiles {
    pub(super) fn stamps(&self) -> [Stamp; 3] {
        [Some(&self.cert), Some(&self.key), self.ca.as_ref()].map(|path| {
            let metadata = fs::metadata(path?).ok()?;
            Some((metadata.ctime(), metadata.ctime_nsec(), metadata.ino(), metadata.len()))
        })
    }
}

/// Reads the files again after each change. Returns when the last receiver is gone.
pub(super) async fn reload(
    files: TlsFiles,
    purpose: Purpose,
    mut used: [Stamp; 3],
    loaded_tx: watch::Sender<Loaded>,
    logger: Logger,
) {
    let mut checks = interval(CHECK_INTERVAL);
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = used;
    // True while the files as they are cannot be used.
    let mut failed = false;
    loop {
        tokio::select! {
            () = loaded_tx.closed() => return,
            _ = checks.tick() => {}
        }
        let (checked, of) = (files.clone(), purpose.clone());
        // Reading files blocks.
        let looked = tokio::task::spawn_blocking(move || {
            let stamps = checked.stamps();
            // Unusable files may become usable without a change: a certificate not valid yet.
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
                let [cert, ..] = purpose.flags;
                let (name, path) = (purpose.name, files.cert.display());
                info!(logger, "{}: using the changed {} {}", name, cert, path);
            }
            Some(Err(error)) => {
                if stamps != used {
                    warn!(logger, "{}: keeping the old certificate: {}", purpose.name, error);
                }
                failed = true;
            }
        }
        used = stamps;
    }
}

/// Reads and checks the files. Blocks.
pub(super) fn load(files: &TlsFiles, purpose: &Purpose) -> Result<Loaded, Error> {
    let [cert_flag, key_flag, ca_flag] = purpose.flags;
    let cert = (cert_flag, files.cert.as_path());
    let key = read_key(cert, (key_flag, &files.key))?;
    let roots = files.ca.as_ref().map(|ca| read_roots((ca_flag, ca))).transpose()?;
    let wrong_cert = |why: String| wrong(cert, &why);
    let clients = match &roots {
        None => WebPkiClientVerifier::no_client_auth(),
        Some(roots) => WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
            .build()
            .map_err(|error| wrong_cert(error.to_string()))?,
    };
    let outgoing = match (&purpose.peer_names, roots) {
        (Some(names), Some(roots)) => {
            let servers = check_own(&key, names, roots, &*clients).map_err(wrong_cert)?;
            Some(peer_client(key.clone(), servers))
        }
        (Some(_), None) => {
            return Err(Error::Config("https:// peer URLs require --peer-ca".into()));
        }
        (None, _) => {
            check_dates(&key).map_err(wrong_cert)?;
            None
        }
    };
    let server = server_config(key, clients, files.ca.is_some());
    Ok(Loaded { server: Arc::new(server), outgoing })
}

/// A flag and the file that it names.
type Named<'a> = (&'a str, &'a Path);

fn wrong((flag, path): Named<'_>, why: &str) -> Error {
    Error::Config(format!("cannot use {flag} {}: {why}", path.display()))
}

fn describe(error: pem::Error, wanted: &str) -> String {
    match error {
        pem::Error::Io(error) => error.to_string(),
        pem::Error::NoItemsFound => format!("it contains no {wanted} in PEM"),
        error => format!("it is not a PEM file: {error}"),
    }
}

fn read_certificates(file: Named<'_>) -> Result<Vec<CertificateDer<'static>>, Error> {
    let read = CertificateDer::pem_file_iter(file.1);
    let read = match read.and_then(|found| found.collect::<Result<Vec<_>, _>>()) {
        Ok(certificates) if certificates.is_empty() => Err(pem::Error::NoItemsFound),
        read => read,
    };
    read.map_err(|error| wrong(file, &describe(error, "certificate")))
}

/// Reads a certificate chain and its private key.
pub(super) fn read_key(cert: Named<'_>, key: Named<'_>) -> Result<CertifiedKey, Error> {
    let chain = read_certificates(cert)?;
    let private = PrivateKeyDer::from_pem_file(key.1)
        .map_err(|error| wrong(key, &describe(error, "private key")))?;
    CertifiedKey::from_der(chain, private, &provider()).map_err(|error| {
        wrong(key, &format!("it does not match {} {}: {error}", cert.0, cert.1.display()))
    })
}

pub(super) fn read_roots(ca: Named<'_>) -> Result<Arc<RootCertStore>, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(ca)? {
        roots.add(certificate).map_err(|error| wrong(ca, &error.to_string()))?;
    }
    Ok(Arc::new(roots))
}

/// Checks a member's own certificate as its peers will. Returns the verifier for theirs.
fn check_own(
    key: &CertifiedKey,
    names: &[String],
    roots: Arc<RootCertStore>,
    clients: &dyn ClientCertVerifier,
) -> Result<Arc<WebPkiServerVerifier>, String> {
    let (own, between) = key.cert.split_first().ok_or("it contains no certificate")?;
    for name in names {
        check_name(own, name)?;
    }
    let servers = WebPkiServerVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(|error| error.to_string())?;
    let now = UnixTime::now();
    let name = server_name(&names[0])?;
    servers.verify_server_cert(own, between, &name, &[], now).map_err(|error| error.to_string())?;
    clients.verify_client_cert(own, between, now).map_err(|error| error.to_string())?;
    Ok(servers)
}

fn server_name(name: &str) -> Result<ServerName<'_>, String> {
    ServerName::try_from(name)
        .map_err(|_| format!("{name:?} is not a name that a certificate can contain"))
}

pub(super) fn check_name(certificate: &CertificateDer<'_>, name: &str) -> Result<(), String> {
    let parsed = ParsedCertificate::try_from(certificate).map_err(|error| error.to_string())?;
    verify_server_name(&parsed, &server_name(name)?).map_err(|error| error.to_string())
}

/// Checks that a certificate is valid now. The CAs that clients trust are not known here.
fn check_dates(key: &CertifiedKey) -> Result<(), String> {
    use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    let own = key.cert.first().ok_or("it contains no certificate")?;
    let parsed = ParsedCertificate::try_from(own).map_err(|error| error.to_string())?;
    let (no_roots, algorithms) =
        (RootCertStore::empty(), provider().signature_verification_algorithms.all);
    let now = UnixTime::now();
    match verify_server_cert_signed_by_trust_anchor(&parsed, &no_roots, &[], now, algorithms) {
        Err(rustls::Error::InvalidCertificate(
            error @ (Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. }),
        )) => Err(error.to_string()),
        // The other errors come after the check of the dates.
        _ => Ok(()),
    }
}

fn peer_client(key: CertifiedKey, servers: Arc<WebPkiServerVerifier>) -> ClientConfig {
    let mut config = client_config_builder()
        .with_webpki_verifier(servers)
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![HTTP_1_1.into()];
    // A resumed session would not be checked against the current CAs.
    config.resumption = Resumption::disabled();
    config
}

fn server_config(
    key: CertifiedKey,
    clients: Arc<dyn ClientCertVerifier>,
    has_client_ca: bool,
) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .expect("the provider supports both versions")
        .with_client_cert_verifier(clients)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![HTTP_1_1.into()];
    if has_client_ca {
        // A resumed session is not verified again: its certificate may have expired.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
    config
}
