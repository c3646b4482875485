//! The `query-*` commands, in the shapes of QEMU 10.0.

use serde_json::{Value, json};

use super::arguments::Arguments;
use super::backend::Backend;
use super::commands::{self, Answer};
use crate::mirror::types::{JobInfo, JobStatus};

/// The version that is claimed to clients that look for QEMU's, and our own in `package`.
pub(super) fn version_json() -> Value {
    json!({
        "qemu": { "micro": 0, "minor": 0, "major": 10 },
        "package": concat!("livemirror ", env!("CARGO_PKG_VERSION")),
    })
}

pub(super) fn version(_: &dyn Backend, arguments: Arguments) -> Answer {
    arguments.finish()?;
    Ok(version_json())
}

pub(super) fn commands(_: &dyn Backend, arguments: Arguments) -> Answer {
    arguments.finish()?;
    Ok(commands::names().map(|name| json!({ "name": name })).collect())
}

pub(super) fn jobs(backend: &dyn Backend, arguments: Arguments) -> Answer {
    arguments.finish()?;
    Ok(present(backend).map(|job| job_json(&job)).collect())
}

pub(super) fn block_jobs(backend: &dyn Backend, arguments: Arguments) -> Answer {
    arguments.finish()?;
    Ok(present(backend).map(|job| block_job_json(&job)).collect())
}

pub(super) fn block(backend: &dyn Backend, arguments: Arguments) -> Answer {
    arguments.finish()?;
    let volumes = backend.status().volumes;
    let described = backend.devices().into_iter().zip(volumes).map(|(device, volume)| {
        json!({
            "device": device,
            "qdev": volume.disk,
            "locked": false,
            "removable": false,
            "type": "unknown",
            "inserted": {
                "node-name": device,
                "file": volume.active,
                "drv": volume.format,
                "ro": false,
                "encrypted": false,
                "detect_zeroes": "off",
                "backing_file_depth": 0,
                "write_threshold": 0,
                "bps": 0, "bps_rd": 0, "bps_wr": 0,
                "iops": 0, "iops_rd": 0, "iops_wr": 0,
                "cache": { "writeback": true, "direct": false, "no-flush": false },
                "image": {
                    "filename": volume.active,
                    "format": volume.format,
                    "virtual-size": volume.size_bytes,
                    "dirty-flag": false,
                },
            },
        })
    });
    Ok(described.collect())
}

fn present(backend: &dyn Backend) -> impl Iterator<Item = JobInfo> {
    backend.jobs().into_iter().filter(|job| job.state != JobStatus::Null)
}

/// Work done and work known, in bytes. They are equal only when nothing is left to copy.
fn progress(job: &JobInfo) -> (u64, u64) {
    let left = job.data_bytes.saturating_sub(job.copied_bytes);
    let len = job.data_bytes.max(job.copied_bytes);
    let settled = job.in_sync || job.ready || matches!(job.state, JobStatus::Concluded | JobStatus::Pending);
    if left == 0 && !settled { (job.copied_bytes, len + job.granularity) } else { (job.copied_bytes, len) }
}

fn job_json(job: &JobInfo) -> Value {
    let (offset, len) = progress(job);
    let mut json = json!({
        "current-progress": offset,
        "status": job.state,
        "total-progress": len,
        "type": "mirror",
        "id": job.job_id,
    });
    if let Some(error) = &job.error {
        json["error"] = error.as_str().into();
    }
    json
}

fn block_job_json(job: &JobInfo) -> Value {
    let (offset, len) = progress(job);
    let mut json = json!({
        "auto-finalize": job.auto_finalize,
        "io-status": job.io_status,
        "device": job.job_id,
        "auto-dismiss": job.auto_dismiss,
        "busy": job.busy,
        "len": len,
        "offset": offset,
        "status": job.state,
        "paused": job.paused,
        "speed": job.speed,
        "ready": job.ready,
        "type": "mirror",
        "actively-synced": job.actively_synced,
    });
    if let Some(error) = &job.error {
        json["error"] = error.as_str().into();
    }
    json
}
