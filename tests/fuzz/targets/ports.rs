//! Requests at the two ports, after the parsing of HTTP.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request, Response, Uri};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper_util::service::TowerToHyperService;
use protobuf::Message as _;
use raft::eraftpb::MessageType;
use raftexample::channels::{
    Ack, BacklogPermit, Commit, CommittedEntry, Greeting, MemberRequest, NodeId, Requests,
};
use raftexample::codec;
use raftexample::error::Error;
use raftexample::httpapi::{HttpKvApi, service};
use raftexample::kvstore::{Consistency, KvStore};
use raftexample::membership::{Members, Verdict};
use raftexample::ports::listener::{BodyBudget, HttpService};
use raftexample::raft_node::Input;
use raftexample::raft_node::NodeConfig;
use raftexample::transport::{Transport, TransportConfig};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;

use super::Choices;
use crate::support::logs;
use crate::support::memory::forging::{Role, forged, header_of};
use crate::support::memory::*;

thread_local! {
    static RUNTIME: Runtime = Builder::new_current_thread().enable_all().build().unwrap();
}

/// A request with what the choices make of its head; `None` if there can be none.
fn request(
    method: &[u8],
    target: &[u8],
    headers: &[(String, Vec<u8>)],
    body: Vec<u8>,
) -> Option<Request<Body>> {
    let mut request = Request::new(Body::from(body));
    *request.method_mut() = Method::from_bytes(method).ok()?;
    *request.uri_mut() = Uri::try_from(target).ok()?;
    for (name, value) in headers {
        let name: axum::http::HeaderName = name.parse().ok()?;
        request.headers_mut().append(name, value.as_slice().try_into().ok()?);
    }
    Some(request)
}

async fn call(service: &impl HttpService<Body>, request: Request<Body>) -> Response<Body> {
    service.call(request).await.expect("handlers do not fail")
}

// ---------------------------------------------------------------------------------------------
// The peer port

/// A batch of messages as it stands on the wire, or nearly.
fn batch(choices: &mut Choices<'_>, member: &Member, from: NodeId) -> Vec<u8> {
    let mut batch = Vec::new();
    for _ in 0..choices.below(4) {
        let kind = choices.pick(&[
            MessageType::MsgAppend,
            MessageType::MsgHeartbeat,
            MessageType::MsgSnapshot,
            MessageType::MsgRequestVote,
            MessageType::MsgTimeoutNow,
            MessageType::MsgAppendResponse,
        ]);
        let mut message = forged(member, kind, from);
        message.term = choices.number(message.term);
        let mut encoded = message.write_to_bytes().unwrap();
        if choices.one_in(2) {
            choices.damage(&mut encoded);
        }
        batch.extend((encoded.len() as u32).to_le_bytes());
        batch.extend(encoded);
    }
    batch
}

fn peer_request(choices: &mut Choices<'_>, member: &Member) -> Option<Request<Body>> {
    let from = choices.pick(&[1, 3, 9]);
    let header = header_of(member, from);
    let path = choices.pick(&[
        "/raft",
        "/raft/stream",
        "/raft/snapshot",
        "/raft/greeting",
        "/raft/members",
        "/",
    ]);
    let mut headers: Vec<(String, Vec<u8>)> = [
        ("raft-protocol", "2".to_owned()),
        ("raft-cluster-id", format!("{:016x}", header.cluster_id)),
        ("raft-from", from.to_string()),
        ("raft-incarnation", format!("{:016x}", header.incarnation)),
        ("raft-from-url", header.url),
        ("raft-to", member.id.to_string()),
        ("raft-to-incarnation", "0000000000000000".to_owned()),
        ("raft-boot", format!("{:016x}", 1)),
        ("raft-number", (1000 + choices.short()).to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value.into_bytes()))
    .into();
    let mut body = match path {
        "/raft/greeting" => {
            codec::encode(&Greeting { first_urls: (1..=3).map(url).collect(), begun: true })
        }
        "/raft/members" => codec::encode(&match choices.below(2) {
            0 => MemberRequest::Add { id: choices.number(4), url: url(4) },
            _ => MemberRequest::Remove { id: choices.below(4) as u64 },
        }),
        "/raft/stream" => {
            let mut frames = Vec::new();
            for number in 0..1 + choices.below(3) as u64 {
                let batch = batch(choices, member, from);
                frames.extend((2000 + number).to_le_bytes());
                frames.extend((batch.len() as u32).to_le_bytes());
                frames.extend(batch);
            }
            frames
        }
        _ => batch(choices, member, from),
    };
    if choices.one_in(3) {
        choices.damage(&mut body);
    }
    if path == "/raft/snapshot" {
        let file = choices.bytes();
        body.extend_from_slice(file);
        headers.push(("raft-snapshot-length".to_owned(), file.len().to_string().into_bytes()));
        let checksum = format!("{:08x}", crc32c::crc32c(file)).into_bytes();
        headers.push(("raft-snapshot-checksum".to_owned(), checksum));
    }
    headers.push(("content-length".to_owned(), body.len().to_string().into_bytes()));
    if choices.one_in(3) {
        // hyper keeps a body to its length, so that is the one header that is never wrong here.
        let at = choices.below(headers.len() - 1);
        match choices.below(3) {
            0 => drop(headers.remove(at)),
            1 => headers.push(headers[at].clone()),
            _ => choices.damage(&mut headers[at].1),
        }
    }
    request(b"POST", path.as_bytes(), &headers, body)
}

