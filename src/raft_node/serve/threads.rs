//! The node's threads for the disk: one where the node may block, and one that writes while the node goes on.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

use crate::raft_node::journal::{Background, Write, Written};

/// From this time for a frame on, handing the next one over costs less than waiting for it.
const SLOW_WRITE: Duration = Duration::from_millis(1);

/// The node's own thread for the disk. The runtime has such threads too, but others use them: name
/// resolution against a dead server can take all of them.
pub(super) struct DiskThread(Sender<Box<dyn FnOnce() + Send>>);

impl DiskThread {
    /// Starts the thread. It ends with this value.
    pub fn new() -> Self {
        let (work_tx, work_rx) = channel::<Box<dyn FnOnce() + Send>>();
        let runtime = Handle::current();
        std::thread::spawn(move || {
            let _runtime = runtime.enter();
            work_rx.into_iter().for_each(|work| work());
        });
        Self(work_tx)
    }

    /// Runs `work` on the thread. A panic in it goes on here.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done_tx, done_rx) = oneshot::channel();
        let work = move || {
            // The receiver is gone if the runtime is shut down.
            let _ = done_tx.send(catch_unwind(AssertUnwindSafe(work)));
        };
        self.0.send(Box::new(work)).expect("the thread lives as long as this value");
        match done_rx.await.expect("the thread answers") {
            Ok(done) => done,
            Err(panic) => resume_unwind(panic),
        }
    }
}

/// The thread that writes frames in the background. It ends with this value, after the frame under way.
pub(super) struct WriteThread {
    write_tx: Sender<Write>,
    written_rx: Receiver<Written>,
}

impl WriteThread {
    /// Starts the thread. It sends on `wake_tx` after each write.
    pub fn new(wake_tx: mpsc::UnboundedSender<()>) -> Self {
        let (write_tx, write_rx) = channel::<Write>();
        let (written_tx, written_rx) = channel();
        std::thread::spawn(move || {
            for write in write_rx {
                // The receivers are gone if the node ended.
                let _ = written_tx.send(write.run());
                let _ = wake_tx.send(());
            }
        });
        Self { write_tx, written_rx }
    }
}

impl Background for WriteThread {
    fn wants(&mut self, last: Duration) -> bool {
        last >= SLOW_WRITE
    }

    fn begin(&mut self, write: Write) {
        self.write_tx.send(write).expect("the thread lives as long as this value");
    }

    fn finish(&mut self) -> Written {
        self.written_rx.recv().expect("the thread answers")
    }

    fn try_finish(&mut self) -> Option<Written> {
        match self.written_rx.try_recv() {
            Ok(written) => Some(written),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => panic!("the thread panicked"),
        }
    }
}
