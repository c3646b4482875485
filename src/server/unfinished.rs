//! A mirror that a server before this one did not finish, until its target is there to go on.
//!
//! ```text
//! start: record, log ──> guests are served, what they change is marked durably ──> target opened, checked ──> job goes on
//!                                          ^─────────── tried again, later and later ──────────┘ not there: paused
//! ```
//!
//! A mount never fails and never waits because of a target (an NFS share may not be up yet): all of this has a thread of its own.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use super::backend::Server;
use super::ledger::Ledger;
use super::opening::locked_descriptor;
use super::pairing::{self, Untie};
use super::scope;
use super::target;
use crate::dirty::IntentLog;
use crate::dirty::intent::{JobId, Settings};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{OpenOptions, Role, open};
use crate::mirror::Resumed;
use crate::mirror::types::{JobInfo, SyncMode};
use crate::range::ByteRange;
use crate::state::{Counts, MirrorRecord};
use crate::sync::{Arc, Condvar, Instant, Mutex, thread, wait_until};
use crate::volume::Volume;

/// A target that is not there is looked for after this, then after twice as long, ...
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// ... and at least this often.
const RETRY_LAST: Duration = Duration::from_secs(30);
/// How long guests' writes under way are waited for, where an unfinished mirror is given up.
const BARRIER_PATIENCE: Duration = Duration::from_secs(2);

/// See the module.
pub(super) struct Unfinished {
    pub(super) volume: Arc<Volume>,
    intent: Arc<IntentLog>,
    untie: Arc<Untie>,
    counts: Counts,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The target's locked descriptor, if the keeper has kept it.
    parked: Option<OwnedFd>,
    /// ... since the last server used it.
    held: bool,
    last_error: Option<Error>,
    /// It goes on, or was given up.
    over: bool,
    try_now: bool,
}

/// What a guest wrote since the mirror began cannot be found out by comparing.
fn refuse_unknown_writes(record: &MirrorRecord) -> Result<()> {
    match (&record.compare, record.options.sync) {
        (Some(why), SyncMode::None) => {
            let what = format!("a mirror of what is written from its start on (--sync none) cannot go on, as {why}:");
            Err(Error::new(ErrorKind::Failed, what).on(record.options.target.clone()))
        }
        _ => Ok(()),
    }
}

impl Unfinished {
    /// Finds the log of an unfinished mirror and sees to it that guests' changes are marked in it from the first on.
    ///
    /// # Errors
    /// There can be no log: then the mirror is lost.
    pub(super) fn find(
        ledger: &Arc<Ledger>,
        volume: &Arc<Volume>,
        record: &MirrorRecord,
        parked: Option<OwnedFd>,
        counts: Counts,
    ) -> Result<Arc<Unfinished>> {
        if volume.size_bytes() != record.size_bytes {
            let what = format!(
                "the disk had {} bytes when its mirror began, and has {} now:",
                record.size_bytes,
                volume.size_bytes()
            );
            return Err(Error::new(ErrorKind::Failed, what).on(volume.name()));
        }
        refuse_unknown_writes(record)?;
        let untie = Untie::new(ledger, volume);
        let settings = Settings::new(record.options.max_guest_delay, untie.clone());
        let path = ledger.store.intent_log(&record.job);
        let job = JobId::from_hex(&record.job)
            .ok_or_else(|| Error::new(ErrorKind::Corrupt, "the record names no job:").on(&*record.job))?;
        let intent = match record.compare {
            Some(_) => IntentLog::create(&path, job, record.size_bytes, settings)?,
            None => IntentLog::open(&path, job, record.size_bytes, settings)?.0,
        };
        let intent = Arc::new(intent);
        if let Some(raised) = volume.raise_barrier(None) {
            volume.set_intent(&raised, intent.clone());
        }
        let state = State { held: parked.is_some(), parked, last_error: None, over: false, try_now: false };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        Ok(Arc::new(Unfinished { volume: volume.clone(), intent, untie, counts, state, changed }))
    }

    /// Goes on as soon as that is possible; for a thread of its own.
    pub(super) fn run(&self, server: &Server) {
        let mut wait = RETRY_FIRST;
        loop {
            match self.attempt(server) {
                Ok(()) => break,
                Err(error) => {
                    let mut state = self.state.lock();
                    if state.last_error.as_ref().map(Error::to_string) != Some(error.to_string()) {
                        log::warn!("{}: its mirror is paused: {error}", self.volume.name());
                    }
                    state.last_error = Some(error);
                }
            }
            let until = Instant::now() + wait;
            let mut state = self.state.lock();
            while !state.over && !state.try_now && wait_until(&self.changed, &mut state, Some(until)) {}
            state.try_now = false;
            if state.over {
                break;
            }
            wait = (wait * 2).min(RETRY_LAST);
        }
        server.forget_unfinished(self);
    }

    /// Tries at once.
    pub(super) fn hurry(&self) {
        self.state.lock().try_now = true;
        self.changed.notify_all();
    }

