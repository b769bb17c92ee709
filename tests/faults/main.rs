//! Faults on real processes under load: what must hold, and how often it did.
//!
//! Each test starts its own members, lets clients write and read through all of them, and makes one
//! kind of fault. [`clients`] record what they asked and what they were told; [`history`] checks that
//! nothing acknowledged is lost and that each key's history is linearizable; [`compare`] opens the
//! directories of the stopped members and compares what is in them; [`runner`] puts this together
//! and prints one line per kind of fault.
//!
//! Each kind has a short round and a long one, which is ignored:
//! ```text
//! cargo test --test faults -- --nocapture                          the short ones, with their figures
//! cargo test --test faults -- --nocapture --ignored                the long ones, one after another:
//!                             --test-threads 1                     load decides how long elections take
//! FAULTS_ROUNDS=500 FAULTS_SEED=7 cargo test --test faults -- …    other numbers of rounds, other seeds
//! ```
//! A test that fails prints its seed and the command that repeats it, and keeps the data directories,
//! the logs and `history.jsonl`. The seed decides what is done to whom; it cannot decide what the
//! scheduler does meanwhile.

#![allow(clippy::unwrap_used)]

mod clients;
mod clocks;
mod compare;
mod disks;
mod history;
mod kills;
mod members;
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
