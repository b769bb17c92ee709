//! Members as processes, over real sockets and files, as seen from a terminal.
//!
//! Each test starts its members on its own loopback address, in its own directory, so all tests run
//! in parallel. A test that needs root or a missing tool says so on standard error and passes.

#![allow(clippy::unwrap_used)]

mod admin;
mod application;
mod bounds;
mod client;
mod disk;
mod flags;
mod identity;
mod inspect;
mod logs;
mod members;
mod pauses;
mod quorum;
mod restore;
mod rolling;
mod shutdown;
mod snapshots;
#[path = "../support/mod.rs"]
mod support;
mod surroundings;
mod tls;
mod walks;
