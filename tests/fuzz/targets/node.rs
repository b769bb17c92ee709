//! What a peer can make a node do: valid messages, and the entries in them.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use protobuf::{Message as _, ProtobufEnum as _};
use raft::eraftpb::{ConfChange, ConfChangeType, Entry, EntryType, Message, MessageType};
use raftexample::channels::{Ack, MemberRequest, PeerReport, RequestId, SnapshotFile};
use raftexample::codec;
use raftexample::error::Error;
use raftexample::membership::{SnapshotData, SnapshotMembers, check_url};
use raftexample::raft_node::{Input, NodeConfig};
use raftexample::storage::snapshotter::{Received, Snapshotter};
use raftexample::storage::wal::SnapshotId;
use raftexample::transport::{Inbound, InboundBody};
use tokio::sync::oneshot;

use super::Choices;
use crate::support::memory::forging::*;
use crate::support::memory::*;

fn context(choices: &mut Choices<'_>, member: &Member) -> Bytes {
    match choices.below(5) {
        0 | 1 => Bytes::new(),
        2 => {
            let boot = choices.pick(&[member.config.boot, 1003, 7]);
            let member = choices.pick(&[1, 2, 3]);
            let counter = choices.below(4) as u64;
            Bytes::copy_from_slice(&RequestId { member, boot, counter }.to_bytes())
        }
        3 => Bytes::from_static(b"CampaignTransfer"),
        _ => Bytes::copy_from_slice(choices.bytes()),
    }
}

fn conf_change(choices: &mut Choices<'_>) -> ConfChange {
    let mut change = ConfChange::default();
    change.set_change_type(choices.pick(ConfChangeType::values()));
    change.node_id = match choices.below(4) {
        0 => choices.number(1),
        _ => choices.below(6) as u64,
    };
    if change.node_id == LEADER {
        change.node_id = 0;
    }
    let mut context = url(choices.pick(&[change.node_id % 100, 1, 9])).into_bytes();
    if choices.one_in(3) {
        choices.damage(&mut context);
    }
    change.context = context.into();
    change
}

fn payload(choices: &mut Choices<'_>, kind: EntryType) -> Vec<u8> {
    let mut payload = match (kind, choices.below(4)) {
        (_, 0) => choices.bytes().to_vec(),
        (EntryType::EntryNormal, _) => put(choices.pick(&["key", "other"]), "forged"),
        _ => conf_change(choices).write_to_bytes().expect("it can be encoded"),
    };
    if choices.one_in(4) {
        choices.damage(&mut payload);
    }
    payload
}

/// Entries after `index`, mostly with correct numbers.
fn entries(choices: &mut Choices<'_>, member: &Member, index: u64, term: u64) -> Vec<Entry> {
    let count = choices.below(4) as u64;
    let all = (1..=count).map(|place| {
        let kind = choices.pick(&[
            EntryType::EntryNormal,
            EntryType::EntryNormal,
            EntryType::EntryConfChange,
            EntryType::EntryConfChangeV2,
        ]);
        let mut entry = entry(index.wrapping_add(place), term, payload(choices, kind));
        entry.set_entry_type(kind);
        entry.context = context(choices, member);
        if choices.one_in(12) {
            entry.index = choices.number(entry.index);
            entry.term = choices.number(entry.term);
        }
        entry
    });
    all.collect()
}

fn message(choices: &mut Choices<'_>, member: &Member, from: u64) -> Message {
    let kind = choices.pick(MessageType::values());
    let mut message = forged(member, kind, from);
    message.commit = member.status().commit;
    message.term = match choices.below(6) {
        0 => 0,
        1 => message.term + 1,
        2 => choices.number(message.term),
        _ => message.term,
    };
    for field in [
        &mut message.index,
        &mut message.log_term,
        &mut message.commit,
        &mut message.reject_hint,
        &mut message.commit_term,
    ] {
        *field = choices.number(*field);
    }
    if choices.one_in(16) {
        message.request_snapshot = choices.number(1);
        message.priority = choices.number(0) as i64;
        message.from = choices.number(from);
        message.to = choices.number(message.to);
    }
    message.reject = choices.one_in(3);
    message.context = context(choices, member);
    let term = if choices.one_in(2) { message.term } else { message.log_term.max(1) };
    message.entries = entries(choices, member, message.index, term).into();
    message
}

