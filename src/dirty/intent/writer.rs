//! The log's one writer: the thread that makes bits durable, a group at a time, and the guests that wait for it.
//!
//! ```text
//! guest:       ask (Clear | Clearing -> Setting) ─┐                              ┌─> Setting -> Set,    guests go on
//! retirer:     hand over (still Retiring) ────────┴─> take ─> pwrite ─> fdatasync┴─> Clearing -> Clear, retirer goes on
//! ```
//!
//! What is asked for while a group is on its way is in the next one: one fdatasync for each group, however many guests wait. A
//! group that fails, or that a guest has waited for too long, is the last: see [`Inner::fail`].

use std::io;
use std::ops::Range;

use crate::error::{Error, ErrorKind};
use crate::sync::atomic::Ordering::SeqCst;
use crate::sync::{Arc, Instant, MutexGuard, wait_until};

use super::Inner;
use super::format::{Layout, SECTOR_BYTES, SECTORS_MAX, encode};
use super::region::State;

/// Whether the log may be trusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Health {
    #[default]
    Sound,
    /// Somebody is in [`super::Forget::forget`].
    Forgetting,
    /// The pairing is gone. Nobody waits for this log any more.
    Broken,
}

/// What the log's thread is asked to do, and how it stands. Lives in the log's lock.
#[derive(Default)]
pub(super) struct Queue {
    /// Regions that became `Setting` since the last group. Each is in here once at most.
    wanted: Vec<u32>,
    /// Regions of the retirer, flushed, that it saw `Retiring`.
    pub(super) retired: Vec<u32>,
    pub(super) health: Health,
    pub(super) broken_by: Option<Error>,
    /// Number of the last lot of regions that the retirer handed over, and of the last that was dealt with.
    pub(super) lots_given: u64,
    pub(super) lots_done: u64,
    /// How many regions became `Clear` with the last one.
    pub(super) cleared: usize,
    /// The log's thread is to end, and has ended.
    pub(super) closing: bool,
    pub(super) ended: bool,
    /// The retirer is to end.
    pub(super) stop_retiring: bool,
    /// Regions became `Set` since the retirer began to look; it waits for that without a timeout.
    pub(super) newly_set: bool,
    pub(super) retirer_idle: bool,
}

/// One group commit. Kept from group to group for its memory, which is bounded by the number of regions.
#[derive(Default)]
struct Group {
    set: Vec<u32>,
    clear: Vec<u32>,
    lot: u64,
    /// A bit for each sector to be written.
    sectors: [u64; SECTORS_MAX.div_ceil(64)],
    /// Those sectors, one after the other.
    bytes: Vec<u8>,
}

impl Group {
    fn touch(&mut self, region: u32) {
        let sector = Layout::sector_of(region);
        self.sectors[sector / 64] |= 1 << (sector % 64);
    }

    /// Its sectors as runs of neighbours.
    fn runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for sector in (0..64 * self.sectors.len()).filter(|at| self.sectors[at / 64] >> (at % 64) & 1 == 1) {
            match runs.last_mut() {
                Some(run) if run.end == sector => run.end += 1,
                _ => runs.push(sector..sector + 1),
            }
        }
        runs
    }
}

