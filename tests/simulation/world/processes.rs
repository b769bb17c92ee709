//! The processes of the members: how they start, take turns and end.

use std::collections::VecDeque;

use raftexample::raft_node::Role;

use super::*;

impl World {
    pub(super) fn slot(&mut self, id: NodeId) -> &mut Slot {
        self.slots.get_mut(&id).expect("the member exists")
    }

    /// The members that run, strays excepted.
    pub(super) fn running(&self) -> Vec<NodeId> {
        let running = self.members_slots().filter(|slot| slot.process.is_some());
        running.map(|slot| slot.config.id).collect()
    }

    pub(super) fn runs(&self, (id, run): Run) -> bool {
        self.slots.get(&id).is_some_and(|slot| slot.run == run && slot.process.is_some())
    }

    pub(super) fn start(&mut self, id: NodeId) -> Step {
        let (boot, incarnation) = (self.random.below(u64::MAX), self.random.below(u64::MAX) | 1);
        let is_boot_reused = self.seam == Some(Seam::ContextsReused);
        let (seam, logger) = (self.seam, self.logger.clone());
        let range = self.settings.election_ticks as u64;
        let election_ticks = (range + self.random.below(range)) as usize;
        let others = self.members_slots().filter(|other| !self.removed.contains(&other.config.id));
        let urls: Vec<String> = others.map(|other| other.config.url.clone()).collect();
        let Some(slot) = self.slots.get(&id) else { return Ok(()) };
        if slot.process.is_some() || slot.is_gone {
            return Ok(());
        }
        // A joiner would join the leftovers' cluster if that expects its id, too.
        let is_new = !self.lives[slot.life].invariants.has_begun(id);
        let waits = slot.config.join && is_new && self.has_strays();
        if waits || self.listens_at(&slot.config.url).is_some() {
            // Or its port is in use.
            self.schedule(10 * TICK, Event::Start(id));
            return Ok(());
        }
        self.sequence += 1;
        let (run, slot) = (self.sequence, self.slots.get_mut(&id).expect("it was just there"));
        if slot.config.join {
            // The flags of a joiner name the current members.
            slot.config.cluster = urls;
        }
        slot.run = run;
        slot.config.boot = if is_boot_reused { 7 } else { boot };
        slot.config.incarnation = incarnation;
        slot.config.randomized_election_ticks = election_ticks..election_ticks + 1;
        slot.inbox.clear();
        slot.turn_is_due = false;
        slot.paused_until = 0;
        let seam = seam.filter(|seam| seam.is_on_disk());
        slot.forgetful = seam.map(|seam| Forgetful::new(slot.disk.clone(), seam));
        let vfs: Arc<dyn Vfs> = match &slot.forgetful {
            Some(forgetful) => Arc::new(forgetful.clone()),
            None => Arc::new(slot.disk.clone()),
        };
        let logger = logger.new(slog::o!("member" => id));
        let tokens_max = self.settings.tokens_max;
        let late_frames = if slot.forgetful.is_some() { 0 } else { self.settings.late_frames };
        let mut wants = Random::new(boot);
        let late = LateWrites::new(move || wants.below(1000) < late_frames);
        let started = Process::start(&slot.config, tokens_max, late, vfs, &logger);
        let (end, life) = (slot.end, slot.life);
        self.note(|| format!("start {id}, run {run}: {:?}", started.as_ref().err()));
        match started {
            Ok(mut process) => {
                if self.settings.holds_notices {
                    process.node.hold_notices();
                }
                let slot = self.slots.get_mut(&id).expect("it was just there");
                if slot.standing != Standing::Copy {
                    self.lives[life].invariants.check_start(id_of(id), &process, end)?;
                }
                slot.process = Some(process);
                let after = slot.tick;
                self.schedule(after, Event::Tick((id, run)));
                self.wake(id);
                self.haunt(id);
                // Its state machine has not begun to replay.
                self.watch(id)
            }
            Err(error) => self.ended(id, error),
        }
    }

    /// Messages to a member's last run may reach this one.
    fn haunt(&mut self, id: NodeId) {
        if !self.faults_are_on || !self.chance(500) {
            return;
        }
        let ghosts = self.ghosts.iter().filter(|(to, _)| *to == id);
        let ghosts: Vec<Batch> = ghosts.map(|(_, batch)| batch.clone()).collect();
        for batch in ghosts {
            if self.chance(300) {
                let after = self.random.below(10 * TICK);
                self.schedule(after, Event::Arrival(id, Packet::Batch(batch)));
            }
        }
    }

