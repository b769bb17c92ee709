//! HTTP/1.1 on a bound socket, with a bound on everything that a client can hold: the twin of the
//! original's listener.go, used by the client port and by the peer port.
//!
//! The caller binds, so that a port that is taken is an error before anything was started, and so
//! that tests can listen on port 0. [`serve`] accepts until it is told to stop, and returns when
//! every connection has ended.
//!
//! # What a client can hold, and for how long
//! | what | bound | then |
//! |---|---|---|
//! | a connection | [`Limits::connections`] | the next one waits in the socket's backlog |
//! | a TLS handshake | [`Limits::header_timeout`], 3 seconds at most | closed |
//! | a head that does not end, or no request at all | [`Limits::header_timeout`] | closed |
//! | a large head | [`Limits::header_bytes`], [`Limits::header_fields`] | 431, closed |
//! | an answer that it does not read | [`Limits::stall_timeout`] | closed |
//! | a body | [`read_body`]: its length, the [`BodyBudget`], a deadline | the caller answers |
//!
//! hyper has one timer for the time between two requests and the time that a head takes to arrive,
//! so an idle connection lives as long as a head may take. A client finds the end of an idle
//! connection before it writes the next request, and opens another.
//!
//! Connections never take the last descriptors of the process: [`Limits::affordable`] connections
//! leave room for the files of the log and of snapshots, which it could not go on without.
//!
//! With TLS on a [`Port`], the requests carry the certificate of the other end, if it has one, as an
//! extension: [`PeerCertificate`]. Who fails the handshake, or speaks no TLS, is told so by an alert.
//!
//! The original keeps dead connections from living for ever with TCP keep-alive. The timeouts above
//! do the same here, and do it for a client that is alive and silent as well.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use slog::{Logger, debug, info, warn};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, Sleep, sleep, timeout, timeout_at};
use tokio_rustls::server::TlsStream;

use crate::error::Error;
use crate::ports::tls::{PeerCertificate, Reason, Tls, kind, tls_error};

/// Connections of clients at a time.
pub const CLIENT_CONNECTIONS_MAX: usize = 1024;
/// Connections of peers at a time: each uses a few.
pub const PEER_CONNECTIONS_MAX: usize = 256;
/// Connections to the admin listener at a time: people, probes and scrapers, not clients.
pub const ADMIN_CONNECTIONS_MAX: usize = 64;
const CONNECTIONS_MAX: usize =
    CLIENT_CONNECTIONS_MAX + PEER_CONNECTIONS_MAX + ADMIN_CONNECTIONS_MAX;
/// Descriptors that both ports leave to the rest of the process: its files, its own connections to
/// peers, the runtime. A file that cannot be opened for want of one stops the process.
const DESCRIPTORS_KEPT: usize = 128;
/// With fewer descriptors too few are left for connections.
const DESCRIPTORS_MIN: usize = 192;

/// The wait after a failed accept; it doubles with each failure in a row.
const ACCEPT_BACKOFF_MIN: Duration = Duration::from_millis(5);
/// The longest wait after a failed accept.
const ACCEPT_BACKOFF_MAX: Duration = Duration::from_secs(1);
/// Accepting works again once it has not failed for this long.
const ACCEPT_CALM: Duration = Duration::from_secs(2);
/// How long a TLS handshake may take, if a request's head may take longer.
const HANDSHAKE_TIMEOUT_MAX: Duration = Duration::from_secs(3);
/// How long a closed connection is still read from, see [`linger`].
const LINGER: Duration = Duration::from_millis(500);

/// What the connections of one port may hold.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at a time, at least 1.
    pub connections: usize,
    /// How long a request's head may take, counted from the answer before it or from the start of
    /// the connection.
    pub header_timeout: Duration,
    /// Bytes in a request's head, the request line included; at least 8 KiB. A connection's buffers
    /// are as large at most.
    pub header_bytes: usize,
    /// Header lines in a request.
    pub header_fields: usize,
    /// How long a client may take nothing of an answer that is being written to it.
    pub stall_timeout: Duration,
    /// How long connections may go on after the call to stop, before they are cut.
    pub shutdown_grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: CLIENT_CONNECTIONS_MAX,
            header_timeout: Duration::from_secs(30),
            header_bytes: 64 * 1024,
            header_fields: 100,
            stall_timeout: Duration::from_secs(30),
            shutdown_grace: Duration::from_secs(10),
        }
    }
}

impl Limits {
    /// These, with the port's share of the descriptors that the process has for connections.
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
            .max_header_size(self.header_bytes)
            .max_buf_size(self.header_bytes)
            .max_headers(self.header_fields)
            // Go writes header names this way, and raw comparisons with the original see it.
            .title_case_headers(true)
            // A client that closed its sending side still gets its answer. So one that went away
            // is noticed only when its answer is written: its request runs until its deadline.
            .half_close(true);
        protocol
    }
}

