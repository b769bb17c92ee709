//! The HTTP/1.1 server of all ports, with a limit on every resource that a client can hold. The
//! counterpart of the original's listener.go.
//!
//! # Limits
//! | resource | limit | beyond it |
//! |---|---|---|
//! | connections | [`Limits::connections`] | the one that has shown least is closed, see `slots.rs` |
//! | time for the first request head | [`Limits::first_head_timeout`] | closed |
//! | time for a TLS handshake | [`Limits::first_head_timeout`], at most 3 seconds | closed |
//! | time for a request head, or between requests | [`Limits::header_timeout`] | closed |
//! | size of a head | 64 KiB, 100 header lines | 431, closed |
//! | time without reading the response | [`Limits::stall_timeout`] | closed |
//! | a body | [`read_body`]: its length, the [`BodyBudget`], a deadline | the caller responds |
//!
//! hyper uses one timer for the time between two requests and the time that a head takes, so the same
//! limit applies to both. A client notices that an idle connection was closed before it writes the
//! next request, and opens another one.

mod body;
mod slots;

use std::convert::Infallible;
use std::future::{Future, pending};
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use axum::response::Response;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use slog::{Logger, debug, info, warn};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tokio_io_timeout::TimeoutWriter;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

pub use self::body::{BodyBudget, BodyError, BodyPermit, ResponseBudget, read_body};
use self::slots::{Slot, Slots};
use crate::error::Error;
use crate::ports::tls::{PeerCertificate, Remote, Tls, tls_error};

/// Connections to the client port at a time.
pub const CLIENT_CONNECTIONS_MAX: usize = 1024;
/// Connections to the peer port at a time. Each peer uses a few.
pub const PEER_CONNECTIONS_MAX: usize = 256;
/// Connections to the admin port at a time: browsers, probes and scrapers.
pub const ADMIN_CONNECTIONS_MAX: usize = 64;
/// Connections to the application port at a time: as many as to the client port, and the watchers.
pub const APPLICATION_CONNECTIONS_MAX: usize = 2048;
const CONNECTIONS_MAX: usize = CLIENT_CONNECTIONS_MAX
    + PEER_CONNECTIONS_MAX
    + ADMIN_CONNECTIONS_MAX
    + APPLICATION_CONNECTIONS_MAX;
/// Connections to peers at a time. They have descriptors of their own.
pub const OUTGOING_CONNECTIONS: usize = 260;
/// File descriptors that the ports leave to the rest of the process: connections to peers, as many as
/// there can be, and 128 for files and the runtime. A member that cannot open a file stops.
const DESCRIPTORS_KEPT: usize = OUTGOING_CONNECTIONS + 128;
/// Below this limit the process does not start: too few connections would fit.
const DESCRIPTORS_MIN: usize = DESCRIPTORS_KEPT + 128;

/// Bytes of a request's head, with the request line. Also the size of a connection's buffers.
const HEADER_BYTES: usize = 64 * 1024;
/// Header lines of a request.
const HEADER_FIELDS: usize = 100;

/// Connections that wait until they are accepted, as in Go; the kernel may allow fewer. If there are more, it
/// drops their first segments, which come again after a second.
const BACKLOG: u32 = 4096;

/// The wait after a failed accept. It doubles with each further failure.
const ACCEPT_BACKOFF_MIN: Duration = Duration::from_millis(5);
const ACCEPT_BACKOFF_MAX: Duration = Duration::from_secs(1);
/// How long accepting must not fail before it counts as working again.
const ACCEPT_CALM: Duration = Duration::from_secs(2);
const HANDSHAKE_TIMEOUT_MAX: Duration = Duration::from_secs(3);
/// How long a closed connection is still read from. See [`linger`].
const LINGER: Duration = Duration::from_millis(500);

/// The limits of the connections of one port.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at a time; at least 1.
    pub connections: usize,
    /// The time for the first request's head, from the start of the connection, TLS included.
    pub first_head_timeout: Duration,
    /// The time for another request's head, from the previous response.
    pub header_timeout: Duration,
    /// How long a client may accept no bytes of its response.
    pub stall_timeout: Duration,
    /// How long requests may take after the call to stop. Then their connections are closed.
    pub shutdown_grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: CLIENT_CONNECTIONS_MAX,
            first_head_timeout: Duration::from_secs(30),
            header_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(30),
            shutdown_grace: Duration::from_secs(10),
        }
    }
}

impl Limits {
    /// The same limits, with at most this port's share of the process's file descriptors.
    #[must_use]
    pub fn affordable(mut self) -> Self {
        self.connections = share(self.connections, descriptors());
        self
    }

