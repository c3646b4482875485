//! One request to an NBD server, from its caller's thread to the thread of a connection and back.

use super::ranges::Held;
use crate::sync::{Arc, Condvar, Instant, Mutex, wait_until};
use crate::sys::libnbd::Command;

/// What came of a request.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    /// Done. The bytes of a read, the extents of a block status.
    Done(Reply),
    /// The server refused, with this error number.
    Failed(i32),
    /// The library refused it: the export does not allow such a request.
    Refused(String),
    /// The connection ended before the answer, and its end was read: the server will do nothing more of it.
    Ended,
    /// The connection is lost, and nobody knows what the server may still do.
    Lost,
}

/// What a server sent.
#[derive(Clone, Debug, Default)]
pub(super) struct Reply {
    /// Of a read.
    pub(super) bytes: Vec<u8>,
    /// Of a block status: length in bytes, flags.
    pub(super) extents: Vec<(u32, u32)>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) command: Command,
    slot: Mutex<Option<Answer>>,
    answered: Condvar,
    /// The range of a change stays held until the server can do nothing more of it, also if its caller waits no longer.
    _hold: Option<Arc<Held>>,
}

impl Call {
    pub(super) fn new(command: Command, hold: Option<Arc<Held>>) -> Arc<Self> {
        Arc::new(Call { command, slot: Mutex::new(None), answered: Condvar::new(), _hold: hold })
    }

    /// True if it changes the export.
    pub(super) fn changes(&self) -> bool {
        matches!(self.command, Command::Write { .. } | Command::Zero { .. } | Command::Trim { .. })
    }

    /// Gives the answer. The first one counts.
    pub(super) fn answer(&self, answer: Answer) {
        self.slot.lock().get_or_insert(answer);
        self.answered.notify_all();
    }

    /// Waits for the answer until `deadline`; it is given once.
    pub(super) fn wait(&self, deadline: Instant) -> Option<Answer> {
        let mut slot = self.slot.lock();
        while slot.is_none() {
            if !wait_until(&self.answered, &mut slot, Some(deadline)) && Instant::now() >= deadline {
                break;
            }
        }
        slot.take()
    }
}
