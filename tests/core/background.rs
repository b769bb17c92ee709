//! Frames that are written while the node goes on, as on a slow disk.

use raft::eraftpb::{Message, MessageType};
use raftexample::channels::{Ack, Acknowledged, MemberRequest, ReadRequest, responder};
use raftexample::error::Error;
use raftexample::raft_node::{Input, Turn};

use crate::support::memory::*;

use MessageType::{MsgAppend, MsgAppendResponse, MsgHeartbeat, MsgHeartbeatResponse, MsgReadIndex};

/// Three members of which `slow` writes its next frame in the background; member 1 leads.
fn network_with_slow(slow: u64) -> Network {
    let mut network = Network::new(3, |_| {});
    network.member(slow).slow_down();
    // The next frame after one that was slow.
    assert!(network.put(1, "key", "0").is_ok());
    network.settle();
    // The commit index.
    while network.member(slow).node.is_writing() {
        network.member(slow).write_frame().unwrap();
    }
    network
}

/// Begins a write at the leader without waiting for it.
fn begin(network: &mut Network, value: &str) -> Answer<Acknowledged> {
    let (write, answer) = network.member(1).propose(put("key", value), Ack::Committed);
    network.turn(1, [write]);
    answer
}

fn types(messages: &[Message]) -> Vec<MessageType> {
    messages.iter().map(|message| message.get_msg_type()).collect()
}

#[test]
fn a_follower_acknowledges_only_what_is_written() {
    let mut network = network_with_slow(2);
    let _answer = begin(&mut network, "1");
    network.hand_over(1, 2);
    assert!(network.member(2).node.is_writing());
    assert_eq!(types(&network.member(2).take_messages()), []);
    network.member(2).write_frame().unwrap();
    assert_eq!(types(&network.member(2).take_messages()), [MsgAppendResponse]);
    assert!(!network.member(2).node.is_writing());
}

#[test]
fn a_follower_answers_heartbeats_and_asks_while_it_writes() {
    let mut network = network_with_slow(2);
    let _answer = begin(&mut network, "1");
    network.hand_over(1, 2);
    assert!(network.member(2).node.is_writing());
    network.turn(1, [Input::Tick]);
    assert!(types(&network.member(1).take_messages()).contains(&MsgHeartbeat));
    network.turn(1, [Input::Tick]);
    network.hand_over(1, 2);
    let _read = network.member(2).read().unwrap();
    assert_eq!(types(&network.member(2).take_messages()), [MsgHeartbeatResponse, MsgReadIndex]);
    assert!(network.member(2).node.is_writing());
}

/// In a new term: without it on disk, the member could vote for another leader of that term.
#[test]
fn a_heartbeat_of_an_unsaved_term_is_answered_after_the_write() {
    let mut network = network_with_slow(2);
    let term = network.member(1).status().term + 1;
    let mut heartbeat = Message { from: 3, to: 2, term, ..Message::default() };
    heartbeat.set_msg_type(MsgHeartbeat);
    let inbound = network.member(3).batch(2, vec![heartbeat]);
    network.turn(2, [Input::Inbound(inbound)]);
    assert!(network.member(2).node.is_writing());
    assert_eq!(types(&network.member(2).take_messages()), []);
    assert_eq!(network.member(2).node.saved_term_and_vote().0, term - 1);
    network.member(2).write_frame().unwrap();
    assert_eq!(types(&network.member(2).take_messages()), [MsgHeartbeatResponse]);
    assert_eq!(network.member(2).node.saved_term_and_vote().0, term);
}

/// Both followers have the entry, so it is committed. The leader's own state machine waits.
#[test]
fn a_leader_applies_nothing_that_its_own_disk_lacks() {
    let mut network = network_with_slow(1);
    let mut answer = begin(&mut network, "1");
    network.deliver();
    assert!(answer.get().is_none());
    let member = network.member(1);
    assert!(member.node.is_writing());
    let status = member.status();
    assert_eq!(status.commit, status.applied + 1);
    member.write_frame().unwrap();
    assert!(answer.is_ok());
}

