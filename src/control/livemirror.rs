//! The commands that QEMU does not have, for the command line.
//!
//! | command | arguments | return |
//! |---|---|---|
//! | `livemirror-status` | | [`MountStatus`](super::backend::MountStatus) |
//! | `livemirror-mirror` | `device`, `target`, [`job-id`, `format`, `existing`, `sync`, `base`, `cluster-size`, `version`, `backing-file`, `backing-fmt`, `speed`, `granularity`, `buf-size`, `on-source-error`, `on-target-error`, `copy-mode`, `max-guest-delay-ms`, `guest-first-us`, `finish-by-ms`, `reconnect-ms`, `reflink`, `target-cache`, `dry-run`] | `{}`; with `dry-run` [`MirrorPlan`](super::backend::MirrorPlan) |
//! | `livemirror-cutover` | [`devices`, `max-pause-ms`, `patience-ms`] | list of [`CutoverReport`](super::backend::CutoverReport) |
//! | `livemirror-verify` | `device`, [`from`] | [`Verified`](crate::mirror::verify::Verified) |
//! | `livemirror-finish` | `device` | `{}`; `not-now` unless ready |
//! | `livemirror-set-pace` | `device`, [`guest-first-us`, `finish-by-ms`]: 0 is no longer | `{}` |
//! | `livemirror-cancel` | `device`, [`keep`] | `{}` |
//! | `livemirror-unmount` | [`abort`] | `{}` |
//! | `livemirror-holders` | | list of [`Holder`](super::backend::Holder) |
//!
//! The defaults are those of the command line, not QEMU's. `device` names a volume, not a job.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use super::arguments::Arguments;
use super::backend::{Backend, CutoverRequest};
use super::commands::Answer;
use super::errors::QmpError;
use super::jobs::{COPY_MODES, NewJob, SYNCS, check_device, format_of, no_bitmaps};
use crate::error::{Error, ErrorKind};
use crate::image::{BackingFile, CacheMode, Layout, Version};
use crate::mirror::types::{CancelMode, JobInfo, JobStatus, Pace};

/// The longest time that one cutover call may keep its connection.
const PATIENCE_MAX: Duration = Duration::from_secs(60);

/// The end of the year 9999, in milliseconds since the epoch.
const FINISH_BY_MS_MAX: u64 = 253_402_300_799_000;

pub(super) fn status(backend: &dyn Backend, arguments: Arguments) -> Answer {
    arguments.finish()?;
    to_value(&backend.status())
}

pub(super) fn mirror(backend: &dyn Backend, mut arguments: Arguments) -> Answer {
    let job_id = arguments.optional_string("job-id")?;
    let device = arguments.string("device")?;
    let target = arguments.string("target")?;
    let format = arguments.optional_string("format")?;
    let mut job = NewJob::new(backend, device, job_id, target);
    job.common(&mut arguments)?;
    if let Some(sync) = arguments.choice("sync", SYNCS)? {
        job.options.sync = sync.ok_or_else(no_bitmaps)?;
    }
    job.options.base = arguments.optional_string("base")?;
    job.options.layout = layout(&mut arguments)?;
    if let Some(mode) = arguments.choice("copy-mode", COPY_MODES)? {
        job.options.copy_mode = mode;
    }
    job.options.existing = arguments.flag("existing")?.unwrap_or(false);
    job.options.target_cache =
        arguments.choice("target-cache", &[("none", CacheMode::None), ("writeback", CacheMode::Writeback)])?;
    if let Some(reflink) = arguments.flag("reflink")? {
        job.options.reflink = reflink;
    }
    if let Some(delay_ms) = arguments.size("max-guest-delay-ms")? {
        job.options.max_guest_delay = Duration::from_millis(delay_ms);
    }
    job.options.reconnect = arguments.size("reconnect-ms")?.map(Duration::from_millis);
    let (guest_first, finish_by) = pace(&mut arguments)?;
    job.options.pace = Pace {
        guest_first: guest_first.filter(|bound| !bound.is_zero()),
        finish_by: finish_by.filter(|time| !time.is_zero()),
    };
    let dry_run = arguments.flag("dry-run")?.unwrap_or(false);
    arguments.finish()?;
    job.format(format)?;
    job.check()?;
    if dry_run {
        return to_value(&backend.plan_mirror(&job.device, job.options)?);
    }
    backend.start_mirror(&job.device, job.options)?;
    Ok(json!({}))
}

/// Microseconds, and milliseconds since the epoch.
fn pace(arguments: &mut Arguments) -> Result<(Option<Duration>, Option<Duration>), QmpError> {
    let guest_first = arguments.size("guest-first-us")?.map(Duration::from_micros);
    let finish_by_ms = arguments.size("finish-by-ms")?;
    // Later ones cannot be written as a date.
    if finish_by_ms.is_some_and(|ms| ms > FINISH_BY_MS_MAX) {
        return Err(QmpError::usage("Parameter 'finish-by-ms' is out of range"));
    }
    let finish_by = finish_by_ms.map(Duration::from_millis);
    Ok((guest_first, finish_by))
}

