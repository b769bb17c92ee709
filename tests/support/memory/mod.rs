//! Members in memory, without disks, sockets and clocks.
//!
//! [`MemVfs`] replaces the files, [`Network`] the messages, ticks the time. All of them write to
//! one [`Transcript`], so a test can check the order of events.

mod disk;
pub mod forging;
mod late;
mod member;
mod network;
mod outbox;
mod state;
mod transcript;

pub use disk::*;
pub use late::*;
pub use member::*;
pub use network::*;
pub use state::*;
pub use transcript::*;

pub use crate::support::config::*;
