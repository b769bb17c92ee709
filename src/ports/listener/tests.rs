//! The limits of connections, seen from the client's end of a socket.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::task::{Context, Poll};

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::routing::get;
use bytes::Bytes;
use hyper::body::Frame;
use hyper_util::service::TowerToHyperService;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::*;
use crate::ports::tls::tests::for_clients;

/// The deadline for what must happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server on a free port.
pub(crate) struct Server {
    pub address: SocketAddr,
    shutdown_tx: oneshot::Sender<()>,
    served: JoinHandle<()>,
}

impl Server {
    pub async fn start(service: impl HttpService, limits: Limits) -> Self {
        Self::start_with(None, service, limits).await
    }

    async fn start_with(tls: Option<Tls>, service: impl HttpService, limits: Limits) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (shutdown_tx, shutdown_rx) = oneshot::channel();
        let shutdown = async { shutdown_rx.await.expect("the test stops the server") };
        let logger = Logger::root(slog::Discard, slog::o!());
        let port = Port { listener, tls };
        let served = tokio::spawn(serve(port, service, limits, shutdown, logger));
        Self { address, shutdown_tx, served }
    }

    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("the server listens")
    }

    /// Tells the server to stop, and returns the task that ends when it has.
    pub fn stop(self) -> JoinHandle<()> {
        self.shutdown_tx.send(()).expect("the server runs");
        self.served
    }
}

/// Reads to the end of the connection.
pub(crate) async fn read_to_end(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A reset is an end, too.
    let _ = timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("the server closes");
    bytes
}

/// Reads until `end` has come.
pub(crate) async fn read_until(stream: &mut TcpStream, end: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while !bytes.ends_with(end) {
        let byte = timeout(PATIENCE, stream.read_u8()).await.expect("the server answers");
        bytes.push(byte.expect("the server goes on"));
    }
    bytes
}

fn starts_with(bytes: &[u8], line: &str) {
    let text = String::from_utf8_lossy(bytes);
    assert!(text.starts_with(line), "{text:?} begins with {line:?}");
}

fn hello() -> Router {
    Router::new().route("/", get(|| async { "hello" }))
}

const GET: &[u8] = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n";

#[tokio::test]
async fn head_that_does_not_end_closes_the_connection() {
    let limits = Limits { header_timeout: Duration::from_millis(50), ..Limits::default() };
    let server = Server::start(TowerToHyperService::new(hello()), limits).await;
    for sent in [&b""[..], b"GET / HTT", b"GET / HTTP/1.1\r\nHost: h\r\nA: "] {
        let mut client = server.connect().await;
        client.write_all(sent).await.expect("the server listens");
        assert_eq!(read_to_end(&mut client).await, b"", "after {} bytes", sent.len());
    }
}

#[tokio::test]
async fn idle_connection_is_closed_after_the_time_of_a_head() {
    let limits = Limits { header_timeout: Duration::from_millis(50), ..Limits::default() };
    let server = Server::start(TowerToHyperService::new(hello()), limits).await;
    let mut client = server.connect().await;
    client.write_all(GET).await.expect("the server listens");
    starts_with(&read_to_end(&mut client).await, "HTTP/1.1 200 OK\r\n");
}

#[tokio::test]
async fn large_head_is_answered_431() {
    let server = Server::start(TowerToHyperService::new(hello()), Limits::default()).await;
    let long_line = format!("A: {}\r\n", "a".repeat(HEADER_BYTES));
    let many_lines = "A: a\r\n".repeat(HEADER_FIELDS + 1);
    for lines in [long_line.clone() + "\r\n", long_line, many_lines + "\r\n"] {
        let mut client = server.connect().await;
        let head = format!("GET / HTTP/1.1\r\n{lines}");
        client.write_all(head.as_bytes()).await.expect("the server listens");
        starts_with(&read_to_end(&mut client).await, "HTTP/1.1 431 ");
    }
}

/// A port that is full closes an idle connection for a new one, and lets requests be answered.
#[tokio::test]
async fn an_idle_connection_gives_its_place_to_a_new_one() {
    let limits = Limits { connections: 1, ..Limits::default() };
    let server = Server::start(TowerToHyperService::new(hello()), limits).await;
    let mut first = server.connect().await;
    first.write_all(GET).await.expect("the server listens");
    read_until(&mut first, b"hello").await;
    let mut second = server.connect().await;
    second.write_all(GET).await.expect("it is accepted");
    starts_with(&read_until(&mut second, b"hello").await, "HTTP/1.1 200 OK\r\n");
    assert_eq!(first.read(&mut [0; 1]).await.unwrap_or(0), 0, "the first is closed");
}

