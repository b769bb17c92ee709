//! The server's configuration: the original's four flags with their defaults, and further ones.
//!
//! Every flag can also be set by the environment variable `RAFTEXAMPLE_` with the flag's name, and in
//! the configuration file. A flag takes precedence over its variable, and both over the file. An
//! invalid value gives one line of error and exit status 2.

mod settings;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::error::ContextValue;
use clap::{Arg, ArgAction, CommandFactory, FromArgMatches, Parser};
use hyper::http::uri::Authority;
use slog::{Level, Logger};

use self::settings::Settings;
use crate::channels::Ack;
use crate::error::{Error, Result};
use crate::kvstore::Consistency;
use crate::logging::{LogFormat, level_parser};
use crate::membership::{authority, check_url, is_https};
use crate::metrics::Metrics;
use crate::ports::tls::{Purpose, Tls, TlsFiles};
use crate::raft_node::{ELECTION_TICKS, NodeConfig, SNAPSHOT_COUNT};

/// The largest `--max-value-bytes`: a value must fit into one request to a peer.
const VALUE_BYTES_MAX: usize = 64 << 20;

/// Limits on times, so that computing with them cannot overflow.
const TICK_MIN: Duration = Duration::from_millis(1);
const TICK_MAX: Duration = Duration::from_secs(60);
const REQUEST_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);
const ELECTION_TICKS_MAX: usize = 10_000;

// The headings of `--help`.
const CLUSTER: &str = "Cluster";
const PORTS: &str = "Ports";
const STORAGE: &str = "Storage";
const TLS: &str = "TLS (files are read again when they change)";
const REQUESTS: &str = "Requests";
const TIMERS: &str = "Raft timers";
const LOGGING: &str = "Logging";

/// A small replicated key-value store on raft-rs: the Rust port of etcd's contrib/raftexample.
#[derive(Clone, Debug, Parser)]
#[command(name = "raftexample", version = env!("RAFTEXAMPLE_VERSION"), mut_args(complete))]
pub struct Config {
    /// Id of this member; the first members have the ids 1, 2, … in the order of --cluster
    #[arg(long, help_heading = CLUSTER, default_value_t = 1)]
    pub id: u64,

