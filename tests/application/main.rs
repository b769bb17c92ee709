//! The application port, in front of a cluster of one member: each request and its responses, each error,
//! and the OpenAPI description, which every exchange is checked against.

#![allow(clippy::unwrap_used, missing_docs)]

mod bad_input;
mod description;
mod keys;
mod tokens;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use raftexample::channels::Ack;
use raftexample::httpapi::{self, HttpKvApi};
use raftexample::kvstore::{Consistency, KvStore};
use raftexample::ports::application::{self, Application, Wakeups};
use raftexample::ports::listener::{HttpService, Limits, serve};
use raftexample::ports::tls::no_tls;
use raftexample::raft_node::{NodeConfig, RaftNodeHandle};
use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode};
use serde_json::Value;
use slog::Logger;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch as channel};

const MAX_VALUE_BYTES: usize = 100_000;
const WATCHERS: usize = 8;
/// How long a test waits for something that should be there at once.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A member with its client and application ports.
pub struct Member {
    pub store: KvStore,
    pub url: String,
    pub client_url: String,
    pub http: reqwest::Client,
    _node: RaftNodeHandle,
    _stop_tx: channel::Sender<()>,
    _dir: tempfile::TempDir,
}

/// A response.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    pub fn etag(&self) -> String {
        self.header("etag").expect("it has an ETag").to_owned()
    }

    pub fn index(&self) -> u64 {
        self.header("raft-index").expect("it names an entry").parse().unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The detail of a problem document with this status.
    pub fn problem(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{self:?}");
        self.json()["detail"].as_str().unwrap().to_owned()
    }
}

async fn listen(service: impl HttpService, stop_rx: channel::Receiver<()>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let stopped = async move {
        let mut stop_rx = stop_rx;
        let _ = stop_rx.changed().await;
    };
    let logger = Logger::root(slog::Discard, slog::o!());
    tokio::spawn(serve(listener, service, Limits::default(), stopped, logger));
    url
}

impl Member {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let logger = Logger::root(slog::Discard, slog::o!());
        let config = NodeConfig {
            data_dir: dir.path().to_owned(),
            tick: Duration::from_millis(10),
            election_ticks: 5,
            randomized_election_ticks: 5..10,
            ..NodeConfig::default()
        };
        let metrics = config.metrics.clone();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (store, node) = KvStore::start(config, listener, logger.clone());
        let api = |port| HttpKvApi {
            port,
            store: store.clone(),
            ack: Ack::Committed,
            read: Consistency::Linearizable,
            request_timeout: PATIENCE,
            max_value_bytes: MAX_VALUE_BYTES,
            budget: Default::default(),
            responses: Default::default(),
            names: Vec::new(),
            metrics: metrics.clone(),
            logger: logger.clone(),
        };
        let (stop_tx, stop_rx) = channel::channel(());
        let application = Arc::new(Application {
            keys: api("application"),
            status: node.status.clone(),
            wakeups: Wakeups::start(store.clone(), metrics.clone(), stop_rx.clone()),
            watchers: Arc::new(Semaphore::new(WATCHERS)),
            stopping: stop_rx.clone(),
        });
        let url = listen(application::service(application), stop_rx.clone()).await;
        let client_url = listen(httpapi::service(api("client")), stop_rx).await;
        let http = reqwest::Client::builder().no_proxy().tls_backend_preconfigured(no_tls());
        let http = http.build().unwrap();
        Self { store, url, client_url, http, _node: node, _stop_tx: stop_tx, _dir: dir }
    }

    /// Sends a request, and checks the response against the description.
    pub async fn send(
        &self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        let answer = self.send_to(&self.url, method, target, headers, body.into()).await;
        description::check(method, target, &answer);
        answer
    }

    pub async fn send_to(
        &self,
        url: &str,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Answer {
        let method: Method = method.parse().unwrap();
        let mut request = self.http.request(method, format!("{url}{target}")).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Answer { status, headers, body: response.bytes().await.unwrap() }
    }

    pub async fn get(&self, target: &str) -> Answer {
        self.send("GET", target, &[], "").await
    }

    pub async fn put(&self, target: &str, value: &'static str) -> Answer {
        self.send("PUT", target, &[], value).await
    }

    pub async fn txn(&self, body: &str) -> Answer {
        self.send("POST", "/v1/txn", &[], body.to_owned()).await
    }

    pub async fn token(&self) -> String {
        let issued = self.send("POST", "/v1/retry-token", &[], "").await;
        assert_eq!(issued.status, StatusCode::CREATED);
        issued.json()["token"].as_str().unwrap().to_owned()
    }

    /// All keys with their values, and the index of the last entry.
    pub async fn everything(&self) -> Value {
        self.get("/v1/keys?values=true&limit=1000").await.json()
    }
}
