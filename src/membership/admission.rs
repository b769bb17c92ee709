//! Admission: which senders may speak to this member.
//!
//! The node updates it; the node and the transport ask it. Requests are admitted by their headers,
//! before a byte of the body is read.
//!
//! # What stops a wiped member from coming back
//! A new data directory draws a new incarnation. Every member records the first incarnation that it
//! hears for an id, durably, and refuses any other one
//! ([`Refusal::OtherIncarnation`](crate::channels::Refusal::OtherIncarnation), HTTP 412). A member
//! without a log bootstraps: it takes no raft message and only greets the others. Such a refusal ends
//! it with exit status 1, and the message says to remove its id and to add it under a new one. See
//! `raft_node/bootstrap.rs`.

use std::collections::BTreeMap;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::members::Members;
use super::urls::{check_url, is_https};
use crate::channels::{Index, NodeId, PeerHeader, Refusal};

/// How many ids that never were members may have a recorded incarnation. A sender that knows the
/// cluster id is trusted, so this bounds only mistakes.
const OTHER_INCARNATIONS_MAX: usize = 64;

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
    /// If it was restored from a snapshot, the cluster id of an empty member with the same list;
    /// otherwise 0.
    pub restored_list: u64,
}

/// An admitted sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// A member whose incarnation is recorded. Its messages are answered before the node handles them.
    Member,
    /// Its incarnation is recorded, but it is not a member here, or not yet: the node decides.
    Known,
    /// No incarnation is recorded for it. The node records it durably before it answers.
    New,
}

/// Decides which senders may speak.
#[derive(Debug)]
pub struct Admission {
    own: Own,
    known: RwLock<Known>,
}

#[derive(Debug)]
struct Known {
    /// 0 while this member joins a cluster.
    cluster_id: u64,
    /// The members, as applied here.
    members: Members,
    /// The first incarnation heard for each id.
    incarnations: BTreeMap<NodeId, u64>,
    /// Members whose requests name a move that is not applied here yet: the index of its entry, and
    /// the new URL.
    announced_moves: BTreeMap<NodeId, (Index, String)>,
    /// Moves in this member's log that are not applied yet.
    pending_moves: Vec<(NodeId, String)>,
}

impl Admission {
    /// Admission as of a start: `members` and `incarnations` are those on disk.
    pub fn new(
        own: Own,
        cluster_id: u64,
        members: Members,
        incarnations: BTreeMap<NodeId, u64>,
    ) -> Self {
        let known = Known {
            cluster_id,
            members,
            incarnations,
            announced_moves: BTreeMap::new(),
            pending_moves: Vec::new(),
        };
        Self { own, known: RwLock::new(known) }
    }

    fn known(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().expect("no thread panics while it holds the lock")
    }

