//! The simulated machine: its disks, its state directory, and what is known of both. One for each seed.
//!
//! It is a plain value that one task at a time looks at, so that each look and each change is one instant. Nothing here lets another
//! task go on.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::OnceLock;

use super::checks;
use super::dice::Dice;
use super::disk::{Disk, Flight, Tag};
use super::files::Files;
use super::guest::Request;
use super::oracle::Oracle;
use super::schedule;
use crate::server::simulated::Life;
use crate::state::MountState;
use crate::sync::{Arc, SystemTime};

pub(super) const STATE_DIRECTORY: &str = "/simulated/state";
/// As many images as a seed may have.
const DISKS_MAX: usize = 24;

/// See the module.
pub(super) struct Host {
    pub(super) dice: Dice,
    pub(super) disks: Vec<Disk>,
    pub(super) files: Files,
    /// By volume, in mount order.
    pub(super) oracles: Vec<Oracle>,
    /// Records by file: what is written once never changes.
    records: BTreeMap<usize, Option<Rc<MountState>>>,
    /// The server that lives.
    pub(super) life: Option<Arc<Life>>,
    /// Tasks that are guests.
    pub(super) guests: BTreeSet<usize>,
    /// What each guest has asked for and has not been answered.
    pub(super) asked: Vec<Option<Request>>,
    pub(super) guests_stop: bool,
    /// Guests that have stopped.
    pub(super) guests_gone: usize,
    /// Jobs whose images somebody else has changed since, and nobody has noticed yet.
    pub(super) foreign: BTreeSet<String>,
    /// By volume: a flush of the source has failed that was no guest's own, and no guest has heard of it.
    pub(super) unheard: Vec<bool>,
    /// Jobs that have been ready, so that all of both images was compared or copied once.
    pub(super) ready: BTreeSet<String>,
    pub(super) tags: Tag,
    flights: u64,
    /// What fails is told as it happens.
    pub(super) tells: bool,
    /// How often each thing happened, for the test of the simulation itself.
    pub(super) counts: BTreeMap<&'static str, u64>,
}

thread_local!(static HOST: RefCell<Option<Host>> = const { RefCell::new(None) });

/// A look at the machine, or a change of it.
pub(super) fn host<T>(look: impl FnOnce(&mut Host) -> T) -> T {
    HOST.with(|host| look(host.borrow_mut().as_mut().expect("a simulation runs")))
}

/// Begins with a new machine, or ends.
pub(super) fn replace_host(host: Option<Host>) -> Option<Host> {
    HOST.with(|place| place.replace(host))
}

/// Descriptors that stand for disks: opened once, since what a cut-off life has is never closed.
fn descriptors() -> &'static [File] {
    static OPENED: OnceLock<Vec<File>> = OnceLock::new();
    OPENED.get_or_init(|| (0..DISKS_MAX).map(|_| File::open("/dev/null").expect("a descriptor")).collect())
}

pub(super) fn descriptor(disk: usize) -> BorrowedFd<'static> {
    descriptors()[disk].as_fd()
}

pub(super) fn disk_of(image: BorrowedFd<'_>) -> usize {
    let number = image.as_raw_fd();
    descriptors().iter().position(|file| file.as_raw_fd() == number).expect("the descriptor of a simulated disk")
}

impl Host {
    pub(super) fn new(seed: u64, volumes: usize, guests: usize, tells: bool) -> Host {
        Host {
            dice: Dice::new(seed),
            disks: Vec::new(),
            files: Files::default(),
            oracles: (0..volumes).map(|_| Oracle::default()).collect(),
            records: BTreeMap::new(),
            life: None,
            guests: BTreeSet::new(),
            asked: vec![None; guests],
            guests_stop: false,
            guests_gone: 0,
            foreign: BTreeSet::new(),
            ready: BTreeSet::new(),
            unheard: vec![false; volumes],
            tags: 0x100,
            flights: 0,
            tells,
            counts: BTreeMap::new(),
        }
    }

    /// Something happened: goes into the trace.
    pub(super) fn note(&mut self, what: &str) {
        let hash = what
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        schedule::trace(hash);
        if self.tells {
            eprintln!("{:>7} life {} {what}", schedule::steps(), schedule::life());
        }
    }

    pub(super) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// The wall clock, in nanoseconds since the epoch.
    pub(super) fn wall_ns(&self) -> i64 {
        let since = SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
    }

    pub(super) fn find_disk(&self, name: &str) -> Option<usize> {
        self.disks.iter().rposition(|disk| disk.name == name)
    }

    /// A new image; one that had this name has none any more.
    pub(super) fn create_disk(&mut self, name: &str, size_bytes: u64) -> usize {
        if let Some(old) = self.find_disk(name) {
            self.disks[old].name.push_str(" (removed)");
        }
        assert!(self.disks.len() < DISKS_MAX, "too many images for one seed");
        let (number, now, thin) = (1000 + self.disks.len() as u64, self.wall_ns(), self.dice.percent(75));
        self.disks.push(Disk::new(name.to_owned(), size_bytes, number, now, thin));
        self.disks.len() - 1
    }

    pub(super) fn new_tag(&mut self) -> Tag {
        self.tags += 1;
        self.tags
    }

