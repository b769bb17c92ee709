//! The connections, and the outcomes of their requests.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use hdrhistogram::Histogram;
use indicatif::ProgressBar;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use crate::http::{self, Answer, Prepared};

/// The longest recorded latency, in microseconds.
const LATENCY_MAX: u64 = 60_000_000;
/// The deadline of the last responses of a round.
const LAST_RESPONSES: Duration = Duration::from_secs(10);
/// The pause before a failed connection is replaced.
const RECONNECT: Duration = Duration::from_millis(10);
/// The time that one point of the throughput plot covers.
pub const SLICE: Duration = Duration::from_millis(100);
/// The period of the progress bar.
const PROGRESS: Duration = Duration::from_millis(50);

/// The load on one target.
pub struct Load {
    pub addresses: Vec<SocketAddr>,
    pub connections: usize,
    /// Percentage of GETs.
    pub reads: u8,
    pub keys: u64,
    pub value_bytes: usize,
    /// Requests per second over all connections.
    pub rate: Option<f64>,
    pub warmup: Duration,
    pub duration: Duration,
    pub threads: usize,
}

/// The outcome of a round.
pub struct Outcome {
    pub duration: Duration,
    /// Of the successful requests, in microseconds.
    pub latency: Histogram<u64>,
    /// Successful requests per [`SLICE`].
    pub slices: Vec<u64>,
    /// For each millisecond, whether a request succeeded in it.
    answered: Vec<bool>,
    /// The failed requests, by status or error.
    pub errors: BTreeMap<String, u64>,
    /// Keys with an acknowledged PUT, warm-up included.
    acknowledged: BTreeSet<u64>,
}

impl Outcome {
    fn new(load: &Load) -> anyhow::Result<Self> {
        let slices = load.duration.as_millis().div_ceil(SLICE.as_millis()) as usize;
        Ok(Self {
            duration: load.duration,
            latency: Histogram::new_with_bounds(1, LATENCY_MAX, 3)?,
            slices: vec![0; slices],
            answered: vec![false; load.duration.as_millis() as usize],
            errors: BTreeMap::new(),
            acknowledged: BTreeSet::new(),
        })
    }

    /// Successes per second.
    pub fn throughput(&self) -> f64 {
        self.latency.len() as f64 / self.duration.as_secs_f64()
    }

    /// A percentile of the latency, in milliseconds.
    pub fn percentile(&self, percent: f64) -> f64 {
        self.latency.value_at_percentile(percent) as f64 / 1000.0
    }

    /// The longest time without a successful request, in milliseconds.
    pub fn longest_gap(&self) -> f64 {
        let gaps = self.answered.split(|answered| *answered).map(<[bool]>::len);
        gaps.max().unwrap_or(0) as f64
    }

    /// The keys with an acknowledged PUT in any of `outcomes`.
    pub fn acknowledged_in(outcomes: &[Self]) -> BTreeSet<u64> {
        outcomes.iter().flat_map(|outcome| &outcome.acknowledged).copied().collect()
    }

    /// Records a request: its response (`None` after the deadline) and, for a PUT, its key.
    fn take(
        &mut self,
        called: Option<anyhow::Result<Answer>>,
        written: Option<u64>,
        intended: Instant,
        measured_from: Instant,
    ) {
        let is_measured = intended >= measured_from;
        let error = match called {
            Some(Ok(answer)) if (200..300).contains(&answer.status) => {
                self.acknowledged.extend(written);
                if is_measured {
                    self.latency.saturating_record(intended.elapsed().as_micros() as u64);
                    let at = measured_from.elapsed().as_millis() as usize;
                    if let Some(count) = self.slices.get_mut(at / SLICE.as_millis() as usize) {
                        *count += 1;
                    }
                    if let Some(answered) = self.answered.get_mut(at) {
                        *answered = true;
                    }
                }
                return;
            }
            Some(Ok(answer)) => answer.status.to_string(),
            Some(Err(error)) => format!("{error:#}"),
            None => "no response".to_owned(),
        };
        if is_measured {
            *self.errors.entry(error).or_default() += 1;
        }
    }

    fn add(&mut self, other: Self) -> anyhow::Result<()> {
        self.latency.add(other.latency)?;
        for (mine, theirs) in self.slices.iter_mut().zip(other.slices) {
            *mine += theirs;
        }
        for (mine, theirs) in self.answered.iter_mut().zip(other.answered) {
            *mine |= theirs;
        }
        for (error, count) in other.errors {
            *self.errors.entry(error).or_default() += count;
        }
        self.acknowledged.extend(other.acknowledged);
        Ok(())
    }
}

