//! Loggers that give their records to a test.

use std::panic::AssertUnwindSafe;

use slog::{Drain, Logger, Never, OwnedKVList, Record, o};

struct Taker<F>(AssertUnwindSafe<F>);

impl<F: Fn(&Record<'_>)> Drain for Taker<F> {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, _: &OwnedKVList) -> Result<(), Never> {
        self.0(record);
        Ok(())
    }
}

/// A logger that calls `take` with each record.
pub fn logger(take: impl Fn(&Record<'_>) + Send + Sync + 'static) -> Logger {
    Logger::root(Taker(AssertUnwindSafe(take)).fuse(), o!())
}

/// A logger without output.
pub fn discard() -> Logger {
    Logger::root(slog::Discard, o!())
}
