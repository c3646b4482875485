//! A file system on a loop device over the mounted disk is worked on by several threads while the disk moves from A to B and
//! on to C. Afterwards, on C itself: fsck finds nothing, and every file is there with every byte.

mod common;

use std::path::Path;

use common::block_device::{FileSystem, LoopDevice};
use common::command::{is_root, long, run};
use common::mounted::Mount;
use common::place::Place;
use common::random;
use common::tree::{self, Workload};

fn moves_twice(place: &Place, make: &[&str], check: &[&str], mount_options: &str, livemirror_options: &[&str]) {
    if !is_root("a loop device") {
        return;
    }
    let seed = random::seed();
    let size = if long() { 2 << 30 } else { 320 << 20 };
    let [a, b, c] = [place.sparse("a.img", size), place.at("b.img"), place.at("c.img")];
    let mounted = Mount::of(place, [&a]).with(livemirror_options.iter().copied()).start();
    let steps = if long() { 4_000 } else { 500 };

    let device = LoopDevice::over(&mounted.disk("a.img"));
    let name = device.path.to_str().expect("UTF-8").to_owned();
    run(make[0], make[1..].iter().copied().chain([&*name])).ok();
    let root = place.directory("live");
    let filesystem = FileSystem::mount(&["-o", mount_options, &name], &root);
    let workload = Workload::start(&root, 4, seed);
    for target in [&b, &c] {
        workload.wait_for_more(steps);
        mounted.mirror(target, &[]);
        workload.wait_for_more(steps);
        mounted.wait_ready();
        workload.wait_for_more(steps);
        mounted.cutover();
        assert_eq!(mounted.active(), *target);
        workload.wait_for_more(steps);
    }
    let manifest = workload.stop();
    tree::assert_files(&manifest, &root, &root);
    filesystem.unmount();
    device.detach();
    mounted.unmount();

    check_image(place, &c, check, &manifest, &root);
}

fn check_image(place: &Place, image: &Path, check: &[&str], manifest: &tree::Manifest, old_root: &Path) {
    let device = LoopDevice::over(image);
    let name = device.path.to_str().expect("UTF-8").to_owned();
    run(check[0], check[1..].iter().copied().chain([&*name])).ok();
    let root = place.directory("checked");
    let filesystem = FileSystem::mount(&["-o", "ro", &name], &root);
    tree::assert_files(manifest, old_root, &root);
    filesystem.unmount();
    device.detach();
}

#[test]
fn ext4_moves_twice() {
    let (make, check) = (["mkfs.ext4", "-q", "-F"], ["fsck.ext4", "-f", "-n"]);
    moves_twice(&Place::in_memory(), &make, &check, "rw", &[]);
}

#[test]
fn ext4_that_discards_moves_twice_with_direct_io() {
    let (make, check) = (["mkfs.ext4", "-q", "-F"], ["fsck.ext4", "-f", "-n"]);
    moves_twice(&Place::on_disk(), &make, &check, "discard", &["-o", "cache=none"]);
}

#[test]
fn xfs_moves_twice() {
    moves_twice(&Place::in_memory(), &["mkfs.xfs", "-q", "-f"], &["xfs_repair", "-n"], "rw", &["--growable"]);
}
