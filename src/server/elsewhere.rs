//! An unfinished mirror whose image is mounted at another place than before: the mount finds it, and goes on with it.
//!
//! The state belongs to a mountpoint. Where it lies is told by the pair's mark on the image; where that leads nowhere, by the states
//! of the same user.
//!
//! ```text
//! intent log copied, durable -> our record names the mirror, durable -> mounted -> the other record forgets it -> guests come
//!                                                                       not mounted: ours forgets it
//! ```
//!
//! A crash in between leaves it in two records. The first that goes on raises the generation on the images; by the other one they are
//! not trusted then, and everything is compared (rule 11). Nothing is taken from a state that is in use. A copy of the image has its
//! attributes, but not its mirror: it gets an id of its own.

use std::path::{Path, PathBuf};

use super::ledger::Ledger;
use super::opening::{OpenedVolume, is_same, locked_descriptor, recorded_mark};
use crate::error::{Error, Result};
use crate::image::{Format, Image, OpenOptions, Role, open};
use crate::state::paths::state_base;
use crate::state::{Mark, Marks, MountState, Pulse, Store, VolumeState};
use crate::sync::Arc;
use crate::volume::Volume;

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
        for directory in candidates(&*one.image, marks) {
            let Some(found) = look(&mut known, &directory, store, one) else { continue };
            if !force {
                found.refuse_target(one)?;
            }
            let Some(from) = found.mirror_of(one) else { continue };
            if is_copy(&from, one) {
                tell_apart(one, marks)?;
                break;
            }
            match found.give(&from, one, store) {
                Ok(()) => {
                    let theirs = found.pulse.as_ref().and_then(|pulse| pulse.volumes.get(&from.name));
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

    /// True if there is nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes the mirrors out of the other records: ours is durable. Before guests come: what they change is marked in our log only.
    pub(super) fn forget_elsewhere(self, ledger: &Ledger, volumes: &[Arc<Volume>]) {
        for Elsewhere { store, mut state, taken, .. } in self.0 {
            for (theirs, ours) in &taken {
                if let Some(volume) = state.volume_mut(theirs) {
                    volume.mirror = None;
                    volume.mirror_target = None;
                }
                if let Some(volume) = volumes.iter().find(|volume| volume.name() == ours) {
                    ledger.point_here(&*volume.active());
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

/// What other mounts' records say of an image that was left by a cutover: a crash may have kept the image itself from being marked.
/// `own` is the state directory of the mount that is being made.
pub(super) fn left_elsewhere(image: &dyn Image, own: &Path, marks: &Marks) -> Result<Option<Mark>> {
    let identity = image.identity()?;
    let owner = nix::unistd::geteuid().as_raw();
    let load = |directory: &PathBuf| Store::open_existing(directory, owner).ok()??.load().ok()?;
    let others: Vec<_> = candidates(image, marks).iter().filter(|other| *other != own).filter_map(load).collect();
    let volumes = || others.iter().flat_map(|state| &state.volumes);
    let active = volumes().filter(|known| is_same(&known.active_identity, &identity));
    let active = active.map(|known| known.generation).max().unwrap_or(0);
    let left = volumes().filter_map(|known| recorded_mark(known, &identity));
    Ok(left.filter(|mark| mark.generation > active).max_by_key(|mark| mark.generation))
}

/// The states in which an unfinished mirror of the image may be recorded, the likeliest first.
fn candidates(image: &dyn Image, marks: &Marks) -> Vec<PathBuf> {
    let mark = locked_descriptor(image).and_then(|descriptor| marks.read_pair(descriptor).ok().flatten());
    let told = mark.and_then(|mark| mark.state_dir);
    let entries = state_base().ok().and_then(|base| std::fs::read_dir(base).ok());
    let mut others: Vec<_> = entries.into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    others.sort();
    others.retain(|other| Some(other) != told.as_ref());
    told.into_iter().chain(others).collect()
}

/// The state in `directory`, opened once, unless it is our own, in use, or knows nothing of the image.
fn look<'a>(
    known: &'a mut Vec<Elsewhere>,
    directory: &Path,
    own: &Store,
    one: &OpenedVolume,
) -> Option<&'a mut Elsewhere> {
    if let Some(at) = known.iter().position(|found| found.directory == directory) {
        return known.get_mut(at);
    }
    if own.path().parent() == Some(directory) {
        return None;
    }
    let owner = nix::unistd::geteuid().as_raw();
    let open = || -> Result<Option<Elsewhere>> {
        let Some(store) = Store::open_existing(directory, owner)? else { return Ok(None) };
        // Not claimed before it is known to concern us: its own server may be about to start.
        if !store.load()?.is_some_and(|state| concerns(&state, one)) {
            return Ok(None);
        }
        let store = store.try_claim()?;
        // Again: it may have been in use until now.
        let Some(state) = store.load()?.filter(|state| concerns(state, one)) else { return Ok(None) };
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

/// True if the image is source or target of an unfinished mirror of that mount.
fn concerns(state: &MountState, one: &OpenedVolume) -> bool {
    let ours = &one.state.active_identity;
    let is_one = |known: &VolumeState| {
        known
            .mirror
            .as_ref()
            .is_some_and(|mirror| is_same(&known.active_identity, ours) || is_same(&mirror.target_identity, ours))
    };
    state.volumes.iter().any(is_one)
}

/// True if the image that the mirror belongs to is still at its place, and is another file than this one with the same id.
fn is_copy(from: &VolumeState, one: &OpenedVolume) -> bool {
    let ours = &one.state.active_identity;
    if ours.id.is_none() || one.image.name() == from.active {
        return false;
    }
    let options = OpenOptions { role: Role::Observer, format: Some(Format::Raw), ..OpenOptions::default() };
    let original = open(Path::new(&from.active), &options).and_then(|image| image.identity());
    original
        .is_ok_and(|original| original.id == ours.id && (original.device, original.inode) != (ours.device, ours.inode))
}

/// Gives a copy an id of its own, and takes from it what it says of a pair.
fn tell_apart(one: &mut OpenedVolume, marks: &Marks) -> Result<()> {
    let Some(descriptor) = locked_descriptor(&*one.image) else { return Ok(()) };
    log::info!("{}: a copy of the source of an unfinished mirror, which stays with its own image", one.image.name());
    marks.clear_pair(descriptor)?;
    if let Some(id) = marks.renew_id(descriptor)? {
        one.state.id = id;
    }
    one.state.active_identity = one.image.identity()?;
    Ok(())
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

    /// What is known of the image, if it is the source of an unfinished mirror.
    fn mirror_of(&self, one: &OpenedVolume) -> Option<VolumeState> {
        let same = |known: &&VolumeState| is_same(&known.active_identity, &one.state.active_identity);
        self.state.volumes.iter().filter(|known| known.mirror.is_some()).find(same).cloned()
    }

    /// Hands over the unfinished mirror.
    fn give(&mut self, from: &VolumeState, to: &mut OpenedVolume, store: &Store) -> Result<()> {
        let Some(mut record) = from.mirror.clone() else { return Ok(()) };
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
        Ok(())
    }
}