    /// Peer URLs of the members, comma-separated
    #[arg(
        long,
        value_name = "URLS",
        help_heading = CLUSTER,
        value_delimiter = ',',
        value_parser = peer_url,
        default_value = "http://127.0.0.1:9021"
    )]
    pub cluster: Vec<String>,

    /// Port for clients
    #[arg(long, help_heading = PORTS, default_value_t = 9121)]
    pub port: u16,

    /// Join a running cluster; add this member there first: raftexample member add
    #[arg(long, help_heading = CLUSTER)]
    pub join: bool,

    /// Directory in which raftexample-ID and raftexample-ID-snap are created
    #[arg(long, value_name = "DIR", help_heading = STORAGE, default_value = ".")]
    pub data_dir: PathBuf,

    /// IP address for clients [default: 127.0.0.1 if this member's peer URL is loopback, else 0.0.0.0]
    #[arg(long, value_name = "IP", help_heading = PORTS)]
    pub host: Option<IpAddr>,

    /// Address for operators: probes, metrics, backups, membership, a live page [default: none]
    #[arg(long, value_name = "HOST:PORT", help_heading = PORTS)]
    pub admin: Option<String>,

    /// Address for programs: delete, conditions, transactions, listing, watching, retries [default: none]
    #[arg(long, value_name = "HOST:PORT", help_heading = PORTS)]
    pub api: Option<String>,

    /// Host names that clients and operators call this member by, comma-separated, besides IP addresses,
    /// names without dots and the host of its peer URL; .NAME allows all below it, * any
    #[arg(long, value_name = "NAMES", help_heading = PORTS, value_delimiter = ',')]
    pub allow_host: Vec<String>,

    /// Peer URL of this member [default: URL number ID in --cluster]
    #[arg(long, value_name = "URL", help_heading = CLUSTER, value_parser = peer_url)]
    pub peer_url: Option<String>,

    /// Certificate for peers, PEM; required, with the next two, if peer URLs are https://
    #[arg(long, value_name = "FILE", help_heading = TLS)]
    pub peer_cert: Option<PathBuf>,

    /// Private key of --peer-cert, PEM
    #[arg(long, value_name = "FILE", help_heading = TLS)]
    pub peer_key: Option<PathBuf>,

    /// CA certificates that peers' certificates are verified with, PEM
    #[arg(long, value_name = "FILE", help_heading = TLS)]
    pub peer_ca: Option<PathBuf>,

    /// Certificate for the client, application and admin ports, PEM; it switches TLS on there
    #[arg(long, value_name = "FILE", help_heading = TLS)]
    pub cert: Option<PathBuf>,

    /// Private key of --cert, PEM
    #[arg(long, value_name = "FILE", help_heading = TLS)]
    pub key: Option<PathBuf>,

    /// CA certificates that clients' certificates are verified with, PEM [default: clients need none]
    #[arg(long, value_name = "FILE", help_heading = TLS)]
    pub client_ca: Option<PathBuf>,

    /// Take part again with a directory that lost acknowledged entries; writes may be lost
    #[arg(long, help_heading = CLUSTER)]
    pub lift_quarantine: bool,

    /// Entries between two snapshots; from 10,000 on, more if the last snapshot was large
    #[arg(long, value_name = "ENTRIES", help_heading = STORAGE, default_value_t = SNAPSHOT_COUNT)]
    pub snapshot_count: u64,

    /// Entries kept in the log after a snapshot was made, for members that lag
    #[arg(long, value_name = "ENTRIES", help_heading = STORAGE, default_value_t = 10_000)]
    pub snapshot_catch_up_entries: u64,

    /// When to answer a PUT
    #[arg(long, help_heading = REQUESTS, value_enum, default_value_t)]
    pub ack: Ack,

    /// How to answer a GET without a Raft-Read header
    #[arg(long, help_heading = REQUESTS, value_enum, default_value_t)]
    pub read: Consistency,

    /// Deadline of a client's request
    #[arg(long, value_name = "TIME", help_heading = REQUESTS, value_parser = humantime::parse_duration, default_value = "5s")]
    pub request_timeout: Duration,

    /// Size of the largest value, at most 67108864 (64 MiB)
    #[arg(long, value_name = "BYTES", help_heading = REQUESTS, default_value_t = 16 << 20)]
    pub max_value_bytes: usize,

    /// Length of a tick, the unit of the raft timers
    #[arg(long, value_name = "TIME", help_heading = TIMERS, value_parser = humantime::parse_duration, default_value = "100ms")]
    pub tick: Duration,

    /// Shortest election timeout in ticks; each is drawn at random from N to 2N - 1
    #[arg(long, value_name = "TICKS", help_heading = TIMERS, default_value_t = ELECTION_TICKS)]
    pub election_ticks: usize,

    /// Ticks between two heartbeats of the leader
    #[arg(long, value_name = "TICKS", help_heading = TIMERS, default_value_t = 1)]
    pub heartbeat_ticks: usize,

    /// Least severe level to log
    #[arg(long, value_name = "LEVEL", help_heading = LOGGING, value_parser = level_parser(), default_value = "info")]
    pub log_level: Level,

    /// Format of the log on standard error
    #[arg(long, value_name = "FORMAT", help_heading = LOGGING, value_enum, default_value = "term")]
    pub log_format: LogFormat,

    /// JSON file with ID, Nodes and flags by their long names; flags and variables take precedence
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// The settings of the environment and the file that are in effect.
    #[arg(skip)]
    settings: Settings,

    /// What is odd in the environment, for the log.
    #[arg(skip)]
    pub warnings: Vec<String>,
}

/// A peer URL as people write it: with spaces around it, a slash at its end, or its scheme in capitals.
/// What it has to be is checked later.
fn peer_url(text: &str) -> std::result::Result<String, Infallible> {
    let url = text.trim();
    let url = url.strip_suffix('/').unwrap_or(url);
    Ok(match url.split_once("://") {
        Some((scheme, rest)) => format!("{}://{rest}", scheme.to_ascii_lowercase()),
        None => url.to_owned(),
    })
}

/// The flags that `-h` shows: those that a first cluster needs.
const SHORT_HELP: [&str; 11] = [
    "id",
    "cluster",
    "join",
    "peer_url",
    "port",
    "host",
    "admin",
    "api",
    "data_dir",
    "log_level",
    "config",
];

