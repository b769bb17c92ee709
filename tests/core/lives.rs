//! Who a member is, and which life of a cluster it belongs to: histories in which acknowledged writes
//! disappeared because this was known locally only.

use raftexample::channels::{GreetingAnswer, Matched, MemberRequest, PeerReport, Refusal};
use raftexample::raft_node::{Input, NodeConfig, Role};

use crate::members::moving;
use crate::support::memory::*;

/// A member with an empty directory that joins.
fn joins(id: u64, incarnation: u64, urls: &[u64]) -> NodeConfig {
    let cluster = urls.iter().copied().map(url).collect();
    NodeConfig { join: true, incarnation, boot: 5000 + incarnation, cluster, ..config(id, id) }
}

fn leads(network: &Network) -> Vec<u64> {
    let leaders = network.members.values().filter(|member| member.status().leader == member.id);
    leaders.map(|member| member.id).collect()
}

fn is_voter(network: &Network, at: u64, id: u64) -> bool {
    let status = network.members[&at].status();
    status.members.urls.contains_key(&id) && !status.learners.contains(&id)
}

fn change(network: &mut Network, at: u64, request: MemberRequest) {
    let mut answer = network.member(at).change(request).unwrap();
    network.deliver();
    network.settle();
    assert!(answer.is_ok(), "{:?}", answer.get());
}

/// Delivers message by message, and ticks `ids` when there is none, until `holds`.
fn step_until(network: &mut Network, ids: &[u64], holds: impl Fn(&Network) -> bool) {
    for _ in 0..1000 {
        if holds(network) {
            return;
        }
        if !network.deliver_round() {
            ids.iter().for_each(|id| network.turn(*id, [Input::Tick]));
        }
    }
    panic!("waited in vain");
}

fn promoting(network: &Network) -> bool {
    network.members[&1].logged("promoting learner 4")
}

fn last_index(network: &Network, id: u64) -> u64 {
    network.members[&id].wal().last_index()
}

/// Members 1 and 2, and member 3, which was promoted and never met member 2.
fn never_met(by_snapshot: bool) -> Network {
    let mut network = Network::new(2, |config| {
        if by_snapshot {
            (config.snapshot_count, config.snapshot_catch_up_entries) = (3, 1);
        }
    });
    network.cut_links.insert((2, 3));
    for number in 0..12 {
        assert!(network.put(1, "key", &number.to_string()).is_ok());
    }
    network.settle();
    change(&mut network, 1, MemberRequest::Add { id: 3, url: url(3) });
    network.start(&joins(3, 103, &[1, 2, 3]), &MemVfs::default()).unwrap();
    network.tick_until("member 3 is promoted", |network| is_voter(network, 3, 3));
    assert_eq!(network.member(3).logged("publishing snapshot"), by_snapshot);
    network
}

#[test]
fn a_wiped_voter_and_a_member_that_never_met_it_elect_nobody() {
    for by_snapshot in [false, true] {
        let mut network = never_met(by_snapshot);
        network.cut.insert(3);
        assert!(network.put(1, "key", "acknowledged").is_ok());
        network.settle();
        network.members.remove(&1);
        network.members.remove(&2);
        network.cut.clear();
        network.cut_links.clear();
        for wiped in [joins(2, 902, &[1, 2, 3]), NodeConfig { incarnation: 902, ..config(2, 2) }] {
            network.start(&wiped, &MemVfs::default()).unwrap();
            network.tick(80);
            assert!(leads(&network).is_empty(), "by snapshot: {by_snapshot}");
            if let Some(error) = network.ended.remove(&2) {
                assert!(error.to_string().contains("under a new id"), "{error}");
            } else {
                assert!(!network.member(2).status().begun);
                network.members.remove(&2);
            }
        }
    }
}

