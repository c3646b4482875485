//! Sending again what a server may have lost, over one connection that nobody else uses yet.
//!
//! ```text
//! kept, in its order ──> up to AT_ONCE under way, none before an older one that it overlaps is done ──> the server
//!                           └ each answer is a sign of life, from which patience begins anew
//! ```

use std::time::Duration;

use super::call::{Answer, Call, Reply};
use super::change::{Carrier, Change, Trouble, carry_out};
use super::connection::Connection;
use crate::range::ByteRange;
use crate::sync::{Arc, Condvar, Instant, Mutex};
use crate::sys::libnbd::Command;

/// So many changes are under way at once.
const AT_ONCE: usize = 16;

/// Hears of every answer: how many there were of this replay, and how long the last one was waited for.
pub(super) type OnAnswer<'a> = &'a (dyn Fn(u64, Duration) + Sync);

/// See the module.
pub(super) struct Replay<'a> {
    connection: &'a Connection,
    /// So long one answer after another is waited for.
    patience: Duration,
    changes: &'a [(Change, bool)],
    on_answer: OnAnswer<'a>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    next: usize,
    running: Vec<(usize, ByteRange)>,
    answers: u64,
    heard: Instant,
    failed: Option<Trouble>,
}

impl<'a> Replay<'a> {
    /// Of `changes`, in the order in which they were made; true: it was acknowledged.
    pub(super) fn new(
        connection: &'a Connection,
        patience: Duration,
        changes: &'a [(Change, bool)],
        on_answer: OnAnswer<'a>,
    ) -> Self {
        let state = State { next: 0, running: Vec::new(), answers: 0, heard: Instant::now(), failed: None };
        Replay { connection, patience, changes, on_answer, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Sends them all, and returns when nothing of it is waited for any more.
    ///
    /// # Errors
    /// The first change that was acknowledged and could not be made again.
    pub(super) fn run(self) -> Result<(), Trouble> {
        std::thread::scope(|scope| {
            for _ in 1..AT_ONCE.min(self.changes.len()) {
                // Fewer threads are slower, no more.
                let thread = std::thread::Builder::new().name("nbd-replay".into()).stack_size(256 << 10);
                if thread.spawn_scoped(scope, || self.work()).is_err() {
                    break;
                }
            }
            self.work();
        });
        let failed = self.state.lock().failed.take();
        failed.map_or(Ok(()), Err)
    }

    fn work(&self) {
        while let Some(number) = self.take() {
            let (change, acknowledged) = &self.changes[number];
            let result = carry_out(&self.connection.export, change, &mut Alone { replay: self });
            let mut state = self.state.lock();
            state.running.retain(|(other, _)| *other != number);
            match result {
                // One that was not acknowledged has a caller, who tries again and hears of it.
                Err(Trouble::Server(_)) if !acknowledged => (),
                Err(trouble) => drop(state.failed.get_or_insert(trouble)),
                Ok(()) => (),
            }
            drop(state);
            self.changed.notify_all();
        }
    }

    /// The next change, as soon as none under way overlaps it.
    fn take(&self) -> Option<usize> {
        let mut state = self.state.lock();
        loop {
            let number = state.next;
            if state.failed.is_some() || number == self.changes.len() {
                return None;
            }
            let range = self.changes[number].0.range();
            if !state.running.iter().any(|(_, other)| other.overlaps(range)) {
                state.next += 1;
                state.running.push((number, range));
                return Some(number);
            }
            self.changed.wait(&mut state);
        }
    }

    /// Waits for the answer to one request, as long as others are answered.
    fn wait(&self, call: &Call) -> Option<Answer> {
        loop {
            let deadline = self.state.lock().heard + self.patience;
            if let Some(answer) = call.wait(deadline) {
                return Some(answer);
            }
            if self.state.lock().heard + self.patience <= Instant::now() {
                return None;
            }
        }
    }

    fn note_answer(&self) {
        let (answers, waited) = {
            let mut state = self.state.lock();
            let waited = state.heard.elapsed();
            state.heard += waited;
            state.answers += 1;
            (state.answers, waited)
        };
        (self.on_answer)(answers, waited);
    }
}

/// Requests of one change.
struct Alone<'a> {
    replay: &'a Replay<'a>,
}

impl Carrier for Alone<'_> {
    fn run(&mut self, commands: Vec<Command>) -> Result<Vec<Reply>, Trouble> {
        let calls: Vec<Arc<Call>> = commands.into_iter().map(|command| Call::new(command, None)).collect();
        calls.iter().for_each(|call| self.replay.connection.submit(call.clone()));
        let answer = |call: &Arc<Call>| match self.replay.wait(call) {
            Some(Answer::Done(reply)) => {
                self.replay.note_answer();
                Ok(reply)
            }
            Some(Answer::Failed(errno)) => Err(Trouble::Server(errno)),
            Some(Answer::Refused(text)) => Err(Trouble::Refused(text)),
            Some(Answer::Ended | Answer::Lost) => Err(Trouble::Lost("lost again".to_owned())),
            None => Err(Trouble::Silent),
        };
        calls.iter().map(answer).collect()
    }
}
