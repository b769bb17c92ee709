use std::fs;
use std::io::Write;

use tempfile::TempDir;

use super::*;
use crate::storage::DiskVfs;
use crate::storage::failing::FailingVfs;

const ID: SnapshotId = SnapshotId { index: 10_001, term: 2 };
const META: &[u8] = b"members, removed ids, ConfState";

fn snapshotter(dir: &TempDir) -> Snapshotter {
    Snapshotter::new(FailingVfs::sound(), &dir.path().join("snap")).expect("a directory")
}

fn names(snapshotter: &Snapshotter) -> Vec<String> {
    DiskVfs.list(&snapshotter.dir).expect("a directory")
}

fn save(snapshotter: &Snapshotter, id: SnapshotId, application: &[u8]) -> SnapshotFile {
    snapshotter.create(id, META, |out| out.write_all(application)).expect("made")
}

fn read_all(mut reader: Box<dyn Read + Send>) -> Vec<u8> {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).expect("read");
    bytes
}

fn receive(snapshotter: &Snapshotter, bytes: &[u8], expected: SnapshotFile) -> Received {
    let mut receiver = snapshotter.receive(ID.index, ID.term, expected).expect("a file");
    for piece in bytes.chunks(7) {
        receiver.write(piece).expect("written");
    }
    receiver.finish().expect("the disk is sound")
}

#[test]
fn a_snapshot_is_read_as_it_was_written() {
    let dir = TempDir::new().expect("a directory");
    let snapshotter = snapshotter(&dir);
    // Longer than the buffer, in pieces of different lengths.
    let application: Vec<u8> = (0..3_000_000_u32).map(|number| (number % 251) as u8).collect();
    let pieces = [&application[..1], &application[1..2_500_000], &application[2_500_000..]];
    let file = snapshotter
        .create(ID, META, |out| pieces.iter().try_for_each(|piece| out.write_all(piece)))
        .expect("made");

    assert_eq!(names(&snapshotter), ["0000000000000002-0000000000002711.snap"]);
    let on_disk = fs::read(snapshotter.path(ID)).expect("a file");
    assert_eq!(file.length, on_disk.len() as u64);
    assert_eq!(file.checksum, crc32c::crc32c(&on_disk));
    let snapshot = snapshotter.load(ID).expect("a snapshot");
    assert_eq!((snapshot.index, snapshot.term), (ID.index, ID.term));
    assert_eq!((snapshot.meta.as_slice(), snapshot.file), (META, file));
    assert!(read_all(snapshot.reader) == application);
    let (length, raw) = snapshotter.open_raw(ID.index, ID.term).expect("a snapshot");
    assert_eq!(length, file.length);
    assert!(read_all(raw) == on_disk);
}

#[test]
fn different_snapshots_have_different_file_checksums() {
    let dir = TempDir::new().expect("a directory");
    let snapshotter = snapshotter(&dir);
    let other = SnapshotId { index: ID.index + 1, ..ID };
    let files = [(ID, "a"), (ID, "b"), (other, "a")]
        .map(|(id, state)| save(&snapshotter, id, state.as_bytes()).checksum);
    assert!(files[0] != files[1] && files[1] != files[2] && files[0] != files[2], "{files:x?}");
}

#[test]
fn a_snapshot_may_have_an_empty_state() {
    let dir = TempDir::new().expect("a directory");
    let snapshotter = snapshotter(&dir);
    let id = SnapshotId { index: 1, term: 1 };
    snapshotter.create(id, b"", |_| Ok(())).expect("made");
    let snapshot = snapshotter.load(id).expect("a snapshot");
    assert_eq!(snapshot.meta, b"");
    assert_eq!(read_all(snapshot.reader), b"");
}

#[test]
fn a_change_of_any_bit_is_refused_naming_file_and_offset() {
    let dir = TempDir::new().expect("a directory");
    let snapshotter = snapshotter(&dir);
    save(&snapshotter, ID, b"the state of the application");
    let path = snapshotter.path(ID);
    let whole = fs::read(&path).expect("a file");
    let file = DiskVfs.open(&path).expect("a file");
    for bit in 0..whole.len() * 8 {
        let at = bit / 8;
        file.write_all_at(&[whole[at] ^ (1 << (bit % 8))], at as u64).expect("written");
        match snapshotter.load(ID) {
            Err(Error::Corrupt { path: named, offset, .. }) => {
                assert_eq!(named, path);
                assert!(offset < whole.len() as u64);
            }
            Err(other) => panic!("bit {bit}: {other}"),
            Ok(_) => panic!("bit {bit}: accepted"),
        }
        file.write_all_at(&whole[at..=at], at as u64).expect("written");
    }
}

