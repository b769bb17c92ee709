//! Requests: each is answered once and truthfully, and at once if the outcome is unknown.

use std::collections::BTreeSet;

use bytes::Bytes;
use raft::eraftpb::{Entry, Message, MessageType};
use raftexample::channels::{
    Ack, Acknowledged, MemberRequest, PeerReport, ReadRequest, RequestId, responder,
};
use raftexample::raft_node::Input;

use crate::crash::lagging_follower;
use crate::golden;
use crate::support::memory::*;

/// Compares a transcript with its file.
fn check(name: &str, lines: &[String]) {
    golden::check(&format!("requests/{name}"), lines);
}

fn heartbeat(from: u64, to: u64, term: u64) -> Message {
    let mut message = Message { from, to, term, ..Message::default() };
    message.set_msg_type(MessageType::MsgHeartbeat);
    message
}

#[test]
fn a_write_whose_leader_changed_is_answered_at_once_as_unknown() {
    for at in [1, 2] {
        let mut network = Network::new(3, |_| {});
        network.cut.insert(at);
        network.transcript.start_scenario();
        let mut answer = network.put(at, "key", "value");
        assert!(answer.get().is_none(), "member {at} waits");
        let term = network.member(at).status().term;
        let inbound = network.member(3).batch(at, vec![heartbeat(3, at, term + 1)]);
        network.turn(at, [Input::Inbound(inbound)]);
        assert!(answer.is_unknown(), "member {at}: {:?}", answer.get());
        check(&format!("write_whose_leader_changed_at_{at}"), &network.transcript.lines());
    }
}

#[test]
fn a_leader_without_a_majority_answers_unknown_then_waits() {
    let mut network = Network::new(3, |_| {});
    network.cut.insert(1);
    network.transcript.start_scenario();
    let mut proposed = network.put(1, "key", "value");
    for _ in 0..25 {
        network.turn(1, [Input::Tick]);
    }
    assert_eq!(network.member(1).status().leader, 0);
    assert!(proposed.is_unknown(), "{:?}", proposed.get());

    let mut waiting = network.put(1, "key", "later");
    let mut read = network.member(1).read().unwrap();
    for _ in 0..15 {
        network.turn(1, [Input::Tick]);
    }
    assert!(waiting.get().is_none() && read.get().is_none(), "nothing was proposed: they wait");
    network.cut.clear();
    network.tick_until("a leader is back", |network| network.members[&1].status().leader != 0);
    network.settle();
    network.settle();
    assert!(waiting.is_ok(), "{:?}", waiting.get());
    assert!(read.is_ok(), "{:?}", read.get());
    check("leader_without_a_majority", &network.transcript.of(1));
}

#[test]
fn a_snapshot_over_the_log_answers_pending_writes_as_unknown() {
    let mut network = lagging_follower();
    network.transcript.start_scenario();
    let mut answer = network.member(3).put("key", "mine").unwrap();
    network.member(3).take_messages();
    network.settle();
    assert!(answer.is_unknown(), "{:?}", answer.get());
    check("snapshot_over_a_pending_write", &network.transcript.of(3));
}

#[test]
fn a_write_to_be_acknowledged_when_proposed_is_answered_at_once() {
    let mut network = Network::new(3, |_| {});
    network.cut.insert(1);
    network.transcript.start_scenario();
    let member = network.member(1);
    let (input, mut answer) = member.propose(put("key", "value"), Ack::Proposed);
    member.turn([input]).unwrap();
    assert_eq!(answer.get(), Some(&Ok(Acknowledged::Proposed)));
    check("write_acknowledged_when_proposed", &network.transcript.lines());
}

#[test]
fn a_write_is_answered_with_its_index_and_term_on_any_member() {
    let mut network = Network::new(3, |_| {});
    for (number, id) in [1, 2, 3, 2].into_iter().enumerate() {
        let mut answer = network.put(id, &format!("key{number}"), "value");
        network.settle();
        let Some(Ok(Acknowledged::Applied { index, term })) = answer.get().cloned() else {
            panic!("{:?}", answer.get())
        };
        let state = network.member(id).state();
        assert_eq!(state[&format!("key{number}")], ("value".into(), index, term));
    }
}

