//! A mount that is not there: two volumes and jobs that obey at once, so that the protocol is tested by itself.
//!
//! It emits a verb's events *before* its method returns: the hardest case for their order on the wire.

use std::collections::BTreeMap;
use std::time::Duration;

use super::backend::*;
use crate::error::{Error, ErrorKind, Result};
use crate::mirror::types::*;
use crate::mirror::verify::Verified;
use crate::sync::{Arc, Mutex};

type Listener = Box<dyn Fn(&JobEvent) + Send + Sync>;

#[derive(Default)]
pub(crate) struct Fake {
    pub(crate) jobs: Mutex<Vec<(String, JobInfo)>>,
    pub(crate) calls: Mutex<Vec<String>>,
    listeners: Mutex<BTreeMap<u64, Listener>>,
    pub(crate) cutover_takes: Mutex<Duration>,
    /// How the last mirror of any volume ended.
    pub(crate) last: Mutex<Option<LastMirror>>,
}

pub(crate) fn progress(job: &JobInfo) -> JobProgress {
    JobProgress { job_id: job.job_id.clone(), len: job.data_bytes, offset: job.copied_bytes, speed: job.speed }
}

impl Fake {
    pub(crate) fn new() -> Arc<Fake> {
        Arc::new(Fake::default())
    }

    pub(crate) fn emit(&self, event: &JobEvent) {
        for listener in self.listeners.lock().values() {
            listener(event);
        }
    }

    pub(crate) fn listeners(&self) -> usize {
        self.listeners.lock().len()
    }

    pub(crate) fn called(&self, what: &str) -> bool {
        self.calls.lock().iter().any(|call| call.starts_with(what))
    }

    fn note(&self, call: String) {
        self.calls.lock().push(call);
    }

    fn change(&self, job_id: &str, status: JobStatus) {
        for (_, job) in self.jobs.lock().iter_mut().filter(|(_, job)| job.job_id == job_id) {
            job.state = status;
        }
        self.emit(&JobEvent::StatusChange { job_id: job_id.to_owned(), status });
    }

    pub(crate) fn make_ready(&self, job_id: &str) {
        for (_, job) in self.jobs.lock().iter_mut().filter(|(_, job)| job.job_id == job_id) {
            (job.ready, job.in_sync, job.copied_bytes) = (true, true, job.data_bytes);
        }
        self.change(job_id, JobStatus::Ready);
        self.emit(&JobEvent::Ready(progress(&self.job(job_id).unwrap())));
    }

    fn job(&self, job_id: &str) -> Result<JobInfo> {
        let jobs = self.jobs.lock();
        let found = jobs.iter().find(|(_, job)| job.job_id == job_id).map(|(_, job)| job.clone());
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such job"))
    }

    fn allow(&self, job_id: &str, verb: &str, states: &[JobStatus]) -> Result<JobInfo> {
        self.note(format!("{verb} {job_id}"));
        let job = self.job(job_id)?;
        if states.contains(&job.state) {
            return Ok(job);
        }
        let state = serde_json::to_value(job.state).unwrap();
        let state = state.as_str().unwrap();
        Err(Error::not_now(format!("Job '{job_id}' in state '{state}' cannot accept command verb '{verb}'")))
    }

    fn conclude(&self, job_id: &str) {
        self.change(job_id, JobStatus::Concluded);
        let keep = self.job(job_id).is_ok_and(|job| !job.auto_dismiss);
        if !keep {
            self.forget(job_id);
        }
    }

    fn end(&self, job: &JobInfo, result: MirrorResult) {
        *self.last.lock() = Some(LastMirror {
            target: job.target.clone(),
            result,
            consistent: result != MirrorResult::Failed,
            error: (result == MirrorResult::Failed).then(|| "Input/output error".into()),
            pause_ms: (result == MirrorResult::Completed).then_some(1.5),
            predicted_pause_ms: (result == MirrorResult::Completed).then_some(2.5),
            ended: "2026-01-01T00:00:00Z".into(),
        });
    }

    /// An error stops the job, as a full target does.
    pub(crate) fn stop_for_room(&self, job_id: &str) {
        for (_, job) in self.jobs.lock().iter_mut().filter(|(_, job)| job.job_id == job_id) {
            (job.state, job.io_status) = (JobStatus::Paused, IoStatus::Nospace);
            job.last_error = Some("No space left on device".into());
        }
    }

