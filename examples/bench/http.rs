//! The bytes of requests and responses.

use std::net::SocketAddr;

use anyhow::{Context, bail};

/// A key is a slash, a letter and this many digits.
const KEY_DIGITS: usize = 9;
/// The number of keys with this many digits.
pub const KEYS_MAX: u64 = 10_u64.pow(KEY_DIGITS as u32);
/// The maximum number of headers in a response.
const HEADERS_MAX: usize = 32;

/// A request that is sent repeatedly, with a new key each time.
pub struct Prepared {
    bytes: Vec<u8>,
    digits: usize,
}

impl Prepared {
    /// `PUT /k… ` with `value`.
    pub fn put(host: SocketAddr, value: &[u8]) -> Self {
        let mut prepared = Self::new("PUT", host, &format!("Content-Length: {}\r\n", value.len()));
        prepared.bytes.extend_from_slice(value);
        prepared
    }

    /// `GET /k…`.
    pub fn get(host: SocketAddr) -> Self {
        Self::new("GET", host, "")
    }

    fn new(method: &str, host: SocketAddr, header: &str) -> Self {
        let zeros = "0".repeat(KEY_DIGITS);
        let head = format!("{method} /k{zeros} HTTP/1.1\r\nHost: {host}\r\n{header}\r\n");
        Self { bytes: head.into_bytes(), digits: method.len() + 3 }
    }

    /// The request for `key`.
    pub fn with_key(&mut self, mut key: u64) -> &[u8] {
        for digit in self.bytes[self.digits..self.digits + KEY_DIGITS].iter_mut().rev() {
            *digit = b'0' + (key % 10) as u8;
            key /= 10;
        }
        &self.bytes
    }
}

/// A response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    /// Bytes of head and body.
    pub length: usize,
    /// True if the server closes the connection after it.
    pub closes: bool,
}

/// Parses the response at the start of `bytes`; `None` while it is incomplete.
pub fn parse(bytes: &[u8]) -> anyhow::Result<Option<Answer>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(head_length) = head.parse(bytes)? else { return Ok(None) };
    let status = head.code.context("a response without a status")?;
    let (mut body_length, mut is_chunked, mut closes) = (0, false, false);
    for header in head.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            body_length = std::str::from_utf8(header.value)?.parse()?;
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            is_chunked = header.value.eq_ignore_ascii_case(b"chunked");
        } else if header.name.eq_ignore_ascii_case("connection") {
            closes = header.value.eq_ignore_ascii_case(b"close");
        }
    }
    if is_chunked {
        let Some(length) = chunked_length(&bytes[head_length..])? else { return Ok(None) };
        body_length = length;
    }
    let length = head_length + body_length;
    Ok((bytes.len() >= length).then_some(Answer { status, length, closes }))
}

/// The length of a chunked body in bytes; `None` while it is incomplete.
fn chunked_length(bytes: &[u8]) -> anyhow::Result<Option<usize>> {
    let mut at = 0;
    loop {
        let size = httparse::parse_chunk_size(bytes.get(at..).unwrap_or_default());
        match size {
            Ok(httparse::Status::Complete((head, size))) => {
                at += head + size as usize + b"\r\n".len();
                if size == 0 {
                    return Ok((bytes.len() >= at).then_some(at));
                }
            }
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(_) => bail!("a chunk without a size"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prepared_request_changes_its_key_alone() {
        let host = SocketAddr::from(([127, 0, 0, 1], 80));
        let mut put = Prepared::put(host, b"value");
        let expected =
            "PUT /k000000042 HTTP/1.1\r\nHost: 127.0.0.1:80\r\nContent-Length: 5\r\n\r\nvalue";
        assert_eq!(put.with_key(42), expected.as_bytes());
        assert_eq!(put.with_key(42), expected.as_bytes());
        let mut get = Prepared::get(host);
        assert!(get.with_key(KEYS_MAX - 1).starts_with(b"GET /k999999999 HTTP/1.1\r\n"));
    }

    #[test]
    fn a_response_is_parsed_once_it_is_complete() {
        let answers = [
            ("HTTP/1.1 204 No Content\r\nRaft-Index: 7\r\n\r\n", 204, false),
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nvalue", 200, false),
            ("HTTP/1.1 503 No\r\ncontent-length: 1\r\nConnection: close\r\n\r\nx", 503, true),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
                200,
                false,
            ),
        ];
        for (answer, status, closes) in answers {
            for length in 0..answer.len() {
                assert_eq!(
                    parse(&answer.as_bytes()[..length]).expect("a response"),
                    None,
                    "{length}: {answer}"
                );
            }
            let whole = Answer { status, length: answer.len(), closes };
            assert_eq!(parse(answer.as_bytes()).expect("a response"), Some(whole));
            assert_eq!(
                parse(format!("{answer}HTTP/1.1 2").as_bytes()).expect("a response"),
                Some(whole)
            );
        }
        assert!(parse(b"SSH-2.0 hello\r\n\r\n").is_err());
    }
}
