//! The files of a member. All access is blocking and goes through [`Vfs`].
//!
//! ```text
//! <data-dir>/raftexample-<id>/        the write-ahead log, in segments    wal
//! <data-dir>/raftexample-<id>-snap/   the snapshots                       snapshotter
//! ```
//! [`log`] mirrors both in memory for raft-rs.

#[cfg(test)]
pub(crate) mod failing;
mod files;
pub mod log;
pub mod snapshotter;
pub mod vfs;
pub mod wal;

pub use vfs::{DiskVfs, ReadOnlyVfs, Vfs, VfsFile};
