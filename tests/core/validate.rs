//! Which messages of peers are validated and stepped, which senders are admitted, and what a refused
//! message changes: nothing.

use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::{Entry, EntryType, Message, MessageType, Snapshot};
use raftexample::channels::{
    MemberRequest, PeerHeader, Refusal, RequestId, SnapshotFile, responder,
};
use raftexample::codec;
use raftexample::error::RequestError;
use raftexample::membership::{Members, SnapshotData, SnapshotMembers};
use raftexample::raft_node::{Input, NodeConfig};
use raftexample::storage::snapshotter::{Received, Snapshotter};
use raftexample::storage::wal::SnapshotId;
use raftexample::transport::{Inbound, InboundBody, PEER_BODY_BYTES};
use tokio::sync::oneshot;

use crate::support::memory::*;

/// A stranger's header, correct in every field.
fn stranger(member: &Member, id: u64) -> PeerHeader {
    PeerHeader {
        cluster_id: member.admission.cluster_id(),
        from: id,
        incarnation: 900 + id,
        url: url(id),
        moved: 0,
        to: member.id,
        to_incarnation: member.config.incarnation,
    }
}

/// Everything that an invalid message must not change: term, leader, commit, applied, members, and
/// the log on disk.
fn facts(member: &Member) -> String {
    let wal = member.wal();
    let last = wal.entries.last().map(|entry| (entry.index, entry.term));
    format!("{:?} {last:?} {:?}", member.status(), wal.hard_state)
}

fn message(kind: MessageType, from: u64, member: &Member) -> Message {
    let mut message =
        Message { from, to: member.id, term: member.status().term, ..Message::default() };
    message.set_msg_type(kind);
    message
}

fn last(member: &Member) -> (u64, u64) {
    let entries = member.wal().entries;
    let last = entries.last().unwrap();
    (last.index, last.term)
}

fn request(data: &[u8]) -> Entry {
    let id = RequestId { member: 3, boot: 1003, counter: 77 };
    Entry {
        data: data.to_vec().into(),
        context: Bytes::copy_from_slice(&id.to_bytes()),
        ..Entry::default()
    }
}

type Forge = fn(&Member, Message) -> Message;

/// Messages in the name of member 3, each made impossible by one change. In a proposal that a
/// follower forwards, raft's own term is unset and the leader's stands beside it.
fn proposed(mut message: Message) -> Message {
    (message.term, message.log_term) = (0, message.term);
    message
}

