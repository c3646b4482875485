//! What the intent log asks of a job before it clears a region's bit (rule 2).

use std::time::Duration;

use crate::sync::atomic::Ordering::SeqCst;

use super::job::{Job, Live};
use super::types::Operation;
use crate::dirty::Clearing;
use crate::error::{Error, Result};
use crate::range::ByteRange;
use crate::sync::{Arc, Instant};

/// A flush of the target that takes longer is not waited for: nothing is cleared, and it is asked again later.
const FLUSH_PATIENCE: Duration = Duration::from_secs(30);

struct JobClearing {
    job: Arc<Job>,
    live: Live,
}

/// Lets the intent log of `job`, if it has one, clear what was copied, until it is detached.
pub(super) fn attach(job: &Arc<Job>, live: &Live) {
    if let Some(intent) = &job.intent {
        intent.attach(Arc::new(JobClearing { job: job.clone(), live: live.clone() }));
    }
}

impl Clearing for JobClearing {
    fn is_quiet(&self, range: ByteRange) -> bool {
        // While a cutover is undecided guests' writes go to both images past the dirty map: nothing is known of them here.
        let known = !self.job.frozen.load(SeqCst);
        // What the scan has not reached is not dirty yet, and not copied either.
        known && self.job.counters.scanned_to.load(SeqCst) >= range.end() && self.live.map.is_quiet(range)
    }

    fn failed_flushes(&self) -> u64 {
        self.live.target.failed_flushes()
    }

    fn flush_both(&self) -> Result<()> {
        // Over the target's queue: one that hangs must not keep the job from ending.
        let ticket = self.live.tracking.queue().submit_flush();
        let late = || Error::not_now("flushing the target takes long:").on(self.live.target.image().name());
        let mut flushed = None;
        let deadline = Instant::now() + FLUSH_PATIENCE;
        while let (None, Some(ticket)) = (&flushed, &ticket) {
            if self.job.stopping.load(SeqCst) || Instant::now() >= deadline {
                break;
            }
            flushed = ticket.wait(Some(Instant::now() + Duration::from_millis(100)));
        }
        let (result, _) = flushed.ok_or_else(late)?;
        if let Err(error) = result {
            self.job.copy_failed(Operation::Write, error.clone());
            return Err(error);
        }
        self.job.volume().flush_for_mirror()
    }
}
