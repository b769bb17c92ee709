//! The wire format between two members, as pure functions.
//!
//! # Requests
//! | path | body | answered |
//! |---|---|---|
//! | `POST /raft` | a batch of messages, below | 204 |
//! | `POST /raft/stream` | frames with a batch each, see the module `stream` | 200, lines |
//! | `POST /raft/snapshot` | one framed `MsgSnapshot`, then the bytes of the file | 204 |
//! | `POST /raft/greeting` | a `Greeting` | 200, a `GreetingAnswer` |
//! | `POST /raft/members` | a `MemberRequest` | 200, a `Result<(), RequestError>` |
//! | `POST /raft/status` | nothing | 200, a `Status` |
//!
//! [`codec`](crate::codec) encodes the last three and their answers. Any other path is 404. Each body
//! except that of a stream has a `Content-Length`.
//!
//! # Headers
//! | name | value | where |
//! |---|---|---|
//! | `raft-protocol` | `2` | everywhere |
//! | `raft-cluster-id` | 16 hexadecimal digits; 0 while the sender does not know it | everywhere |
//! | `raft-from` | the sender's id, decimal, not 0 | everywhere |
//! | `raft-incarnation` | the sender's, 16 hexadecimal digits | everywhere |
//! | `raft-from-url` | the sender's peer URL, visible ASCII | everywhere |
//! | `raft-moved` | the index of the entry that moved the sender there, decimal | where one did |
//! | `raft-to` | the receiver's id, decimal; 0 in a greeting | everywhere |
//! | `raft-to-incarnation` | the receiver's, 16 hexadecimal digits; 0 if the sender knows none | everywhere |
//! | `raft-boot` | the sender's boot id, 16 hexadecimal digits | `/raft`, `…/stream`, `…/snapshot` |
//! | `raft-number` | rises with each batch, and with each snapshot, of one boot | as `raft-boot` |
//! | `raft-stream` | `1`: the next batches may be streamed | 204 |
//! | `raft-snapshot-length` | bytes in the file, decimal | `/raft/snapshot` |
//! | `raft-snapshot-checksum` | CRC32C of the file, 8 hexadecimal digits | `/raft/snapshot` |
//! | `raft-refusal` | `mismatch` or `other-incarnation`, `removed`, `not-ready` | 412, 410, 503 |
//! | `raft-removed-index` | the index of the removal, decimal | 410 |
//!
//! An answer names both ends with the same headers as a request. An answer other than 2xx has one line
//! of text as its body. 403 means that the certificate belongs to another member.
//!
//! # A batch
//! ```text
//! ┌──────────────┬────────────────────┬──────────────┬───
//! │ length u32 LE│ message, protobuf  │ length u32 LE│ …
//! └──────────────┴────────────────────┴──────────────┴───
//! ```
//! A batch holds 1 to [`BATCH_MESSAGES`] messages, and nothing after the last.
//!
//! The errors of this module are one line each. They name the header or the message that violates the
//! protocol.

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use protobuf::Message as _;
use raft::eraftpb::Message;

use crate::channels::{NodeId, PEER_URL_BYTES_MAX, PeerHeader, Refusal, SnapshotFile};

/// The version of this protocol. It rises with every change of a request or of the meaning of an
/// entry, because members of different versions would apply entries differently. A sender of another
/// version is answered 400.
const PROTOCOL: &str = "4";

/// The most messages in one batch. An empty message has a few bytes here and hundreds in memory.
pub(super) const BATCH_MESSAGES: usize = 65_536;

/// The length of the field before each message in bytes.
pub(super) const LENGTH_BYTES: usize = 4;