    fn known_mut(&self) -> RwLockWriteGuard<'_, Known> {
        self.known.write().expect("no thread panics while it holds the lock")
    }

    /// The id of this member's cluster; 0 while it joins one.
    pub fn cluster_id(&self) -> u64 {
        self.known().cluster_id
    }

    /// The members, as applied here.
    pub fn members(&self) -> Members {
        self.known().members.clone()
    }

    /// The recorded incarnation of `id`.
    pub fn incarnation_of(&self, id: NodeId) -> Option<u64> {
        self.known().incarnations.get(&id).copied()
    }

    /// True if the header has this member's cluster and the recorded incarnation of its sender.
    pub fn is_known(&self, header: &PeerHeader) -> bool {
        let known = self.known();
        header.cluster_id == known.cluster_id
            && known.incarnations.get(&header.from) == Some(&header.incarnation)
    }

    /// The other members, each with the URL where it listens: that of an announced move, if it is
    /// newer than the applied one.
    pub fn other_members(&self) -> Vec<(NodeId, String)> {
        let known = self.known();
        let others = known.members.urls.keys().filter(|id| **id != self.own.id);
        others
            .map(|id| (*id, known.listens_at(*id).expect("it is a member").1.to_owned()))
            .collect()
    }

    /// True if this member's log holds a move that is not applied yet.
    pub fn has_pending_moves(&self) -> bool {
        !self.known().pending_moves.is_empty()
    }

    /// The header of a message from this member to member `to`.
    pub fn header(&self, to: NodeId) -> PeerHeader {
        let known = self.known();
        PeerHeader {
            cluster_id: known.cluster_id,
            from: self.own.id,
            incarnation: self.own.incarnation,
            url: self.own.url.clone(),
            moved: match known.members.urls.get(&self.own.id) {
                Some(url) if *url == self.own.url => known.members.moved_at(self.own.id),
                _ => 0,
            },
            to,
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

    /// Records the incarnation of an admitted sender, after it was made durable.
    pub fn record(&self, id: NodeId, incarnation: u64) {
        self.known_mut().incarnations.insert(id, incarnation);
    }

    /// Notes that an admitted sender announces a move: from now on it may speak only from there.
    pub fn note_move(&self, header: &PeerHeader) {
        let mut known = self.known_mut();
        if known.members.urls.contains_key(&header.from) {
            known.announced_moves.insert(header.from, (header.moved, header.url.clone()));
        }
    }

    /// Admits the sender of a raft message or of a forwarded change.
    ///
    /// # Errors
    /// The refusal to answer with. The request must have no effect.
    pub fn admit(&self, header: &PeerHeader) -> Result<Sender, Refusal> {
        self.known().admit(&self.own, header)
    }

    /// Admits the sender of a greeting: it may not know this member's id yet, and a joiner does not
    /// know the cluster's.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub fn admit_greeting(&self, header: &PeerHeader) -> Result<Sender, Refusal> {
        let known = self.known();
        let header = PeerHeader {
            cluster_id: match header.cluster_id {
                0 => known.cluster_id,
                cluster_id => cluster_id,
            },
            to: if header.to == 0 { self.own.id } else { header.to },
            ..header.clone()
        };
        known.admit(&self.own, &header)
    }
}

impl Known {
    /// Where a member listens, and the index of the entry that moved it there.
    fn listens_at(&self, id: NodeId) -> Option<(Index, &str)> {
        let applied = (self.members.moved_at(id), &self.members.urls.get(&id)?[..]);
        let announced = self.announced_moves.get(&id).map(|(index, url)| (*index, &url[..]));
        Some(announced.filter(|(index, _)| *index > applied.0).unwrap_or(applied))
    }

    fn admit(&self, own: &Own, header: &PeerHeader) -> Result<Sender, Refusal> {
        if own.restored_list != 0 && header.cluster_id == own.restored_list {
            return Err(Refusal::Mismatch(format!(
                "this is member {} of cluster {:016x}, which was restored from a snapshot, and member {} was not: stop it, remove its directories, and make them with `raftexample snapshot restore` from the same file",
                own.id, self.cluster_id, header.from
            )));
        }
        if header.cluster_id != self.cluster_id || self.cluster_id == 0 {
            return Err(Refusal::Mismatch(format!(
                "this is member {} of cluster {:016x}{}, the sender belongs to cluster {:016x}",
                own.id,
                self.cluster_id,
                match &own.first_urls[..] {
                    [] => String::new(),
                    urls => format!(" (--cluster {})", urls.join(",")),
                },
                header.cluster_id
            )));
        }
        if header.to != own.id {
            return Err(Refusal::Mismatch(format!(
                "this is member {}, the message is for member {}",
                own.id, header.to
            )));
        }
        self.admit_sender(own, header)
    }

