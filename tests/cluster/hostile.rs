//! What well-formed hostile messages do to a running member: over HTTP, at its peer port, byte for
//! byte as the format in `transport/wire.rs` has them.
//!
//! Each row of [`STOPPED`] once did something bad to raft-rs 0.7.0: a panic, a poisoned term, a log
//! that is no log. Validation refuses all of them. What it has to accept, since it may be
//! the word of a leader that this member has not heard of, is followed, and loses nothing.

use std::io::Read;
use std::sync::Arc;

use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeType, Entry, EntryType, Message, MessageType};
use raftexample::channels::{Greeting, MemberRequest, NodeId, RequestId, SnapshotFile};
use raftexample::codec;
use raftexample::membership::{SnapshotData, SnapshotMembers};
use raftexample::ports::tls::no_tls;
use raftexample::raft_node::Status;
use raftexample::raft_node::replay::snap_dir;
use raftexample::storage::DiskVfs;
use raftexample::storage::snapshotter::Snapshotter;
use raftexample::storage::wal::{SnapshotId, Wal};

use crate::harness::*;

/// A sender that is not a member.
const STRANGER: NodeId = 99;
/// The index of a forged snapshot.
const SNAPSHOT_INDEX: u64 = 1000;

/// The sender and receiver in a request's headers.
#[derive(Clone, Debug)]
struct Sender {
    cluster_id: u64,
    from: NodeId,
    incarnation: u64,
    url: String,
    to: NodeId,
    to_incarnation: u64,
    boot: u64,
}

/// Sends messages that no correct member sends.
struct Forger {
    http: reqwest::Client,
    cluster_id: u64,
    boot: u64,
    number: u64,
}

impl Forger {
    /// Knows the cluster of `member`.
    fn new(cluster: &Cluster, member: NodeId) -> Self {
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(no_tls())
            .no_proxy()
            .build()
            .unwrap();
        let cluster_id = cluster.status(member).cluster_id;
        Self { http, cluster_id, boot: getrandom::u64().unwrap(), number: 0 }
    }

    /// A member's identity, correct in every field.
    fn member(&self, cluster: &mut Cluster, id: NodeId) -> Sender {
        let config = cluster.config(id);
        Sender {
            cluster_id: self.cluster_id,
            from: id,
            incarnation: config.incarnation,
            url: config.url.clone(),
            to: 0,
            to_incarnation: 0,
            boot: self.boot,
        }
    }

    /// A sender that knows the cluster and is not a member. No process listens at its port.
    fn stranger(&self) -> Sender {
        Sender {
            cluster_id: self.cluster_id,
            from: STRANGER,
            incarnation: 4711,
            url: "http://127.0.0.1:9".to_owned(),
            to: 0,
            to_incarnation: 0,
            boot: self.boot,
        }
    }

    /// Posts `body`; returns the response's status.
    async fn post(
        &mut self,
        url: &str,
        sender: &Sender,
        path: &str,
        body: Vec<u8>,
        more: &[(&str, String)],
    ) -> u16 {
        self.number += 1;
        let mut request = self
            .http
            .post(format!("{url}{path}"))
            .timeout(PATIENCE)
            .header("raft-protocol", "4")
            .header("raft-cluster-id", format!("{:016x}", sender.cluster_id))
            .header("raft-from", sender.from.to_string())
            .header("raft-incarnation", format!("{:016x}", sender.incarnation))
            .header("raft-from-url", &sender.url)
            .header("raft-to", sender.to.to_string())
            .header("raft-to-incarnation", format!("{:016x}", sender.to_incarnation))
            .header("raft-boot", format!("{:016x}", sender.boot))
            .header("raft-number", self.number.to_string());
        for (name, value) in more {
            request = request.header(*name, value);
        }
        request.body(body).send().await.expect("the peer port answers").status().as_u16()
    }

    /// Sends a message, with its file if it is a snapshot.
    async fn send(&mut self, url: &str, sender: &Sender, forged: &Forged) -> u16 {
        let encoded = forged.message.write_to_bytes().unwrap();
        let mut body = (encoded.len() as u32).to_le_bytes().to_vec();
        body.extend(encoded);
        let Some((file, bytes)) = &forged.file else {
            return self.post(url, sender, "/raft", body, &[]).await;
        };
        body.extend(bytes);
        let headers = [
            ("raft-snapshot-length", file.length.to_string()),
            ("raft-snapshot-checksum", format!("{:08x}", file.checksum)),
        ];
        self.post(url, sender, "/raft/snapshot", body, &headers).await
    }

