//! The live page in a real browser: headless Chromium, controlled over its DevTools protocol.
//!
//! The browser is `chromium`, `chromium-browser` or `google-chrome`, or the one that the variable
//! `CHROMIUM` names; without one the tests report that they skip. `UPDATE_SCREENSHOTS=1 cargo test
//! --test page schemes` also remakes README's pictures, which takes two minutes; review them, and
//! shrink them (pngquant, optipng), before keeping them.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::killpg;
use nix::unistd::Pid;
use serde_json::{Value, json};
use support::processes::{
    Client, Cluster, FAST, PATIENCE, Signal, Site, eventually, owned, request, skip,
};
use tempfile::TempDir;

/// A dead member must be shown as dead within this time.
const DEAD_WITHIN: Duration = Duration::from_secs(2);

/// Browsers are large: a test must not slow what another one measures.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The name of a Chromium that starts on this machine.
fn chromium() -> Option<String> {
    let named = std::env::var("CHROMIUM").ok();
    let usual = ["chromium", "chromium-browser", "google-chrome"].map(str::to_owned);
    let found = named.into_iter().chain(usual).find(|name| {
        // A stub that only says how to install it fails.
        let version = Command::new(name).arg("--version").stderr(Stdio::null()).output();
        version.is_ok_and(|output| output.status.success())
    });
    if found.is_none() {
        skip("the page was not tested: neither chromium nor google-chrome nor CHROMIUM starts");
    }
    found
}

/// A headless Chromium with one page open.
struct Browser {
    child: Child,
    requests: ChildStdin,
    messages: Receiver<Value>,
    session: Option<String>,
    calls: u64,
    /// Errors and exceptions in the page's console.
    problems: Vec<String>,
    /// The page's questions, each answered with yes.
    asked: Vec<String>,
    _profile: TempDir,
}

impl Browser {
    fn start(program: &str) -> Self {
        let profile = TempDir::with_prefix("raftexample-page-").unwrap();
        // The protocol uses descriptors 3 and 4, which only a shell can set up.
        let script = r#"exec "$@" 3<&0 4>&1 </dev/null >/dev/null"#;
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh", program, "--headless=new", "--remote-debugging-pipe"]);
        // Only our own page is loaded. A sandbox needs rights that root and containers lack.
        command.args([
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]);
        command.args(["--disable-background-networking", "--disable-component-update"]);
        command.args(["--hide-scrollbars", "--force-device-scale-factor=1"]);
        command.arg(format!("--user-data-dir={}", profile.path().display())).arg("about:blank");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.process_group(0).spawn().unwrap();
        let (requests, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (message_tx, messages) = mpsc::channel();
        thread::spawn(move || {
            for message in BufReader::new(answers).split(0) {
                let Ok(message) = message else { return };
                if message_tx.send(serde_json::from_slice(&message).unwrap()).is_err() {
                    return;
                }
            }
        });
        let (session, problems, asked) = (None, Vec::new(), Vec::new());
        let mut browser = Self {
            child,
            requests,
            messages,
            session,
            calls: 0,
            problems,
            asked,
            _profile: profile,
        };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let session = browser.call("Target.attachToTarget", attach)["sessionId"].clone();
        browser.session = session.as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser.resize(1280, 800);
        browser
    }

    fn send(&mut self, method: &str, params: Value) -> u64 {
        self.calls += 1;
        let mut request = json!({ "id": self.calls, "method": method, "params": params });
        if let Some(session) = &self.session {
            request["sessionId"] = json!(session);
        }
        self.requests.write_all(format!("{request}\0").as_bytes()).unwrap();
        self.calls
    }

    /// Calls a method of the protocol and handles events until its answer.
    fn call(&mut self, method: &str, params: Value) -> Value {
        let call = self.send(method, params);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let message = self.messages.recv_timeout(left).unwrap_or_else(|error| match error {
                RecvTimeoutError::Timeout => panic!("no answer to {method} within {PATIENCE:?}"),
                RecvTimeoutError::Disconnected => panic!("the browser ended before {method}"),
            });
            if message["id"] == call {
                assert!(message["error"].is_null(), "{method}: {message}");
                return message["result"].clone();
            }
            self.take(&message);
        }
    }

