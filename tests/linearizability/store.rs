//! The checker that knows the log: each kind of fault by a small history, and random histories that a search
//! judges too.

use std::collections::BTreeMap;
use std::rc::Rc;

use proptest::collection::vec;
use proptest::prelude::*;

use crate::random::{Verdicts, for_all};
use crate::support::linearizability::search_orders;
use crate::support::store::{
    Answer, Change, Done, Fate, Found, Looked, Model, Page, Record, Refusal, Replay, Requirement,
    Sent, Step, Token, Violation, Watched, Write, after,
};

/// Writes, which are in the log at the indexes 1, 2, 3, …, and what the clients saw.
#[derive(Clone, Debug, Default)]
struct History {
    log: Vec<Write>,
    /// Other writes that were sent.
    unmade: Vec<Write>,
    sent: Vec<Sent>,
    looked: Vec<Looked>,
}

const TOKENS_MAX: usize = 2;

impl History {
    /// Equal writes are one.
    fn id(&self, write: &Write) -> u64 {
        let all = self.log.iter().chain(&self.unmade);
        all.clone().position(|other| other == write).expect("it is one of them") as u64
    }

    fn replay(&self) -> Replay {
        let all = self.log.iter().chain(&self.unmade);
        let writes: BTreeMap<u64, Rc<Write>> =
            all.map(|write| (self.id(write), Rc::new(write.clone()))).collect();
        let log = (1..).zip(&self.log).map(|(index, write)| (index, 1, self.id(write)));
        Replay::new(log, &writes, TOKENS_MAX, 0)
    }

    fn check(&self) -> Result<(), Violation> {
        let replay = self.replay();
        replay.check_sent(&self.sent)?;
        replay.check_looked(&self.looked, &self.sent)
    }

    /// Appends a write to the log, answered as the model says.
    fn write(&mut self, write: Write, invoked: u64, completed: u64) -> Answer {
        self.log.push(write.clone());
        let mut model = Model::new(TOKENS_MAX);
        let answers = (1..).zip(&self.log);
        let last = answers.map(|(index, write)| model.apply(index, 1, &Rc::new(write.clone())).0);
        let answer = last.last().expect("there is one");
        let fate = Fate::Answered(self.log.len() as u64, answer.clone());
        self.send(&write, invoked, completed, fate);
        answer
    }

    fn send(&mut self, write: &Write, invoked: u64, completed: u64, fate: Fate) {
        let write = self.id(write);
        self.sent.push(Sent { write, invoked, completed, fate });
    }

    fn look(&mut self, found: Found, invoked: u64, completed: u64) {
        self.looked.push(Looked { invoked, completed, found });
    }

    fn read(&mut self, key: &str, record: Option<(u64, u64)>, invoked: u64, completed: u64) {
        self.look(Found::Key(key.into(), record.map(self::record)), invoked, completed);
    }

    fn last_answer(&mut self) -> &mut Answer {
        match &mut self.sent.last_mut().expect("there is one").fate {
            Fate::Answered(_, answer) => answer,
            other => panic!("{other:?}"),
        }
    }

    fn violation(&self) -> Violation {
        self.check().expect_err("it is a violation")
    }
}

fn record((value, index): (u64, u64)) -> Record {
    Record { value, index, term: 1 }
}

fn put(key: &str, value: u64) -> Write {
    Write { then: vec![Step::Put(key.into(), value)], ..Write::default() }
}

fn delete(key: &str) -> Write {
    Write { then: vec![Step::Delete(key.into())], ..Write::default() }
}

fn swap(key: &str, at: u64, value: u64) -> Write {
    Write { conditions: vec![(key.into(), Requirement::WrittenAt(vec![at]))], ..put(key, value) }
}

fn with_token(write: Write, index: u64, random: u64) -> Write {
    Write { token: Some(Token { index, random }), ..write }
}

fn is_done(answer: &Answer) -> (u64, bool, bool) {
    match answer {
        Answer::Done { done, is_replay, .. } => (done.index, done.succeeded, *is_replay),
        other => panic!("{other:?}"),
    }
}

