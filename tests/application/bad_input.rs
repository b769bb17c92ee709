//! Requests that are wrong: each gets a problem document that says what to do, and changes nothing.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invalid_request_is_explained_and_changes_nothing() {
    let member = Member::start().await;
    let tag = member.put("/v1/kv/a", "v").await.etag();
    let before = member.everything().await;
    let operations = |count: usize| {
        let operations: Vec<_> =
            (0..count).map(|n| format!(r#"{{"put":"/{n}","value":""}}"#)).collect();
        operations.join(",")
    };
    let both = [("if-match", &tag[..]), ("if-none-match", "*")];
    let txn = |body: &str| ("POST", "/v1/txn", vec![], body.to_owned());
    let get = |target| ("GET", target, vec![], String::new());
    for ((method, target, headers, body), why) in [
        (txn("{\"then\":\n[}"), "line 2 column 2"),
        (txn("[]"), "expected an object at line 1 column 0"),
        (txn(r#"{"then":[["/b","",null,null]]}"#), "expected an object"),
        (txn("{} {}"), "trailing"),
        (txn("\u{feff}{}"), "line 1"),
        (txn(r#"{"thn":[]}"#), "unknown field `thn`, expected one of `if`, `then`, `else`"),
        (txn(r#"{"then":[],"then":[]}"#), "duplicate"),
        (txn(r#"{"then":[{"put":"/a","value":"","ttl":5}]}"#), "unknown field `ttl`"),
        (txn(r#"{"then":[{"put":"/b","value":"a"}]}"#), "the value of \"/b\" is no base64"),
        (txn(r#"{"then":[{"put":"/b","value":"aGk"}]}"#), "base64"),
        (txn(r#"{"then":[{"put":"/b","value":"_-=="}]}"#), "base64"),
        (txn(r#"{"then":[{"put":"/b"}]}"#), "operation 0 of \"then\""),
        (txn(r#"{"else":[{"get":"/b"},{}]}"#), "operation 1 of \"else\""),
        (txn(r#"{"then":[{"get":"/b","delete":"/c"}]}"#), "operation 0"),
        (txn(r#"{"then":[{"put":"/b","value":""},{"delete":"/b"}]}"#), "\"/b\" twice"),
        (txn(r#"{"if":[{"key":"/a","absent":true},{"key":"/a","absent":false}]}"#), "twice"),
        (txn(r#"{"if":[{"key":"/a"}]}"#), "either \"etag\" or \"absent\""),
        (txn(r#"{"if":[{"key":"/a","etag":"x","absent":true}]}"#), "either"),
        (txn(r#"{"if":[{"key":"/a","etag":"5"}]}"#), "copy it from ETag"),
        (txn(r#"{"then":[{"put":"b","value":""}]}"#), "begin it with a slash"),
        (txn(r#"{"then":[{"put":"/a b","value":""}]}"#), "percent-encode"),
        (txn(r#"{"then":[{"put":"/a#b","value":""}]}"#), "percent-encode"),
        (txn(r#"{"then":[{"put":"/a\u0000","value":""}]}"#), "percent-encode"),
        (txn(&format!(r#"{{"then":[{}]}}"#, operations(129))), "more than 128"),
        (txn(&format!(r#"{{"else":[{}]}}"#, operations(129))), "more than 128"),
        (get("/v1/keys?prefix=%zz"), "percent-encoded"),
        (get("/v1/keys?prefix=%2"), "percent-encoded"),
        (get("/v1/keys?prefix=%ff"), "percent-encoded"),
        (get("/v1/keys?limit=1001"), "1 to 1000"),
        (get("/v1/keys?limit=-1"), "1 to 1000"),
        (get("/v1/keys?prefx=/a"), "\"prefx\" is unknown"),
        (get("/v1/keys?limit=1&limit=2"), "given twice"),
        (get("/v1/keys?values=yes"), "true or false"),
        (get("/v1/watch?from=yesterday"), "no place in a watch"),
        (get("/v1/watch?from=999999"), "index 999999 does not exist yet"),
        (("GET", "/v1/watch", vec![("last-event-id", "x")], String::new()), "no place"),
        (("PUT", "/v1/kv/a", both.to_vec(), "w".into()), "exclude each other"),
        (("GET", "/v1/kv/a", both.to_vec(), "".into()), "exclude each other"),
        (("PUT", "/v1/kv/a", vec![("if-match", tag.trim_matches('"'))], "w".into()), "quotes"),
        (("DELETE", "/v1/kv/a", vec![("if-none-match", "a")], "".into()), "quotes"),
        (("GET", "/v1/kv/a", vec![("raft-read", "both")], "".into()), "linearizable or local"),
    ] {
        let refused = member.send(method, target, &headers, body.clone()).await;
        let detail = refused.problem(400);
        assert!(detail.contains(why), "{method} {target} {headers:?} {body:.80}: {detail}");
    }
    assert_eq!(member.everything().await, before, "not even the index has moved");
    // As many as are allowed.
    let most = format!(r#"{{"then":[{}],"else":[{}]}}"#, operations(128), operations(128));
    assert_eq!(member.txn(&most).await.json()["results"].as_array().unwrap().len(), 128);
}

/// A response to an invalid request is counted by no budget, so it must not hold what the request held.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_quotes_little_of_a_large_request() {
    let member = Member::start().await;
    let long = "\u{7f}".repeat(MAX_VALUE_BYTES / 2);
    let target = "\\".repeat(30_000);
    let txn = |body: String| ("POST", "/v1/txn".to_owned(), vec![], body);
    for (method, target, headers, body) in [
        txn(format!(r#"{{"{long}":1}}"#)),
        txn(format!(r#"{{"if":"{long}"}}"#)),
        txn(format!(r#"{{"if":[{{"key":"{long}","absent":true}}]}}"#)),
        txn(format!(r#"{{"if":[{{"key":"/a","etag":"{long}"}}]}}"#)),
        txn(format!(r#"{{"if":[{{"key":"{long}"}}]}}"#)),
        txn(format!(r#"{{"then":[{{"get":"{long}"}}]}}"#)),
        txn(format!(r#"{{"then":[{{"put":"{long}","value":"a"}}]}}"#)),
        txn(format!(r#"{{"then":[{{"get":"/{0}"}},{{"get":"/{0}"}}]}}"#, "a".repeat(40_000))),
        ("GET", format!("/v1/keys?{}", "a".repeat(30_000)), vec![], String::new()),
        ("GET", "/v1/watch".to_owned(), vec![("last-event-id", &target[..])], String::new()),
    ] {
        let refused = member.send(method, &target, &headers, body).await;
        refused.problem(400);
        assert!(refused.body.len() < 4096, "{target:.80}: {} bytes", refused.body.len());
    }
}

/// A list that is too long must not take memory before it is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_above_the_limit_is_refused() {
    let member = Member::start().await;
    let value = "x".repeat(MAX_VALUE_BYTES);
    assert_eq!(member.send("PUT", "/v1/kv/a", &[], value.clone()).await.status, 201);
    let refused = member.send("PUT", "/v1/kv/a", &[], value.clone() + "x").await;
    assert!(refused.problem(413).contains("100000 bytes"));
    let txn = format!(r#"{{"then":[{{"put":"/a","value":"{value}"}}]}}"#);
    assert!(member.txn(&txn).await.problem(413).contains("100000 bytes"));
}
