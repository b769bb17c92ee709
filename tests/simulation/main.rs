//! Small clusters under many faults, each on one thread under one seed.
//!
//! The members run the binary's raft loop, write-ahead log, snapshots, membership, greetings and store.
//! Everything that they cannot rely on is simulated: a network that delays, drops, reorders,
//! duplicates, misdirects and partitions; a disk that keeps synced data and loses other data, and that
//! fails; clocks of different speed; processes that are killed, paused and stopped; members that are
//! added, moved, removed, and lose their directory, before and after all have begun; snapshots that are
//! damaged at rest; directories that become older; clusters that are begun again, or restored once or
//! twice from a backup, while directories of earlier lives and copies of moved members are started.
//! [`settings`] lists what a seed decides, [`invariants`]
//! what must hold after every step. [`world`] is the rest, and [`mutants`] are deliberately wrong programs.
//!
//! [`clients`] read, list, delete, and write with conditions, transactions and retry tokens, of which the
//! members remember few. [`watchers`] follow changes from member to member. At the end of a run, a model
//! carries out each cluster's log. Every answer of every member must be the model's, and what clients and
//! watchers saw must fit it: see `tests/support/store.rs`.
//!
//! # What is not promised
//! The faults keep to README's list, in its words:
//!
//! | not promised | kept to by |
//! |---|---|
//! | losing the disks of a majority, or the disks of one member after another before each was replaced | `can_spare` in `world/faults.rs` |
//! | a leader that changes before its first heartbeat cannot tell a member that it lost entries | `losing` in `world.rs`: the run ends there |
//! | nor can anyone if all other members moved since the copy | `lose_tail` in `world/faults.rs` |
//! | running a copy of a directory while its member moves | `start_stray` in `world/lives.rs`: once all know of the move |
//! | starting a member with `--join` while a member of an earlier life answers | `start` in `world/processes.rs` |
//! | the store of a single member that lost its directory | `wipe` in `world/faults.rs` |
//! | detecting zeros over the end of the log | no zeros are written |
//!
//! ```sh
//! cargo test --test simulation                                            # 1,000 seeds, and the mutants
//! SIMULATION_SEEDS=20000..40000 cargo test --test simulation no_fault     # another range
//! SIMULATION_SEEDS=17..18 SIMULATION_TRACE=1 cargo test --test simulation no_fault -- --nocapture
//! cargo test --test simulation -- --ignored                               # the patched programs
//! SIMULATION_MUTANT=quarantine cargo test --test simulation -- --ignored  # those with this in their name
//! ```

#![allow(clippy::unwrap_used, missing_docs)]

mod clients;
mod invariants;
mod mutants;
mod patches;
mod process;
mod settings;
#[path = "../support/mod.rs"]
mod support;
mod translation;
mod watchers;
mod world;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use mutants::Seam;
use patches::PATCHES;
use settings::Settings;
use world::{Tally, World};

/// Events with faults in one run. As many follow without faults, until the cluster has recovered.
const STEPS: u64 = 2_000;
const SEEDS: Range<u64> = 0..1_000;
/// The kinds of answers that clients get: see `Clients::kinds`.
const ANSWERS: usize = 10;

fn run(world: &mut World) -> Result<Tally, String> {
    match catch_unwind(AssertUnwindSafe(|| world.run())) {
        Ok(result) => result,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(format!("it panics: {}", text.unwrap_or_default()))
        }
    }
}

fn steps() -> u64 {
    std::env::var("SIMULATION_STEPS").map_or(STEPS, |steps| steps.parse().unwrap())
}

fn world(seed: u64, seam: Option<Seam>, is_traced: bool) -> World {
    World::new(Settings::from_seed(seed, steps()), seam, is_traced)
}

/// Prints the settings of a seed and the command that repeats it.
fn report(seed: u64, why: &str) {
    let (settings, end) = (Settings::from_seed(seed, steps()), seed + 1);
    eprintln!("seed {seed}: {why}\n{settings:?}");
    eprintln!(
        "SIMULATION_STEPS={} SIMULATION_SEEDS={seed}..{end} SIMULATION_TRACE=1 cargo test --test simulation no_fault -- --nocapture",
        settings.steps
    );
}

