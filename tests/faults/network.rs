//! Networks that are cut in every shape, heal, lose packets and reset connections. Each member has
//! its own namespace; the clients reach all of them all the time.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::clients::Load;
use crate::namespaces::Network;
use crate::runner::{FAST, FAST_ELECTION_TIMEOUT, Run, SMALL, SetWhenDropped, rounds};
use crate::support::processes::{Client, Cluster, Place, Site, serves, skip};

/// Writes acknowledged between two faults.
const WRITES: usize = 20;
/// Many clients, because most of them wait for a member that is cut off.
const LOAD: Load = Load { clients: 24, keys: 5, pause: Duration::from_millis(10) };
/// By then a majority without a leader has elected one and acknowledged writes. Some elections fail
/// on a busy machine.
const RESUMED: Duration = FAST_ELECTION_TIMEOUT.saturating_mul(25);
/// By then all members serve again after healing. TCP alone would wait about as long as the network
/// was cut.
const CONVERGED: Duration = FAST_ELECTION_TIMEOUT.saturating_mul(25);
/// The same after a long cut, with the default ticks.
const CONVERGED_BY_DEFAULT: Duration = Duration::from_millis(600);
/// The largest rise of the terms while the network is cut: by the necessary elections, not by one
/// per election timeout of a member without a majority.
const TERMS_MAX: u64 = 3;

/// A run whose members have their own network.
struct Cabled {
    // Before the network: the processes end first.
    run: Run,
    network: Network,
    /// How soon all members serve again after healing.
    converged: Duration,
}

/// The members on each side of a cut.
struct Sides {
    /// Members that cannot commit.
    without_majority: Vec<u64>,
    /// Members that can all commit after electing a leader.
    with_majority: Vec<u64>,
}

impl Sides {
    /// Every member still hears a majority, or a member that does. Only members that hear the
    /// leader can commit; the clients find out which.
    const OVERLAPPING: Self = Self { without_majority: Vec::new(), with_majority: Vec::new() };
}

impl Cabled {
    fn start(kind: &str, size: u64) -> Option<Self> {
        Self::start_with(kind, size, &FAST, CONVERGED)
    }

    /// Members with these flags for their ticks.
    fn start_with(kind: &str, size: u64, ticks: &[&str], converged: Duration) -> Option<Self> {
        let network = Network::new(size)?;
        let places = (1..=size).map(|id| Place {
            url: format!("http://{}:9021", network.address(id)),
            client: SocketAddr::from((network.address(id), 9121)),
            launcher: network.launcher(id),
            flags: Vec::new(),
        });
        let flags = [ticks, &SMALL, &["--request-timeout", "1s"]].concat();
        let cluster = Cluster::start_at(Site::new(), places.collect(), &flags);
        Some(Self { run: Run::with(kind, cluster), network, converged })
    }

    /// Cuts the network with `cut` for the current leader, for at least `lasts`, under load.
    /// Asserts what holds meanwhile and after healing.
    fn cut(&mut self, shape: &str, lasts: Duration, cut: impl FnOnce(&Network, u64, u64) -> Sides) {
        let Self { run, network, converged: limit } = self;
        let clients = run.load_with(LOAD);
        clients.wait_for(WRITES);
        run.assert_alive();
        let (leader, follower) = run.leader_and_follower();
        let term_before = term(run);
        run.inject();
        let begun = Instant::now();
        let sides = cut(network, leader, follower);
        let is_over = AtomicBool::new(false);
        let resumed = thread::scope(|scope| {
            let _over = SetWhenDropped(&is_over);
            for id in &sides.without_majority {
                let (address, is_over) = (run.cluster.address(*id), &is_over);
                scope.spawn(move || serves_nobody(address, is_over));
            }
            sides.with_majority.iter().for_each(|id| serves(run.cluster.address(*id)));
            clients.wait_for(WRITES);
            let resumed = begun.elapsed();
            // The length of the cut is part of the fault.
            thread::sleep(lasts.saturating_sub(begun.elapsed()));
            resumed
        });
        let (lasted, healed) = (begun.elapsed(), Instant::now());
        network.heal();
        run.cluster.all_serve();
        let converged = healed.elapsed();
        let terms = term(run) - term_before;
        println!(
            "CUT {shape} for {lasted:.1?} | writes go on after {resumed:.1?} | all serve {converged:.1?} after healing | terms {terms}"
        );
        clients.wait_for(WRITES);
        run.check(clients);
        assert!(resumed < RESUMED, "{shape}: writes went on after {resumed:?}");
        assert!(converged < *limit, "{shape}: all served {converged:?} after healing");
        assert!(terms <= TERMS_MAX, "{shape}: {terms} terms");
    }

