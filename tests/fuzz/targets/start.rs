//! Messages before a member's bootstrap.

use raftexample::channels::{
    Greeting, GreetingAnswer, Matched, PeerHeader, PeerReport, Refusal, Vouched,
};
use raftexample::codec;
use raftexample::error::Error;
use raftexample::raft_node::{Input, NodeConfig};
use raftexample::transport::{Inbound, InboundBody};
use tokio::sync::oneshot;

use super::Choices;
use crate::support::memory::forging::Role;
use crate::support::memory::*;

fn header(choices: &mut Choices<'_>, member: &Member) -> PeerHeader {
    let own = member.header(member.id);
    let from = choices.pick(&[1, 2, 3, 4, 9]);
    PeerHeader {
        cluster_id: choices.pick(&[own.cluster_id, own.cluster_id, 0, 5]),
        from: if choices.one_in(9) { choices.number(from) } else { from },
        incarnation: choices.pick(&[100 + from, 100 + from, 5]),
        url: choices.pick(&[url(from), url(from), url(7), String::new()]),
        moved: choices.pick(&[0, 0, 0, 3, u64::MAX]),
        to: choices.pick(&[member.id, 0, 5]),
        to_incarnation: choices.pick(&[member.config.incarnation, 0, 5]),
    }
}

/// The greeting or answer in `encoded`, damaged.
fn decoded<T: serde::de::DeserializeOwned + serde::Serialize>(
    choices: &mut Choices<'_>,
    sound: &T,
) -> Option<T> {
    let mut encoded = codec::encode(sound);
    choices.damage(&mut encoded);
    let decoded = codec::decode::<T>(&encoded).ok()?;
    assert!(codec::encode(&decoded) == encoded, "one thing is encoded in one way");
    Some(decoded)
}

/// Arbitrary greetings, answers and refusals from any sender: a member bootstraps, waits, or ends
/// with a reason, and what it recorded does not prevent its next start.
pub fn greetings(data: &[u8]) {
    thread_local! {
        static IMAGE: MemVfs = Role::Leader.image();
    }
    let mut choices = Choices(data);
    let (config, disk) = match choices.below(4) {
        0 => (config(2, 3), IMAGE.with(MemVfs::image)),
        1 => (NodeConfig { join: true, ..config(4, 4) }, MemVfs::default()),
        2 => (config(1, 1), MemVfs::default()),
        _ => (config(2, 3), MemVfs::default()),
    };
    let mut member = Member::start(&config, &disk, &Transcript::default()).unwrap();
    let urls: Vec<String> = (1..=4).map(url).collect();
    while !choices.is_empty() {
        let header = header(&mut choices, &member);
        let from_url = choices.pick(&urls);
        let input = match choices.below(8) {
            0 | 1 => {
                let count = choices.below(5).min(urls.len());
                let begun = choices.one_in(2);
                let sound = Greeting { first_urls: urls[..count].to_vec(), begun };
                let Some(greeting) = decoded(&mut choices, &sound) else { continue };
                let (answer, _) = oneshot::channel();
                Input::Inbound(Inbound::new(header, InboundBody::Greeting(greeting, answer)))
            }
            2..5 => {
                let (begun, counts_as_member) = (choices.one_in(2), choices.one_in(2));
                let (term, index) = (choices.number(2), choices.number(9));
                let acknowledged = choices.one_in(2).then_some(Matched { term, index });
                let leader =
                    choices.one_in(2).then(|| Vouched { id: 2, url: url(2), incarnation: 102 });
                let sound = GreetingAnswer { begun, counts_as_member, acknowledged, leader };
                let Some(answer) = decoded(&mut choices, &sound) else { continue };
                Input::Report(PeerReport::Greeted { url: from_url, header, answer })
            }
            5 => {
                let why = String::from_utf8_lossy(choices.bytes()).into_owned();
                let refusal = match choices.below(4) {
                    0 => Refusal::Mismatch(why),
                    1 => Refusal::OtherIncarnation(why),
                    2 => {
                        Refusal::Removed { id: choices.number(config.id), index: choices.number(9) }
                    }
                    _ => Refusal::NotReady(why),
                };
                Input::Report(PeerReport::Refused { header, refusal })
            }
            6 => Input::Report(PeerReport::NotGreeted { url: from_url, why: "why not".into() }),
            _ => Input::Tick,
        };
        match member.turn([input]) {
            Ok(()) => {}
            Err(Error::Refused(why)) => {
                assert!(!why.is_empty());
                break;
            }
            Err(Error::Removed) => break,
            Err(error) => panic!("{error}"),
        }
    }
    let disk = member.crash(Survives::Nothing);
    Member::start(&config, &disk, &Transcript::default()).unwrap();
}