    fn take(&mut self, event: &Value) {
        let params = &event["params"];
        let is_problem = match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => true,
            Some("Runtime.consoleAPICalled") => ["error", "warning", "assert"]
                .contains(&params["type"].as_str().unwrap_or_default()),
            Some("Log.entryAdded") => ["error", "warning"]
                .contains(&params["entry"]["level"].as_str().unwrap_or_default()),
            Some("Page.javascriptDialogOpening") => {
                self.asked.push(params["message"].to_string());
                // The call that opened the dialog is answered only after this one.
                self.send("Page.handleJavaScriptDialog", json!({ "accept": true }));
                false
            }
            _ => false,
        };
        if is_problem {
            self.problems.push(params.to_string());
        }
    }

    /// The value of an expression in the page.
    fn value(&mut self, expression: &str) -> Value {
        let params =
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let result = self.call("Runtime.evaluate", params);
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result}");
        result["result"]["value"].clone()
    }

    fn text(&mut self, selector: &str) -> String {
        let text = self.value(&format!("document.querySelector({})?.textContent", json!(selector)));
        text.as_str().unwrap_or_default().to_owned()
    }

    fn shows(&mut self, selector: &str, text: &str) {
        eventually(PATIENCE, &format!("{selector} shows {text:?}"), || {
            self.text(selector).contains(text)
        });
    }

    /// The role that a member's circle shows.
    fn role(&mut self, id: u64) -> String {
        self.text(&format!(".node[data-id='{id}'] .role"))
    }

    fn open(&mut self, admin: SocketAddr) {
        self.call("Page.navigate", json!({ "url": format!("http://{admin}/") }));
        self.shows("#stream", "live");
    }

    fn resize(&mut self, width: u32, height: u32) {
        let size =
            json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", size);
    }

    fn prefer(&mut self, scheme: &str) {
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": features }));
    }

    fn press(&mut self, key: &str) {
        let (code, text) = match key {
            "Tab" => (9, ""),
            "Enter" => (13, "\r"),
            "ArrowDown" => (40, ""),
            _ => panic!("no code is known of {key}"),
        };
        let event = |kind| json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": text });
        self.call("Input.dispatchKeyEvent", event("keyDown"));
        self.call("Input.dispatchKeyEvent", event("keyUp"));
    }

    /// Presses Tab until the element has the focus.
    fn tab_to(&mut self, selector: &str) {
        let expression = format!("document.activeElement.matches({})", json!(selector));
        for _ in 0..50 {
            if self.value(&expression) == true {
                return;
            }
            self.press("Tab");
        }
        panic!("Tab does not reach {selector}");
    }

    /// Types into a field reached with Tab.
    fn type_into(&mut self, selector: &str, text: &str) {
        self.tab_to(selector);
        self.value("document.activeElement.select()");
        self.call("Input.insertText", json!({ "text": text }));
    }

    /// Chooses from a list reached with Tab, with the arrow keys.
    fn choose(&mut self, selector: &str, value: &str) {
        self.tab_to(selector);
        for _ in 0..10 {
            if self.value("document.activeElement.value") == value {
                return;
            }
            self.press("ArrowDown");
        }
        panic!("{selector} has no {value}");
    }

    fn screenshot(&mut self) -> Vec<u8> {
        let picture = self.call("Page.captureScreenshot", json!({ "format": "png" }));
        base64(picture["data"].as_str().unwrap())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // With all its processes; some may have ended by themselves.
        let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("problems in the page: {:#?}", self.problems);
        }
    }
}

fn base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut held, mut bits) = (Vec::new(), 0u32, 0);
    for digit in text.bytes().filter(|digit| *digit != b'=') {
        held = held << 6 | DIGITS.iter().position(|known| *known == digit).unwrap() as u32;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((held >> bits) as u8);
        }
    }
    bytes
}

/// Members and a browser, for one test at a time.
struct Scene {
    browser: Browser,
    cluster: Cluster,
    admins: Vec<SocketAddr>,
    _turn: MutexGuard<'static, ()>,
}

impl Scene {
    /// Three members without an open page, or `None` without a browser.
    fn start(more: &[&str]) -> Option<Self> {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let program = chromium()?;
        let site = Site::new();
        let mut places: Vec<_> = (0..3).map(|_| site.place(site.url())).collect();
        let admins: Vec<_> = places.iter().map(|_| site.at(site.port())).collect();
        for (place, admin) in places.iter_mut().zip(&admins) {
            place.flags = owned(&["--admin", &admin.to_string()]);
        }
        let cluster = Cluster::start_at(site, places, more);
        Some(Self { browser: Browser::start(&program), cluster, admins, _turn: turn })
    }