/// One of the first list's directories is left over from an earlier life. It had never met one of the
/// others.
#[test]
fn a_cluster_begun_twice_with_a_leftover_mixes_no_two_lives() {
    let first_life = |network: &mut Network| {
        network.cut_links.insert((2, 3));
        for id in 1..=3 {
            network.start(&config(id, 3), &MemVfs::default()).unwrap();
        }
        network.tick(30);
    };
    let mut network = Network::new(3, |_| {});
    assert!(network.put(1, "key", "first life").is_ok());
    network.settle();
    let begun = network.crash(3, Survives::Nothing);
    let mut unbegun = Network::default();
    first_life(&mut unbegun);
    assert!(!unbegun.member(3).status().begun, "it misses one");
    let unbegun = unbegun.crash(3, Survives::Nothing);
    for (leftover, has_begun) in [(begun, true), (unbegun, false)] {
        let mut network = Network::default();
        for id in [1, 2] {
            let config = NodeConfig { incarnation: 900 + id, ..config(id, 3) };
            network.start(&config, &MemVfs::default()).unwrap();
        }
        network.tick(30);
        assert!(network.members.values().all(|member| !member.status().begun), "3 is missing");
        network.start(&NodeConfig { boot: 2003, ..config(3, 3) }, &leftover).unwrap();
        network.tick(60);
        if has_begun {
            assert!(leads(&network).is_empty());
            for id in [1, 2] {
                let error = network.ended.remove(&id).expect("it is refused").to_string();
                assert!(error.contains("member 3 refuses this one"), "{error}");
            }
        } else {
            network.elect(1);
            assert!(network.put(1, "key", "second life").is_ok());
            network.settle();
            assert_eq!(network.member(3).state()["key"].0, "second life");
        }
    }
}

/// Members 1 and 3 acknowledged a write, and member 3 lost the tail of its log. Member 2 is cut off.
fn lost_tail() -> (Network, MemVfs) {
    let mut network = Network::new(3, |_| {});
    assert!(network.put(1, "key", "before").is_ok());
    network.settle();
    let earlier = network.member(3).disk.image();
    network.cut.insert(2);
    assert!(network.put(1, "key", "acknowledged").is_ok());
    network.settle();
    network.members.remove(&3);
    (network, earlier)
}

fn restarted(id: u64, n: u64) -> NodeConfig {
    NodeConfig { boot: 2000 + id, ..config(id, n) }
}

#[test]
fn a_member_that_lost_acknowledged_entries_takes_no_part() {
    let (mut network, earlier) = lost_tail();
    network.start(&restarted(3, 3), &earlier).unwrap();
    network.settle();
    let status = network.member(3).status();
    assert_eq!((status.role, status.leader), (Role::Quarantined, 0));
    assert!(network.member(3).logged("this member lost entries up to"));
    let leader = network.crash(1, Survives::Nothing);
    network.cut.clear();
    network.tick(80);
    assert!(leads(&network).is_empty(), "members 2 and 3 do not have the write");
    // Also after a restart.
    let disk = network.crash(3, Survives::Nothing);
    network.start(&NodeConfig { boot: 2013, ..config(3, 3) }, &disk).unwrap();
    assert!(network.member(3).logged("DELETE it on another member"), "each start says what to do");
    network.tick(80);
    assert!(leads(&network).is_empty());
    network.start(&restarted(1, 3), &leader).unwrap();
    network.elect(1);
    assert_eq!(network.member(2).state()["key"].0, "acknowledged");
    change(&mut network, 1, MemberRequest::Remove { id: 3 });
    network.tick(12);
    assert!(network.ended.contains_key(&3), "it learns of its removal");
}

/// Its answer to a heartbeat would let the leader go on leading and reading.
#[test]
fn a_turn_that_finds_a_loss_sends_no_answer() {
    for is_lost in [false, true] {
        let mut network = Network::new(3, |_| {});
        assert!(network.put(1, "key", "value").is_ok());
        network.settle();
        let header = network.members[&1].header(3);
        let member = network.member(3);
        member.take_messages();
        let heartbeat = forging::forged(member, raft::eraftpb::MessageType::MsgHeartbeat, 1);
        let index = if is_lost { 1000 } else { 1 };
        let answer = GreetingAnswer {
            leader: None,
            begun: true,
            counts_as_member: true,
            acknowledged: Some(Matched { term: heartbeat.term, index }),
        };
        let found = PeerReport::Greeted { url: url(1), header, answer };
        let heartbeat = forging::from_peer(member, 1, 1_000_000, vec![heartbeat]);
        member.turn([heartbeat, Input::Report(found)]).unwrap();
        assert_eq!(member.status().role == Role::Quarantined, is_lost);
        assert_eq!(member.take_messages().is_empty(), is_lost);
    }
}

/// Where the others are no majority, nothing else helps.
#[test]
fn a_quarantine_is_lifted_by_a_flag_at_one_start() {
    let (mut network, earlier) = lost_tail();
    network.start(&restarted(3, 3), &earlier).unwrap();
    network.settle();
    let leader = network.crash(1, Survives::Nothing);
    let disk = network.crash(3, Survives::Nothing);
    let lifted = NodeConfig { lift_quarantine: true, boot: 2013, ..config(3, 3) };
    network.start(&lifted, &disk).unwrap();
    assert_eq!(network.member(3).status().role, Role::Follower);
    network.start(&restarted(1, 3), &leader).unwrap();
    network.elect(1);
    assert!(network.put(1, "key", "after").is_ok());
    network.settle();
    let disk = network.crash(3, Survives::Nothing);
    network.start(&NodeConfig { boot: 2023, ..config(3, 3) }, &disk).unwrap();
    network.settle();
    assert_eq!(network.member(3).status().role, Role::Follower, "it is lifted for good");
    assert_eq!(network.member(3).state()["key"].0, "after");
}

