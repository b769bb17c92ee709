//! Random histories, histories of a real register, and histories of a register with one fault.
//!
//! They are the same in each run. `PROPTEST_CASES` sets their number, and `PROPTEST_RNG_SEED`
//! selects others. A failure prints the seed and the smallest failing history.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt::Debug;
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngSeed, TestRunner};

use crate::support::linearizability::{Action, Operation, check, search};
use crate::{is_linearizable, read, unknown_write, write};

/// Runs the test on `cases` random values, the same in each run. Prints the smallest failure.
pub fn for_all<S: Strategy>(cases: u32, strategy: S, test: impl Fn(S::Value))
where
    S::Value: Debug,
{
    let mut config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = cases;
    }
    if let RngSeed::Random = config.rng_seed {
        config.rng_seed = RngSeed::Fixed(1);
    }
    let result = TestRunner::new(config.clone()).run(&strategy, |value| {
        test(value);
        Ok(())
    });
    if let Err(error) = result {
        panic!("PROPTEST_RNG_SEED={} {error}", config.rng_seed);
    }
}

/// Counts a test's verdicts: with nearly equal verdicts it would prove little.
#[derive(Default)]
pub struct Verdicts {
    linearizable: Cell<u32>,
    not: Cell<u32>,
}

impl Verdicts {
    pub fn count(&self, linearizable: bool) {
        let counter = if linearizable { &self.linearizable } else { &self.not };
        counter.set(counter.get() + 1);
    }

    pub fn assert_mixed(&self, what: &str) {
        let (linearizable, not) = (self.linearizable.get(), self.not.get());
        println!("{what}: {linearizable} linearizable, {not} not");
        let least = (linearizable + not) / 20;
        assert!(linearizable > least && not > least, "{what}: {linearizable} against {not}");
    }
}

/// Up to eight strongly overlapping operations, with reads of any value.
fn any_history() -> impl Strategy<Value = Vec<Operation<u32>>> {
    let operation = (0..12_u64, 0..7_u64, 0..9_u32, 0..5_u32);
    vec(operation, 0..9).prop_map(|operations| {
        let mut writes = 0;
        let make = |(invoked, duration, kind, value)| match kind {
            0..3 => {
                writes += 1;
                match kind {
                    0 => unknown_write(writes, invoked),
                    _ => write(writes, invoked, invoked + duration),
                }
            }
            _ => read((value > 0).then_some(value), invoked, invoked + duration),
        };
        operations.into_iter().map(make).collect()
    })
}

#[test]
fn three_checkers_agree_on_random_histories() {
    let verdicts = Verdicts::default();
    for_all(30_000, any_history(), |history| verdicts.count(is_linearizable(&history)));
    verdicts.assert_mixed("random histories");
}

/// The next step of a client of a real register.
#[derive(Clone, Debug)]
struct Step {
    client: u64,
    /// From the end of the client's last operation to the start of this one.
    pause: u64,
    /// From the start to the effect, and from there to the end.
    before: u64,
    after: u64,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Read,
    Write,
    /// Takes effect this much later than a known write would, or never.
    UnknownWrite(Option<u64>),
}

fn any_step(clients: u64) -> impl Strategy<Value = Step> {
    let kind = prop_oneof![
        8 => Just(Kind::Read),
        7 => Just(Kind::Write),
        1 => proptest::option::of(0..40_u64).prop_map(Kind::UnknownWrite),
    ];
    let step = (0..clients, 0..3_u64, 0..6_u64, 0..6_u64, kind);
    step.prop_map(|(client, pause, before, after, kind)| Step {
        client,
        pause,
        before,
        after,
        kind,
    })
}

/// The history of a real register for these steps. It loses the write of step `dropped`.
fn register(steps: &[Step], dropped: Option<usize>) -> Vec<Operation<u32>> {
    let mut clocks: HashMap<u64, u64> = HashMap::new();
    let mut history = Vec::new();
    let mut effects = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        let clock = clocks.entry(step.client).or_default();
        let invoked = *clock + step.pause;
        let effect = invoked + step.before;
        *clock = effect + step.after;
        let value = u32::try_from(index).unwrap();
        let (action, completed, effect) = match step.kind {
            Kind::Read => (Action::Read(None), Some(*clock), Some(effect)),
            Kind::Write => (Action::Write(value), Some(*clock), Some(effect)),
            Kind::UnknownWrite(later) => {
                (Action::Write(value), None, later.map(|later| effect + later))
            }
        };
        history.push(Operation { client: step.client, action, invoked, completed });
        effects.extend(effect.filter(|_| dropped != Some(index)).map(|effect| (effect, index)));
    }
    // Effects at the same instant are concurrent, so any order is legal.
    effects.sort_unstable();
    let mut state = None;
    for (_, index) in effects {
        match &mut history[index].action {
            Action::Write(value) => state = Some(*value),
            Action::Read(value) => *value = state,
        }
    }
    history
}

