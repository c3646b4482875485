//! One sync for many: whoever needs the file synced waits for a sync that begins after the call, and many wait for the same.
//!
//! ```text
//! A ----- sync 1 -----|
//!      B, C wait      |----- sync 2 (for B and C) -----|
//! ```
//!
//! A failure is told to everybody whose changes it may have cost: all who waited for that sync, or for one before it that they
//! have not heard of yet.

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
}

impl SyncPoint {
    /// Returns once a `sync` that began after this call has succeeded. Whether it is this caller who runs it is chance.
    ///
    /// # Errors
    /// That of the sync.
    pub(super) fn pass(&self, sync: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut state = self.state.lock();
        let wanted = state.begun + 1;
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
                state.failed = Some((number, error));
            }
            self.ended.notify_all();
        }
        match &state.failed {
            Some((number, error)) if *number >= wanted => Err(error.clone()),
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

    #[test]
    fn a_failure_is_not_healed_by_the_next_success() {
        let point = SyncPoint::default();
        let error = || Error::new(ErrorKind::Failed, "no");
        assert!(point.pass(|| Err(error())).is_err());
        assert!(point.pass(|| Ok(())).is_ok(), "who comes later asks for later changes");
    }
}
