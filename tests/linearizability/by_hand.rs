//! Small histories, each for one rule.

use crate::support::linearizability::{Operation, check};
use crate::{is_linearizable, read, unknown_write, write};

#[test]
fn reads_between_writes_return_the_last_one() {
    assert!(is_linearizable(&[]));
    assert!(is_linearizable(&[
        read(None, 0, 1),
        write(1, 2, 3),
        read(1, 4, 5),
        read(1, 6, 7),
        write(2, 8, 9),
        read(2, 10, 11),
    ]));
}

#[test]
fn a_stale_read_is_found() {
    assert!(!is_linearizable(&[write(1, 0, 1), write(2, 2, 3), read(1, 4, 5)]));
}

#[test]
fn a_lost_write_is_found() {
    assert!(!is_linearizable(&[write(1, 0, 1), read(None, 2, 3)]));
    assert!(!is_linearizable(&[write(1, 0, 1), write(2, 2, 3), read(2, 4, 5), read(1, 6, 7)]));
}

#[test]
fn a_lost_write_is_found_by_older_values_read_around_it() {
    assert!(!is_linearizable(&[write(1, 0, 1), read(1, 2, 3), write(2, 4, 5), read(1, 6, 7)]));
}

#[test]
fn a_value_that_comes_back_is_found() {
    let writes = [write(1, 0, 9), write(2, 0, 9)];
    let reads = [read(1, 1, 2), read(2, 3, 4), read(1, 5, 6)];
    assert!(!is_linearizable(&[&writes[..], &reads[..]].concat()));
    assert!(is_linearizable(&[&writes[..], &reads[..2]].concat()));
}

#[test]
fn the_initial_state_does_not_come_back() {
    assert!(is_linearizable(&[write(1, 0, 9), read(None, 1, 2), read(1, 3, 4)]));
    assert!(!is_linearizable(&[write(1, 0, 9), read(1, 1, 2), read(None, 3, 4)]));
}

#[test]
fn a_read_from_the_future_is_found() {
    assert!(!is_linearizable(&[read(1, 0, 1), write(1, 2, 3)]));
    assert!(!is_linearizable(&[read(1, 0, 1), unknown_write(1, 2)]));
}

#[test]
fn a_value_that_nobody_wrote_is_found() {
    assert!(!is_linearizable(&[write(1, 0, 1), read(7, 2, 3)]));
}

#[test]
fn a_split_brain_is_found() {
    // Each half of the cluster serves its own clients without a fault.
    let left = [write(1, 0, 2), read(1, 4, 6), read(1, 8, 10)];
    let right = [write(2, 1, 3), read(2, 5, 7), read(2, 9, 11)];
    assert!(is_linearizable(&left));
    assert!(is_linearizable(&right));
    assert!(!is_linearizable(&[left, right].concat()));
}

#[test]
fn two_readers_see_concurrent_writes_in_the_same_order() {
    let writes = [write(1, 0, 2), write(2, 0, 2)];
    let one = [read(1, 0, 3), read(2, 4, 5)];
    let other = [read(2, 0, 3), read(1, 4, 5)];
    assert!(is_linearizable(&[&writes[..], &one[..]].concat()));
    assert!(is_linearizable(&[&writes[..], &other[..]].concat()));
    assert!(!is_linearizable(&[&writes[..], &one[..], &other[..]].concat()));
}

#[test]
fn concurrent_writes_take_effect_in_any_order() {
    let writes = [write(1, 0, 20), write(2, 0, 20), write(3, 0, 20)];
    let reads = [read(3, 1, 2), read(1, 3, 4), read(2, 5, 6)];
    assert!(is_linearizable(&[&writes[..], &reads[..]].concat()));
}

#[test]
fn a_write_that_someone_has_seen_stays_seen_before_its_answer() {
    let history = [write(1, 0, 1), write(2, 2, 20), read(2, 3, 4), read(1, 5, 6)];
    assert!(!is_linearizable(&history));
}

#[test]
fn a_write_takes_effect_between_two_reads_of_another_value() {
    // While 1 is held there is no room for 2; at its edge there is.
    let held = [write(1, 0, 10), read(1, 20, 30)];
    assert!(!is_linearizable(&[&held[..], &[write(2, 11, 19)]].concat()));
    assert!(is_linearizable(&[&held[..], &[write(2, 10, 19)]].concat()));
    assert!(is_linearizable(&[&held[..], &[write(2, 11, 20)]].concat()));
}

#[test]
fn an_unknown_write_that_nobody_read_may_have_failed() {
    assert!(is_linearizable(&[write(1, 0, 1), unknown_write(2, 2), read(1, 100, 101)]));
}