/// Anyone who knows the cluster can send a heartbeat. What counts is what the leader says at its URL.
#[test]
fn a_forged_heartbeat_quarantines_nobody() {
    let mut network = Network::new(3, |_| {});
    assert!(network.put(1, "key", "value").is_ok());
    network.settle();
    let member = network.member(3);
    let mut forged = forging::forged(member, raft::eraftpb::MessageType::MsgHeartbeat, 1);
    forged.commit = 1000;
    let input = forging::from_peer(member, 1, 1_000_000, vec![forged]);
    network.turn(3, [input]);
    network.deliver();
    assert!(network.member(3).logged("index 1000 is committed here"));
    assert_eq!(network.member(3).status().role, Role::Follower);
    assert!(network.put(3, "key", "later").is_ok());
}

/// Members 1 to 3, and the directory of member 3 as of now, which is copied before it moves.
#[test]
fn a_copy_at_a_moved_members_old_place_counts_nowhere() {
    // Member 2 has the move in its log, and does not know that it is committed.
    let mut network = moving(3, false);
    let copy = network.member(3).disk.image();
    assert_eq!(network.member(2).status().members.urls[&3], url(3), "it has not applied it");
    network.member(1).take_messages();
    network.cut.insert(2);
    let disk = network.crash(3, Survives::Nothing);
    let there = NodeConfig { url: url(7), ..restarted(3, 3) };
    network.start(&there, &disk).unwrap();
    network.settle();
    assert!(network.put(1, "key", "acknowledged").is_ok());
    network.settle();
    // Members 1 and 3 stop, and the copy starts at the old place.
    let leader = network.crash(1, Survives::Nothing);
    let original = network.crash(3, Survives::Nothing);
    network.cut.clear();
    network.start(&NodeConfig { boot: 2013, ..config(3, 3) }, &copy).unwrap();
    network.give_up_leader(&[2, 3]);
    for _ in 0..60 {
        network.turn(2, [Input::Tick]);
        network.deliver();
        assert!(leads(&network).is_empty(), "member 2 counts no vote of the copy");
    }
    network.members.remove(&3);
    network.start(&restarted(1, 3), &leader).unwrap();
    network.start(&NodeConfig { boot: 2023, ..there }, &original).unwrap();
    network.elect(1);
    assert_eq!(network.member(2).state()["key"].0, "acknowledged");
}

/// A promotion counts the progress of one directory, and gives its vote to no other.
#[test]
fn a_promotion_counts_one_directorys_progress() {
    let mut network = Network::new(2, |_| {});
    assert!(network.put(1, "key", "before").is_ok());
    change(&mut network, 1, MemberRequest::Add { id: 4, url: url(4) });
    network.start(&joins(4, 104, &[1, 2, 4]), &MemVfs::default()).unwrap();
    step_until(&mut network, &[1, 4], promoting);
    assert_eq!(network.member(1).status().learners, [4], "the promotion is on its way");
    // The learner hangs, and an empty directory starts in its place. Member 2 hears nothing more.
    let hung = network.members.remove(&4).unwrap();
    network.cut.insert(2);
    network.start(&joins(4, 904, &[1, 2, 4]), &MemVfs::default()).unwrap();
    let mut write = network.member(1).put("key", "later").unwrap();
    network.tick(8);
    assert!(write.get().is_none_or(Result::is_err), "nobody but member 1 has it");
    let commit = network.member(1).status().commit;
    let last = network.member(1).wal().last_index();
    assert!(commit < last);
    // The other way round: what the named one has does count.
    network.cut.clear();
    network.ended.remove(&4);
    network.members.insert(4, hung);
    network.tick_until("member 4 is a voter", |network| is_voter(network, 4, 4));
    assert_eq!(network.member(2).status().members.incarnations[&4], 104);
}

