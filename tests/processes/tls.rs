//! Certificates: which are accepted and which refused.

use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    ALL_VERSIONS, ClientConfig, ClientConnection, HandshakeKind, RootCertStore, ServerConfig,
    ServerConnection, StreamOwned, SupportedProtocolVersion,
};

use super::flags::refused;
use crate::support::certificates::{
    Authority, PEER_FLAGS, Pair, expired, flags, install, paths, place, replace,
};
use crate::support::processes::{
    Client, Cluster, FAST, PATIENCE, Signal, Site, eventually, eventually_some, owned, request,
    serves,
};

const CLIENT_FLAGS: [&str; 3] = ["--cert", "--key", "--client-ca"];

/// The number of refusals at member `id` for `reason`.
fn rejected(cluster: &Cluster, id: u64, reason: &str) -> u64 {
    let flags = &cluster.member(id).flags;
    let admin = flags.iter().position(|flag| flag == "--admin").unwrap() + 1;
    let answer = request(flags[admin].parse().unwrap(), "GET", "/metrics", b"").unwrap();
    count(&String::from_utf8(answer.body).unwrap(), reason)
}

fn count(metrics: &str, reason: &str) -> u64 {
    let label = format!("{{reason=\"{reason}\"}} ");
    let counts = metrics.lines().filter_map(|line| line.split_once(&label));
    counts.map(|(_, count)| count.parse::<u64>().unwrap()).sum()
}

/// Three members that use TLS with certificates of `authority`.
fn start(authority: &Authority) -> Cluster {
    let site = Site::new();
    let places = (1..=3).map(|id| place(&site, authority, id)).collect();
    let mut more = owned(&FAST);
    more.extend(owned(&["--snapshot-count", "20", "--snapshot-catch-up-entries", "1"]));
    Cluster::start_at(site, places, &more.iter().map(String::as_str).collect::<Vec<_>>())
}

fn peer_address(cluster: &Cluster, id: u64) -> SocketAddr {
    cluster.member(id).url.strip_prefix("https://").unwrap().parse().unwrap()
}

fn logs(cluster: &mut Cluster, id: u64, text: &str) -> usize {
    cluster.process(id).stderr().lines().filter(|line| line.contains(text)).count()
}

fn until_logged(cluster: &mut Cluster, id: u64, text: &str) {
    let why = format!("member {id} logs {text:?}");
    eventually(PATIENCE, &why, || logs(cluster, id, text) > 0);
}

/// The certificates in a PEM text.
fn certificates(pem: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).map(Result::unwrap).collect()
}

fn roots(pem: &str) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem) {
        roots.add(certificate).unwrap();
    }
    Arc::new(roots)
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Sends `head` over TLS to `address`, trusting `ca`, with or without a client certificate. Returns
/// the answer and the server's certificate, or the error of TLS or the system.
fn exchange(
    address: SocketAddr,
    ca: &str,
    own: Option<&Pair>,
    head: &str,
) -> Result<(String, CertificateDer<'static>), String> {
    exchange_by(ALL_VERSIONS, address, ca, own, head)
}

/// Like [`exchange`], restricted to `versions` of TLS.
fn exchange_by(
    versions: &[&'static SupportedProtocolVersion],
    address: SocketAddr,
    ca: &str,
    own: Option<&Pair>,
    head: &str,
) -> Result<(String, CertificateDer<'static>), String> {
    let config = Arc::new(client_config(versions, ca, own));
    let mut stream = open(config, TcpStream::connect(address).unwrap());
    let answer = converse(&mut stream, head)?;
    let certificate = stream.conn.peer_certificates().unwrap()[0].clone();
    Ok((answer, certificate.into_owned()))
}

fn client_config(
    versions: &[&'static SupportedProtocolVersion],
    ca: &str,
    own: Option<&Pair>,
) -> ClientConfig {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots(ca));
    match own {
        None => builder.with_no_client_auth(),
        Some(pair) => {
            let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
            builder.with_client_auth_cert(certificates(&pair.cert), key).unwrap()
        }
    }
}

type TlsStream = StreamOwned<ClientConnection, TcpStream>;

fn open(config: Arc<ClientConfig>, socket: TcpStream) -> TlsStream {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let name = ServerName::from(socket.peer_addr().unwrap().ip());
    StreamOwned::new(ClientConnection::new(config, name).unwrap(), socket)
}

/// Sends `head` and reads the answer, until the other side closes.
fn converse(stream: &mut TlsStream, head: &str) -> Result<String, String> {
    let mut answer = String::new();
    stream.write_all(head.as_bytes()).map_err(|error| error.to_string())?;
    stream.read_to_string(&mut answer).map_err(|error| error.to_string())?;
    Ok(answer)
}

/// A request of a peer.
fn peer_request(path: &str, from: u64, to: u64) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 0\r\n\
         raft-protocol: 4\r\nraft-cluster-id: 00000000000000c1\r\nraft-from: {from}\r\n\
         raft-incarnation: 0000000000000001\r\nraft-from-url: https://127.0.0.1:1\r\n\
         raft-to: {to}\r\nraft-to-incarnation: 0000000000000000\r\nraft-boot: 0000000000000001\r\nraft-number: 1\r\n\r\n"
    )
}

