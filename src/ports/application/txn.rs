//! `POST /v1/txn`: conditions, and one of two lists of operations, in one step.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use axum::body::Body;
use axum::http::HeaderMap;
use axum::http::uri::PathAndQuery;
use axum::response::IntoResponse;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::ids::{ClusterId, bad_request, parse_tag, quoted, retry_token};
use super::kv::replayed;
use super::{Answer, Application, JSON, json};
use crate::channels::Index;
use crate::httpapi::entry;
use crate::kvstore::{Applied, Condition, OPERATIONS_MAX, Operation, Requirement, Txn};

/// The body of a request.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TxnJson<'a> {
    #[serde(borrow, default, rename = "if")]
    conditions: AtMost<Object<ConditionJson<'a>>>,
    #[serde(borrow, default)]
    then: AtMost<Object<OperationJson<'a>>>,
    #[serde(borrow, default, rename = "else")]
    otherwise: AtMost<Object<OperationJson<'a>>>,
}

/// `{"key": …, "etag": …}` or `{"key": …, "absent": …}`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConditionJson<'a> {
    #[serde(borrow)]
    key: Cow<'a, str>,
    etag: Option<String>,
    absent: Option<bool>,
}

/// `{"put": key, "value": …}`, `{"delete": key}` or `{"get": key}`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OperationJson<'a> {
    put: Option<String>,
    #[serde(borrow, default)]
    value: Option<Cow<'a, str>>,
    delete: Option<String>,
    get: Option<String>,
}

/// A list of at most [`OPERATIONS_MAX`] elements. A longer one is refused before it takes memory.
struct AtMost<T>(Vec<T>);

impl<T> Default for AtMost<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for AtMost<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Elements<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Elements<T> {
            type Value = Vec<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {OPERATIONS_MAX} elements")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Vec<T>, A::Error> {
                let mut elements = Vec::new();
                while let Some(element) = from.next_element()? {
                    if elements.len() == OPERATIONS_MAX {
                        let why = format!("more than {OPERATIONS_MAX} elements in a list");
                        return Err(A::Error::custom(why));
                    }
                    elements.push(element);
                }
                Ok(elements)
            }
        }
        from.deserialize_seq(Elements(PhantomData)).map(AtMost)
    }
}

/// A JSON object. Derived implementations would take a list of the fields' values, too.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Fields<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, from: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(from))
            }
        }
        from.deserialize_map(Fields(PhantomData)).map(Object)
    }
}

/// An operation whose value is decoded.
enum Decoded {
    Put { key: String, value: Vec<u8> },
    Delete { key: String },
    Get { key: String },
}

pub(super) async fn post(
    application: &Application,
    headers: &HeaderMap,
    body: Body,
    deadline: Instant,
) -> Answer {
    let keys = &application.keys;
    let token = retry_token(headers)?;
    let (text, permit) = keys.read("POST", body, keys.max_value_bytes, deadline).await?;
    let id = application.cluster_id(deadline).await?;
    let token = application.own_token(token, id)?;
    let (written, then, otherwise) = {
        let Object(TxnJson { conditions, then, otherwise }) = serde_json::from_slice(&text)
            .map_err(|error| bad_request(format!("the body is no transaction: {error}")))?;
        let conditions = conditions.0.into_iter().map(|Object(it)| condition(it, id));
        let conditions = conditions.collect::<Answer<Vec<_>>>()?;
        only_once("if", conditions.iter().map(|(key, _)| &key[..]))?;
        let (then, otherwise) = (branch("then", then)?, branch("else", otherwise)?);
        let reads = [&then, &otherwise]
            .into_iter()
            .flatten()
            .any(|operation| matches!(operation, Decoded::Get { .. }));
        if reads && token.is_some() {
            return Err(bad_request(
                "a transaction with a retry token cannot have a get, because values are not remembered: GET the key afterwards",
            ));
        }
        let conditions = conditions.iter();
        let conditions =
            conditions.map(|(key, is)| Condition { key: key.as_bytes(), is: is.clone() }).collect();
        let txn = Txn { conditions, then: borrowed(&then), otherwise: borrowed(&otherwise) };
        (keys.store.transact(txn, token, deadline), kinds(&then), kinds(&otherwise))
    };
    // The request's wait must not hold a second copy of the values.
    drop(text);
    let applied = written.await?;
    drop(permit);
    if !applied.outcome.succeeded {
        keys.metrics.conditions_failed.inc();
    }
    let kinds = if applied.outcome.succeeded { then } else { otherwise };
    let named = entry(applied.outcome.index, applied.outcome.term);
    let replayed = replayed(&applied);
    // Values for which there is no room are left out, since the transaction is done.
    let values = applied.read.iter().flatten().map(|record| record.value().len()).sum::<usize>();
    let shows = values <= keys.max_value_bytes;
    let with_values = || keys.responses.body(results(id, &applied, &kinds, shows).into(), None);
    let body = with_values().or_else(|length| {
        let without = results(id, &applied, &kinds, false);
        if without.len() < length { keys.responses.body(without.into(), None) } else { Err(length) }
    });
    let body = body.unwrap_or_else(|_| results(id, &applied, &kinds, false).into());
    Ok((JSON, named, replayed, body).into_response())
}

