//! Admission: which senders may speak to this member.
//!
//! The node updates it; the node and the transport ask it. Requests are admitted by their headers,
//! before a byte of the body is read.
//!
//! # What stops a wiped member from coming back
//! A new data directory draws a new incarnation. The entry that gives a member its vote binds its id to
//! one incarnation: the first entries of a cluster, and later each promotion. So every member that
//! counts a vote or an acknowledgement knows whose it has to be, and refuses any other one
//! ([`Refusal::OtherIncarnation`](crate::channels::Refusal::OtherIncarnation), HTTP 412), whether the
//! two ever met or not.
//!
//! A wiped member has no log, so it bootstraps (`raft_node/bootstrap.rs`) and only greets. Such a refusal
//! ends it with exit status 1, and the message says to remove its id and to add it under a new one. If a
//! member that has not applied the binding yet lets it in, it is a learner at most, and the same refusal
//! ends it later (`take_answer` in `raft_node/inputs.rs`).

use std::collections::BTreeMap;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::members::Members;
use super::urls::{check_url, is_https};
use crate::channels::{Index, NodeId, PeerHeader, Refusal};

/// What this member is, for as long as it runs.
#[derive(Clone, Debug)]
pub struct Own {
    /// Its id.
    pub id: NodeId,
    /// Its incarnation.
    pub incarnation: u64,
    /// Its peer URL.
    pub url: String,
    /// Its list of first URLs; empty if it joined.
    pub first_urls: Vec<String>,
}

/// An admitted sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// A member. Its messages are answered before the node handles them.
    Member,
    /// Not a member here, or not yet: the node decides.
    Stranger,
}

/// Decides which senders may speak.
#[derive(Debug)]
pub struct Admission(RwLock<Known>);

#[derive(Debug)]
struct Known {
    own: Own,
    /// 0 while this member does not know its cluster.
    cluster_id: u64,
    /// The members, as applied here.
    members: Members,
    /// Members whose requests name a move that is not applied here yet: the index of its entry, and
    /// the new URL.
    announced_moves: BTreeMap<NodeId, (Index, String)>,
    /// Moves in this member's log that are not applied yet.
    pending_moves: Vec<(NodeId, String)>,
}

impl Admission {
    /// Admission as of a start: `members` are those on disk.
    pub fn new(own: Own, cluster_id: u64, members: Members) -> Self {
        let (announced_moves, pending_moves) = (BTreeMap::new(), Vec::new());
        Self(RwLock::new(Known { own, cluster_id, members, announced_moves, pending_moves }))
    }

