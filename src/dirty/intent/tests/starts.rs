//! The start of a bit: durable before the write goes on, one fdatasync for a group. And logs on real files.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use super::*;
use crate::dirty::intent::simulated::JOB;

#[test]
fn a_bit_is_durable_before_the_write_goes_on() {
    let world = World::new(8);
    let log = world.log();
    assert!(!world.is_durable(3));
    for region in [3, 4, 3] {
        let passage = log.enter(regions(region, 1));
        assert!(world.is_durable(u32::try_from(region).unwrap()));
        drop(passage);
    }
    assert_eq!((log.syncs(), marked(&log)), (2, vec![3, 4]));
    // The world checks for itself: a change of the image is where the mark must be.
    world.guest_write(&log, 7);
    assert_eq!(format!("{:?}", log.enter(ByteRange::new(REGION - 1, 2))), "Passage(0..2097152)");
}

#[test]
fn a_write_over_many_regions_is_one_group() {
    let world = World::new(10_000);
    let log = world.log();
    log.mark_durably(ByteRange::new(REGION - 1, 2));
    assert_eq!(marked(&log), [0, 1]);
    log.mark_durably(regions(5, 9000));
    assert_eq!(log.syncs(), 2);
    assert!((5..9005).step_by(100).all(|region| world.is_durable(region)));
    let mut runs = Vec::new();
    log.marked_ranges(|range| runs.push(range));
    assert_eq!(runs, [regions(0, 2), regions(5, 9000)]);
    // Nothing, and what is past the end, is passed over.
    log.mark_durably(ByteRange::new(9999 * REGION, 0));
    log.mark_durably(regions(10_000, 5));
    log.mark_durably(ByteRange::new(u64::MAX - 1, 1));
    assert_eq!(log.syncs(), 2);
    log.mark_durably(regions(9999, u64::MAX / REGION));
    assert_eq!(log.marked_bytes(), 9003 * REGION);
}

#[test]
fn guests_that_come_while_a_group_is_written_share_the_next() {
    let world = World::new(64);
    let log = world.log();
    let gate = Gate::new();
    world.faults.lock().unwrap().before_sync = Some(gate.clone());
    std::thread::scope(|scope| {
        let _at_last = OpensAtLast(gate.clone());
        let (log, world) = (&log, &world);
        scope.spawn(|| log.mark_durably(regions(0, 1)));
        gate.wait_for_arrivals(1);
        // Eight regions, each of which two guests write first.
        let guests: Vec<_> = (0..16)
            .map(|guest| {
                scope.spawn(move || {
                    let passage = log.enter(regions(10 + guest % 8, 1));
                    assert!(world.is_durable(10 + u32::try_from(guest % 8).unwrap()));
                    drop(passage);
                })
            })
            .collect();
        eventually("all wait", || {
            let waits = |region| log.inner.regions.get(region).entered() == 2 && state(log, region) == State::Setting;
            (10..18).all(waits)
        });
        assert!(guests.iter().all(|guest| !guest.is_finished()));
        gate.open();
    });
    assert_eq!(log.syncs(), 2, "one group for the first, one for the sixteen");
}

#[test]
fn what_is_read_back_is_made_durable_before_it_is_believed() {
    let world = World::new(8);
    let log = world.log();
    let gate = Gate::new();
    world.faults.lock().unwrap().before_sync = Some(gate.clone());
    std::thread::scope(|scope| {
        let _at_last = OpensAtLast(gate.clone());
        scope.spawn(|| log.mark_durably(regions(3, 1)));
        gate.wait_for_arrivals(1);
        // The server dies here: its successor reads the mark, which no fdatasync has made durable.
        let found = world.log_in_the_page_cache();
        assert!(!world.is_durable(3));
        world.faults.lock().unwrap().before_sync = None;
        let (successor, recovery) = world.reopen(&found, Duration::from_secs(60));
        assert_eq!((recovery.marked_regions, recovery.is_whole()), (1, true));
        let passage = successor.enter(regions(3, 1));
        assert!(world.is_durable(3), "what a dead process wrote may be in the page cache only");
        drop(passage);
        gate.open();
    });
}

