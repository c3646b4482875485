//! `livemirror list`: every mount of this user, for root every one of this host.

use serde_json::json;

use super::output;
use super::place::{self, Found};
use super::status;
use crate::control::backend::MountStatus;
use crate::error::Result;

/// Lists the livemirror mounts of this user, for root those of everybody.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Prints an array of objects: mountpoint, source, control, server_pid, keeper_pid, disks.
    #[arg(long)]
    json: bool,
}

impl Arguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// There is no /proc.
    pub fn run(self) -> Result<()> {
        let mounts: Vec<(Found, Option<MountStatus>)> = place::all()?
            .into_iter()
            .map(|found| {
                let status = status::of(&found).map_err(|error| log::warn!("{error}")).ok();
                (found, status)
            })
            .collect();
        if self.json {
            let rows: Vec<_> = mounts.iter().map(|(found, status)| row(found, status.as_ref())).collect();
            output::line(format_args!("{:#}", serde_json::Value::from(rows)));
            return Ok(());
        }
        for (found, status) in &mounts {
            let server = match status.as_ref().map(|status| status.server_pid) {
                Some(Some(pid)) => format!("server {pid}"),
                Some(None) => "no server".to_owned(),
                None => "state unknown".to_owned(),
            };
            output::line(format_args!("{}  ({server})", found.mountpoint().display()));
            for volume in status.iter().flat_map(|status| &status.volumes) {
                let mirror =
                    volume.mirror.as_ref().map(|job| format!(", mirror to {}", job.target)).unwrap_or_default();
                output::line(format_args!("  {}  on {}{mirror}", volume.disk, volume.active));
            }
        }
        Ok(())
    }
}

fn row(found: &Found, status: Option<&MountStatus>) -> serde_json::Value {
    json!({
        "mountpoint": found.mountpoint().display().to_string(),
        "source": found.entry.fsname.to_string_lossy(),
        "control": status.map(|status| &status.control),
        "server_pid": status.and_then(|status| status.server_pid),
        "keeper_pid": status.and_then(|status| status.keeper_pid),
        "disks": status.map(|status| status.volumes.iter().map(|volume| &volume.disk).collect::<Vec<_>>()),
    })
}
