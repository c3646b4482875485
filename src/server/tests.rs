//! Which image a disk lives on, and what a cutover writes down: on real files, without a kernel.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::config::{Layout, MountConfig, VolumeConfig};
use super::ledger::{Ledger, LedgerCommitter};
use super::opening::{OpenedVolume, locked_descriptor, open_first};
use super::pairing::Untie;
use super::{run, target};
use crate::dirty::intent::Forget;
use crate::error::{Error, ErrorKind};
use crate::fuse::{KeeperLink, Start};
use crate::image::nbd::RECONNECT_DEFAULT;
use crate::image::{CacheMode, Image, OpenOptions, Role, open};
use crate::mirror::cutover::{CommitFailure, Committer, Ending, Switch};
use crate::mirror::types::MirrorOptions;
use crate::state::Step;
use crate::state::{Mark, Marks, MirrorRecord, MountState, Stamp, Store};
use crate::sync::Arc;
use crate::volume::{AttributeChange, ShownAttributes, Volume, VolumeOptions};

struct World {
    directory: tempfile::TempDir,
    config: MountConfig,
    marks: Marks,
}

impl World {
    /// Two images, `a.img` and `b.img`; `a.img` is what is mounted.
    fn new() -> World {
        // Not in /tmp, which may have no extended attributes.
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let at = |name: &str| directory.path().join(name);
        for name in ["a.img", "b.img"] {
            std::fs::File::create(at(name)).unwrap().set_len(1 << 20).unwrap();
        }
        let config = MountConfig {
            mountpoint: at("mnt"),
            layout: Layout::Directory,
            volumes: vec![VolumeConfig { name: "disk".into(), source: at("a.img"), format: None }],
            read_only: false,
            growable: false,
            allow_other: false,
            cache: CacheMode::Writeback,
            reconnect: RECONNECT_DEFAULT,
            follow: false,
            force: false,
            control: at("control"),
            state_dir: at("state"),
            log_file: None,
            pidfile: None,
            foreground: true,
            kernel_options: Vec::new(),
        };
        let marks = Marks::with_registry(&at("superseded"));
        World { config, marks, directory }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn open(&self, name: &str, recorded: Option<&MountState>) -> Result<OpenedVolume, Error> {
        let volume = VolumeConfig { source: self.at(name), ..self.config.volumes[0].clone() };
        open_first(&self.config, &volume, recorded, &self.marks)
    }

    fn image(&self, name: &str) -> Arc<dyn Image> {
        let options = OpenOptions { writable: true, role: Role::Target, ..OpenOptions::default() };
        open(&self.at(name), &options).unwrap()
    }

    fn ledger(&self, opened: &OpenedVolume) -> (Arc<Ledger>, OwnedFd) {
        let (link, other) = KeeperLink::for_tests().unwrap();
        let state = MountState {
            mountpoint: self.config.mountpoint.clone(),
            restarts: 0,
            last_exit: None,
            volumes: vec![opened.state.clone()],
        };
        let store = Store::open(&self.config.state_dir).unwrap();
        store.save(&state).map_err(Error::from).unwrap();
        (Ledger::new(store, self.marks.clone(), Arc::new(link), state), other)
    }

    /// Cuts the disk over from one image to another, as a mirror does; `supersede`: its last step too.
    fn cut_over(&self, from: &str, to: &str, supersede: bool) -> MountState {
        let opened = self.open(from, None).unwrap();
        let (ledger, _other) = self.ledger(&opened);
        let switches =
            [Switch { volume: volume(opened.image.clone()), old: opened.image, new: self.image(to), cache: None }];
        let committer = LedgerCommitter(ledger);
        assert!(committer.prepare(&switches, Ending::Switch).unwrap().commit().is_ok());
        if supersede {
            committer.supersede(&switches);
        }
        Store::open(&self.config.state_dir).unwrap().load().unwrap().unwrap()
    }

    fn mark(&self, name: &str) -> Option<Mark> {
        let image = open(&self.at(name), &OpenOptions { role: Role::Observer, ..OpenOptions::default() }).unwrap();
        self.marks.read_mark(locked_descriptor(&*image).unwrap(), &image.identity().unwrap()).unwrap()
    }
}

fn volume(image: Arc<dyn Image>) -> Arc<Volume> {
    let options = VolumeOptions {
        name: "disk".into(),
        id: "id".into(),
        read_only: false,
        growable: false,
        shown: ShownAttributes::default(),
    };
    Arc::new(Volume::new(options, image))
}

fn name_of(opened: &OpenedVolume) -> &str {
    Path::new(opened.image.name()).file_name().unwrap().to_str().unwrap()
}

#[test]
fn a_superseded_image_is_refused_followed_or_forced() {
    let mut world = World::new();
    let state = world.cut_over("a.img", "b.img", true);
    assert_eq!(state.volumes[0].active, world.at("b.img").display().to_string());
    let error = world.open("a.img", None).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Superseded);
    assert!(error.to_string().contains("b.img"), "{error}");
    assert_eq!(name_of(&world.open("b.img", None).unwrap()), "b.img");
    world.config.follow = true;
    assert_eq!(name_of(&world.open("a.img", None).unwrap()), "b.img");
    world.config.follow = false;
    world.config.force = true;
    assert_eq!(name_of(&world.open("a.img", None).unwrap()), "a.img");
    // Nothing is served yet: a mount that fails now must leave the mark.
    assert!(world.mark("a.img").is_some());
}

