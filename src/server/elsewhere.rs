//! An unfinished mirror whose image is mounted at another place than before: the mount finds it, and goes on with it.
//!
//! The state belongs to a mountpoint. Where it lies is told by the pair's mark on the image; of an image that carries no marks, by
//! the states of the same user.
//!
//! ```text
//! intent log copied, durable -> our record names the mirror, durable -> mounted -> the other record forgets it
//!                                                                       not mounted: ours forgets it
//! ```
//!
//! A crash in between leaves it in two records. The first that goes on raises the generation on the images; by the other one they are
//! not trusted then, and everything is compared (rule 11). Nothing is taken from a state that is in use.

use std::path::{Path, PathBuf};

use super::ledger::Ledger;
use super::opening::{OpenedVolume, is_same, locked_descriptor};
use crate::error::{Error, Result};
use crate::state::paths::state_base;
use crate::state::{Marks, MountState, Pulse, Store, VolumeState};

/// The state of another mount, kept from everybody else while this lives.
struct Elsewhere {
    directory: PathBuf,
    store: Store,
    state: MountState,
    pulse: Option<Pulse>,
    /// The volumes whose mirrors were taken: what they are called there, and here.
    taken: Vec<(String, String)>,
}

/// What was taken over and is still in the other records.
#[must_use = "the other records still name the mirrors"]
#[derive(Default)]
pub(super) struct TakenOver(Vec<Elsewhere>);

/// Looks for unfinished mirrors of the images that are about to be mounted, and takes them over into what is known of each. `store` is
/// where it will be recorded.
///
/// # Errors
/// An image is the target of an unfinished mirror, so no whole disk, and `force` does not say that it is to be mounted all the same.
pub(super) fn take_over(opened: &mut [OpenedVolume], store: &Store, marks: &Marks, force: bool) -> Result<TakenOver> {
    let mut known = Vec::new();
    let mut counts = store.pulse().unwrap_or_default();
    for one in opened.iter_mut().filter(|one| one.state.mirror.is_none()) {
        for directory in candidates(one, marks) {
            let Some(found) = open(&mut known, &directory, store) else { continue };
            if !force {
                found.refuse_target(one)?;
            }
            match found.give(one, store) {
                Ok(false) => continue,
                Ok(true) => {
                    let theirs = found.taken.last().and_then(|(name, _)| found.pulse.as_ref()?.volumes.get(name));
                    counts.volumes.extend(theirs.map(|counts| (one.state.name.clone(), *counts)));
                }
                Err(error) => log::error!("{error}; the unfinished mirror of {} stays behind", one.image.name()),
            }
            break;
        }
    }
    known.retain(|found| !found.taken.is_empty());
    if !known.is_empty() {
        if let Err(error) = store.beat(&counts) {
            log::debug!("{error}");
        }
    }
    Ok(TakenOver(known))
}

impl TakenOver {
    /// The mount failed: the mirrors stay where they were.
    pub(super) fn give_back(self, ledger: &Ledger) {
        for (_, ours) in self.0.iter().flat_map(|found| &found.taken) {
            ledger.mirror_did_not_start(ours);
        }
    }

    /// Takes the mirrors out of the other records: ours is durable.
    pub(super) fn forget_elsewhere(self) {
        for Elsewhere { store, mut state, taken, .. } in self.0 {
            for (theirs, _) in &taken {
                if let Some(volume) = state.volume_mut(theirs) {
                    volume.mirror = None;
                    volume.mirror_target = None;
                }
            }
            match store.save(&state) {
                Ok(()) => {
                    let left = state.volumes.iter().filter_map(|volume| Some(volume.mirror.as_ref()?.job.clone()));
                    store.remove_intent_logs_but(&left.collect::<Vec<_>>());
                }
                // The generation on the images tells that record that it is out of date.
                Err(error) => log::warn!("{}", Error::from(error)),
            }
        }
    }
}

/// The states in which an unfinished mirror of the image may be recorded.
fn candidates(one: &OpenedVolume, marks: &Marks) -> Vec<PathBuf> {
    let mark = locked_descriptor(&*one.image).and_then(|descriptor| marks.read_pair(descriptor).ok().flatten());
    if let Some(mark) = mark {
        return mark.state_dir.into_iter().collect();
    }
    let entries = state_base().ok().and_then(|base| std::fs::read_dir(base).ok());
    let mut directories: Vec<_> = entries.into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    directories.sort();
    directories
}

/// The state in `directory`, opened once, unless it is our own or in use.
fn open<'a>(known: &'a mut Vec<Elsewhere>, directory: &Path, own: &Store) -> Option<&'a mut Elsewhere> {
    if let Some(at) = known.iter().position(|found| found.directory == directory) {
        return known.get_mut(at);
    }
    if own.path().parent() == Some(directory) {
        return None;
    }
    let owner = nix::unistd::geteuid().as_raw();
    let open = || -> Result<Option<Elsewhere>> {
        let Some(store) = Store::open_existing(directory, owner)? else { return Ok(None) };
        let Some(state) = store.load()? else { return Ok(None) };
        if state.volumes.iter().all(|volume| volume.mirror.is_none()) {
            return Ok(None);
        }
        let store = store.claim()?;
        // Again: it may have been in use until now.
        let Some(state) = store.load()? else { return Ok(None) };
        let pulse = store.pulse();
        Ok(Some(Elsewhere { directory: directory.to_owned(), store, state, pulse, taken: Vec::new() }))
    };
    match open() {
        Ok(found) => known.push(found?),
        Err(error) => {
            log::debug!("{error}");
            return None;
        }
    }
    known.last_mut()
}

impl Elsewhere {
    fn refuse_target(&self, one: &OpenedVolume) -> Result<()> {
        let is_target = |known: &&VolumeState| {
            known.mirror.as_ref().is_some_and(|mirror| is_same(&mirror.target_identity, &one.state.active_identity))
        };
        let Some(source) = self.state.volumes.iter().find(is_target) else { return Ok(()) };
        let what = format!("the target of the unfinished mirror of {}, not a whole disk:", source.active);
        let advice = format!(
            "mount {} at {} and finish or cancel the mirror; --force mounts the target all the same",
            source.active,
            self.state.mountpoint.display()
        );
        Err(Error::not_now(what).on(one.image.name()).advise(advice))
    }

    /// Hands over the unfinished mirror of the image, if there is one. False: there is none.
    fn give(&mut self, to: &mut OpenedVolume, store: &Store) -> Result<bool> {
        let same = |identity| is_same(identity, &to.state.active_identity);
        let Some(from) = self.state.volumes.iter().find(|known| known.mirror.is_some() && same(&known.active_identity))
        else {
            return Ok(false);
        };
        let Some(mut record) = from.mirror.clone() else { return Ok(false) };
        store.take_intent_log(&self.store, &record.job)?;
        // Dated by the pulse that goes with it.
        let pulse_ns = self.pulse.as_ref().map(|pulse| pulse.when_ns);
        record.source_stamp = record.source_stamp.after_death(pulse_ns);
        record.target_stamp = record.target_stamp.after_death(pulse_ns);
        log::info!(
            "{}: its mirror to {}, unfinished at {}, goes on here",
            to.image.name(),
            record.options.target,
            self.state.mountpoint.display()
        );
        let state = &mut to.state;
        state.mirror = Some(record);
        state.mirror_target.clone_from(&from.mirror_target);
        state.size_bytes = from.size_bytes;
        if from.generation > state.generation {
            state.generation = from.generation;
            state.superseded.clone_from(&from.superseded);
        }
        self.taken.push((from.name.clone(), state.name.clone()));
        Ok(true)
    }
}
