//! The last changes, for those who watch keys.
//!
//! A watcher keeps no queue here: it asks for the changes after its [`Cursor`]. So any number of watchers
//! share the same bounded memory, and a slow one loses its place instead of growing.
//!
//! The history is not replicated. A member that starts again builds it from its log, and one that installs a
//! snapshot begins anew after it.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use super::KeyValue;
use crate::channels::{Index, Term};

/// The most changes that are kept.
const CHANGES_MAX: usize = 65_536;
/// The most bytes of keys and values that are kept, except those of the newest change.
const BYTES_MAX: usize = 16 << 20;
/// Keys and values of this size together are copied. Longer ones are shared with the record.
///
/// The copies lie one after another in memory. To keep every record until its change is forgotten would
/// spread the few that a busy member needs over 11 MB: that took 0.7 microseconds of a core for each PUT at
/// each member, in cache misses.
const COPIED_BYTES_MAX: usize = 1024;
/// Copies are made into memory of this size.
const BLOCK_BYTES: usize = 64 * 1024;
/// Changes that one call of [`History::after`] looks at, so that it holds the lock for a short time.
const SCANNED_MAX: usize = 1024;

/// A place between two changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    /// The entry of the change before it.
    pub index: Index,
    /// The position of that change in its entry, from 0 on; [`END`](Self::END) after the last one.
    pub position: u32,
}

impl Cursor {
    /// A position after all changes of an entry.
    pub const END: u32 = u32::MAX;

    /// The place after all changes of the entry at `index`.
    pub fn after(index: Index) -> Self {
        Self { index, position: Self::END }
    }
}

/// One change of a key.
#[derive(Clone, Debug)]
pub struct Change {
    cursor: Cursor,
    term: Term,
    key_length: u32,
    /// True if the key was removed.
    pub is_removal: bool,
    /// The key, then the value.
    bytes: Bytes,
}

impl Change {
    /// The place after this change.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// The index of the entry that changed the key.
    pub fn index(&self) -> Index {
        self.cursor.index
    }

    /// The term of the entry that changed the key.
    pub fn term(&self) -> Term {
        self.term
    }

    /// The key's bytes.
    pub fn key(&self) -> &[u8] {
        &self.bytes[..self.key_length as usize]
    }

    /// The value's bytes, none if the key was removed.
    pub fn value(&self) -> &[u8] {
        &self.bytes[self.key_length as usize..]
    }
}

/// What [`History::after`] found.
#[derive(Clone, Debug)]
pub enum Changes {
    /// These changes, in order, and the place after the last one that was looked at.
    Kept(Vec<Change>, Cursor),
    /// Some changes after the cursor are no longer kept.
    Lost,
}

/// The last changes, in the order of the log.
#[derive(Debug, Default)]
pub(super) struct History {
    changes: VecDeque<Change>,
    bytes: usize,
    /// Every change after this place is kept.
    floor: Cursor,
    /// Where the next copy is made.
    block: BytesMut,
    /// True if nobody can watch: nothing is kept, and every place is lost.
    pub is_off: bool,
}

impl History {
    /// Adds the change that made a key what `record` says, at `position` in its entry.
    pub fn push(&mut self, record: &KeyValue, position: u32, is_removal: bool) {
        if self.is_off {
            return;
        }
        let (key, value) = (record.key(), record.value());
        let bytes = if record.bytes() <= COPIED_BYTES_MAX {
            if self.block.capacity() < record.bytes() {
                self.block = BytesMut::with_capacity(BLOCK_BYTES);
            }
            self.block.extend_from_slice(key);
            self.block.extend_from_slice(value);
            self.block.split().freeze()
        } else {
            record.clone().into_bytes()
        };
        self.bytes += bytes.len();
        self.changes.push_back(Change {
            cursor: Cursor { index: record.index(), position },
            term: record.term(),
            key_length: key.len() as u32,
            is_removal,
            bytes,
        });
        while self.changes.len() > CHANGES_MAX || self.bytes > BYTES_MAX && self.changes.len() > 1 {
            let oldest = self.changes.pop_front().expect("there are two at least");
            self.bytes -= oldest.bytes.len();
            self.floor = oldest.cursor();
        }
    }

    /// Begins anew after a snapshot at `index`.
    pub fn restart(&mut self, index: Index) {
        *self = Self { floor: Cursor::after(index), ..Self::default() };
    }

    /// Keeps nothing from now on.
    pub fn turn_off(&mut self) {
        *self = Self { is_off: true, ..Self::default() };
    }

    /// At most `max` changes of keys that start with `prefix`, after `cursor`.
    pub fn after(&self, cursor: Cursor, prefix: &[u8], max: usize) -> Changes {
        if self.is_off || cursor < self.floor {
            return Changes::Lost;
        }
        let first = self.changes.partition_point(|change| change.cursor() <= cursor);
        let (mut found, mut reached, mut next) = (Vec::new(), cursor, first);
        while let Some(change) = self.changes.get(next)
            && found.len() < max
            && next - first < SCANNED_MAX
        {
            reached = change.cursor();
            if change.key().starts_with(prefix) {
                found.push(change.clone());
            }
            next += 1;
        }
        if let Some(last) = self.changes.back().filter(|_| next == self.changes.len()) {
            // An entry's changes are added in one step. A watcher that has seen the last one would else lose
            // its place to a snapshot that ends with this entry.
            reached = reached.max(Cursor::after(last.index()));
        }
        Changes::Kept(found, reached)
    }
}

/// A record that stands for the removal of `key`.
pub(super) fn removal(key: &[u8], index: Index, term: Term) -> KeyValue {
    KeyValue::new(key, b"", index, term)
}
