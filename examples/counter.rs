//! Another state machine on the same raft node: a counter that adds what is proposed.
//!
//! It follows commitC itself, and shows all that a state machine has to do: apply entries, answer
//! their responders, make a snapshot, restore one. A snapshot is due after every tenth entry here, so
//! the restart at the end begins with one.
//!
//! ```sh
//! cargo run --example counter
//! ```

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use bytes::Bytes;
use clap::Parser;
use raftexample::channels::{
    Ack, Acknowledged, Commit, CommittedEntry, Proposal, REQUESTS_MAX, ReadRequest, responder,
};
use raftexample::config::Config;
use raftexample::raft_node::{RaftNodeHandle, new_raft_node};
use raftexample::storage::DiskVfs;
use slog::{Discard, Logger, o};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// A replicated counter.
struct Counter {
    propose_tx: mpsc::Sender<Proposal>,
    read_tx: mpsc::Sender<ReadRequest>,
    total_rx: watch::Receiver<i64>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (counter, node) = start(dir.path()).await?;
    for amount in 1..=100 {
        counter.add(amount).await?;
    }
    println!("1 + 2 + … + 100 = {}", counter.total().await?);
    drop(counter);
    node.join().await?;

    let (counter, node) = start(dir.path()).await?;
    let total = counter.total().await?;
    println!("after a restart: {total}");
    ensure!(total == 5050, "every addition was acknowledged, so it counts, and counts once");
    drop(counter);
    node.join().await?;
    Ok(())
}

impl Counter {
    /// Adds `amount` once.
    async fn add(&self, amount: i64) -> Result<()> {
        let (responder, pending) = responder();
        let data = Bytes::copy_from_slice(&amount.to_le_bytes());
        self.propose_tx.send(Proposal { data, ack: Ack::Committed, responder }).await?;
        pending.wait_until(soon()).await?;
        Ok(())
    }

    /// The total of everything that was added before this call.
    async fn total(&self) -> Result<i64> {
        let (responder, pending) = responder();
        self.read_tx.send(ReadRequest { responder }).await?;
        pending.wait_until(soon()).await?;
        Ok(*self.total_rx.borrow())
    }
}

/// The state machine: everything that happens to the total happens here, in the order of the log.
async fn read_commits(
    mut commit_rx: mpsc::UnboundedReceiver<Commit>,
    total_tx: watch::Sender<i64>,
) -> Result<()> {
    while let Some(commit) = commit_rx.recv().await {
        match commit {
            Commit::Entries { entries, .. } => {
                for CommittedEntry { index, term, data, responder } in entries {
                    // An entry that is no amount counts as 0, on every member alike.
                    let amount = data.as_ref().try_into().map_or(0, i64::from_le_bytes);
                    total_tx.send_modify(|total| *total += amount);
                    if let Some(responder) = responder {
                        responder.answer(Ok(Acknowledged::Applied { index, term }));
                    }
                }
            }
            Commit::Reads(responders) => {
                responders.into_iter().for_each(|responder| responder.answer(Ok(())));
            }
            Commit::Snapshot(request) => {
                let total = *total_tx.borrow();
                println!("snapshot of {total} at index {}", request.index);
                tokio::task::spawn_blocking(move || {
                    (request.save)(&mut |file| file.write_all(&total.to_le_bytes()));
                });
            }
            Commit::Restore(mut snapshot) => {
                let mut total = [0; 8];
                snapshot.reader.read_exact(&mut total)?;
                total_tx.send_replace(i64::from_le_bytes(total));
                println!("restored {} from index {}", *total_tx.borrow(), snapshot.index);
            }
            Commit::Replayed => {}
        }
    }
    Ok(())
}

async fn start(dir: &Path) -> Result<(Counter, RaftNodeHandle)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let flags = ["raftexample", "--snapshot-count", "10", "--snapshot-catch-up-entries", "5"];
    let mut config = Config::try_parse_from(flags)?.node_config();
    config.data_dir = dir.to_owned();

    let (propose_tx, propose_rx) = mpsc::channel(REQUESTS_MAX);
    let (read_tx, read_rx) = mpsc::channel(REQUESTS_MAX);
    let (_, conf_change_rx) = mpsc::channel(1);
    let (commit_rx, node) = new_raft_node(
        config,
        Arc::new(DiskVfs),
        listener,
        propose_rx,
        read_rx,
        conf_change_rx,
        Logger::root(Discard, o!()),
    );
    let (total_tx, total_rx) = watch::channel(0);
    tokio::spawn(read_commits(commit_rx, total_tx));
    Ok((Counter { propose_tx, read_tx, total_rx }, node))
}

/// The deadline of a request.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}