    fn finish(self) {
        self.run.finish();
    }
}

/// The newest term in the members' logs.
fn term(run: &mut Run) -> u64 {
    run.cluster.leader().1
}

/// Asserts that a member acknowledges nothing and answers no linearizable read until `is_over`.
fn serves_nobody(address: SocketAddr, is_over: &AtomicBool) {
    while !is_over.load(Ordering::Relaxed) {
        for method in ["PUT", "GET"] {
            let mut client = Client::new(address);
            client.timeout = FAST_ELECTION_TIMEOUT;
            let answer = client.request(method, "/cut-off", b"nobody hears it");
            // An answer after the end may owe to the end.
            if let (Ok(answer), false) = (answer, is_over.load(Ordering::Relaxed)) {
                let status = answer.status;
                assert!([503, 504].contains(&status), "{method} at {address}: {status}");
            }
        }
    }
}

/// Cuts `alone` off from all others, in the directions that `how` cuts.
fn alone(alone: u64, size: u64, mut how: impl FnMut(u64, u64)) -> Sides {
    let with_majority: Vec<u64> = (1..=size).filter(|id| *id != alone).collect();
    with_majority.iter().for_each(|other| how(alone, *other));
    Sides { without_majority: vec![alone], with_majority }
}

/// All cuts between three members, one after another.
fn cut_three(cabled: Option<Cabled>, rounds: usize, lasts: Duration) {
    let Some(mut cabled) = cabled else { return };
    for _ in 0..rounds {
        cabled.cut("the leader is alone", lasts, |network, leader, _| {
            alone(leader, 3, |one, other| network.cut(one, other))
        });
        cabled.cut("a follower is alone", lasts, |network, _, follower| {
            alone(follower, 3, |one, other| network.cut(one, other))
        });
        // The third member hears both.
        cabled.cut(
            "a follower does not hear the leader, nor it the follower",
            lasts,
            |network, leader, follower| {
                network.cut(leader, follower);
                Sides::OVERLAPPING
            },
        );
    }
    cabled.finish();
}

/// Cuts one direction.
fn cut_one_way(kind: &str, rounds: usize, lasts: Duration) {
    let Some(mut cabled) = Cabled::start(kind, 3) else { return };
    for _ in 0..rounds {
        cabled.cut("the leader is deaf", lasts, |network, leader, _| {
            alone(leader, 3, |deaf, other| network.cut_one_way(other, deaf))
        });
        cabled.cut("the leader is mute", lasts, |network, leader, _| {
            alone(leader, 3, |mute, other| network.cut_one_way(mute, other))
        });
        cabled.cut("a follower is deaf", lasts, |network, _, follower| {
            alone(follower, 3, |deaf, other| network.cut_one_way(other, deaf))
        });
        cabled.cut("a follower is mute", lasts, |network, _, follower| {
            alone(follower, 3, |mute, other| network.cut_one_way(mute, other))
        });
    }
    cabled.finish();
}

/// All cuts between five members.
fn cut_five(kind: &str, rounds: usize, lasts: Duration) {
    let Some(mut cabled) = Cabled::start(kind, 5) else { return };
    for _ in 0..rounds {
        cabled.cut(
            "two of five, the leader among them, are alone",
            lasts,
            |network, leader, follower| {
                let without_majority = vec![leader, follower];
                let with_majority: Vec<u64> =
                    (1..=5).filter(|id| !without_majority.contains(id)).collect();
                network.split(&without_majority, &with_majority);
                Sides { without_majority, with_majority }
            },
        );
        cabled.cut(
            "two of five follow no leader that they hear",
            lasts,
            |network, leader, follower| {
                // One side has the leader and one more, the other has two; the fifth hears both.
                let others: Vec<u64> =
                    (1..=5).filter(|id| ![leader, follower].contains(id)).collect();
                network.split(&[leader, follower], &others[..2]);
                Sides::OVERLAPPING
            },
        );
        cabled.cut("five in a ring hear their two neighbours", lasts, |network, _, _| {
            let next = |id: u64| id % 5 + 1;
            for id in 1..=5 {
                network.cut(id, next(next(id)));
            }
            Sides::OVERLAPPING
        });
    }
    cabled.finish();
}

