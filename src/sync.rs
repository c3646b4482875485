//! The locks, atomics, threads and the clock of the crate. They come from one place so that a model checker can replace them: built
//! with `--cfg shuttle`, the same code runs under shuttle's scheduler, and time is what a simulation says.
//!
//! Outside of that build everything here is another name for what `parking_lot` and `std` have.

#[cfg(shuttle)]
mod checked;
#[cfg(shuttle)]
pub mod virtual_time;

#[cfg(shuttle)]
pub use self::checked::*;
#[cfg(not(shuttle))]
pub use self::real::*;

#[cfg(not(shuttle))]
mod real {
    #[allow(unused_imports, reason = "which of them the rooms need differs between the two builds")]
    pub use parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
    pub use std::sync::{Arc, OnceLock, atomic, mpsc};
    pub use std::thread;
    pub use std::time::{Instant, SystemTime};

    /// Waits on `condvar` until it is notified or `deadline` has passed (`None`: no deadline). False: the time is up.
    pub fn wait_until<T>(condvar: &Condvar, guard: &mut MutexGuard<'_, T>, deadline: Option<Instant>) -> bool {
        match deadline {
            Some(deadline) => !condvar.wait_until(guard, deadline).timed_out(),
            None => {
                condvar.wait(guard);
                true
            }
        }
    }
}