#[rustfmt::skip]
const FORGED: &[(&str, MessageType, Forge)] = {
    use MessageType::*;
    &[
        ("a heartbeat beyond the log", MsgHeartbeat, |member, mut m| { m.commit = last(member).0 + 1000; m }),
        ("a heartbeat of the last term", MsgHeartbeat, |_, mut m| { m.term = u64::MAX; m }),
        ("a term far away", MsgHeartbeat, |_, mut m| { m.term += (1 << 32) + 1; m }),
        ("a heartbeat with a wrong context", MsgHeartbeat, |_, mut m| { m.context = vec![1; 5].into(); m }),
        ("another receiver", MsgHeartbeat, |_, mut m| { m.to = 77; m.term += 1; m }),
        ("another sender", MsgHeartbeat, |_, mut m| { m.from = 9; m.term += 1; m }),
        ("no sender", MsgHeartbeat, |_, mut m| { m.from = 0; m.term += 1; m }),
        ("from itself", MsgHeartbeat, |member, mut m| { m.from = member.id; m.term += 1; m }),
        ("an append of the last index", MsgAppend, |_, mut m| { m.index = u64::MAX - 1; m.entries = vec![entry(u64::MAX, 1, vec![])].into(); m }),
        ("an append with a gap", MsgAppend, |member, mut m| { let (i, t) = last(member); (m.index, m.log_term, m.term) = (i, t, t + 1); m.entries = vec![entry(i + 1, t, vec![]), entry(i + 9, t, vec![])].into(); m }),
        ("an append whose terms fall", MsgAppend, |member, mut m| { let (i, t) = last(member); (m.index, m.log_term, m.term) = (i, t, t + 2); m.entries = vec![entry(i + 1, t + 1, vec![]), entry(i + 2, t, vec![])].into(); m }),
        ("an entry of a later term than its message", MsgAppend, |member, mut m| { let (i, t) = last(member); (m.index, m.log_term, m.term) = (i, t, t + 1); m.entries = vec![entry(i + 1, t + 2, vec![])].into(); m }),
        ("an append without a term", MsgAppend, |member, mut m| { let (i, t) = last(member); (m.index, m.log_term, m.term) = (i, t, 0); m.entries = vec![entry(i + 1, t, vec![])].into(); m }),
        ("an append behind nothing", MsgAppend, |_, mut m| { m.term += 1; (m.index, m.log_term, m.commit) = (1000, 0, 1000); m }),
        ("entries behind nothing", MsgAppend, |_, mut m| { m.term += 1; (m.index, m.log_term) = (1000, 0); m.entries = vec![entry(1001, 1, vec![])].into(); m }),
        ("entries without a term", MsgAppend, |_, mut m| { m.term += 1; m.commit = 500; m.entries = (1..=500).map(|i| entry(i, 0, vec![])).collect::<Vec<_>>().into(); m }),
        ("a snapshot without its file", MsgSnapshot, |_, mut m| { m.term += 1; m }),
        ("a forced vote for no reason", MsgRequestVote, |_, mut m| { m.term += 1; m.context = b"Campaign".to_vec().into(); m }),
        ("leadership from someone who has none", MsgTimeoutNow, |_, m| m),
        ("leadership of a later term", MsgTimeoutNow, |_, mut m| { m.term += 1; m }),
        ("an empty proposal", MsgPropose, |_, m| proposed(m)),
        ("a proposal to the leader of an earlier term", MsgPropose, |_, mut m| { m = proposed(m); m.log_term -= 1; m.entries = vec![request(b"x")].into(); m }),
        ("a proposal with a term", MsgPropose, |_, mut m| { m.log_term = m.term; m.entries = vec![request(b"x")].into(); m }),
        ("a proposal that is no request", MsgPropose, |_, mut m| { m = proposed(m); m.entries = vec![entry(0, 0, b"x".to_vec())].into(); m }),
        ("a change of members as a proposal", MsgPropose, |_, mut m| { m = proposed(m); let mut e = request(b"x"); e.set_entry_type(EntryType::EntryConfChange); m.entries = vec![e].into(); m }),
        ("a read with a term", MsgReadIndex, |_, mut m| { m.entries = vec![request(&[1; 24])].into(); m }),
        ("a read without a context", MsgReadIndex, |_, mut m| { m.term = 0; m }),
        ("a read with a short context", MsgReadIndex, |_, mut m| { m.term = 0; m.entries = vec![request(b"x")].into(); m }),
        ("an answer to no read", MsgReadIndexResp, |_, m| m),
        ("a rejection of the last index", MsgAppendResponse, |member, mut m| { m.reject = true; m.index = last(member).0; m.reject_hint = u64::MAX; m }),
        ("a rejection with an impossible index", MsgAppendResponse, |_, mut m| { m.reject = true; m.index = u64::MAX; m }),
        ("a wish for a snapshot", MsgAppendResponse, |_, mut m| { m.reject = true; m.request_snapshot = 5; m }),
        ("MsgHup", MsgHup, |_, m| m),
        ("MsgBeat", MsgBeat, |_, m| m),
        ("MsgUnreachable", MsgUnreachable, |_, m| m),
        ("MsgSnapStatus", MsgSnapStatus, |_, m| m),
        ("MsgCheckQuorum", MsgCheckQuorum, |_, m| m),
        ("MsgTransferLeader", MsgTransferLeader, |_, m| m),
    ]
};

/// A cluster with member 1 as leader and one undelivered entry.
fn cluster() -> Network {
    let mut network = Network::new(3, |_| {});
    assert!(network.put(1, "key", "value").is_ok());
    network.settle();
    network
}

