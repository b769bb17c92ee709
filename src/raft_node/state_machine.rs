//! The seam between the raft node and a replicated state machine.
//!
//! A state machine implements [`StateMachine`] and is given to [`start`], which returns a
//! [`Handle`]. Channels stay inside this module:
//!
//! ```text
//! Handle::propose ──proposeC──▶ raft_node ──commitC──▶ CommitReader ──▶ StateMachine::apply
//!        ▲                                                  │                   │
//!        └──────────────── responder ◀──────────────────────┴────── Output ◀────┘
//!
//! Handle::read ─────readC─────▶ raft_node ──commitC──▶ CommitReader ──▶ responder ──▶ the closure
//! ```
//! [`CommitReader`] answers each request once, after the state machine has applied its entry. The
//! state machine never sees a responder, so it cannot forget to answer.

use std::io::{self, Read, Write};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use bytes::Bytes;
use slog::{Logger, info};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::{NodeConfig, RaftNodeHandle, new_raft_node};
use crate::channels::{
    Ack, Acknowledged, CONF_CHANGES_MAX, Commit, CommittedEntry, ConfChangeRequest, Index,
    MemberRequest, Proposal, REQUESTS_MAX, ReadRequest, Requests, SnapshotRequest, SnapshotRestore,
    Term, responder,
};
use crate::error::{Error, RequestError};
use crate::metrics::Metrics;
use crate::ports::listener::Port;
use crate::storage::DiskVfs;

/// A committed entry of the log.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// Its index. Indexes grow; the missing ones belong to entries of raft itself.
    pub index: Index,
    /// Its term.
    pub term: Term,
    /// The bytes that were proposed.
    pub data: &'a [u8],
}

/// A replicated state machine. Every member has one, and applies the same entries in the same order.
///
/// # The contract
/// - **Deterministic.** The state and the output depend only on the snapshot restored last and on
///   the entries applied since, in their order. `apply` must not use a clock, random numbers, flags
///   or the order of a hash map. It must treat bytes that it cannot decode alike on every member:
///   skip them, and say so in the output.
/// - **A crash repeats entries.** The state lives in memory. At each start the node restores the
///   newest snapshot, if there is one, and applies all later entries again to a fresh state
///   machine. So `apply` must have no effect outside the state. The repeated outputs reach nobody.
/// - **What may block.** `apply` and `snapshot` run on the async runtime, while reads wait for them:
///   neither may wait or do I/O. `snapshot` takes a cheap copy, for example of pointers. The function
///   that it returns runs on a thread of its own and may take long, while entries are applied.
///   `restore` may take long, but reads wait for it.
/// - **Order.** Calls follow the log. A [`Handle::read`] sees every entry that was acknowledged on
///   any member before the read was requested.
///
/// # Example
/// A log of lines whose output is the line's number, on a cluster of one member:
/// ```
/// use std::io::{self, Read, Write};
/// use raftexample::raft_node::NodeConfig;
/// use raftexample::raft_node::state_machine::{Entry, StateMachine, start};
///
/// #[derive(Default)]
/// struct Lines(String);
///
/// impl StateMachine for Lines {
///     type Output = usize;
///
///     fn apply(&mut self, entry: Entry<'_>) -> usize {
///         self.0 += &String::from_utf8_lossy(entry.data);
///         self.0 += "\n";
///         self.0.lines().count()
///     }
///
///     fn snapshot(&self) -> impl FnOnce(&mut dyn Write) -> io::Result<()> + Send + 'static {
///         let lines = self.0.clone();
///         move |file| file.write_all(lines.as_bytes())
///     }
///
///     fn restore(&mut self, from: &mut dyn Read) -> io::Result<()> {
///         self.0.clear();
///         from.read_to_string(&mut self.0).map(|_| ())
///     }
/// }
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let logger = slog::Logger::root(slog::Discard, slog::o!());
/// let dir = tempfile::tempdir()?;
/// let config = NodeConfig { data_dir: dir.path().into(), ..NodeConfig::default() };
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
/// let (lines, node) = start(config, listener, Lines::default(), logger);
/// assert_eq!(lines.propose("first").await?, 1);
/// assert_eq!(lines.propose("second").await?, 2);
/// assert_eq!(lines.read(|lines| lines.0.clone()).await?, "first\nsecond\n");
/// drop(lines);
/// node.join().await?;
/// # Ok(())
/// # }
/// ```
pub trait StateMachine: Send + Sync + 'static {
    /// What the proposer of an entry gets back.
    type Output: Send + 'static;

    /// Applies an entry.
    fn apply(&mut self, entry: Entry<'_>) -> Self::Output;

    /// Copies the state; the returned function writes the copy to a file. Members with equal states
    /// should write equal bytes, so that their snapshots can be compared.
    fn snapshot(&self) -> impl FnOnce(&mut dyn Write) -> io::Result<()> + Send + 'static;

    /// Replaces the state by one that a snapshot holds. `from` ends with the snapshot. Its checksum
    /// has been verified.
    ///
    /// # Errors
    /// If the bytes are no snapshot of this state machine, or cannot be read. The node stops.
    fn restore(&mut self, from: &mut dyn Read) -> io::Result<()>;
}

