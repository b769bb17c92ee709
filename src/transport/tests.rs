//! Two transports, or one and a server that misbehaves, over real sockets on ports of the system's
//! choice.

use std::future::Future;
use std::io::Read as _;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use slog::{Drain, o};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

mod stream;

use super::*;
use crate::channels::{GreetingAnswer, Pending, Refusal, responder};
use crate::codec;
use crate::membership::{MemberChange, Members, Own};
use crate::storage::failing::FailingVfs;
use crate::storage::wal::SnapshotId;

/// Half of it is the patience with a peer. Long enough for a loaded machine to answer in time.
const ELECTION_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a test waits for what has to come.
const DEADLINE: Duration = Duration::from_secs(20);

const CLUSTER_ID: u64 = 0xc1;

/// Members 1, 2 and 3 know each other with this incarnation.
const INCARNATION: u64 = 7;

/// The peer URL that member `id` names in its headers. Its port is another one, of the system's choice.
fn named_url(id: NodeId) -> String {
    format!("http://127.0.0.1:{id}")
}

fn three_members() -> Members {
    Members {
        urls: (1..=3).map(|id| (id, named_url(id))).collect(),
        incarnations: (1..=3).map(|id| (id, INCARNATION)).collect(),
        ..Members::default()
    }
}

/// Keeps the lines of a log.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Drain for Lines {
    type Ok = ();
    type Err = slog::Never;

    fn log(
        &self,
        record: &slog::Record<'_>,
        _: &slog::OwnedKVList,
    ) -> std::result::Result<(), slog::Never> {
        if record.level().is_at_least(slog::Level::Info) {
            self.0.lock().expect("lines").push(record.msg().to_string());
        }
        Ok(())
    }
}

impl Lines {
    fn count(&self, text: &str) -> usize {
        self.0.lock().expect("lines").iter().filter(|line| line.contains(text)).count()
    }
}

/// One member: a transport, and everything that the node would hold.
struct Member {
    transport: Transport,
    url: String,
    admission: Arc<Admission>,
    snapshotter: Snapshotter,
    vfs: Arc<FailingVfs>,
    dir: TempDir,
    inbound_rx: mpsc::Receiver<Inbound>,
    report_rx: mpsc::UnboundedReceiver<PeerReport>,
    log: Lines,
    /// Requests that reached the router.
    requests: Arc<AtomicUsize>,
}

/// A runtime that may be dropped inside another one.
struct OwnRuntime(Option<tokio::runtime::Runtime>);

impl OwnRuntime {
    fn alive_tasks(&self) -> usize {
        self.0.as_ref().expect("until it is dropped").metrics().num_alive_tasks()
    }
}

impl Drop for OwnRuntime {
    fn drop(&mut self) {
        self.0.take().expect("dropped once").shutdown_background();
    }
}

impl Member {
    async fn start(id: NodeId) -> Self {
        Self::start_with(id, 1_000, |_| {}).await
    }

    async fn start_with(
        id: NodeId,
        inbound: usize,
        configure: impl FnOnce(&mut TransportConfig),
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("address"));
        let own = Own { id, incarnation: INCARNATION, url: named_url(id), first_urls: Vec::new() };
        let admission = Arc::new(Admission::new(own, CLUSTER_ID, three_members()));
        let dir = tempfile::tempdir().expect("a directory");
        let vfs = FailingVfs::sound();
        let snapshotter = Snapshotter::new(vfs.clone(), dir.path()).expect("a directory");
        let (inbound_tx, inbound_rx) = mpsc::channel(inbound);
        let (report_tx, report_rx) = mpsc::unbounded_channel();
        let log = Lines::default();
        let mut config = TransportConfig::new(ELECTION_TIMEOUT, id * 1_000);
        configure(&mut config);
        let logger = Logger::root(log.clone().ignore_res(), o!());
        let runtime = Handle::current();
        let transport = Transport::new(
            config,
            admission.clone(),
            snapshotter.clone(),
            inbound_tx,
            report_tx,
            runtime,
            logger,
        )
        .expect("a transport");
        let requests = Arc::<AtomicUsize>::default();
        let counted = requests.clone();
        let count = axum::middleware::from_fn(
            move |request: axum::extract::Request, next: axum::middleware::Next| {
                counted.fetch_add(1, Ordering::SeqCst);
                next.run(request)
            },
        );
        let router = transport.router().layer(count);
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self {
            transport,
            url,
            admission,
            snapshotter,
            vfs,
            dir,
            inbound_rx,
            report_rx,
            log,
            requests,
        }
    }

    /// Gives this transport a runtime for its tasks alone, so that they can be counted.
    fn own_runtime(&mut self) -> OwnRuntime {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let runtime = runtime.expect("a runtime");
        self.transport.runtime = runtime.handle().clone();
        OwnRuntime(Some(runtime))
    }

    /// Binds member 1 to another directory.
    fn bind_member_1(&self) {
        let mut members = three_members();
        members.incarnations.insert(1, 8);
        self.admission.update(CLUSTER_ID, &members, Vec::new());
    }

    /// Applies the removal of member 1.
    fn remove_member_1(&self) -> Refusal {
        let mut members = three_members();
        members.apply(&MemberChange::Remove { id: 1 }, 5);
        self.admission.update(CLUSTER_ID, &members, Vec::new());
        Refusal::Removed { id: 1, index: 5 }
    }

    /// Makes member 1 a sender that is no member, so that the node decides.
    fn forget_member_1(&self) {
        let mut members = three_members();
        members.urls.remove(&1);
        members.incarnations.remove(&1);
        self.admission.update(CLUSTER_ID, &members, Vec::new());
    }

    /// Ends the transport and waits for its tasks.
    async fn close(self) {
        let ended = self.transport.ended();
        drop(self.transport);
        within(ended).await;
    }

    /// The file of the snapshot at index 9.
    fn snapshot_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let (_, mut reader) = self.snapshotter.open_raw(9, 1).expect("it is there");
        reader.read_to_end(&mut bytes).expect("it can be read");
        bytes
    }

    /// How many snapshots are being received.
    fn unfinished_files(&self) -> usize {
        let entries = std::fs::read_dir(self.dir.path()).expect("a directory");
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        names.filter(|name| name.to_string_lossy().ends_with(".tmp")).count()
    }

    async fn inbound(&mut self) -> Inbound {
        within(self.inbound_rx.recv()).await.expect("something arrives")
    }

    /// The messages of the next batch.
    async fn messages(&mut self) -> Vec<Message> {
        match self.inbound().await.body {
            InboundBody::Messages { messages, .. } => messages,
            other => panic!("{other:?}"),
        }
    }

    async fn report(&mut self) -> PeerReport {
        within(self.report_rx.recv()).await.expect("a report")
    }

    async fn unreachable(&mut self, id: NodeId) {
        match self.report().await {
            PeerReport::Unreachable(reported) => assert_eq!(reported, id),
            other => panic!("{other:?}"),
        }
    }

    /// The next report on a snapshot: whether it arrived.
    async fn snapshot_arrived(&mut self) -> bool {
        match self.report().await {
            PeerReport::SnapshotStatus { to: 2, index: 9, arrived, .. } => arrived,
            other => panic!("{other:?}"),
        }
    }

    /// Makes the snapshot at index 9 of the state `bytes`.
    fn make_snapshot(&self, bytes: &[u8]) -> SnapshotFile {
        let id = SnapshotId { index: 9, term: 1 };
        self.snapshotter.create(id, b"meta", |out| out.write_all(bytes)).expect("made")
    }

    /// Sends the snapshot at index 9 of the state `bytes` to member 2.
    fn send_snapshot(&mut self, bytes: Vec<u8>) {
        let file = self.make_snapshot(&bytes);
        self.transport.send_snapshot(snapshot_message(), file);
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("within the deadline")
}

