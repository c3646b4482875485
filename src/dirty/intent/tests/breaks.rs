//! A log that cannot be written: the pairing is forgotten, once, and then everybody goes on.

use super::*;

/// Sixteen guests write first to regions of their own after `prepare`; all of them go on, after the pairing was forgotten.
fn sixteen_guests(max_wait: Duration, prepare: impl FnOnce(&World)) -> (Arc<World>, IntentLog) {
    let world = World::new(64);
    let log = world.log_with(max_wait, &[0]);
    let inside = Arc::new(AtomicU64::new(0));
    let early = Arc::new(AtomicU64::new(0));
    let counts = (Arc::clone(&inside), Arc::clone(&early));
    *world.in_forget.lock().unwrap() = Some(Box::new(move || {
        // Long enough for a guest that does not wait to show up.
        std::thread::sleep(Duration::from_millis(30));
        counts.1.store(counts.0.load(SeqCst), SeqCst);
    }));
    prepare(&world);
    std::thread::scope(|scope| {
        for guest in 0..16 {
            let (log, inside) = (&log, &inside);
            scope.spawn(move || {
                let passage = log.enter(regions(10 + guest, 1));
                inside.fetch_add(1, SeqCst);
                assert!(log.is_broken());
                drop(passage);
            });
        }
    });
    let forgotten = world.forgotten.lock().unwrap().len();
    assert_eq!((inside.load(SeqCst), early.load(SeqCst), forgotten), (16, 0, 1), "inside, inside before, forgotten");
    (world, log)
}

/// From now on the log is in nobody's way, and touches nothing.
fn assert_that_it_is_over(world: &Arc<World>, log: &IntentLog, reason: &str) {
    assert_eq!(*world.forgotten.lock().unwrap(), [reason]);
    assert_eq!(log.broken_by().unwrap().to_string(), reason);
    let syncs = log.syncs();
    let passage = log.enter(regions(40, 10));
    assert!(passage.touched.is_empty());
    drop(passage);
    log.attach(world.clone());
    std::thread::sleep(Duration::from_millis(20));
    log.detach();
    assert_eq!((log.syncs(), log.inner.passes.load(SeqCst), world.flushes.load(SeqCst)), (syncs, 0, 0));
    log.close();
    assert_eq!(world.forgotten.lock().unwrap().len(), 1);
}

#[test]
fn a_write_that_fails() {
    let (world, log) =
        sixteen_guests(Duration::from_secs(60), |world| world.faults.lock().unwrap().write = Some(libc::ENOSPC));
    assert_eq!(log.syncs(), 0);
    assert_that_it_is_over(&world, &log, "cannot write the intent log job.intent: No space left on device");
}

#[test]
fn an_fdatasync_that_fails_even_if_the_next_would_succeed() {
    let (world, log) =
        sixteen_guests(Duration::from_secs(60), |world| world.faults.lock().unwrap().sync = Some(libc::EIO));
    world.faults.lock().unwrap().sync = None;
    assert_eq!(log.syncs(), 1);
    assert_that_it_is_over(&world, &log, "cannot write the intent log job.intent: Input/output error");
}

#[test]
fn an_fdatasync_that_takes_too_long() {
    let gate = Gate::new();
    let (world, log) = sixteen_guests(Duration::from_millis(50), |world| {
        world.faults.lock().unwrap().before_sync = Some(gate.clone());
    });
    assert_eq!((gate.arrivals(), log.syncs()), (1, 1));
    // What comes late changes nothing any more.
    gate.open();
    eventually("the log's thread ends", || log.inner.queue.lock().ended);
    assert!((10..26).all(|region| state(&log, region) != State::Set));
    assert_that_it_is_over(&world, &log, "no answer for 50ms from the intent log job.intent");
}

#[test]
fn a_thread_that_hangs_is_left_alone() {
    let gate = Gate::new();
    let (world, log) = sixteen_guests(Duration::from_millis(50), |world| {
        world.faults.lock().unwrap().before_write = Some(gate.clone());
    });
    drop(log);
    assert_eq!(world.forgotten.lock().unwrap().len(), 1);
    gate.open();
}

#[test]
fn a_clear_that_fails_breaks_the_log_too() {
    let world = World::new(8);
    let log = world.log_with(Duration::from_secs(60), &[1, 2]);
    world.faults.lock().unwrap().sync = Some(libc::EIO);
    log.inner.pass(&*world);
    eventually("it is broken", || log.is_broken());
    assert_eq!(world.forgotten.lock().unwrap().len(), 1);
    assert_ne!(state(&log, 1), State::Clear);
}

#[test]
fn a_guest_waits_for_whoever_forgets_however_long_that_takes() {
    let world = World::new(8);
    let log = world.log_with(Duration::from_millis(1), &[]);
    let gate = Gate::new();
    let in_forget = gate.clone();
    *world.in_forget.lock().unwrap() = Some(Box::new(move || in_forget.pass()));
    world.faults.lock().unwrap().write = Some(libc::EIO);
    std::thread::scope(|scope| {
        let _at_last = OpensAtLast(gate.clone());
        let guests: Vec<_> = (0..4)
            .map(|at| (at, &log))
            .map(|(at, log)| scope.spawn(move || log.mark_durably(regions(at, 1))))
            .collect();
        gate.wait_for_arrivals(1);
        std::thread::sleep(Duration::from_millis(30));
        assert!(guests.iter().all(|guest| !guest.is_finished()) && !log.is_broken());
        gate.open();
    });
    assert!(log.is_broken());
    assert_eq!((gate.arrivals(), world.forgotten.lock().unwrap().len()), (1, 1));
}

#[test]
fn a_write_after_the_end_is_not_lost_from_sight() {
    let world = World::new(8);
    let log = world.log_with(Duration::from_secs(60), &[1]);
    log.close();
    log.mark_durably(regions(1, 1));
    assert!(!log.is_broken(), "that one is marked");
    log.mark_durably(regions(2, 1));
    assert!(log.is_broken());
    assert_eq!(*world.forgotten.lock().unwrap(), ["a write came after the end of the intent log job.intent"]);
}
