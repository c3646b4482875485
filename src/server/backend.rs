//! The mount behind the control socket: its volumes, its jobs, its end.

use std::time::Instant;

use super::config::{Layout, MountConfig};
use super::departure::Departure;
use super::jobs::{Jobs, has_ended};
use super::ledger::{Ledger, LedgerCommitter};
use super::{plan, target};
use crate::control::backend::{
    Backend, CutoverReport, CutoverRequest, GuestTraffic, Holder, MirrorPlan, MountStatus, SubscriptionId, VolumeStatus,
};
use crate::control::device_names;
use crate::error::{Error, ErrorKind, Result};
use crate::mirror::cutover::{Cutovers, Ending};
use crate::mirror::events::EventHub;
use crate::mirror::job::Job;
use crate::mirror::types::{CancelMode, CopyMode, JobEvent, JobInfo, JobStatus, MirrorOptions};
use crate::mirror::{self, Setting};
use crate::sync::{Arc, Mutex};
use crate::volume::Volume;

/// One mount.
pub(super) struct Server {
    pub(super) config: MountConfig,
    pub(super) volumes: Vec<Arc<Volume>>,
    devices: Vec<String>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) departure: Departure,
    keeper_pid: u32,
    events: Arc<EventHub>,
    cutovers: Arc<Cutovers>,
    jobs: Arc<Jobs>,
    /// One start of a mirror at a time.
    starting: Mutex<()>,
}

impl Server {
    pub(super) fn new(
        config: MountConfig,
        volumes: Vec<Arc<Volume>>,
        ledger: Arc<Ledger>,
        departure: Departure,
        keeper_pid: u32,
    ) -> Arc<Self> {
        let devices = device_names(volumes.iter().map(|volume| volume.name()));
        let cutovers = Cutovers::new(Arc::new(LedgerCommitter(ledger.clone())));
        let jobs = Jobs::new(ledger.clone());
        let events = Arc::new(EventHub::default());
        let starting = Mutex::new(());
        for volume in &volumes {
            let (ledger, weak) = (ledger.clone(), Arc::downgrade(volume));
            volume.on_shown_changed(move || {
                if let Some(volume) = weak.upgrade() {
                    ledger.shown_changed(&volume);
                }
            });
        }
        Arc::new(Server { config, volumes, devices, ledger, departure, keeper_pid, events, cutovers, jobs, starting })
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
        self.jobs.find(id).ok_or_else(|| Error::new(ErrorKind::NotFound, "Job not found"))
    }

