//! One key with its value, in one allocation.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};

use bytes::Bytes;
use triomphe::ThinArc;

use crate::channels::{Index, Term};

/// A key, its value, and the entry that wrote it. Compared, ordered and hashed by the key.
///
/// Clones share one allocation, and each is as large as one pointer: the hash map, the ordered index and a
/// snapshot hold the same record. Separate allocations for key and value would
/// nearly double the memory of small records.
#[derive(Clone)]
pub struct KeyValue(ThinArc<Head, u8>);

/// What stands before the bytes of the key, which the bytes of the value follow.
#[derive(Clone, Copy)]
struct Head {
    index: Index,
    term: Term,
    key_length: u32,
}

impl KeyValue {
    pub(crate) fn new(key: &[u8], value: &[u8], index: Index, term: Term) -> Self {
        let key_length = u32::try_from(key.len()).expect("entries are far smaller than 4 GiB");
        let head = Head { index, term, key_length };
        Self(ThinArc::from_header_and_slice(head, &[key, value].concat()))
    }

    fn head(&self) -> Head {
        self.0.header.header
    }

    /// The bytes of key and value.
    pub(super) fn bytes(&self) -> usize {
        self.0.slice.len()
    }

    /// The index of the entry that wrote the value.
    pub fn index(&self) -> Index {
        self.head().index
    }

    /// The term of the entry that wrote the value.
    pub fn term(&self) -> Term {
        self.head().term
    }

    /// The key's bytes.
    pub fn key(&self) -> &[u8] {
        &self.0.slice[..self.head().key_length as usize]
    }

    /// The value's bytes.
    pub fn value(&self) -> &[u8] {
        &self.0.slice[self.head().key_length as usize..]
    }

    /// The value's bytes, without copying them.
    pub fn into_value(self) -> Bytes {
        let key_length = self.key().len();
        self.into_bytes().split_off(key_length)
    }

    /// The key's bytes, then the value's, without copying them.
    pub(super) fn into_bytes(self) -> Bytes {
        struct Owner(KeyValue);
        impl AsRef<[u8]> for Owner {
            fn as_ref(&self) -> &[u8] {
                &self.0.0.slice
            }
        }
        Bytes::from_owner(Owner(self))
    }
}

impl fmt::Debug for KeyValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (key, bytes) = (self.key().escape_ascii(), self.value().len());
        write!(f, "{key}: {bytes} bytes, index {}, term {}", self.index(), self.term())
    }
}

impl Borrow<[u8]> for KeyValue {
    fn borrow(&self) -> &[u8] {
        self.key()
    }
}

impl Hash for KeyValue {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl PartialEq for KeyValue {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for KeyValue {}

impl PartialOrd for KeyValue {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for KeyValue {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(other.key())
    }
}
