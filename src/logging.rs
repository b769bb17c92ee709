//! Log output to standard error, as text or JSON. Nothing that reads the log, and nothing that is logged,
//! can stop or delay a member:
//!
//! - A line is rendered by the thread that logs it, and queued. Another thread writes the queue. If the
//!   queue is full, or a line cannot be written, lines are lost, and their number is logged later.
//! - A line is printable, and at most [`LINE_BYTES_MAX`] long.
//! - Each place in the code may log [`BURST`] lines at once, then [`LINES_PER_SECOND`].
//! - The end waits for the queue for at most [`FLUSH_TIMEOUT`].
//!
//! raft-rs's lines appear in the words of the original, as readers of etcd's tutorials know them.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use slog::{
    BorrowedKV, Drain, KV, Key, Level, Logger, OwnedKVList, Record, RecordStatic, Serializer, o,
};

/// Lines in the queue.
const WAITING_LINES_MAX: usize = 4096;
/// The longest line in bytes.
const LINE_BYTES_MAX: usize = 1024;
/// Lines that one place in the code may log at once.
const BURST: u32 = 100;
/// Lines that one place in the code may log after that, on average.
const LINES_PER_SECOND: u32 = 10;
/// How long the end of the process waits until the queue is written.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// The values of `--log-format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text
    Term,
    /// One JSON object a line
    Json,
}

/// Parses the name of a level on a command line.
pub(crate) fn level_parser() -> impl TypedValueParser<Value = Level> {
    let names = PossibleValuesParser::new(LogLevel::NAMES);
    names.try_map(|name| LogLevel::parse(&name).ok_or("unknown level"))
}

/// The minimum level that is logged. It may be changed while the member runs.
#[derive(Clone)]
pub struct LogLevel(Arc<AtomicUsize>);

impl LogLevel {
    /// The levels that flags and requests name.
    pub const NAMES: [&str; 4] = ["error", "warn", "info", "debug"];

    /// Starts at `level`.
    pub fn new(level: Level) -> Self {
        Self(Arc::new(AtomicUsize::new(level.as_usize())))
    }

    /// The level, as it was set last.
    pub fn get(&self) -> Level {
        Level::from_usize(self.0.load(Ordering::Relaxed)).expect("only levels are stored")
    }

    /// Changes the level of all lines from now on.
    pub fn set(&self, level: Level) {
        self.0.store(level.as_usize(), Ordering::Relaxed);
    }

    /// The level that `name` names, one of [`NAMES`](Self::NAMES).
    pub fn parse(name: &str) -> Option<Level> {
        name.parse().ok().filter(|_| Self::NAMES.contains(&name))
    }

    /// The name of a level.
    pub fn name(level: Level) -> &'static str {
        let is_named = |name: &&&str| Self::parse(name) == Some(level);
        Self::NAMES.iter().find(is_named).expect("every level that can be set has a name")
    }
}

/// Passes on what is severe enough.
struct Filter<D>(D, LogLevel);

impl<D: Drain<Ok = ()>> Drain for Filter<D> {
    type Ok = ();
    type Err = D::Err;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), D::Err> {
        if record.level().is_at_least(self.1.get()) { self.0.log(record, values) } else { Ok(()) }
    }

    fn is_enabled(&self, level: Level) -> bool {
        level.is_at_least(self.1.get())
    }
}

/// Makes the logger. Dropping the guard writes the queued lines.
pub fn logger(level: LogLevel, format: LogFormat) -> (Logger, Guard) {
    let (queue, lines) = mpsc::sync_channel::<String>(WAITING_LINES_MAX);
    let progress = Arc::<Progress>::default();
    let writer = progress.clone();
    let written = move |line: &str| {
        // A line that cannot be written is lost: there is no other place to report it.
        let _ = io::stderr().write_all(line.as_bytes());
    };
    std::thread::spawn(move || {
        for line in lines {
            written(&line);
            writer.note_written();
        }
    });
    let lines = Lines {
        format,
        is_colored: format == LogFormat::Term && io::stderr().is_terminal(),
        queue,
        progress: progress.clone(),
        budgets: Mutex::default(),
    };
    let drain = Filter(OriginalWords(lines), level).ignore_res();
    (Logger::root(drain, o!()), Guard(progress))
}

/// How many lines were queued, and how many of them written.
#[derive(Default)]
struct Progress {
    queued: AtomicU64,
    lost: AtomicU64,
    written: Mutex<u64>,
    changed: Condvar,
}

impl Progress {
    fn note_written(&self) {
        *self.written.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.changed.notify_all();
    }
}

