//! The clients' requests and the watchers' questions, and the members they are sent to.

use std::rc::Rc;

use super::*;
use crate::support::store::Step as Operation;
use crate::translation::key_name;

/// A watcher asks after one in as many turns of a member.
const TURNS_PER_QUESTION: u64 = 16;

impl World {
    pub(super) fn pause_client(&mut self, client: usize) {
        let after = self.random.below(self.settings.pause_ticks * TICK) + 1;
        self.schedule(after, Event::Client(client));
    }

    pub(super) fn client(&mut self, client: usize) {
        if !self.faults_are_on {
            return;
        }
        let running = self.slots.values().filter(|slot| slot.process.is_some());
        let running: Vec<NodeId> = running.map(|slot| slot.key).collect();
        let Some(id) = self.pick(&running) else { return self.pause_client(client) };
        let key = self.random.below(self.settings.keys);
        let is_write = self.chance(self.settings.writes);
        let (keys, number, life) = (self.settings.keys, self.sequence, self.slots[&id].life);
        let clients = &mut self.lives[life].clients;
        let choice = clients.choose(client, key, is_write, keys, number, &mut self.choices);
        if let Choice::Twice(write) = &choice {
            // The second copy goes to a member of the same cluster, perhaps to the same one.
            let others = self.slots.values().filter(|slot| slot.life == life);
            let others = others.filter(|slot| slot.process.is_some()).map(|slot| slot.key);
            let other = *self.choices.choose(&others.collect::<Vec<_>>());
            self.send_write(None, other, write.clone(), false);
        }
        self.request(client, id, choice);
    }

    /// A PUT of the client port.
    pub(super) fn plain_put(&mut self, key: u64) -> Choice {
        self.sequence += 1;
        let then = vec![Operation::Put(key_name(key), self.sequence * 10)];
        Choice::Write(Rc::new(Write { then, ..Write::default() }), true)
    }

    /// Sends a request; returns its number.
    pub(super) fn request(&mut self, client: usize, id: NodeId, choice: Choice) -> u64 {
        match choice {
            Choice::Write(write, is_plain) => self.send_write(Some(client), id, write, is_plain),
            Choice::Twice(write) => self.send_write(Some(client), id, write, false),
            choice => {
                let now = self.number_request(Some(client), id, &choice);
                let slot = &self.slots[&id];
                let store = &slot.process.as_ref().expect("it runs").store;
                let clients = &mut self.lives[slot.life].clients;
                clients.read(client, (id, slot.run), choice, store, now);
                self.wake(id);
                now
            }
        }
    }

    pub(super) fn send_write(
        &mut self,
        client: Option<usize>,
        id: NodeId,
        write: Rc<Write>,
        is_plain: bool,
    ) -> u64 {
        let now = self.number_request(client, id, &write);
        let slot = self.slots.get_mut(&id).expect("it runs");
        let (at, process) = ((id, slot.run), slot.process.as_mut().expect("it runs"));
        let Life { clients, invariants, .. } = &mut self.lives[slot.life];
        let has_token = write.token.is_some();
        let (mut proposal, data_hash) = clients.write(client, at, write, is_plain, process, now);
        if has_token {
            invariants.may_repeat(data_hash);
        }
        proposal.ack = ack(self.seam == Some(Seam::AcknowledgedBeforePersisted));
        self.give(id, Input::Propose(proposal));
        now
    }

    /// Numbers a request, and sets its deadline.
    fn number_request(
        &mut self,
        client: Option<usize>,
        id: NodeId,
        what: &impl std::fmt::Debug,
    ) -> u64 {
        self.sequence += 1;
        let now = self.sequence;
        self.note(|| format!("client {client:?}: request {now} to {id}: {what:?}"));
        let patience = self.settings.patience_ticks * TICK;
        self.schedule(patience, Event::Deadline(now));
        now
    }

    pub(super) fn answered(
        &mut self,
        life: usize,
        client: Option<usize>,
        outcome: Outcome,
    ) -> Step {
        self.sequence += 1;
        self.note(|| format!("client {client:?}: {outcome:?}"));
        if let Some(client) = client {
            self.pause_client(client);
        }
        match outcome {
            Outcome::Written { id, index, term, .. } => {
                self.lives[life].invariants.check_acknowledged(id, index, term)
            }
            _ => Ok(()),
        }
    }

    /// Some watchers ask a member what has changed.
    pub(super) fn watch(&mut self, id: NodeId) -> Step {
        let watchers = self.lives[self.slots[&id].life].watchers.len();
        for watcher in 0..watchers {
            if self.choices.below(TURNS_PER_QUESTION) == 0 {
                self.question(watcher, id)?;
            }
        }
        Ok(())
    }

    pub(super) fn question(&mut self, watcher: usize, id: NodeId) -> Step {
        let slot = &self.slots[&id];
        let Some(process) = &slot.process else { return Ok(()) };
        let elsewhere = if self.faults_are_on && self.choices.below(2) == 0 {
            let others = self.slots.values().filter(|other| other.life == slot.life);
            let stores = others.filter_map(|other| Some(other.process.as_ref()?.store.clone()));
            Some(self.choices.choose(&stores.collect::<Vec<_>>()).clone())
        } else {
            None
        };
        let watchers = &mut self.lives[slot.life].watchers;
        let asked = watchers[watcher].ask((id, slot.run), process, elsewhere, &mut self.choices)?;
        self.tally.watched += asked.changes;
        self.tally.resets += asked.resets;
        self.tally.resets_within += asked.resets_within;
        self.tally.resumed += asked.resumed;
        Ok(())
    }
}
