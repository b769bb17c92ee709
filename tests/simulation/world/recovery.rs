//! The end of a run: the faults are over, and the cluster must recover.

use super::*;
use crate::support::memory::{StateHead, StateToken, decode_head, decode_state};
use crate::support::store::{Done, Record, Token};
use crate::translation::done;

impl World {
    /// Ends the faults: the cluster must converge and serve.
    pub(super) fn recover(&mut self) -> Step {
        self.note(|| "faults end".into());
        self.faults_are_on = false;
        self.end_strays()?;
        self.cut.clear();
        let settings = &mut self.settings;
        (settings.lost, settings.lost_answers, settings.duplicated) = (0, 0, 0);
        settings.misdirected = 0;
        settings.patience_ticks = 50;
        settings.delay = settings.delay.min(20);
        for slot in self.slots.values_mut() {
            slot.paused_until = 0;
            // Faults that the disk has already had must still be noticed.
            if !slot.disk.fault_happened() && slot.fault.take().is_some() {
                slot.disk.inject(u64::MAX / 2, Fault::Crash);
            }
        }
        for id in self.slots.keys().copied().collect::<Vec<_>>() {
            self.wake(id);
        }
        self.restart_joiners()?;
        let deadline = self.now + RECOVERY_TICKS * TICK;
        let members = loop {
            if let Some(members) = self.converged() {
                break members;
            }
            self.is_void |= self.now > deadline && self.can_never_begin();
            if self.is_void {
                return Ok(());
            }
            if self.now > deadline {
                return Err(format!("no recovery in {RECOVERY_TICKS} ticks: {}", self.describe()));
            }
            self.step()?;
        };
        self.serve(&members)?;
        for id in
            members.iter().filter(|id| !self.removed.contains(id)).copied().collect::<Vec<_>>()
        {
            self.check_state(id)?;
        }
        Ok(())
    }

    /// A joiner's first list may name no current member: it is started again with the current ones.
    pub(super) fn restart_joiners(&mut self) -> Step {
        for id in self.running() {
            let process = self.slots[&id].process.as_ref().expect("it runs");
            if self.slots[&id].config.join && !process.status().begun {
                self.stop(id)?;
                self.schedule(1, Event::Start(id));
            }
        }
        Ok(())
    }

    /// True if a directory was lost before anyone had begun, and still nobody has: see the guide.
    fn can_never_begin(&self) -> bool {
        let mut running = self.slots.values().filter_map(|slot| slot.process.as_ref());
        (self.strays > 0 || self.slots.values().any(|slot| slot.wiped_early))
            && running.all(|process| !process.status().begun)
    }

    /// The members, once all run, follow one leader and have applied the same index.
    pub(super) fn converged(&self) -> Option<Vec<NodeId>> {
        if self.operator.is_some() || self.has_wiped() {
            return None;
        }
        let newest = self.newest()?;
        let members: Vec<NodeId> = newest.members.urls.keys().copied().collect();
        let is_level = members.iter().all(|id| {
            let slot = self.slots.get(id).filter(|slot| slot.config.url == newest.members.urls[id]);
            slot.and_then(|slot| slot.process.as_ref()).is_some_and(|process| {
                let status = process.status();
                status.begun
                    && status.leader == newest.leader
                    && status.term == newest.term
                    && status.applied == newest.applied
                    && status.commit == status.applied
            })
        });
        (is_level && members.contains(&newest.leader)).then_some(members)
    }

    pub(super) fn describe(&self) -> String {
        let slots = self.slots.values().map(|slot| {
            let status = slot.process.as_ref().map(|process| {
                let status = process.status();
                format!(
                    "term {} leader {} commit {} applied {} begun {} members {:?}",
                    status.term,
                    status.leader,
                    status.commit,
                    status.applied,
                    status.begun,
                    status.members.urls.keys()
                )
            });
            let raft = slot.process.as_ref().map(|process| process.node.raft());
            let progress = raft.filter(|raft| raft.state == StateRole::Leader).map(|raft| {
                let peers = raft.prs().iter();
                let line = |(id, peer): (&u64, &raft::Progress)| {
                    format!(
                        "{id}: {:?} matched {} next {} paused {}",
                        peer.state, peer.matched, peer.next_idx, peer.paused
                    )
                };
                peers.map(line).collect::<Vec<_>>()
            });
            format!(
                "member {}: gone {}, wiped {}, {status:?}, {progress:?}\n",
                slot.config.id, slot.is_gone, slot.is_wiped
            )
        });
        slots.collect()
    }