    /// An error ends the job.
    pub(crate) fn fail(&self, job_id: &str) {
        if let Ok(job) = self.job(job_id) {
            self.end(&job, MirrorResult::Failed);
            self.forget(job_id);
        }
    }

    fn forget(&self, job_id: &str) {
        self.change(job_id, JobStatus::Null);
        self.jobs.lock().retain(|(_, job)| job.job_id != job_id);
    }
}

const LIVE: &[JobStatus] =
    &[JobStatus::Created, JobStatus::Running, JobStatus::Paused, JobStatus::Ready, JobStatus::Standby];

impl Backend for Fake {
    fn devices(&self) -> Vec<String> {
        vec!["os.img".into(), "disk-1.img".into()]
    }

    fn status(&self) -> MountStatus {
        let volume = |name: &str, device: &str| VolumeStatus {
            name: name.into(),
            disk: format!("/mnt/vm/{name}"),
            source: format!("/images/{name}"),
            format: "raw".into(),
            active: format!("/images/{name}"),
            size_bytes: 1 << 30,
            guest: GuestTraffic::default(),
            mirror: self.jobs.lock().iter().find(|(of, _)| of == device).map(|(_, job)| job.clone()),
            last_mirror: self.last.lock().clone(),
        };
        MountStatus {
            mountpoint: "/mnt/vm".into(),
            server_pid: Some(1),
            keeper_pid: Some(2),
            control: "/run/x".into(),
            restarts: 0,
            last_exit: None,
            volumes: vec![volume("os.img", "os.img"), volume("1.img", "disk-1.img")],
        }
    }

    fn start_mirror(&self, device: &str, options: MirrorOptions) -> Result<()> {
        self.note(format!("mirror {device} {options:?}"));
        if self.jobs.lock().iter().any(|(of, _)| of == device) {
            return Err(Error::new(ErrorKind::Exists, "Need a root block node").advise("cancel the other mirror"));
        }
        let job = JobInfo {
            job_id: options.job_id.clone(),
            target: options.target,
            sync: options.sync,
            state: JobStatus::Created,
            copy_mode: options.copy_mode,
            granularity: 65536,
            ready: false,
            in_sync: false,
            data_bytes: 8_388_608,
            copied_bytes: 0,
            dirty_bytes: 0,
            in_flight_bytes: 0,
            zeroed_bytes: 0,
            discarded_bytes: 0,
            skipped_bytes: 0,
            shared_bytes: 0,
            source_allocated_bytes: 0,
            target_allocated_bytes: 0,
            dirty_bytes_per_second: 0,
            drain_bytes_per_second: 0,
            eta_seconds: None,
            speed: options.speed_bytes_per_second,
            own_speed: 0,
            guest_first_us: None,
            guest_p99_us: None,
            finish_by: None,
            in_time: None,
            io_status: IoStatus::Ok,
            last_error: None,
            paused: false,
            busy: false,
            actively_synced: false,
            auto_finalize: options.auto_finalize,
            auto_dismiss: options.auto_dismiss,
            error: None,
        };
        self.jobs.lock().insert(0, (device.to_owned(), job));
        self.change(&options.job_id, JobStatus::Created);
        self.change(&options.job_id, JobStatus::Running);
        Ok(())
    }

    fn plan_mirror(&self, _device: &str, options: MirrorOptions) -> Result<MirrorPlan> {
        Ok(MirrorPlan {
            target: options.target,
            data_bytes: 1,
            size_bytes: 2,
            available_bytes: None,
            method: "copy".into(),
            expected_seconds: None,
        })
    }

    fn jobs(&self) -> Vec<JobInfo> {
        self.jobs.lock().iter().map(|(_, job)| job.clone()).collect()
    }

    fn pause(&self, job_id: &str) -> Result<()> {
        let job = self.allow(job_id, "pause", LIVE)?;
        if matches!(job.state, JobStatus::Paused | JobStatus::Standby) {
            return Err(Error::not_now("Job is already paused"));
        }
        self.change(job_id, if job.ready { JobStatus::Standby } else { JobStatus::Paused });
        Ok(())
    }

    fn resume(&self, job_id: &str) -> Result<()> {
        let job = self.allow(job_id, "resume", LIVE)?;
        if !matches!(job.state, JobStatus::Paused | JobStatus::Standby) {
            return Err(Error::not_now("Can't resume a job that was not paused"));
        }
        self.change(job_id, if job.ready { JobStatus::Ready } else { JobStatus::Running });
        Ok(())
    }

