//! The command line: the original's four flags with its defaults, and ours.
//!
//! Every flag has an environment twin, `RAFTEXAMPLE_` and its name; the flag wins, and both win over
//! the configuration file. What cannot be used gives one line and exit status 2.

mod file;

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, ValueEnum};
use hyper::http::uri::Authority;
use slog::Logger;

use self::file::File;
use crate::channels::Ack;
use crate::error::{Error, Result};
use crate::kvstore::Consistency;
use crate::membership::{authority, check_url, is_https};
use crate::metrics::Metrics;
use crate::ports::tls::{Tls, TlsFiles};
use crate::raft_node::{NodeConfig, SNAPSHOT_COUNT};

/// The largest `--max-value-bytes`: a value has to fit into one peer request with room to spare.
const VALUE_BYTES_MAX: usize = 64 << 20;

/// Bounds that keep the arithmetic on times far from its end, and every sensible value inside.
const TICK_MIN: Duration = Duration::from_millis(1);
const TICK_MAX: Duration = Duration::from_secs(60);
const REQUEST_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);
const ELECTION_TICKS_MAX: usize = 10_000;

/// A small replicated key-value store on raft-rs: the Rust port of etcd's contrib/raftexample.
#[derive(Clone, Debug, Parser)]
#[command(name = "raftexample", version)]
pub struct Config {
    /// Member id; member I of the first members listens for its peers at the I-th URL of --cluster
    #[arg(long, default_value_t = 1, env = "RAFTEXAMPLE_ID")]
    pub id: u64,