async fn eventually(why: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < DEADLINE, "never: {why}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn heartbeat(to: NodeId, commit: u64) -> Message {
    let msg_type = MessageType::MsgHeartbeat;
    Message { msg_type, to, from: 1, term: 1, commit, ..Default::default() }
}

fn snapshot_message() -> Message {
    let msg_type = MessageType::MsgSnapshot;
    let mut message = Message { msg_type, to: 2, from: 1, term: 1, ..Default::default() };
    let metadata = message.mut_snapshot().mut_metadata();
    metadata.index = 9;
    metadata.term = 1;
    message
}

/// Several mebibytes that are not all alike.
fn several_mebibytes() -> Vec<u8> {
    (0..5_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Reads one request, head and body; `None` if the connection ended first.
async fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).expect("a head in ASCII");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().expect("a length"))];
    stream.read_exact(&mut body).await.ok()?;
    Some(head)
}

/// A server that does `with_each` of its connections; returns its URL.
async fn server<F>(mut with_each: impl FnMut(TcpStream) -> F + Send + 'static) -> String
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("address"));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(with_each(stream));
        }
    });
    url
}

/// A URL that nobody listens at.
async fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    format!("http://{}", listener.local_addr().expect("address"))
}

/// Sends `request` as it is and returns the answer's status, headers and text.
async fn raw(url: &str, request: &[u8]) -> (u16, String) {
    let mut stream = TcpStream::connect(url.trim_start_matches("http://")).await.expect("connect");
    stream.write_all(request).await.expect("write");
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while !answer.windows(4).any(|window| window == b"\r\n\r\n") {
        let read = within(stream.read(&mut buffer)).await.expect("read");
        assert_ne!(read, 0, "the connection ended without an answer");
        answer.extend_from_slice(&buffer[..read]);
    }
    let answer = String::from_utf8(answer).expect("text");
    (answer[9..12].parse().expect("a status"), answer)
}

/// The headers of a request from member 1 to member 2.
const HEADERS: &str = "host: x\r\nraft-protocol: 4\r\nraft-cluster-id: 00000000000000c1\r\n\
    raft-from: 1\r\nraft-incarnation: 0000000000000007\r\nraft-from-url: http://127.0.0.1:1\r\n\
    raft-to: 2\r\nraft-to-incarnation: 0000000000000007\r\n\
    raft-boot: 0000000000000001\r\nraft-number: 1\r\n";