fn page(index: u64, records: &[(&str, (u64, u64))]) -> Found {
    let records = records.iter().map(|(key, found)| ((*key).into(), record(*found))).collect();
    let (prefix, after, limit, has_more) = ("".into(), None, 9, false);
    Found::Page(Page { prefix, after, limit, index, records, has_more })
}

#[test]
fn a_history_of_the_model_passes() {
    let mut history = History::default();
    history.write(put("a", 1), 0, 1);
    history.write(put("b", 2), 2, 9);
    history.read("b", None, 3, 4);
    history.read("b", Some((2, 2)), 3, 4);
    history.look(page(2, &[("a", (1, 1)), ("b", (2, 2))]), 5, 6);
    assert!(is_done(&history.write(swap("a", 1, 3), 10, 11)).1);
    assert!(!is_done(&history.write(swap("a", 1, 4), 12, 13)).1);
    history.write(delete("a"), 14, 15);
    history.read("a", None, 16, 17);
    history.look(Found::Applied(5), 16, 17);
    assert_eq!(history.check(), Ok(()));
}

#[test]
fn an_answered_write_that_is_not_in_the_log_is_lost() {
    let mut history = History::default();
    history.write(put("a", 1), 0, 1);
    assert_eq!(history.check(), Ok(()));
    history.unmade.extend(history.log.pop());
    assert!(history.violation().contains("is lost"));
    history.sent[0].fate = Fate::Accepted;
    assert!(history.violation().contains("is lost"));
    history.sent[0].fate = Fate::Unknown;
    assert_eq!(history.check(), Ok(()));
}

#[test]
fn a_write_that_was_answered_503_is_not_in_the_log() {
    let mut history = History::default();
    history.write(put("a", 1), 0, 1);
    history.sent[0].fate = Fate::Unknown;
    assert_eq!(history.check(), Ok(()));
    history.sent[0].fate = Fate::Failed;
    assert!(history.violation().contains("answered 503"));
}

#[test]
fn a_stale_read_of_the_store_is_found() {
    let mut history = History::default();
    history.write(put("a", 1), 0, 1);
    history.write(put("a", 2), 2, 3);
    history.read("a", Some((1, 1)), 3, 4);
    assert_eq!(history.check(), Ok(()), "it overlaps the second write");
    history.read("a", Some((1, 1)), 4, 5);
    assert!(history.violation().contains("stale"));
}

#[test]
fn a_read_that_goes_back_is_found() {
    let mut history = History::default();
    history.write(put("a", 1), 0, 1);
    history.write(put("a", 2), 2, 20);
    history.read("a", Some((2, 2)), 3, 4);
    history.read("a", Some((1, 1)), 4, 5);
    assert_eq!(history.check(), Ok(()), "the reads overlap");
    history.read("a", Some((1, 1)), 5, 6);
    assert!(history.violation().contains("stale"));
}

#[test]
fn a_read_of_a_deleted_key_is_found() {
    let mut history = History::default();
    history.write(put("a", 1), 0, 1);
    history.write(delete("a"), 2, 3);
    history.read("a", Some((1, 1)), 4, 5);
    assert!(history.violation().contains("stale"));
    history.looked.clear();
    history.read("a", None, 4, 5);
    assert_eq!(history.check(), Ok(()));
    // It was there before the write that brought it back, and not after.
    history.write(put("a", 3), 6, 7);
    history.read("a", None, 8, 9);
    assert!(history.violation().contains("stale"));
}

#[test]
fn a_read_of_a_write_that_was_sent_later_is_found() {
    let mut history = History::default();
    history.write(put("a", 1), 4, 5);
    history.read("a", Some((1, 1)), 2, 3);
    assert!(history.violation().contains("sent after its answer"));
    history.sent[0].fate = Fate::Unknown;
    assert!(history.violation().contains("sent after its answer"));
}

#[test]
fn a_read_of_a_value_that_nobody_wrote_is_found() {
    let mut history = History::default();
    history.write(put("a", 1), 0, 1);
    for wrong in [(7, 1), (1, 2)] {
        history.looked.clear();
        history.read("a", Some(wrong), 2, 3);
        history.violation();
    }
}