    /// Greets a member. The node itself answers, after all earlier messages.
    async fn greet(&mut self, url: &str, sender: &Sender) {
        eventually(PATIENCE, "a greeting is answered", async || {
            let greeting = codec::encode(&Greeting { first_urls: Vec::new(), begun: true });
            self.post(url, sender, "/raft/greeting", greeting, &[]).await == 200
        })
        .await;
    }
}

/// A message, with its file if it is a snapshot.
struct Forged {
    message: Message,
    file: Option<(SnapshotFile, Vec<u8>)>,
}

/// The forger's knowledge of the receiver.
#[derive(Clone)]
struct Known {
    id: NodeId,
    term: u64,
    commit: u64,
    last: (u64, u64),
    members: SnapshotMembers,
}

fn known(cluster: &Cluster, id: NodeId, cluster_id: u64) -> Known {
    let status = cluster.status(id);
    let wal = Wal::read(&DiskVfs, &cluster.wal_dir(id)).unwrap();
    let last = wal.entries.last().expect("its log is not empty");
    let voters = status.members.urls.keys().copied().collect();
    Known {
        id,
        term: status.term,
        commit: status.commit,
        last: (last.index, last.term),
        members: SnapshotMembers { cluster_id, voters, learners: vec![], members: status.members },
    }
}

/// Everything that a refused message must not change, in one line.
fn facts(cluster: &Cluster, id: NodeId) -> String {
    let wal = Wal::read(&DiskVfs, &cluster.wal_dir(id)).unwrap();
    let entries = codec::encode(&wal.entries.iter().map(|e| (e.index, e.term)).collect::<Vec<_>>());
    format!(
        "{:?} {:?} marks {:?} entries {:08x}",
        Status { tick: Default::default(), ..cluster.status(id) },
        wal.hard_state,
        wal.marks,
        crc32c::crc32c(&entries)
    )
}

fn message(kind: MessageType, known: &Known, from: NodeId) -> Message {
    let mut message = Message { from, to: known.id, term: known.term, ..Message::default() };
    message.set_msg_type(kind);
    message
}

fn request(data: &[u8]) -> Entry {
    let id = RequestId { member: 3, boot: 1003, counter: 77 };
    let context = Bytes::copy_from_slice(&id.to_bytes());
    Entry { data: data.to_vec().into(), context, ..Entry::default() }
}

fn entry(index: u64, term: u64, kind: EntryType, data: Vec<u8>) -> Entry {
    let mut entry = Entry { index, term, data: data.into(), ..Entry::default() };
    entry.set_entry_type(kind);
    entry
}

fn addition(id: NodeId) -> Vec<u8> {
    let mut change = ConfChange { node_id: id, ..ConfChange::default() };
    change.set_change_type(ConfChangeType::AddNode);
    change.context = b"http://127.0.0.1:9".to_vec().into();
    change.write_to_bytes().unwrap()
}

/// An append after the end of the log, in a later term; only `change` makes it wrong.
fn append(known: &Known, from: NodeId, entries: impl FnOnce(u64, u64) -> Vec<Entry>) -> Message {
    let mut message = message(MessageType::MsgAppend, known, from);
    message.term += 1;
    (message.index, message.log_term) = known.last;
    message.entries = entries(known.last.0 + 1, known.last.1).into();
    message
}

