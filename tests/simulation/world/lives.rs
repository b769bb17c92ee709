//! The lives of a cluster: it is begun again, or restored from a backup, while directories of earlier lives
//! and copies of moved members are left over, and are started.
//!
//! Each life has its own clients and invariants, so that a merge of two lives violates one of them.

use super::*;
use crate::support::store::Replay;
use raftexample::commands::Restore;

/// The distance between the keys of a member's slot and of its strays.
const STRAY: NodeId = 1_000;

/// The member id of a slot.
pub(super) fn id_of(key: NodeId) -> NodeId {
    key % STRAY
}

/// What a slot's process is to the cluster that the operator works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    Member,
    /// A member of an earlier life.
    Leftover,
    /// A copy of a member, at the place that the member moved away from.
    Copy,
}

/// One cluster.
#[derive(Default)]
pub(super) struct Life {
    pub clients: Clients,
    pub invariants: Invariants,
    pub watchers: Vec<Watcher>,
}

impl Life {
    /// The log up to an index, carried out by the model.
    pub fn replay(&self, up_to: u64, tokens_max: usize) -> Replay {
        self.clients.replay(&self.invariants, up_to, tokens_max)
    }
}

/// A directory that the operator has forgotten.
pub(super) struct Leftover {
    config: NodeConfig,
    life: usize,
    standing: Standing,
    disk: MemVfs,
    end: End,
}

/// A snapshot file of some life.
#[derive(Clone)]
pub(super) struct Backup {
    life: usize,
    index: u64,
    bytes: Vec<u8>,
}

impl Slot {
    pub(super) fn has_begun(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.status().begun)
    }
}

impl World {
    /// The life that the operator works on.
    pub(super) fn life(&mut self) -> &mut Life {
        self.lives.last_mut().expect("there is a first life")
    }

    pub(super) fn begin_life(&mut self, life: Life) {
        let prefixes = (0..self.settings.watchers)
            .map(|_| draw_prefix(&mut self.choices, self.settings.keys))
            .collect::<Vec<_>>();
        let watchers = prefixes.into_iter().map(Watcher::new).collect();
        self.lives.push(Life { watchers, ..life });
    }

    pub(super) fn members_slots(&self) -> impl Iterator<Item = &Slot> {
        self.slots.values().filter(|slot| slot.standing == Standing::Member)
    }

    pub(super) fn has_strays(&self) -> bool {
        self.slots.keys().any(|key| *key > STRAY)
    }

    /// Gives up the cluster and begins another, by the same list or from a backup.
    pub(super) fn begin_new_life(&mut self) -> Result<bool, Violation> {
        let backup = if self.chance(500) { self.take_backup() } else { None };
        for id in self.members_slots().map(|slot| slot.key).collect::<Vec<_>>() {
            self.kill(id)?;
            let slot = self.slots.remove(&id).expect("it was just there");
            let Slot { config, life, disk, end, .. } = slot;
            // What never began is an empty directory to the next life, and what lost its data was
            // promised nothing.
            let is_whole = !slot.is_wiped && !slot.is_gone && slot.damaged.is_none();
            if is_whole && self.lives[life].invariants.has_begun(id) {
                let standing = Standing::Leftover;
                self.leftovers.push(Leftover { config, life, standing, disk, end });
            }
        }
        self.leftovers.retain(|leftover| leftover.standing != Standing::Copy);
        (self.operator, self.removal_is_in_doubt) = (None, false);
        self.removed.clear();
        match backup {
            None => {
                self.begin_life(Life::default());
                self.add_first_members();
            }
            Some(backup) => self.restore(backup),
        }
        // One of the directories that should have been removed is started instead.
        if self.chance(500) {
            self.start_stray()?;
        }
        Ok(true)
    }

    /// The backup of an earlier restore, or the newest snapshot of a member.
    fn take_backup(&mut self) -> Option<Backup> {
        if let Some(backup) = self.backup.clone().filter(|_| self.chance(500)) {
            return Some(backup);
        }
        let id = self.pick(&self.running())?;
        let slot = &self.slots[&id];
        let paths = slot.disk.paths();
        let is_snapshot =
            |path: &&std::path::PathBuf| path.extension().is_some_and(|it| it == "snap");
        let newest = paths.iter().filter(is_snapshot).max();
        let newest = newest.filter(|_| slot.damaged.is_none())?;
        let name = newest.file_stem().and_then(|name| name.to_str()?.split_once('-'));
        let index = name.and_then(|(_, index)| u64::from_str_radix(index, 16).ok());
        let index = index.expect("a snapshot is named by its term and index");
        let bytes = slot.disk.contents(newest);
        self.backup = Some(Backup { life: slot.life, index, bytes });
        self.backup.clone()
    }

