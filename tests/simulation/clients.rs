//! Clients: each sends one request after another, to any member, and records the answers.
//!
//! Besides PUT and GET they delete, write with conditions, send transactions, and list keys. With a retry token
//! they send a write again, to any member, until it has an outcome, and sometimes two copies at once.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::LazyLock;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use raftexample::channels::{
    Ack, Acknowledged, Index, NodeId, Pending, Proposal, Responder, responder,
};
use raftexample::error::RequestError;
use raftexample::kvstore::{Applied, Consistency, KeyValue, KvStore};
use tokio::time::Instant;

use crate::invariants::{Invariants, Violation, hash};
use crate::process::{Outputs, Process};
use crate::support::random::Random;
use crate::support::store::{
    Answer, Fate, Found, Looked, Page, Refusal, Replay, Requirement, Sent, Step, Token, Write,
};
use crate::translation::{Values, answer, key_name, page, record, token, txn};

/// What the state machine answers.
pub type Output = Result<Applied, RequestError>;

type Future_<T> = Pin<Box<dyn Future<Output = Result<T, RequestError>>>>;

/// A clock for the deadlines of requests, which are never reached: the simulation has its own.
static CLOCK: LazyLock<tokio::runtime::Runtime> =
    LazyLock::new(|| tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap());

pub fn far_future() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

