//! The members, what lies between them, and what goes wrong: one thread, one seed.
//!
//! Everything that happens is an event in one queue, ordered by time. Chance is drawn from one
//! generator, so the same seed gives the same run.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use raft::StateRole;
use raft::eraftpb::{Message, MessageType};
use raftexample::channels::{
    Ack, ConfChangeRequest, Greeting, GreetingAnswer, MemberChange, NodeId, PeerHeader, PeerReport,
    Pending, Refusal, SnapshotFile, Waiter, waiter,
};
use raftexample::error::{Error, RequestError};
use raftexample::raft_node::{Input, NodeConfig, Status};
use raftexample::storage::Vfs;
use raftexample::storage::snapshotter::{Received, SnapshotReceiver};
use raftexample::transport::{Inbound, InboundBody};
use slog::{Drain, Logger, o};
use tokio::sync::oneshot;

use super::clients::{Clients, Outcome};
use super::harness::{DATA, Fault, MemVfs, Random, Survives, url};
use super::invariants::{End, Invariants, Violation};
use super::mutants::{Forgetful, Seam};
use super::process::{Followed, Outgoing, Process, UnwrittenSnapshot};
use super::settings::{FaultKind, Settings, TICK};

/// Batches that may come once more.
const GHOSTS_MAX: usize = 32;
/// Ids beyond this are not given out: the operator rests.
const IDS_MAX: NodeId = 14;
/// How long the cluster may take to recover once nothing goes wrong any more, in ticks.
const RECOVERY_TICKS: u64 = 2_000;

/// How often a request may have no success then: the last fault may still have its effects.
const SERVE_TRIES: u32 = 5;

/// What a run has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub steps: u64,
    pub elections: u64,
    pub acknowledged: u64,
    pub reads: u64,
    pub committed: u64,
    pub restores: u64,
    pub faults: BTreeMap<FaultKind, u64>,
}

impl Tally {
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.elections += other.elections;
        self.acknowledged += other.acknowledged;
        self.reads += other.reads;
        self.committed += other.committed;
        self.restores += other.restores;
        for (kind, count) in &other.faults {
            *self.faults.entry(*kind).or_default() += count;
        }
    }
}

/// A run of a process: the member, and how often it was started before.
type Run = (NodeId, u64);

enum Event {
    Tick(Run),
    Turn(Run),
    Arrival(NodeId, Packet),
    /// The thread that writes a snapshot gets to it.
    WriteSnapshot(Run),
    /// The second half of a snapshot arrives.
    SnapshotRest(Run, u64),
    Client(usize),
    Deadline(u64),
    Operator,
    Fault,
    Start(NodeId),
    HealSome,
}

/// A batch of messages, as the sender's transport made it.
#[derive(Clone)]
struct Batch {
    from: Run,
    header: PeerHeader,
    boot: u64,
    /// `None`: it is numbered when it arrives.
    number: Option<u64>,
    messages: Vec<Message>,
}

enum Packet {
    Batch(Batch),
    Snapshot(Box<SnapshotTransfer>),
    Greeting { from: Run, header: PeerHeader, url: String, greeting: Greeting },
    Change { from: Run, header: PeerHeader, change: MemberChange, waiter: Waiter<()> },
    /// What the sender's transport has to say, back at the sender.
    Report { run: u64, report: PeerReport },
    ChangeAnswer { waiter: Waiter<()>, answer: Result<(), RequestError> },
}

struct SnapshotTransfer {
    from: Run,
    header: PeerHeader,
    boot: u64,
    number: u64,
    message: Message,
    file: SnapshotFile,
    bytes: Vec<u8>,
}

/// What a member was asked and its node has not answered yet.
enum Asked {
    Batch { from: Run, answer: oneshot::Receiver<Result<(), Refusal>> },
    Snapshot { from: Run, index: u64, answer: oneshot::Receiver<Result<(), Refusal>> },
    Greeting { from: Run, url: String, answer: oneshot::Receiver<Result<GreetingAnswer, Refusal>> },
    Change { from: Run, waiter: Waiter<()>, pending: Pending<()> },
}

/// One member: its flags, its disk, and its process if it runs.
struct Slot {
    config: NodeConfig,
    disk: MemVfs,
    process: Option<Process>,
    /// Counts the starts of the process.
    run: u64,
    inbox: Vec<Input>,
    turn_is_due: bool,
    paused_until: u64,
    tick: u64,
    end: End,
    /// The disk that its process sees, if that is a mutant's.
    forgetful: Option<Forgetful>,
    /// What was set to go wrong on its disk.
    fault: Option<Fault>,
    /// It lost its directory under this id.
    is_wiped: bool,
    /// It is not started any more: removed, or refused.
    is_gone: bool,
    asked: Vec<Asked>,
    receiving: BTreeMap<u64, (Box<SnapshotTransfer>, SnapshotReceiver)>,
    sending_to: BTreeSet<NodeId>,
}

/// What the operator is waiting for.
struct Task {
    change: MemberChange,
    pending: Pending<()>,
    at: Run,
    since: u64,
}

pub struct World {
    pub settings: Settings,
    seam: Option<Seam>,
    random: Random,
    now: u64,
    sequence: u64,
    events: BTreeMap<(u64, u64), Event>,
    slots: BTreeMap<NodeId, Slot>,
    /// Directions that nothing gets through.
    cut: BTreeSet<(NodeId, NodeId)>,
    last_arrival: BTreeMap<(NodeId, NodeId), u64>,
    ghosts: Vec<(NodeId, Batch)>,
    clients: Clients,
    invariants: Invariants,
    /// Ids whose removal was seen applied.
    removed: BTreeSet<NodeId>,
    operator: Option<Task>,
    /// True once nobody knows whether a removal is still to come.
    removal_is_in_doubt: bool,
    next_id: NodeId,
    faults_are_on: bool,
    tally: Tally,
    /// What happened, if it is wanted.
    pub trace: Option<Vec<String>>,
    logger: Logger,
}

type Step = Result<(), Violation>;