impl Inner {
    /// Waits until all of `touched`, in which the caller is counted, is durably marked, or the log is broken.
    #[cold]
    pub(super) fn wait_until_durable(&self, touched: Range<u32>) {
        let deadline = Instant::now().checked_add(self.settings.max_wait);
        let mut queue = self.queue.lock();
        for region in touched.clone() {
            self.ask(&mut queue, region);
        }
        if !queue.wanted.is_empty() {
            self.work.notify_one();
        }
        let mut at = touched.start;
        loop {
            // What is set stays set while the caller is counted there.
            while at < touched.end && self.regions.get(at).state() == State::Set {
                at += 1;
            }
            if at >= touched.end || queue.health == Health::Broken {
                return;
            }
            // Whoever forgets the pairing takes the time that it takes.
            let sound = queue.health == Health::Sound;
            let what = match sound {
                true if queue.ended => "a write came after the end of the intent log".to_owned(),
                true if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                    format!("no answer for {:?} from the intent log", self.settings.max_wait)
                }
                _ => {
                    wait_until(&self.done, &mut queue, deadline.filter(|_| sound));
                    continue;
                }
            };
            drop(queue);
            return self.fail(Error::new(ErrorKind::Failed, what));
        }
    }

    /// Sees to it that the region's bit is durable, or is about to be.
    fn ask(&self, queue: &mut Queue, number: u32) {
        let region = self.regions.get(number);
        loop {
            match region.state() {
                State::Set | State::Setting => return,
                State::Retiring => _ = region.change(State::Retiring, State::Set),
                // While it is being cleared the log's thread is at work on another group; this is for the next.
                old @ (State::Clear | State::Clearing) => {
                    if region.change(old, State::Setting) {
                        self.regions.mark(number);
                        queue.wanted.push(number);
                    }
                }
            }
        }
    }

    /// The log's thread.
    pub(super) fn write_groups(self: &Arc<Self>) {
        let mut group = Group::default();
        while self.take(&mut group) {
            let result = if group.bytes.is_empty() { Ok(()) } else { self.commit(&group) };
            if let Err(error) = result {
                self.fail(Error::io("cannot write the intent log", &error));
                break;
            }
            if !self.complete(&mut group) {
                break;
            }
        }
        self.queue.lock().ended = true;
        self.done.notify_all();
    }

    /// Waits for something to do. False: there is nothing more to come.
    fn take(&self, group: &mut Group) -> bool {
        let mut queue = self.queue.lock();
        while queue.health == Health::Sound && !queue.closing && queue.wanted.is_empty() && queue.retired.is_empty() {
            self.work.wait(&mut queue);
        }
        if queue.health != Health::Sound || queue.closing && queue.wanted.is_empty() {
            return false;
        }
        std::mem::swap(&mut group.set, &mut queue.wanted);
        group.lot = queue.lots_given;
        std::mem::swap(&mut group.clear, &mut queue.retired);
        // Rule 2 (c): what a write has set back meanwhile stays.
        group.clear.retain(|&region| self.regions.get(region).change_idle(State::Retiring, State::Clearing));
        group.sectors = [0; SECTORS_MAX.div_ceil(64)];
        group.bytes.clear();
        for at in 0..group.set.len() {
            group.touch(group.set[at]);
        }
        for at in 0..group.clear.len() {
            self.regions.unmark(group.clear[at]);
            group.touch(group.clear[at]);
        }
        self.encode(group, &queue);
        true
    }

    /// Under the lock, so that no bit changes meanwhile: microseconds.
    fn encode(&self, group: &mut Group, _queue: &MutexGuard<'_, Queue>) {
        for sector in group.runs().into_iter().flatten() {
            let words = self.layout.words_of(sector).map(|at| self.regions.marked_word(at));
            group.bytes.extend_from_slice(&encode(self.layout, &self.job, sector, words));
        }
    }

    fn commit(&self, group: &Group) -> io::Result<()> {
        let mut rest = &group.bytes[..];
        for run in group.runs() {
            let (bytes, after) = rest.split_at(run.len() * SECTOR_BYTES);
            self.file.write_at((run.start * SECTOR_BYTES) as u64, bytes)?;
            rest = after;
        }
        self.syncs.fetch_add(1, SeqCst);
        self.file.sync()
    }

    /// The group is durable. False: somebody has given up on the log meanwhile.
    fn complete(&self, group: &mut Group) -> bool {
        let mut queue = self.queue.lock();
        if queue.health != Health::Sound {
            return false;
        }
        for region in group.set.drain(..) {
            self.regions.get(region).change(State::Setting, State::Set);
            queue.newly_set = true;
        }
        if group.lot > queue.lots_done {
            // Those in which a write waits are `Setting` already.
            let cleared = |region: &u32| self.regions.get(*region).change(State::Clearing, State::Clear);
            queue.cleared = group.clear.drain(..).filter(cleared).count();
            queue.lots_done = group.lot;
        }
        if queue.newly_set && queue.retirer_idle {
            self.retire.notify_one();
        }
        self.done.notify_all();
        true
    }

    /// Gives the log up: makes the pairing forgotten, once, and then lets everybody go on. Returns when that is so. Takes locks,
    /// but holds none while it forgets.
    pub(super) fn fail(&self, error: Error) {
        let mut queue = self.queue.lock();
        if queue.health == Health::Sound {
            queue.health = Health::Forgetting;
            drop(queue);
            let error = error.on(&self.name);
            log::error!("{error}; the mirror goes on, but cannot be resumed after a restart");
            self.settings.forget.forget(&error);
            queue = self.queue.lock();
            queue.health = Health::Broken;
            queue.broken_by = Some(error);
            self.broken.store(true, SeqCst);
            self.done.notify_all();
            self.work.notify_all();
            self.retire.notify_all();
        }
        while queue.health == Health::Forgetting {
            self.done.wait(&mut queue);
        }
    }
}
