//! The clients' requests, and the members they are sent to.

use super::*;

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
        self.request(client, id, key, is_write);
    }

    /// Sends a request; returns its number.
    pub(super) fn request(&mut self, client: usize, id: NodeId, key: u64, is_write: bool) -> u64 {
        self.sequence += 1;
        let now = self.sequence;
        let slot = self.slots.get_mut(&id).expect("it runs");
        let at = (id, slot.run);
        if is_write {
            let is_early = self.seam == Some(Seam::AcknowledgedBeforePersisted);
            let ack = if is_early { Ack::Proposed } else { Ack::Committed };
            let proposal = self.lives[slot.life].clients.put(client, at, key, ack, now);
            self.give(id, Input::Propose(proposal));
        } else {
            let process = slot.process.as_ref().expect("it runs");
            self.lives[slot.life].clients.get(client, at, key, &process.store, now);
            self.wake(id);
        }
        self.note(|| format!("client {client}: request {now} to {id}, key{key}, write {is_write}"));
        let patience = self.settings.patience_ticks * TICK;
        self.schedule(patience, Event::Deadline(now));
        now
    }

    pub(super) fn answered(&mut self, life: usize, client: usize, outcome: Outcome) -> Step {
        self.sequence += 1;
        self.note(|| match &outcome {
            Outcome::Acknowledged(_, acknowledged) => format!("client {client}: {acknowledged:?}"),
            Outcome::Read(value) => format!("client {client}: read {value:?}"),
            Outcome::Failed => format!("client {client}: failed"),
            Outcome::Unknown => format!("client {client}: unknown"),
        });
        self.pause_client(client);
        match outcome {
            Outcome::Acknowledged(data, acknowledged) => {
                self.lives[life].invariants.check_acknowledged(&data, acknowledged)
            }
            _ => Ok(()),
        }
    }
}
