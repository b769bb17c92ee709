//! A cluster in one process. Each member has its own ports, directory and log lines, and starts and
//! stops as in the program.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use std::{fs, io};

use bytes::Bytes;
use raftexample::channels::{
    self, Ack, Acknowledged, Commit, CommittedEntry, ConfChangeRequest, MemberRequest, NodeId,
    Pending, Proposal, ReadRequest, Requests, responder,
};
use raftexample::error::{Error, RequestError, Result};
use raftexample::httpapi::{HttpKvApi, service};
use raftexample::kvstore::{Consistency, KeyValue, KvStore};
use raftexample::ports::listener::{BodyBudget, Limits, ResponseBudget, serve};
use raftexample::ports::tls::no_tls;
use raftexample::raft_node::replay::{snap_dir, wal_dir};
use raftexample::raft_node::{NodeConfig, RaftNodeHandle, Status, new_raft_node};
use raftexample::storage::{DiskVfs, Vfs, VfsFile};
use reqwest::header::HeaderMap;
use slog::{Level, Logger};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::support::config::config;
use crate::support::logs;

/// A quarter of the default, for fast elections.
pub const TICK: Duration = Duration::from_millis(25);
/// The default.
pub const ELECTION_TICKS: usize = 10;
/// The shortest time after which a member gives up a silent leader.
pub const ELECTION_TIMEOUT: Duration = Duration::from_millis(25 * ELECTION_TICKS as u64);
/// A deadline for everything that a test waits for. Long, because the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// How late an answer may arrive after its deadline, for the same reason.
pub const SLACK: Duration = Duration::from_secs(2);

/// Waits until `holds` returns true. Panics with `why` after `patience`.
pub async fn eventually(patience: Duration, why: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !holds().await {
        assert!(Instant::now() < deadline, "not within {patience:?}: {why}");
        // The interval between two looks; the deadline above ends the wait.
        sleep(Duration::from_millis(5)).await;
    }
}

/// Waits for `future`. Panics with `why` after [`PATIENCE`].
pub async fn within<T>(why: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {why}"))
}

/// How the members of a cluster are started.
#[derive(Clone, Debug)]
pub struct Options {
    pub snapshot_count: u64,
    pub snapshot_catch_up_entries: u64,
    pub request_timeout: Duration,
    /// True to put a proxy in front of every peer port, as [`Cluster::isolate`] needs.
    pub proxied: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            snapshot_count: 10_000,
            snapshot_catch_up_entries: 10_000,
            request_timeout: Duration::from_secs(5),
            proxied: false,
        }
    }
}

impl Options {
    /// A snapshot after every `snapshot_count` entries, with one entry kept before it.
    pub fn snapshots(snapshot_count: u64) -> Self {
        Self { snapshot_count, snapshot_catch_up_entries: 1, ..Self::default() }
    }
}

/// The members, by the name that the test gives them: the id, except for impostors.
pub struct Cluster {
    options: Options,
    dir: TempDir,
    members: BTreeMap<NodeId, Member>,
    network: Network,
    http: reqwest::Client,
}

/// One member, running or not.
pub struct Member {
    /// The configuration of its next start.
    pub config: NodeConfig,
    peer_port: Port,
    next_port: Option<Port>,
    client_port: Port,
    lines: Arc<Mutex<Vec<String>>>,
    running: Option<Running>,
}

struct Running {
    conf_change_tx: mpsc::Sender<ConfChangeRequest>,
    status: watch::Receiver<Status>,
    power: Power,
    store: KvStore,
    stop_tx: oneshot::Sender<()>,
    server: JoinHandle<()>,
    store_done: JoinHandle<Result<()>>,
    node: RaftNodeHandle,
}

/// A node without a state machine: the test owns its channels, as the original's tests do.
pub struct Raw {
    pub propose_tx: mpsc::Sender<Proposal>,
    pub read_tx: mpsc::Sender<ReadRequest>,
    pub conf_change_tx: mpsc::Sender<ConfChangeRequest>,
    pub commit_rx: mpsc::UnboundedReceiver<Commit>,
    pub node: RaftNodeHandle,
    power: Power,
    logger: Logger,
}

