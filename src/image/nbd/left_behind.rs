//! What a server of ours that died has left with an NBD server: answered, perhaps in its cache only, and kept by nobody any more (rule 5).
//!
//! ```text
//! our server dies ─> the next one inherits its sockets ─ one was over already ───────────────> lost: the guest's next flush fails, once
//!                                                      └ all were alive ─> unproven ─ flushed ─> nothing is left
//!                                                                             └ the connection ends before ─> lost
//! ```
//!
//! Nobody could send such changes again. That they may be lost is said once, by the flush that would otherwise have called them durable:
//! a guest that lives on through the death of both must not take for written what is gone.

use super::ends::Ended;
use crate::error::{Error, ErrorKind};
use crate::sync::Mutex;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct LeftBehind {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Nothing,
    /// Changes of the server before that no flush has proven.
    Unproven,
    /// They may be gone, for this reason. The sockets stay parked until a guest was told: the next server would tell it then.
    Lost { reason: String, _parked: Vec<Ended> },
}

impl LeftBehind {
    /// A server of ours used the export before; `ended` are those of its connections that were over when this one came.
    pub(super) fn inherit(&self, ended: Vec<Ended>) {
        *self.state.lock() = match ended.is_empty() {
            true => State::Unproven,
            false => State::Lost { reason: "the NBD server went away while ours was dead".to_owned(), _parked: ended },
        };
    }

    /// The server's answer to a flush: what was left is durable, or whoever asked was told.
    pub(super) fn settled(&self) {
        let mut state = self.state.lock();
        if matches!(*state, State::Unproven) {
            *state = State::Nothing;
        }
    }

    /// A connection has ended for `reason`. Gives it back if it is no matter of this.
    pub(super) fn connection_ended(&self, reason: &str, ended: Option<Ended>) -> Option<Ended> {
        let mut state = self.state.lock();
        if !matches!(*state, State::Unproven) {
            return ended;
        }
        *state = State::Lost { reason: reason.to_owned(), _parked: ended.into_iter().collect() };
        None
    }

    /// A flush that nobody waited for has failed.
    pub(super) fn owe(&self, reason: String) {
        *self.state.lock() = State::Lost { reason, _parked: Vec::new() };
    }

    /// What the next flush has to say, once.
    pub(super) fn take(&self, uri: &str) -> Option<Error> {
        let mut state = self.state.lock();
        let State::Lost { reason, .. } = &*state else { return None };
        let what = format!("writes that were not flushed before this program's server died may be lost ({reason}):");
        let error = Error::new(ErrorKind::Failed, what).on(uri);
        *state = State::Nothing;
        Some(error.advise(
            "check the file system or the database on the disk; what is written and flushed from now on counts",
        ))
    }
}
