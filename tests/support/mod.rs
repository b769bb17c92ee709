//! What the test targets share. Each target uses a part of it.

#![allow(dead_code, unused_imports)]

pub mod config;
pub mod linearizability;
pub mod logs;
pub mod memory;
// The fuzz driver has no binary to start, and mounts nothing.
#[cfg(test)]
pub mod mounts;
#[cfg(test)]
pub mod processes;
pub mod random;
