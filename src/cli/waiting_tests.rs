//! What the verbs that wait do while the mirror behind them gets ready, stops, fails or goes away: against a control socket
//! with a mount behind it that is not there.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use super::follow::{self, Waited};
use super::interrupt::Interrupt;
use super::place::{Disk, Found, Mount};
use super::progress::Progress;
use super::{cutover, mirror};
use crate::control::client::Client;
use crate::control::fake::Fake;
use crate::control::server::ControlServer;
use crate::error::{ErrorKind, Result};
use crate::fuse::mountinfo::MountEntry;
use crate::mirror::types::MirrorResult;

struct Stand {
    fake: Arc<Fake>,
    mount: Mount,
    _server: ControlServer,
    _directory: tempfile::TempDir,
}

fn stand(disk_name: Option<&str>) -> Stand {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let fake = Fake::new();
    let server = ControlServer::start(&path, fake.clone()).unwrap();
    let entry = MountEntry {
        mount_id: 0,
        parent_id: 0,
        major: 0,
        minor: 0,
        mountpoint: PathBuf::from("/mnt/vm"),
        fstype: "fuse.livemirror".into(),
        fsname: "/images/os.img".into(),
        user_id: None,
    };
    let found = Found { entry, disk_name: disk_name.map(str::to_owned) };
    let mount = Mount { found, client: Client::connect(&path).unwrap() };
    Stand { fake, mount, _server: server, _directory: directory }
}

impl Stand {
    fn mirrored(&mut self) -> Disk {
        self.mount.client.execute("livemirror-mirror", json!({"device": "os.img", "target": "/new/os.img"})).unwrap();
        self.mount.disk().unwrap()
    }

    fn until_ready(&mut self, disk: &Disk, interrupt: &Interrupt) -> Result<Waited> {
        follow::until_ready(&mut self.mount, disk, interrupt, &mut Progress::new(), None)
    }

    fn cut_over(&mut self, disk: &Disk, timeout: Option<Duration>, interrupt: &Interrupt) -> Result<f64> {
        let disks = std::slice::from_ref(disk);
        let reports = cutover::cut_over(&mut self.mount, disks, Duration::from_millis(50), timeout, interrupt)?;
        Ok(reports[0].pause_ms)
    }
}

#[test]
fn disks_are_found_by_name_and_named_where_they_are_not() {
    let mut one = stand(Some("1.img"));
    assert_eq!(one.mount.disk().unwrap().device, "disk-1.img");
    let error = stand(None).mount.disk().unwrap_err();
    assert_eq!((error.exit_code(), error.advice()), (2, Some("name one: /mnt/vm/os.img, /mnt/vm/1.img")));
    let error = stand(Some("zz")).mount.disk().unwrap_err();
    assert_eq!((error.kind(), error.advice()), (ErrorKind::NotFound, Some("there is: os.img, 1.img")));
    assert_eq!(one.mount.disk().unwrap().job_id().unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn waiting_ends_when_the_mirror_is_ready_and_when_it_never_will_be() {
    let mut stand = stand(Some("os.img"));
    let (never, came) = (Interrupt::pretended(false), Interrupt::pretended(true));
    let disk = stand.mirrored();
    assert_eq!(stand.until_ready(&disk, &came).unwrap(), Waited::Interrupted);

    stand.fake.stop_for_room("os.img");
    let stopped = stand.until_ready(&disk, &never).unwrap_err();
    assert_eq!(stopped.exit_code(), 3);
    assert_eq!(stopped.to_string(), "the mirror of /mnt/vm/os.img is stopped: No space left on device");
    assert!(stopped.advice().unwrap().starts_with("make room, then `livemirror resume /mnt/vm/os.img`"));

    stand.mount.client.execute("block-job-resume", json!({"device": "os.img"})).unwrap();
    stand.fake.make_ready("os.img");
    assert_eq!(stand.until_ready(&disk, &never).unwrap(), Waited::Ready);

    stand.fake.fail("os.img");
    let failed = stand.until_ready(&disk, &never).unwrap_err();
    assert_eq!(
        (failed.exit_code(), failed.to_string().as_str()),
        (1, "the mirror of /mnt/vm/os.img failed: Input/output error")
    );
    assert_eq!(follow::until_gone(&mut stand.mount, &disk).unwrap().unwrap().result, MirrorResult::Failed);
}

#[test]
fn a_cutover_is_asked_for_until_it_happened_or_the_time_is_up() {
    let mut stand = stand(Some("os.img"));
    let never = Interrupt::pretended(false);
    let disk = stand.mirrored();
    let started = Instant::now();
    let late = stand.cut_over(&disk, Some(Duration::from_millis(200)), &never).unwrap_err();
    assert_eq!(late.exit_code(), 3);
    assert!(late.to_string().starts_with("not cut over within 200ms: "), "{late}");
    assert!(started.elapsed() >= Duration::from_millis(200));
    let stopped = stand.cut_over(&disk, None, &Interrupt::pretended(true)).unwrap_err();
    assert!(stopped.to_string().starts_with("interrupted: "), "{stopped}");

    let fake = Arc::clone(&stand.fake);
    let ready = std::thread::spawn(move || {
        let asked = |fake: &Fake| fake.calls.lock().iter().filter(|call| call.starts_with("CutoverRequest")).count();
        let before = asked(&fake);
        while asked(&fake) < before + 2 {
            std::thread::yield_now();
        }
        fake.make_ready("os.img");
    });
    assert_eq!(stand.cut_over(&disk, None, &never).unwrap(), 1.5);
    ready.join().unwrap();

    // As after a server that died between the switch and its answer: the job is gone, and the state says how.
    let gone = Disk { device: "gone".into(), ..disk };
    assert_eq!(stand.cut_over(&gone, None, &never).unwrap(), 1.5);
}

#[test]
fn a_failed_mirror_ends_the_cutover() {
    let mut stand = stand(Some("os.img"));
    let disk = stand.mirrored();
    stand.fake.fail("os.img");
    let failed = stand.cut_over(&disk, None, &Interrupt::pretended(false)).unwrap_err();
    assert_eq!((failed.exit_code(), failed.kind()), (1, ErrorKind::Failed));
}

#[test]
fn a_directory_as_target_stands_for_the_sources_name_in_it() {
    let mut stand = stand(Some("os.img"));
    let disk = stand.mount.disk().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let inside = directory.path().join("os.img").display().to_string();
    assert_eq!(mirror::target_path(directory.path(), &disk).unwrap(), inside);
    assert_eq!(mirror::target_path(&directory.path().join("x"), &disk).unwrap(), inside.replace("os.img", "x"));
    assert_eq!(mirror::target_path(Path::new("nbd://host/export"), &disk).unwrap(), "nbd://host/export");
    let missing = mirror::target_path(Path::new("/nowhere/"), &disk).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
}
