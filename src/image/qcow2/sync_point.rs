//! One sync for many: whoever needs the file synced waits for a sync that begins after the call, and many wait for the same.
//!
//! ```text
//! A ----- sync 1 -----|
//!      B, C wait      |----- sync 2 (for B and C) -----|
//! ```
//!
//! A failure is told to everybody whose changes it may have cost. The kernel tells of what it could not write once, to the sync that
//! comes next, whoever needs that one:
//! - all who waited while a sync ran that failed hear of it, also those for whom a later one succeeded;
//! - whoever hears of it may have asked for a new cluster only. So a failure is *owed* to the next flush, which fails even if its own
//!   sync succeeds: acknowledged writes before it may be lost.

use crate::error::{Error, Result};
use crate::sync::{Condvar, Mutex};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct SyncPoint {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    begun: u64,
    done: u64,
    /// The newest sync that failed, and how.
    failed: Option<(u64, Error)>,
    /// A failure that no flush has told of.
    owed: Option<Error>,
}

impl SyncPoint {
    /// As `pass`, for whoever asks that all acknowledged writes be durable.
    ///
    /// # Errors
    /// That of the sync, or of an earlier one since the last flush.
    pub(super) fn flush(&self, sync: impl FnOnce() -> Result<()>) -> Result<()> {
        let passed = self.pass(sync);
        let owed = self.state.lock().owed.take();
        passed.and(owed.map_or(Ok(()), Err))
    }

    /// Returns once a `sync` that began after this call has succeeded. Whether it is this caller who runs it is chance.
    ///
    /// # Errors
    /// That of the sync, or of one that was under way.
    pub(super) fn pass(&self, sync: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut state = self.state.lock();
        let (wanted, ended_before) = (state.begun + 1, state.done);
        while state.running && state.done < wanted {
            self.ended.wait(&mut state);
        }
        if state.done < wanted {
            state.running = true;
            state.begun += 1;
            let number = state.begun;
            drop(state);
            let result = sync();
            state = self.state.lock();
            state.running = false;
            state.done = number;
            if let Err(error) = result {
                state.owed = Some(error.clone());
                state.failed = Some((number, error));
            }
            self.ended.notify_all();
        }
        match &state.failed {
            Some((number, error)) if *number > ended_before => Err(error.clone()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::gate::Gate;
    use super::*;
    use crate::error::ErrorKind;
    use crate::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

    #[test]
    fn waiters_share_one_sync_that_began_after_they_came() {
        let (point, syncs, gate) = (Arc::new(SyncPoint::default()), Arc::new(AtomicU64::new(0)), Gate::new());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                point.pass(|| {
                    syncs.fetch_add(1, SeqCst);
                    gate.pass();
                    Ok(())
                })
            });
            gate.wait_for_arrivals(1);
            let waiting: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        point.pass(|| {
                            syncs.fetch_add(1, SeqCst);
                            Ok(())
                        })
                    })
                })
                .collect();
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert_eq!(syncs.load(SeqCst), 1, "the one under way may have missed what came after its start");
            gate.open();
            waiting.into_iter().for_each(|waiter| waiter.join().unwrap().unwrap());
        });
        let all = syncs.load(SeqCst);
        assert!((2..=9).contains(&all), "{all}");
    }

    fn error() -> Error {
        Error::new(ErrorKind::Failed, "no")
    }

    #[test]
    fn a_failure_is_owed_to_the_next_flush_once() {
        let point = SyncPoint::default();
        assert!(point.pass(|| Err(error())).is_err());
        assert!(point.pass(|| Ok(())).is_ok(), "who comes later asks for later changes");
        assert!(point.flush(|| Ok(())).is_err(), "acknowledged writes may be lost");
        assert!(point.flush(|| Ok(())).is_ok());
        assert!(point.flush(|| Err(error())).is_err());
        assert!(point.flush(|| Ok(())).is_ok(), "a flush has told of it");
    }

    #[test]
    fn who_came_while_a_sync_ran_hears_of_its_failure() {
        let (point, gate) = (SyncPoint::default(), Gate::new());
        std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                point.pass(|| {
                    gate.pass();
                    Err(error())
                })
            });
            gate.wait_for_arrivals(1);
            let second = scope.spawn(|| point.pass(|| Ok(())));
            // No other thread can tell that it waits; were it late, it would hear nothing and the test would fail.
            std::thread::sleep(std::time::Duration::from_millis(500));
            gate.open();
            assert!(first.join().unwrap().is_err());
            assert!(second.join().unwrap().is_err(), "the failure may be of what it wrote");
        });
    }
}
