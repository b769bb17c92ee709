//! The key-value store: a [`StateMachine`] with a hash map, the twin of the original's kvstore.go.
//!
//! It knows nothing of raft-rs or HTTP: bytes in, bytes out. [`state_machine`] shows the way of an
//! encoded `Command` to [`Keys::apply`](StateMachine::apply), on every member in the same order.
//!
//! | file | owns |
//! |---|---|
//! | `kvstore/command.rs` | what is replicated: a PUT, or a [`Txn`] |
//! | `kvstore/state.rs` | the state, and what a command does to it |
//! | `kvstore/record.rs` | [`KeyValue`]: one key with its value |
//! | `kvstore/tokens.rs` | retry tokens: why a write is carried out at most once |
//! | `kvstore/history.rs` | the last changes, for watchers |
//! | `kvstore/snapshot.rs` | the bytes of a snapshot |
//!
//! # Adding a command
//! Conditions, writes, removals and reads of single keys are a [`Txn`] and need no new command. A new one
//! changes these places, in this order:
//! 1. `Command`: a variant, added at the end, because the encoding counts variants.
//! 2. `State`: a method that plans what the command does, which [`Keys::apply`](StateMachine::apply) calls.
//! 3. [`Applied`], which `apply` returns: a field, if the proposer is to learn more.
//! 4. [`KvStore`]: a method beside [`transact`](KvStore::transact).
//! 5. A port: the route, and the response to it.
//! 6. `commands::inspect`: how `raftexample inspect` prints it. The compiler finds this place.
//! 7. Three versions, because members of the release before would skip the command: `wal::VERSION`,
//!    `snapshotter::VERSION` and the peer protocol's.
//!    [Adding a format version](crate::guide::contributing#adding-a-format-version) has the steps.
//! 8. The simulation: a client that sends it, and the model that checks the answers.

mod command;
mod history;
mod record;
mod snapshot;
mod state;
mod tokens;

use std::io::{self, Read, Write};
use std::sync::{Arc, RwLock, RwLockReadGuard};

use bytes::Bytes;
use slog::{Logger, error};
use tokio::sync::Notify;
use tokio::time::Instant;

pub(crate) use self::command::Command;
pub use self::command::{Condition, OPERATIONS_MAX, Operation, Requirement, Txn};
pub use self::history::{Change, Changes, Cursor};
pub use self::record::KeyValue;
pub use self::snapshot::View;
pub(crate) use self::snapshot::{count_records, read_state};
use self::state::{Records, State};
pub use self::tokens::{Outcome, REMEMBERED_MAX, Token};
use crate::channels::{Ack, Acknowledged, Index, Requests, Term};
use crate::codec;
use crate::error::RequestError;
use crate::metrics::Metrics;
use crate::ports::listener::Port;
use crate::raft_node::state_machine::{self, CommitReader, Entry, Handle, StateMachine};
use crate::raft_node::{NodeConfig, RaftNodeHandle};

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

/// What applying a command did.
#[derive(Clone, Debug)]
pub struct Applied {
    /// The outcome. With a retry token it is the same in every repetition.
    pub outcome: Outcome,
    /// What the `get` operations found, in their order.
    pub read: Vec<Option<KeyValue>>,
    /// True if an earlier entry with the same token did it.
    pub is_replay: bool,
}

impl Applied {
    fn new(outcome: Outcome) -> Self {
        Self { outcome, read: Vec::new(), is_replay: false }
    }
}

/// Some keys of one moment, in order.
#[derive(Clone, Debug)]
pub struct Page {
    /// The index of the last entry in the state at that moment.
    pub index: Index,
    /// The keys with their values.
    pub records: Vec<KeyValue>,
    /// True if there are more keys after the last one.
    pub has_more: bool,
}

/// A handle on the store. The node stops when the last clone is dropped.
#[derive(Clone)]
pub struct KvStore {
    node: Handle<Keys>,
    shared: Arc<Shared>,
}

/// The replicated state: every key's last write, and the retry tokens.
pub struct Keys {
    shared: Arc<Shared>,
    tokens_max: usize,
    metrics: Metrics,
    logger: Logger,
}

/// The state, with a lock of its own: only looking up and replacing pointers happens under it. Copying a
/// large value, or reading a snapshot, does not keep lookups waiting.
struct Shared {
    state: RwLock<State>,
    /// Notified after keys have changed.
    changed: Notify,
}

/// Why the lock is never poisoned.
const NO_PANIC: &str = "no thread panics while it holds the state";

