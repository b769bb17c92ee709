//! A member's memory and disk depend on what is stored, not on how much was ever written.

use std::fs;
use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::support::processes::{
    ANSWER_TIMEOUT, BINARY, Client, Cluster, FAST, PATIENCE, Site, eventually, files_in, get, put,
    serves, skip,
};

const CLIENTS: usize = 32;
const WRITES: usize = 40_000;
const KEYS: usize = 192;
const VALUE_BYTES: usize = 4096;
const SEGMENT_BYTES: u64 = 64 << 20;

/// Two and a half segments of log go through a member that stores less than a megabyte.
///
/// Memory: the log holds 1,000 entries for catching up, 1,000 until the next snapshot is due, and
/// what arrives while that one is made: 4,000 of 4 KiB are 16 MiB. The rest is the process itself,
/// its connections, the frame, and what the allocator keeps: 80 MiB is half of what is written.
/// Disk: the current segment, the one that holds the entries since the older snapshot, and four
/// snapshots of 1 MiB at most.
#[test]
fn memory_and_disk_do_not_grow_with_the_number_of_writes() {
    let site = Site::new();
    let small = ["--snapshot-count", "1000", "--snapshot-catch-up-entries", "1000"];
    let (flags, address) = site.single(&[&FAST[..], &small].concat());
    let mut member = site.spawn("member", &flags);
    serves(address);
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            scope.spawn(move || {
                let mut client = Client::new(address);
                let value = vec![number as u8; VALUE_BYTES];
                for sequence in 0..WRITES / CLIENTS {
                    let key =
                        format!("/key-{}", number * (KEYS / CLIENTS) + sequence % (KEYS / CLIENTS));
                    assert_eq!(client.put(&key, &value).unwrap(), 204);
                }
            });
        }
    });
    let written = (WRITES * VALUE_BYTES) as u64;
    assert!(written > 2 * SEGMENT_BYTES);
    let resident = member.resident_bytes();
    assert!(resident < 80 << 20, "{resident} bytes of memory after {written} written");
    let on_disk = || -> u64 {
        let files = files_in(site.dir());
        files.iter().filter_map(|path| Some(fs::metadata(path).ok()?.len())).sum()
    };
    eventually(PATIENCE, "old segments and snapshots are removed", || {
        on_disk() < 2 * SEGMENT_BYTES + (8 << 20) && names(&site, "raftexample-1-snap") <= 4
    });
    let first = site.dir().join("raftexample-1").join(format!("{:016x}.wal", 1));
    assert!(!first.exists(), "the first segment is still there");
    // All data is still there, also after a restart.
    member.kill();
    let begun = Instant::now();
    let _member = site.spawn("member", &flags);
    for key in 0..KEYS {
        let value = get(address, &format!("/key-{key}")).expect("it was acknowledged");
        assert_eq!(value, vec![(key / (KEYS / CLIENTS)) as u8; VALUE_BYTES]);
    }
    assert!(begun.elapsed() < Duration::from_secs(15), "replaying took {:?}", begun.elapsed());
}

fn names(site: &Site, dir: &str) -> usize {
    files_in(&site.dir().join(dir)).len()
}

/// With more clients than descriptors, connected clients stay served, others are served once there
/// is room, and the log and snapshots have the descriptors they need. Clients never stop a member.
#[test]
fn clients_leave_the_member_descriptors_for_its_files() {
    let site = Site::new();
    let (flags, address) = site.single(&[&FAST[..], &["--snapshot-count", "20"]].concat());
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -n 516 && exec \"$0\" \"$@\"", BINARY]).args(&flags);
    let mut member = site.spawn_command("member", limited, false);
    serves(address);
    let mut served = Client::new(address);
    assert_eq!(served.put("/k", b"before").unwrap(), 204);
    // With a full backlog, connecting would wait until a served client times out.
    let soon = Duration::from_millis(200);
    let idle: Vec<TcpStream> =
        (0..500).map_while(|_| TcpStream::connect_timeout(&address, soon).ok()).collect();
    println!("{} idle connections", idle.len());
    for _ in 0..100 {
        assert_eq!(served.put("/k", b"meanwhile").unwrap(), 204, "{}", member.stderr());
    }
    eventually(PATIENCE, "snapshots are made", || names(&site, "raftexample-1-snap") > 0);
    assert!(member.exited().is_none(), "{}", member.stderr());
    drop(idle);
    assert_eq!(get(address, "/k").as_deref(), Some(&b"meanwhile"[..]));
}

