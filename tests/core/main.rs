//! The synchronous core of a node, driven without threads, clocks or disks.
//!
//! [`harness`] puts an in-memory file system, a list of outgoing messages and a hand-driven clock in
//! place of the real ones; the other files are the behaviours.

#![allow(clippy::unwrap_used, missing_docs)]

mod forging;
mod harness;

mod crash;
mod crash_states;
mod damage;
mod data;
mod failed_sync;
mod failing_disk;
mod gate;
mod golden;
mod hostile;
mod limits;
mod members;
mod poison;
mod recovery;
mod requests;