fn condition(json: ConditionJson<'_>, id: ClusterId) -> Answer<(String, Requirement)> {
    let key = checked_key(json.key.into_owned())?;
    let is = match (json.etag, json.absent) {
        (None, Some(true)) => Requirement::Absent,
        (None, Some(false)) => Requirement::Exists,
        (Some(etag), None) => {
            let unquoted = etag.strip_prefix('"').and_then(|etag| etag.strip_suffix('"'));
            let Some((cluster, index)) = parse_tag(unquoted.unwrap_or(&etag)) else {
                return Err(bad_request(format!(
                    "the etag {} of {} is none: copy it from ETag, or from a page of /v1/keys",
                    quoted(&etag),
                    quoted(&key)
                )));
            };
            // Another cluster's matches no value.
            Requirement::WrittenAt((cluster == id).then_some(index).into_iter().collect())
        }
        _ => {
            return Err(bad_request(format!(
                "the condition on {} needs either \"etag\" or \"absent\"",
                quoted(&key)
            )));
        }
    };
    Ok((key, is))
}

/// Decodes the operations of one branch.
fn branch(name: &str, operations: AtMost<Object<OperationJson<'_>>>) -> Answer<Vec<Decoded>> {
    let mut decoded = Vec::with_capacity(operations.0.len());
    for Object(OperationJson { put, value, delete, get }) in operations.0 {
        decoded.push(match (put, value, delete, get) {
            (Some(key), Some(value), None, None) => {
                let value = BASE64_STANDARD.decode(value.as_bytes()).map_err(|error| {
                    let key = quoted(&key);
                    bad_request(format!("the value of {key} is no base64 (RFC 4648): {error}"))
                })?;
                Decoded::Put { key: checked_key(key)?, value }
            }
            (None, None, Some(key), None) => Decoded::Delete { key: checked_key(key)? },
            (None, None, None, Some(key)) => Decoded::Get { key: checked_key(key)? },
            _ => {
                let number = decoded.len();
                return Err(bad_request(format!(
                    "operation {number} of \"{name}\", from 0 on, needs \"put\" and \"value\", or \"delete\", or \"get\""
                )));
            }
        });
    }
    only_once(name, decoded.iter().map(Decoded::key))?;
    Ok(decoded)
}

/// Checks that a request could name the key by its target.
fn checked_key(key: String) -> Answer<String> {
    let target = key.parse::<PathAndQuery>().ok().filter(|_| key.starts_with('/'));
    if target.is_some_and(|target| target.as_str() == key) {
        return Ok(key);
    }
    Err(bad_request(format!(
        "the key {} is no request target: begin it with a slash, and percent-encode other characters than those of a URL",
        quoted(&key)
    )))
}

fn only_once<'a>(name: &str, keys: impl Iterator<Item = &'a str>) -> Answer<()> {
    let mut seen = std::collections::HashSet::new();
    for key in keys {
        if !seen.insert(key) {
            let key = quoted(key);
            return Err(bad_request(format!("\"{name}\" names the key {key} twice")));
        }
    }
    Ok(())
}

impl Decoded {
    fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } | Self::Get { key } => key,
        }
    }
}

fn borrowed(operations: &[Decoded]) -> Vec<Operation<'_>> {
    let operations = operations.iter().map(|operation| match operation {
        Decoded::Put { key, value } => Operation::Put { key: key.as_bytes(), value },
        Decoded::Delete { key } => Operation::Delete { key: key.as_bytes() },
        Decoded::Get { key } => Operation::Get { key: key.as_bytes() },
    });
    operations.collect()
}

/// What kind an operation is.
#[derive(Clone, Copy)]
enum Kind {
    Put,
    Delete,
    Get,
}

fn kinds(operations: &[Decoded]) -> Vec<Kind> {
    let kinds = operations.iter().map(|operation| match operation {
        Decoded::Put { .. } => Kind::Put,
        Decoded::Delete { .. } => Kind::Delete,
        Decoded::Get { .. } => Kind::Get,
    });
    kinds.collect()
}

/// The body of a response.
fn results(id: ClusterId, applied: &Applied, kinds: &[Kind], values: bool) -> String {
    let outcome = applied.outcome;
    let mut read = applied.read.iter();
    let result = |(position, kind): (usize, &Kind)| match kind {
        Kind::Put => Done::Put { etag: id.tag(outcome.index), created: !outcome.existed(position) },
        Kind::Delete => Done::Delete { deleted: outcome.existed(position) },
        Kind::Get => match read.next().and_then(Option::as_ref) {
            None => Done::Absent { absent: true },
            Some(record) => Done::Get {
                etag: id.tag(record.index()),
                bytes: record.value().len(),
                value: values.then(|| BASE64_STANDARD.encode(record.value())),
            },
        },
    };
    let results = kinds.iter().enumerate().map(result).collect();
    json(&Results { succeeded: outcome.succeeded, index: outcome.index, results })
}

/// The body of a response.
#[derive(Serialize)]
struct Results {
    /// True if all conditions held, so that the operations of `then` were carried out.
    succeeded: bool,
    index: Index,
    results: Vec<Done>,
}

/// What one operation did.
#[derive(Serialize)]
#[serde(untagged)]
enum Done {
    Put {
        etag: String,
        created: bool,
    },
    Delete {
        deleted: bool,
    },
    Get {
        etag: String,
        bytes: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        value: Option<String>,
    },
    Absent {
        absent: bool,
    },
}
