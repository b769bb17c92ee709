//! Every state that a crash can leave on a disk: for every prefix of a scenario's operations, the
//! synced data, all data, and samples of the unsynced sectors and directory operations. From each
//! state, a member recovers a prefix of the written log that holds everything acknowledged,
//! recovers the same again, and continues.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use raft::eraftpb::{Entry, HardState};
use raftexample::channels::{Acknowledged, MemberRequest};
use raftexample::error::Result;
use raftexample::raft_node::NodeConfig;
use raftexample::storage::wal::{self, Frame, Identity, Recovered, Sizes, SnapshotId, Wal};

use crate::support::memory::*;
use crate::support::random::Random;

/// A few frames per segment; most frames span two or three sectors.
const SEGMENT_BYTES: u64 = 4096;

/// The images that were recovered so far, for the guide.
static IMAGES: AtomicU64 = AtomicU64::new(0);

/// What survives of each prefix; the seeds differ between prefixes.
fn survivals(prefix: usize, seeds: u64) -> impl Iterator<Item = Survives> {
    let first = prefix as u64 * seeds;
    [Survives::Nothing, Survives::Everything]
        .into_iter()
        .chain((first..first + seeds).map(Survives::Some))
}

/// The writes of a scenario, and the acknowledgements to others.
#[derive(Default)]
struct Life {
    config: Option<NodeConfig>,
    /// By index. No entry is overwritten.
    entries: BTreeMap<u64, Entry>,
    /// Index, key and value, in order of index.
    puts: Vec<(u64, String, String)>,
    /// The number of file operations, and the log index acknowledged after them.
    acknowledged: Vec<(usize, u64)>,
}

impl Life {
    fn start(&self, disk: &MemVfs) -> Result<Member> {
        let config = self.config.as_ref().unwrap();
        Member::start(config, disk, &Transcript::default())
    }

    fn acknowledged_after(&self, operations: usize) -> u64 {
        let known = self.acknowledged.iter().filter(|(at, _)| *at <= operations);
        known.map(|(_, index)| *index).max().unwrap_or(0)
    }

    fn values_at(&self, index: u64) -> BTreeMap<&str, &str> {
        let puts = self.puts.iter().take_while(|(at, ..)| *at <= index);
        puts.map(|(_, key, value)| (key.as_str(), value.as_str())).collect()
    }

    fn check_values(&self, member: &mut Member, index: u64, what: &str) {
        let state = member.state();
        let found: BTreeMap<&str, &str> =
            state.iter().map(|(key, (value, ..))| (key.as_str(), value.as_str())).collect();
        assert_eq!(found, self.values_at(index), "{what}: the state at index {index}");
    }

    /// Starts a member on `disk`. Returns it after a second start, with the last index of its log.
    fn check_recovery(&self, disk: &MemVfs, acknowledged: u64, what: &str) -> (Member, u64) {
        IMAGES.fetch_add(1, Ordering::Relaxed);
        let start = |disk: &MemVfs| {
            self.start(disk).unwrap_or_else(|error| panic!("{what}: it does not start: {error}"))
        };
        let mut member = start(disk);
        let wal = member.wal();
        for entry in &wal.entries {
            assert_eq!(Some(entry), self.entries.get(&entry.index), "{what}: what was written");
        }
        let newest_mark = wal.marks.last().map_or(0, |mark| mark.index);
        let last = wal.last_index().max(newest_mark);
        assert!(acknowledged <= last, "{what}: {acknowledged} was acknowledged, it ends at {last}");
        assert!(wal.hard_state.commit <= last, "{what}: {:?}", wal.hard_state);
        let applied = member.status().applied;
        self.check_values(&mut member, applied, what);
        let state = member.state_bytes();

        // Whatever the state was, the data it read is on disk now.
        let mut member = start(&member.crash(Survives::Nothing));
        assert_eq!(member.wal(), wal, "{what}: the log at a second start");
        assert_eq!(member.state_bytes(), state, "{what}: the state at a second start");
        (member, last)
    }

