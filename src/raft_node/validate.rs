//! Validation: which messages may reach `RawNode::step`.
//!
//! raft-rs trusts its peers. A message that no member would send can make it panic, and one from another
//! time or another cluster can poison its term. Every rule here prevents one of these; the tests have a
//! table of what well-formed hostile messages do.
//!
//! An unknown sender is not refused as such: this member may lag, and the sender may be its leader. But
//! only messages of leaders and candidates are accepted from it.

use protobuf::Message as _;
use raft::eraftpb::{Entry, EntryType, Message, MessageType};
use raft::{CAMPAIGN_TRANSFER, Raft, StateRole};

use super::{NodeId, RequestId};
use crate::codec;
use crate::membership::SnapshotData;
use crate::storage::log::Log;
use crate::transport::PEER_BODY_BYTES;

/// No index or term is ever this high. Arithmetic on valid ones cannot overflow.
pub(crate) const HIGHEST: u64 = 1 << 62;
/// How far a term may be ahead of this member's. A higher one would poison it for good.
const TERM_LEAP_MAX: u64 = 1 << 32;
/// The largest entry that may be proposed here, in bytes: an append with this entry alone fits into the
/// largest request body that peers take.
const ENTRY_BYTES_MAX: u64 = PEER_BODY_BYTES - 1024;

/// What a message is validated against.
pub(super) struct View<'a> {
    pub raft: &'a Raft<Log>,
    /// True if this member was removed and stays only until the others know.
    pub is_leaving: bool,
    /// True if the sender is a member in the state applied here.
    pub sender_is_member: bool,
    /// True if the message carries a snapshot whose file was received.
    pub has_file: bool,
}