    /// Peer URLs of the members, separated by commas
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "http://127.0.0.1:9021",
        env = "RAFTEXAMPLE_CLUSTER"
    )]
    pub cluster: Vec<String>,

    /// Port of the key-value server
    #[arg(long, default_value_t = 9121, env = "RAFTEXAMPLE_PORT")]
    pub port: u16,

    /// Join a cluster that runs already, after POST /ID on one of its members
    #[arg(
        long,
        num_args = 0..=1,
        require_equals = true,
        default_value = "false",
        default_missing_value = "true",
        hide_possible_values = true,
        value_parser = BoolishValueParser::new(),
        action = ArgAction::Set,
        env = "RAFTEXAMPLE_JOIN"
    )]
    pub join: bool,

    /// Where the directories raftexample-ID and raftexample-ID-snap are made
    #[arg(long, default_value = ".", env = "RAFTEXAMPLE_DATA_DIR")]
    pub data_dir: PathBuf,

    /// Address of the key-value server [default: loopback while this member's peer URL is, else all]
    #[arg(long, env = "RAFTEXAMPLE_HOST")]
    pub host: Option<IpAddr>,

    /// Address of the admin listener: health, status, metrics, a live page; none unless given
    #[arg(long, value_name = "HOST:PORT", env = "RAFTEXAMPLE_ADMIN")]
    pub admin: Option<String>,

    /// Names by which the admin listener may be called, beside localhost and addresses
    #[arg(long, value_delimiter = ',', env = "RAFTEXAMPLE_ADMIN_NAME")]
    pub admin_name: Vec<String>,

    /// This member's own peer URL [default: the ID-th of --cluster]
    #[arg(long, env = "RAFTEXAMPLE_PEER_URL")]
    pub peer_url: Option<String>,

    /// This member's certificate for the others, PEM; with it and the next two, https:// in --cluster
    #[arg(long, env = "RAFTEXAMPLE_PEER_CERT")]
    pub peer_cert: Option<PathBuf>,

    /// The private key of --peer-cert, PEM
    #[arg(long, env = "RAFTEXAMPLE_PEER_KEY")]
    pub peer_key: Option<PathBuf>,

    /// The authorities whose certificates members have, PEM
    #[arg(long, env = "RAFTEXAMPLE_PEER_CA")]
    pub peer_ca: Option<PathBuf>,

    /// The certificate of the key-value server and of the admin listener, PEM: they speak TLS with it
    #[arg(long, env = "RAFTEXAMPLE_CERT")]
    pub cert: Option<PathBuf>,

    /// The private key of --cert, PEM
    #[arg(long, env = "RAFTEXAMPLE_KEY")]
    pub key: Option<PathBuf>,

    /// The authorities whose certificates clients need, PEM [default: clients need none]
    #[arg(long, env = "RAFTEXAMPLE_CLIENT_CA")]
    pub client_ca: Option<PathBuf>,

    /// Cluster id, decimal or 0x… [default: derived from the first --cluster list]
    #[arg(long, value_parser = parse_cluster_id, env = "RAFTEXAMPLE_CLUSTER_ID")]
    pub cluster_id: Option<u64>,

    /// Entries between two snapshots; from 10,000 on, more if the last one was large
    #[arg(long, default_value_t = SNAPSHOT_COUNT, env = "RAFTEXAMPLE_SNAPSHOT_COUNT")]
    pub snapshot_count: u64,

    /// Entries kept behind a snapshot for members that are a little behind
    #[arg(long, default_value_t = 10_000, env = "RAFTEXAMPLE_SNAPSHOT_CATCH_UP_ENTRIES")]
    pub snapshot_catch_up_entries: u64,

    /// When a PUT is answered: once it is committed and applied, or, as the original, once proposed
    #[arg(long, value_enum, default_value = "committed", env = "RAFTEXAMPLE_ACK")]
    pub ack: AckFlag,

    /// How current a GET is; the original's is local
    #[arg(long, value_enum, default_value = "linearizable", env = "RAFTEXAMPLE_READ")]
    pub read: ReadFlag,

    /// Deadline of a client's request
    #[arg(long, value_parser = humantime::parse_duration, default_value = "5s", env = "RAFTEXAMPLE_REQUEST_TIMEOUT")]
    pub request_timeout: Duration,

    /// The largest value in bytes, 64 MiB at most
    #[arg(long, default_value_t = 16 << 20, env = "RAFTEXAMPLE_MAX_VALUE_BYTES")]
    pub max_value_bytes: usize,

    /// Length of a tick
    #[arg(long, value_parser = humantime::parse_duration, default_value = "100ms", env = "RAFTEXAMPLE_TICK")]
    pub tick: Duration,

    /// Ticks without a leader before an election; a member alone does not wait
    #[arg(long, default_value_t = 10, env = "RAFTEXAMPLE_ELECTION_TICKS")]
    pub election_ticks: usize,

    /// Ticks between heartbeats
    #[arg(long, default_value_t = 1, env = "RAFTEXAMPLE_HEARTBEAT_TICKS")]
    pub heartbeat_ticks: usize,

    /// What is logged
    #[arg(long, value_enum, default_value = "info", env = "RAFTEXAMPLE_LOG_LEVEL")]
    pub log_level: LogLevel,

    /// How it is logged, to standard error
    #[arg(long, value_enum, default_value = "term", env = "RAFTEXAMPLE_LOG_FORMAT")]
    pub log_format: LogFormat,

    /// A JSON file with ID, Nodes and flags by their long names, for what is not set otherwise
    #[arg(long, value_name = "FILE", env = "RAFTEXAMPLE_CONFIG")]
    pub config: Option<PathBuf>,

    /// What of it is used.
    #[arg(skip)]
    file: Option<File>,
}

/// The values of `--ack`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AckFlag {
    /// After commit and apply.
    Committed,
    /// After handing the write to raft: it may be lost.
    Proposed,
}

/// The values of `--read`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReadFlag {
    /// Sees every acknowledged write.
    Linearizable,
    /// Sees this member's map, which may be old.
    Local,
}

/// The values of `--log-level`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
}

/// The values of `--log-format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Term,
    /// One JSON object a line.
    Json,
}

pub(crate) fn parse_cluster_id(text: &str) -> std::result::Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    match parsed {
        Ok(0) => Err("0 is no cluster id".into()),
        Ok(cluster_id) => Ok(cluster_id),
        Err(error) => Err(error.to_string()),
    }
}