/// Resets connections at random all the time, in the middle of their data.
fn reset(kind: &str, pulses: usize) {
    let Some(Cabled { mut run, network, .. }) = Cabled::start(kind, 3) else { return };
    let clients = run.load_with(LOAD);
    let pulse = Duration::from_millis(20);
    for _ in 0..pulses {
        let from = run.random.within(1..4);
        let to = (from + run.random.below(2)) % 3 + 1;
        run.inject();
        network.reset(from, to);
        // The lengths of the resets and of the pauses are part of the fault.
        thread::sleep(run.random.time(pulse));
        network.heal();
        thread::sleep(run.random.time(pulse));
    }
    let healed = Instant::now();
    run.cluster.all_serve();
    let converged = healed.elapsed();
    println!("RESETS {pulses} | all serve {converged:.1?} after the last");
    clients.wait_for(WRITES);
    run.check(clients);
    assert!(converged < CONVERGED, "all served {converged:?} after the last reset");
    run.finish();
}

/// Loses packets at random: a percentage in each round.
fn lossy(kind: &str, percents: &[u32], lasts: Duration) {
    let Some(Cabled { mut run, network, .. }) = Cabled::start(kind, 3) else { return };
    for percent in percents {
        let clients = run.load_with(LOAD);
        clients.wait_for(WRITES);
        run.inject();
        let (before, acknowledged, begun) =
            (term(&mut run), clients.acknowledged(), Instant::now());
        (1..=3).for_each(|id| network.lose(id, *percent));
        // The length of the loss is part of the fault.
        thread::sleep(lasts);
        let acknowledged = clients.acknowledged() - acknowledged;
        network.heal();
        let healed = Instant::now();
        run.cluster.all_serve();
        println!(
            "LOSS of {percent} % for {:.1?} | acknowledged meanwhile {acknowledged} | all serve {:.1?} after healing | terms {}",
            healed - begun,
            healed.elapsed(),
            term(&mut run) - before
        );
        assert!(healed.elapsed() < CONVERGED);
        clients.wait_for(WRITES);
        run.check(clients);
    }
    run.finish();
}

/// Slows one member after another: little bandwidth, long delay.
fn slow(kind: &str, lasts: Duration) {
    let Some(Cabled { mut run, network, .. }) = Cabled::start(kind, 3) else { return };
    for id in 1..=3 {
        let clients = run.load_with(LOAD);
        clients.wait_for(WRITES);
        run.inject();
        if !network.slow_down(id, 256, 200) {
            return skip("no link is slow: the kernel has no tbf queue, or there is no tc");
        }
        // The time of the slow link is part of the fault.
        thread::sleep(lasts);
        network.speed_up(id);
        clients.wait_for(WRITES);
        run.check(clients);
    }
    run.finish();
}

/// More than four election timeouts.
const SHORT: Duration = Duration::from_secs(1);
/// So long that a connection that waits for TCP's retransmission waits long, too.
const LONG: Duration = Duration::from_secs(20);

#[test]
fn a_majority_goes_on_and_members_cut_off_serve_nobody() {
    cut_three(Cabled::start("network cut, three members", 3), 1, SHORT);
}

#[test]
fn one_way_members_lose_nothing_and_raise_no_terms() {
    cut_one_way("network cut one way", 1, SHORT);
}

#[test]
fn five_members_in_halves_bridges_and_rings_lose_nothing() {
    cut_five("network cut, five members", 1, SHORT);
}

#[test]
fn resets_of_connections_lose_nothing() {
    reset("connection reset", 40);
}

#[test]
fn lost_packets_lose_nothing() {
    lossy("packets lost", &[10], SHORT);
}

#[test]
#[ignore = "long: 15 cuts of 20 s"]
fn healing_after_long_cuts_does_not_wait_for_tcp() {
    let kind = "network cut for 20 s, default ticks";
    cut_three(Cabled::start_with(kind, 3, &[], CONVERGED_BY_DEFAULT), rounds(5), LONG);
}

#[test]
#[ignore = "long: 200 cuts"]
fn two_hundred_cuts_in_every_shape_lose_nothing() {
    cut_three(Cabled::start("network cut, three members", 3), rounds(20), SHORT);
    cut_one_way("network cut one way", rounds(20), SHORT);
    cut_five("network cut, five members", rounds(20), SHORT);
}

#[test]
#[ignore = "long: 2,000 pulses of resets"]
fn two_thousand_resets_of_connections_lose_nothing() {
    reset("connection reset", rounds(2000));
}

#[test]
#[ignore = "long: loss of up to half of all packets, and slow links"]
fn many_lost_packets_and_slow_links_lose_nothing() {
    for _ in 0..rounds(5) {
        lossy("packets lost", &[1, 10, 50], 10 * SHORT);
        slow("slow link", 10 * SHORT);
    }
}
