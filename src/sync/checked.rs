//! What stands in the place of `parking_lot` and `std` under shuttle: the same signatures, each step a point where another task may
//! go on.

#![allow(dead_code, unused_imports, reason = "which of them the rooms need differs between the two builds")]

pub use shuttle::sync::atomic;
pub use std::sync::{Arc, OnceLock};

pub use super::virtual_time::{Instant, SystemTime};

/// shuttle's mutex with parking_lot's signatures.
#[derive(Debug, Default)]
pub struct Mutex<T>(shuttle::sync::Mutex<T>);
/// Guard of [`Mutex`]. The option is empty only while a condvar holds the guard.
pub struct MutexGuard<'a, T>(Option<shuttle::sync::MutexGuard<'a, T>>);
/// shuttle's condvar with parking_lot's signatures. Shared, so that the clock can wake who waits for a time.
#[derive(Debug, Default)]
pub struct Condvar(Arc<shuttle::sync::Condvar>);
/// shuttle's read-write lock with parking_lot's signatures.
#[derive(Debug, Default)]
pub struct RwLock<T>(shuttle::sync::RwLock<T>);
/// Guard of [`RwLock`].
pub type RwLockReadGuard<'a, T> = shuttle::sync::RwLockReadGuard<'a, T>;
/// Guard of [`RwLock`].
pub type RwLockWriteGuard<'a, T> = shuttle::sync::RwLockWriteGuard<'a, T>;

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
        Condvar::default()
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
impl<T> RwLock<T> {
    /// A new lock.
    pub fn new(value: T) -> Self {
        RwLock(shuttle::sync::RwLock::new(value))
    }
    /// Locks for reading.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap()
    }
    /// Locks for writing.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().unwrap()
    }
}

/// Waits on `condvar` until it is notified or `deadline` has passed. False: the time is up. Without a simulation no time passes, and
/// there are no deadlines.
pub fn wait_until<T>(condvar: &Condvar, guard: &mut MutexGuard<'_, T>, deadline: Option<Instant>) -> bool {
    let Some(deadline) = deadline.filter(|_| super::virtual_time::runs()) else {
        condvar.wait(guard);
        return true;
    };
    if Instant::now() >= deadline {
        return false;
    }
    let timer = super::virtual_time::arm(deadline, condvar.0.clone());
    condvar.wait(guard);
    drop(timer);
    Instant::now() < deadline
}

/// `std::thread`, as far as the crate uses it.
pub mod thread {
    use std::time::Duration;

    pub use shuttle::thread::{Builder, JoinHandle, spawn, yield_now};

    /// Sleeps until the clock has come so far.
    pub fn sleep(duration: Duration) {
        let deadline = super::Instant::now() + duration;
        let (mutex, condvar) = (super::Mutex::new(()), super::Condvar::new());
        let mut guard = mutex.lock();
        if super::super::virtual_time::runs() {
            while super::wait_until(&condvar, &mut guard, Some(deadline)) {}
        } else {
            yield_now();
        }
    }
}

/// `std::sync::mpsc`, as far as the crate uses it: shuttle's knows no deadlines.
pub mod mpsc {
    use std::collections::VecDeque;
    use std::time::Duration;

    use super::{Arc, Condvar, Instant, Mutex, wait_until};

    struct Waiting<T> {
        values: VecDeque<T>,
        senders: usize,
    }
    struct Channel<T> {
        waiting: Mutex<Waiting<T>>,
        /// A value, or the end of the last sender.
        arrived: Condvar,
    }
    /// An end that sends.
    pub struct Sender<T>(Arc<Channel<T>>);
    /// The end that receives.
    pub struct Receiver<T>(Arc<Channel<T>>);

    /// A channel without bounds.
    pub fn channel<T>() -> (Sender<T>, Receiver<T>) {
        let waiting = Waiting { values: VecDeque::new(), senders: 1 };
        let channel = Arc::new(Channel { waiting: Mutex::new(waiting), arrived: Condvar::new() });
        (Sender(channel.clone()), Receiver(channel))
    }
    impl<T> Sender<T> {
        /// Sends.
        ///
        /// # Errors
        /// None.
        pub fn send(&self, value: T) -> Result<(), T> {
            self.0.waiting.lock().values.push_back(value);
            self.0.arrived.notify_all();
            Ok(())
        }
    }
    impl<T> Clone for Sender<T> {
        fn clone(&self) -> Self {
            self.0.waiting.lock().senders += 1;
            Sender(self.0.clone())
        }
    }
    impl<T> Drop for Sender<T> {
        fn drop(&mut self) {
            self.0.waiting.lock().senders -= 1;
            self.0.arrived.notify_all();
        }
    }
    impl<T> Receiver<T> {
        /// Waits for what is sent, no longer than `patience`.
        ///
        /// # Errors
        /// The time is up, or nobody sends any more.
        pub fn recv_timeout(&self, patience: Duration) -> Result<T, ()> {
            self.receive(Some(Instant::now() + patience)).ok_or(())
        }

        /// All that is sent, until nobody sends any more.
        pub fn iter(&self) -> impl Iterator<Item = T> {
            std::iter::from_fn(|| self.receive(None))
        }

        fn receive(&self, deadline: Option<Instant>) -> Option<T> {
            let mut waiting = self.0.waiting.lock();
            let mut in_time = true;
            while in_time && waiting.values.is_empty() && waiting.senders > 0 {
                in_time = wait_until(&self.0.arrived, &mut waiting, deadline);
            }
            waiting.values.pop_front()
        }
    }
}
