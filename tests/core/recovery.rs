//! Starts from a disk that changed since the last run.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use raft::eraftpb::{HardState, Message, MessageType};
use raftexample::channels::MemberRequest;
use raftexample::error::Error;
use raftexample::raft_node::replay::wal_dir;
use raftexample::raft_node::{Input, NodeConfig};
use raftexample::storage::wal::{Frame, Identity, Sizes, Wal};

use crate::support::memory::forging::{forged, from_peer};
use crate::support::memory::*;

fn single() -> NodeConfig {
    NodeConfig { snapshot_count: 5, snapshot_catch_up_entries: 2, ..config(1, 1) }
}

/// A disk with two snapshots, and the member's state.
fn two_snapshots() -> (MemVfs, State) {
    let mut member = Member::start(&single(), &MemVfs::default(), &Transcript::default()).unwrap();
    member.tick_until_leader().unwrap();
    for number in 0..20 {
        assert!(member.put(&format!("key{}", number % 7), &number.to_string()).unwrap().is_ok());
    }
    member.node.stop().unwrap();
    let state = member.state();
    (member.crash(Survives::Nothing), state)
}

fn snapshots(disk: &MemVfs) -> Vec<PathBuf> {
    disk.paths().into_iter().filter(|path| path.extension().is_some_and(|e| e == "snap")).collect()
}

fn refusal(config: &NodeConfig, disk: &MemVfs) -> Error {
    match Member::start(config, disk, &Transcript::default()) {
        Ok(_) => panic!("it starts"),
        Err(error) => error,
    }
}

#[test]
fn a_damaged_snapshot_is_set_aside_if_older_data_reach_as_far() {
    let (disk, state) = two_snapshots();
    let found = snapshots(&disk);
    assert_eq!(found.len(), 2);
    let newest = found.last().unwrap();
    disk.tamper(newest, |bytes| bytes[50] ^= 1);
    let mut member = Member::start(&single(), &disk, &Transcript::default()).unwrap();
    assert_eq!(member.state(), state);
    assert!(member.logged("set aside"));
    let broken = PathBuf::from(format!("{}.broken", newest.display()));
    assert!(disk.paths().contains(&broken), "{:?}", disk.paths());

    // It keeps working: it makes more snapshots, and the next start needs no fallback.
    member.tick_until_leader().unwrap();
    for number in 20..40 {
        assert!(member.put(&format!("key{}", number % 7), &number.to_string()).unwrap().is_ok());
    }
    let state = member.state();
    let disk = member.crash(Survives::Nothing);
    let mut member = Member::start(&single(), &disk, &Transcript::default()).unwrap();
    member.tick_until_leader().unwrap();
    assert_eq!(member.state(), state);
}

#[test]
fn a_missing_snapshot_is_made_up_for_alike() {
    let (disk, state) = two_snapshots();
    disk.take_away(snapshots(&disk).last().unwrap());
    let mut member = Member::start(&single(), &disk, &Transcript::default()).unwrap();
    assert_eq!(member.state(), state);
}

#[test]
fn two_damaged_snapshots_are_named_with_the_remedy() {
    let (disk, _) = two_snapshots();
    // Without the beginning of the log, the older snapshot is needed.
    let config = NodeConfig { wal_sizes: sizes(256), ..single() };
    let mut member = Member::start(&config, &disk, &Transcript::default()).unwrap();
    member.tick_until_leader().unwrap();
    for number in 0..30 {
        member.put("key", &number.to_string()).unwrap();
    }
    let disk = member.crash(Survives::Nothing);
    for path in snapshots(&disk) {
        disk.tamper(&path, |bytes| bytes[50] ^= 1);
    }
    let error = refusal(&single(), &disk).to_string();
    assert!(error.contains(".snap is damaged"), "{error}");
    assert!(error.contains("DELETE it on another member"), "{error}");

    for path in snapshots(&disk) {
        disk.take_away(&path);
    }
    let error = refusal(&single(), &disk).to_string();
    assert!(error.contains(".snap"), "{error}");
    assert!(error.contains("DELETE it on another member"), "{error}");
}

/// etcd starts its store from the newest file even if the log does not name it.
#[test]
fn a_snapshot_that_the_log_does_not_name_is_removed() {
    let (disk, state) = two_snapshots();
    let orphan = snapshots(&disk)[0].with_file_name("0000000000000002-0000000000001000.snap");
    disk.put(&orphan, &disk.contents(&snapshots(&disk)[1]));
    let mut member = Member::start(&single(), &disk, &Transcript::default()).unwrap();
    assert_eq!(member.state(), state);
    assert!(!disk.paths().contains(&orphan));
}

