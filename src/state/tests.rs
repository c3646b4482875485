//! The state on disk: interrupted saves, failing disks, damaged records, marks on images.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use tempfile::TempDir;

use super::files::Step;
use super::runtime;
use super::*;
use crate::error::ErrorKind;
use crate::image::{Format, Identity};
use crate::mirror::types::{LastMirror, MirrorOptions, MirrorResult};
use crate::volume::ShownAttributes;

fn identity(inode: u64) -> Identity {
    Identity { id: Some("a".repeat(32)), device: 7, inode, birth_ns: Some(5), size_bytes: 1 << 20 }
}

fn state() -> MountState {
    let volume = VolumeState {
        id: random_id().unwrap(),
        name: "disk.img".into(),
        source: "/vm/disk.img".into(),
        format: Format::Raw,
        active: "/vm/disk.img".into(),
        active_identity: identity(1),
        cache: None,
        size_bytes: None,
        generation: 1,
        superseded: Vec::new(),
        shown: Some(ShownAttributes { mode: Some(0o640), uid: Some(107), gid: Some(36), ..Default::default() }),
        last_mirror: Some(LastMirror {
            target: "/new/disk.img".into(),
            result: MirrorResult::Cancelled,
            consistent: false,
            error: None,
            pause_ms: Some(1.5),
            predicted_pause_ms: Some(2.5),
            ended: "2026-01-01T00:00:00Z".into(),
        }),
        mirror_target: None,
        mirror: None,
    };
    MountState { mountpoint: "/mnt/vm".into(), restarts: 2, last_exit: Some("signal 9".into()), volumes: vec![volume] }
}

#[test]
fn a_mirror_that_died_with_its_server_has_failed() {
    let mut volume = state().volumes.remove(0);
    volume.mirror_died();
    assert_eq!(volume.last_mirror.as_ref().unwrap().result, MirrorResult::Cancelled, "none ran");
    volume.mirror_target = Some("/new/disk.img".into());
    let mut moved = volume.clone();
    volume.mirror_died();
    let last = volume.last_mirror.unwrap();
    assert_eq!((last.result, last.consistent, last.target.as_str()), (MirrorResult::Failed, false, "/new/disk.img"));
    assert_eq!(volume.mirror_target, None);
    moved.cut_over("/new/disk.img".into(), identity(2), Format::Raw);
    assert_eq!(moved.mirror_target, None, "a cutover is the end of a mirror");
}

#[test]
fn two_servers_do_not_share_a_state_directory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let first = Store::open(&path).unwrap().claim().unwrap();
    assert_eq!(Store::open(&path).unwrap().claim().err().unwrap().kind(), ErrorKind::NotNow);
    Store::open(&path).unwrap().load().unwrap();
    drop(first);
    Store::open(&path).unwrap().claim().unwrap();
}

fn changed() -> MountState {
    let mut state = state();
    state.volume_mut("disk.img").unwrap().cut_over("/new/disk.img".into(), identity(2), Format::Raw);
    state
}

fn store() -> (TempDir, Store) {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(&root.path().join("a/b/mount")).unwrap();
    (root, store)
}

