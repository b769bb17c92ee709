//! The operator, who adds, removes and replaces members, and the faults.

use std::io::ErrorKind;

use super::*;

impl World {
    /// The status of the member that applied most, running or last seen.
    pub(super) fn newest(&self) -> Option<Status> {
        let running = self.members_slots().filter_map(|slot| slot.process.as_ref());
        let newest =
            running.map(Process::status).max_by_key(|status| (status.applied, status.term));
        newest.map(|status| status.clone())
    }

    pub(super) fn members(&self) -> BTreeMap<NodeId, String> {
        self.newest().map(|status| status.members.urls).unwrap_or_default()
    }

    pub(super) fn ask(&mut self, change: MemberRequest) {
        let Some(at) = self.pick(&self.running()) else { return };
        let run = self.slot(at).run;
        let (responder, pending) = responder();
        self.note(|| format!("operator asks {at}: {change:?}"));
        let request = ConfChangeRequest { change: change.clone(), forwarded: false, responder };
        self.give(at, Input::ConfChange(request));
        self.operator = Some(Task { change, pending, at: (at, run), since: self.now });
    }

    pub(super) fn operate(&mut self) -> Step {
        self.schedule(3 * TICK, Event::Operator);
        if let Some(mut task) = self.operator.take() {
            let answer = match task.pending.try_take() {
                None if self.runs(task.at) && self.now - task.since < 50 * TICK => {
                    self.operator = Some(task);
                    return Ok(());
                }
                None => Err(RequestError::Unknown("no answer".into())),
                Some(answer) => answer,
            };
            self.note(|| format!("operator: {:?}: {answer:?}", task.change));
            self.follow_up(task.change, answer)?;
        }
        if self.losing.is_some() {
            return Ok(());
        }
        self.follow_moves()?;
        self.complete_restore();
        // Some operators take their time.
        let wiped =
            self.slots.values().find(|slot| slot.is_wiped).filter(|_| self.random.below(4) > 0);
        let Some(wiped) = wiped.map(|slot| slot.config.id) else { return Ok(()) };
        let members = self.members();
        if members.contains_key(&wiped) {
            self.ask(MemberRequest::Remove { id: wiped });
        } else if !members.is_empty() {
            let slot = self.slot(wiped);
            (slot.is_wiped, slot.is_gone) = (false, true);
            let url = slot.config.url.clone();
            if slot.process.is_none() {
                self.add_member(url);
            }
        }
        Ok(())
    }

