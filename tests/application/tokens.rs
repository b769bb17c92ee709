//! Retry tokens: a write is carried out once, and repetitions get its outcome.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repetition_gets_the_first_outcome() {
    let member = Member::start().await;
    let token = member.token().await;
    let quoted = format!("\"{token}\"");
    let put = |value: &'static str, token: &str| {
        let (member, token) = (&member, token.to_owned());
        async move { member.send("PUT", "/v1/kv/a", &[("idempotency-key", &token)], value).await }
    };
    let first = put("v", &token).await;
    assert_eq!((first.status, first.header("idempotency-replayed")), (201, None));
    member.put("/v1/kv/a", "w").await;
    let again = put("v", &quoted).await;
    assert_eq!((again.status, again.header("idempotency-replayed")), (201, Some("true")));
    assert_eq!((again.index(), again.etag()), (first.index(), first.etag()));
    assert_eq!(&member.get("/v1/kv/a").await.body[..], b"w", "it was not done twice");
    assert!(put("other", &token).await.problem(422).contains("another write"));
    let elsewhere = member.send("PUT", "/v1/kv/b", &[("idempotency-key", &token)], "v").await;
    assert_eq!(elsewhere.status, 422);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_condition_is_repeated_as_it_was() {
    let member = Member::start().await;
    member.put("/v1/kv/a", "v").await;
    let token = member.token().await;
    let headers = [("if-none-match", "*"), ("idempotency-key", &token[..])];
    let first = member.send("PUT", "/v1/kv/a", &headers, "w").await;
    assert_eq!(first.status, 412);
    member.send("DELETE", "/v1/kv/a", &[], "").await;
    let again = member.send("PUT", "/v1/kv/a", &headers, "w").await;
    assert_eq!((again.status, again.index()), (412, first.index()));
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    assert_eq!(member.get("/v1/kv/a").await.status, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletions_and_transactions_take_tokens() {
    let member = Member::start().await;
    member.put("/v1/kv/a", "v").await;
    let (delete, txn) = (member.token().await, member.token().await);
    let headers = [("idempotency-key", &delete[..])];
    let first = member.send("DELETE", "/v1/kv/a", &headers, "").await;
    let again = member.send("DELETE", "/v1/kv/a", &headers, "").await;
    assert_eq!((first.status, again.status, again.index()), (204, 204, first.index()));
    let headers = [("idempotency-key", &txn[..])];
    let body = r#"{"then":[{"put":"/a","value":"dg=="},{"delete":"/a2"},{"put":"/b","value":""}]}"#;
    let first = member.send("POST", "/v1/txn", &headers, body).await;
    member.put("/v1/kv/a2", "v").await;
    // The same transaction, written in another way.
    let body = r#"{"else":[],"then":[{"value":"dg==","put":"/a"},{"delete":"\u002fa2"},
        {"put":"/b","value":""}], "if": []}"#;
    let again = member.send("POST", "/v1/txn", &headers, body).await;
    assert_eq!((first.status, first.json()), (200, again.json()));
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    assert_eq!(member.get("/v1/kv/a2").await.status, 200);
    let body = r#"{"then":[{"get":"/a"}]}"#;
    let reads = member.send("POST", "/v1/txn", &headers, body).await;
    assert!(reads.problem(400).contains("cannot have a get"));
}

/// Both are in the log. Whichever is applied first is carried out, and the other gets its outcome.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_copies_in_flight_are_carried_out_once() {
    let member = Arc::new(Member::start().await);
    for _ in 0..20 {
        let token = member.token().await;
        let copy = || {
            let (member, token) = (member.clone(), token.clone());
            tokio::spawn(async move {
                let headers = [("idempotency-key", &token[..])];
                let body = r#"{"if":[{"key":"/n","absent":true}],
                    "then":[{"put":"/n","value":""}],"else":[{"delete":"/n"}]}"#;
                member.send("POST", "/v1/txn", &headers, body).await
            })
        };
        let (one, other) = (copy(), copy());
        let (one, other) = (one.await.unwrap(), other.await.unwrap());
        assert_eq!(one.json(), other.json());
        let replayed = |answer: &Answer| answer.header("idempotency-replayed").is_some();
        assert!(replayed(&one) != replayed(&other), "one of them is the first");
    }
    assert_eq!(member.get("/v1/kv/n").await.status, 404, "created and deleted, ten times");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_no_member_issued_changes_nothing() {
    let member = Member::start().await;
    let token = member.token().await;
    let [cluster, index, random] = token.split('-').collect::<Vec<_>>()[..] else { panic!() };
    let before = member.everything().await;
    let foreign = format!("{:016x}-{index}-{random}", 1);
    for (token, status, why) in [
        (foreign, 409, "another cluster"),
        (format!("{cluster}-ffffffff-{random}"), 400, "not issued"),
        ("8e03978e-40d5-43dd-bc93-6894a57f9324".to_owned(), 400, "/v1/retry-token"),
        (String::new(), 400, "/v1/retry-token"),
    ] {
        let headers = [("idempotency-key", &token[..])];
        let refused = member.send("PUT", "/v1/kv/a", &headers, "v").await;
        assert!(refused.problem(status).contains(why), "{token}: {refused:?}");
    }
    assert_eq!(member.everything().await["keys"], before["keys"]);
}
