//! Ready, in sync, thin: what a mirror that is left alone comes to.

use super::super::types::{CopyMode, MirrorOptions};
use super::*;
use crate::image::memory::MemoryOptions;
use crate::range::ByteRange;

#[test]
fn a_sparse_disk_stays_sparse_and_holes_cost_nothing() {
    let world = World::new();
    let source = disk(64);
    for place in 0..40u64 {
        source.write_at(place * (3 << 19), &block_bytes(place, 1)).unwrap();
    }
    // Data that happens to be all zero becomes a hole.
    source.write_at(20 << 20, &vec![0; 1 << 20]).unwrap();
    let volume = volume("disk", source.clone());
    let target = MemoryImage::new("target", 64 << 20);
    let job = world.mirror(&volume, target.clone(), MirrorOptions::new("j", "target"));
    wait_for("ready", || job.status() == JobStatus::Ready);
    assert!(read_all(&*source) == read_all(&*target));
    assert_eq!(target.allocated_bytes().unwrap(), 40 * BLOCK as u64);
    let info = job.info();
    assert!(info.skipped_bytes > 60 << 20);
    assert_eq!(info.copied_bytes, info.data_bytes);
    assert!(info.copied_bytes < 4 << 20, "holes are not counted: {}", info.copied_bytes);
    assert!(info.in_sync && info.ready);
}

#[test]
fn a_small_write_costs_a_small_copy() {
    let world = World::new();
    let source = disk(4);
    source.write_at(0, &vec![7; 4 << 20]).unwrap();
    let volume = volume("disk", source.clone());
    let target = MemoryImage::new("target", 4 << 20);
    let options = MirrorOptions { copy_mode: CopyMode::Background, ..MirrorOptions::new("j", "target") };
    let job = world.mirror(&volume, target.clone(), options);
    wait_for("ready", || job.status() == JobStatus::Ready);
    let write_everywhere = |round: u64| {
        let before = job.info().copied_bytes;
        for granule in 0..64 {
            volume.write(granule << 16, &block_bytes(granule << 16, round), false).unwrap();
        }
        wait_for("in sync", || job.info().in_sync);
        job.info().copied_bytes - before
    };
    write_everywhere(1);
    // From now on it is known what was copied before. Each is copied once, or twice if it was written at that moment.
    let copied = write_everywhere(2);
    assert!((64 * BLOCK as u64..=128 * BLOCK as u64).contains(&copied), "{copied}");
    assert!(read_all(&*source) == read_all(&*target));
}

#[test]
fn a_reused_target_full_of_old_data_ends_equal_and_as_thin() {
    let world = World::new();
    let source = disk(16);
    source.write_at(5 << 20, &block_bytes(1, 1)).unwrap();
    let target = MemoryImage::new("target", 16 << 20);
    target.write_at(0, &vec![0xAA; 16 << 20]).unwrap();
    let volume = volume("disk", source.clone());
    let job = world.mirror_onto(&volume, target.clone(), false, MirrorOptions::new("j", "target"));
    wait_for("ready", || job.status() == JobStatus::Ready);
    assert!(read_all(&*source) == read_all(&*target));
    assert_eq!(target.allocated_bytes().unwrap(), BLOCK as u64);
}

#[test]
fn a_guests_discards_reach_the_target_before_and_after_ready() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        let world = World::new();
        let source = disk(8);
        source.write_at(0, &vec![7; 8 << 20]).unwrap();
        let volume = volume("disk", source.clone());
        let target = MemoryImage::new("target", 8 << 20);
        let options = MirrorOptions { copy_mode: mode, ..MirrorOptions::new("j", "target") };
        let job = world.mirror(&volume, target.clone(), options);
        volume.punch_hole(ByteRange::new(1 << 20, 1 << 20)).unwrap();
        wait_for("ready", || job.status() == JobStatus::Ready);
        volume.punch_hole(ByteRange::new(4 << 20, 1 << 20)).unwrap();
        volume.zero_range(ByteRange::new((6 << 20) + 100, 5000), true).unwrap();
        wait_for("in sync", || job.info().in_sync);
        assert!(read_all(&*source) == read_all(&*target));
        assert!(target.allocated_bytes().unwrap() <= source.allocated_bytes().unwrap());
    }
}

