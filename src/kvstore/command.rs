//! The replicated commands: the payloads of entries.

use std::io;

use ring::digest;
use serde::{Deserialize, Serialize};

use super::Token;
use super::tokens::Retry;
use crate::channels::Index;
use crate::codec;

/// The most conditions of a [`Txn`], and the most operations of each of its branches. The outcome has one
/// bit for each operation.
pub const OPERATIONS_MAX: usize = 128;

/// A replicated command.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Command<'a> {
    /// Set `key` to `value`.
    Put {
        /// The key's bytes.
        #[serde(borrow, with = "serde_bytes")]
        key: &'a [u8],
        /// The value's bytes.
        #[serde(borrow, with = "serde_bytes")]
        value: &'a [u8],
    },
    /// Do what the application port offers beyond that.
    Txn {
        /// Do it at most once.
        retry: Option<Retry>,
        /// What to do.
        #[serde(borrow)]
        txn: Txn<'a>,
    },
}

/// A transaction. Its conditions are evaluated, and one of its branches is carried out, in one step when
/// its entry is applied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Txn<'a> {
    /// All must hold for `then` to be carried out.
    #[serde(borrow)]
    pub conditions: Vec<Condition<'a>>,
    /// The operations if all conditions hold.
    pub then: Vec<Operation<'a>>,
    /// The operations if one does not.
    pub otherwise: Vec<Operation<'a>>,
}

/// A condition on one key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition<'a> {
    /// The key's bytes.
    #[serde(borrow, with = "serde_bytes")]
    pub key: &'a [u8],
    /// What must hold for it.
    pub is: Requirement,
}

/// What a [`Condition`] requires of a key: of its last write's index, which identifies the value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Requirement {
    /// The key does not exist.
    Absent,
    /// The key exists.
    Exists,
    /// The key exists and was written at one of these indexes.
    WrittenAt(Vec<Index>),
    /// The key does not exist, or was written at another index.
    NotWrittenAt(Vec<Index>),
}

/// One operation of a [`Txn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation<'a> {
    /// Set `key` to `value`.
    Put {
        /// The key's bytes.
        #[serde(borrow, with = "serde_bytes")]
        key: &'a [u8],
        /// The value's bytes.
        #[serde(borrow, with = "serde_bytes")]
        value: &'a [u8],
    },
    /// Remove the key.
    Delete {
        /// The key's bytes.
        #[serde(borrow, with = "serde_bytes")]
        key: &'a [u8],
    },
    /// Return the key's record, from before the transaction.
    Get {
        /// The key's bytes.
        #[serde(borrow, with = "serde_bytes")]
        key: &'a [u8],
    },
}

impl<'a> Operation<'a> {
    /// The key's bytes.
    pub fn key(&self) -> &'a [u8] {
        match self {
            Self::Put { key, .. } | Self::Delete { key } | Self::Get { key } => key,
        }
    }
}

impl Requirement {
    /// True if a key fulfils it whose last write is at `index`; `None` if it does not exist.
    pub fn holds(&self, index: Option<Index>) -> bool {
        match self {
            Self::Absent => index.is_none(),
            Self::Exists => index.is_some(),
            Self::WrittenAt(indexes) => index.is_some_and(|index| indexes.contains(&index)),
            Self::NotWrittenAt(indexes) => index.is_none_or(|index| !indexes.contains(&index)),
        }
    }
}

impl<'a> Txn<'a> {
    /// A transaction without conditions.
    pub fn of(operation: Operation<'a>) -> Self {
        Self { then: vec![operation], ..Self::default() }
    }

    /// True if each of its lists is short enough to be applied.
    pub(super) fn fits(&self) -> bool {
        let lengths = [self.conditions.len(), self.then.len(), self.otherwise.len()];
        lengths.into_iter().all(|length| length <= OPERATIONS_MAX)
    }

    /// Encodes it as a command, which is carried out at most once if there is a `token`.
    pub(crate) fn encode(self, token: Option<Token>) -> Vec<u8> {
        let retry = token.map(|token| Retry { token, fingerprint: self.fingerprint() });
        codec::encode(&Command::Txn { retry, txn: self })
    }

    /// Equal for equal transactions only: the first half of the SHA-256 of the encoding.
    fn fingerprint(&self) -> [u8; 16] {
        struct Digest(digest::Context);
        impl io::Write for Digest {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.update(bytes);
                Ok(bytes.len())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut digest = Digest(digest::Context::new(&digest::SHA256));
        codec::encode_into(self, &mut digest);
        *digest.0.finish().as_ref().first_chunk().expect("a SHA-256 has 32 bytes")
    }
}
