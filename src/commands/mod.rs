//! The command line: the server's flags ([`Config`]), or one of the commands with its own flags.
//! A failure prints one line on standard error.

mod client;
mod inspect;
mod restore;

use std::ffi::OsString;
use std::io::{self, BufWriter, ErrorKind, Write};

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::commands::client::keys::{Delete, Get, List, Put, Transact};
use crate::commands::client::log_level::LogLevelCommand;
#[doc(hidden)]
pub use crate::commands::client::members::printed;
use crate::commands::client::members::{MemberCommand, StatusCommand};
use crate::commands::client::save::Save;
use crate::commands::client::watch::Watch;
use crate::commands::inspect::Inspect;
pub use crate::commands::restore::Restore;
use crate::config::{Config, with_two_dashes};
use crate::error::{Error, Result, output_failed};

const AFTER_SHORT_HELP: &str = "\
Examples:
  raftexample --cluster http://127.0.0.1:12379 --port 12380 --api 127.0.0.1:12382
  raftexample put my-key hello

--help shows all flags, environment variables and exit statuses.";

const AFTER_HELP: &str = "\
Examples:
  raftexample --cluster http://127.0.0.1:12379 --port 12380 --api 127.0.0.1:12382 --admin 127.0.0.1:12381
  raftexample put my-key hello
  raftexample get my-key
  raftexample status

Environment:
  RAFTEXAMPLE_ and the name of a flag of the server sets that flag, for example
  RAFTEXAMPLE_DATA_DIR. A flag takes precedence over its variable, and both over --config.

Exit status:
  0  success; for the server: stopped by a signal, or removed from its cluster
  1  failure: no such key for get or delete, or a condition does not hold; the last line on standard error says what to do
  2  invalid command line, environment or configuration file";

/// A small replicated key-value store on raft-rs: the Rust port of etcd's contrib/raftexample.
///
/// Without a command it runs one member of a cluster, a server in the foreground.
#[derive(Clone, Debug, Parser)]
#[command(name = "raftexample", version = env!("RAFTEXAMPLE_VERSION"), args_conflicts_with_subcommands = true)]
#[command(after_help = AFTER_SHORT_HELP, after_long_help = AFTER_HELP)]
pub struct Cli {
    /// The server's flags.
    #[command(flatten)]
    pub config: Config,

    /// A command instead of the server.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The commands.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Show the role, progress and health of every member
    Status(StatusCommand),
    /// List, add, remove and move members, transfer leadership
    #[command(subcommand, arg_required_else_help = false)]
    Member(MemberCommand),
    /// Set a key, once; prints OK after a majority has the value on disk
    Put(Put),
    /// Print the value of a key, or its ETag
    Get(Get),
    /// Remove a key, once; prints OK after a majority has the removal on disk
    Delete(Delete),
    /// Print keys in order
    List(List),
    /// Print changes of keys as they happen
    Watch(Watch),
    /// Evaluate conditions and carry operations out, in one step; prints the results as JSON
    Txn(Transact),
    /// Print or set the log level of a running member
    LogLevel(LogLevelCommand),
    /// Show and check the files of a member, running or not, without changing them
    Inspect(Inspect),
    /// Save backups, and make new clusters from them
    #[command(subcommand, arg_required_else_help = false)]
    Snapshot(SnapshotCommand),
    /// Print a completion script for a shell
    Completions {
        /// Shell to complete in
        shell: Shell,
    },
    /// Print the manual page
    Man,
}

/// The subcommands of `snapshot`.
#[derive(Clone, Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Save a backup of the current state of a cluster
    Save(Save),
    /// Create the files of one member of a new cluster from a backup
    Restore(Restore),
}

impl Cli {
    /// Parses a command line as [`Config::read`] does, with the same errors.
    pub fn read(
        arguments: impl IntoIterator<Item = OsString>,
    ) -> std::result::Result<Self, clap::Error> {
        let arguments: Vec<OsString> = with_two_dashes(arguments).collect();
        let mut cli = Self::try_parse_from(&arguments)?;
        if cli.command.is_none() {
            // It also reads the environment and the configuration file.
            cli.config = Config::read(arguments, std::env::vars_os())?;
        }
        Ok(cli)
    }
}

/// The command line that shows the help for `arguments`, whose first one is the program. The value of a flag
/// that equals the name of a command is taken for it.
pub fn help_for(arguments: &[OsString]) -> String {
    let program = Cli::command();
    let (mut command, mut line) = (&program, program.get_name().to_owned());
    for argument in arguments.iter().skip(1) {
        if let Some(found) = argument.to_str().and_then(|name| command.find_subcommand(name)) {
            line = format!("{line} {}", found.get_name());
            command = found;
        }
    }
    line + " --help"
}

