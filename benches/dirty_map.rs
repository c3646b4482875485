//! What tracking costs: a guest's mark, a copier's claim, and finding the next dirty granule in a nearly clean 16 TiB volume.
//! `cargo bench --bench dirty_map`

use std::sync::Arc;

use divan::{Bencher, black_box, counter::ItemsCount};
use livemirror::dirty::DirtyMap;
use livemirror::range::{ByteRange, Granularity, Granule};

const SIZE_BYTES: u64 = 16 << 40;

fn main() {
    divan::main();
}

fn map() -> Arc<DirtyMap> {
    DirtyMap::new(SIZE_BYTES, Granularity::DEFAULT)
}

/// A 4 KiB write to a granule that is dirty already.
#[divan::bench(threads = [1, 2], sample_size = 10_000)]
fn mark_again(bencher: Bencher) {
    let map = map();
    map.mark(ByteRange::new(1 << 30, 4096));
    bencher.bench(|| map.mark(black_box(ByteRange::new(1 << 30, 4096))));
}

/// A 4 KiB write to a clean granule, and its claim.
#[divan::bench(threads = [1, 2], sample_size = 1000)]
fn mark_and_claim(bencher: Bencher) {
    let map = map();
    bencher.bench(|| {
        map.mark(black_box(ByteRange::new(1 << 30, 4096)));
        if let Some(claim) = map.claim(Granule(0), 16) {
            claim.finish();
        }
    });
}

/// What a synchronous 4 KiB write pays beside its two writes.
#[divan::bench(threads = [1, 2], sample_size = 1000)]
fn hold_and_finish(bencher: Bencher) {
    let map = map();
    bencher.bench(|| {
        if let Some(hold) = map.try_hold(black_box(ByteRange::new(1 << 30, 4096))) {
            hold.clear_covered();
            hold.finish();
        }
    });
}

/// One dirty granule at the far end of a clean volume.
#[divan::bench(sample_size = 1000)]
fn next_dirty_nearly_clean(bencher: Bencher) {
    let map = map();
    map.mark(ByteRange::new(SIZE_BYTES - 1, 1));
    bencher.bench(|| map.next_dirty(black_box(Granule(0))));
}

/// The same in a volume that was wholly dirty once, so that all its memory is there.
#[divan::bench(sample_size = 1000)]
fn next_dirty_once_full(bencher: Bencher) {
    let map = map();
    map.mark(ByteRange::new(0, SIZE_BYTES));
    let mut claim = map.claim(Granule(0), 1).unwrap();
    claim.extend(SIZE_BYTES - 1);
    bencher.bench(|| map.next_dirty(black_box(Granule(0))));
    claim.finish();
}

/// Marking all of 16 TiB: what a mirror to a reused target starts with.
#[divan::bench(sample_count = 5, sample_size = 1)]
fn mark_whole_volume(bencher: Bencher) {
    bencher
        .counter(ItemsCount::new(Granularity::DEFAULT.count(SIZE_BYTES)))
        .with_inputs(map)
        .bench_values(|map| map.mark(ByteRange::new(0, SIZE_BYTES)));
}

/// Growing a claim over all of a wholly dirty 16 TiB: one hole.
#[divan::bench(sample_count = 5, sample_size = 1)]
fn extend_over_whole_volume(bencher: Bencher) {
    let dirty = || {
        let map = map();
        map.mark(ByteRange::new(0, SIZE_BYTES));
        map.claim(Granule(0), 1).unwrap()
    };
    bencher.counter(ItemsCount::new(Granularity::DEFAULT.count(SIZE_BYTES))).with_inputs(dirty).bench_values(
        |mut claim| {
            claim.extend(SIZE_BYTES);
            claim.finish();
        },
    );
}