/// Waits for the queue when it is dropped.
pub struct Guard(Arc<Progress>);

impl Drop for Guard {
    fn drop(&mut self) {
        let queued = self.0.queued.load(Ordering::SeqCst);
        let written = self.0.written.lock().unwrap_or_else(PoisonError::into_inner);
        let is_behind = |written: &mut u64| *written < queued;
        let _ = self.0.changed.wait_timeout_while(written, FLUSH_TIMEOUT, is_behind);
    }
}

/// What one place in the code may still log.
struct Budget {
    lines: u32,
    since: Instant,
    suppressed: u64,
}

/// Renders records and queues them.
struct Lines {
    format: LogFormat,
    is_colored: bool,
    queue: SyncSender<String>,
    progress: Arc<Progress>,
    budgets: Mutex<HashMap<(&'static str, u32), Budget>>,
}

impl Lines {
    /// Takes a line of the budget of the place that logs. Returns how many lines of that place were
    /// suppressed before this one; `None` if this one is, too.
    fn take_budget(&self, record: &Record<'_>) -> Option<u64> {
        let mut budgets = self.budgets.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let place = (record.file(), record.line());
        let budget =
            budgets.entry(place).or_insert(Budget { lines: BURST, since: now, suppressed: 0 });
        let earned = (now - budget.since).as_millis() as u64 * u64::from(LINES_PER_SECOND) / 1000;
        if earned > 0 {
            budget.lines = (u64::from(budget.lines) + earned).min(u64::from(BURST)) as u32;
            budget.since = now;
        }
        if budget.lines == 0 {
            budget.suppressed += 1;
            return None;
        }
        budget.lines -= 1;
        Some(std::mem::take(&mut budget.suppressed))
    }