/// Gives a boolean flag Go's syntax: `--join=false`. Hides what few need from `-h`.
fn complete(flag: Arg) -> Arg {
    let is_short = SHORT_HELP.contains(&flag.get_id().as_str());
    let flag = flag.hide_short_help(!is_short);
    if !matches!(flag.get_action(), ArgAction::SetTrue) {
        return flag;
    }
    flag.action(ArgAction::Set)
        .num_args(0..=1)
        .require_equals(true)
        .value_parser(BoolishValueParser::new())
        .hide_possible_values(true)
        .default_value("false")
        .default_missing_value("true")
}

/// Adds the second dash to flags in Go's style: `-id` becomes `--id`. Arguments after `--` stay as they
/// are.
pub(crate) fn with_two_dashes(
    arguments: impl IntoIterator<Item = OsString>,
) -> impl Iterator<Item = OsString> {
    let is_go_style = |argument: &str| {
        let name = argument.strip_prefix('-').unwrap_or_default();
        name.len() > 1 && name.starts_with(|c: char| c.is_ascii_alphabetic())
    };
    let mut are_flags_over = false;
    arguments.into_iter().map(move |argument| {
        are_flags_over |= argument == "--";
        match argument.to_str() {
            Some(text) if !are_flags_over && is_go_style(text) => format!("-{text}").into(),
            _ => argument,
        }
    })
}

/// Checks a member id and a `--cluster` list.
pub(crate) fn check_members(id: u64, cluster: &[String]) -> Result<()> {
    require(id > 0, "--id must be at least 1")?;
    for (position, url) in cluster.iter().enumerate() {
        let place = position + 1;
        require(!url.is_empty(), format!("--cluster: item {place} is empty: remove a comma"))?;
        check_url(url).map_err(|why| Error::Config(format!("--cluster: {why}")))?;
        let why = format!("--cluster lists {url} twice: give each member its own URL");
        // Host names have no case.
        let is_twice = cluster[..position].iter().any(|other| other.eq_ignore_ascii_case(url));
        require(!is_twice, why)?;
    }
    Ok(())
}

fn require(holds: bool, otherwise: impl Into<String>) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Config(otherwise.into())) }
}

impl Config {
    /// Parses a command line, with the program's name first, and takes settings from the environment and
    /// from the configuration file that either names. Flags may start with one dash, as in Go and so in the original: `-id 1`. The errors are
    /// clap's, which include the requests for help and version, and those of the two.
    pub fn read(
        arguments: impl IntoIterator<Item = OsString>,
        variables: impl Iterator<Item = (OsString, OsString)>,
    ) -> std::result::Result<Self, clap::Error> {
        let arguments: Vec<OsString> = with_two_dashes(arguments).collect();
        // A request for help comes before an error in the environment.
        Self::try_parse_from(&arguments)?;
        let command = Self::command();
        let (environment, warnings) = Settings::from_environment(variables, &command)?;
        let matches = environment.set_defaults(command.clone()).try_get_matches_from(&arguments)?;
        let mut settings = match Self::from_arg_matches(&matches)?.config {
            Some(path) => Settings::read(&path, &command, &environment.used(&matches))?,
            None => Settings::default(),
        };
        settings.extend(environment);
        let matches = settings.set_defaults(command).try_get_matches_from(arguments)?;
        let settings = settings.used(&matches);
        Ok(Self { settings, warnings, ..Self::from_arg_matches(&matches)? })
    }

    /// Checks what clap cannot: ranges, and flags that depend on each other. An error names the variable
    /// or the line in the file that sets the flag.
    pub fn check(&self) -> Result<()> {
        self.check_flags().map_err(|error| match error {
            Error::Config(why) => Error::Config(self.settings.locate(&why)),
            error => error,
        })
    }

