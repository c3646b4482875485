//! What guests' changes and flushes do to one image or two, without a mirror job.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use super::target::Target;
use super::tracking::{TargetObserver, Tracking};
use super::*;
use crate::dirty::DirtyMap;
use crate::image::faulty::{Effect, Fault, FaultyImage, Gate, Operation};
use crate::image::memory::MemoryImage;
use crate::range::{Granularity, Granule};

const SIZE: u64 = 1 << 20;
const GRANULE: u64 = 64 << 10;
const DELAY: Duration = Duration::from_millis(50);

#[derive(Default)]
struct Heard {
    failures: AtomicU64,
    stalls: AtomicU64,
}

impl TargetObserver for Heard {
    fn target_failed(&self, _error: &Error) {
        self.failures.fetch_add(1, SeqCst);
    }
    fn target_stalled(&self) {
        self.stalls.fetch_add(1, SeqCst);
    }
}

struct World {
    source: Arc<FaultyImage>,
    target: Arc<FaultyImage>,
    map: Arc<DirtyMap>,
    heard: Arc<Heard>,
    tracking: Arc<Tracking>,
    volume: Arc<Volume>,
}

impl World {
    /// A volume whose changes are tracked; both images are empty and the map is clean.
    fn new(synchronous: bool) -> World {
        let image = |name| FaultyImage::new(MemoryImage::new(name, SIZE));
        let (source, target) = (image("source"), image("target"));
        let map = DirtyMap::new(SIZE, Granularity::new(GRANULE).unwrap());
        let heard = Arc::new(Heard::default());
        let both = Arc::new(Target::new(target.clone(), SIZE));
        let tracking = Tracking::new(map.clone(), both, heard.clone(), DELAY);
        tracking.set_synchronous(synchronous);
        let options = VolumeOptions {
            name: "disk".into(),
            id: "id".into(),
            read_only: false,
            growable: true,
            shown: ShownAttributes::default(),
        };
        let volume = Arc::new(Volume::new(options, source.clone()));
        volume.set_tracking(&volume.raise_barrier(None).unwrap(), Some(tracking.clone()));
        World { source, target, map, heard, tracking, volume }
    }

    fn is_equal(&self) -> bool {
        let read = |image: &FaultyImage| {
            let mut bytes = vec![0; SIZE as usize];
            image.read_at(0, &mut bytes).unwrap();
            bytes
        };
        read(&self.source) == read(&self.target)
    }
}

