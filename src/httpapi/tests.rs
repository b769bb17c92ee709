//! The answers of the client port, compared as bytes, in front of a node that is made up.

use std::sync::Mutex;

use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use super::*;
use crate::channels::{
    BacklogPermit, Commit, CommittedEntry, ConfChangeRequest, Proposal, ReadRequest, Requests,
    Responder,
};
use crate::kvstore::Keys;
use crate::ports::listener::tests::{Server, read_to_end, read_until};
use crate::ports::listener::{Limits, ResponseBudget};
use crate::raft_node::NodeConfig;
use crate::raft_node::state_machine::CommitReader;

/// What the made-up node does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Conduct {
    /// Commits it at once.
    Answers,
    /// Takes it and finds no leader.
    Holds,
    /// Proposes it and never hears of it again.
    Loses,
    /// Never looks at it.
    Sleeps,
    /// Has stopped.
    Stopped,
}

/// A member that consists of its client port.
struct Member {
    server: Server,
    changes: Arc<Mutex<Vec<MemberRequest>>>,
    budget: BodyBudget,
}

struct Node {
    conduct: Conduct,
    commits: CommitReader<Keys>,
    propose_rx: mpsc::Receiver<Proposal>,
    read_rx: mpsc::Receiver<ReadRequest>,
    conf_change_rx: mpsc::Receiver<ConfChangeRequest>,
    changes: Arc<Mutex<Vec<MemberRequest>>>,
    index: Index,
}

const MAX_VALUE_BYTES: usize = 100_000;
const CHANNEL_REQUESTS: usize = 16;
const TERM: Term = 7;

impl Member {
    async fn start(conduct: Conduct) -> Self {
        Self::start_with(conduct, |_| {}).await
    }

    async fn start_with(conduct: Conduct, adapt: impl FnOnce(&mut HttpKvApi)) -> Self {
        let logger = Logger::root(slog::Discard, slog::o!());
        let (propose_tx, propose_rx) = mpsc::channel(CHANNEL_REQUESTS);
        let (read_tx, read_rx) = mpsc::channel(CHANNEL_REQUESTS);
        let (conf_change_tx, conf_change_rx) = mpsc::channel(CHANNEL_REQUESTS);
        let requests = Requests { propose_tx, read_tx, conf_change_tx };
        let (store, mut commits) = KvStore::new(&NodeConfig::default(), requests, logger.clone());
        commits.handle(Commit::Replayed).expect("nothing to fail");
        let changes = Arc::default();
        let mut api = HttpKvApi {
            port: "client",
            store,
            ack: Ack::Committed,
            read: Consistency::Linearizable,
            request_timeout: Duration::from_secs(20),
            max_value_bytes: MAX_VALUE_BYTES,
            budget: BodyBudget::default(),
            responses: ResponseBudget::default(),
            names: Vec::new(),
            metrics: Default::default(),
            logger,
        };
        adapt(&mut api);
        let budget = api.budget.clone();
        let server = Server::start(service(api), Limits::default()).await;
        let node = Node {
            conduct,
            commits,
            propose_rx,
            read_rx,
            conf_change_rx,
            changes: Arc::clone(&changes),
            index: 0,
        };
        if conduct != Conduct::Stopped {
            tokio::spawn(node.run());
        }
        Self { server, changes, budget }
    }

    /// Sends `request`, closes the sending side, and reads the one answer.
    async fn send(&self, request: impl AsRef<[u8]>) -> Answer {
        let mut client = self.server.connect().await;
        client.write_all(request.as_ref()).await.expect("the server listens");
        client.shutdown().await.expect("the server listens");
        Answer::parse(&read_to_end(&mut client).await)
    }

    /// Sends a request whose client keeps the connection open until it has the answer.
    async fn send_and_stay(&self, request: impl AsRef<[u8]>) -> Answer {
        let mut client = self.server.connect().await;
        client.write_all(request.as_ref()).await.expect("the server listens");
        let head = read_until(&mut client, b"\r\n\r\n").await;
        let mut answer = Answer::parse(&head);
        if answer.header("Content-Length").is_some() {
            answer.body = read_until(&mut client, b"\n").await;
        }
        answer
    }

