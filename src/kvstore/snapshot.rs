//! The bytes of a snapshot.
//!
//! ```text
//! ┌───────────────┬────────────────┐┌───────────────┬──────────────────────────────────────────────┐
//! │ length u32 LE │ encoded `Head` ││ length u32 LE │ key, value, index and term of its last write │ × records
//! └───────────────┴────────────────┘└───────────────┴──────────────────────────────────────────────┘
//! ```
//! The records are in ascending order of their keys, and the remembered tokens in the order of their writes,
//! so that equal states give equal bytes. The records end with the bytes. The file around them has a length
//! and a checksum.

use std::io::{self, Read, Write};

use crc32c::Crc32cWriter;
use serde::{Deserialize, Serialize};

use super::KeyValue;
use super::state::{InOrder, State};
use super::tokens::Remembered;
use crate::channels::{Index, Term};
use crate::codec;

/// What stands before the records.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Head {
    /// The index and term of the last entry in the state.
    pub index: Index,
    pub term: Term,
    /// The index of the write whose retry token was forgotten last.
    pub floor: Index,
    /// The retry tokens that are remembered.
    pub remembered: Vec<Remembered>,
}

/// One key.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record<'a> {
    #[serde(borrow, with = "serde_bytes")]
    key: &'a [u8],
    #[serde(borrow, with = "serde_bytes")]
    value: &'a [u8],
    index: Index,
    term: Term,
}

/// The state at one moment. The store changes independently of it.
pub struct View {
    head: Head,
    records: Vec<KeyValue>,
}

impl View {
    pub(super) fn of(state: &State) -> Self {
        Self { head: state.head(), records: state.records.iter().cloned().collect() }
    }

    /// The number of keys.
    pub fn keys(&self) -> usize {
        self.records.len()
    }

    /// The index and the term of the last entry in the state; 0 and 0 if there is none.
    pub fn applied(&self) -> (Index, Term) {
        (self.head.index, self.head.term)
    }

    /// The CRC32C of the bytes that [`write`](Self::write) writes.
    pub fn checksum(self) -> u32 {
        let mut out = Crc32cWriter::new(io::sink());
        self.write(&mut out).expect("computing a checksum cannot fail");
        out.crc32c()
    }

    /// Writes the state as the module's documentation describes.
    pub fn write(mut self, file: &mut dyn Write) -> io::Result<()> {
        // Not under the lock of the state.
        self.records.sort_by_cached_key(InOrder::new);
        let mut block = Vec::new();
        write_block(file, &self.head, &mut block)?;
        for record in self.records {
            let (key, value, index, term) =
                (record.key(), record.value(), record.index(), record.term());
            write_block(file, &Record { key, value, index, term }, &mut block)?;
        }
        Ok(())
    }
}

/// Writes `content` with its length, in the memory of `block`.
fn write_block(
    file: &mut dyn Write,
    content: &impl Serialize,
    block: &mut Vec<u8>,
) -> io::Result<()> {
    block.clear();
    codec::encode_into(content, block);
    let length = u32::try_from(block.len()).expect("a record has at most 96 MiB, a head less");
    file.write_all(&length.to_le_bytes())?;
    file.write_all(block)
}

/// Reads the application bytes of a snapshot: its head, and an iterator over its records, up to the first
/// error.
pub(crate) fn read_state<R: Read>(
    mut reader: R,
) -> io::Result<(Head, impl Iterator<Item = io::Result<KeyValue>>)> {
    let head = read_block(&mut reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    let head = codec::decode(&head).map_err(invalid)?;
    let records = std::iter::from_fn(move || read_record(&mut reader).transpose());
    Ok((head, records))
}

pub(super) fn invalid(reason: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.to_string())
}

/// Reads one record; `None` at the end of the bytes.
fn read_record(reader: &mut impl Read) -> io::Result<Option<KeyValue>> {
    let Some(block) = read_block(reader)? else { return Ok(None) };
    let Record { key, value, index, term } = codec::decode(&block).map_err(invalid)?;
    Ok(Some(KeyValue::new(key, value, index, term)))
}

/// Reads a length and as many bytes; `None` at the end of the bytes, which may be only before a length.
fn read_block(reader: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    if reader.read(&mut length[..1])? == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut length[1..])?;
    let length = u32::from_le_bytes(length) as usize;
    if length > codec::DECODE_LIMIT_BYTES {
        return Err(invalid(format!("a record of {length} bytes is too long")));
    }
    // Memory for what is there, not for what the length claims.
    let mut block = Vec::new();
    if reader.take(length as u64).read_to_end(&mut block)? < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(block))
}

/// The number of records in the application bytes of a snapshot, if they are records.
pub(crate) fn count_records(reader: impl Read) -> io::Result<u64> {
    read_state(reader)?.1.try_fold(0, |keys, record| record.map(|_| keys + 1))
}
