//! Resolution of the peers' host names: bounded and cached, because a name server that does not answer
//! blocks a thread for seconds.
//!
//! The addresses of a name are used while newer ones are looked up, which happens at most every
//! [`FRESH`]. Only a name that was never found waits for its lookup. At most [`LOOKUPS_MAX`] lookups block
//! a thread at a time.

use std::collections::HashMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::sync::{Notify, Semaphore};
use tokio::task::spawn_blocking;
use tokio::time::Instant;

/// How long the outcome of a lookup is not looked up again.
const FRESH: Duration = Duration::from_secs(5);
/// Lookups at a time.
const LOOKUPS_MAX: usize = 8;
/// Names that are remembered: more than there can be members.
const NAMES_MAX: usize = 256;

/// Resolves names for all HTTP clients of a transport.
#[derive(Clone)]
pub(super) struct Names(Arc<Shared>);

struct Shared {
    known: Mutex<HashMap<String, Known>>,
    /// Notified after each lookup.
    looked_up: Notify,
    lookups: Semaphore,
    /// Blocks.
    look_up: fn(&str) -> Result<Vec<SocketAddr>, String>,
}

/// What is known of one name.
#[derive(Default)]
struct Known {
    /// The addresses that were found last.
    addresses: Vec<SocketAddr>,
    /// Why the last lookup found none.
    error: String,
    at: Option<Instant>,
    is_looked_up: bool,
}

impl Default for Names {
    fn default() -> Self {
        Self::new(|name| {
            let addresses = (name, 0).to_socket_addrs().map_err(|error| error.to_string())?;
            Ok(addresses.collect())
        })
    }
}

impl Names {
    fn new(look_up: fn(&str) -> Result<Vec<SocketAddr>, String>) -> Self {
        let lookups = Semaphore::new(LOOKUPS_MAX);
        let (known, looked_up) = (Mutex::default(), Notify::new());
        Self(Arc::new(Shared { known, looked_up, lookups, look_up }))
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.0.known.lock().expect("nothing panics under it")
    }

    async fn addresses(&self, name: &str) -> Result<Vec<SocketAddr>, String> {
        loop {
            let looked_up = self.0.looked_up.notified();
            {
                let mut names = self.known();
                if names.len() >= NAMES_MAX {
                    names.retain(|_, known| known.is_looked_up);
                }
                let known = names.entry(name.to_owned()).or_default();
                if !known.is_looked_up && known.at.is_none_or(|at| at.elapsed() >= FRESH) {
                    known.is_looked_up = true;
                    tokio::spawn(self.clone().look_up(name.to_owned()));
                }
                if !known.addresses.is_empty() {
                    return Ok(known.addresses.clone());
                }
                if !known.is_looked_up {
                    return Err(known.error.clone());
                }
            }
            looked_up.await;
        }
    }

    async fn look_up(self, name: String) {
        let _permit = self.0.lookups.acquire().await.expect("the semaphore is never closed");
        let (look_up, asked) = (self.0.look_up, name.clone());
        // An error is a panic, or the end of the runtime.
        let found = spawn_blocking(move || look_up(&asked)).await;
        let found = found.unwrap_or_else(|error| Err(error.to_string()));
        let mut names = self.known();
        let known = names.entry(name).or_default();
        (known.at, known.is_looked_up) = (Some(Instant::now()), false);
        match found {
            Ok(addresses) if !addresses.is_empty() => known.addresses = addresses,
            Ok(_) => known.error = "the name has no address".to_owned(),
            Err(why) => known.error = why,
        }
        drop(names);
        self.0.looked_up.notify_waiters();
    }
}

impl Resolve for Names {
    fn resolve(&self, name: Name) -> Resolving {
        let names = self.clone();
        Box::pin(async move {
            let found = names.addresses(name.as_str()).await?;
            let addresses: Addrs = Box::new(found.into_iter());
            Ok(addresses)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use tokio::time::timeout;

    use super::*;

    static LOOKUPS: AtomicUsize = AtomicUsize::new(0);

    #[tokio::test]
    async fn a_name_is_looked_up_once_however_many_ask() {
        let names = Names::new(|name| {
            LOOKUPS.fetch_add(1, Ordering::SeqCst);
            match name {
                "none" => Ok(Vec::new()),
                _ => Ok(vec![SocketAddr::from(([127, 0, 0, 1], 0))]),
            }
        });
        let (one, two) = tokio::join!(names.addresses("one"), names.addresses("one"));
        assert_eq!((one.expect("found").len(), two.expect("found").len()), (1, 1));
        names.addresses("one").await.expect("known");
        assert_eq!(LOOKUPS.load(Ordering::SeqCst), 1);
        for _ in 0..2 {
            let why = names.addresses("none").await.expect_err("it has none");
            assert!(why.contains("no address"), "{why}");
        }
        assert_eq!(LOOKUPS.load(Ordering::SeqCst), 2, "not found is remembered, too");
    }

    #[tokio::test]
    async fn names_that_nobody_answers_for_hold_up_no_known_one() {
        static IS_BLOCKED: AtomicBool = AtomicBool::new(true);
        let names = Names::new(|name| {
            while name.starts_with("dead") && IS_BLOCKED.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            Ok(vec![SocketAddr::from(([127, 0, 0, 1], 0))])
        });
        names.addresses("alive").await.expect("found");
        for number in 0..3 * LOOKUPS_MAX {
            let names = names.clone();
            tokio::spawn(async move { names.addresses(&format!("dead{number}")).await });
        }
        while names.0.lookups.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        names.known().get_mut("alive").expect("it was found").at = None;
        let known = timeout(Duration::from_secs(20), names.addresses("alive")).await;
        // Before it can fail: the runtime waits for its threads.
        IS_BLOCKED.store(false, Ordering::SeqCst);
        known.expect("in time").expect("its last addresses");
    }
}
