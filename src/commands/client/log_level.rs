//! `log-level`.

use std::io::Write;

use bytes::Bytes;
use clap::Args;
use reqwest::Method;
use slog::Level;

use super::http::Request;
use super::{AdminEndpoints, write};
use crate::error::{Error, Result};
use crate::logging::{LogLevel, level_parser};

const TARGET: &str = "/log-level";

/// `log-level`: shows or changes what one member logs.
#[derive(Clone, Debug, Args)]
pub struct LogLevelCommand {
    /// Minimum level to log, until the member stops [default: print the level]
    #[arg(value_parser = level_parser())]
    level: Option<Level>,

    #[command(flatten)]
    at: AdminEndpoints,
}

impl LogLevelCommand {
    /// Writes the level to `out`, after it was changed if one was given.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        if self.at.endpoint.len() != 1 {
            let why = "--endpoint: give one, because each member has a level of its own";
            return Err(Error::Config(why.to_owned()));
        }
        let request = match self.level {
            None => Request::new(Method::GET, TARGET, Bytes::new()),
            Some(level) => {
                // Setting it again changes nothing.
                let body = Bytes::from(LogLevel::name(level));
                let mut request = Request::new(Method::PUT, TARGET, body);
                request.is_repeatable = true;
                request
            }
        };
        let answer = self.at.client()?.run(async |client| client.ask(&request).await)?;
        let text = answer.text();
        let name = self.level.map_or(text.trim(), |level| LogLevel::name(level));
        write(out, format!("{} logs {name} and above\n", answer.endpoint).as_bytes())
    }
}
