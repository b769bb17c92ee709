//! Three members in one process: write on 1, read on 3, stop 2, write, restart 2, read there.
//!
//! ```sh
//! cargo run --example three_nodes
//! ```

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use raftexample::channels::{Ack, NodeId, REQUESTS_MAX};
use raftexample::config::Config;
use raftexample::error::RequestError;
use raftexample::kvstore::{Consistency, KvStore};
use raftexample::raft_node::{RaftNodeHandle, new_raft_node};
use raftexample::storage::DiskVfs;
use slog::{Discard, Logger, o};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// A running member.
struct Member {
    store: KvStore,
    node: RaftNodeHandle,
}

#[tokio::main]
async fn main() -> Result<()> {
    let dir = tempfile::tempdir()?;
    // The members have to know each other's ports before the first of them starts.
    let mut listeners = Vec::new();
    for _ in 0..3 {
        listeners.push(TcpListener::bind("127.0.0.1:0").await?);
    }
    let addresses = listeners.iter().map(TcpListener::local_addr).collect::<Result<Vec<_>, _>>()?;

    let mut members = Vec::new();
    for (id, listener) in (1..).zip(listeners) {
        members.push(start(id, &addresses, listener, dir.path())?);
    }
    put(&members[0], "foo").await?;
    println!("wrote foo on 1; 3 reads {}", get(&members[2]).await?);

    let second = members.remove(1);
    drop(second.store);
    second.node.join().await?;
    println!("stopped 2");

    put(&members[0], "bar").await?;
    println!("wrote bar on 1; 3 reads {}", get(&members[1]).await?);

    let listener = TcpListener::bind(addresses[1]).await?;
    let second = start(2, &addresses, listener, dir.path())?;
    let value = get(&second).await?;
    println!("restarted 2; it reads {value}");
    ensure!(value == "bar", "a linearizable read sees what was acknowledged before it");

    members.push(second);
    for Member { store, node } in members {
        drop(store);
        node.join().await?;
    }
    Ok(())
}

fn start(
    id: NodeId,
    addresses: &[SocketAddr],
    listener: TcpListener,
    dir: &Path,
) -> Result<Member> {
    let urls: Vec<String> = addresses.iter().map(|address| format!("http://{address}")).collect();
    let (id, urls) = (id.to_string(), urls.join(","));
    let flags = ["raftexample", "--id", &id, "--cluster", &urls];
    let mut config = Config::try_parse_from(flags)?.node_config();
    config.data_dir = dir.to_owned();

    let logger = Logger::root(Discard, o!());
    let (propose_tx, propose_rx) = mpsc::channel(REQUESTS_MAX);
    let (read_tx, read_rx) = mpsc::channel(REQUESTS_MAX);
    let (_, conf_change_rx) = mpsc::channel(1);
    let vfs = Arc::new(DiskVfs);
    let (commit_rx, node) =
        new_raft_node(config, vfs, listener, propose_rx, read_rx, conf_change_rx, logger.clone());
    let (store, commit_reader) = KvStore::new(propose_tx, read_tx, logger);
    commit_reader.spawn(commit_rx);
    Ok(Member { store, node })
}

async fn put(member: &Member, value: &'static str) -> Result<()> {
    member.store.propose(b"/my-key", value.into(), Ack::Committed, soon()).await?;
    Ok(())
}

/// Reads, and asks again while there is no leader: a read changes nothing.
async fn get(member: &Member) -> Result<String> {
    loop {
        match member.store.lookup(b"/my-key", Consistency::Linearizable, soon()).await {
            Ok(value) => {
                return Ok(String::from_utf8(
                    value.context("the key is missing")?.value().to_vec(),
                )?);
            }
            Err(RequestError::Unavailable(why)) => println!("asking again: {why}"),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The deadline of a request.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}