#[test]
fn a_file_of_any_other_length_is_refused() {
    let dir = TempDir::new().expect("a directory");
    let snapshotter = snapshotter(&dir);
    save(&snapshotter, ID, b"the state of the application");
    let path = snapshotter.path(ID);
    let whole = fs::read(&path).expect("a file");
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).expect("written");
        assert!(matches!(snapshotter.load(ID), Err(Error::Corrupt { .. })), "{length} bytes");
    }
    fs::write(&path, [whole.as_slice(), b"\0"].concat()).expect("written");
    assert!(matches!(snapshotter.load(ID), Err(Error::Corrupt { .. })));
}

#[test]
fn a_file_under_another_snapshots_name_is_refused() {
    let dir = TempDir::new().expect("a directory");
    let snapshotter = snapshotter(&dir);
    save(&snapshotter, ID, b"state");
    let other = SnapshotId { index: ID.index + 1, ..ID };
    fs::rename(snapshotter.path(ID), snapshotter.path(other)).expect("renamed");
    let error = snapshotter.load(other).err().expect("refused");
    assert!(error.to_string().contains("is damaged at offset 16"), "{error}");
}

#[test]
fn a_missing_snapshot_is_an_io_error() {
    let dir = TempDir::new().expect("a directory");
    assert!(matches!(snapshotter(&dir).load(ID), Err(Error::Io { .. })));
}

#[test]
fn a_purge_keeps_named_snapshots_and_open_readers() {
    let dir = TempDir::new().expect("a directory");
    let snapshotter = snapshotter(&dir);
    let ids = [(1, 10), (1, 200), (2, 150), (3, 300)];
    let ids = ids.map(|(term, index)| SnapshotId { index, term });
    for id in ids.iter().rev() {
        save(&snapshotter, *id, &id.index.to_le_bytes());
    }
    assert_eq!(snapshotter.list().expect("listed"), ids);
    snapshotter.set_broken(ids[2]).expect("set aside");
    let read_meanwhile = snapshotter.load(ids[0]).expect("a snapshot");

    let purge = |_: &mut dyn Write| {
        snapshotter.purge(&ids[2..]).expect("purged");
        assert_eq!(snapshotter.list().expect("listed"), ids[3..]);
        Ok(())
    };
    snapshotter.create(SnapshotId { index: 400, term: 3 }, META, purge).expect("made");
    assert_eq!(read_all(read_meanwhile.reader), 10_u64.to_le_bytes());
    assert_eq!(
        names(&snapshotter),
        [
            "0000000000000002-0000000000000096.snap.broken",
            "0000000000000003-000000000000012c.snap",
            "0000000000000003-0000000000000190.snap",
        ]
    );
}

#[test]
fn set_broken_renames_a_damaged_snapshot() {
    let dir = TempDir::new().expect("a directory");
    let snapshotter = snapshotter(&dir);
    save(&snapshotter, ID, b"state");
    let broken = snapshotter.set_broken(ID).expect("set aside");
    assert!(broken.ends_with("0000000000000002-0000000000002711.snap.broken"));
    assert!(broken.exists());
    assert_eq!(snapshotter.list().expect("listed"), []);
}

#[test]
fn a_failed_writer_or_a_dropped_receiver_removes_its_file() {
    let dir = TempDir::new().expect("a directory");
    let snapshotter = snapshotter(&dir);
    let expected = SnapshotFile { length: 100, checksum: 0 };
    let made = snapshotter.create(ID, META, |out| {
        out.write_all(&[1; 2 << 20])?;
        let mut receiver = snapshotter.receive(ID.index, ID.term, expected).expect("a file");
        receiver.write(b"some").expect("written");
        assert_eq!(names(&snapshotter).len(), 2, "two temporary files with different names");
        drop(receiver);
        assert_eq!(names(&snapshotter).len(), 1);
        Err(io::ErrorKind::Other.into())
    });
    assert!(matches!(made, Err(Error::Io { .. })));
    assert_eq!(names(&snapshotter), [""; 0]);
}

