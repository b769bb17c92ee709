//! The allowed imports between modules: the arrows of the picture in the crate's documentation.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Each module of the library and the modules that it may import.
const ALLOWED: &[(&str, &[&str])] = &[
    (
        "ports::admin",
        &[
            "channels",
            "codec",
            "httpapi",
            "logging",
            "ports::application",
            "ports::guard",
            "ports::listener",
            "membership",
            "metrics",
            "raft_node",
            "storage",
            "transport",
        ],
    ),
    (
        "ports::application",
        &[
            "channels",
            "error",
            "httpapi",
            "kvstore",
            "metrics",
            "ports::guard",
            "ports::listener",
            "raft_node",
        ],
    ),
    ("channels", &["error"]),
    (
        "commands",
        &["commands::client", "commands::inspect", "commands::restore", "config", "error"],
    ),
    ("commands::client", &["error", "kvstore", "logging", "storage", "ports::tls"]),
    ("codec", &[]),
    (
        "config",
        &[
            "channels",
            "error",
            "kvstore",
            "logging",
            "membership",
            "metrics",
            "raft_node",
            "ports::tls",
        ],
    ),
    ("error", &[]),
    ("guide", &[]),
    ("httpapi", &["kvstore", "ports::guard", "ports::listener", "channels", "error", "metrics"]),
    (
        "commands::inspect",
        &["channels", "codec", "error", "kvstore", "membership", "raft_node", "storage"],
    ),
    ("kvstore", &["codec", "channels", "error", "metrics", "ports::listener", "raft_node"]),
    ("ports::guard", &[]),
    ("ports::listener", &["error", "ports::tls"]),
    ("logging", &[]),
    ("membership", &["channels", "codec", "error"]),
    ("metrics", &["channels"]),
    (
        "raft_node",
        &[
            "channels",
            "codec",
            "error",
            "ports::listener",
            "membership",
            "metrics",
            "storage",
            "ports::tls",
            "transport",
        ],
    ),
    ("raft_node::status", &["channels", "membership"]),
    (
        "commands::restore",
        &["channels", "codec", "config", "error", "kvstore", "membership", "raft_node", "storage"],
    ),
    ("ports", &[]),
    ("storage", &["channels", "error"]),
    ("ports::tls", &["channels", "error", "metrics"]),
    (
        "transport",
        &[
            "channels",
            "codec",
            "error",
            "membership",
            "metrics",
            "ports::tls",
            "raft_node::status",
            "storage",
        ],
    ),
];

/// Crates that a module must not name.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("storage", &["tokio", "axum", "reqwest", "hyper", "hyper_util"]),
    ("kvstore", &["raft", "raft_proto", "axum", "hyper", "reqwest"]),
    ("httpapi", &["raft", "raft_proto"]),
    ("membership", &["tokio", "axum", "reqwest"]),
    ("commands::client", &["raft", "raft_proto", "axum", "hyper"]),
];

/// The modules that decide. They are synchronous: no runtime, no network. Channels are data.
const CORE: &[&str] = &["raft_node", "membership", "storage"];
/// The parts of them that connect a node to the outside.
const EDGES: &[&[&str]] = &[&["raft_node", "serve"], &["raft_node", "state_machine"]];

/// Folders whose modules are listed one by one.
const FOLDERS: &[&str] = &["commands", "ports"];

/// A source file without comments and unit tests.
fn code(source: &str) -> String {
    let without_tests = source.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let lines = without_tests.lines().map(|line| line.split("//").next().unwrap());
    lines.collect::<Vec<_>>().join("\n")
}

/// The modules that the code imports with `crate::`, groups included.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (place, _) in code.match_indices("crate::") {
        let before = code[..place].chars().next_back();
        if !before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
            for path in paths(&code[place + "crate::".len()..]) {
                found.insert(module_of(&path));
            }
        }
    }
    found
}