#[test]
fn a_swap_of_another_version_is_found() {
    let mut history = History::default();
    history.write(put("a", 1), 0, 1);
    history.write(put("a", 2), 2, 3);
    assert!(!is_done(&history.write(swap("a", 1, 3), 4, 5)).1);
    assert_eq!(history.check(), Ok(()));
    if let Answer::Done { done, .. } = history.last_answer() {
        done.succeeded = true;
    }
    assert!(history.violation().contains("the model says"));
}

#[test]
fn a_wrong_word_on_what_existed_or_was_read_is_found() {
    let mut history = History::default();
    history.write(put("a", 1), 0, 1);
    let get = Step::Get("a".into());
    history.write(Write { then: vec![get], ..delete("a") }, 2, 3);
    assert_eq!(history.check(), Ok(()));
    let right = history.last_answer().clone();
    for wrong in 0..2 {
        if let Answer::Done { done, read, .. } = history.last_answer() {
            if wrong == 0 { done.existed = 0 } else { read[0] = None }
        }
        history.violation();
        *history.last_answer() = right.clone();
    }
}

#[test]
fn a_token_that_is_carried_out_twice_is_found() {
    let mut history = History::default();
    let write = with_token(put("a", 1), 0, 7);
    history.write(write.clone(), 0, 1);
    history.write(put("a", 2), 2, 3);
    assert_eq!(is_done(&history.write(write, 4, 5)), (1, true, true));
    history.read("a", Some((2, 2)), 6, 7);
    assert_eq!(history.check(), Ok(()));
    // A store without tokens.
    let done = Done { index: 3, term: 1, succeeded: true, existed: 1 };
    *history.last_answer() = Answer::Done { done, read: Vec::new(), is_replay: false };
    assert!(history.violation().contains("the model says"));
    history.sent.last_mut().unwrap().fate = Fate::Unknown;
    history.looked.clear();
    history.read("a", Some((1, 3)), 6, 7);
    assert!(history.violation().contains("stale"));
}

#[test]
fn a_write_without_a_token_is_made_once() {
    let mut history = History::default();
    history.write(put("a", 1), 0, 1);
    history.log.push(put("a", 1));
    assert!(history.violation().contains("2 times, with 1 requests"));
    history.sent.push(history.sent[0].clone());
    assert!(history.violation().contains("answered by one entry"));
}

#[test]
fn the_model_keeps_to_the_rule_for_tokens() {
    let mut history = History::default();
    let write = |value, random| with_token(put("a", value), 0, random);
    history.write(write(1, 1), 0, 1);
    let refused = |answer| match answer {
        Answer::Refused(why) => why,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(history.write(write(2, 1), 2, 3)), Refusal::OtherWrite);
    let early = with_token(put("a", 3), 3, 2);
    assert_eq!(refused(history.write(early.clone(), 4, 5)), Refusal::NotIssued);
    assert_eq!(is_done(&history.write(early, 6, 7)), (4, true, false));
    // The table is full: the third one displaces the first.
    assert_eq!(is_done(&history.write(write(4, 3), 8, 9)), (5, true, false));
    for used_or_not in [write(1, 1), write(9, 9)] {
        assert_eq!(refused(history.write(used_or_not, 10, 11)), Refusal::TooOld);
    }
    assert_eq!(is_done(&history.write(write(4, 3), 12, 13)), (5, true, true));
    assert_eq!(history.check(), Ok(()));
}

#[test]
fn a_list_that_mixes_two_moments_is_found() {
    let mut history = History::default();
    history.write(put("a", 1), 0, 1);
    history.write(put("b", 2), 2, 9);
    history.write(put("a", 3), 3, 9);
    for (index, a, is_right) in [(2, (1, 1), true), (3, (3, 3), true), (2, (3, 3), false)] {
        history.looked.clear();
        history.look(page(index, &[("a", a), ("b", (2, 2))]), 4, 5);
        assert_eq!(history.check().is_ok(), is_right, "{a:?} at {index}");
    }
    history.looked.clear();
    history.look(page(1, &[("a", (1, 1))]), 10, 11);
    assert!(history.violation().contains("stale"));
}

