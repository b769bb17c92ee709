//! Clients: each sends one request after another, to any member, and records the answers.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use raftexample::channels::{Ack, Acknowledged, NodeId, Pending, Proposal, responder};
use raftexample::error::RequestError;
use raftexample::kvstore::{Consistency, KeyValue, KvStore};
use tokio::time::Instant;

use crate::support::linearizability::{Action, Operation, check};
use crate::support::memory::put;

type Lookup = Pin<Box<dyn Future<Output = Result<Option<KeyValue>, RequestError>>>>;

/// A clock for the deadlines of requests, which are never reached: the simulation has its own.
static CLOCK: LazyLock<tokio::runtime::Runtime> =
    LazyLock::new(|| tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap());

fn far_future() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

/// Polls an answer once.
fn poll_once<T>(future: Pin<&mut (dyn Future<Output = T> + '_)>) -> Option<T> {
    let _clock = CLOCK.enter();
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

/// The answer that a request waits for.
enum Waiting {
    Put(Pending<Acknowledged>),
    Get(Lookup),
}

/// A pending request.
pub struct Request {
    pub client: usize,
    /// The member that has it, and the run of its process.
    pub at: (NodeId, u64),
    pub key: u64,
    /// For a PUT.
    pub value: Option<u64>,
    /// The number of the request, which its deadline names.
    pub number: u64,
    invoked: u64,
    waiting: Waiting,
}

/// The outcome of a request.
pub enum Outcome {
    /// A PUT, with its payload.
    Acknowledged(Vec<u8>, Acknowledged),
    Read(Option<u64>),
    Failed,
    Unknown,
}

fn key_name(key: u64) -> String {
    format!("key{key}")
}

/// The payload of the only write of `value`.
pub fn payload(key: u64, value: u64) -> Vec<u8> {
    put(&key_name(key), &value.to_string())
}

/// All clients, and the histories they observed.
#[derive(Default)]
pub struct Clients {
    pub under_way: Vec<Request>,
    history: BTreeMap<u64, Vec<Operation<u64>>>,
    /// Writes by the hash of their payload, so that they are found in the log.
    pub writes: BTreeMap<u64, (u64, u64)>,
    /// Writes answered 204, and writes answered 503.
    acknowledged: Vec<(u64, u64)>,
    refused: Vec<(u64, u64)>,
}

impl Clients {
    /// The clients of a cluster that was restored from a backup, which holds these writes, in order.
    pub fn restored(writes: impl Iterator<Item = (u64, (u64, u64))>) -> Self {
        let writes: Vec<_> = writes.collect();
        let last: BTreeMap<u64, u64> = writes.iter().map(|(_, write)| *write).collect();
        let mut clients = Self { writes: writes.into_iter().collect(), ..Self::default() };
        for (key, value) in last {
            let action = Action::Write(value);
            let before = Operation { client: u64::MAX, action, invoked: 0, completed: Some(0) };
            clients.history.insert(key, vec![before]);
        }
        clients
    }

    /// Starts a PUT; returns the member's input. `now` is different for each request of a run.
    pub fn put(
        &mut self,
        client: usize,
        at: (NodeId, u64),
        key: u64,
        ack: Ack,
        now: u64,
    ) -> Proposal {
        let value = now;
        let data = payload(key, value);
        self.writes.insert(super::invariants::hash(&data), (key, value));
        let (responder, pending) = responder();
        self.under_way.push(Request {
            client,
            at,
            key,
            value: Some(value),
            number: value,
            invoked: now,
            waiting: Waiting::Put(pending),
        });
        Proposal { data: Bytes::from(data), ack, responder }
    }

    /// Starts a linearizable GET at the member with this store.
    pub fn get(&mut self, client: usize, at: (NodeId, u64), key: u64, store: &KvStore, now: u64) {
        let store = store.clone();
        let lookup: Lookup = Box::pin(async move {
            let name = key_name(key);
            store.lookup(name.as_bytes(), Consistency::Linearizable, far_future()).await
        });
        let mut request = Request {
            client,
            at,
            key,
            value: None,
            number: now,
            invoked: now,
            waiting: Waiting::Get(lookup),
        };
        // The first poll puts the request on readC.
        if let Waiting::Get(lookup) = &mut request.waiting {
            assert!(poll_once(lookup.as_mut()).is_none(), "nobody has answered it yet");
        }
        self.under_way.push(request);
    }

    /// Takes the answers that a member has given; `is_stopping` if it gives no more.
    pub fn take_answers(
        &mut self,
        at: (NodeId, u64),
        now: u64,
        is_stopping: bool,
    ) -> Vec<(usize, Outcome)> {
        let mut outcomes = Vec::new();
        for mut request in std::mem::take(&mut self.under_way) {
            if request.at != at {
                self.under_way.push(request);
                continue;
            }
            let outcome = match &mut request.waiting {
                Waiting::Put(pending) => pending.try_take().map(|answer| {
                    let value = request.value.expect("a PUT has a value");
                    match answer {
                        Ok(acknowledged) => {
                            Outcome::Acknowledged(payload(request.key, value), acknowledged)
                        }
                        Err(RequestError::Unavailable(_)) => Outcome::Failed,
                        Err(RequestError::Unknown(_)) => Outcome::Unknown,
                        Err(error) => panic!("a write was answered {error}"),
                    }
                }),
                Waiting::Get(lookup) => poll_once(lookup.as_mut()).map(|answer| match answer {
                    Ok(value) => Outcome::Read(value.map(|value| {
                        let text = std::str::from_utf8(value.value()).expect("values are numbers");
                        text.parse().expect("values are numbers")
                    })),
                    Err(_) => Outcome::Failed,
                }),
            };
            match outcome {
                Some(outcome) => {
                    outcomes.push((request.client, self.end(request, outcome, now)));
                }
                None if is_stopping => {
                    let client = request.client;
                    outcomes.push((client, self.give_up(request, now)));
                }
                None => self.under_way.push(request),
            }
        }
        outcomes
    }

    /// The client's deadline passes, or the member ends in order: its answer must be true.
    fn give_up(&mut self, request: Request, now: u64) -> Outcome {
        let Request { client, at, key, value, number, invoked, waiting } = request;
        let (waiting, outcome) = match waiting {
            Waiting::Put(pending) => {
                let answer = {
                    let _clock = CLOCK.enter();
                    let past = Instant::now() - Duration::from_secs(3600);
                    poll_once(Box::pin(pending.wait_until(past)).as_mut())
                };
                let answer = answer.expect("its deadline has passed");
                let outcome = match answer {
                    Ok(acknowledged) => Outcome::Acknowledged(
                        payload(key, value.expect("a PUT has a value")),
                        acknowledged,
                    ),
                    Err(RequestError::Unavailable(_)) => Outcome::Failed,
                    Err(_) => Outcome::Unknown,
                };
                (Waiting::Put(responder().1), outcome)
            }
            waiting @ Waiting::Get(_) => (waiting, Outcome::Failed),
        };
        self.end(Request { client, at, key, value, number, invoked, waiting }, outcome, now)
    }

    /// The client's deadline passes.
    pub fn give_up_number(&mut self, number: u64, now: u64) -> Option<(usize, Outcome)> {
        let position = self.under_way.iter().position(|request| request.number == number)?;
        let request = self.under_way.remove(position);
        Some((request.client, self.give_up(request, now)))
    }

    /// The process died: the outcome is unknown.
    pub fn lose(&mut self, at: (NodeId, u64), now: u64) -> Vec<usize> {
        let (lost, kept) =
            std::mem::take(&mut self.under_way).into_iter().partition(|request| request.at == at);
        self.under_way = kept;
        let lost: Vec<Request> = lost;
        let clients = lost.iter().map(|request| request.client).collect();
        for request in lost {
            self.end(request, Outcome::Unknown, now);
        }
        clients
    }

    fn end(&mut self, request: Request, outcome: Outcome, now: u64) -> Outcome {
        let Request { client, key, value, invoked, .. } = request;
        let (action, completed) = match (&outcome, value) {
            (Outcome::Acknowledged(..), Some(value)) => {
                self.acknowledged.push((key, value));
                (Action::Write(value), Some(now))
            }
            (Outcome::Unknown, Some(value)) => (Action::Write(value), None),
            (Outcome::Failed, Some(value)) => {
                self.refused.push((key, value));
                return outcome;
            }
            (Outcome::Read(found), None) => (Action::Read(*found), Some(now)),
            _ => return outcome,
        };
        let operation = Operation { client: client as u64, action, invoked, completed };
        self.history.entry(key).or_default().push(operation);
        outcome
    }

    /// The run ends: the outcome of the remaining requests is unknown.
    pub fn lose_all(&mut self, now: u64) {
        for request in std::mem::take(&mut self.under_way) {
            self.end(request, Outcome::Unknown, now);
        }
    }

    pub fn acknowledged(&self) -> usize {
        self.acknowledged.len()
    }

    pub fn reads(&self) -> usize {
        let operations = self.history.values().flatten();
        operations.filter(|operation| matches!(operation.action, Action::Read(_))).count()
    }

    /// At the end: every acknowledged write is in the log, no refused one is, and each key's
    /// history is linearizable.
    pub fn check(&self, place: impl Fn(&[u8]) -> Option<u64>) -> Result<(), String> {
        for (key, value) in &self.acknowledged {
            if place(&payload(*key, *value)).is_none() {
                return Err(format!("the acknowledged write of {value} to key{key} is lost"));
            }
        }
        for (key, value) in &self.refused {
            if place(&payload(*key, *value)).is_some() {
                return Err(format!("the write of {value} to key{key} was answered 503 and made"));
            }
        }
        for (key, history) in &self.history {
            check(history).map_err(|why| format!("key{key} is not linearizable: {why}"))?;
        }
        Ok(())
    }
}
