//! Clients that write and read through all members while faults happen, and record the answers.
//!
//! Each is sequential: it knows the outcome of a request, or knows that it never will, before it
//! sends the next. No value is written twice, so a read identifies the write that it saw.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::history::{Clock, History};
use crate::support::linearizability::{Action, Operation};
use crate::support::processes::{Answer, Client, PATIENCE, eventually};
use crate::support::random::Random;

/// How long a client waits for an answer.
const TIMEOUT_MS: std::ops::Range<u64> = 200..1000;

/// The size of the load.
#[derive(Clone, Copy)]
pub struct Load {
    pub clients: usize,
    pub keys: usize,
    /// A client's pause between two requests: the rate of the load.
    pub pause: Duration,
}

impl Default for Load {
    fn default() -> Self {
        Self { clients: 8, keys: 5, pause: Duration::from_millis(5) }
    }
}

/// State shared by the clients of one round.
struct Shared {
    stop: AtomicBool,
    acknowledged: AtomicUsize,
    members: RwLock<Vec<SocketAddr>>,
    keys: Vec<String>,
    pause: Duration,
    clock: Clock,
}

/// Running clients.
pub struct Clients {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<History>>,
}

impl Clients {
    /// Starts clients on new keys, whose names contain `name`.
    pub fn start(
        name: &str,
        members: &[SocketAddr],
        load: Load,
        clock: Clock,
        random: &mut Random,
    ) -> Self {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            acknowledged: AtomicUsize::new(0),
            members: RwLock::new(members.to_vec()),
            keys: (0..load.keys).map(|key| format!("/{name}-{key}")).collect(),
            pause: load.pause,
            clock,
        });
        let start = |number: usize| {
            let recorder = Recorder {
                number: number as u64,
                shared: shared.clone(),
                random: Random::new(random.next()),
                connections: BTreeMap::new(),
                history: History::new(&shared.keys),
            };
            thread::spawn(move || recorder.run())
        };
        let threads = (0..load.clients).map(start).collect();
        Self { shared, threads }
    }

    /// Sets the members that the clients use from now on.
    pub fn set_members(&self, members: &[SocketAddr]) {
        *self.shared.members.write().unwrap() = members.to_vec();
    }

    /// The number of acknowledged writes so far.
    pub fn acknowledged(&self) -> usize {
        self.shared.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits for this many more acknowledged writes.
    pub fn wait_for(&self, more: usize) {
        let before = self.acknowledged();
        eventually(PATIENCE, &format!("{more} more writes are acknowledged"), || {
            self.acknowledged() >= before + more
        });
    }

    /// Stops the clients; returns their history.
    pub fn stop(mut self) -> History {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut history = History::new(&self.shared.keys);
        for thread in self.threads.drain(..) {
            history.append(thread.join().expect("a client met an answer that it must not get"));
        }
        history
    }
}

/// If a test fails, the clients end before the members do: later another process may have their
/// addresses.
impl Drop for Clients {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // The test has failed already.
            let _ = thread.join();
        }
    }
}

/// One client.
struct Recorder {
    number: u64,
    shared: Arc<Shared>,
    random: Random,
    /// One per member, kept open like a real client's.
    connections: BTreeMap<SocketAddr, Client>,
    history: History,
}

impl Recorder {
    fn run(mut self) -> History {
        let mut sequence = 0;
        while !self.shared.stop.load(Ordering::Relaxed) {
            let shared = self.shared.clone();
            let key = self.random.choose(&shared.keys);
            if self.random.below(2) == 0 {
                sequence += 1;
                let value = format!("{}-{sequence}", self.number);
                self.write(key, value);
            } else {
                self.read(key);
            }
            // The rate of the load, not a wait.
            thread::sleep(shared.pause);
        }
        self.history
    }

    fn write(&mut self, key: &str, value: String) {
        let Some((invoked, answer)) = self.request("PUT", key, value.as_bytes()) else { return };
        let completed = match answer.map(|answer| answer.status) {
            Some(204) => {
                self.shared.acknowledged.fetch_add(1, Ordering::Relaxed);
                Some(self.shared.clock.now())
            }
            // Certainly not carried out, so it is not in the history: a read of this value would be
            // a read of a value never written.
            Some(503) => {
                self.history.refused += 1;
                return;
            }
            // Unknown for ever: the connection was lost after sending, or no answer came in time.
            None | Some(504) => None,
            Some(status) => panic!("PUT {key} is answered {status}"),
        };
        self.record(key, Action::Write(value), invoked, completed);
    }

    fn read(&mut self, key: &str) {
        let Some((invoked, Some(answer))) = self.request("GET", key, b"") else { return };
        let value = match answer.status {
            200 => Some(String::from_utf8(answer.body).expect("only text is written")),
            404 => None,
            503 | 504 => return,
            status => panic!("GET {key} is answered {status}"),
        };
        self.record(key, Action::Read(value), invoked, Some(self.shared.clock.now()));
    }

    /// Sends to a random member. Returns `None` if nothing was sent, else the time and the answer,
    /// if any.
    fn request(&mut self, method: &str, key: &str, body: &[u8]) -> Option<(u64, Option<Answer>)> {
        let address = *self.random.choose(&self.shared.members.read().unwrap());
        let client = self.connections.entry(address).or_insert_with(|| Client::new(address));
        client.timeout = Duration::from_millis(self.random.within(TIMEOUT_MS));
        client.connect().ok()?;
        let invoked = self.shared.clock.now();
        Some((invoked, client.request(method, key, body).ok()))
    }

    fn record(&mut self, key: &str, action: Action<String>, invoked: u64, completed: Option<u64>) {
        let operation = Operation { client: self.number, action, invoked, completed };
        self.history.record(key, operation);
    }
}
