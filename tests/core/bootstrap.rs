//! The first start of a cluster: who begins, with whom, and what happens when something is lost on
//! the way.

use std::collections::BTreeSet;

use raftexample::channels::{Greeting, PeerHeader};
use raftexample::raft_node::{Input, NodeConfig};
use raftexample::transport::{Inbound, InboundBody};
use tokio::sync::oneshot;

use crate::support::memory::*;

/// The steps that three members need to begin, and some more.
const STEPS: usize = 60;

fn begun(network: &Network) -> Vec<u64> {
    let begun = network.members.values().filter(|member| member.status().begun);
    begun.map(|member| member.id).collect()
}

/// The clusters that members have begun.
fn clusters(network: &Network) -> BTreeSet<u64> {
    let begun = network.members.values().map(Member::status).filter(|status| status.begun);
    begun.map(|status| status.cluster_id).collect()
}

fn start(network: &mut Network, id: u64) -> MemVfs {
    let disk = MemVfs::default();
    network.start(&config(id, 3), &disk).unwrap();
    disk
}

/// One member ticks, and the messages of one round are delivered.
fn step(network: &mut Network, number: usize) {
    network.turn(number as u64 % 3 + 1, [Input::Tick]);
    network.deliver_round();
}

fn again(id: u64) -> NodeConfig {
    NodeConfig { boot: 2000 + id, ..config(id, 3) }
}

/// A member with an empty directory.
fn wiped(id: u64) -> NodeConfig {
    NodeConfig { incarnation: 900 + id, ..again(id) }
}

fn serves(network: &mut Network) {
    let id = *network.members.keys().next().unwrap();
    network.tick_until("there is a leader", |network| {
        network.members.values().any(|member| member.status().leader == member.id)
    });
    network.settle();
    assert!(network.put(id, "key", "value").is_ok());
}

#[test]
fn a_cluster_begins_only_when_all_first_members_are_there() {
    let mut network = Network::default();
    for id in [1, 2] {
        start(&mut network, id);
    }
    network.tick(40);
    assert!(begun(&network).is_empty());
    for id in [1, 2] {
        let line = format!("waiting for {} (unreachable)", url(3));
        assert!(network.member(id).logged(&line), "{:?}", network.member(id).logs);
    }
    start(&mut network, 3);
    network.tick_until("all have begun", |network| begun(network).len() == 3);
    assert_eq!(clusters(&network).len(), 1);
    serves(&mut network);
    let bound = network.member(1).status().members.incarnations;
    assert_eq!(bound, (1..=3).map(|id| (id, 100 + id)).collect());
}

#[test]
fn first_members_begin_in_any_order_and_at_any_time() {
    let orders = [[1, 2, 3], [1, 3, 2], [2, 1, 3], [2, 3, 1], [3, 1, 2], [3, 2, 1]];
    for order in orders {
        for pause in [0, 1, 4, 9] {
            let mut network = Network::default();
            for id in order {
                start(&mut network, id);
                network.tick(pause);
            }
            network.tick_until("all have begun", |network| begun(network).len() == 3);
            assert_eq!(clusters(&network).len(), 1, "{order:?} {pause}");
            for id in order {
                let names_none = network.member(id).logged("waiting for  before");
                assert!(!names_none, "{:?}", network.member(id).logs);
            }
            serves(&mut network);
        }
    }
}

#[test]
fn a_restart_at_any_step_of_a_first_start_changes_nothing() {
    for at in 0..STEPS {
        for survives in [Survives::Nothing, Survives::Everything] {
            let mut network = Network::default();
            (1..=3).for_each(|id| drop(start(&mut network, id)));
            (0..at).for_each(|number| step(&mut network, number));
            let id = at as u64 % 3 + 1;
            let disk = network.crash(id, survives);
            network.start(&again(id), &disk).unwrap();
            network.tick_until("all have begun", |network| begun(network).len() == 3);
            assert_eq!(clusters(&network).len(), 1, "step {at}");
            serves(&mut network);
            let bound = network.member(1).status().members.incarnations;
            assert_eq!(bound, (1..=3).map(|id| (id, 100 + id)).collect(), "step {at}");
        }
    }
}