    fn open(&mut self, id: u64) {
        self.browser.open(self.admins[id as usize - 1]);
    }

    fn assert_without_problems(&self) {
        assert!(self.browser.problems.is_empty(), "{:#?}", self.browser.problems);
    }
}

#[test]
fn the_page_loads_without_errors_and_shows_the_leader() {
    let Some(mut scene) = Scene::start(&FAST) else { return };
    let (leader, _) = scene.cluster.leader();
    for id in 1..=3 {
        scene.open(id);
        scene.browser.shows("#summary", &format!("Member {leader} leads in term "));
        scene.browser.shows("#summary", "3 of 3 members alive");
        for member in 1..=3 {
            let expected = if member == leader { "leader" } else { "follower" };
            let role = format!(".node[data-id='{member}'] .role");
            scene.browser.shows(&role, expected);
            let facts = scene.browser.text(&format!(".node[data-id='{member}'] .facts"));
            assert!(facts.starts_with("term "), "{facts}");
            let vote = facts.rsplit(' ').next().unwrap();
            assert!(vote == "vote" || vote.parse::<u64>().is_ok(), "{facts}");
        }
    }
    let mark = "document.querySelector('#rows .mark.apply').style.left";
    let before = scene.browser.value(mark);
    scene.cluster.put(1, "/moves", "the marks");
    eventually(PATIENCE, "the mark moves", || scene.browser.value(mark) != before);
    // Heartbeats continue, so dots do too.
    eventually(PATIENCE, "messages are seen", || {
        scene.browser.value("document.querySelectorAll('#dots path').length") != 0
    });
    scene.assert_without_problems();
}

#[test]
fn a_put_made_with_the_keyboard_is_there_and_is_shown() {
    let Some(mut scene) = Scene::start(&FAST) else { return };
    scene.open(2);
    let browser = &mut scene.browser;
    browser.type_into("#put [name=key]", "a key/with \u{fc}&?#%");
    browser.type_into("#put [name=value]", "<b>a value</b>");
    browser.press("Enter");
    browser.shows("#put output", "204a key/with \u{fc}&?#% = <b>a value</b>entry ");
    // Escaped, except for the slash.
    let target = "/a%20key/with%20%C3%BC%26%3F%23%25";
    assert_eq!(scene.cluster.get(3, target).as_deref(), Some("<b>a value</b>"));
    let browser = &mut scene.browser;
    browser.type_into("#get [name=key]", "/a key/with \u{fc}&?#%");
    browser.press("Enter");
    browser.shows("#get output", "200<b>a value</b>entry ");
    // They appear in one step of the charts, whose last values are beside them.
    let least = "Math.min(...['throughput', 'latency'].map(chart => Math.max(...[...document.querySelectorAll(`#${chart} .series b`)].map(b => parseFloat(b.textContent) || 0))))";
    eventually(PATIENCE, "the requests are in both lines", || {
        browser.value(least).as_f64().is_some_and(|least| least > 0.0)
    });
    scene.assert_without_problems();

    scene.browser.type_into("#get [name=key]", "nobody-wrote-it");
    scene.browser.press("Enter");
    scene.browser.shows("#get output", "404");
    scene.browser.type_into("#put [name=key]", "a/../b");
    scene.browser.press("Enter");
    scene.browser.shows("#put output", "A browser cannot send a key");
}

