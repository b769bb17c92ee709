//! The files in `examples/deploy`: the systemd unit, the alerts, and the dashboard against a real Prometheus that
//! scrapes three members. A test skips, and says so, where its program is not installed.
//!
//! `UPDATE_DASHBOARD=1 cargo test --test deploy dashboard` also draws the dashboard from what Prometheus scraped.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use plotters::prelude::*;
use serde_json::Value;
use support::processes::{
    ANSWER_TIMEOUT, BINARY, Client, Cluster, FAST, PATIENCE, Signal, Site, eventually,
    eventually_some, get, owned, put, request, serves, skip,
};

/// What `systemd-analyze security` may say of the unit at most; 10.0 is a service without any protection.
const EXPOSURE_MAX: &str = "15";

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/deploy")
}

/// Runs a program; `None`, after telling so, if it is not installed.
fn run(program: &str, arguments: &[&str]) -> Option<Output> {
    let output = Command::new(program).args(arguments).output();
    if output.is_err() {
        skip(&format!("examples/deploy was not checked: {program} is not installed"));
    }
    output.ok()
}

fn text(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    format!("{out}{err}")
}

/// The unit with the binary under test, in a directory of its own.
fn unit(site: &Site) -> String {
    let unit = fs::read_to_string(deploy().join("raftexample@.service")).unwrap();
    let path = site.dir().join("raftexample@.service");
    fs::write(&path, unit.replace("/usr/local/bin/raftexample", BINARY)).unwrap();
    path.display().to_string()
}

#[test]
fn systemd_finds_nothing_wrong_with_the_unit() {
    let site = Site::new();
    let Some(verified) = run("systemd-analyze", &["verify", &unit(&site)]) else { return };
    assert_eq!(text(&verified), "", "its status is 0 even for keys that it does not know");
    assert!(verified.status.success());
}

#[test]
fn systemd_calls_the_unit_well_protected() {
    let site = Site::new();
    let threshold = format!("--threshold={EXPOSURE_MAX}");
    let arguments = ["security", "--offline=true", "--no-pager", &threshold, &unit(&site)];
    let Some(judged) = run("systemd-analyze", &arguments) else { return };
    assert!(judged.status.success(), "{}", text(&judged));
}

/// A call that the unit forbids would fail only in production.
#[test]
fn the_unit_allows_every_system_call_that_a_member_makes() {
    let Some(listed) = run("systemd-analyze", &["--no-pager", "syscall-filter"]) else { return };
    let listed = text(&listed);
    let group = |name: &str| {
        let calls = listed.lines().skip_while(|line| *line != name).skip(1);
        let calls = calls.take_while(|line| line.starts_with("    "));
        calls.map(|line| line.trim().to_owned()).filter(|call| !call.starts_with('#')).collect()
    };
    // Groups contain groups.
    let expand = |name: &str| {
        let (mut calls, mut left) = (BTreeSet::new(), vec![name.to_owned()]);
        while let Some(name) = left.pop() {
            let found: Vec<String> = group(&name);
            assert!(!found.is_empty(), "{name} is a group");
            let (groups, plain): (Vec<_>, Vec<_>) =
                found.into_iter().partition(|call| call.starts_with('@'));
            left.extend(groups);
            calls.extend(plain);
        }
        calls
    };
    let unit = fs::read_to_string(deploy().join("raftexample@.service")).unwrap();
    let mut allowed = BTreeSet::new();
    for line in unit.lines() {
        match line.strip_prefix("SystemCallFilter=") {
            Some(group) if group.starts_with('~') => {
                let refused = expand(&group[1..]);
                allowed.retain(|call| !refused.contains(call));
            }
            Some(group) => allowed.extend(expand(group)),
            None => {}
        }
    }
    assert!(allowed.contains("fdatasync") && !allowed.contains("mount"));

    let site = Site::new();
    let admin = site.at(site.port());
    let ports = [admin, site.at(site.port())].map(|port| port.to_string());
    let more =
        ["--snapshot-count", "5", "--tick", "20ms", "--admin", &ports[0], "--api", &ports[1]];
    let (flags, address) = site.single(&more);
    let calls = site.dir().join("calls");
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o"]).arg(&calls).arg(BINARY).args(&flags);
    let traced = Command::new("strace").args(["-o", "/dev/null", "true"]).output();
    if !traced.is_ok_and(|output| output.status.success()) {
        return skip("no system calls were traced: strace is not installed, or may not trace");
    }
    let mut process = site.spawn_command("member", command, true);
    (0..20).for_each(|number| put(address, &format!("/{number}"), b"value"));
    let snapshots = site.dir().join("raftexample-1-snap");
    eventually(PATIENCE, "a snapshot is made", || {
        fs::read_dir(&snapshots).is_ok_and(|files| files.count() > 0)
    });
    for path in ["/cluster", "/state-hash", "/snapshot", "/v1/keys"] {
        assert_eq!(request(admin, "GET", path, b"").unwrap().status, 200, "{path}");
    }
    process.signal(Signal::SIGTERM);
    process.wait(PATIENCE);
    let traced = fs::read_to_string(&calls).unwrap();
    // `PID NAME(ARGUMENTS…`; the first call is systemd's own.
    let made: BTreeSet<_> = traced
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1)?.split_once('('))
        .map(|(name, _)| name.to_owned())
        .collect();
    assert!(made.contains("fdatasync"), "it was traced: {made:?}");
    let refused: Vec<_> = made.difference(&allowed).filter(|call| *call != "execve").collect();
    assert!(refused.is_empty(), "the unit refuses {refused:?}");
}

