//! Command lines, and what is wrong with them.

use super::*;

fn config(flags: &str) -> std::result::Result<Config, String> {
    let flags = std::iter::once("raftexample").chain(flags.split_whitespace());
    let config = Config::try_parse_from(flags).map_err(|error| error.to_string())?;
    config.check().map_err(|error| error.to_string())?;
    Ok(config)
}

#[test]
fn flags_may_be_written_as_go_writes_them() {
    let read = |flags: &str| {
        let flags = std::iter::once("raftexample").chain(flags.split_whitespace());
        Config::read(flags.map(OsString::from), std::iter::empty()).expect("the flags are known")
    };
    let config = read("-id 2 -port=7 --join=true -cluster http://a:1,http://b:2");
    assert_eq!((config.id, config.port, config.join), (2, 7, true));
    assert!(read("-join").join && read("--join").join && !read("--join=false").join);
}

#[test]
fn an_error_is_one_line_whatever_it_quotes() {
    for arguments in [&["--tick", "a\n\nb"][..], &["--no\n\nne"], &["--port=\n\n"]] {
        let words = std::iter::once("raftexample").chain(arguments.iter().copied());
        let error = Config::read(words.map(OsString::from), std::iter::empty());
        let line = one_line(&error.expect_err("an invalid flag"));
        assert!(line.contains("\\n\\n") && !line.contains('\n'), "{line}");
        assert!(line.contains("invalid ") || line.contains("unexpected"), "{line}");
    }
}

const THREE: &str = "--cluster http://127.0.0.1:1,http://127.0.0.1:2,http://127.0.0.1:3";

#[test]
fn the_defaults_are_the_originals() {
    let config = config("").expect("the defaults can be used");
    assert_eq!(config.id, 1);
    assert_eq!(config.own_url(), "http://127.0.0.1:9021");
    assert_eq!(config.client_address().to_string(), "127.0.0.1:9121");
    assert!(!config.join);
}

#[test]
fn a_list_of_urls_may_have_blanks_slashes_and_capitals() {
    let list = "HTTP://127.0.0.1:9021/, http://127.0.0.1:9022 ,Https://a:1";
    let arguments = ["raftexample", "--cluster", list].map(OsString::from);
    let config = Config::read(arguments, std::iter::empty()).expect("a list");
    let urls = ["http://127.0.0.1:9021", "http://127.0.0.1:9022", "https://a:1"];
    assert_eq!(config.cluster, urls);
}

#[test]
fn a_node_without_flags_has_the_default_configuration() {
    let metrics = Metrics::default();
    let shown = |config| {
        let metrics = metrics.clone();
        format!("{:?}", NodeConfig { boot: 1, incarnation: 1, metrics, ..config })
    };
    let config = config("").expect("the defaults can be used");
    assert_eq!(shown(config.node_config()), shown(NodeConfig::default()));
}

#[test]
fn flags_that_do_not_fit_together_are_named() {
    for (flags, named) in [
        ("--id 0".into(), "--id must be at least 1"),
        (format!("{THREE} --id 4"), "--id 4 has no peer URL"),
        (format!("{THREE} --id 4 --peer-url http://127.0.0.1:4"), "add --join"),
        ("--cluster 127.0.0.1:1".into(), "http://"),
        ("--cluster http://127.0.0.1".into(), "names no port"),
        ("--cluster http://a:1,http://a:1".into(), "twice"),
        ("--join".into(), "--join requires"),
        ("--cluster https://a:1,http://b:2".into(), "in all URLs or in none"),
        ("--id 2 --cluster https://a:1,http://b:2".into(), "in all URLs or in none"),
        (
            "--id 2 --cluster http://a:1 --join --peer-url https://b:2".into(),
            "in all URLs or in none",
        ),
        ("--cluster https://a:1".into(), "--peer-cert, --peer-key and --peer-ca"),
        ("--cluster https://a:1 --peer-cert c --peer-key k".into(), "give all three"),
        ("--id 2 --cluster http://a:1 --join --peer-url https://b:2".into(), "--peer-url"),
        ("--peer-cert c --peer-key k --peer-ca a".into(), "else none"),
        ("--peer-ca a".into(), "else none"),
        ("--cert c".into(), "--cert and --key"),
        ("--key k".into(), "--cert and --key"),
        ("--client-ca a".into(), "--client-ca requires"),
        ("--election-ticks 1".into(), "--election-ticks must be above"),
        ("--max-value-bytes 99999999999".into(), "--max-value-bytes"),
        ("--snapshot-count 0".into(), "--snapshot-count"),
        ("--tick 100000000000years".into(), "--tick"),
        ("--request-timeout 300000000000years".into(), "--request-timeout"),
        ("--request-timeout 0s".into(), "--request-timeout"),
        ("--election-ticks 9223372036854775808".into(), "--election-ticks"),
        ("--port 99999".into(), "99999"),
    ] {
        let error = config(&flags).expect_err(&flags);
        assert!(error.contains(named), "{flags}: {error}");
    }
}

