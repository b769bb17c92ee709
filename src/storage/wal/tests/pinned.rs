//! The bytes of every encoding. They may change only together with a version: the module
//! documentation of [`wal`](super::super) states which.

use bytes::Bytes;
use raft::eraftpb::{Entry, EntryType, HardState};

use super::super::format::{self, Salt};
use super::super::{Head, Identity, Record, SnapshotId};
use crate::channels::{Greeting, GreetingAnswer, Matched, MemberRequest, RequestId, Vouched};
use crate::codec;
use crate::error::RequestError;
use crate::kvstore::{
    Command, Condition, KeyValue, Operation, Requirement, Token, Txn, read_state,
};
use crate::membership::{MemberChange, Members, SnapshotData, SnapshotMembers};
use crate::storage::snapshotter::write_snapshot;

const WAL: &str = "storage::wal::VERSION";
const SNAPSHOT: &str = "storage::snapshotter::VERSION and transport::wire::PROTOCOL";
const ENTRY: &str =
    "storage::wal::VERSION, storage::snapshotter::VERSION and transport::wire::PROTOCOL";
const PROTOCOL: &str = "transport::wire::PROTOCOL";

/// Fails if `encoded` differs from `pinned`, which is hexadecimal. Spaces in `pinned` are ignored.
fn assert_pinned(raise: &str, what: &str, encoded: &[u8], pinned: &str) {
    let found: String = encoded.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(
        found == pinned.replace(' ', ""),
        "the encoding of {what} changed: raise {raise}, then pin the new bytes: {found}"
    );
}

/// The bytes that `hex` stands for.
fn hex_bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<char> = hex.chars().filter(|digit| *digit != ' ').collect();
    let byte = |pair: &[char]| u8::from_str_radix(&String::from_iter(pair), 16);
    digits.chunks(2).map(|pair| byte(pair).expect("two digits")).collect()
}

fn encoded(record: &Record) -> Vec<u8> {
    let mut bytes = Vec::new();
    format::put(&mut bytes, record);
    bytes
}

fn entry(entry_type: EntryType) -> Entry {
    let (context, data) = (Bytes::from_static(b"c"), Bytes::from_static(b"dd"));
    Entry { index: 9, term: 2, entry_type, context, data, ..Entry::default() }
}

#[test]
fn the_records_of_the_log_are_pinned() {
    let identity = Identity { cluster_id: 5, member_id: 6, incarnation: 7, first_urls_hash: 8 };
    let id = SnapshotId { index: 3, term: 2 };
    let hard_state = HardState { term: 2, vote: 1, commit: 9, ..HardState::default() };
    let put_entry = |kind| encoded(&Record::Entry(entry(kind)));
    for (what, bytes, pinned) in [
        (
            "a head",
            encoded(&Record::Head(Head {
                segment: 2,
                previous_bytes: 3,
                last_index: 4,
                step_bytes: 5,
            })),
            "01 2c000000 726166742d77616c 04000000 0200000000000000 0300000000000000 \
             0400000000000000 0500000000000000",
        ),
        (
            "an identity",
            encoded(&Record::Identity(identity)),
            "02 20000000 0500000000000000 0600000000000000 0700000000000000 0800000000000000",
        ),
        (
            "an incarnation",
            encoded(&Record::Incarnation { member_id: 1, incarnation: 2 }),
            "03 10000000 0100000000000000 0200000000000000",
        ),
        ("a mark", encoded(&Record::Mark(id)), "04 10000000 0300000000000000 0200000000000000"),
        (
            "an install",
            encoded(&Record::Install(id)),
            "05 10000000 0300000000000000 0200000000000000",
        ),
        (
            "a normal entry",
            put_entry(EntryType::EntryNormal),
            "06 18000000 0900000000000000 0200000000000000 00 01000000 63 6464",
        ),
        (
            "a ConfChange entry",
            put_entry(EntryType::EntryConfChange),
            "06 18000000 0900000000000000 0200000000000000 01 01000000 63 6464",
        ),
        (
            "a ConfChangeV2 entry",
            put_entry(EntryType::EntryConfChangeV2),
            "06 18000000 0900000000000000 0200000000000000 02 01000000 63 6464",
        ),
        (
            "a hard state",
            encoded(&Record::HardState(hard_state)),
            "07 18000000 0200000000000000 0100000000000000 0900000000000000",
        ),
        ("a close", encoded(&Record::Close), "08 00000000"),
        ("a quarantine", encoded(&Record::Quarantine(3)), "09 08000000 0300000000000000"),
        ("a padding", encoded(&Record::Padding), "0a 0b000000 0000000000000000000000"),
    ] {
        assert_pinned(WAL, what, &bytes, pinned);
    }
    let mut frame = Vec::new();
    format::begin_frame(&mut frame);
    format::put(&mut frame, &Record::Close);
    format::seal_frame(&mut frame, 64, Salt { incarnation: 7, segment: 2 });
    let pinned = "05000000 2235e145 00000000 b263520e 0800000000 ffffffffffffffffffffff";
    assert_pinned(WAL, "a frame", &frame, pinned);
}

