//! Runs the processes of a Procfile, and stops, kills and starts them one by one.
//!
//! ```sh
//! cargo build --release --bins --example procfile
//! target/release/examples/procfile
//! ```
//!
//! A Procfile has one line `name: command line` per process, and comments that begin with `#`. The only
//! argument is the file's path; the default is `Procfile`. Each output line of a process is printed
//! after the process's name. Commands are lines on standard input, see [`COMMANDS`]; the end of the
//! input stops nothing. `quit`, Ctrl-C and SIGTERM stop all processes; repeated, they kill them. If
//! this program is killed with SIGKILL, the processes keep running.

use std::fmt::Display;
use std::io::{BufRead, IsTerminal, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

const COMMANDS: &str = "stop NAME, start NAME, restart NAME, kill NAME, list, quit";

/// The time between SIGTERM and SIGKILL for a process.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

type EventSender = mpsc::UnboundedSender<Event>;

/// An event for the main loop.
enum Event {
    /// A line of standard input.
    Line(String),
    /// A signal that asks this program to stop.
    Stop,
    /// The process at this place of the list has ended, with all of its process group.
    Ended(usize, std::io::Result<ExitStatus>),
}

struct Process {
    name: String,
    command_line: String,
    /// Printed before each of its output lines.
    prefix: String,
    running: Option<Running>,
    /// How its last run ended.
    status: String,
}

struct Running {
    pid: u32,
    /// Signals for its group. Only the task that waits for its end sends them, because the system may
    /// reuse the id after the end.
    signal_tx: mpsc::UnboundedSender<Signal>,
    is_stopping: bool,
    start_again: bool,
}

#[tokio::main]
async fn main() -> Result<()> {
    ensure!(std::env::args().len() <= 2, "usage: procfile [PROCFILE]");
    let path = std::env::args().nth(1).unwrap_or_else(|| "Procfile".into());
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let mut processes = parse(&text).with_context(|| format!("cannot use {path}"))?;

    let (event_tx, mut event_rx) = mpsc::unbounded_channel();
    // A closed terminal and Ctrl-\ stop the processes, too.
    for kind in
        [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()]
    {
        let (mut signals, event_tx) = (signal(kind)?, event_tx.clone());
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                let _ = event_tx.send(Event::Stop);
            }
        });
    }
    // A read of standard input cannot be cancelled. In a thread it does not delay the end.
    let line_tx = event_tx.clone();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().split(b'\n').map_while(|line| line.ok()) {
            let _ = line_tx.send(Event::Line(String::from_utf8_lossy(&line).trim().into()));
        }
    });

    say(format!("type a command: {COMMANDS}"));
    for (place, process) in processes.iter_mut().enumerate() {
        start(process, place, &event_tx);
    }
    let mut is_stopping = false;
    while !is_stopping || processes.iter().any(|process| process.running.is_some()) {
        match event_rx.recv().await.expect("this task holds a sender") {
            Event::Ended(place, status) => {
                let process = &mut processes[place];
                process.status = status.map_or_else(|error| error.to_string(), |s| s.to_string());
                say(format!("{} ended: {}", process.name, process.status));
                let start_again = process.running.take().is_some_and(|ended| ended.start_again);
                if start_again && !is_stopping {
                    start(process, place, &event_tx);
                }
            }
            Event::Line(line) if line != "quit" => {
                if !is_stopping {
                    obey(&line, &mut processes, &event_tx).unwrap_or_else(say);
                }
            }
            Event::Line(_) | Event::Stop => {
                let signal = if is_stopping { Signal::SIGKILL } else { Signal::SIGTERM };
                is_stopping = true;
                for running in processes.iter().filter_map(|process| process.running.as_ref()) {
                    let _ = running.signal_tx.send(signal);
                }
            }
        }
    }
    Ok(())
}

/// Parses a Procfile.
fn parse(text: &str) -> Result<Vec<Process>> {
    let mut processes: Vec<Process> = Vec::new();
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (name, command_line) = line.split_once(':').unwrap_or_default();
        let (name, command_line) = (name.trim().to_owned(), command_line.trim().to_owned());
        if name.is_empty() || name.contains(char::is_whitespace) || command_line.is_empty() {
            bail!("line {number} is not `name: command line`");
        }
        if processes.iter().any(|process| process.name == name) {
            bail!("line {number} repeats the name {name}: give each process its own");
        }
        let prefix = prefix(&name, processes.len());
        let status = "never started".into();
        processes.push(Process { name, command_line, prefix, running: None, status });
    }
    ensure!(!processes.is_empty(), "it names no process: write a line `name: command line`");
    Ok(processes)
}