    /// Schedules a turn soon, which takes everything that arrives until then.
    pub(super) fn wake(&mut self, id: NodeId) {
        let after = self.random.below(4);
        let slot = self.slot(id);
        if !slot.turn_is_due && slot.process.is_some() {
            slot.turn_is_due = true;
            let run = slot.run;
            self.schedule(after, Event::Turn((id, run)));
        }
    }

    pub(super) fn give(&mut self, id: NodeId, input: Input) {
        let slot = self.slot(id);
        if slot.process.is_some() {
            slot.inbox.push(input);
            self.wake(id);
        }
    }

    pub(super) fn tick(&mut self, (id, run): Run) {
        if !self.runs((id, run)) {
            return;
        }
        self.note(|| format!("tick {id}"));
        let uneven = TICK * self.settings.clock_percent / 100;
        let jitter = self.random.below(uneven / 2 + 1);
        let now = self.now;
        let slot = self.slot(id);
        let after = slot.tick + jitter;
        // At most one tick per turn; missed ticks are skipped.
        let is_waiting = slot.inbox.iter().any(|input| matches!(input, Input::Tick));
        let is_paused = slot.paused_until > now;
        self.schedule(after, Event::Tick((id, run)));
        if !is_waiting && !is_paused {
            self.give(id, Input::Tick);
        }
    }

    pub(super) fn turn(&mut self, (id, run): Run) -> Step {
        if !self.runs((id, run)) {
            return Ok(());
        }
        let now = self.now;
        let slot = self.slot(id);
        if slot.paused_until > now {
            let after = slot.paused_until - now;
            self.schedule(after, Event::Turn((id, run)));
            return Ok(());
        }
        slot.turn_is_due = false;
        let inputs = std::mem::take(&mut slot.inbox);
        let inputs = order_inputs(inputs);
        let process = slot.process.as_mut().expect("it runs");
        if let Some(forgetful) = &slot.forgetful {
            // If the disk fails now, the turn will notice.
            let _ = forgetful.begin_turn();
        }
        let result = process.turn(inputs);
        let fault_happened = slot.fault.is_some() && slot.disk.fault_happened();
        let followed = match result {
            Ok(followed) => followed,
            Err(error) => {
                // Messages sent in this turn left before the error.
                if self.chance(500) {
                    self.dispatch(id);
                } else if let Some(process) = &self.slot(id).process {
                    process.take_sent();
                }
                return self.ended(id, error);
            }
        };
        if fault_happened {
            // One of its own threads met the fault, and the report is still to come.
            self.wake(id);
        }
        self.after_turn(id, followed)
    }

    pub(super) fn after_turn(&mut self, id: NodeId, followed: Followed) -> Step {
        if self.trace.is_some() {
            let process = self.slot(id).process.as_ref().expect("it runs");
            let (status, state) = (process.status().clone(), process.node.raft().state);
            let applied: Vec<u64> = followed.published.iter().map(|entry| entry.index).collect();
            self.note(|| {
                format!(
                    "turn {id}: {state:?} term {} leader {} commit {} applied {} {applied:?}{}",
                    status.term,
                    status.leader,
                    status.commit,
                    status.applied,
                    if followed.restored { " restored" } else { "" }
                )
            });
        }
        let slot = self.slots.get_mut(&id).expect("it runs");
        let process = slot.process.as_mut().expect("it runs");
        if slot.standing != Standing::Member {
            return self.after_strays_turn(id, followed);
        }
        let (role, leader) = (process.status().role, process.status().leader);
        let snapshot = process.status().snapshot;
        if slot.damaged.is_some_and(|damaged| snapshot > damaged) {
            slot.damaged = None;
            self.lives[slot.life].invariants.damaged.remove(&id);
        }
        let mut told_by = None;
        let has_lost = self.losing.is_some_and(|(loser, _)| loser == id);
        match self.losing {
            Some((loser, leader)) if loser == id && role == Role::Quarantined => {
                (self.losing, slot.is_wiped) = (None, true);
                told_by = Some(leader);
            }
            _ if role == Role::Quarantined && !slot.has_lost => {
                return Err(format!("member {id} is quarantined, and lost nothing"));
            }
            Some((_, by)) if (by == id) != (leader == id) => {
                self.is_void = true;
                return Ok(());
            }
            _ => {}
        }
        // A voter that lost its directory may be told of the cluster by a member that does not know of
        // its vote yet. It is counted nowhere, and is removed as any other.
        if slot.is_wiped && process.status().begun && slot.may_return {
            slot.is_wiped = false;
        }
        let checked = self.lives[slot.life].invariants.check_turn(id, process, &followed);
        if checked.is_err() && has_lost {
            // It forgot a vote, and the leader has told it too late or not yet.
            self.is_void = true;
            return Ok(());
        }
        checked?;
        self.removed.extend(process.status().members.removed.keys());
        if followed.restored {
            self.tally.restores += 1;
            self.check_state(id)?;
        }
        self.take_outputs(id)?;
        told_by.map_or(Ok(()), |leader| self.test_quarantine(id, leader))
    }