/// Otherwise connections that end with an error would hold more descriptors than there are places.
#[tokio::test]
async fn a_connection_that_lingers_gives_its_place_too() {
    let limits = Limits { connections: 1, ..Limits::default() };
    let server = Server::start(TowerToHyperService::new(hello()), limits).await;
    let mut first = server.connect().await;
    first.write_all(b"no request\r\n\r\n").await.expect("the server listens");
    starts_with(&read_to_end(&mut first).await, "HTTP/1.1 400 ");
    // The server has closed its side, and reads on.
    let lingers = Instant::now();
    let mut second = server.connect().await;
    second.write_all(GET).await.expect("the server listens");
    starts_with(&read_until(&mut second, b"hello").await, "HTTP/1.1 200 OK\r\n");
    while first.write_all(b"x").await.is_ok() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(lingers.elapsed() < LINGER * 4 / 5, "it went after {:?}", lingers.elapsed());
}

#[tokio::test]
async fn a_connection_without_a_request_is_closed_in_time() {
    let limits = Limits { first_head_timeout: Duration::from_millis(50), ..Limits::default() };
    let server = Server::start(TowerToHyperService::new(hello()), limits).await;
    let mut silent = server.connect().await;
    let mut slow = server.connect().await;
    slow.write_all(b"GET / HTTP/1.1\r\nA: ").await.expect("the server listens");
    for client in [&mut silent, &mut slow] {
        let closed = timeout(Duration::from_secs(5), client.read(&mut [0; 1])).await;
        assert_eq!(closed.expect("it is closed").unwrap_or(0), 0);
    }
}

/// A client that does not read its response loses its place.
#[tokio::test]
async fn answer_that_is_not_read_closes_the_connection() {
    let long = || async { vec![0; 64 * 1024 * 1024] };
    let limits =
        Limits { connections: 1, stall_timeout: Duration::from_millis(50), ..Limits::default() };
    let server =
        Server::start(TowerToHyperService::new(hello().route("/long", get(long))), limits).await;
    let mut first = server.connect().await;
    first.write_all(b"GET /long HTTP/1.1\r\nHost: h\r\n\r\n").await.expect("the server listens");
    let mut second = server.connect().await;
    second.write_all(GET).await.expect("the backlog takes it");
    starts_with(&read_until(&mut second, b"hello").await, "HTTP/1.1 200 OK\r\n");
    assert!(read_to_end(&mut first).await.len() < 64 * 1024 * 1024);
}

/// Connects to `server` with TLS.
async fn connect_tls(server: &Server, client: ClientConfig) -> TlsStream<TcpStream> {
    let name = ServerName::try_from("localhost").expect("a name");
    let connect = TlsConnector::from(Arc::new(client)).connect(name, server.connect().await);
    timeout(PATIENCE, connect).await.expect("the server answers").expect("a handshake")
}

#[tokio::test]
async fn handshake_that_does_not_end_closes_the_connection() {
    let (tls, client) = for_clients();
    let limits =
        Limits { connections: 1, header_timeout: Duration::from_millis(50), ..Limits::default() };
    let hello = TowerToHyperService::new(hello());
    let server = Server::start_with(Some(tls), hello, limits).await;
    // Nothing, or the start of a ClientHello.
    for sent in [&b""[..], &[22, 3, 1, 2, 0, 1, 0, 1]] {
        let mut silent = server.connect().await;
        silent.write_all(sent).await.expect("the server listens");
        assert_eq!(read_to_end(&mut silent).await, b"", "after {} bytes", sent.len());
    }
    // Their places are free again.
    let mut stream = connect_tls(&server, client).await;
    stream.write_all(GET).await.expect("the server reads");
    let mut answer = [0; 15];
    timeout(PATIENCE, stream.read_exact(&mut answer)).await.expect("in time").expect("an answer");
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
}

/// TLS's write buffer does not protect such a client.
#[tokio::test]
async fn answer_that_is_not_read_closes_the_connection_with_tls() {
    let (tls, client) = for_clients();
    let router = hello().route("/long", get(async || vec![0; 64 << 20]));
    let limits =
        Limits { connections: 1, stall_timeout: Duration::from_millis(50), ..Limits::default() };
    let server = Server::start_with(Some(tls), TowerToHyperService::new(router), limits).await;
    let mut first = connect_tls(&server, client.clone()).await;
    first.write_all(b"GET /long HTTP/1.1\r\nHost: h\r\n\r\n").await.expect("the server reads");
    let mut second = connect_tls(&server, client).await;
    second.write_all(GET).await.expect("the server reads");
    let mut answer = [0; 15];
    timeout(PATIENCE, second.read_exact(&mut answer)).await.expect("in time").expect("an answer");
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
}

