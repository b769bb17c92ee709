//! Learners, members that move, and transfers of leadership.

use raftexample::channels::{MemberRequest, NodeId};
use raftexample::error::RequestError;
use raftexample::raft_node::Role;

use crate::harness::{Cluster, ELECTION_TIMEOUT, Options, PATIENCE, eventually};

/// URLs where no process listens.
const NOBODY: [&str; 3] = ["http://127.0.0.1:9", "http://127.0.0.1:10", "http://127.0.0.1:11"];

/// As voters they would raise the majority beyond the members that run.
#[tokio::test(flavor = "multi_thread")]
async fn members_that_are_added_and_not_started_cost_no_majority() {
    for n in [1, 3] {
        let mut cluster = Cluster::started(n, Options::default()).await;
        for (id, url) in (n + 1..).zip(NOBODY) {
            cluster.client(1).add(id, url).await.expect(204);
            cluster.write(1, "/k", &format!("{id}")).await;
        }
        cluster.has_learners(&[n + 1, n + 2, n + 3]).await;
        // With one of three stopped, the voters still have a majority and elect a leader.
        if n == 3 {
            let leader = cluster.leader().await;
            cluster.stop(leader).await;
        }
        let left = cluster.ids();
        cluster.leader_of(&left).await;
        cluster.write(left[0], "/k", "v").await;
        // They are not needed for their own removal either.
        for id in n + 1..=n + 3 {
            cluster.client(left[0]).remove(id).await.expect(204);
        }
        cluster.stop_all().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_gets_its_vote_once_it_follows() {
    let mut cluster = Cluster::started(1, Options::default()).await;
    cluster.joiner(2);
    let url = cluster.url(2);
    cluster.client(1).add(2, &url).await.expect(204);
    cluster.has_learners(&[2]).await;
    cluster.start(2).await;
    cluster.has_learners(&[]).await;
    assert!(cluster.has_logged(1, "switched to configuration voters=(1) learners=(2)"));
    cluster.until_logged(2, "switched to configuration voters=(1 2)").await;
    // It has a vote: with one other member stopped, it is needed for a majority and may lead.
    cluster.change(2, MemberRequest::Lead { to: Some(2) }).await.expect("it can lead");
    let leads = async || cluster.status(2).role == Role::Leader;
    eventually(PATIENCE, "it leads", leads).await;
    cluster.write(1, "/k", "v").await;
    cluster.stop_all().await;
}

/// The leader that would have promoted it is gone before it starts.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_leader_promotes_what_the_one_before_added() {
    let mut cluster = Cluster::started(3, Options::default()).await;
    let leader = cluster.leader().await;
    cluster.joiner(4);
    let url = cluster.url(4);
    cluster.client(leader).add(4, &url).await.expect(204);
    cluster.stop(leader).await;
    cluster.start(4).await;
    cluster.has_learners(&[]).await;
    let left = cluster.ids();
    cluster.write(left[0], "/k", "v").await;
    cluster.stop_all().await;
}

/// A client's change does not collide with the leader's own promotion.
#[tokio::test(flavor = "multi_thread")]
async fn a_users_change_is_never_refused_for_a_promotion() {
    let mut cluster = Cluster::started(1, Options::default()).await;
    for id in 2..=5 {
        cluster.join(id, 1).await;
    }
    cluster.has_learners(&[]).await;
    cluster.has_members(1, &[1, 2, 3, 4, 5]).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leadership_is_transferred_only_to_a_living_voter() {
    let mut cluster = Cluster::started(3, Options::default()).await;
    let leader = cluster.leader().await;
    let [follower, other] =
        [1, 2, 3].into_iter().filter(|id| *id != leader).collect::<Vec<_>>()[..]
    else {
        unreachable!()
    };
    // The request may go to any member.
    cluster.change(other, MemberRequest::Lead { to: Some(follower) }).await.expect("it can lead");
    eventually(PATIENCE, "all follow it", async || {
        (1..=3).all(|id| cluster.status(id).leader == follower)
    })
    .await;
    cluster
        .change(other, MemberRequest::Lead { to: Some(follower) })
        .await
        .expect("it leads already");
    cluster.change(follower, MemberRequest::Lead { to: None }).await.expect("another can lead");
    assert_ne!(cluster.leader().await, follower);

    let leader = cluster.leader().await;
    cluster.client(1).add(4, NOBODY[0]).await.expect(204);
    for id in [4, 77] {
        let answer = cluster.change(leader, MemberRequest::Lead { to: Some(id) }).await;
        assert!(matches!(answer, Err(RequestError::Conflict(_))), "{id}: {answer:?}");
    }
    let dead = (1..=3).find(|id| *id != leader).unwrap();
    cluster.stop(dead).await;
    // The leader heard from it recently; only time changes that.
    tokio::time::sleep(2 * ELECTION_TIMEOUT).await;
    let answer = cluster.change(leader, MemberRequest::Lead { to: Some(dead) }).await;
    assert!(matches!(answer, Err(RequestError::Conflict(_))), "{answer:?}");
    cluster.write(leader, "/k", "v").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moved_member_is_found_and_a_copy_at_its_old_url_refused() {
    let mut cluster = Cluster::started(3, Options::default()).await;
    let moving = cluster.follower().await;
    let others: Vec<NodeId> = (1..=3).filter(|id| *id != moving).collect();
    cluster.stop(moving).await;
    let url = cluster.reserve(moving);
    cluster.relocate(moving);
    let change = MemberRequest::Move { id: moving, url: url.clone() };
    cluster.change(others[0], change.clone()).await.expect("it moves");
    cluster.change(others[0], change).await.expect("it is there already");
    cluster.start(moving).await;
    cluster.write(others[0], "/k", "v").await;
    cluster.holds(moving, "/k", "v").await;
    eventually(PATIENCE, "all know where it is", async || {
        (1..=3).all(|id| cluster.status(id).members.urls[&moving] == url)
    })
    .await;
    // It can lead, and the others still know its URL after a restart.
    cluster.change(moving, MemberRequest::Lead { to: Some(moving) }).await.expect("it can lead");
    for id in &others {
        cluster.restart(*id).await;
    }
    cluster.write(others[0], "/k", "v2").await;
    cluster.holds(moving, "/k", "v2").await;
    // A copy started at the old URL or elsewhere is told where the member belongs.
    cluster.stop(moving).await;
    cluster.reserve(moving);
    cluster.relocate(moving);
    cluster.start(moving).await;
    cluster.until_logged(moving, &format!("member {moving} listens at {url}")).await;
    cluster.stop_all().await;
}