/// Whatever is asked at the peer port, in whoever's name: it is answered, and what was committed stays
/// committed.
pub fn peer_requests(data: &[u8]) {
    thread_local! {
        static IMAGE: MemVfs = Role::Leader.image();
    }
    let mut choices = Choices(data);
    let role = choices.pick(&[Role::Leader, Role::Follower, Role::Silent]);
    let mut member = IMAGE.with(|image| role.start(image));
    RUNTIME.with(|runtime| {
        let (inbound_tx, mut inbound_rx) = mpsc::channel(16);
        let (report_tx, mut report_rx) = mpsc::unbounded_channel();
        let transport = Transport::new(
            TransportConfig::new(Duration::from_secs(10), 77),
            member.admission.clone(),
            member.snapshotter.clone(),
            inbound_tx,
            report_tx,
            runtime.handle().clone(),
            logs::discard(),
        )
        .unwrap();
        let service = TowerToHyperService::new(transport.router());
        runtime.block_on(async {
            while !choices.is_empty() {
                // hyper limits a body to its length, so that header is always correct here.
                while let Ok(inbound) = inbound_rx.try_recv() {
                    match member.turn([Input::Inbound(inbound)]) {
                        Ok(()) | Err(Error::Removed) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                let before = member.status();
                let Some(request) = peer_request(&mut choices, &member) else { continue };
                // The answer's body, too: a stream is read as it is made.
                let mut answer = std::pin::pin!(async {
                    let (head, body) = call(&service, request).await.into_parts();
                    let _ = body.collect().await;
                    head.status.as_u16()
                });
                let status = loop {
                    let input = tokio::select! {
                        status = &mut answer => break status,
                        Some(inbound) = inbound_rx.recv() => Input::Inbound(inbound),
                        Some(report) = report_rx.recv() => Input::Report(report),
                    };
                    // A change of members that a leader takes is answered when it is applied: never
                    // here, where nobody acknowledges it. Its request is given up.
                    let is_change = matches!(
                        &input,
                        Input::Inbound(inbound)
                            if matches!(inbound.body, raftexample::transport::InboundBody::ConfChange(..))
                    );
                    match member.turn([input]) {
                        Ok(()) | Err(Error::Removed) => {}
                        Err(error) => panic!("{error}"),
                    }
                    if is_change {
                        break 200;
                    }
                };
                assert!(
                    [200, 204, 400, 404, 408, 410, 411, 412, 413, 503].contains(&status),
                    "answered {status}"
                );
                let after = member.status();
                assert!(after.term >= before.term && after.commit >= before.commit);
                if matches!(status, 400..=413) {
                    assert_eq!(after, before, "it was answered {status}");
                }
            }
        });
    });
}

// ---------------------------------------------------------------------------------------------
// The client port

/// Whatever a client asks: it is answered, and a value that was taken is there until the next one is.
pub fn client_requests(data: &[u8]) {
    const MAX_VALUE_BYTES: usize = 200;
    let mut choices = Choices(data);
    let logger = logs::discard();
    let (propose_tx, mut propose_rx) = mpsc::channel(4);
    let (read_tx, mut read_rx) = mpsc::channel(4);
    let (conf_change_tx, mut conf_change_rx) = mpsc::channel(4);
    let requests = Requests { propose_tx, read_tx, conf_change_tx };
    let (store, mut reader) = KvStore::new(&NodeConfig::default(), requests, logger.clone());
    reader.handle(Commit::Replayed).unwrap();
    let budget = BodyBudget::new(10 * MAX_VALUE_BYTES);
    let service = service(HttpKvApi {
        store,
        ack: Ack::Committed,
        read: Consistency::Linearizable,
        request_timeout: Duration::from_secs(10),
        max_value_bytes: MAX_VALUE_BYTES,
        budget: budget.clone(),
        responses: Default::default(),
        names: vec!["*".to_owned()],
        metrics: Default::default(),
        logger,
    });
    let mut members = Members { urls: [(1, url(1))].into(), ..Members::default() };
    let mut model: HashMap<String, Vec<u8>> = HashMap::new();
    let mut index = 0;
    let mut exchange = |request: Request<Body>| -> (u16, Bytes) {
        RUNTIME.with(|runtime| {
            runtime.block_on(async {
                let mut answer = std::pin::pin!(call(&service, request));
                let answer = loop {
                    tokio::select! {
                        biased;
                        answer = &mut answer => break answer,
                        Some(proposal) = propose_rx.recv() => {
                            index += 1;
                            let responder = proposal.responder.mark_proposed().then_some(proposal.responder);
                            let entry = CommittedEntry { index, term: 1, data: proposal.data, responder };
                            let applied = BacklogPermit::new(0, &Arc::default());
                            reader.handle(Commit::Entries { entries: vec![entry], applied }).unwrap();
                        }
                        Some(read) = read_rx.recv() => {
                            reader.handle(Commit::Reads(vec![read.responder])).unwrap();
                        }
                        Some(change) = conf_change_rx.recv() => {
                            index += 1;
                            let verdict = members.decide(&change.change);
                            if let Ok(Verdict::Change(change)) = &verdict {
                                members.apply(change, index);
                            }
                            change.responder.answer(verdict.map(drop));
                        }
                    }
                };
                let status = answer.status().as_u16();
                (status, answer.into_body().collect().await.expect("it is in memory").to_bytes())
            })
        })
    };
    while !choices.is_empty() {
        let mut method = choices
            .pick(&["PUT", "PUT", "GET", "GET", "POST", "DELETE", "HEAD", "OPTIONS"])
            .as_bytes()
            .to_vec();
        if choices.one_in(12) {
            choices.damage(&mut method);
        }
        let mut target = choices
            .pick(&["/key", "/2", "/0x3", "/", "*", "http://a/b?c", "/%00"])
            .as_bytes()
            .to_vec();
        if choices.one_in(2) {
            choices.damage(&mut target);
        }
        let mut headers = Vec::new();
        for _ in 0..choices.below(3) {
            let name = choices.pick(&["host", "origin", "raft-read", "content-length", "x"]);
            let mut value = choices
                .pick(&["local", "linearizable", "a:1", "http://a:1", "null", ""])
                .as_bytes()
                .to_vec();
            if choices.one_in(3) {
                choices.damage(&mut value);
            }
            headers.push((name.to_owned(), value));
        }
        let body = match choices.below(4) {
            0 => url(choices.below(9) as u64).into_bytes(),
            _ => choices.bytes().to_vec(),
        };
        let Some(request) = request(&method, &target, &headers, body.clone()) else { continue };
        let key = request.uri().to_string();
        let (is_put, is_get) = (request.method() == Method::PUT, request.method() == Method::GET);
        let (status, answered) = exchange(request);
        assert!(
            [200, 204, 400, 403, 404, 405, 409, 410, 413].contains(&status),
            "answered {status}: {answered:?}"
        );
        assert_eq!(budget.available_bytes(), 10 * MAX_VALUE_BYTES, "a share was not given back");
        match status {
            204 if is_put => {
                model.insert(key, body);
            }
            200 => assert!(is_get && Some(&answered[..]) == model.get(&key).map(Vec::as_slice)),
            404 => assert!(is_get && !model.contains_key(&key)),
            413 => assert!(body.len() > MAX_VALUE_BYTES),
            _ => {}
        }
    }
}