    /// Takes what a turn put out.
    pub(super) fn take_outputs(&mut self, id: NodeId) -> Step {
        let slot = self.slots.get_mut(&id).expect("it runs");
        let process = slot.process.as_mut().expect("it runs");
        let reports = process.take_reports();
        let has_unwritten = !process.unwritten.is_empty();
        let has_late = process.late.has_begun();
        let held = process.node.held_notices();
        let has_notices = held.is_some() && held != process.notices;
        process.notices = held;
        let (run, life) = (slot.run, slot.life);
        if has_unwritten {
            let after = self.random.below(3 * TICK);
            self.schedule(after, Event::WriteSnapshot((id, run)));
        }
        if has_late {
            let after = self.random.below(TICK);
            self.schedule(after, Event::WriteFrame((id, run)));
        }
        if has_notices {
            let after = self.random.below(TICK);
            self.schedule(after, Event::NoticesDue((id, run)));
        }
        for report in reports {
            self.give(id, Input::Report(report));
        }
        self.dispatch(id);
        self.take_answers(id);
        self.take_clients_answers((id, run), life, false)?;
        self.watch(id)
    }

    pub(super) fn write_snapshot(&mut self, (id, run): Run) {
        if !self.runs((id, run)) {
            return;
        }
        let process = self.slot(id).process.as_mut().expect("it runs");
        let unwritten: Vec<UnwrittenSnapshot> = process.unwritten.drain(..).collect();
        unwritten.into_iter().for_each(UnwrittenSnapshot::write);
        let reports = process.take_reports();
        for report in reports {
            self.give(id, Input::Report(report));
        }
    }

    /// Writes the frame under way. If an earlier event did, this one writes the next frame early, or nothing.
    pub(super) fn write_frame(&mut self, (id, run): Run) {
        if !self.runs((id, run)) {
            return;
        }
        let process = self.slot(id).process.as_mut().expect("it runs");
        if process.late.has_begun() {
            process.late.write();
            self.give(id, Input::Written);
        }
    }

    pub(super) fn send_notices(&mut self, (id, run): Run) {
        if self.runs((id, run)) {
            self.give(id, Input::NoticesDue);
        }
    }

    /// A process ended by itself, which must have a reason.
    pub(super) fn ended(&mut self, id: NodeId, error: Error) -> Step {
        let slot = self.slots.get(&id).expect("it ran");
        let fault = slot.fault.filter(|_| slot.disk.fault_happened());
        self.note(|| format!("{id} ended: {error}; {fault:?}"));
        let slot = self.slots.get(&id).expect("it ran");
        match (error, fault) {
            (Error::Removed | Error::Refused(_) | Error::Config(_), None)
                if slot.standing != Standing::Member =>
            {
                self.answer_all(id)?;
                self.crash(id, End::Killed)?;
                self.slot(id).is_gone = true;
                Ok(())
            }
            // It met a leftover before its own cluster had begun, and cannot know that it is not the one
            // that lost its directory. The operator starts it again.
            (Error::Removed | Error::Refused(_) | Error::Config(_), None)
                if slot.life > 0 && !slot.has_begun() =>
            {
                self.answer_all(id)?;
                self.crash(id, End::Killed)
            }
            (_, Some(Fault::Crash)) => self.crash(id, End::Interrupted),
            (Error::Io { .. }, Some(_)) => {
                self.answer_all(id)?;
                self.crash(id, End::Interrupted)
            }
            (Error::Removed, _) => {
                // The turn that applied the removal may be the one that ended the process, and the
                // only one so far: all that is committed is known to the log of a crashed leader.
                let process = self.slot(id).process.as_ref().expect("it ran");
                let removed: Vec<NodeId> =
                    process.status().members.removed.keys().copied().collect();
                self.removed.extend(removed);
                if !self.removed.contains(&id) {
                    return Err(format!("member {id} says that it was removed, and it was not"));
                }
                self.answer_all(id)?;
                self.crash(id, End::Stopped)?;
                // It may be started once more and has to find out again.
                if self.chance(700) {
                    self.slot(id).is_gone = true;
                }
                Ok(())
            }
            (Error::Refused(_) | Error::Config(_), _)
                if slot.is_wiped
                    || slot.may_return
                    || slot.wiped_early
                    || self.removed.contains(&id) =>
            {
                self.answer_all(id)?;
                self.crash(id, End::Killed)?;
                let is_short = self.settings.first_members < 3;
                let slot = self.slot(id);
                let is_void = slot.wiped_early && is_short;
                // The operator removes it.
                slot.is_wiped |= slot.may_return || slot.wiped_early;
                slot.is_gone = true;
                self.is_void |= is_void;
                Ok(())
            }
            (Error::Corrupt { .. } | Error::Refused(_), _) if slot.damaged.is_some() => {
                self.answer_all(id)?;
                self.crash(id, End::Killed)?;
                let slot = self.slots.get_mut(&id).expect("it ran");
                self.lives[slot.life].invariants.forget(id);
                (slot.damaged, slot.is_wiped, slot.is_gone) = (None, true, true);
                Ok(())
            }
            // Its directory is from before it began, and its flags from after it moved: an operator starts
            // it with --join.
            (Error::Config(_), _) => {
                self.is_void = true;
                Ok(())
            }
            (error, _) => Err(format!("member {id} ended: {error}")),
        }
    }

