//! Copying by sharing: where both images lie on one file system that can (XFS, btrfs), the target gets the source's own blocks. Nothing
//! is read or written; it takes time in proportion to the extents, not to the bytes.
//!
//! ```text
//! turn (one copier at a time) -> claim (bits cleared) -> room? -> share -> finish
//!                                                   \- no, or refused: give back what was added, copy the rest
//! ```
//!
//! What keeps guests from harm:
//! - **Pieces are small.** The file system keeps the source's writers out while it shares a piece; how large the next one may be is told
//!   by how long the last ones took.
//! - **There is room.** A guest that overwrites a shared block needs another one (on a full file system: ENOSPC). So nothing is
//!   shared unless all of it could be overwritten, all that is shared by other mirrors there included. What others fill the file
//!   system with is not ours to know.
//! - **First pass only.** What guests write later has blocks of its own; copied into the target's own, it is not shared again and again.

use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::collections::BTreeMap;
use std::sync::{Mutex as StdMutex, PoisonError};
use std::time::Duration;

use super::job::{Job, Live};
use crate::dirty::Claim;
use crate::image::{CopyOffer, ExtentStatus};
use crate::range::ByteRange;
use crate::sync::{Instant, Mutex, MutexGuard};

/// Guests may be kept out for 10 ms; a piece that takes half of that makes the next one smaller, ...
const HELD_MAX: Duration = Duration::from_millis(5);
/// ... and one that takes less than this makes it larger.
const HELD_MIN: Duration = Duration::from_millis(1);
/// The same for all of it: what is cached of the source is written out first, and a guest that writes to both images waits for the claim.
const CLAIMED_MAX: Duration = Duration::from_millis(100);
/// At 4 KiB an extent, the smallest still takes about 2 ms on a busy machine.
const STRIDE_MIN_BYTES: u64 = 1 << 20;
const STRIDE_FIRST_BYTES: u64 = 4 << 20;
const STRIDE_MAX_BYTES: u64 = 256 << 20;
/// Requests to share end at a multiple of this: no file system has larger blocks.
const BLOCK_BYTES: u64 = 64 << 10;

/// What this process has shared, or is about to, on each file system (by device number). Never less: an image that was left still shares its
/// blocks.
static PROMISED: StdMutex<BTreeMap<u64, u64>> = StdMutex::new(BTreeMap::new());

/// Part of [`PROMISED`]: what was not shared in the end is given back.
#[derive(Debug)]
struct Promise {
    device: u64,
    left_bytes: u64,
    shared_bytes: u64,
}

impl Promise {
    /// `None`: guests could find the file system full.
    fn new(device: u64, bytes: u64, room: u64) -> Option<Promise> {
        let mut promised = PROMISED.lock().unwrap_or_else(PoisonError::into_inner);
        let all = promised.entry(device).or_default();
        if room < all.saturating_add(bytes) {
            return None;
        }
        *all += bytes;
        Some(Promise { device, left_bytes: bytes, shared_bytes: 0 })
    }

    fn shared(&mut self, bytes: u64) {
        self.left_bytes = self.left_bytes.saturating_sub(bytes);
        self.shared_bytes += bytes;
    }

    /// What has not been shared will not be.
    fn give_back_rest(&mut self) {
        let mut promised = PROMISED.lock().unwrap_or_else(PoisonError::into_inner);
        let all = promised.entry(self.device).or_default();
        *all = all.saturating_sub(std::mem::take(&mut self.left_bytes));
    }

    /// Nothing is shared any more.
    fn give_back_all(&mut self) {
        self.left_bytes += std::mem::take(&mut self.shared_bytes);
        self.give_back_rest();
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.give_back_rest();
    }
}

/// The sharing of one job.
#[derive(Debug)]
pub(super) struct Sharing {
    /// Not wanted, refused, or too little room; for good.
    off: AtomicBool,
    shared_bytes: AtomicU64,
    turn: Mutex<Turn>,
}

#[derive(Debug)]
struct Turn {
    /// Once the room was looked at.
    promise: Option<Promise>,
    stride_bytes: u64,
}

/// The right to share the next piece.
pub(super) struct MyTurn<'a>(MutexGuard<'a, Turn>);

impl Sharing {
    pub(super) fn new(wanted: bool) -> Self {
        let turn = Turn { promise: None, stride_bytes: STRIDE_FIRST_BYTES };
        Sharing { off: AtomicBool::new(!wanted), shared_bytes: AtomicU64::new(0), turn: Mutex::new(turn) }
    }