#[test]
fn a_forged_message_changes_nothing() {
    let mut network = cluster();
    for to in [1, 2] {
        for (what, kind, forge) in FORGED {
            let member = network.member(to);
            let before = facts(member);
            let forged = forge(member, message(*kind, 3, member));
            let inbound = network.member(3).batch(to, vec![forged]);
            let member = network.member(to);
            member.turn([Input::Inbound(inbound)]).unwrap();
            assert_eq!(facts(member), before, "{what}, at member {to}");
            assert!(member.logged("dropping") || member.logged("our log ends"), "{what}");
        }
    }
    assert!(network.put(1, "key", "later").is_ok(), "the cluster lives");
}

/// An acknowledgement of entries that were never sent would commit entries that no member has.
#[test]
fn an_acknowledgement_beyond_the_log_is_dropped_at_the_leader() {
    let mut network = cluster();
    let leader = network.member(1);
    let mut forged = message(MessageType::MsgAppendResponse, 3, leader);
    forged.index = last(leader).0 + 5;
    let inbound = network.member(3).batch(1, vec![forged]);
    network.turn(1, [Input::Inbound(inbound)]);
    assert!(network.put(1, "key", "later").is_ok());
}

/// An unrequested reply, in the turn of the entries that it overtakes (raft-rs: become_leader
/// asserts that all entries are persisted).
#[test]
fn votes_that_come_before_they_were_asked_for_elect_nobody() {
    let mut network = cluster();
    let follower = network.member(2);
    let ((index, log_term), term) = (last(follower), follower.status().term);
    let mut append = message(MessageType::MsgAppend, 1, follower);
    (append.index, append.log_term) = (index, log_term);
    append.entries = vec![entry(index + 1, term, vec![])].into();
    let timeout_now = message(MessageType::MsgTimeoutNow, 1, follower);
    let mut vote = message(MessageType::MsgRequestVoteResponse, 1, follower);
    vote.term = term + 1;
    let inbound = network.member(1).batch(2, vec![append, timeout_now, vote]);
    network.turn(2, [Input::Inbound(inbound)]);
    assert_ne!(network.member(2).status().leader, 2);
}

/// A snapshot whose only member is the receiver wins it every vote before the snapshot is on disk
/// (raft-rs: become_leader asserts that all entries are persisted).
#[test]
fn leadership_transferred_in_a_snapshots_turn_is_not_taken() {
    let mut network = cluster();
    let header = network.member(3).header(2);
    let member = network.member(2);
    let members = Members {
        urls: [(2, url(2))].into(),
        incarnations: [(2, 102)].into(),
        ..Members::default()
    };
    let alone = SnapshotMembers { voters: vec![2], members, ..three_members(member) };
    let snapshot = snapshot_message_of(member, 100, alone.clone(), &alone);
    let mut timeout_now = message(MessageType::MsgTimeoutNow, 3, member);
    timeout_now.term = snapshot.term;
    let (answer, mut verdict) = oneshot::channel();
    let body = InboundBody::Snapshot { boot: 1, number: 1, message: snapshot, answer };
    let hand_over = batch(header.clone(), 1, 1, vec![timeout_now]);
    member.turn([Input::Inbound(Inbound::new(header, body)), Input::Inbound(hand_over)]).unwrap();
    assert_eq!(verdict.try_recv().unwrap(), Ok(()));
    assert_eq!(member.status().applied, 100, "the snapshot itself is taken");
    assert_eq!(member.status().leader, 3);
}

/// An entry that does not fit into a peer request can never be sent, and all later ones would wait
/// for ever.
#[test]
fn a_proposal_that_no_append_can_hold_is_dropped() {
    let mut network = cluster();
    let (header, boot) = (network.member(3).header(1), network.member(3).config.boot);
    let leader = network.member(1);
    let before = facts(leader);
    let mut proposal = message(MessageType::MsgPropose, 3, leader);
    proposal.term = 0;
    proposal.entries = vec![request(b"")].into();
    // It fills its own request to the last byte; an append of the same entry needs more bytes
    // around it.
    let around = 4 + proposal.compute_size() as usize;
    let room = PEER_BODY_BYTES as usize - around;
    proposal.mut_entries()[0].data = vec![0; room - 16].into();
    assert!(4 + u64::from(proposal.compute_size()) <= PEER_BODY_BYTES);
    leader.turn([Input::Inbound(batch(header, boot, 100, vec![proposal]))]).unwrap();
    assert_eq!(facts(leader), before);
    assert!(leader.logged("dropping"));
    assert!(network.put(1, "key", "later").is_ok(), "the cluster lives");
}

