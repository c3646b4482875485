//! What waits to be sent to one client.
//!
//! Replies and events leave in the order in which they were put in. A reply waits for room, so that a client that only asks
//! is not read from any further; an event never waits, for it comes from a job's thread: when there is no room for it the
//! client has stopped reading, and the whole connection is given up.
//!
//! While a verb that works on behind its return is being executed, events are held back, so that the return goes first.

use std::collections::VecDeque;

use crate::sync::{Condvar, Mutex};

/// Bytes that may wait for one client. Replies leave half of it to the events.
const BYTES_MAX: usize = 1 << 20;
const REPLY_BYTES_MAX: usize = BYTES_MAX / 2;

#[derive(Default)]
struct Queue {
    lines: VecDeque<Vec<u8>>,
    held: Vec<Vec<u8>>,
    holding: bool,
    bytes: usize,
    /// Nothing more is taken; what is there is still sent.
    ended: bool,
    /// Given up: what is there is not sent any more.
    broken: bool,
}

/// A bounded queue of lines, from any thread to one writer.
#[derive(Default)]
pub(super) struct Outbox {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Outbox {
    /// Puts a reply in, as soon as there is room. A single one is always taken, however long it is.
    pub(super) fn reply(&self, line: Vec<u8>) {
        let mut queue = self.queue.lock();
        while queue.bytes > REPLY_BYTES_MAX && !queue.ended && !queue.broken {
            self.changed.wait(&mut queue);
        }
        Self::put(&mut queue, line);
        self.changed.notify_all();
    }

    /// Puts an event in. False if the client had to be given up for it: its connection must be cut.
    pub(super) fn event(&self, line: Vec<u8>) -> bool {
        let mut queue = self.queue.lock();
        if queue.ended || queue.broken {
            return true;
        }
        if queue.bytes + line.len() > BYTES_MAX {
            queue.broken = true;
            self.changed.notify_all();
            return false;
        }
        if queue.holding {
            queue.bytes += line.len();
            queue.held.push(line);
        } else {
            Self::put(&mut queue, line);
            self.changed.notify_all();
        }
        true
    }

    /// Holds events back until [`Outbox::release`].
    pub(super) fn hold(&self) {
        self.queue.lock().holding = true;
    }

    /// Puts `line` in, and behind it the events that were held back.
    pub(super) fn release(&self, line: Vec<u8>) {
        let mut queue = self.queue.lock();
        Self::put(&mut queue, line);
        let held = std::mem::take(&mut queue.held);
        queue.lines.extend(held);
        queue.holding = false;
        self.changed.notify_all();
    }

    fn put(queue: &mut Queue, line: Vec<u8>) {
        if !queue.ended && !queue.broken {
            queue.bytes += line.len();
            queue.lines.push_back(line);
        }
    }

    /// The next line to send; `None` when all was sent and nothing more will come, or the client was given up.
    pub(super) fn next(&self) -> Option<Vec<u8>> {
        let mut queue = self.queue.lock();
        loop {
            if queue.broken {
                return None;
            }
            if let Some(line) = queue.lines.pop_front() {
                queue.bytes -= line.len();
                self.changed.notify_all();
                return Some(line);
            }
            if queue.ended {
                return None;
            }
            self.changed.wait(&mut queue);
        }
    }

    /// Takes nothing more. What is there is still sent.
    pub(super) fn end(&self) {
        let mut queue = self.queue.lock();
        queue.ended = true;
        self.changed.notify_all();
    }

    /// Gives up: wakes everybody who waits here.
    pub(super) fn give_up(&self) {
        let mut queue = self.queue.lock();
        queue.broken = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(outbox: &Outbox) -> Vec<String> {
        outbox.end();
        std::iter::from_fn(|| outbox.next()).map(|line| String::from_utf8(line).unwrap()).collect()
    }

    #[test]
    fn held_events_follow_the_return() {
        let outbox = Outbox::default();
        assert!(outbox.event(b"before".to_vec()));
        outbox.hold();
        assert!(outbox.event(b"later 1".to_vec()));
        assert!(outbox.event(b"later 2".to_vec()));
        outbox.release(b"return".to_vec());
        assert!(outbox.event(b"after".to_vec()));
        assert_eq!(sent(&outbox), ["before", "return", "later 1", "later 2", "after"]);
    }

    #[test]
    fn events_that_nobody_reads_end_the_connection_and_never_wait() {
        let outbox = Outbox::default();
        let taken = (0..3 * BYTES_MAX / 1000).take_while(|_| outbox.event(vec![b'x'; 1000])).count();
        assert_eq!(taken, BYTES_MAX / 1000);
        assert!(outbox.event(b"more".to_vec()), "told once");
        assert_eq!(outbox.next(), None);
        outbox.reply(b"does not wait either".to_vec());
    }

    #[test]
    fn events_held_back_are_bounded_too() {
        let outbox = Outbox::default();
        outbox.hold();
        assert!((0..3 * BYTES_MAX / 1000).any(|_| !outbox.event(vec![b'x'; 1000])));
    }

    #[test]
    fn a_reply_waits_for_room() {
        let outbox = Outbox::default();
        outbox.reply(vec![b'x'; REPLY_BYTES_MAX + 1]);
        std::thread::scope(|scope| {
            let second = scope.spawn(|| outbox.reply(b"second".to_vec()));
            std::thread::sleep(std::time::Duration::from_millis(20));
            let waits = !second.is_finished();
            outbox.next();
            assert!(waits, "what one client may pile up is bounded");
        });
        assert_eq!(sent(&outbox), ["second"]);
    }
}
