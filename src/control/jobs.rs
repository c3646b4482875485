//! Starting a mirror and the verbs of its job, as QEMU's commands of the same names.
//!
//! `block-job-*` and `job-*` differ in how they name a job that is not there, and in what `cancel` means: `job-cancel` always
//! gives up, `block-job-cancel` lets a ready job end with a consistent copy unless `force` is told. Neither removes the
//! target, as QEMU does not; `livemirror-cancel` does.

use serde_json::json;

use super::arguments::Arguments;
use super::backend::Backend;
use super::commands::Answer;
use super::errors::{Class, QmpError};
use super::is_well_formed_id;
use crate::error::{Error, ErrorKind};
use crate::image::Format;
use crate::mirror::types::{CancelMode, CopyMode, ErrorPolicy, JobInfo, JobStatus, MirrorOptions, SyncMode};
use crate::range::Granularity;

type Result<T> = std::result::Result<T, QmpError>;

pub(super) const COPY_MODES: &[(&str, CopyMode)] =
    &[("background", CopyMode::Background), ("write-blocking", CopyMode::WriteBlocking), ("auto", CopyMode::Auto)];
pub(super) const ERROR_POLICIES: &[(&str, ErrorPolicy)] = &[
    ("report", ErrorPolicy::Report),
    ("ignore", ErrorPolicy::Ignore),
    ("stop", ErrorPolicy::Stop),
    ("enospc", ErrorPolicy::Enospc),
    // The device's own policy, which a job does not inherit in QEMU either.
    ("auto", ErrorPolicy::Enospc),
];
/// `None`: what QEMU has and we have not.
pub(super) const SYNCS: &[(&str, Option<SyncMode>)] = &[
    ("full", Some(SyncMode::Full)),
    ("top", Some(SyncMode::Top)),
    ("none", Some(SyncMode::None)),
    ("incremental", None),
    ("bitmap", None),
];

/// Checks what a new job is told, whichever command tells it.
pub(super) struct NewJob<'a> {
    backend: &'a dyn Backend,
    pub(super) device: String,
    pub(super) options: MirrorOptions,
}

