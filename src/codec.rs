//! The encoding of commands, snapshots and peer requests. No other module uses bincode.
//!
//! The format is bincode 2.0.1 with fixed-width little-endian integers.

use std::io::Write;

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use serde::{Deserialize, Serialize};

/// The limit for a decoded value in bytes. A length field from a peer or a disk cannot make the decoder
/// allocate more. It exceeds the largest value (64 MiB) plus the longest key.
pub const DECODE_LIMIT_BYTES: usize = 96 << 20;

const CONFIG: Configuration<LittleEndian, Fixint, Limit<DECODE_LIMIT_BYTES>> =
    bincode::config::standard().with_fixed_int_encoding().with_limit::<DECODE_LIMIT_BYTES>();

/// The bytes are not an encoded value of the expected type.
#[derive(Debug, thiserror::Error)]
#[error("cannot decode {what}: {reason}")]
pub struct DecodeError {
    what: &'static str,
    reason: String,
}

/// Encodes `value`. Panics if its type has no encoding.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_into(value, &mut bytes);
    bytes
}

/// Writes the encoded `value` to `out`, as [`encode`]. Panics if `out` fails.
pub fn encode_into<T: Serialize>(value: &T, out: &mut impl Write) {
    bincode::serde::encode_into_std_write(value, out, CONFIG).expect("the type has an encoding");
}

/// Decodes a `T` from all of `bytes`. The value may borrow from them. Fails if the value is larger than
/// [`DECODE_LIMIT_BYTES`], or if bytes are left over.
pub fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, DecodeError> {
    let what = std::any::type_name::<T>();
    let (value, used) = bincode::serde::borrow_decode_from_slice(bytes, CONFIG)
        .map_err(|error| DecodeError { what, reason: error.to_string() })?;
    if used != bytes.len() {
        let reason = format!("{} bytes are left over", bytes.len() - used);
        return Err(DecodeError { what, reason });
    }
    Ok(value)
}