#[test]
fn a_target_that_cannot_discard_is_zeroed() {
    let world = World::new();
    let source = disk(2);
    source.write_at(0, &block_bytes(1, 1)).unwrap();
    let options = MemoryOptions { can_discard: false, ..MemoryOptions::default() };
    let target = MemoryImage::with_options("target", 2 << 20, options);
    target.write_at(0, &vec![0xAA; 2 << 20]).unwrap();
    let volume = volume("disk", source.clone());
    let job = world.mirror_onto(&volume, target.clone(), false, MirrorOptions::new("j", "target"));
    wait_for("ready", || job.status() == JobStatus::Ready);
    assert!(read_all(&*source) == read_all(&*target));
}

#[test]
fn disks_of_odd_sizes_are_mirrored_whole() {
    for size in [0u64, 1, 511, 4097, 65_537, (1 << 20) + 513] {
        let world = World::new();
        let source = MemoryImage::new("source", size);
        if size > 0 {
            source.write_at(size - 1, &[9]).unwrap();
        }
        let volume = volume("disk", source.clone());
        let target = MemoryImage::new("target", size);
        let job = world.mirror(&volume, target.clone(), MirrorOptions::new("j", "target"));
        wait_for("ready", || job.status() == JobStatus::Ready);
        assert!(read_all(&*source) == read_all(&*target), "size {size}");
        world.cut_over(&[job]);
    }
}

#[test]
fn auto_becomes_write_blocking_under_pressure_and_then_ready() {
    let world = World::new();
    let volume = volume("disk", disk(32));
    let target = crate::image::faulty::FaultyImage::new(MemoryImage::new("target", 32 << 20));
    // The target is slower than the guest.
    use crate::image::faulty::{Effect, Fault, Operation};
    target.add(Fault::new(Operation::Write, Effect::Delay(Duration::from_millis(2))));
    let guests: Vec<_> = (0..2).map(|n| Guest::start(&volume, n * 4096, 4096)).collect();
    let job = world.mirror(&volume, target, MirrorOptions::new("j", "target"));
    wait_for("write-blocking", || volume.tracking().unwrap().is_synchronous());
    wait_for("ready", || job.status() == JobStatus::Ready);
    guests.into_iter().for_each(|guest| drop(guest.stop()));
    wait_for("background again once the guest is quiet", || !volume.tracking().unwrap().is_synchronous());
    assert!(job.info().ready);
}

#[test]
fn write_blocking_keeps_both_images_equal_while_guests_overlap() {
    let world = World::new();
    let volume = volume("disk", disk(1));
    let source = volume.active();
    let target = MemoryImage::new("target", 1 << 20);
    let options = MirrorOptions { copy_mode: CopyMode::WriteBlocking, ..MirrorOptions::new("j", "target") };
    let job = world.mirror(&volume, target.clone(), options);
    // Four guests on the same few bytes, unaligned, so that holds, claims and partly covered granules all meet.
    let guests: Vec<_> = (0..4u64)
        .map(|guest| {
            let volume = volume.clone();
            std::thread::spawn(move || {
                for turn in 0..2000u64 {
                    let offset = (turn * 7919 + guest * 31) % (128 << 10);
                    volume.write(offset, &[guest as u8 + 1; 5000], false).unwrap();
                }
            })
        })
        .collect();
    guests.into_iter().for_each(|guest| guest.join().unwrap());
    wait_for("in sync", || job.info().in_sync);
    assert!(read_all(&*source) == read_all(&*target));
}

/// Zeroes that a target has to write take its time as data does.
#[test]
fn zeroes_that_are_really_written_count_against_the_limit() {
    let world = World::new();
    let volume = volume("disk", disk(128));
    let target =
        MemoryImage::with_options("target", 128 << 20, MemoryOptions { can_discard: false, ..Default::default() });
    let options = MirrorOptions { speed_bytes_per_second: 128 << 20, ..MirrorOptions::new("j", "target") };
    let begun = std::time::Instant::now();
    let job = world.mirror_onto(&volume, target.clone(), false, options);
    wait_for("ready", || job.status() == JobStatus::Ready);
    // A second's worth, less one burst and the first stretch of each copier: never faster, however slow the machine.
    let took = begun.elapsed();
    assert!(job.info().zeroed_bytes >= 128 << 20);
    assert!(took >= std::time::Duration::from_millis(200), "{took:?}");
}