#[test]
fn systemd_is_told_what_a_member_does() {
    let site = Site::new();
    let socket = site.dir().join("notify");
    let told = UnixDatagram::bind(&socket).unwrap();
    told.set_read_timeout(Some(PATIENCE)).unwrap();
    let (flags, address) = site.single(&FAST);
    let mut command = Command::new(BINARY);
    command.args(&flags).env("NOTIFY_SOCKET", &socket);
    let process = site.spawn_command("member", command, false);
    let mut buffer = [0; 1000];
    let mut next = || {
        let length = told.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    };
    assert_eq!(next().trim(), "READY=1");
    serves(address);
    while next().trim() != "STATUS=leader in term 2, members: 1" {}
    process.signal(Signal::SIGTERM);
    while next().trim() != "STOPPING=1" {}
}

#[test]
fn promtool_accepts_the_alerts_and_their_tests_pass() {
    let alerts = deploy().join("alerts.yml");
    let Some(checked) = run("promtool", &["check", "rules", alerts.to_str().unwrap()]) else {
        return;
    };
    assert!(checked.status.success(), "{}", text(&checked));
    let tests = deploy().join("alerts-test.yml");
    let tested = run("promtool", &["test", "rules", tests.to_str().unwrap()]).unwrap();
    assert!(tested.status.success(), "{}", text(&tested));
    // Without the certificates that it names.
    let config = deploy().join("prometheus.yml");
    let arguments = ["check", "config", "--syntax-only", config.to_str().unwrap()];
    let checked = run("promtool", &arguments).unwrap();
    assert!(checked.status.success(), "{}", text(&checked));
    // Each alert is tested.
    let [alerts, tests] = [alerts, tests].map(|path| fs::read_to_string(path).unwrap());
    for alert in alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        let fires = format!("- alertname: {alert}\n");
        let is_silent = format!("{{ alertname: {alert}, eval_time: 9m, exp_alerts: [] }}");
        assert!(tests.contains(&fires) && tests.contains(&is_silent), "{alert}");
    }
}

/// A Prometheus that scrapes members.
struct Prometheus(SocketAddr);

impl Prometheus {
    /// The data that a query of its API answers with.
    fn api(&self, path: &str, parameters: &[(&str, &str)]) -> Option<Value> {
        let encode =
            |text: &str| -> String { text.bytes().map(|byte| format!("%{byte:02X}")).collect() };
        let query: Vec<_> =
            parameters.iter().map(|(name, value)| format!("{name}={}", encode(value))).collect();
        // HTTP/1.0, so that the body ends with the connection.
        let mut stream = TcpStream::connect_timeout(&self.0, ANSWER_TIMEOUT).ok()?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT)).ok()?;
        write!(stream, "GET /api/v1/{path}?{} HTTP/1.0\r\n\r\n", query.join("&")).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let answer: Value = serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()?;
        assert_eq!(answer["status"], "success", "{parameters:?}: {answer}");
        Some(answer["data"].clone())
    }

    /// The series that a query gives now.
    fn query(&self, query: &str) -> Vec<Value> {
        let data = self.api("query", &[("query", query)]);
        data.and_then(|data| data["result"].as_array().cloned()).unwrap_or_default()
    }
}

/// Three members and their admin ports.
fn cluster() -> (Cluster, Vec<SocketAddr>) {
    let site = Site::new();
    let mut places: Vec<_> = (0..3).map(|_| site.place(site.url())).collect();
    let admins: Vec<_> = places.iter().map(|_| site.at(site.port())).collect();
    for (place, admin) in places.iter_mut().zip(&admins) {
        place.flags = owned(&["--admin", &admin.to_string()]);
    }
    (Cluster::start_at(site, places, &FAST), admins)
}

