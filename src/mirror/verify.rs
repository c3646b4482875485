//! Comparing both images of a mirror while the guest runs.
//!
//! ```text
//! watch the piece -> quiet (nothing dirty, claimed or held there)? -> read both -> same: on to the next
//!        ^                                                         \-> not: under the barrier: still quiet, untouched? a difference
//!        \---------------------- later, if it is not ------------------------/
//! ```
//!
//! What is dirty may differ, and a guest's write that is between the source and its mark makes a difference that is none. So one is
//! believed only if, seen under the barrier, no guest has changed the piece since before it was read. Nothing is read under the barrier:
//! an image that does not answer keeps no guest. What is never quiet for long enough is counted as unsettled. Nothing is written.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::job::{Job, Live};
use crate::error::{Error, Result};
use crate::image::{ExtentStatus, Image};
use crate::range::ByteRange;
use crate::sync::{Arc, Instant, thread};

/// Bytes that are read of each image at a time.
const PIECE_BYTES: u64 = 256 << 10;
/// What is reported as different.
const BLOCK_BYTES: u64 = 4 << 10;
/// A step ends after this, so that whoever waits for it can be interrupted.
const STEP: Duration = Duration::from_millis(200);
/// How long one piece is waited for.
const PATIENCE: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(2);
/// Guests are held no longer than this, also where one of their writes does not return.
const BARRIER_PATIENCE: Duration = Duration::from_millis(20);

/// What one step has found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Where the next step begins; `None`: everything was looked at.
    pub next: Option<u64>,
    /// Bytes that were seen to be the same, holes included.
    pub same_bytes: u64,
    /// Bytes that never were quiet.
    pub unsettled_bytes: u64,
    /// Bytes of blocks that differ.
    pub differing_bytes: u64,
    /// The first of them.
    pub first_difference: Option<u64>,
}

enum Found {
    Same,
    Unsettled,
    Different(u64),
}

/// Compares from the byte `from` on, for about 200 ms.
///
/// # Errors
/// `NotNow`: the mirror has ended, or is not ready. One of the images cannot be read.
pub fn step(job: &Job, from: u64) -> Result<Verified> {
    job.check_whole("compare the images")?;
    let live = job.live().ok_or_else(|| ended(job))?;
    if !job.state.lock().ready {
        let error = Error::not_now("the mirror is not ready: much is still to be copied:");
        return Err(error.on(job.volume().name()).advise("wait until `livemirror status` says ready"));
    }
    let size_bytes = live.map.size_bytes();
    let mut verified = Verified::default();
    let mut buffers = [vec![0; PIECE_BYTES as usize], vec![0; PIECE_BYTES as usize]];
    let until = Instant::now() + STEP;
    let mut at = from;
    while at < size_bytes && Instant::now() < until {
        if job.live.lock().is_none() {
            return Err(ended(job));
        }
        let piece = ByteRange::new(at, PIECE_BYTES).intersect(ByteRange::new(0, size_bytes));
        let (range, found) = look(job, &live, piece, &mut buffers)?;
        match found {
            Found::Same => verified.same_bytes += range.len(),
            Found::Unsettled => verified.unsettled_bytes += range.len(),
            Found::Different(block) => {
                verified.differing_bytes += range.len();
                verified.first_difference.get_or_insert(block);
            }
        }
        at = range.end();
    }
    verified.next = (at < size_bytes).then_some(at);
    Ok(verified)
}

fn ended(job: &Job) -> Error {
    Error::not_now("the mirror has ended:").on(job.volume().name())
}

/// True if guests' changes still go through this job's tracking.
fn is_tracked(job: &Job, live: &Live) -> bool {
    job.volume().tracking().is_some_and(|tracking| Arc::ptr_eq(&tracking, &live.tracking))
}

/// Looks at `piece`, or where it is not all the same, at a part of it from its start on.
fn look(job: &Job, live: &Live, piece: ByteRange, buffers: &mut [Vec<u8>; 2]) -> Result<(ByteRange, Found)> {
    // A mirror that is paused settles nothing.
    let patience = if job.must_yield() { Duration::ZERO } else { PATIENCE };
    let deadline = Instant::now() + patience;
    loop {
        let watch = live.tracking.watch(piece);
        let part = match hole_of_both(live, piece) {
            Some(hole) if live.map.is_quiet(hole) => return Ok((hole, Found::Same)),
            _ => piece,
        };
        if live.map.is_quiet(part) {
            let Some(block) = first_difference(live, part, buffers)? else { return Ok((part, Found::Same)) };
            if block.start() > part.start() {
                // What lies before it was the same.
                return Ok((ByteRange::from_bounds(part.start(), block.start()), Found::Same));
            }
            if let Some(_raised) = job.volume().raise_barrier(Some(Instant::now() + BARRIER_PATIENCE)) {
                if !is_tracked(job, live) {
                    // Guests write to one image only since.
                    return Err(ended(job));
                }
                if live.map.is_quiet(block) && !watch.was_touched() {
                    return Ok((block, Found::Different(block.start())));
                }
            }
        }
        drop(watch);
        if Instant::now() >= deadline {
            return Ok((piece, Found::Unsettled));
        }
        thread::sleep(RETRY);
    }
}

/// The beginning of `piece`, or more than it, if that is a hole in both images: nothing need be read.
fn hole_of_both(live: &Live, piece: ByteRange) -> Option<ByteRange> {
    let disk = ByteRange::new(0, live.map.size_bytes());
    let hole = |image: &dyn Image| {
        let extent = image.extent_within(piece);
        (extent.status != ExtentStatus::Data).then(|| extent.range.intersect(disk))
    };
    let (source, target) = (hole(&*live.source)?, hole(&**live.target.image())?);
    Some(source.intersect(target)).filter(|hole| !hole.is_empty())
}

/// The first block of `range` that is not the same on both images.
fn first_difference(live: &Live, range: ByteRange, buffers: &mut [Vec<u8>; 2]) -> Result<Option<ByteRange>> {
    let [source, target] = buffers.each_mut().map(|buffer| &mut buffer[..range.len() as usize]);
    live.source.read_once(range.start(), source)?;
    live.target.image().read_once(range.start(), target)?;
    if source == target {
        return Ok(None);
    }
    let blocks = source.chunks(BLOCK_BYTES as usize).zip(target.chunks(BLOCK_BYTES as usize));
    let at = blocks.take_while(|(source, target)| source == target).count() as u64 * BLOCK_BYTES;
    Ok(Some(ByteRange::new(range.start() + at, BLOCK_BYTES).intersect(range)))
}
