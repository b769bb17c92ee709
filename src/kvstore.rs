//! The key-value store: a [`StateMachine`] with a hash map, the twin of the original's kvstore.go.
//!
//! It knows nothing of raft-rs or HTTP: bytes in, bytes out. [`state_machine`] shows the way of an
//! encoded `Command` to [`Keys::apply`](StateMachine::apply), on every member in the same order.
//!
//! # Adding a command
//! A new replicated command changes these places, in this order:
//! 1. `Command`: a variant, added at the end, because the encoding counts variants.
//! 2. [`Keys::apply`](StateMachine::apply): what it does to the map, and to the two gauges.
//! 3. [`Acknowledged`], which `apply` returns: a variant, if the proposer is to learn more than the entry's
//!    index and term.
//! 4. [`KvStore`]: a method beside [`propose`](KvStore::propose).
//! 5. A port: the route, and the response to it.
//! 6. `commands::inspect`: how `raftexample inspect` prints it. The compiler finds this place.
//! 7. Three versions, because members of the release before would skip the command: `wal::VERSION`,
//!    `snapshotter::VERSION` and the peer protocol's.
//!    [Adding a format version](crate::guide::contributing#adding-a-format-version) has the steps.
//!
//! # Snapshot
//! The records in ascending order of their keys, so that equal states give equal bytes. Each record
//! is a length and an encoded `Record`:
//!
//! ```text
//! ┌───────────────┬──────────────────────────────────────────────┐
//! │ length u32 LE │ key, value, index and term of its last write │ × records
//! └───────────────┴──────────────────────────────────────────────┘
//! ```
//! The records end with the bytes. The file around them has a length and a checksum.

use std::borrow::Borrow;
use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::io::{self, Read, Write};
use std::sync::{Arc, RwLock};

use bytes::Bytes;
use crc32c::Crc32cWriter;
use serde::{Deserialize, Serialize};
use slog::{Logger, error};
use tokio::time::Instant;

use crate::channels::{Ack, Acknowledged, Index, Requests, Term};
use crate::codec;
use crate::error::RequestError;
use crate::metrics::Metrics;
use crate::ports::listener::Port;
use crate::raft_node::state_machine::{self, CommitReader, Entry, Handle, StateMachine};
use crate::raft_node::{NodeConfig, RaftNodeHandle};

/// A replicated command: the payload of an entry.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Command<'a> {
    /// Set `key` to `value`.
    Put {
        /// The key's bytes.
        #[serde(borrow, with = "serde_bytes")]
        key: &'a [u8],
        /// The value's bytes.
        #[serde(borrow, with = "serde_bytes")]
        value: &'a [u8],
    },
}

/// One key in a snapshot.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record<'a> {
    #[serde(borrow, with = "serde_bytes")]
    key: &'a [u8],
    #[serde(borrow, with = "serde_bytes")]
    value: &'a [u8],
    index: Index,
    term: Term,
}

/// A key, its value, and the entry that wrote it. Compared and hashed by the key.
///
/// One allocation holds `index u64 LE | term u64 LE | length of the key u32 LE | key | value`. Separate
/// allocations would nearly double the memory of small records. Clones share the allocation, so a
/// snapshot copies one pointer per key.
#[derive(Clone)]
pub struct KeyValue(Arc<[u8]>);

impl KeyValue {
    /// The bytes before the key.
    const HEAD_BYTES: usize = 20;

    fn new(key: &[u8], value: &[u8], index: Index, term: Term) -> Self {
        let key_length = u32::try_from(key.len()).expect("entries are far smaller than 4 GiB");
        let (index, term) = (index.to_le_bytes(), term.to_le_bytes());
        Self([&index, &term, &key_length.to_le_bytes()[..], key, value].concat().into())
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0[at..at + N].try_into().expect("the slice has N bytes")
    }

    /// The bytes of key and value.
    fn bytes(&self) -> i64 {
        (self.0.len() - Self::HEAD_BYTES) as i64
    }

