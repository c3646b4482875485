//! `livemirror cutover`: the guest moves to the target.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

use super::follow;
use super::interrupt::Interrupt;
use super::output;
use super::place::{Disk, Mount};
use super::progress::Progress;
use super::units;
use crate::control::backend::{CutoverReport, MountStatus};
use crate::control::device_names;
use crate::error::{Error, ErrorKind, Result};
use crate::mirror::types::MirrorResult;

/// How long the server may try before it is asked again.
const PATIENCE: Duration = Duration::from_secs(1);

/// Moves the guest to the target of its disk's mirror.
///
/// Waits for the mirror to be ready; the guest notices no more than a short pause. Given a mountpoint, all disks of the mount
/// that have a mirror move at one instant.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  livemirror cutover /mnt/vm/os.img
  livemirror cutover /mnt/vm --max-pause 20ms --timeout 10min

Exit code 3: not within the timeout; nothing was changed, and the mirror goes on.")]
pub struct Arguments {
    /// A mounted disk, or a mountpoint for all its disks that have a mirror.
    #[arg(value_name = "DISK|MOUNTPOINT")]
    disk: PathBuf,
    /// How long writes of the guest may wait; a cutover that would take longer is put off.
    #[arg(long, value_name = "DURATION", default_value = "50ms", value_parser = units::parse_duration)]
    max_pause: Duration,
    /// How long to try; without it, until it is done.
    #[arg(long, value_name = "DURATION", value_parser = units::parse_duration)]
    timeout: Option<Duration>,
}

impl Arguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// There is no mirror, it failed, or the time is up.
    pub fn run(self) -> Result<()> {
        let mut mount = Mount::open(&self.disk)?;
        let status = mount.status()?;
        let disks = disks_to_move(&mount, &status)?;
        let interrupt = Interrupt::watch()?;
        let reports = cut_over(&mut mount, &disks, self.max_pause, self.timeout, &interrupt)?;
        print(&disks, &reports);
        Ok(())
    }
}

fn disks_to_move(mount: &Mount, status: &MountStatus) -> Result<Vec<Disk>> {
    if mount.found.disk_name.is_some() {
        let disk = mount.found.disk(status)?;
        disk.job_id()?;
        return Ok(vec![disk]);
    }
    let devices = device_names(status.volumes.iter().map(|volume| volume.name.as_str()));
    let all = devices.into_iter().zip(&status.volumes).map(|(device, volume)| Disk { device, status: volume.clone() });
    let disks: Vec<Disk> = all.filter(|disk| disk.status.mirror.is_some()).collect();
    if disks.is_empty() {
        let mountpoint = mount.found.mountpoint().display().to_string();
        return Err(Error::new(ErrorKind::NotFound, "there is no mirror at")
            .on(mountpoint)
            .advise("start one with `livemirror mirror DISK TARGET`"));
    }
    Ok(disks)
}

/// Asks for the cutover of all of `disks` at one instant until it happened or the time is up.
///
/// # Errors
/// `NotNow`: the time is up, or it was interrupted; the mirrors go on. Else a mirror failed.
pub fn cut_over(
    mount: &mut Mount,
    disks: &[Disk],
    max_pause: Duration,
    timeout: Option<Duration>,
    interrupt: &Interrupt,
) -> Result<Vec<CutoverReport>> {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let devices: Vec<&str> = disks.iter().map(|disk| disk.device.as_str()).collect();
    let mut progress = Progress::new();
    loop {
        let left = deadline.map_or(PATIENCE, |deadline| deadline.saturating_duration_since(Instant::now()));
        let asked = Instant::now();
        let request = json!({
            "devices": devices,
            "max-pause-ms": milliseconds(max_pause),
            "patience-ms": milliseconds(left.min(PATIENCE)),
        });
        let refusal = match mount.client.call("livemirror-cutover", request) {
            Ok(reports) => return Ok(reports),
            Err(error) if error.kind() == ErrorKind::NotNow => error,
            // The server may have died after the switch, or the mirror may have ended for another reason.
            Err(error) => return happened_all_the_same(mount, disks).ok_or(error),
        };
        let status = mount.status()?;
        for disk in disks {
            let Some(volume) = status.volumes.iter().find(|volume| volume.name == disk.status.name) else { continue };
            let Some(job) = &volume.mirror else { return Err(follow::ended_early(disk, volume.last_mirror.as_ref())) };
            progress.show(volume, job);
            if let Some(error) = follow::stopped(disk, job) {
                return Err(error);
            }
        }
        let because = if interrupt.came() {
            "interrupted".to_owned()
        } else if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            format!("not cut over within {}", humantime::format_duration(timeout.unwrap_or_default()))
        } else {
            // A server that refuses at once is not to be asked without pause.
            std::thread::sleep(Duration::from_millis(50).saturating_sub(asked.elapsed()));
            continue;
        };
        let path = mount.found.mountpoint().display().to_string();
        return Err(Error::not_now(format!("{because}: {refusal}")).advise(refusal.advice().map_or_else(
            || format!("nothing was changed and the mirror goes on; try again, or allow more with --max-pause: {path}"),
            str::to_owned,
        )));
    }
}

/// The reports of a cutover whose answer was lost; `None` unless it took place.
fn happened_all_the_same(mount: &mut Mount, disks: &[Disk]) -> Option<Vec<CutoverReport>> {
    let status = mount.status().ok()?;
    let report = |disk: &Disk| {
        let before = disk.status.mirror.as_ref()?;
        let now = status.volumes.iter().find(|volume| volume.name == disk.status.name)?;
        let last = now.last_mirror.as_ref()?;
        let moved = now.mirror.is_none() && last.result == MirrorResult::Completed && last.target == before.target;
        moved.then(|| CutoverReport {
            device: disk.device.clone(),
            active: now.active.clone(),
            superseded: disk.status.active.clone(),
            pause_ms: last.pause_ms.unwrap_or_default(),
            predicted_pause_ms: last.predicted_pause_ms.unwrap_or_default(),
        })
    };
    disks.iter().map(report).collect()
}

/// Prints what took place.
pub fn print(disks: &[Disk], reports: &[CutoverReport]) {
    for report in reports {
        let disk = disks.iter().find(|disk| disk.device == report.device);
        let path = disk.map_or(report.device.as_str(), |disk| disk.status.disk.as_str());
        output::line(format_args!(
            "{path} is now on {}; writes waited {:.1} ms ({:.1} ms were predicted)",
            report.active, report.pause_ms, report.predicted_pause_ms
        ));
        output::line(format_args!("{} is out of date from here on", report.superseded));
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
