//! The pair of an unfinished mirror: made, raised at every start and stop, checked, and destroyed (rule 11).
//!
//! ```text
//! start:       log of all ones -> record names the job -> both images marked          (only then does tracking begin)
//! every start: look at the source before anybody uses it; at the target before anything of ours touches it
//! raising:     record says "raising" -> marks of both images -> record says the new generation
//! clean stop:  raise -> flush both -> look at both -> record what was seen; nothing touches them after
//! end:         record without the mirror (cancel, failure: durable before the first untracked write; cutover, finish: the one rename)
//! ```

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Weak;
use std::time::Duration;

use super::ledger::Ledger;
use super::opening::{is_same, locked_descriptor};
use crate::dirty::intent::Forget;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::state::{Marks, MirrorRecord, Observation, PairMark, Stamp};
use crate::sync::{Arc, Mutex, mpsc, thread};
use crate::volume::Volume;

/// How long guests wait for the record to forget a mirror whose log failed, before the images are asked.
const RECORD_PATIENCE: Duration = Duration::from_secs(1);

/// What a server that starts finds out about the source of an unfinished mirror. `held`: the keeper has kept the image locked, so that
/// nobody else had it in between.
pub(super) fn look_at_source(record: &mut MirrorRecord, source: &dyn Image, marks: &Marks, held: bool) {
    let suspicion = suspicion(record, source, marks, held, record.source_stamp, record.source_marked);
    distrust(record, "source", suspicion);
    record.source_stamp = Stamp::Running;
}

/// The same of its target, once that can be opened.
///
/// # Errors
/// It is an image of somebody else's.
pub(super) fn look_at_target(record: &mut MirrorRecord, target: &dyn Image, marks: &Marks, held: bool) -> Result<()> {
    let identity = target.identity()?;
    let other = !is_same(&identity, &record.target_identity);
    if other && !held {
        refuse_foreign(record, target, marks)?;
    }
    let suspicion = match other {
        true => Some("another file lies there".to_owned()),
        false => suspicion(record, target, marks, held, record.target_stamp, record.target_marked),
    };
    distrust(record, "target", suspicion);
    record.target_identity = identity;
    // What somebody else has put there is not ours to remove.
    record.created_target &= !other;
    Ok(())
}

fn distrust(record: &mut MirrorRecord, which: &str, suspicion: Option<String>) {
    if let Some(why) = suspicion {
        let text = format!("the {which} may have been changed by others: {why}");
        log::warn!("{}: {text}; everything is compared", record.options.target);
        record.compare.get_or_insert(text);
    }
}

fn suspicion(
    record: &MirrorRecord,
    image: &dyn Image,
    marks: &Marks,
    held: bool,
    stamp: Stamp,
    marked: bool,
) -> Option<String> {
    let Some(descriptor) = locked_descriptor(image) else { return Some("it has no file".to_owned()) };
    let mark = match marks.read_pair(descriptor) {
        Ok(mark) => mark,
        Err(error) => return Some(error.to_string()),
    };
    if let Some(mismatch) = record.mismatch(marked, mark.as_ref()) {
        return Some(mismatch);
    }
    if held {
        return None;
    }
    match Observation::of(descriptor) {
        Ok(observed) => stamp.suspicion(observed.as_ref()),
        Err(error) => Some(error.to_string()),
    }
}

/// A file that was put in the target's place is written over only if nothing says that it is somebody's disk: a copy of the target that
/// came back from elsewhere without its attributes has the target's size at least.
fn refuse_foreign(record: &MirrorRecord, target: &dyn Image, marks: &Marks) -> Result<()> {
    let Some(descriptor) = locked_descriptor(target) else { return Ok(()) };
    let known = marks.id(descriptor)?.is_some_and(|id| Some(&id) != record.target_identity.id.as_ref());
    let paired = marks.read_pair(descriptor)?.is_some_and(|mark| mark.job != record.job);
    let size_bytes = target.size_bytes();
    let sized = [0, record.size_bytes, record.target_identity.size_bytes].contains(&size_bytes);
    let which = match (known || paired, sized) {
        (true, _) => "of livemirror's".to_owned(),
        (false, false) => format!("of {size_bytes} bytes"),
        (false, true) => return Ok(()),
    };
    let what = format!("what lies there now is not the target of the mirror but another image {which}:");
    Err(Error::new(ErrorKind::Failed, what)
        .on(target.name())
        .advise("put the right file there, or give the mirror up with `livemirror cancel`"))
}

