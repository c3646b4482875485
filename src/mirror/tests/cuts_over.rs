//! The cutover loses nothing, is one instant for a group, and is never half done.

use super::super::types::{CopyMode, ErrorPolicy, MirrorOptions, MirrorResult};
use super::*;
use crate::image::faulty::{Effect, Fault, FaultyImage, Gate, Operation};

fn cut_over_under_load(mode: CopyMode) {
    let world = World::new();
    let source = disk(32);
    for block in 0..2048u64 {
        source.write_at(block * BLOCK as u64, &block_bytes(block, 1 << 40)).unwrap();
    }
    let volume = volume("disk", source.clone());
    let guests: Vec<_> = (0..3).map(|n| (n * 2048, Guest::start(&volume, n * 2048, 2048))).collect();
    let target = MemoryImage::new("target", 32 << 20);
    let options = MirrorOptions { copy_mode: mode, ..MirrorOptions::new("j", "target") };
    let job = world.mirror(&volume, target.clone(), options);
    world.cut_over(std::slice::from_ref(&job));
    // The guests go on, on the target; the source is left alone.
    let frozen = read_all(&*source);
    let seen: Vec<u64> = guests.iter().map(|(_, guest)| guest.writes.load(SeqCst)).collect();
    for ((_, guest), seen) in guests.iter().zip(seen) {
        wait_for("the guest writes on after the cutover", || guest.writes.load(SeqCst) > seen + 100);
    }
    for (first, guest) in guests {
        assert_holds(&*target, first, &guest.stop());
    }
    assert!(job.wait_ended(None));
    assert_eq!(job.outcome().unwrap().result, MirrorResult::Completed);
    assert_eq!(volume.active().name(), "target");
    assert!(frozen == read_all(&*source), "a write went to the old source after the cutover");
    assert_eq!(*world.committer.committed.lock(), ["target"]);
    assert_eq!(*world.committer.superseded.lock(), ["source"]);
}

#[test]
fn nothing_is_lost_in_background_mode() {
    cut_over_under_load(CopyMode::Background);
}

#[test]
fn nothing_is_lost_in_write_blocking_mode() {
    cut_over_under_load(CopyMode::WriteBlocking);
}

#[test]
fn nothing_is_lost_in_auto_mode() {
    cut_over_under_load(CopyMode::Auto);
}

#[test]
fn a_write_between_the_start_and_the_first_look_is_copied() {
    // Rule 4: the scan sees a hole; the write that made it data came after tracking was on.
    let world = World::new();
    let gate = crate::image::faulty::Gate::new();
    let source = FaultyImage::new(disk(4));
    source.add(Fault::new(Operation::Extent, Effect::Before(gate.clone())).times(1));
    let volume = volume("disk", source.clone());
    let target = MemoryImage::new("target", 4 << 20);
    let job = world.mirror(&volume, target.clone(), MirrorOptions::new("j", "target"));
    gate.wait_for_arrivals(1);
    volume.write(0, &block_bytes(0, 7), false).unwrap();
    gate.open();
    wait_for("ready", || job.status() == JobStatus::Ready);
    assert!(read_all(&*target)[..BLOCK] == block_bytes(0, 7));
}

#[test]
fn a_write_that_races_with_the_copy_of_its_granule_is_copied_again() {
    // The copier has read the old bytes and waits before it writes them.
    let world = World::new();
    let source = disk(1);
    source.write_at(0, &block_bytes(0, 1)).unwrap();
    let volume = volume("disk", source);
    let gate = crate::image::faulty::Gate::new();
    let target = FaultyImage::new(MemoryImage::new("target", 1 << 20));
    target.add(Fault::new(Operation::Write, Effect::Before(gate.clone())).times(1));
    let job = world.mirror(&volume, target.clone(), MirrorOptions::new("j", "target"));
    gate.wait_for_arrivals(1);
    volume.write(0, &block_bytes(0, 2), false).unwrap();
    gate.open();
    wait_for("ready", || job.status() == JobStatus::Ready);
    assert!(read_all(&*target)[..BLOCK] == block_bytes(0, 2));
}