    async fn put(&self, key: &str, value: &[u8]) -> Answer {
        let head =
            format!("PUT {key} HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n", value.len());
        self.send([head.as_bytes(), value].concat()).await
    }

    async fn get(&self, key: &str) -> Answer {
        self.send(format!("GET {key} HTTP/1.1\r\nHost: h\r\n\r\n")).await
    }

    async fn post(&self, key: &str, url: &[u8]) -> Answer {
        let head =
            format!("POST {key} HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n", url.len());
        self.send([head.as_bytes(), url].concat()).await
    }

    async fn delete(&self, key: &str) -> Answer {
        self.send(format!("DELETE {key} HTTP/1.1\r\nHost: h\r\n\r\n")).await
    }

    fn take_changes(&self) -> Vec<MemberRequest> {
        std::mem::take(&mut self.changes.lock().expect("no test panics with it"))
    }
}

impl Node {
    async fn run(mut self) {
        if self.conduct == Conduct::Sleeps {
            return std::future::pending().await;
        }
        let mut lost: Vec<Box<dyn std::any::Any + Send>> = Vec::new();
        loop {
            tokio::select! {
                Some(proposal) = self.propose_rx.recv() => match self.conduct {
                    Conduct::Answers => self.commit(proposal),
                    _ => lost.push(Box::new(self.keep(proposal.responder))),
                },
                Some(read) = self.read_rx.recv() => match self.conduct {
                    Conduct::Answers => self.handle(Commit::Reads(vec![read.responder])),
                    _ => lost.push(Box::new(read.responder)),
                },
                Some(request) = self.conf_change_rx.recv() => match self.conduct {
                    Conduct::Answers => self.change(request),
                    _ => lost.push(Box::new(self.keep(request.responder))),
                },
                else => return,
            }
        }
    }

    fn keep<T>(&self, responder: Responder<T>) -> Responder<T> {
        if self.conduct == Conduct::Loses {
            assert!(responder.mark_proposed());
        }
        responder
    }

    fn handle(&mut self, commit: Commit) {
        self.commits.handle(commit).expect("no snapshot, no error");
    }

    fn commit(&mut self, Proposal { data, ack, responder }: Proposal) {
        self.index += 1;
        let responder = match ack {
            Ack::Committed => Some(responder),
            Ack::Proposed => {
                responder.answer(Ok(Acknowledged::Proposed));
                None
            }
        };
        let entry = CommittedEntry { index: self.index, term: TERM, data, responder };
        let applied = BacklogPermit::new(0, &Arc::default());
        self.handle(Commit::Entries { entries: vec![entry], applied });
    }

    /// Refuses the ids 400 to 504 with that status, and takes all others.
    fn change(&mut self, ConfChangeRequest { change, forwarded, responder }: ConfChangeRequest) {
        assert!(!forwarded, "a client's request was passed on by nobody");
        let (MemberRequest::Add { id, .. } | MemberRequest::Remove { id }) = change else {
            panic!("the client port asks for no {change:?}");
        };
        self.changes.lock().expect("no test panics with it").push(change);
        responder.answer(match id {
            400 => Err(RequestError::Invalid("first\r\nsecond".to_owned())),
            409 => Err(RequestError::Conflict("not now".to_owned())),
            410 => Err(RequestError::Gone("never again".to_owned())),
            503 => Err(RequestError::Unavailable("no leader".to_owned())),
            504 => Err(RequestError::Unknown("no word".to_owned())),
            _ => Ok(()),
        });
    }
}

/// An answer as it came: its header lines are sorted, and `Date` is left out.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: String,
    headers: Vec<String>,
    body: Vec<u8>,
}

impl Answer {
    fn new(status: &str, headers: &[&str], body: &[u8]) -> Self {
        let mut headers: Vec<String> = headers.iter().map(|line| (*line).to_owned()).collect();
        headers.sort_unstable();
        Self { status: format!("HTTP/1.1 {status}"), headers, body: body.to_owned() }
    }

    /// An answer that says no in `body`, a line without its end.
    fn no(status: &str, body: &str) -> Self {
        Self::no_with(status, &[], body)
    }