/// The paths in `text`: a path, or a group of paths in braces, two levels deep.
fn paths(text: &str) -> Vec<Vec<String>> {
    let Some(group) = text.strip_prefix('{') else {
        let name = identifier(text);
        let Some(rest) = text[name.len()..].strip_prefix("::") else { return vec![vec![name]] };
        let below = paths(rest).into_iter();
        return below.map(|path| [vec![name.clone()], path].concat()).collect();
    };
    let mut found = Vec::new();
    let (mut depth, mut start) = (0, true);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => start = true,
            c if c.is_alphabetic() && start && depth == 0 => {
                found.extend(paths(&group[at..]));
                start = false;
            }
            _ => {}
        }
    }
    found
}

/// The module in [`ALLOWED`] that contains a path.
fn module_of(path: &[String]) -> String {
    match path {
        [folder, module, ..]
            if FOLDERS.contains(&&folder[..]) && is_module(module) || is_listed(folder, module) =>
        {
            format!("{folder}::{module}")
        }
        _ => path[0].clone(),
    }
}

/// True if [`ALLOWED`] has a row of its own for a child module.
fn is_listed(folder: &str, module: &str) -> bool {
    ALLOWED.iter().any(|(name, _)| name.split_once("::") == Some((folder, module)))
}

/// True for a module's name, false for a type's.
fn is_module(name: &str) -> bool {
    name.starts_with(char::is_lowercase)
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// True if the code names another crate in a path or import.
fn mentions(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(place, _)| {
        let before = code[..place].chars().next_back().unwrap_or(' ');
        let after = &code[place + name.len()..];
        let inside = |c: char| c.is_alphanumeric() || c == '_' || c == ':' || c == '"' || c == '-';
        !inside(before) && (after.starts_with("::") || after.starts_with(';'))
    })
}

/// The violations in a file of `module`.
fn violations(module: &str, code: &str) -> Vec<String> {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    let Some(allowed) = allowed.get(module) else {
        return vec![format!("module {module} is not in the picture")];
    };
    let mut wrong = Vec::new();
    for import in imports(code) {
        if import != module && !allowed.contains(&import.as_str()) {
            wrong.push(format!("{module} imports {import}"));
        }
    }
    for (of, crates) in FORBIDDEN {
        for name in crates.iter().filter(|name| *of == module && mentions(code, name)) {
            wrong.push(format!("{module} names {name}"));
        }
    }
    if module != "codec" && mentions(code, "bincode") {
        wrong.push(format!("{module} names bincode"));
    }
    wrong
}

/// What a file of the core names and must not.
fn core_violations(path: &[String], code: &str) -> Vec<String> {
    if !CORE.contains(&&path[0][..]) || EDGES.iter().any(|edge| path.starts_with(&owned(edge))) {
        return Vec::new();
    }
    // The types of URLs need no network.
    let code = &code.replace("hyper::http::", "http::");
    let crates = ["axum", "hyper", "hyper_util", "reqwest", "rustls", "tokio_rustls"];
    let named = crates.into_iter().filter(|name| mentions(code, name)).map(str::to_owned);
    let tokio =
        code.match_indices("tokio::").map(|(at, name)| identifier(&code[at + name.len()..]));
    let tokio = tokio.filter(|module| module != "sync").map(|module| format!("tokio::{module}"));
    let ports = imports(code).into_iter().filter(|module| module.starts_with("ports"));
    let place = path.join("::");
    named
        .chain(tokio)
        .chain(ports)
        .map(|name| format!("{place} is core and names {name}"))
        .collect()
}

fn owned(path: &[&str]) -> Vec<String> {
    path.iter().map(|name| (*name).to_owned()).collect()
}

