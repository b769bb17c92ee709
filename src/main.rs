//! The program: it wires the parts, starts them, and waits for their end. The twin of the original's
//! main.go.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::error::ErrorKind;
use raftexample::commands::{Cli, help_for};
use raftexample::config::{Config, one_line};
use raftexample::error::{Error, Result};
use raftexample::httpapi::{self, HttpKvApi};
use raftexample::kvstore::KvStore;
use raftexample::logging::{self, LogLevel};
use raftexample::ports::admin::{self, Admin};
use raftexample::ports::application::{self, Application, Wakeups};
use raftexample::ports::listener::{
    BodyBudget, Limits, Port, ResponseBudget, raise_descriptor_limit, serve,
};
use raftexample::raft_node::{Role, Status};
use sd_notify::{NotifyState, notify};
use slog::{Logger, info, warn};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::{Instant, interval};

/// The longest last line on standard error in bytes.
const ERROR_BYTES_MAX: usize = 4096;

/// The number of the signal for a file that exceeds the limit of the process.
const SIGXFSZ: i32 = 25;

/// The time that a connection may take to close after the last deadline.
const SHUTDOWN_SLACK: Duration = Duration::from_millis(500);

/// The time that the last responses may take to reach the clients after the node has ended.
const LAST_RESPONSES: Duration = Duration::from_secs(1);

/// How often systemd is told what the member is, if that has changed.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    match start() {
        Ok(()) | Err(Error::Removed) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::from(if matches!(error, Error::Config(_)) { 2 } else { 1 })
        }
    }
}

/// Prints the last line on standard error. It is lost if it cannot be written.
fn complain(error: &Error) {
    let line = logging::printable(&format!("raftexample: {error}"), ERROR_BYTES_MAX);
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Runs a command, or a member.
fn start() -> Result<()> {
    let arguments: Vec<_> = std::env::args_os().collect();
    let Cli { config, command } = match Cli::read(arguments.iter().cloned()) {
        Ok(cli) => cli,
        Err(error)
            if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) =>
        {
            // A closed pipe after `--help` is not an error.
            let _ = error.print();
            return Ok(());
        }
        Err(error) => {
            let (why, help) = (one_line(&error), help_for(&arguments));
            return Err(Error::Config(format!("{why}; see {help}")));
        }
    };
    if let Some(command) = command {
        return command.run();
    }
    config.check()?;
    let stop = signals()?;
    // Dropping the guard writes the queued log lines, so they come before an error message.
    let log_level = LogLevel::new(config.log_level);
    let (logger, _guard) = logging::logger(log_level.clone(), config.log_format);
    for warning in &config.warnings {
        warn!(logger, "{}", warning);
    }
    // With several cores, one is left to the thread that writes the log.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads((cores - 1).max(1)).enable_all().build();
    let runtime = runtime.map_err(|error| Error::Config(format!("cannot start: {error}")))?;
    let result = runtime.block_on(run(config, stop, logger, log_level));
    // Threads that still wait for a client or a disk do not delay the end.
    runtime.shutdown_background();
    result
}

