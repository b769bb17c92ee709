//! How a new member gets going: it asks the others before it has any say.
//!
//! A member that lost its data directory looks like a new one, and would vote a second time. So a
//! member whose write-ahead log holds nothing but its identity is *beginning*: it greets the others
//! and answers their greetings, but takes no raft message. It begins when
//!
//! * no answer knows its id under another incarnation, or as removed,
//! * nobody answered that it goes by another first list, and
//! * without `--join`: every other URL of the list has answered, or those that answered are
//!   beginning too and are a majority together with it;
//!   with `--join`: one that counts its id as a member has answered.
//!
//! Whoever sends it raft messages takes it for a member, and is greeted too: what the list names may
//! all be gone by now. Such an answer can only refuse.
//!
//! A first member that has written its first entries and seen no election since still counts as
//! beginning. Otherwise the first of two that begin together would keep the other from it until the
//! third is there.
//!
//! First members then write what the original's StartNode does: one entry for each member's addition,
//! at term 1, committed, the same on all of them. One frame: a crash leaves all of it or nothing.

use std::collections::{BTreeMap, BTreeSet};

use raft::RawNode;
use raft::eraftpb::{ConfState, Entry, EntryType, HardState};
use slog::{info, warn};

use super::{Frame, Greeting, NodeConfig, PeerReport, RaftNode, raft_config};
use crate::channels::{GreetingAnswer, PeerHeader, Refusal};
use crate::error::{Error, Result};
use crate::membership::{MemberChange, majority};
use crate::storage::log::Log;
use crate::storage::wal::Identity;

/// Senders of raft messages that are greeted beside the list.
const CALLERS_MAX: usize = 8;

/// What a beginning member has found out.
pub(super) struct Bootstrapping {
    /// The last answer from each of the other URLs, with the answering member's header; or why there
    /// is none.
    answers: BTreeMap<String, std::result::Result<(PeerHeader, GreetingAnswer), String>>,
    /// Where those listen that sent us raft messages and are not in the list.
    callers: BTreeSet<String>,
    /// What was logged last, so that it is logged once.
    logged: String,
}

impl Bootstrapping {
    pub(super) fn new(config: &NodeConfig) -> Self {
        let others = config.cluster.iter().filter(|url| **url != config.url);
        let answers = others.map(|url| (url.clone(), Err("no answer yet".into())));
        Self { answers: answers.collect(), callers: BTreeSet::new(), logged: String::new() }
    }

    pub(super) fn urls(&self) -> Vec<String> {
        self.answers.keys().chain(&self.callers).cloned().collect()
    }

    /// Notes where a sender of raft messages listens.
    pub(super) fn was_called_from(&mut self, url: &str) {
        if self.callers.len() < CALLERS_MAX && !self.answers.contains_key(url) {
            self.callers.insert(url.to_owned());
        }
    }

    /// Why this member cannot begin yet, in one line; `None` if it can.
    fn waits_for(&self, config: &NodeConfig) -> Option<String> {
        let answered = || self.answers.values().flatten();
        let missing: Vec<String> = self
            .answers
            .iter()
            .filter_map(|(url, answer)| Some(format!("{url} ({})", answer.as_ref().err()?)))
            .collect();
        if config.join {
            if answered().any(|(_, answer)| answer.counts_as_member) {
                return None;
            }
            return Some(format!(
                "waiting for a member that counts {} as one: POST /{} with the body {} to any of them; {} answered{}{}",
                config.id,
                config.id,
                config.url,
                answered().count(),
                if missing.is_empty() { "" } else { ", but not " },
                missing.join(", ")
            ));
        }
        let all_begin = answered().all(|(_, answer)| answer.beginning);
        let with_us = answered().count() + 1;
        if missing.is_empty() || (all_begin && with_us >= majority(self.answers.len() + 1)) {
            return None;
        }
        Some(format!(
            "waiting for {} before the first start; our --cluster is {}",
            missing.join(", "),
            config.cluster.join(",")
        ))
    }
}

/// The list of first URLs that this member goes by: none if it joins.
pub(super) fn first_urls(config: &NodeConfig) -> Vec<String> {
    if config.join { Vec::new() } else { config.cluster.clone() }
}

impl RaftNode {
    /// True while nothing has happened here that a vote or an entry of another member was part of.
    pub(super) fn counts_as_beginning(&self) -> bool {
        let first_members = self.config.cluster.len() as u64;
        let is_untouched = !self.config.join
            && !self.identity.is_restored()
            && (self.hard_state.term, self.hard_state.vote) == (1, 0)
            && self.raw_node.raft.raft_log.last_index() == first_members;
        self.beginning.is_some() || is_untouched
    }