/// A leader that was elected while a promotion was on its way had met another directory of the learner.
#[test]
fn a_later_leader_counts_the_promoted_directory_only() {
    let mut network = Network::new(3, |_| {});
    assert!(network.put(1, "key", "before").is_ok());
    change(&mut network, 1, MemberRequest::Add { id: 4, url: url(4) });
    network.start(&joins(4, 104, &[1, 2, 3, 4]), &MemVfs::default()).unwrap();
    network.cut.insert(3);
    step_until(&mut network, &[1, 4], promoting);
    let promotion = network.member(1).wal().last_index();
    network.members.remove(&4).unwrap();
    step_until(&mut network, &[], |network| last_index(network, 2) >= promotion);
    network.members.remove(&1).unwrap();
    assert!(!is_voter(&network, 2, 4), "member 2 has the promotion, and has not applied it");
    network.cut.clear();
    network.start(&joins(4, 904, &[1, 2, 3, 4]), &MemVfs::default()).unwrap();
    network.tick(3);
    network.give_up_leader(&[2, 3]);
    network.elect(2);
    network.tick_until("the promotion is applied", |network| is_voter(network, 2, 4));
    let matched = network.member(2).node.raft().prs().get(4).unwrap().matched;
    assert_eq!(matched, 0, "the empty directory acknowledged it, and has no vote");
}

/// Members 1 and 2 are to promote learner 4, whose directory caught up with leader 1 and hangs. Leader 2
/// heard only the empty directory in its place.
#[test]
fn a_promotion_drops_what_an_earlier_directory_acknowledged() {
    let mut network = Network::new(2, |_| {});
    assert!(network.put(1, "key", "before").is_ok());
    change(&mut network, 1, MemberRequest::Add { id: 4, url: url(4) });
    network.cut_links = [(2, 4)].into();
    network.start(&joins(4, 104, &[1, 2, 4]), &MemVfs::default()).unwrap();
    step_until(&mut network, &[1, 4], promoting);
    let hung = network.members.remove(&4).unwrap();
    let promotion = network.member(1).wal().last_index();
    network.cut_links = [(1, 2), (1, 4)].into();
    network.start(&joins(4, 904, &[1, 2, 4]), &MemVfs::default()).unwrap();
    for _ in 0..10 {
        network.turn(4, [Input::Tick]);
        network.turn(2, [Input::Tick]);
        network.deliver();
    }
    assert!(network.member(4).status().begun, "member 2 has heard it");
    assert!(network.member(2).wal().last_index() < promotion);
    network.cut_links = [(1, 4)].into();
    step_until(&mut network, &[1], |network| last_index(network, 2) >= promotion);
    network.member(2).take_messages();
    network.give_up_leader(&[1, 1, 2]);
    step_until(&mut network, &[2], |network| leads(network) == [2]);
    // Member 1 acknowledges the promotion. Before that is heard, the empty directory, a learner still,
    // acknowledges a write that member 1 does not get.
    let last = network.member(2).wal().last_index();
    step_until(&mut network, &[], |network| last_index(network, 1) >= last);
    let acknowledgements = network.member(1).take_messages();
    assert!(!acknowledgements.is_empty());
    network.cut_links = [(1, 2), (1, 4)].into();
    let mut write = network.put(2, "key", "acknowledged");
    network.tick(1);
    assert_eq!(network.member(4).wal().last_index(), last + 1, "the empty directory has it");
    assert!(!is_voter(&network, 2, 4));
    let batch = network.member(1).batch(2, acknowledgements);
    network.turn(2, [Input::Inbound(batch)]);
    assert!(is_voter(&network, 2, 4), "the promotion is applied");
    network.tick(1);
    assert!(!write.is_ok(), "members 1 and 4 elect a leader that does not have it");
    // The directory that was promoted does count.
    network.members.remove(&4);
    network.members.insert(4, hung);
    network.cut_links.clear();
    network.tick_until("all follow one leader", |network| {
        let leader = network.members[&1].status().leader;
        leader != 0 && network.members.values().all(|member| member.status().leader == leader)
    });
    assert!(network.put(1, "key", "after").is_ok());
    network.settle();
    for id in [1, 2] {
        assert_eq!(network.member(id).state()["key"].0, "after");
    }
    assert_eq!(last_index(&network, 4), last_index(&network, 1));
}

