//! Each member's own network: a network namespace, a cable to one bridge, and rules that drop
//! packets. The test is at the bridge and reaches all members.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::support::processes::{owned, skip};

/// The prefix of a network's names. The kernel allows 15 bytes.
const PREFIX: &str = "rfx";

/// The packet filter: nftables, or the older iptables.
#[derive(Clone, Copy, Debug)]
enum Filter {
    Nft,
    Iptables,
}

/// The members' namespaces and their bridge, removed when dropped.
pub struct Network {
    name: String,
    /// The first of 16 addresses: the members count from it, the test has the last but one.
    base: u32,
    size: u64,
    filter: Filter,
}

impl Network {
    /// Namespaces for members 1 to `size`, or `None`, with a report, if they cannot be made.
    pub fn new(size: u64) -> Option<Self> {
        static NETWORKS: AtomicU32 = AtomicU32::new(0);
        remove_leftovers();
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{:x}n{number:x}", std::process::id());
        let base = free_base(std::process::id().wrapping_mul(61).wrapping_add(number));
        let mut network = Self { name, base, size, filter: Filter::Nft };
        // A killed run may have had this process id.
        let built = network.build().or_else(|_| {
            network.remove();
            network.build()
        });
        if let Err(why) = built {
            skip(&format!("no network is cut: {why}; it takes root, ip, and nft or iptables"));
            return None;
        }
        Some(network)
    }

    fn build(&mut self) -> Result<(), String> {
        let bridge = self.name.clone();
        run(&["ip", "link", "add", &bridge, "type", "bridge"])?;
        let own = format!("{}/28", Ipv4Addr::from(self.base + 14));
        run(&["ip", "address", "add", &own, "dev", &bridge])?;
        run(&["ip", "link", "set", &bridge, "up"])?;
        for id in 1..=self.size {
            let (namespace, cable) = (self.namespace(id), self.namespace(id));
            let address = format!("{}/28", self.address(id));
            run(&["ip", "netns", "add", &namespace])?;
            let ends = ["type", "veth", "peer", "name", "eth0", "netns", &namespace];
            run(&[&["ip", "link", "add", &cable], &ends[..]].concat())?;
            run(&["ip", "link", "set", &cable, "master", &bridge, "up"])?;
            run(&["ip", "-n", &namespace, "address", "add", &address, "dev", "eth0"])?;
            run(&["ip", "-n", &namespace, "link", "set", "eth0", "up"])?;
            run(&["ip", "-n", &namespace, "link", "set", "lo", "up"])?;
        }
        self.filter = self.working_filter()?;
        // Some machines filter packets that cross a bridge. A port without a listener refuses at
        // once.
        let knock = format!("exec 3<>/dev/tcp/{}/9", self.address(self.size));
        let knock = run(&self.inside(1, &["timeout", "2", "bash", "-c", &knock]));
        match knock {
            Err(answer) if answer.contains("refused") => Ok(()),
            _ => Err("what one namespace sends does not reach the other".into()),
        }
    }

    fn working_filter(&self) -> Result<Filter, String> {
        let nft = (1..=self.size).try_for_each(|id| {
            self.nft(id, "add table inet faults")?;
            self.nft(id, "add chain inet faults in { type filter hook input priority 0; }")?;
            self.nft(id, "add chain inet faults out { type filter hook output priority 0; }")
        });
        let Err(nft) = nft else { return Ok(Filter::Nft) };
        match run(&self.inside(1, &["iptables", "-F"])) {
            Ok(()) => Ok(Filter::Iptables),
            Err(iptables) => Err(format!("{nft}; {iptables}")),
        }
    }

    fn remove(&self) {
        (1..=self.size).for_each(|id| remove(&self.namespace(id)));
        remove(&self.name);
    }

    /// Member `id`'s namespace, and the bridge's end of its cable.
    fn namespace(&self, id: u64) -> String {
        format!("{}m{id}", self.name)
    }

    pub fn address(&self, id: u64) -> Ipv4Addr {
        Ipv4Addr::from(self.base + id as u32)
    }

    /// A command that executes its arguments in member `id`'s namespace, so that the started
    /// process is the member itself.
    ///
    /// Not `ip netns exec`: that also makes a mount namespace, where everything mounted stays
    /// mounted, including the disks of other tests.
    pub fn launcher(&self, id: u64) -> Vec<String> {
        owned(&["nsenter", &format!("--net=/run/netns/{}", self.namespace(id))])
    }

    fn inside(&self, id: u64, command: &[&str]) -> Vec<String> {
        [self.launcher(id), owned(command)].concat()
    }

    fn nft(&self, id: u64, rule: &str) -> Result<(), String> {
        let words: Vec<&str> = rule.split(' ').collect();
        run(&self.inside(id, &[&["nft"], &words[..]].concat()))
    }