    fn check_flags(&self) -> Result<()> {
        let id = self.id;
        check_members(id, &self.cluster)?;
        let length = self.cluster.len() as u64;
        if let Some(url) = &self.peer_url {
            check_url(url).map_err(|why| Error::Config(format!("--peer-url: {why}")))?;
        }
        require(
            self.peer_url.is_some() || id <= length,
            format!(
                "--id {id} has no peer URL: list at least {id} URLs in --cluster, which has {length}, or give --peer-url"
            ),
        )?;
        require(
            self.join || id <= length,
            format!(
                "--id {id} is beyond the {length} first members in --cluster: add --join to join a running cluster"
            ),
        )?;
        let own_url = self.own_url();
        require(
            !self.join || self.cluster.iter().any(|url| *url != own_url),
            "--join requires the URL of another member in --cluster",
        )?;
        let https = is_https(&own_url);
        // Named, so that the error can say where it is set.
        let own = if self.peer_url.is_some() { "--peer-url" } else { "--cluster" };
        if let Some(other) = self.cluster.iter().find(|url| is_https(url) != https) {
            return Err(Error::Config(format!(
                "--cluster has {other}, and {own} this member's {own_url}: use https:// in all URLs or in none"
            )));
        }
        let peer_files = [&self.peer_cert, &self.peer_key, &self.peer_ca];
        require(
            peer_files.iter().all(|path| path.is_some() == https),
            format!(
                "--peer-cert, --peer-key and --peer-ca: give all three if the peer URLs are https://, else none; this member's is {own_url}, of {own}"
            ),
        )?;
        require(self.cert.is_some() == self.key.is_some(), "--cert and --key: give both or none")?;
        require(
            self.client_ca.is_none() || self.cert.is_some(),
            "--client-ca requires --cert and --key",
        )?;
        require(self.snapshot_count > 0, "--snapshot-count must be at least 1")?;
        let bytes = self.max_value_bytes;
        require(
            (1..=VALUE_BYTES_MAX).contains(&bytes),
            format!("--max-value-bytes must be 1 to {VALUE_BYTES_MAX}, not {bytes}"),
        )?;
        require(
            (TICK_MIN..=TICK_MAX).contains(&self.tick),
            format!("--tick must be 1ms to 1min, not {:?}", self.tick),
        )?;
        let (heartbeat, election) = (self.heartbeat_ticks, self.election_ticks);
        require(
            0 < heartbeat && heartbeat < election && election <= ELECTION_TICKS_MAX,
            format!(
                "--election-ticks must be above --heartbeat-ticks and at most {ELECTION_TICKS_MAX}, and --heartbeat-ticks at least 1, not {election} and {heartbeat}"
            ),
        )?;
        require(
            (TICK_MIN..=REQUEST_TIMEOUT_MAX).contains(&self.request_timeout),
            format!("--request-timeout must be 1ms to 1day, not {:?}", self.request_timeout),
        )
    }

    /// This member's peer URL.
    pub fn own_url(&self) -> String {
        let listed = || self.cluster.get(self.id as usize - 1).cloned();
        self.peer_url.clone().or_else(listed).unwrap_or_default()
    }

    /// The address to listen on for peers: host and port of this member's peer URL.
    pub fn peer_address(&self) -> Result<SocketAddr> {
        let url = self.own_url();
        let authority = authority(&url).unwrap_or(&url);
        let failed = |why: String| Error::Config(format!("cannot listen at {url}: {why}"));
        resolve(authority).map_err(failed)
    }

    /// The address to listen on for operators, or `None`. The port must not be open to others without
    /// TLS.
    pub fn admin_address(&self) -> Result<Option<SocketAddr>> {
        let Some(admin) = &self.admin else { return Ok(None) };
        let address = resolve_flag("--admin", admin)?;
        if !address.ip().is_loopback() && self.cert.is_none() {
            return Err(Error::Config(format!(
                "--admin {admin} would let anyone change the cluster: use a loopback address, or give --cert and --key, and --client-ca to authenticate clients"
            )));
        }
        Ok(Some(address))
    }

    /// The URL at which operators reach the admin port that is bound to `address`: with the host of the flag,
    /// or of the peer URL if the port is open on all addresses. Empty if only this machine reaches the port and
    /// the other members may be elsewhere.
    pub fn admin_url(&self, address: SocketAddr) -> String {
        if address.ip().is_loopback() && !is_loopback(&self.own_host()) {
            return String::new();
        }
        let scheme = if self.cert.is_some() { "https" } else { "http" };
        let named = self.admin.as_deref().and_then(|admin| admin.rsplit_once(':'));
        let host = match named {
            Some((host, _)) if !address.ip().is_unspecified() => host.to_owned(),
            _ => match self.own_host() {
                host if host.contains(':') => format!("[{host}]"),
                host => host,
            },
        };
        format!("{scheme}://{host}:{}", address.port())
    }

    /// The address to listen on for programs, or `None`.
    pub fn application_address(&self) -> Result<Option<SocketAddr>> {
        self.api.as_ref().map(|api| resolve_flag("--api", api)).transpose()
    }