/// Starts a member: a node, and the state machine that follows it. The node listens for its peers on
/// `port`, a listener or one with TLS. It stops when the last clone of the handle is dropped, when
/// the state machine cannot be restored, and on its own errors; [`RaftNodeHandle::join`] says which.
///
/// Must be called within a multi-threaded tokio runtime.
pub fn start<M: StateMachine>(
    config: NodeConfig,
    port: impl Into<Port>,
    machine: M,
    logger: Logger,
) -> (Handle<M>, RaftNodeHandle) {
    let (propose_tx, propose_rx) = mpsc::channel(REQUESTS_MAX);
    let (read_tx, read_rx) = mpsc::channel(REQUESTS_MAX);
    let (conf_change_tx, conf_change_rx) = mpsc::channel(CONF_CHANGES_MAX);
    let requests = Requests { propose_tx, read_tx, conf_change_tx };
    let (handle, reader) = connect(&config, machine, requests, logger.clone());
    let (commit_rx, mut node) =
        new_raft_node(config, Arc::new(DiskVfs), port, propose_rx, read_rx, conf_change_rx, logger);
    node.machine = Some(tokio::spawn(reader.read_commits(commit_rx)));
    (handle, node)
}

/// Puts `machine` between `requests`, the senders of a node's channels, and commitC, which the
/// [`CommitReader`] follows.
pub fn connect<M: StateMachine>(
    config: &NodeConfig,
    machine: M,
    requests: Requests,
    logger: Logger,
) -> (Handle<M>, CommitReader<M>) {
    let machine = Arc::new(RwLock::new(machine));
    let (replayed_tx, replayed_rx) = watch::channel(false);
    let metrics = config.metrics.clone();
    let reader = CommitReader { machine: machine.clone(), replayed_tx, metrics, logger };
    let request_timeout = config.request_timeout;
    (Handle { requests, replayed_rx, machine, request_timeout }, reader)
}

/// A handle on a replicated state machine. The node stops when the last clone is dropped.
///
/// Methods without a deadline use [`NodeConfig::request_timeout`].
pub struct Handle<M> {
    requests: Requests,
    replayed_rx: watch::Receiver<bool>,
    machine: Arc<RwLock<M>>,
    request_timeout: Duration,
}

impl<M> Clone for Handle<M> {
    fn clone(&self) -> Self {
        Self {
            requests: self.requests.clone(),
            replayed_rx: self.replayed_rx.clone(),
            machine: self.machine.clone(),
            request_timeout: self.request_timeout,
        }
    }
}

