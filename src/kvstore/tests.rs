use super::*;

fn keys() -> Keys {
    keys_remembering(REMEMBERED_MAX)
}

fn keys_remembering(tokens_max: usize) -> Keys {
    let logger = Logger::root(slog::Discard, slog::o!());
    Keys::new(&NodeConfig::default(), tokens_max, logger)
}

/// A handle on `keys`.
fn store(keys: &Keys) -> KvStore {
    let (propose_tx, _) = tokio::sync::mpsc::channel(1);
    let (read_tx, conf_change_tx) =
        (tokio::sync::mpsc::channel(1).0, tokio::sync::mpsc::channel(1).0);
    let requests = Requests { propose_tx, read_tx, conf_change_tx };
    let logger = Logger::root(slog::Discard, slog::o!());
    let (store, _reader) = KvStore::new(&NodeConfig::default(), requests, logger);
    KvStore { shared: keys.shared.clone(), ..store }
}

impl Keys {
    fn run(&mut self, index: Index, data: &[u8]) -> Result<Applied, RequestError> {
        self.apply(Entry { index, term: 2, data })
    }

    fn write(&mut self, index: Index, key: &[u8], value: &[u8]) -> Applied {
        let put = codec::encode(&Command::Put { key, value });
        self.run(index, &put).expect("a PUT cannot fail")
    }

    fn txn(&mut self, index: Index, txn: Txn<'_>) -> Applied {
        self.run(index, &txn.encode(None)).expect("without a token it cannot fail")
    }

    fn delete(&mut self, index: Index, key: &[u8]) -> Applied {
        self.txn(index, Txn::of(Operation::Delete { key }))
    }

    fn get(&self, key: &[u8]) -> Option<(Vec<u8>, Index)> {
        let state = self.shared.state();
        state.records.get(key).map(|found| (found.value().to_vec(), found.index()))
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.snapshot()(&mut bytes).expect("writing to memory succeeds");
        bytes
    }

    /// The changes after `cursor`, as index, position, key and whether it was removed.
    fn changes(&self, cursor: Cursor, prefix: &[u8]) -> Option<Vec<(Index, u32, String, bool)>> {
        match self.shared.state().history.after(cursor, prefix, 1000) {
            Changes::Lost => None,
            Changes::Kept(changes, _) => Some(changes.iter().map(shown).collect()),
        }
    }
}

fn shown(change: &Change) -> (Index, u32, String, bool) {
    let key = String::from_utf8_lossy(change.key()).into_owned();
    (change.index(), change.cursor().position, key, change.is_removal)
}

fn on<'a>(key: &'a [u8], is: Requirement) -> Condition<'a> {
    Condition { key, is }
}

/// Every member skips it, so nobody may be told that it was written.
#[test]
fn an_entry_that_is_no_command_is_not_acknowledged() {
    let mut keys = keys();
    let put = codec::encode(&Command::Put { key: b"k", value: b"v" });
    let outcome = keys.run(7, &put).expect("a command").outcome;
    assert_eq!((outcome.index, outcome.term, outcome.existed(0)), (7, 2, false));
    let delete = Operation::Delete { key: b"k" };
    let long = Txn { then: vec![delete; OPERATIONS_MAX + 1], ..Txn::default() }.encode(None);
    for data in [&[][..], b"no command", &put[..put.len() - 1], &[&put[..], b"x"].concat(), &long] {
        let refused = keys.run(8, data);
        assert!(matches!(refused, Err(RequestError::Invalid(why)) if why.contains("8")));
    }
    assert_eq!(keys.get(b"k"), Some((b"v".to_vec(), 7)));
    assert_eq!(keys.shared.state().applied, (8, 2), "skipped entries count as applied");
}

/// In their order, which the first 15 bytes alone do not give.
const ORDERED: [&[u8]; 12] = [
    b"",
    b"\0",
    b"a",
    b"a\0",
    b"a\0\0",
    b"fifteen bytes o",
    b"fifteen bytes o\0",
    b"fifteen bytes of",
    b"fifteen bytes of\0",
    b"fifteen bytes of a key",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
];

