//! Members as processes that end with the test, clusters of them, and a small HTTP client.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

pub use nix::sys::signal::Signal;
use nix::sys::signal::{kill, killpg};
use nix::unistd::Pid;
use tempfile::TempDir;

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_raftexample");
/// A deadline for everything that a test waits for. Long, because the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How long the client waits for an answer: longer than a member may take with default flags.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Short ticks for tests that do not measure time: elections take less than half a second.
pub const FAST: [&str; 2] = ["--tick", "20ms"];

/// Waits until `condition` holds.
///
/// # Panics
/// If it does not hold within `deadline`; `why` says what did not happen.
pub fn eventually(deadline: Duration, why: &str, mut condition: impl FnMut() -> bool) {
    eventually_some(deadline, why, || condition().then_some(()));
}

/// Waits until `find` returns a value.
pub fn eventually_some<T>(deadline: Duration, why: &str, mut find: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(start.elapsed() < deadline, "not within {deadline:?}: {why}");
        // The interval between two looks; the deadline above ends the wait.
        thread::sleep(Duration::from_millis(10));
    }
}

/// Reports on standard error that a test was skipped.
pub fn skip(why: &str) {
    // Not `eprintln`: the test runner would capture it.
    let _ = writeln!(io::stderr(), "\n*** SKIPPED: {why} ***");
}

/// A directory and a loopback address that no other test uses. All of 127/8 is this machine, and
/// outgoing connections come from 127.0.0.1, so a port that was free here stays free.
pub struct Site {
    dir: Option<TempDir>,
    pub address: Ipv4Addr,
    ports: Mutex<HashSet<u16>>,
}

impl Site {
    pub fn new() -> Self {
        static SITES: AtomicU32 = AtomicU32::new(1);
        let pid = std::process::id();
        let (high, low) = ((pid >> 8) % 250 + 1, pid % 256);
        let site = SITES.fetch_add(1, Ordering::Relaxed);
        assert!(site < 255, "each process of tests has addresses for 254 sites");
        let address = Ipv4Addr::new(127, high as u8, low as u8, site as u8);
        let dir = tempfile::Builder::new().prefix("raftexample-test-").tempdir().unwrap();
        Self { dir: Some(dir), address, ports: Mutex::default() }
    }

    pub fn dir(&self) -> &Path {
        self.dir.as_ref().expect("it is there until the end").path()
    }

    /// A free port at this address, a different one each time.
    pub fn port(&self) -> u16 {
        loop {
            let port = TcpListener::bind((self.address, 0)).unwrap().local_addr().unwrap().port();
            if self.ports.lock().unwrap().insert(port) {
                return port;
            }
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}:{}", self.address, self.port())
    }

    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.address), port)
    }

    /// A place at this site for a member with this peer URL.
    pub fn place(&self, url: String) -> Place {
        Place { url, client: self.at(self.port()), launcher: Vec::new(), flags: Vec::new() }
    }

    /// The flags of a single member, and its client address.
    pub fn single(&self, more: &[&str]) -> (Vec<String>, SocketAddr) {
        let port = self.port();
        let mut flags = owned(&["--id", "1", "--cluster", &self.url()]);
        flags.extend(owned(&["--host", &self.address.to_string(), "--port", &port.to_string()]));
        flags.extend(owned(more));
        (flags, self.at(port))
    }

    /// Starts the binary; its standard error is appended to `NAME.log`.
    pub fn spawn(&self, name: &str, flags: &[String]) -> Process {
        let mut command = Command::new(BINARY);
        command.args(flags);
        self.spawn_command(name, command, false)
    }

    /// As [`spawn`](Self::spawn), for a command that starts the binary itself.
    pub fn spawn_command(&self, name: &str, mut command: Command, is_group: bool) -> Process {
        let log = self.dir().join(format!("{name}.log"));
        let append = |path: &Path| OpenOptions::new().create(true).append(true).open(path).unwrap();
        let stderr = append(&log);
        let log_start = stderr.metadata().unwrap().len();
        command.current_dir(self.dir());
        command.stdin(Stdio::null()).stdout(append(&log.with_extension("out"))).stderr(stderr);
        for (key, _) in std::env::vars_os() {
            let is_ours = key.to_string_lossy().starts_with("RAFTEXAMPLE_");
            if is_ours && !command.get_envs().any(|(set, _)| set == key) {
                command.env_remove(key);
            }
        }
        if is_group {
            command.process_group(0);
        }
        let child = command.spawn().unwrap();
        Process { child, log, log_start, is_group, status: None }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let dir = self.dir.take().expect("it is there until the end");
        if thread::panicking() {
            eprintln!("data and logs are kept in {}", dir.keep().display());
            return;
        }
        for path in files_in(dir.path()).into_iter().filter(|path| path.extension().is_some()) {
            if path.extension().is_some_and(|extension| extension == "log") {
                let log = fs::read_to_string(&path).unwrap_or_default();
                assert!(!log.contains("panicked at"), "a member panicked:\n{log}");
            }
        }
    }
}

