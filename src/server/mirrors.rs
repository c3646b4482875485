//! The mirrors of a mount: started, resumed, suspended.

use std::os::fd::OwnedFd;

use super::backend::Server;
use super::departure::JOB_PATIENCE;
use super::heartbeat;
use super::jobs::has_ended;
use super::opening::locked_descriptor;
use super::pairing::Untie;
use super::scope;
use super::target;
use super::unfinished::Unfinished;
use crate::dirty::IntentLog;
use crate::dirty::intent::{JobId, Settings};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::mirror::job::Job;
use crate::mirror::types::{CancelMode, JobStatus, LastMirror, MirrorOptions, MirrorResult, SyncMode};
use crate::mirror::{self, Resumed, Setting, default_granularity};
use crate::state::{MirrorRecord, Stamp, random_id};
use crate::sync::{Arc, Instant, SystemTime, thread};
use crate::volume::Volume;

impl Server {
    /// Starts the mirror of `volume` from the beginning.
    pub(super) fn start_job(&self, volume: &Arc<Volume>, options: &MirrorOptions) -> Result<()> {
        let (options, above_base) = scope::find(&*volume.active(), options.clone())?;
        let target = target::prepare(volume, &self.volumes, &options, above_base, &self.config)?;
        self.ledger.tell_apart(&*target.image, &*volume.active());
        let granularity = options.granularity.unwrap_or_else(|| default_granularity(&*target.image));
        // What it is now it stays, whatever a guest writes onto its disk.
        let format = Some(target.image.format());
        let options = MirrorOptions { granularity: Some(granularity), format, ..options };
        self.ledger.parking.park(&*target.image);
        let started = self.pair(volume, &target, &options).and_then(|intent| {
            let setting = self.setting(volume, &target, above_base, intent, None);
            self.run_job(options.clone(), setting).map(drop)
        });
        started.inspect_err(|_| {
            self.ledger.unpair(volume, Some(&*target.image));
            self.ledger.mirror_did_not_start(volume.name());
            self.ledger.parking.unpark(target.image.name());
            target::discard(&target);
        })
    }

    /// Makes the mirror one that can be resumed: its log, its record, its marks. `None`: it can do without.
    fn pair(
        &self,
        volume: &Arc<Volume>,
        target: &target::Target,
        options: &MirrorOptions,
    ) -> Result<Option<Arc<IntentLog>>> {
        let (job, size_bytes) = (random_id()?, volume.size_bytes());
        if let Some(descriptor) = locked_descriptor(&*target.image) {
            self.ledger.marks.ensure_id(descriptor)?;
        }
        let untie = Untie::new(&self.ledger, volume);
        untie.know(&target.image);
        let settings = Settings::new(options.max_guest_delay, untie);
        let id = JobId::from_hex(&job).ok_or_else(|| Error::new(ErrorKind::Corrupt, "no id for a job"))?;
        let path = self.ledger.store.intent_log(&job);
        let created = match options.sync {
            SyncMode::None => IntentLog::create_unmarked(&path, id, size_bytes, settings),
            SyncMode::Full | SyncMode::Top => IntentLog::create(&path, id, size_bytes, settings),
        };
        let intent = match created {
            Ok(intent) => intent,
            Err(error) => {
                // Costs the ability to resume, nothing else. (Where the record cannot be written either, no mirror starts.)
                log::error!("{error}; the mirror cannot be resumed after a restart");
                self.ledger.mirror_starts(volume.name(), &options.target)?;
                return Ok(None);
            }
        };
        let record = MirrorRecord {
            job,
            options: options.clone(),
            paused: false,
            created_target: target.created,
            target_identity: target.image.identity()?,
            size_bytes,
            generation: 0,
            raising: false,
            source_marked: false,
            target_marked: false,
            source_stamp: Stamp::Running,
            target_stamp: Stamp::Running,
            compare: None,
        };
        self.ledger.pair(volume, &*target.image, record)?;
        Ok(Some(Arc::new(intent)))
    }

