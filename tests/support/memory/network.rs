//! Several members and the network between them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;

use raft::eraftpb::Message;
use raftexample::channels::{
    Acknowledged, Greeting, MemberRequest, NodeId, PeerReport, Refusal, Responder, SnapshotFile,
};
use raftexample::error::{Error, RequestError, Result};
use raftexample::raft_node::{Input, NodeConfig};
use raftexample::storage::snapshotter::Received;
use raftexample::transport::{Inbound, InboundBody};
use tokio::sync::oneshot;

use super::disk::{MemVfs, Survives};
use super::member::{Answer, Member};
use super::transcript::Transcript;
use crate::support::config::config;

/// Members that exchange messages for more rounds than this never come to rest.
const ROUNDS_MAX: usize = 10_000;

/// Several members and the network between them.
#[derive(Default)]
pub struct Network {
    pub members: BTreeMap<NodeId, Member>,
    /// Members that are cut off in both directions.
    pub cut: BTreeSet<NodeId>,
    /// Pairs of members, the lower id first, that do not reach each other.
    pub cut_links: BTreeSet<(NodeId, NodeId)>,
    pub transcript: Transcript,
    /// The error that ended each member.
    pub ended: BTreeMap<NodeId, Error>,
}

impl Network {
    /// `n` members at their first start, bootstrapped, with member 1 as leader.
    pub fn new(n: u64, change: impl Fn(&mut NodeConfig)) -> Self {
        let mut network = Self::default();
        for id in 1..=n {
            let mut config = config(id, n);
            change(&mut config);
            network.start(&config, &MemVfs::default()).unwrap();
        }
        network.tick(1);
        network.tick_until("all have begun", |network| {
            network.members.values().all(|member| member.status().begun)
        });
        network.elect(1);
        network
    }

    pub fn start(&mut self, config: &NodeConfig, disk: &MemVfs) -> Result<()> {
        let member = Member::start(config, disk, &self.transcript)?;
        self.members.insert(config.id, member);
        self.deliver();
        Ok(())
    }

    pub fn member(&mut self, id: NodeId) -> &mut Member {
        self.members.get_mut(&id).unwrap_or_else(|| panic!("member {id} runs"))
    }

    pub fn crash(&mut self, id: NodeId, survives: Survives) -> MemVfs {
        self.members.remove(&id).unwrap().crash(survives)
    }

    /// Makes these members give up their leader; their messages are dropped.
    pub fn give_up_leader(&mut self, ids: &[NodeId]) {
        for id in ids {
            for _ in 0..12 {
                self.turn(*id, [Input::Tick]);
            }
            self.member(*id).take_messages();
        }
    }

    /// Ticks member `id` alone until it leads.
    pub fn elect(&mut self, id: NodeId) {
        for _ in 0..300 {
            let leads = self.members[&id].status().leader == id;
            if leads && self.members[&id].status().commit == self.members[&id].status().applied {
                self.settle();
                return;
            }
            self.turn(id, [Input::Tick]);
            self.deliver();
        }
        panic!("member {id} does not lead: {:?}", self.members[&id].status());
    }

    /// A few heartbeats, so that every member knows the commit index.
    pub fn settle(&mut self) {
        let leaders: Vec<NodeId> = self
            .members
            .values()
            .filter(|member| member.status().leader == member.id)
            .map(|member| member.id)
            .collect();
        for _ in 0..4 {
            for id in &leaders {
                self.turn(*id, [Input::Tick]);
            }
            self.deliver();
        }
    }

    /// Ticks every member `n` times and delivers all messages after each.
    pub fn tick(&mut self, n: usize) {
        for _ in 0..n {
            for id in self.members.keys().copied().collect::<Vec<_>>() {
                self.turn(id, [Input::Tick]);
            }
            self.deliver();
        }
    }