pub fn owned(flags: &[&str]) -> Vec<String> {
    flags.iter().map(|flag| (*flag).to_owned()).collect()
}

/// The result of a command that ends by itself.
pub struct Ran {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs the binary in `dir` until it ends.
pub fn run(dir: &Path, flags: &[&str]) -> Ran {
    let mut command = Command::new(BINARY);
    command.args(flags);
    run_command(dir, command)
}

/// Like [`run`], with at most a gibibyte of address space.
pub fn run_with_little_memory(dir: &Path, flags: &[&str]) -> Ran {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -v 1048576; exec \"$0\" \"$@\"", BINARY]).args(flags);
    run_command(dir, command)
}

fn run_command(dir: &Path, mut command: Command) -> Ran {
    command.current_dir(dir).stdin(Stdio::null());
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("RAFTEXAMPLE_") {
            command.env_remove(key);
        }
    }
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let (stdout, stderr) = (text(output.stdout), text(output.stderr));
    let status = output.status.code().unwrap_or_else(|| panic!("{}: {stderr}", output.status));
    Ran { status, stdout, stderr }
}

/// All files in a directory and its subdirectories.
pub fn files_in(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { files.extend(files_in(&path)) } else { files.push(path) }
    }
    files
}

/// A running member, killed when dropped.
pub struct Process {
    child: Child,
    log: PathBuf,
    log_start: u64,
    is_group: bool,
    status: Option<ExitStatus>,
}

impl Process {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32);
        if self.is_group { killpg(pid, signal) } else { kill(pid, signal) }.unwrap();
    }

    /// Pauses the process and waits until it is stopped. One of its threads takes the signal; the others go on
    /// until that one has run.
    pub fn pause(&self) {
        self.signal(Signal::SIGSTOP);
        eventually(PATIENCE, "the process is paused", || {
            let threads = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
            threads.flatten().all(|thread| {
                // One that just ended is not running either.
                let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
                // The state follows the name, which is in parentheses and may contain anything.
                stat.rsplit(") ").next().is_none_or(|it| it.is_empty() || it.starts_with('T'))
            })
        });
    }

    /// Kills the process with SIGKILL and waits until it is gone.
    pub fn kill(&mut self) {
        if self.exited().is_none() {
            self.signal(Signal::SIGKILL);
            self.status = Some(self.child.wait().unwrap());
        }
    }

    pub fn exited(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().unwrap();
        }
        self.status
    }

    /// Waits for the end of the process; returns the exit status.
    pub fn wait(&mut self, deadline: Duration) -> i32 {
        let status = eventually_some(deadline, "the process ends", || self.exited());
        status.code().unwrap_or_else(|| panic!("{status}:\n{}", self.stderr()))
    }

    /// Standard error since the start of the process.
    pub fn stderr(&self) -> String {
        let bytes = fs::read(&self.log).unwrap();
        String::from_utf8_lossy(&bytes[self.log_start as usize..]).into_owned()
    }

    /// The lines that the program prints when it ends.
    pub fn last_words(&self) -> Vec<String> {
        let stderr = self.stderr();
        stderr.lines().filter(|line| line.starts_with("raftexample: ")).map(str::to_owned).collect()
    }

    /// Resident memory in bytes.
    pub fn resident_bytes(&self) -> u64 {
        self.memory_bytes("VmRSS:")
    }

    /// Peak resident memory in bytes.
    pub fn peak_resident_bytes(&self) -> u64 {
        self.memory_bytes("VmHWM:")
    }

    fn memory_bytes(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }
}

/// Signals a process that no [`Process`] owns.
pub fn kill_child(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            let stderr = self.stderr();
            let lines: Vec<&str> = stderr.lines().collect();
            let tail = &lines[lines.len().saturating_sub(25)..];
            eprintln!("--- end of {}\n{}", self.log.display(), tail.join("\n"));
        }
    }
}

/// A response.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

