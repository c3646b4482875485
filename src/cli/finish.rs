//! `livemirror finish` and `livemirror cancel`: the two ends of a mirror without a switch.

use std::path::PathBuf;

use serde_json::json;

use super::follow;
use super::output;
use super::place::Mount;
use crate::error::Result;
use crate::mirror::types::{LastMirror, MirrorResult};

/// Ends a mirror that is ready and keeps its target, a consistent copy.
///
/// The target holds the disk as it was at one instant, flushed. The guest stays where it is. Exit code 3 if the mirror is not
/// ready.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  livemirror mirror /mnt/vm/os.img /backup/os.img --wait && livemirror finish /mnt/vm/os.img")]
pub struct FinishArguments {
    /// A mounted disk, or the mountpoint if there is one disk.
    disk: PathBuf,
}

/// Gives a mirror up; the guest stays where it is.
///
/// A target that the mirror created is removed; one that was there before is left, with what was copied so far.
#[derive(Debug, clap::Args)]
pub struct CancelArguments {
    /// A mounted disk, or the mountpoint if there is one disk.
    disk: PathBuf,
    /// Leaves the target there, incomplete as it is.
    #[arg(long)]
    keep: bool,
}

impl FinishArguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// There is no mirror; `NotNow`: it is not ready.
    pub fn run(self) -> Result<()> {
        let mut mount = Mount::open(&self.disk)?;
        let disk = mount.disk()?;
        disk.job_id()?;
        mount.client.execute("livemirror-finish", json!({ "device": disk.device }))?;
        let last = follow::until_gone(&mut mount, &disk)?;
        let Some(LastMirror { result: MirrorResult::Finished, target, consistent, .. }) = last else {
            return Err(follow::ended_early(&disk, last.as_ref()));
        };
        let what =
            if consistent { "is a consistent copy of" } else { "has what was written since its mirror began to" };
        output::line(format_args!("{target} {what} {}", disk.status.disk));
        Ok(())
    }
}

impl CancelArguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// There is no mirror; it ended otherwise before it could be cancelled.
    pub fn run(self) -> Result<()> {
        let mut mount = Mount::open(&self.disk)?;
        let disk = mount.disk()?;
        disk.job_id()?;
        mount.client.execute("livemirror-cancel", json!({ "device": disk.device, "keep": self.keep }))?;
        let last = follow::until_gone(&mut mount, &disk)?;
        // A cutover, or an error, may have been faster.
        let Some(LastMirror { result: MirrorResult::Cancelled, .. }) = last else {
            return Err(follow::ended_early(&disk, last.as_ref()));
        };
        output::line(format_args!(
            "the mirror of {} is cancelled; the disk is still on {}",
            disk.status.disk, disk.status.active
        ));
        Ok(())
    }
}
