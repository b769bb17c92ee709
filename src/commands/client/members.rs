//! `status` and `member`.

use std::io::Write;
use std::time::Duration;

use bytes::Bytes;
use clap::{Args, Subcommand};
use indicatif::HumanBytes;
use reqwest::Method;
use serde_json::Value;
use tokio::time::sleep;

use super::http::{Client, Request};
use super::{AdminEndpoints, array, json_text, text, write};
use crate::error::{Error, Result};

/// How often a member is asked again until it has applied what another member has just done.
const POLLS: u32 = 10;
/// The time between two of these requests.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// `status`: shows every member, as one of them sees it.
#[derive(Clone, Debug, Args)]
pub struct StatusCommand {
    /// Print the JSON of GET /cluster
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    at: AdminEndpoints,
}

/// `member`: lists and changes the members.
#[derive(Clone, Debug, Subcommand)]
pub enum MemberCommand {
    /// List the members
    List {
        /// Print the JSON of GET /members
        #[arg(long)]
        json: bool,

        #[command(flatten)]
        at: AdminEndpoints,
    },
    /// Add a member, before it is started; it is a learner until it has caught up
    Add {
        /// Id of the new member, never used before
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        id: u64,

        /// Peer URL of the new member
        url: String,

        #[command(flatten)]
        at: AdminEndpoints,
    },
    /// Remove a member for good: its id cannot be used again
    Remove {
        /// Id of the member
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        id: u64,

        #[command(flatten)]
        at: AdminEndpoints,
    },
    /// Change the peer URL of a member
    Move {
        /// Id of the member
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        id: u64,

        /// New peer URL of the member
        url: String,

        #[command(flatten)]
        at: AdminEndpoints,
    },
    /// Transfer leadership to another member
    Transfer {
        /// Id of the new leader [default: the member with most of the log]
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        id: Option<u64>,

        #[command(flatten)]
        at: AdminEndpoints,
    },
}

impl StatusCommand {
    /// Writes the table, or the JSON, to `out`; then fails if no member knows a leader.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let answer = self.at.client()?.run(async |client| client.get("/cluster").await)?;
        let cluster = answer.json()?;
        if self.json {
            write(out, json_text(&answer.text()).as_bytes())?;
        } else {
            write(out, status_table(&cluster, &answer.endpoint).as_bytes())?;
        }
        let is_led = |member: &Value| {
            member["alive"] == true && member["status"]["leader"].as_u64().is_some_and(|id| id != 0)
        };
        if array(&cluster["members"]).iter().any(is_led) {
            return Ok(());
        }
        Err(Error::Refused(format!(
            "no member that {} can reach knows a leader: start the dead members until a majority is alive",
            answer.endpoint
        )))
    }
}

impl MemberCommand {
    /// Runs the subcommand, and writes the result to `out`.
    pub fn run(&self, out: &mut dyn Write) -> Result<()> {
        let done = match self {
            Self::List { json, at } => {
                let answer = at.client()?.run(async |client| client.get("/members").await)?;
                let members = answer.json()?;
                if *json { json_text(&answer.text()) } else { member_table(&members) }
            }
            Self::Add { id, url, at } => {
                let members = at.client()?.run(async |client| {
                    // Before the change: it also proves that this is no client port, where the
                    // request would set a key.
                    let members = client.get("/members").await?.json()?;
                    client.change(Method::POST, *id, url).await?;
                    Ok(members)
                })?;
                format!("added member {id} as a learner\n{}", start_command(*id, url, &members))
            }
            Self::Remove { id, at } => {
                at.client()?.run(async |client| {
                    client.require_member(*id).await?;
                    client.change(Method::DELETE, *id, "").await
                })?;
                format!(
                    "removed member {id}: it stops by itself, and its id cannot be used again\n"
                )
            }
            Self::Move { id, url, at } => {
                let old = at.client()?.run(async |client| {
                    let old = client.require_member(*id).await?;
                    client.change(Method::PUT, *id, url).await?;
                    Ok(old)
                })?;
                format!(
                    "moved member {id} from {old} to {url}: stop it if it still runs, and start it there with --peer-url {}\n",
                    for_a_shell(url)
                )
            }
            Self::Transfer { id, at } => {
                let leader = at.client()?.run(async |client| client.transfer(*id).await)?;
                match leader {
                    Some(id) => format!("member {id} leads\n"),
                    None => "another member leads\n".to_owned(),
                }
            }
        };
        write(out, done.as_bytes())
    }
}

