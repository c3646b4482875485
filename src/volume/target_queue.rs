//! Writes to the target on behalf of guests, which may give up on them.
//!
//! A guest's write in write-blocking mode goes to both images at once: the source on the guest's own thread, the target here,
//! from memory of its own. The guest waits for a bounded time. What it gives up on stays what it was (rule 14): the request
//! keeps its bytes and its hold on the range until the target has answered, and then marks the range dirty.

use std::collections::VecDeque;

use super::Change;
use super::target::Target;
use crate::dirty::{DirtyMap, Hold};
use crate::error::Result;
use crate::range::ByteRange;
use crate::sync::{Arc, Condvar, Instant, Mutex, thread, wait_until};

/// As many requests as guests can have in flight; a guest that finds the queue full does not wait for the target.
const WAITING_MAX: usize = 64;
const WORKERS_MAX: usize = 8;

/// See the module. Its threads end when it is closed and their last request has returned.
#[derive(Debug)]
pub struct TargetQueue {
    target: Arc<Target>,
    map: Arc<DirtyMap>,
    state: Mutex<State>,
    work: Condvar,
    /// A thread has ended.
    left: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Request>,
    workers: usize,
    idle: usize,
    closed: bool,
}

#[derive(Debug)]
enum OwnedChange {
    Write { offset: u64, data: Vec<u8> },
    Zero(ByteRange),
    Discard(ByteRange),
    Flush,
}

#[derive(Debug)]
struct Request {
    change: OwnedChange,
    hold: Option<Hold>,
    ticket: Arc<TicketState>,
}

#[derive(Debug, Default)]
struct TicketState {
    slot: Mutex<Slot>,
    answered: Condvar,
}

#[derive(Debug, Default)]
enum Slot {
    #[default]
    Pending,
    Answered(Result<()>, Option<Hold>),
    /// Nobody waits any more.
    GivenUp,
}

/// A request under way. Dropping it gives up on the request: it goes on without its guest, and marks its range when it ends.
#[must_use = "dropping a ticket gives up on its request"]
#[derive(Debug)]
pub struct Ticket(Arc<TicketState>);

/// The target's answer; the hold of a change is handed back.
pub type Answer = (Result<()>, Option<Hold>);

impl TargetQueue {
    /// A queue in front of `target`; `map` gets the ranges of a failed flush.
    pub fn new(target: Arc<Target>, map: Arc<DirtyMap>) -> Arc<Self> {
        Arc::new(TargetQueue { target, map, state: Mutex::default(), work: Condvar::new(), left: Condvar::new() })
    }

    /// Queues `change`. `hold` covers its range. Gives the hold back when the queue is full or closed.
    ///
    /// # Errors
    /// The hold, if the request was not taken.
    pub fn submit(self: &Arc<Self>, change: Change<'_>, hold: Hold) -> Result<Ticket, Hold> {
        let owned = match change {
            Change::Write { offset, data } => OwnedChange::Write { offset, data: data.to_vec() },
            Change::Zero(range) => OwnedChange::Zero(range),
            Change::Discard(range) => OwnedChange::Discard(range),
        };
        self.push(owned, Some(hold)).map_err(|hold| hold.expect("a change keeps its hold"))
    }

    /// Queues a flush of the target. `None` if the queue is full or closed.
    pub fn submit_flush(self: &Arc<Self>) -> Option<Ticket> {
        self.push(OwnedChange::Flush, None).ok()
    }

    fn push(self: &Arc<Self>, change: OwnedChange, hold: Option<Hold>) -> Result<Ticket, Option<Hold>> {
        let mut state = self.state.lock();
        if state.closed || state.waiting.len() >= WAITING_MAX {
            return Err(hold);
        }
        if state.idle <= state.waiting.len() && state.workers < WORKERS_MAX {
            let queue = self.clone();
            match thread::Builder::new().name("target".into()).spawn(move || queue.work()) {
                Ok(_) => state.workers += 1,
                Err(error) if state.workers == 0 => {
                    log::warn!("cannot start a thread for the target: {error}");
                    return Err(hold);
                }
                Err(_) => (),
            }
        }
        let ticket = Arc::new(TicketState::default());
        state.waiting.push_back(Request { change, hold, ticket: ticket.clone() });
        self.work.notify_one();
        Ok(Ticket(ticket))
    }

    /// Takes no more requests; those that were taken are carried out.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.work.notify_all();
    }

    /// Waits until everything that was taken has returned, once the queue is closed. How many requests have not at `deadline`.
    pub fn wait_returned(&self, deadline: Instant) -> usize {
        let mut state = self.state.lock();
        while state.workers > 0 && wait_until(&self.left, &mut state, Some(deadline)) {}
        state.workers + state.waiting.len()
    }

    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            let Some(request) = state.waiting.pop_front() else {
                if state.closed {
                    state.workers -= 1;
                    self.left.notify_all();
                    return;
                }
                state.idle += 1;
                self.work.wait(&mut state);
                state.idle -= 1;
                continue;
            };
            drop(state);
            self.carry_out(request);
            state = self.state.lock();
        }
    }

    fn carry_out(&self, request: Request) {
        let result = match &request.change {
            OwnedChange::Write { offset, data } => self.target.apply(Change::Write { offset: *offset, data }),
            OwnedChange::Zero(range) => self.target.apply(Change::Zero(*range)),
            OwnedChange::Discard(range) => self.target.apply(Change::Discard(*range)),
            OwnedChange::Flush => self.target.flush(&self.map),
        };
        let mut slot = request.ticket.slot.lock();
        match *slot {
            // The guest is gone: dropping the hold marks the range.
            Slot::GivenUp => drop(request.hold),
            _ => {
                *slot = Slot::Answered(result, request.hold);
                request.ticket.answered.notify_all();
            }
        }
    }
}

impl Ticket {
    /// Waits for the target's answer until `deadline` (`None`: for ever). Nothing: time is up, the request is still under way.
    /// An answer is given once.
    pub fn wait(&self, deadline: Option<Instant>) -> Option<Answer> {
        let mut slot = self.0.slot.lock();
        loop {
            if let Slot::Answered(..) = *slot {
                if let Slot::Answered(result, hold) = std::mem::take(&mut *slot) {
                    return Some((result, hold));
                }
            }
            if !wait_until(&self.0.answered, &mut slot, deadline) && matches!(*slot, Slot::Pending) {
                return None;
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // An answer that nobody took is dropped with its hold, which marks the range.
        let answer = std::mem::replace(&mut *self.0.slot.lock(), Slot::GivenUp);
        drop(answer);
    }
}
