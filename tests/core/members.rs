//! Changes of members at awkward moments: under a new leader, or by a leader that removes itself.

use raft::eraftpb::{Message, MessageType};
use raftexample::channels::{Ack, MemberRequest};
use raftexample::error::{Error, RequestError};
use raftexample::raft_node::{Input, NodeConfig};

use crate::golden;
use crate::support::memory::*;

/// Compares a transcript with its file.
fn check(name: &str, lines: &[String]) {
    golden::check(&format!("members/{name}"), lines);
}

/// The messages from `from` to `to` so far; messages to others are lost.
fn sent_to(network: &mut Network, from: u64, to: u64) -> Vec<Message> {
    let messages = network.member(from).take_messages();
    messages.into_iter().filter(|message| message.to == to).collect()
}

/// Delivers `messages` from `from` to `to`, with `more` in the same turn.
fn bring(network: &mut Network, from: u64, to: u64, messages: Vec<Message>, more: Vec<Input>) {
    let inbound = network.member(from).batch(to, messages);
    network.turn(to, [Input::Inbound(inbound)].into_iter().chain(more));
}

/// Member 1 of `n` leads and proposes to remove member 2, which alone receives the entry. Then
/// member 1 crashes, or with two members only stops leading. Member 2 wins with the vote of the
/// last member, which has acknowledged everything that member 2 has: these messages are returned.
/// In the turn that takes them, member 2 commits its own removal.
fn about_to_commit_its_own_removal(n: u64) -> (Network, u64, Vec<Message>) {
    let mut network = Network::new(n, |_| {});
    assert!(network.put(1, "key", "before").is_ok());
    network.settle();
    network.member(1).change(MemberRequest::Remove { id: 2 }).unwrap();
    let removal = network.member(1).wal().last_index();
    let append = sent_to(&mut network, 1, 2);
    bring(&mut network, 1, 2, append, vec![]);
    assert_eq!(network.member(2).wal().last_index(), removal, "member 2 has it");
    network.member(2).take_messages();
    if n > 2 {
        network.crash(1, Survives::Nothing);
        assert_eq!(network.member(n).wal().last_index(), removal - 1, "nobody else");
    } else {
        network.give_up_leader(&[1, 1]);
        assert_eq!(network.member(1).status().leader, 0);
    }
    let other = if n > 2 { n } else { 1 };
    network.give_up_leader(&[2, other]);
    for _ in 0..100 {
        let messages = sent_to(&mut network, 2, other);
        if messages.is_empty() {
            network.turn(2, [Input::Tick]);
            continue;
        }
        bring(&mut network, 2, other, messages, vec![]);
        let answers = sent_to(&mut network, other, 2);
        let acknowledges = |answer: &Message| {
            answer.get_msg_type() == MessageType::MsgAppendResponse
                && !answer.reject
                && answer.index > removal
        };
        if answers.iter().any(acknowledges) {
            assert_eq!(network.member(2).status().leader, 2);
            assert!(network.member(2).status().commit < removal);
            return (network, removal, answers);
        }
        bring(&mut network, other, 2, answers, vec![]);
    }
    panic!("member 2 does not lead: {:?}", network.member(2).status());
}

/// The remaining members work without member 2.
fn check_that_the_others_work_on(network: &mut Network, removal: u64) {
    let ids: Vec<u64> = network.members.keys().copied().collect();
    network.tick_until("another leads", |network| {
        network.members.values().all(|member| ![0, 2].contains(&member.status().leader))
    });
    network.settle();
    for &id in &ids {
        let members = network.member(id).status().members;
        assert_eq!(members.removed.get(&2), Some(&removal), "at member {id}");
        assert!(!members.urls.contains_key(&2), "at member {id}");
    }
    assert!(network.put(ids[0], "key", "after").is_ok());
    network.settle();
    for id in ids {
        assert_eq!(network.member(id).state()["key"].0, "after", "at member {id}");
    }
}