#[test]
fn a_killed_leader_is_shown_as_dead_within_two_seconds() {
    // With the default flags, which users have.
    let Some(mut scene) = Scene::start(&[]) else { return };
    let (leader, _) = scene.cluster.leader();
    let watched = leader % 3 + 1;
    scene.open(watched);
    eventually(PATIENCE, "all are seen", || scene.browser.role(leader) == "leader");
    let killed = Instant::now();
    scene.cluster.kill(leader);
    eventually(PATIENCE, "it is dead", || scene.browser.role(leader) == "dead");
    let took = killed.elapsed();
    assert!(took <= DEAD_WITHIN, "shown as dead {took:?} after it was killed");
    eprintln!("shown as dead after {took:?}");
    scene.browser.shows("#happened", &format!("Member {leader} is dead"));
    scene.browser.shows("#summary", "2 of 3 members alive");
    eventually(PATIENCE, "another leads", || {
        (1..=3).any(|id| id != leader && scene.browser.role(id) == "leader")
    });
    scene.browser.shows("#happened", " leads in term ");

    scene.cluster.start_again(leader);
    eventually(PATIENCE, "it is back", || scene.browser.role(leader) == "follower");
    scene.browser.shows("#happened", &format!("Member {leader} answers again"));
    scene.browser.shows("#happened", &format!("Member {leader} was restarted"));
    scene.assert_without_problems();
}

#[test]
fn a_page_reports_its_own_member_gone_and_recovers() {
    let Some(mut scene) = Scene::start(&FAST) else { return };
    scene.open(1);
    scene.browser.shows("#summary", "3 of 3 members alive");
    // Its connections stay open.
    scene.cluster.process(1).pause();
    scene.browser.shows("#banner:not([hidden])", "Member 1 at ");
    assert_eq!(scene.browser.role(1), "no answer");
    assert_eq!(scene.browser.text("#stream"), "connection lost");
    scene.cluster.process(1).signal(Signal::SIGCONT);
    scene.browser.shows("#stream", "live");

    scene.cluster.kill(1);
    scene.browser.shows("#banner:not([hidden])", "does not answer");
    assert_eq!(scene.browser.role(1), "no answer");
    assert_eq!(scene.browser.role(2), "unknown");
    scene.cluster.start_again(1);
    scene.browser.shows("#stream", "live");
    scene.browser.shows("#summary", "3 of 3 members alive");
    assert_eq!(scene.browser.value("document.querySelector('#banner').hidden"), true);
}

#[test]
fn the_keyboard_transfers_leadership_and_changes_members() {
    let Some(mut scene) = Scene::start(&FAST) else { return };
    let (leader, _) = scene.cluster.leader();
    let other = leader % 3 + 1;
    scene.open(1);
    scene.browser.choose("#lead select", &other.to_string());
    scene.browser.tab_to("#lead button");
    scene.browser.press("Enter");
    scene.browser.shows("#lead output", &format!("204Member {other} leads"));
    scene.browser.shows("#summary", &format!("Member {other} leads in term "));
    assert_eq!(scene.cluster.leader().0, other);

    let url = scene.cluster.new_url(4);
    scene.browser.type_into("#add [name=id]", "4");
    scene.browser.type_into("#add [name=url]", &url);
    scene.browser.press("Enter");
    scene.browser.shows("#add output", "204Member 4");
    scene.browser.shows("#happened", "Member 4 was added");
    scene.cluster.start_joiner(4);
    eventually(PATIENCE, "the new member follows", || scene.browser.role(4) == "follower");

    scene.browser.choose("#remove select", "4");
    scene.browser.tab_to("#remove button");
    scene.browser.press("Enter");
    scene.browser.shows("#remove output", "204Member 4 was removed");
    scene.browser.shows("#happened", "Member 4 was removed");
    assert_eq!(scene.browser.role(4), "", "it is in the circle no more");
    assert_eq!(scene.cluster.process(4).wait(PATIENCE), 0, "it knows that it was removed");
    assert!(scene.browser.asked[0].contains("Remove member 4"), "{:?}", scene.browser.asked);
    scene.assert_without_problems();

    // A member's refusal is shown in its own words.
    scene.browser.type_into("#add [name=id]", "4");
    scene.browser.type_into("#add [name=url]", &url);
    scene.browser.press("Enter");
    scene.browser.shows("#add output", "410");
}