impl Shared {
    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().expect(NO_PANIC)
    }
}

impl StateMachine for Keys {
    type Output = Result<Applied, RequestError>;

    fn apply(&mut self, Entry { index, term, data }: Entry<'_>) -> Self::Output {
        // Only this method changes the state, so what is planned under one lock holds under the next.
        let planned = match codec::decode(data) {
            Ok(Command::Put { key, value }) => return Ok(self.put(key, value, index, term)),
            Ok(Command::Txn { retry, txn }) if txn.fits() => {
                self.shared.state().plan_txn(&txn, retry, index, term)
            }
            Ok(Command::Txn { .. }) => Err(self.skip(index, term, "a transaction is too long")),
            Err(error) => Err(self.skip(index, term, &error.to_string())),
        };
        // The guard is dropped at the end of this statement, before replaced records are freed.
        let done = self.shared.state.write().expect(NO_PANIC).carry_out(index, term, planned);
        let (answer, replaced, changed) = done;
        drop(replaced);
        self.count();
        if changed {
            self.shared.changed.notify_one();
        }
        answer
    }

    fn snapshot(&self) -> impl FnOnce(&mut dyn Write) -> io::Result<()> + Send + 'static {
        let view = View::of(&self.shared.state());
        move |file| view.write(file)
    }

    fn restore(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let (head, records) = read_state(from)?;
        let records: Records = records.collect::<io::Result<_>>()?;
        let mut restored = State::restored(head, records, self.tokens_max)?;
        let mut state = self.shared.state.write().expect(NO_PANIC);
        restored.history.is_off = state.history.is_off;
        let old = std::mem::replace(&mut *state, restored);
        drop(state);
        drop(old);
        self.count();
        self.shared.changed.notify_one();
        Ok(())
    }
}

impl Keys {
    fn new(config: &NodeConfig, tokens_max: usize, logger: Logger) -> Self {
        let shared =
            Arc::new(Shared { state: RwLock::new(State::new(tokens_max)), changed: Notify::new() });
        let keys = Self { shared, tokens_max, metrics: config.metrics.clone(), logger };
        keys.count();
        keys
    }

    /// Writes one key: the usual command, in one step.
    fn put(&mut self, key: &[u8], value: &[u8], index: Index, term: Term) -> Applied {
        let record = KeyValue::new(key, value, index, term);
        let bytes = record.bytes() as i64;
        let old = self.shared.state.write().expect(NO_PANIC).put(record);
        self.metrics.keys.inc_by(i64::from(old.is_none()));
        self.metrics.store_bytes.inc_by(bytes - old.as_ref().map_or(0, |old| old.bytes() as i64));
        self.shared.changed.notify_one();
        let existed = u128::from(old.is_some());
        Applied::new(Outcome { index, term, succeeded: true, existed })
    }

    /// Every member skips the same bytes. Stopping would stop all members, at every start.
    fn skip(&self, index: Index, term: Term, why: &str) -> RequestError {
        error!(self.logger, "skipping an entry that is no command";
            "index" => index, "term" => term, "error" => why);
        RequestError::Invalid(format!("entry {index} is no command: {why}"))
    }

    fn count(&self) {
        let state = self.shared.state();
        self.metrics.keys.set(state.records.len() as i64);
        self.metrics.store_bytes.set(state.records.bytes() as i64);
        self.metrics.retry_tokens.set(state.tokens.len() as i64);
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
        let keys = Keys::new(&config, REMEMBERED_MAX, logger.clone());
        let shared = keys.shared.clone();
        let (node, running) = state_machine::start(config, port, keys, logger);
        (Self { node, shared }, running)
    }

    /// Makes an empty store, and the reader that applies commitC to it. See [`state_machine::connect`].
    pub fn new(
        config: &NodeConfig,
        requests: Requests,
        logger: Logger,
    ) -> (Self, CommitReader<Keys>) {
        Self::remembering(REMEMBERED_MAX, config, requests, logger)
    }

    /// As [`new`](Self::new), with another number of retry tokens in place of [`REMEMBERED_MAX`]. All
    /// members must have the same.
    #[doc(hidden)]
    pub fn remembering(
        tokens_max: usize,
        config: &NodeConfig,
        requests: Requests,
        logger: Logger,
    ) -> (Self, CommitReader<Keys>) {
        let keys = Keys::new(config, tokens_max, logger.clone());
        let shared = keys.shared.clone();
        let (node, reader) = state_machine::connect(config, keys, requests, logger);
        (Self { node, shared }, reader)
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
        // Not by way of `put`: a future inside another one makes that larger, and each request moves it.
        if ack == Ack::Committed {
            let Applied { outcome, .. } = self.node.propose_until(data, deadline).await??;
            let Outcome { index, term, .. } = outcome;
            return Ok(Acknowledged::Applied { index, term });
        }
        self.node.submit_until(data, deadline).await.map(|()| Acknowledged::Proposed)
    }

