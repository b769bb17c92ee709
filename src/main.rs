//! The program: it wires the parts, starts them, and waits for their end. The twin of the original's
//! main.go.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::error::ErrorKind;
use raftexample::commands::Cli;
use raftexample::config::Config;
use raftexample::error::{Error, Result};
use raftexample::httpapi::{self, HttpKvApi};
use raftexample::kvstore::KvStore;
use raftexample::logging;
use raftexample::ports::admin::{self, Admin};
use raftexample::ports::listener::{BodyBudget, Limits, Port, raise_descriptor_limit, serve};
use raftexample::raft_node::Role;
use slog::{Logger, info};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;

/// The time that a connection may take to close after the last deadline.
const SHUTDOWN_SLACK: Duration = Duration::from_millis(500);

/// The time that the last responses may take to reach the clients after the node has ended.
const LAST_RESPONSES: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    match start() {
        Ok(()) | Err(Error::Removed) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("raftexample: {error}");
            ExitCode::from(if matches!(error, Error::Config(_)) { 2 } else { 1 })
        }
    }
}

/// Runs a command, or a member.
fn start() -> Result<()> {
    let Cli { config, command } = match Cli::read(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error)
            if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) =>
        {
            // A closed pipe after `--help` is not an error.
            let _ = error.print();
            return Ok(());
        }
        Err(error) => return Err(Error::Config(first_line(&error))),
    };
    if let Some(command) = command {
        return command.run();
    }
    config.check()?;
    // Dropping the guard writes the queued log lines, so they come before an error message.
    let (logger, _guard) = logging::logger(config.log_level, config.log_format);
    // With several cores, one is left to the thread that writes the log.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads((cores - 1).max(1)).enable_all().build();
    let runtime = runtime.map_err(|error| Error::Config(format!("cannot start: {error}")))?;
    let result = runtime.block_on(run(config, logger));
    // Threads that still wait for a client or a disk do not delay the end.
    runtime.shutdown_background();
    result
}

/// Runs a member until a signal or an error stops it.
async fn run(config: Config, logger: Logger) -> Result<()> {
    raise_descriptor_limit()?;
    let node_config = config.node_config();
    let metrics = node_config.metrics.clone();
    let election_timeout = config.tick * config.election_ticks as u32;
    let peer_tls = config.peer_tls(metrics.clone(), logger.clone())?;
    let client_tls = config.client_tls(metrics.clone(), logger.clone())?;
    let peer_port = Port::bind(config.peer_address()?, "--cluster", peer_tls).await?;
    let client_port = Port::bind(config.client_address(), "--port", client_tls.clone()).await?;
    let admin_port = match config.admin_address()? {
        Some(address) => Some(Port::bind(address, "--admin", client_tls).await?),
        None => None,
    };

    let (client_address, peer_url) = (config.client_address(), config.own_url());
    info!(logger, "serving keys on {} and peers on {}", client_address, peer_url);

    let (store, node) = KvStore::start(node_config, peer_port, logger.clone());
    let keys = Arc::new(HttpKvApi {
        store: store.clone(),
        ack: config.ack,
        read: config.read,
        request_timeout: config.request_timeout,
        max_value_bytes: config.max_value_bytes,
        budget: BodyBudget::default(),
        metrics: metrics.clone(),
        logger: logger.clone(),
    });
    // Nothing is sent on this channel. Dropping its sender stops the listeners.
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
        cluster: node.cluster.clone(),
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
        _ = &mut server => {
            return Err(Error::Refused("the key-value server ended unexpectedly".into()));
        }
        name = stop_signal() => {
            info!(logger, "received {}, stopping", name);
            None
        }
    };
    // The listeners accept no new connections. Open requests are answered within their deadlines.
    drop(stop_tx);
    if let Some(result) = ended {
        let _ = tokio::time::timeout(LAST_RESPONSES, server).await;
        return result;
    }
    let in_order = async {
        // Otherwise the other members would wait for an election timeout. Waiting requests are
        // answered meanwhile, and then by this member as a follower.
        if status.borrow().role == Role::Leader {
            let _ = store.node().transfer_leadership(Instant::now() + election_timeout).await;
        }
        let _ = server.await;
        if let Some(admin_server) = admin_server {
            let _ = admin_server.await;
        }
        // The connections have dropped their handles. Dropping the last one stops the node.
        drop(store);
        node.await
    };
    tokio::select! {
        result = in_order => result,
        name = stop_signal() => Err(Error::Refused(format!("received {name} again, stopping at once"))),
    }
}

/// Waits for SIGTERM or SIGINT, and returns its name.
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

/// clap's message as one line: its first paragraph, which ends with the possible values.
fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let paragraph = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    let line = paragraph.collect::<Vec<_>>().join(" ");
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}