    /// Like `check_recovery`, for a single member, which then serves what it recovered, adds to it,
    /// and finds both again.
    fn check_recovery_and_more(&self, disk: &MemVfs, acknowledged: u64, what: &str) {
        let (mut member, last) = self.check_recovery(disk, acknowledged, what);
        member.tick_until_leader().unwrap();
        assert!(member.status().applied >= last, "{what}: {:?}", member.status());
        self.check_values(&mut member, last, what);
        assert!(member.put("more", "value").unwrap().is_ok(), "{what}");
        let state = member.state();
        let mut member = self.start(&member.crash(Survives::Nothing)).unwrap();
        member.tick_until_leader().unwrap();
        assert_eq!(member.state(), state, "{what}: the state after the next write");
    }
}

fn index_of(mut answer: Answer<Acknowledged>) -> u64 {
    match answer.get() {
        Some(Ok(Acknowledged::Applied { index, .. })) => *index,
        other => panic!("{other:?}"),
    }
}

/// A single member from its first start on, with snapshots, new segments and purges.
fn life_of_a_single_member() -> (Life, Vec<MemVfs>) {
    let config = NodeConfig {
        snapshot_count: 5,
        snapshot_catch_up_entries: 2,
        wal_sizes: sizes(SEGMENT_BYTES),
        ..config(1, 1)
    };
    let mut life = Life { config: Some(config), ..Life::default() };
    let disk = MemVfs::default();
    disk.record_states();
    let mut member = life.start(&disk).unwrap();
    member.tick_until_leader().unwrap();
    for number in 0..20_usize {
        let (key, value) = (format!("key{}", number % 7), format!("{number} ").repeat(number * 29));
        let answer = member.put(&key, &value).unwrap();
        let index = index_of(answer);
        life.puts.push((index, key, value));
        life.acknowledged.push((disk.operations() as usize, index));
        life.entries.extend(member.wal().entries.into_iter().map(|entry| (entry.index, entry)));
    }
    member.node.stop().unwrap();
    let all = member.transcript.lines().join("\n");
    for part in ["with mark", ".snap.0.tmp to", ".wal.tmp to", "remove raftexample-1/", "-snap/"] {
        assert!(all.contains(part), "no {part} in:\n{all}");
    }
    (life, disk.states())
}

#[test]
fn a_single_member_recovers_from_every_crash_state() {
    let (life, states) = life_of_a_single_member();
    for (operations, state) in states.iter().enumerate() {
        let acknowledged = life.acknowledged_after(operations);
        for survives in survivals(operations, 8) {
            let what = format!("after {operations} operations, {survives:?}");
            let image = state.copy().crash(survives);
            life.check_recovery_and_more(&image, acknowledged, &what);
        }
    }
    // With one thread, this test is the last.
    println!("{} images so far", IMAGES.load(Ordering::Relaxed));
}

#[test]
fn a_crash_during_recovery_from_a_crash_loses_nothing() {
    let (life, states) = life_of_a_single_member();
    for (operations, state) in states.iter().enumerate() {
        let acknowledged = life.acknowledged_after(operations);
        let survives = match operations % 3 {
            0 => Survives::Everything,
            _ => Survives::Some(operations as u64),
        };
        let image = state.crash(survives);
        image.record_states();
        drop(life.start(&image).unwrap());
        for (again, state) in image.states().iter().enumerate() {
            let survives = Survives::Some((operations * 100 + again) as u64);
            let what =
                format!("after {operations} operations, and {again} of the start, {survives:?}");
            life.check_recovery_and_more(&state.crash(survives), acknowledged, &what);
        }
    }
}

/// Puts ten values through the leader, member 1.
fn ten_puts(network: &mut Network, life: &mut Life) {
    for number in 0..10_usize {
        let (key, value) = (format!("key{}", number % 4), format!("{number} ").repeat(number * 61));
        let answer = network.put(1, &key, &value);
        life.puts.push((index_of(answer), key, value));
    }
}

/// Records what member `id` acknowledged; returns the disk before each operation.
fn observe(network: &mut Network, id: u64, life: &mut Life) -> Vec<MemVfs> {
    let disk = network.member(id).disk.clone();
    life.config = Some(network.member(id).config.clone());
    let leader = network.member(1).wal();
    life.entries = leader.entries.into_iter().map(|entry| (entry.index, entry)).collect();
    let mut operations = 0;
    for line in network.transcript.of(id) {
        let line = line.split_once(' ').unwrap().1;
        if let Some((_, index)) = line.rsplit_once(", has ") {
            life.acknowledged.push((operations, index.parse().unwrap()));
        }
        let is_operation = ["send ", "commit ", "log ", "answer "];
        operations += usize::from(!is_operation.iter().any(|other| line.starts_with(other)));
    }
    let states = disk.states();
    assert_eq!(states.len(), operations + 1, "each operation is in the transcript");
    assert!(!life.acknowledged.is_empty());
    states
}