fn prefix(name: &str, place: usize) -> String {
    let is_plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    if is_plain || !std::io::stdout().is_terminal() {
        return format!("{name} | ");
    }
    // Cyan, yellow, green, magenta, blue, red.
    let colour = [36, 33, 32, 35, 34, 31][place % 6];
    format!("\x1b[{colour}m{name} | \x1b[0m")
}

/// Runs the command in a line of standard input.
fn obey(line: &str, processes: &mut [Process], event_tx: &EventSender) -> Result<()> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let (command, name) = match words[..] {
        [] => return Ok(()),
        ["list"] => {
            for Process { name, running, status, .. } in processes {
                match running {
                    Some(running) => say(format!("{name}: pid {}", running.pid)),
                    None => say(format!("{name}: stopped, {status}")),
                }
            }
            return Ok(());
        }
        [command @ ("stop" | "start" | "restart" | "kill"), name] => (command, name),
        _ => bail!("{line:?} is no command; these are: {COMMANDS}"),
    };
    let Some(place) = processes.iter().position(|process| process.name == name) else {
        bail!("no process is named {name:?}, see `list`; the commands are: {COMMANDS}");
    };
    match (&mut processes[place].running, command) {
        (None, "start" | "restart") => start(&mut processes[place], place, event_tx),
        (None, _) => bail!("{name} is stopped already"),
        (Some(running), "start") => {
            ensure!(running.is_stopping, "{name} runs already, pid {}", running.pid);
            running.start_again = true;
        }
        (Some(running), _) => {
            running.is_stopping = true;
            running.start_again = command == "restart";
            let signal = if command == "kill" { Signal::SIGKILL } else { Signal::SIGTERM };
            let _ = running.signal_tx.send(signal);
        }
    }
    Ok(())
}

/// Starts a process in its own process group: Ctrl-C in the terminal reaches only this program, and a
/// signal reaches all that the process's shell started. On SIGTERM the shell waits for its child and
/// ends with the child's status.
fn start(process: &mut Process, place: usize, event_tx: &EventSender) {
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("trap 'exit $?' TERM\n{}", process.command_line));
    command.process_group(0).kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            process.status = format!("cannot start: {error}");
            return say(format!("{}: {}", process.name, process.status));
        }
    };
    let pid = child.id().expect("the process has not been waited for");
    say(format!("{} started, pid {pid}", process.name));
    let (signal_tx, signal_rx) = mpsc::unbounded_channel();
    let (prefix, event_tx) = (process.prefix.clone(), event_tx.clone());
    tokio::spawn(async move {
        let status = attend(child, Pid::from_raw(pid as i32), prefix, signal_rx).await;
        let _ = event_tx.send(Event::Ended(place, status));
    });
    process.running = Some(Running { pid, signal_tx, is_stopping: false, start_again: false });
}

/// Relays a process's output, and signals to its group, until all of the group has ended.
async fn attend(
    mut child: Child,
    group: Pid,
    prefix: String,
    mut signal_rx: mpsc::UnboundedReceiver<Signal>,
) -> std::io::Result<ExitStatus> {
    let stdout = child.stdout.take().map(|output| tokio::spawn(relay(output, prefix.clone())));
    let stderr = child.stderr.take().map(|output| tokio::spawn(relay(output, prefix)));
    let mut kill_at = None;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            Some(signal) = signal_rx.recv() => {
                // An error means that the group has ended.
                let _ = killpg(group, signal);
                kill_at = kill_at.or(Some(Instant::now() + STOP_TIMEOUT));
            }
            () = sleep_until(kill_at.unwrap_or_else(Instant::now)), if kill_at.is_some() => {
                let _ = killpg(group, Signal::SIGKILL);
                kill_at = None;
            }
        }
    };
    // The shell may end before its children. They hold the pipes open until they end.
    let is_killed = status.as_ref().is_ok_and(|status| status.signal() == Some(9));
    let _ = killpg(group, if is_killed { Signal::SIGKILL } else { Signal::SIGTERM });
    let written = async {
        for output in [stdout, stderr].into_iter().flatten() {
            let _ = output.await;
        }
    };
    tokio::select! {
        () = written => {}
        () = async { while signal_rx.recv().await.is_some_and(|s| s != Signal::SIGKILL) {} } => {}
        () = sleep_until(kill_at.unwrap_or_else(|| Instant::now() + STOP_TIMEOUT)) => {}
    }
    let _ = killpg(group, Signal::SIGKILL);
    status
}

async fn relay(output: impl AsyncRead + Unpin, prefix: String) {
    let mut lines = BufReader::new(output).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        print(&prefix, &line);
    }
}

fn say(what: impl Display) {
    print("procfile | ", what.to_string().as_bytes());
}

/// Prints a line with one write, so that lines do not mix.
fn print(prefix: &str, line: &[u8]) {
    // The processes keep running if standard output is closed.
    let _ = std::io::stdout().lock().write_all(&[prefix.as_bytes(), line, b"\n"].concat());
}
