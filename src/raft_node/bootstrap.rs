//! Bootstrap: what a new member finds out before it takes part.
//!
//! A member that lost its data directory looks like a new one, and would vote a second time. So a
//! member whose log holds nothing but its identity bootstraps: it greets the other members and answers
//! their greetings, but takes no raft message.
//!
//! # A new cluster
//! It is begun by all of its first members, because a majority could not tell two lives of one list
//! apart. Each has a *table*: the incarnation of every first member.
//!
//! 1. A member learns another's incarnation from the answer to its own greeting at the listed URL, and
//!    from nowhere else. It is durable before anything depends on it.
//! 2. Until the table is complete, a newer incarnation replaces a recorded one: nobody can have begun.
//!    A complete table is final, also across restarts.
//! 3. List and table make the cluster id. A member with a complete table names it in every answer.
//! 4. A member begins when every other one has answered with the same id. It also begins when one that
//!    has begun answers or speaks under that id: then all had answered.
//!
//! A member that was wiped in between has another incarnation than the tables say. If nobody has begun,
//! nobody can, nothing was acknowledged, and all members say so. A member that has begun refuses it, as
//! it refuses every wiped member.
//!
//! First members then write what the original's StartNode writes: one addition for each of them, at
//! term 1, committed, the same on all. The additions hold the incarnations, so these are replicated
//! state from then on.
//!
//! # Joining
//! With `--join`, a member begins when one that counts its id as a member has answered, in the cluster
//! of that one.

use std::collections::{BTreeMap, BTreeSet};

use raft::eraftpb::{Entry, EntryType};
use slog::{Logger, warn};

use super::journal::Journal;
use super::{NodeConfig, NodeId, PeerReport};
use crate::channels::{GreetingAnswer, PeerHeader, Refusal};
use crate::error::{Error, Result};
use crate::membership::MemberChange;

/// What an operator does if the first members can never agree.
const BEGIN_AGAIN: &str = "nobody has begun and nothing was acknowledged: stop all members, remove the directories of all of them, and start them again";

/// What a bootstrapping member has found out.
pub(super) struct Bootstrap {
    /// The other URLs of the list, each with its position's id.
    others: BTreeMap<String, NodeId>,
    /// The incarnations of the first members, this one included, as they are on disk.
    table: BTreeMap<NodeId, u64>,
    /// The cluster id that list and table make; 0 while the table is not complete, or if this member
    /// joins.
    cluster_id: u64,
    /// The members that have answered with this id.
    agreed: BTreeSet<NodeId>,
    /// The cluster of a member that has begun and lets this one begin.
    begun_in: Option<u64>,
    /// Why each of the other URLs does not count yet.
    missing: BTreeMap<String, String>,
    /// What was logged last, so that it is logged once.
    logged: String,
}

/// How a bootstrap ends: in this cluster.
pub(super) struct Start {
    pub cluster_id: u64,
    /// The additions of the first members, all committed, if this member is one of them; none if it
    /// joins.
    pub entries: Vec<Entry>,
}

impl Bootstrap {
    /// A bootstrap with the incarnations of other first members that are on disk.
    pub fn new(config: &NodeConfig, own: u64, recorded: BTreeMap<NodeId, u64>) -> Self {
        let listed = config.cluster.iter().zip(1..).filter(|(url, _)| **url != config.url);
        let others: BTreeMap<String, NodeId> = listed.map(|(url, id)| (url.clone(), id)).collect();
        let missing = others.keys().map(|url| (url.clone(), "no answer yet".to_owned())).collect();
        let mut table = if config.join { BTreeMap::new() } else { recorded };
        table.insert(config.id, own);
        let mut bootstrap = Self {
            others,
            table,
            cluster_id: 0,
            agreed: BTreeSet::new(),
            begun_in: None,
            missing,
            logged: String::new(),
        };
        bootstrap.complete(config);
        bootstrap
    }

    /// The URLs to greet.
    pub fn urls(&self) -> Vec<String> {
        self.others.keys().cloned().collect()
    }

    /// The id of the cluster that this member has agreed to begin; 0 while the table is not complete.
    pub fn cluster_id(&self) -> u64 {
        self.cluster_id
    }

    fn complete(&mut self, config: &NodeConfig) {
        if !config.join && self.table.len() == config.cluster.len() {
            let first = config.cluster.iter().map(String::as_str).zip(self.table.values().copied());
            self.cluster_id = cluster_id(first);
        }
    }

    /// Notes that an admitted member spoke: only one that has begun does.
    pub fn note_speaker(&mut self) {
        self.begun_in = Some(self.cluster_id);
    }

    /// Takes the outcome of a greeting. It is an error if the cluster refuses this member for good.
    pub fn take_report(
        &mut self,
        report: PeerReport,
        config: &NodeConfig,
        journal: &mut Journal,
    ) -> Result<()> {
        let id = config.id;
        match report {
            PeerReport::Greeted { url, header, answer } => {
                let Some(listed) = self.others.get(&url).copied() else { return Ok(()) };
                let missing = match config.join {
                    true => self.take_cluster(&header, &answer, config),
                    false => self.take_first(listed, &header, &answer, config, journal)?,
                };
                match missing {
                    Ok(()) => self.missing.remove(&url),
                    Err(why) => self.missing.insert(url, why),
                };
            }
            PeerReport::NotGreeted { url, why } => {
                // What it answered before still holds.
                self.missing.entry(url).and_modify(|missing| *missing = why);
            }
            PeerReport::Refused { header, refusal: Refusal::OtherIncarnation(why) } => {
                let from = header.from;
                return Err(Error::Refused(format!("member {from} refuses this one: {why}")));
            }
            PeerReport::Refused { refusal: Refusal::Removed { index, .. }, .. } => {
                return Err(Error::Refused(format!(
                    "member {id} was removed at index {index}; an id is never used again: add this member under a new one"
                )));
            }
            _ => {}
        }
        Ok(())
    }

