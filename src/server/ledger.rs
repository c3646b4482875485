//! The record of a mount while it is served: one copy in memory, one on disk, and the cutover's one commit point (rule 15).
//!
//! Whoever changes it holds `saving` until it is written; whoever only looks takes `state`, under which nothing is waited for: where the
//! state's disk hangs, `status` answers and guests go on.

use std::path::Path;

use super::opening::locked_descriptor;
use super::parking::Parking;
use crate::error::{Error, Result};
use crate::fuse::KeeperLink;
use crate::image::{Identity, Image, sync_parent_directory};
use crate::mirror::cutover::{CommitFailure, Committer, Ending, PreparedRecord, Switch};
use crate::mirror::types::{LastMirror, MirrorResult};
use crate::state::{CommitError, Mark, Marks, MountState, PairMark, Prepared, Store, VolumeState};
use crate::sync::{Arc, Mutex, SystemTime};
use crate::volume::Volume;

/// See the module.
pub(super) struct Ledger {
    pub(super) store: Store,
    pub(super) marks: Marks,
    pub(super) parking: Parking,
    /// How often the record was changed, in memory at least. Held while it is written.
    pub(super) saving: Mutex<u64>,
    /// Changed under `saving` only.
    state: Mutex<MountState>,
}

/// A record in which a cutover is made, ready to be put in place.
struct LedgerRecord {
    ledger: Arc<Ledger>,
    prepared: Prepared,
    next: MountState,
    /// What [`Ledger::saving`] counted when it was prepared.
    changes: u64,
}

/// [`Ledger`] as the mirror knows it.
pub(super) struct LedgerCommitter(pub(super) Arc<Ledger>);

impl Ledger {
    pub(super) fn new(store: Store, marks: Marks, link: Arc<KeeperLink>, state: MountState) -> Arc<Self> {
        Arc::new(Ledger { store, marks, parking: Parking::new(link), saving: Mutex::new(0), state: Mutex::new(state) })
    }

    /// What is known of volume `name`.
    pub(super) fn volume(&self, name: &str) -> Option<VolumeState> {
        self.state.lock().volume(name).cloned()
    }

    /// How often the server was restarted, and how the last one ended.
    pub(super) fn restarts(&self) -> (u64, Option<String>) {
        let state = self.state.lock();
        (state.restarts, state.last_exit.clone())
    }

    /// Changes the record, in memory and on disk.
    ///
    /// # Errors
    /// It cannot be written; what is in memory is changed all the same, and the next save writes it.
    pub(super) fn change(&self, change: impl FnOnce(&mut MountState)) -> Result<()> {
        let mut changes = self.saving.lock();
        *changes += 1;
        let next = {
            let mut state = self.state.lock();
            change(&mut state);
            state.clone()
        };
        self.store.save(&next).map_err(Error::from)
    }

    /// Remembers that a mirror runs that cannot be resumed: should this server die, the next one says that the mirror died with it.
    ///
    /// # Errors
    /// The record cannot be written.
    pub(super) fn mirror_starts(&self, volume: &str, target: &str) -> Result<()> {
        self.change(|state| {
            if let Some(volume) = state.volume_mut(volume) {
                volume.mirror_target = Some(target.to_owned());
            }
        })
    }

    /// Writes down that a mirror that was unfinished cannot go on, and why, where that is known.
    pub(super) fn mirror_is_lost(&self, volume: &str, why: Option<&Error>) {
        let saved = self.change(|state| {
            if let Some(volume) = state.volume_mut(volume) {
                volume.mirror = None;
                volume.mirror_died();
                if let (Some(why), Some(last)) = (why, &mut volume.last_mirror) {
                    last.error = Some(crate::mirror::describe(why));
                }
            }
        });
        if let Err(error) = saved {
            log::error!("{error}");
        }
    }

    /// Takes back what was written of a mirror that did not start.
    pub(super) fn mirror_did_not_start(&self, volume: &str) {
        let saved = self.change(|state| {
            if let Some(volume) = state.volume_mut(volume) {
                volume.mirror_target = None;
                volume.mirror = None;
            }
        });
        if let Err(error) = saved {
            log::error!("{error}");
        }
        self.remove_old_logs();
    }

    /// Removes the intent logs of mirrors that are over.
    pub(super) fn remove_old_logs(&self) {
        let state = self.state.lock();
        let unfinished = state.volumes.iter().filter_map(|volume| volume.mirror.as_ref());
        let jobs: Vec<String> = unfinished.map(|record| record.job.clone()).collect();
        drop(state);
        self.store.remove_intent_logs_but(&jobs);
    }