#[test]
fn histories_of_a_real_register_pass() {
    for_all(3_000, vec(any_step(4), 0..25), |steps| {
        assert!(is_linearizable(&register(&steps, None)));
    });
}

/// The `index`-th place in the history where `wanted` holds.
fn place(
    history: &[Operation<u32>],
    index: Index,
    wanted: impl Fn(&Operation<u32>) -> bool,
) -> Option<usize> {
    let places: Vec<usize> = (0..history.len()).filter(|place| wanted(&history[*place])).collect();
    (!places.is_empty()).then(|| places[index.index(places.len())])
}

fn is_write(operation: &Operation<u32>) -> bool {
    matches!(operation.action, Action::Write(_))
}

/// Applies a fault to real histories and compares the verdicts.
fn mutate(
    name: &str,
    mutation: impl Fn(&[Step], Vec<Operation<u32>>, Index, Index) -> Option<Vec<Operation<u32>>>,
) {
    let verdicts = Verdicts::default();
    let strategy = (vec(any_step(3), 1..16), any::<Index>(), any::<Index>());
    for_all(3_000, strategy, |(steps, one, other)| {
        let history = register(&steps, None);
        if let Some(mutant) = mutation(&steps, history, one, other) {
            verdicts.count(is_linearizable(&mutant));
        }
    });
    verdicts.assert_mixed(name);
}

#[test]
fn a_read_of_a_wrong_value_is_judged_as_the_search_does() {
    mutate("reads swapped", |_, mut history, one, other| {
        let one = place(&history, one, |operation| !is_write(operation))?;
        let other = place(&history, other, |operation| !is_write(operation))?;
        history[one].action = history[other].action.clone();
        Some(history)
    });
}

#[test]
fn a_register_that_drops_a_write_is_judged_as_the_search_does() {
    mutate("a write dropped", |steps, history, one, _| {
        let acknowledged =
            |operation: &Operation<u32>| is_write(operation) && operation.completed.is_some();
        Some(register(steps, Some(place(&history, one, acknowledged)?)))
    });
}

#[test]
fn swapped_writes_are_judged_as_the_search_does() {
    mutate("writes swapped", |_, mut history, one, other| {
        let (one, other) = (place(&history, one, is_write)?, place(&history, other, is_write)?);
        let action = history[one].action.clone();
        history[one].action = std::mem::replace(&mut history[other].action, action);
        Some(history)
    });
}

#[test]
fn two_hundred_thousand_operations_take_less_than_a_second() {
    let steps = vec(any_step(64), 200_000).new_tree(&mut TestRunner::deterministic()).unwrap();
    let mut history = register(&steps.current(), None);
    // The first of ten attempts that is fast enough: other processes use this machine too.
    let mut times = (0..10).map(|_| {
        let start = Instant::now();
        check(&history).unwrap();
        start.elapsed()
    });
    let took = times.find(|took| *took < Duration::from_secs(1));
    let took = took.expect("none of ten took less than a second");
    println!("{} operations of 64 clients: {took:?}", history.len());

    // A fault in them is found as fast, and shown by a few operations.
    let end = history.iter().filter_map(|operation| operation.completed).max().unwrap();
    let value = history.iter().find_map(|operation| match operation.action {
        Action::Write(value) if operation.completed.is_some() => Some(value),
        _ => None,
    });
    let value = value.unwrap();
    history.push(read(value, end + 1, end + 2));
    let start = Instant::now();
    let violation = check(&history).unwrap_err();
    println!("found in {:?}: {violation}", start.elapsed());
    assert!(violation.operations.len() <= 6, "{violation}");
    assert!(!search(&violation.operations), "{violation}");
}
