//! The names that the port gives to what programs hand back: ETags, retry tokens and places in a watch. Each
//! begins with the cluster's id, so none of another cluster, or of an earlier life of this one, is mistaken
//! for one of this.

use axum::http::header::{HeaderName, IF_MATCH, IF_NONE_MATCH};
use axum::http::{HeaderMap, StatusCode};

use super::Answer;
use crate::channels::Index;
use crate::httpapi::ErrorResponse;
use crate::kvstore::{Cursor, Requirement, Token};

/// A cluster's id, of 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClusterId(pub u64);

/// `Idempotency-Key`: a retry token.
pub(super) static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// The most bytes of a request that an error quotes, before they are escaped. The response to a large
/// invalid body is counted by no budget, and escaping makes it longer.
const QUOTED_BYTES_MAX: usize = 128;
/// The most bytes of an error's reason. What parsers say of a request quotes it, too.
const REASON_BYTES_MAX: usize = 2048;

pub(super) fn bad_request(why: impl Into<String>) -> ErrorResponse {
    let mut why = why.into();
    if why.len() > REASON_BYTES_MAX {
        why.truncate(why.floor_char_boundary(REASON_BYTES_MAX));
        why.push('…');
        why.shrink_to_fit();
    }
    ErrorResponse::new(StatusCode::BAD_REQUEST, why)
}

/// Text of a request in double quotes, or its beginning.
pub(super) fn quoted(text: &str) -> String {
    let shown = &text[..text.floor_char_boundary(QUOTED_BYTES_MAX)];
    let dots = if shown.len() < text.len() { "…" } else { "" };
    format!("{shown:?}{dots}")
}

impl ClusterId {
    /// The value that the entry at `index` wrote: `<cluster>-<index>`, an ETag without its quotes.
    pub fn tag(self, index: Index) -> String {
        format!("{:016x}-{index}", self.0)
    }

    /// A place in a watch: `<cluster>-<index>.<position>`, or `<cluster>-<index>` after all changes of an
    /// entry.
    pub fn cursor(self, Cursor { index, position }: Cursor) -> String {
        match position {
            Cursor::END => self.tag(index),
            position => format!("{:016x}-{index}.{position}", self.0),
        }
    }

    /// A retry token: `<cluster>-<index in hexadecimal>-<16 random hexadecimal digits>`.
    pub fn token(self, Token { index, random }: Token) -> String {
        format!("{:016x}-{index:x}-{random:016x}", self.0)
    }
}

fn parse_cluster(text: &str) -> Option<ClusterId> {
    (text.len() == 16).then(|| parse_hex(text)).flatten().map(ClusterId)
}

/// Digits alone: Rust's parsers allow a sign.
fn parse_hex(text: &str) -> Option<u64> {
    let is_hex = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hex.then(|| u64::from_str_radix(text, 16).ok()).flatten()
}

pub(super) fn parse_decimal<T: std::str::FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// Parses what [`ClusterId::tag`] wrote.
pub(super) fn parse_tag(text: &str) -> Option<(ClusterId, Index)> {
    let (cluster, index) = text.split_once('-')?;
    Some((parse_cluster(cluster)?, parse_decimal(index)?))
}

/// Parses what [`ClusterId::cursor`] wrote, or an index alone, which belongs to any cluster.
pub(super) fn parse_cursor(text: &str) -> Option<(Option<ClusterId>, Cursor)> {
    let Some((cluster, place)) = text.split_once('-') else {
        return Some((None, Cursor::after(parse_decimal(text)?)));
    };
    let cursor = match place.split_once('.') {
        None => Cursor::after(parse_decimal(place)?),
        Some((index, position)) => {
            Cursor { index: parse_decimal(index)?, position: parse_decimal(position)? }
        }
    };
    Some((Some(parse_cluster(cluster)?), cursor))
}

