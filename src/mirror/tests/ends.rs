//! The verbs, and the states and events that they lead through.

use super::super::types::{CancelMode, CopyMode, JobEvent, JobStatus::*, MirrorOptions, MirrorResult};
use super::*;

fn ready_job(world: &World, options: MirrorOptions) -> (Arc<Volume>, Arc<MemoryImage>, Arc<Job>) {
    let source = disk(4);
    source.write_at(0, &vec![3; 1 << 20]).unwrap();
    let volume = volume("disk", source);
    let target = MemoryImage::new("target", 4 << 20);
    let job = world.mirror(&volume, target.clone(), options);
    wait_for("ready", || job.status() == Ready);
    (volume, target, job)
}

#[test]
fn complete_goes_through_qemus_states() {
    let world = World::new();
    let (volume, _, job) = ready_job(&world, MirrorOptions::new("j", "target"));
    job.complete().unwrap();
    wait_for("null", || job.status() == Null);
    assert_eq!(world.states("j"), [Created, Running, Ready, Waiting, Pending, Concluded, Null]);
    assert_eq!(volume.active().name(), "target");
    let heard = world.heard.lock();
    let completed = heard.iter().position(|event| matches!(event, JobEvent::Completed(_, None))).unwrap();
    let concluded =
        heard.iter().position(|event| matches!(event, JobEvent::StatusChange { status: Concluded, .. })).unwrap();
    assert!(completed < concluded);
}

#[test]
fn a_job_that_is_finalized_by_hand_waits_in_pending_without_holding_guests() {
    let world = World::new();
    let options = MirrorOptions { auto_finalize: false, auto_dismiss: false, ..MirrorOptions::new("j", "target") };
    let (volume, target, job) = ready_job(&world, options);
    assert_eq!(job.finalize().unwrap_err().kind(), ErrorKind::NotNow);
    job.complete().unwrap();
    wait_for("pending", || job.status() == Pending);
    volume.write(0, &block_bytes(0, 1), false).unwrap();
    job.finalize().unwrap();
    assert_eq!(job.status(), Concluded);
    assert_eq!(volume.active().name(), "target");
    assert!(read_all(&*target)[..BLOCK] == block_bytes(0, 1));
    assert_eq!(job.info().state, Concluded);
    job.dismiss().unwrap();
    assert_eq!(job.status(), Null);
}

#[test]
fn finish_leaves_a_consistent_copy_and_no_switch() {
    let world = World::new();
    let (volume, target, job) = ready_job(&world, MirrorOptions::new("j", "target"));
    let guest = Guest::start(&volume, 0, 64);
    job.cancel(CancelMode::Soft, true).unwrap();
    assert!(job.wait_ended(None));
    let outcome = job.outcome().unwrap();
    assert_eq!((outcome.result, outcome.consistent), (MirrorResult::Finished, true));
    assert_eq!(volume.active().name(), "source");
    let copy = read_all(&*target);
    let seen = guest.writes.load(SeqCst);
    wait_for("the guest goes on", || guest.writes.load(SeqCst) > seen + 100);
    guest.stop();
    assert!(copy == read_all(&*target), "the copy changed after the end");
    assert_eq!(world.states("j"), [Created, Running, Ready, Waiting, Pending, Concluded, Null]);
}

#[test]
fn a_copy_that_may_be_finished_is_left_alone_until_that_is_decided() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let world = World::new();
        let options = MirrorOptions { copy_mode: mode, ..MirrorOptions::new("j", "target") };
        let (volume, target, job) = ready_job(&world, options);
        let guest = Guest::start(&volume, 0, 64);
        // Neither the record nor the one that takes it back is durable for now.
        let many = 1 << 40;
        world.committer.undecided.store(many, SeqCst);
        let jobs = [job.clone()];
        std::thread::scope(|scope| {
            let ending = scope.spawn(|| world.end(&jobs, Ending::Copy));
            wait_for("undecided", || world.committer.undecided.load(SeqCst) < many - 1);
            let copy = read_all(&*target);
            let seen = guest.writes.load(SeqCst);
            wait_for("the guest goes on", || guest.writes.load(SeqCst) > seen + 1000);
            // Here a server may be killed, and the next one find a record that says "finished, consistent".
            assert!(copy == read_all(&*target), "{mode:?}: the copy changed while it may count as finished");
            assert!(job.info().dirty_bytes > 0);
            world.committer.undecided.store(1, SeqCst);
            ending.join().unwrap();
        });
        assert!(world.committer.taken_back.load(SeqCst));
        let acknowledged = guest.stop();
        job.wait_ended(None);
        assert_eq!(job.outcome().map(|outcome| outcome.result), Some(MirrorResult::Finished));
        assert_holds(&*volume.active(), 0, &acknowledged);
    }
}

