//! Random lives of a log: a crash, a failing operation or a write that stops anywhere, a restart with or
//! without a power cut, again and again; and files cut short in between.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use raft::eraftpb::Entry;
use raftexample::error::{Error, Result};
use raftexample::storage::wal::{Frame, Identity, Sizes, Wal, exists};

use crate::support::memory::*;
use crate::support::random::Random;

const LIVES: usize = 14;

fn dir() -> PathBuf {
    Path::new(DATA).join("log")
}

/// What must be on the disk, and what may be.
#[derive(Default)]
struct History {
    acknowledged: Vec<Entry>,
    under_way: Vec<Entry>,
    is_created: bool,
}

impl History {
    /// One run of a process, up to the first error.
    fn live(&mut self, disk: &MemVfs, sizes: Sizes, random: &mut Random) -> Result<()> {
        let vfs = Arc::new(disk.clone());
        let mut wal = if exists(disk, &dir())? {
            let (wal, recovered) = Wal::open(vfs, &dir(), sizes)?;
            let with_both = [&self.acknowledged[..], &self.under_way[..]].concat();
            if recovered.entries == with_both {
                self.acknowledged = with_both;
            }
            assert_eq!(recovered.entries, self.acknowledged);
            self.under_way.clear();
            wal
        } else {
            assert!(!self.is_created, "the log is gone");
            let known =
                Identity { cluster_id: 0, member_id: 1, incarnation: 7, first_urls_hash: 0 };
            Wal::create(vfs, &dir(), &known, sizes)?
        };
        self.is_created = true;
        for _ in 0..40 {
            let first = self.acknowledged.len() as u64 + 1;
            let longest = [60, 1400][random.below(2) as usize];
            self.under_way = (first..=first + random.below(2))
                .map(|index| {
                    let fill = [0, 0xff, index as u8 | 5][random.below(3) as usize];
                    let data = Bytes::from(vec![fill; random.below(longest) as usize]);
                    Entry { index, term: 1, data, ..Entry::default() }
                })
                .collect();
            wal.save(&Frame { entries: &self.under_way, ..Frame::default() })?;
            self.acknowledged.append(&mut self.under_way);
        }
        Ok(())
    }

    /// A last segment that something cut short is refused, or holds everything.
    fn check_cuts(&self, disk: &MemVfs) {
        let mut segments = disk.paths();
        segments.retain(|path| path.extension().is_some_and(|extension| extension == "wal"));
        let Some(last) = segments.last() else { return };
        let whole = disk.contents(last);
        for length in (0..=whole.len()).step_by(16) {
            let image = disk.image();
            image.put(last, &whole[..length]);
            match Wal::read(&image, &dir()) {
                Ok(found) => assert!(
                    found.entries.starts_with(&self.acknowledged),
                    "cut to {length} of {} bytes: {} of {} entries",
                    whole.len(),
                    found.entries.len(),
                    self.acknowledged.len()
                ),
                Err(error) => assert!(matches!(error, Error::Corrupt { .. }), "{error}"),
            }
        }
    }
}

fn run(seed: u64, is_cut: bool) {
    let mut random = Random::new(seed);
    let sizes = Sizes {
        segment_bytes: [1, 600, 2048, 8192, 1 << 20][random.below(5) as usize],
        step_bytes: [32, 48, 64, 512, 1024, 4096][random.below(6) as usize],
    };
    let mut disk = MemVfs::default();
    let mut history = History::default();
    for life in 1..=LIVES {
        if life < LIVES {
            let kind = std::io::ErrorKind::Other;
            let fault = match random.below(4) {
                0 => Fault::Crash,
                1 => Fault::Fails(kind),
                _ => Fault::FailsAfter(kind, random.below(1500) as usize),
            };
            let soon = [3, 6, 12, 40][random.below(4) as usize];
            disk.inject(1 + random.below(soon), fault);
        }
        if let Err(error) = history.live(&disk, sizes, &mut random) {
            assert!(matches!(error, Error::Io { .. }), "life {life}: {error}");
        }
        disk = disk.crash(match random.below(3) {
            0 => Survives::Nothing,
            1 => Survives::Everything,
            _ => Survives::Some(random.below(u64::MAX)),
        });
        if is_cut {
            history.check_cuts(&disk);
        }
    }
}

#[test]
fn a_log_outlives_any_sequence_of_crashes_and_failures() {
    for seed in 0..4_000 {
        run(seed, false);
    }
}

#[test]
fn no_cut_of_any_log_loses_an_entry_unnoticed() {
    for seed in 0..200 {
        run(seed, true);
    }
}
