//! The members, the network between them, and the faults: one thread, one seed.
//!
//! Every event is in one queue, ordered by time. All random numbers come from one generator, so the
//! same seed gives the same run.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use raft::StateRole;
use raft::eraftpb::{Message, MessageType};
use raftexample::channels::{
    ConfChangeRequest, Greeting, GreetingAnswer, MemberRequest, NodeId, PeerHeader, PeerReport,
    Pending, Refusal, Responder, SnapshotFile, responder,
};
use raftexample::error::{Error, RequestError};
use raftexample::membership::Members;
use raftexample::raft_node::{Input, NodeConfig, Status};
use raftexample::storage::Vfs;
use raftexample::storage::snapshotter::SnapshotReceiver;
use raftexample::storage::wal::Sizes;
use slog::Logger;
use tokio::sync::oneshot;

use super::clients::{Choice, Clients, Outcome, ack, draw_prefix};
use super::invariants::{End, Invariants, Violation};
use super::mutants::{Forgetful, Seam};
use super::process::{Followed, Outgoing, Process, UnwrittenSnapshot};
use super::settings::{FaultKind, Settings, TICK};
use super::watchers::Watcher;
use crate::support::config::{config, url};
use crate::support::logs;
use crate::support::memory::{Fault, LateWrites, MemVfs, Survives};
use crate::support::random::Random;
use crate::support::store::Write;

mod faults;
mod lives;
mod network;
mod processes;
mod recovery;
mod requests;

use lives::{Backup, Leftover, Life, Standing, id_of};

/// Batches kept to be delivered again.
const GHOSTS_MAX: usize = 32;
/// The largest id: the operator adds no members beyond it.
const IDS_MAX: NodeId = 14;
/// How long the cluster may take to recover after the last fault, in ticks.
const RECOVERY_TICKS: u64 = 2_000;

/// How often a request may fail then: the last fault may still have its effects.
const SERVE_TRIES: u32 = 5;

/// Counters of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub steps: u64,
    pub elections: u64,
    pub acknowledged: u64,
    pub reads: u64,
    pub committed: u64,
    pub restores: u64,
    /// Changes that watchers were told of, resets, and changes found at another member than before.
    pub watched: u64,
    pub resets: u64,
    pub resets_within: u64,
    pub resumed: u64,
    /// What clients were told.
    pub answers: BTreeMap<&'static str, u64>,
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
        self.watched += other.watched;
        self.resets += other.resets;
        self.resets_within += other.resets_within;
        self.resumed += other.resumed;
        for (kind, count) in &other.answers {
            *self.answers.entry(kind).or_default() += count;
        }
        for (kind, count) in &other.faults {
            *self.faults.entry(*kind).or_default() += count;
        }
    }
}

/// A run of a process: its slot, and a number that no other run has.
type Run = (NodeId, u64);

enum Event {
    Tick(Run),
    Turn(Run),
    Arrival(NodeId, Packet),
    /// The thread that writes a snapshot runs.
    WriteSnapshot(Run),
    /// The thread that writes frames runs.
    WriteFrame(Run),
    /// Commit notices were held back long enough.
    NoticesDue(Run),
    /// The second half of a snapshot arrives.
    SnapshotRest(Run, u64),
    Client(usize),
    Deadline(u64),
    Operator,
    Fault,
    Start(NodeId),
    /// A first member loses its directory, unless one has begun.
    WipeEarly(NodeId),
    /// A stray process ends.
    StrayEnds(NodeId),
    HealSome,
}

/// A batch of messages, as made by the sender's transport.
#[derive(Clone)]
struct Batch {
    from: Run,
    header: PeerHeader,
    boot: u64,
    /// `None` if the batch is numbered on arrival.
    number: Option<u64>,
    messages: Vec<Message>,
}