#[test]
fn what_arrives_during_a_frame_is_the_next_one() {
    let mut network = network_with_slow(2);
    let _first = begin(&mut network, "1");
    network.hand_over(1, 2);
    let _second = begin(&mut network, "2");
    network.hand_over(1, 2);
    let _third = begin(&mut network, "3");
    network.hand_over(1, 2);
    let last = network.member(1).node.raft().raft_log.last_index();
    let member = network.member(2);
    assert_eq!(member.wal().last_index(), last - 3, "nothing is written");
    member.write_frame().unwrap();
    assert_eq!(member.wal().last_index(), last - 2);
    assert!(member.node.is_writing());
    member.write_frame().unwrap();
    assert_eq!(member.wal().last_index(), last, "one frame holds both");
    assert!(!member.node.is_writing());
}

/// A disk may hang for long, while a leader goes on.
#[test]
fn what_gathers_during_a_frame_is_bounded() {
    let mut network = network_with_slow(2);
    // Naming one would wait for the frame under way.
    network.member(2).holds_snapshots = true;
    let _first = begin(&mut network, "1");
    network.hand_over(1, 2);
    let term = network.member(1).status().term;
    let last = network.member(2).node.raft().raft_log.last_index();
    for (index, bytes) in [(last + 1, 65 << 20), (last + 2, 1)] {
        let mut append = Message { from: 1, to: 2, term, index: index - 1, ..Message::default() };
        append.set_msg_type(MsgAppend);
        append.log_term = term;
        append.entries = vec![entry(index, term, put("key", &"x".repeat(bytes)))].into();
        let inbound = network.member(1).batch(2, vec![append]);
        network.turn(2, [Input::Inbound(inbound)]);
        let is_taken = network.member(2).node.raft().raft_log.last_index() == index;
        assert_eq!(is_taken, index == last + 1, "entry {index} behind {last}");
    }
}

/// Entries of a later leader replace those that are gathered, and those of the frame under way.
#[test]
fn gathered_entries_are_replaced_by_a_later_leaders() {
    let mut network = network_with_slow(2);
    network.cut.insert(3);
    let last = network.member(2).node.raft().raft_log.last_index();
    for value in ["1", "2", "3"] {
        let _answer = begin(&mut network, value);
        network.hand_over(1, 2);
    }
    // Another leader, whose log ends at `last`.
    let (term, log_term) = (network.member(1).status().term + 1, network.member(1).status().term);
    for index in [last + 2, last + 1] {
        let mut append = Message { from: 3, to: 2, term, index: index - 1, ..Message::default() };
        append.set_msg_type(MsgAppend);
        append.log_term = log_term;
        append.entries = vec![entry(index, term, put("key", "later"))].into();
        let inbound = network.member(3).batch(2, vec![append]);
        network.turn(2, [Input::Inbound(inbound)]);
    }
    let member = network.member(2);
    while member.node.is_writing() {
        member.write_frame().unwrap();
    }
    let terms: Vec<_> =
        member.wal().entries.iter().map(|entry| (entry.index, entry.term)).collect();
    assert_eq!(terms.last(), Some(&(last + 1, term)), "{terms:?}");
    assert_eq!(member.node.raft().raft_log.persisted, last + 1);
}

/// Whoever applies a change may rely on it being on disk.
#[test]
fn a_change_of_members_is_not_written_in_the_background() {
    let mut network = network_with_slow(1);
    let mut write = begin(&mut network, "1");
    assert!(network.member(1).node.is_writing());
    let url = "http://127.0.0.1:4".to_owned();
    let mut change = network.member(1).change(MemberRequest::Add { id: 4, url }).unwrap();
    assert!(!network.member(1).node.is_writing(), "the frame under way was waited for");
    assert!(write.get().is_none());
    network.deliver();
    assert!(write.is_ok() && change.is_ok());
}

#[test]
fn a_read_does_not_wait_for_the_frame_under_way() {
    for reader in [1, 2] {
        let mut network = network_with_slow(reader);
        let mut write = begin(&mut network, "1");
        if reader == 2 {
            network.hand_over(1, 2);
        }
        assert!(network.member(reader).node.is_writing());
        let mut read = network.member(reader).read().unwrap();
        network.deliver();
        assert!(read.is_ok() && write.get().is_none(), "at member {reader}");
        network.member(reader).write_frame().unwrap();
        network.deliver();
        assert!(write.is_ok());
    }
}