#[test]
fn pages_of_regions_are_there_once_they_are_touched() {
    let world = World::new(2000);
    let log = world.log_with(Duration::from_secs(60), &[5, 1500]);
    assert_eq!([state(&log, 5), state(&log, 6), state(&log, 1500)], [State::Set, State::Clear, State::Set]);
    drop(log.enter(regions(1500, 1)));
    assert_eq!(log.syncs(), 0);
    drop(log.enter(regions(1501, 1)));
    assert_eq!(log.syncs(), 1);
}

fn real_settings() -> Settings {
    struct Never;
    impl Forget for Never {
        fn forget(&self, reason: &Error) {
            panic!("{reason}");
        }
    }
    Settings::new(Duration::from_secs(60), Arc::new(Never))
}

fn place() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("job.intent");
    (directory, path)
}

#[test]
fn a_new_log_has_everything_marked_and_goes_on_where_it_ended() {
    let (_directory, path) = place();
    std::fs::write(&path, vec![b'x'; 5000]).unwrap();
    let size = 5000 * REGION - 17;
    let log = IntentLog::create(&path, JOB, size, real_settings()).unwrap();
    assert_eq!((log.marked_bytes(), log.region_bytes(), log.size_bytes()), (size, REGION, size));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let (bits, recovery) = recover(&std::fs::read(&path).unwrap(), &JOB, size);
    assert_eq!((recovery.marked_regions, recovery.is_whole(), bits.len()), (5000, true, 79));
    assert_eq!((log.syncs(), log.is_broken()), (0, false));
    let world = World::new(5000);
    log.inner.pass(&*world);
    assert_eq!((log.marked_bytes(), log.syncs()), (0, 1));
    log.mark_durably(regions(4999, 1));
    log.mark_durably(regions(0, 2));
    drop(log);

    let (log, recovery) = IntentLog::open(&path, JOB, size, real_settings()).unwrap();
    assert_eq!((recovery.to_string(), marked(&log)), ("3 of 5000 regions marked".to_owned(), vec![0, 1, 4999]));
    drop(log);
    // Another job: nothing in the file is about it.
    let (log, recovery) = IntentLog::open(&path, JobId([7; 16]), size, real_settings()).unwrap();
    assert_eq!((recovery.foreign_sectors, recovery.presumed_regions, log.marked_bytes()), (2, 5000, size));
    drop(log);
    // It has been written anew for that one, and a longer file becomes as long as it should be.
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 20).unwrap();
    let (log, recovery) = IntentLog::open(&path, JobId([7; 16]), size, real_settings()).unwrap();
    assert!(recovery.is_whole());
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1024);
    drop(log);
    IntentLog::remove(&path).unwrap();
    IntentLog::remove(&path).unwrap();
    let (log, recovery) = IntentLog::open(&path, JOB, size, real_settings()).unwrap();
    assert_eq!((recovery.missing_sectors, recovery.marked_regions), (2, 5000));
    assert_eq!(
        recovery.to_string(),
        "5000 of 5000 regions marked, 5000 of them because of 2 bad sectors of 2 (2 missing)"
    );
    drop(log);
    assert!(recover(&std::fs::read(&path).unwrap(), &JOB, size).1.is_whole());
}

#[test]
fn errors_of_files_are_named() {
    let (directory, path) = place();
    let error = IntentLog::create(directory.path(), JOB, 0, real_settings()).unwrap_err();
    assert!(error.to_string().starts_with("cannot replace the intent log "), "{error}");
    std::os::unix::fs::symlink("elsewhere", &path).unwrap();
    let error = IntentLog::open(&path, JOB, 0, real_settings()).unwrap_err();
    assert!(
        error.to_string().contains("cannot open the intent log ") && error.to_string().contains("job.intent"),
        "{error}"
    );
    let log = IntentLog::create(&path, JOB, 0, real_settings()).unwrap();
    drop(log.enter(regions(0, 5)));
    assert_eq!((log.marked_bytes(), log.syncs()), (0, 0), "a disk of no bytes has no regions");
    assert_eq!(JobId::from_hex("00ff000000000000000000000000000a").unwrap().0[..2], [0, 255]);
    assert_eq!([JobId::from_hex("+0ff000000000000000000000000000a"), JobId::from_hex("00")], [None, None]);
}