#[test]
fn force_cancel_aborts() {
    let world = World::new();
    let (volume, _, job) = ready_job(&world, MirrorOptions::new("j", "target"));
    job.cancel(CancelMode::Force, false).unwrap();
    job.wait_ended(None);
    assert_eq!(
        *world.observer.tracked_when_unpaired.lock(),
        [true],
        "unpaired before the first change that nobody tracks"
    );
    assert!(job.wait_ended(None));
    wait_for("null", || job.status() == Null);
    assert_eq!(world.states("j"), [Created, Running, Ready, Aborting, Concluded, Null]);
    assert!(volume.tracking().is_none());
    assert!(world.heard.lock().iter().any(|event| matches!(event, JobEvent::Cancelled(_))));
    assert_eq!(job.cancel(CancelMode::Force, false).unwrap_err().kind(), ErrorKind::NotNow);
}

#[test]
fn pause_stops_the_copy_not_the_tracking() {
    let world = World::new();
    let (volume, target, job) = ready_job(&world, MirrorOptions::new("j", "target"));
    job.pause().unwrap();
    assert_eq!(job.pause().unwrap_err().to_string(), "Job is already paused");
    assert_eq!(job.status(), Standby);
    volume.write(0, &block_bytes(0, 1), false).unwrap();
    assert!(job.info().dirty_bytes > 0);
    assert!(read_all(&*target)[..BLOCK] != block_bytes(0, 1));
    assert_eq!(
        job.cancel(CancelMode::Soft, false).unwrap_err().to_string(),
        "The block job for device 'j' is currently paused"
    );
    job.resume().unwrap();
    assert_eq!(job.resume().unwrap_err().to_string(), "Can't resume a job that was not paused");
    wait_for("in sync", || job.info().in_sync);
    assert!(read_all(&*target)[..BLOCK] == block_bytes(0, 1));
}

#[test]
fn the_copy_mode_changes_both_ways_while_guests_write() {
    let world = World::new();
    let (volume, target, job) = ready_job(&world, MirrorOptions::new("j", "target"));
    let guest = Guest::start(&volume, 0, 256);
    for mode in [CopyMode::WriteBlocking, CopyMode::Background, CopyMode::WriteBlocking, CopyMode::Auto] {
        job.set_copy_mode(mode).unwrap();
        let seen = guest.writes.load(SeqCst);
        wait_for("the guest goes on", || guest.writes.load(SeqCst) > seen + 200);
    }
    let acknowledged = guest.stop();
    wait_for("in sync", || job.info().in_sync);
    assert_holds(&*target, 0, &acknowledged);
}

#[test]
fn a_speed_limit_yields_to_cancel_at_once() {
    let world = World::new();
    let source = disk(4);
    source.write_at(0, &vec![3; 4 << 20]).unwrap();
    let volume = volume("disk", source);
    let options = MirrorOptions { speed_bytes_per_second: 1, ..MirrorOptions::new("j", "target") };
    let job = world.mirror(&volume, MemoryImage::new("target", 4 << 20), options);
    wait_for("something is copied", || job.info().copied_bytes > 0);
    assert!(!job.info().in_sync);
    job.cancel(CancelMode::Force, false).unwrap();
    assert!(job.wait_ended(None), "a limit of 1 byte/s would take days");
}
