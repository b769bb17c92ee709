//! Clients that take what they can get: through another connection, another client is served in time all
//! the while, no member exits or loses its leadership, and memory stays bounded (P8, P10).

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::processes::{Client, Cluster};

/// How long each flood lasts.
const FLOOD: Duration = Duration::from_secs(4);
/// The deadline of a request, with default flags.
const DEADLINE: Duration = Duration::from_secs(5);
/// The growth of resident memory that a flood may cause.
const GROWTH_BYTES: u64 = 256 << 20;

/// Has `flood` run until it is told to stop, on three members with these flags, and holds them to what this module says.
/// `flood` gets the leader's client address, everybody's peer addresses and the call to stop.
fn bear(name: &str, flags: &[&str], flood: impl Fn(SocketAddr, &[SocketAddr], &AtomicBool) + Sync) {
    let mut cluster = Cluster::start(3, flags);
    let before = cluster.leader();
    let leader = cluster.address(before.0);
    let idle: Vec<u64> =
        cluster.ids().into_iter().map(|id| cluster.process(id).resident_bytes()).collect();
    let peers: Vec<SocketAddr> = cluster
        .ids()
        .iter()
        .map(|id| cluster.member(*id).url.trim_start_matches("http://").parse().unwrap())
        .collect();
    let (is_over, begun) = (AtomicBool::new(false), Instant::now());
    let (mut writes, mut slowest) = (0, Duration::ZERO);
    thread::scope(|scope| {
        scope.spawn(|| flood(leader, &peers, &is_over));
        while begun.elapsed() < FLOOD {
            let asked = Instant::now();
            // A new connection each time: it has to get in.
            let status = Client::new(leader).put("/other", b"value").unwrap();
            assert_eq!(status, 204, "{name}: after {writes} writes");
            slowest = slowest.max(asked.elapsed());
            writes += 1;
        }
        is_over.store(true, Ordering::SeqCst);
    });
    assert!(slowest < DEADLINE, "{name}: {slowest:?}");
    for (id, idle) in cluster.ids().into_iter().zip(idle) {
        let process = cluster.process(id);
        assert_eq!(process.exited(), None, "{name}: member {id}");
        let peak = process.peak_resident_bytes();
        assert!(peak < idle + GROWTH_BYTES, "{name}: member {id} has {peak} bytes, idle {idle}");
    }
    assert_eq!(cluster.leader(), before, "{name}: nobody was elected");
    println!("FLOOD {name} | writes of another client {writes} | slowest {slowest:.1?}");
}

/// Opens connections to each of `addresses`, sends `first` on each, and keeps up to `held` of each open.
fn hold_open(addresses: &[SocketAddr], first: &[u8], held: usize, is_over: &AtomicBool) {
    let mut connections = Vec::new();
    while !is_over.load(Ordering::SeqCst) {
        for address in addresses {
            if let Ok(mut connection) = TcpStream::connect_timeout(address, DEADLINE) {
                let _ = connection.write_all(first);
                connections.push(connection);
            }
        }
        if connections.len() > held * addresses.len() {
            connections.drain(..addresses.len());
        }
    }
}

#[test]
fn silent_sockets_on_the_peer_ports_stop_nobody() {
    bear("silent peers", &[], |_, peers, is_over| hold_open(peers, b"", 400, is_over));
}

#[test]
fn silent_sockets_on_the_client_port_keep_nobody_out() {
    bear("silent clients", &[], |leader, _, is_over| hold_open(&[leader], b"", 1500, is_over));
}

#[test]
fn bodies_that_are_announced_and_never_come_stop_nobody() {
    let announced = b"POST /raft HTTP/1.1\r\nHost: h\r\nContent-Length: 100663296\r\n\r\n";
    bear("announced bodies", &[], |_, peers, is_over| hold_open(peers, announced, 100, is_over));
}

#[test]
fn slow_uploads_leave_room_for_small_ones() {
    bear("slow uploads", &[], |leader, _, is_over| {
        let upload = || {
            let head = b"PUT /large HTTP/1.1\r\nHost: h\r\nContent-Length: 16000000\r\n\r\n";
            while !is_over.load(Ordering::SeqCst) {
                let mut connection = TcpStream::connect(leader).unwrap();
                let mut sent = connection.write_all(head);
                // All but the last bytes.
                for _ in 0..150 {
                    sent = sent.and_then(|()| connection.write_all(&[b'x'; 100_000]));
                }
                while sent.is_ok() && !is_over.load(Ordering::SeqCst) {
                    // Their pace.
                    thread::sleep(Duration::from_millis(100));
                    sent = connection.write_all(b"x");
                }
            }
        };
        thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(upload))));
    });
}

#[test]
fn slow_readers_of_overwritten_values_cost_bounded_memory() {
    // The log is short: it holds values, too.
    let flags = ["--snapshot-count", "5", "--snapshot-catch-up-entries", "1"];
    bear("slow readers", &flags, |leader, _, is_over| {
        let mut readers = Vec::new();
        while !is_over.load(Ordering::SeqCst) {
            let value = vec![readers.len() as u8; 4 << 20];
            let _ = Client::new(leader).put("/large", &value);
            let mut reader = TcpStream::connect(leader).unwrap();
            reader.write_all(b"GET /large HTTP/1.1\r\nHost: h\r\n\r\n").unwrap();
            reader.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            let _ = reader.read(&mut [0; 1000]);
            readers.push(reader);
        }
    });
}

#[test]
fn floods_of_membership_changes_are_refused_beyond_the_limit() {
    bear("membership", &[], |leader, _, is_over| {
        let mut client = Client::new(leader);
        for id in 100.. {
            if is_over.load(Ordering::SeqCst) {
                break;
            }
            // At most eight members that were never heard are taken.
            let _ = client.request(
                "POST",
                &format!("/{id}"),
                format!("http://127.0.0.1:{id}").as_bytes(),
            );
        }
    });
}
