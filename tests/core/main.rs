//! The synchronous core of a node, driven without threads, clocks or disks.
//!
//! [`support::memory`] replaces its files, messages and clock. Each file tests one behaviour.

#![allow(clippy::unwrap_used, missing_docs)]

mod background;
mod bootstrap;
mod crash;
mod crash_states;
mod damage;
mod data;
mod failed_sync;
mod failing_disk;
mod golden;
mod hostile;
mod limits;
mod lives;
mod members;
mod notices;
mod poison;
mod recovery;
mod requests;
#[path = "../support/mod.rs"]
mod support;
mod validate;
mod wal_lives;
