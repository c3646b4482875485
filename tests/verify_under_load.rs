//! `livemirror verify` compares both images of a mirror while the guest writes: they are the same, or it says where they are not.

mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use common::mounted::Mount;
use common::pattern::{self, Habits, Load, Table};
use common::place::Place;
use common::random;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 * MIB;

#[test]
fn both_images_are_the_same_until_somebody_else_writes() {
    let (place, seed) = (Place::on_disk(), random::seed());
    let (a, b) = (place.sparse("a.img", SIZE), place.at("b.img"));
    let table = Table::new(seed, SIZE);
    pattern::fill(&a, &table);
    let mounted = Mount::of(&place, [&a]).start();
    mounted.mirror(&b, &["--speed", "1M", "--copy-mode", "write-blocking"]);
    mounted.verb::<&str>("verify", []).exits_with(3);
    mounted.verb("set", ["--speed", "0"]).ok();
    mounted.wait_ready();
    let habits = Habits { depth: 4, ..Habits::default() };
    let load = Load::start(&mounted.disk("a.img"), &table, habits, seed);
    load.wait_for_more(100);
    let same = mounted.verb::<&str>("verify", []).ok();
    assert!(same.stdout.contains("the same"), "{same}");
    load.wait_for_more(100);
    load.stop();

    // Past every lock, as only root on the target's host could.
    let target = OpenOptions::new().read(true).write(true).open(&b).expect("open");
    let mut byte = [0];
    target.read_exact_at(&mut byte, 5 * MIB + 10).expect("read");
    target.write_all_at(&[byte[0] ^ 1], 5 * MIB + 10).expect("write");
    let differs = mounted.verb::<&str>("verify", []).exits_with(4);
    assert!(differs.complaint().contains(&(5 * MIB).to_string()), "{differs}");
    mounted.verb::<&str>("cancel", []).ok();
    mounted.unmount();
    table.assert_on(&a);
}
