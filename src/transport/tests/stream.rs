//! Batches in a row, and all that can end them.

use super::*;

fn framed(number: u64, batch: &[u8]) -> Vec<u8> {
    let length = u32::try_from(batch.len()).expect("short");
    [&number.to_le_bytes()[..], &length.to_le_bytes(), batch].concat()
}

fn batch(commit: u64) -> Vec<u8> {
    let mut batch = Vec::new();
    wire::put_message(&mut batch, &heartbeat(2, commit));
    batch
}

/// A stream to `member` as a client that we write ourselves: each write is a chunk.
struct RawStream(TcpStream);

impl RawStream {
    async fn open(member: &Member) -> Self {
        let address = member.url.trim_start_matches("http://");
        let mut stream = TcpStream::connect(address).await.expect("connect");
        let head =
            format!("POST /raft/stream HTTP/1.1\r\n{HEADERS}transfer-encoding: chunked\r\n\r\n");
        stream.write_all(head.as_bytes()).await.expect("write");
        Self(stream)
    }

    async fn write(&mut self, bytes: &[u8]) {
        let chunk = [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat();
        self.0.write_all(&chunk).await.expect("write");
    }

    /// The answer up to its end.
    async fn end(mut self) -> String {
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        while !answer.ends_with(b"0\r\n\r\n") {
            match within(self.0.read(&mut buffer)).await {
                Ok(0) | Err(_) => break,
                Ok(read) => answer.extend_from_slice(&buffer[..read]),
            }
        }
        String::from_utf8(answer).expect("text")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_follows_a_batch_that_was_taken_is_one_request() {
    let mut one = Member::start(1).await;
    let mut two = Member::start(2).await;
    one.transport.add_peer(2, &two.url, INCARNATION);
    let mut last = 0;
    for commit in 0..500 {
        one.transport.send(heartbeat(2, commit));
        let inbound = two.inbound().await;
        let InboundBody::Messages { boot: 1_000, number, messages, answer: None } = inbound.body
        else {
            panic!("{:?}", inbound.body);
        };
        assert!(number > last, "{number} after {last}");
        last = number;
        assert_eq!(messages, [heartbeat(2, commit)]);
    }
    assert_eq!(two.requests.load(Ordering::SeqCst), 2, "a batch, and a stream");
    assert!(one.report_rx.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_delivers_whole_frames_however_they_are_cut() {
    let mut two = Member::start(2).await;
    let mut stream = RawStream::open(&two).await;
    let frames = [framed(5, &batch(1)), framed(9, &batch(2))].concat();
    for byte in &frames {
        stream.write(&[*byte]).await;
    }
    assert_eq!(two.messages().await, [heartbeat(2, 1)]);
    assert_eq!(two.messages().await, [heartbeat(2, 2)]);
    stream.write(&frames).await;
    assert_eq!(two.messages().await, [heartbeat(2, 1)]);
    assert_eq!(two.messages().await, [heartbeat(2, 2)]);
    stream.0.write_all(b"0\r\n\r\n").await.expect("write");
    let answer = stream.end().await;
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    assert!(answer.contains("raft-from: 2\r\n") && answer.contains("9\n"), "{answer}");
    let bytes = &two.transport.shared.body_bytes;
    assert_eq!(bytes.available_permits() as u64, PEER_BODIES_BYTES);
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_ends_a_stream_with_the_reason_and_is_not_delivered() {
    let mut two = Member::start(2).await;
    let long = [&7_u64.to_le_bytes()[..], &u32::MAX.to_le_bytes()].concat();
    for (bytes, why) in [
        (framed(1, b""), "a batch without messages"),
        (framed(1, b"x"), "its length is cut short"),
        (framed(1, &[0xff; 64]), "message 0 at offset 0"),
        (framed(1, &[&batch(1)[..], b"x"].concat()), "message 1"),
        (long, "a body of 4294967295 bytes"),
    ] {
        let mut stream = RawStream::open(&two).await;
        stream.write(&bytes).await;
        let answer = stream.end().await;
        assert!(answer.contains(why), "{why}: {answer}");
    }
    for cut in 1..framed(1, &batch(1)).len() {
        let mut stream = RawStream::open(&two).await;
        stream.write(&framed(1, &batch(1))[..cut]).await;
        stream.0.write_all(b"0\r\n\r\n").await.expect("write");
        assert!(stream.end().await.contains("cut short"), "{cut} bytes");
    }
    assert!(two.inbound_rx.try_recv().is_err(), "nothing was delivered");
    let bytes = &two.transport.shared.body_bytes;
    eventually("all room is free", || bytes.available_permits() as u64 == PEER_BODIES_BYTES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_speak_or_is_not_known_may_not_stream() {
    let two = Member::start(2).await;
    let request = |headers: &str| {
        format!("POST /raft/stream HTTP/1.1\r\n{headers}transfer-encoding: chunked\r\n\r\n")
    };
    let open = HEADERS.replace("raft-to: 2", "raft-to: 0");
    assert_eq!(raw(&two.url, request(&open).as_bytes()).await.0, 400);
    two.forget_member_1();
    assert_eq!(raw(&two.url, request(HEADERS).as_bytes()).await.0, 503);
    two.remove_member_1();
    assert_eq!(raw(&two.url, request(HEADERS).as_bytes()).await.0, 410);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sender_refused_amid_its_stream_learns_why() {
    let mut one = Member::start(1).await;
    let mut two = Member::start(2).await;
    one.transport.add_peer(2, &two.url, INCARNATION);
    for commit in 0..9 {
        one.transport.send(heartbeat(2, commit));
        two.messages().await;
    }
    let removed = two.remove_member_1();
    one.transport.send(heartbeat(2, 9));
    one.unreachable(2).await;
    one.transport.send(heartbeat(2, 10));
    let report = one.report().await;
    assert!(matches!(&report, PeerReport::Refused { refusal, .. } if *refusal == removed));
    assert!(two.inbound_rx.try_recv().is_err(), "nothing was delivered");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_if_nothing_comes_or_too_slowly() {
    let quick = |config: &mut TransportConfig| {
        config.election_timeout = Duration::from_millis(300);
        config.body_timeout = Duration::from_millis(300);
    };
    let two = Member::start_with(2, 1_000, quick).await;
    let answer = RawStream::open(&two).await.end().await;
    assert!(answer.contains("came too slowly"), "{answer}");
    let mut stream = RawStream::open(&two).await;
    stream.write(&framed(1, &batch(1))[..20]).await;
    let answer = stream.end().await;
    assert!(answer.contains("came too slowly"), "{answer}");
}

/// Takes a batch, lets the rest be streamed, and calls `then` with the stream's connection.
async fn taker<F>(then: impl Fn(TcpStream) -> F + Clone + Send + Sync + 'static) -> String
where
    F: Future<Output = ()> + Send + 'static,
{
    let identity =
        HEADERS.replace("raft-from: 1", "raft-from: 2").replace("raft-to: 2", "raft-to: 1");
    server(move |mut stream| {
        let (identity, then) = (identity.clone(), then.clone());
        async move {
            while let Some(request) = read_request(&mut stream).await {
                if request.starts_with("POST /raft/stream ") {
                    let head =
                        format!("HTTP/1.1 200 OK\r\n{identity}transfer-encoding: chunked\r\n\r\n");
                    stream.write_all(head.as_bytes()).await.expect("write");
                    return then(stream).await;
                }
                let answer = format!("HTTP/1.1 204 No Content\r\n{identity}raft-stream: 1\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.expect("write");
            }
        }
    })
    .await
}

/// A process that is stopped: its system takes what is sent.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_takes_no_frame_is_given_up_in_time() {
    let mut one = Member::start(1).await;
    let url = taker(|mut stream| async move {
        let mut scrap = [0; 4096];
        while stream.read(&mut scrap).await.is_ok_and(|read| read > 0) {}
    })
    .await;
    one.transport.add_peer(2, &url, INCARNATION);
    one.transport.send(heartbeat(2, 0));
    eventually("active", || one.log.count("became active") == 1).await;
    let begun = Instant::now();
    one.transport.send(heartbeat(2, 1));
    one.unreachable(2).await;
    let waited = begun.elapsed();
    assert!(waited >= ELECTION_TIMEOUT / 2 && waited < ELECTION_TIMEOUT * 2, "{waited:?}");
    assert_eq!(one.log.count("1 batches were not taken in time"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_is_never_sent_again() {
    let mut one = Member::start(1).await;
    let frames = Arc::<AtomicUsize>::default();
    let counted = frames.clone();
    let url = taker(move |mut stream| {
        let counted = counted.clone();
        async move {
            // Closes as soon as something came.
            let mut scrap = [0; 4096];
            if stream.read(&mut scrap).await.is_ok_and(|read| read > 0) {
                counted.fetch_add(1, Ordering::SeqCst);
            }
        }
    })
    .await;
    one.transport.add_peer(2, &url, INCARNATION);
    one.transport.send(heartbeat(2, 0));
    eventually("active", || one.log.count("became active") == 1).await;
    one.transport.send(heartbeat(2, 1));
    one.unreachable(2).await;
    // By a request, because a stream has just failed.
    one.transport.send(heartbeat(2, 2));
    eventually("active again", || one.log.count("became active") == 2).await;
    assert_eq!(frames.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_removed_peers_drain_and_a_closing_member_ends_its() {
    let mut one = Member::start(1).await;
    let mut two = Member::start(2).await;
    one.transport.add_peer(2, &two.url, INCARNATION);
    one.transport.send(heartbeat(2, 0));
    two.messages().await;
    eventually("active", || one.log.count("became active") == 1).await;
    for commit in 1..50 {
        one.transport.send(heartbeat(2, commit));
    }
    one.transport.remove_peer(2);
    let mut last = 0;
    while last < 49 {
        last = two.messages().await.last().expect("a message").commit;
    }

    one.transport.add_peer(2, &two.url, INCARNATION);
    for commit in 0..9 {
        one.transport.send(heartbeat(2, commit));
        two.messages().await;
    }
    let stream = RawStream::open(&two).await;
    two.close().await;
    let answer = stream.end().await;
    assert!(answer.contains("the peer is stopping"), "{answer}");
    one.close().await;
}

/// The leader took it and died: it may be committed, and must not be proposed again.
#[tokio::test(flavor = "multi_thread")]
async fn a_proposal_that_was_taken_is_not_given_back() {
    let mut one = Member::start(1).await;
    let identity =
        HEADERS.replace("raft-from: 1", "raft-from: 2").replace("raft-to: 2", "raft-to: 1");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("address"));
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        drop(listener);
        read_request(&mut stream).await.expect("a request");
        let answer = format!(
            "HTTP/1.1 204 No Content\r\n{identity}raft-stream: 1\r\nconnection: close\r\n\r\n"
        );
        stream.write_all(answer.as_bytes()).await.expect("write");
    });
    one.transport.add_peer(2, &url, INCARNATION);
    one.transport.send(proposal(2, b"taken"));
    // The only report: that the stream failed.
    one.unreachable(2).await;
    eventually("active", || one.log.count("became active") == 1).await;
    assert!(one.report_rx.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_not_needed_ends_without_a_failure() {
    let mut one = Member::start_with(1, 1_000, |config| config.election_timeout /= 2).await;
    let mut two = Member::start(2).await;
    one.transport.add_peer(2, &two.url, INCARNATION);
    for round in 1..=2 {
        for commit in 0..3 {
            one.transport.send(heartbeat(2, commit));
            assert_eq!(two.messages().await, [heartbeat(2, commit)]);
        }
        assert_eq!(two.requests.load(Ordering::SeqCst), 2 * round, "a batch, and a stream");
        // Longer than the sender's patience, shorter than the receiver's: that is what is shown.
        tokio::time::sleep(ELECTION_TIMEOUT * 3 / 5).await;
    }
    assert_eq!(one.log.count("became inactive"), 0);
    assert!(one.report_rx.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_begun_behind_a_large_frame_is_kept() {
    let mut two = Member::start(2).await;
    let mut large = heartbeat(2, 1);
    large.context = vec![7; 4 << 20].into();
    let mut batch = Vec::new();
    wire::put_message(&mut batch, &large);
    let (head, tail) = (framed(1, &batch), framed(2, &self::batch(2)));
    let mut stream = RawStream::open(&two).await;
    // The next frame has begun when the large one is taken.
    stream.write(&[&head[..], &tail[..5]].concat()).await;
    assert_eq!(two.messages().await, [large]);
    let bytes = &two.transport.shared.body_bytes;
    let free = || bytes.available_permits() as u64 == PEER_BODIES_BYTES - 5;
    eventually("all other room is free", free).await;
    stream.write(&tail[5..]).await;
    assert_eq!(two.messages().await, [heartbeat(2, 2)]);
}