/// From its own disk alone, without an election.
fn check_follower(states: &[MemVfs], life: &Life) {
    for (operations, state) in states.iter().enumerate() {
        let acknowledged = life.acknowledged_after(operations);
        for survives in survivals(operations, 16) {
            let what = format!("after {operations} operations, {survives:?}");
            life.check_recovery(&state.copy().crash(survives), acknowledged, &what);
        }
    }
}

#[test]
fn a_follower_recovers_from_every_crash_in_a_snapshot_install() {
    let mut network = Network::new(3, |config| {
        config.snapshot_count = 4;
        config.snapshot_catch_up_entries = 1;
    });
    let mut life = Life::default();
    network.cut.insert(3);
    ten_puts(&mut network, &mut life);
    network.cut.clear();
    // Earlier acknowledgements count from the beginning.
    let known = network.member(3).wal().last_index();
    life.acknowledged.push((0, known));
    network.transcript.clear();
    network.member(3).disk.record_states();
    network.settle();
    assert!(network.transcript.of(3).iter().any(|line| line.contains("commit restore")));
    let states = observe(&mut network, 3, &mut life);
    check_follower(&states, &life);
}

#[test]
fn a_first_member_recovers_from_every_state_of_its_first_start() {
    let mut network = Network::default();
    let mut life = Life::default();
    let disk = MemVfs::default();
    disk.record_states();
    network.start(&config(1, 3), &MemVfs::default()).unwrap();
    network.start(&config(2, 3), &MemVfs::default()).unwrap();
    network.start(&config(3, 3), &disk).unwrap();
    network.tick_until("all have begun", |network| {
        network.members.values().all(|member| member.status().begun)
    });
    network.elect(1);
    ten_puts(&mut network, &mut life);
    let states = observe(&mut network, 3, &mut life);
    check_follower(&states, &life);
}

#[test]
fn a_joiner_recovers_from_every_state_of_its_first_start() {
    let mut network = Network::new(3, |_| {});
    let mut life = Life::default();
    ten_puts(&mut network, &mut life);
    let change = MemberRequest::Add { id: 4, url: url(4) };
    assert!(network.member(1).change(change).unwrap().get().is_none());
    network.deliver();
    let disk = MemVfs::default();
    disk.record_states();
    network.start(&NodeConfig { join: true, ..config(4, 4) }, &disk).unwrap();
    network.tick(12);
    let states = observe(&mut network, 4, &mut life);
    check_follower(&states, &life);
}

/// The log after a number of operations: after each save, with or without the next one.
struct Saved {
    operations: usize,
    says: Recovered,
    /// Entries up to here may be purged.
    purged: u64,
}

impl Saved {
    /// A crash within a purge may leave more entries at the front.
    fn is(&self, found: &Recovered) -> bool {
        let comparable = |recovered: &Recovered| {
            let mut comparable = recovered.clone();
            comparable.entries.retain(|entry| entry.index > self.purged);
            comparable.marks.drain(..comparable.marks.len().saturating_sub(2));
            comparable.base = comparable.base.max(self.purged);
            comparable.cut = None;
            comparable
        };
        comparable(found) == comparable(&self.says)
    }
}

const LOG_SIZES: Sizes = Sizes { segment_bytes: 2048, step_bytes: 512 };

