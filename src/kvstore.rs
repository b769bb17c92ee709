//! The key-value store: a hash map that follows commitC, and the twin of the original's kvstore.go.
//!
//! It is one state machine behind [`raft_node`](crate::raft_node), and knows nothing of raft-rs or
//! of HTTP: bytes in, bytes out. A write goes out on proposeC as an encoded `Command` and comes
//! back on commitC, on every member, in the same order; only then is it applied and answered.
//!
//! ```text
//! propose ──▶ proposeC ──▶ (raft) ──▶ commitC ──▶ read_commits ──▶ apply ──▶ the responder
//! lookup  ──▶ readC    ──▶ (raft) ──▶ commitC ──▶ read_commits ────────────▶ the responder ──▶ the map
//! ```
//!
//! # Snapshot
//! The records in ascending order of their keys, so that the same state gives the same bytes on
//! every member. Each is a length and an encoded `Record`:
//!
//! ```text
//! ┌───────────────┬──────────────────────────────────────────────┐
//! │ length u32 LE │ key, value, index and term of its last write │ × records
//! └───────────────┴──────────────────────────────────────────────┘
//! ```
//! The end of the bytes is the end of the records: the file around them has a length and a checksum.

use std::borrow::Borrow;
use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::io::{self, Read, Write};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use slog::{Logger, error, info};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::channels::{
    Ack, Acknowledged, Commit, CommittedEntry, Index, Proposal, ReadRequest, SnapshotRequest,
    SnapshotRestore, Term, not_taken, responder,
};
use crate::codec;
use crate::error::{Error, RequestError, Result};
use crate::metrics::Metrics;

/// What an entry of the log asks the store to do.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Command<'a> {
    /// Set `key` to `value`.
    Put {
        #[serde(borrow, with = "serde_bytes")]
        key: &'a [u8],
        #[serde(borrow, with = "serde_bytes")]
        value: &'a [u8],
    },
}

/// Reads an entry's payload: the key and the value that it sets.
///
/// # Errors
/// It is no command of this store.
pub(crate) fn decode_put(data: &[u8]) -> std::result::Result<(&[u8], &[u8]), codec::DecodeError> {
    let Command::Put { key, value } = codec::decode(data)?;
    Ok((key, value))
}

/// One key of a snapshot.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record<'a> {
    #[serde(borrow, with = "serde_bytes")]
    key: &'a [u8],
    #[serde(borrow, with = "serde_bytes")]
    value: &'a [u8],
    index: Index,
    term: Term,
}

/// A key, its value, and the entry that wrote it; compared and looked up by the key.
///
/// It is one piece of memory, `index u64 LE | term u64 LE | length of the key u32 LE | key | value`:
/// with pieces of their own, and their places in the map, small ones take nearly twice as much. Clones
/// share it, so that a snapshot takes along one pointer per key.
#[derive(Clone)]
pub struct KeyValue(Arc<[u8]>);

impl KeyValue {
    /// The length of what comes before the key.
    const HEAD_BYTES: usize = 20;

    fn new(key: &[u8], value: &[u8], index: Index, term: Term) -> Self {
        let key_length = u32::try_from(key.len()).expect("an entry is far below 4 GiB");
        let mut bytes = Vec::with_capacity(Self::HEAD_BYTES + key.len() + value.len());
        bytes.extend_from_slice(&index.to_le_bytes());
        bytes.extend_from_slice(&term.to_le_bytes());
        bytes.extend_from_slice(&key_length.to_le_bytes());
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(value);
        Self(bytes.into())
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0[at..at + N].try_into().expect("as many bytes were taken")
    }

    /// The length of key and value.
    fn bytes(&self) -> i64 {
        (self.0.len() - Self::HEAD_BYTES) as i64
    }

    /// The index of the entry that wrote the value.
    pub fn index(&self) -> Index {
        u64::from_le_bytes(self.array(0))
    }

    /// The term of that entry.
    pub fn term(&self) -> Term {
        u64::from_le_bytes(self.array(8))
    }

    /// The key's bytes.
    pub fn key(&self) -> &[u8] {
        &self.0[Self::HEAD_BYTES..self.value_start()]
    }

    /// The bytes that were PUT.
    pub fn value(&self) -> &[u8] {
        &self.0[self.value_start()..]
    }

    fn value_start(&self) -> usize {
        Self::HEAD_BYTES + u32::from_le_bytes(self.array(16)) as usize
    }

