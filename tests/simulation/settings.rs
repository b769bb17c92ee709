//! Everything that a run's seed decides in advance.

use raftexample::channels::NodeId;

use crate::support::random::Random;

/// The length of a tick in the simulation's unit of time.
pub const TICK: u64 = 100;

/// The meaning of a seed; printed when a run fails.
#[derive(Clone, Debug)]
pub struct Settings {
    pub seed: u64,
    /// Events with faults. Then the faults end, and the cluster has to recover.
    pub steps: u64,
    pub first_members: NodeId,
    pub clients: usize,
    pub keys: u64,
    /// Per thousand requests.
    pub writes: u64,
    /// A client's longest pause between two requests, in ticks.
    pub pause_ticks: u64,
    /// A client's timeout, in ticks.
    pub patience_ticks: u64,
    /// The number of retry tokens that a member remembers.
    pub tokens_max: usize,
    pub watchers: u64,
    /// Per thousand frames: the next one is written while the node goes on.
    pub late_frames: u64,
    /// True if leaders hold commit notices back.
    pub holds_notices: bool,
    pub snapshot_count: u64,
    pub snapshot_catch_up_entries: u64,
    pub segment_bytes: u64,
    pub election_ticks: usize,
    pub heartbeat_ticks: usize,
    /// The largest deviation of a member's clock, in percent of a tick.
    pub clock_percent: u64,
    /// The longest delay of a message.
    pub delay: u64,
    /// True if messages between two members keep their order.
    pub keeps_order: bool,
    /// True if batches are numbered on arrival, so that reordered ones pass the batch filter and
    /// raft has to cope.
    pub numbers_at_arrival: bool,
    /// Per thousand batches.
    pub lost: u64,
    pub lost_answers: u64,
    pub duplicated: u64,
    pub misdirected: u64,
    /// Per thousand runs: a member loses its directory before all have begun.
    pub wiped_early: u64,
    /// The average number of ticks between two faults.
    pub fault_ticks: u64,
    /// The relative frequency of each kind of fault.
    pub fault_weights: Vec<(FaultKind, u64)>,
}

/// Faults other than those of single messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    /// kill -9 or a power cut between two turns.
    Kill,
    /// All members at once.
    KillAll,
    /// kill -9 or a power cut at some disk operation.
    CrashAtOperation,
    /// A write or sync fails.
    DiskError,
    /// SIGTERM.
    Stop,
    /// The process is paused and continues.
    Pause,
    /// Some members reach only each other.
    Partition,
    /// One direction between two members is cut.
    CutOneWay,
    /// The leader reaches no member.
    IsolateLeader,
    /// All connections work again.
    Heal,
    /// A batch delivered long ago arrives again.
    Ghost,
    /// A member of another cluster sends messages.
    Foreigner,
    /// A member is added.
    Add,
    /// A member is removed.
    Remove,
    /// An operator transfers the leadership.
    Lead,
    /// A member moves to another URL.
    Move,
    /// A member loses its directory and is replaced.
    Wipe,
    /// Two members do not reach each other.
    CutLink,
    /// A snapshot is damaged at rest.
    Damage,
    /// A member's directory becomes what it was some time ago.
    LostTail,
    /// The cluster is begun again, or restored from a backup. Its directories are left over.
    NewLife,
    /// A directory that was left over, or copied before a move, is started.
    Stray,
}

const KINDS: [(FaultKind, u64); 22] = [
    (FaultKind::Kill, 4),
    (FaultKind::KillAll, 2),
    (FaultKind::CrashAtOperation, 6),
    (FaultKind::DiskError, 3),
    (FaultKind::Stop, 2),
    (FaultKind::Pause, 3),
    (FaultKind::Partition, 3),
    (FaultKind::CutOneWay, 3),
    (FaultKind::IsolateLeader, 3),
    (FaultKind::Heal, 5),
    (FaultKind::Ghost, 3),
    (FaultKind::Foreigner, 2),
    (FaultKind::Add, 4),
    (FaultKind::Remove, 3),
    (FaultKind::Lead, 3),
    (FaultKind::Move, 3),
    (FaultKind::Wipe, 2),
    (FaultKind::CutLink, 3),
    (FaultKind::Damage, 3),
    (FaultKind::LostTail, 24),
    (FaultKind::NewLife, 3),
    (FaultKind::Stray, 8),
];

impl Settings {
    pub fn from_seed(seed: u64, steps: u64) -> Self {
        let mut random = Random::new(seed);
        let mut pick = |choices: &[u64]| choices[random.below(choices.len() as u64) as usize];
        let election_ticks = pick(&[3, 4, 5, 7, 10]);
        // Numbers of their own: the others stay what they were before these settings were added.
        let mut later = Random::new(seed.wrapping_add(0x70c5));
        let weights = KINDS.map(|(kind, most)| (kind, pick(&[0, 1, 1, 2]) * most));
        Self {
            seed,
            steps,
            first_members: pick(&[1, 2, 3, 3, 3, 3, 3, 4, 5]),
            clients: pick(&[2, 3, 4, 6, 8]) as usize,
            keys: pick(&[1, 2, 3, 5]),
            writes: pick(&[300, 500, 700]),
            pause_ticks: pick(&[1, 2, 5]),
            patience_ticks: pick(&[5, 20, 50]),
            tokens_max: later.within(3..9) as usize,
            watchers: later.within(1..4),
            late_frames: *later.choose(&[0, 300, 900, 1000]),
            holds_notices: *later.choose(&[false, true, true]),
            snapshot_count: pick(&[2, 4, 8, 16, 64]),
            snapshot_catch_up_entries: pick(&[0, 1, 3, 8]),
            segment_bytes: pick(&[512, 2048, 16384]),
            election_ticks: election_ticks as usize,
            heartbeat_ticks: pick(&[1, 1, 2]) as usize,
            clock_percent: pick(&[0, 10, 40]),
            delay: pick(&[5, 20, 60, 150]),
            keeps_order: pick(&[0, 1, 1]) == 1,
            numbers_at_arrival: pick(&[0, 1]) == 1,
            lost: pick(&[0, 0, 10, 50, 200]),
            lost_answers: pick(&[0, 10, 50]),
            duplicated: pick(&[0, 20, 100]),
            misdirected: pick(&[0, 0, 20]),
            wiped_early: pick(&[0, 0, 0, 500]),
            fault_ticks: pick(&[3, 6, 12, 25]),
            fault_weights: weights.to_vec(),
        }
    }
}
