//! Syncs of a qcow2 file and writes of its metadata that fail: nothing is called durable that is not, and the disk can be written again
//! once the reason is gone.

use super::super::qcow2::journal::{self, Event};
use super::qcow2::{check_file, new_file, open_qcow2};
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
