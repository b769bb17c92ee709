//! The bytes of a snapshot file: encoding and checking.

use std::io;
use std::ops::Range;
use std::path::Path;

use crate::channels::SnapshotFile;
use crate::error::{Error, REPLACE_MEMBER, Result};
use crate::storage::VfsFile;
use crate::storage::wal::SnapshotId;

/// The first bytes of a snapshot file.
pub const MAGIC: [u8; 8] = *b"raftsnap";
/// The version of snapshot files and backups. A program reads and writes this one only. The module
/// [`wal`](crate::storage::wal) states what raises it.
pub const VERSION: u32 = 3;
/// The most meta bytes: many times what 64 members and 10,000 removed ids take.
const META_BYTES_MAX: u64 = 4 << 20;
/// The length in bytes of the header before the meta bytes.
const FIXED_BYTES: usize = 32;
/// The length of a checksum in bytes.
const CHECKSUM_BYTES: usize = 4;
/// The length of the trailer in bytes.
const TRAILER_BYTES: usize = 12;
/// How many bytes are read at a time.
pub(super) const BUFFER_BYTES: usize = 1 << 20;

/// Encodes the header of a snapshot file.
pub(super) fn encode_header(id: SnapshotId, meta: &[u8]) -> Vec<u8> {
    let meta_length = u32::try_from(meta.len()).expect("the members take far less than 4 GiB");
    let mut header = Vec::with_capacity(FIXED_BYTES + meta.len() + CHECKSUM_BYTES);
    header.extend_from_slice(&MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&meta_length.to_le_bytes());
    header.extend_from_slice(&id.index.to_le_bytes());
    header.extend_from_slice(&id.term.to_le_bytes());
    header.extend_from_slice(meta);
    header.extend_from_slice(&masked(crc32c::crc32c(&header)).to_le_bytes());
    header
}

/// Encodes the trailer of a snapshot file. `checksum` is the plain CRC32C of all bytes before it.
pub(super) fn encode_trailer(application_length: u64, checksum: u32) -> Vec<u8> {
    let mut trailer = application_length.to_le_bytes().to_vec();
    let checksum = masked(crc32c::crc32c_append(checksum, &trailer));
    trailer.extend_from_slice(&checksum.to_le_bytes());
    trailer
}