impl Cluster {
    /// `n` first members, not started.
    pub fn new(n: NodeId) -> Self {
        Self::with(n, Options::default())
    }

    /// `n` first members with `options`, not started.
    pub fn with(n: NodeId, options: Options) -> Self {
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(no_tls())
            .no_proxy()
            .retry(reqwest::retry::never())
            .pool_max_idle_per_host(0)
            .build()
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let network = Network::default();
        let mut cluster = Self { options, dir, members: BTreeMap::new(), network, http };
        for id in 1..=n {
            cluster.insert(id, false);
        }
        let urls: Vec<String> = cluster.members.values().map(|m| m.config.url.clone()).collect();
        for member in cluster.members.values_mut() {
            member.config.cluster = urls.clone();
        }
        cluster
    }

    /// `n` running members that follow a leader.
    pub async fn started(n: NodeId, options: Options) -> Self {
        let mut cluster = Self::with(n, options);
        cluster.start_all().await;
        cluster.leader().await;
        cluster
    }

    fn insert(&mut self, id: NodeId, join: bool) {
        let (peer_port, client_port) = (Port::new(), Port::new());
        let address = if self.options.proxied {
            self.network.proxy(id, peer_port.address)
        } else {
            peer_port.address
        };
        let config = NodeConfig {
            url: format!("http://{address}"),
            cluster: Vec::new(),
            join,
            data_dir: self.dir.path().to_owned(),
            snapshot_count: self.options.snapshot_count,
            snapshot_catch_up_entries: self.options.snapshot_catch_up_entries,
            tick: TICK,
            election_ticks: ELECTION_TICKS,
            randomized_election_ticks: ELECTION_TICKS..2 * ELECTION_TICKS,
            request_timeout: self.options.request_timeout,
            ..config(id, 0)
        };
        let lines = Arc::default();
        let (next_port, running) = (None, None);
        let member = Member { config, peer_port, next_port, client_port, lines, running };
        self.members.insert(id, member);
    }

    /// A member that will join, neither added nor started. Its `--cluster` lists all members.
    pub fn joiner(&mut self, id: NodeId) {
        self.insert(id, true);
        let urls = self.members.values().map(|member| member.config.url.clone()).collect();
        self.config(id).cluster = urls;
    }

    /// Adds member `id` through member `through` and starts it.
    pub async fn join(&mut self, id: NodeId, through: NodeId) {
        self.joiner(id);
        self.client(through).add(id, &self.url(id)).await.expect(204);
        self.start(id).await;
    }

    /// Reserves another peer URL for [`relocate`](Self::relocate).
    pub fn reserve(&mut self, id: NodeId) -> String {
        let port = Port::new();
        let url = format!("http://{}", port.address);
        self.members.get_mut(&id).unwrap().next_port = Some(port);
        url
    }

    /// Gives a stopped member the reserved peer URL: its flags name it from now on.
    pub fn relocate(&mut self, id: NodeId) {
        let member = self.members.get_mut(&id).unwrap();
        assert!(member.running.is_none(), "member {id} runs");
        member.peer_port = member.next_port.take().unwrap();
        member.config.url = format!("http://{}", member.peer_port.address);
    }

    /// A member that claims to be `of`, with its own ports.
    pub fn impostor(&mut self, name: NodeId, of: NodeId) {
        self.insert(name, false);
        let url = self.url(name);
        let config = NodeConfig { url, ..self.member(of).config.clone() };
        *self.config(name) = config;
    }

    fn member(&self, id: NodeId) -> &Member {
        &self.members[&id]
    }

    fn running(&self, id: NodeId) -> &Running {
        let running = self.member(id).running.as_ref();
        running.unwrap_or_else(|| panic!("member {id} does not run"))
    }

