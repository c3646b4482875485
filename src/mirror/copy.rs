//! The copiers: claim, look, read, write.
//!
//! ```text
//! budget in hand -> claim (bits cleared, rule 3) -> share blocks, where that is possible (`share`)
//!                                                -> for each part: ask for extents -> Data: read, leave out zero blocks, write
//!                                                                  -> hole: free or zero the target
//!                -> finish,  or drop (marked again) on any error
//! ```
//!
//! A claim never sleeps. What was learnt of the source before a bit was cleared is not used after.

use crate::sync::atomic::Ordering::{Relaxed, SeqCst};

use super::job::{Job, Live};
use super::scope::common;
use super::share::share;
use super::types::Operation;
use crate::dirty::Claim;
use crate::error::Error;
use crate::image::ExtentStatus;
use crate::range::{ByteRange, Granule};
use crate::volume::Change;

/// Bytes of one read, one write and one copier's buffer.
pub(super) const PIECE_BYTES: u64 = 1 << 20;
/// A hole is claimed on up to this length where freeing it is one cheap operation.
const THIN_STRIDE_BYTES: u64 = 1 << 30;
/// ... and up to this where zeroes may really be written.
const ZERO_STRIDE_BYTES: u64 = 16 << 20;
/// What nobody has changed between two changes is copied with them up to this length: less than what two requests cost.
const GAP_BYTES: u64 = 16 << 10;
/// The smallest run of zero bytes within data that is left out of the target.
const ZERO_BLOCK_BYTES: usize = 4096;

/// What a claim has come to, as far as the speed limit is concerned.
#[derive(Debug, Default)]
struct Copied {
    data_bytes: u64,
    /// Zeroes that a target had to write in place of holes.
    zero_bytes: u64,
}

/// One side's failure.
pub(super) type Failure = (Operation, Error);

/// Copies until the job ends.
pub(super) fn run(job: &Job, live: &Live) {
    let granularity = live.map.granularity().bytes();
    let mut buffer = vec![0; PIECE_BYTES.min(job.options.buffer_bytes.max(granularity.min(PIECE_BYTES))) as usize];
    let mut held = vec![0; if job.comparing { buffer.len() } else { 0 }];
    while job.wait_to_copy() {
        let careful = job.counters.careful.load(Relaxed) > 0;
        let piece = if careful { granularity } else { job.pacer.piece(PIECE_BYTES).max(granularity) };
        if !job.pacer.acquire(piece, || job.must_yield()) {
            continue;
        }
        let mut turn = job.sharing.turn(job);
        let resumes = job.counters.resumes.load(SeqCst);
        let cursor = job.counters.cursor.load(Relaxed);
        let Some(mut claim) = live.map.claim(Granule(cursor), (piece / granularity) as u32) else {
            job.pacer.refund(piece);
            drop(turn);
            live.map.wait_for_work(None, || job.must_yield());
            // Before it waits for the speed limit, which it may be the supervisor's to lift.
            if job.supervisor_idle.load(SeqCst) {
                job.notify();
            }
            continue;
        };
        if job.frozen.load(SeqCst) {
            // A cutover looked whether anything is claimed: before this claim, which is then given back without a look at an image.
            job.pacer.refund(piece);
            continue;
        }
        if job.supervisor_idle.load(SeqCst) {
            job.notify();
        }
        let first = claim.range().start();
        let mut copied = Copied::default();
        let shared_bytes = turn.as_mut().and_then(|turn| share(job, live, &mut claim, turn));
        drop(turn);
        let result = match shared_bytes {
            Some(_) => Ok(()),
            None => copy_claim(job, live, &mut claim, (&mut buffer, &mut held), &mut copied),
        };
        let next = live.map.granularity().granule_of(claim.range().end()).0;
        job.counters.cursor.store(next, Relaxed);
        if live.map.granularity().granule_of(first).0 < cursor {
            job.counters.passes.fetch_add(1, Relaxed);
        }
        let written = copied.data_bytes + copied.zero_bytes;
        job.pacer.refund(piece.saturating_sub(written));
        job.pacer.charge(written.saturating_sub(piece));
        match result {
            Ok(()) => {
                let cleared = claim.range().len();
                claim.finish();
                job.counters.cleared.fetch_add(cleared, Relaxed);
                job.counters.copied.fetch_add(copied.data_bytes + shared_bytes.unwrap_or(0), Relaxed);
                if careful {
                    let _ = job.counters.careful.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
                }
                if live.map.is_in_sync() {
                    job.notify();
                }
            }
            Err((operation, error)) => {
                drop(claim);
                job.copy_failed_since(resumes, operation, error);
            }
        }
    }
}

fn copy_claim(
    job: &Job,
    live: &Live,
    claim: &mut Claim,
    (buffer, held): (&mut [u8], &mut [u8]),
    copied: &mut Copied,
) -> Result<(), Failure> {
    let mut parts = claim.parts(GAP_BYTES);
    if parts == [claim.range()] {
        let first = live.source.extent_within(claim.range());
        if first.status != ExtentStatus::Data && first.range.end() > claim.range().end() {
            let thin = live.target.image().properties().thin_zeroing;
            let stride = if thin { THIN_STRIDE_BYTES } else { ZERO_STRIDE_BYTES };
            // More bits are cleared here: what follows asks anew for all of the claim.
            claim.extend(first.range.end().min(claim.range().start() + stride));
            parts = claim.parts(GAP_BYTES);
        }
    }
    parts.into_iter().try_for_each(|part| copy_part(job, live, part, (buffer, held), copied))
}

