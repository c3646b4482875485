//! The tools of the other tests, tried on plain files: a verifier that finds nothing wrong proves something only if it has
//! been seen to find each kind of damage. Here the damage is planted.

mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::compare;
use common::pattern::{self, BLOCK, Fault, Habits, Load, Table};
use common::place::Place;
use common::random;

const SIZE: u64 = 4 << 20;

fn written_file(place: &Place) -> (PathBuf, Arc<Table>) {
    let path = place.sparse("disk.img", SIZE);
    let table = Table::new(7, SIZE);
    pattern::fill(&path, &table);
    let load = Load::start(&path, &table, Habits { direct: false, ..Habits::default() }, random::seed());
    load.wait_for_more(2_000);
    load.stop();
    (path, table)
}

fn overwrite(path: &Path, block: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).expect("open");
    file.write_all_at(bytes, block * BLOCK as u64).expect("write");
}

#[track_caller]
fn only_fault(path: &Path, table: &Table) -> Fault {
    let found = table.verify(path, &table.bounds()).expect_err("the damage was not noticed");
    assert_eq!(found.faults.len(), 1, "{found}");
    found.faults[0].clone()
}

#[test]
fn nothing_where_nothing_is_wrong() {
    let place = Place::in_memory();
    let (path, table) = written_file(&place);
    table.assert_on(&path);
    assert!(table.acknowledged().iter().max() > Some(&2), "the load wrote blocks again and again");
}

#[test]
fn a_lost_write() {
    let place = Place::in_memory();
    let (path, table) = written_file(&place);
    let newest = table.acknowledged();
    let block = (0..table.blocks()).max_by_key(|&block| newest[block as usize]).expect("blocks");
    let acknowledged = newest[block as usize];
    let mut old = vec![0; BLOCK];
    table.render(block, acknowledged - 1, &mut old);
    overwrite(&path, block, &old);
    assert_eq!(only_fault(&path, &table), Fault::Lost { block, says: acknowledged - 1, acknowledged });
}

#[test]
fn a_block_that_was_zeroed() {
    let place = Place::in_memory();
    let (path, table) = written_file(&place);
    overwrite(&path, 5, &[0; BLOCK]);
    assert!(matches!(only_fault(&path, &table), Fault::Lost { block: 5, says: 0, .. }));
}

#[test]
fn a_torn_block() {
    let place = Place::in_memory();
    let (path, table) = written_file(&place);
    let mut other = vec![0; BLOCK];
    table.render(9, table.issued()[9] + 1, &mut other);
    overwrite(&path, 9, &other[..BLOCK / 2]);
    assert!(matches!(only_fault(&path, &table), Fault::Torn { block: 9, .. }));
    table.render(9, table.issued()[9], &mut other);
    other[1_000] ^= 1;
    overwrite(&path, 9, &other);
    assert!(matches!(only_fault(&path, &table), Fault::Torn { block: 9, .. }), "one bit");
}

#[test]
fn a_block_from_elsewhere() {
    let place = Place::in_memory();
    let (path, table) = written_file(&place);
    let mut other = vec![0; BLOCK];
    table.render(11, table.acknowledged()[11], &mut other);
    overwrite(&path, 3, &other);
    assert!(matches!(only_fault(&path, &table), Fault::Foreign { block: 3, of: 11, .. }));
    Table::new(8, SIZE).render(3, 1, &mut other);
    overwrite(&path, 3, &other);
    assert!(matches!(only_fault(&path, &table), Fault::Foreign { block: 3, tag: 8, .. }), "another disk");
}

#[test]
fn a_write_that_nobody_made() {
    let place = Place::in_memory();
    let (path, table) = written_file(&place);
    let mut future = vec![0; BLOCK];
    table.render(3, table.issued()[3] + 1, &mut future);
    overwrite(&path, 3, &future);
    assert!(matches!(only_fault(&path, &table), Fault::NeverIssued { block: 3, .. }));
}

#[test]
fn a_disk_that_forgets_while_it_is_read() {
    let place = Place::in_memory();
    let path = place.sparse("disk.img", SIZE);
    let table = Table::new(7, SIZE);
    let load = Load::start(&path, &table, Habits { depth: 4, direct: false, ..Habits::default() }, random::seed());
    load.wait_for_more(500);
    let forget = || {
        let file = OpenOptions::new().write(true).open(&path).expect("open");
        file.write_all_at(&vec![0; SIZE as usize], 0).expect("write");
    };
    let noticed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        loop {
            forget();
            load.wait_for_more(100);
        }
    }));
    assert!(noticed.is_err());
}

#[test]
fn one_byte_in_a_sparse_file() {
    let place = Place::in_memory();
    let (left, right) = (place.sparse("left", 1 << 40), place.sparse("right", 1 << 40));
    compare::assert_same_content(&left, &right);
    overwrite(&left, 123_456_789 / 4, &[1]);
    overwrite(&right, 123_456_789 / 4, &[1]);
    compare::assert_same_content(&left, &right);
    overwrite(&right, 77_777, &[0, 0, 3]);
    assert_eq!(compare::first_difference(&left, &right), Some(77_777 * BLOCK as u64 + 2));
}
