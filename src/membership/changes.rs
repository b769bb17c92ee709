//! Changes of the members as entries of the log, in raft's own form.

use protobuf::Message as _;
use raft::eraftpb::ConfChange;
use raft::eraftpb::ConfChangeType::{AddLearnerNode, AddNode, RemoveNode};

use crate::channels::NodeId;

/// What an entry of the log changes about the members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberChange {
    /// Add a member without a vote.
    AddLearner {
        /// The new member, an id never used before.
        id: NodeId,
        /// Its peer URL.
        url: String,
    },
    /// Add a member with a vote: one of the first members.
    AddVoter {
        /// The new member.
        id: NodeId,
        /// Its peer URL.
        url: String,
        /// Its data directory.
        incarnation: u64,
    },
    /// Give a learner a vote.
    Promote {
        /// The learner.
        id: NodeId,
        /// The data directory whose progress was counted: no other one votes as this member.
        incarnation: u64,
    },
    /// Change where a member listens for its peers. This means nothing to raft.
    Move {
        /// The member.
        id: NodeId,
        /// Its new peer URL.
        url: String,
    },
    /// Remove a member for good.
    Remove {
        /// The member.
        id: NodeId,
    },
}

/// `ConfChange::id`, which raft leaves to the program: it distinguishes the changes that are all
/// `AddNode` to raft.
const AS_NAMED: u64 = 0;
const PROMOTION: u64 = 1;
const MOVE: u64 = 2;

impl MemberChange {
    /// Decodes the data of an entry, and returns raft's form of the change as well. An error says why
    /// it is not a change that a member proposes.
    pub fn decode(data: &[u8]) -> Result<(ConfChange, Self), String> {
        let mut conf_change = ConfChange::default();
        conf_change.merge_from_bytes(data).map_err(|error| error.to_string())?;
        let id = conf_change.node_id;
        let url_in = |bytes: &[u8]| {
            String::from_utf8(bytes.to_vec())
                .map_err(|_| format!("the URL of member {id} is not UTF-8"))
        };
        let context = &conf_change.context[..];
        // The changes that bind an id to a directory begin with its incarnation.
        let bound = || match context.split_first_chunk() {
            Some((incarnation, rest)) => Ok((u64::from_le_bytes(*incarnation), rest)),
            None => Err(format!("the incarnation of member {id} is missing")),
        };
        let change = match (conf_change.get_change_type(), conf_change.id) {
            (AddNode, AS_NAMED) => {
                let (incarnation, url) = bound()?;
                Self::AddVoter { id, url: url_in(url)?, incarnation }
            }
            (AddNode, PROMOTION) => Self::Promote { id, incarnation: bound()?.0 },
            (AddNode, MOVE) => Self::Move { id, url: url_in(context)? },
            (AddLearnerNode, AS_NAMED) => Self::AddLearner { id, url: url_in(context)? },
            (RemoveNode, AS_NAMED) => Self::Remove { id },
            (change, kind) => return Err(format!("{change:?} of kind {kind} for member {id}")),
        };
        Ok((conf_change, change))
    }

    /// Raft's form of the change. As in the original, the URL is in the context.
    pub fn to_conf_change(&self) -> ConfChange {
        let bound =
            |incarnation: u64, url: &str| [&incarnation.to_le_bytes(), url.as_bytes()].concat();
        let (kind, change_type, node_id, context) = match self.clone() {
            Self::AddLearner { id, url } => (AS_NAMED, AddLearnerNode, id, url.into_bytes()),
            Self::AddVoter { id, url, incarnation } => {
                (AS_NAMED, AddNode, id, bound(incarnation, &url))
            }
            Self::Promote { id, incarnation } => (PROMOTION, AddNode, id, bound(incarnation, "")),
            Self::Move { id, url } => (MOVE, AddNode, id, url.into_bytes()),
            Self::Remove { id } => (AS_NAMED, RemoveNode, id, Vec::new()),
        };
        let context = context.into();
        ConfChange { id: kind, change_type, node_id, context, ..ConfChange::default() }
    }

    /// The data of the entry that carries the change.
    pub fn encode(&self) -> Vec<u8> {
        self.to_conf_change().write_to_bytes().expect("a change of members can be encoded")
    }
}