#[tokio::test]
async fn stopping_waits_for_no_handshake() {
    let (tls, _) = for_clients();
    let server =
        Server::start_with(Some(tls), TowerToHyperService::new(hello()), Limits::default()).await;
    let mut silent = server.connect().await;
    // The alert for a later connection shows that the server has accepted this one.
    let mut plain = server.connect().await;
    plain.write_all(GET).await.expect("the server listens");
    let alert = read_to_end(&mut plain).await;
    assert_eq!(alert.first(), Some(&21), "an alert, and the end: {alert:?}");
    let sooner = HANDSHAKE_TIMEOUT_MAX / 2;
    timeout(sooner, server.stop()).await.expect("the server ends").expect("without a panic");
    assert_eq!(read_to_end(&mut silent).await, b"");
}

/// A service whose handler reports that it has begun, then waits to be released.
fn waiting() -> (TowerToHyperService<Router>, Arc<Notify>, Arc<Notify>) {
    let (begun, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let handler = {
        let (begun, release) = (begun.clone(), release.clone());
        move || async move {
            begun.notify_one();
            release.notified().await;
            "released"
        }
    };
    (TowerToHyperService::new(hello().route("/wait", get(handler))), begun, release)
}

/// Stopping closes the port and idle connections at once, and waits for requests.
#[tokio::test]
async fn stopping_finishes_what_has_begun() {
    let (service, begun, release) = waiting();
    let server = Server::start(service, Limits::default()).await;
    let address = server.address;
    let mut idle = server.connect().await;
    idle.write_all(GET).await.expect("the server listens");
    read_until(&mut idle, b"hello").await;
    let mut busy = server.connect().await;
    busy.write_all(b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n").await.expect("the server listens");
    begun.notified().await;

    let mut served = server.stop();
    assert_eq!(read_to_end(&mut idle).await, b"");
    assert!(TcpStream::connect(address).await.is_err(), "the port is closed");
    assert!(timeout(Duration::from_millis(50), &mut served).await.is_err(), "one request goes on");
    release.notify_one();
    let answer = read_to_end(&mut busy).await;
    starts_with(&answer, "HTTP/1.1 200 OK\r\n");
    assert!(String::from_utf8_lossy(&answer).contains("\r\nConnection: close\r\n"));
    assert!(answer.ends_with(b"released"));
    drop(busy);
    timeout(PATIENCE, served).await.expect("the server ends").expect("without a panic");
}

#[tokio::test]
async fn stopping_cuts_what_does_not_end() {
    let (service, begun, _release) = waiting();
    let limits = Limits { shutdown_grace: Duration::from_millis(50), ..Limits::default() };
    let server = Server::start(service, limits).await;
    let mut busy = server.connect().await;
    busy.write_all(b"GET /wait HTTP/1.1\r\nHost: h\r\n\r\n").await.expect("the server listens");
    begun.notified().await;
    timeout(PATIENCE, server.stop()).await.expect("the server ends").expect("without a panic");
    assert_eq!(read_to_end(&mut busy).await, b"");
}

/// A body that arrives in pieces, and then ends or stays open.
struct Pieces {
    pieces: VecDeque<Result<Bytes, io::Error>>,
    ends: bool,
}

impl Pieces {
    fn body(pieces: impl IntoIterator<Item = Result<Bytes, io::Error>>, ends: bool) -> Body {
        Body::new(Self { pieces: pieces.into_iter().collect(), ends })
    }
}

impl HttpBody for Pieces {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match self.pieces.pop_front() {
            Some(piece) => Poll::Ready(Some(piece.map(Frame::data))),
            None if self.ends => Poll::Ready(None),
            None => Poll::Pending,
        }
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(50)
}

#[tokio::test]
async fn body_in_one_piece_is_not_copied() {
    let budget = BodyBudget::new(70_000);
    let piece = Bytes::from(vec![7; 65_536 + 70_000]);
    let body = Pieces::body([Ok(piece.clone())], true);
    let (bytes, permit) = read_body(body, 200_000, &budget, soon()).await.expect("it is whole");
    assert_eq!(bytes, piece);
    assert_eq!(bytes.as_ptr(), piece.as_ptr());
    assert_eq!(budget.available_bytes(), 0);
    let large = Pieces::body([Ok(piece)], true);
    let busy = read_body(large, 200_000, &budget, soon()).await.expect_err("there is no room");
    assert!(matches!(busy, BodyError::Busy), "{busy}");
    // The reserve is for the first bytes of each body.
    let (_small, _permit) = read_body(Body::from("ab"), 7, &budget, soon()).await.expect("room");
    drop(permit);
    assert_eq!(budget.available_bytes(), 70_000);
}

#[tokio::test]
async fn body_in_many_pieces_is_put_together() {
    let budget = BodyBudget::new(1000);
    let pieces = ["", "ab", "", "c", "defg", ""].map(|piece| Ok(Bytes::from(piece)));
    let body = Pieces::body(pieces, true);
    let (bytes, _permit) = read_body(body, 7, &budget, soon()).await.expect("it is whole");
    assert_eq!(&bytes[..], b"abcdefg");
    let (bytes, _permit) = read_body(Body::empty(), 0, &budget, soon()).await.expect("whole");
    assert!(bytes.is_empty());
}

/// After each error the body's permits are returned.
#[tokio::test]
async fn body_that_cannot_be_read_leaves_the_budget() {
    let budget = BodyBudget::new(10);
    let piece = || Ok(Bytes::from_static(b"abcd"));
    let read = async |body, max_bytes| {
        let error = read_body(body, max_bytes, &budget, soon()).await.expect_err("it is not read");
        assert_eq!(budget.available_bytes(), 10, "after {error}");
        error
    };
    let announced = read(Body::from("abcdefgh"), 7).await;
    assert!(matches!(announced, BodyError::TooLarge(7)), "{announced}");
    let grown = read(Pieces::body([piece(), piece()], true), 7).await;
    assert!(matches!(grown, BodyError::TooLarge(7)), "{grown}");
    let busy = read(Pieces::body([piece(), piece(), piece()], true), 100).await;
    assert!(matches!(busy, BodyError::Busy), "{busy}");
    let reset = Err(io::ErrorKind::ConnectionReset.into());
    let broken = read(Pieces::body([piece(), reset], true), 100).await;
    assert!(matches!(broken, BodyError::Broken(_)), "{broken}");
    let late = read(Pieces::body([piece()], false), 100).await;
    assert!(matches!(late, BodyError::TimedOut), "{late}");
}

/// Records log lines.
#[derive(Clone, Default)]
struct Lines(Arc<std::sync::Mutex<Vec<String>>>);

impl slog::Drain for Lines {
    type Ok = ();
    type Err = slog::Never;

    fn log(&self, record: &slog::Record<'_>, _: &slog::OwnedKVList) -> Result<(), slog::Never> {
        self.0.lock().expect("lines").push(record.msg().to_string());
        Ok(())
    }
}

impl Lines {
    fn count(&self, text: &str) -> usize {
        self.0.lock().expect("lines").iter().filter(|line| line.contains(text)).count()
    }
}

/// Without free descriptors, each one that is closed gives one success between two failures.
#[tokio::test]
async fn repeated_failures_to_accept_are_logged_once_a_period() {
    let log = Lines::default();
    let logger = Logger::root(log.clone(), slog::o!());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let mut acceptor = Acceptor::new(listener, logger);
    let no_descriptors = || io::Error::from_raw_os_error(24);
    let logged = || (log.count("cannot accept"), log.count("accepting connections again"));
    for _ in 0..3 {
        acceptor.back_off(&no_descriptors()).await;
        acceptor.back_off(&no_descriptors()).await;
        let _client = TcpStream::connect(address).await.expect("the backlog takes it");
        drop(acceptor.accept().await);
        assert_eq!(logged(), (1, 0));
        assert_eq!(acceptor.backoff, ACCEPT_BACKOFF_MIN, "it worked");
    }
    acceptor.back_off(&io::Error::from_raw_os_error(12)).await;
    assert_eq!(logged(), (2, 0), "another failure");

    // Long after the last failure, the next one starts a new period.
    let (_, at) = acceptor.failure.as_mut().expect("it failed");
    *at -= ACCEPT_CALM + Duration::from_secs(1);
    let _client = TcpStream::connect(address).await.expect("the backlog takes it");
    drop(acceptor.accept().await);
    assert_eq!(logged(), (2, 1));
    acceptor.back_off(&no_descriptors()).await;
    assert_eq!(logged(), (3, 1));
}

#[test]
fn connections_leave_descriptors_for_files_whatever_the_limit() {
    for descriptors in [DESCRIPTORS_MIN, 600, 1024, 1800, 1 << 20, usize::MAX] {
        let clients = share(CLIENT_CONNECTIONS_MAX, descriptors);
        let peers = share(PEER_CONNECTIONS_MAX, descriptors);
        let admin = share(ADMIN_CONNECTIONS_MAX, descriptors);
        let programs = share(APPLICATION_CONNECTIONS_MAX, descriptors);
        let all = clients + peers + admin + programs;
        assert!(all + DESCRIPTORS_KEPT <= descriptors, "{descriptors}");
        assert!(clients >= 32 && peers >= 8, "{descriptors}: {clients} and {peers}");
    }
    let all = CONNECTIONS_MAX + DESCRIPTORS_KEPT;
    assert_eq!(share(CLIENT_CONNECTIONS_MAX, all), CLIENT_CONNECTIONS_MAX);
}
