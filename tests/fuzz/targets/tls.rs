//! Connections to a port with TLS, from their first byte.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use hyper_util::service::TowerToHyperService;
use raftexample::ports::listener::{Limits, serve_stream};
use raftexample::ports::tls::{Purpose, Tls, TlsFiles};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ClientConnection, RootCertStore, SupportedProtocolVersion};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::runtime::{Builder, Runtime};
use tokio_rustls::TlsConnector;

use super::Choices;
use crate::support::logs;

/// A certificate of `localhost` that issued itself, until 2219, and its key. They are used here alone.
const CERTIFICATE: &str = "\
-----BEGIN CERTIFICATE-----
MIIBoDCCAUagAwIBAgIUGB7c5u9xidjlXzWx637G/OVAGUYwCgYIKoZIzj0EAwIw
GzEZMBcGA1UEAwwQcmFmdGV4YW1wbGUgdGVzdDAgFw0yMDAxMDEwMDAwMDBaGA8y
MjE5MTExNDAwMDAwMFowGzEZMBcGA1UEAwwQcmFmdGV4YW1wbGUgdGVzdDBZMBMG
ByqGSM49AgEGCCqGSM49AwEHA0IABHmUzQPRAOJFgOS7THPfOnvZVcXA4dezAn+R
UIgf/GVY3Tat2LjStwymG6N9TUIMfBr0ROAj12x2MK0NQzB0RFGjZjBkMB0GA1Ud
DgQWBBQ5VHarPFs/eQMST8VkawNDhjPYYzAfBgNVHSMEGDAWgBQ5VHarPFs/eQMS
T8VkawNDhjPYYzAMBgNVHRMBAf8EAjAAMBQGA1UdEQQNMAuCCWxvY2FsaG9zdDAK
BggqhkjOPQQDAgNIADBFAiBcdM+HvboXjQ8qKmxvUMEwN3Lx/4FqsAlyLJbMDjop
FgIhAPd2L9ZpE+uU7idE8doxaMRGCRduoly+qb3ofjXKAQ6m
-----END CERTIFICATE-----
";
const KEY: &str = "\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgLXVv4PwIJg4/TbZd
TqIBJLrL88RK29JVgCQJ+6oC28ChRANCAAR5lM0D0QDiRYDku0xz3zp72VXFwOHX
swJ/kVCIH/xlWN02rdi40rcMphujfU1CDHwa9ETgI9dsdjCtDUMwdERR
-----END PRIVATE KEY-----
";

/// How long a handshake may take where the client may fall silent.
const PATIENCE: Duration = Duration::from_millis(2);
/// How long anything may take.
const DEADLINE: Duration = Duration::from_secs(10);

/// What the sound client asks, and what it gets.
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\n";

struct Port {
    runtime: Runtime,
    /// Without certificates of clients, and with them.
    tls: [Tls; 2],
    clients: Vec<Arc<ClientConfig>>,
    /// What those clients send first.
    hellos: Vec<Vec<u8>>,
    router: Router,
    /// The requests that were served.
    requests: Arc<AtomicU64>,
    /// The inputs so far.
    inputs: Cell<u64>,
    _dir: TempDir,
}

thread_local! {
    static PORT: Port = Port::new();
}

fn client(
    versions: &[&'static SupportedProtocolVersion],
    protocols: &[&[u8]],
    names_server: bool,
) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    let certificate = CertificateDer::from_pem_slice(CERTIFICATE.as_bytes()).unwrap();
    roots.add(certificate.clone()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(KEY.as_bytes()).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate], key)
        .unwrap();
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    config.enable_sni = names_server;
    Arc::new(config)
}

fn localhost() -> ServerName<'static> {
    ServerName::try_from("localhost").unwrap()
}