    /// The index of the entry that wrote the value.
    pub fn index(&self) -> Index {
        u64::from_le_bytes(self.array(0))
    }

    /// The term of the entry that wrote the value.
    pub fn term(&self) -> Term {
        u64::from_le_bytes(self.array(8))
    }

    /// The key's bytes.
    pub fn key(&self) -> &[u8] {
        &self.0[Self::HEAD_BYTES..self.value_start()]
    }

    /// The value's bytes.
    pub fn value(&self) -> &[u8] {
        &self.0[self.value_start()..]
    }

    fn value_start(&self) -> usize {
        Self::HEAD_BYTES + u32::from_le_bytes(self.array(16)) as usize
    }

    /// The value's bytes, without copying them.
    pub fn into_value(self) -> Bytes {
        struct Owner(KeyValue);
        impl AsRef<[u8]> for Owner {
            fn as_ref(&self) -> &[u8] {
                self.0.value()
            }
        }
        Bytes::from_owner(Owner(self))
    }
}

impl Borrow<[u8]> for KeyValue {
    fn borrow(&self) -> &[u8] {
        self.key()
    }
}

impl Hash for KeyValue {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl PartialEq for KeyValue {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for KeyValue {}

/// How current a read is: the values of `--read` and of the header `Raft-Read`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Consistency {
    /// With every acknowledged write
    ///
    /// On any member, before the read began (thesis, section 6.4).
    #[default]
    Linearizable,
    /// From this member's state, as the original does; it may be stale
    Local,
}

/// A handle on the store. The node stops when the last clone is dropped.
#[derive(Clone)]
pub struct KvStore {
    node: Handle<Keys>,
    map: Arc<Map>,
}

/// The replicated state: every key's last write.
pub struct Keys {
    map: Arc<Map>,
    metrics: Metrics,
    logger: Logger,
}

/// The map, with a lock of its own: only looking up and replacing a pointer happens under it. Copying
/// a large value, or reading a snapshot, does not keep lookups waiting.
type Map = RwLock<HashSet<KeyValue>>;

/// Why the lock is never poisoned.
const NO_PANIC: &str = "no thread panics while it holds the map";

impl StateMachine for Keys {
    type Output = Result<Acknowledged, RequestError>;

    fn apply(&mut self, Entry { index, term, data }: Entry<'_>) -> Self::Output {
        match codec::decode(data) {
            Ok(Command::Put { key, value }) => {
                let new = KeyValue::new(key, value, index, term);
                let new_bytes = new.bytes();
                // The guard is dropped at the end of this statement, before the old record is freed.
                let old = self.map.write().expect(NO_PANIC).replace(new);
                self.metrics.keys.inc_by(i64::from(old.is_none()));
                self.metrics.store_bytes.inc_by(new_bytes - old.map_or(0, |old| old.bytes()));
                Ok(Acknowledged::Applied { index, term })
            }
            // Every member skips the same bytes. Stopping here would stop all members, at every
            // start.
            Err(error) => {
                error!(self.logger, "skipping an entry that is no command";
                    "index" => index, "term" => term, "error" => %error);
                Err(RequestError::Invalid(format!("entry {index} is no command: {error}")))
            }
        }
    }

    fn snapshot(&self) -> impl FnOnce(&mut dyn Write) -> io::Result<()> + Send + 'static {
        let view = View::of(&self.map);
        move |file| view.write(file)
    }

    fn restore(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let map: HashSet<KeyValue> = read_records(from).collect::<io::Result<_>>()?;
        self.metrics.keys.set(map.len() as i64);
        self.metrics.store_bytes.set(map.iter().map(KeyValue::bytes).sum());
        *self.map.write().expect(NO_PANIC) = map;
        Ok(())
    }
}

impl KvStore {
    /// Starts a member: a node that listens for its peers on `port`, and its store. See
    /// [`state_machine::start`].
    pub fn start(
        config: NodeConfig,
        port: impl Into<Port>,
        logger: Logger,
    ) -> (Self, RaftNodeHandle) {
        let keys = Keys::new(&config, logger.clone());
        let map = keys.map.clone();
        let (node, running) = state_machine::start(config, port, keys, logger);
        (Self { node, map }, running)
    }