    /// Sees to it that guests' changes are marked in the logs of unfinished mirrors, before the first guest comes.
    pub(super) fn find_unfinished(&self, targets: Vec<Option<OwnedFd>>, first: bool) {
        let pulse = self.ledger.store.pulse().unwrap_or_default();
        for (volume, parked) in self.volumes.iter().zip(targets) {
            let counts = pulse.volumes.get(volume.name()).copied().unwrap_or_default();
            if !first {
                volume.go_on_counting(counts.read, counts.written);
            }
            let Some(record) = self.ledger.mirror(volume.name()) else { continue };
            match Unfinished::find(&self.ledger, volume, &record, parked, counts) {
                Ok(left) => self.unfinished.lock().push(left),
                Err(error) => {
                    log::error!("{error}; the mirror of {} cannot go on", volume.name());
                    self.ledger.unpair(volume, None);
                    self.ledger.parking.unpark(&record.options.target);
                    self.ledger.mirror_is_lost(volume.name(), Some(&error));
                }
            }
        }
        self.ledger.remove_old_logs();
    }

    /// Goes on with unfinished mirrors, each when its target is there; and the pulse begins.
    ///
    /// # Errors
    /// There can be no thread.
    pub(super) fn go_on(self: &Arc<Self>) -> Result<()> {
        let failed = |error: std::io::Error| Error::io("cannot start a thread", &error);
        let server = self.clone();
        for volume in &self.volumes {
            let server = Arc::downgrade(self);
            volume.on_change(move || {
                if let Some(server) = server.upgrade() {
                    server.heartbeat.wake();
                }
            });
        }
        let beat = move || server.heartbeat.run(&server);
        thread::Builder::new().name("pulse".into()).spawn(beat).map_err(failed)?;
        for left in self.unfinished.lock().clone() {
            let server = self.clone();
            let run = move || left.run(&server);
            thread::Builder::new().name("resume".into()).spawn(run).map_err(failed)?;
        }
        Ok(())
    }

    /// Goes on with an unfinished mirror whose target has been opened and checked.
    pub(super) fn resume_job(
        &self,
        left: &Unfinished,
        target: Arc<dyn Image>,
        above_base: u32,
        record: &MirrorRecord,
    ) -> Result<()> {
        let marked = left.intent().marked_bytes();
        let target = target::Target { image: target, created: record.created_target };
        let resumed = left.resumed(record);
        let setting = self.setting(&left.volume, &target, above_base, Some(left.intent().clone()), Some(resumed));
        let job = self.run_job(record.options.clone(), setting)?;
        if let Some(now) = self.ledger.mirror(left.volume.name()) {
            take_wishes(&job, record, &now);
        }
        let how = if record.compare.is_some() { "compared" } else { "copied again" };
        log::info!("job {}: goes on to {}; {marked} bytes are {how}", record.options.job_id, record.options.target);
        Ok(())
    }

    fn setting(
        &self,
        volume: &Arc<Volume>,
        target: &target::Target,
        above_base: u32,
        intent: Option<Arc<IntentLog>>,
        resumed: Option<Resumed>,
    ) -> Setting {
        Setting {
            volume: volume.clone(),
            target: target.image.clone(),
            created_target: target.created,
            layers: above_base,
            intent,
            resumed,
            events: self.events.clone(),
            cutovers: self.cutovers.clone(),
            observer: self.jobs.clone(),
        }
    }

    fn run_job(&self, options: MirrorOptions, setting: Setting) -> Result<Arc<Job>> {
        let job = mirror::start(options, setting, |job: &Arc<Job>| self.jobs.add(job.clone()))?;
        // The marks of both images were written just now: a death right after this is dated after them.
        if let Err(error) = self.ledger.store.beat(&heartbeat::pulse(self)) {
            log::debug!("{error}");
        }
        self.heartbeat.wake();
        Ok(job)
    }