#[test]
fn a_start_removes_temporary_snapshots_and_nothing_else() {
    let dir = TempDir::new().expect("a directory");
    let before = snapshotter(&dir);
    save(&before, ID, b"state");
    fs::write(before.dir.join("notes.tmp"), b"not ours").expect("written");
    // A crash runs no destructors.
    let expected = SnapshotFile { length: 100, checksum: 0 };
    std::mem::forget(before.receive(20_000, 2, expected).expect("a temporary file"));
    assert_eq!(names(&before).len(), 3);
    let after = snapshotter(&dir);
    assert_eq!(names(&after), ["0000000000000002-0000000000002711.snap", "notes.tmp"]);
}

#[test]
fn a_file_received_is_the_file_sent() {
    let dirs = [TempDir::new().expect("a directory"), TempDir::new().expect("a directory")];
    let [sender, receiver] = dirs.each_ref().map(snapshotter);
    let file = save(&sender, ID, b"state");
    let sent = fs::read(sender.path(ID)).expect("a file");
    assert_eq!(receive(&receiver, &sent, file), Received::Kept);
    let snapshot = receiver.load(ID).expect("a snapshot");
    assert_eq!((snapshot.meta.as_slice(), snapshot.file), (META, file));
    assert_eq!(read_all(snapshot.reader), b"state");
}

#[test]
fn wrong_bytes_from_a_peer_are_refused_and_removed() {
    let dir = TempDir::new().expect("a directory");
    let snapshotter = snapshotter(&dir);
    let file = save(&snapshotter, ID, b"state");
    let sent = fs::read(snapshotter.path(ID)).expect("a file");
    let other = SnapshotId { term: ID.term + 1, ..ID };
    let other_file = save(&snapshotter, other, b"state");
    let other_sent = fs::read(snapshotter.path(other)).expect("a file");
    snapshotter.purge(&[]).expect("purged");

    let mut flipped = sent.clone();
    flipped[40] ^= 1;
    let flipped_file = SnapshotFile { checksum: crc32c::crc32c(&flipped), ..file };
    let short_file = SnapshotFile { length: 3, checksum: crc32c::crc32c(&sent[..3]) };
    let cases: [(&str, &[u8], SnapshotFile); 6] = [
        ("too short", &sent[..sent.len() - 1], file),
        ("too long", &[sent.as_slice(), b"!"].concat(), file),
        ("not what was announced", &flipped, file),
        ("announced, but damaged", &flipped, flipped_file),
        ("announced, but no snapshot", &sent[..3], short_file),
        ("announced, but another snapshot", &other_sent, other_file),
    ];
    for (case, bytes, expected) in cases {
        let received = receive(&snapshotter, bytes, expected);
        assert!(matches!(received, Received::Refused(_)), "{case}: {received:?}");
        assert_eq!(names(&snapshotter), [""; 0], "{case}");
    }
}

#[test]
fn each_disk_failure_is_an_error_and_no_write_is_repeated() {
    let mut failures = 0;
    for operations in 0.. {
        let dir = TempDir::new().expect("a directory");
        let vfs = FailingVfs::sound();
        let snapshotter = Snapshotter::new(vfs.clone(), dir.path()).expect("a directory");
        vfs.fail_after(operations);
        let mut was_written = true;
        let made = snapshotter.create(ID, META, |out| {
            was_written = out.write_all(&[7; 3 << 20]).is_ok();
            if !was_written {
                // The disk works again, or seems to.
                vfs.fail_after(u64::MAX);
            }
            Ok(())
        });
        assert!(was_written || made.is_err(), "a failed write was ignored");
        match made {
            Ok(_) => break,
            Err(error) => assert!(matches!(error, Error::Io { .. }), "{error}"),
        }
        failures += 1;
    }
    let what =
        "a create, five writes, three syncs between them, a sync, a rename, a directory sync";
    assert_eq!(failures, 12, "{what}");
}