    /// Makes an empty store, and the reader that applies commitC to it. See [`state_machine::connect`].
    pub fn new(
        config: &NodeConfig,
        requests: Requests,
        logger: Logger,
    ) -> (Self, CommitReader<Keys>) {
        let keys = Keys::new(config, logger.clone());
        let map = keys.map.clone();
        let (node, reader) = state_machine::connect(config, keys, requests, logger);
        (Self { node, map }, reader)
    }

    /// Sets `key` to `value`, and returns once the write is acknowledged as `ack` says.
    ///
    /// # Errors
    /// As [`Handle::propose`].
    pub async fn propose(
        &self,
        key: &[u8],
        value: Bytes,
        ack: Ack,
        deadline: Instant,
    ) -> Result<Acknowledged, RequestError> {
        let data = codec::encode(&Command::Put { key, value: &value });
        // The request's wait must not hold a second copy of the value.
        drop(value);
        match ack {
            Ack::Committed => self.node.propose_until(data, deadline).await?,
            Ack::Proposed => {
                self.node.submit_until(data, deadline).await.map(|()| Acknowledged::Proposed)
            }
        }
    }

    /// Returns the record of `key`; `None` if the key was never written.
    ///
    /// # Errors
    /// [`RequestError::Unavailable`] if the state was not as current as requested in time.
    pub async fn lookup(
        &self,
        key: &[u8],
        consistency: Consistency,
        deadline: Instant,
    ) -> Result<Option<KeyValue>, RequestError> {
        match consistency {
            Consistency::Linearizable => self.node.wait_until_current(deadline).await?,
            Consistency::Local => self.node.wait_until_replayed(deadline).await?,
        }
        Ok(self.map.read().expect(NO_PANIC).get(key).cloned())
    }

    /// The state at this moment.
    pub fn view(&self) -> View {
        View::of(&self.map)
    }

    /// The handle on the node: waiting for a current state, and membership.
    pub fn node(&self) -> &Handle<Keys> {
        &self.node
    }
}

impl Keys {
    fn new(config: &NodeConfig, logger: Logger) -> Self {
        let metrics = config.metrics.clone();
        metrics.keys.set(0);
        metrics.store_bytes.set(0);
        Self { map: Arc::default(), metrics, logger }
    }
}

/// The state at one moment. The store changes independently of it.
pub struct View(Vec<KeyValue>);

impl View {
    fn of(map: &Map) -> Self {
        Self(map.read().expect(NO_PANIC).iter().cloned().collect())
    }

    /// The number of keys.
    pub fn keys(&self) -> usize {
        self.0.len()
    }

    /// The index and the term of the newest entry in the state; 0 and 0 if there is none. Equal on
    /// members with equal states.
    pub fn newest(&self) -> (Index, Term) {
        self.0.iter().map(|pair| (pair.index(), pair.term())).max().unwrap_or_default()
    }

    /// The CRC32C of the bytes that [`write`](Self::write) writes.
    pub fn checksum(self) -> u32 {
        let mut out = Crc32cWriter::new(io::sink());
        self.write(&mut out).expect("computing a checksum cannot fail");
        out.crc32c()
    }

    /// Writes the state as the module's documentation describes.
    pub fn write(self, file: &mut dyn Write) -> io::Result<()> {
        // Sorting compares the first 16 bytes of each key, which are adjacent in memory. Following the
        // pointer to the key in every comparison takes three times as long.
        let with_head = |pair: KeyValue| {
            let mut head = [0; 16];
            let length = pair.key().len().min(head.len());
            head[..length].copy_from_slice(&pair.key()[..length]);
            (u128::from_be_bytes(head), pair)
        };
        let mut ordered: Vec<_> = self.0.into_iter().map(with_head).collect();
        ordered.sort_unstable_by(|(a_head, a), (b_head, b)| {
            a_head.cmp(b_head).then_with(|| a.key().cmp(b.key()))
        });
        let mut record = Vec::new();
        for (_, pair) in ordered {
            let (key, value, index, term) = (pair.key(), pair.value(), pair.index(), pair.term());
            record.clear();
            codec::encode_into(&Record { key, value, index, term }, &mut record);
            let length = u32::try_from(record.len()).expect("records are at most 96 MiB");
            file.write_all(&length.to_le_bytes())?;
            file.write_all(&record)?;
        }
        Ok(())
    }
}