impl Client {
    /// Changes member `id`.
    async fn change(&self, method: Method, id: u64, url: &str) -> Result<()> {
        let body = Bytes::from(url.to_owned());
        self.ask(&Request::new(method, &format!("/members/{id}"), body)).await.map(|_| ())
    }

    /// Transfers leadership, to any other member if `to` is `None`. Returns the new leader if it is
    /// known.
    async fn transfer(&self, to: Option<u64>) -> Result<Option<u64>> {
        let leader = async || Ok(self.get("/status").await?.json()?["leader"].as_u64());
        let before: Option<u64> = leader().await?;
        let query = to.map(|id| format!("?to={id}")).unwrap_or_default();
        let target = format!("/transfer-leadership{query}");
        self.ask(&Request::new(Method::POST, &target, Bytes::new())).await?;
        if to.is_some() {
            return Ok(to);
        }
        // The transfer is done, but the asked member may not know the new leader yet.
        for _ in 0..POLLS {
            if let Ok(Some(id)) = leader().await
                && id != 0
                && Some(id) != before
            {
                return Ok(Some(id));
            }
            sleep(POLL_INTERVAL).await;
        }
        Ok(None)
    }

    /// The URL of member `id`, or an error if it is not a member.
    async fn require_member(&self, id: u64) -> Result<String> {
        let mut polls = 1;
        loop {
            let answer = self.get("/members").await?;
            let members = answer.json()?;
            if let Some(member) = array(&members).iter().find(|member| member["id"] == id) {
                return Ok(text(&member["url"]));
            }
            if polls == POLLS {
                let (endpoint, ids) = (answer.endpoint, column(&members, "id").join(", "));
                return Err(Error::Refused(format!(
                    "{id} is not a member: {endpoint} knows members {ids}; see `raftexample member list`"
                )));
            }
            // A follower may not have applied the entry that added it yet.
            polls += 1;
            sleep(POLL_INTERVAL).await;
        }
    }
}

/// All that these commands print of an admin port's answer; `None` if it is no JSON.
#[doc(hidden)]
pub fn printed(answer: &[u8]) -> Option<String> {
    let json = serde_json::from_slice(answer).ok()?;
    let tables = [status_table(&json, "http://a:1"), member_table(&json)];
    let json_text = json_text(&String::from_utf8_lossy(answer));
    Some(tables.concat() + &start_command(4, "http://a:4", &json) + &json_text)
}

/// The command line that starts the new member.
fn start_command(id: u64, url: &str, members: &Value) -> String {
    let others = column(members, "url").join(",");
    let tls = if url.starts_with("https://") {
        " --peer-cert FILE --peer-key FILE --peer-ca FILE"
    } else {
        ""
    };
    format!(
        "start it now; it gets a vote when it has caught up:\n  raftexample --id {id} --cluster {} --peer-url {}{tls} --port PORT --join\n",
        for_a_shell(&others),
        for_a_shell(url)
    )
}