fn error_of(errno: i32) -> Effect {
    Effect::Fail(errno)
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn every_change_waits_for_the_barrier() {
    let world = World::new(false);
    let volume = &world.volume;
    volume.set_tracking(&volume.raise_barrier(None).unwrap(), None);
    let range = ByteRange::new(0, 4096);
    let changes: [&(dyn Fn() + Sync); 5] = [
        &|| assert_eq!(volume.write(0, &[1; 512], false).unwrap(), 512),
        &|| volume.punch_hole(range).unwrap(),
        &|| volume.zero_range(range, true).unwrap(),
        &|| volume.allocate(range, true).unwrap(),
        &|| volume.truncate(SIZE / 2).unwrap(),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let raised = volume.raise_barrier(None).unwrap();
        std::thread::scope(|scope| {
            let guest = scope.spawn(change);
            std::thread::sleep(Duration::from_millis(20));
            let waits = !guest.is_finished();
            drop(raised);
            assert!(waits, "change {number} passed the barrier");
        });
    }
}

#[test]
fn a_write_is_marked_after_it_was_made() {
    let world = World::new(false);
    let gate = Gate::new();
    world.source.add(Fault::new(Operation::Write, Effect::Before(gate.clone())).times(1));
    std::thread::scope(|scope| {
        scope.spawn(|| world.volume.write(0, &[1; 512], false).unwrap());
        gate.wait_for_arrivals(1);
        // A copier comes by: what it takes now it reads without the write.
        if let Some(claim) = world.map.claim(Granule(0), 1) {
            claim.finish();
        }
        gate.open();
    });
    assert!(world.map.is_dirty(Granule(0)));
}

#[test]
fn a_synchronous_write_that_fails_on_one_side_is_dirty() {
    for side in ["source", "target"] {
        let world = World::new(true);
        let faulty = if side == "source" { &world.source } else { &world.target };
        faulty.add(Fault::new(Operation::Write, Effect::FailAfter { bytes: 512, errno: libc::EIO }).times(1));
        let written = world.volume.write(0, &vec![1; GRANULE as usize], false);
        assert_eq!(written.is_err(), side == "source", "{side}");
        assert!(!world.is_equal());
        assert!(world.map.is_dirty(Granule(0)), "{side}");
        assert!(world.map.is_idle());
    }
}

#[test]
fn errors_of_the_target_are_not_the_guests() {
    let world = World::new(true);
    world.target.add(Fault::new(Operation::Write, error_of(libc::ENOSPC)).times(1));
    world.target.add(Fault::new(Operation::Discard, error_of(libc::EIO)).times(1));
    world.target.add(Fault::new(Operation::Flush, error_of(libc::EIO)).times(1));
    assert_eq!(world.volume.write(0, &[1; 512], false).unwrap(), 512);
    world.volume.punch_hole(ByteRange::new(GRANULE, 4096)).unwrap();
    world.volume.flush().unwrap();
    assert_eq!(world.heard.failures.load(SeqCst), 3, "the job hears of each");
    assert!(world.tracking.is_synchronous());
}

#[test]
fn no_stall_of_the_target_holds_a_guest_longer_than_the_bound() {
    type Stall = fn(&World, Arc<Gate>);
    let stalls: [(&str, Stall); 3] = [
        ("write", |world, gate| {
            world.target.add(Fault::new(Operation::Write, Effect::Before(gate)).times(1));
            world.volume.write(0, &[1; 512], false).unwrap();
        }),
        ("flush", |world, gate| {
            world.target.add(Fault::new(Operation::Flush, Effect::Before(gate)).times(1));
            world.volume.flush().unwrap();
        }),
        ("claim", |world, gate| {
            world.map.mark(ByteRange::new(0, 1));
            let claim = world.map.claim(Granule(0), 1).unwrap();
            std::thread::spawn(move || {
                gate.pass();
                claim.finish();
            });
            world.volume.write(0, &[1; 512], false).unwrap();
        }),
    ];
    for (what, stall) in stalls {
        let world = World::new(true);
        let gate = Gate::new();
        stall(&world, gate.clone());
        assert_eq!(world.heard.stalls.load(SeqCst), 1, "{what}");
        assert!(!world.tracking.is_synchronous(), "{what}: guests wait no longer");
        gate.open();
        wait_for("the stall ends", || world.map.is_idle());
    }
}

#[test]
fn a_write_that_was_given_up_on_stays_in_flight_and_is_dirty_after() {
    let world = World::new(true);
    let gate = Gate::new();
    world.target.add(Fault::new(Operation::Write, Effect::Before(gate.clone())).times(1));
    world.target.add(Fault::new(Operation::Write, error_of(libc::EIO)).times(1));
    world.volume.write(0, &vec![1; GRANULE as usize], false).unwrap();
    assert_eq!(world.map.in_flight_bytes(), GRANULE);
    assert!(world.map.claim(Granule(0), 1).is_none(), "no copier comes between");
    assert!(!world.map.is_in_sync());
    gate.open();
    wait_for("it returns", || world.map.is_idle());
    assert!(world.map.is_dirty(Granule(0)) && !world.is_equal());
}

#[test]
fn a_flush_reaches_the_target_too_in_write_blocking_mode() {
    for (synchronous, target_flushes) in [(false, 0), (true, 3)] {
        let world = World::new(synchronous);
        world.volume.flush().unwrap();
        world.volume.write(0, &[1; 512], false).unwrap();
        assert_eq!(world.source.count(Operation::Flush), 1, "a plain write flushes nothing");
        // O_DSYNC: there comes no FSYNC.
        world.volume.write(0, &[1; 512], true).unwrap();
        world.volume.flush().unwrap();
        assert_eq!(world.source.count(Operation::Flush), 3);
        assert_eq!(world.target.count(Operation::Flush), target_flushes);
    }
    let world = World::new(false);
    world.volume.set_tracking(&world.volume.raise_barrier(None).unwrap(), None);
    world.volume.flush().unwrap();
    assert_eq!(world.source.count(Operation::Flush), 1, "without a mirror");
    world.source.add(Fault::new(Operation::Flush, error_of(libc::EIO)).times(1));
    assert_eq!(world.volume.write(0, &[1; 512], true).unwrap_err().errno(), libc::EIO);
}

#[test]
fn a_full_queue_keeps_no_guest_and_no_memory() {
    let world = World::new(true);
    let gate = Gate::new();
    world.target.add(Fault::new(Operation::Write, Effect::Before(gate.clone())));
    let queue = world.tracking.queue();
    let mut tickets = Vec::new();
    let mut numbers = 0..200u64;
    for _ in 0..2 {
        let refused = numbers.by_ref().find(|number| {
            let hold = world.map.try_hold(ByteRange::new(number * 512, 512)).unwrap();
            match queue.submit(Change::Write { offset: number * 512, data: &[1; 512] }, hold) {
                Ok(ticket) => tickets.push(ticket),
                Err(hold) => {
                    hold.finish();
                    return true;
                }
            }
            false
        });
        assert!(refused.is_some(), "what waits is bounded");
        // Time for more threads than there may be; the room that those make is filled in the second turn.
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(tickets.len() <= 72 && gate.arrivals() <= 8, "{} of {}", gate.arrivals(), tickets.len());
    let last = ByteRange::new(SIZE - 4096, 4096);
    world.volume.write(last.start(), &[1; 4096], false).unwrap();
    assert!(world.map.any_dirty(last), "the target gets it later");
    assert_eq!(world.heard.stalls.load(SeqCst), 0);
    gate.open();
    drop(tickets);
    wait_for("all are done", || world.map.is_idle());
}

#[test]
fn a_mirrored_disk_keeps_its_size() {
    let world = World::new(false);
    assert_eq!(world.volume.truncate(SIZE / 2).unwrap_err().kind(), ErrorKind::NotNow);
    assert_eq!(world.volume.write(SIZE, &[1; 512], false).unwrap_err().errno(), libc::ENOSPC);
    assert_eq!((world.volume.size_bytes(), world.source.size_bytes()), (SIZE, SIZE));
    world.volume.set_tracking(&world.volume.raise_barrier(None).unwrap(), None);
    assert_eq!(world.volume.write(SIZE, &[1; 512], false).unwrap(), 512);
    world.volume.truncate(SIZE).unwrap();
}

/// A mirror that has cut over may have a flush under way: Linux reports an error once, and that may be to it.
#[test]
fn a_flush_of_the_mirror_that_fails_after_the_cutover_is_the_guests() {
    let world = World::new(false);
    let both = Arc::new(Target::new(world.target.clone(), SIZE));
    world.volume.switch(&world.volume.raise_barrier(None).unwrap(), both.clone(), world.map.clone());
    let fails_once = || world.target.add(Fault::new(Operation::Flush, error_of(libc::EIO)).times(1));
    let write = || world.volume.write(0, &[7; 4096], false).unwrap();
    write();
    fails_once();
    both.flush(&world.map).unwrap_err();
    assert!(world.volume.flush().is_err(), "what was written before is lost");
    world.volume.flush().unwrap();
    // One that the guest has not heard of when the mirror ends, and one for which nobody asked.
    write();
    fails_once();
    both.flush(&world.map).unwrap_err();
    world.volume.part_from(&both);
    assert!(world.volume.flush().is_err());
    world.volume.flush().unwrap();
    write();
    fails_once();
    world.volume.flush_unasked().unwrap_err();
    assert!(world.volume.flush().is_err());
    world.volume.flush().unwrap();
}

/// What an image has lost reading does not show, so the next image cannot have it either.
#[test]
fn what_the_old_image_owes_is_told_after_the_cutover() {
    let world = World::new(false);
    world.source.lose(Error::new(ErrorKind::Failed, "it may be lost:"));
    world.target.lose(Error::new(ErrorKind::Failed, "the mirror has heard of it:"));
    let both = Arc::new(Target::new(world.target.clone(), SIZE));
    world.volume.switch(&world.volume.raise_barrier(None).unwrap(), both, world.map.clone());
    let error = world.volume.flush().unwrap_err();
    assert!(error.to_string().contains("it may be lost"), "{error}");
    world.volume.flush().unwrap();
}

#[test]
fn an_image_owes_what_it_has_lost_until_a_guest_was_told() {
    type Flush = fn(&Volume) -> Result<()>;
    let flushes: [(Flush, bool); 4] = [
        (Volume::flush, true),
        (|volume| volume.write(0, &[1; 512], true).map(drop), true),
        (Volume::flush_unasked, false),
        (Volume::flush_for_mirror, false),
    ];
    for (flush, is_guests) in flushes {
        let world = World::new(false);
        world.source.lose(Error::new(ErrorKind::Failed, "it may be lost:"));
        flush(&world.volume).unwrap_err();
        assert_eq!(world.source.owes().is_none(), is_guests);
    }
}
