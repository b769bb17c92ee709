//! Another checker, `todc-utils`, and the Jepsen runs against etcd (2014) that ship with it. They
//! are read from cargo's copy of that crate.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;

use todc_utils::linearizability::WGLChecker;
use todc_utils::{Action as Event, History, Specification};

use crate::support::linearizability::{Action, Operation, search_orders};

struct Register;

impl Specification for Register {
    type State = Option<u32>;
    type Operation = Action<u32>;

    fn init() -> Self::State {
        None
    }

    fn apply(operation: &Self::Operation, state: &Self::State) -> (bool, Self::State) {
        match operation {
            Action::Write(value) => (true, Some(*value)),
            Action::Read(value) => (value == state, *state),
        }
    }
}

/// The verdict of `todc-utils`. It has no unknown outcomes: such a write is answered after
/// everything else, where it changes nothing.
pub fn todc_search(history: &[Operation<u32>]) -> bool {
    let mut events = Vec::new();
    for (process, operation) in history.iter().enumerate() {
        let end = operation.completed.map_or((1, 0), |end| (0, end));
        // At the same time calls come first: operations whose times touch are concurrent.
        events.push(((0, operation.invoked), 0, process, Event::Call(operation.action.clone())));
        events.push((end, 1, process, Event::Response(operation.action.clone())));
    }
    events.sort_by_key(|(time, kind, process, _)| (*time, *kind, *process));
    let events: Vec<_> =
        events.into_iter().map(|(_, _, process, event)| (process, event)).collect();
    // It accepts no empty history.
    events.is_empty() || WGLChecker::<Register>::is_linearizable(History::from_actions(events))
}

/// A client's operation in a recorded run. Values repeat, so `check` cannot judge it.
enum Recorded {
    Read(Option<u32>),
    Write(u32),
    CompareAndSwap { from: u32, to: u32, swapped: bool },
}

impl Recorded {
    /// The key after this operation; the outer `None` if it could not have had its answer.
    fn apply(&self, state: Option<u32>) -> Option<Option<u32>> {
        match *self {
            Self::Read(value) => (value == state).then_some(state),
            Self::Write(value) => Some(Some(value)),
            Self::CompareAndSwap { from, to, swapped } => {
                (swapped == (state == Some(from))).then_some(if swapped { Some(to) } else { state })
            }
        }
    }
}

/// The operations of a recorded run, with line numbers as times. Each line is `INFO jepsen.util -
/// <process> :<status> :<function> <values>`, separated by white space.
fn parse(log: &str) -> (Vec<(u64, Option<u64>)>, Vec<Recorded>) {
    let number = |word: &str| -> Option<u32> { word.trim_matches(['[', ']']).parse().ok() };
    let mut intervals = Vec::new();
    let mut operations = Vec::new();
    let mut open: HashMap<u64, usize> = HashMap::new();
    for (time, line) in (0..).zip(log.lines()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["INFO", "jepsen.util", "-", process, status, function, values @ ..] = &words[..]
        else {
            continue;
        };
        // The process without a number is the nemesis.
        let Ok(process) = process.parse() else { continue };
        if *status == ":invoke" {
            open.insert(process, operations.len());
            intervals.push((time, None));
            operations.push(match *function {
                ":read" => Recorded::Read(None),
                ":write" => Recorded::Write(number(values[0]).unwrap()),
                ":cas" => Recorded::CompareAndSwap {
                    from: number(values[0]).unwrap(),
                    to: number(values[1]).unwrap(),
                    swapped: true,
                },
                _ => panic!("unknown function: {line}"),
            });
            continue;
        }
        let index = open.remove(&process).unwrap();
        match (*status, &mut operations[index]) {
            // Unknown outcome or no answer: no end.
            (":info", _) | (":fail", Recorded::Read(_)) => continue,
            (":ok", Recorded::Read(value)) => *value = number(values[0]),
            (":fail", Recorded::CompareAndSwap { swapped, .. }) => *swapped = false,
            (":ok", _) => {}
            _ => panic!("unknown status: {line}"),
        }
        intervals[index].1 = Some(time);
    }
    (intervals, operations)
}

/// Cargo's copy of the sources of `todc-utils`: no other way leads from a crate to its files.
fn todc_utils_directory() -> PathBuf {
    let cargo = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO"))
            .args(arguments)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    // Without the host's name it would require the crates of all other platforms too.
    let version = cargo(&["--version", "--verbose"]);
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
    let metadata = cargo(&[
        "metadata",
        "--format-version=1",
        "--locked",
        "--offline",
        &format!("--filter-platform={host}"),
    ]);
    metadata
        .split("\"manifest_path\":\"")
        .filter_map(|after| Some(PathBuf::from(after.split('"').next()?).parent()?.to_owned()))
        .find(|directory| {
            let name = directory.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("todc-utils")
        })
        .unwrap()
}

#[test]
fn jepsens_recorded_etcd_runs_get_their_published_verdicts() {
    let runs = todc_utils_directory().join("tests/linearizability");
    let published = std::fs::read_to_string(runs.join("etcd.rs")).unwrap();
    let mut counts = HashMap::from([(true, 0), (false, 0)]);
    // A line of it: `test_007: ("007", true),`.
    for line in published.lines().map(str::trim).filter(|line| line.starts_with("test_")) {
        let run = line.split('"').nth(1).unwrap();
        let verdict = line.ends_with("true),");
        assert!(verdict || line.ends_with("false),"), "{line}");
        let log = std::fs::read_to_string(runs.join(format!("etcd/etcd_{run}.log"))).unwrap();
        let (intervals, operations) = parse(&log);
        let found = search_orders(&intervals, None, |state, index| operations[index].apply(*state));
        assert_eq!(found, verdict, "run {run}");
        *counts.get_mut(&verdict).unwrap() += 1;
    }
    println!("recorded runs: {counts:?}");
    assert_eq!((counts[&true], counts[&false]), (23, 79));
}
