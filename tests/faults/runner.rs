//! The run of a test: members, rounds of load and faults, and the final checks.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::clients::{Clients, Load};
use crate::compare::compare;
use crate::history::{Clock, History, LAST_READER};
use crate::support::linearizability::{Action, Operation};
use crate::support::processes::{Client, Cluster, PATIENCE, Signal, eventually_some, get};
use crate::support::random::Random;

/// Election timeouts as short as a busy machine allows, for tests that do not measure time.
pub const FAST: [&str; 2] = crate::support::processes::FAST;
/// The shortest election timeout with [`FAST`]: ten ticks.
pub const FAST_ELECTION_TIMEOUT: Duration = Duration::from_millis(200);
/// Constant snapshots and compactions.
pub const SMALL: [&str; 4] = ["--snapshot-count", "200", "--snapshot-catch-up-entries", "50"];

/// The number of rounds: `FAULTS_ROUNDS`, or the test's own number.
pub fn rounds(default: usize) -> usize {
    from_environment("FAULTS_ROUNDS").map_or(default, |rounds| rounds as usize)
}

/// The seed: `FAULTS_SEED`, or 1.
pub fn seed() -> u64 {
    from_environment("FAULTS_SEED").unwrap_or(1)
}

fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Counters of a run. Prints itself when dropped, also if the test fails.
pub struct Tally {
    kind: String,
    pub injected: usize,
    acknowledged: usize,
    lost: usize,
    histories: usize,
    not_linearizable: usize,
}

impl Tally {
    pub fn new(kind: &str) -> Self {
        let kind = kind.to_owned();
        Self { kind, injected: 0, acknowledged: 0, lost: 0, histories: 0, not_linearizable: 0 }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, injected, acknowledged, lost, histories, not_linearizable } = self;
        write!(
            formatter,
            "FAULT {kind} | injected {injected} | acknowledged {acknowledged} | lost {lost} | histories {histories} | not linearizable {not_linearizable}"
        )
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        // With one test thread the line starts with the test's name.
        println!("\n{self}");
    }
}

/// Violations, one line each.
pub struct Verdict {
    pub lost: Vec<String>,
    pub not_linearizable: Vec<String>,
}

/// Members under faults.
pub struct Run {
    pub cluster: Cluster,
    pub random: Random,
    pub tally: Tally,
    clock: Clock,
    seed: u64,
    loads: usize,
}

impl Run {
    /// Starts members 1 to `size`. `kind` names the fault in the final line.
    pub fn start(kind: &str, size: u64, flags: &[&str]) -> Self {
        Self::with(kind, Cluster::start(size, flags))
    }

    /// A run of members that already run.
    pub fn with(kind: &str, cluster: Cluster) -> Self {
        let seed = seed();
        let (random, tally) = (Random::new(seed), Tally::new(kind));
        Self { cluster, random, tally, clock: Clock::start(), seed, loads: 0 }
    }

    /// Starts clients of all members, with their own keys.
    pub fn load(&mut self) -> Clients {
        self.load_with(Load::default())
    }

    pub fn load_with(&mut self, load: Load) -> Clients {
        self.loads += 1;
        let (name, addresses) = (format!("load-{}", self.loads), self.cluster.addresses());
        Clients::start(&name, &addresses, load, self.clock, &mut self.random)
    }

    /// Counts a fault.
    pub fn inject(&mut self) {
        self.tally.injected += 1;
    }

    /// Asserts that no member ended by itself.
    pub fn assert_alive(&mut self) {
        for id in self.cluster.ids() {
            let member = self.cluster.process(id);
            let ended = member.exited();
            assert!(ended.is_none(), "member {id} ended, {ended:?}:\n{}", member.stderr());
        }
    }

    /// The leader and a follower.
    pub fn leader_and_follower(&mut self) -> (u64, u64) {
        let (leader, _) = self.cluster.leader();
        (leader, self.other_than(leader))
    }

    pub fn other_than(&mut self, id: u64) -> u64 {
        let ids = self.cluster.ids().into_iter().filter(|other| *other != id);
        *self.random.choose(&ids.collect::<Vec<_>>())
    }

    /// Stops the clients and checks their history. No fault may be active, and all members must
    /// run.
    pub fn check(&mut self, clients: Clients) {
        let Verdict { lost, not_linearizable } = self.judge(clients);
        assert!(lost.is_empty(), "acknowledged writes are lost:\n{}", lost.join("\n"));
        assert!(not_linearizable.is_empty(), "not linearizable:\n{}", not_linearizable.join("\n"));
    }

    /// Like [`check`](Self::check), for a test that expects violations.
    pub fn judge(&mut self, clients: Clients) -> Verdict {
        self.assert_alive();
        let mut history = clients.stop();
        let lost = self.read_all(&mut history);
        history.save(&self.cluster.site.dir().join("history.jsonl"));
        let not_linearizable = history.not_linearizable();
        self.tally.acknowledged += history.acknowledged();
        self.tally.histories += history.keys().len();
        self.tally.lost += lost.len();
        self.tally.not_linearizable += not_linearizable.len();
        Verdict { lost, not_linearizable }
    }

    /// Reads each key at each member, linearizably and then from the member's own map, which is
    /// current after the first read. Returns the acknowledged writes that are lost.
    fn read_all(&mut self, history: &mut History) -> Vec<String> {
        let mut lost = Vec::new();
        for id in self.cluster.ids() {
            let address = self.cluster.address(id);
            let mut local = Client::new(address).reading_locally();
            for key in history.keys() {
                let text = |value: Option<Vec<u8>>| {
                    value.map(|bytes| String::from_utf8(bytes).expect("only text is written"))
                };
                let invoked = self.clock.now();
                let current = text(get(address, &key));
                let completed = Some(self.clock.now());
                let own = eventually_some(PATIENCE, "a local read is answered", || {
                    match local.get(&key).ok()? {
                        answer if answer.status == 200 => Some(Some(answer.body)),
                        answer if answer.status == 404 => Some(None),
                        _ => None,
                    }
                });
                for (how, value) in [("current", &current), ("local", &text(own))] {
                    for write in history.lost(&key, value.as_deref()) {
                        lost.push(format!(
                            "{key} is {value:?} at member {id} ({how} read), without {write:?}"
                        ));
                    }
                }
                let action = Action::Read(current);
                let operation = Operation { client: LAST_READER, action, invoked, completed };
                history.record(&key, operation);
            }
        }
        lost
    }

    /// Stops all members in order and compares their disks.
    pub fn finish(mut self) {
        self.assert_alive();
        let ids = self.cluster.ids();
        for id in &ids {
            self.cluster.process(*id).signal(Signal::SIGTERM);
        }
        for id in &ids {
            let status = self.cluster.process(*id).wait(PATIENCE);
            assert_eq!(status, 0, "member {id} ends in order");
        }
        compare(self.cluster.site.dir(), &ids);
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let thread = std::thread::current();
        // With one test thread this is the runner's thread, without a test's name.
        let test = thread.name().filter(|name| name.contains("::")).unwrap_or("THIS TEST");
        let rounds = std::env::var("FAULTS_ROUNDS");
        let rounds = rounds.map_or(String::new(), |rounds| format!("FAULTS_ROUNDS={rounds} "));
        eprintln!(
            "again: {rounds}FAULTS_SEED={} cargo test --test faults -- --include-ignored --nocapture --exact {test}",
            self.seed
        );
        eprintln!("history: {}/history.jsonl", self.cluster.site.dir().display());
    }
}

/// Sets the flag for other threads, also when a test fails.
pub struct SetWhenDropped<'a>(pub &'a AtomicBool);

impl Drop for SetWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