fn put_request(key: &str, value: &str) -> String {
    format!(
        "PUT {key} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{value}",
        value.len()
    )
}

const GET: &str = "GET /k HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";

/// A port's answer to plain HTTP, until it closes the connection in order.
fn plain_exchange(address: SocketAddr, head: &str) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("closed, not reset");
    answer
}

#[test]
fn members_with_certificates_elect_replicate_and_grow() {
    let authority = Authority::new("the cluster's");
    let mut cluster = start(&authority);
    cluster.put(1, "/k", "value");
    assert_eq!(cluster.get(3, "/k").as_deref(), Some("value"));

    let plain = cluster.site.url();
    let answer = request(cluster.address(1), "POST", "/4", plain.as_bytes()).unwrap();
    let why = String::from_utf8_lossy(&answer.body).into_owned();
    assert_eq!(answer.status, 409, "{why}");
    assert!(why.contains("begin alike"), "{why}");

    // Afterwards the log alone cannot bring a member up to date.
    for i in 0..50 {
        cluster.put(1, "/filler", &i.to_string());
    }
    let place = place(&cluster.site, &authority, 4);
    cluster.join_at(1, 4, place);
    assert_eq!(cluster.get(4, "/k").as_deref(), Some("value"));
    let sent: usize = (1..=3).map(|id| logs(&mut cluster, id, "sent snapshot")).sum();
    assert!(sent > 0, "it went over TLS, too");
    cluster.stop(2, Signal::SIGTERM);
    cluster.put(4, "/k", "another");
    cluster.start_again(2);
    assert_eq!(cluster.get(2, "/k").as_deref(), Some("another"));
    for id in 1..=4 {
        assert_eq!(logs(&mut cluster, id, ": refused "), 0, "member {id}");
    }
}

/// Its own files fit together, so it starts; no member accepts it, and it accepts none. With the
/// right files it returns without a restart.
#[test]
fn a_foreign_certificate_is_refused_until_it_is_replaced() {
    let (authority, foreign) = (Authority::new("the cluster's"), Authority::new("foreign"));
    let mut cluster = start(&authority);
    cluster.put(1, "/k", "before");
    cluster.stop(3, Signal::SIGTERM);
    let dir = cluster.site.dir().to_owned();
    install(&dir, "peer-3", &foreign.member(&cluster.site, 3), &foreign.pem());
    cluster.start_again(3);
    cluster.put(1, "/k", "without it");
    for id in 1..=3 {
        until_logged(&mut cluster, id, "the TLS handshake failed");
    }
    until_logged(&mut cluster, 3, "refused https://");
    let answer = request(cluster.address(3), "GET", "/k", b"").unwrap();
    assert_eq!(answer.status, 503, "it hears of no leader");

    install(&dir, "peer-3", &authority.member(&cluster.site, 3), &authority.pem());
    assert_eq!(cluster.get(3, "/k").as_deref(), Some("without it"));
    until_logged(&mut cluster, 3, "TLS for peers: using the changed --peer-cert");
}

