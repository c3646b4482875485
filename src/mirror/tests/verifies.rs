//! Both images compared while guests write: what differs is found, what is merely on its way is not taken for a difference.

use super::super::types::{CopyMode, MirrorOptions};
use super::super::verify::{self, Verified};
use super::*;
use crate::image::faulty::{Effect, Fault, FaultyImage, Gate, Operation};

fn ready_job(world: &World, source: Arc<dyn Image>, mode: CopyMode) -> (Arc<Volume>, Arc<MemoryImage>, Arc<Job>) {
    source.write_at(0, &vec![3; 1 << 20]).unwrap();
    let volume = volume("disk", source);
    let target = MemoryImage::new("target", 4 << 20);
    let options = MirrorOptions { copy_mode: mode, ..MirrorOptions::new("j", "target") };
    let job = world.mirror(&volume, target.clone(), options);
    wait_for("ready", || job.status() == JobStatus::Ready);
    (volume, target, job)
}

fn verify_all(job: &Job) -> Verified {
    let mut total = Verified::default();
    let mut next = Some(0);
    while let Some(from) = next {
        let step = verify::step(job, from).unwrap();
        total.same_bytes += step.same_bytes;
        total.unsettled_bytes += step.unsettled_bytes;
        total.differing_bytes += step.differing_bytes;
        total.first_difference = total.first_difference.or(step.first_difference);
        next = step.next;
    }
    assert_eq!(total.same_bytes + total.unsettled_bytes + total.differing_bytes, 4 << 20);
    total
}

#[test]
fn a_running_guest_makes_no_difference() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let world = World::new();
        let (volume, _target, job) = ready_job(&world, disk(4), mode);
        let guest = Guest::start(&volume, 100, 512);
        for _ in 0..5 {
            let seen = guest.writes.load(SeqCst);
            let verified = verify_all(&job);
            assert_eq!(verified.differing_bytes, 0, "{mode:?}: {verified:?}");
            wait_for("the guest goes on", || guest.writes.load(SeqCst) > seen + 10);
        }
        guest.stop();
        wait_for("in sync", || job.info().in_sync);
        assert_eq!(verify_all(&job), Verified { same_bytes: 4 << 20, ..Verified::default() });
    }
}

#[test]
fn a_byte_that_somebody_else_changed_is_found_on_data_and_in_a_hole() {
    for at in [70_000, 3 << 20] {
        let world = World::new();
        let (_volume, target, job) = ready_job(&world, disk(4), CopyMode::Background);
        target.write_at(at, &[9]).unwrap();
        let verified = verify_all(&job);
        assert_eq!((verified.differing_bytes, verified.first_difference), (4096, Some(at / 4096 * 4096)));
    }
}

#[test]
fn what_is_dirty_or_not_marked_yet_is_no_difference() {
    let world = World::new();
    let source = FaultyImage::new(disk(4));
    let (volume, _target, job) = ready_job(&world, source.clone(), CopyMode::Background);
    // A guest is between its write and its mark.
    let gate = Gate::new();
    source.add(Fault::new(Operation::Write, Effect::After(gate.clone())).times(1));
    std::thread::scope(|scope| {
        scope.spawn(|| volume.write(0, &[7; 4096], false).unwrap());
        gate.wait_for_arrivals(1);
        let verified = verify_all(&job);
        assert_eq!(verified.differing_bytes, 0, "{verified:?}");
        assert!(verified.unsettled_bytes > 0);
        job.pause().unwrap();
        gate.open();
    });
    let verified = verify_all(&job);
    assert!(verified.differing_bytes == 0 && verified.unsettled_bytes > 0, "{verified:?}");
    job.resume().unwrap();
    wait_for("in sync", || job.info().in_sync);
    assert_eq!(verify_all(&job).same_bytes, 4 << 20);
}

/// A target that stops answering in the middle of it keeps no guest.
#[test]
fn nothing_is_read_while_guests_are_held() {
    let world = World::new();
    let source = disk(4);
    source.write_at(0, &vec![3; 1 << 20]).unwrap();
    let volume = volume("disk", source);
    let target = FaultyImage::new(MemoryImage::new("target", 4 << 20));
    let options = MirrorOptions { copy_mode: CopyMode::Background, ..MirrorOptions::new("j", "target") };
    let job = world.mirror(&volume, target.clone(), options);
    wait_for("ready", || job.status() == JobStatus::Ready);
    target.write_at(0, &[9]).unwrap();
    let gate = Gate::new();
    target.add(Fault::new(Operation::Read, Effect::Before(gate.clone())).after(1));
    std::thread::scope(|scope| {
        let verifier = scope.spawn(|| verify::step(&job, 0));
        // Whether it is at the gate by now or not.
        wait_for("the comparison", || verifier.is_finished() || gate.arrivals() > 0);
        volume.write(2 << 20, &[7; 4096], false).unwrap();
        gate.open();
        assert_eq!(verifier.join().unwrap().unwrap().first_difference, Some(0));
    });
}

#[test]
fn after_a_cutover_nothing_is_called_a_difference() {
    let world = World::new();
    let (volume, _target, job) = ready_job(&world, disk(4), CopyMode::Background);
    let guest = Guest::start(&volume, 100, 512);
    std::thread::scope(|scope| {
        let verifier = scope.spawn(|| {
            let mut from = 0;
            loop {
                match verify::step(&job, from) {
                    Ok(step) => {
                        assert_eq!(step.differing_bytes, 0, "{step:?}");
                        from = step.next.unwrap_or(0);
                    }
                    Err(error) => return error.kind(),
                }
            }
        });
        world.cut_over(std::slice::from_ref(&job));
        assert_eq!(verifier.join().unwrap(), ErrorKind::NotNow);
    });
    guest.stop();
}

#[test]
fn before_it_is_ready_and_after_its_end_there_is_nothing_to_compare() {
    let world = World::new();
    let source = disk(4);
    source.write_at(0, &vec![3; 1 << 20]).unwrap();
    let volume = volume("disk", source);
    let options = MirrorOptions { speed_bytes_per_second: 1, ..MirrorOptions::new("j", "target") };
    let job = world.mirror(&volume, MemoryImage::new("target", 4 << 20), options);
    assert_eq!(verify::step(&job, 0).unwrap_err().kind(), ErrorKind::NotNow);
    job.cancel(super::super::types::CancelMode::Force, false).unwrap();
    job.wait_ended(None);
    assert_eq!(verify::step(&job, 0).unwrap_err().kind(), ErrorKind::NotNow);
}
