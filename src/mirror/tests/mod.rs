//! The mirror without a kernel: volumes over memory images, guests as threads, faults at will.

mod converges;
mod cuts_over;
mod ends;
mod meets_errors;
mod meets_every_error;
mod verifies;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use super::cutover::{CommitFailure, Committer, Cutovers, Ending, Pause, PreparedRecord, Switch};
use super::events::EventHub;
use super::job::{Job, JobObserver};
use super::types::{JobEvent, JobStatus, LastMirror, MirrorOptions};
use super::{Setting, start};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::image::memory::MemoryImage;
use crate::sync::{Arc, Mutex};
use crate::volume::{ShownAttributes, Volume, VolumeOptions};

pub(super) const BLOCK: usize = 4096;

/// Remembers what was made durable; refuses or loses its answer when told.
#[derive(Default)]
pub(super) struct TestCommitter {
    pub(super) committed: Mutex<Vec<String>>,
    pub(super) superseded: Mutex<Vec<String>>,
    /// The next commits are undecided; so many attempts to settle fail.
    pub(super) undecided: AtomicU64,
    pub(super) taken_back: AtomicBool,
    /// The next commit finds that another record was written meanwhile.
    pub(super) outdated: AtomicBool,
    /// Done once, when a record has been written aside and guests are about to be held.
    pub(super) when_prepared: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

struct TestRecord(Arc<TestCommitter>, Vec<String>);

impl PreparedRecord for TestRecord {
    fn commit(self: Box<Self>) -> Result<(), CommitFailure> {
        if self.0.outdated.swap(false, SeqCst) {
            return Err(CommitFailure::NotDone(Error::not_now("another record came first")));
        }
        if self.0.undecided.load(SeqCst) > 0 {
            return Err(CommitFailure::Undecided(Error::new(ErrorKind::Failed, "cannot rename")));
        }
        *self.0.committed.lock() = self.1;
        Ok(())
    }
}

pub(super) struct SharedCommitter(pub(super) Arc<TestCommitter>);

impl Committer for SharedCommitter {
    fn prepare(&self, switches: &[Switch], ending: Ending) -> Result<Box<dyn PreparedRecord>> {
        let switches = if ending == Ending::Switch { switches } else { &[] };
        let names = switches.iter().map(|switch| switch.new.name().to_owned()).collect();
        if let Some(action) = self.0.when_prepared.lock().take() {
            action();
        }
        Ok(Box::new(TestRecord(self.0.clone(), names)))
    }
    fn supersede(&self, switches: &[Switch]) {
        self.0.superseded.lock().extend(switches.iter().map(|switch| switch.old.name().to_owned()));
    }
    fn settle(&self, switches: &[Switch], made: bool) -> Result<()> {
        if self.0.undecided.fetch_sub(1, SeqCst) > 1 {
            return Err(Error::new(ErrorKind::Failed, "still no disk for the state"));
        }
        self.0.taken_back.store(!made, SeqCst);
        if made {
            *self.0.committed.lock() = switches.iter().map(|switch| switch.new.name().to_owned()).collect();
        }
        Ok(())
    }
    fn switched(&self, _switches: &[Switch]) {}
}

/// Remembers whether changes were still tracked when the images were unpaired.
#[derive(Default)]
pub(super) struct Watch {
    pub(super) tracked_when_unpaired: Mutex<Vec<bool>>,
}

impl JobObserver for Watch {
    fn unpairing(&self, job: &Job) {
        self.tracked_when_unpaired.lock().push(job.volume().tracking().is_some());
    }
    fn ended(&self, _job: &Job, _outcome: &LastMirror) {}
    fn gone(&self, _job: &Job) {}
}

/// Everything that a job needs, and a record of what it said.
pub(super) struct World {
    pub(super) events: Arc<EventHub>,
    pub(super) heard: Arc<Mutex<Vec<JobEvent>>>,
    pub(super) committer: Arc<TestCommitter>,
    pub(super) cutovers: Arc<Cutovers>,
    pub(super) observer: Arc<Watch>,
}

impl World {
    pub(super) fn new() -> Self {
        let events = Arc::new(EventHub::default());
        let heard: Arc<Mutex<Vec<JobEvent>>> = Arc::default();
        let record = heard.clone();
        events.subscribe(Box::new(move |event| record.lock().push(event.clone())));
        let committer = Arc::new(TestCommitter::default());
        let cutovers = Cutovers::new(Arc::new(SharedCommitter(committer.clone())));
        World { events, heard, committer, cutovers, observer: Arc::default() }
    }