impl<'a> NewJob<'a> {
    pub(super) fn new(backend: &'a dyn Backend, device: String, job_id: Option<String>, target: String) -> NewJob<'a> {
        let job_id = job_id.unwrap_or_else(|| device.clone());
        NewJob { backend, device, options: MirrorOptions::new(job_id, target) }
    }

    pub(super) fn format(&mut self, format: Option<String>) -> Result<()> {
        self.options.format = format.map(|name| format_of(&name)).transpose()?;
        Ok(())
    }

    /// The options that both commands have, by QEMU's names. Those not given stay as they are.
    pub(super) fn common(&mut self, arguments: &mut Arguments) -> Result<()> {
        let options = &mut self.options;
        if let Some(speed) = arguments.integer("speed")? {
            options.speed_bytes_per_second = speed_limit(speed)?;
        }
        if let Some(bytes) = arguments.uint32("granularity")? {
            options.granularity = granularity(bytes)?;
        }
        if let Some(bytes) = arguments.integer("buf-size")? {
            // 0 is QEMU's word for the default.
            match u64::try_from(bytes) {
                Ok(0) => {}
                Ok(bytes) => options.buffer_bytes = bytes,
                Err(_) => return Err(QmpError::usage("Invalid parameter 'buf-size'")),
            }
        }
        if let Some(policy) = arguments.choice("on-source-error", ERROR_POLICIES)? {
            options.on_source_error = policy;
        }
        if let Some(policy) = arguments.choice("on-target-error", ERROR_POLICIES)? {
            options.on_target_error = policy;
        }
        Ok(())
    }

    /// The last checks before the backend is asked.
    pub(super) fn check(&self) -> Result<()> {
        let NewJob { backend, device, options } = self;
        check_device(*backend, device)?;
        if !is_well_formed_id(&options.job_id) {
            return Err(QmpError::usage(format!("Invalid job ID '{}'", options.job_id)));
        }
        // One that has ended and dismisses itself is as good as gone: the backend waits for it.
        let leaves = |job: &JobInfo| match job.state {
            JobStatus::Null => true,
            JobStatus::Concluded => job.auto_dismiss,
            _ => false,
        };
        if backend.jobs().iter().any(|job| job.job_id == options.job_id && !leaves(job)) {
            let desc = format!("Job ID '{}' already in use", options.job_id);
            return Err(QmpError::new(Class::Generic, ErrorKind::Exists, desc));
        }
        let target = options.target.as_str();
        if !target.starts_with('/') && !target.contains("://") {
            let error = Error::usage("the target must be an absolute path, not").on(format!("'{target}'"));
            return Err(error.advise("the server does not know the client's working directory").into());
        }
        Ok(())
    }
}

/// The format that QEMU calls so.
pub(super) fn format_of(name: &str) -> Result<Format> {
    match name {
        "raw" => Ok(Format::Raw),
        "qcow2" => Ok(Format::Qcow2),
        other => Err(QmpError::usage(format!("Unknown driver '{other}'"))),
    }
}

/// Fails in QEMU's words unless there is such a device.
pub(super) fn check_device(backend: &dyn Backend, device: &str) -> Result<()> {
    if backend.devices().iter().any(|known| known == device) {
        return Ok(());
    }
    let desc = format!("Cannot find device='{device}' nor node-name='{device}'");
    Err(QmpError::new(Class::Generic, ErrorKind::NotFound, desc))
}

pub(super) fn drive_mirror(backend: &dyn Backend, mut arguments: Arguments) -> Answer {
    let job_id = arguments.optional_string("job-id")?;
    let device = arguments.string("device")?;
    let target = arguments.string("target")?;
    let format = arguments.optional_string("format")?;
    let node_name = arguments.optional_string("node-name")?;
    let replaces = arguments.optional_string("replaces")?;
    let sync = arguments.required_choice("sync", SYNCS)?;
    let existing = arguments.choice("mode", &[("absolute-paths", false), ("existing", true)])?.unwrap_or(false);

    let mut job = NewJob::new(backend, device, job_id, target);
    // What QEMU does where nothing is told; the command line has other defaults.
    job.options.copy_mode = CopyMode::Background;
    job.options.on_target_error = ErrorPolicy::Report;
    job.options.existing = existing;
    job.common(&mut arguments)?;
    let unmap = arguments.flag("unmap")?.unwrap_or(true);
    if let Some(mode) = arguments.choice("copy-mode", COPY_MODES)? {
        job.options.copy_mode = mode;
    }
    job.options.auto_finalize = arguments.flag("auto-finalize")?.unwrap_or(true);
    job.options.auto_dismiss = arguments.flag("auto-dismiss")?.unwrap_or(true);
    arguments.finish()?;

    job.format(format)?;
    job.options.sync = sync.ok_or_else(no_bitmaps)?;
    if !unmap {
        return Err(unsupported("Parameter 'unmap' must be true: livemirror always keeps the target thin"));
    }
    if node_name.is_some() {
        return Err(unsupported("Parameter 'node-name' is not supported: livemirror has no node graph"));
    }
    if let Some(node) = replaces {
        let desc = format!("Failed to find node with node-name='{node}'");
        return Err(QmpError::new(Class::Generic, ErrorKind::NotFound, desc));
    }
    job.check()?;
    backend.start_mirror(&job.device, job.options)?;
    Ok(json!({}))
}

pub(super) fn no_bitmaps() -> QmpError {
    unsupported("Parameter 'sync' must be 'full', 'top' or 'none': livemirror has no bitmaps")
}

fn unsupported(desc: &str) -> QmpError {
    QmpError::new(Class::Generic, ErrorKind::Unsupported, desc)
}

fn speed_limit(speed: i64) -> Result<u64> {
    u64::try_from(speed).map_err(|_| QmpError::usage("Parameter 'speed' expects a non-negative value"))
}

fn granularity(bytes: u32) -> Result<Option<Granularity>> {
    let problem = match bytes {
        // 0 is QEMU's word for the default.
        0 => return Ok(None),
        512..=0x400_0000 if bytes.is_power_of_two() => return Ok(Granularity::new(bytes.into())),
        512..=0x400_0000 => "a power of 2",
        _ => "a value in range [512B, 64MB]",
    };
    Err(QmpError::usage(format!("Parameter 'granularity' expects {problem}")))
}

/// How a family of commands says that a job is not there.
#[derive(Clone, Copy)]
enum Family {
    BlockJob,
    Job,
}

/// Executes a verb on a job that exists, or says in the family's words that it does not.
fn on_job(backend: &dyn Backend, family: Family, id: &str, verb: impl FnOnce() -> crate::error::Result<()>) -> Answer {
    let missing = || match family {
        Family::BlockJob => {
            QmpError::new(Class::DeviceNotActive, ErrorKind::NotFound, format!("Block job '{id}' not found"))
        }
        Family::Job => QmpError::new(Class::Generic, ErrorKind::NotFound, "Job not found"),
    };
    let known = || backend.jobs().iter().any(|job| job.job_id == id && job.state != JobStatus::Null);
    if !known() {
        return Err(missing());
    }
    match verb() {
        Ok(()) => Ok(json!({})),
        // It may have ended between the two calls.
        Err(error) if error.kind() == ErrorKind::NotFound && !known() => Err(missing()),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn block_job_set_speed(backend: &dyn Backend, mut arguments: Arguments) -> Answer {
    let id = arguments.string("device")?;
    let speed = arguments.integer("speed")?.ok_or_else(|| QmpError::usage("Parameter 'speed' is missing"))?;
    arguments.finish()?;
    on_job(backend, Family::BlockJob, &id, || Ok(()))?;
    let speed = speed_limit(speed)?;
    on_job(backend, Family::BlockJob, &id, || backend.set_speed(&id, speed))
}

pub(super) fn block_job_pause(backend: &dyn Backend, arguments: Arguments) -> Answer {
    let id = only(arguments, "device")?;
    on_job(backend, Family::BlockJob, &id, || backend.pause(&id))
}

pub(super) fn block_job_resume(backend: &dyn Backend, arguments: Arguments) -> Answer {
    let id = only(arguments, "device")?;
    on_job(backend, Family::BlockJob, &id, || backend.resume(&id))
}

pub(super) fn block_job_cancel(backend: &dyn Backend, mut arguments: Arguments) -> Answer {
    let id = arguments.string("device")?;
    let force = arguments.flag("force")?.unwrap_or(false);
    arguments.finish()?;
    let mode = if force { CancelMode::Force } else { CancelMode::Soft };
    on_job(backend, Family::BlockJob, &id, || backend.cancel(&id, mode, true))
}

pub(super) fn block_job_complete(backend: &dyn Backend, arguments: Arguments) -> Answer {
    let id = only(arguments, "device")?;
    on_job(backend, Family::BlockJob, &id, || backend.complete(&id))
}

pub(super) fn block_job_change(backend: &dyn Backend, mut arguments: Arguments) -> Answer {
    let id = arguments.string("id")?;
    arguments.required_choice("type", &[("mirror", ())])?;
    let mode = arguments.required_choice("copy-mode", COPY_MODES)?;
    arguments.finish()?;
    on_job(backend, Family::Job, &id, || backend.set_copy_mode(&id, mode))
}

pub(super) fn job_pause(backend: &dyn Backend, arguments: Arguments) -> Answer {
    let id = only(arguments, "id")?;
    on_job(backend, Family::Job, &id, || backend.pause(&id))
}

pub(super) fn job_resume(backend: &dyn Backend, arguments: Arguments) -> Answer {
    let id = only(arguments, "id")?;
    on_job(backend, Family::Job, &id, || backend.resume(&id))
}

pub(super) fn job_cancel(backend: &dyn Backend, arguments: Arguments) -> Answer {
    let id = only(arguments, "id")?;
    on_job(backend, Family::Job, &id, || backend.cancel(&id, CancelMode::Force, true))
}

pub(super) fn job_complete(backend: &dyn Backend, arguments: Arguments) -> Answer {
    let id = only(arguments, "id")?;
    on_job(backend, Family::Job, &id, || backend.complete(&id))
}

/// `job-finalize` and `block-job-finalize`.
pub(super) fn finalize(backend: &dyn Backend, arguments: Arguments) -> Answer {
    let id = only(arguments, "id")?;
    on_job(backend, Family::Job, &id, || backend.finalize(&id))
}

/// `job-dismiss` and `block-job-dismiss`.
pub(super) fn dismiss(backend: &dyn Backend, arguments: Arguments) -> Answer {
    let id = only(arguments, "id")?;
    on_job(backend, Family::Job, &id, || backend.dismiss(&id))
}

fn only(mut arguments: Arguments, name: &str) -> Result<String> {
    let id = arguments.string(name)?;
    arguments.finish()?;
    Ok(id)
}