#[test]
fn a_list_keeps_to_its_prefix_its_start_and_its_limit() {
    let mut history = History::default();
    for (value, key) in (1..).zip(["k/1", "k/2", "k/3", "l"]) {
        history.write(put(key, value), value, value);
    }
    let mut list = |prefix: &str, after: Option<&str>, limit, keys: &[u64], has_more| {
        let records = keys.iter().map(|key| {
            (if *key == 4 { "l".into() } else { format!("k/{key}") }, record((*key, *key)))
        });
        let (prefix, after, records) = (prefix.into(), after.map(str::to_owned), records.collect());
        let page = Page { prefix, after, limit, index: 4, records, has_more };
        history.looked = vec![Looked { invoked: 9, completed: 9, found: Found::Page(page) }];
        history.check().is_ok()
    };
    assert!(list("", None, 9, &[1, 2, 3, 4], false));
    assert!(list("k/", Some("k/1"), 1, &[2], true));
    assert!(list("k/", Some("k/2"), 1, &[3], false));
    assert!(!list("k/", None, 9, &[1, 2, 3, 4], false));
    assert!(!list("k/", Some("k/1"), 9, &[1, 2, 3], false));
    assert!(!list("k/", None, 2, &[1, 2, 3], false));
    assert!(!list("k/", None, 2, &[1, 2], false));
    assert!(!list("k/", None, 3, &[1, 2, 3], true));
}

#[test]
fn the_log_keeps_the_order_in_which_writes_were_answered() {
    let mut history = History::default();
    history.write(put("a", 1), 2, 3);
    history.write(put("b", 2), 0, 2);
    assert_eq!(history.check(), Ok(()), "they overlap");
    history.sent[1].completed = 1;
    assert!(history.violation().contains("was answered before"));
    history.sent[0].fate = Fate::Unknown;
    assert!(history.violation().contains("was answered before"));
}

#[test]
fn gaps_repetitions_and_wrong_places_of_a_watch_are_found() {
    let mut history = History::default();
    let then = ["a/1", "b", "a/2"].map(|key| Step::Put(key.into(), 1)).to_vec();
    history.write(Write { then, ..Write::default() }, 0, 1);
    history.write(delete("a/1"), 2, 3);
    history.write(delete("a/1"), 4, 5);
    let change = |index, position, key: &str, value| {
        let (place, key) = ((index, position), key.to_owned());
        Change { place, term: 1, key, value }
    };
    let right =
        [change(1, 0, "a/1", Some(1)), change(1, 2, "a/2", Some(1)), change(2, 0, "a/1", None)];
    let replay = history.replay();
    let check = |from, seen: &[Change], reached| {
        let prefix = "a/".to_owned();
        replay.check_watched(&Watched { prefix, from, seen: seen.to_vec(), reached }).is_ok()
    };
    let (begin, end) = ((0, 0), after(3));
    assert!(check(begin, &right, end));
    assert!(check((1, 0), &right[1..], (2, 0)));
    assert!(check((1, 1), &right[1..2], after(1)));
    assert!(!check(begin, &right[1..], end), "a gap at the begin");
    assert!(!check(begin, &right[..2], end), "a gap at the end");
    assert!(!check((1, 0), &right, end), "a repetition");
    assert!(!check(begin, &[&right[..1], &right[..]].concat(), end), "a repetition");
    let [first, second, third] = right;
    assert!(!check(begin, &[second.clone(), first.clone(), third.clone()], end), "the order");
    let misplaced = Change { place: (1, 1), ..second };
    assert!(!check(begin, &[first, misplaced, third], end), "a position after the filter");
}

