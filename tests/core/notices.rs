//! Commit notices that a leader holds back until an append tells the same.

use raft::eraftpb::{Message, MessageType};
use raftexample::channels::MemberRequest;
use raftexample::error::Error;
use raftexample::raft_node::Input;

use crate::support::memory::*;

use MessageType::{MsgAppend, MsgHeartbeat};

/// Three members; member 1 leads and holds notices back.
fn network() -> Network {
    let mut network = Network::new(3, |_| {});
    network.member(1).node.hold_notices();
    network
}

/// The receivers of appends in what member 1 sent, and their commit indexes.
fn told(network: &mut Network) -> Vec<(u64, u64)> {
    let appends = |it: &Message| it.get_msg_type() == MsgAppend;
    let messages = network.member(1).take_messages();
    messages.into_iter().filter(appends).map(|it| (it.to, it.commit)).collect()
}

#[test]
fn an_append_tells_what_a_notice_was_held_back_for() {
    let mut network = network();
    assert!(network.put(1, "key", "1").is_ok());
    let commit = network.member(1).status().commit;
    assert_eq!([2, 3].map(|id| network.member(id).status().commit), [commit - 1; 2]);
    let _answer = network.member(1).put("key", "2").unwrap();
    assert_eq!(told(&mut network), [(2, commit), (3, commit)]);
    assert_eq!(network.member(1).node.held_notices(), None, "they are replaced");
}

#[test]
fn notices_are_sent_when_they_are_due() {
    let mut network = network();
    assert!(network.put(1, "key", "1").is_ok());
    let commit = network.member(1).status().commit;
    let held = network.member(1).node.held_notices();
    assert!(held.is_some());
    network.turn(1, [Input::NoticesDue]);
    assert_eq!(told(&mut network), [(2, commit), (3, commit)]);
    assert_eq!(network.member(1).node.held_notices(), None);
    network.turn(1, [Input::NoticesDue]);
    assert_eq!(told(&mut network), [], "once");
    assert!(network.put(1, "key", "2").is_ok());
    assert!(network.member(1).node.held_notices() > held, "the next one waits as long again");
}

#[test]
fn a_later_notice_does_not_wait_longer_than_the_first_one() {
    let mut network = network();
    let committed = network.member(1).status().commit;
    let _first = network.member(1).put("key", "1").unwrap();
    network.hand_over(1, 3);
    let _second = network.member(1).put("key", "2").unwrap();
    network.hand_over(3, 1);
    let held = network.member(1).node.held_notices();
    assert!(held.is_some());
    network.hand_over(1, 3);
    network.hand_over(3, 1);
    assert_eq!(network.member(1).status().commit, committed + 2);
    assert_eq!(network.member(1).node.held_notices(), held);
    network.turn(1, [Input::NoticesDue]);
    assert_eq!(told(&mut network), [(2, committed + 2), (3, committed + 2)]);
}

#[test]
fn a_member_that_forwarded_a_write_is_told_at_once() {
    let mut network = network();
    assert!(network.put(2, "key", "1").is_ok());
    let commit = network.member(1).status().commit;
    assert_eq!(network.member(2).status().commit, commit);
    assert_eq!(network.member(3).status().commit, commit - 1);
    // It waits for nothing after that.
    assert!(network.put(1, "key", "2").is_ok());
    assert_eq!(network.member(2).status().commit, commit);
}

#[test]
fn a_forwarded_read_waits_for_no_notice() {
    let mut network = network();
    assert!(network.put(1, "key", "1").is_ok());
    let mut read = network.member(2).read().unwrap();
    network.deliver();
    assert!(read.is_ok());
}

/// A member that is removed hears of it, because it is told before it is none any more.
#[test]
fn a_change_of_members_is_told_at_once() {
    let mut network = network();
    let mut answer = network.member(1).change(MemberRequest::Remove { id: 3 }).unwrap();
    network.deliver();
    assert!(answer.is_ok());
    let commit = network.member(1).status().commit;
    assert_eq!(network.member(2).status().commit, commit);
    assert!(matches!(network.ended.get(&3), Some(Error::Removed)), "{:?}", network.ended);
    assert!(network.member(1).node.held_notices().is_none());
}

#[test]
fn a_former_leader_sends_no_notices() {
    let mut network = network();
    assert!(network.put(1, "key", "1").is_ok());
    assert!(network.member(1).node.held_notices().is_some());
    let term = network.member(1).status().term + 1;
    let mut heartbeat = Message { from: 3, to: 1, term, ..Message::default() };
    heartbeat.set_msg_type(MsgHeartbeat);
    let inbound = network.member(3).batch(1, vec![heartbeat]);
    network.turn(1, [Input::Inbound(inbound)]);
    network.turn(1, [Input::NoticesDue]);
    assert_eq!(told(&mut network), []);
    assert!(network.member(1).node.held_notices().is_none());
}