    /// Bytes of data that were shared instead of copied.
    pub(super) fn shared_bytes(&self) -> u64 {
        self.shared_bytes.load(Relaxed)
    }

    /// To be asked for before a claim is taken, and kept until it ends: two at a time would keep guests out twice as long. `None`:
    /// nothing is shared now.
    pub(super) fn turn(&self, job: &Job) -> Option<MyTurn<'_>> {
        let is_off = || self.off.load(Relaxed) || job.comparing || job.counters.passes.load(Relaxed) > 0;
        if is_off() {
            return None;
        }
        let turn = self.turn.lock();
        (!is_off()).then_some(MyTurn(turn))
    }

    /// The target was removed: what it shared is the source's alone.
    pub(super) fn target_is_gone(&self) {
        if let Some(promise) = &mut self.turn.lock().promise {
            promise.give_back_all();
        }
    }

    fn end(&self, job: &Job, turn: &mut Turn, why: &str) {
        if let Some(promise) = &mut turn.promise {
            promise.give_back_rest();
        }
        if !self.off.swap(true, Relaxed) {
            log::info!("job {}: {why}: the blocks of the source are copied", job.id());
        }
    }
}

/// Makes the target share the blocks of `claim` with the source. Returns how many bytes of data that were; `None`: the claim, as it was
/// taken, is to be copied.
pub(super) fn share(job: &Job, live: &Live, claim: &mut Claim, turn: &mut MyTurn<'_>) -> Option<u64> {
    let (sharing, turn) = (&job.sharing, &mut *turn.0);
    let taken = claim.range();
    let disk = ByteRange::new(0, live.map.size_bytes());
    let ends_whole = |range: ByteRange| range.end() % BLOCK_BYTES == 0 && range.end() <= disk.end();
    if !ends_whole(taken) || live.source.extent_within(taken).status != ExtentStatus::Data {
        // The end of an odd disk is copied; a hole is freed faster.
        return None;
    }
    let room = live.target.image().room().map_or(0, |room| room.available_bytes);
    if turn.promise.is_none() {
        let device = live.target.image().identity().map_or(0, |identity| identity.device);
        let bytes = live.source.allocated_bytes().unwrap_or(u64::MAX);
        turn.promise = Promise::new(device, bytes, room);
        if turn.promise.is_none() {
            sharing.end(job, turn, "there is no room for two copies");
            return None;
        }
    }
    let end = (taken.start() + turn.stride_bytes).min(disk.end());
    claim.extend(end - end % BLOCK_BYTES);
    let range = claim.range();
    // Bits were cleared: only now may the source be asked (rule 3).
    let data_bytes = data_in(live, range);
    if room < sharing.shared_bytes() + data_bytes {
        claim.truncate(taken.end());
        sharing.end(job, turn, "the file system is full but for what is shared");
        return None;
    }
    let begun = Instant::now();
    let offer = if ends_whole(range) { live.target.share(&*live.source, range) } else { Ok(CopyOffer::Declined) };
    match offer {
        Ok(CopyOffer::Copied { held }) => {
            if sharing.shared_bytes.fetch_add(data_bytes, Relaxed) == 0 {
                log::info!(
                    "job {}: shares blocks with the source, which is no second copy: see --no-reflink",
                    job.id()
                );
            }
            if let Some(promise) = &mut turn.promise {
                promise.shared(data_bytes);
            }
            let took = begun.elapsed();
            let stride = match () {
                () if held > HELD_MAX || took > CLAIMED_MAX => turn.stride_bytes / 2,
                () if held < HELD_MIN && took < CLAIMED_MAX / 4 => turn.stride_bytes * 2,
                () => turn.stride_bytes,
            };
            turn.stride_bytes = stride.clamp(STRIDE_MIN_BYTES, STRIDE_MAX_BYTES);
            Some(data_bytes)
        }
        Ok(CopyOffer::Declined) => {
            claim.truncate(taken.end());
            sharing.end(job, turn, "these two images cannot share");
            None
        }
        Err(error) => {
            // What is wrong, copying meets too, and names it as its own.
            claim.truncate(taken.end());
            sharing.end(job, turn, &error.to_string());
            None
        }
    }
}

fn data_in(live: &Live, range: ByteRange) -> u64 {
    let (mut at, mut data_bytes) = (range.start(), 0);
    while at < range.end() {
        let extent = live.source.extent_at(at);
        let end = if extent.range.end() > at { extent.range.end().min(range.end()) } else { range.end() };
        if extent.status == ExtentStatus::Data {
            data_bytes += end - at;
        }
        at = end;
    }
    data_bytes
}
