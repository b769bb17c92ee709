//! Checks exchanges against the OpenAPI description that the port serves.

use std::collections::BTreeSet;
use std::sync::{LazyLock, Mutex};

use serde_json::Value;

use super::*;

static DESCRIPTION: LazyLock<Value> = LazyLock::new(|| {
    let text = include_str!("../../src/ports/application/openapi.json");
    serde_json::from_str(text).expect("it is JSON")
});

/// The responses that were seen, as path, method and status.
static SEEN: Mutex<BTreeSet<(String, String, u16)>> = Mutex::new(BTreeSet::new());

/// Follows a `$ref`.
fn resolved(value: &Value) -> &Value {
    match value["$ref"].as_str() {
        Some(place) => {
            let found = DESCRIPTION.pointer(place.strip_prefix('#').unwrap());
            found.unwrap_or_else(|| panic!("{place} does not exist"))
        }
        None => value,
    }
}

/// The path of the description that a target belongs to.
fn path_of(target: &str) -> Option<&str> {
    if target.starts_with("/v1/kv/") {
        return Some("/v1/kv/{key}");
    }
    let path = target.split('?').next().unwrap();
    DESCRIPTION["paths"].get(path).map(|_| path)
}

/// Fails if the description does not allow this response.
pub fn check(method: &str, target: &str, answer: &Answer) {
    let status = answer.status;
    let path = path_of(target);
    let described = path.and_then(|path| {
        let operation = &DESCRIPTION["paths"][path].get(method.to_ascii_lowercase())?;
        let response = operation["responses"].get(status.to_string());
        Some(response.unwrap_or_else(|| panic!("{method} {path} says nothing of {status}")))
    });
    let Some(response) = described.map(resolved) else {
        // What the description leaves out does not exist.
        let expected = if path.is_some() { 405 } else { 404 };
        assert_eq!(status, expected, "{method} {target}: {answer:?}");
        return check_problem(answer, method);
    };
    let seen = (path.unwrap().to_owned(), method.to_ascii_lowercase(), status);
    SEEN.lock().unwrap().insert(seen);
    for (name, header) in response["headers"].as_object().into_iter().flatten() {
        let is_required = resolved(header)["required"] == true;
        assert!(answer.header(name).is_some() || !is_required, "{target} lacks {name}: {answer:?}");
    }
    assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{target}");
    let Some(content) = response["content"].as_object().filter(|_| method != "HEAD") else {
        assert!(answer.body.is_empty(), "{target} has a body: {answer:?}");
        return;
    };
    let (kind, media) = content.iter().next().expect("one type");
    assert_eq!(answer.header("content-type"), Some(&kind[..]), "{target}");
    if kind.ends_with("json") {
        let schema = resolved(&media["schema"]);
        check_schema(schema, &answer.json(), target);
    }
    if kind == "application/problem+json" {
        check_problem(answer, method);
    }
}

fn check_problem(answer: &Answer, method: &str) {
    assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{answer:?}");
    if method == "HEAD" {
        return;
    }
    let problem = answer.json();
    check_schema(&DESCRIPTION["components"]["schemas"]["Problem"], &problem, "a problem");
    assert_eq!(problem["status"], answer.status);
    assert!(problem["type"].as_str().unwrap().starts_with("urn:raftexample:"), "{problem}");
}

/// Checks the parts of JSON Schema that the description uses.
fn check_schema(schema: &Value, value: &Value, place: &str) {
    let schema = resolved(schema);
    let is = |kind: &str| match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_u64(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("{other} is unknown"),
    };
    let kinds = match &schema["type"] {
        Value::String(kind) => vec![&kind[..]],
        Value::Array(kinds) => kinds.iter().map(|kind| kind.as_str().unwrap()).collect(),
        _ => panic!("{place} has no type: {schema}"),
    };
    assert!(kinds.into_iter().any(is), "{place} is {value}, not {}", schema["type"]);
    for name in schema["required"].as_array().into_iter().flatten() {
        let name = name.as_str().unwrap();
        assert!(value.get(name).is_some(), "{place} lacks {name}: {value}");
    }
    for (name, value) in value.as_object().into_iter().flatten() {
        match schema["properties"].get(name) {
            Some(schema) => check_schema(schema, value, &format!("{place}.{name}")),
            None => assert_ne!(schema["additionalProperties"], false, "{place} has {name}"),
        }
    }
    for value in value.as_array().into_iter().flatten() {
        check_schema(&schema["items"], value, &format!("{place}[]"));
    }
}

