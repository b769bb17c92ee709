//! Every input at every entrance is accepted or refused, and never causes a panic.
//!
//! Each target of [`targets`] runs as a property test on random bytes. A coverage-guided fuzzer
//! runs the same functions for as long as needed; see `driver.rs`.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../support/mod.rs"]
mod support;
mod targets;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// Bytes that are choices. Small ones are more frequent, because most are taken modulo a small
/// number.
fn choices() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![3 => 0..16_u8, 1 => any::<u8>()];
    prop_oneof![
        1 => proptest::collection::vec(any::<u8>(), 0..400),
        4 => proptest::collection::vec(byte, 0..400),
    ]
}

/// Runs a target. `PROPTEST_CASES` sets the number of cases. A failing input is printed.
fn run(name: &str) {
    let (_, target) = targets::TARGETS.iter().find(|(known, _)| *known == name).unwrap();
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    let config = ProptestConfig {
        failure_persistence: None,
        // A target reports a failure by a panic, which proptest catches.
        ..ProptestConfig::with_cases(cases.unwrap_or(500))
    };
    let outcome = TestRunner::new(config).run(&choices(), |data| {
        target(&data);
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{name}: {error}");
    }
}

macro_rules! properties {
    ($($name:ident),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                run(stringify!($name));
            }
        )*

        #[test]
        fn every_target_is_a_property() {
            let here = [$(stringify!($name)),*];
            assert!(targets::TARGETS.iter().map(|(name, _)| *name).eq(here));
        }
    };
}

properties!(
    wal_segment,
    wal_operations,
    snapshot_file,
    commands,
    messages,
    conf_changes,
    greetings,
    flags,
    environment,
    configuration_file,
    peer_requests,
    client_requests,
    application_requests,
    admin_requests,
    status_answers,
    tls_hellos,
);
