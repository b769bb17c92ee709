//! Thousands of messages that no correct member sends: none of them stops a member.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use bytes::Bytes;
use proptest::prelude::*;
use protobuf::{Message as _, ProtobufEnum as _};
use raft::eraftpb::{ConfChange, Entry, EntryType, Message, MessageType};
use raftexample::channels::{Ack, RequestId};
use raftexample::error::Error;
use raftexample::raft_node::Input;

use crate::support::memory::forging::*;
use crate::support::memory::*;

/// A number near what the victim knows, or any number.
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
    /// Often correct in all fields except one: consecutive entries, a term near the victim's.
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

/// `PROPTEST_CASES` sets another number.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(800)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases()) })]

    /// Each case has some turns with some messages, between the member's own requests.
    #[test]
    fn no_message_stops_a_member(
        leads in any::<bool>(),
        turns in proptest::collection::vec(proptest::collection::vec(any_message(), 1..5), 1..6),
    ) {
        let role = if leads { Role::Leader } else { Role::Silent };
        thread_local! {
            static IMAGE: MemVfs = Role::Leader.image();
        }
        let mut member = IMAGE.with(|image| role.start(image));
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
        // Everything it accepted is on disk, and the member starts from it.
        let config = member.config.clone();
        let commit = member.status().commit;
        member.node.stop().unwrap();
        let disk = member.crash(Survives::Nothing);
        let member = Member::start(&config, &disk, &Transcript::default()).unwrap();
        prop_assert_eq!(member.status().commit, commit);
    }
}

/// The fields that hold a number or are treated as one.
const FIELDS: [&str; 7] =
    ["index", "log_term", "commit", "reject_hint", "commit_term", "priority", "request_snapshot"];
const ENTRIES: [&str; 9] = [
    "no entry",
    "an empty entry",
    "a request",
    "a gap",
    "a term to come",
    "a change that is none",
    "a change",
    "a joint change",
    "the last index",
];
/// The leader, if there is one, another member, and a stranger.
const SENDERS: [u64; 3] = [1, 3, 9];

/// One message of all combinations, by its number.
struct Combination {
    kind: MessageType,
    term: usize,
    field: usize,
    value: usize,
    reject: bool,
    entries: usize,
    sender: u64,
}

impl Combination {
    const COUNT: usize = 19 * 5 * FIELDS.len() * 5 * 2 * ENTRIES.len() * SENDERS.len();

    fn new(number: usize) -> Self {
        let mut rest = number;
        let mut take = |count: usize| {
            let taken = rest % count;
            rest /= count;
            taken
        };
        Self {
            kind: MessageType::values()[take(19)],
            sender: SENDERS[take(SENDERS.len())],
            entries: take(ENTRIES.len()),
            field: take(FIELDS.len()),
            value: take(5),
            term: take(5),
            reject: take(2) == 1,
        }
    }

    fn describe(&self, role: Role, number: usize) -> String {
        let Self { kind, term, field, value, reject, entries, sender } = self;
        let own = ["0", "own", "own + 1", "own + 2^32", "the highest"];
        let values = ["0", "own", "own + 1", "half of the highest", "the highest"];
        format!(
            "combination {number}: {kind:?} to a {role:?} from {sender}, term {}, {} {}, reject {reject}, {}",
            own[*term], FIELDS[*field], values[*value], ENTRIES[*entries]
        )
    }

    fn message(&self, member: &Member) -> Message {
        let mut message = forged(member, self.kind, self.sender);
        let (status, last) = (member.status(), (message.index, message.log_term));
        message.commit = status.commit;
        message.reject = self.reject;
        message.term = match self.term {
            0 => 0,
            1 => status.term,
            2 => status.term + 1,
            3 => status.term + (1 << 32),
            _ => u64::MAX,
        };
        let value = |own: u64| match self.value {
            0 => 0,
            1 => own,
            2 => own + 1,
            3 => u64::MAX / 2,
            _ => u64::MAX,
        };
        match self.field {
            0 => message.index = value(last.0),
            1 => message.log_term = value(last.1),
            2 => message.commit = value(last.0),
            3 => message.reject_hint = value(last.0),
            4 => message.commit_term = value(last.1),
            5 => message.priority = value(1) as i64,
            _ => message.request_snapshot = value(last.0),
        }
        // The context of a read or of a forced vote; each kind of message gets both.
        message.context = match (self.kind, self.value % 3) {
            (_, 0) => Bytes::new(),
            (MessageType::MsgRequestVote | MessageType::MsgRequestPreVote, _) => {
                Bytes::from_static(b"CampaignTransfer")
            }
            _ => request_id(),
        };
        message.entries = self.entries(&message).into();
        message
    }