    fn known(&self) -> RwLockReadGuard<'_, Known> {
        self.0.read().expect("no thread panics while it holds the lock")
    }

    fn known_mut(&self) -> RwLockWriteGuard<'_, Known> {
        self.0.write().expect("no thread panics while it holds the lock")
    }

    /// The id of this member's cluster; 0 while it is unknown.
    pub fn cluster_id(&self) -> u64 {
        self.known().cluster_id
    }

    /// The members, as applied here.
    pub fn members(&self) -> Members {
        self.known().members.clone()
    }

    /// The incarnation that member `id` is bound to; 0 if it is bound to none.
    pub fn bound_incarnation(&self, id: NodeId) -> u64 {
        self.known().members.incarnations.get(&id).copied().unwrap_or(0)
    }

    /// True if the header has this member's cluster, and its sender is bound to the incarnation in it.
    /// A member that has just joined knows no bindings, and believes all of its cluster.
    pub fn is_bound(&self, header: &PeerHeader) -> bool {
        let known = self.known();
        let bound = &known.members.incarnations;
        header.cluster_id == known.cluster_id
            && (bound.is_empty() || bound.get(&header.from) == Some(&header.incarnation))
    }

    /// The other members, each with the URL where it listens: that of an announced move, if it is
    /// newer than the applied one.
    pub fn other_members(&self) -> Vec<(NodeId, String)> {
        let known = self.known();
        let others = known.members.urls.keys().filter(|id| **id != known.own.id);
        others
            .map(|id| (*id, known.listens_at(*id).expect("it is a member").1.to_owned()))
            .collect()
    }

    /// True if this member's log holds a move that is not applied yet.
    pub fn has_pending_moves(&self) -> bool {
        !self.known().pending_moves.is_empty()
    }

    /// True if this member's log moves the sender away from where it listens. Its answers do not
    /// count from there: it may be a copy of the directory that moved.
    pub fn is_moved_away(&self, header: &PeerHeader) -> bool {
        let known = self.known();
        let last = known.pending_moves.iter().rfind(|(id, _)| *id == header.from);
        last.is_some_and(|(_, url)| *url != header.url)
    }

    /// The header of a message from this member to the incarnation `to_incarnation` of member `to`.
    pub fn header(&self, to: NodeId, to_incarnation: u64) -> PeerHeader {
        let known = self.known();
        let Own { id, incarnation, ref url, .. } = known.own;
        let is_at_home = known.members.urls.get(&id) == Some(url);
        PeerHeader {
            cluster_id: known.cluster_id,
            from: id,
            incarnation,
            url: url.clone(),
            moved: if is_at_home { known.members.moved_at(id) } else { 0 },
            to,
            to_incarnation,
        }
    }

    /// Replaces what is known by the state as of the applied index. `pending_moves` are the moves in
    /// the log above it.
    pub fn update(&self, cluster_id: u64, members: &Members, pending_moves: Vec<(NodeId, String)>) {
        let mut known = self.known_mut();
        known.cluster_id = cluster_id;
        known.members.clone_from(members);
        known.pending_moves = pending_moves;
        let Known { members, announced_moves, .. } = &mut *known;
        announced_moves.retain(|id, (index, _)| {
            members.urls.contains_key(id) && *index > members.moved_at(*id)
        });
    }

    /// Notes that an admitted sender announces a move: from now on it may speak only from there.
    pub fn note_move(&self, header: &PeerHeader) {
        let mut known = self.known_mut();
        if known.members.urls.contains_key(&header.from) {
            known.announced_moves.insert(header.from, (header.moved, header.url.clone()));
        }
    }

    /// Admits the sender of a raft message or of a forwarded change. A refused request must have no
    /// effect.
    pub fn admit(&self, header: &PeerHeader) -> Result<Sender, Refusal> {
        let known = self.known();
        let own = &known.own;
        if known.cluster_id == 0 {
            return Err(Refusal::NotReady(format!("member {} has not begun yet", own.id)));
        }
        known.check_cluster(header)?;
        known.check_receiver(header)?;
        if ![0, own.incarnation].contains(&header.to_incarnation) {
            return Err(Refusal::Mismatch(format!(
                "this is member {} with the data directory {:016x}, the message is for {:016x}",
                own.id, own.incarnation, header.to_incarnation
            )));
        }
        known.admit_sender(header)
    }

    /// Admits the sender of a greeting, which may not know this member's id yet. Its cluster is not
    /// checked: before a member has begun, that id says only what it has agreed on.
    pub fn admit_greeting(&self, header: &PeerHeader) -> Result<Sender, Refusal> {
        let known = self.known();
        if header.to != 0 {
            known.check_receiver(header)?;
        }
        known.admit_sender(header)
    }

    /// Checks that a sender belongs to this member's cluster.
    pub fn check_cluster(&self, header: &PeerHeader) -> Result<(), Refusal> {
        self.known().check_cluster(header)
    }
}

impl Known {
    /// Where a member listens, and the index of the entry that moved it there.
    fn listens_at(&self, id: NodeId) -> Option<(Index, &str)> {
        let applied = (self.members.moved_at(id), &self.members.urls.get(&id)?[..]);
        let announced = self.announced_moves.get(&id).map(|(index, url)| (*index, &url[..]));
        Some(announced.filter(|(index, _)| *index > applied.0).unwrap_or(applied))
    }

