//! Members in memory: a node's three seams without disks, sockets and clocks.
//!
//! [`MemVfs`] stands for the files, [`Network`] for the messages, ticks for the time. All of them write
//! into one [`Transcript`], so a test can check what happened before what.

mod disk;
pub mod forging;
mod member;
mod network;
mod outbox;
mod state;
mod transcript;

pub use disk::*;
pub use member::*;
pub use network::*;
pub use state::*;
pub use transcript::*;

pub use crate::support::config::*;