fn sources(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

#[test]
fn the_modules_import_along_the_arrows() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    assert!(files.len() > 15, "{files:?}");
    let mut wrong = Vec::new();
    for file in files {
        let inside = file.strip_prefix(&src).unwrap();
        let parts = inside.iter().map(|part| part.to_str().unwrap().trim_end_matches(".rs"));
        let path: Vec<String> = parts.filter(|part| *part != "mod").map(str::to_owned).collect();
        let module = &module_of(&path);
        let stem = file.file_stem().unwrap().to_str().unwrap();
        assert_ne!(stem, "raft", "a module of this name hides the crate");
        // Unit tests in files of their own, the build script, and the two crate roots, which import everything.
        let is_test =
            stem == "tests" || stem == "failing" || inside.iter().any(|part| part == "tests");
        if is_test || ["build", "lib", "main"].contains(&&module[..]) {
            continue;
        }
        let source = std::fs::read_to_string(&file).unwrap();
        let code = code(&source);
        for violation in violations(module, &code).into_iter().chain(core_violations(&path, &code))
        {
            wrong.push(format!("{}: {violation}", inside.display()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The modules have an order in which each imports only earlier ones.
#[test]
fn the_arrows_make_no_cycle() {
    let mut laid: BTreeSet<&str> = BTreeSet::new();
    while laid.len() < ALLOWED.len() {
        let before = laid.len();
        for (module, imports) in ALLOWED {
            if imports.iter().all(|import| laid.contains(import)) {
                laid.insert(module);
            }
        }
        let stuck = ALLOWED.iter().filter(|(module, _)| !laid.contains(module));
        assert!(laid.len() > before, "a cycle among {:?}", stuck.collect::<Vec<_>>());
    }
}

/// The test finds violations.
#[test]
fn an_import_against_the_arrows_is_found() {
    let bad = "use crate::channels::Index;\nuse crate::{codec, raft_node::{RaftNode, Input}};\nfn f() { crate::httpapi::serve(); }";
    assert_eq!(violations("kvstore", bad), ["kvstore imports httpapi"]);
    assert_eq!(
        violations("kvstore", "use crate::ports::{admin::Admin, guard};"),
        ["kvstore imports ports::admin", "kvstore imports ports::guard"]
    );
    assert_eq!(violations("storage", "use tokio::sync::mpsc;"), ["storage names tokio"]);
    assert_eq!(violations("transport", "bincode::encode()"), ["transport names bincode"]);
    assert!(
        violations(
            "kvstore",
            &code("// crate::raft_node\n#[cfg(test)]\nmod tests { use crate::httpapi; }")
        )
        .is_empty()
    );
    assert_eq!(violations("raft", ""), ["module raft is not in the picture"]);
    let runtime = "use tokio::sync::mpsc;\nuse tokio::time::Instant;\nuse crate::ports::tls::Tls;";
    let found = |path: &[&str]| core_violations(&owned(path), runtime);
    assert_eq!(
        found(&["raft_node", "peers"]),
        [
            "raft_node::peers is core and names tokio::time",
            "raft_node::peers is core and names ports::tls"
        ]
    );
    assert!(found(&["raft_node", "serve"]).is_empty() && found(&["transport"]).is_empty());
}

/// What only its owner may name, and the files of `src` that do.
const OWNED: &[(&str, &[&str])] = &[
    // The write-ahead log: opened by a start, created by a restore, written by the journal alone.
    ("Wal", &["commands/restore.rs", "raft_node/journal.rs", "raft_node/replay.rs"]),
    // A Ready's messages, some of which wait for its frame.
    (".take_persisted_messages", &["raft_node/journal.rs"]),
    ("ready.take_messages", &["raft_node/journal.rs"]),
    // The one transition of members, ConfState and applied index, and its caller.
    ("applied.advance", &["raft_node/apply.rs"]),
];

#[test]
fn owned_names_stay_with_their_owners() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    for (name, owners) in OWNED {
        let names = |file: &&PathBuf| {
            let source = code(&std::fs::read_to_string(file).unwrap());
            source.match_indices(name).any(|(place, _)| {
                let after = source[place + name.len()..].chars().next().unwrap_or(' ');
                let before = source[..place].chars().next_back().unwrap_or(' ');
                let inside = |c: char| c.is_alphanumeric() || c == '_';
                !inside(after) && (name.starts_with('.') || !inside(before))
            })
        };
        let found: Vec<&str> = files
            .iter()
            .filter(|file| !file.starts_with(src.join("storage")))
            .filter(names)
            .map(|file| file.strip_prefix(&src).unwrap().to_str().unwrap())
            .filter(|file| !file.ends_with("tests.rs"))
            .collect();
        let found: BTreeSet<&str> = found.into_iter().collect();
        assert_eq!(found, owners.iter().copied().collect(), "{name}");
    }
}