    fn no_with(status: &str, headers: &[&str], body: &str) -> Self {
        let length = format!("Content-Length: {}", body.len() + 1);
        let common =
            ["Content-Type: text/plain; charset=utf-8", "X-Content-Type-Options: nosniff", &length];
        Self::new(status, &[&common, headers].concat(), format!("{body}\n").as_bytes())
    }

    /// The answer to a PUT that entry `index` wrote.
    fn written(index: Index) -> Self {
        Self::new("204 No Content", &[&format!("Raft-Index: {index}"), "Raft-Term: 7"], b"")
    }

    /// The answer to a GET of what entry `index` wrote.
    fn found(index: Index, body: &[u8]) -> Self {
        let length = format!("Content-Length: {}", body.len());
        let index = format!("Raft-Index: {index}");
        let headers = [
            "Content-Type: application/octet-stream",
            "X-Content-Type-Options: nosniff",
            &length,
            &index,
            "Raft-Term: 7",
        ];
        Self::new("200 OK", &headers, body)
    }

    fn not_found() -> Self {
        Self::no("404 Not Found", "Failed to GET")
    }

    fn bad_request(body: &str) -> Self {
        Self::no("400 Bad Request", body)
    }

    fn parse(bytes: &[u8]) -> Self {
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").unwrap_or_else(|| {
            panic!("{:?} has no end of its head", String::from_utf8_lossy(bytes))
        });
        let head = std::str::from_utf8(&bytes[..end]).expect("a head is text");
        let mut lines = head.split("\r\n").map(str::to_owned);
        let status = lines.next().expect("a head has lines");
        let mut headers: Vec<String> = lines.filter(|line| !line.starts_with("Date: ")).collect();
        headers.sort_unstable();
        Self { status, headers, body: bytes[end + 4..].to_owned() }
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    /// This answer on a connection that ends with it.
    fn closing(mut self) -> Self {
        self.headers.push("Connection: close".to_owned());
        self.headers.sort_unstable();
        self
    }
}

/// Keys that a server with manners would take for one another, or would not take.
const KEYS: [&str; 13] = [
    "/",
    "/k",
    "/k/",
    "/k?x=1",
    "/k?",
    "/%6b",
    "//k",
    "/a/../k",
    "/K",
    "/k;%2F%",
    "/\u{e9}",
    "*",
    "http://h/k",
];

#[tokio::test]
async fn keys_are_raw_targets() {
    let member = Member::start(Conduct::Answers).await;
    for key in KEYS {
        assert_eq!(member.get(key).await, Answer::not_found(), "GET {key} before");
    }
    for (index, key) in (1..).zip(KEYS) {
        assert_eq!(member.put(key, key.as_bytes()).await, Answer::written(index), "PUT {key}");
    }
    for (index, key) in (1..).zip(KEYS) {
        let expected = Answer::found(index, key.as_bytes());
        assert_eq!(member.get(key).await, expected, "GET {key} after");
    }
}

#[tokio::test]
async fn values_are_bytes() {
    let member = Member::start(Conduct::Answers).await;
    let every_byte: Vec<u8> = (0..=255).collect();
    let large = vec![b'v'; MAX_VALUE_BYTES];
    for (index, value) in
        (1..).zip([&b""[..], b"v", b"\xff\xfe\0A", b"\r\n\r\n", &every_byte, &large])
    {
        assert_eq!(member.put("/k", value).await, Answer::written(index));
        assert_eq!(member.get("/k").await, Answer::found(index, value));
    }
    assert_eq!(member.budget.available_bytes(), BodyBudget::DEFAULT_BYTES);
}