    /// The configuration of the next start of a member.
    pub fn config(&mut self, id: NodeId) -> &mut NodeConfig {
        &mut self.members.get_mut(&id).unwrap().config
    }

    /// Requests a change through member `through`, as the admin port does.
    pub async fn change(
        &self,
        through: NodeId,
        change: MemberRequest,
    ) -> std::result::Result<(), RequestError> {
        let (responder, pending) = responder();
        let request = ConfChangeRequest { change, forwarded: false, responder };
        self.running(through).conf_change_tx.send(request).await.unwrap();
        pending.wait_until(Instant::now() + self.options.request_timeout).await
    }

    /// Waits until every running member has exactly these learners.
    pub async fn has_learners(&self, learners: &[NodeId]) {
        let counts = async || {
            self.ids().into_iter().all(|id| self.status(id).members.learners.iter().eq(learners))
        };
        eventually(PATIENCE, &format!("the learners are {learners:?}"), counts).await;
    }

    /// A member's peer URL.
    pub fn url(&self, id: NodeId) -> String {
        self.member(id).config.url.clone()
    }

    /// The ids of the members that run.
    pub fn ids(&self) -> Vec<NodeId> {
        let running = self.members.iter().filter(|(_, member)| member.running.is_some());
        running.map(|(id, _)| *id).collect()
    }

    /// Starts a node and returns its channels.
    pub fn open(&mut self, id: NodeId) -> Raw {
        let member = self.members.get_mut(&id).unwrap();
        let config = &mut member.config;
        config.boot = getrandom::u64().unwrap();
        if !wal_dir(&config.data_dir, config.id).exists() {
            config.incarnation = getrandom::u64().unwrap();
        }
        let logger = logger(id, member.lines.clone());
        let power = Power::default();
        let (propose_tx, propose_rx) = mpsc::channel(channels::REQUESTS_MAX);
        let (read_tx, read_rx) = mpsc::channel(channels::REQUESTS_MAX);
        let (conf_change_tx, conf_change_rx) = mpsc::channel(channels::CONF_CHANGES_MAX);
        let (commit_rx, node) = new_raft_node(
            config.clone(),
            Arc::new(power.clone()),
            member.peer_port.listen(),
            propose_rx,
            read_rx,
            conf_change_rx,
            logger.clone(),
        );
        Raw { propose_tx, read_tx, conf_change_tx, commit_rx, node, power, logger }
    }

    /// Starts a member as the program does: node, store and client port.
    pub async fn start(&mut self, id: NodeId) {
        let raw = self.open(id);
        let Raw { propose_tx, read_tx, conf_change_tx, commit_rx, node, power, logger } = raw;
        let requests = Requests { propose_tx, read_tx, conf_change_tx: conf_change_tx.clone() };
        let config = &self.member(id).config;
        let (store, commit_reader) = KvStore::new(config, requests, logger.clone());
        let store_done = tokio::spawn(commit_reader.read_commits(commit_rx));
        let service = service(HttpKvApi {
            port: "client",
            store: store.clone(),
            ack: Ack::Committed,
            read: Consistency::Linearizable,
            request_timeout: self.options.request_timeout,
            max_value_bytes: 16 << 20,
            budget: BodyBudget::default(),
            responses: ResponseBudget::default(),
            names: Vec::new(),
            metrics: Default::default(),
            logger: logger.clone(),
        });
        let (stop_tx, stop_rx) = oneshot::channel::<()>();
        let member = self.members.get_mut(&id).unwrap();
        let server = tokio::spawn(serve(
            member.client_port.listen(),
            service,
            Limits { shutdown_grace: self.options.request_timeout + SLACK, ..Limits::default() },
            async {
                let _ = stop_rx.await;
            },
            logger,
        ));
        let status = node.status.clone();
        let running =
            Running { conf_change_tx, status, power, store, stop_tx, server, store_done, node };
        let old = member.running.replace(running);
        assert!(old.is_none(), "member {id} runs already");
    }