/// A stranger may lead a member that lags; it may not follow one.
#[test]
fn of_a_stranger_only_what_leaders_and_candidates_send_passes() {
    use MessageType::*;
    let mut network = cluster();
    for to in [1, 2] {
        let member = network.member(to);
        let header = stranger(member, 9);
        let before = facts(member);
        let kinds = [
            MsgPropose,
            MsgReadIndex,
            MsgReadIndexResp,
            MsgTimeoutNow,
            MsgAppendResponse,
            MsgHeartbeatResponse,
            MsgRequestVoteResponse,
            MsgRequestPreVoteResponse,
            MsgHup,
            MsgTransferLeader,
        ];
        for (number, kind) in kinds.into_iter().enumerate() {
            let mut forged = message(kind, 9, member);
            forged.term += 1;
            if matches!(kind, MsgPropose | MsgReadIndex) {
                (forged.term, forged.log_term) = (0, member.status().term);
                forged.entries = vec![request(&[1; 24])].into();
            }
            let inbound = batch(header.clone(), 1, number as u64 + 1, vec![forged]);
            member.turn([Input::Inbound(inbound)]).unwrap();
            assert_eq!(facts(member), before, "{kind:?} at member {to}");
        }
        // A forced vote, which a member may request during a transfer of leadership.
        let mut forged = message(MsgRequestVote, 9, member);
        forged.term += 1;
        forged.context = b"CampaignTransfer".to_vec().into();
        member.turn([Input::Inbound(batch(header, 1, 50, vec![forged]))]).unwrap();
        assert_eq!(facts(member), before, "a vote by force at member {to}");
    }
}

#[test]
fn a_stranger_that_leads_is_followed_without_loss() {
    let mut network = cluster();
    let member = network.member(2);
    let header = stranger(member, 9);
    let (index, log_term) = last(member);
    let term = member.status().term + 1;
    let mut append = message(MessageType::MsgAppend, 9, member);
    (append.term, append.index, append.log_term, append.commit) =
        (term, index, log_term, index + 1);
    append.entries = vec![entry(index + 1, term, put("stranger", "value"))].into();
    member.turn([Input::Inbound(batch(header.clone(), 1, 1, vec![append]))]).unwrap();
    assert_eq!(member.status().leader, 9);
    assert!(member.sent.lock().unwrap().peers.contains_key(&9), "it can be answered");
    let state = member.state();
    assert_eq!(state["key"].0, "value");
    assert_eq!(state["stranger"].0, "value");

    // It rewrites committed entries, so raft drops it.
    let mut rewrite = message(MessageType::MsgAppend, 9, member);
    (rewrite.index, rewrite.log_term, rewrite.commit) = (0, 0, index);
    rewrite.entries = (1..=index).map(|i| entry(i, term, vec![])).collect::<Vec<_>>().into();
    member.turn([Input::Inbound(batch(header, 1, 2, vec![rewrite]))]).unwrap();
    assert_eq!(member.state(), state);
    // After an election timeout of silence it is forgotten.
    for _ in 0..12 {
        member.tick().unwrap();
    }
    assert!(!member.sent.lock().unwrap().peers.contains_key(&9));
}

#[test]
fn no_more_than_eight_strangers_are_kept() {
    let mut network = cluster();
    let member = network.member(2);
    for id in 11..30 {
        let heartbeat = message(MessageType::MsgHeartbeat, id, member);
        let inbound = batch(stranger(member, id), 1, 1, vec![heartbeat]);
        member.turn([Input::Inbound(inbound)]).unwrap();
    }
    assert_eq!(member.sent.lock().unwrap().peers.len(), 2 + 8);
}

fn verdict(member: &mut Member, header: PeerHeader) -> Result<(), Refusal> {
    let (answer, mut verdict) = oneshot::channel();
    let mut heartbeat = message(MessageType::MsgHeartbeat, header.from, member);
    heartbeat.term += 1;
    let body = InboundBody::Messages {
        boot: 4711,
        number: 1,
        messages: vec![heartbeat],
        answer: Some(answer),
    };
    member.turn([Input::Inbound(Inbound::new(header, body))]).unwrap();
    verdict.try_recv().unwrap()
}