/// Runs the seeds on all cores, prints each failure, and returns the tally.
fn run_all(seeds: Range<u64>) -> (Tally, u64) {
    let is_traced = std::env::var_os("SIMULATION_TRACE").is_some();
    let next = AtomicU64::new(seeds.start);
    let failed = AtomicU64::new(0);
    let tally = Mutex::new(Tally::default());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let mut world = world(seed, None, is_traced);
                    match run(&mut world) {
                        Ok(one) => tally.lock().unwrap().add(&one),
                        Err(why) => {
                            failed.fetch_add(1, Ordering::Relaxed);
                            report(seed, &why);
                        }
                    }
                }
            });
        }
    });
    (tally.into_inner().unwrap(), failed.into_inner())
}

fn chosen_seeds() -> Range<u64> {
    let Ok(range) = std::env::var("SIMULATION_SEEDS") else { return SEEDS };
    let (start, end) = range.split_once("..").expect("SIMULATION_SEEDS is START..END");
    start.parse().unwrap()..end.parse().unwrap()
}

#[test]
fn no_fault_loses_bends_or_invents_a_write() {
    let begun = Instant::now();
    let seeds = chosen_seeds();
    let (tally, failed) = run_all(seeds.clone());
    println!("seeds {seeds:?} in {:.1?}: {failed} failed\n{tally:#?}", begun.elapsed());
    assert_eq!(failed, 0, "of the seeds {seeds:?} so many failed");
    if seeds == SEEDS {
        // The faults do happen, and the cluster works meanwhile.
        assert!(tally.steps > 2_000 * 1_000, "{tally:?}");
        assert!(tally.faults.values().all(|count| *count > 20), "{:?}", tally.faults);
        let works = tally.acknowledged > 20_000 && tally.reads > 20_000 && tally.restores > 500;
        assert!(works && tally.elections > 2_000, "{tally:?}");
        let watches = tally.watched > 20_000 && tally.resets > 300 && tally.resumed > 3_000;
        assert!(watches, "{tally:?}");
        assert!(tally.answers.len() == ANSWERS && tally.answers.values().all(|count| *count > 50));
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in 0..20 {
        let traces = [0, 1].map(|_| {
            let mut world = world(seed, None, true);
            let result = run(&mut world);
            (result, world.trace.take().unwrap())
        });
        assert!(traces[0].1.len() > 1_000, "it says what happens");
        let [(first, lines), (second, again)] = &traces;
        assert_eq!(first, second, "seed {seed}");
        let differs = lines.iter().zip(again).find(|(line, again)| line != again);
        assert_eq!(differs, None, "seed {seed}");
    }
}

#[test]
fn every_mutant_at_a_seam_is_caught() {
    for (seam, seeds) in Seam::ALL {
        let failing = (0..seeds)
            .find_map(|seed| Some((seed, run(&mut world(seed, Some(seam), false)).err()?)));
        let Some((seed, why)) = failing else { panic!("{seam:?}: not caught by {seeds} seeds") };
        println!("MUTANT {seam:?} | seed {seed} | {why:.150}");
    }
}

#[test]
fn every_patch_still_applies() {
    for patch in PATCHES {
        patch.check().unwrap_or_else(|why| panic!("{}: {why}", patch.name));
    }
}

#[test]
#[ignore = "builds the package once for each patch"]
fn every_patched_program_is_caught() {
    let only = std::env::var("SIMULATION_MUTANT").unwrap_or_default();
    let mut missed = Vec::new();
    for patch in PATCHES.into_iter().filter(|patch| patch.name.contains(&only)) {
        match patch.first_failure() {
            Ok(failure) => println!("MUTANT {} | {failure}", patch.name),
            Err(why) => missed.push(why),
        }
    }
    assert!(missed.is_empty(), "{missed:#?}");
}