/// Polls an answer once.
pub fn poll_once<T>(future: Pin<&mut (dyn Future<Output = T> + '_)>) -> Option<T> {
    let _clock = CLOCK.enter();
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

/// A write at a member's store. Between the store and the node stands the simulation, which lets deadlines
/// pass and sees the index of the entry.
struct Writing {
    /// The hash of the entry's payload.
    id: u64,
    /// The node's answer.
    pending: Pending<Acknowledged>,
    /// Gives it to the store.
    responder: Responder<Acknowledged>,
    /// The store's answer to the client.
    done: Future_<Applied>,
    outputs: Outputs,
}

/// The answer that a request waits for.
enum Waiting {
    Write(Writing),
    Get(String, Future_<Option<KeyValue>>),
    List(Future_<Page>),
    Issue(Future_<Index>),
}

/// A pending request.
pub struct Request {
    /// The client that waits for it; `None` for a second copy of a write.
    pub client: Option<usize>,
    /// The member that has it, and the run of its process.
    pub at: (NodeId, u64),
    /// The number of the request, which its deadline names.
    pub number: u64,
    waiting: Waiting,
}

/// The outcome of a request.
#[derive(Debug)]
pub enum Outcome {
    /// The entry of the write, and the answer.
    Written {
        id: u64,
        index: Index,
        term: u64,
        answer: Answer,
    },
    /// The write was acknowledged before it was applied.
    Accepted,
    Found(Found),
    Failed,
    Unknown,
}

/// A token of a client.
#[derive(Clone)]
enum Held {
    /// For its next write.
    Fresh(Token),
    /// For this write, which has no outcome yet.
    Used(Rc<Write>),
    /// For this write, which has an outcome.
    Finished(Rc<Write>),
}

/// What a client sends.
#[derive(Debug)]
pub enum Choice {
    /// A write; `true` for a PUT of the client port.
    Write(Rc<Write>, bool),
    /// The same, to two members.
    Twice(Rc<Write>),
    Get(u64),
    List {
        prefix: String,
        after: Option<String>,
        limit: usize,
    },
    /// A request for a retry token.
    Issue,
}

/// All clients, and what they observed.
#[derive(Default)]
pub struct Clients {
    pub under_way: Vec<Request>,
    /// By the hash of their payload, so that they are found in the log.
    pub writes: BTreeMap<u64, Rc<Write>>,
    sent: Vec<Sent>,
    looked: Vec<Looked>,
    /// The index of the write of each key that a client saw last.
    seen: BTreeMap<String, Index>,
    tokens: BTreeMap<usize, Held>,
    /// The log up to here was there before the first client.
    pub since: Index,
}

/// The prefixes of lists and watches.
pub fn draw_prefix(random: &mut Random, keys: u64) -> String {
    match random.below(6) {
        0 => String::new(),
        1 | 2 => format!("key{}/", random.below(2)),
        3 => key_name(random.below(keys)),
        4 => "other".to_owned(),
        _ => "key".to_owned(),
    }
}

impl Clients {
    /// The clients of a cluster that is restored from a backup of this one at index `since`. They keep their
    /// tokens, which the port would refuse: to the state machine they are as any other.
    pub fn restored(&self, since: Index) -> Self {
        let (writes, tokens, seen) = (self.writes.clone(), self.tokens.clone(), self.seen.clone());
        Self { writes, tokens, seen, since, ..Self::default() }
    }

    /// What a client sends next, which is a write or a read of `key`. `number` is different for each request
    /// of a run.
    pub fn choose(
        &mut self,
        client: usize,
        key: u64,
        is_write: bool,
        keys: u64,
        number: u64,
        random: &mut Random,
    ) -> Choice {
        if !is_write {
            return match random.below(10) {
                0..7 => Choice::Get(key),
                _ => {
                    let prefix = draw_prefix(random, keys);
                    let after = (random.below(4) == 0).then(|| key_name(random.below(keys)));
                    Choice::List { prefix, after, limit: *random.choose(&[1, 2, 100, 100]) }
                }
            };
        }
        match random.below(10) {
            0..4 => {
                let then = vec![Step::Put(key_name(key), number * 10)];
                Choice::Write(Rc::new(Write { then, ..Write::default() }), true)
            }
            4..7 => Choice::Write(self.draw_write(key, keys, number, None, random), false),
            _ => self.choose_with_token(client, key, keys, number, random),
        }
    }

    fn choose_with_token(
        &mut self,
        client: usize,
        key: u64,
        keys: u64,
        number: u64,
        random: &mut Random,
    ) -> Choice {
        let token = match self.tokens.get(&client) {
            Some(Held::Used(write)) => {
                let write = write.clone();
                return if random.below(3) == 0 {
                    Choice::Twice(write)
                } else {
                    Choice::Write(write, false)
                };
            }
            Some(Held::Finished(write)) => match random.below(8) {
                0 => return Choice::Write(write.clone(), false),
                // The client uses the token for another write.
                1 => write.token.expect("it has one"),
                // It invents one.
                2 => {
                    let newest = self.seen.values().max().copied().unwrap_or_default();
                    Token { index: random.below(newest + 20), random: random.next() }
                }
                _ => return Choice::Issue,
            },
            None => return Choice::Issue,
            Some(Held::Fresh(token)) => *token,
        };
        let write = self.draw_write(key, keys, number, Some(token), random);
        self.tokens.insert(client, Held::Used(write.clone()));
        if random.below(4) == 0 { Choice::Twice(write) } else { Choice::Write(write, false) }
    }

    fn draw_requirement(&self, key: &str, random: &mut Random) -> Requirement {
        let seen = self.seen.get(key).copied().unwrap_or_default();
        match random.below(6) {
            0 => Requirement::Absent,
            1 => Requirement::Exists,
            2 | 3 => Requirement::WrittenAt(vec![seen]),
            4 => Requirement::WrittenAt(vec![seen, seen.saturating_sub(1)]),
            _ => Requirement::NotWrittenAt(vec![seen]),
        }
    }

    /// A delete, a write with a condition, or a transaction.
    fn draw_write(
        &self,
        key: u64,
        keys: u64,
        number: u64,
        token: Option<Token>,
        random: &mut Random,
    ) -> Rc<Write> {
        let name = key_name(key);
        let mut write = Write { token, ..Write::default() };
        match random.below(10) {
            0..2 => write.then.push(Step::Delete(name)),
            2..5 => {
                write.conditions.push((name.clone(), self.draw_requirement(&name, random)));
                write.then.push(match random.below(3) {
                    0 => Step::Delete(name),
                    _ => Step::Put(name, number * 10),
                });
            }
            _ => {
                for _ in 0..random.below(3) {
                    let name = key_name(random.below(keys));
                    write.conditions.push((name.clone(), self.draw_requirement(&name, random)));
                }
                let mut value = number * 10;
                let mut branch = |count: u64| {
                    let first = random.below(keys);
                    let steps = (0..count.min(keys)).map(|next| {
                        let name = key_name((first + next) % keys);
                        value += 1;
                        match random.below(6) {
                            0..3 => Step::Put(name, value),
                            // The port refuses a get with a token, because values are not remembered.
                            3 if token.is_none() => Step::Get(name),
                            _ => Step::Delete(name),
                        }
                    });
                    steps.collect()
                };
                (write.then, write.otherwise) = (branch(3), branch(2));
            }
        }
        let mut steps = write.then.iter().chain(&write.otherwise);
        if !steps.any(|step| matches!(step, Step::Put(..))) {
            // It always holds, and no other payload is the same.
            let unlike = Requirement::NotWrittenAt(vec![u64::MAX - number]);
            write.conditions.push((key_name(key), unlike));
        }
        Rc::new(write)
    }

    /// Sends a write to the store of `process`. Returns the member's input, and the hash of the payload.
    pub fn write(
        &mut self,
        client: Option<usize>,
        at: (NodeId, u64),
        write: Rc<Write>,
        is_plain: bool,
        process: &mut Process,
        number: u64,
    ) -> (Proposal, u64) {
        let (store, sent) = (process.store.clone(), write.clone());
        let mut done: Future_<Applied> = Box::pin(async move {
            let values = Values::of(&sent);
            match &sent.then[..] {
                [Step::Put(key, value)] if is_plain => {
                    store.put(key.as_bytes(), Bytes::from(value.to_string()), far_future()).await
                }
                _ => {
                    let token = sent.token.map(token);
                    store.transact(txn(&sent, &values), token, far_future()).await
                }
            }
        });
        assert!(poll_once(done.as_mut()).is_none(), "nobody has answered it yet");
        let mut proposal = process.take_proposal();
        let id = hash(&proposal.data);
        self.writes.insert(id, write);
        let (own, pending) = responder();
        let responder = std::mem::replace(&mut proposal.responder, own);
        let outputs = process.outputs.clone();
        let waiting = Waiting::Write(Writing { id, pending, responder, done, outputs });
        self.under_way.push(Request { client, at, number, waiting });
        (proposal, id)
    }

    /// Sends a read to `store`.
    pub fn read(
        &mut self,
        client: usize,
        at: (NodeId, u64),
        choice: Choice,
        store: &KvStore,
        number: u64,
    ) {
        let store = store.clone();
        let mut waiting = match choice {
            Choice::Get(key) => {
                let key = key_name(key);
                let name = key.clone();
                let lookup = async move {
                    let consistency = Consistency::Linearizable;
                    store.lookup(name.as_bytes(), consistency, far_future()).await
                };
                Waiting::Get(key, Box::pin(lookup))
            }
            Choice::List { prefix, after, limit } => Waiting::List(Box::pin(async move {
                store.wait_for(Consistency::Linearizable, far_future()).await?;
                let after = after.as_deref();
                let found =
                    store.page(prefix.as_bytes(), after.map(str::as_bytes), limit, 1, |_| 0);
                Ok(page(&prefix, after, limit, found))
            })),
            _ => Waiting::Issue(Box::pin(async move {
                store.wait_for(Consistency::Linearizable, far_future()).await?;
                Ok(store.applied())
            })),
        };
        // The first poll puts the request on readC.
        assert!(waiting.poll().is_none(), "nobody has answered it yet");
        self.under_way.push(Request { client: Some(client), at, number, waiting });
    }

    /// Takes the answers that a member has given; `is_stopping` if it gives no more.
    pub fn take_answers(
        &mut self,
        at: (NodeId, u64),
        now: u64,
        is_stopping: bool,
        random: &mut Random,
    ) -> Vec<(Option<usize>, Outcome)> {
        let mut outcomes = Vec::new();
        for mut request in std::mem::take(&mut self.under_way) {
            if request.at != at {
                self.under_way.push(request);
                continue;
            }
            match request.waiting.poll() {
                Some(outcome) => outcomes.push(self.end(request, outcome, now, random)),
                None if is_stopping => outcomes.push(self.give_up(request, now, random)),
                None => self.under_way.push(request),
            }
        }
        outcomes
    }

    /// The client's deadline passes, or the member ends in order: its answer must be true.
    fn give_up(
        &mut self,
        request: Request,
        now: u64,
        random: &mut Random,
    ) -> (Option<usize>, Outcome) {
        let Request { client, at, number, waiting } = request;
        let Waiting::Write(Writing { id, pending, responder, done, outputs }) = waiting else {
            let request = Request { client, at, number, waiting };
            return self.end(request, Outcome::Failed, now, random);
        };
        let answer = {
            let _clock = CLOCK.enter();
            let past = Instant::now() - Duration::from_secs(3600);
            poll_once(Box::pin(pending.wait_until(past)).as_mut())
        };
        let outcome = match answer.expect("its deadline has passed") {
            Err(RequestError::Unavailable(_)) => Outcome::Failed,
            Err(_) => Outcome::Unknown,
            Ok(answer) => panic!("nobody took the answer {answer:?}"),
        };
        let pending = self::responder().1;
        let waiting = Waiting::Write(Writing { id, pending, responder, done, outputs });
        self.end(Request { client, at, number, waiting }, outcome, now, random)
    }

    /// The client's deadline passes.
    pub fn give_up_number(
        &mut self,
        number: u64,
        now: u64,
        random: &mut Random,
    ) -> Option<(Option<usize>, Outcome)> {
        let position = self.under_way.iter().position(|request| request.number == number)?;
        let request = self.under_way.remove(position);
        Some(self.give_up(request, now, random))
    }

    /// The process died: the outcome is unknown.
    pub fn lose(&mut self, at: (NodeId, u64), now: u64, random: &mut Random) -> Vec<Option<usize>> {
        let (lost, kept): (Vec<Request>, _) =
            std::mem::take(&mut self.under_way).into_iter().partition(|request| request.at == at);
        self.under_way = kept;
        lost.into_iter().map(|request| self.end(request, Outcome::Unknown, now, random).0).collect()
    }

    fn end(
        &mut self,
        request: Request,
        outcome: Outcome,
        now: u64,
        random: &mut Random,
    ) -> (Option<usize>, Outcome) {
        let Request { client, number: invoked, waiting, .. } = request;
        if let Waiting::Write(Writing { id, .. }) = waiting {
            let fate = match &outcome {
                Outcome::Written { index, answer, .. } => Fate::Answered(*index, answer.clone()),
                Outcome::Accepted => Fate::Accepted,
                Outcome::Failed => Fate::Failed,
                Outcome::Unknown | Outcome::Found(_) => Fate::Unknown,
            };
            match &outcome {
                Outcome::Written { answer, .. } => self.note_answer(id, Some(answer)),
                Outcome::Accepted => self.note_answer(id, None),
                _ => {}
            }
            self.sent.push(Sent { write: id, invoked, completed: now, fate });
            return (client, outcome);
        }
        if let Outcome::Found(found) = &outcome {
            match found {
                Found::Key(key, Some(record)) => {
                    self.seen.insert(key.clone(), record.index);
                }
                Found::Page(page) => {
                    let listed = page.records.iter();
                    self.seen.extend(listed.map(|(key, record)| (key.clone(), record.index)));
                }
                Found::Applied(index) => {
                    let token = Token { index: *index, random: random.next() };
                    let client = client.expect("a client waits for a token");
                    self.tokens.insert(client, Held::Fresh(token));
                }
                Found::Key(_, None) => {}
            }
            self.looked.push(Looked { invoked, completed: now, found: found.clone() });
        }
        (client, outcome)
    }

    fn note_answer(&mut self, id: u64, answer: Option<&Answer>) {
        let write = self.writes[&id].clone();
        if let Some(Answer::Done { done, .. }) = answer
            && done.succeeded
        {
            for step in &write.then {
                if let Step::Put(key, _) = step {
                    self.seen.insert(key.clone(), done.index);
                }
            }
        }
        for held in self.tokens.values_mut() {
            if let Held::Used(used) = held
                && *used == write
            {
                *held = Held::Finished(write.clone());
            }
        }
    }

    /// The run ends: the outcome of the remaining requests is unknown.
    pub fn lose_all(&mut self, now: u64, random: &mut Random) {
        for request in std::mem::take(&mut self.under_way) {
            self.end(request, Outcome::Unknown, now, random);
        }
    }

    /// The writes with a token that have no outcome yet, with their clients.
    pub fn unfinished(&self) -> Vec<(usize, Rc<Write>)> {
        let held = self.tokens.iter();
        held.filter_map(|(client, held)| match held {
            Held::Used(write) => Some((*client, write.clone())),
            _ => None,
        })
        .collect()
    }

    /// The number of writes that were answered, whatever the answer.
    pub fn acknowledged(&self) -> usize {
        let is_answered = |sent: &&Sent| matches!(sent.fate, Fate::Answered(..) | Fate::Accepted);
        self.sent.iter().filter(is_answered).count()
    }

    pub fn reads(&self) -> usize {
        self.looked.len()
    }

    /// How often answers of each kind were given.
    pub fn kinds(&self) -> BTreeMap<&'static str, u64> {
        let mut kinds = BTreeMap::new();
        let of_writes = self.sent.iter().filter_map(|sent| match &sent.fate {
            Fate::Answered(_, Answer::Refused(Refusal::TooOld)) => Some("token too old"),
            Fate::Answered(_, Answer::Refused(Refusal::OtherWrite)) => Some("token used otherwise"),
            Fate::Answered(_, Answer::Refused(Refusal::NotIssued)) => Some("token not issued"),
            Fate::Answered(_, Answer::Done { is_replay: true, .. }) => Some("replayed"),
            Fate::Answered(_, Answer::Done { done, .. }) if !done.succeeded => Some("not met"),
            Fate::Answered(_, Answer::Done { .. }) => Some("carried out"),
            _ => None,
        });
        let of_reads = self.looked.iter().map(|looked| match looked.found {
            Found::Key(_, Some(_)) => "found",
            Found::Key(_, None) => "absent",
            Found::Page(_) => "listed",
            Found::Applied(_) => "tokens issued",
        });
        for kind in of_writes.chain(of_reads) {
            *kinds.entry(kind).or_default() += 1;
        }
        kinds
    }

    /// The log of these clients' writes up to an index, carried out by the model.
    pub fn replay(&self, invariants: &Invariants, up_to: Index, tokens_max: usize) -> Replay {
        let log = invariants.committed_up_to(up_to);
        let log = log.filter(|(_, _, id)| self.writes.contains_key(id));
        Replay::new(log, &self.writes, tokens_max, self.since)
    }

    /// At the end: the members' answers, and what the clients saw, are the model's.
    pub fn check(&self, replay: &Replay, invariants: &Invariants) -> Result<(), Violation> {
        for (index, answer) in invariants.answers() {
            replay.check_answer(*index, answer)?;
        }
        replay.check_sent(&self.sent)?;
        replay.check_looked(&self.looked, &self.sent)
    }
}

impl Waiting {
    /// The outcome, if the member has answered.
    fn poll(&mut self) -> Option<Outcome> {
        let found = match self {
            Self::Write(writing) => return writing.poll(),
            Self::Get(key, lookup) => poll_once(lookup.as_mut())?
                .map(|found| Found::Key(key.clone(), found.as_ref().map(record))),
            Self::List(list) => poll_once(list.as_mut())?.map(Found::Page),
            Self::Issue(applied) => poll_once(applied.as_mut())?.map(Found::Applied),
        };
        Some(found.map_or(Outcome::Failed, Outcome::Found))
    }
}

impl Writing {
    fn poll(&mut self) -> Option<Outcome> {
        let answered = self.pending.try_take()?;
        let (own, _) = responder();
        let responder = std::mem::replace(&mut self.responder, own);
        let at = match answered {
            Ok(Acknowledged::Proposed) => return Some(Outcome::Accepted),
            Ok(at @ Acknowledged::Applied { index, term }) => {
                let output = self.outputs.borrow_mut().remove(&index);
                responder.answer_with(at, output.expect("the member kept it"));
                Some((index, term))
            }
            Err(error) => {
                responder.answer(Err(error));
                None
            }
        };
        let output = poll_once(self.done.as_mut()).expect("it was just answered");
        Some(match (at, &output) {
            (Some((index, term)), _) => {
                Outcome::Written { id: self.id, index, term, answer: answer(&output) }
            }
            (None, Err(RequestError::Unavailable(_))) => Outcome::Failed,
            (None, Err(RequestError::Unknown(_))) => Outcome::Unknown,
            (None, other) => panic!("a write was answered {other:?}"),
        })
    }
}

/// The acknowledgement that a client asks for.
pub fn ack(is_early: bool) -> Ack {
    if is_early { Ack::Proposed } else { Ack::Committed }
}