    /// The bytes that were PUT, not copied.
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

/// How current a read has to be (flag `--read`, header `Raft-Read`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Consistency {
    /// Sees every write that was acknowledged anywhere before the read began (thesis 6.4).
    #[default]
    Linearizable,
    /// Sees this member's map as it is: it may be old.
    Local,
}

/// A handle on the store; clones share it. When the last one is dropped, proposeC is closed and the
/// node stops.
#[derive(Clone)]
pub struct KvStore {
    propose_tx: mpsc::Sender<Proposal>,
    read_tx: mpsc::Sender<ReadRequest>,
    replayed_rx: watch::Receiver<bool>,
    state: Arc<State>,
}

/// The end of the store that follows commitC.
pub struct CommitReader {
    state: Arc<State>,
    replayed_tx: watch::Sender<bool>,
    metrics: Metrics,
    logger: Logger,
}

#[derive(Default)]
struct State {
    /// Held for a lookup or for one entry, never across a wait.
    map: RwLock<HashSet<KeyValue>>,
}

/// The state at one moment, held while the store goes on.
pub struct View(Vec<KeyValue>);

impl View {
    /// How many keys there are.
    pub fn keys(&self) -> usize {
        self.0.len()
    }

    /// The index and the term of the newest entry in it; 0 and 0 if there is none. Members with the
    /// same entries have the same.
    pub fn newest(&self) -> (Index, Term) {
        self.0.iter().map(|pair| (pair.index(), pair.term())).max().unwrap_or_default()
    }

    /// The CRC32C of all that [`write`](Self::write) writes.
    pub fn checksum(self) -> u32 {
        struct Checksum(u32);
        impl Write for Checksum {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0 = crc32c::crc32c_append(self.0, bytes);
                Ok(bytes.len())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut checksum = Checksum(0);
        self.write(&mut checksum).expect("a checksum takes all");
        checksum.0
    }

    /// Writes a snapshot of it: the same bytes on every member with the same entries.
    ///
    /// # Errors
    /// What `file` says.
    pub fn write(self, file: &mut dyn Write) -> io::Result<()> {
        write_snapshot(self.0, file)
    }
}

impl State {
    fn view(&self) -> View {
        View(self.read().iter().cloned().collect())
    }

    fn read(&self) -> RwLockReadGuard<'_, HashSet<KeyValue>> {
        self.map.read().expect("no thread panics while it holds the map")
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashSet<KeyValue>> {
        self.map.write().expect("no thread panics while it holds the map")
    }
}

impl KvStore {
    /// Makes an empty store: its handle, and the end that has to be given commitC.
    pub fn new(
        propose_tx: mpsc::Sender<Proposal>,
        read_tx: mpsc::Sender<ReadRequest>,
        logger: Logger,
    ) -> (Self, CommitReader) {
        let state = Arc::new(State::default());
        let (replayed_tx, replayed_rx) = watch::channel(false);
        let metrics = Metrics::default();
        let reader = CommitReader { state: state.clone(), replayed_tx, metrics, logger };
        (Self { propose_tx, read_tx, replayed_rx, state }, reader)
    }

    /// Sets `key` to `value` through the log, and waits until that is acknowledged.
    ///
    /// # Errors
    /// [`RequestError::Unavailable`] if nothing was proposed, [`RequestError::Unknown`] if the write
    /// may still happen. It is never proposed a second time.
    pub async fn propose(
        &self,
        key: &[u8],
        value: Bytes,
        ack: Ack,
        deadline: Instant,
    ) -> std::result::Result<Acknowledged, RequestError> {
        let data = Bytes::from(codec::encode(&Command::Put { key, value: &value }));
        // Not held twice while the request waits.
        drop(value);
        let (responder, pending) = responder();
        self.propose_tx
            .try_send(Proposal { data, ack, responder })
            .map_err(|error| not_taken(&error))?;
        pending.wait_until(deadline).await
    }

    /// Looks `key` up; `None` if it was never written.
    ///
    /// # Errors
    /// [`RequestError::Unavailable`] if the read could not be made as current as asked for in time.
    pub async fn lookup(
        &self,
        key: &[u8],
        consistency: Consistency,
        deadline: Instant,
    ) -> std::result::Result<Option<KeyValue>, RequestError> {
        match consistency {
            Consistency::Linearizable => self.wait_until_current(deadline).await?,
            Consistency::Local => self.wait_until_replayed(deadline).await?,
        }
        Ok(self.state.read().get(key).cloned())
    }