    fn follow_up(&mut self, change: MemberRequest, answer: Result<(), RequestError>) -> Step {
        let is_unknown = matches!(answer, Err(RequestError::Unknown(_)));
        match change {
            MemberRequest::Remove { .. } | MemberRequest::Move { .. } => {
                self.removal_is_in_doubt |= is_unknown;
            }
            MemberRequest::Add { id, .. } if answer.is_ok() && self.slots.contains_key(&id) => {
                return Err(format!("the removed id {id} was added again"));
            }
            MemberRequest::Add { id, .. } if self.slots.contains_key(&id) => {}
            // If the outcome is unknown, the new member waits until it is a member.
            MemberRequest::Add { id, url } if answer.is_ok() || is_unknown => {
                self.start_joiner(id, url);
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn add_member(&mut self, url: String) {
        if self.next_id <= IDS_MAX {
            let id = self.next_id;
            self.next_id += 1;
            self.ask(MemberRequest::Add { id, url });
        }
    }

    fn start_joiner(&mut self, id: NodeId, url: String) {
        let others = self.members_slots().filter(|other| !self.removed.contains(&other.config.id));
        let mut urls: Vec<String> = others.map(|other| other.config.url.clone()).collect();
        urls.push(url.clone());
        let mut config = self.node_config(id, &urls, true);
        config.url = url;
        self.add_slot(config);
        // Some joiners start long after they were added.
        let patience = if self.chance(250) { 200 } else { 5 };
        let after = self.random.below(patience * TICK);
        self.schedule(after, Event::Start(id));
    }

    pub(super) fn fault(&mut self) -> Step {
        if !self.faults_are_on {
            return Ok(());
        }
        if self.losing.is_some() {
            self.schedule(TICK, Event::Fault);
            return Ok(());
        }
        let after = 1 + self.random.below(2 * self.settings.fault_ticks * TICK);
        self.schedule(after, Event::Fault);
        let weights = self.settings.fault_weights.clone();
        let sum: u64 = weights.iter().map(|(_, weight)| weight).sum();
        if sum == 0 {
            return Ok(());
        }
        let mut place = self.random.below(sum);
        let kind = weights.into_iter().find(|(_, weight)| {
            let is_here = place < *weight;
            place = place.saturating_sub(*weight);
            is_here
        });
        let (kind, _) = kind.expect("the place is within the sum");
        let running = self.running();
        let Some(id) = self.pick(&running) else { return Ok(()) };
        if self.inject(kind, id, &running)? {
            self.note(|| format!("fault: {kind:?} at {id}"));
            *self.tally.faults.entry(kind).or_default() += 1;
        }
        Ok(())
    }

    /// Injects a fault; returns false if it is not possible now.
    pub(super) fn inject(
        &mut self,
        kind: FaultKind,
        id: NodeId,
        running: &[NodeId],
    ) -> Result<bool, Violation> {
        match kind {
            FaultKind::Kill => self.kill(id)?,
            FaultKind::KillAll => {
                for id in running {
                    self.kill(*id)?;
                }
            }
            FaultKind::CrashAtOperation | FaultKind::DiskError => {
                // EIO, or a full disk, which may still take a part of a write.
                let part = self.random.below(600) as usize;
                let fault = match (kind, self.random.below(3)) {
                    (FaultKind::CrashAtOperation, _) => Fault::Crash,
                    (_, 0) => Fault::Fails(ErrorKind::Other),
                    (_, 1) => Fault::Fails(ErrorKind::StorageFull),
                    _ => Fault::FailsAfter(ErrorKind::StorageFull, part),
                };
                let operation = 1 + self.random.below(30);
                let slot = self.slot(id);
                if slot.fault.is_some() {
                    return Ok(false);
                }
                slot.fault = Some(fault);
                slot.disk.inject(operation, fault);
            }
            FaultKind::Stop => self.stop(id)?,
            FaultKind::Pause => {
                let length = self.random.below(30) * TICK;
                let until = self.now + length;
                self.slot(id).paused_until = until;
            }
            FaultKind::Partition => {
                let sides: Vec<(NodeId, bool)> = self
                    .slots
                    .keys()
                    .copied()
                    .collect::<Vec<_>>()
                    .into_iter()
                    .map(|id| (id, self.random.below(2) == 0))
                    .collect();
                for (from, side) in &sides {
                    for (to, other) in &sides {
                        if side != other {
                            self.cut.insert((*from, *to));
                        }
                    }
                }
            }
            FaultKind::CutOneWay => {
                let ids: Vec<NodeId> = self.slots.keys().copied().collect();
                let to = self.pick(&ids).expect("there are members");
                self.cut.insert((id, to));
            }
            FaultKind::IsolateLeader => {
                let leader = running.iter().copied().find(|id| {
                    let process = self.slots[id].process.as_ref();
                    process.is_some_and(|p| p.node.raft().state == StateRole::Leader)
                });
                let Some(leader) = leader else { return Ok(false) };
                for other in self.slots.keys().copied().collect::<Vec<_>>() {
                    self.cut.insert((leader, other));
                    self.cut.insert((other, leader));
                }
            }
            FaultKind::Heal => {
                if self.random.below(2) == 0 {
                    self.cut.clear();
                } else {
                    for _ in 0..self.cut.len() / 2 {
                        let after = self.random.below(20 * TICK);
                        self.schedule(after, Event::HealSome);
                    }
                }
            }
            FaultKind::Ghost => {
                let count = self.ghosts.len() as u64;
                if count == 0 {
                    return Ok(false);
                }
                let (to, batch) = self.ghosts[self.random.below(count) as usize].clone();
                self.schedule(1, Event::Arrival(to, Packet::Batch(batch)));
            }
            FaultKind::Foreigner => self.foreigner(id),
            FaultKind::Add => {
                if self.operator.is_some() || self.members().len() >= 5 || self.has_wiped() {
                    return Ok(false);
                }
                let removed: Vec<NodeId> = self.removed.iter().copied().collect();
                match self.pick(&removed).filter(|_| self.chance(250)) {
                    // It must never come back.
                    Some(id) => self.ask(MemberRequest::Add { id, url: url(id) }),
                    None => self.add_member(url(self.next_id)),
                }
            }
            FaultKind::Remove => {
                let members: Vec<NodeId> = self.members().into_keys().collect();
                let removed = self.pick(&members).filter(|_| members.len() > 1);
                if self.operator.is_some() || self.has_lost() {
                    return Ok(false);
                }
                let Some(id) = removed else { return Ok(false) };
                self.ask(MemberRequest::Remove { id });
            }
            FaultKind::Lead => {
                let members: Vec<NodeId> = self.members().into_keys().collect();
                let to = self.pick(&members).filter(|_| self.chance(500));
                if self.operator.is_some() {
                    return Ok(false);
                }
                self.ask(MemberRequest::Lead { to });
            }
            FaultKind::Move => {
                let port = 9100 + self.random.below(50);
                let is_taken = self.operator.is_some() || self.has_lost();
                if is_taken || !self.members().contains_key(&id) {
                    return Ok(false);
                }
                self.ask(MemberRequest::Move { id, url: format!("http://127.0.0.1:{port}") });
            }
            FaultKind::Wipe => return self.wipe(id),
            FaultKind::CutLink => {
                let ids: Vec<NodeId> = self.slots.keys().copied().collect();
                let to = self.pick(&ids).expect("there are members");
                self.cut.extend([(id, to), (to, id)]);
            }
            FaultKind::Damage => return Ok(self.damage(id)),
            FaultKind::LostTail => return self.lose_tail(id),
            FaultKind::NewLife => return self.begin_new_life(),
            FaultKind::Stray => return self.start_stray(),
        }
        Ok(true)
    }

    /// A byte of a member's newest snapshot changes. The member finds out when it sends it, and makes
    /// another, or at its next start, which may then need a replacement.
    fn damage(&mut self, id: NodeId) -> bool {
        let byte = self.random.below(u64::MAX);
        let slot = &self.slots[&id];
        let index = slot.process.as_ref().expect("it runs").status().snapshot;
        let paths = slot.disk.paths();
        let is_snapshot =
            |path: &&std::path::PathBuf| path.extension().is_some_and(|it| it == "snap");
        let newest = paths.iter().filter(is_snapshot).max();
        let Some(newest) = newest.filter(|_| index > 0 && self.can_spare(id)) else { return false };
        slot.disk.tamper(newest, |bytes| {
            let place = byte as usize % bytes.len();
            bytes[place] ^= 1 << (byte >> 32 & 7);
        });
        self.slot(id).damaged = Some(index);
        self.life().invariants.damaged.insert(id);
        true
    }

    /// First notes the state of a member's disk, and later puts it in place of the newer one. That is
    /// found out if the leader stays: see README, "Not promised".
    fn lose_tail(&mut self, id: NodeId) -> Result<bool, Violation> {
        let slot = self.slot(id);
        if !slot.has_begun() {
            return Ok(false);
        }
        let process = slot.process.as_ref().expect("it runs");
        let last = process.node.raft().raft_log.last_index();
        let (disk, had, urls) = match &slot.earlier {
            Some((disk, had, urls)) if *had < last => (disk.image(), *had, urls.clone()),
            // A damaged snapshot may be replaced by then, and would come back.
            _ if slot.damaged.is_some() => return Ok(false),
            _ => {
                let urls = process.status().members.urls.clone();
                slot.earlier = Some((slot.disk.image(), last, urls));
                self.leave_behind(id);
                return Ok(false);
            }
        };
        let running = self.running();
        let statuses = running.iter().map(|id| self.slots[id].process.as_ref().expect("it runs"));
        let leaders: BTreeSet<NodeId> = statuses.map(|process| process.status().leader).collect();
        let leader = leaders.first().copied().filter(|leader| leaders.len() == 1 && *leader != id);
        let Some(leader) = leader.filter(|leader| running.contains(leader)) else {
            return Ok(false);
        };
        let raft = self.slots[&leader].process.as_ref().expect("it runs").node.raft();
        let acknowledged = raft.prs().get(id).map_or(0, |progress| progress.matched);
        let is_leader =
            raft.state == StateRole::Leader && self.slots[&leader].paused_until <= self.now;
        // A stray could be the first that it meets.
        if self.has_strays() {
            return Ok(false);
        }
        // At least one other member must still be at the URL that the earlier directory names.
        let members = self.members();
        if !members.iter().any(|(other, url)| *other != id && urls.get(other) == Some(url)) {
            return Ok(false);
        }
        let is_cut = self.is_cut(leader, id) || self.is_cut(id, leader);
        if !is_leader || acknowledged <= had || is_cut || !self.can_spare(id) {
            return Ok(false);
        }
        self.kill(id)?;
        self.life().invariants.forget(id);
        let slot = self.slot(id);
        (slot.disk, slot.end, slot.earlier) = (disk, End::Interrupted, None);
        slot.has_lost = true;
        self.schedule(1, Event::Start(id));
        self.losing = Some((id, leader));
        Ok(true)
    }

    /// Cuts the leader off a member, so that it commits with member `id`.
    fn leave_behind(&mut self, id: NodeId) {
        let leader = self.slots[&id].process.as_ref().expect("it runs").status().leader;
        let mut others = self.running();
        others.retain(|other| ![id, leader].contains(other));
        if let Some(other) = self.pick(&others).filter(|_| leader != id && self.chance(500)) {
            self.cut.extend([(leader, other), (other, leader)]);
        }
    }

    /// A quarantine must hold across restarts, and without the leader that found the loss.
    pub(super) fn test_quarantine(&mut self, id: NodeId, leader: NodeId) -> Step {
        self.cut.clear();
        for id in [id, leader] {
            if self.chance(500) {
                self.kill(id)?;
            }
        }
        Ok(())
    }

    /// True if a member lost something and may have to be replaced.
    fn has_lost(&self) -> bool {
        let mut slots = self.slots.values();
        self.losing.is_some() || slots.any(|slot| slot.is_wiped || slot.damaged.is_some())
    }

    pub(super) fn has_wiped(&self) -> bool {
        self.slots.values().any(|slot| slot.is_wiped)
    }

    /// A member of another cluster takes the members of this one for its own.
    pub(super) fn foreigner(&mut self, to: NodeId) {
        let status = self.slot(to).process.as_ref().expect("it runs").status().clone();
        let from = 1 + self.random.below(self.next_id);
        let mut message = Message::default();
        message.set_msg_type(if self.random.below(2) == 0 {
            MessageType::MsgHeartbeat
        } else {
            MessageType::MsgAppend
        });
        (message.from, message.to) = (from, to);
        message.term = status.term + self.random.below(3);
        if message.get_msg_type() == MessageType::MsgAppend {
            (message.index, message.log_term) = (status.applied, message.term);
            let entry = raft::eraftpb::Entry {
                index: status.applied + 1,
                term: message.term,
                data: crate::support::memory::put("foreign", "value").into(),
                ..Default::default()
            };
            message.log_term = status.term;
            message.commit = status.applied + 1;
            message.entries = vec![entry].into();
        }
        let (incarnation, number) = (self.random.below(1 << 40) + 1, self.random.below(1 << 40));
        let header = PeerHeader {
            cluster_id: 0xf0e1,
            from,
            incarnation,
            url: url(from),
            moved: 0,
            to,
            to_incarnation: 0,
        };
        let run = (from, u64::MAX);
        let batch = Batch {
            from: run,
            header,
            boot: incarnation,
            number: Some(number),
            messages: vec![message],
        };
        self.schedule(1, Event::Arrival(to, Packet::Batch(batch)));
    }

    /// A member loses its directory.
    pub(super) fn wipe(&mut self, id: NodeId) -> Result<bool, Violation> {
        let Some(members) = self.newest().map(|status| status.members) else { return Ok(false) };
        // A single first member begins a new cluster: see README, "Not promised".
        let was_alone = self.slot(id).config.cluster.len() == 1 && !self.slot(id).config.join;
        if was_alone || !self.can_spare(id) {
            return Ok(false);
        }
        self.kill(id)?;
        let slot = self.slot(id);
        (slot.disk, slot.earlier, slot.damaged) = (MemVfs::default(), None, None);
        slot.is_wiped = true;
        slot.may_return = members.learners.contains(&id);
        self.life().invariants.forget(id);
        Ok(true)
    }

    /// A first member loses its directory before all have begun.
    pub(super) fn wipe_early(&mut self, id: NodeId) -> Step {
        let mut running = self.slots.values().filter_map(|slot| slot.process.as_ref());
        if running.any(|process| process.status().begun) {
            return Ok(());
        }
        self.note(|| format!("{id} loses its directory before anyone has begun"));
        self.kill(id)?;
        let slot = self.slot(id);
        (slot.disk, slot.wiped_early) = (MemVfs::default(), true);
        self.schedule(1, Event::Start(id));
        Ok(())
    }

    /// Starts members where the cluster has moved them.
    fn follow_moves(&mut self) -> Step {
        for (id, url) in self.members() {
            if self.slots.get(&id).is_some_and(|slot| slot.config.url != url) {
                self.keep_copy(id);
                self.stop(id)?;
                self.slot(id).config.url = url;
                if !self.faults_are_on {
                    // It was asked for before the faults ended.
                    self.restart_joiners()?;
                }
            }
        }
        Ok(())
    }

    /// True if all members run, and have applied the same changes.
    pub(super) fn all_know(&self, members: &Members) -> bool {
        members.urls.keys().all(|other| {
            let process = self.slots.get(other).and_then(|slot| slot.process.as_ref());
            process.is_some_and(|process| process.status().members == *members)
        })
    }

    /// True if the others are a majority without member `id`, which holds until it is replaced: no other
    /// one lost anything, and no change is on its way.
    pub(super) fn can_spare(&self, id: NodeId) -> bool {
        let Some(members) = self.newest().map(|status| status.members) else { return false };
        // A member that still counts a removed one may need it to elect a leader.
        let all_know = self.all_know(&members);
        let is_changing = self.operator.is_some() || self.removal_is_in_doubt || self.has_lost();
        members.voters().filter(|voter| *voter != id).count() >= 2
            && members.urls.contains_key(&id)
            && all_know
            && !is_changing
    }
}