/// Raises this process's limit of descriptors to what its connections and files may take, as far
/// as the system lets it: shells start programs with 1,024, which the clients alone could use up.
/// Go's runtime does the same for the original.
///
/// # Errors
/// [`Error::Config`] if too few are left.
pub fn raise_descriptor_limit() -> crate::error::Result<()> {
    let wanted = (CONNECTIONS_MAX + DESCRIPTORS_KEPT) as u64;
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < wanted
    {
        // If it fails, what there is has to do.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, wanted.min(hard), hard);
    }
    let descriptors = descriptors();
    if descriptors < DESCRIPTORS_MIN {
        return Err(Error::Config(format!(
            "a process may have {descriptors} open files here, and this one needs {DESCRIPTORS_MIN}: raise `ulimit -n`"
        )));
    }
    Ok(())
}

/// How many descriptors this process may have.
fn descriptors() -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft);
    usize::try_from(limit).unwrap_or(usize::MAX)
}

/// A port's share of the connections that so many descriptors allow: all that it wants, if all do.
fn share(wanted: usize, descriptors: usize) -> usize {
    let allowed = descriptors.saturating_sub(DESCRIPTORS_KEPT).min(CONNECTIONS_MAX);
    (wanted * allowed / CONNECTIONS_MAX).max(1)
}

/// Listens at `address`, which came from `flag`.
///
/// # Errors
/// [`Error::Config`] if the address is taken, or not this machine's.
pub async fn bind(address: SocketAddr, flag: &str) -> crate::error::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|error| Error::Config(format!("cannot listen on {address} ({flag}): {error}")))
}

/// A bound socket, and TLS on it or not.
#[derive(Debug)]
pub struct Port {
    /// Where connections come from.
    pub listener: TcpListener,
    /// What they have to speak, if not plain HTTP.
    pub tls: Option<Tls>,
}

impl From<TcpListener> for Port {
    /// A port for plain HTTP.
    fn from(listener: TcpListener) -> Self {
        Self { listener, tls: None }
    }
}

/// What answers the requests of a port: an axum handler, or a router, as hyper sees it. A port that
/// has one handler for all paths needs no router, and is faster without.
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

/// Serves `service` on `port` until `shutdown` is ready; returns when every connection ended.
///
/// After `shutdown` the socket is closed at once, idle connections too; a request that has begun is
/// answered, with `Connection: close`, unless that takes longer than [`Limits::shutdown_grace`].
///
/// # Panics
/// If a handler panicked: the panic goes on here, so that it ends the process.
pub async fn serve(
    port: impl Into<Port>,
    service: impl HttpService,
    limits: Limits,
    shutdown: impl Future<Output = ()>,
    logger: Logger,
) {
    let Port { listener, tls } = port.into();
    let mut acceptor = Acceptor::new(listener, limits.connections, logger.clone());
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    // Nothing is ever sent: dropping the sender tells the connections to finish.
    let (stop_tx, stop_rx) = watch::channel(());
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(ended) = connections.join_next() => check(ended),
            (stream, address, permit) = acceptor.accept() => {
                let connection = Connection {
                    service: service.clone(),
                    tls: tls.clone(),
                    address,
                    limits: limits.clone(),
                    stop_rx: stop_rx.clone(),
                    logger: logger.clone(),
                };
                connections.spawn(async move {
                    connection.serve(stream).await;
                    drop(permit);
                });
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
        warn!(logger, "cutting connections that did not end in time";
            "connections" => connections.len());
        connections.shutdown().await;
    }
}

fn check(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        std::panic::resume_unwind(error.into_panic());
    }
}

/// Accepts connections, as many at a time as there are permits.
struct Acceptor {
    listener: TcpListener,
    permits: Arc<Semaphore>,
    /// The system's number of the last failure, and when it was, until accepting works steadily.
    failure: Option<(Option<i32>, Instant)>,
    backoff: Duration,
    logger: Logger,
}

impl Acceptor {
    fn new(listener: TcpListener, connections: usize, logger: Logger) -> Self {
        assert!(connections > 0, "a port that takes no connections serves nobody");
        let permits = Arc::new(Semaphore::new(connections));
        Self { listener, permits, failure: None, backoff: ACCEPT_BACKOFF_MIN, logger }
    }