    /// The state as it is now: see [`View`].
    pub fn view(&self) -> View {
        self.state.view()
    }

    /// Waits until the state holds every write that was acknowledged anywhere before.
    ///
    /// # Errors
    /// [`RequestError::Unavailable`] if that could not be made sure of in time.
    pub async fn wait_until_current(
        &self,
        deadline: Instant,
    ) -> std::result::Result<(), RequestError> {
        let (responder, pending) = responder();
        self.read_tx.try_send(ReadRequest { responder }).map_err(|error| not_taken(&error))?;
        pending.wait_until(deadline).await
    }

    /// Waits until the state holds what this member knew to be committed when it was last stopped.
    async fn wait_until_replayed(
        &self,
        deadline: Instant,
    ) -> std::result::Result<(), RequestError> {
        let mut replayed_rx = self.replayed_rx.clone();
        let replayed = tokio::time::timeout_at(deadline, replayed_rx.wait_for(|yes| *yes)).await;
        match replayed {
            Ok(Ok(_)) => Ok(()),
            _ => Err(RequestError::unavailable("this member is still replaying its log")),
        }
    }
}

impl CommitReader {
    /// Counts what is applied.
    #[must_use]
    pub fn with_metrics(mut self, metrics: Metrics) -> Self {
        self.metrics = metrics;
        self
    }

    /// Follows commitC in a task of its own until it is closed. The task runs where the requests
    /// are served: whoever waited for an entry is woken without another thread.
    ///
    /// Must be called within a tokio runtime of several threads.
    pub fn spawn(
        self,
        commit_rx: mpsc::UnboundedReceiver<Commit>,
    ) -> tokio::task::JoinHandle<Result<()>> {
        tokio::spawn(self.read_commits(commit_rx))
    }

    /// Follows commitC until it is closed.
    ///
    /// # Errors
    /// What [`handle`](Self::handle) returns: the process has to stop.
    async fn read_commits(mut self, mut commit_rx: mpsc::UnboundedReceiver<Commit>) -> Result<()> {
        while let Some(commit) = commit_rx.recv().await {
            match commit {
                // They take as long as the state is large.
                Commit::Restore(_) | Commit::Snapshot(_) => {
                    tokio::task::block_in_place(|| self.handle(commit))?;
                }
                Commit::Entries { .. } | Commit::Reads(_) | Commit::Replayed => {
                    self.handle(commit)?
                }
            }
        }
        Ok(())
    }

    /// Does what one item of commitC says.
    ///
    /// # Errors
    /// A snapshot that cannot be read: its checksum was right, so it was written by another program
    /// or the disk fails now.
    pub fn handle(&mut self, commit: Commit) -> Result<()> {
        match commit {
            Commit::Entries { entries, applied } => {
                let (began, count) = (Instant::now(), entries.len() as u64);
                for entry in entries {
                    self.apply(entry);
                }
                drop(applied);
                self.metrics.apply.observe(began.elapsed().as_secs_f64());
                self.metrics.proposals_applied.inc_by(count);
            }
            Commit::Reads(responders) => {
                for responder in responders {
                    responder.answer(Ok(()));
                }
            }
            Commit::Restore(snapshot) => self.recover_from_snapshot(snapshot)?,
            Commit::Snapshot(request) => self.get_snapshot(request),
            Commit::Replayed => {
                self.replayed_tx.send_replace(true);
            }
        }
        Ok(())
    }

    fn apply(&self, entry: CommittedEntry) {
        let CommittedEntry { index, term, data, responder } = entry;
        match codec::decode::<Command<'_>>(&data) {
            Ok(Command::Put { key, value }) => {
                let new = KeyValue::new(key, value, index, term);
                let new_bytes = new.bytes();
                // The guard is gone before the old one is freed.
                let old = self.state.write().replace(new);
                self.metrics.keys.inc_by(i64::from(old.is_none()));
                self.metrics.store_bytes.inc_by(new_bytes - old.map_or(0, |old| old.bytes()));
            }
            // Every member finds the same bytes and skips them alike. Stopping here would stop all
            // members, at each start, for ever.
            Err(error) => error!(self.logger, "skipping an entry that is no command";
                "index" => index, "term" => term, "error" => %error),
        }
        if let Some(responder) = responder {
            responder.answer(Ok(Acknowledged::Applied { index, term }));
        }
    }

