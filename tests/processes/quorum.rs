//! Without a majority the original's requests hang for ever. These are answered with the outcome.

use std::time::{Duration, Instant};

use crate::support::processes::{
    Client, Cluster, FAST, PATIENCE, eventually, get, has_no_leader, request,
};

const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// For a busy machine.
const SLACK: Duration = Duration::from_millis(1500);

#[test]
fn without_a_majority_every_request_meets_its_deadline() {
    let flags = [&FAST[..], &["--request-timeout", "1s"]].concat();
    let mut cluster = Cluster::start(3, &flags);
    cluster.put(1, "/k", "acknowledged");
    let (leader, _) = cluster.leader();
    let followers: Vec<u64> = cluster.ids().into_iter().filter(|id| *id != leader).collect();
    followers.iter().for_each(|id| cluster.kill(*id));
    let removed = format!("/{}", followers[1]);
    let address = cluster.address(leader);
    let url = cluster.site.url();
    // The first round meets a leader that may not know yet, the second one a leader that stepped
    // down.
    for round in 0..2 {
        if round == 1 {
            eventually(PATIENCE, "it has no leader", || {
                has_no_leader(&cluster.process(leader).stderr())
            });
        }
        let begun = Instant::now();
        let requests = [
            ("PUT", "/k", "lost"),
            ("POST", "/4", url.as_str()),
            ("DELETE", removed.as_str(), ""),
            ("GET", "/k", ""),
        ];
        let clients = requests.map(|(method, target, body)| {
            let mut client = Client::new(address);
            client.send(method, target, body.as_bytes()).unwrap();
            (method, client)
        });
        for (method, mut client) in clients {
            let answer = client.receive().unwrap();
            let took = begun.elapsed();
            let told = String::from_utf8_lossy(&answer.body).into_owned();
            // One change waits for a majority; meanwhile the other is refused.
            let is_change = ["POST", "DELETE"].contains(&method);
            let allowed: &[u16] = if is_change { &[409, 503, 504] } else { &[503, 504] };
            assert!(allowed.contains(&answer.status), "{method}: {} {told}", answer.status);
            assert!(took < REQUEST_TIMEOUT + SLACK, "{method} took {took:?}");
            assert_eq!(told.matches('\n').count(), 1, "one line: {told:?}");
            assert_eq!(
                answer.headers.contains_key("retry-after"),
                answer.status == 503,
                "{method}"
            );
            if round == 1 {
                assert_eq!(
                    answer.status, 503,
                    "{method} without a leader proposes nothing: {told}"
                );
            }
        }
    }
    // With the majority back it continues, whichever of the two changes was carried out.
    followers.iter().for_each(|id| cluster.start_again(*id));
    let value = get(address, "/k").unwrap();
    assert!([&b"acknowledged"[..], b"lost"].contains(&&value[..]), "{value:?}");
    cluster.put(followers[0], "/k", "written");
    assert_eq!(request(address, "GET", "/k", b"").unwrap().body, b"written");
}

/// No append and no heartbeat tells it meanwhile. A heartbeat comes every 900 ms.
#[test]
fn a_follower_learns_of_a_commit_long_before_a_heartbeat() {
    let seldom = ["--tick", "10ms", "--election-ticks", "100", "--heartbeat-ticks", "90"];
    let mut cluster = Cluster::start(3, &seldom);
    cluster.put(1, "/first", "write");
    let (leader, _) = cluster.leader();
    let follower = cluster.address(leader % 3 + 1);
    for round in 0..10 {
        let key = format!("/round-{round}");
        cluster.put(leader, &key, "value");
        let mut client = Client::new(follower).reading_locally();
        eventually(Duration::from_millis(450), "the follower applies it", || {
            client.get(&key).unwrap().status == 200
        });
    }
}
