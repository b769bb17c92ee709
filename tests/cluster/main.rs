//! Clusters of members in one process, over the real network and the real disk.
#![allow(clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

/// Members, ports, proxies and clients: what the tests are made of.
mod harness;

/// What a client is answered, with a majority and without.
mod hostile;
mod httpapi;
/// New members have no vote until they follow; members that move; who leads.
mod learners;
/// Adding and removing members.
mod membership;
/// Proposals through the bare channels, and under load.
mod proposals;
/// Linearizable and local reads.
mod reads;
/// Restarts: what was acknowledged is there, whatever the way back.
mod recovery;
/// Snapshots: when they are made, what they hold, and members that need one.
mod snapshots;
/// First starts, and members that may not start.
mod start;
