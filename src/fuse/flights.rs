//! Which requests are under way: written into a page that outlives the server, so that a request that kills servers is found out and
//! costs the guest that one request only.
//!
//! ```text
//! server 1 crashes: what was under way is suspected                        the kernel sends it all again
//! server 2 crashes: what was under way both times is the more so
//! server 3 runs the suspects one by one, everything else waits             one that kills it now is convicted
//! server 4 answers that one EIO; everything else goes on
//! ```
//!
//! A request is under way from its first look at a disk until before its reply: so a suspect was never answered, and the kernel
//! sends it again, marked [`RESENT`], before any new request. Only crashes count (the keeper says so): a server that
//! was killed from outside or replaced did not die of a request.
//!
//! Cost: a store before the request, one after it. The page is this process's alone; the next one maps it after its death.

use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, compiler_fence};
use std::time::{Duration, Instant};

use fuser::Errno;
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::error::{Error, Result};
use crate::sys::shared_page::{SharedPage, WORDS};

/// FUSE_UNIQUE_RESEND in the number of a request that was sent before.
const RESENT: u64 = 1 << 63;
/// Suspected this often, a request makes the next server careful.
const TOO_OFTEN: u64 = 2;
/// How long the careful mode may keep requests waiting: a suspect may hang on a disk, which is no crime.
const PATIENCE: Duration = Duration::from_secs(10);

/// Requests of so many threads are recorded.
pub(super) const THREADS_MAX: usize = 32;

// The page: a cache line for the one that runs alone and for whether there was progress, one for each thread, then pairs of a suspect and how often, then the convicted.
const LINE: usize = 8;
const ALONE: usize = 0;
const PROGRESS: usize = 1;
const SLOTS: std::ops::Range<usize> = LINE..LINE * (THREADS_MAX + 1);
const SUSPECTS: std::ops::Range<usize> = SLOTS.end..SLOTS.end + 2 * 64;
const CONVICTED: std::ops::Range<usize> = SUSPECTS.end..SUSPECTS.end + 64;
const _: () = assert!(CONVICTED.end <= WORDS);

thread_local! {
    static SLOT: usize = {
        static THREADS: AtomicUsize = AtomicUsize::new(0);
        SLOTS.start + THREADS.fetch_add(1, Ordering::Relaxed) * LINE
    };
}

/// The requests under way. See the module.
pub(super) struct Flights {
    /// `None`: there is no page, nothing is recorded.
    page: Option<SharedPage>,
    /// There are suspects or convicted ones: requests take the long way.
    watchful: AtomicBool,
    gate: Mutex<Gate>,
    opened: Condvar,
    until: Instant,
}

#[derive(Default)]
struct Gate {
    suspects: BTreeSet<u64>,
    convicted: BTreeSet<u64>,
    /// Suspects run one by one, and everything else waits.
    careful: bool,
    /// Requests that run now.
    running: usize,
}

impl fmt::Debug for Flights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flights").field("watchful", &self.watchful).finish_non_exhaustive()
    }
}

impl Flights {
    /// Reads what the last server left in `page`; `crashed`: it may have died of a request.
    ///
    /// # Errors
    /// It cannot be mapped.
    pub(super) fn open(page: Option<BorrowedFd<'_>>, crashed: bool) -> Result<Flights> {
        let page = page.map(SharedPage::map).transpose();
        let page = page.map_err(|error| Error::io("cannot map the record of requests", &error))?;
        let gate = page.as_ref().map_or_else(Gate::default, |page| judge(page, crashed));
        if gate.careful {
            log::warn!("{} requests may be what killed the last servers: they run one by one", gate.suspects.len());
        }
        Ok(Flights {
            page,
            watchful: AtomicBool::new(!gate.suspects.is_empty() || !gate.convicted.is_empty()),
            gate: Mutex::new(gate),
            opened: Condvar::new(),
            until: Instant::now() + PATIENCE,
        })
    }

    /// How many requests are under way at this moment; 0 if nothing is recorded.
    pub(super) fn under_way(&self) -> usize {
        let Some(page) = &self.page else { return 0 };
        SLOTS.step_by(LINE).filter(|&slot| page.word(slot).load(Ordering::Relaxed) != 0).count()
    }

    /// Runs the request with the number `unique`; `what` is for the log.
    ///
    /// # Errors
    /// Those of `work`; EIO for a request that has killed servers.
    pub(super) fn run<T>(
        &self,
        unique: u64,
        what: impl fmt::Display,
        work: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        if self.watchful.load(Ordering::Relaxed) {
            return self.run_watched(unique, what, work);
        }
        self.record(unique, work)
    }

