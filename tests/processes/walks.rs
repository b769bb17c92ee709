//! The walks of the original's README, step by step, with default flags.

use crate::support::processes::{Cluster, Signal};

#[test]
fn a_write_at_any_member_is_read_at_every_member() {
    let cluster = Cluster::start(3, &[]);
    for at in cluster.ids() {
        let key = format!("/my-key-{at}");
        cluster.put(at, &key, "hello");
        for reader in cluster.ids() {
            assert_eq!(cluster.get(reader, &key).as_deref(), Some("hello"), "{key} at {reader}");
        }
    }
}

#[test]
fn a_member_that_was_stopped_recovers_with_the_updated_value() {
    // goreman stops a process with SIGINT.
    recovers_after(|cluster| cluster.stop(2, Signal::SIGINT));
}

#[test]
fn a_member_that_was_killed_recovers_with_the_updated_value() {
    recovers_after(|cluster| cluster.kill(2));
}

fn recovers_after(end: impl FnOnce(&mut Cluster)) {
    let mut cluster = Cluster::start(3, &[]);
    cluster.put(1, "/my-key", "foo");
    end(&mut cluster);
    cluster.put(1, "/my-key", "bar");
    assert_eq!(cluster.get(3, "/my-key").as_deref(), Some("bar"));
    cluster.start_again(2);
    assert_eq!(cluster.get(2, "/my-key").as_deref(), Some("bar"));
}