#[test]
fn a_member_allowed_too_few_files_does_not_start() {
    let site = Site::new();
    let (flags, _) = site.single(&[]);
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -n 32 && exec \"$0\" \"$@\"", BINARY]).args(&flags);
    let mut member = site.spawn_command("member", limited, false);
    assert_eq!(member.wait(PATIENCE), 2);
    let words = member.last_words();
    assert!(words.len() == 1 && words[0].contains("ulimit -n"), "{}", member.stderr());
}

/// The processor time used by a process.
fn processor_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // Fields 12 and 13 after the name, which is in parentheses.
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let ticks = fields.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap());
    // Linux reports hundredths of a second.
    Duration::from_millis(10 * ticks.sum::<u64>())
}

/// Descriptors can still run out: the system may have none left, or a limit may be lowered. Then
/// accepting waits; it does not spin.
#[test]
fn a_member_without_descriptors_backs_off_and_recovers() {
    let site = Site::new();
    let (flags, address) = site.single(&FAST);
    let mut member = site.spawn("member", &flags);
    serves(address);
    let mut served = Client::new(address);
    assert_eq!(served.put("/k", b"before").unwrap(), 204);
    let limit = |descriptors: usize| {
        let pid = member.pid().to_string();
        let limit = format!("--nofile={descriptors}:");
        Command::new("prlimit").args(["--pid", &pid, &limit]).status().is_ok_and(|s| s.success())
    };
    if !limit(48) {
        return skip("no member runs out of descriptors: there is no prlimit here");
    }
    let idle: Vec<TcpStream> = (0..100).map(|_| TcpStream::connect(address).unwrap()).collect();
    eventually(PATIENCE, "it runs out of descriptors", || {
        member.stderr().contains("cannot accept connections")
    });
    // Long enough that a loop without a pause would use most of it.
    let (begun, before) = (Instant::now(), processor_time(member.pid()));
    while begun.elapsed() < Duration::from_secs(1) {
        assert_eq!(served.put("/k", b"meanwhile").unwrap(), 204);
        // The rate of the load, not a wait.
        std::thread::sleep(Duration::from_millis(20));
    }
    let used = processor_time(member.pid()) - before;
    assert!(used < begun.elapsed() / 3, "it used {used:?} in {:?}", begun.elapsed());
    drop(idle);
    assert_eq!(get(address, "/k").as_deref(), Some(&b"meanwhile"[..]));
    assert!(member.exited().is_none());
    let said = member.stderr().matches("cannot accept connections").count();
    assert!(said <= 3, "it is logged {said} times");
}

