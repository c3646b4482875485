//! The jobs of a mount: who runs, who has ended, and what the record says of it.

use super::ledger::Ledger;
use crate::mirror::job::{Job, JobObserver};
use crate::mirror::types::{JobStatus, LastMirror, MirrorResult};
use crate::sync::{Arc, Condvar, Mutex};
use crate::volume::Volume;

/// The jobs of a mount, newest first. Concluded ones stay until they are dismissed.
pub(super) struct Jobs {
    ledger: Arc<Ledger>,
    list: Mutex<Vec<Arc<Job>>>,
    /// A job has left the list.
    left: Condvar,
}

impl Jobs {
    pub(super) fn new(ledger: Arc<Ledger>) -> Arc<Self> {
        Arc::new(Jobs { ledger, list: Mutex::default(), left: Condvar::new() })
    }

    pub(super) fn add(&self, job: Arc<Job>) {
        self.list.lock().insert(0, job);
    }

    /// All of them, newest first.
    pub(super) fn all(&self) -> Vec<Arc<Job>> {
        self.list.lock().clone()
    }

    pub(super) fn find(&self, id: &str) -> Option<Arc<Job>> {
        self.list.lock().iter().find(|job| job.id() == id).cloned()
    }

    /// True if a job has that id. One that has ended and dismisses itself has a step or two to go and is waited for: who sees
    /// its end may start the next.
    pub(super) fn has(&self, id: &str) -> bool {
        let mut list = self.list.lock();
        loop {
            match list.iter().find(|job| job.id() == id) {
                None => return false,
                Some(job) if job.dismisses_itself() && has_ended(job.status()) => self.left.wait(&mut list),
                Some(_) => return true,
            }
        }
    }

    /// The job that mirrors `volume` now.
    pub(super) fn running(&self, volume: &Volume) -> Option<Arc<Job>> {
        let list = self.list.lock();
        let on_volume = list.iter().filter(|job| std::ptr::eq(&**job.volume(), volume));
        on_volume.into_iter().find(|job| !has_ended(job.status())).cloned()
    }
}

impl JobObserver for Jobs {
    fn unpairing(&self, job: &Job) {
        self.ledger.unpair(job.volume(), job.target_image().as_deref());
    }

    fn ended(&self, job: &Job, outcome: &LastMirror) {
        if outcome.result != MirrorResult::Completed {
            self.ledger.parking.unpark(&outcome.target);
        }
        self.ledger.mirror_ended(job.volume().name(), outcome);
        self.ledger.remove_old_logs();
    }

    fn gone(&self, job: &Job) {
        self.list.lock().retain(|other| !std::ptr::eq(&**other, job));
        self.left.notify_all();
        crate::sys::process::give_back_memory();
    }
}

/// True if nothing more is copied by a job in that state.
pub(super) fn has_ended(status: JobStatus) -> bool {
    matches!(status, JobStatus::Concluded | JobStatus::Null)
}