/// No other member can have been elected meanwhile, so it need not wait for an election timeout.
#[test]
fn a_member_alone_leads_from_its_first_tick() {
    let mut member = Member::start(&single(), &MemVfs::default(), &Transcript::default()).unwrap();
    member.tick().unwrap();
    assert_eq!(member.status().leader, member.id);
    let mut answer = member.put("key", "value").unwrap();
    assert!(answer.is_ok());
    let disk = member.crash(Survives::Nothing);
    let mut member = Member::start(&single(), &disk, &Transcript::default()).unwrap();
    member.tick().unwrap();
    assert_eq!(member.status().leader, member.id);
    assert_eq!(member.state()["key"].0, "value");
}

/// For example if its directory is a copy from a time when it was alone: the others have a leader.
#[test]
fn a_member_alone_that_hears_a_leader_does_not_depose_it() {
    let mut member = Member::start(&single(), &MemVfs::default(), &Transcript::default()).unwrap();
    member.tick().unwrap();
    let mut message = forged(&member, MessageType::MsgHeartbeat, 2);
    message.term += 5;
    let term = message.term;
    let heartbeat = from_peer(&member, 2, 1, vec![message]);
    member.turn([heartbeat]).unwrap();
    member.tick().unwrap();
    assert_eq!((member.status().leader, member.status().term), (2, term));
}

/// A member that elects itself sends its first entries in the turn of its election. If it forgot
/// that term, it would reuse it for other entries at the same indexes.
#[test]
fn a_leader_tells_a_learner_of_no_term_that_is_not_on_disk() {
    let mut member = Member::start(&single(), &MemVfs::default(), &Transcript::default()).unwrap();
    member.tick_until_leader().unwrap();
    let learner = MemberRequest::Add { id: 2, url: url(2) };
    assert!(member.change(learner).unwrap().is_ok());
    let term = member.status().term;
    let disk = member.crash(Survives::Nothing);
    for is_crashed in [false, true] {
        let disk = disk.crash(Survives::Nothing);
        let mut member = Member::start(&single(), &disk, &Transcript::default()).unwrap();
        let _answer = member.put("key", "waits for a leader").unwrap();
        assert_eq!(member.take_messages(), [], "nobody leads");
        if is_crashed {
            disk.inject(1, Fault::Crash);
        }
        assert_eq!(member.tick().is_err(), is_crashed);
        let of_new_term = member.take_messages().iter().any(|message| message.term > term);
        assert_eq!(of_new_term, !is_crashed, "the term is on disk, or nobody hears of it");
    }
}