    pub(super) fn mirror(&self, volume: &Arc<Volume>, target: Arc<dyn Image>, options: MirrorOptions) -> Arc<Job> {
        self.mirror_onto(volume, target, true, options)
    }

    pub(super) fn mirror_onto(
        &self,
        volume: &Arc<Volume>,
        target: Arc<dyn Image>,
        created_target: bool,
        options: MirrorOptions,
    ) -> Arc<Job> {
        let setting = Setting {
            volume: volume.clone(),
            target,
            created_target,
            layers: 0,
            intent: None,
            resumed: None,
            events: self.events.clone(),
            cutovers: self.cutovers.clone(),
            observer: self.observer.clone(),
        };
        start(options, setting, |_| ()).unwrap()
    }

    /// The states that job `id` went through, in order.
    pub(super) fn states(&self, id: &str) -> Vec<JobStatus> {
        let states = self.heard.lock();
        let states = states.iter().filter_map(|event| match event {
            JobEvent::StatusChange { job_id, status } if job_id == id => Some(*status),
            _ => None,
        });
        states.collect()
    }

    /// Cuts over, trying as long as it takes.
    pub(super) fn cut_over(&self, jobs: &[Arc<Job>]) -> f64 {
        self.end(jobs, Ending::Switch)
    }

    pub(super) fn end(&self, jobs: &[Arc<Job>], ending: Ending) -> f64 {
        loop {
            match self.cutovers.attempt(jobs, ending, Duration::from_secs(5), Duration::from_millis(200)) {
                Ok(pause) => return pause.took_ms,
                Err(error) => assert_eq!(error.kind(), ErrorKind::NotNow, "{error}"),
            }
        }
    }
}

pub(super) fn volume(name: &str, image: Arc<dyn Image>) -> Arc<Volume> {
    let options = VolumeOptions {
        name: name.to_owned(),
        id: format!("{name}-id"),
        read_only: false,
        growable: false,
        shown: ShownAttributes::default(),
    };
    Arc::new(Volume::new(options, image))
}

pub(super) fn disk(mib: u64) -> Arc<MemoryImage> {
    MemoryImage::new("source", mib << 20)
}

/// Waits for a condition of the world, however long the machine takes.
pub(super) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(120), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub(super) fn read_all(image: &dyn Image) -> Vec<u8> {
    let mut bytes = vec![0; image.size_bytes() as usize];
    image.read_at(0, &mut bytes).unwrap();
    bytes
}

/// A guest that overwrites its own blocks of a volume with rising numbers, each acknowledged number remembered.
pub(super) struct Guest {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Vec<u64>>,
    pub(super) writes: Arc<AtomicU64>,
}

impl Guest {
    /// Writes blocks `first..first + count`, in an order that jumps.
    pub(super) fn start(volume: &Arc<Volume>, first: u64, count: u64) -> Guest {
        let (volume, stop, writes) = (volume.clone(), Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (stop.clone(), writes.clone());
        let thread = std::thread::spawn(move || {
            let mut acknowledged = vec![0; count as usize];
            let mut sequence = 0u64;
            while !stopped.load(SeqCst) {
                sequence += 1;
                let block = sequence.wrapping_mul(0x9E37_79B9_7F4A_7C15) % count;
                let bytes = block_bytes(first + block, sequence);
                assert_eq!(volume.write((first + block) * BLOCK as u64, &bytes, false).unwrap(), BLOCK);
                acknowledged[block as usize] = sequence;
                counted.fetch_add(1, SeqCst);
            }
            acknowledged
        });
        Guest { stop, thread, writes }
    }

    /// Ends the guest; returns the last acknowledged number of each block (0: never written).
    pub(super) fn stop(self) -> Vec<u64> {
        self.stop.store(true, SeqCst);
        self.thread.join().unwrap()
    }
}

pub(super) fn block_bytes(block: u64, sequence: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    for (word, chunk) in bytes.chunks_mut(16).enumerate() {
        chunk[..8].copy_from_slice(&(block ^ (word as u64) << 40).to_le_bytes());
        chunk[8..].copy_from_slice(&sequence.to_le_bytes());
    }
    bytes
}

/// Asserts that `image` holds exactly the acknowledged writes of a guest of blocks `first..`.
pub(super) fn assert_holds(image: &dyn Image, first: u64, acknowledged: &[u64]) {
    let mut bytes = vec![0; BLOCK];
    for (block, sequence) in acknowledged.iter().enumerate() {
        if *sequence > 0 {
            let block = first + block as u64;
            image.read_at(block * BLOCK as u64, &mut bytes).unwrap();
            assert!(bytes == block_bytes(block, *sequence), "block {block} is not at write {sequence}");
        }
    }
}