#[test]
fn another_cluster_receiver_incarnation_or_removed_is_refused() {
    let mut network = Network::new(4, |_| {});
    let mut removal = network.member(1).change(MemberRequest::Remove { id: 4 }).unwrap();
    network.deliver();
    network.settle();
    assert!(removal.is_ok(), "{:?}", removal.get());
    let right = network.member(3).header(2);
    let removed = PeerHeader { from: 4, incarnation: 104, url: url(4), ..right.clone() };
    let member = network.member(2);
    let before = facts(member);
    let wrong = [
        PeerHeader { cluster_id: right.cluster_id + 1, ..right.clone() },
        PeerHeader { cluster_id: 0, ..right.clone() },
        PeerHeader { to: 3, ..right.clone() },
        PeerHeader { to: 0, ..right.clone() },
        PeerHeader { to_incarnation: 103, ..right.clone() },
        PeerHeader { from: 0, ..right.clone() },
        PeerHeader { from: 2, incarnation: 102, ..right.clone() },
        PeerHeader { url: "nonsense".into(), ..right.clone() },
    ];
    for header in wrong {
        let refusal = verdict(member, header.clone());
        assert!(matches!(refusal, Err(Refusal::Mismatch(_))), "{header:?}: {refusal:?}");
    }
    for header in [
        PeerHeader { incarnation: 5, ..right.clone() },
        PeerHeader { from: 2, incarnation: 5, ..right.clone() },
    ] {
        let refusal = verdict(member, header.clone());
        assert!(matches!(refusal, Err(Refusal::OtherIncarnation(_))), "{header:?}: {refusal:?}");
    }
    let refusal = verdict(member, removed);
    assert!(matches!(refusal, Err(Refusal::Removed { id: 4, .. })), "{refusal:?}");
    assert_eq!(facts(member), before);
    assert_eq!(verdict(member, right), Ok(()));
}

#[test]
fn a_proposal_that_is_delivered_twice_is_applied_once() {
    let mut network = cluster();
    let (header, boot) = (network.member(3).header(1), network.member(3).config.boot);
    let leader = network.member(1);
    let mut proposal = proposed(message(MessageType::MsgPropose, 3, leader));
    proposal.entries = vec![request(&put("twice", "once"))].into();
    let index = last(leader).0;
    let twice =
        |number| Input::Inbound(batch(header.clone(), boot, number, vec![proposal.clone()]));
    leader.turn([twice(100), twice(100)]).unwrap();
    leader.turn([twice(100), twice(99)]).unwrap();
    assert_eq!(last(leader).0, index + 1, "appended once");

    // The sender restarts; messages of its earlier run arrive late.
    let again = |number| Input::Inbound(batch(header.clone(), 31, number, vec![proposal.clone()]));
    leader.turn([again(1)]).unwrap();
    assert_eq!(last(leader).0, index + 2, "its next run counts anew");
    leader.turn([twice(100)]).unwrap();
    assert_eq!(last(leader).0, index + 2, "a batch of the earlier run comes once more");
    leader.turn([twice(101), twice(101)]).unwrap();
    assert_eq!(last(leader).0, index + 3, "a batch of the earlier run is late");
    leader.turn([again(2)]).unwrap();
    assert_eq!(last(leader).0, index + 4, "the later run is not shut out by it");
}

/// The filter of batches does not outlive the process; a proposal names the term it was meant for.
#[test]
fn a_proposal_repeated_after_a_reelection_is_applied_once() {
    let mut network = cluster();
    let (header, boot) = (network.member(3).header(1), network.member(3).config.boot);
    let mut answer = network.member(3).put("twice", "once").unwrap();
    let sent = network.member(3).take_messages();
    let deliver = |network: &mut Network| {
        let inbound = batch(header.clone(), boot, 1000, sent.clone());
        network.turn(1, [Input::Inbound(inbound)]);
        network.deliver();
    };
    deliver(&mut network);
    assert!(answer.is_ok(), "{:?}", answer.get());
    let config = NodeConfig { boot: 31, ..network.member(1).config.clone() };
    let disk = network.crash(1, Survives::Nothing);
    network.start(&config, &disk).unwrap();
    network.give_up_leader(&[2, 3]);
    network.elect(1);
    let before = last(network.member(1));
    deliver(&mut network);
    assert_eq!(last(network.member(1)), before, "it was taken a second time");
}

