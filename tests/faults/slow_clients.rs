//! Clients that hold resources as long as they can, while others work.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::clients::Clients;
use crate::runner::{FAST, Run, SMALL, rounds};

/// Of 500 in all.
const IDLE: usize = 200;
const SLOW_HEADS: usize = 150;
const SLOW_BODIES: usize = 130;
const HALF_OPEN: usize = 20;
/// Each sends chunks until it is stopped.
const ENDLESS_BODIES: usize = 4;

const FLAGS: [&str; 4] = ["--max-value-bytes", "1048576", "--request-timeout", "1s"];
const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// A member's deadline for a head, and for the next request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How late a connection may close on a busy machine.
const SLACK: Duration = Duration::from_secs(5);
/// The pause between two bytes of a slow client.
const DRIP: Duration = Duration::from_millis(100);
/// The allowed growth of resident memory: a few read buffers per connection, the endless bodies up
/// to their refusal, and what the allocator keeps. The peak of nine rounds was 61 MiB, and what is
/// resident between rounds rises from 28 to 53 MiB in five rounds and then no more.
const FLAT_BYTES: u64 = 64 << 20;
/// The longest interruption of other clients' writes.
const STALL_MAX: Duration = Duration::from_secs(2);
const WRITES: usize = 100;

const SLOW_BODY: &str = "PUT /slow HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n";

/// Connections of one kind, with a member's deadline for them.
struct Slow {
    what: &'static str,
    connections: Vec<TcpStream>,
    /// Sent repeatedly, one byte at a time.
    drip: &'static [u8],
    deadline: Duration,
}

impl Slow {
    fn open(
        what: &'static str,
        count: usize,
        address: SocketAddr,
        first: &str,
        drip: &'static [u8],
        deadline: Duration,
    ) -> Self {
        let open = |_| {
            let mut connection = TcpStream::connect(address).unwrap();
            connection.write_all(first.as_bytes()).unwrap();
            connection.set_nonblocking(true).unwrap();
            connection
        };
        Self { what, connections: (0..count).map(open).collect(), drip, deadline }
    }

    /// Sends the next byte on each connection and drops those that the member closed: none may
    /// close before its deadline, and all must afterwards.
    fn go_on(&mut self, turn: usize, begun: Instant) {
        let Self { what, connections, drip, deadline } = self;
        let before = connections.len();
        connections.retain_mut(|connection| {
            if !drip.is_empty() {
                // Reading detects a closed connection.
                let _ = connection.write(&[drip[turn % drip.len()]]);
            }
            is_open(connection)
        });
        let (age, open) = (begun.elapsed(), connections.len());
        assert!(open == before || age >= *deadline, "{what}: {} closed at {age:?}", before - open);
        assert!(open == 0 || age < *deadline + SLACK, "{what}: {open} still open at {age:?}");
    }
}

/// Reads and drops a member's bytes; returns false at their end.
fn is_open(connection: &mut TcpStream) -> bool {
    let mut answer = [0; 4096];
    loop {
        match connection.read(&mut answer) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) => return error.kind() == ErrorKind::WouldBlock,
        }
    }
}

/// Opens all connections at `address`. Holds them for at least `patience`, and until those with a
/// deadline in it are closed. `clients` continue all the time. Returns the number of connections.
fn bear(address: SocketAddr, clients: &Clients, patience: Duration) -> usize {
    let begun = Instant::now();
    let open = |what, count, first: &str, drip, deadline| {
        Slow::open(what, count, address, first, drip, deadline)
    };
    let mut slow = [
        open("half-open", HALF_OPEN, "GET /k HTT", b"", Duration::ZERO),
        open("idle", IDLE, "GET /k HTTP/1.1\r\nHost: h\r\n\r\n", b"", HEADER_TIMEOUT),
        open("slow head", SLOW_HEADS, "GET /k HTTP/1.1\r\n", b"x", HEADER_TIMEOUT),
        open("slow body", SLOW_BODIES, SLOW_BODY, b"x", REQUEST_TIMEOUT),
    ];
    slow[0].connections.iter().for_each(|half| half.shutdown(Shutdown::Write).unwrap());
    let count: usize = slow.iter().map(|kind| kind.connections.len()).sum();
    let is_awaited = |kind: &Slow| kind.deadline <= patience && !kind.connections.is_empty();
    let (mut acknowledged, mut since) = (clients.acknowledged(), Instant::now());
    thread::scope(|scope| {
        for _ in 0..ENDLESS_BODIES {
            scope.spawn(|| send_endless_body(address));
        }
        for turn in 0.. {
            if begun.elapsed() > patience && !slow.iter().any(is_awaited) {
                break;
            }
            // The rate of the dripping.
            thread::sleep(DRIP);
            slow.iter_mut().for_each(|kind| kind.go_on(turn, begun));
            if clients.acknowledged() > acknowledged {
                (acknowledged, since) = (clients.acknowledged(), Instant::now());
            }
            assert!(since.elapsed() < STALL_MAX, "no write of others in {:?}", since.elapsed());
        }
    });
    count + ENDLESS_BODIES
}

/// Sends chunks until the member refuses. It reads and drops the body for a moment after that, so
/// this bounds the time, not the memory.
fn send_endless_body(address: SocketAddr) {
    let mut connection = TcpStream::connect(address).unwrap();
    connection
        .write_all(b"PUT /endless HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
        .unwrap();
    let chunk = [b"10000\r\n", &[b'x'; 0x10000][..], b"\r\n"].concat();
    let begun = Instant::now();
    while connection.write_all(&chunk).is_ok() {
        assert!(begun.elapsed() < REQUEST_TIMEOUT + SLACK, "a member takes a body for ever");
    }
}

fn bear_slow_clients(default_rounds: usize, patience: Duration) {
    // The log does not grow either.
    let flags = [&FAST[..], &SMALL, &FLAGS].concat();
    let mut run = Run::start("slow clients and endless bodies", 3, &flags);
    let ids = run.cluster.ids();
    let id = *run.random.choose(&ids);
    let address = run.cluster.address(id);
    let mut first = None;
    for _ in 0..rounds(default_rounds) {
        let clients = run.load();
        clients.wait_for(WRITES);
        let before = clients.acknowledged();
        let first = *first.get_or_insert_with(|| run.cluster.process(id).peak_resident_bytes());
        run.tally.injected += bear(address, &clients, patience);
        let peak = run.cluster.process(id).peak_resident_bytes();
        println!(
            "SLOW CLIENTS | writes of others meanwhile {} | peak of resident bytes before {first} | after {peak}",
            clients.acknowledged() - before
        );
        assert!(peak < first + FLAT_BYTES, "{first} bytes of memory at first, then {peak}");
        run.check(clients);
    }
    run.finish();
}

#[test]
fn slow_clients_delay_nobody_and_memory_stays_flat() {
    bear_slow_clients(1, REQUEST_TIMEOUT);
}

#[test]
#[ignore = "long: five times 500 slow clients until their deadline of 30 s"]
fn slow_clients_are_closed_in_time_and_memory_stays_flat() {
    bear_slow_clients(5, HEADER_TIMEOUT);
}