/// Why a message is dropped.
pub(super) enum Invalid {
    /// The leader counts on entries that this member does not have: its data is lost.
    CommitBeyondLog,
    /// An honest member may send it, and it comes too late or too early.
    Untimely(&'static str),
    /// No member sends such a message.
    Other(&'static str),
}

/// Decides whether `message`, from a request of member `sender`, may be stepped; an error says why not.
pub(super) fn validate(message: &Message, sender: NodeId, view: &View<'_>) -> Result<(), Invalid> {
    use MessageType::*;

    let raft = view.raft;
    let is_leader = raft.state == StateRole::Leader;
    let last_index = raft.raft_log.last_index();
    let is_persisted = raft.raft_log.persisted == last_index;
    require(message.to == raft.id, "it is for another member")?;
    require(message.from == sender && sender != raft.id, "it names another sender")?;
    let from_anyone = matches!(
        message.get_msg_type(),
        MsgAppend | MsgHeartbeat | MsgRequestVote | MsgRequestPreVote | MsgSnapshot
    );
    require(from_anyone || view.sender_is_member, "its sender is no member here")?;
    require(message.request_snapshot == 0, "it asks for a snapshot out of turn")?;
    let has_priority = message.priority != 0 || message.deprecated_priority != 0;
    require(!has_priority, "no member here has a priority")?;
    let numbers =
        [message.index, message.log_term, message.commit, message.commit_term, message.reject_hint];
    require(numbers.iter().all(|number| *number < HIGHEST), "it holds an impossible number")?;
    if matches!(message.get_msg_type(), MsgPropose | MsgReadIndex) {
        require(message.term == 0, "a forwarded request has no term")?;
        require(is_leader, "a request was forwarded to a member that does not lead")?;
        require(!view.is_leaving, "a request was forwarded to a member that was removed")?;
    } else {
        require(message.term != 0, "it has no term")?;
        let highest = raft.term.saturating_add(TERM_LEAP_MAX).min(HIGHEST);
        require(message.term <= highest, "its term is impossibly high")?;
    }

    match message.get_msg_type() {
        MsgPropose => {
            require(
                message.log_term == raft.term,
                "it was proposed to the leader of another term",
            )?;
            validate_proposal(message)
        }
        MsgReadIndex | MsgReadIndexResp => require(
            message.entries.len() == 1 && message.entries[0].data.len() == RequestId::LEN,
            "a read carries one context",
        ),
        MsgAppend => validate_append(message),
        MsgHeartbeat if message.commit > last_index => Err(Invalid::CommitBeyondLog),
        MsgHeartbeat | MsgHeartbeatResponse => require(
            message.context.is_empty() || message.context.len() == RequestId::LEN,
            "its context is not a read's",
        ),
        MsgAppendResponse => require(
            !is_leader || message.index <= last_index || message.reject,
            "it acknowledges entries that do not exist",
        ),
        MsgRequestVote | MsgRequestPreVote => require(
            message.context.is_empty()
                || (view.sender_is_member && message.context == CAMPAIGN_TRANSFER),
            "it forces a vote without being a member",
        ),
        // raft asserts that the whole log is on disk when it wins an election, and requests votes only
        // then. A leader has won already.
        MsgRequestVoteResponse | MsgRequestPreVoteResponse => match is_leader || is_persisted {
            true => Ok(()),
            false => Err(Invalid::Untimely("it answers what was not asked yet")),
        },
        // A member that needs only its own vote wins at once, so the same holds here.
        MsgTimeoutNow => require(
            message.term == raft.term && message.from == raft.leader_id && is_persisted,
            "only the leader transfers leadership, and only to a member whose log is on disk",
        ),
        MsgSnapshot => {
            require(view.has_file, "a snapshot comes with its file")?;
            validate_snapshot(message, raft.id)
        }
        // Local to one node, or never sent by this program.
        MsgHup | MsgBeat | MsgUnreachable | MsgSnapStatus | MsgCheckQuorum | MsgTransferLeader => {
            Err(Invalid::Other("it is of a type that is not sent"))
        }
    }
}

fn require(holds: bool, why: &'static str) -> Result<(), Invalid> {
    if holds { Ok(()) } else { Err(Invalid::Other(why)) }
}

fn validate_proposal(message: &Message) -> Result<(), Invalid> {
    let is_request = |entry: &Entry| {
        entry.get_entry_type() == EntryType::EntryNormal
            && RequestId::from_bytes(&entry.context).is_some()
    };
    let are_requests = !message.entries.is_empty() && message.entries.iter().all(is_request);
    require(are_requests, "it proposes something that is no client's request")?;
    // It would be appended, but neither it nor any later entry could reach another member.
    let fits = |entry: &Entry| u64::from(entry.compute_size()) <= ENTRY_BYTES_MAX;
    require(message.entries.iter().all(fits), "it proposes an entry that no append can hold")
}

fn validate_append(message: &Message) -> Result<(), Invalid> {
    let (mut index, mut term) = (message.index, message.log_term);
    // raft takes term 0 as a match with any index beyond its log.
    let is_possible = (index == 0) == (term == 0) && term <= message.term;
    require(is_possible, "it names no possible term for the entry before its own")?;
    for entry in &message.entries {
        require(entry.index == index + 1, "its entries have a gap")?;
        let rises = (term.max(1)..=message.term).contains(&entry.term);
        require(rises, "the terms of its entries do not rise")?;
        (index, term) = (entry.index, entry.term);
    }
    Ok(())
}

fn validate_snapshot(message: &Message, own: NodeId) -> Result<(), Invalid> {
    let metadata = message.get_snapshot().get_metadata();
    let conf_state = metadata.get_conf_state();
    require((1..HIGHEST).contains(&metadata.index), "its snapshot has an impossible index")?;
    require((1..=message.term).contains(&metadata.term), "its snapshot has an impossible term")?;
    let mut ids: Vec<NodeId> =
        conf_state.voters.iter().chain(&conf_state.learners).copied().collect();
    ids.sort_unstable();
    // raft can restore a ConfState that is not joint, with a voter, no id twice and no id 0.
    let is_simple = !conf_state.voters.is_empty()
        && !ids.contains(&0)
        && ids.is_sorted_by(|one, next| one < next)
        && conf_state.voters_outgoing.is_empty()
        && conf_state.learners_next.is_empty()
        && !conf_state.auto_leave;
    require(is_simple, "its snapshot has impossible members")?;
    require(ids.contains(&own), "its snapshot does not count us as a member")?;
    let Ok(data) = codec::decode::<SnapshotData>(&message.get_snapshot().data) else {
        return Err(Invalid::Other("its snapshot's members cannot be decoded"));
    };
    let is_same = data.members.voters == conf_state.voters
        && data.members.learners == conf_state.learners
        && data.members.members.learners.iter().eq(&data.members.learners)
        && data.members.members.urls.keys().eq(&ids)
        && data.members.members.incarnations.keys().eq(&data.members.voters);
    require(is_same, "its snapshot names other members than its ConfState")
}