impl<M: StateMachine> Handle<M> {
    /// Replicates `data`, and returns the output of applying it on this member. The entry is then
    /// on the disks of a majority.
    ///
    /// # Errors
    /// [`RequestError::Unavailable`] if nothing was proposed, [`RequestError::Unknown`] if the entry
    /// may still be applied. It is never proposed twice.
    pub async fn propose(&self, data: impl Into<Bytes>) -> Result<M::Output, RequestError> {
        self.propose_until(data, self.deadline()).await
    }

    /// As [`propose`](Self::propose), with a deadline.
    pub async fn propose_until(
        &self,
        data: impl Into<Bytes>,
        deadline: Instant,
    ) -> Result<M::Output, RequestError> {
        let (responder, pending) = responder();
        let proposal = Proposal { data: data.into(), ack: Ack::Committed, responder };
        self.requests.propose_tx.try_send(proposal)?;
        pending.output_until(deadline).await
    }

    /// Hands `data` to raft and returns, as the original does. The entry may still be lost, and its
    /// output reaches nobody. Errors are those of [`propose`](Self::propose).
    pub async fn submit_until(
        &self,
        data: impl Into<Bytes>,
        deadline: Instant,
    ) -> Result<(), RequestError> {
        let (responder, pending) = responder();
        let proposal = Proposal { data: data.into(), ack: Ack::Proposed, responder };
        self.requests.propose_tx.try_send(proposal)?;
        pending.wait_until(deadline).await.map(|_| ())
    }

    /// A linearizable read: calls `look` with a state that holds every entry acknowledged on any
    /// member before this call (thesis, section 6.4). Entries wait while `look` runs.
    ///
    /// # Errors
    /// [`RequestError::Unavailable`] if no majority confirmed the leader in time.
    pub async fn read<R>(&self, look: impl FnOnce(&M) -> R) -> Result<R, RequestError> {
        self.wait_until_current(self.deadline()).await?;
        Ok(look(&read(&self.machine)))
    }

    /// As [`read`](Self::read), for a caller that looks at the state later: waits until it holds these
    /// entries.
    pub async fn wait_until_current(&self, deadline: Instant) -> Result<(), RequestError> {
        let (responder, pending) = responder();
        self.requests.read_tx.try_send(ReadRequest { responder })?;
        pending.wait_until(deadline).await
    }

    /// Waits until the state holds what this member knew to be committed when it last stopped.
    ///
    /// # Errors
    /// [`RequestError::Unavailable`] if the replay takes longer.
    pub async fn wait_until_replayed(&self, deadline: Instant) -> Result<(), RequestError> {
        let mut replayed_rx = self.replayed_rx.clone();
        match tokio::time::timeout_at(deadline, replayed_rx.wait_for(|yes| *yes)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(RequestError::unavailable("this member is still replaying its log")),
        }
    }

    /// Asks the leader for a membership change, and waits until this change is applied.
    ///
    /// # Errors
    /// Every [`RequestError`]: the leader checks the request.
    pub async fn change_members(
        &self,
        change: MemberRequest,
        deadline: Instant,
    ) -> Result<(), RequestError> {
        self.request_change(change, false, deadline).await
    }

    /// If this member leads, transfers leadership to the voter with the most complete log.
    ///
    /// # Errors
    /// If this member does not lead, or no other voter took over in time.
    pub async fn transfer_leadership(&self, deadline: Instant) -> Result<(), RequestError> {
        // Marked as forwarded, so that the node does not forward it to another leader.
        self.request_change(MemberRequest::Lead { to: None }, true, deadline).await
    }

    async fn request_change(
        &self,
        change: MemberRequest,
        forwarded: bool,
        deadline: Instant,
    ) -> Result<(), RequestError> {
        let (responder, pending) = responder();
        let request = ConfChangeRequest { change, forwarded, responder };
        self.requests.conf_change_tx.try_send(request)?;
        pending.wait_until(deadline).await
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.request_timeout
    }
}