/// The contexts of the read rounds among a member's undelivered messages.
fn contexts(member: &mut Member) -> Vec<Bytes> {
    let reads = member
        .take_messages()
        .into_iter()
        .filter(|message| message.get_msg_type() == MessageType::MsgReadIndex);
    reads.map(|message| message.entries[0].data.clone()).collect()
}

fn read_answer(from: u64, to: u64, term: u64, index: u64, context: &[u8]) -> Message {
    let mut message = Message { from, to, term, index, ..Message::default() };
    message.set_msg_type(MessageType::MsgReadIndexResp);
    let context = Entry { data: context.to_vec().into(), ..Entry::default() };
    message.entries = vec![context].into();
    message
}

#[test]
fn a_lost_read_round_is_repeated_with_a_new_context() {
    let mut network = Network::new(3, |_| {});
    network.transcript.start_scenario();
    let member = network.member(2);
    let mut first = member.read().unwrap();
    let mut all = contexts(member);
    assert_eq!(all.len(), 1);
    // A read that arrives during a round waits for the next round.
    let mut second = member.read().unwrap();
    assert!(contexts(member).is_empty(), "reads share rounds");
    for _ in 0..6 {
        member.tick().unwrap();
        all.extend(contexts(member));
    }
    assert!(all.len() >= 3, "it is tried again: {all:?}");
    let distinct: BTreeSet<_> = all.iter().collect();
    assert_eq!(distinct.len(), all.len(), "no context is used twice");
    assert!(first.get().is_none() && second.get().is_none());

    // The answer to the first round is late: it serves the first read, not the second.
    let (term, applied) = (member.status().term, member.status().applied);
    let late = read_answer(1, 2, term, applied, &all[0]);
    let inbound = network.member(1).batch(2, vec![late.clone(), late]);
    network.turn(2, [Input::Inbound(inbound)]);
    assert!(first.is_ok());
    assert!(second.get().is_none(), "its round began before the read");
    let answer = read_answer(1, 2, term, applied, &all[1]);
    let inbound = network.member(1).batch(2, vec![answer]);
    network.turn(2, [Input::Inbound(inbound)]);
    assert!(second.is_ok());
    check("read_round_lost", &network.transcript.lines());
}

#[test]
fn what_is_committed_does_not_wait_for_the_next_frame() {
    let mut network = Network::new(3, |_| {});
    let mut first = network.member(1).put("key", "1").unwrap();
    let appends = network.member(1).take_messages();
    let append = appends.into_iter().find(|message| message.to == 2).unwrap();
    let inbound = network.member(1).batch(2, vec![append]);
    network.turn(2, [Input::Inbound(inbound)]);
    let acknowledgement = network.member(2).take_messages();
    let inbound = network.member(2).batch(1, acknowledgement);

    let (second, mut unknown) = network.member(1).propose(put("key", "2"), Ack::Committed);
    network.member(1).disk.inject(1, Fault::Crash);
    network.turn(1, [second, Input::Inbound(inbound)]);
    assert!(network.ended.contains_key(&1), "it writes in this turn");
    assert!(first.is_ok(), "{:?}", first.get());
    assert!(unknown.is_unknown(), "{:?}", unknown.get());
}

/// Whether a leader asked others to confirm it.
fn was_confirmed(network: &Network) -> bool {
    network.transcript.lines().iter().any(|line| line.contains("send MsgHeartbeat"))
}

#[test]
fn a_read_rides_along_with_a_write_that_follows_it() {
    // A question of one of three members needs no ride.
    for (reader, members) in [(1, 3), (2, 5)] {
        let mut network = Network::new(members, |_| {});
        network.transcript.start_scenario();
        let mut first = network.member(1).put("key", "1").unwrap();
        let (write, mut second) = network.member(1).propose(put("key", "2"), Ack::Committed);
        // The leader takes in both at once.
        let (read, mut answer) = if reader == 1 {
            let (responder, pending) = responder();
            (Input::Read(ReadRequest { responder }), Answer::new(pending))
        } else {
            let answer = network.member(reader).read().unwrap();
            let asked = network.member(reader).take_messages();
            (Input::Inbound(network.member(reader).batch(1, asked)), answer)
        };
        network.turn(1, [read, write]);
        assert!(answer.get().is_none());
        network.deliver();
        assert!(first.is_ok() && second.is_ok() && answer.is_ok(), "at member {reader}");
        assert!(!was_confirmed(&network), "at member {reader}");
        check(&format!("read_rides_along_at_{reader}"), &network.transcript.lines());
    }
}