impl Command {
    /// Runs the command, which writes its result to standard output. A closed pipe is no error.
    pub fn run(&self) -> Result<()> {
        let mut out = BufWriter::new(io::stdout().lock());
        let done = match self {
            Self::Status(status) => status.run(&mut out),
            Self::Member(member) => member.run(&mut out),
            Self::Put(put) => put.run(&mut out),
            Self::Get(get) => get.run(&mut out),
            Self::Delete(delete) => delete.run(&mut out),
            Self::List(list) => list.run(&mut out),
            Self::Watch(watch) => watch.run(&mut out),
            Self::Txn(txn) => txn.run(&mut out),
            Self::LogLevel(log_level) => log_level.run(&mut out),
            Self::Inspect(inspect) => inspect.run(&mut out),
            Self::Snapshot(SnapshotCommand::Save(save)) => save.run(&mut out),
            Self::Snapshot(SnapshotCommand::Restore(restore)) => restore.run(&mut out),
            Self::Completions { shell } => {
                // clap_complete panics if it cannot write.
                let mut script = Vec::new();
                clap_complete::generate(*shell, &mut Cli::command(), "raftexample", &mut script);
                out.write_all(&script).map_err(output_failed)
            }
            Self::Man => man(&mut out).map_err(output_failed),
        };
        // The output comes before the error line.
        let flushed = out.flush().map_err(output_failed);
        match done.and(flushed) {
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::BrokenPipe => Ok(()),
            done => done,
        }
    }
}

/// Writes one manual page with the server's flags and the help of every command.
fn man(out: &mut dyn Write) -> io::Result<()> {
    let mut command = Cli::command();
    command.build();
    Man::new(command.clone()).render(out)?;
    writeln!(out, ".SH COMMANDS")?;
    help_of_commands(&mut command, out)
}

fn help_of_commands(command: &mut clap::Command, out: &mut dyn Write) -> io::Result<()> {
    for command in command.get_subcommands_mut().filter(|command| command.get_name() != "help") {
        if command.has_subcommands() {
            help_of_commands(command, out)?;
            continue;
        }
        // Verbatim lines: a leading dot would be a macro, a backslash an escape.
        writeln!(out, ".SS {}\n.nf", command.get_bin_name().unwrap_or_default())?;
        for line in command.render_help().to_string().lines() {
            writeln!(out, "\\&{}", line.replace('\\', "\\e").replace('-', "\\-"))?;
        }
        writeln!(out, ".fi")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn read(flags: &str) -> std::result::Result<Cli, clap::Error> {
        let flags = std::iter::once("raftexample").chain(flags.split_whitespace());
        Cli::read(flags.map(OsString::from))
    }

    /// clap's own check, for example that no two flags share a name.
    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn without_a_command_the_flags_are_the_servers() {
        let cli = read("-id 2 --port=7 -cluster http://a:1,http://b:2").expect("flags");
        assert!(cli.command.is_none());
        assert_eq!((cli.config.id, cli.config.port, cli.config.cluster.len()), (2, 7, 2));
    }

    #[test]
    fn the_help_for_a_command_line_is_that_of_its_command() {
        for (line, help) in [
            ("raftexample --bogus", "raftexample --help"),
            ("raftexample --tick 1s put -x", "raftexample put --help"),
            ("raftexample member add", "raftexample member add --help"),
            ("raftexample put get", "raftexample put --help"),
        ] {
            let arguments: Vec<_> = line.split(' ').map(OsString::from).collect();
            assert_eq!(help_for(&arguments), help, "{line}");
        }
    }

    #[test]
    fn a_command_has_flags_of_its_own_in_either_style() {
        let cli = read("inspect -json dir").expect("a command");
        let Some(Command::Inspect(inspect)) = cli.command else { panic!("{:?}", cli.command) };
        assert!(inspect.json && !inspect.keys && inspect.path == Path::new("dir"));
        // After -- nothing is a flag.
        let cli = read("inspect -- -dir").expect("a command");
        let Some(Command::Inspect(inspect)) = cli.command else { panic!("{:?}", cli.command) };
        assert_eq!(inspect.path, Path::new("-dir"));
        // Nor is a number.
        let cli = read("put key -1").expect("a command");
        assert!(format!("{:?}", cli.command).contains("\"-1\""), "{:?}", cli.command);
        let restore = "snapshot restore file -peer-url http://a:1 -data-dir d";
        let Some(Command::Snapshot(SnapshotCommand::Restore(restore))) =
            read(restore).expect("a command").command
        else {
            panic!("it restores")
        };
        assert_eq!((&*restore.peer_url, restore.data_dir.to_str()), ("http://a:1", Some("d")));
    }

    #[test]
    fn the_servers_flags_and_a_command_exclude_each_other() {
        for flags in [
            "--id 1 inspect dir",
            "inspect",
            "inspect a b",
            "stray",
            "snapshot",
            "snapshot restore file",
            "member",
            "member add 4",
            "member add 0 http://a:1",
            "put key",
            "get",
            "get key --endpoint a:1",
            "get key --cert file",
            "status --timeout 0s",
        ] {
            let error = read(flags).expect_err(flags);
            assert!(error.exit_code() == 2, "{flags}: {error}");
        }
    }

    #[test]
    fn the_manual_page_has_each_flag_of_each_command() {
        let mut page = Vec::new();
        man(&mut page).expect("a vector takes all");
        let page = String::from_utf8(page).expect("text").replace('\\', "");
        for part in [
            "--snapshot-catch-up-entries",
            "--json",
            "snapshot restore",
            "--data-dir",
            "Exit status",
        ] {
            assert!(page.contains(part), "{part}: {page}");
        }
    }
}