    /// Each member accepts a write and then serves every key.
    pub(super) fn serve(&mut self, members: &[NodeId]) -> Step {
        let requests = members.iter().flat_map(|id| {
            let gets = (0..self.settings.keys).map(move |key| (*id, key, false));
            std::iter::once((*id, 0, true)).chain(gets)
        });
        for (id, key, is_write) in requests.collect::<Vec<_>>() {
            let mut tries = 0..SERVE_TRIES;
            // An earlier request for a removal may be applied only now.
            while !self.removed.contains(&id) && !self.is_served(id, key, is_write)? {
                if tries.next().is_none() {
                    let what = if is_write { "write" } else { "read" };
                    return Err(format!("member {id} serves no {what}: {}", self.describe()));
                }
            }
        }
        self.finish_writes(members)?;
        // Every member learns of the last write.
        let target = self.life().invariants.last_committed();
        let deadline = self.now + RECOVERY_TICKS * TICK;
        let has_applied = |world: &Self, id: &NodeId| {
            let process = world.slots[id].process.as_ref();
            process.is_some_and(|process| process.status().applied >= target)
        };
        while !members.iter().all(|id| self.removed.contains(id) || has_applied(self, id)) {
            if self.now > deadline {
                return Err(format!("not all members apply {target}: {}", self.describe()));
            }
            self.step()?;
        }
        self.finish_watches(members)
    }

    /// A write with a token has an outcome if it is repeated, at any member.
    fn finish_writes(&mut self, members: &[NodeId]) -> Step {
        for tries in 0.. {
            let unfinished = self.life().clients.unfinished();
            if unfinished.is_empty() {
                break;
            }
            if tries == SERVE_TRIES {
                return Err(format!("no outcome of {unfinished:?}: {}", self.describe()));
            }
            for (_, write) in unfinished {
                let left = members.iter().copied().filter(|id| !self.removed.contains(id));
                let left: Vec<NodeId> = left.collect();
                let Some(id) = self.pick(&left) else { return Ok(()) };
                self.wait_until_it_runs(id)?;
                if self.slots[&id].process.is_some() {
                    let number = self.send_write(None, id, write, false);
                    self.wait_for_request(number)?;
                }
            }
        }
        Ok(())
    }

    /// Every watcher learns of the last change.
    fn finish_watches(&mut self, members: &[NodeId]) -> Step {
        let left = members.iter().filter(|id| self.slots[id].process.is_some()).copied();
        let left: Vec<NodeId> = left.filter(|id| !self.removed.contains(id)).collect();
        let Some(id) = self.pick(&left) else { return Ok(()) };
        for watcher in 0..self.life().watchers.len() {
            let mut before = None;
            loop {
                self.question(watcher, id)?;
                let reached = Some(self.life().watchers[watcher].reached());
                if before == reached {
                    break;
                }
                before = reached;
            }
        }
        let tokens_max = self.settings.tokens_max;
        let life = self.life();
        let replay = life.replay(u64::MAX, tokens_max);
        life.watchers.iter().try_for_each(|watcher| watcher.check_complete(&replay))
    }

    /// A move that was asked for earlier may be applied only now.
    fn wait_until_it_runs(&mut self, id: NodeId) -> Step {
        while self.slots[&id].process.is_none() && !self.slots[&id].is_gone {
            self.step()?;
        }
        Ok(())
    }

    fn wait_for_request(&mut self, number: u64) -> Step {
        while self.life().clients.under_way.iter().any(|request| request.number == number) {
            self.step()?;
        }
        Ok(())
    }

    pub(super) fn is_served(
        &mut self,
        id: NodeId,
        key: u64,
        is_write: bool,
    ) -> Result<bool, Violation> {
        let count = |life: &Life| (life.clients.acknowledged(), life.clients.reads());
        let before = count(self.life());
        self.wait_until_it_runs(id)?;
        let choice = if is_write { self.plain_put(key) } else { Choice::Get(key) };
        let number = self.request(0, id, choice);
        self.wait_for_request(number)?;
        Ok(count(self.life()) != before)
    }

    /// A member's state equals what the log says, byte for byte.
    pub(super) fn check_state(&mut self, id: NodeId) -> Step {
        let tokens_max = self.settings.tokens_max;
        let slot = self.slots.get_mut(&id).expect("it runs");
        let process = slot.process.as_mut().expect("it runs");
        let applied = process.status().applied;
        let bytes = process.state_bytes(applied).map_err(|error| error.to_string())?;
        let model = self.lives[slot.life].replay(applied, tokens_max).model;
        let found: BTreeMap<String, Record> = decode_state(&bytes)
            .into_iter()
            .map(|(key, (value, index, term))| {
                let value = value.parse().expect("values are numbers");
                (key, Record { value, index, term })
            })
            .collect();
        if found != model.records {
            return Err(format!(
                "member {id} holds {found:?} at index {applied}, the log says {:?}",
                model.records
            ));
        }
        let StateHead { index, term, floor, remembered } = decode_head(&bytes);
        let remembered = remembered.into_iter().map(|StateToken { token, outcome, .. }| {
            (Token { index: token.index, random: token.random }, done(&outcome))
        });
        let remembered: Vec<(Token, Done)> = remembered.collect();
        let expected: Vec<(Token, Done)> =
            model.remembered().map(|(token, done)| (token, done.clone())).collect();
        let (found, expected) =
            (((index, term), floor, remembered), (model.applied, model.floor(), expected));
        if found != expected {
            return Err(format!(
                "member {id} remembers {found:?} at index {applied}, the log says {expected:?}"
            ));
        }
        Ok(())
    }
}
