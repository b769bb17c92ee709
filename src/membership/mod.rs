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

mod changes;

use std::collections::{BTreeMap, BTreeSet};

use hyper::http::uri::Authority;
use raft::eraftpb::ConfState;
use serde::{Deserialize, Serialize};

use crate::channels::{Index, MemberRequest, NodeId, PEER_URL_BYTES_MAX, PeerHeader, Refusal};
use crate::codec::{self, DecodeError};
use crate::error::RequestError;

pub use changes::MemberChange;

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
    /// The members that have no vote, the learners of raft's ConfState.
    pub learners: BTreeSet<NodeId>,
    /// Of those that moved, the index of the entry that gave them their URL.
    pub moved: BTreeMap<NodeId, Index>,
}

/// What a request or a change amounts to in the current state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The members change by this entry.
    Change(MemberChange),
    /// Leadership moves to this voter, or to any other one.
    Transfer(Option<NodeId>),
    /// It is allowed and changes nothing: DELETE of an id that is not a member.
    Nothing,
}

impl Members {
    /// Decides what the leader has to do for a client's `request`.
    ///
    /// # Errors
    /// As [`check`](Self::check); 409 for a transfer to a member without a vote.
    pub fn decide(&self, request: &MemberRequest) -> Result<Verdict, RequestError> {
        let change = match request {
            MemberRequest::Add { id, url } => {
                MemberChange::AddLearner { id: *id, url: url.clone() }
            }
            MemberRequest::Remove { id } => MemberChange::Remove { id: *id },
            MemberRequest::Move { id, url } => MemberChange::Move { id: *id, url: url.clone() },
            MemberRequest::Lead { to: Some(id) } if !self.voters().any(|voter| voter == *id) => {
                return Err(RequestError::Conflict(format!(
                    "{id} is no member with a vote: it cannot lead"
                )));
            }
            MemberRequest::Lead { to } => return Ok(Verdict::Transfer(*to)),
        };
        Ok(if self.check(&change)? { Verdict::Change(change) } else { Verdict::Nothing })
    }

    /// Decides whether `change` is allowed: true if it changes something. The leader asks before it
    /// proposes, and every member asks again when it applies; a change that fails then is a no-op on
    /// all of them.
    ///
    /// # Errors
    /// 400 for what no state allows, 410 for a removed id, 409 for what this state does not allow.
    pub fn check(&self, change: &MemberChange) -> Result<bool, RequestError> {
        match change {
            MemberChange::AddLearner { id, url } | MemberChange::AddVoter { id, url } => {
                check_id(*id)?;
                check_url(url).map_err(RequestError::Invalid)?;
                self.check_not_removed(*id)?;
                if let Some(known) = self.urls.get(id) {
                    return Err(RequestError::Conflict(format!(
                        "{id} is a member already, at {known}"
                    )));
                }
                self.check_unused(url)?;
                self.check_scheme(url)?;
                Ok(true)
            }
            MemberChange::Promote { id } if !self.learners.contains(id) => {
                Err(RequestError::Conflict(format!("{id} is no learner")))
            }
            MemberChange::Promote { .. } => Ok(true),
            MemberChange::Move { id, url } => {
                check_id(*id)?;
                check_url(url).map_err(RequestError::Invalid)?;
                self.check_not_removed(*id)?;
                match self.urls.get(id) {
                    None => return Err(RequestError::Conflict(format!("{id} is no member"))),
                    Some(known) if known == url => return Ok(false),
                    Some(_) => {}
                }
                self.check_unused(url)?;
                self.check_scheme(url)?;
                Ok(true)
            }
            MemberChange::Remove { id } => {
                if !self.urls.contains_key(id) {
                    return Ok(false);
                }
                if self.voters().eq([*id]) {
                    let others = if self.learners.is_empty() { "" } else { " with a vote" };
                    return Err(RequestError::Conflict(format!(
                        "{id} is the last member{others}; stop it instead"
                    )));
                }
                Ok(true)
            }
        }
    }