fn files_in(store: &Store) -> Vec<String> {
    let entries = fs::read_dir(store.path().parent().unwrap()).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_saved_record_is_loaded_again() {
    let (_root, store) = store();
    assert_eq!(store.load().unwrap(), None);
    let state = state();
    store.save(&state).unwrap();
    assert_eq!(store.load().unwrap().unwrap(), state);
    assert_eq!(fs::metadata(store.path()).unwrap().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(store.path().parent().unwrap()).unwrap().mode() & 0o777, 0o700);
    let uid = nix::unistd::geteuid().as_raw();
    let reader = Store::open_existing(store.path().parent().unwrap(), uid).unwrap().unwrap();
    assert_eq!(reader.load().unwrap().unwrap(), state);
    store.remove().unwrap();
    store.remove().unwrap();
    assert_eq!(reader.load().unwrap(), None);
    assert!(Store::open_existing(Path::new("/nowhere/at/all"), uid).unwrap().is_none());
}

#[test]
fn a_damaged_record_is_reported_with_its_path() {
    let (_root, store) = store();
    store.save(&state()).unwrap();
    let good = fs::read(store.path()).unwrap();
    for damage in [good[..good.len() - 1].to_vec(), Vec::new(), b"{}".to_vec(), vec![0; 4096]] {
        fs::write(store.path(), damage).unwrap();
        let error = store.load().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().ends_with(&store.path().display().to_string()), "{error}");
    }
    File::create(store.path()).unwrap().set_len(1 << 40).unwrap();
    assert_eq!(store.load().unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn an_abandoned_or_failed_preparation_leaves_the_old_record_and_nothing_else() {
    let (_root, store) = store();
    let old = state();
    store.save(&old).unwrap();
    drop(store.prepare(&changed()).unwrap());
    for step in [Step::Write, Step::SyncFile] {
        store.faults().failing.lock().insert(step);
        assert!(store.prepare(&changed()).is_err());
        assert!(matches!(store.save(&changed()), Err(CommitError::NotCommitted(_))));
        store.faults().failing.lock().clear();
    }
    assert_eq!(store.load().unwrap().unwrap(), old);
    assert_eq!(files_in(&store), [store::FILE_NAME]);
}

#[test]
fn an_error_from_the_rename_on_is_undecided_until_a_commit_succeeds() {
    for step in [Step::Rename, Step::SyncDirectory] {
        let (_root, store) = store();
        let (old, new) = (state(), changed());
        store.save(&old).unwrap();
        let prepared = store.prepare(&new).unwrap();
        store.faults().failing.lock().insert(step);
        assert!(matches!(prepared.commit(), Err(CommitError::Undecided(_))), "{step:?}");
        let found = store.load().unwrap().unwrap();
        assert!(found == old || found == new);
        assert!(matches!(store.save(&new), Err(CommitError::Undecided(_))));
        store.faults().failing.lock().clear();
        store.save(&new).unwrap();
        assert_eq!(store.load().unwrap().unwrap(), new);
        assert_eq!(files_in(&store), [store::FILE_NAME]);
    }
}

#[test]
fn a_record_prepared_before_another_change_is_refused() {
    let (_root, store) = store();
    store.save(&state()).unwrap();
    let stale = store.prepare(&changed()).unwrap();
    let mut shown = state();
    shown.volumes[0].shown = None;
    store.save(&shown).unwrap();
    assert!(matches!(stale.commit(), Err(CommitError::NotCommitted(_))));
    assert_eq!(store.load().unwrap().unwrap(), shown);
}

#[test]
fn what_a_killed_writer_left_is_ignored_and_removed() {
    let (_root, store) = store();
    store.save(&state()).unwrap();
    std::mem::forget(store.prepare(&changed()).unwrap());
    assert_eq!(files_in(&store).len(), 2);
    assert_eq!(store.load().unwrap().unwrap().volumes[0].generation, 1);
    store.remove_leftovers();
    assert_eq!(files_in(&store), [store::FILE_NAME]);
}

#[test]
fn a_full_disk_and_a_directory_that_cannot_be_written_are_named() {
    let (_root, store) = store();
    store.faults().failing.lock().insert(Step::Write);
    let error = store.prepare(&state()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(error.to_string().contains("mount.state"), "{error}");
    if !nix::unistd::geteuid().is_root() {
        let directory = store.path().parent().unwrap().to_owned();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o500)).unwrap();
        store.faults().failing.lock().clear();
        assert!(matches!(store.save(&state()), Err(CommitError::NotCommitted(_))));
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
    }
    // No directory can be made below a file, whoever asks.
    assert!(Store::open(Path::new("/proc/version/state")).is_err());
    assert!(Store::open(Path::new("/proc/livemirror")).is_err());
}

#[test]
fn a_cutover_supersedes_the_old_image_and_the_way_back_forgets_it() {
    let mut volume = changed().volumes.remove(0);
    assert_eq!(volume.active, "/new/disk.img");
    let left_at = volume.generation;
    assert!(left_at > 1);
    assert_eq!(volume.source, Path::new("/vm/disk.img"));
    let first = FormerImage { path: "/vm/disk.img".into(), identity: identity(1), generation: left_at, marked: false };
    assert_eq!(volume.superseded, [first]);
    volume.cut_over("/vm/disk.img".into(), identity(1), Format::Raw);
    let second = FormerImage {
        path: "/new/disk.img".into(),
        identity: identity(2),
        generation: volume.generation,
        marked: false,
    };
    assert!(volume.generation > left_at);
    assert_eq!(volume.superseded, [second]);
}

fn mark(generation: u64) -> Mark {
    Mark {
        volume: "b".repeat(32),
        generation,
        successor: "/new/disk.img".into(),
        successor_identity: identity(2),
        successor_format: Some(Format::Raw),
        when: "2026-01-01T00:00:00Z".into(),
    }
}

/// Marks and clears through `image`, wherever the marks go.
fn exercise_marks(marks: &Marks, image: &File) {
    let image = image.as_fd();
    let identity = identity(77);
    assert_eq!(marks.read_mark(image, &identity).unwrap(), None);
    marks.clear(image, &identity).unwrap();
    marks.supersede(image, &identity, &mark(3)).unwrap();
    marks.supersede(image, &identity, &mark(5)).unwrap();
    marks.supersede(image, &identity, &mark(4)).unwrap();
    marks.make_durable(image).unwrap();
    assert_eq!(marks.read_mark(image, &identity).unwrap(), Some(mark(5)));
    marks.clear(image, &identity).unwrap();
    assert_eq!(marks.read_mark(image, &identity).unwrap(), None);
}

#[test]
fn an_image_with_xattrs_carries_its_id_and_its_mark() {
    let root = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let marks = Marks::with_registry(&root.path().join("superseded"));
    let path = root.path().join("disk.img");
    File::create(&path).unwrap();
    let image = File::open(&path).unwrap();
    let Some(id) = marks.ensure_id(image.as_fd()).unwrap() else {
        eprintln!("no user xattrs here: only the registry is tested");
        return;
    };
    assert_eq!(marks.ensure_id(image.as_fd()).unwrap(), Some(id.clone()));
    exercise_marks(&marks, &image);
    let by_path = File::options().read(true).custom_flags(libc::O_PATH).open(&path).unwrap();
    assert_eq!(marks.id(by_path.as_fd()).unwrap(), Some(id));
    exercise_marks(&marks, &by_path);
    assert!(!root.path().join("superseded").exists());

    xattr::set(&path, "user.livemirror.superseded", b"{\"volume\":").unwrap();
    let error = marks.read_mark(image.as_fd(), &identity(77)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.advice().unwrap().contains("setfattr -x"));
    marks.supersede(image.as_fd(), &identity(77), &mark(9)).unwrap();
    assert_eq!(marks.read_mark(image.as_fd(), &identity(77)).unwrap(), Some(mark(9)));
}

#[test]
fn an_image_without_xattrs_is_marked_in_the_registry() {
    let root = tempfile::tempdir().unwrap();
    let marks = Marks::with_registry(&root.path().join("superseded"));
    // Character devices have no user xattrs, just like block devices, and every host has this one.
    let device = File::open("/dev/null").unwrap();
    assert_eq!(marks.ensure_id(device.as_fd()).unwrap(), None);
    exercise_marks(&marks, &device);
    marks.supersede(device.as_fd(), &identity(77), &mark(1)).unwrap();
    assert_eq!(marks.read_mark(device.as_fd(), &identity(78)).unwrap(), None, "another image");
    let as_device = Identity { inode: 0, ..identity(0) };
    marks.supersede(device.as_fd(), &as_device, &mark(2)).unwrap();
    let entries: Vec<_> =
        fs::read_dir(root.path().join("superseded")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(entries.iter().any(|name| name == "device-1048576-%2Fdev%2Fnull"), "{entries:?}");
    fs::write(root.path().join("superseded").join("device-1048576-%2Fdev%2Fnull"), "rubbish").unwrap();
    assert_eq!(marks.read_mark(device.as_fd(), &as_device).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn a_running_mount_is_found_until_it_withdraws() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("run");
    let uid = nix::unistd::geteuid().as_raw();
    let directories = [(root.path().join("none"), uid), (path.clone(), uid)];
    let record = RuntimeRecord {
        mountpoint: "/mnt/vm".into(),
        server_pid: 11,
        keeper_pid: Some(10),
        control: "/run/livemirror/x.sock".into(),
        state_dir: "/var/lib/livemirror/x".into(),
        volumes: vec![RuntimeVolume {
            name: "disk.img".into(),
            source: "/vm/disk.img".into(),
            device: "disk.img".into(),
        }],
        started: "2026-01-01T00:00:00Z".into(),
    };
    assert_eq!(runtime::find_in(&directories, "x").unwrap(), None);
    record.publish_in(&path, "x").unwrap();
    let restarted = RuntimeRecord { server_pid: 12, ..record };
    restarted.publish_in(&path, "x").unwrap();
    fs::write(path.join("y.mount"), "rubbish").unwrap();
    assert_eq!(runtime::find_in(&directories, "x").unwrap(), Some(restarted.clone()));
    assert!(runtime::find_in(&directories, "y").is_err());
    assert_eq!(runtime::list_in(&directories), [("x".to_owned(), restarted)]);
    assert_eq!(runtime::find_in(&[(path.clone(), uid + 1)], "x").unwrap_err().kind(), ErrorKind::Failed);
    runtime::withdraw_from(&path, "x").unwrap();
    assert_eq!(runtime::find_in(&directories, "x").unwrap(), None);
}

fn unfinished() -> MirrorRecord {
    MirrorRecord {
        job: "1".repeat(32),
        options: MirrorOptions::new("disk.img", "/new/disk.img"),
        paused: false,
        created_target: true,
        target_identity: identity(2),
        size_bytes: 1 << 20,
        generation: 7,
        raising: false,
        source_marked: true,
        target_marked: true,
        source_stamp: Stamp::Running,
        target_stamp: Stamp::Running,
        compare: None,
    }
}

#[test]
fn an_image_of_another_generation_or_mirror_is_not_the_one_that_was_paired() {
    let record = unfinished();
    let mark = |generation| PairMark { job: record.job.clone(), generation, state_dir: None };
    assert_eq!(record.mismatch(true, Some(&mark(7))), None);
    for other in [6, 8] {
        assert!(record.mismatch(true, Some(&mark(other))).is_some(), "generation {other}");
    }
    let raising = MirrorRecord { raising: true, ..record.clone() };
    assert_eq!(raising.mismatch(true, Some(&mark(6))), None, "a server died while it raised it");
    assert!(raising.mismatch(true, Some(&mark(5))).is_some());
    let foreign = PairMark { job: "2".repeat(32), generation: 7, state_dir: None };
    assert!(record.mismatch(true, Some(&foreign)).is_some());
    assert!(record.mismatch(true, None).is_some(), "an image without its mark");
    assert_eq!(record.mismatch(false, None), None, "where there are no attributes the times speak alone");
}