#[test]
fn the_record_tells_what_a_crash_kept_from_the_image() {
    let world = World::new();
    let state = world.cut_over("a.img", "b.img", false);
    assert_eq!(world.mark("a.img"), None);
    let error = world.open("a.img", Some(&state)).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Superseded, "{error}");
    assert_eq!(name_of(&world.open("b.img", Some(&state)).unwrap()), "b.img");
}

#[test]
fn an_image_that_lost_its_id_is_still_the_one_that_the_record_knows() {
    let world = World::new();
    let state = world.cut_over("b.img", "a.img", true);
    let id = || xattr::get(world.at("a.img"), "user.livemirror.id").unwrap();
    let before = id();
    assert!(before.is_some());
    // It is durable only with the image's next fsync: a power cut may take it.
    xattr::remove(world.at("a.img"), "user.livemirror.id").unwrap();
    let opened = world.open("a.img", Some(&state)).unwrap();
    assert_eq!(opened.state.superseded, state.volumes[0].superseded, "what is known of the disk is kept");
    assert_eq!(opened.state.generation, state.volumes[0].generation);
    assert_eq!(id(), before);
}

#[test]
fn a_successor_that_is_another_image_is_not_followed() {
    let mut world = World::new();
    world.cut_over("a.img", "b.img", true);
    world.config.follow = true;
    std::fs::remove_file(world.at("b.img")).unwrap();
    let gone = world.open("a.img", None).map(|_| ()).unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::Superseded, "{gone}");
    std::fs::File::create(world.at("b.img")).unwrap().set_len(1 << 20).unwrap();
    let error = world.open("a.img", None).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("not the image that the disk was cut over to"), "{error}");
}

#[test]
fn the_way_back_raises_the_generation_and_unmarks_what_is_active() {
    let mut world = World::new();
    world.cut_over("a.img", "b.img", true);
    let first = world.mark("a.img").unwrap();
    world.cut_over("b.img", "a.img", true);
    assert_eq!(world.mark("a.img"), None, "what becomes active loses its mark");
    let second = world.mark("b.img").unwrap();
    assert!(second.generation > first.generation, "{first:?} {second:?}");
    assert_eq!(name_of(&world.open("a.img", None).unwrap()), "a.img");
    // A mark that could not be taken away is outdone by the later one.
    let image = world.image("a.img");
    let again = world.marks.supersede(locked_descriptor(&*image).unwrap(), &image.identity().unwrap(), &first);
    again.unwrap();
    drop(image);
    assert_eq!(name_of(&world.open("a.img", None).unwrap()), "a.img");
    world.config.follow = true;
    assert_eq!(name_of(&world.open("b.img", None).unwrap()), "a.img");
}