const PROTOCOL_HEADER: HeaderName = HeaderName::from_static("raft-protocol");
const CLUSTER_ID: HeaderName = HeaderName::from_static("raft-cluster-id");
const FROM: HeaderName = HeaderName::from_static("raft-from");
const INCARNATION: HeaderName = HeaderName::from_static("raft-incarnation");
const FROM_URL: HeaderName = HeaderName::from_static("raft-from-url");
const MOVED: HeaderName = HeaderName::from_static("raft-moved");
const TO: HeaderName = HeaderName::from_static("raft-to");
const TO_INCARNATION: HeaderName = HeaderName::from_static("raft-to-incarnation");
const BOOT: HeaderName = HeaderName::from_static("raft-boot");
const NUMBER: HeaderName = HeaderName::from_static("raft-number");
const STREAM: HeaderName = HeaderName::from_static("raft-stream");
const SNAPSHOT_LENGTH: HeaderName = HeaderName::from_static("raft-snapshot-length");
const SNAPSHOT_CHECKSUM: HeaderName = HeaderName::from_static("raft-snapshot-checksum");
const REFUSAL: HeaderName = HeaderName::from_static("raft-refusal");
const REMOVED_INDEX: HeaderName = HeaderName::from_static("raft-removed-index");

/// The position of a batch or snapshot among those of one run of its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sequence {
    pub(super) boot: u64,
    pub(super) number: u64,
}

/// Adds the headers that name the two ends.
pub(super) fn put_identity(headers: &mut HeaderMap, header: &PeerHeader) -> Result<(), String> {
    let url = HeaderValue::from_str(&header.url)
        .map_err(|_| format!("the URL {:?} is not visible ASCII", header.url))?;
    headers.insert(PROTOCOL_HEADER, HeaderValue::from_static(PROTOCOL));
    put(headers, CLUSTER_ID, &format!("{:016x}", header.cluster_id));
    put(headers, FROM, &header.from.to_string());
    put(headers, INCARNATION, &format!("{:016x}", header.incarnation));
    headers.insert(FROM_URL, url);
    if header.moved != 0 {
        put(headers, MOVED, &header.moved.to_string());
    }
    put(headers, TO, &header.to.to_string());
    put(headers, TO_INCARNATION, &format!("{:016x}", header.to_incarnation));
    Ok(())
}

/// Why headers name no member that this one can talk to.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoMember {
    /// The protocol version of a member of another release.
    #[error(
        "this member has version {PROTOCOL} of the peer protocol, the other one version {0}: run the same release on all members"
    )]
    OtherRelease(String),
    /// What is wrong with which header.
    #[error("{0}")]
    Malformed(String),
}

impl From<String> for NoMember {
    fn from(why: String) -> Self {
        Self::Malformed(why)
    }
}

/// Reads the headers that [`put_identity`] wrote.
pub(super) fn identity(headers: &HeaderMap) -> Result<PeerHeader, NoMember> {
    let protocol = text(headers, &PROTOCOL_HEADER)?;
    if protocol != PROTOCOL {
        return Err(NoMember::OtherRelease(protocol.to_owned()));
    }
    let header = PeerHeader {
        cluster_id: hexadecimal(headers, &CLUSTER_ID, 16)?,
        from: decimal(headers, &FROM)?,
        incarnation: hexadecimal(headers, &INCARNATION, 16)?,
        url: text(headers, &FROM_URL)?.to_owned(),
        moved: if headers.contains_key(MOVED) { decimal(headers, &MOVED)? } else { 0 },
        to: decimal(headers, &TO)?,
        to_incarnation: hexadecimal(headers, &TO_INCARNATION, 16)?,
    };
    if header.from == 0 {
        return Err(format!("{FROM} is 0, which is no member's id").into());
    }
    if header.url.is_empty() || header.url.len() > PEER_URL_BYTES_MAX {
        let length = header.url.len();
        return Err(format!("{FROM_URL} has {length} bytes, not 1 to {PEER_URL_BYTES_MAX}").into());
    }
    Ok(header)
}

/// Adds the headers that number a request.
pub(super) fn put_sequence(headers: &mut HeaderMap, sequence: Sequence) {
    put(headers, BOOT, &format!("{:016x}", sequence.boot));
    put(headers, NUMBER, &sequence.number.to_string());
}