    fn render(&self, record: &Record<'_>, values: &OwnedKVList) -> io::Result<String> {
        let mut bytes = Vec::new();
        match self.format {
            LogFormat::Term => {
                let decorator = slog_term::PlainDecorator::new(&mut bytes);
                slog_term::FullFormat::new(decorator).build().log(record, values)?;
            }
            LogFormat::Json => {
                slog_json::Json::default(&mut bytes).log(record, values)?;
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim_end_matches('\n');
        let mut line = match self.format {
            LogFormat::Term => printable(text, LINE_BYTES_MAX),
            LogFormat::Json => printable_json(text),
        };
        if self.is_colored {
            let level = record.level();
            let color = match level {
                Level::Critical | Level::Error => 31,
                Level::Warning => 33,
                Level::Info => 32,
                Level::Debug | Level::Trace => 36,
            };
            let name = level.as_short_str();
            line = line.replacen(name, &format!("\x1b[{color}m{name}\x1b[0m"), 1);
        }
        line.push('\n');
        Ok(line)
    }

    fn queue(&self, line: String) {
        self.progress.queued.fetch_add(1, Ordering::SeqCst);
        if self.queue.try_send(line).is_err() {
            self.progress.queued.fetch_sub(1, Ordering::SeqCst);
            self.progress.lost.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn queue_record(&self, record: &Record<'_>, values: &OwnedKVList) -> io::Result<()> {
        let line = self.render(record, values)?;
        self.queue(line);
        Ok(())
    }
}

impl Drain for Lines {
    type Ok = ();
    type Err = io::Error;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> io::Result<()> {
        let Some(suppressed) = self.take_budget(record) else { return Ok(()) };
        let lost = self.progress.lost.swap(0, Ordering::SeqCst);
        if lost > 0 {
            let text = format!("{lost} log lines were lost: the log was not read fast enough");
            with_text(record, Level::Warning, &text, |record| self.queue_record(record, values))?;
        }
        if suppressed > 0 {
            let text = format!("{suppressed} lines like the next one were not logged");
            with_text(record, record.level(), &text, |record| self.queue_record(record, values))?;
        }
        self.queue_record(record, values)
    }
}

/// Calls `log` with a record that says `text`, without fields, in the place of `record`.
fn with_text<T>(
    record: &Record<'_>,
    level: Level,
    text: &str,
    log: impl FnOnce(&Record<'_>) -> T,
) -> T {
    let place = RecordStatic { location: record.location(), tag: record.tag(), level };
    log(&Record::new(&place, &format_args!("{text}"), BorrowedKV(&())))
}

/// Gives raft-rs's records the original's words.
struct OriginalWords<D>(D);

impl<D: Drain<Ok = ()>> Drain for OriginalWords<D> {
    type Ok = ();
    type Err = D::Err;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), D::Err> {
        if !record.module().starts_with("raft::") {
            return self.0.log(record, values);
        }
        let mut fields = Fields::default();
        // Formatting into a string does not fail.
        let _ = values.serialize(record, &mut fields);
        let _ = record.kv().serialize(record, &mut fields);
        let text = original_words(&record.msg().to_string(), fields).unwrap_or_default();
        text.lines().try_for_each(|text| {
            with_text(record, record.level(), text, |record| self.0.log(record, &o!().into()))
        })
    }
}

/// The fields of a record, as text.
#[derive(Default)]
struct Fields(BTreeMap<String, String>);

impl Serializer for Fields {
    fn emit_arguments(&mut self, key: Key, value: &std::fmt::Arguments<'_>) -> slog::Result {
        self.0.insert(key.to_string(), value.to_string());
        Ok(())
    }
}

/// What the original says for a message of raft-rs, in one line or more; `None` if it says nothing, or this
/// program says it itself.
fn original_words(message: &str, mut fields: Fields) -> Option<String> {
    let mut take = |key: &str| fields.0.remove(key).unwrap_or_default();
    let id = take("raft_id");
    let vote = |kind: &str| {
        kind.replace("MsgRequestPreVote", "MsgPreVote").replace("MsgRequestVote", "MsgVote")
    };
    let text = match message {
        "newRaft" => {
            let peers = take("peers");
            // `Configuration { incoming: Configuration { voters: {1, 2} }, outgoing: … }`
            let peers = peers.split(['{', '}']).nth(3).unwrap_or_default();
            format!(
                "newRaft {id} [peers: [{peers}], term: {}, commit: {}, applied: {}, lastindex: {}, lastterm: {}]",
                take("term"),
                take("commit"),
                take("applied"),
                take("last index"),
                take("last term")
            )
        }
        "starting a new election" => {
            format!("{id} is starting a new election at term {}", take("term"))
        }
        "received votes response" => format!(
            "{id} received {} from {} at term {}",
            vote(&take("type")).replace("Response", "Resp"),
            take("from"),
            take("term")
        ),
        "broadcasting vote request" => format!(
            "{id} [logterm: {}, index: {}] sent {} request to {} at term {}",
            take("log_term"),
            take("log_index"),
            vote(&take("type")),
            take("to"),
            take("term")
        ),
        // Of a candidate's own vote raft-rs says nothing.
        message if message.starts_with("became candidate") => {
            let term = take("term");
            format!("{id} {message}\n{id} received MsgVoteResp from {id} at term {term}")
        }
        // The original has no pre-vote. Its requests are logged.
        message if message.starts_with("became pre-candidate") => return None,
        // The node logs both.
        "switched to configuration" => return None,
        message if message.starts_with("RawNode created") => return None,
        message => {
            let mut text = format!("{id} {message}");
            for key in ["term", "from", "to"] {
                take(key);
            }
            for (key, value) in &fields.0 {
                // Writing to a string does not fail.
                let _ = write!(text, ", {key}: {value}");
            }
            text
        }
    };
    Some(text)
}

/// `text` on one line, without characters that control a terminal or that are not visible, and in at most
/// `bytes_max` bytes: for the log and for terminals.
pub fn printable(text: &str, bytes_max: usize) -> String {
    let mut out = String::with_capacity(text.len().min(bytes_max));
    for (at, character) in text.char_indices() {
        let start = out.len();
        match character {
            '"' | '\'' | '\\' => out.push(character),
            _ => out.extend(character.escape_debug()),
        }
        if out.len() > bytes_max {
            out.truncate(start);
            // Makes room for the note.
            while out.len() + 40 > bytes_max {
                out.pop();
            }
            let _ = write!(out, "… ({} bytes more)", text.len() - at);
            break;
        }
    }
    out
}

/// The JSON object `text` with the same bounds.
fn printable_json(text: &str) -> String {
    let mut text = text.to_owned();
    if text.len() > LINE_BYTES_MAX
        && let Ok(serde_json::Value::Object(mut object)) = serde_json::from_str(&text)
    {
        let longest = LINE_BYTES_MAX / 2 / object.len().max(1);
        for value in object.values_mut() {
            if let serde_json::Value::String(string) = value {
                *string = printable(string, longest.max(100));
            }
        }
        text = serde_json::Value::Object(object).to_string();
    }
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        let is_printable =
            character == '"' || character == '\\' || character.escape_debug().len() == 1;
        match is_printable {
            true => out.push(character),
            false => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
    out
}
