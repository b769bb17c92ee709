//! Whole members as processes, over real sockets and files: what a person at a terminal could see.
//!
//! Each test starts its own members on a loopback address of its own, in a directory of its own, so
//! all run at the same time. One file per behaviour; [`support`] is what they share. A test that
//! needs root or a tool that is not there says so on standard error and passes.

#![allow(clippy::unwrap_used)]

mod admin;
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
mod tls;
mod walks;