/// A query of the dashboard, as Grafana sends it for the members of the test.
fn substituted(query: &str) -> String {
    let query = query.replace("$job", "raftexample").replace("$__rate_interval", "4s");
    assert!(!query.contains('$'), "{query} has another variable");
    query
}

/// The values of a series; quantiles of nothing are no numbers.
fn numbers(series: &Value) -> Vec<(f64, f64)> {
    let one = series.get("value").map(|value| vec![value.clone()]);
    let values = one.or_else(|| series["values"].as_array().cloned()).unwrap();
    let values = values.iter().map(|value| {
        (value[0].as_f64().unwrap(), value[1].as_str().unwrap().parse::<f64>().unwrap())
    });
    values.filter(|(_, value)| value.is_finite()).collect()
}

#[test]
fn each_query_of_the_dashboard_gives_numbers() {
    if run("prometheus", &["--version"]).is_none() {
        return;
    }
    let (mut cluster, admins) = cluster();
    // The scrape configuration of examples/deploy, without TLS, for these members.
    let dir = cluster.site.dir().to_owned();
    let targets: Vec<_> = admins.iter().map(|admin| format!("'{admin}'")).collect();
    let config = format!(
        "global: {{ scrape_interval: 250ms, evaluation_interval: 250ms }}\nrule_files: ['{}']\nscrape_configs: [{{ job_name: raftexample, static_configs: [{{ targets: [{}] }}] }}]\n",
        deploy().join("alerts.yml").display(),
        targets.join(", ")
    );
    fs::write(dir.join("prometheus.yml"), config).unwrap();
    let address = cluster.site.at(cluster.site.port());
    let mut command = Command::new("prometheus");
    command.args(["--config.file=prometheus.yml", "--storage.tsdb.path=prometheus"]);
    command.arg(format!("--web.listen-address={address}"));
    let _prometheus = cluster.site.spawn_command("prometheus", command, true);
    let prometheus = Prometheus(address);

    // Load until the end, with a refused request now and then.
    let is_over = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (cluster.addresses().into_iter().zip(admins.clone()))
        .enumerate()
        .map(|(writer, (address, admin))| {
            let is_over = is_over.clone();
            thread::spawn(move || {
                let mut client = Client::new(address);
                for turn in 0.. {
                    if is_over.load(Ordering::Relaxed) {
                        return;
                    }
                    let key = format!("/{writer}-{}", turn % 100);
                    let _ = client.put(&key, b"value");
                    let _ = client.get(&key);
                    if turn % 100 == 0 {
                        let _ = refused(admin);
                    }
                }
            })
        })
        .collect();
    let begun = Instant::now();
    let (leader, _) = cluster.leader();
    eventually(PATIENCE, "three members are scraped", || {
        let up = prometheus.query("sum(up{job=\"raftexample\"})");
        up.iter().any(|series| numbers(series).iter().any(|(_, value)| *value == 3.0))
    });
    show_for(Duration::from_secs(15));
    cluster.kill(leader);
    eventually(PATIENCE, "the alert of a dead member is pending", || {
        let query = "ALERTS{alertname=\"RaftexampleMemberDown\",alertstate=\"pending\"}";
        prometheus.query(query).len() == 1
    });
    show_for(Duration::from_secs(20));
    cluster.start_again(leader);

    let dashboard = fs::read_to_string(deploy().join("dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&dashboard).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    assert!(panels.len() >= 15, "the panels are found");
    for panel in panels {
        for target in panel["targets"].as_array().unwrap() {
            let (title, query) = (&panel["title"], substituted(target["expr"].as_str().unwrap()));
            let series =
                eventually_some(PATIENCE, &format!("{title}: {query} gives numbers"), || {
                    let series = prometheus.query(&query);
                    series.iter().any(|series| !numbers(series).is_empty()).then_some(series)
                });
            // The legend names labels that the series have.
            for label in target["legendFormat"].as_str().unwrap().split("{{").skip(1) {
                let label = label.split("}}").next().unwrap();
                let labels = &series[0]["metric"];
                assert!(labels[label].is_string(), "{title}: {label} in {labels}");
            }
        }
    }
    show_for(Duration::from_secs(20));
    if updates() {
        draw(&prometheus, panels, begun.elapsed());
    }
    is_over.store(true, Ordering::Relaxed);
    load.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(get(cluster.address(1), "/0-1").is_some());
}

/// A request that the admin port refuses: its host is another one's.
fn refused(admin: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&admin, ANSWER_TIMEOUT)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    write!(stream, "GET /status HTTP/1.0\r\nHost: other.example\r\n\r\n")?;
    stream.read_to_end(&mut Vec::new()).map(|_| ())
}

fn updates() -> bool {
    std::env::var_os("UPDATE_DASHBOARD").is_some()
}

/// Leaves the picture time to show a state. The test itself waits for conditions only.
fn show_for(duration: Duration) {
    if updates() {
        thread::sleep(duration);
    }
}

/// Draws the panels where Grafana places them, from what was scraped since `ago`.
fn draw(prometheus: &Prometheus, panels: &[Value], ago: Duration) {
    const COLUMN: i64 = 48;
    const ROW: i64 = 26;
    let now = prometheus.query("time()");
    let now = prometheus
        .api("query", &[("query", "time()")])
        .map_or_else(|| panic!("{now:?}"), |data| data["result"][0].as_f64().unwrap());
    let begun = now - ago.as_secs_f64();
    let place = |panel: &Value, name: &str| panel["gridPos"][name].as_i64().unwrap();
    let rows = panels.iter().map(|panel| place(panel, "y") + place(panel, "h")).max().unwrap();
    let path = deploy().join("dashboard.svg");
    let area = SVGBackend::new(&path, ((24 * COLUMN) as u32, (rows * ROW) as u32));
    let area = area.into_drawing_area();
    area.fill(&WHITE).unwrap();
    for panel in panels {
        let at = |name: &str, unit: i64| (place(panel, name) * unit) as i32;
        let (x, y, w, h) = (at("x", COLUMN), at("y", ROW), at("w", COLUMN), at("h", ROW));
        let area = area.clone().shrink((x + 4, y + 4), (w as u32 - 8, h as u32 - 8));
        let title = panel["title"].as_str().unwrap();
        let targets = panel["targets"].as_array().unwrap();
        if panel["type"] == "stat" {
            let series = prometheus.query(&substituted(targets[0]["expr"].as_str().unwrap()));
            let value = numbers(&series[0])[0].1.round();
            let style = ("sans-serif", 13).into_font();
            area.draw(&Text::new(title, (6, 6), style)).unwrap();
            let style = ("sans-serif", 34).into_font();
            area.draw(&Text::new(format!("{value}"), (6, 40), style)).unwrap();
            continue;
        }
        let mut lines = Vec::new();
        for target in targets {
            let query = substituted(target["expr"].as_str().unwrap());
            let range = [
                ("query", query.as_str()),
                ("start", &format!("{begun}")),
                ("end", &format!("{now}")),
                ("step", "1"),
            ];
            let data = prometheus.api("query_range", &range).unwrap();
            lines.extend(data["result"].as_array().unwrap().iter().map(numbers));
        }
        let top = lines.iter().flatten().map(|(_, value)| *value).fold(1e-9, f64::max);
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 13))
            .margin(4)
            .x_label_area_size(18)
            .y_label_area_size(58)
            .build_cartesian_2d(0.0..ago.as_secs_f64(), 0.0..top * 1.1)
            .unwrap();
        let unit = panel["fieldConfig"]["defaults"]["unit"].as_str().unwrap();
        let mut mesh = chart.configure_mesh();
        mesh.x_labels(5).y_labels(4).label_style(("sans-serif", 10)).light_line_style(WHITE);
        let named = |value: &f64| match unit {
            "s" => format!("{:.1} ms", value * 1000.0),
            "bytes" | "Bps" => format!("{:.1} MiB", value / f64::from(1 << 20)),
            _ => format!("{value:.1}"),
        };
        mesh.y_label_formatter(&named).x_label_formatter(&|second| format!("{second:.0} s"));
        mesh.draw().unwrap();
        for (number, line) in lines.into_iter().enumerate() {
            let colour = Palette99::pick(number).stroke_width(1);
            let line = line.into_iter().map(|(at, value)| (at - begun, value));
            chart.draw_series(LineSeries::new(line, colour)).unwrap();
        }
    }
    area.present().unwrap();
}

#[test]
fn metrics_that_alerts_and_dashboard_name_are_served() {
    let (cluster, admins) = cluster();
    // Series with labels begin when there is something to count.
    cluster.put(1, "/key", "value");
    refused(admins[0]).unwrap();
    let served = request(admins[0], "GET", "/metrics", b"").unwrap();
    let served = String::from_utf8(served.body).unwrap();
    for file in ["alerts.yml", "dashboard.json"] {
        let named = fs::read_to_string(deploy().join(file)).unwrap();
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let names = named.split(|c: char| !is_name(c));
        let names: BTreeSet<_> = names.filter(|name| name.starts_with("raftexample_")).collect();
        assert!(names.len() > 8, "{file} names metrics");
        for name in names {
            let ends = ["_bucket", "_count", "_sum"];
            let name = ends.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            assert!(served.contains(&format!("# TYPE {name} ")), "{file}: {name}");
        }
    }
}
