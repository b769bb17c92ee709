//! The program's types for requests and answers, and the model's.

use raftexample::error::RequestError;
use raftexample::kvstore::{
    self, Change, Condition, Cursor, KeyValue, Operation, Outcome, Requirement, Txn,
};

use crate::clients::Output;
use crate::support::store::{self, Answer, Done, Record, Refusal, Step, Write};

pub fn key_name(key: u64) -> String {
    format!("key{}/{key}", key % 2)
}

fn value(bytes: &[u8]) -> u64 {
    let text = std::str::from_utf8(bytes).expect("values are numbers");
    text.parse().expect("values are numbers")
}

fn key(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("keys are text")
}

pub fn record(found: &KeyValue) -> Record {
    Record { value: value(found.value()), index: found.index(), term: found.term() }
}

pub fn done(outcome: &Outcome) -> Done {
    let Outcome { index, term, succeeded, existed } = *outcome;
    Done { index, term, succeeded, existed }
}

/// What the state machine answered to an entry.
pub fn answer(output: &Output) -> Answer {
    match output {
        Ok(applied) => Answer::Done {
            done: done(&applied.outcome),
            read: applied.read.iter().map(|found| found.as_ref().map(record)).collect(),
            is_replay: applied.is_replay,
        },
        Err(RequestError::Conflict(_)) => Answer::Refused(Refusal::TooOld),
        Err(RequestError::Unprocessable(_)) => Answer::Refused(Refusal::OtherWrite),
        Err(RequestError::Invalid(_)) => Answer::Refused(Refusal::NotIssued),
        Err(error) => panic!("the state machine answered {error}"),
    }
}

pub fn place(cursor: Cursor) -> store::Place {
    (cursor.index, cursor.position)
}

pub fn change(found: &Change) -> store::Change {
    store::Change {
        place: place(found.cursor()),
        term: found.term(),
        key: key(found.key()),
        value: (!found.is_removal).then(|| value(found.value())),
    }
}

pub fn page(prefix: &str, after: Option<&str>, limit: usize, page: kvstore::Page) -> store::Page {
    let kvstore::Page { index, records, has_more } = page;
    let records = records.iter().map(|found| (key(found.key()), record(found))).collect();
    let (prefix, after) = (prefix.to_owned(), after.map(str::to_owned));
    store::Page { prefix, after, limit, index, records, has_more }
}

pub fn token(token: store::Token) -> kvstore::Token {
    kvstore::Token { index: token.index, random: token.random }
}

/// The text of a value.
pub struct Values(Vec<String>);

impl Values {
    pub fn of(write: &Write) -> Self {
        let steps = write.then.iter().chain(&write.otherwise);
        Self(
            steps
                .map(|step| match step {
                    Step::Put(_, value) => value.to_string(),
                    _ => String::new(),
                })
                .collect(),
        )
    }
}

/// The transaction that carries a write out.
pub fn txn<'a>(write: &'a Write, values: &'a Values) -> Txn<'a> {
    let conditions = write.conditions.iter().map(|(key, is)| {
        let is = match is {
            store::Requirement::Absent => Requirement::Absent,
            store::Requirement::Exists => Requirement::Exists,
            store::Requirement::WrittenAt(at) => Requirement::WrittenAt(at.clone()),
            store::Requirement::NotWrittenAt(at) => Requirement::NotWrittenAt(at.clone()),
        };
        Condition { key: key.as_bytes(), is }
    });
    let operation = |(step, value): (&'a Step, &'a String)| match step {
        Step::Put(key, _) => Operation::Put { key: key.as_bytes(), value: value.as_bytes() },
        Step::Delete(key) => Operation::Delete { key: key.as_bytes() },
        Step::Get(key) => Operation::Get { key: key.as_bytes() },
    };
    let (then, otherwise) = values.0.split_at(write.then.len());
    Txn {
        conditions: conditions.collect(),
        then: write.then.iter().zip(then).map(operation).collect(),
        otherwise: write.otherwise.iter().zip(otherwise).map(operation).collect(),
    }
}
