//! How long a server took from its start to each stage: guests wait for so long when one was killed. Logged at debug level.

use std::fmt;
use std::time::Instant;

/// See the module.
pub(super) struct Phases {
    start: Instant,
    ended: Vec<(&'static str, u128)>,
}

impl Phases {
    pub(super) fn new() -> Phases {
        Phases { start: Instant::now(), ended: Vec::new() }
    }

    pub(super) fn end(&mut self, phase: &'static str) {
        self.ended.push((phase, self.start.elapsed().as_micros()));
    }
}

impl fmt::Display for Phases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phases =
            self.ended.iter().map(|(phase, micros)| format!("{phase} {}.{:03} ms", micros / 1000, micros % 1000));
        f.write_str(&phases.collect::<Vec<_>>().join(", "))
    }
}