    /// Waits for a permit and then for a connection, in this order: a connection that cannot be
    /// served is left to the backlog, where it costs this process no descriptor.
    async fn accept(&mut self) -> (TcpStream, SocketAddr, OwnedSemaphorePermit) {
        let permit =
            self.permits.clone().acquire_owned().await.expect("the semaphore is never closed");
        loop {
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    self.backoff = ACCEPT_BACKOFF_MIN;
                    // Each descriptor that comes free is one success between two failures: that is
                    // nothing to log.
                    let calm = |(_, at): &mut (_, Instant)| at.elapsed() > ACCEPT_CALM;
                    if self.failure.take_if(calm).is_some() {
                        info!(self.logger, "accepting connections again");
                    }
                    return (stream, address, permit);
                }
                Err(error) => self.back_off(&error).await,
            }
        }
    }

    /// Logs a failure if it is not the last one again, and waits. The usual failure is that the
    /// process has no descriptor left: trying again at once would spin, ending would be worse. When
    /// a connection ends meanwhile, the wait is cut short: that gave a descriptor back.
    async fn back_off(&mut self, error: &io::Error) {
        let failure = error.raw_os_error();
        let last = self.failure.replace((failure, Instant::now()));
        if last.is_none_or(|(last, _)| last != failure) {
            warn!(self.logger, "cannot accept connections, trying again"; "error" => %error);
        }
        let backoff = self.backoff;
        self.backoff = (backoff * 2).min(ACCEPT_BACKOFF_MAX);
        sleep(backoff).await;
    }
}

/// What serves one connection.
struct Connection<S> {
    service: S,
    tls: Option<Tls>,
    /// Where it comes from.
    address: SocketAddr,
    limits: Limits,
    stop_rx: watch::Receiver<()>,
    logger: Logger,
}

impl<S: HttpService> Connection<S> {
    async fn serve(mut self, stream: TcpStream) {
        if let Err(error) = stream.set_nodelay(true) {
            debug!(self.logger, "the connection ended before it began"; "error" => %error);
            return;
        }
        // Below TLS: what TLS keeps to be written later, a handshake's answers too, is watched.
        let stream = StallGuard::new(stream, self.limits.stall_timeout);
        let Some(tls) = self.tls.take() else {
            let service = self.service.clone();
            return self.serve_http(stream, service).await;
        };
        let Some(stream) = self.handshake(&tls, stream).await else { return };
        let certificates = stream.get_ref().1.peer_certificates();
        let certificate = certificates.and_then(|chain| chain.first()).map(|certificate| {
            PeerCertificate { certificate: Arc::new(certificate.clone()), address: self.address }
        });
        let service = WithCertificate { service: self.service.clone(), certificate };
        // Who was let in by files that are not in use any more has to show its certificate again.
        let mut changes = tls.changes();
        let (stop_tx, stop_rx) = watch::channel(());
        let mut told = std::mem::replace(&mut self.stop_rx, stop_rx);
        let until = async {
            tokio::select! {
                () = changes.changed() => {}
                _ = told.changed() => {}
            }
            drop(stop_tx);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = self.serve_http(stream, service) => {}
            () = until => {}
        }
    }

    /// Makes a TLS connection of it, if the other end may have one.
    async fn handshake(&mut self, tls: &Tls, stream: StallGuard) -> Option<TlsStream<StallGuard>> {
        let patience = self.limits.header_timeout.min(HANDSHAKE_TIMEOUT_MAX);
        let accept = timeout(patience, tls.acceptor().accept(stream).into_fallible());
        let accepted = tokio::select! {
            accepted = accept => accepted,
            _ = self.stop_rx.changed() => return None,
        };
        match accepted {
            Ok(Ok(stream)) => Some(stream),
            Ok(Err((error, stream))) => {
                match tls_error(&error) {
                    Some(error) => {
                        let why = format!("the TLS handshake failed: {error}");
                        tls.refuse(Reason::Handshake, self.address, kind(error), &why);
                    }
                    // It went away, as whoever only looks for open ports does.
                    None => debug!(self.logger, "a TLS handshake broke off"; "error" => %error),
                }
                linger(stream.stream).await;
                None
            }
            Err(_) => {
                debug!(self.logger, "a TLS handshake took too long");
                None
            }
        }
    }

    async fn serve_http<I>(mut self, stream: I, service: impl HttpService)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut connection = self.limits.protocol().serve_connection(TokioIo::new(stream), service);
        let ended = tokio::select! {
            ended = &mut connection => ended,
            _ = self.stop_rx.changed() => {
                Pin::new(&mut connection).graceful_shutdown();
                (&mut connection).await
            }
        };
        if let Err(error) = ended {
            debug!(self.logger, "a connection ended with an error"; "error" => %error);
        }
        linger(connection.into_parts().io.into_inner()).await;
    }
}

/// A service whose requests carry the certificate of the other end.
#[derive(Clone)]
struct WithCertificate<S> {
    service: S,
    certificate: Option<PeerCertificate>,
}