fn snapshot_members() -> SnapshotMembers {
    let members = Members {
        urls: [(1, "u".to_owned())].into(),
        removed: [(4, 9)].into(),
        removed_floor: (2, 5),
        learners: [3].into(),
        moved: [(1, 8)].into(),
        incarnations: [(1, 101)].into(),
    };
    SnapshotMembers { cluster_id: 7, voters: vec![1, 2], learners: vec![3], members }
}

const MEMBERS: &str = "0700000000000000 0200000000000000 0100000000000000 0200000000000000 \
     0100000000000000 0300000000000000 0100000000000000 0100000000000000 0100000000000000 75 \
     0100000000000000 0400000000000000 0900000000000000 0200000000000000 0500000000000000 \
     0100000000000000 0300000000000000 \
     0100000000000000 0100000000000000 0800000000000000 \
     0100000000000000 0100000000000000 6500000000000000";

#[test]
fn the_snapshot_file_and_its_contents_are_pinned() {
    let mut file = Vec::new();
    let id = SnapshotId { index: 3, term: 2 };
    write_snapshot(&mut file, id, b"meta", |body| body.write_all(b"state")).expect("written");
    let pinned = "72616674736e6170 03000000 04000000 0300000000000000 0200000000000000 6d657461 \
                  9002de71 7374617465 0500000000000000 bcc7c210";
    assert_pinned(SNAPSHOT, "a snapshot file", &file, pinned);
    let members = snapshot_members();
    assert_pinned(SNAPSHOT, "the members in a snapshot", &codec::encode(&members), MEMBERS);
    let data = codec::encode(&SnapshotData { members, length: 10, checksum: 11 });
    let pinned = format!("{MEMBERS} 0a00000000000000 0b000000");
    assert_pinned(PROTOCOL, "the data of a snapshot message", &data, &pinned);
}

#[test]
fn the_state_in_a_snapshot_is_pinned() {
    // "61000000" is the length of the head: index, term, floor, and one token with its fingerprint, and its
    // write's index, term, success and previous existence. "22000000" is the length of the record: key,
    // value, index and term.
    let pinned = hex_bytes(
        "61000000 0b00000000000000 0200000000000000 0300000000000000 0100000000000000 \
         0400000000000000 0500000000000000 06060606060606060606060606060606 \
         0a00000000000000 0200000000000000 01 01000000000000000000000000000000 \
         22000000 0100000000000000 6b 0100000000000000 76 0900000000000000 0200000000000000",
    );
    let parts =
        |pair: KeyValue| (pair.key().to_vec(), pair.value().to_vec(), pair.index(), pair.term());
    let (head, records) = read_state(&pinned[..]).expect("a head");
    let found: Vec<_> = records.map(|pair| parts(pair.expect("a record"))).collect();
    let remembered = format!("{head:?}");
    assert!(
        found == [(b"k".to_vec(), b"v".to_vec(), 9, 2)]
            && remembered
                == "Head { index: 11, term: 2, floor: 3, remembered: [Remembered { retry: Retry { token: Token { index: 4, random: 5 }, fingerprint: [6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6] }, outcome: Outcome { index: 10, term: 2, succeeded: true, existed: 1 } }] }",
        "the encoding of the state changed: raise {SNAPSHOT}: {head:?} {found:?}"
    );
}