/// Follows commitC: applies entries, answers requests, makes and restores snapshots. The twin of the
/// original's readCommits.
pub struct CommitReader<M> {
    machine: Arc<RwLock<M>>,
    replayed_tx: watch::Sender<bool>,
    metrics: Metrics,
    logger: Logger,
}

impl<M: StateMachine> CommitReader<M> {
    /// Follows commitC until the channel is closed or [`handle`](Self::handle) fails. It runs on the
    /// runtime that serves the requests: a second thread would delay every answer.
    pub async fn read_commits(
        mut self,
        mut commit_rx: mpsc::UnboundedReceiver<Commit>,
    ) -> crate::error::Result<()> {
        while let Some(commit) = commit_rx.recv().await {
            // These take time in proportion to the state.
            if matches!(commit, Commit::Restore(_) | Commit::Snapshot(_)) {
                tokio::task::block_in_place(|| self.handle(commit))?;
            } else {
                self.handle(commit)?;
            }
        }
        Ok(())
    }

    /// Handles one item of commitC.
    ///
    /// # Errors
    /// If a snapshot cannot be restored. Its checksum was right, so another program wrote it, or the
    /// disk fails now. The process must stop.
    pub fn handle(&mut self, commit: Commit) -> crate::error::Result<()> {
        match commit {
            Commit::Entries { entries, applied } => {
                let (began, count) = (Instant::now(), entries.len() as u64);
                for CommittedEntry { index, term, data, responder } in entries {
                    let output = write(&self.machine).apply(Entry { index, term, data: &data });
                    if let Some(responder) = responder {
                        responder.answer_with(Acknowledged::Applied { index, term }, output);
                    }
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
            Commit::Restore(SnapshotRestore { index, term, mut reader }) => {
                info!(self.logger, "loading snapshot at term {} and index {}", term, index);
                write(&self.machine).restore(&mut reader).map_err(|error| {
                    Error::Refused(format!(
                        "cannot read the state in the snapshot at term {term} and index {index}: {error}"
                    ))
                })?;
            }
            Commit::Snapshot(SnapshotRequest { save, .. }) => {
                let mut body = Some(read(&self.machine).snapshot());
                std::thread::spawn(move || {
                    save(&mut |file| body.take().expect("save writes the body once")(file));
                });
            }
            Commit::Replayed => {
                self.replayed_tx.send_replace(true);
            }
        }
        Ok(())
    }
}

fn read<M>(machine: &RwLock<M>) -> RwLockReadGuard<'_, M> {
    machine.read().expect("a panic in the state machine ends the process")
}

fn write<M>(machine: &RwLock<M>) -> RwLockWriteGuard<'_, M> {
    machine.write().expect("a panic in the state machine ends the process")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channels::{BacklogPermit, Responder};

    /// Its output is the total, in an `Arc` so that a test sees when it is dropped.
    #[derive(Default)]
    struct Sum(Arc<u64>);

    impl StateMachine for Sum {
        type Output = Arc<u64>;

        fn apply(&mut self, entry: Entry<'_>) -> Arc<u64> {
            self.0 = Arc::new(*self.0 + entry.data.len() as u64);
            self.0.clone()
        }

        fn snapshot(&self) -> impl FnOnce(&mut dyn Write) -> io::Result<()> + Send + 'static {
            let total = *self.0;
            move |file| file.write_all(&total.to_le_bytes())
        }

