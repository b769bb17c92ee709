//! What is on disk: plain blocking files behind one seam, the [`Vfs`].
//!
//! ```text
//! <data-dir>/raftexample-<id>/        the write-ahead log, in segments    wal
//! <data-dir>/raftexample-<id>-snap/   the snapshots                       snapshotter
//! ```
//! [`log`] is the mirror of both in memory that raft-rs reads from.

#[cfg(test)]
pub(crate) mod failing;
mod files;
pub mod log;
pub mod snapshotter;
pub mod vfs;
pub mod wal;

pub use vfs::{DiskVfs, ReadOnlyVfs, Vfs, VfsFile};