/// What was acknowledged of an earlier write may be older than another leader's election.
#[test]
fn a_read_does_not_ride_along_with_a_write_before_it() {
    for (reader, members) in [(1, 3), (2, 5)] {
        let mut network = Network::new(members, |_| {});
        network.transcript.start_scenario();
        let mut write = network.member(1).put("key", "1").unwrap();
        let mut read = network.member(reader).read().unwrap();
        if reader != 1 {
            let asked = network.member(reader).take_messages();
            let inbound = network.member(reader).batch(1, asked);
            network.turn(1, [Input::Inbound(inbound)]);
        }
        network.deliver();
        assert!(write.is_ok());
        assert!(read.is_ok() && was_confirmed(&network), "at member {reader}");
    }
}

/// The two are a majority, and neither has voted for a later leader.
#[test]
fn a_question_of_one_of_three_confirms_the_leader() {
    for (members, is_asked) in [(2, false), (3, false), (4, true), (5, true)] {
        let mut network = Network::new(members, |_| {});
        network.transcript.start_scenario();
        let mut read = network.member(2).read().unwrap();
        network.deliver();
        assert!(read.is_ok());
        assert_eq!(was_confirmed(&network), is_asked, "{members} members");
    }
}

/// Whether a member asked the leader for a round.
fn was_asked(network: &Network) -> bool {
    network.transcript.lines().iter().any(|line| line.contains("send MsgReadIndex"))
}

#[test]
fn a_followers_read_rides_along_with_its_own_later_write() {
    let mut network = Network::new(3, |_| {});
    network.transcript.start_scenario();
    let (write, mut written) = network.member(2).propose(put("key", "1"), Ack::Committed);
    let (responder, pending) = responder();
    let mut read = Answer::new(pending);
    network.turn(2, [write, Input::Read(ReadRequest { responder })]);
    network.deliver();
    assert!(written.is_ok() && read.is_ok());
    assert!(!was_asked(&network) && !was_confirmed(&network));
    check("read_rides_along_with_own_write", &network.transcript.lines());
}

/// It may have been committed before the read arrived, and others' writes behind it.
#[test]
fn a_followers_read_does_not_ride_along_with_an_earlier_write() {
    let mut network = Network::new(3, |_| {});
    network.transcript.start_scenario();
    let mut write = network.member(2).put("key", "1").unwrap();
    let mut read = network.member(2).read().unwrap();
    assert!(was_asked(&network));
    let proposal = network.member(2).take_messages().remove(0);
    assert_eq!(proposal.get_msg_type(), MessageType::MsgPropose);
    let inbound = network.member(2).batch(1, vec![proposal]);
    network.turn(1, [Input::Inbound(inbound)]);
    network.deliver();
    assert!(write.is_ok());
    assert!(read.get().is_none(), "its round was lost");
}

#[test]
fn a_read_whose_write_is_lost_starts_a_round() {
    let mut network = Network::new(3, |_| {});
    let (write, mut written) = network.member(2).propose(put("key", "1"), Ack::Committed);
    let (responder, pending) = responder();
    let mut read = Answer::new(pending);
    network.turn(2, [write, Input::Read(ReadRequest { responder })]);
    network.member(2).take_messages();
    for _ in 0..2 {
        network.turn(2, [Input::Tick]);
        network.deliver();
    }
    assert!(read.is_ok());
    assert!(written.get().is_none());
}

/// The answer may have been on its way since before the read.
#[test]
fn an_answer_that_an_earlier_run_asked_for_serves_no_read() {
    let mut network = Network::new(3, |_| {});
    let member = network.member(2);
    let mut read = member.read().unwrap();
    let context = contexts(member).remove(0);
    let (term, applied) = (member.status().term, member.status().applied);
    // Member, boot, and a counter that each run begins anew.
    let mut earlier = context.to_vec();
    earlier[8] ^= 1;
    for (context, is_served) in [(&earlier[..], false), (&context[..], true)] {
        let answer = read_answer(1, 2, term, applied, context);
        let inbound = network.member(1).batch(2, vec![answer]);
        network.turn(2, [Input::Inbound(inbound)]);
        assert_eq!(read.get().is_some(), is_served);
    }
}

