//! Members in each role, and messages forged in another member's name.

use raft::eraftpb::{Message, MessageType};
use raftexample::channels::PeerHeader;
use raftexample::raft_node::Input;

use super::*;

/// The state of a member when a forged message arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It leads three members, as the next roles have.
    Leader,
    /// It follows member 1.
    Follower,
    /// It was just started and knows no leader.
    Silent,
    PreCandidate,
    Candidate,
    /// It leads a cluster of one.
    Alone,
}

impl Role {
    fn is_alone(self) -> bool {
        self == Self::Alone
    }

    /// The disk of member 2 of three, or of the only member, with a few applied writes.
    pub fn image(self) -> MemVfs {
        let (id, size) = if self.is_alone() { (1, 1) } else { (2, 3) };
        let mut network = Network::new(size, |_| {});
        for number in 0..5 {
            network.put(1, "key", &number.to_string());
        }
        network.settle();
        network.crash(id, Survives::Everything).image()
    }

    /// A member that just entered this role, on a copy of `image`.
    pub fn start(self, image: &MemVfs) -> Member {
        let config = if self.is_alone() { config(1, 1) } else { config(2, 3) };
        let mut member = Member::start(&config, &image.image(), &Transcript::default()).unwrap();
        match self {
            Self::Silent => {}
            Self::Alone => member.tick_until_leader().unwrap(),
            Self::Follower => {
                let heartbeat = forged(&member, MessageType::MsgHeartbeat, 1);
                member.turn([from_peer(&member, 1, 1, vec![heartbeat])]).unwrap();
                assert_eq!(member.status().leader, 1);
            }
            Self::PreCandidate => campaign(&mut member, MessageType::MsgRequestPreVote),
            Self::Candidate => campaign(&mut member, MessageType::MsgRequestVote),
            Self::Leader => {
                campaign(&mut member, MessageType::MsgRequestVote);
                let vote = forged(&member, MessageType::MsgRequestVoteResponse, 1);
                member.turn([from_peer(&member, 1, 3, vec![vote])]).unwrap();
                assert_eq!(member.status().leader, 2);
            }
        }
        member
    }
}

/// Makes a member campaign until it sends `wanted`.
fn campaign(member: &mut Member, wanted: MessageType) {
    let mut asked = None;
    while asked.is_none() {
        member.tick().unwrap();
        asked = member.take_messages().pop();
    }
    if wanted == MessageType::MsgRequestVote {
        let mut answer = forged(member, MessageType::MsgRequestPreVoteResponse, 1);
        answer.term = asked.expect("it was awaited").term;
        member.turn([from_peer(member, 1, 2, vec![answer])]).unwrap();
        asked = member.take_messages().pop();
    }
    assert_eq!(asked.map(|asked| asked.get_msg_type()), Some(wanted));
}

/// A message from a sender with the same log as `member`.
pub fn forged(member: &Member, kind: MessageType, from: u64) -> Message {
    let wal = member.wal();
    let entry = wal.entries.last().map(|last| (last.index, last.term));
    let snapshot = wal.marks.last().map(|mark| (mark.index, mark.term));
    let (index, log_term) = entry.or(snapshot).expect("something is committed from the start");
    let term = member.status().term;
    let mut message = Message { from, to: member.id, term, index, log_term, ..Message::default() };
    message.set_msg_type(kind);
    message
}

/// A correct header of another member or of a stranger.
pub fn header_of(member: &Member, id: u64) -> PeerHeader {
    PeerHeader {
        from: id,
        incarnation: 100 + id,
        url: url(id),
        to_incarnation: member.config.incarnation,
        ..member.header(member.id)
    }
}

/// Batch `number` in another member's name.
pub fn from_peer(member: &Member, id: u64, number: u64, messages: Vec<Message>) -> Input {
    Input::Inbound(batch(header_of(member, id), 1, number, messages))
}