#[tokio::test]
async fn put_takes_bodies_of_every_framing() {
    let member = Member::start(Conduct::Answers).await;
    let put = "PUT /k HTTP/1.1\r\nHost: h\r\n";
    let chunked = format!(
        "{put}Transfer-Encoding: chunked\r\n\r\n3\r\nab\n\r\n2;x=y\r\ncd\r\n0\r\nTrailer: t\r\n\r\n"
    );
    assert_eq!(member.send(chunked).await, Answer::written(1));
    assert_eq!(member.get("/k").await, Answer::found(1, b"ab\ncd"));
    assert_eq!(member.send(format!("{put}\r\n")).await, Answer::written(2));
    assert_eq!(member.get("/k").await, Answer::found(2, b""));

    let mut client = member.server.connect().await;
    let head = format!("{put}Expect: 100-continue\r\nContent-Length: 1\r\n\r\n");
    client.write_all(head.as_bytes()).await.expect("the server listens");
    assert_eq!(read_until(&mut client, b"\r\n\r\n").await, b"HTTP/1.1 100 Continue\r\n\r\n");
    client.write_all(b"v").await.expect("the server listens");
    let head = read_until(&mut client, b"\r\n\r\n").await;
    assert_eq!(Answer::parse(&head), Answer::written(3));
    // The connection goes on.
    client
        .write_all(b"GET /k HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        .await
        .expect("open");
    let answer = Answer::parse(&read_to_end(&mut client).await);
    assert_eq!(answer, Answer::found(3, b"v").closing());
}

#[tokio::test]
async fn body_that_breaks_off_is_answered_400() {
    let member = Member::start(Conduct::Answers).await;
    for method in ["PUT", "POST"] {
        let expected = || Answer::bad_request(&format!("Failed on {method}"));
        let head = format!("{method} /1 HTTP/1.1\r\nHost: h\r\n");
        for rest in [
            "Content-Length: 10\r\n\r\nabc",
            "Content-Length: 10\r\n\r\n",
            "Transfer-Encoding: chunked\r\n\r\n5\r\nab",
            "Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n",
            "Transfer-Encoding: chunked\r\n\r\n",
            "Transfer-Encoding: chunked\r\n\r\nno number\r\n",
        ] {
            let answer = member.send(format!("{head}{rest}")).await;
            assert_eq!(answer, expected().closing(), "{method} {rest:?}");
        }
    }
    assert_eq!(member.get("/1").await, Answer::not_found());
    assert_eq!(member.take_changes(), []);
    assert_eq!(member.budget.available_bytes(), BodyBudget::DEFAULT_BYTES);
}

#[tokio::test]
async fn post_and_delete_change_members() {
    let member = Member::start(Conduct::Answers).await;
    let done = || Answer::new("204 No Content", &[], b"");
    assert_eq!(member.post("/4", b"http://127.0.0.1:42379").await, done());
    assert_eq!(member.post("/0x10", b"").await, done());
    assert_eq!(member.delete("/010").await, done());
    let add = |id, url: &str| MemberRequest::Add { id, url: url.to_owned() };
    let expected = [add(4, "http://127.0.0.1:42379"), add(16, ""), MemberRequest::Remove { id: 8 }];
    assert_eq!(member.take_changes(), expected);
}

#[tokio::test]
async fn ids_that_do_not_parse_are_answered_400() {
    let member = Member::start(Conduct::Answers).await;
    for key in ["/", "/4?x=1", "/%34", "/4/5", "/1_", "/0x", "/+1", "/-1", "//4", "*", "http://h/4"]
    {
        let (post, delete) = (member.post(key, b"url").await, member.delete(key).await);
        assert_eq!(post, Answer::bad_request("Failed on POST"), "POST {key}");
        let why = format!("Failed on DELETE{NO_KEY_IS_DELETED}");
        assert_eq!(delete, Answer::bad_request(&why), "DELETE {key}");
    }
    let not_text = member.post("/4", b"\xff").await;
    assert_eq!(not_text, Answer::bad_request("the body must be the member's peer URL in UTF-8"));
    assert_eq!(member.take_changes(), []);
}

#[tokio::test]
async fn refusals_of_the_node_become_statuses() {
    let member = Member::start(Conduct::Answers).await;
    let retry = ["Retry-After: 1"];
    for (id, expected) in [
        ("/400", Answer::bad_request("first  second")),
        ("/409", Answer::no("409 Conflict", "not now")),
        ("/410", Answer::no("410 Gone", "never again")),
        ("/503", Answer::no_with("503 Service Unavailable", &retry, "no leader")),
        ("/504", Answer::no("504 Gateway Timeout", "no word")),
    ] {
        assert_eq!(member.post(id, b"http://h:1").await, expected, "POST {id}");
        assert_eq!(member.delete(id).await, expected, "DELETE {id}");
    }
}

#[tokio::test]
async fn other_methods_are_answered_405() {
    let member = Member::start(Conduct::Answers).await;
    let allow = ["Allow: PUT", "Allow: GET", "Allow: POST", "Allow: DELETE"];
    let expected = || Answer::no_with("405 Method Not Allowed", &allow, "Method not allowed");
    for request in
        ["OPTIONS /k", "OPTIONS *", "PATCH /k", "TRACE /k", "get /k", "BREW /k", "CONNECT h:1"]
    {
        let answer = member.send(format!("{request} HTTP/1.1\r\nHost: h\r\n\r\n")).await;
        assert_eq!(answer, expected(), "{request}");
    }
    let head = member.send("HEAD /k HTTP/1.1\r\nHost: h\r\n\r\n").await;
    assert_eq!(head, Answer { body: Vec::new(), ..expected() });
    let bare = member.get("k").await;
    assert_eq!(bare, Answer::bad_request("a key must start with a slash"));
}

/// A fault of hyper's targets, written down: what follows a `#` is lost, so these are one key.
#[tokio::test]
async fn fragment_is_no_part_of_the_key() {
    let member = Member::start(Conduct::Answers).await;
    assert_eq!(member.put("/k#x", b"v").await, Answer::written(1));
    assert_eq!(member.get("/k").await, Answer::found(1, b"v"));
}

#[tokio::test]
async fn foreign_pages_are_answered_403() {
    let member = Member::start(Conduct::Answers).await;
    for (lines, own) in [
        ("Host: h.example:9121\r\nOrigin: http://h.example:9121", false),
        ("Host: h.example:9121", false),
        ("Host: h:9121\r\nOrigin: http://h:9121", true),
        ("Host: localhost:9121\r\nSec-Fetch-Site: cross-site", false),
        ("Host: localhost:9121\r\nOrigin: http://localhost:9121", true),
        ("Host: LOCALHOST:9121\r\nOrigin: HTTP://localhost:9121", true),
        ("Host: localhost\r\nOrigin: http://localhost", true),
        ("Host: localhost:80\r\nOrigin: http://localhost", true),
        ("Host: localhost\r\nOrigin: http://localhost:80", true),
        ("Host: localhost:443\r\nOrigin: https://localhost", true),
        ("Host: [::1]:9121\r\nOrigin: http://[::1]:9121", true),
        ("Host: localhost:9121\r\nOrigin: http://evil", false),
        ("Host: localhost:9121\r\nOrigin: http://localhost", false),
        ("Host: localhost:9121\r\nOrigin: http://localhost:9122", false),
        ("Host: localhost\r\nOrigin: http://localhost:443", false),
        ("Host: localhost:443\r\nOrigin: http://localhost", false),
        ("Host: localhost\r\nOrigin: null", false),
        ("Host: localhost\r\nOrigin: localhost", false),
        ("Host: localhost\r\nOrigin:", false),
        ("Host: localhost\r\nOrigin: http://localhost/", false),
        ("Host: localhost\r\nOrigin: file://localhost", false),
        ("Host: localhost\r\nOrigin: http://\u{e9}", false),
        ("Host: localhost\r\nOrigin: http://localhost\r\nOrigin: http://evil", false),
        ("Host: localhost\r\nHost: evil\r\nOrigin: http://evil", false),
        ("Origin: http://h", false),
    ] {
        for method in ["DELETE", "BREW"] {
            let answer = member.send(format!("{method} /4 HTTP/1.1\r\n{lines}\r\n\r\n")).await;
            let refused = ["HTTP/1.1 400 Bad Request", "HTTP/1.1 403 Forbidden"];
            let refused =
                refused.contains(&&*answer.status) && !answer.body.starts_with(b"Failed on DELETE");
            assert_eq!(refused, !own, "{method} with {lines:?}: {answer:?}");
        }
        assert_eq!(member.take_changes().len(), usize::from(own), "with {lines:?}");
    }
}

/// The refusal comes before the body, and the client that is still sending it gets the refusal.
#[tokio::test]
async fn large_bodies_are_answered_413() {
    let member = Member::start(Conduct::Answers).await;
    for (method, max_bytes) in [("PUT", MAX_VALUE_BYTES), ("POST", URL_BYTES_MAX)] {
        let why = format!("the body is larger than {max_bytes} bytes");
        let expected = || Answer::no("413 Payload Too Large", &why).closing();
        let head = format!("{method} /4 HTTP/1.1\r\nHost: h\r\n");
        let body = "b".repeat(max_bytes + 1);
        let length = format!("{head}Content-Length: {}\r\n", body.len());
        let asking = format!("{length}Expect: 100-continue\r\n\r\n");
        let announced = format!("{length}\r\n");
        let whole = format!("{length}\r\n{body}");
        let chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}", body.len());
        for request in [asking, announced, whole, chunked] {
            let answer = member.send_and_stay(&request).await;
            assert_eq!(answer, expected(), "{:?}", &request[..request.len().min(100)]);
        }
    }
    assert_eq!(member.get("/4").await, Answer::not_found());
    assert_eq!(member.take_changes(), []);
}

