//! The locks, atomics and threads of the crate. They come from one place so that a model checker can replace them: built with
//! `--cfg shuttle`, the same code runs under shuttle's scheduler.

#[cfg(shuttle)]
pub use self::checked::*;
#[cfg(not(shuttle))]
pub use self::real::*;

#[cfg(not(shuttle))]
mod real {
    #[allow(unused_imports, reason = "which of them the rooms need differs between the two builds")]
    pub use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
    pub use std::sync::{Arc, OnceLock, atomic};
    pub use std::thread;

    use std::time::Instant;

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

#[cfg(shuttle)]
#[allow(dead_code, unused_imports, reason = "which of them the rooms need differs between the two builds")]
mod checked {
    pub use parking_lot::RwLock;
    pub use shuttle::sync::atomic;
    pub use shuttle::thread;
    pub use std::sync::{Arc, OnceLock};

    use std::time::Instant;

    /// shuttle's mutex with parking_lot's signatures.
    #[derive(Debug, Default)]
    pub struct Mutex<T>(shuttle::sync::Mutex<T>);
    /// Guard of [`Mutex`]. The option is empty only while a condvar holds the guard.
    pub struct MutexGuard<'a, T>(Option<shuttle::sync::MutexGuard<'a, T>>);
    /// shuttle's condvar with parking_lot's signatures.
    #[derive(Debug, Default)]
    pub struct Condvar(shuttle::sync::Condvar);

    impl<T> Mutex<T> {
        /// A new mutex.
        pub fn new(value: T) -> Self {
            Mutex(shuttle::sync::Mutex::new(value))
        }
        /// Locks.
        pub fn lock(&self) -> MutexGuard<'_, T> {
            MutexGuard(Some(self.0.lock().unwrap()))
        }
        /// The value, of which the caller is the only owner.
        pub fn get_mut(&mut self) -> &mut T {
            self.0.get_mut().unwrap()
        }
    }
    impl<T> std::ops::Deref for MutexGuard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            self.0.as_ref().unwrap()
        }
    }
    impl<T> std::ops::DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.0.as_mut().unwrap()
        }
    }
    impl Condvar {
        /// A new condvar.
        pub fn new() -> Self {
            Condvar(shuttle::sync::Condvar::new())
        }
        /// Waits.
        pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
            guard.0 = Some(self.0.wait(guard.0.take().unwrap()).unwrap());
        }
        /// Wakes one.
        pub fn notify_one(&self) {
            self.0.notify_one();
        }
        /// Wakes all.
        pub fn notify_all(&self) {
            self.0.notify_all();
        }
    }

    /// Waits on `condvar`; deadlines do not exist under the model checker.
    pub fn wait_until<T>(condvar: &Condvar, guard: &mut MutexGuard<'_, T>, _deadline: Option<Instant>) -> bool {
        condvar.wait(guard);
        true
    }
}