    /// The last answers of a process that ends in order.
    pub(super) fn answer_all(&mut self, id: NodeId) -> Step {
        let slot = self.slot(id);
        let (run, life) = (slot.run, slot.life);
        if let Some(process) = slot.process.take() {
            drop(process);
        }
        self.take_clients_answers((id, run), life, true)
    }

    fn take_clients_answers(&mut self, at: Run, life: usize, is_stopping: bool) -> Step {
        let (now, clients) = (self.sequence, &mut self.lives[life].clients);
        for (client, outcome) in clients.take_answers(at, now, is_stopping, &mut self.choices) {
            self.answered(life, client, outcome)?;
        }
        Ok(())
    }

    /// Ends a process, and perhaps its machine.
    pub(super) fn crash(&mut self, id: NodeId, end: End) -> Step {
        let survives = match self.random.below(4) {
            0 => Survives::Nothing,
            1 => Survives::Everything,
            _ => Survives::Some(self.random.below(u64::MAX)),
        };
        self.is_void |= self.losing.is_some_and(|(_, leader)| leader == id);
        let now = self.sequence;
        let slot = self.slot(id);
        let (run, life) = (slot.run, slot.life);
        slot.end = end;
        slot.fault = None;
        slot.process = None;
        let receiving = std::mem::take(&mut slot.receiving);
        slot.sending_to.clear();
        slot.inbox.clear();
        slot.disk = slot.disk.crash(survives);
        let asked = std::mem::take(&mut slot.asked);
        self.note(|| format!("crash {id}: {end:?}, {survives:?}"));
        let clients = &mut self.lives[life].clients;
        for client in clients.lose((id, run), now, &mut self.choices).into_iter().flatten() {
            self.pause_client(client);
        }
        for asked in asked {
            self.connection_lost(asked);
        }
        for (transfer, receiver) in receiving.into_values() {
            drop(receiver);
            self.snapshot_failed(&transfer);
        }
        let after = self.random.below(20 * TICK);
        self.schedule(after, Event::Start(id));
        Ok(())
    }

    pub(super) fn kill(&mut self, id: NodeId) -> Step {
        if self.slot(id).process.is_none() {
            return Ok(());
        }
        self.crash(id, End::Killed)
    }

    pub(super) fn stop(&mut self, id: NodeId) -> Step {
        let slot = self.slot(id);
        let Some(process) = &mut slot.process else { return Ok(()) };
        if let Err(error) = process.node.stop() {
            return self.ended(id, error);
        }
        self.answer_all(id)?;
        self.crash(id, End::Stopped)
    }
}

/// In the order of the binary's thread: it takes turns among its queues, so that a read may come before
/// messages that arrived earlier, and ticks come last.
fn order_inputs(inputs: Vec<Input>) -> impl Iterator<Item = Input> {
    const QUEUES: usize = 8;
    let mut queues: [VecDeque<Input>; QUEUES] = Default::default();
    for input in inputs {
        let queue = match &input {
            Input::Read(_) => 0,
            Input::Propose(_) => 1,
            Input::Report(_) => 2,
            Input::Inbound(_) => 3,
            Input::ConfChange(_) => 4,
            Input::Written => 5,
            Input::NoticesDue => 6,
            Input::Tick => 7,
        };
        queues[queue].push_back(input);
    }
    let ticks = std::mem::take(&mut queues[QUEUES - 1]);
    let rounds = queues.iter().map(VecDeque::len).max().unwrap_or_default();
    let others = (0..rounds * QUEUES).filter_map(move |turn| queues[turn % QUEUES].pop_front());
    others.chain(ticks)
}