    /// Opens the target, checks it and starts the job.
    fn attempt(&self, server: &Server) -> Result<()> {
        let Some(mut record) = server.ledger.mirror(self.volume.name()) else { return self.end_as_lost(server, None) };
        let path = PathBuf::from(&record.options.target);
        let path = path.as_path();
        // The keeper holds its own copy, and so its locks: a later attempt could not lock the target anew.
        let parked = self.state.lock().parked.as_ref().map(OwnedFd::try_clone).transpose();
        let parked = parked
            .map_err(|error| Error::io("cannot use the parked target", &error).on(record.options.target.clone()))?;
        let held = self.state.lock().held;
        target::refuse_own(&server.volumes, path)?;
        let options = OpenOptions {
            format: record.options.format,
            writable: true,
            cache: record.options.target_cache.unwrap_or(server.config.cache),
            role: Role::Target,
            descriptor: parked,
            reconnect: record.options.reconnect.unwrap_or(server.config.reconnect),
            insist: None,
        };
        let target = open(path, &options)?;
        let (_, above_base) = scope::find(&*self.volume.active(), record.options.clone())?;
        scope::check_target(&*self.volume.active(), above_base, &*target)?;
        let trusted = record.compare.is_none();
        pairing::look_at_target(&mut record, &*target, &server.ledger.marks, held)?;
        if target.size_bytes() < record.size_bytes {
            target.resize(record.size_bytes)?;
            record.compare.get_or_insert_with(|| "the target was shorter than the disk".to_owned());
        }
        let _one = server.starting.lock();
        if self.state.lock().over {
            return Ok(());
        }
        if let Err(error) = refuse_unknown_writes(&record) {
            log::error!("{error}");
            server.ledger.unpair(&self.volume, Some(&*target));
            drop(target);
            server.ledger.parking.unpark(&record.options.target);
            return self.end_as_lost(server, Some(&error));
        }
        if let Some(descriptor) = locked_descriptor(&*target) {
            // What follows may fail after the keeper has it: then it is the keeper's locks that are in the way.
            let kept = descriptor.try_clone_to_owned();
            self.keep_parked(kept.ok());
        }
        if trusted && record.compare.is_some() {
            self.intent.mark_durably(ByteRange::new(0, record.size_bytes));
        }
        let checked = record;
        let same = server.ledger.mirror(self.volume.name()).is_some_and(|known| known.job == checked.job);
        if self.intent.is_broken() || !same {
            // The pairing was destroyed while the target was opened.
            return self.end_as_lost(server, None);
        }
        server.ledger.change_mirror(self.volume.name(), |known| {
            known.compare = checked.compare;
            known.created_target = checked.created_target;
            known.target_identity = checked.target_identity;
        })?;
        // With what users have told it meanwhile.
        let Some(record) = server.ledger.mirror(self.volume.name()) else { return self.end_as_lost(server, None) };
        server.ledger.parking.park(&*target);
        server.ledger.raise(self.volume.name(), &*self.volume.active(), &*target)?;
        self.untie.know(&target);
        server.resume_job(self, target, above_base, &record)?;
        self.state.lock().over = true;
        self.keep_parked(None);
        Ok(())
    }

    /// Closing one may wait for a target that does not answer: nobody else waits for that.
    fn keep_parked(&self, descriptor: Option<OwnedFd>) {
        let before = std::mem::replace(&mut self.state.lock().parked, descriptor);
        drop(before);
    }

    pub(super) fn intent(&self) -> &Arc<IntentLog> {
        &self.intent
    }

    /// How the job stood.
    pub(super) fn resumed(&self, record: &MirrorRecord) -> Resumed {
        let Counts { copied, zeroed, discarded, skipped, .. } = self.counts;
        Resumed { compare: record.compare.is_some(), paused: record.paused, copied, zeroed, discarded, skipped }
    }

    /// Gives the mirror up.
    ///
    /// # Errors
    /// It goes on already.
    pub(super) fn give_up(&self, server: &Server) -> Result<()> {
        let _one = server.starting.lock();
        if self.state.lock().over {
            return Err(Error::not_now("the mirror is just going on, try again:").on(self.volume.name()));
        }
        server.ledger.unpair(&self.volume, None);
        self.end_marking();
        Ok(())
    }

    /// The pairing is gone, durably: guests' changes need no marks any more.
    fn end_marking(&self) {
        // A write that is stuck in the source must not hold all the others for ever: they go on between two attempts.
        loop {
            if let Some(raised) = self.volume.raise_barrier(Some(Instant::now() + BARRIER_PATIENCE)) {
                self.volume.end_tracking(&raised);
                break;
            }
            thread::sleep(BARRIER_PATIENCE);
        }
        self.leave();
        self.keep_parked(None);
        self.intent.close();
    }

    /// Its log broke before it could go on, or `why`.
    fn end_as_lost(&self, server: &Server, why: Option<&Error>) -> Result<()> {
        if !self.state.lock().over {
            self.end_marking();
            server.ledger.mirror_is_lost(self.volume.name(), why);
        }
        Ok(())
    }

    /// The mount ends, or the mirror does.
    pub(super) fn leave(&self) {
        self.state.lock().over = true;
        self.changed.notify_all();
    }

    /// What `status` shows of it: paused, and why.
    pub(super) fn info(&self, record: &MirrorRecord) -> JobInfo {
        let last_error = self.state.lock().last_error.as_ref().map(crate::mirror::describe);
        record.info(&self.counts, self.intent.marked_bytes(), last_error)
    }
}
