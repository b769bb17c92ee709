//! The one module that names bincode.
//!
//! bincode 2.0.1, fixed-width little-endian integers, always with a size limit and with trailing bytes refused.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use serde::{Deserialize, Serialize};

/// The largest value that is decoded, in bytes: a peer's or a disk's length field must not be able
/// to ask for more. Above the largest value (64 MiB) plus the longest key.
pub const DECODE_LIMIT_BYTES: usize = 96 << 20;

const CONFIG: Configuration<LittleEndian, Fixint, Limit<DECODE_LIMIT_BYTES>> =
    bincode::config::standard().with_fixed_int_encoding().with_limit::<DECODE_LIMIT_BYTES>();

/// What was read is not an encoded `T`.
#[derive(Debug, thiserror::Error)]
#[error("cannot decode {what}: {reason}")]
pub struct DecodeError {
    what: &'static str,
    reason: String,
}

/// Encodes `value`.
///
/// # Panics
/// If `value` cannot be encoded: that is a mistake in its type.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_into(value, &mut bytes);
    bytes
}

/// Encodes `value` behind what `bytes` holds.
///
/// # Panics
/// As [`encode`].
pub fn encode_into<T: Serialize>(value: &T, bytes: &mut Vec<u8>) {
    bincode::serde::encode_into_std_write(value, bytes, CONFIG)
        .expect("our own types can be encoded");
}

/// Decodes a `T` that fills `bytes` exactly; it may borrow from them.
///
/// # Errors
/// [`DecodeError`] if it is not one, is larger than [`DECODE_LIMIT_BYTES`], or bytes are left over.
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