    fn protocol(&self) -> http1::Builder {
        let mut protocol = http1::Builder::new();
        protocol
            .timer(TokioTimer::new())
            .header_read_timeout(self.header_timeout)
            .max_header_size(HEADER_BYTES)
            .max_buf_size(HEADER_BYTES)
            .max_headers(HEADER_FIELDS)
            // As Go writes header names, so that responses equal the original's.
            .title_case_headers(true)
            // A client may close its sending side and still read the response. A client that has
            // gone is therefore noticed only when the response is written.
            .half_close(true);
        protocol
    }
}

/// Raises the process's limit on file descriptors to what all connections and files need, as far as
/// the hard limit allows. Shells start programs with 1,024, which clients alone could use up. Go's
/// runtime does the same for the original.
///
/// # Errors
/// [`Error::Config`] if the limit stays too low.
pub fn raise_descriptor_limit() -> crate::error::Result<()> {
    let wanted = (CONNECTIONS_MAX + DESCRIPTORS_KEPT) as u64;
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < wanted
    {
        // If it fails, the check below decides.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, wanted.min(hard), hard);
    }
    let descriptors = descriptors();
    if descriptors < DESCRIPTORS_MIN {
        return Err(Error::Config(format!(
            "the limit on open files is {descriptors}, the minimum {DESCRIPTORS_MIN}: raise it with `ulimit -n`"
        )));
    }
    Ok(())
}

/// The process's limit on file descriptors.
fn descriptors() -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    usize::try_from(limit).unwrap_or(usize::MAX)
}

/// The connections that a port may have: `wanted`, or its share if the descriptors do not suffice.
fn share(wanted: usize, descriptors: usize) -> usize {
    let allowed = descriptors.saturating_sub(DESCRIPTORS_KEPT).min(CONNECTIONS_MAX);
    (wanted * allowed / CONNECTIONS_MAX).max(1)
}

/// A bound socket, with or without TLS.
#[derive(Debug)]
pub struct Port {
    /// The bound socket.
    pub listener: TcpListener,
    /// `None` for plain HTTP.
    pub tls: Option<Tls>,
}

impl Port {
    /// Listens at `address`, the value of `flag`.
    ///
    /// # Errors
    /// [`Error::Config`] if the address is in use, or does not belong to this machine.
    pub fn bind(address: SocketAddr, flag: &str, tls: Option<Tls>) -> crate::error::Result<Self> {
        let listen = || {
            let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
            // A member that starts again need not wait for connections of its last run.
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            socket.listen(BACKLOG)
        };
        let listener = listen().map_err(|error| {
            Error::Config(format!("cannot listen on {address} ({flag}): {error}"))
        })?;
        Ok(Self { listener, tls })
    }

    /// The address that it listens on, with the real port if 0 was asked for.
    ///
    /// # Errors
    /// That of the operating system.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl From<TcpListener> for Port {
    /// A port for plain HTTP.
    fn from(listener: TcpListener) -> Self {
        Self { listener, tls: None }
    }
}

/// A hyper service that handles the requests of a port: an axum handler or a router. A port with one
/// handler for all paths needs no router, and is faster without one.
pub trait HttpService<B = Incoming>:
    Service<Request<B>, Response = Response, Error = Infallible, Future: Send> + Clone + Send + 'static
{
}

impl<B, S> HttpService<B> for S where
    S: Service<Request<B>, Response = Response, Error = Infallible, Future: Send>
        + Clone
        + Send
        + 'static
{
}

/// Serves `service` on `port` until `shutdown` is ready. Returns when every connection has ended. With
/// TLS, each request carries its [`PeerCertificate`] as an extension.
///
/// After `shutdown`, the socket and idle connections are closed at once. Requests that have begun are
/// answered with `Connection: close`; those that take longer than [`Limits::shutdown_grace`] are cut.
///
/// # Panics
/// If a handler panicked, so that the panic ends the process.
pub async fn serve(
    port: impl Into<Port>,
    service: impl HttpService,
    limits: Limits,
    shutdown: impl Future<Output = ()>,
    logger: Logger,
) {
    let Port { listener, tls } = port.into();
    assert!(limits.connections > 0, "a port needs at least one connection");
    let mut acceptor = Acceptor::new(listener, logger.clone());
    let mut connections = JoinSet::new();
    let slots = Slots::new(limits.connections);
    let mut shutdown = pin!(shutdown);
    // No value is sent: dropping the sender tells the connections to finish.
    let (stop_tx, stop_rx) = watch::channel(());
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(ended) = connections.join_next() => check(ended),
            (stream, address) = acceptor.accept() => {
                let Some(slot) = slots.take().await else { continue };
                let connection = Connection {
                    service: service.clone(),
                    tls: tls.clone(),
                    address,
                    limits: limits.clone(),
                    stop_rx: stop_rx.clone(),
                    slot,
                    logger: logger.clone(),
                };
                connections.spawn(connection.serve(stream));
            }
        }
    }
    drop(acceptor);
    drop(stop_tx);
    let finish = async {
        while let Some(ended) = connections.join_next().await {
            check(ended);
        }
    };
    if timeout(limits.shutdown_grace, finish).await.is_err() {
        warn!(logger, "closing connections that did not end within the grace period";
            "connections" => connections.len());
        connections.shutdown().await;
    }
}