fn post(path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!("POST {path} HTTP/1.1\r\n{headers}content-length: {length}\r\n\r\n");
    [head.as_bytes(), body].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_arrive_in_order_and_many_in_one_request() {
    let mut one = Member::start(1).await;
    let mut two = Member::start(2).await;
    one.transport.add_peer(2, &two.url, INCARNATION);
    for commit in 0..4_000 {
        one.transport.send(heartbeat(2, commit));
    }
    let mut arrived = Vec::new();
    let mut last_number = 0;
    while arrived.len() < 4_000 {
        let inbound = two.inbound().await;
        assert_eq!(inbound.header, one.admission.header(2, INCARNATION));
        let InboundBody::Messages { boot, number, messages, answer } = inbound.body else {
            panic!("only messages were sent");
        };
        assert_eq!(boot, 1_000);
        assert!(number > last_number, "{number} after {last_number}");
        last_number = number;
        assert!(answer.is_none(), "admitted");
        arrived.extend(messages.into_iter().map(|message| message.commit));
    }
    assert_eq!(arrived, (0..4_000).collect::<Vec<_>>());
    assert!(two.requests.load(Ordering::SeqCst) < 400, "{:?} requests", two.requests);
    eventually("active", || one.log.count("peer 2 became active") == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_messages_travel_alone_batches_stay_below_a_mebibyte() {
    let mut one = Member::start(1).await;
    let mut two = Member::start(2).await;
    one.transport.add_peer(2, &two.url, INCARNATION);
    for length in [3 << 20, 700 << 10, 700 << 10, 10] {
        let mut message = heartbeat(2, 0);
        message.context = vec![1; length].into();
        one.transport.send(message);
    }
    let mut lengths = Vec::new();
    while lengths.iter().sum::<usize>() < (3 << 20) + 2 * (700 << 10) + 10 {
        let batch = two.messages().await;
        let bytes = batch.iter().map(wire::framed_length).sum::<usize>();
        assert!(batch.len() == 1 || bytes <= 1 << 20, "{bytes} bytes in {} messages", batch.len());
        lengths.extend(batch.iter().map(|message| message.context.len()));
    }
    assert_eq!(lengths, [3 << 20, 700 << 10, 700 << 10, 10]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_drops_and_reports_unreachable_once() {
    let mut one = Member::start(1).await;
    let (begun_tx, mut begun_rx) = mpsc::unbounded_channel();
    let silent = server(move |mut stream| {
        let begun_tx = begun_tx.clone();
        async move {
            while read_request(&mut stream).await.is_some() {
                let _ = begun_tx.send(());
            }
        }
    });
    one.transport.add_peer(2, &silent.await, INCARNATION);
    // From its first request on, the peer's task takes nothing out of the queue.
    one.transport.send(heartbeat(2, 0));
    within(begun_rx.recv()).await;
    for commit in 0..3 * PEER_QUEUE_MESSAGES as u64 {
        one.transport.send(heartbeat(2, commit));
    }
    one.unreachable(2).await;
    assert!(one.report_rx.try_recv().is_err(), "one report is enough");
    one.transport.send(heartbeat(77, 0));
    assert!(one.report_rx.try_recv().is_err(), "an unknown peer is nobody's failure");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_down_is_reported_logged_once_and_found_again() {
    let mut one = Member::start(1).await;
    let url = nobody().await;
    one.transport.add_peer(2, &url, INCARNATION);
    for _ in 0..5 {
        one.transport.send(heartbeat(2, 0));
        one.unreachable(2).await;
    }
    assert_eq!(one.log.count("peer 2 became inactive (message send to peer failed): "), 1);

    let two = Member::start(2).await;
    let listener = TcpListener::bind(&url["http://".len()..]).await.expect("it is free again");
    let router = two.transport.router();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let begun = Instant::now();
    let log = one.log.clone();
    eventually("active again", || {
        one.transport.send(heartbeat(2, 0));
        log.count("peer 2 became active") == 1
    })
    .await;
    assert!(begun.elapsed() < ELECTION_TIMEOUT, "{:?}", begun.elapsed());
}

/// It was stopped to get that release, so it was inactive before.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_returns_with_another_release_is_named_once() {
    let mut one = Member::start(1).await;
    let url = nobody().await;
    one.transport.add_peer(2, &url, INCARNATION);
    one.transport.send(heartbeat(2, 0));
    one.unreachable(2).await;
    assert_eq!(one.log.count("peer 2 became inactive"), 1);

    let listener = TcpListener::bind(&url["http://".len()..]).await.expect("it is free again");
    let other = axum::Router::new().fallback(async || ([("raft-protocol", "999")], ""));
    tokio::spawn(async move { axum::serve(listener, other).await });
    let log = one.log.clone();
    let named = "peer 2 stays inactive: this member has version";
    eventually("the release is named", || {
        one.transport.send(heartbeat(2, 0));
        log.count(named) == 1
    })
    .await;
    for _ in 0..5 {
        one.transport.send(heartbeat(2, 0));
        one.unreachable(2).await;
    }
    assert_eq!((log.count(named), log.count("the other one version 999")), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_without_an_answer_is_closed_in_time() {
    let mut one = Member::start(1).await;
    let (closed_tx, mut closed_rx) = mpsc::unbounded_channel();
    let url = server(move |mut stream| {
        let closed_tx = closed_tx.clone();
        async move {
            read_request(&mut stream).await.expect("a request");
            let begun = Instant::now();
            let again = read_request(&mut stream).await;
            let _ = closed_tx.send((again, begun.elapsed()));
        }
    })
    .await;
    one.transport.add_peer(2, &url, INCARNATION);
    one.transport.send(heartbeat(2, 0));
    one.unreachable(2).await;
    one.transport.send(heartbeat(2, 0));
    let (again, elapsed) = within(closed_rx.recv()).await.expect("closed");
    assert_eq!(again, None, "the connection was used again");
    assert!(elapsed > ELECTION_TIMEOUT / 4, "{elapsed:?}");
    assert!(elapsed < ELECTION_TIMEOUT, "{elapsed:?}");
}

/// The peer does not even read: what hyper took of the request must not stay in memory for as long
/// as the peer is paused.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_takes_no_bytes_is_given_up_too() {
    let mut one = Member::start(1).await;
    let runtime = one.own_runtime();
    let url = server(|stream| async move {
        std::future::pending::<()>().await;
        drop(stream);
    });
    one.transport.add_peer(2, &url.await, INCARNATION);
    let mut message = heartbeat(2, 0);
    message.context = vec![1; 20 << 20].into();
    one.transport.send(message);
    one.unreachable(2).await;
    eventually("only the peer's task is left", || runtime.alive_tasks() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_never_sent_again() {
    let mut one = Member::start(1).await;
    let requests = Arc::<AtomicUsize>::default();
    let counted = requests.clone();
    // Answers the first request of each connection, so that the second one finds it in the pool; it
    // reads that one, and closes.
    let identity =
        HEADERS.replace("raft-from: 1", "raft-from: 2").replace("raft-to: 2", "raft-to: 1");
    let answer = format!("HTTP/1.1 204 No Content\r\n{}\r\n", identity);
    let url = server(move |mut stream| {
        let (counted, answer) = (counted.clone(), answer.clone());
        async move {
            for answered in [true, false] {
                if read_request(&mut stream).await.is_none() {
                    return;
                }
                counted.fetch_add(1, Ordering::SeqCst);
                if answered {
                    stream.write_all(answer.as_bytes()).await.expect("write");
                }
            }
        }
    })
    .await;
    one.transport.add_peer(2, &url, INCARNATION);
    for round in 0..20 {
        one.transport.send(heartbeat(2, 0));
        eventually("the first", || requests.load(Ordering::SeqCst) == 2 * round + 1).await;
        eventually("active", || one.log.count("became active") == round + 1).await;
        one.transport.send(heartbeat(2, 0));
        one.unreachable(2).await;
        assert_eq!(requests.load(Ordering::SeqCst), 2 * round + 2, "a batch came twice");
    }
}

fn proposal(to: NodeId, data: &'static [u8]) -> Message {
    let mut message = Message { to, from: 1, ..Message::default() };
    message.set_msg_type(MessageType::MsgPropose);
    let entry = raft::eraftpb::Entry { data: data.into(), ..Default::default() };
    message.entries = vec![entry].into();
    message
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_proposal_that_never_left_is_given_back() {
    let mut one = Member::start(1).await;
    let nobody = nobody().await;
    one.transport.add_peer(2, &nobody, INCARNATION);
    one.transport.send(proposal(2, b"never left"));
    match one.report().await {
        PeerReport::NotProposed { to: 2, requests } => assert_eq!(requests[0].1, b"never left"[..]),
        other => panic!("{other:?}"),
    }
    one.unreachable(2).await;
    one.transport.send(proposal(9, b"to nobody known"));
    match one.report().await {
        PeerReport::NotProposed { to: 9, requests } => assert_eq!(requests.len(), 1),
        other => panic!("{other:?}"),
    }

    let url = server(|mut stream| async move {
        read_request(&mut stream).await.expect("a request");
    })
    .await;
    one.transport.add_peer(3, &url, INCARNATION);
    one.transport.send(proposal(3, b"may have arrived"));
    match one.report().await {
        PeerReport::ProposalsLost { ids } => assert_eq!(ids.len(), 1),
        other => panic!("{other:?}"),
    }
    one.unreachable(3).await;

    // No certificate vouches for such an answer.
    let url = server(|mut stream| async move {
        read_request(&mut stream).await.expect("a request");
        let answer = b"HTTP/1.1 400 Bad Request\r\nraft-protocol: 999\r\ncontent-length: 0\r\n\r\n";
        let _ = stream.write_all(answer).await;
    })
    .await;
    one.transport.add_peer(4, &url, INCARNATION);
    one.transport.send(proposal(4, b"answered by another release"));
    match one.report().await {
        PeerReport::ProposalsLost { ids } => assert_eq!(ids.len(), 1),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_is_not_followed() {
    let mut one = Member::start(1).await;
    let mut two = Member::start(2).await;
    let location = format!("{}/raft", two.url);
    let url = server(move |mut stream| {
        let answer = format!(
            "HTTP/1.1 307 Temporary Redirect\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n"
        );
        async move {
            read_request(&mut stream).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    })
    .await;
    one.transport.add_peer(2, &url, INCARNATION);
    one.transport.send(heartbeat(2, 0));
    one.unreachable(2).await;
    assert_eq!(one.log.count("307"), 1);
    assert!(two.inbound_rx.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_from_another_member_or_cluster_is_an_error() {
    for (id, cluster_id) in [(3, CLUSTER_ID), (2, 0xc2)] {
        let mut one = Member::start(1).await;
        let identity = HEADERS
            .replace("raft-from: 1", &format!("raft-from: {id}"))
            .replace("raft-to: 2", "raft-to: 1")
            .replace("00000000000000c1", &format!("{cluster_id:016x}"));
        let url = server(move |mut stream| {
            let answer = format!("HTTP/1.1 204 No Content\r\n{identity}\r\n");
            async move {
                while read_request(&mut stream).await.is_some() {
                    let _ = stream.write_all(answer.as_bytes()).await;
                }
            }
        })
        .await;
        one.transport.add_peer(2, &url, INCARNATION);
        for _ in 0..3 {
            one.transport.send(heartbeat(2, 0));
            one.unreachable(2).await;
        }
        let named = format!("member {id} of cluster {cluster_id:016x} answered member 1");
        assert_eq!(one.log.count(&named), 1, "{:?}", one.log.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_answered_400_and_nothing_is_delivered() {
    let mut two = Member::start(2).await;
    let mut batch = Vec::new();
    wire::put_message(&mut batch, &heartbeat(2, 1));
    for body in
        [&b""[..], b"x", &[0xff; 64], &batch[..batch.len() - 1], &[&batch[..], b"x"].concat()]
    {
        assert_eq!(raw(&two.url, &post("/raft", HEADERS, body)).await.0, 400, "{body:?}");
    }
    for name in ["protocol: 4", "cluster-id: 0", "from: 1", "incarnation: 0", "to: 2", "number: 1"]
    {
        let headers = HEADERS.replace(&format!("raft-{name}"), "x: y");
        assert_eq!(raw(&two.url, &post("/raft", &headers, &batch)).await.0, 400, "{name}");
    }
    let open = HEADERS.replace("raft-to: 2", "raft-to: 0");
    assert_eq!(raw(&two.url, &post("/raft", &open, &batch)).await.0, 400, "receiver 0");
    for path in ["/raft/greeting", "/raft/members"] {
        assert_eq!(raw(&two.url, &post(path, HEADERS, &[0xff; 64])).await.0, 400, "{path}");
    }
    let headers =
        format!("{HEADERS}raft-snapshot-length: 0\r\nraft-snapshot-checksum: 00000000\r\n");
    for body in [&batch[..], b"x", &[0xff; 64]] {
        let answer = raw(&two.url, &post("/raft/snapshot", &headers, body)).await;
        assert_eq!(answer.0, 400, "{body:?}");
    }
    assert_eq!(raw(&two.url, &post("/", HEADERS, b"")).await.0, 404);
    let get = b"GET /raft HTTP/1.1\r\nhost: x\r\n\r\n";
    assert_eq!(raw(&two.url, get).await.0, 404);
    assert!(two.inbound_rx.try_recv().is_err(), "nothing was delivered");
    assert_eq!(raw(&two.url, &post("/raft", HEADERS, &batch)).await.0, 204, "the control");
    assert_eq!(two.messages().await, [heartbeat(2, 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn oversized_bodies_are_413_and_bodies_without_a_length_411() {
    let mut two = Member::start(2).await;
    let announce = |path: &str, length: u64| {
        format!("POST {path} HTTP/1.1\r\n{HEADERS}content-length: {length}\r\n\r\n").into_bytes()
    };
    assert_eq!(raw(&two.url, &announce("/raft", PEER_BODY_BYTES + 1)).await.0, 413);
    assert_eq!(raw(&two.url, &announce("/raft/greeting", 65_537)).await.0, 413);
    assert_eq!(raw(&two.url, &announce("/raft/members", 65_537)).await.0, 413);
    let chunked =
        format!("POST /raft HTTP/1.1\r\n{HEADERS}transfer-encoding: chunked\r\n\r\n0\r\n\r\n");
    assert_eq!(raw(&two.url, chunked.as_bytes()).await.0, 411);
    assert!(two.inbound_rx.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_in_flight_are_bounded_and_slow_ones_end() {
    let quick = |config: &mut TransportConfig| config.body_timeout = Duration::from_millis(300);
    let two = Member::start_with(2, 1_000, quick).await;
    let address = two.url.trim_start_matches("http://");
    let announce = format!("POST /raft HTTP/1.1\r\n{HEADERS}content-length: {}\r\n\r\n", 1 << 20);
    let mut slow = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(address).await.expect("connect");
        stream.write_all(announce.as_bytes()).await.expect("write");
        slow.push(stream);
    }
    let bytes = two.transport.shared.body_bytes.clone();
    let mut batch = Vec::new();
    wire::put_message(&mut batch, &heartbeat(2, 1));
    // What is announced takes no room from others.
    assert_eq!(raw(&two.url, &post("/raft", HEADERS, &batch)).await.0, 204);
    let all = bytes.clone().acquire_many_owned(bytes.available_permits() as u32).await;
    assert_eq!(raw(&two.url, &post("/raft", HEADERS, &batch)).await.0, 503);
    drop(all);
    for mut stream in slow {
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.expect("an answer");
        assert_eq!(&answer, b"HTTP/1.1 408");
    }
    // One byte and then no more.
    let short = format!("POST /raft HTTP/1.1\r\n{HEADERS}content-length: 100\r\n\r\nx");
    assert_eq!(raw(&two.url, short.as_bytes()).await.0, 408);
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_count_until_the_node_has_taken_the_messages() {
    let mut two = Member::start_with(2, 1, |_| {}).await;
    let mut batch = Vec::new();
    wire::put_message(&mut batch, &heartbeat(2, 1));
    let bytes = two.transport.shared.body_bytes.clone();
    assert_eq!(raw(&two.url, &post("/raft", HEADERS, &batch)).await.0, 204);
    assert_eq!(bytes.available_permits() as u64, PEER_BODIES_BYTES - batch.len() as u64);
    let full = raw(&two.url, &post("/raft", HEADERS, &batch)).await;
    assert_eq!(full.0, 503, "the node's channel is full");
    assert!(full.1.contains("raft-refusal: not-ready"));
    drop(two.inbound().await);
    assert_eq!(bytes.available_permits() as u64, PEER_BODIES_BYTES);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_comes_before_the_body_and_reaches_the_senders_node() {
    let refuse: [fn(&Member); 3] = [
        |two| two.admission.update(0xc2, &three_members(), Vec::new()),
        |two| two.bind_member_1(),
        |two| drop(two.remove_member_1()),
    ];
    for (refuse, status) in refuse.into_iter().zip([412, 412, 410]) {
        let mut one = Member::start(1).await;
        let mut two = Member::start(2).await;
        refuse(&two);
        let refusal = two.admission.admit(&one.admission.header(2, 0)).expect_err("refused");
        one.transport.add_peer(2, &two.url, INCARNATION);
        one.transport.send(heartbeat(2, 0));
        match one.report().await {
            PeerReport::Refused { header, refusal: reported } => {
                assert_eq!(header, two.admission.header(1, 0));
                assert_eq!(reported, refusal);
            }
            other => panic!("{other:?}"),
        }
        one.unreachable(2).await;
        // The body never comes, and the answer does not wait for it.
        let head = format!("POST /raft HTTP/1.1\r\n{HEADERS}content-length: 1000\r\n\r\n");
        let (answered, text) = raw(&two.url, head.as_bytes()).await;
        assert_eq!(answered, status);
        assert!(text.contains("raft-from: 2\r\n") && text.contains("raft-to: 1\r\n"), "{text}");
        assert!(two.inbound_rx.try_recv().is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_decides_about_a_sender_that_is_no_member() {
    let mut one = Member::start(1).await;
    let mut two = Member::start(2).await;
    two.forget_member_1();
    one.transport.add_peer(2, &two.url, INCARNATION);
    for verdict in [Ok(()), Err(Refusal::Removed { id: 1, index: 5 })] {
        one.transport.send(heartbeat(2, 0));
        let InboundBody::Messages { answer: Some(answer), .. } = two.inbound().await.body else {
            panic!("the node is asked");
        };
        answer.send(verdict).expect("the handler waits");
        eventually("active", || one.log.count("became active") == 1).await;
    }
    assert!(matches!(one.report().await, PeerReport::Refused { .. }));
    one.unreachable(2).await;
    // A node that does not answer in time is busy, which is no refusal of the sender.
    one.transport.send(heartbeat(2, 0));
    let unanswered = two.inbound().await;
    one.unreachable(2).await;
    drop(unanswered);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_streams_and_arrives_intact() {
    let mut one = Member::start(1).await;
    let mut two = Member::start(2).await;
    one.transport.add_peer(2, &two.url, INCARNATION);
    one.send_snapshot(several_mebibytes());
    let inbound = two.inbound().await;
    assert_eq!(two.snapshot_bytes(), one.snapshot_bytes(), "before the node");
    // Messages pass while the snapshot is not answered.
    one.transport.send(heartbeat(2, 3));
    assert_eq!(two.messages().await, [heartbeat(2, 3)]);
    let InboundBody::Snapshot { boot: 1_000, message, answer, .. } = inbound.body else {
        panic!("a snapshot was sent");
    };
    assert_eq!(message, snapshot_message());
    // One at a time.
    one.send_snapshot(several_mebibytes());
    assert!(!one.snapshot_arrived().await, "the second one is not begun");
    answer.send(Ok(())).expect("the handler waits");
    assert!(one.snapshot_arrived().await);
    one.send_snapshot(several_mebibytes());
    let InboundBody::Snapshot { answer, .. } = two.inbound().await.body else {
        panic!("a snapshot was sent");
    };
    answer.send(Err(Refusal::NotReady("later".to_owned()))).expect("the handler waits");
    assert!(!one.snapshot_arrived().await, "the node did not take it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_not_what_it_should_be_is_not_delivered() {
    let mut one = Member::start(1).await;
    let mut two = Member::start(2).await;
    one.transport.add_peer(2, &two.url, INCARNATION);
    let length = one.make_snapshot(&several_mebibytes()).length;
    one.transport.send_snapshot(snapshot_message(), SnapshotFile { length, checksum: 1 });
    assert!(!one.snapshot_arrived().await, "the checksum is wrong");
    let file = SnapshotFile { length: length + 1, checksum: 1 };
    one.transport.send_snapshot(snapshot_message(), file);
    assert!(!one.snapshot_arrived().await, "the file is shorter");
    one.transport.remove_peer(2);
    one.transport.send_snapshot(snapshot_message(), file);
    assert!(!one.snapshot_arrived().await, "the peer is unknown");
    eventually("no file is left open", || two.unfinished_files() == 0).await;
    assert!(two.inbound_rx.try_recv().is_err());
    assert!(two.report_rx.try_recv().is_err(), "its own disk is in order");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_fails_if_the_receiver_dies_half_way() {
    let mut one = Member::start(1).await;
    let url = server(|mut stream| async move {
        let mut half = vec![0; 2 << 20];
        let _ = stream.read_exact(&mut half).await;
    });
    one.transport.add_peer(2, &url.await, INCARNATION);
    one.send_snapshot(several_mebibytes());
    assert!(!one.snapshot_arrived().await);
    // And the next one may begin.
    one.send_snapshot(several_mebibytes());
    assert!(!one.snapshot_arrived().await);
    assert_eq!(one.log.count("sending snapshot at index 9 to peer 2"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_fails_if_the_receiver_stalls_or_never_answers() {
    for (reads, why) in [(1 << 20, "no progress for"), (usize::MAX, "after the last byte")] {
        let mut one = Member::start_with(1, 10, |config| {
            config.snapshot_progress_timeout = Duration::from_millis(300);
        })
        .await;
        let url = server(move |mut stream| async move {
            let mut buffer = vec![0; 64 << 10];
            let mut read = 0;
            while read < reads {
                match stream.read(&mut buffer).await {
                    Ok(0) | Err(_) => return,
                    Ok(length) => read += length,
                }
            }
            std::future::pending::<()>().await;
        });
        one.transport.add_peer(2, &url.await, INCARNATION);
        // Larger than what the two sockets hold.
        one.send_snapshot(several_mebibytes().repeat(8));
        assert!(!one.snapshot_arrived().await);
        assert_eq!(one.log.count(why), 1, "{:?}", one.log.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_stops_coming_frees_its_place() {
    let two = Member::start_with(2, 10, |config| {
        config.snapshot_progress_timeout = Duration::from_millis(300);
    })
    .await;
    let mut head = Vec::new();
    wire::put_message(&mut head, &snapshot_message());
    let length = head.len() + 1_000;
    let headers =
        format!("{HEADERS}raft-snapshot-length: 1000\r\nraft-snapshot-checksum: 00000000\r\n");
    let request =
        format!("POST /raft/snapshot HTTP/1.1\r\n{headers}content-length: {length}\r\n\r\n");
    let begun = [request.as_bytes(), &head, &[0; 500]].concat();
    let mut stream =
        TcpStream::connect(two.url.trim_start_matches("http://")).await.expect("connect");
    stream.write_all(&begun).await.expect("write");
    eventually("begun", || two.unfinished_files() == 1).await;
    assert_eq!(raw(&two.url, &begun).await.0, 503, "one per sender");
    eventually("given up", || two.unfinished_files() == 0).await;
    assert_eq!(raw(&two.url, &begun).await.0, 408, "its place is free");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_disk_reaches_the_receivers_node() {
    let mut one = Member::start(1).await;
    let mut two = Member::start(2).await;
    two.vfs.fail_after(1);
    one.transport.add_peer(2, &two.url, INCARNATION);
    one.send_snapshot(several_mebibytes());
    assert!(!one.snapshot_arrived().await);
    assert!(matches!(two.report().await, PeerReport::DiskFailed(_)));
    assert!(two.inbound_rx.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn greetings_are_answered_refused_or_not_answered() {
    let mut one = Member::start(1).await;
    let mut two = Member::start(2).await;
    let greeting = Greeting { first_urls: vec!["http://a".to_owned()], begun: true };
    let answer =
        GreetingAnswer { begun: true, counts_as_member: true, acknowledged: None, leader: None };
    one.transport.greet(&two.url, greeting.clone());
    let inbound = two.inbound().await;
    assert_eq!(inbound.header.to, 0, "whoever listens there");
    let InboundBody::Greeting(arrived, answer_tx) = inbound.body else {
        panic!("a greeting was sent");
    };
    assert_eq!(arrived, greeting);
    answer_tx.send(Ok(answer.clone())).expect("the handler waits");
    match one.report().await {
        PeerReport::Greeted { url, header, answer: reported } => {
            assert_eq!(url, two.url);
            assert_eq!(header, two.admission.header(1, 0));
            assert_eq!(reported, answer);
        }
        other => panic!("{other:?}"),
    }
    one.transport.greet(&two.url, greeting.clone());
    let InboundBody::Greeting(_, answer) = two.inbound().await.body else {
        panic!("a greeting was sent");
    };
    answer.send(Err(Refusal::OtherIncarnation("8".to_owned()))).expect("the handler waits");
    assert!(matches!(one.report().await, PeerReport::Refused { .. }));
    let nobody = nobody().await;
    one.transport.greet(&nobody, greeting);
    assert!(matches!(one.report().await, PeerReport::NotGreeted { url, .. } if url == nobody));
}

/// A member that waits to begin logs what `NotGreeted` says; a refusal of that kind is final for none.
#[tokio::test(flavor = "multi_thread")]
async fn a_greeting_to_another_cluster_is_reported_with_the_reason() {
    let mut one = Member::start(1).await;
    let mut two = Member::start(2).await;
    let greeting = Greeting { first_urls: Vec::new(), begun: true };
    one.transport.greet(&two.url, greeting.clone());
    let InboundBody::Greeting(_, answer) = two.inbound().await.body else {
        panic!("a greeting was sent");
    };
    let mismatch = Refusal::Mismatch("this is cluster 00000000000000c2".to_owned());
    answer.send(Err(mismatch)).expect("the handler waits");
    match one.report().await {
        PeerReport::NotGreeted { url, why } => {
            assert_eq!(url, two.url);
            assert!(why.contains("cluster 00000000000000c2"), "{why}");
        }
        other => panic!("{other:?}"),
    }
    // The other refusals are the node's to judge, with the header of who answered.
    let refuse: [fn(&Member); 2] = [|two| drop(two.remove_member_1()), |two| two.bind_member_1()];
    for refuse in refuse {
        two.admission.update(CLUSTER_ID, &three_members(), Vec::new());
        refuse(&two);
        let refusal = two.admission.admit(&one.admission.header(2, 0)).expect_err("refused");
        one.transport.greet(&two.url, greeting.clone());
        match one.report().await {
            PeerReport::Refused { header, refusal: reported } => {
                assert_eq!(header, two.admission.header(1, 0));
                assert_eq!(reported, refusal);
            }
            other => panic!("{refusal:?}: {other:?}"),
        }
    }
    assert!(two.inbound_rx.try_recv().is_err(), "none of them reached the node");
}

/// Forwards a change from `one` to member 2.
fn forward_change(one: &mut Member) -> Pending<()> {
    let (responder, pending) = responder();
    one.transport.forward_change(2, MemberRequest::Remove { id: 3 }, responder);
    pending
}

async fn outcome(pending: Pending<()>) -> std::result::Result<(), RequestError> {
    pending.wait_until(tokio::time::Instant::now() + DEADLINE).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_forwarded_and_answered_as_the_leader_does() {
    let mut one = Member::start(1).await;
    let mut two = Member::start(2).await;
    let pending = forward_change(&mut one);
    assert!(matches!(outcome(pending).await, Err(RequestError::Unavailable(_))), "unknown peer");
    one.transport.add_peer(2, &two.url, INCARNATION);
    for answer in [Ok(()), Err(RequestError::Conflict("remove member 3 first".to_owned()))] {
        let pending = forward_change(&mut one);
        let InboundBody::ConfChange(change, responder) = two.inbound().await.body else {
            panic!("a change was forwarded");
        };
        assert_eq!(change, MemberRequest::Remove { id: 3 });
        responder.answer(answer.clone());
        assert_eq!(outcome(pending).await, answer);
    }
    two.remove_member_1();
    let pending = forward_change(&mut one);
    assert!(matches!(outcome(pending).await, Err(RequestError::Unavailable(_))), "refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forwarded_change_is_unknown_only_if_it_may_have_arrived() {
    let mut one = Member::start(1).await;
    let requests = Arc::<AtomicUsize>::default();
    let counted = requests.clone();
    let url = server(move |mut stream| {
        let counted = counted.clone();
        async move {
            if read_request(&mut stream).await.is_some() {
                counted.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    one.transport.add_peer(2, &url.await, INCARNATION);
    let pending = forward_change(&mut one);
    assert!(matches!(outcome(pending).await, Err(RequestError::Unknown(_))));
    assert_eq!(requests.load(Ordering::SeqCst), 1, "once");
    one.transport.add_peer(2, &nobody().await, INCARNATION);
    let pending = forward_change(&mut one);
    assert!(matches!(outcome(pending).await, Err(RequestError::Unavailable(_))));
}

/// A client of a follower sends changes faster than the leader makes them.
#[tokio::test(flavor = "multi_thread")]
async fn further_changes_wait_without_a_connection_and_expire() {
    let mut one = Member::start(1).await;
    let connections = Arc::<AtomicUsize>::default();
    let counted = connections.clone();
    let url = server(move |mut stream| {
        counted.fetch_add(1, Ordering::SeqCst);
        async move {
            // Holds the connection open until it is closed from the other side.
            while read_request(&mut stream).await.is_some() {}
        }
    });
    one.transport.add_peer(2, &url.await, INCARNATION);
    let pending: Vec<_> = (0..100).map(|_| forward_change(&mut one)).collect();
    let all = || connections.load(Ordering::SeqCst) == CHANGES_FORWARDED_AT_ONCE;
    eventually("the first ones are on their way", all).await;
    let until = tokio::time::Instant::now() + Duration::from_millis(300);
    let (mut sent, mut expired) = (0, 0);
    for pending in pending {
        match pending.wait_until(until).await {
            Err(RequestError::Unknown(_)) => sent += 1,
            Err(RequestError::Unavailable(_)) => expired += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((sent, expired), (CHANGES_FORWARDED_AT_ONCE, 100 - CHANGES_FORWARDED_AT_ONCE));
    assert_eq!(connections.load(Ordering::SeqCst), CHANGES_FORWARDED_AT_ONCE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_peers_queue_is_drained() {
    let mut one = Member::start(1).await;
    let mut two = Member::start(2).await;
    // These tasks run until the transport closes.
    let without_peers = one.transport.shared.running.receiver_count();
    one.transport.add_peer(2, &two.url, INCARNATION);
    for commit in 0..1_000 {
        one.transport.send(heartbeat(2, commit));
    }
    one.transport.remove_peer(2);
    one.transport.send(heartbeat(2, 1_000));
    let mut arrived = Vec::new();
    while arrived.len() < 1_000 {
        arrived.extend(two.messages().await);
    }
    assert_eq!(arrived.last().map(|message| message.commit), Some(999));
    let running = &one.transport.shared.running;
    eventually("the peer's task ended", || running.receiver_count() == without_peers).await;
}

/// Otherwise the page of another member would show it alive, with its last status for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_hangs_has_no_status() {
    let metrics = Metrics::default();
    let (status_tx, status) = watch::channel(Status { begun: true, ..Status::default() });
    let of_the_node = metrics.clone();
    let two = Member::start_with(2, 1_000, |config| {
        (config.metrics, config.status) = (of_the_node, status);
    })
    .await;
    let one = Member::start(1).await;
    let shared = &one.transport.shared;
    let target = Target { id: 2, incarnation: INCARNATION, url: two.url.as_str().into() };
    let ask = async || {
        let answer = shared.ask(&target, "/raft/status", Vec::new(), ELECTION_TIMEOUT).await;
        answer.map(|answer| codec::decode::<Status>(&answer.body).expect("a status"))
    };
    metrics.ticked();
    assert!(ask().await.is_ok(), "it has just ticked");
    let hangs = async || ask().await.is_err_and(|error| format!("{error:?}").contains("hangs"));
    let begun = Instant::now();
    while !hangs().await {
        assert!(begun.elapsed() < DEADLINE, "it has not ticked since");
    }
    assert!(begun.elapsed() >= ELECTION_TIMEOUT, "a slow disk is no end: {:?}", begun.elapsed());
    metrics.ticked();
    assert!(ask().await.is_ok(), "it ticks again");
    drop(status_tx);
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_leaves_no_task_and_answers_everyone() {
    let mut one = Member::start(1).await;
    let runtime = one.own_runtime();
    let (begun_tx, mut begun_rx) = mpsc::unbounded_channel();
    let url = server(move |mut stream| {
        let begun_tx = begun_tx.clone();
        async move {
            let _ = stream.read_u8().await;
            let _ = begun_tx.send(());
            std::future::pending::<()>().await;
            drop(stream);
        }
    });
    one.transport.add_peer(2, &url.await, INCARNATION);
    one.transport.send(heartbeat(2, 0));
    one.send_snapshot(several_mebibytes().repeat(8));
    let pending = forward_change(&mut one);
    for _ in 0..3 {
        within(begun_rx.recv()).await;
    }
    let shared = one.transport.shared.clone();
    let begun = Instant::now();
    let (mut report_rx, ended) = (one.report_rx, one.transport.ended());
    drop(one.transport);
    within(ended).await;
    assert!(begun.elapsed() < 3 * ELECTION_TIMEOUT, "{:?}", begun.elapsed());
    let outcome = outcome(pending).await;
    assert!(matches!(outcome, Err(RequestError::Unknown(_))), "{outcome:?}");
    let mut statuses = 0;
    while let Ok(report) = report_rx.try_recv() {
        statuses +=
            usize::from(matches!(report, PeerReport::SnapshotStatus { arrived: false, .. }));
    }
    assert_eq!(statuses, 1);
    eventually("no task is left", || runtime.alive_tasks() == 0).await;
    assert_eq!(shared.receiving.available_permits(), 0, "no snapshot is received any more");
}
