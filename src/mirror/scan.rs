//! Which parts of the source the target needs: one walk over the source's extents, after tracking is on (rule 4).
//!
//! Data is marked dirty. Holes are passed over when the target was made for this job (it reads as zeroes), and marked when the
//! target held something before: stale data must go (rule 8). What both images have from one base is passed over too. The walk clears nothing, so a guest's mark is never lost to it. It
//! looks at one extent at a time and can be interrupted between any two.

use crate::sync::atomic::Ordering::{Relaxed, SeqCst};

use super::job::{Job, Live};
use super::scope::common;
use crate::image::ExtentStatus;
use crate::range::ByteRange;

/// Walks over `parts` of the source, in order; the copiers start with the first extent that is found.
pub(super) fn scan(job: &Job, live: &Live, parts: &[ByteRange]) {
    let disk = ByteRange::new(0, live.map.size_bytes());
    for part in parts {
        if !scan_part(job, live, part.intersect(disk)) {
            return;
        }
    }
    job.counters.scanned_to.store(u64::MAX, SeqCst);
    job.counters.passes.store(0, Relaxed);
    job.state.lock().scanned = true;
    job.wake();
}

/// False: the job ends.
fn scan_part(job: &Job, live: &Live, part: ByteRange) -> bool {
    let mut at = part.start();
    while at < part.end() {
        if job.stopping.load(SeqCst) {
            return false;
        }
        let common = common(job, live, ByteRange::from_bounds(at, part.end()));
        if !common.is_empty() {
            job.counters.skipped.fetch_add(common.len(), Relaxed);
            at = common.end();
            job.counters.scanned_to.store(at, SeqCst);
            continue;
        }
        let extent = live.source.extent_at(at);
        // An extent that does not move on would be a bug of the image; the rest is then data.
        let end = if extent.range.end() > at { extent.range.end() } else { part.end() };
        let range = ByteRange::from_bounds(at, end).intersect(part);
        match extent.status {
            ExtentStatus::Data => {
                job.counters.scanned_data.fetch_add(range.len(), Relaxed);
                live.map.mark(range);
            }
            ExtentStatus::Zero | ExtentStatus::Hole if job.fresh_target => {
                job.counters.skipped.fetch_add(range.len(), Relaxed);
            }
            ExtentStatus::Zero | ExtentStatus::Hole => {
                live.map.mark(range);
            }
        }
        at = range.end();
        // After the mark: nobody takes for clean what has not been looked at.
        job.counters.scanned_to.store(at, SeqCst);
    }
    true
}