fn parse_token(text: &str) -> Option<(ClusterId, Token)> {
    let mut parts = text.splitn(3, '-');
    let (cluster, index, random) = (parts.next()?, parts.next()?, parts.next()?);
    let token = Token { index: parse_hex(index)?, random: parse_hex(random)? };
    Some((parse_cluster(cluster)?, token))
}

/// The retry token of a request, with or without the quotes of a structured field.
pub(super) fn retry_token(headers: &HeaderMap) -> Answer<Option<(ClusterId, Token)>> {
    let mut keys = headers.get_all(&IDEMPOTENCY_KEY).iter();
    let (Some(key), more) = (keys.next(), keys.next()) else { return Ok(None) };
    let text = key.to_str().unwrap_or_default();
    let unquoted = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    let token = parse_token(unquoted.unwrap_or(text)).filter(|_| more.is_none());
    token.map(Some).ok_or_else(|| {
        bad_request("Idempotency-Key must be one retry token: POST /v1/retry-token issues it")
    })
}

/// `If-Match` or `If-None-Match` of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Precondition {
    /// The request has neither.
    None,
    /// The current ETag must be one of these.
    Match(Tags),
    /// The current ETag must be none of these.
    NoneMatch(Tags),
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Tags {
    /// `*`: any that exists.
    Any,
    /// Those that may be ours. Weak ones match nothing.
    Listed(Vec<(ClusterId, Index)>),
}

impl Precondition {
    pub fn of(headers: &HeaderMap) -> Answer<Self> {
        match (tags(headers, &IF_MATCH)?, tags(headers, &IF_NONE_MATCH)?) {
            (None, None) => Ok(Self::None),
            (Some(tags), None) => Ok(Self::Match(tags)),
            (None, Some(tags)) => Ok(Self::NoneMatch(tags)),
            (Some(_), Some(_)) => {
                Err(bad_request("If-Match and If-None-Match exclude each other: send one of them"))
            }
        }
    }

    /// What it requires of a key of cluster `id`.
    pub fn requirement(self, id: ClusterId) -> Option<Requirement> {
        let ours = |tags: Vec<(ClusterId, Index)>| {
            tags.into_iter().filter(|(cluster, _)| *cluster == id).map(|(_, index)| index).collect()
        };
        match self {
            Self::None => None,
            Self::Match(Tags::Any) => Some(Requirement::Exists),
            Self::Match(Tags::Listed(tags)) => Some(Requirement::WrittenAt(ours(tags))),
            Self::NoneMatch(Tags::Any) => Some(Requirement::Absent),
            Self::NoneMatch(Tags::Listed(tags)) => Some(Requirement::NotWrittenAt(ours(tags))),
        }
    }
}

