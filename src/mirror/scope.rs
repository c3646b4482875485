//! What of the disk a mirror is about, where that is not all of it (`sync` other than `full`).
//!
//! ```text
//! top:   source: top layer -> (more) -> base -> ...        target: its own layer -> base -> ...
//!        what both show of the base is the same: it is not copied, and takes no room in the target
//! none:  only what guests write from now on; what was there before is nobody's concern
//! ```
//!
//! With `top` a granule that is not dirty means what it always means: both images read the same there. With `none` it
//! means that no guest has written there since.

use super::job::{Job, Live};
use super::types::SyncMode;
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;

/// The first part of `range` that source and target both have from the base beneath them. Empty, unless the mirror is one of the
/// top of a chain.
///
/// To be asked after the bits were cleared, as for extents (rule 3).
pub(super) fn common(job: &Job, live: &Live, range: ByteRange) -> ByteRange {
    let shown = live.source.shows_beneath(job.layers, range);
    if shown.is_empty() { shown } else { live.target.image().shows_beneath(1, shown) }
}

impl Job {
    /// Fails unless the target is to have all of the disk.
    pub(super) fn check_whole(&self, what: &str) -> Result<()> {
        if self.options.sync != SyncMode::None {
            return Ok(());
        }
        let what = format!("cannot {what}: the target has only what was written since its mirror began (--sync none):");
        Err(Error::new(ErrorKind::Unsupported, what)
            .on(self.options.target.clone())
            .advise("'livemirror finish' ends this mirror; one with --sync full can be cut over"))
    }
}
