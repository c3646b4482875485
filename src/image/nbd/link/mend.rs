//! How a link comes back: connected, checked, told what it may have lost.

use std::time::Duration;

use super::{BACK_OFF_MAX, BACK_OFF_MIN, Link, Phase, State};
use crate::image::nbd::connection::{Connection, Export};
use crate::image::nbd::replay::Replay;
use crate::sync::{Arc, Instant, wait_until};

impl Link {
    /// Makes lost connections anew, until the link is closed.
    pub(super) fn mend(self: &Arc<Self>) {
        let mut wait = BACK_OFF_MIN;
        // When it was connected last.
        let mut up = None;
        loop {
            let (old, generation) = {
                let mut state = self.state.lock();
                while matches!(state.phase, Phase::Up) {
                    self.changed.wait(&mut state);
                }
                (std::mem::take(&mut state.connections), state.generation)
            };
            old.iter().for_each(|connection| connection.close());
            drop(old);
            if up.take().is_some_and(|up: Instant| up.elapsed() < BACK_OFF_MAX) {
                // A server that takes every connection and keeps none is not asked without a pause.
                self.pause(BACK_OFF_MIN);
            }
            {
                let mut state = self.state.lock();
                while state.ended < state.made && matches!(state.phase, Phase::Down { .. }) {
                    self.changed.wait(&mut state);
                }
                if !matches!(state.phase, Phase::Down { .. }) {
                    if matches!(state.phase, Phase::Closed) {
                        return;
                    }
                    // Broken: nothing is to be done but to wait for the end.
                    self.changed.wait(&mut state);
                    continue;
                }
                (state.made, state.ended, state.generation) = (0, 0, generation + 1);
            }
            match self.revive(generation + 1) {
                Ok(()) => (wait, up) = (BACK_OFF_MIN, Some(Instant::now())),
                Err(why) => {
                    let mut state = self.state.lock();
                    if let Phase::Down { reason, .. } = &mut state.phase {
                        if *reason != why {
                            log::warn!("{}: no connection: {why}", self.uri);
                            *reason = why;
                        }
                    }
                    drop(state);
                    self.pause(wait);
                    wait = (wait * 2).min(BACK_OFF_MAX);
                }
            }
        }
    }

    /// Waits so long, or until the link is closed.
    fn pause(&self, wait: Duration) {
        let until = Instant::now() + wait;
        let mut state = self.state.lock();
        while !matches!(state.phase, Phase::Closed) && wait_until(&self.changed, &mut state, Some(until)) {}
    }

    /// Connects, checks that it is the same export, and sends again what was kept.
    fn revive(self: &Arc<Self>, generation: u64) -> Result<(), String> {
        let first = self.connect(generation).map_err(|why| why.to_string())?;
        let checked = self.check(&first.export).and_then(|()| self.send_again(&first));
        let mut state = self.state.lock();
        state.connections.push(first.clone());
        checked?;
        state.export = first.export.clone();
        drop(state);
        self.add_connections(generation);
        let mut state = self.state.lock();
        if state.ended > 0 {
            return Err("the connection was lost again".to_owned());
        }
        if let Phase::Down { since, .. } = &state.phase {
            log::info!("{}: connected again after {:.1} s", self.uri, since.elapsed().as_secs_f64());
            state.phase = Phase::Up;
            state.lost = None;
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Another server may listen there by now.
    fn check(&self, export: &Export) -> Result<(), String> {
        let first = &self.first;
        if export.size_bytes != first.size_bytes {
            return Err(format!("the export has {} bytes now, and had {}", export.size_bytes, first.size_bytes));
        }
        if self.writable && export.read_only {
            return Err("the export is read-only now".to_owned());
        }
        let durable_no_more =
            (first.keeps() && !export.keeps()) || (first.writes_through() && !export.can_fua && self.writable);
        if export.block_bytes > first.block_bytes || durable_no_more {
            return Err("the server can do less now than it could".to_owned());
        }
        Ok(())
    }

    fn send_again(&self, connection: &Connection) -> Result<(), String> {
        let kept = self.kept.all();
        Replay::new(connection, self.patience.answer, &kept, &|answers, waited| self.note_answer(answers, waited))
            .run()
            .map_err(|trouble| format!("changes that it has lost cannot be sent again ({trouble})"))?;
        if !kept.is_empty() {
            log::info!("{}: {} changes that were not flushed were sent again", self.uri, kept.len());
        }
        Ok(())
    }

    /// The server has answered what was sent again, so far so many times: it is there, and who waits for it goes on waiting. One that
    /// dies over and over at the same place does not count.
    fn note_answer(&self, count: u64, waited: Duration) {
        let mut state = self.state.lock();
        let State { phase: Phase::Down { alive, answers, .. }, busy, .. } = &mut *state else { return };
        if count > *answers {
            *answers = count;
            *alive = Instant::now();
            *busy += waited;
        }
    }
}
