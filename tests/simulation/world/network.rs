//! What lies between the members: the transport's promises, kept by a network that keeps nothing.
//!
//! A batch leaves at most once, and its sender hears of it when it is refused, lost or unanswered;
//! whatever the network does to it on the way, the receiver's admission and filter have to deal with.

use raft::eraftpb::{Message, MessageType};
use raftexample::channels::{
    Greeting, MemberRequest, NodeId, PeerHeader, PeerReport, Refusal, Responder, SnapshotFile,
    responder,
};
use raftexample::error::RequestError;
use raftexample::raft_node::Input;
use raftexample::storage::snapshotter::Received;
use raftexample::transport::{Inbound, InboundBody};
use tokio::sync::oneshot;

use super::*;

impl World {
    pub(super) fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.cut.contains(&(from, to))
    }

    /// The time from one member to another.
    pub(super) fn delay(&mut self, from: NodeId, to: NodeId) -> u64 {
        let delay = 1 + self.random.below(self.settings.delay);
        if !self.settings.keeps_order {
            return delay;
        }
        let arrival = self.last_arrival.entry((from, to)).or_default();
        *arrival = (self.now + delay).max(*arrival + 1);
        *arrival - self.now
    }

    /// Half an election timeout: how long a sender's transport waits for an answer.
    pub(super) fn patience(&self) -> u64 {
        self.settings.election_ticks as u64 * TICK / 2
    }

    pub(super) fn report(&mut self, (id, run): Run, after: u64, report: PeerReport) {
        self.schedule(after, Event::Arrival(id, Packet::Report { run, report }));
    }

    /// Sends a node's outputs over the network.
    pub(super) fn dispatch(&mut self, id: NodeId) {
        let slot = self.slot(id);
        let Some(process) = &slot.process else { return };
        let queue = process.take_sent();
        let from = (id, slot.run);
        let mut batches: BTreeMap<NodeId, Vec<Vec<Message>>> = BTreeMap::new();
        for outgoing in queue {
            match outgoing {
                Outgoing::Message(message) => {
                    let is_split = self.chance(100);
                    let batches = batches.entry(message.to).or_default();
                    match batches.last_mut() {
                        Some(batch) if !is_split => batch.push(message),
                        _ => batches.push(vec![message]),
                    }
                }
                Outgoing::Snapshot(message, file) => self.send_snapshot(from, message, file),
                Outgoing::Greeting(url, greeting) => self.send_greeting(from, url, greeting),
                Outgoing::Change(to, change, responder) => {
                    self.send_change(from, to, change, responder)
                }
            }
        }
        for (to, batches) in batches {
            for messages in batches {
                self.send_batch(from, to, messages);
            }
        }
    }

    pub(super) fn knows(&self, from: NodeId, to: NodeId) -> bool {
        let process = self.slots[&from].process.as_ref();
        process.is_some_and(|process| process.sent.lock().unwrap().peers.contains_key(&to))
    }

    /// Returns proposals that certainly did not leave.
    pub(super) fn not_proposed(&mut self, from: Run, to: NodeId, messages: Vec<Message>) {
        for message in messages {
            if message.get_msg_type() == MessageType::MsgPropose {
                let entries = message.entries.into_iter();
                let requests = entries.map(|entry| (entry.context, entry.data)).collect();
                self.report(from, 1, PeerReport::NotProposed { to, requests });
            }
        }
    }

    pub(super) fn send_batch(&mut self, from: Run, to: NodeId, messages: Vec<Message>) {
        if !self.knows(from.0, to) {
            return self.not_proposed(from, to, messages);
        }
        let listener = self.listener(from.0, to);
        let is_cut = listener.is_some_and(|listener| self.is_cut(from.0, listener));
        let Some(listener) = listener.filter(|_| !is_cut || self.chance(700)) else {
            // The connection is refused.
            self.not_proposed(from, to, messages);
            let after = 1 + self.random.below(TICK);
            return self.report(from, after, PeerReport::Unreachable(to));
        };
        if is_cut || self.chance(self.settings.lost) {
            let patience = self.patience();
            return self.report(from, patience, PeerReport::Unreachable(to));
        }
        let numbers_at_arrival = self.settings.numbers_at_arrival;
        let process = self.slot(from.0).process.as_mut().expect("it runs");
        let number = (!numbers_at_arrival).then(|| process.next_number());
        let (header, boot) = (process.header(to), process.boot);
        let batch = Batch { from, header, boot, number, messages };
        if self.chance(self.settings.misdirected) {
            // Another member took over its address.
            let ids: Vec<NodeId> = self.slots.keys().copied().collect();
            let elsewhere = self.pick(&ids).filter(|id| *id != listener).unwrap_or(from.0);
            let delay = self.delay(from.0, elsewhere);
            self.schedule(delay, Event::Arrival(elsewhere, Packet::Batch(batch.clone())));
        }
        let delay = self.delay(from.0, listener);
        self.schedule(delay, Event::Arrival(listener, Packet::Batch(batch)));
    }

    /// The listener at the URL where `from` expects member `to`: `to` if it runs, or another
    /// member.
    pub(super) fn listener(&self, from: NodeId, to: NodeId) -> Option<NodeId> {
        let sent = self.slots[&from].process.as_ref()?.sent.lock().unwrap();
        self.listens_at(&sent.peers.get(&to)?.0)
    }

    pub(super) fn listens_at(&self, url: &str) -> Option<NodeId> {
        let running = self.slots.values().filter(|slot| slot.process.is_some());
        let listener = running.into_iter().find(|slot| slot.config.url == url);
        listener.map(|slot| slot.key)
    }

    /// What a receiver's admission is shown: the header, or what a mutant makes of it.
    pub(super) fn shown(&self, to: NodeId, mut header: PeerHeader) -> PeerHeader {
        let slot = self.slots.get(&to);
        let Some(process) = slot.and_then(|slot| slot.process.as_ref()) else { return header };
        if matches!(self.seam, Some(Seam::AdmissionOff | Seam::IncarnationsIgnored)) {
            let bound = process.admission.bound_incarnation(header.from);
            if bound != 0 {
                header.incarnation = bound;
            }
            header.to_incarnation = 0;
        }
        if self.seam == Some(Seam::AdmissionOff) {
            header.cluster_id = process.admission.cluster_id();
            header.to = to;
        }
        header
    }

    pub(super) fn arrive(&mut self, to: NodeId, packet: Packet) {
        match packet {
            Packet::Report { run, report } => {
                self.note(|| format!("report to {to}, run {run}: {report:?}"));
                if self.runs((to, run)) {
                    if let PeerReport::SnapshotStatus { to: receiver, .. } = &report {
                        let receiver = *receiver;
                        self.slot(to).sending_to.remove(&receiver);
                    }
                    self.give(to, Input::Report(report));
                }
            }
            Packet::ChangeAnswer { responder, answer } => responder.answer(answer),
            Packet::Batch(batch) => self.arrive_batch(to, batch),
            Packet::Snapshot(transfer) => self.receive_snapshot(to, transfer),
            Packet::Greeting { from, header, url, greeting } => {
                let (answer_tx, answer) = oneshot::channel();
                if !self.is_reachable(from.0, to) {
                    let why = "unreachable".into();
                    return self.report(from, 1, PeerReport::NotGreeted { url, why });
                }
                let header = self.shown(to, header);
                let body = InboundBody::Greeting(greeting, answer_tx);
                self.slot(to).asked.push(Asked::Greeting { from, url, answer });
                self.give(to, Input::Inbound(Inbound::new(header, body)));
            }
            Packet::Change { from, header, change, responder: asker } => {
                if !self.is_reachable(from.0, to) {
                    return asker.answer(Err(RequestError::Unknown("lost".into())));
                }
                let header = self.shown(to, header);
                let (responder, pending) = responder();
                let body = InboundBody::ConfChange(change, responder);
                self.slot(to).asked.push(Asked::Change { from, responder: asker, pending });
                self.give(to, Input::Inbound(Inbound::new(header, body)));
            }
        }
    }

    pub(super) fn is_reachable(&self, from: NodeId, to: NodeId) -> bool {
        let is_there = self.slots.get(&to).is_some_and(|slot| slot.process.is_some());
        is_there && !self.is_cut(from, to)
    }

    pub(super) fn arrive_batch(&mut self, to: NodeId, mut batch: Batch) {
        let from = batch.from;
        if !self.is_reachable(from.0, to) {
            let patience = self.patience();
            return self.report(from, patience, PeerReport::Unreachable(batch.header.to));
        }
        if batch.number.is_none() {
            // It leaves only now, so its sender must still run.
            if !self.runs(from) {
                return;
            }
            let process = self.slot(from.0).process.as_mut().expect("it runs");
            batch.number = Some(process.next_number());
        }
        if self.chance(self.settings.duplicated) {
            let again = Packet::Batch(batch.clone());
            let after = 1 + self.random.below(20 * TICK);
            self.schedule(after, Event::Arrival(to, again));
        }
        if self.ghosts.len() < GHOSTS_MAX {
            self.ghosts.push((to, batch.clone()));
        } else {
            let place = self.random.below(GHOSTS_MAX as u64) as usize;
            self.ghosts[place] = (to, batch.clone());
        }
        self.note(|| {
            let kinds: Vec<_> = batch.messages.iter().map(Message::get_msg_type).collect();
            format!("batch {:?} of {from:?} reaches {to}: {kinds:?}", batch.number)
        });
        let Batch { header, boot, number, messages, .. } = batch;
        let mut number = number.expect("it was just numbered");
        if self.seam == Some(Seam::BatchFilterOff) {
            self.sequence += 1;
            number = self.sequence;
        }
        let meant_for = header.to;
        let header = self.shown(to, header);
        let (answer_tx, answer) = oneshot::channel();
        let body = InboundBody::Messages { boot, number, messages, answer: Some(answer_tx) };
        self.slot(to).asked.push(Asked::Batch { from, to: meant_for, answer });
        self.give(to, Input::Inbound(Inbound::new(header, body)));
    }

    pub(super) fn send_snapshot(&mut self, from: Run, message: Message, file: SnapshotFile) {
        let to = message.to;
        let metadata = message.get_snapshot().get_metadata();
        let (index, term) = (metadata.index, metadata.term);
        let is_new = self.knows(from.0, to) && self.slot(from.0).sending_to.insert(to);
        let process = self.slot(from.0).process.as_mut().expect("it runs");
        let number = process.next_number();
        let (header, boot) = (process.header(to), process.boot);
        let opened = process.snapshotter.open_raw(index, term);
        let mut bytes = Vec::new();
        let is_read = opened.is_ok_and(|(_, mut file)| file.read_to_end(&mut bytes).is_ok());
        let damaged = !is_read || crc32c::crc32c(&bytes) != file.checksum;
        let listener = self.listener(from.0, to).filter(|_| is_new && !damaged);
        let Some(listener) = listener.filter(|_| !self.chance(self.settings.lost)) else {
            let patience = self.patience();
            let arrived = false;
            let report = PeerReport::SnapshotStatus { to, index, arrived, damaged };
            return self.report(from, patience, report);
        };
        let transfer = SnapshotTransfer { from, header, boot, number, message, file, bytes };
        let delay = self.delay(from.0, listener);
        self.schedule(delay, Event::Arrival(listener, Packet::Snapshot(Box::new(transfer))));
    }

    pub(super) fn snapshot_failed(&mut self, transfer: &SnapshotTransfer) {
        let (to, index) = transfer.names();
        let report = PeerReport::SnapshotStatus { to, index, arrived: false, damaged: false };
        let patience = self.patience();
        self.report(transfer.from, patience, report);
    }

    pub(super) fn receive_snapshot(&mut self, to: NodeId, mut transfer: Box<SnapshotTransfer>) {
        let from = transfer.from;
        if !self.is_reachable(from.0, to) {
            return self.snapshot_failed(&transfer);
        }
        transfer.header = self.shown(to, transfer.header.clone());
        let process = self.slot(to).process.as_ref().expect("it runs");
        let verdict = process.admission.admit(&transfer.header);
        if let Err(refusal) = verdict {
            let header = process.header(id_of(from.0));
            let delay = self.delay(to, from.0);
            self.report(from, delay, PeerReport::Refused { header, refusal });
            return self.snapshot_failed(&transfer);
        }
        let metadata = transfer.message.get_snapshot().get_metadata();
        let (index, term) = (metadata.index, metadata.term);
        let half = transfer.bytes.len() / 2;
        let receive = || {
            let mut receiver = process.snapshotter.receive(index, term, transfer.file)?;
            receiver.write(&transfer.bytes[..half])?;
            Ok(receiver)
        };
        match receive() {
            Ok(receiver) => {
                self.sequence += 1;
                let number = self.sequence;
                let slot = self.slot(to);
                let run = slot.run;
                slot.receiving.insert(number, (transfer, receiver));
                let after = 1 + self.random.below(3 * TICK);
                self.schedule(after, Event::SnapshotRest((to, run), number));
            }
            Err(error) => {
                self.snapshot_failed(&transfer);
                self.give(to, Input::Report(PeerReport::DiskFailed(error)));
            }
        }
    }

    pub(super) fn receive_rest(&mut self, (to, run): Run, number: u64) {
        if !self.runs((to, run)) {
            return;
        }
        let Some((transfer, mut receiver)) = self.slot(to).receiving.remove(&number) else {
            return;
        };
        let half = transfer.bytes.len() / 2;
        let is_broken_off = !self.runs(transfer.from) || self.is_cut(transfer.from.0, to);
        if is_broken_off {
            return self.snapshot_failed(&transfer);
        }
        let finished = receiver.write(&transfer.bytes[half..]).and_then(|()| receiver.finish());
        match finished {
            Ok(Received::Kept) => {
                let (meant_for, index) = transfer.names();
                let SnapshotTransfer { from, header, boot, number, message, .. } = *transfer;
                let (answer_tx, answer) = oneshot::channel();
                let body = InboundBody::Snapshot { boot, number, message, answer: answer_tx };
                self.slot(to).asked.push(Asked::Snapshot { from, to: meant_for, index, answer });
                self.give(to, Input::Inbound(Inbound::new(header, body)));
            }
            Ok(Received::Refused(why)) => panic!("the file arrived damaged: {why}"),
            Err(error) => {
                self.snapshot_failed(&transfer);
                self.give(to, Input::Report(PeerReport::DiskFailed(error)));
            }
        }
    }

    pub(super) fn send_greeting(&mut self, from: Run, to_url: String, greeting: Greeting) {
        let header = self.slot(from.0).process.as_ref().expect("it runs").header(0);
        let Some(to) = self.listens_at(&to_url).filter(|to| !self.is_cut(from.0, *to)) else {
            let why = "unreachable".into();
            return self.report(from, 1, PeerReport::NotGreeted { url: to_url, why });
        };
        let delay = self.delay(from.0, to);
        let packet = Packet::Greeting { from, header, url: to_url, greeting };
        self.schedule(delay, Event::Arrival(to, packet));
    }

    pub(super) fn send_change(
        &mut self,
        from: Run,
        to: NodeId,
        change: MemberRequest,
        responder: Responder<()>,
    ) {
        if !responder.mark_proposed() {
            return;
        }
        if !self.knows(from.0, to) {
            return responder.answer(Err(RequestError::Unavailable("its URL is not known".into())));
        }
        let header = self.slot(from.0).process.as_ref().expect("it runs").header(to);
        let delay = self.delay(from.0, to);
        let packet = Packet::Change { from, header, change, responder };
        self.schedule(delay, Event::Arrival(to, packet));
    }

    /// Sends back the answers that a member's node has given.
    pub(super) fn take_answers(&mut self, id: NodeId) {
        let asked = std::mem::take(&mut self.slot(id).asked);
        for asked in asked {
            if let Some(asked) = self.take_answer(id, asked) {
                self.slot(id).asked.push(asked);
            }
        }
    }

    pub(super) fn refuse(&mut self, id: NodeId, from: Run, refusal: Refusal) {
        let header = self.slot(id).process.as_ref().expect("it runs").header(id_of(from.0));
        let header = self.shown(from.0, header);
        let delay = self.delay(id, from.0);
        self.report(from, delay, PeerReport::Refused { header, refusal });
    }

    pub(super) fn take_answer(&mut self, id: NodeId, asked: Asked) -> Option<Asked> {
        match asked {
            Asked::Batch { from, to, mut answer } => match answer.try_recv() {
                Err(oneshot::error::TryRecvError::Empty) => {
                    return Some(Asked::Batch { from, to, answer });
                }
                Ok(Ok(())) if !self.is_answer_lost(id, from.0) => {}
                Ok(Err(refusal)) if !self.is_answer_lost(id, from.0) => {
                    self.refuse(id, from, refusal);
                    let patience = self.patience();
                    self.report(from, patience, PeerReport::Unreachable(to));
                }
                _ => {
                    let patience = self.patience();
                    self.report(from, patience, PeerReport::Unreachable(to));
                }
            },
            Asked::Snapshot { from, to, index, mut answer } => {
                let answered = answer.try_recv();
                if matches!(answered, Err(oneshot::error::TryRecvError::Empty)) {
                    return Some(Asked::Snapshot { from, to, index, answer });
                }
                let arrived = matches!(answered, Ok(Ok(()))) && !self.is_answer_lost(id, from.0);
                let delay = self.delay(id, from.0);
                let report = PeerReport::SnapshotStatus { to, index, arrived, damaged: false };
                self.report(from, delay, report);
            }
            Asked::Greeting { from, url, mut answer } => match answer.try_recv() {
                Err(oneshot::error::TryRecvError::Empty) => {
                    return Some(Asked::Greeting { from, url, answer });
                }
                Ok(Ok(answer)) if !self.is_answer_lost(id, from.0) => {
                    let process = self.slot(id).process.as_ref().expect("it runs");
                    let header = process.header(id_of(from.0));
                    let header = self.shown(from.0, header);
                    let delay = self.delay(id, from.0);
                    self.report(from, delay, PeerReport::Greeted { url, header, answer });
                }
                Ok(Err(refusal))
                    if !matches!(refusal, Refusal::Mismatch(_))
                        && !self.is_answer_lost(id, from.0) =>
                {
                    self.refuse(id, from, refusal);
                }
                _ => {
                    let why = "no answer".into();
                    self.report(from, 1, PeerReport::NotGreeted { url, why });
                }
            },
            Asked::Change { from, responder, mut pending } => match pending.try_take() {
                None => return Some(Asked::Change { from, responder, pending }),
                Some(answer) => {
                    let is_lost = self.is_answer_lost(id, from.0);
                    let answer =
                        if is_lost { Err(RequestError::Unknown("lost".into())) } else { answer };
                    let delay = self.delay(id, from.0);
                    let packet = Packet::ChangeAnswer { responder, answer };
                    self.schedule(delay, Event::Arrival(from.0, packet));
                }
            },
        }
        None
    }

    pub(super) fn is_answer_lost(&mut self, from: NodeId, to: NodeId) -> bool {
        self.is_cut(from, to) || self.chance(self.settings.lost_answers)
    }

    /// The member with the request died.
    pub(super) fn connection_lost(&mut self, asked: Asked) {
        match asked {
            Asked::Batch { from, to, .. } => self.report(from, 1, PeerReport::Unreachable(to)),
            Asked::Snapshot { from, to, index, .. } => {
                let (arrived, damaged) = (false, false);
                self.report(from, 1, PeerReport::SnapshotStatus { to, index, arrived, damaged });
            }
            Asked::Greeting { from, url, .. } => {
                self.report(from, 1, PeerReport::NotGreeted { url, why: "lost".into() });
            }
            Asked::Change { responder, .. } => {
                responder.answer(Err(RequestError::Unknown("lost".into())));
            }
        }
    }
}
