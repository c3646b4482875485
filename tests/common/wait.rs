//! Waiting for conditions.

use std::time::{Duration, Instant};

/// After this long a wait is a hang. No test passes or fails by how long something takes, as long as it ends.
pub const HANG: Duration = Duration::from_secs(180);

/// Waits until `condition` holds; panics naming `what` if it never does.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    until_some(what, || condition().then_some(()));
}

/// Waits until `probe` finds something and returns it; panics naming `what` if it never does.
pub fn until_some<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(start.elapsed() < HANG, "hangs: waited {HANG:?} for {what}");
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Like [`until`], but says whether it came true within `limit`: for clean-up, where giving up is an answer.
pub fn within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < limit {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    condition()
}