/// A snapshot with a file: of this cluster's members, or nearly so.
fn snapshot(choices: &mut Choices<'_>, member: &Member, from: u64) -> Input {
    let status = member.status();
    let mut message = forged(member, MessageType::MsgSnapshot, from);
    message.term = status.term + choices.below(2) as u64;
    let cluster_id = member.header(from).cluster_id;
    let mut members = status.members.clone();
    if choices.one_in(3) {
        members.urls.retain(|id, _| *id == member.id || !choices.one_in(2));
    }
    let voters: Vec<u64> = members.urls.keys().copied().collect();
    let members = SnapshotMembers { cluster_id, voters, learners: vec![], members };
    let index = choices.number(status.commit + 1);
    let term = choices.number(message.term);
    let elsewhere = Snapshotter::new(Arc::new(MemVfs::default()), Path::new(DATA)).unwrap();
    let id = SnapshotId { index, term };
    let file =
        elsewhere.create(id, &codec::encode(&members), |out| out.write_all(&EMPTY_STATE)).unwrap();
    let mut bytes = Vec::new();
    elsewhere.open_raw(index, term).unwrap().1.read_to_end(&mut bytes).unwrap();
    // Like the transport: the node does not hear of a file that was not kept.
    let mut receiver = member.snapshotter.receive(index, term, file).unwrap();
    receiver.write(&bytes).unwrap();
    if receiver.finish().unwrap() != Received::Kept {
        return Input::Tick;
    }
    let SnapshotFile { length, checksum } = file;
    let data = SnapshotData { members: members.clone(), length, checksum };
    let metadata = message.mut_snapshot().mut_metadata();
    (metadata.index, metadata.term) = (index, term);
    metadata.set_conf_state(members.conf_state());
    if choices.one_in(6) {
        let state = metadata.mut_conf_state();
        state.learners.push(choices.below(4) as u64);
        state.voters.push(choices.below(4) as u64);
    }
    message.mut_snapshot().data = codec::encode(&data).into();
    let body = InboundBody::Snapshot {
        boot: 1,
        number: u64::from(choices.byte()),
        message,
        answer: oneshot::channel().0,
    };
    Input::Inbound(Inbound::new(header_of(member, from), body))
}

fn committed(member: &Member) -> Vec<Entry> {
    let commit = member.status().commit;
    member.wal().entries.into_iter().filter(|entry| entry.index <= commit).collect()
}

/// Messages in any order from members and a stranger, between ticks and requests. None panics a
/// member in any role or revokes a committed entry, and the next start finds the result.
pub fn messages(data: &[u8]) {
    thread_local! {
        static IMAGES: [MemVfs; 2] = [Role::Leader.image(), Role::Alone.image()];
    }
    let mut choices = Choices(data);
    let role = choices.pick(&[
        Role::Leader,
        Role::Follower,
        Role::Silent,
        Role::PreCandidate,
        Role::Candidate,
        Role::Alone,
    ]);
    let mut member = IMAGES
        .with(|[of_three, alone]| role.start(if role == Role::Alone { alone } else { of_three }));
    let mut answers = Vec::new();
    for number in 1000.. {
        if choices.is_empty() {
            break;
        }
        let (before, kept) = (member.status(), committed(&member));
        let mut has_snapshot = false;
        let inputs: Vec<Input> = (0..=choices.below(3))
            .map(|place| {
                let from = choices.pick(&[1, 1, 3, 3, 9]);
                match choices.below(10) {
                    0..5 => {
                        let messages = (0..=choices.below(3))
                            .map(|_| message(&mut choices, &member, from))
                            .collect();
                        from_peer(&member, from, 10 * number + place as u64, messages)
                    }
                    5 => {
                        has_snapshot = true;
                        snapshot(&mut choices, &member, from)
                    }
                    6 => {
                        let (proposal, answer) =
                            member.propose(put("mine", "value"), Ack::Committed);
                        answers.push(answer);
                        proposal
                    }
                    7 => Input::Report(match choices.below(2) {
                        0 => PeerReport::Unreachable(from),
                        _ => PeerReport::SnapshotStatus {
                            to: from,
                            index: choices.number(1),
                            arrived: choices.one_in(2),
                            damaged: choices.one_in(2),
                        },
                    }),
                    _ => Input::Tick,
                }
            })
            .collect();
        let change = choices.one_in(8).then(|| MemberRequest::Add { id: 7, url: url(7) });
        let turn = member
            .turn(inputs)
            .and_then(|()| member.read().map(drop))
            .and_then(|()| change.map_or(Ok(()), |change| member.change(change).map(drop)));
        match turn {
            Ok(()) => {}
            // A committed entry removed it.
            Err(Error::Removed) => return,
            Err(error) => panic!("{error}"),
        }
        let after = member.status();
        assert!(after.term >= before.term && after.commit >= before.commit);
        assert!(after.applied >= before.applied && after.applied <= after.commit);
        assert!(has_snapshot || committed(&member).starts_with(&kept));
    }
    member.node.stop().unwrap();
    let (status, state) = (member.status(), member.state_bytes());
    let config = NodeConfig { boot: 77, ..member.config.clone() };
    let disk = member.crash(Survives::Nothing);
    let mut member = Member::start(&config, &disk, &Transcript::default()).unwrap();
    assert_eq!(member.status().commit, status.commit);
    assert_eq!(member.status().members, status.members);
    assert!(member.state_bytes() == state);
}

