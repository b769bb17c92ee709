//! The guard against browsers: which requests a web page of another origin caused.
//!
//! A page can make its visitor's browser send requests to any address. The browser names the page's
//! origin in `Origin`, and the host of the request's URL in `Host`. Comparing the two is not enough:
//! the owner of a page can let the page's own name resolve to this port (DNS rebinding), so `Host`
//! must also be a name that no page can have.

use std::net::IpAddr;

use axum::http::header::{HOST, ORIGIN};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue};

/// True if the request has exactly one `Host`, and it is a loopback name, an IP address or one of
/// `names`.
pub(crate) fn is_known_host(headers: &HeaderMap, names: &[String]) -> bool {
    let authority = only_host(headers).and_then(|host| host.parse::<Authority>().ok());
    authority.is_some_and(|authority| {
        let host = authority.host().trim_matches(['[', ']']).to_ascii_lowercase();
        host == "localhost"
            || host.ends_with(".localhost")
            || host.parse::<IpAddr>().is_ok()
            || names.iter().any(|name| name.eq_ignore_ascii_case(&host))
    })
}

/// True if the request has an `Origin` whose host and port differ from `Host`. An origin that cannot
/// be compared, `null` for example, counts as another one.
pub(crate) fn is_cross_origin(headers: &HeaderMap) -> bool {
    let host = only_host(headers);
    headers.get_all(ORIGIN).iter().any(|origin| {
        !host.zip(origin.to_str().ok()).is_some_and(|(host, origin)| is_same(host, origin))
    })
}

/// The value of `Host`, if there is exactly one.
fn only_host(headers: &HeaderMap) -> Option<&str> {
    let mut hosts = headers.get_all(HOST).iter().map(HeaderValue::to_str);
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.ok(),
        _ => None,
    }
}

/// True if `origin`, a scheme and an authority, has the authority `host`. Either may write the default
/// port of the scheme or leave it out.
fn is_same(host: &str, origin: &str) -> bool {
    let Some((scheme, authority)) = origin.split_once("://") else {
        return false;
    };
    let default_port = match scheme.to_ascii_lowercase().as_str() {
        "http" => ":80",
        "https" => ":443",
        _ => return false,
    };
    let bare = |authority: &str| {
        authority.strip_suffix(default_port).unwrap_or(authority).to_ascii_lowercase()
    };
    bare(host) == bare(authority)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(hosts: &[&str]) -> HeaderMap {
        hosts.iter().map(|host| (HOST, host.parse().expect("a header"))).collect()
    }

    #[test]
    fn loopback_names_addresses_and_given_names_are_known_hosts() {
        let names = ["Raft.Example".to_owned(), "raft-1".to_owned()];
        for host in [
            "localhost",
            "LOCALHOST:12381",
            "a.localhost:1",
            "127.0.0.1",
            "192.0.2.1:80",
            "[::1]:12381",
            "raft.example:12381",
            "RAFT-1",
        ] {
            assert!(is_known_host(&hosts(&[host]), &names), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:12381",
            "notlocalhost",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "x.raft.example",
            "raft-1.evil.example",
            "",
            "a b",
        ] {
            assert!(!is_known_host(&hosts(&[host]), &names), "{host}");
        }
        assert!(!is_known_host(&hosts(&[]), &names), "without a Host");
        assert!(!is_known_host(&hosts(&["localhost", "localhost"]), &names), "with two of them");
        assert!(!is_known_host(&hosts(&["raft-1"]), &[]));
    }
}