    fn cancel(&self, job_id: &str, mode: CancelMode, keep_target: bool) -> Result<()> {
        let job = self.allow(job_id, "cancel", LIVE)?;
        self.note(format!("cancelled {mode:?} keep={keep_target}"));
        if mode == CancelMode::Soft && job.ready {
            self.change(job_id, JobStatus::Waiting);
            self.change(job_id, JobStatus::Pending);
            self.emit(&JobEvent::Completed(progress(&job), None));
            self.end(&job, MirrorResult::Finished);
        } else {
            self.end(&job, MirrorResult::Cancelled);
            self.change(job_id, JobStatus::Aborting);
            self.emit(&JobEvent::Cancelled(progress(&job)));
        }
        self.conclude(job_id);
        Ok(())
    }

    fn complete(&self, job_id: &str) -> Result<()> {
        let job = self.allow(job_id, "complete", &[JobStatus::Ready, JobStatus::Standby])?;
        self.change(job_id, JobStatus::Waiting);
        self.change(job_id, JobStatus::Pending);
        if job.auto_finalize {
            self.emit(&JobEvent::Completed(progress(&job), None));
            self.conclude(job_id);
        } else {
            self.emit(&JobEvent::Pending { job_id: job_id.to_owned() });
        }
        Ok(())
    }

    fn finalize(&self, job_id: &str) -> Result<()> {
        let job = self.allow(job_id, "finalize", &[JobStatus::Pending])?;
        self.emit(&JobEvent::Completed(progress(&job), None));
        self.conclude(job_id);
        Ok(())
    }

    fn dismiss(&self, job_id: &str) -> Result<()> {
        self.allow(job_id, "dismiss", &[JobStatus::Concluded])?;
        self.forget(job_id);
        Ok(())
    }

    fn set_speed(&self, job_id: &str, bytes_per_second: u64) -> Result<()> {
        self.allow(job_id, "set-speed", LIVE)?;
        self.note(format!("speed {bytes_per_second}"));
        Ok(())
    }

    fn set_pace(&self, job_id: &str, guest_first: Option<Duration>, finish_by: Option<Duration>) -> Result<()> {
        self.allow(job_id, "set-speed", LIVE)?;
        self.note(format!("pace {guest_first:?} {finish_by:?}"));
        Ok(())
    }

    fn set_copy_mode(&self, job_id: &str, mode: CopyMode) -> Result<()> {
        self.allow(job_id, "change", LIVE)?;
        self.note(format!("mode {mode:?}"));
        Ok(())
    }

    fn cutover(&self, request: &CutoverRequest) -> Result<Vec<CutoverReport>> {
        self.note(format!("{request:?}"));
        let takes = *self.cutover_takes.lock();
        std::thread::sleep(takes);
        let ready = self.jobs.lock().iter().find(|(of, job)| request.devices.contains(of) && job.ready).cloned();
        if let Some((device, job)) = ready {
            self.end(&job, MirrorResult::Completed);
            self.forget(&job.job_id);
            return Ok(vec![CutoverReport {
                device,
                active: job.target,
                superseded: "/images/os.img".into(),
                pause_ms: 1.5,
                predicted_pause_ms: 2.5,
            }]);
        }
        Err(Error::not_now("the mirror of os.img is not ready").advise("try again"))
    }

    fn verify(&self, device: &str, from: u64) -> Result<Verified> {
        self.note(format!("verify {device} {from}"));
        Ok(Verified { next: (from == 0).then_some(1), ..Verified::default() })
    }

    fn unmount(&self, abort: bool) -> Result<()> {
        self.note(format!("unmount {abort}"));
        Ok(())
    }

    fn holders(&self) -> Vec<Holder> {
        vec![Holder { pid: Some(7), name: "qemu".into(), path: Some("/mnt/vm/os.img".into()) }]
    }

    fn quit(&self) {
        self.note("quit".into());
    }

    fn subscribe(&self, listener: Listener) -> SubscriptionId {
        let mut listeners = self.listeners.lock();
        let id = listeners.keys().last().map_or(0, |last| last + 1);
        listeners.insert(id, listener);
        SubscriptionId(id)
    }

    fn unsubscribe(&self, id: SubscriptionId) {
        self.listeners.lock().remove(&id.0);
    }
}