    fn check_not_removed(&self, id: NodeId) -> Result<(), RequestError> {
        match self.removed.get(&id) {
            None => Ok(()),
            Some(index) => Err(RequestError::Gone(format!(
                "member {id} was removed at index {index}; an id is never used again: add it under a new one"
            ))),
        }
    }

    fn check_unused(&self, url: &str) -> Result<(), RequestError> {
        match self.urls.iter().find(|(_, known)| *known == url) {
            None => Ok(()),
            Some((other, _)) => Err(RequestError::Conflict(format!(
                "{url} is the peer URL of member {other} already"
            ))),
        }
    }

    /// One that speaks TLS and one that does not would never hear of each other.
    fn check_scheme(&self, url: &str) -> Result<(), RequestError> {
        match self.urls.values().find(|known| is_https(known) != is_https(url)) {
            None => Ok(()),
            Some(known) => Err(RequestError::Conflict(format!(
                "{url} and the members' URLs, as {known}, have to begin alike: all with https:// or none"
            ))),
        }
    }

    /// The index of the entry that gave member `id` its URL after the one that added it; 0 if none did.
    pub fn moved_at(&self, id: NodeId) -> Index {
        self.moved.get(&id).copied().unwrap_or(0)
    }

    /// The members that have a vote.
    pub fn voters(&self) -> impl Iterator<Item = NodeId> {
        self.urls.keys().copied().filter(|id| !self.learners.contains(id))
    }

    /// Carries `change` out; `index` is its entry's.
    pub fn apply(&mut self, change: &MemberChange, index: Index) {
        match change {
            MemberChange::AddLearner { id, url } => {
                self.urls.insert(*id, url.clone());
                self.learners.insert(*id);
            }
            MemberChange::AddVoter { id, url } => {
                self.urls.insert(*id, url.clone());
            }
            MemberChange::Promote { id } => {
                self.learners.remove(id);
            }
            MemberChange::Move { id, url } => {
                self.urls.insert(*id, url.clone());
                self.moved.insert(*id, index);
            }
            MemberChange::Remove { id } => {
                self.urls.remove(id);
                self.learners.remove(id);
                self.moved.remove(id);
                self.removed.insert(*id, index);
            }
        }
    }

