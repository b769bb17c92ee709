//! Watchers: each follows the changes below a prefix, now at one member, now at another.
//!
//! A member that installed a snapshot may have lost the watcher's place. Then the watcher lists the keys, and
//! continues after the list. Between two lists it must see each change once, in the order of the log.

use raftexample::channels::NodeId;
use raftexample::kvstore::{Changes, Cursor, KvStore};

use crate::invariants::Violation;
use crate::process::Process;
use crate::support::random::Random;
use crate::support::store::{Change, Page, Place, Replay, Watched};
use crate::translation::{change, page, place};

/// What one question of a watcher brought.
#[derive(Clone, Copy, Default)]
pub struct Asked {
    pub changes: u64,
    pub resets: u64,
    /// One if it was reset because the member's snapshot ends with an entry of which it saw a part: the member
    /// does not know whether that was the last part.
    pub resets_within: u64,
    /// One if the watcher found changes at another member, or another run, than before.
    pub resumed: u64,
}

pub struct Watcher {
    prefix: String,
    from: Cursor,
    cursor: Cursor,
    seen: Vec<Change>,
    /// The member that it asked last, and the run of its process.
    at: Option<(NodeId, u64)>,
    /// Before the last reset.
    watched: Vec<Watched>,
    listed: Vec<Page>,
}

impl Watcher {
    /// Watches from the beginning.
    pub fn new(prefix: String) -> Self {
        let (from, cursor) = (Cursor::default(), Cursor::default());
        let (seen, watched, listed) = (Vec::new(), Vec::new(), Vec::new());
        Self { prefix, from, cursor, seen, at: None, watched, listed }
    }

    /// Asks a member for what has changed. If it has lost the place, the keys are listed at `elsewhere`, or at
    /// the same member.
    pub fn ask(
        &mut self,
        at: (NodeId, u64),
        process: &Process,
        elsewhere: Option<KvStore>,
        random: &mut Random,
    ) -> Result<Asked, Violation> {
        let is_new = self.at.replace(at).is_some_and(|before| before != at);
        if let Some(last) = self.seen.last().filter(|_| is_new && random.below(2) == 0) {
            // A client whose connection broke resumes after the last event.
            self.cursor = Cursor { index: last.place.0, position: last.place.1 };
        }
        let max = *random.choose(&[1, 2, 3, 100]);
        let (changes, reached) =
            match process.store.changes(self.cursor, self.prefix.as_bytes(), max) {
                Changes::Kept(changes, reached) => (changes, reached),
                Changes::Lost => {
                    if self.cursor >= Cursor::after(process.restored) {
                        let (cursor, since) = (self.cursor, process.restored);
                        return Err(format!(
                            "{at:?} lost {cursor:?}, and its snapshot ends at {since}"
                        ));
                    }
                    let resets_within = u64::from(self.cursor.index == process.restored);
                    self.reset(&elsewhere.unwrap_or_else(|| process.store.clone()));
                    return Ok(Asked { resets: 1, resets_within, ..Asked::default() });
                }
            };
        if changes.len() > max || reached < self.cursor {
            return Err(format!("{at:?} gave {changes:?} and {reached:?} to {:?}", self.cursor));
        }
        self.cursor = reached;
        let found = changes.len() as u64;
        self.seen.extend(changes.iter().map(change));
        let resumed = u64::from(is_new && found > 0);
        Ok(Asked { changes: found, resumed, ..Asked::default() })
    }

    fn reset(&mut self, store: &KvStore) {
        let watched = self.current();
        self.watched.push(watched);
        let found = store.page(self.prefix.as_bytes(), None, usize::MAX, 1, |_| 0);
        self.cursor = Cursor::after(found.index);
        self.from = self.cursor;
        self.seen.clear();
        self.listed.push(page(&self.prefix, None, usize::MAX, found));
    }

    fn current(&self) -> Watched {
        let (prefix, seen) = (self.prefix.clone(), self.seen.clone());
        Watched { prefix, from: place(self.from), seen, reached: place(self.cursor) }
    }

    /// The place up to which it has looked at everything.
    pub fn reached(&self) -> Place {
        place(self.cursor)
    }

    /// At the end: what it saw are the changes of the log.
    pub fn check(&self, replay: &Replay) -> Result<(), Violation> {
        self.listed.iter().try_for_each(|page| replay.check_page(page))?;
        self.watched.iter().try_for_each(|watched| replay.check_watched(watched))?;
        replay.check_watched(&self.current())
    }

    /// At the end, after it has asked a member that has applied everything: it has missed nothing.
    pub fn check_complete(&self, replay: &Replay) -> Result<(), Violation> {
        match replay.changes_after(self.reached(), &self.prefix).next() {
            None => Ok(()),
            Some(missed) => Err(format!("a watcher of {:?} is not told {missed:?}", self.prefix)),
        }
    }
}