    /// `snapshot restore`: a cluster of one member.
    fn restore(&mut self, Backup { life, index, bytes }: Backup) {
        let disk = MemVfs::default();
        let file = std::path::Path::new(crate::support::config::DATA).join("backup.snap");
        disk.put(&file, &bytes);
        let restore =
            Restore { file, peer_url: url(1), data_dir: crate::support::config::DATA.into() };
        let incarnation = self.random.below(u64::MAX) | 1;
        let restored = restore.restore(&disk, Arc::new(disk.clone()), incarnation);
        restored.unwrap_or_else(|error| panic!("a backup of this cluster: {error}"));
        let earlier = &self.lives[life];
        let invariants = earlier.invariants.restored(index);
        let clients = earlier.clients.restored(index);
        self.begin_life(Life { clients, invariants, ..Life::default() });
        let config = self.node_config(1, &[url(1)], false);
        self.add_slot(config);
        self.slot(1).disk = disk;
        self.next_id = 2;
        self.schedule(1, Event::Start(1));
    }

    /// The operator of a restored cluster adds the other members.
    pub(super) fn complete_restore(&mut self) {
        let is_restored = self.slots.get(&1).is_some_and(|slot| slot.config.cluster.len() == 1);
        let members = self.members().len() as u64;
        let is_short = (1..self.settings.first_members).contains(&members);
        if is_restored && is_short && self.operator.is_none() && self.chance(300) {
            self.add_member(url(self.next_id));
        }
    }

    /// A moved member's directory stays behind as a copy, as it was when the member moved.
    pub(super) fn keep_copy(&mut self, id: NodeId) {
        let Some(members) = self.newest().map(|status| status.members) else { return };
        // A copy of a single voter needs no other member.
        let process = self.slots[&id].process.as_ref();
        let knows = process.is_some_and(|process| process.status().members == members);
        if !self.faults_are_on || !knows || members.voters().count() < 2 || !self.chance(500) {
            return;
        }
        let slot = &self.slots[&id];
        let (config, life, disk) = (slot.config.clone(), slot.life, slot.disk.image());
        let (standing, end) = (Standing::Copy, End::Stopped);
        self.leftovers.push(Leftover { config, life, standing, disk, end });
    }

    /// Starts a leftover directory at its URL, in place of the member that is there now. A copy runs only
    /// once all members know where the original is: see README, "Not promised".
    pub(super) fn start_stray(&mut self) -> Result<bool, Violation> {
        if self.leftovers.is_empty() {
            return Ok(false);
        }
        let place = self.random.below(self.leftovers.len() as u64) as usize;
        let Leftover { config, standing, .. } = &self.leftovers[place];
        if *standing == Standing::Copy {
            let Some(members) = self.newest().map(|status| status.members) else {
                return Ok(false);
            };
            let is_elsewhere =
                members.urls.get(&config.id).is_none_or(|known| *known != config.url);
            if !is_elsewhere || !self.all_know(&members) {
                return Ok(false);
            }
        }
        let Leftover { config, life, standing, disk, end } = self.leftovers.swap_remove(place);
        if let Some(there) = self.listens_at(&config.url) {
            if self.slots[&there].standing != Standing::Member {
                self.leftovers.push(Leftover { config, life, standing, disk, end });
                return Ok(false);
            }
            self.kill(there)?;
        }
        let joiners = self.members_slots().filter(|slot| slot.config.join && !slot.has_begun());
        for joiner in joiners.map(|slot| slot.key).collect::<Vec<_>>() {
            self.kill(joiner)?;
        }
        self.strays += 1;
        let key = config.id + STRAY * self.strays;
        self.note(|| format!("stray {key}: {standing:?} of life {life} at {}", config.url));
        let slot = Slot { key, life, standing, disk, end, ..self.new_slot(config) };
        self.slots.insert(key, slot);
        self.start(key)?;
        let after = self.random.below(200 * TICK);
        self.schedule(after, Event::StrayEnds(key));
        Ok(true)
    }

    /// Checks a stray after its turn. A copy that leads would be a second leader of its term.
    pub(super) fn after_strays_turn(&mut self, key: NodeId, followed: Followed) -> Step {
        let slot = &self.slots[&key];
        let process = slot.process.as_ref().expect("it runs");
        match slot.standing {
            Standing::Copy if process.node.raft().state == StateRole::Leader => {
                return Err(format!("the copy {key} leads"));
            }
            Standing::Copy => self.lives[slot.life].invariants.check_answers(&followed)?,
            _ => {
                let invariants = &mut self.lives[slot.life].invariants;
                invariants.check_turn(slot.config.id, process, &followed)?;
            }
        }
        self.take_outputs(key)
    }

    pub(super) fn end_stray(&mut self, key: NodeId) -> Step {
        if !self.slots.contains_key(&key) {
            return Ok(());
        }
        self.kill(key)?;
        let slot = self.slots.remove(&key).expect("it was just there");
        let Slot { config, life, standing, disk, end, .. } = slot;
        if !slot.is_gone && (standing == Standing::Leftover || life == self.lives.len() - 1) {
            self.leftovers.push(Leftover { config, life, standing, disk, end });
        }
        Ok(())
    }

    pub(super) fn end_strays(&mut self) -> Step {
        let strays: Vec<NodeId> = self.slots.keys().copied().filter(|key| *key > STRAY).collect();
        strays.into_iter().try_for_each(|key| self.end_stray(key))
    }
}
