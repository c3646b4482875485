//! What may be lost of what was answered: no guest was told yet, nobody could send it again, and reading does not show it (rule 5).
//!
//! ```text
//! our server dies ─> the next one inherits its sockets ─ the NBD server went away since ──────> lost: the guest's next flush fails, once
//!                                                      └ it did not ─> unproven ─ flushed ─> nothing is left
//!                                                                         ├ the connection ends before ─> lost
//! a flush, of whomever ───────────────────────────────────────────────────┴ the server refuses it ──────> lost
//! ```
//!
//! A loss is reported by one flush, whoever asked for it, and then by whoever that was: it is over only when a guest was told
//! ([`crate::image::Image::told`]). Until then the keeper has a socket that is over, by which the next server of ours knows of it too: a guest
//! that lives on through the death of both must not take for written what is gone.

use super::ends::{self, Ended};
use crate::error::{Error, ErrorKind};
use crate::sync::{Mutex, MutexGuard};

/// See the module.
#[derive(Debug)]
pub(super) struct LeftBehind {
    uri: String,
    state: Mutex<State>,
    proving: Mutex<()>,
}

#[derive(Debug)]
enum State {
    Nothing,
    /// Changes of the server before that no flush has proven.
    Unproven,
    Lost {
        error: Error,
        /// A flush has failed with it.
        reported: bool,
        parked: Vec<Ended>,
    },
}

impl LeftBehind {
    /// `unproven`: a server of ours used the export of `uri` before.
    pub(super) fn new(uri: &str, unproven: bool) -> Self {
        let state = if unproven { State::Unproven } else { State::Nothing };
        LeftBehind { uri: uri.to_owned(), state: Mutex::new(state), proving: Mutex::new(()) }
    }

    /// To be held over a flush, while anything is unproven: a server may tell an error once, and another flush that succeeds beside that
    /// one would be taken for the proof.
    pub(super) fn prove(&self) -> Option<MutexGuard<'_, ()>> {
        let unproven = matches!(*self.state.lock(), State::Unproven);
        unproven.then(|| self.proving.lock())
    }

    /// A flush has succeeded.
    pub(super) fn proven(&self) {
        let mut state = self.state.lock();
        if matches!(*state, State::Unproven) {
            *state = State::Nothing;
        }
    }

    /// The server has answered a flush with an error: what was written before may be gone, and is not kept any more.
    pub(super) fn refused(&self, error: Error) {
        let mut state = self.state.lock();
        let error = match *state {
            State::Unproven => self.unflushed(&error.to_string()),
            _ => error,
        };
        self.lose(&mut state, error, Vec::new());
    }

    /// The NBD server went away while nobody had what was not flushed; so `ended` says.
    pub(super) fn went_away(&self, ended: Vec<Ended>) {
        let error = self.unflushed("the NBD server went away, or had failed to flush, before ours was back");
        self.lose(&mut self.state.lock(), error, ended);
    }

    /// A connection has ended for `reason`. Gives it back if it is no matter of this.
    pub(super) fn connection_ended(&self, reason: &str, ended: Option<Ended>) -> Option<Ended> {
        let mut state = self.state.lock();
        if !matches!(*state, State::Unproven) {
            return ended;
        }
        self.lose(&mut state, self.unflushed(reason), ended.into_iter().collect());
        None
    }

    fn unflushed(&self, reason: &str) -> Error {
        let what = format!("writes that were not flushed before this program's server died may be lost ({reason}):");
        Error::new(ErrorKind::Failed, what)
            .on(&*self.uri)
            .advise("check the file system or the database on the disk; what is written and flushed from now on counts")
    }

    fn lose(&self, state: &mut State, error: Error, mut ended: Vec<Ended>) {
        let error = match std::mem::replace(state, State::Nothing) {
            State::Lost { error: earlier, reported, parked } => {
                ended.extend(parked);
                if reported { error } else { earlier }
            }
            _ => error,
        };
        if ended.is_empty() {
            ended.extend(ends::leave_word(&self.uri));
        }
        *state = State::Lost { error, reported: false, parked: ended };
    }

    /// What the next flush has to say, once.
    pub(super) fn report(&self) -> Option<Error> {
        match &mut *self.state.lock() {
            State::Lost { error, reported: reported @ false, .. } => {
                *reported = true;
                Some(error.clone())
            }
            _ => None,
        }
    }

    /// What no guest was told yet.
    pub(super) fn owes(&self) -> Option<Error> {
        match &*self.state.lock() {
            State::Lost { error, .. } => Some(error.clone()),
            _ => None,
        }
    }

    /// A guest was told what was reported.
    pub(super) fn told(&self) {
        let mut state = self.state.lock();
        if matches!(*state, State::Lost { reported: true, .. }) {
            *state = State::Nothing;
        }
    }
}
