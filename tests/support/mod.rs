//! Support code for the test targets. Each target uses a part of it.

#![allow(dead_code, unused_imports)]

// The fuzz driver is built without the crates for it.
#[cfg(test)]
pub mod certificates;
pub mod config;
pub mod linearizability;
pub mod logs;
pub mod memory;
// The fuzz driver is built without a binary to start.
#[cfg(test)]
pub mod mounts;
#[cfg(test)]
pub mod processes;
pub mod random;
pub mod store;