/// Reads the headers that [`put_sequence`] wrote.
pub(super) fn sequence(headers: &HeaderMap) -> Result<Sequence, String> {
    Ok(Sequence { boot: hexadecimal(headers, &BOOT, 16)?, number: decimal(headers, &NUMBER)? })
}

/// Adds the header that allows the sender to stream.
pub(super) fn put_may_stream(headers: &mut HeaderMap) {
    headers.insert(STREAM, HeaderValue::from_static("1"));
}

/// True if the header of [`put_may_stream`] is present.
pub(super) fn may_stream(headers: &HeaderMap) -> bool {
    text(headers, &STREAM) == Ok("1")
}

/// Adds the headers that a snapshot's file is checked against.
pub(super) fn put_snapshot_file(headers: &mut HeaderMap, file: SnapshotFile) {
    put(headers, SNAPSHOT_LENGTH, &file.length.to_string());
    put(headers, SNAPSHOT_CHECKSUM, &format!("{:08x}", file.checksum));
}

/// Reads the headers that [`put_snapshot_file`] wrote.
pub(super) fn snapshot_file(headers: &HeaderMap) -> Result<SnapshotFile, String> {
    let checksum = hexadecimal(headers, &SNAPSHOT_CHECKSUM, 8)?;
    let checksum = u32::try_from(checksum).expect("8 hexadecimal digits fit");
    Ok(SnapshotFile { length: decimal(headers, &SNAPSHOT_LENGTH)?, checksum })
}

/// Returns the status of a refusal, and adds its kind to `headers`.
pub(super) fn put_refusal(headers: &mut HeaderMap, refusal: &Refusal) -> StatusCode {
    let (status, kind) = match refusal {
        Refusal::Mismatch(_) => (StatusCode::PRECONDITION_FAILED, "mismatch"),
        Refusal::OtherIncarnation(_) => (StatusCode::PRECONDITION_FAILED, "other-incarnation"),
        Refusal::Removed { index, .. } => {
            put(headers, REMOVED_INDEX, &index.to_string());
            (StatusCode::GONE, "removed")
        }
        Refusal::NotReady(_) => (StatusCode::SERVICE_UNAVAILABLE, "not-ready"),
    };
    headers.insert(REFUSAL, HeaderValue::from_static(kind));
    status
}

/// Reads a refusal of `sender`'s request; `line` is the body. `None` for any other answer.
pub(super) fn refusal(
    status: StatusCode,
    headers: &HeaderMap,
    sender: NodeId,
    line: &str,
) -> Option<Refusal> {
    // Status and kind must agree: a proxy's own 503 does not come from a member.
    match (status, text(headers, &REFUSAL).ok()?) {
        (StatusCode::PRECONDITION_FAILED, "mismatch") => Some(Refusal::Mismatch(line.to_owned())),
        (StatusCode::PRECONDITION_FAILED, "other-incarnation") => {
            Some(Refusal::OtherIncarnation(line.to_owned()))
        }
        (StatusCode::GONE, "removed") => {
            let index = decimal(headers, &REMOVED_INDEX).ok()?;
            Some(Refusal::Removed { id: sender, index })
        }
        (StatusCode::SERVICE_UNAVAILABLE, "not-ready") => Some(Refusal::NotReady(line.to_owned())),
        _ => None,
    }
}

/// The length of one message in a batch, in bytes.
pub(super) fn framed_length(message: &Message) -> usize {
    LENGTH_BYTES + message.compute_size() as usize
}