    pub fn tick_until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        for _ in 0..500 {
            if holds(self) {
                return;
            }
            self.tick(1);
        }
        let states: Vec<_> = self.members.values().map(Member::status).collect();
        panic!("waited in vain until {what}: {states:#?}");
    }

    /// A PUT at member `id`, with everything that follows from it.
    pub fn put(&mut self, id: NodeId, key: &str, value: &str) -> Answer<Acknowledged> {
        let answer = self.member(id).put(key, value).unwrap();
        self.deliver();
        answer
    }

    /// Hands what member `from` sent to member `to`; what it sent to others is lost.
    pub fn hand_over(&mut self, from: NodeId, to: NodeId) {
        let messages = self.member(from).take_messages();
        let messages = messages.into_iter().filter(|message| message.to == to).collect();
        let inbound = self.member(from).batch(to, messages);
        self.turn(to, [Input::Inbound(inbound)]);
    }

    /// One turn of member `id`, which may end it.
    pub fn turn(&mut self, id: NodeId, inputs: impl IntoIterator<Item = Input>) {
        let Some(member) = self.members.get_mut(&id) else { return };
        if let Err(error) = member.turn(inputs) {
            self.members.remove(&id);
            self.transcript.note_end(id, &error);
            self.ended.insert(id, error);
        }
    }

    /// Delivers until no message is left.
    pub fn deliver(&mut self) {
        for _ in 0..ROUNDS_MAX {
            if !self.deliver_round() {
                return;
            }
        }
        panic!("the members never come to rest");
    }

    /// Delivers the messages sent so far, each batch in its own turn. Returns false if there were
    /// none.
    pub fn deliver_round(&mut self) -> bool {
        let mut was_any = false;
        for from in self.members.keys().copied().collect::<Vec<_>>() {
            let Some(sender) = self.members.get(&from) else { continue };
            let mut sent = sender.sent.lock().unwrap();
            let messages = std::mem::take(&mut sent.messages);
            let snapshots = std::mem::take(&mut sent.snapshots);
            let greetings = std::mem::take(&mut sent.greetings);
            let passed_on = std::mem::take(&mut sent.passed_on);
            drop(sent);
            was_any |= !messages.is_empty()
                || !snapshots.is_empty()
                || !greetings.is_empty()
                || !passed_on.is_empty();
            let mut batches: BTreeMap<NodeId, Vec<Message>> = BTreeMap::new();
            for message in messages {
                batches.entry(message.to).or_default().push(message);
            }
            for (to, messages) in batches {
                self.deliver_batch(from, to, messages);
            }
            for (message, file) in snapshots {
                self.deliver_snapshot(from, message, file);
            }
            for (url, greeting) in greetings {
                self.deliver_greeting(from, url, greeting);
            }
            for (to, change, responder) in passed_on {
                self.deliver_change(from, to, change, responder);
            }
        }
        was_any
    }

    fn connected(&self, from: NodeId, to: NodeId) -> bool {
        self.members.contains_key(&from)
            && self.members.contains_key(&to)
            && !self.cut.contains(&from)
            && !self.cut.contains(&to)
            && !self.cut_links.contains(&(from.min(to), from.max(to)))
    }

    fn report(&mut self, to: NodeId, report: PeerReport) {
        self.turn(to, [Input::Report(report)]);
    }

    fn refuse(&mut self, sender: NodeId, receiver: NodeId, refusal: Refusal) {
        let Some(receiver) = self.members.get(&receiver) else { return };
        let header = receiver.header(sender);
        self.report(sender, PeerReport::Refused { header, refusal });
    }

    fn deliver_batch(&mut self, from: NodeId, to: NodeId, messages: Vec<Message>) {
        if !self.connected(from, to) {
            return self.report(from, PeerReport::Unreachable(to));
        }
        let mut inbound = self.member(from).batch(to, messages);
        let (answer_tx, mut answer_rx) = oneshot::channel();
        let InboundBody::Messages { answer, .. } = &mut inbound.body else { unreachable!() };
        *answer = Some(answer_tx);
        self.turn(to, [Input::Inbound(inbound)]);
        if let Ok(Err(refusal)) = answer_rx.try_recv() {
            self.refuse(from, to, refusal);
        }
    }

    fn deliver_snapshot(&mut self, from: NodeId, message: Message, file: SnapshotFile) {
        let (to, index) = (message.to, message.get_snapshot().get_metadata().index);
        let connected = self.connected(from, to);
        let damaged = connected && self.is_damaged(from, &message, file);
        let arrived = connected && !damaged && self.copy_snapshot(from, message, file);
        self.report(from, PeerReport::SnapshotStatus { to, index, arrived, damaged });
    }

    /// True if the sender's own file is not what it announces, as its transport finds out.
    fn is_damaged(&mut self, from: NodeId, message: &Message, file: SnapshotFile) -> bool {
        let metadata = message.get_snapshot().get_metadata();
        let opened = self.member(from).snapshotter.open_raw(metadata.index, metadata.term);
        let mut bytes = Vec::new();
        let is_read = opened.is_ok_and(|(_, mut raw)| raw.read_to_end(&mut bytes).is_ok());
        !is_read || crc32c::crc32c(&bytes) != file.checksum
    }

    fn copy_snapshot(&mut self, from: NodeId, message: Message, file: SnapshotFile) -> bool {
        let to = message.to;
        let metadata = message.get_snapshot().get_metadata();
        let (index, term) = (metadata.index, metadata.term);
        let mut bytes = Vec::new();
        let sender = self.member(from);
        sender.snapshotter.open_raw(index, term).unwrap().1.read_to_end(&mut bytes).unwrap();
        let number = sender.snapshot_numbers.entry(to).or_default();
        *number += 1;
        let (boot, number, header) = (sender.config.boot, *number, sender.header(to));
        let snapshotter = self.member(to).snapshotter.clone();
        let receive = || {
            let mut receiver = snapshotter.receive(index, term, file)?;
            receiver.write(&bytes)?;
            receiver.finish()
        };
        match receive() {
            Ok(Received::Kept) => {}
            Ok(Received::Refused(why)) => panic!("the file arrived damaged: {why}"),
            Err(error) => {
                self.report(to, PeerReport::DiskFailed(error));
                return false;
            }
        }
        let (answer, mut answer_rx) = oneshot::channel();
        let body = InboundBody::Snapshot { boot, number, message, answer };
        self.turn(to, [Input::Inbound(Inbound::new(header, body))]);
        matches!(answer_rx.try_recv(), Ok(Ok(())))
    }

    fn deliver_greeting(&mut self, from: NodeId, url: String, greeting: Greeting) {
        let receiver = self.members.values().find(|member| member.config.url == url);
        let Some(to) = receiver.map(|member| member.id).filter(|to| self.connected(from, *to))
        else {
            return self.report(from, PeerReport::NotGreeted { url, why: "unreachable".into() });
        };
        let (answer, mut answer_rx) = oneshot::channel();
        let inbound =
            Inbound::new(self.members[&from].header(0), InboundBody::Greeting(greeting, answer));
        self.turn(to, [Input::Inbound(inbound)]);
        let Some(receiver) = self.members.get(&to) else { return };
        let header = receiver.header(from);
        match answer_rx.try_recv() {
            Ok(Ok(answer)) => self.report(from, PeerReport::Greeted { url, header, answer }),
            Ok(Err(refusal)) => self.refuse(from, to, refusal),
            Err(_) => {}
        }
    }

    fn deliver_change(
        &mut self,
        from: NodeId,
        to: NodeId,
        change: MemberRequest,
        responder: Responder<()>,
    ) {
        if !self.connected(from, to) {
            return responder.answer(Err(RequestError::Unknown("lost".into())));
        }
        let header = self.members[&from].header(to);
        let body = InboundBody::ConfChange(change, responder);
        self.turn(to, [Input::Inbound(Inbound::new(header, body))]);
    }
}
