//! The command line as a whole: the server's flags, and the commands beside it.
//!
//! Without a command it is the server: [`Config`]. A command has flags of its own, and ends with one
//! of these exit statuses:
//!
//! | status | means |
//! |---|---|
//! | 0 | done; of the server: stopped in order, or removed from its cluster |
//! | 1 | it failed, or the key was never written: one line on standard error says what, and what to do |
//! | 2 | the command line cannot be used: one line on standard error says why |

pub mod client;
pub mod inspect;
pub mod restore;

use std::ffi::OsString;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::Path;

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::commands::client::{Get, MemberArgs, Put, Save, StatusCommand};
use crate::commands::inspect::Inspect;
use crate::commands::restore::Restore;
use crate::config::{Config, with_two_dashes};
use crate::error::{Error, Result};

const EXIT_STATUSES: &str = "\
Exit status:
  0  done; of the server: stopped in order, or removed from its cluster
  1  it failed, or the key was never written: one line on standard error says what, and what to do
  2  the command line, the environment or the configuration file cannot be used: one line on
     standard error says why";

/// A small replicated key-value store on raft-rs: the Rust port of etcd's contrib/raftexample.
///
/// Without a command it is the server.
#[derive(Clone, Debug, Parser)]
#[command(name = "raftexample", version, args_conflicts_with_subcommands = true)]
#[command(after_help = EXIT_STATUSES)]
pub struct Cli {
    /// The server's flags.
    #[command(flatten)]
    pub config: Config,

    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What the program does beside serving.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Show every member: its role, how far it is, and whether it lives
    Status(StatusCommand),
    /// List, add, remove and move members, hand leadership over
    #[command(arg_required_else_help = false)]
    Member(MemberArgs),
    /// Set a key, and print OK once that is on a majority's disks
    Put(Put),
    /// Print a value's bytes and nothing else; a terminal gets a newline behind them
    Get(Get),
    /// Show what a data directory, or a file of it, holds, and whether it is sound; change nothing
    Inspect(Inspect),
    /// Backups of the whole state
    #[command(arg_required_else_help = false)]
    Snapshot(SnapshotArgs),
    /// Print the completions of this command line for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the manual page
    Man,
}

/// The commands for backups.
#[derive(Clone, Debug, Args)]
pub struct SnapshotArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: SnapshotCommand,
}

/// What is done with backups.
#[derive(Clone, Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Save a backup of the state as it is now, checked and on disk
    Save(Save),
    /// Make the directories of a member of a new cluster from a backup
    Restore(Restore),
}

impl Cli {
    /// Reads a command line, the program's name first, as [`Config::read`] does.
    ///
    /// # Errors
    /// What clap has to say, help and version included.
    pub fn read(
        arguments: impl IntoIterator<Item = OsString>,
    ) -> std::result::Result<Self, clap::Error> {
        let arguments: Vec<OsString> = with_two_dashes(arguments).collect();
        let mut cli = Self::try_parse_from(&arguments)?;
        if cli.command.is_none() {
            // Where flags come from is its affair.
            cli.config = Config::read(arguments)?;
        }
        Ok(cli)
    }
}

impl Command {
    /// Does it, with its result on standard output. That nobody reads that to its end is no error.
    ///
    /// # Errors
    /// [`Error::Config`] if the command line cannot be used, any other if it failed.
    pub fn run(&self) -> Result<()> {
        let mut out = BufWriter::new(io::stdout().lock());
        let done = match self {
            Self::Status(status) => status.run(&mut out),
            Self::Member(member) => member.run(&mut out),
            Self::Put(put) => put.run(&mut out),
            Self::Get(get) => get.run(&mut out),
            Self::Inspect(inspect) => inspect.run(&mut out),
            Self::Snapshot(SnapshotArgs { command }) => match command {
                SnapshotCommand::Save(save) => save.run(&mut out),
                SnapshotCommand::Restore(restore) => restore.run(&mut out),
            },
            Self::Completions { shell } => {
                // clap_complete panics where it cannot write.
                let mut script = Vec::new();
                clap_complete::generate(*shell, &mut Cli::command(), "raftexample", &mut script);
                out.write_all(&script).map_err(output_failed)
            }
            Self::Man => man(&mut out).map_err(output_failed),
        };
        // Whatever was found comes before the line that says how it ended.
        let flushed = out.flush().map_err(output_failed);
        match done.and(flushed) {
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::BrokenPipe => Ok(()),
            done => done,
        }
    }
}

fn output_failed(error: io::Error) -> Error {
    Error::io("write to", Path::new("standard output"))(error)
}

/// Writes one page for all: the server's flags, and the help of each command.
fn man(out: &mut dyn Write) -> io::Result<()> {
    let mut command = Cli::command();
    command.build();
    let page = Man::new(command.clone());
    page.render_title(out)?;
    page.render_name_section(out)?;
    page.render_synopsis_section(out)?;
    page.render_description_section(out)?;
    page.render_options_section(out)?;
    writeln!(out, ".SH COMMANDS")?;
    help_of_commands(&mut command, out)?;
    page.render_extra_section(out)?;
    page.render_version_section(out)
}

fn help_of_commands(command: &mut clap::Command, out: &mut dyn Write) -> io::Result<()> {
    for command in command.get_subcommands_mut().filter(|command| command.get_name() != "help") {
        if command.has_subcommands() {
            help_of_commands(command, out)?;
            continue;
        }
        // Lines as they are; a dot in front would be a macro, a backslash an escape.
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
    use super::*;

    fn read(flags: &str) -> std::result::Result<Cli, clap::Error> {
        let flags = std::iter::once("raftexample").chain(flags.split_whitespace());
        Cli::read(flags.map(OsString::from))
    }

    /// clap itself looks for what cannot be: two flags of a name, of the server's or of a command's.
    #[test]
    fn no_command_has_two_arguments_of_a_name() {
        Cli::command().debug_assert();
    }

    #[test]
    fn without_a_command_it_is_the_server_with_its_flags_as_ever() {
        let cli = read("-id 2 --port=7 -cluster http://a:1,http://b:2").expect("flags");
        assert!(cli.command.is_none());
        assert_eq!((cli.config.id, cli.config.port, cli.config.cluster.len()), (2, 7, 2));
    }

    #[test]
    fn a_command_has_flags_of_its_own_in_either_style() {
        let cli = read("inspect -json dir").expect("a command");
        let Some(Command::Inspect(inspect)) = cli.command else { panic!("{:?}", cli.command) };
        assert!(inspect.json && !inspect.keys && inspect.path == Path::new("dir"));
        // Behind a -- nothing is a flag, in neither style.
        let cli = read("inspect -- -dir").expect("a command");
        let Some(Command::Inspect(inspect)) = cli.command else { panic!("{:?}", cli.command) };
        assert_eq!(inspect.path, Path::new("-dir"));
        let restore = "snapshot restore file -id 2 -cluster http://a:1,http://b:2 -cluster-id 0x5";
        let Some(Command::Snapshot(snapshot)) = read(restore).expect("a command").command else {
            panic!("it is a command")
        };
        let SnapshotCommand::Restore(restore) = snapshot.command else { panic!("it restores") };
        assert_eq!((restore.id, restore.cluster.len(), restore.cluster_id), (2, 2, Some(5)));
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