#[test]
fn what_was_learnt_before_a_claim_grew_is_not_used_after() {
    // The copier has a small claim and knows of a hole far beyond it; before it takes the rest, the guest writes there.
    let world = World::new();
    let gate = crate::image::faulty::Gate::new();
    let source = FaultyImage::new(disk(4));
    // The scan asks once: all is one hole.
    source.add(Fault::new(Operation::Extent, Effect::After(gate.clone())).after(1).times(1));
    let volume = volume("disk", source);
    let target = MemoryImage::new("target", 4 << 20);
    let options =
        MirrorOptions { buffer_bytes: 1 << 20, copy_mode: CopyMode::Background, ..MirrorOptions::new("j", "target") };
    let job = world.mirror_onto(&volume, target.clone(), false, options);
    gate.wait_for_arrivals(1);
    volume.write(3 << 20, &block_bytes(1, 1), false).unwrap();
    gate.open();
    wait_for("ready", || job.status() == JobStatus::Ready);
    assert!(read_all(&*target)[3 << 20..][..BLOCK] == block_bytes(1, 1));
}

#[test]
fn a_failed_guest_write_is_marked_too() {
    let world = World::new();
    let source = FaultyImage::new(disk(1));
    let volume = volume("disk", source.clone());
    let target = MemoryImage::new("target", 1 << 20);
    let job = world.mirror(&volume, target.clone(), MirrorOptions::new("j", "target"));
    wait_for("ready", || job.status() == JobStatus::Ready);
    source.add(Fault::new(Operation::Write, Effect::FailAfter { bytes: 512, errno: libc::EIO }).times(1));
    volume.write(0, &block_bytes(0, 1), false).unwrap_err();
    wait_for("in sync", || job.info().in_sync);
    assert!(read_all(&*target)[..512] == block_bytes(0, 1)[..512]);
}

#[test]
fn a_group_is_one_instant() {
    let world = World::new();
    let (one, two) = (volume("one", disk(4)), volume("two", disk(4)));
    let (target_one, target_two) = (MemoryImage::new("t1", 4 << 20), MemoryImage::new("t2", 4 << 20));
    let stop = Arc::new(AtomicBool::new(false));
    // Disk 1, then disk 2, each acknowledged before the next: at any instant 1 is at 2's number or one ahead.
    let writer = {
        let (one, two, stop) = (one.clone(), two.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut number = 0u64;
            while !stop.load(SeqCst) {
                number += 1;
                one.write(0, &block_bytes(0, number), false).unwrap();
                two.write(0, &block_bytes(0, number), false).unwrap();
            }
        })
    };
    let jobs = [
        world.mirror(&one, target_one.clone(), MirrorOptions::new("one", "t1")),
        world.mirror(&two, target_two.clone(), MirrorOptions::new("two", "t2")),
    ];
    // A copy of both, and what the pair holds at that instant.
    world.end(&jobs, Ending::Copy);
    let number = |image: &MemoryImage| u64::from_le_bytes(read_all(image)[8..16].try_into().unwrap());
    let (first, second) = (number(&target_one), number(&target_two));
    assert!(first == second || first == second + 1, "disk 1 at {first}, disk 2 at {second}");
    stop.store(true, SeqCst);
    writer.join().unwrap();
}

#[test]
fn an_abandoned_cutover_leaves_everything_as_it_was() {
    let world = World::new();
    let source = disk(4);
    let volume = volume("disk", source.clone());
    let target = FaultyImage::new(MemoryImage::new("target", 4 << 20));
    let job = world.mirror(&volume, target.clone(), MirrorOptions::new("j", "target"));
    wait_for("ready", || job.status() == JobStatus::Ready);
    // The flush under the barrier (the second one of an attempt) never comes back in time.
    let gate = crate::image::faulty::Gate::new();
    target.add(Fault::new(Operation::Flush, Effect::Before(gate.clone())).after(1).times(1));
    let short = Duration::from_millis(20);
    let error = world.cutovers.attempt(std::slice::from_ref(&job), Ending::Switch, short, short).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotNow, "{error}");
    assert_eq!(volume.active().name(), "source");
    assert!(world.committer.committed.lock().is_empty());
    volume.write(0, &block_bytes(0, 9), false).unwrap();
    gate.open();
    world.cut_over(&[job]);
    assert!(read_all(&*target)[..BLOCK] == block_bytes(0, 9));
}

