//! Adding and removing members.

use raftexample::channels::{ConfChangeRequest, MemberRequest, NodeId, responder};
use raftexample::error::Error;
use tokio::time::{Instant, sleep};

use crate::harness::{Cluster, ELECTION_TIMEOUT, Options, PATIENCE, eventually, within};

/// A URL where no process listens.
const NOBODY: &str = "http://127.0.0.1:9";

/// Through the bare channels, as in the original: a write on the new member reaches an old one.
#[tokio::test(flavor = "multi_thread")]
async fn test_add_new_node() {
    let mut cluster = Cluster::new(3);
    let mut members = Vec::new();
    for id in 1..=3 {
        members.push(cluster.open(id));
    }
    cluster.joiner(4);
    let (add, added) = responder();
    let change = MemberRequest::Add { id: 4, url: cluster.url(4) };
    let request = ConfChangeRequest { change, forwarded: false, responder: add };
    members[0].conf_change_tx.send(request).await.unwrap();
    added.wait_until(Instant::now() + PATIENCE).await.expect("member 4 is added");
    members.push(cluster.open(4));
    let _pending = members[3].propose("foo").await;
    assert_eq!(members[0].next_entries().await[0].data, "foo");
    assert_eq!(members[3].next_entries().await[0].data, "foo");
    for member in members {
        member.close().await.expect("every node ends in order");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_come_and_go_through_a_follower() {
    let mut cluster = Cluster::started(3, Options::default()).await;
    cluster.write(1, "/k", "v").await;
    let follower = cluster.follower().await;
    cluster.join(4, follower).await;
    cluster.holds(4, "/k", "v").await;
    for id in 1..=4 {
        cluster.has_members(id, &[1, 2, 3, 4]).await;
    }
    let follower = cluster.follower().await;
    cluster.client(follower).remove(4).await.expect(204);
    assert!(matches!(cluster.end(4).await, Error::Removed));
    for id in 1..=3 {
        cluster.has_members(id, &[1, 2, 3]).await;
    }
    cluster.write(2, "/k", "v2").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_changes_at_once_none_is_lost() {
    let mut cluster = Cluster::started(3, Options::default()).await;
    cluster.joiner(4);
    cluster.joiner(5);
    let (client_1, client_2) = (cluster.client(1), cluster.client(2));
    let (url_4, url_5) = (cluster.url(4), cluster.url(5));
    let (four, five) = tokio::join!(client_1.add(4, &url_4), client_2.add(5, &url_5));
    let mut expected = vec![1, 2, 3];
    for (id, answer) in [(4, four), (5, five)] {
        match answer.status {
            204 => expected.push(id),
            409 => assert!(answer.text().contains("pending"), "{}", answer.text()),
            status => panic!("{status}: {}", answer.text()),
        }
    }
    assert!(expected.len() > 3, "neither was taken");
    for id in 1..=3 {
        cluster.has_members(id, &expected).await;
    }
    // The refused change succeeds when it is requested again.
    for id in [4, 5] {
        if !expected.contains(&id) {
            client_1.add(id, &cluster.url(id)).await.expect(204);
        }
    }
    for id in 1..=3 {
        cluster.has_members(id, &[1, 2, 3, 4, 5]).await;
    }
    cluster.start(4).await;
    cluster.start(5).await;
    cluster.write(1, "/k", "v").await;
    cluster.holds(4, "/k", "v").await;
    cluster.holds(5, "/k", "v").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_right_after_an_election_is_carried_out() {
    let mut cluster = Cluster::started(3, Options::default()).await;
    let old = cluster.leader().await;
    cluster.stop(old).await;
    let asked = cluster.ids()[0];
    eventually(PATIENCE, "there is a new leader", async || {
        let leader = cluster.status(asked).leader;
        leader != 0 && leader != old
    })
    .await;
    cluster.client(asked).remove(old).await.expect(204);
    for id in cluster.ids() {
        cluster.has_members(id, &cluster.ids()).await;
    }
    cluster.stop_all().await;
}

async fn remove_the_leader(through_itself: bool) {
    let mut cluster = Cluster::started(3, Options::default()).await;
    cluster.write(1, "/k", "v").await;
    let old = cluster.leader().await;
    let asked = if through_itself { old } else { cluster.follower().await };
    cluster.client(asked).remove(old).await.expect(204);
    assert!(matches!(cluster.end(old).await, Error::Removed));
    let remaining = cluster.ids();
    let new = cluster.leader().await;
    assert_ne!(new, old);
    for id in &remaining {
        cluster.has_members(*id, &remaining).await;
    }
    cluster.write(new, "/k", "v2").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_can_be_removed_through_itself() {
    remove_the_leader(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_can_be_removed_through_a_follower() {
    remove_the_leader(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_voter_cannot_be_removed() {
    let mut cluster = Cluster::started(1, Options::default()).await;
    cluster.client(1).remove(1).await.expect(409);
    cluster.write(1, "/k", "v").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_members_can_become_one() {
    let mut cluster = Cluster::started(2, Options::default()).await;
    let follower = cluster.follower().await;
    let leader = cluster.leader().await;
    cluster.client(follower).remove(leader).await.expect(204);
    assert!(matches!(cluster.end(leader).await, Error::Removed));
    cluster.write(follower, "/k", "v").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_would_lose_the_majority_names_the_dead_member() {
    let mut cluster = Cluster::started(3, Options::default()).await;
    let leader = cluster.leader().await;
    let dead = cluster.follower().await;
    let living = (1..=3).find(|id| *id != leader && *id != dead).unwrap();
    cluster.stop(dead).await;
    // The dead member was heard within the last election timeout. Only time changes that; a removal
    // before would remove the living member.
    sleep(2 * ELECTION_TIMEOUT).await;
    let answer = cluster.client(leader).remove(living).await.expect(409);
    let remedy = format!("remove member {dead} first");
    assert!(answer.text().contains(&remedy), "{}", answer.text());
    cluster.client(living).remove(dead).await.expect(204);
    cluster.client(leader).remove(living).await.expect(204);
    assert!(matches!(cluster.end(living).await, Error::Removed));
    cluster.write(leader, "/k", "v").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_a_change_is_refused_and_the_cluster_lives() {
    let mut cluster = Cluster::started(3, Options::default()).await;
    let follower = cluster.follower().await;
    let leader = cluster.leader().await;
    let url = cluster.url(2);
    for id in [leader, follower] {
        let client = cluster.client(id);
        for body in [
            "",
            "127.0.0.1:9",
            "http://127.0.0.1",
            "http://127.0.0.1:9/path",
            "http://127.0.0.1:9/",
            "http://a b:9",
            "http://:9",
            "http://127.0.0.1:0",
            "http://127.0.0.1:99999",
        ] {
            let answer = client.add(4, body).await;
            assert_eq!(answer.status, 400, "{body:?}: {}", answer.text());
        }
        client.post("/4", vec![0xff, 0xfe]).await.expect(400);
        client.post("/four", NOBODY).await.expect(400);
        client.add(0, NOBODY).await.expect(400);
        client.add(2, NOBODY).await.expect(409);
        client.add(4, &url).await.expect(409);
        client.add(4, "https://127.0.0.1:9").await.expect(409);
        client.remove(77).await.expect(204);
        client.remove(0).await.expect(204);
    }
    for id in 1..=3 {
        cluster.has_members(id, &[1, 2, 3]).await;
    }
    // All of this is in the log: the same members start again from it.
    cluster.stop_all().await;
    cluster.start_all().await;
    cluster.leader().await;
    cluster.write(1, "/k", "v").await;
    cluster.stop_all().await;
}

/// An id is used once, and its old directory records that.
#[tokio::test(flavor = "multi_thread")]
async fn a_removed_id_is_gone_for_good() {
    let mut cluster = Cluster::started(3, Options::default()).await;
    let removed = cluster.follower().await;
    let living: Vec<NodeId> = (1..=3).filter(|id| *id != removed).collect();
    cluster.client(removed).remove(removed).await.expect(204);
    assert!(matches!(cluster.end(removed).await, Error::Removed));
    for id in &living {
        cluster.has_members(*id, &living).await;
        let url = cluster.url(removed);
        cluster.client(*id).add(removed, &url).await.expect(410);
        cluster.client(*id).remove(removed).await.expect(204);
    }
    cluster.start(removed).await;
    assert!(matches!(cluster.end(removed).await, Error::Removed));
    // It does not come back without its directory either.
    cluster.wipe(removed);
    cluster.start(removed).await;
    let end = cluster.end(removed).await;
    let Error::Refused(why) = &end else { panic!("not refused, but: {end}") };
    assert!(why.contains("removed") && why.contains("new"), "{why}");
    cluster.write(living[0], "/k", "v").await;
    cluster.stop_all().await;
}

/// It was down during its removal: the others tell it.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_missed_its_removal_is_told_when_it_comes_back() {
    let mut cluster = Cluster::started(3, Options::default()).await;
    let removed = cluster.follower().await;
    cluster.caught_up(&[1, 2, 3]).await;
    cluster.stop(removed).await;
    let leader = cluster.leader().await;
    cluster.client(leader).remove(removed).await.expect(204);
    let term = cluster.status(leader).term;
    cluster.start(removed).await;
    assert!(matches!(cluster.end(removed).await, Error::Removed));
    assert_eq!(cluster.status(leader).term, term, "it disturbed the others");
    cluster.write(leader, "/k", "v").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wiped_joiner_is_welcome_under_a_new_id_only() {
    let mut cluster = Cluster::started(3, Options::default()).await;
    cluster.write(1, "/k", "v").await;
    cluster.join(4, 1).await;
    cluster.holds(4, "/k", "v").await;
    cluster.stop(4).await;
    cluster.wipe(4);
    cluster.start(4).await;
    let end = cluster.end(4).await;
    let Error::Refused(why) = &end else { panic!("not refused, but: {end}") };
    assert!(why.contains("DELETE /4"), "{why}");
    cluster.client(1).remove(4).await.expect(204);
    cluster.join(5, 2).await;
    cluster.holds(5, "/k", "v").await;
    cluster.stop_all().await;
}

/// A joiner may start before it is added: it waits and logs the reason.
#[tokio::test(flavor = "multi_thread")]
async fn a_joiner_waits_until_it_is_added() {
    let mut cluster = Cluster::started(1, Options::default()).await;
    cluster.write(1, "/k", "v").await;
    cluster.joiner(2);
    cluster.start(2).await;
    cluster.until_logged(2, "POST /2").await;
    assert!(!cluster.status(2).begun);
    let url = cluster.url(2);
    within("member 2 is added", cluster.client(1).add(2, &url)).await.expect(204);
    cluster.holds(2, "/k", "v").await;
    cluster.stop_all().await;
}

/// A greeting binds no incarnation; only a member's directory does.
#[tokio::test(flavor = "multi_thread")]
async fn a_joiner_wiped_before_it_was_added_is_welcome() {
    let mut cluster = Cluster::started(1, Options::default()).await;
    cluster.joiner(2);
    cluster.start(2).await;
    cluster.until_logged(2, "does not count 2 as a member").await;
    cluster.stop(2).await;
    cluster.wipe(2);
    cluster.start(2).await;
    let url = cluster.url(2);
    within("member 2 is added", cluster.client(1).add(2, &url)).await.expect(204);
    cluster.write(1, "/k", "v").await;
    cluster.holds(2, "/k", "v").await;
    cluster.stop_all().await;
}