#[test]
fn a_valid_certificate_speaks_for_no_other_member() {
    let authority = Authority::new("the cluster's");
    let mut cluster = start(&authority);
    let before = cluster.leader();
    let second = authority.issue(&["raftexample-2"]);
    let target = peer_address(&cluster, 1);
    let as_member = |from: u64, path: &str| {
        let head = peer_request(path, from, 1);
        exchange(target, &authority.pem(), Some(&second), &head).unwrap().0
    };
    for path in [
        "/raft",
        "/raft/stream",
        "/raft/snapshot",
        "/raft/greeting",
        "/raft/members",
        "/raft/status",
    ] {
        let answer = as_member(3, path);
        assert!(answer.starts_with("HTTP/1.1 403 "), "{path}: {answer}");
        assert!(answer.contains("the certificate is not member 3's"), "{path}: {answer}");
        // Under its own id it is heard, and told what else is wrong.
        let answer = as_member(2, path);
        assert!(answer.starts_with("HTTP/1.1 412 "), "{path}: {answer}");
    }
    until_logged(&mut cluster, 1, "the certificate is not member 3's");
    assert_eq!(logs(&mut cluster, 1, "is not member 3's"), 1, "the same is logged once");
    assert_eq!(rejected(&cluster, 1, "certificate_name"), 6, "and each is counted");
    assert_eq!(rejected(&cluster, 1, "malformed_request"), 0, "once");
    cluster.put(2, "/k", "value");
    assert_eq!(cluster.leader(), before, "nobody was moved by it");
}

/// A process with a valid certificate for member 3's host answers in its name.
#[test]
fn an_answer_with_the_certificate_of_another_member_is_none() {
    let authority = Authority::new("the cluster's");
    let mut cluster = start(&authority);
    cluster.stop(3, Signal::SIGTERM);
    let own = authority.issue(&[&cluster.site.address.to_string(), "raftexample-2"]);
    let key = PrivateKeyDer::from_pem_slice(own.key.as_bytes()).unwrap();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(&authority.pem()), provider());
    let config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(certificates(&own.cert), key)
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind(peer_address(&cluster, 3)).unwrap();
    thread::spawn(move || {
        while let Ok((socket, _)) = listener.accept() {
            socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            let connection = ServerConnection::new(config.clone()).unwrap();
            let mut stream = StreamOwned::new(connection, socket);
            let mut head = [0; 1024];
            let _ = stream.read(&mut head);
            let _ = stream.write_all(
                b"HTTP/1.1 204 No Content\r\nraft-protocol: 4\r\nraft-from: 3\r\n\
                  raft-cluster-id: 00000000000000c1\r\nraft-incarnation: 0000000000000001\r\n\
                  raft-from-url: https://127.0.0.1:1\r\nraft-to: 1\r\nraft-to-incarnation: 0000000000000000\r\n\r\n",
            );
            stream.conn.send_close_notify();
            let _ = stream.flush();
        }
    });
    let told = "in the name of member 3: the certificate is not member 3's";
    // The leader connects to it, and so does the other member when it asks for votes.
    eventually(PATIENCE, "a member refuses the answer", || {
        logs(&mut cluster, 1, told) + logs(&mut cluster, 2, told) > 0
    });
    let counted = |id| rejected(&cluster, id, "certificate_name");
    assert!(counted(1) + counted(2) > 0, "and counts it");
    cluster.put(1, "/k", "value");
}

#[test]
fn the_peer_port_requires_a_certificate_of_its_authority() {
    let (authority, foreign) = (Authority::new("the cluster's"), Authority::new("foreign"));
    let mut cluster = start(&authority);
    let target = peer_address(&cluster, 1);
    let head = peer_request("/raft/greeting", 2, 1);

    let error = exchange(target, &authority.pem(), None, &head).unwrap_err();
    assert!(error.contains("CertificateRequired"), "{error}");
    until_logged(&mut cluster, 1, "the TLS handshake failed: peer sent no certificates");

    let own = foreign.member(&cluster.site, 2);
    let error = exchange(target, &authority.pem(), Some(&own), &head).unwrap_err();
    assert!(error.contains("alert"), "{error}");
    until_logged(&mut cluster, 1, "UnknownIssuer");

    let own = authority.issue_with(&["raftexample-2"], expired);
    let error = exchange(target, &authority.pem(), Some(&own), &head).unwrap_err();
    assert!(error.contains("CertificateExpired"), "{error}");

    let answer = plain_exchange(target, &head);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    until_logged(&mut cluster, 1, "InvalidContentType");

    // A certificate for servers alone does not authenticate a member that connects.
    let own = authority.issue_with(&["raftexample-2"], |params| {
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    });
    exchange(target, &authority.pem(), Some(&own), &head).unwrap_err();
    cluster.put(1, "/k", "value");
    assert_eq!(rejected(&cluster, 1, "tls_handshake"), 5, "each is counted");
}

