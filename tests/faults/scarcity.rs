//! Little processor time and little memory make a member slow, not wrong.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use crate::runner::{FAST, Run, SMALL, rounds};
use crate::support::processes::{Process, skip};

/// Writes acknowledged between two faults.
const WRITES: usize = 30;
/// The files that limit a group of processes, in both versions of cgroups.
struct Resource {
    name: &'static str,
    /// The file of version 1 and its contents.
    first: (&'static str, &'static str),
    /// The file of version 2 and its contents.
    second: (&'static str, &'static str),
}

/// A tenth of a processor.
const PROCESSOR: Resource = Resource {
    name: "cpu",
    first: ("cpu.cfs_quota_us", "10000"),
    second: ("cpu.max", "10000 100000"),
};
const MEMORY: Resource = Resource {
    name: "memory",
    first: ("memory.limit_in_bytes", "100M"),
    second: ("memory.max", "100M"),
};

/// A group of processes with a limit, removed when dropped. It must be empty then.
struct Limited {
    group: PathBuf,
    root: PathBuf,
}

impl Limited {
    /// `None` if groups cannot be made.
    fn new(resource: &Resource) -> Option<Self> {
        static GROUPS: AtomicU32 = AtomicU32::new(0);
        let number = GROUPS.fetch_add(1, Ordering::Relaxed);
        let name = format!("raftexample-test-{}-{number}", std::process::id());
        let mounted = Path::new("/sys/fs/cgroup");
        for (root, (file, limit)) in
            [(mounted.join(resource.name), resource.first), (mounted.to_owned(), resource.second)]
        {
            let limited = Self { group: root.join(&name), root };
            if fs::create_dir(&limited.group).is_ok()
                && fs::write(limited.group.join(file), limit).is_ok()
            {
                return Some(limited);
            }
        }
        None
    }

    fn take(&self, member: &Process) -> bool {
        fs::write(self.group.join("cgroup.procs"), member.pid().to_string()).is_ok()
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        // Only an empty group can be removed.
        for process in
            fs::read_to_string(self.group.join("cgroup.procs")).unwrap_or_default().lines()
        {
            let _ = fs::write(self.root.join("cgroup.procs"), process);
        }
        let _ = fs::remove_dir(&self.group);
    }
}

/// Limits the leader under load, then a follower.
fn starve(kind: &str, resource: &Resource, rounds: usize) {
    let mut run = Run::start(kind, 3, &[&FAST[..], &SMALL].concat());
    for round in 0..rounds {
        let clients = run.load();
        clients.wait_for(WRITES);
        let (leader, follower) = run.leader_and_follower();
        let victim = if round % 2 == 0 { leader } else { follower };
        let limited =
            Limited::new(resource).filter(|limited| limited.take(run.cluster.process(victim)));
        let Some(limited) = limited else {
            return skip(&format!("{kind}: no group of processes can be made with a limit"));
        };
        run.inject();
        // The length of the limit is part of the fault.
        thread::sleep(Duration::from_secs(1));
        clients.wait_for(WRITES);
        drop(limited);
        run.check(clients);
    }
    run.finish();
}

#[test]
fn a_member_with_little_processor_time_or_memory_loses_nothing() {
    starve("a tenth of a processor", &PROCESSOR, 2);
    starve("100 MB of memory", &MEMORY, 1);
}

#[test]
#[ignore = "long: 100 rounds"]
fn a_hundred_members_with_little_processor_time_lose_nothing() {
    starve("a tenth of a processor", &PROCESSOR, rounds(100));
}