/// A snapshot of a later term with its file; `change` applies to the message alone.
fn snapshot(
    known: &Known,
    from: NodeId,
    change: impl FnOnce(&mut raft::eraftpb::ConfState),
) -> Forged {
    let mut message = message(MessageType::MsgSnapshot, known, from);
    message.term += 1;
    let term = message.term;
    let dir = tempfile::tempdir().unwrap();
    let snapshotter = Snapshotter::new(Arc::new(DiskVfs), dir.path()).unwrap();
    let meta = codec::encode(&known.members);
    let id = SnapshotId { index: SNAPSHOT_INDEX, term };
    let file = snapshotter.create(id, &meta, |_| Ok(())).unwrap();
    let mut bytes = Vec::new();
    snapshotter.open_raw(SNAPSHOT_INDEX, term).unwrap().1.read_to_end(&mut bytes).unwrap();
    let SnapshotFile { length, checksum } = file;
    let data = SnapshotData { members: known.members.clone(), length, checksum };
    let metadata = message.mut_snapshot().mut_metadata();
    (metadata.index, metadata.term) = (SNAPSHOT_INDEX, term);
    metadata.set_conf_state(known.members.conf_state());
    change(metadata.mut_conf_state());
    message.mut_snapshot().data = codec::encode(&data).into();
    Forged { message, file: Some((file, bytes)) }
}

impl Forged {
    /// True for a heartbeat beyond the log, which is logged once with the remedy.
    fn is_beyond(&self, known: &Known) -> bool {
        self.message.get_msg_type() == MessageType::MsgHeartbeat
            && self.message.commit > known.last.0
    }
}

type Forge = fn(&Known, NodeId) -> Forged;

fn plain(message: Message) -> Forged {
    Forged { message, file: None }
}

/// The rows that validation refuses from every sender, at a leader and at a follower.
#[rustfmt::skip]
const STOPPED: &[(&str, Forge)] = {
    use EntryType::{EntryConfChange, EntryNormal};
    use MessageType::*;
    &[
        ("a heartbeat that commits 1000 beyond the log", |k, from| { let mut m = message(MsgHeartbeat, k, from); m.term += 1; m.commit = k.last.0 + 1000; plain(m) }),
        ("an append with an entry at the last index", |k, from| { let mut m = append(k, from, |_, term| vec![entry(u64::MAX, term, EntryNormal, vec![])]); m.index = u64::MAX - 1; plain(m) }),
        ("an append with an entry at the last index behind our log", |k, from| plain(append(k, from, |_, term| vec![entry(u64::MAX, term, EntryNormal, vec![])]))),
        ("a heartbeat of the last term", |k, from| { let mut m = message(MsgHeartbeat, k, from); m.term = u64::MAX; plain(m) }),
        ("a snapshot with a voter that is a learner", |k, from| snapshot(k, from, |state| state.learners = vec![state.voters[0]])),
        ("a snapshot with voter 0", |k, from| snapshot(k, from, |state| state.voters[0] = 0)),
        ("a snapshot without voters", |k, from| snapshot(k, from, |state| state.voters.clear())),
        ("a snapshot without its file", |k, from| { let Forged { message, .. } = snapshot(k, from, |_| {}); plain(message) }),
        ("a read with a term", |k, from| { let mut m = message(MsgReadIndex, k, from); m.entries = vec![request(&[1; 24])].into(); plain(m) }),
        ("a read without a context", |k, from| { let mut m = message(MsgReadIndex, k, from); m.term = 0; plain(m) }),
        ("an empty proposal", |k, from| { let mut m = message(MsgPropose, k, from); m.term = 0; plain(m) }),
        ("a proposal that is no request", |k, from| { let mut m = message(MsgPropose, k, from); m.term = 0; m.entries = vec![entry(0, 0, EntryNormal, b"x".to_vec())].into(); plain(m) }),
        ("a change of members as a proposal", |k, from| { let mut m = message(MsgPropose, k, from); m.term = 0; m.entries = vec![Entry { entry_type: EntryConfChange, ..request(&addition(9)) }].into(); plain(m) }),
        ("garbage as a change of members as a proposal", |k, from| { let mut m = message(MsgPropose, k, from); m.term = 0; m.entries = vec![Entry { entry_type: EntryConfChange, ..request(&[0xff; 7]) }].into(); plain(m) }),
        ("a rejection whose hint is the last index", |k, from| { let mut m = message(MsgAppendResponse, k, from); m.reject = true; m.index = k.last.0; m.reject_hint = u64::MAX; plain(m) }),
        ("a message for member 77", |k, from| { let mut m = message(MsgHeartbeat, k, from); m.term += 1; m.to = 77; plain(m) }),
        ("a message in the name of another", |k, from| { let mut m = message(MsgHeartbeat, k, from); m.term += 1; m.from = 55; plain(m) }),
        ("a message in the receiver's own name", |k, from| { let mut m = message(MsgHeartbeat, k, from); m.term += 1; m.from = k.id; plain(m) }),
        ("an append with a gap", |k, from| plain(append(k, from, |index, term| vec![entry(index, term, EntryNormal, vec![]), entry(index + 8, term, EntryNormal, vec![])]))),
        ("leadership handed over by somebody who has none", |k, from| plain(message(MsgTimeoutNow, k, from))),
        ("leadership of a later term", |k, from| { let mut m = message(MsgTimeoutNow, k, from); m.term += 1; plain(m) }),
        ("MsgHup", |k, from| plain(message(MsgHup, k, from))),
        ("MsgBeat", |k, from| plain(message(MsgBeat, k, from))),
        ("MsgTransferLeader", |k, from| plain(message(MsgTransferLeader, k, from))),
        ("MsgCheckQuorum", |k, from| plain(message(MsgCheckQuorum, k, from))),
    ]
};

