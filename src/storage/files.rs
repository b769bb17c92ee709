//! The steps with files that the log and the snapshots have in common.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::{Vfs, VfsFile};
use crate::error::{Error, Result};

/// What a file is called until it is whole.
pub(super) const TEMPORARY: &str = ".tmp";

pub(super) use crate::error::OTHER_VERSION;

/// `path` with `suffix` after its name.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Makes `dir`, and makes its entry in the directory above it durable.
pub(super) fn make_dir(vfs: &dyn Vfs, dir: &Path) -> Result<()> {
    vfs.create_dir_all(dir).map_err(Error::io("create directory", dir))?;
    match sync_found(vfs, dir) {
        // Where nothing can be made we did not make it either.
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
            sync_dir(vfs, parent(dir))
        }
        synced => synced,
    }
}

/// Gives the whole and written `file` its name: a name without [`TEMPORARY`] always stands for a
/// file that is complete on disk, because the contents are synced before the rename, and the rename
/// before anything relies on it.
pub(super) fn publish(vfs: &dyn Vfs, file: &dyn VfsFile, from: &Path, to: &Path) -> Result<()> {
    file.sync().map_err(Error::io("sync", from))?;
    vfs.rename(from, to).map_err(Error::io("rename", from))?;
    sync_dir(vfs, to.parent().expect("a published file lies in a directory"))
}

/// Makes the name `path` durable, which an earlier process may have made.
///
/// To sync the directory is not enough: if that process ended because its sync failed, some systems
/// take the name for written. They write it with the next change of the directory, so there is one.
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

/// Removes the temporary files in `dir` that a crash left behind, among the names that are ours.
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

/// Reads the bytes from `offset` up to `end` of an open file, which it keeps open: what happens to
/// the file's name meanwhile is of no concern.
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
