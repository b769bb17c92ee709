//! The guard of the client and admin ports against browsers: it refuses requests that a web page of another
//! origin caused.
//!
//! A page can make its visitor's browser send requests to any address. The browser names the page's
//! origin in `Origin`, and in `Sec-Fetch-Site` how it relates to the address. It sends neither with every
//! request, and the owner of a page can let the page's own name resolve to this port (DNS rebinding). So
//! `Host` must also be a name that no such page has: an IP address, `localhost`, a name without dots, or
//! one that a flag allows.
//!
//! One kind of request passes: over plain HTTP to an address that is not loopback, a browser sends a
//! script's or an image's GET with none of these headers, as any other client would. Such a GET changes
//! nothing, and the page cannot read the response, because its type and `nosniff` say that it is no script.

use std::net::{IpAddr, SocketAddr};

use axum::http::header::{HOST, ORIGIN, TRANSFER_ENCODING};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Version};

static SEC_FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");
static SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    /// 400, 403 or 501.
    pub(crate) status: StatusCode,
    /// The label of its metric.
    pub(crate) reason: &'static str,
    /// What the response says.
    pub(crate) why: &'static str,
}

/// Refuses a request that breaks HTTP's rule for `Host`, or that a browser sent for a page of another
/// origin. `names` are the allowed hosts; one that starts with a dot allows all below it, and `*` allows
/// any. A link on any page may lead to a page of this port, if `is_page`.
pub(crate) fn refusal(
    version: Version,
    headers: &HeaderMap,
    names: &[String],
    is_page: bool,
) -> Option<Refused> {
    // Of the headers below, most requests have `Host` alone, and looking each of them up takes longer.
    if lone_host(headers).is_some_and(|host| is_known_host(host, names)) {
        return None;
    }
    let forbidden = |reason, why| Some(Refused { status: StatusCode::FORBIDDEN, reason, why });
    // A browser always sends one. Old probes do not.
    let is_absent = version == Version::HTTP_10 && !headers.contains_key(HOST);
    let host = only_host(headers);
    if host.is_none() && !is_absent {
        let why = "an HTTP/1.1 request has exactly one Host header (RFC 9112, section 3.2)";
        return Some(Refused { status: StatusCode::BAD_REQUEST, reason: "host", why });
    }
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    if codings.any(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"chunked")) {
        let why = "of the transfer codings, only chunked is implemented";
        let status = StatusCode::NOT_IMPLEMENTED;
        return Some(Refused { status, reason: "transfer_coding", why });
    }
    if host.is_some_and(|host| !is_known_host(host, names)) {
        let why = "unknown Host: call this port by an IP address, localhost, a name without dots, or one that --allow-host lists";
        return forbidden("foreign_host", why);
    }
    if is_cross_origin(host, headers) {
        let why = "a page of another origin may not use this port: send no Origin header";
        return forbidden("foreign_origin", why);
    }
    // No browser sends one of them twice. Whatever added the second, all must hold.
    let is_link = || {
        let mut modes = headers.get_all(&SEC_FETCH_MODE).iter().peekable();
        is_page && modes.peek().is_some() && modes.all(|mode| mode == "navigate")
    };
    let mut sites = headers.get_all(&SEC_FETCH_SITE).iter();
    if sites.any(|site| site != "same-origin" && site != "none" && !is_link()) {
        return forbidden("foreign_origin", "a page of another origin may not use this port");
    }
    None
}

/// True if `host`, with or without a port, is a name that no page of another site has, or one of `names`.
fn is_known_host(host: &str, names: &[String]) -> bool {
    // The usual case first.
    host.parse::<SocketAddr>().is_ok()
        || host.parse::<Authority>().is_ok_and(|authority| {
            // An authority may have more, a user name for example, which belongs into no header.
            let rest = host.strip_prefix(authority.host());
            let is_port = |rest: &str| rest.strip_prefix(':').is_some_and(is_digits);
            if !rest.is_some_and(|rest| rest.is_empty() || is_port(rest)) {
                return false;
            }
            let host = authority.host().trim_matches(['[', ']']).to_ascii_lowercase();
            let is_allowed = |name: &String| {
                let name = name.to_ascii_lowercase();
                name == "*" || name == host || name.starts_with('.') && host.ends_with(&name)
            };
            !host.is_empty() && !host.contains('.') && !host.contains(':')
                || host.ends_with(".localhost")
                || host.parse::<IpAddr>().is_ok()
                || names.iter().any(is_allowed)
        })
}