#[test]
fn the_addresses_of_other_ports_are_checked_when_they_are_used() {
    let config = config("--api nonsense --admin nonsense").expect("flags");
    for refused in [config.application_address(), config.admin_address()] {
        let why = refused.expect_err("it is no address").to_string();
        assert!(why.contains("\"nonsense\"") && why.contains("give HOST:PORT"), "{why}");
    }
    let config = self::config("--api 0.0.0.0:1").expect("flags");
    let address = config.application_address().expect("an address").expect("it is given");
    assert_eq!(address.to_string(), "0.0.0.0:1");
    assert_eq!(self::config("").expect("flags").application_address().expect("none"), None);
}

#[test]
fn an_admin_url_is_told_if_other_machines_can_reach_it() {
    let url = |flags: &str, bound: &str| {
        let bound = bound.parse().expect("an address");
        config(flags).expect(flags).admin_url(bound)
    };
    let cluster = "--cluster http://127.0.0.1:1";
    let url_of = |admin: &str, bound: &str| url(&format!("{cluster} --admin {admin}"), bound);
    assert_eq!(url_of("127.0.0.1:0", "127.0.0.1:7"), "http://127.0.0.1:7");
    assert_eq!(url_of("localhost:0", "127.0.0.1:7"), "http://localhost:7");
    // The other members are on other machines.
    let remote = "--cluster http://192.0.2.1:1 --admin";
    assert_eq!(url(&format!("{remote} 127.0.0.1:7"), "127.0.0.1:7"), "");
    let tls = "--peer-cert c --peer-key k --peer-ca a --cert c --key k --admin";
    let named = format!("--cluster https://node1.example:1 {tls}");
    assert_eq!(url(&format!("{named} 0.0.0.0:7"), "0.0.0.0:7"), "https://node1.example:7");
    assert_eq!(url(&format!("{named} 192.0.2.1:7"), "192.0.2.1:7"), "https://192.0.2.1:7");
    let address = format!("--cluster https://[2001:db8::1]:1 {tls} [::]:7");
    assert_eq!(url(&address, "[::]:7"), "https://[2001:db8::1]:7");
}

#[test]
fn the_client_port_is_open_to_others_only_if_the_peer_port_is() {
    let address = |flags: &str| config(flags).expect(flags).client_address().ip().to_string();
    assert_eq!(address("--cluster http://localhost:1"), "127.0.0.1");
    assert_eq!(address("--cluster http://[::1]:1"), "127.0.0.1");
    assert_eq!(address("--cluster http://192.0.2.1:1"), "0.0.0.0");
    let certificates = "--peer-cert c --peer-key k --peer-ca a";
    let address_with = |flags: &str| address(&format!("{flags} {certificates}"));
    assert_eq!(address_with("--cluster https://[::1]:1"), "127.0.0.1");
    assert_eq!(address_with("--cluster https://192.0.2.1:1"), "0.0.0.0");
    assert_eq!(address("--host 0.0.0.0"), "0.0.0.0");
}