/// raft 0.7.0 unwraps its own progress when a leader appends, persists or commits.
#[test]
fn a_leader_that_removes_itself_leaves_once_the_others_know() {
    let (mut network, removal, acknowledgements) = about_to_commit_its_own_removal(3);
    network.transcript.start_scenario();
    // Not synced when the removal is applied, because they are in the same Ready.
    let (first, mut first_answer) = network.member(2).propose(put("k", "first"), Ack::Committed);
    bring(&mut network, 3, 2, acknowledgements, vec![first]);
    let status = network.member(2).status();
    assert_eq!(status.members.removed.get(&2), Some(&removal));
    assert_eq!(status.leader, 2, "it leads on until the others know");
    let last = network.member(2).wal().last_index();
    assert!(status.commit < last, "there is more to commit");
    // Member 3's confirmation would arrive together with its news of the removal.
    let mut early_read = network.member(2).read().unwrap();

    // A write proposed before the removal is committed after it.
    network.deliver();
    assert_eq!(network.member(2).status().commit, last);
    assert!(first_answer.is_ok(), "{:?}", first_answer.get());
    assert!(!network.ended.contains_key(&2), "one of two others is no majority");
    assert!(early_read.get().is_none(), "{:?}", early_read.get());

    // The leader accepts nothing more, from clients or from other members.
    let mut answers = [network.put(2, "k", "second"), network.put(3, "k", "third")];
    let mut reads = [network.member(2).read().unwrap(), network.member(3).read().unwrap()];
    network.deliver();
    for _ in 0..5 {
        network.turn(2, [Input::Tick]);
        network.turn(3, [Input::Tick]);
        network.deliver();
    }
    assert_eq!(network.member(2).wal().last_index(), last, "nothing was appended");
    assert!(answers.iter_mut().all(|answer| answer.get().is_none()));
    assert!(reads.iter_mut().all(|read| read.get().is_none()));

    for _ in 0..10 {
        network.turn(2, [Input::Tick]);
        network.deliver();
    }
    assert!(matches!(network.ended.get(&2), Some(Error::Removed)), "{:?}", network.ended);
    // Member 3 needs member 1 to continue.
    assert_eq!(network.member(3).status().members.removed.get(&2), Some(&removal));
    check("leader_of_three_removes_itself", &network.transcript.of(2));
}

/// The whole cluster after it: the crashed member restarts and learns of the removal.
#[test]
fn after_a_leader_committed_its_own_removal_the_others_go_on() {
    let mut network = Network::new(3, |_| {});
    let again = NodeConfig { boot: 2001, ..network.member(1).config.clone() };
    network.settle();
    network.member(1).change(MemberRequest::Remove { id: 2 }).unwrap();
    let removal = network.member(1).wal().last_index();
    let append = sent_to(&mut network, 1, 2);
    bring(&mut network, 1, 2, append, vec![]);
    let disk = network.crash(1, Survives::Nothing);
    network.give_up_leader(&[2, 3]);
    for _ in 0..60 {
        network.turn(2, [Input::Tick]);
        network.deliver();
    }
    assert!(matches!(network.ended.get(&2), Some(Error::Removed)), "{:?}", network.ended);
    network.start(&again, &disk).unwrap();
    check_that_the_others_work_on(&mut network, removal);
}