/// The mask of LevelDB, for a CRC32C that is stored after the bytes that it covers.
fn masked(checksum: u32) -> u32 {
    checksum.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The contents of a file that passed [`check`].
pub(super) struct Checked {
    pub id: SnapshotId,
    pub meta: Vec<u8>,
    pub file: SnapshotFile,
    /// The offsets of the application bytes.
    pub application: Range<u64>,
}

fn damage(path: &Path, offset: u64, reason: String) -> Error {
    Error::Corrupt { path: path.to_owned(), offset, reason, remedy: REPLACE_MEMBER }
}

/// Reads and checks the whole file, which is at `path`. If `named` is given, the file must hold that
/// snapshot.
pub(super) fn check(file: &dyn VfsFile, path: &Path, named: Option<SnapshotId>) -> Result<Checked> {
    let damage = |offset, reason| Err(damage(path, offset, reason));
    let length = file.len().map_err(Error::io("read", path))?;
    let least = (FIXED_BYTES + CHECKSUM_BYTES + TRAILER_BYTES) as u64;
    if length < least {
        let reason = format!("the file has {length} bytes, a snapshot has at least {least}");
        return damage(length, reason);
    }
    let fixed: [u8; FIXED_BYTES] = read_array(file, path, 0)?;
    let meta_length = number::<4>(&fixed, 12);
    let header_length = FIXED_BYTES as u64 + meta_length + CHECKSUM_BYTES as u64;
    let Some(application_length) = (length - TRAILER_BYTES as u64).checked_sub(header_length)
    else {
        let reason = format!("{meta_length} meta bytes do not fit into a file of {length} bytes");
        return damage(12, reason);
    };
    if meta_length > META_BYTES_MAX {
        let reason = format!("{meta_length} meta bytes are more than {META_BYTES_MAX}");
        return damage(12, reason);
    }
    let application = header_length..header_length + application_length;
    let mut header = vec![0; header_length as usize];
    read_exact(file, path, &mut header, 0)?;
    let id = check_header(&header, path, named)?;
    let (checksum, file_checksum) = checksums(file, path, length)?;
    let trailer: [u8; TRAILER_BYTES] = read_array(file, path, application.end)?;
    let (stated_length, stated) = (number::<8>(&trailer, 0), number::<4>(&trailer, 8));
    if stated_length != application_length {
        let reason = format!(
            "the file has {application_length} application bytes, its trailer states \
             {stated_length}"
        );
        return damage(application.end, reason);
    }
    if stated != u64::from(checksum) {
        let reason =
            format!("the file has checksum {checksum:#010x}, its trailer states {stated:#010x}");
        return damage(length - CHECKSUM_BYTES as u64, reason);
    }
    header.truncate(FIXED_BYTES + meta_length as usize);
    let meta = header.split_off(FIXED_BYTES);
    let file = SnapshotFile { length, checksum: file_checksum };
    Ok(Checked { id, meta, file, application })
}

fn check_header(header: &[u8], path: &Path, named: Option<SnapshotId>) -> Result<SnapshotId> {
    let damage = |offset, reason| Err(damage(path, offset, reason));
    let (magic, end) = (&header[..MAGIC.len()], header.len() - CHECKSUM_BYTES);
    if magic != MAGIC {
        return damage(0, format!("the file begins with {magic:02x?}, expected {MAGIC:02x?}"));
    }
    let (checksum, stated) = (masked(crc32c::crc32c(&header[..end])), number::<4>(header, end));
    let found = number::<4>(header, 8) as u32;
    // Another version may have another layout, so its checksum means nothing here. But if the
    // checksum is right for our version, a flipped bit changed the version: that is damage.
    let mut as_ours = header[..end].to_vec();
    as_ours[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let is_ours = stated == u64::from(masked(crc32c::crc32c(&as_ours)));
    if found != VERSION && !is_ours {
        return Err(Error::OtherVersion { path: path.to_owned(), found, supported: VERSION });
    }
    if stated != u64::from(checksum) {
        let reason = format!("the header has checksum {checksum:#010x}, but states {stated:#010x}");
        return damage(end as u64, reason);
    }
    let held = SnapshotId { index: number::<8>(header, 16), term: number::<8>(header, 24) };
    match named {
        Some(id) if id != held => {
            damage(16, format!("the file holds {held:?}, its name states {id:?}"))
        }
        _ => Ok(held),
    }
}

/// Reads the meta bytes of a file of `length` bytes and the offsets of its application bytes, without
/// checking anything.
pub(super) fn read_unchecked(
    file: &dyn VfsFile,
    path: &Path,
    length: u64,
) -> Result<(Vec<u8>, Range<u64>)> {
    let fixed: [u8; FIXED_BYTES] = read_array(file, path, 0)?;
    let mut meta = vec![0; number::<4>(&fixed, 12).min(META_BYTES_MAX) as usize];
    read_exact(file, path, &mut meta, FIXED_BYTES as u64)?;
    let start = (FIXED_BYTES + meta.len() + CHECKSUM_BYTES) as u64;
    Ok((meta, start..length - TRAILER_BYTES as u64))
}

/// The checksums of a file of `length` bytes: the masked one of all bytes before the last field, and
/// the plain one of the whole file.
pub(super) fn checksums(file: &dyn VfsFile, path: &Path, length: u64) -> Result<(u32, u32)> {
    let covered = length - CHECKSUM_BYTES as u64;
    let mut buffer = vec![0; BUFFER_BYTES];
    let (mut checksum, mut offset) = (0, 0);
    while offset < covered {
        let piece = &mut buffer[..(covered - offset).min(BUFFER_BYTES as u64) as usize];
        read_exact(file, path, piece, offset)?;
        checksum = crc32c::crc32c_append(checksum, piece);
        offset += piece.len() as u64;
    }
    let last: [u8; CHECKSUM_BYTES] = read_array(file, path, covered)?;
    Ok((masked(checksum), crc32c::crc32c_append(checksum, &last)))
}

fn read_exact(file: &dyn VfsFile, path: &Path, buffer: &mut [u8], offset: u64) -> Result<()> {
    let read = match file.read_at(buffer, offset) {
        Ok(read) if read < buffer.len() => Err(io::ErrorKind::UnexpectedEof.into()),
        read => read,
    };
    read.map(|_| ()).map_err(Error::io("read", path))
}

fn read_array<const N: usize>(file: &dyn VfsFile, path: &Path, offset: u64) -> Result<[u8; N]> {
    let mut array = [0; N];
    read_exact(file, path, &mut array, offset)?;
    Ok(array)
}

/// Decodes the number in the `N` bytes from `at` on. `N` is at most 8.
fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number[..N].copy_from_slice(&bytes[at..at + N]);
    u64::from_le_bytes(number)
}
