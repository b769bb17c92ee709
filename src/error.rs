//! The two error types: [`RequestError`] answers a request, [`Error`] stops a member.
//!
//! An error names both sides of a mismatch, the place, and the remedy. Impossible states assert
//! instead.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

/// Why a request was not carried out. Each variant is one status on the client port. For a forwarded
/// membership change, the leader sends it encoded to the member that forwarded it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
pub enum RequestError {
    /// The request is invalid: 400.
    #[error("{0}")]
    Invalid(String),
    /// The request conflicts with the current state: 409.
    #[error("{0}")]
    Conflict(String),
    /// The request names a removed member: 410.
    #[error("{0}")]
    Gone(String),
    /// Nothing was proposed, so repeating the request is safe: 503.
    #[error("{0}")]
    Unavailable(String),
    /// The request may have been proposed, and its outcome is unknown: 504.
    #[error("{0}")]
    Unknown(String),
    /// The request's retry token was used for another one: 422.
    #[error("{0}")]
    Unprocessable(String),
}

impl RequestError {
    /// A 503: `why`, a clause, kept the request from being proposed. Repeating it is safe.
    pub fn unavailable(why: impl Display) -> Self {
        Self::Unavailable(format!("{why}: nothing was changed; try again"))
    }

    /// A 504: `why`, a clause, ended the wait for a request that may have been proposed. A repetition
    /// could be carried out twice, so the client must read first.
    pub fn unknown(why: impl Display) -> Self {
        Self::Unknown(format!(
            "{why} before the outcome was known: it may or may not have been carried out; read before repeating it"
        ))
    }
}

/// An error that stops a member, or keeps it from starting.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag, or a file that a flag names, is invalid: exit status 2.
    #[error("{0}")]
    Config(String),
    /// A file operation failed. After a failed write or sync the file's contents are unknown, so the
    /// process stops, and its next start reads them again.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What failed, as a verb phrase: "write to", "sync".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A file does not contain what was written to it.
    #[error("{} is damaged at offset {offset}: {reason}; {remedy}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The offset in bytes.
        offset: u64,
        /// What was found there, and what was expected.
        reason: String,
        /// What the operator should do.
        remedy: &'static str,
    },
    /// A file has a format version that this program does not read.
    #[error(
        "{} has format version {found}, this program reads version {supported}: run the release \
         that wrote it",
        path.display()
    )]
    OtherVersion {
        /// The file.
        path: PathBuf,
        /// The version of the file.
        found: u32,
        /// The only version that this program reads.
        supported: u32,
    },
    /// The cluster refuses this member, or this member refuses to use its directory.
    #[error("{0}")]
    Refused(String),
    /// This member was removed from the cluster: exit status 0.
    #[error("I've been removed from the cluster! Shutting down.")]
    Removed,
}

/// The remedy for a member whose disk lost data.
pub const REPLACE_MEMBER: &str =
    "this member's data is lost: DELETE it on another member and add it again under a new id";

/// The error of a write to standard output.
pub(crate) fn output_failed(error: io::Error) -> Error {
    Error::io("write to", Path::new("standard output"))(error)
}

/// The innermost source of an error of reqwest: the message of the operating system, or of TLS. The
/// outer ones name only the URL and the layers.
pub(crate) fn cause(mut error: &dyn std::error::Error) -> String {
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

impl Error {
    /// An [`Error::Io`] for `action` on `path`, for use with `map_err`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { action, path, source }
    }

    /// An [`Error::Corrupt`] with another remedy, for a file that is not a member's own. Other errors
    /// stay as they are.
    #[must_use]
    pub fn with_remedy(mut self, instead: &'static str) -> Error {
        if let Error::Corrupt { remedy, .. } = &mut self {
            *remedy = instead;
        }
        self
    }
}

/// A result whose error stops a member.
pub type Result<T> = std::result::Result<T, Error>;