/// A client with one connection, kept open between requests.
pub struct Client {
    address: SocketAddr,
    connection: Option<BufReader<TcpStream>>,
    /// The timeout of each connect, read and write.
    pub timeout: Duration,
    /// An additional header line for every request, or empty.
    header: &'static str,
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        Self { address, connection: None, timeout: ANSWER_TIMEOUT, header: "" }
    }

    /// Asks for the member's own map, which may be stale.
    pub fn reading_locally(mut self) -> Self {
        self.header = "Raft-Read: local\r\n";
        self
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// `UnexpectedEof` if the connection was closed before the first byte of the answer,
    /// `InvalidData` if the answer is not whole; otherwise the system's error.
    pub fn request(&mut self, method: &str, target: &str, body: &[u8]) -> io::Result<Answer> {
        self.send(method, target, body)?;
        self.receive()
    }

    pub fn put(&mut self, key: &str, value: &[u8]) -> io::Result<u16> {
        Ok(self.request("PUT", key, value)?.status)
    }

    pub fn get(&mut self, key: &str) -> io::Result<Answer> {
        self.request("GET", key, b"")
    }

    /// Connects if there is no connection. After an error nothing was sent.
    pub fn connect(&mut self) -> io::Result<()> {
        if self.connection.is_none() {
            let stream = TcpStream::connect_timeout(&self.address, self.timeout)?;
            stream.set_nodelay(true)?;
            self.connection = Some(BufReader::new(stream));
        }
        let stream = self.connection.as_ref().expect("it was just made").get_ref();
        stream.set_read_timeout(Some(self.timeout))?;
        stream.set_write_timeout(Some(self.timeout))
    }

    pub fn send(&mut self, method: &str, target: &str, body: &[u8]) -> io::Result<()> {
        self.connect()?;
        let mut request = format!(
            "{method} {target} HTTP/1.1\r\nHost: {}\r\n{}Content-Length: {}\r\n\r\n",
            self.address,
            self.header,
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        let connection = self.connection.as_mut().expect("it was just made");
        connection.get_mut().write_all(&request).inspect_err(|_| self.connection = None)
    }

    /// Sends a PUT. Returns once the member has the head and reads the body.
    pub fn send_and_be_heard(&mut self, key: &str, value: &[u8]) -> io::Result<()> {
        self.begin_and_be_heard(key, value.len())?;
        self.connection.as_mut().expect("it was just made").get_mut().write_all(value)
    }

    /// Like [`send_and_be_heard`](Self::send_and_be_heard), without sending the body.
    pub fn begin_and_be_heard(&mut self, key: &str, length: usize) -> io::Result<()> {
        let stream = TcpStream::connect_timeout(&self.address, ANSWER_TIMEOUT)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let head = format!(
            "PUT {key} HTTP/1.1\r\nHost: {}\r\nContent-Length: {length}\r\nExpect: 100-continue\r\n\r\n",
            self.address
        );
        let mut connection = BufReader::new(stream);
        connection.get_mut().write_all(head.as_bytes())?;
        assert_eq!(read_answer(&mut connection)?.status, 100);
        self.connection = Some(connection);
        Ok(())
    }

    pub fn receive(&mut self) -> io::Result<Answer> {
        let mut connection = self.connection.take().expect("a request was sent");
        let answer = read_answer(&mut connection)?;
        if answer.headers.get("connection").is_none_or(|value| value != "close") {
            self.connection = Some(connection);
        }
        Ok(answer)
    }
}

fn read_answer(connection: &mut impl BufRead) -> io::Result<Answer> {
    let broken = || io::Error::from(io::ErrorKind::InvalidData);
    let mut line = String::new();
    if connection.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    let mut headers = BTreeMap::new();
    loop {
        line.clear();
        connection.read_line(&mut line).map_err(|_| broken())?;
        let Some(header) = line.strip_suffix("\r\n") else { return Err(broken()) };
        if header.is_empty() {
            break;
        }
        let (name, value) = header.split_once(": ").ok_or_else(broken)?;
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let length = headers.get("content-length").map_or(Ok(0), |length| length.parse());
    let mut body = vec![0; length.map_err(|_| broken())?];
    connection.read_exact(&mut body).map_err(|_| broken())?;
    Ok(Answer { status: status.ok_or_else(broken)?, headers, body })
}

/// Sends one request on a connection of its own.
pub fn request(address: SocketAddr, method: &str, key: &str, body: &[u8]) -> io::Result<Answer> {
    Client::new(address).request(method, key, body)
}

/// Writes until the write is acknowledged. The caller must be the only writer of the key.
pub fn put(address: SocketAddr, key: &str, value: &[u8]) {
    put_in_term(address, key, value);
}

/// Like [`put`]; returns the term of the entry.
pub fn put_in_term(address: SocketAddr, key: &str, value: &[u8]) -> u64 {
    eventually_some(PATIENCE, &format!("PUT {key} at {address} is acknowledged"), || {
        let answer = request(address, "PUT", key, value).ok()?;
        (answer.status == 204).then(|| answer.headers["raft-term"].parse().unwrap())
    })
}

/// Reads until there is an answer; `None` if the key is absent.
pub fn get(address: SocketAddr, key: &str) -> Option<Vec<u8>> {
    eventually_some(PATIENCE, &format!("GET {key} at {address} is answered"), || {
        match request(address, "GET", key, b"").ok()? {
            Answer { status: 200, body, .. } => Some(Some(body)),
            Answer { status: 404, .. } => Some(None),
            _ => None,
        }
    })
}

/// Waits until a member answers a linearizable read.
pub fn serves(address: SocketAddr) {
    get(address, "/is-it-there");
}

/// Asserts that each key is present. Each value equals its key.
pub fn assert_holds(addresses: &[SocketAddr], keys: &[String]) {
    const READERS: usize = 8;
    for address in addresses {
        thread::scope(|scope| {
            for keys in keys.chunks(keys.len().div_ceil(READERS).max(1)) {
                scope.spawn(move || {
                    let mut client = Client::new(*address);
                    for key in keys {
                        let answer =
                            eventually_some(PATIENCE, &format!("GET {key} at {address}"), || {
                                let answer = client.get(key).ok()?;
                                (answer.status < 500).then_some(answer)
                            });
                        assert_eq!(answer.status, 200, "{key} was acknowledged; {address} lost it");
                        assert_eq!(answer.body, key.as_bytes(), "{key} at {address}");
                    }
                });
            }
        });
    }
}

/// Where a member listens and how it is started.
pub struct Place {
    /// Its peer URL.
    pub url: String,
    pub client: SocketAddr,
    /// A command that executes its arguments, as `nice` does, or empty.
    pub launcher: Vec<String>,
    /// Flags of this member alone.
    pub flags: Vec<String>,
}

/// One member of a cluster, running or not.
pub struct Member {
    /// The flags of its first start, used for every start.
    pub flags: Vec<String>,
    /// See [`Place`].
    launcher: Vec<String>,
    pub url: String,
    pub address: SocketAddr,
    process: Option<Process>,
}

/// Members in one directory, as the Procfile has them.
pub struct Cluster {
    // Before the site: the processes end first.
    members: BTreeMap<u64, Member>,
    /// The peer URL of every member that ever existed, by id.
    urls: Vec<String>,
    more: Vec<String>,
    pub site: Site,
}

impl Cluster {
    /// Starts members 1 to `size` and waits until all serve.
    pub fn start(size: u64, more: &[&str]) -> Self {
        let site = Site::new();
        let places = (0..size).map(|_| site.place(site.url())).collect();
        Self::start_at(site, places, more)
    }

    /// Like [`start`](Self::start), with a member at each place.
    pub fn start_at(site: Site, places: Vec<Place>, more: &[&str]) -> Self {
        let urls = places.iter().map(|place| place.url.clone()).collect();
        let mut cluster = Self { members: BTreeMap::new(), urls, more: owned(more), site };
        for (id, place) in (1..).zip(places) {
            cluster.start_new(id, place, &[]);
        }
        cluster.all_serve();
        cluster
    }

    fn start_new(&mut self, id: u64, place: Place, more: &[&str]) {
        let Place { url, client: address, launcher, flags: own } = place;
        let mut flags = owned(&["--id", &id.to_string(), "--cluster", &self.urls.join(",")]);
        flags.extend(owned(&["--port", &address.port().to_string()]));
        flags.extend(owned(&["--host", &address.ip().to_string()]));
        flags.extend(self.more.clone());
        flags.extend(own);
        flags.extend(owned(more));
        self.members.insert(id, Member { flags, launcher, url, address, process: None });
        self.start_again(id);
    }

    /// Adds member `id`, the next id, through member `at` and starts it with `--join`.
    pub fn join(&mut self, at: u64, id: u64) {
        let url = self.new_url(id);
        self.change(at, "POST", id, &url);
        self.start_joiner(id);
        serves(self.address(id));
    }

    /// Like [`join`](Self::join), at a place of its own.
    pub fn join_at(&mut self, at: u64, id: u64, place: Place) {
        self.urls.push(place.url.clone());
        self.change(at, "POST", id, &place.url);
        self.start_new(id, place, &["--join"]);
        serves(self.address(id));
    }

    /// A peer URL for member `id`, the next id.
    pub fn new_url(&mut self, id: u64) -> String {
        assert_eq!(self.urls.len() as u64, id - 1, "the list has a URL for each id up to this one");
        self.urls.push(self.site.url());
        self.urls.last().expect("it was just added").clone()
    }

    /// Starts a member that was added before.
    pub fn start_joiner(&mut self, id: u64) {
        self.start_added(id, &["--join"]);
    }

    /// Starts a member that was added before, with these flags.
    pub fn start_added(&mut self, id: u64, flags: &[&str]) {
        let place = self.site.place(self.urls[id as usize - 1].clone());
        self.start_new(id, place, flags);
    }

    /// Changes the members through member `at` and waits until the change is applied.
    pub fn change(&self, at: u64, method: &str, id: u64, url: &str) {
        let why = format!("{method} /{id} at member {at}");
        eventually(PATIENCE, &why, || {
            let answer = request(self.address(at), method, &format!("/{id}"), url.as_bytes());
            match answer {
                Ok(Answer { status: 204, .. }) => true,
                // An earlier attempt succeeded and its answer was lost.
                Ok(Answer { status: 409, body, .. }) => {
                    String::from_utf8_lossy(&body).contains("is a member already")
                }
                _ => false,
            }
        });
    }

    /// Starts a stopped member with its first flags.
    pub fn start_again(&mut self, id: u64) {
        let Member { flags, launcher, .. } = &self.members[&id];
        let words: Vec<&str> = launcher.iter().map(String::as_str).chain([BINARY]).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).args(flags);
        let process = self.site.spawn_command(&format!("member-{id}"), command, false);
        self.members.get_mut(&id).unwrap().process = Some(process);
    }

    pub fn process(&mut self, id: u64) -> &mut Process {
        self.members.get_mut(&id).unwrap().process.as_mut().expect("it was started")
    }

    pub fn kill(&mut self, id: u64) {
        self.process(id).kill();
    }

    /// Stops a member with a signal, as a person or goreman does.
    pub fn stop(&mut self, id: u64, signal: Signal) {
        self.process(id).signal(signal);
        assert_eq!(self.process(id).wait(PATIENCE), 0, "member {id} ends in order");
    }

    pub fn forget(&mut self, id: u64) {
        self.members.remove(&id);
    }

    pub fn ids(&self) -> Vec<u64> {
        self.members.keys().copied().collect()
    }

    pub fn member(&self, id: u64) -> &Member {
        &self.members[&id]
    }

    pub fn address(&self, id: u64) -> SocketAddr {
        self.members[&id].address
    }

    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.members.values().map(|member| member.address).collect()
    }

    pub fn put(&self, at: u64, key: &str, value: &str) {
        put(self.address(at), key, value.as_bytes());
    }

    pub fn get(&self, at: u64, key: &str) -> Option<String> {
        get(self.address(at), key).map(|value| String::from_utf8(value).unwrap())
    }

    pub fn all_serve(&self) {
        self.addresses().into_iter().for_each(serves);
    }

    /// The leader, according to the newest log lines of the running members, and its term.
    pub fn leader(&mut self) -> (u64, u64) {
        eventually_some(PATIENCE, "a member leads", || {
            let mut newest = (0, 0);
            for member in self.members.values_mut() {
                let Some(process) = &mut member.process else { continue };
                if process.exited().is_some() {
                    continue;
                }
                newest = leaders(&process.stderr()).chain([newest]).max().unwrap();
            }
            let (term, leader) = newest;
            let process = self.members.get_mut(&leader)?.process.as_mut()?;
            process.exited().is_none().then_some((leader, term))
        })
    }
}

/// True if the last log line about a leader says that there is none.
pub fn has_no_leader(log: &str) -> bool {
    let last = log.lines().rev().find(|line| line.contains("raft.node: "));
    last.is_some_and(|line| line.contains("lost leader"))
}

/// The leaders that a log names, as (term, id).
pub fn leaders(log: &str) -> impl Iterator<Item = (u64, u64)> {
    log.lines().filter_map(|line| {
        let (_, event) = line.split_once("raft.node: ")?;
        let (who, term) = event.split_once(" at term ")?;
        let is_new = event.contains("elected leader") || event.contains("changed leader");
        let leader = who.rsplit(' ').next()?.parse().ok()?;
        let term = term.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
        is_new.then_some((term, leader))
    })
}

/// Copies a directory and its subdirectories.
pub fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            let mut bytes = Vec::new();
            File::open(entry.path()).unwrap().read_to_end(&mut bytes).unwrap();
            fs::write(target, bytes).unwrap();
        }
    }
}
