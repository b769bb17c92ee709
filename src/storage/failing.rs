//! A file system that fails, for tests.

use std::any::Any;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{DiskVfs, Vfs, VfsFile};

/// The real file system for a number of changing operations. After that, every change fails. Syncs
/// are only counted, which is faster. Tests that use it do not simulate a loss of power.
pub(crate) struct FailingVfs {
    left: Arc<AtomicU64>,
}

impl FailingVfs {
    /// Fails after `operations` changes.
    pub(crate) fn after(operations: u64) -> Self {
        Self { left: Arc::new(AtomicU64::new(operations)) }
    }

    /// Never fails.
    pub(crate) fn sound() -> Arc<Self> {
        Arc::new(Self::after(u64::MAX))
    }

    /// Fails after `operations` more changes.
    pub(crate) fn fail_after(&self, operations: u64) {
        self.left.store(operations, Ordering::Relaxed);
    }
}

fn count_down(left: &AtomicU64) -> io::Result<()> {
    match left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)) {
        Ok(_) => Ok(()),
        Err(_) => Err(io::Error::other("injected")),
    }
}

impl Vfs for FailingVfs {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        count_down(&self.left)?;
        DiskVfs.create_dir_all(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn VfsFile>> {
        count_down(&self.left)?;
        Ok(Box::new(FailingFile { inner: DiskVfs.create(path)?, left: self.left.clone() }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn VfsFile>> {
        Ok(Box::new(FailingFile { inner: DiskVfs.open(path)?, left: self.left.clone() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        count_down(&self.left)?;
        DiskVfs.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        count_down(&self.left)?;
        DiskVfs.remove(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        DiskVfs.list(path)
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        count_down(&self.left)
    }

    fn lock(&self, path: &Path) -> io::Result<Option<Box<dyn Any + Send>>> {
        DiskVfs.lock(path)
    }
}

struct FailingFile {
    inner: Box<dyn VfsFile>,
    left: Arc<AtomicU64>,
}

impl VfsFile for FailingFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.inner.read_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        count_down(&self.left)?;
        self.inner.write_all_at(buf, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        count_down(&self.left)?;
        self.inner.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn sync(&self) -> io::Result<()> {
        count_down(&self.left)
    }
}