/// Serves one connection with TLS on any stream, as [`serve`] does.
#[doc(hidden)]
pub async fn serve_stream<I>(
    stream: I,
    address: SocketAddr,
    tls: Tls,
    service: impl HttpService,
    limits: Limits,
    logger: Logger,
) where
    I: AsyncRead + AsyncWrite + Send + 'static,
{
    let slot = Slots::new(1).take().await.expect("there is no other connection");
    let (_stop_tx, stop_rx) = watch::channel(());
    let connection = Connection { service, tls: Some(tls), address, limits, stop_rx, slot, logger };
    connection.serve_stream(stream).await;
}

fn check(ended: Result<(), JoinError>) {
    if let Err(Ok(panic)) = ended.map_err(JoinError::try_into_panic) {
        std::panic::resume_unwind(panic);
    }
}

/// Accepts connections, and waits after failures.
struct Acceptor {
    listener: TcpListener,
    /// The errno and time of the last failure, until accepting works again.
    failure: Option<(Option<i32>, Instant)>,
    backoff: Duration,
    logger: Logger,
}

impl Acceptor {
    fn new(listener: TcpListener, logger: Logger) -> Self {
        Self { listener, failure: None, backoff: ACCEPT_BACKOFF_MIN, logger }
    }

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    self.backoff = ACCEPT_BACKOFF_MIN;
                    // Without free descriptors, each one that is closed gives one success between two
                    // failures. That is not worth a line.
                    let calm = |(_, at): &mut (_, Instant)| at.elapsed() > ACCEPT_CALM;
                    if self.failure.take_if(calm).is_some() {
                        info!(self.logger, "accepting connections again");
                    }
                    return (stream, address);
                }
                Err(error) => self.back_off(&error).await,
            }
        }
    }

    /// Logs a failure unless it repeats the last one, and waits. The usual failure is that the process
    /// has no free file descriptor: without the wait, this loop would spin. [`serve`] cancels the wait
    /// when a connection ends, because that frees a descriptor.
    async fn back_off(&mut self, error: &io::Error) {
        let failure = error.raw_os_error();
        let last = self.failure.replace((failure, Instant::now()));
        if last.is_none_or(|(last, _)| last != failure) {
            warn!(self.logger, "cannot accept connections, retrying"; "error" => %error);
        }
        let backoff = self.backoff;
        self.backoff = (backoff * 2).min(ACCEPT_BACKOFF_MAX);
        sleep(backoff).await;
    }
}

/// A stream whose writes fail when the client accepts no bytes for [`Limits::stall_timeout`].
type Stream<I> = Pin<Box<TimeoutWriter<I>>>;

/// Why a connection ends, other than by its client.
enum End {
    /// Another one gets its place.
    Evicted,
    /// There was no request.
    Silent,
    /// After the request that it is in: the port stops, or the client has to authenticate again.
    Finish,
}

struct Connection<S> {
    service: S,
    tls: Option<Tls>,
    address: SocketAddr,
    limits: Limits,
    stop_rx: watch::Receiver<()>,
    slot: Arc<Slot>,
    logger: Logger,
}

impl<S: HttpService> Connection<S> {
    async fn serve(self, stream: TcpStream) {
        if let Err(error) = stream.set_nodelay(true) {
            debug!(self.logger, "a connection failed before its first request"; "error" => %error);
            return;
        }
        self.serve_stream(stream).await;
    }