    fn volume_status(&self, volume: &Arc<Volume>) -> VolumeStatus {
        let (read_bytes, written_bytes) = volume.traffic();
        // Before the record: a mirror that ends is recorded first and gone then, so that who sees it gone sees how it ended.
        let mirror = self.jobs.running(volume).map(|job| job.info());
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

    /// Ends every mirror because the mount ends: one that is ready leaves a consistent copy, others are given up.
    pub(super) fn end_jobs(&self) {
        let jobs = self.jobs.all();
        for job in jobs.iter().filter(|job| !has_ended(job.status())) {
            // What was a copy once is kept, also where a pause keeps it from being brought up to date.
            let keep = job.info().ready;
            let mode = if job.status() == JobStatus::Ready { CancelMode::Soft } else { CancelMode::Force };
            log::info!("job {}: ends with the mount", job.id());
            if job.cancel(mode, keep).is_ok() && !job.wait_ended(Some(Instant::now() + super::departure::JOB_PATIENCE))
            {
                // A ready job whose target does not answer any more.
                let _ = job.cancel(CancelMode::Force, true);
            }
        }
    }

    /// Makes everything durable that guests wrote.
    pub(super) fn flush_all(&self) {
        for volume in &self.volumes {
            if let Err(error) = volume.flush() {
                log::error!("{error}");
            }
        }
    }

    fn start_job(&self, volume: &Arc<Volume>, options: &MirrorOptions) -> Result<()> {
        let target = target::prepare(volume, &self.volumes, options, &self.config)?;
        self.ledger.tell_apart(&*target.image, &*volume.active());
        let setting = Setting {
            volume: volume.clone(),
            target: target.image.clone(),
            created_target: target.created,
            events: self.events.clone(),
            cutovers: self.cutovers.clone(),
            observer: self.jobs.clone(),
        };
        let registered = |job: &Arc<Job>| self.jobs.add(job.clone());
        let recorded = self.ledger.mirror_starts(volume.name(), &options.target);
        match recorded.and_then(|()| mirror::start(options.clone(), setting, registered)) {
            Ok(_) => Ok(()),
            Err(error) => {
                self.ledger.mirror_did_not_start(volume.name());
                target::discard(&target);
                Err(error)
            }
        }
    }

    fn cut_over(&self, jobs: &[Arc<Job>], request: &CutoverRequest) -> Result<Vec<CutoverReport>> {
        let old: Vec<String> = jobs.iter().map(|job| job.volume().active().name().to_owned()).collect();
        let pause_ms = self.cutovers.attempt(jobs, Ending::Switch, request.max_pause, request.patience)?;
        let reports = jobs.iter().zip(old).map(|(job, superseded)| CutoverReport {
            device: job.volume().name().to_owned(),
            active: job.volume().active().name().to_owned(),
            superseded,
            pause_ms,
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
    let plain = std::path::absolute(&options.target).ok().and_then(|path| path.into_os_string().into_string().ok());
    MirrorOptions { target: plain.unwrap_or_else(|| options.target.clone()), ..options }
}

impl Backend for Server {
    fn devices(&self) -> Vec<String> {
        self.devices.clone()
    }

    fn status(&self) -> MountStatus {
        let (restarts, last_exit) = self.ledger.restarts();
        MountStatus {
            mountpoint: self.config.mountpoint.display().to_string(),
            server_pid: Some(std::process::id()),
            keeper_pid: Some(self.keeper_pid),
            control: self.config.control.display().to_string(),
            restarts,
            last_exit,
            volumes: self.volumes.iter().map(|volume| self.volume_status(volume)).collect(),
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
        if let Some(job) = self.jobs.running(volume) {
            let text = format!("Need a root block node: {} is being mirrored by job {}", volume.name(), job.id());
            return Err(Error::new(ErrorKind::Exists, text).advise("'livemirror cancel' ends it"));
        }
        // Else a guest could change the size between the making of the target and the start of the tracking.
        let _pinned = volume.pin_size();
        self.start_job(volume, &options)
    }

    fn plan_mirror(&self, device: &str, options: MirrorOptions) -> Result<MirrorPlan> {
        plan::plan(self.volume(device)?, &self.volumes, &self.config.state_dir, &options)
    }

    fn jobs(&self) -> Vec<JobInfo> {
        let jobs = self.jobs.all();
        jobs.iter().map(|job| job.info()).collect()
    }

    fn pause(&self, job_id: &str) -> Result<()> {
        self.job(job_id)?.pause()
    }

    fn resume(&self, job_id: &str) -> Result<()> {
        self.job(job_id)?.resume()
    }

    fn cancel(&self, job_id: &str, mode: CancelMode, keep_target: bool) -> Result<()> {
        self.job(job_id)?.cancel(mode, keep_target)
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
        self.job(job_id)?.set_speed(bytes_per_second)
    }

    fn set_copy_mode(&self, job_id: &str, mode: CopyMode) -> Result<()> {
        self.job(job_id)?.set_copy_mode(mode)
    }

    fn cutover(&self, request: &CutoverRequest) -> Result<Vec<CutoverReport>> {
        let volumes = match request.devices.is_empty() {
            true => self.volumes.clone(),
            false => request.devices.iter().map(|device| self.volume(device).cloned()).collect::<Result<_>>()?,
        };
        let jobs: Vec<_> = volumes.iter().filter_map(|volume| self.jobs.running(volume)).collect();
        if jobs.is_empty() || (!request.devices.is_empty() && jobs.len() < volumes.len()) {
            let name = volumes.first().map_or("this mount", |volume| volume.name());
            let error = Error::not_now(format!("there is no mirror of {name}"));
            return Err(error.advise("'livemirror mirror DISK TARGET' starts one"));
        }
        self.cut_over(&jobs, request)
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