    fn record<T>(&self, unique: u64, work: impl FnOnce() -> T) -> T {
        let slot = SLOT.with(|slot| *slot);
        let Some(page) = self.page.as_ref().filter(|_| SLOTS.contains(&slot)) else { return work() };
        // A crash shows memory as the program's order has it: only the compiler must be kept from changing that.
        page.word(slot).store(unique & !RESENT, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        let result = work();
        compiler_fence(Ordering::SeqCst);
        page.word(slot).store(0, Ordering::Relaxed);
        result
    }

    fn run_watched<T>(
        &self,
        unique: u64,
        what: impl fmt::Display,
        work: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let number = unique & !RESENT;
        let mut gate = self.gate.lock();
        if gate.convicted.remove(&number) {
            self.note(&gate);
            log::error!("{what} killed one server after the other, the last one while it was the only request: EIO");
            return Err(Errno::EIO);
        }
        let is_suspect = gate.suspects.contains(&number);
        self.wait_for_turn(&mut gate, is_suspect);
        let alone = is_suspect && gate.careful;
        gate.running += 1;
        if alone {
            log::warn!("runs alone, as it may have killed the last servers: {what}");
            self.set(ALONE, number);
        }
        drop(gate);
        let result = self.record(unique, work);
        let mut gate = self.gate.lock();
        gate.running -= 1;
        if alone {
            self.set(ALONE, 0);
        }
        if gate.suspects.remove(&number) {
            self.note(&gate);
        }
        self.opened.notify_all();
        result
    }

    /// In careful mode: a suspect waits until nothing else runs, everything else until there are no suspects.
    fn wait_for_turn(&self, gate: &mut MutexGuard<'_, Gate>, is_suspect: bool) {
        while gate.careful {
            let free = if is_suspect { gate.running == 0 } else { gate.suspects.is_empty() };
            if free {
                gate.careful &= !gate.suspects.is_empty();
                return;
            }
            if self.opened.wait_until(gate, self.until).timed_out() && gate.careful {
                log::warn!("a request hangs: the others go on beside it");
                gate.careful = false;
                self.set(ALONE, 0);
                self.opened.notify_all();
            }
        }
    }

    /// A request was answered: no single one is what kills this server at once. One load for all but the first.
    pub(super) fn answered(&self) {
        if let Some(page) = &self.page {
            if page.word(PROGRESS).load(Ordering::Relaxed) == 0 {
                self.set(PROGRESS, 1);
            }
        }
    }

    fn set(&self, word: usize, value: u64) {
        if let Some(page) = &self.page {
            page.word(word).store(value, Ordering::Relaxed);
            compiler_fence(Ordering::SeqCst);
        }
    }

    /// Takes out of the page what is out of the gate.
    fn note(&self, gate: &Gate) {
        let Some(page) = &self.page else { return };
        for at in SUSPECTS.step_by(2).filter(|at| !gate.suspects.contains(&page.word(*at).load(Ordering::Relaxed))) {
            page.word(at).store(0, Ordering::Relaxed);
        }
        for at in CONVICTED.filter(|at| !gate.convicted.contains(&page.word(*at).load(Ordering::Relaxed))) {
            page.word(at).store(0, Ordering::Relaxed);
        }
        if gate.suspects.is_empty() && gate.convicted.is_empty() {
            self.watchful.store(false, Ordering::Relaxed);
        }
    }
}

/// Judges what was under way when the last server ended, and writes the judgement down.
fn judge(page: &SharedPage, crashed: bool) -> Gate {
    let load = |at: usize| page.word(at).load(Ordering::Relaxed);
    let take = |at: usize| page.word(at).swap(0, Ordering::Relaxed);
    let alone = take(ALONE);
    take(PROGRESS);
    let under_way: Vec<u64> = SLOTS.step_by(LINE).map(take).filter(|number| *number != 0).collect();
    let place = |number: u64, width: usize, range: std::ops::Range<usize>| {
        let mut places = range.step_by(width);
        places.clone().find(|at| load(*at) == number).or_else(|| places.find(|at| load(*at) == 0))
    };
    if crashed && alone != 0 {
        if let Some(at) = place(alone, 1, CONVICTED) {
            page.word(at).store(alone, Ordering::Relaxed);
        }
        if let Some(at) = SUSPECTS.step_by(2).find(|at| load(*at) == alone) {
            page.word(at).store(0, Ordering::Relaxed);
        }
    } else if crashed {
        for number in under_way {
            let Some(at) = place(number, 2, SUSPECTS) else { continue };
            let times = if load(at) == number { load(at + 1) + 1 } else { 1 };
            page.word(at + 1).store(times, Ordering::Relaxed);
            page.word(at).store(number, Ordering::Relaxed);
        }
    }
    let suspects = || SUSPECTS.step_by(2).filter(|at| load(*at) != 0);
    Gate {
        suspects: suspects().map(load).collect(),
        convicted: CONVICTED.map(load).filter(|number| *number != 0).collect(),
        careful: suspects().any(|at| load(at + 1) >= TOO_OFTEN),
        running: 0,
    }
}

/// True if a server that had `page` has answered a request since this was asked last: then there is no need to be slow with the next one.
/// What the next one says is its own, also if it dies before it looks at the page.
pub(super) fn made_progress(page: BorrowedFd<'_>) -> bool {
    let none = [0; size_of::<u64>()];
    let mut word = none;
    let at = libc::off_t::try_from(PROGRESS * word.len()).unwrap_or(0);
    let made = nix::sys::uio::pread(page, &mut word, at).is_ok() && word != none;
    made && nix::sys::uio::pwrite(page, &none, at).is_ok()
}

/// A request, for the log.
pub(super) struct Named<'a>(pub(super) &'a str, pub(super) u64, pub(super) u64, pub(super) u64);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Named(what, inode, offset, len) = self;
        write!(f, "a guest's {what} on inode {inode} at offset {offset} ({len} bytes)")
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use super::*;

    /// A server that starts, runs `under_way` until it ends, with nothing answered.
    fn server(page: &OwnedFd, crashed: bool, under_way: &[u64]) -> Flights {
        let flights = Flights::open(Some(page.as_fd()), crashed).unwrap();
        for (at, number) in SLOTS.step_by(LINE).zip(under_way) {
            flights.page.as_ref().unwrap().word(at).store(*number, Ordering::Relaxed);
        }
        flights
    }

    fn is_careful(flights: &Flights) -> bool {
        flights.gate.lock().careful
    }

    #[test]
    fn what_was_under_way_in_two_crashes_makes_careful() {
        let page = SharedPage::create().unwrap();
        assert!(!is_careful(&server(&page, false, &[10, 12, 14])));
        assert!(!is_careful(&server(&page, true, &[10, 16])));
        let third = server(&page, true, &[]);
        assert!(is_careful(&third));
        assert_eq!(third.gate.lock().suspects, [10, 12, 14, 16].into());
        for number in [14, 16, 12, 10] {
            assert_eq!(third.run(number | RESENT, "write", || Ok(number)), Ok(number));
        }
        assert!(!third.watchful.load(Ordering::Relaxed), "all suspects were answered");
        assert!(!server(&page, true, &[]).watchful.load(Ordering::Relaxed), "and they are out of the page");
    }

    #[test]
    fn what_kills_alone_is_answered_eio_once_and_alone() {
        let page = SharedPage::create().unwrap();
        server(&page, false, &[10, 12]);
        server(&page, true, &[10, 12]);
        let third = server(&page, true, &[]);
        let alone = || third.page.as_ref().unwrap().word(ALONE).load(Ordering::Relaxed);
        let ran = third.run(10 | RESENT, "write", || {
            assert_eq!(alone(), 10);
            Ok(())
        });
        assert_eq!((ran, alone()), (Ok(()), 0));
        third.set(ALONE, 12);
        let fourth = server(&page, true, &[]);
        assert_eq!(fourth.run(12 | RESENT, "write", || Ok(())).map_err(|errno| errno.code()), Err(libc::EIO));
        assert_eq!(fourth.run(20, "write", || Ok(())), Ok(()));
        assert_eq!(fourth.run(12, "write", || Ok(())), Ok(()), "it has had its answer");
    }

    #[test]
    fn being_killed_from_outside_is_no_crash() {
        let page = SharedPage::create().unwrap();
        for _ in 0..5 {
            let flights = server(&page, false, &[10, 12]);
            assert!(!flights.watchful.load(Ordering::Relaxed));
            flights.set(ALONE, 10);
        }
        // Between two crashes it changes nothing.
        server(&page, false, &[10]);
        server(&page, true, &[10]);
        assert!(!is_careful(&server(&page, false, &[10])));
        assert!(is_careful(&server(&page, true, &[])));
    }

    #[test]
    fn others_wait_for_the_suspects() {
        let page = SharedPage::create().unwrap();
        server(&page, false, &[10, 12]);
        server(&page, true, &[10, 12]);
        let third = server(&page, true, &[]);
        let order = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            let run = |number: u64| {
                let done = third.run(number, "write", || {
                    order.lock().push(number & !RESENT);
                    Ok(())
                });
                assert_eq!(done, Ok(()));
            };
            let others = scope.spawn(move || run(20));
            while third.gate.lock().suspects.len() == 2 {
                run(10 | RESENT);
            }
            run(12 | RESENT);
            others.join().unwrap();
        });
        assert_eq!(order.into_inner(), [10, 12, 20]);
    }
}
