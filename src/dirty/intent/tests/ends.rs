//! The end of a bit: each condition of rule 2, the time that a region stays hot, and the retirer's thread.

use super::*;

const EVERYTHING: &[u32] = &[0, 1, 2, 3, 4, 5, 6, 7];

#[test]
fn what_is_quiet_is_cleared_with_one_flush_and_one_write() {
    let world = World::new(8);
    let log = world.log_with(Duration::from_secs(60), EVERYTHING);
    world.mark_dirty(2);
    world.mark_dirty(5);
    log.inner.pass(&*world);
    assert_eq!((marked(&log), log.syncs(), world.flushes.load(SeqCst)), (vec![2, 5], 1, 1));
    assert!(world.is_durable(2) && !world.is_durable(3));
    // Nothing more to clear: no flush, no write.
    log.inner.pass(&*world);
    assert_eq!((log.syncs(), world.flushes.load(SeqCst)), (1, 1));
    while world.copy_one() {}
    assert_eq!(log.inner.pass(&*world), retire::Next::WhenMarked);
    assert_eq!((marked(&log), log.syncs(), world.flushes.load(SeqCst)), (vec![], 2, 2));
    // And set again.
    world.guest_write(&log, 2);
    assert_eq!(marked(&log), [2]);
}

#[test]
fn a_region_with_a_write_in_flight_is_not_cleared() {
    let world = World::new(8);
    let log = world.log_with(Duration::from_secs(60), &[1]);
    let passage = log.enter(regions(1, 1));
    cool(&world);
    log.inner.pass(&*world);
    assert_eq!((state(&log, 1), world.flushes.load(SeqCst)), (State::Set, 0));
    drop(passage);
}

#[test]
fn nothing_is_cleared_when_a_flush_fails() {
    let world = World::new(8);
    let log = world.log_with(Duration::from_secs(60), &[1]);
    world.faults.lock().unwrap().flush = Some(libc::EIO);
    assert_eq!(log.inner.pass(&*world), retire::Next::After(Duration::from_millis(50)));
    assert_eq!((state(&log, 1), log.syncs(), world.is_durable(1)), (State::Set, 0, true));
}

/// Servers may be killed often: each must get to clear something of what it has copied.
#[test]
fn the_first_looks_come_soon_after_each_other() {
    let world = World::new(8);
    let log = world.log_with(Duration::from_secs(60), EVERYTHING);
    EVERYTHING.iter().for_each(|&region| world.mark_dirty(region));
    let waits: Vec<_> = (0..7).map(|_| log.inner.pass(&*world)).collect();
    assert_eq!(waits, [50, 100, 200, 400, 800, 1000, 1000].map(|ms| retire::Next::After(Duration::from_millis(ms))));
    assert_eq!((log.syncs(), world.flushes.load(SeqCst)), (0, 0), "looks only, where nothing can be cleared");
}

#[test]
fn both_flushes_begin_once_a_region_is_retiring() {
    let world = World::new(8);
    let log = Arc::new(world.log_with(Duration::from_secs(60), &[1]));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let look = (Arc::downgrade(&log), Arc::clone(&seen));
    *world.in_flush.lock().unwrap() = Some(Box::new(move || look.1.lock().push(state(&look.0.upgrade().unwrap(), 1))));
    log.inner.pass(&*world);
    assert_eq!((&*seen.lock(), state(&log, 1)), (&vec![State::Retiring], State::Clear));
}