/// A single member whose client port uses the files `client.*`.
fn with_client_port(site: &Site, with: &[&str]) -> (Vec<String>, SocketAddr) {
    let (mut all, address) = site.single(&FAST);
    let named = flags(site.dir(), "client", CLIENT_FLAGS);
    for pair in named.chunks(2).filter(|pair| with.contains(&&*pair[0])) {
        all.extend_from_slice(pair);
    }
    (all, address)
}

#[test]
fn with_a_certificate_the_client_port_speaks_tls_alone() {
    let (site, authority) = (Site::new(), Authority::new("the clients'"));
    let pair = authority.issue(&[&site.address.to_string()]);
    install(site.dir(), "client", &pair, &authority.pem());
    let (flags, address) = with_client_port(&site, &["--cert", "--key"]);
    let _member = site.spawn("member", &flags);
    eventually(PATIENCE, "it listens", || TcpStream::connect(address).is_ok());
    let send = |head: &str| exchange(address, &authority.pem(), None, head).unwrap().0;
    eventually(PATIENCE, "PUT is acknowledged", || {
        send(&put_request("/k", "value")).starts_with("HTTP/1.1 204 ")
    });
    assert!(send(GET).ends_with("\r\n\r\nvalue"));
    let answer = plain_exchange(address, GET);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    let foreign = Authority::new("foreign").pem();
    let error = exchange(address, &foreign, None, GET).unwrap_err();
    assert!(error.contains("UnknownIssuer"), "its certificate is this authority's: {error}");
}

