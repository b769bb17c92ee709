//! Messages that nobody would send, by the hundred: none of them stops a member.

use bytes::Bytes;
use proptest::prelude::*;
use protobuf::ProtobufEnum as _;
use raft::eraftpb::{Entry, EntryType, Message, MessageType};
use raftexample::channels::{Ack, RequestId};
use raftexample::raft_node::Input;

use crate::harness::*;

/// A number near what the victim knows, or anywhere.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0..14_u64, 1 => 0..2000_u64, 1 => any::<u64>(), 1 => (1_u64 << 61)..(1 << 62)]
}

fn term() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0..5_u64, 1 => number()]
}

fn log_term() -> impl Strategy<Value = u64> {
    term()
}

fn context() -> impl Strategy<Value = Bytes> {
    let request = (1..4_u64, prop_oneof![Just(1002_u64), any::<u64>()], 0..3_u64).prop_map(
        |(member, boot, counter)| {
            Bytes::copy_from_slice(&RequestId { member, boot, counter }.to_bytes())
        },
    );
    prop_oneof![
        3 => Just(Bytes::new()),
        3 => request,
        1 => Just(Bytes::from_static(b"CampaignTransfer")),
        1 => proptest::collection::vec(any::<u8>(), 0..30).prop_map(Bytes::from),
    ]
}

prop_compose! {
    fn any_entry()(
        kind in 0..3_usize, index in number(), term in term(), data in context(), context in context(),
    ) -> Entry {
        let mut entry = Entry { index, term, data, context, ..Entry::default() };
        entry.set_entry_type([
            EntryType::EntryNormal, EntryType::EntryConfChange, EntryType::EntryConfChangeV2,
        ][kind]);
        entry
    }
}

prop_compose! {
    /// Often one that is right in all but one thing: entries in a row, a term near ours.
    fn any_message()(
        kind in 0..MessageType::values().len(),
        ids in (prop_oneof![8 => Just(1_u64), 1 => 0..5_u64], prop_oneof![9 => Just(2_u64), 1 => 0..5_u64]),
        term in log_term(),
        log in (log_term(), number(), number(), log_term()),
        hint in (any::<bool>(), number(), prop_oneof![9 => Just(0_u64), 1 => number()]),
        context in context(),
        entries in proptest::collection::vec(any_entry(), 0..4),
        is_contiguous in prop_oneof![4 => Just(true), 1 => Just(false)],
    ) -> Message {
        let mut message = Message { from: ids.0, to: ids.1, term, context, ..Message::default() };
        message.set_msg_type(MessageType::values()[kind]);
        (message.log_term, message.index, message.commit, message.commit_term) = log;
        (message.reject, message.reject_hint, message.request_snapshot) = hint;
        let mut entries = entries;
        if is_contiguous {
            for (entry, index) in entries.iter_mut().zip(message.index.saturating_add(1)..) {
                (entry.index, entry.term) = (index, message.log_term.max(1).max(entry.term.min(term)));
            }
        }
        message.entries = entries.into();
        message
    }
}

/// Member 2 of three after a few writes; everything it had is applied.
fn victim() -> MemVfs {
    let mut network = Network::new(3, |_| {});
    for number in 0..5 {
        network.put(1, "key", &number.to_string());
    }
    network.settle();
    network.crash(2, Survives::Everything).image()
}

fn start(image: &MemVfs, leads: bool) -> Member {
    let mut member = Member::start(&config(2, 3), &image.image(), &Transcript::default()).unwrap();
    if !leads {
        return member;
    }
    let mut number = 0;
    while member.status().leader != 2 {
        member.tick().unwrap();
        for request in member.take_messages() {
            let kind = match request.get_msg_type() {
                MessageType::MsgRequestPreVote => MessageType::MsgRequestPreVoteResponse,
                MessageType::MsgRequestVote => MessageType::MsgRequestVoteResponse,
                _ => continue,
            };
            let mut vote =
                Message { from: request.to, to: 2, term: request.term, ..Message::default() };
            vote.set_msg_type(kind);
            number += 1;
            member.turn([from_peer(&member, request.to, number, vec![vote])]).unwrap();
        }
    }
    member
}

fn from_peer(member: &Member, id: u64, number: u64, messages: Vec<Message>) -> Input {
    let to_us = {
        let gate = member.gate.read().unwrap();
        let header = gate.header(2);
        raftexample::channels::PeerHeader {
            from: id,
            incarnation: 100 + id,
            url: url(id),
            ..header
        }
    };
    Input::Inbound(batch(to_us, 1, number, messages))
}

/// `PROPTEST_CASES` asks for more.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(800)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases()) })]

    /// In each case some turns of some messages each, between requests of our own.
    #[test]
    fn no_message_stops_a_member(
        leads in any::<bool>(),
        turns in proptest::collection::vec(proptest::collection::vec(any_message(), 1..5), 1..6),
    ) {
        thread_local! {
            static IMAGE: MemVfs = victim();
        }
        let mut member = IMAGE.with(|image| start(image, leads));
        let mut answers = Vec::new();
        for (number, messages) in turns.into_iter().enumerate() {
            let commit = member.status().commit;
            let (proposal, answer) = member.propose(put("mine", "value"), Ack::Committed);
            answers.push(answer);
            let sender = messages[0].from;
            let input = from_peer(&member, sender, number as u64 + 100, messages);
            member.turn([proposal, input]).unwrap();
            member.read().unwrap();
            member.tick().unwrap();
            prop_assert!(member.status().commit >= commit);
        }
        // Whatever it took is on disk, and it starts from it.
        let config = member.config.clone();
        let commit = member.status().commit;
        member.node.stop().unwrap();
        let disk = member.crash(Survives::Nothing);
        let member = Member::start(&config, &disk, &Transcript::default()).unwrap();
        prop_assert_eq!(member.status().commit, commit);
    }
}
