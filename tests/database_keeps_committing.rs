//! SQLite in WAL mode commits without pause while its disk moves from A to B and on to C. Afterwards, on C itself: the
//! database passes its integrity check, and every transaction whose commit was acknowledged is there.

mod common;

use common::block_device::{FileSystem, LoopDevice};
use common::command::{is_root, long, run};
use common::database::{self, Database};
use common::mounted::Mount;
use common::place::Place;

#[test]
fn over_two_moves() {
    if !is_root("a loop device") {
        return;
    }
    let place = Place::on_disk();
    let size = 96 << 20;
    let [a, b, c] = [place.sparse("a.img", size), place.at("b.img"), place.at("c.img")];
    let mounted = Mount::of(&place, [&a]).start();
    let device = LoopDevice::over(&mounted.disk("a.img"));
    let filesystem = FileSystem::new_ext4(&device.path, &place.at("live"));
    let database = Database::start(&filesystem.path.join("data.db"));
    let commits = if long() { 2_000 } else { 150 };
    for target in [&b, &c] {
        database.wait_for_more(commits);
        mounted.mirror(target, &[]);
        database.wait_for_more(commits);
        mounted.wait_ready();
        mounted.cutover();
        database.wait_for_more(commits);
    }
    let committed = database.stop();
    filesystem.unmount();
    device.detach();
    mounted.unmount();

    let device = LoopDevice::over(&c);
    let name = device.path.to_str().expect("UTF-8").to_owned();
    run("fsck.ext4", ["-f", "-n", &name]).ok();
    let filesystem = FileSystem::mount(&[&name], &place.at("checked"));
    database::assert_holds(&filesystem.path.join("data.db"), committed);
    filesystem.unmount();
    device.detach();
}