/// A log with frames of every kind: truncations, marks, received snapshots, and frames longer than
/// a segment.
fn life_of_a_log() -> (Vec<Saved>, Vec<MemVfs>) {
    let dir = Path::new(DATA).join("log");
    let disk = MemVfs::default();
    disk.record_states();
    let known = Identity { cluster_id: 0, member_id: 1, incarnation: 0xfeed, first_urls_hash: 0 };
    let mut wal = Wal::create(Arc::new(disk.clone()), &dir, &known, LOG_SIZES).unwrap();
    let mut saved: Vec<Saved> = Vec::new();
    let mut purged = 0;
    let mut note = |purged: u64| {
        let says = Wal::read(&disk, &dir).unwrap();
        saved.push(Saved { operations: disk.operations() as usize, says, purged });
    };
    note(purged);
    let joined = Identity { cluster_id: 7, ..known };
    wal.save(&Frame { identity: Some(&joined), ..Frame::default() }).unwrap();
    note(purged);
    let mut random = Random::new(11);
    let (mut next, mut term, mut marks) = (1, 1, [0, 0]);
    for round in 0..40_u64 {
        if round % 9 == 8 {
            // Another leader's entries replace the last two.
            (next, term) = ((next - 2).max(marks[1] + 1), term + 1);
        }
        let mut entries: Vec<Entry> = (next..next + 1 + round % 3)
            .map(|index| {
                // Enough zeros to fill sectors, then few.
                let bytes = random.below(900) as usize * usize::from(round % 13 != 12);
                let fill = [0, 0xff, index as u8][random.below(3) as usize];
                Entry { index, term, data: Bytes::from(vec![fill; bytes]), ..Entry::default() }
            })
            .collect();
        let mut installed = None;
        if round == 21 {
            installed = Some(SnapshotId { index: next + 50, term });
            entries.iter_mut().for_each(|entry| entry.index += 51);
        }
        let last = entries.last().unwrap().index;
        let made = (round % 5 == 4 && round != 24)
            .then(|| SnapshotId { index: next - 1, term: term_at(&disk, &dir, next - 1) })
            .filter(|mark| mark.index > marks[1]);
        let hard_state = HardState { term, vote: 1, commit: next - 1, ..HardState::default() };
        wal.save(&Frame {
            incarnations: if round == 2 { &[(2, 22), (3, 33)] } else { &[] },
            made,
            installed,
            entries: &entries,
            hard_state: (round % 2 == 0).then_some(&hard_state),
            ..Frame::default()
        })
        .unwrap();
        next = last + 1;
        note(purged);
        if let Some(mark) = made.or(installed) {
            marks = [marks[1], mark.index];
            purged = marks[0];
            // A purge may take entries from its first operation on, not earlier.
            note(purged);
            wal.purge(purged).unwrap();
        }
    }
    (saved, disk.states())
}

fn term_at(disk: &MemVfs, dir: &Path, index: u64) -> u64 {
    let recovered = Wal::read(disk, dir).unwrap();
    let entry = recovered.entries.iter().find(|entry| entry.index == index);
    entry.map_or(0, |entry| entry.term)
}

#[test]
fn a_log_recovers_all_saved_and_at_most_the_frame_under_way() {
    let dir = Path::new(DATA).join("log");
    let (saved, states) = life_of_a_log();
    let (mut torn, mut purges) = (0, 0);
    for (operations, state) in states.iter().enumerate() {
        let known = saved.iter().rposition(|saved| saved.operations <= operations);
        for survives in survivals(operations, 24) {
            let what = format!("after {operations} operations, {survives:?}");
            let disk = state.copy().crash(survives);
            let vfs = Arc::new(disk.clone());
            IMAGES.fetch_add(1, Ordering::Relaxed);
            if !wal::exists(&disk, &dir).unwrap() {
                assert_eq!(known, None, "{what}: the log is gone");
                continue;
            }
            let found = Wal::read(&disk, &dir).unwrap_or_else(|error| panic!("{what}: {error}"));
            let next = &saved[known.map_or(0, |known| (known + 1).min(saved.len() - 1))];
            assert!(
                next.is(&found) || known.is_some_and(|known| saved[known].is(&found)),
                "{what}: {found:?}"
            );
            torn += usize::from(found.cut.is_some());
            purges += usize::from(found.base > 0);
            let (mut wal, opened) = Wal::open(vfs.clone(), &dir, LOG_SIZES).unwrap();
            assert_eq!(opened, found, "{what}: opened and read");
            let end = opened.last_index() + 1;
            let more = [entry(end, 99, b"more".to_vec())];
            wal.save(&Frame { entries: &more, ..Frame::default() }).unwrap();
            drop(wal);
            let disk = disk.crash(Survives::Nothing);
            let again = Wal::read(&disk, &dir).unwrap();
            let mut expected = Recovered { cut: None, ..found };
            expected.entries.extend(more);
            assert_eq!(again, expected, "{what}: with one entry more");
        }
    }
    assert!(torn > 100 && purges > 100, "{torn} frames were torn, {purges} logs purged");
}