#[test]
fn a_snapshot_is_in_the_order_of_whole_keys() {
    let mut keys = keys();
    for (index, key) in (1..).zip(ORDERED.iter().rev()) {
        keys.write(index, key, b"value");
    }
    let bytes = keys.bytes();
    let (head, records) = read_state(&bytes[..]).expect("a snapshot");
    let found: Vec<_> = records.map(|record| record.expect("a record").key().to_vec()).collect();
    assert_eq!((head.index, found), (12, ORDERED.map(<[u8]>::to_vec).to_vec()));
    let mut restored = self::keys();
    restored.restore(&mut &bytes[..]).expect("a snapshot");
    assert_eq!(restored.bytes(), bytes);
}

#[test]
fn a_deleted_key_leaves_nothing_but_the_applied_index() {
    let mut keys = keys();
    keys.write(1, b"/a", b"1");
    assert!(keys.delete(2, b"/a").outcome.existed(0));
    assert!(!keys.delete(3, b"/a").outcome.existed(0));
    assert_eq!(keys.get(b"/a"), None);
    let state = keys.shared.state();
    assert_eq!((state.records.len(), state.records.bytes(), state.applied), (0, 0, (3, 2)));
}

#[test]
fn conditions_hold_for_the_last_write_of_a_key() {
    let mut keys = keys();
    keys.write(5, b"/a", b"1");
    for (is, of_a, of_b) in [
        (Requirement::Absent, false, true),
        (Requirement::Exists, true, false),
        (Requirement::WrittenAt(vec![4, 5]), true, false),
        (Requirement::WrittenAt(vec![4]), false, false),
        (Requirement::WrittenAt(vec![]), false, false),
        (Requirement::NotWrittenAt(vec![5]), false, true),
        (Requirement::NotWrittenAt(vec![4]), true, true),
    ] {
        for (key, holds) in [(&b"/a"[..], of_a), (b"/b", of_b)] {
            let txn = Txn { conditions: vec![on(key, is.clone())], ..Txn::default() };
            assert_eq!(keys.txn(6, txn).outcome.succeeded, holds, "{is:?} {key:?}");
        }
    }
}

#[test]
fn a_transaction_carries_out_one_branch_in_one_step() {
    let mut keys = keys();
    keys.write(1, b"/a", b"old");
    let txn = |absent| Txn {
        conditions: vec![on(b"/a", Requirement::Exists), on(absent, Requirement::Absent)],
        then: vec![
            Operation::Put { key: b"/new", value: b"n" },
            Operation::Put { key: b"/a", value: b"new" },
            Operation::Get { key: b"/b" },
        ],
        otherwise: vec![Operation::Get { key: b"/a" }, Operation::Delete { key: b"/a" }],
    };
    let done = keys.txn(2, txn(b"/b"));
    assert_eq!((done.outcome.succeeded, done.outcome.existed), (true, 0b010));
    assert!(matches!(&done.read[..], [None]));
    assert_eq!(keys.get(b"/a"), Some((b"new".to_vec(), 2)));
    let done = keys.txn(3, txn(b"/new"));
    assert_eq!((done.outcome.succeeded, done.outcome.existed), (false, 0b11));
    assert_eq!(done.read[0].as_ref().map(KeyValue::value), Some(&b"new"[..]));
    assert_eq!((keys.get(b"/a"), keys.get(b"/new")), (None, Some((b"n".to_vec(), 2))));
    let (put, removed) = (false, true);
    assert_eq!(
        keys.changes(Cursor::after(1), b"/"),
        Some(vec![
            (2, 0, "/new".into(), put),
            (2, 1, "/a".into(), put),
            (3, 0, "/a".into(), removed)
        ])
    );
}

#[test]
fn a_write_with_a_token_is_carried_out_once() {
    let mut keys = keys_remembering(2);
    let write = |value, index, random| {
        let put = Txn::of(Operation::Put { key: b"/a", value });
        put.encode(Some(Token { index, random }))
    };
    let first = keys.run(5, &write(b"1", 4, 1)).expect("it is new");
    keys.write(6, b"/a", b"2");
    let again = keys.run(7, &write(b"1", 4, 1)).expect("it is known");
    assert_eq!((again.outcome, again.is_replay, first.is_replay), (first.outcome, true, false));
    assert_eq!(keys.get(b"/a"), Some((b"2".to_vec(), 6)));
    let other = keys.run(8, &write(b"other", 4, 1));
    assert!(matches!(other, Err(RequestError::Unprocessable(_))), "{other:?}");

    // A member that has only the snapshot knows the same.
    let mut restored = keys_remembering(2);
    restored.restore(&mut &keys.bytes()[..]).expect("a snapshot");
    for keys in [&mut keys, &mut restored] {
        let again = keys.run(9, &write(b"1", 4, 1)).expect("it is known");
        assert_eq!(again.outcome, first.outcome);
        // Two more writes displace it.
        for index in [10, 11] {
            keys.run(index, &write(b"3", 9, index)).expect("it is new");
        }
        let forgotten = keys.run(12, &write(b"1", 4, 1));
        assert!(matches!(forgotten, Err(RequestError::Conflict(_))), "{forgotten:?}");
    }
    assert_eq!(keys.bytes(), restored.bytes());
}