#[test]
fn a_read_is_not_served_before_its_index_is_applied() {
    let mut network = Network::new(3, |_| {});
    network.transcript.start_scenario();
    let member = network.member(2);
    let mut read = member.read().unwrap();
    let context = contexts(member).remove(0);
    let (term, applied) = (member.status().term, member.status().applied);
    let inbound = network.member(1).batch(2, vec![read_answer(1, 2, term, applied + 1, &context)]);
    network.turn(2, [Input::Inbound(inbound)]);
    assert!(read.get().is_none());
    network.put(1, "key", "value");
    network.settle();
    assert!(read.is_ok());
    check("read_waits_for_its_index", &network.transcript.of(2));
}

/// A context of another run, of another member, or of a round that never started.
#[test]
fn an_answer_to_another_runs_read_answers_nothing() {
    let mut network = Network::new(3, |_| {});
    let member = network.member(2);
    let mut read = member.read().unwrap();
    let context = contexts(member).remove(0);
    let id = RequestId::from_bytes(&context).unwrap();
    let (term, applied) = (member.status().term, member.status().applied);
    for wrong in [
        RequestId { boot: id.boot + 1, ..id },
        RequestId { member: 3, ..id },
        RequestId { counter: id.counter + 5, ..id },
    ] {
        let answer = read_answer(1, 2, term, applied, &wrong.to_bytes());
        let inbound = network.member(1).batch(2, vec![answer]);
        network.turn(2, [Input::Inbound(inbound)]);
        assert!(read.get().is_none(), "{wrong:?}");
    }
}

/// The members that a leader asked to confirm its leadership, and the context of the question.
fn questions(leader: &mut Member) -> (Vec<u64>, Bytes) {
    let mut messages = leader.take_messages();
    messages.retain(|message| {
        message.get_msg_type() == MessageType::MsgHeartbeat && !message.context.is_empty()
    });
    let context = messages.first().map(|message| message.context.clone()).unwrap_or_default();
    assert!(messages.iter().all(|message| message.context == context), "{messages:?}");
    (messages.iter().map(|message| message.to).collect(), context)
}

/// Confirms the leadership.
fn confirm(network: &mut Network, from: u64, context: Bytes) {
    let term = network.member(1).status().term;
    let mut message = Message { from, to: 1, term, context, ..Message::default() };
    message.set_msg_type(MessageType::MsgHeartbeatResponse);
    let inbound = network.member(from).batch(1, vec![message]);
    network.member(1).turn([Input::Inbound(inbound)]).unwrap();
}

/// A round costs each member that is asked, and a majority is enough. If the only member asked does
/// not answer, the read waits for the next heartbeat.
#[test]
fn a_leader_asks_whom_it_needs_and_everybody_once_in_a_tick() {
    let mut network = Network::new(3, |_| {});
    network.member(1).tick().unwrap();
    network.member(1).take_messages();
    network.transcript.start_scenario();

    let mut read = network.member(1).read().unwrap();
    let (asked, context) = questions(network.member(1));
    assert_eq!(asked, [2, 3], "nobody has answered yet in this tick");
    confirm(&mut network, 3, context.clone());
    assert!(read.is_ok());
    confirm(&mut network, 2, context);

    let mut read = network.member(1).read().unwrap();
    assert_eq!(questions(network.member(1)).0, [3], "it was the first to answer");
    network.member(1).tick().unwrap();
    let (asked, context) = questions(network.member(1));
    assert_eq!(asked, [2, 3], "the heartbeat repeats the question");
    assert!(read.get().is_none());
    confirm(&mut network, 2, context);
    assert!(read.is_ok());

    let mut read = network.member(1).read().unwrap();
    let (asked, context) = questions(network.member(1));
    assert_eq!(asked, [2], "it is the first in this tick");
    confirm(&mut network, 2, context);
    assert!(read.is_ok());

    network.member(1).turn([Input::Report(PeerReport::Unreachable(2))]).unwrap();
    let _read = network.member(1).read().unwrap();
    assert_eq!(questions(network.member(1)).0, [2, 3], "a message to the first was lost");
    check("whom_a_leader_asks", &network.transcript.lines());
}