/// Parses a list of entity tags (RFC 9110, section 8.8.3). `None` if there is no such header.
fn tags(headers: &HeaderMap, name: &HeaderName) -> Answer<Option<Tags>> {
    let invalid = || {
        bad_request(format!(
            "{name} must be * or a list of ETags in double quotes, as responses have them in ETag"
        ))
    };
    let mut found = None;
    for line in headers.get_all(name) {
        let mut rest = line.to_str().map_err(|_| invalid())?.trim();
        if rest == "*" {
            if found.replace(Tags::Any).is_some() {
                return Err(invalid());
            }
            continue;
        }
        let listed = match found.get_or_insert(Tags::Listed(Vec::new())) {
            Tags::Listed(listed) => listed,
            Tags::Any => return Err(invalid()),
        };
        loop {
            let strong = rest.strip_prefix("W/");
            let quoted = strong.unwrap_or(rest).strip_prefix('"').ok_or_else(invalid)?;
            let (tag, after) = quoted.split_once('"').ok_or_else(invalid)?;
            listed.extend(parse_tag(tag).filter(|_| strong.is_none()));
            rest = after.trim_start();
            if rest.is_empty() {
                break;
            }
            rest = rest.strip_prefix(',').ok_or_else(invalid)?.trim_start();
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    const ID: ClusterId = ClusterId(0xab);

    fn headers(lines: &[(&HeaderName, &str)]) -> HeaderMap {
        let value = |text: &str| HeaderValue::from_bytes(text.as_bytes()).expect("a value");
        lines.iter().map(|(name, text)| ((*name).clone(), value(text))).collect()
    }

    #[test]
    fn what_is_written_is_read_again() {
        let token = Token { index: 0x3a, random: 7 };
        assert_eq!(ID.token(token), "00000000000000ab-3a-0000000000000007");
        for text in [ID.token(token), format!("\"{}\"", ID.token(token))] {
            let headers = headers(&[(&IDEMPOTENCY_KEY, &text)]);
            assert_eq!(retry_token(&headers).expect("a token"), Some((ID, token)));
        }
        assert_eq!(parse_tag(&ID.tag(58)), Some((ID, 58)));
        for cursor in [Cursor::after(58), Cursor { index: 58, position: 3 }] {
            assert_eq!(parse_cursor(&ID.cursor(cursor)), Some((Some(ID), cursor)));
        }
        assert_eq!(parse_cursor("58"), Some((None, Cursor::after(58))));
    }

    #[test]
    fn other_text_is_no_name() {
        for text in ["", "x", "-1", "+1", "00000000000000ab-", "ab-5", "00000000000000ab-+5"] {
            assert_eq!((parse_tag(text), parse_cursor(text)), (None, None), "{text}");
        }
        for text in ["00000000000000ab-5.", "00000000000000ab-5.x", "00000000000000ab-5.4294967296"]
        {
            assert_eq!(parse_cursor(text), None, "{text}");
        }
        for text in ["", "x", "00000000000000ab-3a", "00000000000000ab-3a-", "\"", "a-1-2"] {
            let one = headers(&[(&IDEMPOTENCY_KEY, text)]);
            assert!(retry_token(&one).is_err(), "{text}");
        }
        let token = ID.token(Token { index: 1, random: 1 });
        let twice = headers(&[(&IDEMPOTENCY_KEY, &token), (&IDEMPOTENCY_KEY, &token)]);
        assert!(retry_token(&twice).is_err());
    }

    #[test]
    fn preconditions_are_those_of_rfc_9110() {
        let of = |name, text: &str| {
            Precondition::of(&headers(&[(name, text)])).map(|found| found.requirement(ID)).ok()
        };
        let (ours, other) = ("\"00000000000000ab-5\"", "\"00000000000000ac-6\"");
        for (text, indexes) in [
            (ours.to_owned(), vec![5]),
            (other.to_owned(), vec![]),
            (format!("{other}, {ours}"), vec![5]),
            (format!("\"any, thing\",{ours} ,\"\""), vec![5]),
            (format!("W/{ours}"), vec![]),
        ] {
            let found = of(&IF_MATCH, &text).expect("it is valid");
            assert_eq!(found, Some(Requirement::WrittenAt(indexes.clone())), "{text}");
            let found = of(&IF_NONE_MATCH, &text).expect("it is valid");
            assert_eq!(found, Some(Requirement::NotWrittenAt(indexes)), "{text}");
        }
        assert_eq!(of(&IF_MATCH, "*"), Some(Some(Requirement::Exists)));
        assert_eq!(of(&IF_NONE_MATCH, " * "), Some(Some(Requirement::Absent)));
        for text in
            ["", "5", "00000000000000ab-5", "\"", "\"a\" \"b\"", "\"a\",", "*, \"a\"", "w/\"a\""]
        {
            assert_eq!(of(&IF_MATCH, text), None, "{text}");
        }
        let both = headers(&[(&IF_MATCH, ours), (&IF_NONE_MATCH, "*")]);
        assert!(Precondition::of(&both).is_err());
        let lines = headers(&[(&IF_MATCH, ours), (&IF_MATCH, other), (&IF_MATCH, ours)]);
        let found = Precondition::of(&lines).expect("lines are one list").requirement(ID);
        assert_eq!(found, Some(Requirement::WrittenAt(vec![5, 5])));
    }
}
