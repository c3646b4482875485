//! The mount behind the control socket: its volumes, its jobs, its end.

use std::time::Duration;

use super::config::{Layout, MountConfig};
use super::departure::Departure;
use super::heartbeat::Heartbeat;
use super::jobs::{Jobs, has_ended};
use super::ledger::{Ledger, LedgerCommitter};
use super::plan;
use super::unfinished::Unfinished;
use crate::control::backend::{
    Backend, CutoverReport, CutoverRequest, GuestTraffic, Holder, MirrorPlan, MountStatus, SubscriptionId, VolumeStatus,
};
use crate::control::device_names;
use crate::error::{Error, ErrorKind, Result};
use crate::mirror::cutover::{Cutovers, Ending};
use crate::mirror::events::EventHub;
use crate::mirror::job::Job;
use crate::mirror::types::{CancelMode, CopyMode, JobEvent, JobInfo, MirrorOptions, Pace};
use crate::mirror::verify::{self, Verified};
use crate::state::MirrorRecord;
use crate::sync::{Arc, Mutex};
use crate::volume::Volume;

/// One mount.
pub(super) struct Server {
    pub(super) config: MountConfig,
    pub(super) volumes: Vec<Arc<Volume>>,
    devices: Vec<String>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) departure: Departure,
    pub(super) events: Arc<EventHub>,
    pub(super) cutovers: Arc<Cutovers>,
    pub(super) jobs: Arc<Jobs>,
    /// Mirrors that a server before this one did not finish, and that wait for their targets.
    pub(super) unfinished: Mutex<Vec<Arc<Unfinished>>>,
    pub(super) heartbeat: Heartbeat,
    /// One start of a mirror at a time.
    pub(super) starting: Mutex<()>,
}

impl Server {
    pub(super) fn new(
        config: MountConfig,
        volumes: Vec<Arc<Volume>>,
        ledger: Arc<Ledger>,
        departure: Departure,
    ) -> Arc<Self> {
        let devices = device_names(volumes.iter().map(|volume| volume.name()));
        let cutovers = Cutovers::new(Arc::new(LedgerCommitter(ledger.clone())));
        let jobs = Jobs::new(ledger.clone());
        let events = Arc::new(EventHub::default());
        let (starting, unfinished) = (Mutex::new(()), Mutex::default());
        for volume in &volumes {
            let (ledger, weak) = (ledger.clone(), Arc::downgrade(volume));
            volume.on_shown_changed(move || {
                if let Some(volume) = weak.upgrade() {
                    ledger.shown_changed(&volume);
                }
            });
        }
        Arc::new(Server {
            config,
            volumes,
            devices,
            ledger,
            departure,
            events,
            cutovers,
            jobs,
            unfinished,
            heartbeat: Heartbeat::default(),
            starting,
        })
    }

    /// The disks' paths, in mount order.
    pub(super) fn disks(&self) -> Vec<std::path::PathBuf> {
        self.volumes.iter().map(|volume| self.disk(volume)).collect()
    }

    fn disk(&self, volume: &Volume) -> std::path::PathBuf {
        match self.config.layout {
            Layout::Directory => self.config.mountpoint.join(volume.name()),
            Layout::File => self.config.mountpoint.clone(),
        }
    }

    fn volume(&self, device: &str) -> Result<&Arc<Volume>> {
        let found = self.devices.iter().position(|other| other == device);
        let found = found.or_else(|| self.volumes.iter().position(|volume| volume.name() == device));
        found.map(|index| &self.volumes[index]).ok_or_else(|| {
            let text = format!("Cannot find device='{device}' nor node-name='{device}'");
            let names: Vec<_> = self.volumes.iter().map(|volume| volume.name()).collect();
            Error::new(ErrorKind::NotFound, text).advise(format!("the disks of this mount are: {}", names.join(", ")))
        })
    }