/// A leader unknown to the receiver, which no change adds or removes.
const LEADER: u64 = 5000;

/// Arbitrary committed changes of members: all members that apply them agree on the result, and so
/// do their next starts.
pub fn conf_changes(data: &[u8]) {
    thread_local! {
        static IMAGE: MemVfs = Role::Leader.image();
    }
    let mut choices = Choices(data);
    let mut member = IMAGE.with(|image| Role::Follower.start(image));
    let mut outcomes = Vec::new();
    let entries: Vec<Entry> = {
        let (first, term) = {
            let last = forged(&member, MessageType::MsgAppend, 1);
            (last.index + 1, last.log_term)
        };
        let mut entries = Vec::new();
        while !choices.is_empty() && entries.len() < 12 {
            let kind = choices.pick(&[
                EntryType::EntryConfChange,
                EntryType::EntryConfChange,
                EntryType::EntryConfChangeV2,
            ]);
            let index = first + entries.len() as u64;
            let mut entry = entry(index, term, payload(&mut choices, kind));
            entry.set_entry_type(kind);
            entry.context = context(&mut choices, &member);
            entries.push(entry);
        }
        entries
    };
    // Split into messages in two ways.
    for at_once in [1, entries.len().max(1)] {
        let mut ended = false;
        for (number, entries) in entries.chunks(at_once).enumerate() {
            let mut append = forged(&member, MessageType::MsgAppend, LEADER);
            append.commit = append.index + entries.len() as u64;
            append.entries = entries.to_vec().into();
            match member
                .turn([from_peer(&member, LEADER, 1 + number as u64, vec![append]), Input::Tick])
            {
                Ok(()) => {}
                Err(Error::Removed) => {
                    ended = true;
                    break;
                }
                Err(error) => panic!("{error}"),
            }
        }
        let known = member.admission.members();
        assert!(!known.urls.is_empty() && !known.urls.contains_key(&0));
        assert!(known.urls.values().all(|url| check_url(url).is_ok()), "{known:?}");
        assert_eq!(BTreeSet::from_iter(known.urls.values()).len(), known.urls.len(), "{known:?}");
        assert!(known.removed.keys().all(|id| !known.urls.contains_key(id)), "{known:?}");
        if !ended {
            let (members, config) = (member.status().members, member.config.clone());
            assert_eq!(known, members);
            let disk = member.crash(Survives::Nothing);
            member = Member::start(&config, &disk, &Transcript::default()).unwrap();
            assert_eq!(member.status().members, members, "started again");
            for _ in 0..25 {
                member.tick().unwrap();
            }
        }
        outcomes.push((ended, if ended { None } else { Some(known) }));
        member = IMAGE.with(|image| Role::Follower.start(image));
    }
    assert_eq!(outcomes[0], outcomes[1], "the same entries, in other messages");
}
