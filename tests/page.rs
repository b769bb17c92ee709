//! The live page, and what pages of other origins can do to a member's ports, in a real browser: headless
//! Chromium, controlled over its DevTools protocol.
//!
//! The browser is `chromium`, `chromium-browser` or `google-chrome`, or the one that the variable
//! `CHROMIUM` names; without one the tests report that they skip. `UPDATE_SCREENSHOTS=1 cargo test
//! --test page schemes` also remakes the pictures of README and the guide, which takes two minutes; review
//! them, and shrink them (pngquant, optipng), before keeping them.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
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
    /// Starts it with more flags.
    fn start(program: &str, more: &[String]) -> Self {
        let profile = TempDir::with_prefix("raftexample-page-").unwrap();
        // The protocol uses descriptors 3 and 4, which only a shell can set up.
        let script = r#"exec "$@" 3<&0 4>&1 </dev/null >/dev/null"#;
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh", program, "--headless=new", "--remote-debugging-pipe"]);
        // Only pages of the test are loaded. A sandbox needs rights that root and containers lack.
        command.args([
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]);
        command.args(["--disable-background-networking", "--disable-component-update"]);
        command.args(["--hide-scrollbars", "--force-device-scale-factor=1"]);
        command.arg(format!("--user-data-dir={}", profile.path().display()));
        command.args(more).arg("about:blank");
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

    /// The texts of all elements that the selector names.
    fn texts(&mut self, selector: &str) -> Vec<String> {
        let all =
            format!("[...document.querySelectorAll({})].map(e => e.textContent)", json!(selector));
        serde_json::from_value(self.value(&all)).unwrap()
    }

    /// The keys in the list, in order.
    fn keys(&mut self) -> Vec<String> {
        self.texts("#found th")
    }

    /// Waits until the list has exactly these keys.
    fn lists(&mut self, keys: &[&str]) {
        let mut shown = Vec::new();
        eventually(PATIENCE, &format!("{keys:?} are listed"), || {
            shown = self.keys();
            shown == keys
        });
    }

    /// Lists the keys with this prefix, by the keyboard, and waits until they are watched.
    fn list(&mut self, prefix: &str) {
        self.type_into("#prefix [name=prefix]", prefix);
        self.value("document.querySelector('#watch').textContent = 'as before'");
        self.press("Enter");
        self.shows("#watch", "live");
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

/// What a page of another server may try, each as a function that returns what the page gets.
const ATTEMPTS: &str = r"
window.attempts = {
  script: (url) => new Promise((done) => {
    delete window.stolen;
    const script = document.createElement('script');
    script.onload = script.onerror = () => done(window.stolen ?? 'nothing');
    script.src = url;
    document.body.append(script);
  }),
  image: (url) => new Promise((done) => {
    const image = new Image();
    image.onload = () => done('shown');
    image.onerror = () => done('nothing');
    image.src = url;
  }),
  events: (url) => new Promise((done) => {
    const source = new EventSource(url);
    const end = (got) => { source.close(); done(got); };
    for (const kind of ['message', 'put', 'delete', 'reset']) {
      source.addEventListener(kind, (event) => end(event.data));
    }
    source.onerror = () => end('nothing');
  }),
  fetch: (url, options) => fetch(url, options).then(
    async (answer) => `${answer.type} ${answer.status} ${await answer.text()}`,
    () => 'nothing',
  ),
  beacon: (url, text) => navigator.sendBeacon(url, text),
  // A form sends NAME=VALUE. Nothing tells the page that a response without content arrived.
  form: (url, name, value) => {
    const frame = document.createElement('iframe');
    frame.name = 'answer';
    const form = document.createElement('form');
    Object.assign(form, { action: url, method: 'POST', enctype: 'text/plain', target: 'answer' });
    const input = document.createElement('input');
    Object.assign(input, { name, value });
    form.append(input);
    document.body.append(frame, form);
    form.submit();
  },
};
0";

/// A server that is no member, for the pages of others. Returns its port.
fn serve_pages(site: &Site) -> u16 {
    let listener = TcpListener::bind((site.address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    // It ends with the process. Browsers open connections in advance, so each has a thread.
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || answer_page(stream));
        }
    });
    port
}

fn answer_page(mut stream: TcpStream) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let (kind, body) = match first.split(' ').nth(1) {
        Some("/script") => ("text/javascript", "window.stolen = 'loot'"),
        Some("/image") => ("image/svg+xml", "<svg xmlns='http://www.w3.org/2000/svg'/>"),
        Some("/events") => ("text/event-stream", "data: loot\n\n"),
        _ => ("text/html", "<!doctype html><title>A page of others</title>"),
    };
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nAccess-Control-Allow-Origin: *\r\nConnection: close\r\n\r\n{body}"
    )
}

/// A server of the page alone, at which nothing ever changes: the cluster is `cluster`, and there is one key.
/// Returns its address.
fn serve_cluster(site: &Site, cluster: Value) -> SocketAddr {
    let listener = TcpListener::bind((site.address, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let cluster = cluster.clone();
            thread::spawn(move || answer_for_cluster(stream, &cluster));
        }
    });
    address
}

fn answer_for_cluster(mut stream: TcpStream, cluster: &Value) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let path = first.split(' ').nth(1).unwrap_or_default().split('?').next().unwrap();
    let keys = json!({ "index": 1_234_567, "from": "1-1234567", "next": null, "keys": [
        { "key": "/app/config/region", "bytes": 1_048_576, "etag": "1-1234567" },
    ]});
    let (kind, body) = match path {
        "/" => ("text/html", include_str!("../src/ports/admin/page.html").to_owned()),
        "/page.css" => ("text/css", include_str!("../src/ports/admin/page.css").to_owned()),
        "/page.js" => ("text/javascript", include_str!("../src/ports/admin/page.js").to_owned()),
        "/v1/keys" => ("application/json", keys.to_string()),
        _ => {
            let head =
                "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n";
            write!(stream, "{head}")?;
            let event =
                if path == "/events" { format!("data: {cluster}\n\n") } else { ":\n\n".into() };
            loop {
                write!(stream, "{event}")?;
                thread::sleep(Duration::from_millis(200));
            }
        }
    };
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