/// Appends one message to a batch. protobuf limits it to 2 GiB.
pub(super) fn put_message(batch: &mut Vec<u8>, message: &Message) {
    let start = batch.len();
    batch.extend_from_slice(&[0; LENGTH_BYTES]);
    message.write_to_vec(batch).expect("our own messages can be encoded");
    let length = u32::try_from(batch.len() - start - LENGTH_BYTES).expect("a message below 4 GiB");
    batch[start..start + LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
}

/// Reads all messages of a batch, or none. The result copies its bytes out of `batch`, so that a small
/// entry kept by raft does not keep the whole batch in memory. An error names the message, counted from
/// 0, and its offset in bytes.
pub(super) fn messages(batch: &[u8]) -> Result<Vec<Message>, String> {
    let mut messages = Vec::new();
    let mut rest = batch;
    while !rest.is_empty() {
        let at = || format!("message {} at offset {}", messages.len(), batch.len() - rest.len());
        if messages.len() == BATCH_MESSAGES {
            return Err(format!("more than {BATCH_MESSAGES} messages in a batch"));
        }
        let Some((length, after)) = rest.split_first_chunk::<LENGTH_BYTES>() else {
            return Err(format!("{}: its length is cut short", at()));
        };
        let length = u32::from_le_bytes(*length) as usize;
        let Some((encoded, after)) = after.split_at_checked(length) else {
            let left = after.len();
            return Err(format!("{}: {length} bytes, but {left} are left", at()));
        };
        let message = message(encoded).map_err(|error| format!("{}: {error}", at()))?;
        messages.push(message);
        rest = after;
    }
    if messages.is_empty() {
        return Err("a batch without messages".to_owned());
    }
    Ok(messages)
}

/// Reads the one message that fills `encoded`, and copies its bytes.
pub(super) fn message(encoded: &[u8]) -> Result<Message, String> {
    Message::parse_from_bytes(encoded).map_err(|error| format!("not a raft message: {error}"))
}

/// Adds a header whose value has only digits.
fn put(headers: &mut HeaderMap, name: HeaderName, digits: &str) {
    let value = HeaderValue::from_str(digits).expect("digits can stand in a header");
    headers.insert(name, value);
}

/// The value of a header that must be given once, in visible ASCII.
fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<&'a str, String> {
    let mut values = headers.get_all(name).iter();
    let value = values.next().ok_or_else(|| format!("no header {name}"))?;
    if values.next().is_some() {
        return Err(format!("more than one header {name}"));
    }
    value.to_str().map_err(|_| format!("{name} is not visible ASCII"))
}

/// A number of decimal digits only.
fn decimal(headers: &HeaderMap, name: &HeaderName) -> Result<u64, String> {
    let value = text(headers, name)?;
    // `parse` alone would accept a sign.
    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
    let number = value.parse().ok().filter(|_| digits);
    number.ok_or_else(|| format!("{name} is {value:?}, not a decimal number of 64 bits"))
}