fn three_members(member: &Member) -> SnapshotMembers {
    let members = Members {
        urls: (1..=3).map(|id| (id, url(id))).collect(),
        incarnations: (1..=3).map(|id| (id, 100 + id)).collect(),
        ..Members::default()
    };
    let cluster_id = member.admission.cluster_id();
    SnapshotMembers { cluster_id, voters: vec![1, 2, 3], learners: vec![], members }
}

fn snapshot_message(member: &Member, index: u64, change: impl FnOnce(&mut Snapshot)) -> Message {
    let members = three_members(member);
    let mut forged = snapshot_message_of(member, index, members.clone(), &members);
    change(forged.mut_snapshot());
    forged
}

/// A snapshot of a later term, with a local file that holds `in_file`.
fn snapshot_message_of(
    member: &Member,
    index: u64,
    members: SnapshotMembers,
    in_file: &SnapshotMembers,
) -> Message {
    let mut forged = message(MessageType::MsgSnapshot, 3, member);
    forged.term += 1;
    let term = forged.term;
    let snapshot = forged.mut_snapshot();
    let (id, meta) = (SnapshotId { index, term }, codec::encode(in_file));
    let SnapshotFile { length, checksum } =
        member.snapshotter.create(id, &meta, |out| out.write_all(&EMPTY_STATE)).unwrap();
    snapshot.mut_metadata().index = index;
    snapshot.mut_metadata().term = term;
    snapshot.mut_metadata().set_conf_state(members.conf_state());
    snapshot.data = codec::encode(&SnapshotData { members, length, checksum }).into();
    forged
}

/// Delivers a snapshot in the name of member 3. It must be refused, without effect and without a
/// file left.
fn check_that_a_snapshot_is_refused(to: u64, what: &str, forge: impl Fn(&Member) -> Message) {
    let mut network = cluster();
    let header = network.member(3).header(to);
    let member = network.member(to);
    let before = facts(member);
    let state = member.state();
    let forged = forge(member);
    let (answer, mut verdict) = oneshot::channel();
    let body = InboundBody::Snapshot { boot: 1, number: 1, message: forged, answer };
    member.turn([Input::Inbound(Inbound::new(header, body))]).unwrap();
    let refusal = verdict.try_recv().unwrap();
    assert!(matches!(refusal, Err(Refusal::NotReady(_))), "{what} at member {to}: {refusal:?}");
    assert_eq!(facts(member), before, "{what} at member {to}");
    let has_snapshot = |member: &Member| {
        member.disk.paths().iter().any(|path| path.extension().is_some_and(|e| e == "snap"))
    };
    assert!(!has_snapshot(member), "{what} at member {to}: its file is left");

    let config = NodeConfig { boot: 3000 + to, ..member.config.clone() };
    let disk = network.crash(to, Survives::Nothing);
    network.start(&config, &disk).unwrap();
    network.tick_until("there is a leader", |network| {
        network.members.values().all(|member| member.status().leader != 0)
    });
    network.settle();
    assert_eq!(network.member(to).state(), state, "{what} at member {to}, started again");
    assert!(network.put(to, "key", "later").is_ok(), "{what} at member {to}: the cluster lives");
}

/// raft would replace the log by it: raft checks only whether the index is committed already.
#[test]
fn a_snapshot_at_the_commit_index_with_another_term_is_refused() {
    for to in [1, 2] {
        check_that_a_snapshot_is_refused(to, "another term", |member| {
            snapshot_message(member, member.status().commit, |_| {})
        });
    }
}

