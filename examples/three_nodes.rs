//! Three members in one process: write on 1, read on 3, stop 2, write, restart 2, read there.
//!
//! ```sh
//! cargo run --example three_nodes
//! ```

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use raftexample::channels::{Ack, NodeId};
use raftexample::error::RequestError;
use raftexample::kvstore::{Consistency, KvStore};
use raftexample::raft_node::{NodeConfig, RaftNodeHandle};
use slog::{Discard, Logger, o};
use tokio::net::TcpListener;
use tokio::time::Instant;

/// A running member.
struct Member {
    store: KvStore,
    node: RaftNodeHandle,
}

#[tokio::main]
async fn main() -> Result<()> {
    let dir = tempfile::tempdir()?;
    // Every member's configuration lists all ports, so all are bound before the first start.
    let mut listeners = Vec::new();
    for _ in 0..3 {
        listeners.push(TcpListener::bind("127.0.0.1:0").await?);
    }
    let addresses = listeners.iter().map(TcpListener::local_addr).collect::<Result<Vec<_>, _>>()?;

    let mut members = Vec::new();
    for (id, listener) in (1..).zip(listeners) {
        members.push(start(id, &addresses, listener, dir.path()));
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
    let second = start(2, &addresses, listener, dir.path());
    let value = get(&second).await?;
    println!("restarted 2; it reads {value}");
    ensure!(value == "bar", "a linearizable read sees every acknowledged write");

    members.push(second);
    for Member { store, node } in members {
        drop(store);
        node.join().await?;
    }
    Ok(())
}

fn start(id: NodeId, addresses: &[SocketAddr], listener: TcpListener, dir: &Path) -> Member {
    let cluster: Vec<_> = addresses.iter().map(|address| format!("http://{address}")).collect();
    let url = cluster[id as usize - 1].clone();
    let config = NodeConfig { id, url, cluster, data_dir: dir.into(), ..NodeConfig::default() };
    let (store, node) = KvStore::start(config, listener, Logger::root(Discard, o!()));
    Member { store, node }
}

async fn put(member: &Member, value: &'static str) -> Result<()> {
    member.store.propose(b"/my-key", value.into(), Ack::Committed, soon()).await?;
    Ok(())
}

/// Reads, and retries while there is no leader.
async fn get(member: &Member) -> Result<String> {
    loop {
        match member.store.lookup(b"/my-key", Consistency::Linearizable, soon()).await {
            Ok(value) => {
                return Ok(String::from_utf8(
                    value.context("the key is missing")?.value().to_vec(),
                )?);
            }
            Err(RequestError::Unavailable(why)) => println!("retrying: {why}"),
            Err(error) => return Err(error.into()),
        }
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}