/// Clients that hold a connection as long as possible and send almost nothing.
struct SlowClients {
    stop: Arc<AtomicBool>,
    sent_bytes: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl SlowClients {
    /// Starts `count` clients at `address`: one half never ends a request's head, the other never a
    /// body.
    fn start(address: SocketAddr, count: usize, body: &'static str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let mut streams: Vec<TcpStream> = Vec::new();
            for number in 0..count {
                // A connection that is not accepted waits in the backlog, which is slow as well.
                let Ok(mut stream) = TcpStream::connect_timeout(&address, ANSWER_TIMEOUT) else {
                    continue;
                };
                stream.set_nonblocking(true).unwrap();
                let begun =
                    if number % 2 == 0 { "GET /k HTTP/1.1\r\nHost: h\r\nX: " } else { body };
                let _ = stream.write_all(begun.as_bytes());
                streams.push(stream);
            }
            while !stopped.load(Ordering::Relaxed) {
                for stream in &mut streams {
                    let _ = stream.write(b"x");
                }
                // Their pace: one byte each.
                thread::sleep(Duration::from_millis(200));
            }
        });
        Self { stop, sent_bytes: Arc::default(), threads: vec![thread] }
    }

    /// Adds a client that sends an endless body as fast as possible, and repeats it when refused.
    fn and_an_endless_body(mut self, address: SocketAddr, head: &'static str) -> Self {
        let (stopped, sent_bytes) = (self.stop.clone(), self.sent_bytes.clone());
        self.threads.push(thread::spawn(move || {
            let chunk = [&b"10000\r\n"[..], &[b'x'; 0x10000], b"\r\n"].concat();
            while !stopped.load(Ordering::Relaxed) {
                let Ok(mut stream) = TcpStream::connect_timeout(&address, ANSWER_TIMEOUT) else {
                    continue;
                };
                stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
                let mut sent = stream.write_all(head.as_bytes());
                while sent.is_ok() && !stopped.load(Ordering::Relaxed) {
                    sent = stream.write_all(&chunk);
                    sent_bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                }
            }
        }));
        self
    }

    /// Returns the bytes of endless bodies that were sent.
    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        self.sent_bytes.load(Ordering::Relaxed)
    }
}

/// 500 clients and one endless body at each port. Together they announce 8 GB and send as fast as
/// they can. The member holds a read buffer of at most 64 KiB for each accepted connection (756
/// here: the peer port accepts 256), and one value of 16 MiB in a buffer that doubles as it grows.
#[test]
fn memory_stays_flat_under_500_slow_clients_at_each_port() {
    const HELD_BYTES: u64 = 96 << 20;
    const DURATION: Duration = Duration::from_secs(4);
    let mut cluster = Cluster::start(3, &[]);
    let (leader, _) = cluster.leader();
    let (victim, other) = (leader, leader % 3 + 1);
    let address = cluster.address(victim);
    let peer_port = cluster.member(victim).url["http://".len()..].parse().unwrap();
    let write = |at: SocketAddr, count: usize| {
        (0..count).for_each(|number| put(at, &format!("/key-{number}"), b"value"));
    };
    write(address, 200);
    let before = cluster.process(victim).resident_bytes();

    let slow = [
        SlowClients::start(
            address,
            500,
            "PUT /slow HTTP/1.1\r\nHost: h\r\nContent-Length: 16000000\r\n\r\n",
        )
        .and_an_endless_body(
            address,
            "PUT /endless HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",
        ),
        SlowClients::start(
            peer_port,
            500,
            "POST /raft HTTP/1.1\r\nHost: h\r\nContent-Length: 16000000\r\n\r\n",
        )
        .and_an_endless_body(
            peer_port,
            "POST /raft/snapshot HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",
        ),
    ];
    let begun = Instant::now();
    let mut most = 0;
    while begun.elapsed() < DURATION {
        // New clients are served, here and at other members.
        for at in [address, cluster.address(other)] {
            write(at, 10);
            assert_eq!(get(at, "/key-9").as_deref(), Some(&b"value"[..]));
        }
        most = most.max(cluster.process(victim).resident_bytes());
    }
    let sent: u64 = slow.into_iter().map(SlowClients::stop).sum();
    write(address, 100);
    let after = cluster.process(victim).resident_bytes();
    let figures = format!(
        "resident bytes: {before} before, {most} at most, {after} after; the endless bodies sent {sent}"
    );
    println!("{figures}");
    assert!(sent > HELD_BYTES, "they are too slow to prove anything: {figures}");
    assert!(most.max(after) < before + HELD_BYTES, "{figures}");
    assert!(cluster.process(victim).exited().is_none());
}