    pub async fn start_all(&mut self) {
        for id in self.members.keys().copied().collect::<Vec<_>>() {
            if self.member(id).running.is_none() {
                self.start(id).await;
            }
        }
    }

    /// Stops a member like SIGTERM; all its tasks have ended afterwards.
    pub async fn stop(&mut self, id: NodeId) {
        if let Err(error) = self.take(id).end(id, true).await {
            panic!("member {id} ended with an error: {error}");
        }
    }

    /// Stops all members at once.
    pub async fn stop_all(&mut self) {
        let running = self.ids().into_iter().map(|id| (id, self.take(id)));
        let mut ends = tokio::task::JoinSet::new();
        for (id, running) in running.collect::<Vec<_>>() {
            ends.spawn(async move { (id, running.end(id, true).await) });
        }
        while let Some(end) = ends.join_next().await {
            let (id, end) = end.unwrap();
            if let Err(error) = end {
                panic!("member {id} ended with an error: {error}");
            }
        }
    }

    /// Stops a member between two disk writes, like kill -9.
    pub async fn crash(&mut self, id: NodeId) {
        let running = self.take(id);
        running.power.off.store(true, Ordering::SeqCst);
        // Without pending writes it ends in order.
        let _ = running.end(id, true).await;
    }

    /// Waits until a member ends by itself; returns its error.
    pub async fn end(&mut self, id: NodeId) -> Error {
        let end = self.take(id).end(id, false).await;
        end.expect_err("a member that ends by itself says why")
    }

    fn take(&mut self, id: NodeId) -> Running {
        let running = self.members.get_mut(&id).unwrap().running.take();
        running.unwrap_or_else(|| panic!("member {id} does not run"))
    }

    pub async fn restart(&mut self, id: NodeId) {
        self.stop(id).await;
        self.start(id).await;
    }

    /// Deletes a stopped member's directories.
    pub fn wipe(&mut self, id: NodeId) {
        let member = self.member(id);
        assert!(member.running.is_none(), "member {id} runs");
        for dir in [wal_dir(self.dir.path(), id), snap_dir(self.dir.path(), id)] {
            fs::remove_dir_all(dir).unwrap();
        }
    }

    /// The data directory of all members.
    pub fn data_dir(&self) -> &Path {
        self.dir.path()
    }

    /// A member's WAL directory.
    pub fn wal_dir(&self, id: NodeId) -> PathBuf {
        wal_dir(self.dir.path(), id)
    }

    /// A member's current status.
    pub fn status(&self, id: NodeId) -> Status {
        self.running(id).status.borrow().clone()
    }

    /// A member's store, for keys that a URL cannot express.
    pub fn store(&self, id: NodeId) -> KvStore {
        self.running(id).store.clone()
    }

    /// True if a member logged a line with `text`, in any run.
    pub fn has_logged(&self, id: NodeId, text: &str) -> bool {
        self.count_logged(id, text) > 0
    }

    /// The number of a member's log lines with `text`.
    pub fn count_logged(&self, id: NodeId, text: &str) -> usize {
        let lines = self.member(id).lines.lock().unwrap();
        lines.iter().filter(|line| line.contains(text)).count()
    }

    /// Waits until a member logs `text`.
    pub async fn until_logged(&self, id: NodeId, text: &str) {
        let why = format!("member {id} logs {text:?}");
        eventually(PATIENCE, &why, async || self.has_logged(id, text)).await;
    }

    /// Waits until all running members follow one leader; returns it.
    pub async fn leader(&self) -> NodeId {
        self.leader_of(&self.ids()).await
    }

    /// Waits until the members `ids` follow one leader among them; returns it.
    pub async fn leader_of(&self, ids: &[NodeId]) -> NodeId {
        let mut leader = 0;
        eventually(PATIENCE, &format!("{ids:?} have a leader"), async || {
            let known: BTreeSet<_> = ids
                .iter()
                .map(|id| {
                    let status = self.status(*id);
                    (status.term, status.leader)
                })
                .collect();
            leader = known.first().unwrap().1;
            known.len() == 1 && ids.contains(&leader)
        })
        .await;
        leader
    }

