//! Watches.

use tokio::time::{Instant, timeout};

use super::*;

/// A stream of events, read block by block.
pub struct Events {
    response: reqwest::Response,
    text: String,
}

/// One event, `id`, `event` and `data`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    pub id: String,
    pub kind: String,
    pub data: String,
}

impl Event {
    fn key(&self) -> String {
        let data: Value = serde_json::from_str(&self.data).unwrap();
        data["key"].as_str().unwrap().to_owned()
    }
}

impl Events {
    pub async fn open(member: &Member, target: &str, headers: &[(&str, &str)]) -> Self {
        let mut request = member.http.get(format!("{}{target}", member.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let answer = Answer { status, headers, body: Bytes::new() };
        description::check("GET", target, &answer);
        assert_eq!(status, 200, "{answer:?}");
        Self { response, text: String::new() }
    }

    /// The next block, comments and ids alone included; `None` at the end of the stream.
    pub async fn block(&mut self) -> Option<Event> {
        loop {
            if let Some((block, rest)) = self.text.split_once("\n\n") {
                let mut event = Event::default();
                for line in block.lines() {
                    let (name, value) = line.split_once(": ").unwrap_or((line, ""));
                    match name {
                        "id" => event.id = value.to_owned(),
                        "event" => event.kind = value.to_owned(),
                        "data" => event.data = value.to_owned(),
                        ":" => {}
                        other => panic!("{other:?} in {block:?}"),
                    }
                }
                self.text = rest.to_owned();
                return Some(event);
            }
            let chunk = timeout(PATIENCE, self.response.chunk()).await;
            let chunk = chunk.expect("in time").expect("the stream does not break")?;
            self.text.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    }

    /// The next event that a client sees.
    pub async fn event(&mut self) -> Event {
        let begun = Instant::now();
        loop {
            // Comments come however long there is no event.
            assert!(begun.elapsed() < PATIENCE, "an event is due");
            let block = self.block().await.expect("the stream goes on");
            if !block.kind.is_empty() {
                return block;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_shows_each_change_below_its_prefix_in_order() {
    let member = Member::start().await;
    member.put("/v1/kv/a/before", "v").await;
    let mut events = Events::open(&member, "/v1/watch?prefix=/a/&values=true", &[]).await;
    let put = member.put("/v1/kv/a/1", "hi").await;
    member.put("/v1/kv/b", "v").await;
    let txn = r#"{"then":[{"put":"/b","value":""},{"put":"/a/2","value":"dg=="},
        {"delete":"/a/none"},{"get":"/a/x"},{"delete":"/a/1"}]}"#;
    let txn = member.txn(txn).await;
    let tag = put.etag().trim_matches('"').to_owned();
    let cluster = tag.split('-').next().unwrap();
    let first = events.event().await;
    assert_eq!((first.id, &first.kind[..]), (format!("{tag}.0"), "put"));
    let data: Value = serde_json::from_str(&first.data).unwrap();
    let expected = serde_json::json!({"key": "/a/1", "etag": tag, "bytes": 2, "value": "aGk="});
    assert_eq!(data, expected);
    let (second, third) = (events.event().await, events.event().await);
    let index = txn.index();
    assert_eq!((second.key(), second.id.clone()), ("/a/2".into(), format!("{cluster}-{index}.1")));
    assert_eq!((&third.kind[..], third.key()), ("delete", "/a/1".into()));
    assert_eq!(third.id, format!("{cluster}-{index}.2"), "what changed nothing has no position");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_resumes_after_any_event_without_gap_or_repetition() {
    let member = Member::start().await;
    let listed = member.everything().await;
    let txn = r#"{"then":[{"put":"/a","value":""},{"put":"/b","value":""}]}"#;
    member.txn(txn).await;
    member.put("/v1/kv/c", "v").await;
    let from = |place: &str| format!("/v1/watch?from={place}");
    let mut events = Events::open(&member, &from(listed["from"].as_str().unwrap()), &[]).await;
    let all = [events.event().await, events.event().await, events.event().await];
    assert_eq!(all.clone().map(|event| event.key()), ["/a", "/b", "/c"]);
    let index = listed["index"].as_u64().unwrap().to_string();
    let mut by_index = Events::open(&member, &from(&index), &[]).await;
    assert_eq!(by_index.event().await, all[0]);
    drop((events, by_index));
    for (seen, next) in [(0, 1), (1, 2)] {
        let id = &all[seen].id[..];
        // A browser repeats the URL that it began with.
        let target = from(listed["from"].as_str().unwrap());
        let mut resumed = Events::open(&member, &target, &[("last-event-id", id)]).await;
        assert_eq!(resumed.event().await, all[next]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_of_another_cluster_is_reset() {
    let member = Member::start().await;
    let put = member.put("/v1/kv/a", "v").await;
    let target = "/v1/watch?from=00000000000000aa-1.0";
    let mut events = Events::open(&member, target, &[]).await;
    let reset = events.event().await;
    assert_eq!((&reset.kind[..], reset.id), ("reset", put.etag().trim_matches('"').to_owned()));
    assert!(reset.data.contains("another cluster"), "{}", reset.data);
    assert_eq!(events.block().await, None, "a reset is the last event");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_from_what_is_no_longer_kept_is_reset() {
    let member = Member::start().await;
    let first = member.put("/v1/kv/a", "v").await;
    // 200 of 90,000 bytes exceed 16 MiB.
    for _ in 0..200 {
        member.send("PUT", "/v1/kv/a", &[], "x".repeat(90_000)).await;
    }
    let target = format!("/v1/watch?from={}", first.etag().trim_matches('"'));
    let reset = Events::open(&member, &target, &[]).await.event().await;
    assert_eq!(reset.kind, "reset");
    assert!(reset.data.contains("no longer kept"), "{}", reset.data);
    // From the place that it names, the watch goes on.
    let mut events = Events::open(&member, &format!("/v1/watch?from={}", reset.id), &[]).await;
    member.put("/v1/kv/b", "v").await;
    assert_eq!(events.event().await.key(), "/b");
}

/// The place of another member may be ahead of one that lags.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_local_watch_from_a_later_index_waits_for_it() {
    let member = Member::start().await;
    let last = member.put("/v1/kv/a", "v").await.index();
    let target = format!("/v1/watch?from={}", last + 2);
    let mut events = Events::open(&member, &target, &[("raft-read", "local")]).await;
    for key in ["/v1/kv/b", "/v1/kv/c", "/v1/kv/d"] {
        member.put(key, "v").await;
    }
    assert_eq!(events.event().await.key(), "/d");
}

/// Otherwise it could not resume after a pause in which only other keys have changed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_watch_learns_the_place_that_it_has_reached() {
    let member = Member::start().await;
    let mut events = Events::open(&member, "/v1/watch?prefix=/idle", &[]).await;
    let start = events.block().await.unwrap();
    assert!(start.kind.is_empty() && !start.id.is_empty(), "{start:?}");
    let put = member.put("/v1/kv/a", "v").await;
    let begun = Instant::now();
    let place = events.block().await.unwrap();
    assert_eq!(place.id, put.etag().trim_matches('"'));
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_are_bounded_in_number_and_end_with_the_member() {
    let member = Member::start().await;
    let mut watches = Vec::new();
    for _ in 0..WATCHERS {
        watches.push(Events::open(&member, "/v1/watch", &[]).await);
    }
    assert!(member.get("/v1/watch").await.problem(503).contains("watchers"));
    drop(watches.pop());
    let begun = Instant::now();
    // The member notices when it writes to the closed connection.
    while member.put("/v1/kv/a", "v").await.status != 503 {
        let request = member.http.get(format!("{}/v1/watch", member.url));
        if request.send().await.unwrap().status() == 200 {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "its place is free again");
    }
    drop(member._stop_tx);
    for mut events in watches {
        while events.block().await.is_some() {}
    }
}
