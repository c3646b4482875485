//! Damaged files in which metadata counts as free, or as data: nothing is written over it, and repairing the file brings all back.

use super::qcow2::{new_file, open_qcow2, qemu, qemu_img, text};
use super::qcow2_damage::patched;
use super::*;

const CLUSTER: usize = 512;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

/// A sound file of QEMU's with small clusters, and where its parts are.
struct Damaged {
    directory: tempfile::TempDir,
    path: std::path::PathBuf,
}

impl Damaged {
    /// A disk of a MiB; `None` without qemu-img. Its first 4 KiB are written, all of them 7.
    fn new() -> Option<Damaged> {
        let directory = quick_directory();
        let path = directory.path().join("disk.qcow2");
        new_file(&path, "cluster_size=512", 1 << 20)?;
        let made = Damaged { directory, path };
        made.qemu_io("write -q -P 7 0 4k");
        Some(made)
    }

    fn qemu_io(&self, command: &str) {
        let done = qemu("qemu-io", &["-f", "qcow2", "-c", command, text(&self.path)]).unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    fn number(&self, at: usize) -> usize {
        usize::try_from(u64::from_be_bytes(self.bytes()[at..at + 8].try_into().unwrap()) & OFFSET).unwrap()
    }

    fn l1(&self) -> usize {
        self.number(40)
    }

    fn refcount_table(&self) -> usize {
        self.number(48)
    }

    fn block(&self) -> usize {
        self.number(self.refcount_table())
    }

    fn l2(&self, index: usize) -> usize {
        self.number(self.l1() + index * 8)
    }

    fn set(&self, at: usize, entry: u64) {
        patched(&self.path, at, &entry.to_be_bytes());
    }

    /// The refcount of the cluster at `offset` becomes `count`.
    fn set_refcount(&self, offset: usize, count: u16) {
        patched(&self.path, self.block() + offset / CLUSTER * 2, &count.to_be_bytes());
    }

    /// A change that must be refused, with the image named, and what to do.
    fn refused(&self, what: &str, change: impl FnOnce(&dyn Image) -> Result<()>) {
        let before = self.bytes();
        let image = open_qcow2(&self.path, CacheMode::Writeback);
        let error = change(&*image).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
        assert!(error.to_string().contains(text(&self.path)) && error.to_string().contains("offset"), "{error}");
        assert!(error.advice().unwrap().contains(&format!("qemu-img check -r all {}", text(&self.path))), "{error}");
        // What needs no new cluster goes on.
        image.write_at(512, &[7; 512]).unwrap();
        let mut seen = [0; 4096];
        image.read_at(0, &mut seen).unwrap();
        assert!(seen.iter().all(|&byte| byte == 7), "{what}");
        drop(image);
        let after = self.bytes();
        assert!(after[..before.len()] == before && after[before.len()..].iter().all(|&byte| byte == 0), "{what}");
    }

    /// QEMU repairs the file, and all of the disk is there.
    fn repaired(&self, what: &str) {
        let done = qemu("qemu-img", &["check", "-r", "all", "-f", "qcow2", text(&self.path)]).unwrap();
        assert!(done.status.success(), "{what}: {}", String::from_utf8_lossy(&done.stderr));
        self.qemu_io("read -q -P 7 0 4k");
    }
}

#[test]
fn metadata_that_counts_as_free_is_not_given_out() {
    let Some(sound) = Damaged::new() else { return };
    let places = [
        ("the header", 0),
        ("the refcount table", sound.refcount_table()),
        ("the refcount block", sound.block()),
        ("the L1 table", sound.l1()),
        ("the second cluster of the L1 table", sound.l1() + CLUSTER),
        ("the L2 table", sound.l2(0)),
    ];
    for (what, place) in places {
        let made = Damaged::new().unwrap();
        made.set_refcount(place, 0);
        made.refused(what, |image| image.write_at(8192, &[1; 512]));
        made.repaired(what);
    }
}

#[test]
fn a_refcount_block_is_not_made_where_metadata_is() {
    let Some(made) = Damaged::new() else { return };
    // All clusters of the file count as free; the block that is missing would come to the first of them, the header.
    made.set(made.refcount_table(), 0);
    made.refused("a block", |image| image.write_at(8192, &[1; 512]));
    made.repaired("a block");
}

#[test]
fn a_row_of_clusters_for_a_table_is_not_put_where_metadata_is() {
    let Some(made) = Damaged::new() else { return };
    // The L1 entry of a part of the disk that is not looked at.
    let past_the_end = made.bytes().len().next_multiple_of(64 << 10) + CLUSTER;
    made.set(made.l1() + 20 * 8, past_the_end as u64 | COPIED);
    // More than is reserved in a row: it comes to the end of the file.
    made.refused("a row", |image| image.resize(1 << 30));
}

#[test]
fn the_refcount_table_is_not_moved_to_where_metadata_is() {
    let Some(made) = Damaged::new() else { return };
    // The table has 64 entries for blocks of 256 clusters. The file ends in what the last one counts.
    let covered = 64 * 256 * CLUSTER;
    std::fs::File::options().write(true).open(&made.path).unwrap().set_len((covered - (64 << 10)) as u64).unwrap();
    let image = open_qcow2(&made.path, CacheMode::Writeback);
    made.set(made.l1() + 20 * 8, (covered + 2 * CLUSTER) as u64 | COPIED);
    drop(image);
    let error = {
        let image = open_qcow2(&made.path, CacheMode::Writeback);
        // Needs a row of 1024 clusters.
        image.resize(2 << 30).unwrap_err()
    };
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("counts as free"), "{error}");
    assert!(error.to_string().contains(&format!("offset {}", covered + 2 * CLUSTER)), "{error}");
    made.qemu_io("read -q -P 7 0 4k");
}

