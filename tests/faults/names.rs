//! A name server that does not answer: members whose names nobody resolves hold up no one else.

use std::fs;
use std::net::UdpSocket;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::processes::{Client, Cluster, Site, owned, skip};

/// How long writes go on: longer than a lookup waits, and than its outcome is remembered.
const LASTS: Duration = Duration::from_secs(12);
/// Far below the five seconds that a lookup takes.
const SOON: Duration = Duration::from_secs(1);
/// As many learners that were never heard from as a cluster takes.
const NAMES: u64 = 8;

#[test]
fn a_dead_name_server_does_not_hold_up_writes() {
    // On an address of its own, because resolv.conf names no port.
    let Ok(dead) = UdpSocket::bind("127.53.53.53:53") else {
        return skip("no dead name server: port 53 cannot be bound");
    };
    let site = Site::new();
    let resolver = site.dir().join("resolv.conf");
    fs::write(&resolver, format!("nameserver {}\n", dead.local_addr().unwrap().ip())).unwrap();
    let script = format!(
        "mount --bind {} \"$(readlink -f /etc/resolv.conf)\" && exec \"$0\" \"$@\"",
        resolver.display()
    );
    let launcher = owned(&["unshare", "--mount", "sh", "-c", &script]);
    let allowed = Command::new(&launcher[0]).args(&launcher[1..]).arg("true").status();
    if !allowed.is_ok_and(|status| status.success()) {
        return skip("no dead name server: mounting is not allowed");
    }
    let place = |_| {
        let mut place = site.place(site.url());
        place.launcher.clone_from(&launcher);
        place
    };
    let places = (1..=3).map(place).collect();
    let mut cluster = Cluster::start_at(site, places, &[]);
    let (leader, term) = cluster.leader();
    for id in 4..4 + NAMES {
        cluster.change(leader, "POST", id, &format!("http://member-{id}.raft.test:9021"));
    }
    dead.set_read_timeout(Some(LASTS)).unwrap();
    dead.recv_from(&mut [0; 512]).expect("a lookup arrives, and is not answered");
    let mut client = Client::new(cluster.address(leader));
    let (begun, mut slowest, mut writes) = (Instant::now(), Duration::ZERO, 0);
    while begun.elapsed() < LASTS {
        let asked = Instant::now();
        assert_eq!(client.put("/k", b"value").unwrap(), 204);
        slowest = slowest.max(asked.elapsed());
        writes += 1;
    }
    println!("NAMES dead {NAMES} | writes {writes} | slowest {slowest:.1?}");
    assert!(slowest < SOON, "a write took {slowest:?}");
    assert_eq!(cluster.leader(), (leader, term));
}