    fn check_cluster(&self, header: &PeerHeader) -> Result<(), Refusal> {
        let own = &self.own;
        if header.cluster_id != self.cluster_id {
            return Err(Refusal::Mismatch(format!(
                "this is member {} of cluster {:016x}{}, the sender belongs to cluster {:016x}: check --cluster and --peer-url; only a new member joins, with an empty directory and --join",
                own.id,
                self.cluster_id,
                match &own.first_urls[..] {
                    [] => String::new(),
                    urls => format!(" (--cluster {})", urls.join(",")),
                },
                header.cluster_id
            )));
        }
        Ok(())
    }

    fn check_receiver(&self, header: &PeerHeader) -> Result<(), Refusal> {
        let (own, to) = (self.own.id, header.to);
        if to != own {
            return Err(Refusal::Mismatch(format!(
                "this is member {own}, the message is for member {to}"
            )));
        }
        Ok(())
    }

    fn admit_sender(&self, header: &PeerHeader) -> Result<Sender, Refusal> {
        let (id, own) = (header.from, &self.own);
        if id == 0 || check_url(&header.url).is_err() {
            return Err(Refusal::Mismatch(format!(
                "no member has the id {id} and the peer URL {:?}",
                header.url
            )));
        }
        if is_https(&header.url) != is_https(&own.url) {
            return Err(Refusal::Mismatch(format!(
                "member {id} listens at {} and this member at {}: use https:// for all or for none",
                header.url, own.url
            )));
        }
        if id == own.id {
            return Err(if header.incarnation == own.incarnation {
                Refusal::Mismatch(format!("member {id} received its own request"))
            } else {
                Refusal::OtherIncarnation(format!(
                    "member {id} runs here with another data directory"
                ))
            });
        }
        if let Some(index) = self.members.removed_at(id) {
            return Err(Refusal::Removed { id, index });
        }
        if let Some(bound) = self.members.incarnations.get(&id)
            && *bound != header.incarnation
        {
            return Err(Refusal::OtherIncarnation(format!(
                "member {id} has the data directory {bound:016x}, not {:016x}: if its data is lost, DELETE /{id} on another member and add it under a new id",
                header.incarnation
            )));
        }
        self.check_place(header)?;
        Ok(match self.members.urls.contains_key(&id) {
            true => Sender::Member,
            false => Sender::Stranger,
        })
    }

