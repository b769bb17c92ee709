//! Keys, transactions and pages.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_created_replaced_read_and_deleted() {
    let member = Member::start().await;
    let created = member.put("/v1/kv/a", "one").await;
    assert_eq!(created.status, 201);
    let read = member.get("/v1/kv/a").await;
    assert_eq!((read.status, &read.body[..]), (200, &b"one"[..]));
    assert_eq!((read.etag(), read.index()), (created.etag(), created.index()));
    assert_eq!(read.header("cache-control"), Some("no-cache"));
    let replaced = member.put("/v1/kv/a", "two").await;
    assert_eq!(replaced.status, 204);
    assert!(replaced.index() > created.index() && replaced.etag() != created.etag());
    let head = member.send("HEAD", "/v1/kv/a", &[], "").await;
    assert_eq!((head.status, head.header("content-length")), (200, Some("3")));
    let deleted = member.send("DELETE", "/v1/kv/a", &[], "").await;
    assert_eq!(deleted.status, 204);
    assert_eq!(member.get("/v1/kv/a").await.status, 404);
    let again = member.send("DELETE", "/v1/kv/a", &[], "").await;
    assert_eq!((again.status, again.index()), (404, deleted.index() + 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_the_rest_of_the_raw_target_as_on_the_client_port() {
    let member = Member::start().await;
    for (number, key) in
        ["/a?b", "/3", "/", "//a//b", "/a%20b?c=d%2F", "/v1/kv/x", "/?"].into_iter().enumerate()
    {
        let value = format!("value {number}");
        let put = member.send("PUT", &format!("/v1/kv{key}"), &[], value.clone()).await;
        assert_eq!(put.status, 201, "{key}");
        let read = member.send_to(&member.client_url, "GET", key, &[], Bytes::new()).await;
        assert_eq!((read.status, &read.body[..]), (200, value.as_bytes()), "{key}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_port_and_this_one_share_keys_and_tags() {
    let member = Member::start().await;
    let at_client = |method, value: &'static str| {
        member.send_to(&member.client_url, method, "/a", &[], Bytes::from(value))
    };
    assert_eq!(at_client("PUT", "v").await.status, 204);
    let tag = member.get("/v1/kv/a").await.etag();
    let deleted = member.send("DELETE", "/v1/kv/a", &[("if-match", &tag)], "").await;
    assert_eq!(deleted.status, 204);
    let gone = at_client("GET", "").await;
    assert_eq!((gone.status, &gone.body[..]), (404, &b"Failed to GET\n"[..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_happens_only_if_its_condition_holds() {
    let member = Member::start().await;
    let write = |method, header, value: &'static str| {
        let member = &member;
        async move { member.send(method, "/v1/kv/a", &[header], value).await.status }
    };
    assert_eq!(write("PUT", ("if-match", "*"), "0").await, 412);
    assert_eq!(write("DELETE", ("if-match", "*"), "").await, 412);
    assert_eq!(write("PUT", ("if-none-match", "*"), "1").await, 201);
    assert_eq!(write("PUT", ("if-none-match", "*"), "2").await, 412);
    let first = member.get("/v1/kv/a").await.etag();
    let weak = format!("W/{first}");
    assert_eq!(write("PUT", ("if-match", &weak), "3").await, 412, "weak tags never match");
    let list = format!("\"x\", {first}");
    assert_eq!(write("PUT", ("if-match", &list), "4").await, 204);
    assert_eq!(write("PUT", ("if-match", &first), "5").await, 412);
    assert_eq!(write("DELETE", ("if-match", &first), "").await, 412);
    assert_eq!(write("PUT", ("if-none-match", &first), "6").await, 204);
    let second = member.get("/v1/kv/a").await;
    assert_eq!(&second.body[..], b"6");
    let second = second.etag();
    assert_eq!(write("DELETE", ("if-match", &second), "").await, 204);
    // A key that is created again has another tag.
    member.put("/v1/kv/a", "6").await;
    assert_eq!(write("PUT", ("if-match", &second), "7").await, 412);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cached_value_is_not_sent_again() {
    let member = Member::start().await;
    let tag = member.put("/v1/kv/a", "v").await.etag();
    let get = |header| {
        let member = &member;
        async move { member.send("GET", "/v1/kv/a", &[header], "").await }
    };
    let cached = get(("if-none-match", &tag)).await;
    assert_eq!((cached.status, cached.etag(), cached.body.len()), (304, tag.clone(), 0));
    assert_eq!(get(("if-match", &tag)).await.status, 200);
    member.put("/v1/kv/a", "w").await;
    assert_eq!(get(("if-none-match", &tag)).await.status, 200);
    assert_eq!(get(("if-match", &tag)).await.status, 412);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_answers_for_each_operation() {
    let member = Member::start().await;
    let tag = member.put("/v1/kv/a", "old").await.etag();
    let txn = format!(
        r#"{{"if": [{{"key": "/a", "etag": {tag:?}}}, {{"key": "/b", "absent": true}}],
            "then": [{{"put": "/b", "value": "aGk="}}, {{"delete": "/c"}}, {{"get": "/a"}},
                     {{"get": "/d"}}, {{"put": "/e?f=%20", "value": ""}}],
            "else": [{{"get": "/b"}}, {{"delete": "/a"}}]}}"#
    );
    let done = member.txn(&txn).await;
    let index = done.index();
    let answer = done.json();
    assert_eq!((&answer["succeeded"], &answer["index"]), (&true.into(), &index.into()));
    let results = &answer["results"];
    let own = member.get("/v1/kv/b").await.etag();
    assert_eq!(results[0], serde_json::json!({"etag": own.trim_matches('"'), "created": true}));
    assert_eq!(results[1], serde_json::json!({"deleted": false}));
    let old = serde_json::json!({"etag": tag.trim_matches('"'), "bytes": 3, "value": "b2xk"});
    assert_eq!(results[2], old);
    assert_eq!(results[3], serde_json::json!({"absent": true}));
    assert_eq!(results.as_array().unwrap().len(), 5);
    assert_eq!(&member.get("/v1/kv/b").await.body[..], b"hi");
    assert_eq!(member.get("/v1/kv/e?f=%20").await.status, 200);
    // Now /b exists, and the same conditions fail.
    let answer = member.txn(&txn).await.json();
    assert_eq!(answer["succeeded"], false);
    assert_eq!(answer["results"][0]["value"], "aGk=");
    assert_eq!(answer["results"][1], serde_json::json!({"deleted": true}));
    assert_eq!(member.get("/v1/kv/a").await.status, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_follow_each_other_in_the_order_of_keys() {
    let member = Member::start().await;
    for key in ["/a", "/app/1", "/app/2", "/app/3", "/app/x?y=%20", "/b"] {
        member.put(&format!("/v1/kv{key}"), "hello").await;
    }
    let mut found = Vec::new();
    let mut after = String::new();
    loop {
        let page = member.get(&format!("/v1/keys?prefix=%2Fapp/&limit=2{after}")).await.json();
        let keys = page["keys"].as_array().unwrap();
        assert!(keys.len() <= 2);
        for key in keys {
            assert_eq!((&key["bytes"], key.get("value")), (&5.into(), None));
            found.push(key["key"].as_str().unwrap().to_owned());
        }
        let Some(next) = page["next"].as_str() else { break };
        after = format!("&after={next}");
    }
    assert_eq!(found, ["/app/1", "/app/2", "/app/3", "/app/x?y=%20"]);
    let with_values = member.get("/v1/keys?prefix=/b&values=true").await.json();
    assert_eq!(with_values["keys"][0]["value"], "aGVsbG8=");
    let put = member.put("/v1/kv/c", "v").await;
    let page = member.send("GET", "/v1/keys", &[("raft-read", "local")], "").await.json();
    assert_eq!(page["index"], put.index());
    assert_eq!(page["from"].as_str().unwrap(), put.etag().trim_matches('"'));
    assert_eq!(page["next"], Value::Null);
}

/// So that a page is bounded, and a large value is read by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_values_are_left_out_of_pages() {
    let member = Member::start().await;
    let at_most = "x".repeat(64 * 1024);
    member.send("PUT", "/v1/kv/at-most", &[], at_most.clone()).await;
    member.send("PUT", "/v1/kv/above", &[], at_most + "x").await;
    let page = member.everything().await;
    assert_eq!(page["keys"][0]["bytes"], 64 * 1024 + 1);
    assert_eq!(page["keys"][0].get("value"), None);
    assert!(page["keys"][1]["value"].is_string());
    // 1 MiB of values ends a page.
    for number in 0..20 {
        let value = "y".repeat(60_000);
        member.send("PUT", &format!("/v1/kv/z/{number:02}"), &[], value).await;
    }
    let page = member.get("/v1/keys?prefix=/z/&values=true").await.json();
    assert_eq!((page["keys"].as_array().unwrap().len(), &page["next"]), (18, &"/z/17".into()));
    let page = member.get("/v1/keys?prefix=/z/").await.json();
    assert_eq!(page["keys"].as_array().unwrap().len(), 20);
}
