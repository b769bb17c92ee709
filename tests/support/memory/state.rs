//! The private encodings of the store.

use std::collections::BTreeMap;

use raftexample::codec;
use raftexample::kvstore::{Outcome, Token};
use serde::{Deserialize, Serialize};

/// The store's private command.
#[derive(Serialize)]
pub enum Command<'a> {
    Put {
        #[serde(with = "serde_bytes")]
        key: &'a [u8],
        #[serde(with = "serde_bytes")]
        value: &'a [u8],
    },
}

/// The store's private snapshot record.
#[derive(Serialize, Deserialize)]
pub struct StateRecord<'a> {
    #[serde(borrow, with = "serde_bytes")]
    pub key: &'a [u8],
    #[serde(borrow, with = "serde_bytes")]
    pub value: &'a [u8],
    pub index: u64,
    pub term: u64,
}

/// The bytes of a state without keys and tokens: the length of its head, and index, term, floor and the number
/// of tokens.
pub const EMPTY_STATE: [u8; 36] = {
    let mut bytes = [0; 36];
    bytes[0] = 32;
    bytes
};

pub fn put(key: &str, value: &str) -> Vec<u8> {
    codec::encode(&Command::Put { key: key.as_bytes(), value: value.as_bytes() })
}

/// Each key's value, with the index and term of its last write.
pub type State = BTreeMap<String, (String, u64, u64)>;

/// Decodes the application bytes of a snapshot.
pub fn decode_state(bytes: &[u8]) -> State {
    let (head, rest) = bytes.split_first_chunk::<4>().unwrap();
    let mut rest = &rest[u32::from_le_bytes(*head) as usize..];
    let mut state = State::new();
    while let Some((length, more)) = rest.split_first_chunk::<4>() {
        let (record, more) = more.split_at(u32::from_le_bytes(*length) as usize);
        let record: StateRecord<'_> = codec::decode(record).unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        state.insert(text(record.key), (text(record.value), record.index, record.term));
        rest = more;
    }
    state
}

/// What stands before the records in a snapshot.
#[derive(Deserialize)]
pub struct StateHead {
    pub index: u64,
    pub term: u64,
    pub floor: u64,
    pub remembered: Vec<StateToken>,
}

/// A remembered retry token.
#[derive(Deserialize)]
pub struct StateToken {
    pub token: Token,
    pub fingerprint: [u8; 16],
    pub outcome: Outcome,
}

/// Decodes the head of the application bytes of a snapshot.
pub fn decode_head(bytes: &[u8]) -> StateHead {
    let (length, rest) = bytes.split_first_chunk::<4>().unwrap();
    codec::decode(&rest[..u32::from_le_bytes(*length) as usize]).unwrap()
}