    /// A running member that does not lead.
    pub async fn follower(&self) -> NodeId {
        let leader = self.leader().await;
        self.ids().into_iter().find(|id| *id != leader).expect("there are followers")
    }

    /// Waits until `ids` have applied everything that one of them knows to be committed.
    pub async fn caught_up(&self, ids: &[NodeId]) {
        let commit = ids.iter().map(|id| self.status(*id).commit).max().unwrap();
        let why = format!("{ids:?} apply index {commit}");
        let behind = async || ids.iter().all(|id| self.status(*id).applied >= commit);
        eventually(PATIENCE, &why, behind).await;
    }

    /// Waits until a member has exactly the members `ids`.
    pub async fn has_members(&self, id: NodeId, ids: &[NodeId]) {
        let why = format!("member {id} counts {ids:?} as members");
        let counts = async || self.status(id).members.urls.keys().eq(ids);
        eventually(PATIENCE, &why, counts).await;
    }

    /// A client of member `id`.
    pub fn client(&self, id: NodeId) -> Client {
        let base = format!("http://{}", self.member(id).client_port.address);
        Client { http: self.http.clone(), base }
    }

    /// Writes through member `id` until the write is acknowledged.
    pub async fn write(&self, id: NodeId, key: &str, value: &str) {
        let client = self.client(id);
        eventually(PATIENCE, &format!("member {id} takes PUT {key}"), async || {
            client.put(key, value.to_owned()).await.status == 204
        })
        .await;
    }

    /// Writes `/<prefix><i>` = `i` for each of `range` through member `id`.
    pub async fn fill(&self, id: NodeId, prefix: &str, range: std::ops::Range<u64>) {
        for i in range {
            self.write(id, &format!("/{prefix}{i}"), &i.to_string()).await;
        }
    }

    /// Checks that member `id` catches up with what [`fill`](Self::fill) wrote.
    pub async fn is_filled(&self, id: NodeId, prefix: &str, range: std::ops::Range<u64>) {
        for i in range {
            let key = format!("/{prefix}{i}");
            self.holds(id, &key, &i.to_string()).await;
        }
    }

    /// Waits until member `id`'s own map has `value` at `key`.
    pub async fn holds(&self, id: NodeId, key: &str, value: &str) {
        let store = self.store(id);
        eventually(PATIENCE, &format!("member {id} has {value:?} at {key}"), async || {
            lookup_local(&store, key.as_bytes()).await.as_deref() == Some(value.as_bytes())
        })
        .await;
    }

    /// Cuts member `id` off from all others, in both directions.
    pub fn isolate(&self, id: NodeId) {
        assert!(self.options.proxied, "only proxied members can be cut off");
        let others: Vec<NodeId> = self.members.keys().copied().filter(|o| *o != id).collect();
        self.network.cut.send_modify(|cut| {
            cut.extend(others.iter().flat_map(|other| [(id, *other), (*other, id)]));
        });
    }

    /// Reconnects all members.
    pub fn heal(&self) {
        self.network.cut.send_modify(BTreeSet::clear);
    }
}

impl Running {
    /// Ends a member, or waits until it ends by itself. Afterwards all its tasks have ended.
    async fn end(self, id: NodeId, stop: bool) -> Result<()> {
        let Self { store, stop_tx, server, store_done, node, .. } = self;
        let node = node.join();
        tokio::pin!(node);
        let mut result = None;
        if !stop {
            result = Some(within(&format!("member {id} ends by itself"), &mut node).await);
        }
        drop(stop_tx);
        drop(store);
        within(&format!("the client port of member {id} closes"), server).await.unwrap();
        let result = match result {
            Some(result) => result,
            None => within(&format!("member {id} stops"), &mut node).await,
        };
        within(&format!("the store of member {id} ends"), store_done).await.unwrap()?;
        result
    }
}

