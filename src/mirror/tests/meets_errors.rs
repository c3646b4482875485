//! Errors and stalls: the job's affair, never the guest's.

use super::super::types::{CancelMode, CopyMode, ErrorPolicy, IoStatus, MirrorOptions, MirrorResult};
use super::*;
use crate::image::faulty::{Effect, Fault, FaultyImage, Gate, Operation};
use crate::range::ByteRange;

fn faulty_world(fault: Fault, side: &str, policy: ErrorPolicy) -> (World, Arc<Volume>, Arc<FaultyImage>, Arc<Job>) {
    let world = World::new();
    let inner = disk(4);
    inner.write_at(0, &vec![5; 4 << 20]).unwrap();
    let source = FaultyImage::new(inner);
    let target = FaultyImage::new(MemoryImage::new("target", 4 << 20));
    let faulty = if side == "source" { source.clone() } else { target.clone() };
    faulty.add(fault);
    let volume = volume("disk", source);
    let options =
        MirrorOptions { on_source_error: policy, on_target_error: policy, ..MirrorOptions::new("j", "target") };
    let job = world.mirror(&volume, target, options);
    (world, volume, faulty, job)
}

#[test]
fn report_ends_the_job_with_a_named_error_and_the_guest_goes_on() {
    for (side, operation) in [("source", Operation::Read), ("target", Operation::Write), ("target", Operation::Flush)] {
        let fault = Fault::new(operation, Effect::Fail(libc::EIO)).times(1);
        let (_world, volume, _, job) = faulty_world(fault, side, ErrorPolicy::Report);
        job.wait_ended(None);
        let outcome = job.outcome().unwrap();
        assert_eq!(outcome.result, MirrorResult::Failed);
        let error = outcome.error.unwrap();
        assert!(error.contains(side) && error.contains("Input/output error"), "{error}");
        assert!(volume.tracking().is_none());
        volume.write(0, &[1; 512], false).unwrap();
    }
}

#[test]
fn a_full_target_pauses_the_job_until_it_is_resumed() {
    let fault = Fault::new(Operation::Write, Effect::Fail(libc::ENOSPC));
    let (_world, volume, target, job) = faulty_world(fault, "target", ErrorPolicy::Enospc);
    wait_for("paused", || job.status() == JobStatus::Paused);
    let info = job.info();
    assert_eq!(info.io_status, IoStatus::Nospace);
    let error = info.last_error.unwrap();
    assert!(error.contains("full at") && error.contains("livemirror resume"), "{error}");
    volume.write(0, &[1; 512], false).unwrap();
    target.clear();
    job.resume().unwrap();
    wait_for("ready", || job.status() == JobStatus::Ready);
    assert_eq!(job.info().io_status, IoStatus::Ok);
    assert!(read_all(&*target) == read_all(&*volume.active()));
}

#[test]
fn a_failure_from_before_a_resume_does_not_pause_again() {
    // One copier waits at the gate with its error in hand, the others have met theirs.
    let gate = Gate::new();
    let world = World::new();
    let source = disk(4);
    source.write_at(0, &vec![5; 4 << 20]).unwrap();
    let volume = volume("disk", source);
    let target = FaultyImage::new(MemoryImage::new("target", 4 << 20));
    target.add(Fault::new(Operation::Write, Effect::Before(gate.clone())).times(1));
    target.add(Fault::new(Operation::Write, Effect::Fail(libc::ENOSPC)));
    let job = world.mirror(&volume, target.clone(), MirrorOptions::new("j", "target"));
    wait_for("paused", || job.status() == JobStatus::Paused);
    gate.wait_for_arrivals(1);
    target.clear();
    job.resume().unwrap();
    gate.open();
    wait_for("ready", || job.status() == JobStatus::Ready);
    assert!(read_all(&*target) == read_all(&*volume.active()));
}

#[test]
fn stop_pauses_on_any_error_of_either_side() {
    for (side, operation) in [("source", Operation::Read), ("target", Operation::Flush)] {
        let fault = Fault::new(operation, Effect::Fail(libc::EIO)).times(1);
        let (_world, volume, _, job) = faulty_world(fault, side, ErrorPolicy::Stop);
        wait_for("paused", || job.status() == JobStatus::Paused);
        assert_eq!(job.info().io_status, IoStatus::Failed);
        job.resume().unwrap();
        wait_for("ready", || job.status() == JobStatus::Ready);
        let target = job.target_image().unwrap();
        assert!(read_all(&*target) == read_all(&*volume.active()));
    }
}