#[test]
fn a_write_during_the_flush_sets_the_bit_back_without_any_wait() {
    let world = World::new(8);
    let log = Arc::new(world.log_with(Duration::from_secs(60), &[1, 2]));
    let during = (Arc::downgrade(&log), Arc::downgrade(&world));
    *world.in_flush.lock().unwrap() = Some(Box::new(move || {
        let (log, world) = (during.0.upgrade().unwrap(), during.1.upgrade().unwrap());
        let passage = log.enter(regions(1, 1));
        assert_eq!((log.syncs(), state(&log, 1)), (0, State::Set), "in memory, no write of the log");
        // The flush has begun: it does not cover this. The copy ends before the flush does, and nothing is dirty then.
        world.write_source(1);
        world.mark_dirty(1);
        drop(passage);
        assert!(world.copy_one());
    }));
    log.inner.pass(&*world);
    assert_eq!((marked(&log), log.syncs()), (vec![1], 1));
    assert!(world.is_durable(1) && !world.is_durable(2));
    // A pass later there is nothing between it and its flush. Hot first, though.
    *world.in_flush.lock().unwrap() = None;
    log.inner.pass(&*world);
    assert_eq!(marked(&log), [1]);
    cool(&world);
    log.inner.pass(&*world);
    assert_eq!(log.marked_bytes(), 0);
}

#[test]
fn what_becomes_dirty_during_the_flush_stays_marked() {
    let world = World::new(8);
    let log = world.log_with(Duration::from_secs(60), &[1]);
    let during = Arc::downgrade(&world);
    // Another flush of the target fails meanwhile, and what was written before it must be copied again.
    *world.in_flush.lock().unwrap() = Some(Box::new(move || during.upgrade().unwrap().mark_dirty(1)));
    log.inner.pass(&*world);
    assert_eq!((state(&log, 1), log.syncs()), (State::Set, 0));
}

/// Seed 5835 of the simulation: the failed flush had begun before the pass.
#[test]
fn what_a_failed_flush_made_dirty_stays_marked_though_it_was_copied_again() {
    let world = World::new(8);
    let log = world.log_with(Duration::from_secs(60), &[1]);
    let during = Arc::downgrade(&world);
    *world.in_flush.lock().unwrap() = Some(Box::new(move || {
        during.upgrade().unwrap().failed_flushes.fetch_add(1, SeqCst);
    }));
    log.inner.pass(&*world);
    assert_eq!((state(&log, 1), log.syncs()), (State::Set, 0));
    *world.in_flush.lock().unwrap() = None;
    log.inner.pass(&*world);
    assert_eq!(log.marked_bytes(), 0);
}

#[test]
fn a_write_that_marked_dirty_between_the_looks_is_seen() {
    /// Says that all is quiet, lets a write come and go, and tells the truth from then on.
    struct Late<'a>(&'a World, &'a IntentLog, AtomicBool);
    impl Clearing for Late<'_> {
        fn is_quiet(&self, range: ByteRange) -> bool {
            let quiet = self.0.is_quiet(range);
            if !self.2.swap(true, SeqCst) {
                let passage = self.1.enter(range);
                self.0.write_source(1);
                self.0.mark_dirty(1);
                drop(passage);
            }
            quiet
        }
        fn failed_flushes(&self) -> u64 {
            self.0.failed_flushes()
        }
        fn flush_both(&self) -> Result<()> {
            self.0.flush_both()
        }
    }
    let world = World::new(8);
    let log = world.log_with(Duration::from_secs(60), &[1]);
    world.seconds.store(0, SeqCst);
    log.inner.pass(&Late(&world, &log, AtomicBool::new(false)));
    assert_eq!((state(&log, 1), world.flushes.load(SeqCst)), (State::Set, 0));
}

#[test]
fn a_write_while_the_bit_is_cleared_waits_and_marks_again() {
    let world = World::new(8);
    let log = world.log_with(Duration::from_secs(60), &[1]);
    let gate = Gate::new();
    world.faults.lock().unwrap().before_sync = Some(gate.clone());
    std::thread::scope(|scope| {
        let _at_last = OpensAtLast(gate.clone());
        let pass = scope.spawn(|| log.inner.pass(&*world));
        gate.wait_for_arrivals(1);
        assert_eq!(state(&log, 1), State::Clearing);
        let guest = scope.spawn(|| world.guest_write(&log, 1));
        eventually("asked again", || state(&log, 1) == State::Setting);
        std::thread::sleep(Duration::from_millis(20));
        assert!(!guest.is_finished());
        gate.open();
        guest.join().unwrap();
        pass.join().unwrap();
    });
    assert_eq!((log.syncs(), marked(&log), world.is_durable(1)), (2, vec![1], true));
}