#[test]
fn a_record_that_cannot_be_put_in_place_leaves_the_old_image() {
    let world = World::new();
    let volume = volume("disk", disk(4));
    let target = MemoryImage::new("target", 4 << 20);
    let job = world.mirror(&volume, target.clone(), MirrorOptions::new("j", "target"));
    wait_for("ready", || job.status() == JobStatus::Ready);
    world.committer.outdated.store(true, SeqCst);
    let second = Duration::from_secs(1);
    let error = world.cutovers.attempt(std::slice::from_ref(&job), Ending::Switch, second, second).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotNow, "{error}");
    assert_eq!(volume.active().name(), "source");
    assert!(world.committer.superseded.lock().is_empty());
    volume.write(0, &block_bytes(0, 9), false).unwrap();
    world.cut_over(&[job]);
    assert!(read_all(&*target)[..BLOCK] == block_bytes(0, 9));
}

/// What an undecided cutover works with.
struct Undecided {
    world: World,
    volume: Arc<Volume>,
    source: Arc<FaultyImage>,
    target: Arc<FaultyImage>,
    job: Arc<Job>,
}

impl Undecided {
    /// A cutover that stays undecided until `meanwhile` has been done.
    fn during(meanwhile: impl FnOnce(&Self)) -> (Self, Result<Pause>) {
        let world = World::new();
        let source = FaultyImage::new(disk(4));
        let volume = volume("disk", source.clone());
        let target = FaultyImage::new(MemoryImage::new("target", 4 << 20));
        let job = world.mirror(&volume, target.clone(), MirrorOptions::new("j", "target"));
        wait_for("ready", || job.status() == JobStatus::Ready);
        world.committer.undecided.store(u64::MAX, SeqCst);
        let attempt = {
            let (cutovers, job) = (world.cutovers.clone(), job.clone());
            let long = Duration::from_secs(5);
            std::thread::spawn(move || cutovers.attempt(&[job], Ending::Switch, long, long))
        };
        wait_for("undecided", || volume.tracking().is_none());
        let this = Undecided { world, volume, source, target, job };
        meanwhile(&this);
        // The one after the next succeeds.
        this.world.committer.undecided.store(2, SeqCst);
        let result = attempt.join().unwrap();
        this.job.wait_ended(None);
        (this, result)
    }

    fn write(&self) -> Result<()> {
        self.volume.write(0, &block_bytes(0, 5), false).map(|_| ())
    }

    fn fail_once(image: &FaultyImage, operation: Operation) {
        image.add(Fault::new(operation, Effect::Fail(libc::EIO)).times(1));
    }

    fn assert_taken_back(meanwhile: impl FnOnce(&Self)) {
        let (this, result) = Self::during(meanwhile);
        assert!(result.is_err());
        assert_eq!(this.volume.active().name(), "source");
        assert!(this.world.committer.taken_back.load(SeqCst));
        assert!(this.world.committer.superseded.lock().is_empty());
    }
}

#[test]
fn an_undecided_cutover_writes_both_images_until_a_record_is_durable() {
    let (this, result) = Undecided::during(|this| this.write().unwrap());
    result.unwrap();
    assert_eq!(this.volume.active().name(), "target");
    assert!(read_all(&*this.source)[..BLOCK] == block_bytes(0, 5));
    assert!(read_all(&*this.target)[..BLOCK] == block_bytes(0, 5));
    assert_eq!(*this.world.committer.superseded.lock(), ["source"]);
}

#[test]
fn an_undecided_cutover_whose_target_fails_is_taken_back() {
    Undecided::assert_taken_back(|this| {
        Undecided::fail_once(&this.target, Operation::Write);
        this.write().unwrap();
        assert!(read_all(&*this.source)[..BLOCK] == block_bytes(0, 5));
    });
}

#[test]
fn an_undecided_cutover_whose_source_fails_is_taken_back() {
    // What the guest reads after its error, it must read for ever: the target would have something else.
    Undecided::assert_taken_back(|this| {
        Undecided::fail_once(&this.source, Operation::Write);
        this.write().unwrap_err();
    });
}

#[test]
fn an_undecided_cutover_is_taken_back_when_others_hear_of_a_failed_flush() {
    // Whoever clears the intent log, say: the cutover's own flush, a moment later, succeeds.
    Undecided::assert_taken_back(|this| {
        let live = this.job.live().unwrap();
        this.write().unwrap();
        // Each of the cutover's own attempts flushes too, and may be the one that hears of it.
        Undecided::fail_once(&this.target, Operation::Flush);
        let _ = live.target.flush(&live.map);
    });
}