    fn rule(&self, id: u64, nft: &str, iptables: &str) {
        let done = match self.filter {
            Filter::Nft => self.nft(id, &format!("add rule inet faults {nft}")),
            Filter::Iptables => {
                let words: Vec<&str> = iptables.split(' ').collect();
                run(&self.inside(id, &[&["iptables"], &words[..]].concat()))
            }
        };
        done.unwrap_or_else(|why| panic!("a rule in the namespace of member {id}: {why}"));
    }

    /// Drops packets from `from` to `to`.
    pub fn cut_one_way(&self, from: u64, to: u64) {
        let from = self.address(from);
        self.rule(to, &format!("in ip saddr {from} drop"), &format!("-A INPUT -s {from} -j DROP"));
    }

    /// Drops packets between two members.
    pub fn cut(&self, one: u64, other: u64) {
        self.cut_one_way(one, other);
        self.cut_one_way(other, one);
    }

    /// Drops packets between the two sides.
    pub fn split(&self, one_side: &[u64], other_side: &[u64]) {
        for one in one_side {
            other_side.iter().for_each(|other| self.cut(*one, *other));
        }
    }

    /// Resets the connection of each packet from member `id` to `to`.
    pub fn reset(&self, id: u64, to: u64) {
        let to = self.address(to);
        self.rule(
            id,
            &format!("out ip daddr {to} meta l4proto tcp reject with tcp reset"),
            &format!("-A OUTPUT -p tcp -d {to} -j REJECT --reject-with tcp-reset"),
        );
    }

    /// Drops `percent` of the packets from other members to member `id`, at random.
    pub fn lose(&self, id: u64, percent: u32) {
        for other in (1..=self.size).filter(|other| *other != id) {
            let from = self.address(other);
            self.rule(
                id,
                &format!("in ip saddr {from} numgen random mod 100 < {percent} drop"),
                &format!(
                    "-A INPUT -s {from} -m statistic --mode random --probability {} -j DROP",
                    f64::from(percent) / 100.0
                ),
            );
        }
    }

    /// Limits member `id` to `kilobits` per second; excess packets wait up to `delay_ms`. Returns
    /// false if the kernel lacks such a queue.
    pub fn slow_down(&self, id: u64, kilobits: u32, delay_ms: u32) -> bool {
        let (rate, latency) = (format!("{kilobits}kbit"), format!("{delay_ms}ms"));
        let queue = ["tbf", "rate", &rate, "burst", "16kbit", "latency", &latency];
        let namespace = self.namespace(id);
        let place = ["tc", "-n", &namespace, "qdisc", "replace", "dev", "eth0", "root"];
        run(&[&place[..], &queue].concat()).is_ok()
    }

    /// Lifts the limit.
    pub fn speed_up(&self, id: u64) {
        let namespace = self.namespace(id);
        let done = run(&["tc", "-n", &namespace, "qdisc", "del", "dev", "eth0", "root"]);
        done.unwrap_or_else(|why| panic!("the network of member {id}: {why}"));
    }

    /// Removes all rules.
    pub fn heal(&self) {
        for id in 1..=self.size {
            let healed = match self.filter {
                Filter::Nft => self.nft(id, "flush table inet faults"),
                Filter::Iptables => run(&self.inside(id, &["iptables", "-F"])),
            };
            healed.unwrap_or_else(|why| panic!("healing the network of member {id}: {why}"));
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Removes a namespace and the link of that name, if they exist.
fn remove(name: &str) {
    let _ = run(&["ip", "netns", "del", name]);
    let _ = run(&["ip", "link", "del", name]);
}

/// Removes what a killed run left behind.
fn remove_leftovers() {
    let names_in = |dir: &str| {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    let names: BTreeSet<String> =
        [names_in("/run/netns"), names_in("/sys/class/net")].concat().into_iter().collect();
    for name in names {
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('n').next());
        let Some(Ok(owner)) = owner.map(|owner| u32::from_str_radix(owner, 16)) else { continue };
        if !Path::new(&format!("/proc/{owner}")).exists() {
            remove(&name);
        }
    }
}

/// The first of 16 unused addresses in the range reserved for benchmarks (198.18.0.0/15).
fn free_base(start: u32) -> u32 {
    const FIRST: u32 = u32::from_be_bytes([198, 18, 0, 0]);
    const GROUPS: u32 = 1 << 13;
    let routes = Command::new("ip").args(["-4", "route"]).output();
    let routes = routes.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let routes = routes.unwrap_or_default();
    let group = |number: u32| FIRST + (start.wrapping_add(number) % GROUPS) * 16;
    let is_free = |base: &u32| !routes.contains(&format!("{}/28 ", Ipv4Addr::from(*base)));
    (0..GROUPS).map(group).find(is_free).expect("no machine uses all of them")
}

/// Runs a command; returns its output if it fails.
fn run(command: &[impl AsRef<str>]) -> Result<(), String> {
    let words: Vec<&str> = command.iter().map(AsRef::as_ref).collect();
    let output = Command::new(words[0]).args(&words[1..]).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{}: {error}", words[0]))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("`{}`: {}", words.join(" "), said.trim()))
}