#[test]
fn with_an_authority_for_clients_each_needs_a_certificate_of_it() {
    let (site, authority) = (Site::new(), Authority::new("the clients'"));
    let pair = authority.issue(&[&site.address.to_string()]);
    install(site.dir(), "client", &pair, &authority.pem());
    let (mut flags, address) = with_client_port(&site, &CLIENT_FLAGS);
    let admin = site.at(site.port());
    flags.extend(owned(&["--admin", &admin.to_string()]));
    let member = site.spawn("member", &flags);
    eventually(PATIENCE, "it listens", || TcpStream::connect(admin).is_ok());
    let send = |own: Option<&Pair>| exchange(address, &authority.pem(), own, GET);
    let right = authority.issue(&["somebody"]);
    for version in ALL_VERSIONS {
        exchange_by(&[version], address, &authority.pem(), Some(&right), GET).unwrap();
        exchange_by(&[version], address, &authority.pem(), None, GET).unwrap_err();
    }
    eventually(PATIENCE, "GET is answered", || {
        send(Some(&right)).unwrap().0.starts_with("HTTP/1.1 404 ")
    });
    let error = send(None).unwrap_err();
    assert!(error.contains("CertificateRequired"), "{error}");
    let foreign = Authority::new("foreign").issue(&["somebody"]);
    let error = send(Some(&foreign)).unwrap_err();
    assert!(error.contains("alert"), "{error}");
    eventually(PATIENCE, "both are logged", || {
        let log = member.stderr();
        log.matches("the TLS handshake failed").count() == 2
    });
    // The admin port behaves like the client port.
    let get_metrics =
        format!("GET /metrics HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
    exchange(admin, &authority.pem(), None, &get_metrics).unwrap_err();
    assert!(!plain_exchange(admin, &get_metrics).starts_with(b"HTTP"));
    let (metrics, _) = exchange(admin, &authority.pem(), Some(&right), &get_metrics).unwrap();
    assert_eq!(count(&metrics, "tls_handshake"), 6, "{metrics}");
}

/// From one authority to the next: first all members trust both, then all have new certificates,
/// then all trust only the new one. No member restarts.
#[test]
fn the_authority_is_replaced_while_the_cluster_goes_on() {
    let (old, new) = (Authority::new("the old"), Authority::new("the new"));
    let mut cluster = start(&old);
    let dir = cluster.site.dir().to_owned();
    let both = old.pem() + &new.pem();
    let mut pairs: Vec<Pair> = Vec::new();
    for id in 1..=3 {
        pairs.push(new.member(&cluster.site, id));
    }
    let probe = new.issue(&["raftexample-9"]);
    let head = peer_request("/raft/greeting", 9, 1);
    let used = "TLS for peers: using the changed --peer-cert";
    for (step, ca) in [(1, &both), (2, &both), (3, &new.pem())] {
        for id in 1..=3 {
            let [cert_path, key_path, ca_path] = paths(&dir, &format!("peer-{id}"));
            if step == 2 {
                replace(&cert_path, &pairs[id as usize - 1].cert);
                replace(&key_path, &pairs[id as usize - 1].key);
            } else {
                replace(&ca_path, ca);
            }
        }
        for id in 1..=3 {
            eventually(PATIENCE, "the new files are used", || logs(&mut cluster, id, used) == step);
            cluster.put(id, &format!("/step{step}"), "done");
        }
        // A new connection to each member gets the current certificate.
        for id in 1..=3 {
            let target = peer_address(&cluster, id);
            let (_, certificate) = exchange(target, &both, Some(&probe), &head).unwrap();
            let is_new = certificate == certificates(&pairs[id as usize - 1].cert)[0];
            assert_eq!(is_new, step >= 2, "step {step}, member {id}");
        }
    }
    // Streams authenticated with the old files ended with them.
    let ended = "the peer's certificates were replaced";
    eventually(PATIENCE, "streams are begun anew", || {
        (1..=3).any(|id| logs(&mut cluster, id, ended) > 0)
    });
    let stranger = old.member(&cluster.site, 2);
    let head = peer_request("/raft/greeting", 2, 1);
    let target = peer_address(&cluster, 1);
    exchange(target, &both, Some(&stranger), &head).unwrap_err();
    // Members reconnect, also to a new process, with their current files.
    cluster.stop(2, Signal::SIGTERM);
    cluster.put(1, "/k", "value");
    cluster.start_again(2);
    assert_eq!(cluster.get(2, "/k").as_deref(), Some("value"));
    let refused: Vec<_> = (1..=3).map(|id| logs(&mut cluster, id, ": refused ")).collect();
    assert_eq!(refused, [1, 0, 0], "nobody but the stranger");
}

#[test]
fn files_that_cannot_be_used_leave_the_old_ones_in_use() {
    let (site, authority) = (Site::new(), Authority::new("the clients'"));
    let names = [&*site.address.to_string()];
    let first = authority.issue(&names);
    install(site.dir(), "client", &first, &authority.pem());
    let (flags, address) = with_client_port(&site, &["--cert", "--key"]);
    let member = site.spawn("member", &flags);
    eventually(PATIENCE, "it listens", || TcpStream::connect(address).is_ok());
    let served = || exchange(address, &authority.pem(), None, GET).unwrap().1;
    let [cert_path, key_path, _] = paths(site.dir(), "client");
    let kept = "TLS for clients: keeping the old certificate: cannot use ";
    let expired = authority.issue_with(&names, expired);
    for (cert, key, file, why) in [
        (&expired.cert, &expired.key, &cert_path, "expired"),
        (&"no certificate".to_owned(), &first.key, &cert_path, "contains no certificate"),
        (&authority.issue(&names).cert, &first.key, &key_path, "does not match --cert"),
        (&first.cert, &"no key".to_owned(), &key_path, "contains no private key"),
    ] {
        replace(&cert_path, cert);
        replace(&key_path, key);
        let line = eventually_some(PATIENCE, &format!("it is told: {why}"), || {
            let log = member.stderr();
            let mut lines = log.lines().filter(|line| line.contains(kept) && line.contains(why));
            lines.next_back().map(str::to_owned)
        });
        assert!(line.contains(file.to_str().unwrap()), "{line}");
        assert_eq!(served(), certificates(&first.cert)[0], "after {line}");
    }
    assert_eq!(member.stderr().matches(kept).count(), 4, "one line each:\n{}", member.stderr());
    fs::remove_file(&cert_path).unwrap();
    eventually(PATIENCE, "it is told that the file is gone", || {
        member.stderr().contains("No such file")
    });
    let second = authority.issue(&names);
    install(site.dir(), "client", &second, &authority.pem());
    eventually(PATIENCE, "the second certificate is used", || {
        served() == certificates(&second.cert)[0]
    });
}

/// Connections authenticated with replaced files must reconnect.
#[test]
fn a_connection_does_not_outlive_the_files_that_let_it_in() {
    let (site, authority) = (Site::new(), Authority::new("the clients'"));
    let names = [&*site.address.to_string()];
    install(site.dir(), "client", &authority.issue(&names), &authority.pem());
    let (flags, address) = with_client_port(&site, &["--cert", "--key"]);
    let _member = site.spawn("member", &flags);
    eventually(PATIENCE, "it listens", || TcpStream::connect(address).is_ok());
    let config = Arc::new(client_config(ALL_VERSIONS, &authority.pem(), None));
    let mut open = open(config, TcpStream::connect(address).unwrap());
    write!(open, "POST /x HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\n\r\n").unwrap();
    let mut answer = [0; 4096];
    let length = open.read(&mut answer).unwrap();
    assert!(answer[..length].starts_with(b"HTTP/1.1 400 "));
    install(site.dir(), "client", &authority.issue(&names), &authority.pem());
    let replaced = Instant::now();
    while open.read(&mut answer).unwrap() > 0 {}
    // An idle connection would be closed after 30 s.
    assert!(replaced.elapsed() < Duration::from_secs(15), "{:?}", replaced.elapsed());
}

/// The local ports of the process's connections to `remote`.
fn connections(pid: u32, remote: SocketAddr) -> BTreeSet<String> {
    let sockets: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter_map(|link| {
            Some(link.to_str()?.strip_prefix("socket:[")?.trim_end_matches(']').into())
        })
        .collect();
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap();
    let port = format!(":{:04X}", remote.port());
    table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|fields| fields[2].ends_with(&port) && sockets.iter().any(|it| it == fields[9]))
        .map(|fields| fields[1].to_owned())
        .collect()
}

