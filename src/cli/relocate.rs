//! `livemirror move`: mirror, wait, cut over.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;

use super::cutover;
use super::follow::{self, Waited};
use super::interrupt::Interrupt;
use super::mirror::{MirrorArguments, target_path};
use super::place::{Disk, Mount};
use super::progress::Progress;
use super::units;
use crate::error::{Error, Result};
use crate::mirror::types::{LastMirror, MirrorResult};

/// Moves a disk in one go: mirrors it to TARGET, waits until that is ready and cuts over.
///
/// Ctrl-C ends the mirror, removes a TARGET that it created and leaves everything on the source.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  livemirror move /mnt/vm/os.img /new/os.img")]
pub struct Arguments {
    /// A mounted disk, or the mountpoint if there is one disk.
    disk: PathBuf,
    /// The new image; a directory stands for the source's name in it. Or an NBD URI.
    target: PathBuf,
    #[command(flatten)]
    options: MirrorArguments,
    /// How long writes of the guest may wait at the cutover.
    #[arg(long, value_name = "DURATION", default_value = "50ms", value_parser = units::parse_duration)]
    max_pause: Duration,
}

impl Arguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// The mirror cannot start, failed, or was interrupted; the guest is then still on the source.
    pub fn run(self) -> Result<()> {
        self.options.check_whole()?;
        let mut mount = Mount::open(&self.disk)?;
        let disk = mount.disk()?;
        let target = target_path(&self.target, &disk)?;
        let interrupt = Interrupt::watch()?;
        self.options.start(&mut mount, &disk, &target)?;
        let disk = mount.disk()?;
        let mut progress = Progress::new();
        let waited = follow::until_ready(&mut mount, &disk, &interrupt, &mut progress, None)?;
        progress.end();
        let disks = [disk];
        if waited == Waited::Ready {
            match cutover::cut_over(&mut mount, &disks, self.max_pause, None, &interrupt) {
                Ok(reports) => {
                    cutover::print(&disks, &reports);
                    return Ok(());
                }
                Err(error) if !interrupt.came() => return Err(error),
                Err(_) => {}
            }
        }
        give_up(&mut mount, &disks[0])
    }
}

fn give_up(mount: &mut Mount, disk: &Disk) -> Result<()> {
    mount.client.execute("livemirror-cancel", json!({ "device": disk.device }))?;
    let last = follow::until_gone(mount, disk)?;
    let Some(LastMirror { result: MirrorResult::Cancelled, .. }) = last else {
        return Err(follow::ended_early(disk, last.as_ref()));
    };
    Err(Error::not_now("interrupted: the mirror was cancelled, and the guest is still on")
        .on(disk.status.active.clone()))
}