impl Port {
    fn new() -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("cert"), dir.path().join("key"));
        std::fs::write(&cert, CERTIFICATE).unwrap();
        std::fs::write(&key, KEY).unwrap();
        let tls = [None, Some(cert.clone())].map(|ca| {
            let files = TlsFiles { cert: cert.clone(), key: key.clone(), ca };
            let _runtime = runtime.enter();
            Tls::new(files, Purpose::clients(), Default::default(), logs::discard()).unwrap()
        });
        let clients = vec![
            client(&[&TLS13, &TLS12], &[b"http/1.1"], true),
            client(&[&TLS13], &[], false),
            client(&[&TLS12], &[b"http/1.1"], true),
            client(&[&TLS12], &[b"h2", b"http/1.1"], false),
        ];
        let hello_of = |config: &Arc<ClientConfig>| {
            let mut connection = ClientConnection::new(config.clone(), localhost()).unwrap();
            let mut hello = Vec::new();
            connection.write_tls(&mut hello).unwrap();
            hello
        };
        let hellos = clients.iter().map(hello_of).collect();
        let (requests, inputs) = (Arc::<AtomicU64>::default(), Cell::default());
        let served = requests.clone();
        let router = Router::new().fallback(async move || {
            served.fetch_add(1, Ordering::Relaxed);
            "served"
        });
        Self { runtime, tls, clients, hellos, router, requests, inputs, _dir: dir }
    }

    /// Serves one connection to its end.
    async fn serve(&self, has_ca: bool, stream: DuplexStream, patience: Duration) {
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        let limits = Limits { first_head_timeout: patience, ..Limits::default() };
        let tls = self.tls[usize::from(has_ca)].clone();
        let service = TowerToHyperService::new(self.router.clone());
        serve_stream(stream, address, tls, service, limits, logs::discard()).await;
    }

    /// What a correct client gets from the server at the other end of `stream`.
    async fn ask(&self, client: usize, stream: DuplexStream) -> io::Result<Vec<u8>> {
        let connector = TlsConnector::from(self.clients[client].clone());
        let mut stream = connector.connect(localhost(), stream).await?;
        stream.write_all(REQUEST).await?;
        stream.flush().await?;
        let mut response = Vec::new();
        stream.read_to_end(&mut response).await?;
        Ok(response)
    }
}

/// A client hello in its parts.
struct Hello {
    version: Vec<u8>,
    random: Vec<u8>,
    session: Vec<u8>,
    suites: Vec<u8>,
    compressions: Vec<u8>,
    extensions: Vec<(u16, Vec<u8>)>,
}

/// Takes a field off the front: its length in `width` bytes, then as many bytes.
fn take_field(rest: &mut &[u8], width: usize) -> Vec<u8> {
    let (length, after) = rest.split_at(width);
    let length = length.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte));
    let (field, after) = after.split_at(length);
    *rest = after;
    field.to_vec()
}

/// The opposite. Of a length that does not fit, the low bytes are written.
fn put_field(out: &mut Vec<u8>, width: usize, field: &[u8]) {
    out.extend(&field.len().to_be_bytes()[size_of::<usize>() - width..]);
    out.extend(field);
}

impl Hello {
    /// The parts of a sound one in its record.
    fn parse(record: &[u8]) -> Self {
        // After the record's head, the type of the message, and its length.
        let (version, rest) = record[5 + 4..].split_at(2);
        let (random, mut rest) = rest.split_at(32);
        let session = take_field(&mut rest, 1);
        let suites = take_field(&mut rest, 2);
        let compressions = take_field(&mut rest, 1);
        let all = take_field(&mut rest, 2);
        let mut rest = &all[..];
        let mut extensions = Vec::new();
        while let [high, low, after @ ..] = rest {
            rest = after;
            extensions.push((u16::from_be_bytes([*high, *low]), take_field(&mut rest, 2)));
        }
        // Clients shuffle them, but an input is to mean the same in each run.
        extensions.sort();
        let (version, random) = (version.to_vec(), random.to_vec());
        Self { version, random, session, suites, compressions, extensions }
    }

