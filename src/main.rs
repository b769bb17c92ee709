//! The program: flags, channels, tasks, and waiting for their end. No logic.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::error::ErrorKind;
use raftexample::channels::{ConfChangeRequest, MemberRequest};
use raftexample::commands::Cli;
use raftexample::config::Config;
use raftexample::error::{Error, Result};
use raftexample::httpapi::{self, HttpKvApi};
use raftexample::kvstore::KvStore;
use raftexample::ports::admin::{self, Admin};
use raftexample::ports::listener::{BodyBudget, Limits, Port, bind, raise_descriptor_limit, serve};
use raftexample::raft_node::{Role, new_raft_node};
use raftexample::storage::DiskVfs;
use raftexample::{channels, logging};
use slog::{Logger, info};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// What a connection may take to close after the last deadline.
const SHUTDOWN_SLACK: Duration = Duration::from_millis(500);

/// What the answers of a node that has ended may take to reach the clients.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let Cli { config, command } = match Cli::read(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error)
            if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) =>
        {
            // Whoever asked for help and closed the pipe does not want to hear of it.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&Error::Config(first_line(&error))),
    };
    if let Some(command) = command {
        return command.run().map_or_else(|error| fail(&error), |()| ExitCode::SUCCESS);
    }
    if let Err(error) = config.check() {
        return fail(&error);
    }
    let (logger, guard) = logging::logger(config.log_level, config.log_format);
    // One core is for the thread that writes the log, where there are several.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = match runtime.worker_threads((cores - 1).max(1)).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&Error::Config(format!("cannot start: {error}"))),
    };
    let result = runtime.block_on(run(config, logger));
    // Threads that still wait for a client or a disk do not hold up the end.
    runtime.shutdown_background();
    // Whatever is queued for the log comes before the last line.
    drop(guard);
    match result {
        Ok(()) | Err(Error::Removed) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

/// Runs a member until it is told to stop, or has to.
async fn run(config: Config, logger: Logger) -> Result<()> {
    raise_descriptor_limit()?;
    let node_config = config.node_config();
    let metrics = node_config.metrics.clone();
    let election_timeout = config.tick * config.election_ticks as u32;
    let peer_tls = config.peer_tls(metrics.clone(), logger.clone())?;
    let client_tls = config.client_tls(metrics.clone(), logger.clone())?;
    let peer_port =
        Port { listener: bind(config.peer_address()?, "--cluster").await?, tls: peer_tls };
    let client_listener = bind(config.client_address(), "--port").await?;
    let client_port = Port { listener: client_listener, tls: client_tls.clone() };
    let admin_port = match config.admin_address()? {
        Some(address) => Some(Port { listener: bind(address, "--admin").await?, tls: client_tls }),
        None => None,
    };

    let (client_address, peer_url) = (config.client_address(), config.own_url());
    info!(logger, "serving keys on {} and peers on {}", client_address, peer_url);

    // proposeC, readC and confChangeC carry what clients ask for; commitC what becomes of it.
    let (propose_tx, propose_rx) = mpsc::channel(channels::REQUESTS_MAX);
    let (read_tx, read_rx) = mpsc::channel(channels::REQUESTS_MAX);
    let (conf_change_tx, conf_change_rx) = mpsc::channel(channels::CONF_CHANGES_MAX);
    let (commit_rx, node) = new_raft_node(
        node_config,
        Arc::new(DiskVfs),
        peer_port,
        propose_rx,
        read_rx,
        conf_change_rx,
        logger.clone(),
    );
    let (store, commit_reader) = KvStore::new(propose_tx, read_tx, logger.clone());
    let mut store_done = commit_reader.with_metrics(metrics.clone()).spawn(commit_rx);

    let keys = Arc::new(HttpKvApi {
        store: store.clone(),
        conf_change_tx: conf_change_tx.clone(),
        ack: config.ack.into(),
        read: config.read.into(),
        request_timeout: config.request_timeout,
        max_value_bytes: config.max_value_bytes,
        budget: BodyBudget::default(),
        metrics: metrics.clone(),
        logger: logger.clone(),
    });
    // Nothing is ever sent: dropping the sender stops the listeners.
    let (stop_tx, stop_rx) = watch::channel(());
    let stopped = |mut stop_rx: watch::Receiver<()>| async move {
        let _ = stop_rx.changed().await;
    };
    let shutdown_grace = config.request_timeout + SHUTDOWN_SLACK;
    let mut server = tokio::spawn(serve(
        client_port,
        httpapi::service(keys.clone()),
        Limits { shutdown_grace, ..Limits::default() }.affordable(),
        stopped(stop_rx.clone()),
        logger.clone(),
    ));
    let admin = Admin {
        status: node.status.clone(),
        metrics,
        keys,
        alive_within: 2 * election_timeout.max(Duration::from_secs(1)),
        names: config.admin_name.clone(),
        stopping: stop_rx.clone(),
    };
    let admin_server = admin_port.map(|port| {
        let stopped = stopped(stop_rx);
        let limits = admin::limits(shutdown_grace);
        tokio::spawn(serve(port, admin::service(admin), limits, stopped, logger.clone()))
    });

    let status = node.status.clone();
    let node = node.join();
    tokio::pin!(node);
    let ended = tokio::select! {
        result = &mut node => Some(result),
        result = &mut store_done => {
            // The store also ends when the node does; then the node says why.
            result.unwrap_or_else(|_| Err(panicked("the store")))?;
            Some((&mut node).await)
        }
        _ = &mut server => return Err(panicked("the key-value server")),
        name = stop_signal() => {
            info!(logger, "received {}, stopping", name);
            None
        }
    };
    // No new connections; those that are open are answered within the deadline.
    drop(stop_tx);
    if let Some(result) = ended {
        let _ = tokio::time::timeout(LAST_ANSWERS, server).await;
        return result;
    }
    let in_order = async {
        // The others need not find out by an election timeout that their leader has gone. What waits
        // here is answered meanwhile, and by a follower then.
        if status.borrow().role == Role::Leader {
            hand_over(&conf_change_tx, election_timeout).await;
        }
        let _ = server.await;
        if let Some(admin_server) = admin_server {
            let _ = admin_server.await;
        }
        // The last sender of proposeC is gone with the last connection and this: the node stops.
        drop(store);
        node.await
    };
    tokio::select! {
        result = in_order => result,
        name = stop_signal() => Err(Error::Refused(format!("received {name} again, stopping at once"))),
    }
}

/// Has another voter lead, the one with most of the log of those that live, if there is one that can
/// within `patience`.
async fn hand_over(conf_change_tx: &mpsc::Sender<ConfChangeRequest>, patience: Duration) {
    let (responder, pending) = channels::responder();
    // Not passed on: if another leads already there is nothing to do.
    let request =
        ConfChangeRequest { change: MemberRequest::Lead { to: None }, forwarded: true, responder };
    if conf_change_tx.try_send(request).is_ok() {
        let _ = pending.wait_until(Instant::now() + patience).await;
    }
}

/// Waits for SIGTERM or SIGINT.
async fn stop_signal() -> &'static str {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

fn panicked(who: &str) -> Error {
    Error::Refused(format!("{who} ended unexpectedly"))
}

/// What clap has to say, as one line: its first paragraph, which ends with the values possible.
fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let paragraph = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    let line = paragraph.collect::<Vec<_>>().join(" ");
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

fn fail(error: &Error) -> ExitCode {
    eprintln!("raftexample: {error}");
    ExitCode::from(if matches!(error, Error::Config(_)) { 2 } else { 1 })
}