    /// What we tell the others about us.
    pub(super) fn greeting(&self) -> Greeting {
        Greeting { first_urls: first_urls(&self.config) }
    }

    /// Takes in what a greeting brought while we are beginning.
    pub(super) fn take_greeting_report(&mut self, report: PeerReport) -> Result<()> {
        let Some(beginning) = &mut self.beginning else { return Ok(()) };
        match report {
            PeerReport::Greeted { url, .. } if !beginning.answers.contains_key(&url) => {}
            // It makes room for another, and may call again.
            PeerReport::NotGreeted { url, .. } if !beginning.answers.contains_key(&url) => {
                beginning.callers.remove(&url);
            }
            PeerReport::Greeted { url, header, answer } => {
                let known = self.identity.cluster_id;
                let outcome = if known != 0 && header.cluster_id != known {
                    Err(format!(
                        "it belongs to cluster {:016x}, we to {known:016x}",
                        header.cluster_id
                    ))
                } else {
                    Ok((header, answer))
                };
                beginning.answers.insert(url, outcome);
            }
            PeerReport::NotGreeted { url, why } => {
                // An answer that came earlier still says what that member knew of us.
                let answer = beginning.answers.entry(url).or_insert_with(|| Err(String::new()));
                if let Err(old) = answer {
                    *old = why;
                }
            }
            PeerReport::Refused { header, refusal } => {
                return self.refused_to_begin(header, refusal);
            }
            _ => {}
        }
        self.try_to_begin()
    }

    fn refused_to_begin(&mut self, header: PeerHeader, refusal: Refusal) -> Result<()> {
        let id = self.config.id;
        let known = self.identity.cluster_id;
        if known != 0 && header.cluster_id != known {
            return Ok(());
        }
        match refusal {
            Refusal::OtherIncarnation(why) => {
                Err(Error::Refused(format!("member {} refuses this one: {why}", header.from)))
            }
            Refusal::Removed { index, .. } => Err(Error::Refused(format!(
                "member {id} was removed at index {index}; an id is never used again: add this member under a new one"
            ))),
            Refusal::Mismatch(_) | Refusal::NotReady(_) => Ok(()),
        }
    }

    /// Begins if nothing is in the way, and else logs what is.
    pub(super) fn try_to_begin(&mut self) -> Result<()> {
        let Some(beginning) = &mut self.beginning else { return Ok(()) };
        if let Some(waits_for) = beginning.waits_for(&self.config) {
            if beginning.logged != waits_for && self.ticks >= self.config.election_ticks as u64 {
                warn!(self.logger, "{}", waits_for);
                beginning.logged = waits_for;
            }
            return Ok(());
        }
        let beginning = self.beginning.take().expect("it was just looked at");
        if self.config.join {
            self.join(beginning)?
        } else {
            self.start_as_first_member()?
        }
        self.connect_members();
        Ok(())
    }

    /// Writes the additions of the first members as the beginning of the log.
    fn start_as_first_member(&mut self) -> Result<()> {
        let additions = self.config.cluster.iter().enumerate().map(|(position, url)| {
            let id = position as u64 + 1;
            let mut entry = Entry { index: id, term: 1, ..Entry::default() };
            entry.set_entry_type(EntryType::EntryConfChange);
            entry.data = MemberChange::AddVoter { id, url: url.clone() }.encode().into();
            entry
        });
        let entries: Vec<Entry> = additions.collect();
        let commit = entries.len() as u64;
        let hard_state = HardState { term: 1, vote: 0, commit, ..HardState::default() };
        self.wal.save(&Frame {
            entries: &entries,
            hard_state: Some(&hard_state),
            ..Frame::default()
        })?;
        info!(self.logger, "starting as one of {} first members", entries.len());
        self.hard_state = hard_state.clone();
        self.replay_until = Some(commit);
        let log = Log::new((0, 0), entries, hard_state, ConfState::default(), None);
        self.raw_node = RawNode::new(&raft_config(&self.config, 0), log, &self.logger)
            .map_err(|error| Error::Refused(format!("raft cannot start: {error}")))?;
        Ok(())
    }

    /// Takes over the cluster's id from a member that counts us as one, and waits for the leader.
    fn join(&mut self, beginning: Bootstrapping) -> Result<()> {
        let (header, _) = beginning
            .answers
            .into_values()
            .flatten()
            .find(|(_, answer)| answer.counts_as_member)
            .expect("one that counts us as a member has answered");
        self.identity = Identity { cluster_id: header.cluster_id, ..self.identity.clone() };
        self.wal.save(&Frame { identity: Some(&self.identity), ..Frame::default() })?;
        info!(self.logger, "joining cluster {:016x}", header.cluster_id);
        Ok(())
    }
}
