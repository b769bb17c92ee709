//! Many small clusters under many faults, each on one thread under one seed.

#![allow(clippy::unwrap_used, missing_docs)]

mod clients;
#[path = "../core/harness.rs"]
#[allow(dead_code)]
mod harness;
mod invariants;
#[path = "../support/linearizability.rs"]
#[allow(dead_code)]
mod linearizability;
mod mutants;
mod process;
mod settings;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use mutants::Seam;
use settings::Settings;
use world::{Tally, World};

const STEPS: u64 = 2_000;

fn run(seed: u64, seam: Option<Seam>) -> Result<Tally, String> {
    let is_traced = std::env::var_os("SIMULATION_TRACE").is_some();
    let mut world = World::new(Settings::from_seed(seed, STEPS), seam, is_traced);
    match catch_unwind(AssertUnwindSafe(|| world.run())) {
        Ok(result) => result,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(format!("panicked: {}", text.unwrap_or_default()))
        }
    }
}

#[test]
fn seeds() {
    let range = std::env::var("SIMULATION_SEEDS").unwrap_or("0..1000".into());
    let (from, to) = range.split_once("..").unwrap();
    let (from, to): (u64, u64) = (from.parse().unwrap(), to.parse().unwrap());
    let next = AtomicU64::new(from);
    let failures = Mutex::new(Vec::new());
    let tally = Mutex::new(Tally::default());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= to {
                        return;
                    }
                    match run(seed, None) {
                        Ok(one) => tally.lock().unwrap().add(&one),
                        Err(why) => {
                            eprintln!("seed {seed}: {why}");
                            failures.lock().unwrap().push((seed, why));
                        }
                    }
                }
            });
        }
    });
    println!("{:#?}", tally.lock().unwrap());
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} seeds fail", failures.len());
}