impl World {
    pub fn new(settings: Settings, seam: Option<Seam>, is_traced: bool) -> Self {
        let seed = settings.seed.wrapping_add(0x5eed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let logger = if is_traced {
            Logger::root(StandardError.fuse(), o!())
        } else {
            Logger::root(slog::Discard, o!())
        };
        Self {
            seam,
            random: Random(seed),
            now: 0,
            sequence: 0,
            events: BTreeMap::new(),
            slots: BTreeMap::new(),
            cut: BTreeSet::new(),
            last_arrival: BTreeMap::new(),
            ghosts: Vec::new(),
            clients: Clients::default(),
            invariants: Invariants::default(),
            removed: BTreeSet::new(),
            operator: None,
            removal_is_in_doubt: false,
            next_id: settings.first_members + 1,
            faults_are_on: true,
            tally: Tally::default(),
            trace: is_traced.then(Vec::new),
            logger,
            settings,
        }
    }

    /// The whole run: with faults, then without, then what has to hold at the end.
    pub fn run(&mut self) -> Result<Tally, Violation> {
        self.begin()?;
        while self.tally.steps < self.settings.steps {
            self.step()?;
        }
        self.recover()?;
        self.clients.check(|data| self.invariants.place(data))?;
        self.tally.elections = self.invariants.elections;
        self.tally.acknowledged = self.clients.acknowledged() as u64;
        self.tally.reads = self.clients.reads() as u64;
        self.tally.committed = self.invariants.last_committed();
        Ok(self.tally.clone())
    }

    fn begin(&mut self) -> Step {
        let urls: Vec<String> = (1..=self.settings.first_members).map(url).collect();
        for id in 1..=self.settings.first_members {
            let config = self.config(id, &urls, false);
            self.add_slot(config);
            let after = self.random.below(5 * TICK);
            self.schedule(after, Event::Start(id));
        }
        for client in 0..self.settings.clients {
            let after = self.random.below(20 * TICK);
            self.schedule(after, Event::Client(client));
        }
        self.schedule(30 * TICK, Event::Operator);
        self.schedule(20 * TICK, Event::Fault);
        Ok(())
    }

    fn config(&mut self, id: NodeId, urls: &[String], join: bool) -> NodeConfig {
        let election_ticks = self.settings.election_ticks;
        NodeConfig {
            id,
            url: url(id),
            cluster: urls.to_vec(),
            join,
            cluster_id: None,
            data_dir: DATA.into(),
            snapshot_count: self.settings.snapshot_count,
            snapshot_catch_up_entries: self.settings.snapshot_catch_up_entries,
            tick: Duration::from_millis(100),
            election_ticks,
            randomized_election_ticks: election_ticks..election_ticks + 1,
            heartbeat_ticks: self.settings.heartbeat_ticks.min(election_ticks - 1),
            request_timeout: Duration::from_secs(5),
            boot: 0,
            incarnation: 0,
        }
    }

    fn add_slot(&mut self, config: NodeConfig) {
        let percent = self.settings.clock_percent;
        let tick = TICK - TICK * percent / 200 + self.random.below(TICK * percent / 100 + 1);
        let slot = Slot {
            config,
            disk: MemVfs::default(),
            process: None,
            run: 0,
            inbox: Vec::new(),
            turn_is_due: false,
            paused_until: 0,
            tick,
            end: End::Stopped,
            forgetful: None,
            fault: None,
            is_wiped: false,
            is_gone: false,
            asked: Vec::new(),
            receiving: BTreeMap::new(),
            sending_to: BTreeSet::new(),
        };
        self.slots.insert(slot.config.id, slot);
    }

    // -----------------------------------------------------------------------------------------
    // Chance and time

    fn schedule(&mut self, after: u64, event: Event) {
        self.sequence += 1;
        self.events.insert((self.now + after, self.sequence), event);
    }

    fn chance(&mut self, of_thousand: u64) -> bool {
        self.random.below(1000) < of_thousand
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> Option<T> {
        let count = choices.len() as u64;
        (count > 0).then(|| choices[self.random.below(count) as usize])
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let line = format!("{:>8} {}", self.now, line());
            if std::env::var_os("SIMULATION_TRACE").is_some() {
                eprintln!("{line}");
            }
            trace.push(line);
        }
    }

    fn step(&mut self) -> Step {
        let ((time, _), event) = self.events.pop_first().expect("clocks tick for ever");
        self.now = time;
        self.tally.steps += 1;
        match event {
            Event::Tick(run) => self.tick(run),
            Event::Turn(run) => self.turn(run)?,
            Event::Arrival(to, packet) => self.arrive(to, packet),
            Event::WriteSnapshot(run) => self.write_snapshot(run),
            Event::SnapshotRest(run, number) => self.receive_rest(run, number),
            Event::Client(client) => self.client(client),
            Event::Deadline(number) => {
                if let Some((client, outcome)) = self.clients.give_up_number(number, self.sequence)
                {
                    self.answered(client, outcome)?;
                }
            }
            Event::Operator => self.operate(),
            Event::Fault => self.fault()?,
            Event::Start(id) => self.start(id)?,
            Event::HealSome => {
                if let Some(link) = self.pick(&self.cut.iter().copied().collect::<Vec<_>>()) {
                    self.cut.remove(&link);
                }
            }
        }
        Ok(())
    }

    // -----------------------------------------------------------------------------------------
    // Processes

    fn slot(&mut self, id: NodeId) -> &mut Slot {
        self.slots.get_mut(&id).expect("the member exists")
    }

    fn running(&self) -> Vec<NodeId> {
        let running = self.slots.values().filter(|slot| slot.process.is_some());
        running.map(|slot| slot.config.id).collect()
    }

    fn runs(&self, (id, run): Run) -> bool {
        self.slots.get(&id).is_some_and(|slot| slot.run == run && slot.process.is_some())
    }

    fn start(&mut self, id: NodeId) -> Step {
        let (boot, incarnation) = (self.random.below(u64::MAX), self.random.below(u64::MAX) | 1);
        let is_boot_reused = self.seam == Some(Seam::ContextsReused);
        let segment_bytes = self.settings.segment_bytes;
        let (seam, logger) = (self.seam, self.logger.clone());
        let range = self.settings.election_ticks as u64;
        let election_ticks = (range + self.random.below(range)) as usize;
        let slot = self.slot(id);
        if slot.process.is_some() || slot.is_gone {
            return Ok(());
        }
        slot.run += 1;
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
        let logger = logger.new(o!("member" => id));
        let started = Process::start(&slot.config, vfs, segment_bytes, &logger);
        let (run, end) = (slot.run, slot.end);
        self.note(|| format!("start {id}, run {run}: {:?}", started.as_ref().err()));
        match started {
            Ok(process) => {
                let slot = self.slots.get_mut(&id).expect("it was just there");
                self.invariants.check_start(id, &process, end)?;
                slot.process = Some(process);
                let after = slot.tick;
                self.schedule(after, Event::Tick((id, run)));
                self.wake(id);
                Ok(())
            }
            Err(error) => self.ended(id, error),
        }
    }

    /// Lets a member take a turn soon: what arrives until then is part of it.
    fn wake(&mut self, id: NodeId) {
        let after = self.random.below(4);
        let slot = self.slot(id);
        if !slot.turn_is_due && slot.process.is_some() {
            slot.turn_is_due = true;
            let run = slot.run;
            self.schedule(after, Event::Turn((id, run)));
        }
    }

    fn give(&mut self, id: NodeId, input: Input) {
        let slot = self.slot(id);
        if slot.process.is_some() {
            slot.inbox.push(input);
            self.wake(id);
        }
    }

    fn tick(&mut self, (id, run): Run) {
        if !self.runs((id, run)) {
            return;
        }
        let uneven = TICK * self.settings.clock_percent / 100;
        let jitter = self.random.below(uneven / 2 + 1);
        let now = self.now;
        let slot = self.slot(id);
        let after = slot.tick + jitter;
        // One tick a turn at most; those that were missed are skipped.
        let is_waiting = slot.inbox.iter().any(|input| matches!(input, Input::Tick));
        let is_paused = slot.paused_until > now;
        self.schedule(after, Event::Tick((id, run)));
        if !is_waiting && !is_paused {
            self.give(id, Input::Tick);
        }
    }

    fn turn(&mut self, (id, run): Run) -> Step {
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
                // Whatever it sent, it sent before the error.
                if self.chance(500) {
                    self.dispatch(id);
                } else if let Some(process) = &self.slot(id).process {
                    process.take_sent();
                }
                return self.ended(id, error);
            }
        };
        if fault_happened {
            // A thread of its own met the fault, and its report is still to come.
            self.wake(id);
        }
        self.after_turn(id, followed)
    }

    fn after_turn(&mut self, id: NodeId, followed: Followed) -> Step {
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
        if slot.is_wiped && process.status().begun {
            return Err(format!("member {id} lost its directory and takes part again"));
        }
        self.invariants.check_turn(id, process, &followed)?;
        self.removed.extend(process.status().members.removed.keys());
        let reports = process.take_reports();
        let has_unwritten = !process.unwritten.is_empty();
        if followed.restored {
            self.tally.restores += 1;
            self.check_state(id)?;
        }
        let run = self.slot(id).run;
        if has_unwritten {
            let after = self.random.below(3 * TICK);
            self.schedule(after, Event::WriteSnapshot((id, run)));
        }
        for report in reports {
            self.give(id, Input::Report(report));
        }
        self.dispatch(id);
        self.take_answers(id);
        let now = self.sequence;
        for (client, outcome) in self.clients.take_answers((id, run), now, false) {
            self.answered(client, outcome)?;
        }
        Ok(())
    }

    fn write_snapshot(&mut self, (id, run): Run) {
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

    /// A process has ended by itself: for a reason that there is.
    fn ended(&mut self, id: NodeId, error: Error) -> Step {
        let slot = self.slots.get(&id).expect("it ran");
        let fault = slot.fault.filter(|_| slot.disk.fault_happened());
        self.note(|| format!("{id} ended: {error}; {fault:?}"));
        let slot = self.slots.get(&id).expect("it ran");
        match (error, fault) {
            (_, Some(Fault::Crash)) => self.crash(id, End::Interrupted),
            (Error::Io { .. }, Some(_)) => {
                self.answer_all(id)?;
                self.crash(id, End::Interrupted)
            }
            (Error::Removed, _) => {
                if !self.removed.contains(&id) {
                    return Err(format!("member {id} is none, it says, and was not removed"));
                }
                self.answer_all(id)?;
                self.crash(id, End::Stopped)?;
                // Somebody may start it once more; it has to find out again.
                if self.chance(700) {
                    self.slot(id).is_gone = true;
                }
                Ok(())
            }
            (Error::Refused(_), _)
                if slot.is_wiped || self.removed.contains(&id) =>
            {
                self.answer_all(id)?;
                self.crash(id, End::Killed)?;
                self.slot(id).is_gone = true;
                Ok(())
            }
            (error, _) => Err(format!("member {id} ended: {error}")),
        }
    }

    /// What a process that ends in order still says.
    fn answer_all(&mut self, id: NodeId) -> Step {
        let slot = self.slot(id);
        let run = slot.run;
        if let Some(process) = slot.process.take() {
            drop(process);
        }
        let now = self.sequence;
        for (client, outcome) in self.clients.take_answers((id, run), now, true) {
            self.answered(client, outcome)?;
        }
        Ok(())
    }

    /// Ends a process, and perhaps the machine under it.
    fn crash(&mut self, id: NodeId, end: End) -> Step {
        let survives = match self.random.below(4) {
            0 => Survives::Nothing,
            1 => Survives::Everything,
            _ => Survives::Some(self.random.below(u64::MAX)),
        };
        let now = self.sequence;
        let slot = self.slot(id);
        let run = slot.run;
        slot.end = end;
        slot.fault = None;
        slot.process = None;
        let receiving = std::mem::take(&mut slot.receiving);
        slot.sending_to.clear();
        slot.inbox.clear();
        slot.disk = slot.disk.crash(survives);
        let asked = std::mem::take(&mut slot.asked);
        self.note(|| format!("crash {id}: {end:?}, {survives:?}"));
        for client in self.clients.lose((id, run), now) {
            self.pause_client(client);
        }
        for asked in asked {
            self.connection_lost(id, asked);
        }
        for (transfer, receiver) in receiving.into_values() {
            drop(receiver);
            self.snapshot_failed(id, &transfer);
        }
        let after = self.random.below(20 * TICK);
        self.schedule(after, Event::Start(id));
        Ok(())
    }

    fn kill(&mut self, id: NodeId) -> Step {
        if self.slot(id).process.is_none() {
            return Ok(());
        }
        self.crash(id, End::Killed)
    }

    fn stop(&mut self, id: NodeId) -> Step {
        let slot = self.slot(id);
        let Some(process) = &mut slot.process else { return Ok(()) };
        if let Err(error) = process.node.stop() {
            return self.ended(id, error);
        }
        self.answer_all(id)?;
        self.crash(id, End::Stopped)
    }

    // -----------------------------------------------------------------------------------------
    // The network

    fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.cut.contains(&(from, to))
    }

    /// How long something travels from one member to another.
    fn delay(&mut self, from: NodeId, to: NodeId) -> u64 {
        let delay = 1 + self.random.below(self.settings.delay);
        if !self.settings.keeps_order {
            return delay;
        }
        let arrival = self.last_arrival.entry((from, to)).or_default();
        *arrival = (self.now + delay).max(*arrival + 1);
        *arrival - self.now
    }

    /// Half an election timeout: what a sender's transport waits for an answer.
    fn patience(&self) -> u64 {
        self.settings.election_ticks as u64 * TICK / 2
    }

    fn report(&mut self, (id, run): Run, after: u64, report: PeerReport) {
        self.schedule(after, Event::Arrival(id, Packet::Report { run, report }));
    }

    /// Hands what a node has sent to the network.
    fn dispatch(&mut self, id: NodeId) {
        let slot = self.slot(id);
        let Some(process) = &slot.process else { return };
        let queue = process.take_sent();
        let from = (id, slot.run);
        let mut batches: BTreeMap<NodeId, Vec<Vec<Message>>> = BTreeMap::new();
        for outgoing in queue {
            match outgoing {
                Outgoing::Message(message) => {
                    let is_split = self.chance(100);
                    let batches = batches.entry(message.to).or_default();
                    match batches.last_mut() {
                        Some(batch) if !is_split => batch.push(message),
                        _ => batches.push(vec![message]),
                    }
                }
                Outgoing::Snapshot(message, file) => self.send_snapshot(from, message, file),
                Outgoing::Greeting(url, greeting) => self.send_greeting(from, url, greeting),
                Outgoing::Change(to, change, waiter) => self.send_change(from, to, change, waiter),
            }
        }
        for (to, batches) in batches {
            for messages in batches {
                self.send_batch(from, to, messages);
            }
        }
    }

    fn knows(&self, from: NodeId, to: NodeId) -> bool {
        let process = self.slots[&from].process.as_ref();
        process.is_some_and(|process| process.sent.lock().unwrap().peers.contains_key(&to))
    }

    /// Proposals that certainly did not leave are handed back.
    fn not_proposed(&mut self, from: Run, to: NodeId, messages: Vec<Message>) {
        for message in messages {
            if message.get_msg_type() == MessageType::MsgPropose {
                let entries = message.entries.into_iter();
                let requests = entries.map(|entry| (entry.context, entry.data)).collect();
                self.report(from, 1, PeerReport::NotProposed { to, requests });
            }
        }
    }

    fn send_batch(&mut self, from: Run, to: NodeId, messages: Vec<Message>) {
        if !self.knows(from.0, to) {
            return self.not_proposed(from, to, messages);
        }
        let is_there = self.slots.get(&to).is_some_and(|slot| slot.process.is_some());
        if !is_there || (self.is_cut(from.0, to) && self.chance(300)) {
            // The connection is refused.
            self.not_proposed(from, to, messages);
            let after = 1 + self.random.below(TICK);
            return self.report(from, after, PeerReport::Unreachable(to));
        }
        if self.is_cut(from.0, to) || self.chance(self.settings.lost) {
            let patience = self.patience();
            return self.report(from, patience, PeerReport::Unreachable(to));
        }
        let numbers_at_arrival = self.settings.numbers_at_arrival;
        let process = self.slot(from.0).process.as_mut().expect("it runs");
        let number = (!numbers_at_arrival).then(|| process.next_number());
        let (header, boot) = (process.header(to), process.boot);
        let batch = Batch { from, header, boot, number, messages };
        if self.chance(self.settings.misdirected) {
            // Another member got its address.
            let ids: Vec<NodeId> = self.slots.keys().copied().collect();
            let elsewhere = self.pick(&ids).filter(|id| *id != to).unwrap_or(from.0);
            let delay = self.delay(from.0, elsewhere);
            self.schedule(delay, Event::Arrival(elsewhere, Packet::Batch(batch.clone())));
        }
        let delay = self.delay(from.0, to);
        self.schedule(delay, Event::Arrival(to, Packet::Batch(batch)));
    }

    /// What a receiver's gate is shown: the header, or what a mutant makes of it.
    fn shown(&self, to: NodeId, mut header: PeerHeader) -> PeerHeader {
        let slot = self.slots.get(&to);
        let Some(process) = slot.and_then(|slot| slot.process.as_ref()) else { return header };
        let gate = process.gate.read().unwrap();
        let recorded = gate.incarnations.get(&header.from).copied();
        if matches!(self.seam, Some(Seam::GateOff | Seam::IncarnationsIgnored)) {
            header.incarnation = recorded.unwrap_or(header.incarnation);
        }
        if self.seam == Some(Seam::GateOff) {
            header.cluster_id = gate.cluster_id;
            header.to = gate.id;
        }
        header
    }

    fn arrive(&mut self, to: NodeId, packet: Packet) {
        match packet {
            Packet::Report { run, report } => {
                self.note(|| format!("report to {to}, run {run}: {report:?}"));
                if self.runs((to, run)) {
                    if let PeerReport::SnapshotStatus { to: receiver, .. } = &report {
                        let receiver = *receiver;
                        self.slot(to).sending_to.remove(&receiver);
                    }
                    self.give(to, Input::Report(report));
                }
            }
            Packet::ChangeAnswer { waiter, answer } => waiter.answer(answer),
            Packet::Batch(batch) => self.arrive_batch(to, batch),
            Packet::Snapshot(transfer) => self.receive_snapshot(to, transfer),
            Packet::Greeting { from, header, url, greeting } => {
                let (answer_tx, answer) = oneshot::channel();
                if !self.is_reachable(from.0, to) {
                    let why = "unreachable".into();
                    return self.report(from, 1, PeerReport::NotGreeted { url, why });
                }
                let header = self.shown(to, header);
                let body = InboundBody::Greeting { greeting, answer: answer_tx };
                self.slot(to).asked.push(Asked::Greeting { from, url, answer });
                self.give(to, Input::Inbound(Inbound::new(header, body)));
            }
            Packet::Change { from, header, change, waiter: asker } => {
                if !self.is_reachable(from.0, to) {
                    return asker.answer(Err(RequestError::Unknown("lost".into())));
                }
                let header = self.shown(to, header);
                let (waiter, pending) = waiter();
                let body = InboundBody::ConfChange { change, waiter };
                self.slot(to).asked.push(Asked::Change { from, waiter: asker, pending });
                self.give(to, Input::Inbound(Inbound::new(header, body)));
            }
        }
    }

    fn is_reachable(&self, from: NodeId, to: NodeId) -> bool {
        let is_there = self.slots.get(&to).is_some_and(|slot| slot.process.is_some());
        is_there && !self.is_cut(from, to)
    }

    fn arrive_batch(&mut self, to: NodeId, mut batch: Batch) {
        let from = batch.from;
        if !self.is_reachable(from.0, to) {
            let patience = self.patience();
            return self.report(from, patience, PeerReport::Unreachable(to));
        }
        if batch.number.is_none() {
            // It leaves only now, so its sender still runs.
            if !self.runs(from) {
                return;
            }
            let process = self.slot(from.0).process.as_mut().expect("it runs");
            batch.number = Some(process.next_number());
        }
        if self.chance(self.settings.duplicated) {
            let again = Packet::Batch(batch.clone());
            let after = 1 + self.random.below(20 * TICK);
            self.schedule(after, Event::Arrival(to, again));
        }
        if self.ghosts.len() < GHOSTS_MAX {
            self.ghosts.push((to, batch.clone()));
        } else {
            let place = self.random.below(GHOSTS_MAX as u64) as usize;
            self.ghosts[place] = (to, batch.clone());
        }
        self.note(|| {
            let kinds: Vec<_> = batch.messages.iter().map(Message::get_msg_type).collect();
            format!("batch {:?} of {from:?} reaches {to}: {kinds:?}", batch.number)
        });
        let Batch { header, boot, number, messages, .. } = batch;
        let mut number = number.expect("it was just numbered");
        if self.seam == Some(Seam::BatchFilterOff) {
            self.sequence += 1;
            number = self.sequence;
        }
        let header = self.shown(to, header);
        let (answer_tx, answer) = oneshot::channel();
        let body = InboundBody::Messages { boot, number, messages, answer: Some(answer_tx) };
        self.slot(to).asked.push(Asked::Batch { from, answer });
        self.give(to, Input::Inbound(Inbound::new(header, body)));
    }

    fn send_snapshot(&mut self, from: Run, message: Message, file: SnapshotFile) {
        let to = message.to;
        let metadata = message.get_snapshot().get_metadata();
        let (index, term) = (metadata.index, metadata.term);
        let is_new = self.knows(from.0, to) && self.slot(from.0).sending_to.insert(to);
        let process = self.slot(from.0).process.as_mut().expect("it runs");
        let number = process.next_number();
        let (header, boot) = (process.header(to), process.boot);
        let opened = process.snapshotter.open_raw(index, term);
        let mut bytes = Vec::new();
        let is_read = opened.is_ok_and(|(_, mut file)| file.read_to_end(&mut bytes).is_ok());
        if !is_new || !is_read || self.chance(self.settings.lost) {
            let patience = self.patience();
            let arrived = false;
            return self.report(from, patience, PeerReport::SnapshotStatus { to, index, arrived });
        }
        let transfer = SnapshotTransfer { from, header, boot, number, message, file, bytes };
        let delay = self.delay(from.0, to);
        self.schedule(delay, Event::Arrival(to, Packet::Snapshot(Box::new(transfer))));
    }

    fn snapshot_failed(&mut self, to: NodeId, transfer: &SnapshotTransfer) {
        let index = transfer.message.get_snapshot().get_metadata().index;
        let report = PeerReport::SnapshotStatus { to, index, arrived: false };
        let patience = self.patience();
        self.report(transfer.from, patience, report);
    }

    fn receive_snapshot(&mut self, to: NodeId, mut transfer: Box<SnapshotTransfer>) {
        let from = transfer.from;
        if !self.is_reachable(from.0, to) {
            return self.snapshot_failed(to, &transfer);
        }
        transfer.header = self.shown(to, transfer.header.clone());
        let process = self.slot(to).process.as_ref().expect("it runs");
        let verdict = process.gate.read().unwrap().admit(&transfer.header);
        if let Err(refusal) = verdict {
            let header = process.header(from.0);
            let delay = self.delay(to, from.0);
            self.report(from, delay, PeerReport::Refused { header, refusal });
            return self.snapshot_failed(to, &transfer);
        }
        let metadata = transfer.message.get_snapshot().get_metadata();
        let (index, term) = (metadata.index, metadata.term);
        let half = transfer.bytes.len() / 2;
        let receive = || {
            let mut receiver = process.snapshotter.receive(index, term, transfer.file)?;
            receiver.write(&transfer.bytes[..half])?;
            Ok(receiver)
        };
        match receive() {
            Ok(receiver) => {
                self.sequence += 1;
                let number = self.sequence;
                let slot = self.slot(to);
                let run = slot.run;
                slot.receiving.insert(number, (transfer, receiver));
                let after = 1 + self.random.below(3 * TICK);
                self.schedule(after, Event::SnapshotRest((to, run), number));
            }
            Err(error) => {
                self.snapshot_failed(to, &transfer);
                self.give(to, Input::Report(PeerReport::DiskFailed(error)));
            }
        }
    }

    fn receive_rest(&mut self, (to, run): Run, number: u64) {
        if !self.runs((to, run)) {
            return;
        }
        let Some((transfer, mut receiver)) = self.slot(to).receiving.remove(&number) else { return };
        let half = transfer.bytes.len() / 2;
        let is_broken_off = !self.runs(transfer.from) || self.is_cut(transfer.from.0, to);
        if is_broken_off {
            return self.snapshot_failed(to, &transfer);
        }
        let finished = receiver.write(&transfer.bytes[half..]).and_then(|()| receiver.finish());
        match finished {
            Ok(Received::Kept) => {
                let SnapshotTransfer { from, header, boot, number, message, .. } = *transfer;
                let index = message.get_snapshot().get_metadata().index;
                let (answer_tx, answer) = oneshot::channel();
                let body = InboundBody::Snapshot { boot, number, message, answer: answer_tx };
                self.slot(to).asked.push(Asked::Snapshot { from, index, answer });
                self.give(to, Input::Inbound(Inbound::new(header, body)));
            }
            Ok(Received::Refused(why)) => panic!("the file arrived damaged: {why}"),
            Err(error) => {
                self.snapshot_failed(to, &transfer);
                self.give(to, Input::Report(PeerReport::DiskFailed(error)));
            }
        }
    }

    fn send_greeting(&mut self, from: Run, to_url: String, greeting: Greeting) {
        let header = self.slot(from.0).process.as_ref().expect("it runs").header(0);
        let listener = self.slots.values().find(|slot| {
            slot.config.url == to_url && slot.process.is_some()
        });
        let to = listener.map(|slot| slot.config.id);
        let Some(to) = to.filter(|to| !self.is_cut(from.0, *to)) else {
            let why = "unreachable".into();
            return self.report(from, 1, PeerReport::NotGreeted { url: to_url, why });
        };
        let delay = self.delay(from.0, to);
        let packet = Packet::Greeting { from, header, url: to_url, greeting };
        self.schedule(delay, Event::Arrival(to, packet));
    }

    fn send_change(&mut self, from: Run, to: NodeId, change: MemberChange, waiter: Waiter<()>) {
        if !waiter.begin() {
            return;
        }
        if !self.knows(from.0, to) {
            return waiter.answer(Err(RequestError::Unavailable("its URL is not known".into())));
        }
        let header = self.slot(from.0).process.as_ref().expect("it runs").header(to);
        let delay = self.delay(from.0, to);
        let packet = Packet::Change { from, header, change, waiter };
        self.schedule(delay, Event::Arrival(to, packet));
    }

    /// Sends back what a member's node has answered by now.
    fn take_answers(&mut self, id: NodeId) {
        let asked = std::mem::take(&mut self.slot(id).asked);
        for asked in asked {
            if let Some(asked) = self.take_answer(id, asked) {
                self.slot(id).asked.push(asked);
            }
        }
    }

    fn refuse(&mut self, id: NodeId, from: Run, refusal: Refusal) {
        let header = self.slot(id).process.as_ref().expect("it runs").header(from.0);
        let header = self.shown(from.0, header);
        let delay = self.delay(id, from.0);
        self.report(from, delay, PeerReport::Refused { header, refusal });
    }

    fn take_answer(&mut self, id: NodeId, asked: Asked) -> Option<Asked> {
        match asked {
            Asked::Batch { from, mut answer } => match answer.try_recv() {
                Err(oneshot::error::TryRecvError::Empty) => {
                    return Some(Asked::Batch { from, answer });
                }
                Ok(Ok(())) if !self.is_answer_lost(id, from.0) => {}
                Ok(Err(refusal)) if !self.is_answer_lost(id, from.0) => {
                    self.refuse(id, from, refusal);
                    let patience = self.patience();
                    self.report(from, patience, PeerReport::Unreachable(id));
                }
                _ => {
                    let patience = self.patience();
                    self.report(from, patience, PeerReport::Unreachable(id));
                }
            },
            Asked::Snapshot { from, index, mut answer } => {
                let answered = answer.try_recv();
                if matches!(answered, Err(oneshot::error::TryRecvError::Empty)) {
                    return Some(Asked::Snapshot { from, index, answer });
                }
                let arrived = matches!(answered, Ok(Ok(()))) && !self.is_answer_lost(id, from.0);
                let delay = self.delay(id, from.0);
                self.report(from, delay, PeerReport::SnapshotStatus { to: id, index, arrived });
            }
            Asked::Greeting { from, url, mut answer } => match answer.try_recv() {
                Err(oneshot::error::TryRecvError::Empty) => {
                    return Some(Asked::Greeting { from, url, answer });
                }
                Ok(Ok(answer)) if !self.is_answer_lost(id, from.0) => {
                    let header = self.slot(id).process.as_ref().expect("it runs").header(from.0);
                    let header = self.shown(from.0, header);
                    let delay = self.delay(id, from.0);
                    self.report(from, delay, PeerReport::Greeted { url, header, answer });
                }
                Ok(Err(refusal))
                    if !matches!(refusal, Refusal::Mismatch(_))
                        && !self.is_answer_lost(id, from.0) =>
                {
                    self.refuse(id, from, refusal);
                }
                _ => {
                    let why = "no answer".into();
                    self.report(from, 1, PeerReport::NotGreeted { url, why });
                }
            },
            Asked::Change { from, waiter, mut pending } => match pending.try_take() {
                None => return Some(Asked::Change { from, waiter, pending }),
                Some(answer) => {
                    let is_lost = self.is_answer_lost(id, from.0);
                    let answer =
                        if is_lost { Err(RequestError::Unknown("lost".into())) } else { answer };
                    let delay = self.delay(id, from.0);
                    let packet = Packet::ChangeAnswer { waiter, answer };
                    self.schedule(delay, Event::Arrival(from.0, packet));
                }
            },
        }
        None
    }

    fn is_answer_lost(&mut self, from: NodeId, to: NodeId) -> bool {
        self.is_cut(from, to) || self.chance(self.settings.lost_answers)
    }

    /// The member that was asked has died.
    fn connection_lost(&mut self, id: NodeId, asked: Asked) {
        match asked {
            Asked::Batch { from, .. } => self.report(from, 1, PeerReport::Unreachable(id)),
            Asked::Snapshot { from, index, .. } => {
                self.report(from, 1, PeerReport::SnapshotStatus { to: id, index, arrived: false });
            }
            Asked::Greeting { from, url, .. } => {
                self.report(from, 1, PeerReport::NotGreeted { url, why: "lost".into() });
            }
            Asked::Change { waiter, .. } => {
                waiter.answer(Err(RequestError::Unknown("lost".into())));
            }
        }
    }

    // -----------------------------------------------------------------------------------------
    // Clients

    fn pause_client(&mut self, client: usize) {
        let after = self.random.below(self.settings.pause_ticks * TICK) + 1;
        self.schedule(after, Event::Client(client));
    }

    fn client(&mut self, client: usize) {
        if !self.faults_are_on {
            return;
        }
        let Some(id) = self.pick(&self.running()) else { return self.pause_client(client) };
        let key = self.random.below(self.settings.keys);
        let is_write = self.chance(self.settings.writes);
        self.request(client, id, key, is_write);
    }

    fn request(&mut self, client: usize, id: NodeId, key: u64, is_write: bool) {
        self.sequence += 1;
        let now = self.sequence;
        let slot = self.slots.get_mut(&id).expect("it runs");
        let at = (id, slot.run);
        if is_write {
            let is_early = self.seam == Some(Seam::AcknowledgedBeforePersisted);
            let ack = if is_early { Ack::Proposed } else { Ack::Committed };
            let proposal = self.clients.put(client, at, key, ack, now);
            self.give(id, Input::Propose(proposal));
        } else {
            let process = slot.process.as_ref().expect("it runs");
            self.clients.get(client, at, key, &process.store, now);
            self.wake(id);
        }
        let number = self.clients.last_number();
        self.note(|| format!("client {client}: request {number} to {id}, key{key}, write {is_write}"));
        let patience = self.settings.patience_ticks * TICK;
        self.schedule(patience, Event::Deadline(number));
    }

    fn answered(&mut self, client: usize, outcome: Outcome) -> Step {
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
                self.invariants.check_acknowledged(&data, acknowledged)
            }
            _ => Ok(()),
        }
    }

    // -----------------------------------------------------------------------------------------
    // The operator, and what goes wrong

    /// The status of the member that has applied most, running or not seen since.
    fn newest(&self) -> Option<Status> {
        let running = self.slots.values().filter_map(|slot| slot.process.as_ref());
        let newest = running.map(Process::status).max_by_key(|status| (status.applied, status.term));
        newest.map(|status| status.clone())
    }

    fn members(&self) -> BTreeMap<NodeId, String> {
        self.newest().map(|status| status.members.urls).unwrap_or_default()
    }

    fn ask(&mut self, change: MemberChange) {
        let Some(at) = self.pick(&self.running()) else { return };
        let run = self.slot(at).run;
        let (waiter, pending) = waiter();
        self.note(|| format!("operator asks {at}: {change:?}"));
        let request = ConfChangeRequest { change: change.clone(), forwarded: false, waiter };
        self.give(at, Input::ConfChange(request));
        self.operator = Some(Task { change, pending, at: (at, run), since: self.now });
    }

    fn operate(&mut self) {
        self.schedule(3 * TICK, Event::Operator);
        if let Some(mut task) = self.operator.take() {
            let answer = match task.pending.try_take() {
                None if self.runs(task.at) && self.now - task.since < 50 * TICK => {
                    self.operator = Some(task);
                    return;
                }
                None => Err(RequestError::Unknown("no answer".into())),
                Some(answer) => answer,
            };
            self.note(|| format!("operator: {:?}: {answer:?}", task.change));
            let is_unknown = matches!(answer, Err(RequestError::Unknown(_)));
            self.removal_is_in_doubt |=
                is_unknown && matches!(task.change, MemberChange::Remove { .. });
            if let MemberChange::Add { id, .. } = task.change
                && matches!(answer, Ok(()) | Err(RequestError::Unknown(_)))
            {
                // Where the outcome is not known, the new member waits to be counted as one.
                self.start_joiner(id);
            }
        }
        let wiped = self.slots.values().find(|slot| slot.is_wiped);
        let Some(wiped) = wiped.map(|slot| slot.config.id) else { return };
        let members = self.members();
        if members.contains_key(&wiped) {
            self.ask(MemberChange::Remove { id: wiped });
        } else if !members.is_empty() {
            let slot = self.slot(wiped);
            (slot.is_wiped, slot.is_gone) = (false, true);
            if slot.process.is_none() {
                self.add_member();
            }
        }
    }

    fn add_member(&mut self) {
        if self.next_id <= IDS_MAX {
            let id = self.next_id;
            self.next_id += 1;
            self.ask(MemberChange::Add { id, url: url(id) });
        }
    }

    fn start_joiner(&mut self, id: NodeId) {
        let others = self.slots.keys().filter(|other| !self.removed.contains(other));
        let urls: Vec<String> = others.map(|other| url(*other)).chain([url(id)]).collect();
        let config = self.config(id, &urls, true);
        self.add_slot(config);
        let after = self.random.below(5 * TICK);
        self.schedule(after, Event::Start(id));
    }

    fn fault(&mut self) -> Step {
        if !self.faults_are_on {
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

    /// Makes one thing go wrong; false if it could not be done now.
    fn inject(&mut self, kind: FaultKind, id: NodeId, running: &[NodeId]) -> Result<bool, Violation> {
        match kind {
            FaultKind::Kill => self.kill(id)?,
            FaultKind::KillAll => {
                for id in running {
                    self.kill(*id)?;
                }
            }
            FaultKind::CrashAtOperation | FaultKind::DiskError => {
                let fault = match (kind, self.random.below(2)) {
                    (FaultKind::CrashAtOperation, _) => Fault::Crash,
                    (_, 0) => Fault::Fails(std::io::ErrorKind::StorageFull),
                    _ => Fault::Fails(std::io::ErrorKind::Other),
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
                self.add_member();
            }
            FaultKind::Remove => {
                let members: Vec<NodeId> = self.members().into_keys().collect();
                let removed = self.pick(&members).filter(|_| members.len() > 1);
                if self.operator.is_some() || self.has_wiped() {
                    return Ok(false);
                }
                let Some(id) = removed else { return Ok(false) };
                self.ask(MemberChange::Remove { id });
            }
            FaultKind::Wipe => return self.wipe(id),
        }
        Ok(true)
    }

    fn has_wiped(&self) -> bool {
        self.slots.values().any(|slot| slot.is_wiped)
    }

    /// A member of another cluster takes this one's members for its own.
    fn foreigner(&mut self, to: NodeId) {
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
                data: super::harness::put("foreign", "value").into(),
                ..Default::default()
            };
            message.log_term = status.term;
            message.commit = status.applied + 1;
            message.entries = vec![entry].into();
        }
        let (incarnation, number) = (self.random.below(1 << 40) + 1, self.random.below(1 << 40));
        let header =
            PeerHeader { cluster_id: 0xf0e1, from, incarnation, url: url(from), to };
        let run = (from, u64::MAX);
        let batch =
            Batch { from: run, header, boot: incarnation, number: Some(number), messages: vec![message] };
        self.schedule(1, Event::Arrival(to, Packet::Batch(batch)));
    }

    /// A member loses its directory while all others are well: more than that is not promised.
    fn wipe(&mut self, id: NodeId) -> Result<bool, Violation> {
        let members = self.members();
        let all_know = members.keys().all(|other| {
            self.slots.get(other).and_then(|slot| slot.process.as_ref()).is_some_and(|process| {
                process.status().begun
                    && (other == &id
                        || process.gate.read().unwrap().incarnations.contains_key(&id))
            })
        });
        let is_member = members.contains_key(&id);
        let is_changing =
            self.has_wiped() || self.operator.is_some() || self.removal_is_in_doubt;
        if members.len() < 3 || !is_member || !all_know || is_changing {
            return Ok(false);
        }
        self.kill(id)?;
        let slot = self.slot(id);
        slot.disk = MemVfs::default();
        slot.is_wiped = true;
        self.invariants.forget(id);
        Ok(true)
    }

    // -----------------------------------------------------------------------------------------
    // The end

    /// Nothing goes wrong any more: the cluster converges and serves.
    fn recover(&mut self) -> Step {
        self.note(|| "faults end".into());
        self.faults_are_on = false;
        self.cut.clear();
        let settings = &mut self.settings;
        (settings.lost, settings.lost_answers, settings.duplicated) = (0, 0, 0);
        settings.misdirected = 0;
        settings.patience_ticks = 50;
        settings.delay = settings.delay.min(20);
        for slot in self.slots.values_mut() {
            slot.paused_until = 0;
            // What has happened on the disk already still has to be noticed.
            if !slot.disk.fault_happened() && slot.fault.take().is_some() {
                slot.disk.inject(u64::MAX / 2, Fault::Crash);
            }
        }
        for id in self.slots.keys().copied().collect::<Vec<_>>() {
            self.wake(id);
        }
        let deadline = self.now + RECOVERY_TICKS * TICK;
        let members = loop {
            if let Some(members) = self.converged() {
                break members;
            }
            if self.now > deadline {
                return Err(format!("no recovery in {RECOVERY_TICKS} ticks: {}", self.describe()));
            }
            self.step()?;
        };
        self.serve(&members)?;
        for id in members.iter().filter(|id| !self.removed.contains(id)).copied().collect::<Vec<_>>() {
            self.check_state(id)?;
        }
        Ok(())
    }

    /// The members, once all of them run, follow one leader and have applied the same.
    fn converged(&self) -> Option<Vec<NodeId>> {
        if self.operator.is_some() || self.has_wiped() {
            return None;
        }
        let newest = self.newest()?;
        let members: Vec<NodeId> = newest.members.urls.keys().copied().collect();
        let is_level = members.iter().all(|id| {
            let process = self.slots.get(id).and_then(|slot| slot.process.as_ref());
            process.is_some_and(|process| {
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

    fn describe(&self) -> String {
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
                    format!("{id}: {:?} matched {} next {} paused {}", peer.state, peer.matched, peer.next_idx, peer.paused)
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

    /// Each member takes a write, and then shows every key.
    fn serve(&mut self, members: &[NodeId]) -> Step {
        let requests = members.iter().flat_map(|id| {
            let gets = (0..self.settings.keys).map(move |key| (*id, key, false));
            std::iter::once((*id, 0, true)).chain(gets)
        });
        for (id, key, is_write) in requests.collect::<Vec<_>>() {
            let mut tries = 0..SERVE_TRIES;
            // A removal that was asked for before may be applied only now.
            while !self.removed.contains(&id) && !self.is_served(id, key, is_write)? {
                if tries.next().is_none() {
                    let what = if is_write { "write" } else { "read" };
                    return Err(format!("member {id} serves no {what}: {}", self.describe()));
                }
            }
        }
        // Everybody hears of the last write.
        let target = self.invariants.last_committed();
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
        Ok(())
    }

    fn is_served(&mut self, id: NodeId, key: u64, is_write: bool) -> Result<bool, Violation> {
        let count = |world: &Self| (world.clients.acknowledged(), world.clients.reads());
        let before = count(self);
        self.request(0, id, key, is_write);
        let number = self.clients.last_number();
        while self.clients.under_way.iter().any(|request| request.number == number) {
            self.step()?;
        }
        Ok(count(self) != before)
    }

    /// A member's state is what the log says, byte for byte.
    fn check_state(&mut self, id: NodeId) -> Step {
        let mut expected: BTreeMap<u64, (u64, u64, u64)> = BTreeMap::new();
        let process = self.slots.get_mut(&id).and_then(|slot| slot.process.as_mut());
        let process = process.expect("it runs");
        let applied = process.status().applied;
        let bytes = process.state_bytes(applied).map_err(|error| error.to_string())?;
        for (index, term, data_hash) in self.invariants.committed_up_to(applied) {
            if let Some((key, value)) = self.clients.writes.get(&data_hash) {
                expected.insert(*key, (*value, index, term));
            }
        }
        let found: BTreeMap<u64, (u64, u64, u64)> = super::harness::decode_state(&bytes)
            .into_iter()
            .map(|(key, (value, index, term))| {
                let key = key.trim_start_matches("key").parse().expect("keys are numbered");
                (key, (value.parse().expect("values are numbers"), index, term))
            })
            .collect();
        if found != expected {
            return Err(format!(
                "member {id} holds {found:?} at index {applied}, the log says {expected:?}"
            ));
        }
        Ok(())
    }
}

/// Inputs before ticks, as the thread of the binary takes them.
fn order_inputs(inputs: Vec<Input>) -> impl Iterator<Item = Input> {
    let (ticks, others): (Vec<_>, Vec<_>) =
        inputs.into_iter().partition(|input| matches!(input, Input::Tick));
    others.into_iter().chain(ticks)
}

/// Writes a traced run's log lines where its events go.
struct StandardError;

impl Drain for StandardError {
    type Ok = ();
    type Err = slog::Never;

    fn log(
        &self,
        record: &slog::Record<'_>,
        _: &slog::OwnedKVList,
    ) -> Result<Self::Ok, Self::Err> {
        if std::env::var_os("SIMULATION_TRACE").is_some() && record.level().is_at_least(slog::Level::Debug) {
            eprintln!("         {} {}", record.level(), record.msg());
        }
        Ok(())
    }
}