/// raft would count one voter, not the leader, and serve reads without asking it.
#[test]
fn a_leader_of_two_that_removes_itself_serves_nothing() {
    let (mut network, removal, acknowledgements) = about_to_commit_its_own_removal(2);
    network.transcript.start_scenario();
    let (first, mut first_answer) = network.member(2).propose(put("k", "first"), Ack::Committed);
    bring(&mut network, 1, 2, acknowledgements, vec![first]);
    assert_eq!(network.member(2).status().members.removed.get(&2), Some(&removal));
    assert!(first_answer.get().is_none(), "member 1 does not have it");
    let last = network.member(2).wal().last_index();

    // Requests of member 1 before it knows.
    let (forwarded, mut write) = network.member(1).propose(put("k", "second"), Ack::Committed);
    network.turn(1, [forwarded]);
    let mut forwarded_read = network.member(1).read().unwrap();
    let requests = sent_to(&mut network, 1, 2);
    assert_eq!(requests.len(), 2, "{requests:?}");
    bring(&mut network, 1, 2, requests, vec![]);
    let mut own_write = network.member(2).put("k", "third").unwrap();
    let mut own_read = network.member(2).read().unwrap();
    for _ in 0..3 {
        network.turn(2, [Input::Tick]);
    }
    assert_eq!(network.member(2).wal().last_index(), last, "nothing was appended");
    let sent = network.member(2).take_messages();
    assert!(
        !sent.iter().any(|message| message.get_msg_type() == MessageType::MsgReadIndexResp),
        "member 1 was not asked"
    );
    assert!(sent.iter().all(|message| message.context.is_empty()), "it asks for no read any more");
    assert!(own_read.get().is_none() && own_write.get().is_none());
    assert!(forwarded_read.get().is_none() && write.get().is_none());

    // The messages taken above are lost; the next heartbeat detects it.
    for _ in 0..4 {
        network.turn(2, [Input::Tick]);
        network.deliver();
    }
    assert!(matches!(network.ended.get(&2), Some(Error::Removed)), "{:?}", network.ended);
    check("leader_of_two_removes_itself", &network.transcript.lines());
    check_that_the_others_work_on(&mut network, removal);
}

/// The remaining member counts two members until it learns of the removal, so alone it is no
/// majority.
#[test]
fn a_leader_of_two_syncs_the_removal_before_the_other_leaves() {
    let mut network = Network::new(2, |_| {});
    network.settle();
    let again = NodeConfig { boot: 2001, ..network.member(1).config.clone() };
    network.transcript.start_scenario();
    let mut removal = network.member(1).change(MemberRequest::Remove { id: 2 }).unwrap();
    network.deliver();
    check("leader_of_two_removes_the_other", &network.transcript.lines());
    assert!(removal.is_ok(), "{:?}", removal.get());
    assert!(matches!(network.ended.get(&2), Some(Error::Removed)), "{:?}", network.ended);
    let disk = network.crash(1, Survives::Nothing);
    network.start(&again, &disk).unwrap();
    network.member(1).tick_until_leader().unwrap();
    assert!(network.put(1, "key", "after").is_ok());
}

/// raft hands out only the entries before the removal of those committed with it.
#[test]
fn a_removal_after_a_long_write_is_synced_before_announced() {
    let mut network = Network::new(2, |_| {});
    network.settle();
    let leader = network.member(1);
    let _write = leader.put("key", &"x".repeat((64 << 20) - 40)).unwrap();
    let _answer = leader.change(MemberRequest::Remove { id: 2 }).unwrap();
    let removal = leader.wal().last_index();
    let appends = sent_to(&mut network, 1, 2);
    bring(&mut network, 1, 2, appends, vec![]);
    let acknowledgements = sent_to(&mut network, 2, 1);
    let leader = network.member(1);
    assert_eq!(leader.status().commit, removal - 2);
    leader.disk.inject(1, Fault::Crash);
    let sent = leader.sent.clone();
    bring(&mut network, 2, 1, acknowledgements, vec![]);
    assert!(network.ended.contains_key(&1), "it writes in this turn");
    let sent = &sent.lock().unwrap().messages;
    assert!(sent.iter().all(|message| message.commit < removal), "{sent:?}");
}

/// Its index tells the other member that the removal is committed.
#[test]
fn a_removal_is_synced_before_a_reads_answer_tells_it() {
    let mut network = Network::new(2, |_| {});
    network.settle();
    let _change = network.member(1).change(MemberRequest::Remove { id: 2 }).unwrap();
    let removal = network.member(1).wal().last_index();
    let appends = sent_to(&mut network, 1, 2);
    bring(&mut network, 1, 2, appends, vec![]);
    let _read = network.member(2).read().unwrap();
    let sent = sent_to(&mut network, 2, 1);
    let last = sent.last().map(|message| message.get_msg_type());
    assert_eq!(last, Some(MessageType::MsgReadIndex), "behind what commits the removal");

    let leader = network.member(1);
    assert!(leader.status().commit < removal);
    leader.disk.inject(1, Fault::Crash);
    let outbox = leader.sent.clone();
    bring(&mut network, 2, 1, sent, vec![]);
    assert!(network.ended.contains_key(&1), "it writes in this turn");
    let sent = &outbox.lock().unwrap().messages;
    assert!(sent.iter().all(|message| message.commit.max(message.index) < removal), "{sent:?}");
}