#[test]
fn metadata_that_was_data_too_is_not_freed() {
    let Some(made) = Damaged::new() else { return };
    // Another cluster of the disk has the first L2 table as its data.
    made.qemu_io("write -q -P 3 64k 512");
    let (shown_there, table) = (made.l2(2), made.l2(0));
    made.set(shown_there, table as u64 | COPIED);
    let image = open_qcow2(&made.path, CacheMode::Writeback);
    let disk = ByteRange::new(64 << 10, 512);
    for error in [image.write_at(disk.start(), &[1; 512]), image.read_at(disk.start(), &mut [0; 512])] {
        let error = error.unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("overlap"), "{error}");
    }
    image.discard(disk).expect("that takes the damage away");
    image.flush().unwrap();
    image.write_at(128 << 10, &[9; 100 << 10]).unwrap();
    drop(image);
    made.qemu_io("read -q -P 7 0 4k");
    made.repaired("an L2 table");
}

#[test]
fn a_table_that_is_used_as_two_is_not_written() {
    let Some(made) = Damaged::new() else { return };
    made.qemu_io("write -q -P 3 64k 512");
    let own = made.l2(2);
    made.set(made.l1() + 2 * 8, made.l2(0) as u64 | COPIED);
    made.refused("two parts of the disk", |image| image.write_at((64 << 10) + 8192, &[1; 512]));
    for (what, at, place) in [
        ("an L2 table where the L1 table is", made.l1() + 2 * 8, made.l1()),
        ("a refcount block where an L2 table is", made.refcount_table() + 8, made.l2(0)),
    ] {
        made.set(made.l1() + 2 * 8, own as u64 | COPIED);
        made.set(at, place as u64);
        let error = open(&made.path, &options(CacheMode::Writeback)).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("two tables"), "{what}: {error}");
        open(&made.path, &OpenOptions::default()).expect("it may be read");
    }
}

#[test]
fn a_table_at_the_end_that_counts_as_free_is_not_cut_off() {
    let Some(made) = Damaged::new() else { return };
    made.qemu_io("write -q -P 3 64k 1k");
    let table = made.l2(2);
    made.qemu_io("discard -q 64k 1k");
    made.set_refcount(table, 0);
    assert_eq!(made.number(table), 0);
    let image = open_qcow2(&made.path, CacheMode::Writeback);
    image.discard(ByteRange::new(0, 1024)).unwrap();
    drop(image);
    assert!(made.bytes().len() >= table + CLUSTER, "the table is gone");
    qemu_img(&["check", "-q", "-r", "all", text(&made.path)]).unwrap();
    assert!(made.directory.path().exists());
}
