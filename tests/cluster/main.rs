//! Clusters in one process, over real sockets and disks.
#![allow(clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

mod harness;

mod hostile;
mod httpapi;
mod learners;
mod membership;
mod proposals;
mod reads;
mod recovery;
mod snapshots;
mod start;
