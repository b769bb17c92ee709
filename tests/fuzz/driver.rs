//! Runs one of the fuzz targets under libFuzzer, which searches for inputs that reach new code.
//!
//! ```text
//! cd tests/fuzz
//! FUZZ=wal_segment cargo run --release -- -max_total_time=60
//! ```
//! needs the stable compiler and a C++ compiler. The arguments after the two dashes are libFuzzer's: a
//! directory for inputs, `-max_total_time` in seconds, or a file with a failing input. Without `FUZZ`
//! it lists the targets. Arithmetic is checked for overflow. A panic ends the run and keeps the input.

#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

#[path = "../support/mod.rs"]
mod support;
mod targets;

static TARGET: OnceLock<targets::Target> = OnceLock::new();

fn choose_target() {
    let wanted = std::env::var("FUZZ").unwrap_or_default();
    match targets::TARGETS.iter().find(|(name, _)| *name == wanted) {
        Some((_, target)) => TARGET.set(*target).expect("it is chosen once"),
        None => {
            let names: Vec<&str> = targets::TARGETS.iter().map(|(name, _)| *name).collect();
            eprintln!("set FUZZ to one of: {}", names.join(", "));
            std::process::exit(2);
        }
    }
}

fuzz_target!(
    init: choose_target(),
    |data: &[u8]| TARGET.get().expect("it is chosen first")(data)
);