#[test]
fn a_member_removed_from_two_stays_until_the_other_knows() {
    for crashes in [false, true] {
        let (mut network, removal, acknowledgements) = about_to_commit_its_own_removal(2);
        bring(&mut network, 1, 2, acknowledgements, vec![]);
        assert_eq!(network.member(2).status().members.removed.get(&2), Some(&removal));
        network.turn(2, [Input::Tick]);
        if crashes {
            let again = NodeConfig { boot: 2002, ..network.member(2).config.clone() };
            let disk = network.crash(2, Survives::Nothing);
            network.start(&again, &disk).unwrap();
        }
        network.cut.insert(1);
        for _ in 0..100 {
            network.turn(2, [Input::Tick]);
            network.deliver();
        }
        assert!(!network.ended.contains_key(&2), "member 1 has not heard of it");
        network.cut.clear();
        network.tick_until("member 2 has left", |network| network.ended.contains_key(&2));
        assert!(matches!(network.ended.get(&2), Some(Error::Removed)), "{:?}", network.ended);
        network.elect(1);
        assert!(network.put(1, "key", "after").is_ok(), "crashes: {crashes}");
        assert_eq!(network.member(1).status().members.removed.get(&2), Some(&removal));
    }
}

/// Member 3 just elected member 2, which has not heard from member 1, although it runs.
fn just_elected() -> Network {
    let mut network = Network::new(3, |_| {});
    network.cut.insert(1);
    network.give_up_leader(&[2, 3]);
    network.elect(2);
    network
}

#[test]
fn a_removal_after_an_election_waits_to_hear_the_others() {
    let mut network = just_elected();
    network.cut.clear();
    network.transcript.start_scenario();
    let mut removal = network.member(2).change(MemberRequest::Remove { id: 3 }).unwrap();
    network.deliver();
    assert!(removal.get().is_none(), "member 1 may live: {:?}", removal.get());
    network.settle();
    assert!(removal.is_ok(), "{:?}", removal.get());
    check("removal_after_an_election", &network.transcript.of(2));

    // Without a response from member 1 the answer is a refusal.
    let mut network = just_elected();
    let mut removal = network.member(2).change(MemberRequest::Remove { id: 3 }).unwrap();
    for _ in 0..12 {
        network.turn(2, [Input::Tick]);
        network.deliver();
    }
    assert!(
        matches!(removal.get(), Some(Err(RequestError::Conflict(why))) if why.contains("remove member 1")),
        "{:?}",
        removal.get()
    );
    // The dead member itself can be removed at once.
    let mut network = just_elected();
    let mut removal = network.member(2).change(MemberRequest::Remove { id: 1 }).unwrap();
    network.deliver();
    assert!(removal.is_ok(), "{:?}", removal.get());
}

/// raft keeps the voters in a hash set, whose order depends on its largest size so far.
#[test]
fn members_with_another_past_make_the_same_snapshot_files() {
    let mut network = Network::new(3, |config| {
        config.snapshot_count = 8;
        config.snapshot_catch_up_entries = 1;
    });
    // The set grows for a fourth voter and keeps its size.
    for change in [MemberRequest::Add { id: 4, url: url(4) }, MemberRequest::Remove { id: 4 }] {
        let mut answer = network.member(1).change(change).unwrap();
        network.deliver();
        assert!(answer.is_ok(), "{:?}", answer.get());
        network.settle();
    }
    let puts = |network: &mut Network| {
        for number in 0..12 {
            network.put(1, "key", &number.to_string());
            network.settle();
        }
        network.member(1).status().snapshot
    };
    // Member 2 restarts with the three voters of its snapshot.
    let first = puts(&mut network);
    let again = NodeConfig { boot: 2002, ..network.member(2).config.clone() };
    let disk = network.crash(2, Survives::Nothing);
    network.start(&again, &disk).unwrap();
    network.settle();
    let mut answer = network.member(1).change(MemberRequest::Remove { id: 3 }).unwrap();
    network.deliver();
    assert!(answer.is_ok(), "{:?}", answer.get());
    network.settle();
    let second = puts(&mut network);
    assert!(second > first);

    let newest = |member: &Member| {
        let paths = member.disk.paths().into_iter();
        let newest = paths.filter(|path| path.extension().is_some_and(|e| e == "snap")).max();
        let newest = newest.unwrap();
        (newest.file_name().unwrap().to_owned(), member.disk.contents(&newest))
    };
    assert_eq!(network.member(2).status().snapshot, second);
    assert!(newest(network.member(1)) == newest(network.member(2)), "they differ");
}

