//! A small replicated key-value store: the Rust port of etcd's `contrib/raftexample`, on raft-rs.
//!
//! This page is the tour. The path of a write takes five minutes to read: [`httpapi`] → [`kvstore`] →
//! [`raft_node::state_machine`] → [`raft_node`] → [`storage::wal`], and back to [`kvstore`]. The [`guide`]
//! is for operators and contributors.
//!
//! # How a write flows
//! ```text
//! PUT /key ─▶ httpapi ─▶ kvstore ─▶ Handle ──proposeC──▶ raft_node ─▶ one frame, one fdatasync
//!                                                           │  └────▶ transport ─▶ other members
//!                                                           │         a majority has it: committed
//! 204 ◀─ responder ◀─ StateMachine::apply ◀────commitC──────┘
//! ```
//! Each turn of the node takes everything that has arrived. So many writes share one frame of the log, one
//! fdatasync and one message to each member. A leader's messages leave before its own fdatasync, a
//! follower's only after its own; [`raft_node::journal`] names the exceptions.
//!
//! # How a read flows
//! ```text
//! GET /key ─▶ httpapi ─▶ kvstore ─▶ Handle ──readC──▶ raft_node ─▶ one ReadIndex round for all waiting
//!                                                        │          reads: a majority confirms the
//!                                                        │          leader, which names its commit index
//! 200 ◀─ the map ◀─ responder ◀───commitC, after that index
//! ```
//! Every member serves reads, and none serves them without a majority. While writes are under way, the commit
//! of one that was proposed after a read confirms it instead: [`raft_node::reads`] has the proof.
//!
//! # Every queue, its bound, and what happens when it is full
//! Go's `proposeC` is the pair `propose_tx` and `propose_rx` here, and so on.
//!
//! | queue | from → to | bound | when full |
//! |---|---|---|---|
//! | proposeC: [`Proposal`](channels::Proposal) | `Handle` → raft_node | 4,096 | 503 |
//! | readC: [`ReadRequest`](channels::ReadRequest) | `Handle` → raft_node | 4,096 | 503 |
//! | confChangeC: [`ConfChangeRequest`](channels::ConfChangeRequest) | `Handle` → raft_node | 16 | 503 |
//! | writes that wait for a leader | in raft_node | 4,096 | 503 |
//! | reads that wait for a round | in raft_node | 16,384 | 503 |
//! | changes that wait for a leader | in raft_node | 64 | 503 |
//! | proposed, not committed | in raft | 64 MiB | the writes wait, as above |
//! | appends in flight to one member | in raft | 256 of 1 MiB | raft pauses until an answer |
//! | commitC: [`Commit`](channels::Commit) | raft_node → state machine | 64 MiB of entries not yet applied | the node takes neither proposals nor appends |
//! | entries gathered behind the frame under way | in raft_node | 64 MiB | the node takes neither forwarded writes nor appends |
//! | commit notices held back | in raft_node | one for each member, 2 ms | replaced |
//! | peer N: raft messages | raft_node → transport | 4,096, and 64 MiB | dropped; raft is told that the peer is unreachable, and repeats |
//! | frames of a stream to a peer | in transport | 2 | the peer's queue waits |
//! | chunks of a snapshot or backup | disk ↔ network | 4 of 128 KiB | the faster side waits |
//! | inbound: [`Inbound`](transport::Inbound) | transport → raft_node | 1,024 | 503 to the peer, or a last line in its stream; its raft repeats |
//! | peers' bodies in memory | peer port | 192 MiB | 503 to the peer |
//! | snapshots being received | peer port | 2, one per sender | 503 to the peer |
//! | reports: [`PeerReport`](channels::PeerReport) | transport → raft_node | one for each message or request in the queues above | – |
//! | clients' bodies in memory | client, application and admin port, each | 64 MiB | 503 |
//! | connections | client, application, peer, admin port | 1,024, 2,048, 256, 64; fewer with few descriptors | the one that has shown least is closed |
//! | watchers of keys | application, admin port | 1,024, 16; fewer with few descriptors | 503 |
//! | events on their way to a watcher | application, admin port | 64 KiB and one event | the watcher waits, and gets a `reset` if its place is lost |
//! | changes kept for watchers | in kvstore | 65,536, and 16 MiB | the oldest is dropped: its watchers get a `reset` |
//! | retry tokens remembered | in kvstore | 16,384 | the oldest is forgotten, and refused from then on |
//! | connections to peers | transport | 260: four to each of 63, and one for each change on its way to the leader | – |
//! | changes on their way to the leader | transport | 8 | the next wait, and expire |
//! | event streams, backups, state hashes | admin port | 16, 1, 1 | 503, 503, the next waits |
//! | points of the page's charts | admin port | 180, one for each second | the oldest is dropped |
//! | status | raft_node → admin port, transport | the latest | replaced |
//! | errorC: [`RaftNodeHandle::join`](raft_node::RaftNodeHandle::join) | raft_node → main | 1 | – |
//! | log lines | all → standard error | 4,096 | dropped, and counted in the log |
//!
//! # How a member ends
//! - In order: the last sender of proposeC is dropped. The node finishes its turn and closes commitC.
//! - With status 0 after its removal, once the others know of it; with status 1 if a member refuses its
//!   data directory.
//! - By a failed write or fdatasync: [`raft_node::journal`] has the steps.
//! - By a panic in any thread: the process aborts, in release builds.
//!
//! # The parts, and what may import what
//! ```text
//! main ──▶ config, logging            flags, files, environment; where log lines go
//!   ├────▶ commands                   client: asks running members over HTTP
//!   │                                 inspect, restore: read and write a member's files
//!   ├────▶ httpapi                    the client port
//!   ├────▶ ports                      application, admin and its page, guard, listener (accept loop), tls
//!   └────▶ kvstore                    the state machine: bytes in, bytes out
//!             └──▶ raft_node          the node, its task, and the seam to the state machine
//!                    ├──▶ transport   inbound routes; one bounded queue and one task per peer
//!                    ├──▶ membership  id → URL, removed ids, admission, which change is allowed
//!                    └──▶ storage     wal, snapshotter, log: plain blocking files
//! used by all: channels (what the channels carry), codec, error, metrics
//! ```
//! `tests/directions.rs` holds these directions.
//!
//! # Where to find an answer
//! State that must change together lives in one type, whose methods cannot be called in the wrong order.
//! So each question has one place below `src`, and that module's documentation starts with the answer.
//!
//! | question | place |
//! |---|---|
//! | On which event is a PUT answered 204? | [`raft_node/writes.rs`](raft_node::writes) |
//! | Which answer is 503, which 504, and which may be retried? | [`error.rs`](error::RequestError); [`channels.rs`](channels::Pending) decides |
//! | What may be sent before the fdatasync, and what happens if it fails? | [`raft_node/journal.rs`](raft_node::journal) |
//! | When does a follower learn that an entry is committed? | [`raft_node/notices.rs`](raft_node::notices) |
//! | How does a follower serve a linearizable read? | [`raft_node/reads.rs`](raft_node::reads) |
//! | Which election timeouts are drawn? | [`raft_node/config.rs`](raft_node::NodeConfig) |
//! | When is a snapshot made, and what is deleted? | [`raft_node/snapshots.rs`](raft_node::snapshots) |
//! | What if two membership changes meet? | [`raft_node/changes.rs`](raft_node::changes) |
//! | Which sender may speak, and what stops a wiped member from coming back? | `membership/admission.rs` |
//! | What happens when the queue to a peer is full, or the receiver's? | [`transport/mod.rs`](transport) |
//! | Which raft message may be stepped? | [`raft_node/validate.rs`](raft_node::validate) |
//! | Which bytes does a PUT write, and what tells a torn frame from damage? | `storage/wal/format.rs` |
//! | What changes to add a command? | [`kvstore.rs`](kvstore) |
//! | Why is a write with a retry token carried out once? | `kvstore/tokens.rs` |
//! | How does a watch resume without a gap? | `kvstore/history.rs`; `ports/application/watch.rs` writes it |
//! | How do I write another state machine? | [`raft_node/state_machine.rs`](raft_node::state_machine), `examples/counter.rs` |

pub mod channels;
pub mod codec;
pub mod commands;
pub mod config;
pub mod error;
pub mod guide;
pub mod httpapi;
pub mod kvstore;
pub mod logging;
pub mod membership;
pub mod metrics;
pub mod ports;
pub mod raft_node;
pub mod storage;
pub mod transport;