#[test]
fn ignore_backs_off_and_copies_all_but_the_bad_spot() {
    let bad = ByteRange::new(1 << 20, 512);
    let fault = Fault::new(Operation::Read, Effect::Fail(libc::EIO)).within(bad);
    let (world, volume, source, job) = faulty_world(fault, "source", ErrorPolicy::Ignore);
    wait_for("all but one granule", || {
        let info = job.info();
        info.dirty_bytes + info.in_flight_bytes == info.granularity && info.copied_bytes >= (4 << 20) - info.granularity
    });
    let errors = world.heard.lock().iter().filter(|event| matches!(event, JobEvent::Error { .. })).count();
    assert!(errors < 20, "{errors} events");
    assert_ne!(job.status(), JobStatus::Ready);
    source.clear();
    wait_for("ready", || job.status() == JobStatus::Ready);
    assert!(read_all(&*job.target_image().unwrap()) == read_all(&*volume.active()));
}

#[test]
fn a_failed_flush_is_not_healed_by_a_later_one() {
    let fault = Fault::new(Operation::Flush, Effect::Fail(libc::EIO)).times(1);
    let (_world, _volume, target, job) = faulty_world(fault, "target", ErrorPolicy::Ignore);
    wait_for("ready", || job.status() == JobStatus::Ready);
    // Everything was written twice: what the failed flush covered was copied again.
    assert!(job.info().copied_bytes >= 8 << 20, "{}", job.info().copied_bytes);
    assert!(target.count(Operation::Flush) >= 2);
}

#[test]
fn a_hung_target_stalls_a_synchronous_guest_for_a_bounded_time_and_nothing_lands_late() {
    let world = World::new();
    let volume = volume("disk", disk(1));
    let gate = Gate::new();
    let target = FaultyImage::new(MemoryImage::new("target", 1 << 20));
    let options = MirrorOptions { copy_mode: CopyMode::WriteBlocking, ..MirrorOptions::new("j", "target") };
    let job = world.mirror(&volume, target.clone(), options);
    wait_for("ready", || job.status() == JobStatus::Ready);
    target.add(Fault::new(Operation::Write, Effect::Before(gate.clone())).times(1));
    volume.write(0, &block_bytes(0, 1), false).unwrap();
    assert!(!volume.tracking().unwrap().is_synchronous(), "guests wait no longer");
    // A newer write to the same place; the old one still hangs before the target.
    volume.write(0, &block_bytes(0, 2), false).unwrap();
    let info = job.info();
    assert!(!info.in_sync && info.in_flight_bytes > 0, "what was given up on counts as in flight");
    let short = Duration::from_millis(50);
    assert!(
        world.cutovers.attempt(std::slice::from_ref(&job), Ending::Switch, short, short).is_err(),
        "no cutover meanwhile"
    );
    gate.open();
    wait_for("in sync", || job.info().in_sync);
    assert!(read_all(&*target)[..BLOCK] == block_bytes(0, 2), "the late write did not win");
}

#[test]
fn a_job_that_hangs_in_its_target_can_be_cancelled() {
    let world = World::new();
    let inner = disk(1);
    inner.write_at(0, &vec![5; 1 << 20]).unwrap();
    let volume = volume("disk", inner);
    let gate = Gate::new();
    let target = FaultyImage::new(MemoryImage::new("target", 1 << 20));
    target.add(Fault::new(Operation::Write, Effect::Before(gate.clone())));
    let job = world.mirror(&volume, target.clone(), MirrorOptions::new("j", "target"));
    gate.wait_for_arrivals(1);
    job.cancel(CancelMode::Force, false).unwrap();
    assert!(job.wait_ended(None));
    // The image is still in the hands of the request that hangs: no other job may have it (rule 14).
    assert!(Arc::strong_count(&target) > 1);
    volume.write(0, &[1; 512], false).unwrap();
    gate.open();
    wait_for("the image is free", || Arc::strong_count(&target) == 1);
}

#[test]
fn a_job_whose_target_hangs_in_a_flush_can_be_cancelled() {
    let world = World::new();
    let volume = volume("disk", disk(1));
    let gate = Gate::new();
    let target = FaultyImage::new(MemoryImage::new("target", 1 << 20));
    target.add(Fault::new(Operation::Flush, Effect::Before(gate.clone())));
    let job = world.mirror(&volume, target, MirrorOptions::new("j", "target"));
    gate.wait_for_arrivals(1);
    assert_eq!(job.status(), JobStatus::Running, "not ready before the flush has succeeded");
    job.cancel(CancelMode::Force, false).unwrap();
    assert!(job.wait_ended(None));
    gate.open();
}
