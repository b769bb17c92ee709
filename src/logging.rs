//! Log output to standard error, as text or JSON, through a bounded queue: a reader that stops reading
//! does not delay the raft node.

use std::sync::Mutex;

use slog::{Drain, Level, LevelFilter, Logger, o};
use slog_async::{AsyncGuard, OverflowStrategy};

use crate::config::LogFormat;

/// Lines in the queue. Further lines are dropped, and the log reports their number.
const WAITING_LINES_MAX: usize = 4096;

/// Makes the logger. Dropping the guard writes the queued lines.
pub fn logger(level: Level, format: LogFormat) -> (Logger, AsyncGuard) {
    // A line that cannot be written is dropped: there is no other place to report it.
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
