//! Who the members are, where they listen, which changes are allowed, and who may speak.
//!
//! [`Members`] is replicated state. Only committed entries change it, it travels in snapshots, and
//! each decision on it is a pure function, so that all members decide alike. [`Admission`] is local
//! state: what one member knows about the senders of requests.
//!
//! # Ids and incarnations
//! An id is used once. A removed id stays in the removed set, because a member that was offline may
//! still count it (etcd #18757). An incarnation is the 64 random bits of a data directory. By it,
//! [`Admission`] keeps a member that lost its directory, with the votes and the entries in it, from
//! passing for its former self (raft-rs panics otherwise: `to_commit out of range`).

mod admission;
mod changes;
mod members;
mod urls;

pub use admission::{Admission, Own, Sender};
pub use changes::MemberChange;
pub use members::{
    MEMBERS_MAX, Members, REMOVED_MAX, SILENT_LEARNERS_MAX, SnapshotData, SnapshotMembers, Verdict,
};
pub use urls::{authority, check_url, is_https};