#[test]
fn an_unknown_write_may_take_effect_long_after() {
    assert!(is_linearizable(&[
        unknown_write(1, 0),
        write(2, 1, 2),
        read(2, 3, 4),
        write(3, 5, 6),
        read(3, 7, 8),
        read(1, 1_000, 1_001),
    ]));
}

#[test]
fn an_unknown_write_takes_effect_once() {
    let history =
        [unknown_write(1, 0), read(1, 1, 2), write(2, 3, 4), read(2, 5, 6), read(1, 7, 8)];
    assert!(!is_linearizable(&history));
    assert!(is_linearizable(&history[..4]));
}

#[test]
fn an_unknown_write_that_was_read_stays() {
    let history = [write(1, 0, 1), unknown_write(2, 2), read(2, 3, 4), read(1, 5, 6)];
    assert!(!is_linearizable(&history));
    assert!(is_linearizable(&history[..3]));
}

#[test]
fn operations_whose_times_touch_are_concurrent() {
    assert!(is_linearizable(&[write(1, 0, 5), read(None, 5, 6)]));
    assert!(!is_linearizable(&[write(1, 0, 5), read(None, 6, 7)]));
    assert!(is_linearizable(&[read(1, 0, 5), write(1, 5, 6)]));
    assert!(!is_linearizable(&[read(1, 0, 4), write(1, 5, 6)]));
    // Two values, each held until the other starts.
    assert!(is_linearizable(&[write(1, 0, 2), read(1, 5, 6), write(2, 3, 5), read(2, 6, 7)]));
    assert!(!is_linearizable(&[write(1, 0, 2), read(1, 5, 6), write(2, 3, 4), read(2, 6, 7)]));
    // All at one instant.
    assert!(is_linearizable(&[write(1, 5, 5), read(None, 5, 5), read(2, 5, 5), write(2, 5, 5)]));
}

#[test]
fn the_first_and_the_last_time_are_times_like_others() {
    let end = u64::MAX;
    assert!(!is_linearizable(&[write(1, 0, 0), read(None, 1, 1)]));
    assert!(is_linearizable(&[write(1, 0, 0), read(None, 0, 0)]));
    assert!(is_linearizable(&[unknown_write(1, 0), write(2, 0, end - 1), read(1, end, end)]));
    assert!(!is_linearizable(&[write(1, 0, 1), write(2, 2, end - 1), read(1, end, end)]));
}

#[test]
#[should_panic(expected = "a value is written twice")]
fn a_value_written_twice_is_no_history() {
    let _ = check(&[write(1, 0, 1), unknown_write(1, 2)]);
}

#[test]
#[should_panic(expected = "a read without an answer says nothing")]
fn a_read_without_an_answer_is_no_history() {
    let _ = check(&[Operation { completed: None, ..read(1, 0, 1) }]);
}

#[test]
#[should_panic(expected = "ended before it started")]
fn an_operation_that_ends_before_it_starts_is_no_history() {
    let _ = check(&[write(1, 5, 4)]);
}

#[test]
fn a_violation_shows_the_operations_that_make_it() {
    let show = |history: &[Operation<u32>]| check(history).unwrap_err().to_string();
    let reads = (0..50).map(|time| read(1, 10 + time, 12 + time));
    let history: Vec<_> = [write(1, 0, 1), read(None, 0, 2), write(2, 70, 75), read(2, 76, 80)]
        .into_iter()
        .chain(reads)
        .chain([read(1, 90, 95), unknown_write(3, 96), read(3, 97, 98)])
        .collect();
    assert_eq!(
        show(&history),
        "not linearizable: 1 must come before 2, and 2 before 1\n  \
         0..1 client 1 wrote 1\n  \
         70..75 client 1 wrote 2\n  \
         90..95 client 3 read 1"
    );
    assert_eq!(
        show(&[unknown_write(1, 0), read(1, 2, 3), read(None, 5, 6)]),
        "not linearizable: the initial state must come before 1, and 1 before the initial state\n  \
         0..? client 2 wrote 1\n  \
         2..3 client 3 read 1\n  \
         5..6 client 3 read nothing"
    );
    assert_eq!(
        show(&[write(1, 5, 6), read(1, 3, 4)]),
        "not linearizable: the read of 1 ended before its write started\n  \
         3..4 client 3 read 1\n  \
         5..6 client 1 wrote 1"
    );
    assert_eq!(
        show(&[write(1, 5, 6), read(7, 3, 4)]),
        "not linearizable: nobody wrote 7\n  3..4 client 3 read 7"
    );
}