/// Reads the application bytes of a snapshot: its records, up to the first error.
pub(crate) fn read_records(mut reader: impl Read) -> impl Iterator<Item = io::Result<KeyValue>> {
    std::iter::from_fn(move || read_record(&mut reader).transpose())
}

/// Reads one record; `None` at the end of the bytes, which may be only before a length.
fn read_record(reader: &mut impl Read) -> io::Result<Option<KeyValue>> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let mut length = [0; 4];
    if reader.read(&mut length[..1])? == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut length[1..])?;
    let length = u32::from_le_bytes(length) as usize;
    if length > codec::DECODE_LIMIT_BYTES {
        return Err(invalid(format!("a record of {length} bytes is too long")));
    }
    // Memory for what is there, not for what the length claims.
    let mut record = Vec::new();
    if reader.take(length as u64).read_to_end(&mut record)? < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let Record { key, value, index, term } =
        codec::decode(&record).map_err(|error| invalid(error.to_string()))?;
    Ok(Some(KeyValue::new(key, value, index, term)))
}

/// The number of records in the application bytes of a snapshot, if they are records.
pub(crate) fn count_records(reader: impl Read) -> io::Result<u64> {
    read_records(reader).try_fold(0, |keys, record| record.map(|_| keys + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every member skips it, so nobody may be told that it was written.
    #[test]
    fn an_entry_that_is_no_command_is_not_acknowledged() {
        let logger = Logger::root(slog::Discard, slog::o!());
        let mut keys = Keys::new(&NodeConfig::default(), logger);
        let put = codec::encode(&Command::Put { key: b"k", value: b"v" });
        let mut apply = |data: &[u8]| keys.apply(Entry { index: 7, term: 2, data });
        assert_eq!(apply(&put), Ok(Acknowledged::Applied { index: 7, term: 2 }));
        for data in [&[][..], b"no command", &put[..put.len() - 1], &[&put[..], b"x"].concat()] {
            assert!(matches!(apply(data), Err(RequestError::Invalid(why)) if why.contains("7")));
        }
        assert_eq!(keys.map.read().expect(NO_PANIC).len(), 1);
    }

    /// The first 16 bytes alone would not order some of these.
    #[test]
    fn a_snapshot_is_in_the_order_of_whole_keys() {
        const ORDERED: [&[u8]; 9] = [
            b"",
            b"\0",
            b"a",
            b"a\0",
            b"a\0\0",
            b"sixteen bytes of",
            b"sixteen bytes of\0",
            b"sixteen bytes of a key",
            b"\xff",
        ];
        let view = ORDERED.iter().rev().map(|key| KeyValue::new(key, b"value", 5, 2)).collect();
        let mut file = Vec::new();
        View(view).write(&mut file).expect("writing to memory succeeds");
        let (mut rest, mut keys) = (&file[..], Vec::new());
        while let Some((length, after)) = rest.split_first_chunk() {
            let (record, after) = after.split_at(u32::from_le_bytes(*length) as usize);
            keys.push(codec::decode::<Record<'_>>(record).expect("a record").key);
            rest = after;
        }
        assert_eq!(keys, ORDERED);
        let logger = Logger::root(slog::Discard, slog::o!());
        let mut restored = Keys::new(&NodeConfig::default(), logger);
        restored.restore(&mut &file[..]).expect("a snapshot");
        assert_eq!(restored.map.read().expect(NO_PANIC).len(), ORDERED.len());
    }
}