    /// The message without a record.
    fn encode(&self) -> Vec<u8> {
        let mut body = [self.version.as_slice(), &self.random].concat();
        put_field(&mut body, 1, &self.session);
        put_field(&mut body, 2, &self.suites);
        put_field(&mut body, 1, &self.compressions);
        let mut all = Vec::new();
        for (kind, data) in &self.extensions {
            all.extend(kind.to_be_bytes());
            put_field(&mut all, 2, data);
        }
        put_field(&mut body, 2, &all);
        let mut message = vec![1];
        put_field(&mut message, 3, &body);
        message
    }

    /// Changes a part. The lengths around it stay right.
    fn change(&mut self, choices: &mut Choices<'_>) {
        let at = choices.below(self.extensions.len().max(1));
        match choices.below(10) {
            0 if at < self.extensions.len() => drop(self.extensions.remove(at)),
            1 if at < self.extensions.len() => self.extensions.push(self.extensions[at].clone()),
            2..5 if at < self.extensions.len() => choices.damage(&mut self.extensions[at].1),
            5 if at < self.extensions.len() => self.extensions[at].1 = choices.bytes().to_vec(),
            6 => {
                // Among them: names, groups, signatures, protocols, tickets, PSK, early data, versions,
                // cookie, PSK modes, key share, encrypted hello, renegotiation.
                let kinds = [0, 5, 10, 13, 16, 35, 41, 42, 43, 44, 45, 51, 0xfe0d, 0xff01];
                let any = choices.one_in(4);
                let kind = if any { choices.short() as u16 } else { choices.pick(&kinds) };
                self.extensions.push((kind, choices.bytes().to_vec()));
            }
            7 => self.suites = choices.bytes().to_vec(),
            8 => self.session = choices.bytes().to_vec(),
            _ => {
                let part = match choices.below(3) {
                    0 => &mut self.version,
                    1 => &mut self.random,
                    _ => &mut self.compressions,
                };
                choices.damage(part);
            }
        }
    }
}

fn put_record(out: &mut Vec<u8>, kind: u8, version: u16, fragment: &[u8]) {
    out.push(kind);
    out.extend(version.to_be_bytes());
    put_field(out, 2, fragment);
}

/// What a client sends that does not do all right.
fn bytes_of_client(choices: &mut Choices<'_>, hellos: &[Vec<u8>]) -> Vec<u8> {
    let mut sent = Vec::new();
    match choices.below(16) {
        0 => sent.extend(REQUEST),
        1 => sent.extend(choices.bytes()),
        2 => {
            // SSL 2.0, which some scanners speak.
            sent.extend(*b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10");
            sent.extend(choices.bytes());
        }
        _ => {
            let mut hello = Hello::parse(&choices.pick(hellos));
            for _ in 0..choices.below(4) {
                hello.change(choices);
            }
            let mut message = hello.encode();
            if choices.one_in(8) {
                choices.damage(&mut message);
            }
            // In one record, or in several with others between.
            let version = choices.pick(&[0x0301, 0x0301, 0x0303, 0x0300, 0x0304, 0x7f1c]);
            while !message.is_empty() && choices.one_in(4) {
                let length = choices.below(256).min(message.len());
                let rest = message.split_off(length);
                put_record(&mut sent, 22, version, &message);
                message = rest;
                if choices.one_in(3) {
                    let kind = choices.pick(&[20, 21, 22, 23, 24, 255]);
                    put_record(&mut sent, kind, version, choices.bytes());
                }
            }
            put_record(&mut sent, 22, version, &message);
        }
    }
    for _ in 0..choices.below(3) {
        let kind = choices.pick(&[20, 21, 22, 23]);
        let fragment = match choices.below(3) {
            0 => vec![1],
            1 => choices.bytes().to_vec(),
            _ => vec![0; choices.pick(&[0, 16_384, 16_641, 65_535])],
        };
        put_record(&mut sent, kind, 0x0303, &fragment);
    }
    if choices.one_in(3) {
        choices.damage(&mut sent);
    }
    sent
}

/// A server with TLS sends records, the last of which may be cut short.
fn assert_is_tls(answer: &[u8]) {
    let mut rest = answer;
    while let [kind, version, _, high, low, after @ ..] = rest {
        assert!((20..=23).contains(kind) && *version == 3, "{answer:?} is no TLS");
        let length = usize::from(*high) << 8 | usize::from(*low);
        rest = after.get(length..).unwrap_or_default();
    }
}

/// Gives the server what a client sends, with the bits of one byte changed on the way.
async fn relay(client: DuplexStream, server: DuplexStream, at: usize, bits: u8) {
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_server, mut to_server) = tokio::io::split(server);
    let up = async {
        let (mut count, mut buffer) = (0, [0; 4096]);
        while let Ok(length @ 1..) = from_client.read(&mut buffer).await {
            if let Some(byte) = at.checked_sub(count).and_then(|at| buffer[..length].get_mut(at)) {
                *byte ^= bits;
            }
            count += length;
            // A client that writes must get to its end before it reads that the server has gone.
            let _ = to_server.write_all(&buffer[..length]).await;
        }
        let _ = to_server.shutdown().await;
    };
    let down = async {
        let _ = tokio::io::copy(&mut from_server, &mut to_client).await;
        let _ = to_client.shutdown().await;
    };
    tokio::join!(up, down);
}