/// Refused because the sender is not a member.
#[rustfmt::skip]
const STOPPED_FROM_A_STRANGER: &[(&str, Forge)] = {
    use MessageType::*;
    &[
        ("a stranger's proposal", |k, from| { let mut m = message(MsgPropose, k, from); m.term = 0; m.entries = vec![request(b"x")].into(); plain(m) }),
        ("a stranger's read", |k, from| { let mut m = message(MsgReadIndex, k, from); m.term = 0; m.entries = vec![request(&[1; 24])].into(); plain(m) }),
        ("a stranger's vote by force", |k, from| { let mut m = message(MsgRequestVote, k, from); m.term += 1; m.context = Bytes::from_static(b"CampaignTransfer"); plain(m) }),
        ("a stranger's acknowledgement", |k, from| { let mut m = message(MsgAppendResponse, k, from); m.term += 1; m.index = k.last.0; plain(m) }),
        ("a stranger's answer to a heartbeat", |k, from| { let mut m = message(MsgHeartbeatResponse, k, from); m.term += 1; plain(m) }),
        ("a stranger's vote", |k, from| { let mut m = message(MsgRequestVoteResponse, k, from); m.term += 1; plain(m) }),
        ("a stranger's refusal of a vote", |k, from| { let mut m = message(MsgRequestPreVoteResponse, k, from); m.term += 1; m.reject = true; plain(m) }),
    ]
};

/// A cluster that keeps its leader even on a busy machine. One of four members is removed and one
/// of the other three is stopped: the forger speaks in their names.
struct Calm {
    cluster: Cluster,
    forger: Forger,
    leader: NodeId,
    follower: NodeId,
    stopped: NodeId,
    removed: NodeId,
}

impl Calm {
    async fn start() -> Self {
        let mut cluster = Cluster::new(4);
        for id in 1..=4 {
            cluster.config(id).election_ticks = 80;
            cluster.config(id).randomized_election_ticks = 80..160;
        }
        cluster.start_all().await;
        let leader = cluster.leader().await;
        let [removed, stopped, follower] = [1, 2, 3].map(|next| (leader + next - 1) % 4 + 1);
        cluster.client(leader).remove(removed).await.expect(204);
        assert!(matches!(cluster.end(removed).await, raftexample::error::Error::Removed));
        cluster.write(leader, "/key", "value").await;
        cluster.caught_up(&[leader, follower, stopped]).await;
        cluster.stop(stopped).await;
        cluster.write(leader, "/key", "kept").await;
        let forger = Forger::new(&cluster, leader);
        Self { cluster, forger, leader, follower, stopped, removed }
    }

    /// Waits until a member has nothing left to commit, apply or write; returns its facts.
    async fn settled(&self, id: NodeId) -> String {
        eventually(PATIENCE, "all of the log is committed, and that is on disk", async || {
            let wal = Wal::read(&DiskVfs, &self.cluster.wal_dir(id)).unwrap();
            let (status, last) = (self.cluster.status(id), wal.entries.last().unwrap().index);
            [wal.hard_state.commit, status.commit, status.applied] == [last; 3]
        })
        .await;
        facts(&self.cluster, id)
    }