/// How a new target is laid out, by the names of QEMU's `blockdev-create`.
fn layout(arguments: &mut Arguments) -> Result<Layout, QmpError> {
    let cluster_bytes = arguments.size("cluster-size")?;
    let version = arguments.choice("version", &[("v2", Version::V2), ("v3", Version::V3)])?.unwrap_or_default();
    let file = arguments.optional_string("backing-file")?;
    let format = arguments.optional_string("backing-fmt")?.map(|name| format_of(&name)).transpose()?;
    if file.is_none() && format.is_some() {
        return Err(QmpError::usage("Parameter 'backing-fmt' needs 'backing-file'"));
    }
    Ok(Layout { cluster_bytes, version, backing: file.map(|file| BackingFile { file, format }) })
}

pub(super) fn cutover(backend: &dyn Backend, mut arguments: Arguments) -> Answer {
    let devices = arguments.strings("devices")?.unwrap_or_default();
    let max_pause_ms = arguments.size("max-pause-ms")?.unwrap_or(50);
    let patience_ms = arguments.size("patience-ms")?.unwrap_or(1000);
    arguments.finish()?;
    for device in &devices {
        check_device(backend, device)?;
    }
    let request = CutoverRequest {
        devices,
        max_pause: Duration::from_millis(max_pause_ms),
        patience: Duration::from_millis(patience_ms).min(PATIENCE_MAX),
    };
    to_value(&backend.cutover(&request)?)
}

pub(super) fn verify(backend: &dyn Backend, mut arguments: Arguments) -> Answer {
    let device = arguments.string("device")?;
    let from = arguments.size("from")?.unwrap_or(0);
    arguments.finish()?;
    check_device(backend, &device)?;
    to_value(&backend.verify(&device, from)?)
}

pub(super) fn finish(backend: &dyn Backend, mut arguments: Arguments) -> Answer {
    let device = arguments.string("device")?;
    arguments.finish()?;
    let job = job_of(backend, &device)?;
    if !job.ready {
        let error = Error::not_now(format!("the mirror of {device} is not ready: its target is not a copy yet"));
        return Err(error
            .advise("wait until `livemirror status` says ready, or give up with `livemirror cancel`")
            .into());
    }
    if job.state == JobStatus::Standby {
        let error = Error::not_now(format!("the mirror of {device} is paused"));
        return Err(error.advise("let it go on with `livemirror resume`, then finish it").into());
    }
    backend.cancel(&job.job_id, CancelMode::Soft, true)?;
    Ok(json!({}))
}

pub(super) fn set_pace(backend: &dyn Backend, mut arguments: Arguments) -> Answer {
    let device = arguments.string("device")?;
    let (guest_first, finish_by) = pace(&mut arguments)?;
    arguments.finish()?;
    let job = job_of(backend, &device)?;
    backend.set_pace(&job.job_id, guest_first, finish_by)?;
    Ok(json!({}))
}

pub(super) fn cancel(backend: &dyn Backend, mut arguments: Arguments) -> Answer {
    let device = arguments.string("device")?;
    let keep = arguments.flag("keep")?.unwrap_or(false);
    arguments.finish()?;
    let job = job_of(backend, &device)?;
    backend.cancel(&job.job_id, CancelMode::Force, keep)?;
    Ok(json!({}))
}

pub(super) fn unmount(backend: &dyn Backend, mut arguments: Arguments) -> Answer {
    let abort = arguments.flag("abort")?.unwrap_or(false);
    arguments.finish()?;
    backend.unmount(abort)?;
    Ok(json!({}))
}

pub(super) fn holders(backend: &dyn Backend, arguments: Arguments) -> Answer {
    arguments.finish()?;
    to_value(&backend.holders())
}

/// The mirror of a volume.
fn job_of(backend: &dyn Backend, device: &str) -> Result<JobInfo, QmpError> {
    check_device(backend, device)?;
    let volumes = backend.status().volumes;
    let volume = backend.devices().iter().position(|known| known == device).and_then(|index| volumes.get(index));
    volume.and_then(|volume| volume.mirror.clone()).ok_or_else(|| {
        let error = Error::new(ErrorKind::NotFound, format!("{device} has no mirror"));
        error.advise("start one with `livemirror mirror DISK TARGET`").into()
    })
}

fn to_value(answer: &impl Serialize) -> Result<Value, QmpError> {
    serde_json::to_value(answer)
        .map_err(|error| Error::new(ErrorKind::Failed, format!("cannot put the answer into JSON: {error}")).into())
}