    /// Writes a snapshot on a thread of its own, from handles taken here: entries go on being
    /// applied meanwhile.
    fn get_snapshot(&self, request: SnapshotRequest) {
        let mut view = Some(self.state.view());
        std::thread::spawn(move || {
            (request.save)(&mut |file| view.take().expect("it is saved once").write(file));
        });
    }

    fn recover_from_snapshot(&self, snapshot: SnapshotRestore) -> Result<()> {
        let SnapshotRestore { index, term, reader } = snapshot;
        info!(self.logger, "loading snapshot at term {} and index {}", term, index);
        let map = read_snapshot(reader).map_err(|error| {
            Error::Refused(format!(
                "cannot read the state in the snapshot at term {term} and index {index}: {error}"
            ))
        })?;
        self.metrics.keys.set(map.len() as i64);
        self.metrics.store_bytes.set(map.iter().map(KeyValue::bytes).sum());
        *self.state.write() = map;
        Ok(())
    }
}

/// Writes `view` as the module's documentation says, in the order of the keys.
fn write_snapshot(view: Vec<KeyValue>, file: &mut dyn Write) -> io::Result<()> {
    // The first bytes of the keys lie side by side; the keys lie anywhere in memory, and to look at
    // them in each comparison takes three times as long.
    let with_head = |pair: KeyValue| {
        let mut head = [0; 16];
        let length = pair.key().len().min(head.len());
        head[..length].copy_from_slice(&pair.key()[..length]);
        (u128::from_be_bytes(head), pair)
    };
    let mut ordered: Vec<_> = view.into_iter().map(with_head).collect();
    ordered.sort_unstable_by(|(a_head, a), (b_head, b)| {
        a_head.cmp(b_head).then_with(|| a.key().cmp(b.key()))
    });
    let mut record = Vec::new();
    for (_, pair) in ordered {
        let (key, value) = (pair.key(), pair.value());
        record.clear();
        codec::encode_into(
            &Record { key, value, index: pair.index(), term: pair.term() },
            &mut record,
        );
        let length = u32::try_from(record.len()).expect("a record is limited to 96 MiB");
        file.write_all(&length.to_le_bytes())?;
        file.write_all(&record)?;
    }
    Ok(())
}

/// Reads what [`write_snapshot`] wrote.
fn read_snapshot(reader: impl Read) -> io::Result<HashSet<KeyValue>> {
    let mut map = HashSet::new();
    read_records(reader, |pair| {
        map.insert(pair);
        Ok(())
    })?;
    Ok(map)
}

/// Reads the application bytes of a snapshot, key by key.
///
/// # Errors
/// They are no records, or cannot be read; what `take` returns.
pub(crate) fn read_records(
    mut reader: impl Read,
    mut take: impl FnMut(KeyValue) -> io::Result<()>,
) -> io::Result<()> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let mut length = [0; 4];
    loop {
        // The end of the file is an end only in front of a length.
        match reader.read(&mut length[..1])? {
            0 => return Ok(()),
            _ => reader.read_exact(&mut length[1..])?,
        }
        let length = u32::from_le_bytes(length) as usize;
        if length > codec::DECODE_LIMIT_BYTES {
            return Err(invalid(format!("a record of {length} bytes is too long")));
        }
        let mut record = vec![0; length];
        reader.read_exact(&mut record)?;
        let Record { key, value, index, term } =
            codec::decode(&record).map_err(|error| invalid(error.to_string()))?;
        take(KeyValue::new(key, value, index, term))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first bytes alone would leave some of these in any order.
    #[test]
    fn a_snapshot_is_in_the_order_of_the_keys_however_alike_they_begin() {
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
        write_snapshot(view, &mut file).expect("a vector takes all");
        let (mut rest, mut keys) = (&file[..], Vec::new());
        while let Some((length, behind)) = rest.split_first_chunk() {
            let (record, behind) = behind.split_at(u32::from_le_bytes(*length) as usize);
            keys.push(codec::decode::<Record<'_>>(record).expect("a record").key);
            rest = behind;
        }
        assert_eq!(keys, ORDERED);
        assert_eq!(read_snapshot(&file[..]).expect("a snapshot").len(), ORDERED.len());
    }
}