    /// The host of this member's peer URL, an IPv6 address without brackets.
    fn own_host(&self) -> String {
        let authority = authority(&self.own_url()).unwrap_or_default().parse::<Authority>();
        let host = authority.map(|authority| authority.host().to_owned()).unwrap_or_default();
        host.trim_matches(['[', ']']).to_owned()
    }

    /// The host names that requests to the ports other than the peer port may call them by.
    pub fn names(&self) -> Vec<String> {
        self.allow_host.iter().cloned().chain([self.own_host()]).collect()
    }

    /// TLS between the members, if the flags name certificates for it.
    pub fn peer_tls(&self, metrics: Metrics, logger: Logger) -> Result<Option<Tls>> {
        let (Some(cert), Some(key)) = (self.peer_cert.clone(), self.peer_key.clone()) else {
            return Ok(None);
        };
        let files = TlsFiles { cert, key, ca: self.peer_ca.clone() };
        let purpose = Purpose::peers(self.id, &self.own_host());
        Tls::new(files, purpose, metrics, logger).map(Some)
    }

    /// TLS for clients and operators, if the flags name a certificate for it.
    pub fn client_tls(&self, metrics: Metrics, logger: Logger) -> Result<Option<Tls>> {
        let (Some(cert), Some(key)) = (self.cert.clone(), self.key.clone()) else {
            return Ok(None);
        };
        let files = TlsFiles { cert, key, ca: self.client_ca.clone() };
        Tls::new(files, Purpose::clients(), metrics, logger).map(Some)
    }

    /// The address to listen on for clients.
    pub fn client_address(&self) -> SocketAddr {
        let is_loopback = is_loopback(&self.own_host());
        let default = if is_loopback { Ipv4Addr::LOCALHOST } else { Ipv4Addr::UNSPECIFIED };
        SocketAddr::new(self.host.unwrap_or(default.into()), self.port)
    }

    /// The configuration of the raft node.
    pub fn node_config(&self) -> NodeConfig {
        NodeConfig {
            id: self.id,
            url: self.own_url(),
            cluster: self.cluster.clone(),
            join: self.join,
            lift_quarantine: self.lift_quarantine,
            data_dir: self.data_dir.clone(),
            snapshot_count: self.snapshot_count,
            snapshot_catch_up_entries: self.snapshot_catch_up_entries,
            tick: self.tick,
            election_ticks: self.election_ticks,
            randomized_election_ticks: self.election_ticks..2 * self.election_ticks,
            heartbeat_ticks: self.heartbeat_ticks,
            request_timeout: self.request_timeout,
            ..NodeConfig::default()
        }
    }
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// clap's message as one line: its first paragraph, which ends with the possible values, and its tips.
pub fn one_line(error: &clap::Error) -> String {
    let mut line = first_paragraph(error);
    if line.contains("'http://") || line.contains("'https://") {
        line.push_str("; separate the URLs of a list by commas, without spaces");
    }
    // clap looks into the commands only if one follows.
    if line.starts_with("unexpected argument '--endpoint") && !line.contains("exists") {
        line.push_str("; it belongs to the commands: raftexample get --endpoint URL KEY");
    }
    line
}

fn first_paragraph(error: &clap::Error) -> String {
    let mut text = error.to_string();
    // A line feed that it quotes does not end the paragraph.
    for (_, quoted) in error.context() {
        if let ContextValue::String(quoted) = quoted
            && quoted.contains('\n')
        {
            text = text.replace(quoted, &quoted.replace('\n', "\\n"));
        }
    }
    let lines = || text.lines().map(str::trim);
    let paragraph = lines().take_while(|line| !line.is_empty());
    let tips = lines().filter_map(|line| line.strip_prefix("tip: "));
    let mut line = paragraph.collect::<Vec<_>>().join(" ");
    for tip in tips {
        line = format!("{line}; {tip}");
    }
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

/// The address that `flag` names.
fn resolve_flag(flag: &str, address: &str) -> Result<SocketAddr> {
    let invalid = |why| Error::Config(format!("{flag} {address:?}: {why}; give HOST:PORT"));
    resolve(address).map_err(invalid)
}

fn resolve(authority: &str) -> std::result::Result<SocketAddr, String> {
    let mut addresses = authority.to_socket_addrs().map_err(|error| error.to_string())?;
    addresses.next().ok_or_else(|| "the host name has no address".into())
}