    fn entries(&self, message: &Message) -> Vec<Entry> {
        let (index, term) = (message.index.wrapping_add(1), message.log_term.max(1));
        let request = Entry {
            index,
            term,
            data: if self.kind == MessageType::MsgReadIndex {
                request_id()
            } else {
                put("key", "forged").into()
            },
            context: request_id(),
            ..Entry::default()
        };
        let change = |kind, data: Vec<u8>| {
            let mut entry = entry(index, term, data);
            entry.set_entry_type(kind);
            entry
        };
        match self.entries {
            0 => vec![],
            1 => vec![entry(index, term, vec![])],
            2 => vec![request],
            3 => vec![request, entry(index.wrapping_add(8), term, vec![])],
            4 => vec![Entry { term: message.term.wrapping_add(1), ..request }],
            5 => vec![change(EntryType::EntryConfChange, vec![0xff; 7])],
            6 => {
                let mut added = ConfChange { node_id: 9, ..ConfChange::default() };
                added.context = url(9).into_bytes().into();
                vec![change(EntryType::EntryConfChange, added.write_to_bytes().unwrap())]
            }
            7 => vec![change(EntryType::EntryConfChangeV2, vec![])],
            _ => vec![entry(u64::MAX, term, vec![])],
        }
    }
}

fn request_id() -> Bytes {
    Bytes::copy_from_slice(&RequestId { member: 3, boot: 1003, counter: 77 }.to_bytes())
}

/// Messages for one victim: enough for one to prepare the ground for another.
const MESSAGES_PER_VICTIM: usize = 12;
/// Only every n-th combination is tried. The stride shares no factor with the sizes of the
/// dimensions, so all field values meet. `RAFTEXAMPLE_EVERY=1` tries all.
const EVERY: usize = 11;

fn committed(member: &Member) -> Vec<Entry> {
    let commit = member.status().commit;
    member.wal().entries.into_iter().filter(|entry| entry.index <= commit).collect()
}

/// Sends the combinations to members in `role`. None may panic a member, revoke a committed entry,
/// or decrease an index or a term.
fn sweep(role: Role) {
    let image = role.image();
    let every = std::env::var("RAFTEXAMPLE_EVERY").map_or(EVERY, |every| every.parse().unwrap());
    let numbers: Vec<usize> = (0..Combination::COUNT).step_by(every).collect();
    for numbers in numbers.chunks(MESSAGES_PER_VICTIM) {
        let mut member = role.start(&image);
        for number in numbers {
            let combination = Combination::new(*number);
            let what = || combination.describe(role, *number);
            let (before, kept) = (member.status(), committed(&member));
            let message = combination.message(&member);
            let inbound =
                from_peer(&member, combination.sender, 1000 + *number as u64, vec![message]);
            // In one turn, so that raft's state after the message meets the tick before the disk
            // does.
            let turn = catch_unwind(AssertUnwindSafe(|| {
                member.turn([inbound, Input::Tick]).and_then(|()| member.tick())
            }));
            match turn {
                Ok(Ok(())) => {}
                // An entry removed it.
                Ok(Err(Error::Removed)) => break,
                Ok(Err(error)) => panic!("{}: {error}", what()),
                Err(panic) => {
                    eprintln!("{}", what());
                    resume_unwind(panic);
                }
            }
            let after = member.status();
            assert!(after.term >= before.term, "{}: {before:?} {after:?}", what());
            assert!(after.commit >= before.commit, "{}: {before:?} {after:?}", what());
            assert!(after.applied >= before.applied, "{}: {before:?} {after:?}", what());
            assert!(committed(&member).starts_with(&kept), "{}", what());
        }
    }
}

#[test]
fn no_combination_of_values_stops_a_leader() {
    sweep(Role::Leader);
}

#[test]
fn no_combination_of_values_stops_a_follower() {
    sweep(Role::Follower);
}

#[test]
fn no_combination_of_values_stops_a_pre_candidate() {
    sweep(Role::PreCandidate);
}

#[test]
fn no_combination_of_values_stops_a_candidate() {
    sweep(Role::Candidate);
}

#[test]
fn no_combination_of_values_stops_a_member_that_is_alone() {
    sweep(Role::Alone);
}