#[tokio::test]
async fn full_budget_is_answered_503() {
    let member = Member::start_with(Conduct::Answers, |api| api.budget = BodyBudget::new(3)).await;
    let why = "too many bytes of other requests are in flight: nothing was changed; try again";
    let expected = Answer::no_with("503 Service Unavailable", &["Retry-After: 1"], why);
    assert_eq!(member.put("/k", b"four").await, expected.closing());
    assert_eq!(member.put("/k", b"yes").await, Answer::written(1));
}

/// Gives a member a deadline that passes soon.
fn hasty(api: &mut HttpKvApi) {
    api.request_timeout = Duration::from_millis(50);
}

#[tokio::test]
async fn slow_body_is_answered_408() {
    let member = Member::start_with(Conduct::Answers, hasty).await;
    let request = "PUT /k HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nv";
    let answer = member.send_and_stay(request).await;
    let why = "the body did not arrive in time: nothing was changed; \
               send it faster, or in smaller parts";
    assert_eq!(answer, Answer::no("408 Request Timeout", why).closing());
}

#[tokio::test]
async fn requests_without_a_leader_are_answered_503() {
    let member = Member::start_with(Conduct::Holds, hasty).await;
    let why = "the deadline passed before a leader took the request (does a majority of the members run?): nothing was changed; try again";
    let expected = Answer::no_with("503 Service Unavailable", &["Retry-After: 1"], why);
    assert_eq!(member.put("/k", b"v").await, expected);
    assert_eq!(member.get("/k").await, expected);
    assert_eq!(member.post("/4", b"http://h:1").await, expected);
    assert_eq!(member.delete("/4").await, expected);
}

