//! A small replicated key-value store: the Rust port of etcd's `contrib/raftexample`, on raft-rs.
//!
//! This page is the tour. The way of a write takes five minutes: [`httpapi`] → [`kvstore`] →
//! [`raft_node::serve`] → [`raft_node`] → [`storage::wal`] → back to [`kvstore`].
//!
//! # How a write flows
//! ```text
//! PUT /key ─▶ httpapi ─▶ KvStore::propose ──proposeC──▶ raft_node ─▶ WAL: one frame, one fdatasync
//!                                                          │  └────▶ transport ─▶ the other members
//!                                                          │             a majority has it: committed
//! 204 ◀─ responder ◀─ CommitReader::apply ◀──commitC──────────┘
//! ```
//!
//! # How a read flows
//! ```text
//! GET /key ─▶ httpapi ─▶ KvStore::lookup ──readC──▶ raft_node ─▶ one ReadIndex round for all reads
//!                                                          │     that wait: a majority confirms the
//!                                                          │     leader, who names its commit index
//! 200 ◀─ the map ◀─ responder ◀──commitC, behind that index───┘
//! ```
//!
//! # The channels
//! Go's `proposeC` is the pair `propose_tx`/`propose_rx` here, and so on.
//!
//! | channel | carries | from → to | bound | closing means |
//! |---|---|---|---|---|
//! | proposeC | [`Proposal`](channels::Proposal): bytes and a responder | kvstore → raft_node | 4,096, then 503 | the last handle is gone: stop |
//! | readC | [`ReadRequest`](channels::ReadRequest) | kvstore → raft_node | 4,096, then 503 | – |
//! | confChangeC | [`ConfChangeRequest`](channels::ConfChangeRequest) | httpapi → raft_node | 16, then 503 | – |
//! | commitC | [`Commit`](channels::Commit): entries, reads, snapshots | raft_node → kvstore | 64 MiB of entries not yet applied: past it the node takes neither proposals nor appends | the node stopped |
//! | inbound | [`Inbound`](transport::Inbound): what peers ask | transport → raft_node | 1,024, then refused | – |
//! | reports | [`PeerReport`](channels::PeerReport): what became of what we sent | transport → raft_node | by the peers' queues | – |
//! | peer N | raft messages | raft_node → transport | 4,096 and 64 MiB, then dropped | the peer was removed |
//! | errorC | the node's end, [`RaftNodeHandle::join`](raft_node::RaftNodeHandle::join) | raft_node → main | 1 | – |
//!
//! # The parts, and what may import what
//! ```text
//! main ──▶ cli ──▶ config, inspect, restore: the last two read and write a member's files, and use
//!   │      │             what storage, raft_node, membership and kvstore know of them
//!   │      └─────▶ client: asks running members over HTTP; a backup it checks with storage, kvstore
//!   ├────▶ config, logging, tls
//!   ├────▶ admin                      one Status, the counts, and the client port's channels; a page
//!   ├────▶ httpapi ──▶ kvstore ──▶ codec        listener: the accept loop of all ports
//!   ├────▶ kvstore                    bytes in, bytes out; knows nothing of raft-rs or HTTP
//!   └────▶ raft_node ──▶ transport    inbound routes; one bounded queue and one task per peer
//!              ├───────▶ membership   id → URL, removed ids, who may speak, which change is allowed
//!              └───────▶ storage      wal, snapshotter, log: plain blocking files
//! channels: what the channels carry. error: what can go wrong. metrics: what is counted. All three are
//! everybody's, and codec is of whoever encodes: kvstore, membership, transport, raft_node. tls: the
//! certificates, of config and of whoever connects or accepts: listener, transport, raft_node, client.
//! ```
//! A test holds these directions. The original's files are kvstore.go, httpapi.go, listener.go,
//! main.go and raft.go, whose twin is [`raft_node`]; its imports `wal`, `snap` and `rafthttp` are
//! [`storage::wal`], [`storage::snapshotter`] and [`transport`] here.
//!
//! # Another state machine
//! [`raft_node`] carries bytes and knows nothing of keys. Whoever follows commitC is the state
//! machine: `examples/counter.rs` is another one on the same node.

pub mod channels;
pub mod codec;
pub mod commands;
pub mod config;
pub mod error;
pub mod httpapi;
pub mod kvstore;
pub mod logging;
pub mod membership;
pub mod metrics;
pub mod ports;
pub mod raft_node;
pub mod storage;
pub mod transport;