    fn admit_sender(&self, own: &Own, header: &PeerHeader) -> Result<Sender, Refusal> {
        let id = header.from;
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
        self.check_place(header)?;
        match incarnation {
            Some(_) if self.members.urls.contains_key(&id) => Ok(Sender::Member),
            Some(_) => Ok(Sender::Known),
            None => self.admit_new(own, header),
        }
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

    /// Admits a sender without a recorded incarnation.
    fn admit_new(&self, own: &Own, header: &PeerHeader) -> Result<Sender, Refusal> {
        let id = header.from;
        // The state of a first member from another origin contradicts this cluster's entries.
        let is_not_restored = own.restored_list != 0
            && id <= own.first_urls.len() as u64
            && restoration(header.incarnation) != restoration(own.incarnation);
        if is_not_restored {
            return Err(Refusal::OtherIncarnation(format!(
                "member {id} was not restored from the snapshot that this cluster was restored from: remove its directories, and make them with `raftexample snapshot restore` from the same file"
            )));
        }
        let is_other = |id: &&NodeId| {
            !self.members.urls.contains_key(id) && !self.members.removed.contains_key(id)
        };
        let others = self.incarnations.keys().filter(is_other).count();
        if !self.members.urls.contains_key(&id) && others >= OTHER_INCARNATIONS_MAX {
            return Err(Refusal::NotReady(format!(
                "member {id} is unknown, and so are {others} other senders: add it first"
            )));
        }
        Ok(Sender::New)
    }
}

/// The incarnation of a restored member: the upper half names the restoration, which is one file and
/// one list of members, and the lower half is random.
pub fn restored_incarnation(restoration: u64, random: u64) -> u64 {
    restoration >> 32 << 32 | random & u64::from(u32::MAX)
}

fn restoration(incarnation: u64) -> u64 {
    incarnation >> 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::MemberChange;

    fn url(id: NodeId) -> String {
        format!("http://127.0.0.1:{}", 9020 + id)
    }

    fn add(members: &mut Members, id: NodeId) {
        members.apply(&MemberChange::AddVoter { id, url: url(id) }, id);
    }

    fn remove(members: &mut Members, id: NodeId, index: Index) {
        members.apply(&MemberChange::Remove { id }, index);
    }

    /// Member 1 of three. It has heard member 2, and member 4, which was removed.
    fn admission() -> Admission {
        let mut members = Members::default();
        (1..=4).for_each(|id| add(&mut members, id));
        remove(&mut members, 4, 20);
        let own = Own {
            id: 1,
            incarnation: 101,
            url: url(1),
            first_urls: (1..=3).map(url).collect(),
            restored_list: 0,
        };
        Admission::new(own, 0xc1, members, [(2, 102), (4, 104)].into())
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
    fn every_part_of_a_header_decides_whether_it_is_admitted() {
        let admission = admission();
        assert_eq!(admission.admit(&from(2)), Ok(Sender::Member));
        assert_eq!(admission.admit(&from(3)), Ok(Sender::New));
        assert_eq!(admission.admit(&from(9)), Ok(Sender::New), "this member may lag");
        assert_eq!(admission.admit(&from(4)), Err(Refusal::Removed { id: 4, index: 20 }));
        let elsewhere = PeerHeader { url: url(7), ..from(9) };
        assert_eq!(admission.admit(&elsewhere), Ok(Sender::New), "it has no replicated URL");

        let mismatches = [
            ("another cluster", PeerHeader { cluster_id: 0xc2, ..from(2) }),
            ("no cluster", PeerHeader { cluster_id: 0, ..from(2) }),
            ("another receiver", PeerHeader { to: 2, ..from(2) }),
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
    fn a_greeting_may_omit_cluster_and_receiver_and_nothing_else() {
        let admission = admission();
        let open = |header| PeerHeader { cluster_id: 0, to: 0, ..header };
        assert_eq!(admission.admit_greeting(&from(2)), Ok(Sender::Member));
        assert_eq!(admission.admit_greeting(&open(from(2))), Ok(Sender::Member));
        assert_eq!(admission.admit_greeting(&open(from(3))), Ok(Sender::New));
        assert_eq!(admission.admit_greeting(&open(from(9))), Ok(Sender::New));
        let refusal = admission.admit_greeting(&open(from(4)));
        assert_eq!(refusal, Err(Refusal::Removed { id: 4, index: 20 }));
        let refusal = admission.admit_greeting(&open(PeerHeader { incarnation: 5, ..from(2) }));
        assert!(matches!(refusal, Err(Refusal::OtherIncarnation(_))), "{refusal:?}");
        for (what, header) in [
            ("another cluster", PeerHeader { cluster_id: 0xc2, to: 0, ..from(2) }),
            ("another receiver", PeerHeader { cluster_id: 0, to: 2, ..from(2) }),
            ("another URL", open(PeerHeader { url: url(7), ..from(2) })),
            ("ourselves", open(from(1))),
        ] {
            let refusal = admission.admit_greeting(&header);
            assert!(matches!(refusal, Err(Refusal::Mismatch(_))), "{what}: {refusal:?}");
        }
        // Two joiners know no cluster, so neither can admit the other.
        admission.update(0, &admission.members(), Vec::new());
        let refusal = admission.admit_greeting(&open(from(9)));
        assert!(matches!(refusal, Err(Refusal::Mismatch(_))), "{refusal:?}");
    }

    /// The incarnations of removed members stay recorded.
    #[test]
    fn any_number_of_removed_ids_keeps_no_new_sender_out() {
        let admission = admission();
        let mut members = admission.members();
        for id in 100..200 {
            add(&mut members, id);
            remove(&mut members, id, id + 1);
            admission.record(id, id);
        }
        admission.update(0xc1, &members, Vec::new());
        assert_eq!(admission.admit(&from(9)), Ok(Sender::New));
        assert_eq!(admission.admit_greeting(&from(9)), Ok(Sender::New));
    }

    #[test]
    fn a_restored_member_admits_first_members_of_its_restoration() {
        const RESTORATION: u64 = 0xabcd_ef01_2345_6789;
        let incarnation = |random| restored_incarnation(RESTORATION, random);
        let empty = admission();
        let own = Own { restored_list: 0xc0, incarnation: incarnation(1), ..empty.own.clone() };
        let admission = Admission::new(own, 0xc1, empty.members(), BTreeMap::new());
        let restored = |id| PeerHeader { incarnation: incarnation(id), ..from(id) };
        assert_eq!(admission.admit(&restored(2)), Ok(Sender::New));
        assert_eq!(admission.admit_greeting(&restored(3)), Ok(Sender::New));
        assert_eq!(admission.admit(&from(9)), Ok(Sender::New), "it joined later");
        for refusal in [admission.admit(&from(3)), admission.admit_greeting(&from(3))] {
            let Err(Refusal::OtherIncarnation(why)) = refusal else { panic!("{refusal:?}") };
            assert!(why.contains("snapshot restore"), "it says what to do: {why}");
        }
        // An empty first member uses the cluster id of the list.
        let empty = PeerHeader { cluster_id: 0xc0, ..from(3) };
        for refusal in [admission.admit(&empty), admission.admit_greeting(&empty)] {
            let Err(Refusal::Mismatch(why)) = refusal else { panic!("{refusal:?}") };
            assert!(why.contains("snapshot restore"), "it says what to do: {why}");
        }
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

    #[test]
    fn the_recorded_ids_that_never_were_members_are_bounded() {
        let admission = admission();
        for id in 1000..1000 + OTHER_INCARNATIONS_MAX as u64 {
            assert_eq!(admission.admit(&from(id)), Ok(Sender::New), "{id}");
            admission.record(id, 100 + id);
        }
        let refusal = admission.admit(&from(9));
        assert!(matches!(refusal, Err(Refusal::NotReady(_))), "{refusal:?}");
        assert_eq!(admission.admit(&from(1000)), Ok(Sender::Known), "recorded before");
        assert_eq!(admission.admit(&from(3)), Ok(Sender::New), "a member is always admitted");
    }
}