        fn restore(&mut self, from: &mut dyn Read) -> io::Result<()> {
            let mut total = [0; 8];
            from.read_exact(&mut total)?;
            self.0 = Arc::new(u64::from_le_bytes(total));
            Ok(())
        }
    }

    /// A state machine, and the node's ends of its channels.
    struct Bench {
        sum: Handle<Sum>,
        reader: CommitReader<Sum>,
        propose_rx: mpsc::Receiver<Proposal>,
        index: Index,
    }

    impl Bench {
        fn new() -> Self {
            let (propose_tx, propose_rx) = mpsc::channel(8);
            let (read_tx, conf_change_tx) = (mpsc::channel(1).0, mpsc::channel(1).0);
            let requests = Requests { propose_tx, read_tx, conf_change_tx };
            let logger = Logger::root(slog::Discard, slog::o!());
            let (sum, reader) = connect(&NodeConfig::default(), Sum::default(), requests, logger);
            Self { sum, reader, propose_rx, index: 0 }
        }

        /// Commits an entry of as many bytes, proposed here if it has a responder.
        fn commit(&mut self, bytes: usize, responder: Option<Responder<Acknowledged>>) {
            self.index += 1;
            let data = vec![0; bytes].into();
            let entries = vec![CommittedEntry { index: self.index, term: 1, data, responder }];
            let applied = BacklogPermit::new(0, &Arc::default());
            self.reader.handle(Commit::Entries { entries, applied }).expect("entries cannot fail");
        }

        async fn proposal(&mut self) -> (usize, Responder<Acknowledged>) {
            let proposal = self.propose_rx.recv().await.expect("the handle is open");
            assert!(proposal.responder.mark_proposed());
            (proposal.data.len(), proposal.responder)
        }

        fn total(&self) -> u64 {
            *read(&self.reader.machine).0
        }
    }

    /// Entries of other members, and of this member's earlier runs, have no responder.
    #[tokio::test]
    async fn each_proposer_gets_the_output_of_its_own_entry() {
        let mut bench = Bench::new();
        let (first, second) = (bench.sum.clone(), bench.sum.clone());
        let first = tokio::spawn(async move { first.propose(vec![0; 1]).await });
        let (first_bytes, first_responder) = bench.proposal().await;
        let second = tokio::spawn(async move { second.propose(vec![0; 10]).await });
        let (second_bytes, second_responder) = bench.proposal().await;
        bench.commit(second_bytes, Some(second_responder));
        bench.commit(100, None);
        bench.commit(first_bytes, Some(first_responder));
        assert_eq!(second.await.expect("no panic"), Ok(Arc::new(10)));
        assert_eq!(first.await.expect("no panic"), Ok(Arc::new(111)));
    }

    #[tokio::test]
    async fn an_output_that_nobody_waits_for_is_dropped() {
        let mut bench = Bench::new();
        let sum = bench.sum.clone();
        let proposer = tokio::spawn(async move { sum.propose(vec![0; 1]).await });
        let (bytes, responder) = bench.proposal().await;
        proposer.abort();
        assert!(proposer.await.expect_err("it was aborted").is_cancelled());
        bench.commit(bytes, Some(responder));
        assert_eq!(bench.total(), 1);
        assert_eq!(Arc::strong_count(&read(&bench.reader.machine).0), 1);
    }

    #[tokio::test]
    async fn a_submitted_entry_is_answered_before_it_is_applied() {
        let mut bench = Bench::new();
        let sum = bench.sum.clone();
        let node = async {
            let proposal = bench.propose_rx.recv().await.expect("the handle is open");
            assert_eq!(proposal.ack, Ack::Proposed);
            proposal.responder.answer(Ok(Acknowledged::Proposed));
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        let (answer, ()) = tokio::join!(sum.submit_until(vec![0; 3], deadline), node);
        assert_eq!((answer, bench.total()), (Ok(()), 0));
        bench.commit(3, None);
        assert_eq!(bench.total(), 3);
    }

    #[tokio::test]
    async fn a_snapshot_that_cannot_be_restored_is_named() {
        let mut bench = Bench::new();
        let mut restore = |bytes: &'static [u8]| {
            let reader = Box::new(bytes);
            bench.reader.handle(Commit::Restore(SnapshotRestore { index: 7, term: 2, reader }))
        };
        restore(&[5, 0, 0, 0, 0, 0, 0, 0]).expect("eight bytes are a total");
        let error = restore(&[5]).expect_err("one byte is no total").to_string();
        assert!(error.contains("term 2 and index 7"), "{error}");
        assert_eq!(bench.total(), 5);
    }
}
