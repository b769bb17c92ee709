//! The store's own encodings, which are private to it.

use std::collections::BTreeMap;

use raftexample::codec;
use serde::{Deserialize, Serialize};

/// The store's own command, which is private to it.
#[derive(Serialize)]
pub enum Command<'a> {
    Put {
        #[serde(with = "serde_bytes")]
        key: &'a [u8],
        #[serde(with = "serde_bytes")]
        value: &'a [u8],
    },
}

/// The store's own record in a snapshot, which is private to it.
#[derive(Serialize, Deserialize)]
pub struct StateRecord<'a> {
    #[serde(borrow, with = "serde_bytes")]
    pub key: &'a [u8],
    #[serde(borrow, with = "serde_bytes")]
    pub value: &'a [u8],
    pub index: u64,
    pub term: u64,
}

pub fn put(key: &str, value: &str) -> Vec<u8> {
    codec::encode(&Command::Put { key: key.as_bytes(), value: value.as_bytes() })
}

/// Keys to values; and the place of each last write.
pub type State = BTreeMap<String, (String, u64, u64)>;

/// What a snapshot's application bytes say.
pub fn decode_state(bytes: &[u8]) -> State {
    let mut rest = bytes;
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