/// It would be installed, and the next start would refuse it.
#[test]
fn a_snapshot_that_contradicts_its_file_is_refused() {
    type Change = fn(&mut SnapshotMembers);
    let files: &[(&str, Change)] = &[
        ("another cluster in the file", |m| m.cluster_id += 1),
        ("another URL in the file", |m| m.members.urls.extend([(3, url(7))])),
        ("one voter less in the file", |m| m.voters = vec![1, 2]),
        ("a removed member in the file", |m| m.members.removed.extend([(9, 4)])),
    ];
    for to in [1, 2] {
        for (what, change) in files {
            check_that_a_snapshot_is_refused(to, what, |member| {
                let members = three_members(member);
                let mut in_file = members.clone();
                change(&mut in_file);
                snapshot_message_of(member, 100, members, &in_file)
            });
        }
        check_that_a_snapshot_is_refused(to, "another cluster in both", |member| {
            let mut members = three_members(member);
            members.cluster_id += 1;
            snapshot_message_of(member, 100, members.clone(), &members)
        });
    }
}

/// The log names the existing file. Another file of that name, however valid, is not that one.
#[test]
fn a_received_snapshot_does_not_replace_one_of_its_name() {
    let mut network = Network::new(3, |config| config.snapshot_count = 5);
    for number in 0..10 {
        assert!(network.put(1, "key", &number.to_string()).is_ok());
    }
    network.settle();
    let member = network.member(2);
    let kept = *member.wal().marks.last().expect("a snapshot was made");
    let path = member.disk.paths().into_iter().rfind(|path| path.ends_with(name(kept))).unwrap();
    let (bytes, state) = (member.disk.contents(&path), member.state());

    let meta = codec::encode(&three_members(member));
    let forger = Snapshotter::new(Arc::new(MemVfs::default()), Path::new(DATA)).unwrap();
    let record = StateRecord { key: b"key", value: b"forged", index: kept.index, term: kept.term };
    let record = codec::encode(&record);
    let forged_state = [&EMPTY_STATE[..], &(record.len() as u32).to_le_bytes(), &record].concat();
    let file = forger.create(kept, &meta, |out| out.write_all(&forged_state)).unwrap();
    let mut forged = Vec::new();
    forger.open_raw(kept.index, kept.term).unwrap().1.read_to_end(&mut forged).unwrap();
    assert_ne!(forged, bytes);
    let mut receiver = member.snapshotter.receive(kept.index, kept.term, file).unwrap();
    receiver.write(&forged).unwrap();
    assert!(matches!(receiver.finish().unwrap(), Received::Refused(_)));
    assert!(member.disk.contents(&path) == bytes, "the file that the log names was replaced");

    // The same file again is accepted: a leader may not know that it arrived.
    let length = bytes.len() as u64;
    let same = SnapshotFile { length, checksum: crc32c::crc32c(&bytes) };
    let mut receiver = member.snapshotter.receive(kept.index, kept.term, same).unwrap();
    receiver.write(&bytes).unwrap();
    assert_eq!(receiver.finish().unwrap(), Received::Kept);
    assert!(member.disk.contents(&path) == bytes);

    let config = NodeConfig { boot: 3002, ..member.config.clone() };
    let disk = network.crash(2, Survives::Nothing);
    network.start(&config, &disk).unwrap();
    network.settle();
    assert_eq!(network.member(2).state(), state);
}

fn name(mark: SnapshotId) -> String {
    format!("{:016x}-{:016x}.snap", mark.term, mark.index)
}

/// A joiner that counts as a member before a leader reached it is at term 0. raft refuses a
/// pre-vote of lower priority with its own term, and panics if that term is 0.
#[test]
fn a_pre_vote_with_a_priority_does_not_stop_a_member_at_term_0() {
    let mut network = cluster();
    let mut addition = network.member(1).change(MemberRequest::Add { id: 4, url: url(4) }).unwrap();
    network.deliver();
    assert!(addition.is_ok(), "{:?}", addition.get());
    let joiner = NodeConfig { join: true, ..config(4, 4) };
    network.start(&joiner, &MemVfs::default()).unwrap();
    network.turn(4, [Input::Tick]);
    network.deliver_round();
    let header = network.member(3).header(4);
    let member = network.member(4);
    assert!(member.status().begun);
    assert_eq!((member.status().term, member.status().leader), (0, 0));
    let before = facts_of_a_joiner(member);
    for (number, (priority, deprecated)) in
        [(-1, 0), (i64::MIN, 0), (1, 0), (0, 1), (0, u64::MAX)].into_iter().enumerate()
    {
        let mut pre_vote = message(MessageType::MsgRequestPreVote, 3, member);
        pre_vote.term = 2;
        (pre_vote.priority, pre_vote.deprecated_priority) = (priority, deprecated);
        let inbound = batch(header.clone(), 5000, number as u64 + 1, vec![pre_vote]);
        member.turn([Input::Inbound(inbound)]).unwrap();
        assert!(member.take_messages().is_empty(), "{priority} and {deprecated} are answered");
        assert_eq!(facts_of_a_joiner(member), before, "{priority} and {deprecated}");
    }
    network.settle();
    let applied = network.member(1).status().applied;
    assert_eq!(network.member(4).status().applied, applied, "it follows the leader");
}

