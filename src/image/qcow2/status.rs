//! Which parts of the disk hold data: asked through all layers, as QEMU's block status is.
//!
//! ```text
//! the first layer that has it allocated answers:    L2 entry: zero                          -> Hole, or Zero if it takes room
//!                                                    L2 entry: data -> a hole in the file,
//!                                                                      or past its end      -> Zero
//!                                                    unallocated    -> ask the backing file
//! past the end of the backing file, or without one: Hole
//! ```
//!
//! The question to the file below is an extra one: if it fails, the answer is `Data`.

use nix::errno::Errno;
use nix::unistd::Whence;

use super::Qcow2Image;
use super::mapping::{Place, Run};
use crate::image::zeroing::Tried;
use crate::image::{Extent, ExtentStatus};
use crate::range::ByteRange;

impl Qcow2Image {
    /// The extent at the start of `range` (not empty, on the disk). `ends`: where data ends matters too.
    pub(super) fn status(&self, range: ByteRange, ends: bool) -> Extent {
        let whole = Extent { range, status: ExtentStatus::Data };
        // A table maps much more than anybody asks for at once; more is asked for by the next call.
        let looked_at = range.split(self.header.l2_span_bytes()).0;
        let run = {
            let _held = self.stripes.shared(looked_at.split(1).0);
            self.run_at(looked_at)
        };
        let Ok(run) = run else { return whole };
        match run.place {
            Place::Zero { allocated } => {
                let status = if allocated { ExtentStatus::Zero } else { ExtentStatus::Hole };
                Extent { range: run.range, status }
            }
            Place::Compressed { .. } => Extent { range: run.range, status: ExtentStatus::Data },
            Place::Data { host, .. } => self.status_in_file(run, host, ends),
            Place::Unallocated => self.status_in_backing(run.range, ends),
        }
    }

    fn status_in_backing(&self, range: ByteRange, ends: bool) -> Extent {
        let there = self.backed(range);
        match &self.backing {
            Some(backing) if !there.is_empty() => {
                let found = if ends { backing.extent_at(there.start()) } else { backing.extent_within(there) };
                Extent { range: found.range.intersect(there), status: found.status }
            }
            _ => Extent { range, status: ExtentStatus::Hole },
        }
    }

    fn status_in_file(&self, run: Run, host: u64, ends: bool) -> Extent {
        let data = Extent { range: run.range, status: ExtentStatus::Data };
        let end = host.saturating_add(run.range.len());
        let mut found = None;
        let tried = self.seek.attempt(|| {
            let next = match self.host.seek(host, Whence::SeekData) {
                Err(Errno::ENXIO) => end,
                next => next?,
            };
            found = Some(if next > host {
                (next, ExtentStatus::Zero)
            } else if ends {
                (self.host.seek(host, Whence::SeekHole)?, ExtentStatus::Data)
            } else {
                (end, ExtentStatus::Data)
            });
            Ok(())
        });
        match (tried, found) {
            (Tried::Done, Some((until, status))) if until > host => {
                Extent { range: ByteRange::new(run.range.start(), until.min(end) - host), status }
            }
            _ => data,
        }
    }

    /// See [`crate::image::Image::shows_beneath`].
    pub(super) fn unallocated(&self, layers: u32, range: ByteRange) -> ByteRange {
        let nothing = range.split(0).0;
        let Some(backing) = self.backing.as_ref().filter(|_| layers > 0 && !range.is_empty()) else { return nothing };
        let looked_at = range.split(self.header.l2_span_bytes()).0;
        let run = {
            let _held = self.stripes.shared(looked_at.split(1).0);
            self.run_at(looked_at)
        };
        match run {
            Ok(Run { range, place: Place::Unallocated }) if layers == 1 => range,
            Ok(Run { range, place: Place::Unallocated }) => {
                // Past its end the next layer reads as zeroes, whatever is beneath that one.
                let there = self.backed(range);
                if there.is_empty() { nothing } else { backing.shows_beneath(layers - 1, there) }
            }
            _ => nothing,
        }
    }

    /// True if `range`, which is not allocated here, reads as zeroes as far as can be told without reading.
    pub(super) fn backing_is_zero(&self, range: ByteRange) -> bool {
        let mut rest = self.backed(range);
        while !rest.is_empty() {
            let extent = self.status_in_backing(rest, false);
            if extent.status == ExtentStatus::Data || extent.range.is_empty() {
                return false;
            }
            rest = ByteRange::from_bounds(extent.range.end(), rest.end());
        }
        true
    }
}
