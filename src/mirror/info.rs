//! The picture of a job that `status` and the QMP queries show.

use std::time::Duration;

use crate::sync::atomic::Ordering::Relaxed;

use super::job::{Job, Live, State};
use super::types::JobInfo;

impl Job {
    /// How the job stands; after its end, how it stood last.
    pub fn info(&self) -> JobInfo {
        // The epitaph is written before the images are released, so one of the two is always there.
        if let Some(live) = self.live() {
            return self.picture(&live);
        }
        let state = self.state.lock();
        let (info, outcome) = state.epitaph.as_ref().expect("a job without images has its epitaph");
        JobInfo { state: state.status, error: outcome.error.clone(), ..info.clone() }
    }

    pub(super) fn picture(&self, live: &Live) -> JobInfo {
        let dirty_bytes = live.map.dirty_bytes();
        let in_flight_bytes = live.map.in_flight_bytes();
        let copied_bytes = self.copied();
        // One picture: what was counted above contradicts a later look.
        let in_sync = dirty_bytes == 0 && in_flight_bytes == 0 && live.map.is_in_sync();
        let (dirtied, synchronous) = live.tracking.traffic();
        // What is dirty may be holes to clear; of data no more than was found and written since can be left.
        let found = self.counters.scanned_data.load(Relaxed).saturating_add(dirtied).saturating_sub(copied_bytes);
        let mut remaining = found.min(dirty_bytes + in_flight_bytes);
        let mut state = self.state.lock();
        if remaining == 0 && !(in_sync && state.scanned) {
            // Never 100 % while anything is dirty or unknown.
            remaining = live.map.granularity().bytes();
        }
        // Of what was shared nothing follows for what must be copied.
        state.drain.sample(copied_bytes.saturating_sub(self.sharing.shared_bytes()));
        state.dirtying.sample(dirtied);
        let gain = state.drain.bytes_per_second().saturating_sub(state.dirtying.bytes_per_second());
        let eta_seconds = match (state.ready, state.steered.in_time, gain) {
            (true, ..) => Some(0),
            (_, Some(_), _) => state.steered.ready_in.map(|left| left.as_secs_f64().ceil() as u64),
            (.., 0) => None,
            (.., gain) => Some(remaining.div_ceil(gain)),
        };
        JobInfo {
            job_id: self.id().to_owned(),
            target: self.options.target.clone(),
            sync: self.options.sync,
            state: state.status,
            copy_mode: state.copy_mode,
            granularity: live.map.granularity().bytes(),
            ready: state.ready,
            in_sync: in_sync && state.scanned,
            data_bytes: copied_bytes + remaining,
            copied_bytes,
            dirty_bytes,
            in_flight_bytes,
            zeroed_bytes: self.counters.zeroed.load(Relaxed),
            discarded_bytes: self.counters.discarded.load(Relaxed),
            shared_bytes: self.sharing.shared_bytes(),
            skipped_bytes: self.counters.skipped.load(Relaxed),
            source_allocated_bytes: live.source.allocated_bytes().unwrap_or(0),
            target_allocated_bytes: live.target.image().allocated_bytes().unwrap_or(0),
            dirty_bytes_per_second: state.dirtying.bytes_per_second(),
            drain_bytes_per_second: state.drain.bytes_per_second(),
            eta_seconds,
            speed: self.pacer.speed(),
            own_speed: self.pacer.own_speed(),
            guest_first_us: state.pace.guest_first.map(micros),
            guest_p99_us: state.steered.guest_p99.map(micros),
            finish_by: state.pace.finish_by.map(rfc3339),
            in_time: state.steered.in_time,
            io_status: state.io_status,
            last_error: state.last_error.as_ref().map(describe).or_else(|| self.cannot_be_resumed()),
            paused: State::is_paused(&state),
            busy: in_flight_bytes > 0,
            actively_synced: live.tracking.is_synchronous() && synchronous > 0 && dirty_bytes == 0,
            auto_finalize: self.options.auto_finalize,
            auto_dismiss: self.options.auto_dismiss,
            error: None,
        }
    }
}

impl Job {
    /// How fast granules become clean, in bytes per second.
    pub(super) fn clearing_rate(&self) -> u64 {
        let mut state = self.state.lock();
        state.clearing.sample(self.counters.cleared.load(Relaxed));
        state.clearing.bytes_per_second()
    }

    fn cannot_be_resumed(&self) -> Option<String> {
        let error = self.intent.as_ref()?.broken_by()?;
        Some(format!("{error}; the mirror goes on, but cannot be resumed after a restart"))
    }
}

/// Whole microseconds.
pub fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// `2026-01-31T20:15:00Z`, of a time since the epoch.
pub fn rfc3339(since_epoch: Duration) -> String {
    humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + since_epoch).to_string()
}

impl State {
    pub(super) fn is_paused(&self) -> bool {
        self.user_paused || self.error_paused
    }
}

/// An error and what can be done about it, on one line.
pub fn describe(error: &crate::error::Error) -> String {
    match error.advice() {
        Some(advice) => format!("{error} ({advice})"),
        None => error.to_string(),
    }
}