#[test]
fn a_change_that_could_not_be_written_is_not_forgotten_by_a_cutover() {
    let world = World::new();
    let opened = world.open("a.img", None).unwrap();
    let (ledger, _other) = world.ledger(&opened);
    let disk = volume(opened.image.clone());
    let switches = [Switch { volume: disk.clone(), old: opened.image, new: world.image("b.img"), cache: None }];
    let committer = LedgerCommitter(ledger.clone());
    let prepared = committer.prepare(&switches, Ending::Switch).unwrap();
    ledger.store.faults().failing.lock().insert(Step::Write);
    disk.set_attributes(AttributeChange { mode: Some(0o640), ..AttributeChange::default() }).unwrap();
    ledger.shown_changed(&disk);
    ledger.store.faults().failing.lock().clear();
    assert!(matches!(prepared.commit(), Err(CommitFailure::NotDone(_))), "it was prepared before the change");
    assert!(committer.prepare(&switches, Ending::Switch).unwrap().commit().is_ok());
    let state = Store::open(&world.config.state_dir).unwrap().load().unwrap().unwrap();
    assert_eq!(state.volumes[0].shown.as_ref().unwrap().mode, Some(0o640));
    assert_eq!(state.volumes[0].active, world.at("b.img").display().to_string());
}

/// What a guest waits for when the intent log's disk, and so perhaps the record's, hangs.
#[test]
fn a_pairing_is_destroyed_on_an_image_where_the_record_hangs() {
    let world = World::new();
    let opened = world.open("a.img", None).unwrap();
    let (ledger, _other) = world.ledger(&opened);
    let disk = volume(opened.image.clone());
    let target = world.image("b.img");
    ledger.pair(&disk, &*target, mirror_record(&*target)).unwrap();
    let pairs = |images: [&dyn Image; 2]| {
        images.map(|image| world.marks.read_pair(locked_descriptor(image).unwrap()).unwrap().is_some())
    };
    assert_eq!(pairs([&*opened.image, &*target]), [true, true]);
    let untie = Untie::new(&ledger, &disk);
    untie.know(&target);
    let hangs = ledger.saving.lock();
    untie.forget(&Error::new(ErrorKind::Failed, "the log's disk hangs"));
    assert!(pairs([&*opened.image, &*target]).contains(&false), "untied somewhere before the guest goes on");
    // Nor does anybody wait who only looks.
    assert!(ledger.mirror("disk").is_some());
    drop(hangs);
}

fn mirror_record(target: &dyn Image) -> MirrorRecord {
    MirrorRecord {
        job: "00112233445566778899aabbccddeeff".into(),
        options: MirrorOptions::new("j", target.name()),
        paused: false,
        created_target: false,
        target_identity: target.identity().unwrap(),
        size_bytes: target.size_bytes(),
        generation: 0,
        raising: false,
        source_marked: false,
        target_marked: false,
        source_stamp: Stamp::Running,
        target_stamp: Stamp::Running,
        compare: None,
    }
}

#[test]
fn a_damaged_record_is_not_guessed() {
    let mut world = World::new();
    world.cut_over("a.img", "b.img", true);
    let path = Store::open(&world.config.state_dir).unwrap().path();
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let start = |config: &MountConfig| {
        let (link, _other) = KeeperLink::for_tests().unwrap();
        let start = Start {
            config: config.clone(),
            parked: Vec::new(),
            restarts: 0,
            last_exit: None,
            first: true,
            keeper_pid: 1,
            kept_by_manager: false,
        };
        run::prepare(&Arc::new(link), start).map(|_| ())
    };
    // Not even for the image that no mark speaks against.
    world.config.volumes[0].source = world.at("b.img");
    let error = start(&world.config).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    assert!(error.advice().unwrap().contains("--force"));
    assert_eq!(std::fs::read(&path).unwrap(), bytes, "it is left as it was");
}

#[test]
fn the_target_is_no_source_by_any_name() {
    let world = World::new();
    let disk = volume(world.open("a.img", None).unwrap().image);
    std::os::unix::fs::symlink("a.img", world.at("link.img")).unwrap();
    std::fs::hard_link(world.at("a.img"), world.at("hard.img")).unwrap();
    for name in ["a.img", "link.img", "hard.img"] {
        for existing in [false, true] {
            let options = MirrorOptions { existing, ..MirrorOptions::new("j", world.at(name).display().to_string()) };
            let error = target::check(std::slice::from_ref(&disk), Path::new("/"), &options).map(|_| ()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
            assert!(error.to_string().contains("the source itself"), "{error}");
        }
    }
    let options = MirrorOptions { existing: true, ..MirrorOptions::new("j", world.at("b.img").display().to_string()) };
    target::check(std::slice::from_ref(&disk), Path::new("/"), &options).unwrap();
}
