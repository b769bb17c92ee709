//! The clients' observations in one round, and the checks on them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use crate::support::linearizability::{Action, Operation, check};

/// The client that reads every key at the end of a round.
pub const LAST_READER: u64 = u64::MAX;

/// The clock for all histories of a run: monotonic, in nanoseconds.
#[derive(Clone, Copy)]
pub struct Clock(Instant);

impl Clock {
    pub fn start() -> Self {
        Self(Instant::now())
    }

    pub fn now(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }
}

/// The operations on each key. A write without completion has an unknown outcome: it may take
/// effect at any time, or never.
pub struct History {
    operations: BTreeMap<String, Vec<Operation<String>>>,
    /// Writes certainly not carried out, which are not among the operations.
    pub refused: usize,
}

impl History {
    pub fn new(keys: &[String]) -> Self {
        let operations = keys.iter().map(|key| (key.clone(), Vec::new())).collect();
        Self { operations, refused: 0 }
    }

    pub fn keys(&self) -> Vec<String> {
        self.operations.keys().cloned().collect()
    }

    pub fn record(&mut self, key: &str, operation: Operation<String>) {
        self.operations.get_mut(key).expect("it is a key of this round").push(operation);
    }

    pub fn append(&mut self, other: Self) {
        for (key, operations) in other.operations {
            self.operations.entry(key).or_default().extend(operations);
        }
        self.refused += other.refused;
    }

    /// The number of acknowledged writes.
    pub fn acknowledged(&self) -> usize {
        let operations = self.operations.values().flatten();
        operations.filter(|operation| is_acknowledged_write(operation)).count()
    }

    /// The acknowledged writes to `key` that are lost if it holds `value` now, without pending
    /// writes: those that started after the write of `value` was acknowledged.
    pub fn lost(&self, key: &str, value: Option<&str>) -> Vec<&Operation<String>> {
        let operations = &self.operations[key];
        let is_of_value = |operation: &&Operation<String>| match &operation.action {
            Action::Write(written) => Some(written.as_str()) == value,
            Action::Read(_) => false,
        };
        let written = match (value, operations.iter().find(is_of_value)) {
            (None, _) => 0,
            // A write of unknown outcome may be the last.
            (Some(_), Some(write)) => write.completed.unwrap_or(u64::MAX),
            // The linearizability check reports a value never written.
            (Some(_), None) => u64::MAX,
        };
        let is_lost = |operation: &&Operation<String>| {
            is_acknowledged_write(operation) && operation.invoked > written
        };
        operations.iter().filter(is_lost).collect()
    }

    /// The keys whose histories are not linearizable, with the reasons.
    pub fn not_linearizable(&self) -> Vec<String> {
        let violation = |(key, operations): (&String, &Vec<Operation<String>>)| {
            check(operations).err().map(|violation| format!("{key}: {violation}"))
        };
        self.operations.iter().filter_map(violation).collect()
    }

    /// Appends the operations to a file, one per line.
    pub fn save(&self, path: &Path) {
        let mut lines = String::new();
        for (key, operations) in &self.operations {
            for Operation { client, action, invoked, completed } in operations {
                let (name, value) = match action {
                    Action::Write(value) => ("write", Some(value)),
                    Action::Read(value) => ("read", value.as_ref()),
                };
                // Keys and values are our own and need no escaping.
                let value = value.map_or("null".to_owned(), |value| format!("\"{value}\""));
                let completed = completed.map_or("null".to_owned(), |at| at.to_string());
                writeln!(
                    lines,
                    "{{\"key\":\"{key}\",\"client\":{client},\"action\":\"{name}\",\"value\":{value},\"invoked\":{invoked},\"completed\":{completed}}}"
                )
                .unwrap();
            }
        }
        let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
        file.write_all(lines.as_bytes()).unwrap();
    }
}

fn is_acknowledged_write(operation: &Operation<String>) -> bool {
    matches!(operation.action, Action::Write(_)) && operation.completed.is_some()
}
