//! `snapshot save`.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::Method;
use tempfile::NamedTempFile;
use tokio::time::timeout;

use super::http::{ANSWER_SLACK, AttemptError, Client, Request};
use super::{AdminEndpoints, write};
use crate::error::{Error, Result};
use crate::kvstore::count_records;
use crate::storage::ReadOnlyVfs;
use crate::storage::snapshotter::load_file;

/// `snapshot save`: saves a backup of the current state.
#[derive(Clone, Debug, Args)]
pub struct Save {
    /// File to create
    file: PathBuf,

    /// Replace FILE if it exists
    #[arg(long)]
    force: bool,

    /// Save the member's own state without asking a majority; it may be stale
    #[arg(long)]
    local: bool,

    #[command(flatten)]
    at: AdminEndpoints,
}

impl Save {
    /// Creates the file, and writes to `out` what it contains.
    ///
    /// The backup is received into a temporary file in the same directory, checked, synced, and then
    /// renamed. An error or an interrupt leaves neither file.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let file = &self.file;
        if !self.force && file.symlink_metadata().is_ok() {
            return Err(self.exists());
        }
        if file.file_name().is_none() || file.is_dir() {
            let why = format!("{} is a directory: name a file in it", file.display());
            return Err(Error::Config(why));
        }
        let client = self.at.client()?;
        let dir = file.parent().filter(|dir| *dir != Path::new("")).unwrap_or(Path::new("."));
        let (endpoint, received) = client.run(async |client| {
            tokio::select! {
                received = client.receive(self.local, dir) => received,
                // Returning, unlike dying of the signal, removes the temporary file.
                _ = tokio::signal::ctrl_c() => Err(Error::Refused("interrupted".into())),
            }
        })?;
        let path = received.path();
        let snapshot = load_file(&ReadOnlyVfs, path)
            .map_err(|error| error.with_remedy("it was damaged in transit: save it again"))?;
        let keys = count_records(snapshot.reader).map_err(Error::io("read", path))?;
        received.as_file().sync_all().map_err(Error::io("sync", path))?;
        let renamed =
            if self.force { received.persist(file) } else { received.persist_noclobber(file) };
        renamed.map_err(|error| match error.error.kind() {
            io::ErrorKind::AlreadyExists if !self.force => self.exists(),
            _ => Error::io("rename to", file)(error.error),
        })?;
        let synced = File::open(dir).and_then(|dir| dir.sync_all());
        synced.map_err(Error::io("sync", dir))?;
        let (index, term, length) = (snapshot.index, snapshot.term, snapshot.file.length);
        let done = format!(
            "saved {} from {endpoint}: index {index}, term {term}, {keys} keys, {length} bytes\n",
            file.display()
        );
        write(out, done.as_bytes())
    }

    fn exists(&self) -> Error {
        Error::Refused(format!(
            "{} exists: choose another name, or replace it with --force",
            self.file.display()
        ))
    }
}

impl Client {
    /// Receives a backup into a temporary file in `dir`; returns the endpoint that sent it, too.
    async fn receive(&self, is_local: bool, dir: &Path) -> Result<(String, NamedTempFile)> {
        let target = if is_local { "/snapshot?local" } else { "/snapshot" };
        let request = Request::new(Method::GET, target, Bytes::new());
        self.each(&request, async |endpoint| {
            // A backup may be large, so the timeout is for the head and for each chunk.
            let patience = self.timeout + ANSWER_SLACK;
            let head = timeout(patience, self.send(endpoint, &request)).await;
            let mut response = head.unwrap_or_else(|_| Err(self.timed_out(endpoint)))?;
            let own = |error| {
                AttemptError::Refused(Error::io("write to a file in", dir)(error).to_string())
            };
            let mut file = NamedTempFile::new_in(dir).map_err(own)?;
            let progress = progress_bar();
            loop {
                let chunk = timeout(patience, response.chunk()).await;
                let chunk = chunk.map_err(|_| self.timed_out(endpoint))?;
                let Some(chunk) = chunk.map_err(|error| self.broken(endpoint, &error))? else {
                    break;
                };
                file.write_all(&chunk).map_err(own)?;
                progress.inc(chunk.len() as u64);
            }
            progress.finish_and_clear();
            Ok((endpoint.to_owned(), file))
        })
        .await
    }
}

/// A spinner on standard error if that is a terminal. The length is not known in advance.
fn progress_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {bytes} received, {bytes_per_sec}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_spinner());
    ProgressBar::new_spinner().with_style(style)
}
