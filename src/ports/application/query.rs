//! The query string of a request.

use super::Answer;
use super::ids::{bad_request, quoted};

/// The parameters of a query string, decoded. Each occurs once, and has one of the expected names.
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// Parses `query`, whose parameters must be among `names`.
    pub fn parse(query: &str, names: &[&str]) -> Answer<Self> {
        let mut found: Vec<(String, String)> = Vec::new();
        for part in query.split('&').filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            if !names.contains(&name) || found.iter().any(|(other, _)| other == name) {
                let (name, names) = (quoted(name), names.join(", "));
                return Err(bad_request(format!(
                    "the parameter {name} is unknown or given twice: the parameters are {names}"
                )));
            }
            found.push((name.to_owned(), decode(name, value)?));
        }
        Ok(Self(found))
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(other, _)| other == name).map(|(_, value)| &value[..])
    }

    /// A parameter that is `true` or `false`.
    pub fn flag(&self, name: &str) -> Answer<bool> {
        match self.get(name) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(bad_request(format!("{name} must be true or false"))),
        }
    }
}

/// Decodes percent-encoding. A plus sign is itself: keys have no spaces.
fn decode(name: &str, text: &str) -> Answer<String> {
    let invalid = || {
        bad_request(format!(
            "{name} is not percent-encoded UTF-8: write % as %25, and other bytes as % and two hexadecimal digits"
        ))
    };
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte != b'%' {
            bytes.push(*byte);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2).ok_or_else(invalid)?;
        let digits = std::str::from_utf8(digits).map_err(|_| invalid())?;
        if digits.starts_with('+') {
            return Err(invalid());
        }
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| invalid())?);
        rest = after;
    }
    String::from_utf8(bytes).map_err(|_| invalid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_decoded_once_or_refused() {
        let parse = |query| Query::parse(query, &["prefix", "values"]);
        for (query, prefix) in [
            ("prefix=/a", Some("/a")),
            ("prefix=%2Fa%2520b&values=true", Some("/a%20b")),
            ("prefix=/a+b=c", Some("/a+b=c")),
            ("prefix", Some("")),
            ("&&", None),
        ] {
            assert_eq!(parse(query).expect(query).get("prefix"), prefix, "{query}");
        }
        for query in [
            "prefix=%",
            "prefix=%2",
            "prefix=%zz",
            "prefix=%+1",
            "prefix=%ff",
            "prefx=/a",
            "=",
            "prefix=a&prefix=a",
            "prefix=%€",
        ] {
            assert!(parse(query).is_err(), "{query}");
        }
        assert!(parse("values=true").and_then(|query| query.flag("values")).expect("a flag"));
        assert!(parse("values=1").and_then(|query| query.flag("values")).is_err());
    }
}
