//! Who is a member and where it listens, which change of that is allowed, and who may speak.
//!
//! [`Members`] is replicated state: it changes only by committed entries, travels in snapshots, and
//! every decision on it is a pure function, so that all members decide alike. [`PeerGate`] is what
//! one member knows beside it about who stands behind an id.
//!
//! # Ids and incarnations
//! An id is used once. A removed id stays in the removed set for ever: a member that was away may
//! still believe in it (etcd #18757). An incarnation is drawn at random when a data directory is
//! made, and each member records the first one that it hears for an id. So a member that lost its
//! directory, and with it the votes it gave and the entries it acknowledged, is not mistaken for the
//! one that gave them (raft-rs: `to_commit out of range`).

use std::collections::BTreeMap;

use hyper::http::uri::Authority;
use raft::eraftpb::ConfState;
use serde::{Deserialize, Serialize};

use crate::channels::{Index, MemberChange, NodeId, PeerHeader, Refusal};
use crate::error::RequestError;

/// How many ids that are no members may have a recorded incarnation. Whoever holds the cluster's id
/// is trusted, so this only bounds what mistakes can fill.
const OTHER_INCARNATIONS_MAX: usize = 64;

/// The members and those who were: the part of the replicated state that is raft's own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    /// The peer URL of each member.
    pub urls: BTreeMap<NodeId, String>,
    /// The removed ids, each with the index of its removal.
    pub removed: BTreeMap<NodeId, Index>,
}

/// Whether a change has anything to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It changes the members.
    Change,
    /// It is allowed and changes nothing: DELETE of an id that is no member.
    Nothing,
}

impl Members {
    /// Decides whether `change` is allowed. The leader asks before it proposes, every member asks
    /// again when it applies: what fails then is a no-op everywhere.
    ///
    /// # Errors
    /// 400 for what no state allows, 410 for a removed id, 409 for what this state does not allow.
    pub fn check(&self, change: &MemberChange) -> Result<Verdict, RequestError> {
        match change {
            MemberChange::Add { id, url } => {
                check_id(*id)?;
                check_url(url).map_err(RequestError::Invalid)?;
                if let Some(index) = self.removed.get(id) {
                    return Err(RequestError::Gone(format!(
                        "member {id} was removed at index {index}; an id is never used again: add it under a new one"
                    )));
                }
                if let Some(known) = self.urls.get(id) {
                    return Err(RequestError::Conflict(format!(
                        "{id} is a member already, at {known}"
                    )));
                }
                if let Some((other, _)) = self.urls.iter().find(|(_, known)| *known == url) {
                    return Err(RequestError::Conflict(format!(
                        "{url} is the peer URL of member {other} already"
                    )));
                }
                Ok(Verdict::Change)
            }
            MemberChange::Remove { id } => {
                if !self.urls.contains_key(id) {
                    return Ok(Verdict::Nothing);
                }
                if self.urls.len() == 1 {
                    return Err(RequestError::Conflict(format!(
                        "{id} is the last member; stop it instead"
                    )));
                }
                Ok(Verdict::Change)
            }
        }
    }

    /// Carries `change` out; `index` is its entry's.
    pub fn apply(&mut self, change: &MemberChange, index: Index) {
        match change {
            MemberChange::Add { id, url } => {
                self.urls.insert(*id, url.clone());
            }
            MemberChange::Remove { id } => {
                self.urls.remove(id);
                self.removed.insert(*id, index);
            }
        }
    }

    /// Decides whether enough members would be left to go on: of those that would remain, a majority
    /// must have been heard from lately. A dead member can always be removed: the majority that lives
    /// now still is one of fewer members.
    ///
    /// # Errors
    /// 409 naming the dead member to remove first.
    pub fn check_majority_lives(
        &self,
        removed: NodeId,
        lives: impl Fn(NodeId) -> bool,
    ) -> Result<(), RequestError> {
        let remaining: Vec<NodeId> =
            self.urls.keys().copied().filter(|id| *id != removed).collect();
        let living = remaining.iter().filter(|id| lives(**id)).count();
        // That somebody has to remain at all is for `check` to say.
        if remaining.is_empty() || living >= majority(remaining.len()) {
            return Ok(());
        }
        let dead = remaining.iter().find(|id| !lives(**id));
        Err(RequestError::Conflict(format!(
            "without member {removed} only {living} of {} members would live: remove member {} first",
            remaining.len(),
            dead.expect("fewer than all live")
        )))
    }
}

/// What a snapshot says of the members: in the file, and with the file's length and checksum in
/// raft's own `Snapshot.data`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMembers {
    /// The cluster that the snapshot belongs to.
    pub cluster_id: u64,
    /// The voters of the ConfState.
    pub voters: Vec<NodeId>,
    /// The learners of the ConfState.
    pub learners: Vec<NodeId>,
    /// The members and the removed ids.
    pub members: Members,
}

impl SnapshotMembers {
    /// The ConfState as raft has it.
    pub fn conf_state(&self) -> ConfState {
        ConfState {
            voters: self.voters.clone(),
            learners: self.learners.clone(),
            ..Default::default()
        }
    }
}

/// raft's `Snapshot.data`: everything but the state itself, which is streamed as a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotData {
    /// The members as of the snapshot's index.
    pub members: SnapshotMembers,
    /// The file's length in bytes.
    pub length: u64,
    /// The file's CRC32C.
    pub checksum: u32,
}

/// How many of `n` members are a majority.
pub fn majority(n: usize) -> usize {
    n / 2 + 1
}

fn check_id(id: NodeId) -> Result<(), RequestError> {
    if id == 0 {
        return Err(RequestError::Invalid("0 is no member id: ids start at 1".into()));
    }
    Ok(())
}