    async fn serve_stream<I>(mut self, stream: I)
    where
        I: AsyncRead + AsyncWrite + Send + 'static,
    {
        self.slot.begin();
        // Below TLS, so that the timeout also covers handshakes and TLS's write buffer.
        let mut stream = Box::pin(TimeoutWriter::new(stream));
        stream.as_mut().set_timeout_pinned(Some(self.limits.stall_timeout));
        let slot = self.slot.clone();
        let service = self.service.clone();
        let service =
            service_fn(move |request: Request<Incoming>| slot.during(service.call(request)));
        let Some(tls) = self.tls.take() else {
            return self.serve_http(stream, service, pending()).await;
        };
        let in_use = tls.in_use();
        let slot = self.slot.clone();
        let stream = tokio::select! {
            biased;
            () = slot.evicted() => return,
            stream = self.handshake(&tls, in_use.acceptor(), stream) => stream,
        };
        let Some(stream) = stream else { return };
        let replaced = in_use.replaced();
        let certificates = stream.get_ref().1.peer_certificates();
        let certificate =
            certificates.and_then(|chain| chain.first()).map(|certificate| PeerCertificate {
                certificate: Arc::new(certificate.clone()),
                address: self.address,
                in_use: in_use.clone(),
            });
        let service = service_fn(move |mut request: Request<Incoming>| {
            if let Some(certificate) = &certificate {
                request.extensions_mut().insert(certificate.clone());
            }
            service.call(request)
        });
        self.serve_http(stream, service, replaced).await;
    }

    /// Does the TLS handshake; `None` if it fails.
    async fn handshake<I: AsyncRead + AsyncWrite>(
        &mut self,
        tls: &Tls,
        acceptor: TlsAcceptor,
        stream: Stream<I>,
    ) -> Option<TlsStream<Stream<I>>> {
        let patience = self.limits.first_head_timeout.min(HANDSHAKE_TIMEOUT_MAX);
        let accept = timeout(patience, acceptor.accept(stream).into_fallible());
        let accepted = tokio::select! {
            accepted = accept => accepted,
            _ = self.stop_rx.changed() => return None,
        };
        match accepted {
            Ok(Ok(stream)) => Some(stream),
            Ok(Err((error, stream))) => {
                match tls_error(&error) {
                    Some(error) => tls.refuse_handshake(Remote::Client(self.address), error),
                    // The client closed the connection, as port scanners do.
                    None => debug!(self.logger, "a TLS handshake broke off"; "error" => %error),
                }
                linger(stream).await;
                None
            }
            Err(_) => {
                debug!(self.logger, "a TLS handshake timed out");
                None
            }
        }
    }

    /// Serves requests until the client has gone, the port stops, or the certificate files are
    /// `replaced`: then the client must authenticate again.
    async fn serve_http<I>(
        self,
        stream: I,
        service: impl HttpService,
        replaced: impl Future<Output = ()> + Send + 'static,
    ) where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut connection = self.limits.protocol().serve_connection(TokioIo::new(stream), service);
        let (evicted, silent) = (self.slot.clone(), self.slot.clone());
        let patience = self.limits.first_head_timeout;
        let mut stop_rx = self.stop_rx;
        // Each is polled only when it was woken, not with each request.
        let mut ends: FuturesUnordered<BoxFuture<'static, End>> = FuturesUnordered::new();
        ends.push(
            async move {
                evicted.evicted().await;
                End::Evicted
            }
            .boxed(),
        );
        ends.push(
            async move {
                silent.is_silent_for(patience).await;
                End::Silent
            }
            .boxed(),
        );
        ends.push(
            async move {
                let _ = stop_rx.changed().await;
                End::Finish
            }
            .boxed(),
        );
        ends.push(
            async move {
                replaced.await;
                End::Finish
            }
            .boxed(),
        );
        let ended = loop {
            tokio::select! {
                biased;
                Some(end) = ends.next() => match end {
                    End::Evicted => return,
                    End::Silent => {
                        debug!(self.logger, "a connection sent no request in time");
                        return;
                    }
                    End::Finish => Pin::new(&mut connection).graceful_shutdown(),
                },
                ended = &mut connection => break ended,
            }
        };
        if let Err(error) = ended {
            debug!(self.logger, "a connection ended with an error"; "error" => %error);
        }
        // So that what follows is the one to hear of the eviction.
        drop(ends);
        tokio::select! {
            biased;
            () = self.slot.evicted() => {}
            () = linger(connection.into_parts().io.into_inner()) => {}
        }
    }
}

/// Closes the sending side, then reads and discards what the client still sends, for [`LINGER`].
///
/// A response can precede the end of its request, 413 for example. Closing a socket with unread bytes
/// resets the connection, and the client could lose the response.
async fn linger(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let drain = async {
        if stream.shutdown().await.is_err() {
            return;
        }
        let mut scrap = vec![0; 16 * 1024];
        while let Ok(1..) = stream.read(&mut scrap).await {}
    };
    let _ = timeout(LINGER, drain).await;
}

#[cfg(test)]
pub(crate) mod tests;
