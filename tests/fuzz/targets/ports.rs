//! Requests at the ports, and answers, after the parsing of HTTP.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, Method, Request, Response, Uri, Version};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper_util::service::TowerToHyperService;
use protobuf::Message as _;
use raft::eraftpb::MessageType;
use raftexample::channels::{
    Ack, BacklogPermit, Commit, CommittedEntry, ConfChangeRequest, Greeting, MemberRequest, NodeId,
    Proposal, ReadRequest, Requests,
};
use raftexample::codec;
use raftexample::commands;
use raftexample::error::Error;
use raftexample::httpapi::{HttpKvApi, service};
use raftexample::kvstore::{Consistency, Keys, KvStore};
use raftexample::logging::LogLevel;
use raftexample::membership::{Members, Verdict};
use raftexample::ports::admin::{self, Admin};
use raftexample::ports::application::{self, Application, Wakeups};
use raftexample::ports::listener::{BodyBudget, HttpService};
use raftexample::raft_node::state_machine::CommitReader;
use raftexample::raft_node::{self, Input, NodeConfig, PeerStatus, Status, TickStatus};
use raftexample::transport::{ClusterWatch, Transport, TransportConfig};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, mpsc, watch};

use super::{Choices, configuration};
use crate::support::logs;
use crate::support::memory::forging::{Role, forged, header_of};
use crate::support::memory::*;

thread_local! {
    static RUNTIME: Runtime = Builder::new_current_thread().enable_all().build().unwrap();
}

/// A request with what the choices make of its head; `None` if there can be none.
fn request(
    method: &[u8],
    target: &[u8],
    headers: &[(String, Vec<u8>)],
    body: Vec<u8>,
) -> Option<Request<Body>> {
    let mut request = Request::new(Body::from(body));
    *request.method_mut() = Method::from_bytes(method).ok()?;
    *request.uri_mut() = Uri::try_from(target).ok()?;
    for (name, value) in headers {
        let name: axum::http::HeaderName = name.parse().ok()?;
        request.headers_mut().append(name, value.as_slice().try_into().ok()?);
    }
    Some(request)
}

async fn call(service: &impl HttpService<Body>, request: Request<Body>) -> Response<Body> {
    service.call(request).await.expect("handlers do not fail")
}

// ---------------------------------------------------------------------------------------------
// The peer port

/// A batch of messages as it stands on the wire, or nearly.
fn batch(choices: &mut Choices<'_>, member: &Member, from: NodeId) -> Vec<u8> {
    let mut batch = Vec::new();
    for _ in 0..choices.below(4) {
        let kind = choices.pick(&[
            MessageType::MsgAppend,
            MessageType::MsgHeartbeat,
            MessageType::MsgSnapshot,
            MessageType::MsgRequestVote,
            MessageType::MsgTimeoutNow,
            MessageType::MsgAppendResponse,
        ]);
        let mut message = forged(member, kind, from);
        message.term = choices.number(message.term);
        let mut encoded = message.write_to_bytes().unwrap();
        if choices.one_in(2) {
            choices.damage(&mut encoded);
        }
        batch.extend((encoded.len() as u32).to_le_bytes());
        batch.extend(encoded);
    }
    batch
}

fn peer_request(choices: &mut Choices<'_>, member: &Member) -> Option<Request<Body>> {
    let from = choices.pick(&[1, 3, 9]);
    let header = header_of(member, from);
    let path = choices.pick(&[
        "/raft",
        "/raft/stream",
        "/raft/snapshot",
        "/raft/greeting",
        "/raft/members",
        "/raft/status",
        "/",
    ]);
    let mut headers: Vec<(String, Vec<u8>)> = [
        ("raft-protocol", "4".to_owned()),
        ("raft-cluster-id", format!("{:016x}", header.cluster_id)),
        ("raft-from", from.to_string()),
        ("raft-incarnation", format!("{:016x}", header.incarnation)),
        ("raft-from-url", header.url),
        ("raft-to", member.id.to_string()),
        ("raft-to-incarnation", "0000000000000000".to_owned()),
        ("raft-boot", format!("{:016x}", 1)),
        ("raft-number", (1000 + choices.short()).to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value.into_bytes()))
    .into();
    let mut body = match path {
        "/raft/greeting" => {
            codec::encode(&Greeting { first_urls: (1..=3).map(url).collect(), begun: true })
        }
        "/raft/members" => codec::encode(&match choices.below(2) {
            0 => MemberRequest::Add { id: choices.number(4), url: url(4) },
            _ => MemberRequest::Remove { id: choices.below(4) as u64 },
        }),
        "/raft/stream" => {
            let mut frames = Vec::new();
            for number in 0..1 + choices.below(3) as u64 {
                let batch = batch(choices, member, from);
                frames.extend((2000 + number).to_le_bytes());
                frames.extend((batch.len() as u32).to_le_bytes());
                frames.extend(batch);
            }
            frames
        }
        _ => batch(choices, member, from),
    };
    if choices.one_in(3) {
        choices.damage(&mut body);
    }
    if path == "/raft/snapshot" {
        let file = choices.bytes();
        body.extend_from_slice(file);
        headers.push(("raft-snapshot-length".to_owned(), file.len().to_string().into_bytes()));
        let checksum = format!("{:08x}", crc32c::crc32c(file)).into_bytes();
        headers.push(("raft-snapshot-checksum".to_owned(), checksum));
    }
    headers.push(("content-length".to_owned(), body.len().to_string().into_bytes()));
    if choices.one_in(3) {
        // hyper keeps a body to its length, so that is the one header that is never wrong here.
        let at = choices.below(headers.len() - 1);
        match choices.below(3) {
            0 => drop(headers.remove(at)),
            1 => headers.push(headers[at].clone()),
            _ => choices.damage(&mut headers[at].1),
        }
    }
    request(b"POST", path.as_bytes(), &headers, body)
}

