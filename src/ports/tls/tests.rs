//! Counting and logging of refusals, and certificates for the tests of other modules.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use prometheus_client::encoding::text::encode;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::CertificateError;
use rustls::pki_types::UnixTime;
use slog::{Drain, o};

use super::*;

/// TLS for clients at `localhost`, and the configuration of a client that trusts it.
pub(crate) fn for_clients() -> (Tls, ClientConfig) {
    with(Metrics::default(), Logger::root(slog::Discard, o!()))
}

fn with(metrics: Metrics, logger: Logger) -> (Tls, ClientConfig) {
    let dir = tempfile::tempdir().expect("a directory");
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let files = TlsFiles { cert: dir.path().join("cert"), key: dir.path().join("key"), ca: None };
    fs::write(&files.cert, cert.pem()).expect("written");
    fs::write(&files.key, signing_key.serialize_pem()).expect("written");
    let tls = Tls::new(files, Purpose::clients(), metrics, logger).expect("they can be used");
    let mut roots = RootCertStore::empty();
    roots.add(cert.der().clone()).expect("a certificate");
    let client = client_config_builder().with_root_certificates(roots).with_no_client_auth();
    (tls, client)
}

struct Count(Arc<AtomicUsize>);

impl Drain for Count {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &slog::Record<'_>, _: &slog::OwnedKVList) -> Result<(), slog::Never> {
        if record.msg().to_string().contains("refused") {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }
}

fn client(host: u8, port: u16) -> Remote<'static> {
    Remote::Client(([127, 0, 0, host], port).into())
}

/// The log stays bounded, however many connections and addresses there are.
#[tokio::test]
async fn refusals_are_counted_and_equal_ones_logged_once_a_minute() {
    let metrics = Metrics::default();
    let lines = Arc::<AtomicUsize>::default();
    let (tls, _) = with(metrics.clone(), Logger::root(Count(lines.clone()).fuse(), o!()));
    let logged = || lines.load(Ordering::SeqCst);
    for port in 1..=10 {
        tls.refuse("tls_handshake", client(1, port), "one".into(), "why");
    }
    assert_eq!(logged(), 1, "the port is another each time");
    tls.refuse("tls_handshake", client(1, 1), "another".into(), "why");
    assert_eq!(logged(), 2, "another kind");
    tls.refuse("certificate_name", client(2, 1), "one".into(), "why");
    assert_eq!(logged(), 3, "another address");
    tls.refuse("certificate_name", Remote::Server("https://a:1"), "one".into(), "why");
    assert_eq!(logged(), 4, "the other direction");

    for at in tls.logged.lock().expect("logged").values_mut() {
        *at -= REFUSAL_LOG_INTERVAL;
    }
    tls.refuse("tls_handshake", client(1, 1), "one".into(), "why");
    assert_eq!(logged(), 5, "a minute later");

    for kind in 0..2 * REFUSALS_REMEMBERED {
        tls.refuse("tls_handshake", client(1, 1), kind.to_string(), "why");
    }
    assert!(logged() <= 5 + REFUSALS_REMEMBERED, "{} lines", logged());
    assert!(tls.logged.lock().expect("logged").len() <= REFUSALS_REMEMBERED);

    let mut text = String::new();
    encode(&mut text, &metrics.registry).expect("it can be encoded");
    let handshakes = 12 + 2 * REFUSALS_REMEMBERED;
    for line in [
        format!("raftexample_rejected_total{{reason=\"tls_handshake\"}} {handshakes}"),
        "raftexample_rejected_total{reason=\"certificate_name\"} 2".to_owned(),
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
    }
}

#[test]
fn errors_with_other_dates_are_of_the_same_kind() {
    let expired = |at| {
        kind(&rustls::Error::InvalidCertificate(CertificateError::ExpiredContext {
            time: UnixTime::since_unix_epoch(Duration::from_secs(at)),
            not_after: UnixTime::since_unix_epoch(Duration::from_secs(1)),
        }))
    };
    assert_eq!(expired(5), expired(6));
    let unknown = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
    assert_ne!(expired(5), kind(&unknown));
}

/// The whole name is compared.
#[test]
fn a_certificate_belongs_only_to_the_members_it_names() {
    let names = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        generate_simple_self_signed(names).expect("a certificate").cert
    };
    let certificate = names(&["a.example", "raftexample-12"]);
    assert_eq!(check_member(certificate.der(), 12), Ok(()));
    for other in [1, 2, 121, 0] {
        let why = check_member(certificate.der(), other).expect_err("another's");
        assert!(why.contains(&format!("not member {other}'s")), "{why}");
    }
    assert!(check_member(names(&["*.example", "*"]).der(), 1).is_err());
    assert!(check_member(names(&["raftexample-1.example"]).der(), 1).is_err());
    assert!(check_member(names(&[]).der(), 1).is_err());
    assert!(check_member(b"", 1).is_err());
    assert!(check_member(b"no certificate", 1).is_err());
}