fn facts_of_a_joiner(member: &Member) -> String {
    format!("{:?} {:?}", member.status(), member.wal().hard_state)
}

#[test]
fn a_change_forwarded_by_a_stranger_is_unavailable() {
    let mut network = cluster();
    for to in [1, 2] {
        for change in [MemberRequest::Add { id: 9, url: url(9) }, MemberRequest::Remove { id: 3 }] {
            let member = network.member(to);
            let before = facts(member);
            let (responder, pending) = responder();
            let mut answer = Answer::new(pending);
            let body = InboundBody::ConfChange(change.clone(), responder);
            let inbound = Inbound::new(stranger(member, 9), body);
            member.turn([Input::Inbound(inbound)]).unwrap();
            let why = format!("{change:?} at member {to}: {:?}", answer.get());
            assert!(matches!(answer.get(), Some(Err(RequestError::Unavailable(_)))), "{why}");
            network.deliver();
            assert_eq!(facts(network.member(to)), before, "{why}");
        }
    }
    // The same request from a member is carried out.
    let (responder, pending) = responder();
    let mut answer = Answer::new(pending);
    let header = network.member(3).header(1);
    let change = MemberRequest::Add { id: 9, url: url(9) };
    let inbound = Inbound::new(header, InboundBody::ConfChange(change, responder));
    network.turn(1, [Input::Inbound(inbound)]);
    network.deliver();
    assert!(answer.is_ok(), "{:?}", answer.get());
}

#[test]
fn a_snapshot_with_impossible_members_is_dropped_and_removed() {
    type Change = fn(&mut Snapshot);
    let changes: &[(&str, Change)] = &[
        ("a voter that is a learner", |s| s.mut_metadata().mut_conf_state().learners = vec![3]),
        ("a voter twice", |s| s.mut_metadata().mut_conf_state().voters = vec![1, 2, 2, 3]),
        ("voter 0", |s| s.mut_metadata().mut_conf_state().voters = vec![0, 1, 2]),
        ("no voter", |s| s.mut_metadata().mut_conf_state().voters = vec![]),
        ("without us", |s| s.mut_metadata().mut_conf_state().voters = vec![1, 3]),
        ("joint", |s| s.mut_metadata().mut_conf_state().voters_outgoing = vec![1]),
        ("other members", |s| s.mut_metadata().mut_conf_state().voters = vec![1, 2]),
        ("members that cannot be read", |s| s.data = vec![7; 3].into()),
        ("a term to come", |s| s.mut_metadata().term += 1),
        ("no term", |s| s.mut_metadata().term = 0),
    ];
    for to in [1, 2] {
        for (what, change) in changes {
            let mut network = cluster();
            let header = network.member(3).header(to);
            let member = network.member(to);
            let before = facts(member);
            let forged = snapshot_message(member, 100, change);
            let (answer, _answer_rx) = oneshot::channel();
            let body = InboundBody::Snapshot { boot: 1, number: 1, message: forged, answer };
            member.turn([Input::Inbound(Inbound::new(header, body))]).unwrap();
            assert_eq!(facts(member), before, "{what} at member {to}");
            member.tick().unwrap();
            let files = member.disk.paths();
            // A file with another name than the message's is not known to belong to it.
            if !what.contains("term") {
                assert!(
                    !files.iter().any(|path| path.extension().is_some_and(|e| e == "snap")),
                    "{what}"
                );
            }
        }
    }
}