/// Its commit would come a whole sync later.
#[test]
fn a_read_at_a_slow_disk_rides_along_with_no_write() {
    let mut network = network_with_slow(1);
    let (write, mut written) = network.member(1).propose(put("key", "1"), Ack::Committed);
    let (responder, pending) = responder();
    let mut read = Answer::new(pending);
    network.turn(1, [Input::Read(ReadRequest { responder }), write]);
    network.deliver();
    assert!(network.member(1).node.is_writing());
    assert!(read.is_ok() && written.get().is_none());
}

/// As at the end of a turn on an async worker, where a larger frame needs a thread.
#[test]
fn a_small_frame_is_given_away_and_a_large_one_is_not() {
    for (count, turn) in [(1, Turn::Done), (20, Turn::NeedsDisk)] {
        let mut network = Network::new(3, |_| {});
        let member = network.member(1);
        let late = LateWrites::new(|| false);
        member.node.set_background(Box::new(late.clone()));
        let mut answers = Vec::new();
        for _ in 0..count {
            let (write, answer) = member.propose(put("key", "1"), Ack::Committed);
            member.node.handle(write).unwrap();
            answers.push(answer);
        }
        let before = member.disk.operations();
        assert_eq!(member.node.handle_ready_without_disk().unwrap(), turn);
        assert_eq!(late.has_begun(), turn == Turn::Done);
        assert_eq!(member.disk.operations(), before, "nothing was written");
    }
}

#[test]
fn a_write_that_fails_in_the_background_ends_the_node() {
    let mut network = network_with_slow(1);
    let mut answer = begin(&mut network, "1");
    network.member(1).disk.inject(1, Fault::Fails(std::io::ErrorKind::StorageFull));
    let ended = network.member(1).write_frame();
    assert!(matches!(ended, Err(Error::Io { .. })), "{ended:?}");
    assert!(answer.get().is_none());
    network.members.remove(&1);
    assert!(answer.is_unknown());
}

#[test]
fn a_stop_waits_for_the_frame_under_way() {
    let mut network = network_with_slow(1);
    let _first = begin(&mut network, "1");
    let last = network.member(1).node.raft().raft_log.last_index();
    let member = network.member(1);
    assert_eq!(member.wal().last_index(), last - 1);
    member.node.stop().unwrap();
    assert_eq!(member.wal().last_index(), last);
}

/// Two clients at followers could keep the clients of the leader waiting without end.
#[test]
fn writes_join_a_frame_that_forwarded_ones_began_to_gather() {
    let mut network = network_with_slow(1);
    assert!(network.member(1).node.takes_writes());
    let _write = begin(&mut network, "1");
    assert!(network.member(1).node.is_writing() && !network.member(1).node.takes_writes());
    let _forwarded = network.member(2).put("key", "2").unwrap();
    network.hand_over(2, 1);
    assert!(network.member(1).node.is_writing() && network.member(1).node.takes_writes());
}

/// A leader that went on would keep the others from electing another one.
#[test]
fn a_frame_that_hangs_is_waited_for_and_the_node_stands_still() {
    for id in [1, 2] {
        let mut network = network_with_slow(id);
        let _write = begin(&mut network, "1");
        if id == 2 {
            network.hand_over(1, 2);
        }
        let ticks = network.member(id).config.election_ticks / 2;
        for _ in 1..ticks {
            network.turn(id, [Input::Tick]);
        }
        assert!(network.member(id).node.is_writing());
        network.turn(id, [Input::Tick]);
        assert!(!network.member(id).node.is_writing());
    }
}

/// The second frame holds a commit index alone, and raft gave it no number.
#[test]
fn two_frames_that_end_in_one_turn_count_as_the_later_ready() {
    let mut network = network_with_slow(2);
    let mut answer = begin(&mut network, "1");
    network.deliver();
    assert!(answer.is_ok());
    let member = network.member(2);
    assert!(member.node.is_writing());
    let ticks = 1 + member.config.election_ticks / 2;
    member.late.as_ref().unwrap().write();
    let inputs = std::iter::once(Input::Written).chain((0..ticks).map(|_| Input::Tick));
    member.turn(inputs).unwrap();
    assert!(!member.node.is_writing());
    let log = &member.node.raft().raft_log;
    assert_eq!(log.persisted, log.last_index());
}