    /// Sets `key` to `value`, and returns what applying it did.
    ///
    /// # Errors
    /// As [`Handle::propose`].
    pub async fn put(
        &self,
        key: &[u8],
        value: Bytes,
        deadline: Instant,
    ) -> Result<Applied, RequestError> {
        let data = codec::encode(&Command::Put { key, value: &value });
        drop(value);
        self.node.propose_until(data, deadline).await?
    }

    /// Carries a transaction out, at most once if there is a `token`. The future holds nothing of `txn`. A
    /// repetition returns no values, so with a token `txn` should not read.
    ///
    /// # Errors
    /// As [`Handle::propose`]. With a token also [`RequestError::Conflict`] if the token is too old,
    /// [`RequestError::Unprocessable`] if it was used for another transaction, and
    /// [`RequestError::Invalid`] if it was not issued.
    pub fn transact<'a>(
        &'a self,
        txn: Txn<'_>,
        token: Option<Token>,
        deadline: Instant,
    ) -> impl Future<Output = Result<Applied, RequestError>> + Send + use<'a> {
        // The wait must not hold the values a second time.
        let data = txn.encode(token);
        async move { self.node.propose_until(data, deadline).await? }
    }

    /// Waits until the state is as current as requested.
    ///
    /// # Errors
    /// [`RequestError::Unavailable`] if it is not in time.
    pub async fn wait_for(
        &self,
        consistency: Consistency,
        deadline: Instant,
    ) -> Result<(), RequestError> {
        match consistency {
            Consistency::Linearizable => self.node.wait_until_current(deadline).await,
            Consistency::Local => self.node.wait_until_replayed(deadline).await,
        }
    }

    /// Returns the record of `key`; `None` if the key does not exist.
    ///
    /// # Errors
    /// As [`wait_for`](Self::wait_for).
    pub async fn lookup(
        &self,
        key: &[u8],
        consistency: Consistency,
        deadline: Instant,
    ) -> Result<Option<KeyValue>, RequestError> {
        self.wait_for(consistency, deadline).await?;
        Ok(self.shared.state().records.get(key).cloned())
    }

    /// The first keys that start with `prefix` and are greater than `after`, as this member knows them now:
    /// at most `limit`, and no more after `size_max` in total. `size` is that of one record.
    pub fn page(
        &self,
        prefix: &[u8],
        after: Option<&[u8]>,
        limit: usize,
        size_max: usize,
        size: impl Fn(&KeyValue) -> usize,
    ) -> Page {
        let state = self.shared.state();
        let mut rest = state.records.range(prefix, after);
        let (mut records, mut total) = (Vec::new(), 0);
        while records.len() < limit && total < size_max {
            let Some(record) = rest.next() else { break };
            total += size(record);
            records.push(record.clone());
        }
        let has_more = rest.next().is_some();
        Page { index: state.applied.0, records, has_more }
    }

    /// The index of the last entry that this member's state machine applied. Entries of raft itself are not
    /// among them.
    pub fn applied(&self) -> Index {
        self.shared.state().applied.0
    }

    /// At most `max` changes of keys that start with `prefix`, after `cursor`.
    pub fn changes(&self, cursor: Cursor, prefix: &[u8], max: usize) -> Changes {
        self.shared.state().history.after(cursor, prefix, max)
    }

    /// Keeps no changes for [`changes`](Self::changes) from now on, for a member whose ports offer no watch: it
    /// saves up to 20 MB, and 3 % of the work of a PUT.
    pub fn keep_no_changes(&self) {
        let mut state = self.shared.state.write().expect(NO_PANIC);
        state.history.turn_off();
    }

    /// Waits until keys have changed since the last call returned. For one caller at a time.
    pub async fn changed(&self) {
        self.shared.changed.notified().await;
    }

    /// The state at this moment.
    pub fn view(&self) -> View {
        View::of(&self.shared.state())
    }

    /// The handle on the node: waiting for a current state, and membership.
    pub fn node(&self) -> &Handle<Keys> {
        &self.node
    }
}

#[cfg(test)]
mod tests;