/// The outcome that is remembered is that of the conditions then, not now.
#[test]
fn a_failed_condition_is_an_outcome_too() {
    let mut keys = keys();
    let create = || {
        let conditions = vec![on(b"/a", Requirement::Absent)];
        let put = Txn { conditions, ..Txn::of(Operation::Put { key: b"/a", value: b"v" }) };
        put.encode(Some(Token { index: 1, random: 1 }))
    };
    keys.write(2, b"/a", b"1");
    assert!(!keys.run(3, &create()).expect("it is new").outcome.succeeded);
    keys.delete(4, b"/a");
    assert!(!keys.run(5, &create()).expect("it is known").outcome.succeeded);
    assert_eq!(keys.get(b"/a"), None);
}

#[test]
fn a_page_is_the_keys_after_a_key_below_a_prefix() {
    let mut keys = keys();
    for (index, key) in (1..).zip([&b"/a"[..], b"/a/1", b"/a/2", b"/a/3", b"/b"]) {
        keys.write(index, key, b"vv");
    }
    let store = store(&keys);
    let page = |prefix: &[u8], after: Option<&[u8]>, limit, bytes| {
        let size = |record: &KeyValue| record.bytes();
        let Page { index, records, has_more } = store.page(prefix, after, limit, bytes, size);
        assert_eq!(index, 5);
        let keys = records.iter().map(|record| String::from_utf8_lossy(record.key()).into_owned());
        (keys.collect::<Vec<_>>().join(" "), has_more)
    };
    assert_eq!(page(b"", None, 9, 999), ("/a /a/1 /a/2 /a/3 /b".into(), false));
    assert_eq!(page(b"/a/", None, 2, 999), ("/a/1 /a/2".into(), true));
    assert_eq!(page(b"/a/", Some(b"/a/2"), 2, 999), ("/a/3".into(), false));
    assert_eq!(page(b"/a/", Some(b"/"), 9, 999), ("/a/1 /a/2 /a/3".into(), false));
    assert_eq!(page(b"/a/", Some(b"/b"), 9, 999), (String::new(), false));
    assert_eq!(page(b"", None, 9, 5), ("/a /a/1".into(), true), "a page ends after its bytes");
    assert_eq!(page(b"/c", None, 9, 999), (String::new(), false));
}

#[test]
fn a_page_shows_the_last_write_of_short_and_long_keys() {
    assert!(ORDERED.is_sorted());
    let mut keys = keys();
    for (index, key) in (1..).zip(ORDERED.iter().rev().chain(&ORDERED)) {
        keys.write(index, key, b"value");
    }
    let (removed, kept): (Vec<_>, Vec<_>) =
        (13..).zip(ORDERED).partition(|(index, _)| index % 3 == 0);
    for (index, (_, key)) in (30..).zip(removed) {
        keys.delete(index, key);
    }
    let page = store(&keys).page(b"", None, 99, usize::MAX, KeyValue::bytes);
    let found: Vec<_> = page.records.iter().map(|it| (it.index(), it.key())).collect();
    assert_eq!(found, kept);
}

#[test]
fn a_watcher_resumes_after_any_change_within_an_entry() {
    let mut keys = keys();
    let put = |key| Operation::Put { key, value: b"v" };
    keys.txn(1, Txn { then: vec![put(b"/a"), put(b"/b"), put(b"/a/1")], ..Txn::default() });
    keys.write(2, b"/a", b"v");
    let all = keys.changes(Cursor::default(), b"").expect("all are kept");
    assert_eq!(all.len(), 4);
    for (n, (index, position, ..)) in all.iter().enumerate() {
        let cursor = Cursor { index: *index, position: *position };
        assert_eq!(keys.changes(cursor, b"").expect("kept"), all[n + 1..]);
    }
    let below = keys.changes(Cursor { index: 1, position: 0 }, b"/a").expect("kept");
    let (first, second) = ((1, 2, "/a/1".to_owned(), false), (2, 0, "/a".to_owned(), false));
    assert_eq!(below, [first, second], "positions count before the filter");
    assert_eq!(keys.changes(Cursor::after(7), b""), Some(vec![]), "it waits");
}