/// No member of its first list is left to refuse it.
#[test]
fn a_wiped_member_without_its_first_list_never_begins() {
    let mut network = Network::new(2, |_| {});
    let mut addition = network.member(1).change(MemberRequest::Add { id: 3, url: url(3) }).unwrap();
    network.deliver();
    assert!(addition.is_ok(), "{:?}", addition.get());
    network.start(&NodeConfig { join: true, ..config(3, 3) }, &MemVfs::default()).unwrap();
    network.tick(12);
    let mut removal = network.member(2).change(MemberRequest::Remove { id: 1 }).unwrap();
    network.tick_until("member 1 leaves", |network| !network.members.contains_key(&1));
    network.settle();
    assert!(removal.is_ok(), "{:?}", removal.get());
    network.members.remove(&2);
    let wiped = NodeConfig { incarnation: 999, boot: 2002, ..config(2, 2) };
    network.start(&wiped, &MemVfs::default()).unwrap();
    network.tick(30);
    assert!(!network.member(2).status().begun);
    assert!(network.member(2).logged("waiting for"), "it says for whom");
}

/// The leader's own promotions do not refuse a client's change.
#[test]
fn a_change_that_finds_a_promotion_on_its_way_waits_for_it() {
    let mut network = Network::new(3, |_| {});
    assert!(network.put(1, "key", "value").is_ok());
    network.settle();
    let mut added = network.member(1).change(MemberRequest::Add { id: 4, url: url(4) }).unwrap();
    network.settle();
    assert!(added.is_ok());
    network.start(&NodeConfig { join: true, ..config(4, 4) }, &MemVfs::default()).unwrap();
    let is_promoting = |network: &Network| {
        let lines = network.members[&1].logs.lock().unwrap();
        lines.iter().any(|line| line.contains("promoting learner 4"))
    };
    for _ in 0..1000 {
        if is_promoting(&network) {
            break;
        }
        if !network.deliver_round() {
            (1..=4).for_each(|id| network.turn(id, [Input::Tick]));
        }
    }
    assert!(is_promoting(&network));
    assert_eq!(network.member(1).status().learners, [4], "it is on its way");
    network.transcript.start_scenario();
    let mut removed = network.member(1).change(MemberRequest::Remove { id: 3 }).unwrap();
    assert!(removed.get().is_none(), "it waits: {:?}", removed.get());
    network.settle();
    assert!(removed.is_ok(), "{:?}", removed.get());
    assert!(network.member(1).status().learners.is_empty());
    check("change_waits_for_a_promotion", &network.transcript.of(1));
}

/// Three members, and an entry of member 1 that moves `id`, acknowledged by the other one. Member 1
/// alone knows that it is committed. The moved member has it as well if `has_it`.
pub fn moving(id: u64, has_it: bool) -> Network {
    let mut network = Network::new(3, |_| {});
    assert!(network.put(1, "key", "value").is_ok());
    network.settle();
    let mut moved = network.member(1).change(MemberRequest::Move { id, url: url(7) }).unwrap();
    let other = if id == 2 { 3 } else { 2 };
    let appends = network.member(1).take_messages();
    for to in if has_it { vec![id, other] } else { vec![other] } {
        let append = appends.iter().filter(|message| message.to == to).cloned().collect();
        bring(&mut network, 1, to, append, vec![]);
        let acknowledged = sent_to(&mut network, to, 1);
        bring(&mut network, to, 1, acknowledged, vec![]);
        assert_eq!(moved.is_ok(), to == other, "its own acknowledgement does not count");
    }
    network
}