    /// Refuses a member at a URL where it does not listen: a copy of its directory has its incarnation
    /// too.
    ///
    /// A member that names the entry of a newer move is believed, and from then on heard only from
    /// there. A member that does not know yet that it moved is accepted where a pending move says.
    fn check_place(&self, header: &PeerHeader) -> Result<(), Refusal> {
        let id = header.from;
        if let Some((moved_at, url)) = self.listens_at(id)
            && url != header.url
            && header.moved <= moved_at
            && !self.pending_moves.iter().any(|(moving, to)| (*moving, to) == (id, &header.url))
        {
            return Err(Refusal::Mismatch(format!(
                "member {id} listens at {url}, not at {}: start it there and run no copy of it, or PUT its new URL to /members/{id} of an admin listener",
                header.url
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::MemberChange;

    fn url(id: NodeId) -> String {
        format!("http://127.0.0.1:{}", 9020 + id)
    }

    fn add(members: &mut Members, id: NodeId) {
        members.apply(&MemberChange::AddLearner { id, url: url(id) }, id);
    }

    fn remove(members: &mut Members, id: NodeId, index: Index) {
        members.apply(&MemberChange::Remove { id }, index);
    }

    /// Member 1 of three, of which member 3 is a learner. Member 4 was removed.
    fn admission() -> Admission {
        let mut members = Members::default();
        (1..=4).for_each(|id| add(&mut members, id));
        for id in [1, 2] {
            members.apply(&MemberChange::Promote { id, incarnation: 100 + id }, 10 + id);
        }
        remove(&mut members, 4, 20);
        let own =
            Own { id: 1, incarnation: 101, url: url(1), first_urls: (1..=3).map(url).collect() };
        Admission::new(own, 0xc1, members)
    }

    fn from(id: NodeId) -> PeerHeader {
        PeerHeader {
            cluster_id: 0xc1,
            from: id,
            incarnation: 100 + id,
            url: url(id),
            moved: 0,
            to: 1,
            to_incarnation: 101,
        }
    }

    #[test]
    fn every_part_of_a_header_decides_whether_it_is_admitted() {
        let admission = admission();
        assert_eq!(admission.admit(&from(2)), Ok(Sender::Member));
        assert_eq!(admission.admit(&from(3)), Ok(Sender::Member));
        let wiped = PeerHeader { incarnation: 5, ..from(3) };
        assert_eq!(admission.admit(&wiped), Ok(Sender::Member), "a learner is bound to none");
        let anyone = PeerHeader { to_incarnation: 0, ..from(2) };
        assert_eq!(admission.admit(&anyone), Ok(Sender::Member), "it knows no incarnation of us");
        assert_eq!(admission.admit(&from(9)), Ok(Sender::Stranger), "this member may lag");
        assert_eq!(admission.admit(&from(4)), Err(Refusal::Removed { id: 4, index: 20 }));
        let elsewhere = PeerHeader { url: url(7), ..from(9) };
        assert_eq!(admission.admit(&elsewhere), Ok(Sender::Stranger), "it has no replicated URL");

        let mismatches = [
            ("another cluster", PeerHeader { cluster_id: 0xc2, ..from(2) }),
            ("no cluster", PeerHeader { cluster_id: 0, ..from(2) }),
            ("another receiver", PeerHeader { to: 2, ..from(2) }),
            ("another directory of ours", PeerHeader { to_incarnation: 5, ..from(2) }),
            ("no receiver", PeerHeader { to: 0, ..from(2) }),
            ("no sender", from(0)),
            ("no URL", PeerHeader { url: String::new(), ..from(2) }),
            ("ourselves", from(1)),
            ("a sender with TLS", PeerHeader { url: "https://127.0.0.1:9".into(), ..from(9) }),
            ("a copy of a member elsewhere", PeerHeader { url: url(7), ..from(2) }),
            ("a new member elsewhere", PeerHeader { url: url(7), ..from(3) }),
        ];
        for (what, header) in mismatches {
            let refusal = admission.admit(&header);
            assert!(matches!(refusal, Err(Refusal::Mismatch(_))), "{what}: {refusal:?}");
        }
        for (what, header) in [
            ("a member that lost its data", PeerHeader { incarnation: 5, ..from(2) }),
            (
                "a member that lost its data and moved",
                PeerHeader { incarnation: 5, url: url(7), ..from(2) },
            ),
            ("another member with this id", PeerHeader { incarnation: 5, ..from(1) }),
        ] {
            let refusal = admission.admit(&header);
            assert!(matches!(refusal, Err(Refusal::OtherIncarnation(_))), "{what}: {refusal:?}");
        }
        let Err(Refusal::Mismatch(why)) =
            admission.admit(&PeerHeader { cluster_id: 0xc2, ..from(2) })
        else {
            panic!("another cluster is a mismatch")
        };
        assert!(why.contains(&url(3)), "it names the list: {why}");
    }

    #[test]
    fn a_greeting_may_omit_receiver_and_cluster_and_nothing_else() {
        let admission = admission();
        let open = |header| PeerHeader { cluster_id: 0, to: 0, to_incarnation: 0, ..header };
        assert_eq!(admission.admit_greeting(&from(2)), Ok(Sender::Member));
        assert_eq!(admission.admit_greeting(&open(from(2))), Ok(Sender::Member));
        assert_eq!(admission.admit_greeting(&open(from(3))), Ok(Sender::Member));
        assert_eq!(admission.admit_greeting(&open(from(9))), Ok(Sender::Stranger));
        let elsewhere = PeerHeader { cluster_id: 0xc2, ..open(from(9)) };
        assert_eq!(admission.admit_greeting(&elsewhere), Ok(Sender::Stranger), "agreed on");
        assert!(matches!(admission.check_cluster(&elsewhere), Err(Refusal::Mismatch(_))));
        let refusal = admission.admit_greeting(&open(from(4)));
        assert_eq!(refusal, Err(Refusal::Removed { id: 4, index: 20 }));
        for cluster_id in [0, 0xc1, 0xc2] {
            let wiped = PeerHeader { incarnation: 5, cluster_id, ..open(from(2)) };
            let refusal = admission.admit_greeting(&wiped);
            assert!(matches!(refusal, Err(Refusal::OtherIncarnation(_))), "{refusal:?}");
        }
        for (what, header) in [
            ("another receiver", PeerHeader { cluster_id: 0, to: 2, ..from(2) }),
            ("another URL", open(PeerHeader { url: url(7), ..from(2) })),
            ("ourselves", open(from(1))),
        ] {
            let refusal = admission.admit_greeting(&header);
            assert!(matches!(refusal, Err(Refusal::Mismatch(_))), "{what}: {refusal:?}");
        }
        admission.update(0, &Members::default(), Vec::new());
        assert_eq!(admission.admit_greeting(&open(from(9))), Ok(Sender::Stranger));
        assert!(matches!(admission.admit(&open(from(9))), Err(Refusal::NotReady(_))));
    }

    #[test]
    fn answers_count_only_from_where_the_log_moves_a_member() {
        let admission = admission();
        assert!(!admission.is_moved_away(&from(2)));
        admission.update(0xc1, &admission.members(), vec![(3, url(8)), (2, url(7))]);
        assert!(admission.is_moved_away(&from(2)));
        assert!(!admission.is_moved_away(&PeerHeader { url: url(7), ..from(2) }));
        assert!(!admission.is_moved_away(&from(9)));
        assert_eq!(admission.admit(&from(2)), Ok(Sender::Member), "the move may come to nothing");
    }

    #[test]
    fn a_member_that_moved_is_admitted_at_one_url_only() {
        let admission = admission();
        let there = PeerHeader { url: url(7), moved: 50, ..from(2) };
        let old_place = from(2);
        assert_eq!(admission.admit(&old_place), Ok(Sender::Member), "no move");
        assert_eq!(admission.admit(&there), Ok(Sender::Member), "a move that is not applied here");
        admission.note_move(&there);
        assert!(
            matches!(admission.admit(&old_place), Err(Refusal::Mismatch(_))),
            "a copy at the old URL"
        );
        let elsewhere = PeerHeader { url: url(8), ..there.clone() };
        assert!(
            matches!(admission.admit(&elsewhere), Err(Refusal::Mismatch(_))),
            "a copy elsewhere"
        );
        assert_eq!(admission.admit(&there), Ok(Sender::Member));
        let mut members = admission.members();
        members.apply(&MemberChange::Move { id: 2, url: url(7) }, 50);
        admission.update(0xc1, &members, Vec::new());
        assert_eq!(admission.admit(&there), Ok(Sender::Member));
        assert!(matches!(admission.admit(&old_place), Err(Refusal::Mismatch(_))));
        // It moved again: the entry is in this member's log, and the sender does not know it yet.
        let unaware = PeerHeader { url: url(9), moved: 0, ..from(2) };
        assert!(matches!(admission.admit(&unaware), Err(Refusal::Mismatch(_))));
        admission.update(0xc1, &members, vec![(2, url(9))]);
        assert_eq!(admission.admit(&unaware), Ok(Sender::Member));
    }
}