    fn job(&self, id: &str) -> Result<Arc<Job>> {
        if let Some(job) = self.jobs.find(id) {
            return Ok(job);
        }
        match self.unfinished_of(id) {
            Some((left, record)) => {
                let info = left.info(&record);
                let why = info.last_error.unwrap_or_else(|| "its target is being opened".to_owned());
                let error = Error::not_now(format!("the mirror of {} waits: {why}", left.volume.name()));
                Err(error.advise("'livemirror resume' tries again, 'livemirror cancel' gives up"))
            }
            None => Err(Error::new(ErrorKind::NotFound, "Job not found")),
        }
    }

    /// Tells a job how to go on, or writes it down for one that waits for its target.
    fn tell(
        &self,
        job_id: &str,
        tell: impl Fn(&Job) -> Result<()>,
        note: impl FnOnce(&mut MirrorRecord),
    ) -> Result<()> {
        let waits = self.unfinished_of(job_id).is_some() && self.jobs.find(job_id).is_none();
        if !waits {
            tell(&*self.job(job_id)?)?;
        }
        let volume = match self.jobs.find(job_id) {
            Some(job) => job.volume().clone(),
            None => match self.unfinished_of(job_id) {
                Some((left, _)) => left.volume.clone(),
                None => return Ok(()),
            },
        };
        if let Err(error) = self.ledger.change_mirror(volume.name(), note) {
            log::warn!("{error}");
        }
        // It may have become a job meanwhile, which looked at the record before: see `resume_job` for one that becomes one after this.
        if let Some(Err(error)) = self.jobs.find(job_id).filter(|_| waits).map(|job| tell(&job)) {
            // It knew.
            log::debug!("{error}");
        }
        Ok(())
    }

    /// The mirror of `volume`, also one that waits for its target.
    pub(super) fn mirror_of(&self, volume: &Volume) -> Option<JobInfo> {
        let waiting = {
            let list = self.unfinished.lock();
            list.iter().find(|left| std::ptr::eq(&*left.volume, volume)).cloned()
        };
        // First: one that goes on is a job before it is no longer waiting, and as a job it is for a moment neither paused nor going on.
        let waiting = waiting.and_then(|left| Some(left.info(&self.ledger.mirror(volume.name())?)));
        waiting.or_else(|| self.jobs.running(volume).map(|job| job.info()))
    }

    fn volume_status(&self, volume: &Arc<Volume>) -> VolumeStatus {
        let (read_bytes, written_bytes) = volume.traffic();
        // Before the record: a mirror that ends is recorded first and gone then, so that who sees it gone sees how it ended.
        let mirror = self.mirror_of(volume);
        let recorded = self.ledger.volume(volume.name());
        let active = volume.active();
        VolumeStatus {
            name: volume.name().to_owned(),
            disk: self.disk(volume).display().to_string(),
            source: recorded.as_ref().map_or_else(String::new, |known| known.source.display().to_string()),
            format: active.format().to_string(),
            active: active.name().to_owned(),
            size_bytes: volume.size_bytes(),
            guest: GuestTraffic { read_bytes, written_bytes },
            mirror,
            last_mirror: recorded.and_then(|known| known.last_mirror),
        }
    }

    /// Makes everything durable that guests wrote.
    pub(super) fn flush_all(&self) {
        for volume in &self.volumes {
            if let Err(error) = volume.flush_unasked() {
                log::error!("{error}");
            }
        }
    }

    fn cut_over(&self, jobs: &[Arc<Job>], request: &CutoverRequest) -> Result<Vec<CutoverReport>> {
        let old: Vec<String> = jobs.iter().map(|job| job.volume().active().name().to_owned()).collect();
        let pause = self.cutovers.attempt(jobs, Ending::Switch, request.max_pause, request.patience)?;
        let reports = jobs.iter().zip(old).map(|(job, superseded)| CutoverReport {
            device: job.volume().name().to_owned(),
            active: job.volume().active().name().to_owned(),
            superseded,
            pause_ms: pause.took_ms,
            predicted_pause_ms: pause.predicted_ms,
        });
        let reports = reports.collect();
        for job in jobs {
            job.wait_ended(None);
        }
        Ok(reports)
    }
}