/// Up to six writes of two keys in a log, and up to five reads, with times that fit more or less.
fn any_history() -> impl Strategy<Value = History> {
    let write = (0..8_u8, 0..2_usize, 0..4_u64, 0..6_u64, 0..6_u64, 0..12_u8);
    let read = (0..8_u8, 0..2_usize, 0..7_u64, 0..9_u64, 0..4_u64, 0..12_u8);
    (vec(write, 0..7), vec(read, 0..6)).prop_map(|(writes, reads)| {
        let mut history = History::default();
        for (number, (kind, key, with, shift, duration, fate)) in (1..).zip(writes) {
            let (own, other) = (["a", "b"][key], ["b", "a"][key]);
            let write = match kind {
                0 => delete(own),
                1..3 => swap(own, with, number),
                3 => {
                    let then = vec![Step::Get(other.into()), Step::Put(own.into(), number)];
                    let otherwise = vec![Step::Delete(own.into()), Step::Put(other.into(), number)];
                    let conditions = vec![(other.into(), Requirement::Absent)];
                    Write { conditions, then, otherwise, token: None }
                }
                // Repetitions, and tokens that are used for several writes.
                4..6 => with_token(put(own, with % 2), with / 2, with),
                _ => put(own, number),
            };
            let invoked = number + shift;
            history.write(write, invoked, invoked + duration);
            match fate {
                0 => history.sent.last_mut().unwrap().fate = Fate::Unknown,
                1 => {
                    if let Answer::Done { done, .. } = history.last_answer() {
                        done.existed ^= 1;
                    }
                }
                _ => {}
            }
        }
        for (kind, key, at, invoked, duration, fault) in reads {
            let key = ["a", "b"][key];
            let at = at.min(history.log.len() as u64);
            let cut = History { log: history.log[..at as usize].to_vec(), ..History::default() };
            let mut records = cut.replay().model.records;
            if fault == 0 {
                records.remove(key);
            }
            let found = match kind {
                0 => Found::Applied(at),
                1..3 => {
                    let records = records.into_iter().collect();
                    let (prefix, after, limit, has_more) = ("".into(), None, 9, false);
                    Found::Page(Page { prefix, after, limit, index: at, records, has_more })
                }
                _ => Found::Key(key.into(), records.get(key).cloned()),
            };
            history.look(found, invoked, invoked + duration);
        }
        history
    })
}

/// Searches for an order of the reads among the entries of the log.
fn search(history: &History) -> bool {
    // Each entry with its request. Equal writes have tokens, and may be any of their requests.
    let entries = history.sent.iter().zip(&history.log);
    let mut intervals: Vec<(u64, Option<u64>)> = entries
        .map(|(sent, write)| {
            let is_answered = matches!(sent.fate, Fate::Answered(..));
            let own = history.sent.iter().filter(|other| other.write == history.id(write));
            let first = own.map(|other| other.invoked).min().expect("it was sent");
            let invoked = if is_answered { sent.invoked } else { first };
            (invoked, is_answered.then_some(sent.completed))
        })
        .collect();
    let writes = intervals.len();
    intervals.extend(history.looked.iter().map(|read| (read.invoked, Some(read.completed))));
    search_orders(&intervals, Model::new(TOKENS_MAX), |model, operation| {
        let mut model = model.clone();
        if operation < writes {
            let index = operation as u64 + 1;
            if model.applied.0 + 1 != index {
                return None;
            }
            let (answer, _) = model.apply(index, 1, &Rc::new(history.log[operation].clone()));
            let fits = match &history.sent[operation].fate {
                Fate::Answered(_, given) => *given == answer,
                _ => true,
            };
            return fits.then_some(model);
        }
        let fits = match &history.looked[operation - writes].found {
            Found::Key(key, record) => model.records.get(key) == record.as_ref(),
            Found::Applied(index) => model.applied.0 == *index,
            Found::Page(page) => {
                let records = model.records.iter();
                let records: Vec<_> =
                    records.map(|(key, record)| (key.clone(), record.clone())).collect();
                (model.applied.0, records) == (page.index, page.records.clone())
            }
        };
        fits.then_some(model)
    })
}

#[test]
fn the_checker_and_a_search_agree_on_random_histories() {
    let verdicts = Verdicts::default();
    for_all(30_000, any_history(), |history| {
        let verdict = history.check();
        assert_eq!(verdict.is_ok(), search(&history), "{verdict:?}");
        verdicts.count(verdict.is_ok());
    });
    verdicts.assert_mixed("random histories of the store");
}