/// Finds texts that overlap or are cut off by the window, in what is visible.
const MISPLACED: &str = r"
(() => {
  const boxes = [];
  const problems = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode;
    const of = text.parentElement;
    if (!text.data.trim() || of.closest('option, script, noscript, .hidden')) continue;
    if (!of.checkVisibility({ visibilityProperty: true })) continue;
    const range = document.createRange();
    range.selectNodeContents(text);
    for (const { left, top, right, bottom } of range.getClientRects()) {
      const box = { text: text.data, left, top, right, bottom };
      for (let at = of; at; at = at.parentElement) {
        if (at instanceof SVGElement || getComputedStyle(at).overflow === 'visible') continue;
        const clip = at.getBoundingClientRect();
        box.left = Math.max(box.left, clip.left);
        box.top = Math.max(box.top, clip.top);
        box.right = Math.min(box.right, clip.right);
        box.bottom = Math.min(box.bottom, clip.bottom);
      }
      if (box.right - box.left < 1 || box.bottom - box.top < 1) continue;
      if (box.left < 0 || box.right > innerWidth) problems.push(`${box.text} is cut off`);
      boxes.push(box);
    }
  }
  boxes.forEach((a, place) => {
    for (const b of boxes.slice(place + 1)) {
      const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (width > 2 && height > 3) problems.push(`${a.text} over ${b.text}`);
    }
  });
  return problems;
})()";

/// The sum of the admin port's metrics whose names and labels begin so.
fn metric(admin: SocketAddr, begin: &str) -> f64 {
    let answer = request(admin, "GET", "/metrics", b"").unwrap();
    let text = String::from_utf8(answer.body).unwrap();
    let values = text.lines().filter(|line| line.starts_with(begin));
    values.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
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
        Self::start_of(3, more)
    }

    /// As [`start`](Self::start), with `size` members. To the browser, every name below `.example` is the
    /// address of the members.
    fn start_of(size: usize, more: &[&str]) -> Option<Self> {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let program = chromium()?;
        let site = Site::new();
        let mut places: Vec<_> = (0..size).map(|_| site.place(site.url())).collect();
        let admins: Vec<_> = places.iter().map(|_| site.at(site.port())).collect();
        for (place, admin) in places.iter_mut().zip(&admins) {
            place.flags = owned(&["--admin", &admin.to_string()]);
        }
        let cluster = Cluster::start_at(site, places, more);
        let names = format!("--host-resolver-rules=MAP *.example {}", cluster.site.address);
        let browser = Browser::start(&program, &[names]);
        Some(Self { browser, cluster, admins, _turn: turn })
    }

    fn open(&mut self, id: u64) {
        self.browser.open(self.admins[id as usize - 1]);
    }

    /// The client and the admin address of member 1.
    fn ports(&self) -> [SocketAddr; 2] {
        [self.cluster.address(1), self.admins[0]]
    }

    /// Opens a page to make attempts in, which need not be one of a member's.
    fn visit(&mut self, url: &str) {
        self.browser.call("Page.navigate", json!({ "url": url }));
        let is_there = format!("location.href == {} && document.readyState", json!(url));
        let why = format!("{url} is open");
        eventually(PATIENCE, &why, || self.browser.value(&is_there) == "complete");
        self.browser.value(ATTEMPTS);
    }

    /// What the page gets from an attempt, as text.
    fn attempt(&mut self, call: &str) -> String {
        let got = self.browser.value(&format!("attempts.{call}"));
        got.as_str().map_or_else(|| got.to_string(), str::to_owned)
    }

    /// The same, once the metrics that begin so have grown, which shows that the request arrived. No
    /// attempt may change the members.
    fn attempt_counted(&mut self, call: &str, begin: &str) -> String {
        let (count, members) = (metric(self.admins[0], begin), self.member_ids());
        let got = self.attempt(call);
        let why = format!("{call} is counted in {begin}; the page got {got:?}");
        eventually(PATIENCE, &why, || {
            assert_eq!(self.member_ids(), members, "{call} changed the members");
            metric(self.admins[0], begin) > count
        });
        got
    }

    /// Waits for these members: an acknowledged change is shown a moment later.
    fn has_members(&self, ids: &[u64]) {
        eventually(PATIENCE, &format!("the members are {ids:?}"), || self.member_ids() == ids);
    }

    /// What the page gets from an attempt that the member refuses.
    fn attempt_refused(&mut self, call: &str) -> String {
        self.attempt_counted(call, "raftexample_rejected_total{reason=\"foreign_")
    }

    fn member_ids(&self) -> Vec<u64> {
        let answer = request(self.admins[0], "GET", "/members", b"").unwrap();
        let members: Vec<Value> = serde_json::from_slice(&answer.body).unwrap();
        members.iter().map(|member| member["id"].as_u64().unwrap()).collect()
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
    // A key is a request target: what a URL cannot hold is escaped, and the rest is as it was typed.
    let key = "/a%20'key'/with%20%C3%BC&?%23%25%2f";
    for (typed, status) in [("a 'key'/with \u{fc}&?#%%2f", 201), (key, 204)] {
        browser.type_into("#put [name=key]", typed);
        browser.type_into("#put [name=value]", "<b>a value</b>");
        browser.press("Enter");
        browser.shows("#put output", &format!("{status}{key} = <b>a value</b>entry "));
    }
    assert_eq!(scene.cluster.get(3, key).as_deref(), Some("<b>a value</b>"));
    let browser = &mut scene.browser;
    for typed in ["a 'key'/with \u{fc}&?#%%2f", key] {
        browser.type_into("#get [name=key]", typed);
        browser.press("Enter");
        browser.shows("#get output", "200<b>a value</b>entry ");
    }
    // They appear in one step of the charts, whose last values are beside them.
    let least = "Math.min(...['throughput', 'latency'].map(chart => Math.max(...[...document.querySelectorAll(`#${chart} .series b`)].map(b => parseFloat(b.textContent) || 0))))";
    eventually(PATIENCE, "the requests are in both lines", || {
        browser.value(least).as_f64().is_some_and(|least| least > 0.0)
    });
    scene.assert_without_problems();

    scene.browser.type_into("#get [name=key]", "nobody-wrote-it");
    scene.browser.press("Enter");
    scene.browser.shows("#get output", "404the key does not exist");
    scene.browser.value("document.querySelector('#get output').textContent = ''");
    for key in ["/a/../b", "/%2e%2E/members/4"] {
        scene.browser.type_into("#get [name=key]", key);
        scene.browser.press("Enter");
        scene.browser.shows("#get output", &format!("A browser cannot request the key {key}"));
    }
}