/// A number of exactly `digits` hexadecimal digits.
fn hexadecimal(headers: &HeaderMap, name: &HeaderName, digits: usize) -> Result<u64, String> {
    let value = text(headers, name)?;
    let well_formed = value.len() == digits && value.bytes().all(|byte| byte.is_ascii_hexdigit());
    let number = u64::from_str_radix(value, 16).ok().filter(|_| well_formed);
    number.ok_or_else(|| format!("{name} is {value:?}, not {digits} hexadecimal digits"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message_at(index: u64, data: &[u8]) -> Message {
        let mut entry = raft::eraftpb::Entry { index, ..Default::default() };
        entry.data = data.to_vec().into();
        let mut message = Message { index, to: 2, from: 1, ..Default::default() };
        message.entries.push(entry);
        message
    }

    fn header() -> PeerHeader {
        let url = "http://127.0.0.1:9021".to_owned();
        PeerHeader {
            cluster_id: u64::MAX,
            from: 1,
            incarnation: 7,
            url,
            moved: 9,
            to: 2,
            to_incarnation: 8,
        }
    }

    #[test]
    fn identity_reads_what_put_identity_wrote() {
        let mut headers = HeaderMap::new();
        put_identity(&mut headers, &header()).expect("visible ASCII");
        assert_eq!(identity(&headers), Ok(header()));
        assert_eq!(headers["raft-cluster-id"], "ffffffffffffffff");
        assert_eq!(headers["raft-incarnation"], "0000000000000007");
    }

    #[test]
    fn each_header_that_is_missing_doubled_or_garbage_is_refused() {
        let mut good = HeaderMap::new();
        put_identity(&mut good, &header()).expect("visible ASCII");
        for name in [PROTOCOL_HEADER, CLUSTER_ID, FROM, INCARNATION, FROM_URL, TO, TO_INCARNATION] {
            let mut missing = good.clone();
            missing.remove(&name);
            assert!(identity(&missing).is_err(), "{name} missing");
            let mut doubled = good.clone();
            doubled.append(&name, good[&name].clone());
            assert!(identity(&doubled).is_err(), "{name} doubled");
            for garbage in ["", "+1", "-1", "0x1", "99999999999999999999", "\u{e4}", " "] {
                let mut headers = good.clone();
                headers.insert(&name, HeaderValue::from_bytes(garbage.as_bytes()).expect("bytes"));
                let url = name == FROM_URL && !garbage.is_empty() && garbage.is_ascii();
                assert!(url || identity(&headers).is_err(), "{name}: {garbage:?}");
            }
        }
        good.insert(FROM, HeaderValue::from_static("0"));
        assert!(identity(&good).is_err(), "0 is no member's id");
    }

    #[test]
    fn another_protocol_version_is_refused_with_both_versions() {
        let mut headers = HeaderMap::new();
        put_identity(&mut headers, &header()).expect("visible ASCII");
        headers.insert(PROTOCOL_HEADER, HeaderValue::from_static("7"));
        let why = identity(&headers).expect_err("another version").to_string();
        assert!(why.contains(&format!("version {PROTOCOL}")) && why.contains("version 7"), "{why}");
    }

    #[test]
    fn every_refusal_is_read_as_it_was_written() {
        for written in [
            Refusal::Mismatch("here: 1, there: 2".to_owned()),
            Refusal::OtherIncarnation("here: 1, there: 2".to_owned()),
            Refusal::Removed { id: 3, index: 77 },
            Refusal::NotReady("later".to_owned()),
        ] {
            let mut headers = HeaderMap::new();
            let status = put_refusal(&mut headers, &written);
            assert_eq!(refusal(status, &headers, 3, &written.to_string()), Some(written));
        }
        let proxy = refusal(StatusCode::SERVICE_UNAVAILABLE, &HeaderMap::new(), 3, "proxy");
        assert_eq!(proxy, None);
    }

    #[test]
    fn a_batch_is_read_as_it_was_written() {
        let written: Vec<Message> = (1..=3).map(|index| message_at(index, b"value")).collect();
        let mut batch = Vec::new();
        for message in &written {
            let before = batch.len();
            put_message(&mut batch, message);
            assert_eq!(batch.len() - before, framed_length(message));
        }
        assert_eq!(messages(&batch), Ok(written));
    }

    #[test]
    fn a_batch_cut_anywhere_but_between_two_messages_is_refused() {
        let mut batch = Vec::new();
        put_message(&mut batch, &message_at(1, b"one"));
        let first = batch.len();
        put_message(&mut batch, &message_at(2, b"two"));
        for cut in 0..batch.len() {
            assert_eq!(messages(&batch[..cut]).is_ok(), cut == first, "cut at {cut}");
        }
        batch.push(0);
        assert!(messages(&batch).is_err(), "trailing byte");
    }

    #[test]
    fn a_batch_of_too_many_messages_is_refused() {
        let empty = [0; LENGTH_BYTES];
        assert!(messages(&empty.repeat(BATCH_MESSAGES)).is_ok());
        assert!(messages(&empty.repeat(BATCH_MESSAGES + 1)).is_err());
    }

    /// RUSTSEC-2024-0437: deeply nested groups are an error here, not a crash.
    #[test]
    fn nested_groups_without_end_are_an_error() {
        let mut batch = 10_000_000_u32.to_le_bytes().to_vec();
        // Tag of an unknown field 100, "start of a group", in two bytes.
        batch.extend([0xa3, 0x06].repeat(5_000_000));
        assert!(messages(&batch).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let _ = messages(&bytes);
            let mut framed = u32::try_from(bytes.len()).expect("short").to_le_bytes().to_vec();
            framed.extend(&bytes);
            let _ = messages(&framed);
        }
    }
}