/// The target's path as the image will be called: one image, one name.
fn with_plain_target(options: MirrorOptions) -> MirrorOptions {
    if crate::image::nbd::uri::is_uri(std::path::Path::new(&options.target)) {
        return options;
    }
    let plain = std::path::absolute(&options.target).ok().and_then(|path| path.into_os_string().into_string().ok());
    MirrorOptions { target: plain.unwrap_or_else(|| options.target.clone()), ..options }
}

impl Backend for Server {
    fn devices(&self) -> Vec<String> {
        self.devices.clone()
    }

    fn status(&self) -> MountStatus {
        let (restarts, last_exit) = self.ledger.restarts();
        let volumes = self.volumes.iter().map(|volume| self.volume_status(volume)).collect();
        self.heartbeat.note();
        MountStatus {
            mountpoint: self.config.mountpoint.display().to_string(),
            server_pid: Some(std::process::id()),
            keeper_pid: Some(self.departure.keeper_pid()),
            control: self.config.control.display().to_string(),
            restarts,
            last_exit,
            volumes,
        }
    }

    fn start_mirror(&self, device: &str, options: MirrorOptions) -> Result<()> {
        let _one = self.starting.lock();
        let options = with_plain_target(options);
        let volume = self.volume(device)?;
        if volume.is_read_only() {
            return Err(Error::usage("a read-only mount cannot be cut over, so it is not mirrored:").on(volume.name()));
        }
        if self.jobs.has(&options.job_id) {
            let text = format!("Job ID '{}' already in use", options.job_id);
            return Err(Error::new(ErrorKind::Exists, text).advise("'livemirror cancel' ends a mirror"));
        }
        if let Some(job) = self.mirror_of(volume) {
            let (name, id, target) = (volume.name(), job.job_id, job.target);
            let text = format!("Need a root block node: {name} is being mirrored by job {id} to {target}");
            let advice = "'livemirror cancel' ends it, 'livemirror mirror --restart' begins anew";
            return Err(Error::new(ErrorKind::Exists, text).advise(advice));
        }
        // Else a guest could change the size between the making of the target and the start of the tracking.
        let _pinned = volume.pin_size();
        self.start_job(volume, &options)
    }

    fn plan_mirror(&self, device: &str, options: MirrorOptions) -> Result<MirrorPlan> {
        plan::plan(self.volume(device)?, &self.volumes, &self.config.state_dir, &options)
    }

    fn jobs(&self) -> Vec<JobInfo> {
        // As in `mirror_of`.
        let waiting = self.unfinished.lock().clone();
        let info = |left: &Arc<Unfinished>| Some(left.info(&self.ledger.mirror(left.volume.name())?));
        let mut infos: Vec<_> = waiting.iter().filter_map(info).collect();
        for job in self.jobs.all() {
            let info = job.info();
            if infos.iter().all(|known| known.job_id != info.job_id) {
                infos.push(info);
            }
        }
        self.heartbeat.note();
        infos
    }

    fn pause(&self, job_id: &str) -> Result<()> {
        self.tell(job_id, Job::pause, |record| record.paused = true)
    }

    fn resume(&self, job_id: &str) -> Result<()> {
        let left = self.unfinished_of(job_id);
        self.tell(job_id, Job::resume, |record| record.paused = false)?;
        if let Some((left, _)) = left {
            left.hurry();
        }
        Ok(())
    }

    fn cancel(&self, job_id: &str, mode: CancelMode, keep_target: bool) -> Result<()> {
        match self.unfinished_of(job_id) {
            Some((left, record)) if self.jobs.find(job_id).is_none() => {
                self.give_up(&left, &record).or_else(|error| match self.jobs.find(job_id) {
                    // It went on meanwhile.
                    Some(job) => job.cancel(mode, keep_target),
                    None => Err(error),
                })
            }
            _ => self.job(job_id)?.cancel(mode, keep_target),
        }
    }