/// Decides whether `url` can be a peer URL: `http://host:port`, and nothing behind the port. The original commits anything, and then panics at every start on every member.
///
/// # Errors
/// One line that says what is wrong.
pub fn check_url(url: &str) -> Result<(), String> {
    let wrong = |why: &str| Err(format!("{url:?} is no peer URL: {why}; write http://HOST:PORT"));
    let Some(authority) = url.strip_prefix("http://") else {
        return wrong("it does not start with http://");
    };
    if authority.chars().any(|c| c.is_whitespace() || c.is_control() || !c.is_ascii()) {
        return wrong("it holds a space, a control character or one outside ASCII");
    }
    if authority.contains(['/', '?', '#']) {
        return wrong("there is something behind the port");
    }
    let Ok(parsed) = authority.parse::<Authority>() else {
        return wrong("its host cannot be parsed");
    };
    if parsed.as_str().contains('@') {
        return wrong("it holds a user name");
    }
    match parsed.port_u16() {
        None | Some(0) => wrong("it names no port"),
        Some(_) if parsed.host().is_empty() => wrong("it names no host"),
        Some(_) => Ok(()),
    }
}

/// What one member knows of who may speak to it.
#[derive(Clone, Debug)]
pub struct PeerGate {
    /// Our own cluster; 0 while we join one.
    pub cluster_id: u64,
    /// Our own id.
    pub id: NodeId,
    /// Our own incarnation.
    pub incarnation: u64,
    /// Where we listen for our peers.
    pub url: String,
    /// Our list of first URLs; empty if we joined.
    pub first_urls: Vec<String>,
    /// The members, as applied here.
    pub members: Members,
    /// The first incarnation heard for each id.
    pub incarnations: BTreeMap<NodeId, u64>,
}

/// What is known of a sender that may speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// Its incarnation is the recorded one.
    Known,
    /// No incarnation is recorded for it: it has to be, durably, before it is answered.
    New,
}

impl PeerGate {
    /// The header of what we send to member `to`.
    pub fn header(&self, to: NodeId) -> PeerHeader {
        PeerHeader {
            cluster_id: self.cluster_id,
            from: self.id,
            incarnation: self.incarnation,
            url: self.url.clone(),
            to,
        }
    }

    /// Decides whether the sender of a raft message, or of a change of members, may speak.
    ///
    /// # Errors
    /// The refusal to answer with; nothing of the request may have an effect.
    pub fn admit(&self, header: &PeerHeader) -> Result<Sender, Refusal> {
        if header.cluster_id != self.cluster_id || self.cluster_id == 0 {
            return Err(Refusal::Mismatch(format!(
                "this is member {} of cluster {:016x}{}, the sender belongs to cluster {:016x}",
                self.id,
                self.cluster_id,
                match &self.first_urls[..] {
                    [] => String::new(),
                    urls => format!(" (--cluster {})", urls.join(",")),
                },
                header.cluster_id
            )));
        }
        if header.to != self.id {
            return Err(Refusal::Mismatch(format!(
                "this is member {}, the message is for member {}",
                self.id, header.to
            )));
        }
        self.admit_sender(header)
    }

    /// Decides whether the sender of a greeting may speak: it may not know our id yet, nor, if it
    /// joins, the cluster's.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub fn admit_greeting(&self, header: &PeerHeader) -> Result<Sender, Refusal> {
        let header = PeerHeader {
            cluster_id: match header.cluster_id {
                0 => self.cluster_id,
                cluster_id => cluster_id,
            },
            to: if header.to == 0 { self.id } else { header.to },
            ..header.clone()
        };
        self.admit(&header)
    }

    fn admit_sender(&self, header: &PeerHeader) -> Result<Sender, Refusal> {
        let id = header.from;
        if id == 0 || check_url(&header.url).is_err() {
            return Err(Refusal::Mismatch(format!(
                "member {id} at {:?} is no possible sender",
                header.url
            )));
        }
        if id == self.id {
            return Err(if header.incarnation == self.incarnation {
                Refusal::Mismatch(format!("member {id} speaks to itself"))
            } else {
                Refusal::OtherIncarnation(format!(
                    "member {id} runs here already with another data directory"
                ))
            });
        }
        if let Some(index) = self.members.removed.get(&id) {
            return Err(Refusal::Removed { id, index: *index });
        }
        let incarnation = self.incarnations.get(&id);
        if let Some(known) = incarnation
            && *known != header.incarnation
        {
            return Err(Refusal::OtherIncarnation(format!(
                "member {id} is known with the data directory {known:016x}, not {:016x}: it lost its data; DELETE it and add it under a new id",
                header.incarnation
            )));
        }
        // A copy of a member's directory has its incarnation too. Nobody sends anything to where the
        // copy listens, but what it says would be taken for the member's.
        if let Some(url) = self.members.urls.get(&id)
            && *url != header.url
        {
            return Err(Refusal::Mismatch(format!(
                "member {id} listens at {url}, not at {}: start it there, and no copy of it anywhere",
                header.url
            )));
        }
        match incarnation {
            Some(_) => Ok(Sender::Known),
            None => {
                let is_other = |id: &&NodeId| {
                    !self.members.urls.contains_key(id) && !self.members.removed.contains_key(id)
                };
                let others = self.incarnations.keys().filter(is_other).count();
                if !self.members.urls.contains_key(&id) && others >= OTHER_INCARNATIONS_MAX {
                    return Err(Refusal::NotReady(format!(
                        "too many ids that are no members have spoken; {id} is one more"
                    )));
                }
                Ok(Sender::New)
            }
        }
    }
}