/// One that is idle ends by itself. The stream of a leader under load never is.
#[test]
fn a_busy_stream_does_not_outlive_the_files_it_began_with() {
    let authority = Authority::new("the cluster's");
    let mut cluster = start(&authority);
    let (leader, _) = cluster.leader();
    let follower = cluster.ids().into_iter().find(|id| *id != leader).unwrap();
    let (address, remote) = (cluster.address(leader), peer_address(&cluster, follower));
    let pid = cluster.process(leader).pid();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut client = Client::new(address);
                while !is_over.load(Ordering::Relaxed) {
                    client.put("/k", b"value").unwrap();
                }
            });
        }
        // Otherwise the others would wait for ever.
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let before = eventually_some(PATIENCE, "it is connected", || {
                Some(connections(pid, remote)).filter(|found| !found.is_empty())
            });
            let ca = authority.pem() + &Authority::new("another").pem();
            let name = format!("peer-{leader}.ca");
            replace(&cluster.site.dir().join(name), &ca);
            eventually(PATIENCE, "all of them end", || {
                connections(pid, remote).is_disjoint(&before)
            });
        }));
        is_over.store(true, Ordering::Relaxed);
        outcome.unwrap();
    });
    assert_eq!(cluster.leader().0, leader);
}

/// A client may open a connection, wait until the authority that signed its certificate is not trusted any
/// more, and then authenticate.
#[test]
fn a_handshake_does_not_outlive_the_authority_it_began_under() {
    let (site, old) = (Site::new(), Authority::new("the old"));
    let pair = old.issue(&[&site.address.to_string()]);
    install(site.dir(), "client", &pair, &old.pem());
    let (flags, address) = with_client_port(&site, &CLIENT_FLAGS);
    let member = site.spawn("member", &flags);
    eventually(PATIENCE, "it listens", || TcpStream::connect(address).is_ok());
    let connect = || TcpStream::connect(address).unwrap();
    for version in ALL_VERSIONS {
        let config = Arc::new(client_config(&[version], &old.pem(), Some(&old.issue(&["a"]))));
        install(site.dir(), "client", &pair, &old.pem());
        eventually(PATIENCE, "the old authority's clients are served", || {
            converse(&mut open(config.clone(), connect()), GET).is_ok_and(|it| it.contains("404"))
        });
        let changes = member.stderr().matches("using the changed").count();
        let mut opened = VecDeque::new();
        install(site.dir(), "client", &pair, &Authority::new("the new").pem());
        eventually(PATIENCE, "the new authority is used", || {
            // The last ones are younger than the deadline of a handshake.
            opened.push_back(connect());
            opened.drain(..opened.len().saturating_sub(20));
            member.stderr().matches("using the changed").count() > changes
        });
        for socket in opened {
            let answer = converse(&mut open(config.clone(), socket), GET);
            assert!(
                !answer.as_ref().is_ok_and(|it| it.contains("HTTP")),
                "{version:?}: {answer:?}"
            );
        }
    }
}