    /// Remembers how a mirror ended.
    pub(super) fn mirror_ended(&self, volume: &str, outcome: &LastMirror) {
        let saved = self.change(|state| {
            if let Some(volume) = state.volume_mut(volume) {
                volume.last_mirror = Some(outcome.clone());
                volume.mirror_target = None;
                volume.mirror = None;
            }
        });
        if let Err(error) = saved {
            log::error!("{error}");
        }
    }

    /// Writes down what a guest's chmod or chown made of the shown attributes.
    pub(super) fn shown_changed(&self, volume: &Volume) {
        let saved = self.change(|state| {
            if let Some(known) = state.volume_mut(volume.name()) {
                known.shown = Some(volume.shown());
            }
        });
        if let Err(error) = saved {
            log::error!("{error}");
        }
    }

    /// What `switches` need to know of the new images. Asks them, and so takes as long as they take: without locks.
    fn look_at(&self, switches: &[Switch]) -> Result<Vec<Found>> {
        let look = |switch: &Switch| {
            let identity = switch.new.identity()?;
            let mark = locked_descriptor(&*switch.new)
                .and_then(|descriptor| self.marks.read_mark(descriptor, &identity).unwrap_or(None));
            Ok(Found { identity, generation: mark.map_or(0, |mark| mark.generation) })
        };
        switches.iter().map(look).collect()
    }
}

/// A new image of a switch.
struct Found {
    identity: Identity,
    /// That of the mark it carries.
    generation: u64,
}

/// The record with `switches` made. Generations rise above every mark that the new images carry.
fn switched(state: &MountState, switches: &[Switch], found: Vec<Found>) -> Result<MountState> {
    let mut next = state.clone();
    for (switch, found) in switches.iter().zip(found) {
        let name = switch.volume.name();
        let volume = next.volume_mut(name).ok_or_else(|| Error::usage("no such volume in the record:").on(name))?;
        volume.mirror_ended(switch.new.name(), MirrorResult::Completed);
        volume.generation = volume.generation.max(found.generation);
        let size_bytes = switch.volume.size_bytes();
        volume.size_bytes = (switch.new.size_bytes() > size_bytes).then_some(size_bytes);
        volume.cut_over(switch.new.name().to_owned(), found.identity, switch.new.format());
        volume.cache = switch.cache;
    }
    Ok(next)
}

/// The record in which the mirrors of `switches` have left copies.
fn finished(state: &MountState, switches: &[Switch]) -> MountState {
    let mut next = state.clone();
    for switch in switches {
        if let Some(volume) = next.volume_mut(switch.volume.name()) {
            volume.mirror_ended(switch.new.name(), MirrorResult::Finished);
        }
    }
    next
}

impl Committer for LedgerCommitter {
    fn prepare(&self, switches: &[Switch], ending: Ending) -> Result<Box<dyn PreparedRecord>> {
        let ledger = &self.0;
        for switch in switches.iter().filter(|_| ending == Ending::Switch) {
            if let Some(descriptor) = locked_descriptor(&*switch.new) {
                ledger.marks.ensure_id(descriptor)?;
            }
            if let Some(path) = switch.new.path() {
                sync_parent_directory(&path)?;
            }
            // Parked before the record can name it: a server that dies right after the rename finds it.
            ledger.parking.park(&*switch.new);
        }
        let found = if ending == Ending::Switch { ledger.look_at(switches)? } else { Vec::new() };
        // Under the lock: a change of the record after the copy was taken is noticed by the commit.
        let changes = ledger.saving.lock();
        let state = ledger.state.lock().clone();
        let next = match ending {
            Ending::Switch => switched(&state, switches, found)?,
            Ending::Copy => finished(&state, switches),
        };
        let prepared = ledger.store.prepare(&next)?;
        Ok(Box::new(LedgerRecord { ledger: ledger.clone(), prepared, next, changes: *changes }))
    }

    fn supersede(&self, switches: &[Switch]) {
        for switch in switches {
            if let Err(error) = self.0.mark(switch) {
                log::error!("{error}; the record says it, but the image itself does not");
            }
        }
    }

    fn settle(&self, switches: &[Switch], made: bool) -> Result<()> {
        let found = if made { self.0.look_at(switches)? } else { Vec::new() };
        let mut changes = self.0.saving.lock();
        *changes += 1;
        let state = self.0.state.lock().clone();
        let next = if made { switched(&state, switches, found)? } else { state };
        self.0.store.save(&next).map_err(Error::from)?;
        *self.0.state.lock() = next;
        Ok(())
    }