#[test]
fn a_hot_region_stays_marked_until_it_has_cooled() {
    let world = World::new(8);
    let log = world.log();
    log.mark_durably(regions(1, 1));
    world.seconds.fetch_add(20, SeqCst);
    log.mark_durably(regions(2, 1));
    assert_eq!(log.inner.pass(&*world), retire::Next::After(Duration::from_secs(11)), "until the first has cooled");
    world.seconds.fetch_add(10, SeqCst);
    log.inner.pass(&*world);
    assert_eq!((marked(&log), world.flushes.load(SeqCst)), (vec![1, 2], 0));
    world.seconds.fetch_add(1, SeqCst);
    log.inner.pass(&*world);
    assert_eq!(marked(&log), [2]);
    // Written again: hot again.
    log.mark_durably(regions(2, 1));
    world.seconds.fetch_add(HOT_SECONDS, SeqCst);
    assert_eq!(log.inner.pass(&*world), retire::Next::After(Duration::from_secs(1)));
    world.seconds.fetch_add(1, SeqCst);
    assert_eq!(log.inner.pass(&*world), retire::Next::WhenMarked);
    assert_eq!(log.marked_bytes(), 0);
}

#[test]
fn the_retirer_clears_what_has_become_quiet_within_two_seconds_and_then_sleeps() {
    let world = World::new(8);
    let log = world.log_with(Duration::from_secs(60), EVERYTHING);
    let passes = || log.inner.passes.load(SeqCst);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((passes(), log.marked_bytes()), (0, 8 * REGION), "nothing is cleared while nothing is attached");
    world.mark_dirty(3);
    log.attach(world.clone());
    eventually("the quiet ones are cleared", || marked(&log) == [3]);
    let before = Instant::now();
    assert!(world.copy_one());
    eventually("the last one is cleared", || marked(&log).is_empty());
    assert!(before.elapsed() < Duration::from_secs(2));
    // Nothing is marked: no passes. A first write wakes it, and that region is hot.
    eventually("it sleeps", || log.inner.queue.lock().retirer_idle);
    let resting = passes();
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(passes(), resting);
    log.mark_durably(regions(5, 1));
    eventually("it looks", || passes() > resting);
    std::thread::sleep(Duration::from_millis(1500));
    assert!(passes() <= resting + 2 && !log.inner.queue.lock().retirer_idle, "it sleeps until the region has cooled");
    assert_eq!(marked(&log), [5]);
}

#[test]
fn detaching_waits_for_a_call_that_is_under_way() {
    let world = World::new(8);
    let log = world.log_with(Duration::from_secs(60), &[1]);
    let gate = Gate::new();
    let in_flush = gate.clone();
    *world.in_flush.lock().unwrap() = Some(Box::new(move || in_flush.pass()));
    std::thread::scope(|scope| {
        let _at_last = OpensAtLast(gate.clone());
        log.attach(world.clone());
        gate.wait_for_arrivals(1);
        let detach = scope.spawn(|| log.detach());
        // A guest does not wait for the flush meanwhile.
        log.mark_durably(regions(4, 1));
        eventually("it is to stop", || log.inner.queue.lock().stop_retiring);
        std::thread::sleep(Duration::from_millis(20));
        assert!(!detach.is_finished());
        gate.open();
    });
    let calls = Arc::strong_count(&world);
    assert_eq!((state(&log, 1), world.flushes.load(SeqCst)), (State::Set, 1), "stopped before it was cleared");
    log.detach();
    // Attached again, in place of itself too, it goes on.
    log.attach(world.clone());
    log.attach(world.clone());
    eventually("cleared", || marked(&log) == [4]);
    log.detach();
    assert_eq!(Arc::strong_count(&world), calls);
}
