//! Members join and leave under load while others are killed.

use std::thread;
use std::time::Duration;

use crate::clients::Clients;
use crate::runner::{FAST, Run, SMALL, rounds};
use crate::support::processes::{Answer, PATIENCE, eventually, request};

const MEMBERS_MAX: usize = 5;
/// Writes acknowledged after each change.
const WRITES: usize = 30;
/// The largest offset between a change's request and a kill.
const OVERLAP: Duration = Duration::from_millis(60);

/// Starts with one member. Each round adds or removes one, between one and five, and kills another
/// half of the time.
fn change_members(default_rounds: usize) {
    let flags = [&FAST[..], &SMALL].concat();
    let mut run = Run::start("members added and removed, with kills", 1, &flags);
    let mut next_id = 2;
    for round in 0..rounds(default_rounds) {
        let clients = run.load();
        clients.wait_for(WRITES);
        run.assert_alive();
        let size = run.cluster.ids().len();
        let grows = size == 1 || size < MEMBERS_MAX && run.random.below(2) == 0;
        // Grow to three at first: with one or two members little can go wrong.
        if grows || round < 2 {
            add(&mut run, &clients, next_id);
            next_id += 1;
        } else {
            remove(&mut run, &clients);
        }
        clients.wait_for(WRITES);
        run.check(clients);
    }
    run.finish();
}

fn add(run: &mut Run, clients: &Clients, id: u64) {
    run.inject();
    let url = run.cluster.new_url(id);
    let others = run.cluster.ids();
    ask(run, "POST", id, &url);
    // It starts before the change is confirmed: a single member that now counts two needs the
    // second one to answer.
    run.cluster.start_joiner(id);
    confirm(run, &others, "POST", id, &url);
    clients.set_members(&run.cluster.addresses());
}

fn remove(run: &mut Run, clients: &Clients) {
    let ids = run.cluster.ids();
    let id = match run.random.below(3) {
        0 => run.cluster.leader().0,
        _ => *run.random.choose(&ids),
    };
    run.inject();
    // Half of the time the member is down during its removal and learns of it from the others, if
    // they are a majority.
    let is_away = ids.len() > 2 && run.random.below(2) == 0;
    if is_away {
        run.cluster.kill(id);
    }
    ask(run, "DELETE", id, "");
    // The removed member may have ended already.
    let others: Vec<u64> = ids.into_iter().filter(|other| *other != id).collect();
    confirm(run, &others, "DELETE", id, "");
    if is_away {
        run.cluster.start_again(id);
    }
    let told = |run: &mut Run| {
        let removed = run.cluster.process(id);
        assert_eq!(removed.wait(PATIENCE), 0, "a removed member ends in order");
        let stderr = removed.stderr();
        assert!(stderr.contains("I've been removed from the cluster!"), "{stderr}");
    };
    told(run);
    // Its data does not bring it back.
    run.cluster.start_again(id);
    told(run);
    run.cluster.forget(id);
    clients.set_members(&run.cluster.addresses());
}

/// Requests a change. Half of the time it also kills a member just before, during or after it.
fn ask(run: &mut Run, method: &str, id: u64, url: &str) {
    let target = format!("/{id}");
    let ids = run.cluster.ids();
    let at = run.cluster.address(*run.random.choose(&ids));
    let mut running = ids.clone();
    running.retain(|id| run.cluster.process(*id).exited().is_none());
    let victim = (run.random.below(2) == 0).then(|| *run.random.choose(&running));
    let (asks_after, dies_after) = (run.random.time(OVERLAP), run.random.time(OVERLAP));
    thread::scope(|scope| {
        scope.spawn(|| {
            // The overlap is the fault; likewise for the kill.
            thread::sleep(asks_after);
            // The answer may be lost with the member; `confirm` checks the outcome.
            let _ = request(at, method, &target, url.as_bytes());
        });
        if let Some(victim) = victim {
            thread::sleep(dies_after);
            run.cluster.kill(victim);
            run.cluster.start_again(victim);
        }
    });
}

/// Repeats the request at one member after another until one reports it done.
fn confirm(run: &Run, members: &[u64], method: &str, id: u64, url: &str) {
    let target = format!("/{id}");
    let mut turn = members.iter().cycle();
    eventually(PATIENCE, &format!("{method} {target}"), || {
        let at = run.cluster.address(*turn.next().expect("there are members"));
        match request(at, method, &target, url.as_bytes()) {
            Ok(Answer { status: 204, .. }) => true,
            Ok(Answer { status: 409, body, .. }) => {
                String::from_utf8_lossy(&body).contains("is a member already")
            }
            Ok(Answer { status: 503 | 504, .. }) | Err(_) => false,
            Ok(answer) => panic!("{method} {target} is answered {answer:?}"),
        }
    });
}

#[test]
fn members_come_and_go_under_load_and_kills_and_nothing_is_lost() {
    change_members(8);
}

#[test]
#[ignore = "long: 100 changes of members"]
fn members_replaced_100_times_under_load_lose_nothing() {
    change_members(100);
}
