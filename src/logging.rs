//! Where log lines go: to standard error, for people or as JSON, through a queue of their own, so
//! that a terminal that does not read does not hold up the raft node.

use std::sync::Mutex;

use slog::{Drain, Level, LevelFilter, Logger, o};
use slog_async::{AsyncGuard, OverflowStrategy};

use crate::config::{LogFormat, LogLevel};

/// Lines that may wait to be written; more are dropped and counted in the log.
const WAITING_LINES_MAX: usize = 4096;

/// Makes the logger. Dropping the guard writes what is still queued.
pub fn logger(level: LogLevel, format: LogFormat) -> (Logger, AsyncGuard) {
    let level = match level {
        LogLevel::Error => Level::Error,
        LogLevel::Warn => Level::Warning,
        LogLevel::Info => Level::Info,
        LogLevel::Debug => Level::Debug,
    };
    // A line that cannot be written is lost: there is nowhere else to say so.
    let (drain, guard) = match format {
        LogFormat::Term => {
            let decorator = slog_term::TermDecorator::new().stderr().build();
            queued(Mutex::new(slog_term::FullFormat::new(decorator).build()).fuse())
        }
        LogFormat::Json => queued(Mutex::new(slog_json::Json::default(std::io::stderr())).fuse()),
    };
    (Logger::root(LevelFilter::new(drain, level).fuse(), o!()), guard)
}

fn queued(
    drain: impl Drain<Ok = (), Err = slog::Never> + Send + 'static,
) -> (slog_async::Async, AsyncGuard) {
    slog_async::Async::new(drain)
        .chan_size(WAITING_LINES_MAX)
        .overflow_strategy(OverflowStrategy::DropAndReport)
        .build_with_guard()
}