impl Ledger {
    /// The record of the mirror of `volume`, if one is unfinished.
    pub(super) fn mirror(&self, volume: &str) -> Option<MirrorRecord> {
        self.volume(volume).and_then(|known| known.mirror)
    }

    /// Changes the record of the mirror of `volume`, if there is one.
    ///
    /// # Errors
    /// As [`Ledger::change`].
    pub(super) fn change_mirror(&self, volume: &str, change: impl FnOnce(&mut MirrorRecord)) -> Result<()> {
        self.change(|state| {
            if let Some(record) = state.volume_mut(volume).and_then(|volume| volume.mirror.as_mut()) {
                change(record);
            }
        })
    }

    /// Remembers a mirror, to be resumed should this server die; its intent log is durable already. Both images are marked.
    ///
    /// # Errors
    /// The record cannot be written, or an image's mark.
    pub(super) fn pair(&self, volume: &Volume, target: &dyn Image, record: MirrorRecord) -> Result<()> {
        let name = volume.name();
        self.change(|state| {
            if let Some(known) = state.volume_mut(name) {
                known.mirror_target = Some(record.options.target.clone());
                known.mirror = Some(record);
            }
        })?;
        self.raise(name, &*volume.active(), target)
    }

    /// Raises the generation in the record and on both images, which are in use from now on.
    ///
    /// # Errors
    /// One of the three cannot be written; then the pair may not be trusted by the next server.
    pub(super) fn raise(&self, volume: &str, source: &dyn Image, target: &dyn Image) -> Result<()> {
        self.change_mirror(volume, |record| {
            record.generation += 1;
            record.raising = true;
            record.source_stamp = Stamp::Running;
            record.target_stamp = Stamp::Running;
        })?;
        let Some(record) = self.mirror(volume) else { return Ok(()) };
        let state_dir = self.store.path().parent().map(Path::to_owned);
        let mark = PairMark { job: record.job, generation: record.generation, state_dir };
        let source_marked = self.mark_pair(source, &mark)?;
        let target_marked = self.mark_pair(target, &mark)?;
        self.change_mirror(volume, |record| {
            record.raising = false;
            (record.source_marked, record.target_marked) = (source_marked, target_marked);
        })
    }

    fn mark_pair(&self, image: &dyn Image, mark: &PairMark) -> Result<bool> {
        locked_descriptor(image).map_or(Ok(false), |descriptor| self.marks.write_pair(descriptor, mark))
    }

    /// Writes down how an unfinished mirror is left: flushed, and untouched from now on. Without `target`, that one was never used, or is
    /// left as after a crash. One that does not answer within `patience` is not waited for, and the pair not recorded as cleanly left.
    pub(super) fn leave(self: &Arc<Self>, volume: &Arc<Volume>, target: Option<Arc<dyn Image>>, patience: Duration) {
        let left = || -> Result<()> {
            let target_stamp = target.map(|target| self.leave_target(volume, target, patience)).transpose()?;
            let source = volume.active();
            source.flush()?;
            let source_stamp = stamp_of(&*source)?;
            // Here only: who is late records nothing.
            self.change_mirror(volume.name(), |record| {
                record.source_stamp = source_stamp;
                if let Some(stamp) = target_stamp {
                    record.target_stamp = stamp;
                }
            })
        };
        if let Err(error) = left() {
            log::error!("{error}; the mirror of {} will be checked when it goes on", volume.name());
        }
    }

    /// Raises the pair and flushes the target; what it looks like then. On a thread of its own: a target that hangs keeps that thread, and
    /// what it raises late is still a pair in use.
    fn leave_target(
        self: &Arc<Self>,
        volume: &Arc<Volume>,
        target: Arc<dyn Image>,
        patience: Duration,
    ) -> Result<Stamp> {
        let (sender, receiver) = mpsc::channel();
        let name = target.name().to_owned();
        let (ledger, volume) = (self.clone(), volume.clone());
        let leave = move || {
            let stamp = ledger.raise(volume.name(), &*volume.active(), &*target).and_then(|()| {
                target.flush()?;
                stamp_of(&*target)
            });
            // It may be the last to use it.
            drop(target);
            _ = sender.send(stamp);
        };
        let failed = |error: std::io::Error| Error::io("cannot start a thread", &error);
        thread::Builder::new().name("leave".into()).spawn(leave).map_err(failed)?;
        let late = || Error::not_now("the target of the mirror does not answer:").on(name);
        receiver.recv_timeout(patience).unwrap_or_else(|_| Err(late()))
    }