#[test]
fn the_list_follows_other_clients_and_its_own_forms() {
    let Some(mut scene) = Scene::start(&FAST) else { return };
    scene.cluster.put(2, "/app/b", "value");
    scene.cluster.put(2, "/other", "value");
    scene.open(1);
    scene.browser.shows("#watch", "live");
    scene.browser.lists(&["/app/b", "/other"]);
    scene.browser.list("app/");
    scene.browser.lists(&["/app/b"]);

    // Of another client, at another member.
    scene.cluster.put(3, "/app/a", "longer value");
    scene.cluster.put(3, "/zoo", "value");
    scene.cluster.put(3, "/app/c", "value");
    scene.browser.lists(&["/app/a", "/app/b", "/app/c"]);
    let row = scene.browser.texts("#found tr:first-child > *");
    assert_eq!(row[..2], ["/app/a", "12"]);
    let answer = request(scene.admins[1], "GET", "/v1/kv/app/a", b"").unwrap();
    assert_eq!(row[2].replace(',', ""), answer.headers["raft-index"], "its entry");
    scene.cluster.put(2, "/app/a", "new");
    scene.browser.shows("#found tr:first-child td", "3");
    let answer = request(scene.admins[2], "DELETE", "/v1/kv/app/b", b"").unwrap();
    assert_eq!(answer.status, 204);
    scene.browser.lists(&["/app/a", "/app/c"]);
    let recent = scene.browser.texts("#recent li > :not(time)");
    let changes =
        ["delete", "/app/b", "put", "/app/a", "put", "/app/c", "put", "/app/a", "listed at entry "];
    assert_eq!(recent[..8], changes[..8], "the newest is first");
    assert!(recent[8].starts_with(changes[8]), "{recent:?}");

    // By the page's own forms.
    scene.browser.type_into("#put [name=key]", "app/d");
    scene.browser.press("Enter");
    scene.browser.lists(&["/app/a", "/app/c", "/app/d"]);
    scene.browser.type_into("#get [name=key]", "/app/a");
    scene.browser.tab_to("#get .danger");
    scene.browser.press("Enter");
    scene.browser.shows("#get output", "204/app/a was deletedentry ");
    assert!(scene.browser.asked[0].contains("Delete the key /app/a?"), "{:?}", scene.browser.asked);
    scene.browser.lists(&["/app/c", "/app/d"]);
    assert_eq!(scene.cluster.get(2, "/app/a"), None);
    scene.assert_without_problems();
    scene.browser.press("Enter");
    scene.browser.shows("#get output", "404the key does not exist");
}

#[test]
fn the_list_has_pages_that_are_watched_too() {
    let Some(mut scene) = Scene::start_of(1, &FAST) else { return };
    let name = |number: usize| format!("/{number:03}");
    (0..250).for_each(|number| scene.cluster.put(1, &name(number), "value"));
    let names: Vec<String> = (0..250).map(name).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    scene.open(1);
    scene.browser.lists(&names[..100]);
    // A page stays as long as it may be, and the next one begins after it.
    scene.cluster.put(1, "/000-new", "value");
    let page = [&["/000", "/000-new"], &names[1..99]].concat();
    scene.browser.lists(&page);
    let delete = |key: &str| {
        let answer = request(scene.admins[0], "DELETE", &format!("/v1/kv{key}"), b"").unwrap();
        assert_eq!(answer.status, 204, "{key}");
    };
    for (first, count) in
        [(99, "100 keys on this page, more follow"), (199, "51 keys on this page")]
    {
        scene.browser.shows("#watch", "live");
        scene.browser.tab_to("#next-page");
        scene.browser.press("Enter");
        scene.browser.lists(&names[first..250.min(first + 100)]);
        scene.browser.shows("#listed-count", count);
    }
    // Keys of other pages are no part of this one.
    scene.browser.shows("#watch", "live");
    scene.cluster.put(1, "/000-newer", "value");
    scene.cluster.put(1, "/999", "value");
    scene.browser.lists(&[&names[199..], &["/999"]].concat());
    assert_eq!(scene.browser.value("document.querySelector('#next-page').hidden"), true);
    scene.browser.tab_to("#first-page");
    scene.browser.press("Enter");
    let page = [&["/000", "/000-new", "/000-newer"], &names[1..98]].concat();
    scene.browser.lists(&page);
    // A page without keys makes room for those of the next one.
    page.iter().for_each(|key| delete(key));
    scene.browser.lists(&names[98..198]);
    scene.assert_without_problems();
}

/// The connections that member 1 counts as watching.
fn watchers(scene: &Scene) -> f64 {
    metric(scene.admins[0], "raftexample_watchers")
}

/// A browser allows six connections to a server.
#[test]
fn a_page_has_one_watch_and_a_hidden_page_none() {
    let Some(mut scene) = Scene::start_of(1, &FAST) else { return };
    scene.open(1);
    for prefix in ["/a", "/b", "/c", ""] {
        scene.browser.list(prefix);
    }
    eventually(PATIENCE, "one watch is left", || watchers(&scene) == 1.0);
    let hide = |is_hidden: bool| {
        format!(
            "Object.defineProperty(document, 'hidden', {{ value: {is_hidden}, configurable: true }}); document.dispatchEvent(new Event('visibilitychange'))"
        )
    };
    scene.browser.value(&hide(true));
    eventually(PATIENCE, "no watch is left", || watchers(&scene) == 0.0);
    assert_eq!(scene.browser.text("#watch"), "paused in a hidden tab");
    scene.cluster.put(1, "/meanwhile", "value");
    scene.browser.value(&hide(false));
    scene.browser.shows("#watch", "live");
    scene.browser.lists(&["/meanwhile"]);
    assert_eq!(watchers(&scene), 1.0);
    scene.assert_without_problems();
}

