//! Syncs of a qcow2 file and writes of its metadata that fail: nothing is called durable that is not, and the disk can be written again
//! once the reason is gone.

use super::super::qcow2::journal::{self, Event};
use super::qcow2::{check_file, new_file, open_qcow2, qemu, text};
use super::qcow2_power_cut::after_the_cut;
use super::*;

const CLUSTER: u64 = 64 << 10;

/// The failure of a sync that a new cluster needed.
fn fail_an_internal_sync(image: &dyn Image) {
    journal::fail_next_sync();
    // More than is reserved.
    image.write_at(1 << 20, &vec![3; 32 << 20]).unwrap_err();
}

#[test]
fn a_failed_sync_of_our_own_fails_the_next_flush() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let Some(()) = new_file(&path, "cluster_size=64k", 64 << 20) else { return };
    let image = open_qcow2(&path, CacheMode::Writeback);
    image.write_at(0, &[1; 4096]).unwrap();
    fail_an_internal_sync(&*image);
    image.flush().expect_err("what was written before may be lost");
    image.flush().expect("it was told of");
    image.write_at(0, &[2; 4096]).unwrap();
    image.flush().unwrap();
    drop(image);
    // What the failed reservation marked is leaked.
    check_file(&path, true);
}

#[test]
fn metadata_that_a_failed_sync_lost_is_written_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let Some(()) = new_file(&path, "cluster_size=64k", 64 << 20) else { return };
    let before = std::fs::read(&path).unwrap();
    let image = open_qcow2(&path, CacheMode::Writeback);
    journal::start();
    image.write_at(0, &[1; 4096]).unwrap();
    image.flush().unwrap();
    let durable = journal::len();
    image.write_at(5 * CLUSTER, &[2; 4096]).unwrap();
    fail_an_internal_sync(&*image);
    let failed = journal::len();
    image.flush().unwrap_err();
    // What is told that its data may be lost writes the data again, into the same cluster.
    image.write_at(5 * CLUSTER, &[2; 4096]).unwrap();
    image.flush().unwrap();
    let events = journal::take();
    drop(image);

    let mut file = before;
    for (number, event) in events.into_iter().enumerate() {
        match event {
            Event::Len(len) => file.resize(usize::try_from(len).unwrap(), 0),
            Event::Write { offset, bytes } if !(durable..failed).contains(&number) => {
                let offset = usize::try_from(offset).unwrap();
                file.resize(file.len().max(offset + bytes.len()), 0);
                file[offset..offset + bytes.len()].copy_from_slice(&bytes);
            }
            _ => (),
        }
    }
    let copy = directory.path().join("copy.qcow2");
    std::fs::write(&copy, file).unwrap();
    check_file(&copy, true);
    let image = open_qcow2(&copy, CacheMode::Writeback);
    let mut found = [0; 4096];
    image.read_at(5 * CLUSTER, &mut found).unwrap();
    assert!(found == [2; 4096], "flush said that it is durable");
}

#[test]
fn a_full_file_system_is_no_reason_to_give_the_disk_up() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let Some(()) = new_file(&path, "cluster_size=64k", 64 << 20) else { return };
    let image = open_qcow2(&path, CacheMode::Writeback);
    image.write_at(0, &[1; 4096]).unwrap();
    for errno in [libc::ENOSPC, libc::EDQUOT] {
        journal::fail_next_write(8, errno);
        let error = image.write_at(CLUSTER, &[2; 4096]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
    }
    image.write_at(CLUSTER, &[2; 4096]).expect("there is room now");
    image.flush().unwrap();
    drop(image);
    check_file(&path, false);
}

#[test]
fn metadata_that_is_not_known_any_more_is_not_built_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let Some(()) = new_file(&path, "cluster_size=64k", 64 << 20) else { return };
    let image = open_qcow2(&path, CacheMode::Writeback);
    image.write_at(0, &[1; 4096]).unwrap();
    journal::fail_next_write(8, libc::EIO);
    image.write_at(CLUSTER, &[2; 4096]).unwrap_err();
    image.write_at(2 * CLUSTER, &[2; 4096]).expect_err("the file and memory may differ");
}

/// One of the syncs around the move of the refcount table fails, each in turn: the file that is left is sound, also if power is lost then,
/// nothing that was flushed is gone, and the next try moves it.
#[test]
fn a_sync_that_fails_while_the_refcount_table_is_moved_costs_nothing() {
    let directory = quick_directory();
    let path = directory.path().join("disk.qcow2");
    // One cluster of 512 bytes holds 64 entries of the refcount table, for 256 clusters each: 8 MiB.
    let Some(()) = new_file(&path, "cluster_size=512", 16 << 20) else { return };
    let first = vec![1; 7 << 20];
    // By QEMU, which reserves nothing.
    assert!(qemu("qemu-io", &["-f", "qcow2", "-c", "write -q -P 1 0 7M", text(&path)]).unwrap().status.success());
    let before = std::fs::read(&path).unwrap();
    let table_of = |file: &[u8]| u64::from_be_bytes(file[48..56].try_into().unwrap());
    let (mut failed, mut number) = ([0; 2], 0);
    // A few behind the move are enough.
    while failed[1] < 3 {
        std::fs::write(&path, &before).unwrap();
        journal::start();
        let image = open_qcow2(&path, CacheMode::Writeback);
        journal::fail_sync(number);
        image.write_at(8 << 20, &vec![2; 4 << 20]).expect_err("a sync failed");
        let left = std::fs::read(&path).unwrap();
        failed[usize::from(table_of(&left) != table_of(&before))] += 1;
        let copy = directory.path().join("copy.qcow2");
        let sound = |file: &[u8], what: &str| {
            println!("sync {number}: {what}");
            std::fs::write(&copy, file).unwrap();
            check_file(&copy, true);
            // On another thread: what is done to the copy is not to be noted.
            let look = || {
                let image = open_qcow2(&copy, CacheMode::Writeback);
                let mut seen = vec![0; first.len()];
                image.read_at(0, &mut seen).unwrap();
                seen == first
            };
            assert!(std::thread::scope(|scope| scope.spawn(look).join().unwrap()), "{what}");
        };
        sound(&left, "what is left");
        // Of what was not durable any one write may be all that reached the disk.
        let events = journal::so_far();
        let durable = events.iter().rposition(|event| matches!(event, Event::Synced)).map_or(0, |at| at + 1);
        let found = after_the_cut(&before, &events[..durable], 1);
        for event in &events[durable..] {
            if let Event::Write { offset, bytes } = event {
                let (mut found, at) = (found.clone(), usize::try_from(*offset).unwrap());
                found.resize(found.len().max(at + bytes.len()), 0);
                found[at..at + bytes.len()].copy_from_slice(bytes);
                sound(&found, "after a power cut");
            }
        }
        image.flush().expect_err("it was not told of yet");
        image.write_at(8 << 20, &vec![2; 4 << 20]).expect("the next try");
        image.flush().unwrap();
        let events = journal::take();
        drop(image);
        sound(&after_the_cut(&before, &events, 9), "after a power cut behind the flush");
        check_file(&path, true);
        let image = open_qcow2(&path, CacheMode::Writeback);
        let mut seen = vec![0; 4 << 20];
        image.read_at(8 << 20, &mut seen).unwrap();
        assert!(seen.iter().all(|&byte| byte == 2));
        number += 1;
    }
    assert!(failed[0] > 2, "some fail before the header names the new table");
}