/// A disk with this log and nothing else.
fn disk_with(frames: &[Frame<'_>], identity: &Identity) -> MemVfs {
    let disk = MemVfs::default();
    let dir = wal_dir(Path::new(DATA), identity.member_id);
    let mut wal = Wal::create(Arc::new(disk.clone()), &dir, identity, Sizes::default()).unwrap();
    for frame in frames {
        wal.save(frame).unwrap();
    }
    disk.crash(Survives::Everything)
}

fn hard_state(term: u64, commit: u64) -> HardState {
    HardState { term, commit, ..HardState::default() }
}

#[test]
fn a_commit_index_beyond_the_log_is_refused() {
    let identity = Identity { cluster_id: 7, member_id: 1, incarnation: 101, first_urls_hash: 0 };
    let entries = [entry(1, 1, b"x".to_vec())];
    let state = hard_state(1, 9);
    let frame = Frame { entries: &entries, hard_state: Some(&state), ..Frame::default() };
    let disk = disk_with(&[frame], &identity);
    let error = refusal(&single(), &disk).to_string();
    assert!(error.contains("index 9 was committed, but the log ends at 1"), "{error}");
    assert!(error.contains("DELETE it on another member"), "{error}");
}

#[test]
fn a_directory_of_another_list_is_refused() {
    let (disk, _) = two_snapshots();
    let error = refusal(&NodeConfig { cluster: vec![url(1), url(2)], ..single() }, &disk);
    assert!(error.to_string().contains("another --cluster list"), "{error}");
}

/// etcd #22442: a tail that was overwritten, and a snapshot received after it.
#[test]
fn an_overwritten_tail_stays_overwritten_after_a_snapshot() {
    let mut network = Network::new(3, |config| {
        config.snapshot_count = 5;
        config.snapshot_catch_up_entries = 1;
    });
    // Member 1 appends entries that no other member receives.
    network.cut.insert(1);
    for number in 0..8 {
        network.put(1, "lost", &number.to_string());
    }
    let tail = network.member(1).wal().entries.last().unwrap().index;
    // The others continue without it, beyond a snapshot.
    network.give_up_leader(&[2, 3]);
    network.elect(2);
    for number in 0..4 {
        assert!(network.put(2, "kept", &number.to_string()).is_ok());
    }
    network.cut.clear();
    network.settle();
    for number in 4..20 {
        assert!(network.put(2, "kept", &number.to_string()).is_ok());
    }
    network.settle();
    assert!(network.member(2).status().commit > tail);
    let state = network.member(2).state();
    assert!(!state.contains_key("lost"));
    assert_eq!(network.member(1).state(), state);
    // From the disk alone, all members at once.
    for id in [1, 2, 3] {
        let config = NodeConfig { boot: 3000 + id, ..network.member(id).config.clone() };
        let disk = network.crash(id, Survives::Nothing);
        network.start(&config, &disk).unwrap();
    }
    network.elect(3);
    for id in [1, 2, 3] {
        assert_eq!(network.member(id).state(), state, "member {id}");
    }
}

/// The leader makes a newer snapshot in the turn in which raft sends the older one.
#[test]
fn a_snapshot_is_sent_though_a_newer_one_was_made_meanwhile() {
    let mut network = Network::new(3, |config| {
        config.snapshot_count = 5;
        config.snapshot_catch_up_entries = 1;
    });
    network.cut.insert(3);
    for number in 0..12 {
        network.put(1, "key", &number.to_string());
    }
    let first = network.member(1).status().snapshot;
    network.member(1).holds_snapshots = true;
    for number in 0..7 {
        network.put(1, "key", &number.to_string());
    }
    let leader = network.member(1);
    assert_eq!(leader.held.len(), 1, "a snapshot is asked for and not made yet");
    let newer = leader.make_held_snapshots();
    // The follower rejects a probe, so raft sends the older snapshot. The newer one is reported in
    // the same turn.
    let status = leader.status();
    let mut response = Message { to: 1, from: 3, term: status.term, ..Message::default() };
    response.set_msg_type(MessageType::MsgHeartbeatResponse);
    let header = network.member(3).header(1);
    let rejections: Vec<Message> = (first.saturating_sub(20)..=status.commit)
        .map(|index| {
            let mut rejection = response.clone();
            rejection.set_msg_type(MessageType::MsgAppendResponse);
            (rejection.index, rejection.reject, rejection.reject_hint) = (index, true, 1);
            rejection
        })
        .collect();
    let messages = std::iter::once(response).chain(rejections).collect();
    let inbound = Input::Inbound(batch(header, 9999, 1, messages));
    network.member(1).turn(std::iter::once(inbound).chain(newer)).unwrap();
    let sent = std::mem::take(&mut network.member(1).sent.lock().unwrap().snapshots);
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].0.get_snapshot().get_metadata().index, first);
    assert!(network.member(1).status().snapshot > first);
    let opened =
        network.member(1).snapshotter.open_raw(first, sent[0].0.get_snapshot().get_metadata().term);
    assert_eq!(
        opened.unwrap().0,
        sent[0].1.length,
        "its file is still there, and the one announced"
    );
}

/// The commit index is written lazily, but never behind a named snapshot: a start that falls back
/// to an older snapshot must not treat the newer one's entries as undecided.
#[test]
fn the_log_names_no_snapshot_beyond_its_commit_index() {
    let mut member = Member::start(&single(), &MemVfs::default(), &Transcript::default()).unwrap();
    member.tick_until_leader().unwrap();
    let mut named = 0;
    for number in 0..20 {
        assert!(member.put("key", &number.to_string()).unwrap().is_ok());
        let wal = member.wal();
        if let Some(newest) = wal.marks.last() {
            assert!(wal.hard_state.commit >= newest.index, "{:?} {newest:?}", wal.hard_state);
            named += 1;
        }
    }
    assert!(named > 10, "snapshots were made: {named}");
}