    /// A write begins.
    pub(super) fn take_off(&mut self, disk: usize, life: u32, first: u64, tags: Vec<Tag>) -> u64 {
        self.flights += 1;
        self.note(&format!("disk {disk}: write {:x?} at {first}, {} sectors", tags.first(), tags.len()));
        let number = self.flights;
        self.disks[disk].flights.push(Flight { number, life, first, done: 0, tags });
        number
    }

    /// The first `part` sectors of a write reach the cache; of one that fails some of them.
    pub(super) fn touch_down(&mut self, disk: usize, number: u64, part: u64, fails: bool) {
        let now = self.wall_ns();
        let disk = &mut self.disks[disk];
        let Some(at) = disk.flights.iter().position(|flight| flight.number == number) else { return };
        let flight = &mut disk.flights[at];
        let first = flight.first + flight.done;
        let landed: Vec<Tag> = flight.tags.drain(..(part - flight.done) as usize).collect();
        flight.done = part;
        for (at, tag) in (first..).zip(landed) {
            if !fails || self.dice.percent(50) {
                disk.write(at, tag);
            }
        }
        disk.changed_ns = now;
        self.check_now();
    }

    /// A write has returned.
    pub(super) fn land_at_last(&mut self, disk: usize, number: u64) {
        self.disks[disk].flights.retain(|flight| flight.number != number);
    }

    /// What a dead server had under way on that disk ends.
    pub(super) fn land_all(&mut self, disk: usize) {
        while !self.disks[disk].flights.is_empty() {
            self.count("landed late");
            self.note(&format!("disk {disk}: a write of a dead server lands"));
            let now = self.wall_ns();
            self.disks[disk].changed_ns = now;
            self.disks[disk].land(0, &mut self.dice);
        }
    }

    pub(super) fn end_flush(&mut self, disk: usize, begun: &[(u64, u64)], succeeded: bool) {
        self.note(&format!("disk {disk}: flushed: {succeeded}"));
        self.disks[disk].end_flush(begun, succeeded);
        if !succeeded {
            self.count("failed flush");
            self.disks[disk].faults.lost = false;
            // A guest's own flush: it hears of it, and nothing that was not durable is promised any more.
            if let Some(volume) = self.volume_on(disk) {
                match self.guests.contains(&usize::from(shuttle::thread::current().id())) {
                    true => self.oracles[volume].end_flush(0, false),
                    false => self.unheard[volume] = true,
                }
            }
        }
        self.check_now();
    }

    /// The target's own cache is gone.
    pub(super) fn lose_connection(&mut self, disk: usize) {
        self.note(&format!("disk {disk}: the connection is lost"));
        self.count("lost connection");
        self.disks[disk].losses += 1;
        self.disks[disk].cut(&mut self.dice);
        self.check_now();
    }

    /// The volume that lives on that disk.
    fn volume_on(&self, disk: usize) -> Option<usize> {
        let record = self.record()?;
        record.volumes.iter().position(|volume| volume.active == self.disks[disk].name)
    }

    pub(super) fn record_path() -> PathBuf {
        Path::new(STATE_DIRECTORY).join(crate::state::store::FILE_NAME)
    }

    /// True if some record that may be found calls that disk the active one.
    pub(super) fn may_be_active(&self, disk: usize) -> bool {
        let name = &self.disks[disk].name;
        let names = |record: &Rc<MountState>| record.volumes.iter().any(|volume| volume.active == *name);
        self.records(true).iter().flatten().any(names)
    }

    /// The record that a server would read now.
    pub(super) fn record(&self) -> Option<Rc<MountState>> {
        self.files.find(&Self::record_path()).and_then(|file| self.records.get(&file).cloned().flatten())
    }

    /// Every record that a power cut may leave, or the one that is there; `None`: none.
    pub(super) fn records(&self, power_cut: bool) -> Vec<Option<Rc<MountState>>> {
        let files = self.files.candidates(&Self::record_path(), power_cut);
        files.into_iter().map(|file| file.and_then(|file| self.records.get(&file).cloned().flatten())).collect()
    }

    /// True if the record in that file has a disk on another image than the one that is there.
    pub(super) fn makes_cutover(&self, file: usize) -> bool {
        let (Some(now), Ok(next)) = (self.record(), crate::state::store::decode(&self.files.read(file))) else {
            return false;
        };
        now.volumes.iter().any(|volume| next.volume(&volume.name).is_some_and(|next| next.active != volume.active))
    }

    /// A file gets the name of the record.
    pub(super) fn place_record(&mut self, file: usize) {
        let decoded = crate::state::store::decode(&self.files.read(file)).ok().map(Rc::new);
        self.records.insert(file, decoded.clone());
        if let Some(new) = decoded {
            checks::commit(self, self.record().as_deref(), &new);
        }
        self.files.name(&Self::record_path(), Some(file));
        self.check_now();
    }

    /// Now and then, and after what matters: what if the power were cut, or the server killed, at this instant?
    pub(super) fn check_now(&mut self) {
        if self.dice.below(4) == 0 {
            self.count("instants checked");
            let power_cut = self.dice.percent(75);
            checks::recovery(self, power_cut);
        }
    }
}
