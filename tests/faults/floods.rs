//! Clients that take what they can get: through another connection, another client is served in time all
//! the while, no member exits or loses its leadership, and memory stays bounded (P8, P10).

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use serde_json::Value;

use crate::runner::SetWhenDropped;
use crate::support::certificates::{Authority, place};
use crate::support::processes::{Client, Cluster, Signal, Site, request, run, serves};

/// How long each flood lasts.
const FLOOD: Duration = Duration::from_secs(4);
/// The deadline of a request, with default flags.
const DEADLINE: Duration = Duration::from_secs(5);
/// Longer than a connection between members may be silent, and shorter than an election timeout.
const HANG: Duration = Duration::from_millis(800);
/// How long a probe waits, as Kubernetes does by default.
const PROBE_DEADLINE: Duration = Duration::from_secs(1);
/// The growth of resident memory that a flood may cause: responses that nobody takes (128 MiB), queues to two
/// peers (64 MiB each), and entries that are not applied yet (64 MiB).
const GROWTH_BYTES: u64 = 320 << 20;

/// Has `flood` run until it is told to stop, on three members with these flags, and holds them to what this module says.
/// `flood` gets the leader's client address, everybody's peer addresses and the call to stop.
///
/// Meanwhile both followers hang, for too short for an election: afterwards the leader needs new connections
/// to them, which have to get in.
fn bear(name: &str, flags: &[&str], flood: impl Fn(SocketAddr, &[SocketAddr], &AtomicBool) + Sync) {
    bear_at(name, Cluster::start(3, flags), flood);
}

