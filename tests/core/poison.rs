//! Committed entries that no member can decode. Stopping at one would stop every member at each
//! start for ever, so all members skip them alike, however they receive them.

use protobuf::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeType, EntryType, Message, MessageType};
use raftexample::channels::{MemberRequest, PeerHeader};
use raftexample::raft_node::{Input, NodeConfig};

use crate::support::memory::*;

/// Each entry, with the log line that a member writes for it.
fn poison() -> Vec<(&'static str, EntryType, Vec<u8>)> {
    use ConfChangeType::{AddLearnerNode, AddNode, RemoveNode};
    use EntryType::{EntryConfChange, EntryConfChangeV2, EntryNormal};
    let kind = |kind: u64, change_type, id: u64, context: &[u8]| {
        let mut change = ConfChange { id: kind, ..ConfChange::default() };
        change.set_change_type(change_type);
        change.node_id = id;
        change.context = context.to_vec().into();
        change.write_to_bytes().unwrap()
    };
    let change = |change_type, id, context| kind(0, change_type, id, context);
    let bound = |url: &str| [&109_u64.to_le_bytes(), url.as_bytes()].concat();
    let (no_command, nothing) = ("skipping an entry that is no command", "does nothing");
    let (unread, joint) = ("no change of members", "skipping a joint change of members");
    let cut = put("key", "cut short");
    vec![
        (no_command, EntryNormal, vec![0xff; 40]),
        (no_command, EntryNormal, vec![0]),
        (no_command, EntryNormal, cut[..cut.len() - 1].to_vec()),
        (no_command, EntryNormal, [put("key", "too long"), vec![0]].concat()),
        // raft's own empty entry is skipped silently.
        ("", EntryNormal, vec![]),
        (unread, EntryConfChange, vec![0xff; 7]),
        (nothing, EntryConfChange, vec![]),
        ("is no peer URL", EntryConfChange, change(AddNode, 9, &bound("no url"))),
        ("incarnation of member 9 is missing", EntryConfChange, change(AddNode, 9, &[0xff, 0xfe])),
        ("is not UTF-8", EntryConfChange, change(AddLearnerNode, 9, &[0xff, 0xfe])),
        ("0 is no member id", EntryConfChange, change(AddNode, 0, &bound(&url(9)))),
        ("is the peer URL of member 1", EntryConfChange, change(AddNode, 9, &bound(&url(1)))),
        ("2 is a member already", EntryConfChange, change(AddNode, 2, &bound(&url(9)))),
        ("2 is a member already", EntryConfChange, change(AddLearnerNode, 2, url(9).as_bytes())),
        ("is no learner", EntryConfChange, kind(1, AddNode, 2, &bound(""))),
        ("9 is no member", EntryConfChange, kind(2, AddNode, 9, url(9).as_bytes())),
        ("of kind 9", EntryConfChange, kind(9, AddNode, 9, url(9).as_bytes())),
        ("of kind 1", EntryConfChange, kind(1, RemoveNode, 2, b"")),
        // DELETE of an id that is not a member.
        ("", EntryConfChange, change(RemoveNode, 77, b"")),
        ("", EntryConfChange, change(RemoveNode, 0, b"")),
        (joint, EntryConfChangeV2, vec![0xff; 9]),
        (joint, EntryConfChangeV2, vec![]),
    ]
}