    /// Destroys the pairing, durably, by whichever means works (rule 11): the record, or either image's mark.
    pub(super) fn unpair(&self, volume: &Volume, target: Option<&dyn Image>) {
        let Some(record) = self.mirror(volume.name()) else { return };
        let Err(error) = self.forget_mirror(volume.name()) else {
            for image in [Some(&*volume.active()), target].into_iter().flatten() {
                if let Some(Err(error)) = locked_descriptor(image).map(|descriptor| self.marks.clear_pair(descriptor)) {
                    log::warn!("{error}");
                }
            }
            return;
        };
        log::error!("{error}; the pair is untied on the images themselves");
        self.untie_images(&record, volume, target);
    }

    /// Takes an unfinished mirror out of the record: a server that dies while it runs has to give it up.
    fn forget_mirror(&self, volume: &str) -> Result<()> {
        self.change(|state| {
            if let Some(known) = state.volume_mut(volume) {
                known.mirror = None;
            }
        })
    }

    /// Takes the pair's mark from either image, durably.
    fn untie_images(&self, record: &MirrorRecord, volume: &Volume, target: Option<&dyn Image>) {
        let by_target = || target.filter(|_| record.target_marked).is_some_and(|target| self.untie_logged(target));
        let by_source = || record.source_marked && self.untie_logged(&*volume.active());
        if !by_target() && !by_source() {
            self.tell_still_paired(volume);
        }
    }

    fn tell_still_paired(&self, volume: &Volume) {
        log::error!("{}: a later mount may take its mirror for unfinished: cancel it then", volume.name());
    }

    /// True: the image says durably that it belongs to no pair.
    fn untie_logged(&self, image: &dyn Image) -> bool {
        let untied = locked_descriptor(image).map(|descriptor| self.untie(descriptor));
        untied.is_some_and(|untied| untied.inspect_err(|error| log::error!("{error}")).is_ok())
    }

    fn untie(&self, image: BorrowedFd<'_>) -> Result<()> {
        self.marks.clear_pair(image)?;
        self.marks.make_durable(image)
    }
}

/// What the intent log does when it cannot be kept: the mirror goes on, but no restart resumes it.
pub(super) struct Untie {
    ledger: Arc<Ledger>,
    volume: Arc<Volume>,
    /// Not kept open: the job decides when its lock ends.
    target: Mutex<Option<Weak<dyn Image>>>,
}

impl Untie {
    pub(super) fn new(ledger: &Arc<Ledger>, volume: &Arc<Volume>) -> Arc<Self> {
        Arc::new(Untie { ledger: ledger.clone(), volume: volume.clone(), target: Mutex::new(None) })
    }

    /// The target is there.
    pub(super) fn know(&self, target: &Arc<dyn Image>) {
        *self.target.lock() = Some(Arc::downgrade(target));
    }
}

impl Forget for Untie {
    fn forget(&self, _reason: &Error) {
        let Some(record) = self.ledger.mirror(self.volume.name()) else { return };
        let (sender, receiver) = mpsc::channel();
        // The record lies beside the log: where that does not answer, neither may it, and guests wait.
        self.means(&sender, |ledger, volume| ledger.forget_mirror(volume.name()).is_ok());
        if matches!(receiver.recv_timeout(RECORD_PATIENCE), Ok(true)) {
            return;
        }
        // Side by side, since one of the images may hang as well: the first that works is enough.
        let target = self.target.lock().as_ref().and_then(Weak::upgrade);
        if let Some(target) = target.filter(|_| record.target_marked) {
            self.means(&sender, move |ledger, _| ledger.untie_logged(&*target));
        }
        if record.source_marked {
            self.means(&sender, |ledger, volume| ledger.untie_logged(&*volume.active()));
        }
        drop(sender);
        if !receiver.iter().any(|done| done) {
            self.ledger.tell_still_paired(&self.volume);
        }
    }
}

impl Untie {
    /// Tries to destroy the pairing on a thread of its own, which then says whether it has.
    fn means(&self, says: &mpsc::Sender<bool>, means: impl FnOnce(&Ledger, &Volume) -> bool + Send + 'static) {
        let (ledger, volume, says) = (self.ledger.clone(), self.volume.clone(), mpsc::Sender::clone(says));
        let tried = move || _ = says.send(means(&ledger, &volume));
        if let Err(error) = thread::Builder::new().name("forget".into()).spawn(tried) {
            log::error!("{}", Error::io("cannot start a thread", &error));
        }
    }
}

fn stamp_of(image: &dyn Image) -> Result<Stamp> {
    locked_descriptor(image).map_or(Ok(Stamp::Unknown), |descriptor| Ok(Stamp::exact(Observation::of(descriptor)?)))
}