fn bear_at(
    name: &str,
    mut cluster: Cluster,
    flood: impl Fn(SocketAddr, &[SocketAddr], &AtomicBool) + Sync,
) {
    let before = cluster.leader();
    let leader = cluster.address(before.0);
    let idle: Vec<u64> =
        cluster.ids().into_iter().map(|id| cluster.process(id).resident_bytes()).collect();
    let peers: Vec<SocketAddr> = cluster.ids().into_iter().map(|id| peer(&cluster, id)).collect();
    let (is_over, begun) = (AtomicBool::new(false), Instant::now());
    let (mut writes, mut slowest) = (0, Duration::ZERO);
    let followers: Vec<u64> = cluster.ids().into_iter().filter(|id| *id != before.0).collect();
    let mut have_hung = false;
    thread::scope(|scope| {
        scope.spawn(|| flood(leader, &peers, &is_over));
        let _over = SetWhenDropped(&is_over);
        while begun.elapsed() < FLOOD {
            let asked = Instant::now();
            // A new connection each time: it has to get in.
            let status = Client::new(leader).put("/other", b"value").unwrap();
            assert_eq!(status, 204, "{name}: after {writes} writes");
            slowest = slowest.max(asked.elapsed());
            writes += 1;
            if begun.elapsed() > FLOOD / 3 && !std::mem::replace(&mut have_hung, true) {
                followers.iter().for_each(|id| cluster.process(*id).pause());
                // The length of the pause is the fault.
                thread::sleep(HANG);
                followers.iter().for_each(|id| cluster.process(*id).signal(Signal::SIGCONT));
            }
        }
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

fn peer(cluster: &Cluster, id: u64) -> SocketAddr {
    let (_, address) = cluster.member(id).url.split_once("://").unwrap();
    address.parse().unwrap()
}

/// Opens connections to each of `addresses`, sends `first` on each, and keeps up to `held` of each open: the
/// first half all the time, the others in turn, about a thousand in a second.
fn hold_open(addresses: &[SocketAddr], first: &[u8], held: usize, is_over: &AtomicBool) {
    let mut connections = Vec::new();
    let mut have_been_held = false;
    while !is_over.load(Ordering::SeqCst) {
        for address in addresses {
            if let Ok(mut connection) = TcpStream::connect_timeout(address, DEADLINE) {
                let _ = connection.write_all(first);
                connections.push(connection);
            }
        }
        if have_been_held {
            // As fast as it can, one client fills the kernel's queue of connections that wait to be accepted.
            thread::sleep(Duration::from_millis(1));
        }
        if connections.len() > held * addresses.len() {
            connections.truncate(held * addresses.len() / 2);
            have_been_held = true;
        }
    }
}

#[test]
fn silent_sockets_on_the_peer_ports_stop_nobody() {
    bear("silent peers", &[], |_, peers, is_over| hold_open(peers, b"", 400, is_over));
}

/// Clients of a port with TLS, which have no certificate: some do not begin the handshake, some do not end it.
#[test]
fn silent_sockets_on_peer_ports_with_tls_stop_nobody() {
    let mut hello = Vec::new();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    ClientConnection::new(Arc::new(config), name).unwrap().write_tls(&mut hello).unwrap();
    for (name, first) in [("silent peers, TLS", &[][..]), ("half handshakes", &hello)] {
        let (site, authority) = (Site::new(), Authority::new("the cluster's"));
        let places = (1..=3).map(|id| place(&site, &authority, id)).collect();
        let cluster = Cluster::start_at(site, places, &[]);
        bear_at(name, cluster, |_, peers, is_over| hold_open(peers, first, 400, is_over));
    }
}

#[test]
fn silent_sockets_on_the_admin_port_keep_no_probe_out() {
    let site = Site::new();
    let admin = site.at(site.port());
    let (flags, address) = site.single(&["--admin", &admin.to_string()]);
    let _member = site.spawn("member", &flags);
    serves(address);
    let (is_over, begun) = (AtomicBool::new(false), Instant::now());
    let (mut probes, mut slowest) = (0, Duration::ZERO);
    thread::scope(|scope| {
        scope.spawn(|| hold_open(&[admin], b"", 500, &is_over));
        let _over = SetWhenDropped(&is_over);
        while begun.elapsed() < FLOOD {
            let asked = Instant::now();
            assert_eq!(request(admin, "GET", "/livez", b"").unwrap().status, 200);
            slowest = slowest.max(asked.elapsed());
            probes += 1;
            // Their pace: probes are no flood.
            thread::sleep(Duration::from_millis(5));
        }
    });
    println!("FLOOD silent probes | probes answered {probes} | slowest {slowest:.1?}");
    assert!(slowest < PROBE_DEADLINE, "{slowest:?}");
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

/// Without TLS, anyone who has seen one message of a member can send requests in its name.
#[test]
fn bodies_announced_in_a_members_name_stop_nobody() {
    for (path, length) in [("/raft", 96 << 20), ("/raft/snapshot", 1_u64 << 30)] {
        let mut cluster = Cluster::start(3, &[]);
        let (leader, _) = cluster.leader();
        let heads = [1, 2, 3].map(|to| {
            let from = if to == leader { leader % 3 + 1 } else { leader };
            let identity = identity(&cluster, from);
            let [cluster_id, incarnation] = ["cluster_id", "incarnation"]
                .map(|name| u64_of(identity[name].as_str().unwrap()));
            let url = &cluster.member(from).url;
            let head = format!(
                "POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\nraft-protocol: 4\r\n\
                 raft-cluster-id: {cluster_id:016x}\r\nraft-from: {from}\r\n\
                 raft-incarnation: {incarnation:016x}\r\nraft-from-url: {url}\r\nraft-to: {to}\r\n\
                 raft-to-incarnation: 0000000000000000\r\nraft-boot: 0000000000000001\r\n\
                 raft-number: 1\r\nraft-snapshot-length: 1000000000\r\n\
                 raft-snapshot-checksum: 00000000\r\n\r\n"
            );
            (peer(&cluster, to), head)
        });
        // They are admitted, so that the body is waited for.
        for (address, head) in &heads {
            let mut connection = TcpStream::connect(address).unwrap();
            connection.write_all(head.as_bytes()).unwrap();
            connection.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            let mut answered = [0; 2000];
            let answer = connection.read(&mut answered).map_err(|error| error.kind());
            let text = String::from_utf8_lossy(&answered).into_owned();
            assert_eq!(answer, Err(ErrorKind::WouldBlock), "{path}: {text}");
        }
        bear_at(&format!("bodies announced to {path}"), cluster, |_, _, is_over| {
            thread::scope(|scope| {
                for (address, head) in &heads {
                    scope.spawn(|| hold_open(&[*address], head.as_bytes(), 100, is_over));
                }
            });
        });
    }
}

/// The last line of the member's log that names its cluster. The first is from before its bootstrap.
fn identity(cluster: &Cluster, id: u64) -> Value {
    let ran = run(cluster.site.dir(), &["inspect", &format!("raftexample-{id}"), "--json"]);
    let mut lines = ran.stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.rfind(|line| !line["incarnation"].is_null() && !line["cluster_id"].is_null()).unwrap()
}

fn u64_of(hexadecimal: &str) -> u64 {
    u64::from_str_radix(hexadecimal.trim_start_matches("0x"), 16).unwrap()
}

/// Four bodies of the largest size, of which all but a byte has arrived, leave four bytes of the room for
/// bodies.
#[test]
fn slow_uploads_leave_room_for_small_ones() {
    const LENGTH: usize = 16 << 20;
    bear("slow uploads", &[], |leader, _, is_over| {
        let head = format!("PUT /large HTTP/1.1\r\nHost: h\r\nContent-Length: {LENGTH}\r\n\r\n");
        let upload = || {
            while !is_over.load(Ordering::SeqCst) {
                let mut connection = TcpStream::connect(leader).unwrap();
                let sent = connection.write_all(head.as_bytes());
                let sent = sent.and_then(|()| connection.write_all(&vec![b'x'; LENGTH - 1]));
                while sent.is_ok() && !is_over.load(Ordering::SeqCst) {
                    // Their pace.
                    thread::sleep(Duration::from_millis(20));
                }
            }
        };
        thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(upload))));
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