    /// Decides whether enough members would be left to go on: of the voters that would remain, a majority
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
        if self.learners.contains(&removed) {
            return Ok(());
        }
        let remaining: Vec<NodeId> = self.voters().filter(|id| *id != removed).collect();
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

impl Members {
    /// Decides whether member `id` may be said to listen elsewhere. If that is wrong, nobody finds it any
    /// more: then the others have to be a majority without it, to put it right.
    ///
    /// # Errors
    /// 409 if they are none.
    pub fn check_move(
        &self,
        id: NodeId,
        lives: impl Fn(NodeId) -> bool,
    ) -> Result<(), RequestError> {
        let voters = self.voters().count();
        let others = self.voters().filter(|other| *other != id && lives(*other)).count();
        if self.learners.contains(&id) || voters == 1 || others >= majority(voters) {
            return Ok(());
        }
        Err(RequestError::Conflict(format!(
            "without member {id} only {others} of {voters} voters live, and a wrong URL could not be put right: bring the others back, or remove it and add it under a new id"
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
    /// Decodes what the meta bytes of a snapshot hold, of an earlier version too: that had neither
    /// learners nor members that moved, and its bytes end where this one's go on.
    ///
    /// # Errors
    /// If they are neither.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        #[derive(Deserialize)]
        struct Members1 {
            urls: BTreeMap<NodeId, String>,
            removed: BTreeMap<NodeId, Index>,
        }
        #[derive(Deserialize)]
        struct SnapshotMembers1 {
            cluster_id: u64,
            voters: Vec<NodeId>,
            learners: Vec<NodeId>,
            members: Members1,
        }
        let error = match codec::decode(bytes) {
            Ok(members) => return Ok(members),
            Err(error) => error,
        };
        let Ok(SnapshotMembers1 { cluster_id, voters, learners, members }) = codec::decode(bytes)
        else {
            return Err(error);
        };
        let Members1 { urls, removed } = members;
        let members = Members { urls, removed, ..Members::default() };
        Ok(Self { cluster_id, voters, learners, members })
    }

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

/// True if whoever listens at a peer URL speaks TLS.
pub fn is_https(url: &str) -> bool {
    url.starts_with("https://")
}

/// The host and port of a peer URL; `None` if it has no scheme of ours.
pub fn authority(url: &str) -> Option<&str> {
    url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"))
}

/// Decides whether `url` can be a peer URL: `http://host:port` or `https://host:port`, and nothing
/// behind the port. The original commits anything, and then panics at every start on every member.
///
/// # Errors
/// One line that says what is wrong.
pub fn check_url(url: &str) -> Result<(), String> {
    if url.len() > PEER_URL_BYTES_MAX {
        return Err(format!(
            "a peer URL has {PEER_URL_BYTES_MAX} bytes at most, not {}",
            url.len()
        ));
    }
    let wrong = |why: &str| {
        Err(format!("{url:?} is no peer URL: {why}; write http://HOST:PORT or https://HOST:PORT"))
    };
    let Some(authority) = authority(url) else {
        return wrong("it does not start with http:// or https://");
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
        None | Some(0) => wrong("it names no port from 1 to 65535"),
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
    /// If we were restored from a snapshot, the id that an empty member with our list goes by; else 0.
    pub restored_list: u64,
    /// The members, as applied here.
    pub members: Members,
    /// The first incarnation heard for each id.
    pub incarnations: BTreeMap<NodeId, u64>,
    /// Members that say that they moved, by an entry that is not applied here yet: its index, and where
    /// they listen now.
    pub moved: BTreeMap<NodeId, (Index, String)>,
    /// Moves in our log that are not applied yet.
    pub moves_under_way: Vec<(NodeId, String)>,
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
            moved: match self.members.urls.get(&self.id) {
                Some(url) if *url == self.url => self.members.moved_at(self.id),
                _ => 0,
            },
            to,
        }
    }

    /// Decides whether the sender of a raft message, or of a change of members, may speak.
    ///
    /// # Errors
    /// The refusal to answer with; nothing of the request may have an effect.
    pub fn admit(&self, header: &PeerHeader) -> Result<Sender, Refusal> {
        if self.restored_list != 0 && header.cluster_id == self.restored_list {
            return Err(Refusal::Mismatch(format!(
                "this is member {} of cluster {:016x}, which was restored from a snapshot, and member {} was not: stop it, remove its directories, and make them with `raftexample snapshot restore` from the same file",
                self.id, self.cluster_id, header.from
            )));
        }
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

    /// Where a member listens, and the index of the entry that moved it there.
    pub fn listens_at(&self, id: NodeId) -> Option<(Index, &str)> {
        let applied = (self.members.moved_at(id), &self.members.urls.get(&id)?[..]);
        let said = self.moved.get(&id).map(|(index, url)| (*index, &url[..]));
        Some(said.filter(|(index, _)| *index > applied.0).unwrap_or(applied))
    }

    fn admit_sender(&self, header: &PeerHeader) -> Result<Sender, Refusal> {
        let id = header.from;
        if id == 0 || check_url(&header.url).is_err() {
            return Err(Refusal::Mismatch(format!(
                "member {id} at {:?} is no possible sender",
                header.url
            )));
        }
        if is_https(&header.url) != is_https(&self.url) {
            return Err(Refusal::Mismatch(format!(
                "member {id} listens at {}, and this one at {}: all with https:// or none",
                header.url, self.url
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
                "member {id} is known with the data directory {known:016x}, not {:016x}: if its data is lost, DELETE /{id} on another member and add it under a new id",
                header.incarnation
            )));
        }
        // A copy of a member's directory has its incarnation too. Nobody sends anything to where the
        // copy listens, but what it says would be taken for the member's. A member that says that it
        // was moved by an entry which is not applied here yet is right, or lies; from then on it is
        // heard from there alone. One that does not know yet that it was moved is where the entry says.
        if let Some((moved_at, url)) = self.listens_at(id)
            && url != header.url
            && header.moved <= moved_at
            && !self.moves_under_way.iter().any(|(moving, to)| (*moving, to) == (id, &header.url))
        {
            return Err(Refusal::Mismatch(format!(
                "member {id} listens at {url}, not at {}: start it there, and no copy of it anywhere, or PUT its new URL to /members/{id} of an admin listener",
                header.url
            )));
        }
        match incarnation {
            Some(_) => Ok(Sender::Known),
            None if self.is_not_restored(header) => Err(Refusal::OtherIncarnation(format!(
                "member {id} was not restored from the snapshot that this cluster was restored from: remove its directories, and make them with `raftexample snapshot restore` from the same file"
            ))),
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

impl PeerGate {
    /// True for a first member of a restored cluster whose directory has another origin than ours:
    /// what it has, or not, stands where our committed entries stand.
    fn is_not_restored(&self, header: &PeerHeader) -> bool {
        self.restored_list != 0
            && header.from <= self.first_urls.len() as u64
            && restoration(header.incarnation) != restoration(self.incarnation)
    }
}

/// The incarnation of a member that is restored: the upper half says from which file for which
/// members, the lower half is drawn at random.
pub fn restored_incarnation(restoration: u64, random: u64) -> u64 {
    restoration >> 32 << 32 | random & u64::from(u32::MAX)
}

fn restoration(incarnation: u64) -> u64 {
    incarnation >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(id: NodeId) -> String {
        format!("http://127.0.0.1:{}", 9020 + id)
    }

    fn members(ids: impl IntoIterator<Item = NodeId>) -> Members {
        Members { urls: ids.into_iter().map(|id| (id, url(id))).collect(), ..Members::default() }
    }

    fn add(id: NodeId) -> MemberChange {
        MemberChange::AddLearner { id, url: url(id) }
    }

    fn remove(id: NodeId) -> MemberChange {
        MemberChange::Remove { id }
    }

    #[test]
    fn a_peer_url_is_a_host_and_a_port_and_nothing_else() {
        for right in [
            "http://127.0.0.1:9021",
            "http://localhost:1",
            "http://a.b-c.example:65535",
            "http://[::1]:9021",
            "https://127.0.0.1:9021",
            "https://a.b-c.example:65535",
        ] {
            assert_eq!(check_url(right), Ok(()), "{right}");
        }
        for wrong in [
            "",
            "http://",
            "127.0.0.1:9021",
            "https://",
            "https://127.0.0.1",
            "https://127.0.0.1:9021/",
            "HTTP://127.0.0.1:9021",
            "HTTPS://127.0.0.1:9021",
            "ftp://127.0.0.1:9021",
            "http://127.0.0.1",
            "http://127.0.0.1:",
            "http://127.0.0.1:0",
            "http://127.0.0.1:65536",
            "http://127.0.0.1:-1",
            "http://127.0.0.1:port",
            "http://:9021",
            "http://127.0.0.1:9021/",
            "http://127.0.0.1:9021/raft",
            "http://127.0.0.1:9021?a=b",
            "http://127.0.0.1:9021#a",
            "http://user@127.0.0.1:9021",
            "http://user:word@127.0.0.1:9021",
            "http://::1:9021",
            "http://[::1:9021",
            "http://a b:9021",
            " http://127.0.0.1:9021",
            "http://127.0.0.1:9021 ",
            "http://127.0.0.1:9021\n",
            "http://127.0.0.1\r\n:9021",
            "http://b\u{fc}cher:9021",
            "http://a:9021,http://b:9021",
        ] {
            let why = check_url(wrong).expect_err(wrong);
            assert!(why.contains("http://HOST:PORT"), "{wrong:?}: {why}");
            assert!(!why.contains(['\n', '\r']), "one line: {why}");
        }
    }

    #[test]
    fn a_change_is_decided_on_the_state_alone() {
        use RequestError::{Conflict, Gone, Invalid};
        let mut state = members([1, 2, 3]);
        state.apply(&add(4), 10);
        state.apply(&remove(3), 11);
        assert_eq!(state.urls, members([1, 2, 4]).urls);
        assert_eq!(state.removed, BTreeMap::from([(3, 11)]));

        assert_eq!(state.check(&add(5)), Ok(true));
        assert_eq!(state.check(&remove(4)), Ok(true));
        assert_eq!(state.check(&remove(3)), Ok(false), "removed already");
        assert_eq!(state.check(&remove(0)), Ok(false));
        assert_eq!(state.check(&remove(77)), Ok(false));
        assert!(matches!(state.check(&add(0)), Err(Invalid(_))));
        let no_url = MemberChange::AddLearner { id: 3, url: "no url".into() };
        assert!(matches!(state.check(&no_url), Err(Invalid(_))), "before anything else");
        assert!(matches!(state.check(&add(3)), Err(Gone(why)) if why.contains("index 11")));
        let conflict = state.check(&add(2));
        assert!(matches!(&conflict, Err(Conflict(why)) if why.contains(&url(2))), "{conflict:?}");
        let same_url = MemberChange::AddLearner { id: 5, url: url(4) };
        let conflict = state.check(&same_url);
        assert!(
            matches!(&conflict, Err(Conflict(why)) if why.contains("member 4")),
            "{conflict:?}"
        );
        // Where a removed member listened another may listen.
        let reused = MemberChange::AddLearner { id: 5, url: url(3) };
        assert_eq!(state.check(&reused), Ok(true));

        let other_scheme = |state: &Members, url: &str| {
            state.check(&MemberChange::AddLearner { id: 5, url: url.into() })
        };
        let conflict = other_scheme(&state, "https://127.0.0.1:9");
        assert!(
            matches!(&conflict, Err(Conflict(why)) if why.contains("begin alike")),
            "{conflict:?}"
        );
        let secured =
            Members { urls: [(1, "https://127.0.0.1:8".into())].into(), ..Members::default() };
        assert_eq!(other_scheme(&secured, "https://127.0.0.1:9"), Ok(true));
        assert!(matches!(other_scheme(&secured, "http://127.0.0.1:9"), Err(Conflict(_))));
        let moved = MemberChange::Move { id: 2, url: "https://127.0.0.1:9".into() };
        assert!(matches!(state.check(&moved), Err(Conflict(why)) if why.contains("begin alike")));

        // A learner has no say, so it is nobody's to wait for.
        let learner = MemberChange::Promote { id: 4 };
        assert_eq!(state.learners, BTreeSet::from([4]));
        assert!(matches!(state.decide(&MemberRequest::Lead { to: Some(4) }), Err(Conflict(_))));
        assert_eq!(state.check(&learner), Ok(true));
        state.apply(&learner, 12);
        assert_eq!(state.voters().collect::<Vec<_>>(), [1, 2, 4]);
        assert!(matches!(state.check(&learner), Err(Conflict(_))), "twice");

        let to = |id, url: String| MemberChange::Move { id, url };
        assert_eq!(state.check(&to(2, url(2))), Ok(false));
        assert_eq!(state.check(&to(2, url(9))), Ok(true));
        assert!(matches!(state.check(&to(2, url(4))), Err(Conflict(_))), "member 4 is there");
        assert!(matches!(state.check(&to(3, url(9))), Err(Gone(_))));
        assert!(matches!(state.check(&to(7, url(9))), Err(Conflict(_))));
        assert!(matches!(state.check(&to(2, "no url".into())), Err(Invalid(_))));
        state.apply(&to(2, url(9)), 13);
        assert_eq!((&state.urls[&2], state.moved[&2]), (&url(9), 13));

        let mut last = members([1]);
        assert!(matches!(last.check(&remove(1)), Err(Conflict(why)) if why.contains("last")));
        last.apply(&add(2), 14);
        let only_voter = last.check(&remove(1));
        assert!(matches!(only_voter, Err(Conflict(why)) if why.contains("with a vote")));
        assert_eq!(last.check(&remove(2)), Ok(true));
        let last = members([1]);
        assert!(matches!(last.check(&remove(1)), Err(Conflict(why)) if why.contains("last")));
        assert_eq!(last.check(&remove(2)), Ok(false));
    }

    #[test]
    fn a_member_is_removed_only_if_a_majority_of_the_rest_lives() {
        // The members, those that live, the one to remove, and the one to remove first.
        type Case = (u64, &'static [NodeId], NodeId, Option<NodeId>);
        let cases: &[Case] = &[
            (1, &[1], 1, None),
            (1, &[], 1, None),
            (2, &[1, 2], 2, None),
            (2, &[1], 2, None),
            (2, &[1], 1, Some(2)),
            (3, &[1, 2, 3], 3, None),
            (3, &[1, 2], 3, None),
            (3, &[1, 2], 2, Some(3)),
            (4, &[1, 2, 3], 4, None),
            (4, &[1, 2, 3], 1, None),
            (5, &[1, 2, 3], 1, Some(4)),
            (5, &[1, 2, 3], 5, None),
            (5, &[1, 2, 3, 4], 4, None),
        ];
        for (n, living, removed, first) in cases {
            let what = format!("{removed} of {n}, living {living:?}");
            let verdict = members(1..=*n).check_majority_lives(*removed, |id| living.contains(&id));
            match first {
                None => assert_eq!(verdict, Ok(()), "{what}"),
                Some(first) => {
                    let RequestError::Conflict(why) = verdict.expect_err(&what) else {
                        panic!("{what}: not a conflict")
                    };
                    assert!(why.contains(&format!("remove member {first} first")), "{what}: {why}");
                }
            }
        }
    }

    /// Member 1 of three; it has heard of member 2, and of member 4 which was removed.
    fn gate() -> PeerGate {
        let mut members = members([1, 2, 3, 4]);
        members.apply(&remove(4), 20);
        PeerGate {
            cluster_id: 0xc1,
            id: 1,
            incarnation: 101,
            url: url(1),
            first_urls: (1..=3).map(url).collect(),
            restored_list: 0,
            members,
            incarnations: [(2, 102), (4, 104)].into(),
            moved: BTreeMap::new(),
            moves_under_way: Vec::new(),
        }
    }

    fn from(id: NodeId) -> PeerHeader {
        PeerHeader {
            cluster_id: 0xc1,
            from: id,
            incarnation: 100 + id,
            url: url(id),
            moved: 0,
            to: 1,
        }
    }

    #[test]
    fn who_may_speak_is_decided_by_cluster_receiver_id_incarnation_and_url() {
        let gate = gate();
        assert_eq!(gate.admit(&from(2)), Ok(Sender::Known));
        assert_eq!(gate.admit(&from(3)), Ok(Sender::New));
        assert_eq!(gate.admit(&from(9)), Ok(Sender::New), "we may be the one that is behind");
        assert_eq!(gate.admit(&from(4)), Err(Refusal::Removed { id: 4, index: 20 }));
        let elsewhere = PeerHeader { url: url(7), ..from(9) };
        assert_eq!(gate.admit(&elsewhere), Ok(Sender::New), "no URL of it is replicated");

        let mismatches = [
            ("another cluster", PeerHeader { cluster_id: 0xc2, ..from(2) }),
            ("no cluster", PeerHeader { cluster_id: 0, ..from(2) }),
            ("another receiver", PeerHeader { to: 2, ..from(2) }),
            ("no receiver", PeerHeader { to: 0, ..from(2) }),
            ("no sender", from(0)),
            ("no URL", PeerHeader { url: String::new(), ..from(2) }),
            ("ourselves", from(1)),
            ("one that speaks TLS", PeerHeader { url: "https://127.0.0.1:9".into(), ..from(9) }),
            ("a copy of a member elsewhere", PeerHeader { url: url(7), ..from(2) }),
            ("a new member elsewhere", PeerHeader { url: url(7), ..from(3) }),
        ];
        for (what, header) in mismatches {
            let refusal = gate.admit(&header);
            assert!(matches!(refusal, Err(Refusal::Mismatch(_))), "{what}: {refusal:?}");
        }
        for (what, header) in [
            ("a member that lost its data", PeerHeader { incarnation: 5, ..from(2) }),
            ("and moved", PeerHeader { incarnation: 5, url: url(7), ..from(2) }),
            ("another with our id", PeerHeader { incarnation: 5, ..from(1) }),
        ] {
            let refusal = gate.admit(&header);
            assert!(matches!(refusal, Err(Refusal::OtherIncarnation(_))), "{what}: {refusal:?}");
        }
        let Err(Refusal::Mismatch(why)) = gate.admit(&PeerHeader { cluster_id: 0xc2, ..from(2) })
        else {
            panic!("another cluster is a mismatch")
        };
        assert!(why.contains(&url(3)), "it names our list: {why}");
    }

    #[test]
    fn a_greeting_may_leave_cluster_and_receiver_open_and_nothing_else() {
        let joins = PeerGate { cluster_id: 0, first_urls: Vec::new(), ..gate() };
        let gate = gate();
        let open = |header| PeerHeader { cluster_id: 0, to: 0, ..header };
        assert_eq!(gate.admit_greeting(&from(2)), Ok(Sender::Known));
        assert_eq!(gate.admit_greeting(&open(from(2))), Ok(Sender::Known));
        assert_eq!(gate.admit_greeting(&open(from(3))), Ok(Sender::New));
        assert_eq!(gate.admit_greeting(&open(from(9))), Ok(Sender::New));
        let refusal = gate.admit_greeting(&open(from(4)));
        assert_eq!(refusal, Err(Refusal::Removed { id: 4, index: 20 }));
        let refusal = gate.admit_greeting(&open(PeerHeader { incarnation: 5, ..from(2) }));
        assert!(matches!(refusal, Err(Refusal::OtherIncarnation(_))), "{refusal:?}");
        for (what, header) in [
            ("another cluster", PeerHeader { cluster_id: 0xc2, to: 0, ..from(2) }),
            ("another receiver", PeerHeader { cluster_id: 0, to: 2, ..from(2) }),
            ("another URL", open(PeerHeader { url: url(7), ..from(2) })),
            ("ourselves", open(from(1))),
        ] {
            let refusal = gate.admit_greeting(&header);
            assert!(matches!(refusal, Err(Refusal::Mismatch(_))), "{what}: {refusal:?}");
        }
        // Two joiners know no cluster, and so nothing of each other.
        let refusal = joins.admit_greeting(&open(from(9)));
        assert!(matches!(refusal, Err(Refusal::Mismatch(_))), "{refusal:?}");
    }

    /// Each member that was ever removed has left its incarnation.
    #[test]
    fn any_number_of_removed_ids_keeps_no_new_sender_out() {
        let mut gate = gate();
        for id in 100..200 {
            gate.members.apply(&add(id), id);
            gate.members.apply(&remove(id), id + 1);
            gate.incarnations.insert(id, id);
        }
        assert_eq!(gate.admit(&from(9)), Ok(Sender::New));
        assert_eq!(gate.admit_greeting(&from(9)), Ok(Sender::New));
    }

    #[test]
    fn a_restored_member_hears_first_members_of_the_same_restoration_only() {
        const RESTORATION: u64 = 0xabcd_ef01_2345_6789;
        let incarnation = |random| restored_incarnation(RESTORATION, random);
        let gate = PeerGate {
            restored_list: 0xc0,
            incarnation: incarnation(1),
            incarnations: BTreeMap::new(),
            ..gate()
        };
        let restored = |id| PeerHeader { incarnation: incarnation(id), ..from(id) };
        assert_eq!(gate.admit(&restored(2)), Ok(Sender::New));
        assert_eq!(gate.admit_greeting(&restored(3)), Ok(Sender::New));
        assert_eq!(gate.admit(&from(9)), Ok(Sender::New), "it joined later");
        for refusal in [gate.admit(&from(3)), gate.admit_greeting(&from(3))] {
            let Err(Refusal::OtherIncarnation(why)) = refusal else { panic!("{refusal:?}") };
            assert!(why.contains("snapshot restore"), "it says what to do: {why}");
        }
        // An empty first member goes by the id of the list, and is told why it is refused.
        let empty = PeerHeader { cluster_id: 0xc0, ..from(3) };
        for refusal in [gate.admit(&empty), gate.admit_greeting(&empty)] {
            let Err(Refusal::Mismatch(why)) = refusal else { panic!("{refusal:?}") };
            assert!(why.contains("snapshot restore"), "it says what to do: {why}");
        }
    }

    #[test]
    fn a_member_that_moved_is_heard_from_one_place_alone() {
        let mut gate = gate();
        let there = PeerHeader { url: url(7), moved: 50, ..from(2) };
        let left_behind = from(2);
        assert_eq!(gate.admit(&left_behind), Ok(Sender::Known), "nobody moved");
        assert_eq!(gate.admit(&there), Ok(Sender::Known), "the entry may not be applied here yet");
        gate.moved.insert(2, (50, url(7)));
        assert!(
            matches!(gate.admit(&left_behind), Err(Refusal::Mismatch(_))),
            "a copy stayed there"
        );
        let elsewhere = PeerHeader { url: url(8), ..there.clone() };
        assert!(matches!(gate.admit(&elsewhere), Err(Refusal::Mismatch(_))), "or was made");
        assert_eq!(gate.admit(&there), Ok(Sender::Known));
        gate.members.apply(&MemberChange::Move { id: 2, url: url(7) }, 50);
        assert_eq!(gate.admit(&there), Ok(Sender::Known));
        assert!(matches!(gate.admit(&left_behind), Err(Refusal::Mismatch(_))));
        // It moved on: that is in our log, and it does not know yet itself.
        let unaware = PeerHeader { url: url(9), moved: 0, ..from(2) };
        assert!(matches!(gate.admit(&unaware), Err(Refusal::Mismatch(_))));
        gate.moves_under_way.push((2, url(9)));
        assert_eq!(gate.admit(&unaware), Ok(Sender::Known));
    }

    #[test]
    fn only_so_many_ids_that_never_were_members_are_recorded() {
        let mut gate = gate();
        for id in 1000..1000 + OTHER_INCARNATIONS_MAX as u64 {
            assert_eq!(gate.admit(&from(id)), Ok(Sender::New), "{id}");
            gate.incarnations.insert(id, 100 + id);
        }
        let refusal = gate.admit(&from(9));
        assert!(matches!(refusal, Err(Refusal::NotReady(_))), "{refusal:?}");
        assert_eq!(gate.admit(&from(1000)), Ok(Sender::Known), "it was there before");
        assert_eq!(gate.admit(&from(3)), Ok(Sender::New), "a member always may");
    }
}
