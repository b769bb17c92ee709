//! What a forger needs: a member in each role, and a way to write to it in another's name.

use raft::eraftpb::{Message, MessageType};
use raftexample::channels::PeerHeader;
use raftexample::raft_node::Input;

use super::*;

/// What a member is when a forged message comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// One of three, as all of those that follow: it leads.
    Leader,
    /// It follows member 1.
    Follower,
    /// It was just started, and knows of no leader.
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

    /// The disk of member 2 of three, or of the only one, after a few writes; all of them are
    /// applied.
    pub fn image(self) -> MemVfs {
        let (id, size) = if self.is_alone() { (1, 1) } else { (2, 3) };
        let mut network = Network::new(size, |_| {});
        for number in 0..5 {
            network.put(1, "key", &number.to_string());
        }
        network.settle();
        network.crash(id, Survives::Everything).image()
    }

    /// A member that has just come to be this, on a copy of `image`.
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

/// Lets a member campaign until it asks for `wanted`.
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

/// What a member would send that has what `member` has.
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

/// The header of another member, or of a stranger, right in everything.
pub fn header_of(member: &Member, id: u64) -> PeerHeader {
    PeerHeader { from: id, incarnation: 100 + id, url: url(id), ..member.header(member.id) }
}

/// A batch in the name of another, the `number`-th.
pub fn from_peer(member: &Member, id: u64, number: u64, messages: Vec<Message>) -> Input {
    Input::Inbound(batch(header_of(member, id), 1, number, messages))
}
