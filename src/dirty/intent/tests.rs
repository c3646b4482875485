//! The intent log in a simulated world, one group of tests in each file.
mod breaks;
mod damage;
mod ends;
mod model;
mod starts;

use std::time::{Duration, Instant};

use super::region::State;
use super::simulated::{REGION, World, regions};
use super::*;
use crate::image::faulty::Gate;

/// Polls until `is_so`; a test that waits in vain fails.
fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Opens a gate at the end of a scope of threads, also when it ends with a failure: else nobody would hear of that.
struct OpensAtLast(Arc<Gate>);

impl Drop for OpensAtLast {
    fn drop(&mut self) {
        self.0.open();
    }
}

fn state(log: &IntentLog, region: u32) -> State {
    log.inner.regions.get(region).state()
}

/// The numbers of the marked regions, as the log tells them.
fn marked(log: &IntentLog) -> Vec<u64> {
    let mut found = Vec::new();
    log.marked_ranges(|range| found.extend(range.start() / REGION..range.end().div_ceil(REGION)));
    assert_eq!(log.marked_bytes().div_ceil(REGION), found.len() as u64);
    found
}

/// Lets what is marked cool down.
fn cool(world: &World) {
    world.seconds.fetch_add(HOT_SECONDS + 1, SeqCst);
}
