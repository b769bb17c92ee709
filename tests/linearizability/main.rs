//! The checkers that the fault tests and the simulation rely on. That of a register detects each kind of
//! fault, accepts every history of a correct register, and agrees with two other checkers. That of the whole
//! store, which knows the log, detects each kind of fault, and agrees with a search.

#![allow(clippy::unwrap_used, missing_docs)]

mod by_hand;
mod random;
mod second_opinion;
mod store;
#[path = "../support/mod.rs"]
mod support;

use support::linearizability::{Action, Operation, check, search};

fn write(value: u32, invoked: u64, completed: u64) -> Operation<u32> {
    Operation { client: 1, action: Action::Write(value), invoked, completed: Some(completed) }
}

fn unknown_write(value: u32, invoked: u64) -> Operation<u32> {
    Operation { client: 2, action: Action::Write(value), invoked, completed: None }
}

fn read(value: impl Into<Option<u32>>, invoked: u64, completed: u64) -> Operation<u32> {
    let action = Action::Read(value.into());
    Operation { client: 3, action, invoked, completed: Some(completed) }
}

/// The verdict, on which all three checkers must agree.
fn is_linearizable(history: &[Operation<u32>]) -> bool {
    let verdict = check(history);
    assert_eq!(verdict.is_ok(), search(history), "check: {verdict:?}");
    assert_eq!(verdict.is_ok(), second_opinion::todc_search(history), "check: {verdict:?}");
    // A violation's operations are a violation by themselves.
    if let Err(violation) = &verdict {
        assert!(!search(&violation.operations), "{violation}");
        assert!(violation.operations.len() <= 6, "{violation}");
    }
    verdict.is_ok()
}