enum Packet {
    Batch(Batch),
    Snapshot(Box<SnapshotTransfer>),
    Greeting {
        from: Run,
        header: PeerHeader,
        url: String,
        greeting: Greeting,
    },
    Change {
        from: Run,
        header: PeerHeader,
        change: MemberRequest,
        responder: Responder<()>,
    },
    /// A report of the sender's transport to its node.
    Report {
        run: u64,
        report: PeerReport,
    },
    ChangeAnswer {
        responder: Responder<()>,
        answer: Result<(), RequestError>,
    },
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

impl SnapshotTransfer {
    /// The receiver and the index.
    fn names(&self) -> (NodeId, u64) {
        (self.message.to, self.message.get_snapshot().get_metadata().index)
    }
}

/// A request to a member that its node has not answered yet.
enum Asked {
    Batch { from: Run, to: NodeId, answer: oneshot::Receiver<Result<(), Refusal>> },
    Snapshot { from: Run, to: NodeId, index: u64, answer: oneshot::Receiver<Result<(), Refusal>> },
    Greeting { from: Run, url: String, answer: oneshot::Receiver<Result<GreetingAnswer, Refusal>> },
    Change { from: Run, responder: Responder<()>, pending: Pending<()> },
}

/// One member: its flags, its disk, and its process if it runs.
struct Slot {
    /// Its place in `World::slots`: the member id, or another number with the same `id_of`.
    key: NodeId,
    config: NodeConfig,
    /// The cluster that its directory belongs to: a place in `World::lives`.
    life: usize,
    standing: Standing,
    disk: MemVfs,
    process: Option<Process>,
    run: u64,
    inbox: Vec<Input>,
    turn_is_due: bool,
    paused_until: u64,
    tick: u64,
    end: End,
    /// The disk that its process sees, if a mutant replaces it.
    forgetful: Option<Forgetful>,
    /// The fault set for its disk.
    fault: Option<Fault>,
    /// It lost its directory under this id.
    is_wiped: bool,
    /// It lost its directory before it had a vote: it may come back, unless it gets the vote meanwhile.
    may_return: bool,
    /// It lost its directory before a member had begun: the others may begin without it, or nobody can.
    wiped_early: bool,
    /// Its directory became an earlier one.
    has_lost: bool,
    /// The index of a snapshot that was damaged at rest: it may not start any more.
    damaged: Option<u64>,
    /// An earlier state of its disk, with the last index and the members' URLs.
    earlier: Option<(MemVfs, u64, BTreeMap<NodeId, String>)>,
    /// It will not be started again, because it was removed or refused.
    is_gone: bool,
    asked: Vec<Asked>,
    receiving: BTreeMap<u64, (Box<SnapshotTransfer>, SnapshotReceiver)>,
    sending_to: BTreeSet<NodeId>,
}

/// The operator's pending request.
struct Task {
    change: MemberRequest,
    pending: Pending<()>,
    at: Run,
    since: u64,
}

pub struct World {
    pub settings: Settings,
    seam: Option<Seam>,
    random: Random,
    /// For what clients and watchers do. The faults do not depend on these numbers.
    choices: Random,
    now: u64,
    sequence: u64,
    events: BTreeMap<(u64, u64), Event>,
    slots: BTreeMap<NodeId, Slot>,
    /// Directions that are cut.
    cut: BTreeSet<(NodeId, NodeId)>,
    last_arrival: BTreeMap<(NodeId, NodeId), u64>,
    ghosts: Vec<(NodeId, Batch)>,
    /// The clusters of this run. The operator works on the last one.
    lives: Vec<Life>,
    /// Directories that the operator has forgotten.
    leftovers: Vec<Leftover>,
    /// The number of strays so far.
    strays: u64,
    backup: Option<Backup>,
    /// Ids whose removal was applied.
    removed: BTreeSet<NodeId>,
    operator: Option<Task>,
    /// True while the outcome of a removal is unknown.
    removal_is_in_doubt: bool,
    next_id: NodeId,
    faults_are_on: bool,
    /// A member that lost entries, and the leader that has to point it out to it: there are no faults
    /// until it did.
    losing: Option<(NodeId, NodeId)>,
    /// True once that leader changed first: nothing more is promised.
    is_void: bool,
    tally: Tally,
    /// The events, if traced.
    pub trace: Option<Vec<String>>,
    logger: Logger,
}

type Step = Result<(), Violation>;

impl World {
    pub fn new(settings: Settings, seam: Option<Seam>, is_traced: bool) -> Self {
        let logger = if is_traced { trace_logger() } else { logs::discard() };
        Self {
            seam,
            // Not the numbers that the settings were drawn from.
            random: Random::new(settings.seed.wrapping_add(0x5eed)),
            choices: Random::new(settings.seed.wrapping_add(0xc01c)),
            now: 0,
            sequence: 0,
            events: BTreeMap::new(),
            slots: BTreeMap::new(),
            cut: BTreeSet::new(),
            last_arrival: BTreeMap::new(),
            ghosts: Vec::new(),
            lives: Vec::new(),
            leftovers: Vec::new(),
            strays: 0,
            backup: None,
            removed: BTreeSet::new(),
            operator: None,
            removal_is_in_doubt: false,
            next_id: settings.first_members + 1,
            faults_are_on: true,
            losing: None,
            is_void: false,
            tally: Tally::default(),
            trace: is_traced.then(Vec::new),
            logger,
            settings,
        }
    }