/// Starts `id` at its new URL. Member 1 is gone, and the other two must find each other.
fn check_that_it_is_found(mut network: Network, id: u64) {
    let there = NodeConfig { url: url(7), boot: 3000 + id, ..network.member(id).config.clone() };
    let disk = network.crash(id, Survives::Nothing);
    network.crash(1, Survives::Nothing);
    network.start(&there, &disk).unwrap();
    network.give_up_leader(&[2, 3]);
    network.tick_until("one of the two leads", |network| {
        network.members.values().all(|member| [2, 3].contains(&member.status().leader))
    });
    network.settle();
    for at in [2, 3] {
        assert_eq!(network.member(at).status().members.urls[&id], url(7), "at member {at}");
    }
    assert!(network.put(2, "key", "after").is_ok());
}

#[test]
fn a_moved_member_is_believed_by_one_that_does_not_know() {
    let mut network = moving(2, true);
    network.turn(1, [Input::Tick]);
    let commits = sent_to(&mut network, 1, 2);
    bring(&mut network, 1, 2, commits, vec![]);
    assert_eq!(network.member(2).status().members.urls[&2], url(7));
    assert_eq!(network.member(3).status().members.urls[&2], url(2), "it does not know");
    check_that_it_is_found(network, 2);
}

/// The member that has the entry cannot know yet that it is committed.
#[test]
fn a_moved_member_that_does_not_know_is_heard_by_one_that_does() {
    let mut network = moving(3, false);
    for at in [2, 3] {
        assert_eq!(network.member(at).status().members.urls[&3], url(3), "applied by nobody");
    }
    check_that_it_is_found(network, 3);
}

/// The others would look for it at the wrong URL, and nobody could correct that.
#[test]
fn a_member_without_which_there_is_no_majority_is_not_moved() {
    let mut network = Network::new(2, |_| {});
    assert!(network.put(1, "key", "value").is_ok());
    network.tick(12);
    for id in [1, 2] {
        let mut moved = network.member(1).change(MemberRequest::Move { id, url: url(7) }).unwrap();
        assert!(matches!(moved.get(), Some(Err(RequestError::Conflict(_)))), "{:?}", moved.get());
    }
    let mut network = Network::new(1, |_| {});
    let mut moved = network.member(1).change(MemberRequest::Move { id: 1, url: url(7) }).unwrap();
    network.settle();
    assert!(moved.is_ok(), "it has nobody to be found by: {:?}", moved.get());
}

/// An answered greeting proves that the leader reaches the learner, not that the learner reaches
/// the leader.
#[test]
fn a_learner_that_never_acknowledged_anything_is_not_promoted() {
    let mut network = Network::new(1, |_| {});
    network.member(1).tick_until_leader().unwrap();
    let mut added = network.member(1).change(MemberRequest::Add { id: 2, url: url(2) }).unwrap();
    assert!(added.is_ok());
    network.start(&NodeConfig { join: true, ..config(2, 2) }, &MemVfs::default()).unwrap();
    for _ in 0..100 {
        (1..=2).for_each(|id| network.turn(id, [Input::Tick]));
        network.member(1).take_messages();
        network.deliver();
    }
    assert!(network.member(2).status().begun, "they have greeted each other");
    assert_eq!(network.member(1).status().learners, [2]);
    network
        .tick_until("it is promoted", |network| network.members[&1].status().learners.is_empty());
}