    /// Waits until a member has handled all its messages: a linearizable read needs a round of
    /// messages, which starts no earlier than the turn that took the greeting.
    async fn until_dealt_with(&mut self, to: NodeId) {
        let stopped = self.forger.member(&mut self.cluster, self.stopped);
        self.forger.greet(&self.cluster.url(to), &stopped).await;
        let client = self.cluster.client(to);
        eventually(PATIENCE, &format!("member {to} reads"), async || {
            client.get("/key").await.status == 200
        })
        .await;
    }

    /// Sends a row to both running members. It must have no effect.
    async fn is_stopped(&mut self, sender: &Sender, what: &str, forge: Forge, status: u16) {
        for to in [self.leader, self.follower] {
            let what =
                format!("{what}, from {} to member {to} (leader {})", sender.from, self.leader);
            let url = self.cluster.url(to);
            let before = self.settled(to).await;
            let dropped = self.cluster.count_logged(to, "dropping a message");
            let known = known(&self.cluster, to, self.forger.cluster_id);
            let forged = forge(&known, sender.from);
            // The sender's only mistake may be a wrong receiver.
            let sender =
                Sender { to: if sender.to == 0 { to } else { sender.to }, ..sender.clone() };
            let answered = self.forger.send(&url, &sender, &forged).await;
            assert_eq!(answered, status, "{what}");
            self.until_dealt_with(to).await;
            assert_eq!(facts(&self.cluster, to), before, "{what}");
            if status == 204 && !forged.is_beyond(&known) {
                let is_said = self.cluster.count_logged(to, "dropping a message") == dropped + 1;
                assert!(is_said, "{what}: it was not validated");
            }
            let left = std::fs::read_dir(snap_dir(self.cluster.data_dir(), to)).unwrap().count();
            assert_eq!(left, 0, "{what}: a snapshot's file is left");
        }
    }