fn copy_part(
    job: &Job,
    live: &Live,
    range: ByteRange,
    (buffer, held): (&mut [u8], &mut [u8]),
    copied: &mut Copied,
) -> Result<(), Failure> {
    let mut at = range.start();
    while at < range.end() {
        if job.stopping.load(SeqCst) {
            // Given up in the middle; dropping the claim marks it again.
            return Err((Operation::Write, Error::not_now("the job ends")));
        }
        let wanted = ByteRange::from_bounds(at, range.end()).split(buffer.len() as u64).0;
        let common = common(job, live, wanted);
        if !common.is_empty() {
            job.counters.skipped.fetch_add(common.len(), Relaxed);
            at = common.end();
            continue;
        }
        let extent = live.source.extent_within(wanted);
        // An extent that does not move on would be a bug of the image.
        let end = if extent.range.end() > at { extent.range.end() } else { wanted.end() };
        let part = ByteRange::from_bounds(at, end);
        if extent.status == ExtentStatus::Data {
            let piece = part.intersect(wanted);
            let bytes = &mut buffer[..piece.len() as usize];
            live.source.read_once(piece.start(), bytes).map_err(|error| (Operation::Read, error))?;
            copied.data_bytes +=
                write_data(job, live, piece.start(), bytes, held).map_err(|error| (Operation::Write, error))?;
            at = piece.end();
        } else {
            let hole = part.intersect(range);
            copied.zero_bytes += clear(job, live, hole).map_err(|error| (Operation::Write, error))?;
            at = hole.end();
        }
    }
    Ok(())
}

/// What is to be done with a run of blocks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// All zero: left out.
    Zero,
    /// The target holds it already.
    Same,
    New,
}

/// Writes `bytes`, but leaves holes where whole blocks are zero. Returns how many of them are data of the source.
fn write_data(job: &Job, live: &Live, offset: u64, bytes: &[u8], held: &mut [u8]) -> Result<u64, Error> {
    let mut data_bytes = bytes.len() as u64;
    // What the target holds, read after the claim was taken: nobody else writes there.
    let held = match job.comparing && !live.target.is_distrusted() {
        true => {
            let held = &mut held[..bytes.len()];
            live.target.rely_on(ByteRange::new(offset, bytes.len() as u64));
            live.target.image().read_once(offset, held)?;
            Some(&*held)
        }
        false => None,
    };
    let part_at = |at: usize| {
        let end = next_block(offset, at, bytes.len());
        match held {
            _ if is_zero_block(&bytes[at..]) => Part::Zero,
            Some(held) if held[at..end] == bytes[at..end] => Part::Same,
            _ => Part::New,
        }
    };
    let mut at = 0;
    while at < bytes.len() {
        let part = part_at(at);
        let mut end = next_block(offset, at, bytes.len());
        while end < bytes.len() && part_at(end) == part {
            end = next_block(offset, end, bytes.len());
        }
        let place = offset + at as u64;
        match part {
            Part::Zero => {
                let run = ByteRange::new(place, (end - at) as u64);
                let extent = live.source.extent_within(run);
                if extent.status != ExtentStatus::Data {
                    data_bytes -= extent.range.intersect(run).len();
                }
                clear(job, live, run)?;
            }
            Part::Same => {
                job.counters.skipped.fetch_add((end - at) as u64, Relaxed);
            }
            Part::New => live.target.copy(place, &bytes[at..end])?,
        }
        at = end;
    }
    Ok(data_bytes)
}

/// The end of the block (in the disk's own alignment) that starts or lies at `at` of a buffer read from `offset`.
fn next_block(offset: u64, at: usize, len: usize) -> usize {
    let place = offset + at as u64;
    let block = ZERO_BLOCK_BYTES as u64;
    at.saturating_add((block - place % block) as usize).min(len)
}

/// True if the first block of `bytes` is all zero. Blocks are compared with the system's `memcmp`.
fn is_zero_block(bytes: &[u8]) -> bool {
    static ZEROES: [u8; ZERO_BLOCK_BYTES] = [0; ZERO_BLOCK_BYTES];
    let block = &bytes[..bytes.len().min(ZERO_BLOCK_BYTES)];
    block == &ZEROES[..block.len()]
}

/// Makes the target read as zeroes, by the thinnest means it has. Returns how many it had to write.
fn clear(job: &Job, live: &Live, range: ByteRange) -> Result<u64, Error> {
    live.target.apply(Change::Discard(range))?;
    let thin = live.target.image().properties().thin_zeroing;
    let counter = if thin { &job.counters.discarded } else { &job.counters.zeroed };
    counter.fetch_add(range.len(), Relaxed);
    Ok(if thin { 0 } else { range.len() })
}