    fn complete(&self, job_id: &str) -> Result<()> {
        self.job(job_id)?.complete()
    }

    fn finalize(&self, job_id: &str) -> Result<()> {
        self.job(job_id)?.finalize()
    }

    fn dismiss(&self, job_id: &str) -> Result<()> {
        self.job(job_id)?.dismiss()
    }

    fn set_speed(&self, job_id: &str, bytes_per_second: u64) -> Result<()> {
        let tell = |job: &Job| job.set_speed(bytes_per_second);
        self.tell(job_id, tell, |record| record.options.speed_bytes_per_second = bytes_per_second)
    }

    fn set_pace(&self, job_id: &str, guest_first: Option<Duration>, finish_by: Option<Duration>) -> Result<()> {
        let change = |pace: &mut Pace| {
            pace.guest_first =
                guest_first.map_or(pace.guest_first, |bound| Some(bound).filter(|bound| !bound.is_zero()));
            pace.finish_by = finish_by.map_or(pace.finish_by, |time| Some(time).filter(|time| !time.is_zero()));
        };
        self.tell(job_id, |job| job.change_pace(change), |record| change(&mut record.options.pace))
    }

    fn set_copy_mode(&self, job_id: &str, mode: CopyMode) -> Result<()> {
        self.tell(job_id, |job| job.set_copy_mode(mode), |record| record.options.copy_mode = mode)
    }

    fn cutover(&self, request: &CutoverRequest) -> Result<Vec<CutoverReport>> {
        let volumes = match request.devices.is_empty() {
            true => self.volumes.clone(),
            false => request.devices.iter().map(|device| self.volume(device).cloned()).collect::<Result<_>>()?,
        };
        for volume in &volumes {
            let waiting = self.unfinished.lock().iter().any(|left| Arc::ptr_eq(&left.volume, volume));
            if waiting && self.jobs.running(volume).is_none() {
                let record = self.ledger.mirror(volume.name());
                self.job(record.as_ref().map_or(volume.name(), |record| &record.options.job_id))?;
            }
        }
        let jobs: Vec<_> = volumes.iter().filter_map(|volume| self.jobs.running(volume)).collect();
        if jobs.is_empty() || (!request.devices.is_empty() && jobs.len() < volumes.len()) {
            let name = volumes.first().map_or("this mount", |volume| volume.name());
            let error = Error::not_now(format!("there is no mirror of {name}"));
            return Err(error.advise("'livemirror mirror DISK TARGET' starts one"));
        }
        self.cut_over(&jobs, request)
    }

    fn verify(&self, device: &str, from: u64) -> Result<Verified> {
        let volume = self.volume(device)?;
        let job = self.jobs.all().into_iter().find(|job| Arc::ptr_eq(job.volume(), volume) && !has_ended(job.status()));
        let job = job.ok_or_else(|| {
            let error = match self.unfinished.lock().iter().any(|left| Arc::ptr_eq(&left.volume, volume)) {
                true => Error::not_now("the mirror waits for its target:"),
                false => Error::new(ErrorKind::NotFound, "there is no mirror of"),
            };
            error.on(volume.name())
        })?;
        verify::step(&job, from)
    }

    fn unmount(&self, abort: bool) -> Result<()> {
        self.departure.unmount(self, abort)
    }

    fn holders(&self) -> Vec<Holder> {
        self.departure.holders(&self.config.mountpoint)
    }

    fn quit(&self) {
        self.departure.ask();
    }

    fn subscribe(&self, listener: Box<dyn Fn(&JobEvent) + Send + Sync>) -> SubscriptionId {
        SubscriptionId(self.events.subscribe(listener))
    }

    fn unsubscribe(&self, id: SubscriptionId) {
        self.events.unsubscribe(id.0);
    }
}