/// Either all begin with the new directory, or nobody begins and all say so, or those that have begun
/// refuse it.
#[test]
fn a_wipe_at_any_step_of_a_first_start_mixes_no_two_lives() {
    let mut outcomes = BTreeSet::new();
    for at in 0..STEPS {
        for id in 1..=3 {
            let mut network = Network::default();
            (1..=3).for_each(|id| drop(start(&mut network, id)));
            (0..at).for_each(|number| step(&mut network, number));
            network.members.remove(&id);
            network.start(&wiped(id), &MemVfs::default()).unwrap();
            network.tick(60);
            assert!(clusters(&network).len() <= 1, "step {at}: {:?}", clusters(&network));
            let others: Vec<u64> = (1..=3).filter(|other| *other != id).collect();
            outcomes.insert(match &begun(&network)[..] {
                [1, 2, 3] => "all begin",
                [] => {
                    for member in network.members.values() {
                        assert!(member.logged("nothing was acknowledged"), "step {at}");
                    }
                    "nobody begins"
                }
                running => {
                    assert_eq!(running, others, "step {at}: the wiped one takes no part");
                    let error = network.ended.remove(&id).expect("it is refused").to_string();
                    assert!(error.contains("under a new id"), "{error}");
                    serves(&mut network);
                    "the wiped one is refused"
                }
            });
        }
    }
    assert_eq!(outcomes.len(), 3, "all of them happen: {outcomes:?}");
}

/// It stopped just before its last answer came, while the others began and acknowledged. Then one of
/// these loses its disk.
#[test]
fn a_first_member_that_stopped_before_the_end_begins_later() {
    let mut network = Network::default();
    let mut disks: Vec<MemVfs> = (1..=3).map(|id| start(&mut network, id)).collect();
    // Member 3 answers the others, and hears nothing more.
    while begun(&network).len() < 2 {
        (1..=3).for_each(|id| network.turn(id, [Input::Tick]));
        let sent = network.member(3).sent.clone();
        if network.member(3).admission.cluster_id() != 0 {
            sent.lock().unwrap().greetings.clear();
        }
        network.deliver_round();
    }
    assert_eq!(begun(&network), [1, 2]);
    disks[2] = network.crash(3, Survives::Nothing);
    serves(&mut network);
    // With the one that lost its disk it begins nothing.
    disks[0] = network.crash(1, Survives::Nothing);
    network.members.remove(&2);
    network.start(&wiped(2), &MemVfs::default()).unwrap();
    network.start(&again(3), &disks[2]).unwrap();
    network.tick(60);
    assert!(begun(&network).is_empty());
    // With the one that has begun it begins, and the lost one is refused.
    network.start(&again(1), &disks[0]).unwrap();
    network.tick_until("member 3 has begun", |network| begun(network) == [1, 3]);
    network.tick_until("they have a leader", |network| {
        network.members.values().any(|member| member.status().leader == member.id)
    });
    network.settle();
    assert!(network.ended.contains_key(&2));
    assert_eq!(network.member(3).state()["key"].0, "value");
}

#[test]
fn a_second_process_with_the_same_id_cannot_begin() {
    let mut network = Network::default();
    (1..=2).for_each(|id| drop(start(&mut network, id)));
    start(&mut network, 3);
    let tables = |network: &mut Network, id: u64| network.member(id).admission.cluster_id();
    // Member 1 hears the one, member 2 the other.
    while tables(&mut network, 1) == 0 {
        network.turn(1, [Input::Tick]);
        network.deliver();
    }
    network.members.remove(&3);
    network.start(&wiped(3), &MemVfs::default()).unwrap();
    network.tick(60);
    assert!(begun(&network).is_empty());
    assert!(network.members.values().all(|member| member.logged("nothing was acknowledged")));
}

/// An incarnation is learned from the answer at a listed URL, and from nothing else.
#[test]
fn a_stranger_that_greets_changes_no_table() {
    let mut network = Network::default();
    (1..=2).for_each(|id| drop(start(&mut network, id)));
    network.tick(12);
    for id in [1, 2] {
        let member = network.member(id);
        let header = PeerHeader {
            cluster_id: 0x5ca1ab1e,
            from: 3,
            incarnation: 666,
            url: url(3),
            ..member.header(id)
        };
        let first_urls = (1..=3).map(url).collect();
        for begun in [false, true] {
            let greeting = Greeting { first_urls: Vec::clone(&first_urls), begun };
            let (answer, _answer_rx) = oneshot::channel();
            let body = InboundBody::Greeting(greeting, answer);
            member.turn([Input::Inbound(Inbound::new(header.clone(), body))]).unwrap();
        }
        assert_eq!(member.admission.cluster_id(), 0, "the table is not complete");
        assert!(!member.wal().incarnations.contains_key(&3));
    }
    start(&mut network, 3);
    network.tick_until("all have begun", |network| begun(network).len() == 3);
    assert_eq!(network.member(1).status().members.incarnations[&3], 103);
}