/// `word` as a shell takes it: in quotes if it could expand it, as some do the brackets of an IPv6
/// address. A URL may contain more than that, and what a member answers is not to become a command.
fn for_a_shell(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.,:/%+@=".contains(c);
    if word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// One field of each member.
fn column(members: &Value, name: &str) -> Vec<String> {
    array(members).iter().map(|member| text(&member[name])).collect()
}

fn member_table(members: &Value) -> String {
    let row = |member: &Value| ["id", "url", "role"].map(|name| text(&member[name]));
    table(["ID", "URL", "ROLE"], array(members).iter().map(row))
}

fn status_table(cluster: &Value, endpoint: &str) -> String {
    let head = [
        "ID", "URL", "ROLE", "TERM", "COMMIT", "APPLIED", "SNAPSHOT", "KEYS", "WAL", "UPTIME",
        "VERSION",
    ];
    let row = |member: &Value| {
        let mark = if member["id"] == cluster["seen_by"] { "*" } else { "" };
        let is_alive = member["alive"] == true;
        // A dead member has no status, which `text` shows as dashes.
        let status = if is_alive { &member["status"] } else { &Value::Null };
        let role = match (is_alive, &member["started"]) {
            (true, _) => text(&status["role"]),
            (false, Value::Bool(false)) => "learner, not started".to_owned(),
            (false, _) => "dead".to_owned(),
        };
        let [term, commit, applied, snapshot, keys, version] =
            ["term", "commit", "applied", "snapshot", "keys", "version"]
                .map(|name| text(&status[name]));
        let size = status["wal_bytes"].as_u64().map(|bytes| HumanBytes(bytes).to_string());
        let uptime = status["uptime_seconds"].as_f64().map(|seconds| {
            let uptime = humantime::format_duration(Duration::from_secs(seconds as u64));
            uptime.to_string().replace(' ', "")
        });
        let [size, uptime] = [size, uptime].map(|shown| shown.unwrap_or("-".to_owned()));
        let (id, url) = (format!("{}{mark}", text(&member["id"])), text(&member["url"]));
        [id, url, role, term, commit, applied, snapshot, keys, size, uptime, version]
    };
    let rows = array(&cluster["members"]).iter().map(row);
    format!("{}* this member answered, at {endpoint}\n", table(head, rows))
}

/// Left-aligned columns, two spaces apart.
fn table<const N: usize>(head: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<_> = std::iter::once(head.map(str::to_owned)).chain(rows).collect();
    let widths: [usize; N] = std::array::from_fn(|column| {
        rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)
    });
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_in_a_command_line_is_one_word() {
        for (url, word) in [
            ("http://a.b-c:1,https://d:2", "http://a.b-c:1,https://d:2"),
            ("http://[::1]:1", "'http://[::1]:1'"),
            ("http://a$(reboot):1", "'http://a$(reboot):1'"),
            ("http://a';reboot;':1", r"'http://a'\'';reboot;'\'':1'"),
        ] {
            assert_eq!(for_a_shell(url), word);
        }
    }

    #[test]
    fn the_status_table_marks_dead_members_and_the_one_asked() {
        let status = serde_json::json!({
            "role": "leader", "term": 2, "commit": 10, "applied": 10, "snapshot": 0, "keys": 3,
            "wal_bytes": 1536, "uptime_seconds": 61.5, "version": "0.1.0",
        });
        let cluster = serde_json::json!({ "seen_by": 2, "members": [
            { "id": 1, "url": "http://a:1", "alive": false, "status": null },
            { "id": 2, "url": "http://bcd:2", "alive": true, "status": status },
            { "id": 3, "url": "http://e:3", "alive": false, "started": false, "status": null },
        ]});
        assert_eq!(
            status_table(&cluster, "http://e:1"),
            "\
ID  URL           ROLE                  TERM  COMMIT  APPLIED  SNAPSHOT  KEYS  WAL       UPTIME  VERSION
1   http://a:1    dead                  -     -       -        -         -     -         -       -
2*  http://bcd:2  leader                2     10      10       0         3     1.50 KiB  1m1s    0.1.0
3   http://e:3    learner, not started  -     -       -        -         -     -         -       -
* this member answered, at http://e:1
"
        );
    }
}