impl Load {
    /// Runs one round.
    pub fn run(self: &Arc<Self>, progress: &ProgressBar) -> anyhow::Result<Outcome> {
        let begin = Instant::now();
        let mut whole = Outcome::new(self)?;
        let outcomes: Vec<anyhow::Result<Outcome>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads)
                .map(|thread| scope.spawn(move || self.run_thread(thread, begin, progress)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("the thread does not panic"))
                .collect()
        });
        for outcome in outcomes {
            whole.add(outcome?)?;
        }
        Ok(whole)
    }

    fn run_thread(
        self: &Arc<Self>,
        thread: usize,
        begin: Instant,
        progress: &ProgressBar,
    ) -> anyhow::Result<Outcome> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let outcome = Rc::new(RefCell::new(Outcome::new(self)?));
        let local = LocalSet::new();
        let end = begin + self.warmup + self.duration;
        for number in (thread..self.connections).step_by(self.threads) {
            let connection = Connection {
                load: self.clone(),
                address: self.addresses[number % self.addresses.len()],
                number,
                begin,
                random: Random(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(number as u64 + 1)),
                outcome: outcome.clone(),
            };
            local.spawn_local(connection.run());
        }
        local.block_on(&runtime, async {
            while thread == 0 && Instant::now() < end {
                sleep(PROGRESS).await;
                progress.set_position(begin.elapsed().as_millis() as u64);
            }
        });
        // Waits for all connections.
        runtime.block_on(local);
        let outcome = Rc::into_inner(outcome).context("a connection outlives its round")?;
        Ok(outcome.into_inner())
    }

    /// PUTs every key once. Returns the number of keys that were not acknowledged.
    pub fn fill(&self, progress: &ProgressBar) -> anyhow::Result<u64> {
        let keys: Vec<u64> = (0..self.keys).collect();
        let value = vec![b'v'; self.value_bytes];
        let done = self.each(&keys, progress, |host| Prepared::put(host, &value))?;
        Ok(self.keys - done as u64)
    }

    /// GETs each of `keys`. Returns the number of keys with a value.
    pub fn count(&self, keys: &BTreeSet<u64>, progress: &ProgressBar) -> anyhow::Result<usize> {
        let keys: Vec<u64> = keys.iter().copied().collect();
        self.each(&keys, progress, Prepared::get)
    }

    /// Makes one request per key. Returns the number of successful ones.
    fn each(
        &self,
        keys: &[u64],
        progress: &ProgressBar,
        prepare: impl Fn(SocketAddr) -> Prepared,
    ) -> anyhow::Result<usize> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let share = |connection: usize| keys.iter().skip(connection).step_by(self.connections);
        let requests = (0..self.connections.min(keys.len())).map(async |connection| {
            let address = self.addresses[connection % self.addresses.len()];
            let mut prepared = prepare(address);
            let mut wire = Wire::connect(address).await?;
            let mut succeeded = 0;
            for &key in share(connection) {
                let answer = timeout(LAST_RESPONSES, wire.call(prepared.with_key(key))).await??;
                succeeded += usize::from((200..300).contains(&answer.status));
                progress.inc(1);
            }
            anyhow::Ok(succeeded)
        });
        let counts = runtime.block_on(futures_util::future::join_all(requests));
        counts.into_iter().sum()
    }
}

/// One connection of a round.
struct Connection {
    load: Arc<Load>,
    address: SocketAddr,
    number: usize,
    begin: Instant,
    random: Random,
    outcome: Rc<RefCell<Outcome>>,
}

impl Connection {
    async fn run(mut self) {
        let value = vec![b'v'; self.load.value_bytes];
        let mut put = Prepared::put(self.address, &value);
        let mut get = Prepared::get(self.address);
        let measured_from = self.begin + self.load.warmup;
        let end = measured_from + self.load.duration;
        // With a rate, the connections' requests are evenly staggered.
        let interval =
            self.load.rate.map(|rate| Duration::from_secs_f64(self.load.connections as f64 / rate));
        let mut scheduled = self.begin
            + interval
                .unwrap_or_default()
                .mul_f64(self.number as f64 / self.load.connections as f64);
        let mut wire = None;
        loop {
            let intended = match interval {
                None => Instant::now(),
                Some(interval) => {
                    let intended = scheduled;
                    scheduled += interval;
                    if intended > Instant::now() {
                        sleep_until(intended).await;
                    }
                    intended
                }
            };
            if intended >= end {
                return;
            }
            let key = self.random.below(self.load.keys);
            let is_read = self.random.below(100) < u64::from(self.load.reads);
            let request = if is_read { get.with_key(key) } else { put.with_key(key) };
            let called =
                timeout_at(end + LAST_RESPONSES, call(&mut wire, self.address, request)).await;
            let is_reusable = matches!(&called, Ok(Ok(answer)) if !answer.closes);
            let written = (!is_read).then_some(key);
            self.outcome.borrow_mut().take(called.ok(), written, intended, measured_from);
            if !is_reusable {
                wire = None;
                sleep(RECONNECT).await;
            }
        }
    }
}

/// Makes one request. Connects first if there is no connection.
async fn call(
    wire: &mut Option<Wire>,
    address: SocketAddr,
    request: &[u8],
) -> anyhow::Result<Answer> {
    if wire.is_none() {
        *wire = Some(Wire::connect(address).await?);
    }
    wire.as_mut().expect("a connection was just made").call(request).await
}

/// A connection to a server.
struct Wire {
    stream: TcpStream,
    buffer: Vec<u8>,
    filled: usize,
}

impl Wire {
    async fn connect(address: SocketAddr) -> anyhow::Result<Self> {
        let connected = TcpStream::connect(address).await;
        let stream = connected.with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: vec![0; 4096], filled: 0 })
    }

    async fn call(&mut self, request: &[u8]) -> anyhow::Result<Answer> {
        self.stream.write_all(request).await?;
        loop {
            if self.filled == self.buffer.len() {
                self.buffer.resize(self.filled * 2, 0);
            }
            let read = self.stream.read(&mut self.buffer[self.filled..]).await?;
            if read == 0 {
                bail!("the server closed the connection");
            }
            self.filled += read;
            if let Some(answer) = http::parse(&self.buffer[..self.filled])? {
                self.buffer.copy_within(answer.length..self.filled, 0);
                self.filled -= answer.length;
                return Ok(answer);
            }
        }
    }
}

/// xorshift64*, which is good enough to choose keys.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let random = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d);
        ((u128::from(random) * u128::from(bound)) >> 64) as u64
    }
}