/// A cluster whose members all applied the poison. Each received it from a leader of a later term:
/// the member or stranger that `leader` returns.
fn poisoned(leader: fn(u64) -> u64) -> Network {
    let mut network = Network::new(3, |config| {
        config.snapshot_count = 100;
        config.snapshot_catch_up_entries = 1;
    });
    assert!(network.put(1, "key", "value").is_ok());
    network.settle();
    let members = network.member(1).status().members;
    let last = network.member(1).wal().entries.pop().unwrap();
    let term = network.member(1).status().term + 1;
    let commit = last.index + poison().len() as u64;
    for id in 1..=3 {
        let from = leader(id);
        let mut append = Message { from, to: id, term, commit, ..Message::default() };
        append.set_msg_type(MessageType::MsgAppend);
        (append.index, append.log_term) = (last.index, last.term);
        let entries = poison().into_iter().zip(last.index + 1..).map(|((_, kind, data), index)| {
            let mut entry = entry(index, term, data);
            entry.set_entry_type(kind);
            entry
        });
        append.entries = entries.collect::<Vec<_>>().into();
        let inbound = match network.members.get_mut(&from) {
            Some(member) => member.batch(id, vec![append]),
            None => {
                let to_itself = network.member(id).header(id);
                let header = PeerHeader { from, incarnation: 109, url: url(from), ..to_itself };
                batch(header, 1, 1, vec![append])
            }
        };
        let member = network.member(id);
        member.turn([Input::Inbound(inbound)]).unwrap();
        assert_eq!((member.status().applied, member.status().leader), (commit, from));
        assert_eq!(member.status().members, members, "member {id}");
        for (said, kind, data) in poison() {
            assert!(member.logged(said), "member {id} does not say {said:?} of {kind:?} {data:?}");
        }
    }
    network
}

/// Another member.
fn a_member(receiver: u64) -> u64 {
    receiver % 3 + 1
}

fn a_stranger(_receiver: u64) -> u64 {
    9
}

fn all_hold(network: &mut Network, ids: &[u64], state: &[u8], when: &str) {
    let members = network.member(1).status().members;
    for id in ids {
        assert!(network.member(*id).state_bytes() == state, "member {id} {when}");
        assert_eq!(network.member(*id).status().members, members, "member {id} {when}");
    }
}

fn start_again(network: &mut Network, ids: &[u64], boot: u64) {
    for id in ids {
        let config = NodeConfig { boot: boot + id, ..network.member(*id).config.clone() };
        let disk = network.crash(*id, Survives::Nothing);
        network.start(&config, &disk).unwrap();
    }
}

#[test]
fn an_unreadable_committed_entry_does_nothing_at_any_start() {
    for leader in [a_member, a_stranger] {
        let mut network = poisoned(leader);
        let state = network.member(1).state_bytes();
        all_hold(&mut network, &[1, 2, 3], &state, "now");
        for boot in [3000, 4000] {
            for id in 1..=3 {
                network.member(id).tick().unwrap();
            }
            start_again(&mut network, &[1, 2, 3], boot);
            all_hold(&mut network, &[1, 2, 3], &state, "started again");
        }
        network.elect(2);
        assert!(network.put(2, "key", "later").is_ok(), "the cluster lives");
    }
}

/// A snapshot taken after the poison, the log after it, and a member that has neither.
#[test]
fn an_unreadable_committed_entry_does_nothing_in_a_snapshot() {
    let mut network = poisoned(a_member);
    network.give_up_leader(&[1, 2, 3]);
    network.elect(2);
    let mut addition = network.member(2).change(MemberRequest::Add { id: 4, url: url(4) }).unwrap();
    network.deliver();
    assert!(addition.is_ok(), "{:?}", addition.get());
    for number in 0..150 {
        assert!(network.put(2, &format!("key{}", number % 7), &number.to_string()).is_ok());
    }
    network.settle();
    let snapshot = network.member(2).status().snapshot;
    assert!(snapshot > 100, "there is a snapshot over all of it");
    let joiner = NodeConfig {
        join: true,
        snapshot_count: 100,
        snapshot_catch_up_entries: 1,
        ..config(4, 4)
    };
    network.start(&joiner, &MemVfs::default()).unwrap();
    network.tick_until("member 4 has all of it", |network| {
        network.members[&4].status().applied == network.members[&2].status().applied
    });
    let state = network.member(2).state_bytes();
    assert!(network.member(4).logged("publishing snapshot"), "it came as a snapshot");
    all_hold(&mut network, &[1, 2, 3, 4], &state, "after a snapshot");
    start_again(&mut network, &[1, 2, 3, 4], 3000);
    all_hold(&mut network, &[1, 2, 3, 4], &state, "started from a snapshot");
}
