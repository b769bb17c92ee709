//! A node's memory is bounded: waiting requests, uncommitted entries, and unapplied entries.

use raftexample::channels::{Ack, ConfChangeRequest, MemberRequest, ReadRequest, responder};
use raftexample::error::RequestError;
use raftexample::raft_node::Input;

use crate::support::memory::forging::Role;
use crate::support::memory::*;

const MEBIBYTE: usize = 1 << 20;
/// The largest value, so that few are needed.
const VALUE_BYTES: usize = 16 * MEBIBYTE;

fn is_refused<T: Clone + std::fmt::Debug + Send + 'static>(
    answer: &mut Answer<T>,
    why: &str,
) -> bool {
    matches!(answer.get(), Some(Err(RequestError::Unavailable(said))) if said.contains(why))
}

/// The next request is answered 503 at once, and those before it keep waiting.
#[test]
fn requests_that_wait_for_a_leader_are_bounded() {
    let mut member = Role::Silent.start(&Role::Silent.image());
    let mut writes: Vec<_> = (0..4096)
        .map(|_| {
            let (input, answer) = member.propose(put("key", "value"), Ack::Committed);
            member.node.handle(input).unwrap();
            answer
        })
        .collect();
    assert!(is_refused(&mut member.put("key", "value").unwrap(), "too many writes"));
    assert!(writes.iter_mut().all(|write| write.get().is_none()));

    let mut read = || {
        let (responder, pending) = responder();
        member.node.handle(Input::Read(ReadRequest { responder })).unwrap();
        Answer::new(pending)
    };
    let mut reads: Vec<_> = (0..16384).map(|_| read()).collect();
    assert!(is_refused(&mut read(), "too many reads"));
    assert!(reads.iter_mut().all(|read| read.get().is_none()));

    let mut change = || {
        let (responder, pending) = responder();
        let change = MemberRequest::Remove { id: 3 };
        let request = ConfChangeRequest { change, forwarded: false, responder };
        member.node.handle(Input::ConfChange(request)).unwrap();
        Answer::new(pending)
    };
    let mut changes: Vec<_> = (0..64).map(|_| change()).collect();
    assert!(is_refused(&mut change(), "too many changes"));
    assert!(changes.iter_mut().all(|change| change.get().is_none()));

    // A client that gives up frees its place.
    writes.pop();
    member.tick().unwrap();
    let (input, mut answer) = member.propose(put("key", "value"), Ack::Committed);
    member.node.handle(input).unwrap();
    assert!(answer.get().is_none());
}

fn value(number: usize) -> String {
    char::from(b'a' + number as u8).to_string().repeat(VALUE_BYTES)
}

fn log_bytes(member: &Member) -> usize {
    member.wal().entries.iter().map(|entry| entry.data.len()).sum()
}

/// A leader without acknowledgements stops growing its log, and writes wait.
#[test]
fn the_log_that_is_not_committed_is_bounded() {
    let mut network = Network::new(2, |_| {});
    let leader = network.member(1);
    let mut writes: Vec<_> =
        (0..7).map(|number| leader.put("key", &value(number)).unwrap()).collect();
    let bytes = log_bytes(leader);
    assert!((64 * MEBIBYTE - VALUE_BYTES..64 * MEBIBYTE).contains(&bytes), "{bytes}");
    assert!(writes.iter_mut().all(|write| write.get().is_none()));
    network.settle();
    assert!(writes.iter_mut().all(Answer::is_ok), "all of them are written in the end");
    assert_eq!(network.member(2).state()["key"].0, value(6));
}

/// If the state machine lags, the node accepts no more entries from clients or its leader until it
/// has applied some.
#[test]
fn the_entries_that_are_not_applied_are_bounded() {
    let mut network = Network::new(2, |_| {});
    network.member(1).holds_entries = true;
    network.member(2).holds_entries = true;
    let mut writes: Vec<_> = (0..7).map(|number| network.put(1, "key", &value(number))).collect();
    for id in [1, 2] {
        let bytes = log_bytes(network.member(id));
        assert!(bytes < 64 * MEBIBYTE + 2 * VALUE_BYTES, "member {id}: {bytes}");
    }
    network.member(1).apply_held_entries().unwrap();
    network.settle();
    let bytes = log_bytes(network.member(2));
    assert!(bytes < 64 * MEBIBYTE + 2 * VALUE_BYTES, "the other still does not: {bytes}");
    network.member(2).apply_held_entries().unwrap();
    network.settle();
    assert!(writes.iter_mut().all(Answer::is_ok), "all of them are written in the end");
    assert_eq!(network.member(2).state()["key"].0, value(6));
}

/// Otherwise a member that is restarted often would keep more and more of it.
#[test]
fn the_log_since_the_last_snapshot_counts_across_restarts() {
    let value = "x".repeat(1 << 20);
    let mut member =
        Member::start(&config(1, 1), &MemVfs::default(), &Transcript::default()).unwrap();
    for (restarts, has_snapshot) in [(0, false), (1, true)] {
        member.tick_until_leader().unwrap();
        for _ in 0..16 {
            assert!(member.put("key", &value).unwrap().is_ok());
        }
        assert_eq!(member.status().snapshot > 0, has_snapshot, "after {restarts} restarts");
        let disk = member.crash(Survives::Nothing);
        member = Member::start(&config(1, 1), &disk, &Transcript::default()).unwrap();
    }
}
