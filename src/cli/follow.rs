//! Waiting for a mirror: until it is ready, until it is gone. Shows its progress meanwhile.

use std::time::{Duration, Instant};

use super::interrupt::Interrupt;
use super::place::{Disk, Mount};
use super::progress::Progress;
use super::units;
use crate::error::{Error, ErrorKind, Result};
use crate::mirror::types::{IoStatus, JobInfo, JobStatus, LastMirror, MirrorResult};

/// How often the server is asked, at the least; and at first, when what took a moment must not take longer for being waited for.
const EVERY: Duration = Duration::from_millis(100);
const EVERY_AT_FIRST: Duration = Duration::from_millis(5);

/// How long a forecast is waited for.
const FORECAST_PATIENCE: Duration = Duration::from_secs(5);

/// How the waiting for ready ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// The mirror is ready.
    Ready,
    /// Somebody pressed Ctrl-C; the mirror goes on.
    Interrupted,
}

/// Waits until the mirror of `disk` is ready.
///
/// # Errors
/// It failed, or was ended by somebody else. `NotNow`: an error stopped it, and it waits for somebody to resume it; or the
/// deadline has passed.
pub fn until_ready(
    mount: &mut Mount,
    disk: &Disk,
    interrupt: &Interrupt,
    progress: &mut Progress,
    deadline: Option<Instant>,
) -> Result<Waited> {
    let mut late_said = false;
    let begun = Instant::now();
    loop {
        let now = mount.disk()?.status;
        let Some(job) = &now.mirror else { return Err(ended_early(disk, now.last_mirror.as_ref())) };
        progress.show(&now, job);
        if let (Some(false), Some(time), false) = (job.in_time, &job.finish_by, late_said || job.ready) {
            progress.say(&format!("the mirror {}", late(job, time)));
            late_said = true;
        }
        if job.ready {
            return Ok(Waited::Ready);
        }
        if let Some(error) = stopped(disk, job) {
            return Err(error);
        }
        if job.state == JobStatus::Concluded {
            return Err(failed(disk, job.error.as_deref().or(job.last_error.as_deref())));
        }
        if interrupt.came() {
            return Ok(Waited::Interrupted);
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(Error::not_now("the mirror was not ready in time:").on(disk.status.disk.clone()));
        }
        std::thread::sleep((begun.elapsed() / 32).clamp(EVERY_AT_FIRST, EVERY));
    }
}

/// Says on standard error that the mirror will not be ready by the time that it was given, once that is known.
///
/// # Errors
/// The server does not answer any more.
pub fn warn_if_late(mount: &mut Mount) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < FORECAST_PATIENCE {
        let disk = mount.disk()?;
        let Some(job) = disk.status.mirror.as_ref().filter(|job| !job.ready) else { return Ok(()) };
        match (job.in_time, &job.finish_by) {
            (Some(false), Some(time)) => {
                eprintln!("livemirror: the mirror of {} {}", disk.status.disk, late(job, time));
                return Ok(());
            }
            (Some(true), _) => return Ok(()),
            _ => std::thread::sleep(EVERY),
        }
    }
    Ok(())
}

/// `will not be ready by 22:30:00: at full speed it takes 3h 2m more`.
pub fn late(job: &JobInfo, time: &str) -> String {
    let when = match job.eta_seconds {
        Some(left) => format!("it takes {} more", units::seconds(left)),
        None => "the copy does not gain on the guest".to_owned(),
    };
    format!("will not be ready by {}: at full speed {when}", units::local(time))
}

/// Waits until the job that `disk` had is gone, and returns how it ended.
///
/// # Errors
/// The server does not answer any more.
pub fn until_gone(mount: &mut Mount, disk: &Disk) -> Result<Option<LastMirror>> {
    let Some(job) = &disk.status.mirror else { return Ok(disk.status.last_mirror.clone()) };
    loop {
        let now = mount.disk()?.status;
        let there = now.mirror.as_ref().is_some_and(|other| other.job_id == job.job_id && other.target == job.target);
        if !there {
            return Ok(now.last_mirror);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The error that says that an error has stopped the mirror, if one has.
pub fn stopped(disk: &Disk, job: &JobInfo) -> Option<Error> {
    if job.io_status == IoStatus::Ok || !matches!(job.state, JobStatus::Paused | JobStatus::Standby) {
        return None;
    }
    let reason = job.last_error.as_deref().unwrap_or("an error that is not known");
    let path = &disk.status.disk;
    let remedy = if job.io_status == IoStatus::Nospace { "make room" } else { "mend the cause" };
    Some(
        Error::not_now(format!("the mirror of {path} is stopped: {reason}"))
            .advise(format!("{remedy}, then `livemirror resume {path}`; or give up with `livemirror cancel {path}`")),
    )
}

/// The error of a mirror that ended before it should.
pub fn ended_early(disk: &Disk, last: Option<&LastMirror>) -> Error {
    match last.map(|last| last.result) {
        Some(MirrorResult::Failed) => failed(disk, last.and_then(|last| last.error.as_deref())),
        Some(MirrorResult::Cancelled) => {
            Error::new(ErrorKind::Failed, "the mirror was cancelled meanwhile:").on(disk.status.disk.clone())
        }
        Some(MirrorResult::Completed) => {
            let target = last.map_or("its target", |last| &last.target);
            Error::new(ErrorKind::Failed, format!("another command cut the disk over to {target} meanwhile:"))
                .on(disk.status.disk.clone())
        }
        Some(MirrorResult::Finished) => {
            Error::new(ErrorKind::Failed, "the mirror was ended by another command meanwhile:")
                .on(disk.status.disk.clone())
                .advise(format!("`livemirror status {}` shows how", disk.status.disk))
        }
        None => disk.no_mirror(),
    }
}

fn failed(disk: &Disk, error: Option<&str>) -> Error {
    let reason = error.unwrap_or("the server does not say why; its log may");
    let target = disk.status.mirror.as_ref().map_or("the target", |job| &job.target);
    Error::new(ErrorKind::Failed, format!("the mirror of {} failed: {reason}", disk.status.disk)).advise(format!(
        "the guest is not affected, its disk is still the source; remove the cause, remove {target} (it is not complete) or \
         pass --existing, and start the mirror again"
    ))
}