impl<S: HttpService> Service<Request<Incoming>> for WithCertificate<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        if let Some(certificate) = &self.certificate {
            request.extensions_mut().insert(certificate.clone());
        }
        self.service.call(request)
    }
}

/// Closes the sending side, then reads and forgets what the client still sends, for a moment.
///
/// An answer can come before its request has been read, 413 above all. Closing the socket with
/// unread bytes in it would reset the connection, and the client could lose the answer.
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

/// A stream whose writes fail once its client has taken nothing for a while.
struct StallGuard {
    stream: TcpStream,
    timeout: Duration,
    /// Runs while a write waits for the client.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl StallGuard {
    fn new(stream: TcpStream, timeout: Duration) -> Self {
        Self { stream, timeout, stalled: None }
    }

    fn watch<T>(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let timeout = self.timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(timeout)));
        ready!(stalled.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for StallGuard {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for StallGuard {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.watch(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Bounds the bytes of all request bodies that are in memory at once; clones share one bound.
///
/// A body takes its share as it arrives and gives it back when its [`BodyPermit`] is dropped. It
/// never waits for a share: two half-read bodies could wait for each other.
#[derive(Clone, Debug)]
pub struct BodyBudget(Arc<Semaphore>);

impl BodyBudget {
    /// The bound of a member: 64 MiB.
    pub const DEFAULT_BYTES: usize = 64 * 1024 * 1024;

    /// Makes a budget of `bytes`.
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes)))
    }

    /// The bytes that are not taken.
    pub fn available_bytes(&self) -> usize {
        self.0.available_permits()
    }
}

impl Default for BodyBudget {
    fn default() -> Self {
        Self::new(Self::DEFAULT_BYTES)
    }
}

/// The share of a [`BodyBudget`] that one body has taken. It is kept until its request is answered.
#[derive(Debug, Default)]
pub struct BodyPermit(Option<OwnedSemaphorePermit>);

impl BodyPermit {
    fn grow(&mut self, bytes: usize, budget: &BodyBudget) -> Result<(), BodyError> {
        let bytes = u32::try_from(bytes).map_err(|_| BodyError::Busy)?;
        let more = budget.0.clone().try_acquire_many_owned(bytes).map_err(|_| BodyError::Busy)?;
        match &mut self.0 {
            Some(permit) => permit.merge(more),
            none => *none = Some(more),
        }
        Ok(())
    }
}

/// Why a body was not read to its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// It is, or says that it is, longer than it may be: 413.
    #[error("the body is larger than {max_bytes} bytes")]
    TooLarge {
        /// The limit.
        max_bytes: usize,
    },
    /// The bodies of other requests fill the [`BodyBudget`]: 503.
    #[error("too many bytes of other requests are in flight")]
    Busy,
    /// It broke off, or its chunks are malformed: 400.
    #[error("{0}")]
    Broken(#[source] axum::Error),
    /// It had not arrived by its deadline: 408.
    #[error("the body did not arrive in time")]
    TimedOut,
}

/// Reads `body` to its end, or to its first error.
///
/// A body that announces more than `max_bytes` is refused before it is read. Memory is taken for
/// the bytes that came, never for those that were announced. A body that came in one piece is not
/// copied.
///
/// # Errors
/// See [`BodyError`]. What was read is dropped, and its share of `budget` given back.
pub async fn read_body(
    body: Body,
    max_bytes: usize,
    budget: &BodyBudget,
    deadline: Instant,
) -> Result<(Bytes, BodyPermit), BodyError> {
    if body.size_hint().lower() > max_bytes as u64 {
        return Err(BodyError::TooLarge { max_bytes });
    }
    timeout_at(deadline, collect(body, max_bytes, budget)).await.unwrap_or(Err(BodyError::TimedOut))
}

async fn collect(
    mut body: Body,
    max_bytes: usize,
    budget: &BodyBudget,
) -> Result<(Bytes, BodyPermit), BodyError> {
    let mut permit = BodyPermit::default();
    let mut first = Bytes::new();
    let mut all = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(BodyError::Broken)?.into_data() else {
            continue; // Trailers say nothing here.
        };
        if data.len() > max_bytes - first.len().max(all.len()) {
            return Err(BodyError::TooLarge { max_bytes });
        }
        permit.grow(data.len(), budget)?;
        if first.is_empty() && all.is_empty() {
            first = data;
            continue;
        }
        // From the second piece on they are copied together: each piece may keep a whole read
        // buffer in memory, and a body of one-byte chunks has very many.
        all.extend_from_slice(&std::mem::take(&mut first));
        all.extend_from_slice(&data);
    }
    let bytes = if all.is_empty() { first } else { all.freeze() };
    Ok((bytes, permit))
}

#[cfg(test)]
pub(crate) mod tests;
