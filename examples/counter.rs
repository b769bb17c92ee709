//! A replicated counter: every addition returns the total, a snapshot follows every ten, and a restart.
//!
//! ```sh
//! cargo run --example counter
//! ```

use std::io::{self, Read, Write};

use anyhow::{Result, ensure};
use raftexample::raft_node::state_machine::{Entry, Handle, StateMachine, start};
use raftexample::raft_node::{NodeConfig, RaftNodeHandle};
use slog::{Discard, Logger, o};
use tokio::net::TcpListener;

struct Counter(i64);

impl StateMachine for Counter {
    type Output = i64;

    /// Adds the amount in the entry. Bytes that are no amount count as 0, on every member alike.
    fn apply(&mut self, entry: Entry<'_>) -> i64 {
        self.0 += entry.data.try_into().map_or(0, i64::from_le_bytes);
        self.0
    }

    fn snapshot(&self) -> impl FnOnce(&mut dyn Write) -> io::Result<()> + Send + 'static {
        let total = self.0;
        println!("snapshot of {total}");
        move |file| file.write_all(&total.to_le_bytes())
    }

    fn restore(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let mut total = [0; 8];
        from.read_exact(&mut total)?;
        self.0 = i64::from_le_bytes(total);
        println!("restored {}", self.0);
        Ok(())
    }
}

/// Returns the new total.
async fn add(counter: &Handle<Counter>, amount: i64) -> Result<i64> {
    Ok(counter.propose(amount.to_le_bytes().to_vec()).await?)
}

#[tokio::main]
async fn main() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (counter, node) = open(dir.path()).await?;
    for amount in 1..100 {
        add(&counter, amount).await?;
    }
    println!("1 + 2 + … + 100 = {}", add(&counter, 100).await?);
    drop(counter);
    node.join().await?;

    let (counter, node) = open(dir.path()).await?;
    let total = counter.read(|counter| counter.0).await?;
    println!("after a restart: {total}");
    ensure!(total == 5050, "each addition counts once");
    drop(counter);
    Ok(node.join().await?)
}

async fn open(dir: &std::path::Path) -> Result<(Handle<Counter>, RaftNodeHandle)> {
    let config = NodeConfig { data_dir: dir.into(), snapshot_count: 10, ..NodeConfig::default() };
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    Ok(start(config, listener, Counter(0), Logger::root(Discard, o!())))
}
