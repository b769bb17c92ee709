//! The two kinds of failure: what a request is answered, and what stops a member.
//!
//! Operating errors are values that name both sides of a mismatch, the place and the remedy.
//! Impossible states assert. A failed write or sync is an [`Error`] that ends the process: it is
//! never retried, and nothing that depended on it is sent.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

/// Why a request was not carried out. The client port turns each into one status; a change of
/// members that was passed on is answered with it, encoded, by the member it was passed on to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
pub enum RequestError {
    /// The request itself is wrong: 400.
    #[error("{0}")]
    Invalid(String),
    /// The request is right but not now, or not in this state: 409.
    #[error("{0}")]
    Conflict(String),
    /// The request names something that was removed for good: 410.
    #[error("{0}")]
    Gone(String),
    /// Nothing was proposed, so repeating the request is safe: 503.
    #[error("{0}")]
    Unavailable(String),
    /// The request was proposed and its outcome is not known here: 504.
    #[error("{0}")]
    Unknown(String),
}

impl RequestError {
    /// A 503: `why`, a clause, kept the request from being proposed. Repeating it is safe.
    pub fn unavailable(why: impl Display) -> Self {
        Self::Unavailable(format!("{why}: nothing was changed; try again"))
    }

    /// A 504: `why`, a clause, ended the wait for a request that may have been proposed. A repeated
    /// request may be carried out twice, so the client has to read first.
    pub fn unknown(why: impl Display) -> Self {
        Self::Unknown(format!(
            "{why} before the outcome was known: it may or may not have been carried out; read before repeating it"
        ))
    }
}

/// What stops a member, or keeps it from starting.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag, or what a flag points at, cannot be used: exit status 2.
    #[error("{0}")]
    Config(String),
    /// An operation on a file failed. After a failed write or sync nothing is known about the
    /// file's contents, so the process stops and reads it again when it is started again.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb phrase: "write to", "sync".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A file does not hold what was written to it.
    #[error("{} is damaged at offset {offset}: {reason}; {remedy}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where in the file, in bytes.
        offset: u64,
        /// What was found there, beside what was expected.
        reason: String,
        /// What the operator can do.
        remedy: &'static str,
    },
    /// The cluster refuses this member, or this member refuses its directory.
    #[error("{0}")]
    Refused(String),
    /// This member was removed from the cluster: exit status 0.
    #[error("I've been removed from the cluster! Shutting down.")]
    Removed,
}

/// The remedy for a member whose own disk lost data.
pub const REPLACE_MEMBER: &str =
    "this member's data is lost: DELETE it on another member and add it again under a new id";

/// The remedy for a file of another format version, which is not damaged.
pub const OTHER_VERSION: &str = "open it with the version of this program that wrote it";

impl Error {
    /// An [`Error::Io`] for `action` on `path`, for use with `map_err`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { action, path, source }
    }
}

/// The result of what can stop a member.
pub type Result<T> = std::result::Result<T, Error>;