#[test]
fn an_undecided_cutover_waits_for_a_guests_flush_that_is_about_to_fail() {
    Undecided::assert_taken_back(|this| {
        let gate = Gate::new();
        this.write().unwrap();
        this.target.add(Fault::new(Operation::Flush, Effect::Before(gate.clone())).times(1));
        Undecided::fail_once(&this.target, Operation::Flush);
        let guest = this.volume.clone();
        let flush = std::thread::spawn(move || guest.flush());
        gate.wait_for_arrivals(1);
        // Now the record could become durable.
        this.world.committer.undecided.store(1, SeqCst);
        std::thread::sleep(Duration::from_millis(500));
        gate.open();
        flush.join().unwrap().unwrap();
    });
}

#[test]
fn a_flush_that_fails_beside_the_cutovers_own_is_not_healed_by_it() {
    let world = World::new();
    let volume = volume("disk", disk(4));
    let target = FaultyImage::new(MemoryImage::new("target", 4 << 20));
    let options = MirrorOptions {
        copy_mode: CopyMode::WriteBlocking,
        on_target_error: ErrorPolicy::Ignore,
        ..MirrorOptions::new("j", "target")
    };
    let job = world.mirror(&volume, target.clone(), options);
    wait_for("ready", || job.status() == JobStatus::Ready);
    // A guest's fsync gets to the target just before guests are held, and fails while they are.
    let copies = crate::image::faulty::Gate::new();
    let (guest, image, held) = (volume.clone(), target.clone(), copies.clone());
    *world.committer.when_prepared.lock() = Some(Box::new(move || {
        guest.write(0, &block_bytes(0, 1), false).unwrap();
        let gate = crate::image::faulty::Gate::new();
        image.add(Fault::new(Operation::Write, Effect::Before(held)));
        image.add(Fault::new(Operation::Flush, Effect::Before(gate.clone())).times(1));
        image.add(Fault::new(Operation::Flush, Effect::Fail(libc::EIO)).times(1));
        std::thread::spawn(move || guest.flush().unwrap());
        gate.wait_for_arrivals(1);
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            gate.open();
        });
    }));
    let second = Duration::from_secs(1);
    let error = world.cutovers.attempt(std::slice::from_ref(&job), Ending::Switch, second, second).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotNow, "{error}");
    assert!(world.committer.committed.lock().is_empty());
    copies.open();
    world.cut_over(&[job]);
    assert!(read_all(&*target)[..BLOCK] == block_bytes(0, 1));
}

#[test]
fn a_group_is_held_as_one() {
    // While the first disk's target is flushed under the barrier, a write to the second disk waits too.
    let world = World::new();
    let (one, two) = (volume("one", disk(1)), volume("two", disk(1)));
    let target = FaultyImage::new(MemoryImage::new("t1", 1 << 20));
    let jobs = [
        world.mirror(&one, target.clone(), MirrorOptions::new("one", "t1")),
        world.mirror(&two, MemoryImage::new("t2", 1 << 20), MirrorOptions::new("two", "t2")),
    ];
    wait_for("ready", || jobs.iter().all(|job| job.status() == JobStatus::Ready));
    let gate = crate::image::faulty::Gate::new();
    target.add(Fault::new(Operation::Flush, Effect::Before(gate.clone())).after(1).times(1));
    let attempt = {
        let (cutovers, jobs) = (world.cutovers.clone(), jobs.clone());
        let long = Duration::from_secs(60);
        std::thread::spawn(move || cutovers.attempt(&jobs, Ending::Switch, long, long))
    };
    gate.wait_for_arrivals(1);
    let written = Arc::new(AtomicBool::new(false));
    let writer = {
        let (two, written) = (two.clone(), written.clone());
        std::thread::spawn(move || {
            two.write(0, &block_bytes(0, 1), false).unwrap();
            written.store(true, SeqCst);
        })
    };
    // Time for a write that is not held to be done.
    std::thread::sleep(Duration::from_millis(200));
    assert!(!written.load(SeqCst), "the second disk was written while the first was behind the barrier");
    gate.open();
    attempt.join().unwrap().unwrap();
    writer.join().unwrap();
    assert_eq!((one.active().name(), two.active().name()), ("t1", "t2"));
}
