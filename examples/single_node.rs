//! The shortest use of the library: one member; put, get, restart, get.
//!
//! ```sh
//! cargo run --example single_node
//! ```

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use raftexample::channels::Ack;
use raftexample::kvstore::{Consistency, KvStore};
use raftexample::raft_node::{NodeConfig, RaftNodeHandle};
use slog::{Discard, Logger, o};
use tokio::net::TcpListener;
use tokio::time::Instant;

#[tokio::main]
async fn main() -> Result<()> {
    let dir = tempfile::tempdir()?;

    let (store, node) = start(dir.path()).await?;
    let written = store.propose(b"/greeting", "hello".into(), Ack::Committed, soon()).await?;
    println!("put /greeting = hello: {written:?}");
    println!("get /greeting = {}", get(&store).await?);
    // Dropping the last handle closes proposeC, so the node stops.
    drop(store);
    node.join().await?;
    println!("stopped");

    let (store, node) = start(dir.path()).await?;
    let value = get(&store).await?;
    println!("after a restart: get /greeting = {value}");
    ensure!(value == "hello", "an acknowledged write survives");
    drop(store);
    node.join().await?;
    Ok(())
}

/// Starts the member with its data in `dir`. It has no peers, so its port may be any.
async fn start(dir: &Path) -> Result<(KvStore, RaftNodeHandle)> {
    let config = NodeConfig { data_dir: dir.into(), ..NodeConfig::default() };
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    Ok(KvStore::start(config, listener, Logger::root(Discard, o!())))
}

async fn get(store: &KvStore) -> Result<String> {
    let value = store.lookup(b"/greeting", Consistency::Linearizable, soon()).await?;
    Ok(String::from_utf8(value.context("the key is missing")?.value().to_vec())?)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}