#[test]
fn tab_reaches_every_control_and_shows_where_it_is() {
    let Some(mut scene) = Scene::start(&FAST) else { return };
    scene.open(1);
    scene.browser.shows("#summary", "3 of 3 members alive");
    scene.browser.value(
        "window.controls = [...document.querySelectorAll('a[href], button, input, select, [tabindex]')].filter(e => e.checkVisibility()); 0",
    );
    let controls = scene.browser.value("controls.length").as_u64().unwrap();
    assert!(controls >= 13, "the forms have 13 controls: {controls}");
    let unnamed = "controls.filter(e => !(e.localName == 'button' ? e.textContent : e.labels?.length || e.hasAttribute('aria-labelledby'))).map(e => e.outerHTML)";
    assert_eq!(scene.browser.value(unnamed), json!([]), "each has a name");
    let mut reached = BTreeSet::new();
    for _ in 0..controls {
        scene.browser.press("Tab");
        let place = scene.browser.value("controls.indexOf(document.activeElement)");
        reached.insert(place.as_i64().unwrap());
        let outline = scene.browser.value("getComputedStyle(document.activeElement).outlineStyle");
        assert_eq!(outline, "solid", "control {place} shows the focus");
    }
    assert_eq!(reached, (0..controls as i64).collect());
}

#[test]
fn both_colour_schemes_and_a_narrow_window_render() {
    let Some(mut scene) = Scene::start(&[]) else { return };
    scene.open(1);
    if std::env::var_os("UPDATE_SCREENSHOTS").is_some() {
        pose(&mut scene);
    }
    let colours = "['body', '.panel', '#summary', 'input', '.node[data-state=leader] circle'].map(s => { const c = getComputedStyle(document.querySelector(s)); return [c.color, c.backgroundColor, c.fill].join() })";
    let mut seen = Vec::new();
    for (scheme, file) in [("light", "page.png"), ("dark", "page-dark.png")] {
        scene.browser.prefer(scheme);
        scene.browser.shows(".node[data-state=leader] .role", "leader");
        seen.push(scene.browser.value(colours));
        let picture = scene.browser.screenshot();
        assert!(picture.starts_with(b"\x89PNG") && picture.len() > 20_000, "something is drawn");
        if std::env::var_os("UPDATE_SCREENSHOTS").is_some() {
            let path = format!("{}/src/ports/admin/{file}", env!("CARGO_MANIFEST_DIR"));
            std::fs::write(path, picture).unwrap();
        }
    }
    let (light, dark) = (seen[0].as_array().unwrap(), seen[1].as_array().unwrap());
    for (light, dark) in light.iter().zip(dark) {
        assert_ne!(light, dark, "each of them has a colour for each scheme");
    }
    for width in [1280, 420] {
        scene.browser.resize(width, 800);
        let is_wider = "document.documentElement.scrollWidth > innerWidth";
        assert_eq!(scene.browser.value(is_wider), false, "{width} pixels are enough");
    }
    scene.assert_without_problems();
}

/// The scene of README's pictures: load, a change of leaders, a member that died and returned.
fn pose(scene: &mut Scene) {
    for (writer, address) in scene.cluster.addresses().into_iter().cycle().take(9).enumerate() {
        // It ends with the process: the pictures need it until they are made.
        thread::spawn(move || {
            let mut client = Client::new(address);
            for turn in 0u64.. {
                let key = format!("/key-{writer}-{}", turn % 500);
                let _ = client.put(&key, &[b'v'; 100]);
                // Most clients read more than they write.
                for _ in 0..1 + turn / 300 % 3 {
                    let _ = client.get(&key);
                }
                // The rate rises and falls, for a visible curve.
                let wave = (turn as f64 / 400.0 + writer as f64).sin() + 1.4;
                thread::sleep(Duration::from_secs_f64(wave * 0.008));
            }
        });
    }
    let (leader, _) = scene.cluster.leader();
    // Neither the leader nor the member of this page.
    let dead = (2..=3).find(|id| *id != leader).unwrap();
    thread::sleep(Duration::from_secs(60));
    scene.cluster.kill(dead);
    thread::sleep(Duration::from_secs(15));
    scene.cluster.start_again(dead);
    thread::sleep(Duration::from_secs(30));
    let target = format!("/transfer-leadership?to={dead}");
    assert_eq!(request(scene.admins[0], "POST", &target, b"").unwrap().status, 204);
    thread::sleep(Duration::from_secs(25));
    scene.browser.type_into("#put [name=key]", "my-key");
    scene.browser.type_into("#put [name=value]", "hello");
    scene.browser.press("Enter");
    scene.browser.shows("#put output", "204");
    scene.browser.type_into("#get [name=key]", "my-key");
    scene.browser.press("Enter");
    scene.browser.shows("#get output", "200hello");
    scene.browser.value("document.activeElement.blur()");
}
