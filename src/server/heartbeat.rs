//! The pulse of a mount with an unfinished mirror: at most once a second and whenever counters are shown, and only while guests write or
//! the mirror copies. It dates the death of a server (rule 11) and lets the counters go on after it: none ever falls below what was
//! shown. A mount without a mirror has none, and one whose mirrors are in step with guests that rest has none either: it sleeps until a
//! guest writes.

use std::time::Duration;

use super::backend::Server;
use crate::state::pair::now_ns;
use crate::state::{Counts, Pulse};
use crate::sync::{Condvar, Instant, Mutex, wait_until};

const EVERY: Duration = Duration::from_secs(1);
/// How long an answer to `status` waits for the pulse: a state disk that hangs must not keep it.
const PATIENCE: Duration = Duration::from_millis(200);

/// See the module.
#[derive(Default)]
pub(super) struct Heartbeat {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    ended: bool,
    /// Something has begun.
    woken: bool,
    /// There is a thread for it.
    lives: bool,
    /// One is being written.
    beats: bool,
    /// How often one was asked for, and how often that was when the last one that was written began.
    asked: u64,
    answered: u64,
}

impl Heartbeat {
    /// A mirror has begun, or a guest has written after a rest.
    pub(super) fn wake(&self) {
        let mut state = self.state.lock();
        state.woken = true;
        self.changed.notify_all();
    }

    /// Nothing is written after this.
    pub(super) fn end(&self) {
        let mut state = self.state.lock();
        state.ended = true;
        self.changed.notify_all();
        // One that hangs in a target's store must not keep the mount from ending.
        let deadline = Instant::now() + PATIENCE;
        while state.beats && wait_until(&self.changed, &mut state, Some(deadline)) {}
    }

    /// Sees to it that no counter falls below what it stands at now, should the server die: before it is shown to anybody.
    pub(super) fn note(&self) {
        let mut state = self.state.lock();
        if !state.lives || state.ended {
            return;
        }
        state.asked += 1;
        let (mine, deadline) = (state.asked, Instant::now() + PATIENCE);
        self.changed.notify_all();
        while state.answered < mine && !state.ended && wait_until(&self.changed, &mut state, Some(deadline)) {}
    }

    /// Beats until it is ended; for a thread of its own.
    pub(super) fn run(&self, server: &Server) {
        let mut last = Pulse::default();
        let mut state = self.state.lock();
        state.lives = true;
        while !state.ended {
            let asked = state.asked;
            state.woken = false;
            let marking = server.volumes.iter().any(|volume| volume.is_marking());
            let mut rests = false;
            if marking {
                state.beats = true;
                drop(state);
                let now = pulse(server);
                if now.volumes != last.volumes {
                    if let Err(error) = server.ledger.store.beat(&now) {
                        log::debug!("{error}");
                    }
                    last = now;
                } else {
                    rests = rests_for_now(server, &last);
                }
                state = self.state.lock();
                state.beats = false;
            }
            state.answered = asked;
            self.changed.notify_all();
            let next = (marking && !rests).then(|| Instant::now() + EVERY);
            let mut in_time = true;
            while in_time && !state.ended && !state.woken && state.asked == asked {
                in_time = wait_until(&self.changed, &mut state, next);
            }
        }
    }
}

/// True if nothing will be counted before a guest writes, of which [`Heartbeat::wake`] hears then: every mirror is ready and in step, and
/// what was counted is what `last` says.
fn rests_for_now(server: &Server, last: &Pulse) -> bool {
    let marking = server.volumes.iter().filter(|volume| volume.is_marking());
    let in_step = marking.clone().all(|volume| server.mirror_of(volume).is_some_and(|job| job.ready && job.in_sync));
    if in_step {
        marking.for_each(|volume| volume.tell_next_change());
    }
    // Looked at after that: a change that was too early to be told is seen here.
    in_step && pulse(server).volumes == last.volumes
}

/// How far everything has counted now.
pub(super) fn pulse(server: &Server) -> Pulse {
    let counts = |volume: &crate::volume::Volume| {
        let (read, written) = volume.traffic();
        let mirror = server.mirror_of(volume);
        let mirror = mirror.as_ref();
        Counts {
            read,
            written,
            copied: mirror.map_or(0, |job| job.copied_bytes),
            zeroed: mirror.map_or(0, |job| job.zeroed_bytes),
            discarded: mirror.map_or(0, |job| job.discarded_bytes),
            skipped: mirror.map_or(0, |job| job.skipped_bytes),
        }
    };
    let volumes = server.volumes.iter().map(|volume| (volume.name().to_owned(), counts(volume))).collect();
    Pulse { when_ns: now_ns(), volumes }
}