    fn switched(&self, switches: &[Switch]) {
        for switch in switches {
            self.0.parking.unpark(switch.old.name());
            for image in [&switch.old, &switch.new] {
                let Some(descriptor) = locked_descriptor(&**image) else { continue };
                let marks = &self.0.marks;
                let settled = marks.clear_pair(descriptor).and_then(|()| marks.make_durable(descriptor));
                if let Err(error) = settled {
                    log::warn!("{error}");
                } else if Arc::ptr_eq(image, &switch.old) {
                    self.0.note_marked(switch);
                }
            }
        }
    }
}

impl Ledger {
    fn mark(&self, switch: &Switch) -> Result<()> {
        let Some(volume) = self.volume(switch.volume.name()) else { return Ok(()) };
        let mark = Mark {
            volume: volume.id,
            generation: volume.generation,
            successor: volume.active,
            successor_identity: volume.active_identity,
            successor_format: Some(volume.format),
            when: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        };
        let cleared = self.clear_mark(&*switch.new);
        let marked = match locked_descriptor(&*switch.old) {
            Some(descriptor) => self.marks.supersede(descriptor, &switch.old.identity()?, &mark),
            None => Ok(()),
        };
        // Both are tried, whatever becomes of the first.
        cleared.and(marked)
    }

    /// The old image's mark is durable, if it has it: no server after this one has to look at that image, which may hang by then.
    fn note_marked(&self, switch: &Switch) {
        let mark = locked_descriptor(&*switch.old)
            .and_then(|descriptor| self.marks.read_mark(descriptor, &switch.old.identity().ok()?).ok()?);
        let noted = self.change(|state| {
            let volume = state.volume_mut(switch.volume.name());
            let former = volume.and_then(|volume| volume.superseded.last_mut());
            if let Some(former) = former.filter(|former| former.path == switch.old.name()) {
                former.marked = mark.is_some_and(|mark| mark.generation >= former.generation);
            }
        });
        if let Err(error) = noted {
            log::warn!("{error}");
        }
    }

    /// A target that was made by copying the source with its attributes has the source's id; it gets one of its own.
    pub(super) fn tell_apart(&self, target: &dyn Image, source: &dyn Image) {
        let id = |image: &dyn Image| image.identity().ok().and_then(|identity| identity.id);
        let (Some(descriptor), Some(same)) = (locked_descriptor(target), id(target)) else { return };
        if id(source) == Some(same) {
            if let Err(error) = self.marks.renew_id(descriptor) {
                log::warn!("{error}");
            }
        }
    }

    /// An image that is active has no mark.
    pub(super) fn clear_mark(&self, image: &dyn Image) -> Result<()> {
        match locked_descriptor(image) {
            Some(descriptor) => self.marks.clear(descriptor, &image.identity()?),
            None => Ok(()),
        }
    }

    /// Makes the pair's mark on an image tell that its mirror is known here.
    pub(super) fn point_here(&self, image: &dyn Image) {
        let Some(descriptor) = locked_descriptor(image) else { return };
        let pointed = self.marks.read_pair(descriptor).and_then(|mark| match mark {
            Some(mark) => {
                let state_dir = self.store.path().parent().map(Path::to_owned);
                self.marks.write_pair(descriptor, &PairMark { state_dir, ..mark }).map(drop)
            }
            None => Ok(()),
        });
        if let Err(error) = pointed {
            log::warn!("{error}");
        }
    }

    /// Makes the mark of the active image say what the record says: a crash may have come between a cutover's rename and its marks. Called
    /// once the mount serves: a file of the marks' fallback may lie on any file system.
    pub(super) fn renew_mark(&self, volume: &Volume) {
        if let Err(error) = self.clear_mark(&*volume.active()) {
            log::warn!("{error}");
        }
    }

    /// The same for the image that the volume has left, if it may lack its mark. That one may hang: not on a thread that is needed.
    pub(super) fn renew_former_mark(&self, volume: &Volume) {
        let Some(known) = self.volume(volume.name()) else { return };
        let Some(former) = known.superseded.last().filter(|former| !former.marked) else { return };
        if let Err(error) = super::opening::mark_former(former, &known, &self.marks) {
            log::warn!("{error}");
        }
    }
}

impl PreparedRecord for LedgerRecord {
    fn commit(self: Box<Self>) -> Result<(), CommitFailure> {
        let changes = self.ledger.saving.lock();
        if *changes != self.changes {
            // Also one that could not be written: it would be forgotten.
            return Err(CommitFailure::NotDone(Error::not_now(
                "the mount's state was changed by something else meanwhile",
            )));
        }
        match self.prepared.commit() {
            Ok(()) => {
                *self.ledger.state.lock() = self.next;
                Ok(())
            }
            Err(CommitError::NotCommitted(error)) => Err(CommitFailure::NotDone(Error::not_now(error.to_string()))),
            Err(CommitError::Undecided(error)) => Err(CommitFailure::Undecided(error)),
        }
    }
}