#[test]
fn commands_and_changes_of_members_are_pinned() {
    let put = codec::encode(&Command::Put { key: b"k", value: b"v" });
    assert_pinned(ENTRY, "a put", &put, "00000000 0100000000000000 6b 0100000000000000 76");
    let requirements = [
        Requirement::Absent,
        Requirement::Exists,
        Requirement::WrittenAt(vec![5]),
        Requirement::NotWrittenAt(vec![]),
    ];
    let txn = Txn {
        conditions: requirements.map(|is| Condition { key: b"c", is }).to_vec(),
        then: vec![Operation::Put { key: b"k", value: b"v" }, Operation::Delete { key: b"d" }],
        otherwise: vec![Operation::Get { key: b"g" }],
    };
    let pinned = "01000000 00 0400000000000000 \
        0100000000000000 63 00000000 0100000000000000 63 01000000 \
        0100000000000000 63 02000000 0100000000000000 0500000000000000 \
        0100000000000000 63 03000000 0000000000000000 \
        0200000000000000 00000000 0100000000000000 6b 0100000000000000 76 \
        01000000 0100000000000000 64 \
        0100000000000000 02000000 0100000000000000 67";
    assert_pinned(ENTRY, "a transaction", &txn.encode(None), pinned);
    let pinned = "01000000 01 0300000000000000 0400000000000000 \
        80fdd267a037c9c5348777a5a4605168 \
        0000000000000000 0100000000000000 01000000 0100000000000000 64 0000000000000000";
    let delete = Txn::of(Operation::Delete { key: b"d" });
    let token = Token { index: 3, random: 4 };
    assert_pinned(ENTRY, "a transaction with a token", &delete.encode(Some(token)), pinned);
    let id = RequestId { member: 1, boot: 2, counter: 3 };
    let pinned = "0100000000000000 0200000000000000 0300000000000000";
    assert_pinned(ENTRY, "a request id", &id.to_bytes(), pinned);
    let url = || "u".to_owned();
    for (change, pinned) in [
        (MemberChange::AddLearner { id: 2, url: url() }, "1002 1802 220175"),
        (
            MemberChange::AddVoter { id: 2, url: url(), incarnation: 5 },
            "1802 2209 0500000000000000 75",
        ),
        (MemberChange::Promote { id: 2, incarnation: 5 }, "1802 2208 0500000000000000 0801"),
        (MemberChange::Move { id: 2, url: url() }, "1802 220175 0802"),
        (MemberChange::Remove { id: 2 }, "1001 1802"),
    ] {
        assert_pinned(ENTRY, &format!("{change:?}"), &change.encode(), pinned);
    }
}

#[test]
fn the_bodies_between_members_are_pinned() {
    let url = || "u".to_owned();
    let greeting = codec::encode(&Greeting { first_urls: vec![url()], begun: true });
    assert_pinned(PROTOCOL, "a greeting", &greeting, "0100000000000000 0100000000000000 75 01");
    let answer = codec::encode(&GreetingAnswer {
        begun: true,
        counts_as_member: false,
        acknowledged: Some(Matched { term: 2, index: 3 }),
        leader: Some(Vouched { id: 4, url: url(), incarnation: 5 }),
    });
    assert_pinned(
        PROTOCOL,
        "the answer to a greeting",
        &answer,
        "01 00 01 0200000000000000 0300000000000000 01 0400000000000000 0100000000000000 75 0500000000000000",
    );
    for (request, pinned) in [
        (MemberRequest::Add { id: 2, url: url() }, "00000000 0200000000000000 0100000000000000 75"),
        (MemberRequest::Remove { id: 2 }, "01000000 0200000000000000"),
        (
            MemberRequest::Move { id: 2, url: url() },
            "02000000 0200000000000000 0100000000000000 75",
        ),
        (MemberRequest::Lead { to: Some(2) }, "03000000 01 0200000000000000"),
    ] {
        assert_pinned(PROTOCOL, &format!("{request:?}"), &codec::encode(&request), pinned);
    }
    let why = || "w".to_owned();
    let answers = [
        (Ok(()), "00000000"),
        (Err(RequestError::Invalid(why())), "01000000 00000000 0100000000000000 77"),
        (Err(RequestError::Conflict(why())), "01000000 01000000 0100000000000000 77"),
        (Err(RequestError::Gone(why())), "01000000 02000000 0100000000000000 77"),
        (Err(RequestError::Unavailable(why())), "01000000 03000000 0100000000000000 77"),
        (Err(RequestError::Unknown(why())), "01000000 04000000 0100000000000000 77"),
        (Err(RequestError::Unprocessable(why())), "01000000 05000000 0100000000000000 77"),
    ];
    for (answer, pinned) in answers {
        let answer: Result<(), RequestError> = answer;
        assert_pinned(PROTOCOL, &format!("{answer:?}"), &codec::encode(&answer), pinned);
    }
}
