//! Frames under way, which are written when a test says so.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use raftexample::raft_node::journal::{Background, Write, Written};

/// A background without a thread.
#[derive(Clone)]
pub struct LateWrites(Arc<Mutex<Late>>);

struct Late {
    /// Says of each frame whether the next one is for this background.
    wants: Box<dyn FnMut() -> bool + Send>,
    begun: Option<Write>,
    written: Option<Written>,
}

impl LateWrites {
    pub fn new(wants: impl FnMut() -> bool + Send + 'static) -> Self {
        let wants = Box::new(wants);
        Self(Arc::new(Mutex::new(Late { wants, begun: None, written: None })))
    }

    /// True if a turn that may not block is to be tried first, as on an async worker.
    pub fn is_on_worker(&self) -> bool {
        (self.0.lock().unwrap().wants)()
    }

    /// True if a frame is not written yet.
    pub fn has_begun(&self) -> bool {
        self.0.lock().unwrap().begun.is_some()
    }

    /// Writes the frame, as the thread of a running member does. The node has to be fed `Input::Written`.
    pub fn write(&self) {
        let mut late = self.0.lock().unwrap();
        late.written = late.begun.take().map(Write::run);
    }
}

impl Background for LateWrites {
    fn wants(&mut self, _last: Duration) -> bool {
        (self.0.lock().unwrap().wants)()
    }

    fn begin(&mut self, write: Write) {
        let mut late = self.0.lock().unwrap();
        assert!(late.begun.is_none() && late.written.is_none(), "two frames are under way");
        late.begun = Some(write);
    }

    fn finish(&mut self) -> Written {
        if self.has_begun() {
            self.write();
        }
        self.try_finish().expect("a frame is under way")
    }

    fn try_finish(&mut self) -> Option<Written> {
        self.0.lock().unwrap().written.take()
    }
}
