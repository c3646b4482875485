//! The log under shuttle's scheduler: every atomic and lock is a point where another thread may go on, and the world checks
//! after each change that a power cut would lose nothing. Run as `crate::dirty::shuttle_tests` says.

use std::time::Duration;

use shuttle::rand::Rng;

use super::region::State;
use super::simulated::{World, regions};
use super::*;

const SCHEDULES: usize = 10_000;

fn check(body: fn()) {
    shuttle::check_random(body, SCHEDULES);
    shuttle::check_pct(body, SCHEDULES, 3);
}

/// A world whose clock stands at 0, which means never: nothing is hot, not even what is written at this moment.
fn world(count: usize) -> Arc<World> {
    let world = World::new(count);
    world.seconds.store(0, SeqCst);
    world
}

/// Lets the others go on for a while, so that a short thread comes at any moment of a long one.
fn dawdle() {
    for _ in 0..shuttle::rand::thread_rng().gen_range(0..60) {
        thread::yield_now();
    }
}

fn spawn<F>(world: &Arc<World>, log: &Arc<IntentLog>, body: F) -> thread::JoinHandle<()>
where
    F: FnOnce(&Arc<World>, &IntentLog) + Send + 'static,
{
    let (world, log) = (Arc::clone(world), Arc::clone(log));
    thread::spawn(move || body(&world, &log))
}

/// Nobody is inside the image while the bit is not durable, whatever the retirer does meanwhile.
#[test]
fn a_write_is_inside_only_while_its_bit_is_durable() {
    check(|| {
        let world = world(2);
        let log = Arc::new(world.log_with(Duration::from_secs(3600), &[1]));
        let write: fn(&Arc<World>, &IntentLog) = |world, log| {
            for count in [1, 2] {
                dawdle();
                let passage = log.enter(regions(2 - count, count));
                assert!(world.is_durable(1) && (count == 1 || world.is_durable(0)));
                thread::yield_now();
                assert!(world.is_durable(1) && (count == 1 || world.is_durable(0)));
                drop(passage);
            }
        };
        let threads = [spawn(&world, &log, write), spawn(&world, &log, write), spawn(&world, &log, retire)];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        // All of them are done: nothing holds a bit any more.
        log.inner.pass(&*world);
        assert!([0, 1].iter().all(|region| log.inner.regions.get(*region).state() == State::Clear));
        assert_eq!((log.marked_bytes(), world.is_durable(0), world.is_durable(1)), (0, false, false));
    });
}

fn retire(world: &Arc<World>, log: &IntentLog) {
    for _ in 0..4 {
        dawdle();
        log.inner.pass(&**world);
    }
}

fn write_one_by_one(world: &World, log: &IntentLog, regions: [u32; 2]) {
    for region in regions {
        dawdle();
        world.guest_write(log, region);
    }
}

/// Guests, a copier and the retirer: at each instant, where source and target may differ after a power cut, the log says so.
#[test]
fn a_power_cut_at_any_instant_loses_nothing() {
    check(|| {
        let world = world(2);
        let log = Arc::new(world.log());
        let copy: fn(&Arc<World>, &IntentLog) = |world, _| {
            for _ in 0..3 {
                dawdle();
                world.copy_one();
            }
        };
        let threads = [
            spawn(&world, &log, |world, log| write_one_by_one(world, log, [0, 0])),
            spawn(&world, &log, |world, log| write_one_by_one(world, log, [0, 1])),
            spawn(&world, &log, copy),
            spawn(&world, &log, retire),
        ];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        while world.copy_one() {}
        log.inner.pass(&*world);
        assert_eq!(log.marked_bytes(), 0);
    });
}

/// The retirer's own thread misses neither the first mark, nor the stop, nor the end. (A missed one never ends.)
#[test]
fn no_wake_up_is_lost() {
    check(|| {
        let world = world(1);
        let log = Arc::new(world.log());
        log.attach(world.clone());
        let guest = spawn(&world, &log, |world, log| {
            log.mark_durably(regions(0, 1));
            assert!(world.is_durable(0));
            // It began to look before, or is woken: it does not sleep over it.
            let asleep = || {
                let queue = log.inner.queue.lock();
                queue.retirer_idle && queue.newly_set
            };
            while log.inner.passes.load(SeqCst) == 0 || asleep() {
                thread::yield_now();
            }
        });
        guest.join().unwrap();
        log.detach();
        log.close();
    });
}

/// Detached in the middle of whatever it does, it leaves the log fit for use.
#[test]
fn it_can_be_detached_at_any_moment() {
    check(|| {
        let world = world(1);
        let log = Arc::new(world.log_with(Duration::from_secs(3600), &[0]));
        log.attach(world.clone());
        let guest = spawn(&world, &log, |world, log| {
            dawdle();
            world.guest_write(log, 0);
        });
        dawdle();
        log.detach();
        guest.join().unwrap();
        world.copy_one();
        log.inner.pass(&*world);
        log.inner.pass(&*world);
        assert_eq!((log.marked_bytes(), log.is_broken()), (0, false));
    });
}

/// Broken by the log's thread while guests wait: the pairing is forgotten once, and before anybody goes on.
#[test]
fn nobody_goes_on_before_the_pairing_is_forgotten() {
    check(|| {
        let world = world(2);
        let log = Arc::new(world.log());
        world.faults.lock().unwrap().sync = Some(libc::EIO);
        let write: fn(&Arc<World>, &IntentLog) = |world, log| {
            let passage = log.enter(regions(0, 2));
            assert_eq!(world.forgotten.lock().unwrap().len(), 1);
            drop(passage);
        };
        let threads = [spawn(&world, &log, write), spawn(&world, &log, write)];
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        log.close();
        assert_eq!(world.forgotten.lock().unwrap().len(), 1);
    });
}
