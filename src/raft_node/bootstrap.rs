//! Bootstrap: what a new member finds out before it takes part.
//!
//! A member that lost its data directory looks like a new one, and would vote a second time. So a
//! member whose log holds nothing but its identity bootstraps: it greets the other members and answers
//! their greetings, but takes no raft message. It starts when all of these hold:
//!
//! * no answer knows its id under another incarnation, or as removed;
//! * no answer comes from a member with another first list;
//! * without `--join`: every other URL of the list has answered, or the answers come from members that
//!   bootstrap too and, with this member, are a majority of the list;
//! * with `--join`: a member that counts this id as a member has answered.
//!
//! A peer that sends raft messages is greeted too, because all members that the list names may be gone.
//! Its answer cannot start this member; it can only refuse it.
//!
//! A first member that has written its first entries and seen no election still counts as
//! bootstrapping. Otherwise the first of two members that start together would keep the other one
//! waiting until the third is there.
//!
//! First members then write what the original's StartNode writes: one addition for each of them, at
//! term 1, committed, the same on all.

use std::collections::{BTreeMap, BTreeSet};

use raft::eraftpb::{Entry, EntryType, HardState};
use slog::{Logger, warn};

use super::{NodeConfig, PeerReport};
use crate::channels::{GreetingAnswer, PeerHeader, Refusal};
use crate::error::{Error, Result};
use crate::membership::{MemberChange, majority};

/// Senders of raft messages that are greeted in addition to the list.
const CALLERS_MAX: usize = 8;

/// What a bootstrapping member has found out.
pub(super) struct Bootstrap {
    /// The last answer from each of the other URLs, with the sender's header; or why there is none.
    answers: BTreeMap<String, std::result::Result<(PeerHeader, GreetingAnswer), String>>,
    /// The URLs of peers that sent raft messages and are not in the list.
    callers: BTreeSet<String>,
    /// What was logged last, so that it is logged once.
    logged: String,
}

/// How a bootstrap ends.
pub(super) enum Start {
    /// As a first member of a new cluster.
    First,
    /// As a new member of this cluster.
    Join { cluster_id: u64 },
}

impl Bootstrap {
    pub fn new(config: &NodeConfig) -> Self {
        let others = config.cluster.iter().filter(|url| **url != config.url);
        let answers = others.map(|url| (url.clone(), Err("no answer yet".into())));
        Self { answers: answers.collect(), callers: BTreeSet::new(), logged: String::new() }
    }

    /// The URLs to greet.
    pub fn urls(&self) -> Vec<String> {
        self.answers.keys().chain(&self.callers).cloned().collect()
    }

    /// Notes where a sender of raft messages listens.
    pub fn note_caller(&mut self, url: &str) {
        if self.callers.len() < CALLERS_MAX && !self.answers.contains_key(url) {
            self.callers.insert(url.to_owned());
        }
    }

    /// Takes the outcome of a greeting. `known` is this member's cluster id, or 0.
    ///
    /// # Errors
    /// If the cluster refuses this member for good.
    pub fn take_report(&mut self, report: PeerReport, id: u64, known: u64) -> Result<()> {
        match report {
            PeerReport::Greeted { url, .. } if !self.answers.contains_key(&url) => {}
            PeerReport::NotGreeted { url, .. } if !self.answers.contains_key(&url) => {
                // It makes room for another caller, and may call again.
                self.callers.remove(&url);
            }
            PeerReport::Greeted { url, header, answer } => {
                let outcome = if known != 0 && header.cluster_id != known {
                    let theirs = header.cluster_id;
                    Err(format!("it belongs to cluster {theirs:016x}, we to {known:016x}"))
                } else {
                    Ok((header, answer))
                };
                self.answers.insert(url, outcome);
            }
            PeerReport::NotGreeted { url, why } => {
                // An earlier answer still says what that member knew of us.
                let answer = self.answers.entry(url).or_insert_with(|| Err(String::new()));
                if let Err(old) = answer {
                    *old = why;
                }
            }
            PeerReport::Refused { header, .. } if known != 0 && header.cluster_id != known => {}
            PeerReport::Refused { header, refusal } => match refusal {
                Refusal::OtherIncarnation(why) => {
                    let from = header.from;
                    return Err(Error::Refused(format!("member {from} refuses this one: {why}")));
                }
                Refusal::Removed { index, .. } => {
                    return Err(Error::Refused(format!(
                        "member {id} was removed at index {index}; an id is never used again: add this member under a new one"
                    )));
                }
                Refusal::Mismatch(_) | Refusal::NotReady(_) => {}
            },
            _ => {}
        }
        Ok(())
    }

    /// How this member may start, or in one line what it waits for.
    pub fn outcome(&self, config: &NodeConfig) -> std::result::Result<Start, String> {
        let answered = || self.answers.values().flatten();
        let missing: Vec<String> = self
            .answers
            .iter()
            .filter_map(|(url, answer)| Some(format!("{url} ({})", answer.as_ref().err()?)))
            .collect();
        let missing = missing.join(", ");
        if config.join {
            let mut counting = answered().filter(|(_, answer)| answer.counts_as_member);
            return match counting.next() {
                Some((header, _)) => Ok(Start::Join { cluster_id: header.cluster_id }),
                None => Err(format!(
                    "waiting for a member that counts {} as one: POST /{} with the body {} to any of them; {} answered{}{}",
                    config.id,
                    config.id,
                    config.url,
                    answered().count(),
                    if missing.is_empty() { "" } else { ", but not " },
                    missing
                )),
            };
        }
        let all_bootstrap = answered().all(|(_, answer)| answer.beginning);
        let with_us = answered().count() + 1;
        if missing.is_empty() || (all_bootstrap && with_us >= majority(self.answers.len() + 1)) {
            return Ok(Start::First);
        }
        Err(format!(
            "waiting for {} before the first start; our --cluster is {}",
            missing,
            config.cluster.join(",")
        ))
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

/// The beginning of a new cluster's log: the additions of the first members, all committed.
pub(super) fn first_entries(config: &NodeConfig) -> (Vec<Entry>, HardState) {
    let additions = config.cluster.iter().enumerate().map(|(position, url)| {
        let id = position as u64 + 1;
        let mut entry = Entry { index: id, term: 1, ..Entry::default() };
        entry.set_entry_type(EntryType::EntryConfChange);
        entry.data = MemberChange::AddVoter { id, url: url.clone() }.encode().into();
        entry
    });
    let entries: Vec<Entry> = additions.collect();
    let commit = entries.len() as u64;
    (entries, HardState { term: 1, vote: 0, commit, ..HardState::default() })
}