/// An empty learner starts again, and a follower tells it of the cluster before the leader knows. What
/// the leader counted on was another directory's.
#[test]
fn a_wiped_learner_is_neither_quarantined_nor_counted() {
    let mut network = Network::new(2, |_| {});
    assert!(network.put(1, "key", "value").is_ok());
    change(&mut network, 1, MemberRequest::Add { id: 4, url: url(4) });
    // A change on its way keeps the leader from promoting the learner.
    network.cut_links = [(1, 2), (2, 4)].into();
    let _pending = network.member(1).change(MemberRequest::Add { id: 5, url: url(5) }).unwrap();
    network.start(&joins(4, 104, &[1, 2, 4]), &MemVfs::default()).unwrap();
    for id in [4, 4, 4, 4, 4, 1] {
        network.turn(id, [Input::Tick]);
        network.deliver();
    }
    let last = network.member(1).wal().last_index();
    assert_eq!(network.member(4).wal().last_index(), last, "it has acknowledged all");
    network.members.remove(&4);
    // Only the follower answers the greeting of the empty one.
    network.cut_links = [(1, 2), (1, 4)].into();
    network.start(&joins(4, 904, &[1, 2, 4]), &MemVfs::default()).unwrap();
    for _ in 0..5 {
        network.turn(4, [Input::Tick]);
        network.deliver();
    }
    assert!(network.member(4).status().begun, "member 2 counts it");
    assert_eq!(network.member(4).wal().last_index(), 0);
    network.cut_links = [(1, 2)].into();
    for _ in 0..3 {
        network.turn(1, [Input::Tick]);
        network.deliver();
    }
    assert!(!network.member(4).logged("is committed here"), "the heartbeat was not for it");
    assert_eq!(network.member(4).wal().last_index(), last, "it got all of it");
    network.cut_links.clear();
    network.tick_until("it is promoted", |network| is_voter(network, 1, 4));
    assert_eq!(network.member(1).status().members.incarnations[&4], 904);
    let state = network.member(1).state();
    network.settle();
    assert_eq!(network.member(4).state(), state);
}

/// A promotion that counted a learner's former directory is committed after the empty one has joined.
/// The others send it nothing any more, so only their refusal tells.
#[test]
fn a_learner_whose_vote_went_to_its_former_directory_ends() {
    let mut network = Network::new(2, |_| {});
    assert!(network.put(1, "key", "value").is_ok());
    change(&mut network, 1, MemberRequest::Add { id: 3, url: url(3) });
    // A change on its way keeps the leader from promoting the learner.
    network.cut_links = [(1, 2)].into();
    let _pending = network.member(1).change(MemberRequest::Add { id: 5, url: url(5) }).unwrap();
    network.start(&joins(3, 903, &[1, 2, 3]), &MemVfs::default()).unwrap();
    for id in [3, 3, 3, 3, 3, 1] {
        network.turn(id, [Input::Tick]);
        network.deliver();
    }
    assert!(network.member(3).status().learners.contains(&3), "it got the log");
    for (from, refused) in [(2, 3), (1, 2)] {
        let header = network.members[&from].header(refused);
        let refusal = Refusal::OtherIncarnation("DELETE it".into());
        network.turn(refused, [Input::Report(PeerReport::Refused { header, refusal })]);
    }
    let ended = network.ended.remove(&3).expect("a learner ends").to_string();
    assert!(ended.contains("member 2 refuses this one: DELETE it"), "{ended}");
    assert!(network.ended.is_empty(), "a member with a vote knows better");
}

/// The leader's snapshot is damaged, or deleted by hand, and no entry came since. A member that is
/// behind gets another one.
#[test]
fn a_snapshot_damaged_at_rest_is_replaced_before_it_is_sent() {
    for is_deleted in [false, true] {
        let mut network = Network::new(3, |config| {
            (config.snapshot_count, config.snapshot_catch_up_entries) = (5, 1);
        });
        network.cut.insert(3);
        while network.member(1).status().snapshot < 20 {
            assert!(network.put(1, "key", "value").is_ok());
        }
        network.settle();
        let leader = network.member(1);
        let is_snapshot =
            |path: &std::path::PathBuf| path.extension().is_some_and(|it| it == "snap");
        let newest = leader.disk.paths().into_iter().filter(is_snapshot).max().unwrap();
        if is_deleted {
            leader.disk.take_away(&newest);
        } else {
            leader.disk.tamper(&newest, |bytes| bytes[40] ^= 1);
        }
        let last = leader.wal().last_index();
        network.cut.clear();
        network.tick_until("member 3 has caught up", |network| {
            network.members[&3].status().applied == last
        });
        let leader = network.member(1);
        assert_eq!(leader.wal().last_index(), last, "no entry was needed for it");
        let broken = leader
            .disk
            .paths()
            .into_iter()
            .filter(|it| it.extension().is_some_and(|e| e == "broken"));
        assert_eq!(broken.count(), usize::from(!is_deleted));
        let state = leader.state();
        assert_eq!(network.member(3).state(), state);
        // What was made again is what the next start begins with.
        let disk = network.crash(1, Survives::Nothing);
        network.start(&restarted(1, 3), &disk).unwrap();
        assert_eq!(network.member(1).state(), state);
    }
}
