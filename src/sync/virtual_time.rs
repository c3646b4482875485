//! Time under a model checker: it stands still but for what a simulation says, and who waits for a moment is woken when the
//! simulation lets it come.
//!
//! Everything is kept for the operating system's thread, on which one execution at a time runs with all its tasks.

#![allow(dead_code, reason = "without a simulation no time passes")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Add, AddAssign, Sub};
use std::sync::Arc;
use std::time::Duration;

use shuttle::sync::Condvar;

/// A moment of the virtual clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(Duration);

/// The wall clock: the virtual one, from a fixed day on.
#[derive(Clone, Copy, Debug)]
pub struct SystemTime;

/// The virtual clock starts on this day, in seconds since the epoch.
const EPOCH_SECONDS: u64 = 1_700_000_000;

#[derive(Default)]
struct Clock {
    runs: bool,
    now: Duration,
    armed: u64,
    /// Who waits, by moment: the task, and how it is woken.
    timers: BTreeMap<(Duration, u64), (usize, Arc<Condvar>)>,
}

thread_local!(static CLOCK: RefCell<Clock> = RefCell::default());

fn with<T>(look: impl FnOnce(&mut Clock) -> T) -> T {
    CLOCK.with(|clock| look(&mut clock.borrow_mut()))
}

/// A moment that somebody waits for. Dropping it forgets it.
pub(super) struct Timer((Duration, u64));

impl Drop for Timer {
    fn drop(&mut self) {
        with(|clock| clock.timers.remove(&self.0));
    }
}

/// Has `condvar` notified once it is `deadline`.
pub(super) fn arm(deadline: Instant, condvar: Arc<Condvar>) -> Timer {
    let task = usize::from(shuttle::thread::current().id());
    with(|clock| {
        clock.armed += 1;
        let key = (deadline.0, clock.armed);
        clock.timers.insert(key, (task, condvar));
        Timer(key)
    })
}

/// True while a simulation moves the clock.
pub fn runs() -> bool {
    with(|clock| clock.runs)
}

/// A simulation begins: the clock stands at its start, and nobody waits.
pub fn start() {
    with(|clock| *clock = Clock { runs: true, now: Duration::from_secs(1000), ..Clock::default() });
}

/// It has ended. What it leaves behind is given to the caller, to be dropped or not.
pub fn stop() {
    with(|clock| *clock = Clock::default());
}

/// Lets some time pass. Wakes nobody.
pub fn pass(duration: Duration) {
    with(|clock| clock.now += duration);
}

/// Goes on to the next moment that anybody waits for whom `lives` knows, and wakes those whose moment has come. False: nobody
/// waits for any.
pub fn advance(lives: impl Fn(usize) -> bool) -> bool {
    let due: Vec<Arc<Condvar>> = with(|clock| {
        clock.timers.retain(|_, (task, _)| lives(*task));
        let Some((&(first, _), _)) = clock.timers.first_key_value() else { return Vec::new() };
        clock.now = clock.now.max(first);
        let due = clock.timers.range(..=(clock.now, u64::MAX));
        due.map(|(_, (_, condvar))| condvar.clone()).collect()
    });
    // Those that were woken before and have not looked yet are woken again: nobody is between looking and waiting for ever.
    due.iter().for_each(|condvar| condvar.notify_all());
    !due.is_empty()
}

impl Instant {
    /// How long after `earlier` it is; nothing if it is before it.
    pub fn saturating_duration_since(&self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// Now.
    pub fn now() -> Self {
        Instant(with(|clock| clock.now))
    }
    /// Since then.
    pub fn elapsed(&self) -> Duration {
        Instant::now().0.saturating_sub(self.0)
    }
    /// Later by `duration`, if there is such a moment.
    pub fn checked_add(&self, duration: Duration) -> Option<Self> {
        self.0.checked_add(duration).map(Instant)
    }
    /// Earlier by `duration`, if there is such a moment.
    pub fn checked_sub(&self, duration: Duration) -> Option<Self> {
        self.0.checked_sub(duration).map(Instant)
    }
    /// Whole seconds since the clock's start.
    pub fn seconds(&self) -> u64 {
        self.0.as_secs()
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, duration: Duration) -> Instant {
        Instant(self.0 + duration)
    }
}
impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, duration: Duration) {
        self.0 += duration;
    }
}
impl Sub<Duration> for Instant {
    type Output = Instant;
    fn sub(self, duration: Duration) -> Instant {
        Instant(self.0.saturating_sub(duration))
    }
}
impl Sub for Instant {
    type Output = Duration;
    fn sub(self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl SystemTime {
    /// Now.
    pub fn now() -> std::time::SystemTime {
        std::time::UNIX_EPOCH + Duration::from_secs(EPOCH_SECONDS) + with(|clock| clock.now)
    }
}