#[tokio::test]
async fn requests_that_were_lost_are_answered_504() {
    let member = Member::start_with(Conduct::Loses, hasty).await;
    let why = "the deadline passed before the outcome was known: it may or may not have been \
               carried out; read before repeating it";
    let expected = Answer::no("504 Gateway Timeout", why);
    assert_eq!(member.put("/k", b"v").await, expected);
    assert_eq!(member.post("/4", b"http://h:1").await, expected);
    assert_eq!(member.delete("/4").await, expected);
}

#[tokio::test]
async fn stopped_node_is_answered_503_at_once() {
    let member = Member::start(Conduct::Stopped).await;
    let why = "this member is stopping: nothing was changed; try again";
    let expected = Answer::no_with("503 Service Unavailable", &["Retry-After: 1"], why);
    assert_eq!(member.put("/k", b"v").await, expected);
    assert_eq!(member.get("/k").await, expected);
    assert_eq!(member.post("/4", b"http://h:1").await, expected);
    assert_eq!(member.delete("/4").await, expected);
}

/// A request whose client gave up leaves its place only when the node comes by.
#[tokio::test]
async fn requests_beyond_what_channels_hold_are_answered_503_at_once() {
    let hastier = |api: &mut HttpKvApi| api.request_timeout = Duration::from_millis(5);
    let member = Member::start_with(Conduct::Sleeps, hastier).await;
    let why = "too many requests are waiting: nothing was changed; try again";
    let expected = Answer::no_with("503 Service Unavailable", &["Retry-After: 1"], why);
    for _ in 0..CHANNEL_REQUESTS {
        assert_ne!(member.put("/k", b"v").await, expected);
        assert_ne!(member.get("/k").await, expected);
        assert_ne!(member.delete("/4").await, expected);
    }
    assert_eq!(member.put("/k", b"v").await, expected);
    assert_eq!(member.get("/k").await, expected);
    assert_eq!(member.post("/4", b"http://h:1").await, expected);
    assert_eq!(member.delete("/4").await, expected);
}