impl Raw {
    /// Proposes `data`; blocks while proposeC is full.
    pub async fn propose(&self, data: impl Into<Bytes>) -> Pending<Acknowledged> {
        let (responder, pending) = responder();
        let proposal = Proposal { data: data.into(), ack: Ack::Committed, responder };
        self.propose_tx.send(proposal).await.expect("the node runs");
        pending
    }

    /// The next item of commitC.
    pub async fn next(&mut self) -> Commit {
        within("the next item of commitC", self.commit_rx.recv()).await.expect("the node runs")
    }

    /// The next entries of commitC; other items are dropped.
    pub async fn next_entries(&mut self) -> Vec<CommittedEntry> {
        loop {
            if let Commit::Entries { entries, .. } = self.next().await {
                return entries;
            }
        }
    }

    /// Closes proposeC, drains commitC, and waits until the node ends.
    pub async fn close(self) -> Result<()> {
        let Self { propose_tx, mut commit_rx, node, .. } = self;
        drop(propose_tx);
        within("commitC is closed", async { while commit_rx.recv().await.is_some() {} }).await;
        within("the node ends", node.join()).await
    }
}

/// The value in a member's own map, which may be stale.
pub async fn lookup_local(store: &KvStore, key: &[u8]) -> Option<Bytes> {
    let deadline = Instant::now() + PATIENCE;
    let value = store.lookup(key, Consistency::Local, deadline).await.expect("it was replayed");
    value.map(KeyValue::into_value)
}

/// Writes a key that a URL cannot express.
pub async fn propose(
    store: &KvStore,
    key: &[u8],
    value: &[u8],
) -> std::result::Result<Acknowledged, RequestError> {
    store
        .propose(key, Bytes::copy_from_slice(value), Ack::Committed, Instant::now() + PATIENCE)
        .await
}

/// A client of one member's client port. It never repeats a request.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: String,
}

/// A response.
#[derive(Debug)]
pub struct Answer {
    /// 0 if the member did not answer.
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    /// Checks the status.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", self.text());
        self
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Client {
    pub async fn put(&self, key: &str, value: impl Into<Bytes>) -> Answer {
        self.send(self.http.put(self.target(key)).body(value.into())).await
    }

    pub async fn get(&self, key: &str) -> Answer {
        self.send(self.http.get(self.target(key))).await
    }

    pub async fn get_local(&self, key: &str) -> Answer {
        self.send(self.http.get(self.target(key)).header("Raft-Read", "local")).await
    }

    pub async fn add(&self, id: NodeId, url: &str) -> Answer {
        self.post(&format!("/{id}"), url.to_owned()).await
    }

    pub async fn post(&self, key: &str, body: impl Into<Bytes>) -> Answer {
        self.send(self.http.post(self.target(key)).body(body.into())).await
    }

    pub async fn remove(&self, id: NodeId) -> Answer {
        self.send(self.http.delete(self.target(&format!("/{id}")))).await
    }

    fn target(&self, key: &str) -> String {
        format!("{}{key}", self.base)
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Answer {
        let no_answer = || Answer { status: 0, headers: HeaderMap::new(), body: Bytes::new() };
        let Ok(response) = request.timeout(PATIENCE).send().await else { return no_answer() };
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let Ok(body) = response.bytes().await else { return no_answer() };
        Answer { status, headers, body }
    }
}

/// A port that stays reserved while no member listens: a socket stays bound to it.
struct Port {
    address: SocketAddr,
    _reservation: TcpSocket,
}

impl Port {
    fn new() -> Self {
        let socket = bind("127.0.0.1:0".parse().unwrap());
        Self { address: socket.local_addr().unwrap(), _reservation: socket }
    }

    fn listen(&self) -> TcpListener {
        bind(self.address).listen(1024).unwrap()
    }
}

fn bind(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address).unwrap();
    socket
}

/// Links that are cut, each from a sender to a receiver. A cut link delivers nothing and refuses
/// nothing.
#[derive(Default)]
struct Network {
    cut: watch::Sender<BTreeSet<(NodeId, NodeId)>>,
}

impl Network {
    /// Starts a proxy for member `to`, which listens at `target`; returns the proxy's address.
    fn proxy(&self, to: NodeId, target: SocketAddr) -> SocketAddr {
        let listener = Port::new().listen();
        let address = listener.local_addr().unwrap();
        let cut_rx = self.cut.subscribe();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(carry(stream, to, target, cut_rx.clone()));
            }
        });
        address
    }
}

