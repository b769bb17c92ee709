//! Mutants that no seam reaches. Each replaces a text in `src` in a copy of the package, whose
//! simulation must then fail.

use std::path::Path;
use std::process::Command;

/// A wrong program.
pub struct Patch {
    pub name: &'static str,
    /// The file, relative to the package's root.
    file: &'static str,
    /// The text to replace, which occurs once.
    text: &'static str,
    becomes: &'static str,
    /// The number of seeds within which the simulation must catch it; 0 if `tests/core` has to,
    /// because its history is too rare.
    seeds: u64,
}

pub const PATCHES: [Patch; 36] = [
    Patch {
        name: "entries are applied before they are committed",
        file: "src/raft_node/mod.rs",
        text: "self.publish_snapshot(ready.snapshot())?;\n            \
               self.publish_entries(ready.take_committed_entries());",
        becomes: "self.publish_snapshot(ready.snapshot())?;\n\
                  let mut early = ready.take_committed_entries();\n\
                  early.extend(ready.entries().iter().cloned());\n\
                  self.publish_entries(early);",
        seeds: 10,
    },
    Patch {
        name: "a follower acknowledges the frame under way",
        file: "src/raft_node/journal.rs",
        text: "messages.partition(|message| is_saved && is_free(message))",
        becomes: "messages.partition(|_| is_saved || true)",
        seeds: 100,
    },
    Patch {
        name: "raft counts on the frame under way",
        file: "src/raft_node/mod.rs",
        text: "self.raw_node.advance_append_async(ready);",
        becomes: "let number = ready.number();\n\
                  self.raw_node.advance_append_async(ready);\n\
                  self.raw_node.on_persist_ready(number);",
        seeds: 100,
    },
    Patch {
        name: "a change of members is written in the background",
        file: "src/raft_node/mod.rs",
        text: "&& !holds_change(&unstable.entries)\n            \
               && self.allows_background()",
        becomes: "",
        seeds: 0,
    },
    Patch {
        name: "a new leader answers before it has committed an entry",
        file: "src/raft_node/reads.rs",
        text: "        && raft.commit_to_current_term()\n",
        becomes: "",
        seeds: 3_000,
    },
    Patch {
        name: "a question of any voter confirms the leader",
        file: "src/raft_node/reads.rs",
        text: "&& count > voters.ids().len() / 2;",
        becomes: "&& count > 0 * voters.ids().len();",
        seeds: 0,
    },
    Patch {
        name: "a snapshot is made without its ConfState",
        file: "src/membership/members.rs",
        text: "let voters = members.voters().collect();",
        becomes: "let voters = Vec::new();",
        seeds: 50,
    },
    Patch {
        name: "a truncation is not applied on replay",
        file: "src/storage/wal/replay.rs",
        text: "self.entries.truncate((entry.index - self.base - 1) as usize);",
        becomes: "let place = (entry.index - self.base - 1) as usize;\n\
                  if place < self.entries.len() {\n\
                  self.entries[place] = entry;\n\
                  return;\n\
                  }",
        seeds: 3_000,
    },
    Patch {
        name: "removed ids are forgotten",
        file: "src/membership/members.rs",
        text: "self.removed.insert(*id, index);",
        becomes: "let _ = index;",
        seeds: 500,
    },
    Patch {
        name: "the commit index of a LightReady is not persisted",
        file: "src/raft_node/mod.rs",
        text: "self.journal.note_commit(commit);",
        becomes: "let _ = commit;",
        seeds: 1_000,
    },
    Patch {
        name: "a read takes the index that an earlier run asked for",
        file: "src/raft_node/reads.rs",
        text: "(id.member, id.boot) != (config.id, config.boot)",
        becomes: "id.member != config.id",
        seeds: 0,
    },
    Patch {
        name: "a read rides along with an entry that was proposed before it",
        file: "src/raft_node/reads.rs",
        text: "let (round, arrived_at) = (self.round + 1, raft.raft_log.last_index());",
        becomes: "let (round, arrived_at) = (self.round + 1, raft.raft_log.committed);",
        seeds: 0,
    },
    Patch {
        name: "a read rides along with a write that its member proposed before it",
        file: "src/raft_node/reads.rs",
        text: "partition_point(|it| it.after < own.counter)",
        becomes: "partition_point(|it| it.after <= own.counter)",
        seeds: 1_000,
    },
    Patch {
        name: "a change of members is committed in memory only",
        file: "src/raft_node/mod.rs",
        text: "entries.iter().any(|entry| entry.get_entry_type() != EntryType::EntryNormal)",
        becomes: "entries.len() == usize::MAX",
        seeds: 0,
    },
    Patch {
        name: "a proposal is taken in any term",
        file: "src/raft_node/validate.rs",
        text: "message.log_term == raft.term",
        becomes: "message.log_term <= HIGHEST",
        seeds: 10_000,
    },
    Patch {
        name: "a binding is not checked",
        file: "src/membership/admission.rs",
        text: "&& *bound != header.incarnation",
        becomes: "&& *bound == 0",
        seeds: 2_000,
    },
    Patch {
        name: "a majority of the first members begins",
        file: "src/raft_node/bootstrap.rs",
        text: "self.agreed.len() == self.others.len()",
        becomes: "2 * self.agreed.len() >= self.others.len()",
        seeds: 10_000,
    },
    Patch {
        name: "a member begins on an incomplete table",
        file: "src/raft_node/bootstrap.rs",
        text: "self.table.len() == config.cluster.len()",
        becomes: "2 * self.table.len() > config.cluster.len()",
        seeds: 1_000,
    },
    Patch {
        name: "a table is answered before it is durable, and forgotten at a restart",
        file: "src/raft_node/bootstrap.rs",
        text: "journal.record_incarnation(id, header.incarnation)?;",
        becomes: "let _ = &journal;",
        seeds: 4_000,
    },
    Patch {
        name: "a cluster's id is a hash of its list",
        file: "src/raft_node/bootstrap.rs",
        text: "let member = |(url, incarnation)| format!(\"{url} {incarnation:016x},\");",
        becomes: "let member = |(url, _): (&str, u64)| url.to_owned();",
        seeds: 4_000,
    },
    Patch {
        name: "a quarantine is forgotten at a restart",
        file: "src/storage/wal/replay.rs",
        text: "Record::Quarantine(index) => self.quarantine = *index,",
        becomes: "Record::Quarantine(_) => {}",
        seeds: 4_000,
    },
    Patch {
        name: "a heartbeat alone quarantines",
        file: "src/raft_node/inputs.rs",
        text: "self.peers.log_lost_data(from, message.commit, last_index, &self.logger);",
        becomes: "let _ = last_index;\nlet _ = self.quarantine(message.commit, from);",
        seeds: 0,
    },
    Patch {
        name: "progress is kept across a promotion of another directory",
        file: "src/raft_node/apply.rs",
        text: "&& self.peers.incarnation_of(id) != incarnation",
        becomes: "&& incarnation == 0",
        seeds: 0,
    },
    Patch {
        name: "progress is kept across a learner's change of directory",
        file: "src/raft_node/inputs.rs",
        text: "self.forget_progress(id);",
        becomes: "let _ = id;",
        seeds: 0,
    },
    Patch {
        name: "a pending move refuses",
        file: "src/membership/admission.rs",
        text: "let applied = (self.members.moved_at(id), &self.members.urls.get(&id)?[..]);",
        becomes: "let applied = match self.pending_moves.iter().rfind(|(moving, _)| *moving == id) {\n\
                  Some((_, to)) => (u64::MAX, &to[..]),\n\
                  None => (self.members.moved_at(id), &self.members.urls.get(&id)?[..]),\n\
                  };",
        seeds: 4_000,
    },
    Patch {
        name: "a member is heard at any place",
        file: "src/membership/admission.rs",
        text: "self.check_place(header)?;",
        becomes: "",
        seeds: 8_000,
    },
    Patch {
        name: "a segment shrinks to its frames at a start",
        file: "src/storage/wal/writer.rs",
        text: "file.write_all_at(last_frame, start).map_err(Error::io(\"write to\", &path))?;",
        becomes: "file.write_all_at(last_frame, start).map_err(Error::io(\"write to\", &path))?;\n\
                  file.set_len(current.length).map_err(Error::io(\"cut\", &path))?;\n\
                  let allocated = current.length;",
        seeds: 1_000,
    },
    Patch {
        name: "a frame uses a step that is not durable",
        file: "src/storage/wal/writer.rs",
        text: "if end + format::CLOSE_BYTES > self.allocated {",
        becomes: "if end == 0 {",
        seeds: 1_000,
    },
    Patch {
        name: "the retry tokens are not in the snapshot",
        file: "src/kvstore/state.rs",
        text: "let ((index, term), (floor, remembered)) = (self.applied, self.tokens.contents());",
        becomes: "let ((index, term), (floor, _)) = (self.applied, self.tokens.contents());\n\
                  let remembered = Vec::new();",
        seeds: 100,
    },
    Patch {
        name: "the floor of the retry tokens does not rise",
        file: "src/kvstore/tokens.rs",
        text: "self.floor = forgotten.outcome.index;",
        becomes: "let _ = forgotten;",
        seeds: 100,
    },
    Patch {
        name: "a retry token just below the floor is new",
        file: "src/kvstore/tokens.rs",
        text: "if token.index < self.floor {",
        becomes: "if token.index + 1 < self.floor {",
        seeds: 100,
    },
    Patch {
        name: "a retry token is taken for any write",
        file: "src/kvstore/tokens.rs",
        text: "if known.retry.fingerprint == retry.fingerprint {",
        becomes: "if known.retry.token == token {",
        seeds: 100,
    },
    Patch {
        name: "a condition is evaluated before the log",
        file: "src/kvstore.rs",
        text: "let data = txn.encode(token);",
        becomes: "let mut txn = txn;\n\
                  let state = self.shared.state();\n\
                  txn.conditions.retain(|Condition { key, is }| {\n\
                  let index = state.records.get(key).map(KeyValue::index);\n\
                  !matches!(is, Requirement::WrittenAt(_)) || !is.holds(index)\n\
                  });\n\
                  drop(state);\n\
                  let data = txn.encode(token);",
        seeds: 100,
    },
    Patch {
        name: "a watch resumes one entry late",
        file: "src/kvstore/history.rs",
        text: "self.changes.partition_point(|change| change.cursor() <= cursor);",
        becomes: "self.changes.partition_point(|change| {\n\
                  change.cursor() <= cursor || change.index() == cursor.index + 1\n\
                  });",
        seeds: 100,
    },
    Patch {
        name: "a watch does not resume within an entry",
        file: "src/kvstore/history.rs",
        text: "self.changes.partition_point(|change| change.cursor() <= cursor);",
        becomes: "self.changes.partition_point(|change| change.index() <= cursor.index);",
        seeds: 100,
    },
    Patch {
        name: "a snapshot leaves a gap in a watch",
        file: "src/kvstore/state.rs",
        text: "history.restart(index);",
        becomes: "history.restart(0);",
        seeds: 100,
    },
];

