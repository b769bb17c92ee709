//! The last three minutes of the page's charts: the requests of all members, counted once a second while no page
//! is open, too.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::channels::NodeId;
use crate::raft_node::Status;
use crate::transport::{ClusterWatch, Statuses};

/// The time between two points.
const STEP: Duration = Duration::from_secs(1);
/// The points that are kept: three minutes, which is the width of a chart.
const POINTS_MAX: usize = 180;
/// Nothing is known of a longer step: the process was stopped, or its machine was.
const STEP_MAX: Duration = Duration::from_secs(3);

/// The points of the charts, oldest first.
pub(super) struct History {
    /// What the times in JSON count from.
    began: Instant,
    points: Mutex<VecDeque<Point>>,
}

impl Default for History {
    fn default() -> Self {
        Self { began: Instant::now(), points: Mutex::default() }
    }
}

/// What all members did in one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Point {
    /// The end of the step.
    pub(super) at: Instant,
    puts: Measured,
    gets: Measured,
}

/// Requests of one kind in one step.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Measured {
    per_second: f64,
    /// The mean in milliseconds; `None` without a request.
    mean_ms: Option<f64>,
}

impl History {
    /// The points after the one at `last`, or all.
    pub(super) fn after(&self, last: Option<Instant>) -> Vec<Point> {
        self.points().iter().filter(|point| Some(point.at) > last).copied().collect()
    }

    /// Points as JSON. The clocks of a member and of a browser differ, so the time of the member goes with them.
    pub(super) fn json(&self, points: &[Point]) -> Value {
        let ms = |at: Instant| (at - self.began).as_millis() as u64;
        let kind = |of: Measured| json!({ "per_second": of.per_second, "mean_ms": of.mean_ms });
        let point = |point: &Point| json!({ "at_ms": ms(point.at), "puts": kind(point.puts), "gets": kind(point.gets) });
        let points: Vec<_> = points.iter().map(point).collect();
        json!({ "now_ms": ms(Instant::now()), "points": points })
    }

    fn push(&self, point: Point) {
        let mut points = self.points();
        if points.len() == POINTS_MAX {
            points.pop_front();
        }
        points.push_back(point);
    }

    fn points(&self) -> MutexGuard<'_, VecDeque<Point>> {
        self.points.lock().expect("nothing panics under it")
    }
}

/// Adds a point each second, until the member stops.
pub(super) async fn record(
    history: Arc<History>,
    status: watch::Receiver<Status>,
    cluster: Arc<ClusterWatch>,
    mut stopping: watch::Receiver<()>,
) {
    let mut counts = Counts::default();
    let mut ticks = interval(STEP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = stopping.changed() => return,
        }
        let statuses = cluster.watch_slowly();
        let point = counts.advance(&status.borrow(), &statuses.borrow(), Instant::now());
        if let Some(point) = point {
            history.push(point);
        }
    }
}

/// The last counts that are known of each member: requests, and the microseconds that they took together.
#[derive(Default)]
struct Counts {
    at: Option<Instant>,
    of: BTreeMap<NodeId, [(u64, u64); 2]>,
}

impl Counts {
    /// Takes in the members' counts; returns what they did since the last time.
    fn advance(&mut self, own: &Status, others: &Statuses, now: Instant) -> Option<Point> {
        let others = others.iter().map(|(id, (_, status))| (*id, &**status));
        let known: BTreeMap<_, _> = others.chain([(own.id, own)]).collect();
        let mut done = [(0, 0); 2];
        let mut counts = BTreeMap::new();
        for id in own.members.urls.keys() {
            let before = self.of.get(id);
            let count = known.get(id).map(|status| [status.tick.puts, status.tick.gets]);
            // A dead member has the counts that it had.
            let Some(count) = count.or_else(|| before.copied()) else { continue };
            counts.insert(*id, count);
            // What a member did before it was first heard from is not of this step.
            let Some(before) = before else { continue };
            for (done, (before, count)) in done.iter_mut().zip(before.iter().zip(count)) {
                // A member that was restarted counts from 0.
                let before = if count.0 < before.0 { (0, 0) } else { *before };
                done.0 += count.0 - before.0;
                done.1 += count.1.saturating_sub(before.1);
            }
        }
        self.of = counts;
        let elapsed = now - self.at.replace(now)?;
        let [puts, gets] = done.map(|(requests, micros)| Measured {
            per_second: requests as f64 / elapsed.as_secs_f64(),
            mean_ms: (requests > 0).then(|| micros as f64 / requests as f64 / 1000.0),
        });
        (elapsed <= STEP_MAX).then_some(Point { at: now, puts, gets })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(id: NodeId, puts: u64, gets: u64) -> Status {
        let mut status = Status { id, ..Status::default() };
        // Each PUT takes 2 ms, each GET 1 ms.
        (status.tick.puts, status.tick.gets) = ((puts, puts * 2000), (gets, gets * 1000));
        status.members.urls = [(1, String::new()), (2, String::new())].into();
        status
    }

    fn others(status: Status) -> Statuses {
        [(status.id, (Instant::now(), Arc::new(status)))].into()
    }

    #[test]
    fn a_point_is_what_all_members_did_in_a_step() {
        let (mut counts, start) = (Counts::default(), Instant::now());
        let mut at = |second: u64, own, other| {
            counts.advance(&own, &other, start + Duration::from_secs(second))
        };
        assert_eq!(at(0, status(1, 10, 0), Statuses::new()), None, "the step began before");
        let rates = |point: Option<Point>| {
            point.map(|it| {
                (it.puts.per_second, it.puts.mean_ms, it.gets.per_second, it.gets.mean_ms)
            })
        };
        // Member 2 is heard from for the first time.
        let first = at(1, status(1, 30, 0), others(status(2, 1000, 1000)));
        assert_eq!(rates(first), Some((20.0, Some(2.0), 0.0, None)));
        let both = at(3, status(1, 40, 0), others(status(2, 1010, 1004)));
        assert_eq!(rates(both), Some((10.0, Some(2.0), 2.0, Some(1.0))));
        // It is dead, then it was restarted.
        let alone = at(4, status(1, 41, 0), Statuses::new());
        assert_eq!(rates(alone), Some((1.0, Some(2.0), 0.0, None)));
        let again = at(5, status(1, 41, 0), others(status(2, 3, 0)));
        assert_eq!(rates(again), Some((3.0, Some(2.0), 0.0, None)));
        assert_eq!(rates(at(60, status(1, 99, 0), Statuses::new())), None, "the step was too long");
    }

    #[test]
    fn the_history_keeps_three_minutes_and_gives_what_is_new() {
        let (history, start) = (History::default(), Instant::now());
        let none = Measured { per_second: 0.0, mean_ms: None };
        let at = |second: usize| start + STEP * second as u32;
        for second in 0..POINTS_MAX + 5 {
            history.push(Point { at: at(second), puts: none, gets: none });
        }
        let all = history.after(None);
        assert_eq!((all.len(), all[0].at), (POINTS_MAX, at(5)));
        let new = history.after(Some(at(POINTS_MAX + 2)));
        assert_eq!(new.iter().map(|point| point.at).collect::<Vec<_>>(), [at(183), at(184)]);
    }
}