    /// The unfinished mirror that has the id of a job, while its target is not there.
    pub(super) fn unfinished_of(&self, id: &str) -> Option<(Arc<Unfinished>, MirrorRecord)> {
        let list = self.unfinished.lock().clone();
        list.into_iter().find_map(|left| {
            let record = self.ledger.mirror(left.volume.name())?;
            (record.options.job_id == id).then_some((left, record))
        })
    }

    /// It goes on as a job, or was given up.
    pub(super) fn forget_unfinished(&self, left: &Unfinished) {
        self.unfinished.lock().retain(|other| !std::ptr::eq(&**other, left));
    }

    /// Gives an unfinished mirror up.
    pub(super) fn give_up(&self, left: &Unfinished, record: &MirrorRecord) -> Result<()> {
        left.give_up(self)?;
        self.forget_unfinished(left);
        self.ledger.parking.unpark(&record.options.target);
        let outcome = LastMirror {
            target: record.options.target.clone(),
            result: MirrorResult::Cancelled,
            consistent: false,
            error: None,
            pause_ms: None,
            predicted_pause_ms: None,
            ended: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        };
        self.ledger.mirror_ended(left.volume.name(), &outcome);
        Ok(())
    }

    /// Leaves every mirror for the next mount to go on with. Guests are gone.
    pub(super) fn suspend_jobs(&self) {
        for left in self.unfinished.lock().clone() {
            left.leave();
            self.ledger.leave(&left.volume, None, JOB_PATIENCE);
        }
        for job in self.jobs.all().iter().filter(|job| !has_ended(job.status())) {
            let deadline = Instant::now() + JOB_PATIENCE;
            let target = job.target_image();
            if self.ledger.mirror(job.volume().name()).is_none() {
                self.end_job(job, deadline);
                continue;
            }
            log::info!("job {}: suspended with the mount, the next one goes on with it", job.id());
            job.suspend();
            // A target that does not answer any more is left as after a crash.
            let answers = job.wait_ended(Some(deadline)) && !job.left_requests();
            if !answers {
                log::warn!("job {}: left as after a crash, as its target does not answer", job.id());
            }
            self.ledger.leave(job.volume(), target.filter(|_| answers), JOB_PATIENCE);
        }
    }

    /// Ends a mirror that cannot be resumed: one that is ready leaves a consistent copy, another one is given up.
    fn end_job(&self, job: &Job, deadline: Instant) {
        // What was a copy once is kept, also where a pause keeps it from being brought up to date.
        let keep = job.info().ready;
        let mode = if job.status() == JobStatus::Ready { CancelMode::Soft } else { CancelMode::Force };
        log::info!("job {}: ends with the mount", job.id());
        if job.cancel(mode, keep).is_ok() && !job.wait_ended(Some(deadline)) {
            // A ready job whose target does not answer any more.
            let _ = job.cancel(CancelMode::Force, true);
        }
    }
}

/// What users told a mirror between the look at its record with which the job was made, and the job: those who came then saw none.
fn take_wishes(job: &Job, before: &MirrorRecord, now: &MirrorRecord) {
    let (was, is) = (&before.options, &now.options);
    let told = [
        (now.paused && !before.paused).then(|| job.pause()),
        (before.paused && !now.paused).then(|| job.resume()),
        (is.speed_bytes_per_second != was.speed_bytes_per_second).then(|| job.set_speed(is.speed_bytes_per_second)),
        (is.pace != was.pace).then(|| job.change_pace(|pace| *pace = is.pace.clone())),
        (is.copy_mode != was.copy_mode).then(|| job.set_copy_mode(is.copy_mode)),
    ];
    for error in told.into_iter().flatten().filter_map(Result::err) {
        // Whoever told it told the job too.
        log::debug!("{error}");
    }
}