/// Also in the tick of its removal, when no other member would be asked.
#[test]
fn a_member_that_was_removed_confirms_no_reads() {
    let mut network = Network::new(3, |_| {});
    network.member(1).tick().unwrap();
    network.member(1).take_messages();
    let mut read = network.member(1).read().unwrap();
    let (_, context) = questions(network.member(1));
    confirm(&mut network, 3, context);
    assert!(read.is_ok());
    network.transcript.start_scenario();
    let mut removal = network.member(1).change(MemberRequest::Remove { id: 3 }).unwrap();
    // Member 3 does not learn of it, and no send to it fails.
    let mut messages = network.member(1).take_messages();
    messages.retain(|message| message.to == 2);
    let inbound = network.member(1).batch(2, messages);
    network.member(2).turn([Input::Inbound(inbound)]).unwrap();
    let answers = network.member(2).take_messages();
    let inbound = network.member(2).batch(1, answers);
    network.member(1).turn([Input::Inbound(inbound)]).unwrap();
    assert!(removal.is_ok(), "{:?}", removal.get());
    network.member(1).take_messages();
    let _read = network.member(1).read().unwrap();
    assert_eq!(questions(network.member(1)).0, [2]);
    check("removed_member_confirms_no_read", &network.transcript.lines());
}

/// The leader of an older term must not serve a read after another leader accepted writes.
#[test]
fn a_leader_that_was_replaced_serves_no_read() {
    let mut network = Network::new(3, |_| {});
    network.cut.insert(1);
    network.give_up_leader(&[2, 3]);
    network.elect(2);
    assert!(network.put(2, "key", "new").is_ok());
    assert_eq!(network.member(1).status().leader, 1, "it does not know yet");
    network.transcript.start_scenario();
    let mut read = network.member(1).read().unwrap();
    network.deliver();
    for _ in 0..5 {
        network.turn(1, [Input::Tick]);
        network.deliver();
    }
    assert!(read.get().is_none(), "{:?}", read.get());
    network.cut.clear();
    network.settle();
    network.settle();
    assert!(read.is_ok(), "{:?}", read.get());
    assert_eq!(network.member(1).state()["key"].0, "new");
    check("replaced_leader_serves_no_read", &network.transcript.of(1));
}

/// A write that did not leave was not proposed: it waits for a reachable leader, and is not sent to
/// the unreachable one again and again.
#[test]
fn a_write_that_never_left_waits_for_the_next_leader() {
    let mut network = Network::new(3, |_| {});
    network.transcript.start_scenario();
    let term = network.member(2).status().term;
    let follower = network.member(2);
    let mut answer = follower.put("key", "value").unwrap();
    let proposals = |messages: Vec<Message>| -> Vec<Message> {
        messages.into_iter().filter(|m| m.get_msg_type() == MessageType::MsgPropose).collect()
    };
    let sent = proposals(follower.take_messages());
    assert_eq!(sent.len(), 1, "it is forwarded to the leader");
    let requests =
        sent[0].entries.iter().map(|entry| (entry.context.clone(), entry.data.clone())).collect();
    let report = PeerReport::NotProposed { to: sent[0].to, requests };
    follower.turn([Input::Report(report)]).unwrap();
    follower.tick().unwrap();
    assert_eq!(proposals(follower.take_messages()), [], "the leader is out of reach");
    assert!(answer.get().is_none(), "{:?}", answer.get());

    let inbound = network.member(3).batch(2, vec![heartbeat(3, 2, term + 1)]);
    let follower = network.member(2);
    follower.turn([Input::Inbound(inbound)]).unwrap();
    let sent = proposals(follower.take_messages());
    assert_eq!(sent.iter().map(|message| message.to).collect::<Vec<_>>(), [3]);
    assert!(answer.get().is_none(), "it may still be carried out: {:?}", answer.get());
    check("write_that_never_left", &network.transcript.lines());
}
