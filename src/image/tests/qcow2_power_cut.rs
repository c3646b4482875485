//! A power cut takes any part of what was not synced, sector by sector: the file has no error afterwards, and what a guest flushed
//! is there, also in the rest of a cluster that was copied because of a later write.

use super::super::qcow2::journal::{self, Event};
use super::model::{SIZE_MAX, Step, apply, step};
use super::qcow2::{check_file, new_file, open_qcow2, qemu_img, text};
use super::*;
use proptest::prelude::*;

const SECTOR: usize = 512;

/// The file once the power is back: all of `events` up to the last sync, and some of the rest.
pub(super) fn after_the_cut(before: &[u8], events: &[Event], seed: u64) -> Vec<u8> {
    let synced = events.iter().rposition(|event| matches!(event, Event::Synced)).map_or(0, |at| at + 1);
    let (mut file, mut state) = (before.to_vec(), seed | 1);
    for (number, event) in events.iter().enumerate() {
        let mut survives = || {
            // xorshift: any sequence will do that the seed decides.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            number < synced || state % 2 == 0
        };
        match event {
            Event::Synced => (),
            Event::Len(len) if survives() => file.resize(usize::try_from(*len).unwrap(), 0),
            Event::Len(_) => (),
            Event::Zero(range) => {
                let range =
                    usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap().min(file.len());
                if survives() && range.start < range.end {
                    file[range].fill(0);
                }
            }
            Event::Write { offset, bytes } => {
                let mut at = usize::try_from(*offset).unwrap();
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let (sector, more) = rest.split_at(rest.len().min(SECTOR - at % SECTOR));
                    if survives() {
                        file.resize(file.len().max(at + sector.len()), 0);
                        file[at..at + sector.len()].copy_from_slice(sector);
                    }
                    (at, rest) = (at + sector.len(), more);
                }
            }
        }
    }
    file
}

/// What a step changes.
fn touched(step: &Step, size: usize) -> std::ops::Range<usize> {
    match *step {
        Step::Write(offset, len, _) | Step::Zero(offset, len) | Step::Discard(offset, len) => {
            let start = usize::try_from(offset).unwrap().min(size);
            start..(start + len).min(size)
        }
        _ => 0..0,
    }
}

/// Cuts the power at the end of `work`, a few times, and looks at the file.
fn cut_after(path: &Path, work: impl FnOnce(&dyn Image), look: impl Fn(&Path)) {
    let before = std::fs::read(path).unwrap();
    journal::start();
    let image = open_qcow2(path, CacheMode::Writeback);
    work(&*image);
    let events = journal::take();
    drop(image);
    let found = path.with_extension("found.qcow2");
    for seed in 1..=12_u64 {
        std::fs::write(&found, after_the_cut(&before, &events, seed.wrapping_mul(0x9E37_79B9_7F4A_7C15))).unwrap();
        check_file(&found, true);
        look(&found);
    }
}

#[test]
fn nothing_is_referred_to_before_its_refcount_is_durable() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    if new_file(&path, "cluster_size=64k", 8 << 20).is_none() {
        return;
    }
    cut_after(&path, |image| image.write_at(0, &[1; 20_000]).unwrap(), |_| ());
}

#[test]
fn a_table_that_a_snapshot_shares_is_copied_before_the_copy_is_referred_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    if new_file(&path, "cluster_size=4k", 1 << 20).is_none() {
        return;
    }
    open_qcow2(&path, CacheMode::Writeback).write_at(0, &vec![5; 1 << 20]).unwrap();
    qemu_img(&["snapshot", "-c", "then", text(&path)]).unwrap();
    let look = |found: &Path| {
        let image = open(found, &OpenOptions::default()).unwrap();
        let mut seen = vec![0; (1 << 20) - 4096];
        image.read_at(4096, &mut seen).unwrap();
        assert!(seen.iter().all(|&byte| byte == 5), "what was not written is gone");
    };
    cut_after(&path, |image| image.write_at(0, &[6; 4096]).unwrap(), look);
}

#[test]
fn what_was_copied_out_of_a_backing_file_is_durable_before_it_is_referred_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    std::fs::write(directory.path().join("base.img"), vec![5; 1 << 20]).unwrap();
    if new_file(&path, "cluster_size=64k,backing_file=base.img,backing_fmt=raw", 1 << 20).is_none() {
        return;
    }
    // The room, and the table: what follows is the copied cluster and its entry only.
    let image = open_qcow2(&path, CacheMode::Writeback);
    image.write_at(512 << 10, &[6; 64 << 10]).unwrap();
    image.flush().unwrap();
    drop(image);
    let look = |found: &Path| {
        let image = open(found, &OpenOptions::default()).unwrap();
        let mut seen = vec![0; (512 << 10) - 4096];
        image.read_at(4096, &mut seen).unwrap();
        assert!(seen.iter().all(|&byte| byte == 5), "what was not written is gone");
    };
    cut_after(&path, |image| image.write_at(0, &[6; 4096]).unwrap(), look);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_power_cut_leaves_a_sound_file_with_all_that_was_flushed(
        cluster in prop_oneof![Just("512"), Just("4k"), Just("64k")],
        backed in any::<bool>(),
        size in 50_000..SIZE_MAX,
        steps in proptest::collection::vec(step(), 1..25),
        cut in 0.0..1.0_f64,
        seed in any::<u64>(),
    ) {
        let directory = quick_directory();
        let at = |name: &str| directory.path().join(name);
        let size = size.next_multiple_of(512);
        let mut model = vec![0_u8; usize::try_from(size).unwrap()];
        let mut options = format!("cluster_size={cluster}");
        if backed {
            model.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 77 % 250) as u8 + 1);
            std::fs::write(at("base.img"), &model).unwrap();
            options += ",backing_file=base.img,backing_fmt=raw";
        }
        let path = at("disk.qcow2");
        if new_file(&path, &options, size).is_none() {
            return Ok(());
        }
        let before = std::fs::read(&path).unwrap();
        journal::start();
        let image = open_qcow2(&path, CacheMode::Writeback);
        // At which event a flush had ended, and a step began.
        let mut flushes = vec![(0, model.clone())];
        let mut changes = Vec::new();
        for step in steps.iter().filter(|step| !matches!(step, Step::Resize(_) | Step::Allocate(..))) {
            changes.push((journal::len(), touched(step, model.len())));
            apply(&*image, &mut model, step);
            if matches!(step, Step::Flush) {
                flushes.push((journal::len(), model.clone()));
            }
        }
        drop(image);
        let events = journal::take();
        let cut = (events.len() as f64 * cut) as usize;
        let found = at("found.qcow2");
        std::fs::write(&found, after_the_cut(&before, &events[..cut], seed)).unwrap();
        check_file(&found, true);

        let (since, flushed) = flushes.iter().rev().find(|(event, _)| *event <= cut).unwrap();
        let mut free = vec![false; flushed.len()];
        for (event, range) in changes.iter().filter(|(event, _)| *event >= *since && *event <= cut) {
            prop_assert!(*event <= cut);
            free[range.clone()].fill(true);
        }
        let raw = at("found.img");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", text(&found), text(&raw)]).unwrap();
        let seen = std::fs::read(&raw).unwrap();
        let lost = (0..flushed.len()).find(|&at| !free[at] && seen[at] != flushed[at]);
        prop_assert!(lost.is_none(), "byte {lost:?} was flushed and is not there");
    }
}
