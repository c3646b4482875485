//! Whose mount it is: an ordinary user mounts, mirrors and unmounts through fusermount3 with nothing but /dev/fuse; nobody else
//! may use the disk or the control socket, unless `--allow-other` says so, and then the disk's mode decides.

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use common::command::{self, Done, is_root, run};
use common::compare;
use common::leftovers;
use common::mounted::{Mount, as_user};
use common::place::Place;

/// An account that every Debian has and that may do nothing.
const USER: &str = "nobody";
const UID: u32 = 65_534;

/// Only root can become somebody else; and an ordinary user must be allowed to open /dev/fuse, as everywhere but in some
/// containers.
fn can_try() -> bool {
    if !is_root("becoming another user") {
        return false;
    }
    let open = fs::metadata("/dev/fuse").is_ok_and(|device| device.mode() & 0o006 == 0o006);
    if !open {
        // What udev does on every real machine.
        fs::set_permissions("/dev/fuse", Permissions::from_mode(0o666)).expect("chmod /dev/fuse");
    }
    true
}

fn shell_as(user: &str, script: &str, argument: &Path) -> Done {
    run("runuser", ["-u", user, "--", "sh", "-c", script, argument.to_str().expect("UTF-8")])
}

#[test]
fn an_ordinary_user_does_it_all() {
    if !can_try() {
        return;
    }
    let place = Place::in_memory();
    let image = place.random("disk.img", 4 << 20, 1);
    let mounted = Mount::of(&place, [&image]).by(USER).start();
    for pid in [mounted.server_pid, mounted.keeper_pid] {
        assert_eq!(fs::metadata(format!("/proc/{pid}")).expect("a process").uid(), UID);
    }
    let disk = mounted.disk("disk.img");
    shell_as(USER, "dd if=/dev/urandom of=\"$0\" bs=64k count=20 conv=notrunc,fsync 2>&1", &disk).ok();
    let target = place.at("target.img");
    mounted.mirror(&target, &[]);
    mounted.wait_ready();
    shell_as(USER, "dd if=/dev/urandom of=\"$0\" bs=64k count=5 seek=30 conv=notrunc 2>&1", &disk).ok();
    mounted.cutover();
    let seen = shell_as(USER, "cksum < \"$0\"", &disk).ok();
    mounted.unmount();
    assert_eq!(shell_as(USER, "cksum < \"$0\"", &target).ok().stdout, seen.stdout);
    assert_eq!(fs::metadata(&target).expect("stat").uid(), UID);
    compare::assert_same_content(&image, &target);
}

#[test]
fn an_ordinary_users_mount_ends_by_fusermount3() {
    if !can_try() {
        return;
    }
    let place = Place::in_memory();
    let image = place.random("disk.img", 1 << 20, 1);
    let mut mounted = Mount::of(&place, [&image]).by(USER).start();
    shell_as(USER, "fusermount3 -u \"$0\"", &mounted.mountpoint).ok();
    mounted.assert_gone();
}

#[test]
fn an_ordinary_users_idle_mount_ends_by_a_signal() {
    if !can_try() {
        return;
    }
    let place = Place::in_memory();
    let image = place.random("disk.img", 1 << 20, 1);
    let mut mounted = Mount::of(&place, [&image]).by(USER).start();
    run("runuser", ["-u", USER, "--", "kill", &mounted.server_pid.to_string()]).ok();
    common::wait::until("the mount to end", || leftovers::mounts_below(place.path()).is_empty());
    mounted.assert_gone();
}

#[test]
fn others_are_kept_out() {
    if !can_try() {
        return;
    }
    let place = Place::in_memory();
    let image = place.random("disk.img", 1 << 20, 1);
    fs::set_permissions(&image, Permissions::from_mode(0o666)).expect("chmod");
    let mounted = Mount::of(&place, [&image]).start();
    let denied = shell_as(USER, "cat \"$0\" > /dev/null", &mounted.disk("disk.img"));
    assert_ne!(denied.code, Some(0), "root's disk without --allow-other: {denied}");
    assert_eq!(fs::metadata(&mounted.control).expect("stat").mode() & 0o777, 0o600);
    let mut status = as_user(USER, ["status"]);
    status.arg(&mounted.mountpoint).arg("--json");
    assert_ne!(command::finish(status).code, Some(0), "another user's status");
    let mut unmount = as_user(USER, ["unmount"]);
    unmount.arg(&mounted.mountpoint);
    assert_ne!(command::finish(unmount).code, Some(0), "another user's unmount");
    let denied = shell_as(USER, "fusermount3 -u \"$0\"", &mounted.mountpoint);
    assert_ne!(denied.code, Some(0), "another user's fusermount3 -u: {denied}");
    mounted.unmount();
}

#[test]
fn allow_other_leaves_it_to_the_disks_mode() {
    if !can_try() {
        return;
    }
    let place = Place::in_memory();
    let image = place.random("disk.img", 1 << 20, 1);
    fs::set_permissions(&image, Permissions::from_mode(0o600)).expect("chmod");
    let mounted = Mount::of(&place, [&image]).with(["--allow-other"]).start();
    let disk = mounted.disk("disk.img");
    assert_ne!(shell_as(USER, "cat \"$0\" > /dev/null", &disk).code, Some(0), "mode 600");
    fs::set_permissions(&disk, Permissions::from_mode(0o604)).expect("chmod");
    shell_as(USER, "cat \"$0\" > /dev/null", &disk).ok();
    assert_ne!(shell_as(USER, "echo x 1<> \"$0\"", &disk).code, Some(0), "mode 604");
    std::os::unix::fs::chown(&disk, Some(UID), None).expect("chown");
    // Every kind of request of another user, not only reads and writes.
    let all = "echo x 1<> \"$0\" && fallocate -p -o 4096 -l 4096 \"$0\" && xfs_io -c 'seek -a 0' \"$0\" && sync \"$0\"";
    shell_as(USER, all, &disk).ok();
    mounted.unmount();
    assert_eq!(fs::read(&image).expect("read")[..2], *b"x\n");
    assert_eq!(fs::metadata(&image).expect("stat").uid(), 0, "the image keeps its owner");
}

#[test]
fn list_shows_a_user_its_own_mounts_and_root_all() {
    if !can_try() {
        return;
    }
    let (mine, theirs) = (Place::in_memory(), Place::in_memory());
    let images = [&mine, &theirs].map(|place| place.random("disk.img", 1 << 20, 1));
    let root = Mount::of(&mine, [&images[0]]).start();
    let user = Mount::of(&theirs, [&images[1]]).by(USER).start();
    let all = command::livemirror(["list"]).ok().stdout;
    for mounted in [&root, &user] {
        assert!(all.contains(mounted.mountpoint.to_str().expect("UTF-8")), "root sees every mount of the host: {all}");
    }
    let own = command::finish(as_user(USER, ["list", "--json"])).ok();
    assert!(own.stdout.contains(user.mountpoint.to_str().expect("UTF-8")), "{own}");
    assert!(!own.stdout.contains(root.mountpoint.to_str().expect("UTF-8")), "{own}");
    own.json();
    user.unmount();
    root.unmount();
}
