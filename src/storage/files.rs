//! File operations that the log and the snapshots share.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::{Vfs, VfsFile};
use crate::error::{Error, Result};

/// The suffix of a file's name until the file is complete.
pub(super) const TEMPORARY: &str = ".tmp";

/// `path` with `suffix` appended to its file name.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Creates `dir` and makes its name durable.
pub(super) fn make_dir(vfs: &dyn Vfs, dir: &Path) -> Result<()> {
    vfs.create_dir_all(dir).map_err(Error::io("create directory", dir))?;
    match sync_found(vfs, dir) {
        // This process may not create files in the parent, so it did not create `dir` either.
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
            sync_dir(vfs, parent(dir))
        }
        synced => synced,
    }
}

/// Renames the complete `file` from its temporary name to its final name. A final name always belongs
/// to a complete file: the contents are synced before the rename, and the rename is synced before this
/// returns.
pub(super) fn publish(vfs: &dyn Vfs, file: &dyn VfsFile, from: &Path, to: &Path) -> Result<()> {
    file.sync().map_err(Error::io("sync", from))?;
    vfs.rename(from, to).map_err(Error::io("rename", from))?;
    sync_dir(vfs, to.parent().expect("a published file has a parent directory"))
}

/// Makes the name `path` durable, which an earlier process may have created.
///
/// A sync of the directory is not enough. If the earlier process stopped because its sync failed, some
/// systems consider the name written. They write it with the next change of the directory, so this
/// function makes one.
pub(super) fn sync_found(vfs: &dyn Vfs, path: &Path) -> Result<()> {
    let temporary = with_suffix(path, TEMPORARY);
    vfs.create(&temporary).map_err(Error::io("create", &temporary))?;
    vfs.remove(&temporary).map_err(Error::io("remove", &temporary))?;
    sync_dir(vfs, parent(path))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes the names in `dir` durable.
pub(super) fn sync_dir(vfs: &dyn Vfs, dir: &Path) -> Result<()> {
    vfs.sync_dir(dir).map_err(Error::io("sync directory", dir))
}

/// Removes the temporary files in `dir` whose final names satisfy `is_ours`.
pub(super) fn remove_temporary(
    vfs: &dyn Vfs,
    dir: &Path,
    is_ours: impl Fn(&str) -> bool,
) -> Result<()> {
    for name in vfs.list(dir).map_err(Error::io("list", dir))? {
        if name.strip_suffix(TEMPORARY).is_some_and(&is_ours) {
            let path = dir.join(name);
            vfs.remove(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Reads the bytes from `offset` to `end` of a file. It keeps the file open, so a removed or renamed
/// file can still be read.
pub(super) struct FileReader {
    pub(super) file: Box<dyn VfsFile>,
    pub(super) offset: u64,
    pub(super) end: u64,
}

impl Read for FileReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let wanted = (self.end - self.offset).min(buf.len() as u64) as usize;
        let read = self.file.read_at(&mut buf[..wanted], self.offset)?;
        if read < wanted {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += read as u64;
        Ok(read)
    }
}