/// Whatever comes first on a connection with TLS: the handshake fails or goes on, in time. Nothing is
/// served without one, and the next client is served.
pub fn tls_hellos(data: &[u8]) {
    let mut choices = Choices(data);
    PORT.with(|port| port.runtime.block_on(connections(&mut choices, port)));
}

async fn connections(choices: &mut Choices<'_>, port: &Port) {
    let has_ca = choices.one_in(2);
    // Few bytes at a time, or all at once.
    let room = choices.pick(&[65_536, 65_536, 1024, 61, 7]);
    let (near, far) = duplex(room);
    let served = || port.requests.load(Ordering::Relaxed);
    let (before, began) = (served(), Instant::now());
    let client = choices.below(port.clients.len());
    if choices.one_in(64) {
        // A correct client, behind a relay that changes its bytes.
        let (own, between) = duplex(room);
        let (at, bits) = (choices.short() % 2048, choices.byte());
        // With a wrong length, each side may wait for the other.
        let patience = if bits == 0 { DEADLINE } else { PATIENCE };
        let asked = port.ask(client, own);
        let relayed = relay(between, near, at, bits);
        let (asked, ..) = tokio::join!(asked, relayed, port.serve(has_ca, far, patience));
        match asked {
            Ok(response) if response.starts_with(RESPONSE) => assert_eq!(served(), before + 1),
            Ok(response) => assert!(bits != 0 && served() == before, "{response:?}"),
            Err(error) => assert!(bits != 0, "{error}"),
        }
    } else {
        let is_silent = choices.one_in(128);
        let sent = bytes_of_client(choices, &port.hellos);
        let client = async {
            let (mut reader, mut writer) = tokio::io::split(near);
            let write = async {
                let _ = writer.write_all(&sent).await;
                if !is_silent {
                    let _ = writer.shutdown().await;
                }
            };
            let mut answer = Vec::new();
            let _ = tokio::join!(write, reader.read_to_end(&mut answer));
            answer
        };
        let patience = if is_silent { PATIENCE } else { DEADLINE };
        let (answer, ()) = tokio::join!(client, port.serve(has_ca, far, patience));
        assert_is_tls(&answer);
        assert_eq!(served(), before, "a request was served");
    }
    assert!(began.elapsed() < DEADLINE / 2, "it took {:?}", began.elapsed());
    // A handshake costs more than most of that.
    let inputs = port.inputs.replace(port.inputs.get() + 1);
    if inputs.is_multiple_of(64) {
        let (near, far) = duplex(65_536);
        let asked = port.ask(client, near);
        let (response, ()) = tokio::join!(asked, port.serve(has_ca, far, DEADLINE));
        assert!(response.unwrap().starts_with(RESPONSE), "the next client is not served");
    }
}