/// Short ones are copied one after another, long ones are shared with the record.
#[test]
fn a_change_has_its_key_and_value_however_long() {
    let mut keys = keys();
    let lengths: Vec<usize> = (0..2000).collect();
    for (index, length) in (1..).zip(&lengths) {
        keys.write(index, b"/key", &vec![*length as u8; *length]);
    }
    let state = keys.shared.state();
    let Changes::Kept(changes, _) = state.history.after(Cursor::after(1000), b"", 1000) else {
        panic!("all are kept");
    };
    assert_eq!(changes.len(), 1000);
    for (change, length) in changes.iter().zip(&lengths[1000..]) {
        assert_eq!((change.key(), change.term()), (&b"/key"[..], 2));
        assert_eq!(change.value(), vec![*length as u8; *length]);
    }
}

#[test]
fn who_keeps_no_changes_tells_every_watcher_so() {
    let mut keys = keys();
    store(&keys).keep_no_changes();
    keys.write(1, b"/a", b"v");
    let bytes = keys.bytes();
    keys.restore(&mut &bytes[..]).expect("a snapshot");
    keys.write(2, b"/a", b"v");
    for cursor in [Cursor::default(), Cursor::after(1), Cursor::after(2), Cursor::after(3)] {
        assert_eq!(keys.changes(cursor, b""), None);
    }
}

/// An idle cluster whose members restart from snapshots must not reset its watchers.
#[test]
fn a_watcher_that_has_seen_all_keeps_its_place() {
    let mut keys = keys();
    let put = |key| Operation::Put { key, value: b"v" };
    keys.txn(1, Txn { then: vec![put(b"/a"), put(b"/b")], ..Txn::default() });
    let mut restored = self::keys();
    restored.restore(&mut &keys.bytes()[..]).expect("a snapshot");
    let reached =
        |keys: &Keys, cursor, max| match keys.shared.state().history.after(cursor, b"", max) {
            Changes::Lost => None,
            Changes::Kept(_, reached) => Some(reached),
        };
    let (first, end) = (Cursor { index: 1, position: 0 }, Cursor::after(1));
    assert_eq!(reached(&keys, Cursor::default(), 1), Some(first));
    for cursor in [Cursor::default(), first, Cursor { index: 1, position: 1 }, end] {
        assert_eq!(reached(&keys, cursor, 9), Some(end));
    }
    assert_eq!(reached(&restored, first, 9), None);
    assert_eq!(reached(&restored, end, 9), Some(end));
    assert_eq!(reached(&keys, Cursor::after(7), 9), Some(Cursor::after(7)), "it waits");
}

#[test]
fn what_a_snapshot_or_the_bound_removes_is_lost_to_watchers() {
    let mut keys = keys();
    keys.write(1, b"/a", b"v");
    keys.write(2, b"/a", b"v");
    let bytes = keys.bytes();
    keys.write(3, b"/a", b"v");
    let mut restored = self::keys();
    restored.restore(&mut &bytes[..]).expect("a snapshot");
    restored.write(3, b"/a", b"v");
    assert_eq!(restored.changes(Cursor::after(1), b""), None);
    assert_eq!(restored.changes(Cursor::after(2), b"").map(|changes| changes.len()), Some(1));
    // 17 values of 1 MiB exceed 16 MiB.
    let value = vec![0; 1 << 20];
    for index in 4..21 {
        keys.write(index, b"/a", &value);
    }
    assert_eq!(keys.changes(Cursor::after(4), b""), None);
    assert_eq!(keys.changes(Cursor::after(5), b"").map(|changes| changes.len()), Some(15));
    // One that is larger than all is kept alone.
    keys.write(21, b"/a", &vec![0; 17 << 20]);
    assert_eq!(keys.changes(Cursor::after(19), b""), None);
    assert_eq!(keys.changes(Cursor::after(20), b"").map(|changes| changes.len()), Some(1));
}