/// Runs a member until a signal or an error stops it.
async fn run(
    config: Config,
    stop: oneshot::Receiver<&'static str>,
    logger: Logger,
    log_level: LogLevel,
) -> Result<()> {
    raise_descriptor_limit()?;
    let mut node_config = config.node_config();
    let metrics = node_config.metrics.clone();
    let election_timeout = config.tick * config.election_ticks as u32;
    let peer_tls = config.peer_tls(metrics.clone(), logger.clone())?;
    let client_tls = config.client_tls(metrics.clone(), logger.clone())?;
    let peer_port = Port::bind(config.peer_address()?, "--cluster", peer_tls)?;
    let client_port = Port::bind(config.client_address(), "--port", client_tls.clone())?;
    let admin_port = match config.admin_address()? {
        Some(address) => Some(Port::bind(address, "--admin", client_tls.clone())?),
        None => None,
    };
    if let Some(address) = admin_port.as_ref().and_then(|port| port.address().ok()) {
        node_config.admin_url = config.admin_url(address);
    }
    let application_port = match config.application_address()? {
        Some(address) => Some(Port::bind(address, "--api", client_tls)?),
        None => None,
    };

    // With the real ports, where the flags say 0.
    let bound =
        |port: &Port| port.address().map_or_else(|why| why.to_string(), |it| it.to_string());
    let mut others = String::new();
    for (port, whom) in [(&application_port, "programs"), (&admin_port, "operators")] {
        others += &port.as_ref().map_or("".into(), |port| format!(", {whom} on {}", bound(port)));
    }
    let (clients, peers) = (bound(&client_port), bound(&peer_port));
    info!(logger, "serving keys on {clients}, peers on {peers}{others}");

    let (store, node) = KvStore::start(node_config, peer_port, logger.clone());
    if std::env::var_os("NOTIFY_SOCKET").is_some() {
        tokio::spawn(tell_systemd(node.status.clone()));
    }
    if application_port.is_none() && admin_port.is_none() {
        store.keep_no_changes();
    }
    let api = |port| HttpKvApi {
        port,
        store: store.clone(),
        ack: config.ack,
        read: config.read,
        request_timeout: config.request_timeout,
        max_value_bytes: config.max_value_bytes,
        // One for each port: clients do not keep operators out.
        budget: BodyBudget::default(),
        responses: ResponseBudget::default(),
        names: config.names(),
        metrics: metrics.clone(),
        logger: logger.clone(),
    };
    // Nothing is sent on this channel. Dropping its sender stops the listeners.
    let (stop_tx, stop_rx) = watch::channel(());
    let wakeups = Wakeups::start(store.clone(), metrics.clone(), stop_rx.clone());
    let application = |port, watchers| {
        Arc::new(Application {
            keys: api(port),
            status: node.status.clone(),
            wakeups: wakeups.clone(),
            watchers: Arc::new(Semaphore::new(watchers)),
            stopping: stop_rx.clone(),
        })
    };
    let stopped = |mut stop_rx: watch::Receiver<()>| async move {
        let _ = stop_rx.changed().await;
    };
    let shutdown_grace = config.request_timeout + SHUTDOWN_SLACK;
    let mut server = tokio::spawn(serve(
        client_port,
        httpapi::service(api("client")),
        Limits { shutdown_grace, ..Limits::default() }.affordable(),
        stopped(stop_rx.clone()),
        logger.clone(),
    ));
    let admin = Admin {
        status: node.status.clone(),
        cluster: node.cluster.clone(),
        metrics: metrics.clone(),
        application: application("admin", admin::watchers(&admin::limits(shutdown_grace))),
        alive_within: 2 * election_timeout.max(Duration::from_secs(1)),
        names: config.names(),
        log_level,
        stopping: stop_rx.clone(),
    };
    let application_server = application_port.map(|port| {
        let limits = application::limits(shutdown_grace);
        let watchers = application::watchers(&limits);
        let service = application::service(application("application", watchers));
        let stopped = stopped(stop_rx.clone());
        tokio::spawn(serve(port, service, limits, stopped, logger.clone()))
    });
    let admin_server = admin_port.map(|port| {
        let stopped = stopped(stop_rx.clone());
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
        Ok(name) = stop => {
            info!(logger, "received {}, stopping", name);
            let _ = notify(&[NotifyState::Stopping]);
            None
        }
    };
    // The listeners accept no new connections. Open requests are answered within their deadlines.
    drop(stop_tx);
    let servers = async {
        for server in [Some(server), application_server, admin_server].into_iter().flatten() {
            let _ = server.await;
        }
    };
    if let Some(result) = ended {
        let _ = tokio::time::timeout(LAST_RESPONSES, servers).await;
        return result;
    }
    // Otherwise the other members would wait for an election timeout. Waiting requests are answered
    // meanwhile, and then by this member as a follower.
    if status.borrow().role == Role::Leader {
        let _ = store.node().transfer_leadership(Instant::now() + election_timeout).await;
    }
    servers.await;
    // The connections have dropped their handles. Dropping the last one stops the node.
    drop(store);
    node.await
}

/// Tells systemd, which started this process with `Type=notify`, that the log is replayed, and then what the
/// member is. A service manager that does not listen is no reason to stop.
async fn tell_systemd(mut status: watch::Receiver<Status>) {
    // Before that, the node has no id.
    if status.wait_for(|status| status.id != 0).await.is_err() {
        return;
    }
    let _ = notify(&[NotifyState::Ready]);
    let mut told = String::new();
    // Looked at now and then, because the status changes with every commit.
    let mut looks = interval(STATUS_INTERVAL);
    loop {
        looks.tick().await;
        let line = {
            let Status { role, term, members, .. } = &*status.borrow();
            format!("{role} in term {term}, members: {}", members.urls.len())
        };
        if line != told {
            let _ = notify(&[NotifyState::Status(&line)]);
            told = line;
        }
    }
}

/// Handles signals on a thread of its own, so that nothing that the process waits for holds them up.
/// Returns a channel for the name of the first one, which stops the member in order. A second one ends
/// the process at once.
fn signals() -> Result<oneshot::Receiver<&'static str>> {
    let failed = |error: std::io::Error| Error::Config(format!("cannot handle signals: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    let runtime = runtime.map_err(failed)?;
    let listen = |kind| {
        let _runtime = runtime.enter();
        signal(kind).map_err(failed)
    };
    let (mut terminate, mut interrupt) =
        (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    // Under nohup the terminal may go away.
    let mut hangup = if is_hangup_ignored() { None } else { Some(listen(SignalKind::hangup())?) };
    // Without a handler this one kills the process. With one, the write that is too long fails.
    let too_long = listen(SignalKind::from_raw(SIGXFSZ))?;
    let (stop_tx, stop_rx) = oneshot::channel();
    std::thread::spawn(move || {
        let _too_long = too_long;
        let mut next = move || {
            runtime.block_on(async {
                let hangup = async {
                    match &mut hangup {
                        Some(hangup) => hangup.recv().await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    _ = terminate.recv() => "SIGTERM",
                    _ = interrupt.recv() => "SIGINT",
                    _ = hangup => "SIGHUP",
                }
            })
        };
        // The receiver is gone if the member is ending by itself.
        let _ = stop_tx.send(next());
        let name = next();
        complain(&Error::Refused(format!("received {name} again, stopping at once")));
        std::process::exit(1);
    });
    Ok(stop_rx)
}

/// True if this process was started with SIGHUP ignored; false where that cannot be found out.
fn is_hangup_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let signals = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    signals.is_some_and(|signals| signals & 1 != 0)
}