/// Requests for every response that this member can give, and nothing that is not described.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_response_is_described_and_each_description_true() {
    let member = Member::start().await;
    let served = member.get("/v1/openapi.json").await;
    assert_eq!(served.json(), *DESCRIPTION);
    assert_eq!(member.put("/v1/kv/a", "v").await.status, 201);
    assert_eq!(member.put("/v1/kv/a", "v").await.status, 204);
    let tag = member.get("/v1/kv/a").await.etag();
    let (other, far) = ("\"0000000000000001-1\"", "0000000000000001-1-0000000000000001");
    let token = member.token().await;
    let used = member.send("PUT", "/v1/kv/b", &[("idempotency-key", &token)], "v").await;
    assert_eq!(used.status, 201);
    let large = "x".repeat(MAX_VALUE_BYTES + 1);
    let not_utf8 = "*, *";
    for (method, target, header, body, status) in [
        ("GET", "/v1/kv/a", ("if-none-match", &tag[..]), "", 304),
        ("GET", "/v1/kv/none", ("x", ""), "", 404),
        ("GET", "/v1/kv/a", ("if-match", other), "", 412),
        ("GET", "/v1/kv/a", ("raft-read", "x"), "", 400),
        ("GET", "/v1/kv/a", ("origin", "http://evil.example"), "", 403),
        ("HEAD", "/v1/kv/a", ("x", ""), "", 200),
        ("HEAD", "/v1/kv/a", ("if-none-match", "*"), "", 304),
        ("HEAD", "/v1/kv/none", ("x", ""), "", 404),
        ("HEAD", "/v1/kv/none", ("if-match", "*"), "", 412),
        ("HEAD", "/v1/kv/a", ("raft-read", "x"), "", 400),
        ("HEAD", "/v1/kv/a", ("origin", "http://evil.example"), "", 403),
        ("PUT", "/v1/kv/a", ("if-none-match", "*"), "v", 412),
        ("PUT", "/v1/kv/a", ("if-match", not_utf8), "v", 400),
        ("PUT", "/v1/kv/a", ("idempotency-key", far), "v", 409),
        ("PUT", "/v1/kv/a", ("idempotency-key", &token), "v", 422),
        ("PUT", "/v1/kv/a", ("x", ""), &large, 413),
        ("PUT", "/v1/kv/a", ("origin", "http://evil.example"), "v", 403),
        ("DELETE", "/v1/kv/none", ("x", ""), "", 404),
        ("DELETE", "/v1/kv/a", ("if-match", other), "", 412),
        ("DELETE", "/v1/kv/a", ("if-match", "5"), "", 400),
        ("DELETE", "/v1/kv/a", ("idempotency-key", far), "", 409),
        ("DELETE", "/v1/kv/a", ("idempotency-key", &token), "", 422),
        ("DELETE", "/v1/kv/a", ("origin", "http://evil.example"), "", 403),
        ("DELETE", "/v1/kv/a", ("if-match", "*"), "", 204),
        ("POST", "/v1/txn", ("x", ""), "{}", 200),
        ("POST", "/v1/txn", ("x", ""), "", 400),
        ("POST", "/v1/txn", ("origin", "http://evil.example"), "{}", 403),
        ("POST", "/v1/txn", ("idempotency-key", far), "{}", 409),
        ("POST", "/v1/txn", ("idempotency-key", &token), "{}", 422),
        ("POST", "/v1/txn", ("x", ""), &large, 413),
        ("GET", "/v1/keys", ("x", ""), "", 200),
        ("GET", "/v1/keys?limit=0", ("x", ""), "", 400),
        ("GET", "/v1/keys", ("origin", "http://evil.example"), "", 403),
        ("GET", "/v1/watch?from=x", ("x", ""), "", 400),
        ("GET", "/v1/watch", ("origin", "http://evil.example"), "", 403),
        ("POST", "/v1/retry-token", ("origin", "http://evil.example"), "", 403),
        ("GET", "/v1/openapi.json", ("origin", "http://evil.example"), "", 403),
        ("PATCH", "/v1/kv/a", ("x", ""), "", 405),
        ("GET", "/v1/txn", ("x", ""), "", 405),
        ("DELETE", "/v1/keys", ("x", ""), "", 405),
        ("POST", "/v1/watch", ("x", ""), "", 405),
        ("GET", "/v1/retry-token", ("x", ""), "", 405),
        ("POST", "/v1/openapi.json", ("x", ""), "", 405),
        ("GET", "/", ("x", ""), "", 404),
        ("GET", "/v1/kv", ("x", ""), "", 404),
        ("GET", "/v1/keys/", ("x", ""), "", 404),
        ("DELETE", "/1", ("x", ""), "", 404),
    ] {
        let answer = member.send(method, target, &[header], body.to_owned()).await;
        assert_eq!(answer.status, status, "{method} {target} {header:?}: {answer:?}");
        if status == 405 {
            assert!(answer.header("allow").is_some_and(|allow| !allow.contains(method)));
        }
    }
    watch::Events::open(&member, "/v1/watch", &[]).await;
    let mut missing = Vec::new();
    let seen = SEEN.lock().unwrap().clone();
    for (path, operations) in DESCRIPTION["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            for status in operation["responses"].as_object().into_iter().flat_map(|it| it.keys()) {
                let status: u16 = status.parse().unwrap();
                // A member without a majority, or a slow client; other tests have them.
                let is_rare = [408, 503, 504].contains(&status);
                if !is_rare && !seen.contains(&(path.clone(), method.clone(), status)) {
                    missing.push(format!("{method} {path}: {status}"));
                }
            }
        }
    }
    assert_eq!(missing, [""; 0], "described, but never answered");
}