/// `--ack proposed`: the answer is the original's, and names no entry.
#[tokio::test]
async fn proposed_write_names_no_entry() {
    let member = Member::start_with(Conduct::Answers, |api| api.ack = Ack::Proposed).await;
    assert_eq!(member.put("/k", b"v").await, Answer::new("204 No Content", &[], b""));
}

/// A node without a leader still answers local reads.
#[tokio::test]
async fn header_chooses_the_consistency_of_one_read() {
    let read = |lines: &str| format!("GET /k HTTP/1.1\r\nHost: h\r\n{lines}\r\n");
    let local = read("Raft-Read: local\r\n");
    let linearizable = read("raft-read: linearizable\r\n");
    let member = Member::start_with(Conduct::Holds, hasty).await;
    assert_eq!(member.send(&local).await, Answer::not_found());
    assert_eq!(member.send(read("")).await.status, "HTTP/1.1 503 Service Unavailable");
    let member = Member::start_with(Conduct::Holds, |api| {
        hasty(api);
        api.read = Consistency::Local;
    })
    .await;
    assert_eq!(member.send(read("")).await, Answer::not_found());
    assert_eq!(member.send(&linearizable).await.status, "HTTP/1.1 503 Service Unavailable");
    let wrong = Answer::bad_request("Raft-Read must be linearizable or local");
    for lines in
        ["Raft-Read: stale\r\n", "Raft-Read:\r\n", "Raft-Read: local\r\nRaft-Read: local\r\n"]
    {
        assert_eq!(member.send(read(lines)).await, wrong, "{lines:?}");
    }
}

/// The examples of the original, and the corners of Go's grammar.
#[test]
fn parse_uint_is_the_one_of_go() {
    const SYNTAX: &str = "invalid syntax";
    const RANGE: &str = "value out of range";
    for (text, expected) in [
        ("0", Ok(0)),
        ("4", Ok(4)),
        ("0x10", Ok(16)),
        ("0X1f", Ok(31)),
        ("0xFf", Ok(255)),
        ("010", Ok(8)),
        ("00", Ok(0)),
        ("0o10", Ok(8)),
        ("0O17", Ok(15)),
        ("0b11", Ok(3)),
        ("0B1", Ok(1)),
        ("1_000", Ok(1000)),
        ("0x_ff", Ok(255)),
        ("0_7", Ok(7)),
        ("0b_1_0", Ok(2)),
        ("18446744073709551615", Ok(u64::MAX)),
        ("0xffffffffffffffff", Ok(u64::MAX)),
        ("01777777777777777777777", Ok(u64::MAX)),
        ("18446744073709551616", Err(RANGE)),
        ("0x10000000000000000", Err(RANGE)),
        ("99999999999999999999999", Err(RANGE)),
        ("", Err(SYNTAX)),
        ("+1", Err(SYNTAX)),
        ("-1", Err(SYNTAX)),
        ("-0", Err(SYNTAX)),
        ("4?x=1", Err(SYNTAX)),
        ("%34", Err(SYNTAX)),
        ("4/5", Err(SYNTAX)),
        ("1_", Err(SYNTAX)),
        ("_1", Err(SYNTAX)),
        ("1__0", Err(SYNTAX)),
        ("_", Err(SYNTAX)),
        ("0_", Err(SYNTAX)),
        ("0x", Err(SYNTAX)),
        ("0b", Err(SYNTAX)),
        ("0x_", Err(SYNTAX)),
        ("0_x1", Err(SYNTAX)),
        ("08", Err(SYNTAX)),
        ("0b2", Err(SYNTAX)),
        ("0o8", Err(SYNTAX)),
        ("1a", Err(SYNTAX)),
        ("0xg", Err(SYNTAX)),
        (" 1", Err(SYNTAX)),
        ("1 ", Err(SYNTAX)),
        ("\u{661}", Err(SYNTAX)),
    ] {
        assert_eq!(parse_uint(text), expected, "{text:?}");
    }
}