/// Gives each flag that is written as Go's may be, `-id`, its second dash. What follows a `--` is no
/// flag.
pub(crate) fn with_two_dashes(
    arguments: impl IntoIterator<Item = OsString>,
) -> impl Iterator<Item = OsString> {
    let is_go_style = |argument: &str| {
        argument.len() > 2
            && argument.starts_with('-')
            && argument[1..].starts_with(|c: char| c.is_ascii_alphabetic())
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

/// Checks an id, and the list of the first members.
///
/// # Errors
/// [`Error::Config`] with one line.
pub(crate) fn check_members(id: u64, cluster: &[String]) -> Result<()> {
    let refuse = |why: String| Err(Error::Config(why));
    if id == 0 {
        return refuse("--id 0 is no member id: ids start at 1".into());
    }
    for (position, url) in cluster.iter().enumerate() {
        check_url(url).map_err(|why| Error::Config(format!("--cluster: {why}")))?;
        if cluster[..position].contains(url) {
            return refuse(format!("--cluster names {url} twice: each member has its own"));
        }
    }
    Ok(())
}

impl Config {
    /// Reads a command line, the program's name first, and the file that it may name. Go's flags, and
    /// so the original's, may begin with one dash: `-id 1`; here they have no other meaning.
    ///
    /// # Errors
    /// What clap has to say, help and version included; what is wrong in the file, and in which line.
    pub fn read(
        arguments: impl IntoIterator<Item = OsString>,
    ) -> std::result::Result<Self, clap::Error> {
        let arguments: Vec<OsString> = with_two_dashes(arguments).collect();
        let config = Self::try_parse_from(&arguments)?;
        let Some(path) = &config.config else { return Ok(config) };
        let command = Self::command();
        let mut file = File::read(path, &command)?;
        let matches = file.set_defaults(command.clone()).try_get_matches_from(arguments)?;
        file.retain_used(&command, &matches);
        Ok(Self { file: Some(file), ..Self::from_arg_matches(&matches)? })
    }

    /// Checks what clap cannot: that the flags fit together.
    ///
    /// # Errors
    /// [`Error::Config`] with one line, and the place in the file if a flag was set there.
    pub fn check(&self) -> Result<()> {
        self.check_flags().map_err(|error| match (error, &self.file) {
            (Error::Config(why), Some(file)) => Error::Config(file.locate(&why)),
            (error, _) => error,
        })
    }

    fn check_flags(&self) -> Result<()> {
        let require =
            |holds: bool, why: String| if holds { Ok(()) } else { Err(Error::Config(why)) };
        let id = self.id;
        check_members(id, &self.cluster)?;
        let length = self.cluster.len() as u64;
        match &self.peer_url {
            Some(url) => {
                check_url(url).map_err(|why| Error::Config(format!("--peer-url: {why}")))?;
            }
            None => require(
                id <= length,
                format!(
                    "--id {id} has no peer URL: --cluster lists {length}; add the {id}-th or give --peer-url"
                ),
            )?,
        }
        require(
            self.join || id <= length,
            format!("--id {id} is none of the {length} first members in --cluster: add --join"),
        )?;
        require(
            !self.join || self.cluster.iter().any(|url| *url != self.own_url()),
            "--join needs the URL of a member in --cluster".into(),
        )?;
        let (own_url, https) = (self.own_url(), is_https(&self.own_url()));
        if let Some(other) = self.cluster.iter().find(|url| is_https(url) != https) {
            let why = format!(
                "--cluster: {other} and this member's {own_url} have to begin alike: all with https:// or none"
            );
            return Err(Error::Config(why));
        }
        let peer_files = [&self.peer_cert, &self.peer_key, &self.peer_ca];
        let given = peer_files.iter().filter(|path| path.is_some()).count();
        require(
            given == if https { peer_files.len() } else { 0 },
            format!(
                "--peer-cert, --peer-key and --peer-ca go with https:// in --cluster: all of them or none; this member's URL is {own_url}"
            ),
        )?;
        require(
            self.cert.is_some() == self.key.is_some(),
            "--cert and --key: give both or none".into(),
        )?;
        require(
            self.client_ca.is_none() || self.cert.is_some(),
            "--client-ca needs --cert and --key".into(),
        )?;
        require(self.snapshot_count > 0, "--snapshot-count 0: it is 1 at least".into())?;
        require(
            (1..=VALUE_BYTES_MAX).contains(&self.max_value_bytes),
            format!("--max-value-bytes {}: it is 1 to {VALUE_BYTES_MAX}", self.max_value_bytes),
        )?;
        require(
            (TICK_MIN..=TICK_MAX).contains(&self.tick),
            format!("--tick {:?}: it is 1ms to 1min", self.tick),
        )?;
        require(
            self.heartbeat_ticks > 0
                && self.election_ticks > self.heartbeat_ticks
                && self.election_ticks <= ELECTION_TICKS_MAX,
            format!(
                "--election-ticks {} has to be more than --heartbeat-ticks {}, that more than 0, and neither more than {ELECTION_TICKS_MAX}",
                self.election_ticks, self.heartbeat_ticks
            ),
        )?;
        require(
            (TICK_MIN..=REQUEST_TIMEOUT_MAX).contains(&self.request_timeout),
            format!("--request-timeout {:?}: it is 1ms to 1day", self.request_timeout),
        )
    }

    /// Where this member listens for its peers, as the others know it.
    pub fn own_url(&self) -> String {
        let listed = || self.cluster.get(self.id as usize - 1).cloned();
        self.peer_url.clone().or_else(listed).unwrap_or_default()
    }

    /// The address to listen on for peers: the host and port of this member's URL.
    ///
    /// # Errors
    /// [`Error::Config`] if the host cannot be resolved.
    pub fn peer_address(&self) -> Result<SocketAddr> {
        let url = self.own_url();
        let authority = authority(&url).unwrap_or(&url);
        let failed = |why: String| Error::Config(format!("cannot listen at {url}: {why}"));
        resolve(authority).map_err(failed)
    }

    /// The address to listen on for those who run the cluster, if that is wanted.
    ///
    /// # Errors
    /// [`Error::Config`] if it cannot be resolved, or may not be listened on.
    pub fn admin_address(&self) -> Result<Option<SocketAddr>> {
        let Some(admin) = &self.admin else { return Ok(None) };
        let address = resolve(admin)
            .map_err(|why| Error::Config(format!("--admin {admin:?}: {why}; write HOST:PORT")))?;
        if !address.ip().is_loopback() && self.cert.is_none() {
            return Err(Error::Config(format!(
                "--admin {admin}: whoever reaches it may change the cluster, so it has to be a loopback address, or to have --cert and --key, and best --client-ca"
            )));
        }
        Ok(Some(address))
    }

    /// The host of this member's peer URL, without the brackets of IPv6.
    fn own_host(&self) -> String {
        let authority = authority(&self.own_url()).unwrap_or_default().parse::<Authority>();
        let host = authority.map(|authority| authority.host().to_owned()).unwrap_or_default();
        host.trim_matches(['[', ']']).to_owned()
    }

    /// TLS between the members, where the flags name certificates for it.
    ///
    /// # Errors
    /// [`Error::Config`] naming the flag, the file and what is wrong with it.
    pub fn peer_tls(&self, metrics: Metrics, logger: Logger) -> Result<Option<Tls>> {
        let (Some(cert), Some(key)) = (self.peer_cert.clone(), self.peer_key.clone()) else {
            return Ok(None);
        };
        let files = TlsFiles { cert, key, ca: self.peer_ca.clone() };
        Tls::peers(files, self.id, &self.own_host(), metrics, logger).map(Some)
    }

    /// TLS for clients, where the flags name a certificate for it.
    ///
    /// # Errors
    /// [`Error::Config`] naming the flag, the file and what is wrong with it.
    pub fn client_tls(&self, metrics: Metrics, logger: Logger) -> Result<Option<Tls>> {
        let (Some(cert), Some(key)) = (self.cert.clone(), self.key.clone()) else {
            return Ok(None);
        };
        let files = TlsFiles { cert, key, ca: self.client_ca.clone() };
        Tls::clients(files, metrics, logger).map(Some)
    }

    /// The address to listen on for clients.
    pub fn client_address(&self) -> SocketAddr {
        let host = self.own_host();
        let is_loopback =
            host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
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
            cluster_id: self.cluster_id,
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

fn resolve(authority: &str) -> std::result::Result<SocketAddr, String> {
    let mut addresses = authority.to_socket_addrs().map_err(|error| error.to_string())?;
    addresses.next().ok_or_else(|| "the host has no address".into())
}

impl From<AckFlag> for Ack {
    fn from(flag: AckFlag) -> Self {
        match flag {
            AckFlag::Committed => Ack::Committed,
            AckFlag::Proposed => Ack::Proposed,
        }
    }
}

impl From<ReadFlag> for Consistency {
    fn from(flag: ReadFlag) -> Self {
        match flag {
            ReadFlag::Linearizable => Consistency::Linearizable,
            ReadFlag::Local => Consistency::Local,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(flags: &str) -> std::result::Result<Config, String> {
        let flags = std::iter::once("raftexample").chain(flags.split_whitespace());
        let config = Config::try_parse_from(flags).map_err(|error| error.to_string())?;
        config.check().map_err(|error| error.to_string())?;
        Ok(config)
    }

    #[test]
    fn flags_may_be_written_as_go_writes_them() {
        let read = |flags: &str| {
            let flags = std::iter::once("raftexample").chain(flags.split_whitespace());
            Config::read(flags.map(OsString::from)).expect("the flags are known")
        };
        let config = read("-id 2 -port=7 --join=true -cluster http://a:1,http://b:2");
        assert_eq!((config.id, config.port, config.join), (2, 7, true));
        assert!(read("-join").join && read("--join").join && !read("--join=false").join);
    }

    const THREE: &str = "--cluster http://127.0.0.1:1,http://127.0.0.1:2,http://127.0.0.1:3";

    #[test]
    fn the_defaults_are_the_originals() {
        let config = config("").expect("the defaults can be used");
        assert_eq!(config.id, 1);
        assert_eq!(config.own_url(), "http://127.0.0.1:9021");
        assert_eq!(config.client_address().to_string(), "127.0.0.1:9121");
        assert!(!config.join);
    }

    #[test]
    fn a_node_without_flags_has_the_default_configuration() {
        let metrics = Metrics::default();
        let shown = |config| {
            let metrics = metrics.clone();
            format!("{:?}", NodeConfig { boot: 1, incarnation: 1, metrics, ..config })
        };
        let config = config("").expect("the defaults can be used");
        assert_eq!(shown(config.node_config()), shown(NodeConfig::default()));
    }

    #[test]
    fn flags_that_do_not_fit_together_are_named() {
        for (flags, named) in [
            ("--id 0".into(), "ids start at 1"),
            (format!("{THREE} --id 4"), "--id 4 has no peer URL"),
            (format!("{THREE} --id 4 --peer-url http://127.0.0.1:4"), "add --join"),
            ("--cluster 127.0.0.1:1".into(), "http://"),
            ("--cluster http://127.0.0.1".into(), "names no port"),
            ("--cluster http://a:1,http://a:1".into(), "twice"),
            ("--join".into(), "--join needs"),
            ("--cluster https://a:1,http://b:2".into(), "begin alike"),
            ("--id 2 --cluster https://a:1,http://b:2".into(), "begin alike"),
            ("--id 2 --cluster http://a:1 --join --peer-url https://b:2".into(), "begin alike"),
            ("--cluster https://a:1".into(), "--peer-cert, --peer-key and --peer-ca"),
            ("--cluster https://a:1 --peer-cert c --peer-key k".into(), "all of them or none"),
            ("--peer-cert c --peer-key k --peer-ca a".into(), "all of them or none"),
            ("--peer-ca a".into(), "all of them or none"),
            ("--cert c".into(), "--cert and --key"),
            ("--key k".into(), "--cert and --key"),
            ("--client-ca a".into(), "--client-ca needs"),
            ("--election-ticks 1".into(), "--election-ticks 1"),
            ("--max-value-bytes 99999999999".into(), "--max-value-bytes"),
            ("--snapshot-count 0".into(), "--snapshot-count"),
            ("--tick 100000000000years".into(), "--tick"),
            ("--request-timeout 300000000000years".into(), "--request-timeout"),
            ("--request-timeout 0s".into(), "--request-timeout"),
            ("--election-ticks 9223372036854775808".into(), "--election-ticks"),
            ("--cluster-id 0".into(), "0 is no cluster id"),
            ("--port 99999".into(), "99999"),
        ] {
            let error = config(&flags).expect_err(&flags);
            assert!(error.contains(named), "{flags}: {error}");
        }
    }

    #[test]
    fn the_client_port_is_open_to_others_only_if_the_peer_port_is() {
        let address = |flags: &str| config(flags).expect(flags).client_address().ip().to_string();
        assert_eq!(address("--cluster http://localhost:1"), "127.0.0.1");
        assert_eq!(address("--cluster http://[::1]:1"), "127.0.0.1");
        assert_eq!(address("--cluster http://192.0.2.1:1"), "0.0.0.0");
        let certificates = "--peer-cert c --peer-key k --peer-ca a";
        let address_with = |flags: &str| address(&format!("{flags} {certificates}"));
        assert_eq!(address_with("--cluster https://[::1]:1"), "127.0.0.1");
        assert_eq!(address_with("--cluster https://192.0.2.1:1"), "0.0.0.0");
        assert_eq!(address("--host 0.0.0.0"), "0.0.0.0");
    }
}