    /// Takes the answer to a member that joins. Returns why it does not let this one begin.
    fn take_cluster(
        &mut self,
        header: &PeerHeader,
        answer: &GreetingAnswer,
        config: &NodeConfig,
    ) -> std::result::Result<(), String> {
        if !answer.begun || header.cluster_id == 0 {
            return Err("it has not begun itself".into());
        }
        if !answer.counts_as_member {
            return Err(format!("it does not count {} as a member", config.id));
        }
        self.begun_in.get_or_insert(header.cluster_id);
        Ok(())
    }

    /// Takes the answer of first member `id`. Returns why it does not let this one begin.
    fn take_first(
        &mut self,
        id: NodeId,
        header: &PeerHeader,
        answer: &GreetingAnswer,
        config: &NodeConfig,
        journal: &mut Journal,
    ) -> Result<std::result::Result<(), String>> {
        if header.from != id {
            return Ok(Err(format!("member {} answers there", header.from)));
        }
        if answer.begun {
            if header.cluster_id == self.cluster_id && self.cluster_id != 0 {
                self.begun_in = Some(self.cluster_id);
                return Ok(Ok(()));
            }
            let theirs = header.cluster_id;
            return Ok(Err(format!(
                "it has begun in cluster {theirs:016x}; to join that one, start with --join"
            )));
        }
        if self.cluster_id == 0 && self.table.get(&id) != Some(&header.incarnation) {
            journal.record_incarnation(id, header.incarnation)?;
            self.table.insert(id, header.incarnation);
            self.complete(config);
        }
        let is_known = self.table[&id] == header.incarnation;
        Ok(if self.cluster_id == 0 {
            Ok(())
        } else if !is_known || ![0, self.cluster_id].contains(&header.cluster_id) {
            Err(format!("a data directory was lost before all had begun; {BEGIN_AGAIN}"))
        } else if header.cluster_id == 0 {
            Err("it waits for others".into())
        } else {
            self.agreed.insert(id);
            Ok(())
        })
    }

    /// How this member may begin, or in one line what it waits for.
    pub fn outcome(&self, config: &NodeConfig) -> std::result::Result<Start, String> {
        let all_agree = self.cluster_id != 0 && self.agreed.len() == self.others.len();
        if let Some(cluster_id) = self.begun_in.or(all_agree.then_some(self.cluster_id)) {
            let entries = if config.join { Vec::new() } else { self.additions(config) };
            return Ok(Start { cluster_id, entries });
        }
        let why = |(url, id): (&String, &NodeId)| match self.missing.get(url) {
            Some(why) => Some(format!("{url} ({why})")),
            // It answered before this member knew all directories.
            None if self.cluster_id != 0 && !self.agreed.contains(id) => {
                Some(format!("{url} (asked to agree)"))
            }
            None => None,
        };
        let missing = self.others.iter().filter_map(why).collect::<Vec<_>>().join(", ");
        Err(if config.join {
            format!(
                "waiting for a member that counts {} as one: POST /{} with the body {} to any of them; asked {missing}",
                config.id, config.id, config.url,
            )
        } else {
            format!(
                "waiting for {missing} before the first start; our --cluster is {}",
                config.cluster.join(",")
            )
        })
    }

    /// The beginning of a new cluster's log: the additions of the first members.
    fn additions(&self, config: &NodeConfig) -> Vec<Entry> {
        let additions = config.cluster.iter().zip(&self.table).map(|(url, (&id, &incarnation))| {
            let addition = MemberChange::AddVoter { id, url: url.clone(), incarnation };
            let (entry_type, data) = (EntryType::EntryConfChange, addition.encode().into());
            Entry { entry_type, index: id, term: 1, data, ..Entry::default() }
        });
        additions.collect()
    }

    /// Logs what this member waits for, once for each reason.
    pub fn log_wait(&mut self, why: String, logger: &Logger) {
        if self.logged != why {
            warn!(logger, "{}", why);
            self.logged = why;
        }
    }
}

/// The first list of this member; empty if it joins.
pub(super) fn first_urls(config: &NodeConfig) -> Vec<String> {
    if config.join { Vec::new() } else { config.cluster.clone() }
}

/// The id of the cluster that these members begin: URL and incarnation of each, in the order of their
/// ids. A list that is begun again has new directories, and so another id.
pub(crate) fn cluster_id<'a>(first: impl Iterator<Item = (&'a str, u64)>) -> u64 {
    let member = |(url, incarnation)| format!("{url} {incarnation:016x},");
    hash(&first.map(member).collect::<String>())
}

/// A hash of a `--cluster` list.
pub(crate) fn list_hash(urls: &[String]) -> u64 {
    hash(&urls.join(","))
}

/// FNV-1a, which is the same in every build; never 0, which means "unknown".
fn hash(text: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, step).max(1)
}