#[test]
fn hostile_keys_and_values_are_shown_as_text() {
    let Some(mut scene) = Scene::start_of(1, &FAST) else { return };
    // No HTTP client can name the second key, so the page is given events that a member would not send.
    let source = "window.sources = []; window.EventSource = class extends EventSource { constructor(url) { super(url); sources.push(this); } }";
    let source = json!({ "source": source });
    scene.browser.call("Page.addScriptToEvaluateOnNewDocument", source);
    const HOSTILE: &str = "<img src=x onerror='window.hacked = 1'>";
    let key = "/%3Cimg%20src=x%20onerror='window.hacked=1'%3E&lt;img%20src=x&gt;";
    scene.cluster.put(1, key, HOSTILE);
    scene.open(1);
    scene.browser.shows("#watch", "live");
    scene.browser.lists(&[key]);
    let event = format!(
        "sources.at(-1).dispatchEvent(new MessageEvent('put', {{ data: JSON.stringify({{ key: '/z' + {}, bytes: {} }}), lastEventId: '00-7.0' }}))",
        json!(HOSTILE),
        json!(HOSTILE)
    );
    scene.browser.value(&event);
    scene.browser.lists(&[key, &format!("/z{HOSTILE}")]);
    scene.browser.shows("#recent", &format!("/z{HOSTILE}"));
    scene.browser.type_into("#get [name=key]", key);
    scene.browser.press("Enter");
    scene.browser.shows("#get output", &format!("200{HOSTILE}"));
    scene.browser.list(HOSTILE);
    scene.browser.lists(&[]);
    let made = "document.querySelectorAll('img, script:not([src]), [onerror]').length + (window.hacked ?? 0)";
    assert_eq!(scene.browser.value(made), 0);
    scene.assert_without_problems();
}

#[test]
fn a_watch_resumes_after_its_member_was_killed() {
    let Some(mut scene) = Scene::start(&FAST) else { return };
    scene.cluster.put(1, "/before", "value");
    scene.open(1);
    scene.browser.shows("#watch", "live");
    scene.browser.lists(&["/before"]);
    scene.cluster.kill(1);
    scene.browser.shows("#watch", "connection lost, reconnecting");
    scene.cluster.put(2, "/meanwhile", "value");
    request(scene.admins[1], "DELETE", "/v1/kv/before", b"").unwrap();
    scene.cluster.start_again(1);
    scene.browser.shows("#watch", "live");
    scene.browser.lists(&["/meanwhile"]);
    // It was not listed anew: no change is missing, and none is there twice.
    let recent = scene.browser.texts("#recent li > :not(time)");
    assert_eq!(recent[..4], ["delete", "/before", "put", "/meanwhile"]);
    assert!(recent.len() == 5 && recent[4].starts_with("listed at entry "), "{recent:?}");
    scene.cluster.put(1, "/after", "value");
    scene.browser.lists(&["/after", "/meanwhile"]);
}

#[test]
fn a_watch_whose_place_is_gone_lists_the_keys_again() {
    let more =
        [&FAST[..], &["--snapshot-count", "10", "--snapshot-catch-up-entries", "5"]].concat();
    let Some(mut scene) = Scene::start(&more) else { return };
    scene.cluster.put(1, "/before", "value");
    scene.open(1);
    scene.browser.shows("#watch", "live");
    scene.browser.lists(&["/before"]);
    scene.cluster.kill(1);
    for number in 0..50 {
        scene.cluster.put(2, &format!("/{}", number % 2), "value");
    }
    request(scene.admins[1], "DELETE", "/v1/kv/before", b"").unwrap();
    // It installs a snapshot, which has no history.
    scene.cluster.start_again(1);
    scene.browser.shows("#watch", "stopped, listing again in 1 s");
    scene.browser.shows("#watch", "live");
    scene.browser.lists(&["/0", "/1"]);
    assert!(metric(scene.admins[0], "raftexample_snapshots_installed_total") >= 1.0);
    scene.browser.shows("#recent li:first-child", "listed at entry ");
    scene.cluster.put(1, "/after", "value");
    scene.browser.lists(&["/0", "/1", "/after"]);
}

#[test]
fn a_refused_watch_says_why_and_tries_again() {
    let Some(mut scene) = Scene::start_of(1, &FAST) else { return };
    let watch = |_| {
        let mut stream = TcpStream::connect(scene.admins[0]).unwrap();
        write!(stream, "GET /v1/watch HTTP/1.1\r\nHost: {}\r\n\r\n", scene.admins[0]).unwrap();
        stream
    };
    let others: Vec<TcpStream> = (0..16).map(watch).collect();
    eventually(PATIENCE, "all watch", || watchers(&scene) == 16.0);
    scene.cluster.put(1, "/key", "value");
    scene.open(1);
    scene.browser.shows("#prefix output", "503this member has as many watchers as it serves");
    scene.browser.shows("#watch", "stopped, listing again in 3 s");
    scene.browser.lists(&["/key"]);
    drop(others);
    scene.browser.shows("#watch", "live");
    assert_eq!(scene.browser.text("#prefix output"), "");
}

#[test]
fn a_list_without_a_majority_says_so_until_there_is_one() {
    let more = [&FAST[..], &["--request-timeout", "300ms"]].concat();
    let Some(mut scene) = Scene::start(&more) else { return };
    scene.cluster.put(1, "/key", "value");
    scene.open(1);
    scene.browser.shows("#watch", "live");
    scene.browser.lists(&["/key"]);
    (2..=3).for_each(|id| scene.cluster.kill(id));
    scene.browser.type_into("#prefix [name=prefix]", "/");
    scene.browser.press("Enter");
    scene.browser.shows("#prefix output", "503");
    scene.browser.shows("#watch", "stopped, listing again in 3 s");
    assert_eq!(scene.browser.keys(), [""; 0], "those were of another prefix");
    (2..=3).for_each(|id| scene.cluster.start_again(id));
    scene.browser.shows("#watch", "live");
    scene.browser.lists(&["/key"]);
    assert_eq!(scene.browser.text("#prefix output"), "");
}

