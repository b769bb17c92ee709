//! `log-level`.

use std::io::Write;

use bytes::Bytes;
use clap::Args;
use reqwest::Method;
use slog::Level;

use super::http::Request;
use super::{AdminEndpoints, write};
use crate::config::level_parser;
use crate::error::Result;
use crate::logging::LogLevel;

const TARGET: &str = "/log-level";

/// `log-level`: shows or changes what one member logs.
#[derive(Clone, Debug, Args)]
pub struct LogLevelCommand {
    /// Least severe level to log, until the member stops [default: print the level]
    #[arg(value_parser = level_parser())]
    level: Option<Level>,

    #[command(flatten)]
    at: AdminEndpoints,
}

impl LogLevelCommand {
    /// Writes the level to `out`, after it was changed if one was given.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let client = self.at.client()?;
        let Some(level) = self.level else {
            let answer = client.run(async |client| client.get(TARGET).await)?;
            return write(out, answer.text().as_bytes());
        };
        let name = LogLevel::name(level);
        let request = Request::new(Method::PUT, TARGET, Bytes::from(name));
        let answer = client.run(async |client| client.ask(&request).await)?;
        write(out, format!("{} logs {name} and above\n", answer.endpoint).as_bytes())
    }
}
