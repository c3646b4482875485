//! `livemirror verify`: compares both images of a mirror while the guest runs.

use std::path::PathBuf;

use serde_json::json;

use super::interrupt::Interrupt;
use super::output;
use super::place::Mount;
use super::units;
use crate::error::{Error, ErrorKind, Result};
use crate::mirror::verify::Verified;

/// Compares both images of a mirror, block by block, while the guest runs.
///
/// What is dirty is waited for; nothing is written. Exit code 4: they differ. 3: parts were written to without a pause and could not be
/// compared (in copy mode write-blocking they can).
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  livemirror mirror /mnt/vm/os.img /new/os.img --wait && livemirror verify /mnt/vm/os.img && livemirror cutover /mnt/vm/os.img")]
pub struct Arguments {
    /// A mounted disk, or the mountpoint if there is one disk.
    disk: PathBuf,
}

impl Arguments {
    /// Runs the verb.
    ///
    /// # Errors
    /// `Different`: the images differ. `NotNow`: the mirror is not ready, or parts could not be compared. There is no mirror; an image
    /// cannot be read.
    pub fn run(self) -> Result<()> {
        let mut mount = Mount::open(&self.disk)?;
        let disk = mount.disk()?;
        disk.job_id()?;
        let interrupt = Interrupt::watch()?;
        let mut total = Verified { next: Some(0), ..Verified::default() };
        while let Some(from) = total.next {
            if interrupt.came() {
                if total.first_difference.is_some() {
                    break;
                }
                let what =
                    format!("interrupted after {} of {}:", units::size(from), units::size(disk.status.size_bytes));
                return Err(Error::not_now(what).on(disk.status.disk));
            }
            let step = mount.client.call("livemirror-verify", json!({ "device": disk.device, "from": from }));
            let step: Verified = match step {
                Ok(step) => step,
                // What was found is not forgotten because of what came after it.
                Err(error) if total.first_difference.is_some() => {
                    log::error!("{error}");
                    break;
                }
                Err(error) => return Err(error),
            };
            total = Verified {
                next: step.next,
                same_bytes: total.same_bytes + step.same_bytes,
                unsettled_bytes: total.unsettled_bytes + step.unsettled_bytes,
                differing_bytes: total.differing_bytes + step.differing_bytes,
                first_difference: total.first_difference.or(step.first_difference),
            };
        }
        if let Some(first) = total.first_difference {
            let what = format!("{} differ, the first at byte {first}:", units::size(total.differing_bytes));
            return Err(Error::new(ErrorKind::Different, what)
                .on(disk.status.disk)
                .advise("do not cut over: start anew with `livemirror mirror --restart`, and see what else writes to the target"));
        }
        if total.unsettled_bytes > 0 {
            let what = format!("{} were written to all the time:", units::size(total.unsettled_bytes));
            return Err(Error::not_now(what)
                .on(disk.status.disk)
                .advise("`livemirror set DISK --copy-mode write-blocking` lets the images stay alike under load"));
        }
        output::line(format_args!(
            "the images of {} are the same: {}",
            disk.status.disk,
            units::size(total.same_bytes)
        ));
        Ok(())
    }
}
