//! A place in the course of a request where a test can hold it.

use crate::sync::{Arc, Condvar, Mutex};

/// A place where requests wait until a test lets them go on. Closed at first; once open it stays open.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    open: bool,
    arrived: u64,
}

impl Gate {
    /// A closed gate.
    pub fn new() -> Arc<Self> {
        Arc::new(Gate::default())
    }

    /// Lets everybody through, now and later.
    pub fn open(&self) {
        self.state.lock().open = true;
        self.changed.notify_all();
    }

    /// Waits until `count` requests have come to the gate (since it was made).
    pub fn wait_for_arrivals(&self, count: u64) {
        let mut state = self.state.lock();
        while state.arrived < count {
            self.changed.wait(&mut state);
        }
    }

    /// How many requests have come to the gate.
    pub fn arrivals(&self) -> u64 {
        self.state.lock().arrived
    }

    /// Comes to the gate, and waits until it is open.
    pub fn pass(&self) {
        let mut state = self.state.lock();
        state.arrived += 1;
        self.changed.notify_all();
        while !state.open {
            self.changed.wait(&mut state);
        }
    }
}