#[test]
fn a_flood_of_changes_leaves_the_page_bounded_and_awake() {
    const KEYS: usize = 300;
    const WRITES: usize = 3_000;
    let Some(mut scene) = Scene::start_of(1, &FAST) else { return };
    scene.open(1);
    scene.browser.shows("#watch", "live");
    // How often the rows change, and the longest time in which the page did nothing else.
    scene.browser.value(
        "window.draws = 0; new MutationObserver(() => draws++).observe(document.querySelector('#recent'), { childList: true }); window.longest = 0; let before = performance.now(); window.began = before; setInterval(() => { const now = performance.now(); longest = Math.max(longest, now - before); before = now; }, 20); 0",
    );
    let address = scene.cluster.address(1);
    thread::scope(|scope| {
        let writers: Vec<_> = (0..8)
            .map(|writer| {
                scope.spawn(move || {
                    let mut client = Client::new(address);
                    for turn in 0..WRITES {
                        let key = format!("/{:03}", (turn * 7 + writer * 31) % KEYS);
                        assert_eq!(client.put(&key, b"value").unwrap(), 204);
                    }
                })
            })
            .collect();
        eventually(3 * PATIENCE, "the writers have ended", || {
            let rows = scene.browser.value("document.querySelectorAll('#found tr').length");
            assert!(rows.as_u64().unwrap() <= 100, "{rows} rows");
            let lines = scene.browser.value("document.querySelectorAll('#recent li').length");
            assert!(lines.as_u64().unwrap() <= 60, "{lines} lines");
            writers.iter().all(|writer| writer.is_finished())
        });
    });
    let newest = request(scene.admins[0], "GET", "/v1/keys?limit=100", b"").unwrap();
    let newest: Value = serde_json::from_slice(&newest.body).unwrap();
    let entry = |key: &Value| key["etag"].as_str().unwrap().rsplit('-').next().unwrap().to_owned();
    let entries: Vec<String> = newest["keys"].as_array().unwrap().iter().map(entry).collect();
    let mut shown = Vec::new();
    eventually(PATIENCE, "the page has caught up", || {
        shown = scene.browser.texts("#found td:last-child");
        shown.iter().map(|entry| entry.replace(',', "")).eq(entries.iter().cloned())
    });
    scene.browser.shows("#recent", " more changes");
    let seen = scene.browser.value("[longest, draws, performance.now() - began]");
    let seen: [f64; 3] = serde_json::from_value(seen).unwrap();
    eprintln!("[longest pause in ms, draws, ms in all]: {seen:.0?}");
    assert!(seen[0] < 1000.0, "the page was busy for {} ms", seen[0]);
    assert!(seen[1] <= seen[2] / 250.0 + 2.0, "it drew {} times in {} ms", seen[1], seen[2]);
    scene.assert_without_problems();
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
    scene.browser.shows("#watch", "live");
    // Its connections stay open.
    scene.cluster.process(1).pause();
    scene.browser.shows("#banner:not([hidden])", "Member 1 at ");
    assert_eq!(scene.browser.role(1), "no answer");
    assert_eq!(scene.browser.text("#stream"), "connection lost");
    assert_eq!(scene.browser.text("#watch"), "no answer");
    scene.cluster.process(1).signal(Signal::SIGCONT);
    scene.browser.shows("#stream", "live");
    scene.browser.shows("#watch", "live");

    // It links to the pages of the members that live.
    scene.browser.shows("#summary", "3 of 3 members alive");
    let links = "[...document.querySelectorAll('#banner a')].map(e => e.href)";
    let others = [scene.admins[1], scene.admins[2]].map(|admin| format!("http://{admin}/"));
    scene.cluster.kill(1);
    scene.browser.shows("#banner:not([hidden])", "does not answer");
    assert_eq!(scene.browser.value(links), json!(others));
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
    let start = format!("--peer-url {url} --port PORT --join");
    scene.browser.shows("#add output", &start);
    scene.browser.shows("#happened", "Member 4 was added");
    // Nothing is wrong with it.
    scene.browser.shows("#rows", "learner, not started");
    assert_eq!(scene.browser.role(4), "not started");
    assert!(!scene.browser.text("#happened").contains("dead"));
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
fn a_lost_majority_is_announced_until_it_is_back() {
    let Some(mut scene) = Scene::start(&FAST) else { return };
    scene.open(1);
    scene.browser.shows("#summary", "3 of 3 members alive");
    let is_hidden = "document.querySelector('#majority').hidden";
    assert_eq!(scene.browser.value(is_hidden), true);
    scene.cluster.kill(2);
    scene.browser.shows("#summary", "2 of 3 members alive");
    assert_eq!(scene.browser.value(is_hidden), true, "two are a majority");
    scene.cluster.kill(3);
    let why = "No majority: 2 of 3 voters must answer, and 1 does";
    scene.browser.shows("#majority:not([hidden])", why);
    scene.browser.shows("#majority", "Start member 2 at");
    scene.cluster.start_again(3);
    eventually(PATIENCE, "it is back", || scene.browser.value(is_hidden) == true);
}

#[test]
fn a_page_begins_with_what_its_member_remembers() {
    let Some(mut scene) = Scene::start(&FAST) else { return };
    // No page is open. The writes are spread over some steps.
    let written = Instant::now();
    while written.elapsed() < Duration::from_secs(4) {
        scene.cluster.put(2, "/key", "value");
    }
    scene.open(1);
    // A point is a move or a line of the curve.
    let curve = "document.querySelector('#throughput > svg .curve.put')?.getAttribute('d') ?? ''";
    let mut begun = 0;
    eventually(PATIENCE, "a curve is drawn", || {
        begun = scene.browser.value(curve).as_str().unwrap().matches(['M', 'L']).count();
        begun > 0
    });
    assert!(begun >= 3, "{begun} points");
    scene.browser.shows("#throughput .series b", "/s");
    scene.assert_without_problems();
}

#[test]
fn no_row_is_ahead_of_its_leader_under_load() {
    let Some(mut scene) = Scene::start(&FAST) else { return };
    let (leader, _) = scene.cluster.leader();
    let addresses = scene.cluster.addresses();
    // They end with the process.
    for (writer, address) in addresses.into_iter().enumerate() {
        thread::spawn(move || {
            let mut client = Client::new(address);
            loop {
                let _ = client.put(&format!("/{writer}"), b"value");
            }
        });
    }
    // Its own status is newer than the leader's.
    scene.open(leader % 3 + 1);
    scene.browser.shows("#summary", "3 of 3 members alive");
    let lasts = "[...document.querySelectorAll('#rows tr')].map(row => [row.dataset.state, ...[...row.querySelectorAll('td:not(.bar)')].slice(1).map(e => Number(e.textContent.replaceAll(',', '')))])";
    let mut moved = BTreeSet::new();
    eventually(PATIENCE, "the rows have moved often", || {
        let rows = scene.browser.value(lasts);
        let rows = rows.as_array().unwrap();
        // During an election there may be none.
        let Some(led) = rows.iter().find(|row| row[0] == "leader") else { return false };
        for row in rows {
            for place in 1..=3 {
                let [own, leaders] = [row, led].map(|row| row[place].as_u64());
                // `None` is a row without a status that can be compared.
                assert!(own <= leaders, "{row} is ahead of {led}");
            }
            moved.extend(row[3].as_u64());
        }
        moved.len() >= 60
    });
}

#[test]
fn nothing_overlaps_on_a_phone_with_seven_digit_indexes() {
    let Some(mut scene) = Scene::start_of(1, &FAST) else { return };
    let member = |id: u64, role: &str, alive: bool, behind: u64| {
        let sent = json!({ "append": 1, "heartbeat": 1, "vote": 0, "snapshot": 0, "other": 0 });
        let last = 9_876_543 - behind;
        let peers = (1..=5).map(|peer| {
            let role = if peer == 5 { "learner" } else { "voter" };
            json!({ "id": peer, "role": role, "last_contact_ms": 5, "sent": sent })
        });
        json!({
            "id": id, "url": format!("http://192.168.100.{}:12379", 100 + id), "alive": alive, "started": id != 5,
            "age_ms": 5, "status": (id != 5).then(|| json!({
                "id": id, "cluster_id": "0106256837e189ab", "role": role, "term": 1234, "vote": 3, "leader": 1,
                "commit": last, "applied": last - 1, "first": 9_000_000, "last": last, "snapshot": 9_123_456,
                "members": peers.collect::<Vec<_>>(), "uptime_seconds": 1, "admin_url": "",
                "puts": { "count": 1, "micros": 1 }, "gets": { "count": 1, "micros": 1 },
            })),
        })
    };
    let members = json!([
        member(1, "leader", true, 0),
        member(2, "pre-candidate", true, 1),
        member(3, "follower", false, 12),
        member(4, "follower", false, 3),
        member(5, "learner", false, 0),
    ]);
    let cluster = json!({ "seen_by": 1, "cluster_id": "0106256837e189ab", "members": members });
    let address = serve_cluster(&scene.cluster.site, cluster);
    for width in [1280, 768, 390, 320] {
        scene.browser.resize(width, 800);
        scene.browser.open(address);
        scene.browser.shows("#majority:not([hidden])", "3 of 4 voters must answer, and 2 do");
        scene.browser.shows("#rows", "9,876,543");
        scene.browser.shows("#found", "/app/config/region");
        assert_eq!(scene.browser.value(MISPLACED), json!([]), "{width} pixels");
        let is_wider = "document.documentElement.scrollWidth > innerWidth";
        assert_eq!(scene.browser.value(is_wider), false, "{width} pixels are enough");
    }
    scene.assert_without_problems();
}

#[test]
fn tab_reaches_every_control_and_shows_where_it_is() {
    let Some(mut scene) = Scene::start(&FAST) else { return };
    let keys: Vec<String> = (0..201).map(|number| format!("/{number:03}")).collect();
    keys.iter().for_each(|key| scene.cluster.put(1, key, "value"));
    scene.open(1);
    scene.browser.shows("#summary", "3 of 3 members alive");
    // Its second page has all buttons.
    scene.browser.shows("#listed-count", "100 keys, more follow");
    scene.browser.tab_to("#next-page");
    scene.browser.press("Enter");
    scene.browser.shows("#listed-count", "100 keys on this page, more follow");
    assert_eq!(
        scene.browser.value("document.activeElement.id"),
        "listed",
        "the page has the focus"
    );
    scene.browser.value(
        "window.controls = [...document.querySelectorAll('a[href], button, input, select, [tabindex]')].filter(e => e.checkVisibility()); 0",
    );
    let controls = scene.browser.value("controls.length").as_u64().unwrap();
    assert!(controls >= 20, "the forms, the lists and a page's buttons are there: {controls}");
    let unnamed = "controls.filter(e => !(e.localName == 'button' ? e.textContent : e.labels?.length || e.hasAttribute('aria-labelledby'))).map(e => e.outerHTML)";
    assert_eq!(scene.browser.value(unnamed), json!([]), "each has a name");
    let mut reached = BTreeSet::new();
    // From the last one, Tab leaves the page for a moment.
    for _ in 0..=controls {
        scene.browser.press("Tab");
        let place = scene.browser.value("controls.indexOf(document.activeElement)");
        if place == -1 && scene.browser.value("document.activeElement === document.body") == true {
            continue;
        }
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
    let colours = "['body', '.panel', '#summary', 'input', '#listed thead th', '#watch', '.node[data-state=leader] circle'].map(s => { const c = getComputedStyle(document.querySelector(s)); return [c.color, c.backgroundColor, c.fill].join() })";
    let mut seen = Vec::new();
    for (scheme, file) in [("light", "page.png"), ("dark", "page-dark.png")] {
        scene.browser.prefer(scheme);
        scene.browser.shows(".node[data-state=leader] .role", "leader");
        scene.browser.shows("#watch", "live");
        let height = scene.browser.value("document.documentElement.scrollHeight");
        scene.browser.resize(1280, height.as_u64().unwrap() as u32);
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
    // A long key is broken into lines.
    let long = format!("/app/{}", "long-".repeat(80));
    scene.cluster.put(1, &long, "value");
    scene.browser.shows("#found", &long[..300]);
    for width in [1280, 420] {
        scene.browser.resize(width, 800);
        let is_wider = "document.documentElement.scrollWidth > innerWidth";
        assert_eq!(scene.browser.value(is_wider), false, "{width} pixels are enough");
    }
    scene.assert_without_problems();
    if std::env::var_os("UPDATE_SCREENSHOTS").is_some() {
        picture_phones(&mut scene);
    }
}

/// The guide's pictures: a phone under load, and another one without a majority.
fn picture_phones(scene: &mut Scene) {
    let picture = |scene: &mut Scene, scheme: &str, width, file: &str| {
        scene.browser.prefer(scheme);
        scene.browser.resize(width, 1000);
        let path = format!("{}/src/ports/admin/{file}", env!("CARGO_MANIFEST_DIR"));
        std::fs::write(path, scene.browser.screenshot()).unwrap();
    };
    scene.browser.shows("#summary", "3 of 3 members alive");
    picture(scene, "light", 390, "page-390.png");
    scene.cluster.kill(2);
    scene.cluster.kill(3);
    scene.browser.shows("#majority:not([hidden])", "No majority");
    // The banner of the page's own member that stopped is not there.
    scene.browser.shows("#stream", "live");
    picture(scene, "dark", 320, "page-320.png");
}

/// The value of a key, as a page that steals it would like it.
const SECRET: &str = "window.stolen = 'secret'";

/// The pages of others at `port`: of another site, and of another port of the members' address.
fn pages_of_others(scene: &Scene, port: u16) -> [String; 2] {
    [
        format!("http://evil.example:{port}/"),
        format!("http://{}:{port}/", scene.cluster.site.address),
    ]
}

/// A transaction, and another one as the name and the value of a form's field.
const TXN: &str = r#"{"then":[{"delete":"/key"}]}"#;
const TXN_FORM: [&str; 2] = [r#"{"then":[{"delete":"/by-form"}],"else":[{"get":"/a"#, r#""}]}"#];

#[test]
fn a_foreign_page_reads_nothing_from_either_port() {
    let Some(mut scene) = Scene::start_of(1, &FAST) else { return };
    let [client, admin] = scene.ports();
    scene.cluster.put(1, "/key", SECRET);
    let other = serve_pages(&scene.cluster.site);
    for page in pages_of_others(&scene, other) {
        scene.visit(&page);
        // From a third origin that lets all pages read, each attempt gets something.
        let third = format!("http://third.example:{other}");
        assert_eq!(scene.attempt(&format!("script('{third}/script')")), "loot");
        assert_eq!(scene.attempt(&format!("image('{third}/image')")), "shown");
        assert_eq!(scene.attempt(&format!("events('{third}/events')")), "loot");
        let read = scene.attempt(&format!("fetch('{third}/script')"));
        assert_eq!(read, "cors 200 window.stolen = 'loot'");

        let urls = [
            format!("{client}/key"),
            format!("{admin}/v1/kv/key"),
            format!("{admin}/v1/keys?values=true"),
            format!("{admin}/v1/watch?from=0&values=true"),
            format!("{admin}/cluster"),
        ];
        for url in urls {
            for kind in ["script", "image", "events", "fetch"] {
                let call = format!("{kind}('http://{url}')");
                assert_eq!(scene.attempt_refused(&call), "nothing", "{call} at {page}");
            }
            // The page cannot see a response that it does not ask to see, not even its status.
            let call = format!("fetch('http://{url}', {{ mode: 'no-cors' }})");
            assert_eq!(scene.attempt_refused(&call), "opaque 0 ", "{call} at {page}");
        }
        let call = format!("events('http://{admin}/events')");
        assert_eq!(scene.attempt_refused(&call), "nothing", "{call} at {page}");
    }
    // A page of the port itself reads.
    scene.visit(&format!("http://{client}/absent"));
    assert_eq!(scene.attempt("fetch('/key')"), format!("basic 200 {SECRET}"));
    scene.visit(&format!("http://{admin}/"));
    assert_eq!(scene.attempt("fetch('/v1/kv/key')"), format!("basic 200 {SECRET}"));
    let read = scene.attempt("fetch('/v1/keys?values=true')");
    assert!(read.starts_with("basic 200 {") && read.contains("\"key\":\"/key\""), "{read}");
    let change = scene.attempt("events('/v1/watch?from=0&values=true')");
    assert!(change.starts_with("{\"key\":\"/key\",\"etag\":"), "{change}");
}

#[test]
fn a_foreign_page_changes_neither_members_nor_keys() {
    let Some(mut scene) = Scene::start_of(1, &FAST) else { return };
    let [client, admin] = scene.ports();
    scene.cluster.put(1, "/key", SECRET);
    scene.cluster.change(1, "POST", 4, &scene.cluster.site.url());
    scene.has_members(&[1, 4]);
    let url = scene.cluster.site.url();
    let other = serve_pages(&scene.cluster.site);
    for page in pages_of_others(&scene, other) {
        scene.visit(&page);
        let post = format!("method: 'POST', body: '{url}'");
        let [at_client, at_admin] = [format!("http://{client}"), format!("http://{admin}")];
        for (members, keys) in [
            (at_client.clone(), at_client),
            (format!("{at_admin}/members"), format!("{at_admin}/v1/kv")),
        ] {
            for call in [
                format!("fetch('{members}/8', {{ {post} }})"),
                format!("fetch('{members}/8', {{ {post}, mode: 'no-cors' }})"),
                format!("beacon('{members}/8', '{url}')"),
                format!("form('{members}/8', 'http://a', 'b:9')"),
                format!("fetch('{members}/4', {{ method: 'DELETE' }})"),
                format!("fetch('{keys}/key', {{ method: 'PUT', body: 'other' }})"),
                format!("fetch('{keys}/key', {{ method: 'DELETE' }})"),
            ] {
                scene.attempt_refused(&call);
            }
        }
        // A transaction needs no header that a browser would ask for first.
        for call in [
            format!("fetch('{at_admin}/v1/txn', {{ method: 'POST', body: '{TXN}' }})"),
            format!(
                "fetch('{at_admin}/v1/txn', {{ method: 'POST', body: '{TXN}', mode: 'no-cors' }})"
            ),
            format!("beacon('{at_admin}/v1/txn', '{TXN}')"),
            format!("form('{at_admin}/v1/txn', '{}', '{}')", TXN_FORM[0], TXN_FORM[1]),
            format!("fetch('{at_admin}/v1/retry-token', {{ method: 'POST', mode: 'no-cors' }})"),
        ] {
            scene.attempt_refused(&call);
        }
        let lead =
            format!("fetch('{at_admin}/transfer-leadership', {{ {post}, mode: 'no-cors' }})");
        scene.attempt_refused(&lead);
    }
    assert_eq!(scene.cluster.get(1, "/key").as_deref(), Some(SECRET));
    // From a page of the port itself, the same requests change something, and still there is no member 8.
    scene.visit(&format!("http://{client}/absent"));
    scene.attempt(&format!("beacon('/5', '{url}')"));
    scene.has_members(&[1, 4, 5]);
    // The client port refuses the line feed at the end of a form.
    scene.visit(&format!("http://{admin}/absent"));
    scene.attempt("form('/members/6', 'http://a', 'b:9')");
    scene.has_members(&[1, 4, 5, 6]);
    let write = "fetch('/v1/kv/key', { method: 'PUT', body: 'other' })";
    assert_eq!(scene.attempt(write), "basic 204 ");
    for (key, call) in [
        ("/by-form", format!("form('/v1/txn', '{}', '{}')", TXN_FORM[0], TXN_FORM[1])),
        ("/key", format!("beacon('/v1/txn', '{TXN}')")),
    ] {
        scene.cluster.put(1, key, "value");
        scene.attempt(&call);
        let deleted = || scene.cluster.get(1, key).is_none();
        eventually(PATIENCE, &format!("{call} deletes {key}"), deleted);
    }
    assert_eq!(scene.attempt("fetch('/members/4', { method: 'DELETE' })"), "basic 204 ");
    scene.has_members(&[1, 5, 6]);
}

/// The owner of a name first lets it resolve to a server of theirs, and then to the member: the page is then
/// of the same origin as the member's port.
#[test]
fn a_page_that_rebinds_its_name_reads_and_changes_nothing() {
    let more = [&FAST[..], &["--allow-host", "good.example"]].concat();
    let Some(mut scene) = Scene::start_of(1, &more) else { return };
    scene.cluster.put(1, "/key", SECRET);
    for (port, keys, member, id) in
        [(scene.ports()[0].port(), "", "", 4), (scene.ports()[1].port(), "/v1/kv", "/members", 5)]
    {
        let url = scene.cluster.site.url();
        let read = format!("fetch('{keys}/key')");
        let write = format!("fetch('{keys}/key', {{ method: 'PUT', body: \"{SECRET}\" }})");
        let add = format!("fetch('{member}/{id}', {{ method: 'POST', body: '{url}' }})");
        scene.visit(&format!("http://evil.example:{port}/absent"));
        for call in [&read, &write, &add] {
            let got = scene.attempt(call);
            let is_refused = got.starts_with("basic 403 ") && got.contains("unknown Host");
            assert!(is_refused, "{call} at port {port}: {got}");
        }
        // With a name that the flag allows, nothing else stops them.
        scene.visit(&format!("http://good.example:{port}/absent"));
        assert_eq!(scene.attempt(&read), format!("basic 200 {SECRET}"));
        assert_eq!(scene.attempt(&write), "basic 204 ");
        // Adding it again would be refused.
        assert_eq!(scene.attempt(&add), "basic 204 ");
    }
}

/// Over plain HTTP to a host that is not loopback, browsers send nothing with the request for a script that
/// tells it from another client's. To the browser, an allowed name is such a host.
#[test]
fn a_value_is_no_script_where_the_browser_names_no_site() {
    let more = [&FAST[..], &["--allow-host", "member.example"]].concat();
    let Some(mut scene) = Scene::start_of(1, &more) else { return };
    scene.cluster.put(1, "/key", SECRET);
    let other = serve_pages(&scene.cluster.site);
    scene.visit(&format!("http://evil.example:{other}/"));
    assert_eq!(scene.attempt(&format!("script('http://third.example:{other}/script')")), "loot");
    let [client, admin] =
        scene.ports().map(|address| format!("http://member.example:{}", address.port()));
    for (port, url) in [
        ("client", format!("{client}/key")),
        ("admin", format!("{admin}/v1/kv/key")),
        ("admin", format!("{admin}/v1/keys?values=true")),
    ] {
        // The member answers them with the value.
        let answered = format!(
            "raftexample_http_requests_total{{port=\"{port}\",method=\"GET\",status=\"200\""
        );
        let answered = &answered[..];
        let call = format!("script('{url}')");
        assert_eq!(scene.attempt_counted(&call, answered), "nothing", "{call}");
        // Not from the cache, which would ask whether the value is another one now.
        let call = format!("fetch('{url}', {{ mode: 'no-cors', cache: 'no-store' }})");
        assert_eq!(scene.attempt_counted(&call, answered), "opaque 0 ", "{call}");
        let call = format!("fetch('{url}')");
        assert_eq!(scene.attempt_refused(&call), "nothing", "{call}");
    }
}

#[test]
fn ids_above_2_to_53_are_shown_and_removed_exactly() {
    let Some(mut scene) = Scene::start_of(1, &FAST) else { return };
    // A number of JavaScript cannot tell the first two apart.
    let ids = [(1 << 53), (1 << 53) + 1, u64::MAX];
    for id in ids {
        let url = scene.cluster.site.url();
        let answer = request(scene.admins[0], "POST", &format!("/members/{id}"), url.as_bytes());
        assert_eq!(answer.unwrap().status, 204, "{id}");
    }
    scene.open(1);
    scene.browser.shows("#summary", "1 of 4 members alive");
    let expected: Vec<String> = ids.iter().map(u64::to_string).collect();
    let expected = json!(["1", expected[0], expected[1], expected[2]]);
    for places in [".node .number", "#rows th b", "#remove option", "#lead option:not([value=''])"]
    {
        let texts =
            format!("[...document.querySelectorAll({})].map(e => e.textContent)", json!(places));
        assert_eq!(scene.browser.value(&texts), expected, "{places}");
    }
    // Messages to each thicken its own line.
    let thick = "[...document.querySelectorAll('#edges line')].filter(e => parseFloat(e.style.strokeWidth) > 1).length";
    eventually(PATIENCE, "three lines are thick", || scene.browser.value(thick) == 3);
    for (removed, left) in [(ids[1], &[1, ids[0], ids[2]][..]), (ids[2], &[1, ids[0]])] {
        scene.browser.choose("#remove select", &removed.to_string());
        scene.browser.tab_to("#remove button");
        scene.browser.press("Enter");
        scene.browser.shows("#remove output", &format!("204Member {removed} was removed"));
        scene.browser.shows("#happened", &format!("Member {removed} was removed"));
        let asked = scene.browser.asked.last().unwrap();
        assert!(asked.contains(&format!("Remove member {removed} ")), "{asked}");
        assert_eq!(scene.member_ids(), left);
    }
    scene.assert_without_problems();
}

/// The scene of README's pictures: load, a change of leaders, a member that died and returned.
fn pose(scene: &mut Scene) {
    let admin = scene.admins[0];
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
    let address = scene.cluster.address(1);
    thread::spawn(move || {
        let names = ["host", "limit", "log-level", "name", "port", "region", "retries", "timeout"];
        let mut client = Client::new(address);
        for turn in 0.. {
            let name = names[turn * 5 % 8];
            let value = "value".repeat(turn % 3 + 1);
            let _ = client.put(&format!("/app/config/{name}"), value.as_bytes());
            let session = |number: usize| format!("/app/session/{}", 4096 + number * 37);
            let _ = client.put(&session(turn), &[b'v'; 120]);
            thread::sleep(Duration::from_secs(2));
            let expired = format!("/v1/kv{}", session(turn.saturating_sub(5)));
            let _ = request(admin, "DELETE", &expired, b"");
            thread::sleep(Duration::from_secs(3));
        }
    });
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
    scene.browser.list("/app/");
    // The log of changes fills.
    thread::sleep(Duration::from_secs(25));
    scene.browser.type_into("#put [name=key]", "/app/motd");
    scene.browser.type_into("#put [name=value]", "hello");
    scene.browser.press("Enter");
    scene.browser.shows("#put output", "201");
    scene.browser.type_into("#get [name=key]", "/app/motd");
    scene.browser.press("Enter");
    scene.browser.shows("#get output", "200hello");
    scene.browser.shows("#found", "/app/motd");
    scene.browser.value("document.activeElement.blur()");
}