impl Patch {
    fn patched(&self, source: &str) -> Result<String, String> {
        match source.matches(self.text).count() {
            1 => Ok(source.replace(self.text, self.becomes)),
            count => Err(format!("{:?} is in {} {count} times", self.text, self.file)),
        }
    }

    /// Checks that the text is still there.
    pub fn check(&self) -> Result<(), String> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(self.file);
        let source = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
        self.patched(&source).map(|_| ())
    }

    /// Builds the mutant below `target` and runs its simulation; returns what fails first.
    pub fn first_failure(&self) -> Result<String, String> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        // Always the same place, so that only the mutant itself is rebuilt.
        let copy = root.join("target/mutant/package");
        let _ = std::fs::remove_dir_all(&copy);
        std::fs::create_dir_all(&copy).map_err(|error| error.to_string())?;
        for part in ["Cargo.toml", "Cargo.lock", "src", "tests", "examples"] {
            let copied = Command::new("cp").arg("-r").arg(root.join(part)).arg(&copy).status();
            assert!(copied.is_ok_and(|status| status.success()), "cp {part}");
        }
        let path = copy.join(self.file);
        let source = std::fs::read_to_string(&path).map_err(|error| error.to_string())?;
        std::fs::write(&path, self.patched(&source)?).map_err(|error| error.to_string())?;

        let target = if self.seeds == 0 { "core" } else { "simulation" };
        let cargo = |arguments: &[&str]| {
            let mut cargo = Command::new(env!("CARGO"));
            cargo.current_dir(&copy).env("CARGO_TARGET_DIR", root.join("target/mutant/target"));
            cargo.args(["test", "--offline", "--test", target]).args(arguments);
            cargo.env("SIMULATION_SEEDS", format!("0..{}", self.seeds)).env("RUST_BACKTRACE", "0");
            cargo.output().map_err(|error| error.to_string())
        };
        let built = cargo(&["--no-run"])?;
        if !built.status.success() {
            return Err(format!("{}: {}", self.name, String::from_utf8_lossy(&built.stderr)));
        }
        if self.seeds == 0 {
            let run = cargo(&[])?;
            let output = String::from_utf8_lossy(&run.stdout);
            let failed = output.lines().find(|line| line.ends_with("FAILED"));
            return failed.map(str::to_owned).ok_or(format!("{}: not caught", self.name));
        }
        let run = cargo(&["no_fault", "--", "--nocapture"])?;
        let output = String::from_utf8_lossy(&run.stderr);
        let seeds = output.lines().filter_map(|line| {
            let (seed, why) = line.strip_prefix("seed ")?.split_once(": ")?;
            println!("{}: seed {seed}: {why:.120}", self.name);
            seed.parse::<u64>().ok()
        });
        let first = seeds.min().map(|seed| format!("seed {seed}"));
        first.ok_or(format!("{}: not caught by {} seeds", self.name, self.seeds))
    }
}