/// A learner never asks for votes, so it would never be told.
#[test]
fn a_learner_that_missed_its_removal_is_told() {
    let mut network = Network::new(3, |_| {});
    assert!(network.put(1, "key", "value").is_ok());
    network.settle();
    network.member(1).change(MemberRequest::Add { id: 4, url: url(4) }).unwrap();
    network.settle();
    network.start(&NodeConfig { join: true, ..config(4, 4) }, &MemVfs::default()).unwrap();
    // It bootstraps, because greetings arrive, and hears the leader, which hears nothing from it.
    for _ in 0..7 {
        for id in 1..=4 {
            network.turn(id, [Input::Tick]);
            network.member(id).take_messages();
        }
        network.deliver_round();
    }
    network.turn(1, [Input::Tick]);
    let heartbeat = sent_to(&mut network, 1, 4);
    bring(&mut network, 1, 4, heartbeat, vec![]);
    assert_eq!(network.member(4).status().leader, 1);
    // It is removed while it is away.
    let mut away = network.members.remove(&4).unwrap();
    assert_eq!(network.member(1).status().learners, [4]);
    let mut removed = network.member(1).change(MemberRequest::Remove { id: 4 }).unwrap();
    network.settle();
    assert!(removed.is_ok());
    network.tick(12);
    away.take_messages();
    network.members.insert(4, away);
    network.tick(50);
    assert!(matches!(network.ended.get(&4), Some(Error::Removed)), "{:?}", network.ended);
}

/// The message to the transfer's target was lost, and a third member was elected.
#[test]
fn a_transfer_that_elects_another_member_is_no_success() {
    let mut network = Network::new(3, |_| {});
    network.settle();
    assert_eq!(network.member(1).status().leader, 1);
    network.transcript.start_scenario();
    let mut answer = network.member(1).change(MemberRequest::Lead { to: Some(2) }).unwrap();
    network.member(1).take_messages();
    assert!(answer.get().is_none(), "it waits: {:?}", answer.get());
    network.give_up_leader(&[2, 3]);
    network.elect(3);
    assert_eq!(network.member(1).status().leader, 3);
    let answer = answer.get();
    let Some(Err(RequestError::Conflict(why))) = answer else { panic!("{answer:?}") };
    assert!(why.contains("member 3 was elected"), "{why}");
    check("leadership_went_to_another", &network.transcript.of(1));
}

/// raft does not campaign while it has a change of members to apply. A target told too early would
/// not stand for election, and the leader would take no writes until it gave up.
#[test]
fn a_transfer_waits_until_its_target_applied_the_last_change() {
    let mut network = Network::new(3, |_| {});
    assert!(network.put(1, "key", "value").is_ok());
    network.settle();
    let mut added = network.member(1).change(MemberRequest::Add { id: 4, url: url(4) }).unwrap();
    let append = sent_to(&mut network, 1, 2);
    bring(&mut network, 1, 2, append, vec![]);
    let acknowledged = sent_to(&mut network, 2, 1);
    bring(&mut network, 2, 1, acknowledged, vec![]);
    assert!(added.is_ok(), "member 1 has applied it");
    network.member(1).take_messages();
    network.transcript.start_scenario();
    let mut answer = network.member(1).change(MemberRequest::Lead { to: Some(2) }).unwrap();
    let hands_over = |message: &Message| message.get_msg_type() == MessageType::MsgTimeoutNow;
    assert!(!network.member(1).take_messages().iter().any(hands_over), "member 2 has not");
    assert!(answer.get().is_none());
    network.settle();
    assert!(answer.is_ok(), "{:?}", answer.get());
    assert_eq!(network.member(2).status().leader, 2);
    check("transfer_after_a_change_is_applied", &network.transcript.lines());
}

/// Otherwise a leader that is told to stop at that moment would end without a transfer.
#[test]
fn a_transfer_waits_for_the_pending_change() {
    let mut network = Network::new(3, |_| {});
    assert!(network.put(1, "key", "value").is_ok());
    network.settle();
    network.transcript.start_scenario();
    let mut added = network.member(1).change(MemberRequest::Add { id: 4, url: url(4) }).unwrap();
    let mut answer = network.member(1).change(MemberRequest::Lead { to: None }).unwrap();
    assert!(added.get().is_none() && answer.get().is_none(), "{:?}", answer.get());
    network.settle();
    assert!(added.is_ok() && answer.is_ok(), "{:?}", answer.get());
    assert_ne!(network.member(1).status().leader, 1);
    check("transfer_waits_for_a_change", &network.transcript.of(1));
}