    /// The next write is the next entry of the same term, and all earlier writes are still there.
    async fn serves(&self) {
        for id in [self.leader, self.follower] {
            let before = self.cluster.status(self.leader);
            let answer = self.cluster.client(id).put("/later", "value").await.expect(204);
            let header =
                |name: &str| answer.headers[name].to_str().unwrap().parse::<u64>().unwrap();
            assert_eq!(header("raft-index"), before.commit + 1);
            assert_eq!(header("raft-term"), before.term);
            assert_eq!(self.cluster.client(id).get("/key").await.expect(200).text(), "kept");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_message_of_any_sender_changes_nothing() {
    let mut calm = Calm::start().await;
    let member = calm.forger.member(&mut calm.cluster, calm.stopped);
    let stranger = calm.forger.stranger();
    for (what, forge) in STOPPED {
        calm.is_stopped(&member, what, *forge, 204).await;
        calm.is_stopped(&stranger, what, *forge, 204).await;
    }
    for (what, forge) in STOPPED_FROM_A_STRANGER {
        calm.is_stopped(&stranger, what, *forge, 204).await;
    }
    for id in [calm.leader, calm.follower] {
        assert_eq!(calm.cluster.count_logged(id, "but our log ends at"), 1, "member {id}");
    }
    calm.serves().await;
    // The member in whose name everything was sent is still a member.
    let Calm { mut cluster, leader, stopped, .. } = calm;
    cluster.start(stopped).await;
    cluster.client(stopped).put("/again", "value").await.expect(204);
    assert_eq!(cluster.leader().await, leader);
    cluster.stop_all().await;
}

/// Messages that a member may send and may not send, from senders that are not admitted.
#[tokio::test(flavor = "multi_thread")]
async fn a_sender_that_may_not_speak_changes_nothing_whatever_it_says() {
    let mut calm = Calm::start().await;
    let (own, others) = (calm.follower, calm.leader);
    let member = calm.forger.member(&mut calm.cluster, calm.stopped);
    let removed = calm.forger.member(&mut calm.cluster, calm.removed);
    let (stranger, elsewhere) = (calm.forger.stranger(), "http://127.0.0.1:9".to_owned());
    let mut senders = vec![
        ("another cluster", 412, Sender { cluster_id: member.cluster_id ^ 1, ..member.clone() }),
        ("a stranger of another cluster", 412, Sender { cluster_id: 1, ..stranger.clone() }),
        ("another receiver", 412, Sender { to: 77, ..member.clone() }),
        ("a stranger to another receiver", 412, Sender { to: 77, ..stranger.clone() }),
        ("another incarnation", 412, Sender { incarnation: 1, ..member.clone() }),
        ("a member elsewhere", 412, Sender { url: elsewhere, ..member.clone() }),
        ("an impossible URL", 412, Sender { url: "nonsense".into(), ..stranger.clone() }),
        ("a removed member", 410, removed.clone()),
        ("a removed member with new data", 410, Sender { incarnation: 1, ..removed.clone() }),
        ("no sender", 400, Sender { from: 0, ..member.clone() }),
        ("no cluster", 400, Sender { cluster_id: 0, ..member.clone() }),
    ];
    for id in [own, others] {
        let itself = calm.forger.member(&mut calm.cluster, id);
        senders.push(("the receiver itself", 412, Sender { to: id, ..itself }));
    }
    let passes: Forge = |known, from| {
        plain(append(known, from, |index, term| {
            vec![entry(index, term + 1, EntryType::EntryNormal, vec![])]
        }))
    };
    let takes_over: Forge = |known, from| {
        let mut vote = message(MessageType::MsgRequestVote, known, from);
        vote.term += 1;
        (vote.index, vote.log_term) = (known.last.0 + 1, known.last.1 + 1);
        vote.context = Bytes::from_static(b"CampaignTransfer");
        plain(vote)
    };
    let replaces: Forge = |known, from| snapshot(known, from, |_| {});
    let right = [("an append", passes), ("a vote", takes_over), ("a snapshot", replaces)];
    for (who, status, sender) in &senders {
        if *who == "the receiver itself" {
            let to = sender.to;
            let known = known(&calm.cluster, to, calm.forger.cluster_id);
            let before = calm.settled(to).await;
            let (url, forged) = (calm.cluster.url(to), passes(&known, to));
            assert_eq!(calm.forger.send(&url, sender, &forged).await, *status, "{who}");
            calm.until_dealt_with(to).await;
            assert_eq!(facts(&calm.cluster, to), before, "{who}");
            continue;
        }
        for (what, forge) in right.iter().chain(STOPPED) {
            calm.is_stopped(sender, &format!("{what} of {who}"), *forge, *status).await;
        }
        // They may neither greet nor forward a change of members.
        let url = calm.cluster.url(own);
        let sender = Sender { to: if sender.to == 0 { own } else { sender.to }, ..sender.clone() };
        let change = codec::encode(&MemberRequest::Remove { id: others });
        let answered = calm.forger.post(&url, &sender, "/raft/members", change, &[]).await;
        assert_eq!(answered, *status, "a change of {who}");
        if sender.cluster_id != 0 {
            let greeting = codec::encode(&Greeting { first_urls: Vec::new(), begun: true });
            let answered = calm.forger.post(&url, &sender, "/raft/greeting", greeting, &[]).await;
            assert_eq!(answered, *status, "a greeting of {who}");
        }
    }
    calm.serves().await;
    calm.cluster.stop_all().await;
}

/// A message to each of the members that the function returns, given the leader.
type Through = (&'static str, fn(NodeId) -> Vec<NodeId>, Forge);

const ALL: fn(NodeId) -> Vec<NodeId> = |_| vec![1, 2, 3];
const LEADER: fn(NodeId) -> Vec<NodeId> = |leader| vec![leader];
const FOLLOWER: fn(NodeId) -> Vec<NodeId> = |leader| vec![leader % 3 + 1];

/// Must be accepted: the sender may lead a cluster that the receiver lags behind.
#[rustfmt::skip]
const LET_THROUGH: &[Through] = {
    use EntryType::{EntryConfChange, EntryConfChangeV2, EntryNormal};
    use MessageType::*;
    &[
        ("a heartbeat of a later term to a follower", FOLLOWER, |k, from| { let mut m = message(MsgHeartbeat, k, from); m.term += 1; plain(m) }),
        ("a heartbeat of a later term to the leader", LEADER, |k, from| { let mut m = message(MsgHeartbeat, k, from); m.term += 1; plain(m) }),
        ("an append to a follower", FOLLOWER, |k, from| plain(append(k, from, |index, term| vec![entry(index, term + 1, EntryNormal, vec![])]))),
        ("an append to the leader", LEADER, |k, from| plain(append(k, from, |index, term| vec![entry(index, term + 1, EntryNormal, vec![])]))),
        ("an append over what is committed", FOLLOWER, |k, from| { let mut m = append(k, from, |_, _| vec![]); (m.index, m.log_term, m.commit) = (0, 0, k.commit); let term = m.term; m.entries = (1..=k.last.0).map(|index| entry(index, term, EntryNormal, vec![])).collect::<Vec<_>>().into(); plain(m) }),
        ("a commit of entries that cannot be read", ALL, |k, from| { let mut m = append(k, from, |index, _| vec![entry(index, k.term + 1, EntryNormal, vec![0xff; 40]), entry(index + 1, k.term + 1, EntryConfChange, vec![0xff; 7]), entry(index + 2, k.term + 1, EntryConfChangeV2, vec![])]); m.commit = k.last.0 + 3; plain(m) }),
        ("a vote in a term far ahead", ALL, |k, from| { let mut m = message(MsgRequestVote, k, from); m.term += 1 << 31; (m.index, m.log_term) = (k.last.0, k.last.1 + 1); plain(m) }),
        ("a pre-vote in a term far ahead", ALL, |k, from| { let mut m = message(MsgRequestPreVote, k, from); m.term += 1 << 31; (m.index, m.log_term) = (k.last.0, k.last.1 + 1); plain(m) }),
        ("a heartbeat of a term far ahead", ALL, |k, from| { let mut m = message(MsgHeartbeat, k, from); m.term += 1 << 31; plain(m) }),
    ]
};

#[tokio::test(flavor = "multi_thread")]
async fn a_valid_message_of_a_stranger_loses_no_committed_entry() {
    let mut cluster = Cluster::started(3, Options::default()).await;
    let mut forger = Forger::new(&cluster, 1);
    let stranger = forger.stranger();
    for (number, (what, receivers, forge)) in LET_THROUGH.iter().enumerate() {
        let leader = cluster.leader().await;
        cluster.write(leader, &format!("/key-{number}"), what).await;
        cluster.caught_up(&[1, 2, 3]).await;
        // A leader of all of them would know this. It is the same for each receiver, so that none
        // is told another commit index.
        let leading = known(&cluster, leader, forger.cluster_id);
        for to in receivers(leader) {
            let before = cluster.status(to);
            let forged = forge(&Known { id: to, ..leading.clone() }, STRANGER);
            let (url, sender) = (cluster.url(to), Sender { to, ..stranger.clone() });
            // A busy member answers 503; sending it again does no harm.
            let is_vote = what.contains("vote");
            eventually(PATIENCE, &format!("{what} reaches member {to}"), async || {
                let is_taken = forger.send(&url, &sender, &forged).await == 204;
                is_taken && (is_vote || cluster.status(to).term >= forged.message.term)
            })
            .await;
            assert!(cluster.status(to).commit >= before.commit, "{what}, member {to}");
        }
        let leader = cluster.leader().await;
        assert!(cluster.status(leader).commit >= leading.commit, "{what}");
        for id in 1..=3 {
            cluster.write(id, "/later", what).await;
            for (number, (earlier, ..)) in LET_THROUGH[..=number].iter().enumerate() {
                let held = cluster.client(id).get(&format!("/key-{number}")).await;
                assert_eq!(held.expect(200).text(), *earlier, "after {what}, member {id}");
            }
        }
    }
    cluster.leader().await;
    cluster.caught_up(&[1, 2, 3]).await;
    cluster.stop_all().await;
    // They agree on everything that is committed at any member.
    let logs = [1, 2, 3].map(|id| Wal::read(&DiskVfs, &cluster.wal_dir(id)).unwrap());
    let commit = logs.iter().map(|log| log.hard_state.commit).min().unwrap() as usize;
    for log in &logs {
        assert!(log.entries[..commit] == logs[0].entries[..commit]);
    }
}
