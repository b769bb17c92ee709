//! The shortest use of the library: one member; put, get, restart, get.
//!
//! ```sh
//! cargo run --example single_node
//! ```

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use raftexample::channels::{Ack, REQUESTS_MAX};
use raftexample::config::Config;
use raftexample::kvstore::{Consistency, KvStore};
use raftexample::raft_node::{RaftNodeHandle, new_raft_node};
use raftexample::storage::DiskVfs;
use slog::{Discard, Logger, o};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::Instant;

#[tokio::main]
async fn main() -> Result<()> {
    let dir = tempfile::tempdir()?;

    let (store, node) = start(dir.path()).await?;
    let written = store.propose(b"/greeting", "hello".into(), Ack::Committed, soon()).await?;
    println!("put /greeting = hello: {written:?}");
    println!("get /greeting = {}", get(&store).await?);
    // The last handle is gone: proposeC is closed, and the node stops.
    drop(store);
    node.join().await?;
    println!("stopped");

    let (store, node) = start(dir.path()).await?;
    let value = get(&store).await?;
    println!("after a restart: get /greeting = {value}");
    ensure!(value == "hello", "the write was acknowledged, so it has to be there");
    drop(store);
    node.join().await?;
    Ok(())
}

/// Starts the member whose data is in `dir`; nobody else has to know where it listens.
async fn start(dir: &Path) -> Result<(KvStore, RaftNodeHandle)> {
    let logger = Logger::root(Discard, o!());
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let mut config = Config::try_parse_from(["raftexample"])?.node_config();
    config.data_dir = dir.to_owned();

    let (propose_tx, propose_rx) = mpsc::channel(REQUESTS_MAX);
    let (read_tx, read_rx) = mpsc::channel(REQUESTS_MAX);
    // No changes of members here: confChangeC is closed from the start.
    let (_, conf_change_rx) = mpsc::channel(1);
    let vfs = Arc::new(DiskVfs);
    let (commit_rx, node) =
        new_raft_node(config, vfs, listener, propose_rx, read_rx, conf_change_rx, logger.clone());
    let (store, commit_reader) = KvStore::new(propose_tx, read_tx, logger);
    commit_reader.spawn(commit_rx);
    Ok((store, node))
}

async fn get(store: &KvStore) -> Result<String> {
    let value = store.lookup(b"/greeting", Consistency::Linearizable, soon()).await?;
    Ok(String::from_utf8(value.context("the key is missing")?.value().to_vec())?)
}

/// The deadline of a request.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}