    /// The whole run: with faults, then without, then the final checks.
    pub fn run(&mut self) -> Result<Tally, Violation> {
        self.begin()?;
        while self.tally.steps < self.settings.steps && !self.is_void {
            self.step()?;
        }
        if !self.is_void {
            self.recover()?;
        }
        if self.is_void {
            return Ok(self.tally.clone());
        }
        for life in &mut self.lives {
            life.clients.lose_all(self.sequence, &mut self.choices);
            let replay = life.replay(u64::MAX, self.settings.tokens_max);
            life.clients.check(&replay, &life.invariants)?;
            life.watchers.iter().try_for_each(|watcher| watcher.check(&replay))?;
            self.tally.elections += life.invariants.elections;
            self.tally.acknowledged += life.clients.acknowledged() as u64;
            self.tally.reads += life.clients.reads() as u64;
            self.tally.committed += life.invariants.last_committed();
            for (kind, count) in life.clients.kinds() {
                *self.tally.answers.entry(kind).or_default() += count;
            }
        }
        Ok(self.tally.clone())
    }

    fn begin(&mut self) -> Step {
        self.begin_life(Life::default());
        self.add_first_members();
        for client in 0..self.settings.clients {
            let after = self.random.below(20 * TICK);
            self.schedule(after, Event::Client(client));
        }
        if self.chance(self.settings.wiped_early) {
            let id = 1 + self.random.below(self.settings.first_members);
            let after = self.random.below(2 * self.settings.election_ticks as u64 * TICK);
            self.schedule(after, Event::WipeEarly(id));
        }
        self.schedule(30 * TICK, Event::Operator);
        self.schedule(20 * TICK, Event::Fault);
        Ok(())
    }

    fn node_config(&self, id: NodeId, urls: &[String], join: bool) -> NodeConfig {
        let election_ticks = self.settings.election_ticks;
        NodeConfig {
            cluster: urls.to_vec(),
            join,
            snapshot_count: self.settings.snapshot_count,
            snapshot_catch_up_entries: self.settings.snapshot_catch_up_entries,
            election_ticks,
            randomized_election_ticks: election_ticks..election_ticks + 1,
            heartbeat_ticks: self.settings.heartbeat_ticks.min(election_ticks - 1),
            wal_sizes: Sizes {
                segment_bytes: self.settings.segment_bytes,
                step_bytes: self.settings.segment_bytes / 4,
            },
            ..config(id, 0)
        }
    }

    fn add_first_members(&mut self) {
        let urls: Vec<String> = (1..=self.settings.first_members).map(url).collect();
        for id in 1..=self.settings.first_members {
            let config = self.node_config(id, &urls, false);
            self.add_slot(config);
            let after = self.random.below(5 * TICK);
            self.schedule(after, Event::Start(id));
        }
        self.next_id = self.settings.first_members + 1;
    }

    fn add_slot(&mut self, config: NodeConfig) {
        let slot = self.new_slot(config);
        self.slots.insert(slot.key, slot);
    }

    fn new_slot(&mut self, config: NodeConfig) -> Slot {
        let percent = self.settings.clock_percent;
        let tick = TICK - TICK * percent / 200 + self.random.below(TICK * percent / 100 + 1);
        Slot {
            key: config.id,
            config,
            life: self.lives.len() - 1,
            standing: Standing::Member,
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
            may_return: false,
            wiped_early: false,
            has_lost: false,
            damaged: None,
            earlier: None,
            is_gone: false,
            asked: Vec::new(),
            receiving: BTreeMap::new(),
            sending_to: BTreeSet::new(),
        }
    }

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
            Event::WriteFrame(run) => self.write_frame(run),
            Event::NoticesDue(run) => self.send_notices(run),
            Event::SnapshotRest(run, number) => self.receive_rest(run, number),
            Event::Client(client) => self.client(client),
            Event::Deadline(number) => {
                for life in 0..self.lives.len() {
                    let clients = &mut self.lives[life].clients;
                    let given_up = clients.give_up_number(number, self.sequence, &mut self.choices);
                    if let Some((client, outcome)) = given_up {
                        self.answered(life, client, outcome)?;
                    }
                }
            }
            Event::Operator => self.operate()?,
            Event::Fault => self.fault()?,
            Event::Start(id) => self.start(id)?,
            Event::WipeEarly(id) => self.wipe_early(id)?,
            Event::StrayEnds(id) => self.end_stray(id)?,
            Event::HealSome => {
                if let Some(link) = self.pick(&self.cut.iter().copied().collect::<Vec<_>>()) {
                    self.cut.remove(&link);
                }
            }
        }
        Ok(())
    }
}

/// Prints a traced run's log lines between its events.
fn trace_logger() -> Logger {
    logs::logger(|record| {
        if std::env::var_os("SIMULATION_TRACE").is_some()
            && record.level().is_at_least(slog::Level::Debug)
        {
            eprintln!("         {} {}", record.level(), record.msg());
        }
    })
}
