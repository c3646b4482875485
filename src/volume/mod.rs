//! The live disk: what the guest reads and writes.
//!
//! A volume has one *active* image. Everything that may change it goes one way, `Volume::modify`:
//!
//! ```text
//! enter the barrier -> intent durable -> change the active image -> mark the dirty map -> leave -> reply
//! ```
//!
//! Invariants:
//! - the active image and the tracking change only while the barrier is up;
//! - nothing changes the active image before the intent log has its region's bit durably (rule 2);
//! - a change is marked after it was made, whether it succeeded or not (rule 3: a copier that cleared the bit earlier may have
//!   read old bytes; a failed write may have changed some of them);
//! - a target's error, stall or lack of room never makes a guest's request fail (rule 6).

mod attributes;
pub mod barrier;
mod former;
mod guest;
pub mod request_times;
pub mod target;
pub mod target_queue;
#[cfg(test)]
mod tests;
pub mod tracking;
mod twin;

use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use arc_swap::{ArcSwap, ArcSwapOption};

pub use self::attributes::{AttributeChange, DiskAttributes, ShownAttributes};
use self::barrier::{Barrier, Raised};
use self::former::Former;
use self::request_times::RequestTimes;
use self::target::Target;
use self::tracking::Tracking;
use self::twin::Twin;
use crate::dirty::{DirtyMap, IntentLog};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::range::ByteRange;
use crate::sync::{Arc, Instant, Mutex, OnceLock};

/// How a volume is presented.
#[derive(Clone, Debug)]
pub struct VolumeOptions {
    /// File name in the mount.
    pub name: String,
    /// The volume's random id.
    pub id: String,
    /// No guest may write.
    pub read_only: bool,
    /// Guests may change the size.
    pub growable: bool,
    /// Owner and mode to show, where a guest's chmod or chown changed them.
    pub shown: ShownAttributes,
}

/// Keeps a disk's size as it is while it lives; guests that would change it are refused, as they are during the mirror.
#[must_use]
#[derive(Debug)]
pub struct PinnedSize<'a>(&'a Volume);

impl Drop for PinnedSize<'_> {
    fn drop(&mut self) {
        self.0.size_pinned.store(false, Relaxed);
    }
}

/// A live disk. See the module for the rules.
#[derive(Debug)]
pub struct Volume {
    options: VolumeOptions,
    active: ArcSwap<ActiveImage>,
    /// Receives every change too, while it is undecided which image is the active one (rule 15).
    twin: ArcSwapOption<Twin>,
    /// The active image as the target that it was, while its mirror has not ended.
    former: ArcSwapOption<Former>,
    tracking: ArcSwapOption<Tracking>,
    /// The durable shadow of the dirty map, while a mirror is unfinished: also while its target is not there.
    intent: ArcSwapOption<IntentLog>,
    barrier: Barrier,
    size_bytes: AtomicU64,
    /// Held while the size changes.
    resizing: Mutex<()>,
    /// A mirror is being started: the size it starts from must stay.
    size_pinned: AtomicBool,
    shown: Mutex<ShownAttributes>,
    shown_changed: OnceLock<Listener>,
    /// Somebody wants to hear of the next change.
    told_next: AtomicBool,
    changed: OnceLock<Listener>,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    request_times: Arc<RequestTimes>,
    /// A flush of the active image has failed: a later one that succeeds proves nothing about what was written before.
    flush_failed: AtomicBool,
    /// A failed flush that no guest asked for: Linux reports it once, and a guest's next flush must hear of it (rule 7).
    owed: Mutex<Option<Error>>,
}

/// Hears that a guest changed something; called on the guest's thread, without locks held.
struct Listener(Box<dyn Fn() + Send + Sync>);

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Listener")
    }
}

/// A sized box for the trait object, which `ArcSwap` needs.
#[derive(Debug)]
struct ActiveImage(Arc<dyn Image>);

/// One change of a disk, as guests make it.
#[derive(Clone, Copy, Debug)]
pub enum Change<'a> {
    /// New bytes.
    Write {
        /// Where.
        offset: u64,
        /// The bytes.
        data: &'a [u8],
    },
    /// Reads as zeroes, stays allocated.
    Zero(ByteRange),
    /// Reads as zeroes, its space is given back where that is possible.
    Discard(ByteRange),
}

impl Change<'_> {
    /// The bytes that it may change.
    pub fn range(&self) -> ByteRange {
        match self {
            Change::Write { offset, data } => ByteRange::new(*offset, data.len() as u64),
            Change::Zero(range) | Change::Discard(range) => *range,
        }
    }

    /// Makes the change on `image`.
    ///
    /// # Errors
    /// Those of the image. A discard that the image cannot do becomes a plain zeroing.
    pub fn apply(&self, image: &dyn Image) -> Result<()> {
        match self {
            Change::Write { offset, data } => image.write_at(*offset, data),
            Change::Zero(range) => image.write_zeroes(*range),
            Change::Discard(range) => match image.discard(*range) {
                Err(error) if error.kind() == ErrorKind::Unsupported => image.write_zeroes(*range),
                other => other,
            },
        }
    }
}

