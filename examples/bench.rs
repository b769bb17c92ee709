//! A load generator for servers with this HTTP API: the original, this program, or a bare handler as a
//! baseline.
//!
//! ```text
//! cargo run --release --example bench -- here=127.0.0.1:12380
//! cargo run --release --example bench -- original=127.0.0.1:9121 here=127.0.0.1:12380 --rounds 5
//! cargo run --release --example bench -- here=127.0.0.1:12380,127.0.0.1:22380 --reads 90 --rate 5000
//! cargo run --release --example bench -- --bare 127.0.0.1:8080
//! ```
//!
//! Each target is a name and one or more addresses. The connections are spread over the addresses. The
//! targets take turns, round by round, so that other load on the machine affects all of them. The table
//! shows the median of the rounds. Requests are prepared bytes in which only the key's digits change.
//! Latency is measured from the time at which a request should have started. So with `--rate`, a stall
//! of the server counts for every request that had to wait.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

#[path = "bench/bare.rs"]
mod bare;
#[path = "bench/http.rs"]
mod http;
#[path = "bench/load.rs"]
mod load;
#[path = "bench/report.rs"]
mod report;

use load::{Load, Outcome};

const EXAMPLES: &str = "\
Examples:
  bench here=127.0.0.1:12380
  bench here=127.0.0.1:12380,127.0.0.1:22380 --reads 90
  bench before=127.0.0.1:12380 after=127.0.0.1:42380 --rounds 9";

/// The command line.
#[derive(Parser)]
#[command(about = "Puts load on servers with this HTTP API, in turns, and compares them")]
#[command(after_help = EXAMPLES)]
struct Flags {
    /// NAME=ADDRESS[,ADDRESS…]: the servers to measure, in turns.
    #[arg(value_parser = parse_target, required_unless_present = "bare")]
    targets: Vec<Target>,
    /// Connections, each with one request at a time.
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Percentage of GETs.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=100))]
    reads: u8,
    /// Number of keys; each request chooses one at random.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=http::KEYS_MAX))]
    keys: u64,
    /// Bytes of a value.
    #[arg(long, default_value_t = 100)]
    value_bytes: usize,
    /// Requests per second over all connections, however slow the responses [default: each connection
    /// sends the next request after the response].
    #[arg(long)]
    rate: Option<f64>,
    /// Length of a round.
    #[arg(long, default_value = "5s", value_parser = humantime::parse_duration)]
    duration: Duration,
    /// Load before each round that is not measured.
    #[arg(long, default_value = "500ms", value_parser = humantime::parse_duration)]
    warmup: Duration,
    /// Rounds per target.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Threads of the load generator.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// PUT every key once before the first round, so that GETs find values.
    #[arg(long)]
    fill: bool,
    /// GET every acknowledged key after the last round; fail if one is missing.
    #[arg(long)]
    check: bool,
    /// Draw throughput over time, and latency percentiles.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Measure nothing; serve a bare axum handler: 204 to every PUT, a value to every GET.
    #[arg(long, value_name = "ADDRESS", conflicts_with = "targets")]
    bare: Option<SocketAddr>,
}

#[derive(Clone)]
struct Target {
    name: String,
    addresses: Vec<SocketAddr>,
}

fn parse_target(text: &str) -> Result<Target, String> {
    let (name, addresses) = text.split_once('=').ok_or("expected NAME=ADDRESS[,ADDRESS…]")?;
    let addresses: Result<Vec<SocketAddr>, _> =
        addresses.split(',').map(|address| address.parse()).collect();
    let addresses = addresses.map_err(|error| format!("{error}: expected IP:PORT"))?;
    Ok(Target { name: name.to_owned(), addresses })
}

fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    if let Some(address) = flags.bare {
        return bare::serve(address, flags.value_bytes);
    }
    let load = |target: &Target| {
        Arc::new(Load {
            addresses: target.addresses.clone(),
            connections: flags.connections,
            reads: flags.reads,
            keys: flags.keys,
            value_bytes: flags.value_bytes,
            rate: flags.rate,
            warmup: flags.warmup,
            duration: flags.duration,
            threads: flags.threads,
        })
    };
    for target in flags.targets.iter().filter(|_| flags.fill) {
        let bar = bar(&format!("filling {}", target.name), flags.keys);
        let failed = load(target).fill(&bar).context("cannot fill")?;
        bar.finish_and_clear();
        if failed > 0 {
            bail!("{}: {failed} of {} keys could not be written", target.name, flags.keys);
        }
    }
    let mut outcomes: Vec<Vec<Outcome>> = flags.targets.iter().map(|_| Vec::new()).collect();
    for round in 1..=flags.rounds {
        for (target, outcomes) in flags.targets.iter().zip(&mut outcomes) {
            let what = format!("{} {round}/{}", target.name, flags.rounds);
            let bar = bar(&what, (flags.warmup + flags.duration).as_millis() as u64);
            outcomes.push(load(target).run(&bar).with_context(|| target.name.clone())?);
            bar.finish_and_clear();
        }
    }
    let named: Vec<(&str, &[Outcome])> = flags
        .targets
        .iter()
        .map(|target| &*target.name)
        .zip(outcomes.iter().map(|o| &o[..]))
        .collect();
    report::print(&named);
    let is_empty = |outcomes: &[Outcome]| outcomes.iter().all(|it| it.throughput() == 0.0);
    if let Some((name, _)) = named.iter().find(|(_, outcomes)| is_empty(outcomes)) {
        bail!("{name}: no request succeeded, so nothing was measured");
    }
    if let Some(path) = &flags.plot {
        report::plot(&named, path).with_context(|| format!("cannot draw {}", path.display()))?;
    }
    let mut missing = 0;
    for (target, outcomes) in flags.targets.iter().zip(&outcomes).filter(|_| flags.check) {
        let acknowledged = Outcome::acknowledged_in(outcomes);
        let bar = bar(&format!("checking {}", target.name), acknowledged.len() as u64);
        let found = load(target).count(&acknowledged, &bar).context("cannot check")?;
        bar.finish_and_clear();
        println!("{}: {found} of {} acknowledged keys are there", target.name, acknowledged.len());
        missing += acknowledged.len() - found;
    }
    if missing > 0 {
        bail!("{missing} acknowledged keys are missing");
    }
    Ok(())
}

fn bar(what: &str, length: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:20} {bar:40} {percent:>3} %  {per_sec:>14}")
        .expect("the template is valid");
    ProgressBar::new(length).with_style(style).with_message(what.to_owned())
}
