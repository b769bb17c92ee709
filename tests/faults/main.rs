//! Faults on real processes under load: the promises hold, and how often each fault was made.
//!
//! Each test starts its own members, runs clients on all of them, and makes one kind of fault.
//! [`clients`] record requests and answers. [`history`] checks that no acknowledged write is lost and
//! that each key's history is linearizable. [`compare`] compares the directories of the stopped
//! members. [`runner`] combines these and prints one line per kind of fault.
//!
//! Each kind has a short round and a long one, which is ignored by default:
//! ```text
//! cargo test --test faults -- --nocapture                          the short rounds, with their counts
//! cargo test --test faults -- --nocapture --ignored \
//!     --test-threads 1                                             the long rounds, one at a time, because
//!                                                                  load lengthens elections
//! FAULTS_ROUNDS=500 FAULTS_SEED=7 cargo test --test faults -- …    another number of rounds, another seed
//! ```
//! A failing test prints its seed and the command that repeats it, and keeps the data directories, the
//! logs and `history.jsonl`. The seed selects the faults and their victims, not the scheduling.

#![allow(clippy::unwrap_used)]

mod clients;
mod clocks;
mod compare;
mod disks;
mod floods;
mod history;
mod kills;
mod members;
mod names;
mod namespaces;
mod network;
mod pauses;
mod power;
mod resuming;
mod runner;
mod scarcity;
mod signals;
mod slow_clients;
mod snapshots;
#[path = "../support/mod.rs"]
mod support;
mod unsafe_flags;
mod wiped;
