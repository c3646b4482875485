//! `livemirror pause`, `resume` and `set`: changes to a mirror that is under way.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::follow;
use super::place::{Disk, Mount};
use super::units;
use crate::error::{Error, Result};
use crate::mirror::micros;

/// Stops the copying of a mirror for now.
///
/// Changes go on being tracked, and the guest is not affected.
#[derive(Debug, clap::Args)]
pub struct PauseArguments {
    /// A mounted disk, or the mountpoint if there is one disk.
    disk: PathBuf,
}

/// Goes on with a mirror that was paused, or that an error stopped.
#[derive(Debug, clap::Args)]
pub struct ResumeArguments {
    /// A mounted disk, or the mountpoint if there is one disk.
    disk: PathBuf,
}

/// Changes the pace or the copy mode of a mirror under way.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  livemirror set /mnt/vm/os.img --speed 50M")]
pub struct SetArguments {
    /// A mounted disk, or the mountpoint if there is one disk.
    disk: PathBuf,
    #[command(flatten)]
    changes: Changes,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true)]
struct Changes {
    /// The most that is copied each second; 0 is no limit.
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    speed: Option<u64>,
    /// The copy yields so that 99 of 100 reads and writes of the guest take no longer than this; 0: it does not any more.
    #[arg(long, value_name = "DURATION", value_parser = units::parse_duration)]
    guest_first: Option<Duration>,
    /// As slow as will do to be ready by then: in 2h, at 22:30, at "2026-01-31 06:00"; never: no such time any more.
    #[arg(long, value_name = "TIME", value_parser = units::parse_moment)]
    finish_by: Option<units::Moment>,
    /// Whether writes of the guest wait for the target.
    #[arg(long, value_parser = ["auto", "background", "write-blocking"])]
    copy_mode: Option<String>,
}

impl PauseArguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// There is no mirror, or it is paused already.
    pub fn run(self) -> Result<()> {
        on_job(&self.disk, |_, job| vec![("block-job-pause", json!({ "device": job }))])
    }
}

impl ResumeArguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// There is no mirror, or it is not paused.
    pub fn run(self) -> Result<()> {
        on_job(&self.disk, |_, job| vec![("block-job-resume", json!({ "device": job }))])
    }
}

impl SetArguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// There is no mirror, or it is ending.
    pub fn run(self) -> Result<()> {
        let Changes { speed, guest_first, finish_by, copy_mode } = self.changes;
        if speed.is_some_and(|speed| i64::try_from(speed).is_err()) {
            return Err(Error::usage("the value of --speed is too large"));
        }
        on_job(&self.disk, |device, job| {
            let pace = (guest_first.is_some() || finish_by.is_some()).then(|| {
                let mut told = json!({ "device": device });
                if let Some(bound) = guest_first {
                    told["guest-first-us"] = micros(bound).into();
                }
                if let Some(moment) = finish_by {
                    told["finish-by-ms"] = units::epoch_ms(moment).into();
                }
                ("livemirror-set-pace", told)
            });
            let speed = speed.map(|speed| ("block-job-set-speed", json!({ "device": job, "speed": speed })));
            let mode =
                copy_mode.map(|mode| ("block-job-change", json!({ "id": job, "type": "mirror", "copy-mode": mode })));
            speed.into_iter().chain(pace).chain(mode).collect()
        })?;
        match finish_by {
            Some(units::Moment(Some(_))) => follow::warn_if_late(&mut Mount::open(&self.disk)?),
            _ => Ok(()),
        }
    }
}

/// Executes the commands that `make` makes for the job of the disk's mirror.
fn on_job(path: &Path, make: impl FnOnce(&str, &str) -> Vec<(&'static str, Value)>) -> Result<()> {
    let mut mount = Mount::open(path)?;
    let disk: Disk = mount.disk()?;
    for (command, arguments) in make(&disk.device, disk.job_id()?) {
        mount.client.execute(command, arguments)?;
    }
    Ok(())
}