fn is_digits(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

/// True if the request has an `Origin` whose host and port differ from `host`. An origin that cannot be
/// compared, `null` for example, counts as another one.
fn is_cross_origin(host: Option<&str>, headers: &HeaderMap) -> bool {
    let is_own = |origin: &HeaderValue| {
        host.zip(origin.to_str().ok()).is_some_and(|(host, origin)| is_same(host, origin))
    };
    !headers.get_all(ORIGIN).iter().all(is_own)
}

/// The value of `Host`, if there is exactly one, and no other header that the guard reads.
fn lone_host(headers: &HeaderMap) -> Option<&str> {
    let mut host = None;
    for (name, value) in headers {
        if *name == HOST {
            if host.replace(value).is_some() {
                return None;
            }
        } else if *name == TRANSFER_ENCODING || *name == ORIGIN || *name == SEC_FETCH_SITE {
            return None;
        }
    }
    host?.to_str().ok()
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

    /// The reason that a request with these header lines is refused for.
    fn refused(lines: &[&str], names: &[&str], is_page: bool) -> Option<&'static str> {
        let header = |line: &&str| {
            let (name, value) = line.split_once(": ").expect("a header line");
            let name: axum::http::HeaderName = name.parse().expect("a name");
            (name, value.parse::<HeaderValue>().expect("a value"))
        };
        let mut headers = HeaderMap::new();
        for (name, value) in lines.iter().map(header) {
            headers.append(name, value);
        }
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        refusal(Version::HTTP_11, &headers, &names, is_page).map(|refused| refused.reason)
    }

    #[test]
    fn hosts_that_no_page_has_and_allowed_ones_are_known() {
        let names = ["Raft.Example", ".svc.cluster.local"];
        for host in [
            "localhost",
            "LOCALHOST:12381",
            "a.localhost:1",
            "127.0.0.1",
            "192.0.2.1:80",
            "[::1]:12381",
            "raft.example:12381",
            "RAFT-1",
            "raft-0.raft.default.svc.cluster.local:9121",
        ] {
            assert_eq!(refused(&[&format!("Host: {host}")], &names, false), None, "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:12381",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "x.raft.example",
            "xsvc.cluster.local",
        ] {
            let reason = refused(&[&format!("Host: {host}")], &names, false);
            assert_eq!(reason, Some("foreign_host"), "{host}");
            assert_eq!(refused(&[&format!("Host: {host}")], &["*"], false), None, "{host}");
        }
        for host in ["a b", "localhost@localhost", "evil.example@localhost", "a:evil.example"] {
            let reason = refused(&[&format!("Host: {host}")], &["*"], false);
            assert_eq!(reason, Some("foreign_host"), "{host}");
        }
    }

    #[test]
    fn a_request_has_one_host_and_one_coding_at_most() {
        assert_eq!(refused(&[], &[], false), Some("host"));
        assert_eq!(refused(&["Host: localhost", "Host: localhost"], &[], false), Some("host"));
        let old = |name: &'static str, value| {
            let headers = HeaderMap::from_iter([(name.parse().expect("a name"), value)]);
            refusal(Version::HTTP_10, &headers, &[], false).map(|refused| refused.reason)
        };
        let value = HeaderValue::from_static;
        assert_eq!(old("accept", value("*/*")), None, "an old probe");
        assert_eq!(old("origin", value("http://a")), Some("foreign_origin"));
        assert_eq!(old("sec-fetch-site", value("cross-site")), Some("foreign_origin"));
        assert_eq!(old("transfer-encoding", value("gzip")), Some("transfer_coding"));
        let host = "Host: localhost";
        let coded = ["Transfer-Encoding: gzip, chunked", host];
        assert_eq!(refused(&coded, &[], false), Some("transfer_coding"));
        assert_eq!(refused(&["Transfer-Encoding: Chunked", host], &[], false), None);
    }

    /// What Chromium 156.0.8078.108 and Firefox 153.7.0 ESR sent on Linux: the four headers that the guard
    /// reads, one line for each set of requests that had the same. The page that caused a request is the
    /// member's own, at `http://evil.example:8000`, at another port of the member's address, or at a name
    /// that its owner rebound to the member's address. The browsers differ in one preflight only, whose
    /// rows name them. To an address that is not loopback they send no `Sec-Fetch-Site` over plain HTTP.
    ///
    /// The columns: page | request | `Host` | `Origin` | `Sec-Fetch-Site` | `Sec-Fetch-Mode` | outcome.
    const RECORDED: &str = "\
        none | address bar | 127.0.0.1:9121 | - | none | navigate | answered
        own | fetch, events | 127.0.0.1:9121 | - | same-origin | cors | answered
        own | fetch of POST, PUT, DELETE | 127.0.0.1:9121 | http://127.0.0.1:9121 | same-origin | cors | answered
        own | script, image, no-cors fetch | 127.0.0.1:9121 | - | same-origin | no-cors | answered
        own | no-cors POST, beacon | 127.0.0.1:9121 | http://127.0.0.1:9121 | same-origin | no-cors | answered
        own | form POST | 127.0.0.1:9121 | http://127.0.0.1:9121 | same-origin | navigate | answered
        own | link | 127.0.0.1:9121 | - | same-origin | navigate | answered
        own | fetch from a sandboxed frame | 127.0.0.1:9121 | null | cross-site | cors | foreign_origin
        cross-site | script, image, no-cors fetch | 127.0.0.1:9121 | - | cross-site | no-cors | foreign_origin
        cross-site | fetch, events, POST, preflight | 127.0.0.1:9121 | http://evil.example:8000 | cross-site | cors | foreign_origin
        cross-site | no-cors POST, beacon | 127.0.0.1:9121 | http://evil.example:8000 | cross-site | no-cors | foreign_origin
        cross-site | form POST | 127.0.0.1:9121 | http://evil.example:8000 | cross-site | navigate | foreign_origin
        cross-site | link | 127.0.0.1:9121 | - | cross-site | navigate | answered if a page
        cross-site | fetch from a sandboxed frame | 127.0.0.1:9121 | null | cross-site | cors | foreign_origin
        other port | script, image, no-cors fetch | 127.0.0.1:9121 | - | same-site | no-cors | foreign_origin
        other port | fetch, events, POST, preflight | 127.0.0.1:9121 | http://127.0.0.1:8000 | same-site | cors | foreign_origin
        other port | no-cors POST, beacon | 127.0.0.1:9121 | http://127.0.0.1:8000 | same-site | no-cors | foreign_origin
        other port | form POST | 127.0.0.1:9121 | http://127.0.0.1:8000 | same-site | navigate | foreign_origin
        other port | link | 127.0.0.1:9121 | - | same-site | navigate | answered if a page
        rebound | address bar, fetch, events, script, image, link | evil.example:9121 | - | - | - | foreign_host
        rebound | fetch of POST, PUT, DELETE, form POST, beacon | evil.example:9121 | http://evil.example:9121 | - | - | foreign_host
        rebound | fetch from a sandboxed frame | evil.example:9121 | null | - | - | foreign_host
        none | address bar, not loopback | 192.0.2.1:9121 | - | - | - | answered
        own | POST, PUT, DELETE, form POST, not loopback | 192.0.2.1:9121 | http://192.0.2.1:9121 | - | - | answered
        cross-site | script, image, no-cors fetch, link, not loopback | 192.0.2.1:9121 | - | - | - | answered
        cross-site | fetch, events, POST, beacon, form POST, not loopback | 192.0.2.1:9121 | http://evil.example:8000 | - | - | foreign_origin
        cross-site | preflight, not loopback, Chromium | 192.0.2.1:9121 | http://evil.example:8000 | - | cors | foreign_origin
        cross-site | preflight, not loopback, Firefox | 192.0.2.1:9121 | http://evil.example:8000 | - | - | foreign_origin
        cross-site | fetch from a sandboxed frame, not loopback | 192.0.2.1:9121 | null | - | - | foreign_origin";

    #[test]
    fn requests_that_browsers_send_for_other_pages_are_refused() {
        for row in RECORDED.lines() {
            let columns: Vec<_> = row.split('|').map(str::trim).collect();
            let names = ["Host", "Origin", "Sec-Fetch-Site", "Sec-Fetch-Mode"];
            let sent = names.into_iter().zip(&columns[2..6]).filter(|(_, value)| **value != "-");
            let lines: Vec<_> = sent.map(|(name, value)| format!("{name}: {value}")).collect();
            let lines: Vec<_> = lines.iter().map(String::as_str).collect();
            let (expected, of_a_page) = match columns[6] {
                "answered" => (None, None),
                "answered if a page" => (Some("foreign_origin"), None),
                reason => (Some(reason), Some(reason)),
            };
            assert_eq!(refused(&lines, &[], false), expected, "{row}");
            assert_eq!(refused(&lines, &[], true), of_a_page, "a page: {row}");
        }
        const HERE: &str = "Host: 127.0.0.1:9121";
        assert_eq!(refused(&[HERE], &[], false), None, "no browser");
        let link = [HERE, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"];
        let twice = [&link[..], &["Sec-Fetch-Mode: no-cors"]].concat();
        assert_eq!(refused(&twice, &[], true), Some("foreign_origin"));
        let twice = [HERE, "Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: cross-site"];
        assert_eq!(refused(&twice, &[], false), Some("foreign_origin"));
    }
}
