//! Members that hang: running, connected and silent.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::processes::{
    Client, Cluster, FAST, PATIENCE, Signal, eventually, put_in_term, request,
};

/// Two election timeouts with default flags. If a hung follower delayed writes, they would wait
/// much longer, until its connection is given up.
const SOON: Duration = Duration::from_secs(2);
/// How soon a lost write is known as such, at the latest. It takes half an election timeout, and a second for
/// each 10 MiB that were on their way.
const LOST_AFTER: Duration = Duration::from_secs(5);

#[test]
fn a_hung_follower_does_not_hold_up_writes() {
    let mut cluster = Cluster::start(3, &[]);
    cluster.put(1, "/k", "before");
    let (leader, term) = cluster.leader();
    let follower = cluster.ids().into_iter().find(|id| *id != leader).unwrap();
    cluster.process(follower).pause();
    let begun = Instant::now();
    let mut client = Client::new(cluster.address(leader));
    let mut count = 0;
    while begun.elapsed() < Duration::from_secs(3) {
        let sent = Instant::now();
        assert_eq!(client.put(&format!("/{count}"), b"value").unwrap(), 204);
        assert!(sent.elapsed() < SOON, "a write took {:?}", sent.elapsed());
        count += 1;
        // The rate of the load, not a wait.
        thread::sleep(Duration::from_millis(5));
    }
    cluster.process(follower).signal(Signal::SIGCONT);
    cluster.put(leader, "/k", "after");
    // It catches up and does not disturb the leader.
    assert_eq!(cluster.get(follower, "/k").as_deref(), Some("after"));
    assert_eq!(cluster.get(follower, &format!("/{}", count - 1)).as_deref(), Some("value"));
    assert_eq!(cluster.leader(), (leader, term));
}

/// Some forwarded writes never reach the leader. The member that forwarded them learns this from the stream
/// that carried them, and answers at once. Neither the client nor a member that stops waits for the request's
/// timeout.
#[test]
fn a_write_lost_on_its_way_to_the_leader_is_answered_soon() {
    let mut cluster = Cluster::start(3, &["--request-timeout", "20s"]);
    cluster.put(1, "/k", "before");
    let (leader, _) = cluster.leader();
    let follower = cluster.ids().into_iter().find(|id| *id != leader).unwrap();
    let address = cluster.address(follower);
    // More than fits into the buffers between the two, so that some of it is lost with the connection.
    let value = vec![b'x'; 1 << 20];
    let load = |is_over: &AtomicBool| {
        let (mut client, mut slowest, mut lost) = (Client::new(address), Duration::ZERO, 0);
        let begun = Instant::now();
        while !is_over.load(Ordering::Relaxed) && begun.elapsed() < PATIENCE {
            let sent = Instant::now();
            let answered = client.put("/k", &value);
            slowest = slowest.max(sent.elapsed());
            match answered {
                Ok(204) => {}
                Ok(504) => lost += 1,
                Ok(503) => {}
                // The member has stopped.
                Err(_) => break,
                Ok(status) => panic!("{status}"),
            }
        }
        (slowest, lost)
    };
    // The length of the pause is the fault: more than a stream's patience, less than an election timeout.
    let pause = |cluster: &mut Cluster| {
        cluster.process(leader).pause();
        thread::sleep(Duration::from_millis(700));
        cluster.process(leader).signal(Signal::SIGCONT);
    };
    // Runs `meanwhile` beside eight of them.
    let beside_load = |meanwhile: &mut dyn FnMut()| {
        let is_over = AtomicBool::new(false);
        let outcomes: Vec<(Duration, u32)> = thread::scope(|scope| {
            let clients: Vec<_> = (0..8).map(|_| scope.spawn(|| load(&is_over))).collect();
            meanwhile();
            is_over.store(true, Ordering::Relaxed);
            clients.into_iter().map(|client| client.join().unwrap()).collect()
        });
        let slowest = outcomes.iter().map(|(slowest, _)| *slowest).max().unwrap();
        (slowest, outcomes.iter().map(|(_, lost)| lost).sum::<u32>())
    };
    let (slowest, lost) = beside_load(&mut || {
        for _ in 0..4 {
            pause(&mut cluster);
            cluster.put(leader, "/k", "after");
        }
    });
    println!("{lost} writes were lost, the slowest answer took {slowest:?}");
    assert!(lost > 0, "no write was on its way");
    assert!(slowest < LOST_AFTER, "an answer took {slowest:?}");

    let mut stop = Duration::ZERO;
    beside_load(&mut || {
        cluster.put(leader, "/k", "again");
        cluster.process(leader).pause();
        let begun = Instant::now();
        cluster.process(follower).signal(Signal::SIGTERM);
        eventually(PATIENCE, "it stops", || cluster.process(follower).exited().is_some());
        stop = begun.elapsed();
    });
    println!("stopped after {stop:?}");
    assert!(stop < LOST_AFTER, "it stopped after {stop:?}");
}

/// etcd #20418: a paused leader wakes up, believes that it still leads, and answers a read.
#[test]
fn a_leader_that_was_paused_never_answers_with_an_old_value() {
    const READERS: usize = 16;
    let mut cluster = Cluster::start(3, &FAST);
    let mut proved = 0;
    for round in 0..12 {
        if proved == 3 {
            break;
        }
        let (old, new) = (format!("old-{round}"), format!("new-{round}"));
        let (leader, _) = cluster.leader();
        let term = put_in_term(cluster.address(leader), "/k", old.as_bytes());
        let paused = Instant::now();
        cluster.process(leader).pause();
        // Half of the reads wait in its sockets when it wakes up.
        let mut clients: Vec<Client> =
            (0..READERS).map(|_| Client::new(cluster.address(leader))).collect();
        let other = cluster.ids().into_iter().find(|id| *id != leader).unwrap();
        let new_term = put_in_term(cluster.address(other), "/k", new.as_bytes());
        // On a busy machine another member may have taken over before.
        proved += usize::from(new_term > term);
        // The length of the pause is the fault: three election timeouts.
        thread::sleep(Duration::from_millis(600).saturating_sub(paused.elapsed()));
        let (early, late) = clients.split_at_mut(READERS / 2);
        early.iter_mut().for_each(|client| client.send("GET", "/k", b"").unwrap());
        cluster.process(leader).signal(Signal::SIGCONT);
        late.iter_mut().for_each(|client| client.send("GET", "/k", b"").unwrap());
        let mut answered = 0;
        for client in &mut clients {
            let answer = client.receive().unwrap();
            match answer.status {
                200 => {
                    assert_eq!(String::from_utf8(answer.body).unwrap(), new, "an old value");
                    answered += 1;
                }
                status => assert!([503, 504].contains(&status), "{status}"),
            }
        }
        assert!(answered > 0, "round {round}: no read was answered at all");
        println!("round {round}: {answered} of {READERS} reads were answered");
        let answer = request(cluster.address(other), "GET", "/k", b"").unwrap();
        assert_eq!(answer.body, new.as_bytes());
    }
    assert_eq!(proved, 3, "too few of the paused members led");
}