/// Forwards one connection. The head of its first request names the sender, the connection's only
/// user.
async fn carry(
    mut stream: TcpStream,
    to: NodeId,
    target: SocketAddr,
    mut cut_rx: watch::Receiver<BTreeSet<(NodeId, NodeId)>>,
) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
        if stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let text = String::from_utf8_lossy(&head).to_lowercase();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("raft-from:"));
    let from: NodeId = lines.next().expect("a peer names itself").trim().parse().unwrap();
    let mut is_cut_rx = cut_rx.clone();
    tokio::select! {
        biased;
        _ = is_cut_rx.wait_for(|cut| cut.contains(&(from, to))) => {}
        result = async {
            let mut upstream = TcpStream::connect(target).await?;
            upstream.set_nodelay(true)?;
            stream.set_nodelay(true)?;
            upstream.write_all(&head).await?;
            copy_bidirectional(&mut stream, &mut upstream).await
        } => return result.map(|_| ()),
    }
    let _ = cut_rx.wait_for(|cut| !cut.contains(&(from, to))).await;
    Ok(())
}

/// A disk that can be switched off: afterwards every write fails.
#[derive(Clone, Default)]
struct Power {
    off: Arc<AtomicBool>,
}

impl Power {
    fn check(&self) -> io::Result<()> {
        if self.off.load(Ordering::SeqCst) {
            return Err(io::Error::other("the power is off"));
        }
        Ok(())
    }

    fn file(&self, file: Box<dyn VfsFile>) -> Box<dyn VfsFile> {
        Box::new(PoweredFile { file, power: self.clone() })
    }
}

impl Vfs for Power {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.check().and_then(|()| DiskVfs.create_dir_all(path))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn VfsFile>> {
        self.check().and_then(|()| DiskVfs.create(path)).map(|file| self.file(file))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn VfsFile>> {
        self.check().and_then(|()| DiskVfs.open(path)).map(|file| self.file(file))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.check().and_then(|()| DiskVfs.rename(from, to))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.check().and_then(|()| DiskVfs.remove(path))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        DiskVfs.list(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.check().and_then(|()| DiskVfs.sync_dir(path))
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Any + Send>>> {
        DiskVfs.lock(path)
    }
}

struct PoweredFile {
    file: Box<dyn VfsFile>,
    power: Power,
}

impl VfsFile for PoweredFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.power.check().and_then(|()| self.file.write_all_at(buf, offset))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.power.check().and_then(|()| self.file.set_len(len))
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn sync(&self) -> io::Result<()> {
        self.power.check().and_then(|()| self.file.sync())
    }
}

/// Keeps a member's lines for the test. Prints them if `RAFTEXAMPLE_TEST_LOG` is set.
pub fn logger(id: NodeId, lines: Arc<Mutex<Vec<String>>>) -> Logger {
    let print = std::env::var_os("RAFTEXAMPLE_TEST_LOG").is_some();
    logs::logger(move |record| {
        if !record.level().is_at_least(Level::Info) {
            return;
        }
        let line = record.msg().to_string();
        if print {
            eprintln!("{id} {} {line}", record.level().as_short_str());
        }
        lines.lock().unwrap().push(line);
    })
}