impl Volume {
    /// A volume that serves `image`.
    pub fn new(options: VolumeOptions, image: Arc<dyn Image>) -> Self {
        Volume {
            size_bytes: AtomicU64::new(image.size_bytes()),
            shown: Mutex::new(options.shown),
            size_pinned: AtomicBool::new(false),
            shown_changed: OnceLock::new(),
            told_next: AtomicBool::new(false),
            changed: OnceLock::new(),
            options,
            active: ArcSwap::from_pointee(ActiveImage(image)),
            twin: ArcSwapOption::empty(),
            former: ArcSwapOption::empty(),
            tracking: ArcSwapOption::empty(),
            intent: ArcSwapOption::empty(),
            barrier: Barrier::default(),
            resizing: Mutex::new(()),
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            request_times: Arc::default(),
            flush_failed: AtomicBool::new(false),
            owed: Mutex::new(None),
        }
    }

    /// A volume of the recorded size on an image that may be larger (a cutover never changes the disk's size).
    #[must_use]
    pub fn with_size(self, size_bytes: u64) -> Self {
        self.size_bytes.store(size_bytes, Relaxed);
        self
    }

    /// File name in the mount.
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// The volume's random id.
    pub fn id(&self) -> &str {
        &self.options.id
    }

    /// The disk's size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Relaxed)
    }

    /// Keeps the size as it is until the result is dropped. One at a time.
    pub fn pin_size(&self) -> PinnedSize<'_> {
        // Under the lock that every change of the size holds from its look to its end.
        let _resizing = self.resizing.lock();
        self.size_pinned.store(true, Relaxed);
        PinnedSize(self)
    }

    /// True if no guest may write.
    pub fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    /// True if guests may change the size.
    pub fn is_growable(&self) -> bool {
        self.options.growable
    }

    /// The image that serves the guest now.
    pub fn active(&self) -> Arc<dyn Image> {
        self.active.load().0.clone()
    }

    /// Bytes that guests read and wrote since the start.
    pub fn traffic(&self) -> (u64, u64) {
        (self.read_bytes.load(Relaxed), self.written_bytes.load(SeqCst))
    }

    /// `listener` hears of changes, whenever it has asked for the next one. One for the life of the volume.
    pub fn on_change(&self, listener: impl Fn() + Send + Sync + 'static) {
        let _ = self.changed.set(Listener(Box::new(listener)));
    }

    /// The listener hears of the next change of the content, once, when it was counted in [`Volume::traffic`]. Whoever looks at that after
    /// this call misses none.
    pub fn tell_next_change(&self) {
        self.told_next.store(true, SeqCst);
    }

    /// How long guests' requests take, for whoever watches.
    pub fn request_times(&self) -> &Arc<RequestTimes> {
        &self.request_times
    }

    /// Counts on from what a server before this one had counted.
    pub fn go_on_counting(&self, read_bytes: u64, written_bytes: u64) {
        self.read_bytes.fetch_add(read_bytes, Relaxed);
        self.written_bytes.fetch_add(written_bytes, Relaxed);
    }

    /// True if guests' changes are marked durably: a mirror is unfinished.
    pub fn is_marking(&self) -> bool {
        self.intent.load().is_some()
    }

    /// Raises the barrier: guest writes wait until the result is dropped. `None`: those under way took longer than `deadline`.
    pub fn raise_barrier(&self, deadline: Option<Instant>) -> Option<Raised<'_>> {
        self.barrier.raise(deadline)
    }

    /// Starts (or with `None` ends) dirty tracking. The raised barrier is the proof that no write is half tracked (rule 4).
    pub fn set_tracking(&self, _barrier: &Raised<'_>, tracking: Option<Arc<Tracking>>) {
        self.tracking.store(tracking);
    }

    /// Starts the durable marking of what guests change, before or together with the tracking.
    pub fn set_intent(&self, _barrier: &Raised<'_>, intent: Arc<IntentLog>) {
        self.intent.store(Some(intent));
    }

    /// Ends tracking and durable marking: the pairing of the images is over, durably (rule 11).
    pub fn end_tracking(&self, _barrier: &Raised<'_>) {
        self.tracking.store(None);
        self.intent.store(None);
    }

    /// The tracking that guest writes go through now, if any.
    pub fn tracking(&self) -> Option<Arc<Tracking>> {
        self.tracking.load_full()
    }

    /// Makes `target`'s image the active one and ends tracking. Reads that are under way end on the old image: they began before any
    /// write that the new one will get. The mirror may flush it still, until [`Volume::part_from`].
    ///
    /// A loss of the old image that no guest was told of is told by the next flush: the new image has what was read after it. What flushes of
    /// a file have met is not that: what is read there, and so is here, has the page cache kept.
    pub fn switch(&self, _barrier: &Raised<'_>, target: Arc<Target>, map: Arc<DirtyMap>) {
        let owed = self.active.load().0.owes();
        self.active.store(Arc::new(ActiveImage(target.image().clone())));
        // The mirror has heard of what it owes, and has copied all that again.
        target.image().told();
        self.former.store(Some(Arc::new(Former::new(target, map))));
        self.flush_failed.store(false, Relaxed);
        *self.owed.lock() = owed;
        self.tracking.store(None);
        self.intent.store(None);
        self.twin.store(None);
    }

    /// Sends every further change to `target` too, until [`Volume::switch`] or [`Volume::separate`]: nobody knows yet which of
    /// the two a restart would choose (rule 15). `target` has all that was written so far, durably.
    pub fn join(&self, _barrier: &Raised<'_>, target: Arc<Target>, map: Arc<DirtyMap>) {
        self.twin.store(Some(Arc::new(Twin::new(target, map))));
    }

    /// The mirror that had `target` as its own does not flush it any more. The guest's next flush fails if one of those has.
    pub fn part_from(&self, target: &Arc<Target>) {
        let Some(former) = self.former.load_full().filter(|former| former.is(target)) else { return };
        self.former.store(None);
        if let Err(error) = former.unheard() {
            self.owe(error);
        }
    }

    /// Ends [`Volume::join`].
    pub fn separate(&self, _barrier: &Raised<'_>) {
        self.twin.store(None);
    }

    /// Makes the joined target durable; true if it has all that was written. With the barrier raised: nothing is under way.
    pub fn make_twin_durable(&self, _barrier: &Raised<'_>) -> bool {
        self.twin.load().as_ref().is_none_or(|twin| {
            twin.flush();
            twin.is_whole()
        })
    }

    /// Flushes the active image for the mirror's own needs.
    ///
    /// # Errors
    /// This flush, or an earlier one of this image, failed. The next flush of a guest fails too, if it has not heard of it.
    pub fn flush_for_mirror(&self) -> Result<()> {
        if let Err(error) = self.flush_active() {
            self.owe(error.clone());
            return Err(error);
        }
        match self.flush_failed.load(Relaxed) {
            true => Err(Error::new(ErrorKind::Failed, "an earlier flush has failed:").on(self.active().name())),
            false => Ok(()),
        }
    }

    /// Flushes as a guest would, for nobody who could be told: the guest's next flush fails if this one has.
    ///
    /// # Errors
    /// As [`Volume::flush`].
    pub fn flush_unasked(&self) -> Result<()> {
        if self.options.read_only {
            return Ok(());
        }
        self.flush_images().inspect_err(|error| self.owe(error.clone()))
    }

    fn owe(&self, error: Error) {
        *self.owed.lock() = Some(error);
        self.flush_failed.store(true, Relaxed);
    }

    fn flush_active(&self) -> Result<()> {
        match &*self.former.load() {
            Some(former) => former.flush(),
            None => self.active.load().0.flush(),
        }
    }

    /// The one way of everything that may change the active image. The caller is inside the barrier.
    fn modify(&self, change: Change<'_>) -> Result<()> {
        let active = self.active.load();
        let twin = self.twin.load();
        let intent = self.intent.load();
        // Before the first byte changes (rule 2), and until the change is marked in the dirty map.
        let _passage = intent.as_ref().map(|log| log.enter(change.range()));
        let _order = twin.as_ref().map(|twin| twin.in_order());
        let result = match &*self.tracking.load() {
            None => change.apply(&*active.0),
            Some(tracking) => tracking.guest_change(&*active.0, change),
        };
        if let Some(twin) = &*twin {
            // What the disk holds after an error only the disk can tell.
            if let Err(error) = result.clone().and_then(|()| twin.apply(change)).inspect_err(|_| twin.fail()) {
                log::error!("{}: {error} while the cutover is undecided", self.name());
            }
        }
        self.written_bytes.fetch_add(change.range().len(), SeqCst);
        // A load but for the first one after a rest.
        if self.told_next.load(SeqCst) && self.told_next.swap(false, SeqCst) {
            if let Some(Listener(tell)) = self.changed.get() {
                tell();
            }
        }
        result
    }

    fn refuse_read_only(&self) -> Result<()> {
        if !self.options.read_only {
            return Ok(());
        }
        Err(Error::new(ErrorKind::ReadOnly, "the disk is mounted read-only:").on(self.name()))
    }
}