/// Whatever is asked at the peer port, in whoever's name: it is answered, and what was committed stays
/// committed.
pub fn peer_requests(data: &[u8]) {
    thread_local! {
        static IMAGE: MemVfs = Role::Leader.image();
    }
    let mut choices = Choices(data);
    let role = choices.pick(&[Role::Leader, Role::Follower, Role::Silent]);
    let mut member = IMAGE.with(|image| role.start(image));
    RUNTIME.with(|runtime| {
        let (inbound_tx, mut inbound_rx) = mpsc::channel(16);
        let (report_tx, mut report_rx) = mpsc::unbounded_channel();
        let (status_tx, status_rx) = watch::channel(member.status());
        let config = TransportConfig::new(Duration::from_secs(10), 77);
        let transport = Transport::new(
            TransportConfig { status: status_rx, ..config },
            member.admission.clone(),
            member.snapshotter.clone(),
            inbound_tx,
            report_tx,
            runtime.handle().clone(),
            logs::discard(),
        )
        .unwrap();
        let service = TowerToHyperService::new(transport.router());
        runtime.block_on(async {
            while !choices.is_empty() {
                // hyper limits a body to its length, so that header is always correct here.
                while let Ok(inbound) = inbound_rx.try_recv() {
                    match member.turn([Input::Inbound(inbound)]) {
                        Ok(()) | Err(Error::Removed) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                let before = member.status();
                status_tx.send_replace(before.clone());
                let Some(request) = peer_request(&mut choices, &member) else { continue };
                let asks_status = request.uri().path() == "/raft/status";
                // The answer's body, too: a stream is read as it is made.
                let mut answer = std::pin::pin!(async {
                    let (head, body) = call(&service, request).await.into_parts();
                    let body = body.collect().await.map(|body| body.to_bytes());
                    if asks_status && head.status.is_success() {
                        let status = codec::decode::<Status>(&body.unwrap()).unwrap();
                        assert_eq!(status.id, before.id);
                        assert!(before.begun && status.members.removed.is_empty());
                    }
                    head.status.as_u16()
                });
                let status = loop {
                    let input = tokio::select! {
                        status = &mut answer => break status,
                        Some(inbound) = inbound_rx.recv() => Input::Inbound(inbound),
                        Some(report) = report_rx.recv() => Input::Report(report),
                    };
                    // A change of members that a leader takes is answered when it is applied: never
                    // here, where nobody acknowledges it. Its request is given up.
                    let is_change = matches!(
                        &input,
                        Input::Inbound(inbound)
                            if matches!(inbound.body, raftexample::transport::InboundBody::ConfChange(..))
                    );
                    match member.turn([input]) {
                        Ok(()) | Err(Error::Removed) => {}
                        Err(error) => panic!("{error}"),
                    }
                    if is_change {
                        break 200;
                    }
                };
                assert!(
                    [200, 204, 400, 404, 408, 410, 411, 412, 413, 503].contains(&status),
                    "answered {status}"
                );
                let after = member.status();
                assert!(after.term >= before.term && after.commit >= before.commit);
                if matches!(status, 400..=413) {
                    assert_eq!(after, before, "it was answered {status}");
                }
            }
        });
    });
}

// ---------------------------------------------------------------------------------------------
// The client port

/// The largest value that the store takes here.
const MAX_VALUE_BYTES: usize = 200;

/// A store whose node is this thread: it commits what it is given.
struct Node {
    propose_rx: mpsc::Receiver<Proposal>,
    read_rx: mpsc::Receiver<ReadRequest>,
    conf_change_rx: mpsc::Receiver<ConfChangeRequest>,
    reader: CommitReader<Keys>,
    members: Members,
    /// The requests that it got, which is also the index of the last entry.
    requests: u64,
}

impl Node {
    fn start() -> (Self, HttpKvApi) {
        let logger = logs::discard();
        let (propose_tx, propose_rx) = mpsc::channel(4);
        let (read_tx, read_rx) = mpsc::channel(4);
        let (conf_change_tx, conf_change_rx) = mpsc::channel(4);
        let requests = Requests { propose_tx, read_tx, conf_change_tx };
        let (store, mut reader) = KvStore::new(&NodeConfig::default(), requests, logger.clone());
        reader.handle(Commit::Replayed).unwrap();
        let api = HttpKvApi {
            port: "client",
            store,
            ack: Ack::Committed,
            read: Consistency::Linearizable,
            request_timeout: Duration::from_secs(10),
            max_value_bytes: MAX_VALUE_BYTES,
            budget: BodyBudget::new(10 * MAX_VALUE_BYTES),
            responses: Default::default(),
            names: vec!["*".to_owned()],
            metrics: Default::default(),
            logger,
        };
        let members = Members { urls: [(1, url(1))].into(), ..Members::default() };
        (Self { propose_rx, read_rx, conf_change_rx, reader, members, requests: 0 }, api)
    }

    /// Does what the node is asked for until there is an answer.
    async fn until<T>(&mut self, answer: impl Future<Output = T>) -> T {
        let mut answer = std::pin::pin!(answer);
        loop {
            tokio::select! {
                biased;
                answer = &mut answer => return answer,
                Some(proposal) = self.propose_rx.recv() => {
                    self.requests += 1;
                    let responder = proposal.responder.mark_proposed().then_some(proposal.responder);
                    let (index, data) = (self.requests, proposal.data);
                    let entry = CommittedEntry { index, term: 1, data, responder };
                    let applied = BacklogPermit::new(0, &Arc::default());
                    self.reader.handle(Commit::Entries { entries: vec![entry], applied }).unwrap();
                }
                Some(read) = self.read_rx.recv() => {
                    self.requests += 1;
                    self.reader.handle(Commit::Reads(vec![read.responder])).unwrap();
                }
                Some(change) = self.conf_change_rx.recv() => {
                    self.requests += 1;
                    let verdict = self.members.decide(&change.change);
                    if let Ok(Verdict::Change(change)) = &verdict {
                        self.members.apply(change, self.requests);
                    }
                    change.responder.answer(verdict.map(drop));
                }
            }
        }
    }
}

/// The id of the cluster.
const CLUSTER_ID: u64 = 0xc1;

/// The handlers of `/v1`, of a member that has begun.
fn application(keys: HttpKvApi, stopping: &watch::Receiver<()>) -> Arc<Application> {
    let status = Status { begun: true, cluster_id: CLUSTER_ID, ..Status::default() };
    let wakeups = RUNTIME.with(|runtime| {
        let _runtime = runtime.enter();
        Wakeups::start(keys.store.clone(), keys.metrics.clone(), stopping.clone())
    });
    Arc::new(Application {
        keys,
        status: watch::channel(status).1,
        wakeups,
        watchers: Arc::new(Semaphore::new(2)),
        stopping: stopping.clone(),
    })
}

/// A header's value, perhaps damaged.
fn header_value(choices: &mut Choices<'_>, values: &[&str]) -> Vec<u8> {
    let mut value = choices.pick(values).as_bytes().to_vec();
    if choices.one_in(6) {
        choices.damage(&mut value);
    }
    value
}

/// Whatever a client asks: it is answered, and a value that was taken is there until the next one is.
pub fn client_requests(data: &[u8]) {
    let mut choices = Choices(data);
    let (mut node, api) = Node::start();
    let budget = api.budget.clone();
    let service = service(api);
    let mut model: HashMap<String, Vec<u8>> = HashMap::new();
    let mut exchange = |request: Request<Body>| -> (u16, Bytes) {
        RUNTIME.with(|runtime| {
            runtime.block_on(async {
                let answer = node.until(call(&service, request)).await;
                let status = answer.status().as_u16();
                (status, answer.into_body().collect().await.expect("it is in memory").to_bytes())
            })
        })
    };
    while !choices.is_empty() {
        let mut method = choices
            .pick(&["PUT", "PUT", "GET", "GET", "POST", "DELETE", "HEAD", "OPTIONS"])
            .as_bytes()
            .to_vec();
        if choices.one_in(12) {
            choices.damage(&mut method);
        }
        let mut target = choices
            .pick(&["/key", "/2", "/0x3", "/", "*", "http://a/b?c", "/%00"])
            .as_bytes()
            .to_vec();
        if choices.one_in(2) {
            choices.damage(&mut target);
        }
        let mut headers = Vec::new();
        for _ in 0..choices.below(3) {
            let name = choices.pick(&["host", "origin", "raft-read", "content-length", "x"]);
            let mut value = choices
                .pick(&["local", "linearizable", "a:1", "http://a:1", "null", ""])
                .as_bytes()
                .to_vec();
            if choices.one_in(3) {
                choices.damage(&mut value);
            }
            headers.push((name.to_owned(), value));
        }
        let body = match choices.below(4) {
            0 => url(choices.below(9) as u64).into_bytes(),
            _ => choices.bytes().to_vec(),
        };
        let Some(request) = request(&method, &target, &headers, body.clone()) else { continue };
        let key = request.uri().to_string();
        let (is_put, is_get) = (request.method() == Method::PUT, request.method() == Method::GET);
        let (status, answered) = exchange(request);
        assert!(
            [200, 204, 400, 403, 404, 405, 409, 410, 413].contains(&status),
            "answered {status}: {answered:?}"
        );
        assert_eq!(budget.available_bytes(), 10 * MAX_VALUE_BYTES, "a share was not given back");
        match status {
            204 if is_put => {
                model.insert(key, body);
            }
            200 => assert!(is_get && Some(&answered[..]) == model.get(&key).map(Vec::as_slice)),
            404 => assert!(is_get && !model.contains_key(&key)),
            413 => assert!(body.len() > MAX_VALUE_BYTES),
            _ => {}
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The application port

const APPLICATION_PATHS: &[&str] = &[
    "/v1/kv/a",
    "/v1/kv/a",
    "/v1/kv/b?c",
    "/v1/kv/",
    "/v1/txn",
    "/v1/txn",
    "/v1/txn",
    "/v1/keys?prefix=/a&limit=2",
    "/v1/keys?after=%2Fa&values=true",
    "/v1/keys?prefix=%zz",
    "/v1/watch?from=0",
    "/v1/watch?prefix=/a&from=00000000000000c1-1.0",
    "/v1/watch?from=00000000000000c2-1",
    "/v1/retry-token",
    "/v1/openapi.json",
    "/v1/kv",
    "*",
];

/// A transaction, mostly a valid one.
fn transaction(choices: &mut Choices<'_>) -> Vec<u8> {
    let key = |choices: &mut Choices<'_>| choices.pick(&["/a", "/b?c", "/", "/\\u0061", "x", "/ "]);
    let list = |choices: &mut Choices<'_>, element: fn(&mut Choices<'_>, &str) -> String| {
        let elements = (0..choices.pick(&[0, 1, 1, 2, 3])).map(|_| {
            let key = key(choices);
            element(choices, key)
        });
        elements.collect::<Vec<_>>().join(",")
    };
    let operation = |choices: &mut Choices<'_>, key: &str| match choices.below(4) {
        0 => format!(r#"{{"get":"{key}"}}"#),
        1 => format!(r#"{{"delete":"{key}"}}"#),
        _ => format!(r#"{{"put":"{key}","value":"{}"}}"#, choices.pick(&["", "aGk=", "=", "a"])),
    };
    let condition = |choices: &mut Choices<'_>, key: &str| {
        let is = [
            r#""absent":true"#,
            r#""absent":false"#,
            r#""etag":"00000000000000c1-1""#,
            r#""etag":"\"00000000000000c1-2\"""#,
            r#""etag":"x""#,
        ];
        format!(r#"{{"key":"{key}",{}}}"#, choices.pick(&is))
    };
    let (conditions, then, otherwise) =
        (list(choices, condition), list(choices, operation), list(choices, operation));
    let mut text =
        format!(r#"{{"if":[{conditions}],"then":[{then}],"else":[{otherwise}]}}"#).into_bytes();
    if choices.one_in(4) {
        choices.damage(&mut text);
    }
    text
}

/// Whatever a program asks: it is answered, an error is a problem document and changes nothing, and reads
/// and pages agree with what was written.
pub fn application_requests(data: &[u8]) {
    let mut choices = Choices(data);
    let (mut node, api) = Node::start();
    let budget = api.budget.clone();
    let store = api.store.clone();
    let (stop_tx, stopping) = watch::channel(());
    let service = application::service(application(api, &stopping));
    let mut tokens = vec![String::new(), "00000000000000c1-0-0000000000000001".to_owned()];
    let state = || store.view().checksum();
    let keys = || {
        let records = store.page(b"", None, usize::MAX, usize::MAX, |_| 0).records;
        records.iter().map(|it| (it.key().to_vec(), it.index())).collect::<Vec<_>>()
    };
    while !choices.is_empty() {
        let mut target = choices.pick(APPLICATION_PATHS).as_bytes().to_vec();
        let method = match target.starts_with(b"/v1/kv") {
            true => choices.pick(&["PUT", "PUT", "GET", "DELETE", "HEAD", "POST"]),
            false if target == b"/v1/txn" || target == b"/v1/retry-token" => "POST",
            false => "GET",
        };
        let mut method = method.as_bytes().to_vec();
        if choices.one_in(8) {
            choices.damage(&mut target);
        }
        if choices.one_in(16) {
            choices.damage(&mut method);
        }
        let mut headers = vec![("host".to_owned(), b"a".to_vec())];
        for _ in 0..choices.below(3) {
            let token = choices.pick(&tokens);
            let tags: &[&str] =
                &["*", "\"00000000000000c1-1\"", "W/\"00000000000000c1-1\"", "\"x\", \"y\"", "5"];
            let (name, values): (_, &[&str]) = match choices.below(6) {
                0 => ("if-match", tags),
                1 => ("if-none-match", tags),
                2 => ("raft-read", &["local", "linearizable"]),
                3 => ("last-event-id", &["00000000000000c1-1", "00000000000000c1-1.0", "1"]),
                _ => ("idempotency-key", &[&token]),
            };
            headers.push((name.to_owned(), header_value(&mut choices, values)));
        }
        let is_txn = target == b"/v1/txn";
        let body = if is_txn { transaction(&mut choices) } else { choices.bytes().to_vec() };
        let Some(request) = request(&method, &target, &headers, body.clone()) else { continue };
        let asked = format!("{request:?}");
        let (is_put, is_get) = (request.method() == Method::PUT, request.method() == Method::GET);
        let path = request.uri().path_and_query().map_or("", |target| target.as_str()).to_owned();
        let key = path.strip_prefix("/v1/kv").filter(|key| key.starts_with('/')).map(str::to_owned);
        let has_token = request.headers().contains_key("idempotency-key");
        let (before, keys_before) = ((state(), store.applied()), keys());
        let (head, answered) = RUNTIME.with(|runtime| {
            runtime.block_on(async {
                let (head, mut body) = node.until(call(&service, request)).await.into_parts();
                if path.starts_with("/v1/watch") && head.status == 200 {
                    // It has no end.
                    let event = body.frame().await.unwrap().unwrap();
                    return (head, event.into_data().unwrap());
                }
                (head, body.collect().await.expect("it is in memory").to_bytes())
            })
        });
        let status = head.status.as_u16();
        assert!(
            [200, 201, 204, 304, 400, 403, 404, 405, 409, 412, 413, 422, 501, 503]
                .contains(&status),
            "{asked} answered {status}: {answered:?}"
        );
        // The watchers of earlier requests may still hold their places.
        assert!(status != 503 || path.starts_with("/v1/watch"), "{asked}: {answered:?}");
        assert_eq!(head.headers["x-content-type-options"], "nosniff", "{asked}");
        assert_eq!(budget.available_bytes(), 10 * MAX_VALUE_BYTES, "a share was not given back");
        let replayed = head.headers.contains_key("idempotency-replayed");
        let changes_keys = !replayed && [200, 201, 204].contains(&status);
        if !changes_keys || is_get {
            // A condition that fails and a token that is refused are entries.
            let is_logged = [404, 412].contains(&status)
                || replayed
                || has_token && [400, 409, 422].contains(&status);
            assert!((state(), store.applied()) == before || is_logged, "{asked}");
            assert_eq!(keys(), keys_before, "{asked}");
        }
        if status >= 400 {
            let problem: serde_json::Value = serde_json::from_slice(&answered).expect("a problem");
            assert_eq!(problem["status"], status, "{asked}");
            assert!(problem["detail"].as_str().is_some_and(|why| !why.is_empty()), "{asked}");
        }
        if path == "/v1/retry-token" && status == 201 {
            let issued: serde_json::Value = serde_json::from_slice(&answered).unwrap();
            tokens.push(issued["token"].as_str().unwrap().to_owned());
        }
        let page = store.page(b"", None, usize::MAX, usize::MAX, |_| 0);
        assert!(page.records.is_sorted(), "{asked}");
        if let Some(key) = key {
            let found = page.records.iter().find(|record| record.key() == key.as_bytes());
            match status {
                201 | 204 if is_put && !replayed => {
                    assert_eq!(found.map(|record| record.value()), Some(&body[..]), "{asked}");
                }
                200 if is_get => {
                    assert_eq!(found.map(|record| record.value()), Some(&answered[..]), "{asked}");
                }
                _ => {}
            }
        }
    }
    // The task that wakes watchers ends only if it runs.
    drop(stop_tx);
    RUNTIME.with(|runtime| runtime.block_on(tokio::task::yield_now()));
}

// ---------------------------------------------------------------------------------------------
// The admin port

/// A status that an operator may find.
fn own_status(choices: &mut Choices<'_>, members: &Members) -> Status {
    let role = choices.pick(&[
        raft_node::Role::Leader,
        raft_node::Role::Follower,
        raft_node::Role::Learner,
        raft_node::Role::Bootstrapping,
        raft_node::Role::Quarantined,
    ]);
    let leader = choices.pick(&[1, 2, 0, u64::MAX]);
    Status {
        id: 1,
        role,
        leader,
        term: choices.number(1),
        commit: choices.number(9),
        applied: choices.number(9),
        // `/cluster` waits a second for the other members.
        members: Members { urls: [(1, url(1))].into(), ..members.clone() },
        ..Status::default()
    }
}

const ADMIN_PATHS: &[&str] = &[
    "/",
    "/page.css",
    "/page.js",
    "/livez",
    "/readyz",
    "/readyz?verbose",
    "/status",
    "/members",
    "/members/2",
    "/members/1",
    "/members/0",
    "/members/%ff",
    "/cluster",
    "/events",
    "/metrics",
    "/state-hash",
    "/snapshot",
    "/snapshot?local",
    "/transfer-leadership",
    "/transfer-leadership?to=1",
    "/transfer-leadership?to=%31&to=x",
    "/v1/kv/key",
    "/v1/kv/key",
    "/v1/kv/",
    "/v1/kv//%00?a=b",
    "/v1/kv",
    "http://a/v1/kv/b?c",
    "/v1/keys",
    "*",
];

/// True if a browser could have sent this for a page of another origin, told from what it says of
/// itself alone. Values that no browser writes are left out.
fn is_foreign(request: &Request<Body>) -> bool {
    let values = |name: &str| -> Vec<String> {
        let values = request.headers().get_all(name).iter();
        values.map(|value| String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase()).collect()
    };
    let hosts = values("host");
    let own: Vec<String> = match &hosts[..] {
        [host] if host.contains("evil.example") => return true,
        [host] => {
            let bare = host.trim_end_matches(":80").trim_end_matches(":443");
            let ports = ["", ":80", ":443"].map(|port| format!("{bare}{port}"));
            let schemes =
                |host: &String| ["http://", "https://"].map(|scheme| format!("{scheme}{host}"));
            ports.iter().chain([host]).flat_map(schemes).collect()
        }
        _ => Vec::new(),
    };
    let is_link = request.uri().path() == "/"
        && values("sec-fetch-mode").iter().all(|mode| mode == "navigate")
        && request.headers().contains_key("sec-fetch-mode");
    values("origin").iter().any(|origin| !own.contains(origin))
        || !is_link
            && values("sec-fetch-site").iter().any(|site| site != "same-origin" && site != "none")
}

fn admin_request(choices: &mut Choices<'_>) -> Option<(Request<Body>, Vec<u8>)> {
    let mut target = choices.pick(ADMIN_PATHS).as_bytes().to_vec();
    let usual = match target.starts_with(b"/members/") {
        true => choices.pick(&["POST", "PUT", "DELETE"]),
        false if target.starts_with(b"/transfer") => "POST",
        false => choices.pick(&["GET", "GET", "PUT"]),
    };
    let any = ["GET", "PUT", "POST", "DELETE", "HEAD", "OPTIONS", "CONNECT", "TRACE", "PATCH"];
    let method = if choices.one_in(4) { choices.pick(&any) } else { usual };
    let mut method = method.as_bytes().to_vec();
    if choices.one_in(16) {
        choices.damage(&mut method);
    }
    if choices.one_in(4) {
        choices.damage(&mut target);
    }
    let mut headers = Vec::new();
    let host = choices.pick(&[
        "127.0.0.1:1",
        "localhost",
        "node",
        "[::1]:80",
        "a.example:443",
        "evil.example",
    ]);
    for _ in 0..choices.pick(&[1, 1, 1, 1, 1, 1, 0, 2]) {
        headers.push(("host".to_owned(), header_value(choices, &[host])));
    }
    for _ in 0..choices.below(4) {
        let own = format!("http://{host}");
        let (name, values): (_, &[&str]) = match choices.below(6) {
            0 => {
                ("origin", &[&own, &own, "http://evil.example", "null", "https://127.0.0.1:1", ""])
            }
            1 => ("sec-fetch-site", &["same-origin", "none", "cross-site", "same-site", ""]),
            2 => ("sec-fetch-mode", &["navigate", "cors", "no-cors"]),
            3 => ("transfer-encoding", &["chunked", "gzip", "Chunked"]),
            4 => ("raft-read", &["local", "linearizable"]),
            _ => ("content-length", &["0", "5", "99999999999"]),
        };
        headers.push((name.to_owned(), header_value(choices, values)));
    }
    let body = match choices.below(4) {
        0 | 1 => url(choices.below(9) as u64).into_bytes(),
        _ => choices.bytes().to_vec(),
    };
    let mut request = request(&method, &target, &headers, body.clone())?;
    if choices.one_in(12) {
        *request.version_mut() = Version::HTTP_10;
    }
    Some((request, body))
}

/// The service starts a task.
fn admin_service(admin: Admin) -> impl HttpService<Body> {
    RUNTIME.with(|runtime| {
        let _inside = runtime.enter();
        admin::service(admin)
    })
}

/// Whatever an operator, or a page in a browser, asks at the admin port: it is answered, never with a
/// fault of the member's own, and a page of another origin changes and learns nothing.
pub fn admin_requests(data: &[u8]) {
    let mut choices = Choices(data);
    let (mut node, api) = Node::start();
    let budget = api.budget.clone();
    let api = HttpKvApi { port: "admin", names: vec!["a.example".to_owned()], ..api };
    let names = api.names.clone();
    let (status_tx, status) = watch::channel(own_status(&mut choices, &node.members));
    let (_stop_tx, stopping) = watch::channel(());
    let service = admin_service(Admin {
        status,
        metrics: Default::default(),
        cluster: Default::default(),
        application: application(api, &stopping),
        alive_within: Duration::from_secs(60),
        names,
        log_level: LogLevel::new(slog::Level::Info),
        stopping,
    });
    let mut model: HashMap<String, Vec<u8>> = HashMap::new();
    while !choices.is_empty() {
        if choices.one_in(8) {
            status_tx.send_replace(own_status(&mut choices, &node.members));
        }
        let Some((request, body)) = admin_request(&mut choices) else { continue };
        let (is_put, is_get) = (request.method() == Method::PUT, request.method() == Method::GET);
        let (is_delete, is_head) =
            (request.method() == Method::DELETE, request.method() == Method::HEAD);
        let path = request.uri().path().to_owned();
        let key = request
            .uri()
            .path_and_query()
            .and_then(|target| target.as_str().strip_prefix("/v1/kv"));
        let key = key.map(str::to_owned).filter(|_| path.starts_with("/v1/kv/"));
        let is_foreign = is_foreign(&request);
        let asked = format!("{request:?}");
        let before = node.requests;
        let (head, answered) = RUNTIME.with(|runtime| {
            runtime.block_on(async {
                let (head, mut body) = node.until(call(&service, request)).await.into_parts();
                if path == "/events" && is_get && head.status == 200 {
                    // It has no end.
                    let event = body.frame().await.unwrap().unwrap();
                    return (head, event.into_data().unwrap());
                }
                (head, body.collect().await.expect("it is in memory").to_bytes())
            })
        });
        let status = head.status.as_u16();
        let may_be_busy = ["/readyz", "/snapshot"].contains(&path.as_str());
        assert!(
            [200, 201, 204, 400, 403, 404, 405, 409, 410, 413, 501].contains(&status)
                || status == 503 && may_be_busy,
            "{path} answered {status}: {answered:?}"
        );
        let sniffing: Vec<_> = head.headers.get_all("x-content-type-options").iter().collect();
        assert_eq!(sniffing, ["nosniff"], "{path} answered {status}");
        assert_eq!(budget.available_bytes(), 10 * MAX_VALUE_BYTES, "a share was not given back");
        if is_foreign {
            assert!((400..500).contains(&status) || status == 501, "{asked} answered {status}");
            assert_eq!(node.requests, before, "{asked} was asked for another page");
        }
        if status >= 400 && status != 503 {
            let text = std::str::from_utf8(&answered).expect("an error is text");
            assert!(text.lines().count() <= 1, "{text:?}");
        }
        if let Some(key) = key {
            match status {
                201 | 204 if is_put => drop(model.insert(key, body)),
                204 | 404 if is_delete => drop(model.remove(&key)),
                200 => {
                    let found = model.get(&key).map(Vec::as_slice);
                    assert!((is_get || is_head) && Some(&answered[..]) == found);
                }
                404 => assert!((is_get || is_head) && !model.contains_key(&key), "{key}"),
                _ => {}
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Statuses of other members

fn status_of(choices: &mut Choices<'_>, id: NodeId) -> Status {
    let text = |choices: &mut Choices<'_>| match choices.below(4) {
        0 => {
            choices.pick(&["\x1b[2J", "\n", "a\u{9b}31m", "\u{202e}", "$(reboot)", "'"]).to_owned()
        }
        1 => String::from_utf8_lossy(choices.bytes()).into_owned(),
        _ => url(id),
    };
    let mut members = Members::default();
    let mut tick = TickStatus {
        uptime_ms: choices.number(1),
        version: if choices.one_in(2) { text(choices) } else { "0.1.0".to_owned() },
        wal_bytes: choices.number(1),
        puts: (choices.number(1), choices.number(1)),
        ..TickStatus::default()
    };
    for peer in 0..choices.below(4) as u64 {
        members.urls.insert(choices.number(peer), text(choices));
        let heard_ms = choices.one_in(2).then(|| choices.number(1));
        let progress = choices.one_in(2).then(Default::default);
        tick.peers.insert(peer, PeerStatus { heard_ms, progress, ..PeerStatus::default() });
    }
    Status {
        id: choices.number(id),
        leader: choices.number(id),
        begun: choices.one_in(2),
        learners: vec![choices.number(1); choices.below(3)],
        members,
        tick,
        ..own_status(choices, &Members::default())
    }
}

/// The tables of the commands control no terminal.
fn assert_is_printable(printed: &str) {
    let is_bad = |c: char| c.is_control() && c != '\n';
    assert!(!printed.contains(is_bad), "{printed:?}");
}

/// Whatever a member answers when it is asked for its status: it is shown as that member's, or not at
/// all, and what commands print of it, or of any answer of an admin port, controls no terminal.
pub fn status_answers(data: &[u8]) {
    const OTHER: NodeId = 2;
    let mut choices = Choices(data);
    if choices.one_in(2) {
        let answer = configuration::admin_answer(&mut choices);
        if let Some(printed) = commands::printed(&answer) {
            assert_is_printable(&printed);
        }
        return;
    }
    let sound = status_of(&mut choices, OTHER);
    let mut encoded = codec::encode(&sound);
    if choices.one_in(2) {
        choices.damage(&mut encoded);
    }
    let decoded = codec::decode::<Status>(&encoded).ok();
    if let Some(status) = &decoded {
        // A map may have come in another order, or with a key twice.
        let again = codec::encode(status);
        assert_eq!(codec::decode::<Status>(&again).as_ref().ok(), Some(status));
        assert!(again.len() <= encoded.len());
    }
    let cluster = Arc::<ClusterWatch>::default();
    // `/cluster` waits for an answer to a question that is newer than the request.
    let asked = tokio::time::Instant::now() + Duration::from_secs(60);
    cluster.take_answer(OTHER, asked, &encoded);
    let statuses = cluster.watch();
    let is_shown = statuses.borrow().contains_key(&OTHER);
    assert_eq!(is_shown, decoded.as_ref().is_some_and(|status| status.id == OTHER));
    // Without an answer, `/cluster` waits for one.
    let Some(status) = decoded.filter(|_| is_shown) else { return };
    let urls = [(1, url(1)), (OTHER, url(OTHER))];
    let members = Members { urls: urls.into(), ..Members::default() };
    let own = Status { id: 1, leader: 1, members, ..Status::default() };
    let (_stop_tx, stopping) = watch::channel(());
    let service = admin_service(Admin {
        status: watch::channel(own).1,
        metrics: Default::default(),
        cluster,
        application: application(Node::start().1, &stopping),
        alive_within: Duration::from_secs(60),
        names: Vec::new(),
        log_level: LogLevel::new(slog::Level::Info),
        stopping,
    });
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = Uri::from_static("/cluster");
    request.headers_mut().insert("host", HeaderValue::from_static("a"));
    let body = RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let answer = call(&service, request).await;
            assert_eq!(answer.status(), 200);
            answer.into_body().collect().await.expect("it is in memory").to_bytes()
        })
    });
    let printed = commands::printed(&body).expect("it is JSON");
    assert_is_printable(&printed);
    let json: serde_json::Value = serde_json::from_slice(&body).unwrap();
    let shown = &json["members"][1];
    assert_eq!((&shown["id"], &shown["status"]["id"]), (&OTHER.into(), &OTHER.into()));
    assert_eq!(shown["status"]["term"], status.term);
    assert_eq!(shown["status"]["version"], *status.tick.version);
}