/// A resumed session would not be checked again: the certificate may have expired since.
#[test]
fn with_an_authority_for_clients_no_session_is_resumed() {
    let authority = Authority::new("the clients'");
    for (with, own, kind) in [
        (&CLIENT_FLAGS[..2], None, HandshakeKind::Resumed),
        (&CLIENT_FLAGS[..], Some(authority.issue(&["a"])), HandshakeKind::Full),
    ] {
        let site = Site::new();
        let pair = authority.issue(&[&site.address.to_string()]);
        install(site.dir(), "client", &pair, &authority.pem());
        let (flags, address) = with_client_port(&site, with);
        let _member = site.spawn("member", &flags);
        eventually(PATIENCE, "it listens", || TcpStream::connect(address).is_ok());
        for version in ALL_VERSIONS {
            let config = Arc::new(client_config(&[version], &authority.pem(), own.as_ref()));
            let [_, second] = [(); 2].map(|()| {
                let mut stream = open(config.clone(), TcpStream::connect(address).unwrap());
                converse(&mut stream, GET).unwrap();
                stream.conn.handshake_kind()
            });
            assert_eq!(second, Some(kind), "{version:?} with {with:?}");
        }
    }
}

#[test]
fn unusable_certificates_give_one_line_and_exit_status_2() {
    let (site, authority) = (Site::new(), Authority::new("the cluster's"));
    let foreign = Authority::new("foreign");
    let dir = site.dir();
    let host = site.address.to_string();
    let url = site.url().replace("http://", "https://");
    let (ca, right) = (authority.pem(), authority.member(&site, 1));
    let mixed = Pair { cert: right.cert.clone(), key: authority.member(&site, 1).key };
    let no_cert = Pair { cert: String::new(), ..right.clone() };
    let no_key = Pair { key: "-----BEGIN PRIVATE KEY-----\n".into(), ..right.clone() };
    for (name, pair, ca, named) in [
        ("cert", &no_cert, &*ca, "--peer-cert"),
        ("key", &no_key, &*ca, "--peer-key"),
        ("ca", &right, "nothing", "--peer-ca"),
        ("mixed", &mixed, &*ca, "does not match --peer-cert"),
        ("id", &authority.member(&site, 2), &*ca, "raftexample-1"),
        ("host", &authority.issue(&["raftexample-1"]), &*ca, &*host),
        ("expired", &authority.issue_with(&[&host, "raftexample-1"], expired), &*ca, "expired"),
        ("foreign", &foreign.member(&site, 1), &*ca, "UnknownIssuer"),
    ] {
        install(dir, name, pair, ca);
        let mut all = owned(&["--cluster", &url]);
        all.extend(flags(dir, name, PEER_FLAGS));
        println!("{name}");
        refused(site.spawn(name, &all), 2, named);
    }
    let mut all = owned(&["--cluster", &url]);
    all.extend(flags(dir, "missing", PEER_FLAGS));
    refused(site.spawn("missing", &all), 2, "missing.pem: No such file");
    install(dir, "client", &authority.issue_with(&[&host], expired), "");
    let (all, _) = with_client_port(&site, &["--cert", "--key"]);
    refused(site.spawn("client", &all), 2, "--cert");
    install(dir, "client", &authority.issue(&[&host]), "");
    let (all, _) = with_client_port(&site, &CLIENT_FLAGS);
    refused(site.spawn("client-ca", &all), 2, "--client-ca");
    assert!(!dir.join("raftexample-1").exists(), "nothing was made yet");
    let (mut all, _) = with_client_port(&site, &[]);
    all.extend(owned(&["--admin", "0.0.0.0:0"]));
    refused(site.spawn("admin", &all), 2, "--admin 0.0.0.0:0 would let anyone change the cluster");
    let (mut all, _) = with_client_port(&site, &["--cert", "--key"]);
    all.extend(owned(&["--admin", "0.0.0.0:0", "--data-dir", "admin"]));
    let mut member = site.spawn("admin-tls", &all);
    eventually(PATIENCE, "it serves", || member.stderr().contains("serving keys"));
    member.kill();
    let (all, address) = with_client_port(&site, &[]);
    let _member = site.spawn("plain", &all);
    serves(address);
}
