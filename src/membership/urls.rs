//! Peer URLs: `http://HOST:PORT` or `https://HOST:PORT`.

use std::net::{Ipv4Addr, Ipv6Addr};

use hyper::http::uri::Authority;

use crate::channels::PEER_URL_BYTES_MAX;

/// True if the member at this peer URL uses TLS.
pub fn is_https(url: &str) -> bool {
    url.starts_with("https://")
}

/// The host and port of a peer URL; `None` if its scheme is not http or https.
pub fn authority(url: &str) -> Option<&str> {
    url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"))
}

/// Checks that `url` is a peer URL: a scheme, a host and a port, and no path; an error is one line. The
/// original commits any text, and then panics at every start of every member.
pub fn check_url(url: &str) -> Result<(), String> {
    if url.len() > PEER_URL_BYTES_MAX {
        return Err(format!(
            "a peer URL must have at most {PEER_URL_BYTES_MAX} bytes, not {}",
            url.len()
        ));
    }
    let wrong = |why: &str| {
        Err(format!("{url:?} is no peer URL: {why}; write http://HOST:PORT or https://HOST:PORT"))
    };
    let Some(authority) = authority(url) else {
        return wrong("it does not start with http:// or https://");
    };
    if authority.chars().any(|c| c.is_whitespace() || c.is_control() || !c.is_ascii()) {
        return wrong("it contains a space, a control character or a character outside ASCII");
    }
    if authority.contains(['/', '?', '#']) {
        return wrong("it continues after the port");
    }
    let Ok(parsed) = authority.parse::<Authority>() else {
        return wrong("its host cannot be parsed");
    };
    if parsed.as_str().contains('@') {
        return wrong("it contains a user name");
    }
    let (host, port) = (parsed.host(), parsed.port());
    match port.as_ref().map(|port| (port.as_u16(), port.as_str())) {
        None | Some((0, _)) => return wrong("it names no port from 1 to 65535"),
        // `:041` would be another text for the same place.
        Some((_, digits)) if digits.starts_with('0') => {
            return wrong("its port starts with a zero");
        }
        Some(_) => {}
    }
    if host.is_empty() {
        return wrong("it names no host");
    }
    let is_address = match host.strip_prefix('[') {
        Some(host) => host.trim_end_matches(']').parse::<Ipv6Addr>().is_ok(),
        // A name whose last label is a number is read as an address (RFC 3986, 3.2.2; WHATWG URL).
        None if host.trim_end_matches('.').rsplit('.').next().is_some_and(is_number) => {
            host.parse::<Ipv4Addr>().is_ok()
        }
        None => true,
    };
    if is_address { Ok(()) } else { wrong("its host is no IP address") }
}

fn is_number(label: &str) -> bool {
    !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_url_is_a_scheme_a_host_and_a_port() {
        for right in [
            "http://127.0.0.1:9021",
            "http://localhost:1",
            "http://a.b-c.example:65535",
            "http://[::1]:9021",
            "https://127.0.0.1:9021",
            "https://a.b-c.example:65535",
            "http://1.raft.example:9021",
            "http://raft.example.:9021",
        ] {
            assert_eq!(check_url(right), Ok(()), "{right}");
        }
        for wrong in [
            "",
            "http://",
            "127.0.0.1:9021",
            "https://",
            "https://127.0.0.1",
            "https://127.0.0.1:9021/",
            "HTTP://127.0.0.1:9021",
            "HTTPS://127.0.0.1:9021",
            "ftp://127.0.0.1:9021",
            "http://127.0.0.1",
            "http://127.0.0.1:",
            "http://127.0.0.1:0",
            "http://127.0.0.1:65536",
            "http://127.0.0.1:-1",
            "http://127.0.0.1:port",
            "http://:9021",
            "http://127.0.0.1:9021/",
            "http://127.0.0.1:9021/raft",
            "http://127.0.0.1:9021?a=b",
            "http://127.0.0.1:9021#a",
            "http://user@127.0.0.1:9021",
            "http://user:word@127.0.0.1:9021",
            "http://::1:9021",
            "http://[::1:9021",
            "http://a b:9021",
            " http://127.0.0.1:9021",
            "http://127.0.0.1:9021 ",
            "http://127.0.0.1:9021\n",
            "http://127.0.0.1\r\n:9021",
            "http://b\u{fc}cher:9021",
            "http://a:9021,http://b:9021",
            "http://256.1.1.1:1",
            "http://1.2.3:1",
            "http://127.0.0.01:1",
            "http://127.0.0.1.:1",
            "http://[]:1",
            "http://[1.2.3.4]:1",
            "http://127.0.0.1:09021",
        ] {
            let why = check_url(wrong).expect_err(wrong);
            assert!(why.contains("http://HOST:PORT"), "{wrong:?}: {why}");
            assert!(!why.contains(['\n', '\r']), "one line: {why}");
        }
    }
}
